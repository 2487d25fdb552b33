"""Room dialects: what goes up as the client's own bytes, and long call ids, in each API."""

from __future__ import annotations

import contextlib
import timeit
from typing import Any

import pytest
import wire
from conftest import RunningBridge, Start
from help import (
    CHAT,
    CLIENTS,
    HI,
    MODEL,
    MODELS,
    USER,
    Object,
    accepted,
    ask,
    chunks,
    models,
    sent,
)

import qoo_bridge as q

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


def test_many_long_call_ids_are_given_back_in_one_pass() -> None:
    long = [f"call_{'q' * 200}{number}" for number in range(3000)]
    call_ids = {q.short_call_id(each): each.encode() for each in long}
    others = ["call_" + "0" * 40, "call_1"]
    assert q.restore_call_ids(" ".join([*call_ids, *others]).encode(), call_ids).decode().split() == [
        *long, *others]
    first = dict([*call_ids.items()][:3])
    event = b'event: response.output_text.delta\ndata: {"delta":"call_1"}\n\n'
    many = min(timeit.repeat(lambda: q.restore_call_ids(event, call_ids), number=100, repeat=5))
    few = min(timeit.repeat(lambda: q.restore_call_ids(event, first), number=100, repeat=5))
    assert many < 20 * few  # an event costs the same, however many ids there are


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


# -- the client's own bytes ---------------------------------------------------------------------

ODD_ITEM = (b'{ "type":"message","role" : "user", "content":[ {"type":"input_text",'
            b'"text":"caf\\u00e9 \xe2\x82\xac \\/"} ],"id":"msg_1" }')
ODD_CALL = b'{"type":"function_call" ,"call_id":"c","name":"run","arguments":"{\\"a\\": 1.50}" }'
ODD_OUTPUT = b'{"type":"function_call_output","call_id":"c","output":"\\ud83d\\ude00 \xf0\x9f\x98\x80"}'
ODD_TOOL = (b'{"type":"function","name":"run","strict":false,'
            b'"parameters":{"type":"object" , "properties":{ "a":{"minimum":1.50e0} }}}')
ODD_ITEMS = (ODD_ITEM, ODD_CALL, ODD_OUTPUT)


def odd_body(model: str, first: bytes = b"", **fields: bytes) -> bytes:
    """Return a request whose values are written as no encoder writes them."""
    more = b"".join(b' "%b" :%b ,' % (name.encode(), value) for name, value in fields.items())
    items = b" , ".join([*filter(None, [first]), *ODD_ITEMS])
    return (b'{ "model":"%b",%b"stream":true, "store":false,"input":[%b ],"tools": [ %b ] }'
            % (model.encode(), more, items, ODD_TOOL))


OWN_BYTES: dict[str, tuple[bytes, tuple[bytes, ...]]] = {
    "alias": (odd_body("gpt-5.5-low"), (*ODD_ITEMS, b"[ %b ]" % ODD_TOOL)),
    "lite form": (odd_body("gpt-6-sol"), (*ODD_ITEMS, ODD_TOOL)),
    "alias of a lite model": (odd_body("local_md"), (*ODD_ITEMS, ODD_TOOL)),
    "dropped field": (odd_body("gpt-5.5", temperature=b"0.50"), (b" , ".join(ODD_ITEMS), ODD_TOOL)),
    "another item changes": (
        odd_body("gpt-5.5", b'{"role":"system","content":"x"}'), (b" , ".join(ODD_ITEMS),)),
    "repair": (odd_body("gpt-5.5", field_of_tomorrow=b"[1 ]"), (b" , ".join(ODD_ITEMS), ODD_TOOL)),
}


@pytest.mark.parametrize(("body", "kept"), OWN_BYTES.values(), ids=OWN_BYTES)
@CLIENTS
def test_what_no_rule_changes_goes_up_as_the_clients_own_bytes(
    bridge: RunningBridge, backend: wire.Backend, headers: dict[str, str], body: bytes,
    kept: tuple[bytes, ...]
) -> None:
    models(bridge)
    reply = wire.post(bridge.address, "/v1/responses", body, headers)
    assert reply.status == 200, reply.body
    raw = sent(backend)[-1].raw_body
    for piece in kept:
        assert piece in raw
    assert raw != body


@pytest.mark.parametrize("model", ["gpt-5.5-low", "gpt-6-sol", "local_md"])
def test_a_frame_goes_up_as_the_clients_own_bytes(
    bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    frames: list[bytes] = []
    send = q.WebSocketRelay._to_upstream

    def note(relay: q.WebSocketRelay, opcode: int, payload: bytes) -> None:
        frames.append(payload)
        send(relay, opcode, payload)

    monkeypatch.setattr(q.WebSocketRelay, "_to_upstream", note)
    models(bridge)
    with contextlib.closing(wire.WebSocketClient(bridge.address)) as client:
        assert client.connect("/v1/responses").status == 101
        client.send_frame(wire.Frame(wire.TEXT, odd_body(model, type=b'"response.create"'), masked=True))
        assert client.read_turn()[-1]["type"] == "response.completed"
    for piece in (*ODD_ITEMS, ODD_TOOL):
        assert piece in frames[0]
