"""The floor plan holds: rooms in order, each using only those above it, pure ones without I/O, all small.

And the trust kernel: only the rooms that may can open a file or a socket, or touch a token (see kernel.py).
Read from the source, with `ast` and `symtable`: nothing here runs the bridge but one subprocess.
"""
from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import symtable
import sys
from collections.abc import Iterator

import kernel
import pytest
from kernel import LINES, ROOMS, TREE, Room

ROOT = kernel.FILE.parent
DOCSTRING = ast.get_docstring(TREE, clean=False) or ""

MAX_ROOM = 450  # lines
KERNEL = ("sockets", "upstream", "sign-in", "login", "account")
MAX_KERNEL = 1_410  # DESIGN says 1,100: dead lines and addresses, unsaved sign-ins, named steps took 300
MAX_CONTENTS = 60  # lines of the docstring's list: one screen
MAX_FUNCTION = 50  # lines, from `def` to the last one
MAX_COMPLEXITY = 10  # paths through a function: one, and one more for each branch, in expressions too
MAX_CONDITIONAL = 15  # conditional expressions for 1,000 lines
MAX_LINE = 110  # characters
TOP_LEVEL = {"qoo_bridge.py", "run.sh", "tests", "README.md", ".gitignore", ".ci"}
GUARDED = {"fcntl", "msvcrt", "compression"}  # not on every system or Python: ImportError must be caught
IMPURE = {  # what a pure room may not name: other processes, files, sockets, clocks, threads, logs
    "fcntl", "http", "input", "log", "logging", "open", "os", "print", "select", "signal", "socket",
    "socketserver", "ssl", "tempfile", "threading", "time",
}
PURE = {
    "json", "refusals", "http", "items", "forms", "normalize", "repairs", "client config", "outputs",
    "chat requests", "chat answers", "fields", "events", "frames",
    "access",
}
PRINTS = ("commands", "doctor", "demo", "main")
WITHOUT_TESTS = {"constants"}  # there is nothing in it that does anything
BESIDE_ROOMS = {"bridge", "codex_cli", "fuzz", "readme", "run_sh", "shape", "walk", "wire"}  # no room
# A name in an annotation is never looked up when the file runs, but it tells of a room further down.
ANNOTATIONS_BELOW: dict[tuple[str, str], str] = {}


# == reading the file =========================================================

NUMBERS = {room.name: room.number for room in ROOMS}


def room_of(node: ast.stmt) -> Room | None:
    """Return the room that a top-level statement stands in; None above the first."""
    return next((room for room in ROOMS if room.start <= node.lineno <= room.end), None)


def functions() -> Iterator[ast.FunctionDef]:
    """Yield every function and method."""
    return (node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef))


def bound_names(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a top-level statement gives to the module."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    else:
        yield from (name.id for name in ast.walk(node)
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store))
        yield from (alias.asname or alias.name for inner in ast.walk(node) if isinstance(inner, ast.Import)
                    for alias in inner.names)


@functools.lru_cache(maxsize=1)
def homes() -> dict[str, int]:
    """Return the number of the room that each of the module's names comes from; 0 is the head."""
    return {name: room.number if room else 0 for node in TREE.body
            for room in [room_of(node)] for name in bound_names(node)}


def own_lines(node: ast.stmt | ast.expr) -> range:
    """Return the numbers of the lines that a piece of the source takes."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


class Unannotated(ast.NodeTransformer):
    """Take all annotations out of a tree."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        value = ast.Constant(None) if node.value is None else self.visit(node.value)
        return ast.copy_location(ast.Assign([node.target], value), node)


@functools.cache
def plain() -> list[ast.stmt]:
    """Return the top-level statements without their annotations."""
    statements: list[ast.stmt] = Unannotated().visit(ast.parse(kernel.SOURCE)).body
    return statements


def used_names(node: ast.stmt) -> set[str]:
    """Return the names that a statement of `plain` takes from the module or from Python when it runs.

    Python's own symbol table tells them from local ones of the same name.
    """
    return set(global_names(symtable.symtable(ast.unparse(node), "room", "exec")))


def global_names(scope: symtable.SymbolTable) -> Iterator[str]:
    for symbol in scope.get_symbols():
        if symbol.is_global() or (scope.get_type() == "module" and symbol.is_referenced()):
            yield symbol.get_name()
    for inner in scope.get_children():
        yield from global_names(inner)


def annotation_names(node: ast.stmt) -> set[str]:
    """Return the names in the annotations of a top-level statement."""
    found: list[ast.expr | None] = []
    for inner in ast.walk(node):
        if isinstance(inner, (ast.arg, ast.AnnAssign)):
            found.append(inner.annotation)
        elif isinstance(inner, ast.FunctionDef):
            found.append(inner.returns)
    return {name.id for annotation in found if annotation is not None for name in ast.walk(annotation)
            if isinstance(name, ast.Name)}


@functools.cache
def used_in(room: Room) -> set[tuple[str, int]]:
    """Return the names that a room's statements take, each with the line of its statement."""
    own = [node for node in plain() if kernel.room_at(node.lineno) == room.name]
    return {(name, node.lineno) for node in own for name in used_names(node)}


def below(room: Room, names: set[str]) -> set[str]:
    """Return those of the names that come from a room further down."""
    return {name for name in names if homes().get(name, 0) > room.number}


# == rooms =================================================================

def test_banners_are_the_docstrings_list() -> None:
    listed = re.findall(r"^ {8,9}(\d+)  ([a-z][a-z -]*?)  ", DOCSTRING, re.MULTILINE)
    assert [(str(room.number), room.name) for room in ROOMS] == listed
    assert [room.number for room in ROOMS] == list(range(1, len(ROOMS) + 1))


def test_banners_look_alike() -> None:
    assert {len(LINES[room.start - 1]) for room in ROOMS} == {79}


@pytest.mark.parametrize("room", ROOMS, ids=[room.name for room in ROOMS])
def test_room_uses_only_those_above(room: Room) -> None:
    assert {(name, line) for name, line in used_in(room) if below(room, {name})} == set()


def test_annotations_name_only_rooms_above() -> None:
    found = {(room.name, name) for node in TREE.body for room in [room_of(node)] if room
             for name in below(room, annotation_names(node))}
    assert found == set(ANNOTATIONS_BELOW)


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_room_touches_nothing(name: str) -> None:
    (room,) = (room for room in ROOMS if room.name == name)
    assert {(used, line) for used, line in used_in(room) if used in IMPURE} == set()


def test_pure_rooms_import_nothing_impure() -> None:
    """Hold imports inside functions to the same list: they bind local names, unseen by `used_names`."""
    spans = [range(room.start, room.end + 1) for room in ROOMS if room.name in PURE]
    found = {(module, line) for module, line in imported_modules() if any(line in span for span in spans)}
    assert {(module, line) for module, line in found if module in IMPURE} == set()


# == sizes ====================================================================

def size(room: Room) -> int:
    return room.end - room.start + 1


def test_rooms_are_small() -> None:
    assert {room.name: size(room) for room in ROOMS if size(room) > MAX_ROOM} == {}


def test_kernel_can_be_read_in_an_hour() -> None:
    assert sum(size(room) for room in ROOMS if room.name in KERNEL) <= MAX_KERNEL


def test_contents_fit_a_screen() -> None:
    assert len(DOCSTRING[DOCSTRING.index("Five parts"):].splitlines()) <= MAX_CONTENTS


def test_lines_are_short() -> None:
    assert [number for number, line in enumerate(LINES, 1) if len(line) > MAX_LINE] == []


def test_functions_are_short() -> None:
    lengths = {f"{node.name} in line {node.lineno}": len(own_lines(node)) for node in functions()}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION} == {}


def complexity(node: ast.AST) -> int:
    """Return one, and one for each branch, in statements and in expressions."""
    paths = 1
    for inner in ast.walk(node):
        paths += isinstance(inner, (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp))
        if isinstance(inner, ast.BoolOp):
            paths += len(inner.values) - 1
        elif isinstance(inner, ast.comprehension):
            paths += len(inner.ifs)
    return paths


def test_functions_are_simple() -> None:
    found = {f"{node.name} in line {node.lineno}": complexity(node) for node in functions()}
    assert {name: paths for name, paths in found.items() if paths > MAX_COMPLEXITY} == {}


def test_branches_are_branches() -> None:
    conditional = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.IfExp)]
    assert len(conditional) <= len(LINES) * MAX_CONDITIONAL // 1000


# == the trust kernel =========================================================

def test_only_the_rooms_that_may_touch_files_sockets_and_tokens() -> None:
    assert kernel.misuses() == []


@pytest.mark.parametrize(("room", "source"), [
    ("normalize", "open(path)"), ("commands", "socket.socket()"), ("doctor", "os.stat(path)"),
    ("turns", "tokens.access_token"), ("exchange", "account._credentials.bearer()"),
    ("server", "ssl.wrap(); http.client.HTTPSConnection(host)"), ("pages", "eval(text)"),
    ("store", "getattr(value, name)"), ("telemetry", "tokens['refresh_token']"),
    ("routes", "subprocess.run([])"),
])
def test_a_planted_misuse_is_seen(room: str, source: str) -> None:
    (start,) = (each.start for each in ROOMS if each.name == room)
    tree = ast.parse(source)
    ast.increment_lineno(tree, start)
    assert kernel.misuses(tree)


def test_powers_are_given_to_rooms_that_exist() -> None:
    assert set(kernel.MAY) <= set(NUMBERS)


# == a record is written, never read ==========================================

def record_reads(tree: ast.AST) -> list[str]:
    """Return where a field of a request's record is read."""
    (record,) = (node for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == "Record")
    methods = {node.name for node in record.body if isinstance(node, ast.FunctionDef)} - {"error", "tokens"}
    return [f"{node.lineno}: {ast.unparse(node)}" for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            and re.search(r"(^|[._])record$", kernel.dotted(node.value)) and node.attr not in {*methods, "id"}
            and kernel.room_at(node.lineno) != "telemetry"]


def test_a_record_is_written_and_never_read() -> None:
    assert record_reads(TREE) == []


@pytest.mark.parametrize("source", [
    "if record.key: pass", "x = exchange.record.end", "self.record.status == 101",
])
def test_a_planted_read_of_a_record_is_seen(source: str) -> None:
    assert len(record_reads(ast.parse(source))) == 1


# == what stands nowhere ======================================================

def test_no_assert() -> None:
    assert [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Assert)] == []


def test_only_commands_print() -> None:
    calls = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name) and node.func.id == "print"]
    allowed = [range(room.start, room.end + 1) for room in ROOMS if room.name in PRINTS]
    assert [line for line in calls if not any(line in lines for lines in allowed)] == []
    assert calls


# == imports ==================================================================

def imported_modules() -> list[tuple[str, int]]:
    """Return the top-level package of every import, wherever it stands, and its line."""
    found = []
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            found += [(alias.name.partition(".")[0], node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(((node.module or "").partition(".")[0], node.lineno))
    return found


def caught_by(node: ast.AST) -> list[ast.expr | None]:
    """Return what a `try`, or a `with contextlib.suppress(...)`, catches."""
    if isinstance(node, ast.Try):
        return [handler.type for handler in node.handlers]
    calls = [item.context_expr for item in node.items] if isinstance(node, ast.With) else []
    return [argument for call in calls if isinstance(call, ast.Call) for argument in call.args]


def guarded_lines() -> set[int]:
    """Return the lines in which an ImportError is caught."""
    guards = [node for node in ast.walk(TREE) if isinstance(node, (ast.Try, ast.With))]
    return {line for guard in guards for name in caught_by(guard)
            if isinstance(name, ast.Name) and name.id == "ImportError" for line in own_lines(guard)}


def test_imports_are_the_standard_library() -> None:
    """Import all of it without site-packages: what is missing then must be guarded."""
    modules = sorted({module for module, _ in imported_modules()} - GUARDED)
    done = python("-c", "import " + ", ".join(modules))
    assert (done.returncode, done.stderr) == (0, "")


def test_modules_that_can_be_missing_are_guarded() -> None:
    guarded = guarded_lines()
    found = [(module, line) for module, line in imported_modules() if module in GUARDED]
    assert {module for module, _ in found} == GUARDED
    assert [(module, line) for module, line in found if line not in guarded] == []


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with its standard library alone: no site-packages, no environment, no folder."""
    command = [sys.executable, "-I", "-S", "-B", "-W", "error", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=30, check=False)


def test_help_runs_on_the_standard_library_alone() -> None:
    done = python(str(kernel.FILE), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--port" in done.stdout


# == the tree =================================================================

def git(*arguments: str) -> str:
    """Run git in the repository; skip where there is none, as in an unpacked archive."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a Git checkout")
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        pytest.skip(f"git says: {done.stderr.strip()}")
    return done.stdout


def test_top_level_holds_the_agreed_names() -> None:
    tracked = {name.partition("/")[0] for name in git("ls-files").splitlines()}
    assert tracked == TOP_LEVEL


def test_tests_mirror_the_rooms() -> None:
    present = {path.stem[len("test_"):] for path in (ROOT / "tests").glob("test_*.py")}
    rooms = {re.sub(r"\W", "_", name) for name in NUMBERS} - WITHOUT_TESTS
    assert sorted(rooms - present) == []
    assert sorted(present - rooms - BESIDE_ROOMS) == []
