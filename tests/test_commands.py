"""Room commands: each command but `doctor` and `demo`, as its user runs it.

What only varies the input goes through `main` in this process, because a start costs a fifth of a second.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import HURRIED, Command, Launch, Run, RunningBridge, Start
from help import KEY, LOCAL_MD, SECONDS, dead_port, free_port, outcome, posix, until

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
    assert names == ["gpt-6.1-sol", "gpt-6-sol", "gpt-5.6-sol", "gpt-5.5", "local_md", "claude-*"]
    models = [f"openai/{name}" for name in (*names[:-1], "local_md")]
    assert [value for key, value in pairs if key == "model"] == models
    assert {value for key, value in pairs if key == "api_base"} == {f"http://127.0.0.1:{port}/v1"}
    assert pairs[-5:] == [
        ("router_settings", None), ("disable_cooldowns", True),  # one client's 404 must not rest the model
        ("num_retries", 0), ("general_settings", None), ("dangerously_permit_weak_or_unset_master_key", True),
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
    status, out, err = command("litellm-config", "--port", dead_port())
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
def in_a_terminal(
    how: str, program: Path, *words: str
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], None]]]:
    """Run a bridge in a terminal of its own; give it, and what closes the terminal."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    command = [sys.executable, "-c", IN_A_TERMINAL, how, "-c", HURRIED, str(program), *words]
    closed = False

    def close() -> None:
        nonlocal closed
        if not closed:
            os.close(master)
        closed = True

    ends = {"stdin": slave, "stdout": slave, "stderr": subprocess.DEVNULL if how == "2>file" else slave}
    with subprocess.Popen(command, start_new_session=True, **ends) as process:
        os.close(slave)
        try:
            yield process, close
        finally:
            process.kill()
            close()


@posix
@pytest.mark.parametrize("how", ["plain", "2>file", "nohup"])
def test_terminal_that_is_closed_leaves_no_orphan_on_the_port(
    how: str, backend: wire.Backend, tmp_path: Path, bytecode: Path
) -> None:
    wire.write_auth(tmp_path / "auth.json", backend)
    port = free_port()
    words = ("--host", "127.0.0.1", "--port", str(port), "--upstream", backend.upstream,
             "--issuer", backend.issuer, "--auth-file", str(tmp_path / "auth.json"), "--log-file", "-")
    with in_a_terminal(how, bytecode, *words) as (process, close):
        assert until(lambda: serves(port))
        close()
        ended = until(lambda: process.poll() is not None, 0.25 if how == "nohup" else 5)
        assert ended is (how != "nohup")
        assert serves(port) is (how == "nohup")


SOON = 5.0  # seconds for a line that comes with the first model list, on a busy machine


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


LINE = re.compile(r"[\w.@-]+=qoo-[\w-]{32}\n")


# -- new-key

@pytest.mark.parametrize("name", ["laptop", "a.b@c-d_e", "x" * 64])
def test_new_key_prints_the_line_of_the_key_file_and_nothing_else(command: Command, name: str) -> None:
    status, out, err = command("new-key", name)
    assert status == 0
    assert LINE.fullmatch(out) and out.startswith(f"{name}=")
    secret = out.strip().partition("=")[2]
    assert f"export QOO_BRIDGE_KEY={secret}" in err.splitlines()
    assert "--api-key-file" in err


def test_new_keys_compose_in_one_file(command: Command, tmp_path: Path) -> None:
    lines = [command("new-key", name)[1] for name in ("laptop", "phone")]
    (tmp_path / "keys").write_text("".join(lines), "utf-8")
    keys, _ = q.load_key_file(str(tmp_path / "keys"))
    assert [key.name for key in keys] == ["laptop", "phone"]


@pytest.mark.parametrize("name", ["a=b", "=", "a=", "a b", "", "#a", "x" * 65])
def test_new_key_refuses_what_is_no_name(command: Command, name: str) -> None:
    status, out, err = command("new-key", name)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1


# -- the start-up line

@pytest.mark.parametrize(("host", "open_to_all"), [
    ("0.0.0.0", True), ("::", True), ("192.168.1.5", True),
    ("127.0.0.1", False), ("127.0.0.2", False), ("::1", False), ("localhost", False),
])
def test_start_up_line_says_who_can_use_it(
    shared_bridge: RunningBridge, host: str, open_to_all: bool
) -> None:
    line = q.greeting(shared_bridge.server, shared_bridge.config._replace(host=host))
    assert ("open to the LAN" in line) is open_to_all
    assert ("only this host" in line) is not open_to_all


@pytest.mark.parametrize(("answer", "offered"), [
    (["192.168.1.5"], True), (["192.168.1.9"], False), (["192.168.1.9", "192.168.1.5"], True), (None, False),
])
def test_start_up_line_offers_the_name_of_this_host(
    shared_bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch, answer: Any, offered: bool
) -> None:
    def resolve(host: str, port: int) -> list[str]:
        if host != "kitchen.local" or answer is None:
            raise q.BadUpstream(f"cannot resolve {host}")
        return list(answer)

    monkeypatch.setattr(socket, "gethostname", lambda: "Kitchen.example.com")
    monkeypatch.setattr(q, "resolve_host", resolve)
    monkeypatch.setattr(q, "lan_address", lambda: "192.168.1.5")
    config = shared_bridge.config._replace(host="0.0.0.0")
    name = vars(q)["local_name"]()  # "" where nobody on the LAN would find this host by it
    assert name == ("kitchen.local" if offered else "")
    port = shared_bridge.server.server_port
    assert (f"http://kitchen.local:{port}/v1" in q.greeting(shared_bridge.server, config)) is offered


def test_start_up_line_of_one_address_names_no_other(
    shared_bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "local_name", lambda: "kitchen.local")
    assert "kitchen.local" not in q.greeting(shared_bridge.server, shared_bridge.config)  # --host 127.0.0.1


# -- commands in messages

@pytest.mark.parametrize("place", ["codex", "of its own"])
def test_remedy_works_from_where_the_person_stands(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "codex home"
    monkeypatch.setenv("CODEX_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    path = home / "auth.json" if place == "codex" else tmp_path / "a folder" / "auth.json"
    commands = [shlex.split(text) for text in re.findall(r"`([^`]+)`", q.sign_in_hint(str(path)))]
    ours = [words for words in commands if words[0] != "codex"]
    assert ours
    for words in ours:
        program = next(word for word in words if word.endswith(("qoo_bridge.py", "run.sh")))
        assert Path(program).is_file()  # also from another folder
        assert "login" in words
        assert place == "codex" or words[-1] == str(path)


@pytest.mark.parametrize("tried", ["doctor", "serve"])
def test_no_message_names_a_file_that_is_not_here(command: Command, tried: str, tmp_path: Path) -> None:
    """`python3 qoo_bridge.py` works in the bridge's own folder only."""
    hint = q.sign_in_hint(str(tmp_path / tried / "auth.json"))
    assert "python3 qoo_bridge.py" not in hint


# -- litellm-config

def test_litellm_config_is_right_for_claude_code(start: Start, command: Command) -> None:
    bridge = start("--alias", "other=gpt-5.5")
    status, out, err = command("litellm-config", "--port", bridge.address[1], "--host", "127.0.0.1")
    assert (status, err) == (0, "")
    blocks = dict(re.findall(r'  - model_name: "([^"]+)"\n((?:    .*\n)+)', out))
    assert list(blocks) == [
        "gpt-6.1-sol", "gpt-6-sol", "gpt-5.6-sol", "gpt-5.5", "local_md", "other", "claude-*"]
    assert 'model: "openai/local_md"' in blocks["claude-*"]
    for block in blocks.values():
        for fact in ("supports_reasoning: true", "supports_vision: true", "supports_function_calling: true",
                     "max_input_tokens: 272000", "max_output_tokens: 128000"):
            assert f"      {fact}\n" in block
    assert "router_settings:\n  disable_cooldowns: true\n  num_retries: 0\n" in f"{out}\n"


def test_litellm_config_has_no_hidden_model(start: Start, command: Command, backend: wire.Backend) -> None:
    hidden = {entry["slug"] for entry in backend.catalog if entry.get("visibility") != "list"}
    assert hidden
    out = command("litellm-config", "--port", start().address[1], "--host", "127.0.0.1")[1]
    assert hidden.isdisjoint(re.findall(r'model_name: "([^"]+)"', out))
