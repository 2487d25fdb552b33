"""The door, end to end: who may come in and what comes in, over real sockets.

Most rows share one bridge (`door`); a row that needs options or other deadlines starts its own.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import logging
import os
import re
import socket
import ssl
import stat
import sys
import threading
import time
import tracemalloc
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import RunningBridge, Start

import qoo_bridge

TURN = {"model": "gpt-5.5", "input": "hi"}
STREAM = {**TURN, "stream": True}
BODY = json.dumps(TURN).encode()
JSON = "Content-Type: application/json"
POST = "POST /v1/responses HTTP/1.1"
HOST = "Host: bridge.lan"
CANARY = b"GET /healthz HTTP/1.1\r\nHost: canary\r\n\r\n"  # stands behind a request that is refused
ORIGIN = "https://page.example"
SECRET = "sk-door-secret-0123456789"
posix = pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")


def head(*lines: str) -> bytes:
    """Write a head of these lines."""
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def until(predicate: Callable[[], bool], timeout: float = 5.0) -> bool:
    """Wait for something that nothing announces; False after `timeout` seconds without it."""
    deadline, pause = time.monotonic() + timeout, threading.Event()
    while not predicate():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.005)
    return True


def begin_turn(client: wire.Client, fields: dict[str, str] | None = None) -> None:
    """Ask for a stream, and read its head and first event."""
    client.request("POST", "/v1/responses", STREAM, fields)
    assert client.read_head().status == 200
    assert client.read_event() is not None


def turns(asked: list[wire.Request]) -> int:
    """Count what cost something upstream: all but what the bridge asks of itself."""
    own = ("/backend-api/wham/accounts/check", "/backend-api/codex/models")
    return sum(each.path not in own for each in asked)


class Lines(logging.Handler):
    """Keep the log's lines, tracebacks too; a line is written after the answer, so a test waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take one line."""
        with self.changed:
            self.lines.append(f"{record.levelname} {self.format(record)}")
            self.changed.notify_all()

    def wait_for(self, text: str) -> str:
        """Return the first line with `text` in it, once it is there."""
        with self.changed:
            assert self.changed.wait_for(lambda: any(text in line for line in self.lines), 5), self.lines
            return next(line for line in self.lines if text in line)


@pytest.fixture
def log_lines() -> Iterator[Lines]:
    """The bridge's log, from debug on."""
    lines, level = Lines(), qoo_bridge.log.level
    qoo_bridge.log.addHandler(lines)
    qoo_bridge.log.setLevel(logging.DEBUG)
    yield lines
    qoo_bridge.log.removeHandler(lines)
    qoo_bridge.log.setLevel(level)


class Hall:
    """The bridges that rows share, one for each set of options, in front of one backend."""

    def __init__(self, backend: wire.Backend, auth_file: Path) -> None:
        self.backend = backend
        self._auth_file = auth_file
        self._bridges: dict[tuple[str, ...], RunningBridge] = {}
        self._seen = 0

    def bridge(self, *options: str) -> RunningBridge:
        """Return the bridge with these options."""
        if options not in self._bridges:
            self._bridges[options] = RunningBridge(self.backend, self._auth_file, *options)
        return self._bridges[options]

    def asked(self) -> list[wire.Request]:
        """Return what came upstream in this row."""
        return self.backend.requests[self._seen:]

    def begin(self) -> None:
        """Begin a row."""
        self._seen = len(self.backend.requests)

    def end(self) -> None:
        """End a row: nobody may have met a fault in it."""
        faults = [fault for each in self._bridges.values() for fault in each.faults]
        for each in self._bridges.values():
            each.faults.clear()
        assert faults == []
        self.backend.check()

    def close(self) -> None:
        """End all bridges."""
        for each in self._bridges.values():
            each.close()


@pytest.fixture(scope="module")
def building(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hall]:
    """The hall, for all rows of this file."""
    with pytest.MonkeyPatch.context() as patch, wire.Backend() as backend:
        patch.setenv("SSL_CERT_FILE", backend.ca_file)
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            patch.delenv(name, raising=False)
        auth_file = tmp_path_factory.mktemp("door") / "auth.json"
        wire.write_auth(auth_file, backend)
        hall = Hall(backend, auth_file)
        yield hall
        hall.close()


@pytest.fixture
def hall(building: Hall) -> Iterator[Hall]:
    """The hall, for one row."""
    building.begin()
    yield building
    building.end()


@pytest.fixture
def door(hall: Hall) -> RunningBridge:
    """The shared bridge with the default options."""
    return hall.bridge()


def refused(bridge: RunningBridge, request: bytes, status: int) -> wire.RawReply:
    """Send a request and another behind it: one answer, JSON, and then the end of the connection."""
    reply = wire.raw(bridge.address, request + CANARY)
    assert (reply.status, reply.header("connection"), reply.rest) == (status, "close", b"")
    assert reply.header("x-qoo-bridge-error") == "bridge"
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    return reply


# -- bytes that are not HTTP/1.1 as it is taken here

def malformed(status: int, name: str, *lines: str, marks: Any = ()) -> Any:
    """Make a row of head lines."""
    return pytest.param(head(*lines), status, id=name, marks=marks)


MALFORMED = [
    malformed(400, "both-lengths", POST, HOST, JSON, "Content-Length: 40", "Transfer-Encoding: chunked"),
    malformed(400, "both-lengths-other-order", POST, HOST, "Transfer-Encoding: chunked", "Content-Length: 0"),
    malformed(400, "two-lengths", POST, HOST, "Content-Length: 0", "Content-Length: 40"),
    malformed(400, "two-equal-lengths", POST, HOST, "Content-Length: 40", "content-length: 40"),
    *(malformed(400, f"length-{declared!r}", POST, HOST, f"Content-Length: {declared}")
      for declared in ("-1", "+5", "1_0", "\xb2", "1e3", "", "0x10", "5, 5", "5 5", "1.0", "9" * 30)),
    malformed(400, "space-before-colon", POST, HOST, "Content-Length : 40"),
    malformed(400, "tab-before-colon", POST, HOST, "Transfer-Encoding\t: chunked"),
    *(malformed(501, f"coding-{coding}", POST, HOST, f"Transfer-Encoding: {coding}")
      for coding in ("gzip", "identity", "gzip, chunked", "chunked, chunked", "xchunked", "chunked;q=1")),
    malformed(400, "two-codings", POST, HOST, "Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
    malformed(400, "coding-vertical-tab", POST, HOST, "Transfer-Encoding: \x0bchunked"),
    malformed(400, "bare-lf-in-head", "GET / HTTP/1.1\nX-A: 1", HOST),
    malformed(400, "bare-lf-in-value", "GET / HTTP/1.1", HOST, "X-A: 1\nX-B: 2"),
    malformed(400, "bare-cr-in-value", "GET / HTTP/1.1", HOST, "X-A: 1\rX-B: 2"),
    malformed(400, "nul-in-value", "GET / HTTP/1.1", HOST, "X-A: 1\x002"),
    malformed(400, "nul-in-name", "GET / HTTP/1.1", HOST, "X\x00A: 1"),
    malformed(400, "nul-in-target", "GET /\x00 HTTP/1.1", HOST),
    malformed(400, "obs-fold", "GET / HTTP/1.1", HOST, "X-A: 1", " 2"),
    malformed(400, "obs-fold-tab", "GET / HTTP/1.1", HOST, "X-A: 1", "\t2"),
    malformed(400, "fold-before-the-fields", "GET / HTTP/1.1", " X-A: 1", HOST),
    malformed(400, "no-colon", "GET / HTTP/1.1", HOST, "X-A"),
    malformed(400, "no-name", "GET / HTTP/1.1", HOST, ": 1"),
    malformed(400, "name-not-ascii", "GET / HTTP/1.1", HOST, "X-\xe9: 1"),
    malformed(431, "100-KB-of-headers", "GET / HTTP/1.1", HOST,
              *[f"X-{n}: {'a' * 1000}" for n in range(100)]),
    malformed(431, "one-header-of-100-KB", "GET / HTTP/1.1", HOST, f"X-A: {'a' * 100_000}"),
    malformed(431, "1000-headers", "GET / HTTP/1.1", HOST, *[f"X-{n}: a" for n in range(1000)]),
    malformed(414, "target-of-10-KB", f"GET /{'a' * 10_000} HTTP/1.1", HOST),
    malformed(414, "query-of-10-KB", f"GET /v1/models?a={'a' * 10_000} HTTP/1.1", HOST),
    malformed(400, "absolute-form", "GET http://bridge.lan/healthz HTTP/1.1", HOST),
    malformed(400, "absolute-form-elsewhere", "POST https://chatgpt.com/v1/responses HTTP/1.1", HOST),
    malformed(400, "double-slash", "GET //chatgpt.com/healthz HTTP/1.1", HOST),
    malformed(400, "asterisk", "OPTIONS * HTTP/1.1", HOST),
    malformed(400, "no-slash", "GET healthz HTTP/1.1", HOST),
    malformed(400, "space-in-target", "GET /healthz x HTTP/1.1", HOST),
    malformed(400, "two-spaces", "GET  /healthz HTTP/1.1", HOST),
    malformed(400, "tab-in-request-line", "GET\t/healthz\tHTTP/1.1", HOST),
    malformed(400, "target-not-ascii", "GET /\xe9 HTTP/1.1", HOST),
    malformed(501, "connect", "CONNECT chatgpt.com:443 HTTP/1.1", "Host: chatgpt.com:443"),
    malformed(501, "trace", "TRACE / HTTP/1.1", HOST),
    malformed(501, "unknown-method", "BREW /v1/responses HTTP/1.1", HOST),
    malformed(400, "lower-case-method", "get /healthz HTTP/1.1", HOST),
    malformed(400, "http-0.9", "GET /healthz"),
    malformed(505, "http-0.9-named", "GET /healthz HTTP/0.9", HOST),
    malformed(505, "http-2.0-preface", "PRI * HTTP/2.0", "", "SM"),
    malformed(505, "http-3", "GET /healthz HTTP/3.0", HOST),
    malformed(400, "http-11", "GET /healthz HTTP/11", HOST),
    malformed(400, "not-http", "GET /healthz ICY/1.1", HOST),
    malformed(400, "no-host", "GET /healthz HTTP/1.1", "X-A: 1"),
    malformed(400, "empty-host", "GET /healthz HTTP/1.1", "Host:"),
    malformed(400, "two-hosts", "GET /healthz HTTP/1.1", HOST, "Host: chatgpt.com"),
    malformed(400, "two-equal-hosts", "GET /healthz HTTP/1.1", HOST, HOST),
    malformed(400, "two-keys", "GET /healthz HTTP/1.1", HOST, "Authorization: Bearer a",
              "Authorization: Bearer b"),
]


@pytest.mark.parametrize(("request_bytes", "status"), MALFORMED)
def test_malformed_request_is_refused_and_closed(
    door: RunningBridge, request_bytes: bytes, status: int
) -> None:
    refused(door, request_bytes, status)


@pytest.mark.parametrize("request_bytes", [
    pytest.param(b"GET /healthz HTTP/1.1\nHost: bridge.lan\n\n", id="bare-lf-throughout"),
    pytest.param(b"GET /healthz\r\n", id="http-0.9"),
    pytest.param(b"\x16\x03\x01\x00\x2f\x01\x00\x00\x2b\x03\x03", id="tls-client-hello"),
])
def test_head_that_cannot_end_is_cut(
    start: Start, monkeypatch: pytest.MonkeyPatch, request_bytes: bytes
) -> None:
    monkeypatch.setattr(qoo_bridge, "HEAD_TIMEOUT", 0.1)
    reply = wire.raw(start().address, request_bytes)
    assert reply.status in (400, 408)
    assert (reply.header("connection"), reply.rest) == ("close", b"")


def test_head_of_bare_lf_is_malformed_not_slow(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qoo_bridge, "HEAD_TIMEOUT", 0.2)
    assert wire.raw(start().address, b"GET /healthz HTTP/1.1\nHost: bridge.lan\n\n").status == 400


@pytest.mark.parametrize("coded", [
    pytest.param(b"zz\r\n", id="size-not-hex"),
    pytest.param(b"-1\r\n", id="size-signed"),
    pytest.param(b"+2\r\n{}\r\n0\r\n\r\n", id="size-plus"),
    pytest.param(b"0x2\r\n{}\r\n0\r\n\r\n", id="size-0x"),
    pytest.param(b" 2\r\n{}\r\n0\r\n\r\n", id="size-space"),
    pytest.param(b"\r\n2\r\n{}\r\n0\r\n\r\n", id="empty-line-first"),
    pytest.param(b"2_0\r\n{}\r\n0\r\n\r\n", id="size-underscore"),
    pytest.param(b"f" * 17 + b"\r\n{}", id="size-of-17-digits"),
    pytest.param(b"2\n{}\n0\n\n", id="bare-lf"),
    pytest.param(b"2\r\n{}0\r\n\r\n", id="no-crlf-behind-a-chunk"),
    pytest.param(b"2\r\n{}xx0\r\n\r\n", id="other-bytes-behind-a-chunk"),
    pytest.param(b"2\r\n{}\n0\r\n\r\n", id="lf-behind-a-chunk"),
    pytest.param(b"2;" + b"a" * 5000 + b"\r\n{}\r\n0\r\n\r\n", id="giant-extension"),
    pytest.param(b"2;a\x00\r\n{}\r\n0\r\n\r\n", id="nul-in-extension"),
])
def test_malformed_chunking_is_refused_and_closed(door: RunningBridge, coded: bytes) -> None:
    refused(door, head(POST, HOST, JSON, "Transfer-Encoding: chunked") + coded, 400)


def test_trailers_without_an_end_are_refused(door: RunningBridge) -> None:
    coded = b"2\r\n{}\r\n0\r\n" + b"X-A: 1\r\n" * 5000
    reply = wire.raw(door.address, head(POST, HOST, JSON, "Transfer-Encoding: chunked") + coded)
    assert (reply.status, reply.header("connection"), reply.rest) == (400, "close", b"")


@pytest.mark.parametrize("coded", [
    pytest.param(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY), id="one-chunk"),
    pytest.param(b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n", id="a-chunk-a-byte"),
    pytest.param(b"%X;name=value\r\n%b\r\n000;last\r\nX-Trailer: 1\r\n\r\n" % (len(BODY), BODY),
                 id="extensions"),
])
def test_chunked_body_is_read_and_the_next_request_with_it(door: RunningBridge, coded: bytes) -> None:
    with wire.Client(door.address) as client:
        client.send(head(POST, HOST, JSON, "Transfer-Encoding: chunked") + coded + CANARY)
        assert client.read_reply().json["status"] == "completed"
        assert client.read_reply().json["status"] == "ok"


def test_chunked_body_of_http_1_0_closes(door: RunningBridge) -> None:
    request = head("POST /v1/responses HTTP/1.0", HOST, JSON, "Connection: keep-alive",
                   "Transfer-Encoding: chunked")
    reply = wire.raw(door.address, request + b"2\r\n{}\r\n0\r\n\r\n")
    assert reply.header("connection") == "close"


@pytest.mark.parametrize(("lines", "status"), [
    (("POST /v1/nothing HTTP/1.1", HOST), 404),
    (("POST /v1/models HTTP/1.1", HOST), 405),
    (("POST /v1/responses HTTP/1.1", HOST, f"Origin: {ORIGIN}"), 403),
    (("POST /v1/responses HTTP/1.1", "Host: evil.example"), 403),
    (("GET /v1/models/none HTTP/1.1", HOST), 404),
    (("DELETE /v1/responses HTTP/1.1", HOST), 405),
])
def test_unread_body_is_never_the_next_request(
    door: RunningBridge, lines: tuple[str, ...], status: int
) -> None:
    refused(door, head(*lines, f"Content-Length: {len(CANARY)}"), status)
    refused(door, head(*lines, "Transfer-Encoding: chunked") + b"%x\r\n" % len(CANARY), status)


@pytest.mark.parametrize("line", ["GET /healthz HTTP/1.1", "GET /v1/models HTTP/1.1",
                                  "OPTIONS /v1/models HTTP/1.1"])
def test_body_of_a_get_is_never_the_next_request(door: RunningBridge, line: str) -> None:
    reply = wire.raw(door.address, head(line, HOST, f"Content-Length: {len(CANARY)}") + CANARY + CANARY)
    assert (reply.status // 100, reply.header("connection"), reply.rest) == (2, "close", b"")


@pytest.mark.parametrize("first", [
    pytest.param(CANARY, id="get"),
    pytest.param(head(POST, HOST, JSON, f"Content-Length: {len(BODY)}") + BODY, id="post"),
    pytest.param(head(POST, HOST, JSON, "Content-Length: 2") + b"{}", id="post-refused"),
    pytest.param(head(POST, HOST, JSON, "Content-Length: 0"), id="post-empty"),
    pytest.param(head(POST, HOST, JSON), id="post-without-length"),
])
def test_pipelined_request_is_answered(door: RunningBridge, first: bytes) -> None:
    with wire.Client(door.address, 0.3) as client:
        client.send(first + b"GET /v1/nothing HTTP/1.1\r\nHost: a\r\n\r\n" + CANARY)
        assert client.read_reply().status in (200, 400)
        assert [client.read_reply().status, client.read_reply().status] == [404, 200]


@pytest.mark.parametrize(("version", "fields", "kept"), [
    ("1.1", (), True),
    ("1.1", ("Connection: close",), False),
    ("1.1", ("Connection: Foo, CLOSE",), False),
    ("1.0", (), False),
    ("1.0", ("Connection: Keep-Alive",), True),
])
def test_connection_is_kept_as_asked(door: RunningBridge, version: str, fields: tuple[str, ...],
                                     kept: bool) -> None:
    with wire.Client(door.address) as client:
        client.send(head(f"GET /healthz HTTP/{version}", HOST, *fields) + CANARY)
        assert client.read_reply().status == 200
        if kept:
            assert client.read_reply().status == 200
        else:
            assert client.reader.to_end() == b""


# -- routes

@pytest.mark.parametrize("form", ["{}", "{}/", "/v1{}", "/v1{}/", "/v1/v1{}", "/v1/v1{}/", "/v1{}?a=b/../c"])
@pytest.mark.parametrize("path", ["/healthz", "/status", "/metrics", "/models", "/models/gpt-5.5",
                                  "/api/codex/usage"])
def test_get_route_takes_any_prefix(door: RunningBridge, form: str, path: str) -> None:
    assert wire.get(door.address, form.format(path)).status == 200


@pytest.mark.parametrize("form", ["{}", "{}/", "/v1{}", "/v1{}/", "/v1/v1{}", "/v1/v1{}/"])
@pytest.mark.parametrize(("path", "body"), [
    ("/responses", TURN),
    ("/chat/completions", {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi"}]}),
])
def test_post_route_takes_any_prefix(door: RunningBridge, form: str, path: str, body: object) -> None:
    assert wire.post(door.address, form.format(path), body).status == 200


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v1/v1/"])
def test_page_is_at_the_root(door: RunningBridge, path: str) -> None:
    reply = wire.get(door.address, path)
    assert (reply.status, reply.header("content-type")) == (200, "text/html; charset=utf-8")


@pytest.mark.parametrize("path", [
    "/nothing", "/v1/v1/v1/responses", "/v2/responses", "/V1/responses", "/responsesx", "/v1responses",
    "/healthz/x", "/v1/chat", "/v1/images", "/v1//healthz", "/%76%31/responses", "/v1/responses%2f",
    "/./healthz", "/v1/../healthz", "/healthz;x", "/.git/config",
])
def test_unknown_path_is_404_in_json(door: RunningBridge, path: str) -> None:
    with wire.Client(door.address) as client:
        for method in ("GET", "POST", "PUT", "HEAD", "OPTIONS"):
            client.request(method, path)
            reply = client.read_reply()
            assert (reply.status, reply.header("content-type")) == (404, "application/json")
            assert method == "HEAD" or reply.json["error"]["code"] == "not_found"


@pytest.mark.parametrize(("method", "path", "allow"), [
    ("POST", "/v1/models", "GET, HEAD, OPTIONS"),
    ("DELETE", "/v1/models/gpt-5.5", "GET, HEAD, OPTIONS"),
    ("POST", "/healthz", "GET, HEAD, OPTIONS"),
    ("PUT", "/status", "GET, HEAD, OPTIONS"),
    ("PATCH", "/", "GET, HEAD, OPTIONS"),
    ("GET", "/v1/chat/completions", "POST, OPTIONS"),
    ("HEAD", "/v1/chat/completions", "POST, OPTIONS"),
    ("GET", "/v1/responses/compact", "POST, OPTIONS"),
    ("GET", "/v1/images/generations", "POST, OPTIONS"),
    ("POST", "/api/codex/usage", "GET, HEAD, OPTIONS"),
    ("PUT", "/v1/responses", "POST, GET, HEAD, OPTIONS"),
])
def test_other_method_is_405_with_allow(door: RunningBridge, method: str, path: str, allow: str) -> None:
    with wire.Client(door.address) as client:
        client.request(method, path)
        reply = client.read_reply()
    assert (reply.status, reply.header("allow")) == (405, allow)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_get_of_responses_without_upgrade_is_405(door: RunningBridge, method: str) -> None:
    with wire.Client(door.address) as client:
        client.request(method, "/v1/responses")
        assert client.read_reply().status == 405


@pytest.mark.parametrize("path", [
    "/healthz", "/", "/status", "/metrics", "/v1/models", "/v1/models?client_version=0.169.0",
    "/v1/models/gpt-5.5",
    "/v1/models/none", "/nothing", "/v1/responses", "/client-config/codex", "/v1/responses/resp_none",
    pytest.param("/api/codex/usage"),
])
def test_head_has_no_body(door: RunningBridge, path: str) -> None:
    with wire.Client(door.address) as client:
        client.request("GET", path)
        got = client.read_reply()
        client.request("HEAD", path)
        reply = client.read_reply()
        assert (reply.status, reply.header("content-type")) == (got.status, got.header("content-type"))
        client.request("GET", "/healthz")
        assert client.read_reply().status == 200


def test_head_opens_no_websocket(start: Start) -> None:
    bridge = start()
    with wire.Client(bridge.address) as client:
        client.send(head("HEAD /v1/responses HTTP/1.1", HOST, "Connection: Upgrade", "Upgrade: websocket",
                         "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="))
        status = client.read_head("HEAD").status
    bridge.server.drain(1)
    bridge.faults.clear()
    assert status == 405


@pytest.mark.parametrize(("path", "allow"), [
    ("/v1/responses", "POST, GET, HEAD, OPTIONS"), ("/v1/models", "GET, HEAD, OPTIONS"),
    ("/v1/models/x", "GET, HEAD, OPTIONS"), ("/healthz", "GET, HEAD, OPTIONS"),
    ("/v1/images/edits", "POST, OPTIONS"),
])
def test_options_names_the_methods(door: RunningBridge, path: str, allow: str) -> None:
    with wire.Client(door.address) as client:
        client.request("OPTIONS", path)
        reply = client.read_reply()
    assert (reply.status, reply.header("allow"), reply.header("content-length")) == (204, allow, None)


# -- Expect

def test_continue_is_sent_before_the_body(door: RunningBridge) -> None:
    with wire.Client(door.address) as client:
        client.send(head(POST, HOST, JSON, "Expect: 100-continue", f"Content-Length: {len(BODY)}"))
        assert client.reader.line() == b"HTTP/1.1 100 Continue"
        assert client.reader.line() == b""
        client.send(BODY)
        assert client.read_reply().status == 200


@pytest.mark.parametrize(("lines", "status"), [
    ((POST, HOST, f"Origin: {ORIGIN}"), 403),
    (("POST /v1/nothing HTTP/1.1", HOST), 404),
    (("POST /v1/models HTTP/1.1", HOST), 405),
    ((POST, HOST, "Content-Length: 1000000000000"), 413),
])
def test_refusal_takes_the_place_of_continue(
    door: RunningBridge, lines: tuple[str, ...], status: int
) -> None:
    length = () if status == 413 else ("Content-Length: 5",)
    reply = wire.raw(door.address, head(*lines, *length, "Expect: 100-continue"))
    assert (reply.status, reply.interim, reply.header("connection"), reply.rest) == (status, [], "close", b"")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_continue_needs_a_body_and_http_1_1(door: RunningBridge, version: str) -> None:
    length = len(BODY) if version == "1.0" else 0
    request = head(f"POST /v1/responses HTTP/{version}", HOST, JSON, "Expect: 100-continue",
                   f"Content-Length: {length}")
    reply = wire.raw(door.address, request + BODY[:length])
    assert (reply.status, reply.interim) == (200 if length else 400, [])


# -- bodies that are not JSON, or not what is wanted

DEEP = 100_000
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
    pytest.param(json.dumps(TURN).encode("utf-16"), id="utf-16"),
    pytest.param(json.dumps(TURN).encode("utf-16-le"), id="utf-16-le"),
    pytest.param(json.dumps(TURN).encode("utf-32"), id="utf-32"),
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
def test_body_that_is_no_request_is_400(door: RunningBridge, body: bytes) -> None:
    reply = wire.post(door.address, "/v1/responses", body)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (400, "bridge")
    assert reply.json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", NOT_A_REQUEST)
def test_body_that_is_no_chat_is_400(door: RunningBridge, body: bytes) -> None:
    chat = body.replace(b'"input": "hi"', b'"messages": [{"role": "user", "content": "hi"}]')
    reply = wire.post(door.address, "/v1/chat/completions", chat)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (400, "bridge")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("value", [None, True, 0, -1.5, "", "\ud800", [], [None], [[]], [5], {},
                                   {"a": {"b": []}}])
def test_no_type_of_any_field_is_a_fault(door: RunningBridge, path: str, value: object) -> None:
    fields = ("input", "messages", "prompt", "tools", "tool_choice", "reasoning", "text", "include",
              "metadata",
              "stream_options", "instructions", "service_tier", "prompt_cache_key", "previous_response_id",
              "response_format", "stop", "n", "client_metadata", "store", "functions", "reasoning_effort")
    base = {"model": "gpt-5.5", "input": "hi", "messages": [{"role": "user", "content": "hi"}],
            "prompt": "hi"}
    statuses = set()
    with wire.Client(door.address) as client:
        for name in fields:
            client.request("POST", path, {**base, name: value})
            statuses.add(client.read_reply().status)
    assert statuses <= {200, 400, 404}


@pytest.mark.parametrize("depth", [300, 700, 900, 950, 970, 990, 3000, 20_000])
def test_no_depth_is_a_fault(door: RunningBridge, depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    items = b'[{"role":"user","content":"hi","x":%b}]' % nested
    body = b'{"model":"gpt-5.5","input":%b,"tools":%b}' % (items, nested)
    assert wire.post(door.address, "/v1/responses", body).status in (200, 400)


def test_lone_surrogate_is_text(door: RunningBridge) -> None:
    reply = wire.post(door.address, "/v1/responses", b'{"model":"gpt-5.5","input":"a\\ud800b"}')
    assert (reply.status, reply.json["output"][0]["content"][0]["text"]) == (200, "a\ud800b")


# -- content codings and sizes

def deflated(body: bytes, bits: int) -> bytes:
    """Compress with zlib: 31 is gzip, 15 zlib, -15 raw."""
    packer = zlib.compressobj(9, zlib.DEFLATED, bits)
    return packer.compress(body) + packer.flush()


def packed(coding: str, body: bytes) -> bytes:
    """Compress a body; skip the test where zstd is not at hand."""
    if "zstd" in coding.lower():
        whole = qoo_bridge.zstd_compress(body)
        if whole is None:
            pytest.skip("no zstd on this host")
        return whole
    return deflated(body, {"deflate": 15, "raw": -15}.get(coding.lower(), 31))


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP", "deflate", "raw", "zstd", " ZStd "])
def test_compressed_body_is_read(door: RunningBridge, coding: str) -> None:
    name = "deflate" if coding == "raw" else coding
    reply = wire.post(door.address, "/v1/responses", packed(coding, BODY), {"Content-Encoding": name})
    assert (reply.status, reply.json["status"]) == (200, "completed")


@pytest.mark.parametrize(("coding", "status"), [
    ("br", 415), ("gzip, gzip", 415), ("zstd, gzip", 415), ("identity, gzip", 415), ("compress", 415),
    ("x", 415),
])
def test_unknown_and_stacked_codings_are_refused(door: RunningBridge, coding: str, status: int) -> None:
    body = gzip.compress(gzip.compress(BODY))
    assert wire.post(door.address, "/v1/responses", body, {"Content-Encoding": coding}).status == status


def test_two_coding_fields_are_refused(door: RunningBridge) -> None:
    refused(door, head(POST, HOST, JSON, "Content-Encoding: gzip", "Content-Encoding: gzip",
                       "Content-Length: 9"), 400)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
@pytest.mark.parametrize("damage", [
    pytest.param(lambda body: b"", id="empty"),
    pytest.param(lambda body: b"\x00", id="one-byte"),
    pytest.param(lambda body: BODY, id="not-compressed"),
    pytest.param(lambda body: body[:-3], id="cut"),
    pytest.param(lambda body: body + b"x", id="more-behind"),
    pytest.param(lambda body: body + body, id="twice"),
])
def test_damaged_compression_is_400(door: RunningBridge, coding: str,
                                    damage: Callable[[bytes], bytes]) -> None:
    body = damage(packed(coding, BODY))
    assert wire.post(door.address, "/v1/responses", body, {"Content-Encoding": coding}).status == 400


def test_zstd_without_a_library_names_the_switch(
    door: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qoo_bridge, "libzstd", lambda: None)
    monkeypatch.setattr(qoo_bridge, "zstd_module", lambda: None)
    reply = wire.post(door.address, "/v1/responses", b"(\xb5/\xfd", {"Content-Encoding": "zstd"})
    assert reply.status == 415
    assert "enable_request_compression" in reply.json["error"]["message"]


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_bomb_is_413_within_bounded_memory(start: Start, coding: str) -> None:
    bridge = start("--max-body", "1M")
    bomb = packed(coding, bytes(16 << 20))
    tracemalloc.start()
    reply = wire.post(bridge.address, "/v1/responses", bomb, {"Content-Encoding": coding})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (reply.status, reply.header("connection")) == (413, "close")
    assert peak < 8 << 20


def test_body_above_the_limit_is_413_unread(start: Start) -> None:
    refused(start("--max-body", "1K"), head(POST, HOST, JSON, "Content-Length: 1025"), 413)


def test_chunked_body_above_the_limit_is_413(start: Start) -> None:
    coded = b"400\r\n" + b" " * 1024 + b"\r\n1\r\n \r\n"
    bridge = start("--max-body", "1K")
    reply = wire.raw(bridge.address, head(POST, HOST, JSON, "Transfer-Encoding: chunked") + coded)
    assert (reply.status, reply.header("connection"), reply.rest) == (413, "close", b"")


@pytest.mark.parametrize("extra", [0, 1])
def test_max_body_is_exact(start: Start, extra: int) -> None:
    body = BODY + b" " * (1024 - len(BODY) + extra)
    assert wire.post(start("--max-body", "1K").address, "/v1/responses",
                     body).status == (413 if extra else 200)


def test_bodies_are_bounded_in_sum(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qoo_bridge, "MAX_BODIES", 100_000)
    bridge = start()
    body, taken, take = BODY + b" " * 60_000, threading.Event(), bridge.bridge.budget.take
    total = []

    def count(size: int) -> None:
        take(size)
        total.append(size)
        if sum(total) >= 60_000:
            taken.set()

    monkeypatch.setattr(bridge.bridge.budget, "take", count)
    with wire.Client(bridge.address) as first:
        first.send(head(POST, HOST, JSON, f"Content-Length: {len(body)}") + body[:60_000])
        assert taken.wait(5)
        reply = wire.post(bridge.address, "/v1/responses", body)
        assert (reply.status, reply.header("retry-after"), reply.header("connection")) == (503, "5", "close")
        first.send(body[60_000:])
        assert first.read_reply().status == 200
    assert wire.post(bridge.address, "/v1/responses", body).status == 200


def test_bodies_expand_one_at_a_time(
    bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    decompress, second, running, most = qoo_bridge.decompress, threading.Event(), [0], [0]

    def watched(body: bytes, coding: str, limit: int) -> bytes:
        running[0] += 1
        most[0] = max(most[0], running[0])
        second.wait(0.05)  # time for another one to come in
        running[0] -= 1
        return decompress(body, coding, limit)

    monkeypatch.setattr(qoo_bridge, "decompress", watched)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(wire.Client(bridge.address)) for _ in range(4)]
        for client in clients:
            client.request("POST", "/v1/responses", gzip.compress(BODY), {"Content-Encoding": "gzip"})
        assert [client.read_reply().status for client in clients] == [200] * 4
    assert most == [1]


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

    monkeypatch.setattr(qoo_bridge, "parse_json", parse)
    backend.on("/responses", wire.refuse(400, "no"))
    gc.disable()  # what only the collector finds, stays
    try:
        assert wire.post(bridge.address, "/v1/responses", TURN).status == 400
        assert until(lambda: seen[0]() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("depth", [900, 960, 975, 980, 985, 990])
def test_deep_nesting_is_no_fault(bridge: RunningBridge, depth: int) -> None:
    body = b'{"model":"gpt-5.5","input":"hi","instructions":%b}' % (b"[" * depth + b"]" * depth)
    assert wire.post(bridge.address, "/v1/responses", body).status == 400


def test_body_counts_until_upstream_has_taken_it(
    start: Start, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qoo_bridge, "MAX_BODIES", 100_000)
    bridge, body = start(), BODY + b" " * 60_000
    backend.on("/responses", wire.hang())
    with wire.Client(bridge.address) as first:
        first.request("POST", "/v1/responses", body)
        backend.wait_for(1, "/responses")
        assert wire.post(bridge.address, "/v1/responses", body).status == 503


# -- deadlines

@pytest.mark.parametrize("sent", [
    pytest.param(b"G", id="one-byte"),
    pytest.param(b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-A: ", id="within-a-field"),
    pytest.param(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r", id="before-the-last-byte"),
])
def test_slow_head_is_cut(start: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(qoo_bridge, "HEAD_TIMEOUT", 0.1)
    reply = wire.raw(start().address, sent)
    assert (reply.status, reply.header("connection"), reply.rest) == (408, "close", b"")


@pytest.mark.parametrize("sent", [
    pytest.param(head(POST, HOST, JSON, "Content-Length: 9000"), id="nothing"),
    pytest.param(head(POST, HOST, JSON, "Content-Length: 9000") + b"{", id="one-byte"),
    pytest.param(head(POST, HOST, JSON, "Transfer-Encoding: chunked") + b"400\r\n{", id="within-a-chunk"),
    pytest.param(head(POST, HOST, JSON, "Transfer-Encoding: chunked") + b"4", id="within-a-chunk-head"),
    pytest.param(head(POST, HOST, JSON, "Transfer-Encoding: chunked") + b"0\r\nX-A",
                 id="within-the-trailers"),
])
def test_slow_body_is_cut(start: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(qoo_bridge, "BODY_STALL", 0.1)
    reply = wire.raw(start().address, sent)
    assert (reply.status, reply.header("connection"), reply.rest) == (408, "close", b"")


def test_dripping_body_is_cut(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qoo_bridge, "BODY_STALL", 0.2)
    drip = threading.Event()
    with wire.Client(start().address) as client:
        client.send(head(POST, HOST, JSON, "Content-Length: 9000"))
        begun = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begun < 3 and not client.left(0.001):
                client.send(b" ")
                drip.wait(0.02)
        assert time.monotonic() - begun < 2


def test_silent_connection_is_closed_without_an_answer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qoo_bridge, "IDLE_CLIENT", 0.1)
    with wire.Client(start().address) as client:
        assert client.reader.to_end() == b""


def test_slow_senders_hold_up_nobody(bridge: RunningBridge) -> None:
    slow = [socket.create_connection(bridge.address, 5) for _ in range(200)]
    try:
        for number, sock in enumerate(slow):
            sock.sendall(b"GET /he" if number % 2 else head(POST, HOST, JSON, "Content-Length: 9") + b"{")
        assert wire.get(bridge.address, "/healthz", timeout=2).status == 200
        assert wire.post(bridge.address, "/v1/responses", TURN, timeout=3).status == 200
    finally:
        for sock in slow:
            sock.close()


# -- max connections

def test_one_connection_too_many_is_503(start: Start, backend: wire.Backend) -> None:
    bridge = start("--max-connections", "2")
    backend.on("/responses", wire.hang(wire.created()), wire.hang(wire.created()))
    with wire.Client(bridge.address) as one, wire.Client(bridge.address) as two:
        for client in (one, two):
            begin_turn(client)
        with wire.Client(bridge.address) as third:
            reply = third.read_reply()  # nothing was sent
            assert (reply.status, reply.header("retry-after"), reply.json["error"]["code"]) == (
                503, "2", "bridge_overloaded")
            assert third.left()
        one.close()
        assert until(lambda: healthy(bridge))


def healthy(bridge: RunningBridge) -> bool:
    """Tell whether the bridge answers."""
    with contextlib.suppress(OSError, wire.PeerLeft):
        return wire.get(bridge.address, "/healthz").status == 200
    return False


def test_oldest_idle_connection_makes_room(start: Start) -> None:
    bridge = start("--max-connections", "2")
    with wire.Client(bridge.address) as old, wire.Client(bridge.address) as young:
        for client in (old, young):
            client.request("GET", "/healthz")
            assert client.read_reply().status == 200
            # Both wait for a request. Only now may the next one come: which thread waits longer decides.
            assert until(lambda: len(bridge.server._waiting) == 2)
        assert wire.get(bridge.address, "/healthz").status == 200
        assert old.left()
        young.request("GET", "/healthz")
        assert young.read_reply().status == 200


# -- browsers

@pytest.fixture
def web(hall: Hall) -> RunningBridge:
    """A bridge that one origin may call."""
    return hall.bridge("--allow-origin", ORIGIN, "--allow-host", "Bridge.Example.com")


@pytest.mark.parametrize("origin", [
    "null", "https://evil.example", "http://page.example", "https://page.example:8443",
    "https://page.example.evil.example",
    "https://PAGE.example", "https://page.example/", f"{ORIGIN}, {ORIGIN}", "http://127.0.0.1:4050", "x",
])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_other_origin_is_refused_without_cors(
    web: RunningBridge, hall: Hall, method: str, origin: str
) -> None:
    with wire.Client(web.address) as client:
        client.request(method, "/v1/responses" if method == "POST" else "/v1/models",
                       TURN if method == "POST" else None,
                       {"Origin": origin, "Access-Control-Request-Method": "POST"})
        reply = client.read_reply()
    assert reply.status == 403
    assert [name for name, _ in reply.headers if name.lower().startswith("access-control")] == []
    assert turns(hall.asked()) == 0


def test_other_origin_is_refused_before_its_body(door: RunningBridge) -> None:
    reply = wire.raw(door.address, head(POST, HOST, JSON, "Origin: null", "Content-Length: 5000"))
    assert (reply.status, reply.header("connection")) == (403, "close")


def test_websocket_of_another_origin_is_refused(web: RunningBridge, hall: Hall) -> None:
    with contextlib.closing(wire.WebSocketClient(web.address)) as client:
        assert client.connect("/v1/responses", {"Origin": "https://evil.example"}).status == 403
    assert turns(hall.asked()) == 0


def cors(reply: wire.RawReply) -> dict[str, str]:
    """Return an answer's CORS fields."""
    return {name.lower(): value for name, value in reply.headers
            if name.lower() == "vary" or name.lower().startswith("access-control")}


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/models", 200), ("POST", "/v1/responses", 200), ("GET", "/nothing", 404),
    ("POST", "/v1/models", 405),
])
def test_allowed_origin_gets_cors(web: RunningBridge, method: str, path: str, status: int) -> None:
    with wire.Client(web.address) as client:
        client.request(method, path, TURN if method == "POST" else None, {"Origin": ORIGIN})
        reply = client.read_reply()
    assert reply.status == status
    assert cors(reply) == {
        "access-control-allow-origin": ORIGIN, "access-control-expose-headers": "*", "vary": "origin"}


def test_preflight_is_answered_without_a_key(hall: Hall) -> None:
    bridge = hall.bridge("--allow-origin", ORIGIN, "--api-key", f"page={SECRET}")
    with wire.Client(bridge.address) as client:
        client.request("OPTIONS", "/v1/responses", headers={
            "Origin": ORIGIN, "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type"})
        reply = client.read_reply()
        client.request("OPTIONS", "/v1/responses", headers={"Origin": ORIGIN})
        assert client.read_reply().status == 401  # no preflight
    assert reply.status == 204
    assert cors(reply) == {
        "access-control-allow-origin": ORIGIN, "vary": "origin", "access-control-max-age": "600",
        "access-control-allow-methods": "GET, POST, OPTIONS",
        "access-control-allow-headers": "authorization, content-type, x-api-key, session-id, thread-id"}


@pytest.mark.parametrize("host", [
    "127.0.0.1", "127.0.0.1:4050", "10.1.2.3:4050", "[::1]", "[fe80::1]:4050", "localhost", "LOCALHOST:4050",
    "nas",
    "nas.local", "nas.lan:4050", "nas.internal", "nas.home.arpa", "nas.local.", "bridge.example.com",
    "BRIDGE.example.com:4050", socket.gethostname(),
])
def test_host_of_this_bridge_passes(web: RunningBridge, host: str) -> None:
    assert wire.get(web.address, "/healthz", {"Host": host}).status == 200


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:4050", "127.0.0.1.evil.example", "nas.local.evil.example",
    "localhost.evil.example",
    "evillan.example", "x.bridge.example.com", "example.com", "nas.lan@evil.example", "nas.lan/evil",
    "nas.lan:x", "a b",
    "[::1", "1.2.3", "0x7f.1", "nas.lan:4050:1", ".", "nas.lan,evil.example", "\xe9.lan", "nas.lan#", ":4050",
])
def test_other_host_is_refused(web: RunningBridge, host: str) -> None:
    statuses = [wire.get(web.address, path, {"Host": host}).status for path in ("/healthz", "/status")]
    assert statuses == [403, 403]


@pytest.mark.parametrize(("fields", "status"), [
    ({"Content-Type": "text/plain"}, 200),
    ({"Content-Type": "application/x-www-form-urlencoded"}, 200),
    ({"Content-Type": "text/plain", "Origin": ORIGIN}, 403),
    ({"Content-Type": "text/plain", "Sec-Fetch-Site": "same-origin"}, 403),
    ({"Content-Type": "application/x-www-form-urlencoded", "Sec-Fetch-Mode": "no-cors"}, 403),
    ({"Content-Type": "multipart/form-data; boundary=application/json", "Sec-Fetch-Dest": "empty"}, 403),
    ({"Content-Type": "text/plain; x=application/json", "Sec-Fetch-Site": "cross-site"}, 403),
    ({"Content-Type": "", "Sec-Fetch-Site": "cross-site"}, 403),
    ({"Content-Type": "application/json", "Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"}, 200),
    ({"Content-Type": "Application/JSON; charset=utf-8", "Origin": ORIGIN}, 200),
])
def test_post_of_a_browser_is_json(
    web: RunningBridge, hall: Hall, fields: dict[str, str], status: int
) -> None:
    assert wire.post(web.address, "/v1/responses", TURN, fields).status == status
    assert turns(hall.asked()) == (status == 200)


# -- keys

BEARER = {"Authorization": f"Bearer {SECRET}"}


@pytest.mark.parametrize("fields", [
    {}, {"Authorization": "Bearer wrong-key-000000"}, {"Authorization": f"Bearer {SECRET}x"},
    {"Authorization": f"Bearer {SECRET[:-1]}"}, {"Authorization": f"Basic {SECRET}"},
    {"Authorization": SECRET},
    {"Authorization": "Bearer"}, {"Authorization": "Bearer \xe9\xff"}, {"x-api-key": "wrong-key-000000"},
    {"x-api-key": ""},
    {"Cookie": f"key={SECRET}"}, {"x-api-key": "laptop"}, {"Authorization": f"Bearer laptop={SECRET}"},
    {"Authorization": f"Bearer {SECRET.upper()}"}, {"api-key": SECRET},
])
@pytest.mark.parametrize(("method", "path"), [
    ("POST", "/v1/responses"), ("GET", "/status"), ("GET", "/nothing"),
])
def test_without_its_key_nobody_comes_in(hall: Hall, method: str, path: str, fields: dict[str, str]) -> None:
    bridge = hall.bridge("--api-key", f"laptop={SECRET}")
    with wire.Client(bridge.address) as client:
        client.request(method, path, TURN if method == "POST" else None, fields)
        reply = client.read_reply()
    assert (reply.status, reply.header("www-authenticate")) == (401, 'Bearer realm="qoo-bridge"')
    assert reply.json["error"]["code"] == "invalid_api_key"
    assert SECRET.encode() not in reply.body
    assert turns(hall.asked()) == 0


@pytest.mark.parametrize("path", ["/v1/models", "/status", "/metrics", "/client-config/codex",
                                  "/api/codex/usage"])
def test_every_endpoint_wants_the_key(hall: Hall, path: str) -> None:
    bridge = hall.bridge("--api-key", f"laptop={SECRET}")
    assert wire.get(bridge.address, path).status == 401
    assert wire.get(bridge.address, path, BEARER).status == 200
    assert [wire.get(bridge.address, public).status for public in ("/healthz", "/")] == [200, 200]


@pytest.mark.parametrize("fields", [
    BEARER, {"authorization": f"bearer {SECRET}"}, {"Authorization": f"BEARER   {SECRET}  "},
    {"x-api-key": SECRET},
    {"X-API-Key": SECRET, "Authorization": "Basic eDp5"},
])
def test_key_opens_and_stays_here(
    start: Start, backend: wire.Backend, log_lines: Lines, fields: dict[str, str]
) -> None:
    bridge = start("--api-key", "other=sk-other-0123456789", "--api-key", f"laptop={SECRET}")
    assert wire.post(bridge.address, "/v1/responses", TURN, fields).status == 200
    assert "127.0.0.1/laptop " in log_lines.wait_for("/v1/responses")
    status = wire.get(bridge.address, "/status", fields)
    assert [row["client"] for row in status.json["clients"]] == ["laptop"]
    seen = repr([each.headers for each in backend.requests]) + repr(log_lines.lines) + repr(bridge.config)
    metrics = wire.get(bridge.address, "/metrics", fields)
    assert SECRET not in seen + status.body.decode() + metrics.body.decode()


def write_keys(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a key file in one step."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text, "utf-8")
    fresh.chmod(mode)
    fresh.replace(path)


def test_key_file_is_read_anew_when_it_changes(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write_keys(path, f"# who may come in\n\n  laptop = {SECRET}\n")
    bridge = start("--api-key-file", str(path), "--api-key", "given=sk-given-0123456789")

    def statuses() -> list[int]:
        keys = (SECRET, "sk-desktop-0123456789", "sk-given-0123456789")
        return [wire.get(bridge.address, "/v1/models", {"x-api-key": key}).status for key in keys]

    assert statuses() == [200, 401, 200]
    write_keys(path, "desktop=sk-desktop-0123456789\n")
    assert statuses() == [401, 200, 200]
    path.unlink()
    assert statuses() == [401, 200, 200]  # the keys read before stay
    write_keys(path, "desktop=short\n")
    assert statuses() == [401, 200, 200]


@posix
@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o644, True), (0o640, True)])
def test_key_file_that_others_can_read_is_warned_of(
    start: Start, tmp_path: Path, log_lines: Lines, mode: int, warned: bool
) -> None:
    path = tmp_path / "keys"
    write_keys(path, f"laptop={SECRET}\n", mode)
    bridge = start("--api-key-file", str(path))
    assert [wire.get(bridge.address, "/v1/models", BEARER).status for _ in range(2)] == [200, 200]
    warnings = [line for line in log_lines.lines if line.startswith("WARNING") and "chmod 600" in line]
    assert len(warnings) == warned


@pytest.mark.parametrize("content", [
    pytest.param(None, id="missing"),
    pytest.param("laptop=short\n", id="key-too-short"),
    pytest.param("laptop=sk-a-key-with-\xe9\n", id="key-not-ascii"),
    pytest.param("", id="empty"),
    pytest.param("# none yet\n", id="comments-only"),
])
def test_key_file_without_keys_locks_the_door(start: Start, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        write_keys(path, content)
    bridge = start("--api-key-file", str(path))
    assert wire.post(bridge.address, "/v1/responses", TURN).status in (401, 500, 503)


def test_emptied_key_file_does_not_open_the_door(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write_keys(path, f"laptop={SECRET}\n")
    bridge = start("--api-key-file", str(path))
    assert wire.get(bridge.address, "/v1/models").status == 401
    path.write_text("")
    assert wire.get(bridge.address, "/v1/models").status != 200


@pytest.mark.parametrize("line", [
    pytest.param(f"{SECRET}", id="no-name"),
    pytest.param(f"={SECRET}", id="empty-name"),
    pytest.param(f"{SECRET}==", id="base64"),
    pytest.param(f"lap top={SECRET}", id="bad-name"),
    pytest.param(f"laptop={SECRET} x", id="space-in-key"),
    pytest.param(f"laptop={SECRET * 20}", id="too-long"),
])
def test_bad_line_of_a_key_file_is_not_quoted(
    start: Start, tmp_path: Path, log_lines: Lines, line: str
) -> None:
    path = tmp_path / "keys"
    write_keys(path, f"# keys\n{line}\n")
    reply = wire.get(start("--api-key-file", str(path)).address, "/v1/models")
    assert reply.status in (401, 500, 503)
    assert SECRET not in reply.body.decode() + repr(log_lines.lines)


# -- limits of a key

LIMITED = ("--api-key", f"laptop={SECRET}", "--api-key", "other=sk-other-0123456789", "--limit", "laptop=1")


def waiting(bridge: RunningBridge, count: int) -> bool:
    """Wait until so many requests of the limited key wait their turn."""
    return until(lambda: len(bridge.bridge.limits._queues.get("laptop", ())) == count)


@pytest.fixture
def gate(backend: wire.Backend) -> Iterator[threading.Event]:
    """Let the first turn upstream run until this is set."""
    opened = threading.Event()
    backend.on("/responses", wire.gated(opened, [wire.created()], [wire.completed()]))
    yield opened
    opened.set()


def test_limited_key_waits_its_turn_and_others_do_not(
    start: Start, backend: wire.Backend, gate: threading.Event
) -> None:
    bridge = start(*LIMITED)
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(wire.Client(bridge.address)) for _ in range(4)]
        for number, client in enumerate(running):
            if number == 0:
                begin_turn(client, BEARER)
                continue
            client.request("POST", "/v1/responses", {**TURN, "input": f"turn {number}"}, BEARER)
            assert waiting(bridge, number)
        other = wire.post(bridge.address, "/v1/responses", TURN, {"x-api-key": "sk-other-0123456789"})
        assert (other.status, wire.get(bridge.address, "/v1/models", BEARER).status) == (200, 200)
        gate.set()
        assert [client.read_events()[-1]["type"] for client in running[:1]] == ["response.completed"]
        assert [client.read_reply().status for client in running[1:]] == [200, 200, 200]
    asked = [json.dumps(json.loads(each.body)["input"]) for each in backend.requests if each.method == "POST"]
    order = [match[0] for match in map(re.compile(r"turn \d").search, asked) if match]
    assert order == ["turn 1", "turn 2", "turn 3"]  # first come, first served


@pytest.mark.parametrize(("name", "value"), [("QUEUE", 0), ("WAIT", 0.05)])
def test_waiting_is_bounded(
    start: Start, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    monkeypatch.setattr(qoo_bridge.KeyQueue, name, value)
    bridge = start(*LIMITED)
    with wire.Client(bridge.address) as client:
        begin_turn(client, BEARER)
        reply = wire.post(bridge.address, "/v1/responses", TURN, BEARER)
        assert (reply.status, reply.header("retry-after"), reply.json["error"]["code"]) == (
            429, "10", "too_many_requests")
        gate.set()
        client.read_events()
    assert until(lambda: wire.post(bridge.address, "/v1/responses", TURN, BEARER).status == 200)


def test_client_that_leaves_gives_up_its_turn(start: Start, gate: threading.Event) -> None:
    bridge = start(*LIMITED)
    with wire.Client(bridge.address) as client, wire.Client(bridge.address) as impatient:
        begin_turn(client, BEARER)
        impatient.request("POST", "/v1/responses", TURN, BEARER)
        assert waiting(bridge, 1)
        impatient.close()
        assert waiting(bridge, 0)
        gate.set()
        client.read_events()
    assert wire.post(bridge.address, "/v1/responses", TURN, BEARER).status == 200


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_place_of_a_client_that_left_is_free(start: Start, gate: threading.Event, leave: str) -> None:
    bridge = start(*LIMITED)
    with wire.Client(bridge.address) as client:
        begin_turn(client, BEARER)
        getattr(client, leave)()
    assert wire.post(bridge.address, "/v1/responses", TURN, BEARER).status == 200


# -- TLS

@pytest.fixture
def secure(hall: Hall) -> RunningBridge:
    """A bridge that serves https with the stand-in's certificate."""
    folder = Path(hall.backend.ca_file).parent
    return hall.bridge("--tls-cert", str(folder / "leaf.pem"), "--tls-key", str(folder / "leaf.key"))


def served(bridge: RunningBridge, hall: Hall) -> str | None:
    """Do a turn over TLS; return the protocol's version."""
    with wire.Client(bridge.address, 3, tls=wire.trusting(hall.backend)) as client:
        begin_turn(client)
        assert client.read_events()[-1]["type"] == "response.completed"
        client.request("GET", "/healthz")
        assert client.read_reply().status == 200
        return client.sock.version() if isinstance(client.sock, ssl.SSLSocket) else None


def test_https_is_served(secure: RunningBridge, hall: Hall) -> None:
    assert served(secure, hall) in ("TLSv1.2", "TLSv1.3")


def client_hello(version: bytes) -> bytes:
    """Write a ClientHello without extensions, for OpenSSL's own client no longer offers TLS 1.1."""
    suites = bytes.fromhex("c00ac009c014c013c02bc02f0035002f")
    hello = version + bytes(32) + b"\0" + len(suites).to_bytes(2, "big") + suites + b"\x01\0"
    message = b"\x01" + len(hello).to_bytes(3, "big") + hello
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message


@pytest.mark.parametrize("version", [b"\x03\x01", b"\x03\x02"], ids=["TLS-1.0", "TLS-1.1"])
def test_tls_before_1_2_is_refused(secure: RunningBridge, hall: Hall, version: bytes) -> None:
    with wire.Client(secure.address) as client:
        client.send(client_hello(version))
        answer = client.reader.to_end()
    assert (answer[:1], answer[-2:]) == (b"\x15", b"\x02\x46")  # alert: fatal, protocol_version
    served(secure, hall)


@pytest.mark.parametrize("begun", [b"", b"\x16", client_hello(b"\x03\x03")[:20]],
                         ids=["silent", "a-byte", "a-part"])
def test_unfinished_handshake_holds_up_nobody(secure: RunningBridge, hall: Hall, begun: bytes) -> None:
    slow = [socket.create_connection(secure.address, 5) for _ in range(50)]
    try:
        for sock in slow:
            sock.sendall(begun)
        served(secure, hall)
    finally:
        for sock in slow:
            sock.close()


def test_unfinished_handshake_is_cut(secure: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qoo_bridge, "HEAD_TIMEOUT", 0.1)
    with wire.Client(secure.address) as client:
        assert client.left()


@pytest.mark.parametrize("sent", [CANARY, b"\x00" * 100, b"\x15\x03\x03\x00\x02\x02\x28", os.urandom(64)],
                         ids=["http", "zeros", "alert", "noise"])
def test_what_is_no_tls_is_closed(secure: RunningBridge, hall: Hall, sent: bytes) -> None:
    with wire.Client(secure.address) as client:
        client.send(sent)
        assert b"HTTP/1.1 200" not in client.reader.to_end()
    served(secure, hall)


# -- networks

def from_address(bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Let the bridge see its next clients at another address."""
    accept = bridge.server.get_request
    monkeypatch.setattr(bridge.server, "get_request", lambda: (accept()[0], (address, 50_000)))


@pytest.mark.parametrize(("options", "address", "status"), [
    *(((), address, 200) for address in (
        "127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.7.7",
        "100.64.0.1",
        "100.127.255.255", "::1", "fe80::1%eth0", "fc00::1", "fd12:3456::1", "::ffff:192.168.1.1",
        "::ffff:127.0.0.1")),
    *(((), address, 403) for address in (
        "8.8.8.8", "172.32.0.1", "172.15.255.255", "192.169.0.1", "100.128.0.1", "100.63.255.255", "11.0.0.1",
        "0.0.0.0",
        "255.255.255.255", "2001:db8::1", "2606:4700::1111", "::", "::ffff:8.8.8.8", "::8.8.8.8",
        "64:ff9b::7f00:1",
        "2002:7f00:1::", "not an address", "")),
    (("--allow", "203.0.113.0/24"), "203.0.113.9", 200),
    (("--allow", "203.0.113.0/24"), "::ffff:203.0.113.9", 200),
    (("--allow", "203.0.113.0/24"), "192.168.1.1", 403),
    (("--allow", "203.0.113.0/24"), "127.0.0.1", 200),
    (("--allow", "2001:db8::/32"), "2001:db8::7", 200),
    (("--allow", "2001:db8::/32"), "203.0.113.9", 403),
    (("--allow", "10.0.0.0/8", "--allow", "203.0.113.9"), "203.0.113.9", 200),
    (("--allow", "10.0.0.0/8", "--allow", "203.0.113.9"), "203.0.113.8", 403),
])
def test_networks_outside_are_refused(
    hall: Hall, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], address: str, status: int
) -> None:
    bridge = hall.bridge(*options)
    from_address(bridge, monkeypatch, address)
    with wire.Client(bridge.address) as client:
        if status == 200:
            client.request("GET", "/healthz")
        reply = client.read_reply()  # a refusal comes before anything was sent
        assert reply.status == status
        if status == 403:
            assert (reply.header("connection"), reply.json["error"]["code"]) == ("close", "forbidden")
            assert client.left()


def test_refused_network_costs_no_connection(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = start("--max-connections", "1")
    with monkeypatch.context() as patch:
        from_address(bridge, patch, "8.8.8.8")
        for _ in range(3):
            with wire.Client(bridge.address) as client:
                assert client.read_reply().status == 403
    assert wire.get(bridge.address, "/healthz").status == 200


def has_ipv6() -> bool:
    """Tell whether this host's loopback has IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on loopback")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_double_colon_takes_both_families(start: Start, address: str) -> None:
    bridge = start("--host", "::")
    assert wire.get((address, bridge.address[1]), "/healthz", {"Host": "localhost"}).status == 200


# -- the upstream target

FIXED = re.compile(
    r"POST /backend-api/codex/(responses|responses/compact|images/generations)"
    r"|GET /backend-api/codex/models\?client_version=[0-9A-Za-z.-]{1,40}"
    r"|GET /backend-api/wham/(accounts/check|usage)")


@pytest.mark.parametrize("path", [
    "/v1/responses", "/v1/responses?x=/../../y&upstream=https://evil.example", "/v1/responses/../accounts",
    "/v1/responses/..%2f..%2faccounts", "/v1/%2e%2e/responses", "/v1/responses%3fx=1", "/v1/responses%00",
    "/v1/responses;/../x", "/v1/responses/compact?a=b", "/v1/responses/compact/../../x", "/v1\\..\\responses",
    "/v1/images/generations?host=evil.example", "/v1/@evil.example/responses",
    "/v1/responses/https://evil.example",
])
def test_request_cannot_choose_the_upstream_target_by_post(hall: Hall, path: str) -> None:
    fields = {"X-Forwarded-Host": "evil.example", "X-Original-URL": "/evil", "X-Forwarded-Proto": "http",
              "X-Rewrite-URL": "/evil", "Forwarded": "host=evil.example", "Host": "evil.lan"}
    body = {**TURN, "base_url": "https://evil.example", "path": "/evil"}
    wire.post(hall.bridge().address, path, body, fields)
    asked = [f"{each.method} {each.target}" for each in hall.asked()]
    assert [each for each in asked if not FIXED.fullmatch(each)] == []
    assert {each.header("host") for each in hall.asked()} <= {f"localhost:{hall.backend.address[1]}"}


@pytest.mark.parametrize("path", [
    "/v1/models?client_version=0.1.0", "/v1/models?client_version=../../x",
    "/v1/models?client_version=0.1.0%26a=b",
    "/v1/models?client_version=0.1.0%2f..%2f..", "/v1/models?client_version=0.1.0%0d%0aX-A:1",
    "/v1/models/..%2f..%2fx",
    "/v1/models/../x", "/v1/models?client_version=0.1.0&client_version=/x", "/api/codex/usage?x=/../y",
    "/backend-api/wham/usage?x=y", "/backend-api/wham/accounts/check", "/backend-api/codex/models",
    "/v1/models%23",
])
def test_request_cannot_choose_the_upstream_target_by_get(hall: Hall, path: str) -> None:
    wire.get(hall.bridge().address, path)
    asked = [f"{each.method} {each.target}" for each in hall.asked()]
    assert [each for each in asked if not FIXED.fullmatch(each)] == []


# -- secrets

MARK = "MARKED-SECRET-7f3a"


def marked_requests() -> list[bytes]:
    """Return requests that meet every kind of answer, with secrets wherever a client may put one."""
    fields = (f"Authorization: Bearer {MARK}-bearer", f"x-api-key: {MARK}-key", f"Cookie: sid={MARK}-cookie",
              f"User-Agent: agent-{MARK}", f"session-id: {MARK}-session",
              f"Proxy-Authorization: Basic {MARK}")
    body = json.dumps({**TURN, "input": f"{MARK}-body", "instructions": MARK,
                       "metadata": {"a": MARK}}).encode()
    chat = json.dumps({"model": "gpt-5.5",
                       "messages": [{"role": "user", "content": f"{MARK}-chat"}]}).encode()
    broken = [body[:-1], body[:40] + b"\xff", b'"' + MARK.encode(), b"[" * DEEP,
              b'{"model":5,"input":"%b"}' % MARK.encode()]
    whole = [(path, payload) for path in ("/v1/responses", "/v1/nothing", "/v1/models",
                                          "/v1/chat/completions")
             for payload in (body, chat, *broken)]
    posts = [head(f"POST {path}?key={MARK} HTTP/1.1", HOST, JSON, *fields,
                  f"Content-Length: {len(payload)}") + payload
             for path, payload in whole]
    return [
        *posts,
        head("GET /status HTTP/1.1", HOST, *fields), head("GET /v1/models HTTP/1.1", HOST, *fields),
        head(POST, HOST, *fields, f"Origin: https://{MARK}.example", "Content-Length: 0"),
        head(POST, HOST, *fields, "Content-Encoding: gzip", f"Content-Length: {len(body)}") + body,
        head(POST, HOST, *fields, "Transfer-Encoding: chunked") + MARK.encode() + b"\r\n",
        head(POST, HOST, *fields, f"Bad Line {MARK}"), head(POST, *fields),
        head("GET / HTTP/1.1", HOST, *fields, *fields),
    ]


UPSTREAM_ENDS = [
    pytest.param(None, id="well"),
    pytest.param(wire.cut(wire.created()), id="cut"),
    pytest.param(wire.reply_raw(b"nonsense"), id="nonsense"),
    pytest.param(wire.refuse(400, "no"), id="refused"),
    pytest.param(wire.refuse(401, "Could not validate credentials"), id="401"),
    pytest.param(wire.cloudflare(), id="page"),
]


@pytest.mark.parametrize("ending", UPSTREAM_ENDS)
@pytest.mark.parametrize("locked", [False, True])
def test_no_secret_in_log_page_or_answer(
    start: Start, backend: wire.Backend, tmp_path: Path, log_lines: Lines, ending: wire.Reply | None,
    locked: bool
) -> None:
    auth_file = tmp_path / "auth.json"
    wire.write_auth(auth_file, backend, OPENAI_API_KEY=f"{MARK}-openai", agent_identity={"x": MARK})
    bridge = start(*(("--api-key", f"laptop={SECRET}") if locked else ()))
    if ending is not None:
        backend.always("/responses", ending)
    answers = []
    for request in marked_requests():
        with contextlib.suppress(wire.PeerLeft), wire.Client(bridge.address) as client:
            client.send(request)
            reply = client.read_reply()
            answers.append(repr(reply.headers).encode())
            if reply.status != 200:  # else it is the stand-in's echo
                answers.append(reply.body)
    own, pages = BEARER if locked else {}, ("/status", "/metrics", "/", "/client-config/curl")
    answers += [wire.get(bridge.address, path, own).body for path in pages]
    told = b"\n".join(answers).decode("utf-8", "replace") + "\n".join(log_lines.lines)
    secrets = [MARK, SECRET, "someone@example.com", *backend.tokens.values(), "secret-of-the-host"]
    assert [secret for secret in secrets if secret in told] == []


def test_failure_of_upstream_within_a_chat_stream_is_not_logged_in_full(
    start: Start, backend: wire.Backend, log_lines: Lines
) -> None:
    first = wire.text_turn("hello")[:5]
    backend.on("/responses", wire.turn(*first, wire.failed("invalid_prompt", f"refused: {MARK}")))
    chat = {"model": "gpt-5.5", "messages": [{"role": "user", "content": MARK}], "stream": True}
    wire.post(start().address, "/v1/chat/completions", chat)
    log_lines.wait_for("/v1/chat/completions")
    assert MARK not in repr(log_lines.lines)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
def test_failed_turn_gives_its_connection_back(
    start: Start, backend: wire.Backend, log_lines: Lines, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    left: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: left.append(found.exc_value))
    backend.on("/responses", wire.turn(wire.created(), wire.failed("server_error", "x")))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        body = {**TURN, "messages": [{"role": "user", "content": "hi"}]}
        assert wire.post(start().address, path, body).status == 502
        log_lines.wait_for("status=502")
        assert left == []


def test_what_holds_a_token_hides_it_in_its_repr(start: Start, backend: wire.Backend) -> None:
    bridge = start("--api-key", f"laptop={SECRET}")
    held = bridge.bridge.credentials.bearer()
    shown = repr(bridge.config) + repr(held) + repr(bridge.bridge.key_ring.keys()) + str(held)
    assert [each for each in (SECRET, *backend.tokens.values()) if each in shown] == []


# -- bridge.log

@pytest.fixture
def logging_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Path]]:
    """Set up the bridge's own log in a folder of the test's, and take it down again."""
    path, before = tmp_path / "bridge.log", list(qoo_bridge.log.handlers)
    level, propagate = qoo_bridge.log.level, qoo_bridge.log.propagate
    for name in ("logThreads", "logProcesses", "logMultiprocessing"):
        monkeypatch.setattr(logging, name, getattr(logging, name))  # put back when the row ends

    def set_up() -> Path:
        words = qoo_bridge.build_parser().parse_intermixed_args(["--log-file", str(path)])
        qoo_bridge.set_up_log(qoo_bridge.load_config(vars(words), {}))
        return path

    yield set_up
    for handler in [each for each in qoo_bridge.log.handlers if each not in before]:
        qoo_bridge.log.removeHandler(handler)
        handler.close()
    qoo_bridge.log.setLevel(level)
    qoo_bridge.log.propagate = propagate


@posix
def test_log_is_private_and_rotated(logging_to: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qoo_bridge, "LOG_SIZE", 2000)
    mask = os.umask(0)
    try:
        path = logging_to()
        for number in range(100):
            qoo_bridge.log.info("line %d %s", number, "x" * 50)
    finally:
        os.umask(mask)
    files = sorted(path.parent.glob("bridge.log*"))
    assert [each.name for each in files] == ["bridge.log", "bridge.log.1"]
    assert [stat.S_IMODE(each.stat().st_mode) for each in files] == [0o600, 0o600]
    assert all(each.stat().st_size <= 2200 for each in files)  # the last line may go beyond
    assert "line 99 " in path.read_text("utf-8")


@posix
def test_log_that_others_could_read_is_closed_to_them(logging_to: Callable[[], Path], tmp_path: Path) -> None:
    (tmp_path / "bridge.log").write_text("older\n")
    (tmp_path / "bridge.log").chmod(0o644)
    assert stat.S_IMODE(logging_to().stat().st_mode) == 0o600


def test_log_holds_a_line_a_request_and_no_secret(start: Start, logging_to: Callable[[], Path]) -> None:
    path = logging_to()
    bridge = start("--api-key", f"laptop={SECRET}")
    for fields in (BEARER, {"x-api-key": MARK}):
        wire.post(bridge.address, "/v1/responses", {**TURN, "input": MARK}, fields)
    assert until(lambda: path.read_text("utf-8").count("/v1/responses") == 2)
    text = path.read_text("utf-8")
    assert "/laptop " in text
    assert (SECRET in text, MARK in text) == (False, False)
