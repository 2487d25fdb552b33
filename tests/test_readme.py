"""README says what the code says: every option, rule, error and route stands there, and nothing else does."""
from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import kernel
import pytest
from conftest import RunningBridge

import qoo_bridge as q

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN_SH = (ROOT / "run.sh").read_text(encoding="utf-8")
MAX_LINE = 110
NONE = "none"  # how an empty default is written
LONGEST_DEFAULT = 40  # characters; a longer one is described in the table and written out below it
LAN_URL = "http://<bridge>:4050/v1"
GREETING_URL = "http://192.168.1.5:4050/v1"


# == reading README ===========================================================

def section(title: str) -> str:
    """Return the text under a heading, up to the next one."""
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert match, f"README has no section {title!r}"
    return match[1]


def table(title: str, column: str) -> list[list[str]]:
    """Return the cells of the table whose first column has this name, row by row; `\\|` is a bar."""
    match = re.search(rf"^\| {re.escape(column)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", section(title), re.MULTILINE)
    assert match, f"{title!r} has no table of {column!r}"
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in match[1].splitlines()]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in rows]


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Return what stands between backquotes, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", without_fences(text))


def bare(cell: str) -> str:
    """Return a cell that is one code span, without its backquotes."""
    match = re.fullmatch(r"`([^`]+)`", cell)
    assert match, f"{cell!r} is not one code span"
    return match[1]


def bullet(title: str, start: str) -> list[str]:
    """Return the code spans of the list in one bullet, up to the full stop or semicolon that ends it."""
    match = re.search(rf"^- \*\*{re.escape(start)}\*\*[^:]*: ([^;.]*)[;.]", section(title), re.MULTILINE)
    assert match, f"{title!r} has no bullet {start!r}"
    return spans(match[1])


def fenced(title: str, language: str) -> str:
    """Return the first block of a language under a heading."""
    match = re.search(rf"^```{language}\n(.*?)^```$", section(title), re.MULTILINE | re.DOTALL)
    assert match, f"{title!r} has no block of {language}"
    return match[1]


def indented() -> Iterator[str]:
    """Yield the lines of README's indented blocks, stripped."""
    return (line.strip() for line in README.splitlines() if line.startswith("    "))


# == tables ===================================================================

def shown_default(option: q.Option) -> str:
    if not option.default:
        return NONE
    return f"`{option.default}`" if len(option.default) <= LONGEST_DEFAULT else "local networks"


def test_options() -> None:
    expected = [
        [f"`{option.flag} {option.metavar}`" + (" +" if option.many else ""), f"`{option.variable}`",
         shown_default(option)]
        for option in q.OPTIONS
    ]
    assert [row[:3] for row in table("Options", "option")] == expected


def test_default_networks() -> None:
    said = [span for span in spans(section("Security")) if re.fullmatch(r"[0-9a-f.:]+/[0-9]+", span)]
    assert said == q.LOCAL_NETWORKS.split(",")


def test_local_names() -> None:
    said = [span for span in spans(section("Security")) if re.fullmatch(r"\.[a-z.]+", span)]
    assert sorted(said) == sorted(q.LOCAL_NAMES)


def test_rules() -> None:
    said = [(bare(name), why) for name, why in table("What is done to a request", "rule")]
    assert said == [(rule.name, rule.why) for rule in q.RULES]


def test_repairs() -> None:
    said = [(bare(name), what) for name, what in table("What is done to a request", "repair")]
    assert said == [(repair.name, repair.why) for repair in q.REPAIRS]


def test_unsupported_fields() -> None:
    match = re.search(r"^Fields that `drop-unsupported` drops: ([^.]*)\.",
                      section("What is done to a request"), re.MULTILINE)
    assert match
    assert spans(match[1]) == sorted(q.UNSUPPORTED)


def error_kinds(kind: type[q.BridgeError] = q.BridgeError) -> Iterator[type[q.BridgeError]]:
    """Yield a class of errors and all kinds of it, but not upstream's own, which keep their code."""
    if kind is not q.UpstreamRefusal:
        yield kind
    for narrower in kind.__subclasses__():
        yield from error_kinds(narrower)


def test_error_codes() -> None:
    said = [(bare(code), int(status)) for code, status, _ in table("Errors", "code")]
    assert sorted(said) == sorted({(kind.code, kind.status) for kind in error_kinds()})
    assert [status for _, status in said] == sorted(status for _, status in said)


def test_error_codes_that_stand_for_upstreams_answers() -> None:
    said = re.findall(r"`(upstream_web_page|upstream_redirect)`", section("Errors"))
    page = q.refusal(403, "text/html", b"<html>").body()["error"]["code"]
    redirect = q.refusal(302, "", b"").body()["error"]["code"]
    assert said == [page, redirect]


def routes() -> set[tuple[str, str]]:
    """Return every method and path that is answered; a path that ends in an id without the id."""
    bridge = q.Bridge(q.load_config({}, {}))
    exact = {(method, path) for path, methods in bridge.routes.items() for method in methods}
    return exact | {("GET", prefix) for prefix in bridge.routes_by_id}


def test_endpoints() -> None:
    said = [bare(request).partition(" ")[::2] for request, _ in table("Endpoints", "request")]
    found = [(method, q.plain_path(path.replace("{id}", "")) + ("/" if "{id}" in path else ""))
             for method, path in said]
    assert len(found) == len(set(found))
    assert set(found) == routes()


def test_public_endpoints() -> None:
    match = re.search(r"^Of these only (.*?) are open", section("Endpoints"), re.MULTILINE)
    assert match
    assert set(spans(match[1])) == q.PUBLIC


def test_commands() -> None:
    said = [bare(command) for command, _ in table("Commands", "command")]
    assert sorted(said) == sorted(command.name for command in q.COMMANDS)


def test_kinds_of_client_config() -> None:
    (cell,) = (what for command, what in table("Commands", "command") if command == "`client-config`")
    assert spans(cell) == list(q.CLIENT_CONFIGS)


@pytest.mark.parametrize(
    ("start", "fields"),
    [
        ("Dropped", q.CHAT_DROPPED),
        ("Refused", q.CHAT_REFUSED),
        ("Refused in `/v1/completions`", q.COMPLETION_REFUSED),
    ],
)
def test_chat_fields(start: str, fields: tuple[str, ...]) -> None:
    assert bullet("Chat Completions", start) == list(fields)


# == what else it says ========================================================

def test_lines_that_handle_the_token() -> None:
    names = ("sign-in", "login", "account")
    handled = sum(room.end - room.start + 1 for room in kernel.ROOMS if room.name in names)
    (said,) = re.findall(r"token is handled in (\d+) lines", README)
    assert int(said) == handled


def test_words_for_the_end_of_a_request() -> None:
    (sentence,) = re.findall(r"`end=` is (.*?)\. No line", README, re.DOTALL)
    assert spans(sentence) == list(q.ENDS)


def test_codex_block_is_what_the_bridge_prints() -> None:
    config = q.load_config({}, {})
    printed = q.client_config("codex", LAN_URL, False, q.default_model(config))
    assert fenced("Codex", "toml") == printed


def test_curl_and_sdk_blocks_are_what_the_bridge_prints() -> None:
    for kind in ("curl", "openai"):
        printed = q.client_config(kind, LAN_URL, False, "local_md").splitlines()
        lines = list(indented())
        assert [line for line in printed if line.strip() not in lines and not line.startswith("#")] == []


def test_key_of_the_codex_block() -> None:
    printed = q.client_config("codex", LAN_URL, True, "local_md")
    (line,) = (line for line in printed.splitlines() if line.startswith("env_key"))
    assert line.partition("  #")[0] in spans(section("Codex"))


def test_greeting(bridge: RunningBridge) -> None:
    url = q.base_url(bridge.config, bridge.server.server_port)
    assert q.greeting(bridge.server, bridge.config).replace(url, GREETING_URL) in indented()


def test_commands_of_the_first_screen_exist() -> None:
    first = README.partition("\n## ")[0]
    words = re.findall(r"^    \./run\.sh ?(\S*) +#", first, re.MULTILINE)
    assert words == ["demo", "", "test"]
    assert '= test ]' in RUN_SH
    assert 'exec "$python" "$here/qoo_bridge.py" "$@"' in RUN_SH
    assert "demo" in [command.name for command in q.COMMANDS]


def test_words_after_run_sh_are_commands() -> None:
    words = set(re.findall(r"\./run\.sh ([a-z][a-z-]*)", README)) - {"test"}
    assert words <= {command.name for command in q.COMMANDS}


def test_flags_are_options() -> None:
    ours = [line for line in README.splitlines() if "qoo_bridge.py" in line or "./run.sh" in line]
    said = {flag for span in [*spans(README), *ours] for flag in re.findall(r"(?<!\S)--[a-z-]+", span)}
    others = {  # of codex, docker, systemctl, curl
        "--profile", "--skip-git-repo-check", "--user", "--network", "--now", "--cacert",
    }  # fmt: skip
    known = set(re.findall(r"(?<!\S)--[a-z-]+", q.build_parser().format_help()))
    assert said - known - others == set()


def test_variables_of_run_sh() -> None:
    said = {span.partition("=")[0] for span in spans(section("Commands")) if re.match(r"[A-Z_]+$", span)}
    read = set(re.findall(r"\$\{([A-Z_]+):?-", RUN_SH))
    assert said == read - {"LITELLM_LOCAL_MODEL_COST_MAP", "QOO_BRIDGE_HOST"}  # LiteLLM's, the bridge's


FILE = re.compile(r"(?:tests|\.ci)/[\w./-]*|[\w-]+\.(?:py|sh|md)|\.gitignore")


def test_every_file_it_names_exists() -> None:
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    named = [span for span in spans(README) if FILE.fullmatch(span)]
    assert "qoo_bridge.py" in named
    assert [name for name in (*linked, *named) if not (ROOT / name).exists()] == []


def test_nginx_waits_longer_than_the_bridge() -> None:
    match = re.search(r"proxy_read_timeout (\d+)s", fenced("Run for good", "nginx"))
    assert match
    assert int(match[1]) > float(q.OPTION["idle_timeout"].default)


@pytest.mark.parametrize("topic", [
    "Quick start", "Codex", "Continuity and 404s", "LiteLLM (optional)", "Logs and debugging", "Security",
    "As a Git submodule", "Layout", "Run for good", "Signing in", "How fast", "Limits",
])
def test_topics(topic: str) -> None:
    assert len(section(topic).strip()) > 100


def test_lines_are_short() -> None:
    assert [line for line in README.splitlines() if len(line) > MAX_LINE or line != line.rstrip()] == []


@pytest.mark.skipif(os.name != "posix", reason="run.sh is for a shell")
@pytest.mark.parametrize(("words", "host"), [
    ([], "0.0.0.0"), (["--port", "1", "--host", "127.0.0.1"], "127.0.0.1"), (["--host=::1"], "::1"),
])
def test_litellm_listens_where_the_bridge_does(words: list[str], host: str) -> None:
    function = RUN_SH[RUN_SH.index("own_host() {"):].partition("\n}\n")[0] + "\n}\n"
    command = ["sh", "-c", f'{function}own_host "$@"', "sh", *words]
    assert subprocess.run(command, env={}, capture_output=True, text=True, check=True).stdout == f"{host}\n"
    assert '--host "$host" --port 4000' in RUN_SH




@pytest.mark.parametrize(("about", "words"), [
    (r"--originator", r"cache"),
    (r"input_tokens", r"estimate"),
    (r"--alias local_md=gpt-6", r"newer|family"),
    (r"--alias \w+=[\w.-]+:(?:low|medium|high|xhigh|max)", r"effort"),
    (r"x-openai-actor-authorization", r"search"),
    (r"[Ss]OCKS", r"PROXY|proxy"),
])
def test_readme_says_it_in_one_paragraph(about: str, words: str) -> None:
    paragraphs = [part for part in re.split(r"\n\s*\n|\n(?=[|-] )", README) if re.search(about, part)]
    assert any(re.search(words, part) for part in paragraphs), about
