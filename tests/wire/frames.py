"""WebSocket frames (RFC 6455): one frame out, one frame in. Both sides of the bridge are played with it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import struct

from .reader import Reader

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
CONTINUATION = 0x0
WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
MAX_CONTROL = 125  # bytes of payload, RFC 6455 section 5.5
LENGTH_16, LENGTH_64 = 126, 127


class FrameError(Exception):
    """Name the close code that answers a peer's broken frame."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code


@dataclasses.dataclass(frozen=True)
class Frame:
    """Hold one frame, unmasked."""

    opcode: int
    payload: bytes
    final: bool = True
    masked: bool = False
    reserved: int = 0


def accept_key(key: str) -> str:
    """Return the `sec-websocket-accept` that answers a key."""
    return base64.b64encode(hashlib.sha1(key.encode() + WEBSOCKET_GUID).digest()).decode()


def xor(payload: bytes, mask: bytes) -> bytes:
    """Apply a masking key."""
    if not payload:
        return b""
    stream = (mask * (len(payload) // 4 + 1))[: len(payload)]
    mixed = int.from_bytes(payload, "big") ^ int.from_bytes(stream, "big")
    return mixed.to_bytes(len(payload), "big")


def frame_bytes(frame: Frame) -> bytes:
    """Return a frame as it stands on the wire, masked with a random key if it says so."""
    size = len(frame.payload)
    first = (0x80 if frame.final else 0) | frame.reserved << 4 | frame.opcode
    flag = 0x80 if frame.masked else 0
    if size < LENGTH_16:
        head = bytes([first, flag | size])
    elif size < 1 << 16:
        head = bytes([first, flag | LENGTH_16]) + struct.pack("!H", size)
    else:
        head = bytes([first, flag | LENGTH_64]) + struct.pack("!Q", size)
    if not frame.masked:
        return head + frame.payload
    mask = os.urandom(4)
    return head + mask + xor(frame.payload, mask)


def read_frame(reader: Reader) -> Frame:
    """Read one frame, unmasked; nothing but its layout is judged."""
    first, second = reader.exactly(2)
    size = second & 0x7F
    if size == LENGTH_16:
        size = struct.unpack("!H", reader.exactly(2))[0]
    elif size == LENGTH_64:
        size = struct.unpack("!Q", reader.exactly(8))[0]
    masked = bool(second & 0x80)
    mask = reader.exactly(4) if masked else b""
    payload = reader.exactly(size)
    if masked:
        payload = xor(payload, mask)
    return Frame(first & 0x0F, payload, bool(first & 0x80), masked, first >> 4 & 0x7)


def check_frame(frame: Frame, masked: bool, inside: bool) -> None:
    """Raise FrameError where a frame breaks the protocol; `inside` says that a message is unfinished."""
    control = frame.opcode >= CLOSE
    if frame.masked != masked:
        raise FrameError(1002, "a client masks, a server does not")
    if frame.reserved or frame.opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
        raise FrameError(1002, "reserved bit or opcode")
    if control and (not frame.final or len(frame.payload) > MAX_CONTROL):
        raise FrameError(1002, "a control frame is whole and short")
    if not control and inside != (frame.opcode == CONTINUATION):
        raise FrameError(1002, "fragments out of order")
    if frame.opcode == BINARY:
        raise FrameError(1003, "only text is taken")


def decode_text(payload: bytes) -> str:
    """Return a text message; raise FrameError where it is not UTF-8."""
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise FrameError(1007, "not UTF-8") from exc
