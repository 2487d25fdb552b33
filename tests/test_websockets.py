"""Room websockets, end to end: a client, the bridge, and a stand-in that keeps every byte that it is sent."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import queue
import select
import socket
import ssl
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_websockets
import wire
from conftest import RunningBridge, Start
from help import AGENT, SCHEMA, NoThreads, until
from wire import CLOSE, CONTINUATION, PING, PONG, TEXT, Frame

import qoo_bridge as q

PLAIN, LITE = "gpt-5.5", "gpt-6-sol"
SESSION = "01a201ed-2750-7d43-ab4e-7ce4b1a183d8"
CODEX_FIELDS = {  # a handshake of Codex 0.169, its long values cut
    "authorization": "Bearer lan",
    "user-agent": AGENT,
    "originator": "codex_exec",
    "openai-beta": wire.WEBSOCKET_BETA,
    "x-codex-turn-metadata": '{"installation_id":"41cdc096"}',
    "x-codex-beta-features": "remote_compaction_v2",
    "x-client-request-id": SESSION,
    "session-id": SESSION,
    "thread-id": SESSION,
    "x-codex-window-id": f"{SESSION}:0",
    "sec-websocket-extensions": "permessage-deflate; client_max_window_bits",
}
TOOLS = [{"type": "function", "name": "shell", "parameters": SCHEMA, "strict": False}]
OTHER_TOOLS = [{"type": "function", "name": "browse", "parameters": SCHEMA, "strict": False}]
SECOND = 1.0  # in which the other side must be closed
ROUTE = ("GET", f"{wire.BASE}/responses", "websocket")
Event = dict[str, Any]


# -- the stand-in's side ------------------------------------------------------


def frames_in(raw: bytes) -> list[Frame]:
    """Return the whole frames in some bytes."""
    frames: list[Frame] = []
    with socket.socket() as unconnected, contextlib.suppress(OSError):
        reader = wire.Reader(unconnected)
        reader.buffer += raw
        while True:
            frames.append(wire.read_frame(reader))
    return frames


class Recorder(wire.Reader):
    """A reader that keeps what was taken from it; shares its buffer with the exchange's own."""

    def __init__(self, reader: wire.Reader) -> None:
        super().__init__(reader.sock)
        self.buffer = reader.buffer
        self.taken = bytearray()
        self.changed = threading.Condition()

    def exactly(self, size: int) -> bytes:
        taken = super().exactly(size)
        with self.changed:
            self.taken += taken
            self.changed.notify_all()
        return taken


class UpstreamSocket(wire.WebSocketExchange):
    """The stand-in's side of one WebSocket; `opened` holds those that no test has taken yet."""

    opened: queue.Queue[UpstreamSocket]

    def __init__(self, backend: wire.Backend, exchange: wire.Exchange) -> None:
        super().__init__(backend, exchange)
        self.reader: Recorder = Recorder(exchange.reader)
        self.ended = threading.Event()
        self.opened.put(self)

    def serve(self) -> None:
        try:
            super().serve()
        finally:
            self.ended.set()

    @property
    def frames(self) -> list[Frame]:
        with self.reader.changed:
            return frames_in(bytes(self.reader.taken))

    def wait_for(self, opcode: int, count: int = 1) -> list[bytes]:
        """Wait until `count` frames of a kind came, and return their payloads."""
        def seen() -> list[bytes]:
            return [frame.payload for frame in frames_in(bytes(self.reader.taken)) if frame.opcode == opcode]

        with self.reader.changed:
            assert self.reader.changed.wait_for(lambda: len(seen()) >= count, 5), seen()
            return seen()

    @property
    def close_frame(self) -> tuple[int | None, bytes]:
        """Wait for the end; return the code and reason of the bridge's close frame, None without one."""
        assert self.ended.wait(5)
        last = next((frame for frame in self.frames if frame.opcode == CLOSE), None)
        return (None, b"") if last is None else (wire.close_code(last), last.payload[2:])


NextUpstream = Callable[[], UpstreamSocket]


@pytest.fixture
def next_upstream(monkeypatch: pytest.MonkeyPatch) -> NextUpstream:
    """Return the next WebSocket that the stand-in accepted."""
    opened: queue.Queue[UpstreamSocket] = queue.Queue()
    monkeypatch.setattr(UpstreamSocket, "opened", opened, raising=False)
    monkeypatch.setattr(wire.backend, "WebSocketExchange", UpstreamSocket)
    return lambda: opened.get(timeout=5)


def send_raw(*raws: bytes) -> wire.FrameReply:
    """Reply with bytes as they are; what the bridge does then is read on."""
    return lambda ws, _: ws.exchange.send(b"".join(raws))


def accept_head(request: wire.Request, **fields: str) -> bytes:
    """Return an acceptance of a handshake, its fields replaced by name; an empty value leaves one out."""
    key = request.header("sec-websocket-key") or ""
    head = {"upgrade": "websocket", "connection": "Upgrade", "sec_websocket_accept": wire.accept_key(key),
            **fields}
    named = [(name.replace("_", "-"), value) for name, value in head.items() if value]
    return wire.head_bytes("HTTP/1.1 101 Switching Protocols", named)


# -- the client's side --------------------------------------------------------

Dial = Callable[..., wire.WebSocketClient]


@pytest.fixture
def dial(start: Start, next_upstream: NextUpstream) -> Iterator[Dial]:
    """Open WebSockets through a bridge; all are closed before it ends."""
    with contextlib.ExitStack() as stack:
        def open_one(bridge: RunningBridge, headers: dict[str, str] | None = None) -> wire.WebSocketClient:
            client = stack.enter_context(contextlib.closing(wire.WebSocketClient(bridge.address)))
            reply = client.connect("/v1/responses", headers)
            assert reply.status == 101, reply.body
            return client
        yield open_one


def message(role: str, text: str) -> wire.Item:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


def create(*items: wire.Item, **fields: Any) -> Event:
    """Return a frame of Codex for a plain model: no rule has anything to change in it."""
    return {
        "type": "response.create", "model": PLAIN, "stream": True,
        "input": list(items) or [message("user", "hi")],
        "store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": SESSION, **fields,
    }


def plain_create(*items: wire.Item, **fields: Any) -> Event:
    """Return a frame as an SDK sends it."""
    return {"type": "response.create", "model": PLAIN, "input": list(items) or [message("user", "hi")],
            **fields}


def masked(payload: bytes | str, opcode: int = TEXT, final: bool = True) -> Frame:
    return Frame(opcode, payload if isinstance(payload, bytes) else payload.encode(), final, masked=True)


def read_until(client: wire.WebSocketClient, opcode: int) -> Frame:
    """Skip to the next frame of a kind."""
    return next(frame for frame in iter(lambda: wire.read_frame(client.reader),
                                        None) if frame.opcode == opcode)


def texts(turn: list[Event]) -> str:
    return "".join(event["delta"] for event in turn if event["type"] == "response.output_text.delta")


class RecordLog:
    """The log lines of a bridge, and copies of the records as they stood then."""

    def __init__(self, bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
        self._queue: queue.Queue[q.Record] = queue.Queue()
        self.lines: list[str] = []
        log_request = bridge.server.log_request

        def noted(record: q.Record) -> None:
            log_request(record)
            self.lines.append(q.log_line(record))
            self._queue.put(copy.copy(record))

        monkeypatch.setattr(bridge.server, "log_request", noted)

    def next(self) -> q.Record:
        return self._queue.get(timeout=5)


@contextlib.contextmanager
def expect_no_fault(bridge: RunningBridge) -> Iterator[None]:
    """Fail here, not in the fixture's end, when the bridge met a fault of its own."""
    try:
        yield
        assert bridge.faults == []
    finally:
        bridge.faults.clear()


# -- the handshake ------------------------------------------------------------


def handshake(bridge: RunningBridge, **fields: str) -> wire.RawReply:
    with contextlib.closing(wire.WebSocketClient(bridge.address)) as client:
        return client.connect("/v1/responses", {name.replace("_", "-"): value for name,
                                                value in fields.items()})


def handshakes(backend: wire.Backend) -> list[wire.Request]:
    with backend.changed:
        return [request for request in backend.requests if request.header("upgrade")]


def test_what_codex_sends_at_the_handshake_goes_up_and_nothing_of_its_own_credentials(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    client = dial(bridge, {**CODEX_FIELDS, "cookie": "a=b", "x-forwarded-for": "10.0.0.1"})
    (asked,) = handshakes(backend)
    for name, value in CODEX_FIELDS.items():
        if name not in ("authorization", "sec-websocket-extensions"):
            assert asked.header(name) == value, name
    assert asked.header("authorization") == f"Bearer {backend.access_token}"
    assert asked.header("chatgpt-account-id") == backend.account_id
    assert asked.header("version") == "0.169.0"
    assert asked.header("sec-websocket-extensions") is None
    assert client.reply is not None
    for name, value in {"x-codex-turn-state": "ts-sticky-1"}.items():
        assert client.reply.header(name) == value
    assert client.reply.header("set-cookie") is None
    assert client.reply.header("sec-websocket-extensions") is None


def test_another_client_goes_up_under_the_bridges_name_and_with_a_key_of_its_own(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    given = {"user-agent": "OpenAI/Python 3.54", "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
             "sec-websocket-protocol": "realtime"}
    client = wire.WebSocketClient(bridge.address)
    with contextlib.closing(client), pytest.raises(wire.ProtocolError):
        client.connect("/v1/responses", given)  # it checks the accept key against its own, random one
    assert client.reply is not None
    assert client.reply.header("sec-websocket-accept") == wire.accept_key(given["sec-websocket-key"])
    dial(bridge, {"user-agent": "OpenAI/Python 3.54"})
    for asked in handshakes(backend):
        assert asked.header("originator") == "qoo_bridge"
        assert (asked.header("user-agent") or "").startswith("qoo_bridge/")
        assert asked.header("openai-beta") == wire.WEBSOCKET_BETA
        assert asked.header("sec-websocket-key") != given["sec-websocket-key"]
        assert asked.header("sec-websocket-protocol") is None
    one, two = handshakes(backend)
    assert one.header("sec-websocket-key") != two.header("sec-websocket-key")


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"origin": "https://evil.example"}, 403, "forbidden"),
        ({"host": "evil.example"}, 403, "forbidden"),
        ({"authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        ({"authorization": ""}, 401, "invalid_api_key"),
    ],
)
def test_the_door_is_checked_first(
    backend: wire.Backend, start: Start, fields: dict[str, str], status: int, code: str
) -> None:
    bridge = start("--api-key", "ann=secret-of-ann")
    # The rest of the handshake is wrong as well: access is checked before that was looked at.
    wrong = {"sec_websocket_version": "8", "authorization": "Bearer secret-of-ann", **fields}
    reply = handshake(bridge, **wrong)
    assert (reply.status, reply.json["error"]["code"]) == (status, code)
    assert handshakes(backend) == []


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        pytest.param({"sec_websocket_version": "8"}, 426, id="version 8"),
        pytest.param({"sec_websocket_version": ""}, 426, id="no version"),
        pytest.param({"sec_websocket_version": "13, 8"}, 426, id="two versions"),
        pytest.param({"sec_websocket_key": "c2hvcnQ="}, 400, id="short key"),
        pytest.param({"sec_websocket_key": ""}, 400, id="no key"),
        pytest.param({"connection": "keep-alive"}, 426, id="no upgrade in connection"),
        pytest.param({"upgrade": "h2c"}, 426, id="another protocol"),
    ],
)
def test_a_handshake_that_is_none_never_goes_up(
    backend: wire.Backend, bridge: RunningBridge, fields: dict[str, str], status: int
) -> None:
    reply = handshake(bridge, **fields)
    assert reply.status == status
    assert isinstance(reply.json["error"]["message"], str)
    assert reply.header("x-qoo-bridge-error") == "bridge"
    assert reply.header("sec-websocket-version") == ("13" if status == 426 else None)
    assert handshakes(backend) == []


def test_a_head_request_is_no_handshake(backend: wire.Backend, bridge: RunningBridge) -> None:
    fields = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
              "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    with wire.Client(bridge.address) as client:
        client.request("HEAD", "/v1/responses", headers=fields)
        assert client.read_reply().status == 405
    assert handshakes(backend) == []


def test_the_client_is_accepted_only_after_upstream_has_accepted(
    backend: wire.Backend, bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, gate = threading.Event(), threading.Event()

    def wait_then_accept(standing: wire.Backend, exchange: wire.Exchange) -> None:
        asked.set()
        assert gate.wait(5)
        standing.websocket(exchange)

    monkeypatch.setitem(wire.ROUTES, ROUTE, wait_then_accept)
    with contextlib.closing(wire.WebSocketClient(bridge.address)) as client:
        opener = threading.Thread(target=client.connect, args=("/v1/responses",))
        opener.start()
        assert asked.wait(5)
        assert client.reader.buffer == b"" and client.reply is None
        gate.set()
        opener.join(5)
        assert client.reply is not None and client.reply.status == 101


@pytest.mark.parametrize("status", [404, 405, 501])
def test_upstream_without_a_websocket_is_426(
    backend: wire.Backend, bridge: RunningBridge, status: int
) -> None:
    backend.websocket_status = status
    assert handshake(bridge).status == 426


@pytest.mark.parametrize("status", [400, 403, 426, 429, 500, 503])
def test_upstreams_refusal_is_the_clients(backend: wire.Backend, bridge: RunningBridge, status: int) -> None:
    backend.websocket_status = status
    reply = handshake(bridge)
    assert reply.status == status
    assert reply.json["error"]["message"] == "WebSocket is not served"
    assert reply.header("x-qoo-bridge-error") == "upstream"
    assert reply.header("content-type") == "application/json"


def refuse_with(status: int, **error: object) -> wire.Route:
    def route(_: wire.Backend, exchange: wire.Exchange) -> None:
        exchange.json(status, {"error": error}, [("retry-after", "7")])
    return route


def answer_head(**fields: str) -> wire.Route:
    def route(_: wire.Backend, exchange: wire.Exchange) -> None:
        exchange.send(accept_head(exchange.request, **fields))
        exchange.left(5)
    return route


@pytest.mark.parametrize(
    "route",
    [
        pytest.param(answer_head(sec_websocket_accept=wire.accept_key("another")), id="wrong accept key"),
        pytest.param(answer_head(sec_websocket_accept=""), id="no accept key"),
        pytest.param(answer_head(sec_websocket_extensions="permessage-deflate"), id="an extension"),
        pytest.param(answer_head(upgrade="", connection="keep-alive"), id="no upgrade"),
        pytest.param(answer_head(upgrade="h2c"), id="another protocol"),
        pytest.param(refuse_with(200, message="fine"), id="200"),
        pytest.param(refuse_with(302, message="elsewhere"), id="302"),
        pytest.param(lambda _, exchange: exchange.close(), id="gone"),
    ],
)
def test_what_is_no_acceptance_is_502(
    bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch, route: wire.Route
) -> None:
    monkeypatch.setitem(wire.ROUTES, ROUTE, route)
    assert handshake(bridge).status == 502


def test_a_refusal_keeps_its_fields(bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    error = {"type": "usage_limit_reached", "message": "The usage limit has been reached",
             "resets_at": 1795346042}
    monkeypatch.setitem(wire.ROUTES, ROUTE, refuse_with(429, **error))
    reply = handshake(bridge)
    assert (reply.status, reply.header("retry-after")) == (429, "7")
    assert {name: reply.json["error"][name] for name in error} == error


def test_a_401_is_refreshed_and_tried_once_more(backend: wire.Backend, bridge: RunningBridge,
                                                dial: Dial) -> None:
    backend.revoke()
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    assert texts(client.read_turn()) == "hi"
    assert backend.refreshes == 1
    first, second = handshakes(backend)
    assert second.header("authorization") == f"Bearer {backend.access_token}" != first.header("authorization")


def test_a_second_401_is_the_clients(
    backend: wire.Backend, bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(wire.ROUTES, ROUTE, refuse_with(401, message="no"))
    reply = handshake(bridge)
    assert reply.status == 401
    assert len(handshakes(backend)) == 2


# -- client -> upstream: bytes ------------------------------------------------


def sized_frame(size: int) -> bytes:
    """Return a frame of Codex of exactly so many bytes of JSON, written as no encoder here would."""
    empty = json.dumps(create(message("user", "")), indent=1, ensure_ascii=False).encode()
    text = "\u00e9" * ((size - len(empty)) // 2)
    filled = json.dumps(create(message("user", text)), indent=1, ensure_ascii=False).encode()
    return filled + b" " * (size - len(filled))


@pytest.mark.parametrize("size", [700, 65535, 65536, 1_000_001])
def test_an_unchanged_frame_goes_on_byte_for_byte(
    bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream, size: int
) -> None:
    payload = sized_frame(size)
    assert len(payload) == size
    client = dial(bridge, CODEX_FIELDS)
    client.send_frame(masked(payload))
    assert client.read_turn()[-1]["type"] == "response.completed"
    assert next_upstream().wait_for(TEXT) == [payload]


def test_every_frame_is_masked_afresh(
    bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    client, payload, count = dial(bridge, CODEX_FIELDS), sized_frame(65600), 3
    for _ in range(count):
        client.send_frame(masked(payload))
        client.read_turn()
    upstream = next_upstream()
    assert upstream.wait_for(TEXT, count) == [payload] * count
    assert all(frame.masked and frame.final for frame in upstream.frames)
    with upstream.reader.changed:
        raw = bytes(upstream.reader.taken)
    head, whole = 10, len(raw) // count  # of a frame with a length of 64 bits
    masks = {raw[at + head : at + head + 4] for at in range(0, len(raw), whole)}
    assert len(masks) == count
    assert not masks & {b"\0\0\0\0"}


def test_fragments_become_one_frame_with_control_frames_between_them(
    bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    payload = json.dumps(create(message("user", "h\u00e9llo \U0001f30d")), ensure_ascii=False).encode()
    cut = payload.index("\U0001f30d".encode()) + 2  # inside of a character
    client = dial(bridge, CODEX_FIELDS)
    client.send_frame(masked(payload[:9], final=False))
    client.send_frame(masked(b"between", PING))
    assert read_until(client, PONG).payload == b"between"
    client.send_frame(masked(b"", CONTINUATION, final=False))
    client.send_frame(masked(payload[9:cut], CONTINUATION, final=False))
    client.send_frame(masked(b"", PONG))
    client.send_frame(masked(payload[cut:], CONTINUATION))
    assert texts(client.read_turn()) == "h\u00e9llo \U0001f30d"
    assert next_upstream().wait_for(TEXT) == [payload]


def test_a_frame_in_single_bytes_and_two_frames_in_one_piece(
    bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    client = dial(bridge, CODEX_FIELDS)
    payloads = [json.dumps(create(message("user", word))).encode() for word in ("one", "two", "three")]
    for byte in wire.frame_bytes(masked(payloads[0])):
        client.send(bytes([byte]))
    client.send(wire.frame_bytes(masked(payloads[1])) + wire.frame_bytes(masked(payloads[2])))
    assert [texts(client.read_turn()) for _ in payloads] == ["one", "two", "three"]
    assert next_upstream().wait_for(TEXT, 3) == payloads


@pytest.mark.parametrize("model", [PLAIN, LITE])
@pytest.mark.parametrize("headers", [CODEX_FIELDS, {}], ids=["codex", "sdk"])
def test_a_frame_parses_what_its_conversations_last_one_had_not(
    bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream, monkeypatch: pytest.MonkeyPatch,
    model: str, headers: dict[str, str]
) -> None:
    fresh: list[int] = []
    read_request = q.read_request

    def read(body: bytes, last: q.Spans = q.NOTHING_READ) -> q.Spans:
        spans = read_request(body, last)
        fresh.append(len(q.json_bytes(spans.fresh)))
        return spans

    monkeypatch.setattr(q, "read_request", read)
    client, items = dial(bridge, headers), [message("user", f"{number} é" * 900) for number in range(9)]
    tools = [{**TOOLS[0], "name": f"tool_{number}", "description": "x " * 500} for number in range(20)]
    frames = [create(*items[:8]), create(*items)]  # the whole conversation, then more of it
    frames += [create(message("user", text), previous_response_id="") for text in ("one", "two")]  # chained
    last = ""
    for frame in frames:
        chained = {"previous_response_id": last} if "previous_response_id" in frame else {}
        sent = {"type": "response.create", **chained, **frame, **chained, "model": model, "tools": tools}
        client.send_frame(masked(json.dumps(sent, ensure_ascii=False).encode()))
        last = client.read_turn()[-1]["response"]["id"]
    assert fresh[0] > 40_000
    assert [size < 8000 for size in fresh[1:]] == [True] * 3, fresh
    kinds = [kind for _, kind, _ in bridge.server.bridge.turns.last_requests._entries]
    assert sorted(kinds) == ["request", "start"]
    got = [json.loads(each)["input"] for each in next_upstream().wait_for(TEXT, 4)]
    assert [each[-len(frame["input"]):] for each, frame in zip(got, frames)] == [
        frame["input"] for frame in frames]


def test_a_request_is_kept_when_its_first_event_has_gone(
    bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To count what a large request takes would delay the event by milliseconds."""
    got, waited = threading.Event(), []
    keep = q.LastRequests.keep

    def wait(requests: q.LastRequests, *arguments: Any) -> bool:
        waited.append(got.wait(2))
        return keep(requests, *arguments)

    monkeypatch.setattr(q.LastRequests, "keep", wait)
    client = dial(bridge, CODEX_FIELDS)
    client.send_frame(masked(sized_frame(q.COUNTED_BODY + 1)))
    client.read_json()
    got.set()
    client.read_turn()
    assert waited == [True]


def test_a_message_of_two_megabytes_in_fragments(
    bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    payload, client = sized_frame(2 << 20), dial(bridge, CODEX_FIELDS)
    step = 300_000
    for at in range(0, len(payload), step):
        opcode = TEXT if at == 0 else CONTINUATION
        client.send_frame(masked(payload[at : at + step], opcode, final=at + step >= len(payload)))
    client.read_turn()
    assert next_upstream().wait_for(TEXT) == [payload]


def test_max_body_bounds_a_message_exactly(
    start: Start, dial: Dial, next_upstream: NextUpstream
) -> None:
    limit = 4096
    client = dial(start("--max-body", str(limit)), CODEX_FIELDS)
    client.send_frame(masked(sized_frame(limit)))
    client.read_turn()
    upstream = next_upstream()
    client.send_frame(masked(sized_frame(limit + 1)))
    assert client.read_close() == 1009
    assert upstream.ended.wait(SECOND)
    assert len(upstream.wait_for(TEXT)) == 1


@pytest.mark.parametrize("final", [True, False])
def test_a_message_far_above_max_body_gets_its_close_code_not_a_reset(
    start: Start, dial: Dial, final: bool
) -> None:
    client = dial(start("--max-body", "4096"), CODEX_FIELDS)
    with contextlib.suppress(OSError):  # it may be cut while it sends
        client.send_frame(masked(b" " * 4096, final=final))
        client.send_frame(masked(b" " * 2_000_000, TEXT if final else CONTINUATION))
    assert client.read_close() == 1009


def test_a_frame_of_another_type_passes(backend: wire.Backend, bridge: RunningBridge, dial: Dial) -> None:
    client = dial(bridge, CODEX_FIELDS)
    client.send_json({"type": "response.cancel", "temperature": 1})
    assert client.read_json()["error"]["message"] == "Unknown frame type 'response.cancel'"
    assert backend.wait_for_frames(1) == [{"type": "response.cancel", "temperature": 1}]


# -- client -> upstream: rules ------------------------------------------------

ABSENT: Any = object()
RULE_ROWS = [
    ("alias", {"model": "local_md"}, {"model": "gpt-5.6-sol"}),
    ("store", {"store": True}, {"store": False}),
    ("store null", {"store": None}, {"store": False}),
    ("stream", {"stream": False}, {"stream": True}),
    ("include", {"include": ["file_search_call.results"]},
     {"include": ["file_search_call.results", "reasoning.encrypted_content"]}),
    ("unsupported", {"temperature": 0.5, "top_p": 1, "max_output_tokens": 9, "metadata": {}, "user": "u",
                     "truncation": "auto", "stream_options": {}, "background": False},
     dict.fromkeys(("temperature", "top_p", "max_output_tokens", "metadata", "user", "truncation",
                    "stream_options", "background"), ABSENT)),
    ("tier fast", {"service_tier": "fast"}, {"service_tier": "priority"}),
    ("tier auto", {"service_tier": "auto"}, {"service_tier": ABSENT}),
    ("effort", {"reasoning": {"effort": "ultra"}}, {"reasoning": {"effort": "xhigh"}}),
    ("string", {"input": "hello"}, {"input": [message("user", "hello")]}),
    ("system", {"input": [message("system", "be brief"), message("user", "hi")]},
     {"input": [message("developer", "be brief"), message("user", "hi")]}),
    ("bare message", {"input": [{"role": "user", "content": "hi"}]},
     {"input": [{"type": "message", "role": "user", "content": "hi"}]}),
    ("continuity", {"input": [{"type": "reasoning", "id": "rs_1", "summary": []},
                              {**message("assistant", "a"), "id": "msg_1"}, message("user", "hi")]},
     {"input": [message("assistant", "a"), message("user", "hi")]}),
    ("reasoning stays",
     {"input": [wire.reasoning_item("rs_1"), {**message("assistant", "a"), "id": "msg_1"}]},
     {"input": [wire.reasoning_item("rs_1"), {**message("assistant", "a"), "id": "msg_1"}]}),
    ("id", {"input": [{**message("user", "hi"), "id": "m" * 70}]}, {"input": [message("user", "hi")]}),
    ("generate", {"generate": False}, {"generate": False}),
]


@pytest.mark.parametrize(("sent", "wanted"), [pytest.param(*row[1:], id=row[0]) for row in RULE_ROWS])
def test_a_frame_gets_every_rule_of_a_request(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, sent: Event, wanted: Event
) -> None:
    for headers in (CODEX_FIELDS, {}):
        client = dial(bridge, headers)
        client.send_json({**plain_create(), **sent})
        assert client.read_turn()[-1]["type"] == "response.completed", backend.refusals
    for came in backend.wait_for_frames(2):
        assert {name: came.get(name, ABSENT) for name in wanted} == wanted
        assert came["type"] == "response.create"
        assert came["prompt_cache_key"]
    if came["model"] == PLAIN:
        assert came["instructions"] == ""  # the last client is not a Codex


def test_the_session_of_the_handshake_is_the_cache_key(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(plain_create())
    client.read_turn()
    assert backend.wait_for_frames(1)[0]["prompt_cache_key"] == SESSION


def test_the_cache_key_stays_the_same_on_a_chain(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    client = dial(bridge)
    client.send_json(plain_create(message("user", "one")))
    first = client.read_turn()[-1]["response"]["id"]
    client.send_json(plain_create(message("user", "two"), previous_response_id=first))
    client.read_turn()
    one, two = (frame["prompt_cache_key"] for frame in backend.wait_for_frames(2))
    assert one == two


def test_a_prewarm_then_only_what_is_new(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create(generate=False, tools=TOOLS))
    prewarm = client.read_turn()[-1]["response"]
    result = {"type": "function_call_output", "call_id": "call_1", "output": "42"}
    payload = wire.dump(create(result, tools=TOOLS, previous_response_id=prewarm["id"]))
    client.send_frame(masked(payload))
    assert texts(client.read_turn()) == "42"
    assert next_upstream().wait_for(TEXT, 2)[1] == payload
    client.send_json(create(previous_response_id="resp_of_another_connection"))
    (error,) = client.read_turn()
    assert (error["status"], error["error"]["code"]) == (400, "previous_response_not_found")


def lite_items(frame: Event) -> tuple[list[Any] | None, list[str]]:
    """Return the tools that a lite frame carries, and the texts of its developer messages."""
    tools = [item["tools"] for item in frame["input"] if item["type"] == "additional_tools"]
    said = [item["content"][0]["text"] for item in frame["input"] if item.get("role") == "developer"
            and item["type"] == "message"]
    return (tools[0] if tools else None), said


def take_lite_turn(client: wire.WebSocketClient, **fields: Any) -> str:
    """Have one turn on a lite model in the plain form; return the response's id."""
    client.send_json(plain_create(model=LITE, **fields))
    final = client.read_turn()[-1]
    assert final["type"] == "response.completed", final
    return str(final["response"]["id"])


def test_a_plain_clients_frame_gets_the_lite_form(backend: wire.Backend, bridge: RunningBridge,
                                                  dial: Dial) -> None:
    client = dial(bridge)
    take_lite_turn(client, tools=TOOLS, instructions="be brief", parallel_tool_calls=True,
                   reasoning={"effort": "low"}, client_metadata={"mine": "kept"})
    (came,) = backend.wait_for_frames(1)
    assert came["input"][0] == {"type": "additional_tools", "role": "developer", "tools": TOOLS}
    assert came["input"][1:] == [message("developer", "be brief"), message("user", "hi")]
    assert came["client_metadata"] == {"mine": "kept", wire.LITE_METADATA: "true"}
    assert (came["parallel_tool_calls"], came["reasoning"]) == (False,
                                                                {"effort": "low", "context": "all_turns"})
    assert "tools" not in came and "instructions" not in came
    (asked,) = handshakes(backend)
    assert asked.header(wire.LITE_HEADER) is None


def test_tools_and_instructions_are_sent_once_on_a_chain(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    client = dial(bridge)
    first = take_lite_turn(client, tools=TOOLS, instructions="be brief")
    second = take_lite_turn(client, tools=TOOLS, instructions="be brief", previous_response_id=first)
    third = take_lite_turn(client, tools=TOOLS, instructions="be long", previous_response_id=second)
    take_lite_turn(client, tools=OTHER_TOOLS, instructions="be long", previous_response_id=third)
    take_lite_turn(client, tools=OTHER_TOOLS, instructions="be long")  # a new chain
    frames = backend.wait_for_frames(5)
    assert [lite_items(frame) for frame in frames] == [
        (TOOLS, ["be brief"]), (None, []), (None, ["be long"]), (OTHER_TOOLS, []), (OTHER_TOOLS, ["be long"]),
    ]
    assert frames[1]["input"] == [message("user", "hi")]
    assert all(frame["client_metadata"][wire.LITE_METADATA] == "true" for frame in frames)


def test_another_connection_has_a_chain_of_its_own(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    for client in (dial(bridge), dial(bridge)):
        take_lite_turn(client, tools=TOOLS)
    assert [lite_items(frame)[0] for frame in backend.wait_for_frames(2)] == [TOOLS, TOOLS]


def test_tools_of_a_refused_frame_are_sent_again(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    client = dial(bridge)
    first = take_lite_turn(client, tools=TOOLS)
    backend.on_frame(lambda ws, _: ws.error(wire.detail(503, "Our servers are overloaded")))
    client.send_json(plain_create(model=LITE, tools=OTHER_TOOLS, previous_response_id=first))
    assert client.read_turn()[-1]["type"] == "error"
    take_lite_turn(client, tools=OTHER_TOOLS, previous_response_id=first)
    assert [lite_items(frame)[0] for frame in backend.wait_for_frames(3)] == [TOOLS, OTHER_TOOLS, OTHER_TOOLS]


def test_a_branch_of_the_chain_has_the_tools_of_where_it_began(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    client = dial(bridge)
    first = take_lite_turn(client, tools=TOOLS)
    take_lite_turn(client, tools=OTHER_TOOLS, previous_response_id=first)
    take_lite_turn(client, tools=OTHER_TOOLS, previous_response_id=first)
    assert [lite_items(frame)[0] for frame in backend.wait_for_frames(3)] == [TOOLS, OTHER_TOOLS, OTHER_TOOLS]


def test_a_lite_frame_of_codex_goes_on_byte_for_byte(
    bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    lite: Event = {"model": LITE, "parallel_tool_calls": False, "reasoning": {"context": "all_turns"},
                   "tool_choice": "auto", "client_metadata": {wire.LITE_METADATA: "true"}}
    tools = {"type": "additional_tools", "role": "developer", "tools": TOOLS}
    client = dial(bridge, CODEX_FIELDS)
    payloads = [json.dumps(create(**{**lite, "input": items}, generate=False)).encode()
                for items in ([], [tools, message("developer", "d"), message("user", "hi")])]
    for payload in payloads:
        client.send_frame(masked(payload))
        assert client.read_turn()[-1]["type"] == "response.completed"
    assert next_upstream().wait_for(TEXT, 2) == payloads


# -- repairs ------------------------------------------------------------------


def test_an_unknown_parameter_is_dropped_and_remembered(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordLog(bridge, monkeypatch)
    client = dial(bridge, CODEX_FIELDS)
    for _ in range(2):
        client.send_json(create(shiny=1))
        turn = client.read_turn()
        assert turn[0]["type"] == "response.created"
        assert turn[-1]["type"] == "response.completed"
    assert [frame.get("shiny") for frame in backend.wait_for_frames(3)] == [1, None, None]
    assert [records.next().repairs, records.next().repairs] == [("drop-parameter=shiny",), ()]
    assert len(records.lines) == 2


@pytest.mark.parametrize(
    ("items", "repair"),
    [
        ([wire.reasoning_item("rs_9", "OTHER account's"), message("user", "hi")], "continuity"),
        ([{**message("assistant", "a"), "id": "msg_partnered"}, message("user", "hi")], "continuity"),
    ],
)
def test_continuity_is_repaired(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch,
    items: list[wire.Item], repair: str,
) -> None:
    backend.partners["msg_partnered"] = "rs_missing"
    records, client = RecordLog(bridge, monkeypatch), dial(bridge, CODEX_FIELDS)
    client.send_json(create(*items))
    assert client.read_turn()[-1]["type"] == "response.completed"
    assert records.next().repairs == (repair,)
    assert not any("id" in item for item in backend.wait_for_frames(2)[1]["input"])


def test_required_instructions_are_repaired(backend: wire.Backend, bridge: RunningBridge, dial: Dial) -> None:
    backend.require_instructions = True
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    assert client.read_turn()[-1]["type"] == "response.completed"
    assert [frame.get("instructions") for frame in backend.wait_for_frames(2)] == [None, ""]


def test_the_form_is_repaired_when_the_catalogue_has_changed(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    client = dial(bridge)
    client.send_json(plain_create())
    client.read_turn()
    backend.catalog = [wire.model_entry(PLAIN, 1)]  # lite from now on
    client.send_json(plain_create(tools=TOOLS))
    assert client.read_turn()[-1]["type"] == "response.completed", backend.refusals
    assert lite_items(backend.wait_for_frames(3)[2])[0] == TOOLS


@pytest.mark.parametrize("text", ["Unsupported parameter: input", "Something else", ""])
def test_a_refusal_without_a_repair_is_passed_on_as_it_came(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, text: str
) -> None:
    frame = {"type": "error", "status": 400, "error": {"message": text, "further": [1]}}
    raw = wire.frame_bytes(Frame(TEXT, json.dumps(frame, indent=2).encode()))
    backend.on_frame(send_raw(raw))
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    assert client.reader.exactly(len(raw)) == raw
    assert len(backend.wait_for_frames(1)) == 1
    client.send_json(create())
    assert client.read_turn()[-1]["type"] == "response.completed"


def test_there_is_no_repair_after_an_event(backend: wire.Backend, bridge: RunningBridge, dial: Dial) -> None:
    def fail_late(ws: wire.WebSocketExchange, _: Event) -> None:
        ws.event(wire.created())
        ws.error(wire.detail(400, "Unsupported parameter: text"))

    backend.on_frame(fail_late)
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create(text={"verbosity": "low"}))
    assert [event["type"] for event in client.read_turn()] == ["response.created", "error"]
    assert len(backend.wait_for_frames(1)) == 1


def test_repairs_end(backend: wire.Backend, bridge: RunningBridge, dial: Dial) -> None:
    unknown = {f"shiny_{number}": 1 for number in range(9)}
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create(**unknown))
    (error,) = client.read_turn()
    assert error["error"]["message"].startswith("Unsupported parameter: shiny_")
    assert len(backend.wait_for_frames(5)) == 5  # the first, and four repairs


# -- upstream -> client -------------------------------------------------------


@pytest.mark.parametrize("headers", [CODEX_FIELDS, {}], ids=["codex", "plain"])
def test_upstreams_frames_are_passed_on_byte_for_byte(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, headers: dict[str, str]
) -> None:
    def event(size: int) -> bytes:
        empty = json.dumps({"type": "response.output_text.delta", "delta": ""}, indent=1).encode()
        return empty.replace(b'""', b'"%b"' % (b"x" * (size - len(empty))))

    raw = b"".join(wire.frame_bytes(Frame(TEXT, event(size))) for size in (125, 126, 65535, 65536, 2 << 20))
    torn = '{ "type" : "response.output_text.delta", "delta" : "\u00e9\U0001f30d" }'.encode()
    fragments = (
        wire.frame_bytes(Frame(TEXT, torn[:-7], final=False)),
        wire.frame_bytes(Frame(CONTINUATION, b"", False)),
        wire.frame_bytes(Frame(CONTINUATION, torn[-7:])),
    )
    done = json.dumps(wire.completed(output=[wire.message_item("there already")]), indent=1).encode()
    end = wire.frame_bytes(Frame(TEXT, b"no JSON at all")) + wire.frame_bytes(Frame(TEXT, done))
    backend.on_frame(send_raw(raw, *fragments, end))
    client = dial(bridge, headers)
    client.send_json(create() if headers else plain_create())
    expected = raw + wire.frame_bytes(Frame(TEXT, torn)) + end  # the same message, in one frame
    assert client.reader.exactly(len(expected)) == expected


def test_a_ping_between_fragments_is_answered_and_not_passed_on(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    payload = wire.dump(wire.completed())
    first = wire.frame_bytes(Frame(TEXT, payload[:9], final=False))
    last = wire.frame_bytes(Frame(CONTINUATION, payload[9:]))
    backend.on_frame(send_raw(first, wire.frame_bytes(Frame(PING, b"up")), last))
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    assert client.reader.exactly(len(payload) + 4) == wire.frame_bytes(Frame(TEXT, payload))
    assert next_upstream().wait_for(PONG) == [b"up"]


def test_an_event_comes_before_the_next_one_is_there(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    read = threading.Event()

    def wait_between(ws: wire.WebSocketExchange, _: Event) -> None:
        ws.event(wire.created())
        assert read.wait(5)
        ws.event(wire.completed())

    backend.on_frame(wait_between)
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    assert client.read_json()["type"] == "response.created"
    read.set()
    assert client.read_json()["type"] == "response.completed"


@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
def test_a_plain_client_gets_the_terminal_output_filled(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, kind: str
) -> None:
    thought, said = wire.reasoning_item(), wire.message_item("hello")
    turn = wire.items_turn(thought, said)
    final = {**turn[-1], "type": f"response.{kind}"}
    backend.on_frame(lambda ws, _: ws.events(*turn[:-1], final))
    client = dial(bridge)
    client.send_json(plain_create())
    got = client.read_turn()
    assert got[:-1] == turn[:-1]
    assert got[-1] == {**final, "response": {**final["response"], "output": [thought, said]}}


def test_what_comes_with_or_without_a_request_is_passed_on(
    bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = wire.frame_bytes(Frame(TEXT, b'{"type": "codex.rate_limits" }'))
    raw = limits + wire.frame_bytes(Frame(TEXT, b"\xc3\xa9"))

    def greet(_: wire.Backend, exchange: wire.Exchange) -> None:
        exchange.send(accept_head(exchange.request) + raw)
        exchange.left(5)

    monkeypatch.setitem(wire.ROUTES, ROUTE, greet)
    client = dial(bridge, CODEX_FIELDS)
    assert client.reader.exactly(len(raw)) == raw


HOSTILE_EVENTS: list[Any] = [
    {"type": "response.failed", "response": "text"},
    {"type": "response.failed", "response": [1]},
    {"type": "response.failed", "response": {"error": 7, "output": []}},
    {"type": "response.completed", "response": {"usage": [], "output": 3}},
    {"type": "response.completed", "response": None},
    {"type": "error", "error": "text"},
    {"type": "error", "error": [], "status": "400"},
    {"type": "error", "error": {"message": [], "code": {}, "type": 4}, "status": True},
    {"type": "error", "error": {"message": "odd"}, "status": 10**30},
]


@pytest.mark.parametrize("event", HOSTILE_EVENTS)
def test_hostile_events_are_passed_on_and_end_their_request(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch, event: Event
) -> None:
    records = RecordLog(bridge, monkeypatch)
    backend.on_frame(lambda ws, _: ws.send_frame(Frame(TEXT, wire.dump(event))))
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    with expect_no_fault(bridge):
        assert client.read_json() == event
        assert records.next().end == event["type"].rpartition(".")[2]
        client.send_json(create())
        if event["type"] == "error":  # without a status Codex understands only the failure
            assert client.read_json()["type"] == "response.failed"
        assert client.read_turn()[-1]["type"] == "response.completed"
        assert records.next().end == "completed"


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity"])
def test_a_terminal_event_that_cannot_be_encoded_again_is_passed_on(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, number: str
) -> None:
    item = wire.dump({"type": "response.output_item.done", "output_index": 0, "item": wire.message_item("m")})
    final = b'{"type":"response.completed","response":{"output":[],"x":%b}}' % number.encode()
    raw = wire.frame_bytes(Frame(TEXT, item)) + wire.frame_bytes(Frame(TEXT, final))
    backend.on_frame(send_raw(raw))
    client = dial(bridge)
    client.send_json(plain_create())
    with expect_no_fault(bridge):
        assert client.reader.exactly(len(raw)) == raw


def test_an_error_after_the_first_event_ends_its_request(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(ws: wire.WebSocketExchange, _: Event) -> None:
        ws.event(wire.created())
        ws.error(wire.detail(500, "The server had an error"))

    records = RecordLog(bridge, monkeypatch)
    backend.on_frame(break_off)
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    assert client.read_turn()[-1]["type"] == "error"
    client.send_json(create(message("user", "again")))
    assert texts(client.read_turn()) == "again"
    assert records.next().end == "error"
    assert records.next().end == "completed"


# -- ping, pong, silence ------------------------------------------------------


def test_pings_are_answered_on_both_sides(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    client = dial(bridge, CODEX_FIELDS)
    for payload in (b"", b"p" * 125):
        client.send_frame(masked(payload, PING))
        answer = wire.read_frame(client.reader)
        assert (answer.opcode, answer.payload, answer.masked) == (PONG, payload, False)
    backend.on_frame(lambda ws, _: ws.send_frame(Frame(PING, b"from upstream")))
    client.send_json(create())
    upstream = next_upstream()
    assert upstream.wait_for(PONG) == [b"from upstream"]
    assert all(frame.masked for frame in upstream.frames)


def test_silence_is_filled_with_pings_on_both_sides(
    backend: wire.Backend, start: Start, dial: Dial, next_upstream: NextUpstream
) -> None:
    pinged = threading.Event()

    def answer_late(ws: wire.WebSocketExchange, _: Event) -> None:
        assert pinged.wait(5)
        ws.events(*wire.text_turn("late"))

    client = dial(start("--keepalive", "0.05"), CODEX_FIELDS)
    assert read_until(client, PING).masked is False  # idle
    next_upstream().wait_for(PING, 2)
    backend.on_frame(answer_late)
    client.send_json(create())
    read_until(client, PING)  # within a turn
    pinged.set()
    assert texts(client.read_turn()) == "late"


@pytest.mark.parametrize("chatty", [False, True], ids=["silent client", "chatty client"])
def test_a_dead_upstream_is_given_up_whatever_the_client_does(
    start: Start, dial: Dial, monkeypatch: pytest.MonkeyPatch, chatty: bool
) -> None:
    gone = threading.Event()

    def never_speak(_: wire.Backend, exchange: wire.Exchange) -> None:
        exchange.send(accept_head(exchange.request))
        if exchange.left(5):
            gone.set()

    monkeypatch.setitem(wire.ROUTES, ROUTE, never_speak)
    client = dial(start("--keepalive", "0.06", "--idle-timeout", "0.12"), CODEX_FIELDS)
    begun = time.monotonic()
    with contextlib.suppress(OSError):
        while not gone.wait(0.02) and time.monotonic() - begun < SECOND:
            if chatty:
                client.send_frame(masked(b"", PONG))
    assert gone.is_set()
    assert client.read_close() == 1014


def test_a_chatty_client_does_not_end_an_idle_connection(
    start: Start, dial: Dial, next_upstream: NextUpstream
) -> None:
    client = dial(start("--keepalive", "0.06", "--idle-timeout", "0.3"), CODEX_FIELDS)
    upstream = next_upstream()
    for _ in range(16):  # in all longer than --idle-timeout
        if upstream.ended.wait(0.02):
            break
        client.send_frame(masked(b"", PONG))
    assert not upstream.ended.is_set()
    client.send_json(create())
    assert client.read_turn()[-1]["type"] == "response.completed"


# -- the end ------------------------------------------------------------------

BYE = struct.pack("!H", 4321) + b"bye"


@pytest.mark.parametrize(
    ("payload", "expected"), [(BYE, (4321, b"bye")), (b"", (1005, b"")), (b"\x03\xe8", (1000, b""))]
)
def test_a_clients_close_goes_up_with_code_and_reason(
    bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream, payload: bytes,
    expected: tuple[int, bytes]
) -> None:
    client, upstream = dial(bridge, CODEX_FIELDS), next_upstream()
    client.send_frame(masked(payload, CLOSE))
    answer = read_until(client, CLOSE)
    assert (answer.payload[:2], answer.masked) == (payload[:2], False)
    assert client.left(SECOND)
    assert upstream.ended.wait(SECOND)
    assert upstream.close_frame == expected


def test_a_clients_close_in_a_turn_goes_up(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    backend.on_frame(lambda ws, _: ws.event(wire.created()))
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    client.read_json()
    client.send_frame(masked(BYE, CLOSE))
    assert client.read_close() == 4321
    assert next_upstream().close_frame == (4321, b"bye")


def test_a_clients_close_while_upstream_speaks_goes_up(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    backend.on_frame(lambda ws, _: ws.events(*[wire.created()] * 400))
    client = dial(bridge, CODEX_FIELDS)
    client.send(wire.frame_bytes(masked(wire.dump(create()))) + wire.frame_bytes(masked(BYE, CLOSE)))
    assert client.read_close() == 4321
    assert next_upstream().close_frame == (4321, b"bye")


def test_an_upstream_that_speaks_on_after_the_end_does_not_hold_the_connection(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    done = threading.Event()

    def speak_on(ws: wire.WebSocketExchange, _: Event) -> None:
        with contextlib.suppress(OSError):
            while not done.is_set():
                ws.event(wire.created())
        ws.exchange.closed = True

    backend.on_frame(speak_on)
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    client.read_json()
    client.send_frame(masked(BYE, CLOSE))
    assert client.read_close() == 4321
    try:
        assert next_upstream().ended.wait(2 * SECOND)
    finally:
        done.set()


def answer_then(leave: Callable[[wire.WebSocketExchange], None], running: bool) -> wire.FrameReply:
    """Answer a frame, or only begin to, and then leave; all in the stand-in's own thread, as TLS wants it."""
    def reply(ws: wire.WebSocketExchange, body: Event) -> None:
        ws.events(*(wire.text_turn()[:1] if running else wire.text_turn()))
        leave(ws)
    return reply


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1012, "restart"), (3000, "no"),
                                              (4999, "\u00e9" * 61)])
@pytest.mark.parametrize("running", [False, True], ids=["idle", "in a turn"])
def test_upstreams_close_goes_down_with_code_and_reason(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, code: int, reason: str, running: bool
) -> None:
    backend.on_frame(answer_then(lambda ws: ws.close(code, reason), running))
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    frame = read_until(client, CLOSE)
    assert (wire.close_code(frame), frame.payload[2:].decode()) == (code, reason)
    assert client.left(SECOND)


def test_upstreams_close_without_a_code_and_its_answer(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    backend.on_frame(send_raw(wire.frame_bytes(Frame(CLOSE, b""))))
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    assert read_until(client, CLOSE).payload == b""
    assert next_upstream().close_frame == (1005, b"")  # its own close frame, answered


@pytest.mark.parametrize("running", [False, True], ids=["idle", "in a turn"])
@pytest.mark.parametrize("leave", ["half_close", "close", "reset"])
def test_a_client_that_leaves_closes_upstream_within_a_second(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream, leave: str,
    running: bool
) -> None:
    client, started = dial(bridge, CODEX_FIELDS), threading.Event()

    def begin(ws: wire.WebSocketExchange, _: Event) -> None:
        ws.event(wire.created())
        started.set()

    if running:
        backend.on_frame(begin)
        client.send_json(create())
        assert started.wait(5)
    getattr(client, leave)()
    assert next_upstream().ended.wait(SECOND)


@pytest.mark.parametrize("running", [False, True], ids=["idle", "in a turn"])
@pytest.mark.parametrize("leave", [lambda ws: ws.exchange.close(), lambda ws: ws.reset()], ids=["FIN", "RST"])
def test_an_upstream_that_leaves_closes_the_client_within_a_second(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial,
    leave: Callable[[wire.WebSocketExchange], None], running: bool,
) -> None:
    left = threading.Event()

    def leave_now(ws: wire.WebSocketExchange) -> None:
        left.set()
        leave(ws)

    backend.on_frame(answer_then(leave_now, running))
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    assert left.wait(5)
    client.sock.settimeout(SECOND)
    assert wire.close_code(read_until(client, CLOSE)) in (1001, 1014)
    assert client.left(SECOND)


# -- protocol errors ----------------------------------------------------------


def unmasked(opcode: int, payload: bytes, **fields: Any) -> bytes:
    return wire.frame_bytes(Frame(opcode, payload, **fields))


def breaches(mask: bool) -> list[Any]:
    """Return hostile bytes with the close code of RFC 6455 that answers them, for either side."""
    def frame(opcode: int, payload: bytes, final: bool = True, reserved: int = 0,
              flip: bool = False) -> bytes:
        return wire.frame_bytes(Frame(opcode, payload, final, mask != flip, reserved))

    bit = b"\xff" if mask else b"\x7f"  # a length in 64 bits
    rows = [
        ("the other side's masking", frame(TEXT, b"{}", flip=True), 1002),
        ("first reserved bit", frame(TEXT, b"{}", reserved=4), 1002),
        ("last reserved bit", frame(PING, b"", reserved=1), 1002),
        ("reserved data opcode", frame(3, b"{}"), 1002),
        ("reserved control opcode", frame(0xB, b""), 1002),
        ("oversize ping", frame(PING, b"p" * 126), 1002),
        ("fragmented ping", frame(PING, b"p", final=False), 1002),
        ("nothing to continue", frame(CONTINUATION, b"{}"), 1002),
        ("interrupted message", frame(TEXT, b"{", final=False) + frame(TEXT, b"}"), 1002),
        ("bad UTF-8", frame(TEXT, b'{"a":"\xff"}'), 1007),
        ("surrogate in UTF-8", frame(TEXT, b'{"a":"\xed\xa0\x80"}'), 1007),
        ("bad UTF-8 in fragments", frame(TEXT, b"\xc3", final=False) + frame(CONTINUATION, b"("), 1007),
        ("close code of one byte", frame(CLOSE, b"\x03"), 1002),
        ("close code 1005", frame(CLOSE, b"\x03\xed"), 1002),
        ("close code 999", frame(CLOSE, b"\x03\xe7"), 1002),
        ("close reason not UTF-8", frame(CLOSE, b"\x03\xe8\xff"), 1007),
        ("length with its highest bit", b"\x81" + bit + b"\x80" + b"\0" * 7, 1002),
        ("length longer than needed", b"\x81" + (b"\xfe" if mask else b"\x7e") + b"\x00\x05", 1002),
        ("message too big", b"\x81" + bit + struct.pack("!Q", 1 << 40), 1009),
    ]
    return [pytest.param(raw, code, id=name) for name, raw, code in rows]


@pytest.mark.parametrize(
    ("raw", "code"), [*breaches(mask=True), pytest.param(unmasked(2, b"b", masked=True), 1003, id="binary")]
)
def test_a_hostile_client_gets_its_close_code(
    bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream, raw: bytes, code: int
) -> None:
    client = dial(bridge, CODEX_FIELDS)
    client.send(raw)
    assert client.read_close() == code
    assert client.left(SECOND)
    assert next_upstream().ended.wait(SECOND)


def test_a_breach_is_answered_after_what_came_before_it(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    client = dial(bridge, CODEX_FIELDS)
    client.send(unmasked(PING, b"first", masked=True) + unmasked(TEXT, b"{}"))
    assert wire.read_frame(client.reader).payload == b"first"
    assert client.read_close() == 1002


def test_a_breach_with_much_more_behind_it_gets_its_close_code_not_a_reset(
    bridge: RunningBridge, dial: Dial
) -> None:
    client = dial(bridge, CODEX_FIELDS)
    with contextlib.suppress(OSError):
        client.send(unmasked(TEXT, b"{}") + b"x" * 3_000_000)
    assert client.read_close() == 1002


BREACHES_BY_CODE = list({row.values[1]: row for row in breaches(mask=False)}.values())  # one of each code


@pytest.mark.parametrize(("raw", "_"), breaches(mask=False))
def test_a_hostile_upstream_is_a_bad_gateway_to_the_client(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream, raw: bytes, _: int
) -> None:
    backend.on_frame(send_raw(raw))
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    assert client.read_close() == 1014
    assert client.left(SECOND)
    assert next_upstream().ended.wait(SECOND)


@pytest.mark.parametrize(("raw", "code"), BREACHES_BY_CODE)
def test_a_hostile_upstream_gets_its_close_code(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream, raw: bytes,
    code: int
) -> None:
    backend.on_frame(send_raw(raw))
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    assert next_upstream().close_frame[0] == code


def test_a_clients_breach_is_not_told_to_upstream(
    bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    client = dial(bridge, CODEX_FIELDS)
    client.send(unmasked(TEXT, b"{}"))
    assert next_upstream().close_frame[0] in (1000, 1001)


BAD_FRAMES = [
    (b"", None), (b"{", None), (b"no JSON", None), (b'{"a": NaN}', None), (b"[" * 100_000, None),
    (b"[]", None), (b"null", None), (b'"response.create"', None), (b"7", None), (b"{}", "model"),
    (b'{"type":"response.create"}', "model"), (b'{"type":"response.create","model":7}', "model"),
    (b'{"type":"response.create","model":"gpt-5.5","input":7}', "input"),
    (b'{"type":7,"model":[]}', "model"), (b'{"type":null}', "model"),
    (b'{"type":"response.create","model":"local_md","input":"hi","seed":1e999}', None),
]


def test_a_bad_frame_gets_an_error_frame_and_the_connection_goes_on(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, client = RecordLog(bridge, monkeypatch), dial(bridge, CODEX_FIELDS)
    for count, (payload, param) in enumerate(BAD_FRAMES, 1):
        client.send_frame(masked(payload))
        error = client.read_json()
        refusal = (error["type"], error["status"], error["error"]["param"])
        assert refusal == ("error", 400, param), payload[:80]
        assert isinstance(error["error"]["message"], str)
        assert (records.next().status, len(records.lines)) == (400, count)
    assert backend.frames == []
    client.send_json(create())
    assert client.read_turn()[-1]["type"] == "response.completed"


VALUES: list[Any] = [
    None, True, 0, -1.5, "", "\ud800", [], [None, 1, "a", [], {}], {}, {"effort": []}, {"id": 1},
]


def mutations(frame: Event) -> Iterator[Event]:
    """Return the frame with every kind of JSON value in every place."""
    for name in [*frame, "tools", "instructions", "reasoning", "service_tier", "client_metadata",
                 "previous_response_id", "generate", "include", "parallel_tool_calls"]:
        for value in VALUES:
            if name != "previous_response_id" or not isinstance(value, (list, dict)):  # it is hashed
                yield {**frame, name: value}


@pytest.mark.parametrize("model", [PLAIN, LITE, "local_md", "unknown"])
def test_any_json_in_any_place_gets_an_answer(
    backend: wire.Backend, start: Start, dial: Dial, model: str
) -> None:
    bridge = start()
    backend.enforce_lite = False
    client = dial(bridge)
    for frame in mutations(plain_create(model=model)):
        client.send_json(frame)
        if isinstance(frame["type"], str) and frame["type"] != "response.create":
            assert client.read_json()["type"] == "error"
        else:
            assert client.read_turn()[-1]["type"] in ("response.completed", "error")
    with expect_no_fault(bridge):
        client.send_json(plain_create())
        client.read_turn()


# -- log, counters, limits, shutdown ------------------------------------------


def test_a_response_create_is_told_like_an_http_request(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordLog(bridge, monkeypatch)
    client = dial(bridge)
    frame = plain_create(model="local_md", temperature=1, stream=True)
    client.send_json(frame)
    client.read_turn()
    record = records.next()
    body = {key: value for key, value in frame.items() if key != "type"}
    assert wire.post(bridge.address, "/v1/responses", body).status == 200
    http = records.next()
    for name in ("client", "key", "path", "model", "slug", "rules", "repairs", "status", "events", "usage",
                 "end",
                 "error_by", "error_code"):
        assert (name, getattr(record, name)) == (name, getattr(http, name))
    assert (record.method, record.status, record.end) == ("WS", 200, "completed")
    assert record.first_byte is not None and 0 < record.first_byte <= record.total
    assert len(records.lines) == 2


def test_the_bytes_of_the_terminal_frame_are_counted(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordLog(bridge, monkeypatch)
    raw = [wire.frame_bytes(Frame(TEXT, wire.dump(event))) for event in (wire.created(), wire.completed())]
    backend.on_frame(send_raw(*raw))
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    client.read_turn()
    assert records.next().bytes == len(b"".join(raw))


def test_an_answer_of_one_frame_has_a_first_byte(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordLog(bridge, monkeypatch)
    backend.on_frame(lambda ws, _: ws.event(wire.completed()))
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    client.read_turn()
    assert records.next().first_byte is not None


def test_a_refused_frame_is_told_with_its_status_and_code(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordLog(bridge, monkeypatch)
    backend.on_frame(lambda ws, _: ws.error(wire.fault(429, "slow down", "rate_limit_exceeded")))
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    client.read_turn()
    record = records.next()
    assert (record.end, record.error_by, record.error_code) == ("error", "upstream", "rate_limit_exceeded")
    assert record.status == 429


def test_a_client_that_leaves_is_no_failed_request(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordLog(bridge, monkeypatch)
    backend.on_frame(lambda ws, _: ws.event(wire.created()))
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    client.read_json()
    client.close()
    assert records.next().end == "client_closed"


def test_a_client_that_takes_nothing_any_more_is_no_failed_request(
    bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, client, send = RecordLog(bridge, monkeypatch), dial(bridge, CODEX_FIELDS), q.Connection.send

    def fail_at_the_client(peer: q.Connection, payload: bytes | memoryview, seconds: float) -> None:
        if not isinstance(peer.sock, ssl.SSLSocket):
            raise BrokenPipeError
        send(peer, payload, seconds)

    monkeypatch.setattr(q.Connection, "send", fail_at_the_client)
    client.send_json(create())
    record = records.next()
    assert (record.end, record.error_by) == ("client_closed", "")


def test_an_upstream_that_leaves_cuts_the_request(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordLog(bridge, monkeypatch)

    def break_off(ws: wire.WebSocketExchange, _: Event) -> None:
        ws.event(wire.created())
        ws.exchange.close()

    backend.on_frame(break_off)
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    assert client.read_close() == 1014  # many clients take 1001 for a clean end
    record = records.next()
    assert (record.end, record.events) == ("cut", 1)
    assert record.error == ("bridge", "upstream_error")  # as over HTTP


def test_a_conversation_goes_on_over_another_connection(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    first = dial(bridge)
    first.send_json(plain_create(message("user", "one")))
    one = first.read_turn()[-1]["response"]
    first.send_json(plain_create(message("user", "two"), previous_response_id=one["id"]))
    two = first.read_turn()[-1]["response"]
    second = dial(bridge)  # upstream knows nothing of the first here, and would refuse its id
    second.send_json(plain_create(message("user", "three"), previous_response_id=two["id"]))
    (answer,) = second.read_turn()[-1]["response"]["output"]
    assert answer["content"][0]["text"] == "three"
    said = [item["content"][0]["text"] for item in backend.frames[-1]["input"]]
    assert said == ["one", "one", "two", "two", "three"]  # the stand-in echoes
    body = {"model": PLAIN, "input": "four", "previous_response_id": two["id"]}
    assert wire.post(bridge.address, "/v1/responses", body).status == 200
    assert wire.get(bridge.address, f"/v1/responses/{one['id']}").json["id"] == one["id"]
    second.send_json(plain_create(previous_response_id="resp_unknown"))
    refused = second.read_json()
    assert (refused["status"], refused["error"]["param"]) == (400, "previous_response_id")


def test_a_client_that_leaves_in_the_handshake_does_not_run_on(
    bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, send = threading.Event(), q.Exchange.send

    def leave(exchange: q.Exchange, payload: bytes) -> None:
        if payload.startswith(b"HTTP/1.1 101"):
            tried.set()
            raise q.ClientLeft("left")
        send(exchange, payload)

    monkeypatch.setattr(q.Exchange, "send", leave)
    left = contextlib.suppress(OSError, wire.PeerLeft)
    with contextlib.closing(wire.WebSocketClient(bridge.address)) as client, left:
        client.connect("/v1/responses")
    assert tried.wait(5)
    assert [row["id"] for row in bridge.bridge.telemetry.snapshot(0)["open"]] == []


def test_a_codex_is_not_stored(backend: wire.Backend, bridge: RunningBridge, dial: Dial) -> None:
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    name = client.read_turn()[-1]["response"]["id"]
    assert wire.get(bridge.address, f"/v1/responses/{name}").status == 404


def test_an_upstream_that_leaves_at_rest_is_no_failure(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    client = dial(bridge, CODEX_FIELDS)
    backend.cut_connections()
    assert client.read_close() == 1001


def test_counters_and_running_requests(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, gate = RecordLog(bridge, monkeypatch), threading.Event()

    def wait(ws: wire.WebSocketExchange, _: Event) -> None:
        ws.event(wire.created())
        assert gate.wait(5)
        ws.event(wire.completed())

    telemetry, client = bridge.bridge.telemetry, dial(bridge, CODEX_FIELDS)
    backend.on_frame(wait)
    client.send_json(create())
    client.read_json()
    running = [row["model"] for row in telemetry.snapshot(time.time())["open"] if row["method"] == "WS"]
    assert running == [PLAIN]
    gate.set()
    client.read_json()
    client.send_frame(masked(b"["))
    client.read_json()
    ends = [records.next().end for _ in range(2)]
    snapshot = telemetry.snapshot(time.time())
    assert ends == ["completed", "error"]
    assert [row for row in snapshot["open"] if row["method"] == "WS"] == []
    assert (snapshot["totals"]["requests"], snapshot["totals"]["failed_requests"]) == (2, 1)
    assert (snapshot["totals"]["events"], snapshot["totals"]["input"]) == (2, wire.USAGE["input_tokens"])


def test_an_idle_websocket_is_no_running_request(
    bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, client = RecordLog(bridge, monkeypatch), dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    client.read_turn()
    records.next()
    assert bridge.bridge.telemetry.snapshot(time.time())["open"] == []


def test_limit_holds_for_the_frames_of_a_key_over_all_its_connections(
    backend: wire.Backend, start: Start, dial: Dial
) -> None:
    bridge = start("--api-key", "ann=secret-of-ann", "--limit", "ann=1")
    fields = {**CODEX_FIELDS, "authorization": "Bearer secret-of-ann"}
    running, most = 0, 0
    first_runs, second_sent = threading.Event(), threading.Event()

    def slowly(ws: wire.WebSocketExchange, body: Event) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        first_runs.set()
        assert second_sent.wait(5)
        with ws.backend.changed:  # the second would come here while the first still runs
            ws.backend.changed.wait_for(lambda: len(ws.backend.frames) > 1, 0.1)
        running -= 1
        wire.answer_frame(ws, body)

    backend.on_frame(slowly, slowly)
    one, two = dial(bridge, fields), dial(bridge, fields)
    one.send_json(create(message("user", "one")))
    assert first_runs.wait(5)
    two.send_json(create(message("user", "two")))
    second_sent.set()
    assert (texts(one.read_turn()), texts(two.read_turn())) == ("one", "two")
    assert most == 1


def test_limit_on_one_connection_is_an_error_frame_not_a_deadlock(
    backend: wire.Backend, start: Start, dial: Dial
) -> None:
    bridge = start("--api-key", "ann=secret-of-ann", "--limit", "ann=1")
    gate = threading.Event()

    def wait(ws: wire.WebSocketExchange, body: Event) -> None:
        assert gate.wait(5)
        wire.answer_frame(ws, body)

    backend.on_frame(wait)
    client = dial(bridge, {**CODEX_FIELDS, "authorization": "Bearer secret-of-ann"})
    client.send_json(create())
    client.send_json(create())
    error = client.read_json()
    assert (error["type"], error["status"]) == ("error", 429)
    gate.set()
    assert client.read_turn()[-1]["type"] == "response.completed"
    client.send_json(create())
    assert client.read_turn()[-1]["type"] == "response.completed"


def test_the_place_of_a_client_that_left_is_free_again(backend: wire.Backend, start: Start,
                                                       dial: Dial) -> None:
    bridge = start("--api-key", "ann=secret-of-ann", "--limit", "ann=1")
    fields = {**CODEX_FIELDS, "authorization": "Bearer secret-of-ann"}
    backend.on_frame(lambda ws, _: ws.event(wire.created()))
    one = dial(bridge, fields)
    one.send_json(create())
    one.read_json()
    one.close()
    two = dial(bridge, fields)
    two.send_json(create())
    assert two.read_turn()[-1]["type"] == "response.completed"


def test_a_client_that_waits_for_its_place_is_answered_and_let_go(
    backend: wire.Backend, start: Start, dial: Dial, next_upstream: NextUpstream
) -> None:
    bridge = start("--api-key", "ann=secret-of-ann", "--limit", "ann=1")
    fields = {**CODEX_FIELDS, "authorization": "Bearer secret-of-ann"}
    backend.on_frame(lambda ws, _: ws.event(wire.created()))
    one, two = dial(bridge, fields), dial(bridge, fields)
    next_upstream()
    one.send_json(create())
    one.read_json()
    two.send_json(create())
    two.close()
    assert next_upstream().ended.wait(SECOND)


def test_idle_sockets_are_closed_at_once_when_the_bridge_ends(
    bridge: RunningBridge, dial: Dial, next_upstream: NextUpstream
) -> None:
    clients = [dial(bridge, CODEX_FIELDS) for _ in range(3)]
    clients[0].send_json(create())
    clients[0].read_turn()
    began = time.monotonic()
    assert bridge.server.drain(5)
    assert time.monotonic() - began < SECOND
    assert all(client.left(SECOND) for client in clients)
    assert all(next_upstream().ended.wait(SECOND) for _ in clients)


def test_a_running_turn_may_end_and_then_its_socket_is_closed(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial
) -> None:
    gate = threading.Event()

    def wait(ws: wire.WebSocketExchange, body: Event) -> None:
        ws.event(wire.created())
        assert gate.wait(5)
        ws.event(wire.completed())

    backend.on_frame(wait)
    client, idle = dial(bridge, CODEX_FIELDS), dial(bridge, CODEX_FIELDS)
    client.send_json(create())
    client.read_json()
    ended: queue.Queue[bool] = queue.Queue()
    threading.Thread(target=lambda: ended.put(bridge.server.drain(0.5)), daemon=True).start()
    assert idle.left(5)  # the bridge has closed what was idle; the running turn goes on
    gate.set()
    assert client.read_json()["type"] == "response.completed"
    assert ended.get(timeout=5)


def test_a_refused_frame_leaves_the_socket_idle(bridge: RunningBridge, dial: Dial) -> None:
    client = dial(bridge, CODEX_FIELDS)
    client.send_frame(masked(b'{"type":"response.create","model":"local_md","input":"hi","seed":1e999}'))
    assert client.read_json()["type"] == "error"
    assert bridge.server.drain(0.3)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_no_thread_and_no_socket_is_left(
    backend: wire.Backend, bridge: RunningBridge, next_upstream: NextUpstream, dial: Dial
) -> None:
    def endings() -> None:
        for ending in ("close", "reset", "half_close", "breach", "frame", "upstream"):
            client = dial(bridge, CODEX_FIELDS)
            upstream = next_upstream()
            if ending == "upstream":
                backend.on_frame(answer_then(lambda ws: ws.close(1012), running=False))
            client.send_json(create())
            client.read_turn()
            if ending == "breach":
                client.send(unmasked(TEXT, b"{}"))
            elif ending == "frame":
                client.send_frame(masked(b"", CLOSE))
            elif ending != "upstream":
                getattr(client, ending)()
            assert upstream.ended.wait(5)
            client.close()

    def own_threads() -> int:
        return sum(not thread.name.startswith("wire") for thread in threading.enumerate())

    def settle() -> int:
        with bridge.server._lock:
            assert bridge.server._lock.wait_for(lambda: not bridge.server._open, 5)
        with backend.changed:  # one connection is kept for the next request, as after any exchange
            assert backend.changed.wait_for(lambda: len(backend._open) <= 1, 5)
        return len(os.listdir("/proc/self/fd"))

    endings()
    sockets, threads = settle(), own_threads()
    for _ in range(3):
        endings()
    assert settle() <= sockets + 2  # that connection has two ends here
    assert own_threads() <= threads



# -- an error, and response.failed of the same turn behind it ------------------------

ERROR = {"type": "error", "status": 429, "error": {"type": "rate_limit_error", "code": "slow_down",
                                                   "message": "too fast"}}


def failed_turn(told: bool) -> list[Event]:
    """Return what the backend sends for a turn that fails: `error` and then `response.failed`."""
    failed = wire.failed("slow_down", "too fast")
    begun = [wire.created(failed["response"]["id"])] if told else []
    return [*begun, ERROR, failed]


def outputs(events: list[Event]) -> list[list[Any]]:
    """Return the output of each terminal event but a failed one."""
    return [event["response"]["output"] for event in events
            if event["type"] in ("response.completed", "response.incomplete")]


def read_to(client: wire.WebSocketClient, kind: str) -> list[Event]:
    """Return the events up to one of a type."""
    events = [client.read_json()]
    while events[-1]["type"] != kind:
        events.append(client.read_json())
    return events


@pytest.mark.parametrize("told", [True, False], ids=["created first", "nothing first"])
@pytest.mark.parametrize("second", ["with the first", "after the error", "after the failure"])
def test_an_error_and_its_failure_settle_one_turn(
    second: str, told: bool, backend: wire.Backend, bridge: RunningBridge, dial: Dial,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = RecordLog(bridge, monkeypatch)
    *begun, error, failed = failed_turn(told)
    gate = threading.Event()
    if second != "after the error":
        gate.set()

    def fail(ws: wire.WebSocketExchange, _: Event) -> None:
        ws.events(*begun, error)
        assert gate.wait(5)
        ws.event(failed)

    backend.on_frame(fail)
    client, one, two = dial(bridge, CODEX_FIELDS), create(), create(message("user", "two"))
    client.send_json(one)
    if second == "with the first":
        client.send_json(two)
    came = read_to(client, "error")
    if second == "after the error":
        client.send_json(two)
        client.send_frame(masked(b"", PING))
        read_until(client, PONG)  # so the bridge has taken it
        gate.set()
    came += read_to(client, "response.failed")
    if second == "after the failure":
        client.send_json(two)
    came += client.read_turn()
    assert [event["type"] for event in came][: len(begun) + 2] == [each["type"] for each in failed_turn(told)]
    assert [[item["content"][0]["text"] for item in output] for output in outputs(came)] == [["two"]]
    ends = [records.next().end, records.next().end]
    assert ends[0] in ("error", "failed")
    assert ends[1] == "completed"
    assert len(records.lines) == 2


def test_two_turns_that_are_refused_are_two(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordLog(bridge, monkeypatch)
    backend.on_frame(lambda ws, _: ws.event(ERROR), lambda ws, _: ws.event(ERROR))
    client = dial(bridge, CODEX_FIELDS)
    for frame in (create(), create(), create(message("user", "three"))):
        client.send_json(frame)
    assert [client.read_json()["type"], client.read_json()["type"]] == ["error", "error"]
    assert texts(client.read_turn()) == "three"
    assert [records.next().end for _ in range(3)] == ["error", "error", "completed"]


def test_two_turns_that_fail_in_both_ways_are_two(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordLog(bridge, monkeypatch)
    backend.on_frame(*[lambda ws, _: ws.events(*failed_turn(True))] * 2)
    client = dial(bridge, CODEX_FIELDS)
    for frame in (create(), create(), create(message("user", "three"))):
        client.send_json(frame)
    came = read_to(client, "response.completed")
    assert [event["type"] for event in came[:6]] == [each["type"] for each in failed_turn(True)] * 2
    assert [item["content"][0]["text"] for output in outputs(came) for item in output] == ["three"]
    assert records.next().end in ("error", "failed")
    assert records.next().end in ("error", "failed")
    assert records.next().end == "completed"


def test_a_failure_behind_a_repaired_refusal_ends_nothing(
    backend: wire.Backend, bridge: RunningBridge, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordLog(bridge, monkeypatch)

    def refuse(ws: wire.WebSocketExchange, _: Event) -> None:
        ws.error(wire.detail(400, "Unsupported parameter: text"))
        ws.event(wire.failed("invalid_request_error", "Unsupported parameter: text"))

    backend.on_frame(refuse)
    client = dial(bridge, CODEX_FIELDS)
    client.send_json(create(message("user", "one"), text={"verbosity": "low"}))
    came = client.read_turn()
    assert came[-1]["type"] == "response.completed"
    assert [item["content"][0]["text"] for output in outputs(came) for item in output] == ["one"]
    record = records.next()
    assert (record.end, record.repairs) == ("completed", ("drop-parameter=text",))


# -- a socket that waits -----------------------------------------------------------

KEYS = ("--api-key", "ann=secret-of-ann", "--limit", "ann=1")
ANN = {**CODEX_FIELDS, "authorization": "Bearer secret-of-ann"}
Waits = Callable[[], object]  # returns once the socket waits
Hold = Callable[[wire.Backend, RunningBridge, threading.Event], contextlib.AbstractContextManager[Waits]]


@contextlib.contextmanager
def hold_the_place(backend: wire.Backend, bridge: RunningBridge, gate: threading.Event) -> Iterator[Waits]:
    """Have a stream of the same key run until the gate opens; its words come steadily."""
    first, *rest = wire.text_turn()

    def speak(exchange: wire.Exchange) -> None:
        exchange.head()
        exchange.event(first)
        while not gate.wait(0.05):
            exchange.event({"type": "response.output_text.delta", "output_index": 0, "delta": "."})
        exchange.events(*rest)
        exchange.finish()

    backend.on("/responses", speak)
    with wire.Client(bridge.address) as client:
        body = {"model": PLAIN, "input": "hi", "stream": True}
        client.request("POST", "/v1/responses", body, {"Authorization": ANN["authorization"]})
        client.read_head()
        assert client.read_event()
        try:
            yield lambda: None
        finally:
            gate.set()


@contextlib.contextmanager
def hold_the_list(backend: wire.Backend, bridge: RunningBridge, gate: threading.Event) -> Iterator[Waits]:
    """Have upstream send its model list when the gate opens."""
    def reply(exchange: wire.Exchange) -> None:
        assert gate.wait(5)
        backend.default(exchange)

    asked = len([each for each in backend.requests if each.path == wire.full_path("/models")])
    backend.on("/models", reply)
    try:
        yield lambda: backend.wait_for(asked + 1, "/models")
    finally:
        gate.set()


@contextlib.contextmanager
def hold_the_repair(backend: wire.Backend, bridge: RunningBridge, gate: threading.Event) -> Iterator[Waits]:
    """Have the model's form be refused, and upstream send the list that mends it when the gate opens."""
    assert wire.get(bridge.address, "/v1/models", {"Authorization": ANN["authorization"]}).status == 200
    backend.catalog = [wire.model_entry(PLAIN, 1)]  # lite from now on
    with hold_the_list(backend, bridge, gate) as waits:
        yield waits


WAITS: dict[str, tuple[Hold, Event]] = {
    "for its key's place": (hold_the_place, create()),
    "for the model list": (hold_the_list, {**plain_create(), "model": "local_md"}),
    "for a repair": (hold_the_repair, plain_create()),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_socket_that_waits_answers_pings(
    wait: str, backend: wire.Backend, start: Start, dial: Dial
) -> None:
    bridge, gate = start(*KEYS), threading.Event()
    hold, frame = WAITS[wait]
    client = dial(bridge, ANN)
    with hold(backend, bridge, gate) as waits:
        client.send_json(frame)
        waits()
        client.send_frame(masked(b"are you there", PING))
        client.sock.settimeout(SECOND)
        assert read_until(client, PONG).payload == b"are you there"
        gate.set()
        assert client.read_turn()[-1]["type"] == "response.completed"


def test_a_wait_without_a_thread_of_its_own_is_made_all_the_same(
    backend: wire.Backend, start: Start, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = start()
    client = dial(bridge, CODEX_FIELDS)
    threads = NoThreads(monkeypatch, "background", "Background")
    client.send_json({**plain_create(), "model": "local_md"})  # waits for the model list
    assert client.read_turn()[-1]["type"] == "response.completed"
    assert threads.failed == 1
    assert backend.frames[0]["model"] == "gpt-5.6-sol"


@pytest.mark.parametrize("wait", WAITS)
def test_a_socket_that_waits_is_not_idle(wait: str, backend: wire.Backend, start: Start, dial: Dial) -> None:
    bridge, gate = start(*KEYS), threading.Event()
    hold, frame = WAITS[wait]
    client = dial(bridge, ANN)
    assert until(lambda: len(bridge.server._waiting) == 1)
    with hold(backend, bridge, gate) as waits:
        client.send_json(frame)
        waits()
        # A connection of the stand-in's client may be idle beside it.
        own = client.sock.getsockname()
        assert until(lambda: own not in [each.client_address for each in bridge.server._waiting])
        gate.set()
        assert client.read_turn()[-1]["type"] == "response.completed"
    assert until(lambda: own in [each.client_address for each in bridge.server._waiting])


IMPATIENT = ("--keepalive", "0.06", "--idle-timeout", "0.3")


def answer_pings(client: wire.WebSocketClient) -> None:
    """Answer six pings: with IMPATIENT in all longer than --idle-timeout."""
    client.sock.settimeout(SECOND)
    for _ in range(6):
        read_until(client, PING)
        client.send_frame(masked(b"", PONG))


@pytest.mark.parametrize("wait", WAITS)
def test_a_socket_that_waits_is_not_closed_for_silence(
    wait: str, backend: wire.Backend, start: Start, dial: Dial
) -> None:
    bridge, gate = start(*KEYS, *IMPATIENT), threading.Event()
    hold, frame = WAITS[wait]
    client = dial(bridge, ANN)
    with hold(backend, bridge, gate) as waits:
        client.send_json(frame)
        waits()
        answer_pings(client)
        gate.set()
        assert client.read_turn()[-1]["type"] == "response.completed"


def test_the_wait_for_a_repair_is_no_silence_of_upstream(
    backend: wire.Backend, start: Start, dial: Dial
) -> None:
    bridge, gate = start(*KEYS, *IMPATIENT), threading.Event()

    def answer_late(ws: wire.WebSocketExchange, body: Event) -> None:
        threading.Event().wait(0.12)  # within --idle-timeout
        wire.answer_frame(ws, body)

    backend.on_frame(wire.answer_frame, answer_late)
    client = dial(bridge, ANN)
    with hold_the_repair(backend, bridge, gate) as waits:
        client.send_json(plain_create())
        waits()
        answer_pings(client)
        gate.set()
        read_to_end(client)


def test_a_socket_that_waits_answers_upstreams_pings(
    backend: wire.Backend, start: Start, dial: Dial, next_upstream: NextUpstream
) -> None:
    bridge, gate, waiting = start(*KEYS), threading.Event(), threading.Event()

    def answer_and_ping(ws: wire.WebSocketExchange, body: Event) -> None:
        wire.answer_frame(ws, body)
        assert waiting.wait(5)
        ws.send_frame(Frame(PING, b"are you there"))

    backend.on_frame(answer_and_ping)
    client = dial(bridge, ANN)
    client.send_json(create())
    client.read_turn()
    with hold_the_place(backend, bridge, gate):
        client.send_json(create())
        waiting.set()
        upstream = next_upstream()
        assert until(lambda: PONG in [frame.opcode for frame in upstream.frames], SECOND)


@pytest.mark.parametrize("wait", WAITS)
def test_a_client_that_leaves_while_it_waits_leaves_nothing(
    wait: str, backend: wire.Backend, start: Start, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge, gate = start(*KEYS), threading.Event()
    records, turns = RecordLog(bridge, monkeypatch), bridge.bridge.turns
    hold, frame = WAITS[wait]
    client = dial(bridge, ANN)
    with hold(backend, bridge, gate) as waits:
        client.send_json(frame)
        waits()
        client.send_json(create())  # waits behind it
        client.send_frame(masked(b"\x03\xe8", CLOSE))
        client.sock.settimeout(SECOND)
        assert client.read_close() == 1000
        while (record := records.next()).method != "WS":
            pass
        assert (record.end, record.model) == ("client_closed", frame["model"])
    assert until(lambda: turns.budget.room() == q.MAX_BODIES, 2)
    assert until(lambda: bridge.bridge.key_queue.has_room("ann"), 2)
    assert until(lambda: turns.telemetry.snapshot(0)["open"] == [], 2)


# -- pings that nobody answers --------------------------------------------------------


def pings_until_the_end(client: wire.WebSocketClient) -> int:
    """Read without answering anything; return how many pings came before the end."""
    pings = 0
    client.sock.settimeout(SECOND)
    with contextlib.suppress(wire.PeerLeft, ConnectionError):
        while pings < 9 and (frame := wire.read_frame(client.reader)).opcode != CLOSE:
            pings += frame.opcode == PING
    return pings


@pytest.mark.parametrize("running", [False, True], ids=["idle", "in a turn"])
def test_a_client_that_answers_no_ping_is_given_up(
    running: bool, backend: wire.Backend, start: Start, dial: Dial, next_upstream: NextUpstream
) -> None:
    client = dial(start("--keepalive", "0.03"), CODEX_FIELDS)
    if running:
        backend.on_frame(lambda ws, _: ws.event(wire.created()))
        client.send_json(create())
    assert 3 <= pings_until_the_end(client) <= 4
    assert next_upstream().ended.wait(SECOND)


def test_a_client_that_answers_pings_stays(backend: wire.Backend, start: Start, dial: Dial) -> None:
    client = dial(start("--keepalive", "0.04"), CODEX_FIELDS)
    for _ in range(2 * q.UNANSWERED_PINGS):
        ping = read_until(client, PING)
        client.send_frame(masked(ping.payload, PONG))
    client.send_json(create())
    assert client.read_turn()[-1]["type"] == "response.completed"


def test_a_client_that_speaks_is_alive_without_a_pong(
    backend: wire.Backend, start: Start, dial: Dial
) -> None:
    client = dial(start("--keepalive", "0.04"), CODEX_FIELDS)
    for _ in range(2 * q.UNANSWERED_PINGS):
        read_until(client, PING)
        client.send_json(create())
        read_to_end(client)


def read_to_end(client: wire.WebSocketClient) -> None:
    """Read a turn, its pings unanswered."""
    while True:
        event = json.loads(read_until(client, TEXT).payload)
        if event["type"] == "response.completed":
            return


@pytest.mark.parametrize("running", [False, True], ids=["idle", "in a turn"])
def test_an_upstream_that_answers_no_ping_is_given_up(
    running: bool, backend: wire.Backend, start: Start, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, pings = threading.Event(), 0

    def never_speak(_: wire.Backend, exchange: wire.Exchange) -> None:
        nonlocal pings
        exchange.send(test_websockets.accept_head(exchange.request))
        with contextlib.suppress(wire.PeerLeft, OSError):
            while pings < 9 and (frame := wire.read_frame(exchange.reader)).opcode != CLOSE:
                pings += frame.opcode == PING
        gone.set()

    monkeypatch.setitem(wire.ROUTES, test_websockets.ROUTE, never_speak)
    client = dial(start("--keepalive", "0.03"), CODEX_FIELDS)
    if running:
        client.send_json(create())
    with pytest.raises(wire.PeerLeft):  # it answers its own pings meanwhile
        client.sock.settimeout(SECOND)
        client.read_json()
    assert gone.wait(SECOND)
    assert 3 <= pings <= 4


# -- a parked turn ends by --idle-timeout ---------------------------------------------


def test_upstreams_keepalives_do_not_hold_a_turn_for_ever(
    backend: wire.Backend, start: Start, dial: Dial
) -> None:
    done = threading.Event()

    def park(ws: wire.WebSocketExchange, _: Event) -> None:
        ws.event(wire.created())
        with contextlib.suppress(OSError):
            while not done.wait(0.03):
                ws.event({"type": "keepalive", "sequence_number": 2})
        ws.exchange.closed = True

    backend.on_frame(park)
    client = dial(start("--idle-timeout", "0.15"), CODEX_FIELDS)
    client.send_json(create())
    begun = time.monotonic()
    try:
        client.sock.settimeout(SECOND)
        with pytest.raises(wire.PeerLeft, match="1014"):
            while time.monotonic() - begun < 3 * SECOND:
                client.read_json()
    finally:
        done.set()


def test_answered_pings_do_not_hold_a_parked_turn_for_ever(
    backend: wire.Backend, start: Start, dial: Dial
) -> None:
    backend.on_frame(lambda ws, _: ws.event(wire.created()))  # and goes on answering pings
    client = dial(start("--keepalive", "0.04", "--idle-timeout", "0.15"), CODEX_FIELDS)
    client.send_json(create())
    begun = time.monotonic()
    with pytest.raises(wire.PeerLeft, match="1014"):
        while time.monotonic() - begun < 2 * SECOND:
            frame = wire.read_frame(client.reader)
            if frame.opcode == CLOSE:
                raise wire.PeerLeft(f"closed with {wire.close_code(frame)}")
            if frame.opcode == PING:
                client.send_frame(masked(frame.payload, PONG))


def test_an_idle_socket_is_not_ended_by_the_timeout_of_a_turn(
    backend: wire.Backend, start: Start, dial: Dial
) -> None:
    client = dial(start("--keepalive", "0.06", "--idle-timeout", "0.3"), CODEX_FIELDS)
    for _ in range(6):  # in all longer than --idle-timeout
        read_until(client, PING)
        client.send_frame(masked(b"", PONG))
    client.send_json(create())
    assert client.read_turn()[-1]["type"] == "response.completed"


# -- messages are counted and timed ---------------------------------------------------


def half_of(size: int, rest: int = 10) -> bytes:
    """Return a masked text frame of a size, less its last bytes."""
    return wire.frame_bytes(masked(b"x" * size))[:-rest]


def test_messages_count_as_bodies_do(
    start: Start, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "MAX_BODIES", 4 << 20)
    bridge = start()
    clients = [dial(bridge) for _ in range(4)]
    for client in clients:
        send_half(client, bridge.bridge.turns.budget, 1600 << 10)
    assert [turned_away(client) for client in clients] == [False, False, True, True]
    assert wire.get(bridge.address, "/healthz").status == 200


def send_half(client: wire.WebSocketClient, budget: q.Budget, size: int) -> None:
    """Send a message of a size, less its last bytes; wait until the bridge keeps it, or answers."""
    client.sock.settimeout(2 * SECOND)
    room = budget.room()
    with contextlib.suppress(OSError):  # closed before all of it was taken
        client.send(half_of(size))
    assert until(lambda: budget.room() <= room - size + 100
                 or bool(select.select([client.sock], [], [], 0)[0]))


def turned_away(client: wire.WebSocketClient) -> bool:
    """Tell whether the bridge ended a connection in the middle of a message, or said that it has no room."""
    client.sock.settimeout(0.1)
    try:
        frame = wire.read_frame(client.reader)
    except (wire.PeerLeft, ConnectionError):
        return True
    except OSError:
        return False
    return frame.opcode == CLOSE or json.loads(frame.payload).get("status") == 503


def test_room_of_a_message_is_given_back(
    start: Start, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "MAX_BODIES", 2 << 20)
    client = dial(start(), CODEX_FIELDS)
    for number in range(12):  # 3 MB in all
        client.send_json(create(message("user", f"{number} " + "x" * (1 << 18))))
        assert client.read_turn()[-1]["type"] == "response.completed", number


STALLS: dict[str, bytes] = {
    "within a head": wire.frame_bytes(masked(b"x" * 300))[:3],
    "within a frame": half_of(300),
    "between two fragments": wire.frame_bytes(Frame(TEXT, b'{"type":', final=False, masked=True)),
    "within a later fragment": wire.frame_bytes(Frame(TEXT, b'{"type":', final=False, masked=True))
    + wire.frame_bytes(Frame(CONTINUATION, b"x" * 300, masked=True))[:-9],
}


@pytest.mark.parametrize("stall", STALLS)
@pytest.mark.parametrize("drips", [False, True], ids=["silent", "dripping"])
def test_a_message_that_stalls_ends_the_connection(
    drips: bool, stall: str, start: Start, dial: Dial, next_upstream: NextUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(q, "BODY_STALL", 0.05)
    client = dial(start())
    upstream, ended = next_upstream(), False
    raw = STALLS[stall]
    if drips:
        raw = half_of(9000, 8000)
    client.send(raw)
    begun = time.monotonic()
    with contextlib.suppress(OSError):
        while not ended and time.monotonic() - begun < SECOND:
            ended = client.left(0.02)
            if drips:
                client.send(b"x")
    assert ended or client.left(0.02)
    assert upstream.ended.wait(SECOND)


def test_chains_are_bounded_in_bytes(
    start: Start, backend: wire.Backend, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q.log, "propagate", False)
    monkeypatch.setattr(q, "STORE_SIZE", 1 << 18)  # the stand-in's answers repeat the instructions
    client = dial(start())

    def take_turns(count: int) -> None:
        for number in range(count):
            client.send_json(plain_create(model=LITE, instructions=f"{number} {'x' * (1 << 18)}"))
            client.read_turn()
            with backend.changed:
                backend.frames.clear()
        gc.collect()

    tracemalloc.start(25)
    try:
        take_turns(24)
        snapshot = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    held = sum(trace.size for trace in snapshot.traces  # not what the stand-in keeps
               if any(frame.filename == q.__file__ for frame in trace.traceback))
    assert held < 2 << 20  # of 6 MB that were sent
