"""Room commands: each command but `doctor` and `demo`, as its user runs it.

What only varies the input goes through `main` in this process, because a start costs a fifth of a second.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import Command, Launch, Run, Start
from help import KEY, LOCAL_MD, SECONDS, free_port, outcome, posix, until

import qoo_bridge as q

Login = Callable[[], tuple[int, str, str]]


# -- serve --------------------------------------------------------------------


def test_start_tells_what_will_turn_clients_away(run: Run, tmp_path: Path) -> None:
    running = run("--api-key-file", str(tmp_path / "none"), "--limit", "laptop=1")
    warning = "--limit: no key has the name laptop"
    assert until(lambda: warning in "".join(running.lines))
    assert f"cannot read the key file {tmp_path / 'none'}" in "".join(running.lines)


def test_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run(
            [sys.executable, q.__file__, "--host", "127.0.0.1", "--port", str(port), "--log-file", "-",
             "--auth-file", str(tmp_path / "auth.json")],
            capture_output=True, text=True, timeout=SECONDS, check=False)
    reason = f"{os.strerror(errno.EADDRINUSE)}; is a bridge running already?"
    text = f"cannot listen on 127.0.0.1 port {port}: {reason}\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", text)


# -- new-key


def test_new_key_wants_one_name(command: Command) -> None:
    status, out, _ = command("new-key", "laptop")
    assert status == 0
    assert re.search(r"^laptop=qoo-[\w-]{32}$", out, re.MULTILINE)
    for words in ([], ["laptop", "desktop"]):
        assert command("new-key", *words)[:2] == (2, "")


# -- litellm-config


def of_yaml(text: str) -> list[tuple[str, Any]]:
    """Read the lines of a litellm.yaml, whose values are JSON: (key, value), None where a block begins."""
    pairs = (line.strip(" -").partition(":") for line in text.splitlines())
    return [(key, json.loads(value) if value.strip() else None) for key, _, value in pairs]


def test_litellm_config_has_the_live_models(start: Start, launch: Launch) -> None:
    port = start().address[1]
    status, out, err = outcome(launch("litellm-config", "--port", port))
    assert (status, err) == (0, "")
    pairs = of_yaml(out)
    names = [value for key, value in pairs if key == "model_name"]
    assert names == ["gpt-6.1-sol", "gpt-6-sol", "gpt-5.6-sol", "gpt-5.5", "local_md"]
    assert [value for key, value in pairs if key == "model"] == [f"openai/{name}" for name in names]
    assert {value for key, value in pairs if key == "api_base"} == {f"http://127.0.0.1:{port}/v1"}
    assert pairs[-4:] == [
        ("general_settings", None), ("dangerously_permit_weak_or_unset_master_key", True),
        ("router_settings", None), ("disable_cooldowns", True),  # one client's 404 must not rest the model
    ]  # fmt: skip


def test_litellm_config_of_a_locked_bridge(start: Start, command: Command, tmp_path: Path) -> None:
    key_file = tmp_path / "keys"
    key_file.write_text(f"laptop={KEY}\nlitellm={KEY}2\n", encoding="utf-8")
    key_file.chmod(0o600)
    bridge = start("--api-key-file", str(key_file))
    words = ("litellm-config", "--port", bridge.address[1], "--api-key-file", key_file)
    first, second = command(*words), command(*words)
    assert first == second
    status, out, err = first
    assert (status, err) == (0, "")
    pairs = of_yaml(out)
    assert {value for key, value in pairs if key == "api_key"} == {f"{KEY}2"}
    assert re.fullmatch(r"sk-[0-9a-f]{64}", dict(pairs)["master_key"])
    assert "dangerously" not in out


def test_litellm_config_waits_for_no_bridge(command: Command) -> None:
    status, out, err = command("litellm-config", "--port", free_port())
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1


def test_litellm_config_says_what_a_bridge_answered(start: Start, command: Command) -> None:
    bridge = start(signed_in=False)
    status, out, err = command("litellm-config", "--port", bridge.address[1])
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "not signed in" in err


# -- a terminal that goes -------------------------------------------------------------------

IN_A_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def serves(port: int) -> bool:
    """Tell whether a bridge answers."""
    try:
        return wire.get(("127.0.0.1", port), "/healthz", timeout=1).status == 200
    except (OSError, wire.PeerLeft):
        return False


@contextlib.contextmanager
def in_a_terminal(how: str, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], None]]]:
    """Run a bridge in a terminal of its own; give it, and what closes the terminal."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    command = [sys.executable, "-c", IN_A_TERMINAL, how, q.__file__, *words]
    closed = False

    def close() -> None:
        nonlocal closed
        if not closed:
            os.close(master)
        closed = True

    ends = {"stdin": slave, "stdout": slave, "stderr": slave}
    with subprocess.Popen(command, start_new_session=True, **ends) as process:
        os.close(slave)
        try:
            yield process, close
        finally:
            process.kill()
            close()


@posix
@pytest.mark.parametrize("how", ["plain", "nohup"])
def test_terminal_that_is_closed_leaves_no_orphan_on_the_port(
    how: str, backend: wire.Backend, tmp_path: Path
) -> None:
    wire.write_auth(tmp_path / "auth.json", backend)
    port = free_port()
    words = ("--host", "127.0.0.1", "--port", str(port), "--upstream", backend.upstream,
             "--issuer", backend.issuer, "--auth-file", str(tmp_path / "auth.json"), "--log-file", "-")
    with in_a_terminal(how, *words) as (process, close):
        assert until(lambda: serves(port))
        close()
        ended = until(lambda: process.poll() is not None, 5 if how == "plain" else 0.5)
        assert ended is (how == "plain")
        assert serves(port) is (how == "nohup")


SOON = 0.7  # seconds for a line that comes with the first model list


def said(lines: list[str]) -> list[str]:
    """Return the lines at a start that tell of the alias."""
    return [line for line in list(lines) if "local_md" in line and " /v1/" not in line]


def test_start_says_what_local_md_means_and_that_a_newer_family_exists(run: Run) -> None:
    process = run()
    assert until(lambda: bool(said(process.lines) or said([process.greeting])), SOON)
    text = " ".join([process.greeting, *said(process.lines)])
    assert LOCAL_MD in text
    assert "--alias local_md=gpt-6" in text


def test_start_says_nothing_of_a_newer_family_where_it_is_chosen(run: Run) -> None:
    process = run("--alias", "local_md=gpt-6")
    assert until(lambda: bool(said(process.lines) or said([process.greeting])), SOON)
    text = " ".join([process.greeting, *said(process.lines)])
    assert "gpt-6.1-sol" in text
    assert "--alias local_md=" not in text


def model_row(backend: wire.Backend, folder: Path, command: Command, *words: str) -> str:
    """Return what doctor says of the models."""
    wire.write_auth(folder / "auth.json", backend)
    _, out, _ = command("doctor", "--json", "--upstream", backend.upstream, "--issuer", backend.issuer,
                        "--auth-file", folder / "auth.json", "--host", "127.0.0.1", "--port", free_port(),
                        *words)
    rows: dict[str, Any] = {row["name"]: row for row in json.loads(out)["checks"]}
    return str(rows["models"]["text"])


def test_doctor_says_that_a_newer_family_exists(
    backend: wire.Backend, tmp_path: Path, command: Command
) -> None:
    text = model_row(backend, tmp_path, command)
    assert f"local_md is {LOCAL_MD}" in text
    assert "--alias local_md=gpt-6" in text


@pytest.mark.parametrize("words", [("--alias", "local_md=gpt-6"), ("--alias", "local_md=gpt-6.1-sol")])
def test_doctor_says_nothing_of_a_newer_family_where_it_is_chosen(
    backend: wire.Backend, tmp_path: Path, command: Command, words: tuple[str, ...]
) -> None:
    text = model_row(backend, tmp_path, command, *words)
    assert "local_md is gpt-6.1-sol" in text
    assert "--alias" not in text


def test_doctor_says_nothing_of_a_newer_family_where_there_is_none(
    backend: wire.Backend, tmp_path: Path, command: Command
) -> None:
    backend.catalog = [entry for entry in backend.catalog if entry["slug"].startswith("gpt-5")]
    text = model_row(backend, tmp_path, command)
    assert (f"local_md is {LOCAL_MD}" in text, "--alias" in text) == (True, False)
