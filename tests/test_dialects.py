"""Room dialects: long call ids go up short and come back long, in each API."""

from __future__ import annotations

from typing import Any

import pytest
import wire
from conftest import RunningBridge, Start
from help import (
    CHAT,
    CODEX,
    HI,
    MODEL,
    USER,
    Object,
    ask,
    chunks,
    sent,
)

LITE_MODEL = "gpt-6-sol"
CLIENTS = pytest.mark.parametrize("headers", [{}, CODEX], ids=["sdk", "codex"])
MODELS = pytest.mark.parametrize("model", ["gpt-5.5", LITE_MODEL], ids=["plain", "lite"])


def accepted(bridge: RunningBridge, backend: wire.Backend, reply: wire.RawReply) -> wire.Request:
    """Hold that a request was taken at the first try, and return it as it came upstream."""
    assert (reply.status, backend.refusals, reply.header("x-qoo-bridge-repaired")) == (200, [], None)
    assert bridge.faults == []
    return sent(backend)[-1]



CALL: Object = {"type": "function_call", "call_id": "call_1", "name": "run", "arguments": "{}"}
OUTPUT: Object = {"type": "function_call_output", "call_id": "call_1", "output": "x"}
CUSTOM: Object = {"type": "custom_tool_call", "call_id": "call_2", "name": "patch", "input": "x"}
CUSTOM_OUTPUT: Object = {"type": "custom_tool_call_output", "call_id": "call_2", "output": "x"}


# -- call ids of other providers -----------------------------------------------------------------

STEM = "call_" + "f" * 59  # 64 characters that the long ids below have in common
FIRST, SECOND = STEM + "a" * 19, STEM + "b" * 236


def call(call_id: str, **fields: object) -> Object:
    """Return a call of a function."""
    return {**CALL, "call_id": call_id, **fields}


def output(call_id: str, **fields: object) -> Object:
    """Return what a function gave back."""
    return {**OUTPUT, "call_id": call_id, **fields}


LONG_CALLS: dict[str, list[Object]] = {
    "functions": [HI, call(FIRST), call(SECOND), output(SECOND), output(FIRST)],
    "custom": [HI, {**CUSTOM, "call_id": FIRST}, {**CUSTOM_OUTPUT, "call_id": FIRST},
               {**CUSTOM, "call_id": SECOND}, {**CUSTOM_OUTPUT, "call_id": SECOND}],
    "other-types": [HI, {"type": "local_shell_call", "call_id": FIRST, "action": {}},
                    {"type": "local_shell_call_output", "call_id": FIRST, "output": "x"},
                    {"type": "of_tomorrow_call", "call_id": SECOND},
                    {"type": "of_tomorrow_call_output", "call_id": SECOND}],
    "beside-a-short-one": [HI, call("call_1"), call(FIRST), output(FIRST), output("call_1"), call(SECOND),
                           output(SECOND)],
}


@pytest.mark.parametrize("items", LONG_CALLS.values(), ids=LONG_CALLS)
@CLIENTS
@MODELS
def test_long_call_ids_are_shortened_in_pairs(
    start: Start, backend: wire.Backend, model: str, headers: dict[str, str], items: list[Object]
) -> None:
    histories = []
    for bridge in (start(), start()):  # a restart changes nothing
        request = accepted(bridge, backend, ask(bridge, {"model": model, "input": items}, headers))
        histories.append([item.get("call_id") for item in request.json["input"]])
    given = [item.get("call_id") for item in items]
    short = histories[0]
    assert histories[0] == histories[1]
    assert len(set(zip(given, short))) == len(set(given)) == len(set(short))
    assert [new for old, new in zip(given, short) if old is None or len(old) <= 64] == [
        old for old in given if old is None or len(old) <= 64]


def test_a_chats_long_call_ids_are_shortened_in_pairs(bridge: RunningBridge, backend: wire.Backend) -> None:
    calls = [{"id": name, "type": "function", "function": {"name": "run", "arguments": "{}"}}
             for name in (FIRST, SECOND)]
    answers = [{"role": "tool", "tool_call_id": name, "content": "x"} for name in (SECOND, FIRST)]
    messages = [USER, {"role": "assistant", "tool_calls": calls}, *answers]
    request = accepted(bridge, backend, ask(bridge, {**MODEL, "messages": messages}, path=CHAT))
    one, two, other, again = [item["call_id"] for item in request.json["input"][1:]]
    assert (one, two) == (again, other)
    assert one != two


def calling_again(exchange: wire.Exchange) -> None:
    """Answer with a call under an id of the history, as the backend knows it."""
    (item,) = [item for item in exchange.request.json["input"] if item["type"] == "function_call"]
    wire.turn(*wire.call_turn("run", "{}", item["call_id"]))(exchange)


HISTORY: list[Object] = [HI, call(FIRST), output(FIRST)]
CHAT_HISTORY = [
    USER,
    {"role": "assistant", "tool_calls": [
        {"id": FIRST, "type": "function", "function": {"name": "run", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": FIRST, "content": "x"},
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@CLIENTS
def test_an_answer_names_a_long_call_id_in_its_long_form(
    bridge: RunningBridge, backend: wire.Backend, headers: dict[str, str], stream: bool
) -> None:
    backend.on("/responses", wire.checked(backend, calling_again))
    reply = ask(bridge, {**MODEL, "input": HISTORY}, headers, stream=stream)
    assert reply.status == 200, reply.body
    found = [event["item"]["call_id"] for event in wire.sse(reply.body) if "item" in event] if stream else [
        item["call_id"] for item in reply.json["output"]]
    assert set(found) == {FIRST}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_chats_answer_names_a_long_call_id_in_its_long_form(
    bridge: RunningBridge, backend: wire.Backend, stream: bool
) -> None:
    backend.on("/responses", wire.checked(backend, calling_again))
    reply = ask(bridge, {**MODEL, "messages": CHAT_HISTORY}, path=CHAT, stream=stream)
    assert reply.status == 200, reply.body
    found: list[Any] = []
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks(reply.body)[:-1] if chunk["choices"]]
        found = [each["id"] for delta in deltas for each in delta.get("tool_calls", ()) if "id" in each]
    else:
        found = [each["id"] for each in reply.json["choices"][0]["message"]["tool_calls"]]
    assert found == [FIRST]
