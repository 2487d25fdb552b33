"""Section 6, headers: heads and bodies read strictly, codings within their limit, which fields cross."""
from __future__ import annotations

import contextlib
import gzip
import tracemalloc
import types
import zlib
from typing import Any

import pytest
from conftest import cuts

import qoo_bridge as q


def short(value: object) -> str:
    """Name a row by the beginning of a value."""
    return ascii(value)[:40]

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
        "GET http://h/ HTTP/1.1", "GET //h/ HTTP/1.1", "GET * HTTP/1.1", "GET h:80 HTTP/1.1",
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


# -- content codings ----------------------------------------------------------

PLAIN = b"hello hello hello"
NO_SIZE_FRAME = bytes.fromhex("28b52ffd04586500003068656c6c6f200100314a11a2ed1e0c")  # PLAIN, by zstd 1.5.4
NO_ZSTD = q.zstd_compress(b"") is None
needs_zstd = pytest.mark.skipif(NO_ZSTD, reason="neither Python 3.14 nor libzstd is here")


def zstd(body: bytes) -> bytes:
    return q.zstd_compress(body) or b""


def deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


CODINGS = [
    ("gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", deflate),
    pytest.param("zstd", zstd, marks=needs_zstd),
]


@pytest.mark.parametrize("coding", ["", "identity", " Identity "])
def test_no_coding(coding: str) -> None:
    assert q.decompress(PLAIN, coding, 5) is PLAIN


@pytest.mark.parametrize("body", [b"", b"x", PLAIN, bytes(range(256)) * 1000], ids=short)
@pytest.mark.parametrize(("coding", "pack"), CODINGS)
def test_codings(coding: str, pack: Any, body: bytes) -> None:
    assert q.decompress(pack(body), coding, len(body)) == body
    assert q.decompress(pack(body), f" {coding.upper()} ", 1 << 20) == body
    if body:
        with pytest.raises(q.BodyTooLarge):
            q.decompress(pack(body), coding, len(body) - 1)


def test_x_gzip_is_gzip() -> None:
    assert q.decompress(gzip.compress(PLAIN), "x-gzip", 100) == PLAIN


@needs_zstd
def test_zstd_frame_of_another_program() -> None:
    assert q.decompress(NO_SIZE_FRAME, "zstd", len(PLAIN)) == PLAIN
    with pytest.raises(q.BodyTooLarge):
        q.decompress(NO_SIZE_FRAME, "zstd", len(PLAIN) - 1)


@pytest.mark.parametrize(("coding", "pack"), CODINGS)
def test_a_coded_body_is_one_whole_stream(coding: str, pack: Any) -> None:
    whole = pack(PLAIN * 100)
    for odd in (b"", whole[:-1], whole[:4], whole + b"x", whole * 2, b"\0" + whole, PLAIN, b"\x78" + PLAIN):
        with pytest.raises(q.InvalidRequest) as caught:
            q.decompress(odd, coding, 1 << 20)
        assert caught.value.status == 400


@pytest.mark.parametrize(("coding", "pack"), CODINGS)
def test_a_bomb_costs_no_more_than_the_limit(coding: str, pack: Any) -> None:
    bomb = pack(bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(q.BodyTooLarge):
            q.decompress(bomb, coding, 100_000)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("coding", ["br", "compress", "gzip, zstd", "gzip,gzip", "x", "\xe9"])
def test_other_codings_are_refused(coding: str) -> None:
    with pytest.raises(q.UnsupportedEncoding) as caught:
        q.decompress(PLAIN, coding, 100)
    assert caught.value.status == 415


def test_without_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "zstd_module", lambda: None)
    monkeypatch.setattr(q, "libzstd", lambda: None)
    assert q.zstd_compress(PLAIN) is None
    with pytest.raises(q.UnsupportedEncoding, match="install libzstd"):
        q.decompress(NO_SIZE_FRAME, "zstd", 100)


def test_zstd_of_python_3_14(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put zlib in the place of `compression.zstd`, which has the same interface."""
    module = types.SimpleNamespace(compress=zlib.compress, ZstdDecompressor=zlib.decompressobj,
                                   ZstdError=zlib.error)
    monkeypatch.setattr(q, "zstd_module", lambda: module)
    packed = q.zstd_compress(PLAIN)
    assert packed == zlib.compress(PLAIN, q.ZSTD_LEVEL)
    assert q.decompress(packed, "zstd", len(PLAIN)) == PLAIN
    with pytest.raises(q.BodyTooLarge):
        q.decompress(packed, "zstd", len(PLAIN) - 1)
    for odd in (packed[:-1], packed + b"x", PLAIN, b""):
        with pytest.raises(q.InvalidRequest):
            q.decompress(odd, "zstd", 100)


@needs_zstd
def test_zstd_compresses() -> None:
    packed = zstd(PLAIN * 1000)
    assert packed[:4] == b"\x28\xb5\x2f\xfd"
    assert len(packed) < 1000


# -- which fields cross -------------------------------------------------------

AGENT = "codex_exec/0.169.0 (Debian 12.0.0; x86_64) unknown (codex_exec; 0.169.0)"
SESSION = "01a20211-3a20-7dc3-a834-3ba2e79f8897"
CODEX_FIELDS = {
    "x-codex-beta-features": "remote_compaction_v2", "x-codex-turn-state": "ts-sticky-1",
    "x-codex-window-id": f"{SESSION}:0", "x-codex-turn-metadata": "{}", "x-codex-parent-thread-id": "p",
    "x-openai-subagent": "review", "x-client-request-id": SESSION, "session-id": SESSION,
    "thread-id": SESSION,
    "originator": "codex_exec", "user-agent": AGENT,
}
STAYS = {
    "host": "127.0.0.1:4050", "content-length": "5", "content-type": "application/json",
    "content-encoding": "gzip",
    "accept": "text/event-stream", "accept-encoding": "gzip", "authorization": "Bearer lan", "x-api-key": "k",
    "cookie": "a=b", "forwarded": "for=x", "x-forwarded-for": "10.0.0.7", "x-real-ip": "10.0.0.7",
    "via": "1.1 x",
    "cf-connecting-ip": "10.0.0.7", "x-stainless-os": "Linux", "connection": "close", "te": "trailers",
    "transfer-encoding": "chunked", "upgrade": "h2c", "proxy-authorization": "x", "origin": "http://x",
    "expect": "x",
    "openai-beta": "responses=experimental", "openai-organization": "o", "chatgpt-account-id": "forged",
    "x-codex-routing-hint": "model=forged", "x-openai-fedramp": "true",
    "x-openai-account-routing-override": "us",
    q.LITE_HEADER: "true",
}
US = q.Identity("qoo_bridge", "0.169.0")
OURS = {"version": "0.169.0", "originator": "qoo_bridge", "user-agent": q.USER_AGENT}


def test_a_codex_keeps_its_own_fields_and_no_others() -> None:
    assert q.upstream_headers({**STAYS, **CODEX_FIELDS}, q.Identity("x", "1.0.0"), "key") == {
        "version": "0.169.0", **CODEX_FIELDS}


def test_another_client_is_named_as_the_bridge() -> None:
    headers = {**STAYS, "user-agent": "OpenAI/Python 1.0", "originator": "forged", "version": "9.9.9",
              "x-openai-subagent": "forged", "x-codex-beta-features": "forged"}
    assert q.upstream_headers(headers, US, "key") == {**OURS, "session-id": "key"}


def test_requests_of_the_bridge_itself_are_named_as_the_bridge() -> None:
    assert US.fields() == OURS


@pytest.mark.parametrize(("headers", "session", "expected"), [
    ({}, "key", {**OURS, "session-id": "key"}),
    ({"session-id": "s", "thread-id": "t", "x-client-request-id": "r"}, "key",
     {**OURS, "session-id": "s", "thread-id": "t", "x-client-request-id": "r"}),
    ({"thread_id": "old"}, "key", {**OURS, "session-id": "key", "thread-id": "old"}),
    ({"thread_id": "old", "thread-id": "new"}, "key", {**OURS, "session-id": "key", "thread-id": "new"}),
    ({"user-agent": "codex_cli_rs/0.130.0 (x)", "originator": "codex_cli_rs", "session_id": "s"}, "s",
     {"version": "0.130.0", "originator": "codex_cli_rs", "user-agent": "codex_cli_rs/0.130.0 (x)",
      "session-id": "s"}),
    ({"originator": "codex_vscode", "version": "0.150.0"}, "s",
     {"version": "0.150.0", "originator": "codex_vscode", "user-agent": q.USER_AGENT, "session-id": "s"}),
    ({"x-codex-window-id": "w", "user-agent": "qoo/1"}, "s",
     {**OURS, "user-agent": "qoo/1", "x-codex-window-id": "w", "session-id": "s"}),
    ({"x-codex-turn-metadata": "{}", "user-agent": ""}, "s",
     {**OURS, "x-codex-turn-metadata": "{}", "session-id": "s"}),
])
def test_upstream_fields(headers: dict[str, str], session: str, expected: dict[str, str]) -> None:
    before = dict(headers)
    assert q.upstream_headers(headers, US, session) == expected
    assert headers == before


@pytest.mark.parametrize("session", ["", "a b", "a\r\nb: c", "\xe9", "\u2028", "s" * 129])
def test_session_that_is_no_field_value_is_hashed(session: str) -> None:
    assert q.upstream_headers({}, US, session)["session-id"] == q.stable_id(session)


@pytest.mark.parametrize(("name", "default"), [
    ("session-id", "key"), ("version", "0.169.0"), ("originator", "qoo_bridge"),
])
def test_an_empty_field_is_none(name: str, default: str) -> None:
    assert q.upstream_headers({"user-agent": AGENT, name: ""}, US, "key")[name] == default


@pytest.mark.parametrize(("agent", "version"), [
    (AGENT, "0.169.0"), ("codex_cli_rs/0.98.0", "0.98.0"),
    ("codex-tui/0.170.0-alpha.3 (x)", "0.170.0-alpha.3"),
    ("Codex Desktop/1.2.3", "1.2.3"), ("codex/10.20.30", "10.20.30"),
    ("", ""), ("OpenAI/Python 1.2.3", ""), ("curl/8.0.0", ""), ("codex", ""), ("codex/1.2", ""),
    ("codex/x.y.z", ""),
    ("x codex/1.2.3", ""), ("codex exec/1.2.3", ""), ("codex/1.2.3-" + "x" * 40, "1.2.3-" + "x" * 20),
])
def test_codex_version(agent: str, version: str) -> None:
    assert q.codex_version({"user-agent": agent}) == version
    assert q.is_codex({"user-agent": agent}) is bool(version)


@pytest.mark.parametrize(("headers", "codex"), [
    ({}, False), ({"originator": "codex_exec"}, True), ({"originator": "Codex Desktop"}, True),
    ({"originator": "x_codex"}, False), ({"x-codex-turn-metadata": ""}, True),
    ({"x-codex-window-id": ""}, True),
    ({"x-codex-beta-features": "x"}, False), ({"session-id": "s"}, False),
])
def test_is_codex(headers: dict[str, str], codex: bool) -> None:
    assert q.is_codex(headers) is codex


@pytest.mark.parametrize(("headers", "session"), [
    ({"session-id": "a", "session_id": "b", "conversation_id": "c"}, "a"), ({"session_id": "b"}, "b"),
    ({"conversation_id": "c", "session_id": "b"}, "b"), ({"conversation_id": "c"}, "c"),
    ({"session-id": "", "conversation_id": "c"}, "c"), ({"thread-id": "t"}, ""), ({}, ""),
])
def test_client_session(headers: dict[str, str], session: str) -> None:
    assert q.client_session(headers) == session


@pytest.mark.parametrize(("request_", "hint"), [
    ({"model": "gpt-6-sol"}, "model=gpt-6-sol"),
    ({"model": "m", "service_tier": "priority"}, "model=m;tier=priority"),
    ({"model": "m", "service_tier": None}, "model=m"), ({"model": "m", "service_tier": 5}, "model=m"),
])
def test_routing_hint(request_: dict[str, Any], hint: str) -> None:
    assert q.routing_hint(request_) == hint


def test_downstream_fields() -> None:
    passed = {
        "content-type": "text/event-stream", "etag": "e", "retry-after": "5", "cf-ray": "r",
        "openai-model": "m",
        "openai-processing-ms": "1", "x-request-id": "i", "x-codex-turn-state": "ts", "x-models-etag": "e",
        "x-codex-primary-used-percent": "5", "x-codex-plan-type": "plus", "x-ratelimit-remaining-tokens": "1",
    }
    stays = {
        "set-cookie": "a=b", "content-length": "5", "content-encoding": "gzip",
        "transfer-encoding": "chunked",
        "connection": "close", "keep-alive": "x", "trailer": "x", "upgrade": "h2", "date": "x",
        "server": "cloudflare",
        "alt-svc": "h3", "strict-transport-security": "x", "location": "https://x", "www-authenticate": "x",
        "cf-cache-status": "x", "x-accel-redirect": "/etc", "x-accel-buffering": "no", "x-sendfile": "/etc",
        "x-qoo-bridge-error": "bridge", "x-qoo-bridge-id": "forged",
    }
    assert q.downstream_headers({**stays, **passed}) == passed
