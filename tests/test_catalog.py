"""Room catalog, end to end: the model list, its versions, and the names that a request may use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import wire
from conftest import LogLines, RunningBridge, Start
from help import (
    AGENT,
    CARRIER,
    CHAT,
    CLIENTS,
    CODEX,
    FETCH_FAILURES,
    HI,
    LITE,
    LITE_BODY,
    LITE_MODEL,
    LOCAL_MD,
    MODELS,
    PLAIN_BODY,
    RESPONSES,
    SDK_BODY,
    TOOL,
    USER,
    NoThreads,
    Object,
    accepted,
    ask,
    models,
    sent,
    settle,
)

import qoo_bridge as q

AT_ONCE = -1.0  # as an age in seconds: it is always over


def slugs(bridge: RunningBridge) -> list[str]:
    return [model["id"] for model in models(bridge).json["data"]]


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


@pytest.fixture
def due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every list old as soon as it is there."""
    monkeypatch.setattr(q, "CATALOG_AGE", AT_ONCE)
    monkeypatch.setattr(q, "REFRESH_PAUSE", AT_ONCE)


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


@pytest.mark.parametrize("failure", FETCH_FAILURES.values(), ids=FETCH_FAILURES)
@pytest.mark.usefixtures("fresh")
def test_nobody_waits_once_a_fetch_failed(
    bridge: RunningBridge, backend: wire.Backend, failure: wire.Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "REFRESH_PAUSE", 0.02)
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
    backend.on("/models", FETCH_FAILURES["500"])
    assert models(bridge).status == 500
    settle(bridge)
    assert models(bridge).status == 200  # it waits for the fetch that it starts


@pytest.mark.parametrize("failure", ["500", "cut"])
def test_an_alias_waits_for_the_list_that_it_needs(
    failure: str, bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "REFRESH_PAUSE", 0.05)
    backend.on("/models", FETCH_FAILURES[failure])
    assert models(bridge).status >= 500
    assert ask(bridge, {**PLAIN_BODY, "model": "local_md"}).status == 200  # within the pause
    assert [request.json["model"] for request in sent(backend)] == ["gpt-5.6-sol"]


def test_a_sign_in_is_seen_by_the_next_alias(start: Start, backend: wire.Backend) -> None:
    bridge = start(signed_in=False)
    body = {**PLAIN_BODY, "model": "local_md"}
    assert ask(bridge, body).status == 401
    wire.write_auth(bridge.auth_file, backend)
    assert ask(bridge, body).status == 200  # in the same second
    assert sent(backend)[-1].json["model"] == "gpt-5.6-sol"


def test_a_thread_that_cannot_start_fails_nothing_and_is_tried_again(
    bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name in ("catalog", "routing", "open-ahead"):
            raise RuntimeError("can't start new thread")
        plain(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert ask(bridge, PLAIN_BODY).status == 200
    assert models(bridge).status == 200
    assert ask(bridge, {**PLAIN_BODY, "model": "local_md"}).status == 200


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
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, unchanged: wire.Reply
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
    assert not [line for line in log_lines.lines if "model list" in line]  # nothing failed


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


@pytest.mark.parametrize("failure", FETCH_FAILURES.values(), ids=FETCH_FAILURES)
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
        listing = catalog.get(version, wait=0.5)
        assert listing is not None
        assert list(listing.entries) == [version]


@pytest.mark.parametrize("good", [True, False], ids=["lists", "refusals"])
def test_versions_that_are_remembered_are_bounded(good: bool) -> None:
    def fetch(version: str, etag: str) -> q.BufferedReply:
        return answer(version) if good else q.BufferedReply(400, {}, b"{}")

    catalog = q.Catalog(fetch, {}, "0")
    for number in range(40):
        catalog.get(str(number), wait=5)
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


@pytest.mark.parametrize("name", ["gpt-5.5-high", "gpt-5.5:low", "local_md:high", "best-xhigh"])
def test_a_model_by_id_may_have_an_effort_in_its_name_as_in_a_request(start: Start, name: str) -> None:
    reply = wire.get(start("--alias", "best=gpt-6.1-sol").address, f"/v1/models/{name}")
    assert (reply.status, reply.json["id"], reply.json["object"]) == (200, name, "model")


def test_codex_list_is_upstreams_and_the_aliases(start: Start, backend: wire.Backend) -> None:
    further = {"kept": [1, None]}
    backend.always("/models", wire.reply_json(200, {"models": backend.catalog, "further": further}))
    reply = models(start("--alias", "best=gpt-6.1-sol", "--alias", "plain=gpt-5.5"), "0.169.0")
    by_slug = {entry["slug"]: entry for entry in backend.catalog}
    own: Object = {"upgrade": None, "availability_nux": None}
    aliased = [{**by_slug[slug], **own, "slug": name, "display_name": name,
                "description": f"This bridge's alias for {slug}."} for name, slug in
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
def test_alias_is_its_model(
    start: Start, backend: wire.Backend, log_lines: LogLines, target: str, slug: str
) -> None:
    bridge = start("--alias", f"mine={target}")
    assert ask(bridge, {**PLAIN_BODY, "model": "mine", "instructions": "be brief"}).status == 200
    (request,) = sent(backend)
    assert (request.json["model"], request.header("x-codex-routing-hint")) == (slug, f"model={slug}")
    lite = slug != "gpt-5.5"
    assert request.header(q.LITE_HEADER) == ("true" if lite else None)
    assert ("tools" in request.json, request.json["input"][0] == CARRIER) == (not lite, lite)
    assert f" mine->{slug} rules=alias," in log_lines.wait_for(" mine->")
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
    start: Start, backend: wire.Backend, log_lines: LogLines, alias: str
) -> None:
    bridge = start("--alias", f"{alias}=gpt-6-sol")
    bridge.bridge.warm_up(threading.Event())  # at start, before any request
    reason = log_lines.wait_for("ERROR ").partition(" ")[2]
    assert reason == f"ignoring the alias {alias}: the catalogue has a model of that name"
    settle(bridge)
    catalog = wire.get(bridge.address, "/status").json["catalog"]
    assert catalog["refused_aliases"] == {alias: reason}
    assert catalog["aliases"] == {"local_md": LOCAL_MD}
    assert slugs(bridge).count(alias) == (alias == "gpt-5.5")
    assert [entry["slug"] for entry in models(bridge, "0.169.0").json["models"]].count(alias) == 1
    assert ask(bridge, {**PLAIN_BODY, "model": alias}).status == 200
    assert sent(backend)[0].json["model"] == alias
    assert sum("ERROR" in line for line in log_lines.lines) == 1


@pytest.mark.parametrize("name", ["gpt-next", "gpt-5", "some/vendor:model@1"])
def test_unknown_model_passes_as_it_is(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, name: str
) -> None:
    body = {**LITE_BODY, "model": name, "input": [HI], "tools": [TOOL], "instructions": "x",
            "reasoning": {"effort": "xhigh"}, "service_tier": "priority"}
    assert ask(bridge, body).status == 200
    (request,) = sent(backend)
    assert (request.json, request.header(q.LITE_HEADER)) == (body, None)
    assert f" {name}->{name} rules=- repairs=- status=200 " in log_lines.wait_for("->")


# -- effort and tier ----------------------------------------------------------


@pytest.mark.parametrize(("efforts", "given", "effort"), [
    (("low", "medium"), "xhigh", "medium"), (("medium", "high"), "minimal", "medium"),
    (("low", "high"), "medium", "low"), (("low", "max", "ultra"), "ultra", "max"),
])
def test_effort_is_the_nearest_that_the_list_has(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines,
    efforts: tuple[str, ...], given: str, effort: str,
) -> None:
    backend.catalog = [wire.model_entry("gpt-6-sol", 1, efforts=efforts)]
    assert ask(bridge, {**SDK_BODY, "reasoning": {"effort": given}}).status == 200
    assert sent(backend)[-1].json["reasoning"] == {"effort": effort, "context": "all_turns"}
    assert ",effort," in log_lines.wait_for("form repairs=- status=200")


@pytest.mark.parametrize(("tiers", "given", "tier"), [
    ([], "priority", None), ([], "fast", None), ([{"id": "priority"}], "fast", "priority"),
    ([{"id": "flex"}], "priority", None), ([{"id": "flex"}], "flex", None),
    ([{"id": "priority"}], "auto", None),
])
def test_tier_is_one_that_the_list_has(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines,
    tiers: list[Object], given: str, tier: str | None,
) -> None:
    backend.catalog = [{**wire.model_entry("gpt-5.5", 1, lite=False), "service_tiers": tiers}]
    assert ask(bridge, {**PLAIN_BODY, "service_tier": given}).status == 200
    (request,) = sent(backend)
    assert request.json.get("service_tier") == tier
    assert request.header("x-codex-routing-hint") == "model=gpt-5.5" + (f";tier={tier}" if tier else "")
    assert ",service-tier," in log_lines.wait_for("gpt-5.5->gpt-5.5")


@pytest.mark.parametrize("fields", [
    {"reasoning": {"effort": "high"}}, {"service_tier": "priority"}, {"service_tier": "default"},
])
def test_what_the_model_has_stays(
    bridge: RunningBridge, backend: wire.Backend, log_lines: LogLines, fields: Object
) -> None:
    assert ask(bridge, {**PLAIN_BODY, **fields}).status == 200
    assert {name: sent(backend)[0].json[name] for name in fields} == fields
    line = log_lines.wait_for("gpt-5.5->gpt-5.5")
    assert "effort" not in line
    assert "service-tier" not in line


ALIASED = {**PLAIN_BODY, "model": "local_md"}


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second have passed since any failure."""
    monkeypatch.setattr(q, "REFRESH_PAUSE", -1.0)


@pytest.fixture
def gate_2() -> Iterator[threading.Event]:
    """A gate_2 that upstream waits at; it is open when the test ends."""
    event = threading.Event()
    yield event
    event.set()


def asked_models(backend: wire.Backend) -> list[str]:
    """Return the models of the turns that came upstream."""
    return [request.json["model"] for request in sent(backend)]


@pytest.mark.parametrize("failure", FETCH_FAILURES)
@pytest.mark.usefixtures("no_pause")
def test_alias_after_an_outage_means_its_model(
    failure: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    backend.on("/models", *[FETCH_FAILURES[failure]] * 2)  # a stale connection is tried twice
    models(bridge)
    settle(bridge)
    backend._scripts.clear()
    assert ask(bridge, ALIASED).status == 200
    assert asked_models(backend) == [LOCAL_MD]
    assert backend.refusals == []


@pytest.mark.parametrize("failure", FETCH_FAILURES)
@pytest.mark.usefixtures("no_pause")
def test_list_after_an_outage_is_the_list(failure: str, bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/models", *[FETCH_FAILURES[failure]] * 2)
    assert models(bridge).status >= 400
    settle(bridge)
    backend._scripts.clear()
    assert models(bridge).status == 200


@pytest.mark.usefixtures("no_pause")
def test_failure_that_is_told_is_the_last_one(bridge: RunningBridge, backend: wire.Backend) -> None:
    backend.on("/models", wire.refuse(500, "first"), wire.refuse(429, "second"))
    assert (models(bridge).status, models(bridge).status) == (500, 429)


@pytest.mark.parametrize("first", ["alias", "list"])
def test_sign_in_is_used_in_its_first_second(first: str, start: Start, backend: wire.Backend) -> None:
    bridge = start(signed_in=False)
    assert models(bridge).status == 401
    wire.write_auth(bridge.auth_file, backend)
    if first == "list":
        assert models(bridge).status == 200
    assert ask(bridge, ALIASED).status == 200
    assert asked_models(backend) == [LOCAL_MD]


@pytest.mark.usefixtures("no_pause")
def test_request_waits_for_the_fetch_that_it_has_started(
    bridge: RunningBridge, backend: wire.Backend, gate_2: threading.Event
) -> None:
    def reply(exchange: wire.Exchange) -> None:
        assert gate_2.wait(10)
        backend.default(exchange)

    backend.on("/models", wire.refuse(500, "broken"), reply)
    models(bridge)
    settle(bridge)
    with wire.Client(bridge.address) as client:
        client.request("POST", "/v1/responses", ALIASED)
        backend.wait_for(2, "/models")
        assert sent(backend) == []
        gate_2.set()
        assert client.read_reply().status == 200
    assert asked_models(backend) == [LOCAL_MD]


# -- a thread that cannot start -----------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/models"])
def test_fetch_that_cannot_start_fails_no_request_and_is_made_later(
    path: str, bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "CATALOG_WAIT", 0.1)
    monkeypatch.setattr(q, "REFRESH_PAUSE", -1.0)
    threads = NoThreads(monkeypatch, "catalog")
    if path == "/v1/responses":
        assert ask(bridge, PLAIN_BODY).status == 200
    else:
        assert models(bridge).status in (200, 503, 504)
    assert threads.failed
    threads.names = ()
    monkeypatch.setattr(q, "CATALOG_WAIT", 5)
    assert models(bridge).status == 200
    assert ask(bridge, ALIASED).status == 200
    assert asked_models(backend)[-1] == LOCAL_MD


def test_old_list_stays_while_no_thread_can_start(
    bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch, log_lines: LogLines
) -> None:
    assert models(bridge).status == 200
    monkeypatch.setattr(q, "CATALOG_AGE", -1.0)
    threads = NoThreads(monkeypatch, "catalog")
    for _ in range(3):
        assert models(bridge).status == 200
        assert ask(bridge, ALIASED).status == 200
    assert threads.failed
    threads.names = ()
    backend.catalog = [wire.model_entry("gpt-7", 1)]
    models(bridge)
    settle(bridge)
    assert models(bridge).json["data"][0]["id"] == "gpt-7"
    assert not any("Traceback" in line for line in log_lines.lines)


def test_etag_of_another_list_fails_no_turn_while_no_thread_can_start(
    bridge: RunningBridge, backend: wire.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert models(bridge).status == 200
    backend.catalog = [*backend.catalog, wire.model_entry("gpt-7", 1)]
    threads = NoThreads(monkeypatch, "catalog")
    assert ask(bridge, PLAIN_BODY).status == 200
    assert threads.failed


UPGRADE = {"id": "gpt-7", "reasoning_effort_mapping": None, "migration_config_key": "x"}
NUX = {"message": "Try it"}


def entry_of(bridge: RunningBridge, name: str) -> Object:
    """Return the entry of a name in the list that a Codex gets."""
    (found,) = [entry for entry in models(bridge, "0.169.0").json["models"] if entry["slug"] == name]
    return dict(found)


@pytest.mark.parametrize("field", ["upgrade", "availability_nux"])
@pytest.mark.parametrize("value", [UPGRADE, NUX, "gpt-7"])
def test_an_alias_does_not_talk_the_user_out_of_itself(
    bridge: RunningBridge, backend: wire.Backend, field: str, value: Any
) -> None:
    for entry in backend.catalog:
        entry[field] = value
    assert entry_of(bridge, "local_md")[field] is None
    assert entry_of(bridge, LOCAL_MD)[field] == value  # the model's own stays


def test_an_aliass_description_says_what_it_is_an_alias_of(start: Start) -> None:
    bridge = start("--alias", "best=gpt-6.1-sol", "--alias", "deep=gpt-6:high")
    for name, slug in (("local_md", LOCAL_MD), ("best", "gpt-6.1-sol"), ("deep", "gpt-6.1-sol")):
        entry = entry_of(bridge, name)
        assert slug in entry["description"] and "alias" in entry["description"].lower()
        assert entry["display_name"] == name
    assert "high" in entry_of(bridge, "deep")["description"]


def test_an_alias_is_else_as_its_model(bridge: RunningBridge, backend: wire.Backend) -> None:
    own = {"slug", "display_name", "description", "upgrade", "availability_nux"}
    (model,) = [entry for entry in backend.catalog if entry["slug"] == LOCAL_MD]
    alias = entry_of(bridge, "local_md")
    assert {name: alias[name] for name in alias if name not in own} == {
        name: model[name] for name in model if name not in own}


ALIASES = [  # option, model, effort
    ("deep=gpt-6:high", "gpt-6.1-sol", "high"), ("deep=gpt-6.1-sol:max", "gpt-6.1-sol", "max"),
    ("quick=gpt-5.5:low", "gpt-5.5", "low"), ("none=gpt-5.5:none", "gpt-5.5", "none"),
    ("local_md=gpt-5:xhigh", LOCAL_MD, "xhigh"), ("most=gpt-5.5:ultra", "gpt-5.5", "xhigh"),
]


@pytest.mark.parametrize(("option", "slug", "effort"), ALIASES)
@pytest.mark.parametrize("path", [RESPONSES, CHAT])
def test_an_effort_in_an_alias_goes_up(
    start: Start, backend: wire.Backend, path: str, option: str, slug: str, effort: str
) -> None:
    name = option.partition("=")[0]
    body: Object = {"messages": [USER]} if path == CHAT else {"input": "hi"}
    reply = ask(start("--alias", option), {"model": name, **body}, path=path)
    assert (reply.status, backend.refusals) == (200, [])
    request = sent(backend)[0]
    assert (request.json["model"], request.json["reasoning"]["effort"]) == (slug, effort)


@pytest.mark.parametrize("option", ["deep=gpt-6:high"])
def test_an_alias_with_an_effort_is_in_both_lists(start: Start, option: str) -> None:
    bridge = start("--alias", option)
    assert "deep" in [model["id"] for model in models(bridge).json["data"]]
    assert entry_of(bridge, "deep")["default_reasoning_level"] == "high"  # Codex shows it, and sends it
    status = wire.get(bridge.address, "/status").json
    assert status["catalog"]["aliases"]["deep"].startswith("gpt-6.1-sol")


def test_an_aliass_target_with_a_colon_that_is_no_effort_is_a_name(
    start: Start, backend: wire.Backend
) -> None:
    backend.catalog.append(wire.model_entry("vendor:model", 50, lite=False))
    assert ask(start("--alias", "odd=vendor:model"), {"model": "odd", "input": "hi"}).status == 200
    assert sent(backend)[0].json["model"] == "vendor:model"


def test_local_md_means_the_best_of_its_family_until_told_otherwise(
    start: Start, backend: wire.Backend
) -> None:
    for options in ((), ("--alias", "local_md=gpt-6")):
        assert ask(start(*options), {"model": "local_md", "input": "hi"}).status == 200
    assert [request.json["model"] for request in sent(backend)] == [LOCAL_MD, "gpt-6.1-sol"]


# -- efforts ----------------------------------------------------------------------------------


@MODELS
@CLIENTS
def test_no_effort_stays_no_effort(
    bridge: RunningBridge, backend: wire.Backend, headers: dict[str, str], model: str
) -> None:
    reply = ask(bridge, {"model": model, "input": "hi", "reasoning": {"effort": "none"}}, headers)
    assert accepted(bridge, backend, reply).json["reasoning"]["effort"] == "none"


@MODELS
def test_no_effort_of_a_chat_stays_no_effort(
    bridge: RunningBridge, backend: wire.Backend, model: str
) -> None:
    reply = ask(bridge, {"model": model, "messages": [USER], "reasoning_effort": "none"}, path=CHAT)
    assert accepted(bridge, backend, reply).json["reasoning"]["effort"] == "none"


IN_THE_NAME = [  # asked, the model that it means, the effort that goes up
    ("gpt-5.5-high", "gpt-5.5", "high"), ("gpt-5.5:high", "gpt-5.5", "high"),
    ("gpt-5.5-low", "gpt-5.5", "low"), ("gpt-5.5-none", "gpt-5.5", "none"),
    ("gpt-5.5-xhigh", "gpt-5.5", "xhigh"), ("gpt-5.5:max", "gpt-5.5", "xhigh"),
    ("gpt-6-sol-medium", LITE_MODEL, "medium"), ("gpt-6-sol:ultra", LITE_MODEL, "max"),
    ("gpt-6.1-sol-max", "gpt-6.1-sol", "max"),
]


@pytest.mark.parametrize(("asked", "slug", "effort"), IN_THE_NAME)
@pytest.mark.parametrize("path", [RESPONSES, CHAT])
def test_an_effort_in_a_models_name_is_one(
    bridge: RunningBridge, backend: wire.Backend, path: str, asked: str, slug: str, effort: str
) -> None:
    body: Object = {"messages": [USER]} if path == CHAT else {"input": "hi"}
    request = accepted(bridge, backend, ask(bridge, {"model": asked, **body}, path=path))
    assert (request.json["model"], request.json["reasoning"]["effort"]) == (slug, effort)
    assert request.header("x-codex-routing-hint") == f"model={slug}"
    assert (request.header(q.LITE_HEADER) == "true") == (slug != "gpt-5.5")


@pytest.mark.parametrize("asked", ["gpt-5.5-high", "gpt-5.5:high", "deep"])
@pytest.mark.parametrize(("path", "given"), [
    (RESPONSES, {"input": "hi", "reasoning": {"effort": "low"}}),
    (CHAT, {"messages": [USER], "reasoning_effort": "low"}),
    (CHAT, {"messages": [USER], "reasoning": {"effort": "low"}}),
])
def test_an_effort_in_a_field_says_more_than_one_in_a_name(
    start: Start, backend: wire.Backend, path: str, given: Object, asked: str
) -> None:
    bridge = start("--alias", "deep=gpt-5.5:high")
    request = accepted(bridge, backend, ask(bridge, {"model": asked, **given}, path=path))
    assert (request.json["model"], request.json["reasoning"]["effort"]) == ("gpt-5.5", "low")


@pytest.mark.parametrize("asked", ["gpt-5.5-high", "gpt-5.5-mini", "gpt-next-high", "gpt-5.5-turbo", "high"])
def test_a_whole_name_is_a_model_first(bridge: RunningBridge, backend: wire.Backend, asked: str) -> None:
    backend.catalog.append(wire.model_entry("gpt-5.5-high", 20, lite=False))
    request = accepted(bridge, backend, ask(bridge, {"model": asked, "input": "hi"}))
    assert request.json["model"] == asked
    assert "effort" not in request.json.get("reasoning", {})


def test_an_aliass_own_name_is_a_model_first(start: Start, backend: wire.Backend) -> None:
    bridge = start("--alias", "gpt-5.5-high=gpt-6-sol")
    request = accepted(bridge, backend, ask(bridge, {"model": "gpt-5.5-high", "input": "hi"}))
    assert (request.json["model"], request.json["reasoning"]) == (LITE_MODEL, {"context": "all_turns"})
