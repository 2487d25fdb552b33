"""Room sign-in: auth.json and its refresh, beside a Codex that does the same."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import LogLines
from help import json_answer, posix

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


def test_missing_file_says_what_to_do_and_recovers(tmp_path: Path, issuer: Issuer) -> None:
    path = tmp_path / "auth.json"
    credentials = q.Credentials(str(path), issuer.token_issuer, issuer.fetch)
    with pytest.raises(q.NotSignedIn, match="codex login"):
        credentials.current_tokens()
    wire.write_auth(path, issuer)
    assert credentials.current_tokens().access_token == issuer.access_token


def test_folder_in_place_of_the_file_is_a_clear_error(tmp_path: Path, issuer: Issuer) -> None:
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
    seconds: float, works: bool, path: Path, credentials: q.Credentials, issuer: Issuer
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
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
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


@posix
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


@posix
def test_lock_that_stays_taken_does_not_stop_the_refresh(
    path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    with lock_held_elsewhere(path):
        found = credentials.after_401(credentials.current_tokens())
    assert found.access_token == issuer.access_token
    assert clock.skew == pytest.approx(q.LOCK_SECONDS, abs=0.1)


@posix
def test_lock_is_held_while_the_server_is_asked(
    path: Path, credentials: q.Credentials, issuer: Issuer
) -> None:
    import fcntl

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
    with pytest.raises(q.NotSignedIn):
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


# -- a sign-in that was received is never lost ----------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Let no file be replaced, until the patch is undone."""
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        yield patched


def test_tokens_that_could_not_be_written_are_written_later(
    path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock, full_disk: pytest.MonkeyPatch
) -> None:
    fresh = credentials.after_401(credentials.current_tokens())
    full_disk.undo()
    assert stored(path)["tokens"]["refresh_token"] != fresh.refresh_token
    credentials.current_tokens()  # too early for a second try
    assert stored(path)["tokens"]["refresh_token"] != fresh.refresh_token
    clock.skew += q.SAVE_PAUSE
    assert credentials.current_tokens() == fresh
    assert stored(path)["tokens"]["refresh_token"] == issuer.refresh_token


@pytest.mark.parametrize("change", ["reread", "touch"])
def test_a_spent_token_never_comes_back(
    change: str, path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock,
    full_disk: pytest.MonkeyPatch,
) -> None:
    fresh = credentials.after_401(credentials.current_tokens())
    if change == "reread":
        credentials.reread()
    else:
        os.utime(path, ns=(1, 1))
    assert credentials.current_tokens() == fresh
    full_disk.undo()
    credentials.finish(0)  # the end of the program
    assert stored(path)["tokens"]["refresh_token"] == issuer.refresh_token


def test_a_newer_sign_in_wins_over_unsaved_tokens(
    path: Path, credentials: q.Credentials, issuer: Issuer, full_disk: pytest.MonkeyPatch
) -> None:
    credentials.after_401(credentials.current_tokens())
    full_disk.undo()
    other = Issuer()
    wire.write_auth(path, other)
    assert credentials.current_tokens().access_token == other.access_token
    credentials.finish(0)
    assert stored(path)["tokens"]["refresh_token"] == other.refresh_token


@pytest.mark.parametrize("torn", [b"", b"{"])
def test_a_file_that_cannot_be_read_for_a_moment_is_no_sign_out(
    torn: bytes, path: Path, credentials: q.Credentials, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "TORN_SECONDS", 0)
    issuer.meanwhile = lambda: path.write_bytes(torn)
    assert credentials.after_401(credentials.current_tokens()).access_token == issuer.access_token
    assert stored(path)["tokens"]["refresh_token"] == issuer.refresh_token


def test_a_file_that_is_gone_is_a_sign_out(
    path: Path, credentials: q.Credentials, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "TORN_SECONDS", 0)
    issuer.meanwhile = path.unlink
    with pytest.raises(q.NotSignedIn, match="does not exist"):
        credentials.after_401(credentials.current_tokens())
    assert not path.exists()


@posix
def test_a_file_in_a_folder_that_cannot_be_written_is_written_in_place(
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


def test_a_write_between_ours_and_its_look_is_read(
    path: Path, credentials: q.Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, replace = Issuer(), q.replace_file

    def overtaken(temporary: str, target: str) -> None:
        replace(temporary, target)
        wire.write_auth(path, other)  # another program, before this one looks at the file again

    monkeypatch.setattr(q, "replace_file", overtaken)
    credentials.after_401(credentials.current_tokens())
    assert credentials.current_tokens().access_token == other.access_token


def test_another_program_that_won_is_waited_for(
    path: Path, credentials: q.Credentials, issuer: Issuer, clock: Clock
) -> None:
    issuer.answers.append(json_answer(401, {"error": {"code": "refresh_token_reused"}}))
    winner = Issuer()
    clock.on_sleep = lambda: wire.write_auth(path, winner)
    assert credentials.after_401(credentials.current_tokens()).access_token == winner.access_token


def test_a_token_just_received_is_trusted_whatever_the_clock_says(path: Path, issuer: Issuer) -> None:
    expire_in(issuer, path, -1000)
    issuer.expires_in = -1000  # this host's clock is ahead of every token
    credentials = q.Credentials(str(path), issuer.token_issuer, issuer.fetch)
    for _ in range(3):
        credentials.bearer()
    assert len(issuer.asked) == 1


def test_a_lock_that_never_works_costs_once(
    path: Path, credentials: q.Credentials, clock: Clock, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def never(_: int, seconds: float) -> bool:
        waits.append(seconds)
        return False

    monkeypatch.setattr(q, "_lock", never)
    for _ in range(2):
        credentials.after_401(credentials.current_tokens())
    assert waits == [q.LOCK_SECONDS, 0]
    assert any("without the lock" in line for line in log_lines.lines)


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


def test_left_over_files_with_tokens_are_removed(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (f".auth-{'0' * 16}", f".auth-{'1' * 16}", ".auth-mine"))
    for each in (old, new, other):
        each.write_text("{}")
    for each in (old, other):
        os.utime(each, (1, 1))
    q.remove_leftovers(str(tmp_path))
    assert sorted(each.name for each in tmp_path.iterdir() if each.name.startswith(".auth")) == sorted(
        each.name for each in (new, other))
