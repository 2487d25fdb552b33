"""Room upstream: the pool, broken and hostile peers, TLS, the proxy; then what a client gets of it."""

from __future__ import annotations

import base64
import collections
import contextlib
import errno
import gc
import os
import socket
import ssl
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import wire
from conftest import RunningBridge, Start
from help import REQUEST, NoThreads, ask, dead_port, until

import qoo_bridge as q

OK = wire.reply_json(200, {})
CLOSED = wire.reply_raw(b"", "close")  # without a byte of an answer
RESET = wire.reply_raw(b"", "reset")


class Counted(q.Upstream):
    """An Upstream whose counts a test can read."""

    def __init__(self, connect_timeout: float = 5, idle_timeout: float = 5) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        super().__init__(connect_timeout, idle_timeout, self._tick)

    def _tick(self, name: str) -> None:
        self.counts[name] += 1


@pytest.fixture
def upstream(backend: wire.Backend) -> Iterator[Counted]:
    """Make the opener of sockets; its kept connections are closed at the end."""
    one = Counted()
    yield one
    one.close()


def fetch(upstream: q.Upstream, backend: wire.Listener, timeout: float = 5) -> q.BufferedReply:
    """Make one exchange on the path that tests script."""
    return upstream.fetch("GET", f"{backend.upstream}/x", {}, timeout=timeout)


def connections(backend: wire.Listener) -> list[int]:
    """Tell on which connections the scripted path was asked, in order."""
    return [each.connection for each in backend.requests if each.path == wire.full_path("/x")]


def raw_reply(*fields: str, status: str = "200 OK", body: str = "") -> bytes:
    """Write a reply as it stands on the wire."""
    return ("\r\n".join([f"HTTP/1.1 {status}", *fields]) + "\r\n\r\n" + body).encode("latin-1")


# -- the pool -------------------------------------------------------------------


def test_connection_is_reused(upstream: Counted, backend: wire.Backend) -> None:
    backend.always("/x", OK)
    assert [fetch(upstream, backend).status for _ in range(5)] == [200] * 5
    assert connections(backend) == [1] * 5
    assert upstream.counts == {"upstream_opened": 1, "upstream_reused": 4}


def test_exchanges_at_once_have_connections_of_their_own(upstream: Counted, backend: wire.Backend) -> None:
    together = threading.Barrier(4)

    def reply(exchange: wire.Exchange) -> None:
        together.wait(5)
        exchange.json(200, {})

    backend.always("/x", reply)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            assert [each.status for each in pool.map(lambda _: fetch(upstream, backend), range(4))] == [
                200
            ] * 4
    assert backend.connections == 4
    assert sorted(connections(backend)) == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    "reply",
    [
        raw_reply("Content-Length: 2", "Connection: close", body="{}"),
        raw_reply("Content-Length: 2", "Connection: x, Close", body="{}"),
        raw_reply("Content-Length: 2", body="{}").replace(b"HTTP/1.1", b"HTTP/1.0"),
        raw_reply("Content-Length: 2", body="{}" + raw_reply("Content-Length: 5", body="other").decode()),
        raw_reply(status="204 No Content", body=raw_reply("Content-Length: 5", body="other").decode()),
        raw_reply("Transfer-Encoding: chunked", body="2\r\n{}\r\n0\r\n\r\nmore"),
        pytest.param(
            raw_reply(status="101 Switching Protocols")),
    ],
    ids=[
        "close",
        "close-in-a-list",
        "1.0",
        "more-than-its-length",
        "more-than-nothing",
        "more-than-chunks",
        "101",
    ],
)
def test_connection_is_not_reused_after(reply: bytes, upstream: Counted, backend: wire.Backend) -> None:
    backend.on("/x", wire.reply_raw(reply, "keep"), OK)
    fetch(upstream, backend)
    assert fetch(upstream, backend).body == b"{}"
    assert connections(backend) == [1, 2]


@pytest.mark.parametrize(("limit", "used"), [(60, [1, 1]), (-1, [1, 2])])
def test_kept_connection_grows_old(
    limit: float, used: list[int], upstream: Counted, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.always("/x", OK)
    fetch(upstream, backend)
    monkeypatch.setattr(q, "POOL_IDLE", limit)
    fetch(upstream, backend)
    assert connections(backend) == used


def test_pool_is_bounded(upstream: Counted, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "POOL_SIZE", 2)
    together = threading.Barrier(5)

    def reply(exchange: wire.Exchange) -> None:
        together.wait(5)
        exchange.json(200, {})

    backend.always("/x", reply)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda _: fetch(upstream, backend), range(5)))
    with backend.changed:
        assert backend.changed.wait_for(lambda: backend.open_connections == 2, 5)


def test_closing_the_pool_closes_its_connections(upstream: Counted, backend: wire.Backend) -> None:
    backend.always("/x", OK)
    fetch(upstream, backend)
    upstream.close()
    backend.wait_for_idle()
    fetch(upstream, backend)  # still served, but nothing is kept any more
    backend.wait_for_idle()


def test_connection_is_opened_ahead(upstream: Counted, backend: wire.Backend) -> None:
    backend.always("/x", OK)
    url = f"{backend.upstream}/x"
    target, _ = q.parse_target(url)
    upstream.open_ahead(target)
    settle("open-ahead")
    assert backend.connections == 1
    for _ in range(2):  # one is at hand: the second call opens none
        upstream.open_ahead(target)
        settle("open-ahead")
    first = upstream.request("GET", url, {})  # takes it, and so the next can be opened
    upstream.open_ahead(target)
    settle("open-ahead")
    second = upstream.request("GET", url, {})
    assert connections(backend) == [1, 2]
    assert backend.connections == 2
    for reply in (first, second):
        reply.close()


def settle(name: str) -> None:
    """Wait for the threads of that name."""
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(5)


def test_a_thread_that_cannot_start_does_not_stop_opening_ahead_for_good(
    upstream: Counted, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = NoThreads(monkeypatch, "open-ahead", "_open_ahead")
    target, _ = q.parse_target(f"{backend.upstream}/x")
    upstream.open_ahead(target)
    assert (threads.failed, backend.connections) == (1, 0)
    threads.names = ()
    upstream.open_ahead(target)
    assert until(lambda: upstream.kept() == 1)


def test_failing_to_open_ahead_is_silent(upstream: Counted) -> None:
    upstream.open_ahead(q.Target("http", "127.0.0.1", dead_port()))
    settle("open-ahead")


# -- a connection that was closed ---------------------------------------------------


def test_connection_closed_between_requests_is_replaced(upstream: Counted, backend: wire.Backend) -> None:
    backend.always("/x", OK)
    fetch(upstream, backend)
    backend.cut_connections()
    backend.wait_for_idle()
    assert fetch(upstream, backend).status == 200
    assert connections(backend) == [1, 2]


@pytest.mark.parametrize("stale", [CLOSED, RESET], ids=["close", "reset"])
def test_stale_connection_is_tried_once_more(
    stale: wire.Reply, upstream: Counted, backend: wire.Backend
) -> None:
    backend.on("/x", OK, stale, OK)
    fetch(upstream, backend)
    assert fetch(upstream, backend).status == 200
    assert connections(backend) == [1, 1, 2]


@pytest.mark.parametrize("stale", [CLOSED, RESET], ids=["close", "reset"])
def test_new_connection_is_not_tried_again(
    stale: wire.Reply, upstream: Counted, backend: wire.Backend
) -> None:
    backend.on("/x", OK, stale, stale, OK)
    fetch(upstream, backend)
    with pytest.raises(q.BadUpstream):
        fetch(upstream, backend)
    assert connections(backend) == [1, 1, 2]


@pytest.mark.parametrize(
    ("begun", "then"),
    [
        (b"HTTP/1.1 200 O", "close"),
        pytest.param(
            b"HTTP/1.1 200 O",
            "reset"),
        pytest.param(
            b"HTTP/1.1 103 Early Hints\r\n\r\n",
            "close"),
    ],
)
def test_request_that_upstream_began_to_answer_is_not_sent_again(
    begun: bytes, then: str, upstream: Counted
) -> None:
    with wire.Backend(tls=False) as plain:  # whether TLS shows a reset as such depends on OpenSSL
        plain.on("/x", OK, wire.reply_raw(begun, then), OK)
        fetch(upstream, plain)
        with pytest.raises(q.BadUpstream):
            fetch(upstream, plain)
        assert connections(plain) == [1, 1]


# -- a peer that cannot be reached, or hangs ----------------------------------------


@pytest.fixture
def silent() -> Iterator[int]:
    """Give a port that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield server.getsockname()[1]


@pytest.fixture
def resetting() -> Iterator[int]:
    """Give a port that resets every connection."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            sock, _ = server.accept()
            if sock.recv(1) == b"!":
                break
            wire.reset(sock)
        sock.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield server.getsockname()[1]
    with socket.create_connection(server.getsockname()) as stop:
        stop.sendall(b"!")
    thread.join(5)
    server.close()


def test_refused_connection_is_named(upstream: Counted) -> None:
    with pytest.raises(q.BadUpstream, match=r"^cannot connect to localhost: .*refused"):
        upstream.fetch("GET", f"https://localhost:{dead_port()}/", {})


def test_handshake_that_hangs_times_out(backend: wire.Backend, silent: int) -> None:
    with pytest.raises(q.UpstreamTimeout, match=r"within 0\.1 s"):
        Counted(connect_timeout=0.1).fetch("GET", f"https://127.0.0.1:{silent}/", {})


def test_handshake_that_is_reset_is_named(backend: wire.Backend, resetting: int) -> None:
    with pytest.raises(q.BadUpstream, match="reset"):
        Counted().fetch("GET", f"https://127.0.0.1:{resetting}/", {})


def test_name_that_does_not_exist_is_named(upstream: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", unknown)
        with pytest.raises(q.BadUpstream, match="name or service not known"):
            upstream.fetch("GET", "https://nowhere.test/", {})


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\ncontent-", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_head_that_hangs_times_out(begun: bytes, upstream: Counted, backend: wire.Backend) -> None:
    left = threading.Event()

    def reply(exchange: wire.Exchange) -> None:
        exchange.send(begun)
        if exchange.left(5):
            left.set()

    backend.on("/x", reply)
    with pytest.raises(q.UpstreamTimeout, match=r"within 0\.1 s"):
        fetch(upstream, backend, timeout=0.1)
    assert left.wait(1)


def test_small_body_that_hangs_times_out(upstream: Counted, backend: wire.Backend) -> None:
    left = threading.Event()
    backend.on("/x", wire.hang(b"begun", left=left))
    with pytest.raises(q.UpstreamTimeout, match=r"within 0\.1 s"):
        fetch(upstream, backend, timeout=0.1)
    assert left.wait(1)


def test_body_of_megabytes_arrives(upstream: Counted, backend: wire.Backend) -> None:
    backend.on("/x", OK)
    body = bytes(range(256)) * 16384
    reply = upstream.request("POST", f"{backend.upstream}/x", {}, body)
    assert backend.requests[0].body == body
    reply.close()


def test_answer_to_a_body_that_nobody_reads_is_seen(upstream: Counted) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    answer = raw_reply("Content-Length: 2", status="413 Too Large", body="{}")

    def serve() -> None:
        sock, _ = server.accept()
        with sock:
            sock.sendall(answer)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 20):
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    reply = upstream.request("POST", f"http://127.0.0.1:{server.getsockname()[1]}/", {}, b"x" * 4_000_000)
    assert reply.status == 413
    reply.close()
    thread.join(5)
    server.close()


# -- what is not HTTP, or is a trick --------------------------------------------------

LONG = [f"x-field-{number}: value" for number in range(1000)]


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
        b"\r\n\r\n",
        b"\x15\x03\x01\x00\x02\x02\x28\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 +20 OK\r\n\r\n",
        b"HTTP/1.1 099 Early\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx-a: 1\n\r\n\r\n",
        raw_reply("x-a: 1\r\n folded"),
        raw_reply("x-a: 1\rx-evil: 1"),
        raw_reply("x-a: 1\nx-evil: 1"),
        raw_reply("x-a: 1\0"),
        raw_reply("x-a : 1"),
        raw_reply(": nameless"),
        raw_reply("no colon"),
        raw_reply("x-\xe9: 1"),
        raw_reply(*LONG),
        raw_reply("x-long: " + "a" * 70_000),
        raw_reply("Content-Length: 2", "Transfer-Encoding: chunked", body="{}"),
        raw_reply("Content-Length: 2", "Content-Length: 2", body="{}"),
        raw_reply("Content-Length: 2, 2", body="{}"),
        raw_reply("Content-Length: +2", body="{}"),
        raw_reply("Content-Length: -1", body="{}"),
        raw_reply("Content-Length: 1_0", body="{}"),
        raw_reply("Content-Length: 9999999999999999", body="{}"),
        raw_reply("Content-Length: 5", body="{}"),
        raw_reply("Transfer-Encoding: gzip, chunked", body="0\r\n\r\n"),
        raw_reply("Transfer-Encoding: identity", body="{}"),
        raw_reply("Transfer-Encoding: chunked", body="2\r\n{}\r\n"),
        raw_reply("Transfer-Encoding: chunked", body="-1\r\n{}\r\n0\r\n\r\n"),
        raw_reply("Transfer-Encoding: chunked", body="0x2\r\n{}\r\n0\r\n\r\n"),
        raw_reply("Transfer-Encoding: chunked", body="1\r\n{}\r\n0\r\n\r\n"),
        raw_reply("Transfer-Encoding: chunked", body="3\r\n{}\r\n0\r\n\r\n"),
        raw_reply("Transfer-Encoding: chunked", body="2\n{}\n0\n\n"),
        raw_reply("Transfer-Encoding: chunked", body="2;" + "a" * 5000 + "\r\n{}\r\n0\r\n\r\n"),
        raw_reply("Transfer-Encoding: chunked", body="ffffffffffffffffffff\r\n{}\r\n0\r\n\r\n"),
    ],
    ids=lambda reply: repr(reply[:60]),
)
def test_malformed_reply_is_bad_upstream(reply: bytes, upstream: Counted, backend: wire.Backend) -> None:
    backend.on("/x", wire.reply_raw(reply))
    with pytest.raises(q.BadUpstream) as caught:
        fetch(upstream, backend)
    assert "\n" not in caught.value.message
    assert connections(backend) == [1]


@pytest.mark.parametrize("interim", ["100 Continue", "103 Early Hints", "199 Odd"])
def test_interim_replies_are_skipped(interim: str, upstream: Counted, backend: wire.Backend) -> None:
    final = raw_reply("Content-Length: 2", body="{}")
    backend.on("/x", wire.reply_raw(raw_reply("link: </a>", status=interim) * 3 + final, "keep"), OK)
    assert fetch(upstream, backend).body == b"{}"
    assert fetch(upstream, backend).status == 200
    assert connections(backend) == [1, 1]


def test_endless_interim_replies_end(upstream: Counted, backend: wire.Backend) -> None:
    left = threading.Event()

    def reply(exchange: wire.Exchange) -> None:
        for _ in range(10):
            exchange.send(raw_reply(status="100 Continue"))
            if exchange.left(0.04):
                left.set()
                break

    backend.on("/x", reply)
    with pytest.raises((q.UpstreamTimeout, q.BadUpstream)):
        fetch(upstream, backend, timeout=0.1)
    assert left.wait(5)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_reply_in_small_pieces_is_read(size: int, upstream: Counted, backend: wire.Backend) -> None:
    whole = raw_reply(
        "Transfer-Encoding: chunked", body="5;a=b\r\nhello\r\n1\r\n!\r\n0\r\nx-trailer: 1\r\n\r\n"
    )

    def reply(exchange: wire.Exchange) -> None:
        for at in range(0, len(whole), size):
            exchange.send(whole[at : at + size])
        exchange.complete = True

    backend.on("/x", reply, OK)
    assert fetch(upstream, backend).body == b"hello!"
    fetch(upstream, backend)
    assert connections(backend) == [1, 1]


# -- TLS --------------------------------------------------------------------------------


def test_untrusted_certificate_is_named(backend: wire.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(
        q.BadUpstream, match=r"^cannot connect to localhost: untrusted certificate: \S"
    ):
        fetch(Counted(), backend)
    assert backend.requests == []


def test_certificate_of_another_host_is_not_taken(
    upstream: Counted, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo
    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1", *rest, **more))
        with pytest.raises(q.BadUpstream, match="untrusted certificate"):
            upstream.fetch("GET", f"https://chatgpt.test:{backend.address[1]}/x", {})
    assert backend.requests == []


def test_plain_http_on_a_tls_port_is_named(upstream: Counted) -> None:
    with wire.Backend(tls=False) as plain:
        with pytest.raises(q.BadUpstream, match="cannot connect to localhost"):
            upstream.fetch("GET", plain.upstream.replace("http:", "https:") + "/x", {})
        plain.close()
        plain.errors.clear()  # it met a TLS hello, as it should


def test_old_tls_is_not_spoken(upstream: Counted) -> None:
    assert upstream._tls().minimum_version >= ssl.TLSVersion.TLSv1_2
    assert upstream._tls().verify_mode is ssl.CERT_REQUIRED
    assert upstream._tls().check_hostname


# -- the proxy --------------------------------------------------------------------------


@pytest.fixture
def proxy(backend: wire.Backend) -> Iterator[wire.ConnectProxy]:
    """Run a proxy; a test names it in the environment."""
    with wire.ConnectProxy() as running:
        yield running


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_proxy_of_the_environment_is_used(
    variable: str, proxy: wire.ConnectProxy, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy.url)
    backend.always("/x", OK)
    upstream = Counted()
    assert [fetch(upstream, backend).status for _ in range(3)] == [200] * 3
    asked = proxy.wait_for(1)
    assert [(each.method, each.target) for each in asked] == [("CONNECT", f"localhost:{backend.address[1]}")]
    assert asked[0].header("proxy-authorization") is None
    assert asked[0].header("authorization") is None
    upstream.close()


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("user:pass", "user:pass"),
        ("us%40er:p%3Ass%2F", "us@er:p:ss/"),
        ("user", "user:"),
        ("user:p\u00e9", "user:p\u00e9"),
    ],
)
def test_proxy_gets_its_password(
    given: str, sent: str, proxy: wire.ConnectProxy, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", f"//{given}@"))
    backend.always("/x", OK)
    upstream = Counted()
    assert fetch(upstream, backend).status == 200
    field = proxy.wait_for(1)[0].header("proxy-authorization")
    assert field == "Basic " + base64.b64encode(sent.encode()).decode()
    assert backend.requests[0].header("proxy-authorization") is None
    upstream.close()


def test_proxy_without_its_scheme_is_taken(
    proxy: wire.ConnectProxy, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url[len("http://") :])
    backend.always("/x", OK)
    upstream = Counted()
    assert fetch(upstream, backend).status == 200
    assert len(proxy.requests) == 1
    upstream.close()


@pytest.mark.parametrize("no_proxy", ["localhost", "*", "example.com, localhost", "127.0.0.1,localhost"])
def test_no_proxy_is_honoured(
    no_proxy: str, proxy: wire.ConnectProxy, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    monkeypatch.setenv("NO_PROXY", no_proxy)
    backend.always("/x", OK)
    upstream = Counted()
    assert fetch(upstream, backend).status == 200
    assert proxy.requests == []
    upstream.close()


NO_TUNNEL = {
    "407": wire.reply_raw(raw_reply("Content-Length: 0", status="407 Proxy Authentication Required")),
    "close": CLOSED,
    "reset": RESET,
    "not-http": wire.reply_raw(b"SSH-2.0\r\n\r\n"),
    "no-tls": wire.reply_raw(raw_reply() + b"no TLS"),
}


@pytest.mark.parametrize("name", NO_TUNNEL)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the next test's
def test_proxy_that_does_not_tunnel_is_bad_upstream(
    name: str, proxy: wire.ConnectProxy, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//user:proxy-secret@"))
    monkeypatch.setattr(proxy, "default", NO_TUNNEL[name])
    with pytest.raises(q.BadUpstream, match="cannot connect to") as caught:
        fetch(Counted(), backend)
    assert "proxy-secret" not in caught.value.message
    assert backend.requests == []


@pytest.mark.parametrize("name", ["close", "reset", "not-http"])
def test_failed_tunnel_leaves_no_socket(
    name: str, proxy: wire.ConnectProxy, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaked: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", leaked.append)
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    monkeypatch.setattr(proxy, "default", NO_TUNNEL[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        gc.collect()  # what the tests before have left in cycles, tracebacks with their sockets above all
        leaked.clear()
        with contextlib.suppress(q.BadUpstream):
            fetch(Counted(), backend)
        gc.collect()
    assert leaked == []


@pytest.mark.parametrize(
    "address",
    [
        "socks5://127.0.0.1:1080",
        "https://127.0.0.1:3128",
        "ftp://x",
        "http://",
        "http:///path",
        *(
            pytest.param(
                address)
            for address in ("http://127.0.0.1:port", "http://127.0.0.1:99999", "http://[::1")
        ),
    ],
)
def test_proxy_of_another_kind_is_named(
    address: str, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", address)
    with pytest.raises(q.BadUpstream, match="HTTPS_PROXY"):
        fetch(Counted(), backend)


def test_proxy_that_is_down_is_named(backend: wire.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{dead_port()}")
    with pytest.raises(q.BadUpstream, match="refused"):
        fetch(Counted(), backend)


# -- what the client gets ---------------------------------------------------------------


def refused(reply: wire.RawReply, status: int, by: str) -> str:
    """Hold a reply to the shape of errors; return its message."""
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (status, by)
    assert reply.header("content-type") == "application/json"
    error = reply.json["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    message: str = error["message"]
    assert message
    assert message.isprintable()
    return message


@pytest.mark.parametrize(
    ("reply", "status", "by", "says"),
    [
        (CLOSED, 502, "bridge", "closed the connection without a response"),
        (RESET, 502, "bridge", "localhost"),
        (wire.reply_raw(b"HTTP/1.1 200 O"), 502, "bridge", "within the head"),
        (wire.reply_raw(raw_reply(*LONG)), 502, "bridge", "headers"),
        (wire.reply_raw(raw_reply("x-a: 1\nx-evil: 1")), 502, "bridge", "malformed"),
        (wire.hang(), 504, "bridge", "0.25 s"),
        (wire.reply_raw(raw_reply(status="204 No Content"), "keep"), 502, "upstream", "204"),
        (wire.cloudflare(), 403, "upstream", "Just a moment..."),
        (wire.reply_json(200, {"id": "resp"}), 502, "upstream", "200"),
        (wire.refuse(400, "No such thing"), 400, "upstream", "No such thing"),
        (wire.refuse(503, "Busy"), 503, "upstream", "Busy"),
    ],
    ids=[
        "close",
        "reset",
        "half-a-head",
        "1000-fields",
        "splitting",
        "hang",
        "204",
        "page",
        "json",
        "400",
        "503",
    ],
)
def test_failure_is_answered_with_its_reason(
    reply: wire.Reply, status: int, by: str, says: str, start: Start, backend: wire.Backend
) -> None:
    bridge = start("--idle-timeout", "0.25")
    before_a_byte = reply in (
        CLOSED,
        RESET,
    )  # then a second connection is tried, where the first was a kept one
    backend.on("/responses", reply, *[reply] * before_a_byte)
    assert says in refused(ask(bridge), status, by)
    assert len(backend.wait_for(1, "/responses")) <= 1 + before_a_byte
    assert ask(bridge).status == 200


def page(status: int, title: str) -> wire.Reply:
    """Answer with a page for people."""
    body = f"<html><head><TITLE>\n {title}\n</TITLE></head></html>".encode()
    return lambda exchange: exchange.whole(status, body, [("content-type", "text/html")])


@pytest.mark.parametrize(("status", "expected"), [(200, 502), (403, 403), (500, 500), (530, 530)])
def test_web_page_becomes_an_error_for_people(
    status: int, expected: int, bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on("/responses", page(status, "Access \u2028 denied"))
    message = refused(ask(bridge), expected, "upstream")
    assert "web page" in message
    assert "denied" in message
    assert "<" not in message


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate"])
def test_coding_that_was_not_asked_for_is_an_error(
    coding: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    packed = bytes(range(256))
    headers = [*wire.SSE_HEADERS, ("content-encoding", coding)]
    backend.on("/responses", lambda exchange: exchange.whole(200, packed, headers))
    reply = ask(bridge)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (502, "upstream")
    assert reply.header("content-encoding") is None


def test_coding_that_was_not_asked_for_is_named(bridge: RunningBridge, backend: wire.Backend) -> None:
    headers = [*wire.SSE_HEADERS, ("content-encoding", "gzip")]
    backend.on("/responses", lambda exchange: exchange.whole(200, bytes(range(256)), headers))
    assert "gzip" in refused(ask(bridge), 502, "upstream")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(status: int, bridge: RunningBridge, backend: wire.Backend) -> None:
    with wire.Backend() as evil:
        backend.on("/responses", wire.reply_json(status, {}, [("location", f"{evil.upstream}/responses")]))
        reply = ask(bridge)
        assert "redirects are not followed" in refused(reply, 502, "upstream")
        assert reply.header("location") is None
        assert evil.requests == []


def test_unreachable_upstream_is_502(start: Start, backend: wire.Backend) -> None:
    bridge = start("--upstream", f"https://localhost:{dead_port()}/backend-api/codex")
    assert "refused" in refused(ask(bridge), 502, "bridge")


def test_upstream_that_does_not_shake_hands_is_504(start: Start, backend: wire.Backend, silent: int) -> None:
    bridge = start("--upstream", f"https://localhost:{silent}/backend-api/codex", "--connect-timeout", "0.1")
    assert "0.1 s" in refused(ask(bridge), 504, "bridge")


def test_untrusted_upstream_is_502(
    start: Start, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    message = refused(ask(start()), 502, "bridge")
    assert "untrusted certificate" in message
    assert backend.requests == []


@pytest.mark.parametrize("declared", [5, 100_000])
def test_wrong_content_length_is_a_cut(declared: int, bridge: RunningBridge, backend: wire.Backend) -> None:
    body = b"".join(wire.sse_bytes(event) for event in wire.text_turn("hello"))
    head = raw_reply("content-type: text/event-stream", f"content-length: {declared}")
    backend.on("/responses", wire.reply_raw(head + body[:-10]))
    reply = ask(bridge)
    assert (reply.status, reply.ended) in [(200, "cut"), (502, "length")]  # whether the head went out before
    assert ask(bridge).ended == "last-chunk"


def test_turns_share_few_connections(bridge: RunningBridge, backend: wire.Backend) -> None:
    assert [ask(bridge).status for _ in range(10)] == [200] * 10
    turns = [each.connection for each in backend.wait_for(10, "/responses")]
    assert len(set(turns)) <= 4  # the model list, the routing and the one opened ahead bring theirs
    settle("open-ahead")
    assert backend.connections <= 5


def test_stale_connection_does_not_cost_a_turn(bridge: RunningBridge, backend: wire.Backend) -> None:
    for _ in range(3):
        assert ask(bridge).ended == "last-chunk"
        settle("open-ahead")
        backend.cut_connections()


def test_head_without_a_content_type_is_a_stream(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", wire.turn(*wire.text_turn("hello"), headers=()))
    reply = ask(bridge)
    assert (reply.status, reply.ended) == (200, "last-chunk")


def test_http_1_0_reply_is_a_stream(bridge: RunningBridge, backend: wire.Backend) -> None:
    body = b"".join(wire.sse_bytes(event) for event in wire.text_turn("hello"))
    backend.on(
        "/responses", wire.reply_raw(b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + body)
    )
    reply = ask(bridge)
    assert (reply.status, reply.ended) == (200, "last-chunk")


# -- lines that died silently -------------------------------------------------------


@pytest.mark.parametrize("number", [
    errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH,
    errno.ENETDOWN, errno.EADDRNOTAVAIL,
])
@pytest.mark.parametrize("step", ["send", "read_head"])
def test_a_kept_line_that_breaks_is_replaced_once(
    step: str, number: int, upstream: Counted, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.always("/x", OK)
    fetch(upstream, backend)
    plain = getattr(q.Connection, step)
    broken: list[q.Connection] = []

    def break_once(connection: q.Connection, *given: Any) -> Any:
        if not broken:
            broken.append(connection)
            raise OSError(number, os.strerror(number))
        return plain(connection, *given)

    monkeypatch.setattr(q.Connection, step, break_once)
    assert fetch(upstream, backend).status == 200
    assert (len(broken), backend.connections) == (1, 2)


def test_our_own_timeout_is_not_sent_again(upstream: Counted, backend: wire.Backend) -> None:
    backend.on("/x", OK, wire.hang())
    fetch(upstream, backend)
    with pytest.raises(q.UpstreamTimeout):
        fetch(upstream, backend, timeout=0.1)
    assert len(backend.wait_for(2, "/x")) == len(backend.requests) == 2


@pytest.mark.parametrize("gap", [60, -60])
def test_no_kept_line_is_trusted_after_a_sleep(
    gap: float, upstream: Counted, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.always("/x", OK)
    fetch(upstream, backend)
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + gap)  # the monotonic clock stood still
    fetch(upstream, backend)
    assert connections(backend) == [1, 2]
    fetch(upstream, backend)  # the gap is behind: kept lines are good again
    assert connections(backend) == [1, 2, 2]


def test_a_line_that_upstream_closed_does_not_stay(upstream: Counted, backend: wire.Backend) -> None:
    backend.always("/x", OK)
    fetch(upstream, backend)
    upstream.prune()
    assert upstream.kept() == 1
    backend.cut_connections()
    backend.wait_for_idle()

    def pruned() -> bool:
        upstream.prune()
        return upstream.kept() == 0

    assert until(pruned)


def test_a_dead_first_address_costs_a_moment_and_is_remembered(
    upstream: Counted, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "NEXT_ADDRESS_SECONDS", 0.05)
    backend.always("/x", OK)
    with socket.socket() as full, socket.socket() as first:
        full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        full.bind(("127.0.0.2", backend.address[1]))
        full.listen(0)
        first.connect(full.getsockname())  # its backlog is full: a further connection gets no answer
        fillers = [socket.socket() for _ in range(3)]
        for each in fillers:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, backend.address[1]))
                   for host in ("127.0.0.2", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: list(entries))
        started = time.monotonic()
        fetch(upstream, backend)
        assert time.monotonic() - started < 2  # and not --connect-timeout
        upstream.close()
        begun: list[Any] = []
        plain = q.begin_connect

        def begin(entry: Any) -> socket.socket:
            begun.append(entry[4][0])
            return plain(entry)

        monkeypatch.setattr(q, "begin_connect", begin)
        fetch(upstream, backend)
        assert begun == ["127.0.0.1"]
        for each in fillers:
            each.close()


UNKNOWN_FAMILY = 999  # as IPv6 is where the kernel has none


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.ENETUNREACH, errno.EHOSTUNREACH])
@pytest.mark.parametrize("last", [False, True], ids=["the next works", "none works"])
def test_an_address_that_cannot_be_tried_costs_nothing(
    upstream: Counted, backend: wire.Backend, number: int, last: bool
) -> None:
    backend.always("/x", OK)
    host, port = backend.address
    bad = (UNKNOWN_FAMILY if number == errno.EAFNOSUPPORT else socket.AF_INET, socket.SOCK_STREAM, 6, "")
    entries = [(*bad, ("192.0.2.1", port))] * 2
    if not last:
        entries.append((socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)))
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: list(entries))
        patch.setattr(socket.socket, "connect_ex", no_route(number))
        if last:
            with pytest.raises(q.BadUpstream, match=os.strerror(number).lower()):
                fetch(upstream, backend)
        else:
            fetch(upstream, backend)
    assert time.monotonic() - started < q.NEXT_ADDRESS_SECONDS


def no_route(number: int) -> Callable[[socket.socket, Any], int]:
    """Return a connect_ex that knows no way to 192.0.2.1."""
    real = socket.socket.connect_ex

    def connect_ex(sock: socket.socket, address: Any) -> int:
        return number if address[0] == "192.0.2.1" else real(sock, address)

    return connect_ex


def test_no_address_that_answers_is_one_error(upstream: Counted) -> None:
    with pytest.raises(q.BadUpstream, match="cannot connect to localhost: connection refused"):
        upstream.fetch("GET", f"http://localhost:{dead_port()}/", {})


VARIABLES = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]


def problem(bridge: RunningBridge, status: int = 502) -> str:
    """Ask for a turn that cannot reach upstream; return the reason."""
    reply = ask(bridge, REQUEST)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (status, "bridge")
    return str(reply.json["error"]["message"])


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_dead_proxy_is_named_as_the_proxy(
    start: Start, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    port = dead_port()
    monkeypatch.setenv(variable, f"http://user:secret-word@127.0.0.1:{port}")
    text = problem(start())
    assert f"proxy 127.0.0.1:{port}" in text
    assert variable.lower() in text.lower()
    assert "secret-word" not in text
    assert "refused" in text


def test_a_proxy_whose_name_leads_nowhere_is_named(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def unknown(host: Any, *words: Any, **more: Any) -> Any:
        if host == "proxy.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *words, **more)

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    assert "proxy proxy.invalid:3128" in problem(start())


@pytest.mark.parametrize("reply", [
    wire.reply_json(407, {}), wire.reply_json(403, {}), wire.reply_raw(b"", "close"),
    wire.reply_raw(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n"),
])
def test_a_proxy_that_does_not_tunnel_is_named(
    start: Start, monkeypatch: pytest.MonkeyPatch, reply: wire.Reply
) -> None:
    with wire.ConnectProxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setattr(proxy, "default", reply)
        text = problem(start())
    assert f"proxy {proxy.address[0]}:{proxy.address[1]}" in text


def test_an_upstream_that_is_dead_is_not_called_a_proxy(start: Start, backend: wire.Backend) -> None:
    bridge = start()
    backend.stop_listening()
    assert "proxy" not in problem(bridge).lower()


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks4", "socks"])
@pytest.mark.parametrize("variable", VARIABLES)
def test_a_socks_proxy_is_refused_by_its_variables_name(
    start: Start, monkeypatch: pytest.MonkeyPatch, variable: str, scheme: str
) -> None:
    monkeypatch.setenv(variable, f"{scheme}://user:secret-word@127.0.0.1:1080")
    text = problem(start())
    assert "SOCKS" in text
    assert variable.lower() in text.lower()
    assert "secret-word" not in text


@pytest.mark.parametrize("variable", ["ALL_PROXY", "HTTPS_PROXY"])
def test_any_other_kind_of_proxy_is_refused_by_its_variables_name(
    start: Start, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "ftp://127.0.0.1:21")
    assert variable.lower() in problem(start()).lower()


def test_peer_that_is_gone_at_once_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = socket.socket()  # not connected any more
    monkeypatch.setattr(q, "connect_first", lambda addresses, seconds: gone)
    with pytest.raises(OSError, match="connected"):
        q.Upstream(1, 1)._open_socket(("127.0.0.1", 9), 1)
    assert gone.fileno() == -1


def test_peer_that_resets_before_the_handshake_leaves_no_socket(
    upstream: Counted, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        reset = socket.create_connection(listening.getsockname())
        peer, _ = listening.accept()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
    number = reset.fileno()
    monkeypatch.setattr(q.Upstream, "_open_socket", lambda *_: reset)
    with pytest.raises(q.BadUpstream):
        fetch(upstream, backend)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
