"""Room login: the device sign-in, typed in any browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import Command, Launch, Popen
from help import HOSTILE, outcome

import qoo_bridge as q

Login = Callable[[], tuple[int, str, str]]


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
            process.wait(0.15)
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


@pytest.mark.parametrize("path", [USERCODE, POLL, TOKEN])
def test_login_shows_no_text_of_the_server_that_acts_on_a_terminal(
    backend: wire.Backend, login: Login, path: str
) -> None:
    backend.on(path, wire.refuse(400, HOSTILE))
    status, out, err = login()
    assert status == 1
    assert all(line.isprintable() for line in (out + err).split("\n"))
    assert [line for line in err.splitlines() if "forged" in line] == err.splitlines()  # one line


@pytest.mark.parametrize("code", ["\x1b[2J", HOSTILE, "WIRE\u202e1", ""])
def test_login_shows_no_code_that_acts_on_a_terminal(backend: wire.Backend, login: Login, code: str) -> None:
    backend.on(USERCODE, wire.reply_json(200, {"device_auth_id": "deviceauth_1", "user_code": code}))
    status, out, err = login()
    assert (status, out) == (1, "")
    assert all(line.isprintable() for line in err.split("\n"))


def test_login_outlasts_a_server_that_stumbles(backend: wire.Backend, login: Login) -> None:
    backend.on(POLL, wire.refuse(503, "busy"), wire.cut(), wire.refuse(429, "slower"))
    assert login()[0] == 0
    assert len(backend.wait_for(4, POLL)) == 4


# -- login in a narrow terminal ------------------------------------------------------------


class Narrow(io.TextIOWrapper):
    """A standard output with a code page that has few letters."""

    def __init__(self, encoding: str) -> None:
        self.raw_bytes = io.BytesIO()
        super().__init__(self.raw_bytes, encoding=encoding, write_through=True)


NAMES = {"email": "josé.日本@example.com", "plan": "prö-日本", "folder": "jo\u0161é-日本"}


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp1252", "utf-8"])
@pytest.mark.parametrize("what", NAMES)
def test_login_is_told_in_any_code_page(
    what: str, encoding: str, backend: wire.Backend, tmp_path: Path, command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = NAMES[what]
    folder = tmp_path / (name if what == "folder" else "codex")
    claims = {"email": name if what == "email" else "ann@example.com", wire.AUTH_CLAIM: {
        "chatgpt_account_id": backend.account_id, "chatgpt_plan_type": name if what == "plan" else "pro"}}
    tokens = {**backend.rotate(), "id_token": wire.jwt(claims)}
    backend.on("/oauth/token", wire.reply_json(200, tokens))
    backend.approve_device()
    out = Narrow(encoding)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(sys, "stdout", out)
    status = q.main(["login", "--issuer", backend.issuer, "--auth-file", str(folder / "auth.json")])
    assert status == 0
    content = json.loads((folder / "auth.json").read_bytes())
    assert content["tokens"]["refresh_token"] == tokens["refresh_token"]
    assert b"Signed in as" in out.raw_bytes.getvalue()


@pytest.mark.parametrize("path", [USERCODE, POLL, TOKEN])
@pytest.mark.parametrize("answer", [wire.refuse(400, "no such client"), wire.reply_json(200, {"odd": 1}),
                                    wire.reply_json(200, [])], ids=["refused", "another object", "a list"])
def test_login_says_which_step_failed_on_which_server(
    backend: wire.Backend, login: Login, path: str, answer: wire.Reply
) -> None:
    backend.on(path, answer)
    status, _, err = login()
    assert status == 1
    assert backend.issuer in err
    assert path in err


def test_login_says_which_step_met_no_server(command: Command, tmp_path: Path) -> None:
    words = ("--issuer", "http://127.0.0.1:9", "--auth-file", tmp_path / "auth.json")
    status, _, err = command("login", *words)
    assert status == 1
    assert "http://127.0.0.1:9" in err and USERCODE in err


def jwt(claims: Any) -> str:
    raw = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"e30.{raw}.c2ln"


NO_JWTS = ["plain", "a.b", "a.b.c", "....", jwt([]), jwt("text"), "e30.e30", "e30.!!!.e30"]


@pytest.mark.parametrize("token", NO_JWTS)
@pytest.mark.parametrize("name", ["id_token", "access_token"])
def test_login_takes_no_token_that_is_no_jwt(
    backend: wire.Backend, login: Login, tmp_path: Path, name: str, token: str
) -> None:
    backend.on(TOKEN, wire.reply_json(200, {**backend.rotate(), name: token}))
    status, out, err = login()
    assert status == 1
    assert "Signed in" not in out
    assert name in err and token not in err
    assert not (tmp_path / "codex" / "auth.json").exists()
