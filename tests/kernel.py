"""Which room of qoo_bridge.py may do what: the table, and a watch over the running suite that holds it.

test_shape holds the same table against the source. What neither sees: native code, and another program.
"""
from __future__ import annotations

import ast
import bisect
import functools
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

FILE = Path(__file__).resolve().parent.parent / "qoo_bridge.py"
SOURCE = FILE.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)

MAY = {  # room -> its powers; all other rooms have none
    "sockets": {"sockets"},
    "upstream": {"sockets", "tls"},
    "sign-in": {"files", "tokens"},
    "login": {"files", "tokens"},
    "account": {"tokens", "auth path"},
    "codings": {"native"},
    "log": {"files"},
    "admission": {"files"},  # the key file
    "server": {"listen", "tls"},
    "commands": {"auth path"},  # to name it, and to hand it to the sign-in
    "doctor": {"auth path"},
    "demo": {"listen", "temporary files", "auth path", "tokens"},  # a backend of its own; its tokens are none
}
POWERS = {  # dotted name in the source -> what it takes to use it
    **dict.fromkeys((
        "open", "os.open", "os.fdopen", "os.replace", "os.rename", "os.unlink", "os.remove", "os.stat",
        "os.chmod", "os.chown", "os.fchown", "os.fchmod", "os.makedirs", "os.mkdir", "os.rmdir",
        "os.listdir", "os.scandir", "os.dup2", "os.link", "os.symlink", "os.truncate", "shutil", "pathlib",
        "io.open",
    ), "files"),
    **dict.fromkeys((
        "socket.socket", "socket.create_connection", "socket.create_server", "socket.getaddrinfo",
        "socket.gethostbyname", "socket.fromfd", "http.client.HTTPConnection", "http.client.HTTPSConnection",
        "urllib.request.urlopen",
    ), "sockets"),
    **dict.fromkeys((
        "http.server.ThreadingHTTPServer", "http.server.HTTPServer", "socketserver.TCPServer",
        "socketserver.ThreadingTCPServer",
    ), "listen"),
    **dict.fromkeys(("ssl.SSLContext", "ssl.create_default_context"), "tls"),
    **dict.fromkeys(("ctypes.CDLL", "ctypes.cdll", "ctypes.PyDLL"), "native"),
    **dict.fromkeys((
        "eval", "exec", "compile", "__import__", "globals", "importlib", "subprocess", "os.system",
        "os.popen", "os.fork", "os.execv", "os.spawnv", "multiprocessing", "pickle",
    ), "code"),
    **dict.fromkeys((
        ".access_token", ".refresh_token", ".current_tokens", ".after_401", ".bearer", "._tokens",
        "._content", "._dead", "._spent", "._received", "Tokens", "read_tokens",
        "'access_token'", "'refresh_token'", "'id_token'",
    ), "tokens"),
    ".auth_file": "auth path",
    "tempfile.TemporaryDirectory": "temporary files",
}
EVENTS = {  # Python's audit event -> what it takes to cause it; any one of several
    "open": {"files", "temporary files"}, "os.rename": {"files"}, "os.remove": {"files", "temporary files"},
    "os.chmod": {"files"}, "os.chown": {"files"}, "os.mkdir": {"files", "temporary files"},
    "os.rmdir": {"temporary files"}, "os.listdir": {"files"}, "os.scandir": {"files", "temporary files"},
    "os.truncate": {"files"}, "os.link": {"files"}, "os.symlink": {"files"},
    "socket.connect": {"sockets"}, "socket.getaddrinfo": {"sockets"}, "socket.gethostbyname": {"sockets"},
    "socket.bind": {"sockets", "listen"}, "socket.sendto": {"sockets"},
    "ctypes.dlopen": {"native"}, "subprocess.Popen": {"code"}, "os.system": {"code"}, "os.exec": {"code"},
    "os.posix_spawn": {"code"}, "os.fork": {"code"},
}


class Room(NamedTuple):
    """A numbered banner and where its text begins and ends, in lines counted from 1."""

    number: int
    name: str
    start: int
    end: int


def read_rooms() -> list[Room]:
    """Return the rooms in the order of their banners."""
    banner = re.compile(r"# == (\d+) ([a-z][a-z -]*?) =+")
    found = [(number, banner.fullmatch(line)) for number, line in enumerate(LINES, 1)]
    banners = [(number, match) for number, match in found if match]
    ends = [number - 1 for number, _ in banners[1:]] + [len(LINES)]
    return [Room(int(match[1]), match[2], number, end) for (number, match), end in zip(banners, ends)]


ROOMS = read_rooms()
STARTS = [room.start for room in ROOMS]


def room_at(line: int) -> str:
    """Return the name of the room that a line stands in; "" above the first."""
    place = bisect.bisect_right(STARTS, line)
    return ROOMS[place - 1].name if place else ""


# == the watch ================================================================

PROGRAM = str(FILE)
TESTS = str(Path(__file__).resolve().parent)
violations: list[str] = []
HELPERS = ("importlib", "linecache", "tracemalloc")  # Python reads its own sources for these


@functools.cache
def is_excused(filename: str) -> bool:
    """Tell whether what this file does is none of the program's doing, although the program called it."""
    return filename.startswith(TESTS) or any(name in filename for name in HELPERS)  # a test's own code


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Trace an event to the nearest frame in the file, and hold that frame's room against the table."""
    needed = EVENTS.get(event)
    if needed is None:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != PROGRAM:
        if is_excused(frame.f_code.co_filename):
            return
        frame = frame.f_back
    if frame is None or (event == "open" and str(arguments[0]).endswith((".py", ".pyc"))):
        return
    room = room_at(frame.f_lineno)
    if not needed & MAY.get(room, set()):
        violations.append(f"{event} in {frame.f_code.co_name}, line {frame.f_lineno}, room {room or 'none'}")


# == the source ===============================================================

def dotted(node: ast.AST) -> str:
    """Return a name as it is written (`os.path.join`); "" for what is no name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def needs(node: ast.AST) -> str:
    """Return the power that a piece of the source needs; "" for none."""
    if isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "setattr"):
        literal = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
        return "" if literal else "native"  # a name made up when it runs: libzstd's functions
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return POWERS.get(repr(node.value), "")
    name = dotted(node)
    attribute = f".{node.attr}" if isinstance(node, ast.Attribute) else ""
    module = name.partition(".")[0]
    return POWERS.get(name) or POWERS.get(attribute) or POWERS.get(module if module != name else "", "")


def misuses(tree: ast.AST = TREE) -> list[str]:
    """Return what stands in a room that lacks the power for it."""
    found = []
    for node in ast.walk(tree):
        power = needs(node)
        if power and power not in MAY.get(room_at(node.lineno), set()):  # type: ignore[attr-defined]
            line = node.lineno  # type: ignore[attr-defined]
            found.append(f"{power}: line {line} in {room_at(line)}: {LINES[line - 1].strip()}")
    return found
