"""The walk of one request through the file: how many calls, how often it changes rooms, how deep it goes.

A reader follows a request as the profiler does: these bounds keep that walk short. Before the file had rooms
(4e9822d, 17 sections): 495 calls, 288 changes of section, 12 frames to the first byte upstream. Eight rules,
the look at an answer's opening, and the reader that knows the place of each value came later.
"""
from __future__ import annotations

import collections
import threading
from types import FrameType
from typing import Any, NamedTuple

import kernel
import pytest
import wire
from conftest import RunningBridge
from help import until

import qoo_bridge as q

NINE_EVENTS = wire.text_turn()
BODY = {"model": "gpt-5.5", "input": "say hello", "stream": True}


class Walk(NamedTuple):
    """What a request costs a reader."""

    calls: int  # inside the file
    changes: int  # of room, at calls and at returns
    depth: int  # frames from the connection's handler to the first byte that is written upstream


def walk(bridge: RunningBridge, backend: wire.Backend, path: str, body: dict[str, Any]) -> Walk:
    """Trace one request on a warm bridge: the pool and the catalogue are filled."""
    calls: collections.Counter[int] = collections.Counter()  # by thread
    rooms: dict[int, list[str]] = collections.defaultdict(list)  # in which the thread is, step by step
    depths: dict[int, int] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        inside = frame.f_code.co_filename == str(kernel.FILE)
        thread = threading.get_ident()
        if inside and event == "call":
            calls[thread] += 1
            rooms[thread].append(room_of(frame))
            first = bytes(frame.f_locals.get("payload", b""))[:5]
            if frame.f_code.co_name == "send" and first == b"POST ":
                depths[thread] = len(own_frames(frame))
        elif inside and event == "return":
            rooms[thread] += [room_of(above) for above in own_frames(frame)[1:2]]

    backend.always("/responses", wire.turn(*NINE_EVENTS))
    assert wire.post(bridge.address, path, body).status == 200
    threading.setprofile(profile)
    try:
        assert wire.post(bridge.address, path, body).status == 200
    finally:
        threading.setprofile(None)
    assert until(lambda: not bridge.server._open)  # the connection's thread has ended
    ((thread, depth),) = depths.items()
    steps = rooms[thread]
    return Walk(calls[thread], sum(one != other for one, other in zip(steps, steps[1:])), depth)


def room_of(frame: FrameType) -> str:
    return kernel.room_at(frame.f_code.co_firstlineno)


def own_frames(frame: FrameType) -> list[FrameType]:
    """Return the frames of the file, from this one up to the connection's handler."""
    frames: list[FrameType] = []
    above: FrameType | None = frame
    while above is not None and (not frames or frames[-1].f_code.co_name != "handle"):
        if above.f_code.co_filename == str(kernel.FILE):
            frames.append(above)
        above = above.f_back
    return frames


def test_a_stream_of_nine_events_is_a_short_walk(bridge: RunningBridge, backend: wire.Backend) -> None:
    assert len(NINE_EVENTS) == 9
    taken = [walk(bridge, backend, "/v1/responses", BODY) for _ in range(3)]  # reads vary
    assert min(each.calls for each in taken) <= 560, taken
    assert min(each.changes for each in taken) <= 350, taken
    assert max(each.depth for each in taken) <= 8, taken


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_no_deeper(bridge: RunningBridge, backend: wire.Backend, stream: bool) -> None:
    body = {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hello"}], "stream": stream}
    assert walk(bridge, backend, "/v1/chat/completions", body).depth <= 8


def test_the_walk_counts_what_the_file_does(bridge: RunningBridge, backend: wire.Backend) -> None:
    assert q.Handler.__module__ == "qoo_bridge"
    assert walk(bridge, backend, "/v1/responses", BODY).calls > 100
