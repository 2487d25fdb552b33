"""The commands besides `serve`, each as its user runs it: a process of its own, nothing but Python.

What only varies the input goes through `main` in this process, because a start costs a fifth of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import wire
from conftest import Start

import qoo_bridge

BRIDGE = Path(__file__).resolve().parents[1] / "qoo_bridge.py"
SECONDS = 20  # until a test gives up; nothing here takes three
KEY = "a-key-of-the-test-1"

Process = subprocess.Popen[str]
Launch = Callable[..., Process]
Command = Callable[..., tuple[int, str, str]]
Login = Callable[[], tuple[int, str, str]]
Doctor = Callable[..., tuple[int, dict[str, Any]]]


@contextlib.contextmanager
def running(folder: Path, program: tuple[str, ...], *words: object) -> Iterator[Process]:
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
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start `qoo_bridge.py WORDS`; all end with the test."""
    with contextlib.ExitStack() as started:
        yield lambda *words: started.enter_context(running(tmp_path, (str(BRIDGE),), *words))


class Closed(qoo_bridge.Upstream):
    """Close, with the test, the connections that a command leaves to the end of its process."""

    all: ClassVar[list[Closed]] = []

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
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
        monkeypatch.setattr(qoo_bridge.log, name, value)
    monkeypatch.setattr(qoo_bridge, "Upstream", Closed)

    def run(*words: object) -> tuple[int, str, str]:
        status = qoo_bridge.main(list(map(str, words)))
        return (status, *capsys.readouterr())

    yield run
    while Closed.all:
        Closed.all.pop().close()


def ended(process: Process) -> tuple[int, str, str]:
    """Return a process's status and what it printed."""
    out, err = process.communicate(timeout=SECONDS)
    assert "Traceback" not in err
    return process.returncode, out, err


def own_port(process: Process) -> int:
    """Return the port that a bridge says it serves on."""
    line = process.stderr.readline() if process.stderr else ""
    found = re.search(r"://127\.0\.0\.1:(\d+)/v1", line)
    assert found, line
    return int(found[1])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


# -- login


@pytest.fixture
def device(backend: wire.Backend, tmp_path: Path, launch: Launch) -> Callable[[], Process]:
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


def shown_code(process: Process) -> str:
    """Return the code that `login` shows, once it does."""
    assert process.stdout
    for line in process.stdout:
        found = re.fullmatch(r" +(WIRE-\d+)\n", line)
        if found:
            return found[1]
    raise AssertionError(process.stderr and process.stderr.read())


def test_login_writes_a_new_sign_in(
    backend: wire.Backend, device: Callable[[], Process], tmp_path: Path
) -> None:
    process = device()
    shown_code(process)
    backend.wait_for(2, "/api/accounts/deviceauth/token")  # it goes on asking while nobody types
    backend.approve_device()
    status, out, err = ended(process)
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
    backend: wire.Backend, device: Callable[[], Process], tmp_path: Path
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
    assert ended(process)[0] == 0
    assert json.loads(auth_file.read_text(encoding="utf-8"))["written_meanwhile"] == 1


def test_login_says_that_device_sign_in_is_off(backend: wire.Backend, login: Login) -> None:
    backend.device_enabled = False
    status, out, err = login()
    assert (status, out) == (1, "")
    assert "device sign-in is not enabled" in err


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGINT to send")
def test_login_ends_at_ctrl_c(device: Callable[[], Process], tmp_path: Path) -> None:
    process = device()
    shown_code(process)
    process.send_signal(signal.SIGINT)
    status, out, err = ended(process)
    assert (status, err) == (130, "")
    assert "nothing was changed" in out
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


# -- doctor


@pytest.fixture
def doctor(
    backend: wire.Backend, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> Doctor:
    """Run `doctor --json` before the stand-in, in this process; return its status and its rows by name."""
    wire.write_auth(tmp_path / "auth.json", backend)
    monkeypatch.setattr(qoo_bridge, "TORN_SECONDS", 0.03)  # nobody else writes the file
    return lambda *words: examined(backend, command(*doctor_words(backend, tmp_path), *words))


@pytest.fixture
def doctor_alone(backend: wire.Backend, tmp_path: Path, launch: Launch) -> Doctor:
    """Run the same in a process of its own."""
    wire.write_auth(tmp_path / "auth.json", backend)
    return lambda *words: examined(backend, ended(launch(*doctor_words(backend, tmp_path), *words)))


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
    assert "good for 9 d 23 h" in rows["token"]["text"]
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
        (without_file, "there is no", "codex login"),
        (in_the_keyring, "system keyring", 'cli_auth_credentials_store = "file"'),
        (torn, "not whole JSON", "codex login"),
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
        (1, r"expired \d+ d( \d+ h)? ago, to be refreshed"),
        *((odd, "good for|expired|cannot be read") for odd in (1e400, -1e400, 1e300, 9e11, "1", True, None)),
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
    assert "not trusted" in rows["TLS"]["text"]
    assert "SSL_CERT_FILE" in rows["TLS"]["todo"]
    assert states(rows, "skipped") == {"Cloudflare", "account", "models", "usage"}


def test_doctor_on_cloudflares_page(backend: wire.Backend, doctor: Doctor) -> None:
    backend.on("/models", wire.cloudflare())
    status, rows = doctor()
    assert (status, states(rows, "failed")) == (1, {"Cloudflare"})
    assert "web page" in rows["Cloudflare"]["text"]


def test_doctor_on_a_host_that_is_not_there(backend: wire.Backend, doctor: Doctor) -> None:
    status, rows = doctor("--upstream", f"https://127.0.0.1:{free_port()}/backend-api/codex")
    assert (status, states(rows, "failed")) == (1, {"TLS"})
    assert "127.0.0.1 cannot be reached: connection refused" in rows["TLS"]["text"]


@pytest.mark.parametrize("host", ["a..b", "no-such-host.invalid"])
def test_doctor_on_a_name_that_leads_nowhere(doctor: Doctor, host: str) -> None:
    status, rows = doctor("--upstream", f"https://{host}/backend-api/codex")
    assert (status, states(rows, "failed")) == (1, {"name"})
    assert f"the name {host} leads nowhere" in rows["name"]["text"]


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


def test_doctor_on_the_door(doctor: Doctor, tmp_path: Path, backend: wire.Backend) -> None:
    assert doctor()[1]["door"]["text"] == "open: no key is set"
    assert doctor("--api-key", f"laptop={KEY}")[1]["door"]["text"] == "1 keys"
    key_file = tmp_path / "keys"
    words = ("--api-key-file", key_file)
    status, rows = doctor(*words)
    assert (status, states(rows, "failed")) == (1, {"door"})
    assert "no such file" in rows["door"]["text"]
    key_file.write_text(f"laptop={KEY}\n", encoding="utf-8")
    key_file.chmod(0o644)
    assert doctor(*words)[1]["door"]["todo"] == f"chmod 600 {key_file}"
    key_file.chmod(0o600)
    assert doctor(*words)[1]["door"]["text"] == f"1 keys in {key_file}, mode 0600"
    status, rows = doctor(*words, "--tls-cert", backend.ca_file, "--tls-key", tmp_path / "none")
    assert (status, states(rows, "failed")) == (1, {"door"})
    assert rows["door"]["text"].startswith("--tls-cert, --tls-key: ")  # not the key file, which is well


def test_doctor_names_the_file_that_is_wanted(backend: wire.Backend, doctor: Doctor, tmp_path: Path) -> None:
    rows = doctor("--auth-file", "own.json")[1]
    assert f"login --auth-file {tmp_path / 'own.json'}" in rows["sign-in file"]["todo"]  # codex has its own


@pytest.mark.skipif(os.name != "posix", reason="pipes end otherwise")
def test_a_reader_that_leaves_is_no_fault(launch: Launch) -> None:
    process = launch("client-config", "codex")
    assert process.stdout
    process.stdout.close()
    process.stdout = None
    assert ended(process)[0] in (0, 1)  # 0: it was quicker


def test_doctor_prints_a_table_of_80_columns(backend: wire.Backend, tmp_path: Path, launch: Launch) -> None:
    status, out, err = ended(launch(
        "doctor", "--upstream", backend.upstream, "--host", "127.0.0.1", "--auth-file", "auth.json", "--port",
        free_port()))
    lines = out.splitlines()
    assert (status, err) == (1, "")
    assert all(len(line) <= 80 for line in lines)
    assert {line[:1] for line in lines} == {"✓", "✗", "–", " "}
    assert any(line.startswith(" " * 15 + "→ run `codex login`") for line in lines)


# -- demo


@pytest.fixture
def fresh_demo(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Process, wire.Address]:
    """Start the demo with a temporary folder of its own; return it and its address."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    process = launch("demo", "--host", "127.0.0.1", "--port", "0")
    return process, ("127.0.0.1", own_port(process))


HURRIED = """\
import sys
sys.path.insert(0, sys.argv.pop(1))
import qoo_bridge
qoo_bridge.DEMO_PACE = 0
sys.exit(qoo_bridge.main())
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[wire.Address]:
    """Start one demo that does not pause between two words; return its address."""
    folder, program = tmp_path_factory.mktemp("demo"), ("-B", "-c", HURRIED, str(BRIDGE.parent))
    with running(folder, program, "demo", "--host", "127.0.0.1", "--port", "0") as process:
        yield "127.0.0.1", own_port(process)


def demo_answer(address: wire.Address, **request: Any) -> list[wire.Event]:
    body = {"model": "local_md", "stream": True, **request}
    return wire.sse(wire.post(address, "/v1/responses", body, timeout=SECONDS).body)


def test_demo_answers_with_what_it_was_sent(demo: wire.Address) -> None:
    events = demo_answer(demo, input="tell me a tale", instructions="be brief")
    assert events[-1]["type"] == "response.completed"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    words = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert len(words) > 20
    text = "".join(words)
    assert "You sent demo-plain 1 items, 0 tools and 8 characters of instructions" in text
    assert text.endswith("Your last text was: tell me a tale")
    (item,) = events[-1]["response"]["output"]
    assert item["content"][0]["text"] == text


@pytest.mark.parametrize("model", ["demo-plain", "demo-lite"])
def test_demo_calls_a_shell_once(demo: wire.Address, model: str) -> None:
    shell = {"type": "function", "name": "exec_command", "parameters": {"type": "object", "properties": {}}}
    asked: list[Any] = [{"role": "user", "content": "run a command"}]
    (call,) = demo_answer(demo, model=model, input=asked, tools=[shell])[-1]["response"]["output"]
    assert (call["type"], call["name"]) == ("function_call", "exec_command")
    assert json.loads(call["arguments"]) == {"cmd": "echo hello from the demo"}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "hello from the demo"}
    told = demo_answer(demo, model=model, input=[*asked, call, result], tools=[shell])
    (answer,) = told[-1]["response"]["output"]
    assert answer["type"] == "message"
    assert "1 tools" in answer["content"][0]["text"]


@pytest.mark.parametrize("model", ["demo-plain", "demo-lite"])
def test_demo_goes_on_over_a_websocket(demo: wire.Address, model: str) -> None:
    shell = {"type": "function", "name": "exec_command", "parameters": {"type": "object", "properties": {}}}
    asked = {"type": "response.create", "model": model, "tools": [shell]}
    prompt = {"role": "user", "content": "run a command"}
    with contextlib.closing(wire.WebSocketClient(demo, timeout=SECONDS)) as client:
        assert client.connect("/v1/responses").status == 101
        client.send_json({**asked, "input": [], "generate": False})
        ready = client.read_turn()
        assert [event["type"] for event in ready] == ["response.created", "response.completed"]
        client.send_json({**asked, "input": [prompt], "previous_response_id": ready[-1]["response"]["id"]})
        last = client.read_turn()[-1]["response"]
        (call,) = last["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "hello"}
        client.send_json({**asked, "input": [result], "previous_response_id": last["id"]})
        (answer,) = client.read_turn()[-1]["response"]["output"]
    text = answer["content"][0]["text"]
    assert "Your machine ran `echo hello from the demo`." in text
    assert text.endswith("Your last text was: run a command")  # of the request that this one continues


def test_demo_has_a_plan_and_models(demo: wire.Address) -> None:
    models = wire.get(demo, "/v1/models?client_version=0.169.0", timeout=SECONDS).json["models"]
    assert {model["slug"]: model.get("use_responses_lite", False) for model in models} == {
        "demo-plain": False, "demo-lite": True, "local_md": False}
    usage = wire.get(demo, "/backend-api/wham/usage", timeout=SECONDS).json
    assert usage["rate_limit"]["primary_window"]["used_percent"] == 12


@pytest.mark.skipif(os.name != "posix", reason="signals end it")
@pytest.mark.parametrize("end", ["SIGTERM", "SIGINT"])
def test_demo_says_what_to_paste_and_leaves_nothing(
    fresh_demo: tuple[Process, wire.Address], tmp_path: Path, end: str
) -> None:
    process, address = fresh_demo
    assert wire.get(address, "/healthz").status == 200
    assert process.stdout
    lines = iter(process.stdout.readline, "# 3. Try:  codex exec --profile local_lan "
                 '"say hello to me then run 1 shell cmd"\n')
    text = "".join(lines)
    assert f"\ncurl http://127.0.0.1:{address[1]}/v1/responses" in text
    assert f'\nmodel_catalog_url = "http://127.0.0.1:{address[1]}/v1/models"\n' in text
    (folder,) = (tmp_path / "temporary").iterdir()
    assert (folder / "auth.json").stat().st_mode & 0o777 == 0o600
    process.send_signal(getattr(signal, end))
    assert ended(process)[0] == 0
    assert list((tmp_path / "temporary").iterdir()) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "temporary"]


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
    status, out, err = ended(launch("litellm-config", "--port", port))
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
