"""Room store: what is remembered for chat clients and for `previous_response_id`, and its bound."""

from __future__ import annotations

import gc
import json
import socket
import sys
import tracemalloc
from typing import Any

import pytest
import wire
from conftest import RunningBridge, Start
from help import (
    ANSWER,
    CHAT,
    MODEL,
    RESPONSES,
    TEXT,
    USER,
    WAYS,
    Object,
    ask,
    bearer,
    chunks,
    respond,
    script,
    sent,
    turns,
)

import qoo_bridge as q

ANN, BOB = "ann-0123456789abcdef", "bob-0123456789abcdef"
KEYS = ("--api-key", f"ann={ANN}", "--api-key", f"bob={BOB}")


def kinds(body: Object) -> list[str]:
    """Name the items of a turn: their type, or the role of a message."""
    return [item.get("role") or item["type"] for item in body["input"]]


# -- the tool loop of chat clients: the reasoning comes back ----------------------------------


def say(bridge: RunningBridge, messages: list[Object], stream: bool, secret: str = "") -> Object:
    """Ask as a chat client does; return the assistant's message, put together from its pieces."""
    reply = ask(bridge, MODEL, bearer(secret), path=CHAT, messages=messages, stream=stream)
    assert reply.status == 200
    if not stream:
        message: Object = reply.json["choices"][0]["message"]
        return message
    calls: list[Object] = []
    text = ""
    for chunk in chunks(reply.body)[:-1]:
        delta = chunk["choices"][0]["delta"]
        text += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "type": "function", "function": {**call["function"]}})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return {"role": "assistant", "content": text or None, **({"tool_calls": calls} if calls else {})}


def with_outputs(message: Object) -> list[Object]:
    """Return what a client sends back of a turn: the calls, and the answer to each."""
    calls = message.get("tool_calls", [])
    outputs = [{"role": "tool", "tool_call_id": call["id"], "content": "sunny"} for call in calls]
    return [message, *outputs]


@WAYS
def test_reasoning_goes_back_in_front_of_its_call(
    stream: bool, bridge: RunningBridge, backend: wire.Backend
) -> None:
    first, second, third = (wire.reasoning_item(encrypted_content=f"gAAA{n}") for n in range(3))
    script(
        backend,
        wire.turn(*wire.items_turn(first, wire.call_item("a", "{}", "c1"), wire.call_item("b", "{}", "c2"))),
        wire.turn(*wire.items_turn(second, wire.call_item("a", '{"x": 1}', "c3"))),
        wire.turn(*wire.items_turn(third, wire.message_item(ANSWER))),
    )
    history = [USER]
    for _ in range(3):
        history += with_outputs(say(bridge, history, stream))
    say(bridge, [*history, USER], stream)
    items = turns(backend)[-1]["input"]
    call, output = "function_call", "function_call_output"
    assert kinds(turns(backend)[-1]) == [
        "user", "reasoning", call, call, output, output, "reasoning", call, output, "reasoning", "assistant",
        "user",
    ]  # fmt: skip
    assert [item for item in items if item["type"] == "reasoning"] == [first, second, third]
    assert [item["call_id"] for item in items if "call_id" in item] == ["c1", "c2", "c1", "c2", "c3", "c3"]
    assert items[7]["arguments"] == '{"x": 1}'
    assert backend.refusals == []


@WAYS
@pytest.mark.parametrize("as_parts", [False, True], ids=["text", "parts"])
def test_reasoning_goes_back_in_front_of_its_text(
    as_parts: bool, stream: bool, bridge: RunningBridge, backend: wire.Backend
) -> None:
    reasoning = wire.reasoning_item()
    script(backend, wire.turn(*wire.items_turn(reasoning, wire.message_item(ANSWER))))
    message = say(bridge, [USER], stream)
    if as_parts:
        message = {**message, "content": [{"type": "text", "text": message["content"]}]}
    say(bridge, [USER, message, USER, message, USER], stream)  # the text twice, the reasoning once
    assert kinds(turns(backend)[-1]) == ["user", "reasoning", "assistant", "user", "assistant", "user"]
    assert turns(backend)[-1]["input"][1] == reasoning


def test_several_reasoning_items_keep_their_places(bridge: RunningBridge, backend: wire.Backend) -> None:
    items = [
        wire.reasoning_item(), wire.message_item("let me look"), wire.reasoning_item(),
        wire.reasoning_item(), wire.call_item("look", "{}", "c1"),
    ]  # fmt: skip
    script(backend, wire.turn(*wire.items_turn(*items)))
    say(bridge, [USER, *with_outputs(say(bridge, [USER], False))], False)
    sent = turns(backend)[-1]["input"]
    assert [item["type"] for item in sent[1:-1]] == [item["type"] for item in items]
    assert [sent[1], sent[3], sent[4]] == [items[0], items[2], items[3]]


def test_custom_call_has_its_reasoning_too(bridge: RunningBridge, backend: wire.Backend) -> None:
    reasoning = wire.reasoning_item()
    script(backend, wire.turn(*wire.items_turn(reasoning, wire.custom_call_item("sh", "ls", "c1"))))
    message = say(bridge, [USER], False)
    assert message["tool_calls"][0]["type"] == "custom"
    say(bridge, [USER, *with_outputs(message)], False)
    assert kinds(turns(backend)[-1]) == ["user", "reasoning", "custom_tool_call", "custom_tool_call_output"]


@pytest.mark.parametrize("secret", [ANN, BOB])
def test_reasoning_is_given_to_its_own_client_only(secret: str, start: Start, backend: wire.Backend) -> None:
    bridge = start(*KEYS)
    script(backend, wire.turn(*wire.items_turn(wire.reasoning_item(), wire.call_item("a", "{}", "c1"))))
    message = say(bridge, [USER], False, ANN)
    say(bridge, [USER, *with_outputs(message)], False, secret)
    assert ("reasoning" in kinds(turns(backend)[-1])) is (secret == ANN)


def test_call_that_is_not_known_costs_nothing(bridge: RunningBridge, backend: wire.Backend) -> None:
    call = {"id": "c9", "type": "function", "function": {"name": "a", "arguments": "{}"}}
    asked = with_outputs({"role": "assistant", "content": "unheard of", "tool_calls": [call]})
    assert say(bridge, [USER, *asked], False)["content"] == "sunny"
    assert kinds(turns(backend)[-1]) == ["user", "assistant", "function_call", "function_call_output"]


# -- what /responses remembers -------------------------------------------------------


def thoughtful(backend: wire.Backend, *items: wire.Item) -> list[wire.Item]:
    """Script a turn of a reasoning item and these, which the backend takes back only behind it."""
    output = [wire.reasoning_item(), *items]
    backend.partners.update({item["id"]: output[0]["id"] for item in items})
    script(backend, wire.turn(*wire.items_turn(*output)))
    return output


@WAYS
def test_previous_response_is_replayed(stream: bool, bridge: RunningBridge, backend: wire.Backend) -> None:
    first = thoughtful(backend, wire.call_item("a", "{}", "c1"))
    second = thoughtful(backend, wire.message_item(ANSWER))
    outputs = [{"type": "function_call_output", "call_id": "c1", "output": "sunny"}]
    one = respond(bridge, stream, input="one", instructions="brief")
    two = respond(bridge, stream, input=outputs, previous_response_id=one["id"])
    respond(bridge, stream, input="three", previous_response_id=two["id"])
    respond(bridge, stream, input="other", previous_response_id=one["id"])
    assert (one["previous_response_id"], two["previous_response_id"]) == (None, one["id"])
    asked, _, whole, branch = turns(backend)
    assert asked["instructions"] == "brief"
    assert whole["instructions"] == ""  # the API does not carry them over
    assert "previous_response_id" not in whole
    assert kinds(whole) == [
        "user", "reasoning", "function_call", "function_call_output", "reasoning", "assistant", "user",
    ]  # fmt: skip
    assert whole["input"][:-1] == [*asked["input"], *first, *outputs, *second]
    assert branch["input"][:-1] == [*asked["input"], *first]
    assert backend.refusals == []


def test_store_keeps_the_rest_when_one_is_too_large() -> None:
    store = q.Store(10_000)
    store.put("ann", "turn", "small", b"1")
    store.put("bob", "turn", "large", bytes(20_000))
    assert (store.get("ann", "turn", "small"), store.get("bob", "turn", "large")) == (b"1", None)


@pytest.mark.parametrize("previous", ["resp_unknown", "", 1, True, [], {}])
def test_unknown_previous_response_is_400(
    previous: object, bridge: RunningBridge, backend: wire.Backend
) -> None:
    reply = ask(bridge, MODEL, input="hi", previous_response_id=previous)
    assert (reply.status, reply.json["error"]["param"]) == (400, "previous_response_id")
    assert "unknown previous_response_id" in reply.json["error"]["message"]
    assert turns(backend) == []


@WAYS
def test_response_can_be_had_again(stream: bool, bridge: RunningBridge) -> None:
    response = respond(bridge, stream, input="hi")
    assert [item["type"] for item in response["output"]] == ["message"]
    for path in (f"{RESPONSES}/{response['id']}", f"/responses/{response['id']}/"):
        reply = wire.get(bridge.address, path)
        assert (reply.status, reply.json) == (200, response)


@pytest.mark.parametrize("name", ["resp_unknown", "resp_%00", "..", "a" * 500])
def test_unknown_response_is_404(name: str, bridge: RunningBridge) -> None:
    respond(bridge, input="hi")
    reply = wire.get(bridge.address, f"{RESPONSES}/{name}")
    assert (reply.status, reply.json["error"]["code"]) == (404, "not_found")


def test_no_client_reads_another_one(start: Start, backend: wire.Backend) -> None:
    bridge = start(*KEYS)
    reasoning, _ = thoughtful(backend, wire.message_item(ANSWER))
    name = respond(bridge, False, ANN, input="hi")["id"]
    for secret, statuses, found in ((ANN, (200, 200), True), (BOB, (404, 400), False)):
        fields = bearer(secret)
        reference = {"type": "item_reference", "id": reasoning["id"]}
        got = wire.get(bridge.address, f"{RESPONSES}/{name}", fields)
        asked = ask(bridge, MODEL, bearer(secret), input="hi", previous_response_id=name)
        assert (got.status, asked.status) == statuses
        respond(bridge, False, secret, input=[USER, reference])
        assert (reasoning in turns(backend)[-1]["input"]) is found


@WAYS
def test_reference_becomes_its_item_in_place(
    stream: bool, bridge: RunningBridge, backend: wire.Backend
) -> None:
    items = thoughtful(backend, wire.call_item("a", "{}", "c1"), wire.message_item(ANSWER))
    respond(bridge, stream, input="hi")
    references = [{"type": "item_reference", "id": item["id"]} for item in items]
    output = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
    respond(bridge, stream, input=[USER, *references, output])
    assert turns(backend)[-1]["input"][1:] == [*items, output]
    assert backend.refusals == []


def test_unknown_reference_goes_and_with_it_the_ids(bridge: RunningBridge, backend: wire.Backend) -> None:
    asked = [USER, {"type": "item_reference", "id": "rs_unknown"}, wire.message_item(ANSWER)]
    respond(bridge, input=asked)
    assert kinds(turns(backend)[-1]) == ["user", "assistant"]
    assert not any("id" in item for item in turns(backend)[-1]["input"])


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"store": False}, {}),
        ({"store": True}, {"User-Agent": "codex_exec/0.169.0 (Debian)", "Originator": "codex_exec"}),
    ],
    ids=["store false", "codex"],
)
@WAYS
def test_nothing_is_kept_unasked(
    stream: bool, fields: Object, headers: dict[str, str], bridge: RunningBridge, backend: wire.Backend
) -> None:
    reasoning, _ = thoughtful(backend, wire.message_item(ANSWER))
    body = {"model": "gpt-5.5", "input": "hi", "stream": stream, **fields}
    reply = wire.post(bridge.address, RESPONSES, body, headers)
    name = (wire.sse(reply.body)[-1]["response"] if stream else reply.json)["id"]
    assert wire.get(bridge.address, f"{RESPONSES}/{name}").status == 404
    assert ask(bridge, MODEL, input="hi", previous_response_id=name).status == 400
    respond(bridge, input=[USER, {"type": "item_reference", "id": reasoning["id"]}])
    assert kinds(turns(backend)[-1]) == ["user"]


def test_turn_that_failed_midway_is_not_continued(bridge: RunningBridge, backend: wire.Backend) -> None:
    script(backend, wire.cut(*wire.text_turn(ANSWER, response_id="resp_cut")[:-1]))
    assert ask(bridge, MODEL, input="hi").status == 502
    assert ask(bridge, MODEL, input="hi", previous_response_id="resp_cut").status == 400


# -- the store's bound ------------------------------------------------------------


def test_least_recently_used_goes_first() -> None:
    store = q.Store(4 * (1000 + q.Store.ENTRY_BYTES))
    for name in "abcd":
        store.put("ann", "item", name, name.encode() * 1000)
    assert store.get("ann", "item", "a") == b"a" * 1000  # used: b is the oldest now
    store.put("ann", "item", "e", b"e" * 1000)
    assert [store.get("ann", "item", name) is not None for name in "abcde"] == [True, False, True, True, True]


def test_entry_that_is_put_again_counts_once() -> None:
    store = q.Store(2 * (1000 + q.Store.ENTRY_BYTES))
    store.put("ann", "item", "a", bytes(1000))
    for value in range(50):
        store.put("ann", "item", "b", bytes([value]) * 1000)
    assert [store.get("ann", "item", name) for name in "ab"] == [bytes(1000), bytes([49]) * 1000]


def test_entry_above_the_bound_is_not_kept() -> None:
    store = q.Store(1000)
    store.put("ann", "item", "a", bytes(1001))
    assert store.get("ann", "item", "a") is None
    store.put("ann", "item", "b", b"b")
    assert store.get("ann", "item", "b") == b"b"


@pytest.mark.parametrize("name", [None, 1, [], {}, True])
def test_name_of_any_type_is_no_fault(name: object) -> None:
    assert q.Store(1000).get("ann", "item", name) is None


def test_old_conversations_go(monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    monkeypatch.setattr(q, "STORE_SIZE", 40_000)
    bridge = start()
    names = [respond(bridge, input=f"{number} {'x' * 4000}")["id"] for number in range(8)]
    found = [wire.get(bridge.address, f"{RESPONSES}/{name}").status for name in names]
    assert (found[0], found[-1]) == (404, 200)
    assert found == sorted(found, reverse=True)
    assert ask(bridge, MODEL, input="hi", previous_response_id=names[0]).status == 400
    assert ask(bridge, MODEL, input="hi", previous_response_id=names[-1]).status == 200


def test_long_conversation_stays_within_the_bound(
    monkeypatch: pytest.MonkeyPatch, start: Start, backend: wire.Backend
) -> None:
    monkeypatch.setattr(q, "STORE_SIZE", 60_000)
    bridge = start()
    name, statuses = None, []
    for number in range(20):  # 160 KB in all: at some turn the conversation is too long to be kept
        reply = ask(bridge, MODEL, input=f"{number} {'x' * 4000}", previous_response_id=name)
        statuses.append(reply.status)
        if reply.status != 200:
            break
        name = reply.json["id"]
    assert max(len(json.dumps(turn["input"])) for turn in turns(backend)) <= 65_000
    assert (statuses[3], statuses[-1]) == (200, 400)


def test_references_do_not_grow_beyond_max_body(start: Start, backend: wire.Backend) -> None:
    bridge = start("--max-body", "64k")
    message, reference = wire.message_item("x" * 16_000), "item_reference"
    script(backend, wire.turn(*wire.items_turn(message)))
    respond(bridge, input="hi")
    ask(bridge, MODEL, input=[USER, *[{"type": reference, "id": message["id"]} for _ in range(500)]])
    assert max(len(request.body) for request in sent(backend)) <= 64 * 1024


HERE, NEIGHBOUR = "127.0.0.1", "127.0.0.2"  # two machines of an open LAN
KEY_ANN, KEY_BOB = "ann-0123456789abcdef", "bob-0123456789abcdef"
TWO_KEYS = ("--api-key", f"ann={KEY_ANN}", "--api-key", f"bob={KEY_BOB}")
SAID = "Done."
SECRET = "gAAA-secret-thoughts"
two_addresses = pytest.mark.skipif(sys.platform == "darwin", reason="127.0.0.2 is no address of this host")


class FromAddress(wire.WebSocketClient):
    """A client that comes from an address of the test's choice."""

    def __enter__(self) -> FromAddress:
        return self

    def __init__(self, address: wire.Address, source: str = HERE) -> None:
        super().__init__(address)
        self.sock.close()
        self.sock = socket.create_connection(address, 5.0, (source, 0))
        self.reader = wire.ClientReader(self.sock)


def ask_from(
    bridge: RunningBridge, source: str, path: str, body: Object, secret: str = ""
) -> wire.RawReply:
    """Send a request from an address and read the whole reply."""
    with FromAddress(bridge.address, source) as client:
        client.request("POST", path, {**MODEL, **body}, bearer(secret))
        return client.read_reply()


def get_from(bridge: RunningBridge, source: str, path: str) -> wire.RawReply:
    """Send a GET from an address and read the whole reply."""
    with FromAddress(bridge.address, source) as client:
        client.request("GET", path)
        return client.read_reply()


def chat(*texts: str, system: str = "") -> Object:
    """Return a chat request: the user and the assistant by turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
    first = [{"role": "system", "content": system}] if system else []
    return {"messages": first + messages}


def think_then(backend: wire.Backend, *items: wire.Item) -> wire.Item:
    """Script a turn of a reasoning item and these; return the reasoning."""
    reasoning = wire.reasoning_item(encrypted_content=SECRET)
    script(backend, wire.turn(*wire.items_turn(reasoning, *items)))
    return reasoning


def went_up(backend: wire.Backend, text: str) -> bool:
    """Tell whether the last turn that went upstream holds a text."""
    return text in json.dumps(turns(backend)[-1])


# -- chat: the reasoning of a text --------------------------------------------

DRAFT, RENAME = "draft my resignation letter", "rename a file"
OTHERS: dict[str, tuple[Object, Object]] = {  # one conversation, and another in which the same was said
    "another beginning": (chat(DRAFT), chat(RENAME, SAID, "thanks")),
    "another beginning, later on": (chat(DRAFT), chat(RENAME, "Which?", "a.txt", SAID, "thanks")),
    "another system prompt": (chat("go", system=DRAFT), chat("go", SAID, "thanks", system=RENAME)),
    "a text in parts": (
        chat(DRAFT),
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": SAID}]}, USER]},
    ),
}
WHO = {  # the keys and the addresses of the two that ask
    "no key": (("", HERE), ("", HERE)),
    "no key, two machines": (("", HERE), ("", NEIGHBOUR)),
    "one key": ((KEY_ANN, HERE), (KEY_ANN, HERE)),
    "one key, two machines": ((KEY_ANN, HERE), (KEY_ANN, NEIGHBOUR)),
    "two keys": ((KEY_ANN, HERE), (KEY_BOB, HERE)),
}


@two_addresses
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_reasoning_of_a_text_stays_in_its_conversation(
    stream: bool, who: str, other: str, start: Start, backend: wire.Backend
) -> None:
    asked = OTHERS[other]
    bridge = start(*(TWO_KEYS if WHO[who][0][0] else ()))
    think_then(backend, wire.message_item(SAID))
    for body, (secret, source) in zip(asked, WHO[who]):
        assert ask_from(bridge, source, CHAT, {**body, "stream": stream}, secret).status == 200
    assert not went_up(backend, SECRET)
    assert backend.refusals == []


def test_reasoning_of_a_text_stays_on_its_branch(bridge: RunningBridge, backend: wire.Backend) -> None:
    # Two conversations of one machine that begin alike: only what was said in between tells them apart.
    script(backend, wire.turn(*wire.text_turn("Hello!")))
    ask_from(bridge, HERE, CHAT, chat("hi"))
    think_then(backend, wire.message_item(SAID))
    ask_from(bridge, HERE, CHAT, chat("hi", "Hello!", DRAFT))
    ask_from(bridge, HERE, CHAT, chat("hi", "Hello!", RENAME, SAID, "thanks"))
    assert not went_up(backend, SECRET)


def test_completions_leave_no_reasoning_to_a_chat(bridge: RunningBridge, backend: wire.Backend) -> None:
    think_then(backend, wire.message_item(SAID))
    assert ask_from(bridge, HERE, TEXT, {"prompt": DRAFT}).status == 200
    assert ask_from(bridge, HERE, CHAT, chat(RENAME, SAID, "thanks")).status == 200
    assert not went_up(backend, SECRET)


@two_addresses
@pytest.mark.parametrize("source", [HERE, NEIGHBOUR])
def test_same_words_on_two_machines_are_two_conversations(
    source: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    think_then(backend, wire.message_item(SAID))
    ask_from(bridge, HERE, CHAT, chat("hi"))
    ask_from(bridge, source, CHAT, chat("hi", SAID, "thanks"))
    assert went_up(backend, SECRET) is (source == HERE)


def shows(picture: str) -> Object:
    """Return a user's message with a picture."""
    url = {"url": f"data:image/png;base64,{picture}"}
    return {"role": "user", "content": [{"type": "text", "text": "What is this?"},
                                        {"type": "image_url", "image_url": url}]}


def ran(call_id: str, output: str) -> list[Object]:
    """Return a call and its output."""
    call = {"id": call_id, "type": "function", "function": {"name": "sh", "arguments": "{}"}}
    return [{"role": "user", "content": "run it"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call_id, "content": output}]


DIFFERENT: dict[str, tuple[list[Object], list[Object]]] = {
    "in a picture": ([shows("QUFB")], [shows("QkJC")]),
    "in an output": (ran("call_1", "a letter"), ran("call_1", "a file")),
    "in a call": (ran("call_1", "a"), ran("call_2", "a")),
}


@pytest.mark.parametrize(("first", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_conversations_that_differ_share_no_reasoning(
    bridge: RunningBridge, backend: wire.Backend, first: list[Object], other: list[Object]
) -> None:
    think_then(backend, wire.message_item(SAID))
    ask_from(bridge, HERE, CHAT, {"messages": first})
    echo = [{"role": "assistant", "content": SAID}, {"role": "user", "content": "thanks"}]
    assert ask_from(bridge, HERE, CHAT, {"messages": [*other, *echo]}).status == 200
    assert not went_up(backend, SECRET)
    assert ask_from(bridge, HERE, CHAT, {"messages": [*first, *echo]}).status == 200
    assert went_up(backend, SECRET)


@pytest.mark.parametrize("system", ["", "be brief"])
@pytest.mark.parametrize("first", ["hi", [{"type": "text", "text": "hi"}]], ids=["text", "parts"])
def test_conversation_that_goes_on_has_its_own_reasoning(
    first: Any, system: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    think_then(backend, wire.message_item(SAID))
    begun = chat("hi", system=system)
    begun["messages"][-1]["content"] = first
    ask_from(bridge, HERE, CHAT, begun)
    messages = [*begun["messages"], {"role": "assistant", "content": SAID}, USER]
    ask_from(bridge, HERE, CHAT, {"messages": messages})
    assert went_up(backend, SECRET)
    messages += [{"role": "assistant", "content": "hi"}, USER]
    ask_from(bridge, HERE, CHAT, {"messages": messages})
    assert went_up(backend, SECRET)


# -- all that is kept, without a key: by the client's address ---------------------


def ids_of(items: list[Any]) -> list[str]:
    """Name the types of some items."""
    return [item["type"] for item in items]


@two_addresses
@pytest.mark.parametrize("source", [HERE, NEIGHBOUR])
def test_reasoning_of_a_call_stays_on_its_machine(
    source: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    think_then(backend, wire.call_item("a", "{}", "call_1"))
    ask_from(bridge, HERE, CHAT, chat("hi"))
    call = {"id": "call_1", "type": "function", "function": {"name": "a", "arguments": "{}"}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]
    ask_from(bridge, source, CHAT, {"messages": messages})
    assert ("reasoning" in ids_of(turns(backend)[-1]["input"])) is (source == HERE)


@two_addresses
@pytest.mark.parametrize(("source", "status"), [(HERE, 200), (NEIGHBOUR, 404)])
def test_response_is_read_on_its_machine(source: str, status: int, bridge: RunningBridge) -> None:
    name = ask_from(bridge, HERE, RESPONSES, {"input": "my own"}).json["id"]
    assert get_from(bridge, source, f"{RESPONSES}/{name}").status == status


@two_addresses
@pytest.mark.parametrize(("source", "status"), [(HERE, 200), (NEIGHBOUR, 400)])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_response_is_continued_on_its_machine(
    stream: bool, source: str, status: int, bridge: RunningBridge, backend: wire.Backend
) -> None:
    name = ask_from(bridge, HERE, RESPONSES, {"input": "my own words"}).json["id"]
    body = {"input": "go on", "previous_response_id": name, "stream": stream}
    assert ask_from(bridge, source, RESPONSES, body).status == status
    assert len(turns(backend)) == (2 if status == 200 else 1)


@two_addresses
@pytest.mark.parametrize(("source", "kind"), [(HERE, "response.completed"), (NEIGHBOUR, "error")])
def test_response_is_continued_on_its_machine_by_a_websocket(
    source: str, kind: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    name = ask_from(bridge, HERE, RESPONSES, {"input": "my own words"}).json["id"]
    with FromAddress(bridge.address, source) as client:
        assert client.connect(RESPONSES).status == 101
        client.send_json({"type": "response.create", **MODEL, "input": [], "previous_response_id": name})
        assert client.read_turn()[-1]["type"] == kind
    assert ("my own words" in json.dumps(backend.frames)) is (source == HERE)


@two_addresses
@pytest.mark.parametrize("source", [HERE, NEIGHBOUR])
def test_reference_is_followed_on_its_machine(
    source: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    reasoning = think_then(backend, wire.message_item(SAID))
    ask_from(bridge, HERE, RESPONSES, {"input": "hi"})
    reference = {"type": "item_reference", "id": reasoning["id"]}
    assert ask_from(bridge, source, RESPONSES, {"input": [USER, reference]}).status == 200
    assert went_up(backend, SECRET) is (source == HERE)


@two_addresses
def test_key_is_one_owner_on_all_its_machines(start: Start) -> None:
    bridge = start(*TWO_KEYS)
    name = ask_from(bridge, HERE, RESPONSES, {"input": "hi"}, KEY_ANN).json["id"]
    body = {"input": "go on", "previous_response_id": name}
    assert ask_from(bridge, NEIGHBOUR, RESPONSES, body, KEY_ANN).status == 200
    assert ask_from(bridge, HERE, RESPONSES, body, KEY_BOB).status == 400


def test_key_that_is_named_like_an_address_is_no_machine(start: Start) -> None:
    bridge = start("--api-key", f"{NEIGHBOUR}={KEY_ANN}", "--api-key", f"{HERE}={KEY_BOB}")
    name = ask_from(bridge, HERE, RESPONSES, {"input": "hi"}, KEY_ANN).json["id"]
    body = {"input": "go on", "previous_response_id": name}
    assert ask_from(bridge, HERE, RESPONSES, body, KEY_BOB).status == 400


# -- what a stream says of itself, and what is kept of it --------------------------


@pytest.mark.parametrize("empty", [True, False], ids=["output empty", "output given"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_previous_response_is_named_alike_in_the_answer_and_later(
    stream: bool, empty: bool, bridge: RunningBridge, backend: wire.Backend
) -> None:
    script(backend, *[wire.turn(*wire.text_turn(text, empty_output=empty)) for text in "ab"])
    previous = None
    for _ in range(2):
        body = {"input": "hi", "stream": stream, "previous_response_id": previous}
        reply = ask_from(bridge, HERE, RESPONSES, body)
        response = wire.sse(reply.body)[-1]["response"] if stream else reply.json
        assert response["previous_response_id"] == previous
        assert get_from(bridge, HERE, f"{RESPONSES}/{response['id']}").json == response
        previous = response["id"]


def test_previous_response_of_another_connection_is_named_on_a_websocket(bridge: RunningBridge) -> None:
    name = ask_from(bridge, HERE, RESPONSES, {"input": "hi"}).json["id"]
    with FromAddress(bridge.address) as client:
        client.connect(RESPONSES)
        for _ in range(2):  # the first is replayed by the bridge, the second known to upstream
            create = {"type": "response.create", **MODEL, "input": [], "previous_response_id": name}
            client.send_json(create)
            response = client.read_turn()[-1]["response"]
            assert get_from(bridge, HERE, f"{RESPONSES}/{response['id']}").json == response
            assert response["previous_response_id"] == name
            name = response["id"]


ENDINGS = {
    "completed": wire.completed("resp_1", output=[wire.message_item(SAID)]),
    "failed": {"type": "response.failed", "sequence_number": 1, "response": wire.response_object(
        "resp_1", "failed", error={"code": "server_error", "message": "broke"})},
    "incomplete": {"type": "response.incomplete", "sequence_number": 1, "response": wire.response_object(
        "resp_1", "incomplete", incomplete_details={"reason": "max_output_tokens"}, usage=wire.USAGE)},
}


@pytest.mark.parametrize("kind", ENDINGS)
def test_both_transports_keep_the_same_responses(
    kind: str, start: Start, backend: wire.Backend
) -> None:
    events = [wire.created("resp_1"), ENDINGS[kind]]
    kept = {}
    for way in ("whole", "stream", "websocket"):
        bridge = start()  # one each: nothing is left of the way before
        if way == "websocket":
            backend.on_frame(lambda ws, _: ws.events(*events))
            with FromAddress(bridge.address) as client:
                client.connect(RESPONSES)
                client.send_json({"type": "response.create", **MODEL, "input": []})
                client.read_turn()
        else:
            script(backend, wire.turn(*events))
            ask_from(bridge, HERE, RESPONSES, {"input": "hi", "stream": way == "stream"})
        continued = {"input": "go on", "previous_response_id": "resp_1"}
        kept[way] = (get_from(bridge, HERE, f"{RESPONSES}/resp_1").status,
                     ask_from(bridge, HERE, RESPONSES, continued).status)
    assert len(set(kept.values())) == 1, kept
    if kind != "failed":
        assert kept["whole"] == (200, 200)


# -- the bound is of memory --------------------------------------------------------

HELLO = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
SMALL_ITEMS: dict[str, list[Any]] = {  # as many as exceed the bound, were they kept as Python's objects
    "short messages": [HELLO] * 240,
    "tiny objects": [{"a": 1}] * 200,
    "empty lists": [[]] * 400,
    "numbers": [1.5] * 400,
    "words": ["ab"] * 400,
}
BOUND = 1_000_000  # bytes; what else a bridge keeps of a request is small beside it


@pytest.mark.parametrize("kind", SMALL_ITEMS)
def test_store_holds_no_more_memory_than_its_bound(
    kind: str, start: Start, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(exchange: wire.Exchange) -> None:
        wire.turn(*wire.items_turn())(exchange)  # each time another response

    monkeypatch.setattr(q, "STORE_SIZE", BOUND)
    monkeypatch.setattr(q.log, "propagate", False)  # pytest keeps each line
    backend.always("/responses", answer)
    bridge = start()
    body = json.dumps({**MODEL, "input": SMALL_ITEMS[kind]}).encode()

    def keep(count: int) -> str:
        with FromAddress(bridge.address, HERE) as client:
            for _ in range(count):
                client.request("POST", RESPONSES, body)
                reply = client.read_reply()
                assert reply.status == 200
        with backend.changed:
            backend.requests.clear()
        gc.collect()
        return str(reply.json["id"])

    keep(2)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        newest = keep(60)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held <= 1.3 * BOUND
    assert get_from(bridge, HERE, f"{RESPONSES}/{newest}").status == 200


# -- last requests ------------------------------------------------------------


def kept_request(text: str) -> q.Spans:
    return q.read_request(json.dumps({"model": "m", "input": [text]}).encode())


def test_a_conversations_last_request_is_its_owners() -> None:
    requests, spans, newer = q.LastRequests(100_000), kept_request("x"), kept_request("newer")
    assert requests.get_last("ann", "talk", "-") is q.NOTHING_READ
    assert requests.keep("ann", "talk", "s", spans)
    assert requests.get_last("ann", "talk", "-") is spans
    assert requests.get_last("bob", "talk", "-") is requests.get_last("ann", "other", "-") is q.NOTHING_READ
    assert requests.keep("ann", "talk", "s", newer)
    assert requests.get_last("ann", "talk", "-") is newer


def test_a_new_conversation_goes_on_from_the_last_one_with_the_same_start() -> None:
    requests, spans, newer = q.LastRequests(100_000), kept_request("x"), kept_request("newer")
    assert requests.keep("ann", "talk", "start", spans)
    assert requests.get_last("ann", "other", "start") is spans
    assert requests.get_last("bob", "other", "start") is q.NOTHING_READ
    assert requests.get_last("ann", "other", "-") is q.NOTHING_READ
    assert requests.keep("ann", "other", "start", newer)
    assert requests.get_last("ann", "third", "start") is newer
    assert requests.get_last("ann", "talk", "start") is spans


@pytest.mark.parametrize("body", [
    '{"model":"m","input":["x"],"model":"m"}', "[1]", json.dumps({"input": [1] * 100}),
    json.dumps(dict.fromkeys(map(str, range(200)), 0)),
], ids=["one name twice", "a list", "many places", "many fields"])
def test_a_request_without_places_is_no_last_one(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "MAX_PLACES", 90)
    requests, spans = q.LastRequests(1 << 30), q.read_request(body.encode())
    assert not requests.keep("ann", "talk", "s", spans)
    assert requests.get_last("ann", "talk", "-") is q.NOTHING_READ


def test_a_long_name_counts() -> None:
    requests = q.LastRequests(100_000)
    assert not requests.keep("ann", "s" * 100_000, "s", kept_request("x"))
    assert requests.keep("ann", "s" * 60_000, "s", kept_request("x"))
    assert requests._held > 60_000


def test_last_requests_are_bounded_by_their_memory() -> None:
    requests, size = q.LastRequests(46_000), 6000
    for number in range(10):
        assert requests.keep("ann", str(number), "s", kept_request("x" * size))
        requests.get_last("ann", "0", "-")  # it is used
        assert 2 * size < requests._held <= 46_000
    assert [number for number in range(10) if requests.get_last("ann", str(number), "-").fields] == [0, 8, 9]
    assert not requests.keep("ann", "0", "s", kept_request("x" * 22_000))  # it is above the limit
    assert requests.get_last("ann", "0", "-") is q.NOTHING_READ  # and its conversation has a newer one
    assert requests.get_last("ann", "9", "-").fields


def test_what_has_to_go_is_freed_outside_the_lock() -> None:
    """To free a large request takes milliseconds, in which nobody else would get at the store."""
    cache, locked = q.Cache(2 * q.Cache.ENTRY_BYTES + 100), []

    class Value(bytes):
        def __del__(self) -> None:
            locked.append(cache._lock.locked())

    for name in ("one", "one", "two", "three"):
        assert cache.put("ann", "value", name, Value(b"x"))
    assert not cache.put("ann", "value", "two", Value(b"x" * 9000))
    gc.collect()
    assert locked == [False] * 4
