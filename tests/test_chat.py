"""Section 5, chat: request to request by tables; event scripts to chunks and to one answer, which agree."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import qoo_bridge as q

Object = dict[str, Any]
USER = {"role": "user", "content": "hi"}
PNG = "data:image/png;base64,iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**30,
    "",
    "odd",
    [],
    [None],
    ["odd"],
    [[]],
    {},
    {"odd": 1},
)


def request_of(**fields: Any) -> Object:
    return q.chat_request({"model": "gpt-5.5", "messages": [USER], **fields})


def items_of(*messages: Object) -> list[Object]:
    items: list[Object] = request_of(messages=list(messages))["input"]
    return items


def user_message(text: str) -> Object:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def tool_call(call_id: str, name: str = "look", arguments: str = "{}") -> Object:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


# -- requests -----------------------------------------------------------------


def test_smallest_request() -> None:
    assert q.chat_request({"model": "gpt-5.5", "messages": [USER]}) == {
        "model": "gpt-5.5",
        "input": [user_message("hi")],
        "stream": False,
        "reasoning": {"summary": "auto"},
    }


PARTS = [
    ({"type": "text", "text": "a"}, {"type": "input_text", "text": "a"}),
    ({"type": "input_text", "text": "a"}, {"type": "input_text", "text": "a"}),
    ({"type": "image_url", "image_url": {"url": PNG}}, {"type": "input_image", "image_url": PNG}),
    ({"type": "image_url", "image_url": PNG}, {"type": "input_image", "image_url": PNG}),
    (
        {"type": "image_url", "image_url": {"url": PNG, "detail": "high"}},
        {"type": "input_image", "image_url": PNG, "detail": "high"},
    ),
    (
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA==", "filename": "a.pdf"}},
        {"type": "input_file", "file_data": "data:application/pdf;base64,AA==", "filename": "a.pdf"},
    ),
    ({"type": "file", "file": {"file_id": "file-1"}}, {"type": "input_file", "file_id": "file-1"}),
]


@pytest.mark.parametrize(("part", "expected"), PARTS)
def test_content_parts(part: Object, expected: Object) -> None:
    assert items_of({"role": "user", "content": [part, part]})[0]["content"] == [expected, expected]
    output = items_of({"role": "tool", "tool_call_id": "c", "content": [part]})
    assert output == [{"type": "function_call_output", "call_id": "c", "output": [expected]}]


def test_roles_stay_in_place_and_in_order() -> None:
    items = items_of(
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u", "name": "ann"},
        {"role": "developer", "content": [{"type": "text", "text": "d"}]},
        {"role": "assistant", "content": "a"},
        {"role": "system", "content": "late"},
    )
    texts = [(item["role"], item["content"][0]["type"], item["content"][0]["text"]) for item in items]
    assert texts == [
        ("developer", "input_text", "s"),
        ("user", "input_text", "u"),
        ("developer", "input_text", "d"),
        ("assistant", "output_text", "a"),
        ("developer", "input_text", "late"),
    ]


ECHOED: Object = {
    "refusal": None,
    "audio": None,
    "function_call": None,
    "annotations": [],
    "reasoning_content": "x",
    "name": "n",
}
ASSISTANT = [
    ({"content": "a"}, [{"type": "output_text", "text": "a"}]),
    ({"content": "a", **ECHOED, "tool_calls": None}, [{"type": "output_text", "text": "a"}]),
    ({"content": "a", **ECHOED, "tool_calls": []}, [{"type": "output_text", "text": "a"}]),
    ({"content": [{"type": "text", "text": "a"}]}, [{"type": "output_text", "text": "a"}]),
    ({"content": [{"type": "refusal", "refusal": "no"}]}, [{"type": "refusal", "refusal": "no"}]),
    ({"content": None, "refusal": "no"}, [{"type": "refusal", "refusal": "no"}]),
    (
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]},
        [{"type": "output_text", "text": "a"}],
    ),
]


@pytest.mark.parametrize(("fields", "content"), ASSISTANT)
def test_assistant_messages(fields: Object, content: list[Object]) -> None:
    assert items_of({"role": "assistant", **fields}) == [
        {"type": "message", "role": "assistant", "content": content}
    ]


@pytest.mark.parametrize("content", [None, "", [], [{"type": "text", "text": ""}]])
def test_assistant_message_without_text_is_its_calls_alone(content: Any) -> None:
    items = items_of({"role": "assistant", "content": content, "tool_calls": [tool_call("c")]})
    assert items == [{"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}]


def test_tool_loop() -> None:
    custom = {"id": "c2", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
    items = items_of(
        USER,
        {
            "role": "assistant",
            "content": "Looking.",
            "tool_calls": [tool_call("c1", arguments='{"a": 1}'), custom],
        },
        {"role": "tool", "tool_call_id": "c2", "content": "done"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "seen"}]},
    )
    assert items[1]["content"] == [{"type": "output_text", "text": "Looking."}]
    assert items[2:] == [
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"a": 1}'},
        {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "done"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "seen"}]},
    ]


def test_old_style_function_loop_pairs_each_answer_with_the_last_call_of_its_name() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": "{}"}}
    first_call, first, second_call, second = items_of(
        call,
        {"role": "function", "name": "look", "content": "1"},
        call,
        {"role": "function", "name": "look", "content": "2"},
    )
    assert (first["type"], first["output"], second["output"]) == ("function_call_output", "1", "2")
    assert first_call["call_id"] == first["call_id"] != second["call_id"] == second_call["call_id"]


FLAT = {
    "type": "function",
    "name": "look",
    "parameters": {"type": "object", "properties": {}},
    "strict": False,
}
GRAMMAR = {"syntax": "lark", "definition": "start: /a/"}
TOOLS = [
    ({"type": "function", "function": {"name": "look"}}, FLAT),
    (
        {
            "type": "function",
            "function": {"name": "look", "parameters": None, "strict": None, "description": None},
        },
        FLAT,
    ),
    (
        {
            "type": "function",
            "function": {"name": "look", "description": "d", "parameters": SCHEMA, "strict": True},
        },
        {"type": "function", "name": "look", "description": "d", "parameters": SCHEMA, "strict": True},
    ),
    ({"type": "custom", "custom": {"name": "patch"}}, {"type": "custom", "name": "patch"}),
    (
        {"type": "custom", "custom": {"name": "patch", "description": "d", "format": {"type": "text"}}},
        {"type": "custom", "name": "patch", "description": "d", "format": {"type": "text"}},
    ),
    (
        {"type": "custom", "custom": {"name": "patch", "format": {"type": "grammar", "grammar": GRAMMAR}}},
        {"type": "custom", "name": "patch", "format": {"type": "grammar", **GRAMMAR}},
    ),
    ({"type": "web_search", "filters": {"allowed_domains": ["a.example"]}},) * 2,
    ({"type": "namespace", "name": "n", "tools": []},) * 2,
]


@pytest.mark.parametrize(("tool", "expected"), TOOLS)
def test_tools(tool: Object, expected: Object) -> None:
    assert request_of(tools=[tool])["tools"] == [expected]


PLACE = {"city": "Bonn", "country": "DE"}
FIELDS = [  # request fields → what is said of them upstream
    ({"tool_choice": "none"}, {"tool_choice": "none"}),
    ({"tool_choice": "auto"}, {"tool_choice": "auto"}),
    ({"tool_choice": "required"}, {"tool_choice": "required"}),
    ({"tool_choice": None}, {}),
    (
        {"tool_choice": {"type": "function", "function": {"name": "look"}}},
        {"tool_choice": {"type": "function", "name": "look"}},
    ),
    (
        {"tool_choice": {"type": "custom", "custom": {"name": "p"}}},
        {"tool_choice": {"type": "custom", "name": "p"}},
    ),
    ({"tool_choice": {"type": "web_search"}}, {"tool_choice": {"type": "web_search"}}),
    (
        {
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "look"}}, {"type": "web_search"}],
                },
            }
        },
        {
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "look"}, {"type": "web_search"}],
            }
        },
    ),
    ({"tools": [], "functions": None}, {}),
    ({"functions": [{"name": "look"}]}, {"tools": [FLAT], "parallel_tool_calls": False}),
    ({"function_call": "none"}, {"tool_choice": "none"}),
    ({"function_call": {"name": "look"}}, {"tool_choice": {"type": "function", "name": "look"}}),
    ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
    ({"parallel_tool_calls": None}, {}),
    ({"web_search_options": {}}, {"tools": [{"type": "web_search"}]}),
    (
        {
            "web_search_options": {
                "search_context_size": "low",
                "user_location": {"type": "approximate", "approximate": {**PLACE, "region": None}},
            }
        },
        {
            "tools": [
                {
                    "type": "web_search",
                    "search_context_size": "low",
                    "user_location": {"type": "approximate", **PLACE},
                }
            ]
        },
    ),
    (
        {"web_search_options": {}, "tools": [{"type": "web_search_preview", "x": 1}]},
        {"tools": [{"type": "web_search_preview", "x": 1}]},
    ),
    ({"response_format": {"type": "text"}}, {"text": {"format": {"type": "text"}}}),
    ({"response_format": {"type": "json_object"}}, {"text": {"format": {"type": "json_object"}}}),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
            }
        },
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}},
    ),
    ({"response_format": None, "verbosity": None}, {}),
    (
        {"verbosity": "low", "response_format": {"type": "json_object"}},
        {"text": {"verbosity": "low", "format": {"type": "json_object"}}},
    ),
    ({"reasoning_effort": "high"}, {"reasoning": {"effort": "high", "summary": "auto"}}),
    ({"reasoning": {"effort": "low"}}, {"reasoning": {"effort": "low", "summary": "auto"}}),
    (
        {"reasoning": {"effort": "low"}, "reasoning_effort": "max"},
        {"reasoning": {"effort": "max", "summary": "auto"}},
    ),
    ({"reasoning": {"summary": "detailed", "enabled": True}}, {"reasoning": {"summary": "detailed"}}),
    ({"reasoning": {"effort": "low", "summary": None}}, {"reasoning": {"effort": "low"}}),
    (
        {"reasoning_effort": {"effort": "high", "summary": "concise"}},
        {"reasoning": {"effort": "high", "summary": "concise"}},
    ),
    ({"stream": True, "stream_options": {"include_usage": True}}, {"stream": True}),
    (
        {"prompt_cache_key": "k", "service_tier": "priority"},
        {"prompt_cache_key": "k", "service_tier": "priority"},
    ),
    ({"n": 1, "logprobs": False, "top_logprobs": 0, "modalities": ["text"], "audio": None}, {}),
    ({"unheard_of": {"a": 1}, "chat_template_kwargs": {}, "top_k": 5}, {}),
]


@pytest.mark.parametrize(("fields", "expected"), FIELDS)
def test_fields(fields: Object, expected: Object) -> None:
    assert request_of(**fields) == {**request_of(), **expected}


@pytest.mark.parametrize("field", q.CHAT_DROPPED)
@pytest.mark.parametrize("value", [None, 1, "odd", {"type": "content", "content": "x"}], ids=repr)
def test_dropped_fields_change_nothing(field: str, value: Any) -> None:
    assert request_of(**{field: value}) == request_of()


@pytest.mark.parametrize(("options", "wanted"), [(None, False), ({}, False), ({"include_usage": True}, True)])
def test_wants_usage(options: Object | None, wanted: bool) -> None:
    assert q.wants_usage({"stream_options": options}) is wanted


REFUSED: list[tuple[Object, str]] = [
    ({"n": 2}, "n"),
    ({"n": "1"}, "n"),
    ({"n": 0}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"moderation": {"model": "m"}}, "moderation"),
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": USER}, "messages"),
    ({"messages": [USER, "hi"]}, "messages[1]"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"prompt_cache_key": 7}, "prompt_cache_key"),
    ({"service_tier": []}, "service_tier"),
    ({"verbosity": 1}, "verbosity"),
    ({"reasoning_effort": 3}, "reasoning_effort"),
    ({"reasoning": "high"}, "reasoning"),
    ({"reasoning": {"summary": True}}, "reasoning.summary"),
    ({"reasoning_effort": {"effort": 1}}, "reasoning_effort.effort"),
    ({"web_search_options": True}, "web_search_options"),
    ({"web_search_options": {"search_context_size": 1}}, "web_search_options.search_context_size"),
    (
        {"web_search_options": {"user_location": {"approximate": {"city": 1}}}},
        "web_search_options.user_location.approximate.city",
    ),
    ({"response_format": "json_object"}, "response_format"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        "response_format.json_schema.schema",
    ),
    ({"tools": {}}, "tools"),
    ({"tools": [1]}, "tools[0]"),
    ({"tools": [{}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "look"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "strict": "no"}}]},
        "tools[0].function.strict",
    ),
    ({"tools": [{"type": "custom", "custom": {"name": "a", "format": {}}}]}, "tools[0].custom.format.type"),
    (
        {
            "tools": [
                {
                    "type": "custom",
                    "custom": {"name": "a", "format": {"type": "grammar", "grammar": {"syntax": "lark"}}},
                }
            ]
        },
        "tools[0].custom.format.grammar.definition",
    ),
    ({"functions": [{"name": 1}]}, "functions[0].name"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": ["auto"]}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "a"}}, "tool_choice.function"),
    (
        {
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "custom"}]},
            }
        },
        "tool_choice.allowed_tools.tools[0].custom",
    ),
    ({"function_call": {}}, "function_call.name"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_refused_fields_are_named(fields: Object, param: str) -> None:
    with pytest.raises(q.InvalidRequest) as refusal:
        request_of(**fields)
    assert (refusal.value.status, refusal.value.param) == (400, param)


REFUSED_MESSAGES: list[tuple[Object, str]] = [
    ({}, "role"),
    ({"role": 5, "content": "x"}, "role"),
    ({"role": "robot", "content": "x"}, "role"),
    ({"role": "user"}, "content"),
    ({"role": "system", "content": {"text": "x"}}, "content"),
    ({"role": "assistant", "content": 5}, "content"),
    ({"role": "assistant", "content": False}, "content"),
    ({"role": "user", "content": ["x"]}, "content[0]"),
    ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text"}]}, "content[1].text"),
    ({"role": "user", "content": [{"text": "x"}]}, "content[0].type"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": 5}]}, "content[0].image_url"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content[0].image_url.url"),
    (
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG, "detail": 1}}]},
        "content[0].image_url.detail",
    ),
    ({"role": "user", "content": [{"type": "file", "file": {"filename": "a"}}]}, "content[0].file"),
    ({"role": "user", "content": [{"type": "file", "file": {"file_data": 1}}]}, "content[0].file.file_data"),
    ({"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}, "content[0].type"),
    ({"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": PNG}}]}, "content[0].type"),
    ({"role": "assistant", "refusal": 5}, "refusal"),
    ({"role": "assistant", "tool_calls": {}}, "tool_calls"),
    ({"role": "assistant", "tool_calls": [{"function": {}}]}, "tool_calls[0].id"),
    ({"role": "assistant", "tool_calls": [{"id": "c", "type": "odd"}]}, "tool_calls[0].type"),
    ({"role": "assistant", "tool_calls": [{"id": "c"}]}, "tool_calls[0].function"),
    (
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "a", "arguments": {}}}]},
        "tool_calls[0].function.arguments",
    ),
    (
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "a"}}]},
        "tool_calls[0].custom.input",
    ),
    ({"role": "assistant", "function_call": {"name": "a"}}, "function_call.arguments"),
    ({"role": "tool", "content": "x"}, "tool_call_id"),
    ({"role": "tool", "tool_call_id": "c", "content": None}, "content"),
    ({"role": "function", "content": "x"}, "name"),
    ({"role": "function", "name": "never_called", "content": "x"}, "name"),
]


@pytest.mark.parametrize(("message", "param"), REFUSED_MESSAGES)
def test_refused_messages_are_named_by_their_path(message: Object, param: str) -> None:
    with pytest.raises(q.InvalidRequest) as refusal:
        items_of(USER, message)
    assert (refusal.value.status, refusal.value.param) == (400, f"messages[1].{param}")


def test_refusal_does_not_echo_what_was_sent() -> None:
    with pytest.raises(q.InvalidRequest) as long:
        items_of({"role": "r" * 100_000, "content": "x"})
    assert len(str(long.value)) < 200
    with pytest.raises(q.InvalidRequest) as secret:
        items_of({"role": "user", "content": {"password": "hunter2"}})
    assert "hunter2" not in str(secret.value)


FULL_REQUEST: Object = {
    "model": "gpt-5.5",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [part for part, _ in PARTS]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "no"}],
            **ECHOED,
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                tool_call("c1"),
                {"id": "c2", "type": "custom", "custom": {"name": "p", "input": "i"}},
            ],
            "function_call": {"name": "look", "arguments": "{}"},
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "x"}]},
        {"role": "function", "name": "look", "content": "x"},
    ],
    "tools": [tool for tool, _ in TOOLS],
    "functions": [{"name": "look", "parameters": SCHEMA}],
    "tool_choice": {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "look"}}]},
    },
    "function_call": {"name": "look"},
    "web_search_options": {"user_location": {"type": "approximate", "approximate": PLACE}},
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
    },
    "reasoning": {"effort": "low", "summary": "auto"},
    "reasoning_effort": "low",
    "verbosity": "low",
    "stream": True,
    "stream_options": {"include_usage": True},
    "parallel_tool_calls": True,
    "prompt_cache_key": "k",
    "service_tier": "priority",
    "modalities": ["text"],
}


def mutants(value: Any) -> Iterator[Any]:
    """Yield `value` with each of its nodes in turn replaced by every odd value, or left out."""
    yield from ODD_VALUES
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            for mutant in mutants(value[key]):
                changed = value.copy()
                changed[key] = mutant
                yield changed
            shorter = value.copy()
            del shorter[key]
            yield shorter


def test_any_value_in_any_place_is_refused_or_translated() -> None:
    translated, params = [], []
    for body in mutants(FULL_REQUEST):
        if isinstance(body, dict):
            try:
                translated.append(json.dumps(q.chat_request(body)))
            except q.InvalidRequest as refusal:
                params.append(refusal.param)
    assert all(params)
    assert min(len(translated), len(params)) > 500


def test_arguments_are_never_changed() -> None:
    body, prompt = copy.deepcopy(FULL_REQUEST), {"model": "m", "prompt": ["p"], "stream": True}
    q.chat_request(body)
    q.completion_request(prompt)
    assert (body, prompt) == (FULL_REQUEST, {"model": "m", "prompt": ["p"], "stream": True})


@pytest.mark.parametrize("prompt", ["p", ["p"]])
def test_legacy_prompt_is_a_user_message(prompt: Any) -> None:
    harmless = {
        "n": 1,
        "best_of": 1,
        "echo": False,
        "logprobs": None,
        "suffix": "",
        "max_tokens": 9,
        "stop": "x",
    }
    request = q.completion_request({"model": "gpt-5.5", "prompt": prompt, "stream": True, **harmless})
    assert request == {**request_of(stream=True), "input": [user_message("p")]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"logprobs": 0}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"model": 1}, "model"),
        ({"stream": 1}, "stream"),
    ],
)
def test_legacy_refusals(fields: Object, param: str) -> None:
    with pytest.raises(q.InvalidRequest) as refusal:
        q.completion_request({"model": "m", "prompt": "p", **fields})
    assert (refusal.value.status, refusal.value.param) == (400, param)


# -- events -------------------------------------------------------------------
# A script is the list of items that upstream makes. `events_of` plays it as upstream would, in every detail;
# the ways of playing below leave details out.

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
        [{"type": "image_generation_call", "result": "AA=="}, {"type": "odd"}, message(text_part("A"))],
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
