"""Room http: heads and bodies read strictly."""

from __future__ import annotations

import contextlib

import pytest
import wire
from conftest import RunningBridge, cuts
from help import BODY, CANARY, HOST, JSON_TYPE, POST, head, refused, short

import qoo_bridge as q

# -- heads --------------------------------------------------------------------


def fields(lines: list[bytes]) -> dict[str, str]:
    return q.parse_headers("".join(line.decode("latin-1") + "\r\n" for line in lines))


@pytest.mark.parametrize(("lines", "expected"), [
    ([], {}),
    ([b"A: 1", b"b:2", b"C:  3 \t ", b"d:", b"e: "], {"a": "1", "b": "2", "c": "3", "d": "", "e": ""}),
    ([b"x: a", b"X: b", b"x:"], {"x": "a, b, "}),
    ([b"x: a:b;c=\"d\"", b"!#$%&'*+-.^_`|~09: y"], {"x": 'a:b;c="d"', "!#$%&'*+-.^_`|~09": "y"}),
    ([b"x: a\tb \xe9\xff"], {"x": "a\tb \xe9\xff"}),
])
def test_fields(lines: list[bytes], expected: dict[str, str]) -> None:
    assert fields(lines) == expected


@pytest.mark.parametrize("line", [
    b"", b" folded", b"\tfolded", b"no colon", b": no name", b"a : b", b"a\t: b", b"a b: c", b"a\xe9: b",
    b"a(b): c",
    b"a: b\rc", b"a: b\nc", b"a: b\0c", b"a: b\x1fc", b"a: b\x7fc", b"a\r: b", b"a: b\r", b"a: b\n",
])
def test_malformed_field(line: bytes) -> None:
    with pytest.raises(q.MalformedHttp):
        fields([b"host: x", line])


@pytest.mark.parametrize("name", sorted(q.SINGLE))
def test_single_fields_stand_once(name: str) -> None:
    with pytest.raises(q.MalformedHttp, match=name):
        fields([f"{name}: 1".encode(), f"{name.title()}: 1".encode()])


def test_number_of_fields() -> None:
    assert len(fields([b"x%d: y" % n for n in range(q.MAX_HEADERS)])) == q.MAX_HEADERS
    with pytest.raises(q.HeadTooLarge):
        fields([b"x: y"] * (q.MAX_HEADERS + 1))


def request_head(line: str, *fields: str) -> q.RequestHead:
    return q.parse_request("\r\n".join([line, *fields]).encode("latin-1"))


@pytest.mark.parametrize(("line", "expected"), [
    ("GET / HTTP/1.1", ("GET", "/", 1)),
    ("POST /v1/responses?a=b%20c HTTP/1.1", ("POST", "/v1/responses?a=b%20c", 1)),
    ("OPTIONS /x HTTP/1.0", ("OPTIONS", "/x", 0)),
    ("GET /" + "x" * (q.MAX_TARGET - 1) + " HTTP/1.1", ("GET", "/" + "x" * (q.MAX_TARGET - 1), 1)),
], ids=short)
def test_request_line(line: str, expected: tuple[str, str, int]) -> None:
    assert request_head(line, "Host: h", "X: y") == (*expected, {"host": "h", "x": "y"})


@pytest.mark.parametrize(("line", "kind"), [
    *[(line, q.MalformedHttp) for line in (
        "", "GET", "GET /", "GET  / HTTP/1.1", "GET / HTTP/1.1 ", " GET / HTTP/1.1", "get / HTTP/1.1",
        "GET / http/1.1", "GET / HTTP/1", "GET / HTTP/11", "GET / HTTP/1.10", "GET /\t HTTP/1.1",
        "GET /a b HTTP/1.1",
        "GET /\xe9 HTTP/1.1", "GET /\0 HTTP/1.1", "GET / HTTP/1.1\rx: y", "GET / HTTP/1.1\nx: y",
        "GET http://h/ HTTP/1.1", "GET * HTTP/1.1", "GET h:80 HTTP/1.1",
        "GET ? HTTP/1.1",
        "M" * 21 + " / HTTP/1.1")],
    *[(f"GET / HTTP/{version}", q.VersionNotSupported) for version in ("0.9", "1.2", "2.0", "3.0")],
    *[(f"{method} / HTTP/1.1", q.UnknownCoding) for method in ("CONNECT", "TRACE", "BREW")],
    ("GET /" + "x" * q.MAX_TARGET + " HTTP/1.1", q.TargetTooLong),
], ids=short)
def test_malformed_request_line(line: str, kind: type[q.BridgeError]) -> None:
    with pytest.raises(q.MalformedHttp) as caught:
        request_head(line, "Host: h")
    assert type(caught.value) is kind


@pytest.mark.parametrize("fields", [(), ("Host:",), ("X: y",)])
def test_host_is_wanted_of_1_1_only(fields: tuple[str, ...]) -> None:
    with pytest.raises(q.MalformedHttp, match="Host"):
        request_head("GET / HTTP/1.1", *fields)
    assert request_head("GET / HTTP/1.0", *fields).minor == 0


@pytest.mark.parametrize(("head", "expected"), [
    (b"HTTP/1.1 200 OK\r\nA: b", (200, 1, {"a": "b"})),
    (b"HTTP/1.0 404", (404, 0, {})),
    (b"HTTP/1.1 599 ", (599, 1, {})),
    (b"HTTP/1.1 100 Go on\t\xe9", (100, 1, {})),
])
def test_status_line(head: bytes, expected: tuple[int, int, dict[str, str]]) -> None:
    assert q.parse_reply(head) == expected


@pytest.mark.parametrize("head", [
    b"", b"HTTP/1.1", b"HTTP/1.1 20", b"HTTP/1.1 2000", b"HTTP/1.1 099 x", b"HTTP/1.1  200 OK",
    b"HTTP/1.1 200OK",
    b"HTTP/2 200", b"HTTP/2.0 200 OK", b"HTTP/1.2 200 OK", b"http/1.1 200 OK", b"ICY 200 OK",
    b"HTTP/1.1 200 O\nK",
    b"HTTP/1.1 200 O\0K", b"HTTP/1.1 200 O\rK", b"HTTP/1.1 200 OK\r\n folded: x", b"HTTP/1.1 200 OK\r\na : b",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1", b"HTTP/1.1 200 OK" + b"\r\na: b" * 201,
], ids=short)
def test_malformed_reply_is_upstreams_fault(head: bytes) -> None:
    with pytest.raises(q.BadUpstream):
        q.parse_reply(head)


@pytest.mark.parametrize(("headers", "length"), [
    ({}, None), ({"content-length": "0"}, 0), ({"content-length": "007"}, 7),
    ({"content-length": "9" * 15}, 10**15 - 1),
    ({"transfer-encoding": "chunked"}, -1), ({"transfer-encoding": "Chunked"}, -1),
])
def test_body_length(headers: dict[str, str], length: int | None) -> None:
    assert q.body_length(headers) == length


@pytest.mark.parametrize(("headers", "kind"), [
    *[({"content-length": text}, q.MalformedHttp) for text in (
        "", "-1", "+5", "1_0", "\xb2", "\u0663", "1e3", "0x10", "5, 5", "5 5", " 5", "1.0", "9" * 16)],
    ({"content-length": "5", "transfer-encoding": "chunked"}, q.MalformedHttp),
    *[({"transfer-encoding": text}, q.UnknownCoding) for text in (
        "", "gzip", "identity", "gzip, chunked", "chunked, chunked", "chunked;q=1", "\x0bchunked",
        "xchunked")],
])
def test_malformed_body_length(headers: dict[str, str], kind: type[q.BridgeError]) -> None:
    with pytest.raises(q.MalformedHttp) as caught:
        q.body_length(headers)
    assert type(caught.value) is kind


@pytest.mark.parametrize(("minor", "connection", "keeps"), [
    (1, None, True), (1, "keep-alive", True), (1, "close", False), (1, "Upgrade, Close", False),
    (1, "closed", True),
    (0, None, False), (0, "close", False), (0, "Keep-Alive", True), (0, "keep-alive, close", False),
])
def test_keeps_alive(minor: int, connection: str | None, keeps: bool) -> None:
    assert q.keeps_connection(minor, {} if connection is None else {"connection": connection}) is keeps


def test_render_head() -> None:
    assert q.render_head("HTTP/1.1 200 OK", [("a", "b"), ("c", "\xe9\t"), ("d", "")]) == (
        b"HTTP/1.1 200 OK\r\na: b\r\nc: \xe9\t\r\nd: \r\n\r\n")
    assert q.render_head("GET / HTTP/1.1", {}.items()) == b"GET / HTTP/1.1\r\n\r\n"


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\r", "a\n", "a\0", "\u2028"])
def test_a_value_never_ends_its_line(value: str) -> None:
    with pytest.raises(ValueError):
        q.render_head("HTTP/1.1 200 OK", [("x", value)])


# -- bodies, fed three ways ---------------------------------------------------


def read(body: q.LengthBody | q.ChunkedBody, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """Feed pieces until the body ends; return the payload, and what stands behind the end."""
    payload, behind = [], []
    for piece in pieces:
        if body.done:
            behind.append(piece)
        else:
            payload.append(body.feed(piece))
    return b"".join(payload), body.rest + b"".join(behind)


@pytest.mark.parametrize(("length", "raw", "payload", "behind"), [
    (0, b"", b"", b""), (0, b"GET /", b"", b"GET /"), (5, b"hello", b"hello", b""),
    (5, b"helloGET /", b"hello", b"GET /"),
])
def test_length_body(length: int, raw: bytes, payload: bytes, behind: bytes) -> None:
    for pieces in cuts(raw):
        body = q.LengthBody(length)
        assert read(body, pieces) == (payload, behind)
        assert body.done


def test_length_body_cut_short() -> None:
    for pieces in cuts(b"hell"):
        body = q.LengthBody(5)
        assert read(body, pieces) == (b"hell", b"")
        assert (body.left, body.done) == (1, False)


def test_close_body_ends_with_the_connection() -> None:
    for pieces in cuts(b"hello"):
        body = q.CloseBody()
        assert read(body, pieces) == (b"hello", b"")
        assert not body.done  # the connection's end is its end


@pytest.mark.parametrize(("raw", "payload", "behind"), [
    (b"0\r\n\r\n", b"", b""),
    (b"5\r\nhello\r\n0\r\n\r\n", b"hello", b""),
    (b"5\r\nhello\r\n1\r\n \r\nA\r\n0123456789\r\n0\r\n\r\n", b"hello 0123456789", b""),
    (b"a\r\n0123456789\r\n00000\r\n\r\n", b"0123456789", b""),
    (b"000000000000005\r\nhello\r\n0\r\n\r\n", b"hello", b""),
    (b"5;a=b;c=\"d e\"\r\nhello\r\n0;end\r\n\r\n", b"hello", b""),
    (b"5 \t\r\nhello\r\n0\t;x\r\n\r\n", b"hello", b""),
    (b"5;" + b"x" * 256 + b"\r\nhello\r\n0\r\n\r\n", b"hello", b""),
    (b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n", b""),
    (b"7\r\n0\r\n\r\nab\r\n0\r\n\r\n", b"0\r\n\r\nab", b""),
    (b"5\r\nhello\r\n0\r\nA: b\r\nC: d\r\n\r\n", b"hello", b""),
    (b"5\r\nhello\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n", b"hello", b"GET / HTTP/1.1\r\n\r\n"),
    (b"0\r\nA: b\r\n\r\n\r\n\r\n", b"", b"\r\n\r\n"),
], ids=short)
def test_chunked_body(raw: bytes, payload: bytes, behind: bytes) -> None:
    for pieces in cuts(raw):
        body = q.ChunkedBody()
        assert read(body, pieces) == (payload, behind)
        assert body.done


def test_chunked_payload_is_handed_on_at_once() -> None:
    body = q.ChunkedBody()
    pieces = [b"5", b"\r\nhe", b"llo", b"\r", b"\n3\r\nabc", b"\r\n0\r\n", b"\r\n"]
    assert [body.feed(piece) for piece in pieces] == [b"", b"he", b"llo", b"", b"abc", b"", b""]


def test_chunked_body_cut_short() -> None:
    whole = b"5\r\nhello\r\n0\r\nA: b\r\n\r\n"
    for end in range(len(whole)):
        for pieces in cuts(whole[:end], 2):
            body = q.ChunkedBody()
            assert read(body, pieces) == (whole[3:min(end, 8)], b"")
            assert not body.done


@pytest.mark.parametrize("raw", [
    b"\r\n", b"\n", b" 5\r\n", b"-5\r\n", b"+5\r\n", b"0x5\r\n", b"1_0\r\n", b"g\r\n", b"5h\r\n", b"5 5\r\n",
    b";x\r\n",
    b"1" * 16 + b"\r\n", b"5\nhello", b"5;x\nhello", b"5;x\rx\n", b"5\rx\n", b"5;x\0\r\n",
    b"5;" + b"x" * 257 + b"\r\n",
    b"5;" + b"x" * 400, b"5" * 400, b"\xd9\xa3\r\n", b"5\r\nhello0\r\n\r\n", b"5\r\nhello!\r\n0\r\n\r\n",
    b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello\rx", b"5\r\nhello\r\n\r\n0\r\n\r\n", b"5\r\nhello\r\n-1\r\n\r\n",
    b"5\r\nhello\r\n;\r\n\r\n", b"0\r\n" + b"a: b\r\n" * 2000,
], ids=short)
def test_malformed_chunks(raw: bytes) -> None:
    for pieces in cuts(raw, 5):
        with pytest.raises(q.MalformedHttp):
            read(q.ChunkedBody(), pieces)


@pytest.mark.parametrize("raw", [
    b"5" + b" " * 400 + b"\r\nhello\r\n0\r\n\r\n", b"0\r\nA: " + b"b" * 9000 + b"\r\n\r\n",
], ids=short)
def test_limits_do_not_depend_on_the_cuts(raw: bytes) -> None:
    done = set()
    for pieces in cuts(raw, 2):
        body = q.ChunkedBody()
        with contextlib.suppress(q.MalformedHttp):
            read(body, pieces)
        done.add(body.done)
    assert len(done) == 1


@pytest.mark.parametrize("raw", [b"x", b" ", b";", b"\0", b"5\r\nhellox", b"5\r\nhello\r\nx",
                                 b"5\r\nhello\r\n "])
def test_what_can_be_no_chunk_is_refused_at_once(raw: bytes) -> None:
    for pieces in cuts(raw, 3):
        with pytest.raises(q.MalformedHttp):
            read(q.ChunkedBody(), pieces)


@pytest.mark.parametrize(("start", "limit"), [
    (b"5;", 2 + 256), (b"5\r\nhello", 8 + 4 + 256),
    (b"0\r\n", 3 + q.ChunkedBody.TRAILERS),
])
def test_chunk_heads_and_trailers_have_a_limit(start: bytes, limit: int) -> None:
    raw = start + (b"\r\n5;" if start.endswith(b"o") else b"")
    body = q.ChunkedBody()
    body.feed(raw.ljust(limit, b"x"))
    with pytest.raises(q.MalformedHttp):
        body.feed(b"x")


def test_chunk_is_read_back() -> None:
    raw = q.chunk(b"hello") + q.chunk(b"x" * 4096) + q.LAST_CHUNK
    assert raw.startswith(b"5\r\nhello\r\n1000\r\n")
    assert read(q.ChunkedBody(), [raw]) == (b"hello" + b"x" * 4096, b"")


@pytest.mark.parametrize(("method", "status", "headers", "kind", "left"), [
    *[("GET", status, {"transfer-encoding": "chunked"}, q.LengthBody, 0)
      for status in (100, 101, 199, 204, 304)],
    *[("GET", status, {"content-length": "5"}, q.LengthBody, 0) for status in (100, 204, 304)],
    ("HEAD", 200, {"content-length": "5"}, q.LengthBody, 0),
    ("HEAD", 200, {"transfer-encoding": "gzip"}, q.LengthBody, 0),
    ("GET", 200, {"content-length": "5"}, q.LengthBody, 5),
    ("POST", 404, {"content-length": "0"}, q.LengthBody, 0),
    ("GET", 200, {"transfer-encoding": "chunked"}, q.ChunkedBody, 0),
    ("GET", 200, {}, q.CloseBody, 1 << 62),
])
def test_reply_body(method: str, status: int, headers: dict[str, str], kind: type, left: int) -> None:
    body = q.reply_body(q.ReplyHead(status, 1, headers), method)
    assert type(body) is kind
    assert body.left == left


@pytest.mark.parametrize("headers", [
    {"content-length": "-1"}, {"content-length": "5", "transfer-encoding": "chunked"},
    {"transfer-encoding": "gzip"},
])
def test_malformed_reply_body_is_upstreams_fault(headers: dict[str, str]) -> None:
    with pytest.raises(q.BadUpstream):
        q.reply_body(q.ReplyHead(200, 1, headers))


BAD_TRAILERS: dict[str, bytes] = {
    "no colon": b"X-A 1\r\n",
    "space before the colon": b"X-A : 1\r\n",
    "no name": b": 1\r\n",
    "folded": b"X-A: 1\r\n 2\r\n",
    "folded at once": b" X-A: 1\r\n",
    "nul": b"X-A: 1\x002\r\n",
    "bare LF": b"X-A: 1\nX-B: 2\r\n",
    "bare CR": b"X-A: 1\rX-B: 2\r\n",
    "name not ascii": b"X-\xe9: 1\r\n",
    "a request": b"GET /healthz HTTP/1.1\r\nHost: canary\r\n",
    "a chunk": b"2\r\n{}\r\n",
}
GOOD_TRAILERS: dict[str, bytes] = {
    "none": b"",
    "one": b"X-A: 1\r\n",
    "an empty value": b"X-A:\r\n",
    "latin-1 value": b"X-A: \xe9\r\n",
    "two alike": b"X-A: 1\r\nX-A: 2\r\n",
}


@pytest.mark.parametrize("trailers", BAD_TRAILERS)
def test_trailers_are_fields_however_they_are_cut(trailers: str) -> None:
    for pieces in cuts(b"2\r\n{}\r\n0\r\n" + BAD_TRAILERS[trailers] + b"\r\n"):
        body = q.ChunkedBody()
        with pytest.raises(q.MalformedHttp):
            for piece in pieces:
                body.feed(piece)


@pytest.mark.parametrize("trailers", GOOD_TRAILERS)
def test_trailers_are_read_and_dropped_however_they_are_cut(trailers: str) -> None:
    for pieces in cuts(b"2\r\n{}\r\n0\r\n" + GOOD_TRAILERS[trailers] + b"\r\n"):
        body = q.ChunkedBody()
        assert b"".join(map(body.feed, pieces)) == b"{}"
        assert (body.done, body.rest) == (True, b"")


@pytest.mark.parametrize("trailers", BAD_TRAILERS)
def test_request_with_malformed_trailers_is_refused(trailers: str, bridge: RunningBridge) -> None:
    coded = b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(BODY), BODY, BAD_TRAILERS[trailers])
    refused(bridge, head(POST, HOST, JSON_TYPE, "Transfer-Encoding: chunked") + coded, 400)


@pytest.mark.parametrize("trailers", GOOD_TRAILERS)
def test_request_with_trailers_is_taken_and_the_next_one_too(trailers: str, bridge: RunningBridge) -> None:
    coded = b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(BODY), BODY, GOOD_TRAILERS[trailers])
    with wire.Client(bridge.address) as client:
        client.send(head(POST, HOST, JSON_TYPE, "Transfer-Encoding: chunked") + coded + CANARY)
        assert client.read_reply().json["status"] == "completed"
        assert client.read_reply().json["status"] == "ok"


@pytest.mark.parametrize("trailers", BAD_TRAILERS)
def test_reply_with_malformed_trailers_is_a_bad_upstream(
    trailers: str, bridge: RunningBridge, backend: wire.Backend
) -> None:
    coded = b'e\r\n{"models": []}\r\n0\r\n%b\r\n' % BAD_TRAILERS[trailers]
    reply = head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + coded
    backend.on("/models", wire.reply_raw(reply, "keep"))
    assert wire.get(bridge.address, "/v1/models").status == 502
