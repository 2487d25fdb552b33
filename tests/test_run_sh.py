"""run.sh: how it starts the bridge, LiteLLM and the tests."""

from __future__ import annotations

import contextlib
import os
import py_compile
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import wire
from help import SECONDS, free_port, until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="run.sh is for a shell")

ROOT = Path(__file__).resolve().parent.parent
RUN_SH = (ROOT / "run.sh").read_text(encoding="utf-8")
NEUTRAL = {name: value for name, value in os.environ.items() if not name.startswith(("QOO_", "PYTHON"))}
ENVIRONMENT = {**NEUTRAL, "PYTHON": sys.executable}
HOSTILE = "raise SystemExit('hostile')\n"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bridge's folder as a first start leaves it, with the bytecode and without the tests."""
    made = tmp_path_factory.mktemp("started") / "qoo-bridge"
    made.mkdir()
    for name in ("run.sh", "qoo_bridge.py"):
        shutil.copy(ROOT / name, made)
    py_compile.compile(str(made / "qoo_bridge.py"), doraise=True)
    return made


@pytest.fixture
def folder(started: Path, tmp_path: Path) -> Path:
    """A copy of that folder; the dates are kept, which tell that the bytecode is of this file."""
    return Path(shutil.copytree(started, tmp_path / "qoo-bridge"))


def run_sh(folder: Path, *words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [str(folder / "run.sh"), *words]
    return subprocess.run(command, cwd=cwd, env={**ENVIRONMENT, **more}, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=SECONDS, check=False)


def function(name: str) -> str:
    """Return a function of run.sh."""
    return RUN_SH[RUN_SH.index(f"{name}() {{"):].partition("\n}\n")[0] + "\n}\n"


# -- the bridge

def test_second_start_has_the_bytecode(folder: Path) -> None:
    shutil.rmtree(folder / "__pycache__")
    assert run_sh(folder, "--version", cwd=folder.parent).returncode == 0
    (kept,) = (folder / "__pycache__").glob("qoo_bridge.*.pyc")
    made = kept.stat().st_mtime_ns
    assert run_sh(folder, "--version", cwd=folder.parent).returncode == 0
    assert kept.stat().st_mtime_ns == made


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root can write everywhere")
def test_starts_in_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.chmod(0o500)
    done = run_sh(folder, "--version", cwd=folder.parent)
    folder.chmod(0o700)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["json", "argparse", "ssl", "qoo_bridge", "sitecustomize"])
def test_nothing_is_imported_from_the_current_folder(folder: Path, tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text(HOSTILE, "utf-8")
    done = run_sh(folder, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout[:11], done.stderr) == (0, "qoo-bridge ", "")


def test_words_arrive_as_they_are(folder: Path, tmp_path: Path) -> None:
    done = run_sh(folder, "client-config", "curl", "--model", "a  b $c*", cwd=tmp_path)
    assert done.returncode == 0
    assert '"a  b $c*"' in done.stdout


def test_relative_files_are_of_the_current_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("no key\n", "utf-8")
    done = run_sh(folder, "litellm-config", "--api-key-file", "keys", "--port", "1", cwd=tmp_path)
    assert "key file" in done.stderr  # it was read, and is none


# -- LiteLLM

@pytest.mark.parametrize(("listens", "asked"), [
    ("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"),
])
def test_taken_port_is_seen(listens: str, asked: str) -> None:
    with socket.create_server((listens, 0)) as other:
        script = f'python=$1; {function("port_is_taken")}port_is_taken "$2" "$3"'
        words = ["sh", "-c", script, "sh", sys.executable, asked]
        port = other.getsockname()[1]
        assert subprocess.run([*words, str(port)], env=ENVIRONMENT, check=False).returncode == 0
    assert subprocess.run([*words, str(free_port())], env=ENVIRONMENT, check=False).returncode == 1


def test_taken_port_4000_keeps_litellm_from_starting(
    backend: wire.Backend, folder: Path, tmp_path: Path
) -> None:
    programs, started = tmp_path / "bin", tmp_path / "started"
    programs.mkdir()
    for name, does in (("litellm", f": >{started}"), ("sleep", f"exec {shutil.which('sleep')} 0.02")):
        (programs / name).write_text(f"#!/bin/sh\n{does}\n", "utf-8")
        (programs / name).chmod(0o755)
    wire.write_auth(tmp_path / "auth.json", backend)
    words = [str(folder / "run.sh"), "--host", "127.0.0.1", "--port", str(free_port()), "--log-file", "-",
             "--upstream", backend.upstream, "--issuer", backend.issuer,
             "--auth-file", str(tmp_path / "auth.json")]
    environment = {**ENVIRONMENT, "PATH": f"{programs}:{ENVIRONMENT['PATH']}",
                   "SSL_CERT_FILE": backend.ca_file}
    with contextlib.ExitStack() as running:
        with contextlib.suppress(OSError):  # else another program has it already
            running.enter_context(socket.create_server(("127.0.0.1", 4000)))
        with open(tmp_path / "err", "w", encoding="utf-8") as err:
            process = running.enter_context(subprocess.Popen(
                words, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stderr=err))
        running.callback(process.kill)
        said = tmp_path / "err"
        assert until(lambda: "no LiteLLM: another program uses port 4000" in said.read_text("utf-8"), SECONDS)
        assert process.poll() is None  # the bridge goes on
        assert not started.exists()


@pytest.mark.parametrize(("words", "host"), [
    ([], "0.0.0.0"), (["--port", "1", "--host", "127.0.0.1"], "127.0.0.1"), (["--host=::1"], "::1"),
])
def test_litellm_listens_where_the_bridge_does(words: list[str], host: str) -> None:
    command = ["sh", "-c", f'{function("own_host")}own_host "$@"', "sh", *words]
    assert subprocess.run(command, env={}, capture_output=True, text=True, check=True).stdout == f"{host}\n"
    assert '--host "$host" --port 4000' in RUN_SH


# -- the tests

def test_tests_of_a_submodule_take_nothing_over_from_the_parent(tmp_path: Path, folder: Path) -> None:
    for name in ("conftest.py", "sitecustomize.py"):
        (tmp_path / name).write_text(HOSTILE, "utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --hostile\n", "utf-8")
    (folder / "tests").mkdir()
    (folder / "tests" / "conftest.py").write_text("OWN = True\n", "utf-8")
    (folder / "tests" / "test_one.py").write_text("def test_one() -> None:\n    pass\n", "utf-8")
    shim = tmp_path / "venvs" / f"{sys.version_info[0]}.{sys.version_info[1]}" / "bin" / "python"
    shim.parent.mkdir(parents=True)
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', "utf-8")
    shim.chmod(0o755)
    done = run_sh(folder, "test", "-q", "tests", cwd=tmp_path, QOO_TEST_VENVS=str(tmp_path / "venvs"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^1 passed", done.stdout, re.MULTILINE)
