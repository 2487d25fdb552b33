"""Section 11, catalog, end to end: the model list, the names a request may use, what a client is told.

The last part holds what the backend is sent through the bridge beside what the same Codex sends it itself.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import wire
from conftest import RunningBridge, Start

import qoo_bridge as q

Object = dict[str, Any]

BRIDGE = Path(__file__).resolve().parents[1] / "qoo_bridge.py"
DAY = 86400.0  # seconds: longer than any test
AT_ONCE = -1.0  # as an age in seconds: it is always over
AGENT = "codex_exec/0.169.0 (Debian 12.0.0; x86_64) unknown (codex_exec; 0.169.0)"
CODEX = {"User-Agent": AGENT, "Originator": "codex_exec"}
LITE = {**CODEX, q.LITE_HEADER: "true"}
LOCAL_MD = "gpt-5.6-sol"  # what the default alias means with the stand-in's list: the best that is a gpt-5
HI = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
TOOL = {"type": "function", "name": "run", "strict": False, "parameters": {"type": "object"}}
CARRIER = {"type": "additional_tools", "role": "developer", "tools": [TOOL]}
PLAIN_BODY = {"model": "gpt-5.5", "input": [HI], "tools": [TOOL]}
LITE_BODY = {
    "model": "gpt-6-sol", "stream": True, "store": False, "input": [CARRIER, HI], "prompt_cache_key": "key",
    "parallel_tool_calls": False, "reasoning": {"effort": "low", "context": "all_turns"},
    "include": ["reasoning.encrypted_content"],
}
SECRET = "sk-catalog-0123456789"


def ask(bridge: RunningBridge, body: Object, headers: dict[str, str] | None = None) -> wire.RawReply:
    return wire.post(bridge.address, "/v1/responses", body, headers)


def sent(backend: wire.Backend, path: str = "/responses") -> list[wire.Request]:
    """Return what came upstream for a path."""
    with backend.changed:
        return [each for each in backend.requests if each.path == wire.full_path(path)]


def models(bridge: RunningBridge, version: str = "") -> wire.RawReply:
    return wire.get(bridge.address, f"/v1/models?client_version={version}" if version else "/v1/models")


def slugs(bridge: RunningBridge) -> list[str]:
    return [model["id"] for model in models(bridge).json["data"]]


def settle(bridge: RunningBridge) -> None:
    """Wait until no fetch of the list is running."""
    catalog = bridge.bridge.catalog
    with catalog._changed:
        assert catalog._changed.wait_for(lambda: not catalog._fetching, 5)


def held(gate: threading.Event, then: wire.Reply) -> wire.Reply:
    """Answer once the gate is open."""

    def reply(exchange: wire.Exchange) -> None:
        assert gate.wait(10)
        then(exchange)

    return reply


@pytest.fixture
def gate(backend: wire.Backend) -> Iterator[threading.Event]:
    """A gate that upstream waits at; it is open when the test ends."""
    event = threading.Event()
    yield event
    event.set()


class Lines(logging.Handler):
    """The bridge's log; a request's line is written after its answer, so a test waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        with self.changed:
            self.lines.append(f"{record.levelname} {self.format(record)}")
            self.changed.notify_all()

    def wait_for(self, text: str) -> str:
        """Return the first line with `text` in it."""
        with self.changed:
            assert self.changed.wait_for(lambda: any(text in line for line in self.lines), 5), self.lines
            return next(line for line in self.lines if text in line)


@pytest.fixture
def log() -> Iterator[Lines]:
    lines, level = Lines(), q.log.level
    q.log.addHandler(lines)
    q.log.setLevel(logging.INFO)
    yield lines
    q.log.removeHandler(lines)
    q.log.setLevel(level)


@pytest.fixture
def due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every list old as soon as it is there."""
    monkeypatch.setattr(q, "CATALOG_AGE", AT_ONCE)
    monkeypatch.setattr(q, "REFRESH_PAUSE", AT_ONCE)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no list grow old, and nobody wait for it in vain."""
    monkeypatch.setattr(q, "CATALOG_AGE", DAY)
    monkeypatch.setattr(q, "CATALOG_WAIT", DAY)


# -- when the list is fetched -------------------------------------------------

class SignsIn(threading.Event):
    """A `stop` that signs in when the bridge first waits for it."""

    def __init__(self, sign_in: Callable[[], None]) -> None:
        super().__init__()
        self.sign_in = sign_in
        self.waits = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.waits += 1
        self.sign_in()
        return False


def test_list_is_fetched_as_soon_as_there_is_a_sign_in(start: Start, backend: wire.Backend) -> None:
    bridge = start(signed_in=False)
    stop = SignsIn(lambda: wire.write_auth(bridge.auth_file, backend))
    bridge.bridge.warm_up(stop)
    (asked,) = backend.wait_for(1, "/models")
    assert stop.waits == 1
    assert (asked.query, asked.header("version")) == ("client_version=0.169.0", "0.169.0")
    assert asked.header("if-none-match") is None
    assert backend.refusals == []


def test_no_sign_in_asks_upstream_nothing(start: Start, backend: wire.Backend) -> None:
    bridge = start(signed_in=False)
    stop = threading.Event()
    stop.set()
    bridge.bridge.warm_up(stop)
    assert (models(bridge).status, models(bridge, "0.169.0").status) == (401, 401)
    assert backend.requests == []


@pytest.mark.usefixtures("fresh")
def test_start_waits_for_no_list(
    bridge: RunningBridge, backend: wire.Backend, gate: threading.Event
) -> None:
    backend.always("/models", held(gate, backend.default))
    bridge.bridge.warm_up(threading.Event())
    backend.wait_for(1, "/models")
    assert wire.get(bridge.address, "/healthz").status == 200
    assert wire.get(bridge.address, "/status").json["catalog"]["models"] == []
    assert ask(bridge, LITE_BODY, LITE).status == 200
    assert not gate.is_set()


@pytest.mark.usefixtures("fresh")
def test_own_lite_request_of_a_codex_never_waits(
    bridge: RunningBridge, backend: wire.Backend, gate: threading.Event
) -> None:
    backend.always("/models", held(gate, backend.default))
    for _ in range(2):
        assert ask(bridge, LITE_BODY, LITE).status == 200
    assert [request.json for request in sent(backend)] == [LITE_BODY] * 2


@pytest.mark.parametrize(("headers", "body", "slug"), [
    ({}, {**PLAIN_BODY, "model": "local_md"}, LOCAL_MD),
    (CODEX, {**PLAIN_BODY, "model": "local_md"}, LOCAL_MD),
    (LITE, {**LITE_BODY, "model": "local_md"}, LOCAL_MD),
    ({}, {**PLAIN_BODY, "model": "gpt-6-sol"}, "gpt-6-sol"),
    (CODEX, {**PLAIN_BODY, "model": "gpt-6-sol"}, "gpt-6-sol"),
    ({}, PLAIN_BODY, "gpt-5.5"),
], ids=["alias", "alias-codex", "alias-lite", "form", "form-codex", "plain"])
@pytest.mark.usefixtures("fresh")
def test_request_that_needs_the_list_waits_for_it(
    bridge: RunningBridge, backend: wire.Backend, gate: threading.Event,
    headers: dict[str, str], body: Object, slug: str,
) -> None:
    backend.always("/models", held(gate, backend.default))
    with wire.Client(bridge.address) as client:
        client.request("POST", "/v1/responses", body, headers)
        backend.wait_for(1, "/models")
        assert sent(backend) == []
        gate.set()
        assert client.read_reply().status == 200
    assert [request.json["model"] for request in sent(backend)] == [slug]
    assert (backend.refusals, len(sent(backend, "/models"))) == ([], 1)


def test_wait_for_the_list_is_bounded(
    bridge: RunningBridge, backend: wire.Backend, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "CATALOG_WAIT", 0.02)
    backend.always("/models", held(gate, backend.default))
    assert ask(bridge, {**PLAIN_BODY, "model": "local_md"}).status == 200
    assert ask(bridge, PLAIN_BODY).status == 200
    assert [request.json["model"] for request in sent(backend)] == ["gpt-5", "gpt-5.5"]
    reply = models(bridge)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (504, "bridge")


FAILURES: dict[str, wire.Reply] = {
    "500": wire.refuse(500, "broken"),
    "404": wire.refuse(404, "Not Found"),
    "429": wire.usage_limit(),
    "page": wire.cloudflare(),
    "cut": wire.reply_raw(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"),
    "reset": wire.reply_raw(b"", "reset"),
    "no-http": wire.reply_raw(b"SSH-2.0-x\r\n\r\n"),
    "no-json": lambda exchange: exchange.whole(200, b"{", []),
    "nan": lambda exchange: exchange.whole(200, b'{"models": [{"slug": "x", "priority": NaN}]}', []),
    "no-object": wire.reply_json(200, []),
    "no-list": wire.reply_json(200, {"models": {"slug": "gpt-5.5"}}),
    "redirect": wire.reply_json(302, {}, [("location", "https://localhost/models")]),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.usefixtures("fresh")
def test_nobody_waits_once_a_fetch_failed(
    bridge: RunningBridge, backend: wire.Backend, failure: wire.Reply
) -> None:
    backend.always("/models", failure)
    for _ in range(2):
        assert ask(bridge, {**PLAIN_BODY, "instructions": "x"}).status == 200
    reply = models(bridge)
    assert reply.status >= 400
    assert reply.json["error"]["message"]
    assert [request.json.get("tools") for request in sent(backend)] == [[TOOL]] * 2


@pytest.mark.usefixtures("due")
def test_failed_first_fetch_is_made_again(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on("/models", FAILURES["500"])
    assert models(bridge).status == 500
    settle(bridge)
    models(bridge)  # asks in the background, and does not wait for what failed before
    settle(bridge)
    assert models(bridge).status == 200


def test_young_list_is_not_fetched_again(bridge: RunningBridge, backend: wire.Backend) -> None:
    for _ in range(3):
        assert models(bridge).status == 200
        assert ask(bridge, PLAIN_BODY).status == 200
        settle(bridge)
    assert len(sent(backend, "/models")) == 1


NOT_MODIFIED = b"HTTP/1.1 304 Not Modified\r\netag: x\r\n"
UNCHANGED = {
    "plain": wire.reply_raw(NOT_MODIFIED + b"\r\n", "keep"),
    "chunked": wire.reply_raw(NOT_MODIFIED + b"transfer-encoding: chunked\r\n\r\n", "keep"),
    "chunked-with-end": wire.reply_raw(NOT_MODIFIED + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n", "keep"),
    "length": wire.reply_raw(NOT_MODIFIED + b"content-length: 11436\r\n\r\n", "keep"),
    "length-0": wire.reply_raw(NOT_MODIFIED + b"content-length: 0\r\n\r\n", "keep"),
    "close": wire.reply_raw(NOT_MODIFIED + b"connection: close\r\n\r\n"),
}


@pytest.mark.parametrize("unchanged", UNCHANGED.values(), ids=UNCHANGED)
@pytest.mark.usefixtures("due")
def test_old_list_is_asked_for_with_its_etag(
    bridge: RunningBridge, backend: wire.Backend, log: Lines, unchanged: wire.Reply
) -> None:
    first = models(bridge)
    settle(bridge)
    backend.on("/models", unchanged)
    assert models(bridge).body == first.body
    settle(bridge)  # the 304 has no body, whatever its fields say: nobody waits for one
    assert models(bridge).body == first.body
    asked = backend.wait_for(3, "/models")
    assert [request.header("if-none-match") for request in asked] == [None, backend.etag, backend.etag]
    settle(bridge)
    assert not [line for line in log.lines if "model list" in line]  # nothing failed


@pytest.mark.usefixtures("due")
def test_old_list_is_replaced(bridge: RunningBridge, backend: wire.Backend) -> None:
    assert "gpt-7" not in slugs(bridge)
    settle(bridge)
    backend.catalog = [wire.model_entry("gpt-7", 1)]
    models(bridge)
    settle(bridge)
    assert slugs(bridge) == ["gpt-7", "local_md"]


@pytest.mark.parametrize("reply", [
    None, wire.reply_json(429, {"detail": "slow"}, [("x-models-etag", '"n"')]),
], ids=["stream", "refusal"])
@pytest.mark.usefixtures("fresh")
def test_other_etag_of_a_response_fetches_the_list(
    bridge: RunningBridge, backend: wire.Backend, reply: wire.Reply | None
) -> None:
    before = backend.etag
    assert ask(bridge, PLAIN_BODY).status == 200
    settle(bridge)
    assert len(sent(backend, "/models")) == 1
    backend.catalog.insert(0, wire.model_entry("gpt-7", 0))
    if reply is not None:
        backend.on("/responses", reply)
    ask(bridge, PLAIN_BODY)
    asked = backend.wait_for(2, "/models")
    settle(bridge)
    assert asked[1].header("if-none-match") == before
    assert slugs(bridge)[0] == "gpt-7"


@pytest.mark.usefixtures("fresh")
def test_etag_that_stays_another_is_asked_about_once(bridge: RunningBridge, backend: wire.Backend) -> None:
    """A response to another version of Codex may name that version's list."""
    reply = wire.turn(*wire.text_turn("hello"), headers=[*wire.TURN_HEADERS, ("x-models-etag", '"n"')])
    backend.always("/responses", reply)
    for _ in range(4):
        assert ask(bridge, PLAIN_BODY).status == 200
        settle(bridge)
    assert len(sent(backend, "/models")) == 2


def test_one_fetch_at_a_time(bridge: RunningBridge, backend: wire.Backend, gate: threading.Event) -> None:
    backend.always("/models", held(gate, backend.default))
    clients = [wire.Client(bridge.address) for _ in range(6)]
    for client in clients:
        client.request("GET", "/v1/models")
    backend.wait_for(1, "/models")
    gate.set()
    assert {client.read_reply().status for client in clients} == {200}
    assert len(sent(backend, "/models")) == 1
    for client in clients:
        client.close()


@pytest.mark.usefixtures("due")
def test_old_list_serves_while_it_is_fetched(
    bridge: RunningBridge, backend: wire.Backend, gate: threading.Event
) -> None:
    first = models(bridge)
    settle(bridge)
    backend.always("/models", held(gate, backend.default))
    for _ in range(4):
        assert models(bridge).body == first.body
        assert ask(bridge, {**PLAIN_BODY, "model": "local_md"}).status == 200
    assert [request.json["model"] for request in sent(backend)] == [LOCAL_MD] * 4
    assert len(sent(backend, "/models")) == 2


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.usefixtures("due")
def test_last_good_list_serves_while_upstream_fails(
    bridge: RunningBridge, backend: wire.Backend, failure: wire.Reply
) -> None:
    first = models(bridge)
    settle(bridge)
    backend.always("/models", failure)
    for fetches in (2, 3):
        assert models(bridge).body == first.body
        backend.wait_for(fetches, "/models")
        settle(bridge)
    assert ask(bridge, {**PLAIN_BODY, "model": "local_md"}).status == 200
    assert sent(backend)[0].json["model"] == LOCAL_MD


# -- lists of other versions --------------------------------------------------

def by_version(backend: wire.Backend, version: str, entries: list[Object]) -> wire.Reply:
    """Answer a Codex of `version` with other models."""

    def reply(exchange: wire.Exchange) -> None:
        if exchange.request.query == f"client_version={version}":
            exchange.json(200, {"models": entries}, [("etag", f'"{version}"')])
        else:
            backend.default(exchange)

    return reply


def test_codex_gets_the_list_of_its_version(bridge: RunningBridge, backend: wire.Backend) -> None:
    old = [wire.model_entry("gpt-5.5", 1, lite=False)]
    backend.always("/models", by_version(backend, "0.150.0", old))
    assert [model["slug"] for model in models(bridge, "0.150.0").json["models"]] == ["gpt-5.5", "local_md"]
    assert models(bridge, "0.169.0").json["models"][:-1] == backend.catalog
    asked = sent(backend, "/models")
    assert [(each.query, each.header("version")) for each in asked] == [
        (f"client_version={version}", version) for version in ("0.150.0", "0.169.0")]


@pytest.mark.usefixtures("due")
def test_every_version_keeps_its_etag(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.always("/models", by_version(backend, "0.150.0", []))
    for _ in range(2):
        for version in ("0.150.0", "0.169.0"):
            assert models(bridge, version).status == 200
            settle(bridge)
    tags = [each.header("if-none-match") for each in sent(backend, "/models")]
    assert tags == [None, None, '"0.150.0"', backend.etag]


def test_alias_of_a_codex_is_a_model_of_its_own_list(bridge: RunningBridge, backend: wire.Backend) -> None:
    """Hold the two together: its list named the alias's tools, and models are gated by version (WIRE 3)."""
    backend.always("/models", by_version(backend, "0.150.0", [wire.model_entry("gpt-5.5", 1, lite=False)]))
    assert models(bridge, "0.150.0").status == 200
    old = {**CODEX, "User-Agent": AGENT.replace("0.169.0", "0.150.0")}
    assert ask(bridge, {**PLAIN_BODY, "model": "local_md"}, old).status == 200
    (request,) = sent(backend)
    assert (request.json["model"], request.header("version")) == ("gpt-5.5", "0.150.0")


@pytest.mark.parametrize("version", ["0.1.0%20x", "../x", "0.1.0%26a=b", "0" * 41, "%0a"])
def test_what_is_no_version_is_refused(bridge: RunningBridge, backend: wire.Backend, version: str) -> None:
    reply = models(bridge, version)
    assert (reply.status, reply.json["error"]["param"]) == (400, "client_version")
    assert sent(backend, "/models") == []


def answer(*names: str) -> q.BufferedReply:
    return q.BufferedReply(200, {}, wire.dump({"models": [wire.model_entry(name, 1) for name in names]}))


def test_version_whose_list_was_let_go_gets_it_again() -> None:
    catalog = q.Catalog(lambda version, etag: answer(version), {}, "0")
    versions = [str(number) for number in range(q.Catalog.VERSIONS + 2)]
    for version in (*versions, "1"):
        listing = catalog.listing(version, wait=0.5)
        assert listing is not None
        assert list(listing.entries) == [version]


@pytest.mark.parametrize("good", [True, False], ids=["lists", "refusals"])
def test_versions_that_are_remembered_are_bounded(good: bool) -> None:
    def fetch(version: str, etag: str) -> q.BufferedReply:
        return answer(version) if good else q.BufferedReply(400, {}, b"{}")

    catalog = q.Catalog(fetch, {}, "0")
    for number in range(40):
        catalog.listing(str(number), wait=5)
    kept = [len(known) for known in vars(catalog).values() if isinstance(known, dict)]
    assert max(kept) <= q.Catalog.VERSIONS + 1


# -- what a list may hold -----------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, -1, 1.5, 10**30, "", "odd", "\ud800", [], [None], {}, {"effort": []}, [{}],
    [{"effort": {}, "id": []}],
)
ENTRY_FIELDS = ("slug", "priority", "visibility", "supported_reasoning_levels", "service_tiers",
                "use_responses_lite", "display_name")


@pytest.mark.parametrize("field", ENTRY_FIELDS)
def test_no_value_of_an_entry_is_a_fault(bridge: RunningBridge, backend: wire.Backend, field: str) -> None:
    good = wire.model_entry("gpt-5.5", 50, lite=False)
    odd: list[Any] = [{**wire.model_entry(f"odd-{place}", place, lite=False), field: value}
                      for place, value in enumerate(ODD)]
    backend.always("/models", wire.reply_json(200, {"models": [*odd, *ODD, good], "odd": ODD[7]}))
    assert "gpt-5.5" in slugs(bridge)
    assert models(bridge, "0.169.0").json["models"][-1]["slug"] == "local_md"
    body = {**PLAIN_BODY, "reasoning": {"effort": "high"}, "service_tier": "priority"}
    for place in range(len(ODD)):
        assert ask(bridge, {**body, "model": f"odd-{place}"}).status in (200, 400, 404)
    assert wire.get(bridge.address, "/status").status == 200


@pytest.mark.parametrize("slug", [
    "gpt-5\r\nx-forged: 1", "gpt-5 x", "gpt-5\u2026", "gpt-5\ud800", "gpt-5" * 40,
], ids=["line-break", "space", "not-latin-1", "surrogate", "200-characters"])
def test_slug_that_no_header_can_carry_is_no_model(
    bridge: RunningBridge, backend: wire.Backend, slug: str
) -> None:
    """An alias would send it: its target is the best name that begins with it."""
    backend.catalog.insert(0, wire.model_entry(slug, 0))
    assert ask(bridge, {**PLAIN_BODY, "model": "local_md"}).status == 200
    assert sent(backend)[-1].json["model"] == LOCAL_MD


def test_empty_list_has_no_rules(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.catalog = []
    assert slugs(bridge) == ["local_md"]
    assert models(bridge, "0.169.0").json == {"models": []}
    assert ask(bridge, {**PLAIN_BODY, "model": "local_md"}).status == 200
    assert sent(backend)[0].json["model"] == "gpt-5"


# -- GET /v1/models -----------------------------------------------------------

def test_openai_list(start: Start) -> None:
    bridge = start("--alias", "best=gpt-6.1-sol")
    reply = models(bridge)
    assert reply.json["object"] == "list"
    assert [model["id"] for model in reply.json["data"]] == [
        "gpt-6.1-sol", "gpt-6-sol", "gpt-5.6-sol", "gpt-5.5", "local_md", "best"]
    for model in reply.json["data"]:
        assert set(model) == {"id", "object", "created", "owned_by"}
        assert (model["object"], type(model["owned_by"]), type(model["created"])) == ("model", str, int)
        assert wire.get(bridge.address, f"/v1/models/{model['id']}").json == model


@pytest.mark.parametrize("name", ["none", "codex-auto-review", "gpt-5", "gpt-5.5x", "GPT-5.5", "%ff"])
def test_unknown_model_by_id_is_404(bridge: RunningBridge, name: str) -> None:
    reply = wire.get(bridge.address, f"/v1/models/{name}")
    assert (reply.status, reply.header("content-type")) == (404, "application/json")
    assert (reply.json["error"]["code"], reply.header("x-qoo-bridge-error")) == ("not_found", "bridge")


@pytest.mark.parametrize("name", ["gpt-5%2E5", "local%5Fmd"])
def test_name_of_a_model_may_be_encoded(bridge: RunningBridge, name: str) -> None:
    assert wire.get(bridge.address, f"/v1/models/{name}").status == 200


def test_codex_list_is_upstreams_and_the_aliases(start: Start, backend: wire.Backend) -> None:
    further = {"kept": [1, None]}
    backend.always("/models", wire.reply_json(200, {"models": backend.catalog, "further": further}))
    reply = models(start("--alias", "best=gpt-6.1-sol", "--alias", "plain=gpt-5.5"), "0.169.0")
    by_slug = {entry["slug"]: entry for entry in backend.catalog}
    aliased = [{**by_slug[slug], "slug": name, "display_name": name} for name, slug in
               (("local_md", LOCAL_MD), ("best", "gpt-6.1-sol"), ("plain", "gpt-5.5"))]
    assert reply.json == {"models": [*backend.catalog, *aliased], "further": further}


@pytest.mark.parametrize("version", ["", "0.169.0"], ids=["openai", "codex"])
@pytest.mark.usefixtures("due")
def test_etag_of_the_list(start: Start, backend: wire.Backend, version: str) -> None:
    bridge = start()
    path = f"/v1/models?client_version={version}" if version else "/v1/models"
    first = models(bridge, version)
    tag = first.header("etag") or ""
    assert tag.startswith('"')
    settle(bridge)
    for given, status in ((tag, 304), ('"other"', 200), ("", 200)):
        reply = wire.get(bridge.address, path, {"If-None-Match": given})
        assert (reply.status, reply.header("etag"), bool(reply.body)) == (status, tag, status == 200)
        settle(bridge)
    other = models(start("--alias", "more=gpt-6-sol"), version)
    backend.catalog.insert(0, wire.model_entry("gpt-7", 0))
    models(bridge, version)
    settle(bridge)
    changed = wire.get(bridge.address, path, {"If-None-Match": tag})
    assert changed.status == 200
    assert len({tag, other.header("etag"), changed.header("etag")}) == 3


def test_etag_tells_what_an_alias_means(start: Start) -> None:
    first, second = (models(start("--alias", f"x={target}"), "0.169.0") for target in ("gpt-5", "gpt-6"))
    assert first.header("etag") != second.header("etag")


# -- aliases ------------------------------------------------------------------

ENTRIES = [
    {"slug": "gpt-6-sol", "priority": 3}, {"slug": "gpt-6.1-sol", "priority": 1},
    {"slug": "gpt-5.5", "priority": 13}, {"slug": "gpt-5.6-sol", "priority": 5},
    {"slug": "gpt-5", "priority": 0, "visibility": "hide"}, {"slug": "nano"},
    {"slug": "best", "priority": -5, "visibility": "hide"},
]


@pytest.mark.parametrize(("target", "slug"), [
    ("gpt-6-sol", "gpt-6-sol"),  # the slug itself, though another is better
    ("gpt-5", "gpt-5"),  # hidden, but exactly that one
    ("gpt-6", "gpt-6.1-sol"), ("gpt-5.", "gpt-5.6-sol"), ("gpt", "gpt-6.1-sol"),  # the best that begins so
    ("n", "nano"),  # without a priority
    ("bes", "gpt-6.1-sol"), ("x", "gpt-6.1-sol"), ("GPT-5", "gpt-6.1-sol"),  # none: the first by priority
])
def test_what_an_alias_means(target: str, slug: str) -> None:
    listing = q.parse_model_list(q.BufferedReply(200, {}, wire.dump({"models": ENTRIES})), 0)
    assert q.alias_target(listing, target) == slug


@pytest.mark.parametrize(("target", "slug"), [
    ("gpt-5.5", "gpt-5.5"), ("gpt-5", LOCAL_MD), ("codex-auto-review", "codex-auto-review"),
    ("claude", "gpt-6.1-sol"),
])
def test_alias_is_its_model(start: Start, backend: wire.Backend, log: Lines, target: str, slug: str) -> None:
    bridge = start("--alias", f"mine={target}")
    assert ask(bridge, {**PLAIN_BODY, "model": "mine", "instructions": "be brief"}).status == 200
    (request,) = sent(backend)
    assert (request.json["model"], request.header("x-codex-routing-hint")) == (slug, f"model={slug}")
    lite = slug != "gpt-5.5"
    assert request.header(q.LITE_HEADER) == ("true" if lite else None)
    assert ("tools" in request.json, request.json["input"][0] == CARRIER) == (not lite, lite)
    assert f" mine->{slug} rules=alias," in log.wait_for(" mine->")
    aliases = wire.get(bridge.address, "/status").json["catalog"]["aliases"]
    assert aliases == {"local_md": LOCAL_MD, "mine": slug}


@pytest.mark.usefixtures("due")
def test_alias_follows_the_list(bridge: RunningBridge, backend: wire.Backend) -> None:
    assert ask(bridge, {**PLAIN_BODY, "model": "local_md"}).status == 200
    backend.catalog.insert(0, wire.model_entry("gpt-5.7-sol", 0))
    models(bridge)
    settle(bridge)
    assert ask(bridge, {**PLAIN_BODY, "model": "local_md"}).status == 200
    assert [request.json["model"] for request in sent(backend)] == [LOCAL_MD, "gpt-5.7-sol"]


@pytest.mark.parametrize("alias", ["gpt-5.5", "codex-auto-review"])
def test_alias_with_the_name_of_a_model_is_refused(
    start: Start, backend: wire.Backend, log: Lines, alias: str
) -> None:
    bridge = start("--alias", f"{alias}=gpt-6-sol")
    bridge.bridge.warm_up(threading.Event())  # at start, before any request
    reason = log.wait_for("ERROR ").partition(" ")[2]
    assert reason == f"the alias {alias} is not used: the catalogue has a model of that name"
    settle(bridge)
    catalog = wire.get(bridge.address, "/status").json["catalog"]
    assert catalog["refused_aliases"] == {alias: reason}
    assert catalog["aliases"] == {"local_md": LOCAL_MD}
    assert slugs(bridge).count(alias) == (alias == "gpt-5.5")
    assert [entry["slug"] for entry in models(bridge, "0.169.0").json["models"]].count(alias) == 1
    assert ask(bridge, {**PLAIN_BODY, "model": alias}).status == 200
    assert sent(backend)[0].json["model"] == alias
    assert sum("ERROR" in line for line in log.lines) == 1


@pytest.mark.parametrize("name", ["gpt-next", "gpt-5", "some/vendor:model@1"])
def test_unknown_model_passes_as_it_is(
    bridge: RunningBridge, backend: wire.Backend, log: Lines, name: str
) -> None:
    body = {**LITE_BODY, "model": name, "input": [HI], "tools": [TOOL], "instructions": "x",
            "reasoning": {"effort": "xhigh"}, "service_tier": "priority"}
    assert ask(bridge, body).status == 200
    (request,) = sent(backend)
    assert (request.json, request.header(q.LITE_HEADER)) == (body, None)
    assert f" {name}->{name} rules=- repairs=- status=200 " in log.wait_for("->")


# -- a list that is stale -----------------------------------------------------

STALE_LITE, STALE_PLAIN = wire.model_entry("gpt-6-sol", 1), wire.model_entry("gpt-6-sol", 1, lite=False)
SDK_BODY = {**PLAIN_BODY, "model": "gpt-6-sol", "instructions": "be brief"}
CODEX_BODY = {**LITE_BODY, "input": [HI], "tools": [TOOL], "reasoning": {"effort": "low"},
              "parallel_tool_calls": True}


class Stale(NamedTuple):
    """A request, the model's entry that the bridge holds (None: no list yet), and the one that is true."""

    before: Object | None
    now: Object
    headers: dict[str, str]
    body: Object


@pytest.mark.parametrize("stale", [
    Stale(STALE_PLAIN, STALE_LITE, {}, SDK_BODY), Stale(STALE_PLAIN, STALE_LITE, CODEX, CODEX_BODY),
    Stale(STALE_PLAIN, STALE_LITE, {}, {**SDK_BODY, "stream": True}),
    Stale(STALE_LITE, STALE_PLAIN, {}, SDK_BODY), Stale(STALE_LITE, STALE_PLAIN, LITE, LITE_BODY),
    Stale(STALE_LITE, STALE_PLAIN, LITE, {**LITE_BODY, "model": "local_md"}),
    Stale(None, STALE_LITE, {}, SDK_BODY), Stale(None, STALE_LITE, CODEX, CODEX_BODY),
    Stale(None, STALE_PLAIN, LITE, LITE_BODY),
], ids=["lite-now", "lite-now-codex", "lite-now-stream", "plain-now", "plain-now-codex", "plain-now-alias",
        "none-yet", "none-yet-codex", "none-yet-plain"])
@pytest.mark.usefixtures("fresh")
def test_stale_list_is_repaired_once(
    bridge: RunningBridge, backend: wire.Backend, log: Lines, stale: Stale
) -> None:
    if stale.before is None:
        backend.on("/models", FAILURES["500"])
    backend.catalog = [stale.before or stale.now]
    models(bridge)
    settle(bridge)
    backend.catalog = [stale.now]
    reply = ask(bridge, stale.body, stale.headers)
    assert (reply.status, reply.header("x-qoo-bridge-repaired")) == (200, "form"), backend.refusals
    assert (len(sent(backend)), len(sent(backend, "/models"))) == (2, 2)
    lite = stale.now is STALE_LITE
    request = sent(backend)[1]
    tools = request.json["input"][0] if lite else {**CARRIER, "tools": request.json["tools"]}
    assert tools == CARRIER
    assert request.json.get("reasoning", {}).get("context") == ("all_turns" if lite else None)
    assert request.header(q.LITE_HEADER) == ("true" if lite else None)
    assert "repairs=form status=200" in log.wait_for("->gpt-6-sol")
    assert ask(bridge, stale.body, stale.headers).header("x-qoo-bridge-repaired") is None


@pytest.mark.usefixtures("fresh")
def test_alias_whose_model_has_gone_is_repaired(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    body = {**PLAIN_BODY, "model": "local_md"}
    assert ask(bridge, body).status == 200
    settle(bridge)
    backend.catalog = [entry for entry in backend.catalog if entry["slug"] != LOCAL_MD]
    assert ask(bridge, body).header("x-qoo-bridge-repaired") == "form"
    assert [request.json["model"] for request in sent(backend)] == [LOCAL_MD, LOCAL_MD, "gpt-5.5"]
    assert sent(backend)[2].header("x-codex-routing-hint") == "model=gpt-5.5"


def test_alias_is_repaired_in_its_form_too(bridge: RunningBridge, backend: wire.Backend) -> None:
    for entry in backend.catalog:
        entry["use_responses_lite"] = False
    models(bridge)
    settle(bridge)
    backend.catalog = [wire.model_entry("gpt-5.6-sol", 1)]
    assert ask(bridge, {**PLAIN_BODY, "model": "local_md"}).status == 200


@pytest.mark.parametrize("text", [
    "Model not found gpt-6-sol", "Responses lite is not supported for model gpt-6-sol",
    "Invalid value: 'additional_tools' at input[0]: responses lite only.",
])
@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.usefixtures("fresh")
def test_list_that_was_right_leaves_the_refusal(
    bridge: RunningBridge, backend: wire.Backend, status: int, text: str
) -> None:
    models(bridge)
    settle(bridge)
    backend.on("/responses", wire.refuse(status, text))
    reply = ask(bridge, SDK_BODY)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (status, "upstream")
    assert reply.json["error"]["message"] == text
    assert (len(sent(backend)), len(sent(backend, "/models"))) == (1, 2)


@pytest.mark.usefixtures("fresh")
def test_form_is_repaired_no_more_than_once(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.catalog = [STALE_PLAIN]
    models(bridge)
    settle(bridge)
    backend.catalog = [STALE_LITE]
    backend.on("/responses", *[wire.refuse(404, "Model not found gpt-6-sol")] * 3)
    assert ask(bridge, SDK_BODY).status == 404
    assert (len(sent(backend)), len(sent(backend, "/models"))) == (2, 2)


@pytest.mark.usefixtures("fresh")
def test_refusal_stands_where_the_list_cannot_be_had(
    bridge: RunningBridge, backend: wire.Backend
) -> None:
    models(bridge)
    settle(bridge)
    backend.always("/models", FAILURES["500"])
    backend.on("/responses", wire.refuse(404, "Model not found gpt-6-sol"))
    reply = ask(bridge, SDK_BODY)
    assert (reply.status, reply.json["error"]["message"]) == (404, "Model not found gpt-6-sol")
    assert len(sent(backend)) == 1


# -- effort and tier ----------------------------------------------------------

@pytest.mark.parametrize(("efforts", "given", "effort"), [
    (("low", "medium"), "xhigh", "medium"), (("medium", "high"), "minimal", "medium"),
    (("low", "high"), "medium", "low"), (("low", "max", "ultra"), "ultra", "max"),
    (("low", "high", "max"), "none", "low"),
])
def test_effort_is_the_nearest_that_the_list_has(
    bridge: RunningBridge, backend: wire.Backend, log: Lines,
    efforts: tuple[str, ...], given: str, effort: str,
) -> None:
    backend.catalog = [wire.model_entry("gpt-6-sol", 1, efforts=efforts)]
    assert ask(bridge, {**SDK_BODY, "reasoning": {"effort": given}}).status == 200
    assert sent(backend)[-1].json["reasoning"] == {"effort": effort, "context": "all_turns"}
    assert ",effort," in log.wait_for("form repairs=- status=200")


@pytest.mark.parametrize(("tiers", "given", "tier"), [
    ([], "priority", None), ([], "fast", None), ([{"id": "priority"}], "fast", "priority"),
    ([{"id": "flex"}], "priority", None), ([{"id": "flex"}], "flex", None),
    ([{"id": "priority"}], "auto", None),
])
def test_tier_is_one_that_the_list_has(
    bridge: RunningBridge, backend: wire.Backend, log: Lines,
    tiers: list[Object], given: str, tier: str | None,
) -> None:
    backend.catalog = [{**wire.model_entry("gpt-5.5", 1, lite=False), "service_tiers": tiers}]
    assert ask(bridge, {**PLAIN_BODY, "service_tier": given}).status == 200
    (request,) = sent(backend)
    assert request.json.get("service_tier") == tier
    assert request.header("x-codex-routing-hint") == "model=gpt-5.5" + (f";tier={tier}" if tier else "")
    assert ",service-tier," in log.wait_for("gpt-5.5->gpt-5.5")


@pytest.mark.parametrize("fields", [
    {"reasoning": {"effort": "high"}}, {"service_tier": "priority"}, {"service_tier": "default"},
])
def test_what_the_model_has_stays(
    bridge: RunningBridge, backend: wire.Backend, log: Lines, fields: Object
) -> None:
    assert ask(bridge, {**PLAIN_BODY, **fields}).status == 200
    assert {name: sent(backend)[0].json[name] for name in fields} == fields
    line = log.wait_for("gpt-5.5->gpt-5.5")
    assert "effort" not in line
    assert "service-tier" not in line


# -- client-config ------------------------------------------------------------

OPEN, LOCKED = (), ("--api-key", f"laptop={SECRET}")
ENVIRONMENT = "$QOO_BRIDGE_KEY"
CONFIGS = [
    ("codex", OPEN, ['base_url = "{url}"', 'model_catalog_url = "{url}/models"', 'wire_api = "responses"',
                     "requires_openai_auth = false", 'experimental_bearer_token = "lan"', 'model = "{model}"',
                     'model_provider = "lan"', "[model_providers.lan]"], ["env_key", "[profiles"]),
    ("codex", LOCKED, ['env_key = "QOO_BRIDGE_KEY"', 'base_url = "{url}"'], ["experimental_bearer_token"]),
    ("openai", OPEN, ['OPENAI_BASE_URL="{url}"', 'OPENAI_API_KEY="lan"', "{model}"], ["QOO_BRIDGE_KEY"]),
    ("openai", LOCKED, [f'OPENAI_API_KEY="{ENVIRONMENT}"'], ["lan\""]),
    ("litellm", OPEN, ['api_base: "{url}"', 'model: "openai/{model}"', 'model_name: "{model}"',
                       'api_key: "lan"'], ["QOO_BRIDGE_KEY"]),
    # LiteLLM fills in environment variables only where they are written `os.environ/NAME`.
    ("litellm", LOCKED, ['api_key: "os.environ/QOO_BRIDGE_KEY"'], [ENVIRONMENT, "lan\""]),
    ("curl", OPEN, ["curl {url}/responses", '"model": "{model}"'], ["authorization", "QOO_BRIDGE_KEY"]),
    ("curl", LOCKED, [f'-H "authorization: Bearer {ENVIRONMENT}"'], []),
]


def printed(kind: str, *words: str) -> str:
    """Run `client-config` as a process of its own."""
    command = [sys.executable, "-I", "-S", str(BRIDGE), "client-config", kind, *words]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(("kind", "keys", "has", "lacks"), CONFIGS,
                         ids=[f"{kind}-{'locked' if keys else 'open'}" for kind, keys, _, _ in CONFIGS])
def test_client_config_is_printed_and_served(
    start: Start, kind: str, keys: tuple[str, ...], has: list[str], lacks: list[str]
) -> None:
    bridge = start(*keys)
    reply = wire.get(bridge.address, f"/v1/client-config/{kind}", {"Authorization": f"Bearer {SECRET}"})
    assert (reply.status, reply.header("content-type")) == (200, "text/plain; charset=utf-8")
    text = reply.body.decode()
    assert text == printed(kind, "--host", "127.0.0.1", "--port", str(bridge.address[1]), *keys)
    for part in has:
        assert part.replace("{url}", bridge.url).replace("{model}", "local_md") in text
    assert [part for part in [*lacks, SECRET, "{url}", "{model}", "{{"] if part in text] == []


def test_client_config_names_the_model_and_the_lan_address() -> None:
    text = printed("curl", "--port", "4077", "--model", "gpt-6-sol")
    assert f"http://{q.lan_address()}:4077/v1/responses" in text
    assert '"model": "gpt-6-sol"' in text


def test_client_config_is_of_a_codex_without_a_word(start: Start) -> None:
    command = [sys.executable, "-I", "-S", str(BRIDGE), "client-config"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=False)
    assert "[model_providers.lan]" in done.stdout


def test_client_config_refuses_another_kind(bridge: RunningBridge) -> None:
    command = [sys.executable, "-I", "-S", str(BRIDGE), "client-config", "emacs"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert all(kind in done.stderr for kind in q.CLIENT_CONFIGS)
    assert wire.get(bridge.address, "/v1/client-config/emacs").status == 404


def test_client_config_has_the_address_that_was_asked(bridge: RunningBridge) -> None:
    text = wire.get(bridge.address, "/v1/client-config/codex", {"Host": "bridge.lan:4050"}).body.decode()
    assert 'base_url = "http://bridge.lan:4050/v1"' in text
    assert 'model_catalog_url = "http://bridge.lan:4050/v1/models"' in text


def test_client_config_without_a_host_has_an_address(bridge: RunningBridge) -> None:
    reply = wire.raw(bridge.address, "GET /v1/client-config/codex HTTP/1.0\r\n\r\n")
    assert reply.status == 200
    assert b"http:///v1" not in reply.body


@pytest.mark.parametrize("keys", [OPEN, LOCKED], ids=["open", "locked"])
def test_codex_files_are_toml(start: Start, keys: tuple[str, ...]) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    bridge = start(*keys)
    reply = wire.get(bridge.address, "/v1/client-config/codex", {"Authorization": f"Bearer {SECRET}"})
    config, _, profile = reply.body.decode().partition("# 2. ")
    (provider,) = tomllib.loads(config)["model_providers"].values()
    assert provider["model_catalog_url"] == f"{bridge.url}/models"
    assert ("env_key" in provider, "experimental_bearer_token" in provider) == (bool(keys), not keys)
    assert provider["name"] != "OpenAI"
    assert tomllib.loads("# " + profile) == {
        "model": "local_md", "model_provider": "lan", "approval_policy": "never"}


# -- side endpoints -----------------------------------------------------------

SIDE = [
    ("GET", "/backend-api/wham/usage", "/backend-api/wham/usage"),
    ("GET", "/api/codex/usage", "/backend-api/wham/usage"),
    ("POST", "/v1/responses/compact", "/responses/compact"),
    ("POST", "/v1/alpha/search", "/alpha/search"),
    ("POST", "/v1/images/generations", "/images/generations"),
    ("POST", "/v1/images/edits", "/images/edits"),
    ("POST", "/v1/memories/trace_summarize", "/memories/trace_summarize"),
]
side_endpoints = pytest.mark.parametrize(("method", "path", "upstream"), SIDE, ids=[row[1] for row in SIDE])
SIDE_REPLY = {"further": ["as", {"it": "came"}]}


def call(bridge: RunningBridge, method: str, path: str, body: bytes = b'{"a": [1,  2]}',
         headers: dict[str, str] | None = None) -> wire.RawReply:
    with wire.Client(bridge.address) as client:
        client.request(method, path, body if method == "POST" else None, {**CODEX, **(headers or {})})
        return client.read_reply()


def open_side(backend: wire.Backend, upstream: str) -> None:
    """Let the stand-in answer a path to a Codex that is signed in."""

    def route(_: wire.Backend, exchange: wire.Exchange) -> None:
        backend.check_client(exchange.request)
        exchange.json(200, SIDE_REPLY, [("x-request-id", "r1"), ("set-cookie", "secret=1")])

    backend.always(upstream, lambda exchange: backend.answer(exchange, route))


@side_endpoints
def test_side_request_is_passed_on(
    bridge: RunningBridge, backend: wire.Backend, method: str, path: str, upstream: str
) -> None:
    open_side(backend, upstream)
    reply = call(bridge, method, path, headers={"Authorization": "Bearer lan", "Cookie": "a=b"})
    assert (reply.status, reply.json, reply.header("x-request-id")) == (200, SIDE_REPLY, "r1")
    assert reply.header("set-cookie") is None
    (request,) = sent(backend, upstream)
    assert (request.method, request.query) == (method, "")
    assert request.header("authorization") == f"Bearer {backend.access_token}"
    assert request.header("chatgpt-account-id") == backend.account_id
    assert request.body == (b'{"a": [1,  2]}' if method == "POST" else b"")


@side_endpoints
def test_side_request_outlives_a_revoked_token(
    bridge: RunningBridge, backend: wire.Backend, method: str, path: str, upstream: str
) -> None:
    open_side(backend, upstream)
    backend.revoke()
    assert call(bridge, method, path).json == SIDE_REPLY
    first, second = sent(backend, upstream)
    assert (first.body, backend.refreshes) == (second.body, 1)
    assert second.header("authorization") == f"Bearer {backend.access_token}"


@side_endpoints
def test_second_401_of_a_side_request_is_told(
    bridge: RunningBridge, backend: wire.Backend, method: str, path: str, upstream: str
) -> None:
    backend.always(upstream, wire.refuse(401, "Could not validate credentials"))
    reply = call(bridge, method, path)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (401, "upstream")
    assert (len(sent(backend, upstream)), backend.refreshes) == (2, 1)


@side_endpoints
def test_upstreams_404_is_a_clear_404(
    bridge: RunningBridge, backend: wire.Backend, method: str, path: str, upstream: str
) -> None:
    backend.always(upstream, wire.refuse(404, "Model not found gpt-6-sol"))  # the text of a known repair
    reply = call(bridge, method, path)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (404, "upstream")
    assert (reply.header("content-type"), reply.json["error"]["message"]) == (
        "application/json", "Model not found gpt-6-sol")
    assert len(sent(backend, upstream)) == 1


@side_endpoints
def test_side_endpoint_has_no_sub_paths(
    bridge: RunningBridge, backend: wire.Backend, method: str, path: str, upstream: str
) -> None:
    open_side(backend, upstream)
    statuses = {call(bridge, method, path + more).status for more in ("/x", "x", "/../x", "%2f")}
    assert statuses <= {404, 405}  # 405: what follows /responses/ may be the id of a response to GET
    assert sent(backend, upstream) == []


def test_usage_is_the_plans(bridge: RunningBridge) -> None:
    assert wire.get(bridge.address, "/api/codex/usage").json == wire.USAGE_REPORT


def test_form_upload_keeps_its_type(bridge: RunningBridge, backend: wire.Backend) -> None:
    open_side(backend, "/images/edits")
    kind, body = "multipart/form-data; boundary=b", b"--b\r\n\r\n\xff\x00\r\n--b--\r\n"
    assert call(bridge, "POST", "/v1/images/edits", body, {"Content-Type": kind}).status == 200
    (request,) = sent(backend, "/images/edits")
    assert (request.header("content-type"), request.body) == (kind, body)


@pytest.mark.parametrize("status", [201, 202])
def test_any_success_of_a_side_request_is_one(
    bridge: RunningBridge, backend: wire.Backend, status: int
) -> None:
    backend.always("/images/generations", wire.reply_json(status, SIDE_REPLY))
    reply = call(bridge, "POST", "/v1/images/generations")
    assert (reply.status, reply.json) == (status, SIDE_REPLY)


def test_compaction_of_an_alias_is_of_its_model(bridge: RunningBridge, backend: wire.Backend) -> None:
    open_side(backend, "/responses/compact")
    body = {**LITE_BODY, "model": "local_md"}
    assert call(bridge, "POST", "/v1/responses/compact", wire.dump(body)).status == 200
    assert sent(backend, "/responses/compact")[0].json == {**body, "model": LOCAL_MD}


def test_compaction_in_the_lite_form_says_so(bridge: RunningBridge, backend: wire.Backend) -> None:
    open_side(backend, "/responses/compact")
    call(bridge, "POST", "/v1/responses/compact", wire.dump(LITE_BODY), LITE)
    assert sent(backend, "/responses/compact")[0].header(q.LITE_HEADER) == "true"


# -- side by side with a Codex that is signed in itself -----------------------
# Captures of Codex 0.169 (November 2026): the second request of a tool loop, to a bridge and to ChatGPT. Long
# texts are cut, tokens redacted; names, order and presence of fields are as sent.

class Capture(NamedTuple):
    """One captured request; `ids` are what differs with every session: id -> what it is."""

    ids: dict[str, str]
    headers: dict[str, str]
    body: Object


def text(*texts: str) -> list[Object]:
    return [{"type": "input_text", "text": each} for each in texts]


def message(name: str, role: str, *texts: str, **more: Any) -> Object:
    return {"type": "message", "id": f"msg_{name}", "role": role, "content": text(*texts), **more}


def end_of_turn(output_id: str, output: str, **more: Any) -> list[Object]:
    """Return what every capture's input ends with; `more` stands in each item."""
    said = {"type": "output_text", "text": "Running a tool", "annotations": []}
    return [
        {"type": "reasoning", "id": "rs_0123abc", "summary": [{"type": "summary_text", "text": "think"}],
         "content": None, "encrypted_content": "gAAAAAB_enc", **more},
        {"type": "message", "status": "completed", "id": "msg_0aa1", "role": "assistant", "content": [said],
         "phase": "commentary", **more},
        {"type": "function_call", "status": "completed", "id": "fc_0bb2", "name": "exec_command",
         "arguments": '{"cmd": "echo hi"}', "call_id": "call_1", **more},
        {"type": "function_call_output", "id": f"fco_{output_id}", "call_id": "call_1", "output": output,
         **more},
    ]


def named(*tools: str) -> list[Object]:
    """Return tools from `type:name`; the captures hold no more of them."""
    return [{"type": kind, "name": name or None} for kind, _, name in (tool.partition(":") for tool in tools)]


SKILLS, PERMISSIONS = "<skills_instructions>\n## Skills\nA skill is…", "<permissions instructions>\nFile…"
PLACE = "<environment_context>\n  <cwd>/home/user/project"
TEAM, MODE = "You are `main`, the primary agent in a team of …", "<multi_agent_mode>Any earlier instruction…"
PASSTHROUGH = {"internal_chat_message_metadata_passthrough": {"turn_id": "…", "create_time": 1795328042.373}}

BRIDGE_PLAIN = Capture(
    {
        "01a201df-3cb2-7781-97fc-5b29c49ae5cd": "session",
        "4dbbee8e-2b6d-4a9d-8939-644d3889dbba": "installation",
        "01a201df-3cd2-71b2-a17f-1957d84b71a2": "turn",
    },
    {
        "x-codex-beta-features": "remote_compaction_v2", "x-codex-turn-state": "ts-sticky-1",
        "x-codex-window-id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd:0",
        "x-codex-turn-metadata": '{"installation_id":"4dbbee8e-2b6d-4a9d-8939-644d3889dbba"}',
        "x-client-request-id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd",
        "session-id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd",
        "thread-id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd", "accept": "text/event-stream",
        "content-type": "application/json", "authorization": "Bearer <redacted>", "originator": "codex_exec",
        "user-agent": AGENT,
    },
    {
        "model": "gpt-5.5", "stream": True,
        "input": [
            message("78f43e30-e31a-5ba4-81da-beafe83265dc", "developer", "You are Codex, a coding agent…"),
            message("01a201df-3ce8-78c1-bbc9-59778bf17af2", "developer", SKILLS, PERMISSIONS, "<tools>\n…"),
            message("01a201df-3ce8-78c1-bbc9-598f8655ec7e", "user", PLACE),
            message("01a201df-3d00-76e1-a3b8-080c4afeafff", "user", "say hi"),
            *end_of_turn("01a201df-3d6c-7010-a202-8ceb27a457f7", "Chunk ID: f09f81\nOutput:\nhi\n"),
        ],
        "tools": named("function:exec_command", "function:write_stdin", "function:request_user_input",
                       "custom:apply_patch", "function:view_image", "function:get_goal",
                       "function:create_goal", "function:update_goal", "tool_search:", "web_search:"),
        "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"effort": "medium"}, "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a201df-3cb2-7781-97fc-5b29c49ae5cd", "text": {"verbosity": "low"},
        "client_metadata": {
            "root_turn_id": "01a201df-3cd2-71b2-a17f-1957d84b71a2",
            "x-codex-installation-id": "4dbbee8e-2b6d-4a9d-8939-644d3889dbba",
            "x-codex-window-id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd:0",
            "x-codex-turn-metadata": '{"installation_id":"4dbbee8e-2b6d-4a9d-8939-644d3889dbba"}',
            "turn_id": "01a201df-3cd2-71b2-a17f-1957d84b71a2",
            "thread_id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd",
            "session_id": "01a201df-3cb2-7781-97fc-5b29c49ae5cd",
        },
    },
)
CHATGPT_PLAIN = Capture(
    {
        "01a201e4-4ce1-7c41-adda-ecb6a8c97083": "session",
        "7b256306-0895-4b9e-8f51-2b98c434cce6": "installation",
        "01a201e4-4d18-7411-965e-cafa03fab80a": "turn",
        "ts-sticky-17": "ts-sticky-1",
    },
    {
        "version": "0.169.0", "x-codex-beta-features": "remote_compaction_v2",
        "x-codex-turn-state": "ts-sticky-17", "x-codex-window-id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083:0",
        "x-codex-turn-metadata": '{"installation_id":"7b256306-0895-4b9e-8f51-2b98c434cce6"}',
        "x-codex-routing-hint": "model=gpt-5.5",
        "x-client-request-id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083",
        "session-id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083",
        "thread-id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083", "accept": "text/event-stream",
        "content-encoding": "zstd", "content-type": "application/json", "authorization": "Bearer <redacted>",
        "chatgpt-account-id": "acct-uuid-1", "originator": "codex_exec", "user-agent": AGENT,
        "host": "localhost:8843", "content-length": "16687",
    },
    {
        "model": "gpt-5.5", "stream": True,
        "input": [
            message("…", "developer", "You are Codex, a coding agent…", **PASSTHROUGH),
            message("…", "developer", SKILLS, PERMISSIONS, "<tools>\n…", **PASSTHROUGH),
            message("…", "user", PLACE, **PASSTHROUGH),
            message("01a201e4-4d47-7040-8a03-64dd702462c1", "user", "say hi", **PASSTHROUGH),
            *end_of_turn("01a201e4-4db8-79b3-a072-3ab0ba373b29", "Chunk ID: f61fbd\n…", **PASSTHROUGH),
        ],
        "tools": named("function:exec_command", "function:write_stdin", "function:list_mcp_resources",
                       "function:list_mcp_resource_templates", "function:read_mcp_resource",
                       "function:request_user_input", "custom:apply_patch", "function:view_image",
                       "function:get_goal", "function:create_goal", "function:update_goal",
                       "namespace:image_gen", "tool_search:", "web_search:"),
        "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"effort": "medium"}, "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a201e4-4ce1-7c41-adda-ecb6a8c97083", "text": {"verbosity": "low"},
        "client_metadata": {
            "thread_id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083",
            "turn_id": "01a201e4-4d18-7411-965e-cafa03fab80a", "mcp_attribution": '{"status":"none"}',
            "x-codex-turn-metadata": '{"installation_id":"7b256306-0895-4b9e-8f51-2b98c434cce6"}',
            "x-codex-installation-id": "7b256306-0895-4b9e-8f51-2b98c434cce6",
            "root_turn_id": "01a201e4-4d18-7411-965e-cafa03fab80a", "guardian_credits_requested": "true",
            "session_id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083",
            "x-codex-window-id": "01a201e4-4ce1-7c41-adda-ecb6a8c97083:0",
        },
    },
)
BRIDGE_LITE = Capture(
    {
        "01a201df-d8be-78d2-93d1-0b40877d03c7": "session",
        "4dbbee8e-2b6d-4a9d-8939-644d3889dbba": "installation",
        "01a201df-d8d7-74b2-ba0c-26518456802c": "turn",
        "gpt-5.6-sol": "lite-model",
    },
    {
        "x-codex-beta-features": "remote_compaction_v2", "x-codex-turn-state": "ts-sticky-1",
        "x-codex-window-id": "01a201df-d8be-78d2-93d1-0b40877d03c7:0",
        "x-codex-turn-metadata": '{"installation_id":"4dbbee8e-2b6d-4a9d-8939-644d3889dbba"}',
        "x-openai-internal-codex-responses-lite": "true",
        "x-client-request-id": "01a201df-d8be-78d2-93d1-0b40877d03c7",
        "session-id": "01a201df-d8be-78d2-93d1-0b40877d03c7",
        "thread-id": "01a201df-d8be-78d2-93d1-0b40877d03c7", "accept": "text/event-stream",
        "content-type": "application/json", "authorization": "Bearer <redacted>", "originator": "codex_exec",
        "user-agent": AGENT,
    },
    {
        "model": "gpt-5.6-sol", "stream": True,
        "input": [
            {"type": "additional_tools", "id": "at_01a201df-d8e6-7152-b3b4-02908d5a1e48", "role": "developer",
             "tools": named("namespace:functions", "namespace:collaboration")},
            message("01a201df-d8e6-7152-b3b4-02af0392adfd", "developer", "You are Codex, an agent…"),
            message("01a201df-d8e6-7152-b3b4-02b5ce437e87", "developer", SKILLS, PERMISSIONS),
            message("01a201df-d8e6-7152-b3b4-02c56eeebaa8", "developer", TEAM),
            message("01a201df-d8e6-7152-b3b4-02d5d883ebfa", "developer", MODE),
            message("01a201df-d8e6-7152-b3b4-02e42e20afbf", "user", PLACE),
            message("01a201df-d8f2-7a60-bce8-2d2501bd117a", "user", "say hi"),
            *end_of_turn("01a201df-d956-75b2-a4cb-ecf8f2d88711", "Chunk ID: c4a73b\nOutput:\nhi\n"),
        ],
        "tool_choice": "auto", "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "context": "all_turns"}, "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a201df-d8be-78d2-93d1-0b40877d03c7", "text": {"verbosity": "low"},
        "client_metadata": {
            "session_id": "01a201df-d8be-78d2-93d1-0b40877d03c7",
            "x-codex-window-id": "01a201df-d8be-78d2-93d1-0b40877d03c7:0",
            "root_turn_id": "01a201df-d8d7-74b2-ba0c-26518456802c",
            "x-codex-turn-metadata": '{"installation_id":"4dbbee8e-2b6d-4a9d-8939-644d3889dbba"}',
            "thread_id": "01a201df-d8be-78d2-93d1-0b40877d03c7",
            "x-codex-installation-id": "4dbbee8e-2b6d-4a9d-8939-644d3889dbba",
            "turn_id": "01a201df-d8d7-74b2-ba0c-26518456802c",
        },
    },
)
CHATGPT_LITE = Capture(
    {
        "01a201e3-e519-7251-bc7f-37fed468c079": "session",
        "7b256306-0895-4b9e-8f51-2b98c434cce6": "installation",
        "01a201e3-e55c-7f52-978f-7a3d14d0f294": "turn",
        "gpt-6-sol": "lite-model", "ts-sticky-17": "ts-sticky-1",
    },
    {
        "version": "0.169.0", "x-openai-account-routing-override": "us",
        "x-codex-beta-features": "remote_compaction_v2", "x-codex-turn-state": "ts-sticky-17",
        "x-codex-window-id": "01a201e3-e519-7251-bc7f-37fed468c079:0",
        "x-codex-turn-metadata": '{"installation_id":"7b256306-0895-4b9e-8f51-2b98c434cce6"}',
        "x-openai-internal-codex-responses-lite": "true", "x-codex-routing-hint": "model=gpt-6-sol",
        "x-client-request-id": "01a201e3-e519-7251-bc7f-37fed468c079",
        "session-id": "01a201e3-e519-7251-bc7f-37fed468c079",
        "thread-id": "01a201e3-e519-7251-bc7f-37fed468c079", "accept": "text/event-stream",
        "content-encoding": "zstd", "content-type": "application/json", "authorization": "Bearer <redacted>",
        "chatgpt-account-id": "acct-uuid-1", "originator": "codex_exec", "user-agent": AGENT,
        "host": "localhost:8843", "content-length": "23491",
    },
    {
        "model": "gpt-6-sol", "stream": True,
        "input": [
            {"type": "additional_tools", "id": "at_01a201e3-e585-7df3-bbb7-032cfe6e8064", "role": "developer",
             "tools": named("namespace:functions", "namespace:clock", "namespace:collaboration")},
            message("01a201e3-e585-7df3-bbb7-033e6e2d4340", "developer", "You are Codex, an agent…",
                    **PASSTHROUGH),
            message("01a201e3-e585-7df3-bbb7-034a183eaab3", "developer", SKILLS, PERMISSIONS, "<coll…",
                    **PASSTHROUGH),
            message("01a201e3-e585-7df3-bbb7-0356ede9b078", "developer", TEAM, **PASSTHROUGH),
            message("01a201e3-e585-7df3-bbb7-036c2604fb5a", "developer", MODE, **PASSTHROUGH),
            message("01a201e3-e585-7df3-bbb7-037bb1752730", "user", PLACE, **PASSTHROUGH),
            message("01a201e3-e594-7772-94dd-416956784899", "user", "say hi", **PASSTHROUGH),
            *end_of_turn("…", "Chunk ID: …", **PASSTHROUGH),
        ],
        "tool_choice": "auto", "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "context": "all_turns"}, "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a201e3-e519-7251-bc7f-37fed468c079", "text": {"verbosity": "low"},
        "client_metadata": {
            "root_turn_id": "01a201e3-e55c-7f52-978f-7a3d14d0f294",
            "x-codex-turn-metadata": '{"installation_id":"7b256306-0895-4b9e-8f51-2b98c434cce6"}',
            "turn_id": "01a201e3-e55c-7f52-978f-7a3d14d0f294",
            "thread_id": "01a201e3-e519-7251-bc7f-37fed468c079",
            "session_id": "01a201e3-e519-7251-bc7f-37fed468c079",
            "x-codex-window-id": "01a201e3-e519-7251-bc7f-37fed468c079:0",
            "guardian_credits_requested": "true",
            "x-codex-installation-id": "7b256306-0895-4b9e-8f51-2b98c434cce6",
            "mcp_attribution": '{"status":"none"}',
        },
    },
)


class Difference(NamedTuple):
    """A field in which the two may differ: `alike` holds of what the bridge and what Codex itself sent."""

    why: str
    alike: Callable[[Any, Any], bool]


def item_fields(items: list[Object]) -> list[Object]:
    """Return what kind of items these are and which fields they have, but for Codex's note to ChatGPT."""
    return [{name: item[name] if name in ("type", "role") else "" for name in item if name not in PASSTHROUGH}
            for item in items]


OF_CHATGPT_ALONE = {"mcp_attribution", "guardian_credits_requested"}  # of client_metadata
HEADER_DIFFERENCES = {
    "accept-encoding": Difference(
        "the bridge reads the events that it relays, so it asks for them as they are; Codex asks nothing",
        lambda bridge, direct: (bridge, direct) == ("identity", None)),
    "authorization": Difference(
        "the captures are redacted; the sign-in is this host's, whatever the client sent",
        lambda bridge, direct: str(bridge).startswith("Bearer ey") and direct == "Bearer <redacted>"),
    "chatgpt-account-id": Difference(
        "the account is this host's", lambda bridge, direct: bool(bridge and direct)),
    "host": Difference("the stand-ins listened on other ports",
                       lambda bridge, direct: str(bridge).startswith("localhost:")),
    "content-length": Difference("the captures' texts are cut",
                                 lambda bridge, direct: str(bridge).isdigit() and str(direct).isdigit()),
}
BODY_DIFFERENCES = {
    "input": Difference(
        "Codex notes in every item when and why it was made, for its built-in provider alone; ids and texts "
        "are of two conversations",
        lambda bridge, direct: item_fields(bridge) == item_fields(direct)),
    "client_metadata": Difference(
        "two entries that Codex makes for its built-in provider alone",
        lambda bridge, direct: bridge == {name: direct[name] for name in set(direct) - OF_CHATGPT_ALONE}),
}
PLAIN_DIFFERENCES = {
    "tools": Difference(
        "four tools that Codex offers with its built-in provider alone (MCP resources, image generation)",
        lambda bridge, direct: bridge == [tool for tool in direct if tool in bridge]
        and len(direct) == len(bridge) + 4),
}
LITE_DIFFERENCES = {
    "reasoning": Difference(
        "the captures are of two lite models, each with its own default effort",
        lambda bridge, direct: (bridge.pop("effort"), direct.pop("effort")) == ("low", "medium")
        and bridge == direct),
}


def without_ids(value: Any, ids: dict[str, str]) -> Any:
    """Return a JSON value with every id replaced by what it is."""
    written = json.dumps(value)
    for name, what in ids.items():
        written = written.replace(name, what)
    return json.loads(written)


def unlike(bridge: Object, direct: Object, differences: dict[str, Difference]) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ without a reason, and those with one that no longer differ."""
    names = {*bridge, *direct, *differences}
    pairs = {name: (bridge.get(name), direct.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if (pair[0] == pair[1]) == (name in differences)
            or (name in differences and not differences[name].alike(*pair))}


@pytest.mark.skipif(not wire.HAS_ZSTD, reason="no libzstd on this host: the body goes as it is")
@pytest.mark.parametrize(("given", "direct", "differences"), [
    (BRIDGE_PLAIN, CHATGPT_PLAIN, {**BODY_DIFFERENCES, **PLAIN_DIFFERENCES}),
    (BRIDGE_LITE, CHATGPT_LITE, {**BODY_DIFFERENCES, **LITE_DIFFERENCES}),
], ids=["plain", "lite"])
def test_backend_is_sent_what_codex_itself_sends_it(
    start: Start, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch,
    given: Capture, direct: Capture, differences: dict[str, Difference],
) -> None:
    monkeypatch.setattr(q, "COMPRESS_FROM", 1)  # bytes; with their whole texts these requests are 40 KB
    override = direct.headers.get("x-openai-account-routing-override", "NO_CONSTRAINT")
    backend.routing = (backend.origin, override)
    bridge = start("--compress", "on")
    sign_in = bridge.bridge.credentials.bearer()
    bridge.bridge.routing._ask(sign_in)  # as at every start, but waited for
    raw = json.dumps(given.body).encode()
    reply = wire.post(bridge.address, "/v1/responses", raw, given.headers)
    assert (reply.status, reply.header("x-qoo-bridge-repaired"), backend.refusals) == (200, None, [])
    (request,) = sent(backend)
    assert request.body == raw  # the client's own bytes
    headers = without_ids(dict(request.headers), given.ids)
    assert len(headers) == len(request.headers)
    assert unlike(headers, without_ids(direct.headers, direct.ids), HEADER_DIFFERENCES) == {}
    body, wanted = without_ids(request.json, given.ids), without_ids(direct.body, direct.ids)
    assert list(body) == list(wanted)  # in Codex's order
    assert unlike(body, wanted, differences) == {}
