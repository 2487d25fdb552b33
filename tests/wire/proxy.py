"""What HTTPS_PROXY names: it takes CONNECT and copies bytes, so a test sees that the bridge used it."""

from __future__ import annotations

import contextlib
import socket
import threading

from .exchange import Exchange
from .listener import GRACE, Listener
from .reader import RECEIVE


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
