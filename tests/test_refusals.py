"""Room refusals: what upstream refused or reported, as errors that a person understands."""
from __future__ import annotations

import json
from typing import Any

import pytest
import wire
from conftest import LogLines, RunningBridge
from help import CHAT, CODEX, MODEL, RESPONSES, STREAM, USER, Object, ask, short

import qoo_bridge as q

JSON, HTML = "application/json", "text/html; charset=UTF-8"
LIMIT = {"type": "usage_limit_reached", "message": "The usage limit has been reached", "plan_type": "plus",
         "resets_at": 1795328042, "resets_in_seconds": 3600}


def shaped(message: str, type_: str = "invalid_request_error", **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": None, "code": None, **fields}}


@pytest.mark.parametrize(("status", "body", "expected"), [
    # an `error`
    (400, {"error": {"message": "no", "type": "t", "param": "p", "code": "c"}},
     shaped("no", "t", param="p", code="c")),
    (429, {"error": LIMIT},
     shaped("The usage limit has been reached", "usage_limit_reached", plan_type="plus", resets_at=1795328042,
            resets_in_seconds=3600)),
    (400, {"error": {"code": "only_code"}}, shaped("only_code", code="only_code")),
    (400, {"error": {"type": "only_type"}}, shaped("only_type", "only_type")),
    (400, {"error": {}}, shaped("upstream gave no reason")),
    (400, {"error": {"message": 5}}, shaped("5")),
    (400, {"error": "a string"}, shaped("a string")),
    (400, {"error": {"message": "m"}, "detail": "d"}, shaped("m")),
    # a `detail`, a `message`
    (400, {"detail": "Store must be set to false"}, shaped("Store must be set to false")),
    (422, {"detail": [{"loc": ["body"], "msg": "field required"}]},
     shaped('[{"loc": ["body"], "msg": "field required"}]')),
    (400, {"detail": {"code": "x_y"}},
     {"error": {**shaped("upstream refused the request: x y")["error"], "code": "x_y"}}),
    (400, {"message": "m"}, shaped("m")),
    # the type follows the status
    (401, {"detail": "x"}, shaped("x", "authentication_error")),
    (403, {"detail": "x"}, shaped("x", "permission_error")),
    (404, {"detail": "x"}, shaped("x")),
    (429, {"detail": "x"}, shaped("x", "rate_limit_error")),
    (500, {"detail": "x"}, shaped("x", "upstream_error")),
    # anything else
    (400, {"odd": 1}, shaped('upstream answered 400: {"odd": 1}')),
    (400, {"detail": "", "error": None}, shaped('upstream answered 400: {"detail": "", "error": null}')),
    (400, [], shaped("upstream answered 400: []")),
    (400, "text", shaped('upstream answered 400: "text"')),
])
def test_json_refusals(status: int, body: Any, expected: dict[str, Any]) -> None:
    error = q.refusal(status, JSON, json.dumps(body).encode())
    assert (error.status, error.by) == (status, "upstream")
    assert error.body() == expected
    assert str(error) == error.message == expected["error"]["message"]


@pytest.mark.parametrize(("body", "code"), [
    ({"error": {"code": "c", "type": "t"}}, "c"), ({"error": {"type": "t"}}, "t"),
    ({"detail": "x"}, "upstream_error"), ({"error": {"code": ["odd"]}}, "['odd']"),
])
def test_code_for_the_log(body: Any, code: str) -> None:
    assert q.refusal(400, JSON, json.dumps(body).encode()).code == code


@pytest.mark.parametrize(("content_type", "body", "words"), [
    (HTML, b"<html><title>Just a\n  moment...</title>", ["'Just a moment...'"]),
    ("text/plain", b"  <!DOCTYPE html><TITLE>Blocked</TITLE>", ["'Blocked'"]),
    (HTML, b"no tags at all", []),
    (HTML, b"", []),
])
def test_web_page_is_named_not_shown(content_type: str, body: bytes, words: list[str]) -> None:
    error = q.refusal(403, content_type, body)
    assert (error.status, error.code) == (403, "upstream_web_page")
    assert error.body()["error"]["type"] == "permission_error"
    for word in [*words, "403", "web page", "Cloudflare"]:
        assert word in error.message
    assert "<" not in error.message


@pytest.mark.parametrize(("body", "message"), [
    (b"", "upstream answered 500 without a reason"),
    (b" \n ", "upstream answered 500 without a reason"),
    (b"bad gateway\n", "upstream answered 500: bad gateway"),
    (b"x" * 9999, "upstream answered 500: " + "x" * 500),
    (b'{"detail": ["%b"]}' % (b"x" * 9999), '["' + "x" * 1998),
    (b"\xff\xfe", "upstream answered 500: \ufffd\ufffd"),
    (b"[" * 100_000, "upstream answered 500: " + "[" * 500),
    (b"9" * 10_000, "upstream answered 500: " + "9" * 500),
], ids=short)
def test_text_refusals(body: bytes, message: str) -> None:
    assert q.refusal(500, "text/plain", body).body() == shaped(message, "upstream_error")


@pytest.mark.parametrize("body", [b"", b'{"detail": "moved"}', b"<html>"])
@pytest.mark.parametrize("status", [300, 302, 307, 399])
def test_redirects_are_not_followed(status: int, body: bytes) -> None:
    error = q.refusal(status, HTML, body)
    assert (error.status, error.code) == (502, "upstream_redirect")
    assert error.body()["error"]["type"] == "upstream_error"
    assert str(status) in error.message


@pytest.mark.parametrize(("status", "answered"), [
    (101, 502), (200, 502), (204, 502), (399, 502), (400, 400), (418, 418), (599, 599), (600, 502),
])
def test_status_is_kept_where_it_is_an_error(status: int, answered: int) -> None:
    assert q.refusal(status, JSON, b'{"detail": "x"}').status == answered


@pytest.mark.parametrize(("status", "sent", "seconds", "wanted"), [
    (429, None, 60, "61"), (429, None, 59.5, "60"), (429, None, 0, "1"), (429, "7", 60, "7"),
    (429, None, None, None), (429, None, "60", None), (429, None, True, None), (429, None, -1, None),
    (429, None, 1e9, None), (429, None, [], None),
    (503, None, 60, None), (503, "7", None, "7"), (400, None, 60, None),
])
def test_retry_after(status: int, sent: str | None, seconds: Any, wanted: str | None) -> None:
    body = json.dumps({"error": {**LIMIT, "resets_in_seconds": seconds}}).encode()
    error = q.refusal(status, JSON, body, sent)
    assert error.headers.get("retry-after") == wanted


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_refusal_can_be_sent_on(number: str) -> None:
    error = q.refusal(400, JSON, b'{"error": {"message": "x", "n": %b}}' % number.encode())
    assert error.message == f'upstream answered 400: {{"error": {{"message": "x", "n": {number}}}}}'
    q.json_bytes(error.body())


# -- failures inside a stream -------------------------------------------------


@pytest.mark.parametrize(("error", "status"), [
    ({"code": "rate_limit_exceeded"}, 429), ({"code": "usage_limit_reached"}, 429),
    ({"code": "insufficient_quota"}, 429),
    ({"code": "server_is_overloaded"}, 503), ({"code": "slow_down"}, 503), ({"code": "overloaded"}, 503),
    ({"code": "context_length_exceeded"}, 400), ({"code": "invalid_prompt"}, 400),
    ({"type": "invalid_request_error"}, 400), ({"type": "usage_limit_reached", "code": None}, 429),
    ({"code": "server_error"}, 502), ({"code": "invented", "type": "rate_limit_exceeded"}, 429),
    ({"code": ["odd"], "type": ["odd"]}, 502), ({}, 502), (None, 502), ("text", 502), ([], 502), (5, 502),
])
def test_failure_status(error: Any, status: int) -> None:
    made = q.failure({"type": "response.failed", "response": {"error": error}})
    assert (made.status, made.by) == (status, "upstream")
    assert made.message
    json.dumps(made.body())


@pytest.mark.parametrize(("error", "message"), [
    ({"message": "Too long", "code": "invalid_prompt"}, "Too long"), ({"code": "slow_down"}, "slow_down"),
    ({"message": ["odd"]}, "upstream reported a failure"), (None, "upstream reported a failure"),
])
def test_failure_message(error: Any, message: str) -> None:
    assert q.failure({"type": "error", "error": error}).body()["error"]["message"] == message


def test_failure_keeps_further_fields() -> None:
    made = q.failure({"type": "error", "error": LIMIT})
    assert made.body()["error"] == {**LIMIT, "param": None, "code": None}


def test_failure_says_when_to_try_again() -> None:
    assert q.failure({"type": "error", "error": LIMIT}).headers == {"retry-after": "3601"}


ASKED: dict[str, Object] = {RESPONSES: {"input": "hi"}, CHAT: {"messages": [USER]}}
EACH_PATH = pytest.mark.parametrize("path", ASKED)
CURELESS = [
    "context_length_exceeded", "invalid_prompt", "cyber_policy", "content_policy_violation", "invalid_image",
    "invalid_image_format", "invalid_base64_image", "image_too_large", "image_too_small",
    "image_parse_error", "image_content_policy_violation", "unsupported_image_media_type", "empty_image_file",
]


def error(fields: Object | None = None, **inner: Any) -> Object:
    """Return an `error` event."""
    return {"type": "error", **(fields or {}), "error": {"message": "the reason", **inner}}


NO_STATUS: tuple[Any, ...] = (None, "429", 200, 0, -1, True, 99999, 4.5, [400])
STATUS_ROWS: list[tuple[Object, int]] = [
    # its own status first
    (error({"status_code": 429}, type="usage_limit_reached"), 429),
    (error({"status": 429}, code="server_error"), 429),
    (error({"status": 400}, code="of_tomorrow"), 400),
    (error({"status_code": 403}, code="server_error"), 403),
    (error({"status": 503}, code="invalid_prompt"), 503),
    (error({"status_code": 500}, type="invalid_request_error"), 500),
    (error({"status": 400}, code="rate_limit_exceeded"), 400),
    ({"type": "error", "status": 404, "code": "of_tomorrow", "message": "the reason"}, 404),
    # one that is none says nothing
    *[(error({"status": odd}, code="rate_limit_exceeded"), 429)
      for odd in NO_STATUS],
    *[(error({"status_code": odd}, code="overloaded"), 503) for odd in NO_STATUS],
    # then its code
    *[(error(code=code), 400) for code in CURELESS],
    *[(error(code=code, type="server_error"), 400) for code in CURELESS[:4]],
    (error(code="rate_limit_exceeded", type="invalid_request_error"), 429),
    (error(code="server_is_overloaded", type="service_unavailable_error"), 503),
    # then its type
    (error(code="of_tomorrow", type="invalid_request_error"), 400),
    (error(code=None, type="invalid_request_error"), 400),
    (error(type="usage_limit_reached"), 429),
    (error(code="of_tomorrow", type="of_tomorrow"), 502),
]


@pytest.mark.parametrize(("event", "status"), STATUS_ROWS)
@EACH_PATH
def test_an_error_event_has_the_status_that_it_names(
    shared_bridge: RunningBridge, shared_backend: wire.Backend, path: str, event: Object, status: int
) -> None:
    shared_backend.on("/responses", wire.turn(wire.created(), event))
    reply = ask(shared_bridge, {**MODEL, **ASKED[path]}, path=path)
    assert (reply.status, reply.json["error"]["message"]) == (status, "the reason")
    assert reply.header("x-qoo-bridge-error") == "upstream"


@pytest.mark.parametrize("code", CURELESS)
@EACH_PATH
def test_what_a_repeat_cannot_cure_is_400(
    shared_bridge: RunningBridge, shared_backend: wire.Backend, path: str, code: str
) -> None:
    shared_backend.on("/responses", wire.turn(wire.created(), wire.failed(code, "the reason")))
    reply = ask(shared_bridge, {**MODEL, **ASKED[path]}, path=path)
    assert (reply.status, reply.json["error"]["code"]) == (400, code)
    assert reply.json["error"]["message"] == "the reason"


@EACH_PATH
def test_an_error_and_its_failure_are_one_with_the_errors_status(
    bridge: RunningBridge, backend: wire.Backend, path: str
) -> None:
    events = [error({"status_code": 429}, type="usage_limit_reached"), wire.failed("of_tomorrow", "x")]
    backend.on("/responses", wire.turn(wire.created(), *events))
    assert ask(bridge, {**MODEL, **ASKED[path]}, path=path).status == 429


@pytest.mark.parametrize("headers", [{}, CODEX], ids=["sdk", "codex"])
@EACH_PATH
def test_402_keeps_its_code_and_gets_words(
    bridge: RunningBridge, backend: wire.Backend, path: str, headers: dict[str, str]
) -> None:
    backend.on("/responses", wire.reply_json(402, {"detail": {"code": "deactivated_workspace"}}))
    reply = ask(bridge, {**MODEL, **ASKED[path]}, headers, path=path)
    problem = reply.json["error"]
    assert (reply.status, problem["code"]) == (402, "deactivated_workspace")
    assert "{" not in problem["message"]
    assert "workspace" in problem["message"]


@pytest.mark.parametrize("status", [400, 402, 403])
def test_a_detail_that_is_an_object_keeps_its_own_words(
    bridge: RunningBridge, backend: wire.Backend, status: int
) -> None:
    detail = {"code": "of_tomorrow", "message": "the reason"}
    backend.on("/responses", wire.reply_json(status, {"detail": detail}))
    reply = ask(bridge, {**MODEL, "input": "hi"})
    assert (reply.status, reply.json["error"]["code"]) == (status, "of_tomorrow")
    assert reply.json["error"]["message"] == "the reason"


def test_an_error_of_a_stream_is_logged_with_its_code(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines
) -> None:
    backend.on("/responses", wire.turn(wire.created(), ERROR_429))
    ask(bridge, STREAM)
    assert "error=upstream:usage_limit_reached" in log_lines.ended()[0]


ERROR_429 = error({"status_code": 429}, type="usage_limit_reached")
