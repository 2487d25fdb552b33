"""Room codings: content codings, within their limit."""

from __future__ import annotations

import gzip
import tracemalloc
import types
import zlib
from typing import Any

import pytest
from help import short

import qoo_bridge as q

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
    with pytest.raises(q.UnsupportedEncoding, match="libzstd is not installed"):
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
