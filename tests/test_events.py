"""Room events: bytes to events, fed three ways with every line ending; the fold into one response."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from conftest import cuts
from help import Object, short

import qoo_bridge as q

ODD_VALUES: tuple[Any, ...] = (None, True, 0, -1, 1.5, 10**30, "", "odd", [], [None], [[]], {}, {"odd": 1})
ODD_COUNTS: tuple[Any, ...] = (None, "1", 1.5, True, [], {})


# -- bytes to events ----------------------------------------------------------

TEXTS = ["a", "", "a\u2028b\u2029c\x85d\x0be", "\U0001f600 \n \r\n", "data: x", "x" * 300]
EVENTS = [{"type": "response.output_text.delta", "delta": text} for text in TEXTS]
ENDINGS = [b"\n", b"\r\n", b"\r"]


def stream(*endings: bytes) -> bytes:
    """Write EVENTS and a comment, with the line endings in turn."""
    lines = [b": comment", b""]
    for event in EVENTS:
        lines += [b"event: response.output_text.delta", b"id: 1", b"data: " + q.json_bytes(event), b""]
    return b"".join(line + endings[at % len(endings)] for at, line in enumerate(lines))


@pytest.mark.parametrize("endings", [*[(end,) for end in ENDINGS], (b"\r\n", b"\n"),
                                     (b"\n", b"\n", b"\r\n", b"\r\n")])
def test_events_fed_three_ways(endings: tuple[bytes, ...]) -> None:
    for pieces in cuts(stream(*endings)):
        events = q.Events()
        parsed = [q.event_json(event) for piece in pieces for event in q.split_events(events.feed(piece))]
        assert [event for event in parsed if event is not None] == EVENTS


@pytest.mark.parametrize("endings", [
    (b"\n",), (b"\r",), (b"\r\n",),
])
def test_nothing_is_lost_or_kept_back(endings: tuple[bytes, ...]) -> None:
    raw = stream(*endings)
    for pieces in cuts(raw):
        events = q.Events()
        fed = [events.feed(piece) for piece in pieces]
        assert events._size == 0
        assert b"".join(fed) == raw
        assert b"".join(piece for whole in fed for piece in q.split_events(whole)) == raw


@pytest.mark.parametrize("end", [b"\n", b"\r"])
def test_an_event_is_given_with_its_last_byte(end: bytes) -> None:
    events = q.Events()
    event = b"data: 1" + end + end
    for _ in range(3):
        assert [events.feed(event[:5]), events._size > 0] == [b"", True]
        assert [events.feed(event[5:-1]), events._size > 0] == [b"", True]
        assert [events.feed(event[-1:]), events._size > 0] == [event, False]


def test_what_follows_a_whole_event_is_kept() -> None:
    events = q.Events()
    assert events.feed(b"data: 1\n\ndata: 2\n\ndata") == b"data: 1\n\ndata: 2\n\n"
    assert events._size > 0
    assert events.feed(b"") == b""
    assert events.feed(b": 3\n") == b""
    assert events.feed(b"\ndata: 4\n") == b"data: 3\n\n"
    assert events.feed(b"\n\n: 5\n\n: 6") == b"data: 4\n\n\n: 5\n\n"
    assert events.feed(b"\r\n\r\n: 7\r\n\r\n: 8") == b": 6\r\n\r\n: 7\r\n\r\n"
    assert events._size > 0


def test_a_whole_event_does_not_wait_for_the_next_ones_last_byte() -> None:
    events = q.Events()
    assert events.feed(b"data: 1\r\n\r\ndata: 2\r\n\r") == b"data: 1\r\n\r\n"
    assert events.feed(b"\n") == b"data: 2\r\n\r\n"


def test_one_line_end_is_no_blank_line() -> None:
    for end in ENDINGS:
        for pieces in cuts(b"data: 1" + end + b"data: 2" + end, 3):
            events = q.Events()
            assert b"".join(map(events.feed, pieces)) == b""
            assert events._size > 0


def test_one_byte_is_a_part_of_an_event() -> None:
    events = q.Events()
    assert events._size == 0
    events.feed(b"d")
    assert events._size > 0


@pytest.mark.parametrize("raw", [b"x" * 101, b"data: 1\n\n" + b"x" * 101, b"x\r\n" * 40])
def test_an_event_has_a_limit(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr(q, "MAX_EVENT", 100)
    for pieces in cuts(raw):
        with pytest.raises(q.BadUpstream, match="more than 100 bytes"):
            list(map(q.Events().feed, pieces))


def test_an_event_up_to_the_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "MAX_EVENT", 100)
    for pieces in cuts(b"x" * 100):
        events = q.Events()
        assert b"".join(map(events.feed, pieces)) == b""
        assert events._size > 0


def test_many_small_events_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "MAX_EVENT", 100)
    for raw in (b"data: 1\n\n" * 50, b"data: 1\r\n\r\n" * 50):
        events = q.Events()
        assert len(b"".join(events.feed(raw[at:at + 7]) for at in range(0, len(raw), 7))) >= len(raw) - 1


@pytest.mark.parametrize(("whole", "pieces"), [
    (b"", []), (b": 1\n\n: 2\n\n", [b": 1\n\n", b": 2\n\n"]),
    (b": 1\r\n\r\n: 2\r\r", [b": 1\r\n\r\n", b": 2\r\r"]),
    (b": 1\n\n\n: 2\n\n", [b": 1\n\n", b"\n: 2\n\n"]), (b"\xe2\x80\xa8\n\n", [b"\xe2\x80\xa8\n\n"]),
    (b"a\n\r\nb\r\n\n", [b"a\n\r\n", b"b\r\n\n"]),
])
def test_split_events(whole: bytes, pieces: list[bytes]) -> None:
    assert q.split_events(whole) == pieces


@pytest.mark.parametrize(("event", "parsed"), [
    (b'data: {"a": 1}\n\n', {"a": 1}), (b'data:{"a": 1}\n\n', {"a": 1}),
    (b'event: x\r\ndata: {"a": 1}\r\n\r\n', {"a": 1}),
    (b'data: {"a":\rdata: 1}\r\r', {"a": 1}), (b'data: {"a": "\xe2\x80\xa8"}\n\n', {"a": "\u2028"}),
    (b'data: {"a": "\\ud800"}\n\n', {"a": "\ud800"}), (b'id: 1\ndata: {}\nretry: 5\n\n', {}),
    *[(event, None) for event in (
        b"", b"\n\n", b": comment\n\n", b"event: x\n\n", b"data\n\n", b"data:\n\n", b"data: [DONE]\n\n",
        b"data: [1]\n\n",
        b"data: 1\n\n", b"data: null\n\n", b'data: "x"\n\n', b"data: {\n\n", b"data: {}{}\n\n",
        b'data: {"a": "\xff"}\n\n',
        b'data: {"a": NaN}\n\n', b'data: {"a": [-Infinity]}\n\n', b'data: {"a": 1e999}\n\n',
        b" data: {}\n\n", b"DATA: {}\n\n", b"xdata: {}\n\n", b"data: " + b"[" * 100_000 + b"\n\n")],
], ids=short)
def test_event_json(event: bytes, parsed: Object | None) -> None:
    assert q.event_json(event) == parsed


@pytest.mark.parametrize(("parsed", "kind"), [
    ({"type": "x"}, "x"), ({}, ""), (None, ""),
    *[({"type": odd}, "") for odd in ODD_VALUES if not isinstance(odd, str)],
])
def test_event_type(parsed: Object | None, kind: str) -> None:
    assert q.event_type(parsed) == kind


def test_render_event() -> None:
    event = {"type": "response.completed", "response": {"output": ["\u2028\n\r\n"]}}
    raw = q.render_event(event)
    assert raw.startswith(b'event: response.completed\ndata: {"type":"response.completed",')
    assert q.split_events(raw) == [raw]
    assert q.event_json(raw) == event


@pytest.mark.parametrize("kind", ["x\n\ndata: [DONE]", "x\r", "a b", "\u2028", "x" * 101, ""])
def test_a_type_that_is_no_word_has_no_event_line(kind: str) -> None:
    raw = q.render_event({"type": kind})
    assert raw.startswith(b"data: ")
    assert q.split_events(raw) == [raw]
    assert q.event_json(raw) == {"type": kind}


def test_keepalives_are_whole_events() -> None:
    assert q.split_events(q.KEEPALIVE_EVENT) == [q.KEEPALIVE_EVENT]
    assert q.event_json(q.KEEPALIVE_EVENT) == {"type": "keepalive"}
    assert q.split_events(q.KEEPALIVE_COMMENT) == [q.KEEPALIVE_COMMENT]
    assert q.KEEPALIVE_COMMENT.startswith(b":")


# -- the fold -----------------------------------------------------------------


def done(index: Any, item: Any) -> Object:
    return {"type": "response.output_item.done", "output_index": index, "item": item}


def terminal(kind: str = "completed", **response: Any) -> Object:
    return {"type": f"response.{kind}", "response": {"id": "resp_1", **response}}


EMPTY_OUTPUTS: tuple[Object, ...] = ({"output": []}, {}, {"output": None})


def folded(*events: Object) -> q.ResponseAssembler:
    fold = q.ResponseAssembler()
    for event in events:
        fold.add(event)
    return fold


@pytest.mark.parametrize(("events", "output"), [
    ([done(0, "a"), done(1, "b")], ["a", "b"]),
    ([done(2, "c"), done(0, "a"), done(10, "d"), done(1, "b")], ["a", "b", "c", "d"]),
    ([done(0, "a"), done(0, "b")], ["b"]),
    ([done(None, "a"), done("1", "b"), done(True, "c"), done([], "d")], ["a", "b", "c", "d"]),
    ([{"type": "response.output_item.added", "output_index": 0, "item": "x"}, {"type": ["odd"]}, {},
      done(0, "a")], ["a"]),
])
def test_empty_output_is_filled_in_order(events: list[Object], output: list[str]) -> None:
    for given in EMPTY_OUTPUTS:
        fold = folded(*events, terminal(usage={"input_tokens": 1}, **given))
        assert fold.response() == {"id": "resp_1", "usage": {"input_tokens": 1}, "output": output}
        assert fold.final == terminal(usage={"input_tokens": 1}, output=output)


def test_an_item_without_an_index_displaces_none() -> None:
    assert folded(done(1, "a"), done(None, "b"), terminal()).response()["output"] == ["a", "b"]


def test_items_kept_as_bytes_count_too() -> None:
    fold = folded(terminal(output=[]))
    for event in (done(1, "b"), done(0, "a")):
        fold.keep(q.render_event(event))
    fold.keep(b"data: response.output_item.done, but no JSON\n\n")
    assert fold.fill()
    assert fold.response()["output"] == ["a", "b"]
    assert not fold.fill()


def test_kept_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (q.render_event(done(index, "x" * 50)) for index in (0, 1))
    for limit, overflowed in ((len(first) + len(second) - 1, True), (len(first) + len(second), False)):
        monkeypatch.setattr(q, "MAX_EVENT", limit)
        fold = folded(terminal())
        fold.keep(first)
        fold.keep(second)
        assert fold.response()["output"] == ([] if overflowed else ["x" * 50] * 2)  # all items or none
        assert fold.overflowed is overflowed


@pytest.mark.parametrize("event", [
    terminal(output=["kept"]), {"type": "response.completed"},
    {"type": "response.completed", "response": "odd"},
    {"type": "response.completed", "response": ["odd"]}, {"type": "response.created", "response": {}},
])
def test_nothing_to_fill(event: Object) -> None:
    fold = folded(done(0, "a"), event)
    assert not fold.fill()
    assert fold.final == (None if event["type"] == "response.created" else event)


def test_no_items_leave_the_output_as_it_is() -> None:
    fold = folded(terminal(output=[]))
    assert not fold.fill()
    assert fold.response() == {"id": "resp_1", "output": []}


def test_the_events_given_are_not_changed() -> None:
    event = terminal(output=[])
    assert folded(done(0, "a"), event).response()["output"] == ["a"]
    assert event == terminal(output=[])


def test_incomplete_is_kept() -> None:
    response = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    assert folded(done(0, "a"), terminal("incomplete", **response)).response() == {
        "id": "resp_1", **response, "output": ["a"]}


@pytest.mark.parametrize(("event", "status", "message"), [
    (terminal("failed", error={"code": "rate_limit_exceeded", "message": "slow"}), 429, "slow"),
    (terminal("failed", error={"code": "server_is_overloaded"}), 503, "server_is_overloaded"),
    (terminal("failed", error={"code": "context_length_exceeded", "message": "long"}), 400, "long"),
    (terminal("failed", error={"code": "invented", "message": "m"}), 502, "m"),
    (terminal("failed"), 502, "upstream reported a failure"),
    ({"type": "response.failed", "response": 5}, 502, "upstream reported a failure"),
    ({"type": "error", "error": {"type": "usage_limit_reached", "message": "m"}, "status": 429}, 429, "m"),
    ({"type": "error", "code": "invalid_prompt", "message": "m", "param": None}, 400, "m"),
    ({"type": "error"}, 502, "upstream reported a failure"),
    ({"type": "error", "error": {}}, 502, "upstream reported a failure"),
    ({"type": "response.created"}, 502, "without a terminal event"),
])
def test_failures(event: Object, status: int, message: str) -> None:
    with pytest.raises(q.BridgeError) as caught:
        folded(done(0, "a"), event).response()
    assert caught.value.status == status
    assert message in caught.value.message


def test_a_terminal_event_counts_more_than_an_error() -> None:
    assert folded({"type": "error", "message": "m"}, terminal()).response() == {"id": "resp_1", "output": []}


def test_odd_values_raise_nothing_else() -> None:
    """Put each odd value in each place: there is an answer, or a BridgeError."""
    for odd in ODD_VALUES:
        for event in (
            done(odd, "a"), done(0, odd), terminal(output=odd), terminal("failed", error=odd),
            terminal("failed", error={"code": odd, "message": odd, "type": odd}), terminal(usage=odd),
            {"type": odd}, {"type": "error", "error": odd}, {"type": "error", "message": odd, "code": odd},
            {"type": "response.completed", "response": odd},
        ):
            for last in ([], [terminal()]):
                try:
                    json.dumps(folded(done(0, "a"), event, *last).response())
                except q.BridgeError as exc:
                    json.dumps(exc.body())


@pytest.mark.parametrize(("usage", "counts"), [
    ({"input_tokens": 10, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 4},
      "output_tokens_details": {"reasoning_tokens": 2}},
      {"input": 10, "cached": 4, "output": 5, "reasoning": 2}),
    ({"input_tokens": 0}, {"input": 0}),
    ({"input_tokens_details": {"cached_tokens": 4}}, {"cached": 4}),
    *[({"input_tokens": odd, "output_tokens": odd, "input_tokens_details": odd,
        "output_tokens_details": {"reasoning_tokens": odd}}, {}) for odd in ODD_COUNTS],
    *[(odd, {}) for odd in ODD_COUNTS],
])
def test_usage_counts(usage: Any, counts: dict[str, int]) -> None:
    assert q.token_counts({"usage": usage}) == counts


@pytest.mark.parametrize("response", [None, 5, "x", [], {}, True])
def test_usage_counts_of_an_odd_response(response: Any) -> None:
    assert q.token_counts(response) == {}


def test_an_event_in_small_reads_with_crlf_is_looked_at_once() -> None:
    events, piece = q.Events(), b"x" * 1400
    assert events.feed(b"data: a\r\n\r\n")
    begun = time.process_time()
    assert events.feed(b"data: ") == b""
    for _ in range(6_000):  # 8 MB; 5 s where each read looks at all before it
        assert events.feed(piece) == b""
    assert len(events.feed(b"\r\n\r\n")) == 6 + 6_000 * 1400 + 4
    assert time.process_time() - begun < 1
