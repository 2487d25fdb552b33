"""Room forms: what each form says of tools and images, held to the strict stand-in."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import wire
from conftest import RunningBridge
from help import (
    CHAT,
    CLIENTS,
    HI,
    LITE,
    LITE_MODEL,
    MODEL,
    MODELS,
    RESPONSES,
    SCHEMA,
    TOOL,
    USER,
    Object,
    accepted,
    ask,
    models,
    sent,
)

import qoo_bridge as q

# -- images ---------------------------------------------------------------------------

DATA = "data:image/png;base64,AAAA"


def image(**fields: object) -> Object:
    """Return an image as a part."""
    return {"type": "input_image", "image_url": DATA, **fields}


CALL: Object = {"type": "function_call", "call_id": "call_1", "name": "run", "arguments": "{}"}
OUTPUT: Object = {"type": "function_call_output", "call_id": "call_1", "output": "x"}
CUSTOM: Object = {"type": "custom_tool_call", "call_id": "call_2", "name": "patch", "input": "x"}
CUSTOM_OUTPUT: Object = {"type": "custom_tool_call_output", "call_id": "call_2", "output": "x"}
TEXT_PART: Object = {"type": "input_text", "text": "look"}


def with_images(**fields: object) -> list[Object]:
    """Return a history with an image in each place that can have one."""
    parts = [TEXT_PART, image(**fields)]
    return [
        {**HI, "content": [*parts, image(**fields)]}, CALL, {**OUTPUT, "output": parts},
        CUSTOM, {**CUSTOM_OUTPUT, "output": parts},
    ]


@pytest.mark.parametrize("detail", ["high", "low", "auto", "original", None])
@CLIENTS
def test_the_detail_of_an_image_goes_in_the_lite_form(
    bridge: RunningBridge, backend: wire.Backend, headers: dict[str, str], detail: str | None
) -> None:
    reply = ask(bridge, {"model": LITE_MODEL, "input": with_images(detail=detail)}, headers)
    assert accepted(bridge, backend, reply).json["input"] == with_images()


@CLIENTS
def test_the_detail_of_an_image_stays_in_the_plain_form(
    bridge: RunningBridge, backend: wire.Backend, headers: dict[str, str]
) -> None:
    reply = ask(bridge, {**MODEL, "input": with_images(detail="high")}, headers)
    assert accepted(bridge, backend, reply).json["input"] == with_images(detail="high")


@MODELS
def test_a_deep_value_beside_an_image_goes_up(
    bridge: RunningBridge, backend: wire.Backend, model: str
) -> None:
    deep: list[Any] = []
    for _ in range(700):
        deep = [deep]
    item = {**HI, "content": [image(detail="high"), deep]}
    reply = ask(bridge, {"model": model, "input": [item]})
    assert json.dumps(deep).encode() in accepted(bridge, backend, reply).body.replace(b" ", b"")


@pytest.mark.parametrize(("model", "kept"), [("gpt-5.5", True), (LITE_MODEL, False), ("local_md", False)])
def test_the_detail_of_a_chats_image_goes_in_the_lite_form_alone(
    bridge: RunningBridge, backend: wire.Backend, model: str, kept: bool
) -> None:
    part = {"type": "image_url", "image_url": {"url": DATA, "detail": "high"}}
    reply = ask(bridge, {"model": model, "messages": [{"role": "user", "content": [part]}]}, path=CHAT)
    content = accepted(bridge, backend, reply).json["input"][-1]["content"]
    assert content == [image(detail="high") if kept else image()]


# -- namespaces -------------------------------------------------------------------------


def tool(name: str, **fields: object) -> Object:
    """Return a function."""
    return {"type": "function", "name": name, "strict": False, "parameters": SCHEMA, **fields}


def namespace(name: str, *tools: Object) -> Object:
    """Return a namespace of tools."""
    return {"type": "namespace", "name": name, "description": "…", "tools": list(tools)}


READ, WRITE, LIST = tool("read"), tool("write"), tool("list")
SPLIT = [namespace("files", READ), tool("files"), namespace("net", LIST), namespace("files", WRITE, READ)]
MERGED = [namespace("files", READ, WRITE), tool("files"), namespace("net", LIST)]


def carried(request: wire.Request) -> list[Object]:
    """Return the tools of a request in the lite form."""
    return [each for item in request.json["input"] if item["type"] == "additional_tools"
            for each in item["tools"]]


@CLIENTS
def test_namespaces_of_one_name_become_one_with_all_their_tools(
    bridge: RunningBridge, backend: wire.Backend, headers: dict[str, str]
) -> None:
    reply = ask(bridge, {"model": LITE_MODEL, "input": [HI], "tools": SPLIT}, headers)
    assert carried(accepted(bridge, backend, reply)) == MERGED


def test_namespaces_over_several_carriers_become_one(bridge: RunningBridge, backend: wire.Backend) -> None:
    carriers = [{"type": "additional_tools", "role": "developer", "tools": [each]} for each in SPLIT[:3]]
    body: Object = {"model": LITE_MODEL, "input": [*carriers, HI], "tools": SPLIT[3:]}
    assert carried(accepted(bridge, backend, ask(bridge, body))) == MERGED


def test_namespaces_of_a_lite_body_are_merged_for_a_plain_model_too(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    carriers = [{"type": "additional_tools", "role": "developer", "tools": [each]} for each in SPLIT]
    models(bridge)  # without a list the lite header counts
    reply = ask(bridge, {**MODEL, "input": [*carriers, HI]}, LITE)
    assert accepted(bridge, backend, reply).json["tools"] == MERGED


CHOICES = {"type": "function", "name": "read"}


@pytest.mark.parametrize("choice", [
    CHOICES, {"type": "allowed_tools", "mode": "required", "tools": [CHOICES]},
], ids=["forced", "allowed"])
def test_a_forced_tool_of_a_namespace_is_the_only_one_offered(
    bridge: RunningBridge, backend: wire.Backend, choice: Object
) -> None:
    body: Object = {"model": LITE_MODEL, "input": [HI], "tools": [tool("x"), namespace("files", READ, WRITE)]}
    reply = ask(bridge, body, tool_choice=choice)
    assert (reply.status, carried(sent(backend)[-1])) == (200, [namespace("files", READ)])


def test_thousands_of_tools_are_merged_and_chosen_at_once() -> None:
    tools = [namespace("all", tool(f"t{number}")) for number in range(3000)]
    begun = time.process_time()
    (merged,) = q.merge_tools(tools)
    names = [f"t{number}" for number in range(3000)]
    assert [each["name"] for each in merged["tools"]] == names
    choice = {"type": "allowed_tools", "tools": [{"type": "function", "name": name} for name in names]}
    assert q.chosen_tools({"tools": merged["tools"], "tool_choice": choice}) == merged["tools"]
    assert time.process_time() - begun < 0.5  # 20 s if each is compared with each


@pytest.mark.parametrize("odd", [None, 5, [], {}, {"a": [1]}, "\ud800"])
def test_a_tools_name_may_be_anything(odd: Any) -> None:
    tools = [{"type": odd, "name": odd}, {"type": "function", "name": odd}, odd, {"tools": odd}]
    assert q.merge_tools([*tools, *tools]) == tools
    assert q.chosen_tools({"tools": tools, "tool_choice": {"type": "function", "name": odd}}) == [tools[1]]


# -- hosted tools by their former names ----------------------------------------------------

FORMER = ["web_search_preview", "web_search_preview_2025_03_11"]


@pytest.mark.parametrize("kind", FORMER)
@pytest.mark.parametrize("path", [RESPONSES, CHAT])
@CLIENTS
def test_a_search_by_its_former_name_is_sent_by_its_present_one(
    bridge: RunningBridge, backend: wire.Backend, headers: dict[str, str], path: str, kind: str
) -> None:
    asked = "search it"
    body: Object = {"messages": [{**USER, "content": asked}]} if path == CHAT else {"input": asked}
    tools = [{"type": kind, "search_context_size": "low"}]
    reply = ask(bridge, {**MODEL, **body}, headers, path=path, tools=tools)
    request = accepted(bridge, backend, reply)
    assert request.json["tools"] == [{"type": "web_search", "search_context_size": "low"}]


@pytest.mark.parametrize("kind", FORMER)
def test_a_lite_model_is_offered_the_search_by_its_present_name(
    bridge: RunningBridge, backend: wire.Backend, kind: str
) -> None:
    backend.takes_plain.add(LITE_MODEL)
    reply = ask(bridge, {"model": LITE_MODEL, "input": "search it", "tools": [TOOL, {"type": kind}]})
    assert accepted(bridge, backend, reply).json["tools"] == [TOOL, {"type": "web_search"}]


# -- schemas without properties -------------------------------------------------------------------

BARE: Object = {"type": "object"}
SCHEMAS: dict[str, tuple[Object, Object]] = {
    "bare": (BARE, SCHEMA),
    "null": ({"type": "object", "properties": None}, SCHEMA),
    "with-more": ({**BARE, "additionalProperties": False}, {**SCHEMA, "additionalProperties": False}),
    "with-required": ({**BARE, "required": []}, {**SCHEMA, "required": []}),
}
EACH_SCHEMA = pytest.mark.parametrize(("given", "wanted"), SCHEMAS.values(), ids=SCHEMAS)


@EACH_SCHEMA
@CLIENTS
@MODELS
def test_a_schema_without_properties_gets_empty_ones(
    bridge: RunningBridge, backend: wire.Backend, model: str, headers: dict[str, str],
    given: Object, wanted: Object,
) -> None:
    def tools(schema: Object) -> list[Object]:
        inner = tool("inner", parameters=schema)
        return [tool("run", parameters=schema), {"type": "custom", "name": "patch"}, namespace("mcp", inner)]

    reply = ask(bridge, {"model": model, "input": [HI], "tools": tools(given)}, headers)
    request = accepted(bridge, backend, reply)
    assert (carried(request) if model == LITE_MODEL else request.json["tools"]) == tools(wanted)


def test_a_schema_in_a_codexs_own_lite_body_gets_properties_too(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    bare = namespace("mcp", tool("x", parameters=BARE))
    carrier = {"type": "additional_tools", "role": "developer", "tools": [bare]}
    body = {"model": LITE_MODEL, "input": [carrier, HI], "parallel_tool_calls": False, "tool_choice": "auto",
            "reasoning": {"context": "all_turns"}}
    assert carried(accepted(bridge, backend, ask(bridge, body, LITE))) == [namespace("mcp", tool("x"))]


@EACH_SCHEMA
@pytest.mark.parametrize("legacy", [False, True], ids=["tools", "functions"])
def test_a_chats_schema_without_properties_gets_empty_ones(
    bridge: RunningBridge, backend: wire.Backend, legacy: bool, given: Object, wanted: Object
) -> None:
    function = {"name": "run", "parameters": given}
    fields: Object = {"functions": [function]} if legacy else {
        "tools": [{"type": "function", "function": function}]}
    request = accepted(bridge, backend, ask(bridge, {**MODEL, "messages": [USER]}, path=CHAT, **fields))
    assert request.json["tools"][0]["parameters"] == wanted


@pytest.mark.parametrize("schema", [
    {"type": "object", "properties": {"a": {"type": "string"}}}, {}, None, {"type": "string"}, {"anyOf": []},
])
def test_any_other_schema_stays(bridge: RunningBridge, backend: wire.Backend, schema: Any) -> None:
    given = [tool("run", parameters=schema)]
    reply = ask(bridge, {**MODEL, "input": [HI], "tools": given})
    assert accepted(bridge, backend, reply).json["tools"] == given
