"""Room rewriting: a changed request is written with the client's own bytes."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from help import ALIAS, check_written, parse_all, same

import qoo_bridge as q


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode so little at once that most values end in another window."""
    monkeypatch.setattr(q, "WINDOW", 7)
    monkeypatch.setattr(q, "ENCODED_PIECE", 3)


# -- a table ------------------------------------------------------------------


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
    assert same(spans.request, parse_all(body))
    request = {**spans.request, **changes}
    for name, value in changes.items():
        if value is None:
            del request[name]
        elif isinstance(value, list):
            read = spans.request[name]
            request[name] = [read[item] if isinstance(item, int) else item for item in value]
    assert check_written(body, request, spans).decode("utf-8") == written


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
    assert check_written(raw, request, spans) == (
        b'{"input":[{"type":"additional_tools","tools":[{"name": "a"},{"name": "c"},{"name":"new"}]},'
        b'{"role":"developer"},{"x": 1}, {"y": 2}]}')


def test_the_last_item_of_a_list_is_no_neighbour_of_the_next_list() -> None:
    raw = b'{"tools":[{"t":1}],"input":[{"a":1}]}'
    spans = q.read_request(raw)
    request = {"input": [*spans.request["tools"], *spans.request["input"]]}
    assert check_written(raw, request, spans) == b'{"input":[{"t":1},{"a":1}]}'


# -- what it costs ------------------------------------------------------------


@pytest.mark.parametrize("form", [b'{"model":"a","input":"%b"}', b'{"model":"a","input":[{"x":"%b"}]}'])
def test_a_long_string_takes_three_times_its_size(form: bytes) -> None:
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


@pytest.mark.parametrize("name", q.TEXT_FIELDS)
@pytest.mark.parametrize("last", ["null", "7", '"short"', "[]"])
def test_a_long_text_that_a_later_field_has_replaced_is_none_of_the_requests(name: str, last: str) -> None:
    long = json.dumps("x" * q.LONG_TEXT)
    raw = f'{{"{name}":{long},"{name}":{last},"messages":[{{"role":"system"}}]}}'.encode()
    spans = q.read_request(raw)
    for item in ({"role": "developer"}, {"content": [{"type": "input_text"}]},
                 {"content": [{"text": spans.request[name]}]}):
        check_written(raw, {**spans.request, "messages": [item]}, spans)
