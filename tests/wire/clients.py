"""Raw clients: they send bytes as given and parse replies strictly."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import socket
import ssl
from typing import Any

from .events import Event
from .frames import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    Frame,
    accept_key,
    check_frame,
    decode_text,
    frame_bytes,
    read_frame,
)
from .http1 import (
    BODYLESS,
    INFORMATIONAL,
    STATUS_LINE,
    SWITCHING,
    body_length,
    dump,
    find,
    head_bytes,
    read_chunk,
    read_fields,
)
from .leaks import ClientReader
from .listener import Listener
from .reader import Address, PeerLeft, ProtocolError, half_close, reset


@dataclasses.dataclass
class RawReply:
    """Hold one reply: `ended` is "last-chunk", "length", "close", "none" (no body is due) or "cut"."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    ended: str = "none"
    rest: bytes = b""
    interim: list[int] = dataclasses.field(default_factory=list)

    @property
    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        """Return the first value of a field, whatever the case of its name."""
        return find(self.headers, name)


def overlay(fields: dict[str, str], given: dict[str, str]) -> list[tuple[str, str]]:
    """Return `fields` without those that are `given`, whatever their case, and then these."""
    names = {name.lower() for name in given}
    return [*(field for field in fields.items() if field[0].lower() not in names), *given.items()]


class Client:
    """Hold one connection to a server under test; `timeout` bounds every wait, in seconds."""

    def __init__(self, address: Address, timeout: float = 5.0, tls: ssl.SSLContext | None = None) -> None:
        self.address = address
        self.sock: socket.socket = socket.create_connection(address, timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self.sock = tls.wrap_socket(self.sock, server_hostname="localhost")
        self.reader = ClientReader(self.sock)
        self.reply: RawReply | None = None
        self._method = "GET"
        self._left: int | None = 0  # bytes of the body still due; -1 chunked, None up to the close
        self._events = bytearray()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, raw: bytes | str) -> None:
        """Send bytes as they are."""
        self.sock.sendall(raw.encode("latin-1") if isinstance(raw, str) else raw)

    def request(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> None:
        """Send a request; a body that is not bytes goes as JSON, with its length."""
        payload = b"" if body is None else body if isinstance(body, bytes) else dump(body)
        given = headers or {}
        fields = {"Host": f"{self.address[0]}:{self.address[1]}"}
        if body is not None:
            fields["Content-Type"] = "application/json"
            if find(list(given.items()), "transfer-encoding") is None:
                fields["Content-Length"] = str(len(payload))
        self._method = method
        self.send(head_bytes(f"{method} {path} HTTP/1.1", overlay(fields, given)) + payload)

    def read_head(self, method: str | None = None) -> RawReply:
        """Read a head, after any 1xx; what the body is, is known from here on."""
        interim: list[int] = []
        while True:
            line = self.reader.line()
            match = STATUS_LINE.match(line)
            if match is None:
                raise ProtocolError(f"bad status line {line[:80]!r}")
            status = int(match.group(2))
            headers = read_fields(self.reader)
            if status not in INFORMATIONAL or status == SWITCHING:
                break
            interim.append(status)
        self.reply = RawReply(status, match.group(3).decode("latin-1"), headers, interim=interim)
        silent = (method or self._method) == "HEAD" or status in BODYLESS or status == SWITCHING
        length = body_length(headers)
        self._left = 0 if silent else length
        self._events.clear()
        self.reply.ended = "none" if silent else {None: "close", -1: "last-chunk"}.get(length, "length")
        return self.reply

    def read_some(self) -> bytes:
        """Return the next bytes of the body as they come, empty at its end; a cut sets `reply.ended`."""
        try:
            return self._read_some()
        except (PeerLeft, ConnectionError):
            self._left = 0
            if self.reply is not None:
                self.reply.ended = "cut"
            return b""

    def _read_some(self) -> bytes:
        if self._left == -1:
            payload = read_chunk(self.reader)
            self._left = -1 if payload else 0
            return payload
        if self._left == 0:
            return b""
        if not self.reader.buffer and not self.reader.fill():
            if self._left:
                raise PeerLeft(f"{self._left} bytes missing")
            self._left = 0
            return b""
        size = len(self.reader.buffer) if self._left is None else min(self._left, len(self.reader.buffer))
        if self._left is not None:
            self._left -= size
        return self.reader.exactly(size)

    def read_body(self) -> bytes:
        """Return what is left of the body."""
        rest = bytes(self._events) + b"".join(iter(self.read_some, b""))
        self._events.clear()
        return rest

    def read_reply(self, method: str | None = None) -> RawReply:
        """Read one whole reply."""
        reply = self.read_head(method)
        reply.body = self.read_body()
        return reply

    def read_event(self, timeout: float | None = None) -> Event | str | None:
        """Return the next event's JSON, or a comment's text; None at the end of the body."""
        if timeout is not None:
            self.sock.settimeout(timeout)
        while True:
            parsed = take_event(self._events)
            if parsed is not None:
                return parsed
            received = self.read_some()
            if not received:
                return None
            self._events += received

    def read_events(self) -> list[Event]:
        """Return all events that are left, without comments."""
        return [event for event in iter(self.read_event, None) if isinstance(event, dict)]

    def left(self, timeout: float = 5.0) -> bool:
        """Wait until the server closed; return False after `timeout` seconds without that."""
        return self.reader.ended(timeout)

    def half_close(self) -> None:
        """Send FIN, and go on reading."""
        half_close(self.sock)

    def reset(self) -> None:
        """Leave with RST."""
        reset(self.sock)

    def close(self) -> None:
        """Leave with FIN."""
        self.sock.close()


EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
LINE_END = re.compile(rb"\r\n|\n|\r")


def take_event(buffer: bytearray) -> Event | str | None:
    """Take the first whole event or comment off `buffer`; None where there is none yet."""
    match = EVENT_END.search(buffer)
    if match is None:
        return None
    block = bytes(buffer[: match.start()])
    del buffer[: match.end()]
    lines = LINE_END.split(block)
    payload = b"\n".join(line[5:].lstrip(b" ") for line in lines if line.startswith(b"data:"))
    if payload:
        event: Event = json.loads(payload)
        return event
    return b"\n".join(line[1:] for line in lines if line.startswith(b":")).decode().strip()


def sse(body: bytes) -> list[Event]:
    """Return the events of a whole body, without comments; a torn event at its end is refused."""
    buffer = bytearray(body)
    events = [event for event in iter(lambda: take_event(buffer), None) if isinstance(event, dict)]
    if buffer.strip():
        raise ProtocolError(f"a torn event: {bytes(buffer[:80])!r}")
    return events


def raw(address: Address, request: bytes | str, timeout: float = 5.0, method: str = "GET") -> RawReply:
    """Send bytes on a new connection and read one whole reply; `rest` is what came after it.

    Where the reply says `connection: close`, all is read up to the close, so that `rest` is complete.
    """
    with Client(address, timeout) as client:
        client.send(request)
        reply = client.read_reply(method)
        if (reply.header("connection") or "").lower() == "close":
            reply.rest = client.reader.to_end()
        else:
            reply.rest = bytes(client.reader.buffer)
        return reply


def get(address: Address, path: str, headers: dict[str, str] | None = None, timeout: float = 5.0) -> RawReply:
    """Send a GET on a new connection and read the whole reply."""
    with Client(address, timeout) as client:
        client.request("GET", path, headers=headers)
        return client.read_reply()


def post(
    address: Address, path: str, body: object, headers: dict[str, str] | None = None, timeout: float = 5.0
) -> RawReply:
    """Send a POST with JSON (or bytes) on a new connection and read the whole reply."""
    with Client(address, timeout) as client:
        client.request("POST", path, body, headers)
        return client.read_reply()


class WebSocketClient(Client):
    """Speak WebSocket as a client that masks its frames."""

    def connect(self, path: str, headers: dict[str, str] | None = None) -> RawReply:
        """Send a handshake and read the answer, whole unless it is 101."""
        key = base64.b64encode(os.urandom(16)).decode()
        fields = {"Connection": "Upgrade", "Upgrade": "websocket"}
        fields.update({"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key})
        self.request("GET", path, headers=dict(overlay(fields, headers or {})))
        reply = self.read_reply()
        if reply.status == SWITCHING and reply.header("sec-websocket-accept") != accept_key(key):
            raise ProtocolError("a wrong sec-websocket-accept")
        return reply

    def send_frame(self, frame: Frame) -> None:
        """Send one frame as it is."""
        self.send(frame_bytes(frame))

    def send_json(self, value: object) -> None:
        """Send one text message."""
        self.send_frame(Frame(TEXT, dump(value), masked=True))

    def read_json(self) -> Event:
        """Return the next text message; pings are answered, a close frame raises PeerLeft."""
        while True:
            frame = read_frame(self.reader)
            check_frame(frame, masked=False, inside=False)
            if frame.opcode == CLOSE:
                raise PeerLeft(f"closed with {close_code(frame)}")
            if frame.opcode == PING:
                self.send_frame(Frame(PONG, frame.payload, masked=True))
            if frame.opcode == TEXT:
                event: Event = json.loads(decode_text(frame.payload))
                return event

    def read_turn(self) -> list[Event]:
        """Return the events up to the terminal one, or to an error frame."""
        events = []
        while True:
            events.append(self.read_json())
            if events[-1]["type"] in TERMINAL:
                return events

    def read_close(self) -> int | None:
        """Skip to the close frame and return its code, None where the connection ended without one."""
        try:
            while True:
                frame = read_frame(self.reader)
                if frame.opcode == CLOSE:
                    return close_code(frame)
        except (PeerLeft, ConnectionError):
            return None


TERMINAL = ("response.completed", "response.failed", "response.incomplete", "error")


def close_code(frame: Frame) -> int:
    """Return a close frame's code; 1005 where it names none (RFC 6455 section 7.1.5)."""
    return int.from_bytes(frame.payload[:2], "big") if frame.payload else 1005


def trusting(backend: Listener) -> ssl.SSLContext:
    """Return a client's TLS context that trusts the stand-in's CA and nothing else."""
    return ssl.create_default_context(cafile=backend.ca_file)
