"""The project's one purpose, end to end: the real Codex CLI gets its turn through the bridge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import wire
from conftest import RunningBridge

CODEX = shutil.which("codex")
pytestmark = pytest.mark.skipif(CODEX is None, reason="no codex on PATH (npm install -g @openai/codex)")

SECONDS = 30  # for one run of the CLI, which takes half a second
PROMPT = "say hello to me then run 1 shell cmd"
COMMAND = "echo bridged-$((40 + 2))"  # its output stands nowhere until a shell has run it
OUTPUT = "bridged-42"
ANSWER = "Hello to you, from the backend."
NO_METADATA = "Model metadata for"


class Machine(NamedTuple):
    """A client machine: its CODEX_HOME and an empty directory to work in."""

    home: Path
    project: Path

    def configure(self, bridge: RunningBridge, model: str, catalog: bool = True) -> None:
        """Set up the profile as README says: with what the bridge itself answers to a new machine.

        `catalog=False` leaves the model list out, as older set-ups do. The way here is HTTP;
        `test_codex_goes_on_over_the_websocket` has the other one.
        """
        text = wire.get(bridge.address, "/v1/client-config/codex").body.decode("utf-8")
        config, second_file, profile = text.replace('"local_md"', f'"{model}"').partition("# 2. ")
        assert second_file
        assert "supports_websockets = true\n" in config
        config = config.replace("supports_websockets = true\n", "")
        if not catalog:
            config = "".join(line for line in config.splitlines(True) if "model_catalog_url" not in line)
        (self.home / "config.toml").write_text(config, encoding="utf-8")
        (self.home / "local_lan.config.toml").write_text(second_file + profile, encoding="utf-8")

    def codex(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Codex with nothing of this host's settings, and loopback for its only network."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "CODEX_HOME": str(self.home),
            # Codex mistrusts a CODEX_HOME below the temporary folder, and pytest's folders are there.
            "TMPDIR": str(self.project),
            # Plugins, updates and analytics are asked of hosts outside: here they meet a closed port.
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "NO_PROXY": "127.0.0.1",
        }
        return subprocess.run(
            [str(CODEX), *arguments],
            cwd=self.project,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=SECONDS,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path / "codex-home", tmp_path / "project")
    machine.home.mkdir()
    machine.project.mkdir()
    return machine


def strictly(backend: wire.Backend, items: Sequence[wire.Item]) -> wire.Reply:
    """Reply with a turn of `items`, but only to a request that the real backend would take."""

    def reply(exchange: wire.Exchange) -> None:
        try:
            backend.check_client(exchange.request)
            backend.check_turn(exchange.request, exchange.request.json)
        except wire.Refused as exc:
            backend.note(str(exc))
            wire.send_refusal(exchange, exc)
        else:
            wire.turn(*wire.items_turn(*items))(exchange)

    return reply


def items_of(request: wire.Request, kind: str) -> list[dict[str, Any]]:
    return [item for item in request.json["input"] if item["type"] == kind]


@pytest.mark.parametrize(
    ("model", "catalog", "slug"),
    [
        pytest.param("local_md", True, "gpt-5.6-sol", id="alias with catalogue"),
        pytest.param("local_md", False, "gpt-5.6-sol", id="alias without catalogue"),
        pytest.param("gpt-6.1-sol", True, "gpt-6.1-sol", id="lite model"),
        pytest.param("gpt-5.5", True, "gpt-5.5", id="plain model"),
    ],
)
def test_say_hello_then_run_one_shell_cmd(
    backend: wire.Backend, bridge: RunningBridge, machine: Machine, model: str, catalog: bool, slug: str
) -> None:
    thought = wire.reasoning_item()
    call = wire.call_item("exec_command", wire.dump({"cmd": COMMAND}).decode())
    answer = wire.message_item(ANSWER)
    backend.on("/responses", strictly(backend, [thought, call]), strictly(backend, [answer]))
    machine.configure(bridge, model, catalog)

    done = machine.codex(
        "exec", "--profile", "local_lan", "--skip-git-repo-check", "--sandbox", "danger-full-access", PROMPT
    )

    assert backend.refusals == []
    assert (done.returncode, done.stdout) == (0, ANSWER + "\n"), done.stderr
    assert OUTPUT in done.stderr  # the transcript: the command ran on the client's machine
    assert (NO_METADATA in done.stderr) is not catalog

    first, second = backend.wait_for(2, "/responses")
    for request in (first, second):
        assert request.json["model"] == slug
        assert request.header("authorization") == f"Bearer {backend.access_token}"
        assert request.header("session-id") == first.header("session-id") == request.json["prompt_cache_key"]
    assert PROMPT in str(items_of(first, "message")[-1]["content"])
    assert not items_of(first, "function_call_output")

    # The second request carries the whole turn: what the model thought, what it called, what came of it.
    assert second.json["input"][: len(first.json["input"])] == first.json["input"]
    reasoning, called, result = second.json["input"][len(first.json["input"]) :]
    assert {key: reasoning[key] for key in thought} == thought
    assert {key: called[key] for key in call} == call
    assert (result["type"], result["call_id"]) == ("function_call_output", call["call_id"])
    assert result["output"].endswith(f"\n{OUTPUT}\n")
    assert second.header("x-codex-turn-state") == "ts-sticky-1"  # set by the first response, echoed by Codex


def test_codex_is_named_as_itself(backend: wire.Backend, bridge: RunningBridge, machine: Machine) -> None:
    machine.configure(bridge, "local_md")
    version = machine.codex("--version").stdout.split()[-1]
    machine.codex("exec", "--profile", "local_lan", "--skip-git-repo-check", PROMPT)
    (request,) = backend.wait_for(1, "/responses")
    assert request.header("version") == version
    assert request.header("originator") == "codex_exec"
    assert (request.header("user-agent") or "").startswith(f"codex_exec/{version} ")


@pytest.mark.parametrize("model", ["local_md", "gpt-5.5"])
def test_codex_goes_on_over_the_websocket(
    backend: wire.Backend, bridge: RunningBridge, tmp_path: Path, model: str
) -> None:
    machine = Machine(tmp_path / "codex-home", tmp_path / "project")
    machine.home.mkdir()
    machine.project.mkdir()
    machine.configure(bridge, model)
    config = machine.home / "config.toml"
    lines = [line for line in config.read_text("utf-8").splitlines(True) if "supports_websockets" not in line]
    at = lines.index('wire_api = "responses"\n')
    config.write_text("".join([*lines[:at], "supports_websockets = true\n", *lines[at:]]), "utf-8")
    call = wire.call_item("exec_command", wire.dump({"cmd": COMMAND}).decode())
    backend.on_frame(
        wire.answer_frame,  # the prewarm
        lambda ws, _: ws.events(*wire.items_turn(wire.reasoning_item(), call)),
        lambda ws, _: ws.events(*wire.text_turn(ANSWER)),
    )
    done = machine.codex(
        "exec", "--profile", "local_lan", "--skip-git-repo-check", "--sandbox", "danger-full-access", PROMPT
    )
    assert (done.returncode, done.stdout) == (0, ANSWER + "\n"), done.stderr
    assert OUTPUT in done.stderr
    assert "Falling back" not in done.stderr
    assert [request for request in backend.requests if request.method == "POST"] == []
    prewarm, turn, result = backend.wait_for_frames(3)  # no more: none was refused
    assert prewarm["generate"] is False
    assert PROMPT in json.dumps(turn["input"])
    assert turn["previous_response_id"] and result["previous_response_id"]
    (item,) = result["input"]
    assert (item["type"], item["call_id"]) == ("function_call_output", call["call_id"])
    assert item["output"].endswith(f"\n{OUTPUT}\n")
    assert len([request for request in backend.requests if request.header("upgrade")]) == 1
