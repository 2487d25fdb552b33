"""Room demo: a bridge before a backend of its own, which answers with what it was sent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import Launch, Popen, running
from help import SECONDS, outcome


def own_port(process: Popen) -> int:
    """Return the port that a bridge says it serves on."""
    line = process.stderr.readline() if process.stderr else ""
    found = re.search(r"://127\.0\.0\.1:(\d+)/v1", line)
    assert found, line
    return int(found[1])


@pytest.fixture
def fresh_demo(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Popen, wire.Address]:
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
def demo(tmp_path_factory: pytest.TempPathFactory, bytecode: Path) -> Iterator[wire.Address]:
    """Start one demo that does not pause between two words; return its address."""
    folder, program = tmp_path_factory.mktemp("demo"), ("-B", "-c", HURRIED, str(bytecode.parent))
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
    events = demo_answer(demo, model=model, input=[*asked, call, result], tools=[shell])
    (answer,) = events[-1]["response"]["output"]
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
    fresh_demo: tuple[Popen, wire.Address], tmp_path: Path, end: str
) -> None:
    process, address = fresh_demo
    assert wire.get(address, "/healthz").status == 200
    assert process.stdout
    lines: list[str] = []
    while not lines or (lines[-1] and not lines[-1].startswith("codex exec")):  # an end of the output, too
        lines.append(process.stdout.readline())
    text, url = "".join(lines), f"http://127.0.0.1:{address[1]}/v1"
    assert f"\ncurl {url}/responses" in text
    assert f"\ncurl -fsS --create-dirs {url}/client-config/codex -o ~/.codex/local_lan.config.toml\n" in text
    (folder,) = (tmp_path / "temporary").iterdir()
    assert (folder / "auth.json").stat().st_mode & 0o777 == 0o600
    process.send_signal(getattr(signal, end))
    assert outcome(process)[0] == 0
    assert list((tmp_path / "temporary").iterdir()) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "temporary"]
