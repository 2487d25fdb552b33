"""Room json: untrusted JSON read and written."""

from __future__ import annotations

import gc
import json
import tracemalloc
from typing import Any

import pytest

import qoo_bridge as q


@pytest.mark.parametrize(("value", "name"), [
    ({}, "an object"), ([], "a list"), ("", "a string"), (True, "a boolean"), (None, "null"), (1, "a number"),
    (1.5, "a number"),
])
def test_json_type(value: Any, name: str) -> None:
    assert q.json_type_name(value) == name



@pytest.mark.parametrize(("value", "raw"), [
    ({"a": [1, None]}, b'{"a":[1,null]}'), ("é\u2028", '"é\u2028"'.encode()),
    ("é\ud800", b'"\\u00e9\\ud800"'),
])
def test_dump_json(value: Any, raw: bytes) -> None:
    assert q.json_bytes(value) == raw


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("text", ["x", "\ud800"])
def test_dump_json_writes_json_only(number: float, text: str) -> None:
    with pytest.raises(ValueError, match="JSON"):
        q.json_bytes([text, number])


@pytest.mark.parametrize("value", [None, True, 5, 1.5, "x", ["x", 5, None], {}], ids=repr)
def test_values_of_another_type_are_empty(value: Any) -> None:
    assert q.dicts_in(value) == []
    assert q.or_empty(value, dict) == {}


def test_values_of_the_right_type_stay() -> None:
    assert q.dicts_in([{"a": 1}, "x", {}]) == [{"a": 1}, {}]
    assert q.or_empty("x", str) == "x"


@pytest.mark.parametrize(("value", "read"), [
    (0, 0), (1.5, 1.5), (-3, -3), (True, None), ("1", None), (None, None), (10 ** 13, None),
    (float("nan"), None), (float("inf"), None),
])
def test_number_within_reason(value: Any, read: float | None) -> None:
    assert q.finite_number(value) == read


@pytest.mark.parametrize("text", [
    b"", b"{", b"\xff", b"NaN", b"[-Infinity]", b"1e999", b"[" * 100_000, b"{} {}", "\ud800",
], ids=lambda text: repr(text[:12]))
def test_what_is_no_json_is_none(text: str | bytes) -> None:
    assert q.json_or_none(text) is None


@pytest.mark.parametrize(("body", "words"), [
    (b"\xff", "not UTF-8"), (b"[" * 100_000, "nested too deeply"), (b"{", "not JSON"), (b"NaN", "not JSON"),
], ids=lambda value: repr(value[:12]))
def test_body_that_is_no_json_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(q.InvalidRequest, match=words):
        q.parse_json(body)


def test_body_of_any_json_is_read() -> None:
    assert [q.parse_json(body) for body in (b"{}", b' ["\xc3\xa9"] ', b"null")] == [{}, ["é"], None]


# -- what a body costs once it is parsed ------------------------------------------

SHAPES = {
    "lists": b"[],", "objects": b'{"a":1},', "numbers": b"1234567,", "fractions": b"1.5,",
    "strings": b'"ab",',
    "messages": b'{"type":"message","role":"user","content":[{"type":"input_text","text":"hi there"}]},',
    "text": b'"' + b"x" * 100_000 + b'",',
    "wide text": b'"' + "\u4e2d".encode() * 30_000 + b'",',
    "one wide character": b'"' + b"x" * 100_000 + "\U0001f600".encode() + b'",',
    "fields": b'{' + b",".join(b'"k%d":%d' % (number, number) for number in range(1000)) + b'},',
}


def measured(body: bytes) -> tuple[Any, int, int]:
    """Parse a body; return the value, the bytes of memory that it takes, and those that parsing took."""
    gc.collect()
    tracemalloc.start()
    try:
        parsed = q.parse_json(body)
        taken, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return parsed, taken, peak


def body_of(shape: str) -> bytes:
    """Return a body that repeats a shape."""
    return b"[" + (SHAPES[shape] * (700_000 // len(SHAPES[shape]) + 1))[:-1] + b"]"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_is_from_above_and_not_far(shape: str) -> None:
    body = body_of(shape)
    parsed, _, peak = measured(body)
    assert parsed
    assert 0.9 * (peak + len(body)) <= q.parsed_size(body) <= 4 * (peak + len(body))
    assert q.parsed_size(body) <= q.WORST_PARSED * len(body)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_of_values_is_from_above(shape: str) -> None:
    parsed, taken, _ = measured(body_of(shape))
    size = q.memory_of([parsed], 1 << 30)
    assert 0.9 * taken <= size <= 4 * taken
    assert q.memory_of([parsed], 1000) > 1000
    assert q.memory_of([parsed, parsed], 1 << 30) == 2 * size


@pytest.mark.parametrize("value", [
    10 ** 4000, -1, 1.5, "", "é", "中", "😀", "x😀", {}, {"a": 1}, [], [0], [0] * 5,
    [0] * 9, [0] * 17, [0] * 99,
], ids=lambda value: repr(value)[:12])
def test_the_memory_of_any_value_is_estimated_from_above(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    parsed, taken, _ = measured(f"[{','.join([text] * 2000)}]".encode())
    assert taken <= q.memory_of([parsed], 1 << 30)
