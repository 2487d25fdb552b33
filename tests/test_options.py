"""Room options: every option by flag, environment and default; a refusal names the option, no secret."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any

import pytest

import qoo_bridge as q

SECRET = "correct-horse-battery"
LOCAL = tuple(ipaddress.ip_network(text) for text in (
    "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10",
    "::1/128",
    "fe80::/10", "fc00::/7"))
KEYS = (q.NamedSecret("ann", SECRET),)
BESIDE = str(Path(q.__file__).resolve().parent / "bridge.log")

OPTION_ROWS: dict[str, tuple[Any, str, Any]] = {  # name: its default; a text, and what is read of it
    "host": ("0.0.0.0", "::1", "::1"),
    "port": (4050, "65535", 65535),
    "upstream": ("https://chatgpt.com/backend-api/codex", "http://127.0.0.1:9/x/", "http://127.0.0.1:9/x"),
    "issuer": ("https://auth.openai.com", "https://[::1]:9", "https://[::1]:9"),
    "auth_file": (os.path.expanduser(os.path.join("~", ".codex", "auth.json")), "/x/auth.json",
                  "/x/auth.json"),
    "alias": ({"local_md": "gpt-5"}, "a = b=c", {"local_md": "gpt-5", "a": "b=c"}),
    "api_key": ((), f"ann={SECRET}", KEYS),
    "api_key_file": ("", "/x/keys", "/x/keys"),
    "limit": ({}, "ann=2", {"ann": 2}),
    "allow": (LOCAL, "10.1.2.3/8", (ipaddress.ip_network("10.0.0.0/8"),)),
    "allow_origin": ((), "http://x:5", ("http://x:5",)),
    "allow_host": ((), "bridge.example.com", ("bridge.example.com",)),
    "keepalive": (10.0, "2.5", 2.5),
    "idle_timeout": (600.0, "5", 5.0),
    "connect_timeout": (15.0, "0.5", 0.5),
    "max_body": (128 << 20, "64k", 64 << 10),
    "max_connections": (512, "7", 7),
    "compress": ("auto", "off", "off"),
    "continuity": ("auto", "strict", "strict"),
    "originator": ("qoo_bridge", "x-1_.", "x-1_."),
    "client_version": (q.CODEX_VERSION, "0.170.0", "0.170.0"),
    "log_file": (BESIDE, "-", "-"),
    "log_level": ("info", "debug", "debug"),
    "tls_cert": ("", "", ""),  # with tls_key only, see test_tls_files_go_together
    "tls_key": ("", "", ""),
}
ROWS = [(name, *row) for name, row in OPTION_ROWS.items()]


def by_flags(*words: str, environ: dict[str, str] | None = None) -> q.Config:
    return q.load_config(vars(q.build_parser().parse_intermixed_args(list(words))), environ or {})


def test_every_option_is_a_field_and_a_row() -> None:
    names = [option.name for option in q.OPTIONS]
    assert list(q.Config._fields) == names == list(OPTION_ROWS) == list(q.OPTION)
    assert all(option.help for option in q.OPTIONS)


@pytest.mark.parametrize(("name", "default", "text", "value"), ROWS)
def test_option(name: str, default: Any, text: str, value: Any) -> None:
    option = q.OPTION[name]
    assert getattr(by_flags(), name) == default
    assert getattr(by_flags(option.flag, text), name) == value
    assert getattr(by_flags(environ={option.variable: f" {text} "}), name) == value
    assert getattr(by_flags(environ={option.variable: ""}), name) == default
    other = q.load_config({}, {f"{option.variable}_X": text, option.variable.lower(): text})
    assert getattr(other, name) == default


def test_names() -> None:
    assert (q.OPTION["max_body"].flag, q.OPTION["max_body"].variable) == ("--max-body", "QOO_BRIDGE_MAX_BODY")


def test_a_flag_goes_before_the_environment() -> None:
    environ = {"QOO_BRIDGE_PORT": "1", "QOO_BRIDGE_ALLOW": "10.0.0.0/8", "QOO_BRIDGE_KEEPALIVE": "not read"}
    config = by_flags("--port", "2", "--allow", "11.0.0.0/8", "--keepalive", "3", environ=environ)
    assert (config.port, config.allow, config.keepalive) == (2, (ipaddress.ip_network("11.0.0.0/8"),), 3.0)


def test_the_last_flag_counts() -> None:
    assert by_flags("--port", "1", "--port", "2").port == 2


def test_port_0_takes_a_free_one() -> None:
    assert by_flags("--port", "0").port == 0


@pytest.mark.parametrize(("name", "texts", "value"), [
    ("alias", ["a=1", "b=2", "a=3"], {"local_md": "gpt-5", "a": "3", "b": "2"}),
    ("alias", ["local_md=gpt-6"], {"local_md": "gpt-6"}),
    ("api_key", [f"ann={SECRET}", f"bob={SECRET}"], (*KEYS, q.NamedSecret("bob", SECRET))),
    ("limit", ["a=1", "b=2", "a=3"], {"a": 3, "b": 2}),
    ("allow", ["10.0.0.0/8", "fc00::/7", "1.2.3.4"],
     tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "fc00::/7", "1.2.3.4/32")))),
    ("allow_origin", ["http://a", "https://b"], ("http://a", "https://b")),
    ("allow_host", ["a.example", "b.example"], ("a.example", "b.example")),
])
def test_repeatable_options_take_commas_in_the_environment(name: str, texts: list[str], value: Any) -> None:
    option = q.OPTION[name]
    assert option.many
    assert getattr(q.load_config({name: texts}, {}), name) == value
    assert getattr(q.load_config({}, {option.variable: " , ".join(texts) + ","}), name) == value


def test_other_options_take_a_comma_as_it_is() -> None:
    assert q.load_config({}, {"QOO_BRIDGE_AUTH_FILE": "/a,b"}).auth_file == "/a,b"
    assert {option.name for option in q.OPTIONS if option.many} == {
        "alias", "api_key", "limit", "allow", "allow_origin", "allow_host"}


@pytest.mark.parametrize(("environ", "expected"), [
    ({}, os.path.join("~", ".codex", "auth.json")),
    ({"CODEX_HOME": ""}, os.path.join("~", ".codex", "auth.json")),
    ({"CODEX_HOME": "/x"}, os.path.join("/x", "auth.json")),
    ({"CODEX_HOME": "~/y"}, os.path.join("~/y", "auth.json")),
    ({"CODEX_HOME": "/x", "QOO_BRIDGE_AUTH_FILE": "/z"}, "/z"),
])
def test_auth_file(environ: dict[str, str], expected: str) -> None:
    assert q.load_config({}, environ).auth_file == os.path.expanduser(expected)


BAD = {
    "port": ["-1", "65536", "x", "1.0", "\u0664", "123456", "4 050"],
    "upstream": ["chatgpt.com", "ftp://x", "http://example.com", "http://127.0.0.1.example.com",
                 "https://",
                 "https://x/?a=b", "https://x/#a", "https://x:99999", "https://x:y", "https://[::1",
                 "https://u@x"],
    "issuer": ["http://192.168.1.1", "x"],
    "alias": ["x", "=x", "x=", " = "],
    "api_key": ["a=short", "a b=long-enough", f"{'a' * 65}={SECRET}", f"ä={SECRET}", f"={SECRET}",
                f"a={'x' * 257}"],
    "limit": ["a", "a=0", "a=-1", "a=x", "a=1.5", "=1"],
    "allow": ["x", "10.0.0.0/33", "10.0.0", "256.0.0.1", "::/129"],
    "allow_origin": ["*", "null", "x", "http://", "http://x/", "http://a b", "://x"],
    **{name: ["0", "0.0", "-1", "x", "1e3", "inf", "nan", "1s", "1234567"]
       for name in ("keepalive", "idle_timeout", "connect_timeout")},
    "max_body": ["0", "0M", "x", "-1", "1T", "M", "1.5M", "1 0"],
    "max_connections": ["0", "-1", "x", "1.5", "1234567"],
    "compress": ["yes", "On", "1", "true"],
    "continuity": ["x", "Auto", "auto,strict"],
    "originator": ["a b", "a\r\nb: c", "é", "x" * 65],
    "client_version": ["0 1", "a/b"],
    "log_level": ["x", "INFO", "trace"],
}


BAD_ROWS = [(name, text) for name, texts in BAD.items() for text in texts]


@pytest.mark.parametrize(("name", "text"), BAD_ROWS)
def test_bad_values_name_the_option(name: str, text: str) -> None:
    option = q.OPTION[name]
    with pytest.raises(q.UsageError) as caught:
        by_flags(f"{option.flag}={text}")
    assert str(caught.value).startswith(f"{option.flag}: ")
    with pytest.raises(q.UsageError) as caught:
        q.load_config({}, {option.variable: text})
    assert str(caught.value).startswith(f"{option.variable}: ")
    assert SECRET not in str(caught.value)


BLANK = ("port", "upstream", "keepalive", "max_body", "max_connections", "compress", "continuity",
         "log_level")


@pytest.mark.parametrize("name", BLANK)
def test_a_blank_flag_is_refused(name: str) -> None:
    with pytest.raises(q.UsageError, match=q.OPTION[name].flag):
        q.load_config({name: [""]}, {})


@pytest.mark.parametrize("name", BLANK)
def test_a_blank_variable_is_the_default(name: str) -> None:
    assert getattr(q.load_config({}, {q.OPTION[name].variable: " "}), name) == OPTION_ROWS[name][0]


@pytest.mark.parametrize(("name", "text"), [
    ("api_key", SECRET), ("upstream", f"https://user:{SECRET}@example.com"), ("limit", SECRET),
])
def test_no_message_shows_a_secret(name: str, text: str) -> None:
    with pytest.raises(q.UsageError) as caught:
        q.load_config({name: [text]}, {})
    assert SECRET not in str(caught.value)


def test_size_in_kelvin() -> None:
    with pytest.raises(q.UsageError):
        q.load_config({"max_body": ["1\u212a"]}, {})


@pytest.mark.parametrize("text", [f"https://:{SECRET}@x", "https://@x", "https://x/?", "https://x/#",
                                  "https://a b/"])
def test_upstream_is_a_plain_address(text: str) -> None:
    with pytest.raises(q.UsageError):
        q.load_config({"upstream": [text]}, {})


@pytest.mark.parametrize("text", ["http://localhost:1", "http://127.0.0.1", "http://[::1]:1/x",
                                  "https://x.example:443/a"])
def test_addresses_that_are_taken(text: str) -> None:
    assert q.read_url(text) == text


@pytest.mark.parametrize(("text", "size"), [
    ("1", 1), ("1K", 1 << 10), ("2m", 2 << 20), ("3 G", 3 << 30), ("4MiB", 4 << 20), ("5kb", 5 << 10),
    ("6B", 6),
])
def test_sizes(text: str, size: int) -> None:
    assert q.read_size(text) == size


def test_tls_files_go_together() -> None:
    config = by_flags("--tls-cert", "c", environ={"QOO_BRIDGE_TLS_KEY": "k"})
    assert (config.tls_cert, config.tls_key) == ("c", "k")
    for words in (["--tls-cert", "c"], ["--tls-key", "k"]):
        with pytest.raises(q.UsageError, match="--tls-cert and --tls-key"):
            by_flags(*words)


def test_a_key_has_a_name_of_its_own() -> None:
    with pytest.raises(q.UsageError, match="--api-key") as caught:
        by_flags("--api-key", f"ann={SECRET}", "--api-key", f"ann={SECRET}2")
    assert SECRET not in str(caught.value)


def test_a_bad_default_is_told_as_one() -> None:
    option = q.OPTION["port"]._replace(default="x")
    with pytest.raises(q.UsageError, match="the default of --port: "):
        q.read_option(option, None, {})


def test_a_secret_is_not_shown() -> None:
    config = by_flags("--api-key", f"ann={SECRET}")
    assert SECRET not in f"{config} {config!r} {config.api_key[0]} {config.api_key!r}"
    assert "ann" in repr(config)
