"""The project's one purpose, end to end: the real Codex CLI gets its turn through the bridge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import wire
from conftest import LogLines, RunningBridge, Start
from help import API_KEY, LOCAL_MD, Object, sent

import qoo_bridge as q


def program_of(found: str | None) -> str | None:
    """Return the program behind the launcher of npm, which would start Node for each run."""
    if found is None:
        return None
    beside = Path(found).resolve().parent.parent.parent.glob("codex-*/vendor/*/bin/codex")
    return next((str(each) for each in beside if os.access(each, os.X_OK)), found)


CODEX = program_of(shutil.which("codex"))
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

    def configure(self, bridge: RunningBridge, model: str, without: str = "supports_websockets") -> None:
        """Set up the profile as README says: by the one file that the bridge itself answers with.

        The way here is HTTP, so `without` leaves a line out; test_codex_goes_on_over_the_websocket has all.
        """
        query = urllib.parse.urlencode({"model": model})
        text = wire.get(bridge.address, f"/v1/client-config/codex?{query}").body.decode("utf-8")
        lines = text.splitlines(True)
        kept = [line for line in lines if not line.startswith(without)]
        assert len(kept) == len(lines) - 1
        (self.home / "local_lan.config.toml").write_text("".join(kept), encoding="utf-8")

    def codex(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
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
            **more,
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


Fetch = Callable[[str, Path, dict[str, str]], None]


def models_sent(backend: wire.Backend) -> set[str]:
    """Return the models of all requests that came upstream, over HTTP and over the WebSocket."""
    posted = [request.json for request in backend.requests if request.method == "POST"]
    return {body["model"] for body in (*posted, *backend.frames)}


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
    tries = 1 if catalog or slug == "gpt-5.5" else 2
    backend.on("/responses", *[strictly(backend, [thought, call])] * tries, strictly(backend, [answer]))
    machine.configure(bridge, model)
    if not catalog:  # as older set-ups do
        profile = machine.home / "local_lan.config.toml"
        lines = profile.read_text("utf-8").splitlines(True)
        profile.write_text("".join(line for line in lines if "model_catalog_url" not in line), "utf-8")

    done = machine.codex(
        "exec", "--profile", "local_lan", "--skip-git-repo-check", "--sandbox", "danger-full-access", PROMPT
    )

    if catalog or slug == "gpt-5.5":
        assert backend.refusals == []
    else:  # Codex offers its hosted search to a model that it does not know: the plain form is tried first
        assert backend.refusals == [f"404 {{'detail': 'Model not found {slug}'}}"]
    assert (done.returncode, done.stdout) == (0, ANSWER + "\n"), done.stderr
    assert OUTPUT in done.stderr  # the transcript: the command ran on the client's machine
    assert (NO_METADATA in done.stderr) is not catalog

    first, second = backend.wait_for(tries + 1, "/responses")[tries - 1:]
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
    backend: wire.Backend, bridge: RunningBridge, machine: Machine, model: str
) -> None:
    machine.configure(bridge, model, without="# Then try it")
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


OWN_CONFIG = """\
model = "gpt-of-the-user"
model_provider = "own"
approval_policy = "on-request"
sandbox_mode = "read-only"

[model_providers.own]
name = "Own"
base_url = "http://127.0.0.1:9/v1"
wire_api = "responses"
experimental_bearer_token = "own"

[model_providers.lan]
name = "An older set-up"
base_url = "http://127.0.0.1:9/v1"
wire_api = "responses"

[tui]
notifications = false
"""


def fetched_by_urllib(url: str, target: Path, headers: dict[str, str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    request = urllib.request.Request(url, headers=headers)  # noqa: S310  # the bridge's own
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:  # noqa: S310
        target.write_bytes(reply.read())


def fetched_by_curl(url: str, target: Path, headers: dict[str, str]) -> None:
    """Run README's own command."""
    words = [word for name, value in headers.items() for word in ("-H", f"{name}: {value}")]
    command = ["curl", "-fsS", "--create-dirs", *words, url, "-o", str(target)]
    subprocess.run(command, env={"PATH": os.environ["PATH"]}, timeout=SECONDS, check=True)


FETCHED = [
    pytest.param(fetched_by_urllib, id="urllib"),
    pytest.param(fetched_by_curl, id="curl",
                 marks=pytest.mark.skipif(not shutil.which("curl"), reason="no curl")),
]


@pytest.mark.parametrize("own", ["", OWN_CONFIG], ids=["no config.toml", "config.toml of the user"])
@pytest.mark.parametrize("fetch", FETCHED)
def test_one_command_sets_codex_up(
    backend: wire.Backend, bridge: RunningBridge, machine: Machine, fetch: Fetch, own: str
) -> None:
    machine.home.rmdir()  # the command makes it
    fetch(f"{bridge.url}/client-config/codex", machine.home / "local_lan.config.toml", {})
    config = machine.home / "config.toml"
    if own:
        config.write_text(own, encoding="utf-8")
    done = machine.codex("exec", "--profile", "local_lan", "--skip-git-repo-check", PROMPT)
    assert done.returncode == 0, done.stderr
    assert NO_METADATA not in done.stderr
    assert models_sent(backend) == {"gpt-5.6-sol"}
    assert not own or config.read_text("utf-8").startswith(own)


def test_one_command_sets_codex_up_for_a_profile_and_a_model(
    backend: wire.Backend, bridge: RunningBridge, machine: Machine
) -> None:
    url = f"{bridge.url}/client-config/codex?profile=work&model=gpt-5.5"
    fetched_by_urllib(url, machine.home / "work.config.toml", {})
    machine.codex("exec", "--profile", "work", "--skip-git-repo-check", PROMPT)
    assert models_sent(backend) == {"gpt-5.5"}


def test_one_command_sets_codex_up_with_a_key(
    backend: wire.Backend, start: Start, machine: Machine
) -> None:
    bridge = start("--api-key", f"laptop={API_KEY}")
    headers = {"authorization": f"Bearer {API_KEY}"}
    fetched_by_urllib(f"{bridge.url}/client-config/codex", machine.home / "local_lan.config.toml", headers)
    words = ("exec", "--profile", "local_lan", "--skip-git-repo-check", PROMPT)
    without = machine.codex(*words)
    assert without.returncode != 0
    assert "QOO_BRIDGE_KEY" in without.stderr
    assert models_sent(backend) == set()
    assert machine.codex(*words, QOO_BRIDGE_KEY=API_KEY).returncode == 0
    assert models_sent(backend) == {"gpt-5.6-sol"}


@pytest.mark.parametrize("model", ["gpt-6.1-sol", "gpt-5.5"])
def test_codex_offers_the_web_and_images(
    backend: wire.Backend, bridge: RunningBridge, machine: Machine, model: str
) -> None:
    machine.configure(bridge, model)
    machine.codex("exec", "--profile", "local_lan", "--skip-git-repo-check", PROMPT)
    (request,) = backend.wait_for(1, "/responses")
    assert b"image_gen" in request.body
    assert request.header("x-openai-actor-authorization") is None


RUN = ("exec", "--profile", "local_lan", "--skip-git-repo-check", "--sandbox", "danger-full-access", PROMPT)


def machine_of(folder: Path, bridge: RunningBridge, model: str, websocket: bool = False) -> Machine:
    """Set a client machine up with the bridge's own file, as it is, but for the transport."""
    machine = Machine(folder / "codex-home", folder / "project")
    machine.home.mkdir()
    machine.project.mkdir()
    machine.configure(bridge, model)
    if websocket:
        config = machine.home / "local_lan.config.toml"
        wires = 'wire_api = "responses"\n'
        text = config.read_text("utf-8").replace(wires, f"{wires}supports_websockets = true\n")
        config.write_text(text, "utf-8")
    return machine


def answering(*turns: list[Object]) -> list[wire.Reply]:
    """Answer with turns of these items, one a request."""
    return [wire.turn(*wire.items_turn(*items)) for items in turns]


def sending(events: list[Object]) -> wire.FrameReply:
    """Answer a frame with these events."""
    return lambda ws, _: ws.events(*events)


DONE = [wire.message_item(ANSWER)]
TRANSPORTS = pytest.mark.parametrize("websocket", [False, True], ids=["http", "websocket"])



# -- a bare `error` ---------------------------------------------------------------------


@TRANSPORTS
@pytest.mark.parametrize("code", ["cyber_policy"])  # it repeats a server_error itself, and shows the reason
def test_codex_stops_at_a_bare_error_and_shows_its_reason(
    start: Start, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str,
    websocket: bool,
) -> None:
    monkeypatch.setattr(q, "FAILURE_WAIT", 0.05, raising=False)
    bridge = start()
    said = {"code": code, "message": "as it was said"}
    error: Object = {"type": "error", "sequence_number": 2, "error": said}

    def refuse(ws: wire.WebSocketExchange, _: Object) -> None:
        ws.events(wire.created(), error)

    backend.on_frame(wire.answer_frame, *[refuse] * 8)  # the prewarm, then each turn
    backend.always("/responses", wire.turn(wire.created(), error))
    done = machine_of(tmp_path, bridge, "gpt-5.5", websocket).codex(*RUN)
    assert "as it was said" in done.stderr
    assert len(backend.frames) == 2 if websocket else len(sent(backend)) == 1



# -- our list's tag -----------------------------------------------------------------------


@TRANSPORTS
def test_codex_fetches_our_list_once(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, tmp_path: Path, websocket: bool
) -> None:
    backend.side_frames = True
    call = wire.call_item("exec_command", wire.dump({"cmd": "true"}).decode())
    headers = [*wire.TURN_HEADERS, ("x-models-etag", backend.etag)]
    turns = [wire.items_turn(*items) for items in ([call], [{**call, "call_id": "call_2"}], DONE)]
    backend.on("/responses", *[wire.turn(*events, headers=headers) for events in turns])
    backend.on_frame(wire.answer_frame, *map(sending, turns))
    done = machine_of(tmp_path, bridge, "gpt-5.5", websocket).codex(*RUN)
    assert done.stdout == ANSWER + "\n", done.stderr
    fetched = [line for line in log_lines.lines if " GET /v1/models" in line]
    assert len(fetched) == 1, fetched



# -- web search and images ------------------------------------------------------------------


def test_codex_searches_the_web_through_the_bridge(
    bridge: RunningBridge, backend: wire.Backend, tmp_path: Path
) -> None:
    script = 'text(JSON.stringify(await tools.web__run({search_query: [{q: "qoo"}]})));'
    backend.on("/responses", *answering([wire.custom_call_item("exec", script)], DONE))
    backend.on("/alpha/search", wire.reply_json(200, {"output": "what was found"}))
    done = machine_of(tmp_path, bridge, "local_md").codex(*RUN)
    assert done.stdout == ANSWER + "\n", done.stderr
    (search,) = sent(backend, "/alpha/search")
    assert (search.json["model"], search.json["commands"]) == (LOCAL_MD, {"search_query": [{"q": "qoo"}]})
    assert search.header("x-openai-actor-authorization") is None
    assert "what was found" in json.dumps(sent(backend)[1].json["input"][-1])


def test_codex_makes_an_image_through_the_bridge(
    bridge: RunningBridge, backend: wire.Backend, tmp_path: Path
) -> None:
    call = {**wire.call_item("imagegen", '{"prompt": "a dot"}'), "namespace": "image_gen"}
    backend.on("/responses", *answering([call], DONE))
    data = [{"b64_json": wire.PIXEL}]
    backend.on("/images/generations", wire.reply_json(200, {"created": 1, "data": data}))
    done = machine_of(tmp_path, bridge, "gpt-5.5").codex(*RUN)
    assert done.stdout == ANSWER + "\n", done.stderr
    (image,) = sent(backend, "/images/generations")
    assert image.json["prompt"] == "a dot"
    assert image.header("x-openai-actor-authorization") is None
    first, second = sent(backend)
    assert "image_gen" in [tool.get("name") for tool in first.json["tools"]]
    assert wire.PIXEL in json.dumps(second.json["input"][-1])
    assert first.header("x-openai-actor-authorization") is None



# -- an alias ---------------------------------------------------------------------------------


def test_codex_takes_the_effort_of_an_alias(start: Start, backend: wire.Backend, tmp_path: Path) -> None:
    bridge = start("--alias", "deep=gpt-5.5:high")
    backend.on("/responses", *answering(DONE))
    done = machine_of(tmp_path, bridge, "deep").codex(*RUN)
    assert done.stdout == ANSWER + "\n", done.stderr
    (request,) = sent(backend)
    assert (request.json["model"], request.json["reasoning"]["effort"]) == ("gpt-5.5", "high")



# -- a front that takes the upgrade away ------------------------------------------------------


class Nginx(wire.Listener):
    """A plain nginx: it takes Upgrade and Connection away, and passes the rest on."""

    def __init__(self, behind: wire.Address) -> None:
        super().__init__(tls=False)
        self.behind = behind

    def default(self, exchange: wire.Exchange) -> None:
        """Pass a request on, and its answer back as it comes."""
        request = exchange.request
        own = ("upgrade", "connection", "host", "content-length", "transfer-encoding")
        headers = {name: value for name, value in request.headers if name.lower() not in own}
        with wire.Client(self.behind) as client:
            client.request(request.method, request.target, request.raw_body or None,
                           {**headers, "Connection": "close"})
            reply = client.read_reply()
        kept: list[Any] = [(name, value) for name, value in reply.headers
                           if name.lower() not in ("connection", "content-length", "transfer-encoding")]
        exchange.whole(reply.status, reply.body, kept)


def test_codex_behind_a_plain_nginx_goes_on_over_http_at_once(
    bridge: RunningBridge, backend: wire.Backend, tmp_path: Path
) -> None:
    backend.on("/responses", *answering(DONE))
    front = Nginx(bridge.address)
    front.start()
    try:
        machine = machine_of(tmp_path, bridge, "gpt-5.5", websocket=True)
        config = machine.home / "local_lan.config.toml"
        own, there = f"127.0.0.1:{bridge.address[1]}", f"127.0.0.1:{front.address[1]}"
        config.write_text(config.read_text("utf-8").replace(own, there), "utf-8")
        done = machine.codex(*RUN)
    finally:
        front.close()
    assert done.stdout == ANSWER + "\n", done.stderr
    tries = [request for request in front.requests
             if request.method == "GET" and request.path == "/v1/responses"]
    assert len(tries) == 1
