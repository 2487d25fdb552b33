"""Play both ends of the bridge on loopback: a strict backend and sign-in server, and small raw clients.

Strict means: what `WIRE.md` says the real backend refuses is refused here, with the same texts, so that a
test fails when the bridge forgets a rule. A test scripts single replies with `Backend.on(path, reply)`: a
callable that gets an `Exchange` and writes whatever it likes to the socket, right or wrong.

Sections: 1 certificates, 2 bytes, 3 HTTP, 4 zstd, 5 WebSocket frames, 6 events, 7 exchange, 8 replies,
9 listener, 10 sign-in, 11 catalogue, 12 refusals, 13 backend, 14 WebSocket server, 15 proxy, 16 auth.json,
17 clients.
"""

from __future__ import annotations

import atexit
import base64
import collections
import contextlib
import ctypes
import ctypes.util
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import socket
import ssl
import struct
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Headers = Sequence[tuple[str, str]]
Event = dict[str, Any]
Item = dict[str, Any]
Address = tuple[str, int]

# == 1 certificates ===========================================================
# A throw-away CA and a leaf for localhost and 127.0.0.1, valid from 2020 to 2120, made once with the openssl
# command line. Both pass VERIFY_X509_STRICT, the default since Python 3.13. The key guards nothing.

CA_PEM = """\
-----BEGIN CERTIFICATE-----
MIIBkTCCATegAwIBAgIBATAKBggqhkjOPQQDAjAdMRswGQYDVQQDDBJxb28tYnJp
ZGdlIHRlc3QgQ0EwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMB0x
GzAZBgNVBAMMEnFvby1icmlkZ2UgdGVzdCBDQTBZMBMGByqGSM49AgEGCCqGSM49
AwEHA0IABCpIKlsnjC3px5g9BEQOsr4/t02U6ovp9mhjgOwtGGNkTpf4bR4Ubj6G
4BF66kFL57V5UfR8RqmjMqXmGDN3G8+jZjBkMBIGA1UdEwEB/wQIMAYBAf8CAQAw
DgYDVR0PAQH/BAQDAgEGMB0GA1UdDgQWBBSj4qf8TGFhckrhcghY8laJHW/bpjAf
BgNVHSMEGDAWgBSj4qf8TGFhckrhcghY8laJHW/bpjAKBggqhkjOPQQDAgNIADBF
AiEA6GXToy1cBzygFWbT47YcooGjaLENDhYNa/EVfN63uXUCIEO9hVyziMcYuOdw
jni7O4QVwtCi2KaQAAHwkavtWWSb
-----END CERTIFICATE-----
"""

LEAF_PEM = """\
-----BEGIN CERTIFICATE-----
MIIBtTCCAVugAwIBAgIBAjAKBggqhkjOPQQDAjAdMRswGQYDVQQDDBJxb28tYnJp
ZGdlIHRlc3QgQ0EwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQx
EjAQBgNVBAMMCWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABIej
F8xsc+qW+jQrBgd75B/2XQtZgkc9fHdmykf1wEgXzAQSpeHjeTdzXBshlzqr5/is
L3KiUrQ8BF4lCwbLXUajgZIwgY8wDAYDVR0TAQH/BAIwADAOBgNVHQ8BAf8EBAMC
B4AwEwYDVR0lBAwwCgYIKwYBBQUHAwEwHQYDVR0OBBYEFBHNP5Iz74oBYCVAKS+N
/AHA93VpMB8GA1UdIwQYMBaAFKPip/xMYWFySuFyCFjyVokdb9umMBoGA1UdEQQT
MBGCCWxvY2FsaG9zdIcEfwAAATAKBggqhkjOPQQDAgNIADBFAiEAgSxcw1BTgBJn
9F523ygDlKxcZwwpNQVSbUqPRJ01JJMCIB6itoS2PCu3GENzkwQzXHXI2tTC8Rc5
EtDkDqYSVL7V
-----END CERTIFICATE-----
"""

LEAF_KEY_PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgRfwcKVTGVxTZZUG4
9HRoSa0G3lAQ8zBj3xa4PC0aoHOhRANCAASHoxfMbHPqlvo0KwYHe+Qf9l0LWYJH
PXx3ZspH9cBIF8wEEqXh43k3c1wbIZc6q+f4rC9yolK0PAReJQsGy11G
-----END PRIVATE KEY-----
"""


@functools.cache
def certificates() -> pathlib.Path:
    """Return a folder with ca.pem, leaf.pem and leaf.key; it goes with the process."""
    held = tempfile.TemporaryDirectory(prefix="wire-")
    atexit.register(held.cleanup)
    folder = pathlib.Path(held.name)
    for name, pem in (("ca.pem", CA_PEM), ("leaf.pem", LEAF_PEM), ("leaf.key", LEAF_KEY_PEM)):
        folder.joinpath(name).write_text(pem, "ascii")
    return folder


@functools.cache
def server_context() -> ssl.SSLContext:
    """Return the TLS context of every stand-in: to read a key costs more than to open a port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates() / "leaf.pem", certificates() / "leaf.key")
    context.set_alpn_protocols(["http/1.1"])
    return context


# == 2 bytes ==================================================================
# A buffered reader over a socket that never reads past what it is asked to understand.

RECEIVE = 65536  # bytes a read
MAX_LINE = 1 << 20  # bytes; a head or chunk line beyond it is a fault of the peer


class ProtocolError(Exception):
    """Say that the peer broke HTTP/1.1 or RFC 6455."""


class PeerLeft(Exception):
    """Say that the connection ended in the middle of something."""


class Reader:
    """Read lines and counted bytes from `sock`; what is not yet asked for stays in `buffer`."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()

    def fill(self) -> bool:
        """Receive once; return False at the end of the stream."""
        received = self.sock.recv(RECEIVE)
        self.buffer += received
        return bool(received)

    def line(self) -> bytes:
        """Return the next line without its CRLF; a bare LF is refused."""
        start = 0
        while True:
            end = self.buffer.find(b"\n", start)
            if end >= 0:
                break
            start = len(self.buffer)
            if start > MAX_LINE:
                raise ProtocolError("line too long")
            if not self.fill():
                raise PeerLeft("end of stream inside a line")
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 1]
        if not line.endswith(b"\r"):
            raise ProtocolError(f"line ends in a bare LF: {line[:80]!r}")
        return line[:-1]

    def exactly(self, size: int) -> bytes:
        """Return exactly `size` bytes."""
        while len(self.buffer) < size:
            if not self.fill():
                raise PeerLeft(f"end of stream, {size - len(self.buffer)} bytes missing")
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    def to_end(self) -> bytes:
        """Return everything up to the end of the stream; a reset counts as the end."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while self.fill():
                pass
        taken = bytes(self.buffer)
        self.buffer.clear()
        return taken

    def ended(self, timeout: float) -> bool:
        """Wait until the peer closed or half-closed; return False after `timeout` seconds without that."""
        deadline = time.monotonic() + timeout
        before = self.sock.gettimeout()
        try:
            while True:
                self.sock.settimeout(max(deadline - time.monotonic(), 0.001))
                if not self.fill():
                    return True
        except socket.timeout:
            return False
        except OSError:
            return True
        finally:
            with contextlib.suppress(OSError):
                self.sock.settimeout(before)


def half_close(sock: socket.socket) -> None:
    """Send what ends our direction (TLS close_notify, then FIN) without waiting for the peer's."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(sock, ssl.SSLSocket):
            sock.settimeout(0)
            with contextlib.suppress(OSError, ValueError):
                sock.unwrap()
        # The method of the plain socket: SSLSocket.shutdown() would drop the TLS state under a reader's feet.
        socket.socket.shutdown(sock, socket.SHUT_WR)


def reset(sock: socket.socket) -> None:
    """Close so that the peer sees RST, not FIN."""
    layout = "hh" if os.name == "nt" else "ii"
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(layout, 1, 0))
    sock.close()


# == 3 HTTP ===================================================================
# The one strict parser of heads and bodies, for requests and for replies.

FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00\r\n]*?)[ \t]*\Z")
# http.client before 3.12 opens a tunnel with HTTP/1.0 and without a host field, so only CONNECT may do that.
REQUEST_LINE = re.compile(rb"(?:([A-Z]+) ([\x21-\x7e]+) HTTP/1\.1|(CONNECT) ([\x21-\x7e]+) HTTP/1\.0)\Z")
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2}) ([^\x00\r\n]*)\Z")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[^\x00\r\n]*)?\Z")
DIGITS = re.compile(r"[0-9]{1,18}\Z", re.ASCII)
INFORMATIONAL = range(100, 200)
SWITCHING = 101
BODYLESS = (204, 304)


def find(headers: Headers, name: str) -> str | None:
    """Return the first value of a field, whatever the case of its name."""
    return next((value for key, value in headers if key.lower() == name.lower()), None)


def find_all(headers: Headers, name: str) -> list[str]:
    """Return every value of a field."""
    return [value for key, value in headers if key.lower() == name.lower()]


def read_fields(reader: Reader) -> list[tuple[str, str]]:
    """Read header lines up to the empty one, in order and with their case."""
    fields: list[tuple[str, str]] = []
    while True:
        line = reader.line()
        if not line:
            return fields
        match = FIELD.match(line)
        if match is None:
            raise ProtocolError(f"bad header line {line[:80]!r}")
        fields.append((match.group(1).decode("ascii"), match.group(2).decode("latin-1")))


def body_length(headers: Headers) -> int | None:
    """Return the declared length, None where there is none, and -1 for a chunked body."""
    coding = find_all(headers, "transfer-encoding")
    length = find_all(headers, "content-length")
    if coding and length:
        raise ProtocolError("both transfer-encoding and content-length")
    if coding:
        if [value.lower() for value in coding] != ["chunked"]:
            raise ProtocolError(f"transfer-encoding {coding!r}")
        return -1
    if not length:
        return None
    if len(length) > 1 or not DIGITS.match(length[0]):
        raise ProtocolError(f"content-length {length!r}")
    return int(length[0])


def read_chunk(reader: Reader) -> bytes:
    """Return the payload of the next chunk; the last one is empty, and its trailers are read."""
    line = reader.line()
    match = CHUNK_SIZE.match(line)
    if match is None:
        raise ProtocolError(f"bad chunk size {line[:80]!r}")
    size = int(match.group(1), 16)
    if size == 0:
        read_fields(reader)
        return b""
    payload = reader.exactly(size)
    if reader.exactly(2) != b"\r\n":
        raise ProtocolError("chunk longer than its size")
    return payload


def read_body(reader: Reader, length: int | None) -> bytes:
    """Return a request's body, given what `body_length` said."""
    if length is None:
        return b""
    if length >= 0:
        return reader.exactly(length)
    return b"".join(iter(lambda: read_chunk(reader), b""))


def head_bytes(first: str, headers: Headers) -> bytes:
    """Return a head as it stands on the wire; nothing is checked, a test may want it wrong."""
    return "".join([first, "\r\n", *(f"{name}: {value}\r\n" for name, value in headers), "\r\n"]).encode(
        "latin-1"
    )


def dump(value: object) -> bytes:
    """Return `value` as the backend writes JSON: compact."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


@dataclasses.dataclass(frozen=True)
class Request:
    """Hold one request as it came: `raw_body` is without its framing, `body` also without its encoding."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    raw_body: bytes
    body: bytes
    connection: int

    @property
    def path(self) -> str:
        """Return the target without its query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """Return what follows the question mark."""
        return self.target.partition("?")[2]

    @property
    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        """Return the first value of a field, whatever the case of its name."""
        return find(self.headers, name)


def read_request(reader: Reader, connection: int) -> Request | None:
    """Read one whole request; return None where the peer is done."""
    if not reader.buffer and not reader.fill():
        return None
    match = REQUEST_LINE.match(reader.line())
    if match is None:
        raise ProtocolError("bad request line")
    method, target = (part.decode("ascii") for part in match.groups() if part is not None)
    headers = read_fields(reader)
    if len(find_all(headers, "host")) != 1 and method != "CONNECT":
        raise ProtocolError("exactly one host field is wanted")
    raw_body = read_body(reader, body_length(headers))
    body = raw_body
    if (find(headers, "content-encoding") or "identity").lower() == "zstd":
        body = zstd_decompress(raw_body)
    return Request(method, target, headers, raw_body, body, connection)


# == 4 zstd ===================================================================
# The system's libzstd through ctypes, its streaming call: a frame need not declare its size.


class ZstdBuffer(ctypes.Structure):
    """Mirror ZSTD_inBuffer and ZSTD_outBuffer, which have one layout."""

    _fields_ = [("start", ctypes.c_void_p), ("size", ctypes.c_size_t), ("position", ctypes.c_size_t)]


def load_zstd() -> ctypes.CDLL | None:
    """Return libzstd where the system has it."""
    name = ctypes.util.find_library("zstd")
    if name is None:
        return None
    library = ctypes.CDLL(name)
    library.ZSTD_createDStream.restype = ctypes.c_void_p
    library.ZSTD_freeDStream.argtypes = [ctypes.c_void_p]
    library.ZSTD_isError.argtypes = [ctypes.c_size_t]
    library.ZSTD_decompressStream.restype = ctypes.c_size_t
    library.ZSTD_decompressStream.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ZstdBuffer),
        ctypes.POINTER(ZstdBuffer),
    ]
    return library


ZSTD = load_zstd()
HAS_ZSTD = ZSTD is not None


def zstd_decompress(packed: bytes) -> bytes:
    """Return what one whole zstd frame holds; raise ProtocolError for anything else."""
    if ZSTD is None:
        raise ProtocolError("a zstd body, but this host has no libzstd")
    stream = ZSTD.ZSTD_createDStream()
    room = ctypes.create_string_buffer(RECEIVE)
    held = ctypes.create_string_buffer(packed, len(packed))
    source = ZstdBuffer(ctypes.cast(held, ctypes.c_void_p), len(packed), 0)
    parts = []
    try:
        while True:
            target = ZstdBuffer(ctypes.cast(room, ctypes.c_void_p), len(room), 0)
            left = ZSTD.ZSTD_decompressStream(stream, ctypes.byref(target), ctypes.byref(source))
            if ZSTD.ZSTD_isError(left) or (left and not target.position and source.position == source.size):
                raise ProtocolError("a broken zstd body")
            parts.append(room.raw[: target.position])
            if left == 0:
                break
    finally:
        ZSTD.ZSTD_freeDStream(stream)
    if source.position != source.size:
        raise ProtocolError("bytes after the zstd frame")
    return b"".join(parts)


# == 5 WebSocket frames =======================================================
# RFC 6455: one frame out, one frame in. Both sides of the bridge are played with it.

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


# == 6 events =================================================================
# Builders of what the backend streams. The field names are the Responses API's; `output` of the terminal
# event is empty by default, as the real backend sends it today.

COUNTER = itertools.count(1)
USAGE = {
    "input_tokens": 32,
    "input_tokens_details": {"cached_tokens": 16},
    "output_tokens": 9,
    "output_tokens_details": {"reasoning_tokens": 4},
    "total_tokens": 41,
}


def fresh(prefix: str) -> str:
    """Return an id that no other has, such as `msg_…`."""
    return f"{prefix}_{next(COUNTER):032x}"


def numbered(*events: Event) -> list[Event]:
    """Return copies of `events` with running `sequence_number`s."""
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def response_object(response_id: str, status: str, model: str = "gpt-5.5", **fields: Any) -> Event:
    """Return the `response` of a lifecycle event."""
    return {
        "id": response_id, "object": "response", "created_at": 1795328042, "status": status,
        "background": False, "error": None, "incomplete_details": None, "instructions": None,
        "max_output_tokens": None, "model": model, "output": [], "parallel_tool_calls": True,
        "previous_response_id": None, "reasoning": {"effort": "medium"}, "service_tier": "default",
        "store": False, "temperature": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": "auto",
        "tools": [], "top_p": 1.0, "truncation": "disabled", "usage": None, "user": None,
        "metadata": {}, **fields,
    }


def created(response_id: str | None = None, model: str = "gpt-5.5") -> Event:
    """Return the event that opens every stream."""
    response = response_object(response_id or fresh("resp"), "in_progress", model)
    return {"type": "response.created", "sequence_number": 0, "response": response}


def completed(response_id: str | None = None, sequence_number: int = 1, **fields: Any) -> Event:
    """Return the terminal event of a turn that went well."""
    response = response_object(response_id or fresh("resp"), "completed", usage=USAGE, **fields)
    return {"type": "response.completed", "sequence_number": sequence_number, "response": response}


def failed(code: str, message: str, sequence_number: int = 1) -> Event:
    """Return the terminal event of a turn that failed inside a 200."""
    response = response_object(fresh("resp"), "failed", error={"code": code, "message": message})
    return {"type": "response.failed", "sequence_number": sequence_number, "response": response}


def incomplete(reason: str = "max_output_tokens", sequence_number: int = 1) -> Event:
    """Return the terminal event of a turn that was cut short on purpose."""
    details = {"reason": reason}
    response = response_object(fresh("resp"), "incomplete", incomplete_details=details, usage=USAGE)
    return {"type": "response.incomplete", "sequence_number": sequence_number, "response": response}


def message_item(text: str, item_id: str | None = None) -> Item:
    """Return an assistant's message."""
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {
        "type": "message", "id": item_id or fresh("msg"), "status": "completed", "role": "assistant",
        "content": content,
    }


def reasoning_item(
    item_id: str | None = None, encrypted_content: str | None = "gAAAAAB_enc", summary: str = "think"
) -> Item:
    """Return a reasoning item; without its ciphertext it points at nothing under `store: false`."""
    item: Item = {"type": "reasoning", "id": item_id or fresh("rs")}
    item["summary"] = [{"type": "summary_text", "text": summary}] if summary else []
    if encrypted_content is not None:
        item["encrypted_content"] = encrypted_content
    return item


def call_item(name: str, arguments: str, call_id: str = "call_1") -> Item:
    """Return a function call; `arguments` is JSON text."""
    return {
        "type": "function_call", "id": fresh("fc"), "status": "completed", "name": name,
        "arguments": arguments, "call_id": call_id,
    }


def custom_call_item(name: str, text: str, call_id: str = "call_1") -> Item:
    """Return a call of a custom (free-form) tool."""
    return {
        "type": "custom_tool_call", "id": fresh("ctc"), "status": "completed", "name": name, "input": text,
        "call_id": call_id,
    }


def pieces(text: str) -> list[str]:
    """Cut a text into deltas, as tokens come: a word and the space before it."""
    return re.findall(r"\s*\S+|\s+\Z", text) or [""]


def _message_events(item: Item, place: Event) -> list[Event]:
    place = {**place, "content_index": 0}
    part = item["content"][0]
    text = part["text"]
    deltas = [
        {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
        for piece in pieces(text)
    ]
    return [
        {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
        *deltas,
        {"type": "response.output_text.done", **place, "text": text, "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part},
    ]


def _reasoning_events(item: Item, place: Event) -> list[Event]:
    events: list[Event] = []
    for index, part in enumerate(item["summary"]):
        spot = {**place, "summary_index": index}
        kind = "response.reasoning_summary_text"
        events.append({"type": "response.reasoning_summary_part.added", **spot, "part": {**part, "text": ""}})
        events.extend({"type": f"{kind}.delta", **spot, "delta": piece} for piece in pieces(part["text"]))
        events.append({"type": f"{kind}.done", **spot, "text": part["text"]})
        events.append({"type": "response.reasoning_summary_part.done", **spot, "part": part})
    return events


def _call_events(item: Item, place: Event) -> list[Event]:
    kind = "response.function_call_arguments"
    deltas = [{"type": f"{kind}.delta", **place, "delta": piece} for piece in pieces(item["arguments"])]
    return [*deltas, {"type": f"{kind}.done", **place, "arguments": item["arguments"]}]


def _custom_call_events(item: Item, place: Event) -> list[Event]:
    kind = "response.custom_tool_call_input"
    deltas = [{"type": f"{kind}.delta", **place, "delta": piece} for piece in pieces(item["input"])]
    return [*deltas, {"type": f"{kind}.done", **place, "input": item["input"]}]


INNER_EVENTS: dict[str, Callable[[Item, Event], list[Event]]] = {
    "message": _message_events,
    "reasoning": _reasoning_events,
    "function_call": _call_events,
    "custom_tool_call": _custom_call_events,
}
UNFINISHED: dict[str, dict[str, object]] = {
    "message": {"content": [], "status": "in_progress"},
    "reasoning": {"summary": []},
    "function_call": {"arguments": "", "status": "in_progress"},
    "custom_tool_call": {"input": "", "status": "in_progress"},
}


def items_turn(
    *items: Item, empty_output: bool = True, response_id: str | None = None, model: str = "gpt-5.5"
) -> list[Event]:
    """Return every event of a turn whose output is `items`."""
    response_id = response_id or fresh("resp")
    opening = response_object(response_id, "in_progress", model)
    events: list[Event] = [
        {"type": "response.created", "response": opening},
        {"type": "response.in_progress", "response": opening},
    ]
    for index, item in enumerate(items):
        unfinished = {**item, **UNFINISHED.get(item["type"], {})}
        events.append({"type": "response.output_item.added", "output_index": index, "item": unfinished})
        if item["type"] in INNER_EVENTS:
            place = {"item_id": item.get("id"), "output_index": index}
            events.extend(INNER_EVENTS[item["type"]](item, place))
        events.append({"type": "response.output_item.done", "output_index": index, "item": item})
    output = [] if empty_output else list(items)
    events.append(completed(response_id, model=model, output=output))
    return numbered(*events)


def text_turn(
    text: str = "hello",
    reasoning: bool = False,
    empty_output: bool = True,
    response_id: str | None = None,
    model: str = "gpt-5.5",
) -> list[Event]:
    """Return the events of a turn that answers with a text, after a reasoning item if so wished."""
    items = [reasoning_item()] if reasoning else []
    return items_turn(
        *items, message_item(text), empty_output=empty_output, response_id=response_id, model=model
    )


def call_turn(
    name: str, arguments: str | Event, call_id: str = "call_1", empty_output: bool = True
) -> list[Event]:
    """Return the events of a turn that calls a function; `arguments` is JSON text or an object."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return items_turn(call_item(name, text, call_id), empty_output=empty_output)


def custom_call_turn(name: str, text: str, call_id: str = "call_1", empty_output: bool = True) -> list[Event]:
    """Return the events of a turn that calls a custom tool."""
    return items_turn(custom_call_item(name, text, call_id), empty_output=empty_output)


def sse_bytes(event: Event | bytes, name: bool = True) -> bytes:
    """Return one event as the backend writes it; bytes stay as they are."""
    if isinstance(event, bytes):
        return event
    line = f"event: {event['type']}\n".encode() if name else b""
    return line + b"data: " + dump(event) + b"\n\n"


# == 7 exchange ===============================================================
# One request and the hands to answer it with, rightly or wrongly.

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


# == 8 replies ================================================================
# Factories for `Backend.on` and `Backend.always`.

TURN_HEADERS: Headers = (
    *SSE_HEADERS,
    ("server", "cloudflare"),
    ("cf-ray", "9a1b2c3d4e5f-FRA"),
    ("set-cookie", "__cf_bm=secret-of-the-host; path=/; HttpOnly; Secure"),
    ("x-request-id", "req_7d1f"),
    ("openai-processing-ms", "214"),
    ("x-codex-turn-state", "ts-sticky-1"),
    ("x-codex-plan-type", "pro"),
    ("x-codex-primary-used-percent", "12.5"),
    ("x-codex-primary-window-minutes", "300"),
    ("x-codex-primary-reset-at", "1795346042"),
    ("x-codex-secondary-used-percent", "3"),
    ("x-codex-secondary-window-minutes", "10080"),
    ("x-codex-secondary-reset-at", "1795932842"),
)
CLOUDFLARE_PAGE = (
    "<!DOCTYPE html><html><head><title>Just a moment...</title></head><body>"
    "<h1>Sorry, you have been blocked</h1><p>You are unable to access chatgpt.com</p></body></html>"
)


def turn(*events: Event | bytes, headers: Headers = TURN_HEADERS) -> Reply:
    """Answer 200 with these events, and keep the connection."""

    def reply(exchange: Exchange) -> None:
        exchange.head(200, headers)
        exchange.events(*events)
        exchange.finish()

    return reply


def cut(*events: Event | bytes, by: str = "close") -> Reply:
    """Answer 200 with these events, then FIN (or RST: `by="reset"`) without the last chunk."""

    def reply(exchange: Exchange) -> None:
        exchange.head(200, TURN_HEADERS)
        exchange.events(*events)
        end(exchange, by)

    return reply


def gated(gate: threading.Event, before: Sequence[Event | bytes], after: Sequence[Event | bytes]) -> Reply:
    """Answer 200 with the events `before`; wait for `gate`, 10 s at most; then `after`."""

    def reply(exchange: Exchange) -> None:
        exchange.head(200, TURN_HEADERS)
        exchange.events(*before)
        if not gate.wait(10):
            raise AssertionError("the test never opened the gate")
        exchange.events(*after)
        exchange.finish()

    return reply


def hang(*events: Event | bytes, left: threading.Event | None = None) -> Reply:
    """Send a head and these events, then wait until the peer hangs up, and set `left`.

    Without events nothing is sent at all; `hang(b"")` sends the head alone.
    """

    def reply(exchange: Exchange) -> None:
        gone = True
        with contextlib.suppress(OSError):
            if events:
                exchange.head(200, TURN_HEADERS)
                exchange.events(*events)
            gone = exchange.left(60)
        if gone and left is not None:
            left.set()

    return reply


def reply_json(status: int, value: object, headers: Headers = ()) -> Reply:
    """Answer with a whole JSON reply."""
    return lambda exchange: exchange.json(status, value, headers)


def reply_raw(raw: bytes, then: str = "close") -> Reply:
    """Answer with these bytes, then FIN ("close"), RST ("reset"), or go on ("keep")."""

    def reply(exchange: Exchange) -> None:
        exchange.send(raw)
        end(exchange, then)

    return reply


def end(exchange: Exchange, how: str) -> None:
    """End an exchange by its word: "close", "reset" or "keep"."""
    if how == "close":
        exchange.close()
    elif how == "reset":
        exchange.reset()
    else:
        exchange.complete = True


def refuse(status: int, text: str) -> Reply:
    """Answer with the backend's short form of an error."""
    return reply_json(status, {"detail": text})


def cloudflare() -> Reply:
    """Answer with the page that meets a program Cloudflare does not like."""
    headers = [
        ("content-type", "text/html; charset=UTF-8"),
        ("server", "cloudflare"),
        ("cf-ray", "9a1b2c3d4e5f-FRA"),
    ]
    return lambda exchange: exchange.whole(403, CLOUDFLARE_PAGE.encode(), headers)


def checked(backend: Backend, reply: Reply) -> Reply:
    """Hold a request for a turn to the rules first, and answer it with `reply` only if it passes."""

    def route(_: Backend, exchange: Exchange) -> None:
        backend.turn_body(exchange.request)
        reply(exchange)

    def judged(exchange: Exchange) -> None:
        backend.answer(exchange, route)

    return judged


def usage_limit(resets_at: int = 1795346042) -> Reply:
    """Answer that the plan's limit is reached."""
    error = {
        "type": "usage_limit_reached", "message": "The usage limit has been reached", "plan_type": "pro",
        "resets_at": resets_at, "resets_in_seconds": 1800,
    }
    return reply_json(429, {"error": error})


# == 9 listener ===============================================================
# Accepts, one thread a connection; remembers requests; holds the scripts. `changed` guards all shared state.

BASE = "/backend-api/codex"
ABSOLUTE = ("/backend-api/", "/oauth/", "/api/")
LINGER = 1.0  # seconds that an ended connection waits for the peer's end
GRACE = 5.0  # seconds for a connection's thread to end once its socket is shut


def full_path(path: str) -> str:
    """Return a path as it stands in a request line; a short one is relative to `/backend-api/codex`."""
    return path if path.startswith(ABSOLUTE) else BASE + path


class Listener:
    """Serve connections on loopback until closed; subclasses answer through `default`."""

    def __init__(self, tls: bool = True) -> None:
        self.tls = tls
        self.changed = threading.Condition()
        self.requests: list[Request] = []
        self.errors: list[BaseException] = []
        self.connections = 0
        self._open: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, name="wire-accept", daemon=True)
        self._scripts: dict[str, collections.deque[Reply]] = collections.defaultdict(collections.deque)
        self._standing: dict[str, Reply] = {}
        self._listening = True
        self._closing = False
        self.ca_file = str(certificates() / "ca.pem")
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address: Address = ("127.0.0.1", self._socket.getsockname()[1])
        self.origin = f"{'https' if tls else 'http'}://localhost:{self.address[1]}"
        self.upstream = self.origin + BASE
        self.issuer = self.origin

    @property
    def open_connections(self) -> int:
        """Return how many connections are open now."""
        with self.changed:
            return len(self._open)

    def start(self) -> None:
        """Begin to accept."""
        self._acceptor.start()

    def close(self) -> None:
        """Stop accepting, cut what is open, and wait for every thread. A second call does nothing."""
        if self._closing:
            return
        self.stop_listening()
        self._closing = True
        self.cut_connections()
        for thread in self._threads:
            thread.join(GRACE)
            if thread.is_alive():
                self.errors.append(RuntimeError(f"{thread.name} still runs"))

    def stop_listening(self) -> None:
        """Refuse new connections from now on; those that are open stay."""
        if not self._listening:
            return
        self._listening = False
        if self._acceptor.is_alive():
            # Closing a socket does not wake a thread in accept() on every system; a connection does.
            with contextlib.suppress(OSError):
                socket.create_connection(self.address, 1).close()
            self._acceptor.join(GRACE)
        self._socket.close()

    def cut_connections(self) -> None:
        """Shut every open connection, as a backend does that restarts."""
        with self.changed:
            for sock in self._open.values():
                with contextlib.suppress(OSError):
                    # The method of the plain socket, see half_close().
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def wait_for(self, count: int, path: str | None = None, timeout: float = 5.0) -> list[Request]:
        """Wait until `count` requests (of that path) came, and return them all; else raise AssertionError."""

        def seen() -> list[Request]:
            return [each for each in self.requests if path is None or each.path == full_path(path)]

        with self.changed:
            if not self.changed.wait_for(lambda: len(seen()) >= count, timeout):
                raise AssertionError(
                    f"{len(seen())} of {count} requests of {path or 'any path'} came in {timeout} s"
                )
            return seen()

    def wait_for_idle(self, timeout: float = 5.0) -> None:
        """Wait until no connection is open; raise AssertionError if one stays."""
        with self.changed:
            if not self.changed.wait_for(lambda: not self._open, timeout):
                raise AssertionError(f"{len(self._open)} connections are still open after {timeout} s")

    def on(self, path: str, *replies: Reply) -> None:
        """Queue replies for the next requests of a path, one each, before the default takes over again."""
        with self.changed:
            self._scripts[full_path(path)].extend(replies)

    def always(self, path: str, reply: Reply) -> None:
        """Replace the default reply of a path."""
        with self.changed:
            self._standing[full_path(path)] = reply

    def default(self, exchange: Exchange) -> None:
        """Answer a request that has no script."""
        raise NotImplementedError

    def _accept(self) -> None:
        for number in itertools.count(1):
            sock, _ = self._socket.accept()
            if not self._listening:
                sock.close()
                return
            name = f"wire-{number}"
            thread = threading.Thread(target=self._connection, args=(sock, number), name=name, daemon=True)
            with self.changed:
                self.connections += 1
                self._open[number] = sock
                self._threads = [each for each in self._threads if each.is_alive()]
                self._threads.append(thread)
                thread.start()
                self.changed.notify_all()

    def _connection(self, plain: socket.socket, number: int) -> None:
        sock = plain
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls:
                secure = server_context().wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
                sock = secure
                with self.changed:
                    self._open[number] = sock
                    if self._closing:  # cut_connections() may have met the emptied plain socket
                        return
                secure.do_handshake()
            self._serve(Reader(sock), number)
        except (OSError, PeerLeft):
            pass  # a peer that leaves is not an error; a test looks at what the bridge did then
        except BaseException as exc:  # a handler's failure must fail the test, not vanish in its thread
            with self.changed:
                self.errors.append(exc)
        finally:
            sock.close()
            with self.changed:
                self._open.pop(number, None)
                self.changed.notify_all()

    def _serve(self, reader: Reader, number: int) -> None:
        while not self._closing:
            try:
                request = read_request(reader, number)
            except ProtocolError:
                reader.sock.sendall(head_bytes("HTTP/1.1 400 Bad Request", [("content-length", "0")]))
                self._linger(reader)
                raise
            if request is None:
                return
            with self.changed:
                self.requests.append(request)
                reply = self._next_reply(request)
                self.changed.notify_all()
            exchange = Exchange(request, reader)
            reply(exchange)
            if exchange.closed or not (exchange.complete and exchange.keep_alive):
                break
        if reader.sock.fileno() >= 0:  # else the reply has reset it
            self._linger(reader)

    def _next_reply(self, request: Request) -> Reply:
        """Return the script for a request; the caller holds the lock."""
        if request.header("upgrade") is None:
            queue = self._scripts[request.path]
            if queue:
                return queue.popleft()
            if request.path in self._standing:
                return self._standing[request.path]
        return self.default

    def _linger(self, reader: Reader) -> None:
        """Send FIN and drain what the peer still sends: closing over unread bytes would send RST."""
        half_close(reader.sock)
        deadline = time.monotonic() + LINGER
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                reader.sock.settimeout(LINGER)
                if not socket.socket.recv(reader.sock, RECEIVE):  # ciphertext: nobody reads it any more
                    return


# == 10 sign-in ===============================================================
# The sign-in server's state: tokens that rotate, a device code that waits for its person.

CLIENT_ID = "app_EMoamEEZ73f0CkXaXp7hrann"
AUTH_CLAIM = "https://api.openai.com/auth"
REFRESH_REASONS = ("proactive_expiry", "unauthorized_recovery")


def b64url(raw: bytes) -> str:
    """Return base64url without padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def jwt(claims: Event) -> str:
    """Return a token of a JWT's shape; its signature is a placeholder, nobody checks it here."""
    head = {"alg": "RS256", "kid": "wire", "typ": "JWT"}
    return ".".join([b64url(dump(head)), b64url(dump(claims)), b64url(b"signature of the stand-in")])


class Refused(Exception):
    """Answer a request with a refusal; `body` is JSON, or text for a page."""

    def __init__(self, status: int, body: object) -> None:
        super().__init__(f"{status} {body}")
        self.status = status
        self.body = body


def detail(status: int, text: str) -> Refused:
    """Return a refusal in the backend's short form."""
    return Refused(status, {"detail": text})


def fault(status: int, message: str, code: str | None, param: str | None = None) -> Refused:
    """Return a refusal in the API's long form."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return Refused(status, {"error": error})


class SignIn:
    """Issue, rotate and judge tokens. `lock` guards everything below it."""

    def __init__(self, issuer: str) -> None:
        self.lock = threading.Lock()
        self.token_issuer = issuer
        self.account_id = "0b0f4a5e-6c1d-4b7e-9a53-7f2d8e1c4a90"
        self.plan = "pro"
        self.expires_in = 864_000.0  # seconds an access token lives from its issue
        self.refreshes = 0
        self.device_enabled = True
        self.device_interval = "5"  # seconds, as text: so the real server sends it
        self._accepted: dict[str, float] = {}
        self._spent: set[str] = set()
        self._device: dict[str, str] = {}
        self._approved = False
        self.tokens: dict[str, str] = {}
        self._issue()

    @property
    def access_token(self) -> str:
        """Return the newest access token."""
        return self.tokens["access_token"]

    @property
    def refresh_token(self) -> str:
        """Return the one refresh token that is accepted now."""
        return self.tokens["refresh_token"]

    def _issue(self) -> dict[str, str]:
        now = time.time()
        expires = now + self.expires_in
        number = next(COUNTER)
        auth = {
            "chatgpt_account_id": self.account_id, "chatgpt_plan_type": self.plan,
            "chatgpt_user_id": "user-wire", "chatgpt_account_is_fedramp": False, "user_id": "user-wire",
        }
        common = {
            "iss": self.token_issuer, "sub": "auth0|wire", "iat": int(now), "jti": str(number),
            AUTH_CLAIM: auth,
        }
        identity = {**common, "aud": [CLIENT_ID], "email": "someone@example.com", "exp": int(now + 3600)}
        access = {**common, "aud": ["https://api.openai.com/v1"], "client_id": CLIENT_ID, "exp": int(expires)}
        self.tokens = {
            "id_token": jwt(identity),
            "access_token": jwt(access),
            "refresh_token": f"rt_wire_{number}",
        }
        self._accepted[self.access_token] = expires
        return dict(self.tokens)

    def rotate(self) -> dict[str, str]:
        """Do what another program's refresh does: spend the refresh token and issue new tokens."""
        with self.lock:
            self._spent.add(self.refresh_token)
            return self._issue()

    def revoke(self) -> None:
        """Refuse every access token issued so far with 401."""
        with self.lock:
            self._accepted.clear()

    def revoke_refresh(self) -> None:
        """Refuse the current refresh token as one that was used before."""
        with self.lock:
            self._spent.add(self.refresh_token)

    def approve_device(self) -> None:
        """Do what the person does who types the code."""
        with self.lock:
            self._approved = True

    def check_bearer(self, request: Request) -> None:
        """Raise Refused unless the request carries a live access token and its account."""
        scheme, _, token = (request.header("authorization") or "").partition(" ")
        with self.lock:
            expires = self._accepted.get(token, 0.0)
        if scheme != "Bearer" or expires <= time.time():
            raise detail(401, "Could not validate credentials")
        if request.header("chatgpt-account-id") != self.account_id:
            raise detail(401, "Account id does not match the token")

    def token(self, exchange: Exchange) -> None:
        """Answer `/oauth/token`: a refresh in JSON, or a device's code as a form."""
        kind = (exchange.request.header("content-type") or "").partition(";")[0]
        if kind == "application/x-www-form-urlencoded":
            answer = self._exchange_code(dict(urllib.parse.parse_qsl(exchange.request.body.decode("ascii"))))
        elif kind == "application/json":
            answer = self._refresh(parse_json(exchange.request.body))
        else:
            raise fault(400, f"content-type {kind!r}", "invalid_request")
        exchange.json(200, answer)

    def _refresh(self, wish: Event) -> Event:
        expected = {"client_id", "grant_type", "refresh_token", "refresh_reason"}
        if set(wish) != expected or wish["client_id"] != CLIENT_ID or wish["grant_type"] != "refresh_token":
            raise fault(400, f"bad refresh, fields {sorted(wish)}", "invalid_request")
        if wish["refresh_reason"] not in REFRESH_REASONS:
            raise fault(400, "unknown refresh_reason", "invalid_request")
        with self.lock:
            if wish["refresh_token"] in self._spent:
                message = "Your refresh token has already been used to generate a new access token."
                raise fault(401, message, "refresh_token_reused")
            if wish["refresh_token"] != self.refresh_token:
                raise fault(401, "Your refresh token has been invalidated.", "refresh_token_invalidated")
            self._spent.add(self.refresh_token)
            self.refreshes += 1
            return {
                **self._issue(),
                "token_type": "Bearer",
                "expires_in": int(self.expires_in),
                "scope": "openid",
            }

    def usercode(self, exchange: Exchange) -> None:
        """Answer the first step of the device sign-in."""
        if not self.device_enabled:
            raise detail(404, "Not Found")
        if parse_json(exchange.request.body) != {"client_id": CLIENT_ID}:
            raise fault(400, "client_id is wanted, and nothing else", "invalid_request")
        with self.lock:
            number = next(COUNTER)
            self._device = {"device_auth_id": f"deviceauth_{number}", "user_code": f"WIRE-{number:05d}"}
            exchange.json(200, {**self._device, "interval": self.device_interval})

    def device_token(self, exchange: Exchange) -> None:
        """Answer a poll: 403 until the person has typed the code."""
        with self.lock:
            if not self._device or parse_json(exchange.request.body) != self._device:
                raise fault(400, "not the device that asked", "invalid_request")
            if not self._approved:
                raise fault(403, "Device authorization is pending.", "deviceauth_authorization_pending")
            verifier = f"verifier-{self._device['device_auth_id']}"
            challenge = b64url(hashlib.sha256(verifier.encode()).digest())
            code = f"ac_{self._device['device_auth_id']}"
            exchange.json(
                200, {"authorization_code": code, "code_challenge": challenge, "code_verifier": verifier}
            )

    def _exchange_code(self, form: dict[str, str]) -> Event:
        with self.lock:
            device = self._device.get("device_auth_id")
            expected = {
                "grant_type": "authorization_code", "client_id": CLIENT_ID, "code": f"ac_{device}",
                "redirect_uri": f"{self.token_issuer}/deviceauth/callback",
                "code_verifier": f"verifier-{device}",
            }
            if not self._approved or form != expected:
                raise fault(400, "bad code exchange", "invalid_grant")
            self._device, self._approved = {}, False
            return {**self._issue(), "token_type": "Bearer"}


# == 11 catalogue =============================================================
# `GET /models` in the Codex shape; the entries are trimmed from a capture (November 2026).

EFFORTS = ("low", "medium", "high", "xhigh", "max", "ultra")


def model_entry(
    slug: str, priority: int, lite: bool = True, visibility: str = "list", efforts: Sequence[str] = EFFORTS
) -> Event:
    """Return one model of the catalogue."""
    entry: Event = {
        "slug": slug, "display_name": slug.upper(), "description": f"The model {slug}.",
        "default_reasoning_level": "medium",
        "supported_reasoning_levels": [{"effort": effort, "description": effort} for effort in efforts],
        "shell_type": "unified_exec", "visibility": visibility, "supported_in_api": True,
        "priority": priority, "additional_speed_tiers": ["fast"],
        "service_tiers": [{"id": "priority", "name": "Fast", "description": "1.5x speed, increased usage"}],
        "availability_nux": None, "upgrade": None, "model_messages": None,
        "include_skills_usage_instructions": False, "include_plugin_usage_instructions": False,
        "include_apps_usage_instructions": False, "default_reasoning_summary": "none",
        "support_verbosity": True, "default_verbosity": "low", "apply_patch_tool_type": "freeform",
        "web_search_tool_type": "text_and_image", "truncation_policy": {"mode": "tokens", "limit": 10000},
        "supports_image_detail_original": True, "context_window": 272000, "max_context_window": 872000,
        "comp_hash": "3000", "effective_context_window_percent": 95, "experimental_supported_tools": [],
        "input_modalities": ["text", "image"], "supports_search_tool": True,
        "supports_experimental_context": False, "supports_reasoning_effort_updates": False,
        "node_repl_auto_review_required": False, "node_repl_disabled": False,
        "base_instructions": "You are a coding agent.",
    }
    if lite:
        entry.update({"use_responses_lite": True, "tool_mode": "code_mode_only", "multi_agent_version": "v2"})
    return entry


CATALOG: list[Event] = [
    model_entry("gpt-6.1-sol", 1),
    model_entry("gpt-6-sol", 3),
    model_entry("gpt-5.6-sol", 5),
    model_entry("gpt-5.5", 13, lite=False, efforts=EFFORTS[:4]),
    model_entry("codex-auto-review", 43, visibility="hide", efforts=EFFORTS[:5]),
]
CATALOG_JSON = json.dumps(CATALOG)  # each stand-in has a copy of its own


# == 12 refusals ==============================================================
# Everything that WIRE says the backend refuses, a function each; the first that raises answers.

VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+(?:-[0-9A-Za-z.-]+)?\Z", re.ASCII)
LIBRARY_AGENT = re.compile(
    r"(?:python|aiohttp|httpx|curl|wget|okhttp|go-http-client|(?:async)?openai|node|axios|undici|java)\b",
    re.IGNORECASE,
)
LITE_HEADER = "x-openai-internal-codex-responses-lite"
LITE_METADATA = "ws_request_header_x_openai_internal_codex_responses_lite"
WEBSOCKET_BETA = "responses_websockets=2026-02-06"
FORBIDDEN = (
    "cookie", "x-api-key", "forwarded", "x-real-ip", "via", "expect", "te", "trailer", "keep-alive",
    "proxy-authorization", "proxy-connection", "proxy-authenticate",
)
FORBIDDEN_PREFIXES = ("x-forwarded-", "cf-", "x-stainless-", "x-qoo-")
SINGLE = (
    "authorization",
    "chatgpt-account-id",
    "version",
    "originator",
    "user-agent",
    "session-id",
    "content-type",
)
FIELDS = frozenset([
    "model", "instructions", "input", "tools", "tool_choice", "parallel_tool_calls", "reasoning", "store",
    "stream", "include", "prompt_cache_key", "text", "service_tier", "client_metadata",
])
FRAME_FIELDS = FIELDS | {"type", "previous_response_id", "generate"}
ID_PREFIXES = {
    "message": "msg_", "reasoning": "rs_", "function_call": "fc_", "function_call_output": "fco_",
    "custom_tool_call": "ctc_", "additional_tools": "at_", "compaction": "cmp_",
}
MAX_ID = 64  # characters
PLAIN_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
TIERS = ("priority", "default")
MAX_INTEGER = 4000  # digits that int() takes on every Python


def _pairs(pairs: list[tuple[str, Any]]) -> Event:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate key")
    return value


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= MAX_INTEGER else digits


def parse_json(raw: bytes) -> Event:
    """Return a JSON object; duplicate keys, NaN, Infinity and broken UTF-8 are refused."""
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant, parse_int=_integer
        )
    except (ValueError, RecursionError) as exc:
        raise fault(400, f"We could not parse the JSON body of your request: {exc}", None) from exc
    if not isinstance(value, dict):
        raise fault(400, "The body is not a JSON object.", None)
    return value


@dataclasses.dataclass(frozen=True)
class Wish:
    """Hold what is judged: the request, its body, and where it stands."""

    backend: Backend
    request: Request
    body: Event
    websocket: bool = False

    @property
    def entry(self) -> Event:
        """Return the catalogue's entry of the model, empty where there is none."""
        found = (each for each in self.backend.catalog if each.get("slug") == self.body["model"])
        return next(found, {})

    @property
    def lite(self) -> bool:
        """Tell whether the catalogue wants the lite form for the model."""
        return bool(self.entry.get("use_responses_lite"))

    @property
    def items(self) -> Iterator[tuple[int, Item]]:
        """Return the items of the input with their places."""
        return enumerate(self.body["input"])


def refuse_library_agent(request: Request) -> None:
    """Play Cloudflare: a program that does not name itself gets a page."""
    agent = request.header("user-agent") or ""
    if not agent or not request.header("originator") or LIBRARY_AGENT.match(agent):
        raise Refused(403, CLOUDFLARE_PAGE)


def forbidden(name: str, websocket: bool) -> bool:
    """Tell whether a request field must never reach the backend."""
    name = name.lower()
    if name in FORBIDDEN or name.startswith(FORBIDDEN_PREFIXES):
        return True
    return not websocket and (name == "upgrade" or name.startswith("sec-websocket-"))


def refuse_headers(request: Request, websocket: bool) -> None:
    """Refuse fields that must not come, or not twice."""
    for name, _ in request.headers:
        if forbidden(name, websocket):
            raise detail(400, f"Header {name} must not be sent")
    for name in SINGLE:
        if len(find_all(request.headers, name)) > 1:
            raise detail(400, f"Header {name} came twice")
    connection = (request.header("connection") or "keep-alive").lower()
    if not websocket and connection not in ("keep-alive", "close"):
        raise detail(400, "Header connection lists fields of another hop")


def require_headers(backend: Backend, request: Request) -> None:
    """Refuse the absence of fields that must come, or another value than they must have."""
    if request.header("accept-encoding") not in (None, "identity"):
        raise detail(400, "accept-encoding must be identity")
    if request.header("host") not in backend.hosts:
        raise detail(421, f"Host {request.header('host')} is not served here")
    if not VERSION.match(request.header("version") or ""):
        raise detail(400, "This model requires a newer version of Codex: header version")
    for name, value in backend.required_headers.items():
        if request.header(name) != value:
            raise detail(400, f"Header {name} must be {value}")


def refuse_session(wish: Wish) -> None:
    """Refuse a request without its session, its type, or with a routing hint that is not its own."""
    request, body = wish.request, wish.body
    if not request.header("session-id"):
        raise detail(400, "Header session-id is missing")
    if wish.websocket:
        return
    if (request.header("content-type") or "").partition(";")[0] != "application/json":
        raise detail(400, "content-type must be application/json")
    hint = f"model={body['model']}"
    tier = body.get("service_tier")
    hints = [hint] if tier is None else [f"{hint};tier={tier}"]
    if tier == "default":
        hints.append(hint)
    if request.header("x-codex-routing-hint") not in hints:
        raise detail(400, f"x-codex-routing-hint must be {hints[0]}")


def refuse_fields(wish: Wish) -> None:
    """Refuse top-level fields: their names first, then what they hold."""
    body = wish.body
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise fault(400, "Missing required parameter: 'model'.", "missing_required_parameter", "model")
    for name in body:
        if name not in (FRAME_FIELDS if wish.websocket else FIELDS):
            raise detail(400, f"Unsupported parameter: {name}")
    if body.get("store") is not False:
        raise detail(400, "Store must be set to false")
    if body.get("stream") is not True:
        raise detail(400, "Stream must be set to true")
    if not isinstance(body.get("input"), list):
        raise detail(400, "Input must be a list")
    tier = body.get("service_tier")
    if tier is not None and tier not in TIERS:
        raise detail(400, f"Unsupported service_tier: {tier}")


def refuse_types(wish: Wish) -> None:
    """Refuse top-level fields of the wrong type."""
    kinds: dict[str, type] = {
        "instructions": str, "tools": list, "reasoning": dict, "include": list, "text": dict,
        "parallel_tool_calls": bool, "prompt_cache_key": str, "client_metadata": dict,
    }
    for name, kind in kinds.items():
        value = wish.body.get(name)
        if value is not None and not isinstance(value, kind):
            raise fault(400, f"Invalid type for '{name}'.", "invalid_type", name)


def refuse_items(wish: Wish) -> None:
    """Refuse items without a type, with the role system, or with an id that is not theirs."""
    for index, item in wish.items:
        where = f"input[{index}]"
        if not isinstance(item, dict):
            raise fault(400, f"Invalid type for '{where}': expected an object.", "invalid_type", where)
        if item.get("role") == "system":
            raise detail(400, "System messages are not allowed")
        if not isinstance(item.get("type"), str):
            raise fault(
                400, f"Missing required parameter: '{where}.type'.", "missing_required_parameter", where
            )
        refuse_id(item, where)


def refuse_id(item: Item, where: str) -> None:
    """Refuse an id that is too long or begins with the wrong prefix."""
    item_id = item.get("id")
    if item_id is None or item["type"] == "item_reference":
        return
    if not isinstance(item_id, str):
        raise fault(400, f"Invalid type for '{where}.id': expected a string.", "invalid_type", f"{where}.id")
    if len(item_id) > MAX_ID:
        message = (
            f"Invalid '{where}.id': string too long. Expected a string with maximum length {MAX_ID}, "
            f"but got a string with length {len(item_id)} instead."
        )
        raise fault(400, message, "string_above_max_length", f"{where}.id")
    prefix = ID_PREFIXES.get(item["type"], "")
    if not item_id.startswith(prefix) or not item_id:
        message = (
            f"Invalid '{where}.id': '{item_id}'. Expected an ID that begins with '{prefix.rstrip('_')}'."
        )
        raise fault(400, message, "invalid_value", f"{where}.id")


def refuse_continuity(wish: Wish) -> None:
    """Refuse items that point at something which `store: false` never kept."""
    present = {item.get("id") for _, item in wish.items if item["type"] == "reasoning"}
    for index, item in wish.items:
        where = f"input[{index}]"
        secret = item.get("encrypted_content")
        if item["type"] == "item_reference" or (item["type"] == "reasoning" and not secret):
            message = (
                f"Item with id '{item.get('id')}' not found. Items are not persisted when `store` is set to "
                "false. Try again with `store` set to true, or remove this item from your input."
            )
            raise fault(404, message, None, "input")
        if isinstance(secret, str) and secret.startswith("OTHER"):
            message = f"The encrypted content {secret[:8]}... could not be verified."
            raise fault(400, message, "invalid_encrypted_content", f"{where}.encrypted_content")
        partner = wish.backend.partners.get(str(item.get("id")))
        if partner is not None and partner not in present:
            message = (
                f"Item '{item['id']}' of type '{item['type']}' was provided without its required 'reasoning' "
                f"item: '{partner}'."
            )
            raise fault(400, message, None, "input")


def refuse_effort(wish: Wish) -> None:
    """Refuse an effort that the model does not have; `ultra` is a word of Codex, not of the backend."""
    effort = (wish.body.get("reasoning") or {}).get("effort")
    levels = wish.entry.get("supported_reasoning_levels")
    known = [level["effort"] for level in levels] if levels else list(PLAIN_EFFORTS)
    known = [each for each in known if each != "ultra"]
    if effort is not None and effort not in known:
        message = (
            f"Unsupported value: '{effort}' is not supported with the '{wish.body['model']}' model. "
            f"Supported values are: {', '.join(map(repr, known))}."
        )
        raise fault(400, message, "unsupported_value", "reasoning.effort")


def refuse_tier(wish: Wish) -> None:
    """Refuse a service tier that the catalogue does not list for the model."""
    tiers = wish.entry.get("service_tiers")
    tier = wish.body.get("service_tier")
    if tiers is not None and tier == "priority" and tier not in [each["id"] for each in tiers]:
        raise detail(400, f"Unsupported service_tier: {tier}")


def has_lite_flag(wish: Wish) -> bool:
    """Tell whether a request says that it is in the lite form."""
    if wish.websocket:
        return (wish.body.get("client_metadata") or {}).get(LITE_METADATA) == "true"
    return wish.request.header(LITE_HEADER) is not None


def lite_fault(wish: Wish) -> str | None:
    """Say what keeps a body from being in the lite form."""
    body = wish.body
    first = body["input"][0] if body["input"] else {}
    misplaced = [index for index, item in wish.items if item["type"] == "additional_tools" and index > 0]
    tools_wrong = first.get("role") != "developer" or not first.get("tools")
    faults = (
        ("the header's value", not wish.websocket and wish.request.header(LITE_HEADER) != "true"),
        ("tools at the top", "tools" in body),
        ("instructions at the top", "instructions" in body),
        ("parallel_tool_calls", body.get("parallel_tool_calls") is not False),
        ("reasoning.context", (body.get("reasoning") or {}).get("context") != "all_turns"),
        (f"additional_tools at {misplaced}", bool(misplaced)),
        ("additional_tools without role or tools", first.get("type") == "additional_tools" and tools_wrong),
    )
    return next((why for why, wrong in faults if wrong), None)


def refuse_form(wish: Wish) -> None:
    """Hold lite models to the lite form, and keep it from all others."""
    model, flagged = wish.body["model"], has_lite_flag(wish)
    if wish.lite and wish.backend.enforce_lite:
        if not flagged:
            raise detail(404, f"Model not found {model}")
        why = lite_fault(wish)
        if why is not None:
            wish.backend.note(f"{model}: not in the lite form: {why}")
            raise detail(400, f"Model not found {model}")
    if wish.lite:
        return
    if flagged:
        raise detail(400, f"Responses lite is not supported for model {model}")
    for index, item in wish.items:
        if item["type"] == "additional_tools":
            message = f"Invalid value: 'additional_tools' at input[{index}]: responses lite only."
            raise fault(400, message, "invalid_value", f"input[{index}]")
    if wish.backend.require_instructions and "instructions" not in wish.body:
        raise detail(400, "Instructions are required")


REFUSALS: tuple[Callable[[Wish], None], ...] = (
    refuse_fields,
    refuse_types,
    refuse_session,
    refuse_items,
    refuse_form,
    refuse_effort,
    refuse_tier,
    refuse_continuity,
)


# == 13 backend ===============================================================
# The routes, and what they answer when no script says otherwise.

USAGE_REPORT = {
    "user_id": "user-wire", "account_id": "user-wire", "email": "someone@example.com", "plan_type": "pro",
    "rate_limit": {
        "allowed": True, "limit_reached": False,
        "primary_window": {
            "used_percent": 12, "limit_window_seconds": 18000, "reset_after_seconds": 1800,
            "reset_at": 1795346042,
        },
        "secondary_window": {
            "used_percent": 3, "limit_window_seconds": 604800, "reset_after_seconds": 90000,
            "reset_at": 1795932842,
        },
    },
    "code_review_rate_limit": None, "additional_rate_limits": None,
    "credits": {"has_credits": False, "unlimited": False, "balance": "0"},
}


class Backend(Listener, SignIn):
    """Play chatgpt.com and auth.openai.com on one loopback port.

    Use it as a context manager; leaving it raises what went wrong in its threads. Attributes without an
    underscore may be set by a test at any time.
    """

    def __init__(self, tls: bool = True) -> None:
        Listener.__init__(self, tls)
        SignIn.__init__(self, self.issuer)
        self.catalog: list[Event] = json.loads(CATALOG_JSON)
        self.routing: tuple[str, str] = ("https://chatgpt.com", "NO_CONSTRAINT")
        self.hosts = (f"localhost:{self.address[1]}", f"127.0.0.1:{self.address[1]}")
        self.required_headers: dict[str, str] = {}
        self.partners: dict[str, str] = {}  # an item's id -> the reasoning item that must come with it
        self.enforce_lite = True
        self.require_instructions = False
        self.refusals: list[str] = []
        self.frames: list[Event] = []
        self.websocket_status: int | None = None
        self._frame_scripts: collections.deque[FrameReply] = collections.deque()

    def __enter__(self) -> Backend:
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise the first thing that went wrong in a thread."""
        if self.errors:
            raise AssertionError(f"the stand-in met {self.errors!r}") from self.errors[0]

    def note(self, text: str) -> None:
        """Remember why something was refused, for the reader of a failed test."""
        with self.changed:
            self.refusals.append(text)

    @property
    def etag(self) -> str:
        """Return the catalogue's tag; it changes when the catalogue does."""
        return f'W/"{hashlib.sha256(dump(self.catalog)).hexdigest()[:16]}"'

    def on_frame(self, *replies: FrameReply) -> None:
        """Queue replies for the next frames, one each; a frame that breaks a rule is refused all the same."""
        with self.changed:
            self._frame_scripts.extend(replies)

    def wait_for_frames(self, count: int, timeout: float = 5.0) -> list[Event]:
        """Wait until `count` frames came, and return them all."""
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.frames) >= count, timeout):
                raise AssertionError(f"{len(self.frames)} of {count} frames came in {timeout} s")
            return list(self.frames)

    def next_frame_reply(self, frame: Event) -> FrameReply:
        """Remember a frame, and return what answers it."""
        with self.changed:
            self.frames.append(frame)
            self.changed.notify_all()
            return self._frame_scripts.popleft() if self._frame_scripts else answer_frame

    def default(self, exchange: Exchange) -> None:
        """Answer as the real backend does."""
        request = exchange.request
        upgrade = "websocket" if request.header("upgrade") else ""
        route = ROUTES.get((request.method, request.path, upgrade))
        self.answer(exchange, route or Backend.missing)

    def answer(self, exchange: Exchange, route: Route) -> None:
        """Run a route; what it refuses is answered and remembered."""
        try:
            route(self, exchange)
        except Refused as exc:
            self.note(str(exc))
            send_refusal(exchange, exc)

    def missing(self, exchange: Exchange) -> None:
        """Answer a path that does not exist."""
        raise detail(404, "Not Found")

    def check_client(self, request: Request, websocket: bool = False) -> None:
        """Raise Refused unless the request's headers are those of a signed-in Codex."""
        refuse_library_agent(request)
        self.check_bearer(request)
        refuse_headers(request, websocket)
        require_headers(self, request)

    def check_turn(self, request: Request, body: Event, websocket: bool = False) -> None:
        """Raise Refused unless a request for a turn is one that the backend takes."""
        wish = Wish(self, request, body, websocket)
        for rule in REFUSALS:
            rule(wish)

    def turn_body(self, request: Request) -> Event:
        """Return the body of a request for a turn; raise Refused unless all of the request is right."""
        self.check_client(request)
        encoding = request.header("content-encoding")
        if encoding not in (None, "identity", "zstd"):
            raise detail(415, f"content-encoding {encoding}")
        body = parse_json(request.body)
        self.check_turn(request, body)
        return body

    def responses(self, exchange: Exchange) -> None:
        """Answer `POST /responses`: echo the last text of the input."""
        body = self.turn_body(exchange.request)
        headers = [*TURN_HEADERS, ("x-models-etag", self.etag)]
        turn(*text_turn(echo(body), model=body["model"]), headers=headers)(exchange)

    def models(self, exchange: Exchange) -> None:
        """Answer `GET /models`, also with 304."""
        self.check_client(exchange.request)
        query = urllib.parse.parse_qs(exchange.request.query)
        if set(query) != {"client_version"} or not VERSION.match(query["client_version"][0]):
            raise fault(400, "client_version is wanted", "missing_required_parameter", "client_version")
        tag = [("etag", self.etag)]
        if exchange.request.header("if-none-match") == self.etag:
            exchange.whole(304, b"", tag)
            return
        exchange.json(200, {"models": self.catalog}, tag)

    def accounts(self, exchange: Exchange) -> None:
        """Answer the question where this account's requests go."""
        self.check_client(exchange.request)
        origin, override = self.routing
        account = {
            "id": self.account_id, "name": None, "structure": "personal", "plan_type": self.plan,
            "workspace_backend_origin": origin, "account_routing_override": override,
        }
        exchange.json(200, {"accounts": [account], "default_account_id": self.account_id})

    def usage(self, exchange: Exchange) -> None:
        """Answer with the plan's limits."""
        self.check_client(exchange.request)
        exchange.json(200, USAGE_REPORT)

    def websocket(self, exchange: Exchange) -> None:
        """Answer a handshake on `/responses`, then every frame."""
        if self.websocket_status is not None:
            raise detail(self.websocket_status, "WebSocket is not served")
        self.check_client(exchange.request, websocket=True)
        check_handshake(exchange.request)
        WebSocketExchange(self, exchange).serve()


Route = Callable[[Backend, Exchange], None]
ROUTES: dict[tuple[str, str, str], Route] = {
    ("POST", f"{BASE}/responses", ""): Backend.responses,
    ("GET", f"{BASE}/responses", "websocket"): Backend.websocket,
    ("GET", f"{BASE}/models", ""): Backend.models,
    ("GET", "/backend-api/wham/accounts/check", ""): Backend.accounts,
    ("GET", "/backend-api/wham/usage", ""): Backend.usage,
    ("POST", "/oauth/token", ""): Backend.token,
    ("POST", "/api/accounts/deviceauth/usercode", ""): Backend.usercode,
    ("POST", "/api/accounts/deviceauth/token", ""): Backend.device_token,
}


def send_refusal(exchange: Exchange, refusal: Refused) -> None:
    """Answer with a refusal: a page for people, or JSON."""
    if isinstance(refusal.body, str):
        cloudflare()(exchange)
        return
    exchange.json(refusal.status, refusal.body, [("cf-ray", "9a1b2c3d4e5f-FRA")])


def echo(body: Event) -> str:
    """Return the last text of the input, so that a test can tell answers apart."""
    last = body["input"][-1] if body["input"] else {}
    content = last.get("content", last.get("output"))
    if isinstance(content, list) and content and isinstance(content[-1], dict):
        content = content[-1].get("text")
    return content if isinstance(content, str) and content else "hello"


# == 14 WebSocket server ======================================================
# Text frames with `response.create` in, one event a text frame out; `previous_response_id` lives as long as
# the connection.


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
        self.known: set[str] = set()  # the response ids of this connection

    def send_frame(self, frame: Frame) -> None:
        """Send one frame as it is."""
        self.exchange.send(frame_bytes(frame))

    def event(self, event: Event) -> None:
        """Send one event as a text frame, and remember the response that it names."""
        response = event.get("response")
        if isinstance(response, dict) and isinstance(response.get("id"), str):
            self.known.add(response["id"])
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
            if frame.final:
                return decode_text(b"".join(parts))

    def answer(self, text: str) -> None:
        """Answer one message by its script, or as the backend does."""
        try:
            body = parse_json(text.encode("utf-8"))
            reply = self.backend.next_frame_reply(body)
            check_create(self, body)
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
    """Answer a `response.create`: echo its last text, or nothing for a prewarm."""
    if body.get("generate") is False:
        ws.events(*items_turn(model=body["model"]))
        return
    ws.events(*text_turn(echo(body), model=body["model"]))


# == 15 proxy =================================================================
# What HTTPS_PROXY names: it takes CONNECT and copies bytes, so a test sees that the bridge went through it.


class ConnectProxy(Listener):
    """Tunnel `CONNECT localhost:port`; `requests` holds what was asked for."""

    def __init__(self) -> None:
        super().__init__(tls=False)
        self.url = f"http://127.0.0.1:{self.address[1]}"

    def __enter__(self) -> ConnectProxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def default(self, exchange: Exchange) -> None:
        """Open the tunnel and copy until both sides are done."""
        host, _, port = exchange.request.target.rpartition(":")
        if exchange.request.method != "CONNECT" or host not in ("localhost", "127.0.0.1"):
            exchange.json(405, {"detail": "only CONNECT to loopback"})
            return
        with socket.create_connection(("127.0.0.1", int(port)), GRACE) as far:
            far.settimeout(None)
            exchange.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            far.sendall(exchange.reader.buffer)
            exchange.reader.buffer.clear()
            back = threading.Thread(target=copy_bytes, args=(far, exchange.sock), daemon=True)
            back.start()
            copy_bytes(exchange.sock, far)
            back.join()


def copy_bytes(source: socket.socket, target: socket.socket) -> None:
    """Copy until `source` ends, and hand the end on."""
    with contextlib.suppress(OSError):
        for received in iter(lambda: source.recv(RECEIVE), b""):
            target.sendall(received)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


# == 16 auth.json =============================================================


def auth_json(backend: SignIn, **overrides: Any) -> Event:
    """Return the sign-in file that Codex writes, with keys that the bridge does not know.

    An override replaces a key; the one of `tokens` is merged into it.
    """
    tokens = {
        **backend.tokens, "account_id": backend.account_id, "oauth_provenance": {"flow": "browser"},
        "login_owner_id": "owner-wire", **overrides.pop("tokens", {}),
    }
    return {
        "auth_mode": "chatgpt", "OPENAI_API_KEY": None, "tokens": tokens,
        "last_refresh": "2026-11-22T05:38:54.757848000Z", "agent_identity": {"kept": True}, **overrides,
    }


def write_auth(path: str | os.PathLike[str], backend: SignIn, **overrides: Any) -> None:
    """Write `auth_json` to `path`, mode 0600, in one step as Codex does."""
    temporary = f"{os.fspath(path)}.{next(COUNTER)}.tmp"
    number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(number, "wb") as file:
        file.write(json.dumps(auth_json(backend, **overrides), indent=2).encode())
    os.replace(temporary, path)


# == 17 clients ===============================================================
# Raw clients: they send bytes as given and parse replies strictly.


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
        self.reader = Reader(self.sock)
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
