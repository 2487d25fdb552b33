"""End to end, over real sockets: chat clients, legacy completions, and what the backend is sent.

The last part holds what the backend is sent through the bridge beside what the same Codex sends it itself.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import wire
from conftest import RunningBridge, Start
from help import AGENT, ANSWER, CHAT, MODEL, RESPONSES, TEXT, WAYS, Object, ask, chunks, script, sent, turns

import qoo_bridge as q

ASKED: dict[str, Object] = {CHAT: {"messages": [{"role": "user", "content": "hi"}]}, TEXT: {"prompt": "hi"}}
BRISK = ("--keepalive", "0.02")
BOTH = pytest.mark.parametrize("path", [CHAT, TEXT])


# -- side by side with a Codex that is signed in itself -----------------------


class Capture(NamedTuple):
    """One captured request; `ids` are what differs with every session: id -> what it is."""

    ids: dict[str, str]
    headers: dict[str, str]
    body: Object


def text(*texts: str) -> list[Object]:
    return [{"type": "input_text", "text": each} for each in texts]


def message(name: str, role: str, *texts: str, **more: Any) -> Object:
    return {"type": "message", "id": f"msg_{name}", "role": role, "content": text(*texts), **more}


def end_of_turn(output_id: str, output: str, **more: Any) -> list[Object]:
    """Return what every capture's input ends with; `more` stands in each item."""
    said = {"type": "output_text", "text": "Running a tool", "annotations": []}
    return [
        {"type": "reasoning", "id": "rs_0123abc", "summary": [{"type": "summary_text", "text": "think"}],
         "content": None, "encrypted_content": "gAAAAAB_enc", **more},
        {"type": "message", "status": "completed", "id": "msg_0aa1", "role": "assistant", "content": [said],
         "phase": "commentary", **more},
        {"type": "function_call", "status": "completed", "id": "fc_0bb2", "name": "exec_command",
         "arguments": '{"cmd": "echo hi"}', "call_id": "call_1", **more},
        {"type": "function_call_output", "id": f"fco_{output_id}", "call_id": "call_1", "output": output,
         **more},
    ]


def named(*tools: str) -> list[Object]:
    """Return tools from `type:name`; the captures hold no more of them."""
    return [{"type": kind, "name": name or None} for kind, _, name in (tool.partition(":") for tool in tools)]


SKILLS, PERMISSIONS = "<skills_instructions>\n## Skills\nA skill is…", "<permissions instructions>\nFile…"
PLACE = "<environment_context>\n  <cwd>/home/user/project"
TEAM, MODE = "You are `main`, the primary agent in a team of …", "<multi_agent_mode>Any earlier instruction…"
PASSTHROUGH = {"internal_chat_message_metadata_passthrough": {"turn_id": "…", "create_time": 1795328042.373}}

BRIDGE_PLAIN = Capture(
    {
        "01a201df-3cb2-7781-97fc-5b29c49ae5cd": "session",
        "4dbbee8e-2b6d-4a9d-8939-644d3889dbba": "installation",
        "01a201df-3cd2-71b2-a17f-1957d84b71a2": "turn",
    },
    {
        "x-codex-beta-features": "remote_compaction_v2", "x-codex-turn-state": "ts-sticky-1",
        "x-codex-window-id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd:0",
        "x-codex-turn-metadata": '{"installation_id":"4dbbee8e-2b6d-4a9d-8939-644d3889dbba"}',
        "x-client-request-id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd",
        "session-id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd",
        "thread-id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd", "accept": "text/event-stream",
        "content-type": "application/json", "authorization": "Bearer <redacted>", "originator": "codex_exec",
        "user-agent": AGENT,
    },
    {
        "model": "gpt-5.5", "stream": True,
        "input": [
            message("78f43e30-e31a-5ba4-81da-beafe83265dc", "developer", "You are Codex, a coding agent…"),
            message("01a201df-3ce8-78c1-bbc9-59778bf17af2", "developer", SKILLS, PERMISSIONS, "<tools>\n…"),
            message("01a201df-3ce8-78c1-bbc9-598f8655ec7e", "user", PLACE),
            message("01a201df-3d00-76e1-a3b8-080c4afeafff", "user", "say hi"),
            *end_of_turn("01a201df-3d6c-7010-a202-8ceb27a457f7", "Chunk ID: f09f81\nOutput:\nhi\n"),
        ],
        "tools": named("function:exec_command", "function:write_stdin", "function:request_user_input",
                       "custom:apply_patch", "function:view_image", "function:get_goal",
                       "function:create_goal", "function:update_goal", "tool_search:", "web_search:"),
        "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"effort": "medium"}, "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a201df-3cb2-7781-97fc-5b29c49ae5cd", "text": {"verbosity": "low"},
        "client_metadata": {
            "root_turn_id": "01a201df-3cd2-71b2-a17f-1957d84b71a2",
            "x-codex-installation-id": "4dbbee8e-2b6d-4a9d-8939-644d3889dbba",
            "x-codex-window-id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd:0",
            "x-codex-turn-metadata": '{"installation_id":"4dbbee8e-2b6d-4a9d-8939-644d3889dbba"}',
            "turn_id": "01a201df-3cd2-71b2-a17f-1957d84b71a2",
            "thread_id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd",
            "session_id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd",
        },
    },
)
CHATGPT_PLAIN = Capture(
    {
        "01a201e4-4ce1-7c41-adda-ecb6a8c97083": "session",
        "7b256306-0895-4b9e-8f51-2b98c434cce6": "installation",
        "01a201e4-4d18-7411-965e-cafa03fab80a": "turn",
        "ts-sticky-17": "ts-sticky-1",
    },
    {
        "version": "0.169.0", "x-codex-beta-features": "remote_compaction_v2",
        "x-codex-turn-state": "ts-sticky-17", "x-codex-window-id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083:0",
        "x-codex-turn-metadata": '{"installation_id":"7b256306-0895-4b9e-8f51-2b98c434cce6"}',
        "x-codex-routing-hint": "model=gpt-5.5",
        "x-client-request-id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083",
        "session-id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083",
        "thread-id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083", "accept": "text/event-stream",
        "content-encoding": "zstd", "content-type": "application/json", "authorization": "Bearer <redacted>",
        "chatgpt-account-id": "acct-uuid-1", "originator": "codex_exec", "user-agent": AGENT,
        "host": "localhost:8843", "content-length": "16687",
    },
    {
        "model": "gpt-5.5", "stream": True,
        "input": [
            message("…", "developer", "You are Codex, a coding agent…", **PASSTHROUGH),
            message("…", "developer", SKILLS, PERMISSIONS, "<tools>\n…", **PASSTHROUGH),
            message("…", "user", PLACE, **PASSTHROUGH),
            message("01a201e4-4d47-7040-8a03-64dd702462c1", "user", "say hi", **PASSTHROUGH),
            *end_of_turn("01a201e4-4db8-79b3-a072-3ab0ba373b29", "Chunk ID: f61fbd\n…", **PASSTHROUGH),
        ],
        "tools": named("function:exec_command", "function:write_stdin", "function:list_mcp_resources",
                       "function:list_mcp_resource_templates", "function:read_mcp_resource",
                       "function:request_user_input", "custom:apply_patch", "function:view_image",
                       "function:get_goal", "function:create_goal", "function:update_goal",
                       "namespace:image_gen", "tool_search:", "web_search:"),
        "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"effort": "medium"}, "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a201e4-4ce1-7c41-adda-ecb6a8c97083", "text": {"verbosity": "low"},
        "client_metadata": {
            "thread_id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083",
            "turn_id": "01a201e4-4d18-7411-965e-cafa03fab80a", "mcp_attribution": '{"status":"none"}',
            "x-codex-turn-metadata": '{"installation_id":"7b256306-0895-4b9e-8f51-2b98c434cce6"}',
            "x-codex-installation-id": "7b256306-0895-4b9e-8f51-2b98c434cce6",
            "root_turn_id": "01a201e4-4d18-7411-965e-cafa03fab80a", "guardian_credits_requested": "true",
            "session_id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083",
            "x-codex-window-id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083:0",
        },
    },
)
BRIDGE_LITE = Capture(
    {
        "01a201df-d8be-78d2-93d1-0b40877d03c7": "session",
        "4dbbee8e-2b6d-4a9d-8939-644d3889dbba": "installation",
        "01a201df-d8d7-74b2-ba0c-26518456802c": "turn",
        "gpt-5.6-sol": "lite-model",
    },
    {
        "x-codex-beta-features": "remote_compaction_v2", "x-codex-turn-state": "ts-sticky-1",
        "x-codex-window-id": "01a201df-d8be-78d2-93d1-0b40877d03c7:0",
        "x-codex-turn-metadata": '{"installation_id":"4dbbee8e-2b6d-4a9d-8939-644d3889dbba"}',
        "x-openai-internal-codex-responses-lite": "true",
        "x-client-request-id": "01a201df-d8be-78d2-93d1-0b40877d03c7",
        "session-id": "01a201df-d8be-78d2-93d1-0b40877d03c7",
        "thread-id": "01a201df-d8be-78d2-93d1-0b40877d03c7", "accept": "text/event-stream",
        "content-type": "application/json", "authorization": "Bearer <redacted>", "originator": "codex_exec",
        "user-agent": AGENT,
    },
    {
        "model": "gpt-5.6-sol", "stream": True,
        "input": [
            {"type": "additional_tools", "id": "at_01a201df-d8e6-7152-b3b4-02908d5a1e48", "role": "developer",
             "tools": named("namespace:functions", "namespace:collaboration")},
            message("01a201df-d8e6-7152-b3b4-02af0392adfd", "developer", "You are Codex, an agent…"),
            message("01a201df-d8e6-7152-b3b4-02b5ce437e87", "developer", SKILLS, PERMISSIONS),
            message("01a201df-d8e6-7152-b3b4-02c56eeebaa8", "developer", TEAM),
            message("01a201df-d8e6-7152-b3b4-02d5d883ebfa", "developer", MODE),
            message("01a201df-d8e6-7152-b3b4-02e42e20afbf", "user", PLACE),
            message("01a201df-d8f2-7a60-bce8-2d2501bd117a", "user", "say hi"),
            *end_of_turn("01a201df-d956-75b2-a4cb-ecf8f2d88711", "Chunk ID: c4a73b\nOutput:\nhi\n"),
        ],
        "tool_choice": "auto", "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "context": "all_turns"}, "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a201df-d8be-78d2-93d1-0b40877d03c7", "text": {"verbosity": "low"},
        "client_metadata": {
            "session_id": "01a201df-d8be-78d2-93d1-0b40877d03c7",
            "x-codex-window-id": "01a201df-d8be-78d2-93d1-0b40877d03c7:0",
            "root_turn_id": "01a201df-d8d7-74b2-ba0c-26518456802c",
            "x-codex-turn-metadata": '{"installation_id":"4dbbee8e-2b6d-4a9d-8939-644d3889dbba"}',
            "thread_id": "01a201df-d8be-78d2-93d1-0b40877d03c7",
            "x-codex-installation-id": "4dbbee8e-2b6d-4a9d-8939-644d3889dbba",
            "turn_id": "01a201df-d8d7-74b2-ba0c-26518456802c",
        },
    },
)
CHATGPT_LITE = Capture(
    {
        "01a201e3-e519-7251-bc7f-37fed468c079": "session",
        "7b256306-0895-4b9e-8f51-2b98c434cce6": "installation",
        "01a201e3-e55c-7f52-978f-7a3d14d0f294": "turn",
        "gpt-6-sol": "lite-model", "ts-sticky-17": "ts-sticky-1",
    },
    {
        "version": "0.169.0", "x-openai-account-routing-override": "us",
        "x-codex-beta-features": "remote_compaction_v2", "x-codex-turn-state": "ts-sticky-17",
        "x-codex-window-id": "01a201e3-e519-7251-bc7f-37fed468c079:0",
        "x-codex-turn-metadata": '{"installation_id":"7b256306-0895-4b9e-8f51-2b98c434cce6"}',
        "x-openai-internal-codex-responses-lite": "true", "x-codex-routing-hint": "model=gpt-6-sol",
        "x-client-request-id": "01a201e3-e519-7251-bc7f-37fed468c079",
        "session-id": "01a201e3-e519-7251-bc7f-37fed468c079",
        "thread-id": "01a201e3-e519-7251-bc7f-37fed468c079", "accept": "text/event-stream",
        "content-encoding": "zstd", "content-type": "application/json", "authorization": "Bearer <redacted>",
        "chatgpt-account-id": "acct-uuid-1", "originator": "codex_exec", "user-agent": AGENT,
        "host": "localhost:8843", "content-length": "23491",
    },
    {
        "model": "gpt-6-sol", "stream": True,
        "input": [
            {"type": "additional_tools", "id": "at_01a201e3-e585-7df3-bbb7-032cfe6e8064", "role": "developer",
             "tools": named("namespace:functions", "namespace:clock", "namespace:collaboration")},
            message("01a201e3-e585-7df3-bbb7-033e6e2d4340", "developer", "You are Codex, an agent…",
                    **PASSTHROUGH),
            message("01a201e3-e585-7df3-bbb7-034a183eaab3", "developer", SKILLS, PERMISSIONS, "<coll…",
                    **PASSTHROUGH),
            message("01a201e3-e585-7df3-bbb7-0356ede9b078", "developer", TEAM, **PASSTHROUGH),
            message("01a201e3-e585-7df3-bbb7-036c2604fb5a", "developer", MODE, **PASSTHROUGH),
            message("01a201e3-e585-7df3-bbb7-037bb1752730", "user", PLACE, **PASSTHROUGH),
            message("01a201e3-e594-7772-94dd-416956784899", "user", "say hi", **PASSTHROUGH),
            *end_of_turn("…", "Chunk ID: …", **PASSTHROUGH),
        ],
        "tool_choice": "auto", "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "context": "all_turns"}, "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a201e3-e519-7251-bc7f-37fed468c079", "text": {"verbosity": "low"},
        "client_metadata": {
            "root_turn_id": "01a201e3-e55c-7f52-978f-7a3d14d0f294",
            "x-codex-turn-metadata": '{"installation_id":"7b256306-0895-4b9e-8f51-2b98c434cce6"}',
            "turn_id": "01a201e3-e55c-7f52-978f-7a3d14d0f294",
            "thread_id": "01a201e3-e519-7251-bc7f-37fed468c079",
            "session_id": "01a201e3-e519-7251-bc7f-37fed468c079",
            "x-codex-window-id": "01a201e3-e519-7251-bc7f-37fed468c079:0",
            "guardian_credits_requested": "true",
            "x-codex-installation-id": "7b256306-0895-4b9e-8f51-2b98c434cce6",
            "mcp_attribution": '{"status":"none"}',
        },
    },
)


class Difference(NamedTuple):
    """A field in which the two may differ: `alike` holds of what the bridge and what Codex itself sent."""

    why: str
    alike: Callable[[Any, Any], bool]


def item_fields(items: list[Object]) -> list[Object]:
    """Return what kind of items these are and which fields they have, but for Codex's note to ChatGPT."""
    return [{name: item[name] if name in ("type", "role") else "" for name in item if name not in PASSTHROUGH}
            for item in items]


OF_CHATGPT_ALONE = {"mcp_attribution", "guardian_credits_requested"}  # of client_metadata
HEADER_DIFFERENCES = {
    "accept-encoding": Difference(
        "the bridge reads the events that it relays, so it asks for them as they are; Codex asks nothing",
        lambda bridge, direct: (bridge, direct) == ("identity", None)),
    "authorization": Difference(
        "the captures are redacted; the sign-in is this host's, whatever the client sent",
        lambda bridge, direct: str(bridge).startswith("Bearer ey") and direct == "Bearer <redacted>"),
    "chatgpt-account-id": Difference(
        "the account is this host's", lambda bridge, direct: bool(bridge and direct)),
    "host": Difference("the stand-ins listened on other ports",
                       lambda bridge, direct: str(bridge).startswith("localhost:")),
    "content-length": Difference("the captures' texts are cut",
                                 lambda bridge, direct: str(bridge).isdigit() and str(direct).isdigit()),
}
BODY_DIFFERENCES = {
    "input": Difference(
        "Codex notes in every item when and why it was made, for its built-in provider alone; ids and texts "
        "are of two conversations",
        lambda bridge, direct: item_fields(bridge) == item_fields(direct)),
    "client_metadata": Difference(
        "two entries that Codex makes for its built-in provider alone",
        lambda bridge, direct: bridge == {name: direct[name] for name in set(direct) - OF_CHATGPT_ALONE}),
}
PLAIN_DIFFERENCES = {
    "tools": Difference(
        "four tools that Codex offers with its built-in provider alone (MCP resources, image generation)",
        lambda bridge, direct: bridge == [tool for tool in direct if tool in bridge]
        and len(direct) == len(bridge) + 4),
}
LITE_DIFFERENCES = {
    "reasoning": Difference(
        "the captures are of two lite models, each with its own default effort",
        lambda bridge, direct: (bridge.pop("effort"), direct.pop("effort")) == ("low", "medium")
        and bridge == direct),
}


def without_ids(value: Any, ids: dict[str, str]) -> Any:
    """Return a JSON value with every id replaced by what it is."""
    written = json.dumps(value)
    for name, what in ids.items():
        written = written.replace(name, what)
    return json.loads(written)


def unlike(bridge: Object, direct: Object, differences: dict[str, Difference]) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ without a reason, and those with one that no longer differ."""
    names = {*bridge, *direct, *differences}
    pairs = {name: (bridge.get(name), direct.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if (pair[0] == pair[1]) == (name in differences)
            or (name in differences and not differences[name].alike(*pair))}


@pytest.mark.skipif(not wire.HAS_ZSTD, reason="no libzstd on this host: the body goes as it is")
@pytest.mark.parametrize(("given", "direct", "differences"), [
    (BRIDGE_PLAIN, CHATGPT_PLAIN, {**BODY_DIFFERENCES, **PLAIN_DIFFERENCES}),
    (BRIDGE_LITE, CHATGPT_LITE, {**BODY_DIFFERENCES, **LITE_DIFFERENCES}),
], ids=["plain", "lite"])
def test_backend_is_sent_what_codex_itself_sends_it(
    start: Start, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch,
    given: Capture, direct: Capture, differences: dict[str, Difference],
) -> None:
    monkeypatch.setattr(q, "COMPRESS_FROM", 1)  # bytes; with their whole texts these requests are 40 KB
    override = direct.headers.get("x-openai-account-routing-override", "NO_CONSTRAINT")
    backend.routing = (backend.origin, override)
    bridge = start("--compress", "on")
    bridge.bridge.account.ask_routing()  # as at every start, but waited for
    raw = json.dumps(given.body).encode()
    reply = wire.post(bridge.address, "/v1/responses", raw, given.headers)
    assert (reply.status, reply.header("x-qoo-bridge-repaired"), backend.refusals) == (200, None, [])
    (request,) = sent(backend)
    assert request.body == raw  # the client's own bytes
    headers = without_ids(dict(request.headers), given.ids)
    assert len(headers) == len(request.headers)
    assert unlike(headers, without_ids(direct.headers, direct.ids), HEADER_DIFFERENCES) == {}
    body, wanted = without_ids(request.json, given.ids), without_ids(direct.body, direct.ids)
    assert list(body) == list(wanted)  # in Codex's order
    assert unlike(body, wanted, differences) == {}


def text_of(choice: Object) -> str:
    """Return the text that a choice of either API brings, whole or in part."""
    inner = choice.get("message") or choice.get("delta") or {}
    return choice.get("text") or inner.get("content") or ""


# -- answers ----------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("empty_output", [True, False])
def test_whole_answer(path: str, empty_output: bool, bridge: RunningBridge, backend: wire.Backend) -> None:
    script(backend, wire.turn(*wire.text_turn(ANSWER, reasoning=True, empty_output=empty_output)))
    reply = ask(bridge, MODEL, path=path, **ASKED[path])
    assert (reply.status, reply.header("content-type")) == (200, "application/json")
    assert reply.json["object"] == {CHAT: "chat.completion", TEXT: "text_completion"}[path]
    [choice] = reply.json["choices"]
    assert (text_of(choice), choice["finish_reason"]) == (ANSWER, "stop")
    assert choice.get("message", {}).get("reasoning_content") == {CHAT: "think", TEXT: None}[path]
    assert reply.json["usage"]["total_tokens"] == 41
    assert turns(backend)[0]["input"][0]["content"] == [{"type": "input_text", "text": "hi"}]


@BOTH
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
def test_streamed_answer(
    path: str, options: Object | None, bridge: RunningBridge, backend: wire.Backend
) -> None:
    script(backend, wire.turn(*wire.text_turn(ANSWER, reasoning=True)))
    reply = ask(bridge, MODEL, path=path, stream=True, stream_options=options, **ASKED[path])
    assert (reply.status, reply.ended) == (200, "last-chunk")
    assert reply.header("content-type") == "text/event-stream; charset=utf-8"
    *received, done = chunks(reply.body)
    assert done == "[DONE]"
    if options and options.get("include_usage"):
        last = received.pop()
        assert (last["choices"], last["usage"]["total_tokens"]) == ([], 41)
        assert all(chunk["usage"] is None for chunk in received)
    else:
        assert not any("usage" in chunk for chunk in received)
    choices = [choice for chunk in received for choice in chunk["choices"]]
    assert "".join(map(text_of, choices)) == ANSWER
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert len({chunk["id"] for chunk in received}) == 1


@BOTH
def test_each_piece_comes_at_once(path: str, bridge: RunningBridge, backend: wire.Backend) -> None:
    gates = [threading.Event(), threading.Event()]
    first, second = wire.text_turn("one two")[:5], wire.text_turn("one two")[5:6]
    rest = wire.text_turn("one two")[6:]

    def reply(exchange: wire.Exchange) -> None:
        exchange.head()
        for events, gate in zip((first, second), gates):
            exchange.events(*events)
            assert gate.wait(5)
        exchange.events(*rest)
        exchange.finish()

    script(backend, reply)
    with wire.Client(bridge.address) as client:
        client.request("POST", path, {"model": "gpt-5.5", "stream": True, **ASKED[path]})
        client.read_head()
        for word, gate in zip(("one", " two"), gates):
            while text_of(choice := read_chunk(client)["choices"][0]) != word:
                assert not text_of(choice)
            gate.set()
        assert client.read_body().endswith(b"data: [DONE]\n\n")


def read_chunk(client: wire.Client) -> Object:
    """Return the next event, which is not a comment."""
    event = client.read_event()
    assert isinstance(event, dict)
    return event


@pytest.mark.parametrize("before", [0, 1, 5], ids=["nothing", "no text", "a text"])
@BOTH
def test_silence_is_filled(path: str, before: int, start: Start, backend: wire.Backend) -> None:
    events, gate = wire.text_turn(ANSWER), threading.Event()
    script(backend, wire.gated(gate, events[:before], events[before:]))
    with wire.Client(start(*BRISK).address) as client:
        client.request("POST", path, {"model": "gpt-5.5", "stream": True, **ASKED[path]})
        assert client.read_head().status == 200
        received: list[Any] = []
        while received.count("keepalive") < 2:
            received.append(client.read_event())
        gate.set()
        received += chunks(client.read_body())
    whole = [each for each in received if isinstance(each, dict)]
    assert "".join(text_of(each["choices"][0]) for each in whole) == ANSWER
    assert received[-1] == "[DONE]"


# -- failures ---------------------------------------------------------------------

HALF = wire.text_turn("half of it")[:6]
BROKE = wire.failed("server_error", "the model broke", 99)
FULL = wire.failed("rate_limit_exceeded", "slow down", 99)
LONG = wire.failed("context_length_exceeded", "too long", 99)
EARLY: dict[str, tuple[wire.Reply, int, str]] = {
    "limit": (wire.usage_limit(), 429, "The usage limit has been reached"),
    "refused": (wire.refuse(400, "No such thing"), 400, "No such thing"),
    "page": (wire.cloudflare(), 403, "web page"),
    "rate": (wire.turn(wire.created(), FULL), 429, "slow down"),
    "context": (wire.turn(wire.created(), LONG), 400, "too long"),
    "failed": (wire.turn(wire.created(), BROKE), 502, "the model broke"),
    "error": (wire.turn({"type": "error", "code": "overloaded", "message": "busy"}), 503, "busy"),
    "ended": (wire.turn(wire.created()), 502, "terminal"),
    "closed": (wire.cut(wire.created()), 502, "upstream"),
    "reset": (wire.cut(wire.created(), by="reset"), 502, "upstream"),
}
LATE: dict[str, tuple[wire.Reply, int, str]] = {
    "failed": (wire.turn(*HALF, BROKE), 502, "the model broke"),
    "rate": (wire.turn(*HALF, FULL), 429, "slow down"),
    "error": (wire.turn(*HALF, {"type": "error", "code": "overloaded", "message": "busy"}), 503, "busy"),
    "ended": (wire.turn(*HALF), 502, "terminal"),
    "closed": (wire.cut(*HALF), 502, "upstream"),
    "reset": (wire.cut(*HALF, by="reset"), 502, "upstream"),
}


@BOTH
@WAYS
@pytest.mark.parametrize("name", EARLY)
def test_failure_before_the_first_byte_is_a_status(
    name: str, stream: bool, path: str, shared_bridge: RunningBridge, shared_backend: wire.Backend
) -> None:
    reply_of, status, text = EARLY[name]
    script(shared_backend, reply_of)
    reply = ask(shared_bridge, MODEL, path=path, stream=stream, **ASKED[path])
    assert (reply.status, reply.header("content-type")) == (status, "application/json")
    assert text in reply.json["error"]["message"]
    assert set(reply.json["error"]) >= {"message", "type", "param", "code"}


@BOTH
@pytest.mark.parametrize("name", LATE)
def test_failure_within_a_stream_is_never_a_clean_end(
    name: str, path: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    reply_of, _, text = LATE[name]
    script(backend, reply_of)
    reply = ask(bridge, MODEL, path=path, stream=True, stream_options={"include_usage": True}, **ASKED[path])
    assert (reply.status, reply.ended) == (200, "cut")
    *received, error = chunks(reply.body)
    assert "".join(text_of(chunk["choices"][0]) for chunk in received) == "half of"
    assert not any(chunk["choices"][0]["finish_reason"] for chunk in received)
    assert text in error["error"]["message"]
    assert set(error["error"]) >= {"message", "type", "param", "code"}


@BOTH
@pytest.mark.parametrize("name", LATE)
def test_failure_is_a_status_where_one_answer_is_due(
    name: str, path: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    reply_of, status, text = LATE[name]
    script(backend, reply_of)
    reply = ask(bridge, MODEL, path=path, **ASKED[path])
    assert reply.status == status
    assert text in reply.json["error"]["message"]


@BOTH
def test_failure_after_a_comment_is_an_error_in_the_stream(
    path: str, start: Start, backend: wire.Backend
) -> None:
    gate = threading.Event()
    script(backend, wire.gated(gate, [wire.created()], [FULL]))
    with wire.Client(start(*BRISK).address) as client:
        client.request("POST", path, {"model": "gpt-5.5", "stream": True, **ASKED[path]})
        head = client.read_head()
        assert client.read_event() == "keepalive"
        gate.set()
        [error] = chunks(client.read_body())
    assert error["error"]["message"] == "slow down"
    assert (head.status, head.ended) == (200, "cut")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"n": 2}, "n"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "odd"}]}, "messages[0].role"),
        (TEXT, {"prompt": ["a", "b"]}, "prompt"),
        (TEXT, {"echo": True}, "echo"),
    ],
)
@WAYS
def test_what_cannot_be_done_costs_no_turn(
    path: str, fields: Object, param: str, stream: bool, bridge: RunningBridge, backend: wire.Backend
) -> None:
    reply = ask(bridge, MODEL, path=path, **{**ASKED[path], "stream": stream, **fields})
    assert (reply.status, reply.json["error"]["param"]) == (400, param)
    assert turns(backend) == []


# -- bytes --------------------------------------------------------------------------

UNTOUCHED = r"""
{ "stream" :true,	"input":[ {"role":"user", "type":"message","content":"caf\u00e9 \/ café \ud83d\ude00"} ],
  "model":"gpt-5.5" , "store": false,"prompt_cache_key":"mine","include":["reasoning.encrypted_content"],
  "tools":[{"parameters":{"maximum":1.0e2,"minimum":-0,"multipleOf":0.10},"name":"f","type":"function"}],
  "instructions":"","text":{ "verbosity":"low"  } }
"""


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_untouched_request_is_sent_byte_for_byte(
    line_end: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    raw = UNTOUCHED.replace("\n", line_end).encode()
    reply = wire.post(bridge.address, RESPONSES, raw)
    assert (reply.status, reply.ended) == (200, "last-chunk")
    assert [request.body for request in sent(backend)] == [raw]
    assert backend.refusals == []
