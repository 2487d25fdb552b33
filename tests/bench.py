#!/usr/bin/env python3
"""Measure the bridge beside other proxies: one run, one TLS stand-in, loopback only.

    python3 tests/bench.py [--quick] [--only ROW ...] [--codex PATH] [--fastapi PYTHON]
                           [--standin-port N --against NAME=URL ...]

Rows: `direct` (the client speaks TLS to the stand-in itself), `nginx` if it is on PATH (configured below),
`codex` (OpenAI's `codex responses-api-proxy`) if it is found, `fastapi` (the first version's design, below)
if a Python with its packages is named, `bridge`, and each `--against`: a proxy that runs already and has
`https://localhost:N/backend-api/codex/responses` as its upstream and CA_PEM of tests/wire/tls.py for a root.
CPU and memory are read on Linux, of programs started here.

How to read it:
- Only ratios of one run count. A busy machine makes all rows worse alike: a measurement goes round all rows
  before the next one begins, and a figure is the best of the rounds.
- `direct` is the floor. If it is not well ahead of nginx, or if the stand-in or the client nears a whole core
  (the lines under the table), the run says nothing about the proxies.
- `first byte` is the body's; `added` is that less direct's. `late` is from the stamp that the stand-in put
  into an event to the client having read it, at 20 streams of 100 events a second. CPU is a process tree's.
- `40 ms link`: every round trip to the stand-in takes 40 ms longer, TCP's handshake included. A kept
  connection costs one round trip, a new one three; `first` is the first request after start.
- Requests are those of a conversation: each repeats the last one, but for its end. The bridge parses what is
  new. `4 MB` is such a request, too; a first turn of 4 MB takes what `new` of 2 MB suggests.
- `turn` is the first byte of a Codex-like request as a conversation grows: `name` by the model's own name, so
  no rule fires; `alias` by an alias of that model; `lite` in the plain form, for a model of the lite form;
  `new` by the alias, each the first of a conversation. nginx changes none of them. `20 MB beside` is `late`
  while another client posts 20 MB bodies by the alias, which are too large for the bridge to keep.
- The row `fastapi` needs an environment outside the repository:
  `python3 -m venv /tmp/fastapi && /tmp/fastapi/bin/pip install fastapi httpx 'uvicorn[standard]'`, and then
  `--fastapi /tmp/fastapi/bin/python`.
- `MISS` marks a target that does not hold. The exit status does not tell: a noisy neighbour is no defect.

Sections: 1 constants, 2 stand-in, 3 slow link, 4 rows, 5 client, 6 measurements, 7 report, 8 main.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import multiprocessing
import os
import queue
import random
import re
import selectors
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import wire

# == 1 constants ==============================================================

BRIDGE = Path(__file__).resolve().parent.parent / "qoo_bridge.py"
UPSTREAM_PATH = "/backend-api/codex/responses"
STREAMS, HERTZ = 20, 100  # the load under which delay and CPU per event are measured
PERIOD = 1_000_000_000 // HERTZ  # ns between the events of a stream
HELD = 200  # open streams whose memory is measured
REQUEST_BYTES = 38_730  # what Codex sent in the capture of a plain model's second turn
LARGE_BYTES = 4_000_000
TURNS = 8  # of a conversation, before it begins again
TURN_BYTES = (40_000, 400_000, 2_000_000)  # of a conversation's requests
BESIDE_BYTES = 20_000_000
PLAIN_MODEL, ALIAS, LITE_MODEL = "gpt-5.5", "bench_alias", "gpt-5.6-sol"
FLOOD_EVENT_BYTES = 1024  # about, of an event of the unpaced stream; each is a chunk
ROUND_TRIP = 0.040  # seconds that the slow link adds
SETTLE = 0.6  # seconds after start in which a proxy may open a connection ahead over the slow link
TIMEOUT = 20  # seconds without a byte after which a measurement is given up
READ_BYTES = 256 * 1024
LAST_CHUNK = b"0\r\n\r\n"
END = b"\n" + LAST_CHUNK  # after an event; a head can end in "0", too

Figures = dict[str, float]
clock = time.monotonic_ns  # CLOCK_MONOTONIC: one clock for all processes of a machine


class Size(NamedTuple):
    """How much is measured in a round."""

    requests: int  # for the first byte
    window: float  # seconds of paced events
    flood: int  # bytes of the unpaced stream
    large: int  # requests of LARGE_BYTES
    slow: int  # requests over the slow link
    turn: int  # bytes of a conversation's requests, of each length


FULL = Size(requests=300, window=2.5, flood=256_000_000, large=20, slow=20, turn=40_000_000)
QUICK = Size(requests=100, window=1.0, flood=64_000_000, large=6, slow=8, turn=12_000_000)


class Column(NamedTuple):
    """One figure of a row; `target` bounds the bridge's figure divided by nginx'."""

    key: str
    group: str
    title: str
    form: str
    target: float | None = None
    higher: bool = False  # is better


COLUMNS = (
    Column("first_p50", "first byte", "p50 ms", ".3f", 1.5),
    Column("first_p99", "first byte", "p99 ms", ".3f"),
    Column("added", "first byte", "added ms", ".3f"),
    Column("late_p50", "event late", "p50 us", ".0f", 1.25),
    Column("late_p99", "event late", "p99 us", ".0f", 1.25),
    Column("cpu_event", "CPU", "us/event", ".1f", 2.5),
    Column("cpu_request", "CPU", "ms/request", ".3f"),
    Column("flood", "unpaced", "MB/s", ".0f", 0.75, higher=True),
    Column("memory", f"{HELD} held", "KB/stream", ".1f", 2.0),
    Column("large", "4 MB", "ms", ".1f", 2.0),
    Column("startup", "start", "s", ".3f"),
    Column("slow_p50", "40 ms link", "p50 ms", ".1f"),
    Column("slow_p99", "40 ms link", "p99 ms", ".1f"),
    Column("slow_first", "40 ms link", "first ms", ".1f"),
)
FORMS = ("name", "alias", "lite", "new")
TURN_COLUMNS = (
    *(Column(f"turn_{TURN_BYTES[0]}_{form}", "turn 40 KB", f"{form} ms", ".2f", 3.0) for form in FORMS[:3]),
    Column(f"turn_{TURN_BYTES[0]}_new", "turn 40 KB", "new ms", ".2f"),
    *(Column(f"turn_{size}_{form}", f"turn {size // 1000} KB", f"{form} ms", ".2f")
      for size in TURN_BYTES[1:] for form in FORMS),
    Column("beside_p50", "20 MB beside", "p50 us", ".0f", 6.0),
    Column("beside_p99", "20 MB beside", "p99 us", ".0f", 6.0),
)
TO_NAME = {"alias": 1.15, "lite": 1.3}  # times the turn by the model's name, above 40 KB
FASTAPI_TARGET = 1 / 1.3
STARTUP_TARGET = 0.15  # seconds
SLOW_TARGET = 2.0  # ms that the bridge may add to a direct request on a kept connection, over the slow link


class BenchError(Exception):
    """A row did not do what is measured."""


# == 2 stand-in ===============================================================
# The backend, a process of its own: a thread a connection and blocking TLS cost least between a request and
# its first byte. A header that every proxy hands on says which reply is wished: a body may come compressed.

PLAN = re.compile(rb'"bench":"(\w+) (\d+) (\d+)"')  # a reply's name, a count, a stream's phase in ns
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
HEAD = wire.head_bytes("HTTP/1.1 200 OK", [*wire.TURN_HEADERS, ("transfer-encoding", "chunked")])
DOCUMENTS = {
    b"/backend-api/codex/models": {"models": wire.CATALOG},
    b"/backend-api/wham/accounts/check": {"accounts": []},
}


def chunk(event: wire.Event) -> bytes:
    """Return one event in a chunk of its own."""
    payload = wire.sse_bytes(event)
    return b"%x\r\n%s\r\n" % (len(payload), payload)


def delta(text: str) -> bytes:
    """Return a text event that has room for a stamp."""
    place = {"item_id": "msg_0123456789abcdef", "output_index": 0, "content_index": 0, "sequence_number": 7}
    return chunk({"type": "response.output_text.delta", **place, "delta": text, "stamp": "@" * 20})


TURN = [chunk(event) for event in wire.text_turn("The quick brown fox jumps over the lazy dog.")]
DELTA = delta(" word")
FLOOD = delta("x" * (FLOOD_EVENT_BYTES - len(DELTA))) * 1024


def send_paced(sock: ssl.SSLSocket, count: int, phase: int) -> None:
    """Send an event each period, on a grid that all streams share, so that no two are due at once."""
    due = (clock() // PERIOD + 2) * PERIOD + phase
    for _ in range(count):
        time.sleep(max(0, due - clock()) / 1e9)
        sock.sendall(DELTA.replace(b"@" * 20, b"%020d" % clock()))
        due += PERIOD


def reply(sock: ssl.SSLSocket, name: bytes, count: int, phase: int) -> None:
    """Send a head with one event, then what is wished, then the rest of a short turn."""
    sock.sendall(HEAD + TURN[0])
    if name == b"hold":
        sock.sendall(DELTA * 64)  # more than any proxy holds back
        sock.recv(1)  # until the other side goes
    elif name == b"paced":
        send_paced(sock, count, phase)
    elif name == b"flood":
        for _ in range(count // len(FLOOD)):
            sock.sendall(FLOOD)
    sock.sendall(b"".join(TURN[1:]) + LAST_CHUNK)


def read_request(sock: ssl.SSLSocket) -> bytes:
    """Return a request's head, its body read and forgotten; nothing when the other side has gone."""
    head, scratch = b"", bytearray(READ_BYTES)
    while b"\r\n\r\n" not in head:
        piece = sock.recv(READ_BYTES)
        if not piece:
            return b""
        head += piece
    head, _, body = head.partition(b"\r\n\r\n")
    length = LENGTH.search(head)
    missing = int(length.group(1)) - len(body) if length else 0
    while missing > 0:
        missing -= sock.recv_into(scratch) or missing
    return head


def serve_connection(context: ssl.SSLContext, plain: socket.socket) -> None:
    """Answer one connection's requests until it closes: with a reply, a document, or 404."""
    with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as sock:
        for head in iter(functools.partial(read_request, sock), b""):
            plan = PLAN.search(head)
            if plan:
                reply(sock, plan.group(1), int(plan.group(2)), int(plan.group(3)))
                continue
            document = DOCUMENTS.get(head.split(b" ", 2)[1].partition(b"?")[0])
            body = wire.dump(document)
            fields = [("content-type", "application/json"), ("content-length", str(len(body)))]
            sock.sendall(wire.head_bytes(f"HTTP/1.1 {200 if document else 404} -", fields) + body)


def accept_connections(pipe: Connection, port: int, serve: Callable[[socket.socket], None]) -> None:
    """Report the listening port, then give each connection a thread, until the process is killed."""
    gc.disable()
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    pipe.send(listener.getsockname()[1])
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve, args=(sock,), daemon=True).start()


def run_standin(pipe: Connection, certificate: str, port: int) -> None:
    """Be the stand-in's process."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    accept_connections(pipe, port, functools.partial(serve_connection, context))


# == 3 slow link ==============================================================
# A TCP forwarder that holds every byte back for half a round trip, each way. The kernel accepts at once, so
# what comes within a connection's first round trip counts as sent at its end, when TCP would have let it go.

Held = queue.SimpleQueue[tuple[float, bytes]]


def deliver(held: Held, sink: socket.socket) -> None:
    """Send each piece when it is due; an empty one is the end."""
    with contextlib.suppress(OSError):
        while True:
            due, piece = held.get()
            time.sleep(max(0.0, due - time.monotonic()))
            if not piece:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(piece)


def carry(source: socket.socket, sink: socket.socket, earliest: float) -> None:
    """Carry one direction; nothing counts as sent before `earliest`."""
    held: Held = queue.SimpleQueue()
    threading.Thread(target=deliver, args=(held, sink), daemon=True).start()
    piece = b"-"
    while piece:
        try:
            piece = source.recv(READ_BYTES)
        except OSError:
            piece = b""
        held.put((max(time.monotonic(), earliest) + ROUND_TRIP / 2, piece))


def forward_connection(port: int, near: socket.socket) -> None:
    """Join a connection to the stand-in."""
    accepted = time.monotonic()
    with near, socket.create_connection(("127.0.0.1", port)) as far:
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=carry, args=(far, near, accepted), daemon=True)
        back.start()
        carry(near, far, accepted + ROUND_TRIP)
        back.join()


def run_slow_link(pipe: Connection, port: int) -> None:
    """Be the slow link's process."""
    accept_connections(pipe, 0, functools.partial(forward_connection, port))


# == 4 rows ===================================================================
# A row is a way to the stand-in. A program is started anew each round, so that its memory grows from nothing.

NGINX_CONF = """
daemon off; worker_processes 1; pid nginx.pid; {user}
events {{ worker_connections 4096; }}
http {{
    access_log off; tcp_nodelay on; keepalive_requests 1000000; client_max_body_size 128m;
    client_body_temp_path temp; proxy_temp_path temp; fastcgi_temp_path temp; uwsgi_temp_path temp;
    scgi_temp_path temp;
    upstream standin {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        location = /v1/responses {{
            proxy_pass https://standin{path};
            proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host localhost;
            proxy_set_header Authorization "Bearer bench";
            proxy_buffering off; proxy_request_buffering off; proxy_buffer_size 16k; proxy_buffers 8 16k;
            proxy_ssl_protocols TLSv1.2 TLSv1.3; proxy_ssl_verify on; proxy_ssl_trusted_certificate {ca};
            proxy_ssl_server_name on; proxy_ssl_name localhost;
        }}
    }}
}}
"""


FASTAPI_APP = """
import json, os, ssl
import fastapi, fastapi.responses, httpx, starlette.background, uvicorn

app = fastapi.FastAPI()
context = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
client = httpx.AsyncClient(verify=context, timeout=None, limits=httpx.Limits(max_connections=None))
KEPT = ("session-id", "thread-id", "originator", "user-agent", "x-codex-turn-metadata", "x-client-request-id")

@app.get("/healthz")
async def healthz():
    return {{}}

@app.post("/v1/responses")
async def responses(request: fastapi.Request):
    body = json.loads(await request.body())
    body["model"] = {{"{alias}": "{model}"}}.get(body["model"], body["model"])
    body.update(store=False, stream=True)
    headers = {{name: request.headers[name] for name in KEPT if name in request.headers}}
    headers.update({{"authorization": "Bearer bench", "content-type": "application/json"}})
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    url = "https://localhost:{upstream}{path}"
    turn = client.build_request("POST", url, content=content, headers=headers)
    reply = await client.send(turn, stream=True)
    return fastapi.responses.StreamingResponse(
        reply.aiter_raw(), reply.status_code, media_type="text/event-stream",
        background=starlette.background.BackgroundTask(reply.aclose))

uvicorn.run(app, host="127.0.0.1", port={port}, log_level="error", access_log=False)
"""


class Ground(NamedTuple):
    """What all rows of a run stand on."""

    folder: Path
    ca: Path
    context: ssl.SSLContext  # the client's, for `direct`
    size: Size
    standin_pid: int
    port: int  # the stand-in's
    slow_port: int  # the slow link's


class Row(NamedTuple):
    """A program to start, or a URL that answers already, or neither: the stand-in itself."""

    name: str
    command: Callable[[Ground, int, int], list[str]] | None = None  # given its port and its upstream's
    probe: str = ""  # a path that answers 200 when it is ready; without one, an accepted connection will do
    url: str = ""


class Running(NamedTuple):
    """A row that answers."""

    row: Row
    ground: Ground
    url: urllib.parse.SplitResult
    pid: int = 0  # of the program
    startup: float = 0.0  # seconds


def bridge_command(ground: Ground, port: int, upstream: int) -> list[str]:
    """Return the bridge's command line."""
    origin, auth_file = f"https://localhost:{upstream}", ground.folder / "auth.json"
    wire.write_auth(auth_file, wire.SignIn(origin))
    peers = ["--upstream", f"{origin}/backend-api/codex", "--issuer", origin]
    files = ["--auth-file", str(auth_file), "--log-file", "-", "--alias", f"{ALIAS}={PLAIN_MODEL}"]
    return [sys.executable, str(BRIDGE), "--host", "127.0.0.1", "--port", str(port), *peers, *files]


def nginx_command(ground: Ground, port: int, upstream: int) -> list[str]:
    """Write nginx' configuration and return its command line."""
    folder = ground.folder / f"nginx-{port}"
    folder.mkdir()
    user = "user root;" if os.geteuid() == 0 else ""  # any other worker could not enter the folder
    text = NGINX_CONF.format(user=user, port=port, upstream=upstream, path=UPSTREAM_PATH, ca=ground.ca)
    (folder / "nginx.conf").write_text(text)
    return ["nginx", "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]


def fastapi_command(python: str, ground: Ground, port: int, upstream: int) -> list[str]:
    """Write the first version's design as a program and return its command line."""
    program = ground.folder / f"fastapi-{port}.py"
    peers = {"port": port, "upstream": upstream, "path": UPSTREAM_PATH}
    program.write_text(FASTAPI_APP.format(alias=ALIAS, model=PLAIN_MODEL, **peers))
    return [python, str(program)]


def codex_command(program: str, _ground: Ground, port: int, upstream: int) -> list[str]:
    """Return the command line of OpenAI's proxy."""
    url = f"https://localhost:{upstream}{UPSTREAM_PATH}"
    return [program, "responses-api-proxy", "--port", str(port), "--upstream-url", url]


def is_ready(port: int, probe: str) -> bool:
    """Tell whether a program answers its probe, or takes a connection if it has none."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), TIMEOUT) as sock:
        sock.sendall(f"GET {probe} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode() if probe else b"")
        return not probe or sock.recv(1024).startswith(b"HTTP/1.1 200")
    return False


@contextlib.contextmanager
def run(row: Row, ground: Ground, upstream: int) -> Iterator[Running]:
    """Run a row for a while; a program gets our certificate and nobody's proxy settings."""
    if row.command is None:
        url = row.url or f"https://localhost:{upstream}{UPSTREAM_PATH}"
        yield Running(row, ground, urllib.parse.urlsplit(url))
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command, log = row.command(ground, port, upstream), ground.folder / f"{row.name}.log"
    foreign = re.compile(r".*_proxy\Z|QOO_BRIDGE_", re.IGNORECASE)
    env = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    env.update(SSL_CERT_FILE=str(ground.ca), CODEX_HOME=str(ground.folder))
    started = time.monotonic()
    with log.open("ab") as out, (ground.folder / "key").open("rb") as key:
        process = subprocess.Popen(
            command, stdin=key, stdout=out, stderr=out, env=env, start_new_session=True
        )  # fmt: skip
    try:
        while not is_ready(port, row.probe):
            if process.poll() is not None or time.monotonic() > started + TIMEOUT:
                raise BenchError(f"{row.name} did not start: {log.read_text(errors='replace')[-800:]}")
            time.sleep(0.001)
        url = f"http://127.0.0.1:{port}/v1/responses"
        yield Running(row, ground, urllib.parse.urlsplit(url), process.pid, time.monotonic() - started)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a program and everything that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)


# == 5 client =================================================================
# Raw sockets, one send a request: the client must cost less than any proxy. Its requests are those of a Codex
# that knows its model, so that no rule of the bridge fires and the client's own bytes go upstream.

SESSION = "01a201df-3cb2-7781-97fc-5b29c49ae5cd"
FIELDS = (
    ("x-codex-beta-features", "remote_compaction_v2"),
    ("x-codex-window-id", f"{SESSION}:0"),
    ("x-client-request-id", SESSION),
    ("session-id", SESSION),
    ("thread-id", SESSION),
    ("accept", "text/event-stream"),
    ("content-type", "application/json"),
    ("authorization", "Bearer lan"),
    ("originator", "codex_exec"),
    ("user-agent", "codex_exec/0.169.0 (Debian 12.0.0; x86_64) unknown (codex_exec; 0.169.0)"),
)
RECEIVE_TIMEOUT = struct.pack("ll", TIMEOUT, 0)  # the kernel's, since Python's costs a system call a read
STAMP = re.compile(rb'"stamp":"(\d{20})"')


def items(size: int, turn: int) -> Iterator[wire.Item]:
    """Return a session's input of about `size` bytes: two messages, then tool calls and what they printed.

    What the last one printed is another text at each turn.
    """
    for number, role in enumerate(("developer", "user")):
        content = [{"type": "input_text", "text": "You are Codex.\n" * 200}]
        yield {"type": "message", "id": f"msg_{number:032x}", "role": role, "content": content}
    words = Path(__file__).read_text(encoding="utf-8").split(" ")
    chance = random.Random(1)
    for number in itertools.count():
        printed = " ".join(chance.choices(words, k=500))
        size -= len(printed) + 600
        if size < 6000:
            printed = " ".join(random.Random(turn).choices(words, k=500))
        shared = {"call_id": f"call_{number}"}
        call = {"name": "exec_command", "arguments": '{"cmd": "cat relay.py"}', **shared}
        yield {"type": "function_call", "status": "completed", "id": f"fc_{number:032x}", **call}
        yield {"type": "function_call_output", "id": f"fco_{number:032x}", **shared, "output": printed}
        if size < 6000:
            return


@functools.lru_cache
def request_body(size: int, turn: int) -> bytes:
    """Return a conversation's request of about `size` bytes."""
    schema = {"type": "object", "properties": {}}
    tool = {"type": "function", "name": "exec_command", "strict": False, "parameters": schema}
    request = {
        "model": "gpt-5.5", "stream": True, "input": list(items(size, turn)), "tools": [tool],
        "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"effort": "medium"}, "store": False,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": SESSION, "text": {"verbosity": "low"},
        "client_metadata": {"session_id": SESSION, "thread_id": SESSION},
    }  # fmt: skip
    return json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode()


def conversation(size: int) -> Iterator[wire.Item]:
    """Return a conversation of about `size` bytes: six of ten items are short, one of ten is not ASCII."""
    words = Path(__file__).read_text(encoding="utf-8").split(" ")  # with line ends and quotes to escape
    chance = random.Random(2)
    for number in itertools.count():
        if size < 0:
            return
        call = {"call_id": f"call_{number}"}
        item: wire.Item
        if chance.random() < 0.6:
            arguments = json.dumps({"cmd": f"sed -n '1,{number}p' relay.py", "workdir": "/srv"})
            item = {"type": "function_call", "name": "exec_command", "arguments": arguments, **call}
        else:
            printed = " ".join(chance.choices(words, k=chance.randint(30, 250)))
            marks = " \u2714 na\u00efve \u4e2d\u6587 \U0001f600" if chance.random() < 0.25 else ""
            item = {"type": "function_call_output", "output": printed + marks, **call}
        size -= len(json.dumps(item, ensure_ascii=False))
        yield item


@functools.lru_cache
def turn_body(size: int, turn: int, form: str) -> bytes:
    """Return a conversation's request: the last of TURNS is of about `size` bytes."""
    words = Path(__file__).read_text(encoding="utf-8").split()
    tools = []
    for number in range(14):
        properties = {name: {"type": "string", "description": " ".join(words[:9])} for name in words[100:105]}
        schema = {"type": "object", "properties": properties, "additionalProperties": False}
        tools.append({"type": "function", "name": f"tool_{number}", "description": " ".join(words[:40]),
                      "strict": False, "parameters": schema})  # fmt: skip
    request = {
        "model": {"name": PLAIN_MODEL, "lite": LITE_MODEL}.get(form, ALIAS), "instructions": "x " * 2000,
        "input": list(conversation(size - 20_000))[:2 * turn - 2 * TURNS or None], "tools": tools,
        "tool_choice": "auto",
        "parallel_tool_calls": False, "reasoning": {"effort": "medium"}, "store": False, "stream": True,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": SESSION, "text": {"verbosity": "low"},
        "client_metadata": {"session_id": SESSION, "thread_id": SESSION},
    }  # fmt: skip
    return json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode()


def request_bytes(running: Running, plan: str, turn: int = 0, size: int = REQUEST_BYTES,
                  form: str = "") -> bytes:
    """Return a whole request that asks the stand-in for a reply; with a form, one as a conversation grows."""
    body = turn_body(size, 1 + turn % TURNS, form) if form else request_body(size, turn % TURNS)
    metadata = ("x-codex-turn-metadata", f'{{"session_id":"{SESSION}","bench":"{plan}"}}')
    fields = [("host", running.url.netloc), metadata, *FIELDS, ("content-length", str(len(body)))]
    if form == "new":  # nothing is known of it: neither its session nor its first bytes
        fields[fields.index(("session-id", SESSION))] = ("session-id", str(uuid.uuid4()))
        body = body.replace(b"x " * 16, uuid.uuid4().hex.encode(), 1)
    return wire.head_bytes(f"POST {running.url.path} HTTP/1.1", fields) + body


def connect(running: Running) -> socket.socket:
    """Open a connection to a row."""
    tls = running.url.scheme == "https"
    sock = socket.create_connection((running.url.hostname, running.url.port or (443 if tls else 80)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, RECEIVE_TIMEOUT)
    return running.ground.context.wrap_socket(sock, server_hostname="localhost") if tls else sock


class Reply:
    """A reply as it comes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.count = 0  # bytes
        self.stamps = 0
        self.tail = b""  # as long as END
        self._rest = b""  # of an event that has not come whole
        self._buffer = memoryview(bytearray(READ_BYTES))

    def read(self) -> memoryview:
        """Return the next bytes; raise BenchError for a reply that is refused or cut."""
        size = self.sock.recv_into(self._buffer)
        piece = self._buffer[:size]
        if not size or (not self.count and bytes(piece[:12]) != b"HTTP/1.1 200"):
            raise BenchError(f"got {bytes(piece[:300])!r} after {self.count} bytes")
        self.count += size
        self.tail = (self.tail + bytes(piece[-len(END) :]))[-len(END) :]
        return piece

    def read_late(self) -> list[float]:
        """Return by how many us each event that has come whole is late."""
        try:
            piece = bytes(self.read())
        except (BlockingIOError, ssl.SSLWantReadError):
            return []  # a TLS record without content
        now = clock()
        whole, _, self._rest = (self._rest + piece).rpartition(b"\n\n")
        late = [(now - int(stamp)) / 1e3 for stamp in STAMP.findall(whole)]
        self.stamps += len(late)
        return late

    def finish(self) -> None:
        """Read to the end."""
        while self.tail != END:
            self.read()


def first_byte(sock: socket.socket, request: bytes) -> float:
    """Send a request, read its reply to the end, and return the ms to its body's first byte."""
    answer, head, sent = Reply(sock), b"", clock()
    sock.sendall(request)
    while not head.partition(b"\r\n\r\n")[2]:
        head += answer.read()
    passed = clock() - sent
    answer.finish()
    return passed / 1e6


# == 6 measurements ===========================================================


def process_tree(pid: int) -> list[int]:
    """Return a process and all that descend from it; nothing for 0, or where the system cannot tell."""
    found = [pid] if pid and sys.platform == "linux" else []
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found.extend(int(child) for child in children.read_text().split())
    return found


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process tree.

    A process' CPU clock (its id is made as clock_getcpuclockid(3) does) is utime + stime of /proc/PID/stat
    without their rounding to 10 ms.
    """
    return sum(time.clock_gettime((~member << 3) | 2) for member in process_tree(pid))


def memory_kb(pid: int) -> float:
    """Return the proportional set size of a process tree."""
    rollups = (Path(f"/proc/{member}/smaps_rollup").read_text() for member in process_tree(pid))
    return sum(float(rollup.split("\nPss:")[1].split()[0]) for rollup in rollups)


def spread(values: Sequence[float], name: str) -> Figures:
    """Return median and 99th percentile."""
    ranked = sorted(values)
    return {f"{name}_p50": statistics.median(ranked), f"{name}_p99": ranked[int(len(ranked) * 0.99)]}


def measure_held(running: Running) -> Figures:
    """Return the memory that an open stream costs; the first measurement, so the row is warmed up too."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(contextlib.closing(connect(running)))
        for _ in range(5):
            first_byte(sock, request_bytes(running, "brief 0 0"))
        before = memory_kb(running.pid)
        for _ in range(HELD):
            sock = stack.enter_context(contextlib.closing(connect(running)))
            sock.sendall(request_bytes(running, "hold 0 0"))
            Reply(sock).read()
        growth = memory_kb(running.pid) - before
    time.sleep(0.3)  # the row has many departures to notice, and must be idle for what is measured next
    return {"memory": growth / HELD} if growth else {}


def measure_first_byte(running: Running) -> Figures:
    """Return the time to first byte of requests one after the other, and the CPU that one costs."""
    requests = [request_bytes(running, "brief 0 0", turn) for turn in range(TURNS)]
    count = running.ground.size.requests
    with contextlib.closing(connect(running)) as sock:
        first_byte(sock, requests[-1])
        before = cpu_seconds(running.pid)
        figures = spread([first_byte(sock, requests[turn % TURNS]) for turn in range(count)], "first")
        used = cpu_seconds(running.pid) - before
    return {**figures, "cpu_request": used * 1e3 / count} if used else figures


def paced_streams(running: Running, count: int) -> Iterator[list[float]]:
    """Run the paced streams to their ends, and yield how late the events of each read are."""
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for number in range(STREAMS):
            sock = stack.enter_context(contextlib.closing(connect(running)))
            sock.sendall(request_bytes(running, f"paced {count} {number * PERIOD // STREAMS}"))
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ, Reply(sock))
        while selector.get_map():
            ready = selector.select(TIMEOUT)
            if not ready:
                raise BenchError(f"no event in {TIMEOUT} s")
            for stream in (key.data for key, _ in ready):
                yield stream.read_late()
                if stream.tail == END:
                    selector.unregister(stream.sock)
                    if stream.stamps < 0.98 * count:  # a proxy that cuts chunks anew can cut a stamp
                        raise BenchError(f"{stream.stamps} events came of {count}")


def timed_events(running: Running) -> tuple[list[float], list[float]]:
    """Return by how much events are late in a window in which all streams run, and the CPU seconds it costs.

    The seconds are the row's, the stand-in's and this client's.
    """
    window = running.ground.size.window
    late: list[float] = []
    used: list[tuple[float, ...]] = []  # at both ends of the window, by the row, the stand-in and this client
    marks = [clock() + 500_000_000, clock() + 500_000_000 + int(window * 1e9)]
    for latest in paced_streams(running, int((window + 0.8) * HERTZ)):
        if marks and clock() >= marks[0]:
            marks.pop(0)
            used.append((*map(cpu_seconds, (running.pid, running.ground.standin_pid)), time.process_time()))
        if len(marks) == 1:
            late.extend(latest)
    if marks:
        raise BenchError("the streams ended early")
    return late, [after - before for before, after in zip(*used)]


def measure_events(running: Running) -> Figures:
    """Return by how much events are late and what one costs."""
    late, (row, standin, client) = timed_events(running)
    window = running.ground.size.window
    figures = {**spread(late, "late"), "standin": standin / window, "client": client / window}
    return {**figures, "cpu_event": row * 1e6 / len(late)} if row else figures


def measure_flood(running: Running) -> Figures:
    """Return the speed of one stream that comes as fast as it goes."""
    with contextlib.closing(connect(running)) as sock:
        sock.sendall(request_bytes(running, f"flood {running.ground.size.flood} 0"))
        answer = Reply(sock)
        answer.read()
        began = clock()
        answer.finish()
        return {"flood": answer.count * 1e3 / (clock() - began)}


def measure_large(running: Running) -> Figures:
    """Return the time to first byte of a large request."""
    requests = [request_bytes(running, "brief 0 0", turn, LARGE_BYTES) for turn in range(TURNS)]
    with contextlib.closing(connect(running)) as sock:
        first_byte(sock, requests[-1])
        values = [first_byte(sock, requests[turn % TURNS]) for turn in range(running.ground.size.large)]
    return {"large": statistics.median(values)}


def measure_turns(running: Running) -> Figures:
    """Return the time to first byte of a growing conversation's requests, in each form."""
    figures: Figures = {}
    for size in TURN_BYTES:
        count = max(8, min(100, running.ground.size.turn // size))
        values: dict[str, list[float]] = {form: [] for form in FORMS}
        with contextlib.closing(connect(running)) as sock:
            for number in range(count + 1):  # the forms in turns: what slows one down slows down all
                for form in FORMS:
                    request = request_bytes(running, "brief 0 0", number, size, form)
                    passed = first_byte(sock, request)
                    values[form] += [passed] if number else []
        figures.update({f"turn_{size}_{form}": statistics.median(each) for form, each in values.items()})
    return figures


def run_poster(pipe: Connection, url: str, ca: str) -> None:
    """Be the client that posts large bodies, one after the other, until the process is killed."""
    context = ssl.create_default_context(cafile=ca)
    ground = Ground(Path(), Path(ca), context, QUICK, 0, 0, 0)
    running = Running(Row("poster"), ground, urllib.parse.urlsplit(url))
    request = request_bytes(running, "brief 0 0", TURNS - 1, BESIDE_BYTES, "alias")
    with contextlib.closing(connect(running)) as sock:
        first_byte(sock, request)
        pipe.send(0)
        while True:
            first_byte(sock, request)


def measure_beside(running: Running) -> Figures:
    """Return by how much events are late while another client posts large bodies."""
    with contextlib.ExitStack() as stack:
        spawn(stack, run_poster, running.url.geturl(), str(running.ground.ca))
        late, _ = timed_events(running)
    return spread(late, "beside")


def measure_slow(running: Running) -> Figures:
    """Return the time to first byte over the slow link, of the same row started anew."""
    if running.row.url:
        return {}  # whoever started it chose its upstream
    with run(running.row, running.ground, running.ground.slow_port) as slow:
        time.sleep(SETTLE if slow.pid else 0)
        request, began = request_bytes(slow, "brief 0 0"), clock()
        with contextlib.closing(connect(slow)) as sock:
            first = (clock() - began) / 1e6 + first_byte(sock, request)
            values = [first_byte(sock, request) for _ in range(slow.ground.size.slow)]
    return {**spread(values, "slow"), "slow_first": first}


MEASUREMENTS = (
    measure_held, measure_first_byte, measure_turns, measure_events, measure_beside, measure_flood,
    measure_large, measure_slow,
)  # fmt: skip


def run_round(rows: Sequence[Row], ground: Ground) -> dict[str, Figures]:
    """Start every row, take each measurement of all of them in turn, and return the figures by row."""
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(run(row, ground, ground.port)) for row in rows]
        found: dict[str, Figures] = {each.row.name: {"startup": each.startup} for each in started}
        for measure in MEASUREMENTS:
            for running in started:
                try:
                    found[running.row.name].update(measure(running))
                except (OSError, BenchError) as exc:
                    print(f"{running.row.name}: {measure.__name__}: {exc!r}", file=sys.stderr)
    return found


# == 7 report =================================================================


def summary(rounds: Sequence[dict[str, Figures]]) -> dict[str, Figures]:
    """Return the best figures of all rounds, by row."""
    better = {column.key: max if column.higher else min for column in (*COLUMNS, *TURN_COLUMNS)}
    table: dict[str, Figures] = {name: {} for name in rounds[0]}
    for name, figures in ((name, figures) for found in rounds for name, figures in found.items()):
        for key, value in figures.items():
            table[name][key] = better.get(key, max)(value, table[name].get(key, value))
    floor = table.get("direct", {}).get("first_p50")
    for figures in table.values():
        if floor and "first_p50" in figures:
            figures["added"] = figures["first_p50"] - floor
    return table


def print_lines(lines: Sequence[Sequence[str]]) -> None:
    """Print cells in columns, the first one to the left."""
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    for first, *others in lines:
        print(first.ljust(widths[0]), *map(str.rjust, others, widths[1:]), sep="  ")
    print()


def print_table(table: dict[str, Figures]) -> None:
    """Print a line a row, twice, and what the two ends used."""
    for columns in (COLUMNS, TURN_COLUMNS):
        lines = [["", *(column.group for column in columns)], ["", *(column.title for column in columns)]]
        for name, figures in table.items():
            known = [(figures.get(each.key), each.form) for each in columns]
            lines.append([name, *(format(value, form) if value else "-" for value, form in known)])
        print_lines(lines)
    for end in ("standin", "client"):
        share = max(figures.get(end, 0.0) for figures in table.values())
        print(f"{end}: at most {share:.0%} of a core at {STREAMS * HERTZ} events a second")
    print()


def judged(title: str, value: float, target: float | None, higher: bool = False) -> list[str]:
    """Return a line that says whether a value holds its target."""
    if target is None:
        return [title, f"{value:.2f}", "", ""]
    holds = value >= target if higher else value <= target
    return [title, f"{value:.2f}", f"{'>=' if higher else '<='} {target:.2f}", "ok" if holds else "MISS"]


def print_verdicts(table: dict[str, Figures]) -> None:
    """Print the targets: DESIGN's ratios to nginx, to be ahead of codex, and those that have no peer."""
    bridge, direct = table["bridge"], table.get("direct", {})
    lines = [["bridge", "", "target", ""], judged("start, s", bridge["startup"], STARTUP_TARGET)]
    for key in ("slow_p50", "slow_first"):
        if key in bridge and "slow_p50" in direct:
            title = f"40 ms link, {key[5:]}: ms more than direct's p50"
            lines.append(judged(title, bridge[key] - direct["slow_p50"], SLOW_TARGET))
    for size, form in itertools.product(TURN_BYTES, TO_NAME):
        if f"turn_{size}_{form}" in bridge:
            ratio = bridge[f"turn_{size}_{form}"] / bridge[f"turn_{size}_name"]
            target = TO_NAME[form] if size > TURN_BYTES[0] else None
            lines.append(judged(f"turn {size // 1000} KB, {form} / name", ratio, target))
    print_lines(lines)
    for peer in [name for name in table if name not in ("bridge", "direct")]:
        lines = [[f"bridge / {peer}", "ratio", "target", ""]]
        for column in (*COLUMNS, *TURN_COLUMNS):
            if bridge.get(column.key) and table[peer].get(column.key):
                ahead = FASTAPI_TARGET if column.key.startswith("turn") else None
                target = {"nginx": column.target, "codex": 1.0, "fastapi": ahead}.get(peer)
                ratio = bridge[column.key] / table[peer][column.key]
                lines.append(judged(f"{column.group}, {column.title}", ratio, target, column.higher))
        print_lines(lines)


# == 8 main ===================================================================


def named_url(text: str) -> Row:
    """Return the row of an `--against`; raise ValueError for what is none."""
    name, _, url = text.partition("=")
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(text)
    return Row(name, url=url)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Measure the bridge beside other proxies.")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, metavar="N", help="best of so many (default 3, with --quick 1)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="measure these rows and no others")
    parser.add_argument(
        "--against", action="append", default=[], type=named_url, metavar="NAME=URL", help="a running proxy"
    )
    parser.add_argument("--codex", default=shutil.which("codex"), metavar="PATH", help="OpenAI's CLI")
    parser.add_argument("--fastapi", metavar="PYTHON", help="a Python that has FastAPI, httpx and uvicorn")
    parser.add_argument("--standin-port", type=int, default=0, metavar="N", help="for --against to know")
    return parser.parse_args(argv)


def choose_rows(options: argparse.Namespace) -> list[Row]:
    """Return the rows that can be measured here and are wanted."""
    rows = [Row("direct")]
    if shutil.which("nginx"):
        rows.append(Row("nginx", nginx_command))
    if options.codex:
        rows.append(Row("codex", functools.partial(codex_command, options.codex)))
    if options.fastapi:
        rows.append(Row("fastapi", functools.partial(fastapi_command, options.fastapi), probe="/healthz"))
    if BRIDGE.exists():
        rows.append(Row("bridge", bridge_command, probe="/healthz"))
    rows.extend(options.against)
    return [row for row in rows if not options.only or row.name in options.only]


def spawn(stack: contextlib.ExitStack, target: Callable[..., None], *arguments: object) -> tuple[int, int]:
    """Start a process of this file's own; return its id and its port."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    stack.callback(process.join)
    stack.callback(process.kill)
    return process.pid or 0, ours.recv()


def prepare(stack: contextlib.ExitStack, options: argparse.Namespace) -> Ground:
    """Write the run's files and start its stand-in and its slow link."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qoo-bench-")))
    ca, certificate = folder / "ca.pem", folder / "standin.pem"
    ca.write_text(wire.CA_PEM)
    certificate.write_text(wire.LEAF_PEM + wire.LEAF_KEY_PEM)
    (folder / "key").write_text("sk-bench\n")  # codex reads one on standard input
    pid, port = spawn(stack, run_standin, str(certificate), options.standin_port)
    _, slow_port = spawn(stack, run_slow_link, port)
    context = ssl.create_default_context(cafile=str(ca))
    return Ground(folder, ca, context, QUICK if options.quick else FULL, pid, port, slow_port)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, then print the tables."""
    options = parse(argv)
    rows, count = choose_rows(options), options.rounds or (1 if options.quick else 3)
    if not rows:
        print("there is no such row here", file=sys.stderr)
        return 2
    gc.disable()
    try:
        with contextlib.ExitStack() as stack:
            ground = prepare(stack, options)
            rounds = [run_round(rows[:: -1 if number % 2 else 1], ground) for number in range(count)]
    except BenchError as exc:
        print(exc, file=sys.stderr)
        return 1
    table = summary(rounds)
    print_table(table)
    if "bridge" in table:
        print_verdicts(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
