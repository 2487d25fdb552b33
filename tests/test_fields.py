"""Room fields: which header fields cross, and in which form."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import wire
from conftest import RunningBridge
from help import AGENT, CODEX, MODEL, ask, sent

import qoo_bridge as q

SESSION = "01a20211-3a20-7dc3-a834-3ba2e79f8897"
CODEX_FIELDS = {
    "x-codex-beta-features": "remote_compaction_v2", "x-codex-turn-state": "ts-sticky-1",
    "x-codex-window-id": f"{SESSION}:0", "x-codex-turn-metadata": "{}", "x-codex-parent-thread-id": "p",
    "x-openai-subagent": "review", "x-client-request-id": SESSION, "session-id": SESSION,
    "thread-id": SESSION,
    "originator": "codex_exec", "user-agent": AGENT,
}
STAYS = {
    "host": "127.0.0.1:4050", "content-length": "5", "content-type": "application/json",
    "content-encoding": "gzip",
    "accept": "text/event-stream", "accept-encoding": "gzip", "authorization": "Bearer lan", "x-api-key": "k",
    "cookie": "a=b", "forwarded": "for=x", "x-forwarded-for": "10.0.0.7", "x-real-ip": "10.0.0.7",
    "via": "1.1 x",
    "cf-connecting-ip": "10.0.0.7", "x-stainless-os": "Linux", "connection": "close", "te": "trailers",
    "transfer-encoding": "chunked", "upgrade": "h2c", "proxy-authorization": "x", "origin": "http://x",
    "expect": "x",
    "openai-beta": "responses=experimental", "openai-organization": "o", "chatgpt-account-id": "forged",
    "x-codex-routing-hint": "model=forged", "x-openai-fedramp": "true",
    "x-openai-account-routing-override": "us",
    q.LITE_HEADER: "true",
}
US = q.Identity("qoo_bridge", "0.169.0")
OURS = {"version": "0.169.0", "originator": "qoo_bridge", "user-agent": q.USER_AGENT}


def upstream(headers: dict[str, str], session: str, identity: q.Identity = US) -> dict[str, str]:
    """Choose the headers that go upstream."""
    return q.upstream_headers(headers, q.read_client_headers(headers), identity, session)


def test_a_codex_keeps_its_own_fields_and_no_others() -> None:
    assert upstream({**STAYS, **CODEX_FIELDS}, "key", q.Identity("x", "1.0.0")) == {
        "version": "0.169.0", **CODEX_FIELDS}


def test_another_client_is_named_as_the_bridge() -> None:
    headers = {**STAYS, "user-agent": "OpenAI/Python 1.0", "originator": "forged", "version": "9.9.9",
              "x-openai-subagent": "forged", "x-codex-beta-features": "forged"}
    assert upstream(headers, "key") == {**OURS, **names("key")}


def names(name: str) -> dict[str, str]:
    """Return the headers that name a conversation."""
    return dict.fromkeys(("session-id", "thread-id", "x-client-request-id"), name)


def test_requests_of_the_bridge_itself_are_named_as_the_bridge() -> None:
    assert US.headers() == OURS


@pytest.mark.parametrize(("headers", "name", "expected"), [
    ({}, "key", {**OURS, **names("key")}),
    ({"session-id": "s", "thread-id": "t", "x-client-request-id": "r"}, "key", {**OURS, **names("key")}),
    ({"thread_id": "old"}, "key", {**OURS, **names("key")}),
    ({"user-agent": "codex_cli_rs/0.130.0 (x)", "originator": "codex_cli_rs", "session_id": "s"}, "s",
     {"version": "0.130.0", "originator": "codex_cli_rs", "user-agent": "codex_cli_rs/0.130.0 (x)",
      **names("s")}),
    ({"user-agent": AGENT, "thread_id": "old"}, "s",
     {**OURS, "user-agent": AGENT, **names("s"), "thread-id": "old"}),
    ({"user-agent": AGENT, "thread_id": "old", "thread-id": "new"}, "s",
     {**OURS, "user-agent": AGENT, **names("s"), "thread-id": "new"}),
    ({"originator": "codex_vscode", "version": "0.150.0"}, "s",
     {"version": "0.150.0", "originator": "codex_vscode", "user-agent": "codex_vscode/0.169.0",
      **names("s")}),
    ({"x-codex-window-id": "w", "user-agent": "qoo/1"}, "s",
     {**OURS, "user-agent": "qoo/1", "x-codex-window-id": "w", **names("s")}),
    ({"x-codex-turn-metadata": "{}", "user-agent": ""}, "s",
     {**OURS, "x-codex-turn-metadata": "{}", **names("s")}),
])
def test_upstream_fields(headers: dict[str, str], name: str, expected: dict[str, str]) -> None:
    before = dict(headers)
    assert upstream(headers, name) == expected
    assert headers == before


@pytest.mark.parametrize(("name", "default"), [
    ("session-id", "key"), ("version", "0.169.0"), ("originator", "qoo_bridge"),
])
def test_an_empty_field_is_none(name: str, default: str) -> None:
    assert upstream({"user-agent": AGENT, name: ""}, "key")[name] == default


@pytest.mark.parametrize(("agent", "version"), [
    (AGENT, "0.169.0"), ("codex_cli_rs/0.98.0", "0.98.0"),
    ("codex-tui/0.170.0-alpha.3 (x)", "0.170.0-alpha.3"),
    ("Codex Desktop/1.2.3", "1.2.3"), ("codex/10.20.30", "10.20.30"),
    ("", ""), ("OpenAI/Python 1.2.3", ""), ("curl/8.0.0", ""), ("codex", ""), ("codex/1.2", ""),
    ("codex/x.y.z", ""),
    ("x codex/1.2.3", ""), ("codex exec/1.2.3", ""), ("codex/1.2.3-" + "x" * 40, "1.2.3-" + "x" * 20),
])
def test_codex_version(agent: str, version: str) -> None:
    assert q.read_client_headers({"user-agent": agent}).version == version
    assert q.read_client_headers({"user-agent": agent}).codex is bool(version)


@pytest.mark.parametrize(("headers", "codex"), [
    ({}, False), ({"originator": "codex_exec"}, True), ({"originator": "Codex Desktop"}, True),
    ({"originator": "x_codex"}, False), ({"x-codex-turn-metadata": ""}, True),
    ({"x-codex-window-id": ""}, True),
    ({"x-codex-beta-features": "x"}, False), ({"session-id": "s"}, False),
])
def test_is_codex(headers: dict[str, str], codex: bool) -> None:
    assert q.read_client_headers(headers).codex is codex


@pytest.mark.parametrize(("headers", "session"), [
    ({"session-id": "a", "session_id": "b", "conversation_id": "c"}, "a"), ({"session_id": "b"}, "b"),
    ({"conversation_id": "c", "session_id": "b"}, "b"), ({"conversation_id": "c"}, "c"),
    ({"session-id": "", "conversation_id": "c"}, "c"), ({"thread-id": "t"}, ""), ({}, ""),
])
def test_client_session(headers: dict[str, str], session: str) -> None:
    assert q.read_client_headers(headers).session == session


@pytest.mark.parametrize(("request_", "hint"), [
    ({"model": "gpt-6-sol"}, "model=gpt-6-sol"),
    ({"model": "m", "service_tier": "priority"}, "model=m;tier=priority"),
    ({"model": "m", "service_tier": None}, "model=m"), ({"model": "m", "service_tier": 5}, "model=m"),
])
def test_routing_hint(request_: dict[str, Any], hint: str) -> None:
    assert q.routing_hint(request_) == hint


def test_downstream_fields() -> None:
    passed = {
        "content-type": "text/event-stream", "etag": "e", "retry-after": "5", "cf-ray": "r",
        "openai-model": "m",
        "openai-processing-ms": "1", "x-request-id": "i", "x-codex-turn-state": "ts",
        "x-codex-primary-used-percent": "5", "x-codex-plan-type": "plus", "x-ratelimit-remaining-tokens": "1",
    }
    stays = {
        "set-cookie": "a=b", "content-length": "5", "content-encoding": "gzip",
        "transfer-encoding": "chunked",
        "connection": "close", "keep-alive": "x", "trailer": "x", "upgrade": "h2", "date": "x",
        "server": "cloudflare",
        "alt-svc": "h3", "strict-transport-security": "x", "location": "https://x", "www-authenticate": "x",
        "cf-cache-status": "x", "x-accel-redirect": "/etc", "x-accel-buffering": "no", "x-sendfile": "/etc",
        "x-qoo-bridge-error": "bridge", "x-qoo-bridge-id": "forged", "x-models-etag": "upstream's list",
    }
    assert q.downstream_headers({**stays, **passed}) == passed


GO_UP = {
    "x-openai-memgen-request": "true", "x-responsesapi-include-timing-metrics": "true",
    "x-openai-of-tomorrow": "1", "x-responsesapi-of-tomorrow": "1", "x-openai-subagent": "review",
}
STAY = {
    "x-openai-actor-authorization": "lan", "x-openai-authorization": "Bearer lan",
    "x-openai-internal-of-tomorrow": "1", "x-openai-internal-codex-of-tomorrow": "1",
    "x-openai-agent-assertion": "ey.J", "x-openai-fedramp": "true", "x-openai-account-routing-override": "us",
}
SIDES = ["/v1/alpha/search", "/v1/images/generations", "/v1/images/edits", "/v1/memories/trace_summarize"]
HEADERS = {**CODEX, **GO_UP, **STAY}


def passed(request: wire.Request) -> dict[str, str | None]:
    """Return which of the headers came upstream."""
    return {name: request.header(name) for name in (*GO_UP, *STAY) if request.header(name) is not None}


def test_a_codexs_headers_of_these_families_go_up(bridge: RunningBridge, backend: wire.Backend) -> None:
    assert ask(bridge, {**MODEL, "input": "hi"}, HEADERS).status == 200, backend.refusals
    assert passed(sent(backend)[0]) == GO_UP


def test_a_codexs_headers_of_these_families_go_up_at_a_handshake(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    with contextlib.closing(wire.WebSocketClient(bridge.address)) as client:
        assert client.connect("/v1/responses", HEADERS).status == 101, backend.refusals
    (asked,) = [request for request in backend.requests if request.header("upgrade")]
    assert passed(asked) == GO_UP


@pytest.mark.parametrize("path", SIDES)
def test_a_codexs_headers_of_these_families_go_up_beside_a_turn(
    bridge: RunningBridge, backend: wire.Backend, path: str
) -> None:
    backend.on(path[len("/v1"):], wire.reply_json(200, {}))
    assert wire.post(bridge.address, path, {"query": "x"}, HEADERS).status == 200
    assert passed(sent(backend, path[len("/v1"):])[0]) == GO_UP


def test_no_such_header_of_another_client_goes_up(bridge: RunningBridge, backend: wire.Backend) -> None:
    headers = {**GO_UP, **STAY, "user-agent": "OpenAI/Python 3.54.0"}
    assert ask(bridge, {**MODEL, "input": "hi"}, headers).status == 200
    assert passed(sent(backend)[0]) == {}
