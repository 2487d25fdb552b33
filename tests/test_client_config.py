"""Room client config: what a person pastes or saves on another machine."""
from __future__ import annotations

import json
import re
import shlex
import subprocess
from typing import Any

import pytest

import qoo_bridge as c

URL = "http://192.168.1.5:4050/v1"
NAMES = ["local_md", "gpt-6.1-sol", 'a"b', "a\\b", "a'b", "é", "\U0001f600", "a\nb", "a\x7fb", "a\u2028b",
         "\x00", "$(x)`y`",
         "#", "{}", "\udc80", "a\u0085b", "%s", " "]
BASES = [URL, "https://vm.local:4050/v1", "http://[fe80::1%25eth0]:4050/v1", 'http://a"b:4050/v1',
         "http://$(x):4050/v1", "http://a\\b/v1"]
PROFILE_KEYS = {"model": "local_md", "model_provider": "lan", "approval_policy": "never"}


def toml(text: str) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    parsed: dict[str, Any] = tomllib.loads(text)
    return parsed


def said(text: str) -> str:
    """Return a text as it is after a lone surrogate went."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


# -- Codex: one file

@pytest.mark.parametrize("locked", [False, True], ids=["open", "locked"])
def test_codex_file_is_one_file_with_the_keys_of_the_profile_first(locked: bool) -> None:
    parsed = toml(c.client_config("codex", URL, locked, "local_md"))
    provider = parsed.pop("model_providers")["lan"]
    assert parsed == PROFILE_KEYS
    auth = {"env_key": "QOO_BRIDGE_KEY"} if locked else {"experimental_bearer_token": "lan"}
    assert provider == {
        "name": "LAN ChatGPT Bridge", "base_url": URL, "wire_api": "responses", "requires_openai_auth": False,
        "stream_idle_timeout_ms": 20000, "supports_websockets": True, "model_catalog_url": f"{URL}/models",
        "http_headers": {"x-openai-actor-authorization": "lan"}, **auth}


def test_codex_file_ends_in_comments() -> None:
    text = c.client_config("codex", URL, False, "local_md")
    comments = text.partition("\n\n# ")[2]
    assert all(line.startswith("#") for line in comments.splitlines()[1:])
    assert "--skip-git-repo-check" in comments
    assert 'codex exec --profile local_lan "say hello to me then run 1 shell cmd"' in comments
    assert "0.134" in comments and "[profiles.local_lan]" in comments


@pytest.mark.parametrize("url", BASES)
@pytest.mark.parametrize("model", NAMES)
def test_codex_file_is_toml_whatever_the_names_are(model: str, url: str) -> None:
    parsed = toml(c.client_config("codex", url, False, model, "other"))
    assert parsed["model"] == said(model)
    assert parsed["model_providers"]["lan"]["base_url"] == url
    assert set(parsed) == {*PROFILE_KEYS, "model_providers"}


@pytest.mark.parametrize(("words", "query"), [
    ((False, "local_md"), ""),
    ((False, "local_md", "other"), "?profile=other"),
    ((False, "gpt-5.5", "local_lan"), "?model=gpt-5.5"),
    ((False, 'a"b', "x"), "?profile=x&model=a%22b"),
])
def test_codex_file_names_the_command_that_fetches_it(words: tuple[Any, ...], query: str) -> None:
    text = c.client_config("codex", URL, *words)
    (line,) = (line for line in text.splitlines() if "curl " in line)
    profile = words[2] if len(words) > 2 else "local_lan"
    assert shlex.split(line)[1:] == [
        "curl", "-fsS", "--create-dirs", f"{URL}/client-config/codex{query}", "-o",
        f"~/.codex/{profile}.config.toml"]
    assert f"codex exec --profile {profile} " in text


def test_locked_codex_file_is_fetched_with_the_key() -> None:
    text = c.client_config("codex", URL, True, "local_md")
    (line,) = (line for line in text.splitlines() if "curl " in line)
    assert '-H "authorization: Bearer $QOO_BRIDGE_KEY"' in line


@pytest.mark.parametrize("url", BASES)
@pytest.mark.parametrize("model", NAMES)
def test_codex_comments_stay_comments(model: str, url: str) -> None:
    text = c.client_config("codex", url, True, model, "x")
    assert all(char == "\n" or char.isprintable() for char in text.replace("\ufffd", ""))


# -- LiteLLM

def read_yaml(text: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(text)


@pytest.mark.parametrize("model", NAMES)
def test_litellm_yaml_is_yaml_whatever_the_names_are(model: str) -> None:
    first, claude = read_yaml(c.litellm_yaml([(model, {})], model, URL, 'k"\\'))["model_list"]
    assert first["model_name"] == said(model)
    assert claude["model_name"] == "claude-*"
    for entry in (first, claude):
        assert entry["litellm_params"] == {
            "model": f"openai/{said(model)}", "api_base": URL, "api_key": 'k"\\'}


@pytest.mark.parametrize(("entry", "vision", "reasoning", "tokens"), [
    ({}, "true", "true", 272000),
    ({"context_window": 400000, "input_modalities": ["text"], "supported_reasoning_levels": []},
     "false", "false", 400000),
    ({"context_window": 100, "input_modalities": ["text", "image"],
      "supported_reasoning_levels": [{"effort": "low"}]}, "true", "true", 100),
    ({"context_window": True, "input_modalities": 1, "supported_reasoning_levels": None},
     "true", "true", 272000),
    ({"context_window": "x\n  y: 1"}, "true", "true", 272000),
])
def test_litellm_model_info_comes_from_the_catalogue(
    entry: dict[str, Any], vision: str, reasoning: str, tokens: int
) -> None:
    text = c.litellm_yaml([("m", entry)], "m", URL, "lan")
    facts = (f"supports_vision: {vision}\n", f"supports_reasoning: {reasoning}\n",
             f"max_input_tokens: {tokens}\n", "supports_function_calling: true\n",
             "max_output_tokens: 128000\n")
    assert [text.count(fact) for fact in facts] == [2] * 5  # of the model and of claude-*


def test_litellm_neither_rests_a_model_nor_repeats_a_request() -> None:
    assert c.litellm_yaml([], "m", URL, "lan").endswith(
        "router_settings:\n  disable_cooldowns: true\n  num_retries: 0\n")


def test_locked_litellm_reads_its_key_from_the_environment() -> None:
    assert 'api_key: "os.environ/QOO_BRIDGE_KEY"' in c.client_config("litellm", URL, True, "local_md")


# -- shells

def in_a_shell(text: str, shown: str) -> str:
    """Run a text in sh, then print what `shown` is there."""
    script = f'{text}\nprintf %s "{shown}"'
    return subprocess.run(["sh", "-c", script], env={}, capture_output=True, check=True).stdout.decode()


@pytest.mark.parametrize("url", BASES)
def test_openai_variables_are_what_they_say(url: str) -> None:
    text = c.client_config("openai", url, False, "a\nb")
    assert in_a_shell(text, "$OPENAI_BASE_URL $OPENAI_API_KEY") == f"{url} lan"


@pytest.mark.parametrize("model", [name for name in NAMES if name.isprintable()])
def test_claude_variables_are_what_they_say(model: str) -> None:
    text = c.client_config("claude", URL, False, model)
    assert in_a_shell(text, "$ANTHROPIC_BASE_URL $ANTHROPIC_AUTH_TOKEN $ANTHROPIC_MODEL") == \
        f"http://192.168.1.5:4000 lan {model}"
    assert "export CLAUDE_CODE_MAX_CONTEXT_TOKENS=272000  #" in text  # else 1,000,000 for an unknown name
    assert "4000" in text.splitlines()[0]


@pytest.mark.parametrize(("url", "base"), [
    ("http://[fe80::1]:4050/v1", "http://[fe80::1]:4000"), ("https://vm.local/v1", "http://vm.local:4000"),
    ("http://[::1]/v1", "http://[::1]:4000"),
])
def test_claude_asks_litellm_on_the_same_host(url: str, base: str) -> None:
    assert f'ANTHROPIC_BASE_URL="{base}"' in c.client_config("claude", url, False, "m")


def test_locked_claude_has_no_key_of_the_bridge() -> None:
    text = c.client_config("claude", URL, True, "m")
    assert "QOO_BRIDGE_KEY" not in text
    assert "master_key" in text


@pytest.mark.parametrize("model", [name for name in NAMES if "\x00" not in name and "\udc80" not in name])
def test_curl_sends_json(model: str) -> None:
    text = c.client_config("curl", URL, False, model)
    words = in_a_shell("curl() { for word; do last=$word; done; }\n" + text, "$last")
    assert json.loads(words) == {"model": model, "input": "say hello", "stream": False}


def test_list_names_every_configuration() -> None:
    text = c.client_config_list(URL)
    listed = [line.split()[0] for line in text.splitlines()]
    assert listed == [f"{URL}/client-config/{kind}" for kind in c.CLIENT_CONFIGS]
    assert list(c.CLIENT_CONFIGS) == ["codex", "openai", "litellm", "claude", "curl"]
