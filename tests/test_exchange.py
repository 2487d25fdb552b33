"""Room exchange: how a body is read, what a client gets and when, and how either side ends."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import re
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import wire
from conftest import LogLines, RunningBridge, SharedBridges, Start
from help import (
    BODY,
    CANARY,
    CHAT,
    CODEX,
    EACH_API,
    EVENTS,
    FIRST,
    HOST,
    JSON_TYPE,
    LAST,
    LITE,
    MODEL,
    ORIGIN,
    OTHER,
    POST,
    REQUEST,
    RESPONSES,
    STREAM,
    TEXT,
    USER,
    Object,
    ask,
    asking,
    chunks,
    head,
    models,
    raw_request,
    refused,
    script,
    settle,
    until,
)

import qoo_bridge as q

WHOLE = b"".join(map(wire.sse_bytes, EVENTS))
DELTA = wire.sse_bytes({"type": "response.output_text.delta", "delta": "x"})
BRISK = ("--keepalive", "0.02")


# -- reading a body -----------------------------------------------------------


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
def test_malformed_chunking_is_refused_and_closed(shared_bridge: RunningBridge, coded: bytes) -> None:
    refused(shared_bridge, head(POST, HOST, JSON_TYPE, "Transfer-Encoding: chunked") + coded, 400)


def test_trailers_without_an_end_are_refused(shared_bridge: RunningBridge) -> None:
    coded = b"2\r\n{}\r\n0\r\n" + b"X-A: 1\r\n" * 5000
    reply = wire.raw(shared_bridge.address, head(POST, HOST, JSON_TYPE, "Transfer-Encoding: chunked") + coded)
    assert (reply.status, reply.header("connection"), reply.rest) == (400, "close", b"")


@pytest.mark.parametrize("coded", [
    pytest.param(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY), id="one-chunk"),
    pytest.param(b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n", id="a-chunk-a-byte"),
    pytest.param(b"%X;name=value\r\n%b\r\n000;last\r\nX-Trailer: 1\r\n\r\n" % (len(BODY), BODY),
                 id="extensions"),
])
def test_chunked_body_is_read_and_the_next_request_with_it(
    shared_bridge: RunningBridge, coded: bytes
) -> None:
    with wire.Client(shared_bridge.address) as client:
        client.send(head(POST, HOST, JSON_TYPE, "Transfer-Encoding: chunked") + coded + CANARY)
        assert client.read_reply().json["status"] == "completed"
        assert client.read_reply().json["status"] == "ok"


def test_chunked_body_of_http_1_0_closes(shared_bridge: RunningBridge) -> None:
    request = head("POST /v1/responses HTTP/1.0", HOST, JSON_TYPE, "Connection: keep-alive",
                   "Transfer-Encoding: chunked")
    reply = wire.raw(shared_bridge.address, request + b"2\r\n{}\r\n0\r\n\r\n")
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
    shared_bridge: RunningBridge, lines: tuple[str, ...], status: int
) -> None:
    refused(shared_bridge, head(*lines, f"Content-Length: {len(CANARY)}"), status)
    refused(shared_bridge, head(*lines, "Transfer-Encoding: chunked") + b"%x\r\n" % len(CANARY), status)


@pytest.mark.parametrize("line", ["GET /healthz HTTP/1.1", "GET /v1/models HTTP/1.1",
                                  "OPTIONS /v1/models HTTP/1.1"])
def test_body_of_a_get_is_never_the_next_request(shared_bridge: RunningBridge, line: str) -> None:
    request = head(line, HOST, f"Content-Length: {len(CANARY)}") + CANARY
    reply = wire.raw(shared_bridge.address, request + CANARY)
    assert (reply.status // 100, reply.header("connection"), reply.rest) == (2, "close", b"")


# -- Expect


def test_continue_is_sent_before_the_body(shared_bridge: RunningBridge) -> None:
    with wire.Client(shared_bridge.address) as client:
        client.send(head(POST, HOST, JSON_TYPE, "Expect: 100-continue", f"Content-Length: {len(BODY)}"))
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
    shared_bridge: RunningBridge, lines: tuple[str, ...], status: int
) -> None:
    length = () if status == 413 else ("Content-Length: 5",)
    reply = wire.raw(shared_bridge.address, head(*lines, *length, "Expect: 100-continue"))
    assert (reply.status, reply.interim, reply.header("connection"), reply.rest) == (status, [], "close", b"")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_continue_needs_a_body_and_http_1_1(shared_bridge: RunningBridge, version: str) -> None:
    length = len(BODY) if version == "1.0" else 0
    request = head(f"POST /v1/responses HTTP/{version}", HOST, JSON_TYPE, "Expect: 100-continue",
                   f"Content-Length: {length}")
    reply = wire.raw(shared_bridge.address, request + BODY[:length])
    assert (reply.status, reply.interim) == (200 if length else 400, [])


# -- content codings and sizes


def deflated(body: bytes, bits: int) -> bytes:
    """Compress with zlib: 31 is gzip, 15 zlib, -15 raw."""
    packer = zlib.compressobj(9, zlib.DEFLATED, bits)
    return packer.compress(body) + packer.flush()


def packed(coding: str, body: bytes) -> bytes:
    """Compress a body; skip the test where zstd is not at hand."""
    if "zstd" in coding.lower():
        whole = q.zstd_compress(body)
        if whole is None:
            pytest.skip("no zstd on this host")
        return whole
    return deflated(body, {"deflate": 15, "raw": -15}.get(coding.lower(), 31))


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP", "deflate", "raw", "zstd", " ZStd "])
def test_compressed_body_is_read(shared_bridge: RunningBridge, coding: str) -> None:
    name = "deflate" if coding == "raw" else coding
    headers = {"Content-Encoding": name}
    reply = wire.post(shared_bridge.address, "/v1/responses", packed(coding, BODY), headers)
    assert (reply.status, reply.json["status"]) == (200, "completed")


@pytest.mark.parametrize(("coding", "status"), [
    ("br", 415), ("gzip, gzip", 415), ("zstd, gzip", 415), ("identity, gzip", 415), ("compress", 415),
    ("x", 415),
])
def test_unknown_and_stacked_codings_are_refused(
    shared_bridge: RunningBridge, coding: str, status: int
) -> None:
    body = gzip.compress(gzip.compress(BODY))
    headers = {"Content-Encoding": coding}
    assert wire.post(shared_bridge.address, "/v1/responses", body, headers).status == status


def test_two_coding_fields_are_refused(shared_bridge: RunningBridge) -> None:
    refused(shared_bridge, head(POST, HOST, JSON_TYPE, "Content-Encoding: gzip", "Content-Encoding: gzip",
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
def test_damaged_compression_is_400(shared_bridge: RunningBridge, coding: str,
                                    damage: Callable[[bytes], bytes]) -> None:
    body = damage(packed(coding, BODY))
    assert wire.post(shared_bridge.address, "/v1/responses", body, {"Content-Encoding": coding}).status == 400


def test_zstd_without_a_library_names_the_switch(
    shared_bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "libzstd", lambda: None)
    monkeypatch.setattr(q, "zstd_module", lambda: None)
    reply = wire.post(shared_bridge.address, "/v1/responses", b"(\xb5/\xfd", {"Content-Encoding": "zstd"})
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
    refused(start("--max-body", "1K"), head(POST, HOST, JSON_TYPE, "Content-Length: 1025"), 413)


def test_chunked_body_above_the_limit_is_413(start: Start) -> None:
    coded = b"400\r\n" + b" " * 1024 + b"\r\n1\r\n \r\n"
    bridge = start("--max-body", "1K")
    reply = wire.raw(bridge.address, head(POST, HOST, JSON_TYPE, "Transfer-Encoding: chunked") + coded)
    assert (reply.status, reply.header("connection"), reply.rest) == (413, "close", b"")


@pytest.mark.parametrize("extra", [0, 1])
def test_max_body_is_exact(start: Start, extra: int) -> None:
    body = BODY + b" " * (1024 - len(BODY) + extra)
    assert wire.post(start("--max-body", "1K").address, "/v1/responses",
                     body).status == (413 if extra else 200)


# -- deadlines


@pytest.mark.parametrize("sent", [
    pytest.param(head(POST, HOST, JSON_TYPE, "Content-Length: 9000"), id="nothing"),
    pytest.param(head(POST, HOST, JSON_TYPE, "Content-Length: 9000") + b"{", id="one-byte"),
    pytest.param(head(POST, HOST, JSON_TYPE, "Transfer-Encoding: chunked") + b"400\r\n{",
                 id="within-a-chunk"),
    pytest.param(head(POST, HOST, JSON_TYPE, "Transfer-Encoding: chunked") + b"4", id="within-a-chunk-head"),
    pytest.param(head(POST, HOST, JSON_TYPE, "Transfer-Encoding: chunked") + b"0\r\nX-A",
                 id="within-the-trailers"),
])
def test_slow_body_is_cut(start: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(q, "BODY_STALL", 0.02)
    reply = wire.raw(start().address, sent)
    assert (reply.status, reply.header("connection"), reply.rest) == (408, "close", b"")


def test_dripping_body_is_cut(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "BODY_STALL", 0.1)
    drip = threading.Event()
    with wire.Client(start().address) as client:
        client.send(head(POST, HOST, JSON_TYPE, "Content-Length: 9000"))
        begun = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begun < 5 and not client.left(0.001):
                client.send(b" ")
                drip.wait(0.01)
        assert time.monotonic() - begun < 4


# -- as it comes ------------------------------------------------------------------


@pytest.mark.parametrize("headers", [CODEX, {}], ids=["codex", "other"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_no_event_waits_for_the_next(
    version: str, headers: dict[str, str], bridge: RunningBridge, backend: wire.Backend
) -> None:
    gates = [threading.Event() for _ in EVENTS]

    def reply(exchange: wire.Exchange) -> None:
        exchange.head()
        for event, gate in zip(EVENTS, gates):
            exchange.event(event)
            assert gate.wait(5)
        exchange.finish()

    backend.on("/responses", reply)
    with wire.Client(bridge.address) as client:
        client.send(raw_request(version, *(f"{name}: {value}" for name, value in headers.items())))
        assert client.read_head().status == 200
        for event, gate in zip(EVENTS, gates):
            assert client.read_event() == event
            gate.set()
        assert client.read_event() is None


def test_stream_to_1_1_is_chunked(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", wire.turn(*EVENTS))
    reply = ask(bridge)
    assert reply.header("transfer-encoding") == "chunked"
    assert reply.header("content-length") is None
    assert reply.header("content-type") == "text/event-stream; charset=utf-8"
    assert (reply.ended, reply.body) == ("last-chunk", WHOLE)


@pytest.mark.parametrize("fields", [(), ("Connection: keep-alive",)])
def test_stream_to_1_0_ends_with_the_connection(
    fields: tuple[str, ...], bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on("/responses", wire.turn(*EVENTS))
    reply = wire.raw(bridge.address, raw_request("1.0", *fields))
    assert reply.header("transfer-encoding") is None
    assert reply.header("connection") == "close"
    assert (reply.ended, reply.body) == ("close", WHOLE)


def test_headers_cross_by_their_list(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on(
        "/responses",
        wire.turn(
            *EVENTS,
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
        copy = q.ResponsesOutput()
        pieces = [copy.feed(turn[:cut]), copy.feed(turn[cut:])]
        joined = b"".join(pieces)
        assert turn[: len(joined)] == joined
        assert turn[len(joined) :] in (b"", b"\n")  # a CR may end the blank line: nobody waits for its LF
        assert copy.done
        assert all(BLANK_LINE_LAST.search(piece) for piece in pieces if piece)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_events_are_counted(line_end: bytes) -> None:
    copy = q.ResponsesOutput()
    for event in EVENTS:
        copy.feed(wire.sse_bytes(event).replace(b"\n", line_end))
    assert copy.count == len(EVENTS)


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
    last: wire.Event, bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "AFTER_TERMINAL", 0.03)
    left = threading.Event()
    backend.on("/responses", wire.hang(FIRST, last, left=left))
    with asking(bridge) as client:
        reply = client.read_reply()
        assert (reply.ended, wire.sse(reply.body)) == ("last-chunk", [FIRST, last])
        assert left.wait(1)
        client.request("POST", "/v1/responses", STREAM)  # the client's connection goes on
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
def test_cut_is_seen(name: str, bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines) -> None:
    backend.on("/responses", CUTS[name])
    reply = ask(bridge)
    if reply.status == 200:  # the head may go out before the cut is seen, where no event comes with it
        assert reply.ended == "cut"
        assert reply.body in (wire.sse_bytes(FIRST), b"")  # what is whole, and nothing torn
        assert "end=cut" in log_lines.ended()[0]
    assert reply.status == 200 or (reply.status == 502 and name not in SEEN_FIRST)
    assert name not in SEEN_FIRST or reply.body
    assert not any(line.startswith(("ERROR", "CRITICAL")) for line in log_lines.lines)


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
    with asking(start(*BRISK), headers=headers) as client:
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
        client.sock.settimeout(0.1)
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
        threading.Event().wait(0.0015)
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
    assert KEEPALIVE in wire.sse(ask(start(*BRISK), headers=CODEX).body)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        ("--keepalive", "0.02", "--idle-timeout", "0.06"),
        pytest.param(
            ("--keepalive", "5", "--idle-timeout", "0.06")),
    ],
)
def test_endless_silence_is_given_up(
    options: tuple[str, ...], stream: bool, start: Start, backend: wire.Backend
) -> None:
    left = threading.Event()
    backend.on("/responses", wire.hang(FIRST, left=left))
    bridge = start(*options)
    with asking(bridge, stream=stream) as client:
        assert left.wait(3)  # and not --keepalive
        reply = client.read_reply()
    assert (reply.status, reply.ended) == ((200, "cut") if stream else (504, "length"))


SIGNS_OF_LIFE = {
    "keepalive": b'event: keepalive\ndata: {"type":"keepalive","sequence_number":1}\n\n',
    "comment": b": ping\n\n", "comments": b": a\n: b\r\n\r\n:\n\n", "empty line": b"\n",
}


@pytest.mark.parametrize("sign", SIGNS_OF_LIFE)
def test_signs_of_life_do_not_hold_a_parked_turn_for_ever(
    sign: str, start: Start, backend: wire.Backend
) -> None:
    def parked(exchange: wire.Exchange) -> None:
        exchange.head()
        exchange.event(FIRST)
        with contextlib.suppress(wire.PeerLeft, OSError):
            while not exchange.left(0.02):
                exchange.event(SIGNS_OF_LIFE[sign])

    backend.on("/responses", parked)
    with asking(start("--idle-timeout", "0.2")) as client:
        client.read_head()
        begun = time.monotonic()
        client.reader.to_end()
        assert time.monotonic() - begun < 2


def test_a_read_is_told_from_a_sign_of_life_at_once() -> None:
    begun = time.process_time()
    for hostile in (b"\n" * 1000 + b"x", b":" * 1023 + b"x", b":\n" * 500 + b"x", b"\r\n: a" * 200):
        assert not q.is_sign_of_life(hostile[-1024:])
    assert time.process_time() - begun < 0.1


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
    stream: bool, moment: str, how: str, bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines
) -> None:
    backend.routing = (backend.origin, "NO_CONSTRAINT")  # any other is worth a warning
    left = threading.Event()
    backend.on("/responses", wire.hang(*MOMENTS[moment], left=left))
    with asking(bridge, stream=stream) as client:
        backend.wait_for(1, "/responses")
        if stream and FIRST in MOMENTS[moment]:
            client.read_head()
            assert client.read_event() == FIRST
        getattr(client, how)()
        assert left.wait(1)
    assert "end=client" in log_lines.ended()[0]
    assert not any(line.startswith(("ERROR", "WARNING")) or "Traceback" in line for line in log_lines.lines)


@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
def test_client_that_leaves_after_the_terminal_event_is_no_error(
    how: str, bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines
) -> None:
    backend.routing = (backend.origin, "NO_CONSTRAINT")  # any other is worth a warning
    gone = threading.Event()

    def reply(exchange: wire.Exchange) -> None:
        exchange.head()
        exchange.events(*EVENTS)
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
    assert "status=200" in log_lines.ended()[0]
    assert not any(line.startswith(("ERROR", "WARNING")) or "Traceback" in line for line in log_lines.lines)
    assert ask(bridge).ended == "last-chunk"


@pytest.mark.parametrize("step", ["finish_stream", "send_json"])
def test_reply_is_closed_when_the_client_left_in_between(
    step: str,
    bridge: RunningBridge,
    backend: wire.Backend,
    log_lines: LogLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def leave(*_: Any) -> None:
        raise q.ClientLeft("client_closed")

    monkeypatch.setattr(q.Exchange, step, leave)
    backend.on("/responses", wire.turn(*EVENTS))
    assert not left_open(bridge, backend, log_lines, stream=step == "finish_stream")


def test_reply_is_closed_when_its_fold_is_an_error(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines
) -> None:
    backend.on("/responses", wire.turn(FIRST, wire.failed("server_error", "no")))
    assert not left_open(bridge, backend, log_lines, stream=False)


def left_open(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, stream: bool = True
) -> bool:
    """Ask for a turn; tell whether its upstream connection is neither closed nor back in the pool."""
    with asking(bridge, stream=stream):
        log_lines.ended()
    return not until(lambda: backend.open_connections == bridge.bridge.upstream.kept())


def test_client_that_breaks_off_in_its_request_is_no_fault(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines
) -> None:
    with wire.Client(bridge.address) as client:
        client.send(raw_request()[:-5])
    assert "end=client" in log_lines.ended()[0]
    assert backend.requests == []


def test_client_that_resets_in_its_request_is_no_fault(bridge: RunningBridge, log_lines: LogLines) -> None:
    with wire.Client(bridge.address) as client:
        client.send(raw_request()[:-5])
        # its head is still to be read
        assert until(lambda: bool(bridge.bridge.telemetry.snapshot(time.time())["open"]))
        client.reset()
    lines = log_lines.ended()
    bridge.faults.clear()
    assert "end=client" in lines[0]
    assert not any("Traceback" in line for line in log_lines.lines)


def test_client_that_leaves_before_100_is_no_fault(
    bridge: RunningBridge, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with wire.Client(bridge.address) as client, monkeypatch.context() as patched:
        patched.setattr(q.Connection, "send", broken)
        client.send(raw_request("1.1", "Expect: 100-continue").partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
        lines = log_lines.ended()
    bridge.faults.clear()
    assert "end=client" in lines[0]
    assert not any("Traceback" in line for line in log_lines.lines)


# -- HTTP on the client's side ----------------------------------------------------------


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
    backend.on("/responses", wire.turn(*EVENTS))
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
    stream: bool, event: bytes, shared_bridge: RunningBridge, shared_backend: wire.Backend
) -> None:
    shared_backend.on("/responses", wire.turn(FIRST, event, LAST))
    reply = ask(shared_bridge, stream=stream)
    assert reply.status == 200
    if stream:
        assert (reply.ended, reply.body) == (
            "last-chunk",
            wire.sse_bytes(FIRST) + event + wire.sse_bytes(LAST),
        )
    else:
        assert reply.json == LAST["response"]


# -- counts -------------------------------------------------------------------


def test_events_are_counted_while_they_come(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", wire.hang(FIRST, *EVENTS[1:3]))
    with wire.Client(bridge.address) as client:
        client.request("POST", "/v1/responses", STREAM)
        assert client.read_head().status == 200
        for _ in range(3):
            assert client.read_event() is not None
        (row,) = wire.get(bridge.address, "/status").json["open"]
    assert row["events"] == 3


WAYS = ("stream", "whole", "websocket")
by_each_way = pytest.mark.parametrize("way", WAYS)


def one_piece(*events: wire.Event) -> bytes:
    """Return events as one piece, which comes with one read."""
    return b"".join(map(wire.sse_bytes, events))


def final_response(bridge: RunningBridge, backend: wire.Backend, way: str, *events: wire.Event) -> Object:
    """Have upstream answer with these events; return the response that a client has in the end."""
    if way == "websocket":
        backend.on_frame(lambda ws, _: ws.events(*events))
        with contextlib.closing(wire.WebSocketClient(bridge.address)) as client:
            assert client.connect(RESPONSES).status == 101
            client.send_json({"type": "response.create", **MODEL, "input": []})
            last: Object = client.read_turn()[-1]["response"]
            return last
    script(backend, wire.turn(*events))
    reply = ask(bridge, {**MODEL, "input": "hi", "stream": way == "stream"})
    assert reply.status == 200, reply.body
    response: Object = wire.sse(reply.body)[-1]["response"] if way == "stream" else reply.json
    return response


# -- items whose text names an event ------------------------------------------

NAMES = (
    "response.completed",
    "response.failed",
    "response.incomplete",
    "response.output_item.done",
    '{"type":"response.completed","response":{"output":[]}}',
    "event: response.completed\ndata: {}\n\n",
)


def items_that_say(text: str) -> list[wire.Item]:
    """Return an item of each type that carries a text."""
    return [
        wire.reasoning_item(summary=f"it ends with {text}"),
        wire.message_item(f"the stream ends with {text}."),
        wire.call_item("grep", json.dumps({"pattern": text}), "call_1"),
        wire.custom_call_item("sh", f"grep {text} *", "call_2"),
    ]


@by_each_way
@pytest.mark.parametrize("name", NAMES)
def test_item_that_names_an_event_is_in_the_output(
    name: str, way: str, shared_bridge: RunningBridge, shared_backend: wire.Backend
) -> None:
    items = items_that_say(name)
    response = final_response(shared_bridge, shared_backend, way, *wire.items_turn(*items))
    assert response["output"] == items


@pytest.mark.parametrize("kind", ["completed", "incomplete"])
@pytest.mark.parametrize("together", [False, True], ids=["event by event", "in one piece"])
def test_item_that_names_an_event_is_in_the_output_of_any_end(
    together: bool, kind: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    items = items_that_say("response.completed")
    events = wire.items_turn(*items)
    events[-1] = {**events[-1], "type": f"response.{kind}", "response": {**events[-1]["response"],
                                                                         "status": kind}}
    script(backend, wire.turn(one_piece(*events)) if together else wire.turn(*events))
    sent = wire.sse(ask(bridge, STREAM).body)
    assert [event["type"] for event in sent] == [event["type"] for event in events]
    assert sent[-1]["response"]["output"] == items


@by_each_way
def test_call_that_names_an_event_can_be_continued(
    way: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    call = wire.call_item("grep", '{"pattern": "response.completed"}', "call_1")
    name = final_response(bridge, backend, way, *wire.items_turn(call))["id"]
    output = {"type": "function_call_output", "call_id": "call_1", "output": "none"}
    reply = ask(bridge, {**MODEL, "input": [output], "previous_response_id": name})
    assert reply.status == 200
    last = [request for request in backend.requests if request.method == "POST"][-1]
    assert [item.get("call_id") for item in last.json["input"]][-2:] == ["call_1", "call_1"]


# -- a terminal event without output ------------------------------------------

OUTPUTS: dict[str, Object] = {"missing": {}, "null": {"output": None}, "empty": {"output": []}}


def ending(kind: str, **fields: Any) -> wire.Event:
    """Return a terminal event whose response has these fields and no output but theirs."""
    response = wire.response_object("resp_1", kind, usage=wire.USAGE)
    if kind == "failed":
        response["error"] = {"code": "server_error", "message": "broke"}
    del response["output"]
    return {"type": f"response.{kind}", "sequence_number": 9, "response": {**response, **fields}}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", ["completed", "failed", "incomplete"])
@by_each_way
def test_response_has_an_output_in_any_case(
    way: str, kind: str, output: str, shared_bridge: RunningBridge, shared_backend: wire.Backend
) -> None:
    if way == "whole" and kind == "failed":
        way = "stream"  # in one piece it is an error
    events = [wire.created("resp_1"), ending(kind, **OUTPUTS[output])]
    assert final_response(shared_bridge, shared_backend, way, *events)["output"] == []


@by_each_way
def test_failed_response_has_the_items_that_came(
    way: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    if way == "whole":
        way = "stream"
    item = wire.message_item("so far")
    response = final_response(bridge, backend, way, *wire.items_turn(item)[:-1], ending("failed"))
    assert response["output"] == [item]


@pytest.mark.parametrize("codex", [False, True], ids=["other", "codex"])
def test_codex_gets_the_output_too(codex: bool, bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", wire.turn(wire.created("resp_1"), ending("failed")))
    reply = ask(bridge, {**STREAM, "input": []}, LITE if codex else {})
    assert wire.sse(reply.body)[-1]["response"]["output"] == []


# -- a chat that fails midway --------------------------------------------------

PIECES = [wire.created(), *({"type": "response.output_text.delta", "output_index": 0, "content_index": 0,
                             "delta": word} for word in ("one", " two", " three", " four"))]
FAILURES_2: dict[str, wire.Event] = {
    "response.failed": wire.failed("server_error", "broke"),
    "error": {"type": "error", "code": "server_error", "message": "broke"},
    "nested error": {"type": "error", "error": {"code": "server_error", "message": "broke"}},
}
CUTS_2 = {"each alone": [1, 1, 1, 1, 1, 1], "the rest with the failure": [2, 4], "all in one": [6]}


def in_pieces(sizes: list[int], *events: wire.Event) -> list[bytes]:
    """Return events in pieces of so many."""
    ends = [sum(sizes[:count + 1]) for count in range(len(sizes))]
    return [one_piece(*events[end - size:end]) for end, size in zip(ends, sizes)]


@pytest.mark.parametrize("cut", CUTS_2)
@pytest.mark.parametrize("failure", FAILURES_2)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_chat_gets_the_text_that_came_with_the_failure(
    path: str, failure: str, cut: str, shared_bridge: RunningBridge, shared_backend: wire.Backend
) -> None:
    shared_backend.on("/responses", wire.turn(*in_pieces(CUTS_2[cut], *PIECES, FAILURES_2[failure])))
    body: Object = {"messages": [USER]} if path == CHAT else {"prompt": "hi"}
    reply = ask(shared_bridge, {**MODEL, "stream": True, **body}, path=path)
    assert reply.status == 200
    *parts, last = chunks(reply.body)
    choices = [part["choices"][0] for part in parts]
    texts = [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices]
    assert "".join(texts) == "one two three four"
    assert last["error"]["code"] == "server_error"


@pytest.mark.parametrize("cut", CUTS_2)
def test_stream_gets_the_text_that_came_with_the_failure(
    cut: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    events = [*PIECES, FAILURES_2["response.failed"]]
    backend.on("/responses", wire.turn(*in_pieces(CUTS_2[cut], *events)))
    sent = wire.sse(ask(bridge, STREAM).body)
    assert [event["type"] for event in sent] == [event["type"] for event in events]


# -- items above the bound ------------------------------------------------------


@pytest.mark.parametrize("way", ["stream", "whole", "websocket"])
@pytest.mark.parametrize("size", [100, 1500], ids=["below", "above"])
def test_output_is_whole_or_not_filled(
    size: int, way: str, start: Start, backend: wire.Backend, log_lines: LogLines,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "MAX_EVENT", 6000)
    bridge = start()
    items = [{"type": "compaction", "id": f"cmp_{number}", "text": "x" * size} for number in range(6)]
    output = final_response(bridge, backend, way, *wire.items_turn(*items))["output"]
    if size == 100:
        assert output == items
    else:
        assert output == []
        assert log_lines.wait_for("`output` is not filled")


# -- answers without a body ---------------------------------------------------

SIDE = "/v1/responses/compact"
EMPTY = [(204, ()), (204, ("Content-Type: application/json",)), (204, ("Transfer-Encoding: chunked",))]


@pytest.mark.parametrize(("status", "fields"), EMPTY)
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_answer_without_a_body_leaves_the_connection_in_step(
    version: str, status: int, fields: tuple[str, ...], bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on("/responses/compact", wire.reply_raw(head(f"HTTP/1.1 {status} No Content", *fields), "keep"))
    body = wire.dump({**MODEL, "input": []})
    with wire.Client(bridge.address) as client:
        client.send(head(f"POST {SIDE} HTTP/{version}", HOST, JSON_TYPE, "Connection: keep-alive",
                         f"Content-Length: {len(body)}") + body)
        client.send(head("GET /healthz HTTP/1.1", HOST, "Connection: close"))
        reply = client.read_reply()
        assert (reply.status, reply.body) == (status, b"")
        assert (reply.header("transfer-encoding"), reply.header("content-length")) == (None, None)
        assert client.read_reply().json["status"] == "ok"
        assert client.reader.to_end() == b""


# -- the WebSocket handshake that is refused ------------------------------------


@pytest.mark.parametrize("reason", ["version", "upstream 404", "upstream 405", "upstream 426"])
def test_refused_handshake_names_the_protocol(
    reason: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    if reason != "version":
        backend.websocket_status = int(reason.rpartition(" ")[2])
    version = {"Sec-WebSocket-Version": "12"} if reason == "version" else {}
    with contextlib.closing(wire.WebSocketClient(bridge.address)) as client:
        reply = client.connect(RESPONSES, version)
    assert reply.status == 426
    assert reply.header("upgrade") == "websocket"  # RFC 9110, 15.5.22
    tokens = [token.strip().lower() for token in (reply.header("connection") or "").split(",")]
    assert "upgrade" in tokens  # RFC 9110, 7.8
    assert reply.json["error"]["message"]


# -- what is told while a stream runs -------------------------------------------


def rows(bridge: RunningBridge) -> list[Object]:
    """Return what runs, as /status has it."""
    running: list[Object] = wire.get(bridge.address, "/status").json["open"]
    return running


def test_finished_request_is_told_before_the_next_one(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines
) -> None:
    gate = threading.Event()
    first, *rest = wire.text_turn()
    backend.on("/responses", wire.gated(gate, [first], rest))
    body = wire.dump(STREAM)
    with wire.Client(bridge.address) as client:
        client.send(head("GET /v1/models HTTP/1.1", HOST))
        length = f"Content-Length: {len(body)}"
        client.send(head(f"POST {RESPONSES} HTTP/1.1", HOST, JSON_TYPE, length) + body)
        assert client.read_reply("GET").status == 200
        assert client.read_head("POST").status == 200
        assert client.read_event() == first
        try:
            log_lines.ended("/v1/models")
            assert [row["path"] for row in rows(bridge)] == [RESPONSES]
        finally:
            gate.set()
        assert client.read_events()[-1]["type"] == "response.completed"


LIMITS = [*wire.SSE_HEADERS, ("x-codex-primary-used-percent", "12.5"), ("x-codex-plan-type", "pro"),
          ("x-codex-primary-window-minutes", "300")]


def test_plan_limits_are_told_while_the_first_stream_runs(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    left = threading.Event()

    def reply(exchange: wire.Exchange) -> None:
        exchange.head(200, LIMITS)
        exchange.event(wire.created())
        exchange.left(10)
        left.set()

    backend.on("/responses", reply)
    with asking(bridge) as client:
        assert client.read_head().status == 200
        assert client.read_event()
        limits = wire.get(bridge.address, "/status").json["rate_limits"]
    assert limits["primary"]["used_percent"] == 12.5
    assert left.wait(5)


def test_plan_limits_of_a_side_route_are_told(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses/compact", wire.reply_json(200, {"output": []}, LIMITS[1:]))
    assert wire.post(bridge.address, SIDE, {**MODEL, "input": []}).status == 200
    assert wire.get(bridge.address, "/status").json["rate_limits"]["primary"]["used_percent"] == 12.5


def test_plan_limits_say_when_they_were_last_seen() -> None:
    telemetry = q.Telemetry()
    fields = dict(LIMITS)
    for now in (1000.0, 5000.0):
        telemetry.rate_limits(fields, now)
    assert telemetry.snapshot(6000.0)["rate_limits"]["seen"] == 5000.0


def test_list_is_fetched_anew_while_the_stream_that_names_it_runs(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    assert wire.get(bridge.address, "/v1/models").status == 200
    backend.catalog = [*backend.catalog, wire.model_entry("gpt-7", 0)]
    left = threading.Event()

    def reply(exchange: wire.Exchange) -> None:
        exchange.head(200, [*wire.SSE_HEADERS, ("x-models-etag", backend.etag)])
        exchange.event(wire.created())
        exchange.left(10)
        left.set()

    backend.on("/responses", reply)
    fetched = len([each for each in backend.requests if each.path == wire.full_path("/models")])
    with asking(bridge) as client:
        assert client.read_head().status == 200
        assert client.read_event()
        backend.wait_for(fetched + 1, "/models")
    assert left.wait(5)


# -- doubled slashes -----------------------------------------------------------------


@pytest.mark.parametrize("path", [
    "//v1/models", "//models", "/v1//models", "/v1///models", "/v1//models/", "/v1/models//",
    "/v1//v1//models", "/v1//models/gpt-5.5", "/v1/models//gpt-5.5", "/v1//healthz",
    "/v1//client-config//codex",
])
def test_doubled_slashes_are_one(bridges: SharedBridges, path: str) -> None:
    assert wire.get(bridges.bridge().address, path).status == 200


@EACH_API
@pytest.mark.parametrize("form", ["/v1//{}", "/v1//v1/{}", "/v1/{}//"])
def test_doubled_slashes_before_a_request_are_one(
    bridges: SharedBridges, path: str, body: Object, form: str
) -> None:
    for given in (path, path.replace("chat/", "chat//")):
        reply = ask(bridges.bridge(), {**MODEL, **body}, path=form.format(given[len("/v1/"):]))
        assert reply.status == 200, reply.body


@pytest.mark.parametrize("path", ["/v1//nothing", "/v1//v1//v1/models", "/v1//chat", "/nas.lan//v1/models",
                                  "//nas.lan/v1/models"])
def test_doubled_slashes_open_no_other_path(bridges: SharedBridges, path: str) -> None:
    assert wire.get(bridges.bridge().address, path).status == 404


# -- what is the bridge's own to say ----------------------------------------------------------


def own_etag(bridge: RunningBridge) -> str:
    """Return the tag of the list that a Codex gets here."""
    return models(bridge, "0.169.0").header("etag") or ""


@pytest.mark.parametrize("model", ["gpt-5.5", "gpt-6-sol", "local_md"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_codex_is_told_the_tag_of_the_list_that_it_gets_here(
    bridge: RunningBridge, backend: wire.Backend, stream: bool, model: str
) -> None:
    tag = own_etag(bridge)
    reply = ask(bridge, {"model": model, "input": "hi"}, CODEX, stream=stream)
    assert (reply.status, reply.header("x-models-etag")) == (200, tag)
    assert tag not in ("", backend.etag)


def test_another_list_upstream_becomes_another_tag_here(start: Start, backend: wire.Backend) -> None:
    bridge = start()
    before = own_etag(bridge)
    backend.catalog.append(wire.model_entry("gpt-7", 0))
    ask(bridge, STREAM, CODEX)  # tells the bridge that its list is old
    settle(bridge)
    after = ask(bridge, STREAM, CODEX).header("x-models-etag")
    assert after != before
    settle(bridge)
    assert own_etag(bridge) == after


def test_a_codex_is_told_no_tag_of_a_list_that_it_cannot_get(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.always("/models", wire.refuse(500, "broken"))
    reply = ask(bridge, STREAM, CODEX)
    assert (reply.status, reply.header("x-models-etag")) == (200, None)


def lacking(*names: str) -> list[Object]:
    """Return a turn whose final response lacks some fields."""
    *events, last = wire.items_turn()
    return [*events, {**last, "response": {
        name: value for name, value in last["response"].items() if name not in names}}]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_response_without_output_has_an_empty_one(
    bridge: RunningBridge, backend: wire.Backend, stream: bool
) -> None:
    backend.on("/responses", wire.turn(*lacking("output")))
    reply = ask(bridge, REQUEST, OTHER, stream=stream)
    response = wire.sse(reply.body)[-1]["response"] if stream else reply.json
    assert response["output"] == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_response_without_output_has_the_items_that_came(
    bridge: RunningBridge, backend: wire.Backend, stream: bool
) -> None:
    item = wire.message_item("hello")
    events = wire.items_turn(item)
    backend.on("/responses", wire.turn(*events[:-1], lacking("output")[-1]))
    reply = ask(bridge, REQUEST, OTHER, stream=stream)
    response: Any = wire.sse(reply.body)[-1]["response"] if stream else reply.json
    assert response["output"] == [item]


# -- a plain nginx before the bridge ------------------------------------------------------------


@EACH_API
@pytest.mark.parametrize("headers", [CODEX, OTHER], ids=["codex", "other"])
def test_a_front_is_told_not_to_hold_a_stream_back(
    bridge: RunningBridge, path: str, body: Object, headers: dict[str, str]
) -> None:
    reply = ask(bridge, {**MODEL, **body}, headers, path=path, stream=True)
    assert (reply.status, reply.header("x-accel-buffering")) == (200, "no")


def test_upstreams_own_word_on_buffering_is_not_passed_on(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    headers = [*wire.TURN_HEADERS, ("x-accel-buffering", "yes")]
    backend.on("/responses", wire.turn(*wire.text_turn("hi"), headers=headers))
    assert ask(bridge, STREAM).header("x-accel-buffering") == "no"
