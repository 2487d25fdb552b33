"""What several test files share: requests, helpers that send them, marks."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import wire
from conftest import (
    Popen,
    Process,
    RunningBridge,
)

import qoo_bridge as q
from qoo_bridge import Record, Telemetry

Object = dict[str, Any]
SECONDS = 20  # until a test gives up; nothing here takes three
posix = pytest.mark.skipif(os.name == "nt", reason="flock, modes, links and signals are POSIX's")


# -- requests -----------------------------------------------------------------

MODEL = {"model": "gpt-5.5"}
REQUEST = {"model": "gpt-5.5", "input": "hi"}
STREAM = {**REQUEST, "stream": True}
BODY = json.dumps(REQUEST).encode()
USER = {"role": "user", "content": "hi"}
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
AGENT = "codex_exec/0.169.0 (Debian 12.0.0; x86_64) unknown (codex_exec; 0.169.0)"
CODEX = {"User-Agent": AGENT, "Originator": "codex_exec"}
LITE = {**CODEX, q.LITE_HEADER: "true"}
OTHER = {"user-agent": "OpenAI/Python 3.54.0"}  # a client that is no Codex
ORIGIN = "https://page.example"
LITE_MODEL = "gpt-6-sol"
CLIENTS = pytest.mark.parametrize("headers", [{}, CODEX], ids=["sdk", "codex"])
MODELS = pytest.mark.parametrize("model", ["gpt-5.5", LITE_MODEL], ids=["plain", "lite"])
BODIES: dict[str, tuple[str, Object]] = {
    "responses": (RESPONSES, {"input": "hi"}), "chat": (CHAT, {"messages": [USER]}),
    "legacy": (TEXT, {"prompt": "hi"}),
}
EACH_API = pytest.mark.parametrize(("path", "body"), BODIES.values(), ids=BODIES)


# -- keys ---------------------------------------------------------------------

KEY = "a-key-of-the-test-1"
API_KEY = "sk-shared-secret-0123456789"


def bearer(secret: str) -> dict[str, str]:
    """Return the header that shows a client's key; none without one."""
    return {"Authorization": f"Bearer {secret}"} if secret else {}


BEARER = bearer(API_KEY)


# -- requests as they stand on the wire ---------------------------------------

POST = "POST /v1/responses HTTP/1.1"
HOST = "Host: bridge.lan"
JSON_TYPE = "Content-Type: application/json"
CANARY = b"GET /healthz HTTP/1.1\r\nHost: canary\r\n\r\n"  # stands behind a request that is refused
DEEP = 100_000


def head(*lines: str) -> bytes:
    """Write a head of these lines."""
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def raw_request(version: str = "1.1", *fields: str, path: str = "/v1/responses") -> bytes:
    """Write a request for a turn as it stands on the wire."""
    body = wire.dump(STREAM)
    lines = [
        f"POST {path} HTTP/{version}",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *fields,
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body


def refused(bridge: RunningBridge, request: bytes, status: int) -> wire.RawReply:
    """Send a request and another behind it: one answer, JSON, and then the end of the connection."""
    reply = wire.raw(bridge.address, request + CANARY)
    assert (reply.status, reply.header("connection"), reply.rest) == (status, "close", b"")
    assert reply.header("x-qoo-bridge-error") == "bridge"
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    return reply


# -- asking -------------------------------------------------------------------


@contextlib.contextmanager
def asking(
    bridge: RunningBridge | Process, body: Object = STREAM, headers: Mapping[str, str] | None = None, *,
    path: str = "/v1/responses", **changes: Any
) -> Iterator[wire.Client]:
    """Send a request, the body's fields changed by name, and give the connection."""
    with wire.Client(bridge.address) as client:
        client.request("POST", path, {**body, **changes}, dict(headers or {}))
        yield client


def ask(
    bridge: RunningBridge | Process, body: Object = STREAM, headers: Mapping[str, str] | None = None, *,
    path: str = "/v1/responses", **changes: Any
) -> wire.RawReply:
    """Send a request and read the whole reply."""
    with asking(bridge, body, headers, path=path, **changes) as client:
        return client.read_reply()


def begin_turn(client: wire.Client, fields: dict[str, str] | None = None) -> None:
    """Ask for a stream, and read its head and first event."""
    client.request("POST", "/v1/responses", STREAM, fields)
    assert client.read_head().status == 200
    assert client.read_event() is not None


def respond(bridge: RunningBridge, stream: bool = False, secret: str = "", **fields: Any) -> Object:
    """Ask for a response that goes well, and return it."""
    reply = ask(bridge, MODEL, bearer(secret), stream=stream, **fields)
    assert reply.status == 200, reply.body
    response: Object = wire.sse(reply.body)[-1]["response"] if stream else reply.json
    return response


def chunks(body: bytes) -> list[Any]:
    """Return the events of a chat stream, `[DONE]` as that word, comments left out; nothing may be torn."""
    *blocks, rest = body.split(b"\n\n")
    assert rest == b""
    kept = [block for block in blocks if not block.startswith(b":")]
    assert all(block.startswith(b"data: ") for block in kept)
    return ["[DONE]" if block == b"data: [DONE]" else json.loads(block[6:]) for block in kept]


def models(bridge: RunningBridge, version: str = "") -> wire.RawReply:
    return wire.get(bridge.address, f"/v1/models?client_version={version}" if version else "/v1/models")


# -- upstream's side ----------------------------------------------------------

FIRST, *MIDDLE, LAST = wire.text_turn("hello", empty_output=False)
EVENTS = [FIRST, *MIDDLE, LAST]
ANSWER = "the answer"
WAYS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def script(backend: wire.Backend, *replies: wire.Reply) -> None:
    """Queue the answers of the next turns; one that breaks a rule of the backend is refused all the same."""
    backend.on("/responses", *(wire.checked(backend, reply) for reply in replies))


def sent(backend: wire.Backend, path: str = "/responses") -> list[wire.Request]:
    """Return what came upstream for a path."""
    with backend.changed:
        return [each for each in backend.requests if each.path == wire.full_path(path)]


def accepted(bridge: RunningBridge, backend: wire.Backend, reply: wire.RawReply) -> wire.Request:
    """Hold that a request was taken at the first try, and return it as it came upstream."""
    assert (reply.status, backend.refusals, reply.header("x-qoo-bridge-repaired")) == (200, [], None)
    assert bridge.faults == []
    return sent(backend)[-1]


def turns(backend: wire.Backend) -> list[Object]:
    """Return the bodies of the turns that came upstream."""
    return [request.json for request in sent(backend)]


def json_answer(status: int, value: object) -> q.BufferedReply:
    """Make an answer in JSON."""
    return q.BufferedReply(status, {"content-type": "application/json"}, json.dumps(value).encode())


def from_address(bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Let the bridge see its next clients at another address."""
    accept = bridge.server.get_request
    monkeypatch.setattr(bridge.server, "get_request", lambda: (accept()[0], (address, 50_000)))


# -- models of the catalogue --------------------------------------------------

LOCAL_MD = "gpt-5.6-sol"  # what the default alias means with the stand-in's list: the best that is a gpt-5
HI = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
SCHEMA = {"type": "object", "properties": {}}  # the least that the backend takes
TOOL = {"type": "function", "name": "run", "strict": False, "parameters": SCHEMA}
CARRIER = {"type": "additional_tools", "role": "developer", "tools": [TOOL]}
PLAIN_BODY = {"model": "gpt-5.5", "input": [HI], "tools": [TOOL]}
SDK_BODY = {**PLAIN_BODY, "model": "gpt-6-sol", "instructions": "be brief"}
LITE_BODY = {
    "model": "gpt-6-sol", "stream": True, "store": False, "input": [CARRIER, HI], "prompt_cache_key": "key",
    "parallel_tool_calls": False, "reasoning": {"effort": "low", "context": "all_turns"},
    "include": ["reasoning.encrypted_content"],
}
FETCH_FAILURES: dict[str, wire.Reply] = {
    "500": wire.refuse(500, "broken"),
    "404": wire.refuse(404, "Not Found"),
    "429": wire.usage_limit(),
    "page": wire.cloudflare(),
    "cut": wire.reply_raw(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"),
    "reset": wire.reply_raw(b"", "reset"),
    "no-http": wire.reply_raw(b"SSH-2.0-x\r\n\r\n"),
    "no-json": lambda exchange: exchange.whole(200, b"{", []),
    "nan": lambda exchange: exchange.whole(200, b'{"models": [{"slug": "x", "priority": NaN}]}', []),
    "no-object": wire.reply_json(200, []),
    "no-list": wire.reply_json(200, {"models": {"slug": "gpt-5.5"}}),
    "redirect": wire.reply_json(302, {}, [("location", "https://localhost/models")]),
}


def settle(bridge: RunningBridge) -> None:
    """Wait until no fetch of the list is running."""
    catalog = bridge.bridge.catalog
    with catalog._changed:
        assert catalog._changed.wait_for(lambda: not catalog._fetching, 5)


# -- telemetry ----------------------------------------------------------------

NOW = 1_795_384_800.0  # a whole minute


def record(**fields: Any) -> Record:
    """Build a record of an ordinary request."""
    ordinary = {
        "id": "r1",
        "client": "192.168.1.20",
        "key": "",
        "method": "POST",
        "path": "/v1/responses",
        "model": "local_md",
        "slug": "gpt-5.5",
        "status": 200,
        "end": "completed",
        "total": 2.0,
    }
    made = Record()
    for name, value in {**ordinary, **fields}.items():
        assert hasattr(made, name)
        setattr(made, name, value)
    return made


def finished(*records: Record, now: float = NOW) -> Telemetry:
    """Build a telemetry that has seen these records."""
    telemetry = Telemetry()
    for each in records:
        telemetry.begin(each)
        telemetry.finish(each, now)
    return telemetry


# -- values of any kind -------------------------------------------------------

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


def short(value: object) -> str:
    """Name a row by the beginning of a value."""
    return ascii(value)[:40]


# -- waiting, processes -------------------------------------------------------


def until(predicate: Callable[[], bool], timeout: float = 5.0) -> bool:
    """Wait for something that nothing announces; False after `timeout` seconds without it."""
    deadline, pause = time.monotonic() + timeout, threading.Event()
    while not predicate():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.005)
    return True


def outcome(process: Popen) -> tuple[int, str, str]:
    """Return a process's status and what it printed."""
    out, err = process.communicate(timeout=SECONDS)
    assert "Traceback" not in err
    return process.returncode, out, err


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@functools.cache
def dead_port() -> int:
    """Return a port at which nothing listens, and which no other program gets while the tests run."""
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    atexit.register(held.close)
    return int(held.getsockname()[1])


class NoThreads:
    """Make threads of some names fail to start, as under `--pids-limit`; `failed` counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.names = names
        self.failed = 0
        start = threading.Thread.start

        def begin(thread: threading.Thread) -> None:
            known = f"{thread.name} {getattr(thread, '_target', None)}"  # on 3.9 no name tells it
            if any(name in known for name in self.names):
                self.failed += 1
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", begin)


# A text of a stranger: it would forge a line, clear the screen, turn the reading order.
HOSTILE = "x\r\n✓ forged\x1b[2J\x1b]0;title\x07\x9b31m\u202egpj.exe\u2066\u2028y\x00"


# -- requests with their places ------------------------------------------------

ALIAS = {"model": "slug"}


def parse_all(raw: bytes) -> Any:
    """Parse as the bridge did before it knew places."""
    return q.CLIENT_DECODER.decode(raw.decode("utf-8"))


def check_written(raw: bytes, request: dict[str, Any], spans: q.Spans) -> bytes:
    """Write a request; check its value, and that all that was read is there in the client's bytes."""
    written = q.write_request(request, spans)
    assert same(json.loads(written), json.loads(q.json_bytes(request)))
    if written is raw:
        return raw
    at = 0
    for name, value in request.items():
        if spans.is_unchanged(name, value):
            start, _, end = spans.fields[name]
            at = written.index(raw[start:end], at) + end - start
        elif name in q.ITEM_LISTS and isinstance(value, list):
            for item in value:
                place = next((index for index, read in enumerate(spans.items) if read is item), None)
                if place is not None and isinstance(item, (dict, list)):
                    piece = raw[spans.starts[place]:spans.ends[place]]
                    at = written.index(piece, at) + len(piece)
    return written


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are equal, in order, 1 and 1.0 and True being three values."""
    return repr(one) == repr(other)
