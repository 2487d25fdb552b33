"""Room pages: the status page, and what a client is told to paste."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import wire
from conftest import BRIDGE, RunningBridge, Start
from help import NOW, finished, record

import qoo_bridge as q
from qoo_bridge import PAGE, page_csp

SECRET = "sk-catalog-0123456789"


# -- client-config ------------------------------------------------------------

OPEN, LOCKED = (), ("--api-key", f"laptop={SECRET}")
ENVIRONMENT = "$QOO_BRIDGE_KEY"
CONFIGS = [
    ("codex", OPEN, ['base_url = "{url}"', 'model_catalog_url = "{url}/models"', 'wire_api = "responses"',
                     "requires_openai_auth = false", 'experimental_bearer_token = "lan"', 'model = "{model}"',
                     'model_provider = "lan"', "[model_providers.lan]"], ["env_key", "[profiles"]),
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
    start: Start, kind: str, keys: tuple[str, ...], has: list[str], lacks: list[str]
) -> None:
    bridge = start(*keys)
    reply = wire.get(bridge.address, f"/v1/client-config/{kind}", {"Authorization": f"Bearer {SECRET}"})
    assert (reply.status, reply.header("content-type")) == (200, "text/plain; charset=utf-8")
    text = reply.body.decode()
    assert text == printed(kind, "--host", "127.0.0.1", "--port", str(bridge.address[1]), *keys)
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


@pytest.mark.parametrize("keys", [OPEN, LOCKED], ids=["open", "locked"])
def test_codex_files_are_toml(start: Start, keys: tuple[str, ...]) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    bridge = start(*keys)
    reply = wire.get(bridge.address, "/v1/client-config/codex", {"Authorization": f"Bearer {SECRET}"})
    config, _, profile = reply.body.decode().partition("# 2. ")
    (provider,) = tomllib.loads(config)["model_providers"].values()
    assert provider["model_catalog_url"] == f"{bridge.url}/models"
    assert ("env_key" in provider, "experimental_bearer_token" in provider) == (bool(keys), not keys)
    assert provider["name"] != "OpenAI"
    assert tomllib.loads("# " + profile) == {
        "model": "local_md", "model_provider": "lan", "approval_policy": "never"}


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


KEY_SECRET = "sk-catalog-0123456789"
LINE = 'http_headers = { "x-openai-actor-authorization" = "lan" }'


@pytest.mark.parametrize("keys", [(), ("--api-key", f"laptop={KEY_SECRET}")], ids=["open", "locked"])
def test_a_codex_is_told_the_header_that_gives_it_search_and_images(
    start: Start, keys: tuple[str, ...]
) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    headers = {"Authorization": f"Bearer {KEY_SECRET}"}
    text = wire.get(start(*keys).address, "/v1/client-config/codex", headers).body.decode()
    config, _, _ = text.partition("# 2. ")
    (provider,) = tomllib.loads(config)["model_providers"].values()
    assert list(provider["http_headers"]) == ["x-openai-actor-authorization"]
    word = provider["http_headers"]["x-openai-actor-authorization"]
    assert isinstance(word, str) and word and word not in (KEY_SECRET, f"Bearer {KEY_SECRET}")


def test_the_line_stands_in_the_providers_table(bridge: RunningBridge) -> None:
    text = wire.get(bridge.address, "/v1/client-config/codex").body.decode()
    provider = text.partition("[model_providers.lan]")[2].partition("\n#")[0]
    assert LINE in provider.splitlines()


@pytest.mark.parametrize("kind", ["openai", "litellm", "curl"])
def test_other_clients_are_not_told_of_it(bridge: RunningBridge, kind: str) -> None:
    assert b"actor" not in wire.get(bridge.address, f"/v1/client-config/{kind}").body
