"""Room account: where an account's requests go, its bearer, and the one retry after a 401."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import LogLines, RunningBridge, Start
from help import API_KEY, STREAM, NoThreads, ask, bearer, json_answer

import qoo_bridge as q

CHECK = "/backend-api/wham/accounts/check"


# -- what is shown of it ------------------------------------------------------


def test_what_holds_a_token_hides_it_in_its_repr(start: Start, backend: wire.Backend) -> None:
    bridge = start("--api-key", f"laptop={API_KEY}")
    held = bridge.bridge.account._credentials.bearer()
    shown = repr(bridge.config) + repr(held) + repr(bridge.bridge.key_ring.keys()) + str(held)
    assert [each for each in (API_KEY, *backend.tokens.values()) if each in shown] == []


@pytest.fixture(autouse=True)
def codex_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the files of these tests be Codex's own."""
    monkeypatch.setenv("CODEX_HOME", str(tmp_path))


# -- account routing ------------------------------------------------------------

UPSTREAM = "https://chatgpt.com/backend-api/codex"


def route(
    answer: q.BufferedReply | q.BridgeError, upstream: str = UPSTREAM
) -> tuple[str, dict[str, str], list[str]]:
    """Ask for the routing once; return what it came to, and the addresses that got the token."""
    urls: list[str] = []

    def fetch(method: str, url: str, fields: dict[str, str], body: bytes,
              timeout: float) -> q.BufferedReply:
        assert fields["authorization"] == "Bearer token"
        urls.append(url)
        if isinstance(answer, q.BridgeError):
            raise answer
        return answer

    tokens = q.Tokens("token", "", False, q.SignIn("acc", "pro", "", 0.0, False))
    routing = q.Routing(upstream, fetch, {})
    assert routing.route(tokens) == (upstream, {})  # a request does not wait for the answer
    for thread in threading.enumerate():
        if thread.name == "routing":
            thread.join(5)
    base, fields = routing.route(tokens)
    return base, fields, urls


def account(
    origin: Any = "https://chatgpt.com", override: Any = "NO_CONSTRAINT", **changes: Any
) -> dict[str, Any]:
    """Return the answer's entry for an account."""
    return {"id": "acc", "workspace_backend_origin": origin, "account_routing_override": override, **changes}


@pytest.mark.parametrize(
    ("origin", "base"),
    [
        ("https://chatgpt.com", UPSTREAM),
        ("https://chatgpt.com/", UPSTREAM),
        ("https://us.chatgpt.com", "https://us.chatgpt.com/backend-api/codex"),
        ("https://a.us.chatgpt.com:8443", "https://a.us.chatgpt.com:8443/backend-api/codex"),
    ],
)
def test_origin_of_the_same_site_is_taken(origin: str, base: str) -> None:
    assert route(json_answer(200, {"accounts": [account(origin)]}))[0] == base


@pytest.mark.parametrize(
    "origin",
    [
        "http://chatgpt.com",
        "https://evil.test",
        "https://chatgpt.com.evil.test",
        "https://evilchatgpt.com",
        "https://chatgpt.com@evil.test",
        "https://evil.test/chatgpt.com",
        "https://evil.test#.chatgpt.com",
        "https://evil.test?.chatgpt.com",
        "https://user:pw@chatgpt.com",
        "https://chatgpt.com/other",
        "https://chatgpt.com:99999",
        "https://[chatgpt.com",
        "//chatgpt.com",
        "chatgpt.com",
        "file:///chatgpt.com",
        "",
        None,
        5,
        [],
        {},
        ["https://us.chatgpt.com"],
        *(
            pytest.param(
                origin)
            for origin in (
                "https://evil.test\\.chatgpt.com",
                "https://two words.chatgpt.com",
                "https://.chatgpt.com",
                "https://\u4f8b.chatgpt.com",
            )
        ),
    ],
)
def test_any_other_origin_is_not_taken(origin: Any) -> None:
    base, _, urls = route(json_answer(200, {"accounts": [account(origin)]}))
    assert base == UPSTREAM
    assert urls == ["https://chatgpt.com/backend-api/wham/accounts/check"]


@pytest.mark.parametrize(
    ("override", "sent"),
    [
        ("us", "us"),
        ("us_cr", "us_cr"),
        ("NO_CONSTRAINT", None),
        ("", None),
        (None, None),
        (5, None),
        (["us"], None),
        ("us\r\nx-evil: 1", None),
        ("us\n", None),
        ("x" * 33, None),
    ],
)
def test_override_is_sent_as_a_field(override: Any, sent: str | None) -> None:
    fields = route(json_answer(200, {"accounts": [account(override=override)]}))[1]
    assert fields == ({"x-openai-account-routing-override": sent} if sent else {})


@pytest.mark.parametrize(
    "answer",
    [
        q.BadUpstream("unreachable"),
        q.BufferedReply(403, {}, b"<html>"),
        json_answer(200, []),
        json_answer(200, {}),
        json_answer(200, {"accounts": None}),
        json_answer(200, {"accounts": {}}),
        json_answer(200, {"accounts": [None, 5, [], {}]}),
        json_answer(200, {"accounts": [account("https://us.chatgpt.com", "us", id="another")]}),
    ],
    ids=repr,
)
def test_failing_to_ask_stops_nothing(answer: q.BufferedReply | q.BridgeError) -> None:
    assert route(answer)[:2] == (UPSTREAM, {})


# -- through the bridge -----------------------------------------------------------


def test_request_without_sign_in_is_answered_with_the_remedy(start: Start, backend: wire.Backend) -> None:
    bridge = start(signed_in=False)
    reply = ask(bridge)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (401, "bridge")
    assert reply.json["error"]["code"] == "not_signed_in"
    assert "codex login" in reply.json["error"]["message"]
    assert backend.requests == []
    wire.write_auth(bridge.auth_file, backend)
    assert ask(bridge).status == 200


def test_sign_in_travels_with_the_request(bridge: RunningBridge, backend: wire.Backend) -> None:
    reply = ask(bridge, headers=bearer("the-clients-own"))
    assert reply.status == 200
    sent = backend.wait_for(1, "/responses")[0]
    assert wire.find_all(sent.headers, "authorization") == [f"Bearer {backend.access_token}"]
    assert sent.header("chatgpt-account-id") == backend.account_id


def test_replaced_file_is_used_at_once(bridge: RunningBridge, backend: wire.Backend) -> None:
    assert ask(bridge).status == 200
    backend.rotate()
    backend.revoke()
    backend.rotate()
    wire.write_auth(bridge.auth_file, backend)
    assert ask(bridge).status == 200
    assert backend.refreshes == 0


def test_requests_that_met_a_401_together_cost_one_refresh(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    assert ask(bridge).status == 200  # the model list and the routing are known from here on
    together = threading.Barrier(12)

    def expired(exchange: wire.Exchange) -> None:
        together.wait(10)
        exchange.json(401, {"detail": "Could not validate credentials"})

    backend.revoke()
    backend.on("/responses", *[expired] * 12)
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda _: ask(bridge), range(12)))
    assert [each.status for each in replies] == [200] * 12
    assert backend.refreshes == 1
    assert len(backend.wait_for(25, "/responses")) == 25


def test_expired_token_is_refreshed_before_it_is_sent(start: Start, backend: wire.Backend) -> None:
    backend.expires_in = 60
    backend.rotate()
    backend.expires_in = 864_000
    bridge = start()
    assert ask(bridge).status == 200
    assert backend.refreshes == 1
    assert len(backend.wait_for(1, "/responses")) == 1
    assert json.loads(backend.wait_for(1, "/oauth/token")[0].body)["refresh_reason"] == "proactive_expiry"


def test_second_401_is_told_with_the_remedy(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", *[wire.refuse(401, "Could not validate credentials")] * 3)
    reply = ask(bridge)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (401, "upstream")
    assert "Could not validate credentials" in reply.json["error"]["message"]
    assert "codex login" in reply.json["error"]["message"]
    assert len(backend.wait_for(2, "/responses")) == 2


def test_403_refreshes_nothing(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", wire.refuse(403, "Not for you"))
    assert ask(bridge).status == 403
    assert backend.refreshes == 0


def test_dead_sign_in_is_asked_about_once(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "REUSED_SECONDS", 0.03)
    tokens = dict(backend.tokens)
    backend.revoke()
    backend.revoke_refresh()
    for _ in range(3):
        reply = ask(bridge)
        assert (reply.status, reply.header("x-qoo-bridge-error")) == (401, "bridge")
        assert "refresh_token_reused" in reply.json["error"]["message"]
        assert "codex login" in reply.json["error"]["message"]
    assert len(backend.wait_for(1, "/oauth/token")) == 1
    backend.rotate()
    wire.write_auth(bridge.auth_file, backend)
    assert ask(bridge).status == 200
    assert not any(token in line for token in tokens.values() for line in log_lines.lines)


def test_sign_in_server_that_is_down_is_no_sign_out(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.revoke()
    backend.on("/oauth/token", wire.refuse(503, "down"))
    reply = ask(bridge)
    assert (reply.status, reply.json["error"]["code"]) == (502, "upstream_error")
    assert "sign-in server" in reply.json["error"]["message"]


def test_routing_moves_the_requests(start: Start, backend: wire.Backend) -> None:
    with wire.Backend() as other:
        other.always("/responses", wire.turn(*wire.text_turn("from afar")))
        backend.routing = (other.origin, "us")
        bridge = start()
        ask(bridge)
        backend.wait_for(1, CHECK)
        for thread in threading.enumerate():
            if thread.name == "routing":
                thread.join(5)
        assert backend.refusals == []
        assert b"from afar" in ask(bridge).body
        sent = other.wait_for(1, "/responses")[0]
        assert sent.header("x-openai-account-routing-override") == "us"


@pytest.mark.parametrize(
    "answer",
    [wire.refuse(500, "down"), wire.reply_raw(b"", "reset"), wire.cloudflare()],
    ids=["500", "reset", "page"],
)
def test_routing_that_cannot_be_asked_stops_nothing(
    answer: wire.Reply, bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.always(CHECK, answer)
    assert [ask(bridge).status for _ in range(2)] == [200, 200]


def test_file_replaced_torn_and_gone_under_load_fails_no_request(start: Start, backend: wire.Backend) -> None:
    bridge = start()
    whole = bridge.auth_file.read_bytes()
    done = threading.Event()

    def disturb() -> None:
        while not done.wait(0.02):  # each state lasts: else this thread and the readers run in step
            bridge.auth_file.write_bytes(whole[: len(whole) // 2])
            done.wait(0.01)
            bridge.auth_file.write_bytes(whole)
            done.wait(0.02)
            bridge.auth_file.unlink()
            done.wait(0.01)
            wire.write_auth(bridge.auth_file, backend)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda _: ask(bridge).status, range(40)))
    finally:
        done.set()
        thread.join()
    assert replies == [200] * 40


def test_routing_that_cannot_be_asked_fails_no_request_and_is_asked_later(
    bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = NoThreads(monkeypatch, "routing")
    for _ in range(2):
        assert ask(bridge, STREAM).status == 200
    assert threads.failed
    threads.names = ()
    assert ask(bridge, STREAM).status == 200
    backend.wait_for(1, "/backend-api/wham/accounts/check", 1)
