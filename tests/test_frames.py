"""Room frames: the WebSocket codec, fed whole, byte by byte and at random cuts."""

from __future__ import annotations

import random
import struct
import time
import weakref
from typing import Any

import pytest

import qoo_bridge as q

MASK = b"\x37\xfa\x21\x3d"  # of the examples of RFC 6455, 5.7
LIMIT = 1 << 21
LENGTHS = (0, 1, 125, 126, 127, 65535, 65536, 1 << 20)
TEXT, BINARY, CONTINUATION = q.OP_TEXT, q.OP_BINARY, q.OP_CONTINUATION
PING, PONG, CLOSE = q.OP_PING, q.OP_PONG, q.OP_CLOSE


def whole(wire: Any) -> Any:
    return [wire]


def byte_by_byte(wire: Any) -> Any:
    return [wire[at : at + 1] for at in range(len(wire))]


def random_cuts(wire: Any) -> Any:
    cuts = sorted(random.Random(7).choices(range(len(wire) + 1), k=9))  # some of them equal: empty feeds
    return [wire[start:end] for start, end in zip([0, *cuts], [*cuts, len(wire)])]


@pytest.fixture(params=[whole, byte_by_byte, random_cuts], ids=lambda cut: cut.__name__)
def cut(request: Any) -> Any:
    return request.param


def read(pieces: Any, masked: Any = False, max_message: Any = LIMIT) -> Any:
    """Feed the pieces to a new reader; return the messages and the error."""
    reader = q.FrameReader(masked, max_message)
    messages = [message for piece in pieces for message in reader.feed(piece)]
    return messages, reader.error


def client_frames(*frames: Any) -> Any:
    return b"".join(q.encode_frame(opcode, payload, MASK, fin) for opcode, payload, fin in frames)


def server_frames(*frames: Any) -> Any:
    return b"".join(q.encode_frame(opcode, payload, None, fin) for opcode, payload, fin in frames)


def payload_of(size: Any) -> Any:
    return random.Random(size).getrandbits(8 * size).to_bytes(size, "little") if size else b""


# -- handshake ----------------------------------------------------------------


def test_accept_key_is_the_rfcs() -> None:
    assert q.accept_key("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


@pytest.mark.parametrize(
    ("key", "valid"),
    [
        ("dGhlIHNhbXBsZSBub25jZQ==", True),
        ("+/+/+/+/+/+/+/+/+/+/+w==", True),
        ("", False),
        ("dGhlIHNhbXBsZSBub25jZQ", False),  # no padding
        ("dGhlIHNhbXBsZSBub25jZQ==\n", False),
        (" dGhlIHNhbXBsZSBub25jZQ==", False),
        ("dGhlIHNhbXBsZSBub25jZTEx", False),  # 18 bytes
        ("dGhlIHNhbXBsZSBub25j", False),  # 15 bytes
        ("dGhlIHNhbXBsZSBub25jZ-==", False),  # the alphabet of URLs
        ("dGhlIHNhbXBsZSBub25j\u0660Q==", False),
    ],
)
def test_valid_key(key: Any, valid: Any) -> None:
    assert q.valid_key(key) is valid


@pytest.mark.parametrize(
    ("headers", "upgrade"),
    [
        ({"connection": "Upgrade", "upgrade": "websocket"}, True),
        ({"connection": "keep-alive, Upgrade", "upgrade": "WebSocket"}, True),
        ({"connection": "keep-alive,\tUPGRADE ,", "upgrade": "h2c, websocket"}, True),
        ({"connection": "keep-alive", "upgrade": "websocket"}, False),
        ({"connection": "upgraded", "upgrade": "websocket"}, False),
        ({"connection": "Upgrade", "upgrade": "h2c"}, False),
        ({"connection": "Upgrade"}, False),
        ({"upgrade": "websocket"}, False),
        ({}, False),
    ],
)
def test_is_upgrade(headers: Any, upgrade: Any) -> None:
    assert q.is_upgrade(headers) is upgrade


# -- frames out ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "wire"),
    [
        ((TEXT, b"Hello"), "810548656c6c6f"),
        ((TEXT, b"Hello", MASK), "818537fa213d7f9f4d5158"),
        ((TEXT, b"Hel", None, False), "010348656c"),
        ((CONTINUATION, b"lo"), "80026c6f"),
        ((PING, b"Hello"), "890548656c6c6f"),
        ((PONG, b"Hello", MASK), "8a8537fa213d7f9f4d5158"),
        ((CLOSE, b"", MASK), "888037fa213d"),
    ],
)
def test_encode_frame_is_the_rfcs(frame: Any, wire: Any) -> None:
    assert q.encode_frame(*frame).hex() == wire


@pytest.mark.parametrize(
    ("size", "head"),
    [
        (0, "8200"),
        (125, "827d"),
        (126, "827e007e"),
        (127, "827e007f"),
        (256, "827e0100"),
        (65535, "827effff"),
        (65536, "827f0000000000010000"),
    ],
)
def test_length_takes_the_shortest_form(size: Any, head: Any) -> None:
    assert q.encode_frame(BINARY, bytes(size)) == bytes.fromhex(head) + bytes(size)


@pytest.mark.parametrize("size", [*range(9), *range(4094, 4101), 65537])  # MASK_BY_TABLE_BYTES is 4096
def test_mask_is_that_of_the_rfc_and_its_own_inverse(size: Any) -> None:
    payload = payload_of(size)
    masked = q.apply_mask(payload, MASK)
    assert masked == bytes(byte ^ MASK[at % 4] for at, byte in enumerate(payload))
    assert q.apply_mask(masked, MASK) == payload


# -- frames in ----------------------------------------------------------------


@pytest.mark.parametrize("size", LENGTHS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_length_class(cut: Any, masked: Any, size: Any) -> None:
    payload = payload_of(size)
    wire = q.encode_frame(BINARY, payload, MASK if masked else None)
    after = q.encode_frame(PING, b"after", MASK if masked else None)
    assert read(cut(wire + after), masked) == (
        [q.Message(BINARY, payload), q.Message(PING, b"after")],
        None,
    )


def test_fragments_become_one_message_and_control_frames_pass_between(cut: Any) -> None:
    frames = (
        (TEXT, b"gr\xc3", False),
        (PING, b"1", True),
        (CONTINUATION, b"", False),
        (PONG, b"", True),
        (PING, b"2", True),
        (CONTINUATION, b"\xbcn", True),
        (BINARY, b"\xff", True),
        (BINARY, b"\xfe", False),
        (CONTINUATION, b"", True),
    )
    messages = [
        q.Message(PING, b"1"),
        q.Message(PONG, b""),
        q.Message(PING, b"2"),
        q.Message(TEXT, b"gr\xc3\xbcn"),
        q.Message(BINARY, b"\xff"),
        q.Message(BINARY, b"\xfe"),
    ]
    assert read(cut(client_frames(*frames)), masked=True) == (messages, None)
    assert read(cut(server_frames(*frames))) == (messages, None)


def test_control_frame_is_out_before_the_rest_of_its_surroundings() -> None:
    reader = q.FrameReader(masked=True, max_message=LIMIT)
    assert reader.feed(client_frames((TEXT, b"a", False))) == []
    assert reader.feed(client_frames((PING, b"?", True))) == [q.Message(PING, b"?")]
    assert reader.feed(client_frames((CONTINUATION, b"b", True))) == [q.Message(TEXT, b"ab")]


def test_empty_text_and_a_text_of_the_largest_code_points(cut: Any) -> None:
    text = "\0\x7f\x80\u07ff\u0800\ufffd\uffff\U00010000\U0010ffff".encode()
    messages, error = read(cut(client_frames((TEXT, b"", True), (TEXT, text, True))), masked=True)
    assert ([message.payload for message in messages], error) == ([b"", text], None)


def test_message_of_the_limit_passes(cut: Any) -> None:
    fragments = (BINARY, bytes(400), False), (CONTINUATION, bytes(600), True)
    wire = client_frames((BINARY, bytes(1000), True), *fragments)
    messages, error = read(cut(wire), masked=True, max_message=1000)
    assert ([len(message.payload) for message in messages], error) == ([1000, 1000], None)


def test_control_frames_do_not_count_towards_the_limit() -> None:
    wire = client_frames((BINARY, b"123", False), (PING, bytes(125), True), (CONTINUATION, b"4", True))
    messages, error = read([wire], masked=True, max_message=4)
    assert ([message.opcode for message in messages], error) == ([PING, BINARY], None)


# -- breaches -----------------------------------------------------------------

SERVER_BREACHES = [
    ("first reserved bit", "c100", 1002),
    ("second reserved bit", "a100", 1002),
    ("third reserved bit", "9100", 1002),
    ("reserved bit of a control frame", "c900", 1002),
    *((f"opcode {opcode:#x}", f"8{opcode:x}00", 1002) for opcode in (3, 4, 5, 6, 7, 0xB, 0xC, 0xD, 0xE, 0xF)),
    ("fragmented ping", "0900", 1002),
    ("fragmented close", "0800", 1002),
    ("control frame of 126 bytes", "897e007e" + "00" * 126, 1002),
    ("control frame with a 64-bit length", "8a7f0000000000010000", 1002),
    ("125 in 16 bits", "817e007d", 1002),
    ("0 in 16 bits", "827e0000", 1002),
    ("65535 in 64 bits", "827f000000000000ffff", 1002),
    ("0 in 64 bits", "827f0000000000000000", 1002),
    ("64-bit length with the top bit", "827f8000000000000000", 1002),
    ("64-bit length of all ones", "827fffffffffffffffff", 1002),
    ("largest 64-bit length", "827f7fffffffffffffff", 1009),
    ("over the limit", "827f0000000000200001", 1009),
    ("over the limit in fragments", "020100" + "807f0000000000200000", 1009),
    ("continuation without a start", "8000", 1002),
    ("continuation after a whole message", "810161" + "0000", 1002),
    ("continuation after the last fragment", "010161" + "8000" + "8000", 1002),
    ("text within a fragmented message", "010161" + "8100", 1002),
    ("binary start within a fragmented message", "010161" + "0200", 1002),
    ("masked", "818037fa213d", 1002),
    ("text of a lone continuation byte", "810180", 1007),
    ("text that ends within a character", "8102e282", 1007),
    ("text of an overlong form", "8102c080", 1007),
    ("text of a surrogate", "8103eda080", 1007),
    ("text beyond U+10FFFF", "8104f4908080", 1007),
    ("fragments that are not UTF-8 together", "0101e2" + "000182" + "800141", 1007),
    ("close of one byte", "880103", 1002),
    ("close with a reason that is not UTF-8", "880303e8ff", 1007),
]
BAD_CLOSE_CODES = (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
GOOD_CLOSE_CODES = (*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999)


@pytest.mark.parametrize(
    ("wire", "code"),
    [row[1:] for row in SERVER_BREACHES],
    ids=[row[0] for row in SERVER_BREACHES],
)
def test_breach_keeps_what_came_before_and_reads_nothing_after(cut: Any, wire: Any, code: Any) -> None:
    before = server_frames((TEXT, b"{}", True), (PING, b"p", True))
    reader = q.FrameReader(masked=False, max_message=LIMIT)
    messages = [message for piece in cut(before + bytes.fromhex(wire)) for message in reader.feed(piece)]
    assert messages[:2] == [q.Message(TEXT, b"{}"), q.Message(PING, b"p")]
    assert reader.error is not None and reader.error.code == code
    assert reader.feed(server_frames((PING, b"late", True))) == []


@pytest.mark.parametrize("opcode", [TEXT, BINARY, PING, CLOSE])
def test_client_frame_without_a_mask_is_refused(cut: Any, opcode: Any) -> None:
    messages, error = read(cut(q.encode_frame(opcode, b"")), masked=True)
    assert (messages, error and error.code) == ([], 1002)


def test_length_over_the_limit_is_refused_from_the_head_alone() -> None:
    reader = q.FrameReader(masked=False, max_message=1000)
    assert reader.feed(b"\x82\x7e\x03") == []
    assert reader.error is None
    reader.feed(b"\xe9")
    assert reader.error is not None and reader.error.code == 1009


def test_empty_fragments_hold_nothing() -> None:
    wire = server_frames((TEXT, b"", False)) + server_frames((CONTINUATION, b"", False)) * 1000
    reader = q.FrameReader(masked=False, max_message=1)
    assert (reader.feed(wire), reader.error) == ([], None)
    assert reader.feed(server_frames((CONTINUATION, b"x", True))) == [q.Message(TEXT, b"x")]


def test_utf8_is_checked_on_text_only() -> None:
    assert read([server_frames((BINARY, b"\xff", True), (PING, b"\xff", True))])[1] is None


# -- close --------------------------------------------------------------------


@pytest.mark.parametrize("code", GOOD_CLOSE_CODES)
def test_close_round_trip(cut: Any, code: Any) -> None:
    wire = client_frames((CLOSE, q.close_payload(code, "tsch\u00fc\u00df"), True))
    (message,), error = read(cut(wire), masked=True)
    assert (q.parse_close(message.payload), error) == ((code, "tsch\u00fc\u00df"), None)


@pytest.mark.parametrize("code", BAD_CLOSE_CODES)
def test_code_that_may_not_be_sent_is_refused(cut: Any, code: Any) -> None:
    messages, error = read(cut(server_frames((CLOSE, struct.pack("!H", code), True))))
    assert (messages, error and error.code) == ([], 1002)


def test_close_without_a_code() -> None:
    assert q.close_payload(q.CLOSE_NO_STATUS, "unsaid") == b""
    assert q.parse_close(b"") == (q.CLOSE_NO_STATUS, "")
    assert read([server_frames((CLOSE, b"", True))]) == ([q.Message(CLOSE, b"")], None)


def test_nothing_is_read_after_a_close_frame(cut: Any) -> None:
    close = (CLOSE, q.close_payload(1000), True)
    wire = server_frames((TEXT, b"a", False), close, (CONTINUATION, b"b", True), (PING, b"", True))
    messages, error = read(cut(wire + bytes.fromhex("ffff")))
    assert ([message.opcode for message in messages], error) == ([CLOSE], None)


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("x" * 200, "x" * 123),
        ("\u20ac" * 60, "\u20ac" * 41),
        ("x" + "\u20ac" * 60, "x" + "\u20ac" * 40),  # 121 bytes: the next character would not be whole
        ("a\ud800b", "a?b"),
    ],
)
def test_close_reason_is_cut_to_fit(reason: Any, kept: Any) -> None:
    payload = q.close_payload(1011, reason)
    assert len(payload) <= q.MAX_CONTROL_BYTES
    assert q.parse_close(payload) == (1011, kept)


# -- hostile and slow ---------------------------------------------------------


def test_any_bytes_are_read_alike_however_they_are_cut() -> None:
    dice = random.Random(6455)
    for _ in range(2000):
        masked = dice.random() < 0.5
        wire = b""
        for _ in range(dice.randrange(1, 6)):
            frame = q.encode_frame(
                dice.choice((TEXT, TEXT, BINARY, CONTINUATION, CONTINUATION, PING, PONG, CLOSE)),
                dice.choice((b"", b"a", b"\xff", b"\xc3\xa9", bytes(126), q.close_payload(1000))),
                MASK if masked else None,
                dice.random() < 0.6,
            )
            wire += frame
        if dice.random() < 0.3:
            at = dice.randrange(len(wire))
            wire = wire[:at] + dice.randbytes(2) + wire[at:]
        results = []
        for cut in (whole, byte_by_byte, random_cuts):
            messages, error = read(cut(wire), masked, max_message=200)
            results.append((messages, error and (error.code, str(error))))
        assert results[0] == results[1] == results[2], wire.hex()


@pytest.mark.parametrize("wire", ["c100", "8101ff"])
def test_reader_with_an_error_is_freed_at_once(wire: Any) -> None:
    reader = q.FrameReader(masked=False, max_message=LIMIT)
    reader.feed(bytes.fromhex(wire))
    assert reader.error is not None
    alive = weakref.ref(reader)
    del reader
    assert alive() is None


def test_time_grows_with_the_size_however_small_the_pieces() -> Any:
    def seconds(size: Any) -> Any:
        pieces = byte_by_byte(q.encode_frame(BINARY, bytes(size), MASK))
        start = time.process_time()
        assert len(read(pieces, masked=True)[0]) == 1
        return time.process_time() - start

    # Eight times the bytes; quadratic time would be 64 times as long.
    assert seconds(1 << 20) < 30 * seconds(1 << 17)
