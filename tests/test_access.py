"""Room access: which networks, hosts, origins and keys come in, and what a web page is told."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import re
import socket

import pytest
import wire
from conftest import LogLines, RunningBridge, SharedBridges, Start
from help import API_KEY, BEARER, HOST, JSON_TYPE, ORIGIN, POST, REQUEST, from_address, head

import qoo_bridge as q

LOCAL = q.load_config({}, {}).allow
NONE: tuple[ipaddress.IPv4Network, ...] = ()
SECRET, OTHER = "correct-horse-battery", "another-key-entirely"
KEYS = (q.NamedSecret("ann", SECRET), q.NamedSecret("bob", OTHER))
PAGE = "http://page.example"
POLICY = q.Policy(LOCAL, (PAGE,), ("bridge.example.com", "host-name.example.com"))


@pytest.mark.parametrize(("address", "allowed"), [
    *[(address, True) for address in (
        "127.0.0.1", "127.9.9.9", "::1", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
        "169.254.1.1",
        "100.64.0.1", "100.127.255.255", "fe80::1", "fe80::1%eth0", "fd00::1", "::ffff:192.168.1.1",
        "::ffff:127.0.0.1")],
    *[(address, False) for address in (
        "8.8.8.8", "172.32.0.1", "172.15.255.255", "192.169.0.1", "100.128.0.1", "11.0.0.1", "0.0.0.0",
        "2001:db8::1",
        "::ffff:8.8.8.8", "::", "fec0::1", "", "x", "127.0.0.1.example", "127.1", "10.0.0.1/8", "[::1]")],
])
def test_default_networks(address: str, allowed: bool) -> None:
    assert q.network_allows(address, LOCAL) is allowed


@pytest.mark.parametrize(("address", "allowed"), [
    ("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False), ("fe80::1", False),
])
def test_loopback_always_comes_in(address: str, allowed: bool) -> None:
    assert q.network_allows(address, NONE) is allowed


def test_versions_are_not_mixed() -> None:
    assert not q.network_allows("2001:db8::1", (ipaddress.ip_network("0.0.0.0/0"),))
    assert not q.network_allows("8.8.8.8", (ipaddress.ip_network("::/0"),))
    assert q.network_allows("8.8.8.8", (ipaddress.ip_network("::/0"), ipaddress.ip_network("8.8.8.8")))


@pytest.mark.parametrize(("value", "allowed"), [
    *[(value, True) for value in (
        "192.168.1.5:4050", "192.168.1.5", "8.8.8.8", "[::1]:4050", "[fe80::1]", "localhost",
        "localhost:4050",
        "my-host", "MY_HOST:80", "my-host.", "box.local", "box.LAN:4050", "a.b.internal", "box.home.arpa",
        "a.localhost", "bridge.example.com", "Bridge.Example.Com.:4050", "host-name.example.com")],
    *[(value, False) for value in (
        "evil.example", "evil.example:4050", "bridge.example.com.evil.example", "xbridge.example.com",
        "boxlan.example",
        "127.0.0.1.evil.example", "127.1", "256.0.0.1", "", ".", "..", ":4050", "a b", "box.local/x",
        "x@box.local",
        "::1", "[::1", "[x]", "host:", "host:x", "host:123456", "bücher", "a\tb", "box.local,evil.example")],
])
def test_hosts(value: str, allowed: bool) -> None:
    assert q.host_allowed(value, POLICY.hosts) is allowed


JSON = {"content-type": "application/json; charset=utf-8"}


@pytest.mark.parametrize(("method", "headers"), [
    ("GET", {}), ("POST", {}), ("POST", {"content-type": "text/plain"}), ("GET", {"host": "box.local:4050"}),
    ("GET", {"origin": PAGE}), ("POST", {"origin": PAGE, **JSON}), ("OPTIONS", {"origin": PAGE}),
    ("GET", {"sec-fetch-site": "none"}), ("POST", {"sec-fetch-site": "same-origin", **JSON}),
])
def test_comes_in(method: str, headers: dict[str, str]) -> None:
    q.check_browser(method, headers, POLICY)


@pytest.mark.parametrize(("method", "headers", "option"), [
    *[("GET", {"origin": origin}, "--allow-origin") for origin in (
        "http://evil.example", "null", "", "https://page.example", "http://page.example:80",
        "HTTP://PAGE.EXAMPLE",
        "http://page.example, http://page.example", "http://page.example.evil.example")],
    ("OPTIONS", {"origin": "http://evil.example"}, "--allow-origin"),
    ("POST", {"origin": "http://127.0.0.1:4050", "host": "127.0.0.1:4050", **JSON}, "--allow-origin"),
    *[("GET", {"host": host}, "--allow-host") for host in ("evil.example", "")],
    ("POST", {"origin": PAGE, "host": "evil.example", **JSON}, "--allow-host"),
    *[("POST", {"origin": PAGE, "content-type": kind}, "application/json") for kind in (
        "text/plain", "", "text/json", "application/x-www-form-urlencoded", "text/plain; application/json",
        "application/jsonx")],
    ("POST", {"origin": PAGE}, "application/json"),
    ("POST", {"sec-fetch-mode": "no-cors", "content-type": "text/plain"}, "application/json"),
])
def test_stays_out(method: str, headers: dict[str, str], option: str) -> None:
    with pytest.raises(q.Forbidden, match=option) as caught:
        q.check_browser(method, headers, POLICY)
    assert caught.value.status == 403


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON", " application/json ;x=y"])
def test_json_by_another_spelling(kind: str) -> None:
    q.check_browser("POST", {"origin": PAGE, "content-type": kind}, POLICY)


@pytest.mark.parametrize(("headers", "name"), [
    ({"authorization": f"Bearer {SECRET}"}, "ann"), ({"authorization": f"bEARER  {OTHER} "}, "bob"),
    ({"x-api-key": OTHER}, "bob"), ({"authorization": "Basic eDp5", "x-api-key": SECRET}, "ann"),
    ({"authorization": SECRET, "x-api-key": SECRET}, "ann"),
])
def test_keys(headers: dict[str, str], name: str) -> None:
    assert q.check_key(headers, KEYS) == name


@pytest.mark.parametrize("headers", [
    {}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": "Bearer "}, {"x-api-key": ""},
    {"authorization": SECRET}, {"authorization": f"Basic {SECRET}"}, {"authorization": "Bearer wrong-key"},
    {"authorization": f"Bearer {SECRET}x"}, {"authorization": f"Bearer {SECRET[:-1]}"},
    {"x-api-key": SECRET.upper()},
    {"authorization": f"Bearer {SECRET}, {OTHER}"}, {"authorization": "Bearer ann"},
    {"x-api-key": "\xe9\ud800"},
    {"authorization": "Bearer wrong-key", "x-api-key": "wrong-key"},
])
def test_wrong_keys(headers: dict[str, str]) -> None:
    with pytest.raises(q.InvalidKey) as caught:
        q.check_key(headers, KEYS)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert "www-authenticate" in caught.value.headers
    assert all(word not in caught.value.message for word in (SECRET, OTHER, "wrong-key"))


def test_no_key_is_known_where_none_is_set() -> None:
    with pytest.raises(q.InvalidKey):
        q.check_key({"x-api-key": SECRET}, ())


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(given: bytes, wanted: bytes) -> bool:
        compared.append(wanted)
        return given == wanted

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert q.check_key({"x-api-key": SECRET}, iter(KEYS)) == "ann"
    assert set(compared) == {SECRET.encode(), OTHER.encode()}


@pytest.mark.parametrize(("headers", "words"), [
    ({}, "requires a key"), ({"x-api-key": "wrong-key"}, "unknown API key"),
])
def test_a_missing_key_is_told_from_a_wrong_one(headers: dict[str, str], words: str) -> None:
    with pytest.raises(q.InvalidKey, match=words):
        q.check_key(headers, KEYS)


@pytest.mark.parametrize("preflight", [False, True])
@pytest.mark.parametrize("headers", [{}, {"origin": "http://evil.example"}, {"origin": "null"},
                                     {"origin": ""}])
def test_no_cors_for_others(headers: dict[str, str], preflight: bool) -> None:
    assert q.cors_headers(headers, POLICY, preflight) == {}


def test_cors() -> None:
    answer = q.cors_headers({"origin": PAGE}, POLICY, False)
    assert answer == {"access-control-allow-origin": PAGE, "vary": "origin",
                      "access-control-expose-headers": "*"}
    preflight = q.cors_headers({"origin": PAGE}, POLICY, True)
    assert preflight["access-control-allow-origin"] == PAGE
    assert preflight["vary"] == "origin"
    assert set(preflight["access-control-allow-methods"].split(", ")) == {"GET", "POST", "OPTIONS"}
    assert {"authorization", "content-type",
            "x-api-key"} <= set(preflight["access-control-allow-headers"].split(", "))
    assert int(preflight["access-control-max-age"]) > 0
    assert "access-control-allow-credentials" not in {**answer, **preflight}


@pytest.mark.parametrize(("text", "keys"), [
    ("", ()), ("\n  \n# a=comment-line\n  # another", ()), (f"ann={SECRET}", KEYS[:1]),
    (f"# keys\r\n ann = {SECRET} \r\n\r\nbob={OTHER}\r\n", KEYS),
    (f"ann={SECRET}=x", (q.NamedSecret("ann", SECRET + "=x"),)),
])
def test_key_file(text: str, keys: tuple[q.NamedSecret, ...]) -> None:
    assert q.read_key_file(text) == keys


@pytest.mark.parametrize("line", ["ann=short", f"ann={SECRET} # comment", f"a b={SECRET}", f"={SECRET}",
                                  "ann=", "ann"])
def test_malformed_key_file_is_told_by_line(line: str) -> None:
    with pytest.raises(ValueError, match="line 3: ") as caught:
        q.read_key_file(f"# keys\nbob={OTHER}\n{line}\n")
    assert SECRET not in str(caught.value)


def test_a_bare_secret_in_the_key_file_is_not_shown() -> None:
    with pytest.raises(ValueError, match="line 1: ") as caught:
        q.read_key_file(SECRET)
    assert SECRET not in str(caught.value)


def count_turns(asked: list[wire.Request]) -> int:
    """Count what cost something upstream: all but what the bridge asks of itself."""
    own = ("/backend-api/wham/accounts/check", "/backend-api/codex/models")
    return sum(each.path not in own for each in asked)


# -- browsers


@pytest.fixture
def page_bridge(bridges: SharedBridges) -> RunningBridge:
    """A bridge that one origin may call."""
    return bridges.bridge("--allow-origin", ORIGIN, "--allow-host", "Bridge.Example.com")


@pytest.mark.parametrize("origin", [
    "null", "https://evil.example", "http://page.example", "https://page.example:8443",
    "https://page.example.evil.example",
    "https://PAGE.example", "https://page.example/", f"{ORIGIN}, {ORIGIN}", "http://127.0.0.1:4050", "x",
])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_other_origin_is_refused_without_cors(
    page_bridge: RunningBridge, bridges: SharedBridges, method: str, origin: str
) -> None:
    with wire.Client(page_bridge.address) as client:
        client.request(method, "/v1/responses" if method == "POST" else "/v1/models",
                       REQUEST if method == "POST" else None,
                       {"Origin": origin, "Access-Control-Request-Method": "POST"})
        reply = client.read_reply()
    assert reply.status == 403
    assert [name for name, _ in reply.headers if name.lower().startswith("access-control")] == []
    assert count_turns(bridges.asked()) == 0


def test_other_origin_is_refused_before_its_body(shared_bridge: RunningBridge) -> None:
    request = head(POST, HOST, JSON_TYPE, "Origin: null", "Content-Length: 5000")
    reply = wire.raw(shared_bridge.address, request)
    assert (reply.status, reply.header("connection")) == (403, "close")


def test_websocket_of_another_origin_is_refused(page_bridge: RunningBridge, bridges: SharedBridges) -> None:
    with contextlib.closing(wire.WebSocketClient(page_bridge.address)) as client:
        assert client.connect("/v1/responses", {"Origin": "https://evil.example"}).status == 403
    assert count_turns(bridges.asked()) == 0


def cors(reply: wire.RawReply) -> dict[str, str]:
    """Return an answer's CORS fields."""
    return {name.lower(): value for name, value in reply.headers
            if name.lower() == "vary" or name.lower().startswith("access-control")}


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/models", 200), ("POST", "/v1/responses", 200), ("GET", "/nothing", 404),
    ("POST", "/v1/models", 405),
])
def test_allowed_origin_gets_cors(page_bridge: RunningBridge, method: str, path: str, status: int) -> None:
    with wire.Client(page_bridge.address) as client:
        client.request(method, path, REQUEST if method == "POST" else None, {"Origin": ORIGIN})
        reply = client.read_reply()
    assert reply.status == status
    assert cors(reply) == {
        "access-control-allow-origin": ORIGIN, "access-control-expose-headers": "*", "vary": "origin"}


def test_preflight_is_answered_without_a_key(bridges: SharedBridges) -> None:
    bridge = bridges.bridge("--allow-origin", ORIGIN, "--api-key", f"page={API_KEY}")
    with wire.Client(bridge.address) as client:
        client.request("OPTIONS", "/v1/responses", headers={
            "Origin": ORIGIN, "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type"})
        reply = client.read_reply()
        client.request("OPTIONS", "/v1/responses", headers={"Origin": ORIGIN})
        assert client.read_reply().status == 401  # no preflight
    assert reply.status == 204
    assert cors(reply) == {
        "access-control-allow-origin": ORIGIN, "vary": "origin", "access-control-max-age": "600",
        "access-control-allow-methods": "GET, POST, OPTIONS",
        "access-control-allow-headers": "authorization, content-type, x-api-key, session-id, thread-id"}


@pytest.mark.parametrize("host", [
    "127.0.0.1", "127.0.0.1:4050", "10.1.2.3:4050", "[::1]", "[fe80::1]:4050", "localhost", "LOCALHOST:4050",
    "nas",
    "nas.local", "nas.lan:4050", "nas.internal", "nas.home.arpa", "nas.local.", "bridge.example.com",
    "BRIDGE.example.com:4050", socket.gethostname(),
])
def test_host_of_this_bridge_passes(page_bridge: RunningBridge, host: str) -> None:
    assert wire.get(page_bridge.address, "/healthz", {"Host": host}).status == 200


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:4050", "127.0.0.1.evil.example", "nas.local.evil.example",
    "localhost.evil.example",
    "evillan.example", "x.bridge.example.com", "example.com", "nas.lan@evil.example", "nas.lan/evil",
    "nas.lan:x", "a b",
    "[::1", "1.2.3", "0x7f.1", "nas.lan:4050:1", ".", "nas.lan,evil.example", "\xe9.lan", "nas.lan#", ":4050",
])
def test_other_host_is_refused(page_bridge: RunningBridge, host: str) -> None:
    address = page_bridge.address
    statuses = [wire.get(address, path, {"Host": host}).status for path in ("/healthz", "/status")]
    assert statuses == [403, 403]


@pytest.mark.parametrize(("fields", "status"), [
    ({"Content-Type": "text/plain"}, 200),
    ({"Content-Type": "application/x-www-form-urlencoded"}, 200),
    ({"Content-Type": "text/plain", "Origin": ORIGIN}, 403),
    ({"Content-Type": "text/plain", "Sec-Fetch-Site": "same-origin"}, 403),
    ({"Content-Type": "application/x-www-form-urlencoded", "Sec-Fetch-Mode": "no-cors"}, 403),
    ({"Content-Type": "multipart/form-data; boundary=application/json", "Sec-Fetch-Dest": "empty"}, 403),
    ({"Content-Type": "text/plain; x=application/json", "Sec-Fetch-Site": "cross-site"}, 403),
    ({"Content-Type": "", "Sec-Fetch-Site": "cross-site"}, 403),
    ({"Content-Type": "application/json", "Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"}, 200),
    ({"Content-Type": "Application/JSON; charset=utf-8", "Origin": ORIGIN}, 200),
])
def test_post_of_a_browser_is_json(
    page_bridge: RunningBridge, bridges: SharedBridges, fields: dict[str, str], status: int
) -> None:
    assert wire.post(page_bridge.address, "/v1/responses", REQUEST, fields).status == status
    assert count_turns(bridges.asked()) == (status == 200)


# -- keys


@pytest.mark.parametrize("fields", [
    {}, {"Authorization": "Bearer wrong-key-000000"}, {"Authorization": f"Bearer {API_KEY}x"},
    {"Authorization": f"Bearer {API_KEY[:-1]}"}, {"Authorization": f"Basic {API_KEY}"},
    {"Authorization": API_KEY},
    {"Authorization": "Bearer"}, {"Authorization": "Bearer \xe9\xff"}, {"x-api-key": "wrong-key-000000"},
    {"x-api-key": ""},
    {"Cookie": f"key={API_KEY}"}, {"x-api-key": "laptop"}, {"Authorization": f"Bearer laptop={API_KEY}"},
    {"Authorization": f"Bearer {API_KEY.upper()}"}, {"api-key": API_KEY},
])
@pytest.mark.parametrize(("method", "path"), [
    ("POST", "/v1/responses"), ("GET", "/status"), ("GET", "/nothing"),
])
def test_without_its_key_nobody_comes_in(
    bridges: SharedBridges, method: str, path: str, fields: dict[str, str]
) -> None:
    bridge = bridges.bridge("--api-key", f"laptop={API_KEY}")
    with wire.Client(bridge.address) as client:
        client.request(method, path, REQUEST if method == "POST" else None, fields)
        reply = client.read_reply()
    assert (reply.status, reply.header("www-authenticate")) == (401, 'Bearer realm="qoo-bridge"')
    assert reply.json["error"]["code"] == "invalid_api_key"
    assert API_KEY.encode() not in reply.body
    assert count_turns(bridges.asked()) == 0


@pytest.mark.parametrize("path", ["/v1/models", "/status", "/metrics", "/client-config/codex",
                                  "/api/codex/usage"])
def test_every_endpoint_wants_the_key(bridges: SharedBridges, path: str) -> None:
    bridge = bridges.bridge("--api-key", f"laptop={API_KEY}")
    assert wire.get(bridge.address, path).status == 401
    assert wire.get(bridge.address, path, BEARER).status == 200
    assert [wire.get(bridge.address, public).status for public in ("/healthz", "/")] == [200, 200]


@pytest.mark.parametrize("fields", [
    BEARER, {"authorization": f"bearer {API_KEY}"}, {"Authorization": f"BEARER   {API_KEY}  "},
    {"x-api-key": API_KEY},
    {"X-API-Key": API_KEY, "Authorization": "Basic eDp5"},
])
def test_key_opens_and_stays_here(
    start: Start, backend: wire.Backend, log_lines: LogLines, fields: dict[str, str]
) -> None:
    bridge = start("--api-key", "other=sk-other-0123456789", "--api-key", f"laptop={API_KEY}")
    assert wire.post(bridge.address, "/v1/responses", REQUEST, fields).status == 200
    assert "127.0.0.1/laptop " in log_lines.wait_for("/v1/responses")
    status = wire.get(bridge.address, "/status", fields)
    assert [row["client"] for row in status.json["clients"]] == ["laptop"]
    seen = repr([each.headers for each in backend.requests]) + repr(log_lines.lines) + repr(bridge.config)
    metrics = wire.get(bridge.address, "/metrics", fields)
    assert API_KEY not in seen + status.body.decode() + metrics.body.decode()


# -- networks


@pytest.mark.parametrize(("options", "address", "status"), [
    *(((), address, 200) for address in (
        "127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.7.7",
        "100.64.0.1",
        "100.127.255.255", "::1", "fe80::1%eth0", "fc00::1", "fd12:3456::1", "::ffff:192.168.1.1",
        "::ffff:127.0.0.1")),
    *(((), address, 403) for address in (
        "8.8.8.8", "172.32.0.1", "172.15.255.255", "192.169.0.1", "100.128.0.1", "100.63.255.255", "11.0.0.1",
        "0.0.0.0",
        "255.255.255.255", "2001:db8::1", "2606:4700::1111", "::", "::ffff:8.8.8.8", "::8.8.8.8",
        "64:ff9b::7f00:1",
        "2002:7f00:1::", "not an address", "")),
    (("--allow", "203.0.113.0/24"), "203.0.113.9", 200),
    (("--allow", "203.0.113.0/24"), "::ffff:203.0.113.9", 200),
    (("--allow", "203.0.113.0/24"), "192.168.1.1", 403),
    (("--allow", "203.0.113.0/24"), "127.0.0.1", 200),
    (("--allow", "2001:db8::/32"), "2001:db8::7", 200),
    (("--allow", "2001:db8::/32"), "203.0.113.9", 403),
    (("--allow", "10.0.0.0/8", "--allow", "203.0.113.9"), "203.0.113.9", 200),
    (("--allow", "10.0.0.0/8", "--allow", "203.0.113.9"), "203.0.113.8", 403),
])
def test_networks_outside_are_refused(
    bridges: SharedBridges, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], address: str,
    status: int
) -> None:
    bridge = bridges.bridge(*options)
    from_address(bridge, monkeypatch, address)
    with wire.Client(bridge.address) as client:
        if status == 200:
            client.request("GET", "/healthz")
        reply = client.read_reply()  # a refusal comes before anything was sent
        assert reply.status == status
        if status == 403:
            assert (reply.header("connection"), reply.json["error"]["code"]) == ("close", "forbidden")
            assert client.left()


# OpenAI's JS SDK 6 in a browser; Firefox asks for its `user-agent` as well.
STAINLESS = [
    "x-stainless-arch", "x-stainless-lang", "x-stainless-os", "x-stainless-package-version",
    "x-stainless-retry-count", "x-stainless-runtime", "x-stainless-runtime-version", "x-stainless-timeout",
]
ASKED = {
    "js-sdk": ["authorization", "content-type", *STAINLESS],
    "firefox": ["authorization", "content-type", "user-agent", *STAINLESS],
    "beta": ["content-type", "openai-beta", "openai-organization", "openai-project"],
    "one": ["x-of-tomorrow"],
    "upper-case": ["Authorization", "X-Stainless-OS"],
}


TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")  # RFC 9110, 5.6.2


def preflight(
    bridge: RunningBridge, origin: str, asked: str | None, path: str = "/v1/responses"
) -> wire.RawReply:
    """Ask, as a browser does, whether a page may send these headers."""
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    if asked is not None:
        headers["Access-Control-Request-Headers"] = asked
    with wire.Client(bridge.address) as client:
        client.request("OPTIONS", path, headers=headers)
        return client.read_reply()


def allowed(reply: wire.RawReply) -> set[str]:
    """Return the headers that a page may send."""
    listed = reply.header("access-control-allow-headers") or ""
    return {name.strip().lower() for name in listed.split(",") if name.strip()}


@pytest.mark.parametrize("names", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions", "/v1/models"])
@pytest.mark.parametrize("comma", [",", ", "])
def test_an_allowed_page_may_send_the_headers_that_it_asks_for(
    bridges: SharedBridges, comma: str, path: str, names: list[str]
) -> None:
    bridge = bridges.bridge("--allow-origin", ORIGIN, "--api-key", f"page={API_KEY}")
    reply = preflight(bridge, ORIGIN, comma.join(names), path)
    assert (reply.status, reply.header("access-control-allow-origin")) == (204, ORIGIN)
    assert set(map(str.lower, names)) <= allowed(reply)
    assert "*" not in allowed(reply)  # says nothing of authorization


def test_a_page_that_asks_for_none_is_told_the_usual_ones(bridges: SharedBridges) -> None:
    reply = preflight(bridges.bridge("--allow-origin", ORIGIN), ORIGIN, None)
    assert {"authorization", "content-type"} <= allowed(reply)


@pytest.mark.parametrize("asked", ["a b", "x-a: b", "x-a;x-b", '"x-a"', ",", "x" * 5000, "\xe9"])
def test_what_is_no_header_is_not_allowed(bridges: SharedBridges, asked: str) -> None:
    bridge = bridges.bridge("--allow-origin", ORIGIN)
    reply = preflight(bridge, ORIGIN, asked)
    assert reply.status in (204, 400)
    assert all(TOKEN.fullmatch(name) for name in allowed(reply))
    assert len(reply.header("access-control-allow-headers") or "") < 4096
    assert wire.get(bridge.address, "/healthz").status == 200


def test_another_page_is_allowed_no_header(bridges: SharedBridges) -> None:
    reply = preflight(bridges.bridge("--allow-origin", ORIGIN), "https://evil.example", "x-stainless-os")
    assert (reply.status, allowed(reply)) == (403, set())
