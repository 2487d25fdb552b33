"""The search for tokens: each that the stand-in issued, in all that a client, the log or a terminal gets."""
from __future__ import annotations

from .reader import Reader

ISSUED: dict[bytes, str] = {}  # token -> what it is; of the running test
LEAKS: list[str] = []  # what was found where; the fixture `trust` fails the test
LONGEST = 4096  # bytes of a token, at most: one can lie across two reads


def issue(name: str, token: str) -> None:
    """Remember a token that was issued."""
    if len(token) >= 8:
        ISSUED[token.encode()] = name


def search(text: bytes, where: str) -> None:
    """Note each token in a text that somebody outside the kernel was given."""
    LEAKS.extend(f"{name} in {where}" for token, name in ISSUED.items() if token in text)


class ClientReader(Reader):
    """A client's reader: what it receives is searched, across the borders of its reads."""

    _tail = b""

    def fill(self) -> bool:
        """Receive once; return False at the end of the stream."""
        before = len(self.buffer)
        more = super().fill()
        received = self._tail + bytes(self.buffer[before:])
        search(received, "what a client received")
        self._tail = received[-LONGEST:]
        return more
