"""Room chat answers: event scripts to chunks and to one answer, which agree."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import wire
from conftest import RunningBridge
from help import CHAT, MODEL, USER, Object, ask, chunks, mutants

import qoo_bridge as q

USAGE = {
    "input_tokens": 100,
    "input_tokens_details": {"cached_tokens": 64},
    "output_tokens": 20,
    "output_tokens_details": {"reasoning_tokens": 7},
    "total_tokens": 120,
}
CHAT_USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 20,
    "total_tokens": 120,
    "prompt_tokens_details": {"cached_tokens": 64},
    "completion_tokens_details": {"reasoning_tokens": 7},
}


def text_part(text: str, *annotations: Object) -> Object:
    return {"type": "output_text", "text": text, "annotations": list(annotations)}


def citation(start: int, end: int) -> Object:
    return {
        "type": "url_citation",
        "start_index": start,
        "end_index": end,
        "title": "t",
        "url": "https://a.example",
    }


def chat_citation(start: int, end: int) -> Object:
    fields = {key: value for key, value in citation(start, end).items() if key != "type"}
    return {"type": "url_citation", "url_citation": fields}


def message(*parts: Object) -> Object:
    return {"type": "message", "role": "assistant", "content": list(parts)}


def reasoning(*summary: str, raw: tuple[str, ...] = ()) -> Object:
    return {
        "type": "reasoning",
        "encrypted_content": "gAAAA",
        "summary": [{"type": "summary_text", "text": text} for text in summary],
        "content": [{"type": "reasoning_text", "text": text} for text in raw],
    }


def function_call(call_id: str, arguments: str, name: str = "look") -> Object:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def custom_call(call_id: str, text: str) -> Object:
    return {"type": "custom_tool_call", "call_id": call_id, "name": "patch", "input": text}


def chat_call(call_id: str, arguments: str, name: str = "look") -> Object:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


STEMS = {
    "output_text": ("response.output_text", "text", "content_index", "content_part"),
    "refusal": ("response.refusal", "refusal", "content_index", "content_part"),
    "summary_text": ("response.reasoning_summary_text", "text", "summary_index", "reasoning_summary_part"),
    "reasoning_text": ("response.reasoning_text", "text", "content_index", "content_part"),
    "function_call": ("response.function_call_arguments", "arguments", "", ""),
    "custom_tool_call": ("response.custom_tool_call_input", "input", "", ""),
}


def text_events(part: Object, index: int, place: Object) -> Iterator[Object]:
    stem, field, index_field, part_name = STEMS[part["type"]]
    place = {**place, index_field: index} if index_field else place
    if part_name:
        yield {"type": f"response.{part_name}.added", "part": {**part, field: ""}, **place}
    text = part[field]
    for at in range(0, len(text), 3):
        yield {"type": f"{stem}.delta", "delta": text[at : at + 3], **place}
    yield {"type": f"{stem}.done", field: text, **place}
    for number, annotation in enumerate(part.get("annotations", ())):
        added = {"annotation": annotation, "annotation_index": number}
        yield {"type": "response.output_text.annotation.added", **added, **place}
    if part_name:
        yield {"type": f"response.{part_name}.done", "part": part, **place}


def item_events(index: int, item: Object) -> Iterator[Object]:
    item = {**item, "id": f"item_{index}"}
    place = {"output_index": index, "item_id": item["id"]}
    empty = {
        **item,
        **{field: "" for field in ("arguments", "input") if field in item},
        "status": "in_progress",
    }
    empty.update({field: [] for field in ("content", "summary") if field in item})
    yield {"type": "response.output_item.added", "output_index": index, "item": empty}
    if item["type"] in STEMS:
        yield from text_events(item, 0, place)
    for field in ("summary", "content"):
        for number, part in enumerate(item.get(field, ())):
            yield from text_events(part, number, place)
    yield {"type": "response.output_item.done", "output_index": index, "item": item}


def response_of(script: list[Object], reason: str | None = None) -> Object:
    return {
        "id": "resp_1",
        "status": "incomplete" if reason else "completed",
        "incomplete_details": {"reason": reason} if reason else None,
        "output": script,
        "usage": USAGE,
    }


def events_of(script: list[Object], reason: str | None = None) -> list[Object]:
    start = [
        {"type": f"response.{word}", "response": {"id": "resp_1"}} for word in ("created", "in_progress")
    ]
    body = [event for index, item in enumerate(script) for event in item_events(index, item)]
    end = {
        "type": "response.incomplete" if reason else "response.completed",
        "response": response_of(script, reason),
    }
    return [*start, *body, end]


SCRIPTS: dict[str, tuple[list[Object], Object]] = {
    "text": ([message(text_part("Hello world"))], {"content": "Hello world"}),
    "nothing": ([], {"content": ""}),
    "reasoning alone": ([reasoning("Thinking.")], {"content": "", "reasoning_content": "Thinking."}),
    "two parts": ([message(text_part("Hello "), text_part("world"))], {"content": "Hello world"}),
    "two messages": (
        [message(text_part("Let me look.")), message(text_part("Found."))],
        {"content": "Let me look.\n\nFound."},
    ),
    "refusal": (
        [message({"type": "refusal", "refusal": "I cannot."})],
        {"content": None, "refusal": "I cannot."},
    ),
    "reasoning": (
        [
            reasoning("First.", "Second."),
            message(text_part("A")),
            reasoning("Third."),
            message(text_part("B")),
        ],
        {"content": "A\n\nB", "reasoning_content": "First.\n\nSecond.\n\nThird."},
    ),
    "raw reasoning": (
        [reasoning("Sum.", raw=("Raw one.", "Raw two.")), message(text_part("A"))],
        {"content": "A", "reasoning_content": "Sum.\n\nRaw one.\n\nRaw two."},
    ),
    "call": (
        [function_call("c1", '{"a": 1}')],
        {"content": None, "tool_calls": [chat_call("c1", '{"a": 1}')]},
    ),
    "call without arguments": (
        [function_call("c1", "")],
        {"content": None, "tool_calls": [chat_call("c1", "")]},
    ),
    "text and calls": (
        [
            reasoning("Hm."),
            message(text_part("Looking.")),
            function_call("c1", '{"a": 1}'),
            custom_call("c2", "*** Begin"),
            function_call("c3", "{}", "see"),
        ],
        {
            "content": "Looking.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                chat_call("c1", '{"a": 1}'),
                {"id": "c2", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}},
                chat_call("c3", "{}", "see"),
            ],
        },
    ),
    "citations": (
        [
            {"type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "q"}},
            message(text_part("Well.")),
            message(
                text_part("See A.", citation(4, 5)), text_part(" B.", citation(1, 2), {"type": "file_path"})
            ),
        ],
        {"content": "Well.\n\nSee A. B.", "annotations": [chat_citation(11, 12), chat_citation(14, 15)]},
    ),
    "unknown items": (
        [{"type": "image_generation_call", "result": "?"}, {"type": "odd"}, message(text_part("A"))],
        {"content": "A"},
    ),
}
for _, expected in SCRIPTS.values():
    expected.update({"role": "assistant", "refusal": expected.get("refusal")})


def without(*endings: str) -> Callable[[list[Object]], list[Object]]:
    return lambda events: [event for event in events if not event["type"].endswith(endings)]


def with_empty_output(events: list[Object]) -> list[Object]:
    return [*events[:-1], {**events[-1], "response": {**events[-1]["response"], "output": []}}]


def without_indices(events: list[Object]) -> list[Object]:
    return [{key: value for key, value in event.items() if key != "output_index"} for event in events]


def with_other_ids_each_time(events: list[Object]) -> list[Object]:
    return [{**event, "item_id": f"x{number}"} for number, event in enumerate(events)]


WAYS: dict[str, Callable[[list[Object]], list[Object]]] = {
    "in full": lambda events: events,
    "output empty at the end": with_empty_output,
    "no deltas": without(".delta"),
    "no deltas, no text done": without(".delta", "text.done", "refusal.done", "arguments.done", "input.done"),
    "finished items only": without(
        ".delta", "text.done", "_part.done", "arguments.done", "input.done", ".added"
    ),
    "terminal event only": lambda events: events[-1:],
    "items not finished": without("output_item.done", "_part.done"),
    "finished parts only": without(".delta", "text.done", "refusal.done", "output_item.done"),
    "no added events but of items": without("_part.added", "annotation.added"),
    "no output_index": without_indices,
    "ids that change": with_other_ids_each_time,
}


def chunks_of(events: list[Object], stream: q.ChatStream | None = None) -> list[Object]:
    stream = stream or q.ChatStream("chatcmpl-1", 1_795_000_000, "local_md", include_usage=True)
    return [chunk for event in events for chunk in stream.feed(event)]


def choices_of(chunks: list[Object]) -> list[Object]:
    return [chunk["choices"][0] for chunk in chunks if chunk["choices"]]


def message_of(chunks: list[Object]) -> Object:
    """Fold chunks the way a client does: texts are joined, calls are told apart by their index."""
    folded: Object = {"content": None, "refusal": None}
    calls: dict[int, Object] = {}
    for delta in (choice["delta"] for choice in choices_of(chunks)):
        for field, value in delta.items():
            if field == "tool_calls":
                for piece in value:
                    add_call_piece(calls, piece)
            elif isinstance(value, str):
                folded[field] = (folded.get(field) or "") + value
            elif value is not None:
                assert field not in folded, f"{field} came twice"
                folded[field] = value
    if calls:
        folded["tool_calls"] = [calls[index] for index in range(len(calls))]
    return folded


def add_call_piece(calls: dict[int, Object], piece: Object) -> None:
    head = {key: value for key, value in piece.items() if key in ("id", "type")}
    (kind, texts), *more = [
        (key, value) for key, value in piece.items() if key not in ("id", "type", "index")
    ]
    assert not more
    if head:
        assert set(head) == {"id", "type"}
        assert piece["index"] == len(calls), "a call's head comes once, and in order"
        calls[piece["index"]] = {**head, kind: dict(texts)}
        return
    for field, text in texts.items():
        assert field != "name"
        calls[piece["index"]][kind][field] += text


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("way", WAYS)
def test_stream_gives_everything_once_whatever_upstream_leaves_out(script: str, way: str) -> None:
    items, expected = SCRIPTS[script]
    assert message_of(chunks_of(WAYS[way](events_of(items)))) == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_completion_is_the_folded_stream(script: str) -> None:
    items, expected = SCRIPTS[script]
    response = response_of(items)
    before = copy.deepcopy(response)
    completion = q.chat_completion(response, "chatcmpl-1", 1_795_000_000, "local_md")
    finish_reason = "tool_calls" if "tool_calls" in expected else "stop"
    choice = {"index": 0, "message": expected, "logprobs": None, "finish_reason": finish_reason}
    assert completion == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_795_000_000,
        "model": "local_md",
        "choices": [choice],
        "usage": CHAT_USAGE,
    }
    assert response == before
    chunks = chunks_of(events_of(items))
    assert message_of(chunks) == completion["choices"][0]["message"]
    assert [choice["finish_reason"] for choice in choices_of(chunks)][-1] == finish_reason


def test_chunks_in_full() -> None:
    head = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_795_000_000,
        "model": "local_md",
    }
    deltas: list[Object] = [
        {"role": "assistant", "content": None},
        {"reasoning_content": "Hm."},
        {"content": "Now"},
        {"content": " I."},
        {
            "tool_calls": [
                {"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '":1'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
        {},
    ]
    chunks = chunks_of(
        events_of([reasoning("Hm."), message(text_part("Now I.")), function_call("c1", '{"a":1}')])
    )
    reasons = [None] * (len(deltas) - 1) + ["tool_calls"]
    choices = [
        {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        for delta, reason in zip(deltas, reasons)
    ]
    assert chunks == [
        *({**head, "choices": [choice], "usage": None} for choice in choices),
        {**head, "choices": [], "usage": CHAT_USAGE},
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_role_comes_first_and_once_and_one_reason_comes_last(script: str) -> None:
    choices = choices_of(chunks_of(events_of(SCRIPTS[script][0])))
    assert [index for index, choice in enumerate(choices) if "role" in choice["delta"]] == [0]
    assert [index for index, choice in enumerate(choices) if choice["finish_reason"]] == [len(choices) - 1]


def test_pieces_come_as_they_are_sent() -> None:
    stream = q.ChatStream("c", 1, "m", include_usage=False)
    for event in events_of([message(text_part("Hello world"))]):
        texts = [choice["delta"].get("content") for choice in choices_of(stream.feed(event))]
        assert [text for text in texts if text] == (
            [event["delta"]] if event["type"].endswith(".delta") else []
        )


def test_no_chunk_before_the_first_delta() -> None:
    early = ["created", "in_progress", "output_item.added", "content_part.added", "queued", "metadata"]
    events: list[Object] = [{"type": f"response.{kind}", "response": {}, "item": message()} for kind in early]
    assert chunks_of([*events, {"type": "keepalive"}, {"type": "codex.rate_limits"}, {}, {"type": 5}]) == []


def test_parallel_calls_interleaved() -> None:
    calls = [function_call(f"c{number}", json.dumps({"n": number}), f"f{number}") for number in range(4)]
    scripts = [list(item_events(index, call)) for index, call in enumerate(calls)]
    events = [event for turn in zip(*scripts) for event in turn]
    assert len(events) == sum(map(len, scripts)), "scripts of one length, so that none is cut"
    folded = message_of(chunks_of([*events, {"type": "response.completed", "response": {}}]))
    assert folded["tool_calls"] == [
        chat_call(call["call_id"], call["arguments"], call["name"]) for call in calls
    ]


def test_arguments_without_their_head_wait_for_the_whole_call() -> None:
    _, expected = SCRIPTS["call"]
    events = without("output_item.added")(events_of(SCRIPTS["call"][0]))
    stream = q.ChatStream("c", 1, "m", include_usage=False)
    assert [event["type"] for event in events if stream.feed(event)] == [
        "response.output_item.done",
        "response.completed",
    ]
    assert message_of(chunks_of(events)) == expected


@pytest.mark.parametrize(
    ("reason", "finish_reason"),
    [("max_output_tokens", "length"), ("content_filter", "content_filter"), ("odd", "length")],
)
@pytest.mark.parametrize(
    "items", [[message(text_part("A"))], [function_call("c", '{"a')]], ids=["text", "call"]
)
def test_incomplete(reason: str, finish_reason: str, items: list[Object]) -> None:
    assert choices_of(chunks_of(events_of(items, reason)))[-1]["finish_reason"] == finish_reason
    completion = q.chat_completion(response_of(items, reason), "c", 1, "m")
    assert completion["choices"][0]["finish_reason"] == finish_reason


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("usage", [USAGE, None])
def test_usage_chunk_only_where_asked_for(include: bool, usage: Object | None) -> None:
    stream = q.ChatStream("c", 1, "m", include_usage=include)
    chunks = chunks_of([{"type": "response.completed", "response": {"usage": usage}}], stream)
    assert [chunk["usage"] for chunk in chunks if not chunk["choices"]] == (
        [CHAT_USAGE] if include and usage else []
    )
    assert all(("usage" in chunk) is include for chunk in chunks)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (None, None),
        ({}, None),
        (USAGE, CHAT_USAGE),
        (
            {
                "input_tokens": 3,
                "output_tokens": 4,
                "input_tokens_details": None,
                "output_tokens_details": "odd",
            },
            {
                "prompt_tokens": 3,
                "completion_tokens": 4,
                "total_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        ),
    ],
)
def test_usage(usage: Object | None, expected: Object | None) -> None:
    assert q.chat_usage(usage) == expected


FAILURES: list[Object] = [
    {"type": "response.failed", "response": {"error": {"code": "rate_limit_exceeded", "message": "slow"}}},
    {"type": "error", "sequence_number": 3, "code": "server_error", "message": "boom", "param": None},
    {"type": "error", "error": {"type": "usage_limit_reached", "message": "limit", "resets_at": 1_795_000}},
    {"type": "response.failed", "response": {"error": None}},
    {"type": "response.failed"},
]


@pytest.mark.parametrize("event", FAILURES)
@pytest.mark.parametrize("begun", [True, False])
def test_failure_is_no_clean_end(event: Object, begun: bool) -> None:
    stream = q.ChatStream("c", 1, "m", include_usage=True)
    chunks = chunks_of(events_of([message(text_part("A"))])[:-1] if begun else [], stream)
    assert (bool(chunks), stream.done, stream.failed) == (begun, False, False)
    assert stream.feed(event) == []
    assert (stream.done, stream.failed) == (True, True)
    assert not [choice for choice in choices_of(chunks) if choice["finish_reason"]]


def test_nothing_comes_after_the_end() -> None:
    stream = q.ChatStream("c", 1, "m", include_usage=True)
    events = events_of([message(text_part("A"))])
    chunks_of(events, stream)
    assert stream.done
    assert chunks_of([*events, FAILURES[0]], stream) == []
    assert not stream.failed


def test_old_style_function_call() -> None:
    items = [message(text_part("Looking.")), function_call("c1", '{"a": 1}'), function_call("c2", "{}")]
    expected = {
        "role": "assistant",
        "content": "Looking.",
        "refusal": None,
        "function_call": {"name": "look", "arguments": '{"a": 1}'},
    }
    choice = q.chat_completion(response_of(items), "c", 1, "m", legacy_functions=True)["choices"][0]
    assert (choice["message"], choice["finish_reason"]) == (expected, "function_call")
    stream = q.ChatStream("c", 1, "m", include_usage=False, legacy_functions=True)
    choices = choices_of(chunks_of(events_of(items), stream))
    pieces = [choice["delta"]["function_call"] for choice in choices if "function_call" in choice["delta"]]
    assert pieces[0] == {"name": "look", "arguments": ""}
    assert "".join(piece["arguments"] for piece in pieces) == '{"a": 1}'
    assert choices[-1]["finish_reason"] == "function_call"


@pytest.mark.parametrize("way", WAYS)
def test_legacy_completion(way: str) -> None:
    items = [reasoning("Hm."), message(text_part("Hello ")), message({"type": "refusal", "refusal": "No."})]
    stream = q.CompletionStream("cmpl-1", 1_795_000_000, "local_md", include_usage=True)
    chunks = chunks_of(WAYS[way](events_of(items)), stream)
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1_795_000_000, "model": "local_md"}
    assert all({key: chunk[key] for key in head} == head for chunk in chunks)
    choices = choices_of(chunks)
    assert all(set(choice) == {"index", "text", "logprobs", "finish_reason"} for choice in choices)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert chunks[-1] == {**head, "choices": [], "usage": CHAT_USAGE}
    whole = q.text_completion(response_of(items), "cmpl-1", 1_795_000_000, "local_md")
    choice = {"index": 0, "text": "Hello No.", "logprobs": None, "finish_reason": "stop"}
    assert whole == {**head, "choices": [choice], "usage": CHAT_USAGE}
    assert "".join(choice["text"] for choice in choices) == "Hello No."


def test_legacy_completion_of_nothing() -> None:
    choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    assert q.text_completion(response_of([], "max_output_tokens"), "c", 1, "m")["choices"] == [choice]


@pytest.mark.parametrize("script", ["text and calls", "citations", "refusal", "raw reasoning"])
def test_any_value_in_any_place_of_an_event_is_survived(script: str) -> None:
    events = events_of(SCRIPTS[script][0])
    for index, event in enumerate(events):
        for mutant in mutants(event):
            if isinstance(mutant, dict):
                json.dumps(chunks_of([*events[:index], mutant, *events[index + 1 :]]))


def test_any_value_in_any_place_of_a_response_is_survived() -> None:
    for response in mutants(response_of(SCRIPTS["text and calls"][0], "max_output_tokens")):
        if isinstance(response, dict):
            json.dumps(q.chat_completion(response, "c", 1, "m"))
            json.dumps(q.text_completion(response, "c", 1, "m"))
    for failure in FAILURES:
        for event in mutants(failure):
            if isinstance(event, dict):
                json.dumps(chunks_of([event]))


STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def answer(bridge: RunningBridge, stream: bool) -> tuple[str, list[Any], str]:
    """Ask a chat; return its text, its images, and why it ended."""
    reply = ask(bridge, {**MODEL, "messages": [USER]}, path=CHAT, stream=stream)
    assert reply.status == 200, reply.body
    if not stream:
        (choice,) = reply.json["choices"]
        message = choice["message"]
        return message["content"] or "", message.get("images") or [], choice["finish_reason"]
    choices = [choice for chunk in chunks(reply.body)[:-1] for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    images = [image for choice in choices for image in choice["delta"].get("images") or ()]
    return text, images, choices[-1]["finish_reason"]


def urls(text: str, images: list[Any]) -> list[str]:
    """Return the images of an answer: Markdown's in its text, and those that stand beside it."""
    marked = [part.partition(")")[0] for part in text.split("](")[1:]]
    beside = [image["image_url"]["url"] for image in images if image.get("type") == "image_url"]
    return list(dict.fromkeys([*marked, *beside]))


FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("empty_output", [True, False])
@STREAM
def test_an_answer_that_is_an_image_shows_it(
    bridge: RunningBridge, backend: wire.Backend, stream: bool, empty_output: bool, kind: str
) -> None:
    item = wire.image_item(output_format=kind)
    backend.on("/responses", wire.turn(*wire.items_turn(item, empty_output=empty_output)))
    text, images, reason = answer(bridge, stream)
    assert urls(text, images) == [f"data:{FORMATS[kind]};base64,{wire.PIXEL}"]
    assert reason == "stop"


@STREAM
def test_an_image_beside_a_text_is_shown_too(
    bridge: RunningBridge, backend: wire.Backend, stream: bool
) -> None:
    items = [wire.message_item("here it is"), wire.image_item(), wire.image_item("QUFBQQ==")]
    backend.on("/responses", wire.turn(*wire.items_turn(*items)))
    text, images, _ = answer(bridge, stream)
    assert "here it is" in text
    assert urls(text, images) == [f"data:image/png;base64,{data}" for data in (wire.PIXEL, "QUFBQQ==")]


@pytest.mark.parametrize("fields", [{"output_format": None}, {"output_format": 5}, {"output_format": "a/b)"}])
@STREAM
def test_an_image_of_no_known_format_is_a_png(
    bridge: RunningBridge, backend: wire.Backend, stream: bool, fields: Object
) -> None:
    backend.on("/responses", wire.turn(*wire.items_turn(wire.image_item(**fields))))
    text, images, _ = answer(bridge, stream)
    assert urls(text, images) == [f"data:image/png;base64,{wire.PIXEL}"]


@pytest.mark.parametrize("result", [None, 5, "", ["x"], "not base64)](x"])
@STREAM
def test_an_image_that_is_none_breaks_nothing(
    bridge: RunningBridge, backend: wire.Backend, stream: bool, result: Any
) -> None:
    item = {**wire.image_item(), "result": result}
    backend.on("/responses", wire.turn(*wire.items_turn(item, wire.message_item("sorry"))))
    text, images, reason = answer(bridge, stream)
    assert (text, images, reason) == ("sorry", [], "stop")



# -- what was written to the cache ----------------------------------------------------


def counted(details: Any) -> wire.Reply:
    """Answer with these details of the input's tokens."""
    *events, last = wire.text_turn("hi")
    usage = {**wire.USAGE, "input_tokens_details": details}
    return wire.turn(*events, {**last, "response": {**last["response"], "usage": usage}})


@pytest.mark.parametrize(("details", "wanted"), [
    ({"cached_tokens": 16, "cache_write_tokens": 12}, {"cached_tokens": 16, "cache_write_tokens": 12}),
    ({"cached_tokens": 16, "cache_write_tokens": 0}, {"cached_tokens": 16, "cache_write_tokens": 0}),
    ({"cache_write_tokens": 12}, {"cached_tokens": 0, "cache_write_tokens": 12}),
    ({"cached_tokens": 16}, {"cached_tokens": 16}),
    ({"cached_tokens": 16, "cache_write_tokens": "many"}, {"cached_tokens": 16}),
    ({"cached_tokens": 16, "cache_write_tokens": None}, {"cached_tokens": 16}),
    ({"cached_tokens": 16, "cache_write_tokens": True}, {"cached_tokens": 16}),
])
@STREAM
def test_tokens_written_to_the_cache_are_told_where_upstream_tells_them(
    bridge: RunningBridge, backend: wire.Backend, stream: bool, details: Any, wanted: Object
) -> None:
    backend.on("/responses", counted(details))
    body: Object = {**MODEL, "messages": [USER], "stream_options": {"include_usage": True}}
    reply = ask(bridge, body, path=CHAT, stream=stream)
    usage = chunks(reply.body)[-2]["usage"] if stream else reply.json["usage"]
    assert usage["prompt_tokens_details"] == wanted
