"""The walk of one request through the file: how many calls, how often it changes rooms, how deep it goes.

A reader follows a request as the profiler does: these bounds keep that walk short. Before the file had rooms
(4e9822d, 17 sections): 495 calls, 288 changes of section, 12 frames to the first byte upstream.
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

import qoo_bridge as q

NINE_EVENTS = wire.text_turn()
BODY = {"model": "gpt-5.5", "input": "say hello", "stream": True}


class Walk(NamedTuple):
    """What a request costs a reader."""

    calls: int  # inside the file
    changes: int  # of room, from one call to the next
    depth: int  # frames from the connection's handler to the first byte that is written upstream


def walk(bridge: RunningBridge, backend: wire.Backend, path: str, body: dict[str, Any]) -> Walk:
    """Trace one request on a warm bridge: the pool and the catalogue are filled."""
    rooms: dict[int, list[str]] = collections.defaultdict(list)  # by thread
    depths: dict[int, int] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_code.co_filename != str(kernel.FILE):
            return
        thread = threading.get_ident()
        rooms[thread].append(kernel.room_at(frame.f_code.co_firstlineno))
        if frame.f_code.co_name == "send" and bytes(frame.f_locals.get("payload", b"")).startswith(b"POST "):
            depths[thread] = frames_above(frame)

    backend.always("/responses", wire.turn(*NINE_EVENTS))
    assert wire.post(bridge.address, path, body).status == 200
    threading.setprofile(profile)
    try:
        assert wire.post(bridge.address, path, body).status == 200
    finally:
        threading.setprofile(None)
    bridge.close()
    ((thread, depth),) = depths.items()
    entered = rooms[thread]
    return Walk(len(entered), sum(one != other for one, other in zip(entered, entered[1:])), depth)


def frames_above(frame: FrameType) -> int:
    """Count the frames of the file from the connection's handler down to this one."""
    names = []
    above: FrameType | None = frame
    while above is not None:
        if above.f_code.co_filename == str(kernel.FILE):
            names.append(above.f_code.co_name)
        above = above.f_back
    return names.index("handle") + 1


def test_a_stream_of_nine_events_is_a_short_walk(bridge: RunningBridge, backend: wire.Backend) -> None:
    assert len(NINE_EVENTS) == 9
    taken = walk(bridge, backend, "/v1/responses", BODY)
    assert taken.calls <= 560, taken
    assert taken.changes <= 400, taken
    assert taken.depth <= 8, taken


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_no_deeper(bridge: RunningBridge, backend: wire.Backend, stream: bool) -> None:
    body = {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hello"}], "stream": stream}
    assert walk(bridge, backend, "/v1/chat/completions", body).depth <= 8


def test_the_walk_counts_what_the_file_does(bridge: RunningBridge, backend: wire.Backend) -> None:
    assert q.Handler.__module__ == "qoo_bridge"
    assert walk(bridge, backend, "/v1/responses", BODY).calls > 100
