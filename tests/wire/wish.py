"""What a refusal is, the strict JSON parser, and what a rule is given to judge."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .events import Event, Item
from .http1 import Request

if TYPE_CHECKING:
    from .backend import Backend

LITE_HEADER = "x-openai-internal-codex-responses-lite"
LITE_METADATA = "ws_request_header_x_openai_internal_codex_responses_lite"
MAX_INTEGER = 4000  # digits that int() takes on every Python


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
    def lite_form(self) -> bool:
        """Tell whether the request says that it is in the lite form."""
        if self.websocket:
            return (self.body.get("client_metadata") or {}).get(LITE_METADATA) == "true"
        return self.request.header(LITE_HEADER) is not None

    @property
    def items(self) -> Iterator[tuple[int, Item]]:
        """Return the items of the input with their places."""
        return enumerate(self.body["input"])
