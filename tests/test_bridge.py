"""End to end, over real sockets: chat clients, legacy completions, and what the store remembers for them."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import wire
from conftest import RunningBridge, Start

import qoo_bridge as q

Object = dict[str, Any]
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ASKED: dict[str, Object] = {CHAT: {"messages": [{"role": "user", "content": "hi"}]}, TEXT: {"prompt": "hi"}}
ANSWER = "the answer"
BRISK = ("--keepalive", "0.05")
ANN, BOB = "ann-0123456789abcdef", "bob-0123456789abcdef"
KEYS = ("--api-key", f"ann={ANN}", "--api-key", f"bob={BOB}")
WAYS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
BOTH = pytest.mark.parametrize("path", [CHAT, TEXT])


def script(backend: wire.Backend, *replies: wire.Reply) -> None:
    """Queue the answers of the next turns; one that breaks a rule of the backend is refused all the same."""
    backend.on("/responses", *(wire.checked(backend, reply) for reply in replies))


def key_of(secret: str) -> dict[str, str]:
    """Return the header that shows a client's key."""
    return {"Authorization": f"Bearer {secret}"} if secret else {}


def ask(bridge: RunningBridge, path: str, secret: str = "", **fields: Any) -> wire.RawReply:
    """Send a request and read the whole reply."""
    return wire.post(bridge.address, path, {"model": "gpt-5.5", **fields}, key_of(secret))


def chunks(body: bytes) -> list[Any]:
    """Return the events of a chat stream, `[DONE]` as that word, comments left out; nothing may be torn."""
    *blocks, rest = body.split(b"\n\n")
    assert rest == b""
    told = [block for block in blocks if not block.startswith(b":")]
    assert all(block.startswith(b"data: ") for block in told)
    return ["[DONE]" if block == b"data: [DONE]" else json.loads(block[6:]) for block in told]


def asked_turns(backend: wire.Backend) -> list[wire.Request]:
    """Return the requests for turns that came upstream."""
    return [request for request in backend.requests if request.path.endswith("/codex/responses")]


def turns(backend: wire.Backend) -> list[Object]:
    """Return the bodies of the turns that came upstream."""
    return [request.json for request in asked_turns(backend)]


def kinds(body: Object) -> list[str]:
    """Name the items of a turn: their type, or the role of a message."""
    return [item.get("role") or item["type"] for item in body["input"]]


def text_of(choice: Object) -> str:
    """Return the text that a choice of either API brings, whole or in part."""
    inner = choice.get("message") or choice.get("delta") or {}
    return choice.get("text") or inner.get("content") or ""


# -- answers ----------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("empty_output", [True, False])
def test_whole_answer(path: str, empty_output: bool, bridge: RunningBridge, backend: wire.Backend) -> None:
    script(backend, wire.turn(*wire.text_turn(ANSWER, reasoning=True, empty_output=empty_output)))
    reply = ask(bridge, path, **ASKED[path])
    assert (reply.status, reply.header("content-type")) == (200, "application/json")
    assert reply.json["object"] == {CHAT: "chat.completion", TEXT: "text_completion"}[path]
    [choice] = reply.json["choices"]
    assert (text_of(choice), choice["finish_reason"]) == (ANSWER, "stop")
    assert choice.get("message", {}).get("reasoning_content") == {CHAT: "think", TEXT: None}[path]
    assert reply.json["usage"]["total_tokens"] == 41
    assert turns(backend)[0]["input"][0]["content"] == [{"type": "input_text", "text": "hi"}]


@BOTH
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
def test_streamed_answer(
    path: str, options: Object | None, bridge: RunningBridge, backend: wire.Backend
) -> None:
    script(backend, wire.turn(*wire.text_turn(ANSWER, reasoning=True)))
    reply = ask(bridge, path, stream=True, stream_options=options, **ASKED[path])
    assert (reply.status, reply.ended) == (200, "last-chunk")
    assert reply.header("content-type") == "text/event-stream; charset=utf-8"
    *told, done = chunks(reply.body)
    assert done == "[DONE]"
    if options and options.get("include_usage"):
        last = told.pop()
        assert (last["choices"], last["usage"]["total_tokens"]) == ([], 41)
        assert all(chunk["usage"] is None for chunk in told)
    else:
        assert not any("usage" in chunk for chunk in told)
    choices = [choice for chunk in told for choice in chunk["choices"]]
    assert "".join(map(text_of, choices)) == ANSWER
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert len({chunk["id"] for chunk in told}) == 1


@BOTH
def test_each_piece_comes_at_once(path: str, bridge: RunningBridge, backend: wire.Backend) -> None:
    gates = [threading.Event(), threading.Event()]
    first, second = wire.text_turn("one two")[:5], wire.text_turn("one two")[5:6]
    rest = wire.text_turn("one two")[6:]

    def reply(exchange: wire.Exchange) -> None:
        exchange.head()
        for events, gate in zip((first, second), gates):
            exchange.events(*events)
            assert gate.wait(5)
        exchange.events(*rest)
        exchange.finish()

    script(backend, reply)
    with wire.Client(bridge.address) as client:
        client.request("POST", path, {"model": "gpt-5.5", "stream": True, **ASKED[path]})
        client.read_head()
        for word, gate in zip(("one", " two"), gates):
            while text_of(told := read_chunk(client)["choices"][0]) != word:
                assert not text_of(told)
            gate.set()
        assert client.read_body().endswith(b"data: [DONE]\n\n")


def read_chunk(client: wire.Client) -> Object:
    """Return the next event, which is not a comment."""
    event = client.read_event()
    assert isinstance(event, dict)
    return event


@pytest.mark.parametrize("before", [0, 1, 5], ids=["nothing", "no text", "a text"])
@BOTH
def test_silence_is_filled(path: str, before: int, start: Start, backend: wire.Backend) -> None:
    events, gate = wire.text_turn(ANSWER), threading.Event()
    script(backend, wire.gated(gate, events[:before], events[before:]))
    with wire.Client(start(*BRISK).address) as client:
        client.request("POST", path, {"model": "gpt-5.5", "stream": True, **ASKED[path]})
        assert client.read_head().status == 200
        told: list[Any] = []
        while told.count("keepalive") < 2:
            told.append(client.read_event())
        gate.set()
        told += chunks(client.read_body())
    whole = [each for each in told if isinstance(each, dict)]
    assert "".join(text_of(each["choices"][0]) for each in whole) == ANSWER
    assert told[-1] == "[DONE]"


# -- failures ---------------------------------------------------------------------

HALF = wire.text_turn("half of it")[:6]
BROKE = wire.failed("server_error", "the model broke", 99)
FULL = wire.failed("rate_limit_exceeded", "slow down", 99)
LONG = wire.failed("context_length_exceeded", "too long", 99)
EARLY: dict[str, tuple[wire.Reply, int, str]] = {
    "limit": (wire.usage_limit(), 429, "The usage limit has been reached"),
    "refused": (wire.refuse(400, "No such thing"), 400, "No such thing"),
    "page": (wire.cloudflare(), 403, "web page"),
    "rate": (wire.turn(wire.created(), FULL), 429, "slow down"),
    "context": (wire.turn(wire.created(), LONG), 400, "too long"),
    "failed": (wire.turn(wire.created(), BROKE), 502, "the model broke"),
    "error": (wire.turn({"type": "error", "code": "overloaded", "message": "busy"}), 503, "busy"),
    "ended": (wire.turn(wire.created()), 502, "terminal"),
    "closed": (wire.cut(wire.created()), 502, "upstream"),
    "reset": (wire.cut(wire.created(), by="reset"), 502, "upstream"),
}
LATE: dict[str, tuple[wire.Reply, int, str]] = {
    "failed": (wire.turn(*HALF, BROKE), 502, "the model broke"),
    "rate": (wire.turn(*HALF, FULL), 429, "slow down"),
    "error": (wire.turn(*HALF, {"type": "error", "code": "overloaded", "message": "busy"}), 503, "busy"),
    "ended": (wire.turn(*HALF), 502, "terminal"),
    "closed": (wire.cut(*HALF), 502, "upstream"),
    "reset": (wire.cut(*HALF, by="reset"), 502, "upstream"),
}


@BOTH
@WAYS
@pytest.mark.parametrize("name", EARLY)
def test_failure_before_the_first_byte_is_a_status(
    name: str, stream: bool, path: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    reply_of, status, text = EARLY[name]
    script(backend, reply_of)
    reply = ask(bridge, path, stream=stream, **ASKED[path])
    assert (reply.status, reply.header("content-type")) == (status, "application/json")
    assert text in reply.json["error"]["message"]
    assert set(reply.json["error"]) >= {"message", "type", "param", "code"}


@BOTH
@pytest.mark.parametrize("name", LATE)
def test_failure_within_a_stream_is_never_a_clean_end(
    name: str, path: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    reply_of, _, text = LATE[name]
    script(backend, reply_of)
    reply = ask(bridge, path, stream=True, stream_options={"include_usage": True}, **ASKED[path])
    assert (reply.status, reply.ended) == (200, "cut")
    *told, error = chunks(reply.body)
    assert "".join(text_of(chunk["choices"][0]) for chunk in told) == "half of"
    assert not any(chunk["choices"][0]["finish_reason"] for chunk in told)
    assert text in error["error"]["message"]
    assert set(error["error"]) >= {"message", "type", "param", "code"}


@BOTH
@pytest.mark.parametrize("name", LATE)
def test_failure_is_a_status_where_one_answer_is_due(
    name: str, path: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    reply_of, status, text = LATE[name]
    script(backend, reply_of)
    reply = ask(bridge, path, **ASKED[path])
    assert reply.status == status
    assert text in reply.json["error"]["message"]


@BOTH
def test_failure_after_a_comment_is_an_error_in_the_stream(
    path: str, start: Start, backend: wire.Backend
) -> None:
    gate = threading.Event()
    script(backend, wire.gated(gate, [wire.created()], [FULL]))
    with wire.Client(start(*BRISK).address) as client:
        client.request("POST", path, {"model": "gpt-5.5", "stream": True, **ASKED[path]})
        head = client.read_head()
        assert client.read_event() == "keepalive"
        gate.set()
        [error] = chunks(client.read_body())
    assert error["error"]["message"] == "slow down"
    assert (head.status, head.ended) == (200, "cut")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"n": 2}, "n"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "odd"}]}, "messages[0].role"),
        (TEXT, {"prompt": ["a", "b"]}, "prompt"),
        (TEXT, {"echo": True}, "echo"),
    ],
)
@WAYS
def test_what_cannot_be_done_costs_no_turn(
    path: str, fields: Object, param: str, stream: bool, bridge: RunningBridge, backend: wire.Backend
) -> None:
    reply = ask(bridge, path, **{**ASKED[path], "stream": stream, **fields})
    assert (reply.status, reply.json["error"]["param"]) == (400, param)
    assert turns(backend) == []


# -- the tool loop of chat clients: the reasoning comes back ----------------------------------


def say(bridge: RunningBridge, messages: list[Object], stream: bool, secret: str = "") -> Object:
    """Ask as a chat client does; return the assistant's message, put together from its pieces."""
    reply = ask(bridge, CHAT, secret, messages=messages, stream=stream)
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


USER = {"role": "user", "content": "hi"}


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


def respond(bridge: RunningBridge, stream: bool = False, secret: str = "", **fields: Any) -> Object:
    """Ask for a response that goes well, and return it."""
    reply = ask(bridge, RESPONSES, secret, stream=stream, **fields)
    assert reply.status == 200, reply.body
    response: Object = wire.sse(reply.body)[-1]["response"] if stream else reply.json
    return response


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


def test_a_refused_request_is_logged_with_its_model(bridge: RunningBridge) -> None:
    assert ask(bridge, RESPONSES, input="hi", previous_response_id="resp_unknown").status == 400
    while not bridge.bridge.telemetry.snapshot(0)["recent"]:  # noted when the client has its answer
        threading.Event().wait(0.001)
    assert bridge.bridge.telemetry.snapshot(0)["recent"][0]["model"] == "gpt-5.5"


def test_what_lies_below_a_response_is_not_served(bridge: RunningBridge) -> None:
    name = respond(bridge, False, input="one")["id"]
    reply = wire.get(bridge.address, f"/v1/responses/{name}/input_items")
    assert (reply.status, reply.json["error"]["code"]) == (404, "not_found")
    assert "there is nothing at" in reply.json["error"]["message"]


def test_store_keeps_the_rest_when_one_is_too_large() -> None:
    store = q.Store(10_000)
    store.put("ann", "turn", "small", 1, 100)
    store.put("bob", "turn", "large", 2, 20_000)
    assert (store.get("ann", "turn", "small"), store.get("bob", "turn", "large")) == (1, None)


@pytest.mark.parametrize("previous", ["resp_unknown", "", 1, True, [], {}])
def test_unknown_previous_response_is_400(
    previous: object, bridge: RunningBridge, backend: wire.Backend
) -> None:
    reply = ask(bridge, RESPONSES, input="hi", previous_response_id=previous)
    assert (reply.status, reply.json["error"]["param"]) == (400, "previous_response_id")
    assert "not known" in reply.json["error"]["message"]
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
        fields = key_of(secret)
        reference = {"type": "item_reference", "id": reasoning["id"]}
        got = wire.get(bridge.address, f"{RESPONSES}/{name}", fields)
        asked = ask(bridge, RESPONSES, secret, input="hi", previous_response_id=name)
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
    assert ask(bridge, RESPONSES, input="hi", previous_response_id=name).status == 400
    respond(bridge, input=[USER, {"type": "item_reference", "id": reasoning["id"]}])
    assert kinds(turns(backend)[-1]) == ["user"]


def test_turn_that_failed_midway_is_not_continued(bridge: RunningBridge, backend: wire.Backend) -> None:
    script(backend, wire.cut(*wire.text_turn(ANSWER, response_id="resp_cut")[:-1]))
    assert ask(bridge, RESPONSES, input="hi").status == 502
    assert ask(bridge, RESPONSES, input="hi", previous_response_id="resp_cut").status == 400


# -- the store's bound ------------------------------------------------------------


def test_least_recently_used_goes_first() -> None:
    store = q.Store(4 * (1000 + 500))
    for name in "abcd":
        store.put("ann", "item", name, name, 1000)
    assert store.get("ann", "item", "a") == "a"  # used: b is the oldest now
    store.put("ann", "item", "e", "e", 1000)
    assert [store.get("ann", "item", name) for name in "abcde"] == ["a", None, "c", "d", "e"]


def test_entry_that_is_put_again_counts_once() -> None:
    store = q.Store(2 * (1000 + 500))
    store.put("ann", "item", "a", "a", 1000)
    for value in range(50):
        store.put("ann", "item", "b", value, 1000)
    assert [store.get("ann", "item", name) for name in "ab"] == ["a", 49]


def test_entry_above_the_bound_is_not_kept() -> None:
    store = q.Store(1000)
    store.put("ann", "item", "a", "a", 1001)
    assert store.get("ann", "item", "a") is None
    store.put("ann", "item", "b", "b", 1)
    assert store.get("ann", "item", "b") == "b"


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
    assert ask(bridge, RESPONSES, input="hi", previous_response_id=names[0]).status == 400
    assert ask(bridge, RESPONSES, input="hi", previous_response_id=names[-1]).status == 200


def test_long_conversation_stays_within_the_bound(
    monkeypatch: pytest.MonkeyPatch, start: Start, backend: wire.Backend
) -> None:
    monkeypatch.setattr(q, "STORE_SIZE", 60_000)
    bridge = start()
    name, statuses = None, []
    for number in range(20):  # 160 KB in all: at some turn the conversation is too long to be kept
        reply = ask(bridge, RESPONSES, input=f"{number} {'x' * 4000}", previous_response_id=name)
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
    ask(bridge, RESPONSES, input=[USER, *[{"type": reference, "id": message["id"]} for _ in range(500)]])
    assert max(len(request.body) for request in asked_turns(backend)) <= 64 * 1024


# -- bytes --------------------------------------------------------------------------

UNTOUCHED = r"""
{ "stream" :true,	"input":[ {"role":"user", "type":"message","content":"caf\u00e9 \/ café \ud83d\ude00"} ],
  "model":"gpt-5.5" , "store": false,"prompt_cache_key":"mine","include":["reasoning.encrypted_content"],
  "tools":[{"parameters":{"maximum":1.0e2,"minimum":-0,"multipleOf":0.10},"name":"f","type":"function"}],
  "instructions":"","text":{ "verbosity":"low"  } }
"""


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_untouched_request_is_sent_byte_for_byte(
    line_end: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    sent = UNTOUCHED.replace("\n", line_end).encode()
    reply = wire.post(bridge.address, RESPONSES, sent)
    assert (reply.status, reply.ended) == (200, "last-chunk")
    assert [request.body for request in asked_turns(backend)] == [sent]
    assert backend.refusals == []
