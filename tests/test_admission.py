"""Room admission: the memory of bodies, the key file, and how many requests a key may run at once."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wire
from conftest import LogLines, Process, Run, RunningBridge, Start
from help import (
    API_KEY,
    BEARER,
    BODY,
    HI,
    HOST,
    JSON_TYPE,
    POST,
    REQUEST,
    STREAM,
    Object,
    begin_turn,
    head,
    posix,
    sent,
    until,
)

import qoo_bridge as q

# -- bodies in memory ---------------------------------------------------------


def test_bodies_are_bounded_in_sum(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "MAX_BODIES", 330_000)
    bridge = start()
    body, taken, take = BODY + b" " * 60_000, threading.Event(), bridge.bridge.turns.budget.take
    total = []

    def count(size: int) -> None:
        take(size)
        total.append(size)
        if sum(total) >= 60_000:
            taken.set()

    monkeypatch.setattr(bridge.bridge.turns.budget, "take", count)
    with wire.Client(bridge.address) as first:
        first.send(head(POST, HOST, JSON_TYPE, f"Content-Length: {len(body)}") + body[:60_000])
        assert taken.wait(5)
        room = bridge.bridge.turns.budget.room()
        reply = wire.post(bridge.address, "/v1/responses", body)
        assert (reply.status, reply.header("retry-after")) == (503, "5")
        reply = wire.post(bridge.address, "/v1/responses", body + b" " * 300_000)
        assert (reply.status, reply.header("retry-after"), reply.header("connection")) == (503, "5", "close")
        assert until(lambda: bridge.bridge.turns.budget.room() == room)  # what was refused is given back
        first.send(body[60_000:])
        assert first.read_reply().status == 200
    assert wire.post(bridge.address, "/v1/responses", body).status == 200


def test_bodies_expand_one_at_a_time(
    bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    decompress, second, running, most = q.decompress, threading.Event(), [0], [0]

    def watched(body: bytes, coding: str, limit: int) -> bytes:
        running[0] += 1
        most[0] = max(most[0], running[0])
        second.wait(0.05)  # time for another one to come in
        running[0] -= 1
        return decompress(body, coding, limit)

    monkeypatch.setattr(q, "decompress", watched)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(wire.Client(bridge.address)) for _ in range(4)]
        for client in clients:
            client.request("POST", "/v1/responses", gzip.compress(BODY), {"Content-Encoding": "gzip"})
        assert [client.read_reply().status for client in clients] == [200] * 4
    assert most == [1]


def test_body_counts_until_upstream_has_taken_it(
    start: Start, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "MAX_BODIES", 330_000)
    bridge, body = start(), BODY + b" " * 60_000
    backend.on("/responses", wire.hang())
    with wire.Client(bridge.address) as first:
        first.request("POST", "/v1/responses", body)
        backend.wait_for(1, "/responses")
        assert wire.post(bridge.address, "/v1/responses", body).status == 503


def small_items(count: int) -> Object:
    """Return a request of many small items: parsing makes 40 times its bytes of it."""
    return {**REQUEST, "input": [{**HI, "content": [{"type": "input_text", "text": "hi"}]}] * count}


def held(bridge: RunningBridge) -> int:
    """Return how many bytes all requests hold."""
    return q.MAX_BODIES - bridge.bridge.turns.budget.room()


def after(gate: threading.Event) -> Callable[[wire.WebSocketExchange, Object], None]:
    """Have upstream answer a frame once the gate is open."""
    def answer(ws: wire.WebSocketExchange, body: Object) -> None:
        gate.wait(5)
        wire.answer_frame(ws, body)

    return answer


@pytest.mark.parametrize(("taken", "estimated"), [(0, False), (400 << 20, True)], ids=["idle", "busy"])
def test_what_parsing_takes_is_estimated_only_where_the_worst_would_not_leave_room(
    start: Start, backend: wire.Backend, taken: int, estimated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To estimate it takes half of the time that a conversation of 4 MB takes."""
    bridge, estimates = start(), []
    parsed_size = q.parsed_size

    def count(body: bytes) -> int:
        estimates.append(parsed_size(body))
        return estimates[-1]

    monkeypatch.setattr(q, "parsed_size", count)
    bridge.bridge.turns.budget.take(taken)
    given: Object = {**REQUEST, "input": [{**HI, "content": "x" * (4 << 20)}]}
    assert wire.post(bridge.address, "/v1/responses", given).status == 200
    assert bool(estimates) == estimated
    assert until(lambda: held(bridge) == taken)


@pytest.mark.parametrize("by", ["previous_response_id", "item_reference"])
@pytest.mark.parametrize("transport", ["http", "websocket"])
def test_what_is_replayed_counts_as_a_body(
    start: Start, backend: wire.Backend, transport: str, by: str
) -> None:
    bridge = start()
    long = wire.message_item("x" * 500_000)
    backend.on("/responses", wire.turn(*wire.items_turn(long)))
    given: Object = {**REQUEST, "store": True, "input": [HI]}
    first = wire.post(bridge.address, "/v1/responses", given).json
    follows: Object = {**given, "previous_response_id": first["id"]}
    if by == "item_reference":
        follows = {**given, "input": [{"type": "item_reference", "id": first["output"][0]["id"]}, HI]}
    assert until(lambda: held(bridge) == 0)
    gate = threading.Event()
    backend.on("/responses", wire.gated(gate, [], wire.text_turn()))
    backend.on_frame(after(gate))
    with contextlib.ExitStack() as stack:
        stack.callback(gate.set)
        if transport == "http":
            client = stack.enter_context(wire.Client(bridge.address))
            client.request("POST", "/v1/responses", follows)
        else:
            socket_ = stack.enter_context(contextlib.closing(wire.WebSocketClient(bridge.address)))
            socket_.connect("/v1/responses")
            socket_.send_json({"type": "response.create", **follows})
        assert until(lambda: held(bridge) > 5 * 500_000)
        gate.set()
        assert until(lambda: held(bridge) < 10_000)


@pytest.mark.parametrize("path", ["/v1/responses/compact", "/v1/memories/trace_summarize"])
def test_a_side_requests_body_counts_with_what_parsing_makes_of_it(
    start: Start, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(q, "MAX_BODIES", 4 << 20)
    bridge = start()
    body = json.dumps(small_items(5_000)).encode()  # 0.5 MB
    assert wire.post(bridge.address, path, body).status == 503
    assert sent(backend, path[len("/v1"):]) == []
    assert held(bridge) == 0


def test_the_input_that_is_kept_for_the_store_counts_until_the_end(
    start: Start, backend: wire.Backend
) -> None:
    bridge, gate = start(), threading.Event()
    events = wire.text_turn()
    backend.on("/responses", wire.gated(gate, events[:4], events[4:]))
    text = "x" * 300_000
    with wire.Client(bridge.address) as client:
        client.request("POST", "/v1/responses", {**STREAM, "input": [{**HI, "content": text}]})
        client.read_head()
        assert client.read_event()
        assert until(lambda: len(text) < held(bridge) < len(text) + 1_000)
        gate.set()
        client.read_events()
    assert until(lambda: held(bridge) == 0)


def test_an_input_that_the_store_cannot_take_is_not_kept(
    start: Start, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "STORE_SIZE", 10_000)
    bridge, gate = start(), threading.Event()
    events = wire.text_turn()
    backend.on("/responses", wire.gated(gate, events[:4], events[4:]))
    with wire.Client(bridge.address) as client:
        client.request("POST", "/v1/responses", {**STREAM, "input": [{**HI, "content": "x" * 300_000}]})
        client.read_head()
        assert client.read_event()
        assert until(lambda: held(bridge) == 0)
        gate.set()
        client.read_events()


def test_small_frames_count_with_what_parsing_makes_of_them(start: Start, backend: wire.Backend) -> None:
    bridge, gate = start(), threading.Event()
    frame = {"type": "response.create", **small_items(150)}
    size = len(json.dumps(frame))
    assert size < q.COUNTED_BODY
    backend.on_frame(after(gate))
    with contextlib.closing(wire.WebSocketClient(bridge.address)) as client:
        client.connect("/v1/responses")
        client.send_json(frame)
        assert until(lambda: held(bridge) > 10 * size)
        gate.set()
        client.read_turn()
    assert until(lambda: held(bridge) == 0)


# -- the key file -------------------------------------------------------------


def write_keys(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a key file in one step."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text, "utf-8")
    fresh.chmod(mode)
    fresh.replace(path)


def test_key_file_is_read_anew_when_it_changes(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write_keys(path, f"# who may come in\n\n  laptop = {API_KEY}\n")
    bridge = start("--api-key-file", str(path), "--api-key", "given=sk-given-0123456789")

    def statuses() -> list[int]:
        keys = (API_KEY, "sk-desktop-0123456789", "sk-given-0123456789")
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
    start: Start, tmp_path: Path, log_lines: LogLines, mode: int, warned: bool
) -> None:
    path = tmp_path / "keys"
    write_keys(path, f"laptop={API_KEY}\n", mode)
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
    assert wire.post(bridge.address, "/v1/responses", REQUEST).status in (401, 500, 503)


def test_emptied_key_file_does_not_open_the_door(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write_keys(path, f"laptop={API_KEY}\n")
    bridge = start("--api-key-file", str(path))
    assert wire.get(bridge.address, "/v1/models").status == 401
    path.write_text("")
    assert wire.get(bridge.address, "/v1/models").status != 200


@pytest.mark.parametrize("line", [
    pytest.param(f"{API_KEY}", id="no-name"),
    pytest.param(f"={API_KEY}", id="empty-name"),
    pytest.param(f"{API_KEY}==", id="base64"),
    pytest.param(f"lap top={API_KEY}", id="bad-name"),
    pytest.param(f"laptop={API_KEY} x", id="space-in-key"),
    pytest.param(f"laptop={API_KEY * 20}", id="too-long"),
])
def test_bad_line_of_a_key_file_is_not_quoted(
    start: Start, tmp_path: Path, log_lines: LogLines, line: str
) -> None:
    path = tmp_path / "keys"
    write_keys(path, f"# keys\n{line}\n")
    reply = wire.get(start("--api-key-file", str(path)).address, "/v1/models")
    assert reply.status in (401, 500, 503)
    assert API_KEY not in reply.body.decode() + repr(log_lines.lines)


# -- limits of a key

LIMITED = ("--api-key", f"laptop={API_KEY}", "--api-key", "other=sk-other-0123456789", "--limit", "laptop=1")


def waiting(bridge: RunningBridge, count: int) -> bool:
    """Wait until so many requests of the limited key wait their turn."""
    return until(lambda: len(bridge.bridge.key_queue._queues.get("laptop", ())) == count)


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
            client.request("POST", "/v1/responses", {**REQUEST, "input": f"turn {number}"}, BEARER)
            assert waiting(bridge, number)
        other = wire.post(bridge.address, "/v1/responses", REQUEST, {"x-api-key": "sk-other-0123456789"})
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
    monkeypatch.setattr(q.KeyQueue, name, value)
    bridge = start(*LIMITED)
    with wire.Client(bridge.address) as client:
        begin_turn(client, BEARER)
        reply = wire.post(bridge.address, "/v1/responses", REQUEST, BEARER)
        assert (reply.status, reply.header("retry-after"), reply.json["error"]["code"]) == (
            429, "10", "too_many_requests")
        gate.set()
        client.read_events()
    assert until(lambda: wire.post(bridge.address, "/v1/responses", REQUEST, BEARER).status == 200)


def test_client_that_leaves_gives_up_its_turn(start: Start, gate: threading.Event) -> None:
    bridge = start(*LIMITED)
    with wire.Client(bridge.address) as client, wire.Client(bridge.address) as impatient:
        begin_turn(client, BEARER)
        impatient.request("POST", "/v1/responses", REQUEST, BEARER)
        assert waiting(bridge, 1)
        impatient.close()
        assert waiting(bridge, 0)
        gate.set()
        client.read_events()
    assert wire.post(bridge.address, "/v1/responses", REQUEST, BEARER).status == 200


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_place_of_a_client_that_left_is_free(start: Start, gate: threading.Event, leave: str) -> None:
    bridge = start(*LIMITED)
    with wire.Client(bridge.address) as client:
        begin_turn(client, BEARER)
        getattr(client, leave)()
    assert wire.post(bridge.address, "/v1/responses", REQUEST, BEARER).status == 200


# -- key files, as other systems write them -------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_key_file_from_windows_is_read(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(f"# Schl\u00fcssel\r\nlaptop={API_KEY}\r\n".encode(encoding))
    assert [key.name for key in q.load_key_file(str(path))[0]] == ["laptop"]


def test_key_file_of_another_encoding_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(f"# Schl\u00fcssel\nlaptop={API_KEY}\n".encode("latin-1"))
    with pytest.raises(ValueError, match="save it as UTF-8"):
        q.load_key_file(str(path))


def test_a_missing_key_file_is_one_line_of_the_log(
    start: Start, tmp_path: Path, log_lines: LogLines
) -> None:
    bridge = start("--api-key-file", str(tmp_path / "keys"))
    for _ in range(3):
        assert wire.get(bridge.address, "/v1/models").status == 500
    assert len([line for line in log_lines.lines if "cannot read the key file" in line]) == 1


def test_a_key_file_without_a_key_warns(start: Start, tmp_path: Path, log_lines: LogLines) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    (tmp_path / "keys").chmod(0o600)
    bridge = start("--api-key-file", str(tmp_path / "keys"))
    assert wire.get(bridge.address, "/v1/models").status == 401
    assert log_lines.wait_for("has no key")


def test_a_body_counts_by_what_parsing_makes_of_it(
    start: Start, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "MAX_BODIES", 16 << 20)
    bridge = start()
    body = b'{"model":"gpt-5.5","input":[' + b",".join([b"{}"] * 300_000) + b"]}"  # 0.9 MB, 60 when parsed
    reply = wire.post(bridge.address, "/v1/responses", body)
    assert (reply.status, reply.json["error"]["code"]) == (503, "bridge_overloaded")
    plain = {"model": "gpt-5.5", "input": "x" * 900_000}
    assert wire.post(bridge.address, "/v1/responses", plain).status == 200


@pytest.mark.skipif(sys.platform == "darwin", reason="127.0.0.2 is no address of this host")
def test_one_machine_leaves_room_for_others(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "LOOPBACK", ())  # the test has only loopback addresses
    bridge = start("--max-connections", "8")
    server = bridge.server
    with contextlib.ExitStack() as stack:
        def connect() -> socket.socket:
            there = socket.create_connection(bridge.address, 5, ("127.0.0.2", 0))
            return stack.enter_context(contextlib.closing(there))

        idle: list[socket.socket] = []
        while len(idle) < 7:  # one after the other: the first is to be idle longest
            idle.append(connect())
            assert until(lambda: len(server._waiting) == len(idle))
        greedy = connect()  # takes the place of the first idle one
        assert idle[0].recv(100) == b""
        for each in (*idle[1:], greedy):
            each.sendall(b"POST /v1/responses HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n")
        assert until(lambda: len(server._open) == 7 and not server._waiting)  # bodies that never end
        assert [connect().recv(100)[:12] for _ in range(3)] == [b"HTTP/1.1 503"] * 3
        assert wire.get(bridge.address, "/healthz").status == 200
    assert until(lambda: not bridge.server._addresses)


@pytest.mark.skipif(sys.platform == "darwin", reason="127.0.0.2 is no address of this host")
def test_heads_that_never_end_keep_no_client_out(start: Start) -> None:
    bridge = start("--max-connections", "8")
    with contextlib.ExitStack() as stack:
        for number in range(12):
            source = ("127.0.0.2" if number % 3 else "127.0.0.3", 0)
            slow = stack.enter_context(socket.create_connection(bridge.address, 5, source))
            slow.sendall(b"GET /v1/models HTTP/1.1\r\n")
        assert until(lambda: len(bridge.server._open) == 8)
        honest = [stack.enter_context(wire.Client(bridge.address)) for _ in range(3)]
        for client in honest:
            client.request("GET", "/healthz")
            assert client.read_reply().status == 200
            assert len(bridge.server._open) <= 8  # one less while the next one is accepted


@pytest.mark.skipif(sys.platform == "darwin", reason="127.0.0.2 is no address of this host")
def test_a_machine_that_is_refused_closes_no_other_machines_connection(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "LOOPBACK", ())
    bridge = start("--max-connections", "8")
    with contextlib.ExitStack() as stack:
        def connect(address: str) -> socket.socket:
            there = socket.create_connection(bridge.address, 5, (address, 0))
            return stack.enter_context(contextlib.closing(there))

        for _ in range(7):
            connect("127.0.0.2").sendall(head(POST, HOST, JSON_TYPE, "Content-Length: 9"))
        assert until(lambda: len(bridge.server._open) == 7 and not bridge.server._waiting)
        other = connect("127.0.0.3")
        assert until(lambda: len(bridge.server._waiting) == 1)
        assert connect("127.0.0.2").recv(100).startswith(b"HTTP/1.1 503")
        other.sendall(head("GET /healthz HTTP/1.1", HOST))
        assert other.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.skipif(sys.platform == "darwin", reason="127.0.0.2 is no address of this host")
def test_clients_that_never_shake_hands_keep_no_client_out(start: Start) -> None:
    folder = wire.certificates()
    bridge = start("--max-connections", "8", "--tls-cert", str(folder / "leaf.pem"),
                   "--tls-key", str(folder / "leaf.key"))
    with contextlib.ExitStack() as stack:
        for number in range(10):
            source = ("127.0.0.2" if number % 2 else "127.0.0.3", 0)
            stack.enter_context(socket.create_connection(bridge.address, 5, source))
        assert until(lambda: len(bridge.server._open) == 8)
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        with wire.Client(bridge.address, 5, tls=context) as client:
            client.request("GET", "/healthz")
            assert client.read_reply().status == 200


def test_a_request_on_a_connection_that_has_given_way_is_not_sent(
    bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, read, set_idle = bridge.server, threading.Event(), bridge.server.set_idle

    def watched(handler: q.Handler, idle: bool) -> bool:
        if not idle:
            read.set()
        return set_idle(handler, idle)

    with wire.Client(bridge.address) as client:
        client.request("GET", "/healthz")
        client.read_reply()
        assert until(lambda: len(server._waiting) == 1)
        monkeypatch.setattr(server, "set_idle", watched)
        with server._lock:
            client.request("POST", "/v1/responses", REQUEST)
            assert read.wait(5)
            server._close_idle()
        assert client.left()
    assert until(lambda: not server._open)
    assert sent(backend) == []


def test_a_long_host_is_not_remembered(bridge: RunningBridge) -> None:
    before = q.host_allowed.cache_info().currsize
    host = "a" * 60_000
    assert wire.get(bridge.address, "/healthz", {"Host": host}).status == 403
    assert q.host_allowed.cache_info().currsize == before


# -- what parsing makes of a body counts ----------------------------------------------

PARTS: dict[str, bytes] = {
    "empty lists": b"[]",
    "empty objects": b"{}",
    "objects": b'{"a":1}',
    "nested lists": b"[[[[]]]]",
    "keys": b'{"a":{"b":{"c":0}}}',
    "words": b'"ab"',
    "decimals": b"1.5",
    "large numbers": b"4294967296",
    "short messages": b'{"role":"user","content":"hi"}',
}


def body_of(part: bytes, size: int) -> bytes:
    """Return a request of so many bytes whose input is a list of these."""
    count = size // (len(part) + 1)
    return b'{"model":"gpt-5.5","stream":true,"input":[' + b",".join([part] * count) + b"]}"


def text_body(size: int) -> bytes:
    """Return a request of so many bytes whose input is one text."""
    return b'{"model":"gpt-5.5","stream":true,"input":"' + b"x" * size + b'"}'


@pytest.mark.parametrize("part", PARTS)
def test_body_counts_as_what_parsing_makes_of_it(
    part: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "MAX_BODIES", 1 << 20)
    parsed, decode = [], q.CLIENT_DECODER.decode

    def watched(text: str) -> object:
        parsed.append(len(text))
        return decode(text)

    monkeypatch.setattr(q.CLIENT_DECODER, "decode", watched)
    reply = wire.post(start().address, "/v1/responses", body_of(PARTS[part], 700_000))
    assert reply.status in (413, 503)
    assert parsed == []  # it was refused before it cost anything


def test_text_counts_as_little_more_than_itself(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "MAX_BODIES", 1 << 20)
    assert wire.post(start().address, "/v1/responses", text_body(120_000)).status == 200


@pytest.mark.parametrize("part", ['{"a":1}', "[],[],[]", '"\\"[{,'])
def test_brackets_within_a_text_are_text(part: str, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "MAX_BODIES", 32 << 20)  # an estimate may count them all the same
    body = wire.dump({**STREAM, "input": part * (200_000 // len(part))})
    assert wire.post(start().address, "/v1/responses", body).status == 200


def test_room_of_an_estimate_is_given_back(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "MAX_BODIES", 2 << 20)
    bridge = start()
    for _ in range(12):
        body = body_of(PARTS["short messages"], 30_000)
        assert wire.post(bridge.address, "/v1/responses", body).status in (200, 400)
        assert wire.post(bridge.address, "/v1/responses", body_of(b"[]", 700_000)).status in (413, 503)
    assert wire.post(bridge.address, "/v1/responses", text_body(100_000)).status == 200


SMALL_BOUNDS = """
import sys
sys.path.insert(0, {code!r})
import qoo_bridge as q
q.MAX_BODIES, q.STORE_SIZE = {bodies}, {store}
sys.exit(q.main())
"""
BODIES, STORE = 32 << 20, 8 << 20  # bytes
STORMS: dict[str, tuple[Callable[[int], bytes], bool]] = {
    "texts": (text_body, False),
    "frames of texts": (text_body, True),
    "lists": (lambda size: body_of(b"[]", size), False),
    "short messages": (lambda size: body_of(PARTS["short messages"], size), False),
    "frames of lists": (lambda size: body_of(b"[]", size), True),
}


def peak(process: int) -> int:
    """Return the most memory that a process has had, in bytes."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text("ascii"))
    assert match
    return int(match[1]) << 10


def send_body(address: wire.Address, body: bytes, websocket: bool, statuses: list[int]) -> None:
    """Send one large request by either transport; note how it was answered, -1 for an ended connection."""
    status = -1
    with contextlib.suppress(OSError, wire.PeerLeft), wire.WebSocketClient(address) as client:
        if websocket:
            assert isinstance(client, wire.WebSocketClient)
            client.connect("/v1/responses")
            frame = b'{"type":"response.create",' + body[1:]
            client.send_frame(wire.Frame(wire.TEXT, frame, masked=True))
            last = client.read_turn()[-1]
            status = last.get("status", 200)
        else:
            client.request("POST", "/v1/responses", body)
            status = client.read_reply().status
    statuses.append(status)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
@pytest.mark.parametrize("storm", STORMS)
def test_peak_of_the_process_is_within_its_bounds(
    storm: str, run: Run, backend: wire.Backend, tmp_path: Path, bytecode: Path
) -> None:
    make, websocket = STORMS[storm]
    program = tmp_path / "bridge_with_small_bounds.py"
    program.write_text(SMALL_BOUNDS.format(code=str(bytecode.parent), bodies=BODIES, store=STORE), "utf-8")
    backend.always("/responses", wire.turn(*wire.text_turn()))
    backend.on_frame(*[lambda ws, _: ws.events(*wire.text_turn())] * 8)
    running: Process = run(program=program)
    wire.post(running.address, "/v1/responses", STREAM)
    before = peak(running.process.pid)
    body, statuses = make(3 << 20), list[int]()
    words = (running.address, body, websocket, statuses)
    threads = [threading.Thread(target=send_body, args=words) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert peak(running.process.pid) - before <= 1.3 * (BODIES + STORE)
    if "texts" in storm:
        assert 200 in statuses
    assert wire.get(running.address, "/healthz").status == 200


def test_waiting_for_a_place_stands_in_the_status(start: Start, gate: threading.Event) -> None:
    bridge = start(*LIMITED)

    def waits() -> list[bool]:
        return [row["waiting"] for row in wire.get(bridge.address, "/status", BEARER).json["open"]]

    with wire.Client(bridge.address) as first, wire.Client(bridge.address) as second:
        begin_turn(first, BEARER)
        second.request("POST", "/v1/responses", {**REQUEST, "input": "second"}, BEARER)
        assert until(lambda: sorted(waits()) == [False, True])
        gate.set()
        assert first.read_events()[-1]["type"] == "response.completed"
        assert second.read_reply().status == 200
    assert until(lambda: waits() == [])
