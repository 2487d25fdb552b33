"""Fixtures: the stand-in backend, and a bridge in front of it, in this process or in one of its own."""
from __future__ import annotations

import contextlib
import gc
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import wire

import qoo_bridge

PARSER = qoo_bridge.build_parser()
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


class RunningBridge:
    """A bridge that serves in this process; its faults are collected."""

    def __init__(self, backend: wire.Backend, auth_file: Path, *options: str) -> None:
        self.auth_file = auth_file
        self.faults: list[BaseException] = []
        words = PARSER.parse_intermixed_args([
            "--host", "127.0.0.1", "--port", "0", "--upstream", backend.upstream, "--issuer", backend.issuer,
            "--auth-file", str(auth_file), "--log-file", "-", *options])
        self.config = qoo_bridge.load_config(vars(words), {})
        self.server = qoo_bridge.Server(self.config)
        self.server.bridge.on_fault = self.faults.append
        self.address = ("127.0.0.1", self.server.server_port)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(POLL,), daemon=True)
        self._thread.start()

    @property
    def bridge(self) -> qoo_bridge.Bridge:
        """Return the parts."""
        return self.server.bridge

    def close(self) -> None:
        """End it; no connection may be left."""
        self.server.drain(5)
        self._thread.join(5)


class Process:
    """A bridge as a person runs it: a process of its own, and what it says."""

    def __init__(self, backend: wire.Backend, folder: Path, *options: str) -> None:
        self.lines: list[str] = []
        begun = time.monotonic()
        self.process = subprocess.Popen([
            sys.executable, "-W", "error", qoo_bridge.__file__, "--host", "127.0.0.1", "--port", "0",
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
def run(backend: wire.Backend, tmp_path: Path) -> Iterator[Run]:
    """Run signed-in bridges in processes of their own."""
    with contextlib.ExitStack() as running:

        def run_one(*options: str) -> Process:
            if not (tmp_path / "auth.json").exists():
                wire.write_auth(tmp_path / "auth.json", backend)
            process = Process(backend, tmp_path, *options)
            running.callback(process.close)
            return process

        yield run_one


@pytest.fixture
def bridge(start: Start) -> RunningBridge:
    """A bridge with the default options."""
    return start()
