"""Room commands: each command but `doctor` and `demo`, as its user runs it.

What only varies the input goes through `main` in this process, because a start costs a fifth of a second.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import Command, Launch, Popen, Run, Start
from help import KEY, SECONDS, free_port, outcome, until

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


# -- login


@pytest.fixture
def device(backend: wire.Backend, tmp_path: Path, launch: Launch) -> Callable[[], Popen]:
    """Start `login` against the stand-in, which wants no pause between two polls."""
    backend.device_interval = "0"
    auth_file = tmp_path / "codex" / "auth.json"
    return lambda: launch("login", "--issuer", backend.issuer, "--auth-file", auth_file)


@pytest.fixture
def login(
    backend: wire.Backend, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> Login:
    """Run `login` in this process with a code that was typed already, and without its pauses."""
    backend.approve_device()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    auth_file = tmp_path / "codex" / "auth.json"
    return lambda: command("login", "--issuer", backend.issuer, "--auth-file", auth_file)


def shown_code(process: Popen) -> str:
    """Return the code that `login` shows, once it does."""
    assert process.stdout
    for line in process.stdout:
        found = re.fullmatch(r" +(WIRE-\d+)\n", line)
        if found:
            return found[1]
    raise AssertionError(process.stderr and process.stderr.read())


def test_login_writes_a_new_sign_in(
    backend: wire.Backend, device: Callable[[], Popen], tmp_path: Path
) -> None:
    process = device()
    shown_code(process)
    backend.wait_for(2, "/api/accounts/deviceauth/token")  # it goes on asking while nobody types
    backend.approve_device()
    status, out, err = outcome(process)
    assert (status, err) == (0, "")
    assert "someone@example.com" in out
    assert "plan pro" in out
    auth_file = tmp_path / "codex" / "auth.json"
    content = json.loads(auth_file.read_text(encoding="utf-8"))
    assert content["auth_mode"] == "chatgpt"
    assert content["OPENAI_API_KEY"] is None
    assert content["tokens"] == {**backend.tokens, "account_id": backend.account_id}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", content["last_refresh"])
    assert not any(token in out for token in backend.tokens.values())
    if os.name == "posix":
        assert auth_file.stat().st_mode & 0o777 == 0o600
        assert auth_file.parent.stat().st_mode & 0o777 == 0o700


def test_login_keeps_what_else_the_file_has(
    backend: wire.Backend, login: Login, tmp_path: Path
) -> None:
    auth_file = tmp_path / "codex" / "auth.json"
    auth_file.parent.mkdir()
    old = wire.auth_json(backend, auth_mode="apikey", OPENAI_API_KEY="sk-kept", of_tomorrow=[1])
    auth_file.write_text(json.dumps(old), encoding="utf-8")
    assert login()[0] == 0
    content = json.loads(auth_file.read_text(encoding="utf-8"))
    assert content["auth_mode"] == "chatgpt"
    assert (content["OPENAI_API_KEY"], content["of_tomorrow"]) == ("sk-kept", [1])
    assert content["agent_identity"] == {"kept": True}
    # What stood beside the old tokens belonged to the old account.
    assert content["tokens"] == {**backend.tokens, "account_id": backend.account_id}


def test_login_waits_for_codex_to_let_go_of_the_file(
    backend: wire.Backend, device: Callable[[], Popen], tmp_path: Path
) -> None:
    fcntl = pytest.importorskip("fcntl")
    auth_file = tmp_path / "codex" / "auth.json"
    auth_file.parent.mkdir()
    process = device()
    shown_code(process)
    with open(auth_file.parent / "auth.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        backend.approve_device()
        backend.wait_for(1, "/oauth/token")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        assert not auth_file.exists()
        auth_file.write_text('{"written_meanwhile": 1}', encoding="utf-8")
    assert outcome(process)[0] == 0
    assert json.loads(auth_file.read_text(encoding="utf-8"))["written_meanwhile"] == 1


def test_login_says_that_device_sign_in_is_off(backend: wire.Backend, login: Login) -> None:
    backend.device_enabled = False
    status, out, err = login()
    assert (status, out) == (1, "")
    assert "device sign-in is not enabled" in err


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGINT to send")
def test_login_ends_at_ctrl_c(device: Callable[[], Popen], tmp_path: Path) -> None:
    process = device()
    shown_code(process)
    process.send_signal(signal.SIGINT)
    status, out, err = outcome(process)
    assert (status, err) == (130, "")
    assert "auth.json is unchanged" in out
    assert not (tmp_path / "codex").exists()


USERCODE = "/api/accounts/deviceauth/usercode"
POLL = "/api/accounts/deviceauth/token"
TOKEN = "/oauth/token"


@pytest.mark.parametrize("path", [USERCODE, POLL, TOKEN])
@pytest.mark.parametrize(
    "answer",
    [
        [], "text", 1, None, {},
        {"device_auth_id": 1, "user_code": "\x1b[2J"},
        {"authorization_code": {}, "code_verifier": ""},
        {"id_token": "a.b.c", "access_token": 5, "refresh_token": []},
    ],
)
def test_login_takes_no_nonsense(
    backend: wire.Backend, login: Login, tmp_path: Path, path: str, answer: Any
) -> None:
    backend.on(path, wire.reply_json(200, answer))
    status, out, err = login()
    assert status == 1
    assert err.startswith("not signed in: ")
    assert "\x1b" not in out + err
    assert not (tmp_path / "codex" / "auth.json").exists()


def test_login_outlasts_a_server_that_stumbles(backend: wire.Backend, login: Login) -> None:
    backend.on(POLL, wire.refuse(503, "busy"), wire.cut(), wire.refuse(429, "slower"))
    assert login()[0] == 0
    assert len(backend.wait_for(4, POLL)) == 4


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
