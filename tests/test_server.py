"""Section 16, server: many connections at once, what they leave behind, and how it ends.

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
import subprocess
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
from conftest import Run, RunningBridge, Start

import qoo_bridge as q

FIRST, *MIDDLE, LAST = wire.text_turn("hello", empty_output=False)
BODY = {"model": "gpt-5.5", "stream": True, "input": "hi"}
KEY, LATER_KEY = "a-key-of-the-test-1", "a-key-of-the-test-2"  # equally long
SECONDS = 10  # until a test gives up; nothing here takes three
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


# -- a crowd of clients ----------------------------------------------------------------


class Turns:
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


class Crowd:
    """Streams at once, read by one selector, each kept by the text that it asks for."""

    def __init__(self, address: wire.Address, texts: Iterable[str]) -> None:
        self.clients = {text: wire.Client(address, SECONDS) for text in texts}
        for text, client in self.clients.items():
            client.request("POST", "/v1/responses", {**BODY, "input": text})

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

    def are_whole(self, turns: Turns) -> bool:
        """Read all to their ends; tell whether each got its own turn, nothing lost and nothing added."""
        self.read_until(b"\r\n0\r\n\r\n")
        replies = {text: client.read_reply() for text, client in self.clients.items()}
        assert {(reply.status, reply.ended) for reply in replies.values()} == {(200, "last-chunk")}
        return {text: wire.sse(reply.body) for text, reply in replies.items()} == {
            text: turns.sent[text] for text in replies}

    def close(self) -> None:
        """Leave."""
        for client in self.clients.values():
            client.close()


Gather = Callable[..., Crowd]


@pytest.fixture
def gather() -> Iterator[Gather]:
    """Send crowds to a bridge."""
    with contextlib.ExitStack() as stack:
        names = itertools.count()

        def gather_one(address: wire.Address, size: int) -> Crowd:
            crowd = Crowd(address, [f"stream {next(names)}" for _ in range(size)])
            stack.callback(crowd.close)
            return crowd

        yield gather_one


@pytest.fixture
def turns(backend: wire.Backend) -> Iterator[Turns]:
    """Have the stand-in answer each good request with a turn that waits."""
    waiting = Turns()
    backend.always("/responses", wire.checked(backend, waiting.reply))
    yield waiting
    waiting.gate.set()


# -- many at once ----------------------------------------------------------------------


def test_many_streams_lose_nothing_and_one_too_many_is_503(
    start: Start, turns: Turns, gather: Gather
) -> None:
    bridge = start("--max-connections", "120")
    crowd = gather(bridge.address, 120)
    crowd.read_first()
    with wire.Client(bridge.address) as late:
        reply = late.read_reply()  # it is told before it has asked
        assert (reply.status, reply.header("retry-after")) == (503, "2")
        assert reply.json["error"]["code"] == "bridge_overloaded"
        assert late.left()
    turns.gate.set()
    assert crowd.are_whole(turns)
    assert wire.post(bridge.address, "/v1/responses", BODY).status == 200  # an idle connection makes room


def test_token_that_turns_invalid_under_load_costs_one_refresh(
    bridge: RunningBridge, backend: wire.Backend, turns: Turns, gather: Gather
) -> None:
    together = threading.Barrier(50)

    def expired(exchange: wire.Exchange) -> None:
        together.wait(SECONDS)
        exchange.json(401, {"detail": "Could not validate credentials"})

    running = gather(bridge.address, 50)
    running.read_first()
    backend.revoke()
    backend.on("/responses", *[expired] * 50)
    begun = gather(bridge.address, 50)
    begun.read_first()
    turns.gate.set()
    assert running.are_whole(turns)
    assert begun.are_whole(turns)
    assert backend.refreshes == 1


# -- what stays behind -------------------------------------------------------------------


def descriptors(process: int | str = "self") -> int:
    """Count the open files of a process; 0 where the system cannot tell."""
    folder = Path(f"/proc/{process}/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def settled(count: Callable[[], int], most: int) -> int:
    """Count until it is no more than that, or for three seconds."""
    deadline = time.monotonic() + 3
    while count() > most and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return count()


SOAK: list[tuple[str, dict[str, Any]]] = [
    ("/v1/responses", BODY),
    ("/v1/responses", {**BODY, "stream": False}),
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
    assert settled(threads, before[threads]) <= before[threads]
    assert settled(files, before[files]) <= before[files]
    assert settled(blocks, before[blocks] + 300) <= before[blocks] + 300  # less than one a request
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
    run: Run, turns: Turns, gather: Gather, number: signal.Signals
) -> None:
    running, stop = run(), threading.Event()
    crowd = gather(running.address, 20)
    crowd.read_first()
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
    turns.gate.set()
    assert crowd.are_whole(turns)
    assert all(client.left() for client in crowd.clients.values())
    assert running.wait() == 0
    assert not any("Traceback" in line or "ERROR" in line for line in running.lines)


@posix
def test_stop_at_rest_is_quick(run: Run) -> None:
    running = run()
    assert running.start_seconds < 3  # tests/bench.py measures it; this only sees a hang
    assert "signed in" in running.greeting
    assert "no key is set" in running.greeting
    begun = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 0
    assert time.monotonic() - begun < 3


@posix
def test_hang_up_rereads_keys_and_sign_in(run: Run, backend: wire.Backend, tmp_path: Path) -> None:
    key_file, auth_file = tmp_path / "keys", tmp_path / "auth.json"
    key_file.write_text(f"laptop={KEY}\n", encoding="utf-8")
    key_file.chmod(0o600)
    auth_file.write_text(json.dumps(wire.auth_json(backend)) + " " * 100, encoding="utf-8")
    auth_file.chmod(0o600)
    running = run("--api-key-file", str(key_file))
    assert ask(running.address, KEY) == 200
    rewrite(key_file, lambda text: text.replace(KEY, LATER_KEY))
    old = backend.access_token
    tokens = backend.rotate()
    rewrite(auth_file, lambda text: text.replace(old, tokens["access_token"]))
    assert [ask(running.address, key) for key in (KEY, LATER_KEY)] == [200, 401]  # it cannot know yet
    running.process.send_signal(signal.SIGHUP)
    assert settled(lambda: ask(running.address, LATER_KEY), 200) == 200
    assert ask(running.address, KEY) == 401
    assert backend.requests[-1].header("authorization") == f"Bearer {tokens['access_token']}"
    assert running.process.poll() is None


def ask(address: wire.Address, key: str) -> int:
    """Ask for a turn with a key of the bridge; return the status."""
    return wire.post(address, "/v1/responses", BODY, {"Authorization": f"Bearer {key}"}).status


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Change a file so that neither its size nor its date tells."""
    before = path.stat()
    text = change(path.read_text(encoding="utf-8"))
    path.write_text(text.rstrip().ljust(before.st_size), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def test_start_tells_what_will_turn_clients_away(run: Run, tmp_path: Path) -> None:
    running = run("--api-key-file", str(tmp_path / "none"), "--limit", "laptop=1")
    warning = "--limit names laptop, and there is no such key"
    assert settled(lambda: warning not in "".join(running.lines), 0) == 0
    assert "none cannot be read" in "".join(running.lines)


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


def test_log_needs_no_file_to_be_opened_later() -> None:
    code = ("import sys, encodings; sys.path.insert(0, sys.argv[1]); import qoo_bridge as q; "
            "encodings.__path__ = []; q.log_line(q.Record('a', 'b', '', 'GET', '/'))")
    words = [sys.executable, "-I", "-S", "-B", "-c", code, str(Path(q.__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run(
            [sys.executable, q.__file__, "--host", "127.0.0.1", "--port", str(port), "--log-file", "-",
             "--auth-file", str(tmp_path / "auth.json")],
            capture_output=True, text=True, timeout=SECONDS, check=False)
    reason = f"{os.strerror(errno.EADDRINUSE)}; is a bridge running already?"
    text = f"cannot listen on 127.0.0.1 port {port}: {reason}\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", text)


def test_streams_that_do_not_end_are_cut_at_last(backend: wire.Backend, bridge: RunningBridge) -> None:
    backend.on("/responses", wire.hang(FIRST))
    with wire.Client(bridge.address) as client:
        client.request("POST", "/v1/responses", BODY)
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
    plain_idle = q.Server.idle

    def idle(server: q.Server, handler: q.Handler, waiting: bool) -> None:
        entered.set()
        assert draining.waited_for.wait(5)
        plain_idle(server, handler, waiting)

    monkeypatch.setattr(q.Server, "idle", idle)
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
