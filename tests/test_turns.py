"""Room turns: what is no request, and how a refused one is repaired and sent once more."""

from __future__ import annotations

import gc
import json
import sys
import warnings
import weakref
from typing import Any, NamedTuple

import pytest
import wire
from conftest import LogLines, RunningBridge, Start
from help import (
    BODY,
    CARRIER,
    CODEX,
    DEEP,
    FETCH_FAILURES,
    HI,
    LITE,
    LITE_BODY,
    LOCAL_MD,
    PLAIN_BODY,
    REQUEST,
    SDK_BODY,
    TOOL,
    Object,
    ask,
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

    def parse(body: bytes) -> Kept:
        request = Kept(json.loads(body))
        seen.append(weakref.ref(request))
        return request

    monkeypatch.setattr(q, "parse_json", parse)
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
        body = {**REQUEST, "messages": [{"role": "user", "content": "hi"}]}
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
