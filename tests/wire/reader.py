"""A buffered reader over a socket that never reads past what it is asked to understand.

Two ways to end a connection stand beside it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import time

Address = tuple[str, int]
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
