"""Room log: bridge.log, its one line a request, and no secret in it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wire
from conftest import LogLines, RunningBridge, Start
from help import (
    API_KEY,
    BEARER,
    DEEP,
    EVENTS,
    FIRST,
    HOST,
    JSON_TYPE,
    MODEL,
    POST,
    REQUEST,
    SECONDS,
    NoThreads,
    ask,
    head,
    posix,
    until,
)

import qoo_bridge as q


def test_log_needs_no_file_to_be_opened_later(bytecode: Path) -> None:
    code = ("import sys, encodings; sys.path.insert(0, sys.argv[1]); import qoo_bridge as q; "
            "encodings.__path__ = []; q.log_line(q.Record('a'))")
    words = [sys.executable, "-I", "-S", "-B", "-c", code, str(bytecode.parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# -- secrets

MARK = "MARKED-SECRET-7f3a"


def marked_requests() -> list[bytes]:
    """Return requests that meet every kind of answer, with secrets wherever a client may put one."""
    fields = (f"Authorization: Bearer {MARK}-bearer", f"x-api-key: {MARK}-key", f"Cookie: sid={MARK}-cookie",
              f"User-Agent: agent-{MARK}", f"session-id: {MARK}-session",
              f"Proxy-Authorization: Basic {MARK}")
    body = json.dumps({**REQUEST, "input": f"{MARK}-body", "instructions": MARK,
                       "metadata": {"a": MARK}}).encode()
    chat = json.dumps({"model": "gpt-5.5",
                       "messages": [{"role": "user", "content": f"{MARK}-chat"}]}).encode()
    broken = [body[:-1], body[:40] + b"\xff", b'"' + MARK.encode(), b"[" * DEEP,
              b'{"model":5,"input":"%b"}' % MARK.encode()]
    whole = [(path, payload) for path in ("/v1/responses", "/v1/nothing", "/v1/models",
                                          "/v1/chat/completions")
             for payload in (body, chat, *broken)]
    posts = [head(f"POST {path}?key={MARK} HTTP/1.1", HOST, JSON_TYPE, *fields,
                  f"Content-Length: {len(payload)}") + payload
             for path, payload in whole]
    return [
        *posts,
        head("GET /status HTTP/1.1", HOST, *fields), head("GET /v1/models HTTP/1.1", HOST, *fields),
        head(POST, HOST, *fields, f"Origin: https://{MARK}.example", "Content-Length: 0"),
        head(POST, HOST, *fields, "Content-Encoding: gzip", f"Content-Length: {len(body)}") + body,
        head(POST, HOST, *fields, "Transfer-Encoding: chunked") + MARK.encode() + b"\r\n",
        head(POST, HOST, *fields, f"Bad Line {MARK}"), head(POST, *fields),
        head("GET / HTTP/1.1", HOST, *fields, *fields),
    ]


UPSTREAM_ENDS = [
    pytest.param(None, id="well"),
    pytest.param(wire.cut(wire.created()), id="cut"),
    pytest.param(wire.reply_raw(b"nonsense"), id="nonsense"),
    pytest.param(wire.refuse(400, "no"), id="refused"),
    pytest.param(wire.refuse(401, "Could not validate credentials"), id="401"),
    pytest.param(wire.cloudflare(), id="page"),
]


@pytest.mark.parametrize("ending", UPSTREAM_ENDS)
@pytest.mark.parametrize("locked", [False, True])
def test_no_secret_in_log_page_or_answer(
    start: Start, backend: wire.Backend, tmp_path: Path, log_lines: LogLines, ending: wire.Reply | None,
    locked: bool
) -> None:
    auth_file = tmp_path / "auth.json"
    wire.write_auth(auth_file, backend, OPENAI_API_KEY=f"{MARK}-openai", agent_identity={"x": MARK})
    bridge = start(*(("--api-key", f"laptop={API_KEY}") if locked else ()))
    if ending is not None:
        backend.always("/responses", ending)
    answers = []
    for request in marked_requests():
        with contextlib.suppress(wire.PeerLeft), wire.Client(bridge.address) as client:
            client.send(request)
            reply = client.read_reply()
            answers.append(repr(reply.headers).encode())
            if reply.status != 200:  # else it is the stand-in's echo
                answers.append(reply.body)
    own, pages = BEARER if locked else {}, ("/status", "/metrics", "/", "/client-config/curl")
    answers += [wire.get(bridge.address, path, own).body for path in pages]
    output = b"\n".join(answers).decode("utf-8", "replace") + "\n".join(log_lines.lines)
    secrets = [MARK, API_KEY, "someone@example.com", *backend.tokens.values(), "secret-of-the-host"]
    assert [secret for secret in secrets if secret in output] == []


def test_failure_of_upstream_within_a_chat_stream_is_not_logged_in_full(
    start: Start, backend: wire.Backend, log_lines: LogLines
) -> None:
    first = wire.text_turn("hello")[:5]
    backend.on("/responses", wire.turn(*first, wire.failed("invalid_prompt", f"refused: {MARK}")))
    chat = {"model": "gpt-5.5", "messages": [{"role": "user", "content": MARK}], "stream": True}
    wire.post(start().address, "/v1/chat/completions", chat)
    log_lines.wait_for("/v1/chat/completions")
    assert MARK not in repr(log_lines.lines)


# -- bridge.log


@pytest.fixture
def logging_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Path]]:
    """Set up the bridge's own log in a folder of the test's, and take it down again."""
    path, before = tmp_path / "bridge.log", list(q.log.handlers)
    level, propagate = q.log.level, q.log.propagate
    for name in ("logThreads", "logProcesses", "logMultiprocessing"):
        monkeypatch.setattr(logging, name, getattr(logging, name))  # put back when the row ends

    def set_up() -> Path:
        words = q.build_parser().parse_intermixed_args(["--log-file", str(path)])
        q.set_up_log(q.load_config(vars(words), {}))
        return path

    yield set_up
    for handler in [each for each in q.log.handlers if each not in before]:
        q.log.removeHandler(handler)
        handler.flush()  # while what it writes to the console is still the row's
        handler.close()
    q.log.setLevel(level)
    q.log.propagate = propagate


@posix
def test_log_is_private_and_rotated(logging_to: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "LOG_SIZE", 2000)
    mask = os.umask(0)
    try:
        path = logging_to()
        for number in range(100):
            q.log.info("line %d %s", number, "x" * 50)
    finally:
        os.umask(mask)
    files = sorted(path.parent.glob("bridge.log*"))
    assert [each.name for each in files] == ["bridge.log", "bridge.log.1"]
    assert [stat.S_IMODE(each.stat().st_mode) for each in files] == [0o600, 0o600]
    assert all(each.stat().st_size <= 2200 for each in files)  # the last line may go beyond
    assert "line 99 " in path.read_text("utf-8")


@posix
def test_log_that_others_could_read_is_closed_to_them(logging_to: Callable[[], Path], tmp_path: Path) -> None:
    (tmp_path / "bridge.log").write_text("older\n")
    (tmp_path / "bridge.log").chmod(0o644)
    assert stat.S_IMODE(logging_to().stat().st_mode) == 0o600


def test_log_holds_a_line_a_request_and_no_secret(start: Start, logging_to: Callable[[], Path]) -> None:
    path = logging_to()
    bridge = start("--api-key", f"laptop={API_KEY}")
    for fields in (BEARER, {"x-api-key": MARK}):
        wire.post(bridge.address, "/v1/responses", {**REQUEST, "input": MARK}, fields)
    assert until(lambda: path.read_text("utf-8").count("/v1/responses") == 2)
    text = path.read_text("utf-8")
    assert "/laptop " in text
    assert (API_KEY in text, MARK in text) == (False, False)


# -- the line of a request ----------------------------------------------------

LINE = re.compile(
    r"INFO [0-9a-f]{8} 127\.0\.0\.1 POST /v1/responses (?P<model>\S+)->(?P<slug>\S+) rules=(?P<rules>\S+) "
    r"repairs=(?P<repairs>\S+) status=(?P<status>\d+) first_byte=(?P<first>-|\d+ms) total=\d+ms "
    r"events=(?P<events>\d+) bytes=(?P<bytes>\d+) tokens=(?P<tokens>\S+)(?: cached=\d+%)? "
    r"end=(?P<end>\S+)(?P<error> error=\S+)?"
)


def fields_of(lines: list[str]) -> dict[str, str]:
    """Take the one line of a request apart."""
    assert len(lines) == 1
    match = LINE.fullmatch(lines[0])
    assert match, lines[0]
    return {name: value or "" for name, value in match.groupdict().items()}


def test_log_line_tells_what_happened(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines
) -> None:
    backend.on("/responses", wire.turn(*EVENTS))
    reply = ask(bridge)
    found = fields_of(log_lines.ended())
    assert (found["model"], found["slug"], found["status"], found["end"]) == (
        "gpt-5.5",
        "gpt-5.5",
        "200",
        "completed",
    )
    assert int(found["events"]) == len(EVENTS)
    assert int(found["bytes"]) == len(reply.body)
    assert found["tokens"] == "input:32,cached:16,output:9,reasoning:4"
    assert found["first"] != "-"
    assert found["rules"] != "-"
    assert (found["repairs"], found["error"]) == ("-", "")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (wire.turn(FIRST, wire.failed("server_error", "no")),
         ("200", "failed", " error=upstream:server_error")),
        (wire.turn(FIRST, wire.incomplete()), ("200", "incomplete", "")),
        (wire.turn(FIRST), ("200", "cut", " error=bridge:upstream_error")),
        (wire.usage_limit(), ("429", "error", " error=upstream:usage_limit_reached")),
    ],
    ids=["failed", "incomplete", "cut", "429"],
)
def test_log_line_tells_how_it_ended(
    reply: wire.Reply,
    expected: tuple[str, str, str],
    bridge: RunningBridge,
    backend: wire.Backend,
    log_lines: LogLines,
) -> None:
    backend.on("/responses", reply)
    ask(bridge)
    found = fields_of(log_lines.ended())
    assert (found["status"], found["end"], found["error"]) == expected


def test_log_line_names_the_rules_and_repairs(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines
) -> None:
    backend.on("/responses", wire.refuse(400, "Unsupported parameter: text"))
    assert ask(bridge, text={"verbosity": "low"}, temperature=1).header("x-qoo-bridge-repaired")
    found = fields_of(log_lines.ended())
    assert "drop-unsupported" in found["rules"]
    assert found["repairs"] != "-"


@pytest.mark.parametrize("status", [200, 400, 401, 403, 500])
def test_log_tells_no_secret(
    status: int, bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines
) -> None:
    tokens = set(backend.tokens.values())
    if status != 200:
        backend.on("/responses", *[wire.refuse(status, "REPLY-BODY")] * 2)
    headers = {
        "Authorization": "Bearer CLIENT-KEY",
        "X-Api-Key": "CLIENT-KEY",
        "Cookie": "COOKIE=1",
        "Session-Id": "HEADER-VALUE",
        "X-Secret": "HEADER-VALUE",
        "User-Agent": "HEADER-VALUE/1.0",
    }
    assert ask(bridge, headers=headers, input="REQUEST-BODY", instructions="REQUEST-BODY").status == status
    log_lines.ended()
    secrets = {
        *tokens,
        *backend.tokens.values(),
        "CLIENT-KEY",
        "COOKIE",
        "HEADER-VALUE",
        "REQUEST-BODY",
        "REPLY-BODY",
        backend.account_id,
        "secret-of-the-host",
    }
    assert [secret for secret in secrets for line in log_lines.lines if secret in line] == []


def test_a_refused_request_is_logged_with_its_model(bridge: RunningBridge) -> None:
    assert ask(bridge, MODEL, input="hi", previous_response_id="resp_unknown").status == 400
    # noted when the client has its answer
    assert until(lambda: bool(bridge.bridge.telemetry.snapshot(0)["recent"]))
    assert bridge.bridge.telemetry.snapshot(0)["recent"][0]["model"] == "gpt-5.5"


# -- the file, whatever happens to it -------------------------------------------


@posix
@pytest.mark.parametrize("how", ["moved", "removed"])
def test_log_that_was_moved_or_removed_is_opened_anew(
    how: str, logging_to: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q.Log, "LOOK_SECONDS", -1)
    path = logging_to()
    q.log.info("before")
    if how == "moved":
        path.rename(path.with_name("bridge.log.old"))  # as logrotate does
    else:
        path.unlink()
    q.log.info("between")
    q.log.info("after")
    assert "after" in path.read_text("utf-8")


@posix
def test_two_bridges_in_one_folder_share_a_log(
    logging_to: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q.Log, "LOOK_SECONDS", -1)
    monkeypatch.setattr(q, "LOG_SIZE", 2000)
    path = logging_to()
    other = q.Log(str(path))
    lines = [logging.LogRecord("qoo_bridge", logging.INFO, "", 0, f"line {number} {'x' * 50}", None, None)
             for number in range(40)]
    for number, line in enumerate(lines):
        (other if number % 2 else q.log.handlers[-1]).handle(line)
    other.close()
    kept = "".join(each.read_text("utf-8") for each in path.parent.glob("bridge.log*"))
    newest = [f"line {number} " for number in range(25, 40)]
    assert [text for text in newest if text not in kept] == []  # nobody has rotated the other's new file away


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP to send")
def test_log_that_logrotate_has_moved_is_opened_anew_at_its_signal(
    bridge: RunningBridge, logging_to: Callable[[], Path]
) -> None:
    path = logging_to()
    q.log.info("before")
    path.rename(path.with_name("bridge.log.old"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)}
    try:
        q.catch_signals(bridge.server)
        os.kill(os.getpid(), signal.SIGHUP)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    q.log.info("after")
    assert "after" in path.read_text("utf-8")


@posix
@pytest.mark.parametrize("kind", ["link", "/dev/fd"])
def test_log_behind_a_link_leaves_the_link_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(q.Log, "LOOK_SECONDS", -1)
    monkeypatch.setattr(q, "LOG_SIZE", 500)
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("")
    target.chmod(0o644)
    link.symlink_to(target)
    with target.open("a") as opened:  # /dev/stdout is a link to what `>file` has opened
        path = f"/dev/fd/{opened.fileno()}" if kind == "/dev/fd" else str(link)
        with contextlib.closing(q.Log(path)) as log:
            for _ in range(20):
                log.handle(logging.LogRecord("qoo_bridge", logging.INFO, "", 0, "x" * 100, None, None))
    assert link.is_symlink()
    names = sorted(each.name for each in tmp_path.iterdir())
    if kind == "link":
        assert (names, target.stat().st_mode & 0o777) == (["link", "target", "target.1"], 0o600)
    else:
        assert (names, target.stat().st_mode & 0o777) == (["link", "target"], 0o644)
        assert target.read_text().count("\n") == 20


@posix
def test_a_terminal_that_cannot_be_looked_at_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more_files(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", no_more_files)
    assert q.has_terminal() is True


def test_console_without_a_thread_is_tried_again_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    threads = NoThreads(monkeypatch, "console")
    with contextlib.closing(q.Log("")) as log:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written))
        line = logging.LogRecord("qoo_bridge", logging.INFO, "", 0, "of this test", None, None)
        for _ in range(q.Log.CONSOLE_LINES + 50):
            log.handle(line)
        assert (threads.failed > 1, b"of this test" in written.getvalue()) == (True, False)
        threads.names = ()
        log.handle(line)
        log.flush()
        assert written.getvalue().count(b"of this test") == q.Log.CONSOLE_LINES


def test_the_lines_of_a_moment_are_one_write_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that wakes up for each line of a busy bridge takes a tenth of its time."""
    written: list[bytes] = []

    class Console(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, payload: bytes) -> int:  # type: ignore[override]
            written.append(bytes(payload))
            return len(payload)

    monkeypatch.setattr(q.Log, "MOMENT", 0.3)
    with contextlib.closing(q.Log("")) as log:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Console())))
        for number in range(9):
            log.handle(logging.LogRecord("qoo_bridge", logging.INFO, "", 0, f"line {number}", None, None))
        log.flush()
    assert [line[-6:] for payload in written for line in payload.splitlines()] == [
        b"line %d" % number for number in range(9)]
    assert len(written) < 9


@posix
@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_only_a_regular_file_is_changed(kind: str, tmp_path: Path) -> None:
    path = Path(os.devnull)
    if kind == "pipe":
        path = tmp_path / "pipe"
        os.mkfifo(path, 0o644)  # nobody reads it: to open it must not hang
    mode = path.stat().st_mode
    log = q.Log(str(path))
    log.handle(logging.LogRecord("qoo_bridge", logging.INFO, "", 0, "a line", None, None))
    log.close()
    assert path.stat().st_mode == mode
    assert bool(log.problem) is (kind == "pipe")


@posix
def test_a_console_that_takes_nothing_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    console = os.fdopen(write_end, "w")
    with contextlib.closing(q.Log(str(tmp_path / "bridge.log"))) as log:
        monkeypatch.setattr(sys, "stderr", console)
        line = logging.LogRecord("qoo_bridge", logging.INFO, "", 0, "x" * 1000, None, None)
        for _ in range(q.Log.CONSOLE_LINES + 500):  # many more than a pipe holds
            log.handle(line)
        assert (tmp_path / "bridge.log").read_text().count("\n") == q.Log.CONSOLE_LINES + 500
        os.close(read_end)  # the thread goes on, into nothing
        log.flush()
    with contextlib.suppress(OSError):
        console.close()


@pytest.mark.parametrize("hostile", ["two\nlines", "\x1b[2J", "\u202edrow", "\r", "\x85", "\u2028"])
def test_no_text_can_forge_a_line_or_act_on_a_terminal(hostile: str, logging_to: Callable[[], Path]) -> None:
    path = logging_to()
    q.log.info("upstream said %s", hostile)
    try:
        raise ValueError(hostile)
    except ValueError:
        q.log.exception("it failed")
    text = path.read_text("utf-8")
    assert all(line.isprintable() for line in text.split("\n"))
    begun = [line for line in text.split("\n") if line and not line.startswith("  | ")]
    assert len(begun) == 2


def test_a_system_without_terminals_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_NOCTTY", raising=False)  # as on Windows
    assert q.has_terminal() is False
