"""What WIRE says the backend refuses of an item of the input, a function each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .events import Item
from .wish import Refused, Wish, detail, fault

ID_PREFIXES = {
    "message": "msg_", "reasoning": "rs_", "function_call": "fc_", "function_call_output": "fco_",
    "custom_tool_call": "ctc_", "additional_tools": "at_", "compaction": "cmp_",
}
MAX_ID = 64  # characters of an item's id, and of a call_id
COMMON_FIELDS = ("type", "id", "internal_chat_message_metadata_passthrough")  # the last is Codex's own
ITEM_FIELDS = {  # of the types that clients write themselves; an item of another type is not looked into
    "message": ("role", "status", "content", "phase"),
    "reasoning": ("summary", "content", "encrypted_content"),
    "function_call": ("status", "call_id", "name", "namespace", "arguments"),
    "function_call_output": ("status", "call_id", "output"),
    "custom_tool_call": ("status", "call_id", "name", "namespace", "input"),
    "custom_tool_call_output": ("status", "call_id", "name", "output"),
    "additional_tools": ("role", "tools"),
    "compaction": ("encrypted_content",),
}
PART_FIELDS = {
    "input_text": ("text",),
    "input_image": ("image_url", "file_id", "detail"),
    "input_file": ("file_id", "file_data", "file_url", "filename"),
    "output_text": ("text", "annotations", "logprobs"),
    "refusal": ("refusal",),
    "encrypted_content": ("encrypted_content",),  # of a Codex's agents among each other
}
PARTS_OF = {"message": "content", "function_call_output": "output", "custom_tool_call_output": "output"}


def unknown(where: str) -> Refused:
    """Return the refusal of a field that the backend does not know, by its path."""
    return fault(400, f"Unknown parameter: '{where}'.", "unknown_parameter", where)


def missing(where: str) -> Refused:
    """Return the refusal of a field that is not there, by its path."""
    return fault(400, f"Missing required parameter: '{where}'.", "missing_required_parameter", where)


def too_long(where: str, text: str, most: int) -> Refused:
    """Return the refusal of a text that is too long."""
    message = (
        f"Invalid '{where}': string too long. Expected a string with maximum length {most}, "
        f"but got a string with length {len(text)} instead."
    )
    return fault(400, message, "string_above_max_length", where)


def refuse_items(wish: Wish) -> None:
    """Refuse items without a type, with the role system, or with an id that is not theirs."""
    for index, item in wish.items:
        where = f"input[{index}]"
        if not isinstance(item, dict):
            raise fault(400, f"Invalid type for '{where}': expected an object.", "invalid_type", where)
        if item.get("role") == "system":
            raise detail(400, "System messages are not allowed")
        if not isinstance(item.get("type"), str):
            raise missing(f"{where}.type")
        refuse_id(item, where)


def refuse_id(item: Item, where: str) -> None:
    """Refuse an id that is too long or begins with the wrong prefix."""
    item_id = item.get("id")
    if item_id is None or item["type"] == "item_reference":
        return
    if not isinstance(item_id, str):
        raise fault(400, f"Invalid type for '{where}.id': expected a string.", "invalid_type", f"{where}.id")
    if len(item_id) > MAX_ID:
        raise too_long(f"{where}.id", item_id, MAX_ID)
    prefix = ID_PREFIXES.get(item["type"], "")
    if not item_id.startswith(prefix) or not item_id:
        message = (
            f"Invalid '{where}.id': '{item_id}'. Expected an ID that begins with '{prefix.rstrip('_')}'."
        )
        raise fault(400, message, "invalid_value", f"{where}.id")


def refuse_item_fields(wish: Wish) -> None:
    """Refuse a field that an item of its type does not have."""
    for index, item in wish.items:
        known = ITEM_FIELDS.get(item["type"])
        for name in item:
            if known is not None and name not in (*COMMON_FIELDS, *known):
                raise unknown(f"input[{index}].{name}")


def parts(wish: Wish) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the parts of messages and of tool outputs, with their places."""
    for index, item in wish.items:
        field = PARTS_OF.get(item["type"], "")
        content = item.get(field)
        for at, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict):
                yield f"input[{index}].{field}[{at}]", part


def refuse_parts(wish: Wish) -> None:
    """Refuse a part of an unknown type, an unknown field of one, and an image's `detail` in the lite form."""
    for where, part in parts(wish):
        known = PART_FIELDS.get(str(part.get("type")))
        if known is None:
            listed = ", ".join(map(repr, PART_FIELDS))
            message = f"Invalid value: '{part.get('type')}'. Supported values are: {listed}."
            raise fault(400, message, "invalid_value", f"{where}.type")
        for name in part:
            if name not in ("type", *known) or (name == "detail" and wish.lite_form):
                raise unknown(f"{where}.{name}")


def refuse_reasoning(wish: Wish) -> None:
    """Refuse a reasoning item without `summary`, and one whose `content` holds anything."""
    for index, item in wish.items:
        where = f"input[{index}]"
        if item["type"] != "reasoning":
            continue
        if "summary" not in item:
            raise missing(f"{where}.summary")
        if not isinstance(item["summary"], list):
            message = f"Invalid type for '{where}.summary': expected an array of objects."
            raise fault(400, message, "invalid_type", f"{where}.summary")
        content = item.get("content") or []
        if content:
            message = (
                f"Invalid '{where}.content': array too long. Expected an array with maximum length 0, "
                f"but got an array with length {len(content)} instead."
            )
            raise fault(400, message, "array_above_max_length", f"{where}.content")


def refuse_call_ids(wish: Wish) -> None:
    """Refuse a call_id that is too long."""
    for index, item in wish.items:
        call_id = item.get("call_id")
        if isinstance(call_id, str) and len(call_id) > MAX_ID:
            raise too_long(f"input[{index}].call_id", call_id, MAX_ID)


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
