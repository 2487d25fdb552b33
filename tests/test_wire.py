"""Test that the stand-in is strict: every refusal of WIRE section 4 is a row.

A stand-in that takes everything would let every other test pass.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import pathlib
import socket
import ssl
import stat
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
import wire

RESPONSES = f"{wire.BASE}/responses"
LITE = {wire.LITE_HEADER: "true", "x-codex-routing-hint": "model=gpt-6-sol"}
CIPHERTEXT = "gAAAAAB_enc"
ABSENT = object()
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
HOLLOW = {"type": "function", "name": "f", "parameters": {"type": "object"}}
HOSTED = [{"type": "web_search"}, {"type": "image_generation"}]
IMAGE = {"type": "input_image", "image_url": "data:,", "detail": "high"}
CALL = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "x"}


@pytest.fixture
def backend() -> Iterator[wire.Backend]:
    """Run a stand-in without TLS, and fail if one of its threads did."""
    with wire.Backend(tls=False) as running:
        yield running


def fields(backend: wire.Backend, **changes: str | None) -> dict[str, str]:
    """Return the fields of a good request; an underscore stands for a hyphen, None takes a field out."""
    good = {
        "host": f"localhost:{backend.address[1]}",
        "version": "0.169.0",
        "x-codex-routing-hint": "model=gpt-5.5",
        "session-id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083",
        "accept": "text/event-stream",
        "content-type": "application/json",
        "authorization": f"Bearer {backend.access_token}",
        "chatgpt-account-id": backend.account_id,
        "originator": "codex_exec",
        "user-agent": "codex_exec/0.169.0 (Debian 12.0.0; x86_64) unknown (codex_exec; 0.169.0)",
    }
    renamed = {name.replace("_", "-"): value for name, value in changes.items()}
    merged: dict[str, str | None] = {**good, **renamed}
    return {name: value for name, value in merged.items() if value is not None}


def message(text: str = "hi", **changes: object) -> wire.Item:
    """Return a user's message."""
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}], **changes}


def thought(**changes: object) -> wire.Item:
    """Return a reasoning item as the official client replays it; ABSENT takes a field out."""
    good = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": CIPHERTEXT, **changes}
    return {name: value for name, value in good.items() if value is not ABSENT}


def plain(**changes: object) -> wire.Event:
    """Return the body of a good request for a plain model; ABSENT takes a field out."""
    good = {"model": "gpt-5.5", "input": [message()], "store": False, "stream": True, **changes}
    return {name: value for name, value in good.items() if value is not ABSENT}


def carrier(*tools: object) -> wire.Item:
    """Return the lite form's carrier of tools."""
    return {"type": "additional_tools", "role": "developer", "tools": list(tools)}


def lite(**changes: object) -> wire.Event:
    """Return the body of a good request for a lite model."""
    tools = carrier({"type": "function", "name": "f"})
    form = {
        "model": "gpt-6-sol",
        "input": [tools, message("be brief", role="developer"), message()],
        "parallel_tool_calls": False,
        "reasoning": {"context": "all_turns", "effort": "low"},
    }
    return plain(**{**form, **changes})


def ask(backend: wire.Backend, body: object, **changes: str | None) -> wire.RawReply:
    """Send a request for a turn."""
    return wire.post(backend.address, RESPONSES, body, fields(backend, **changes))


def told(reply: wire.RawReply) -> str:
    """Return a refusal's text, whichever its form."""
    return str(reply.json.get("detail") or reply.json["error"]["message"])


# == what is taken ============================================================


@pytest.mark.parametrize(
    ("body", "changes"),
    [
        (plain(), {}),
        (plain(instructions="", tools=[{"type": "web_search"}], tool_choice="auto"), {}),
        (plain(model="gpt-5"), {"x_codex_routing_hint": "model=gpt-5"}),
        (plain(service_tier="priority"), {"x_codex_routing_hint": "model=gpt-5.5;tier=priority"}),
        (plain(input=[thought()]), {}),
        (plain(input=[thought(content=None), thought(content=[])]), {}),
        (plain(input=[message(content=[IMAGE])]), {}),
        (plain(input=[{"type": "function_call", "call_id": "c" * 64, "name": "f", "arguments": "{}"}]), {}),
        (plain(prompt_cache_key="k" * 64), {}),
        (plain(reasoning={"effort": "none"}), {}),
        (plain(tools=[FUNCTION, *HOSTED], tool_choice={"type": "function", "name": "f"}), {}),
        (plain(tools=[{"type": "namespace", "name": "n", "tools": [FUNCTION]}], tool_choice="required"), {}),
        (plain(tools=[FUNCTION], tool_choice="none"), {}),
        (plain(input=[{"type": "type-of-tomorrow", "id": "x", "role": "user"}]), {}),
        (plain(input=[message("\ud800")]), {}),
        (plain(input=[message(id="msg_" + "a" * 60)]), {}),
        (plain(reasoning={"effort": "xhigh"}), {}),
        (lite(), LITE),
        (lite(input=[message()]), LITE),
        (lite(input=[carrier(FUNCTION, *HOSTED), message()], tool_choice="auto"), LITE),
        (lite(input=[message(content=[{"type": "input_image", "image_url": "data:,"}])]), LITE),
    ],
)
def test_a_good_request_is_answered(backend: wire.Backend, body: wire.Event, changes: dict[str, str]) -> None:
    reply = ask(backend, body, **changes)
    assert (reply.status, reply.ended) == (200, "last-chunk"), reply.body
    events = wire.sse(reply.body)
    assert [events[0]["type"], events[-1]["type"]] == ["response.created", "response.completed"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"]["output"] == []


# == what is refused in a body ================================================

NOT_FOUND = "Items are not persisted when `store` is set to false"
UNSUPPORTED = [
    "max_output_tokens",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "metadata",
    "user",
    "truncation",
    "safety_identifier",
    "prompt_cache_retention",
    "context_management",
    "stream_options",
    "background",
    "max_tool_calls",
    "previous_response_id",
    "field_of_tomorrow",
]
FIELD_ROWS: list[tuple[wire.Event, int, str]] = [
    (plain(model=ABSENT), 400, "model"),
    (plain(model=5), 400, "model"),
    (plain(store=ABSENT), 400, "Store must be set to false"),
    (plain(store=True), 400, "Store must be set to false"),
    (plain(store=0), 400, "Store must be set to false"),
    (plain(stream=ABSENT), 400, "Stream must be set to true"),
    (plain(stream=False), 400, "Stream must be set to true"),
    (plain(input="hi"), 400, "Input must be a list"),
    (plain(input=ABSENT), 400, "Input must be a list"),
    (plain(instructions=["a"]), 400, "instructions"),
    (plain(tools={}), 400, "tools"),
    (plain(service_tier="fast"), 400, "service_tier"),
    (plain(service_tier="auto"), 400, "service_tier"),
    (plain(reasoning={"effort": "ultra"}), 400, "'ultra' is not supported with the 'gpt-5.5' model"),
    (plain(reasoning={"effort": "max"}), 400, "'max' is not supported with the 'gpt-5.5' model"),
    (plain(prompt_cache_key="k" * 65), 400, "Invalid 'prompt_cache_key': string too long"),
    *[
        (plain(tools=[FUNCTION, {"type": kind}]), 400, f"Unsupported tool type: {kind}")
        for kind in ("web_search_preview", "web_search_preview_2025_03_11")
    ],
    *[
        (plain(tools=[tool], tool_choice=tool), 400, f"Tool choice '{tool['type']}' not found in 'tools'")
        for tool in HOSTED
    ],
    (plain(tools=[FUNCTION], tool_choice={"type": "function", "name": "g"}), 400, "choice 'g' not found"),
    (plain(tool_choice={"type": "custom", "name": "f"}), 400, "Tool choice 'f' not found"),
    (
        plain(tools=[FUNCTION], tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [HOSTED[0]]}),
        400,
        "Tool choice 'web_search' not found",
    ),
    (plain(tools=[FUNCTION], tool_choice="any"), 400, "Invalid value: 'any'"),
    (plain(tools=[HOLLOW]), 400, "Invalid schema for function 'f': In context=(), object schema missing"),
    (
        plain(tools=[FUNCTION, {"type": "namespace", "name": "n", "tools": [HOLLOW]}]),
        400,
        "object schema missing properties",
    ),
]
ITEM_ROWS: list[tuple[object, int, str]] = [
    ("hi", 400, "input[0]"),
    ({"role": "user", "content": "hi"}, 400, "input[0].type"),
    (message(role="system"), 400, "System messages are not allowed"),
    (message(id="msg_" + "a" * 61), 400, "maximum length 64"),
    ({"type": "type-of-tomorrow", "id": "a" * 65}, 400, "maximum length 64"),
    (message(id="item_1"), 400, "begins with 'msg'"),
    (message(id=""), 400, "begins with 'msg'"),
    (message(id=7), 400, "input[0].id"),
    (thought(id="msg_1"), 400, "begins with 'rs'"),
    ({"type": "function_call", "id": "call_1"}, 400, "begins with 'fc'"),
    ({"type": "function_call_output", "id": "fc_1"}, 400, "begins with 'fco'"),
    ({"type": "custom_tool_call", "id": "fc_1"}, 400, "begins with 'ctc'"),
    ({"type": "compaction", "id": "rs_1"}, 400, "begins with 'cmp'"),
    (thought(encrypted_content=ABSENT), 404, NOT_FOUND),
    (thought(encrypted_content=None), 404, NOT_FOUND),
    ({"type": "item_reference", "id": "rs_1"}, 404, NOT_FOUND),
    (thought(encrypted_content="OTHER_account"), 400, "could not be verified"),
    ({"type": "additional_tools", "role": "developer", "tools": []}, 400, "additional_tools"),
    (thought(status="completed"), 400, "Unknown parameter: 'input[0].status'."),
    (thought(status=None), 400, "Unknown parameter: 'input[0].status'."),
    (thought(content=[{"type": "reasoning_text", "text": "x"}]), 400, "'input[0].content': array too long"),
    (thought(summary=ABSENT), 400, "Missing required parameter: 'input[0].summary'."),
    (thought(summary=None), 400, "Invalid type for 'input[0].summary'"),
    (message(name="ann"), 400, "Unknown parameter: 'input[0].name'."),
    (message(prompt_cache_breakpoint=None), 400, "Unknown parameter: 'input[0].prompt_cache_breakpoint'."),
    (message(content=[{"type": "thinking", "text": "x"}]), 400, "Invalid value: 'thinking'."),
    (
        message(content=[{"type": "input_text", "text": "x", "cache_control": {}}]),
        400,
        "Unknown parameter: 'input[0].content[0].cache_control'.",
    ),
    ({**CALL, "index": 0}, 400, "Unknown parameter: 'input[0].index'."),
    ({**OUTPUT, "is_error": False}, 400, "Unknown parameter: 'input[0].is_error'."),
    (
        {**OUTPUT, "output": [{"type": "input_text", "text": "x", "odd": 1}]},
        400,
        "Unknown parameter: 'input[0].output[0].odd'.",
    ),
    ({**CALL, "call_id": "c" * 65}, 400, "Invalid 'input[0].call_id': string too long"),
    ({**OUTPUT, "call_id": "c" * 83}, 400, "but got a string with length 83 instead"),
]


@pytest.mark.parametrize(("body", "status", "text"), FIELD_ROWS)
def test_a_field_is_refused(backend: wire.Backend, body: wire.Event, status: int, text: str) -> None:
    tier = f";tier={body['service_tier']}" if "service_tier" in body else ""
    reply = ask(backend, body, x_codex_routing_hint=f"model=gpt-5.5{tier}")
    assert (reply.status, text in told(reply)) == (status, True), reply.body


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_parameter_is_named(backend: wire.Backend, name: str) -> None:
    reply = ask(backend, plain(**{name: None}))
    assert (reply.status, reply.json) == (400, {"detail": f"Unsupported parameter: {name}"})


@pytest.mark.parametrize(("item", "status", "text"), ITEM_ROWS)
def test_an_item_is_refused(backend: wire.Backend, item: object, status: int, text: str) -> None:
    reply = ask(backend, plain(input=[item]))
    assert (reply.status, text in told(reply)) == (status, True), reply.body


def test_a_foreign_ciphertext_has_its_code(backend: wire.Backend) -> None:
    item = wire.reasoning_item(encrypted_content="OTHER_account")
    assert ask(backend, plain(input=[item])).json["error"]["code"] == "invalid_encrypted_content"


def test_an_id_demands_its_reasoning_item(backend: wire.Backend) -> None:
    backend.partners["msg_1"] = "rs_1"
    answer = message(id="msg_1", role="assistant")
    refused = ask(backend, plain(input=[answer]))
    assert (refused.status, "without its required 'reasoning' item: 'rs_1'" in told(refused)) == (400, True)
    assert ask(backend, plain(input=[wire.reasoning_item("rs_1"), answer])).status == 200


def test_a_tier_that_the_model_does_not_list_is_refused(backend: wire.Backend) -> None:
    for model in backend.catalog:
        model["service_tiers"] = []
    reply = ask(backend, plain(service_tier="priority"), x_codex_routing_hint="model=gpt-5.5;tier=priority")
    assert reply.json == {"detail": "Unsupported service_tier: priority"}


def test_instructions_can_be_required(backend: wire.Backend) -> None:
    backend.require_instructions = True
    assert ask(backend, plain()).json == {"detail": "Instructions are required"}
    assert ask(backend, plain(instructions="")).status == 200


@pytest.mark.parametrize(
    ("changes", "header", "status"),
    [
        ({}, None, 404),
        ({}, "1", 400),
        ({"tools": []}, "true", 400),
        ({"instructions": ""}, "true", 400),
        ({"parallel_tool_calls": True}, "true", 400),
        ({"parallel_tool_calls": ABSENT}, "true", 400),
        ({"reasoning": {"context": "last_turn"}}, "true", 400),
        ({"reasoning": ABSENT}, "true", 400),
        ({"input": [message(), lite()["input"][0]]}, "true", 400),
        ({"input": [{"type": "additional_tools", "role": "user", "tools": [{}]}]}, "true", 400),
        ({"input": [{"type": "additional_tools", "role": "developer", "tools": []}]}, "true", 400),
    ],
)
def test_a_lite_model_wants_the_lite_form(
    backend: wire.Backend, changes: dict[str, Any], header: str | None, status: int
) -> None:
    reply = ask(backend, lite(**changes), **{**LITE, wire.LITE_HEADER: header})
    assert (reply.status, reply.json) == (status, {"detail": "Model not found gpt-6-sol"})


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("required", "required"),
        ("none", "none"),
        ({"type": "function", "name": "f"}, "f"),
        ({"type": "custom", "name": "f"}, "f"),
        ({"type": "web_search"}, "web_search"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
         "allowed_tools"),
    ],
)
def test_the_lite_form_takes_no_choice_but_auto(backend: wire.Backend, choice: object, name: str) -> None:
    reply = ask(backend, lite(tool_choice=choice), **LITE)
    assert (reply.status, told(reply)) == (400, f"Tool choice '{name}' not found in 'tools' parameter.")


@pytest.mark.parametrize(
    ("item", "path"),
    [
        (message(content=[IMAGE]), "content[0]"),
        (message(content=[{"type": "input_text", "text": "x"}, IMAGE]), "content[1]"),
        ({**OUTPUT, "output": [IMAGE]}, "output[0]"),
        ({**OUTPUT, "type": "custom_tool_call_output", "output": [IMAGE]}, "output[0]"),
    ],
)
def test_the_lite_form_knows_no_image_detail(backend: wire.Backend, item: object, path: str) -> None:
    reply = ask(backend, lite(input=[message(), item]), **LITE)
    assert (reply.status, told(reply)) == (400, f"Unknown parameter: 'input[1].{path}.detail'.")
    assert ask(backend, plain(input=[message(), item])).status == 200


def test_a_schema_without_properties_is_refused_in_the_lite_form_too(backend: wire.Backend) -> None:
    reply = ask(backend, lite(input=[carrier(HOLLOW), message()]), **LITE)
    assert reply.json["error"]["param"] == "input[0].tools[0].parameters"


def test_a_lite_model_can_take_the_plain_form_too(backend: wire.Backend) -> None:
    hint = {"x-codex-routing-hint": "model=gpt-6-sol"}
    body = plain(model="gpt-6-sol", tools=[FUNCTION], tool_choice="required", instructions="be brief")
    assert told(ask(backend, body, **hint)) == "Model not found gpt-6-sol"
    backend.takes_plain.add("gpt-6-sol")
    reply = ask(backend, body, **hint)
    assert wire.sse(reply.body)[-2]["item"]["name"] == "f"
    assert ask(backend, lite(), **LITE).status == 200
    assert "responses lite only" in told(ask(backend, lite(), **hint))


SEARCH, DRAW = {"type": "web_search"}, {"type": "image_generation"}


@pytest.mark.parametrize(
    ("body", "head", "kinds"),
    [
        (plain(input=[message("search it")], tools=[SEARCH]), {}, ["web_search_call", "message"]),
        (plain(input=[message("draw it")], tools=[DRAW]), {}, ["image_generation_call"]),
        (plain(input=[message("search it")], tools=[DRAW]), {}, ["message"]),
        (lite(input=[carrier(SEARCH, DRAW), message("search it")]), LITE, ["message"]),
        (lite(input=[carrier(SEARCH, DRAW), message("draw it")]), LITE, ["message"]),
        (
            plain(tools=[FUNCTION], tool_choice={"type": "function", "name": "f"}),
            {},
            ["function_call"],
        ),
    ],
)
def test_a_hosted_tool_runs_in_the_plain_form_alone(
    backend: wire.Backend, body: wire.Event, head: dict[str, str], kinds: list[str]
) -> None:
    events = wire.sse(ask(backend, body, **head).body)
    done = [event["item"]["type"] for event in events if event["type"] == "response.output_item.done"]
    assert done == kinds


def test_a_plain_model_refuses_the_lite_header(backend: wire.Backend) -> None:
    reply = ask(backend, plain(), **{wire.LITE_HEADER: "true"})
    assert (reply.status, "lite is not supported" in told(reply)) == (400, True)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1, "a": 2}',
        b'{"a": "\xff"}',
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_no_json_object_is_refused(backend: wire.Backend, body: bytes) -> None:
    assert ask(backend, body).status == 400


# == what is cached ===========================================================

UUID7 = "01a201e4-4ce1-7c41-adda-ecb6a8c97083"
RANDOM, STRAY = "5a0dd5b4-93a6-4c7e-8f9e-5f5e6d0c6a53", "ffffffff-ffff-7c41-adda-ecb6a8c97083"


def turn_of(backend: wire.Backend, key: object, count: int, **head: str | None) -> wire.Event:
    """Ask with so many messages, all four names alike but for `head`; return the last event's response."""
    names = {"session_id": str(key), "thread_id": str(key), "x_client_request_id": str(key), **head}
    body = plain(input=[message(f"{number} " * 400) for number in range(count)], prompt_cache_key=key)
    events = wire.sse(ask(backend, body, **names).body)
    assert events[0]["response"]["prompt_cache_key"] == events[-1]["response"]["prompt_cache_key"]
    response: wire.Event = events[-1]["response"]
    return response


def cached_share(response: wire.Event) -> float:
    """Return which part of the prompt was cached."""
    usage = response["usage"]
    return float(usage["input_tokens_details"]["cached_tokens"] / usage["input_tokens"])


@pytest.mark.parametrize("key", [UUID7, RANDOM, "a-name"])
def test_the_beginning_of_an_earlier_request_is_cached(backend: wire.Backend, key: str) -> None:
    assert [cached_share(turn_of(backend, key, count)) > 0.8 for count in (9, 10, 11)] == [False, True, True]


@pytest.mark.parametrize("name", wire.CACHE_HEADERS)
@pytest.mark.parametrize("value", [None, "another"])
def test_nothing_is_cached_unless_four_names_are_one(
    backend: wire.Backend, name: str, value: str | None
) -> None:
    if (name, value) == ("session-id", None):
        return  # refused: see test_a_header_is_refused
    shares = [cached_share(turn_of(backend, UUID7, count, **{name: value})) for count in (9, 10)]
    assert shares == [0, 0]


def test_a_changed_name_makes_the_next_turn_cold(backend: wire.Backend) -> None:
    assert [cached_share(turn_of(backend, key, 9)) > 0 for key in (UUID7, RANDOM, UUID7)] == [
        False,
        False,
        True,
    ]


def test_another_beginning_is_not_cached(backend: wire.Backend) -> None:
    head = {"session_id": UUID7, "thread_id": UUID7, "x_client_request_id": UUID7}
    for text in ("one", "two"):
        events = wire.sse(ask(backend, plain(input=[message(text)], prompt_cache_key=UUID7), **head).body)
        assert cached_share(events[-1]["response"]) == 0


@pytest.mark.parametrize(
    ("key", "originator", "kept"),
    [
        (UUID7, "qoo_bridge", True),
        (RANDOM, "qoo_bridge", False),
        (STRAY, "qoo_bridge", False),
        ("a-name", "qoo_bridge", False),
        (RANDOM, "codex_exec", True),
    ],
)
def test_a_key_can_be_replaced(backend: wire.Backend, key: str, originator: str, kept: bool) -> None:
    assert turn_of(backend, key, 1, originator=originator)["prompt_cache_key"] == key
    backend.cache.replaces_keys = True
    responses = [turn_of(backend, key, 9, originator=originator) for _ in range(2)]
    assert [response["prompt_cache_key"] == key for response in responses] == [kept, kept]
    assert (cached_share(responses[1]) > 0.8) == kept


# == what is refused in a head ================================================


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("authorization", None, 401),
        ("authorization", "Bearer client-key", 401),
        ("chatgpt-account-id", None, 401),
        ("chatgpt-account-id", "other", 401),
        ("user-agent", None, 403),
        ("user-agent", "Python-urllib/3.13", 403),
        ("user-agent", "OpenAI/Python 3.54.0", 403),
        ("user-agent", "curl/8.5.0", 403),
        ("originator", None, 403),
        ("version", None, 400),
        ("version", "latest", 400),
        ("session-id", None, 400),
        ("content-type", "text/plain", 400),
        ("content-encoding", "gzip", 415),
        ("accept-encoding", "gzip, deflate", 400),
        ("x-codex-routing-hint", None, 400),
        ("x-codex-routing-hint", "model=local_md", 400),
        ("x-codex-routing-hint", "model=gpt-5.5;tier=priority", 400),
        ("host", "127.0.0.1:4050", 421),
        ("connection", "keep-alive, x-secret", 400),
        ("cookie", "a=b", 400),
        ("x-api-key", "k", 400),
        ("forwarded", "for=192.0.2.1", 400),
        ("x-forwarded-for", "192.0.2.1", 400),
        ("x-real-ip", "192.0.2.1", 400),
        ("via", "1.1 proxy", 400),
        ("cf-connecting-ip", "192.0.2.1", 400),
        ("x-stainless-lang", "python", 400),
        ("te", "trailers", 400),
        ("x-openai-actor-authorization", "lan", 400),
        ("x-openai-internal-other", "x", 400),
        ("upgrade", "h2c", 404),
    ],
)
def test_a_header_is_refused(backend: wire.Backend, name: str, value: str | None, status: int) -> None:
    reply = ask(backend, plain(), **{name: value})
    assert reply.status == status, reply.body
    assert (reply.header("content-type") or "").startswith("text/html") == (status == 403)


def test_a_wanted_header_is_wanted(backend: wire.Backend) -> None:
    backend.required_headers["x-openai-account-routing-override"] = "us"
    assert ask(backend, plain()).status == 400
    assert ask(backend, plain(), x_openai_account_routing_override="us").status == 200


def test_a_header_that_came_twice_is_refused(backend: wire.Backend) -> None:
    body = wire.dump(plain())
    twice = [
        *fields(backend).items(),
        ("Authorization", "Bearer client-key"),
        ("content-length", str(len(body))),
    ]
    assert (
        wire.raw(backend.address, wire.head_bytes(f"POST {RESPONSES} HTTP/1.1", twice) + body).status == 400
    )


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.0\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
    ],
)
def test_broken_http_is_a_fault_of_the_test(backend: wire.Backend, request_bytes: bytes) -> None:
    assert wire.raw(backend.address, request_bytes).status == 400
    backend.wait_for_idle()
    with pytest.raises(AssertionError, match="ProtocolError"):
        backend.check()
    backend.errors.clear()


# == requests as they came ====================================================


def test_requests_are_recorded_as_they_came(backend: wire.Backend) -> None:
    chunked = b'3\r\n{"a\r\n5\r\n":1}\n\r\n0\r\n\r\n'
    head = (
        b"POST /x?q=1 HTTP/1.1\r\nHost: a\r\nX-Case: One\r\nx-case: Two\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with wire.Client(backend.address) as client:
        client.send(head + chunked + b"GET /y HTTP/1.1\r\nHost: a\r\n\r\n")
        assert [client.read_reply().status, client.read_reply().json] == [404, {"detail": "Not Found"}]
    first, second = backend.wait_for(2)
    assert (first.path, first.query, first.body, first.json) == ("/x", "q=1", b'{"a":1}\n', {"a": 1})
    assert [pair for pair in first.headers if pair[0].lower() == "x-case"] == [
        ("X-Case", "One"),
        ("x-case", "Two"),
    ]
    assert (first.connection, second.connection, backend.connections) == (1, 1, 1)


@pytest.mark.skipif(not wire.HAS_ZSTD, reason="no libzstd on this host")
def test_a_zstd_body_is_decoded(backend: wire.Backend) -> None:
    # One raw block: magic, single-segment frame with a one-byte size, a last raw block of that size.
    body = wire.dump(plain())
    block = ((len(body) << 3) | 1).to_bytes(3, "little")
    packed = b"\x28\xb5\x2f\xfd\x20" + bytes([len(body)]) + block + body
    assert ask(backend, packed, content_encoding="zstd").status == 200
    request = backend.wait_for(1)[0]
    assert (request.raw_body, request.body) == (packed, body)


# == scripted replies =========================================================


def test_scripts_come_first_and_once(backend: wire.Backend) -> None:
    backend.on("/responses", wire.refuse(500, "one"), wire.usage_limit(), wire.checked(backend, wire.turn()))
    statuses = [ask(backend, plain()).status for _ in range(2)]
    assert (statuses, told(ask(backend, plain(store=True)))) == ([500, 429], "Store must be set to false")
    assert ask(backend, plain()).status == 200
    backend.always("/responses", wire.cloudflare())
    assert ask(backend, plain()).header("content-type") == "text/html; charset=UTF-8"


@pytest.mark.parametrize(("by", "ended"), [("close", "cut"), ("reset", "cut")])
def test_a_cut_stream_has_no_last_chunk(backend: wire.Backend, by: str, ended: str) -> None:
    backend.on("/responses", wire.cut(wire.created(), by=by))
    assert ask(backend, plain()).ended == ended


def test_events_arrive_one_by_one(backend: wire.Backend) -> None:
    gate = threading.Event()
    events = wire.text_turn("one two", reasoning=True, empty_output=False)
    backend.on("/responses", wire.gated(gate, events[:1], events[1:]))
    with wire.Client(backend.address) as client:
        client.request("POST", RESPONSES, plain(), fields(backend))
        assert client.read_head().status == 200
        assert client.read_event() == events[0]
        gate.set()
        assert [client.read_event() for _ in events[1:]] == events[1:]
        assert client.read_event() is None
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["reasoning", "message"]


@pytest.mark.parametrize("events", [[], [wire.created()]])
def test_the_stand_in_sees_that_its_peer_left(backend: wire.Backend, events: list[wire.Event]) -> None:
    left = threading.Event()
    backend.on("/responses", wire.hang(*events, left=left))
    client = wire.Client(backend.address)
    client.request("POST", RESPONSES, plain(), fields(backend))
    backend.wait_for(1, "/responses")
    client.close()
    assert left.wait(5)
    backend.wait_for_idle()


def test_a_failed_script_fails_the_test() -> None:
    def broken(_: wire.Exchange) -> None:
        raise RuntimeError("a bug in a test")

    with pytest.raises(AssertionError, match="a bug in a test"), wire.Backend(tls=False) as backend:
        backend.on("/x", broken)
        with contextlib.suppress(wire.PeerLeft):
            wire.get(backend.address, f"{wire.BASE}/x")


def test_a_connection_without_a_handshake_does_not_hold_up_the_end() -> None:
    with wire.Backend() as backend, wire.Client(backend.address) as idle:
        with backend.changed:
            assert backend.changed.wait_for(lambda: backend.connections == 1, 5)
        backend.close()
        assert idle.left()


def test_a_closed_stand_in_refuses_connections(backend: wire.Backend) -> None:
    with wire.Client(backend.address) as kept:
        kept.request("GET", "/x")
        assert kept.read_reply().status == 404
        backend.stop_listening()
        with pytest.raises(OSError):
            wire.Client(backend.address)
        kept.request("GET", "/x")
        assert kept.read_reply().status == 404


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_tls_passes_the_strictest_verification(host: str) -> None:
    with wire.Backend() as backend:
        context = wire.trusting(backend)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        connection = http.client.HTTPSConnection(host, backend.address[1], context=context, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", "/x")
            assert connection.getresponse().read() == b'{"detail":"Not Found"}'


def test_the_proxy_tunnels_and_remembers() -> None:
    with wire.Backend() as backend, wire.ConnectProxy() as proxy:
        connection = http.client.HTTPSConnection(*proxy.address, context=wire.trusting(backend), timeout=5)
        with contextlib.closing(connection):
            connection.set_tunnel("localhost", backend.address[1])
            connection.request("GET", "/x")
            assert connection.getresponse().read() == b'{"detail":"Not Found"}'
        asked = proxy.wait_for(1)[0]
        assert (asked.method, asked.target) == ("CONNECT", f"localhost:{backend.address[1]}")


# == the other endpoints ======================================================


def test_the_catalogue_has_a_tag(backend: wire.Backend) -> None:
    path = f"{wire.BASE}/models"
    assert wire.get(backend.address, path, fields(backend)).status == 400
    path += "?client_version=0.169.0"
    full = wire.get(backend.address, path, fields(backend))
    tag = full.header("etag") or ""
    assert [model["slug"] for model in full.json["models"]] == [model["slug"] for model in wire.CATALOG]
    same = wire.get(backend.address, path, {**fields(backend), "if-none-match": tag})
    assert (same.status, same.body, same.header("etag")) == (304, b"", tag)
    backend.catalog.pop()
    assert wire.get(backend.address, path, {**fields(backend), "if-none-match": tag}).status == 200


def test_routing_and_usage_want_the_sign_in(backend: wire.Backend) -> None:
    backend.routing = (backend.origin, "us")
    for path in ("/backend-api/wham/accounts/check", "/backend-api/wham/usage"):
        assert wire.get(backend.address, path, fields(backend, authorization=None)).status == 401
        assert wire.get(backend.address, path, fields(backend)).status == 200
    account = wire.get(backend.address, "/backend-api/wham/accounts/check", fields(backend)).json["accounts"][
        0
    ]
    assert (account["workspace_backend_origin"], account["account_routing_override"]) == (
        backend.origin,
        "us",
    )


def refresh(backend: wire.Backend, token: str, **changes: str) -> wire.RawReply:
    """Send a refresh."""
    wish = {"client_id": wire.CLIENT_ID, "grant_type": "refresh_token", "refresh_token": token}
    return wire.post(
        backend.address, "/oauth/token", {**wish, "refresh_reason": "proactive_expiry", **changes}
    )


def test_a_refresh_token_is_used_once(backend: wire.Backend) -> None:
    spent, revoked = backend.refresh_token, backend.access_token
    backend.revoke()
    assert ask(backend, plain(), authorization=f"Bearer {revoked}").status == 401
    answer = refresh(backend, spent)
    assert (answer.status, answer.json["access_token"], backend.refreshes) == (200, backend.access_token, 1)
    assert ask(backend, plain()).status == 200
    again = refresh(backend, spent)
    assert (again.status, again.json["error"]["code"], backend.refreshes) == (401, "refresh_token_reused", 1)
    assert refresh(backend, "rt_unknown").json["error"]["code"] == "refresh_token_invalidated"


@pytest.mark.parametrize(
    "changes",
    [{"client_id": "other"}, {"grant_type": "password"}, {"refresh_reason": "bored"}, {"scope": "x"}],
)
def test_a_refresh_is_exact(backend: wire.Backend, changes: dict[str, str]) -> None:
    assert refresh(backend, backend.refresh_token, **changes).status == 400


def test_an_expired_token_is_refused(backend: wire.Backend) -> None:
    backend.expires_in = -1.0
    backend.rotate()
    assert ask(backend, plain()).status == 401


def test_the_device_sign_in(backend: wire.Backend) -> None:
    step = "/api/accounts/deviceauth"
    start = wire.post(backend.address, f"{step}/usercode", {"client_id": wire.CLIENT_ID}).json
    assert start.pop("interval") == "5"
    assert wire.post(backend.address, f"{step}/token", start).status == 403
    backend.approve_device()
    assert wire.post(backend.address, f"{step}/token", {**start, "user_code": "other"}).status == 400
    grant = wire.post(backend.address, f"{step}/token", start).json
    form = {
        "grant_type": "authorization_code",
        "client_id": wire.CLIENT_ID,
        "code": grant["authorization_code"],
        "redirect_uri": f"{backend.issuer}/deviceauth/callback",
        "code_verifier": grant["code_verifier"],
    }
    kind = {"content-type": "application/x-www-form-urlencoded"}
    bad = urllib.parse.urlencode({**form, "code_verifier": "x"}).encode()
    assert wire.post(backend.address, "/oauth/token", bad, kind).status == 400
    good = urllib.parse.urlencode(form).encode()
    answer = wire.post(backend.address, "/oauth/token", good, kind)
    assert (answer.status, answer.json["refresh_token"]) == (200, backend.refresh_token)
    assert wire.post(backend.address, "/oauth/token", good, kind).status == 400


def test_auth_json_is_private_and_has_unknown_keys(backend: wire.Backend, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "auth.json"
    wire.write_auth(path, backend, OPENAI_API_KEY="sk", tokens={"account_id": "other"})
    held = json.loads(path.read_bytes())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (held["OPENAI_API_KEY"], held["tokens"]["account_id"]) == ("sk", "other")
    assert (held["tokens"]["access_token"], "agent_identity" in held) == (backend.access_token, True)
    assert [each.name for each in tmp_path.iterdir()] == ["auth.json"]


# == WebSocket ================================================================


def handshake(backend: wire.Backend, **changes: str | None) -> tuple[wire.WebSocketClient, wire.RawReply]:
    """Open a WebSocket to the stand-in."""
    client = wire.WebSocketClient(backend.address)
    head = {"openai_beta": wire.WEBSOCKET_BETA, "content_type": None, "x_codex_routing_hint": None}
    return client, client.connect(RESPONSES, fields(backend, **{**head, **changes}))


def create(**changes: object) -> wire.Event:
    """Return a good `response.create`."""
    return plain(**{"type": "response.create", **changes})


def test_a_websocket_turn_continues_its_connection(backend: wire.Backend) -> None:
    client, reply = handshake(backend)
    with client:
        assert reply.status == 101
        client.send_json(create(generate=False, input=[]))
        prewarm = client.read_turn()
        response_id = prewarm[-1]["response"]["id"]
        client.send_json(create(previous_response_id=response_id))
        assert client.read_turn()[-1]["type"] == "response.completed"
    other, _ = handshake(backend)
    with other:
        other.send_json(create(previous_response_id=response_id))
        assert other.read_json()["error"]["code"] == "previous_response_not_found"
    assert [frame.get("generate") for frame in backend.wait_for_frames(3)] == [False, None, None]


@pytest.mark.parametrize(
    "body",
    [
        create(store=True),
        create(temperature=1),
        create(type="response.cancel"),
        create(model="gpt-6-sol"),
        lite(type="response.create", client_metadata={wire.LITE_METADATA: "false"}),
        lite(type="response.create", client_metadata={wire.LITE_METADATA: "true"}, tools=[]),
    ],
)
def test_a_frame_is_refused_and_the_connection_lives(backend: wire.Backend, body: wire.Event) -> None:
    client, _ = handshake(backend)
    with client:
        client.send_json(body)
        refused = client.read_json()
        assert (refused["type"], refused["status"] >= 400) == ("error", True)
        client.send_json(lite(type="response.create", client_metadata={wire.LITE_METADATA: "true"}))
        assert client.read_turn()[-1]["type"] == "response.completed"


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"openai_beta": None}, 400),
        ({"authorization": "Bearer x"}, 401),
        ({"sec_websocket_version": "8"}, 426),
        ({"sec_websocket_key": "short"}, 400),
        ({"connection": "keep-alive"}, 400),
        ({"session_id": None}, 400),
        ({"x_codex_routing_hint": "model=gpt-5.5"}, 400),
        ({wire.LITE_HEADER: "true"}, 400),
        ({"cookie": "a=b"}, 400),
    ],
)
def test_a_handshake_is_refused(backend: wire.Backend, changes: dict[str, str | None], status: int) -> None:
    client, reply = handshake(backend, **changes)
    client.close()
    assert reply.status == status


def test_the_handshake_can_be_turned_off(backend: wire.Backend) -> None:
    backend.websocket_status = 426
    client, reply = handshake(backend)
    client.close()
    assert reply.status == 426


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([wire.Frame(wire.TEXT, b"{}")], 1002),
        ([wire.Frame(wire.TEXT, b"{}", masked=True, reserved=4)], 1002),
        ([wire.Frame(0x3, b"{}", masked=True)], 1002),
        ([wire.Frame(wire.CONTINUATION, b"{}", masked=True)], 1002),
        (
            [wire.Frame(wire.TEXT, b"{", final=False, masked=True), wire.Frame(wire.TEXT, b"}", masked=True)],
            1002,
        ),
        ([wire.Frame(wire.PING, b"a" * 126, masked=True)], 1002),
        ([wire.Frame(wire.PING, b"", final=False, masked=True)], 1002),
        ([wire.Frame(wire.BINARY, b"{}", masked=True)], 1003),
        ([wire.Frame(wire.TEXT, b"\xff", masked=True)], 1007),
    ],
)
def test_a_broken_frame_closes_with_its_code(
    backend: wire.Backend, frames: list[wire.Frame], code: int
) -> None:
    client, _ = handshake(backend)
    with client:
        for frame in frames:
            client.send_frame(frame)
        assert client.read_close() == code


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_frames_of_every_length_are_read(backend: wire.Backend, size: int) -> None:
    client, _ = handshake(backend)
    text = json.dumps(create(input=[message("a" * size)])).encode()
    with client:
        client.send_frame(wire.Frame(wire.TEXT, text[:9], final=False, masked=True))
        client.send_frame(wire.Frame(wire.PING, b"a" * min(size, 125), masked=True))
        client.send_frame(wire.Frame(wire.CONTINUATION, text[9:], masked=True))
        pong = wire.read_frame(client.reader)
        assert (pong.opcode, pong.payload) == (wire.PONG, b"a" * min(size, 125))
        assert client.read_turn()[-1]["type"] == "response.completed"
    assert backend.wait_for_frames(1)[0]["input"][0]["content"][0]["text"] == "a" * size


def test_two_side_frames_can_open_a_turn(backend: wire.Backend) -> None:
    backend.side_frames = True
    client, _ = handshake(backend)
    with client:
        client.send_json(create())
        turn = client.read_turn()
        client.send_json(create(store=True))
        refused = client.read_turn()
    opening = ["codex.rate_limits", "codex.response.metadata"]
    assert [event["type"] for event in turn[:3]] == [*opening, "response.created"]
    assert turn[0]["rate_limits"]["secondary"] is None
    assert turn[1]["headers"]["x-models-etag"] == backend.etag
    assert [event["type"] for event in refused] == [*opening, "error"]


@pytest.mark.parametrize(("room", "code"), [(0, None), (-1, 1009)])
def test_a_message_of_the_limit_is_closed(backend: wire.Backend, room: int, code: int | None) -> None:
    payload = json.dumps(create()).encode()
    backend.max_message = len(payload) + 1 + room
    client, _ = handshake(backend)
    with client:
        client.send_frame(wire.Frame(wire.TEXT, payload, masked=True))
        if code is None:
            assert client.read_turn()[-1]["type"] == "response.completed"
        else:
            assert client.read_close() == code


def test_a_chain_is_cached_as_a_whole(backend: wire.Backend) -> None:
    names = {"session_id": UUID7, "thread_id": UUID7, "x_client_request_id": UUID7}
    client, _ = handshake(backend, **names)
    with client:
        previous: dict[str, object] = {}
        shares = []
        for text in ("a" * 4000, "b" * 400):
            client.send_json(create(input=[message(text)], prompt_cache_key=UUID7, **previous))
            response = client.read_turn()[-1]["response"]
            shares.append(cached_share(response) > 0.8)
            previous = {"previous_response_id": response["id"]}
    assert shares == [False, True]


LONG_TOOL = {**FUNCTION, "description": "a" * 4000}
OPENING = {"tools": [LONG_TOOL], "instructions": "b" * 4000}


def chain(backend: wire.Backend, *frames: wire.Event) -> list[wire.Event]:
    """Send frames on one connection, each a turn after the one before; return the `usage` of each answer."""
    client, _ = handshake(backend, session_id=UUID7, thread_id=UUID7, x_client_request_id=UUID7)
    taken = []
    with client:
        previous: dict[str, object] = {}
        for frame in frames:
            client.send_json(create(prompt_cache_key=UUID7, **frame, **previous))
            response = client.read_turn()[-1]["response"]
            taken.append(response["usage"])
            previous = {"previous_response_id": response["id"]}
    return taken


@pytest.mark.parametrize("repeated", [
    {}, OPENING, {"tools": OPENING["tools"]}, {"instructions": OPENING["instructions"]},
])
def test_what_a_frame_repeats_of_its_chain_counts_once(
    backend: wire.Backend, repeated: dict[str, object]
) -> None:
    first, *later = chain(backend, OPENING, *[repeated] * 9)
    more = len(wire.dump(message())) // 4 + 1  # tokens that a turn adds
    before = first["input_tokens"]
    assert before > 2000
    for usage in later:
        assert before < usage["input_tokens"] <= before + more
        assert usage["input_tokens_details"]["cached_tokens"] == before
        before = usage["input_tokens"]


@pytest.mark.parametrize("changed", [{"tools": [FUNCTION]}, {"tools": []}, {"instructions": "c" * 4000}])
def test_a_chain_is_cold_from_what_a_frame_changes(
    backend: wire.Backend, changed: dict[str, object]
) -> None:
    _, usage = chain(backend, OPENING, {**OPENING, **changed})
    kept = 0 if "tools" in changed else len(wire.dump([OPENING["tools"]])) // 4  # tools come first
    assert usage["input_tokens_details"]["cached_tokens"] == kept


def test_a_peer_that_resets_before_the_handshake_leaves_no_socket_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        peer = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()  # a reset
        secure = wire.server_context().wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
        with contextlib.closing(secure), pytest.raises(OSError):
            secure.do_handshake()
