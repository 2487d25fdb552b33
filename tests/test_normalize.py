"""Room normalize: a table of rows a rule, captured requests left alone, odd values in every place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from help import SCHEMA, Object

import qoo_bridge as q

GONE: Any = object()  # in a row: the field is not in the request
ENCRYPTED = "reasoning.encrypted_content"
EFFORTS = ("low", "medium", "high", "xhigh")

UNKNOWN = q.Context()  # not a Codex, and no catalogue yet
PLAIN = q.Context(model=q.Model("gpt-5.5", efforts=EFFORTS, tiers=("priority",)))
LITE = q.Context(model=q.Model("gpt-6-sol", lite=True, efforts=(*EFFORTS, "max", "ultra"), tiers=()))
CODEX = UNKNOWN._replace(codex=True)
CODEX_PLAIN, CODEX_LITE = PLAIN._replace(codex=True), LITE._replace(codex=True, lite_header=True)
SOCKET, LITE_SOCKET = PLAIN._replace(websocket=True), LITE._replace(websocket=True)
STRICT = UNKNOWN._replace(strict=True)
CONTEXTS = {
    "unknown": UNKNOWN, "plain": PLAIN, "lite": LITE, "codex": CODEX, "codex-lite": CODEX_LITE,
    "back-to-plain": PLAIN._replace(lite_header=True), "strict": STRICT,
    "socket": SOCKET, "lite-socket": LITE_SOCKET,
    "alias": LITE._replace(slug="gpt-6-sol", name="01a2"),
    "repaired": UNKNOWN._replace(force_instructions=True, dropped=frozenset(("text.verbosity", "user"))),
}


def message(role: str, text: str, **fields: Any) -> Object:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}], **fields}


def settled(**fields: Any) -> Object:
    """Return a request on which no rule fires for a plain or unknown model, with some fields changed."""
    request = {
        "model": "gpt-5.5", "instructions": "", "input": [message("user", "hi")],
        "store": False, "stream": True,
        "include": [ENCRYPTED], "prompt_cache_key": "key", **fields,
    }
    return {name: value for name, value in request.items() if value is not GONE}


def lite(**fields: Any) -> Object:
    """Return a request on which no rule fires for a lite model, with some fields changed."""
    form = {"instructions": GONE, "parallel_tool_calls": False, "reasoning": {"context": "all_turns"}}
    return settled(**{"model": "gpt-6-sol", **form, **fields})


def normalize(request: Any, context: q.Context = UNKNOWN) -> tuple[Object, tuple[str, ...]]:
    """Normalize; check what holds for every request: it is not changed in place, and once is enough."""
    before = repr(request)  # a copy would cost more than the rules
    changed, fired = q.normalize(request, context)
    assert repr(request) == before, "the argument was changed"
    assert (changed is request) == (not fired)
    after = repr(changed)
    again, fired_again = q.normalize(changed, context)
    assert (repr(again), fired_again) == (after, ())
    assert again is changed
    return changed, fired


# -- captured requests --------------------------------------------------------

FUNCTION = {"type": "function", "name": "exec_command", "strict": False, "parameters": SCHEMA}
NAMESPACE = {"type": "namespace", "name": "multi_agent_v1", "description": "…", "tools": [FUNCTION]}
TOOLS: list[Object] = [
    FUNCTION, NAMESPACE, {"type": "tool_search"}, {"type": "web_search", "external_web_access": False},
    {"type": "custom", "name": "apply_patch",
     "format": {"type": "grammar", "syntax": "lark", "definition": "…"}},
]
REASONING = {"type": "reasoning", "id": "rs_1", "content": None, "encrypted_content": "ENC==",
             "summary": [{"type": "summary_text", "text": "**Thinking**"}]}
CALL = {"type": "function_call", "id": "fc_1", "status": "completed", "call_id": "call_1",
        "name": "exec_command", "arguments": '{"cmd": "echo hi"}'}
OUTPUT = {"type": "function_call_output", "id": "fco_01a20211-3b14-77f2-b351-63396a29a110",
          "call_id": "call_1", "output": "Chunk ID: d1b8be"}
ASSISTANT = message("assistant", "Running a tool", id="msg_0aa1", status="completed", phase="commentary")
TURN = [
    message("developer", "You are a coding agent", id="msg_4b127aef-d90b-50c2-b0a6-f1d85f93f645"),
    message("user", "say hello", id="msg_01a20211-3aaf-7923-959c-9ec5b2d155d2",
            internal_chat_message_metadata_passthrough={"turn_id": "01a2", "create_time": 1795328042.37}),
    REASONING, ASSISTANT, CALL, OUTPUT,
]
CARRIER: Object = {"type": "additional_tools", "id": "at_01a201df-d8e6-7152-b3b4-02908d5a1e48",
                   "role": "developer",
           "tools": [{**NAMESPACE, "name": "functions"}, {**NAMESPACE, "name": "collaboration"}]}
COMMON: Object = {
    "stream": True, "tool_choice": "auto", "store": False, "include": [ENCRYPTED],
    "text": {"verbosity": "low"},
    "prompt_cache_key": "01a20211-3a20-7dc3-a834-3ba2e79f8897",
    "client_metadata": {"x-codex-window-id": "01a20211-3a20-7dc3-a834-3ba2e79f8897:0", "turn_id": "01a20211"},
}
BRIDGE_ALIAS = {"model": "local_md", "input": TURN, "tools": TOOLS, "parallel_tool_calls": True,
                "reasoning": {"summary": "auto"}, **COMMON}
BRIDGE_PLAIN = {"model": "gpt-5.5", "input": TURN, "tools": TOOLS, "parallel_tool_calls": True,
                "reasoning": {"effort": "medium"}, **COMMON}
BRIDGE_LITE = {"model": "gpt-6-sol", "input": [CARRIER, *TURN], "parallel_tool_calls": False,
               "reasoning": {"effort": "low", "context": "all_turns"}, **COMMON}
FRAME_PREWARM = {"type": "response.create", **BRIDGE_PLAIN, "input": TURN[:1], "generate": False}
FRAME_RESULT = {"type": "response.create", **BRIDGE_PLAIN, "input": [OUTPUT],
                "previous_response_id": "resp_ws2"}
METADATA = {**COMMON["client_metadata"], q.LITE_METADATA: "true"}
LITE_PREWARM = {"type": "response.create", **BRIDGE_LITE, "input": [], "generate": False,
                "client_metadata": METADATA}


@pytest.mark.parametrize(("request_", "context"), [
    (BRIDGE_PLAIN, CODEX), (BRIDGE_PLAIN, CODEX_PLAIN), (BRIDGE_LITE, CODEX), (BRIDGE_LITE, CODEX_LITE),
    (BRIDGE_ALIAS, CODEX), (FRAME_PREWARM, CODEX_PLAIN._replace(websocket=True)),
    (FRAME_RESULT, CODEX_PLAIN._replace(websocket=True)), (LITE_PREWARM, CODEX_LITE._replace(websocket=True)),
])
def test_captured_requests_go_up_as_they_are(request_: Object, context: q.Context) -> None:
    changed, fired = normalize(request_, context)
    assert changed is request_
    assert fired == ()


def test_captured_alias_is_only_renamed_for_a_plain_model() -> None:
    assert normalize(BRIDGE_ALIAS, CODEX_PLAIN._replace(slug="gpt-5.5")) == (
        {**BRIDGE_ALIAS, "model": "gpt-5.5"}, ("alias",))


def test_captured_alias_takes_the_lite_form() -> None:
    changed, fired = normalize(BRIDGE_ALIAS, LITE._replace(codex=True, slug="gpt-6-sol"))
    carrier = {"type": "additional_tools", "role": "developer",
               "tools": [tool for tool in TOOLS if tool["type"] != "web_search"]}
    assert fired == ("alias", "form")
    assert changed == {
        "model": "gpt-6-sol", "input": [carrier, *TURN], "parallel_tool_calls": False,
        "reasoning": {"summary": "auto", "context": "all_turns"}, **COMMON}


def test_captured_lite_body_is_turned_back_for_a_plain_model() -> None:
    changed, fired = normalize({**BRIDGE_LITE, "model": "gpt-5.5"}, CODEX_PLAIN._replace(lite_header=True))
    assert fired == ("form",)
    assert changed == {
        "model": "gpt-5.5", "input": TURN, "tools": CARRIER["tools"], "parallel_tool_calls": False,
        "reasoning": {"effort": "low"}, **COMMON}


# -- one rule a row -----------------------------------------------------------

MEDIA = [{"type": "input_text", "text": "look"}, {"type": "input_image", "image_url": "data:,"}]
ALIAS = UNKNOWN._replace(slug="gpt-5")
NO_LIST: tuple[Any, ...] = (GONE, None, [])
NOT_FALSE: tuple[Any, ...] = (GONE, True, None, 0, "false")
NOT_TRUE: tuple[Any, ...] = (GONE, False, None, 1, "true")
RULE_ROWS = [
    ("alias", ALIAS, {"model": "local_md"}, {"model": "gpt-5"}),
    ("input-to-list", UNKNOWN, {"input": "hi"}, {}),
    ("input-to-list", UNKNOWN, {"input": ""}, {"input": [message("user", "")]}),
    ("type-messages", UNKNOWN, {"input": [{"role": "user", "content": "hi"}]},
     {"input": [{"type": "message", "role": "user", "content": "hi"}]}),
    ("type-messages", UNKNOWN, {"input": [{"type": None, "role": "user", "content": MEDIA}, CALL]},
     {"input": [{"type": "message", "role": "user", "content": MEDIA}, CALL]}),
    ("system-to-developer", UNKNOWN,
     {"input": [message("user", "a"), message("system", "b"), message("user", "c")]},
     {"input": [message("user", "a"), message("developer", "b"), message("user", "c")]}),
    *[("store-false", UNKNOWN, {"store": value}, {}) for value in NOT_FALSE],
    *[("stream-true", UNKNOWN, {"stream": value}, {}) for value in NOT_TRUE],
    *[("include-reasoning", UNKNOWN, {"include": value}, {}) for value in NO_LIST],
    ("include-reasoning", UNKNOWN, {"include": ["file_search_call.results"]},
     {"include": ["file_search_call.results", ENCRYPTED]}),
    *[("drop-unsupported", UNKNOWN, {name: value}, {})
      for name in sorted(q.UNSUPPORTED) for value in (1, None)],
    ("drop-unsupported", UNKNOWN, {"previous_response_id": "resp_1"}, {}),
    ("drop-unsupported", UNKNOWN._replace(dropped=frozenset(("text",))), {"text": {"verbosity": "low"}}, {}),
    ("drop-unsupported", UNKNOWN._replace(dropped=frozenset(("text.verbosity", "a.b"))),
     {"text": {"verbosity": "low", "format": {"type": "text"}}}, {"text": {"format": {"type": "text"}}}),
    ("service-tier", UNKNOWN, {"service_tier": "fast"}, {"service_tier": "priority"}),
    ("service-tier", PLAIN, {"service_tier": "fast"}, {"service_tier": "priority"}),
    *[("service-tier", UNKNOWN, {"service_tier": tier}, {})
      for tier in ("auto", "flex", "", None, 1, ["priority"])],
    *[("service-tier", PLAIN._replace(model=q.Model("m", tiers=())), {"service_tier": tier}, {})
      for tier in ("priority", "fast")],
    ("effort", UNKNOWN, {"reasoning": {"effort": "ultra", "summary": "auto"}},
     {"reasoning": {"effort": "max", "summary": "auto"}}),
    ("cache-key", UNKNOWN._replace(name="01a2"), {"prompt_cache_key": GONE}, {"prompt_cache_key": "01a2"}),
    *[("cache-key", UNKNOWN._replace(name="01a2"), {"prompt_cache_key": odd}, {"prompt_cache_key": "01a2"})
      for odd in (None, "", 5, ["k"])],
    *[("instructions", UNKNOWN, {"instructions": value}, {}) for value in (GONE, None)],
    ("instructions", PLAIN, {"instructions": GONE}, {}),
    ("instructions", CODEX._replace(force_instructions=True), {"instructions": GONE}, {}),
]


@pytest.mark.parametrize(("rule", "context", "given", "wanted"), RULE_ROWS)
def test_rule(rule: str, context: q.Context, given: Object, wanted: Object) -> None:
    assert normalize(settled(**given), context) == (settled(**wanted), (rule,))


UNTOUCHED_ROWS = [
    (ALIAS, {"model": "gpt-5"}),
    (UNKNOWN, {"model": "local_md"}),
    (UNKNOWN, {"input": [{"type": "invented", "role": "user", "content": "x"}]}),
    (UNKNOWN, {"input": [{"role": "user"}, {"content": "x"}]}),
    (UNKNOWN, {"input": []}),
    (UNKNOWN, {"input": GONE}),
    (UNKNOWN, {"include": [ENCRYPTED, "x"]}),
    (UNKNOWN, {"include": "mistyped"}),
    (UNKNOWN, {"tools": [*TOOLS, {"type": "invented"}]}),
    (UNKNOWN, {"tool_choice": {"type": "custom", "name": "apply_patch"}}),
    (UNKNOWN, {"text": {"format": {"type": "json_schema"}}, "client_metadata": {"a": "b"}, "invented": [1]}),
    (UNKNOWN._replace(dropped=frozenset(("text.verbosity", "text.format.name"))), {"text": {"format": "x"}}),
    (UNKNOWN._replace(dropped=frozenset(("text.format",))), {"text": "mistyped", "text.format": GONE}),
    (SOCKET, {"type": "response.create", "previous_response_id": "resp_1", "generate": False}),
    *[(context, {"service_tier": tier}) for tier in ("default", "priority")
      for context in (UNKNOWN, PLAIN, PLAIN._replace(model=q.Model("m")))],
    (PLAIN._replace(model=q.Model("m", tiers=())), {"service_tier": "default"}),
    *[(PLAIN, {"reasoning": {"effort": effort}}) for effort in (*EFFORTS, "invented", None, 3, ["low"])],
    *[(UNKNOWN, {"reasoning": {"effort": effort}}) for effort in ("none", "minimal", "max")],
    (UNKNOWN, {"reasoning": None}),
    (UNKNOWN, {"prompt_cache_key": "k" * 64}),
    (UNKNOWN, {"instructions": "be brief"}),
    (CODEX, {"instructions": GONE}),
    (CODEX_PLAIN, {"instructions": GONE}),
    (PLAIN, {"tools": TOOLS, "parallel_tool_calls": True, "reasoning": {"context": "all_turns"}}),
    (PLAIN, {"client_metadata": {"turn_id": "1"}, "reasoning": {"context": "all_turns"}}),
    (PLAIN, {"input": [{"type": "additional_tools", "tools": "mistyped"}]}),
]


@pytest.mark.parametrize(("context", "given"), UNTOUCHED_ROWS)
def test_untouched(context: q.Context, given: Object) -> None:
    request = settled(**given)
    changed, fired = normalize(request, context)
    assert fired == ()
    assert changed is request


def test_rules_are_named_once_and_say_why() -> None:
    names = [rule.name for rule in q.RULES]
    assert len(set(names)) == len(names)
    assert all(rule.why for rule in q.RULES)
    assert set(names) >= {row[0] for row in RULE_ROWS}


@pytest.mark.parametrize(("efforts", "given", "wanted"), [
    (EFFORTS, "minimal", "low"),
    (EFFORTS, "max", "xhigh"),
    (EFFORTS, "ultra", "xhigh"),
    (("low", "high"), "medium", "low"),  # as near: the lower
    (("high", "low"), "medium", "low"),
    (("none", "high"), "medium", "high"),
    (("low", "max", "ultra"), "ultra", "max"),
    (("low", "ultra"), "max", "low"),  # ultra is no word of the wire
    (("invented",), "ultra", "max"),
    ((), "ultra", "max"),
])
def test_effort_is_the_nearest_listed(efforts: tuple[str, ...], given: str, wanted: str) -> None:
    context = PLAIN._replace(model=q.Model("m", efforts=efforts))
    request = settled(reasoning={"effort": given, "summary": "auto"})
    expected = settled(reasoning={"effort": wanted, "summary": "auto"})
    assert normalize(request, context) == (expected, ("effort",))


# -- continuity and ids -------------------------------------------------------


def without(item: Object, name: str) -> Object:
    return {key: value for key, value in item.items() if key != name}


HOLLOW = without(REASONING, "encrypted_content")
REFERENCE = {"type": "item_reference", "id": "msg_9"}
CUSTOM = {"type": "custom_tool_call", "id": "ctc_1", "call_id": "c", "name": "apply_patch", "input": "x"}
COMPACTION = {"type": "compaction", "id": "cmp_1", "encrypted_content": "ENC"}
INVENTED = {"type": "invented", "id": "inv_1"}


def bare(*given: Object) -> list[Object]:
    return [without(item, "id") for item in given]


@pytest.mark.parametrize(("context", "given", "wanted"), [
    (UNKNOWN, [HOLLOW, ASSISTANT], bare(ASSISTANT)),
    (UNKNOWN, [{**REASONING, "encrypted_content": None}, CALL, OUTPUT], bare(CALL, OUTPUT)),
    (UNKNOWN, [{**REASONING, "encrypted_content": ""}, CUSTOM], bare(CUSTOM)),
    (UNKNOWN, [REFERENCE, message("user", "x")], [message("user", "x")]),
    (UNKNOWN, [REFERENCE], []),
    (UNKNOWN, [REFERENCE, "odd", 5, [], True], ["odd", 5, [], True]),
    (UNKNOWN, [REASONING, ASSISTANT, HOLLOW, CALL], [REASONING, *bare(ASSISTANT, CALL)]),
    (UNKNOWN, [CARRIER, COMPACTION, INVENTED, REFERENCE, CALL], [CARRIER, COMPACTION, INVENTED, *bare(CALL)]),
    (STRICT, [REASONING, ASSISTANT, CALL, OUTPUT], bare(ASSISTANT, CALL, OUTPUT)),
    (STRICT, [CARRIER, COMPACTION, INVENTED], bare(CARRIER, COMPACTION, INVENTED)),
    (STRICT, [REASONING, message("user", "x")], [message("user", "x")]),
])
def test_continuity(context: q.Context, given: list[Any], wanted: list[Any]) -> None:
    assert normalize(settled(input=given), context) == (settled(input=wanted), ("continuity",))


@pytest.mark.parametrize(("context", "given"), [
    (UNKNOWN, [REASONING, ASSISTANT, CALL, OUTPUT, CUSTOM, COMPACTION, INVENTED, CARRIER]),
    (STRICT, bare(ASSISTANT, CALL, OUTPUT)),
])
def test_whole_conversations_stay(context: q.Context, given: list[Object]) -> None:
    assert normalize(settled(input=given), context)[1] == ()


@pytest.mark.parametrize(("kind", "name"), [
    *[(kind, "x" + prefix) for kind, prefix in q.ID_PREFIXES.items()],
    *[(kind, prefix + "x" * 64) for kind, prefix in q.ID_PREFIXES.items()],
    ("message", "rs_1"), ("message", ""), ("message", None), ("message", 7), ("message", ["msg_1"]),
    ("invented", "x" * 65), ("invented", ""), (["mistyped"], "x" * 65), (None, 5),
])
def test_malformed_ids_go(kind: Any, name: Any) -> None:
    kept = {"type": kind, "encrypted_content": "ENC", "role": "user", "summary": []}
    assert normalize(settled(input=[{**kept, "id": name}])) == (settled(input=[kept]), ("item-ids",))


@pytest.mark.parametrize(("kind", "name"), [
    *[(kind, prefix + "1") for kind, prefix in q.ID_PREFIXES.items()],
    *[(kind, prefix.ljust(64, "x")) for kind, prefix in q.ID_PREFIXES.items()],
    ("invented", "x" * 64), (["mistyped"], "x"), (None, "x"),
])
def test_well_formed_ids_stay(kind: Any, name: str) -> None:
    item = {"type": kind, "id": name, "encrypted_content": "ENC", "summary": []}
    assert normalize(settled(input=[item]))[1] == ()


def test_null_item_is_left_for_upstream_to_refuse() -> None:
    changed, _ = normalize(settled(input=[None, message("system", "x")]))
    assert changed["input"] == [None, message("developer", "x")]


# -- the cache key ------------------------------------------------------------

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


def conversation(owner: str = "address 10.0.0.6", slug: str = "gpt-5.5", **fields: Any) -> str:
    return q.conversation_hash(settled(**fields), owner, slug)


def test_conversation_is_the_same_in_every_turn() -> None:
    first = [message("developer", "d"), message("user", "hi")]
    later = [message("developer", "e"), message("user", "hi"), message("assistant", "yo"), HI]
    assert conversation(input=first) == conversation(input=later) == conversation(input=later, temperature=1)
    assert conversation(input="hi") == conversation(input=[message("user", "hi"), message("assistant", "yo")])
    assert re.fullmatch("[0-9a-f]{64}", conversation(input=first))


def test_conversation_does_not_depend_on_how_a_text_is_written() -> None:
    assert conversation(input="hi") == conversation(input=[{"role": "user", "content": "hi"}])


def test_conversations_differ() -> None:
    names = [
        conversation(), conversation("address 10.0.0.7"), conversation(slug="gpt-5"),
        conversation(instructions="x"), conversation(input=[message("user", "other")]),
        conversation(input=[]), conversation(input=[message("developer", "hi")] * 2, instructions="y"),
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("own", ["s" * 65, "two words", "\ud800", "umläut", "a\nb"])
def test_name_that_fits_no_header_is_hashed_not_cut(own: str) -> None:
    assert re.fullmatch(UUID, q.cache_name(own))
    assert q.cache_name(own) == q.cache_name(own) != q.cache_name(f"{own}x")
    assert q.cache_name("s" * 64) == "s" * 64


@pytest.mark.parametrize("text", ["\ud800", "\u2028", "\0", "x" * 100_000])
def test_stable_id_takes_any_text(text: str) -> None:
    assert re.fullmatch(UUID, q.stable_id(text))
    assert q.stable_id(text) == q.stable_id(text) != q.stable_id(text + "x")


# -- the lite form ------------------------------------------------------------

OFFERED = [tool for tool in TOOLS if tool["type"] != "web_search"]  # a lite model runs no hosted tool
PACKED = {"type": "additional_tools", "role": "developer", "tools": OFFERED}
EXTRA = {"type": "function", "name": "extra"}
PACKED_EXTRA = {**PACKED, "tools": [*OFFERED, EXTRA]}
HI = message("user", "hi")


@pytest.mark.parametrize(("given", "wanted"), [
    ({"tools": TOOLS}, {"input": [PACKED, HI]}),
    ({"instructions": "be brief"}, {"input": [message("developer", "be brief"), HI]}),
    ({"tools": TOOLS, "instructions": "be brief"}, {"input": [PACKED, message("developer", "be brief"), HI]}),
    ({"tools": [], "instructions": ""}, {}),
    ({"tools": None, "instructions": None}, {}),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "exec_command"}},
     {"input": [{**PACKED, "tools": [FUNCTION]}, HI]}),
    ({"parallel_tool_calls": True}, {}),
    ({"parallel_tool_calls": GONE}, {}),
    ({"reasoning": GONE}, {}),
    ({"reasoning": None}, {}),
    ({"reasoning": {"effort": "high", "context": "auto"}},
     {"reasoning": {"effort": "high", "context": "all_turns"}}),
    ({"input": GONE, "tools": TOOLS}, {"input": [PACKED]}),
    # nothing twice where the client sent a part of the form itself
    ({"input": [CARRIER, HI], "instructions": "x"}, {"input": [CARRIER, message("developer", "x"), HI]}),
    ({"input": [PACKED, HI], "tools": TOOLS}, {"input": [PACKED, HI]}),
    ({"input": [PACKED, HI], "tools": [*TOOLS, EXTRA]}, {"input": [PACKED_EXTRA, HI]}),
    ({"input": [CARRIER, HI], "tools": [EXTRA]},
     {"input": [{**CARRIER, "tools": [*CARRIER["tools"], EXTRA]}, HI]}),
    ({"input": [HI, PACKED]}, {"input": [PACKED, HI]}),
    ({"input": [PACKED, {**PACKED, "tools": [EXTRA]}]}, {"input": [PACKED_EXTRA]}),
    ({"input": [PACKED, HI, {**PACKED, "tools": [EXTRA]}]}, {"input": [PACKED_EXTRA, HI]}),
])
def test_lite_form(given: Object, wanted: Object) -> None:
    assert normalize(lite(**given), LITE) == (lite(**with_choice(wanted)), ("form",))


def with_choice(fields: Object) -> Object:
    """Return a lite body with the only choice, where it offers tools."""
    if any(map(q.is_additional_tools, fields.get("input", []))):
        return {**fields, "tool_choice": "auto"}
    return fields


@pytest.mark.parametrize("given", [
    {}, {"input": [PACKED, HI]}, {"input": [CARRIER, message("developer", "x"), HI]}, {"input": []},
    {"tools": "mistyped"}, {"reasoning": "mistyped"}, {"input": 5},
])
def test_lite_form_stays(given: Object) -> None:
    request = lite(**with_choice(given) if given.get("input") != 5 else given)
    assert normalize(request, LITE)[0] is request


@pytest.mark.parametrize(("given", "wanted"), [
    ({}, {"client_metadata": {q.LITE_METADATA: "true"}}),
    ({"client_metadata": {"turn_id": "1"}}, {"client_metadata": {"turn_id": "1", q.LITE_METADATA: "true"}}),
    ({"client_metadata": "mistyped", "tools": TOOLS},
     {"client_metadata": {q.LITE_METADATA: "true"}, "input": [PACKED, HI]}),
    ({"input": [], "generate": False},
     {"input": [], "generate": False, "client_metadata": {q.LITE_METADATA: "true"}}),
])
def test_lite_form_on_a_websocket_is_marked_in_the_frame(given: Object, wanted: Object) -> None:
    assert normalize(lite(**given), LITE_SOCKET) == (lite(**with_choice(wanted)), ("form",))


def test_a_frame_without_input_is_left_alone() -> None:
    request = lite(input=GONE)
    assert normalize(request, LITE_SOCKET)[0] is request
    assert normalize(lite(input=GONE, tools=TOOLS), LITE_SOCKET)[0]["input"] == [PACKED]


MARKED = {"client_metadata": {"turn_id": "1", q.LITE_METADATA: "true"}}
HEADED = PLAIN._replace(lite_header=True)


@pytest.mark.parametrize(("context", "given", "wanted"), [
    (PLAIN, {"input": [PACKED, HI]}, {"tools": OFFERED}),
    (PLAIN, {"input": [PACKED, HI], "tools": [EXTRA]}, {"tools": [*OFFERED, EXTRA]}),
    (PLAIN, {"input": [PACKED, HI], "tools": OFFERED}, {"tools": OFFERED}),
    (PLAIN, {"input": [PACKED, HI], "tools": "mistyped"}, {"tools": OFFERED}),
    (PLAIN, {"input": [HI, PACKED], "reasoning": {"context": "all_turns", "effort": "low"}},
     {"tools": OFFERED, "reasoning": {"effort": "low"}}),
    (HEADED, {"reasoning": {"context": "all_turns"}}, {"reasoning": {}}),
    (SOCKET, MARKED, {"client_metadata": {"turn_id": "1"}}),
    (SOCKET, {**MARKED, "input": [PACKED, HI]}, {"client_metadata": {"turn_id": "1"}, "tools": OFFERED}),
])
def test_plain_form(context: q.Context, given: Object, wanted: Object) -> None:
    assert normalize(settled(**given), context) == (settled(**wanted), ("form",))


@pytest.mark.parametrize("context", [UNKNOWN, UNKNOWN._replace(lite_header=True)])
def test_form_is_left_alone_without_a_catalogue(context: q.Context) -> None:
    assert normalize(settled(input=[PACKED, HI], reasoning={"context": "all_turns"}), context)[1] == ()


def test_there_and_back() -> None:
    there = normalize(settled(tools=TOOLS), LITE)[0]
    changed = {"parallel_tool_calls": False, "reasoning": {}, "tool_choice": "auto"}
    assert normalize(there, PLAIN)[0] == settled(tools=OFFERED, **changed)


@pytest.mark.parametrize("instructions", [{"role": "system", "content": "x"}, {"id": "x" * 65}, 5])
def test_mistyped_instructions_are_left_for_upstream_to_refuse(instructions: Any) -> None:
    assert normalize(lite(instructions=instructions), LITE)[0]["instructions"] == instructions


# -- many rules at once, and odd values ---------------------------------------


def test_sdk_request_for_an_alias_of_a_lite_model() -> None:
    request = {
        "model": "local_md", "instructions": "be brief", "temperature": 0.2, "stream": False,
        "input": [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "id": "msg_1"},
                  REFERENCE],
        "tools": [FUNCTION], "reasoning": {"effort": "minimal"}, "service_tier": "priority",
    }
    changed, fired = normalize(request, LITE._replace(slug="gpt-6-sol", name="01a2"))
    assert fired == ("alias", "type-messages", "system-to-developer", "store-false", "stream-true",
                     "include-reasoning", "drop-unsupported", "service-tier", "effort", "continuity",
                     "cache-key", "form")
    assert changed == {
        "model": "gpt-6-sol", "stream": True, "store": False, "include": [ENCRYPTED],
        "prompt_cache_key": "01a2", "tool_choice": "auto",
        "reasoning": {"effort": "low", "context": "all_turns"}, "parallel_tool_calls": False,
        "input": [
            {"type": "additional_tools", "role": "developer", "tools": [FUNCTION]},
            message("developer", "be brief"),
            {"type": "message", "role": "developer", "content": "s"},
            {"type": "message", "role": "user", "content": "u"}],
    }


RICH = {
    "model": "m", "instructions": "x", "store": True, "stream": False, "include": ["x"], "tools": [FUNCTION],
    "service_tier": "fast", "reasoning": {"effort": "ultra"}, "previous_response_id": "r", "metadata": {},
    "client_metadata": {q.LITE_METADATA: "true"}, "text": {"verbosity": "low"}, "prompt_cache_key": "",
    "input": [
        {"type": "additional_tools", "role": "developer", "tools": [EXTRA]}, HI, HOLLOW,
        CALL, REFERENCE, {"role": "system", "content": "s", "id": "x"}],
}
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 1e999, 10**30, "", "odd", "\ud800", [], [None], ["odd"], [[]], {},
    {"odd": 1},
    [{"type": "additional_tools"}], [{"type": ["message"], "role": {}, "id": 3}],
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the path of every node of a JSON value but the root."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from places(child, (*path, key))


def with_odd(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    """Return a JSON value with another one in one place."""
    if not path:
        return odd
    copied = list(value) if isinstance(value, list) else dict(value)
    copied[path[0]] = with_odd(value[path[0]], path[1:], odd)
    return copied


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_odd_values_in_every_place(context: q.Context) -> None:
    """Replace each node by each odd value: no rule raises, changes its argument, or wants a second run."""
    for path in places(RICH):
        if path == ("instructions",):
            continue  # see test_mistyped_instructions_are_left_for_upstream_to_refuse
        for odd in ODD_VALUES:
            try:
                normalize(with_odd(RICH, path, odd), context)
            except Exception as exc:
                raise AssertionError(f"{odd!r} at {path}") from exc


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_any_object_is_taken(context: q.Context) -> None:
    requests: list[Object] = [{}, {"": None}, {"input": {}}, {"input": [[]]}, {"input": ["hi", None, True]}]
    for request in requests:
        normalize(request, context)


# -- what no rule could mend --------------------------------------------------

ODD_MODELS: tuple[Any, ...] = (None, "", " ", 1, True, [], {}, ["gpt-5"])
ODD_INPUTS: tuple[Any, ...] = (0, 1, 1.5, True, {})

@pytest.mark.parametrize(("request_", "param"), [
    ([], None), (None, None), ("x", None), (1, None), (True, None),
    ({}, "model"), *[({"model": odd}, "model") for odd in ODD_MODELS],
    *[({"model": odd}, "model") for odd in ("a b", "a\n", "a\r\nx: y", "\ud800", "é", "m" * 129)],
    *[({"model": "m", "input": odd}, "input") for odd in ODD_INPUTS],
])
def test_check_request_names_the_parameter(request_: Any, param: str | None) -> None:
    with pytest.raises(q.InvalidRequest) as caught:
        q.check_request(request_)
    assert (caught.value.status, caught.value.param) == (400, param)
    json.dumps(caught.value.body())


@pytest.mark.parametrize("fields", [
    {}, {"input": ""}, {"input": None}, {"input": []}, {"input": [1]}, {"model": "m" * 128},
])
def test_check_request_takes(fields: Object) -> None:
    q.check_request({"model": "gpt-5.5", **fields})


# -- repairs ------------------------------------------------------------------

REPAIR_ROWS = [
    ("Unsupported parameter: top_k", "drop-parameter", {"dropped": frozenset(("top_k",))}),
    ("Unsupported parameter: 'top_k'.", "drop-parameter", {"dropped": frozenset(("top_k",))}),
    ('Unsupported parameter: "top_k"', "drop-parameter", {"dropped": frozenset(("top_k",))}),
    ('{"detail": "Unsupported parameter: `top_k`"}', "drop-parameter", {"dropped": frozenset(("top_k",))}),
    ("Unknown parameter: 'text.verbosity'.", "drop-parameter", {"dropped": frozenset(("text.verbosity",))}),
    ("UNSUPPORTED PARAMETER top_k", "drop-parameter", {"dropped": frozenset(("top_k",))}),
    ("Unknown parameter: 'tools[0].strict'.", "drop-parameter", {"dropped": frozenset(("tools.strict",))}),
    ("Instructions are required", "instructions", {"force_instructions": True}),
    ("Item with id 'rs_1' not found.", "continuity", {"strict": True}),
    ("Items are not persisted when `store` is set to false.", "continuity", {"strict": True}),
    ("Item 'msg_1' of type 'message' was provided without its required 'reasoning' item: 'rs_1'.",
     "continuity", {"strict": True}),
    ("invalid_encrypted_content", "continuity", {"strict": True}),
    ("The encrypted content gAAA could not be verified.", "continuity", {"strict": True}),
]


@pytest.mark.parametrize("text", [
    "Invalid value: 'Unsupported parameter: top_k'. Supported values are: 'none'",
    "Item 'Unknown parameter: text' is not known",
])
def test_repair_is_not_taught_by_what_a_client_said(text: str) -> None:
    assert q.match_repair(text) is None


def test_tools_are_never_dropped() -> None:
    found = q.match_repair("Unsupported parameter: tools")
    assert found is not None
    assert found[0].apply(q.Context(), found[1], {}) == (q.Context(), "")


@pytest.mark.parametrize(("text", "name", "changes"), REPAIR_ROWS)
def test_repair_changes_the_context_once(text: str, name: str, changes: Object) -> None:
    found = q.match_repair(text)
    assert found is not None
    repair, match = found
    assert repair.name == name
    repaired, _ = repair.apply(UNKNOWN, match, {})
    assert repaired == UNKNOWN._replace(**changes)
    assert repair.apply(repaired, match, {})[0] == repaired


def test_named_parameters_add_up() -> None:
    found = q.match_repair("Unsupported parameter: top_k")
    assert found is not None
    context, changed = found[0].apply(UNKNOWN._replace(dropped=frozenset(("seed",))), found[1], {})
    assert changed == "top_k"
    assert context == UNKNOWN._replace(dropped=frozenset(("seed", "top_k")))
    assert normalize(settled(seed=1, top_k=2), context) == (settled(), ("drop-unsupported",))


@pytest.mark.parametrize("name", ["model", "input", "stream", "store", "input[3].id", "input.content"])
def test_what_a_request_is_about_is_never_dropped(name: str) -> None:
    found = q.match_repair(f"Unknown parameter: '{name}'.")
    assert found is not None
    assert found[0].apply(UNKNOWN, found[1], {}) == (UNKNOWN, "")


@pytest.mark.parametrize("text", [
    "Model not found gpt-6-sol", "x-openai-internal-codex-responses-lite is not allowed for this model",
    "Responses Lite is required", "additional_tools is not supported",
])
def test_mismatched_form_asks_the_catalogue(text: str) -> None:
    found = q.match_repair(text)
    assert found is not None
    assert found[0].name == q.FORM_REPAIR
    assert found[0].apply(UNKNOWN, found[1], {}) == (UNKNOWN, "")


@pytest.mark.parametrize("text", [
    "", "The usage limit has been reached", "Unsupported parameter:", "Unsupported parameter: 5",
    "parameter: x", "Store must be set to false",
])
def test_other_refusals_have_no_repair(text: str) -> None:
    assert q.match_repair(text) is None


def test_repairs_are_named_once_and_say_why() -> None:
    names = [repair.name for repair in q.REPAIRS]
    assert len(set(names)) == len(names)
    assert all(repair.why for repair in q.REPAIRS)
    assert q.FORM_REPAIR in names


# -- the lists of a request ---------------------------------------------------

ONE_TOOL = [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}]


def lists_in(value: Any) -> list[list[Any]]:
    """Return all lists in a value, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    elif isinstance(value, list):
        return [value, *(found for entry in value for found in lists_in(entry))]
    else:
        return []
    return [found for entry in value for found in lists_in(entry)]


@pytest.mark.parametrize("context", [PLAIN, LITE, q.Context(slug="m"), PLAIN._replace(lite_header=True)],
                         ids=["plain", "lite", "no model", "lite header"])
@pytest.mark.parametrize("fields", [
    {"input": [{"type": "additional_tools", "role": "developer", "tools": ONE_TOOL}]},
    {"input": [{"type": "additional_tools", "tools": ONE_TOOL}] * 2},
    {"input": [{"type": "additional_tools", "tools": ONE_TOOL}], "tools": ONE_TOOL},
    {"tools": [{"type": "namespace", "name": "n", "tools": ONE_TOOL}]},
    {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": ONE_TOOL}, "tools": ONE_TOOL},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}]},
], ids=["one carrier", "two", "and tools", "namespace", "choice", "content"])
def test_no_list_of_a_request_is_a_part_of_what_was_read(fields: Object, context: q.Context) -> None:
    """A large request is freed by emptying its lists; the conversation's last request shares their items."""
    given = {"model": "m", "input": [], **fields}
    own = [value for value in given.values() if isinstance(value, list)]
    inner = [found for value in given.values() for found in lists_in(value)
             if not any(found is top for top in own)]
    made, _ = q.normalize(given, context)
    for name in q.ITEM_LISTS:
        assert not any(made.get(name) is found for found in inner)
