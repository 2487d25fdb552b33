"""Room server: connections, many at once, what they leave behind, and how it ends.

`python tests/test_server.py` runs 500 paced streams and a soak of 10,000 requests, and prints what they cost.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import os
import selectors
import signal
import socket
import ssl
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import LogLines, Run, RunningBridge, SharedBridges, Start
from help import (
    BODY,
    CANARY,
    FIRST,
    HOST,
    JSON_TYPE,
    KEY,
    LAST,
    POST,
    REQUEST,
    SECONDS,
    STREAM,
    NoThreads,
    ask,
    asking,
    bearer,
    begin_turn,
    from_address,
    head,
    posix,
    raw_request,
    refused,
    until,
)

import qoo_bridge as q

LATER_KEY = "a-key-of-the-test-2"  # as long as KEY


# -- many clients ----------------------------------------------------------------


class PausedTurns:
    """Answer each request with a turn of its own, which stays open after its first event."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.sent: dict[str, list[wire.Event]] = {}

    def reply(self, exchange: wire.Exchange) -> None:
        """Answer with a text that tells the turns apart."""
        text = wire.echo(exchange.request.json)
        self.sent[text] = turn = wire.text_turn(text, empty_output=False)
        exchange.head(200, wire.TURN_HEADERS)
        exchange.event(turn[0])
        if not self.gate.wait(SECONDS):
            raise AssertionError("the test never opened the gate")
        exchange.events(*turn[1:])
        exchange.finish()


class Streams:
    """Streams at once, read by one selector, each kept by the text that it asks for."""

    def __init__(self, address: wire.Address, texts: Iterable[str]) -> None:
        self.clients = {text: wire.Client(address, SECONDS) for text in texts}
        for text, client in self.clients.items():
            client.request("POST", "/v1/responses", {**STREAM, "input": text})

    def read_until(self, mark: bytes) -> None:
        """Read all streams until each has this in it."""
        with selectors.DefaultSelector() as selector:
            for client in self.clients.values():
                if mark not in client.reader.buffer:
                    client.sock.setblocking(False)
                    selector.register(client.sock, selectors.EVENT_READ, client)
            while selector.get_map():
                ready = selector.select(SECONDS)
                assert ready, f"{len(selector.get_map())} streams are silent"
                for client in (key.data for key, _ in ready):
                    assert client.reader.fill(), f"ended after {bytes(client.reader.buffer)!r}"
                    if mark in client.reader.buffer:
                        selector.unregister(client.sock)
                        client.sock.settimeout(SECONDS)

    def read_first(self) -> None:
        """Read until each has its first event."""
        self.read_until(b"response.created")

    def are_whole(self, paused_turns: PausedTurns) -> bool:
        """Read all to their ends; tell whether each got its own turn, nothing lost and nothing added."""
        self.read_until(b"\r\n0\r\n\r\n")
        replies = {text: client.read_reply() for text, client in self.clients.items()}
        assert {(reply.status, reply.ended) for reply in replies.values()} == {(200, "last-chunk")}
        return {text: wire.sse(reply.body) for text, reply in replies.items()} == {
            text: paused_turns.sent[text] for text in replies}

    def close(self) -> None:
        """Leave."""
        for client in self.clients.values():
            client.close()


OpenStreams = Callable[..., Streams]


@pytest.fixture
def open_streams() -> Iterator[OpenStreams]:
    """Open many streams through a bridge."""
    with contextlib.ExitStack() as stack:
        names = itertools.count()

        def open_some(address: wire.Address, size: int) -> Streams:
            streams = Streams(address, [f"stream {next(names)}" for _ in range(size)])
            stack.callback(streams.close)
            return streams

        yield open_some


@pytest.fixture
def paused_turns(backend: wire.Backend) -> Iterator[PausedTurns]:
    """Have the stand-in answer each good request with a turn that waits."""
    waiting = PausedTurns()
    backend.always("/responses", wire.checked(backend, waiting.reply))
    yield waiting
    waiting.gate.set()


# -- many at once ----------------------------------------------------------------------


def test_many_streams_lose_nothing_and_one_too_many_is_503(
    start: Start, paused_turns: PausedTurns, open_streams: OpenStreams
) -> None:
    bridge = start("--max-connections", "120")
    streams = open_streams(bridge.address, 120)
    streams.read_first()
    with wire.Client(bridge.address) as late:
        reply = late.read_reply()  # it is told before it has asked
        assert (reply.status, reply.header("retry-after")) == (503, "2")
        assert reply.json["error"]["code"] == "bridge_overloaded"
        assert late.left()
    paused_turns.gate.set()
    assert streams.are_whole(paused_turns)
    assert wire.post(bridge.address, "/v1/responses", STREAM).status == 200  # an idle connection makes room


def test_token_that_turns_invalid_under_load_costs_one_refresh(
    bridge: RunningBridge, backend: wire.Backend, paused_turns: PausedTurns, open_streams: OpenStreams
) -> None:
    together = threading.Barrier(50)

    def expired(exchange: wire.Exchange) -> None:
        together.wait(SECONDS)
        exchange.json(401, {"detail": "Could not validate credentials"})

    running = open_streams(bridge.address, 50)
    running.read_first()
    backend.revoke()
    backend.on("/responses", *[expired] * 50)
    begun = open_streams(bridge.address, 50)
    begun.read_first()
    paused_turns.gate.set()
    assert running.are_whole(paused_turns)
    assert begun.are_whole(paused_turns)
    assert backend.refreshes == 1


# -- what stays behind -------------------------------------------------------------------


def descriptors(process: int | str = "self") -> int:
    """Count the open files of a process; 0 where the system cannot tell."""
    folder = Path(f"/proc/{process}/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


SOAK: list[tuple[str, dict[str, Any]]] = [
    ("/v1/responses", STREAM),
    ("/v1/responses", {**STREAM, "stream": False}),
    ("/v1/chat/completions", {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/nothing", {}),
]


def soak(address: wire.Address, rounds: int) -> None:
    """Send every kind of request, in turn on a kept connection and on a new one."""
    for _ in range(rounds):
        with wire.Client(address, SECONDS) as kept:
            for path, body in SOAK:
                kept.request("POST", path, body)
                assert kept.read_reply().status in (200, 404)
                assert wire.post(address, path, body).status in (200, 404)


def test_many_requests_leave_nothing_behind(
    start: Start, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "STORE_SIZE", 20_000)  # bytes: full before the soak begins
    monkeypatch.setattr(q.log, "propagate", False)  # pytest keeps each line
    bridge = start()

    def threads() -> int:
        return threading.active_count() - backend.open_connections  # the stand-in has one for each

    def files() -> int:
        return descriptors() - 2 * backend.open_connections  # both ends are in this process

    def blocks() -> int:
        with backend.changed:
            backend.requests.clear()
        gc.collect()
        return sys.getallocatedblocks()

    soak(bridge.address, 12)
    before = {count: count() for count in (threads, files, blocks)}
    soak(bridge.address, 38)  # 304 requests
    assert until(lambda: threads() <= before[threads])
    assert until(lambda: files() <= before[files])
    assert until(lambda: blocks() <= before[blocks] + 300)  # less than one a request
    assert backend.open_connections <= 6


# -- start and stop ----------------------------------------------------------------------


def begin_turns(address: wire.Address, stop: threading.Event) -> list[str]:
    """Ask for turns, each on a new connection, until told to stop; tell what became of them."""
    ends = []
    while not stop.is_set():
        try:
            with wire.Client(address) as client:
                client.request("GET", "/v1/models")
                reply = client.read_reply()
            ends.append(f"{reply.status} {reply.ended}")
        except (ConnectionError, wire.PeerLeft):
            ends.append("refused")
    return ends


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_under_load_lets_running_streams_end(
    run: Run, paused_turns: PausedTurns, open_streams: OpenStreams, number: signal.Signals
) -> None:
    running, stop = run(), threading.Event()
    streams = open_streams(running.address, 20)
    streams.read_first()
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        stack.callback(stop.set)  # the pool waits for its threads, also where something fails
        idle = [stack.enter_context(wire.Client(running.address)) for _ in range(3)]
        for client in idle:
            client.request("GET", "/healthz")
            assert client.read_reply().status == 200
        asking = [pool.submit(begin_turns, running.address, stop) for _ in range(2)]
        running.process.send_signal(number)
        assert all(client.left() for client in idle)
        with pytest.raises(ConnectionRefusedError):
            for _ in range(1000):
                socket.create_connection(running.address, 1).close()
        stop.set()
        ends = {end for future in asking for end in future.result()}
    assert ends <= {"200 length", "refused"}
    assert running.process.poll() is None
    paused_turns.gate.set()
    assert streams.are_whole(paused_turns)
    assert all(client.left() for client in streams.clients.values())
    assert running.wait() == 0
    assert not any("Traceback" in line or "ERROR" in line for line in running.lines)


@posix
def test_stop_at_rest_is_quick(run: Run) -> None:
    running = run()
    assert running.start_seconds < 3  # tests/bench.py measures it; this only sees a hang
    assert "signed in" in running.greeting
    assert "only this host can use it" in running.greeting
    begun = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 0
    assert time.monotonic() - begun < 3


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP to send")
def test_hang_up_rereads_keys_and_sign_in(run: Run, backend: wire.Backend, tmp_path: Path) -> None:
    key_file, auth_file = tmp_path / "keys", tmp_path / "auth.json"
    key_file.write_text(f"laptop={KEY}\n", encoding="utf-8")
    key_file.chmod(0o600)
    auth_file.write_text(json.dumps(wire.auth_json(backend)) + " " * 100, encoding="utf-8")
    auth_file.chmod(0o600)
    running = run("--api-key-file", str(key_file))
    assert ask(running, headers=bearer(KEY)).status == 200
    rewrite(key_file, lambda text: text.replace(KEY, LATER_KEY))
    old = backend.access_token
    tokens = backend.rotate()
    rewrite(auth_file, lambda text: text.replace(old, tokens["access_token"]))
    statuses = [ask(running, headers=bearer(key)).status for key in (KEY, LATER_KEY)]
    assert statuses == [200, 401]  # it cannot know yet
    running.process.send_signal(signal.SIGHUP)
    assert until(lambda: ask(running, headers=bearer(LATER_KEY)).status == 200)
    assert ask(running, headers=bearer(KEY)).status == 401
    assert backend.requests[-1].header("authorization") == f"Bearer {tokens['access_token']}"
    assert running.process.poll() is None


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Change a file so that neither its size nor its date tells."""
    before = path.stat()
    text = change(path.read_text(encoding="utf-8"))
    path.write_text(text.rstrip().ljust(before.st_size), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@posix
def test_file_limit_is_raised_for_the_connections() -> None:
    resource = pytest.importorskip("resource")
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        q.raise_file_limit(512)
        raised = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert raised[0] in (2 * 512 + 2 * q.POOL_SIZE, hard)
        assert raised[1] == hard
        q.raise_file_limit(1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == raised  # never lowered
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_no_file_left_makes_nothing_spin(bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    naps: list[float] = []
    monkeypatch.setattr("socketserver.TCPServer.get_request", refuse)
    monkeypatch.setattr(bridge.server.stopping, "wait", naps.append)
    with pytest.raises(OSError, match="too many"):
        bridge.server.get_request()
    assert naps == [0.1]


def test_streams_that_do_not_end_are_cut_at_last(backend: wire.Backend, bridge: RunningBridge) -> None:
    backend.on("/responses", wire.hang(FIRST))
    with wire.Client(bridge.address) as client:
        client.request("POST", "/v1/responses", STREAM)
        client.read_head()
        assert client.read_event() == FIRST
        assert bridge.server.drain(0.05) is False
        assert client.read_event() is None
        assert client.reply is not None
        assert client.reply.ended == "cut"


class Watched(threading.Condition):
    """Tell when somebody begins to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_for = threading.Event()

    def wait_for(self, predicate: Any, timeout: float | None = None) -> Any:
        """Wait as ever."""
        self.waited_for.set()
        return super().wait_for(predicate, timeout)


def test_connection_that_turns_idle_during_the_stop_ends(
    bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    draining, entered = Watched(), threading.Event()
    monkeypatch.setattr(bridge.server, "_lock", draining)
    plain_set_idle = q.Server.set_idle

    def set_idle(server: q.Server, handler: q.Handler, waiting: bool) -> None:
        entered.set()
        assert draining.waited_for.wait(5)
        plain_set_idle(server, handler, waiting)

    monkeypatch.setattr(q.Server, "set_idle", set_idle)
    with wire.Client(bridge.address):
        assert entered.wait(5)
        assert bridge.server.drain(0.5)


# -- by hand: the same in earnest, before the stand-in of tests/bench.py ---------------------

STREAMS, HERTZ, WINDOW = 500, 4, 10.0  # events a second of each stream; seconds
WARM_UP, REQUESTS = 1000, 10_000


def run_slow_standin(pipe: Connection, certificate: str, port: int) -> None:
    """Be the stand-in's process, with so few events a second that it can serve all streams."""
    import bench

    bench.PERIOD = 1_000_000_000 // HERTZ
    bench.run_standin(pipe, certificate, port)


def print_streams(running: Any) -> None:
    """Run the streams to their ends; a lost one raises BenchError. Print how late their events came.

    Handshakes, and what else opening and ending costs, share these cores: while all run is told apart.
    """
    import bench

    late = [each for read in bench.paced_streams(running, int(WINDOW * HERTZ)) for each in read]
    print(f"{STREAMS} streams, {len(late)} events, none lost")
    for name, part in (("all", late), ("while all run", late[len(late) // 4:len(late) * 3 // 4])):
        figures = bench.spread(part, "late")
        median, p99 = figures["late_p50"] / 1e3, figures["late_p99"] / 1e3
        print(f"{name}: late by {median:.2f} ms (median), {p99:.2f} ms (p99)")


def print_soak(running: Any) -> None:
    """Send requests one after the other, every tenth on a new connection; print what they leave."""
    import bench

    request = bench.request_bytes(running, "brief 0 0")

    def send(count: int) -> str:
        begun = time.monotonic()
        for _ in range(count // 10):
            with contextlib.closing(bench.connect(running)) as sock:
                for _ in range(10):
                    bench.first_byte(sock, request)
        seconds = time.monotonic() - begun
        threads = len(list(Path(f"/proc/{running.pid}/task").iterdir()))
        return (f"{count / seconds:.0f} requests/s, {bench.memory_kb(running.pid) / 1024:.1f} MB, "
                f"{threads} threads, {descriptors(running.pid)} descriptors")

    print(f"after {WARM_UP} requests: {send(WARM_UP)}")
    print(f"after {REQUESTS} more: {send(REQUESTS)}")


def main() -> int:
    """Start the stand-in and the bridge, and print the figures."""
    import bench

    bench.STREAMS, bench.HERTZ, bench.PERIOD = STREAMS, HERTZ, 1_000_000_000 // HERTZ
    bench.run_standin = run_slow_standin
    with contextlib.ExitStack() as stack:
        ground = bench.prepare(stack, Namespace(quick=True, standin_port=0))
        row = bench.Row("bridge", bench.bridge_command, probe="/healthz")
        running = stack.enter_context(bench.run(row, ground, ground.port))
        print_streams(running)
        print_soak(running)
    return 0


if __name__ == "__main__":
    sys.exit(main())


# -- bytes that are not HTTP/1.1 as it is taken here


def malformed(status: int, name: str, *lines: str, marks: Any = ()) -> Any:
    """Make a row of head lines."""
    return pytest.param(head(*lines), status, id=name, marks=marks)


MALFORMED = [
    malformed(400, "both-lengths", POST, HOST, JSON_TYPE, "Content-Length: 40", "Transfer-Encoding: chunked"),
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
    shared_bridge: RunningBridge, request_bytes: bytes, status: int
) -> None:
    refused(shared_bridge, request_bytes, status)


@pytest.mark.parametrize("request_bytes", [
    pytest.param(b"GET /healthz HTTP/1.1\nHost: bridge.lan\n\n", id="bare-lf-throughout"),
    pytest.param(b"GET /healthz\r\n", id="http-0.9"),
    pytest.param(b"\x16\x03\x01\x00\x2f\x01\x00\x00\x2b\x03\x03", id="tls-client-hello"),
])
def test_head_that_cannot_end_is_cut(
    start: Start, monkeypatch: pytest.MonkeyPatch, request_bytes: bytes
) -> None:
    monkeypatch.setattr(q, "HEAD_TIMEOUT", 0.05)
    reply = wire.raw(start().address, request_bytes)
    assert reply.status in (400, 408)
    assert (reply.header("connection"), reply.rest) == ("close", b"")


def test_head_of_bare_lf_is_malformed_not_slow(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "HEAD_TIMEOUT", 0.2)
    assert wire.raw(start().address, b"GET /healthz HTTP/1.1\nHost: bridge.lan\n\n").status == 400


@pytest.mark.parametrize("first", [
    pytest.param(CANARY, id="get"),
    pytest.param(head(POST, HOST, JSON_TYPE, f"Content-Length: {len(BODY)}") + BODY, id="post"),
    pytest.param(head(POST, HOST, JSON_TYPE, "Content-Length: 2") + b"{}", id="post-refused"),
    pytest.param(head(POST, HOST, JSON_TYPE, "Content-Length: 0"), id="post-empty"),
    pytest.param(head(POST, HOST, JSON_TYPE), id="post-without-length"),
])
def test_pipelined_request_is_answered(shared_bridge: RunningBridge, first: bytes) -> None:
    with wire.Client(shared_bridge.address, 0.3) as client:
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
def test_connection_is_kept_as_asked(shared_bridge: RunningBridge, version: str, fields: tuple[str, ...],
                                     kept: bool) -> None:
    with wire.Client(shared_bridge.address) as client:
        client.send(head(f"GET /healthz HTTP/{version}", HOST, *fields) + CANARY)
        assert client.read_reply().status == 200
        if kept:
            assert client.read_reply().status == 200
        else:
            assert client.reader.to_end() == b""


# -- deadlines


@pytest.mark.parametrize("sent", [
    pytest.param(b"G", id="one-byte"),
    pytest.param(b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-A: ", id="within-a-field"),
    pytest.param(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r", id="before-the-last-byte"),
])
def test_slow_head_is_cut(start: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(q, "HEAD_TIMEOUT", 0.05)
    reply = wire.raw(start().address, sent)
    assert (reply.status, reply.header("connection"), reply.rest) == (408, "close", b"")


def test_silent_connection_is_closed_without_an_answer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "IDLE_CLIENT", 0.05)
    with wire.Client(start().address) as client:
        assert client.reader.to_end() == b""


def test_slow_senders_hold_up_nobody(bridge: RunningBridge) -> None:
    slow = [socket.create_connection(bridge.address, 5) for _ in range(200)]
    try:
        for number, sock in enumerate(slow):
            begun = head(POST, HOST, JSON_TYPE, "Content-Length: 9") + b"{"
            sock.sendall(b"GET /he" if number % 2 else begun)
        assert wire.get(bridge.address, "/healthz", timeout=2).status == 200
        assert wire.post(bridge.address, "/v1/responses", REQUEST, timeout=3).status == 200
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


# -- TLS


@pytest.fixture
def tls_bridge(bridges: SharedBridges) -> RunningBridge:
    """A bridge that serves https with the stand-in's certificate."""
    folder = Path(bridges.backend.ca_file).parent
    return bridges.bridge("--tls-cert", str(folder / "leaf.pem"), "--tls-key", str(folder / "leaf.key"))


def served(bridge: RunningBridge, bridges: SharedBridges) -> str | None:
    """Do a turn over TLS; return the protocol's version."""
    with wire.Client(bridge.address, 3, tls=wire.trusting(bridges.backend)) as client:
        begin_turn(client)
        assert client.read_events()[-1]["type"] == "response.completed"
        client.request("GET", "/healthz")
        assert client.read_reply().status == 200
        return client.sock.version() if isinstance(client.sock, ssl.SSLSocket) else None


def test_https_is_served(tls_bridge: RunningBridge, bridges: SharedBridges) -> None:
    assert served(tls_bridge, bridges) in ("TLSv1.2", "TLSv1.3")


def client_hello(version: bytes) -> bytes:
    """Write a ClientHello without extensions, for OpenSSL's own client no longer offers TLS 1.1."""
    suites = bytes.fromhex("c00ac009c014c013c02bc02f0035002f")
    hello = version + bytes(32) + b"\0" + len(suites).to_bytes(2, "big") + suites + b"\x01\0"
    message = b"\x01" + len(hello).to_bytes(3, "big") + hello
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message


@pytest.mark.parametrize("version", [b"\x03\x01", b"\x03\x02"], ids=["TLS-1.0", "TLS-1.1"])
def test_tls_before_1_2_is_refused(tls_bridge: RunningBridge, bridges: SharedBridges, version: bytes) -> None:
    with wire.Client(tls_bridge.address) as client:
        client.send(client_hello(version))
        answer = client.reader.to_end()
    assert (answer[:1], answer[-2:]) == (b"\x15", b"\x02\x46")  # alert: fatal, protocol_version
    served(tls_bridge, bridges)


@pytest.mark.parametrize("begun", [b"", b"\x16", client_hello(b"\x03\x03")[:20]],
                         ids=["silent", "a-byte", "a-part"])
def test_unfinished_handshake_holds_up_nobody(
    tls_bridge: RunningBridge, bridges: SharedBridges, begun: bytes
) -> None:
    slow = [socket.create_connection(tls_bridge.address, 5) for _ in range(50)]
    try:
        for sock in slow:
            sock.sendall(begun)
        served(tls_bridge, bridges)
    finally:
        for sock in slow:
            sock.close()


def test_unfinished_handshake_is_cut(tls_bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "HEAD_TIMEOUT", 0.05)
    with wire.Client(tls_bridge.address) as client:
        assert client.left()


@pytest.mark.parametrize("sent", [CANARY, b"\x00" * 100, b"\x15\x03\x03\x00\x02\x02\x28", os.urandom(64)],
                         ids=["http", "zeros", "alert", "noise"])
def test_what_is_no_tls_is_closed(tls_bridge: RunningBridge, bridges: SharedBridges, sent: bytes) -> None:
    with wire.Client(tls_bridge.address) as client:
        client.send(sent)
        assert b"HTTP/1.1 200" not in client.reader.to_end()
    served(tls_bridge, bridges)


# -- networks


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


# -- HTTP on the client's side ----------------------------------------------------------


def test_pipelined_requests_are_answered_in_order(bridge: RunningBridge, backend: wire.Backend) -> None:
    first, second = (wire.text_turn(text, empty_output=False) for text in ("one", "two"))
    gate = threading.Event()
    backend.on("/responses", wire.gated(gate, first[:1], first[1:]), wire.turn(*second))
    with wire.Client(bridge.address) as client:
        client.send(raw_request() + raw_request() + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.read_head()
        assert client.read_event() == first[0]
        gate.set()
        assert client.read_events() == first[1:]
        client.read_head()
        assert client.read_events() == second
        assert client.read_reply().json["status"] == "ok"


def test_request_sent_while_the_answer_comes_is_answered(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    gate = threading.Event()
    backend.on("/responses", wire.gated(gate, [FIRST], [LAST]))
    with asking(bridge) as client:
        client.read_head()
        client.read_event()
        for byte in raw_request():
            client.send(bytes([byte]))
        gate.set()
        assert client.read_events() == [LAST]
        assert client.read_reply().ended == "last-chunk"


def test_connection_is_kept(bridge: RunningBridge) -> None:
    with wire.Client(bridge.address) as client:
        for stream in (True, False, True):
            client.request("POST", "/v1/responses", {**STREAM, "stream": stream})
            reply = client.read_reply()
            assert reply.status == 200
            assert (reply.header("connection") or "keep-alive") == "keep-alive"


@pytest.mark.parametrize("request_bytes", [raw_request("1.1", "Connection: close"), raw_request("1.0")])
def test_connection_ends_when_the_client_wants_it(request_bytes: bytes, bridge: RunningBridge) -> None:
    with wire.Client(bridge.address) as client:
        client.send(request_bytes)
        reply = client.read_reply()
        assert reply.header("connection") == "close"
        assert reply.ended in ("last-chunk", "close")
        assert client.left(1)


@posix
def test_a_second_ctrl_c_ends_at_once(run: Run, paused_turns: PausedTurns, open_streams: OpenStreams) -> None:
    running = run()
    streams = open_streams(running.address, 1)
    streams.read_first()
    running.process.send_signal(signal.SIGINT)
    assert running.read_more("stopping")
    started = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    running.process.wait(10)
    assert time.monotonic() - started < 5  # and not DRAIN_SECONDS


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_stop_waits_for_a_refresh(
    run: Run, backend: wire.Backend, tmp_path: Path, number: signal.Signals
) -> None:
    running, answer = run(), threading.Event()
    asked = threading.Event()

    def slow(exchange: wire.Exchange) -> None:
        asked.set()
        assert answer.wait(10)
        backend.default(exchange)

    backend.on("/oauth/token", slow)
    backend.revoke()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(wire.post, running.address, "/v1/responses", {"model": "gpt-5.5", "input": "hi"})
        assert asked.wait(5)
        running.process.send_signal(number)
        running.read_more("stopping")
        answer.set()
        running.process.wait(10)
        with contextlib.suppress(Exception):
            reply.result(5)
    tokens = json.loads((tmp_path / "auth.json").read_text())["tokens"]
    assert tokens["refresh_token"] == backend.refresh_token


# -- HEAD that is malformed ------------------------------------------------------

BAD_HEADS: dict[str, tuple[int, tuple[str, ...]]] = {
    "no host": (400, ("HEAD /v1/models HTTP/1.1",)),
    "two hosts": (400, ("HEAD /v1/models HTTP/1.1", HOST, HOST)),
    "no colon": (400, ("HEAD /v1/models HTTP/1.1", HOST, "X-A")),
    "both lengths": (400, ("HEAD / HTTP/1.1", HOST, "Content-Length: 0", "Transfer-Encoding: chunked")),
    "length of letters": (400, ("HEAD /v1/models HTTP/1.1", HOST, "Content-Length: x")),
    "coding of 1.0": (400, ("HEAD /v1/models HTTP/1.0", HOST, "Transfer-Encoding: chunked")),
    "unknown coding": (501, ("HEAD /v1/models HTTP/1.1", HOST, "Transfer-Encoding: gzip")),
    "absolute form": (400, ("HEAD http://bridge.lan/healthz HTTP/1.1", HOST)),
    "target too long": (414, (f"HEAD /{'a' * 10_000} HTTP/1.1", HOST)),
    "too many fields": (431, ("HEAD / HTTP/1.1", HOST, *[f"X-{n}: a" for n in range(1000)])),
    "too large": (431, ("HEAD / HTTP/1.1", HOST, f"X-A: {'a' * 100_000}")),
    "version": (505, ("HEAD / HTTP/3.0", HOST)),
    "web page": (403, ("HEAD /v1/models HTTP/1.1", HOST, "Origin: https://page.example")),
    "name of another": (403, ("HEAD /v1/models HTTP/1.1", "Host: evil.example")),
    "no such path": (404, ("HEAD /v1/nothing HTTP/1.1", HOST, "Connection: close")),
    "no version": (400, ("HEAD /v1/models FOO/1.1", HOST)),
    "two blanks": (400, ("HEAD  /v1/models HTTP/1.1", HOST)),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_refused_head_has_no_body(name: str, bridge: RunningBridge) -> None:
    status, lines = BAD_HEADS[name]
    with wire.Client(bridge.address) as client:
        client.send(head(*lines))
        assert client.read_head("HEAD").status == status
        client.half_close()
        assert client.reader.to_end() == b""  # it would be the next answer's beginning


@pytest.mark.parametrize("empty", [b"\r\n", b"\r\n\r\n"])
def test_refused_head_behind_an_empty_line_has_no_body(
    bridge: RunningBridge, log_lines: LogLines, empty: bytes
) -> None:
    with wire.Client(bridge.address) as client:
        client.send(empty + head("HEAD /v1/models HTTP/1.1", HOST, "no colon"))
        assert client.read_head("HEAD").status == 400
        client.half_close()
        assert client.reader.to_end() == b""
    assert " HEAD " in log_lines.ended("/v1/models")[0]


def test_head_that_is_slow_has_no_body(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "HEAD_TIMEOUT", 0.05)
    reply = wire.raw(start().address, b"HEAD /v1/models HTTP/1.1\r\nHost: bri", method="HEAD")
    assert (reply.status, reply.rest) == (408, b"")


# -- empty lines before a request -----------------------------------------------


@pytest.mark.parametrize("pieces", [
    pytest.param([b"\r\n" + CANARY], id="one"),
    pytest.param([b"\r\n\r\n" + CANARY], id="two"),
    pytest.param([b"\r\n", CANARY], id="alone first"),
    pytest.param([b"\r", b"\n" + CANARY[:9], CANARY[9:]], id="cut"),
])
def test_empty_line_before_a_request_is_skipped(pieces: list[bytes], bridge: RunningBridge) -> None:
    with wire.Client(bridge.address) as client:
        for piece in pieces:
            client.send(piece)
        assert client.read_reply().json["status"] == "ok"


@pytest.mark.parametrize("behind", [b"\r\n", b"\r\n\r\n"])
def test_empty_line_behind_a_body_is_skipped(behind: bytes, bridge: RunningBridge) -> None:
    with wire.Client(bridge.address) as client:
        for _ in range(2):
            request = head(POST, HOST, JSON_TYPE, f"Content-Length: {len(BODY)}") + BODY
            client.send(request + behind)
            assert client.read_reply().json["status"] == "completed"
        client.send(CANARY)
        assert client.read_reply().json["status"] == "ok"


def test_nothing_but_an_empty_line_is_no_request(bridge: RunningBridge) -> None:
    with wire.Client(bridge.address) as client:
        client.send(b"\r\n")
        client.half_close()
        assert client.reader.to_end() == b""


def test_empty_lines_without_end_are_refused(bridge: RunningBridge) -> None:
    with wire.Client(bridge.address) as client:
        with contextlib.suppress(OSError):
            for _ in range(40):  # 2.6 MB
                client.send(b"\r\n" * 32_768)
        assert client.left()


@pytest.mark.parametrize("raw", [b"\n" + CANARY, b" \r\n" + CANARY, b"\r\r\n" + CANARY, b"x\r\n" + CANARY])
def test_what_is_no_empty_line_is_no_request(raw: bytes, bridge: RunningBridge) -> None:
    assert wire.raw(bridge.address, raw).status == 400


# -- a thread that cannot start ----------------------------------------------------


def test_connection_without_a_thread_is_503_and_the_next_is_served(
    bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = NoThreads(monkeypatch, "process_request_thread")
    with wire.Client(bridge.address) as client:
        reply = client.read_reply("GET")
        assert (reply.status, reply.json["error"]["code"]) == (503, "bridge_overloaded")
        assert client.left()
    assert threads.failed
    threads.names = ()
    assert bridge.faults == []
    assert until(lambda: not bridge.server._open, 1)
    assert wire.get(bridge.address, "/healthz").status == 200


@pytest.mark.parametrize("request_line", [
    "GET /v1/models HTTP/1.1", "POST /v1/responses HTTP/1.1", "HEAD / HTTP/1.0", "OPTIONS * HTTP/1.1",
])
def test_http_to_a_tls_bridge_is_answered_and_logged(
    tls_bridge: RunningBridge, bridges: SharedBridges, log_lines: LogLines, request_line: str
) -> None:
    head = f"{request_line}\r\nHost: bridge.lan\r\nContent-Length: 0\r\n\r\n"
    method = request_line.partition(" ")[0]
    reply = wire.raw(tls_bridge.address, head, method=method)
    assert (reply.status, reply.header("connection")) == (400, "close")
    assert reply.header("x-qoo-bridge-error") == "bridge"
    if method != "HEAD":
        assert reply.json["error"]["code"] == "malformed_http"
        assert "https://" in reply.json["error"]["message"]
    assert "127.0.0.1" in log_lines.wait_for("https")
    served(tls_bridge, bridges)


def test_http_to_a_tls_bridge_waits_for_no_rest(tls_bridge: RunningBridge) -> None:
    with wire.Client(tls_bridge.address) as client:
        client.send(b"GET / HT")  # enough to know that it is no TLS
        assert client.left()
