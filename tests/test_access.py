"""Section 12, access: which networks, hosts, origins and keys come in, and what a web page is told."""
from __future__ import annotations

import hmac
import ipaddress

import pytest

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
    ({}, "wants a key"), ({"x-api-key": "wrong-key"}, "does not know"),
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
