"""Room pages: the status page, and what a client is told to paste."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from typing import Any

import pytest
import wire
from conftest import BRIDGE, Command, RunningBridge, Start
from help import API_KEY, BEARER, NOW, finished, posix, record

import qoo_bridge as q
from qoo_bridge import PAGE, page_csp

SECRET = "sk-catalog-0123456789"


# -- client-config ------------------------------------------------------------

OPEN, LOCKED = (), ("--api-key", f"laptop={SECRET}")
ENVIRONMENT = "$QOO_BRIDGE_KEY"
CONFIGS = [
    ("codex", OPEN, ['base_url = "{url}"', 'model_catalog_url = "{url}/models"', 'wire_api = "responses"',
                     "requires_openai_auth = false", 'experimental_bearer_token = "lan"', 'model = "{model}"',
                     'model_provider = "lan"', "[model_providers.lan]"], ["env_key"]),
    ("codex", LOCKED, ['env_key = "QOO_BRIDGE_KEY"', 'base_url = "{url}"'], ["experimental_bearer_token"]),
    ("openai", OPEN, ['OPENAI_BASE_URL="{url}"', 'OPENAI_API_KEY="lan"', "{model}"], ["QOO_BRIDGE_KEY"]),
    ("openai", LOCKED, [f'OPENAI_API_KEY="{ENVIRONMENT}"'], ["lan\""]),
    ("litellm", OPEN, ['api_base: "{url}"', 'model: "openai/{model}"', 'model_name: "{model}"',
                       'api_key: "lan"'], ["QOO_BRIDGE_KEY"]),
    # LiteLLM fills in environment variables only where they are written `os.environ/NAME`.
    ("litellm", LOCKED, ['api_key: "os.environ/QOO_BRIDGE_KEY"'], [ENVIRONMENT, "lan\""]),
    ("curl", OPEN, ["curl {url}/responses", '"model": "{model}"'], ["authorization", "QOO_BRIDGE_KEY"]),
    ("curl", LOCKED, [f'-H "authorization: Bearer {ENVIRONMENT}"'], []),
]


def printed(kind: str, *words: str) -> str:
    """Run `client-config` as a process of its own."""
    command = [sys.executable, "-I", "-S", str(BRIDGE), "client-config", kind, *words]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(("kind", "keys", "has", "lacks"), CONFIGS,
                         ids=[f"{kind}-{'locked' if keys else 'open'}" for kind, keys, _, _ in CONFIGS])
def test_client_config_is_printed_and_served(
    start: Start, command: Command, kind: str, keys: tuple[str, ...], has: list[str], lacks: list[str]
) -> None:
    bridge = start(*keys)
    reply = wire.get(bridge.address, f"/v1/client-config/{kind}", {"Authorization": f"Bearer {SECRET}"})
    assert (reply.status, reply.header("content-type")) == (200, "text/plain; charset=utf-8")
    text = reply.body.decode()
    words = (kind, "--host", "127.0.0.1", "--port", bridge.address[1], *keys)
    assert command("client-config", *words) == (0, text, "")
    for part in has:
        assert part.replace("{url}", bridge.url).replace("{model}", "local_md") in text
    assert [part for part in [*lacks, SECRET, "{url}", "{model}", "{{"] if part in text] == []


def test_client_config_names_the_model_and_the_lan_address() -> None:
    text = printed("curl", "--port", "4077", "--model", "gpt-6-sol")
    assert f"http://{q.lan_address()}:4077/v1/responses" in text
    assert '"model": "gpt-6-sol"' in text


def test_client_config_is_of_a_codex_without_a_word(start: Start) -> None:
    command = [sys.executable, "-I", "-S", str(BRIDGE), "client-config"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=False)
    assert "[model_providers.lan]" in done.stdout


def test_client_config_refuses_another_kind(bridge: RunningBridge) -> None:
    command = [sys.executable, "-I", "-S", str(BRIDGE), "client-config", "emacs"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert all(kind in done.stderr for kind in q.CLIENT_CONFIGS)
    assert wire.get(bridge.address, "/v1/client-config/emacs").status == 404


def test_client_config_has_the_address_that_was_asked(bridge: RunningBridge) -> None:
    text = wire.get(bridge.address, "/v1/client-config/codex", {"Host": "bridge.lan:4050"}).body.decode()
    assert 'base_url = "http://bridge.lan:4050/v1"' in text
    assert 'model_catalog_url = "http://bridge.lan:4050/v1/models"' in text


def test_client_config_without_a_host_has_an_address(bridge: RunningBridge) -> None:
    reply = wire.raw(bridge.address, "GET /v1/client-config/codex HTTP/1.0\r\n\r\n")
    assert reply.status == 200
    assert b"http:///v1" not in reply.body


class Markup(HTMLParser):
    """Collect the page's style, script, ids and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = ""
        self.texts: dict[str, str] = {}
        self.attributes: list[tuple[str, str]] = []
        self.feed(PAGE)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.inside in ("style", "script"):
            self.texts[self.inside] = self.texts.get(self.inside, "") + data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def test_page_policy_allows_the_page_and_nothing_else() -> None:
    policy = dict(directive.strip().split(" ", 1) for directive in page_csp().split(";"))
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(Markup().texts[tag].encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["connect-src"] == "'self'"
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert policy[name] == "'none'"
    assert "unsafe" not in page_csp()


def test_page_has_no_outside_asset_and_nothing_inline_that_the_policy_blocks() -> None:
    names = {name for name, _ in Markup().attributes}
    assert not names & {"style", "src", "href", "srcset", "action"}
    assert not [name for name in names if name.startswith("on")]


@pytest.mark.parametrize(
    "sink", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("]
)
def test_page_script_makes_text_nodes_only(sink: str) -> None:
    assert sink not in Markup().texts["script"]


def test_page_script_finds_every_element_it_names() -> None:
    script, ids = Markup().texts["script"], [value for name, value in Markup().attributes if name == "id"]
    named = set(re.findall(r'\$\("(\w+)"\)', script)) | set(re.findall(r'(?:put|table)\("(\w+)"', script))
    assert named and named <= set(ids)
    assert len(set(ids)) == len(ids)


def test_page_reads_only_what_the_snapshot_gives() -> None:
    telemetry = finished(record())
    read = set(re.findall(r"\bs\.(\w+)", Markup().texts["script"]))
    merged_by_the_server = {"sign_in", "catalog", "client_config"}
    assert read - merged_by_the_server <= set(telemetry.snapshot(NOW))
    assert merged_by_the_server < read


def test_client_config_offers_the_websocket(bridge: RunningBridge) -> None:
    assert b"supports_websockets = true" in wire.get(bridge.address, "/v1/client-config/codex").body




@pytest.mark.parametrize("kind", ["openai", "litellm", "curl"])
def test_other_clients_are_not_told_of_it(bridge: RunningBridge, kind: str) -> None:
    assert b"actor" not in wire.get(bridge.address, f"/v1/client-config/{kind}").body


KEYED = ("--api-key", f"laptop={API_KEY}")
KINDS = ["codex", "openai", "litellm", "claude", "curl"]


def toml(text: str) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    parsed: dict[str, Any] = tomllib.loads(text)
    return parsed


def config(bridge: RunningBridge, kind: str, query: str = "") -> str:
    reply = wire.get(bridge.address, f"/v1/client-config/{kind}{query}", BEARER)
    assert (reply.status, reply.header("content-type")) == (200, "text/plain; charset=utf-8")
    return reply.body.decode()


@pytest.mark.parametrize("keys", [(), KEYED], ids=["open", "locked"])
def test_codex_gets_one_file(start: Start, keys: tuple[str, ...]) -> None:
    bridge = start(*keys)
    auth = {"env_key": "QOO_BRIDGE_KEY"} if keys else {"experimental_bearer_token": "lan"}
    assert toml(config(bridge, "codex")) == {
        "model": "local_md", "model_provider": "lan", "approval_policy": "never",
        "model_providers": {"lan": {
            "name": "LAN ChatGPT Bridge", "base_url": bridge.url, "wire_api": "responses",
            "requires_openai_auth": False, "stream_idle_timeout_ms": 20000, "supports_websockets": True,
            "model_catalog_url": f"{bridge.url}/models",
            "http_headers": {"x-openai-actor-authorization": "lan"}, **auth}}}


@pytest.mark.parametrize(("query", "model", "profile"), [
    ("", "local_md", "local_lan"), ("?profile=work-2", "local_md", "work-2"),
    ("?model=gpt-5.5", "gpt-5.5", "local_lan"), ("?model=a%22b&profile=x", 'a"b', "x"),
    ("?model=%F0%9F%98%80%0A", "\U0001f600\n", "local_lan"), ("?model=", "local_md", "local_lan"),
])
def test_codex_file_of_another_profile_and_model(
    shared_bridge: RunningBridge, query: str, model: str, profile: str
) -> None:
    text = config(shared_bridge, "codex", query)
    assert toml(text)["model"] == model
    (command,) = (line for line in text.splitlines() if "curl " in line)
    url, _, target = command.partition("curl -fsS --create-dirs ")[2].strip().partition(" -o ")
    assert target == f"~/.codex/{profile}.config.toml"
    asked = urllib.parse.urlsplit(url.strip("'"))
    assert wire.get(shared_bridge.address, f"{asked.path}?{asked.query}").body.decode() == text
    assert f"codex exec --profile {profile} " in text


@pytest.mark.parametrize("profile", ["../x", "a b", "a/b", "$x", "x" * 65, "%C3%A9", "a%0A"])
def test_profile_is_the_name_of_a_file(shared_bridge: RunningBridge, profile: str) -> None:
    query = f"?profile={urllib.parse.quote(profile, safe='%')}"
    reply = wire.get(shared_bridge.address, f"/v1/client-config/codex{query}")
    assert (reply.status, reply.json["error"]["param"]) == (400, "profile")


def test_locked_codex_file_is_fetched_with_the_key(start: Start) -> None:
    (command,) = (line for line in config(start(*KEYED), "codex").splitlines() if "curl " in line)
    assert '-H "authorization: Bearer $QOO_BRIDGE_KEY"' in command


def test_codex_file_is_of_the_name_that_was_asked(shared_bridge: RunningBridge) -> None:
    reply = wire.get(shared_bridge.address, "/v1/client-config/codex", {"Host": "kitchen.local:4050"})
    parsed = toml(reply.body.decode())["model_providers"]["lan"]
    assert parsed["base_url"] == "http://kitchen.local:4050/v1"
    assert b"http://kitchen.local:4050/v1/client-config/codex -o" in reply.body


def test_client_config_lists_what_there_is(shared_bridge: RunningBridge) -> None:
    reply = wire.get(shared_bridge.address, "/v1/client-config")
    assert (reply.status, reply.header("content-type")) == (200, "text/plain; charset=utf-8")
    for kind in KINDS:
        assert f"{shared_bridge.url}/client-config/{kind}" in reply.body.decode().split()


def test_unknown_client_config_lists_what_there_is(shared_bridge: RunningBridge) -> None:
    reply = wire.get(shared_bridge.address, "/v1/client-config/emacs")
    assert reply.status == 404
    assert re.findall("|".join(KINDS), reply.json["error"]["message"]) == KINDS


def test_litellm_file_knows_the_model(shared_bridge: RunningBridge) -> None:
    text = config(shared_bridge, "litellm")
    for fact in ("supports_reasoning: true", "supports_vision: true", "supports_function_calling: true",
                 "max_input_tokens: 272000", "max_output_tokens: 128000", "disable_cooldowns: true",
                 "num_retries: 0", 'model_name: "claude-*"'):
        assert fact in text


@pytest.mark.parametrize("keys", [(), KEYED], ids=["open", "locked"])
def test_claude_gets_its_variables_and_the_port(start: Start, keys: tuple[str, ...]) -> None:
    text = config(start(*keys), "claude")
    variables = dict(re.findall(r'^export ANTHROPIC_(\w+)="([^"]*)"', text, re.MULTILINE))
    assert variables["BASE_URL"] == "http://127.0.0.1:4000"
    assert variables["MODEL"] == "local_md"
    assert "export CLAUDE_CODE_MAX_CONTEXT_TOKENS=272000" in text
    assert (variables["AUTH_TOKEN"] == "lan") is not bool(keys)
    assert "LiteLLM" in text and ("master_key" in text) is bool(keys)


@posix
@pytest.mark.parametrize("model", ['a"b', "a'b", "$(id)", "a\\b"])
@pytest.mark.parametrize("kind", KINDS)
def test_printed_configuration_is_right_for_any_model(command: Command, kind: str, model: str) -> None:
    status, out, err = command("client-config", kind, "--model", model, "--host", "127.0.0.1")
    assert (status, err) == (0, "")
    if kind == "codex":
        assert toml(out)["model"] == model
        return
    if kind == "litellm":
        named = re.findall(r"model_name: (.*)", out)
        assert json.loads(named[0]) == model
        return
    curl = 'curl() { for word; do body=$word; done; printf %s "$body"; }'
    shell = f'{curl}\n{out}\nprintf %s "$ANTHROPIC_MODEL"'
    shown = subprocess.run(["sh", "-c", shell], env={}, capture_output=True, text=True, check=True).stdout
    assert kind == "openai" or (json.loads(shown)["model"] if kind == "curl" else shown) == model


def test_printed_codex_file_takes_a_profile(command: Command) -> None:
    status, out, _ = command("client-config", "codex", "--profile", "work")
    assert status == 0
    assert "-o ~/.codex/work.config.toml" in out
    assert command("client-config", "codex", "--profile", "a/b")[0] == 2


def test_page_says_that_a_request_waits() -> None:
    assert re.search(r"\.waiting\b", q.PAGE)


def test_page_has_the_one_command_of_a_client(shared_bridge: RunningBridge) -> None:
    status = wire.get(shared_bridge.address, "/status").json
    assert f"curl -fsS --create-dirs {shared_bridge.url}/client-config/codex -o " in status["client_config"]
