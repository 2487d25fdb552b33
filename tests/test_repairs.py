"""Room repairs: a refusal that names a field of an item, or a tool that upstream does not know."""

from __future__ import annotations

import pytest
import wire
from conftest import RunningBridge
from help import (
    CHAT,
    CODEX,
    HI,
    LITE_MODEL,
    MODEL,
    RESPONSES,
    TOOL,
    USER,
    Object,
    ask,
    models,
    sent,
)

import qoo_bridge as q

# -- a refusal that names a field of an item ---------------------------------------

CALL = {"type": "function_call", "call_id": "call_1", "name": "run", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "x"}
CUSTOM_CALL = {"type": "custom_tool_call", "call_id": "call_2", "name": "patch", "input": "x"}
CUSTOM_OUTPUT = {"type": "custom_tool_call_output", "call_id": "call_2", "output": "x"}
SAYS = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hi"}]}
TEXT_PART = {"type": "input_text", "text": "hi", "cache_control": {"type": "ephemeral"}}
FOREIGN = {
    "message": [{**HI, "name": "ann"}, SAYS, {**HI, "name": "bo"}],
    "message-null": [{**HI, "prompt_cache_breakpoint": None}],
    "call": [HI, {**CALL, "index": 0}, OUTPUT, {**CALL, "index": 1}],
    "output": [HI, CALL, {**OUTPUT, "is_error": False}],
    "custom-call": [HI, {**CUSTOM_CALL, "odd": 1}, CUSTOM_OUTPUT],
    "custom-output": [HI, CUSTOM_CALL, {**CUSTOM_OUTPUT, "odd": {"a": 1}}],
    "part": [{**HI, "content": [TEXT_PART]}, SAYS, {**HI, "content": [TEXT_PART, TEXT_PART]}],
    "part-of-an-output": [HI, CALL, {**OUTPUT, "output": [TEXT_PART]}],
}
ITEMS_LEFT = {
    "message": [HI, SAYS, HI], "message-null": [HI], "call": [HI, CALL, OUTPUT, CALL],
    "output": [HI, CALL, OUTPUT], "custom-call": [HI, CUSTOM_CALL, CUSTOM_OUTPUT],
    "custom-output": [HI, CUSTOM_CALL, CUSTOM_OUTPUT],
    "part": [HI, SAYS, {**HI, "content": [*HI["content"], *HI["content"]]}],
    "part-of-an-output": [HI, CALL, {**OUTPUT, "output": HI["content"]}],
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("headers", [{}, CODEX], ids=["sdk", "codex"])
def test_a_field_of_an_item_that_is_refused_goes_from_all_items_of_its_type(
    bridge: RunningBridge, backend: wire.Backend, kind: str, headers: dict[str, str]
) -> None:
    reply = ask(bridge, {**MODEL, "input": FOREIGN[kind]}, headers)
    assert reply.status == 200, reply.body
    assert len(sent(backend)) == 2
    assert sent(backend)[1].json["input"] == ITEMS_LEFT[kind]
    assert "input" in (reply.header("x-qoo-bridge-repaired") or "")


def test_two_fields_that_are_refused_go_both(bridge: RunningBridge, backend: wire.Backend) -> None:
    items = [{**HI, "name": "ann"}, {**CALL, "index": 0}, OUTPUT]
    assert ask(bridge, {**MODEL, "input": items}).status == 200
    assert [request.json["input"] for request in sent(backend)][2:] == [[HI, CALL, OUTPUT]]


def test_an_items_field_that_was_refused_is_remembered_for_the_model(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    models(bridge)
    for model in ("gpt-5.5", "gpt-5.5", LITE_MODEL):
        reply = ask(bridge, {"model": model, "input": [{**HI, "name": "ann"}]})
        assert reply.status == 200, reply.body
    assert ["name" in request.json["input"][0] for request in sent(backend)] == [
        True, False, False, True, False]


DETAIL = {"type": "input_text", "text": "x", "detail": "low"}
PICTURE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "high"}
NAMED = {**PICTURE, "filename": "a.png"}
FILE = {"type": "input_file", "file_data": "data:text/plain;base64,AAAA", "filename": "a.txt"}
STAYS: dict[str, tuple[Object, str, Object]] = {  # what one client sends, what is refused, what another keeps
    "detail": (DETAIL, "detail", PICTURE), "filename": (NAMED, "filename", FILE),
}


@pytest.mark.parametrize(("odd", "field", "right"), STAYS.values(), ids=STAYS)
def test_what_one_kind_of_part_must_not_have_another_keeps(
    bridge: RunningBridge, backend: wire.Backend, odd: Object, field: str, right: Object
) -> None:
    backend.on("/responses", refusal(f"Unknown parameter: 'input[0].content[0].{field}'."))
    both = {**HI, "content": [odd, right]}
    assert ask(bridge, {**MODEL, "input": [both]}).status == 200
    assert ask(bridge, {**MODEL, "input": [{**HI, "content": [right, odd]}]}).status == 200
    less = {name: value for name, value in odd.items() if name != field}
    contents = [request.json["input"][0]["content"] for request in sent(backend)]
    assert contents == [[odd, right], [less, right], [right, less]]


@pytest.mark.parametrize("where", ["top", "item"])
def test_more_unknown_fields_than_repairs_heal_by_the_next_request(
    bridge: RunningBridge, backend: wire.Backend, where: str
) -> None:
    odd: Object = {f"odd{number}": 1 for number in range(q.MAX_REPAIRS + 1)}
    path = "" if where == "top" else "input[0]."
    body = {**MODEL, "input": [HI], **odd} if where == "top" else {**MODEL, "input": [{**HI, **odd}]}
    backend.on("/responses", *[refusal(f"Unknown parameter: '{path}{name}'.") for name in odd])
    assert ask(bridge, body).status == 400
    backend.on("/responses", refusal(f"Unknown parameter: '{path}{[*odd][-1]}'."))
    assert ask(bridge, body).status == 200
    assert len(sent(backend)) == q.MAX_REPAIRS + 3


def test_many_fields_of_items_do_not_stop_parameters_from_being_learned(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    for number in range(20):
        backend.on("/responses", refusal(f"Unknown parameter: 'input[0].odd{number}'."))
        assert ask(bridge, {**MODEL, "input": [{**HI, f"odd{number}": 1}]}).status == 200
    backend.on("/responses", refusal("Unknown parameter: 'other'."))
    assert ask(bridge, {**MODEL, "input": [HI], "other": 1}).status == 200
    assert ask(bridge, {**MODEL, "input": [{**HI, "odd3": 1, "odd19": 1}], "other": 1}).status in (200, 400)
    last = [request.json for request in sent(backend)][-1]
    assert ("other" in last, "odd3" in last["input"][0]) == (False, False)


def test_a_call_of_the_old_style_is_never_dropped(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", refusal("Unknown parameter: 'input[0].function_call'."))
    item = {"role": "assistant", "content": "", "function_call": {"name": "run", "arguments": "{}"}}
    assert ask(bridge, {**MODEL, "input": [item]}).status == 400
    assert len(sent(backend)) == 1


def test_a_form_that_upstream_does_not_accept_is_not_remembered(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    models(bridge)
    backend.takes_plain.add(LITE_MODEL)
    backend.on("/responses", refusal("Model not found gpt-6-sol"), refusal("no"),
               wire.turn(*wire.text_turn()))
    body: Object = {"model": LITE_MODEL, "input": [HI], "tool_choice": "required", "tools": [TOOL]}
    assert ask(bridge, body).status == 400
    assert ask(bridge, body).status == 200
    first, repaired, again = sent(backend)
    assert (again.json, again.header(q.LITE_HEADER)) == (first.json, first.header(q.LITE_HEADER))
    assert repaired.json != first.json


def test_a_field_of_a_tool_in_the_lite_form_goes_too(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", refusal("Unknown parameter: 'input[0].tools[0].odd'."))
    reply = ask(bridge, {"model": LITE_MODEL, "input": [HI], "tools": [{**TOOL, "odd": 1}]})
    assert reply.status == 200, reply.body
    assert [request.json["input"][0]["tools"][0] for request in sent(backend)] == [{**TOOL, "odd": 1}, TOOL]


@pytest.mark.parametrize("field", sorted(q.TOOL_MEANING))
def test_what_a_tool_in_the_lite_form_is_about_is_never_dropped(
    bridge: RunningBridge, backend: wire.Backend, field: str
) -> None:
    backend.on("/responses", refusal(f"Unknown parameter: 'input[0].tools[0].{field}'."))
    assert ask(bridge, {"model": LITE_MODEL, "input": [HI], "tools": [TOOL]}).status == 400
    assert len(sent(backend)) == 1


def test_what_is_known_to_be_lost_counts_as_no_repair(bridge: RunningBridge, backend: wire.Backend) -> None:
    body: Object = {"model": LITE_MODEL, "input": [HI], "tools": [TOOL], "tool_choice": "required"}
    assert ask(bridge, body).status == 200  # teaches that only lite is taken
    odd = {f"odd{number}": 1 for number in range(q.MAX_REPAIRS)}
    backend.on("/responses", *[refusal(f"Unknown parameter: '{name}'.") for name in odd])
    reply = ask(bridge, {**body, **odd})
    assert reply.status == 200, reply.body
    assert (reply.header("x-qoo-bridge-repaired") or "").count("=") == q.MAX_REPAIRS + 1


def refusal(message: str, code: str = "unknown_parameter") -> wire.Reply:
    """Answer with a refusal in the API's long form."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return wire.reply_json(400, {"error": error})


@pytest.mark.parametrize("text", [
    "Unknown parameter: 'input[0].role'.", "Unknown parameter: 'input[0].content'.",
    "Unknown parameter: 'input[0].type'.", "Unknown parameter: 'input[1].call_id'.",
    "Unknown parameter: 'input[1].arguments'.",
    "Unknown parameter: 'input[2].output'.", "Unknown parameter: 'input[0].content[0].text'.",
    "Unknown parameter: 'input[99].odd'.", "Unknown parameter: 'input[0].not_there'.",
])
def test_what_an_item_is_about_is_never_dropped(
    bridge: RunningBridge, backend: wire.Backend, text: str
) -> None:
    backend.on("/responses", refusal(text))
    reply = ask(bridge, {**MODEL, "input": [HI, CALL, OUTPUT]})
    assert (reply.status, reply.json["error"]["message"], len(sent(backend))) == (400, text, 1)


@pytest.mark.parametrize("item", [
    {"role": "assistant", "content": [], "tool_calls": [{"id": "call_1", "type": "function"}]},
    {"role": "user", "content": [], "tool_call_id": "call_1"},
], ids=["tool_calls", "tool_call_id"])
def test_a_chats_call_inside_an_input_is_refused_not_dropped(
    bridge: RunningBridge, backend: wire.Backend, item: Object
) -> None:
    reply = ask(bridge, {**MODEL, "input": [HI, item, HI]})
    assert (reply.status, len(sent(backend))) == (400, 1), sent(backend)[-1].json["input"]
    assert list(item)[-1] in reply.json["error"]["message"]


@pytest.mark.parametrize("field", ["name", "parameters", "type", "parameters.properties"])
def test_one_bad_tool_takes_nothing_from_the_tools_of_others(
    bridge: RunningBridge, backend: wire.Backend, field: str
) -> None:
    bad = refusal(f"Unknown parameter: 'tools[0].{field}'.")
    tool = {"type": "function", "name": "run", "strict": False,
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    backend.on("/responses", bad)
    assert ask(bridge, {**MODEL, "input": [HI], "tools": [tool]}).status == 400
    assert ask(bridge, {**MODEL, "input": [HI], "tools": [tool]}).status == 200
    assert sent(backend)[-1].json["tools"] == [tool]


def test_a_repair_is_named_in_a_header_that_can_be_sent(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    name = "t\u4e2d"
    backend.on("/responses", refusal(f"Unknown parameter: '{name}'."))
    reply = ask(bridge, {**MODEL, "input": [HI], name: 1})
    assert reply.status == 200, reply.body
    assert reply.header("x-qoo-bridge-repaired") == "drop-parameter=t?"
    assert q.header_text("a\r\nb: c\u4e2d" * 1000) == ("a??b: c?" * 1000)[:500]


def test_a_field_that_is_refused_again_is_the_clients(bridge: RunningBridge, backend: wire.Backend) -> None:
    text = "Unknown parameter: 'input[0].odd'."
    backend.on("/responses", refusal(text), refusal(text))
    assert ask(bridge, {**MODEL, "input": [{**HI, "odd": 1}]}).status == 400
    assert len(sent(backend)) == 2


MISSING, TOO_LONG = "Missing required parameter: 'input[1].notes'.", (
    "Invalid 'input[1].notes': array too long. Expected an array with maximum length 0, but got an array "
    "with length 1 instead."
)


@pytest.mark.parametrize(("text", "code", "given"), [
    (MISSING, "missing_required_parameter", {}),
    (TOO_LONG, "array_above_max_length", {"notes": ["x"]}),
])
def test_a_list_of_an_item_that_is_refused_is_emptied_in_all_of_its_type(
    bridge: RunningBridge, backend: wire.Backend, text: str, code: str, given: Object
) -> None:
    odd = {"type": "of_tomorrow", "label": "x", **given}
    backend.on("/responses", refusal(text, code))
    assert ask(bridge, {**MODEL, "input": [HI, odd, odd]}).status == 200
    emptied = {"type": "of_tomorrow", "label": "x", "notes": []}
    assert sent(backend)[1].json["input"] == [HI, emptied, emptied]
    assert ask(bridge, {**MODEL, "input": [HI, odd]}).status == 200
    assert sent(backend)[2].json["input"] == [HI, odd]  # another request's list may be right



SEARCH: Object = {"type": "web_search"}
DRAW: Object = {"type": "image_generation"}


# -- a forced hosted tool -------------------------------------------------------------

FORCED = {
    "search": SEARCH, "draw": DRAW, "former-name": {"type": "web_search_preview"},
    "allowed": {"type": "allowed_tools", "mode": "required", "tools": [SEARCH]},
}


@pytest.mark.parametrize("choice", FORCED.values(), ids=FORCED)
@pytest.mark.parametrize("path", [RESPONSES, CHAT])
def test_a_forced_hosted_tool_that_is_refused_is_left_to_the_model(
    bridge: RunningBridge, backend: wire.Backend, path: str, choice: Object
) -> None:
    body: Object = {"messages": [USER]} if path == CHAT else {"input": "hi"}
    if path == CHAT and choice["type"] == "allowed_tools":
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [SEARCH]}}
    reply = ask(bridge, {**MODEL, **body}, path=path, tools=[SEARCH, DRAW], tool_choice=choice)
    assert reply.status == 200, reply.body
    first, second = sent(backend)
    assert (second.json["tool_choice"], second.json["tools"]) == ("auto", first.json["tools"])
    assert "tool_choice" in (reply.header("x-qoo-bridge-repaired") or "")
