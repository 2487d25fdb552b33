"""One request and the hands to answer it with, rightly or wrongly."""

from __future__ import annotations

from collections.abc import Callable

from .events import Event, sse_bytes
from .http1 import BODYLESS, Headers, Request, dump, head_bytes
from .reader import Reader, half_close, reset

SSE_HEADERS: Headers = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))
REASONS = {
    200: "OK", 204: "No Content", 304: "Not Modified", 400: "Bad Request", 401: "Unauthorized",
    403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 415: "Unsupported Media Type",
    421: "Misdirected Request", 426: "Upgrade Required", 429: "Too Many Requests",
    500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable",
}


class Exchange:
    """Answer one request. Every request has been read whole before its exchange begins.

    The connection is kept only after `finish()` or `json()`; a reply that returns earlier leaves it cut.
    """

    def __init__(self, request: Request, reader: Reader) -> None:
        self.request = request
        self.reader = reader
        self.sock = reader.sock
        self.keep_alive = (request.header("connection") or "").lower() != "close"
        self.complete = False
        self.closed = False

    def send(self, raw: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(raw)

    def head(self, status: int = 200, headers: Headers = SSE_HEADERS, chunked: bool = True) -> None:
        """Send a head; `chunked=False` leaves the framing to the caller."""
        framing = [("transfer-encoding", "chunked")] if chunked else []
        self.send(head_bytes(f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}", [*headers, *framing]))

    def chunk(self, payload: bytes) -> None:
        """Send one chunk; nothing where it is empty, for that would be the last one."""
        if payload:
            self.send(b"%x\r\n%b\r\n" % (len(payload), payload))

    def event(self, event: Event | bytes, name: bool = True) -> None:
        """Send one SSE event as one chunk; `name=False` leaves out its `event:` line."""
        self.chunk(sse_bytes(event, name))

    def events(self, *events: Event | bytes) -> None:
        """Send events, each as a chunk of its own."""
        for event in events:
            self.event(event)

    def finish(self) -> None:
        """Send the last chunk; the connection can be used again."""
        self.send(b"0\r\n\r\n")
        self.complete = True

    def json(self, status: int, value: object, headers: Headers = ()) -> None:
        """Send a whole JSON reply."""
        self.whole(status, dump(value), [("content-type", "application/json"), *headers])

    def whole(self, status: int, body: bytes, headers: Headers) -> None:
        """Send a whole reply with its length; a HEAD and a bodyless status get no body."""
        length = [] if status in BODYLESS else [("content-length", str(len(body)))]
        head = head_bytes(f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}", [*headers, *length])
        silent = self.request.method == "HEAD" or status in BODYLESS
        self.send(head if silent else head + body)
        self.complete = True

    def close(self) -> None:
        """End the connection with FIN, wherever the reply stands."""
        self.closed = True
        half_close(self.sock)

    def reset(self) -> None:
        """End the connection with RST, wherever the reply stands."""
        self.closed = True
        reset(self.sock)

    def left(self, timeout: float = 5.0) -> bool:
        """Wait until the peer hung up; return False after `timeout` seconds without that."""
        return self.reader.ended(timeout)


Reply = Callable[[Exchange], None]
