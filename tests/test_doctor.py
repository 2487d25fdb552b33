"""Room doctor: what it finds on a host, and what it says to do about it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import Command, Launch, Start
from help import HOSTILE, KEY, SECONDS, dead_port, free_port, outcome, posix, until

import qoo_bridge as q

Doctor = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def doctor(
    backend: wire.Backend, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> Doctor:
    """Run `doctor --json` before the stand-in, in this process; return its status and its rows by name."""
    wire.write_auth(tmp_path / "auth.json", backend)
    monkeypatch.setattr(q, "TORN_SECONDS", 0.03)  # nobody else writes the file
    return lambda *words: examined(backend, command(*doctor_words(backend, tmp_path), *words))


@pytest.fixture
def doctor_alone(backend: wire.Backend, tmp_path: Path, launch: Launch) -> Doctor:
    """Run the same in a process of its own."""
    wire.write_auth(tmp_path / "auth.json", backend)
    return lambda *words: examined(backend, outcome(launch(*doctor_words(backend, tmp_path), *words)))


def doctor_words(backend: wire.Backend, folder: Path) -> tuple[object, ...]:
    return ("doctor", "--json", "--upstream", backend.upstream, "--issuer", backend.issuer,
            "--auth-file", folder / "auth.json", "--host", "127.0.0.1", "--port", free_port())


def examined(backend: wire.Backend, run: tuple[int, str, str]) -> tuple[int, dict[str, Any]]:
    """Return the status and the rows of a `doctor --json`, and check that they go together."""
    status, out, err = run
    assert err == ""
    assert not any(token in out for token in backend.tokens.values())
    report = json.loads(out)
    rows = {row["name"]: row for row in report["checks"]}
    assert report["ok"] is (status == 0) is all(row["state"] != "failed" for row in rows.values())
    assert all(row["todo"] for row in rows.values() if row["state"] == "failed")
    return status, rows


def states(rows: dict[str, Any], state: str) -> set[str]:
    return {name for name, row in rows.items() if row["state"] == state}


def test_doctor_finds_a_host_well(doctor_alone: Doctor) -> None:
    status, rows = doctor_alone()
    assert status == 0
    assert states(rows, "failed") == states(rows, "skipped") == set()
    assert "qoo-bridge test CA" in rows["TLS"]["text"]
    assert "the token expires in 9 d 23 h" in rows["token"]["text"]
    assert "local_md is gpt-5.6-sol" in rows["models"]["text"]
    short, long = rows["usage"]["text"].split("\n")
    assert short == "5 h  ██░░░░░░░░░░░░░░░░░░  12 % used, resets Sun 22 Nov 11:14"
    assert long == "7 d  █░░░░░░░░░░░░░░░░░░░   3 % used, resets Sun 29 Nov 06:14"
    assert "live" not in rows


def test_doctor_sends_a_live_request(backend: wire.Backend, doctor_alone: Doctor) -> None:
    status, rows = doctor_alone("--live")
    assert (status, rows["live"]["state"]) == (0, "ok")
    seconds = r"\d\.\d\d s"
    times = f"first event {seconds}, first word {seconds}, end {seconds}"
    assert re.fullmatch(rf"gpt-5\.6-sol: {times}; \d+ tokens in, \d+ out", rows["live"]["text"])
    (request,) = backend.wait_for(1, "/responses")
    assert len(request.body) < 1000
    # The look without a sign-in is all that was refused.
    assert backend.refusals == ["401 {'detail': 'Could not validate credentials'}"]


def test_doctor_says_why_a_live_request_failed(backend: wire.Backend, doctor_alone: Doctor) -> None:
    backend.on("/responses", wire.usage_limit())
    status, rows = doctor_alone("--live")
    assert (status, states(rows, "failed")) == (1, {"live"})
    assert "limit" in rows["live"]["text"]


def without_file(backend: wire.Backend, auth_file: Path) -> None:
    auth_file.unlink()


def in_the_keyring(backend: wire.Backend, auth_file: Path) -> None:
    auth_file.unlink()
    text = 'model = "x"\ncli_auth_credentials_store = "keyring"\n'
    auth_file.with_name("config.toml").write_text(text, encoding="utf-8")


def torn(backend: wire.Backend, auth_file: Path) -> None:
    auth_file.write_text('{"tokens": {', encoding="utf-8")
    auth_file.chmod(0o600)


def by_api_key(backend: wire.Backend, auth_file: Path) -> None:
    wire.write_auth(auth_file, backend, auth_mode="apikey")


@pytest.mark.parametrize(
    ("damage", "text", "todo"),
    [
        (without_file, "does not exist", "codex login"),
        (in_the_keyring, "system keyring", 'cli_auth_credentials_store = "file"'),
        (torn, "truncated JSON", "codex login"),
        (by_api_key, "'apikey'", "codex login"),
    ],
)
def test_doctor_on_a_sign_in_file(
    backend: wire.Backend, doctor: Doctor, tmp_path: Path,
    damage: Callable[[wire.Backend, Path], None], text: str, todo: str,
) -> None:
    damage(backend, tmp_path / "auth.json")
    status, rows = doctor()
    assert (status, states(rows, "failed")) == (1, {"sign-in file"})
    assert text in rows["sign-in file"]["text"]
    assert todo in rows["sign-in file"]["todo"]
    assert states(rows, "skipped") == {"file mode", "token", "account", "models", "usage"}


@pytest.mark.parametrize(
    ("expires", "text"),
    [
        (1, r"expired \d+ d( \d+ h)? ago, the bridge will refresh it"),
        *((odd, "expires in|expired|unknown") for odd in (1e400, -1e400, 1e300, 9e11, "1", True, None)),
    ],
)
def test_doctor_says_when_the_token_expires(
    backend: wire.Backend, doctor: Doctor, tmp_path: Path, expires: Any, text: str
) -> None:
    wire.write_auth(tmp_path / "auth.json", backend, tokens={"access_token": wire.jwt({"exp": expires})})
    status, rows = doctor()
    assert rows["token"]["state"] in ("ok", "none")
    assert re.search(text, rows["token"]["text"])
    assert status == 0  # what the stand-in refuses was refreshed on the way


@pytest.mark.skipif(os.name != "posix", reason="there are no modes")
def test_doctor_on_a_file_that_others_can_read(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "auth.json").chmod(0o644)
    status, rows = doctor()
    assert (status, states(rows, "failed"), states(rows, "skipped")) == (1, {"file mode"}, set())
    assert rows["file mode"]["todo"] == f"chmod 600 {tmp_path / 'auth.json'}"


def test_doctor_on_a_certificate_that_is_not_trusted(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    status, rows = doctor()
    assert (status, states(rows, "failed")) == (1, {"TLS"})
    assert "untrusted certificate" in rows["TLS"]["text"]
    assert "SSL_CERT_FILE" in rows["TLS"]["todo"]
    assert states(rows, "skipped") == {"Cloudflare", "account", "models", "usage"}


def test_doctor_on_cloudflares_page(backend: wire.Backend, doctor: Doctor) -> None:
    backend.on("/models", wire.cloudflare())
    status, rows = doctor()
    assert (status, states(rows, "failed")) == (1, {"Cloudflare"})
    assert "web page" in rows["Cloudflare"]["text"]


def test_doctor_on_a_host_that_is_not_there(backend: wire.Backend, doctor: Doctor) -> None:
    status, rows = doctor("--upstream", f"https://127.0.0.1:{dead_port()}/backend-api/codex")
    assert (status, states(rows, "failed")) == (1, {"TLS"})
    assert "cannot connect to 127.0.0.1: connection refused" in rows["TLS"]["text"]


@pytest.mark.parametrize("path", ["/models", "/backend-api/wham/usage", "/backend-api/wham/accounts/check"])
def test_doctor_shows_no_text_of_upstream_that_acts_on_a_terminal(
    backend: wire.Backend, command: Command, tmp_path: Path, path: str
) -> None:
    wire.write_auth(tmp_path / "auth.json", backend)
    backend.always(path, wire.refuse(400, HOSTILE))
    words = [word for word in doctor_words(backend, tmp_path) if word != "--json"]
    status, out, err = command(*words)
    assert (status, err) == (1, "")
    assert all(line.isprintable() for line in out.split("\n"))
    assert not any(line.startswith("✓ forged") for line in out.split("\n"))
    assert "forged" in out  # what upstream said is shown all the same


@pytest.mark.parametrize("host", ["a..b", "no-such-host.invalid"])
def test_doctor_on_a_name_that_leads_nowhere(doctor: Doctor, host: str) -> None:
    status, rows = doctor("--upstream", f"https://{host}/backend-api/codex")
    assert (status, states(rows, "failed")) == (1, {"name"})
    assert f"cannot resolve {host}" in rows["name"]["text"]


def test_doctor_on_a_plan_that_is_used_up(backend: wire.Backend, doctor: Doctor) -> None:
    window = {"used_percent": 100, "limit_window_seconds": 18000, "reset_at": 1795346042}
    report = {"rate_limit": {"limit_reached": True, "primary_window": window}}
    backend.on("/backend-api/wham/usage", wire.reply_json(200, report))
    status, rows = doctor()
    assert (status, states(rows, "failed")) == (1, {"usage"})
    assert "████████████████████ 100 %" in rows["usage"]["text"]


@pytest.mark.parametrize("hostile", [[], 1, "x", None, {"primary_window": 5}, {"primary_window": {
    "used_percent": "9", "limit_window_seconds": 1e400, "reset_at": -1e300}}])
def test_doctor_takes_any_usage(backend: wire.Backend, doctor: Doctor, hostile: Any) -> None:
    text = json.dumps({"rate_limit": hostile}).encode()
    raw = wire.head_bytes("HTTP/1.1 200 OK", [("content-length", str(len(text)))]) + text
    backend.on("/backend-api/wham/usage", wire.reply_raw(raw))
    assert doctor()[0] == 0


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", b"SSH-2.0-OpenSSH_9.2\r\n", b""])
def test_doctor_on_a_port_that_another_program_has(doctor: Doctor, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def serve_one() -> None:
            client, _ = other.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)

        thread = threading.Thread(target=serve_one)
        thread.start()
        status, rows = doctor("--port", other.getsockname()[1])
        thread.join(SECONDS)
    assert (status, states(rows, "failed")) == (1, {"port"})


def test_doctor_knows_a_bridge_that_runs(start: Start, doctor: Doctor) -> None:
    bridge = start("--api-key", f"laptop={KEY}")
    status, rows = doctor("--port", bridge.address[1])
    assert (status, rows["port"]["state"]) == (0, "ok")
    assert "a bridge runs" in rows["port"]["text"]


def test_doctor_on_the_access(doctor: Doctor, tmp_path: Path, backend: wire.Backend) -> None:
    assert doctor()[1]["access"]["text"] == "open: no key is set"
    assert doctor("--api-key", f"laptop={KEY}")[1]["access"]["text"] == "1 keys"
    key_file = tmp_path / "keys"
    words = ("--api-key-file", key_file)
    status, rows = doctor(*words)
    assert (status, states(rows, "failed")) == (1, {"access"})
    assert "no such file" in rows["access"]["text"]
    key_file.write_text(f"laptop={KEY}\n", encoding="utf-8")
    key_file.chmod(0o644)
    assert doctor(*words)[1]["access"]["todo"] == f"chmod 600 {key_file}"
    key_file.chmod(0o600)
    assert doctor(*words)[1]["access"]["text"] == f"1 keys in {key_file}, mode 0600"
    status, rows = doctor(*words, "--tls-cert", backend.ca_file, "--tls-key", tmp_path / "none")
    assert (status, states(rows, "failed")) == (1, {"access"})
    assert rows["access"]["text"].startswith("--tls-cert, --tls-key: ")  # not the key file, which is valid


def test_doctor_names_the_file_that_is_wanted(backend: wire.Backend, doctor: Doctor, tmp_path: Path) -> None:
    rows = doctor("--auth-file", "own.json")[1]
    assert f"login --auth-file {tmp_path / 'own.json'}" in rows["sign-in file"]["todo"]  # codex has its own


def test_doctor_prints_a_table_of_80_columns(backend: wire.Backend, tmp_path: Path, launch: Launch) -> None:
    status, out, err = outcome(launch(
        "doctor", "--upstream", backend.upstream, "--host", "127.0.0.1", "--auth-file", "auth.json", "--port",
        free_port()))
    lines = out.splitlines()
    assert (status, err) == (1, "")
    assert all(len(line) <= 80 for line in lines)
    assert {line[:1] for line in lines} == {"✓", "✗", "–", " "}
    assert any(line.startswith(" " * 15 + "→ run `codex login`") for line in lines)


REDEEM = "/oauth/token"


def expired(backend: wire.Backend, folder: Path) -> None:
    """Write a sign-in whose access token has ended."""
    backend.expires_in = -60
    backend.rotate()
    backend.expires_in = 864_000.0
    wire.write_auth(folder / "auth.json", backend)


def saved(folder: Path) -> str:
    """Return the refresh token in the file."""
    content: dict[str, Any] = json.loads((folder / "auth.json").read_bytes())
    return str(content["tokens"]["refresh_token"])


def kept(backend: wire.Backend, folder: Path) -> bool:
    """Tell whether the token that the sign-in server gave is in the file."""
    assert until(lambda: backend.refreshes == 1)
    return saved(folder) == backend.refresh_token


@pytest.fixture
def slow_refresh(backend: wire.Backend) -> Iterator[threading.Event]:
    """Have the sign-in server answer when the gate opens."""
    gate = threading.Event()

    def reply(exchange: wire.Exchange) -> None:
        assert gate.wait(10)
        backend.default(exchange)

    backend.on(REDEEM, reply)
    yield gate
    gate.set()


# -- a signal during a refresh ----------------------------------------------


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_doctor_that_is_stopped_waits_for_its_refresh(
    number: signal.Signals, launch: Launch, backend: wire.Backend, slow_refresh: threading.Event,
    tmp_path: Path,
) -> None:
    expired(backend, tmp_path)
    process = launch("doctor", "--upstream", backend.upstream, "--issuer", backend.issuer,
                     "--auth-file", tmp_path / "auth.json", "--host", "127.0.0.1", "--port", free_port())
    backend.wait_for(1, REDEEM)
    process.send_signal(number)
    until(lambda: process.poll() is not None, 0.25)
    slow_refresh.set()
    process.communicate(timeout=SECONDS)
    assert kept(backend, tmp_path)
    assert process.returncode != 0


def rows_of(backend: wire.Backend, command: Command, folder: Path, *words: object) -> dict[str, Any]:
    _, out, _ = command("doctor", "--json", "--upstream", backend.upstream, "--issuer", backend.issuer,
                        "--auth-file", folder / "auth.json", *words)
    return {row["name"]: row for row in json.loads(out)["checks"]}


@pytest.mark.parametrize("host", ["192.0.2.77", "2001:db8::77"])
def test_doctor_with_the_address_of_another_machine(
    backend: wire.Backend, command: Command, tmp_path: Path, host: str
) -> None:
    wire.write_auth(tmp_path / "auth.json", backend)
    port = free_port()
    rows = rows_of(backend, command, tmp_path, "--host", host, "--port", port)
    at = f"[{host}]" if ":" in host else host
    assert rows["port"]["state"] == "failed"
    assert host in rows["port"]["text"]
    assert f"curl http://{at}:{port}/healthz" in rows["port"]["todo"]  # what can be done from here
    assert {rows[name]["state"] for name in ("LAN address", "firewall")} == {"skipped"}


def test_doctor_names_a_login_that_works_from_anywhere(
    backend: wire.Backend, command: Command, tmp_path: Path
) -> None:
    rows = rows_of(backend, command, tmp_path, "--host", "127.0.0.1", "--port", free_port())
    assert rows["sign-in file"]["state"] == "failed"
    commands = [shlex.split(text) for text in re.findall(r"`([^`]+)`", rows["sign-in file"]["todo"])]
    programs = [word for words in commands for word in words if word.endswith(("qoo_bridge.py", "run.sh"))]
    assert programs
    assert all(Path(program).is_file() for program in programs)


def test_doctor_quotes_a_path_of_several_words(
    backend: wire.Backend, command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "two words"
    folder.mkdir()
    wire.write_auth(folder / "auth.json", backend)
    (folder / "auth.json").chmod(0o644)
    rows = rows_of(backend, command, folder, "--host", "127.0.0.1", "--port", free_port())
    assert shlex.split(rows["file mode"]["todo"]) == ["chmod", "600", str(folder / "auth.json")]
