"""A server on loopback: accepts, one thread a connection; remembers requests; holds the scripts.

`Listener.changed` guards all shared state.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import socket
import threading
import time

from .exchange import Exchange, Reply
from .http1 import Request, head_bytes, read_request
from .reader import RECEIVE, Address, PeerLeft, ProtocolError, Reader, half_close
from .tls import certificates, server_context

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
