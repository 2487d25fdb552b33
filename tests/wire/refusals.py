"""What WIRE says the backend refuses of heads, fields and forms, a function each.

The first of `REFUSALS` that raises answers; those of single items and of tools have modules of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from .http1 import Request, find_all
from .items import (
    refuse_call_ids,
    refuse_continuity,
    refuse_item_fields,
    refuse_items,
    refuse_parts,
    refuse_reasoning,
    too_long,
)
from .replies import CLOUDFLARE_PAGE
from .tools import refuse_schemas, refuse_tool_choice, refuse_tool_types
from .wish import LITE_HEADER, Refused, Wish, detail, fault

if TYPE_CHECKING:
    from .backend import Backend

VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+(?:-[0-9A-Za-z.-]+)?\Z", re.ASCII)
LIBRARY_AGENT = re.compile(
    r"(?:python|aiohttp|httpx|curl|wget|okhttp|go-http-client|(?:async)?openai|node|axios|undici|java)\b",
    re.IGNORECASE,
)
WEBSOCKET_BETA = "responses_websockets=2026-02-06"
FORBIDDEN = (
    "cookie", "x-api-key", "forwarded", "x-real-ip", "via", "expect", "te", "trailer", "keep-alive",
    "proxy-authorization", "proxy-connection", "proxy-authenticate", "x-openai-actor-authorization",
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
MAX_KEY = 64  # characters of prompt_cache_key
PLAIN_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
TIERS = ("priority", "default")


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
    if name.startswith("x-openai-internal-") and name != LITE_HEADER:
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


def refuse_long_key(wish: Wish) -> None:
    """Refuse a prompt_cache_key that is too long."""
    key = wish.body.get("prompt_cache_key")
    if isinstance(key, str) and len(key) > MAX_KEY:
        raise too_long("prompt_cache_key", key, MAX_KEY)


def refuse_effort(wish: Wish) -> None:
    """Refuse an effort that the model does not have; `ultra` is a word of Codex, not of the backend.

    `none` is taken by every model, listed or not.
    """
    effort = (wish.body.get("reasoning") or {}).get("effort")
    levels = wish.entry.get("supported_reasoning_levels")
    known = [level["effort"] for level in levels] if levels else list(PLAIN_EFFORTS)
    known = [each for each in known if each != "ultra"]
    if effort is not None and effort not in (*known, "none"):
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
    model, flagged = wish.body["model"], wish.lite_form
    if wish.lite and wish.backend.enforce_lite:
        if not flagged and model not in wish.backend.takes_plain:
            raise detail(404, f"Model not found {model}")
        why = lite_fault(wish) if flagged else None
        if why is not None:
            wish.backend.note(f"{model}: not in the lite form: {why}")
            raise detail(400, f"Model not found {model}")
    if wish.lite and (flagged or not wish.backend.enforce_lite):
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
    refuse_long_key,
    refuse_session,
    refuse_items,
    refuse_item_fields,
    refuse_parts,
    refuse_reasoning,
    refuse_call_ids,
    refuse_form,
    refuse_tool_types,
    refuse_schemas,
    refuse_tool_choice,
    refuse_effort,
    refuse_tier,
    refuse_continuity,
)
