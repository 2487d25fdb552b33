"""Room items: reasoning items that SDKs echo."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import wire
from conftest import RunningBridge
from help import (
    CLIENTS,
    HI,
    MODEL,
    MODELS,
    REQUEST,
    Object,
    accepted,
    ask,
)

import qoo_bridge as q

# -- reasoning items that SDKs echo (each locks a thread for good) ----------------

THOUGHT: Object = {
    "type": "reasoning", "id": "rs_1", "encrypted_content": "gAAA",
    "summary": [{"type": "summary_text", "text": "think"}],
}
READABLE = [{"type": "reasoning_text", "text": "I think"}]
SAYS: Object = {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
                "content": [{"type": "output_text", "text": "hi", "annotations": []}]}
REASONING_ROWS: dict[str, tuple[Object, Object]] = {  # what changes in the item, what of it goes up
    "status": ({"status": "completed"}, {}),
    "status-in-progress": ({"status": "in_progress"}, {}),
    "status-null": ({"status": None}, {}),
    "content": ({"content": READABLE}, {}),
    "content-text": ({"content": "I think"}, {}),
    "summary-null": ({"summary": None}, {"summary": []}),
    "model_dump": ({"status": None, "content": None, "summary": []}, {"summary": []}),
    "all": ({"status": "completed", "content": READABLE, "summary": None}, {"summary": []}),
}


def as_taken(item: Object) -> Object:
    """Return a reasoning item without `content` that says nothing: null, empty and missing are one."""
    return {name: value for name, value in item.items() if name != "content" or value not in (None, [])}


@pytest.mark.parametrize(("given", "wanted"), REASONING_ROWS.values(), ids=REASONING_ROWS)
@CLIENTS
@MODELS
def test_an_echoed_reasoning_item_goes_up_as_the_backend_takes_it(
    bridge: RunningBridge, backend: wire.Backend, model: str, headers: dict[str, str],
    given: Object, wanted: Object,
) -> None:
    items = [HI, {**THOUGHT, **given}, SAYS, HI, {**THOUGHT, "id": "rs_2", **given}]
    request = accepted(bridge, backend, ask(bridge, {"model": model, "input": items}, headers))
    reasoning = [as_taken(item) for item in request.json["input"] if item["type"] == "reasoning"]
    assert reasoning == [{**THOUGHT, **wanted}, {**THOUGHT, "id": "rs_2", **wanted}]


@CLIENTS
def test_a_reasoning_item_without_a_summary_gets_an_empty_one(
    bridge: RunningBridge, backend: wire.Backend, headers: dict[str, str]
) -> None:
    item = {name: value for name, value in THOUGHT.items() if name != "summary"}
    request = accepted(bridge, backend, ask(bridge, {**MODEL, "input": [HI, item]}, headers))
    assert request.json["input"] == [HI, {**item, "summary": []}]


IMAGE = {"type": "input_image", "image_url": "data:", "detail": "low"}
FIELDS: dict[str, list[object]] = {
    "type": [*sorted(q.USUAL_TYPES), "reasoning", "item_reference", "additional_tools", "", None, [], {}, 1],
    "id": ["rs_1", "msg_1", "fc_1", "x" * 65, None, 5],
    "role": ["user", "system", "assistant", None, ["system"]],
    "call_id": ["call_1", "c" * 64, "c" * 65, None, 7, ["c" * 65]],
    "content": ["hi", None, [], READABLE, [IMAGE], [5]],
    "output": ["out", [IMAGE], [{"type": "input_image"}]],
    "status": ["completed", None], "summary": [None, []], "encrypted_content": ["gAAA", None, ""],
    "tools": [[{"type": "function", "name": "f", "parameters": {"type": "object"}}], None, 5],
}
CONTEXTS = {
    "unknown model": q.Context(), "plain": q.Context(model=q.Model("m")),
    "lite": q.Context(model=q.Model("m", lite=True)),
    "lite Codex": q.Context(model=q.Model("m", lite=True), codex=True, lite_header=True),
    "lite Codex on plain": q.Context(model=q.Model("m"), codex=True, lite_header=True),
    "tried plain": q.Context(model=q.Model("m", lite=True), plain=True),
    "strict": q.Context(strict=True), "websocket": q.Context(model=q.Model("m", lite=True), websocket=True),
    "fixes": q.Context(item_fixes=(q.ItemFix("message", ("status",), "message", False),)),
}


def some_items(chance: random.Random, count: int) -> list[Any]:
    """Return items with any of FIELDS, and some that are no objects."""
    items: list[Any] = [
        {name: chance.choice(values) for name, values in FIELDS.items() if chance.random() < 0.4}
        for _ in range(count)]
    for place in range(0, count, 50):
        items[place] = chance.choice([None, "text", 5, [], {}])
    return items


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("seed", range(4))
def test_no_rule_would_change_a_usual_item(
    seed: int, context: q.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    inputs = [some_items(chance, 400)]
    for item in filter(q.is_usual, [each for each in inputs[0] if isinstance(each, dict)]):
        inputs += [[item], [{"type": "message", "role": "user", "content": "hi"}, item]]
    assert 50 < len(inputs) < 800  # there are both kinds
    requests: list[Object] = [{"model": "m", "instructions": "i", "input": items} for items in inputs]
    changed = [q.normalize(request, context) for request in requests]
    monkeypatch.setattr(q, "is_usual", lambda item: False)  # now rules look at all of them
    assert [q.normalize(request, context) for request in requests] == changed


TOOL_FIELDS: dict[str, list[object]] = {
    "type": ["function", "web_search_preview", "web_search_preview_2025", "namespace", None, 5],
    "name": ["f", None], "parameters": [{"type": "object"}, {"type": "object", "properties": {}}, {}, None],
    "tools": [[], [{"type": "web_search_preview"}], [{"parameters": {"type": "object"}}], [5], {}, None],
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_no_rule_would_change_a_usual_tool(context: q.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(1)
    tools: list[Any] = [
        {name: chance.choice(values) for name, values in TOOL_FIELDS.items() if chance.random() < 0.6}
        for _ in range(300)]
    usual = [tool for tool in tools if q.is_usual_tool(tool)]
    assert 100 < len(usual) < 250
    requests: list[Object] = [{"model": "m", "input": [], "tools": each} for each in (tools, usual, [5], "t")]
    requests += [{"model": "m", "input": [], "tools": [tool]} for tool in tools]
    changed = [q.normalize(request, context) for request in requests]
    monkeypatch.setattr(q, "is_usual_tool", lambda tool: False)  # now rules look at all of them
    assert [q.normalize(request, context) for request in requests] == changed


@pytest.mark.parametrize("seed", range(10))
def test_what_is_plain_is_usual(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [item for item in some_items(random.Random(seed), 400) if isinstance(item, dict)]
    plain, usual = [[test(item) for item in items] for test in (q.is_plain, q.is_usual)]
    monkeypatch.setattr(q, "is_plain", lambda item: False)
    assert [q.is_usual(item) for item in items] == usual
    assert 0 < sum(plain) < sum(usual) < len(items)


def test_an_item_is_judged_once_in_a_conversation() -> None:
    items = some_items(random.Random(1), 120)
    judged: list[Any] = []
    is_usual = q.is_usual

    def judge(item: dict[str, Any]) -> bool:
        judged.append(item)
        return is_usual(item)

    last = q.NOTHING_READ
    for count in (40, 60, 60, 120, 30, 120):  # items; each request begins like the one before
        spans = q.read_request(json.dumps({"input": items[:count]}).encode(), last)
        expected = q.NOTHING_READ.judge(spans.request, "input", is_usual)
        del judged[:]
        for _ in range(2):
            assert spans.judge(spans.request, "input", judge) == expected
        assert len(judged) == sum(isinstance(item, dict) for item in items[last.judged.get("input", 0):count])
        spans.settle(1 << 30)
        last = spans
    other = [{"type": "reasoning"}, *items]  # no list of the body
    assert last.judge({"input": other}, "input", is_usual)[0] is other[0]
    assert last.judge({"input": "hi"}, "input", is_usual) == last.judge({}, "input", is_usual) == []


def test_a_message_keeps_its_status(bridge: RunningBridge, backend: wire.Backend) -> None:
    items = [HI, {**THOUGHT, "status": None}, SAYS]
    request = accepted(bridge, backend, ask(bridge, {**MODEL, "input": items}))
    assert request.json["input"][2] == SAYS


def test_a_stored_response_is_replayed_as_the_backend_takes_it(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    answer = {**wire.reasoning_item("rs_1"), "status": "completed", "content": READABLE}
    backend.on("/responses", wire.turn(*wire.items_turn(answer, wire.message_item("hi"))))
    first = ask(bridge, REQUEST, store=True).json
    again = ask(bridge, REQUEST, previous_response_id=first["id"])
    request = accepted(bridge, backend, again)
    assert [item["type"] for item in request.json["input"]] == ["message", "reasoning", "message", "message"]
