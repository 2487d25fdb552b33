"""Room spans: a request read with its places, and what it shares with its conversation's last one."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import json.scanner
import random
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from help import ALIAS, check_written, parse_all, same

import qoo_bridge as q


@pytest.fixture(autouse=True, params=["c", "python"])
def scanner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with CPython's scanner, and with the one that other Pythons have."""
    if request.param == "python":
        for decoder in (q.UPSTREAM_DECODER, q.CLIENT_DECODER):
            scan = json.scanner.py_make_scanner(decoder)  # type: ignore[attr-defined]
            monkeypatch.setattr(decoder, "scan_once", scan)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode so little at once that most values end in another window."""
    monkeypatch.setattr(q, "WINDOW", 7)
    monkeypatch.setattr(q, "ENCODED_PIECE", 3)


# -- places -------------------------------------------------------------------


def test_a_fields_own_bytes_can_be_had() -> None:
    spans = q.read_request(b'{"a" : [1, 2] ,"a": {"b" : 1} }')
    assert spans.value_bytes("a", 9) == b'{"b" : 1}'
    assert spans.value_bytes("a", 8) == b""  # it is longer
    with pytest.raises(KeyError):
        spans.value_bytes("b", 9)


# -- what cannot be parsed, or cannot be sent as it is ------------------------

DEEP = 100_000


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("raw", [
    b"", b" ", b"{", b"}", b'{"a"', b'{"a":', b'{"a":1', b'{"a":1,', b'{"a":1,}', b'{"a" 1}', b"{1:2}",
    b'{"a":1}x', b'{"a":1} {}', b'{"a":1}\0', b'{"a":\x0b1}', b'{"a":01}', b'{"a":1.}', b'{"a":+1}', b"{,}",
    b'{"a":tru}', b'{"a":nul', b'{"a":1 "b":2}', b'{"input":[', b'{"input":[1', b'{"input":[1,',
    b'{"input":[1,]}',
    b'{"input":[1 2]}', b'{"input":[,]}', b'{"input":[1}', b'{"input":[1:2]}', b'{"input":{]}',
    b'{"input":[1]]}',
    b'{"a":NaN}', b'{"input":[1,-Infinity]}', b'{"a":Infinity}', b'{"a":"\x00"}', b'{"a":"\n"}', b'{"a\n":1}',
    b'{"a":"\\x"}', b'{"a":"\\u12"}', b'{"input":["a', b"\xff", b'{"a":"\xff"}', b'{"a":"\xed\xa0\x80"}',
    b'{"a":"\xc0\xaf"}', b'{"a":1}\xff', b'{"a":"' + b"\x80" * 40 + b'"}', b'{"a":"\xf0\x9f\x98',
    b"\xef\xbb\xbf{}", '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-32"),
    b"[" * DEEP, b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}",
    b'{"input":[{"x":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}]}",
], ids=lambda raw: repr(raw[:24]))
def test_what_is_not_json_is_refused_as_ever(raw: bytes) -> None:
    with pytest.raises(q.InvalidRequest) as before:
        q.parse_json(raw)
    with pytest.raises(q.InvalidRequest) as now:
        q.read_request(raw)
    assert str(now.value) == str(before.value)
    assert type(now.value.__cause__) is type(before.value.__cause__)


@pytest.mark.skipif(not hasattr(sys, "get_int_max_str_digits"), reason="this Python reads any integer")
def test_an_integer_of_too_many_digits_is_refused_as_ever() -> None:
    with pytest.raises(q.InvalidRequest, match="not JSON"):
        q.read_request(b'{"input":[%b]}' % (b"9" * 5000))


@pytest.mark.parametrize("raw", [b"[]", b" null ", b'"x"', b"5", b"true", b'[{"input":[1]}]'])
def test_what_is_no_object_is_only_parsed(raw: bytes) -> None:
    spans = q.read_request(raw)
    assert (spans.request, spans.fields) == (parse_all(raw), {})


@pytest.mark.parametrize("raw", [b'{"a":1e999}', b'{"a":[{"b":-1e999}]}', b'{"input":[{"a":1},{"b":1e400}]}'])
def test_a_number_out_of_range_is_refused_where_a_rule_fires_as_ever(raw: bytes) -> None:
    spans = q.read_request(raw)
    assert same(spans.request, parse_all(raw))
    assert q.write_request(spans.request, spans) is raw
    for request in ({**spans.request, **ALIAS}, {**spans.request, "b": 1}):
        with pytest.raises(ValueError, match="JSON"):
            q.write_request(request, spans)
    assert q.write_request({}, spans) == b"{}"


def test_more_places_than_the_limit_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "MAX_PLACES", 10)
    for raw in (b'{"input":[%b]}' % b",".join([b"{ }"] * 20), b'{"input":[%b]}' % b" , ".join([b"{ }"] * 20),
                b"{%b}" % b",".join(b'"%d" :0' % number for number in range(20)),
                b"{%b}" % b",".join([b'"a":0'] * 20)):
        spans = q.read_request(raw)
        assert (spans.request, spans.fields, spans.starts) == (parse_all(raw), {}, [])
        assert q.write_request({**spans.request, **ALIAS}, spans) == q.json_bytes({**parse_all(raw), **ALIAS})


@pytest.mark.parametrize("depth", [500, 900, 960, 975, 980])
@pytest.mark.parametrize("form", ['{"a":%s}', '{"input":[{"x":%s}]}', '{"input":[%s]}', '{"tools":%s}'])
def test_what_could_be_parsed_can_be_parsed(form: str, depth: int) -> None:
    raw = (form % ("[" * depth + " " + "]" * depth)).encode()
    try:
        before: Any = parse_all(raw)
    except RecursionError:
        with pytest.raises(q.InvalidRequest, match="nested too deeply"):
            parse_or_read(raw)
        return
    spans = q.read_request(raw)
    assert depth_of(spans.request) == depth_of(before)
    assert q.write_request({**spans.request, **ALIAS}, spans) == raw[:-1] + b',"model":"slug"}'


def parse_or_read(raw: bytes) -> None:
    """Raise for a body that is too deep: one at the limit may be read, by two levels."""
    q.read_request(raw)
    q.parse_json(raw)


def depth_of(value: Any) -> int:
    """Return how often a value's first entry can be entered."""
    depth = 0
    while value and isinstance(value, (dict, list)):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
        depth += 1
    return depth


# -- fuzz ---------------------------------------------------------------------

STRINGS = ('""', '"a"', '"\\u0061\\/"', '"é"', '"中文"', '"😀"', '"\\ud83d\\ude00"', '"\\ud800"',
           '"\\udc00x"', '"\\\\\\""', '"]},{[:"', '" "', '"\u2028"', '"\x7f"', '"%s"' % ("long " * 40))
NUMBERS = ("0", "-0", "1", "-17", "1.0", "1e5", "1E-7", "-0.0", "1.50", "12345678901234567890123", "1e308")
NAMES = ('"model"', '"input"', '"input"', '"tools"', '"messages"', '"a"', '"\\u0061"', '"é"', '"😀"',
         '"\\ud800"', '""', '"inp\\u0075t"', '"n\\n"')


def white(chance: random.Random) -> str:
    return "".join(chance.choices(" \t\n\r", k=chance.choice((0, 0, 0, 0, 1, 2, 9))))


def value(chance: random.Random, depth: int) -> str:
    """Return the text of a value."""
    kind = chance.randrange(8 if depth else 5)
    if kind < 2:
        return chance.choice(STRINGS)
    if kind < 4:
        return chance.choice(NUMBERS)
    if kind == 4:
        return chance.choice(("true", "false", "null", "[]", "{}"))
    if kind == 5:
        return entries(chance, "[]", [value(chance, depth - 1) for _ in range(chance.randrange(6))])
    return fields(chance, [chance.choice(NAMES) for _ in range(chance.randrange(6))], depth)


def fields(chance: random.Random, names: list[str], depth: int) -> str:
    colons = [white(chance) + ":" + white(chance) for _ in names]
    texts = [name + colon + value(chance, depth - 1) for name, colon in zip(names, colons)]
    return entries(chance, "{}", texts)


def entries(chance: random.Random, ends: str, texts: list[str]) -> str:
    inner = ",".join(white(chance) + text + white(chance) for text in texts)
    return ends[0] + (inner or white(chance)) + ends[1]


def body(chance: random.Random) -> bytes:
    """Return a request's bytes: some of its names come twice."""
    names = chance.choices(NAMES, k=chance.randrange(9))
    return (white(chance) + fields(chance, names, 4) + white(chance)).encode("utf-8")


@functools.cache
def bodies(seed: int) -> list[bytes]:
    """Return the requests of a seed, the same for each scanner and window."""
    chance = random.Random(seed)
    return [body(chance) for _ in range(400)]


def changed_list(chance: random.Random, items: list[Any]) -> list[Any]:
    """Return a new list: items dropped, changed, moved, new; or all the same."""
    kept: list[Any] = []
    for item in items:
        kind = chance.randrange(8)
        if kind == 0:
            kept.append({"new": "é\ud800"})
        elif kind == 1 and isinstance(item, dict):
            kept.append({**item, "type": "message"})
        elif kind == 2:
            kept += [item, item]
        elif kind != 3:
            kept.append(item)
    if chance.random() < 0.2:
        chance.shuffle(kept)
    return kept


def changed(chance: random.Random, request: dict[str, Any]) -> dict[str, Any]:
    """Return a request as some rules could make it, without a change of what was read."""
    result = dict(request)
    for name in list(result):
        kind = chance.randrange(6)
        if kind == 0:
            del result[name]
        elif kind == 1:
            result[name] = chance.choice([None, 1.5, "x😀", "\ud800", [1, {"a": []}], {}])
        elif kind == 2 and isinstance(result[name], list):
            result[name] = changed_list(chance, result[name])
    if chance.random() < 0.3:
        result["store"] = False
    tools = result.get("tools")
    if chance.random() < 0.3 and isinstance(tools, list):
        rest = result["input"] if isinstance(result.get("input"), list) else []
        result["input"] = [{"type": "additional_tools", "tools": changed_list(chance, tools)}, *rest]
        del result["tools"]
    return result


@pytest.mark.parametrize("window", [1, 5, 31, 256 * 1024])
@pytest.mark.parametrize("seed", range(10))
def test_any_change_of_any_request(seed: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "WINDOW", window)
    monkeypatch.setattr(q, "ENCODED_PIECE", max(1, window // 4))
    chance = random.Random(seed)
    for raw in bodies(seed)[:150]:
        spans = q.read_request(raw)
        before = parse_all(raw)
        assert same(spans.request, before)
        assert spans.fields.keys() == before.keys()
        for name, (_, start, end) in spans.fields.items():
            assert same(parse_all(raw[start:end]), before[name])
        for item, start, end in zip(spans.items, spans.starts, spans.ends):
            assert item is q.NO_ITEM or same(parse_all(raw[start:end]), item)
        for _ in range(4):
            check_written(raw, changed(chance, spans.request), spans)
        assert same(spans.request, before)  # nothing above changed what was read


DAMAGE = (b"", b",", b"}", b"]", b'"', b"\\", b"\x80", b"\xf0", b"\0", b"\x1f", b"e", b".", b"N", b"1e999")


@pytest.mark.parametrize("seed", range(10))
def test_any_damage_is_judged_as_ever(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "WINDOW", 9)
    monkeypatch.setattr(q, "ENCODED_PIECE", 2)
    chance = random.Random(seed)
    for whole in bodies(seed):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 2)):
            at = chance.randrange(len(raw) + 1)
            raw[at:at + chance.randint(0, 2)] = chance.choice(DAMAGE)
        assert outcome(q.read_request, bytes(raw)) == outcome(q.parse_json, bytes(raw))


def outcome(read: Any, raw: bytes) -> str:
    try:
        result = read(raw)
    except q.InvalidRequest as exc:
        return str(exc)
    return repr(getattr(result, "request", result))


# -- the conversation's last request -------------------------------------------


def settled(raw: bytes, last: q.Spans = q.NOTHING_READ) -> q.Spans:
    """Read a request and keep it, as for the next one."""
    spans = q.read_request(raw, last)
    spans.settle(1 << 30)
    return spans


def seen(spans: q.Spans) -> list[object]:
    """Return all that a reader of spans can see, as text where values of one text can differ."""
    return [repr(spans.request), list(spans.fields.items()), repr(spans.items).replace(repr(q.NO_ITEM), "-"),
            spans.starts, spans.ends, spans.lists, spans.long_texts, spans.raw]


@pytest.mark.parametrize(("before", "raw", "fresh"), [
    # all is the same; or all but a field, of another length
    ('{"model":"a","input":[1]}', '{"model":"a","input":[1]}', ""),
    ('{"a":"x","b":"y","c":"z"}', '{"a":"x","b":"longer","c":"z"}', '"longer"'),
    ('{"a":"x","b":"y","c":"z"}', '{"a":"longer", "b":"y","c":"z"}', '"longer"'),
    ('{"a":"x","b":"y"}', '{"a":"x","b":"longer"}', '"longer"'),
    # what follows a field belongs to it: another white space, another field behind it
    ('{"a":"x","b":"y"}', '{"a":"x" ,"b":"y"}', '"x"'),
    ('{"a":"x","b":"y"}', '{"a":"x", "b":"yy"}', '"yy"'),
    ('{"a":"x","b":"y"}', '{"a":"x","b":"y" }', '"y"'),
    ('{"a":"x","b":"y"}', '{"a":"x","b":"y","c":1}', '"y",1'),
    ('{"a":"x","b":"y","c":1}', '{"a":"x","c":1}', "1"),
    ('{"a":"x","b":"y","c":1}', '{"c":1,"a":"x","b":"y"}', '1,"x","y"'),
    # more items; fewer; others at the end, in the middle, before all; a list that is empty or is none
    ('{"input":[[1],{"b":2}],"t":5}', '{"input":[[1],{"b":2},{"c":3}],"t":5}', '{"c":3}'),
    ('{"input":[{"a":1},{"b":2}],"t":5}', '{"input":[{"a":1}],"t":5}', ""),
    ('{"input":[{"a":1},{"b":2}],"t":5}', '{"input":[{"a":1},{"b":3}],"t":5}', '{"b":3}'),
    ('{"input":[[1],[2],[3],[4]]}', '{"input":[[1],[0],[3],[4]]}', "[0],[3],[4]"),
    ('{"input":[[1],[2]]}', '{"input":[[0],[1],[2]]}', "[0],[1],[2]"),
    ('{"input":[1],"t":5}', '{"input":[],"t":5}', ""),
    ('{"input":[],"t":5}', '{"input":[1],"t":5}', "1"),
    ('{"input":"hi","t":5}', '{"input":["hi"],"t":5}', '"hi"'),
    ('{"input":["hi"],"t":5}', '{"input":"hi","t":5}', '"hi"'),
    ('{"input":[1,2],"tools":[3]}', '{"input":[1,2,4],"tools":[3]}', "4"),
    # a value that goes on
    ('{"input":[1,12]}', '{"input":[1,123]}', "123"),
    ('{"input":[1]}', '{"input":[12]}', "12"),
    ('{"input":[12]}', '{"input":[1]}', "1"),
    ('{"a":1}', '{"a":12}', "12"),
    # two fields of one name
    ('{"input":[1],"input":[2],"b":3}', '{"input":[1],"input":[2],"b":3}', "1,2,3"),
    ('{"input":[1],"input":"x"}', '{"input":[1],"input":"x"}', '"x"'),
    ('{"input":"x","input":[1]}', '{"input":[1],"input":[1,2]}', "1,2"),
    ('{"b":1,"a":2,"b":3}', '{"b":1,"a":2,"b":3}', "1,2,3"),
    ('{"x":1,"a":1,"b":2,"a":3}', '{"x":1,"a":1,"c":2,"a":3}', "1,1,2,3"),
    ('{"a":1}', '{"a":1,"a":1}', "1,1"),
    ('{"a":1,"b":2}', '{"a":1,"a":1,"b":2}', "1"),
    # not ASCII
    ('{"é":"ü","input":["😀",1]}', '{"é":"ü","input":["😀",1,"😀"],"z":"é"}', '"😀","é"'),
    ('{"é":"ü","input":["😀","x"],"z":1}', '{"é":"üü","input":["😀","x"],"z":1}', '"üü"'),
    ("{}", '{"a":1}', "1"), ('{"a":1}', "{}", ""),
])
@pytest.mark.parametrize("window", [3, 256 * 1024])
def test_what_is_as_in_the_last_request_is_not_parsed_again(
    before: str, raw: str, fresh: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, body = settled(before.encode()), raw.encode()
    monkeypatch.setattr(q, "SMALL_WINDOW", window)
    spans = q.read_request(body, last)
    assert seen(spans) == seen(q.read_request(body))
    assert json.dumps(spans.fresh, ensure_ascii=False, separators=(",", ":"))[1:-1] == fresh


def test_values_are_shared_and_lists_are_not() -> None:
    raw = b'{"tools":[{"t":1}],"text":{"a":1},"input":[{"a":1},{"b":2}]}'
    last = settled(raw)
    spans = q.read_request(raw[:-2] + b',{"c":3}]}', last)
    assert spans.request["text"] is last.request["text"]
    for name, item in (("input", 0), ("input", 1), ("tools", 0)):
        assert spans.request[name][item] is last.request[name][item]
    for name in ("input", "tools"):
        assert spans.request[name] is not last.request[name]
    q.free_items(spans)  # as for a large request that is not kept
    assert seen(last) == seen(q.read_request(raw))


def test_a_long_text_is_known_as_long_where_it_is_taken() -> None:
    long, short = json.dumps("x" * q.LONG_TEXT), '"x"'
    for before, now in ((long, long), (long, short), (short, long)):
        first, second = (f'{{"instructions":{long},"input":{text}}}'.encode() for text in (before, now))
        spans = q.read_request(second, settled(first))
        assert spans.memory > q.LONG_TEXT
        assert seen(spans) == seen(q.read_request(second))


def test_a_request_of_more_fields_than_an_api_has_is_no_last_one() -> None:
    """To look for the place of each field among thousands would take seconds."""
    for count in (q.MAX_KNOWN_FIELDS, q.MAX_KNOWN_FIELDS + 1):
        raw = b"{%b}" % b",".join(b'"%d":0' % number for number in range(count))
        assert len(settled(raw).order) in (0, q.MAX_KNOWN_FIELDS)
        assert (q.read_request(raw, settled(raw)).fresh == []) == (count == q.MAX_KNOWN_FIELDS)


@pytest.mark.parametrize(("value", "most"), [('"x"', 4096), ('"%s"' % ("x" * 20_000), 128 * 1024)],
                         ids=["short", "long"])
def test_of_a_request_with_one_new_field_little_is_decoded(
    value: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    load = q.SpanReader._load

    def count(reader: q.SpanReader, size: int) -> None:
        load(reader, size)
        loaded.append(len(reader._text))

    raw = json.dumps({"a": 1, "input": ["x" * 300_000], "z": ["x" * 300_000]})
    last = settled(raw.encode())
    monkeypatch.setattr(q.SpanReader, "_load", count)
    spans = q.read_request(raw.replace("1", value).encode(), last)
    assert (len(spans.fresh), sum(loaded) <= 4 * most, max(loaded) <= most) == (1, True, True), loaded


def test_what_is_decoded_is_bounded_by_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "WINDOW", 16 * 1024)
    monkeypatch.setattr(q, "SMALL_WINDOW", 64)
    decoded: list[int] = []
    load = q.SpanReader._load

    def count(reader: q.SpanReader, size: int) -> None:
        load(reader, size)
        decoded.append(len(reader._text))

    last = settled('{"tools":[],"b":"é","c":1}'.encode())
    raw = ("{" + '"tools":[1],"b":"é",' * 2000 + '"z":1}').encode()
    monkeypatch.setattr(q.SpanReader, "_load", count)
    assert q.read_request(raw, last).request == {"tools": [1], "b": "é", "z": 1}
    assert sum(decoded) < 10 * len(raw)


@pytest.mark.parametrize("before", ["[1]", "null", '{"a":NaN}', '{"a":1e999}'])
def test_a_last_request_without_places_has_nothing_to_take(before: str) -> None:
    last = q.Spans(before.encode(), None)
    last.settle(1 << 30)
    assert seen(q.read_request(b'{"a":1}', last)) == seen(q.read_request(b'{"a":1}'))


def test_more_places_than_the_limit_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    last = settled(b'{"tools":[1,2,3],"input":[1,2,3,4]}')
    monkeypatch.setattr(q, "MAX_PLACES", 8)
    for raw in (b'{"tools":[1,2,3],"input":[1,2,3,4]}', b'{"tools":[1,2,3],"input":[1,2,3,4,5]}',
                b'{"tools":[1,2,3],"input":[1,2,3]}', b'{"tools":[1,2,3],"input":[1,2]}'):
        assert seen(q.read_request(raw, last)) == seen(q.read_request(raw))


def test_a_torn_request_is_refused_as_ever() -> None:
    raw = '{"model":"é","input":[1,{"a":"b"},"c", 12],"tools":[ ["t"] ],"x":true}'.encode()
    for cut in range(len(raw)):
        for body in (raw[:cut], raw[:cut] + b"}", raw[:cut] + b"]}", raw[:cut] + b"1]}"):
            assert read_after(body, settled(raw)) == read_after(body, q.NOTHING_READ)


def grown(chance: random.Random, raw: bytes) -> bytes:
    """Return a body that begins or ends like another one; now and then it is no JSON."""
    texts = ["", " ", ",", "1", '"é"', '{"a":1},', '"input":[1,2],', '"b":"x",', "]", "}"]
    for _ in range(50):
        places = sorted(chance.choices([*range(len(raw) + 1)], k=2))
        new = chance.choice(texts).encode()
        if chance.random() < 0.7:  # only more
            places[1] = places[0]
        body = raw[:places[0]] + new + raw[places[1]:]
        if isinstance(q.json_or_none(body), dict):
            break
    return body


@pytest.mark.parametrize("window", [1, 5, 256 * 1024])
@pytest.mark.parametrize("seed", range(4))
def test_any_request_is_read_alike_after_any_other(
    seed: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "WINDOW", window)
    monkeypatch.setattr(q, "SMALL_WINDOW", window)
    monkeypatch.setattr(q, "ENCODED_PIECE", window // 3 + 1)
    chance = random.Random(seed)
    last, taken = q.NOTHING_READ, 0
    for first in bodies(seed)[:25]:
        raw = first
        for _ in range(6):
            assert read_after(raw, last) == read_after(raw, q.NOTHING_READ)
            with contextlib.suppress(q.InvalidRequest):
                spans = q.read_request(raw, last)
                taken += spans.memory > 0
                if spans.fields:
                    check_written(raw, {**spans.request, "z": 1}, spans)
                    spans.settle(1 << 30)
                    last = spans
            raw = grown(chance, raw)
    assert taken > 20


def read_after(raw: bytes, last: q.Spans) -> list[object]:
    """Return what reading a request makes of it: what there is to see, or the error."""
    try:
        return seen(q.read_request(raw, last))
    except q.InvalidRequest as exc:
        return [str(exc)]


def test_what_later_requests_have_dropped_is_not_counted_for_ever() -> None:
    last, sizes = q.NOTHING_READ, []
    for turn in range(30):  # most of each is new
        raw = json.dumps({"tools": ["t" * 900], "input": [str(turn) + "x" * 5000]}).encode()
        spans = q.read_request(raw, last)
        sizes.append(spans.settle(1 << 30))
        last = spans
    assert max(sizes) < 2.5 * sizes[0]
    assert last.request["tools"][0] is q.read_request(raw, last).request["tools"][0]


def test_a_conversation_that_its_client_has_made_short_is_counted_anew() -> None:
    def written(*items: str) -> bytes:
        return json.dumps({"instructions": "x" * 900, "input": list(items)}).encode()

    long = settled(written(*["x" * 5000] * 99))
    short = q.read_request(written("y"), long)
    assert short.request["instructions"] is long.request["instructions"]
    assert short.settle(1 << 30) < 10_000


def test_values_that_are_gone_do_not_keep_a_request_from_being_kept() -> None:
    """Of six texts four are new in each request: what is counted grows by two thirds."""
    def written(turn: int) -> bytes:
        return json.dumps({"input": ["x" * 9000, "y" * 9000, *(f"{turn}" * 9000 for _ in range(4))]}).encode()

    limit = settled(written(0)).settle(1 << 30) * 5 // 4
    last = q.NOTHING_READ
    for turn in range(6):
        spans = q.read_request(written(turn), last)
        assert spans.settle(limit) < limit
        last = spans


def test_what_cannot_be_a_last_request_is_not_counted() -> None:
    for raw in (b'{"a":[%b],"a":1}' % b",".join([b"1"] * 9000), b'{"input":["%b"]}' % (b"x" * 9000)):
        spans = q.read_request(raw)
        spans.settle(9500)
        assert (spans.memory, spans.order) == (0, [])


def test_the_names_of_fields_are_counted() -> None:
    raw = b'{"%b":1}' % (b"x" * 100_000)
    assert q.read_request(raw).settle(1 << 30) > 200_000


@pytest.mark.parametrize("text", ["x" * 4000, "é" * 4000, "\U0001f600" + "x" * 4000, "\n" * 2000, "[" * 99],
                         ids=["ascii", "latin", "wide", "escapes", "short"])
def test_the_memory_of_kept_requests_is_estimated_from_above(text: str) -> None:
    items: list[Any] = [
        {"type": "function_call_output", "output": text + str(number)} for number in range(200)]
    items += [[[], {}, [number], {"a": {}}] for number in range(2000)]
    body = functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
    bodies = [body({"tools": items[:9], "input": items[:count]}).encode()
              for count in (150, 300, 1000, len(items))]
    gc.collect()
    tracemalloc.start()
    try:
        last, size = q.NOTHING_READ, 0
        for raw in bodies:
            spans = q.read_request(raw, last)
            size, last = spans.settle(1 << 30), spans
            del spans
            gc.collect()
        taken = tracemalloc.get_traced_memory()[0] + len(last.raw)
    finally:
        tracemalloc.stop()
    assert taken <= size <= 5 * taken


# -- what it costs ------------------------------------------------------------


class Kept(dict):  # type: ignore[type-arg]
    """A request whose end can be noticed."""


def test_nothing_is_kept_that_only_the_collector_finds() -> None:
    spans = q.read_request(b'{"input":[{"a":1},{"b":2}],"tools":[{"t":1}]}')
    spans.request = Kept(spans.request)
    seen = weakref.ref(spans.request)
    gc.disable()
    try:
        q.write_request({"input": [{"new": 1}, *spans.request["input"]]}, spans)
        del spans
        assert seen() is None
    finally:
        gc.enable()


@pytest.fixture
def sleepers() -> Iterator[list[float]]:
    """Run threads that sleep for a millisecond; return by how many seconds they woke late."""
    late: list[float] = []
    ended = threading.Event()

    def sleep() -> None:
        while not ended.is_set():
            before = time.monotonic()
            time.sleep(0.001)
            late.append(time.monotonic() - before - 0.001)

    threads, interval = [threading.Thread(target=sleep) for _ in range(3)], sys.getswitchinterval()
    sys.setswitchinterval(q.SWITCH_SECONDS)  # as `serve` does
    for thread in threads:
        thread.start()
    yield late
    ended.set()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)


def test_other_threads_run_between_items(sleepers: list[float]) -> None:
    raw = b'{"input":[%b]}' % b",".join([b'{"a":[%b]}' % b",".join([b'{"b":1}'] * 40)] * 6000)
    before = len(sleepers)
    spans = q.read_request(raw)
    assert len(spans.items) == 6001
    assert len(sleepers) - before >= 3  # with json.loads: at most one each, and often none
