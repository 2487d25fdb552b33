"""Factories of replies for `Backend.on` and `Backend.always`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

from .events import Event
from .exchange import SSE_HEADERS, Exchange, Reply
from .http1 import Headers

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


def usage_limit(resets_at: int = 1795346042) -> Reply:
    """Answer that the plan's limit is reached."""
    error = {
        "type": "usage_limit_reached", "message": "The usage limit has been reached", "plan_type": "pro",
        "resets_at": resets_at, "resets_in_seconds": 1800,
    }
    return reply_json(429, {"error": error})
