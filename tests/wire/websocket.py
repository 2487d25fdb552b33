"""The backend's side of a WebSocket: text frames with `response.create` in, one event a text frame out.

`previous_response_id` lives as long as the connection.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from .cache import Charge, Piece
from .events import Event, answer_items, items_turn, metadata_frame, rate_limits_frame
from .exchange import Exchange
from .frames import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    Frame,
    FrameError,
    accept_key,
    check_frame,
    decode_text,
    frame_bytes,
    read_frame,
)
from .http1 import Request, dump, head_bytes
from .refusals import WEBSOCKET_BETA
from .wish import LITE_HEADER, Refused, detail, fault, parse_json

if TYPE_CHECKING:
    from .backend import Backend

MAX_MESSAGE = 16 * 1024 * 1024  # bytes from which a message is closed with 1009; over HTTP it passes


def check_handshake(request: Request) -> None:
    """Raise Refused unless a handshake is one that the backend takes."""
    tokens = [token.strip().lower() for token in (request.header("connection") or "").split(",")]
    try:
        key = base64.b64decode(request.header("sec-websocket-key") or "", validate=True)
    except ValueError:
        key = b""
    if "upgrade" not in tokens or (request.header("upgrade") or "").lower() != "websocket" or len(key) != 16:
        raise detail(400, "not a WebSocket handshake")
    if request.header("sec-websocket-version") != "13":
        raise detail(426, "sec-websocket-version must be 13")
    if request.header("openai-beta") != WEBSOCKET_BETA:
        raise detail(400, f"openai-beta must be {WEBSOCKET_BETA}")
    for name in ("x-codex-routing-hint", LITE_HEADER):
        if request.header(name) is not None:
            raise detail(400, f"{name} cannot be known at the handshake")
    if not request.header("session-id"):
        raise detail(400, "Header session-id is missing")


class WebSocketExchange:
    """Talk on one accepted WebSocket."""

    def __init__(self, backend: Backend, exchange: Exchange) -> None:
        self.backend = backend
        self.exchange = exchange
        self.request = exchange.request
        self.reader = exchange.reader
        self.known: dict[str, list[Piece]] = {}  # the responses of this connection -> the prompts behind them
        self.charge: Charge | None = None  # of the frame that is being answered

    def send_frame(self, frame: Frame) -> None:
        """Send one frame as it is."""
        self.exchange.send(frame_bytes(frame))

    def event(self, event: Event) -> None:
        """Send one event as a text frame, and remember the response that it names."""
        response = event.get("response")
        if isinstance(response, dict) and isinstance(response.get("id"), str):
            self.known[response["id"]] = self.charge.prompt if self.charge else []
        self.send_frame(Frame(TEXT, dump(event)))

    def events(self, *events: Event) -> None:
        """Send events, a frame each."""
        for event in events:
            self.event(event)

    def error(self, refusal: Refused) -> None:
        """Send a refusal as the backend's error frame."""
        body = refusal.body if isinstance(refusal.body, dict) else {}
        error = body.get("error", {"message": body.get("detail"), "type": "invalid_request_error"})
        self.event({"type": "error", "status": refusal.status, "error": error})

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Send a close frame, then FIN."""
        self.send_frame(Frame(CLOSE, struct.pack("!H", code) + reason.encode()))
        self.exchange.close()

    def reset(self) -> None:
        """End the connection with RST."""
        self.exchange.reset()

    def left(self, timeout: float = 5.0) -> bool:
        """Wait until the peer hung up."""
        return self.exchange.left(timeout)

    def serve(self) -> None:
        """Accept the handshake, and answer messages until either side closes."""
        key = self.request.header("sec-websocket-key") or ""
        headers = [
            ("upgrade", "websocket"), ("connection", "Upgrade"), ("sec-websocket-accept", accept_key(key)),
            ("x-codex-turn-state", "ts-sticky-1"), ("x-models-etag", self.backend.etag),
            ("set-cookie", "__cf_bm=secret-of-the-host"),
        ]
        self.exchange.send(head_bytes("HTTP/1.1 101 Switching Protocols", headers))
        self.exchange.keep_alive = False
        try:
            while not self.exchange.closed:
                text = self.message()
                if text is None:
                    return
                self.answer(text)
        except FrameError as exc:
            self.backend.note(str(exc))
            self.close(exc.code)

    def message(self) -> str | None:
        """Return the next text message, reassembled; None after a close frame. Pings are answered."""
        parts: list[bytes] = []
        inside = False
        while True:
            frame = read_frame(self.reader)
            check_frame(frame, masked=True, inside=inside)
            if frame.opcode == CLOSE:
                self.send_frame(Frame(CLOSE, frame.payload))
                return None
            if frame.opcode == PING:
                self.send_frame(Frame(PONG, frame.payload))
            if frame.opcode >= CLOSE:
                continue
            parts.append(frame.payload)
            inside = not frame.final
            if sum(map(len, parts)) >= self.backend.max_message:
                raise FrameError(1009, "message too big")
            if frame.final:
                return decode_text(b"".join(parts))

    def answer(self, text: str) -> None:
        """Answer one message by its script, or as the backend does."""
        try:
            body = parse_json(text.encode("utf-8"))
            reply = self.backend.next_frame_reply(body)
            if self.backend.side_frames:
                self.events(rate_limits_frame(), metadata_frame(self.backend.etag))
            check_create(self, body)
            before = self.known.get(str(body.get("previous_response_id")), ())
            self.charge = self.backend.cache.charge(self.request, body, before)
            reply(self, body)
        except Refused as exc:
            self.backend.note(str(exc))
            self.error(exc)


FrameReply = Callable[[WebSocketExchange, Event], None]


def check_create(ws: WebSocketExchange, body: Event) -> None:
    """Raise Refused unless a frame is a `response.create` that the backend takes."""
    if body.get("type") != "response.create":
        raise fault(400, f"Unknown frame type {body.get('type')!r}", "invalid_value", "type")
    previous = body.get("previous_response_id")
    if previous is not None and previous not in ws.known:
        raise fault(400, f"Previous response with id '{previous}' not found.", "previous_response_not_found")
    ws.backend.check_turn(ws.request, body, websocket=True)


def answer_frame(ws: WebSocketExchange, body: Event) -> None:
    """Answer a `response.create`: echo its last text or do what it asks for; nothing for a prewarm."""
    items = [] if body.get("generate") is False else answer_items(body)
    events = items_turn(*items, model=body["model"])
    ws.events(*(ws.charge.sign(events) if ws.charge else events))
