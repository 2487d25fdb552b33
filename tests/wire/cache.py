"""The prompt cache, by the rules that decide what a plan lasts (WIRE 4, "What the backend's cache wants").

A request finds the beginning of an earlier one only where its `prompt_cache_key`, `session-id`, `thread-id`
and `x-client-request-id` all carry one value, and the earlier request carried the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from .events import USAGE, Event, Item
from .http1 import Request, dump

CACHE_HEADERS = ("session-id", "thread-id", "x-client-request-id")
UUID7 = re.compile(r"([0-9a-f]{8})-([0-9a-f]{4})-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\Z")
EARLIEST = 1_577_836_800  # 2020-01-01, in seconds: before it no client has made a UUIDv7
LATEST = 86_400  # seconds that a client's clock may be ahead
CHARACTERS = 4  # a token, about
KEPT = 64  # charges that a test can look at
ORDER = ("tools", "instructions", "")  # of a prompt's pieces, by their field; an item's field is ""


def uuid7_seconds(text: object) -> float | None:
    """Return the time in a UUIDv7, None for any other text."""
    match = UUID7.match(text) if isinstance(text, str) else None
    return int(match[1] + match[2], 16) / 1000 if match else None


def has_real_time(text: object) -> bool:
    """Tell whether a key is a UUIDv7 of a time at which it can have been made."""
    seconds = uuid7_seconds(text)
    return seconds is not None and EARLIEST <= seconds <= time.time() + LATEST


def names_of(request: Request, body: Event) -> tuple[object, ...]:
    """Return what a request says its conversation is: the key, then the three headers."""
    return (body.get("prompt_cache_key"), *(request.header(name) for name in CACHE_HEADERS))


class Piece(NamedTuple):
    """Stand for a part of a prompt; the text itself would be held for as long as the stand-in lives."""

    digest: bytes
    size: int
    field: str = ""  # of the body; an item of the input has none


def _piece(value: object, field: str = "") -> Piece:
    text = dump(value)
    return Piece(hashlib.sha256(text).digest(), len(text), field)


def _tokens(pieces: Sequence[Piece]) -> int:
    return sum(piece.size for piece in pieces) // CHARACTERS


def prompt_of(body: Event, before: Sequence[Piece] = ()) -> list[Piece]:
    """Return a prompt in the pieces that can be cached; `before` are those of its chain.

    Items add up along a chain. Tools and instructions do not: those of a frame take the place of the chain's,
    so that a frame which repeats them costs no more. In a recording of the real backend of September 2026 a
    frame with `previous_response_id` repeats both, and its `usage` counts both once.
    """
    given: list[Item] = [
        {name: item[name] for name in sorted(item) if name not in ("id", "status")} for item in body["input"]
    ]
    opening = [_piece([body[name]], name) for name in ORDER if body.get(name)]
    kept = [piece for piece in before if piece.field not in body]
    return sorted([*opening, *kept, *map(_piece, given)], key=lambda piece: ORDER.index(piece.field))


@dataclasses.dataclass(frozen=True)
class Charge:
    """Hold what one request is billed, and under which key."""

    key: str | None
    prompt: list[Piece]
    cached: int

    @property
    def usage(self) -> Event:
        """Return the `usage` of its answer."""
        total, details = _tokens(self.prompt), {"cached_tokens": self.cached}
        whole = total + USAGE["output_tokens"]
        return {**USAGE, "input_tokens": total, "input_tokens_details": details, "total_tokens": whole}

    def sign(self, events: Sequence[Event]) -> list[Event]:
        """Return the events of its answer with the key that was used, and what was billed."""
        signed = []
        for event in events:
            response = event.get("response")
            if isinstance(response, dict):
                usage = self.usage if response.get("usage") else None
                response = {**response, "prompt_cache_key": self.key, "usage": usage}
            signed.append({**event, "response": response} if isinstance(response, dict) else event)
        return signed


class PromptCache:
    """Remember the prompts of each conversation; any thread may ask."""

    def __init__(self) -> None:
        self.replaces_keys = False  # a key that is no UUIDv7 of a real time gives way to the server's
        self.charges: deque[Charge] = deque(maxlen=KEPT)
        self._lock = threading.Lock()
        self._prompts: dict[tuple[str, str], list[list[Piece]]] = {}

    def charge(self, request: Request, body: Event, before: Sequence[Piece] = ()) -> Charge:
        """Return what a request costs, and remember its prompt."""
        names, prompt = names_of(request, body), prompt_of(body, before)
        key = names[0] if isinstance(names[0], str) else None
        own = (request.header("originator") or "").startswith("codex")
        if self.replaces_keys and not own and not has_real_time(key):
            key = str(uuid.uuid4())  # nobody knows it, so nothing is found under it
        cached = 0
        with self._lock:
            if key is not None and set(names) == {key}:
                known = self._prompts.setdefault((key, body["model"]), [])
                cached = max((_tokens(_common(prompt, each)) for each in known), default=0)
                if prompt not in known:
                    known.append(prompt)
            charge = Charge(key, prompt, cached)
            self.charges.append(charge)
        return charge


def _common(one: list[Piece], other: list[Piece]) -> list[Piece]:
    alike = [pair[0] == pair[1] for pair in zip(one, other)]
    return one[: alike.index(False) if False in alike else len(alike)]
