"""Room in flight: names, forms and repairs on a WebSocket; frames that are Codex's alone; its ends."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import wire
from conftest import LogLines, RunningBridge
from help import AGENT, HI, SCHEMA, TOOL, Object, models, until

import qoo_bridge as q

PLAIN, LITE = "gpt-5.5", "gpt-6-sol"
SESSION = "01a201ed-2750-7d43-ab4e-7ce4b1a183d8"
CODEX_FIELDS = {
    "user-agent": AGENT, "originator": "codex_exec", "openai-beta": wire.WEBSOCKET_BETA,
    "session-id": SESSION, "thread-id": SESSION, "x-client-request-id": SESSION,
    "x-codex-window-id": f"{SESSION}:0",
}
SDK_FIELDS = {"user-agent": "OpenAI/Python 3.54.0"}
EACH_CLIENT = pytest.mark.parametrize("fields", [SDK_FIELDS, CODEX_FIELDS], ids=["sdk", "codex"])


@contextlib.contextmanager
def dialled(
    bridge: RunningBridge, fields: dict[str, str], seconds: float = 5
) -> Iterator[wire.WebSocketClient]:
    """Open a WebSocket."""
    with contextlib.closing(wire.WebSocketClient(bridge.address, seconds)) as client:
        reply = client.connect("/v1/responses", fields)
        assert reply.status == 101, reply.body
        yield client


def create(**fields: Any) -> Object:
    """Return a frame as an SDK sends it."""
    return {"type": "response.create", "model": PLAIN, "input": [HI], **fields}


def codex_create(**fields: Any) -> Object:
    """Return a frame of a Codex."""
    own = {"stream": True, "store": False, "prompt_cache_key": SESSION}
    return {**create(include=["reasoning.encrypted_content"]), **own, **fields}


def turn(client: wire.WebSocketClient, frame: Object) -> list[Object]:
    """Send a frame, and read its answer up to the terminal event or an error."""
    client.send_json(frame)
    return client.read_turn()


def completed(client: wire.WebSocketClient, frame: Object) -> list[Object]:
    """Send a frame that goes well; return the events of its answer."""
    events = turn(client, frame)
    assert events[-1]["type"] == "response.completed", events[-1]
    return events


def handshakes(backend: wire.Backend) -> list[wire.Request]:
    """Return the handshakes that came upstream."""
    with backend.changed:
        return [request for request in backend.requests if request.header("upgrade")]


def kinds(events: list[Object]) -> list[str]:
    """Return the types of events."""
    return [event["type"] for event in events]


# -- one name in four places ---------------------------------------------------------------

ANY = "*"  # in a row: whatever it is
SDK_NAMES: dict[str, tuple[dict[str, str], Object, str]] = {  # headers, fields of each frame, the name
    "none": ({}, {}, ""),
    "lite": ({}, {"model": LITE}, ""),
    "session": ({"session-id": "s-1"}, {}, "s-1"),
    "old-session": ({"session_id": "s-1"}, {}, "s-1"),
    "session-and-key": ({"session-id": "s-1"}, {"prompt_cache_key": "s-1"}, "s-1"),
    "long-session": ({"session-id": "s" * 65}, {}, ANY),
    "request-id": ({"x-client-request-id": "req-1"}, {}, ""),
    "key": ({}, {"prompt_cache_key": "mine"}, ""),  # comes after the handshake, whose names are sent
    "session-and-another-key": ({"session-id": "s-1"}, {"prompt_cache_key": "mine"}, "s-1"),
}


@pytest.mark.parametrize(("headers", "given", "wanted"), SDK_NAMES.values(), ids=SDK_NAMES)
def test_a_conversation_on_a_websocket_has_one_name_in_four_places(
    bridge: RunningBridge, backend: wire.Backend, headers: dict[str, str], given: Object, wanted: str
) -> None:
    begun = time.time()
    with dialled(bridge, {**SDK_FIELDS, **headers}) as client:
        response = completed(client, create(**given))[-1]["response"]
        completed(client, create(**given, previous_response_id=response["id"]))
    (asked,) = handshakes(backend)
    (name,) = {each for frame in backend.frames for each in wire.names_of(asked, frame)}
    assert isinstance(name, str) and len(name) <= 64
    if wanted == "":
        seconds = wire.uuid7_seconds(name)
        assert seconds is not None and begun - 0.001 <= seconds <= time.time()
    else:
        assert wanted in (name, ANY)


# The handshake of Codex 0.120, run against a stand-in: no user agent, no version, no thread.
OLD_FIELDS = {
    "authorization": "Bearer lan", "originator": "codex_exec", "openai-beta": wire.WEBSOCKET_BETA,
    "x-codex-window-id": f"{SESSION}:0", "session_id": SESSION, "x-client-request-id": SESSION,
    "x-codex-turn-metadata": f'{{"session_id":"{SESSION}","turn_id":"","sandbox":"seccomp"}}',
    "sec-websocket-extensions": "permessage-deflate; client_max_window_bits",
}


@pytest.mark.parametrize("fields", [CODEX_FIELDS, OLD_FIELDS], ids=["codex", "old-codex"])
def test_a_codex_on_a_websocket_goes_up_under_its_own_name(
    bridge: RunningBridge, backend: wire.Backend, fields: dict[str, str]
) -> None:
    with dialled(bridge, fields) as client:
        completed(client, codex_create())
    assert wire.names_of(handshakes(backend)[0], backend.frames[0]) == (SESSION,) * 4


LONG_TEXT: Object = {**HI, "content": [{"type": "input_text", "text": "word " * 2000}]}
# A Codex's tools are longer than its first turns, and each of its frames for a plain model repeats them.
OPENING: Object = {"tools": [{**TOOL, "description": "word " * 2000}], "instructions": "word " * 2000}


@pytest.mark.parametrize(("fields", "frame"), [
    (SDK_FIELDS, create()), (SDK_FIELDS, create(model=LITE, tools=[TOOL])), (CODEX_FIELDS, codex_create()),
    (SDK_FIELDS, create(prompt_cache_key="mine")),
    (SDK_FIELDS, create(**OPENING)), (SDK_FIELDS, create(model=LITE, **OPENING)),
    (CODEX_FIELDS, codex_create(**OPENING)),
], ids=["sdk", "sdk-lite", "codex", "sdk-with-a-key", "sdk-opening", "sdk-lite-opening", "codex-opening"])
def test_ten_turns_on_a_websocket_are_cached_from_the_second_on(
    bridge: RunningBridge, backend: wire.Backend, fields: dict[str, str], frame: Object
) -> None:
    with dialled(bridge, fields) as client:
        previous: Object = {"input": [LONG_TEXT]}
        for number in range(10):
            response = completed(client, {**frame, **previous})[-1]["response"]
            more = {**HI, "content": [{"type": "input_text", "text": f"question {number}"}]}
            previous = {"input": [more], "previous_response_id": response["id"]}
    shares = [charge.cached / charge.usage["input_tokens"] for charge in backend.cache.charges]
    assert (len(shares), min(shares[1:]) > 0.8) == (10, True)


def test_a_session_whose_key_was_replaced_dials_next_with_a_uuid7(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.cache.replaces_keys = True
    for _ in range(2):
        with dialled(bridge, {**SDK_FIELDS, "session-id": "of-an-sdk"}) as client:
            completed(client, create())
    first, second = (wire.names_of(asked, frame) for asked, frame in zip(handshakes(backend), backend.frames))
    assert set(first) == {"of-an-sdk"}
    (name,) = set(second)
    assert wire.has_real_time(name)


@pytest.mark.parametrize(("fields", "make"), [(SDK_FIELDS, create), (CODEX_FIELDS, codex_create)],
                         ids=["sdk", "codex"])
@pytest.mark.parametrize("model", [PLAIN, LITE])
def test_a_long_key_in_a_frame_is_never_refused(
    bridge: RunningBridge, backend: wire.Backend, model: str, fields: dict[str, str], make: Any
) -> None:
    with dialled(bridge, fields) as client:
        for end in ("a", "b", "a"):
            completed(client, make(model=model, prompt_cache_key="k" * 64 + end))
    one, two, again = (frame["prompt_cache_key"] for frame in backend.frames)
    codex = fields is CODEX_FIELDS
    assert (one == again, one != two, max(map(len, (one, two))) <= 64) == (True, codex, True)


# -- the rules and the repairs of a request, on a WebSocket ------------------------------------

THOUGHT: Object = {"type": "reasoning", "id": "rs_1", "encrypted_content": "gAAA", "summary": []}
SEARCH: Object = {"type": "web_search"}
OTHER_TOOL: Object = {"type": "function", "name": "walk", "strict": False, "parameters": SCHEMA}
CHOSEN: Object = {"tools": [TOOL, OTHER_TOOL], "tool_choice": {"type": "function", "name": "walk"}}


@EACH_CLIENT
@pytest.mark.parametrize("given", [
    {"status": None}, {"status": "completed"}, {"content": [{"type": "reasoning_text", "text": "x"}]},
    {"summary": None},
])
def test_an_echoed_reasoning_item_in_a_frame_is_taken(
    bridge: RunningBridge, backend: wire.Backend, fields: dict[str, str], given: Object
) -> None:
    with dialled(bridge, fields) as client:
        completed(client, codex_create(input=[HI, {**THOUGHT, **given}]))
    assert backend.refusals == []


@pytest.mark.parametrize("side_frames", [False, True])
@EACH_CLIENT
def test_a_field_of_an_item_that_is_refused_goes_on_a_websocket_too(
    bridge: RunningBridge, backend: wire.Backend, fields: dict[str, str], side_frames: bool
) -> None:
    backend.side_frames = side_frames
    with dialled(bridge, fields) as client:
        events = completed(client, codex_create(input=[{**HI, "name": "ann"}]))
    assert "error" not in kinds(events)
    assert backend.frames[1]["input"] == [HI]


REPAIRED: dict[str, Object] = {
    "parameter": {"field_of_tomorrow": 1},
    "cipher": {"input": [HI, {**THOUGHT, "encrypted_content": "OTHER_account"}]},
}


@pytest.mark.parametrize("given", REPAIRED.values(), ids=REPAIRED)
@EACH_CLIENT
def test_repairs_work_behind_side_frames(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, fields: dict[str, str], given: Object
) -> None:
    backend.side_frames = True
    with dialled(bridge, fields) as client:
        events = completed(client, codex_create(**given))
        again = completed(client, codex_create())
    assert "error" not in kinds(events + again)
    assert kinds(again).count("response.completed") == 1
    assert len(backend.frames) == 3
    assert "repairs=-" not in log_lines.ended()[0]


def test_a_repeated_frames_side_frames_reach_a_codex_before_its_answer(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.side_frames = True
    with dialled(bridge, CODEX_FIELDS) as client:
        events = completed(client, codex_create(field_of_tomorrow=1))
    found = kinds(events)
    assert set(found[:found.index("response.created")]) == {"codex.rate_limits", "codex.response.metadata"}


@pytest.mark.parametrize("tool", [SEARCH, {"type": "image_generation"}], ids=["search", "draw"])
def test_a_forced_hosted_tool_in_a_frame_is_left_to_the_model(
    bridge: RunningBridge, backend: wire.Backend, tool: Object
) -> None:
    with dialled(bridge, SDK_FIELDS) as client:
        completed(client, create(tools=[tool], tool_choice=tool))
    assert [frame["tool_choice"] for frame in backend.frames] == [tool, "auto"]


def is_lite(frame: Object) -> bool:
    """Tell whether a frame says that it is in the lite form."""
    return bool(frame.get("client_metadata", {}).get(q.LITE_METADATA))


@EACH_CLIENT
@pytest.mark.parametrize("given", [CHOSEN, {"tools": [SEARCH, TOOL]}], ids=["forced", "search"])
def test_what_lite_would_lose_goes_in_a_plain_frame(
    bridge: RunningBridge, backend: wire.Backend, fields: dict[str, str], given: Object
) -> None:
    backend.takes_plain.add(LITE)
    with dialled(bridge, fields) as client:
        completed(client, codex_create(model=LITE, **given))
    (frame,) = backend.frames
    assert (is_lite(frame), {name: frame.get(name) for name in given}) == (False, given)


@EACH_CLIENT
@pytest.mark.parametrize("side_frames", [False, True])
def test_a_plain_frame_that_is_refused_goes_lite(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, fields: dict[str, str],
    side_frames: bool,
) -> None:
    backend.side_frames = side_frames
    with dialled(bridge, fields) as client:
        completed(client, codex_create(model=LITE, **CHOSEN))
        completed(client, codex_create(model=LITE, **CHOSEN))
    assert [is_lite(frame) for frame in backend.frames] == [False, True, True]  # remembered
    for frame in backend.frames[1:]:
        assert (frame["input"][0]["tools"], frame["tool_choice"]) == ([OTHER_TOOL], "auto")
    assert "tool_choice" in log_lines.ended()[0].partition("repairs=")[2].partition(" ")[0]


@pytest.mark.parametrize("choice", [
    CHOSEN["tool_choice"], "none",
    {"type": "allowed_tools", "mode": "auto", "tools": [CHOSEN["tool_choice"]]},
], ids=["forced", "none", "allowed"])
def test_a_narrowed_choice_does_not_narrow_the_turns_behind_it(
    bridge: RunningBridge, backend: wire.Backend, choice: Any
) -> None:
    tools = CHOSEN["tools"]
    with dialled(bridge, SDK_FIELDS) as client:
        first = completed(client, create(model=LITE, tools=tools, tool_choice=choice))[-1]["response"]["id"]
        second = completed(client, create(model=LITE, tools=tools, previous_response_id=first))
        third = second[-1]["response"]["id"]
        completed(client, create(model=LITE, tools=tools, previous_response_id=third))
    offered = [[tool for item in frame["input"] for tool in item.get("tools", [])]
               for frame in backend.frames]
    assert offered[-3:] == [[] if choice == "none" else [OTHER_TOOL], tools, []]


def test_a_choice_can_be_forced_in_each_turn_of_a_lite_chain(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    with dialled(bridge, SDK_FIELDS) as client:
        first = completed(client, create(model=LITE, **CHOSEN))[-1]["response"]["id"]
        completed(client, create(model=LITE, **CHOSEN, previous_response_id=first))
    assert backend.frames[-1]["input"][0]["tools"] == [OTHER_TOOL]


def test_auto_goes_up_with_the_tools_of_a_lite_frame(bridge: RunningBridge, backend: wire.Backend) -> None:
    with dialled(bridge, SDK_FIELDS) as client:
        completed(client, create(model=LITE, tools=[TOOL]))
    assert (is_lite(backend.frames[0]), backend.frames[0].get("tool_choice")) == (True, "auto")


def test_an_effort_in_a_frames_model_is_one(bridge: RunningBridge, backend: wire.Backend) -> None:
    with dialled(bridge, SDK_FIELDS) as client:
        completed(client, create(model="gpt-5.5-high"))
    assert (backend.frames[0]["model"], backend.frames[0]["reasoning"]) == (PLAIN, {"effort": "high"})


LONG_CALL = "call_" + "f" * 78


@EACH_CLIENT
def test_long_call_ids_in_a_frame_are_shortened_and_given_back(
    bridge: RunningBridge, backend: wire.Backend, fields: dict[str, str]
) -> None:
    def call_again(ws: wire.WebSocketExchange, body: Object) -> None:
        ws.events(*wire.call_turn("run", "{}", body["input"][1]["call_id"]))

    backend.on_frame(call_again)
    items = [HI, {"type": "function_call", "call_id": LONG_CALL, "name": "run", "arguments": "{}"},
             {"type": "function_call_output", "call_id": LONG_CALL, "output": "x"}]
    with dialled(bridge, fields) as client:
        events = completed(client, codex_create(input=items))
    call, output = backend.frames[0]["input"][1:]
    assert call["call_id"] == output["call_id"] != LONG_CALL
    assert {event["item"]["call_id"] for event in events if "item" in event} == {LONG_CALL}


def test_a_schema_without_properties_in_a_frame_gets_some(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    with dialled(bridge, CODEX_FIELDS) as client:
        completed(client, codex_create(tools=[{**TOOL, "parameters": {"type": "object"}}]))
    assert backend.frames[0]["tools"] == [TOOL]


@pytest.mark.parametrize("opening", [[], [wire.rate_limits_frame()]], ids=["first", "after-a-side-frame"])
def test_a_failure_that_comes_first_is_repaired_on_a_websocket(
    bridge: RunningBridge, backend: wire.Backend, opening: list[Object]
) -> None:
    failed = wire.failed("invalid_encrypted_content", "The encrypted content gAAA could not be verified.")
    backend.on_frame(lambda ws, _: ws.events(*opening, failed))
    with dialled(bridge, CODEX_FIELDS) as client:
        completed(client, codex_create(input=[HI, THOUGHT]))
    assert backend.frames[1]["input"] == [HI]


# -- an `error` frame that means nothing to Codex ---------------------------------------------------

OVERLOADED: Object = {
    "type": "error", "sequence_number": 2,
    "error": {"type": "service_unavailable_error", "code": "server_is_overloaded", "param": None,
              "message": "Our servers are currently overloaded. Please try again later."},
}
FLAT: Object = {"type": "error", "code": "context_length_exceeded", "message": "too long"}
FAILED = wire.failed(
    "server_is_overloaded", "Our servers are currently overloaded. Please try again later.", 3, "resp_1")
SOON = 0.8  # seconds that a test waits for what must come


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the failure of an error come sooner than after 2 s."""
    monkeypatch.setattr(q, "FAILURE_WAIT", 0.05, raising=False)


@pytest.mark.parametrize("event", [OVERLOADED, FLAT], ids=["nested", "flat"])
@pytest.mark.parametrize("begun", [[], [wire.created("resp_1")]], ids=["nothing", "created"])
@pytest.mark.usefixtures("short_wait")
def test_an_error_without_a_status_is_followed_by_its_failure(
    bridge: RunningBridge, backend: wire.Backend, begun: list[Object], event: Object
) -> None:
    backend.on_frame(lambda ws, _: ws.events(*begun, event))
    with dialled(bridge, CODEX_FIELDS, SOON) as client:
        events = turn(client, codex_create())
        failed = client.read_json()
        assert events == [*begun, event]
        assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
        said = event.get("error", event)
        assert {name: failed["response"]["error"][name] for name in ("code", "message")} == {
            name: said[name] for name in ("code", "message")}
        assert not begun or failed["response"]["id"] == "resp_1"
        completed(client, codex_create())  # the socket goes on


@pytest.mark.usefixtures("short_wait")
def test_upstreams_own_failure_behind_an_error_is_the_only_one(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on_frame(lambda ws, _: ws.events(wire.created("resp_1"), OVERLOADED, FAILED))
    with dialled(bridge, CODEX_FIELDS, SOON) as client:
        assert turn(client, codex_create())[-1] == OVERLOADED
        assert client.read_json() == FAILED
        assert kinds(completed(client, codex_create()))[0] == "response.created"


@pytest.mark.usefixtures("short_wait")
def test_a_failure_that_comes_too_late_is_not_a_second_one(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    gate = threading.Event()

    def late(ws: wire.WebSocketExchange, _: Object) -> None:
        ws.events(wire.created("resp_1"), OVERLOADED)
        assert gate.wait(5)
        ws.event(wire.failed("server_is_overloaded", "late", 9, "resp_1"))

    backend.on_frame(late)
    with dialled(bridge, CODEX_FIELDS, SOON) as client:
        try:
            turn(client, codex_create())
            assert client.read_json()["type"] == "response.failed"
        finally:
            gate.set()
        events = completed(client, codex_create())
        assert kinds(events)[0] == "response.created"
        assert "response.failed" not in kinds(events)


@EACH_CLIENT
@pytest.mark.usefixtures("short_wait")
def test_a_turn_that_fails_at_once_long_after_an_error_is_settled(
    bridge: RunningBridge, backend: wire.Backend, fields: dict[str, str]
) -> None:
    backend.on_frame(lambda ws, _: ws.event(OVERLOADED),
                     lambda ws, _: ws.event(wire.failed("server_error", "no", 1, "resp_2")))
    with dialled(bridge, fields, SOON) as client:
        turn(client, codex_create())
        if fields is CODEX_FIELDS:
            client.read_json()  # ours
        threading.Event().wait(2 * q.FAILURE_WAIT)
        client.send_json(codex_create())
        assert client.read_json()["response"]["id"] == "resp_2"
        assert until(lambda: bridge.bridge.telemetry.snapshot(0)["open"] == [])
        assert [row["end"] for row in bridge.bridge.telemetry.snapshot(0)["recent"]] == ["failed", "error"]


@pytest.mark.parametrize("status", [{"status": 503}, {"status_code": 429, "headers": {}}])
@pytest.mark.usefixtures("short_wait")
def test_an_error_with_a_status_stands_alone(
    bridge: RunningBridge, backend: wire.Backend, status: Object
) -> None:
    event = {**OVERLOADED, **status}
    backend.on_frame(lambda ws, _: ws.events(wire.created(), event))
    with dialled(bridge, CODEX_FIELDS, SOON) as client:
        assert turn(client, codex_create())[-1] == event
        with pytest.raises(socket.timeout):  # another class than TimeoutError up to Python 3.9
            client.sock.settimeout(0.2)
            client.read_json()
        client.sock.settimeout(SOON)
        completed(client, codex_create())


@EACH_CLIENT
@pytest.mark.usefixtures("short_wait")
def test_the_failure_of_the_next_turn_is_not_taken_for_that_of_an_error(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, fields: dict[str, str]
) -> None:
    failed = wire.failed("cyber_policy", "no", 1, "resp_2")
    backend.on_frame(lambda ws, _: ws.events(wire.created("resp_1"), OVERLOADED),
                     lambda ws, _: ws.event(failed))
    with dialled(bridge, fields, SOON) as client:
        turn(client, codex_create())
        if fields is CODEX_FIELDS:
            assert client.read_json()["response"]["id"] == "resp_1"  # ours
        client.send_json(codex_create())
        assert client.read_json()["response"]["id"] == "resp_2"
        completed(client, codex_create())
    assert until(lambda: len(log_lines.ended()) == 3)


LIMIT: Object = {"type": "usage_limit_reached", "message": "The usage limit has been reached"}
LOGGED: dict[str, tuple[Object, int, str]] = {
    "status_code": ({"type": "error", "status_code": 429, "headers": {}, "error": LIMIT}, 429,
                    "usage_limit_reached"),
    "status": ({"type": "error", "status": 429, "error": LIMIT}, 429, "usage_limit_reached"),
    "neither": (OVERLOADED, 503, "server_is_overloaded"),
    "policy": ({"type": "error", "error": {"code": "cyber_policy", "message": "no"}}, 400, "cyber_policy"),
}


@pytest.mark.parametrize(("event", "status", "code"), LOGGED.values(), ids=LOGGED)
@pytest.mark.usefixtures("short_wait")
def test_an_error_frame_is_logged_as_what_it_is(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, event: Object, status: int, code: str
) -> None:
    backend.on_frame(lambda ws, _: ws.events(wire.created(), event))
    with dialled(bridge, SDK_FIELDS) as client:
        assert turn(client, create())[-1] == event
    (line,) = log_lines.ended()
    assert f" status={status} " in line
    assert f"error=upstream:{code}" in line


# -- frames that are Codex's alone ---------------------------------------------------------------------

SIDE: list[Object] = [
    wire.rate_limits_frame(), wire.metadata_frame("W/x"), wire.timing_frame(), {"type": "codex.of_tomorrow"},
    {"type": "responsesapi.of_tomorrow"}, wire.keepalive(3),
]
FIRST, *REST = wire.text_turn("hello there", empty_output=False)


def send_with_sides(ws: wire.WebSocketExchange, _: Object) -> None:
    """Answer with side frames before, in and behind an answer's events."""
    ws.events(*SIDE, FIRST, *SIDE, *REST[:-1], *SIDE, REST[-1])


def test_a_codex_gets_each_side_frame(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on_frame(send_with_sides)
    with dialled(bridge, CODEX_FIELDS) as client:
        found = kinds(completed(client, codex_create()))
    for side in SIDE:
        assert found.count(side["type"]) == 3


def test_other_clients_get_no_side_frame(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on_frame(send_with_sides)
    with dialled(bridge, SDK_FIELDS) as client:
        assert completed(client, create()) == [FIRST, *REST]


def test_other_clients_get_no_side_frame_between_two_answers(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on_frame(lambda ws, _: ws.events(FIRST, *REST, *SIDE))
    with dialled(bridge, SDK_FIELDS) as client:
        completed(client, create())
        assert kinds(completed(client, create()))[0] == "response.created"


WINDOWS: dict[str, tuple[Object | None, Object | None]] = {
    "both": ({"used_percent": 8, "window_minutes": 300, "reset_at": 1795346042},
             {"used_percent": 5, "window_minutes": 10080, "reset_at": 1795932842}),
    "primary-alone": ({"used_percent": 8, "window_minutes": 43200, "reset_at": 1795346042}, None),
    "half-used": ({"used_percent": 0.5, "window_minutes": 1440, "reset_at": 1795346042}, None),
}


@pytest.mark.parametrize(("primary", "secondary"), WINDOWS.values(), ids=WINDOWS)
@EACH_CLIENT
def test_the_plans_limits_are_read_from_frames(
    bridge: RunningBridge, backend: wire.Backend, fields: dict[str, str], primary: Object,
    secondary: Object | None,
) -> None:
    frame = wire.rate_limits_frame(primary, secondary)
    backend.on_frame(lambda ws, _: ws.events(frame, *wire.text_turn("hi")))
    with dialled(bridge, fields) as client:
        completed(client, codex_create())
        limits = wire.get(bridge.address, "/status").json["rate_limits"]
    assert {name: limits["primary"][name] for name in primary} == primary
    assert (limits.get("secondary") or None) == secondary
    assert limits["plan_type"] == "pro"


@pytest.mark.parametrize("limits", [
    None, 5, [], "x", {}, {"primary": 5}, {"primary": {"used_percent": "many"}},
    {"primary": {"used_percent": 1e999}}, {"primary": {"used_percent": True}}, {"primary": []},
])
def test_limits_in_a_frame_that_are_none_break_nothing(
    bridge: RunningBridge, backend: wire.Backend, limits: Any
) -> None:
    backend.on_frame(lambda ws, _: ws.events(
        {**wire.rate_limits_frame(), "rate_limits": limits}, *wire.text_turn("hi")))
    with dialled(bridge, CODEX_FIELDS) as client:
        completed(client, codex_create())
        assert wire.get(bridge.address, "/status").status == 200
    assert bridge.faults == []


def test_a_codex_is_told_the_tag_of_our_list_on_a_websocket(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.side_frames = True
    tag = models(bridge, "0.169.0").header("etag")
    with dialled(bridge, CODEX_FIELDS) as client:
        assert client.reply is not None
        assert client.reply.header("x-models-etag") == tag
        events = completed(client, codex_create())
    (metadata,) = [event for event in events if event["type"] == "codex.response.metadata"]
    assert metadata["headers"] == {"x-models-etag": tag, "x-codex-turn-state": "ts-sticky-1"}


@pytest.mark.parametrize("headers", [None, [], 5, {}, {"x-models-etag": 5}, {"X-Models-ETag": "W/x"}])
def test_odd_headers_in_a_frame_break_nothing(
    bridge: RunningBridge, backend: wire.Backend, headers: Any
) -> None:
    backend.on_frame(lambda ws, _: ws.events(
        {"type": "codex.response.metadata", "headers": headers}, *wire.text_turn("hi")))
    with dialled(bridge, CODEX_FIELDS) as client:
        events = completed(client, codex_create())
    assert events[0]["type"] == "codex.response.metadata"
    assert "W/x" not in str(events[0])
    assert bridge.faults == []


# -- a message that only HTTP takes ----------------------------------------------------------------------

LIMIT_BYTES = 16 * 1024 * 1024
LARGE = b'{"type":"response.create","model":"gpt-5.5","input":[],"x":"%b"}'


def sized(size: int) -> bytes:
    """Return a frame's JSON of exactly so many bytes."""
    return LARGE % (b"a" * (size - len(LARGE) + 2))


@pytest.mark.parametrize("fragments", [1, 3])
@EACH_CLIENT
def test_a_message_of_16_mib_is_closed_here_and_its_session_goes_on_over_http(
    bridge: RunningBridge, backend: wire.Backend, fields: dict[str, str], fragments: int
) -> None:
    fields = {**fields, "session-id": SESSION}
    payload = sized(LIMIT_BYTES)
    step = -(-len(payload) // fragments)
    with dialled(bridge, fields) as client:
        for number in range(fragments):
            piece = payload[number * step:(number + 1) * step]
            opcode = wire.TEXT if number == 0 else wire.CONTINUATION
            with contextlib.suppress(ConnectionError):
                client.send_frame(wire.Frame(opcode, piece, number == fragments - 1, masked=True))
        assert client.read_close() == 1009
    assert backend.frames == []
    dial = wire.WebSocketClient
    with contextlib.closing(dial(bridge.address)) as again, contextlib.closing(dial(bridge.address)) as other:
        assert again.connect("/v1/responses", fields).status == 426
        assert other.connect("/v1/responses", {**fields, "session-id": "another"}).status == 101


def test_a_large_message_of_a_client_without_a_session_moves_no_other_client(bridge: RunningBridge) -> None:
    with dialled(bridge, SDK_FIELDS) as client:
        with contextlib.suppress(ConnectionError):
            client.send_frame(wire.Frame(wire.TEXT, sized(LIMIT_BYTES), masked=True))
        assert client.read_close() == 1009
    with dialled(bridge, SDK_FIELDS) as client:
        completed(client, create())


def test_a_message_that_the_rules_make_too_large_moves_its_session_to_http(bridge: RunningBridge) -> None:
    fields = {**SDK_FIELDS, "session-id": SESSION}
    with dialled(bridge, fields) as client:
        client.send_frame(wire.Frame(wire.TEXT, sized(LIMIT_BYTES - 1), masked=True))
        assert client.read_close() == 1009
    with contextlib.closing(wire.WebSocketClient(bridge.address)) as again:
        assert again.connect("/v1/responses", fields).status == 426


def test_a_message_below_16_mib_passes(bridge: RunningBridge, backend: wire.Backend) -> None:
    with dialled(bridge, SDK_FIELDS) as client:
        client.send_frame(wire.Frame(wire.TEXT, sized(LIMIT_BYTES - 1024), masked=True))
        assert client.read_turn()[-1]["type"] == "response.completed"


# -- an old Codex ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("originator", ["codex_exec", "codex_cli_rs"])
def test_an_old_codex_is_named_as_what_it_is(
    bridge: RunningBridge, backend: wire.Backend, originator: str
) -> None:
    with dialled(bridge, {**OLD_FIELDS, "originator": originator}):
        (asked,) = handshakes(backend)
    assert asked.header("originator") == originator
    assert (asked.header("user-agent") or "").startswith(originator)
