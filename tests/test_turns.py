"""Room turns: what is no request, and how a refused one is repaired and sent once more."""

from __future__ import annotations

import gc
import json
import re
import sys
import threading
import time
import warnings
import weakref
from typing import Any, NamedTuple

import pytest
import wire
from conftest import LogLines, RunningBridge, Start
from help import (
    BODY,
    CARRIER,
    CHAT,
    CODEX,
    DEEP,
    FETCH_FAILURES,
    HI,
    KEY,
    LITE,
    LITE_BODY,
    LITE_MODEL,
    LOCAL_MD,
    MODEL,
    PLAIN_BODY,
    REQUEST,
    RESPONSES,
    SCHEMA,
    SDK_BODY,
    SECONDS,
    TEXT,
    TOOL,
    USER,
    Object,
    ask,
    bearer,
    models,
    sent,
    settle,
    until,
)

import qoo_bridge as q

# -- bodies that are not JSON, or not what is wanted

NO_MODELS: list[object] = [
    None, 5, True, [], {}, "", " ", "a b", "x" * 200, "\ud800", "x\r\nx-a: 1", "модель",
]
NOT_A_REQUEST = [
    pytest.param(b"", id="empty"),
    pytest.param(b" ", id="space"),
    pytest.param(b"{", id="torn"),
    pytest.param(BODY + b"x", id="more-behind"),
    pytest.param(BODY + BODY, id="two-objects"),
    pytest.param(BODY[:-1] + b',"top_p":NaN}', id="nan"),
    pytest.param(BODY[:-1] + b',"top_p":Infinity}', id="infinity"),
    pytest.param(BODY[:-1] + b',"top_p":-Infinity}', id="minus-infinity"),
    pytest.param(BODY[:-1] + b',"text":{"x":' + b"9" * 10_000 + b"}}", id="10000-digits"),
    pytest.param(b"[" * DEEP + b"]" * DEEP, id="deep-list"),
    pytest.param(b'{"a":' * DEEP + b"1" + b"}" * DEEP, id="deep-object"),
    pytest.param(b"[" * DEEP, id="deep-torn"),
    pytest.param(BODY[:-1] + b',"tools":' + b"[" * DEEP + b"]" * DEEP + b"}", id="deep-tools"),
    pytest.param(json.dumps(REQUEST).encode("utf-16"), id="utf-16"),
    pytest.param(json.dumps(REQUEST).encode("utf-16-le"), id="utf-16-le"),
    pytest.param(json.dumps(REQUEST).encode("utf-32"), id="utf-32"),
    pytest.param(b"\xef\xbb\xbf" + BODY, id="byte-order-mark"),
    pytest.param(b'{"model":"gpt-5.5","input":"\xff"}', id="not-utf-8"),
    pytest.param(b'{"model":"gpt-5.5","input":"\xed\xa0\x80"}', id="surrogate-in-utf-8"),
    pytest.param(b'{"model":"gpt-5.5","input":"\xc0\xaf"}', id="overlong-utf-8"),
    pytest.param(b'{"model":"gpt-5.5","input":"\x00"}', id="control-character"),
    *(pytest.param(text.encode(), id=f"top-level-{text}")
      for text in ("[]", "[{}]", '"x"', "5", "null", "true")),
    *(pytest.param(b'{"model":%b,"input":"hi"}' % json.dumps(model).encode(), id=f"model-{model!r}")
      for model in NO_MODELS),
    pytest.param(b"{}", id="no-model"),
]


@pytest.mark.parametrize("body", [
    *NOT_A_REQUEST,
    pytest.param(BODY[:-1] + b',"text":{"x":1e999}}', id="1e999"),
    *(pytest.param(b'{"model":"gpt-5.5","input":%b}' % value, id=f"input-{value.decode()}")
      for value in (b"5", b"true", b"{}", b"1.5")),
])
def test_body_that_is_no_request_is_400(shared_bridge: RunningBridge, body: bytes) -> None:
    reply = wire.post(shared_bridge.address, "/v1/responses", body)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (400, "bridge")
    assert reply.json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", NOT_A_REQUEST)
def test_body_that_is_no_chat_is_400(shared_bridge: RunningBridge, body: bytes) -> None:
    chat = body.replace(b'"input": "hi"', b'"messages": [{"role": "user", "content": "hi"}]')
    reply = wire.post(shared_bridge.address, "/v1/chat/completions", chat)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (400, "bridge")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("value", [None, True, 0, -1.5, "", "\ud800", [], [None], [[]], [5], {},
                                   {"a": {"b": []}}])
def test_no_type_of_any_field_is_a_fault(shared_bridge: RunningBridge, path: str, value: object) -> None:
    fields = ("input", "messages", "prompt", "tools", "tool_choice", "reasoning", "text", "include",
              "metadata",
              "stream_options", "instructions", "service_tier", "prompt_cache_key", "previous_response_id",
              "response_format", "stop", "n", "client_metadata", "store", "functions", "reasoning_effort")
    base = {"model": "gpt-5.5", "input": "hi", "messages": [{"role": "user", "content": "hi"}],
            "prompt": "hi"}
    statuses = set()
    with wire.Client(shared_bridge.address) as client:
        for name in fields:
            client.request("POST", path, {**base, name: value})
            statuses.add(client.read_reply().status)
    assert statuses <= {200, 400, 404}


@pytest.mark.parametrize("depth", [300, 700, 900, 950, 970, 990, 3000, 20_000])
def test_no_depth_is_a_fault(shared_bridge: RunningBridge, depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    items = b'[{"role":"user","content":"hi","x":%b}]' % nested
    body = b'{"model":"gpt-5.5","input":%b,"tools":%b}' % (items, nested)
    assert wire.post(shared_bridge.address, "/v1/responses", body).status in (200, 400)


def test_lone_surrogate_is_text(shared_bridge: RunningBridge) -> None:
    reply = wire.post(shared_bridge.address, "/v1/responses", b'{"model":"gpt-5.5","input":"a\\ud800b"}')
    assert (reply.status, reply.json["output"][0]["content"][0]["text"]) == (200, "a\ud800b")


# -- a refused request --------------------------------------------------------


class Kept(dict[str, Any]):
    """A request whose end can be noticed."""


def test_a_refused_request_is_not_kept(
    bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[Kept]] = []

    def read(body: bytes, _: q.Spans) -> q.Spans:
        request = Kept(json.loads(body))
        seen.append(weakref.ref(request))
        return q.Spans(body, request)

    monkeypatch.setattr(q, "read_request", read)
    backend.on("/responses", wire.refuse(400, "no"))
    gc.disable()  # what only the collector finds, stays
    try:
        assert wire.post(bridge.address, "/v1/responses", REQUEST).status == 400
        assert until(lambda: seen[0]() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("depth", [900, 960, 975, 980, 985, 990])
def test_deep_nesting_is_no_fault(bridge: RunningBridge, depth: int) -> None:
    body = b'{"model":"gpt-5.5","input":"hi","instructions":%b}' % (b"[" * depth + b"]" * depth)
    assert wire.post(bridge.address, "/v1/responses", body).status == 400


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
def test_failed_turn_gives_its_connection_back(
    start: Start, backend: wire.Backend, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    left: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: left.append(found.exc_value))
    backend.on("/responses", wire.turn(wire.created(), wire.failed("server_error", "x")))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        body: Object = {"model": "gpt-5.5", "input": "hi"}
        if path.endswith("completions"):
            body = {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi"}]}
        assert wire.post(start().address, path, body).status == 502
        log_lines.wait_for("status=502")
        assert left == []


# -- a list that is stale -----------------------------------------------------

STALE_LITE, STALE_PLAIN = wire.model_entry("gpt-6-sol", 1), wire.model_entry("gpt-6-sol", 1, lite=False)
CODEX_BODY = {**LITE_BODY, "input": [HI], "tools": [TOOL], "reasoning": {"effort": "low"},
              "parallel_tool_calls": True}


class Stale(NamedTuple):
    """A request, the model's entry that the bridge holds (None: no list yet), and the one that is true."""

    before: Object | None
    now: Object
    headers: dict[str, str]
    body: Object


@pytest.mark.parametrize("stale", [
    Stale(STALE_PLAIN, STALE_LITE, {}, SDK_BODY), Stale(STALE_PLAIN, STALE_LITE, CODEX, CODEX_BODY),
    Stale(STALE_PLAIN, STALE_LITE, {}, {**SDK_BODY, "stream": True}),
    Stale(STALE_LITE, STALE_PLAIN, {}, SDK_BODY), Stale(STALE_LITE, STALE_PLAIN, LITE, LITE_BODY),
    Stale(STALE_LITE, STALE_PLAIN, LITE, {**LITE_BODY, "model": "local_md"}),
    Stale(None, STALE_LITE, {}, SDK_BODY), Stale(None, STALE_LITE, CODEX, CODEX_BODY),
    Stale(None, STALE_PLAIN, LITE, LITE_BODY),
], ids=["lite-now", "lite-now-codex", "lite-now-stream", "plain-now", "plain-now-codex", "plain-now-alias",
        "none-yet", "none-yet-codex", "none-yet-plain"])
@pytest.mark.usefixtures("fresh")
def test_stale_list_is_repaired_once(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, stale: Stale
) -> None:
    if stale.before is None:
        backend.on("/models", FETCH_FAILURES["500"])
    backend.catalog = [stale.before or stale.now]
    models(bridge)
    settle(bridge)
    backend.catalog = [stale.now]
    reply = ask(bridge, stale.body, stale.headers)
    assert (reply.status, reply.header("x-qoo-bridge-repaired")) == (200, "form"), backend.refusals
    assert (len(sent(backend)), len(sent(backend, "/models"))) == (2, 2)
    lite = stale.now is STALE_LITE
    request = sent(backend)[1]
    tools = request.json["input"][0] if lite else {**CARRIER, "tools": request.json["tools"]}
    assert tools == CARRIER
    assert request.json.get("reasoning", {}).get("context") == ("all_turns" if lite else None)
    assert request.header(q.LITE_HEADER) == ("true" if lite else None)
    assert "repairs=form status=200" in log_lines.wait_for("->gpt-6-sol")
    assert ask(bridge, stale.body, stale.headers).header("x-qoo-bridge-repaired") is None


@pytest.mark.usefixtures("fresh")
def test_alias_whose_model_has_gone_is_repaired(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    body = {**PLAIN_BODY, "model": "local_md"}
    assert ask(bridge, body).status == 200
    settle(bridge)
    backend.catalog = [entry for entry in backend.catalog if entry["slug"] != LOCAL_MD]
    assert ask(bridge, body).header("x-qoo-bridge-repaired") == "form"
    assert [request.json["model"] for request in sent(backend)] == [LOCAL_MD, LOCAL_MD, "gpt-5.5"]
    assert sent(backend)[2].header("x-codex-routing-hint") == "model=gpt-5.5"


def test_alias_is_repaired_in_its_form_too(bridge: RunningBridge, backend: wire.Backend) -> None:
    for entry in backend.catalog:
        entry["use_responses_lite"] = False
    models(bridge)
    settle(bridge)
    backend.catalog = [wire.model_entry("gpt-5.6-sol", 1)]
    assert ask(bridge, {**PLAIN_BODY, "model": "local_md"}).status == 200


@pytest.mark.parametrize("text", [
    "Model not found gpt-6-sol", "Responses lite is not supported for model gpt-6-sol",
    "Invalid value: 'additional_tools' at input[0]: responses lite only.",
])
@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.usefixtures("fresh")
def test_list_that_was_right_leaves_the_refusal(
    bridge: RunningBridge, backend: wire.Backend, status: int, text: str
) -> None:
    models(bridge)
    settle(bridge)
    backend.on("/responses", wire.refuse(status, text))
    reply = ask(bridge, SDK_BODY)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (status, "upstream")
    assert reply.json["error"]["message"] == text
    assert (len(sent(backend)), len(sent(backend, "/models"))) == (1, 2)


@pytest.mark.usefixtures("fresh")
def test_form_is_repaired_no_more_than_once(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.catalog = [STALE_PLAIN]
    models(bridge)
    settle(bridge)
    backend.catalog = [STALE_LITE]
    backend.on("/responses", *[wire.refuse(404, "Model not found gpt-6-sol")] * 3)
    assert ask(bridge, SDK_BODY).status == 404
    assert (len(sent(backend)), len(sent(backend, "/models"))) == (2, 2)


@pytest.mark.usefixtures("fresh")
def test_refusal_stands_where_the_list_cannot_be_had(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    models(bridge)
    settle(bridge)
    backend.always("/models", FETCH_FAILURES["500"])
    backend.on("/responses", wire.refuse(404, "Model not found gpt-6-sol"))
    reply = ask(bridge, SDK_BODY)
    assert (reply.status, reply.json["error"]["message"]) == (404, "Model not found gpt-6-sol")
    assert len(sent(backend)) == 1


# -- what names a conversation (WIRE 4, "What the backend's cache wants") ------

SESSION = "01a20211-3a20-7dc3-a834-3ba2e79f8897"
OTHER_SESSION = "01a2020f-0000-7000-8000-000000000001"
CODEX_TURN = {
    **CODEX, "session-id": SESSION, "thread-id": SESSION, "x-client-request-id": SESSION,
    "x-codex-window-id": f"{SESSION}:0",
}
CODEX_REQUEST: Object = {
    **MODEL, "input": [HI], "stream": True, "store": False, "prompt_cache_key": SESSION,
    "include": ["reasoning.encrypted_content"],
}
MADE = ""  # in a row: the bridge has made the name, a UUIDv7 of now


def names(backend: wire.Backend) -> list[tuple[object, ...]]:
    """Return what each turn that came upstream was named: the key, then the three headers."""
    return [wire.names_of(request, request.json) for request in sent(backend)]


def name(backend: wire.Backend) -> str:
    """Return the one name of the last turn; it must be the same in all four places."""
    (only,) = set(names(backend)[-1])
    assert isinstance(only, str) and 0 < len(only) <= 64
    return only


class Turn(NamedTuple):
    """One request of a client."""

    path: str = RESPONSES
    body: Object = {"input": "hi"}  # noqa: RUF012 - never changed
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed

    def ask(self, bridge: RunningBridge) -> wire.RawReply:
        reply = ask(bridge, MODEL, self.headers, path=self.path, **self.body)
        assert reply.status == 200, reply.body
        return reply


CHATS: Object = {"messages": [USER]}
NAMED: dict[str, tuple[Turn, str]] = {
    "responses": (Turn(), MADE),
    "responses-stream": (Turn(body={"input": "hi", "stream": True}), MADE),
    "chat": (Turn(CHAT, CHATS), MADE),
    "chat-stream": (Turn(CHAT, {**CHATS, "stream": True}), MADE),
    "legacy": (Turn(TEXT, {"prompt": "hi"}), MADE),
    "lite": (Turn(body={"input": "hi", "model": "gpt-6-sol"}), MADE),
    "alias": (Turn(body={"input": "hi", "model": "local_md"}), MADE),
    "no-message": (Turn(body={"input": []}), MADE),
    "own-key": (Turn(body={"input": "hi", "prompt_cache_key": "mine"}), "mine"),
    "own-key-chat": (Turn(CHAT, {**CHATS, "prompt_cache_key": "mine"}), "mine"),
    "own-session": (Turn(headers={"session-id": "s-1"}), "s-1"),
    "own-session_id": (Turn(headers={"session_id": "s-1"}), "s-1"),
    "own-conversation": (Turn(headers={"conversation_id": "c-1"}), "c-1"),
    "own-session-chat": (Turn(CHAT, CHATS, {"session-id": "s-1"}), "s-1"),
    # The key says more than the session: several conversations can run in one.
    "own-key-and-session": (
        Turn(body={"input": "hi", "prompt_cache_key": "mine"}, headers={"session-id": "s-1"}),
        "mine",
    ),
    # OpenAI's SDKs tell a request by it, not a conversation: another one each time.
    "request-id-of-an-sdk": (Turn(headers={"x-client-request-id": "req-17"}), MADE),
    "key-that-is-none": (Turn(body={"input": "hi", "prompt_cache_key": ""}), MADE),
    "codex": (Turn(body=CODEX_REQUEST, headers=CODEX_TURN), SESSION),
    # 0.120, run against a stand-in; up to 0.98 or so there was `conversation_id` too.
    "old-codex": (
        Turn(body=CODEX_REQUEST, headers={**CODEX, "session_id": SESSION, "x-client-request-id": SESSION}),
        SESSION,
    ),
    "older-codex": (
        Turn(body=CODEX_REQUEST, headers={**CODEX, "session_id": SESSION, "conversation_id": SESSION}),
        SESSION,
    ),
}


@pytest.mark.parametrize(("turn", "wanted"), NAMED.values(), ids=NAMED)
def test_a_conversation_has_one_name_in_four_places(
    bridge: RunningBridge, backend: wire.Backend, turn: Turn, wanted: str
) -> None:
    begun = time.time()
    for _ in range(2):
        turn.ask(bridge)
    first, second = names(backend)
    assert first == second
    if wanted:
        assert name(backend) == wanted
    else:
        seconds = wire.uuid7_seconds(name(backend))
        assert seconds is not None and begun - 0.001 <= seconds <= time.time()


def test_a_codex_whose_names_differ_keeps_them(bridge: RunningBridge, backend: wire.Backend) -> None:
    apart = {**CODEX_TURN, "thread-id": OTHER_SESSION}  # a sub-agent's thread in its parent's session
    Turn(body=CODEX_REQUEST, headers=apart).ask(bridge)
    assert names(backend) == [(SESSION, SESSION, OTHER_SESSION, SESSION)]


SAID = {"role": "assistant", "content": "hi"}
MORE = {"role": "user", "content": "go on"}
SAME_ROWS: dict[str, tuple[Turn, Turn]] = {
    "second-turn": (Turn(), Turn(body={"input": [USER, SAID, MORE]})),
    "second-turn-of-a-chat": (Turn(CHAT, CHATS), Turn(CHAT, {"messages": [USER, SAID, MORE]})),
    "text-in-parts": (Turn(), Turn(body={"input": [HI]})),
    "streamed": (Turn(), Turn(body={"input": "hi", "stream": True})),
    "temperature": (Turn(), Turn(body={"input": "hi", "temperature": 0.5})),
    "developer-message": (  # Claude Code changes its own each turn
        Turn(body={"input": [{"role": "developer", "content": "today"}, USER]}),
        Turn(body={"input": [{"role": "developer", "content": "tomorrow"}, USER, SAID, MORE]}),
    ),
}
OTHER_ROWS: dict[str, tuple[Turn, Turn]] = {
    "message": (Turn(), Turn(body={"input": "hello"})),
    "message-of-a-chat": (Turn(CHAT, CHATS), Turn(CHAT, {"messages": [MORE]})),
    "model": (Turn(), Turn(body={"input": "hi", "model": "gpt-6-sol"})),
    "instructions": (Turn(), Turn(body={"input": "hi", "instructions": "be brief"})),
    "client": (Turn(headers=bearer(KEY)), Turn(headers=bearer(KEY + "-of-bo"))),
}


@pytest.mark.parametrize(("first", "second"), SAME_ROWS.values(), ids=SAME_ROWS)
def test_a_later_turn_goes_up_under_the_same_name(
    bridge: RunningBridge, backend: wire.Backend, first: Turn, second: Turn
) -> None:
    first.ask(bridge)
    made = name(backend)
    second.ask(bridge)
    assert (name(backend), wire.has_real_time(made)) == (made, True)


@pytest.mark.parametrize(("first", "second"), OTHER_ROWS.values(), ids=OTHER_ROWS)
def test_another_conversation_has_a_name_of_its_own(
    start: Start, backend: wire.Backend, first: Turn, second: Turn
) -> None:
    keys = ("--api-key", f"ann={KEY}", "--api-key", f"bo={KEY}-of-bo") if first.headers else ()
    bridge = start(*keys)
    made = []
    for turn in (first, second, first, second):
        turn.ask(bridge)
        made.append(name(backend))
    assert len(set(made)) == 2
    assert made[:2] == made[2:]
    assert all(map(wire.has_real_time, made))


def test_a_turn_by_previous_response_id_has_its_conversations_name(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    response = Turn(body={"input": "hi", "store": True}).ask(bridge).json
    made = name(backend)
    Turn(body={"input": "go on", "previous_response_id": response["id"]}).ask(bridge)
    assert (name(backend), wire.has_real_time(made)) == (made, True)


@pytest.mark.parametrize(("turn", "kept"), [(Turn(), False), (NAMED["own-key"][0], True)])
def test_a_restart_keeps_what_the_client_named(
    start: Start, backend: wire.Backend, turn: Turn, kept: bool
) -> None:
    made = []
    for _ in range(2):
        turn.ask(start())
        made.append(name(backend))
    assert (made[0] == made[1]) is kept


def test_names_of_conversations_are_kept_within_a_bound(
    bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "MAX_CONVERSATIONS", 2, raising=False)
    made = []
    for text in ("a", "b", "a", "c", "a", "b"):  # b is forgotten for c: it was used longest ago
        Turn(body={"input": text}).ask(bridge)
        made.append(name(backend))
    assert len(set(made)) == 4
    assert made[0] == made[2] == made[4]


SYSTEM = "You are a coding agent. " * 400
OWN: Object = {"prompt_cache_key": "of-an-sdk"}
TEN_TURNS: dict[str, tuple[str, Object, dict[str, str]]] = {
    "responses": (RESPONSES, {"instructions": SYSTEM}, {}),
    "responses-lite": (RESPONSES, {"instructions": SYSTEM, "model": "gpt-6-sol", "tools": [TOOL]}, {}),
    "sdk-with-its-own-key": (RESPONSES, {"instructions": SYSTEM, **OWN}, {}),
    "sdk-with-request-ids": (RESPONSES, {"instructions": SYSTEM}, {"x-client-request-id": "req"}),
    "chat": (CHAT, {}, {}),
    "chat-with-its-own-key": (CHAT, OWN, {}),
    "chat-lite": (CHAT, {"model": "local_md"}, {}),
    "codex": (RESPONSES, CODEX_REQUEST, CODEX_TURN),
}


@pytest.mark.parametrize(("path", "body", "headers"), TEN_TURNS.values(), ids=TEN_TURNS)
def test_ten_turns_are_cached_from_the_second_on(
    bridge: RunningBridge, backend: wire.Backend, path: str, body: Object, headers: dict[str, str]
) -> None:
    history: list[Object] = [{"role": "system", "content": SYSTEM}]
    for number in range(10):
        history.append({"role": "user", "content": f"question {number}"})
        given = {CHAT: "messages", RESPONSES: "input"}[path]
        if "x-client-request-id" in headers and "session-id" not in headers:
            headers = {"x-client-request-id": f"req-{number}"}
        typed = [{"type": "message", **each} for each in history]
        Turn(path, {**body, given: history if path == CHAT else typed}, headers).ask(bridge)
        history.append({"role": "assistant", "content": f"question {number}"})
    shares = [charge.cached / charge.usage["input_tokens"] for charge in backend.cache.charges]
    assert len(shares) == 10
    assert min(shares[1:]) > 0.8


def test_what_is_cached_is_told_to_the_client(bridge: RunningBridge) -> None:
    for _ in range(2):
        usage = Turn(CHAT, {"messages": [{"role": "user", "content": SYSTEM}]}).ask(bridge).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0.8 * usage["prompt_tokens"]



# -- a key that the backend does not use ---------------------------------------

OWN_ROWS: dict[str, Turn] = {
    "whole": Turn(body={"input": "hi", **OWN}),
    "stream": Turn(body={"input": "hi", "stream": True, **OWN}),
    "chat": Turn(CHAT, {**CHATS, **OWN}),
    "chat-stream": Turn(CHAT, {**CHATS, **OWN, "stream": True}),
    "session": Turn(headers={"session-id": "of-an-sdk"}),
}


@pytest.mark.parametrize("turn", OWN_ROWS.values(), ids=OWN_ROWS)
def test_a_key_that_the_backend_replaces_gives_way_to_a_uuid7(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, turn: Turn
) -> None:
    backend.cache.replaces_keys = True
    made = []
    for _ in range(4):
        turn.ask(bridge)
        made.append(name(backend))
    assert made[0] == "of-an-sdk"
    assert made[1] == made[2] == made[3] != made[0]
    assert wire.has_real_time(made[1])
    assert [charge.cached > 0 for charge in backend.cache.charges] == [False, False, True, True]
    said = [line for line in log_lines.lines if re.search(r"(?i)cache.key|prompt_cache_key", line)
            and " rules=" not in line]
    assert len(said) == 1
    assert "of-an-sdk" not in said[0]  # what a client chose may be anything
    metrics = wire.get(bridge.address, "/metrics").body.decode()
    assert re.search(r"(?m)^qoo_bridge_\w*keys?_\w*total\S* [1-9]", metrics)


@pytest.mark.parametrize("key", [SESSION, "a-word"])
def test_a_key_that_the_backend_uses_stays(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, key: str
) -> None:
    backend.cache.replaces_keys = key == SESSION
    for _ in range(3):
        Turn(body={"input": "hi", "prompt_cache_key": key}).ask(bridge)
        assert name(backend) == key


def test_one_key_over_two_conversations_gives_way_to_two(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.cache.replaces_keys = True
    made = []
    for text in ("one", "two", "one", "two"):
        Turn(body={"input": text, **OWN}).ask(bridge)
        made.append(name(backend))
    assert made[0] == "of-an-sdk"
    assert len(set(made[2:])) == 2
    assert all(map(wire.has_real_time, made[2:]))


def answered(key: Any) -> wire.Reply:
    """Answer a turn with this for the key that was used."""
    first, *rest = wire.text_turn("hi")
    return wire.turn({**first, "response": {**first["response"], "prompt_cache_key": key}}, *rest)


@pytest.mark.parametrize("key", [None, "", 5, [], {"a": 1}, "of-an-sdk"])
def test_an_echo_that_says_nothing_changes_nothing(
    bridge: RunningBridge, backend: wire.Backend, key: Any
) -> None:
    backend.on("/responses", wire.checked(backend, answered(key)))
    for _ in range(2):
        OWN_ROWS["whole"].ask(bridge)
        assert name(backend) == "of-an-sdk"


def test_a_codex_keeps_its_key_whatever_the_backend_uses(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on("/responses", wire.checked(backend, answered(OTHER_SESSION)))
    for _ in range(2):
        Turn(body=CODEX_REQUEST, headers=CODEX_TURN).ask(bridge)
    assert names(backend) == [(SESSION,) * 4] * 2



# -- keys that are too long (six projects: a 400 at every turn) ----------------

LONG = "k" * 64
LONG_ROWS: dict[str, Turn] = {
    "sdk": Turn(),
    "stream": Turn(body={"input": "hi", "stream": True}),
    "lite": Turn(body={"input": "hi", "model": "gpt-6-sol"}),
    "chat": Turn(CHAT, CHATS),
    "codex": Turn(body=CODEX_REQUEST, headers=CODEX_TURN),
    "old-codex": Turn(body=CODEX_REQUEST, headers={**CODEX, "session_id": SESSION}),
}


@pytest.mark.parametrize("turn", LONG_ROWS.values(), ids=LONG_ROWS)
def test_a_key_of_more_than_64_characters_is_never_refused(
    start: Start, backend: wire.Backend, turn: Turn
) -> None:
    bridge, keys = start(), []
    for end in ("a", "b", "c" * 300, "a"):
        turn._replace(body={**turn.body, "prompt_cache_key": LONG + end}).ask(bridge)
        keys.append(str(names(backend)[-1][0]))
    turn._replace(body={**turn.body, "prompt_cache_key": LONG + "a"}).ask(start())  # after a restart, too
    assert keys[0] == keys[3] == names(backend)[-1][0]
    assert len(set(keys)) == 3
    assert max(map(len, keys)) <= 64
    assert backend.refusals == []


def test_a_codexs_name_of_more_than_64_characters_is_one_name_in_four_places(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    long = LONG + "a"
    headers = {**CODEX_TURN, **dict.fromkeys(q.NAME_HEADERS, long)}
    Turn(body={**CODEX_REQUEST, "prompt_cache_key": long}, headers=headers).ask(bridge)
    assert names(backend) == [(q.cache_name(long),) * 4]


@pytest.mark.parametrize("header", ["session-id", "session_id", "conversation_id"])
def test_a_session_of_more_than_64_characters_is_a_name_all_the_same(
    bridge: RunningBridge, backend: wire.Backend, header: str
) -> None:
    for _ in range(2):
        Turn(headers={header: "s" * 65}).ask(bridge)
    assert len(set(names(backend))) == 1
    assert len(name(backend)) <= 64



# -- what the lite form would lose ----------------------------------------------

OTHER_TOOL: Object = {"type": "function", "name": "walk", "strict": False, "parameters": SCHEMA}
CUSTOM: Object = {"type": "custom", "name": "patch"}
SEARCH: Object = {"type": "web_search"}
DRAW: Object = {"type": "image_generation"}
TOOLS: list[Object] = [TOOL, OTHER_TOOL, CUSTOM]
AUTO = "auto"


def named(*tools: Object) -> list[Object]:
    """Return how a choice names tools."""
    return [{"type": tool["type"], "name": tool["name"]} for tool in tools]


def allowed(mode: str, *tools: Object) -> Object:
    """Return the choice that allows some tools only."""
    return {"type": "allowed_tools", "mode": mode, "tools": named(*tools)}


class Loss(NamedTuple):
    """What a request asks for, what lite leaves of its tools, and the word that says what was lost."""

    fields: Object
    left: list[Object]
    word: str


LOSSES = {
    "forced": Loss({"tools": TOOLS, "tool_choice": named(OTHER_TOOL)[0]}, [OTHER_TOOL], "tool_choice"),
    "forced-custom": Loss({"tools": TOOLS, "tool_choice": named(CUSTOM)[0]}, [CUSTOM], "tool_choice"),
    "required": Loss({"tools": TOOLS, "tool_choice": "required"}, TOOLS, "tool_choice"),
    "allowed": Loss({"tools": TOOLS, "tool_choice": allowed("required", TOOL, CUSTOM)}, [TOOL, CUSTOM],
                    "tool_choice"),
    "search": Loss({"tools": [*TOOLS, SEARCH], "tool_choice": AUTO}, TOOLS, "web_search"),
    "search-without-a-choice": Loss({"tools": [SEARCH, *TOOLS]}, TOOLS, "web_search"),
    "search-alone": Loss({"tools": [SEARCH]}, [], "web_search"),
    "draw": Loss({"tools": [TOOL, DRAW]}, [TOOL], "image_generation"),
}
EACH_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def carried(request: wire.Request) -> list[Object]:
    """Return the tools of a request in the lite form."""
    return [tool for item in request.json["input"] if item["type"] == "additional_tools"
            for tool in item["tools"]]


def wanting(bridge: RunningBridge, fields: Object, model: str = LITE_MODEL) -> wire.RawReply:
    """Ask for what the lite form would lose."""
    return ask(bridge, {"model": model, "input": "search for it"}, **fields)


@EACH_LOSS
def test_what_lite_would_lose_goes_in_the_plain_form(
    bridge: RunningBridge, backend: wire.Backend, loss: Loss
) -> None:
    backend.takes_plain.add(LITE_MODEL)
    reply = wanting(bridge, loss.fields)
    assert (reply.status, reply.header("x-qoo-bridge-repaired")) == (200, None), backend.refusals
    (request,) = sent(backend)
    assert request.header(q.LITE_HEADER) is None
    assert {key: request.json.get(key) for key in loss.fields} == loss.fields
    assert carried(request) == []
    assert "context" not in request.json.get("reasoning", {})
    if SEARCH in loss.fields["tools"]:
        assert reply.json["output"][0]["type"] == "web_search_call"


@EACH_LOSS
def test_where_the_plain_form_is_refused_lite_says_what_was_lost(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, loss: Loss
) -> None:
    reply = wanting(bridge, loss.fields)
    assert reply.status == 200, reply.body
    assert backend.refusals == [f"404 {{'detail': 'Model not found {LITE_MODEL}'}}"]
    _, request = sent(backend)
    assert request.header(q.LITE_HEADER) == "true"
    assert carried(request) == loss.left
    assert request.json.get("tool_choice", AUTO) == AUTO
    assert ("tool_choice" in request.json) == bool(loss.left)
    assert loss.word in (reply.header("x-qoo-bridge-repaired") or "")
    (line,) = log_lines.ended()
    assert loss.word in line.partition("repairs=")[2].partition(" ")[0]


@pytest.mark.parametrize("text", [
    "Model not found gpt-6-sol",
    "Model gpt-6-sol requires the responses lite form",
    "x-openai-internal-codex-responses-lite is required for this model",
])
@pytest.mark.parametrize("status", [400, 404])
def test_any_word_about_the_form_goes_back_to_lite(
    bridge: RunningBridge, backend: wire.Backend, status: int, text: str
) -> None:
    backend.on("/responses", wire.refuse(status, text))
    assert wanting(bridge, LOSSES["required"].fields).status == 200
    assert [request.header(q.LITE_HEADER) for request in sent(backend)] == [None, "true"]


@pytest.mark.parametrize("tool", [SEARCH, DRAW], ids=["search", "draw"])
def test_a_forced_hosted_tool_that_no_form_takes_is_a_clear_400(
    bridge: RunningBridge, backend: wire.Backend, tool: Object
) -> None:
    reply = wanting(bridge, {"tools": [TOOL, tool], "tool_choice": tool})
    assert reply.status == 400
    assert tool["type"] in reply.json["error"]["message"]
    assert LITE_MODEL in reply.json["error"]["message"]


def test_a_form_that_was_refused_is_not_tried_at_each_request(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    replies = [wanting(bridge, loss.fields) for loss in (LOSSES["required"], LOSSES["search"])]
    assert [reply.status for reply in replies] == [200, 200]
    assert len(sent(backend)) == 3
    assert "web_search" in (replies[1].header("x-qoo-bridge-repaired") or "")
    backend.takes_plain.add("gpt-6.1-sol")  # of another model nothing is known yet
    assert wanting(bridge, LOSSES["required"].fields, "gpt-6.1-sol").status == 200
    assert sent(backend)[-1].header(q.LITE_HEADER) is None


def test_a_model_that_neither_form_reaches_is_the_clients_404(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on("/responses", *[wire.refuse(404, "Model not found gpt-6-sol")] * 8)
    reply = wanting(bridge, LOSSES["forced"].fields)
    assert (reply.status, reply.json["error"]["message"]) == (404, "Model not found gpt-6-sol")
    assert 2 <= len(sent(backend)) <= 3


@pytest.mark.parametrize("path", [RESPONSES, CHAT])
def test_none_offers_no_tools_in_the_lite_form(
    bridge: RunningBridge, backend: wire.Backend, path: str
) -> None:
    nested: Object = {"type": "function", "function": {"name": "run", "parameters": SCHEMA}}
    body: Object = {"messages": [USER]} if path == CHAT else {"input": "hi"}
    given = [nested] if path == CHAT else [TOOL]
    reply = ask(bridge, {"model": LITE_MODEL, **body}, path=path, tools=given, tool_choice="none")
    assert (reply.status, backend.refusals) == (200, [])
    (request,) = sent(backend)
    assert (request.header(q.LITE_HEADER), carried(request)) == ("true", [])
    assert request.json.get("tool_choice") in (None, AUTO)


@pytest.mark.parametrize("given", [{}, {"tool_choice": None}, {"tool_choice": AUTO}])
@pytest.mark.parametrize("model", [LITE_MODEL, "local_md"])
@pytest.mark.parametrize("headers", [{}, CODEX], ids=["sdk", "codex"])
def test_auto_goes_up_wherever_lite_carries_tools(
    bridge: RunningBridge, backend: wire.Backend, headers: dict[str, str], model: str, given: Object
) -> None:
    reply = ask(bridge, {"model": model, "input": [HI]}, headers, tools=[TOOL], **given)
    assert (reply.status, backend.refusals) == (200, [])
    (request,) = sent(backend)
    assert (carried(request), request.json.get("tool_choice")) == ([TOOL], AUTO)


def test_a_codex_that_sends_the_lite_form_itself_is_left_alone(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    hosted: Object = {**CARRIER, "tools": [TOOL, SEARCH]}
    body: Object = {**CODEX_REQUEST, "model": LITE_MODEL, "input": [hosted, HI], "tool_choice": AUTO,
            "parallel_tool_calls": False, "reasoning": {"effort": "low", "context": "all_turns"}}
    assert ask(bridge, body, {**CODEX_TURN, q.LITE_HEADER: "true"}).status == 200
    (request,) = sent(backend)
    assert request.json == body


def test_a_codex_that_does_not_know_the_model_gets_its_search(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.takes_plain.add("gpt-5.6-sol")
    body = {**CODEX_REQUEST, "model": "local_md", "tools": [TOOL, SEARCH], "tool_choice": AUTO}
    assert ask(bridge, body, CODEX_TURN).status == 200
    (request,) = sent(backend)
    assert (request.header(q.LITE_HEADER), request.json["tools"]) == (None, [TOOL, SEARCH])


CHAT_TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in "fg"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "g"}}])
@pytest.mark.parametrize("plain", [True, False], ids=["plain-too", "lite-only"])
def test_structured_output_by_a_forced_tool_works_on_a_lite_model(
    bridge: RunningBridge, backend: wire.Backend, plain: bool, choice: object
) -> None:
    if plain:
        backend.takes_plain.add(LITE_MODEL)
    body = {"model": LITE_MODEL, "messages": [USER], "tools": CHAT_TOOLS, "tool_choice": choice}
    reply = ask(bridge, body, path=CHAT)
    assert reply.status == 200, reply.body
    request = sent(backend)[-1]
    offered = [tool["name"] for tool in request.json.get("tools") or carried(request)]
    assert offered == ["f", "g"] if plain or choice == "required" else ["g"]
    if plain:
        assert reply.json["choices"][0]["finish_reason"] == "tool_calls"


HOSTED_CHATS: dict[str, Object] = {
    "search-options": {"web_search_options": {}},
    "search-options-with-more": {"web_search_options": {"search_context_size": "low"}, "tools": CHAT_TOOLS},
    "search-tool": {"tools": [*CHAT_TOOLS, SEARCH]},
    "draw": {"tools": [DRAW]},
}


@pytest.mark.parametrize("fields", HOSTED_CHATS.values(), ids=HOSTED_CHATS)
@pytest.mark.parametrize("plain", [True, False], ids=["plain-too", "lite-only"])
def test_a_chat_is_never_answered_in_silence_without_its_search(
    bridge: RunningBridge, backend: wire.Backend, plain: bool, fields: Object
) -> None:
    if plain:
        backend.takes_plain.add(LITE_MODEL)
    asked = {"role": "user", "content": "search for it"}
    reply = ask(bridge, {"model": LITE_MODEL, "messages": [asked]}, path=CHAT, **fields)
    if plain:
        assert (reply.status, reply.header("x-qoo-bridge-repaired")) == (200, None)
        assert [tool["type"] for tool in sent(backend)[0].json["tools"]][-1] in ("web_search", DRAW["type"])
    else:
        lost = reply.header("x-qoo-bridge-repaired") or ""
        assert reply.status == 400 or (reply.status == 200 and ("web_search" in lost or DRAW["type"] in lost))



# -- a failure inside the 200 ------------------------------------------------------------

SAYS = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hi"}]}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
BAD_CIPHER = wire.failed("invalid_encrypted_content", "The encrypted content gAAA could not be verified.")
CIPHER_ERROR: Object = {
    "type": "error", "error": {"code": "invalid_encrypted_content", "type": "invalid_request_error",
                               "message": "The encrypted content gAAA could not be verified."}}
BAD_FIELD = wire.failed("unknown_parameter", "Unknown parameter: 'text.odd'.")
ODD_CODE = wire.failed("of_tomorrow", "Unknown parameter: 'text.odd'.")  # it names no status
NOT_FOUND = wire.failed("invalid_request_error", "Item with id 'rs_1' not found. Items are not persisted…")
TOLD: dict[str, list[Object]] = {
    "cipher": [wire.created(), BAD_CIPHER], "cipher-alone": [BAD_CIPHER],
    "cipher-error": [wire.created(), CIPHER_ERROR], "not-found": [wire.created(), NOT_FOUND],
    "field": [wire.created(), BAD_FIELD], "field-odd-code": [wire.created(), ODD_CODE],
}
ASKED: dict[str, tuple[str, Object]] = {
    "whole": (RESPONSES, {"input": [HI, THOUGHT, SAYS, HI], "text": {"odd": 1}}),
    "chat": (CHAT, {"messages": [USER]}),
    "chat-stream": (CHAT, {"messages": [USER], "stream": True}),
}


@pytest.mark.parametrize("events", TOLD.values(), ids=TOLD)
def test_a_failure_inside_the_200_is_repaired_as_a_refusal_would_be(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, events: list[Object]
) -> None:
    backend.on("/responses", wire.turn(*events))
    reply = ask(bridge, {**MODEL, **ASKED["whole"][1]})
    assert reply.status == 200, reply.body
    second = sent(backend)[1].json
    names_field = events[-1] in (BAD_FIELD, ODD_CODE)
    dropped = "drop-parameter" if names_field else "continuity"
    assert (THOUGHT in second["input"], "odd" in second.get("text", {})) == (names_field, not names_field)
    assert dropped in (reply.header("x-qoo-bridge-repaired") or "")
    assert f"repairs={dropped}" in log_lines.ended()[0]
    assert len(sent(backend)) == 2


@pytest.mark.parametrize("kind", ["chat", "chat-stream"])
@pytest.mark.parametrize("events", [TOLD["cipher"], TOLD["cipher-error"]], ids=["failed", "error"])
def test_a_chat_that_has_sent_nothing_is_repaired_too(
    bridge: RunningBridge, backend: wire.Backend, kind: str, events: list[Object]
) -> None:
    backend.on("/responses", wire.turn(*events))
    path, body = ASKED[kind]
    reply = ask(bridge, {**MODEL, **body}, path=path)
    assert (reply.status, len(sent(backend))) == (200, 2), reply.body
    assert reply.header("x-qoo-bridge-repaired")


@pytest.mark.parametrize("before", [[], [wire.rate_limits_frame()]], ids=["first", "after-a-side-event"])
@pytest.mark.parametrize("event", [BAD_CIPHER, CIPHER_ERROR], ids=["failed", "error"])
def test_a_stream_that_fails_at_its_first_event_is_repaired(
    bridge: RunningBridge, backend: wire.Backend, event: Object, before: list[Object]
) -> None:
    backend.on("/responses", wire.turn(*before, event))
    reply = ask(bridge, {**MODEL, **ASKED["whole"][1]}, stream=True)
    assert len(sent(backend)) == 2
    kinds = [event["type"] for event in wire.sse(reply.body)]
    assert ("error" in kinds, kinds[-1]) == (False, "response.completed")


@pytest.mark.parametrize("events", [
    [wire.created(), wire.failed("server_error", "it broke")],
    [*wire.text_turn("half of it")[:6], BAD_CIPHER],
], ids=["no-repair", "too-late"])
def test_any_other_failure_is_told_once(
    bridge: RunningBridge, backend: wire.Backend, events: list[Object]
) -> None:
    backend.on("/responses", wire.turn(*events))
    path, body = ASKED["chat-stream"]
    ask(bridge, {**MODEL, **body}, path=path)
    assert len(sent(backend)) == 1


# -- the conversation's last request ------------------------------------------

PRINTED = [{"type": "function_call_output", "call_id": "c", "output": f"{number} é \u2714 \\ " * 20}
           for number in range(90)]
WORDS = "be brief " * 900


Readings = list[tuple[bool, int]]


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Readings:
    """Note of each request whether nothing was taken from the last one, and the size of what was not."""
    noted: Readings = []
    read_request = q.read_request

    def read(body: bytes, last: q.Spans = q.NOTHING_READ) -> q.Spans:
        spans = read_request(body, last)
        noted.append((not spans.memory, len(q.json_bytes(spans.fresh))))
        return spans

    monkeypatch.setattr(q, "read_request", read)
    return noted


def conversation(turn: int, model: str = "gpt-5.5", **fields: Any) -> Object:
    """Return the request of a conversation's turn: one more call and its output than the one before."""
    items = [HI, *PRINTED[:40 + 2 * turn]]
    return {"model": model, "instructions": WORDS, "input": items, "tools": [TOOL] * 5, "stream": True,
            "store": False, "client_metadata": {"turn": str(turn)}, **fields}


@pytest.mark.parametrize("model", ["gpt-5.5", "local_md", LITE_MODEL])
@pytest.mark.parametrize("headers", [{}, CODEX, {**CODEX, "session-id": "s"}], ids=["sdk", "codex", "named"])
def test_a_turn_parses_what_is_new_in_it(
    bridge: RunningBridge, backend: wire.Backend, readings: Readings,
    headers: dict[str, str], model: str
) -> None:
    bodies = [json.dumps(conversation(turn, model), ensure_ascii=False) for turn in range(6)]
    for body in bodies:
        assert wire.post(bridge.address, RESPONSES, body.encode(), headers).status == 200
    for turn, request in enumerate(sent(backend)):
        assert request.json["input"][-len(PRINTED[:40 + 2 * turn]):] == PRINTED[:40 + 2 * turn]
        printed = json.dumps(PRINTED[:40 + 2 * turn], ensure_ascii=False).encode()[1:]
        assert printed in request.body  # the client's own bytes
    assert backend.refusals == []
    assert readings[0][0]
    assert readings[0][1] > 20_000
    assert [(new, fresh < 1500) for new, fresh in readings[1:]] == [(False, True)] * 5, readings


def test_a_chat_parses_what_is_new_in_it(bridge: RunningBridge, readings: Readings) -> None:
    history = [USER, {"role": "assistant", "content": WORDS * 3}] * 4
    for count in (5, 7, 8):
        assert ask(bridge, MODEL, path=CHAT, messages=history[:count]).status == 200
    assert [(new, fresh < 30_000) for new, fresh in readings] == [
        (True, False), (False, True), (False, True)], readings


def test_nobody_gets_what_is_anothers(
    start: Start, readings: Readings
) -> None:
    bridge = start("--api-key", f"ann={KEY}", "--api-key", f"bob={KEY}2")
    for secret in (KEY, f"{KEY}2", KEY):
        assert ask(bridge, conversation(0), bearer(secret)).status == 200
    assert [new for new, _ in readings] == [True, True, False]


def test_conversations_beside_each_other_keep_their_own(
    bridge: RunningBridge, backend: wire.Backend, readings: Readings
) -> None:
    sessions = [{**CODEX, "session-id": name} for name in ("one", "two")]
    for turn in range(3):
        for session in sessions:  # what tells them apart stands behind what could
            items = [*PRINTED[:40], {**HI, "content": session["session-id"]}, *PRINTED[40:60 + 2 * turn]]
            assert ask(bridge, conversation(turn, input=items), session).status == 200
    assert [fresh < 1500 for _, fresh in readings[2:]] == [True] * 4
    for number, request in enumerate(sent(backend)):
        assert request.header("session-id") == ("one", "two")[number % 2]


def test_conversations_without_a_name_are_told_by_their_first_message(
    bridge: RunningBridge, readings: Readings
) -> None:
    firsts = [{**HI, "content": f"I am {name}"} for name in ("ann", "bob")]
    for turn in range(3):
        for first in firsts:
            request = conversation(turn)
            assert ask(bridge, {**request, "input": [first, *request["input"]]}).status == 200
    assert [fresh < 1500 for _, fresh in readings[2:]] == [True] * 4


def test_a_new_conversation_takes_instructions_and_tools_from_the_last_one(
    bridge: RunningBridge, readings: Readings
) -> None:
    for name in ("one", "two"):
        request = {**conversation(0, instructions=WORDS * 3), "input": [{**HI, "content": f"{name} " * 900}]}
        assert ask(bridge, request, {**CODEX, "session-id": name}).status == 200
    assert [(new, fresh > len(WORDS)) for new, fresh in readings] == [(True, True), (False, False)]


def test_a_conversation_whose_first_bytes_still_change_parses_what_is_new(
    bridge: RunningBridge, readings: Readings
) -> None:
    """LiteLLM names no session, and writes the input first."""
    for count in (2, 4, 6, 60, 62):
        request = conversation(0, instructions=WORDS * 3)
        items = [{**HI, "content": "x" * q.START_BYTES}, *PRINTED[:count]]
        assert ask(bridge, {"model": request.pop("model"), "input": items, **{
            name: value for name, value in request.items() if name != "input"}}).status == 200
    assert [fresh < 1500 for _, fresh in readings] == [False, True, True, False, True]


def test_threads_of_a_session_keep_their_own(bridge: RunningBridge, readings: Readings) -> None:
    named = {**CODEX, "session-id": "s"}
    for turn in range(3):
        for thread in ("one", "two"):
            request = conversation(turn)
            items = [{**HI, "id": f"msg_{thread}"}, *request.pop("input")]
            assert ask(bridge, {"model": "gpt-5.5", "input": items, **request}, named).status == 200
    assert [(new, fresh < 1500) for new, fresh in readings] == [(True, False)] * 2 + [(False, True)] * 4


def test_requests_of_one_conversation_at_once_are_each_their_own(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    bodies = [json.dumps(conversation(turn), ensure_ascii=False).encode() for turn in range(8)]
    threads = [threading.Thread(target=wire.post, args=(bridge.address, RESPONSES, body, CODEX))
               for body in bodies * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    got = sorted(json.dumps(request.json["input"]) for request in sent(backend))
    assert got == sorted([json.dumps(json.loads(body)["input"]) for body in bodies * 4])
    assert bridge.faults == []


def test_a_small_request_is_not_kept(bridge: RunningBridge, readings: Readings) -> None:
    """To parse it takes less time than to look for what is new in it."""
    for _ in range(2):
        assert ask(bridge, {**MODEL, "input": "x" * (q.COUNTED_BODY // 2)}).status == 200
    assert [new for new, _ in readings] == [True, True]
    assert not bridge.server.bridge.turns.last_requests._entries


def test_a_refused_request_is_no_last_one(
    bridge: RunningBridge, backend: wire.Backend, readings: Readings
) -> None:
    backend.on("/responses", wire.refuse(400, "no"))
    assert [ask(bridge, conversation(turn)).status for turn in (0, 1, 2)] == [400, 200, 200]
    assert [new for new, _ in readings] == [True, True, False]


@pytest.mark.parametrize("limit", [q.LAST_REQUESTS_SIZE, 1000], ids=["kept", "too large to keep"])
def test_a_large_request_is_kept_whole_or_freed(
    bridge: RunningBridge, backend: wire.Backend, readings: Readings, limit: int,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[q.Spans] = []
    free_items = q.free_items

    def free(spans: q.Spans, *requests: dict[str, Any]) -> None:
        freed.append(spans)
        free_items(spans, *requests)

    monkeypatch.setattr(q, "free_items", free)
    bridge.server.bridge.turns.last_requests.limit = limit
    large = {**HI, "content": "x" * q.LARGE_BODY}
    for turn in range(3):
        request = conversation(turn, "local_md")
        assert ask(bridge, {**request, "input": [large, *request["input"]]}).status == 200
    kept = limit > 1000
    assert [new for new, _ in readings] == [True, not kept, not kept]
    assert (len(freed), backend.refusals) == (0 if kept else 3, [])
    assert [len(request.json["input"]) for request in sent(backend)][-1] >= 46


def test_a_repaired_request_is_a_last_one(
    bridge: RunningBridge, backend: wire.Backend, readings: Readings
) -> None:
    request = conversation(0, text={"odd": 1})
    assert [ask(bridge, request).status for _ in range(2)] == [200, 200]
    assert [new for new, _ in readings] == [True, False]
    assert sent(backend)[-1].json["input"] == request["input"]
