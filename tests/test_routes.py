"""Room routes: which path and method is answered by what, and the side routes passed on upstream."""

from __future__ import annotations

import re
from typing import Any

import pytest
import wire
from conftest import RunningBridge, SharedBridges, Start
from help import (
    API_KEY,
    BEARER,
    CODEX,
    HI,
    HOST,
    LITE,
    LITE_BODY,
    LOCAL_MD,
    MODEL,
    REQUEST,
    TOOL,
    Object,
    ask,
    bearer,
    head,
    respond,
    sent,
    until,
)

import qoo_bridge as q

# -- routes


@pytest.mark.parametrize("form", ["{}", "{}/", "/v1{}", "/v1{}/", "/v1/v1{}", "/v1/v1{}/", "/v1{}?a=b/../c"])
@pytest.mark.parametrize("path", ["/healthz", "/status", "/metrics", "/models", "/models/gpt-5.5",
                                  "/api/codex/usage"])
def test_get_route_takes_any_prefix(shared_bridge: RunningBridge, form: str, path: str) -> None:
    assert wire.get(shared_bridge.address, form.format(path)).status == 200


@pytest.mark.parametrize("form", ["{}", "{}/", "/v1{}", "/v1{}/", "/v1/v1{}", "/v1/v1{}/"])
@pytest.mark.parametrize(("path", "body"), [
    ("/responses", REQUEST),
    ("/chat/completions", {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi"}]}),
])
def test_post_route_takes_any_prefix(
    shared_bridge: RunningBridge, form: str, path: str, body: object
) -> None:
    assert wire.post(shared_bridge.address, form.format(path), body).status == 200


@pytest.mark.parametrize("path", [
    "/nothing", "/v1/v1/v1/responses", "/v2/responses", "/V1/responses", "/responsesx", "/v1responses",
    "/healthz/x", "/v1/chat", "/v1/images", "/v1//health", "/%76%31/responses", "/v1/responses%2f",
    "/./healthz", "/v1/../healthz", "/healthz;x", "/.git/config",
])
def test_unknown_path_is_404_in_json(shared_bridge: RunningBridge, path: str) -> None:
    with wire.Client(shared_bridge.address) as client:
        for method in ("GET", "POST", "PUT", "HEAD", "OPTIONS"):
            client.request(method, path)
            reply = client.read_reply()
            assert (reply.status, reply.header("content-type")) == (404, "application/json")
            assert method == "HEAD" or reply.json["error"]["code"] == "not_found"


@pytest.mark.parametrize(("method", "path", "allow"), [
    ("POST", "/v1/models", "GET, HEAD, OPTIONS"),
    ("DELETE", "/v1/models/gpt-5.5", "GET, HEAD, OPTIONS"),
    ("POST", "/healthz", "GET, HEAD, OPTIONS"),
    ("PUT", "/status", "GET, HEAD, OPTIONS"),
    ("PATCH", "/", "GET, HEAD, OPTIONS"),
    ("GET", "/v1/chat/completions", "POST, OPTIONS"),
    ("HEAD", "/v1/chat/completions", "POST, OPTIONS"),
    ("GET", "/v1/responses/compact", "POST, OPTIONS"),
    ("GET", "/v1/images/generations", "POST, OPTIONS"),
    ("POST", "/api/codex/usage", "GET, HEAD, OPTIONS"),
    ("PUT", "/v1/responses", "POST, GET, HEAD, OPTIONS"),
])
def test_other_method_is_405_with_allow(
    shared_bridge: RunningBridge, method: str, path: str, allow: str
) -> None:
    with wire.Client(shared_bridge.address) as client:
        client.request(method, path)
        reply = client.read_reply()
    assert (reply.status, reply.header("allow")) == (405, allow)


@pytest.mark.parametrize("path", [
    "/healthz", "/", "/status", "/metrics", "/v1/models", "/v1/models?client_version=0.169.0",
    "/v1/models/gpt-5.5",
    "/v1/models/none", "/nothing", "/client-config/codex", "/v1/responses/resp_none",
    pytest.param("/api/codex/usage"),
])
def test_head_has_no_body(shared_bridge: RunningBridge, path: str) -> None:
    with wire.Client(shared_bridge.address) as client:
        client.request("GET", path)
        got = client.read_reply()
        client.request("HEAD", path)
        reply = client.read_reply()
        assert (reply.status, reply.header("content-type")) == (got.status, got.header("content-type"))
        client.request("GET", "/healthz")
        assert client.read_reply().status == 200


def test_head_opens_no_websocket(start: Start) -> None:
    bridge = start()
    with wire.Client(bridge.address) as client:
        client.send(head("HEAD /v1/responses HTTP/1.1", HOST, "Connection: Upgrade", "Upgrade: websocket",
                         "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="))
        status = client.read_head("HEAD").status
    bridge.server.drain(1)
    bridge.faults.clear()
    assert status == 405


@pytest.mark.parametrize(("path", "allow"), [
    ("/v1/responses", "POST, GET, HEAD, OPTIONS"), ("/v1/models", "GET, HEAD, OPTIONS"),
    ("/v1/models/x", "GET, HEAD, OPTIONS"), ("/healthz", "GET, HEAD, OPTIONS"),
    ("/v1/images/edits", "POST, OPTIONS"),
])
def test_options_names_the_methods(shared_bridge: RunningBridge, path: str, allow: str) -> None:
    with wire.Client(shared_bridge.address) as client:
        client.request("OPTIONS", path)
        reply = client.read_reply()
    assert (reply.status, reply.header("allow"), reply.header("content-length")) == (204, allow, None)


# -- the upstream target

FIXED = re.compile(
    r"POST /backend-api/codex/(responses|responses/compact|images/generations)"
    r"|GET /backend-api/codex/models\?client_version=[0-9A-Za-z.-]{1,40}"
    r"|GET /backend-api/wham/(accounts/check|usage)")


@pytest.mark.parametrize("path", [
    "/v1/responses", "/v1/responses?x=/../../y&upstream=https://evil.example", "/v1/responses/../accounts",
    "/v1/responses/..%2f..%2faccounts", "/v1/%2e%2e/responses", "/v1/responses%3fx=1", "/v1/responses%00",
    "/v1/responses;/../x", "/v1/responses/compact?a=b", "/v1/responses/compact/../../x", "/v1\\..\\responses",
    "/v1/images/generations?host=evil.example", "/v1/@evil.example/responses",
    "/v1/responses/https://evil.example",
])
def test_request_cannot_choose_the_upstream_target_by_post(bridges: SharedBridges, path: str) -> None:
    fields = {"X-Forwarded-Host": "evil.example", "X-Original-URL": "/evil", "X-Forwarded-Proto": "http",
              "X-Rewrite-URL": "/evil", "Forwarded": "host=evil.example", "Host": "evil.lan"}
    body = {**REQUEST, "base_url": "https://evil.example", "path": "/evil"}
    wire.post(bridges.bridge().address, path, body, fields)
    asked = [f"{each.method} {each.target}" for each in bridges.asked()]
    assert [each for each in asked if not FIXED.fullmatch(each)] == []
    assert {each.header("host") for each in bridges.asked()} <= {f"localhost:{bridges.backend.address[1]}"}


@pytest.mark.parametrize("path", [
    "/v1/models?client_version=0.1.0", "/v1/models?client_version=../../x",
    "/v1/models?client_version=0.1.0%26a=b",
    "/v1/models?client_version=0.1.0%2f..%2f..", "/v1/models?client_version=0.1.0%0d%0aX-A:1",
    "/v1/models/..%2f..%2fx",
    "/v1/models/../x", "/v1/models?client_version=0.1.0&client_version=/x", "/api/codex/usage?x=/../y",
    "/backend-api/wham/usage?x=y", "/backend-api/wham/accounts/check", "/backend-api/codex/models",
    "/v1/models%23",
])
def test_request_cannot_choose_the_upstream_target_by_get(bridges: SharedBridges, path: str) -> None:
    wire.get(bridges.bridge().address, path)
    asked = [f"{each.method} {each.target}" for each in bridges.asked()]
    assert [each for each in asked if not FIXED.fullmatch(each)] == []


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
    if method == "POST":
        assert (reply.json, reply.header("x-request-id")) == (SIDE_REPLY, "r1")
    assert (reply.status, reply.header("set-cookie")) == (200, None)
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
    assert call(bridge, method, path).status == 200
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
    report = wire.get(bridge.address, "/api/codex/usage").json
    assert report == {name: wire.USAGE_REPORT[name] for name in report}
    assert {"rate_limit", "plan_type"} <= report.keys()
    assert not {"email", "user_id", "account_id"} & report.keys()  # the LAN is open: everyone reads it


def test_usage_with_a_key_is_all_that_upstream_says(start: Start) -> None:
    bridge = start("--api-key", f"laptop={API_KEY}")
    reply = wire.get(bridge.address, "/api/codex/usage", {"Authorization": f"Bearer {API_KEY}"})
    assert reply.json == wire.USAGE_REPORT


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


def test_what_lies_below_a_response_is_not_served(bridge: RunningBridge) -> None:
    name = respond(bridge, False, input="one")["id"]
    reply = wire.get(bridge.address, f"/v1/responses/{name}/input_items")
    assert (reply.status, reply.json["error"]["code"]) == (404, "not_found")
    assert "no such endpoint" in reply.json["error"]["message"]


COUNT = "/v1/responses/input_tokens"


def estimate(bridge: RunningBridge, **fields: Any) -> int:
    """Ask how many tokens a request has."""
    reply = ask(bridge, {**MODEL, "input": "hi", **fields}, path=COUNT)
    assert reply.status == 200, reply.body
    assert reply.header("content-type") == "application/json"
    assert set(reply.json) == {"object", "input_tokens"}
    assert reply.json["object"] == "response.input_tokens"
    tokens = reply.json["input_tokens"]
    assert type(tokens) is int
    return int(tokens)


WORDS = "The quick brown fox jumps over the lazy dog. " * 100  # 1,000 tokens, about
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 1_000_000}


def test_an_estimate_follows_the_text(bridge: RunningBridge, backend: wire.Backend) -> None:
    assert 0 < estimate(bridge) < 50
    assert 600 < estimate(bridge, input=WORDS) < 2000
    assert 600 < estimate(bridge, input="hi", instructions=WORDS) < 2000
    assert sent(backend) == []  # nothing of it is asked upstream


@pytest.mark.parametrize("items", [
    [{"role": "user", "content": WORDS}], [{**HI, "content": [{"type": "input_text", "text": WORDS}]}],
    [HI, {"type": "function_call", "call_id": "c", "name": "run", "arguments": WORDS}],
    [HI, {"type": "function_call_output", "call_id": "c", "output": WORDS}],
    [HI, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": WORDS}]}],
    [{"type": "additional_tools", "role": "developer", "tools": [{**TOOL, "description": WORDS}]}, HI],
])
def test_an_estimate_counts_each_kind_of_item(bridge: RunningBridge, items: list[Object]) -> None:
    assert 600 < estimate(bridge, input=items) < 2500


def test_an_estimate_counts_tools(bridge: RunningBridge) -> None:
    tools = [{**TOOL, "name": f"run_{number}", "description": WORDS} for number in range(3)]
    assert 1800 < estimate(bridge, tools=tools) < 7000


def test_an_estimate_counts_an_image_as_an_image(bridge: RunningBridge) -> None:
    item = {**HI, "content": [*HI["content"], IMAGE]}
    with_one, with_two = estimate(bridge, input=[item]), estimate(bridge, input=[item, item])
    assert 50 < with_one < 5000  # its data are no text
    assert with_two > with_one + 50


def test_an_estimate_is_the_same_each_time_and_grows(bridge: RunningBridge) -> None:
    counts = [estimate(bridge, input=WORDS * size) for size in (1, 1, 2, 3)]
    assert counts[0] == counts[1] < counts[2] < counts[3]


@pytest.mark.parametrize("model", ["gpt-5.5", "gpt-6-sol", "local_md", "of-tomorrow"])
@pytest.mark.parametrize("path", ["/responses/input_tokens", "/v1/responses/input_tokens/"])
def test_an_estimate_is_had_for_any_model(bridge: RunningBridge, path: str, model: str) -> None:
    assert ask(bridge, {"model": model, "input": "hi"}, path=path).status == 200


def test_an_estimate_needs_no_model(bridge: RunningBridge) -> None:
    assert wire.post(bridge.address, COUNT, {"input": "hi"}).status == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b'{"model": "m", "input": 5}'])
def test_what_is_no_request_has_no_estimate(bridge: RunningBridge, body: bytes) -> None:
    reply = wire.post(bridge.address, COUNT, body)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (400, "bridge")


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_an_estimate_is_asked_by_post(bridge: RunningBridge, method: str) -> None:
    with wire.Client(bridge.address) as client:
        client.request(method, COUNT)
        reply = client.read_reply()
    assert (reply.status, "POST" in (reply.header("allow") or "")) == (405, True)



# -- a handshake behind a plain nginx -------------------------------------------------------

HANDSHAKE = {"sec-websocket-version": "13", "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}


@pytest.mark.parametrize("fields", [
    pytest.param({**HANDSHAKE, "connection": "close"}, id="nginx"),
    pytest.param({"connection": "close"}, id="nginx that took more"),
    pytest.param({}, id="nothing at all"),
    pytest.param({**CODEX, **HANDSHAKE}, id="codex"),
    pytest.param({**HANDSHAKE, "upgrade": "websocket"}, id="no upgrade in connection"),
    pytest.param({**HANDSHAKE, "connection": "Upgrade"}, id="no upgrade"),
])
def test_a_get_that_asks_for_nothing_is_426(
    bridge: RunningBridge, backend: wire.Backend, fields: dict[str, str]
) -> None:
    reply = wire.get(bridge.address, "/v1/responses", fields)
    assert (reply.status, reply.header("x-qoo-bridge-error")) == (426, "bridge")
    assert (reply.header("upgrade") or "").lower() == "websocket"  # RFC 9110, 15.5.22
    assert "POST" in reply.json["error"]["message"]
    assert [request for request in backend.requests if request.path.endswith("/responses")] == []


def test_a_head_request_for_responses_stays_405(bridge: RunningBridge) -> None:
    with wire.Client(bridge.address) as client:
        client.request("HEAD", "/v1/responses")  # so `codex doctor` probes
        assert client.read_reply().status == 405


KEYED = ("--api-key", f"laptop={API_KEY}")


@pytest.mark.parametrize(
    "path", ["/v1/messages", "/messages", "/v1/messages/count_tokens", "/v1/v1/messages/"])
def test_claude_clients_are_told_of_litellm(shared_bridge: RunningBridge, path: str) -> None:
    reply = wire.post(shared_bridge.address, path, {"model": "claude-opus-4-5", "messages": []})
    assert (reply.status, reply.json["error"]["code"]) == (404, "not_found")
    for fact in ("LiteLLM", "4000", "/v1/client-config/claude"):
        assert fact in reply.json["error"]["message"]


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/v1"])
@pytest.mark.parametrize("keys", [(), KEYED], ids=["open", "locked"])
def test_a_browser_at_the_base_url_gets_a_sentence(start: Start, keys: tuple[str, ...], path: str) -> None:
    bridge = start(*keys)
    reply = wire.get(bridge.address, path, {"Accept": "text/html"})
    assert (reply.status, reply.header("content-type")) == (200, "text/plain; charset=utf-8")
    assert len(reply.body.splitlines()) <= 3
    for fact in (bridge.url, "/v1/client-config", bridge.url.removesuffix("v1")):
        assert fact in reply.body.decode()


def test_the_page_is_at_the_root_only(shared_bridge: RunningBridge) -> None:
    assert wire.get(shared_bridge.address, "/").header("content-type") == "text/html; charset=utf-8"


def failed_requests(bridge: RunningBridge) -> tuple[int, int, int]:
    """Return how many requests /status counts as failed, has as errors, and shows as recent."""
    status = wire.get(bridge.address, "/status", BEARER).json
    return status["totals"]["failed_requests"], len(status["errors"]), len(status["recent"])


@pytest.mark.parametrize(("path", "headers", "counted"), [
    ("/status", {}, False),  # what the page asks before a person has typed the key
    ("/v1/status", {}, False),
    ("/status", bearer("sk-wrong-0123456789"), True),
    ("/v1/models", {}, True),
])
def test_the_pages_own_401_is_no_failed_request(
    start: Start, path: str, headers: dict[str, str], counted: bool
) -> None:
    bridge = start(*KEYED)
    assert wire.get(bridge.address, path, headers).status == 401
    assert until(lambda: failed_requests(bridge) == ((1, 1, 1) if counted else (0, 0, 0)))
