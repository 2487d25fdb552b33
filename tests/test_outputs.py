"""Room outputs: events that end a turn, and events that no SDK knows."""

from __future__ import annotations

import threading

import pytest
import wire
from conftest import RunningBridge
from help import (
    CODEX,
    EACH_API,
    MODEL,
    OTHER,
    STREAM,
    Object,
    ask,
    asking,
    until,
)

# -- a bare `error` of a stream ---------------------------------------------------------

ERRORS: dict[str, tuple[Object, Object]] = {  # the event, and the error that Codex is to be shown
    "limit": (
        {"type": "error", "error": {"code": "rate_limit_exceeded", "message": "slow down"}},
        {"code": "rate_limit_exceeded", "message": "slow down"}),
    "server": (
        {"type": "error", "error": {"type": "server_error", "code": "server_error", "message": "it broke"}},
        {"code": "server_error", "message": "it broke"}),
    "policy": (
        {"type": "error", "sequence_number": 2, "error": {"code": "cyber_policy", "message": "no"}},
        {"code": "cyber_policy", "message": "no"}),
    "context": (
        {"type": "error", "error": {"code": "context_length_exceeded", "type": "invalid_request_error",
                                    "message": "Your input exceeds the context window", "param": "input"}},
        {"code": "context_length_exceeded", "message": "Your input exceeds the context window"}),
    "flat": ({"type": "error", "code": "overloaded", "message": "busy", "param": None},
             {"code": "overloaded", "message": "busy"}),
    "usage": (
        {"type": "error", "status_code": 429, "headers": {"X-Codex-Plan-Type": "plus"},
         "error": {"type": "usage_limit_reached", "message": "The usage limit has been reached",
                   "plan_type": "plus", "resets_at": 1777936568}},
        {"message": "The usage limit has been reached"}),
}
EACH_ERROR = pytest.mark.parametrize(("event", "shown"), ERRORS.values(), ids=ERRORS)
BEGUN: dict[str, list[Object]] = {
    "nothing": [], "created": [wire.created("resp_1")],
    "half": wire.text_turn("half of it", response_id="resp_1")[:6],
}
EACH_BEGINNING = pytest.mark.parametrize("begun", BEGUN.values(), ids=BEGUN)


@EACH_ERROR
@EACH_BEGINNING
def test_a_codex_gets_a_bare_error_as_the_failure_that_ends_its_turn(
    shared_bridge: RunningBridge, shared_backend: wire.Backend, begun: list[Object], event: Object,
    shown: Object,
) -> None:
    shared_backend.on("/responses", wire.turn(*begun, event))
    reply = ask(shared_bridge, STREAM, CODEX)
    assert reply.ended == "last-chunk"
    *before, last = wire.sse(reply.body)
    assert [each["type"] for each in before] == [each["type"] for each in begun]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert {name: last["response"]["error"].get(name) for name in shown} == shown
    if begun:
        assert last["response"]["id"] == "resp_1"
    assert "code" in last["response"]["error"]  # Codex reads it


@EACH_ERROR
def test_an_error_with_its_failure_behind_it_gives_a_codex_one(
    bridge: RunningBridge, backend: wire.Backend, event: Object, shown: Object
) -> None:
    failed = wire.failed("of_upstream", "as upstream says", 3)
    backend.on("/responses", wire.turn(wire.created("resp_1"), event, failed))
    kinds = [each["type"] for each in wire.sse(ask(bridge, STREAM, CODEX).body)]
    assert kinds == ["response.created", "response.failed"]


def test_a_codex_hears_of_an_error_at_once(bridge: RunningBridge, backend: wire.Backend) -> None:
    gate, (event, _) = threading.Event(), ERRORS["server"]
    backend.on("/responses", wire.gated(gate, [wire.created("resp_1"), event], []))
    with asking(bridge, STREAM, CODEX) as client:
        client.sock.settimeout(0.8)
        try:
            client.read_head()
            kinds = [each["type"] for each in client.read_events()]  # up to the end of the body
        finally:
            gate.set()
    assert kinds == ["response.created", "response.failed"]


@EACH_ERROR
@EACH_BEGINNING
@pytest.mark.parametrize("failed", [[], [wire.failed("server_error", "it broke", 3)]], ids=["bare", "both"])
def test_other_clients_get_an_error_as_it_is(
    shared_bridge: RunningBridge, shared_backend: wire.Backend, failed: list[Object], begun: list[Object],
    event: Object, shown: Object,
) -> None:
    shared_backend.on("/responses", wire.turn(*begun, event, *failed))
    behind = failed if begun else []  # as the first event an `error` is the whole answer
    assert wire.sse(ask(shared_bridge, STREAM, OTHER).body) == [*begun, event, *behind]


def test_an_error_of_a_codex_is_counted_as_one(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", wire.turn(wire.created(), ERRORS["policy"][0]))
    ask(bridge, STREAM, CODEX)
    assert until(lambda: wire.get(bridge.address, "/status").json["errors"] != [])
    (error,) = wire.get(bridge.address, "/status").json["errors"]
    assert (error["by"], error["code"]) == ("upstream", "cyber_policy")


# -- events that no SDK knows ---------------------------------------------------------------

SIDE: dict[str, Object] = {
    "limits": wire.rate_limits_frame(), "metadata": wire.metadata_frame('W/"of-upstream"'),
    "timing": wire.timing_frame(), "of-tomorrow": {"type": "codex.of_tomorrow", "a": 1},
    "responsesapi-of-tomorrow": {"type": "responsesapi.of_tomorrow"},
}
FIRST, *REST = wire.text_turn("hello there", empty_output=False)


def with_side_events(*side: Object) -> wire.Reply:
    """Answer with these events before the first one, in the middle, and before the last one."""
    return wire.turn(*side, FIRST, *side, *REST[:-1], *side, REST[-1])


@pytest.mark.parametrize("event", [wire.keepalive(7), *SIDE.values()], ids=["keepalive", *SIDE])
def test_a_codex_gets_the_events_that_are_its_own(
    bridge: RunningBridge, backend: wire.Backend, event: Object
) -> None:
    backend.on("/responses", with_side_events(event))
    events = wire.sse(ask(bridge, STREAM, CODEX).body)
    kinds = [each["type"] for each in events]
    assert kinds.count(event["type"]) == 3
    assert len(events) == len([FIRST, *REST]) + 3


@pytest.mark.parametrize("event", SIDE.values(), ids=SIDE)
def test_other_clients_get_nothing_of_a_codexs_events(
    bridge: RunningBridge, backend: wire.Backend, event: Object
) -> None:
    backend.on("/responses", with_side_events(event))
    reply = ask(bridge, STREAM, OTHER)
    assert wire.sse(reply.body) == [FIRST, *REST]
    assert event["type"].encode() not in reply.body


def test_other_clients_get_a_comment_for_a_keepalive(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/responses", with_side_events(wire.keepalive(7)))
    reply = ask(bridge, STREAM, OTHER)
    assert wire.sse(reply.body) == [FIRST, *REST]
    assert b"event: keepalive" not in reply.body
    comments = [block for block in reply.body.split(b"\n\n") if block.startswith(b":")]
    assert len(comments) == 3


def test_a_comment_for_a_keepalive_comes_at_once(bridge: RunningBridge, backend: wire.Backend) -> None:
    gate = threading.Event()
    backend.on("/responses", wire.gated(gate, [FIRST, wire.keepalive(7)], REST))
    with asking(bridge, STREAM, OTHER) as client:
        client.read_head()
        try:
            assert client.read_event() == FIRST
            assert isinstance(client.read_event(), str)
        finally:
            gate.set()
        assert client.read_events() == REST


@pytest.mark.parametrize("event", [wire.keepalive(7), *SIDE.values()], ids=["keepalive", *SIDE])
@EACH_API
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_no_answer_is_changed_by_such_events(
    shared_bridge: RunningBridge, shared_backend: wire.Backend, stream: bool, path: str, body: Object,
    event: Object,
) -> None:
    replies = []
    for reply in (wire.turn(FIRST, *REST), with_side_events(event)):
        shared_backend.on("/responses", reply)
        answer = ask(shared_bridge, {**MODEL, **body}, OTHER, path=path, stream=stream)
        events = wire.sse(answer.body.replace(b"data: [DONE]\n\n", b"")) if stream else [answer.json]
        replies.append([{**each, "id": "", "created": 0} for each in events])
    assert replies[0] == replies[1]


def test_a_torn_side_event_is_taken_out_whole(bridge: RunningBridge, backend: wire.Backend) -> None:
    def drop_by_drop(exchange: wire.Exchange) -> None:
        exchange.head()
        for event in (SIDE["limits"], FIRST, SIDE["timing"], *REST):
            raw = wire.sse_bytes(event)
            for at in range(0, len(raw), 7):
                exchange.chunk(raw[at:at + 7])
        exchange.finish()

    backend.on("/responses", drop_by_drop)
    assert wire.sse(ask(bridge, STREAM, OTHER).body) == [FIRST, *REST]


def test_a_text_that_speaks_of_such_events_stays(bridge: RunningBridge, backend: wire.Backend) -> None:
    turn = wire.text_turn('{"type":"keepalive"} and "type":"codex.rate_limits" "type":"error"')
    backend.on("/responses", wire.turn(*turn))
    received = wire.sse(ask(bridge, STREAM, OTHER).body)
    assert [each["type"] for each in received] == [each["type"] for each in turn]
    assert received[:-1] == turn[:-1]
