"""Room sockets: a peer that is slow, stops or leaves."""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import wire
from conftest import LogLines, RunningBridge, cuts
from help import FIRST, LAST, MODEL, asking

import qoo_bridge as q


def test_reader_that_stops_is_cut_and_costs_little(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "WRITE_TIMEOUT", 0.1)
    sent, stopped = [0], threading.Event()

    def flood(exchange: wire.Exchange) -> None:
        exchange.head()
        event = wire.sse_bytes({"type": "response.output_text.delta", "delta": "x" * 65536})
        with contextlib.suppress(OSError):
            while sent[0] < 256 << 20:
                exchange.event(event)
                sent[0] += len(event)
        stopped.set()

    backend.on("/responses", flood)
    with asking(bridge) as client:
        client.read_head()
        assert stopped.wait(5)
        assert sent[0] < 64 << 20  # what the system's buffers take, and not what upstream would send
        assert "end=client_stalled" in log_lines.ended()[0]


def test_slow_reader_gets_everything(
    bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "WRITE_TIMEOUT", 2)
    events = [{"type": "response.output_text.delta", "n": n, "delta": "x" * 65536} for n in range(96)]
    waits, wait = threading.Event(), q.wait_writable

    def noted(*words: Any) -> Any:
        waits.set()
        return wait(*words)

    monkeypatch.setattr(q, "wait_writable", noted)
    backend.on("/responses", wire.turn(FIRST, *events, LAST))
    with asking(bridge) as client:
        client.read_head()
        assert waits.wait(5)  # the bridge waits for room
        assert [event.get("n") for event in client.read_events()] == [None, *range(96), None]
        assert client.reply is not None
        assert client.reply.ended == "last-chunk"



@pytest.mark.parametrize("tls", [False, True], ids=["tcp", "tls"])
def test_reader_that_is_slow_but_steady_gets_all(tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "SEND_SIZE", 65536)
    ours, theirs = socket.socketpair()
    size, taken = 700_000, [0]
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)

    def read_slowly() -> None:
        sock = wire.server_context().wrap_socket(theirs, server_side=True) if tls else theirs
        with sock:
            while taken[0] < size:
                taken[0] += len(sock.recv(16384))
                threading.Event().wait(0.005)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    context = ssl.create_default_context(cafile=str(wire.certificates() / "ca.pem"))
    peer = q.Connection(context.wrap_socket(ours, server_hostname="localhost") if tls else ours)
    peer.send(bytes(size), 0.12)  # the whole takes longer than that; each part of it does not
    reader.join(5)
    peer.close()
    assert taken[0] == size


@pytest.fixture
def pair() -> Iterator[tuple[q.Connection, socket.socket]]:
    """Give a peer and the other end of its connection."""
    ours, theirs = socket.socketpair()
    with theirs:
        peer = q.Connection(ours)
        yield peer, theirs
        peer.close()


HEAD = b"GET / HTTP/1.1\r\nHost: a"


def deliver(sock: socket.socket, pieces: list[bytes]) -> None:
    """Send pieces, one call each."""
    for piece in pieces:
        sock.sendall(piece)


@pytest.mark.parametrize("behind", [b"", b"the body"])
def test_head_is_read_however_it_is_cut(pair: tuple[q.Connection, socket.socket], behind: bytes) -> None:
    peer, other = pair
    for pieces in cuts(HEAD + b"\r\n\r\n", 5):
        *begun, last = filter(None, pieces)
        sender = threading.Thread(target=deliver, args=(other, [*begun, last + behind]))
        sender.start()
        assert peer.read_head(time.monotonic() + 5) == HEAD
        sender.join()
        assert (peer.read() or b"") == behind


def test_head_ends_early_or_never(pair: tuple[q.Connection, socket.socket]) -> None:
    peer, other = pair
    other.sendall(HEAD)
    with pytest.raises(TimeoutError):
        peer.read_head(time.monotonic() + 0.05)
    other.sendall(HEAD)
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        peer.read_head(time.monotonic() + 5)
    assert peer.read_head(time.monotonic() + 5) is None


def test_client_that_leaves_is_seen_while_upstream_is_waited_for(
        pair: tuple[q.Connection, socket.socket]) -> None:
    upstream, _silent = pair
    ours, theirs = socket.socketpair()
    client = q.Connection(ours)
    with theirs:
        theirs.sendall(b"the next request")
        assert upstream.wait(0.05, client) is False
        theirs.close()
        with pytest.raises(q.ClientLeft):
            upstream.wait(5, client)
    assert client.read() == b"the next request"  # what it sent is read ahead, and not lost
    client.close()


@pytest.mark.parametrize(("exc", "words"), [
    (q.BadUpstream("upstream is down"), "upstream is down"),
    (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "connection refused"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "connection reset"),
    (socket.timeout("timed out"), "timed out"),
    (EOFError(), "EOFError"),
])
def test_what_went_wrong_in_a_few_words(exc: BaseException, words: str) -> None:
    assert q.describe_error(exc) == words


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other names")
def test_both_ends_of_the_bridge_notice_a_dead_line(bridge: RunningBridge, backend: wire.Backend) -> None:
    made: list[socket.socket] = []
    plain = q.keep_alive

    def keep(sock: socket.socket) -> None:
        made.append(sock)
        plain(sock)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(q, "keep_alive", keep)
        with wire.Client(bridge.address) as client:
            client.request("POST", "/v1/responses", {**MODEL, "input": "hi"})
            assert client.read_reply().status == 200
            check_options(made)
    assert len(made) >= 2  # the client's and upstream's


def check_options(made: list[socket.socket]) -> None:
    """Compare what the system has for each socket that is still open."""
    alive = [sock for sock in made if sock.fileno() >= 0]
    assert {sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for sock in alive} == {1}
    options = [(socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3),
               (socket.TCP_USER_TIMEOUT, 10_000)]
    for number, value in options:
        assert {sock.getsockopt(socket.IPPROTO_TCP, number) for sock in alive} == {value}
