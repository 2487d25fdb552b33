"""Room main: the command line's words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Command, Launch
from help import SECONDS, outcome

import qoo_bridge as q


def test_help_tells_every_option_and_its_default() -> None:
    text = q.build_parser().format_help()
    for option in q.OPTIONS:
        assert f"{option.flag} {option.metavar}" in text
        assert option.name == "allow" or option.default in " ".join(text.split())



@pytest.mark.skipif(os.name != "posix", reason="pipes end otherwise")
def test_a_reader_that_leaves_is_no_fault(launch: Launch) -> None:
    process = launch("client-config", "codex")
    assert process.stdout
    process.stdout.close()
    process.stdout = None
    assert outcome(process)[0] in (0, 1)  # 0: it was quicker


@pytest.mark.parametrize("words", [("frobnicate",), ("serve", "--frobnicate"), ("serve", "--port")])
def test_unknown_words_are_a_usage_error(command: Command, words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(*words)


def test_bad_option_is_named_in_one_line(command: Command) -> None:
    status, out, err = command("client-config", "--port", "x")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--port" in err


def test_version(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command("--version")
    assert capsys.readouterr().out == f"qoo-bridge {q.__version__}\n"


def test_without_a_home_there_is_no_folder_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME and no passwd entry
    with pytest.raises(q.UsageError, match="no home folder"):
        q.load_config({}, {})
    assert q.load_config({}, {"CODEX_HOME": "/codex"}).auth_file.startswith("/codex")


def test_an_old_python_is_told_in_one_line() -> None:
    source = Path(q.__file__).read_text("utf-8")
    check = source[source.index("if sys.version_info < (3, 9)"):].partition("\n\n")[0]
    code = check.replace("(3, 9)", "(9, 9)")
    command = [sys.executable, "-c", f"import sys\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "needs Python" in done.stderr
    before = source[:source.index("if sys.version_info < (3, 9)")]
    assert not [line for line in before.split("\n") if line.startswith(("def ", "class ", "@"))]


# -- an older Python -----------------------------------------------------------------------

OLD = """
import collections, runpy, sys
sys.argv = [sys.argv[1], "--version"]
Version = collections.namedtuple("Version", "major minor micro releaselevel serial")
sys.version_info = Version(3, 8, 18, "final", 0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def says_what_it_wants(words: list[str]) -> None:
    """Run the file; it must end with one line that names the version."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode not in (0, None)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "3.9" in done.stderr
    assert done.stdout == ""


def test_older_python_is_told_what_is_wanted() -> None:
    says_what_it_wants([sys.executable, "-I", "-c", OLD, q.__file__])


def test_python_3_8_itself_is_told_what_is_wanted() -> None:
    beside = Path(sys.base_prefix).parent.glob("3.8.*/bin/python3.8")
    for python in filter(None, (shutil.which("python3.8"), *map(str, beside))):
        if subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0:
            says_what_it_wants([python, "-I", q.__file__, "--version"])
            return
    pytest.skip("there is no Python 3.8 here")


def test_help_has_every_option_with_its_variable_rule_and_every_command() -> None:
    text = " ".join(q.build_parser().format_help().split())
    for option in q.OPTIONS:
        assert f"{option.flag} {option.metavar}" in text
        assert option.help in text
    for command in q.COMMANDS:
        assert f"{command.name} {command.help}" in text
    for word in ("claude", "--profile", "--model", "QOO_BRIDGE_"):
        assert word in text


def test_help_names_every_kind_of_client_config() -> None:
    (entry,) = (command for command in q.COMMANDS if command.name == "client-config")
    assert list(q.CLIENT_CONFIGS) == ["codex", "openai", "litellm", "claude", "curl"]
    assert all(kind in entry.help for kind in q.CLIENT_CONFIGS)
