"""Room spans: a request read with its places, and written with the client's own bytes."""

from __future__ import annotations

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
    monkeypatch.setattr(q, "MARGIN", 3)


def parse(raw: bytes) -> Any:
    """Parse as the bridge did before it knew places."""
    return q.CLIENT_DECODER.decode(raw.decode("utf-8"))


def check(raw: bytes, request: dict[str, Any], spans: q.Spans) -> bytes:
    """Write a request; check its value, and that all that was read is there in the client's bytes."""
    written = q.write_request(request, spans)
    assert same(json.loads(written), json.loads(q.json_bytes(request)))
    if written is raw:
        return raw
    at = 0
    for name, value in request.items():
        if spans.is_unchanged(name, value):
            start, _, end = spans.fields[name]
            at = written.index(raw[start:end], at) + end - start
        elif name in q.ITEM_LISTS and isinstance(value, list):
            for item in value:
                place = next((index for index, read in enumerate(spans.items) if read is item), None)
                if place is not None and isinstance(item, (dict, list)):
                    piece = raw[spans.starts[place]:spans.ends[place]]
                    at = written.index(piece, at) + len(piece)
    return written


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are equal, in order, 1 and 1.0 and True being three values."""
    return repr(one) == repr(other)


# -- a table ------------------------------------------------------------------

ALIAS = {"model": "slug"}


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(("raw", "changes", "written"), [
    # what is between the fields is new, what is in them is the client's
    ('{ "model" : "a" ,\n "n" :\t1e5 }', ALIAS, '{"model":"slug","n" :\t1e5}'),
    ('{"model":"a","n":[1.0, -0,-0.0,1E+2,12345678901234567890123]}', ALIAS,
     '{"model":"slug","n":[1.0, -0,-0.0,1E+2,12345678901234567890123]}'),
    ('{"model":"a","t":"\\u00e9\\/\\ud83d\\ude00"}', ALIAS,
     '{"model":"slug","t":"\\u00e9\\/\\ud83d\\ude00"}'),
    ('{"é":"é","model":"a","中":"😀","z":1}', ALIAS, '{"é":"é","model":"slug","中":"😀","z":1}'),
    ('{"t":"\\ud800","model":"a"}', ALIAS, '{"t":"\\ud800","model":"slug"}'),
    ('{"t":{"a":1,"a":2},"model":"a"}', ALIAS, '{"t":{"a":1,"a":2},"model":"slug"}'),
    ('{"t\\u0061":1,"model":"a"}', ALIAS, '{"t\\u0061":1,"model":"slug"}'),
    # the last of two fields of one name counts, at the first one's place
    ('{"a":1,"b":2,"a" : 3,"model":"x"}', ALIAS, '{"a" : 3,"b":2,"model":"slug"}'),
    ('{"input":[{"a":1}],"model":"x","input":[{"a": 2}]}', ALIAS, '{"input":[{"a": 2}],"model":"slug"}'),
    ('{"model":"x","model":"y"}', ALIAS, '{"model":"slug"}'),
    # a list is written item by item, neighbours with what is between them
    ('{"input":[{"a":1} , {"b":2},{"c":3}]}', {"input": [0, 1]}, '{"input":[{"a":1} , {"b":2}]}'),
    ('{"input":[{"a":1},\n{"b":2},\n{"c":3}]}', {"input": [0, 2]}, '{"input":[{"a":1},{"c":3}]}'),
    ('{"input":[{"a":1},{"b":2}]}', {"input": [{"x": 1}, 0, {"y": 2}, {"z": 3}, 1]},
     '{"input":[{"x":1},{"a":1},{"y":2},{"z":3},{"b":2}]}'),
    ('{"input":[{"a": 1},{"b":2}]}', {"input": [1, 0, 0]}, '{"input":[{"b":2},{"a": 1},{"a": 1}]}'),
    ('{"input":[{"a": 1}]}', {"input": []}, '{"input":[]}'),
    ('{"input":[]}', {"input": [{"x": "é\ud800"}, {"y": "é"}]},
     '{"input":[{"x":"\\u00e9\\ud800"},{"y":"\\u00e9"}]}'),
    ('{"input":[ ]}', ALIAS, '{"input":[ ],"model":"slug"}'),
    ('{"input": "hi"}', {"input": [{"role": "user"}]}, '{"input":[{"role":"user"}]}'),
    ('{"input": {"a" : 1}}', ALIAS, '{"input": {"a" : 1},"model":"slug"}'),
    ('{"input":[1, "é" ,null,[ ],-0]}', ALIAS, '{"input":[1, "é" ,null,[ ],-0],"model":"slug"}'),
    ('{"tools":[{"t": 1},{"u": 2}],"input":[{"a": 1}]}', {"tools": [1]},
     '{"tools":[{"u": 2}],"input":[{"a": 1}]}'),
    ("{}", ALIAS, '{"model":"slug"}'),
    ('{"model":"a"}', {"model": None}, "{}"),
])
def test_what_is_changed_is_new_and_the_rest_is_the_clients(
    raw: str, changes: dict[str, Any], written: str
) -> None:
    body = raw.encode("utf-8")
    spans = q.read_request(body)
    assert same(spans.request, parse(body))
    request = {**spans.request, **changes}
    for name, value in changes.items():
        if value is None:
            del request[name]
        elif isinstance(value, list):
            read = spans.request[name]
            request[name] = [read[item] if isinstance(item, int) else item for item in value]
    assert check(body, request, spans).decode("utf-8") == written


@pytest.mark.parametrize("raw", [b'{"model": "a"}', b' {"input" : [ 1 ], "a":1, "a":2 } ', b"{ }"])
def test_a_request_without_a_change_is_the_clients_body(raw: bytes) -> None:
    spans = q.read_request(raw)
    assert q.write_request(spans.request, spans) is raw
    assert q.write_request(dict(spans.request), spans) is raw


def test_the_lite_form_has_the_clients_tools_and_items() -> None:
    tools, items = b'[{"name": "a"},{"name":"b" },{"name": "c"}]', b'[{"x": 1}, {"y": 2}]'
    raw = b'{"tools":%b,"instructions":"i","input":%b}' % (tools, items)
    spans = q.read_request(raw)
    first, _, third = spans.request["tools"]
    carrier = {"type": "additional_tools", "tools": [first, third, {"name": "new"}]}
    request = {"input": [carrier, {"role": "developer"}, *spans.request["input"]]}
    assert check(raw, request, spans) == (
        b'{"input":[{"type":"additional_tools","tools":[{"name": "a"},{"name": "c"},{"name":"new"}]},'
        b'{"role":"developer"},{"x": 1}, {"y": 2}]}')


def test_the_last_item_of_a_list_is_no_neighbour_of_the_next_list() -> None:
    raw = b'{"tools":[{"t":1}],"input":[{"a":1}]}'
    spans = q.read_request(raw)
    request = {"input": [*spans.request["tools"], *spans.request["input"]]}
    assert check(raw, request, spans) == b'{"input":[{"t":1},{"a":1}]}'


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
    assert (spans.request, spans.fields) == (parse(raw), {})


@pytest.mark.parametrize("raw", [b'{"a":1e999}', b'{"a":[{"b":-1e999}]}', b'{"input":[{"a":1},{"b":1e400}]}'])
def test_a_number_out_of_range_is_refused_where_a_rule_fires_as_ever(raw: bytes) -> None:
    spans = q.read_request(raw)
    assert same(spans.request, parse(raw))
    assert q.write_request(spans.request, spans) is raw
    for request in ({**spans.request, **ALIAS}, {**spans.request, "b": 1}):
        with pytest.raises(ValueError, match="JSON"):
            q.write_request(request, spans)
    assert q.write_request({}, spans) == b"{}"


def test_more_places_than_the_limit_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "MAX_PLACES", 10)
    for raw in (b'{"input":[%b]}' % b",".join([b"{ }"] * 20), b'{"input":[%b]}' % b" , ".join([b"{ }"] * 20),
                b"{%b}" % b",".join(b'"%d" :0' % number for number in range(20))):
        spans = q.read_request(raw)
        assert (spans.request, spans.fields, spans.starts) == (parse(raw), {}, [])
        assert q.write_request({**spans.request, **ALIAS}, spans) == q.json_bytes({**parse(raw), **ALIAS})


@pytest.mark.parametrize("depth", [500, 900, 960, 975, 980])
@pytest.mark.parametrize("form", ['{"a":%s}', '{"input":[{"x":%s}]}', '{"input":[%s]}', '{"tools":%s}'])
def test_what_could_be_parsed_can_be_parsed(form: str, depth: int) -> None:
    raw = (form % ("[" * depth + " " + "]" * depth)).encode()
    try:
        before: Any = parse(raw)
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
    monkeypatch.setattr(q, "MARGIN", max(1, window // 4))
    chance = random.Random(seed)
    for raw in bodies(seed)[:150]:
        spans = q.read_request(raw)
        before = parse(raw)
        assert same(spans.request, before)
        assert spans.fields.keys() == before.keys()
        for name, (_, start, end) in spans.fields.items():
            assert same(parse(raw[start:end]), before[name])
        for item, start, end in zip(spans.items, spans.starts, spans.ends):
            assert item is q.NO_ITEM or same(parse(raw[start:end]), item)
        for _ in range(4):
            check(raw, changed(chance, spans.request), spans)
        assert same(spans.request, before)  # nothing above changed what was read


DAMAGE = (b"", b",", b"}", b"]", b'"', b"\\", b"\x80", b"\xf0", b"\0", b"\x1f", b"e", b".", b"N", b"1e999")


@pytest.mark.parametrize("seed", range(10))
def test_any_damage_is_judged_as_ever(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "WINDOW", 9)
    monkeypatch.setattr(q, "MARGIN", 2)
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


# -- what it costs ------------------------------------------------------------


@pytest.mark.parametrize("form", [b'{"model":"a","input":"%b"}', b'{"model":"a","input":[{"x":"%b"}]}'])
def test_a_long_string_takes_three_times_its_size(form: bytes, request: pytest.FixtureRequest) -> None:
    if "python" in request.node.callspec.params["scanner"]:
        pytest.skip("CPython's")
    size = 16 * 1024 * 1024
    raw = form % (b"x" * size)
    tracemalloc.start()
    try:
        spans = q.read_request(raw)
        changed = q.input_to_list({**spans.request, **ALIAS}, q.Context())  # a message, where it is a text
        written = q.write_request(changed, spans)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert json.loads(written) == changed
    assert peak + size <= 3.05 * size


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


class Watched(list):  # type: ignore[type-arg]
    """A list that tells how many of its items were deleted at a time."""

    def __init__(self, count: int) -> None:
        super().__init__(range(count))
        self.deleted: list[int] = []

    def __delitem__(self, key: Any) -> None:
        before = len(self)
        super().__delitem__(key)
        self.deleted.append(before - len(self))


class Piece(bytes):
    """Bytes that tell how many of them were taken at a time."""

    taken: list[int]

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        self.taken.append(len(part))
        return part


def test_a_large_body_is_joined_and_freed_in_steps() -> None:
    piece = Piece(b"x" * (2 * q.WINDOW + 5))
    piece.taken = []
    assert q.join_pieces([piece], q.LARGE_BODY) == piece
    assert piece.taken == [q.WINDOW, q.WINDOW, 5]  # other threads can run between two
    spans = q.Spans(b"", {"model": "a", "input": Watched(1200), "tools": None})
    changed = {"input": Watched(2), "tools": Watched(501), "messages": "none"}
    spans.items = Watched(1000)
    q.free_items(spans, changed, spans.request)
    freed = [spans.items, spans.request["input"], changed["input"], changed["tools"]]
    assert [(each, each.deleted) for each in freed] == [
        ([], [500, 500]), ([], [500, 500, 200]), ([], [2]), ([], [500, 1])]
    assert changed["messages"] == "none"


@pytest.mark.parametrize("size", [10, q.LARGE_BODY])
def test_pieces_are_joined_alike_in_one_step_and_in_many(size: int) -> None:
    long, exact = memoryview(b"x" * (2 * q.WINDOW + 1)), memoryview(b"y" * q.WINDOW)
    pieces: list[bytes | memoryview] = [b"{", long, b"", exact, b"}"]
    assert q.join_pieces(iter(pieces), size) == b"".join(pieces)


@pytest.mark.parametrize("text", ["h\\u00e9 \\/ \\ud83d\\ude00", "\\\"\\\"", "plain", "\\ud800"])
@pytest.mark.parametrize("size", [0, q.LONG_TEXT], ids=["short", "long"])
def test_a_text_that_becomes_a_message_goes_up_as_the_clients_own_bytes(text: str, size: int) -> None:
    own = b'"' + b"x" * size + text.encode() + b'"'
    raw = b'{"model":"m","instructions":%b , "input" : %b}' % (own, own)
    spans = q.read_request(raw)
    user, developer = (spans.request[name] for name in ("input", "instructions"))
    request = {"model": "m", "input": [
        q.message_item("developer", developer), q.message_item("user", user), {"text": None}, 5,
        {"content": [{"text": user, "type": "x"}]}, {"content": [{"text": user}], "id": 1}, {"content": []}]}
    written = q.write_request(request, spans)
    assert json.loads(written) == json.loads(json.dumps(request))
    assert written.count(b'"text":' + own) >= (2 if size else 0)
