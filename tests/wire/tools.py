"""What WIRE says the backend refuses of tools and of the choice among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .wish import Refused, Wish, detail, fault

Tool = dict[str, Any]


def tools_in(given: object, where: str) -> Iterator[tuple[str, Tool]]:
    """Return tools with their places, those inside a namespace too."""
    for index, tool in enumerate(given if isinstance(given, list) else ()):
        if isinstance(tool, dict):
            yield f"{where}[{index}]", tool
            if tool.get("type") == "namespace":
                yield from tools_in(tool.get("tools"), f"{where}[{index}].tools")


def all_tools(wish: Wish) -> Iterator[tuple[str, Tool]]:
    """Return the tools of a request, in whichever form they came."""
    yield from tools_in(wish.body.get("tools"), "tools")
    for index, item in wish.items:
        if item["type"] == "additional_tools":
            yield from tools_in(item.get("tools"), f"input[{index}].tools")


def refuse_tool_types(wish: Wish) -> None:
    """Refuse a hosted tool by its former name; in the lite form hosted tools lie inert and are not seen."""
    for _, tool in tools_in(wish.body.get("tools"), "tools"):
        kind = tool.get("type")
        if isinstance(kind, str) and kind.startswith("web_search_preview"):
            raise detail(400, f"Unsupported tool type: {kind}")


def refuse_schemas(wish: Wish) -> None:
    """Refuse a function whose parameters are an object without `properties`."""
    for where, tool in all_tools(wish):
        schema = tool.get("parameters")
        if tool.get("type") != "function" or not isinstance(schema, dict):
            continue
        if schema.get("type") == "object" and not isinstance(schema.get("properties"), dict):
            message = (
                f"Invalid schema for function '{tool.get('name')}': In context=(), object schema missing "
                "properties."
            )
            raise fault(400, message, "invalid_function_parameters", f"{where}.parameters")


def not_found(name: object) -> Refused:
    """Return the refusal of a choice that is among no tools."""
    return fault(400, f"Tool choice '{name}' not found in 'tools' parameter.", None, "tool_choice")


def refuse_tool_choice(wish: Wish) -> None:
    """Refuse a choice that is not among the functions and custom tools at the top.

    In the lite form none are there, so that only `auto` is taken; a hosted tool is never found.
    """
    choice = wish.body.get("tool_choice")
    if choice in (None, "auto"):
        return
    if wish.lite_form:
        raise not_found(choice.get("name") or choice.get("type") if isinstance(choice, dict) else choice)
    if choice in ("none", "required") or wish.body.get("previous_response_id") is not None:
        return
    if not isinstance(choice, dict):
        message = f"Invalid value: '{choice}'. Supported values are: 'none', 'auto', and 'required'."
        raise fault(400, message, "invalid_value", "tool_choice")
    offered = [(tool.get("type"), tool.get("name")) for _, tool in tools_in(wish.body.get("tools"), "tools")]
    wanted = choice.get("tools") if choice.get("type") == "allowed_tools" else [choice]
    for _, one in tools_in(wanted, "tool_choice"):
        if one.get("type") not in ("function", "custom") or (one["type"], one.get("name")) not in offered:
            raise not_found(one.get("name") or one.get("type"))
