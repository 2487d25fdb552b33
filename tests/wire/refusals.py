"""Everything that WIRE says the backend refuses, a function each; the first that raises answers.

`Refused`, which they raise, and the strict JSON parser are here too.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .events import Event, Item
from .http1 import Request, find_all
from .replies import CLOUDFLARE_PAGE

if TYPE_CHECKING:
    from .backend import Backend

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
