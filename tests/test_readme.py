"""README says what the code says: every option, rule, error and route stands there, and nothing else does."""
from __future__ import annotations

import logging
import re
import time
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
MAX_LINES = 350
COMMON_OPTIONS = ("host", "port", "auth_file", "alias", "api_key_file", "limit", "allow", "log_level")
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
    common = [option for option in q.OPTIONS if option.name in COMMON_OPTIONS]
    expected = [
        [f"`{option.flag} {option.metavar}`" + (" +" if option.many else ""), f"`{option.variable}`",
         shown_default(option)]
        for option in common
    ]
    assert len(common) == len(COMMON_OPTIONS) == 8
    assert [row[:3] for row in table("Commands and options", "option")] == expected


def test_help_has_the_options_that_readme_leaves_out() -> None:
    assert "Every option stands in `--help`" in section("Commands and options")
    text = " ".join(q.build_parser().format_help().split())
    assert [option.flag for option in q.OPTIONS if f"{option.flag} {option.metavar}" not in text] == []


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
    match = re.search(r"^`drop-unsupported` drops ([^.]*)\.",
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
    rows = [(spans(codes), statuses.split(", ")) for codes, statuses, _ in table("Errors", "code")]
    assert all(len(codes) == len(statuses) for codes, statuses in rows)
    said = [(code, int(status)) for codes, statuses in rows for code, status in zip(codes, statuses)]
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


def several(path: str) -> list[str]:
    """Return the paths that `/x/{a,b}` means."""
    before, brace, rest = path.partition("{")
    words, _, after = rest.partition("}")
    if not brace or "," not in words:
        return [path]
    return [f"{before}{word}{after}" for word in words.split(",")]


def test_endpoints() -> None:
    said = [span.partition(" ")[::2] for requests, _ in table("Endpoints", "request")
            for span in spans(requests)]
    found = [(method, q.plain_path(path.replace("{id}", "")) + ("/" if "{id}" in path else ""))
             for method, written in said for path in several(written)]
    assert len(found) == len(set(found))
    assert set(found) == routes()


def test_public_endpoints() -> None:
    match = re.search(r"every endpoint but (.*?)\s+needs a\s+key", section("Security"))
    assert match
    assert set(spans(match[1])) == q.PUBLIC


def test_commands() -> None:
    said = [bare(command) for command, _ in table("Commands and options", "command")]
    assert sorted(said) == sorted(command.name for command in q.COMMANDS)


def test_kinds_of_client_config() -> None:
    rows = table("Commands and options", "command")
    (cell,) = (what for command, what in rows if command == "`client-config`")
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
    assert bullet("What is done to a request", start) == list(fields)


# == what else it says ========================================================

def test_lines_that_handle_the_token() -> None:
    names = ("sign-in", "login", "account")
    handled = sum(room.end - room.start + 1 for room in kernel.ROOMS if room.name in names)
    (said,) = re.findall(r"token is handled in (\d+) lines", README)
    assert int(said) == handled


def test_words_for_the_end_of_a_request() -> None:
    (sentence,) = re.findall(r"`end=` is (.*?)\.\s+No\s+line", README, re.DOTALL)
    assert spans(sentence) == list(q.ENDS)


def printed(kind: str) -> list[str]:
    """Return the lines of a client's configuration, without those that are comments as a whole."""
    text = q.client_config(kind, GREETING_URL, False, q.default_model(q.load_config({}, {})))
    return [line for line in text.replace("192.168.1.5", "<bridge>").splitlines() if not line.startswith("#")]


def test_codex_block_is_what_the_bridge_prints() -> None:
    assert fenced("Codex", "toml").strip().splitlines() == "\n".join(printed("codex")).strip().splitlines()


def test_claude_block_is_what_the_bridge_prints() -> None:
    assert fenced("Claude Code", "sh").splitlines() == printed("claude")


def test_curl_and_sdk_blocks_are_what_the_bridge_prints() -> None:
    for kind in ("curl", "openai"):
        lines = list(indented())
        assert [line for line in printed(kind) if line.strip() not in lines] == []


def test_one_command_of_the_first_screen_is_what_the_codex_file_says() -> None:
    text = q.client_config("codex", GREETING_URL, False, "local_md").replace("192.168.1.5", "<bridge>")
    (command,) = (line.strip("# ") for line in text.splitlines() if "curl " in line)
    assert command in [line.strip() for line in first_screen().splitlines() if line.startswith("    ")]


def test_key_of_the_curl_is_what_the_codex_file_says() -> None:
    text = q.client_config("codex", GREETING_URL, True, "local_md")
    (word,) = (span for span in spans(section("Codex")) if span.startswith("-H "))
    assert f" {word} " in text


def test_key_of_the_codex_block() -> None:
    printed = q.client_config("codex", LAN_URL, True, "local_md")
    (line,) = (line for line in printed.splitlines() if line.startswith("env_key"))
    assert line.partition("  #")[0] in spans(section("Codex"))


def test_greeting(bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "lan_address", lambda: "192.168.1.5")
    monkeypatch.setattr(q, "local_name", lambda: "", raising=False)
    config = bridge.config._replace(host="0.0.0.0")
    line = q.greeting(bridge.server, config).replace(f":{bridge.server.server_port}/", ":4050/")
    assert line in indented()


def first_screen() -> str:
    return README.partition("\n## ")[0]


def test_first_screen_says_what_matters() -> None:
    first = first_screen()
    assert len(first.splitlines()) <= 45
    for fact in ("./run.sh demo", "./run.sh test", "python3 qoo_bridge.py", "--skip-git-repo-check",
                 "everyone on your local network can use your plan", "(#security)",
                 "holds your ChatGPT token", "has run it against the real backend"):
        assert fact in " ".join(first.split())
    assert 'exec "$python" -c "$START" "$here" "$@"' in RUN_SH
    assert "demo" in [command.name for command in q.COMMANDS]


def test_security_comes_second() -> None:
    assert re.findall(r"^## (.*)", README, re.MULTILINE)[0] == "Security"


def test_links_within_lead_to_headings() -> None:
    headings = {title.lower().replace(" ", "-") for title in re.findall(r"^## (.*)", README, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_log_sample_is_a_line_of_the_log(tmp_path: Path) -> None:
    """Read the sample's values, and have the bridge write a line of them."""
    lines = [line for line in indented() if re.match(r"\d{4}-|rules=|tokens=", line)]
    sample = " ".join(lines)
    match = re.match(r"(\S+ \S+),(\d+) INFO (\w+) (\S+) (\w+) (\S+) (\w+)->(\S+) ", sample)
    assert match
    words = dict(word.split("=", 1) for word in sample[match.end():].split())
    record = q.Record(match[4])
    record.id, record.method, record.path, record.model, record.slug = match[3], *match.group(5, 6, 7, 8)
    record.rules = tuple(words["rules"].split(","))
    record.status, record.events, record.bytes = (int(words[name]) for name in ("status", "events", "bytes"))
    record.first_byte = float(words["first_byte"].removesuffix("ms")) / 1000
    record.total = float(words["total"].removesuffix("ms")) / 1000
    record.usage = {kind: int(n) for kind, n in (word.split(":") for word in words["tokens"].split(","))}
    record.end = words["end"]
    written = logging.LogRecord("q", logging.INFO, "", 0, "%s", (q.log_line(record),), None)
    written.created = time.mktime(time.strptime(match[1], "%Y-%m-%d %H:%M:%S")) + int(match[2]) / 1000
    written.msecs = int(match[2])
    handler = q.Log(str(tmp_path / "bridge.log"))
    handler.emit(written)
    handler.close()
    assert (tmp_path / "bridge.log").read_text("utf-8") == f"{sample}\n"
    assert set(record.rules) <= {rule.name for rule in q.RULES}


FIGURES = [
    ("4096 bytes", q.MAX_TARGET), (f"{q.MAX_HEAD // 1024} KiB", 64 * 1024),
    (f"more than {q.MAX_HEADERS} headers", q.MAX_HEADERS), (f"rotated at {q.LOG_SIZE >> 20} MiB", q.LOG_SIZE),
    (f"at most {q.STORE_SIZE >> 20} MiB of memory", q.STORE_SIZE),
    (f"({q.LAST_REQUESTS_SIZE >> 20} MiB for all)", q.LAST_REQUESTS_SIZE),
    (f"gives running answers {q.DRAIN_SECONDS} s", q.DRAIN_SECONDS),
    ("wait up to two minutes", 120),
]


@pytest.mark.parametrize(("fact", "value"), FIGURES, ids=[fact for fact, _ in FIGURES])
def test_figures(fact: str, value: int) -> None:
    assert fact in " ".join(README.split())
    assert value in (4096, 64 * 1024, 200, 10 << 20, 64 << 20, 30, q.KeyQueue.WAIT)


@pytest.mark.parametrize("fact", [
    "0.134", "0.161", "0.98 to 0.160", "`[profiles.local_lan]`", "`?profile=NAME`", "`?model=gpt-5.5`",
    "codex exec -c model_provider=lan -m local_md", "http://<name>.local:4050/v1", "curl.exe",
    "--alias local_md=gpt-6",
    "ANTHROPIC_MODEL=local_md", "CLAUDE_CODE_MAX_RETRIES", "git submodule add -b main",
    'qoo --profile local_lan e "say hello to me then run 1 shell cmd"',
])
def test_says(fact: str) -> None:
    assert fact in README


def test_words_after_run_sh_are_commands() -> None:
    words = set(re.findall(r"\./run\.sh ([a-z][a-z-]*)", README)) - {"test"}
    assert words <= {command.name for command in q.COMMANDS}


def test_flags_are_options() -> None:
    ours = [line for line in README.splitlines() if "qoo_bridge.py" in line or "./run.sh" in line]
    said = {flag for span in [*spans(README), *ours] for flag in re.findall(r"(?<!\S)--[a-z-]+", span)}
    others = {  # of codex, docker, systemctl, curl
        "--skip-git-repo-check", "--user", "--network", "--now", "--cacert", "--create-dirs",
        "--stop-timeout",
    }  # fmt: skip
    known = set(re.findall(r"(?<!\S)--[a-z-]+", q.build_parser().format_help()))
    assert said - known - others == set()


def test_variables_of_run_sh() -> None:
    said = set(re.findall(r"`(PYTHON|NO_[A-Z]+|QOO_TEST_[A-Z]+)`", section("Commands and options")))
    read = set(re.findall(r"\$\{([A-Z_]+):?-", RUN_SH))
    assert said - {"NO_PROXY"} == read - {"LITELLM_LOCAL_MODEL_COST_MAP", "QOO_BRIDGE_HOST"}


FILE = re.compile(r"(?:tests|\.ci)/[\w./-]*|[\w-]+\.(?:py|sh|md)|\.gitignore")


def test_every_file_it_names_exists() -> None:
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    named = [span for span in spans(README) if FILE.fullmatch(span)]
    assert "qoo_bridge.py" in named
    assert [name for name in (*linked, *named) if not (ROOT / name).exists()] == []


def test_nginx_waits_longer_than_the_bridge() -> None:
    match = re.search(r"proxy_read_timeout (\d+)s", section("Run for good"))
    assert match
    assert int(match[1]) > float(q.OPTION["idle_timeout"].default)


@pytest.mark.parametrize("topic", [
    "Security", "Codex", "Claude Code", "Other clients", "Signing in", "Troubleshooting",
    "What is done to a request", "Endpoints", "Commands and options", "Errors", "Run for good", "How fast",
    "Limits",
])
def test_topics(topic: str) -> None:
    assert len(section(topic).strip()) > 100


def test_readme_is_short() -> None:
    lines = README.splitlines()
    assert [line for line in lines if len(line) > MAX_LINE or line != line.rstrip()] == []
    assert len(lines) <= MAX_LINES


def test_speed_table_has_five_rows() -> None:
    rows = re.findall(r"^\| [a-zC].*\|$", section("How fast"), re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        nginx, bridge, ratio = (float(cell) for cell in row.split("|")[2:5])
        assert ratio == pytest.approx(bridge / nginx, rel=0.05)


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
