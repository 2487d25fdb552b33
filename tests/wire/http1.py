"""The one strict parser of HTTP/1.1 heads and bodies, for requests and for replies."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from .reader import ProtocolError, Reader
from .zstd import zstd_decompress

Headers = Sequence[tuple[str, str]]

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
