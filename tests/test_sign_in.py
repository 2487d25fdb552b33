"""Room sign-in: auth.json and its refresh, beside a Codex that does the same."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import LogLines, RunningBridge, Start
from help import REQUEST, ask, json_answer, posix, respond, until

import qoo_bridge as q


class Clock:
    """Stand in for `time` in the code under test: `skew` seconds ahead, `on_sleep` in place of sleep."""

    def __init__(self) -> None:
        self.skew = 0.0
        self.on_sleep: Callable[[], object] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        """Return the skewed clock."""
        return time.monotonic() + self.skew

    def sleep(self, seconds: float) -> None:
        """Do what the test wants to happen while the code waits; the clock goes on."""
        self.skew += seconds
        self.on_sleep()


class Issuer(wire.SignIn):
    """Answer refreshes without a network: by the queue of `answers`, else with rotated tokens."""

    def __init__(self) -> None:
        super().__init__("https://issuer.test")
        self.asked: list[dict[str, Any]] = []
        self.answers: list[q.BufferedReply | q.BridgeError] = []
        self.meanwhile: Callable[[], object] = lambda: None  # happens between the question and its answer

    def fetch(self, method: str, url: str, fields: dict[str, str], body: bytes,
              timeout: float) -> q.BufferedReply:
        """Take the place of Upstream.fetch."""
        assert (method, url) == ("POST", "https://issuer.test/oauth/token")
        assert fields["content-type"] == "application/json"
        self.asked.append(json.loads(body))
        self.meanwhile()
        answer = self.answers.pop(0) if self.answers else json_answer(200, self.rotate())
        if isinstance(answer, q.BridgeError):
            raise answer
        return answer


def stored(path: Path) -> dict[str, Any]:
    """Read auth.json back."""
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


@pytest.fixture(autouse=True)
def codex_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the files of these tests be Codex's own."""
    monkeypatch.setenv("CODEX_HOME", str(tmp_path))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the clock of the code under test."""
    clock = Clock()
    monkeypatch.setattr(q, "time", clock)
    return clock


@pytest.fixture
def issuer() -> Issuer:
    """Make a sign-in server without a network."""
    return Issuer()


@pytest.fixture
def path(tmp_path: Path, issuer: Issuer) -> Path:
    """Write a good auth.json."""
    wire.write_auth(tmp_path / "auth.json", issuer)
    return tmp_path / "auth.json"


@pytest.fixture
def credentials(path: Path, issuer: Issuer) -> q.Credentials:
    """Make the credentials of that file."""
    return q.Credentials(str(path), issuer.token_issuer, issuer.fetch)


# -- the file -----------------------------------------------------------------

BAD_VALUES: list[Any] = [
    None,
    5,
    "text",
    [],
    {},
    {"tokens": None},
    {"tokens": []},
    {"tokens": {}},
    {"tokens": {"access_token": None}},
    {"tokens": {"access_token": 5}},
    {"tokens": {"access_token": ""}},
    {"tokens": {"access_token": "two words"}},
    {"tokens": {"access_token": "line\r\nx-evil: 1"}},
    {"tokens": {"access_token": "é.é.é"}},
    {"auth_mode": "apikey", "OPENAI_API_KEY": "sk-secret", "tokens": {"access_token": "a.b.c"}},
    {"auth_mode": 5, "tokens": {"access_token": "a.b.c"}},
]
BAD_FILES: dict[str, bytes] = {
    "empty": b"",
    "torn": b'{"auth_mode":"chatgpt","tokens":{"access_token":"a.b',
    "binary": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    **{repr(value): json.dumps(value).encode() for value in BAD_VALUES},
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_says_what_to_do_and_recovers(
    content: bytes, path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(q.NotSignedIn) as caught:
            credentials.current_tokens()
        assert str(path) in caught.value.message
        assert "codex login" in caught.value.message
        assert "sk-secret" not in caught.value.message
    assert path.read_bytes() == content
    wire.write_auth(path, issuer)
    assert credentials.current_tokens().access_token == issuer.access_token


def test_missing_file_says_what_to_do_and_recovers(tmp_path: Path, issuer: Issuer, clock: Clock) -> None:
    path = tmp_path / "auth.json"
    credentials = q.Credentials(str(path), issuer.token_issuer, issuer.fetch)
    with pytest.raises(q.NotSignedIn, match="codex login"):
        credentials.current_tokens()
    wire.write_auth(path, issuer)
    assert credentials.current_tokens().access_token == issuer.access_token


def test_folder_in_place_of_the_file_is_a_clear_error(
    tmp_path: Path, issuer: Issuer, clock: Clock
) -> None:
    with pytest.raises(q.NotSignedIn, match="cannot read"):
        q.Credentials(str(tmp_path), issuer.token_issuer, issuer.fetch).current_tokens()


@pytest.mark.parametrize("torn", [b"", b'{"tokens":'])
def test_file_being_written_is_read_again(
    torn: bytes, path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    credentials.current_tokens()
    path.write_bytes(torn)
    issuer.rotate()
    clock.on_sleep = lambda: wire.write_auth(path, issuer)
    assert credentials.current_tokens().access_token == issuer.access_token


def test_file_is_read_once_while_it_stays(
    credentials: q.Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = credentials.current_tokens()
    monkeypatch.setattr(q, "read_tokens", lambda *_: pytest.fail("read again"))
    assert credentials.current_tokens() is first


@pytest.mark.parametrize(
    ("tokens", "claim", "account"),
    [
        ({"account_id": "acc-file"}, "acc-claim", "acc-file"),
        ({"account_id": None}, "acc-claim", "acc-claim"),
        ({"account_id": ""}, "acc-claim", "acc-claim"),
        ({}, "acc-claim", "acc-claim"),
        ({}, None, ""),
        ({}, ["acc"], ""),
        ({"account_id": "two\r\nlines"}, None, ""),
        pytest.param(
            {"account_id": 5},
            "acc-claim",
            "acc-claim"),
    ],
)
def test_account_is_the_files_else_the_claims(tokens: dict[str, Any], claim: Any, account: str) -> None:
    id_token = wire.jwt({q.AUTH_CLAIM: {"chatgpt_account_id": claim}})
    read = q.read_tokens({"tokens": {"access_token": "a", "id_token": id_token, **tokens}}, "f")
    assert read.sign_in.account == account
    assert read.headers().get("chatgpt-account-id", "") == account


@pytest.mark.parametrize(
    ("claim", "value"), [(True, "true"), (False, None), ("true", None), (1, None), (None, None)]
)
def test_fedramp_account_is_marked(claim: Any, value: str | None) -> None:
    id_token = wire.jwt({q.AUTH_CLAIM: {"chatgpt_account_is_fedramp": claim}})
    tokens = q.read_tokens({"tokens": {"access_token": "a", "id_token": id_token}}, "f")
    assert tokens.headers().get("x-openai-fedramp") == value


@pytest.mark.parametrize(
    "id_token",
    [
        None,
        5,
        "",
        "a.b",
        "a.!.c",
        "a.é.c",
        f"a.{wire.b64url(b'[1]')}.c",
        wire.jwt({q.AUTH_CLAIM: "text"}),
        f"a.{wire.b64url(b'[' * 100_000)}.c",
    ],
)
def test_unreadable_id_token_does_not_matter(id_token: Any) -> None:
    tokens = q.read_tokens(
        {"tokens": {"access_token": "a", "id_token": id_token, "account_id": "acc"}}, "f"
    )
    assert (tokens.sign_in.account, tokens.sign_in.plan, tokens.fedramp) == ("acc", "", False)


@pytest.mark.parametrize(
    "exp",
    [
        None,
        "soon",
        True,
        [],
        {},
        -1,
        0,
        1.5,
        float("inf"),
        pytest.param(
            10**400),
        pytest.param(
            float("nan")),
    ],
)
def test_expiry_of_any_type_is_read(exp: Any) -> None:
    tokens = q.read_tokens({"tokens": {"access_token": wire.jwt({"exp": exp})}}, "f")
    expires = tokens.sign_in.expires
    assert isinstance(expires, float)
    assert expires == expires


def test_repr_hides_the_tokens(credentials: q.Credentials, issuer: Issuer) -> None:
    tokens = credentials.current_tokens()
    shown = f"{tokens!r} {tokens} {[tokens]}"
    assert tokens.sign_in.account in shown
    assert not any(token in shown for token in issuer.tokens.values())


@pytest.mark.parametrize(
    ("mode", "api_key"), [("chatgpt", "sk-beside"), ("ChatGPT", None), (None, "sk-beside")]
)
def test_mode_decides_not_the_api_key(
    mode: str | None, api_key: str | None, path: Path, issuer: Issuer
) -> None:
    wire.write_auth(path, issuer, auth_mode=mode, OPENAI_API_KEY=api_key)
    tokens = q.Credentials(str(path), issuer.token_issuer, issuer.fetch).current_tokens()
    assert tokens.access_token == issuer.access_token


# -- refresh ------------------------------------------------------------------


def expire_in(issuer: Issuer, path: Path, seconds: float, **overrides: Any) -> None:
    """Write a file whose access token has so long to live; the next ones live long."""
    issuer.expires_in = seconds
    issuer.rotate()
    issuer.expires_in = 864_000.0
    wire.write_auth(path, issuer, **overrides)


def test_refresh_keeps_what_it_does_not_know(path: Path, credentials: q.Credentials, issuer: Issuer) -> None:
    before = stored(path)
    tokens = credentials.after_401(credentials.current_tokens())
    after = stored(path)
    assert issuer.asked == [
        {
            "client_id": wire.CLIENT_ID,
            "grant_type": "refresh_token",
            "refresh_reason": "unauthorized_recovery",
            "refresh_token": before["tokens"]["refresh_token"],
        }
    ]
    assert tokens.access_token == issuer.access_token
    assert after["tokens"] == {**before["tokens"], **issuer.tokens}
    assert {**after, "tokens": 0, "last_refresh": 0} == {**before, "tokens": 0, "last_refresh": 0}
    assert abs(q.unix_time(after["last_refresh"]) - time.time()) < 60
    assert [each.name for each in path.parent.iterdir() if "auth.lock" not in each.name] == ["auth.json"]


@pytest.mark.parametrize(
    "returned",
    [
        ("access_token",),
        ("access_token", "id_token"),
        ("access_token", "refresh_token"),
        pytest.param(
            ("refresh_token",)),
    ],
)
def test_only_returned_tokens_are_replaced(
    returned: tuple[str, ...], path: Path, credentials: q.Credentials, issuer: Issuer
) -> None:
    before = stored(path)["tokens"]
    new = {name: issuer.rotate()[name] for name in returned}
    issuer.answers = [json_answer(200, {**new, "token_type": "Bearer"})]
    credentials.after_401(credentials.current_tokens())
    assert stored(path)["tokens"] == {**before, **new}


@posix
def test_written_file_is_private(path: Path, credentials: q.Credentials) -> None:
    path.chmod(0o644)
    credentials.after_401(credentials.current_tokens())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@posix
def test_link_stays_a_link(path: Path, tmp_path: Path, issuer: Issuer) -> None:
    (tmp_path / "home").mkdir()
    link = tmp_path / "home" / "auth.json"
    link.symlink_to(path)
    credentials = q.Credentials(str(link), issuer.token_issuer, issuer.fetch)
    credentials.after_401(credentials.current_tokens())
    assert link.is_symlink()
    assert stored(path)["tokens"]["access_token"] == issuer.access_token
    assert (tmp_path / "home" / "auth.lock").exists()  # beside the link: that folder is CODEX_HOME


@pytest.mark.parametrize(
    ("seconds", "refreshes"),
    [(3600, 0), (q.TOKEN_MARGIN + 30, 0), (q.TOKEN_MARGIN - 30, 1), (5, 1), (-60, 1)],
)
def test_refresh_ahead_of_expiry(
    seconds: float, refreshes: int, path: Path, credentials: q.Credentials, issuer: Issuer
) -> None:
    expire_in(issuer, path, seconds)
    tokens = credentials.bearer()
    assert [each["refresh_reason"] for each in issuer.asked] == ["proactive_expiry"] * refreshes
    assert tokens.access_token == issuer.access_token


@pytest.mark.parametrize(("days", "refreshes"), [(7, 0), (9, 1)])
def test_opaque_token_is_refreshed_by_its_age(days: int, refreshes: int, path: Path, issuer: Issuer) -> None:
    written = time.strftime("%Y-%m-%dT%H:%M:%S.123456789Z", time.gmtime(time.time() - days * 86400))
    wire.write_auth(path, issuer, tokens={"access_token": "opaque"}, last_refresh=written)
    q.Credentials(str(path), issuer.token_issuer, issuer.fetch).bearer()
    assert len(issuer.asked) == refreshes


@pytest.mark.parametrize(
    "last_refresh", [None, 5, "", "yesterday", "9999-99-99T99:99:99Z", "0001-01-01T00:00:00Z"]
)
def test_opaque_token_of_unknown_age_is_used(last_refresh: Any, path: Path, issuer: Issuer) -> None:
    wire.write_auth(
        path, issuer, tokens={"access_token": "opaque", "refresh_token": None}, last_refresh=last_refresh
    )
    assert q.Credentials(str(path), issuer.token_issuer, issuer.fetch).bearer().access_token == "opaque"


PASSING: list[q.BufferedReply | q.BridgeError] = [
    q.BadUpstream("unreachable"),
    q.UpstreamTimeout("slow"),
    json_answer(500, {}),
    json_answer(429, {"error": "slow_down"}),
    json_answer(403, {}),
    json_answer(400, {"error": {"code": "invalid_request"}}),
    json_answer(200, {}),
    json_answer(200, []),
    json_answer(200, {"access_token": 5}),
    json_answer(200, {"access_token": ""}),
    q.BufferedReply(200, {}, b"<html>"),
    json_answer(400, {"error": [], "code": {}}),
    json_answer(400, {"error": {"code": ["invalid_grant"]}}),
]
FINAL = [
    json_answer(401, {}),
    q.BufferedReply(401, {}, b"<html>"),
    json_answer(400, {"error": "invalid_grant"}),
    json_answer(400, {"error": {"code": "invalid_grant"}}),
    json_answer(400, {"error": {"code": "refresh_token_expired"}}),
    json_answer(403, {"code": "refresh_token_reused"}),
    json_answer(400, {"error": "refresh_token_invalidated"}),
]


@pytest.mark.parametrize("answer", PASSING, ids=repr)
def test_refresh_ahead_that_fails_leaves_the_old_token(
    answer: q.BufferedReply | q.BridgeError, path: Path, credentials: q.Credentials, issuer: Issuer
) -> None:
    expire_in(issuer, path, 60)
    before = path.read_bytes()
    issuer.answers = [answer]
    assert credentials.bearer().access_token == issuer.access_token
    assert path.read_bytes() == before


def test_file_that_could_not_be_opened_is_tried_again(
    path: Path, credentials: q.Credentials, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(q, "open", refuse, raising=False)
    with pytest.raises(q.NotSignedIn, match="Too many open files"):
        credentials.current_tokens()
    monkeypatch.delattr(q, "open")
    clock.skew += q.REFRESH_PAUSE
    assert credentials.current_tokens().access_token


def test_refresh_ahead_that_fails_is_not_tried_by_each_request(
    path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    expire_in(issuer, path, q.TOKEN_MARGIN - 30)
    issuer.answers = [q.UpstreamTimeout("slow")]
    for _ in range(3):
        credentials.bearer()
        clock.skew += q.REFRESH_PAUSE + 1
    assert len(issuer.asked) == 1
    clock.skew += q.AHEAD_PAUSE_SECONDS
    credentials.bearer()
    assert len(issuer.asked) == 2


@pytest.mark.parametrize("answer", PASSING, ids=repr)
def test_passing_failure_is_asked_again_after_a_second(
    answer: q.BufferedReply | q.BridgeError, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    held = credentials.current_tokens()
    issuer.answers = [answer]
    for _ in range(3):
        with pytest.raises((q.BadUpstream, q.UpstreamTimeout)):
            credentials.after_401(held)
    assert len(issuer.asked) == 1
    clock.skew += q.REFRESH_PAUSE
    assert credentials.after_401(held).access_token == issuer.access_token
    assert len(issuer.asked) == 2


@pytest.mark.parametrize("answer", FINAL, ids=repr)
def test_dead_refresh_token_is_asked_about_once(
    answer: q.BufferedReply, path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    held = credentials.current_tokens()
    before = path.read_bytes()
    issuer.answers = [answer]
    for _ in range(3):
        with pytest.raises(q.NotSignedIn, match="codex login"):
            credentials.after_401(held)
        clock.skew += 3600
    assert len(issuer.asked) == 1
    assert path.read_bytes() == before
    issuer.rotate()
    wire.write_auth(path, issuer)
    assert credentials.bearer().access_token == issuer.access_token
    assert len(issuer.asked) == 1


@pytest.mark.parametrize(("seconds", "works"), [(60, True), (-60, False)])
def test_dead_refresh_token_leaves_an_access_token_its_life(
    seconds: float, works: bool, path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    expire_in(issuer, path, seconds)
    issuer.answers = [FINAL[0]]
    with contextlib.nullcontext() if works else pytest.raises(q.NotSignedIn):
        assert credentials.bearer().access_token == issuer.access_token


def test_missing_refresh_token_is_not_asked_about(path: Path, issuer: Issuer) -> None:
    wire.write_auth(path, issuer, tokens={"refresh_token": None})
    credentials = q.Credentials(str(path), issuer.token_issuer, issuer.fetch)
    with pytest.raises(q.NotSignedIn, match="codex login"):
        credentials.after_401(credentials.bearer())
    assert issuer.asked == []


def test_threads_that_met_a_401_together_cost_one_refresh(credentials: q.Credentials, issuer: Issuer) -> None:
    held = credentials.current_tokens()
    together = threading.Barrier(12)

    def meet(_: int) -> q.Tokens:
        together.wait(5)
        return credentials.after_401(held)

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(meet, range(12)))
    assert len(issuer.asked) == 1
    assert {each.access_token for each in found} == {issuer.access_token}


def test_refresh_ahead_holds_nobody_up(path: Path, credentials: q.Credentials, issuer: Issuer) -> None:
    expire_in(issuer, path, q.TOKEN_MARGIN - 30)
    asked, answered = threading.Event(), threading.Event()

    def hang() -> None:
        asked.set()
        assert answered.wait(5)

    issuer.meanwhile = hang
    with ThreadPoolExecutor(2) as pool:
        refreshing = pool.submit(credentials.bearer)
        assert asked.wait(5)
        other = pool.submit(credentials.bearer)
        try:
            assert other.result(0.3).refresh_token == issuer.refresh_token
        finally:
            answered.set()
            refreshing.result(5)


# -- another program beside the bridge ------------------------------------------


def test_file_that_changed_saves_the_refresh(path: Path, credentials: q.Credentials, issuer: Issuer) -> None:
    held = credentials.current_tokens()
    issuer.rotate()
    wire.write_auth(path, issuer)
    assert credentials.after_401(held).access_token == issuer.access_token
    assert issuer.asked == []


HOLDER = """
import os, sys
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
try:
    import fcntl
except ImportError:
    import msvcrt
    msvcrt.locking(handle, msvcrt.LK_LOCK, 1)
else:
    fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def lock_held_elsewhere(path: Path) -> Iterator[Callable[[], None]]:
    """Let another process hold auth.lock; give what releases it."""
    words = [sys.executable, "-c", HOLDER, str(path.parent / "auth.lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"

        def release() -> None:
            holder.communicate("\n", 5)

        yield release
        if holder.poll() is None:
            release()


def test_refresh_waits_for_a_codex_that_refreshes(
    path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    held = credentials.current_tokens()
    with lock_held_elsewhere(path) as release:

        def codex_is_done() -> None:
            clock.on_sleep = lambda: None
            issuer.rotate()
            wire.write_auth(path, issuer)
            release()

        clock.on_sleep = codex_is_done
        found = credentials.after_401(held)
    assert found.access_token == issuer.access_token
    assert issuer.asked == []


def test_lock_that_stays_taken_does_not_stop_the_refresh(
    path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    with lock_held_elsewhere(path):
        found = credentials.after_401(credentials.current_tokens())
    assert found.access_token == issuer.access_token
    assert clock.skew == pytest.approx(q.LOCK_SECONDS, abs=0.1)


def test_lock_is_held_while_the_server_is_asked(
    path: Path, credentials: q.Credentials, issuer: Issuer
) -> None:
    fcntl = pytest.importorskip("fcntl")
    free: list[bool] = []

    def try_lock() -> None:
        with open(path.parent / "auth.lock", "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free.append(True)
            except OSError:
                free.append(False)

    issuer.meanwhile = try_lock
    credentials.after_401(credentials.current_tokens())
    try_lock()
    assert free == [False, True]


def test_newer_file_is_not_overwritten(path: Path, credentials: q.Credentials, issuer: Issuer) -> None:
    other = Issuer()
    issuer.meanwhile = lambda: wire.write_auth(path, other)
    found = credentials.after_401(credentials.current_tokens())
    assert found.access_token == other.access_token
    assert stored(path)["tokens"]["refresh_token"] == other.refresh_token


def test_file_that_changed_beside_its_tokens_keeps_the_change(
    path: Path, credentials: q.Credentials, issuer: Issuer
) -> None:
    held = credentials.current_tokens()
    issuer.meanwhile = lambda: path.write_text(json.dumps({**stored(path), "added": 1}))
    found = credentials.after_401(held)
    assert stored(path)["added"] == 1
    assert stored(path)["tokens"]["access_token"] == found.access_token == issuer.access_token


def test_sign_out_during_a_refresh_stands(
    path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    issuer.meanwhile = path.unlink
    with pytest.raises(q.NotSignedIn, match="does not exist"):
        credentials.after_401(credentials.current_tokens())
    assert not path.exists()


def test_other_sign_in_during_a_refresh_stands(
    path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    other = {"auth_mode": "apikey", "OPENAI_API_KEY": "sk-of-the-user"}
    issuer.meanwhile = lambda: path.write_text(json.dumps(other))
    with contextlib.suppress(q.NotSignedIn):
        credentials.after_401(credentials.current_tokens())
    assert stored(path) == other


# -- a file that cannot be written ----------------------------------------------


def test_new_tokens_survive_a_failed_write(
    path: Path, credentials: q.Credentials, issuer: Issuer, log_lines: LogLines,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(q, "write_private", read_only)
        found = credentials.after_401(credentials.current_tokens())
    assert found.access_token == issuer.access_token
    assert path.read_bytes() == before
    assert credentials.bearer() == found
    assert any("Read-only file system" in line for line in log_lines.lines)
    assert not any(token in line for token in issuer.tokens.values() for line in log_lines.lines)
    credentials.after_401(found)  # goes on from the tokens in memory, and writes them now
    assert issuer.asked[1]["refresh_token"] == found.refresh_token
    assert stored(path)["tokens"]["refresh_token"] == issuer.refresh_token


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_no_other(
    step: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        q.write_private(str(path), {"new": True})
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["auth.json"]


LATER = 61.0  # seconds in which a write that failed is tried again, at the most
REFUSED_PATHS: dict[str, int] = {"full": errno.ENOSPC, "read-only": errno.EROFS, "folder": errno.EACCES,
                                 "busy": errno.EBUSY, "device": errno.EXDEV, "open": errno.EACCES,
                                 "rename": errno.ENOSPC}


class Disk:
    """The disk under auth.json; `problem` says what is wrong with it now, "" for nothing.

    full: nothing more can be written · read-only: no file can be opened for writing · folder: no file can be
    made in it · busy, device, open, rename: no file can take the place of auth.json (a bind mount; Windows;
    no room in the folder).
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()  # of the code under test, where the fixture is used
        self.problem = ""
        self.failures = 0
        self.before_replace: Callable[[], None] = lambda: None
        self._folder = str(folder)
        self._open, self._fsync, self._replace = os.open, os.fsync, os.replace
        monkeypatch.setattr(os, "open", self.open)
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)
        monkeypatch.setattr(q, "open", self.open_file, raising=False)

    def _fail(self) -> None:
        self.failures += 1
        number = REFUSED_PATHS[self.problem]
        raise OSError(number, os.strerror(number))

    def _check_open(self, path: Any, writes: bool, makes: bool) -> None:
        if not str(path).startswith(self._folder) or not writes:
            return
        if self.problem == "read-only" or (self.problem == "folder" and makes and not os.path.exists(path)):
            self._fail()

    def open(self, path: Any, flags: int, *words: Any, **options: Any) -> int:
        """Take the place of os.open."""
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR))
        self._check_open(path, writes, bool(flags & os.O_CREAT))
        return self._open(path, flags, *words, **options)

    def open_file(self, path: Any, mode: str = "r", *words: Any, **options: Any) -> Any:
        """Take the place of open in the code under test."""
        self._check_open(path, not set("wax+").isdisjoint(mode), not set("wax").isdisjoint(mode))
        return open(path, mode, *words, **options)

    def fsync(self, handle: int) -> None:
        """Take the place of os.fsync."""
        if self.problem == "full":
            self._fail()
        self._fsync(handle)

    def replace(self, source: Any, target: Any) -> None:
        """Take the place of os.replace."""
        self.before_replace()
        if self.problem in ("busy", "device", "open", "rename", "read-only"):
            self._fail()
        self._replace(source, target)


@pytest.fixture
def disk(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Put a disk under auth.json that can fail."""
    made = Disk(path.parent, monkeypatch)
    made.clock = clock
    return made


def refreshed(credentials: q.Credentials) -> q.Tokens:
    """Refresh, as after a 401."""
    return credentials.after_401(credentials.current_tokens())


def saved(path: Path) -> str:
    """Return the refresh token in the file."""
    return str(stored(path)["tokens"]["refresh_token"])


# -- a write that fails ---------------------------------------------------------------


@pytest.mark.parametrize("problem", ["full", "read-only", "rename"])
@pytest.mark.parametrize("use", ["bearer", "current_tokens"])
def test_refreshed_token_is_written_once_it_can_be(
    use: str, problem: str, path: Path, credentials: q.Credentials, issuer: Issuer, disk: Disk
) -> None:
    clock = disk.clock
    before, disk.problem = path.read_bytes(), problem
    found = refreshed(credentials)
    assert path.read_bytes() == before  # whole, and not written over while there is no room
    for _ in range(3):
        clock.skew += LATER
        assert getattr(credentials, use)() == found  # the disk is as it was
    assert path.read_bytes() == before
    disk.problem = ""
    clock.skew += LATER
    assert getattr(credentials, use)() == found
    assert saved(path) == issuer.refresh_token
    assert len(issuer.asked) == 1
    assert [each.name for each in path.parent.iterdir() if "auth.lock" not in each.name] == ["auth.json"]


def test_write_that_fails_is_not_tried_by_each_request(
    path: Path, credentials: q.Credentials, issuer: Issuer, disk: Disk, clock: Clock
) -> None:
    disk.problem = "full"
    refreshed(credentials)
    begun, unsaved = disk.failures, saved(path)
    for _ in range(50):
        credentials.bearer()
    assert disk.failures <= begun + 1
    disk.problem = ""
    credentials.bearer()  # too early for another try
    assert saved(path) == unsaved != issuer.refresh_token
    clock.skew += q.SAVE_PAUSE
    credentials.bearer()
    assert saved(path) == issuer.refresh_token


CHANGES: dict[str, Callable[[Path], object]] = {
    "none": lambda path: None,
    "touch": lambda path: os.utime(path, (time.time() + 5, time.time() + 5)),
    "touch, long ago": lambda path: os.utime(path, ns=(1, 1)),
    "written again": lambda path: path.write_text(path.read_text("utf-8") + " ", "utf-8"),
    "another key added": lambda path: path.write_text(json.dumps({**stored(path), "added": 1}), "utf-8"),
    "another file of the same": lambda path: path.write_bytes(path.read_bytes()),
}


@pytest.mark.parametrize("reread", [True, False], ids=["reread", "by itself"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("problem", ["full", "read-only", "rename"])
def test_spent_token_never_comes_back(
    problem: str, change: str, reread: bool, credentials: q.Credentials, issuer: Issuer, disk: Disk
) -> None:
    clock, path, disk.problem = disk.clock, Path(credentials.path), problem
    found = refreshed(credentials)
    CHANGES[change](path)
    if reread:
        credentials.reread()
    for _ in range(3):
        assert credentials.bearer() == found
        clock.skew += 1
    assert len(issuer.asked) == 1
    disk.problem = ""
    clock.skew += LATER
    assert credentials.bearer() == found
    assert saved(path) == found.refresh_token
    assert stored(path).get("added") == (1 if change == "another key added" else None)
    assert refreshed(credentials).access_token == issuer.access_token
    assert [asked["refresh_token"] for asked in issuer.asked][1] == found.refresh_token


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("problem", ["full", "rename"])
def test_end_of_the_program_writes_what_could_not_be_written(
    problem: str, change: str, path: Path, credentials: q.Credentials, issuer: Issuer, disk: Disk
) -> None:
    disk.problem = problem
    found = refreshed(credentials)
    CHANGES[change](path)
    assert credentials.current_tokens() == found
    disk.problem = ""
    credentials.finish(0)
    assert saved(path) == issuer.refresh_token


@pytest.mark.parametrize("problem", ["full", "read-only", "rename"])
def test_newer_sign_in_counts_more_than_one_that_could_not_be_written(
    problem: str, path: Path, credentials: q.Credentials, disk: Disk, clock: Clock
) -> None:
    disk.problem = problem
    refreshed(credentials)
    disk.problem = ""
    other = Issuer()
    wire.write_auth(path, other)  # somebody has signed in anew
    assert credentials.bearer().access_token == other.access_token
    credentials.finish(0)
    assert saved(path) == other.refresh_token
    clock.skew += LATER
    assert credentials.bearer().access_token == other.access_token
    assert saved(path) == other.refresh_token


def fail_stat(monkeypatch: pytest.MonkeyPatch, path: Path, number: int) -> None:
    """Let nobody look at the file."""
    real = os.stat

    def stat(target: Any, *words: Any, **options: Any) -> os.stat_result:
        if str(target) == str(path):
            raise OSError(number, os.strerror(number))
        return real(target, *words, **options)

    monkeypatch.setattr(os, "stat", stat)


STAT_ERRORS = pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])


@STAT_ERRORS
def test_file_that_cannot_be_looked_at_is_no_sign_out(
    number: int, path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    held = credentials.current_tokens()
    with pytest.MonkeyPatch.context() as patch:
        issuer.meanwhile = lambda: fail_stat(patch, path, number)
        found = credentials.after_401(held)
        assert found.refresh_token == issuer.refresh_token != held.refresh_token
    clock.skew += LATER
    assert credentials.bearer() == found
    assert saved(path) == issuer.refresh_token


@STAT_ERRORS
def test_file_that_cannot_be_looked_at_is_written_at_the_end(
    number: int, path: Path, credentials: q.Credentials, issuer: Issuer, disk: Disk
) -> None:
    disk.problem = "full"
    found = refreshed(credentials)
    with pytest.MonkeyPatch.context() as patch:
        fail_stat(patch, path, number)
        assert credentials.bearer() == found
    disk.problem = ""
    credentials.finish(0)
    assert saved(path) == issuer.refresh_token


def test_newer_sign_in_beside_a_failing_write_is_read(
    path: Path, credentials: q.Credentials, disk: Disk, clock: Clock
) -> None:
    other, held = Issuer(), credentials.current_tokens()

    def fail() -> None:
        if disk.problem:
            disk.problem = ""
            wire.write_auth(path, other)
            raise OSError(errno.ENOSPC, "No space left on device")

    disk.problem, disk.before_replace = "slow", fail
    credentials.after_401(held)
    assert credentials.bearer().access_token == other.access_token
    clock.skew += LATER
    assert (credentials.bearer().access_token, saved(path)) == (other.access_token, other.refresh_token)


def test_newer_sign_in_behind_a_write_in_place_is_read(
    path: Path, credentials: q.Credentials, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, held, real = Issuer(), credentials.current_tokens(), q.file_signature

    def late(target: Any) -> Any:
        if disk.problem and saved(path) != held.refresh_token:
            disk.problem = ""
            wire.write_auth(path, other)  # just as the bridge looks at what it has written
        return real(target)

    disk.problem = "busy"
    monkeypatch.setattr(q, "file_signature", late)
    credentials.after_401(held)
    assert credentials.bearer().access_token == other.access_token


def test_sign_out_counts_more_than_a_token_that_could_not_be_written(
    path: Path, credentials: q.Credentials, disk: Disk, clock: Clock
) -> None:
    disk.problem = "full"
    refreshed(credentials)
    disk.problem = ""
    path.unlink()
    for _ in range(3):
        clock.skew += LATER
        with pytest.raises(q.NotSignedIn):
            credentials.bearer()
    assert not path.exists()


def test_failed_write_is_told_once_and_its_end_too(
    path: Path, credentials: q.Credentials, disk: Disk, clock: Clock, log_lines: LogLines
) -> None:
    disk.problem = "full"
    refreshed(credentials)
    for _ in range(20):
        clock.skew += LATER
        credentials.bearer()
    told = [line for line in log_lines.lines if "No space left" in line]
    assert 1 <= len([line for line in told if not line.startswith("DEBUG")]) <= 3
    disk.problem = ""
    clock.skew += LATER
    before = len(log_lines.lines)
    credentials.bearer()
    assert any(str(path) in line and not line.startswith("DEBUG") for line in log_lines.lines[before:])


@pytest.mark.parametrize("problem", ["folder", "busy", "device"])
def test_token_is_written_in_place_where_the_folder_cannot_be(
    problem: str, path: Path, credentials: q.Credentials, issuer: Issuer, disk: Disk, clock: Clock
) -> None:
    before, disk.problem = path.stat(), problem
    refreshed(credentials)
    clock.skew += LATER
    credentials.bearer()
    assert saved(path) == issuer.refresh_token
    assert stored(path)["agent_identity"] == {"kept": True}
    assert path.stat().st_ino == before.st_ino
    if os.name == "posix":
        assert path.stat().st_mode == before.st_mode
    left = [each.name for each in path.parent.iterdir() if "auth.lock" not in each.name]
    assert left == ["auth.json"]
    assert credentials.bearer().refresh_token == issuer.refresh_token


@posix
def test_signature_of_a_file_that_was_written_in_place_is_its_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = path.stat().st_ino

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")  # a file that is mounted by itself

    monkeypatch.setattr(os, "replace", busy)
    signature = q.write_private(str(path), {"new": True})
    assert (stored(path), path.stat().st_ino) == ({"new": True}, number)
    assert signature == q.file_signature(str(path))
    assert [each.name for each in path.parent.iterdir()] == ["auth.json"]


def test_shorter_sign_in_is_whole_when_it_is_written_in_place(
    path: Path, issuer: Issuer, disk: Disk, clock: Clock
) -> None:
    content = json.dumps(wire.auth_json(issuer), indent=8) + " " * 5000
    path.write_text(content, "utf-8")
    credentials = q.Credentials(str(path), issuer.token_issuer, issuer.fetch)
    disk.problem = "busy"
    refreshed(credentials)
    clock.skew += LATER
    credentials.bearer()
    assert saved(path) == issuer.refresh_token  # nothing of the longer one is left behind it


def test_file_that_is_open_elsewhere_on_windows_is_replaced_a_moment_later(
    path: Path, credentials: q.Credentials, issuer: Issuer, disk: Disk, clock: Clock
) -> None:
    disk.problem, tries = "open", 0

    def let_go() -> None:
        nonlocal tries
        tries += 1
        if tries == 3:
            disk.problem = ""

    clock.on_sleep = let_go
    refreshed(credentials)
    assert saved(path) == issuer.refresh_token
    assert clock.skew <= 2


def test_a_bridge_at_rest_writes_what_could_not_be_written(
    backend: wire.Backend, bridge: RunningBridge, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "SAVE_PAUSE", 0.0)
    disk = Disk(bridge.auth_file.parent, monkeypatch)
    disk.problem = "full"
    backend.revoke()
    respond(bridge, input="hi")
    for _ in range(5):
        bridge.bridge.tidy()  # what the server does every few seconds
    assert saved(bridge.auth_file) != backend.refresh_token
    errors = [line for line in log_lines.lines if "No space left" in line and line.startswith("ERROR")]
    assert len(errors) == 1
    disk.problem = ""
    bridge.bridge.tidy()
    assert saved(bridge.auth_file) == backend.refresh_token


def test_a_bridge_at_rest_closes_lines_that_upstream_has_closed(
    backend: wire.Backend, bridge: RunningBridge
) -> None:
    respond(bridge, input="hi")
    upstream = bridge.bridge.upstream
    assert until(lambda: upstream.kept() > 0)
    with upstream._lock:
        kept = [connection for _, _, connection in upstream._idle]
    backend.cut_connections()

    def tidied() -> bool:
        bridge.bridge.tidy()
        return all(connection.sock.fileno() == -1 for connection in kept)  # others may have come

    assert until(tidied)


def test_leftovers_of_a_killed_program_are_removed_at_the_start(
    backend: wire.Backend, start: Start, tmp_path: Path
) -> None:
    bridge = start()
    folder = bridge.auth_file.parent
    old, young = folder / f".auth-{'0' * 16}", folder / f".auth-{'1' * 16}"
    for path in (old, young):
        path.write_text("{}")
    os.utime(old, (time.time() - 100, time.time() - 100))
    bridge.bridge.warm_up(threading.Event())
    assert until(lambda: not old.exists())
    assert young.exists()  # another program may be writing it


def test_no_turn_is_lost_with_a_full_disk_and_a_hang_up(
    backend: wire.Backend, bridge: RunningBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REFRESH_PAUSE", "SAVE_PAUSE"):
        monkeypatch.setattr(q, name, 0.02, raising=False)
    disk = Disk(bridge.auth_file.parent, monkeypatch)
    disk.problem = "full"
    backend.revoke()
    respond(bridge, input="hi")
    for _ in range(3):
        bridge.bridge.reread()  # what SIGHUP does
        respond(bridge, input="hi")
    assert backend.refreshes == 1
    disk.problem = ""

    def written() -> bool:
        respond(bridge, input="hi")
        return saved(bridge.auth_file) == backend.refresh_token

    assert until(written, 2)
    assert backend.refreshes == 1


# -- a file that cannot be read for a moment --------------------------------------------


class Door:
    """Stand in for `open` in the code under test: the next tries fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: OSError | None = None
        monkeypatch.setattr(q, "open", self, raising=False)

    def __call__(self, path: Any, *words: Any, **options: Any) -> Any:
        if self.failing is not None:
            raise self.failing
        return open(path, *words, **options)


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Door:
    """Have files that cannot be opened for a while."""
    return Door(monkeypatch)


TROUBLES = [(seconds, number) for seconds in (0.05, 1.0, 30.0)
            for number in (errno.EMFILE, errno.EACCES, errno.EIO, errno.EINTR)]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_file_that_is_unreadable_as_the_reply_comes_costs_no_token(
    trouble: tuple[float, int], path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock,
    door: Door,
) -> None:
    held, (seconds, number), begun = credentials.current_tokens(), trouble, 0.0

    def shut() -> None:
        nonlocal begun
        begun = clock.skew
        path.touch()
        door.failing = OSError(number, os.strerror(number))

    def open_again() -> None:
        if clock.skew > begun + seconds:
            door.failing = None

    issuer.meanwhile, clock.on_sleep = shut, open_again
    found = credentials.after_401(held)
    assert found.access_token == issuer.access_token
    door.failing = None
    clock.skew += LATER
    assert credentials.bearer() == found
    assert saved(path) == issuer.refresh_token


@pytest.mark.parametrize("how", ["gone", "empty", "torn"])
def test_file_that_is_away_as_the_reply_comes_costs_no_token(
    how: str, path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    held, before = credentials.current_tokens(), path.read_bytes()

    def away() -> None:
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(b"" if how == "empty" else before[:99])

    issuer.meanwhile = away
    clock.on_sleep = lambda: path.write_bytes(before)
    assert credentials.after_401(held).access_token == issuer.access_token
    assert saved(path) == issuer.refresh_token


@pytest.mark.parametrize("torn", [b"", b"{"])
def test_a_file_that_cannot_be_read_for_a_moment_is_no_sign_out(
    torn: bytes, path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    issuer.meanwhile = lambda: path.write_bytes(torn)
    assert credentials.after_401(credentials.current_tokens()).access_token == issuer.access_token
    assert stored(path)["tokens"]["refresh_token"] == issuer.refresh_token


# -- what stands in the file after a write ----------------------------------------------


def test_sign_in_that_is_written_right_behind_ours_is_read(
    path: Path, credentials: q.Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, replace = Issuer(), os.replace

    def and_then(source: Any, target: Any) -> None:
        replace(source, target)
        monkeypatch.setattr(os, "replace", replace)
        wire.write_auth(path, other)

    held = credentials.current_tokens()
    monkeypatch.setattr(os, "replace", and_then)
    credentials.after_401(held)
    assert credentials.bearer().access_token == other.access_token


LEFT_OVER = f".auth-{'0123456789abcdef'}"


@pytest.mark.parametrize("when", ["refresh", "login"])
def test_left_over_of_a_writer_that_was_killed_is_cleaned(
    when: str, path: Path, credentials: q.Credentials, issuer: Issuer
) -> None:
    running = path.parent / f".auth-{'1' * 16}"  # of a writer that is at it
    others = [path.parent / name for name in (".auth-notes", ".authors", "auth-0123456789abcdef")]
    for each in (running, *others):
        each.write_text("mine", "utf-8")
    for each in others:
        os.utime(each, (time.time() - 3600, time.time() - 3600))
    left_over = path.parent / LEFT_OVER
    left_over.write_text(json.dumps(wire.auth_json(issuer)), "utf-8")
    os.utime(left_over, (time.time() - 3600, time.time() - 3600))
    if when == "refresh":
        refreshed(credentials)
    else:
        q.save_sign_in(str(path), issuer.rotate())
    assert not left_over.exists()
    assert all(each.exists() for each in (running, *others))


@posix
def test_left_over_is_cleaned_where_a_link_points_to(path: Path, tmp_path: Path, issuer: Issuer) -> None:
    (tmp_path / "home").mkdir()
    link = tmp_path / "home" / "auth.json"
    link.symlink_to(path)
    left_over = path.parent / LEFT_OVER
    left_over.write_text("{}", "utf-8")
    os.utime(left_over, (time.time() - 3600, time.time() - 3600))
    refreshed(q.Credentials(str(link), issuer.token_issuer, issuer.fetch))
    assert not left_over.exists()


# -- a refusal that may be another's success ---------------------------------------------

REUSED = [
    json_answer(401, {"error": {"code": "refresh_token_reused"}}),
    json_answer(400, {"error": {"code": "refresh_token_reused"}}),
    json_answer(403, {"code": "refresh_token_reused"}),
    json_answer(400, {"error": "refresh_token_invalidated"}),
]


@pytest.mark.parametrize("answer", REUSED, ids=repr)
@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.5])
def test_token_that_another_program_spent_is_waited_for(
    seconds: float, answer: q.BufferedReply, path: Path, credentials: q.Credentials, issuer: Issuer,
    clock: Clock,
) -> None:
    held, begun = credentials.current_tokens(), clock.skew

    def other_writes() -> None:
        if clock.skew >= begun + seconds:
            wire.write_auth(path, issuer)

    def other_wins() -> None:
        issuer.rotate()
        if not seconds:
            wire.write_auth(path, issuer)

    issuer.answers, issuer.meanwhile, clock.on_sleep = [answer], other_wins, other_writes
    assert credentials.after_401(held).access_token == issuer.access_token
    assert len(issuer.asked) == 1
    assert credentials.bearer().access_token == issuer.access_token


def test_expired_token_that_another_program_renews_is_waited_for(
    path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    expire_in(issuer, path, -60)

    def other_writes() -> None:
        if clock.skew >= 0.5:
            wire.write_auth(path, issuer)

    issuer.answers, issuer.meanwhile, clock.on_sleep = [REUSED[0]], issuer.rotate, other_writes
    assert credentials.bearer().access_token == issuer.access_token


def test_refusal_that_stays_final_costs_two_seconds(
    credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    held, begun = credentials.current_tokens(), clock.skew
    issuer.answers = [REUSED[0]]
    with pytest.raises(q.NotSignedIn, match="codex login"):
        credentials.after_401(held)
    assert 1.5 <= clock.skew - begun <= 3
    begun = clock.skew
    with pytest.raises(q.NotSignedIn):
        credentials.after_401(held)
    assert clock.skew == begun  # the second time it is known


# -- a clock that is ahead ------------------------------------------------------------


class FastClock(Clock):
    """A clock whose wall time is ahead; `skew` moves both of its times."""

    ahead = 30 * 86400.0

    def time(self) -> float:
        """Return the wall clock."""
        return time.time() + self.ahead + self.skew


@pytest.fixture
def fast_clock(monkeypatch: pytest.MonkeyPatch) -> FastClock:
    """Have the host's clock be a month ahead."""
    fast = FastClock()
    monkeypatch.setattr(q, "time", fast)
    return fast


def test_token_just_received_is_trusted_although_the_clock_is_ahead(
    path: Path, credentials: q.Credentials, issuer: Issuer, fast_clock: FastClock
) -> None:
    for _ in range(5):
        assert credentials.bearer().access_token == issuer.access_token
        fast_clock.skew += q.AHEAD_PAUSE_SECONDS + 1
    assert len(issuer.asked) == 1
    os.utime(path)
    credentials.reread()
    assert credentials.bearer().access_token == issuer.access_token
    assert len(issuer.asked) == 1


def test_token_that_was_trusted_is_renewed_when_it_is_refused(
    credentials: q.Credentials, issuer: Issuer, fast_clock: FastClock
) -> None:
    tokens = credentials.bearer()
    assert credentials.after_401(tokens).access_token == issuer.access_token != tokens.access_token
    assert len(issuer.asked) == 2
    credentials.bearer()
    assert len(issuer.asked) == 2


def test_token_that_was_trusted_is_renewed_at_the_end_of_its_life(
    credentials: q.Credentials, issuer: Issuer, fast_clock: FastClock
) -> None:
    credentials.bearer()
    fast_clock.skew += issuer.expires_in
    credentials.bearer()
    assert len(issuer.asked) == 2


# -- the lock -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL,
                                    errno.ENOSYS])
def test_lock_that_always_fails_costs_its_seconds_once(
    number: int, credentials: q.Credentials, issuer: Issuer, clock: Clock, log_lines: LogLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    refreshed(credentials)
    assert clock.skew <= q.LOCK_SECONDS + 0.2
    before = clock.skew
    for _ in range(3):
        refreshed(credentials)
    assert clock.skew - before < 0.5
    told = [line for line in log_lines.lines if "auth.lock" in line and not line.startswith("DEBUG")]
    assert len(told) == 1
    assert "without the lock" in told[0]


def test_lock_that_was_not_had_is_logged(
    path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock, log_lines: LogLines
) -> None:
    with lock_held_elsewhere(path):
        refreshed(credentials)
    assert any("auth.lock" in line and not line.startswith("DEBUG") for line in log_lines.lines)
    assert issuer.asked


class Msvcrt(types.ModuleType):
    """Stand in for Windows' msvcrt: what was locked and unlocked, in order."""

    LK_UNLCK, LK_LOCK, LK_NBLCK, LK_RLCK, LK_NBRLCK = 0, 1, 2, 3, 4

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.calls: list[int] = []
        self.failing = 0

    def locking(self, handle: int, mode: int, size: int) -> None:
        """Lock some bytes of a file."""
        assert os.fstat(handle)
        assert size >= 1
        self.calls.append(mode)
        if mode != self.LK_UNLCK and self.failing:
            self.failing -= 1
            raise OSError(errno.EDEADLK, "Resource deadlock avoided")


@pytest.fixture
def msvcrt(monkeypatch: pytest.MonkeyPatch) -> Msvcrt:
    """Be on Windows as far as locks go."""
    module = Msvcrt()
    monkeypatch.setitem(sys.modules, "msvcrt", module)
    monkeypatch.setattr(q, "msvcrt", module, raising=False)
    monkeypatch.setattr(q, "fcntl", None)
    return module


def test_lock_of_windows_is_held_while_the_server_is_asked(
    credentials: q.Credentials, issuer: Issuer, msvcrt: Msvcrt
) -> None:
    at_the_question: list[list[int]] = []
    issuer.meanwhile = lambda: at_the_question.append(list(msvcrt.calls))
    refreshed(credentials)
    assert at_the_question[0][-1:] in ([msvcrt.LK_NBLCK], [msvcrt.LK_LOCK])
    assert msvcrt.calls.count(msvcrt.LK_UNLCK) <= 1  # the end of the handle is the lock's end, too


def test_lock_of_windows_is_tried_for_some_seconds(
    credentials: q.Credentials, issuer: Issuer, msvcrt: Msvcrt, clock: Clock
) -> None:
    msvcrt.failing = 3
    refreshed(credentials)
    assert len([mode for mode in msvcrt.calls if mode != msvcrt.LK_UNLCK]) == 4
    assert clock.skew <= q.LOCK_SECONDS


# -- threads ---------------------------------------------------------------------------


def test_unsaved_token_is_written_once_by_many_threads(
    path: Path, credentials: q.Credentials, issuer: Issuer, disk: Disk, clock: Clock
) -> None:
    disk.problem = "full"
    found = refreshed(credentials)
    disk.problem = ""
    clock.skew += LATER
    threads = [threading.Thread(target=credentials.bearer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    with contextlib.suppress(q.NotSignedIn):
        assert credentials.bearer() == found
    assert saved(path) == issuer.refresh_token


def test_the_end_waits_for_a_refresh(credentials: q.Credentials, issuer: Issuer, path: Path) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow() -> None:
        asked.set()
        assert answer.wait(5)

    issuer.meanwhile = slow
    with ThreadPoolExecutor(2) as pool:
        refresh = pool.submit(credentials.after_401, credentials.current_tokens())
        assert asked.wait(5)
        end = pool.submit(credentials.finish, 5)
        assert not end.done()
        answer.set()
        end.result(5)
        assert stored(path)["tokens"]["access_token"] == refresh.result(5).access_token


def claims(account: Any, **more: Any) -> str:
    """Return a token whose claims name an account."""
    return wire.jwt({q.AUTH_CLAIM: {"chatgpt_account_id": account, **more}})


@pytest.mark.parametrize("tokens", [
    {"id_token": None, "account_id": None}, {"id_token": "", "account_id": ""},
    {"id_token": "no.jwt.at-all", "account_id": None}, {"id_token": wire.jwt({}), "account_id": 5},
], ids=["null", "empty", "odd", "without-claims"])
def test_a_turn_goes_well_with_the_access_tokens_account(
    start: Start, backend: wire.Backend, tmp_path: Path, tokens: dict[str, Any]
) -> None:
    wire.write_auth(tmp_path / "auth.json", backend, tokens=tokens)
    bridge = start()
    assert ask(bridge, REQUEST).status == 200, backend.refusals
    sign_in = wire.get(bridge.address, "/status").json["sign_in"]
    assert (sign_in["state"], sign_in["plan"]) == ("ok", backend.plan)
    assert backend.refreshes == 0  # a refresh would bring an id token


@pytest.mark.parametrize(("tokens", "account"), [
    ({"account_id": "acc-file", "id_token": claims("acc-id"), "access_token": claims("acc-access")},
     "acc-file"),
    ({"id_token": claims("acc-id"), "access_token": claims("acc-access")}, "acc-id"),
    ({"id_token": claims(None), "access_token": claims("acc-access")}, "acc-access"),
    ({"id_token": claims("two\r\nlines"), "access_token": claims("acc-access")}, "acc-access"),
    ({"access_token": claims("acc-access")}, "acc-access"),
    ({"access_token": claims(["acc"])}, ""), ({"access_token": claims("two\r\nlines")}, ""),
    ({"access_token": "opaque"}, ""),
])
def test_account_is_the_files_then_the_id_tokens_then_the_access_tokens(
    tokens: dict[str, Any], account: str
) -> None:
    assert q.read_tokens({"tokens": tokens}, "f").sign_in.account == account


@pytest.mark.parametrize(("tokens", "value"), [
    ({"access_token": claims("a", chatgpt_account_is_fedramp=True)}, "true"),
    ({"access_token": claims("a", chatgpt_account_is_fedramp=False)}, None),
    ({"id_token": claims("a", chatgpt_account_is_fedramp=False),
      "access_token": claims("a", chatgpt_account_is_fedramp=True)}, None),
])
def test_a_fedramp_account_is_marked_by_the_access_token_too(
    tokens: dict[str, Any], value: str | None
) -> None:
    assert q.read_tokens({"tokens": tokens}, "f").headers().get("x-openai-fedramp") == value
