"""Room items: reasoning items that SDKs echo."""

from __future__ import annotations

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


FIELDS: dict[str, list[object]] = {
    "type": [*sorted(q.USUAL_TYPES), "reasoning", "item_reference", "", None, [], {}, 1],
    "id": ["rs_1", "msg_1", "x" * 65, None, 5],
    "role": ["user", "system", "assistant", None, ["system"]],
    "call_id": ["call_1", "c" * 64, "c" * 65, None, 7, ["c" * 65]],
    "content": ["hi", None, [], READABLE], "status": ["completed", None], "summary": [None, []],
}


@pytest.mark.parametrize("seed", range(20))
def test_no_rule_would_change_an_item_that_is_passed_over(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    items: list[Any] = [
        {name: chance.choice(values) for name, values in FIELDS.items() if chance.random() < 0.5}
        for _ in range(500)]
    request: Object = {"input": [*items, None, "text", 5, [], {}]}
    fired: dict[str, None] = {}
    fitted = q.apply_item_rules(request, q.Context(), fired)
    assert 0 < len(q.unusual_items(items)) < len(items)
    monkeypatch.setattr(q, "USUAL_TYPES", frozenset())  # now no item is passed over
    asked: dict[str, None] = {}
    assert q.apply_item_rules(request, q.Context(), asked) == fitted
    assert set(asked) == set(fired)


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
