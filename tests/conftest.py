"""Fixtures: the stand-in backend, and a bridge in front of it, in this process or in one of its own."""
from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import logging
import os
import py_compile
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.register_assert_rewrite("help")

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import kernel
import wire

import qoo_bridge as q

gc.disable()  # until the tests are collected: it took half of that time, and found nothing
sys.addaudithook(kernel.watch)  # for the whole run: a hook cannot be taken away
PARSER = q.build_parser()
LOCAL = ("--host", "127.0.0.1", "--port", "0", "--log-file", "-")
POLL = 0.001  # seconds; each test waits so long for its bridge to end


def cuts(raw: bytes, tries: int = 20) -> Iterator[list[bytes]]:
    """Cut bytes in three ways: not at all, at each byte, at random."""
    yield [raw]
    yield [raw[at:at + 1] for at in range(len(raw))]
    chance = random.Random(len(raw))  # the same cuts in every run
    for _ in range(tries):
        at = sorted(chance.choices(range(len(raw) + 1), k=chance.randint(1, 6)))
        yield [raw[start:end] for start, end in zip([0, *at], [*at, len(raw)])]


def pytest_collection_finish() -> None:
    """Keep the tests themselves out of each garbage collection: they stay to the end."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # collections took a twentieth of the time on 3.9
    gc.enable()


class LeakSearch(logging.Handler):
    """Search each line of the log for tokens."""

    def emit(self, record: logging.LogRecord) -> None:
        """Search one line, its traceback too."""
        wire.search(self.format(record).encode("utf-8", "backslashreplace"), "the log")


q.log.addHandler(LeakSearch())
q.log.setLevel(logging.DEBUG)  # what only debug lines say is searched, too


@pytest.fixture(autouse=True)
def trust(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test in which a room used a power that it has not, or a token reached a client or the log."""
    wire.ISSUED.clear()
    yield
    violations, leaks = list(kernel.violations), list(wire.LEAKS)
    kernel.violations.clear()
    wire.LEAKS.clear()
    if request.module.__name__ == "test_wire":
        leaks = []  # there the client asks the sign-in server itself
    assert violations + leaks == []


@functools.cache
def parsed(*options: str) -> dict[str, Any]:
    """Return the values that options give."""
    values = vars(PARSER.parse_args(options))
    return {name: value for name, value in values.items() if value is not None}


class RunningBridge:
    """A bridge that serves in this process; its faults are collected."""

    def __init__(self, backend: wire.Backend, auth_file: Path, *options: str) -> None:
        self.auth_file = auth_file
        self.faults: list[BaseException] = []
        own = {"upstream": [backend.upstream], "issuer": [backend.issuer], "auth_file": [str(auth_file)]}
        self.config = q.load_config({**parsed(*LOCAL), **own, **parsed(*options)}, {})
        self.server = q.Server(self.config)
        self.server.bridge.on_fault = self.faults.append
        self.address = ("127.0.0.1", self.server.server_port)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(POLL,), daemon=True)
        self._thread.start()

    @property
    def bridge(self) -> q.Bridge:
        """Return the parts."""
        return self.server.bridge

    def close(self) -> None:
        """End it; no connection may be left."""
        self.server.drain(5)
        self._thread.join(5)


BRIDGE = Path(__file__).resolve().parents[1] / "qoo_bridge.py"
# Runs a program as `python PROGRAM WORDS` does, but lets it look around more often: a serving loop
# notices its end, and a main thread a signal, within this time. No deadline of the program is another.
HURRIED = """\
import runpy, socketserver, sys, time
serve, sleep = socketserver.BaseServer.serve_forever, time.sleep
socketserver.BaseServer.serve_forever = lambda server, poll=0.5: serve(server, min(poll, 0.02))
time.sleep = lambda seconds: sleep(min(seconds, 0.02))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Process:
    """A bridge in a process of its own, and what it says."""

    def __init__(self, backend: wire.Backend, folder: Path, program: Path, *options: str) -> None:
        self.lines: list[str] = []
        begun = time.monotonic()
        self.process = subprocess.Popen([
            sys.executable, "-W", "error", "-c", HURRIED, str(program), "--host", "127.0.0.1", "--port", "0",
            "--upstream", backend.upstream, "--issuer", backend.issuer,
            "--auth-file", str(folder / "auth.json"), "--log-file", "-", *options,
        ], stderr=subprocess.PIPE, text=True)
        self.greeting = self.read_until("qoo-bridge ")
        self.start_seconds = time.monotonic() - begun
        match = re.search(r"http://127\.0\.0\.1:(\d+)/v1", self.greeting)
        assert match, self.greeting
        self.address = ("127.0.0.1", int(match[1]))
        self._reader = threading.Thread(target=self._read_on, daemon=True)  # a full pipe would stop it
        self._reader.start()

    def _read_on(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def read_until(self, text: str) -> str:
        """Read lines of its log up to one that has this in it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"{text!r} is not in {self.lines}")

    def read_more(self, text: str) -> bool:
        """Wait until a line of its log has this in it."""
        until = time.monotonic() + 5
        while not any(text in line for line in self.lines):
            assert time.monotonic() < until, self.lines
            time.sleep(0.005)
        return True

    def wait(self) -> int:
        """Wait for its end; return its exit status."""
        self._reader.join(10)
        return self.process.wait(10)

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        wire.search("".join(self.lines).encode(), "the log of a process")


@pytest.fixture(scope="session")
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as bytecode, to run and to import: what it takes to compile it is paid once."""
    made = tmp_path_factory.mktemp("bytecode") / "qoo_bridge.pyc"
    py_compile.compile(str(BRIDGE), str(made), doraise=True)
    return made


FOLDERS = itertools.count()


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the test's own. To make one, pytest's fixture looks through all others, or links it."""
    made = tmp_path_factory.getbasetemp() / f"{next(FOLDERS)}-{request.function.__name__}"
    made.mkdir(0o700)
    return made


Start = Callable[..., RunningBridge]
Run = Callable[..., Process]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[wire.Backend]:
    """The strict stand-in, trusted by its certificate; a fault in it fails the test."""
    with wire.Backend() as standing:
        monkeypatch.setenv("SSL_CERT_FILE", standing.ca_file)
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield standing
        standing.check()


@pytest.fixture
def start(backend: wire.Backend, tmp_path: Path) -> Iterator[Start]:
    """Start bridges with options of the test's own."""
    running: list[RunningBridge] = []

    def start_one(*options: str, signed_in: bool = True) -> RunningBridge:
        auth_file = tmp_path / "auth.json"
        if signed_in and not auth_file.exists():
            wire.write_auth(auth_file, backend)
        running.append(RunningBridge(backend, auth_file, *options))
        return running[-1]

    yield start_one
    for one in running:
        one.close()
    assert [fault for one in running for fault in one.faults] == []


@pytest.fixture
def run(backend: wire.Backend, tmp_path: Path, bytecode: Path) -> Iterator[Run]:
    """Run signed-in bridges in processes of their own."""
    with contextlib.ExitStack() as running:

        def run_one(*options: str, program: Path = bytecode) -> Process:
            if not (tmp_path / "auth.json").exists():
                wire.write_auth(tmp_path / "auth.json", backend)
            process = Process(backend, tmp_path, program, *options)
            running.callback(process.close)
            return process

        yield run_one


@pytest.fixture
def bridge(start: Start) -> RunningBridge:
    """A bridge with the default options."""
    return start()


class LogLines(logging.Handler):
    """Keep the log's lines, tracebacks too; a line is written after the answer, so a test waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take one line."""
        with self.changed:
            self.lines.append(f"{record.levelname} {self.format(record)}")
            self.changed.notify_all()

    def wait_for(self, text: str) -> str:
        """Return the first line with `text` in it, once it is there."""
        with self.changed:
            assert self.changed.wait_for(lambda: any(text in line for line in self.lines), 5), self.lines
            return next(line for line in self.lines if text in line)

    def ended(self, path: str = "/v1/responses") -> list[str]:
        """Return the lines of the requests for a path, once one of them has ended."""
        def found() -> list[str]:
            return [line for line in self.lines if f" {path} " in line and " end=" in line]

        with self.changed:
            assert self.changed.wait_for(found, 5), self.lines
            return found()


@pytest.fixture
def log_lines() -> Iterator[LogLines]:
    """The bridge's log, from debug on."""
    lines, level = LogLines(), q.log.level
    q.log.addHandler(lines)
    q.log.setLevel(logging.DEBUG)
    yield lines
    q.log.removeHandler(lines)
    q.log.setLevel(level)


class SharedBridges:
    """The bridges that rows share, one for each set of options, in front of one backend."""

    def __init__(self, backend: wire.Backend, auth_file: Path) -> None:
        self.backend = backend
        self._auth_file = auth_file
        self._bridges: dict[tuple[str, ...], RunningBridge] = {}
        self._seen = 0

    def bridge(self, *options: str) -> RunningBridge:
        """Return the bridge with these options."""
        if options not in self._bridges:
            self._bridges[options] = RunningBridge(self.backend, self._auth_file, *options)
        return self._bridges[options]

    def asked(self) -> list[wire.Request]:
        """Return what came upstream in this row."""
        return self.backend.requests[self._seen:]

    def begin(self) -> None:
        """Begin a row."""
        self._seen = len(self.backend.requests)
        for name, token in self.backend.tokens.items():
            wire.issue(name, token)  # each test begins with none

    def end(self) -> None:
        """End a row: nobody may have met a fault in it."""
        faults = [fault for each in self._bridges.values() for fault in each.faults]
        for each in self._bridges.values():
            each.faults.clear()
        assert faults == []
        self.backend.check()

    def close(self) -> None:
        """End all bridges."""
        for each in self._bridges.values():
            each.close()


@pytest.fixture(scope="module")
def module_bridges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedBridges]:
    """The shared bridges, for all rows of a file."""
    with pytest.MonkeyPatch.context() as patch, wire.Backend() as backend:
        patch.setenv("SSL_CERT_FILE", backend.ca_file)
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            patch.delenv(name, raising=False)
        auth_file = tmp_path_factory.mktemp("shared") / "auth.json"
        wire.write_auth(auth_file, backend)
        bridges = SharedBridges(backend, auth_file)
        yield bridges
        bridges.close()


@pytest.fixture
def bridges(module_bridges: SharedBridges) -> Iterator[SharedBridges]:
    """The shared bridges, for one row."""
    module_bridges.begin()
    yield module_bridges
    module_bridges.end()


@pytest.fixture
def shared_bridge(bridges: SharedBridges) -> RunningBridge:
    """The shared bridge with the default options."""
    return bridges.bridge()


@pytest.fixture
def shared_backend(bridges: SharedBridges) -> wire.Backend:
    """The stand-in of the shared bridges."""
    return bridges.backend


DAY = 86400.0  # seconds: longer than any test


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no list grow old, and nobody wait for it in vain."""
    monkeypatch.setattr(q, "CATALOG_AGE", DAY)
    monkeypatch.setattr(q, "CATALOG_WAIT", DAY)


Popen = subprocess.Popen[str]
Launch = Callable[..., Popen]
Command = Callable[..., tuple[int, str, str]]


@contextlib.contextmanager
def running(folder: Path, program: tuple[str, ...], *words: object) -> Iterator[Popen]:
    """Run `python -I -S PROGRAM WORDS` in a folder, its output in pipes; kill it in the end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QOO_")}
    with subprocess.Popen(
        [sys.executable, "-I", "-S", *program, *map(str, words)],
        env={**environment, "HOME": str(folder), "CODEX_HOME": str(folder), "LC_ALL": "C.UTF-8", "TZ": "UTC"},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def launch(tmp_path: Path, bytecode: Path) -> Iterator[Launch]:
    """Start `qoo_bridge.py WORDS`; all end with the test."""
    with contextlib.ExitStack() as started:
        program = ("-c", HURRIED, str(bytecode))
        yield lambda *words: started.enter_context(running(tmp_path, program, *words))


class Closed(q.Upstream):
    """Close, with the test, the connections that a command leaves to the end of its process."""

    all: ClassVar[list[Closed]] = []

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.all.append(self)


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Run `main(WORDS)` in this process; return its status and what it printed."""
    for name in [name for name in os.environ if name.startswith("QOO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CODEX_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, value in (("handlers", []), ("propagate", True)):  # a command may set its own
        monkeypatch.setattr(q.log, name, value)
    monkeypatch.setattr(q, "Upstream", Closed)

    def run(*words: object) -> tuple[int, str, str]:
        status = q.main(list(map(str, words)))
        out, err = capsys.readouterr()
        wire.search((out + err).encode("utf-8", "backslashreplace"), "what a command printed")
        return status, out, err

    yield run
    while Closed.all:
        Closed.all.pop().close()
