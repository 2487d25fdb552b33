"""Room chat requests: Chat Completions and legacy completions to Responses requests, by tables."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import wire
from conftest import RunningBridge
from help import CHAT, HI, MODEL, SCHEMA, USER, Object, ask, chunks, mutants, sent

import qoo_bridge as q

PNG = "data:image/png;base64,iVBORw0KGgo="
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}


def request_of(**fields: Any) -> Object:
    return q.chat_request({"model": "gpt-5.5", "messages": [USER], **fields})


def items_of(*messages: Object) -> list[Object]:
    items: list[Object] = request_of(messages=list(messages))["input"]
    return items


def user_message(text: str) -> Object:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def tool_call(call_id: str, name: str = "look", arguments: str = "{}") -> Object:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


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
            "function": {"name": "look", "description": "d", "parameters": CITY, "strict": True},
        },
        {"type": "function", "name": "look", "description": "d", "parameters": CITY, "strict": True},
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
                "json_schema": {"name": "n", "schema": CITY, "strict": True},
            }
        },
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": CITY, "strict": True}}},
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


def test_messages_of_a_chat_inside_an_input_are_translated() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "run", "arguments": "{}"}}
    given: list[Object] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [
            {"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "u"}}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "ran"},
        {"type": "function_call_output", "call_id": "call_0", "output": "kept as it is"},
    ]
    assert q.chat_request({"model": "m", "input": given})["input"] == [
        given[0], {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "hi"}, {"type": "input_image", "image_url": "u"}]},
        {"type": "function_call", "call_id": "call_1", "name": "run", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "ran"}, given[4]]
    text = {"type": "input_text", "text": "hi"}
    says = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hi"}]}
    mixed: list[tuple[list[Object], list[Object]]] = [
        ([{"type": "message", "role": "user", "content": [{"type": "text", "text": "hi"}]}],
         [{"type": "message", "role": "user", "content": [text]}]),
        ([{"role": "assistant", "content": "hi", "refusal": None}], [says]),
        ([{"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm"}, {"type": "output_text", "text": "hi"}]}], [says]),
        ([{"type": "custom_tool_call", "call_id": "c", "name": "p", "input": ""},
          {"role": "tool", "tool_call_id": "c", "content": "ran"}],
         [{"type": "custom_tool_call", "call_id": "c", "name": "p", "input": ""},
          {"type": "custom_tool_call_output", "call_id": "c", "output": "ran"}]),
    ]
    old_call = {"type": "function_call", "call_id": "c", "name": "run", "arguments": "{}"}
    mixed.append(([old_call, {"role": "function", "name": "run", "content": "ran"}],
                  [old_call, {"type": "function_call_output", "call_id": "c", "output": "ran"}]))
    for items, wanted in mixed:
        assert q.chat_request({"model": "m", "input": items})["input"] == wanted
    with pytest.raises(q.InvalidRequest, match=r"input\[0\]\.tool_call_id"):
        q.chat_request({"model": "m", "input": [{"role": "tool", "content": "x"}]})


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
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
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
    ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
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
    "functions": [{"name": "look", "parameters": CITY}],
    "tool_choice": {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "look"}}]},
    },
    "function_call": {"name": "look"},
    "web_search_options": {"user_location": {"type": "approximate", "approximate": PLACE}},
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": CITY, "strict": True},
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


FLAT_TOOL: Object = {"type": "function", "name": "run", "description": "d", "parameters": SCHEMA}
NESTED: Object = {"type": "function", "function": {"name": "run", "description": "d", "parameters": SCHEMA}}
TAKEN = {**FLAT_TOOL, "strict": False}
FLAT_CUSTOM: Object = {"type": "custom", "name": "patch", "format": {"type": "text"}}
CALL: Object = {"type": "function_call", "call_id": "call_1", "name": "run", "arguments": "{}"}
OUTPUT: Object = {"type": "function_call_output", "call_id": "call_1", "output": "x"}
DATA = "data:image/png;base64,AAAA"
FILE = "data:application/pdf;base64,AAAA"


def said(reply: wire.RawReply, stream: bool) -> str:
    """Return the text of a chat's answer; it must be one."""
    assert reply.status == 200, reply.body
    if not stream:
        assert reply.json["object"] == "chat.completion"
        return str(reply.json["choices"][0]["message"]["content"])
    *received, done = chunks(reply.body)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in received} == {"chat.completion.chunk"}
    return "".join(choice["delta"].get("content") or "" for chunk in received for choice in chunk["choices"])



# -- a Responses body at the chat's address ----------------------------------------

BODIES: dict[str, tuple[Object, Object]] = {  # what comes, what of it goes up
    "text": ({"input": "hi"}, {"input": [HI]}),
    "items": ({"input": [USER]}, {"input": [{"type": "message", **USER}]}),
    "typed-items": ({"input": [HI, CALL, OUTPUT]}, {"input": [HI, CALL, OUTPUT]}),
    "instructions": ({"input": "hi", "instructions": "be brief"}, {"instructions": "be brief"}),
    "flat-tools": ({"input": "hi", "tools": [FLAT_TOOL, FLAT_CUSTOM], "tool_choice": "auto"},
                   {"tools": [{**FLAT_TOOL}, FLAT_CUSTOM], "tool_choice": "auto"}),
    "flat-choice": ({"input": "hi", "tools": [FLAT_TOOL], "tool_choice": {"type": "function", "name": "run"}},
                    {"tool_choice": {"type": "function", "name": "run"}}),
    "effort": ({"input": "hi", "reasoning": {"effort": "low"}}, {"reasoning": {"effort": "low"}}),
    "verbosity": ({"input": "hi", "text": {"verbosity": "low"}}, {"text": {"verbosity": "low"}}),
    "verbosity-of-a-chat": ({"input": "hi", "verbosity": "low"}, {"text": {"verbosity": "low"}}),
    "format-of-a-chat": ({"input": "hi", "response_format": {"type": "json_object"}},
                         {"text": {"format": {"type": "json_object"}}}),
    "key": ({"input": "hi", "prompt_cache_key": "mine"}, {"prompt_cache_key": "mine"}),
    "what-only-tunes": ({"input": "hi", "max_output_tokens": 9, "temperature": 0, "user": "ann"}, {}),
    "null-messages": ({"input": "hi", "messages": None}, {"input": [HI]}),
    "stream-options": ({"input": "hi", "stream_options": {"include_usage": False}}, {}),
}


@pytest.mark.parametrize(("given", "wanted"), BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_responses_body_at_the_chats_address_is_answered_as_a_chat(
    bridge: RunningBridge, backend: wire.Backend, stream: bool, given: Object, wanted: Object
) -> None:
    backend.on("/responses", wire.checked(backend, wire.turn(*wire.text_turn("hello"))))
    reply = ask(bridge, {**MODEL, **given}, path=CHAT, stream=stream)
    assert (said(reply, stream), backend.refusals) == ("hello", [])
    request = sent(backend)[0].json
    for name, value in wanted.items():
        part = request[name]
        if name in ("reasoning", "text"):
            part = {key: part[key] for key in value}
        if name == "tools":  # whether `strict` is said is the translation's own
            part = [{key: tool[key] for key in tool if key != "strict"} for tool in part]
        assert part == value


def test_a_responses_body_at_the_chats_address_gets_its_calls_as_a_chat(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on("/responses", wire.checked(backend, wire.turn(*wire.call_turn("run", "{}", "call_7"))))
    reply = ask(bridge, {**MODEL, "input": "hi", "tools": [FLAT_TOOL]}, path=CHAT)
    (choice,) = reply.json["choices"]
    assert (choice["finish_reason"], choice["message"]["tool_calls"][0]["id"]) == ("tool_calls", "call_7")


@pytest.mark.parametrize("given", [
    {"messages": [USER], "input": "hi"}, {"messages": [USER], "input": []}, {"messages": [], "input": "hi"},
])
def test_two_meanings_in_one_body_are_refused_by_their_names(
    bridge: RunningBridge, backend: wire.Backend, given: Object
) -> None:
    reply = ask(bridge, {**MODEL, **given}, path=CHAT)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (400, "bridge")
    assert all(word in reply.json["error"]["message"] for word in ("messages", "input"))
    assert sent(backend) == []


@pytest.mark.parametrize("given", [{}, {"messages": None}, {"input": None}, {"messages": []}])
def test_a_chat_without_either_is_refused(bridge: RunningBridge, given: Object) -> None:
    reply = ask(bridge, {**MODEL, **given}, path=CHAT)
    assert (reply.status, reply.json["error"]["param"]) == (400, "messages")



# -- chat messages with parts and tools of the other API -------------------------------

MESSAGES: dict[str, tuple[Object, Object]] = {  # a message, the item that goes up
    "input_text": ({"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                   {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}),
    "input_image": ({"role": "user", "content": [{"type": "input_image", "image_url": DATA}]},
                    {"type": "message", "role": "user",
                     "content": [{"type": "input_image", "image_url": DATA}]}),
    "input_image-detail": (
        {"role": "user", "content": [{"type": "input_image", "image_url": DATA, "detail": "low"}]},
        {"type": "message", "role": "user",
         "content": [{"type": "input_image", "image_url": DATA, "detail": "low"}]}),
    "input_image-object": (
        {"role": "user", "content": [{"type": "input_image", "image_url": {"url": DATA, "detail": "low"}}]},
        {"type": "message", "role": "user",
         "content": [{"type": "input_image", "image_url": DATA, "detail": "low"}]}),
    "input_image-file": ({"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]},
                         {"type": "message", "role": "user",
                          "content": [{"type": "input_image", "file_id": "file-1"}]}),
    "input_file": (
        {"role": "user", "content": [{"type": "input_file", "filename": "a.pdf", "file_data": FILE}]},
        {"type": "message", "role": "user",
         "content": [{"type": "input_file", "filename": "a.pdf", "file_data": FILE}]}),
    "input_file-url": (
        {"role": "user", "content": [{"type": "input_file", "file_url": "https://example.com/a.pdf"}]},
        {"type": "message", "role": "user",
         "content": [{"type": "input_file", "file_url": "https://example.com/a.pdf"}]}),
    "output_text": ({"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
                    {"type": "message", "role": "assistant",
                     "content": [{"type": "output_text", "text": "a"}]}),
}


@pytest.mark.parametrize(("message", "item"), MESSAGES.values(), ids=MESSAGES)
def test_a_chats_message_may_have_parts_of_the_other_api(
    bridge: RunningBridge, backend: wire.Backend, message: Object, item: Object
) -> None:
    assert said(ask(bridge, {**MODEL, "messages": [USER, message, USER]}, path=CHAT), False) == "hi"
    assert (backend.refusals, sent(backend)[0].json["input"][1]) == ([], item)


def test_a_tools_answer_may_hold_an_image(bridge: RunningBridge, backend: wire.Backend) -> None:
    image = {"type": "input_image", "image_url": DATA}
    call = {"id": "call_1", "type": "function", "function": {"name": "run", "arguments": "{}"}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": [image]}, USER]
    assert said(ask(bridge, {**MODEL, "messages": messages}, path=CHAT), False) == "hi"
    assert sent(backend)[0].json["input"][2]["output"] == [image]


@pytest.mark.parametrize("part", [
    {"type": "input_image"}, {"type": "input_image", "image_url": 5}, {"type": "input_file"},
    {"type": "input_text"}, {"type": "input_image", "image_url": {}},
])
def test_a_part_of_the_other_api_is_checked_as_well(bridge: RunningBridge, part: Object) -> None:
    reply = ask(bridge, {**MODEL, "messages": [{"role": "user", "content": [part]}]}, path=CHAT)
    assert reply.status == 400
    assert reply.json["error"]["param"].startswith("messages[0].content[0]")


GIVEN_TOOLS: dict[str, tuple[list[Object], list[Object]]] = {
    "flat": ([FLAT_TOOL], [TAKEN]),
    "flat-and-nested": ([FLAT_TOOL, {"type": "function", "function": {"name": "walk", "parameters": SCHEMA}}],
                        [TAKEN, {"type": "function", "name": "walk", "parameters": SCHEMA, "strict": False}]),
    "flat-strict": ([{**FLAT_TOOL, "strict": True}], [{**TAKEN, "strict": True}]),
    "flat-without-a-schema": ([{"type": "function", "name": "run"}],
                              [{"type": "function", "name": "run", "parameters": SCHEMA, "strict": False}]),
    "flat-custom": ([FLAT_CUSTOM], [FLAT_CUSTOM]),
}


@pytest.mark.parametrize(("given", "wanted"), GIVEN_TOOLS.values(), ids=GIVEN_TOOLS)
def test_a_chats_tools_may_be_flat(
    bridge: RunningBridge, backend: wire.Backend, given: list[Object], wanted: list[Object]
) -> None:
    assert said(ask(bridge, {**MODEL, "messages": [USER], "tools": given}, path=CHAT), False) == "hi"
    assert (backend.refusals, sent(backend)[0].json["tools"]) == ([], wanted)


@pytest.mark.parametrize("choice", [
    {"type": "function", "name": "run"}, {"type": "function", "function": {"name": "run"}},
])
@pytest.mark.parametrize("tool", [FLAT_TOOL, NESTED], ids=["flat", "nested"])
def test_a_chats_choice_may_be_flat(
    bridge: RunningBridge, backend: wire.Backend, tool: Object, choice: Object
) -> None:
    reply = ask(bridge, {**MODEL, "messages": [USER], "tools": [tool], "tool_choice": choice}, path=CHAT)
    assert reply.status == 200, reply.body
    assert sent(backend)[0].json["tool_choice"] == {"type": "function", "name": "run"}
    assert reply.json["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "run"


@pytest.mark.parametrize("tool", [
    {"type": "function"}, {"type": "function", "name": 5}, {"type": "function", "function": {}},
    {"type": "function", "name": "run", "parameters": "x"}, {"type": "custom"},
])
def test_a_tool_that_is_neither_is_named(bridge: RunningBridge, tool: Any) -> None:
    reply = ask(bridge, {**MODEL, "messages": [USER], "tools": [tool]}, path=CHAT)
    assert reply.status == 400
    assert reply.json["error"]["param"].startswith("tools[0]")


ANSWERED: Object = {"role": "assistant", "content": "hello", "refusal": None}


@pytest.mark.parametrize("body", [
    {"model": "m", "input": [USER, ANSWERED]}, {"model": "m", "input": [ANSWERED], "temperature": 1},
    {"model": "m", "input": "hi"}, {"model": "m", "messages": [USER, ANSWERED]},
], ids=["input", "and more", "text", "messages"])
def test_a_body_is_not_changed(body: Object) -> None:
    """It is kept as its conversation's last one."""
    before = copy.deepcopy(body)
    q.chat_request(body)
    assert body == before
