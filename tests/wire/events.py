"""Builders of what the backend streams.

The field names are the Responses API's; `output` of the terminal event is empty by default, as the real
backend sends it today.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

from .http1 import dump

Event = dict[str, Any]
Item = dict[str, Any]

COUNTER = itertools.count(1)
USAGE: dict[str, Any] = {
    "input_tokens": 32,
    "input_tokens_details": {"cached_tokens": 16},
    "output_tokens": 9,
    "output_tokens_details": {"reasoning_tokens": 4},
    "total_tokens": 41,
}


def fresh(prefix: str) -> str:
    """Return an id that no other has, such as `msg_…`."""
    return f"{prefix}_{next(COUNTER):032x}"


def keepalive(sequence_number: int = 0) -> Event:
    """Return what the backend sends of itself while a turn is parked, about every 30 s."""
    return {"type": "keepalive", "sequence_number": sequence_number}


def rate_limits_frame(primary: Event | None = None, secondary: Event | None = None) -> Event:
    """Return the first side frame of a turn on a WebSocket: the plan's limits."""
    first = {"used_percent": 8, "window_minutes": 10080, "reset_after_seconds": 379518}
    limits = {
        "allowed": True, "limit_reached": False, "primary": primary or {**first, "reset_at": 1795346042},
        "secondary": secondary,
    }
    return {
        "type": "codex.rate_limits", "plan_type": "pro", "rate_limits": limits,
        "code_review_rate_limits": None, "additional_rate_limits": None,
        "credits": {"has_credits": False, "unlimited": False, "balance": "0"}, "promo": None,
    }


def metadata_frame(etag: str, **headers: str) -> Event:
    """Return the second side frame of a turn on a WebSocket: headers that HTTP has in its head."""
    return {
        "type": "codex.response.metadata",
        "headers": {"x-models-etag": etag, "x-codex-turn-state": "ts-sticky-1", **headers},
    }


def timing_frame(response_id: str = "resp_1") -> Event:
    """Return the side frame before the end of a turn on a WebSocket."""
    metrics = {"timing_scope": "logical_turn", "response_id": response_id, "total_turn_time_s": 1.27}
    return {"type": "responsesapi.websocket_timing", "timing_metrics": metrics}


def numbered(*events: Event) -> list[Event]:
    """Return copies of `events` with running `sequence_number`s."""
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def response_object(response_id: str, status: str, model: str = "gpt-5.5", **fields: Any) -> Event:
    """Return the `response` of a lifecycle event."""
    return {
        "id": response_id, "object": "response", "created_at": 1795328042, "status": status,
        "background": False, "error": None, "incomplete_details": None, "instructions": None,
        "max_output_tokens": None, "model": model, "output": [], "parallel_tool_calls": True,
        "previous_response_id": None, "reasoning": {"effort": "medium"}, "service_tier": "default",
        "store": False, "temperature": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": "auto",
        "tools": [], "top_p": 1.0, "truncation": "disabled", "usage": None, "user": None,
        "metadata": {}, **fields,
    }


def created(response_id: str | None = None, model: str = "gpt-5.5") -> Event:
    """Return the event that opens every stream."""
    response = response_object(response_id or fresh("resp"), "in_progress", model)
    return {"type": "response.created", "sequence_number": 0, "response": response}


def completed(response_id: str | None = None, sequence_number: int = 1, **fields: Any) -> Event:
    """Return the terminal event of a turn that went well."""
    response = response_object(response_id or fresh("resp"), "completed", usage=USAGE, **fields)
    return {"type": "response.completed", "sequence_number": sequence_number, "response": response}


def failed(code: str, message: str, sequence_number: int = 1, response_id: str | None = None) -> Event:
    """Return the terminal event of a turn that failed inside a 200."""
    error = {"code": code, "message": message}
    response = response_object(response_id or fresh("resp"), "failed", error=error)
    return {"type": "response.failed", "sequence_number": sequence_number, "response": response}


def incomplete(reason: str = "max_output_tokens", sequence_number: int = 1) -> Event:
    """Return the terminal event of a turn that was cut short on purpose."""
    details = {"reason": reason}
    response = response_object(fresh("resp"), "incomplete", incomplete_details=details, usage=USAGE)
    return {"type": "response.incomplete", "sequence_number": sequence_number, "response": response}


def message_item(text: str, item_id: str | None = None) -> Item:
    """Return an assistant's message."""
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {
        "type": "message", "id": item_id or fresh("msg"), "status": "completed", "role": "assistant",
        "content": content,
    }


def reasoning_item(
    item_id: str | None = None, encrypted_content: str | None = "gAAAAAB_enc", summary: str = "think"
) -> Item:
    """Return a reasoning item; without its ciphertext it points at nothing under `store: false`."""
    item: Item = {"type": "reasoning", "id": item_id or fresh("rs")}
    item["summary"] = [{"type": "summary_text", "text": summary}] if summary else []
    if encrypted_content is not None:
        item["encrypted_content"] = encrypted_content
    return item


def call_item(name: str, arguments: str, call_id: str = "call_1") -> Item:
    """Return a function call; `arguments` is JSON text."""
    return {
        "type": "function_call", "id": fresh("fc"), "status": "completed", "name": name,
        "arguments": arguments, "call_id": call_id,
    }


def custom_call_item(name: str, text: str, call_id: str = "call_1") -> Item:
    """Return a call of a custom (free-form) tool."""
    return {
        "type": "custom_tool_call", "id": fresh("ctc"), "status": "completed", "name": name, "input": text,
        "call_id": call_id,
    }


def search_item(query: str) -> Item:
    """Return a web search that the backend ran itself."""
    action = {"type": "search", "query": query}
    return {"type": "web_search_call", "id": fresh("ws"), "status": "completed", "action": action}


def image_item(result: str = "", **fields: Any) -> Item:
    """Return an image that the backend made itself; `result` is base64."""
    return {
        "type": "image_generation_call", "id": fresh("ig"), "status": "completed",
        "output_format": "png", "revised_prompt": "a dot", "size": "1024x1024", "result": result or PIXEL,
        **fields,
    }


def answer_items(body: Event) -> list[Item]:
    """Return what the model answers: the last text again, and what was asked of the tools at the top.

    `search …` makes it search and `draw …` draw, where that tool is offered there; a forced function is
    called, and for `required` the first one. In the lite form nothing is at the top: no hosted tool runs.
    """
    text, tools = echo(body), [tool for tool in body.get("tools") or () if isinstance(tool, dict)]
    offered, choice = [tool.get("type") for tool in tools], body.get("tool_choice")
    wanted = choice.get("name") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if choice == "required":
        wanted = next((tool.get("name") for tool in tools if tool.get("type") == "function"), None)
    if isinstance(wanted, str):
        return [call_item(wanted, "{}")]
    if text.startswith("search ") and "web_search" in offered:
        return [search_item(text), message_item(text)]
    if text.startswith("draw ") and "image_generation" in offered:
        return [image_item()]
    return [message_item(text)]


def pieces(text: str) -> list[str]:
    """Cut a text into deltas, as tokens come: a word and the space before it."""
    return re.findall(r"\s*\S+|\s+\Z", text) or [""]


def _message_events(item: Item, place: Event) -> list[Event]:
    place = {**place, "content_index": 0}
    part = item["content"][0]
    text = part["text"]
    deltas = [
        {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
        for piece in pieces(text)
    ]
    return [
        {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
        *deltas,
        {"type": "response.output_text.done", **place, "text": text, "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part},
    ]


def _reasoning_events(item: Item, place: Event) -> list[Event]:
    events: list[Event] = []
    for index, part in enumerate(item["summary"]):
        spot = {**place, "summary_index": index}
        kind = "response.reasoning_summary_text"
        events.append({"type": "response.reasoning_summary_part.added", **spot, "part": {**part, "text": ""}})
        events.extend({"type": f"{kind}.delta", **spot, "delta": piece} for piece in pieces(part["text"]))
        events.append({"type": f"{kind}.done", **spot, "text": part["text"]})
        events.append({"type": "response.reasoning_summary_part.done", **spot, "part": part})
    return events


def _call_events(item: Item, place: Event) -> list[Event]:
    kind = "response.function_call_arguments"
    deltas = [{"type": f"{kind}.delta", **place, "delta": piece} for piece in pieces(item["arguments"])]
    return [*deltas, {"type": f"{kind}.done", **place, "arguments": item["arguments"]}]


def _custom_call_events(item: Item, place: Event) -> list[Event]:
    kind = "response.custom_tool_call_input"
    deltas = [{"type": f"{kind}.delta", **place, "delta": piece} for piece in pieces(item["input"])]
    return [*deltas, {"type": f"{kind}.done", **place, "input": item["input"]}]


INNER_EVENTS: dict[str, Callable[[Item, Event], list[Event]]] = {
    "message": _message_events,
    "reasoning": _reasoning_events,
    "function_call": _call_events,
    "custom_tool_call": _custom_call_events,
}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
UNFINISHED: dict[str, dict[str, object]] = {
    "message": {"content": [], "status": "in_progress"},
    "reasoning": {"summary": []},
    "function_call": {"arguments": "", "status": "in_progress"},
    "custom_tool_call": {"input": "", "status": "in_progress"},
}


def items_turn(
    *items: Item, empty_output: bool = True, response_id: str | None = None, model: str = "gpt-5.5"
) -> list[Event]:
    """Return every event of a turn whose output is `items`."""
    response_id = response_id or fresh("resp")
    opening = response_object(response_id, "in_progress", model)
    events: list[Event] = [
        {"type": "response.created", "response": opening},
        {"type": "response.in_progress", "response": opening},
    ]
    for index, item in enumerate(items):
        unfinished = {**item, **UNFINISHED.get(item["type"], {})}
        events.append({"type": "response.output_item.added", "output_index": index, "item": unfinished})
        if item["type"] in INNER_EVENTS:
            place = {"item_id": item.get("id"), "output_index": index}
            events.extend(INNER_EVENTS[item["type"]](item, place))
        events.append({"type": "response.output_item.done", "output_index": index, "item": item})
    output = [] if empty_output else list(items)
    events.append(completed(response_id, model=model, output=output))
    return numbered(*events)


def text_turn(
    text: str = "hello",
    reasoning: bool = False,
    empty_output: bool = True,
    response_id: str | None = None,
    model: str = "gpt-5.5",
) -> list[Event]:
    """Return the events of a turn that answers with a text, after a reasoning item if so wished."""
    items = [reasoning_item()] if reasoning else []
    return items_turn(
        *items, message_item(text), empty_output=empty_output, response_id=response_id, model=model
    )


def call_turn(
    name: str, arguments: str | Event, call_id: str = "call_1", empty_output: bool = True
) -> list[Event]:
    """Return the events of a turn that calls a function; `arguments` is JSON text or an object."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return items_turn(call_item(name, text, call_id), empty_output=empty_output)


def custom_call_turn(name: str, text: str, call_id: str = "call_1", empty_output: bool = True) -> list[Event]:
    """Return the events of a turn that calls a custom tool."""
    return items_turn(custom_call_item(name, text, call_id), empty_output=empty_output)


def sse_bytes(event: Event | bytes, name: bool = True) -> bytes:
    """Return one event as the backend writes it; bytes stay as they are."""
    if isinstance(event, bytes):
        return event
    line = f"event: {event['type']}\n".encode() if name else b""
    return line + b"data: " + dump(event) + b"\n\n"


def echo(body: Event) -> str:
    """Return the last text of the input, so that a test can tell answers apart."""
    last = body["input"][-1] if body["input"] else {}
    content = last.get("content", last.get("output"))
    if isinstance(content, list) and content and isinstance(content[-1], dict):
        content = content[-1].get("text")
    return content if isinstance(content, str) and content else "hello"
