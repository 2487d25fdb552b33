"""Mutated bytes from both sides: one well-formed answer or a close, no handler's fault, healthy after it.

Seeded, so that a failure comes again; `SEED` and the counts bound it to a few seconds.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import wire
from conftest import RunningBridge, Start
from help import STREAM

import qoo_bridge

SEED = 20261122
BATCHES, BATCH = 12, 24  # of mutated requests; a batch is in the bridge at once
HOSTILE = 70  # mutated replies for each kind of client
PARSED = 400  # mutated streams for each parser
FRAMED = ("length", "last-chunk", "none")  # how a whole answer ends

TURN = json.dumps(STREAM).encode()
CHAT = json.dumps({"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi"}]}).encode()


def request(line: str, body: bytes = b"", *fields: str) -> bytes:
    """Write a well-formed request."""
    lines = [line, "Host: bridge.lan", "Content-Type: application/json", *fields]
    if body and "Transfer-Encoding: chunked" not in fields:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def chunked(body: bytes, rng: random.Random) -> bytes:
    """Cut a body into chunks."""
    coded, at = b"", 0
    while at < len(body):
        size = rng.randint(1, 200)
        piece = body[at:at + size]
        coded += b"%x\r\n%b\r\n" % (len(piece), piece)
        at += size
    return coded + b"0\r\n\r\n"


REQUESTS = [
    request("GET /healthz HTTP/1.1"),
    request("GET /v1/models?client_version=0.169.0 HTTP/1.1", b"", "If-None-Match: x", "Connection: close"),
    request("GET /status HTTP/1.0", b"", "Connection: keep-alive"),
    request("OPTIONS /v1/responses HTTP/1.1", b"", "Access-Control-Request-Method: POST"),
    request("POST /v1/responses HTTP/1.1", TURN, "session-id: 0b0f4a5e", "User-Agent: codex_cli_rs/0.169.0"),
    request("POST /v1/responses HTTP/1.1", TURN, "Expect: 100-continue", "Authorization: Bearer lan"),
    request("POST /v1/chat/completions HTTP/1.1", CHAT, "Accept: */*"),
    request("POST /v1/responses HTTP/1.1", chunked(TURN, random.Random(1)), "Transfer-Encoding: chunked"),
    b"".join(request(f"GET {path} HTTP/1.1") for path in ("/healthz", "/v1/models/x", "/metrics")),
]
REQUEST_WORDS = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\x00", b"\xff", b" ", b"\t", b":", b"//", b"\r\n ",
    b"Content-Length: 5\r\n", b"Content-Length: 5, 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Host: b\r\n", b"HTTP/1.0", b"HTTP/2.0", b"-1", b"+", b"Connection: close\r\n",
    b"Content-Encoding: gzip\r\n", b"Content-Encoding: zstd\r\n", b"Expect: x\r\n", b"0\r\n\r\n",
    b"Origin: null\r\n", b"Range: bytes=0-1\r\n", b"\xe2\x80\xa8", b"\\ud800", b"[[[[[[[[", b"1e999",
    b"null", b'"', b"Upgrade: websocket\r\nConnection: Upgrade\r\n",
]
STREAM_WORDS = [
    b"\r\n", b"\n", b"\r", b"\n\n", b"\r\n\r\n", b"\x00", b"\xff", b"data:", b"data: {}\n\n",
    b"data: []\n\n", b"event: x\n", b"null", b"5", b'"', b"[]", b"{}", b"\xe2\x80\xa8", b"\\ud800",
    b"response.completed", b"response.failed", b"error", b"response.output_item.done", b'"output_index":-1',
    b'"type":5', b"0\r\n\r\n", b"fffffffffffffff\r\n", b"-1\r\n", b";", b"Content-Length: 7\r\n",
    b"content-encoding: gzip\r\n", b"\r\n x-a: b", b"HTTP/1.1 100 Continue\r\n\r\n", b": c\n\n",
]


def mutate(rng: random.Random, whole: bytes, words: list[bytes]) -> bytes:
    """Damage bytes in one to four places."""
    for _ in range(rng.randint(1, 4)):
        at, end = sorted((rng.randint(0, len(whole)), rng.randint(0, len(whole))))
        end = min(end, at + rng.choice((1, 2, 8, 200)))
        whole = whole[:at] + rng.choice((
            rng.choice(words), b"", whole[at:end] * 2, rng.choice(words) + whole[at:end],
            bytes([rng.randrange(256)]), whole[at:end][::-1],
        )) + whole[end if rng.random() < 0.7 else at:]
    return whole


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the bridge wait for nobody."""
    for name in ("HEAD_TIMEOUT", "BODY_STALL", "IDLE_CLIENT"):
        monkeypatch.setattr(qoo_bridge, name, 0.03)


def answers(client: wire.Client) -> Iterator[wire.RawReply]:
    """Read answers up to the connection's end; whatever is no answer raises ProtocolError."""
    with contextlib.suppress(ConnectionError):
        while client.reader.buffer or client.reader.fill():
            yield client.read_reply()


def test_mutated_requests(start: Start, backend: wire.Backend, short_timeouts: None) -> None:
    bridge, rng = start("--max-body", "1M", "--idle-timeout", "2"), random.Random(SEED)
    statuses = set()
    for _ in range(BATCHES):
        with contextlib.ExitStack() as stack:
            sent = [mutate(rng, rng.choice(REQUESTS), REQUEST_WORDS) for _ in range(BATCH)]
            clients = [stack.enter_context(wire.Client(bridge.address)) for _ in sent]
            for client, whole in zip(clients, sent):
                client.send(whole)
            for client, whole in zip(clients, sent):
                for reply in answers(client):
                    statuses.add(reply.status)
                    assert reply.ended in FRAMED, whole
                    assert reply.status != 500, whole
        assert bridge.faults == [], sent
    assert {200, 400} <= statuses  # the mutations neither spare nor break everything
    assert wire.get(bridge.address, "/healthz").status == 200


# -- from upstream

def reply_bytes(rng: random.Random) -> bytes:
    """Write a whole reply with a turn in it, as the backend sends it."""
    items = [wire.reasoning_item(), wire.message_item("hello to you"), wire.call_item("shell", '{"a": "b"}')]
    turn = wire.items_turn(*items[:rng.randint(1, 3)])
    body = b"".join(wire.sse_bytes(event, rng.random() < 0.8) for event in turn)
    if rng.random() < 0.7:
        body = mutate(rng, body, STREAM_WORDS)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-codex-primary-used-percent: 12.5\r\n"
    if rng.random() < 0.2:
        return head + b"content-length: %d\r\n\r\n" % len(body) + body
    return head + b"transfer-encoding: chunked\r\n\r\n" + chunked(body, rng)


def refusal_bytes(rng: random.Random) -> bytes:
    """Write a whole refusal."""
    error = {"type": "usage_limit_reached", "message": "no", "resets_at": 5, "resets_in_seconds": 1800}
    shapes: list[dict[str, Any]] = [{"error": error}, {"detail": "no such thing"}, {"message": []}]
    body = json.dumps(rng.choice(shapes)).encode()
    status = rng.choice((b"400", b"403", b"429", b"500", b"599"))
    head = b"HTTP/1.1 %b X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/responses", {"model": "gpt-5.5", "input": "hi", "stream": True}),
    ("/v1/responses", {"model": "gpt-5.5", "input": "hi"}),
    ("/v1/chat/completions",
     {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi"}], "stream": True}),
    ("/v1/chat/completions", {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi"}]}),
]


def hostile_bytes(rng: random.Random) -> bytes:
    """Write a reply that is damaged inside of its framing, or anywhere."""
    whole = rng.choice((reply_bytes, reply_bytes, refusal_bytes))(rng)
    return mutate(rng, whole, STREAM_WORDS) if rng.random() < 0.6 else whole


def take_faults(bridge: RunningBridge) -> list[BaseException]:
    """Return the faults that a bridge met, and forget them."""
    faults, bridge.faults[:] = list(bridge.faults), []
    return faults


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # test_handler has the row for what is left open
@pytest.mark.parametrize(("path", "body"), KINDS, ids=["stream", "folded", "chat-stream", "chat"])
def test_mutated_replies(
    start: Start, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(wire.listener, "LINGER", 0.0)
    bridge, rng = start("--idle-timeout", "2"), random.Random(SEED)
    statuses, faults = set(), []
    for _ in range(HOSTILE):
        whole = hostile_bytes(rng)
        backend.always("/responses", wire.reply_raw(whole, rng.choice(("close", "close", "reset"))))
        reply = wire.post(bridge.address, path, body)
        statuses.add(reply.status)
        assert reply.ended in (*FRAMED, "cut"), whole
        faults += take_faults(bridge)
    backend.always("/responses", backend.default)
    assert wire.post(bridge.address, path, body).status == 200
    assert {200, 502} <= statuses  # the mutations neither spare nor break everything
    shown = [repr(fault) for fault in faults]
    faults.clear()
    gc.collect()  # what the faults held is let go while its warnings are still ignored
    assert shown == []


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_refusal_that_the_close_ends_is_handed_on(start: Start, backend: wire.Backend, version: str) -> None:
    bridge = start()
    head = f"HTTP/{version} 429 Slow\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"
    backend.on("/responses", wire.reply_raw(head.encode() + b'{"detail":"slow down"}'))
    reply = wire.post(bridge.address, *KINDS[1])
    take_faults(bridge)
    assert (reply.status, reply.json["error"]["message"]) == (429, "slow down")


NAN_ITEM = b'data: {"type":"response.output_item.done","output_index":0,"item":{"type":"x","x":NaN}}\n\n'
ENDING = b'data: {"type":"response.completed","response":{"id":"resp_1","output":[]%b}}\n\n'


@pytest.mark.parametrize(("path", "body"), KINDS[:2], ids=["stream", "folded"])
@pytest.mark.parametrize("events", [
    pytest.param(NAN_ITEM + ENDING % b"", id="nan-in-an-item"),
    pytest.param(NAN_ITEM.replace(b"NaN", b"1e999") + ENDING % b"", id="1e999-in-an-item"),
])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_number_that_json_lacks_is_no_fault(
    start: Start, backend: wire.Backend, path: str, body: dict[str, Any], events: bytes
) -> None:
    bridge = start()
    backend.on("/responses", wire.turn(events))
    reply = wire.post(bridge.address, path, body)
    bridge.server.drain(2)
    faults = [repr(fault) for fault in take_faults(bridge)]
    gc.collect()
    assert (reply.status in (200, 502), faults) == (True, [])


@pytest.mark.parametrize("number", [b"NaN", b"1e999"])
def test_refusal_with_a_number_that_json_lacks_is_answered(
    start: Start, backend: wire.Backend, number: bytes
) -> None:
    bridge = start()
    refusal = b'{"error":{"message":"no","resets_at":%b}}' % number
    fields = [("content-type", "application/json")]
    backend.on("/responses", lambda exchange: exchange.whole(429, refusal, fields))
    status = 0
    with contextlib.suppress(wire.PeerLeft, ConnectionError):
        status = wire.post(bridge.address, "/v1/responses", KINDS[1][1]).status
    bridge.server.drain(2)
    faults = take_faults(bridge)
    assert (status, faults) == (429, [])


# -- the parsers: what they say must not depend on how the bytes were cut

def cuts(rng: random.Random, whole: bytes) -> list[list[bytes]]:
    """Cut bytes three ways: not at all, everywhere, at random."""
    places = sorted({0, len(whole), *(rng.randint(0, len(whole)) for _ in range(5))})
    return [[whole], [whole[at:at + 1] for at in range(len(whole))],
            [whole[at:end] for at, end in zip(places, places[1:])]]


def parse_chunked(pieces: list[bytes]) -> tuple[str, bytes, bytes]:
    """Feed a chunked body: how it stands at the end, what it held, what came after it."""
    body, payload = qoo_bridge.ChunkedBody(), b""
    for number, piece in enumerate(pieces):
        try:
            payload += body.feed(piece)
        except qoo_bridge.MalformedHttp:
            return "malformed", b"", b""
        if body.done:
            return "done", payload, body.rest + b"".join(pieces[number + 1:])
    return "open", payload, b""


def parse_events(pieces: list[bytes]) -> list[dict[str, Any]]:
    """Feed an event stream: the events in it."""
    events = qoo_bridge.Events()
    whole = b"".join(events.feed(piece) for piece in pieces)
    parsed = map(qoo_bridge.event_json, qoo_bridge.split_events(whole))
    return [event for event in parsed if event is not None]  # a blank line more or less is no event


def chunked_stream(rng: random.Random) -> bytes:
    """Write a chunked body with a turn in it."""
    return chunked(b"".join(map(wire.sse_bytes, wire.text_turn("hello"))), rng) + b"GET / HTTP/1.1\r\n"


def event_stream(rng: random.Random) -> bytes:
    """Write short events with any of the three line ends."""
    ends = rng.choice(((b"\n",), (b"\n", b"\r\n"), (b"\n", b"\r\n", b"\r")))
    words = (b'data: {"type":"a"}', b"event: a", b": c", b"", b"", b'data: {"type":', b'data: "b"}')
    lines = [rng.choice(words) for _ in range(rng.randint(1, 12))]
    return b"".join(line + rng.choice(ends) for line in lines)


@pytest.mark.parametrize(("parse", "make"), [(parse_chunked, chunked_stream), (parse_events, event_stream)],
                         ids=["chunked", "events"])
def test_parser_does_not_depend_on_the_cuts(
    parse: Callable[[list[bytes]], object], make: Callable[[random.Random], bytes]
) -> None:
    rng = random.Random(SEED)
    for _ in range(PARSED):
        whole = make(rng)
        whole = whole[-600:] if parse is parse_events else whole[:300] + whole[-40:]
        whole = mutate(rng, whole, STREAM_WORDS) if rng.random() < 0.8 else whole
        first, *others = [parse(pieces) for pieces in cuts(rng, whole)]
        for other in others:
            assert other == first, whole


def test_head_parsers_raise_their_own_errors_only() -> None:
    rng = random.Random(SEED)
    for _ in range(PARSED * 3):
        head = mutate(rng, rng.choice(REQUESTS), REQUEST_WORDS).partition(b"\r\n\r\n")[0]
        with contextlib.suppress(qoo_bridge.MalformedHttp):
            parsed = qoo_bridge.parse_request(head)
            qoo_bridge.body_length(parsed.headers)
        with contextlib.suppress(qoo_bridge.BadUpstream):
            head = mutate(rng, reply_bytes(rng), STREAM_WORDS).partition(b"\r\n\r\n")[0]
            qoo_bridge.reply_body(qoo_bridge.parse_reply(head))
