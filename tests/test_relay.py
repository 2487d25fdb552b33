"""Sections 14 and 15, relay and handler: what a client gets and when, and how either side ends."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import wire
from conftest import RunningBridge, Start

import qoo_bridge as q

BODY = {"model": "gpt-5.5", "stream": True, "input": "hi"}
CODEX = {"User-Agent": "codex_exec/0.169.0 (Debian 12.0.0; x86_64)", "Originator": "codex_exec"}
FIRST, *MIDDLE, LAST = wire.text_turn("hello", empty_output=False)
TURN = [FIRST, *MIDDLE, LAST]
WHOLE = b"".join(map(wire.sse_bytes, TURN))
DELTA = wire.sse_bytes({"type": "response.output_text.delta", "delta": "x"})
BRISK = ("--keepalive", "0.03")
@pytest.fixture
def logged(backend: wire.Backend) -> Iterator[list[str]]:
    """Collect what is logged, formatted with its level and traceback."""
    backend.routing = (backend.origin, "NO_CONSTRAINT")  # any other is worth a warning
    lines: list[str] = []
    form = logging.Formatter("%(levelname)s %(message)s")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(form.format(record))  # type: ignore[method-assign]
    logger = logging.getLogger("qoo_bridge")
    before = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(before)


@contextlib.contextmanager
def asking(
    bridge: RunningBridge, headers: dict[str, str] | None = None, **changes: Any
) -> Iterator[wire.Client]:
    """Send a request for a turn, and give the connection."""
    with wire.Client(bridge.address) as client:
        client.request("POST", "/v1/responses", {**BODY, **changes}, headers)
        yield client


def ask(bridge: RunningBridge, headers: dict[str, str] | None = None, **changes: Any) -> wire.RawReply:
    """Ask for a turn and read the whole reply."""
    with asking(bridge, headers, **changes) as client:
        return client.read_reply()


def raw_request(version: str = "1.1", *fields: str, path: str = "/v1/responses") -> bytes:
    """Write a request for a turn as it stands on the wire."""
    body = wire.dump(BODY)
    lines = [
        f"POST {path} HTTP/{version}",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *fields,
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body


def ended(logged: list[str], path: str = "/v1/responses") -> list[str]:
    """Wait for the request to be over; return the log's lines about that path."""
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        lines = [line for line in logged if f" {path} " in line and " end=" in line]
        if lines:
            return lines
        threading.Event().wait(0.005)
    raise AssertionError(f"no line about {path} in {logged}")


# -- as it comes ------------------------------------------------------------------


@pytest.mark.parametrize("headers", [CODEX, {}], ids=["codex", "other"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_no_event_waits_for_the_next(
    version: str, headers: dict[str, str], bridge: RunningBridge, backend: wire.Backend
) -> None:
    gates = [threading.Event() for _ in TURN]

    def reply(exchange: wire.Exchange) -> None:
        exchange.head()
        for event, gate in zip(TURN, gates):
            exchange.event(event)
            assert gate.wait(5)
        exchange.finish()

    backend.on("/responses", reply)
    with wire.Client(bridge.address) as client:
        client.send(raw_request(version, *(f"{name}: {value}" for name, value in headers.items())))
        assert client.read_head().status == 200
        for event, gate in zip(TURN, gates):
            assert client.read_event() == event
            gate.set()
        assert client.read_event() is None


def test_stream_to_1_1_is_chunked(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", wire.turn(*TURN))
    reply = ask(bridge)
    assert reply.header("transfer-encoding") == "chunked"
    assert reply.header("content-length") is None
    assert reply.header("content-type") == "text/event-stream; charset=utf-8"
    assert (reply.ended, reply.body) == ("last-chunk", WHOLE)


@pytest.mark.parametrize("fields", [(), ("Connection: keep-alive",)])
def test_stream_to_1_0_ends_with_the_connection(
    fields: tuple[str, ...], bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on("/responses", wire.turn(*TURN))
    reply = wire.raw(bridge.address, raw_request("1.0", *fields))
    assert reply.header("transfer-encoding") is None
    assert reply.header("connection") == "close"
    assert (reply.ended, reply.body) == ("close", WHOLE)


def test_headers_cross_by_their_list(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on(
        "/responses",
        wire.turn(
            *TURN,
            headers=[
                *wire.TURN_HEADERS,
                ("x-qoo-bridge-error", "forged"),
                ("connection", "x-hop"),
                ("x-accel-redirect", "/etc"),
            ],
        ),
    )
    reply = ask(bridge)
    assert reply.header("x-codex-turn-state") == "ts-sticky-1"
    assert reply.header("openai-processing-ms") == "214"
    assert reply.header("cf-ray") is not None
    for name in ("set-cookie", "server", "x-qoo-bridge-error", "x-accel-redirect"):
        assert reply.header(name) is None


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_stream_in_pieces_arrives_whole(size: int, bridge: RunningBridge, backend: wire.Backend) -> None:
    def reply(exchange: wire.Exchange) -> None:
        exchange.head()
        for at in range(0, len(WHOLE), size):
            exchange.chunk(WHOLE[at : at + size])
        exchange.finish()

    backend.on("/responses", reply)
    answer = ask(bridge)
    assert (answer.ended, answer.body) == ("last-chunk", WHOLE)


BLANK_LINE_LAST = re.compile(rb"(?:\r\n|\n|\r)(?:\r\n|\n|\r)\Z")


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_events_cut_at_every_byte_stay_whole(line_end: bytes) -> None:
    turn = b"".join([wire.sse_bytes(FIRST), DELTA, wire.sse_bytes(LAST)]).replace(b"\n", line_end)
    for cut in range(len(turn) + 1):
        copy = q.ResponsesOutput(codex=False)
        pieces = [copy.feed(turn[:cut]), copy.feed(turn[cut:])]
        joined = b"".join(pieces)
        assert turn[: len(joined)] == joined
        assert turn[len(joined) :] in (b"", b"\n")  # a CR may end the blank line: nobody waits for its LF
        assert copy.done
        assert all(BLANK_LINE_LAST.search(piece) for piece in pieces if piece)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_events_are_counted(line_end: bytes) -> None:
    copy = q.ResponsesOutput(codex=False)
    for event in TURN:
        copy.feed(wire.sse_bytes(event).replace(b"\n", line_end))
    assert copy.count == len(TURN)


def test_event_of_a_megabyte_arrives(bridge: RunningBridge, backend: wire.Backend) -> None:
    image = {"type": "response.image_generation_call.partial_image", "partial_image_b64": "A" * 1_000_000}
    backend.on("/responses", wire.turn(FIRST, image, LAST))
    assert wire.sse(ask(bridge).body) == [FIRST, image, LAST]


def test_text_with_line_separators_is_not_cut(bridge: RunningBridge, backend: wire.Backend) -> None:
    odd = 'data: {"type":"response.output_text.delta","delta":"a\u2028b\u0085c\x0b"}\n\n'.encode()
    backend.on("/responses", wire.turn(FIRST, odd, LAST))
    assert odd in ask(bridge).body


# -- the terminal event -------------------------------------------------------------


@pytest.mark.parametrize(
    "last", [LAST, wire.failed("server_error", "no"), wire.incomplete()], ids=lambda event: event["type"]
)
def test_terminal_event_ends_the_stream(
    last: wire.Event, bridge: RunningBridge, backend: wire.Backend
) -> None:
    left = threading.Event()
    backend.on("/responses", wire.hang(FIRST, last, left=left))
    with asking(bridge) as client:
        reply = client.read_reply()
        assert (reply.ended, wire.sse(reply.body)) == ("last-chunk", [FIRST, last])
        assert left.wait(1)
        client.request("POST", "/v1/responses", BODY)  # the client's connection goes on
        assert client.read_reply().ended == "last-chunk"


def test_nothing_follows_the_terminal_event(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", wire.turn(FIRST, wire.sse_bytes(LAST) + DELTA, DELTA))
    assert wire.sse(ask(bridge).body) == [FIRST, LAST]


def test_body_that_ends_with_the_terminal_event_keeps_its_connection(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    assert [ask(bridge).ended for _ in range(6)] == ["last-chunk"] * 6
    used = [each.connection for each in backend.wait_for(6, "/responses")]
    assert len(set(used)) < len(used)


ITEMS = [wire.reasoning_item("rs_1"), wire.message_item("hello", "msg_1")]


def done(index: int, item: Any) -> wire.Event:
    """Return the event that carries an item."""
    return {"type": "response.output_item.done", "output_index": index, "item": item}


def test_empty_output_is_filled(bridge: RunningBridge, backend: wire.Backend) -> None:
    last = wire.completed("resp_1")
    backend.on("/responses", wire.turn(FIRST, done(1, ITEMS[1]), done(0, ITEMS[0]), last))
    events = wire.sse(ask(bridge).body)
    assert events[-1] == {**last, "response": {**last["response"], "output": ITEMS}}
    assert events[:-1] == [FIRST, done(1, ITEMS[1]), done(0, ITEMS[0])]


@pytest.mark.parametrize(
    "last",
    [
        wire.completed("resp_1", output=ITEMS[:1]),
        {"type": "response.completed", "response": None},
        {"type": "response.completed", "response": []},
        {"type": "response.completed"},
    ],
    ids=["filled", "null", "list", "none"],
)
def test_other_terminal_events_are_left_alone(
    last: wire.Event, bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on("/responses", wire.turn(FIRST, done(0, ITEMS[1]), last))
    assert ask(bridge).body.endswith(wire.sse_bytes(last))


# -- a cut stays a cut --------------------------------------------------------------

CUTS: dict[str, wire.Reply] = {
    "FIN": wire.cut(FIRST),
    "RST": wire.cut(FIRST, by="reset"),
    "FIN-in-an-event": wire.cut(FIRST, DELTA[:20]),
    "RST-in-an-event": wire.cut(FIRST, DELTA[:20], by="reset"),
    "clean-end": wire.turn(FIRST),
    "clean-end-in-an-event": wire.turn(FIRST, DELTA[:20]),
    "clean-end-in-the-terminal-event": wire.turn(FIRST, wire.sse_bytes(LAST)[:-1]),
    "no-event-at-all": wire.turn(),
}


def bad_chunk(exchange: wire.Exchange) -> None:
    """Answer with one event, and then with what is no chunk."""
    exchange.head()
    exchange.event(FIRST)
    exchange.send(b"zz\r\nnot a chunk\r\n")


CUTS["bad-chunk"] = bad_chunk


SEEN_FIRST = CUTS.keys() - {
    "no-event-at-all",
    "bad-chunk",
    "RST",
    "RST-in-an-event",
}  # an event is sure to pass


@pytest.mark.parametrize("name", CUTS)
def test_cut_is_seen(name: str, bridge: RunningBridge, backend: wire.Backend, logged: list[str]) -> None:
    backend.on("/responses", CUTS[name])
    reply = ask(bridge)
    if reply.status == 200:  # the head may go out before the cut is seen, where no event comes with it
        assert reply.ended == "cut"
        assert reply.body in (wire.sse_bytes(FIRST), b"")  # what is whole, and nothing torn
        assert "end=cut" in ended(logged)[0]
    assert reply.status == 200 or (reply.status == 502 and name not in SEEN_FIRST)
    assert name not in SEEN_FIRST or reply.body
    assert not any(line.startswith(("ERROR", "CRITICAL")) for line in logged)


@pytest.mark.parametrize("name", CUTS)
def test_cut_of_what_is_folded_is_502(name: str, bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", CUTS[name])
    reply = ask(bridge, stream=False)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (502, "bridge")
    assert reply.json["error"]["message"]


# -- silence ------------------------------------------------------------------------

KEEPALIVE = {"type": "keepalive"}


@pytest.mark.parametrize(
    ("headers", "filler"), [(CODEX, KEEPALIVE), ({}, "keepalive")], ids=["codex", "other"]
)
@pytest.mark.parametrize(
    "begun", [b"", DELTA[:1], DELTA[:30], DELTA[:-1]], ids=["between", "1-byte", "30-bytes", "all-but-1"]
)
def test_silence_is_filled_between_events(
    begun: bytes, headers: dict[str, str], filler: Any, start: Start, backend: wire.Backend
) -> None:
    gate = threading.Event()
    backend.on("/responses", wire.gated(gate, [FIRST, begun], [DELTA[len(begun) :], LAST]))
    with asking(start(*BRISK), headers) as client:
        client.read_head()
        assert client.read_event() == FIRST
        assert [client.read_event() for _ in range(2)] == [filler] * 2
        gate.set()
        rest = [event for event in iter(client.read_event, None) if event != filler]
        assert rest == [json.loads(DELTA.partition(b"data: ")[2]), LAST]
        assert client.reply is not None
        assert client.reply.ended == "last-chunk"


def test_silence_before_the_head_leaves_the_status_open(start: Start, backend: wire.Backend) -> None:
    gate = threading.Event()

    def reply(exchange: wire.Exchange) -> None:
        gate.wait(5)
        exchange.json(400, {"detail": "No"})

    backend.on("/responses", reply)
    with asking(start(*BRISK)) as client:
        client.sock.settimeout(0.2)
        with pytest.raises(socket.timeout):
            client.read_head()
        gate.set()
        client.sock.settimeout(5)
        assert client.read_reply().status == 400


def drip(exchange: wire.Exchange) -> None:
    """Answer with an event that comes byte by byte, each well before the silence is filled."""
    exchange.head()
    exchange.event(FIRST)
    for at in range(len(DELTA)):
        exchange.chunk(DELTA[at : at + 1])
        threading.Event().wait(0.003)
    exchange.events(LAST)
    exchange.finish()


def test_event_that_drips_arrives_whole(start: Start, backend: wire.Backend) -> None:
    backend.on("/responses", drip)
    reply = ask(start(*BRISK))
    assert [event for event in wire.sse(reply.body) if event != KEEPALIVE] == [
        FIRST,
        json.loads(DELTA.partition(b"data: ")[2]),
        LAST,
    ]
    assert reply.ended == "last-chunk"


def test_event_that_drips_is_silence_to_the_client(start: Start, backend: wire.Backend) -> None:
    backend.on("/responses", drip)
    assert KEEPALIVE in wire.sse(ask(start(*BRISK), CODEX).body)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        ("--keepalive", "0.03", "--idle-timeout", "0.1"),
        pytest.param(
            ("--keepalive", "2", "--idle-timeout", "0.1")),
    ],
)
def test_endless_silence_is_given_up(
    options: tuple[str, ...], stream: bool, start: Start, backend: wire.Backend
) -> None:
    left = threading.Event()
    backend.on("/responses", wire.hang(FIRST, left=left))
    bridge = start(*options)
    with asking(bridge, stream=stream) as client:
        assert left.wait(0.5)
        reply = client.read_reply()
    assert (reply.status, reply.ended) == ((200, "cut") if stream else (504, "length"))


# -- a client that leaves -------------------------------------------------------------

MOMENTS: dict[str, list[Any]] = {
    "before-the-head": [],
    "after-the-head": [b""],
    "in-silence": [FIRST],
    "in-an-event": [FIRST, DELTA[:20]],
}


@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "folded"])
def test_client_that_leaves_ends_the_turn(
    stream: bool, moment: str, how: str, bridge: RunningBridge, backend: wire.Backend, logged: list[str]
) -> None:
    left = threading.Event()
    backend.on("/responses", wire.hang(*MOMENTS[moment], left=left))
    with asking(bridge, stream=stream) as client:
        backend.wait_for(1, "/responses")
        if stream and FIRST in MOMENTS[moment]:
            client.read_head()
            assert client.read_event() == FIRST
        getattr(client, how)()
        assert left.wait(1)
    assert "end=client" in ended(logged)[0]
    assert not any(line.startswith(("ERROR", "WARNING")) or "Traceback" in line for line in logged)


@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
def test_client_that_leaves_after_the_terminal_event_is_no_error(
    how: str, bridge: RunningBridge, backend: wire.Backend, logged: list[str]
) -> None:
    gone = threading.Event()

    def reply(exchange: wire.Exchange) -> None:
        exchange.head()
        exchange.events(*TURN)
        gone.wait(5)
        with contextlib.suppress(OSError):
            exchange.finish()

    backend.on("/responses", reply)
    with asking(bridge) as client:
        client.read_head()
        while client.read_event() != LAST:
            pass
        getattr(client, how)()
        gone.set()
    assert "status=200" in ended(logged)[0]
    assert not any(line.startswith(("ERROR", "WARNING")) or "Traceback" in line for line in logged)
    assert ask(bridge).ended == "last-chunk"


@pytest.mark.parametrize("step", ["end", "send_json"])
def test_reply_is_closed_when_the_client_left_in_between(
    step: str,
    bridge: RunningBridge,
    backend: wire.Backend,
    logged: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def leave(*_: Any) -> None:
        raise q.ClientLeft("left")

    monkeypatch.setattr(q.Exchange, step, leave)
    backend.on("/responses", wire.turn(*TURN))
    assert not left_open(bridge, logged, monkeypatch, stream=step == "end")


def test_reply_is_closed_when_its_fold_is_an_error(
    bridge: RunningBridge, backend: wire.Backend, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.on("/responses", wire.turn(FIRST, wire.failed("server_error", "no")))
    assert not left_open(bridge, logged, monkeypatch, stream=False)


def left_open(
    bridge: RunningBridge, logged: list[str], monkeypatch: pytest.MonkeyPatch, stream: bool = True
) -> bool:
    """Ask for a turn; tell whether its upstream connection is neither closed nor back in the pool."""
    replies: list[q.Reply] = []
    plain_send_turn = q.Bridge.send_turn

    def send_turn(*given: Any) -> q.Reply:
        replies.append(plain_send_turn(*given))
        return replies[-1]

    monkeypatch.setattr(q.Bridge, "send_turn", send_turn)
    with asking(bridge, stream=stream):
        ended(logged)
    peer = replies[0].connection
    forgotten = peer.sock.fileno() >= 0 and not any(
        held is peer for _, _, held in bridge.bridge.upstream._idle
    )
    if forgotten:
        peer.close()
    return forgotten


def test_client_that_breaks_off_in_its_request_is_no_fault(
    bridge: RunningBridge, backend: wire.Backend, logged: list[str]
) -> None:
    with wire.Client(bridge.address) as client:
        client.send(raw_request()[:-5])
    assert "end=client" in ended(logged)[0]
    assert backend.requests == []


def test_client_that_resets_in_its_request_is_no_fault(bridge: RunningBridge, logged: list[str]) -> None:
    with wire.Client(bridge.address) as client:
        client.send(raw_request()[:-5])
        while not bridge.bridge.telemetry.snapshot(time.time())["open"]:  # its head is still to be read
            threading.Event().wait(0.005)
        client.reset()
    lines = ended(logged)
    bridge.faults.clear()
    assert "end=client" in lines[0]
    assert not any("Traceback" in line for line in logged)


def test_client_that_leaves_before_100_is_no_fault(
    bridge: RunningBridge, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with wire.Client(bridge.address) as client, monkeypatch.context() as patched:
        patched.setattr(q.Connection, "send", broken)
        client.send(raw_request("1.1", "Expect: 100-continue").partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
        lines = ended(logged)
    bridge.faults.clear()
    assert "end=client" in lines[0]
    assert not any("Traceback" in line for line in logged)


def test_reader_that_stops_is_cut_and_costs_little(
    bridge: RunningBridge, backend: wire.Backend, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "WRITE_TIMEOUT", 0.2)
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
        assert "stopped" in ended(logged)[0]


def test_slow_reader_gets_everything(
    bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "WRITE_TIMEOUT", 2)
    events = [{"type": "response.output_text.delta", "n": n, "delta": "x" * 65536} for n in range(96)]
    backend.on("/responses", wire.turn(FIRST, *events, LAST))
    with asking(bridge) as client:
        client.read_head()
        threading.Event().wait(0.3)  # by now the bridge waits for room
        assert [event.get("n") for event in client.read_events()] == [None, *range(96), None]
        assert client.reply is not None
        assert client.reply.ended == "last-chunk"


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
            client.request("POST", "/v1/responses", {**BODY, "stream": stream})
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


@pytest.mark.parametrize(
    ("path", "status"), [("/healthz", 200), ("/v1/models", 200), ("/v1/responses", 405), ("/nothing", 404)]
)
def test_head_has_no_body(path: str, status: int, bridge: RunningBridge) -> None:
    with wire.Client(bridge.address) as client:
        client.request("HEAD", path)
        reply = client.read_reply()
        assert (reply.status, reply.body, bytes(client.reader.buffer)) == (status, b"", b"")
        client.request("GET", "/healthz")
        assert client.read_reply().status == 200


@pytest.mark.parametrize("expect", ["100-continue", "100-Continue"])
def test_100_continue_is_sent_before_the_body(expect: str, bridge: RunningBridge) -> None:
    head, blank, body = raw_request("1.1", f"Expect: {expect}").partition(b"\r\n\r\n")
    with wire.Client(bridge.address) as client:
        client.send(head + blank)
        assert client.reader.line() == b"HTTP/1.1 100 Continue"
        assert client.reader.line() == b""
        client.send(body)
        assert client.read_reply().status == 200


@pytest.mark.parametrize("path", ["/nothing", "/v1/models"])
def test_100_continue_is_not_sent_to_who_is_refused(path: str, bridge: RunningBridge) -> None:
    head, blank, _ = raw_request("1.1", "Expect: 100-continue", path=path).partition(b"\r\n\r\n")
    with wire.Client(bridge.address) as client:
        client.send(head + blank)
        reply = client.read_reply()
        assert reply.status in (404, 405)
        assert reply.interim == []
        assert client.left(2)  # the body was never read, and is never taken for a request


# -- folded -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"stream": False}, {"stream": None}], ids=repr)
def test_fold_is_one_response(changes: dict[str, Any], bridge: RunningBridge, backend: wire.Backend) -> None:
    last = wire.completed("resp_1")
    backend.on("/responses", wire.turn(FIRST, done(1, ITEMS[1]), done(0, ITEMS[0]), last))
    reply = ask(bridge, **changes)
    assert (reply.status, reply.ended) == (200, "length")
    assert reply.header("content-type") == "application/json"
    assert reply.json == {**last["response"], "output": ITEMS}
    assert reply.json["usage"] == wire.USAGE


def test_fold_without_the_field(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", wire.turn(*TURN))
    assert (
        wire.post(bridge.address, "/v1/responses", {"model": "gpt-5.5", "input": "hi"}).json
        == LAST["response"]
    )


def test_fold_keeps_incomplete(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", wire.turn(FIRST, done(0, ITEMS[1]), wire.incomplete("content_filter")))
    reply = ask(bridge, stream=False)
    assert reply.status == 200
    assert reply.json["status"] == "incomplete"
    assert reply.json["incomplete_details"] == {"reason": "content_filter"}
    assert reply.json["output"] == ITEMS[1:]


FAILURES = [
    ("rate_limit_exceeded", 429),
    ("usage_limit_reached", 429),
    ("server_is_overloaded", 503),
    ("slow_down", 503),
    ("context_length_exceeded", 400),
    ("invalid_prompt", 400),
    ("server_error", 502),
    ("", 502),
    ("unheard_of", 502),
]


@pytest.mark.parametrize(("code", "status"), FAILURES)
def test_failure_becomes_a_status(
    code: str, status: int, bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on("/responses", wire.turn(FIRST, wire.failed(code, "The reason")))
    reply = ask(bridge, stream=False)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (status, "upstream")
    assert reply.json["error"]["message"] == "The reason"
    assert reply.json["error"]["code"] == code


@pytest.mark.parametrize(("code", "status"), [("rate_limit_exceeded", 429), ("invalid_prompt", 400)])
@pytest.mark.parametrize("nested", [True, False])
def test_bare_error_event_becomes_a_status(
    nested: bool, code: str, status: int, bridge: RunningBridge, backend: wire.Backend
) -> None:
    error = {"code": code, "message": "The reason"}
    backend.on("/responses", wire.turn(FIRST, {"type": "error", **({"error": error} if nested else error)}))
    reply = ask(bridge, stream=False)
    assert reply.status == status
    assert reply.json["error"]["message"] == "The reason"


@pytest.mark.parametrize(
    "event",
    [
        b"data: [DONE]\n\n",
        b"data: \n\n",
        b": comment\n\n",
        b"\n\n",
        b"data: {\n\n",
        b"event: response.completed\n\n",
        b'data: "response.completed"\n\n',
        b'data: {"type":["response.completed"]}\n\n',
        b'data: {"type":5}\n\n',
        b'data: {"type":"response.output_item.done"}\n\n',
        b"data: " + b"[" * 50_000 + b"\n\n",
        b"data: \xff\n\n",
        b'data: {"type":"response.output_item.done","output_index":"1","item":5}\n\n',
    ],
    ids=lambda event: repr(event[:40]),
)
@pytest.mark.parametrize("stream", [True, False])
def test_odd_event_breaks_nothing(
    stream: bool, event: bytes, bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on("/responses", wire.turn(FIRST, event, LAST))
    reply = ask(bridge, stream=stream)
    assert reply.status == 200
    if stream:
        assert (reply.ended, reply.body) == (
            "last-chunk",
            wire.sse_bytes(FIRST) + event + wire.sse_bytes(LAST),
        )
    else:
        assert reply.json == LAST["response"]


# -- the log --------------------------------------------------------------------------------

LINE = re.compile(
    r"INFO [0-9a-f]{8} 127\.0\.0\.1 POST /v1/responses (?P<model>\S+)->(?P<slug>\S+) rules=(?P<rules>\S+) "
    r"repairs=(?P<repairs>\S+) status=(?P<status>\d+) first_byte=(?P<first>-|\d+ms) total=\d+ms "
    r"events=(?P<events>\d+) bytes=(?P<bytes>\d+) tokens=(?P<tokens>\S+) "
    r"end=(?P<end>\S+)(?P<error> error=\S+)?"
)


def fields_of(lines: list[str]) -> dict[str, str]:
    """Take the one line of a request apart."""
    assert len(lines) == 1
    match = LINE.fullmatch(lines[0])
    assert match, lines[0]
    return {name: value or "" for name, value in match.groupdict().items()}


def test_log_line_tells_what_happened(
    bridge: RunningBridge, backend: wire.Backend, logged: list[str]
) -> None:
    backend.on("/responses", wire.turn(*TURN))
    reply = ask(bridge)
    found = fields_of(ended(logged))
    assert (found["model"], found["slug"], found["status"], found["end"]) == (
        "gpt-5.5",
        "gpt-5.5",
        "200",
        "completed",
    )
    assert int(found["events"]) == len(TURN)
    assert int(found["bytes"]) == len(reply.body)
    assert found["tokens"] == "input:32,cached:16,output:9,reasoning:4"
    assert found["first"] != "-"
    assert found["rules"] != "-"
    assert (found["repairs"], found["error"]) == ("-", "")


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (wire.turn(FIRST, wire.failed("server_error", "no")),
         ("200", "failed", " error=upstream:server_error")),
        (wire.turn(FIRST, wire.incomplete()), ("200", "incomplete", "")),
        (wire.turn(FIRST), ("200", "cut", " error=bridge:upstream_error")),
        (wire.usage_limit(), ("429", "error", " error=upstream:usage_limit_reached")),
    ],
    ids=["failed", "incomplete", "cut", "429"],
)
def test_log_line_tells_how_it_ended(
    reply: wire.Reply,
    told: tuple[str, str, str],
    bridge: RunningBridge,
    backend: wire.Backend,
    logged: list[str],
) -> None:
    backend.on("/responses", reply)
    ask(bridge)
    found = fields_of(ended(logged))
    assert (found["status"], found["end"], found["error"]) == told


def test_events_are_counted_while_they_come(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", wire.hang(FIRST, *TURN[1:3]))
    with wire.Client(bridge.address) as client:
        client.request("POST", "/v1/responses", BODY)
        assert client.read_head().status == 200
        for _ in range(3):
            assert client.read_event() is not None
        (row,) = wire.get(bridge.address, "/status").json["open"]
    assert row["events"] == 3


def test_log_line_names_the_rules_and_repairs(
    bridge: RunningBridge, backend: wire.Backend, logged: list[str]
) -> None:
    backend.on("/responses", wire.refuse(400, "Unsupported parameter: text"))
    assert ask(bridge, text={"verbosity": "low"}, temperature=1).header("x-qoo-bridge-repaired")
    found = fields_of(ended(logged))
    assert "drop-unsupported" in found["rules"]
    assert found["repairs"] != "-"


@pytest.mark.parametrize("status", [200, 400, 401, 403, 500])
def test_log_tells_no_secret(
    status: int, bridge: RunningBridge, backend: wire.Backend, logged: list[str]
) -> None:
    tokens = set(backend.tokens.values())
    if status != 200:
        backend.on("/responses", *[wire.refuse(status, "REPLY-BODY")] * 2)
    headers = {
        "Authorization": "Bearer CLIENT-KEY",
        "X-Api-Key": "CLIENT-KEY",
        "Cookie": "COOKIE=1",
        "Session-Id": "HEADER-VALUE",
        "X-Secret": "HEADER-VALUE",
        "User-Agent": "HEADER-VALUE/1.0",
    }
    assert ask(bridge, headers, input="REQUEST-BODY", instructions="REQUEST-BODY").status == status
    ended(logged)
    secrets = {
        *tokens,
        *backend.tokens.values(),
        "CLIENT-KEY",
        "COOKIE",
        "HEADER-VALUE",
        "REQUEST-BODY",
        "REPLY-BODY",
        backend.account_id,
        "secret-of-the-host",
    }
    assert [secret for secret in secrets for line in logged if secret in line] == []
