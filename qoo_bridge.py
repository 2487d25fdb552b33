#!/usr/bin/env python3
"""Let every machine on a LAN use the ChatGPT plan of the one host that is signed in.

Copy this file to a host where `codex` is signed in with ChatGPT, run `python3 qoo_bridge.py`, and Codex CLI
or any OpenAI client on another machine works through http://<host>:4050/v1. Standard library only.

What it is trusted with. It reads $CODEX_HOME/auth.json (by default ~/.codex/auth.json). It sends the access
token only to the configured upstream, or to a sub-domain of that host which account routing names, and the
refresh token only to the sign-in server. It opens no other connection; `doctor` and `litellm-config` ask this
host's own bridge. It writes auth.json (by .auth-<random> beside it, under auth.lock), bridge.log and
bridge.log.1. It never logs or shows a token, a header value or a body. Read parts A and B, and you have read
every line that can touch your token: tests/kernel.py has the table of what each room may do, one test holds
the source to it and one watches the running suite. `demo` signs in with made-up tokens in its own folder.
`WIRE n` and `DESIGN` in comments are the developers' notes on what the peers do; they are not published.

The path of one request:

    accept -> access (network, Host, Origin, key) -> route -> read the body (bounded)
      -> [chat -> Responses] -> normalize -> Account.open                401: re-read or refresh, once
                                                                         known refusals: repaired, each once
      -- first byte to the client: from here the status cannot change --
      -> relay: each event at once; silence is filled; the terminal event ends the reply; a cut stays visible
      -> one log line

Five parts and their rooms; each room uses only the rooms above it:

    A words                 pure: no I/O, no clock
         1  constants       routes, limits, names
         2  errors          one class for each status
         3  json            untrusted JSON: any value can have any type
         4  spans           a request and the client's own bytes of each value
         5  rewriting       a changed request -> bytes, the client's own where nothing changed
         6  refusals        upstream's refusal -> the client's error
         7  http            heads and bodies as bytes; addresses
         8  options         one table -> argparse, environment, --help; a frozen Config
    B the trust kernel      the only code that opens a connection or holds a token
         9  sockets         connected sockets, never blocking
        10  upstream        opens connections: pool, TLS, proxy
        11  sign-in         auth.json: read, refresh, write
        12  login           the device sign-in
        13  account         account routing
    C rules                 pure, but codings may load libzstd
        14  items           what rules share; rules for single items; an estimate of tokens
        15  forms           the lite and the plain form; tools
        16  normalize       request -> request, by named rules
        17  repairs         a refusal's text -> a changed context
        18  chat requests   Chat Completions request -> Responses request
        19  chat answers    Responses events -> Chat Completions chunks
        20  codings         gzip, deflate, zstd
        21  fields          which headers are forwarded; the client's identity
        22  events          what an event says; events -> one response
        23  outputs         upstream's bytes -> events -> the client's bytes
        24  frames          WebSocket frame codec
        25  access          which clients are admitted
    D the bridge            one request from accept to its log line
        26  catalog         the live model list and the aliases
        27  telemetry       counters, recent requests, the log line
        28  log             standard error and bridge.log
        29  store           conversations for previous_response_id
        30  admission       limits: body memory, requests per key; the keys
        31  exchange        one client request and its response; the relay
        32  dialects        the APIs: Responses, Chat Completions, legacy completions
        33  turns           model requests, sent until upstream accepts them
        34  in flight       what a WebSocket holds beside its frames
        35  websockets      frames both ways
        36  pages           the status page
        37  client config   what a client pastes or saves
        38  routes          path -> handler
        39  server          threads, their limit, drain, shutdown
    E commands              the command line; only this part prints
        40  commands        serve, client-config, new-key, login, litellm-config
        41  doctor          checks of every step between this host and a reply
        42  demo            the bridge with a built-in stand-in backend
        43  main            the command line
"""
from __future__ import annotations

import argparse
import base64
import binascii
import calendar
import contextlib
import enum
import errno
import functools
import hashlib
import hmac
import http.client
import http.server
import ipaddress
import json
import logging
import math
import operator
import os
import queue
import re
import select
import shlex
import signal
import socket
import socketserver
import ssl
import stat
import struct
import sys
import threading
import time
import traceback
import urllib.parse
import zlib
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

if sys.version_info < (3, 9):  # noqa: UP036  # before the first line that would be a riddle there
    sys.exit("qoo_bridge.py needs Python 3.9 or newer, and this is Python {}.{}".format(*sys.version_info))

__version__ = "1.0.0"


###############################################################################
# A  words
# May enter: any bytes, JSON or text. All of it is hostile until it is checked here.
# May not leave: anything unchecked. No I/O, no clock; the only secrets here are the clients' own keys.
###############################################################################


# == 1 constants ==============================================================
# Routes, limits and names, each with its unit and its source.

CODEX_VERSION = "0.169.0"  # for clients that are not Codex: the backend gates models by it (WIRE 3)
AUTH_CLAIM = "https://api.openai.com/auth"  # the claim object of the tokens
USER_AGENT = f"qoo_bridge/{__version__} (https; python)"  # for clients that are not Codex: the truth

MAX_HEAD = 64 * 1024  # bytes of one request's or reply's head; Codex's is 3 KB
MAX_HEADERS = 200  # headers in one head
MAX_TARGET = 4096  # bytes of a request target
MAX_EVENT = 64 * 1024 * 1024  # bytes of one server-sent event; an image event is some MB
MAX_ERROR_BODY = 256 * 1024  # bytes read of an upstream refusal
MAX_REPLY = 16 * 1024 * 1024  # bytes of one small JSON reply: catalogue, tokens, usage
MAX_BODIES = 1024 * 1024 * 1024  # bytes of request bodies in memory at once, over all requests
STORE_SIZE = 64 * 1024 * 1024  # bytes of conversations kept for previous_response_id
LAST_REQUESTS_SIZE = 64 * 1024 * 1024  # bytes of memory for conversations' last requests, parsed
COMPRESS_FROM = 16 * 1024  # bytes; a request body of this size or more is sent compressed
READ_SIZE = 64 * 1024  # bytes of one read
ERROR_BODY_SECONDS = 15  # for upstream to send a refusal's body
SEND_SIZE = 256 * 1024  # bytes of one write: TLS reports progress only when it has sent all of them
LARGE_READ_BYTES = 4 * 1024  # bytes of one TLS record; behind a record this large, more is likely waiting

HEAD_TIMEOUT = 20  # seconds for a client to send a request's head, from its first byte on
BODY_STALL = 20  # seconds in which a body must gain BODY_RATE bytes a second on average
BODY_RATE = 1024  # bytes per second: slower senders are cut
IDLE_CLIENT = 120  # seconds that a client's connection may stay silent between requests
WRITE_TIMEOUT = 60  # seconds in which a client must accept at least one byte
POOL_IDLE = 90  # seconds that an unused upstream connection is kept; well below Cloudflare's own limit
POOL_SIZE = 64  # unused upstream connections kept at once
DRAIN_SECONDS = 30  # seconds that running streams get to end after SIGTERM
HEAD_WAITS = 0.001  # seconds that a stream's head waits for the stream's first piece; both are sent together
AFTER_TERMINAL = 0.1  # seconds from the terminal event to the body's end, for the connection to be reused

TOKEN_MARGIN = 300  # seconds before expiry at which a token is refreshed; as Codex does (WIRE 2)
TOKEN_AGE = 8 * 86400  # seconds from last_refresh to expiry, if a token's expiry is unreadable (WIRE 2)
REFRESH_PAUSE = 1  # seconds before the retry of a refresh that failed for a temporary reason
AHEAD_PAUSE_SECONDS = 60  # seconds before that retry while the old token has more than URGENT_SECONDS left
URGENT_SECONDS = 30  # seconds before expiry; from then on a request waits for another thread's refresh
LOCK_SECONDS = 5  # seconds of attempts to lock auth.lock; as Codex does (WIRE 2)
KEEPALIVE_IDLE = 15  # seconds of silence on a TCP connection before the system asks whether it is alive
KEEPALIVE_INTERVAL = 5  # seconds between two such questions
KEEPALIVE_PROBES = 3  # unanswered questions after which a connection is dead
USER_TIMEOUT_MS = 10_000  # milliseconds in which sent bytes must be acknowledged (Linux; elsewhere seconds)
NEXT_ADDRESS_SECONDS = 0.3  # after which a host's next address is tried, as curl and Codex do
CLOCK_GAP = 5  # seconds by which the two clocks may part before the host counts as having slept
LARGE_BODY = 1024 * 1024  # bytes; bodies of this size or more are parsed one at a time
COUNTED_BODY = 16 * 1024  # bytes of a JSON body above which what parsing makes of it counts as well
COUNTED_PIECE = 256 * 1024  # bytes of a body that are counted at once
WORST_PARSED = 80  # bytes of memory that a byte of JSON can take, see `parsed_size`
MAX_HOST = 300  # characters of a Host header that can name this bridge
UNANSWERED_PINGS = 3  # after which one side of a WebSocket is dead
BACKGROUND_POLL = 0.005  # seconds between two looks at a call in the background
TIDY_SECONDS = 5  # between two rounds of closing dead connections and writing unsaved tokens
SAVE_PAUSE = 5  # seconds before refreshed tokens that could not be written are written again
REFRESH_SECONDS = 35  # that a refresh takes at most: the end of the program waits for it
REUSED_SECONDS = 2  # after a final refusal, in which another program may write the tokens that it got
REPLACE_SECONDS = 1  # of tries to replace a file that another program has open (Windows)
TOKEN_TRUST = 1800  # seconds in which a token just received is not refreshed, whatever the clock says
NOT_REPLACEABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)  # but perhaps writable
TORN_SECONDS = 0.3  # seconds in which another program may finish writing auth.json
ROUTING_AGE = 3600  # seconds between two requests for the account's routing
CATALOG_AGE = 300  # seconds after which the model list is fetched again
CATALOG_WAIT = 5  # seconds that a request waits for the first model list, at most

LOG_SIZE = 10 * 1024 * 1024  # bytes of bridge.log before it is rotated; one old file is kept

LITE_HEADER = "x-openai-internal-codex-responses-lite"
LITE_METADATA = "ws_request_header_x_openai_internal_codex_responses_lite"  # for WebSockets (WIRE 6)
WEBSOCKET_BETA = "responses_websockets=2026-02-06"

PUBLIC = frozenset(("/healthz", "/"))  # paths that need no key: their responses show nothing of the plan
USAGE_PATH = "/backend-api/wham/usage"  # the plan's limits, and whose account it is
# Paths forwarded with this host's sign-in (exact match): bridge path -> method, upstream path. An upstream
# path that begins with `/backend-api/` is at the upstream's origin, others are below its path (DESIGN).
SIDE_ROUTES = {
    "/responses/compact": ("POST", "/responses/compact"),
    "/alpha/search": ("POST", "/alpha/search"),
    "/images/generations": ("POST", "/images/generations"),
    "/images/edits": ("POST", "/images/edits"),
    "/memories/trace_summarize": ("POST", "/memories/trace_summarize"),
    "/backend-api/wham/usage": ("GET", USAGE_PATH),
    "/api/codex/usage": ("GET", USAGE_PATH),
}

# Fields that the backend refuses by name (WIRE 4). The bridge learns newer ones from the refusals.
UNSUPPORTED = frozenset((
    "background", "context_management", "max_completion_tokens", "max_output_tokens", "max_tokens",
    "max_tool_calls", "metadata", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    "stream_options",
    "temperature", "top_p", "truncation", "user",
))
NEVER_DROPPED = frozenset((  # without them a request has no meaning, or another one
    "model", "input", "stream", "store", "type", "generate", "previous_response_id", "tools", "instructions",
))
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")  # lowest first

ID_PREFIXES = {  # of item types; WIRE 4
    "message": "msg_", "reasoning": "rs_", "function_call": "fc_", "function_call_output": "fco_",
    "custom_tool_call": "ctc_", "additional_tools": "at_", "compaction": "cmp_",
}
MAX_ID = 64  # characters of an item id or a call id
MAX_CACHE_KEY = 64  # characters of prompt_cache_key
MAX_CONVERSATIONS = 4096  # names of conversations kept in memory
IMAGE_TOKENS = 1100  # tokens of an image in an estimate; a large one costs about this
FAILURE_WAIT = 2  # seconds that an `error` frame without a status waits for upstream's response.failed
MAX_FRAME = 16 * 1024 * 1024  # bytes at which the backend closes a WebSocket for a message (WIRE 6)

TERMINAL_EVENTS = frozenset(("response.completed", "response.failed", "response.incomplete"))
STORED_EVENTS = ("response.completed", "response.incomplete")  # a later request may continue these

LOOPBACK = ("localhost", "127.0.0.1", "::1")

log = logging.getLogger("qoo_bridge")


CLIENT_ID = "app_EMoamEEZ73f0CkXaXp7hrann"  # Codex's own OAuth client, to which auth.json belongs (WIRE 2)


VISIBLE_ASCII = re.compile(r"[\x21-\x7e]+")
HEADER_WORD = re.compile(r"[\x21-\x7e]{1,128}")  # a value that is safe in a header


DEVICE_SECONDS = 15 * 60  # for a person to type the code


POLL_SECONDS = 5.0  # between two polls, if the server names no interval


FINAL_REFUSALS = ("refresh_token_expired", "refresh_token_reused", "refresh_token_invalidated")  # WIRE 2


ROUTING_PATH = "/backend-api/wham/accounts/check"  # WIRE 2


UNREAD = object()  # the signature of a file that must be read at its next use


# == 2 errors =================================================================
# An error's class is its status. A message says what came and what was expected, never a secret.

class BridgeError(Exception):
    """Base class of errors that become an HTTP error response: a status, a code, a message."""

    status = 500
    code = "internal_error"
    type = "server_error"
    by = "bridge"  # the error's source, for x-qoo-bridge-error: bridge or upstream
    always_sends: Mapping[str, str] = {}  # headers of every response with this error

    def __init__(self, message: str, param: str | None = None, **headers: object) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
        self.headers = {**self.always_sends, **named}

    def body(self) -> dict[str, Any]:
        """Return the OpenAI-shaped error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(BridgeError):
    """The endpoint does not accept the request."""

    status, code, type = 400, "invalid_request", "invalid_request_error"


class MalformedHttp(InvalidRequest):
    """The bytes are not valid HTTP/1.1; the connection closes after the response."""

    code = "malformed_http"


class NotSignedIn(BridgeError):
    """This host has no usable ChatGPT sign-in."""

    status, code, type = 401, "not_signed_in", "authentication_error"


class BadUpstream(BridgeError):
    """Upstream is unreachable, closed the connection, or sent an invalid reply."""

    status, code, type = 502, "upstream_error", "upstream_error"


class UpstreamTimeout(BridgeError):
    """Upstream did not reply in time."""

    status, code, type = 504, "upstream_timeout", "upstream_error"


class InvalidKey(BridgeError):
    """The client's key is missing or unknown."""

    status, code, type = 401, "invalid_api_key", "authentication_error"
    always_sends: Mapping[str, str] = {"www-authenticate": 'Bearer realm="qoo-bridge"'}


class MissingKey(InvalidKey):
    """The client sent no key."""


class Forbidden(BridgeError):
    """The client's network, Host or Origin may not use this bridge."""

    status, code, type = 403, "forbidden", "permission_error"


class NotFound(InvalidRequest):
    """The path, model or response does not exist."""

    status, code = 404, "not_found"


class MethodNotAllowed(InvalidRequest):
    """The path does not accept this method."""

    status, code = 405, "method_not_allowed"


class SlowRequest(MalformedHttp):
    """The request did not arrive in time."""

    status, code = 408, "request_timeout"


class BodyTooLarge(MalformedHttp):
    """The body is above --max-body."""

    status, code = 413, "body_too_large"


class TargetTooLong(MalformedHttp):
    """The request target is above MAX_TARGET."""

    status, code = 414, "target_too_long"


class UnsupportedEncoding(InvalidRequest):
    """The body has a Content-Encoding that this bridge cannot decode."""

    status, code = 415, "unsupported_encoding"


class UpgradeRequired(InvalidRequest):
    """The bridge cannot accept the WebSocket handshake; Codex then falls back to HTTP (WIRE 6)."""

    status, code = 426, "upgrade_required"
    always_sends: Mapping[str, str] = {  # RFC 9110, 15.5.22 and 7.8
        "sec-websocket-version": "13", "upgrade": "websocket", "connection": "Upgrade"}


class TooManyRequests(BridgeError):
    """The client's key has too many requests running and waiting."""

    status, code, type = 429, "too_many_requests", "rate_limit_error"


class HeadTooLarge(MalformedHttp):
    """The head is above MAX_HEAD or MAX_HEADERS."""

    status, code = 431, "head_too_large"


class UnknownCoding(MalformedHttp):
    """The method or the Transfer-Encoding is not implemented."""

    status, code = 501, "not_implemented"


class Overloaded(BridgeError):
    """This bridge has no capacity for one more connection or body."""

    status, code = 503, "bridge_overloaded"


class VersionNotSupported(MalformedHttp):
    """The request is neither HTTP/1.0 nor HTTP/1.1."""

    status, code = 505, "http_version_not_supported"


# How a request can end: the values of the log's `end=`. The first three are upstream's words.
ENDS = ("completed", "incomplete", "failed", "error", "cut", "client_closed", "client_stalled")


class ClientLeft(Exception):
    """The client closed its connection. The message is one of ENDS, for the log."""


def describe_error(exc: BaseException) -> str:
    """Describe an exception in a few words, for a person."""
    if isinstance(exc, BridgeError):
        return exc.message
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"untrusted certificate: {exc.verify_message}"
    if isinstance(exc, OSError) and exc.strerror:
        if exc.errno != errno.ECONNRESET:
            return exc.strerror.lower()
        return "connection reset"
    return str(exc) or type(exc).__name__


# == 3 json ===================================================================
# Untrusted JSON: any value can have any type. (pure)

T = TypeVar("T")


def or_empty(value: Any, kind: type[T]) -> T:
    """Return `value` if it is a `kind`, else an empty `kind`."""
    if isinstance(value, kind):
        return value
    return kind()


def dicts_in(value: Any) -> list[dict[str, Any]]:
    """Return the JSON objects in a list; [] if `value` is not a list."""
    return [entry for entry in or_empty(value, list) if isinstance(entry, dict)]


def finite_number(value: Any) -> float | None:
    """Return an int or float with abs < 1e12; None otherwise, also for bools."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and -1e12 < value < 1e12:
        return value
    return None


def reject_constant(name: str) -> NoReturn:
    """Reject NaN and Infinity, which Python's json accepts. Raises ValueError."""
    raise ValueError(f"{name} is not a JSON number")


def finite_float(digits: str) -> float:
    """Parse a finite number, which JSON can write again. Raises ValueError for 1e999."""
    number = float(digits)
    if abs(number) < float("inf"):
        return number
    return reject_constant(digits[:40])


UPSTREAM_DECODER = json.JSONDecoder(parse_constant=reject_constant, parse_float=finite_float)


def json_or_none(text: str | bytes) -> Any:
    """Parse upstream's JSON; return None for invalid JSON, NaN and Infinity."""
    try:
        return UPSTREAM_DECODER.decode(text if isinstance(text, str) else text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


CLIENT_DECODER = json.JSONDecoder(parse_constant=reject_constant)


def parsed_size(body: bytes) -> int:
    """Estimate the bytes of memory that a JSON body takes with what parsing makes of it, from above.

    Measured on 3.9 to 3.13. In pieces: no other thread runs while bytes are counted.
    """
    size = (5 if body.isascii() else 11) * len(body)  # the bytes, their text, the strings in it, what goes up
    for at in range(0, len(body), COUNTED_PIECE):
        piece = body[at:at + COUNTED_PIECE]
        size += 64 * piece.count(b"[") + 160 * piece.count(b"{") + 28 * piece.count(b'"')
        size += 40 * piece.count(b",") + 90 * piece.count(b":")
    return size


def memory_of(values: Iterable[Any], limit: int) -> int:
    """Estimate the bytes of memory that parsed values take, from above; stop counting beyond `limit`.

    Measured on 3.9 to 3.13, like `parsed_size`, which knows less and is faster.
    """
    size, waiting = 0, list(values)
    while waiting and size <= limit:
        value = waiting.pop()
        if isinstance(value, str):
            size += 64 + len(value) if value.isascii() else 80 + 4 * len(value)
        elif isinstance(value, dict):
            size += 232 + 60 * len(value)
            waiting += value
            waiting += value.values()
        elif isinstance(value, list):
            size += 120 + 9 * len(value)
            waiting += value
        elif isinstance(value, int):
            size += 40 + value.bit_length() // 7
        else:
            size += 40
    return size


def parse_json(body: bytes) -> Any:
    """Parse a request body as strict UTF-8 JSON. Raises InvalidRequest."""
    try:
        parsed = CLIENT_DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise InvalidRequest("the body is not UTF-8") from exc
    except RecursionError as exc:
        raise InvalidRequest("the body is nested too deeply") from exc
    except ValueError as exc:
        raise InvalidRequest(f"the body is not JSON: {exc}"[:300]) from exc
    return parsed


TEXT_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
ASCII_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def json_bytes(value: Any) -> bytes:
    """Encode as JSON in UTF-8; in ASCII if a lone surrogate has no UTF-8 form.

    Raises ValueError for NaN and Infinity.
    """
    try:
        return TEXT_ENCODER.encode(value).encode("utf-8")
    except UnicodeEncodeError:
        return ASCII_ENCODER.encode(value).encode("ascii")


JSON_TYPES = {
    type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string",
    list: "a list", dict: "an object",
}


def json_type_name(value: Any) -> str:
    """Return the JSON name of a value's type."""
    return JSON_TYPES[type(value)]


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return a copy of an object without some fields; the same object if it has none of them."""
    if fields.keys().isdisjoint(names):
        return fields
    return {key: value for key, value in fields.items() if key not in names}


ANY_TYPE = object()


def drop_path(value: Any, path: tuple[str, ...], empties: bool = False, part_type: Any = ANY_TYPE) -> Any:
    """Return a copy of nested objects without the field at `path`; the same object if nothing changes.

    A list on the way means each of its entries. With `empties` the field becomes an empty list. With a
    `part_type`, only objects of that `type` lose it.
    """
    if isinstance(value, list):
        entries = [drop_path(entry, path, empties, part_type) for entry in value]
        return entries if any(map(operator.is_not, entries, value)) else value
    if not isinstance(value, dict):
        return value
    if len(path) > 1:
        inner = drop_path(value.get(path[0]), path[1:], empties, part_type)
        return value if inner is value.get(path[0]) else {**value, path[0]: inner}
    if part_type is not ANY_TYPE and value.get("type") != part_type:
        return value
    if not empties:
        return without(value, path[0])
    return value if value.get(path[0]) == [] else {**value, path[0]: []}


def visible_ascii(value: Any) -> str:
    """Return a text that is valid in a header; "" for anything else."""
    if isinstance(value, str) and VISIBLE_ASCII.fullmatch(value):
        return value
    return ""


def escape_unprintable(text: str) -> str:
    """Escape control characters, line ends and text directions, which would act on a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str) -> str:
    """Return a text without the characters that would end or hide a line: U+FFFD stands for each."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def jwt_claims(token: Any) -> dict[str, Any]:
    """Return a JWT's payload; {} for anything else. Upstream checks the signature, not this bridge."""
    parts = or_empty(token, str).split(".")
    if len(parts) != 3:
        return {}
    try:
        return or_empty(json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))), dict)
    except (ValueError, RecursionError, binascii.Error):
        return {}


def unix_time(text: Any) -> float:
    """Return an RFC 3339 time, such as auth.json's last_refresh, in Unix seconds; 0 for anything else."""
    match = re.match(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)", or_empty(text, str), re.ASCII)
    try:
        return float(calendar.timegm(tuple(map(int, match.groups())))) if match else 0.0
    except (ValueError, OverflowError):
        return 0.0


# == 4 spans ==================================================================
# The place of each value in a request's body: what no rule changed is sent as the client's own bytes. (pure)
# A value is unchanged if it is the very object that was read: a rule must never modify its argument.
# What is the same in a conversation's last request is not parsed again: both requests share the values.

WINDOW = 256 * 1024  # bytes of a body that are decoded at once
SMALL_WINDOW = 4 * 1024  # bytes, where most of what follows may be as in the last request
ENCODED_PIECE = 64 * 1024  # characters that are encoded at once
TEXT_FIELDS = ("input", "instructions")  # their texts can become messages
LONG_TEXT = 4096  # characters; from here on such a text is not encoded again
MAX_PLACES = 100_000  # fields and items of a body, about; a body with more is parsed at once, without places
MAX_KNOWN_FIELDS = 100  # of a last request; each new field is looked for among them
ITEM_LISTS = ("input", "messages", "tools")  # read and written item by item
VALUE_ENDS = frozenset(" \t\n\r,:]}")  # characters that can follow a value
VALUE_END_BYTES = frozenset(char.encode() for char in VALUE_ENDS)
PLACE_BYTES = 100  # of memory that the place of an item takes; of a field it is four times as many
NOT_READ = range(-1, -1)  # the indexes of a list that the body does not have
NO_ITEM = object()  # follows each list's items: the next list's are not their neighbours
WHITE_SPACE = re.compile(r"[ \t\n\r]*")


class Spans:
    """A parsed request, and the place in its body of each field and of each item of ITEM_LISTS."""

    def __init__(self, raw: bytes, request: Any) -> None:
        self.raw = raw
        self.request = request
        self.fields: dict[str, tuple[int, int, int]] = {}  # name -> its start, its value's start, their end
        self.lists: dict[str, range] = {}  # name -> indexes of its items in `items`
        self.items: list[Any] = []  # of all lists: neighbours here are neighbours in the body
        self.starts: list[int] = []  # byte of the body, for each of `items`
        self.ends: list[int] = []
        self.long_texts: set[str] = set()  # those of TEXT_FIELDS that are long
        self.judged: dict[str, int] = {}  # list's name -> how many of its first items are judged, see `judge`
        self.unusual: dict[str, list[int]] = {}  # list's name -> the places of its unusual ones
        self.fresh: list[Any] = []  # values of fields and items that were not taken from the last request
        self.memory = 0  # bytes that the values take, estimated; until `settle` those of the last request
        self.counted = 0  # `memory` when all values were last counted; it still has those dropped since then
        self.counted_length = 0  # of the body at that time
        self.field_count = 0  # more than `fields` has if two have one name: then only the last one counts
        self.order: list[str] = []  # the fields as they stand in the body; for the next request, see `settle`
        self.bounds: list[int] = []  # bytes of the body at which these begin, and its end
        self._indexes: dict[int, int] = {}  # id of an item -> index; built when a list has a new item

    def is_unchanged(self, name: str, value: Any) -> bool:
        """Tell whether a field has the value that was read."""
        return name in self.fields and self.request[name] is value

    def value_bytes(self, name: str, limit: int) -> bytes:
        """Return the client's own bytes of a field's value, b"" for more than `limit`.

        Raises KeyError if their place is unknown.
        """
        _, start, end = self.fields[name]
        return self.raw[start:end] if end - start <= limit else b""

    def settle(self, limit: int) -> int:
        """Prepare to be kept as the last request; return the bytes of memory that this takes, estimated.

        Beyond `limit` the estimate is too low. A request that cannot be a last one gets no `order`: two of
        its fields have one name, it has too many, or it is too large.
        """
        names, length = list(self.fields), len(self.raw)
        beside = memory_of(names, limit) + length * 9 // 8 + PLACE_BYTES * (len(self.items) + 4 * len(names))
        if self.field_count > len(names) or len(names) > MAX_KNOWN_FIELDS or beside > limit:
            return beside
        self.memory += memory_of(self.fresh, limit)
        most = min(2 * self.counted, limit - beside)
        if self.counted and (self.memory > most or 2 * length < self.counted_length):
            self.memory, self.counted = memory_of(self.request.values(), limit), 0
        if not self.counted:
            self.counted, self.counted_length = self.memory, length
        self.fresh, self._indexes, self.order = [], {}, names
        self.bounds = [*(start for start, _, _ in self.fields.values()), length]
        return self.memory + beside

    def judge(self, request: Mapping[str, Any], name: str,
              is_usual: Callable[[dict[str, Any]], bool]) -> list[Any]:
        """Return the objects that are not usual in a request's list: none for a field that is no list.

        A list that is as it was read is judged once in a conversation, one that the bridge made each time.
        """
        items = request.get(name)
        if not isinstance(items, list):
            return []
        if items is not self.request.get(name):
            return [item for item in items if type(item) is dict and not is_usual(item)]
        judged, unusual = self.judged.get(name, 0), self.unusual.setdefault(name, [])
        unusual += [place for place, item in enumerate(items[judged:], judged)
                    if type(item) is dict and not is_usual(item)]
        self.judged[name] = len(items)
        return [items[place] for place in unusual]

    def index(self, item: Any, likely: int) -> int:
        """Return an item's index in `items`, -1 for a new item; try a likely index first."""
        if 0 <= likely < len(self.items) and self.items[likely] is item:
            return likely
        if not self._indexes:
            self._indexes = {id(item): index for index, item in enumerate(self.items)}
        return self._indexes.get(id(item), -1)


class SpanReader:
    """Reads a request. The cursor is a character of a window of the body's text.

    A window, because a wide character makes the text around it four times as large, and because no other
    thread runs while a text is decoded. Raises ValueError, StopIteration or RecursionError for what is not a
    JSON object, or has a float out of range or too many places: `read_request` leaves that to `parse_json`.
    """

    def __init__(self, raw: bytes, last: Spans) -> None:
        self._spans = Spans(raw, {})
        self._last = last  # the conversation's last request; its values are taken where the bytes agree
        self._expected = 0  # number of the field that comes next if the request is like the last one
        self._body = memoryview(raw)
        self._text = ""  # the window
        self._loaded = 0  # byte of the body at which the window ends
        self._margin = 0  # character from which on an item begins a new window
        self._index = 0  # the cursor
        self._shift = 0  # the cursor's byte in the body, less `_index`
        self._scan = UPSTREAM_DECODER.scan_once  # type: ignore[attr-defined]

    def read(self) -> Spans:
        """Read the body."""
        spans = self._spans
        if self._last.order:
            self._load(SMALL_WINDOW)
        more = self._enter("{", "}") and self._take_fields()
        while more:
            name = self._field()
            more = self._follows("}")
            if more and name in self._last.order:
                self._expected = self._last.order.index(name) + 1
                more = self._take_fields()
        if self._next() or len(spans.starts) + spans.field_count > MAX_PLACES:
            raise ValueError("bytes after the object, or too many places")
        return spans

    def _field(self) -> str:
        """Read a field; return its name."""
        spans, start = self._spans, self._index + self._shift
        name = self._value()
        if not isinstance(name, str) or self._next() != ":":
            raise ValueError("a field needs a name and a colon")
        self._index += 1
        opening, value_start = self._next(), self._index + self._shift
        if name in ITEM_LISTS and opening == "[":
            spans.request[name] = self._items(name)
        else:
            spans.request[name] = value = self._value()
            spans.fresh.append(value)
            if name in TEXT_FIELDS and isinstance(value, str) and len(value) >= LONG_TEXT:
                spans.long_texts.add(name)
        spans.fields[name] = start, value_start, self._index + self._shift
        spans.field_count += 1
        return name

    def _items(self, name: str) -> list[Any]:
        """Read a list, item by item: other threads can run between items.

        The usual item ends in this window, and a comma alone is between it and the next one.
        """
        items, starts, ends = self._spans.items, self._spans.starts, self._spans.ends
        first, scan = len(items), self._scan
        more = self._begin_list(name)
        taken = len(items)
        text, index, shift, margin = self._text, self._index, self._shift, self._margin
        while more:
            starts.append(index + shift)
            try:
                value, end = scan(text, index)
                behind = text[end]
            except (ValueError, StopIteration, IndexError):
                behind = ""
            if behind not in VALUE_ENDS:
                self._index, self._shift = index, shift
                value = self._value()
                text, end, shift, margin = self._text, self._index, self._shift, self._margin
            elif not text.isascii() and not (piece := text[index:end]).isascii():
                shift += len(piece.encode("utf-8")) - len(piece)
            items.append(value)
            ends.append(end + shift)
            if behind == "," and end < margin and text[end + 1:end + 2] > " ":
                index = end + 1
            else:
                self._index, self._shift = end, shift
                more = self._follows("]")
                if self._index >= margin:
                    self._load(WINDOW)
                text, index, shift, margin = self._text, self._index, self._shift, self._margin
        self._spans.fresh += items[taken:]
        return self._end_list(name, first)

    def _end_list(self, name: str, first: int) -> list[Any]:
        """End the list whose first item has the index `first`; return its items."""
        spans = self._spans
        spans.lists[name] = range(first, len(spans.items))
        read = spans.items[first:]
        spans.items.append(NO_ITEM)
        spans.starts.append(0)
        spans.ends.append(0)
        return read

    def _take_fields(self) -> bool:
        """Take fields of the last request, as far as the same bytes are here; tell whether others follow."""
        last, at, spans = self._last, self._index + self._shift, self._spans
        bounds = last.bounds[self._expected:]
        same = self._count_same(at, bounds)
        if not same:
            return True
        moved, names = at - bounds[0], last.order[self._expected:self._expected + same]
        for name in names:
            value = last.request[name]
            if name in last.lists and isinstance(value, list):
                value = self._take_list(name, last.lists[name], moved)
            spans.request[name] = value
            start, value_start, end = last.fields[name]
            spans.fields[name] = start + moved, value_start + moved, end + moved
        spans.long_texts |= last.long_texts.intersection(names)
        self._expected += same
        spans.field_count += same
        self._jump(bounds[same] + moved)
        if bounds[same] == len(last.raw):
            return False
        self._next()  # there may be more white space than there was
        return True

    def _begin_list(self, name: str) -> bool:
        """Enter a list, and take items from the last request's; tell whether others follow."""
        indexes = NOT_READ if name in self._spans.lists else self._last.lists.get(name, NOT_READ)
        self._copy_items(name, range(0), 0)  # forgets an earlier field of that name
        if not self._enter("[", "]"):
            return False
        last, at = self._last, self._index + self._shift
        bounds = [*last.starts[indexes.start:indexes.start + 1], *last.ends[indexes.start:indexes.stop]]
        same = self._count_same(at, bounds)
        if same and not self._is_value_end(at + bounds[same] - bounds[0]):
            same -= 1  # a number that goes on, or a torn body
        if not same:
            return True
        self._copy_items(name, indexes[:same], at - bounds[0])
        self._jump(at + bounds[same] - bounds[0])
        return self._follows("]")

    def _is_value_end(self, byte: int) -> bool:
        """Tell whether the value before a byte of the body cannot go on there."""
        return bytes(self._body[byte:byte + 1]) in VALUE_END_BYTES

    def _take_list(self, name: str, indexes: range, moved: int) -> list[Any]:
        """Take a list of the last request that is now so many bytes further on."""
        first = len(self._spans.items)
        self._copy_items(name, indexes, moved)
        return self._end_list(name, first)

    def _copy_items(self, name: str, indexes: range, moved: int) -> None:
        spans, last, those = self._spans, self._last, slice(indexes.start, indexes.stop)
        judged = min(last.judged.get(name, 0), len(indexes))
        unusual = last.unusual.get(name, [])
        spans.judged[name], spans.unusual[name] = judged, unusual[:bisect_left(unusual, judged)]
        spans.items += last.items[those]
        if moved:
            spans.starts += [start + moved for start in last.starts[those]]
            spans.ends += [end + moved for end in last.ends[those]]
        else:
            spans.starts += last.starts[those]
            spans.ends += last.ends[those]

    def _count_same(self, at: int, bounds: list[int]) -> int:
        """Return how many parts of the last request, each from a bound to the next, are at a byte here."""
        raw, last = self._spans.raw, memoryview(self._last.raw)
        same, other = 0, len(bounds)
        probe = other - 1  # most often all are the same
        while other - same > 1:
            if raw.startswith(last[bounds[same]:bounds[probe]], at + bounds[same] - bounds[0]):
                same = probe
            else:
                other = probe
            probe = (same + other) // 2
        return same

    def _jump(self, byte: int) -> None:
        """Move the cursor over what was taken from the last request, to a byte of the body."""
        spans, last = self._spans, self._last
        spans.memory, spans.counted, spans.counted_length = last.memory, last.counted, last.counted_length
        index = byte - self._shift
        if index <= len(self._text) and self._text.isascii():
            self._index = index
        else:
            self._shift = byte - self._index
            self._load(SMALL_WINDOW)

    def _enter(self, opening: str, closing: str) -> bool:
        """Move to the first entry of an object or a list; tell whether there is one."""
        if self._next() != opening:
            raise ValueError(opening)
        self._index += 1
        if self._next() == closing:
            self._index += 1
            return False
        return True

    def _follows(self, closing: str) -> bool:
        """Move to the next entry; tell whether there is one."""
        char = self._next()
        if char not in (",", closing) or len(self._spans.starts) + self._spans.field_count > MAX_PLACES:
            raise ValueError(char)
        self._index += 1
        if char == closing:
            return False
        self._next()
        return True

    def _next(self) -> str:
        """Skip white space; return the character at the cursor, "" at the body's end."""
        while True:
            char = self._text[self._index:self._index + 1]
            if char <= " ":
                self._index = WHITE_SPACE.match(self._text, self._index).end()  # type: ignore[union-attr]
                char = self._text[self._index:self._index + 1]
            if char or self._loaded == len(self._body):
                return char
            self._load(WINDOW)

    def _value(self) -> Any:
        """Parse the value at the cursor, in larger windows if it does not end in this one."""
        size = max(len(self._text) - self._index, 1)
        while True:
            with contextlib.suppress(ValueError, StopIteration):
                value, end = self._scan(self._text, self._index)
                if self._text[end:end + 1] in VALUE_ENDS:
                    self._move(end)
                    return value
            if self._loaded == len(self._body):
                raise ValueError("no value")
            size *= 8
            self._load(size)

    def _move(self, end: int) -> None:
        """Move the cursor to the end of a value."""
        if not self._text.isascii():
            for start in range(self._index, end, ENCODED_PIECE):
                text = self._text[start:min(start + ENCODED_PIECE, end)]
                self._shift += len(text.encode("utf-8")) - len(text)
        self._index = end

    def _load(self, size: int) -> None:
        """Decode a window that begins at the cursor, and ends with a character. Raises UnicodeDecodeError."""
        start = self._index + self._shift
        end = min(start + size, len(self._body))
        for _ in range(3):  # bytes of a character that can follow its first one
            if end < len(self._body) and self._body[end] & 0xC0 == 0x80:
                end += 1
        self._text = ""  # frees the last window before the next one takes memory
        self._text = str(self._body[start:end], "utf-8")
        self._loaded, self._index, self._shift, self._margin = end, 0, start, len(self._text)
        if end < len(self._body):
            self._margin = len(self._text) * 3 // 4  # an item that begins behind it begins a new window


NOTHING_READ = Spans(b"", {})


def read_request(body: bytes, last: Spans = NOTHING_READ) -> Spans:
    """Parse a request body as `parse_json` does, and note the places of its values. Raises InvalidRequest.

    What it has in common with `last`, the conversation's last request, is taken from there.
    """
    try:
        return SpanReader(body, last).read()
    except (ValueError, StopIteration, RecursionError):
        pass
    return Spans(body, parse_json(body))  # without places, or raises the error that clients know


# == 5 rewriting ==============================================================
# A changed request as bytes: the client's own bytes for what no rule changed. (pure)

FREED_ITEMS = 500  # at once


def encode(request: dict[str, Any], spans: Spans | None = None) -> bytes:
    """Encode a changed request. Raises InvalidRequest for NaN, Infinity and too deep nesting."""
    try:
        if spans is None:
            return json_bytes(request)
        return write_request(request, spans)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest("the request has a number out of range, or is nested too deeply") from exc


def write_request(request: dict[str, Any], spans: Spans) -> bytes:
    """Encode a request, with the client's own bytes for what was read. Raises what `json_bytes` raises."""
    if request is spans.request:
        return spans.raw
    if len(request) == len(spans.request) and all(map(spans.is_unchanged, request, request.values())):
        return spans.raw
    return join_pieces(_field_pieces(request, spans, top=True), len(spans.raw))


def join_pieces(pieces: Iterable[bytes | memoryview], likely: int) -> bytes:
    """Join pieces of about so many bytes; a large body in steps, so that other threads run between them."""
    if likely < LARGE_BODY:
        return b"".join(pieces)
    joined = bytearray()
    for piece in pieces:
        for at in range(0, len(piece), WINDOW):
            joined += piece[at:at + WINDOW]
    return joined  # type: ignore[return-value]  # it is used as bytes; a copy would stop all threads


def free_items(spans: Spans, *requests: dict[str, Any]) -> None:
    """Free the items of a body in steps, so that other threads run between them: empty all lists.

    A rule must not make a list that stands inside an item or a field the request's own: the conversation's
    last request can share it.
    """
    lists = [request.get(name) for request in (*requests, spans.request) for name in ITEM_LISTS]
    for items in (spans.items, *lists):
        while isinstance(items, list) and items:
            del items[-FREED_ITEMS:]


def _field_pieces(fields: dict[str, Any], spans: Spans, top: bool) -> Iterator[bytes | memoryview]:
    """Yield the bytes of the request, or of a new item that has a list of tools."""
    before, body = b"{", memoryview(spans.raw)
    for name, value in fields.items():
        yield before
        before = b","
        if top and name in spans.fields and spans.request[name] is value:
            start, _, end = spans.fields[name]
            yield body[start:end]
            continue
        if name in ITEM_LISTS and isinstance(value, list) and (spans.items or spans.long_texts):
            yield json_bytes(name) + b":"
            yield from _item_pieces(value, spans, spans.lists.get(name, NOT_READ).start, top)
        else:
            yield json_bytes({name: value})[1:-1]
    yield b"}" if fields else b"{}"


def _item_pieces(items: list[Any], spans: Spans, likely: int, top: bool) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a list whose first item has the index `likely`, if it was read."""
    before, body = b"[", memoryview(spans.raw)
    tail, tail_index = _unchanged_tail(items, spans, likely)
    groups = list(_groups(items[:tail], spans, likely))
    if tail < len(items):
        groups.append((tail_index, items[tail:]))
    for index, group in groups:
        yield before
        before = b","
        if index >= 0:
            yield body[spans.starts[index]:spans.ends[index + len(group) - 1]]
        elif top and _carries_tools(group[0]):
            yield from _field_pieces(group[0], spans, top=False)
        elif spans.long_texts:
            yield from _new_item_pieces(group, spans)
        else:
            yield json_bytes(group)[1:-1]
    yield b"]" if items else b"[]"


def _new_item_pieces(items: list[Any], spans: Spans) -> Iterator[bytes | memoryview]:
    """Yield the bytes of new items; for a message made of a long text of TEXT_FIELDS the text's own bytes."""
    texts = {id(text): name for name in spans.long_texts if isinstance(text := spans.request[name], str)}
    before = b""
    for item in items:
        yield before
        before = b","
        part = _only_part(item)
        name = texts.get(id(part.get("text")))
        if name is None:
            yield json_bytes(item)
            continue
        encoded = json_bytes({**item, "content": [{**part, "text": ""}]})
        place = encoded.rindex(b'""')
        _, start, end = spans.fields[name]
        yield encoded[:place]
        yield memoryview(spans.raw)[start:end]
        yield encoded[place + 2:]


def _only_part(item: Any) -> dict[str, Any]:
    """Return the only part of a message in which its text comes last, {} for another item."""
    content = or_empty(or_empty(item, dict).get("content"), list)
    part: dict[str, Any] = or_empty(content[0], dict) if len(content) == 1 else {}
    if part and list(part)[-1] == "text" and list(item)[-1] == "content":
        return part
    return {}


def _unchanged_tail(items: list[Any], spans: Spans, likely: int) -> tuple[int, int]:
    """Return where the items begin that are all as they were read, often behind new ones, and their index."""
    for at, item in enumerate(items):
        index = spans.index(item, likely)
        if index >= 0:
            read = spans.items[index:index + len(items) - at]
            if len(read) == len(items) - at and all(map(operator.is_, items[at:], read)):
                return at, index
            break
    return len(items), -1


def _groups(items: list[Any], spans: Spans, likely: int) -> Iterator[tuple[int, list[Any]]]:
    """Yield neighbours in the body with the first one's index, and new items with -1; tools alone."""
    first, following = -1, -1
    group: list[Any] = []
    for item in items:
        index = spans.index(item, likely)
        alone = index < 0 and (_carries_tools(item) or any(map(_carries_tools, group[-1:])))
        if group and (index != following or alone):
            yield first, group
            group = []
        if not group:
            first = index
        group.append(item)
        following = index
        if index >= 0:
            following = likely = index + 1
    if group:
        yield first, group


def _carries_tools(item: Any) -> bool:
    """Tell whether an item has a list of tools, as the lite form's first one."""
    return isinstance(item, dict) and isinstance(item.get("tools"), list)


# == 6 refusals ===============================================================
# Turns upstream's refusals and reported failures into errors for the client.

class UpstreamRefusal(BridgeError):
    """Upstream's own refusal in the OpenAI shape, with upstream's status and extra fields."""

    by = "upstream"

    def __init__(self, status: int, error: dict[str, Any], retry_after: str | None = None) -> None:
        message = error.get("message")
        super().__init__(message if isinstance(message, str) else f"upstream answered {status}")
        self.status = status
        self.may_be_repaired = status in (400, 404, 422)  # else the request is not the reason
        self.error = error
        self.code = str(error.get("code") or error.get("type") or "upstream_error")
        if not retry_after and status == 429:
            retry_after = retry_after_seconds(error.get("resets_in_seconds"))
        if retry_after:
            self.headers["retry-after"] = retry_after

    def body(self) -> dict[str, Any]:
        """Return the error object with upstream's extra fields (`resets_at`, `plan_type`)."""
        shaped = {"message": self.message, "type": error_type(self.status), "param": None, "code": None}
        return {"error": {**shaped, **self.error, "message": self.message}}


def retry_after_seconds(seconds: Any) -> str:
    """Return a retry-after value, rounded up; "" for anything but a number from 0 to 1e9."""
    number = finite_number(seconds)
    if number is None or not 0 <= number < 1e9:
        return ""
    return str(int(number) + 1)


def error_type(status: int) -> str:
    """Return OpenAI's `type` for an HTTP status."""
    types = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return types.get(status, "invalid_request_error" if status < 500 else "upstream_error")


def refusal(status: int, content_type: str, body: bytes, retry_after: str | None = None) -> UpstreamRefusal:
    """Turn upstream's refusal (`{"error"}`, `{"detail"}`, a web page, or anything else) into an error.

    A 2xx or 3xx status becomes 502, because the reply is not what the bridge asked for.
    """
    text = body.decode("utf-8", "replace").strip()
    error = _error_object(json_or_none(text))
    if error is None and ("html" in content_type or text[:1] == "<"):
        title = re.search(r"<title>([^<]{1,200})", text, re.IGNORECASE)
        error = {"code": "upstream_web_page", "message": _web_page_message(status, title)}
    if error is None:
        reason = " without a reason"
        if text:
            reason = f": {text[:500]}"
        error = {"message": f"upstream answered {status}{reason}"}
    if 300 <= status < 400:
        error = {"code": "upstream_redirect",
                 "message": f"upstream answered {status}; redirects are not followed"}
    return UpstreamRefusal(status if 400 <= status < 600 else 502, error, retry_after)


def _web_page_message(status: int, title: re.Match[str] | None) -> str:
    """Explain a web page in place of JSON; Cloudflare sends one to unknown clients (WIRE 3)."""
    named = ""
    if title:
        named = f" ({' '.join(title[1].split())!r})"
    return (f"upstream answered {status} with a web page{named} instead of JSON: something between this host "
            "and ChatGPT (Cloudflare, a proxy) refused the connection")


def _error_object(parsed: Any) -> dict[str, Any] | None:
    """Return the error object of a parsed refusal; None without one."""
    if not isinstance(parsed, dict):
        return None
    error, detail = parsed.get("error"), parsed.get("detail")
    if isinstance(error, dict):
        words = filter(None, map(error.get, ("message", "code", "type")))
        return {**error, "message": str(next(words, "upstream gave no reason"))}
    if isinstance(detail, dict) and "code" in detail:
        return _detail_error(detail)
    for key in ("detail", "message", "error"):
        value = parsed.get(key)
        if value:
            return {"message": value if isinstance(value, str) else json.dumps(value)[:2000]}
    return None


def _detail_error(detail: dict[str, Any]) -> dict[str, Any]:
    """Return the error of `{"detail": {"code": …}}`, whose code becomes the words if it has none."""
    words = f"upstream refused the request: {detail['code']}".replace("_", " ")
    return {**detail, "message": str(detail.get("message") or words)}


def failure(event: Mapping[str, Any]) -> UpstreamRefusal:
    """Map a failure that an event reports (`error`, `response.failed`) to an HTTP error.

    The event's own status decides, then the error's code, then its type (WIRE 5).
    """
    error = reported_error(event)
    code, kind = or_empty(error.get("code"), str), or_empty(error.get("type"), str)
    status = reported_status(event) or code_status(code) or code_status(kind)
    message = or_empty(error.get("message"), str) or code or "upstream reported a failure"
    failed = UpstreamRefusal(status or 502, {**error, "message": message})
    failed.may_be_repaired = failed.may_be_repaired or not status
    return failed


def reported_error(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the error object of an event: nested, in its response, or the event's own fields."""
    for holder in (event, or_empty(event.get("response"), dict)):
        if isinstance(holder.get("error"), dict):
            return dict(holder["error"])
    if event.get("type") != "error":
        return {}
    return without(dict(event), "type", "sequence_number", "status", "status_code", "headers", "event_id")


def reported_status(event: Mapping[str, Any]) -> int:
    """Return an event's own HTTP status; 0 without one."""
    for name in ("status", "status_code"):
        status = event.get(name)
        if type(status) is int and 400 <= status < 600:
            return status
    return 0


def code_status(code: str) -> int:
    """Return the HTTP status for an error's code or type; 0 for an unknown one.

    SDKs repeat a 5xx, so what a repeat cannot cure is 400.
    """
    if CURELESS.match(code):
        return 400
    return FAILURE_STATUS.get(code, 0)


FAILURE_STATUS = {  # the backend's codes inside `response.failed` and `error`; DESIGN "Endpoints"
    "rate_limit_exceeded": 429, "usage_limit_reached": 429, "insufficient_quota": 429,
    "server_is_overloaded": 503, "slow_down": 503, "overloaded": 503,
    "context_length_exceeded": 400,
}
CURELESS = re.compile(r"(?:invalid|unknown|unsupported|missing)_|\w*image_|\w*_image|\w*_policy(?:_|$)")


# == 7 http ===================================================================
# Heads and bodies as bytes, parsed strictly, by the same code on both sides.
# http.server and http.client do not read them: they accept signed lengths, folded lines and bare line feeds,
# hide a truncated body, hang on a 304 marked as chunked, and cost 90 µs a head (WIRE 8).

HEADER_LINES = re.compile(r"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*")
REQUEST_LINE = re.compile(r"([A-Z]{1,20}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?")
METHODS = frozenset(("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH"))
SINGLE = frozenset((  # headers that may occur once: a duplicate is an attack, not a list
    "authorization", "content-encoding", "content-length", "content-type", "expect", "host", "origin",
    "transfer-encoding", "x-api-key",
))


class RequestHead(NamedTuple):
    """A client's request line and headers."""

    method: str
    target: str
    minor: int  # 0 or 1, of HTTP/1.x
    headers: dict[str, str]


class ReplyHead(NamedTuple):
    """Upstream's status line and headers."""

    status: int
    minor: int
    headers: dict[str, str]


def parse_headers(text: str) -> dict[str, str]:
    """Parse header lines, each ending in CRLF.

    Raises HeadTooLarge, and MalformedHttp for a folded line, a space before the colon, a bare CR or LF, NUL.
    """
    if HEADER_LINES.fullmatch(text) is None:
        raise MalformedHttp("a header line is not `name: value`")
    lines = text.split("\r\n")
    if len(lines) - 1 > MAX_HEADERS:
        raise HeadTooLarge(f"the head has {len(lines) - 1} headers, the limit is {MAX_HEADERS}")
    headers: dict[str, str] = {}
    for line in lines[:-1]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            if name in SINGLE:
                raise MalformedHttp(f"duplicate header: {name}")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def parse_request(head: bytes) -> RequestHead:
    """Parse a request's head, without its final empty line.

    Raises MalformedHttp and its subclasses; the connection cannot be used after one.
    """
    head = head.removeprefix(b"\r\n")  # RFC 9112, 2.2: an empty line before a request line is ignored
    line, _, lines = f"{head.decode('latin-1')}\r\n".partition("\r\n")
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        raise MalformedHttp("the request line must be `METHOD /target HTTP/1.1`")
    method, target, major, minor = match.groups()
    if major != "1" or minor not in "01":
        raise VersionNotSupported(f"HTTP/{major}.{minor} is not supported: use HTTP/1.1")
    if method not in METHODS:
        raise UnknownCoding(f"unsupported method: {method}")
    if len(target) > MAX_TARGET:
        raise TargetTooLong(f"the target is {len(target)} bytes, the limit is {MAX_TARGET}")
    if not target.startswith("/"):
        raise MalformedHttp("the request target must be a path: this is not a forward proxy")
    headers = parse_headers(lines)
    if minor == "1" and not headers.get("host"):
        raise MalformedHttp("missing Host header")
    return RequestHead(method, target, int(minor), headers)


def parse_reply(head: bytes) -> ReplyHead:
    """Parse a reply's head, without its final empty line.

    Raises BadUpstream.
    """
    line, _, lines = f"{head.decode('latin-1')}\r\n".partition("\r\n")
    match = STATUS_LINE.fullmatch(line)
    if match is None:
        raise BadUpstream("upstream's reply is not HTTP/1.1")
    try:
        return ReplyHead(int(match[2]), int(match[1]), parse_headers(lines))
    except MalformedHttp as exc:
        raise BadUpstream(f"malformed headers from upstream: {exc.message}") from exc


DIGITS = re.compile(r"[0-9]{1,15}", re.ASCII)


def body_length(headers: Mapping[str, str]) -> int | None:
    """Return the Content-Length in bytes, -1 for a chunked body, None without either header.

    Raises MalformedHttp for both headers or a length that is not digits, UnknownCoding for another coding.
    """
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None:
            raise MalformedHttp("Content-Length and Transfer-Encoding must not both be present")
        if coding.lower() != "chunked":
            raise UnknownCoding(f"unsupported Transfer-Encoding {coding!r}: only chunked is supported")
        return -1
    if length is None:
        return None
    if not DIGITS.fullmatch(length):
        raise MalformedHttp(f"Content-Length must be digits, not {length!r}")
    return int(length)


# -- body decoders: `feed` takes raw bytes and returns the payload; `done` marks the end

class LengthBody:
    """Decoder of a body of known length."""

    def __init__(self, length: int) -> None:
        self.left = length
        self.done = length == 0
        self.rest = b""  # bytes after the end

    def feed(self, raw: bytes) -> bytes:
        """Return the part of `raw` that belongs to the body."""
        payload = raw
        if len(raw) > self.left:
            payload = raw[:self.left]
        self.left -= len(payload)
        self.done = self.left == 0
        if self.done:
            self.rest = raw[len(payload):]
        return payload


class CloseBody(LengthBody):
    """Decoder of a body that ends with the connection; a cut looks like its end."""

    def __init__(self) -> None:
        super().__init__(1 << 62)


class ChunkedBody:
    """Decoder of a chunked body.

    `feed` raises MalformedHttp for anything but `hex-size [;extension] CRLF data CRLF`.
    """

    HEAD = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]{0,16}(?:;[^\r\n\x00]{0,256})?\r\n")
    HEAD_PART = re.compile(rb"[0-9A-Fa-f]{0,15}|[0-9A-Fa-f]{1,15}[ \t]{0,16}(?:;[^\r\n\x00]{0,256})?\r?")
    CRLF_PART = re.compile(rb"\r?")
    TRAILERS = 8192  # bytes of trailers, at most; they are read and dropped

    def __init__(self) -> None:
        self.left = 0  # bytes of the current chunk still to come
        self.done = False
        self.rest = b""  # bytes after the end
        self._unread = b""  # an incomplete chunk head or chunk end
        self._crlf = False  # the next bytes must be the CRLF behind a chunk's data
        self._last = False  # the last chunk's head has been read; trailers follow

    def feed(self, raw: bytes) -> bytes:
        """Return the payload in `raw`."""
        if self._unread:
            raw, self._unread = self._unread + raw, b""
        if self._last:
            self._end(raw)
            return b""
        pieces, at, end = [], 0, len(raw)
        while at < end:
            if self.left:
                piece = raw[at:at + self.left]
                pieces.append(piece)
                at += len(piece)
                self.left -= len(piece)
                self._crlf = True
            elif self._crlf:
                if not raw.startswith(b"\r\n", at):
                    self._wait_for(raw[at:], self.CRLF_PART)
                    break
                at += 2
                self._crlf = False
            else:
                at = self._take_complete_chunks(raw, at, pieces)
        if len(pieces) == 1:
            return pieces[0]
        return b"".join(pieces)

    def _take_complete_chunks(self, raw: bytes, at: int, pieces: list[bytes]) -> int:
        """Take the complete chunks from `at` on; return the position behind them."""
        while True:
            match = self.HEAD.match(raw, at)
            if match is None:
                if at < len(raw):
                    self._wait_for(raw[at:], self.HEAD_PART)
                return len(raw)
            start, size = match.end(), int(match[1], 16)
            behind = start + size
            if size == 0:
                self._last = True
                self._end(raw[start:])
                return len(raw)
            if not raw.startswith(b"\r\n", behind):
                self.left = size
                return start
            pieces.append(raw[start:behind])
            at = behind + 2

    def _wait_for(self, part: bytes, pattern: re.Pattern[bytes]) -> None:
        """Keep an incomplete chunk head or chunk end. Raises MalformedHttp unless it matches `pattern`."""
        if not pattern.fullmatch(part):
            raise MalformedHttp("malformed chunk")
        self._unread = part

    def _end(self, raw: bytes) -> None:
        """Read the trailers up to the empty line, and drop them. Raises MalformedHttp for an invalid one."""
        end = raw.find(b"\r\n\r\n") + 2
        if raw.startswith(b"\r\n"):
            end = 0
        if (len(raw) if end == 1 else end) > self.TRAILERS:
            raise MalformedHttp("the trailers are too long")
        if end == 1:
            self._unread = raw
            return
        if end:
            parse_headers(raw[:end].decode("latin-1"))
        self.done = True
        self.rest = raw[end + 2:]


def reply_body(head: ReplyHead, method: str = "GET") -> LengthBody | ChunkedBody:
    """Return the decoder of a reply's body, chosen in RFC 9112's order.

    Raises BadUpstream.
    """
    # 1. HEAD, 1xx, 204, 304: none, whatever the headers say   2. chunked   3. by length   4. until the close
    if method == "HEAD" or head.status in (204, 304) or head.status < 200:
        return LengthBody(0)
    try:
        length = body_length(head.headers)
    except MalformedHttp as exc:
        raise BadUpstream(f"malformed body framing from upstream: {exc.message}") from exc
    if length is None:
        return CloseBody()
    if length < 0:
        return ChunkedBody()
    return LengthBody(length)


def chunk(payload: bytes) -> bytes:
    """Encode bytes as one chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


LAST_CHUNK = b"0\r\n\r\n"


def render_head(first: str, fields: Iterable[tuple[str, str]]) -> bytes:
    """Return a head's bytes. Raises ValueError for a line break in a value, which is a programming error."""
    lines = [first]
    for name, value in fields:
        if "\r" in value or "\n" in value or "\0" in value:
            raise ValueError(f"header {name} contains a line break or NUL")
        lines.append(f"{name}: {value}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def keeps_connection(minor: int, headers: Mapping[str, str]) -> bool:
    """Tell whether the sender of a head keeps its connection open."""
    if "connection" not in headers:
        return minor == 1
    tokens = [token.strip() for token in headers["connection"].lower().split(",")]
    return "close" not in tokens and (minor == 1 or "keep-alive" in tokens)


def find_head_end(head: bytes, start: int) -> int:
    """Return a head's end, searched from `start` on; -1 for an incomplete head. Raises MalformedHttp."""
    end = head.find(b"\r\n\r\n", start)
    if (end if end >= 0 else len(head)) > MAX_HEAD:
        raise HeadTooLarge(f"the headers are above {MAX_HEAD} bytes")
    if end < 0 and head.count(b"\n") != head.count(b"\r\n"):
        raise MalformedHttp("a header line ends in a bare LF")
    return end


class Target(NamedTuple):
    """The scheme, host and port of an upstream address; the key of its pooled connections."""

    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> str:
        """Return the Host header's value."""
        return authority(self.host, self.port, self.scheme)


@functools.lru_cache(maxsize=64)
def parse_target(url: str) -> tuple[Target, str]:
    """Split a URL into its target and its path (with the query)."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, parts.hostname or "", port), path or "/"


def authority(host: str, port: int, scheme: str = "") -> str:
    """Return host:port for a URL: IPv6 in brackets, without the scheme's default port."""
    if ":" in host:
        host = f"[{host}]"
    if (scheme, port) in (("https", 443), ("http", 80)):
        return host
    return f"{host}:{port}"


class BufferedReply(NamedTuple):
    """One small reply with its complete body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body's JSON object; {} for any other body."""
        return or_empty(json_or_none(self.body), dict)

    def refusal(self) -> UpstreamRefusal:
        """Return the reply as a refusal."""
        return refusal(self.status, self.headers.get("content-type", ""), self.body)

    def json_or_raise(self) -> dict[str, Any]:
        """Return the JSON object of a 200. Raises UpstreamRefusal for any other status."""
        if self.status != 200:
            raise self.refusal()
        return self.json()


def is_within(host: str, domain: str) -> bool:
    """Tell whether a host name is the domain or one of its subdomains."""
    if re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)*", host, re.ASCII) is None:
        return False
    return host == domain or host.endswith(f".{domain}")


def is_bare_origin(parts: urllib.parse.SplitResult) -> bool:
    """Tell whether a URL is an origin without user, path and query."""
    return not parts.username and not parts.query and parts.path in ("", "/")


def join_url(base: str, path: str) -> str:
    """Return a path's URL: at the base's origin for `/backend-api/…`, else below the base."""
    if not path.startswith("/backend-api/"):
        return base + path
    parts = urllib.parse.urlsplit(base)
    return f"{parts.scheme}://{parts.netloc}{path}"


class OutgoingRequest(NamedTuple):
    """A request ready to send upstream."""

    method: str
    target: Target
    head: bytes
    body: bytes
    timeout: float  # seconds of silence after which the request fails


def outgoing_request(method: str, url: str, headers: Mapping[str, str], body: bytes,
                     timeout: float) -> OutgoingRequest:
    """Return a request ready to send, with its complete head."""
    target, path = parse_target(url)
    lines = [*headers.items(), ("accept-encoding", "identity"), ("host", target.authority)]
    if body or method == "POST":
        lines.append(("content-length", str(len(body))))
    return OutgoingRequest(method, target, render_head(f"{method} {path} HTTP/1.1", lines), body, timeout)


# == 8 options ================================================================
# One table of options serves argparse, the environment, --help and README. No default is anywhere else.

class NamedSecret(NamedTuple):
    """A client's name and its key; only the name is ever shown."""

    name: str
    secret: str

    def __repr__(self) -> str:
        return f"NamedSecret({self.name!r}, …)"


class Config(NamedTuple):
    """All settings, read once at the start; one field for each option, in the order of OPTIONS."""

    host: str
    port: int
    upstream: str
    issuer: str
    auth_file: str
    alias: Mapping[str, str]
    api_key: tuple[NamedSecret, ...]
    api_key_file: str
    limit: Mapping[str, int]
    allow: tuple[Any, ...]
    allow_origin: tuple[str, ...]
    allow_host: tuple[str, ...]
    keepalive: float
    idle_timeout: float
    connect_timeout: float
    max_body: int
    max_connections: int
    compress: str
    continuity: str
    originator: str
    client_version: str
    log_file: str
    log_level: str
    tls_cert: str
    tls_key: str


class Option(NamedTuple):
    """One option: `--name VALUE`, or QOO_BRIDGE_NAME in the environment (with commas if `many`)."""

    name: str
    metavar: str
    default: str
    read: Callable[[str], Any]
    help: str
    many: bool = False

    @property
    def flag(self) -> str:
        """Return the option's name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Return the option's name in the environment."""
        return "QOO_BRIDGE_" + self.name.upper()


def read_port(text: str) -> int:
    """Read a TCP port; 0 means any free port."""
    if re.fullmatch(r"[0-9]{1,5}", text) and int(text) <= 65535:
        return int(text)
    raise ValueError(f"must be a port from 0 to 65535, not {text!r}")


def read_seconds(text: str) -> float:
    """Read a positive number of seconds."""
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", text) and float(text) > 0:
        return float(text)
    raise ValueError(f"must be a positive number of seconds, not {text!r}")


def read_size(text: str) -> int:
    """Read a size in bytes; K, M and G (or KiB, MiB, GiB) are powers of 1024."""
    match = re.fullmatch(r"([0-9]{1,12})\s*([KMG]?)(?:i?B)?", text, re.IGNORECASE | re.ASCII)
    if match and int(match[1]) > 0:
        return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]
    raise ValueError(f"must be a size such as 128M, not {text!r}")


def read_count(text: str) -> int:
    """Read a positive integer."""
    if re.fullmatch(r"[0-9]{1,6}", text) and int(text) > 0:
        return int(text)
    raise ValueError(f"must be a positive integer, not {text!r}")


def read_url(text: str) -> str:
    """Read an https URL; http is only for loopback, because requests to the URL carry a token."""
    parts = urllib.parse.urlsplit(text)
    loopback = parts.hostname in LOOPBACK
    if parts.scheme not in ("https", "http") or not parts.hostname or re.search(r"[?#@\s]", text):
        raise ValueError("must be an https:// URL without user, query or fragment")
    if parts.scheme == "http" and not loopback:
        raise ValueError("must use https (http only for localhost)")
    _ = parts.port  # raises ValueError for an invalid port
    return text.rstrip("/")


def read_pair(text: str) -> tuple[str, str]:
    """Read NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise ValueError("must be NAME=VALUE")  # without the value, which may be a secret
    return name.strip(), value.strip()


def read_key(text: str) -> NamedSecret:
    """Read NAME=SECRET. Raises ValueError, which never shows the secret."""
    name, secret = read_pair(text)
    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", name):
        raise ValueError("a key's name must be 1 to 64 letters, digits or . _ @ -")
    if not re.fullmatch(r"[\x21-\x7e]{8,256}", secret):
        raise ValueError("a key must be 8 to 256 visible ASCII characters")
    return NamedSecret(name, secret)


def read_limit(text: str) -> tuple[str, int]:
    """Read NAME=N."""
    name, number = read_pair(text)
    return name, read_count(number)


def read_network(text: str) -> Any:
    """Read a network such as 192.168.0.0/16, or one address."""
    return ipaddress.ip_network(text, strict=False)


def read_text(pattern: str, expected: str) -> Callable[[str], str]:
    """Return a reader of texts that match a pattern; `expected` describes the pattern to people."""
    def read(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise ValueError(f"must be {expected}, not {text!r}")
    return read


def one_of(*words: str) -> Callable[[str], str]:
    """Return a reader that accepts only these words."""
    return read_text("|".join(words), f"one of {', '.join(words)}")


LOCAL_NETWORKS = (
    "127.0.0.0/8,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,169.254.0.0/16,100.64.0.0/10,"
    "::1/128,fe80::/10,fc00::/7"
)

OPTIONS = (
    Option("host", "ADDRESS", "0.0.0.0", str, "address to listen on; :: is IPv6 and IPv4"),
    Option("port", "PORT", "4050", read_port, "port to listen on; 0 chooses a free port"),
    Option("upstream", "URL", "https://chatgpt.com/backend-api/codex", read_url,
           "the ChatGPT backend; http only for localhost"),
    Option("issuer", "URL", "https://auth.openai.com", read_url, "the sign-in server"),
    Option("auth_file", "FILE", "$CODEX_HOME/auth.json", str,
           "the sign-in, reread when it changes; without CODEX_HOME: ~/.codex/auth.json"),
    Option("alias", "NAME=MODEL", "local_md=gpt-5", read_pair,
           "your own name for a model; adds to the default alias; the same NAME replaces it", many=True),
    Option("api_key", "NAME=SECRET", "", read_key,
           "a key that clients must send; --api-key-file is safer: others can see a command line", many=True),
    Option("api_key_file", "FILE", "", str, "file of keys, one NAME=SECRET a line; reread when it changes"),
    Option("limit", "NAME=N", "", read_limit, "requests that key NAME may have running at once", many=True),
    Option("allow", "CIDR", LOCAL_NETWORKS, read_network,
           "networks that may connect, instead of the default (loopback, private, link-local, "
           "100.64.0.0/10); loopback always may", many=True),
    Option("allow_origin", "ORIGIN", "",
           read_text(r"[a-z][a-z0-9+.-]*://[^\s/]+", "an origin such as scheme://host[:port]"),
           "origin of web pages that may call this bridge; no other page may", many=True),
    Option("allow_host", "NAME", "", str, "another host name of this bridge", many=True),
    Option("keepalive", "SECONDS", "10", read_seconds, "silence after which a client gets a keepalive"),
    Option("idle_timeout", "SECONDS", "600", read_seconds, "silence of upstream after which a request fails"),
    Option("connect_timeout", "SECONDS", "15", read_seconds, "time to connect to upstream"),
    Option("max_body", "SIZE", "128M", read_size, "largest request body, after decompression"),
    Option("max_connections", "N", "512", read_count, "client connections at once; more get 503"),
    Option("compress", "auto|on|off", "auto", one_of("auto", "on", "off"),
           "compress large requests, if zstd is installed; auto: not to an upstream on this host"),
    Option("continuity", "auto|strict", "auto", one_of("auto", "strict"),
           "strict drops every reasoning item and every item id"),
    Option("originator", "WORD", "qoo_bridge",
           read_text("[A-Za-z0-9._-]{1,64}", "1 to 64 letters, digits or . _ -"),
           "the originator sent for clients that are not Codex"),
    Option("client_version", "X.Y.Z", CODEX_VERSION,
           read_text(r"[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.]{1,20})?", "a version such as 1.2.3"),
           "the Codex version sent for clients that are not Codex"),
    Option("log_file", "FILE", "bridge.log", str, "log file, beside the script; - is standard error only"),
    Option("log_level", "LEVEL", "info", one_of("debug", "info", "warning", "error"), "least severe level"),
    Option("tls_cert", "FILE", "", str, "serve https with this certificate chain (PEM)"),
    Option("tls_key", "FILE", "", str, "the certificate's private key (PEM)"),
)


class UsageError(Exception):
    """An option has an invalid value; the message names the option."""


def read_option(option: Option, given: list[str] | None, environ: Mapping[str, str]) -> Any:
    """Read one option: from the command line, else from the environment, else its default.

    Raises UsageError.
    """
    source, texts = option.flag, given
    if not texts:
        text = environ.get(option.variable, "").strip()
        source, text = (option.variable, text) if text else (f"the default of {option.flag}", option.default)
        texts = text.split(",") if option.many else [text]
    try:
        values = [option.read(text.strip()) for text in texts if text.strip() or not option.many]
    except ValueError as exc:
        raise UsageError(f"{source}: {exc}") from exc
    if option.many:
        return tuple(values)
    return values[-1]


def load_config(options: Mapping[str, list[str] | None], environ: Mapping[str, str]) -> Config:
    """Build the Config from the command line (option name -> values) and the environment.

    Raises UsageError.
    """
    values = {option.name: read_option(option, options.get(option.name), environ) for option in OPTIONS}
    defaults = dict(read_pair(text) for text in OPTION["alias"].default.split(","))
    values["alias"] = {**defaults, **dict(values["alias"])}
    values["limit"] = dict(values["limit"])
    if values["auth_file"] == OPTION["auth_file"].default:
        values["auth_file"] = os.path.join(environ.get("CODEX_HOME") or "~/.codex", "auth.json")
    values["auth_file"] = os.path.expanduser(values["auth_file"])
    if values["auth_file"].startswith("~"):
        raise UsageError("this user has no home folder: set HOME or CODEX_HOME, or use --auth-file")
    if not options.get("log_file") and not environ.get(OPTION["log_file"].variable):
        values["log_file"] = os.path.join(os.path.dirname(os.path.abspath(__file__)), values["log_file"])
    if bool(values["tls_cert"]) != bool(values["tls_key"]):
        raise UsageError("--tls-cert and --tls-key must be given together")
    names = [key.name for key in values["api_key"]]
    if len(names) != len(set(names)):
        raise UsageError("--api-key: two keys have the same name")
    return Config(**values)


OPTION = {option.name: option for option in OPTIONS}


PROXY_VARIABLES = ("https_proxy", "all_proxy")  # environment variables, in lower or upper case


def find_proxy(target: Target) -> urllib.parse.SplitResult | None:
    """Return the environment's proxy for an https target (HTTPS_PROXY, NO_PROXY), if any.

    Raises BadUpstream for a proxy that is not http://host:port.
    """
    if target.scheme != "https" or not any(name.lower() in PROXY_VARIABLES for name in os.environ):
        return None
    import urllib.request  # late: the import costs 20 ms, and few hosts need it

    proxies = urllib.request.getproxies_environment()
    address = proxies.get("https") or proxies.get("all")
    if not address or urllib.request.proxy_bypass_environment(target.host):  # type: ignore[attr-defined]
        return None
    return read_proxy(address)


def read_proxy(address: str) -> urllib.parse.SplitResult:
    """Read a proxy's address. Raises BadUpstream, which names the variable and no password."""
    if "://" not in address:
        address = f"http://{address}"
    with contextlib.suppress(ValueError):
        proxy = urllib.parse.urlsplit(address)
        if proxy.scheme == "http" and proxy.hostname and proxy.port != 0:
            return proxy
    spoken = ""
    if address.lower().startswith("socks"):
        spoken = "; SOCKS is not spoken here"
    raise BadUpstream(f"{proxy_variable()} must be http://host:port{spoken}")


def proxy_variable() -> str:
    """Return the name of the variable with the proxy's address; in both spellings the lower one counts."""
    for kind in PROXY_VARIABLES:
        names = [name for name in os.environ if name.lower() == kind and os.environ[name]]
        if names:
            return max(names)
    return PROXY_VARIABLES[0]


def proxy_headers(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    """Return the headers for the proxy itself: its user and password, if its address has them."""
    if proxy.username is None:
        return {}
    user = f"{urllib.parse.unquote(proxy.username)}:{urllib.parse.unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(user.encode()).decode("ascii")}


def sign_in_hint(path: str) -> str:
    """Return what to do about a missing or expired sign-in; `codex login` writes only Codex's own file."""
    host, home, path = socket.gethostname(), os.environ.get("CODEX_HOME") or "~/.codex", os.path.abspath(path)
    login = f"python3 {shlex.quote(os.path.abspath(__file__))} login"
    if path == os.path.abspath(os.path.join(os.path.expanduser(home), "auth.json")):
        return f"run `codex login` on {host}, or `{login}`"
    return f"run `{login} --auth-file {shlex.quote(path)}` on {host}"


###############################################################################
# B  the trust kernel
# May enter: requests to send. Only this part opens a connection, touches auth.json or holds a token.
# May not leave: a token. What leaves is replies, results, and a sign-in's plan, account and expiry.
###############################################################################


# == 9 sockets ================================================================
# Connected non-blocking sockets, and the commands' few network lookups.

HAS_POLL = hasattr(select, "poll")  # false on Windows
NOT_NOW = (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError, InterruptedError)


class Connection:
    """A connected non-blocking socket with a read-ahead buffer. Only one thread may use it."""

    __slots__ = ("_poller", "_receive", "_tls", "_watched", "buffer", "number", "sock")

    def __init__(self, sock: Any) -> None:
        sock.setblocking(False)
        keep_alive(sock)
        self.sock = sock
        self.number = sock.fileno()
        self.buffer = b""
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._receive = sock.read if self._tls else sock.recv  # SSLSocket.recv only calls its read
        self._watched: Connection | None = None
        self._poller: Any = None

    def read(self) -> bytes | None:
        """Return the available bytes, READ_SIZE at most: None for none yet, b"" for the end.

        Raises OSError for a broken connection.
        """
        if self.buffer:
            raw, self.buffer = self.buffer, b""
            return raw
        try:
            received: bytes = self._receive(READ_SIZE)
        except NOT_NOW:
            return None
        except ssl.SSLEOFError:
            return b""  # many peers end without close_notify; the body's framing shows a cut
        if len(received) < LARGE_READ_BYTES or not self._tls:
            return received
        return self._read_on(received)

    def _read_on(self, first: bytes) -> bytes:
        """Read more TLS records behind a large one, because large pieces cost less per byte."""
        pieces, size = [first], len(first)
        with contextlib.suppress(OSError):  # nothing more yet, or an error that the next read will meet again
            while size < READ_SIZE and len(pieces[-1]) >= LARGE_READ_BYTES:
                pieces.append(self._receive(READ_SIZE - size))
                size += len(pieces[-1])
        return b"".join(pieces)

    def has_buffered(self) -> bool:
        """Tell whether bytes wait in this process, where poll() cannot see them."""
        return bool(self.buffer) or (self._tls and self.sock.pending() > 0)

    def unwatch(self) -> None:
        """Stop watching the client."""
        self._poller = self._watched = None

    def wait(self, seconds: float, client: Connection | None = None) -> bool:
        """Wait until this socket is readable; return False after `seconds`.

        Meanwhile watch `client`: read ahead what the client sends. Raises ClientLeft when the client closes
        its connection; a FIN counts as a close.
        """
        if self.buffer or (self._tls and self.sock.pending() > 0):
            return True
        until = time.monotonic() + seconds
        while True:
            own, other = self.poll(max(0.0, seconds), client)
            if own:
                return True
            if other and client is not None:
                client.read_ahead()
            seconds = until - time.monotonic()
            if seconds <= 0 and not other:
                return False

    def receive(self, seconds: float, client: Connection | None = None) -> bytes | None:
        """Return the next bytes: None if none arrive within `seconds`, b"" for the connection's end.

        Raises ClientLeft as `wait` does, and OSError for a broken connection.
        """
        while self.wait(seconds, client):
            raw = self.read()
            if raw is not None:  # None: a part of a TLS record, or a TLS session ticket
                return raw
        return None

    def is_still_open(self) -> bool:
        """Tell whether an unused connection is alive: upstream has neither closed it nor sent data.

        A TLS session ticket makes the socket readable too, so the function must read to know.
        """
        try:
            return not self.wait(0) or self.read() is None
        except OSError:
            return False

    def poll(self, seconds: float, client: Connection | None) -> tuple[bool, bool]:
        """Wait for either socket; return whether this one and whether the client's is readable."""
        if client is not None and len(client.buffer) >= READ_SIZE:
            client = None  # a pipelining client: its next bytes wait in the system's buffer
        if not HAS_POLL:
            socks = [self.sock] if client is None else [self.sock, client.sock]
            readable = select.select(socks, [], [], seconds)[0]
            return self.sock in readable, len(readable) > (self.sock in readable)
        if self._poller is None or self._watched is not client:
            self._poller, self._watched = select.poll(), client
            self._poller.register(self.number, select.POLLIN)
            if client is not None:
                self._poller.register(client.number, select.POLLIN)
        ready = self._poller.poll(seconds * 1000)
        if len(ready) == 1:
            is_this_socket = ready[0][0] == self.number
            return is_this_socket, not is_this_socket
        return bool(ready), bool(ready)

    def raise_if_closed(self) -> None:
        """Read ahead what this client sent. Raises ClientLeft if the client has closed its connection."""
        if len(self.buffer) < READ_SIZE and self.poll(0, None)[0]:
            self.read_ahead()

    def read_ahead(self) -> None:
        """Read what a waiting client sends. Raises ClientLeft if the client has closed its connection."""
        try:
            raw = self.sock.recv(READ_SIZE)
        except (ssl.SSLWantReadError, BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            raise ClientLeft("client_closed") from exc
        if not raw:
            raise ClientLeft("client_closed")
        self.buffer += raw

    def read_head(self, until: float, client: Connection | None = None) -> bytes | None:
        """Read a head until the monotonic time `until`; return it without its empty line.

        Return None if the connection ends before the first byte. Raises TimeoutError, MalformedHttp, OSError
        before the first byte, and EOFError if the connection ends or breaks within the head.
        """
        head = b""
        while True:
            if not self.wait(until - time.monotonic(), client):
                self.buffer = head  # shows which method to answer
                raise TimeoutError
            try:
                raw = self.read()
            except OSError as exc:
                if head:
                    raise EOFError(describe_error(exc)) from exc
                raise
            if raw == b"":
                if head:
                    raise EOFError("the connection ended within the head")
                return None
            if raw:
                self.buffer = head = head + raw  # shows which method to answer, if the head is too long
                end = find_head_end(head, max(0, len(head) - len(raw) - 3))
                self.buffer = b""
                if end >= 0:
                    self.buffer = head[end + 4:]
                    return head[:end]

    def send(self, payload: bytes | memoryview, seconds: float) -> None:
        """Send all bytes.

        Raises OSError; its subclass TimeoutError if the peer accepts no byte for `seconds`.
        """
        try:
            sent = self.sock.send(payload if len(payload) <= SEND_SIZE else memoryview(payload)[:SEND_SIZE])
        except NOT_NOW:
            sent = 0
        if sent < len(payload):
            self._send_rest(memoryview(payload)[sent:], seconds)

    def _send_rest(self, rest: memoryview, seconds: float) -> None:
        """Send the bytes that did not fit at once, waiting while the peer accepts none."""
        until = time.monotonic() + seconds
        while rest:
            try:
                rest = rest[self.sock.send(rest[:SEND_SIZE]):]
                until = 0.0
            except NOT_NOW:
                until = until or time.monotonic() + seconds
                if not wait_writable([self.sock], until - time.monotonic()):
                    raise TimeoutError("the peer accepted no data in time") from None

    def close(self) -> None:
        """Close the socket; the system still sends its buffered bytes."""
        with contextlib.suppress(OSError):
            self.sock.close()


def keep_alive(sock: Any) -> None:
    """Have the system notice, within half a minute, a line that died silently (sleep, NAT, Wi-Fi)."""
    for level, option, value in LINE_OPTIONS:
        with contextlib.suppress(OSError):  # not a TCP socket, or an old system
            sock.setsockopt(level, option, value)


def start_thread(name: str, target: Callable[..., None], *arguments: Any) -> bool:
    """Run a function in a daemon thread; False if the system has no thread left (--pids-limit, ulimit)."""
    try:
        threading.Thread(target=target, args=arguments, name=name, daemon=True).start()
        return True
    except RuntimeError as exc:
        log.warning("cannot start the thread %s: %s", name, exc)
        return False


def line_options() -> list[tuple[int, int, int]]:
    """Return the socket options for `keep_alive`, by the names that this system has."""
    tcp = {"TCP_KEEPIDLE": KEEPALIVE_IDLE, "TCP_KEEPALIVE": KEEPALIVE_IDLE,  # macOS's name
           "TCP_KEEPINTVL": KEEPALIVE_INTERVAL, "TCP_KEEPCNT": KEEPALIVE_PROBES,
           "TCP_USER_TIMEOUT": USER_TIMEOUT_MS}
    numbers = {vars(socket)[name]: value for name, value in tcp.items() if name in vars(socket)}
    if sys.platform == "darwin":
        numbers.update({0x10: KEEPALIVE_IDLE, 0x80: USER_TIMEOUT_MS // 1000})  # 3.9 lacks the first's name
    elif sys.platform == "win32":
        numbers[5] = USER_TIMEOUT_MS // 1000  # TCP_MAXRT
    options = [(socket.IPPROTO_TCP, number, value) for number, value in numbers.items()]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *options]


LINE_OPTIONS = line_options()


def connect_first(addresses: list[Any], seconds: float) -> socket.socket:
    """Connect to the first of getaddrinfo's addresses that answers; each further one starts a moment later.

    So a host with a dead address costs NEXT_ADDRESS_SECONDS, not `seconds` (RFC 8305). Raises OSError;
    TimeoutError if none answers in `seconds`.
    """
    error: OSError = TimeoutError("timed out")
    until, waiting = time.monotonic() + seconds, list(addresses)
    trying: list[socket.socket] = []
    try:
        while trying or waiting:
            if waiting:
                try:
                    trying.append(begin_connect(waiting.pop(0)))
                except OSError as exc:
                    error = exc
                    continue
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            for sock in wait_writable(trying, min(left, NEXT_ADDRESS_SECONDS) if waiting else left):
                trying.remove(sock)
                failure = connect_error(sock)
                if failure is None:
                    sock.settimeout(seconds)
                    return sock
                error = failure
                sock.close()
        raise error
    finally:
        for sock in trying:
            sock.close()


def begin_connect(entry: Any) -> socket.socket:
    """Begin to connect to one of getaddrinfo's entries; a later failure shows as readiness.

    Raises OSError: this host has no such addresses, or no route to this one.
    """
    family, socket_type, protocol, _, address = entry
    sock = socket.socket(family, socket_type, protocol)
    sock.setblocking(False)
    number = sock.connect_ex(address)
    if number not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
        sock.close()
        raise OSError(number, os.strerror(number))
    return sock


def connect_error(sock: socket.socket) -> OSError | None:
    """Return why a try to connect has failed; None if it has not."""
    try:
        sock.getpeername()
    except OSError:
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNREFUSED
        return OSError(number, os.strerror(number))
    return None


def wait_writable(socks: list[socket.socket], seconds: float) -> list[socket.socket]:
    """Return those of the sockets that take bytes, or have failed; wait up to `seconds` for one."""
    seconds = max(0.0, seconds)
    if not HAS_POLL:
        _, writable, failed = select.select([], socks, socks, seconds)
        return [sock for sock in socks if sock in writable or sock in failed]
    poller = select.poll()
    for sock in socks:
        poller.register(sock, select.POLLOUT)
    ready = {number for number, _ in poller.poll(seconds * 1000)}
    return [sock for sock in socks if sock.fileno() in ready]


def linger(connection: Connection) -> None:
    """End a connection without losing the response: read the client's last bytes for up to a second."""
    try:
        socket.socket.shutdown(connection.sock, socket.SHUT_WR)  # not SSLSocket's own, see shut_down
        until = time.monotonic() + 1
        while (left := until - time.monotonic()) > 0 and connection.wait(left):
            if connection.read() == b"":
                break
    except OSError:
        pass


def shut_down(sock: Any) -> None:
    """Shut down a connection that another thread reads; that thread sees the end and closes it."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # SSLSocket's own would drop TLS under the reader


def lan_address() -> str:
    """Return this host's address on its LAN. Connecting a UDP socket finds the route and sends nothing."""
    for family, probe in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((probe, 9))
            return str(sock.getsockname()[0])
    return "127.0.0.1"


def resolve_host(host: str, port: int) -> list[str]:
    """Return a host name's addresses. Raises BadUpstream."""
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise BadUpstream(f"cannot resolve {host}: {describe_error(exc)}") from exc
    return sorted({str(entry[4][0]) for entry in entries})


def check_can_listen(host: str, port: int) -> None:
    """Bind to an address for a moment. Raises OSError if that fails."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        if os.name != "nt":  # on Windows SO_REUSEADDR would let two programs share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))


class Reply:
    """Upstream's reply: its head, and its body piece by piece."""

    def __init__(self, connection: Connection, target: Target, head: ReplyHead, method: str,
                 release: Callable[[Target, Connection], None]) -> None:
        self.connection = connection
        self.target = target
        self.status = head.status
        self.headers = head.headers
        self.body = reply_body(head, method)
        self._release = release
        self._reusable = keeps_connection(head.minor, head.headers) and head.status != 101
        self._closed = False

    def read(self, seconds: float, client: Connection | None = None) -> bytes | None:
        """Return the next piece of the body: b"" at its end, None if no piece arrives within `seconds`.

        Raises ClientLeft, and BadUpstream if the body is truncated or malformed.
        """
        while not self.body.done:
            try:
                raw = self.connection.receive(seconds, client)
                payload = self.body.feed(raw) if raw else b""
            except (OSError, MalformedHttp) as exc:
                self.close()
                reason = describe_error(exc)
                raise BadUpstream(f"upstream closed the connection mid-response: {reason}") from exc
            if raw is None or payload:
                return raw and payload
            if not raw:
                self.close()
                if not isinstance(self.body, CloseBody):
                    raise BadUpstream("upstream closed the connection mid-response")
                self.body.done = True
        return b""

    def read_body(self, limit: int, seconds: float, client: Connection | None = None) -> bytes:
        """Return the body, truncated at `limit` bytes. Raises BadUpstream and UpstreamTimeout."""
        pieces, size, until = [], 0, time.monotonic() + seconds
        while size < limit:
            piece = self.read(max(0.0, until - time.monotonic()), client)
            if piece is None:
                self.close()
                raise UpstreamTimeout(f"upstream did not finish its response within {seconds:g} s")
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)[:limit]

    def read_all(self, limit: int, seconds: float) -> BufferedReply:
        """Return the reply with its body, and release the connection. Raises what `read_body` raises."""
        with self:
            return BufferedReply(self.status, self.headers, self.read_body(limit, seconds))

    def tls(self) -> tuple[str, str] | None:
        """Return the TLS version and the certificate's issuer; None without TLS."""
        sock = self.connection.sock
        if not isinstance(sock, ssl.SSLSocket):
            return None
        certificate: Any = sock.getpeercert() or {}
        names = dict(pair for group in certificate.get("issuer", ()) for pair in group)
        issuer = ", ".join(names[key] for key in ("organizationName", "commonName") if key in names)
        return sock.version() or "TLS", issuer

    def finish(self) -> None:
        """Release the connection if the body ends within AFTER_TERMINAL seconds; else close it."""
        if self._closed:
            return
        until = time.monotonic() + AFTER_TERMINAL
        with contextlib.suppress(BadUpstream):
            while not self.body.done and time.monotonic() < until:
                if self.read(until - time.monotonic()) in (None, b""):
                    break
        if self.body.done and self._reusable and not self.body.rest and not self._closed:
            self._closed = True
            self.connection.unwatch()
            self._release(self.target, self.connection)
        else:
            self.close()

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: Any) -> None:
        """Release the connection if the reply's body was read to its end; else close it."""
        if exc_type is None or (self.body.done and issubclass(exc_type, BridgeError)):
            self.finish()
        else:
            self.close()

    def close(self) -> None:
        """Close the connection, so that upstream stops working on the reply."""
        if not self._closed:
            self._closed = True
            self.connection.close()


# == 10 upstream ==============================================================
# The only room that opens connections: pool, TLS, proxy, retry after a stale connection. Exceptions of
# socket, ssl and http.client become part A's errors here. http.client connects; room http reads.

class TlsSocket(ssl.SSLSocket):
    """A socket whose peer may be gone before the handshake: up to 3.12 wrap_socket() loses one open then."""

    def getpeername(self) -> Any:
        """Return the peer's address; "" for a peer that is gone, so that the handshake fails, and closes."""
        try:
            return super().getpeername()
        except OSError:
            return ""


class Upstream:
    """A pool of connections to upstream, which opens, keeps and reuses them.

    `_lock` guards the pool. Any thread may call any method.
    """

    def __init__(self, connect_timeout: float, idle_timeout: float,
                 count: Callable[[str], None] = lambda name: None, own_bridge: bool = False) -> None:
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._count = count
        self._own_bridge = own_bridge  # the target is this host's own bridge: no proxy, any certificate
        self._lock = threading.Lock()
        self._idle: list[tuple[float, Target, Connection]] = []  # since when (monotonic); newest last
        self._offset = time.time() - time.monotonic()  # when a connection was last kept
        self._answered: dict[tuple[str, int], Any] = {}  # host and port -> the address that worked last
        self._context: ssl.SSLContext | None = None
        self._opening: set[Target] = set()  # connections being opened ahead
        self._closed = False

    def request(self, method: str, url: str, headers: Mapping[str, str], body: bytes = b"",
                client: Connection | None = None, timeout: float | None = None) -> Reply:
        """Send one request and return the reply, with its body unread.

        `timeout` is in seconds (None: --idle-timeout). If a kept connection closes before the reply's first
        byte, the request is sent once more on a new one. Raises BadUpstream, UpstreamTimeout and ClientLeft.
        """
        outgoing = outgoing_request(method, url, headers, body, timeout or self._idle_timeout)
        kept = self._take(outgoing.target)
        while True:
            connection = kept or self._connect(outgoing.target)
            try:
                if len(body) < READ_SIZE:
                    connection.send(outgoing.head + body, outgoing.timeout)
                else:
                    connection.send(outgoing.head, outgoing.timeout)
                    connection.send(body, outgoing.timeout)
            except OSError as exc:
                if kept is not None and line_broke(exc):
                    connection.close()
                    kept = None
                    continue
                # If upstream stops reading, it may already have answered (such as 413): read that.
                if not isinstance(exc, (BrokenPipeError, ConnectionResetError)):
                    raise self._broken(connection, outgoing, exc) from exc
            reply = self._read_reply(connection, outgoing, client, kept is not None)
            if reply is not None:
                return reply
            kept = None

    def fetch(self, method: str, url: str, headers: Mapping[str, str], body: bytes = b"",
              timeout: float = 10) -> BufferedReply:
        """Send a request and read its complete reply within `timeout` seconds.

        Raises BadUpstream and UpstreamTimeout.
        """
        headers = {"accept": "application/json", **headers}
        return self.request(method, url, headers, body, timeout=timeout).read_all(MAX_REPLY, timeout)

    def open_ahead(self, target: Target) -> None:
        """Open one connection in the background for the next request, unless one is kept or being opened."""
        with self._lock:
            if target in self._opening or any(kept == target for _, kept, _ in self._idle):
                return
            self._opening.add(target)
        if not start_thread("open-ahead", self._open_ahead, target):
            with self._lock:
                self._opening.discard(target)

    def close(self) -> None:
        """Close the kept connections, and keep none from now on."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for _, _, connection in idle:
            connection.close()

    def kept(self) -> int:
        """Return the number of unused connections."""
        with self._lock:
            return len(self._idle)

    def _open_ahead(self, target: Target) -> None:
        try:
            self._release(target, self._connect(target))
        except BridgeError as exc:
            log.debug("cannot open a connection ahead: %s", exc.message)
        finally:
            with self._lock:
                self._opening.discard(target)

    def _take(self, target: Target) -> Connection | None:
        """Take the newest kept connection that is still alive."""
        while True:
            with self._lock:
                places = [place for place, (_, kept, _) in enumerate(self._idle) if kept == target]
                if not places:
                    return None
                since, _, connection = self._idle.pop(places[-1])
                fresh = since > time.monotonic() - POOL_IDLE and not self._has_slept()
            if fresh and connection.is_still_open():
                self._count("upstream_reused")
                return connection
            connection.close()

    def _has_slept(self) -> bool:
        """Tell whether the host has slept since a connection was kept: a line that died then looks alive.

        The monotonic clock stands still in sleep, the wall clock does not. The caller holds `_lock`.
        """
        return abs(time.time() - time.monotonic() - self._offset) > CLOCK_GAP

    def prune(self) -> None:
        """Close the kept connections that upstream has closed, or that are too old."""
        with self._lock:
            idle, self._idle = self._idle, []
            oldest = float("inf") if self._has_slept() else time.monotonic() - POOL_IDLE
        alive = [entry for entry in idle if entry[0] > oldest and entry[2].is_still_open()]
        with self._lock:
            if self._closed:
                alive = []
            self._idle = alive + self._idle
        for entry in idle:
            if entry not in alive:
                entry[2].close()

    def _release(self, target: Target, connection: Connection) -> None:
        """Keep a connection for the next request; close expired ones, and the oldest beyond POOL_SIZE."""
        gone: list[tuple[float, Target, Connection]] = []
        now = time.monotonic()
        with self._lock:
            if self._has_slept():
                gone, self._idle = self._idle, []
            self._offset = time.time() - now
            self._idle.append((now, target, connection))
            while self._idle and (self._closed or len(self._idle) > POOL_SIZE
                                  or self._idle[0][0] <= now - POOL_IDLE):
                gone.append(self._idle.pop(0))
        for _, _, old in gone:
            old.close()

    def _connect(self, target: Target) -> Connection:
        """Open a connection, through the environment's proxy if it names one."""
        self._count("upstream_opened")
        proxy = None if self._own_bridge else find_proxy(target)
        host, port = (proxy.hostname or "", proxy.port or 80) if proxy else (target.host, target.port)
        where = f"the proxy {authority(host, port)} ({proxy_variable()})" if proxy else host
        connection: http.client.HTTPConnection
        if target.scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=self._connect_timeout,
                                                     context=self._tls())
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self._connect_timeout)
        try:
            connection._create_connection = self._open_socket  # type: ignore[attr-defined]  # its only hook
            if proxy:
                connection.set_tunnel(target.host, target.port, proxy_headers(proxy))
            connection.connect()
        except (OSError, http.client.HTTPException, ValueError) as exc:
            connection.close()
            traceback.clear_frames(exc.__traceback__)  # up to 3.11 a failed tunnel's reply keeps its socket
            if isinstance(exc, (TimeoutError, socket.timeout)):  # two classes up to Python 3.9
                raise UpstreamTimeout(f"{where} did not answer within {self._connect_timeout:g} s") from exc
            raise BadUpstream(f"cannot connect to {where}: {describe_error(exc)}") from exc
        return Connection(connection.sock)

    def _open_socket(self, address: tuple[str, int], timeout: float, _: Any = None) -> socket.socket:
        """Connect for http.client: to the address that worked last, else to the first that answers."""
        addresses = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        addresses.sort(key=lambda entry: entry[4] != self._answered.get(address))
        sock = connect_first(addresses, timeout)
        try:
            self._answered[address] = sock.getpeername()
        except OSError:  # the peer is gone again: Python's own TLS would leave such a socket open
            sock.close()
            raise
        return sock

    def _tls(self) -> ssl.SSLContext:
        """Return the TLS context, which verifies certificates; OpenSSL itself reads SSL_CERT_FILE."""
        with self._lock:
            if self._context is None:
                self._context = ssl.create_default_context()
                self._context.sslsocket_class = TlsSocket
                self._context.minimum_version = ssl.TLSVersion.TLSv1_2
                self._context.set_alpn_protocols(["http/1.1"])
                if self._own_bridge:
                    self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE
            return self._context

    def _read_reply(self, connection: Connection, outgoing: OutgoingRequest, client: Connection | None,
                    reused: bool) -> Reply | None:
        """Read the reply's head; return None if a reused connection closed before the first byte."""
        until, begun = time.monotonic() + outgoing.timeout, False
        try:
            while raw := connection.read_head(until, client):
                begun = True
                reply = Reply(connection, outgoing.target, parse_reply(raw), outgoing.method, self._release)
                if reply.status >= 200 or reply.status == 101:
                    return reply
                if time.monotonic() > until:  # endless 1xx replies
                    raise TimeoutError
            raise ConnectionResetError("closed the connection without a response")
        except (OSError, EOFError, MalformedHttp) as exc:
            if reused and not begun and line_broke(exc):
                connection.close()
                return None
            raise self._broken(connection, outgoing, exc) from exc
        except BaseException:
            connection.close()
            raise

    @staticmethod
    def _broken(connection: Connection, outgoing: OutgoingRequest, exc: Exception) -> BridgeError:
        """Close a connection that failed before the reply's head; return the error for the client."""
        connection.close()
        host = outgoing.target.host
        if is_own_timeout(exc):
            return UpstreamTimeout(f"{host} did not answer within {outgoing.timeout:g} s")
        return BadUpstream(f"{host} failed before it responded: {describe_error(exc)}")


def is_own_timeout(exc: Exception) -> bool:
    """Tell a wait of ours that ended from the system's ETIMEDOUT, which means a dead line."""
    return isinstance(exc, TimeoutError) and exc.errno is None


def line_broke(exc: Exception) -> bool:
    """Tell whether a connection broke, for whatever reason the system gives."""
    return isinstance(exc, OSError) and not is_own_timeout(exc)


# == 11 sign-in ===============================================================
# The only reader and writer of auth.json. A refresh token works once, and Codex on this host may refresh too.
# So: reread the file first, hold auth.lock, compare before the write, never lose a new token (WIRE 2).

Fetch = Callable[..., BufferedReply]  # Upstream.fetch: method, url, headers, body, timeout


class SignIn(NamedTuple):
    """The facts about a sign-in, without its tokens, which stay in this part."""

    account: str  # ChatGPT's account id; "" if neither the file nor a claim names one
    plan: str
    email: str
    expires: float  # Unix time in seconds; 0 if unknown
    renewable: bool  # the sign-in has a refresh token


class Tokens(NamedTuple):
    """A sign-in with its secrets. Only the rooms sign-in and account may use it."""

    access_token: str
    refresh_token: str
    fedramp: bool
    sign_in: SignIn

    def __repr__(self) -> str:
        return f"Tokens({self.sign_in!r}, …)"

    def headers(self) -> dict[str, str]:
        """Return the request headers that carry the sign-in (WIRE 2)."""
        headers = {"authorization": f"Bearer {self.access_token}"}
        if self.sign_in.account:
            headers["chatgpt-account-id"] = self.sign_in.account
        if self.fedramp:
            headers["x-openai-fedramp"] = "true"
        return headers


def timestamp() -> str:
    """Return the current time in the format of auth.json's last_refresh."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{time.time_ns() % 10**9:09d}Z"


def read_tokens(content: Any, path: str) -> Tokens:
    """Check auth.json's content and return its tokens.

    Raises NotSignedIn, whose message says what is wrong and what to do.
    """
    if not isinstance(content, dict):
        raise NotSignedIn(f"{path} is not a JSON object; {sign_in_hint(path)}")
    mode, tokens = content.get("auth_mode"), or_empty(content.get("tokens"), dict)
    if mode is not None and not (isinstance(mode, str) and mode.lower().startswith("chatgpt")):
        raise NotSignedIn(f"{path} has auth_mode {mode!r}, not a ChatGPT plan; {sign_in_hint(path)}")
    access, refresh = (visible_ascii(tokens.get(name)) for name in ("access_token", "refresh_token"))
    if not access:
        raise NotSignedIn(f"{path} has no ChatGPT access token; {sign_in_hint(path)}")
    identity = jwt_claims(tokens.get("id_token"))
    own = or_empty(jwt_claims(access).get(AUTH_CLAIM), dict)
    claims = {**own, **or_empty(identity.get(AUTH_CLAIM), dict)}
    named = (tokens.get("account_id"), claims.get("chatgpt_account_id"), own.get("chatgpt_account_id"))
    account = next(filter(None, map(visible_ascii, named)), "")
    sign_in = SignIn(
        account=account, plan=or_empty(claims.get("chatgpt_plan_type"), str),
        email=or_empty(identity.get("email"), str), expires=token_expiry(access, content),
        renewable=bool(refresh))
    return Tokens(access, refresh, claims.get("chatgpt_account_is_fedramp") is True, sign_in)


def token_expiry(access_token: str, content: Mapping[str, Any]) -> float:
    """Return a token's expiry in Unix seconds, from its `exp` or last_refresh; 0 if both are missing."""
    expires = finite_number(jwt_claims(access_token).get("exp")) or 0
    if expires > 0:
        return float(expires)
    written = unix_time(content.get("last_refresh"))
    if written:
        return written + TOKEN_AGE
    return 0.0


@contextlib.contextmanager
def file_lock(path: str, seconds: float = LOCK_SECONDS) -> Iterator[bool]:
    """Hold the lock that Codex holds during a refresh, tried for `seconds`; yield whether it is held.

    BSD flock, on Windows msvcrt's. Without the lock the work goes on: rereading and comparing still protect
    the file.
    """
    handle = -1
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if os.geteuid() == 0:  # the Codex of the folder's owner must be able to open it; not on Windows
            folder = os.stat(os.path.dirname(path) or ".")
            os.fchown(handle, folder.st_uid, folder.st_gid)
    try:
        held = handle >= 0 and _lock(handle, seconds)
        if not held and seconds:  # without seconds to wait for it, the log has told this before
            log.warning("cannot lock %s: refreshing without the lock", path)
        yield held
    finally:
        if handle >= 0:
            os.close(handle)  # this also releases the lock


def _lock(handle: int, seconds: float) -> bool:
    """Take an exclusive lock within `seconds`; tell whether that succeeded."""
    until = time.monotonic() + seconds
    while True:
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            return True
        except OSError:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)


def write_private(path: str, content: Mapping[str, Any]) -> Any:
    """Replace a JSON file atomically, with mode 0600 and the same owner; return its new signature.

    A file that cannot be replaced (in a folder that cannot be written, or mounted by itself) is written in
    place. Raises OSError; the old file is then unchanged.
    """
    path = os.path.realpath(path)  # a symbolic link stays one
    remove_leftovers(os.path.dirname(path))
    text = json.dumps(content, indent=2).encode("ascii")
    temporary = os.path.join(os.path.dirname(path), f".auth-{os.urandom(8).hex()}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        with contextlib.suppress(OSError, AttributeError):  # a new file; Windows
            owner = os.stat(path)
            if os.geteuid() == 0:
                os.chown(temporary, owner.st_uid, owner.st_gid)
        signature = file_signature(temporary)
        replace_file(temporary, path)
        return signature
    except OSError as exc:
        remove_file(temporary)
        if exc.errno not in NOT_REPLACEABLE or not os.path.exists(path):
            raise
    except BaseException:
        remove_file(temporary)
        raise
    with open(path, "r+b") as file:
        file.write(text)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
        return file_signature(file.fileno())


def replace_file(temporary: str, path: str) -> None:
    """Put a file in another's place; on Windows, where an open file blocks that, try for a second."""
    until = time.monotonic() + REPLACE_SECONDS
    while True:
        try:
            return os.replace(temporary, path)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > until:
                raise
            time.sleep(0.05)


def remove_file(path: str) -> None:
    """Remove a file, if it is there and that can be done."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def remove_leftovers(folder: str) -> None:
    """Remove the temporary files of a program that was killed while it wrote: they hold tokens."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if re.fullmatch(r"\.auth-[0-9a-f]{16}", name) and time.time() - os.stat(path).st_mtime > 60:
                remove_file(path)


def file_signature(path: str | int) -> Any:
    """Return a value that changes when the file changes; None only for a file that is not there."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        return exc.errno
    return status.st_mtime_ns, status.st_size, status.st_ino


def lock_path(auth_file: str) -> str:
    """Return the path of Codex's lock file for an auth.json."""
    return os.path.join(os.path.dirname(auth_file) or ".", "auth.lock")


class Credentials:
    """This host's sign-in, reread when the file changes and refreshed before it expires.

    `_lock` guards every field; no thread holds it during network I/O. A thread holds `_refreshing` during
    its refresh; other threads that need a new token wait for that thread, then use its token.
    """

    def __init__(self, path: str, issuer: str, fetch: Fetch,
                 on_refresh: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self._issuer = issuer
        self._fetch = fetch
        self._on_refresh = on_refresh
        self._lock = threading.RLock()
        self._refreshing = threading.Lock()
        self._signature: Any = UNREAD  # the file's signature when it was last read
        self._content: dict[str, Any] = {}  # the file's content, with unknown keys
        self._tokens: Tokens | None = None
        self._problem = ""  # why the file is not a usable sign-in
        self._torn = False  # _problem: the file is empty or truncated
        self._unreadable = False  # _problem: the file cannot be opened
        self._reread_at = 0.0  # monotonic; when to reread the file even if it looks unchanged
        self._dead: dict[str, str] = {}  # refresh token -> why it was refused permanently; one entry
        self._retry_at = 0.0  # monotonic; no refresh before this time, after a temporary failure
        self._ahead_at = 0.0  # monotonic; no early refresh before this time, after one failed
        self._lock_seconds = float(LOCK_SECONDS)  # how long the next refresh tries for Codex's lock
        self._spent: set[str] = set()  # refresh tokens that this process has redeemed
        self._received = ("", 0.0)  # the newest access token that this process got, and when (monotonic)
        self._unsaved = False  # the tokens are newer than the file, which could not be written
        self._save_at = 0.0  # monotonic; when to try again to write them
        self._save_failed = False  # the last try to write them failed, and the log says so

    def current(self) -> SignIn:
        """Return the facts about the file's sign-in, without a refresh. Raises NotSignedIn."""
        return self.current_tokens().sign_in

    def reread(self) -> None:
        """Reread the file at its next use, even if it looks unchanged."""
        self._signature = UNREAD

    def current_tokens(self) -> Tokens:
        """Return the newest tokens, without a refresh. Raises NotSignedIn."""
        with self._lock:
            self._read()
            if self._problem and not self._torn and not self._unreadable:
                self._unsaved = False  # the person has signed out: tokens in memory must not undo that
            if self._unsaved and time.monotonic() >= self._save_at:
                self._write()
            if (self._problem and not self._unsaved) or self._tokens is None:
                raise NotSignedIn(self._problem)
            return self._tokens

    def finish(self, seconds: float) -> None:
        """Wait for a refresh that is under way, at most so long; write tokens that are not written yet."""
        if self._refreshing.acquire(timeout=seconds):
            self._refreshing.release()
        with self._lock:
            if self._unsaved:
                self._save_at, self._save_failed = 0.0, False
                with contextlib.suppress(NotSignedIn):
                    self.current_tokens()

    def is_refreshing(self) -> bool:
        """Tell whether a refresh is under way, whose tokens would be lost with this program."""
        return self._refreshing.locked()

    def bearer(self) -> Tokens:
        """Return tokens to send; refresh them first if they expire within TOKEN_MARGIN.

        If that early refresh fails, return the old token, which may still work. Raises NotSignedIn.
        """
        tokens = self.current_tokens()
        left = self._seconds_left(tokens)
        if left > TOKEN_MARGIN or not tokens.refresh_token:
            return tokens
        if left > URGENT_SECONDS and time.monotonic() < self._ahead_at:
            return tokens  # a sign-in server that hangs must not delay every request
        if not self._refreshing.acquire(blocking=left < URGENT_SECONDS):
            return tokens  # another thread is refreshing, and this token is still valid
        try:
            return self._refresh(tokens, "proactive_expiry")
        except BridgeError as exc:
            log.warning("early token refresh failed; using the old token: %s", exc.message)
            self._ahead_at = time.monotonic() + AHEAD_PAUSE_SECONDS
            if left <= 0 and isinstance(exc, NotSignedIn):
                raise
            return tokens
        finally:
            self._refreshing.release()

    def _seconds_left(self, tokens: Tokens) -> float:
        """Return how long tokens are still valid; infinity where that is unknown."""
        expires, (received, since) = tokens.sign_in.expires, self._received
        if tokens.access_token == received and time.monotonic() < since + TOKEN_TRUST:
            return float("inf")  # it was just received: if it looks expired, this host's clock is wrong
        return expires - time.time() if expires else float("inf")

    def after_401(self, refused: Tokens) -> Tokens:
        """Return newer tokens than `refused`, which upstream refused.

        Reread the file first, because another program may have refreshed; else refresh, once for all threads.
        Raises NotSignedIn, and BadUpstream or UpstreamTimeout if the sign-in server fails.
        """
        with self._refreshing:
            return self._refresh(refused, "unauthorized_recovery")

    def _read(self) -> None:
        """Read the file if it changed; retry a truncated or missing file for TORN_SECONDS."""
        signature = file_signature(self.path)
        if signature == self._signature and time.monotonic() < self._reread_at:
            return
        until = time.monotonic() + TORN_SECONDS
        problem = self._read_once(signature)
        while problem and (signature or self._tokens) and time.monotonic() < until:
            time.sleep(0.005)
            signature = file_signature(self.path)
            problem = self._read_once(signature)
        self._signature, self._problem = signature, problem
        # An unreadable file may become readable while its signature stays the same.
        self._reread_at = time.monotonic() + REFRESH_PAUSE if self._unreadable else float("inf")

    def _read_once(self, signature: Any) -> str:
        """Read the file into this object's fields; return the problem, "" if the file is valid."""
        self._torn = self._unreadable = False
        if signature is None:
            return (f"not signed in: {self.path} does not exist, or Codex keeps the sign-in in the system "
                    "keyring (set `cli_auth_credentials_store = \"file\"` in config.toml); "
                    + sign_in_hint(self.path))
        try:
            with open(self.path, "rb") as file:
                content = json.loads(file.read(MAX_REPLY))
            tokens = read_tokens(content, self.path)
        except OSError as exc:
            self._unreadable = True
            return f"cannot read {self.path}: {exc.strerror}"
        except (ValueError, RecursionError):
            self._torn = True
            return f"{self.path} is empty or truncated JSON; {sign_in_hint(self.path)}"
        except NotSignedIn as exc:
            return exc.message
        if tokens.refresh_token in self._spent:  # memory has newer tokens; other programs' keys are kept
            newer = {key: self._content[key] for key in ("tokens", "last_refresh")}
            self._content, self._unsaved = {**content, **newer}, True
        else:
            self._content, self._tokens, self._unsaved = content, tokens, False
        return ""

    def _refresh(self, old: Tokens, reason: str) -> Tokens:
        """Return newer tokens than `old`: another thread's or program's, else refreshed ones.

        The caller holds `_refreshing`. This holds Codex's lock during reread, refresh and write (WIRE 2).
        """
        tokens = self.current_tokens()
        if tokens.access_token != old.access_token:
            return tokens  # another thread has refreshed
        if tokens.refresh_token in self._dead or not tokens.refresh_token:
            refused = self._dead.get(tokens.refresh_token)
            raise NotSignedIn(refused or f"the sign-in has expired; {sign_in_hint(self.path)}")
        if time.monotonic() < self._retry_at:
            raise BadUpstream(f"the sign-in server did not refresh the token; retry in {REFRESH_PAUSE:g} s")
        try:
            with file_lock(lock_path(self.path), self._lock_seconds) as held:
                self._lock_seconds = float(LOCK_SECONDS) if held else 0.0  # a broken lock costs once
                tokens = self.current_tokens()
                if tokens.access_token != old.access_token:
                    return tokens  # another program has refreshed
                return self._redeem_refresh_token(tokens, reason)
        except NotSignedIn:
            return self._await_newer(old)

    def _await_newer(self, old: Tokens) -> Tokens:
        """After a final refusal, wait for another program to write newer tokens. Raises NotSignedIn."""
        until = time.monotonic() + REUSED_SECONDS
        while True:
            tokens = self.current_tokens()
            if tokens.access_token != old.access_token:
                return tokens
            if time.monotonic() > until:
                raise NotSignedIn(self._dead.get(old.refresh_token, self._problem))
            time.sleep(0.05)

    def _redeem_refresh_token(self, old: Tokens, reason: str) -> Tokens:
        """Exchange the refresh token for new tokens, and save those. Raises BridgeError."""
        request = {"client_id": CLIENT_ID, "grant_type": "refresh_token", "refresh_token": old.refresh_token,
                   "refresh_reason": reason}
        try:
            headers = {"content-type": "application/json", "user-agent": USER_AGENT}
            reply = self._fetch("POST", f"{self._issuer}/oauth/token", headers, json_bytes(request), 30)
        except BridgeError:
            self._retry_at = time.monotonic() + REFRESH_PAUSE
            raise
        self._on_refresh()
        granted = reply.json()
        fresh = {key: granted[key] for key in ("id_token", "access_token", "refresh_token")
                 if isinstance(granted.get(key), str) and granted[key]}
        if reply.status == 200 and fresh:
            with self._lock:
                return self._save(old, fresh)
        raise self._refusal(old, reply)

    def _refusal(self, old: Tokens, reply: BufferedReply) -> BridgeError:
        """Return the error of a refused refresh: NotSignedIn if permanent, BadUpstream if temporary."""
        parsed = reply.json()
        error = parsed.get("error")
        code = error.get("code") if isinstance(error, dict) else error or parsed.get("code")
        if reply.status == 401 or (reply.status == 400 and code == "invalid_grant") or code in FINAL_REFUSALS:
            message = f"the refresh token was refused ({code or reply.status}): {sign_in_hint(self.path)}"
            self._dead = {old.refresh_token: message}
            return NotSignedIn(message)
        self._retry_at = time.monotonic() + REFRESH_PAUSE
        return BadUpstream(f"the sign-in server answered {reply.status}")

    def _save(self, old: Tokens, fresh: dict[str, str]) -> Tokens:
        """Save new tokens in place of `old`, unless another program wrote the file meanwhile."""
        self._read()
        if self._problem and not self._torn and not self._unreadable:
            raise NotSignedIn(self._problem)  # the person has signed out or changed the sign-in: keep that
        if not self._problem and self._tokens and self._tokens.refresh_token != old.refresh_token:
            return self._tokens  # another program wrote a newer sign-in
        stamp = timestamp()
        content = {**self._content, "tokens": {**self._content["tokens"], **fresh}, "last_refresh": stamp}
        tokens = read_tokens(content, self.path)
        if tokens.refresh_token != old.refresh_token:
            self._spent.add(old.refresh_token)
        self._content, self._tokens, self._problem = content, tokens, ""
        self._received = (tokens.access_token, time.monotonic())
        self._unsaved = True
        self._write()
        return tokens

    def _write(self) -> None:
        """Write the tokens in memory; after a failure they are kept, and written later."""
        try:
            self._signature = write_private(self.path, self._content)
            if self._save_failed:
                log.warning("the refreshed token is saved to %s now", self.path)
            self._unsaved, self._save_failed, self._problem = False, False, ""
        except OSError as exc:
            # The old refresh token is used up, so the new one must survive in memory.
            level = logging.DEBUG if self._save_failed else logging.ERROR
            log.log(level, "cannot save the refreshed token to %s (%s): it is only in memory; next try "
                    "in %g s", self.path, exc.strerror, SAVE_PAUSE)
            self._save_at, self._save_failed = time.monotonic() + SAVE_PAUSE, True


# == 12 login =================================================================
# The device sign-in of WIRE 2, for a host without a browser, and what doctor asks of auth.json.

def device_sign_in(fetch: Fetch, issuer: str, path: str, show: Callable[[str], None]) -> SignIn:
    """Sign in with a code that a person types in any browser, and write auth.json (WIRE 2).

    `show` gets the text for the person. Raises BridgeError, and OSError if the file cannot be written.
    """
    url = f"{issuer}/api/accounts/deviceauth/usercode"
    reply = post_to_issuer(fetch, url, {"client_id": CLIENT_ID})
    if reply.status == 404:
        raise NotSignedIn("device sign-in is not enabled for this account or workspace: enable it in "
                          "ChatGPT's security settings (or ask the administrator), or use `codex login`")
    device = required_strings(url, reply, "device_auth_id", "user_code")
    show(f"Open {issuer}/codex/device in any browser,\nsign in to ChatGPT and type the code\n\n"
         f"    {device['user_code']}\n\nThe code expires in 15 minutes; Ctrl-C cancels.")
    interval = str(reply.json().get("interval"))
    seconds = POLL_SECONDS
    if re.fullmatch(r"[0-9]{1,2}", interval):
        seconds = float(interval)
    granted = poll_for_code(fetch, issuer, device, max(seconds, 0.1))
    payload = {"grant_type": "authorization_code", "client_id": CLIENT_ID,
               "code": granted["authorization_code"], "code_verifier": granted["code_verifier"],
               "redirect_uri": f"{issuer}/deviceauth/callback"}
    url = f"{issuer}/oauth/token"
    reply = post_to_issuer(fetch, url, payload, form=True)
    return save_sign_in(path, required_strings(url, reply, "id_token", "access_token", "refresh_token"))


def post_to_issuer(fetch: Fetch, url: str, payload: Mapping[str, str], form: bool = False) -> BufferedReply:
    """Post to the sign-in server, as JSON or as a form."""
    body, content_type = json_bytes(payload), "application/json"
    if form:
        body = urllib.parse.urlencode(payload).encode("ascii")
        content_type = "application/x-www-form-urlencoded"
    headers = {"content-type": content_type, "user-agent": USER_AGENT}
    with naming(url):
        return fetch("POST", url, headers, body, 30)


@contextlib.contextmanager
def naming(url: str) -> Iterator[None]:
    """Name the step of the sign-in that fails: its address."""
    try:
        yield
    except BridgeError as exc:
        raise BadUpstream(f"{url}: {exc.message}") from exc


def required_strings(url: str, reply: BufferedReply, *names: str) -> dict[str, str]:
    """Return required texts of a reply. Raises BadUpstream for a refusal, a missing text, a token no JWT."""
    with naming(url):
        texts = {name: text for name, text in reply.json_or_raise().items()
                 if name in names and isinstance(text, str) and VISIBLE_ASCII.fullmatch(text)}
        if len(texts) < len(names):
            raise BadUpstream(f"the reply lacks one of {', '.join(names)}")
        for name in ("id_token", "access_token"):
            if name in names and not jwt_claims(texts[name]):
                raise BadUpstream(f"its {name} is no JWT")
        return texts


def poll_for_code(fetch: Fetch, issuer: str, device: Mapping[str, str], interval: float) -> dict[str, str]:
    """Poll until the person has typed the code; keep polling after temporary failures. Raises BridgeError."""
    until, url = time.monotonic() + DEVICE_SECONDS, f"{issuer}/api/accounts/deviceauth/token"
    while time.monotonic() < until:
        time.sleep(interval)
        try:
            answer = post_to_issuer(fetch, url, device)
        except BadUpstream:
            continue
        if answer.status not in (403, 404, 429) and answer.status < 500:
            return required_strings(url, answer, "authorization_code", "code_verifier")
    raise NotSignedIn("the code was not typed within 15 minutes; run `login` again for a new code")


def save_sign_in(path: str, tokens: Mapping[str, str]) -> SignIn:
    """Write a new sign-in in Codex's form; keep the file's other keys. Raises OSError, NotSignedIn."""
    claims = or_empty(jwt_claims(tokens["id_token"]).get(AUTH_CLAIM), dict)
    account = or_empty(claims.get("chatgpt_account_id"), str) or None
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, mode=0o700, exist_ok=True)
    with file_lock(lock_path(path)):
        kept = read_object(path)
        content = {**kept, "auth_mode": "chatgpt", "OPENAI_API_KEY": kept.get("OPENAI_API_KEY"),
                   "tokens": {**tokens, "account_id": account},
                   "last_refresh": timestamp()}
        sign_in = read_tokens(content, "the sign-in server's reply").sign_in
        write_private(path, content)
    return sign_in


def read_object(path: str) -> dict[str, Any]:
    """Return a file's JSON object; {} without a file or an object. Raises OSError if it is unreadable."""
    try:
        with open(path, "rb") as file:
            return BufferedReply(200, {}, file.read(MAX_REPLY)).json()
    except FileNotFoundError:
        return {}


def auth_file_mode(path: str) -> int:
    """Return the permission bits of auth.json. Raises OSError."""
    return os.stat(path).st_mode & 0o777


def keyring_setting(auth_file: str) -> str:
    """Return config.toml's path if that file makes Codex use the system keyring; else ""."""
    settings = os.path.join(os.path.dirname(auth_file), "config.toml")
    pattern = r'^\s*cli_auth_credentials_store\s*=\s*"(keyring|auto)"'
    with contextlib.suppress(OSError, ValueError), open(settings, encoding="utf-8") as file:
        if re.search(pattern, file.read(), re.MULTILINE):
            return settings
    return ""


# == 13 account ===============================================================
# The upstream of each account, and requests with the sign-in.

class Routing:
    """The upstream of each account, asked for at the upstream's origin, at the start and hourly (WIRE 2).

    `_lock` guards the fields. If asking fails, requests go to the configured upstream.
    """

    def __init__(self, upstream: str, fetch: Fetch, headers: Mapping[str, str]) -> None:
        self.upstream = upstream
        self._fetch = fetch
        self._headers = headers  # the bridge's own identity
        self._lock = threading.Lock()
        self._routes: dict[str, tuple[float, str, str]] = {}  # account -> (asked at, upstream, override)
        self._asking: set[str] = set()

    def route(self, tokens: Tokens) -> tuple[str, dict[str, str]]:
        """Return the account's upstream URL and the header to add; ask in the background when due."""
        account = tokens.sign_in.account
        asked, upstream, override = self._routes.get(account, (-1e9, self.upstream, ""))
        if time.monotonic() - asked > ROUTING_AGE:
            self._ask_soon(tokens)
        return upstream, {"x-openai-account-routing-override": override} if override else {}

    def _ask_soon(self, tokens: Tokens) -> None:
        """Ask in a background thread, one at a time for each account."""
        with self._lock:
            if tokens.sign_in.account in self._asking:
                return
            self._asking.add(tokens.sign_in.account)
        if not start_thread("routing", self._ask_in_background, tokens):
            with self._lock:
                self._asking.discard(tokens.sign_in.account)

    def _ask_in_background(self, tokens: Tokens) -> None:
        account = tokens.sign_in.account
        try:
            self.ask(tokens)
        except BridgeError as exc:
            log.debug("cannot get the account routing: %s", exc.message)
            if not isinstance(exc, NotSignedIn):  # ask again in a minute
                with self._lock:
                    self._routes[account] = (time.monotonic() + 60 - ROUTING_AGE, self.upstream, "")
        finally:
            with self._lock:
                self._asking.discard(account)

    def ask(self, tokens: Tokens) -> tuple[str, str]:
        """Ask for the routing; return and raise what `take` does."""
        parts = urllib.parse.urlsplit(self.upstream)
        url = f"{parts.scheme}://{parts.netloc}{ROUTING_PATH}"
        return self.take(self._fetch("GET", url, {**self._headers, **tokens.headers()}, b"", 10), tokens)

    def take(self, reply: BufferedReply, tokens: Tokens) -> tuple[str, str]:
        """Store a reply's routing; return the upstream URL and the override ("" for none).

        Raises the reply's refusal, and NotSignedIn if upstream does not know the account.
        """
        for account in dicts_in(reply.json_or_raise().get("accounts")):
            if account.get("id") == tokens.sign_in.account:
                upstream, override = self._checked(account)
                with self._lock:
                    self._routes[tokens.sign_in.account] = (time.monotonic(), upstream, override)
                return upstream, override
        with self._lock:
            self._routes[tokens.sign_in.account] = (time.monotonic(), self.upstream, "")
        raise NotSignedIn("upstream does not know this sign-in's account")

    def _checked(self, account: Mapping[str, Any]) -> tuple[str, str]:
        """Return upstream URL and override. The token goes there: use only https, at or below our host."""
        configured, upstream = urllib.parse.urlsplit(self.upstream), self.upstream
        origin = account.get("workspace_backend_origin")
        try:
            parts = urllib.parse.urlsplit(or_empty(origin, str))
            host, _ = parts.hostname or "", parts.port
        except ValueError:
            host, parts = "", configured
        if parts.scheme == "https" and is_within(host, configured.hostname or "") and is_bare_origin(parts):
            upstream = f"https://{parts.netloc}{configured.path}"
        elif origin:
            log.warning("ignoring account routing to an origin outside %s", configured.hostname)
        override = or_empty(account.get("account_routing_override"), str)
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", override) or override == "NO_CONSTRAINT":
            override = ""
        return upstream, override


class Account:
    """Requests with this host's sign-in: the only place where a token is sent to upstream."""

    def __init__(self, config: Config, upstream: Upstream, headers: Mapping[str, str],
                 on_refresh: Callable[[], None] = lambda: None) -> None:
        self._upstream = upstream
        self._headers = headers  # the bridge's own identity, for its own requests
        self._credentials = Credentials(config.auth_file, config.issuer, upstream.fetch, on_refresh)
        self._routing = Routing(config.upstream, upstream.fetch, headers)
        self.hint = sign_in_hint(config.auth_file)  # what to do about a missing or expired sign-in

    def sign_in(self) -> SignIn:
        """Return the facts about auth.json's current sign-in. Raises NotSignedIn."""
        return self._credentials.current()

    def reread(self) -> None:
        """Reread auth.json at its next use, even if it looks unchanged."""
        self._credentials.reread()

    def open(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"",
             client: Connection | None = None, timeout: float | None = None) -> Reply:
        """Send a request with this host's token; after a 401, send it once more with a newer token.

        `join_url` gives the URL of `path`. Raises what `Credentials.bearer`, `Credentials.after_401` and
        `Upstream.request` raise.
        """
        tokens = self._credentials.bearer()
        for last in (False, True):
            base, routing = self._routing.route(tokens)
            url = join_url(base, path)
            signed = {**headers, **routing, **tokens.headers()}
            reply = self._upstream.request(method, url, signed, body, client, timeout)
            if reply.status != 401 or last:
                break
            reply.finish()
            tokens = self._credentials.after_401(tokens)
        return reply

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> BufferedReply:
        """Send the bridge's own GET with this host's token, and read the complete reply."""
        headers = {"accept": "application/json", **self._headers, **(headers or {})}
        return self.open("GET", path, headers, timeout=10).read_all(MAX_REPLY, 10)

    def open_ahead(self, reply: Reply) -> None:
        """Open a connection to a reply's target in the background, for the next request."""
        self._upstream.open_ahead(reply.target)

    def warm_up(self) -> None:
        """Ask for the routing, and open a connection in the background. Raises NotSignedIn."""
        remove_leftovers(os.path.dirname(os.path.realpath(self._credentials.path)))
        base, _ = self._routing.route(self._credentials.current_tokens())
        self._upstream.open_ahead(parse_target(base)[0])

    def finish(self, seconds: float) -> None:
        """Wait for a refresh that is under way, and write tokens that are not written yet."""
        self._credentials.finish(seconds)

    def is_refreshing(self) -> bool:
        """Tell whether a refresh is under way, whose tokens would be lost with this program."""
        return self._credentials.is_refreshing()

    def ask_routing(self) -> tuple[str, str]:
        """Ask for this account's routing; return the upstream URL and the override. Raises BridgeError."""
        reply = self.get(ROUTING_PATH)
        return self._routing.take(reply, self._credentials.current_tokens())


###############################################################################
# C  rules
# May enter: requests, events and bytes, as values. No I/O, no clock, no log; only codings load libzstd.
# May not leave: a changed argument. A function here returns something new.
###############################################################################


# == 14 items =================================================================
# What the rules share, and the rules for single items of the input. No I/O, no clock, no log.
# A rule never modifies its argument; a second run of all rules changes nothing.

class Model(NamedTuple):
    """The facts of a catalogue entry that the rules need."""

    slug: str
    lite: bool = False
    efforts: tuple[str, ...] = ()  # reasoning efforts in the entry; empty: unknown
    tiers: tuple[str, ...] | None = None  # service tiers in the entry; None: unknown


class ItemFix(NamedTuple):
    """A field that upstream refused in one item; it is taken out of all items of that type."""

    item_type: str
    path: tuple[str, ...]  # names of nested fields; a list on the way means each of its entries
    part_type: Any  # the `type` of the object that has the field: an image may have what a text may not
    empties: bool  # upstream wants an empty list there


class Context(NamedTuple):
    """The rules' input besides the request; fixed before the first rule runs."""

    slug: str = ""  # the upstream model that the request's model name means
    effort: str = ""  # the reasoning effort in the model's name or alias; "" without one
    model: Model | None = None  # the slug's catalogue entry; None: unknown, and no catalogue rule fires
    codex: bool = False  # the client is Codex, whose own fields are correct
    websocket: bool = False  # the request is a response.create frame
    name: str = ""  # the conversation's name for the backend's cache (WIRE 4)
    lite_header: bool = False  # the client sent the lite header
    plain: bool = False  # a lite model is tried in the plain form, which keeps what lite would lose
    strict: bool = False  # --continuity strict, or a repair
    force_instructions: bool = False  # a repair: "Instructions are required"
    auto_choice: bool = False  # a repair: upstream does not know the chosen tool
    dropped: frozenset[str] = frozenset()  # parameters that upstream refused for this model
    item_fixes: tuple[ItemFix, ...] = ()  # fields of items that upstream refused
    unusual: Sequence[Any] = ()  # the input's items that rules look at, see `is_usual`; set by `normalize`
    unusual_tools: Sequence[Any] = ()  # the tools that rules look at, see `is_usual_tool`

    @property
    def is_lite(self) -> bool:
        """Tell whether the request is sent in the lite form: by the catalogue, else by its header."""
        if self.model is None:
            return self.lite_header
        return self.model.lite and not self.plain


class Rule(NamedTuple):
    """One rule: its name for the log, its reason for people, and its function."""

    name: str
    why: str
    apply: Callable[[dict[str, Any], Context], dict[str, Any]]
    per_item: bool = False  # the function gets the input's items, one by one, in place of the request


DROPPED_ITEM = object()  # marks an item to remove


def map_items(request: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Map each object of the input; DROPPED_ITEM removes it. Return the same request if none changes."""
    items = request.get("input")
    if not isinstance(items, list):
        return request
    changed = [change(item) if isinstance(item, dict) else item for item in items]
    if not any(map(operator.is_not, changed, items)):
        return request
    return {**request, "input": [item for item in changed if item is not DROPPED_ITEM]}


def message_item(role: str, text: str) -> dict[str, Any]:
    """Return a message item with one text."""
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


def type_bare_message(item: dict[str, Any], context: Context) -> dict[str, Any]:
    """Add the type `message` to an item that has only `role` and `content`."""
    if item.get("type") is None and "role" in item and "content" in item:
        return {**item, "type": "message"}
    return item


def system_to_developer(item: dict[str, Any], context: Context) -> dict[str, Any]:
    """Give a system message the developer role."""
    if item.get("role") == "system":
        return {**item, "role": "developer"}
    return item


def keep_continuity(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Drop items that refer to unstored ones, and then the ids that could require a dropped item.

    Keep a reasoning item that has its ciphertext, with its id: the ciphertext is bound to the id (WIRE 4).
    """
    def change(item: dict[str, Any]) -> Any:
        if points_at_nothing(item, context.strict):
            return DROPPED_ITEM
        item_type = or_empty(item.get("type"), str)
        # The id of a message or a call can require the reasoning item before it.
        if context.strict or item_type == "message" or item_type.endswith(("_call", "_output")):
            return without(item, "id")
        return item

    if context.strict or any(points_at_nothing(item, False) for item in context.unusual):
        return map_items(request, change)
    return request


def is_additional_tools(item: Any) -> bool:
    """Tell whether an item carries tools in the lite form."""
    return isinstance(item, dict) and item.get("type") == "additional_tools"


def points_at_nothing(item: Any, strict: bool) -> bool:
    """Tell whether an item refers to an unstored one; with `strict`, every reasoning item counts as such."""
    if not isinstance(item, dict):
        return False
    if item.get("type") == "reasoning":
        return strict or not item.get("encrypted_content")
    return item.get("type") == "item_reference"


def detailed_fields(item: dict[str, Any]) -> list[str]:
    """Return the fields of an item that have an image with a `detail`."""
    return [field for field in ("content", "output") if any(map(has_detail, or_empty(item.get(field), list)))]


def drop_details(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item without the `detail` of its images, which the lite form does not know."""
    for field in detailed_fields(item):
        parts = [without(part, "detail") if has_detail(part) else part for part in item[field]]
        item = {**item, field: parts}
    return item


def has_detail(part: Any) -> bool:
    """Tell whether a part is an image with a `detail`."""
    return isinstance(part, dict) and part.get("type") == "input_image" and "detail" in part


def drop_bad_id(item: dict[str, Any], context: Context) -> dict[str, Any]:
    """Drop an item's id that is too long or has another type's prefix; never rewrite one."""
    if "id" not in item or has_good_id(item):
        return item
    return without(item, "id")


def has_good_id(item: Mapping[str, Any]) -> bool:
    """Tell whether an item has an id of its type, and no longer than upstream takes."""
    item_id, prefix = item.get("id"), ID_PREFIXES.get(or_empty(item.get("type"), str), "")
    return isinstance(item_id, str) and 0 < len(item_id) <= MAX_ID and item_id.startswith(prefix)


def fit_reasoning_item(item: dict[str, Any], context: Context) -> dict[str, Any]:
    """Reduce a reasoning item that an SDK echoes to what upstream takes; keep its ciphertext and its id.

    `status` is unknown to upstream, also as null; `content` must be empty; `summary` must be a list (WIRE 4).
    """
    if item.get("type") != "reasoning":
        return item
    fitted = without(item, "status")
    if fitted.get("content"):
        fitted = {**fitted, "content": []}
    if fitted.get("summary") is None:
        fitted = {**fitted, "summary": []}
    return fitted


def shorten_call_id(item: dict[str, Any], context: Context) -> dict[str, Any]:
    """Shorten a call id of another provider's history: a call and its output get the same new id."""
    call_id = item.get("call_id")
    if isinstance(call_id, str) and len(call_id) > MAX_ID:
        return {**item, "call_id": short_call_id(call_id)}
    return item


def short_call_id(call_id: str) -> str:
    """Return a short id for a long one: distinct, and the same each time."""
    digest = hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"call_{digest[:40]}"


def long_call_ids(request: Mapping[str, Any]) -> dict[str, str]:
    """Return the call ids that `shorten_call_id` shortens: short id -> long id."""
    given = {or_empty(item.get("call_id"), str) for item in dicts_in(request.get("input"))}
    return {short_call_id(call_id): call_id for call_id in given if len(call_id) > MAX_ID}


def estimate_tokens(request: Mapping[str, Any]) -> int:
    """Estimate a request's input tokens: a quarter of its text's UTF-8 bytes, and a fixed number an image.

    Text is every string and name in `instructions`, `input`, `tools` and `text`.
    """
    tokens = 0.0
    waiting = [request.get(name) for name in ("instructions", "input", "tools", "text")]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            tokens += len(value.encode("utf-8", "surrogatepass")) / 4
        elif isinstance(value, dict) and value.get("type") in ("input_image", "image_url"):
            tokens += IMAGE_TOKENS
        elif isinstance(value, dict):
            tokens += 1
            waiting.extend(value)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return math.ceil(tokens)


ITEM_RULES = (  # in this order, in one pass over the input
    Rule("type-messages", "upstream requires every item's type", type_bare_message, per_item=True),
    Rule("system-to-developer", "upstream refuses the system role", system_to_developer, per_item=True),
    Rule("reasoning-items", "upstream refuses fields that SDKs echo in reasoning items", fit_reasoning_item,
         per_item=True),
    Rule("call-ids", "upstream refuses call ids of more than 64 characters", shorten_call_id, per_item=True),
    Rule("item-ids", "upstream refuses malformed ids", drop_bad_id, per_item=True),
)


def apply_item_rules(request: dict[str, Any], context: Context, fired: dict[str, None]) -> dict[str, Any]:
    """Apply all rules for items in one pass over the input; add the names of those that change one."""
    changed = {}
    for item in context.unusual:
        fitted = item
        for rule in ITEM_RULES:
            before, fitted = fitted, rule.apply(fitted, context)
            if fitted is not before:
                fired[rule.name] = None
        if fitted is not item:
            changed[id(item)] = fitted
    if not changed:
        return request
    return {**request, "input": [changed.get(id(item), item) for item in request["input"]]}


USUAL_TYPES = frozenset((
    "message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"))


def is_usual(item: dict[str, Any]) -> bool:
    """Tell whether the rules leave an item as it is, except for repairs.

    An unusual item can cost others their ids: `keep_continuity` then goes over all of them.
    """
    if is_plain(item):
        return True
    if is_additional_tools(item) or points_at_nothing(item, False) or detailed_fields(item):
        return False
    return all(rule.apply(item, Context()) is item for rule in ITEM_RULES)


def is_plain(item: dict[str, Any]) -> bool:
    """Tell of most usual items that they are usual, faster than by asking the rules."""
    kind, call_id = item.get("type"), item.get("call_id", "")
    if type(kind) is not str or kind not in USUAL_TYPES or item.get("role") == "system":
        return False
    if type(call_id) is not str or len(call_id) > MAX_ID:
        return False
    if type(item.get("content", "")) is not str or type(item.get("output", "")) is not str:
        return False
    return "id" not in item or has_good_id(item)


def stable_id(text: str) -> str:
    """Return a text's hash in the form of a UUID, like Codex's session ids."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32]))


HASHED_PIECE = 64 * 1024  # characters


def conversation_hash(request: Mapping[str, Any], owner: str, slug: str) -> str:
    """Return a hash of a conversation's constants: client, model, instructions, first user message.

    It is taken piece by piece: a large message is not copied.
    """
    digest = hashlib.sha256()
    first = first_message(request.get("input"))
    add_to_hash(digest, [owner, slug, request.get("instructions"), first])
    return digest.hexdigest()


def add_to_hash(digest: Any, value: Any) -> None:
    """Add a JSON value to a hash, piece by piece."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        else:
            text = str(value)
            digest.update(f"{type(value).__name__} {len(text)} ".encode())
            for at in range(0, len(text), HASHED_PIECE):
                digest.update(text[at:at + HASHED_PIECE].encode("utf-8", "surrogatepass"))


def first_message(items: Any) -> Any:
    """Return the content of an input's first user message; both forms of one text give one value."""
    if not isinstance(items, str):
        items = next((item.get("content") for item in dicts_in(items) if item.get("role") == "user"), None)
    if isinstance(items, str):
        return [{"type": "input_text", "text": items}]
    return items


# == 15 forms =================================================================
# The lite and the plain form of a request, and the tools in both (WIRE 4). No I/O, no clock, no log.

LITE_TOOLS = ("function", "custom", "namespace", "tool_search")  # a lite model runs no other tool


def map_tools(tools: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Map each tool of a list, also those in namespaces. Return the same list if none changes."""
    if not isinstance(tools, list):
        return tools
    changed = [_map_tool(tool, change) if isinstance(tool, dict) else tool for tool in tools]
    if any(map(operator.is_not, changed, tools)):
        return changed
    return tools


def _map_tool(tool: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    if "tools" in tool:
        tool = with_tools(tool, change)
    return change(tool)


def with_tools(holder: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Return a request or item with its tools mapped; the same object if none changes."""
    tools = map_tools(holder.get("tools"), change)
    if tools is holder.get("tools"):
        return holder
    return {**holder, "tools": tools}


def is_usual_tool(tool: dict[str, Any]) -> bool:
    """Tell whether the rules for tools leave a tool as it is."""
    return _map_tool(tool, complete_schema) is tool and _map_tool(tool, rename_hosted) is tool


def complete_schemas(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Add empty `properties` to an object schema without them, as some MCP servers send it."""
    def change_item(item: dict[str, Any]) -> dict[str, Any]:
        if is_additional_tools(item):
            return with_tools(item, complete_schema)
        return item

    if context.unusual_tools:
        request = with_tools(request, complete_schema)
    if not any(map(is_additional_tools, context.unusual)):
        return request
    return map_items(request, change_item)


def complete_schema(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool whose object schema has `properties`."""
    schema = tool.get("parameters")
    if isinstance(schema, dict) and schema.get("type") == "object" and schema.get("properties") is None:
        return {**tool, "parameters": {**schema, "properties": {}}}
    return tool


def rename_hosted_tools(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Give the web search its present name, in the tools and in the choice of one."""
    if context.unusual_tools:
        request = with_tools(request, rename_hosted)
    choice = request.get("tool_choice")
    if isinstance(choice, dict):
        renamed = rename_hosted(with_tools(choice, rename_hosted))
        if renamed is not choice:
            return {**request, "tool_choice": renamed}
    return request


def rename_hosted(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool with the present name of the web search."""
    if or_empty(tool.get("type"), str).startswith("web_search_preview"):
        return {**tool, "type": "web_search"}
    return tool


def set_tool_choice(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Leave the choice of a tool to the model, where upstream does not know the chosen one; a repair."""
    if context.auto_choice and is_forced(request.get("tool_choice")):
        return {**request, "tool_choice": "auto"}
    return request


def is_forced(choice: Any) -> bool:
    """Tell whether a tool_choice forces a call."""
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return choice.get("mode") != "auto"
    return choice not in (None, "auto", "none")


def is_hosted(tool: Any) -> bool:
    """Tell whether a tool runs on OpenAI's side, which no lite model offers."""
    return isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] not in LITE_TOOLS


def lite_losses(request: Mapping[str, Any]) -> list[str]:
    """Return what the lite form would lose of a plain request: `tool_choice`, types of hosted tools."""
    choice = request.get("tool_choice")
    if choice == "none":
        return []
    losses = [tool["type"] for tool in or_empty(request.get("tools"), list) if is_hosted(tool)]
    if is_forced(choice):
        losses.insert(0, "tool_choice")
    return losses


def lite_tools(request: Mapping[str, Any], context: Context) -> list[Any]:
    """Return the tools that the lite form can offer, which has no choice but `auto`.

    A forced tool is the only one offered. Raises InvalidRequest if that is impossible.
    """
    choice = request.get("tool_choice")
    tools = [tool for tool in chosen_tools(request) if not is_hosted(tool)]
    if isinstance(choice, dict) and is_forced(choice) and not tools:
        wanted = dicts_in(chosen_of(choice))
        kinds = ", ".join(str(tool.get("name") or tool.get("type")) for tool in wanted)
        raise InvalidRequest(f"{context.slug} cannot be made to use the tool {kinds}: it has no such "
                             "tool; choose another model, or leave tool_choice out", "tool_choice")
    return tools


def chosen_of(choice: Mapping[str, Any]) -> list[Any]:
    """Return what a tool_choice names: one tool, or those of a list."""
    if isinstance(choice.get("tools"), list):
        return list(choice["tools"])
    return [choice]


def chosen_tools(request: Mapping[str, Any]) -> list[Any]:
    """Return the tools that a request's tool_choice leaves: all, the named ones, or none."""
    choice, tools = request.get("tool_choice"), or_empty(request.get("tools"), list)
    if choice == "none":
        return []
    if isinstance(choice, dict):
        return choose_tools(tools, {tool_name(tool) for tool in dicts_in(chosen_of(choice))})
    return tools


def tool_name(tool: Mapping[str, Any]) -> Hashable:
    """Return a tool's type and name; as one text of JSON where one of them is no string."""
    kind, name = tool.get("type"), tool.get("name")
    if isinstance(kind, str) and isinstance(name, str):
        return kind, name
    return json.dumps([kind, name], sort_keys=True)


def choose_tools(tools: list[Any], named: set[Hashable]) -> list[Any]:
    """Return the tools of a name that a tool_choice has; look for what is missing in namespaces."""
    rest = named.difference(map(tool_name, dicts_in(tools)))
    chosen = []
    for tool in dicts_in(tools):
        inner = choose_tools(or_empty(tool.get("tools"), list), rest) if rest else []
        if tool_name(tool) in named:
            chosen.append(tool)
        elif inner:
            chosen.append({**tool, "tools": inner})
    return chosen


def set_form(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Convert the request to its model's form, lite or plain, according to the catalogue."""
    if context.model is None or not isinstance(request.get("input", []), list):
        return request
    if context.is_lite:
        return lite_form(request, context)
    return plain_form(request, context)


def lite_form(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Move tools and instructions into the input, as lite models require (WIRE 4)."""
    if not is_typed(request, tools=list, reasoning=dict, instructions=str):
        return request  # a field has a wrong type: upstream's refusal will name it
    tools = request.get("tools") or []
    if not context.lite_header:
        tools = lite_tools(request, context)
    items = lite_items(request, tools, context)
    if context.websocket and "input" not in request and not items:
        return request
    reasoning = or_empty(request.get("reasoning"), dict)
    form = {**without(request, "tools", "instructions"), "input": items, "parallel_tool_calls": False,
            "reasoning": {**reasoning, "context": "all_turns"}}
    form = with_lite_choice(form, request, context)
    if context.websocket:
        form["client_metadata"] = {**or_empty(request.get("client_metadata"), dict), LITE_METADATA: "true"}
    if form == request:
        return request
    return form


def with_lite_choice(form: dict[str, Any], request: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return the lite form with the only choice that it takes, `auto`, wherever there are tools.

    The official client always sends it; without it models have written their calls as text (WIRE 4).
    """
    if context.lite_header and request.get("tool_choice") is not None:
        return form
    form = without(form, "tool_choice")
    has_tools = any(map(is_additional_tools, form["input"]))
    if has_tools or (context.websocket and "tool_choice" in request):  # the chain may have the tools
        form["tool_choice"] = "auto"
    return form


def is_typed(request: Mapping[str, Any], **types: type) -> bool:
    """Tell whether each of these fields has its type; a missing, null or empty one counts as correct."""
    return all(isinstance(request.get(name) or kind(), kind) for name, kind in types.items())


def lite_items(request: Mapping[str, Any], tools: list[Any], context: Context) -> list[Any]:
    """Return the lite form's input: first tools, then instructions, then the items."""
    items = request.get("input", [])
    if any(map(detailed_fields, context.unusual)):
        items = [drop_details(item) if isinstance(item, dict) else item for item in items]
    carrier, items = gather_tools(items, tools, context)
    if request.get("instructions"):
        items = [message_item("developer", request["instructions"]), *items]
    if carrier:
        items = [carrier, *items]
    return items


def gather_tools(items: list[Any], tools: list[Any],
                 context: Context) -> tuple[dict[str, Any] | None, list[Any]]:
    """Merge all tools into one `additional_tools` item; return that item, and the other items."""
    carriers, others = [], items
    if any(map(is_additional_tools, context.unusual)):
        carriers = [item for item in items if is_additional_tools(item)]
        others = [item for item in items if not is_additional_tools(item)]
    if not tools and len(carriers) < 2 and carriers == items[:len(carriers)]:
        return next(iter(carriers), None), others
    gathered = merge_tools([tool for given in (*(carrier.get("tools") for carrier in carriers), tools)
                            for tool in or_empty(given, list)])
    if not gathered:
        return None, others
    first = next(iter(carriers), {"type": "additional_tools", "role": "developer"})
    return {**first, "tools": gathered}, others


def merge_tools(tools: list[Any]) -> list[Any]:
    """Return the tools, each once; namespaces of one name become one with the tools of all (WIRE 4)."""
    groups: dict[Hashable, list[Any]] = {}  # in order
    for tool in tools:
        groups.setdefault(tool_identity(tool), []).append(tool)
    return [merge_same(group) for group in groups.values()]


def merge_same(group: list[Any]) -> Any:
    """Return one tool for those of one type and name: the first, with the inner tools of all."""
    first, inner = group[0], []
    for tool in dicts_in(group):
        inner += or_empty(tool.get("tools"), list)
    if not inner or all(tool == first for tool in group):
        return first
    return {**first, "tools": merge_tools(inner)}


def tool_identity(tool: Any) -> Hashable:
    """Return a value that is equal for tools that are the same: of one type and name, or equal as a whole."""
    if isinstance(tool, dict) and tool.get("name"):
        return tool_name(tool)
    return json.dumps({"tool": tool}, sort_keys=True)


def plain_form(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Convert a lite request for a plain model: move the tools to `tools`, drop `reasoning.context`."""
    items, metadata = request.get("input", []), request.get("client_metadata")
    marked = isinstance(metadata, dict) and LITE_METADATA in metadata
    carried = any(map(is_additional_tools, context.unusual))
    if not context.lite_header and not marked and not carried and not context.plain:
        return request
    form = dict(request)
    carrier, items = gather_tools(items, or_empty(request.get("tools"), list), context)
    if carrier is not None and isinstance(carrier.get("tools"), list):
        form["tools"], form["input"] = list(carrier["tools"]), items
    if marked:
        form["client_metadata"] = without(request["client_metadata"], LITE_METADATA)
    plain: dict[str, Any] = drop_path(request if form == request else form, ("reasoning", "context"))
    return plain


# == 16 normalize =============================================================
# Request dict in, request dict out: the rules for the request's own fields, and the list of all rules.

def check_request(request: Any) -> None:
    """Check that the bridge can read `model` and `input`; no rule could fix these.

    Raises InvalidRequest, which names the parameter.
    """
    if not isinstance(request, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {json_type_name(request)}")
    model = request.get("model")
    if not isinstance(model, str) or not model.strip():
        raise InvalidRequest(f"model must be a model's name, not {json_type_name(model)}", "model")
    if not HEADER_WORD.fullmatch(model):
        raise InvalidRequest("model must be at most 128 visible ASCII characters", "model")
    given = request.get("input")
    if given is not None and not isinstance(given, (str, list)):
        raise InvalidRequest(f"input must be a string or a list, not {json_type_name(given)}", "input")


def normalize(request: dict[str, Any], context: Context,
              spans: Spans = NOTHING_READ) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the request in the backend's form, and the names of the rules that changed it.

    If no rule fires, return the same object, so that the caller can forward the client's own bytes. `spans`
    knows which of the items and tools were judged for the conversation's last request.
    """
    fired: dict[str, None] = {}
    try:
        context = context._replace(unusual=spans.judge(request, "input", is_usual),
                                   unusual_tools=spans.judge(request, "tools", is_usual_tool))
        for rule in RULES:
            if rule is ITEM_RULES[0]:
                changed = apply_item_rules(request, context, fired)
            elif not rule.per_item:
                changed = rule.apply(request, context)
                if changed is not request:
                    fired[rule.name] = None
            request = changed
    except RecursionError as exc:
        raise InvalidRequest("the request is nested too deeply") from exc
    return request, tuple(rule.name for rule in RULES if rule.name in fired)


def resolve_alias(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Replace an alias with its slug."""
    if context.slug and request.get("model") != context.slug:
        return {**request, "model": context.slug}
    return request


def set_named_effort(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Take the reasoning effort from the model's name or alias, if the client gives none."""
    reasoning = request.get("reasoning")
    if reasoning is None:
        reasoning = {}
    if not context.effort or not isinstance(reasoning, dict) or reasoning.get("effort") is not None:
        return request
    return {**request, "reasoning": {**reasoning, "effort": context.effort}}


def input_to_list(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Replace a string input with one user message, and null with an empty list."""
    text = request.get("input", [])
    if isinstance(text, str):
        return {**request, "input": [message_item("user", text)]}
    if text is None:
        return {**request, "input": []}
    return request


def store_false(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Set `store` to false: the plan's backend stores nothing."""
    if request.get("store") is False:
        return request
    return {**request, "store": False}


def stream_true(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Set `stream` to true; the bridge assembles the events for a client that wants one JSON response."""
    if request.get("stream") is True:
        return request
    return {**request, "stream": True}


def include_reasoning(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Request the encrypted reasoning: the backend stores nothing, so the next turn must send it."""
    include = request.get("include")
    if include is None:
        return {**request, "include": ["reasoning.encrypted_content"]}
    if isinstance(include, list) and "reasoning.encrypted_content" not in include:
        return {**request, "include": [*include, "reasoning.encrypted_content"]}
    return request


def drop_unsupported(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Drop the fields that the backend refuses by name: known ones and learned ones."""
    refused = UNSUPPORTED | context.dropped
    if not context.websocket:
        refused |= {"previous_response_id"}  # over HTTP the store resolves it
    if not refused.isdisjoint(request):
        request = without(request, *refused)
    for path in context.dropped:
        if "." in path:
            request = drop_path(request, tuple(path.split(".")))
    return request


def fit_service_tier(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Rename `fast` to its wire name, and drop a tier that the backend or the model lacks."""
    if "service_tier" not in request:
        return request
    tier = request["service_tier"]
    if tier == "fast":
        tier = "priority"
    tiers = None
    if context.model:
        tiers = context.model.tiers
    if tier == "default" or (tier == "priority" and (tiers is None or tier in tiers)):
        if tier == request["service_tier"]:
            return request
        return {**request, "service_tier": tier}
    return without(request, "service_tier")


def fit_effort(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Replace the reasoning effort with the model's nearest one; of two equally near ones the lower."""
    reasoning = request.get("reasoning")
    if not isinstance(reasoning, dict):
        return request
    effort = reasoning.get("effort")
    if effort == "none" or not isinstance(effort, str) or effort not in EFFORTS:
        return request  # every model takes "none" (WIRE 4)
    nearest = nearest_effort(effort, context.model)
    if nearest == effort:
        return request
    return {**request, "reasoning": {**reasoning, "effort": nearest}}


def nearest_effort(effort: str, model: Model | None) -> str:
    """Return the effort of a model that is nearest to the wanted one; `ultra` is `max` on the wire."""
    if effort == "ultra":
        effort = "max"
    listed = [name for name in (model.efforts if model else ()) if name in EFFORTS[:-1]]
    if not listed or effort in listed:
        return effort
    rank = EFFORTS.index(effort)
    return min(listed, key=lambda name: (abs(EFFORTS.index(name) - rank), EFFORTS.index(name)))


def set_cache_key(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Set the cache key to the conversation's name; a Codex's own key stays, unless it is too long."""
    key = request.get("prompt_cache_key")
    wanted = context.name
    if context.codex and isinstance(key, str) and key:
        wanted = cache_name(key)
    if not wanted or key == wanted:
        return request
    return {**request, "prompt_cache_key": wanted}


def cache_name(own: str) -> str:
    """Return a client's key or session header as a conversation's name; a hash if it fits no header."""
    if len(own) <= MAX_CACHE_KEY and HEADER_WORD.fullmatch(own):
        return own
    return stable_id(own)


def fill_instructions(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Add empty instructions if the client sends none: plain models have refused requests without them.

    Codex sends none since 0.162; its requests stay unchanged until upstream refuses one (WIRE 4).
    """
    if request.get("instructions") is not None or context.is_lite:
        return request
    if context.websocket and request.get("previous_response_id") is not None:
        return request  # the earlier response of the chain has them
    if context.force_instructions or not context.codex:
        return {**request, "instructions": ""}
    return request


def fix_item_fields(request: dict[str, Any], context: Context) -> dict[str, Any]:
    """Take the fields that upstream refused in one item out of all items of its type; a repair."""
    def change(item: dict[str, Any]) -> dict[str, Any]:
        for fix in context.item_fixes:
            if item.get("type") == fix.item_type:
                item = drop_path(item, fix.path, fix.empties, fix.part_type)
        return item

    if not context.item_fixes:
        return request
    return map_items(request, change)


RULES = (  # in this order; later rules rely on earlier ones
    Rule("alias", "the backend does not know this host's aliases", resolve_alias),
    Rule("effort-name", "upstream takes the effort in a field, not in the model's name", set_named_effort),
    Rule("input-to-list", "upstream requires a list", input_to_list),
    *ITEM_RULES,
    Rule("store-false", "upstream refuses to store", store_false),
    Rule("stream-true", "upstream only streams", stream_true),
    Rule("include-reasoning", "the backend stores no reasoning, so the client must send it back",
         include_reasoning),
    Rule("drop-unsupported", "upstream refuses fields it does not know", drop_unsupported),
    Rule("service-tier", "upstream accepts only priority and default, and some models lack priority",
         fit_service_tier),
    Rule("effort", "each model accepts its own efforts", fit_effort),
    Rule("continuity", "the backend has stored no item that a request could refer to", keep_continuity),
    Rule("cache-key", "upstream caches a conversation only by its key", set_cache_key),
    Rule("hosted-tools", "upstream knows the web search by its present name", rename_hosted_tools),
    Rule("tool-schemas", "upstream refuses an object schema without properties", complete_schemas),
    Rule("tool-choice", "upstream has refused the chosen tool", set_tool_choice),
    Rule("instructions", "plain models have refused requests without instructions", fill_instructions),
    Rule("form", "lite models accept only the lite form, plain models only the plain form", set_form),
    Rule("item-fields", "upstream has refused a field of an item", fix_item_fields),  # also in the form's own
)


# == 17 repairs ===============================================================
# A refusal's text -> a changed context -> the rules run again.

class Repair(NamedTuple):
    """One known refusal.

    `apply` gets the context, the match and the refused request. It returns a context with which the rules
    fix the request, and what changes ("" if the name says it); the same context if it does not know.
    """

    name: str
    why: str
    pattern: re.Pattern[str]
    apply: Callable[[Context, re.Match[str], dict[str, Any]], tuple[Context, str]]


# Fields without which a tool is another one. A name is learned for all clients, so one bad tool must not
# take these from everybody's.
TOOL_MEANING = frozenset(("type", "name", "description", "parameters", "format", "tools", "function"))


def _drop_named(context: Context, match: re.Match[str], request: dict[str, Any]) -> tuple[Context, str]:
    name = without_indices(match[1])
    root, _, below = name.partition(".")
    if name in NEVER_DROPPED or root == "input" or (root == "tools" and below.split(".")[0] in TOOL_MEANING):
        return context, ""
    return context._replace(dropped=context.dropped | {name}), name


def without_indices(path: str) -> str:
    """Return a field's path without the numbers in it: `tools[0].name` is `tools.name`."""
    return re.sub(r"\[\d+\]", "", path).rstrip(".")


def _fix_item(context: Context, match: re.Match[str], request: dict[str, Any]) -> tuple[Context, str]:
    """Find the item that upstream names; fix all of its type. What an item is about is never dropped."""
    items, at = or_empty(request.get("input"), list), int(match["index"])
    item = items[at] if at < len(items) else None
    names = tuple(without_indices(match["path"]).split("."))
    if not isinstance(item, dict) or not isinstance(item.get("type"), str):
        return context, ""
    kept = ITEM_MEANING
    if item["type"].endswith("_call"):
        kept = ITEM_MEANING | {"name"}
    elif is_additional_tools(item):
        kept = TOOL_MEANING
    empties = match["unknown"] is None
    if names[-1] in kept or (not empties and drop_path(item, names) is item):
        return context, ""
    fix = ItemFix(item["type"], names, holder_type(item, match["path"]), empties)
    if fix in context.item_fixes:
        return context, ""
    return context._replace(item_fixes=(*context.item_fixes, fix)), f"input.{item['type']}.{'.'.join(names)}"


def holder_type(item: dict[str, Any], path: str) -> Any:
    """Return the `type` of the object that has the field at a path like `content[0].detail`."""
    holder: Any = item
    for name in re.findall(r"[^.\[\]]+", path)[:-1]:
        if isinstance(holder, list) and name.isdigit() and int(name) < len(holder):
            holder = holder[int(name)]
        else:
            holder = or_empty(holder, dict).get(name)
    return or_empty(holder, dict).get("type")


FORM_REPAIR = "form"
MAX_REPAIRS = 4  # for one request
REPAIRS = (
    Repair("item-field", "drop the field that upstream names from all items of that type; remember it for "
           "the model",
           re.compile(r"\A(?:\W*detail)?\W*(?:(?P<unknown>(?:unsupported|unknown) parameter)|"
                      r"missing required parameter|invalid(?=[^\n]{0,200}array too long)):? *['\"`\\]*"
                      r"input\[(?P<index>\d{1,6})\]\.(?P<path>[a-z_][\w.\[\]-]{0,80})", re.IGNORECASE),
           _fix_item),
    Repair("drop-parameter", "drop the parameter that upstream names, and remember it for the model",
           # Only at the message's beginning: a later match may be a quotation of the client's text.
           re.compile(r"\A(?:\W*detail)?\W*(?:unsupported|unknown) parameter:? *['\"`\\]*"
                      r"([a-z_][\w.\[\]-]{0,80})",
                      re.IGNORECASE),
           _drop_named),
    Repair("instructions", "send empty instructions",
           re.compile(r"instructions are required", re.IGNORECASE),
           lambda context, match, request: (context._replace(force_instructions=True), "")),
    Repair("auto-choice", "leave the choice of a tool to the model, where upstream does not know the tool",
           re.compile(r"tool choice '[^']{0,200}' not found", re.IGNORECASE),
           lambda context, match, request: (context._replace(auto_choice=True), "tool_choice")),
    Repair("continuity", "drop every reasoning item and every item id",
           re.compile(r"items are not persisted|item with id '[^']*' not found|without its required|"
                      r"invalid_encrypted_content|encrypted content .{0,80}could not be", re.IGNORECASE),
           lambda context, match, request: (context._replace(strict=True), "")),
    Repair(FORM_REPAIR, "send the other form, lite or plain; without another one, fetch the model list again",
           re.compile(r"model not found|responses[-_ ]lite|additional_tools", re.IGNORECASE),
           lambda context, match, request: (context, "")),  # Turns._repair_form knows the forms
)
ITEM_MEANING = frozenset((  # fields without which an item or a part says something else
    "type", "role", "content", "text", "refusal", "call_id", "arguments", "input", "output", "action",
    "encrypted_content", "image_url", "file_data", "file_id", "file_url", "tools", "tool_calls",
    "tool_call_id", "function_call",
))


def match_repair(text: str) -> tuple[Repair, re.Match[str]] | None:
    """Return the repair for a refusal's text, and the match; None for an unknown refusal."""
    for repair in REPAIRS:
        match = repair.pattern.search(text)
        if match:
            return repair, match
    return None


# == 18 chat requests =========================================================
# Chat Completions and legacy completions: request dict in, Responses request out. No argument is modified.

Object = dict[str, Any]  # a JSON object

# Fields that only tune the answer or serve the account. They are dropped silently, like any unknown field.
CHAT_DROPPED = (
    "best_of", "frequency_penalty", "logit_bias", "max_completion_tokens", "max_tokens", "metadata",
    "prediction", "presence_penalty", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    "seed", "stop", "store", "temperature", "top_p", "user",
)

# Fields that change the answer's meaning: the values that request nothing, and why other values are refused.
Refused = dict[str, tuple[tuple[Any, ...], str]]
CHAT_REFUSED: Refused = {
    "n": ((None, 1), "the backend gives one answer to a request"),
    "logprobs": ((None, False), "the backend reports no log probabilities"),
    "top_logprobs": ((None, 0), "the backend reports no log probabilities"),
    "audio": ((None,), "the backend answers in text only"),
    "modalities": ((None, ["text"]), "the backend answers in text only"),
    "moderation": ((None,), "the backend reports no moderation results"),
}
COMPLETION_REFUSED: Refused = {
    "n": ((None, 1), "the backend gives one answer to a request"),
    "best_of": ((None, 1), "the backend gives one answer to a request"),
    "echo": ((None, False), "the backend does not repeat the prompt"),
    "logprobs": ((None,), "the backend reports no log probabilities"),
    "suffix": ((None, ""), "the backend does not fill the gap between two texts"),
}
TEXT_PARTS = ("text", "input_text", "output_text")  # clients of both APIs mix the names
THOUGHT_PARTS = ("thinking", "redacted_thinking", "reasoning")  # other providers' reasoning, sent back


def _mistyped(param: str, expected: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"{param} must be {expected}, not {json_type_name(value)}", param)


class _Node:
    """A JSON object in a request, with its path. Reading a field checks its type; errors name its path."""

    def __init__(self, fields: Object, path: str = "") -> None:
        self.fields = fields
        self.path = path

    def at(self, key: str) -> str:
        if self.path:
            return f"{self.path}.{key}"
        return key

    def unsupported(self, key: str) -> InvalidRequest:
        return InvalidRequest(f"{self.at(key)}: {self.fields[key][:60]!r} is not supported", self.at(key))

    def get(self, key: str, kind: type[T]) -> T | None:
        value = self.fields.get(key)
        if value is None or isinstance(value, kind):
            return value
        raise _mistyped(self.at(key), JSON_TYPES[kind], value)

    def need(self, key: str, kind: type[T]) -> T:
        value = self.get(key, kind)
        if value is None:
            raise _mistyped(self.at(key), JSON_TYPES[kind], None)
        return value

    def given(self, kind: type, *keys: str) -> Object:
        """Return the fields that are neither missing nor null."""
        return {key: self.get(key, kind) for key in keys if self.fields.get(key) is not None}

    def node(self, key: str) -> _Node:
        return _Node(self.need(key, dict), self.at(key))

    def node_or_empty(self, key: str) -> _Node:
        return _Node(self.get(key, dict) or {}, self.at(key))

    def nodes(self, key: str) -> Iterator[_Node]:
        for index, entry in enumerate(self.get(key, list) or ()):
            where = f"{self.at(key)}[{index}]"
            if not isinstance(entry, dict):
                raise _mistyped(where, JSON_TYPES[dict], entry)
            yield _Node(entry, where)


def _refuse(body: Object, refused: Refused) -> None:
    for name, (harmless, why) in refused.items():
        if body.get(name) not in harmless:
            raise InvalidRequest(f"{name} is not supported: {why}", name)


def _content(message: _Node) -> list[_Node]:
    """Return a message's parts; a string is one text part."""
    content = message.fields.get("content")
    if isinstance(content, str):
        return [_Node({"type": "text", "text": content}, message.at("content"))]
    if not isinstance(content, list):
        raise _mistyped(message.at("content"), "a string or a list of parts", content)
    return list(message.nodes("content"))


def _input_part(part: _Node) -> Object:
    part_type = part.need("type", str)
    if part_type in TEXT_PARTS:
        return {"type": "input_text", "text": part.need("text", str)}
    if part_type == "image_url" and isinstance(part.fields.get("image_url"), str):  # not in the API, but seen
        return {"type": "input_image", "image_url": part.fields["image_url"]}
    if part_type == "image_url" or isinstance(part.fields.get("image_url"), dict):
        image = part.node("image_url")
        return {"type": "input_image", "image_url": image.need("url", str), **image.given(str, "detail")}
    if part_type == "input_image":  # the Responses API's own form
        fields = part.given(str, "image_url", "file_id", "detail")
        return {"type": part_type, **_need_one(part, fields, "image_url", "file_id")}
    if part_type in ("file", "input_file"):
        node = _inner(part, "file")
        fields = node.given(str, "file_data", "file_id", "file_url", "filename")
        return {"type": "input_file", **_need_one(node, fields, "file_data", "file_id", "file_url")}
    raise part.unsupported("type")


def _need_one(node: _Node, fields: Object, *names: str) -> Object:
    """Return the fields if they have one of the names. Raises InvalidRequest."""
    if fields.keys().isdisjoint(names):
        raise InvalidRequest(f"{node.path} must have one of {', '.join(names)}", node.path)
    return fields


def _output_part(part: _Node) -> Object:
    part_type = part.need("type", str)
    if part_type in TEXT_PARTS:
        return {"type": "output_text", "text": part.need("text", str)}
    if part_type == "refusal":
        return {"type": part_type, "refusal": part.need("refusal", str)}
    if part_type in THOUGHT_PARTS:
        return {}
    raise part.unsupported("type")


class _History:
    """A translator of messages to items, in the same order.

    It remembers the earlier calls: a custom tool's output has its own item type, and a `function` message
    (the old style) names its function but not the call.
    """

    def __init__(self) -> None:
        self.items: list[Object] = []
        self._custom_ids: set[str] = set()
        self._function_ids: dict[str, str] = {}  # function's name → the generated id of its last call

    def add(self, message: _Node) -> None:
        role = message.need("role", str)
        if role in ("system", "developer", "user"):
            role = "user" if role == "user" else "developer"
            parts = [_input_part(part) for part in _content(message)]
            self.items.append({"type": "message", "role": role, "content": parts})
        elif role == "assistant":
            self._answer(message)
        elif role == "tool":
            self._output(message, message.need("tool_call_id", str))
        elif role == "function":
            name = message.need("name", str)
            if name not in self._function_ids:
                where = message.at("name")
                raise InvalidRequest(f"{where}: {name[:60]!r} was not called before", where)
            self._output(message, self._function_ids[name])
        else:
            raise message.unsupported("role")

    def keep(self, item: Object) -> None:
        """Add an item that has the Responses API's own form."""
        self.items.append(item)
        kind, call_id = item.get("type"), or_empty(item.get("call_id"), str)
        if kind == "custom_tool_call":
            self._custom_ids.add(call_id)
        elif kind == "function_call":
            self._function_ids[or_empty(item.get("name"), str)] = call_id

    def _answer(self, message: _Node) -> None:
        content = []
        if message.fields.get("content") is not None:
            content = _content(message)
        parts = [_output_part(part) for part in content]
        parts.append({"type": "refusal", "refusal": message.get("refusal", str)})
        parts = [part for part in parts if part.get("text") or part.get("refusal")]
        if parts:
            self.items.append({"type": "message", "role": "assistant", "content": parts})
        for call in message.nodes("tool_calls"):
            if call.get("type", str) in (None, "function"):
                self._call("function_call", call.need("id", str), call.node("function"), "arguments")
            elif call.fields["type"] == "custom":
                self._call("custom_tool_call", call.need("id", str), call.node("custom"), "input")
                self._custom_ids.add(call.fields["id"])
            else:
                raise call.unsupported("type")
        if message.get("function_call", dict) is not None:
            function, call_id = message.node("function_call"), f"call_function_{len(self.items)}"
            self._call("function_call", call_id, function, "arguments")
            self._function_ids[function.fields["name"]] = call_id

    def _call(self, item_type: str, call_id: str, call: _Node, field: str) -> None:
        texts = {key: call.need(key, str) for key in ("name", field)}
        self.items.append({"type": item_type, "call_id": call_id, **texts})

    def _output(self, message: _Node, call_id: str) -> None:
        item_type = "function_call_output"
        if call_id in self._custom_ids:
            item_type = "custom_tool_call_output"
        output: Any = [_input_part(part) for part in _content(message)]
        if isinstance(message.fields["content"], str):
            output = message.fields["content"]
        self.items.append({"type": item_type, "call_id": call_id, "output": output})


def _items(body: _Node) -> list[Object]:
    if not body.need("messages", list):
        raise InvalidRequest("messages must not be empty", "messages")
    history = _History()
    for message in body.nodes("messages"):
        history.add(message)
    return history.items


def _mixed_items(body: _Node) -> list[Object]:
    """Return the items of an `input` in which messages may have the form of a chat."""
    history = _History()
    for item in body.nodes("input"):
        if is_of_a_chat(item.fields):
            history.add(item)
        else:
            history.keep(item.fields)
    return history.items


CHAT_FIELDS = frozenset(("tool_calls", "tool_call_id", "function_call", "refusal", "audio", "annotations"))
CHAT_PARTS = ("text", "image_url", "file", *THOUGHT_PARTS)


def is_of_a_chat(item: Object) -> bool:
    """Tell whether an item is a message in a form that only chats have."""
    if item.get("type") not in (None, "message") or "role" not in item:
        return False
    if item["role"] in ("tool", "function") or not CHAT_FIELDS.isdisjoint(item):
        return True
    return any(part.get("type") in CHAT_PARTS for part in dicts_in(item.get("content")))


def _function_tool(function: _Node) -> Object:
    return {
        "type": "function",
        "name": function.need("name", str),
        **function.given(str, "description"),
        "parameters": function.get("parameters", dict) or {"type": "object", "properties": {}},
        "strict": bool(function.get("strict", bool)),  # the default is false here, true in the Responses API
    }


def _custom_tool(custom: _Node) -> Object:
    tool = {"type": "custom", "name": custom.need("name", str), **custom.given(str, "description")}
    if custom.get("format", dict) is not None:
        form = custom.node("format")
        tool["format"] = {"type": form.need("type", str)}
        if tool["format"]["type"] == "grammar":
            grammar = form.node("grammar")
            tool["format"].update({key: grammar.need(key, str) for key in ("syntax", "definition")})
    return tool


def _tool(tool: _Node) -> Object:
    tool_type = tool.need("type", str)
    if tool_type == "function":
        return _function_tool(_inner(tool, tool_type))
    if tool_type == "custom" and "custom" in tool.fields:
        return _custom_tool(tool.node("custom"))
    if tool_type == "custom":
        tool.need("name", str)
    return tool.fields  # the backend's own tools are the same in both APIs


FLAT_FIELDS = ("name", "file_data", "file_id", "file_url")


def _inner(node: _Node, kind: str) -> _Node:
    """Return a tool's or part's own object; Cursor and others send its fields flat, as Responses does."""
    if kind not in node.fields and not node.fields.keys().isdisjoint(FLAT_FIELDS):
        return node
    return node.node(kind)


def _web_search_tool(options: _Node) -> Object:
    tool = {"type": "web_search", **options.given(str, "search_context_size")}
    if options.get("user_location", dict) is not None:
        place = options.node("user_location").node_or_empty("approximate")
        fields = place.given(str, "city", "country", "region", "timezone")
        tool["user_location"] = {"type": "approximate", **fields}
    return tool


def _named_tool(choice: _Node) -> Object:
    tool_type = choice.need("type", str)
    if tool_type in ("function", "custom"):
        return {"type": tool_type, "name": _inner(choice, tool_type).need("name", str)}
    return choice.fields


def _tool_choice(body: _Node) -> str | Object | None:
    field = "tool_choice"
    if body.fields.get("tool_choice") is None:
        field = "function_call"
    choice = body.fields.get(field)
    if choice is None or choice in ("none", "auto", "required"):
        return choice
    if isinstance(choice, str):
        raise body.unsupported(field)
    if not isinstance(choice, dict):
        raise _mistyped(field, "a string or an object", choice)
    node = body.node(field)
    if field == "function_call":
        return {"type": "function", "name": node.need("name", str)}
    if choice.get("type") != "allowed_tools":
        return _named_tool(node)
    allowed = node.node("allowed_tools")
    tools = [_named_tool(tool) for tool in allowed.nodes("tools")]
    return {"type": "allowed_tools", "mode": allowed.need("mode", str), "tools": tools}


def _tool_fields(body: _Node) -> Object:
    tools = [_tool(tool) for tool in body.nodes("tools")]
    functions = [_function_tool(function) for function in body.nodes("functions")]
    wants_search = body.get("web_search_options", dict) is not None
    if wants_search and not any(tool["type"].startswith("web_search") for tool in tools):
        tools.append(_web_search_tool(body.node("web_search_options")))
    fields: Object = {"tools": tools + functions, "tool_choice": _tool_choice(body)}
    if functions:
        fields["parallel_tool_calls"] = False  # an old-style answer can have only one call
    return {field: value for field, value in fields.items() if value not in (None, [])}


def _reasoning(body: _Node) -> Object:
    """Return the reasoning fields. A missing `summary` becomes `auto`; a null one stays off."""
    if isinstance(body.fields.get("reasoning_effort"), dict):  # LiteLLM's form of a summary
        node, effort = body.node("reasoning_effort"), {}
    else:
        node, effort = body.node_or_empty("reasoning"), body.given(str, "reasoning_effort")
    reasoning = node.given(str, "effort", "summary", "context")
    if effort:
        reasoning["effort"] = effort["reasoning_effort"]
    if "summary" in node.fields:
        return reasoning
    return {**reasoning, "summary": "auto"}


def _text_format(chosen: _Node) -> Object:
    format_type = chosen.need("type", str)
    if format_type in ("text", "json_object"):
        return {"type": format_type}
    if format_type != "json_schema":
        raise chosen.unsupported("type")
    schema = chosen.node("json_schema")
    required = {"name": schema.need("name", str), "schema": schema.need("schema", dict)}
    optional = {**schema.given(str, "description"), **schema.given(bool, "strict")}
    return {"type": format_type, **required, **optional}


def wants_usage(body: Object) -> bool:
    """Tell whether the client wants a usage chunk at the stream's end."""
    return bool(_Node(body).node_or_empty("stream_options").get("include_usage", bool))


def chat_request(body: Object) -> Object:
    """Translate a Chat Completions request to a Responses request, in the plain form.

    Raises InvalidRequest, with the field's path as `param`, for a field of a wrong type, and for a field in
    CHAT_REFUSED with a value that the backend cannot serve.
    """
    _refuse(body, CHAT_REFUSED)
    wants_usage(body)  # checks the field's type; ChatStream uses the value
    node = _Node(body)
    if body.get("input") is not None:
        return _responses_body(node)
    return {
        "model": node.need("model", str),
        "input": _items(node),
        "stream": bool(node.get("stream", bool)),
        "reasoning": _reasoning(node),
        **_text(node, {}),
        **node.given(str, "prompt_cache_key", "service_tier"),
        **node.given(bool, "parallel_tool_calls"),
        **_tool_fields(node),
    }


def _text(body: _Node, own: Object) -> Object:
    """Return the field `text`, from a chat's fields and a Responses body's own one; {} for none."""
    text = {**own, **body.given(str, "verbosity")}
    if body.get("response_format", dict) is not None:
        text["format"] = _text_format(body.node("response_format"))
    return {"text": text} if text else {}


# Fields of a chat that mean nothing in a Responses body, or are translated.
CHAT_ONLY = frozenset((
    *CHAT_DROPPED, *CHAT_REFUSED, "messages", "stream_options", "functions", "function_call", "tools",
    "tool_choice", "web_search_options", "response_format", "reasoning_effort", "verbosity",
))


def _responses_body(node: _Node) -> Object:
    """Translate a Responses body at the chat's address, as Cursor sends it; tools may have either form."""
    if node.fields.get("messages") is not None:
        raise InvalidRequest("the body has both messages and input: send one of them", "messages")
    request = input_to_list(without(node.fields, *CHAT_ONLY), Context())
    if isinstance(node.fields["input"], list):
        request = {**request, "input": _mixed_items(node)}
    return {**request, "stream": bool(node.get("stream", bool)), "reasoning": _reasoning(node),
            **_text(node, or_empty(request.get("text"), dict)), **_tool_fields(node)}


def completion_request(body: Object) -> Object:
    """Translate a legacy completions request to a Responses request; the prompt becomes a user message."""
    _refuse(body, COMPLETION_REFUSED)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise InvalidRequest("prompt must be one string, not a list of strings or token ids", "prompt")
    return chat_request({**body, "messages": [{"role": "user", "content": prompt}]})


# == 19 chat answers ==========================================================
# Responses events in, Chat Completions chunks out. Ids and times are arguments. ChatDeltas turns events into
# deltas. A stream wraps deltas in chunks and a JSON response merges them, so both always agree.

# Event type without `.delta` or `.done` → type of the part or item whose text the event carries.
TEXT_EVENTS = {
    "response.output_text": "output_text",
    "response.refusal": "refusal",
    "response.reasoning_summary_text": "summary_text",
    "response.reasoning_text": "reasoning_text",
    "response.function_call_arguments": "function_call",
    "response.custom_tool_call_input": "custom_tool_call",
}
PART_EVENTS = ("response.content_part.done", "response.reasoning_summary_part.done")
# Type of part → the delta's field, the part's text field; type of call → the call's form, its text field.
PARTS = {
    "output_text": ("content", "text"),
    "refusal": ("refusal", "refusal"),
    "summary_text": ("reasoning_content", "text"),
    "reasoning_text": ("reasoning_content", "text"),
}
CALLS = {"function_call": ("function", "arguments"), "custom_tool_call": ("custom", "input")}
IMAGE_TYPES = {"jpeg": "image/jpeg", "webp": "image/webp"}  # of an image's output_format; else PNG
INCOMPLETE_REASONS = {"max_output_tokens": "length", "content_filter": "content_filter"}


def chat_usage(usage: Object | None) -> Object | None:
    """Translate a response's token counts; return None without any."""
    if not isinstance(usage, dict) or not usage:
        return None
    prompt, answer = or_empty(usage.get("input_tokens"), int), or_empty(usage.get("output_tokens"), int)
    cached = or_empty(usage.get("input_tokens_details"), dict).get("cached_tokens")
    reasoning = or_empty(usage.get("output_tokens_details"), dict).get("reasoning_tokens")
    written = or_empty(usage.get("input_tokens_details"), dict).get("cache_write_tokens")
    kept = {"cache_write_tokens": written} if type(written) is int else {}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": or_empty(usage.get("total_tokens"), int) or prompt + answer,
        "prompt_tokens_details": {"cached_tokens": or_empty(cached, int), **kept},
        "completion_tokens_details": {"reasoning_tokens": or_empty(reasoning, int)},
    }


class ChatDeltas:
    """A converter of Responses events to chat deltas, with each piece of text exactly once.

    `_sent` counts the characters sent of each text (by type, item and part). Some events repeat the complete
    text (`*.done`, the item, the terminal event); these add only the characters that are still missing.
    """

    def __init__(self, legacy_functions: bool = False) -> None:
        self.done = False
        self.failed = False
        self.usage: Object | None = None
        self._finish_reason = "stop"
        self._legacy_functions = legacy_functions
        self._sent: dict[tuple[str, int | str, int], int] = {}
        self._calls: dict[int | str, int] = {}  # item → index of its call
        self._images: dict[int | str, int] = {}  # item → index of its image
        self._last: dict[str, Any] = {}  # delta field → item or part of the field's last piece
        self._content_length = 0
        self._starts: dict[tuple[int | str, int], int] = {}  # item and part → offset in the content
        self._annotations: dict[tuple[int | str, int, int], Object] = {}

    def _deltas(self, event: Object) -> Iterator[Object]:
        type_name, item = or_empty(event.get("type"), str), or_empty(event.get("item"), dict)
        stem, _, verb = type_name.rpartition(".")
        key = _item_key(event, item)
        index = or_empty(event.get("summary_index", event.get("content_index")), int)
        if stem in TEXT_EVENTS and verb == "delta":
            yield from self._text_delta(TEXT_EVENTS[stem], key, index, or_empty(event.get("delta"), str))
        elif stem in TEXT_EVENTS and verb == "done":
            yield from self._missing_text({**event, "type": TEXT_EVENTS[stem]}, key, index)
        elif type_name in PART_EVENTS:
            yield from self._missing_text(event.get("part"), key, index)
        elif type_name == "response.output_text.annotation.added":
            number = or_empty(event.get("annotation_index"), int)
            self._annotate(event.get("annotation"), (key, index, number))
        elif type_name == "response.output_item.added":
            yield from self._open_call(item, key)
        elif type_name == "response.output_item.done":
            yield from self._item_rest(item, key)
        else:
            yield from self._end(type_name, event)

    def _text_delta(self, part_type: str, key: int | str, index: int, piece: str) -> Iterator[Object]:
        if not piece or (part_type in CALLS and key not in self._calls):
            return  # a call without its head waits for the complete item
        slot = (part_type, key, index)
        self._sent[slot] = self._sent.get(slot, 0) + len(piece)
        if part_type in CALLS:
            form, field = CALLS[part_type]
            yield from self._call_delta(key, {}, form, {field: piece})
            return
        field = PARTS[part_type][0]
        # A blank line separates two parts of the reasoning, or two messages. A message's parts are one text.
        place: Any = slot if field == "reasoning_content" else key
        lead = "\n\n" if self._last.get(field, place) != place else ""
        self._last[field] = place
        if field == "content":
            self._starts.setdefault((key, index), self._content_length + len(lead))
            self._content_length += len(lead) + len(piece)
        yield {field: lead + piece}

    def _missing_text(self, part: Any, key: int | str, index: int) -> Iterator[Object]:
        """Yield the unsent rest of a complete text, and keep the text's citations."""
        part = or_empty(part, dict)
        part_type = or_empty(part.get("type"), str)
        _, field = PARTS.get(part_type) or CALLS.get(part_type) or ("", "")
        text = or_empty(part.get(field), str)
        if text:
            sent = self._sent.get((part_type, key, index), 0)
            yield from self._text_delta(part_type, key, index, text[sent:])
        for number, annotation in enumerate(or_empty(part.get("annotations"), list)):
            self._annotate(annotation, (key, index, number))

    def _item_rest(self, item: Object, key: int | str) -> Iterator[Object]:
        if item.get("type") in ("message", "reasoning"):
            for parts in ("summary", "content"):
                for index, part in enumerate(or_empty(item.get(parts), list)):
                    yield from self._missing_text(part, key, index)
        elif item.get("type") == "image_generation_call":
            yield from self._image(item, key)
        else:
            yield from self._open_call(item, key)
            yield from self._missing_text(item, key, 0)

    def _image(self, item: Object, key: int | str) -> Iterator[Object]:
        """Yield an image in the form that Open WebUI and LibreChat read, which is OpenRouter's.

        It is no Markdown in the text: LibreChat shows no data URL there, and clients would send it back.
        """
        data = or_empty(item.get("result"), str)
        if key in self._images or not re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", data):
            return
        self._images[key] = index = len(self._images)
        media_type = IMAGE_TYPES.get(or_empty(item.get("output_format"), str), "image/png")
        url = f"data:{media_type};base64,{data}"
        yield {"images": [{"index": index, "type": "image_url", "image_url": {"url": url}}]}

    def _open_call(self, item: Object, key: int | str) -> Iterator[Object]:
        form, field = CALLS.get(or_empty(item.get("type"), str), ("", ""))
        call_id, name = item.get("call_id"), item.get("name")
        if form and key not in self._calls and isinstance(call_id, str) and isinstance(name, str):
            self._calls[key] = len(self._calls)
            head = {"id": call_id, "type": form}
            yield from self._call_delta(key, head, form, {"name": name, field: ""})

    def _call_delta(self, key: int | str, head: Object, form: str, texts: Object) -> Iterator[Object]:
        index = self._calls[key]
        if not self._legacy_functions:
            yield {"tool_calls": [{"index": index, **head, form: texts}]}
        elif index == 0:
            yield {"function_call": texts}

    def _annotate(self, annotation: Any, place: tuple[int | str, int, int]) -> None:
        """Keep a citation for the end, because the OpenAI SDK cannot merge two lists of citations."""
        annotation = or_empty(annotation, dict)
        if annotation.get("type") != "url_citation":
            return  # Chat Completions has no other annotations
        numbers = ("start_index", "end_index")
        start = self._starts.get(place[:2], 0)
        citation: Object = {field: start + or_empty(annotation.get(field), int) for field in numbers}
        citation.update({field: or_empty(annotation.get(field), str) for field in ("title", "url")})
        self._annotations[place] = {"type": "url_citation", "url_citation": citation}

    def _end(self, type_name: str, event: Object) -> Iterator[Object]:
        """Handle a terminal event or `error`; ignore any other event."""
        if type_name in ("response.failed", "error"):
            self.done = self.failed = True
        if type_name not in ("response.completed", "response.incomplete"):
            return
        response = or_empty(event.get("response"), dict)
        if not self._sent and not self._calls and not self._images:  # only the terminal event has the answer
            for index, item in enumerate(or_empty(response.get("output"), list)):
                yield from self._item_rest(or_empty(item, dict), index)
        if self._annotations:
            yield {"annotations": list(self._annotations.values())}
        if not self._calls and not {"output_text", "refusal"} & {slot[0] for slot in self._sent}:
            yield {"content": ""}  # null would mean that the answer has calls
        self.done, self.usage = True, chat_usage(response.get("usage"))
        self._finish_reason = self._reason_to_finish(type_name, response)

    def _reason_to_finish(self, type_name: str, response: Object) -> str:
        """Return the chat's finish_reason."""
        if type_name == "response.incomplete":
            reason = or_empty(response.get("incomplete_details"), dict).get("reason")
            return INCOMPLETE_REASONS.get(or_empty(reason, str), "length")
        if not self._calls:
            return "stop"
        return "function_call" if self._legacy_functions else "tool_calls"


def _item_key(event: Object, item: Object) -> int | str:
    """Return a key for an event's item: preferably the index, because ids may differ between events."""
    for name in (event.get("output_index"), event.get("item_id"), item.get("id"), item.get("call_id")):
        if isinstance(name, (int, str)):
            return name
    return ""


class ChatStream(ChatDeltas):
    """A converter of Responses events to Chat Completions chunks.

    The terminal event or an `error` sets `done`; a failure also sets `failed`. The first chunk comes with the
    first delta, so an earlier failure can still be an HTTP error.
    """

    kind = "chat.completion.chunk"

    def __init__(
        self, completion_id: str, created: int, model: str,
        include_usage: bool = False, legacy_functions: bool = False,
    ) -> None:
        super().__init__(legacy_functions)
        self._head: Object = {"id": completion_id, "object": self.kind, "created": created, "model": model}
        self._include_usage = include_usage
        self._started = False

    def feed(self, event: Object) -> list[Object]:
        """Return an event's chunks, in order; none after the terminal event."""
        if self.done:
            return []
        choices = [choice for delta in self._deltas(event) for choice in self._choices(delta)]
        if self.done and not self.failed:
            choices.append(self._choice({}, self._finish_reason))
        no_usage = {}
        if self._include_usage:
            no_usage = {"usage": None}
        chunks = [{**self._head, "choices": [choice], **no_usage} for choice in choices]
        if self._include_usage and self.usage:
            chunks.append({**self._head, "choices": [], "usage": self.usage})
        return chunks

    def whole(self, object_name: str, choice: Object) -> Object:
        """Return a complete response, with this stream's head and usage."""
        return {**self._head, "object": object_name, "choices": [choice], "usage": self.usage}

    def _choices(self, delta: Object) -> Iterator[Object]:
        if not self._started:
            self._started = True
            yield self._choice({"role": "assistant", "content": "" if "content" in delta else None})
        yield self._choice(delta)

    def _choice(self, delta: Object, finish_reason: str | None = None) -> Object:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class CompletionStream(ChatStream):
    """A converter of Responses events to legacy completion chunks: text only; a refusal counts as text."""

    kind = "text_completion"

    def _choices(self, delta: Object) -> Iterator[Object]:
        if delta.get("content") or delta.get("refusal"):
            yield self._choice(delta)

    def _choice(self, delta: Object, finish_reason: str | None = None) -> Object:
        text = delta.get("content") or delta.get("refusal") or ""
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _merge(message: Object, delta: Object) -> None:
    """Merge a ChatDeltas delta into a message: append texts, match calls by their index."""
    for name, value in delta.items():
        current = message.get(name)
        if current is None:
            message[name] = value
        elif isinstance(value, str):
            message[name] = current + value
        elif isinstance(value, dict):
            _merge(current, value)
        elif isinstance(value, list):
            for entry in value:
                if entry["index"] < len(current):
                    _merge(current[entry["index"]], entry)
                else:
                    current.append(entry)


def _all_choices(stream: ChatStream, response: Object) -> list[Object]:
    type_name = "response.completed"
    if response.get("status") == "incomplete":
        type_name = "response.incomplete"
    return [chunk["choices"][0] for chunk in stream.feed({"type": type_name, "response": response})]


def chat_completion(
    response: Object, completion_id: str, created: int, model: str, legacy_functions: bool = False
) -> Object:
    """Translate a complete response that did not fail to one chat completion."""
    stream = ChatStream(completion_id, created, model, legacy_functions=legacy_functions)
    *choices, last = _all_choices(stream, response)
    message: Object = {"role": None, "content": None, "refusal": None}
    for choice in choices:
        _merge(message, choice["delta"])
    for entry in (*message.get("tool_calls", ()), *message.get("images", ())):
        del entry["index"]
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last["finish_reason"]}
    return stream.whole("chat.completion", choice)


def text_completion(response: Object, completion_id: str, created: int, model: str) -> Object:
    """Translate a complete response that did not fail to one legacy completion."""
    stream = CompletionStream(completion_id, created, model)
    choices = _all_choices(stream, response)
    return stream.whole(stream.kind, {**choices[-1], "text": "".join(choice["text"] for choice in choices)})


# == 20 codings ===============================================================
# Content codings of bodies: gzip, deflate, zstd (by Python's own module or libzstd); the C library's memory.

ZSTD_NAMES = ("libzstd.so.1", "libzstd.1.dylib", "/opt/homebrew/lib/libzstd.1.dylib", "libzstd.dll")
MMAP_THRESHOLD = -3  # glibc's number of this parameter of mallopt
ZSTD_LEVEL = 3  # zstd's own default, and Codex's


@functools.lru_cache(maxsize=1)
def libzstd() -> Any:
    """Load the system's libzstd, for Python before 3.14; return None if it is not installed."""
    import ctypes  # late, as below: the import costs 5 ms at the start

    for name in ZSTD_NAMES:
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name)
            for function in ("compressBound", "compress", "decompressStream", "freeDStream"):
                getattr(library, f"ZSTD_{function}").restype = ctypes.c_size_t
            library.ZSTD_createDStream.restype = ctypes.c_void_p
            return library
    return None


def return_large_blocks() -> None:
    """Have the C library give each freed block of LARGE_BODY or more back to the system.

    glibc keeps such blocks after a while, in an arena for each thread: the memory of large bodies would stay.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError, ImportError):  # another C library, or none
        import ctypes

        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE_BODY)


def zstd_module() -> Any:
    """Return the zstd module of Python 3.14; None in older versions."""
    if sys.version_info < (3, 14):
        return None
    with contextlib.suppress(ImportError):
        from compression import zstd  # type: ignore[import-not-found]
        return zstd
    return None


def zstd_compress(body: bytes) -> bytes | None:
    """Compress a body with zstd; return None if zstd is not available."""
    if zstd_module():
        return zstd_module().compress(body, ZSTD_LEVEL)  # type: ignore[no-any-return]
    library = libzstd()
    if library is None:
        return None
    import ctypes

    bound = library.ZSTD_compressBound(ctypes.c_size_t(len(body)))
    target = ctypes.create_string_buffer(bound)
    size = library.ZSTD_compress(target, ctypes.c_size_t(bound), bytes(body), ctypes.c_size_t(len(body)),
                                 ZSTD_LEVEL)
    if size <= bound:
        return ctypes.string_at(target, size)  # libzstd reports an error as a size near 2^64
    return None


def zstd_decompress(body: bytes, limit: int) -> bytes:
    """Decompress one zstd frame, within `limit` bytes. Raises as `decompress` does."""
    if zstd_module():
        reader = zstd_module().ZstdDecompressor()
        try:
            content = reader.decompress(body, limit + 1)
        except zstd_module().ZstdError as exc:
            raise InvalidRequest("the body is not zstd") from exc
        complete = reader.eof and not reader.unused_data
    else:
        content, complete = _libzstd_decompress(body, limit)
    if len(content) > limit:
        raise BodyTooLarge(f"the decompressed body is above the limit of {limit} bytes")
    if not complete:
        raise InvalidRequest("the body is not one complete zstd frame")
    return bytes(content)


def _libzstd_decompress(body: bytes, limit: int) -> tuple[bytes, bool]:
    """Decompress with libzstd, piece by piece; also tell whether the frame ended with the body."""
    library = libzstd()
    if library is None:
        raise UnsupportedEncoding("libzstd is not installed on the bridge's host: install it there, or set "
                                  "`enable_request_compression = false` in [features] of Codex's config.toml")
    import ctypes

    buffer = ctypes.c_size_t * 3  # libzstd's ZSTD_inBuffer and ZSTD_outBuffer: address, size, bytes used
    stream = ctypes.c_void_p(library.ZSTD_createDStream())
    source = ctypes.create_string_buffer(body, len(body))
    target = ctypes.create_string_buffer(1 << 17)
    pieces, size, left = [], 0, 1
    read = buffer(ctypes.addressof(source), len(body), 0)
    try:
        while size <= limit:
            written = buffer(ctypes.addressof(target), len(target), 0)
            before = read[2]
            left = library.ZSTD_decompressStream(stream, ctypes.byref(written), ctypes.byref(read))
            if left > 1 << 63:  # libzstd reports an error as a size near 2^64
                raise InvalidRequest("the body is not zstd")
            pieces.append(target.raw[:written[2]])
            size += written[2]
            if left == 0 or (written[2] == 0 and read[2] == before):
                break
    finally:
        library.ZSTD_freeDStream(stream)
    return b"".join(pieces), left == 0 and read[2] == len(body)


def decompress(body: bytes, coding: str, limit: int) -> bytes:
    """Decode a content coding, within `limit` bytes.

    Raises UnsupportedEncoding, BodyTooLarge, InvalidRequest.
    """
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return body
    if coding == "zstd":
        return zstd_decompress(body, limit)
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise UnsupportedEncoding(f"unsupported Content-Encoding {coding!r} (use gzip, deflate or zstd)")
    reader = zlib.decompressobj(47 if coding != "deflate" or body[:1] == b"\x78" else -15)
    try:
        content = reader.decompress(body, limit + 1)
    except zlib.error as exc:
        raise InvalidRequest(f"the body is not {coding}: {exc}") from exc
    if len(content) > limit:
        raise BodyTooLarge(f"the decompressed body is above the limit of {limit} bytes")
    if not reader.eof or reader.unused_data:
        raise InvalidRequest(f"the body is not one complete {coding} stream")
    return content


# == 21 fields ================================================================
# Which headers are forwarded, to upstream and to the client, and the identity that requests carry.

CODEX_AGENT = re.compile(r"(?i:codex)[^/ ]*(?: Desktop)?/([0-9]+\.[0-9]+\.[0-9]+(?:-[0-9A-Za-z.]{1,20})?)")
PASSED_UP = frozenset((
    "originator", "session-id", "thread-id", "user-agent", "version", "x-client-request-id",
))  # no other header is forwarded, but for these families, whose names change with Codex's version
PASSED_FAMILIES = ("x-codex-", "x-openai-", "x-responsesapi-")
# The bridge sets these itself, for its own sign-in; `internal` ones are between Codex and ChatGPT (WIRE 4).
NOT_PASSED_UP = re.compile(r"x-codex-routing-hint|x-openai-(?:internal-.*|fedramp|account-routing-override)"
                           r"|.*(?:authorization|assertion).*")  # credentials, also of an agent
NAME_HEADERS = ("session-id", "thread-id", "x-client-request-id")  # with prompt_cache_key, for the cache
PASSED_DOWN = frozenset(("cf-ray", "content-type", "etag", "retry-after"))  # also x-*, openai-*
# A front proxy would obey the first two; the list's ETag is of upstream's list, not of this bridge's.
NOT_PASSED_DOWN = ("x-accel-", "x-sendfile", "x-qoo-bridge-", "x-models-etag")
SESSION_HEADERS = ("session-id", "session_id", "conversation_id")  # newest first (WIRE 3)


class ClientHeaders(NamedTuple):
    """What a client's headers say about the client."""

    codex: bool  # the client is Codex, whose own values are forwarded unchanged
    version: str  # Codex's version; "" if the headers do not name it
    session: str  # the session id, from any of SESSION_HEADERS; "" without one


def read_client_headers(headers: Mapping[str, str]) -> ClientHeaders:
    """Read what a request's headers (with lower-case names) say about the client."""
    match = CODEX_AGENT.match(headers.get("user-agent", ""))
    codex = match is not None or headers.get("originator", "").lower().startswith("codex") \
        or "x-codex-turn-metadata" in headers or "x-codex-window-id" in headers
    session = next((headers[name] for name in SESSION_HEADERS if headers.get(name)), "")
    return ClientHeaders(codex, match[1] if match else "", session)


class Identity(NamedTuple):
    """The originator and version that the bridge sends for clients that are not Codex."""

    originator: str
    version: str

    def headers(self) -> dict[str, str]:
        """Return the identity's headers, for the bridge's own requests."""
        return {"version": self.version, "originator": self.originator, "user-agent": USER_AGENT}


def upstream_headers(headers: Mapping[str, str], client: ClientHeaders, identity: Identity,
                     name: str) -> dict[str, str]:
    """Select the client's headers to forward, and add the headers that Codex sends to ChatGPT.

    This is an allow-list. It never forwards any other header, such as the client's credentials or addresses.
    `name` is the conversation's; upstream caches only where it stands in all of NAME_HEADERS (WIRE 4).
    The sender adds the headers for sign-in, routing and framing.
    """
    chosen = {"version": client.version or identity.version, "originator": identity.originator,
              "user-agent": USER_AGENT, **dict.fromkeys(NAME_HEADERS, name)}
    if not client.codex:
        return chosen
    if headers.get("originator"):  # an old Codex sends no user agent on a WebSocket
        chosen["user-agent"] = f"{headers['originator']}/{chosen['version']}"
    if headers.get("thread_id"):
        chosen["thread-id"] = headers["thread_id"]
    chosen.update({name: value for name, value in headers.items() if value and is_passed_up(name)})
    chosen.update({name: cache_name(chosen[name]) for name in NAME_HEADERS})  # the key is as short
    return chosen


@functools.lru_cache(maxsize=256)
def is_passed_up(name: str) -> bool:
    """Tell whether Codex's header is forwarded to upstream."""
    return (name in PASSED_UP or name.startswith(PASSED_FAMILIES)) and not NOT_PASSED_UP.fullmatch(name)


def routing_hint(request: Mapping[str, Any]) -> str:
    """Return Codex's x-codex-routing-hint: `model=<slug>[;tier=<tier>]` (WIRE 3)."""
    tier = request.get("service_tier")
    return f"model={request.get('model')}" + (f";tier={tier}" if isinstance(tier, str) else "")


def downstream_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Select the upstream headers that the client gets."""
    return {name: value for name, value in headers.items() if not name.startswith(NOT_PASSED_DOWN)
            and (name in PASSED_DOWN or name.startswith(("x-", "openai-")))}


def header_text(text: str) -> str:
    """Return a client's or upstream's text in the form of a header's value: at most 500 bytes of ASCII."""
    return re.sub(r"[^\x20-\x7e]", "?", text[:500])


# == 22 events ================================================================
# What a server-sent event is and says; events in, one response out. The room outputs splits a stream.

KEPT_EVENTS = ("response.output_item.done", "response.content_part.done", "response.output_text.done")
OPENING_EVENTS = ("response.created", "response.queued", "response.in_progress")  # before any answer
NOTABLE_EVENT = re.compile(  # an event that may add to the response, or end it
    rb"response\.(?:output_item\.done|content_part\.done|output_text\.done|completed|failed|incomplete)")
TERMINAL_MARK = re.compile(rb"response\.(?:completed|failed|incomplete)")
SIDE_EVENTS = ("codex.", "responsesapi.")  # beginnings of types that only Codex knows (WIRE 6)
LIMITS_EVENT, METADATA_EVENT = "codex.rate_limits", "codex.response.metadata"  # those that are read here
OUTPUT_INDEX = re.compile(rb'"output_index" ?: ?([0-9]{1,9})')


def event_json(event: bytes) -> dict[str, Any] | None:
    """Return an event's JSON object; None without one."""
    lines = event.split(b"\n") if b"\r" not in event else re.split(rb"\r\n|\n|\r", event)
    parts = [line[5:] for line in lines if line.startswith(b"data:")]
    parsed = None
    if parts:
        parsed = json_or_none(b"\n".join(parts))
    if isinstance(parsed, dict):
        return parsed
    return None


def event_type(parsed: Mapping[str, Any] | None) -> str:
    """Return an event's JSON `type`, which is decisive, not the `event:` line (WIRE 5)."""
    value = parsed.get("type") if parsed else None
    return value if isinstance(value, str) else ""


def render_event(parsed: Mapping[str, Any]) -> bytes:
    """Encode an event in upstream's form; omit the `event:` line if the type is not one word."""
    type_name = event_type(parsed)
    name = b""
    if re.fullmatch(r"[\w.-]{1,100}", type_name, re.ASCII):
        name = f"event: {type_name}\n".encode()
    return b"%bdata: %b\n\n" % (name, json_bytes(parsed))


SIGN_BYTES = 1024  # a read with more holds more than signs of life
KEEPALIVE_MARK = b'"keepalive"'  # in upstream's own signs of life, which are no progress (WIRE 5)
COMMENTS = re.compile(rb"(?:(?::[^\r\n]*)?[\r\n])+")  # a read with nothing else; matched in one pass


CREATED_MARK = b"response.created"
OPENING_MARK = re.compile(rb'"type" ?: ?"response\.(?:created|queued|in_progress)"')
RARE_EVENT = re.compile(rb'"type"\s*:\s*"(?:error"|keepalive"|codex\.|responsesapi\.)')
SPECIAL_EVENT = re.compile(  # any event that is not passed on as it is; one search costs less than two
    rb'"type"\s*:\s*"(?:%b|error"|keepalive"|codex\.|responsesapi\.)' % NOTABLE_EVENT.pattern)
SPECIAL_FRAME = re.compile(SPECIAL_EVENT.pattern + rb'|response\.created"')  # on a WebSocket


def is_side_event(kind: str) -> bool:
    """Tell whether an event is no part of a response, and unknown to SDKs."""
    return kind == "keepalive" or kind.startswith(SIDE_EVENTS)


def with_etag(event: dict[str, Any], etag: str) -> dict[str, Any]:
    """Return a side event that names this bridge's own model list, not upstream's; the same one without.

    Codex fetches the list again for each ETag that is not its list's (WIRE 5).
    """
    headers = event.get("headers")
    if not isinstance(headers, dict):
        return event
    kept = {name: value for name, value in headers.items() if name.lower() != "x-models-etag"}
    if len(kept) == len(headers):
        return event
    if etag:
        kept = {"x-models-etag": etag, **kept}
    return {**event, "headers": kept}


def side_etag(event: Mapping[str, Any]) -> str:
    """Return the ETag of upstream's model list in a side event; "" without one."""
    for name, value in or_empty(event.get("headers"), dict).items():
        if name.lower() == "x-models-etag" and isinstance(value, str):
            return value
    return ""


def failed_event(event: Mapping[str, Any], created: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `response.failed` for an `error` event, which alone means nothing to Codex (WIRE 5).

    `created` is the response of the turn's `response.created`; {} if that has not come.
    """
    error = reported_error(event)
    code = error.get("code") or error.get("type") or "server_error"
    error = {**error, "code": code, "message": error.get("message") or str(code)}
    response = {"object": "response", "output": [], **created, "status": "failed", "error": error}
    return {"type": "response.failed", "sequence_number": event.get("sequence_number", 0),
            "response": response}


def restore_call_ids(events: bytes, call_ids: Mapping[str, bytes]) -> bytes:
    """Put the client's own long call ids back in the place of `short_call_id`'s."""
    if not call_ids:
        return events
    return SHORT_CALL_ID.sub(lambda match: call_ids.get(match[0].decode("ascii"), match[0]), events)


SHORT_CALL_ID = re.compile(rb"call_[0-9a-f]{40}")  # as `short_call_id` makes them


KEEPALIVE_EVENT = b'event: keepalive\ndata: {"type":"keepalive"}\n\n'  # resets Codex's idle timer (WIRE 5)
KEEPALIVE_COMMENT = b": keepalive\n\n"  # other clients' timers count bytes; SDKs fail on an unknown event


class ResponseAssembler:
    """Collects what a response's events carry, for the one object that they amount to.

    Upstream's final event has an empty `output` nowadays: the items are in `output_item.done` (WIRE 5). Where
    an item has no such event, its texts are taken from `content_part.done` and `output_text.done`.
    """

    def __init__(self) -> None:
        self.final: dict[str, Any] | None = None  # the final event
        self.error: dict[str, Any] | None = None  # a bare `error` event
        self.overflowed = False  # the events were too large to be kept: `output` is not filled
        self._items: dict[tuple[int, int], Any] = {}  # those without an index come last
        self._texts: dict[int, dict[int, Any]] = {}  # output index -> content index -> part
        self._ids: dict[int, str] = {}  # output index -> the item's id
        self._pending: list[bytes] = []  # events that look like one with an item or a text
        self._size = 0

    def keep(self, event: bytes) -> None:
        """Keep an event that looks like one with an item or a text; it is parsed only if it is needed."""
        if self._has_room(len(event)):
            self._pending.append(event)

    def _has_room(self, size: int) -> bool:
        """Tell whether the events are small enough to be kept; forget all of them if not."""
        self._size += size
        if self._size > MAX_EVENT:
            self.overflowed = True
            for kept in (self._pending, self._items, self._texts):
                kept.clear()
        return not self.overflowed

    def add(self, parsed: Mapping[str, Any], size: int = 0) -> None:
        """Add one event, of `size` bytes if it does not come from `keep`."""
        kind = event_type(parsed)
        index = parsed.get("output_index")
        if kind in KEPT_EVENTS and not self._has_room(size):
            return
        if kind == "response.output_item.done" and parsed.get("item") is not None:
            place = (0, index) if type(index) is int else (1, len(self._items))
            self._items[place] = parsed.get("item")
        elif kind in ("response.content_part.done", "response.output_text.done") and type(index) is int:
            self._add_text(index, parsed)
        elif kind in TERMINAL_EVENTS:
            self.final = dict(parsed)
        elif kind == "error":
            self.error = dict(parsed)

    def _add_text(self, index: int, parsed: Mapping[str, Any]) -> None:
        """Add a text, for an item that has no event of its own."""
        part = parsed.get("part")
        if isinstance(parsed.get("item_id"), str):
            self._ids[index] = parsed["item_id"]
        if not isinstance(part, dict):
            part = {"type": "output_text", "text": or_empty(parsed.get("text"), str), "annotations": []}
        place = parsed.get("content_index")
        message = self._texts.setdefault(index, {})
        message[place if type(place) is int else len(message)] = part

    def fill(self) -> bool:
        """Fill the final event's empty `output` from what was seen; tell whether the response changed."""
        response = self.final.get("response") if self.final else None
        if self.final is None or not isinstance(response, dict) or response.get("output"):
            return False
        items = self._output()
        if not items and response.get("output") is not None:
            return False
        self.final["response"] = {**response, "output": items}
        return True

    def _output(self) -> list[Any]:
        """Return the items seen, by their index; none where they were too large to be kept."""
        if self.overflowed:
            return []
        texts = []
        for event in self._pending:
            if b"output_item.done" not in event:
                texts.append(event)
                continue
            parsed = event_json(event) or {}
            if event_type(parsed) in KEPT_EVENTS:  # a text may only speak of one
                self.add(parsed)
        for event in texts:  # of items that had no event of their own
            index = OUTPUT_INDEX.search(event)
            if index and (0, int(index[1])) not in self._items:
                self.add(event_json(event) or {})
        items = {(0, index): text_message(parts, self._ids.get(index))
                 for index, parts in self._texts.items()}
        items.update(self._items)
        return [items[place] for place in sorted(items)]

    def set_fields(self, fields: Mapping[str, Any]) -> bool:
        """Set fields of the terminal event's response; tell whether the response changed."""
        response = self.final.get("response") if self.final else None
        if self.final is None or not isinstance(response, dict):
            return False
        completed = {**response, **fields}
        self.final["response"] = completed
        return completed != response

    def failure(self) -> BridgeError:
        """Return the reason for a missing response: upstream's error (429, 503, 400, 502), or truncation."""
        event = self.error or self.final
        if event is not None:
            return failure(event)
        return BadUpstream("upstream ended the stream without a terminal event")

    def response(self) -> dict[str, Any]:
        """Return the assembled response object. Raises what `failure` returns."""
        if self.final is None or event_type(self.final) == "response.failed":
            raise self.failure()
        self.fill()
        return or_empty(self.final.get("response"), dict)


def text_message(parts: Mapping[int, Any], item_id: str | None) -> dict[str, Any]:
    """Make an assistant's message of its parts, by content index."""
    content = [parts[place] for place in sorted(parts)]
    message = {"type": "message", "role": "assistant", "status": "completed", "content": content}
    if item_id is None:
        return message
    return {"id": item_id, **message}


def token_counts(response: Any) -> dict[str, int]:
    """Return a response's token counts: input, cached, output, reasoning."""
    usage = response.get("usage") if isinstance(response, dict) else None
    if not isinstance(usage, dict):
        return {}
    found = {"input": usage.get("input_tokens"), "output": usage.get("output_tokens")}
    for name, details in (("cached", "input_tokens_details"), ("reasoning", "output_tokens_details")):
        if isinstance(usage.get(details), dict):
            found[name] = usage[details].get(f"{name}_tokens")
    return {name: count for name, count in found.items() if type(count) is int}


# == 23 outputs ===============================================================
# Upstream's bytes are split into events; the client's bytes come out, for each kind of client and response.
# Lines end only at CR or LF, because str.splitlines would also split a text at U+2028.

BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))")


class Events:
    """A splitter of a byte stream into complete events; it keeps back an incomplete one."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []  # parts of the incomplete event
        self._size = 0  # bytes in those parts
        self._has_cr = False  # the stream has a CR: lines may end in CRLF or CR

    def feed(self, payload: bytes) -> bytes:
        """Return the unchanged bytes of all events that are now complete.

        Raises BadUpstream for an event above MAX_EVENT.
        """
        if self._has_cr or b"\r" in payload:
            return self._feed_with_cr(payload)
        cut = payload.rfind(b"\n\n") + 2
        if cut == 1:  # no blank line inside; but one may be split between two payloads
            cut = int(bool(self._parts) and self._parts[-1][-1:] == b"\n" == payload[:1])
        if cut == 0:
            self._keep(payload)
            return b""
        return self._take(payload, cut)

    def _feed_with_cr(self, payload: bytes) -> bytes:
        """Feed a stream whose lines end in CRLF or CR as well: rare, so simple rather than fast.

        A blank line can begin in what was kept: its last three bytes are looked at once more.
        """
        self._has_cr = True
        tail = b"".join(self._parts[-3:])[-3:]  # parts are never empty
        window = tail + payload
        cut = 0
        for match in BLANK_LINE.finditer(window):
            if match.end() < len(window) or not window.endswith(b"\r\n\r"):  # else its LF is on the way
                cut = match.end()
        if cut <= len(tail):
            if cut == 0:
                self._keep(payload)
                return b""
            events, rest = self._drain(), payload  # the blank line ended with what was kept
            at = len(events) - len(tail) + cut
            self._keep(events[at:] + rest)
            return events[:at]
        events = self._drain() + payload[:cut - len(tail)]
        self._keep(payload[cut - len(tail):])
        return events

    def _take(self, payload: bytes, cut: int) -> bytes:
        """Return the kept parts and `payload` up to `cut`; keep the rest of `payload`."""
        events = payload if cut == len(payload) else payload[:cut]
        if self._parts:
            events = self._drain() + events
        if cut < len(payload):
            self._keep(payload[cut:])
        return events

    def _drain(self) -> bytes:
        kept = b"".join(self._parts)
        self._parts, self._size = [], 0
        return kept

    def _keep(self, part: bytes) -> None:
        if part:
            self._parts.append(part)
            self._size += len(part)
        if self._size > MAX_EVENT:
            raise BadUpstream(f"upstream sent an event of more than {MAX_EVENT} bytes")


def split_events(events: bytes) -> list[bytes]:
    """Split the bytes of complete events into single events, each with its blank line."""
    if b"\r" not in events:
        return [piece + b"\n\n" for piece in events.split(b"\n\n")[:-1]]
    pieces, at = [], 0
    for match in BLANK_LINE.finditer(events):
        pieces.append(events[at:match.end()])
        at = match.end()
    return pieces


class Audience(NamedTuple):
    """What an output must know of the client that it is for."""

    codex: bool = False
    models_etag: str = ""  # of the model list that a Codex gets here; "" without one
    call_ids: Mapping[str, bytes] = {}  # short call id -> the client's own, JSON-escaped
    final_fields: Mapping[str, Any] = {}  # fields of the final response that upstream cannot know


SDK = Audience()  # a client that is not Codex


class ResponsesOutput:
    """The output for a Responses API client: upstream's events, with the terminal event's `output` filled.

    Side events go to a Codex only; a Codex gets an `error` as the `response.failed` that ends its turn.
    """

    def __init__(self, audience: Audience = SDK) -> None:
        self.assembler = ResponseAssembler()
        self._audience = audience
        self.count = 0  # events so far
        self.created: dict[str, Any] = {}  # the response of response.created
        self.begun = False  # an event of the answer itself has come: the request cannot be repeated
        self.done = False  # the terminal event has arrived: nothing may follow
        self.failure: BridgeError | None = None  # a failure that upstream reported, for `relay` to raise
        self.filler = KEEPALIVE_EVENT if audience.codex else KEEPALIVE_COMMENT
        self.side_events: dict[str, dict[str, Any]] = {}  # type -> the last one of that type
        self._events = Events()

    def final(self) -> tuple[str, dict[str, Any]]:
        """Return the last word of the terminal event's type (`completed`), and its response; else "", {}."""
        event = self.assembler.final
        if event is None:
            return "", {}
        response = event.get("response")
        return event_type(event).rpartition(".")[2], response if isinstance(response, dict) else {}

    def feed(self, payload: bytes) -> bytes:
        """Return the client's bytes for upstream's next bytes: only complete events."""
        events = self._events.feed(payload)
        if self._audience.call_ids:
            events = restore_call_ids(events, self._audience.call_ids)
        if not self.begun or SPECIAL_EVENT.search(events):
            return self._feed_notable(events)
        self.count += events.count(b"\ndata:") + events.startswith(b"data:")
        return events

    def _feed_notable(self, events: bytes) -> bytes:
        """Split and handle complete events; at least one of them may be notable."""
        pieces = []
        several = b"\r" in events or events.count(b"\n\n") > 1
        for event in split_events(events) if several else [events]:
            self.count += bool(event)
            is_passed_on = self.begun and not SPECIAL_EVENT.search(event)
            pieces.append(event if is_passed_on else self._replace(event))
            if self.done:
                break
        return b"".join(pieces)

    def _replace(self, event: bytes) -> bytes:
        """Return the client's bytes for one event."""
        is_created = not self.begun and CREATED_MARK in event
        if is_created or TERMINAL_MARK.search(event) or RARE_EVENT.search(event):
            parsed = event_json(event)
            if parsed is not None:
                return self._replace_parsed(event, parsed)
        self.begun = self.begun or (b"data:" in event and not OPENING_MARK.search(event))
        if NOTABLE_EVENT.search(event):
            self.assembler.keep(event)  # parsed only if the terminal event's output is empty
        return event

    def _replace_parsed(self, event: bytes, parsed: dict[str, Any]) -> bytes:
        """Return the client's bytes for one event; note what it says of the response."""
        kind = event_type(parsed)
        if is_side_event(kind):
            return self._replace_side(event, parsed)
        if kind == "error":
            return self._replace_error(event, parsed)
        if kind in TERMINAL_EVENTS:
            self.assembler.add(parsed)
            if self._complete():
                return render_event(self.assembler.final or parsed)
            return event
        if kind == "response.created":
            self.created = or_empty(parsed.get("response"), dict)
        self.begun = self.begun or kind not in OPENING_EVENTS
        if NOTABLE_EVENT.search(event):
            self.assembler.keep(event)
        return event

    def _replace_side(self, event: bytes, parsed: dict[str, Any]) -> bytes:
        """Return a side event for a Codex, with the bridge's own ETag; else at most a comment."""
        kind = event_type(parsed)
        if kind == "keepalive":
            return event if self._audience.codex else KEEPALIVE_COMMENT
        self._keep_side(kind, parsed)
        if not self._audience.codex:
            return b""
        own = with_etag(parsed, self._audience.models_etag)
        return event if own is parsed else render_event(own)

    def _keep_side(self, kind: str, parsed: dict[str, Any]) -> None:
        """Keep the last side event of each type that this bridge itself reads."""
        if kind in (LIMITS_EVENT, METADATA_EVENT):
            self.side_events[kind] = parsed

    def _replace_error(self, event: bytes, parsed: dict[str, Any]) -> bytes:
        """Return an `error` as it is, for a Codex as the failure that ends its turn.

        As the first event it ends an SDK's answer too: nothing is sent yet, so it can still be repaired.
        """
        self.assembler.add(parsed)
        codex = self._audience.codex
        if not codex and (self.begun or self.created):
            return event
        self.assembler.final = failed_event(parsed, self.created)
        self.done = True
        return render_event(self.assembler.final) if codex else event

    def _complete(self) -> bool:
        """Complete the terminal event's response; tell whether the response changed."""
        self.done = True
        filled = self.assembler.fill()
        if self._audience.final_fields:
            filled = self.assembler.set_fields(self._audience.final_fields) or filled
        return filled

    def break_off(self) -> None:
        """Take note that upstream ends here, without a terminal event."""
        self.failure = self.failure or self.assembler.failure()

    def render_error(self, error: BridgeError) -> bytes:
        """Return the bytes to send if upstream fails; b"" here: the missing terminal event shows the cut."""
        return b""


class ChatOutput(ResponsesOutput):
    """The output for a streaming chat client: Chat Completions chunks or legacy completion chunks."""

    def __init__(self, stream: ChatStream, audience: Audience) -> None:
        super().__init__(audience)
        self._stream = stream

    def feed(self, payload: bytes) -> bytes:
        """Return the chunks for upstream's next bytes; set `failure` if upstream reports one."""
        pieces = []
        events = restore_call_ids(self._events.feed(payload), self._audience.call_ids)
        for event in split_events(events):
            self.count += 1
            parsed = event_json(event)
            if parsed is None:
                continue
            pieces += [b"data: %b\n\n" % json_bytes(chunk) for chunk in self._chunks(parsed, len(event))]
            if self._stream.failed:
                self.failure = self.assembler.failure()
                break
            if self._stream.done:
                self._complete()
                pieces.append(b"data: [DONE]\n\n")
                break
        return b"".join(pieces)

    def _chunks(self, parsed: dict[str, Any], size: int) -> list[Object]:
        """Return the chunks of an event of `size` bytes; none for a side event."""
        kind = event_type(parsed)
        if is_side_event(kind):
            self._keep_side(kind, parsed)
            return []
        if kind == "response.created":
            self.created = or_empty(parsed.get("response"), dict)
        self.assembler.add(parsed, size)
        chunks = self._stream.feed(parsed)
        self.begun = self.begun or bool(chunks)
        return chunks

    def render_error(self, error: BridgeError) -> bytes:
        """Return the bytes of an error object, which SDKs raise as an exception."""
        return b"data: %b\n\n" % json_bytes(error.body())


class JsonOutput(ResponsesOutput):
    """The output for one JSON response: collects the events; the client gets no bytes until their end."""

    def feed(self, payload: bytes) -> bytes:
        """Collect upstream's next bytes."""
        super().feed(payload)
        return b""


# == 24 frames ================================================================
# Frame codec of RFC 6455: bytes in, messages out; message in, frame out. No I/O, no clock, no random numbers.
# The bridge never negotiates an extension, so every reserved bit is an error.

WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
WEBSOCKET_VERSION = "13"

OP_CONTINUATION, OP_TEXT, OP_BINARY = 0x0, 0x1, 0x2
OP_CLOSE, OP_PING, OP_PONG = 0x8, 0x9, 0xA  # control frames: never fragmented, 125 bytes at most
OPCODES = frozenset((OP_CONTINUATION, OP_TEXT, OP_BINARY, OP_CLOSE, OP_PING, OP_PONG))

CLOSE_GOING_AWAY, CLOSE_PROTOCOL_ERROR, CLOSE_UNSUPPORTED = 1001, 1002, 1003
CLOSE_NO_STATUS = 1005  # means a close frame without a code; never sent
CLOSE_INVALID_TEXT, CLOSE_POLICY, CLOSE_TOO_BIG = 1007, 1008, 1009
CLOSE_TRY_AGAIN, CLOSE_BAD_GATEWAY = 1013, 1014
# Codes of a close frame: IANA's registry without 1004, 1005, 1006 and 1015, and the free range from 3000.
CLOSE_CODES = frozenset((*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)))

FIN_BIT, RESERVED_BITS, OPCODE_BITS = 0x80, 0x70, 0x0F  # in a frame's first byte
MASK_BIT, LENGTH_BITS = 0x80, 0x7F  # in a frame's second byte
LENGTH_16, LENGTH_64 = 126, 127  # mean that the length follows, in 16 or 64 bits
SMALLEST_16, SMALLEST_64, LARGEST_64 = 126, 1 << 16, (1 << 63) - 1  # a length must use its shortest form
LONG_SIZES = {LENGTH_16: (2, SMALLEST_16), LENGTH_64: (8, SMALLEST_64)}  # bytes of the size, smallest size
HEAD_BYTES, MASK_BYTES, MAX_CONTROL_BYTES, MAX_REASON_BYTES = 2, 4, 125, 123


class FrameError(Exception):
    """A violation of RFC 6455 by the peer; `code` is the close code to answer with."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Message(NamedTuple):
    """One complete text or binary message, or one control frame."""

    opcode: int
    payload: bytes  # unmasked


def is_upgrade(headers: Mapping[str, str]) -> bool:
    """Tell whether headers (with lower-case names) request or accept a WebSocket."""
    for name, token in (("connection", "upgrade"), ("upgrade", "websocket")):
        if token not in (part.strip().lower() for part in headers.get(name, "").split(",")):
            return False
    return True


def valid_key(key: str) -> bool:
    """Tell whether a Sec-WebSocket-Key is 16 bytes in base64."""
    return re.fullmatch("[A-Za-z0-9+/]{22}==", key) is not None


def accept_key(key: str) -> str:
    """Return the Sec-WebSocket-Accept that answers a valid key."""
    digest = hashlib.sha1((key + WEBSOCKET_GUID).encode("ascii"), usedforsecurity=False).digest()
    return base64.b64encode(digest).decode("ascii")


MASK_PIECE = 1 << 16  # bytes; a multiple of the mask's


def apply_mask(payload: bytes, mask: bytes) -> bytes:
    """Mask or unmask a payload with four bytes; in pieces, because an integer takes its size once more."""
    size = len(payload)
    if size > MASK_PIECE:
        return b"".join([apply_mask(payload[at:at + MASK_PIECE], mask) for at in range(0, size, MASK_PIECE)])
    key = int.from_bytes((mask * (size // MASK_BYTES + 1))[:size], "little")
    return (int.from_bytes(payload, "little") ^ key).to_bytes(size, "little")


def unmask_in_place(wire: bytearray, mask: bytes, start: int, end: int) -> None:
    """Unmask a payload where it stands, piece by piece: a large one takes no more memory."""
    for at in range(start, end, MASK_PIECE):
        behind = min(end, at + MASK_PIECE)
        wire[at:behind] = apply_mask(bytes(wire[at:behind]), mask)


def encode_frame(opcode: int, payload: bytes, mask: bytes | None = None, fin: bool = True) -> bytes:
    """Return one frame. A client must pass a `mask` of four random bytes, new for each frame."""
    first = opcode | (FIN_BIT if fin else 0)
    mask_bit = MASK_BIT
    if mask is None:
        mask_bit = 0
    size = len(payload)
    if size < SMALLEST_16:
        head = bytes((first, mask_bit | size))
    elif size < SMALLEST_64:
        head = struct.pack("!BBH", first, mask_bit | LENGTH_16, size)
    else:
        head = struct.pack("!BBQ", first, mask_bit | LENGTH_64, size)
    if mask is None:
        return head + payload
    return head + mask + apply_mask(payload, mask)


def close_payload(code: int, reason: str = "") -> bytes:
    """Return a close frame's payload, with the reason truncated to fit; b"" for CLOSE_NO_STATUS."""
    if code == CLOSE_NO_STATUS:
        return b""
    cut = reason.encode("utf-8", "replace")[:MAX_REASON_BYTES]
    return struct.pack("!H", code) + cut.decode("utf-8", "ignore").encode("utf-8")


def parse_close(payload: bytes) -> tuple[int, str]:
    """Return a close frame's code and reason. Raises FrameError."""
    if not payload:
        return CLOSE_NO_STATUS, ""
    code = int.from_bytes(payload[:2], "big")  # a single byte gives a number below every code
    if code not in CLOSE_CODES:
        raise FrameError(CLOSE_PROTOCOL_ERROR, f"invalid close code in close frame: {payload[:2]!r}")
    return code, _decode(payload[2:])


def _decode(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise FrameError(CLOSE_INVALID_TEXT, f"text is invalid UTF-8 at byte {exc.start}") from exc


class FrameReader:
    """A decoder of one side's bytes into messages.

    `masked`: that side is a client, which must mask. `max_message` is the limit of a message in bytes; a
    frame's head is enough to refuse a larger one. Check `error` after each `feed`: the returned messages came
    before the error. After an error or a close frame, `feed` ignores all bytes.
    """

    def __init__(self, masked: bool, max_message: int) -> None:
        self.error: FrameError | None = None
        self._masked = masked
        self._max_message = max_message
        self._done = False
        self._pending = bytearray()  # the incomplete frame
        self._wanted_bytes = 0  # size that `_pending` must reach before it is parsed again
        self._opcode = OP_CONTINUATION  # opcode of the incomplete message; OP_CONTINUATION without one
        self._payload = bytearray()  # fragments of the incomplete message

    @property
    def incomplete_bytes(self) -> int:
        """Return how much of a message is here that is not complete."""
        return len(self._pending) + len(self._payload)

    def feed(self, received: bytes) -> list[Message]:
        """Return the messages and control frames that these bytes complete, in order."""
        messages: list[Message] = []
        if self._pending:
            self._pending += received
            if len(self._pending) < self._wanted_bytes:
                return messages  # without a copy, so that a frame in small pieces takes linear time
            wire: bytes | bytearray = self._pending  # not copied: a large message would take its size again
            self._pending = bytearray()
        else:
            wire = received
        try:
            self._cut(wire, messages)
        except FrameError as exc:
            # A new error: the raised one's traceback would keep the bytes in memory, in a reference cycle.
            self.error, self._done = FrameError(exc.code, str(exc)), True
        return messages

    def _cut(self, wire: bytes | bytearray, messages: list[Message]) -> None:
        """Append the messages that end in `wire`; keep an incomplete last frame."""
        start = 0
        while not self._done:
            payload_start, end = self._span(wire, start)
            if end > len(wire):
                self._wanted_bytes = end - start
                self._pending += wire[start:]
                return
            message = self._take(wire, start, payload_start, end)
            start = end
            if message is not None:
                messages.append(message)
                self._done = message.opcode == OP_CLOSE

    def _span(self, wire: bytes | bytearray, start: int) -> tuple[int, int]:
        """Return the start and end of a frame's payload; the end is beyond `wire` while bytes are missing."""
        payload_start = start + HEAD_BYTES
        if payload_start > len(wire):
            return payload_start, payload_start
        first, second = wire[start], wire[start + 1]
        self._check_head(first, second)
        size = second & LENGTH_BITS
        if size >= LENGTH_16:
            width, smallest = LONG_SIZES[size]
            payload_start += width
            if payload_start > len(wire):
                return payload_start, payload_start
            size = int.from_bytes(wire[payload_start - width : payload_start], "big")
            if not smallest <= size <= LARGEST_64:
                raise FrameError(CLOSE_PROTOCOL_ERROR, f"length {size} must not be encoded in {width} bytes")
        if first & OPCODE_BITS < OP_CLOSE and len(self._payload) + size > self._max_message:
            raise FrameError(CLOSE_TOO_BIG, f"message is above {self._max_message} bytes")
        payload_start += MASK_BYTES if self._masked else 0
        return payload_start, payload_start + size

    def _check_head(self, first: int, second: int) -> None:
        """Check a frame's first two bytes. Raises FrameError."""
        breach = self._breach(first & OPCODE_BITS, first, second)
        if breach:
            raise FrameError(CLOSE_PROTOCOL_ERROR, f"frame {first:#04x} {second:#04x} {breach}")

    def _breach(self, opcode: int, first: int, second: int) -> str:
        """Return the rule of RFC 6455 that these two bytes violate; "" for none."""
        if first & RESERVED_BITS or opcode not in OPCODES:
            return "has a reserved bit or opcode"
        if (second & MASK_BIT != 0) != self._masked:
            return "is not masked" if self._masked else "is masked"
        if opcode >= OP_CLOSE:
            short = first & FIN_BIT and second & LENGTH_BITS <= MAX_CONTROL_BYTES
            return "" if short else "is a control frame that is fragmented or too long"
        if (opcode == OP_CONTINUATION) == (self._opcode == OP_CONTINUATION):
            return "interrupts a message" if opcode else "continues no message"
        return ""

    def _take(self, wire: bytes | bytearray, start: int, payload_start: int, end: int) -> Message | None:
        """Return the message that a frame completes; None if more fragments follow."""
        opcode, fin = wire[start] & OPCODE_BITS, wire[start] & FIN_BIT
        mask = bytes(wire[payload_start - MASK_BYTES : payload_start])
        if not self._masked:
            payload = bytes(memoryview(wire)[payload_start:end])
        elif isinstance(wire, bytearray):
            unmask_in_place(wire, mask, payload_start, end)
            payload = bytes(memoryview(wire)[payload_start:end])
        else:
            payload = apply_mask(wire[payload_start:end], mask)
        if not fin or opcode == OP_CONTINUATION:
            self._opcode = self._opcode or opcode
            self._payload += payload
            if not fin:
                return None
            opcode, payload = self._opcode, bytes(self._payload)
            self._opcode, self._payload = OP_CONTINUATION, bytearray()
        if opcode == OP_TEXT and not payload.isascii():
            _decode(payload)
        elif opcode == OP_CLOSE:
            parse_close(payload)
        return Message(opcode, payload)


# == 25 access ================================================================
# Which clients are admitted: network, Host, Origin, key. The server calls this and sends the raised errors.

HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9a-z]{1,128}")  # RFC 9110, 5.6.2
LOCAL_NAMES = (".local", ".lan", ".internal", ".home.arpa", ".localhost")  # no public web page is below these


class Policy(NamedTuple):
    """The access rules from the options."""

    networks: tuple[Any, ...]
    origins: tuple[str, ...]
    hosts: tuple[str, ...]  # in lower case, with this host's own name


class Client(NamedTuple):
    """The sender of a request."""

    address: str  # the machine's IP address
    key: str = ""  # the key's name; "" while the bridge is open

    @property
    def name(self) -> str:
        """Return the name that identifies this client: its key's name, else its address."""
        return self.key or self.address

    @property
    def owner(self) -> str:
        """Return under which name what this client stores is kept: no key has another's, nor an address."""
        return f"key {self.key}" if self.key else f"address {self.address}"


@functools.lru_cache(maxsize=1024)
def network_allows(address: str, networks: tuple[Any, ...]) -> bool:
    """Tell whether an address may connect; loopback always may. IPv4 in IPv6 counts as IPv4."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    inner = getattr(parsed, "ipv4_mapped", None)
    parsed = inner or parsed
    return parsed.is_loopback or any(parsed.version == net.version and parsed in net for net in networks)


@functools.lru_cache(maxsize=1024)
def host_allowed(value: str, names: tuple[str, ...]) -> bool:
    """Tell whether a Host header names this bridge: an address, a single label, a local or known name.

    This blocks DNS rebinding, where a web page's own host name resolves to this host.
    """
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?", value)
    if match is None:
        return False
    name = match[1].strip("[]").rstrip(".").lower()
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return bool(name) and ("." not in name or name.endswith(LOCAL_NAMES) or name in names)


def check_browser(method: str, headers: Mapping[str, str], policy: Policy) -> None:
    """Refuse a web page's request unless its origin is allowed. Raises Forbidden.

    A request without an Origin passes. A browser's POST must be JSON, because a browser preflights JSON.
    """
    origin = headers.get("origin")
    if origin is not None and origin not in policy.origins:
        raise Forbidden("this web page may not use the bridge; --allow-origin permits its origin")
    host = headers.get("host", "localhost")
    if len(host) > MAX_HOST or not host_allowed(host, policy.hosts):
        raise Forbidden(f"{host[:MAX_HOST]!r} is not a name of this bridge; --allow-host adds a name")
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and content_type != "application/json" and is_from_browser(headers):
        raise Forbidden("a browser's POST must have the content type application/json")


def is_from_browser(headers: Mapping[str, str]) -> bool:
    """Tell whether a web page sent a request."""
    return "origin" in headers or any(name.startswith("sec-fetch-") for name in headers)


def check_key(headers: Mapping[str, str], keys: Iterable[NamedSecret]) -> str:
    """Return the name of the client's key. Raises InvalidKey.

    Compare every key in constant time, so that the duration reveals nothing.
    """
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = [bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
    if not any(given):
        raise MissingKey("this bridge requires a key: send `Authorization: Bearer …` or `x-api-key: …`")
    name = ""
    for key in keys:
        for text in given:  # an SDK always sends a Bearer, even beside another key header
            if hmac.compare_digest(text.encode("utf-8", "replace"), key.secret.encode("utf-8")):
                name = key.name
    if not name:
        raise InvalidKey("unknown API key")
    return name


def cors_headers(headers: Mapping[str, str], policy: Policy, preflight: bool) -> dict[str, str]:
    """Return the CORS headers for an allowed origin; {} for any other."""
    origin = headers.get("origin")
    if origin is None or origin not in policy.origins:
        return {}
    fields = {"access-control-allow-origin": origin, "vary": "origin"}
    if not preflight:
        return {**fields, "access-control-expose-headers": "*"}
    asked = headers.get("access-control-request-headers", "").lower()
    names = [name for name in re.split(r"[\s,]+", asked[:4000]) if HEADER_NAME.fullmatch(name)]
    allowed = dict.fromkeys(("authorization", "content-type", "x-api-key", "session-id", "thread-id", *names))
    return {**fields, "access-control-allow-methods": "GET, POST, OPTIONS", "access-control-max-age": "600",
            "access-control-allow-headers": ", ".join(allowed)}


def read_key_file(text: str) -> tuple[NamedSecret, ...]:
    """Read lines of NAME=SECRET; # begins a comment. Raises ValueError, with the line number only."""
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                keys.append(read_key(line.strip()))
            except ValueError as exc:
                raise ValueError(f"line {number}: {exc}") from exc
    return tuple(keys)


###############################################################################
# D  the bridge
# May enter: a client's connection. One request goes from accept to its log line.
# May not leave: a header value or a body into the log. Upstream is reached through part B only.
###############################################################################


# == 26 catalog ===============================================================
# The live model list and the aliases. No list is bundled; without one, no catalogue rule applies to requests.

class ModelList(NamedTuple):
    """One model list from upstream."""

    raw: dict[str, Any]
    entries: dict[str, dict[str, Any]]  # by slug
    models: dict[str, Model]  # by slug: the facts that the rules need
    etag: str
    created: int  # Unix time at which this bridge first had a list


def parse_model_list(reply: BufferedReply, created: int) -> ModelList:
    """Read upstream's `{"models": [...]}`. Raises BadUpstream for any other form."""
    raw = reply.json_or_raise()
    models = raw.get("models")
    if not isinstance(models, list):
        raise BadUpstream("unexpected format of upstream's model list")
    entries = {entry["slug"]: entry for entry in dicts_in(models)
               if HEADER_WORD.fullmatch(or_empty(entry.get("slug"), str))}
    known = {slug: read_model(entry) for slug, entry in entries.items()}
    return ModelList(raw, entries, known, reply.headers.get("etag", ""), created)


def model_priority(entry: Mapping[str, Any]) -> float:
    """Return an entry's `priority`; the model with the lowest comes first."""
    priority = finite_number(entry.get("priority"))
    if priority is None:
        return 1e9
    return priority


def visible_models(models: ModelList) -> list[dict[str, Any]]:
    """Return the entries that clients may see, best first."""
    shown = [entry for entry in models.entries.values() if entry.get("visibility", "list") == "list"]
    return sorted(shown, key=model_priority)


def read_model(entry: Mapping[str, Any]) -> Model:
    """Return the facts of a catalogue entry that the rules need."""
    tiers = entry.get("service_tiers")
    return Model(
        str(entry.get("slug")), entry.get("use_responses_lite") is True,
        tuple(str(level.get("effort")) for level in dicts_in(entry.get("supported_reasoning_levels"))),
        tuple(str(tier.get("id")) for tier in dicts_in(tiers)) if isinstance(tiers, list) else None,
    )


def alias_target(models: ModelList, target: str) -> str:
    """Return the slug for an alias's target: that slug, else the best with that prefix, else the best."""
    slugs = [str(entry["slug"]) for entry in visible_models(models)]
    if target in models.entries or not slugs:
        return target
    return next((slug for slug in slugs if slug.startswith(target)), slugs[0])


def split_effort(name: str, marks: str) -> tuple[str, str]:
    """Split a name such as `gpt-5.5:high` at the last of `marks`; the effort is "" without one."""
    match = re.fullmatch(f"(.+)[{marks}]({'|'.join(EFFORTS)})", name)
    if match:
        return match[1], match[2]
    return name, ""


def newer_family(models: ModelList, target: str) -> str:
    """Return a newer family of visible models than an alias's target such as `gpt-5`; "" without one."""
    match = re.fullmatch(r"(\D*)([0-9]{1,4})", target)
    if match is None:
        return ""
    pattern = re.compile(re.escape(match[1]) + r"([0-9]{1,4})(?![0-9])")
    found = [pattern.match(str(entry["slug"])) for entry in visible_models(models)]
    newest = max((int(each[1]) for each in found if each), default=0)
    if newest <= int(match[2]):
        return ""
    return f"{match[1]}{newest}"


class Resolved(NamedTuple):
    """What a request's model name means."""

    slug: str
    model: Model | None  # the slug's catalogue entry; None if it is unknown
    effort: str  # in the name or in the alias; "" without one


class Catalog:
    """The model lists, one per client version, fetched in the background and kept if a fetch fails.

    `_changed` (a condition) guards the fields. At most one fetch per version runs at a time.
    """

    VERSIONS = 8  # lists kept, each for one version of Codex clients

    def __init__(self, fetch: Callable[[str, str], BufferedReply], aliases: Mapping[str, str],
                 version: str) -> None:
        self._fetch = fetch  # (client version, etag) -> reply
        self._aliases = dict(aliases)
        self.version = version
        self._changed = threading.Condition()
        self._lists: dict[str, ModelList] = {}
        self._fetched_at: dict[str, float] = {}  # version -> monotonic time at which the last fetch ended
        self._problem: dict[str, BridgeError] = {}  # version -> why the last fetch failed
        self._fetching: set[str] = set()
        self._seen_etag = ""  # the last ETag of a reply that caused a new fetch
        # version -> the list and the aliases, their encoding in Codex's shape, and its ETag
        self._encoded: dict[str, tuple[ModelList, Mapping[str, str], bytes, str]] = {}
        self.refused: dict[str, str] = {}  # ignored alias -> reason

    def get(self, version: str = "", wait: float = 0) -> ModelList | None:
        """Return a version's list; fetch an old one again in the background.

        Without a list, wait up to `wait` seconds for a fetch: the one that is running, else a new one.
        """
        version = version or self.version
        if version in self._lists or not wait:
            if self._is_due(version):
                self.refresh_soon(version)
            return self._lists.get(version)
        until = time.monotonic() + wait
        with self._changed:  # after a failed fetch the next one is due within REFRESH_PAUSE
            while not (self._is_due(version) or version in self._lists or version in self._fetching):
                self._changed.wait(min(until - time.monotonic(), REFRESH_PAUSE / 10))
        if version not in self._lists:
            self.refresh_soon(version)
        with self._changed:
            self._changed.wait_for(lambda: version not in self._fetching, until - time.monotonic())
            return self._lists.get(version)

    def _is_due(self, version: str) -> bool:
        """Tell whether a list is to be fetched; after "not signed in" always: that costs no request."""
        if isinstance(self._problem.get(version), NotSignedIn):
            return True
        pause = CATALOG_AGE if version in self._lists else REFRESH_PAUSE
        return time.monotonic() - self._fetched_at.get(version, -1e9) > pause

    def cached(self, version: str) -> ModelList | None:
        """Return a version's list, which `get` keeps fresh; None if it was never fetched."""
        if version in self._lists:
            return self.get(version)
        return None

    def require(self, version: str = "") -> ModelList:
        """Return a version's list, waiting for the first fetch. Raises the fetch's error."""
        models = self.get(version, CATALOG_WAIT)
        if models is None:
            problem = self._problem.get(version or self.version)
            raise problem or UpstreamTimeout("upstream has not sent its model list yet")
        return models

    def refresh_soon(self, version: str = "") -> None:
        """Fetch in a thread of its own, unless a fetch is running."""
        version = version or self.version
        if self._claim(version) and not start_thread("catalog", self._refresh, version):
            with self._changed:
                self._fetching.discard(version)
                self._changed.notify_all()

    def refresh(self) -> None:
        """Fetch the list again, or wait up to CATALOG_WAIT for the running fetch."""
        if self._claim(self.version):
            self._refresh(self.version)
        else:
            with self._changed:
                self._changed.wait_for(lambda: self.version not in self._fetching, CATALOG_WAIT)

    def observe_etag(self, etag: str) -> None:
        """Fetch the list again if a reply's `x-models-etag` differs from the list's ETag."""
        models = self._lists.get(self.version)
        if models and models.etag and etag not in (models.etag, self._seen_etag):
            self._seen_etag = etag  # fetch only once: the list's own ETag may have another notation
            self.refresh_soon()

    def _claim(self, version: str) -> bool:
        with self._changed:
            if version in self._fetching:
                return False
            self._fetching.add(version)
            return True

    def _refresh(self, version: str) -> None:
        """Fetch a version's list and keep it. Call `_claim` first."""
        old = models = self._lists.get(version)
        problem: BridgeError | None = BadUpstream("cannot fetch the model list")
        try:
            reply = self._fetch(version, old.etag if old else "")
            if reply.status != 304 or old is None:
                models = parse_model_list(reply, old.created if old else int(time.time()))
            if old is None and models is not None and version == self.version:
                log.info("aliases: %s", self.describe_aliases(models))
            problem = None
        except BridgeError as exc:
            log.info("cannot fetch the model list: %s", exc.message)
            problem = exc
        finally:
            with self._changed:
                self._fetching.discard(version)
                self._keep(version, models, problem)
                self._changed.notify_all()

    def _keep(self, version: str, models: ModelList | None, problem: BridgeError | None) -> None:
        """Keep a fetch's result, and forget the versions with the oldest fetches."""
        self._fetched_at.pop(version, None)
        self._fetched_at[version] = time.monotonic()
        self._problem.pop(version, None)
        if problem is not None:
            self._problem[version] = problem
        elif models is not None:
            self._lists[version] = models
        for stale in [other for other in self._fetched_at if other != self.version][:-self.VERSIONS]:
            del self._fetched_at[stale]
            for kept in (self._problem, self._lists, self._encoded):
                kept.pop(stale, None)
        self._refuse_shadows(models)

    def _refuse_shadows(self, models: ModelList | None) -> None:
        """Drop an alias that has a real model's name, because it would make that model unreachable."""
        shadows = [name for name in self._aliases if models and name in models.entries]
        for alias in shadows:
            self.refused[alias] = f"ignoring the alias {alias}: the catalogue has a model of that name"
            log.error("%s", self.refused[alias])
        # A new dict, because other threads may be iterating over the old one.
        self._aliases = {name: target for name, target in self._aliases.items() if name not in shadows}

    def is_alias(self, name: Any) -> bool:
        """Tell whether a model's name is an alias, with or without an effort behind it."""
        return isinstance(name, str) and not self._aliases.keys().isdisjoint(
            (name, split_effort(name, "-:")[0]))

    def is_at_hand(self, name: str) -> bool:
        """Tell whether `lookup` need not wait for a list to know a model."""
        return self.version in self._lists or (self.version in self._problem and not self.is_alias(name))

    def lookup(self, name: str, client_version: str, needed: bool) -> Resolved:
        """Return as `resolve` does, from the list that fits a client; wait for one where it is `needed`.

        A Codex knows the models of its own version's list, if it has asked for that. An alias means nothing
        without a list, so it waits in any case; another name does not once a fetch has failed.
        """
        models = self.cached(client_version) if client_version else None
        if models is None:
            waits = self.is_alias(name) or (needed and self.version not in self._problem)
            models = self.get(wait=CATALOG_WAIT if waits else 0)
        return self.resolve(name, models)

    def resolve(self, name: str, models: ModelList | None) -> Resolved:
        """Return what a model's name means: a model or an alias, perhaps with an effort behind it.

        Without a list, an alias means its literal target. An unknown model's name stays unchanged.
        """
        entries = models.entries if models else {}
        if name in self._aliases:
            return self._resolve_target(self._aliases[name], models)
        stem, effort = split_effort(name, "-:")
        if effort and name not in entries and stem in self._aliases:
            return self._resolve_target(self._aliases[stem], models)._replace(effort=effort)
        if not effort or name in entries or stem not in entries:
            stem, effort = name, ""
        return Resolved(stem, models.models.get(stem) if models else None, effort)

    def _resolve_target(self, target: str, models: ModelList | None) -> Resolved:
        """Return what an alias's target means: `gpt-5`, or `gpt-5:high`."""
        slug, effort = target, ""
        if models is None or target not in models.entries:
            slug, effort = split_effort(target, ":")
        if models is None:
            return Resolved(slug, None, effort)
        slug = alias_target(models, slug)
        return Resolved(slug, models.models.get(slug), effort)

    def aliases(self, models: ModelList | None) -> dict[str, str]:
        """Return each alias with what it means now: `gpt-5.5`, or `gpt-5.5:high`."""
        meanings = {name: self.resolve(name, models) for name in self._aliases}
        return {name: f"{found.slug}:{found.effort}" if found.effort else found.slug
                for name, found in meanings.items()}

    def describe_aliases(self, models: ModelList) -> str:
        """Say what each alias means now, and which newer family it could mean."""
        words = [f"{name} is {meaning}" for name, meaning in self.aliases(models).items()]
        for name, target in self._aliases.items():
            newer = newer_family(models, target)
            if newer:
                words.append(f"{newer} is a newer family: --alias {name}={newer}")
        return "; ".join(words)

    def openai_list(self, models: ModelList) -> list[dict[str, Any]]:
        """Return the visible models and the aliases in OpenAI's shape."""
        names = [entry["slug"] for entry in visible_models(models)] + list(self._aliases)
        shared = {"object": "model", "created": models.created, "owned_by": "openai"}
        return [{"id": name, **shared} for name in names]

    def codex_list(self, version: str, models: ModelList) -> tuple[bytes, str]:
        """Return the list in Codex's shape, encoded: upstream's list and the aliases; and its ETag."""
        kept, aliases = self._encoded.get(version), self._aliases
        if kept is None or kept[0] is not models or kept[1] is not aliases:
            extra = [self._alias_entry(name, models) for name in aliases]
            value = {**models.raw, "models": [*models.raw["models"], *filter(None, extra)]}
            body = json_bytes(value)
            kept = self._encoded[version] = (models, aliases, body, entity_tag(body))
        return kept[2:]

    def _alias_entry(self, name: str, models: ModelList) -> dict[str, Any]:
        """Return an alias's entry in Codex's list; {} for one without a model.

        `upgrade` and `availability_nux` are null: they would talk the user out of the alias (WIRE 7).
        """
        slug, model, effort = self.resolve(name, models)
        if slug not in models.entries:
            return {}
        entry = {**models.entries[slug], "slug": name, "display_name": name, "upgrade": None,
                 "availability_nux": None, "description": f"This bridge's alias for {slug}."}
        if effort:
            entry["default_reasoning_level"] = nearest_effort(effort, model)
            entry["description"] = f"This bridge's alias for {slug} with the effort {effort}."
        return entry

    def etag(self, version: str) -> str:
        """Return the ETag of the list that a Codex of a version gets here; "" without a list."""
        models = self.cached(version or self.version)
        if models is None:
            return ""
        return self.codex_list(version or self.version, models)[1]


def entity_tag(body: bytes) -> str:
    """Return a body's ETag."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


# == 27 telemetry =============================================================
# What the bridge reports about itself: the log line, /status, /metrics.
# Called at a request's begin and end, never for a single event.

LABEL_VALUES = 32  # distinct values of one /metrics label; all others count as "other"
TEXT_CHARS = 80  # characters kept of a peer's text: model, path, error code
RECENT_REQUESTS = 50
HOUR_MINUTES = 60
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds
TOKEN_KINDS = ("input", "cached", "output", "reasoning")  # cached is part of input, reasoning of output
TOKEN_LIMIT = 2**53  # a browser cannot represent this count or a larger one; upstream sent it by mistake
CLIENT_SUMS = ("requests", "failed_requests", "events", "sent_bytes", *TOKEN_KINDS)
TEXTS = ("id", "client", "key", "method", "path", "user_agent_kind", "model", "slug", "end", "error_by",
         "error_code")
FAILED_ENDS = ("failed", "cut", "error")
WINDOWS = ("primary", "secondary")  # of the plan's limits
CREDITS = ("has_credits", "unlimited", "balance")
LIMIT_GAUGES = {  # column of a window: metric, factor to the metric's unit
    "used_percent": ("rate_limit_used_ratio", 0.01),
    "window_minutes": ("rate_limit_window_seconds", 60),
    "reset_at": ("rate_limit_reset_timestamp_seconds", 1),
}
WINDOW_HEADERS = {  # window -> column -> the header that tells it
    window: {column: f"x-codex-{window}-{column.replace('_', '-')}" for column in LIMIT_GAUGES}
    for window in WINDOWS
}
CREDIT_HEADERS = {column: f"x-codex-credits-{column.replace('_', '-')}" for column in CREDITS}
DECIMAL = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")
METRIC_HELP = {  # for metrics whose name needs an explanation
    "failed_requests_total": "Requests that ended with an error of the bridge or of upstream.",
    "responses_total": "Requests by the status sent and by how the response ended.",
    "errors_total": "Errors by source (bridge or upstream) and code.",
    "tokens_total": "Tokens that upstream reported; input includes cached, output includes reasoning.",
    "first_byte_seconds": "Time from a request to the first byte of its response's body.",
    "request_seconds": "Time from a request to the end of its response.",
    "rate_limit_used_ratio": "Used share of the plan's window.",
}
QUIET = frozenset({"", "healthz", "metrics", "status"})  # last part of paths about the bridge itself

Labels = tuple[tuple[str, str], ...]
Sample = tuple[str, Mapping[str, str], float]  # suffix of the metric's name, labels, value


class Record:
    """The log entry of one request. The request's thread writes it, and only this room reads it.

    It is not a dataclass, because the module's imports would cost a tenth of the start.
    """

    def __init__(self, client: str = "", started: float | None = None) -> None:
        self.id = next_id()
        self.client = client  # its address
        self.key = ""  # the name of the client's key
        self.method = self.path = "-"
        self.user_agent_kind = ""  # "codex" or "other"
        self.model = ""  # the model that the client named
        self.slug = ""  # the model that upstream got
        self.rules: tuple[str, ...] = ()
        self.repairs: tuple[str, ...] = ()
        self.status = 0
        self.started = time.monotonic() if started is None else started  # seconds
        self.first_byte: float | None = None  # seconds from the start
        self.total = 0.0  # seconds
        self.events = 0
        self.bytes = 0
        self.usage: dict[str, int] = {}  # by TOKEN_KINDS
        self.end = ""  # one of ENDS
        self.error_by = ""  # "", "bridge" or "upstream"
        self.error_code = ""
        self.asks_for_key = False  # the status page asks before a person has typed the key
        self.waiting = False  # for its key's place

    def mark_first_byte(self) -> None:
        """Record the current time as the time to the first byte of the response's body."""
        self.first_byte = time.monotonic() - self.started

    def fail(self, error: BridgeError, end: str = "error") -> None:
        """Record the error that ended the request."""
        self.end, self.error_by, self.error_code = end, error.by, error.code

    def observe_final(self, end: str, response: Mapping[str, Any]) -> None:
        """Record usage and failure of a terminal event's response; `end` is the last word of its type."""
        self.end = end
        self.usage = token_counts(response)
        if end in ("failed", "error"):
            self.error_by = "upstream"
            self.error_code = str(or_empty(response.get("error"), dict).get("code") or "")

    def finish(self) -> None:
        """Record the request's end and duration, unless they are already recorded."""
        self.end = self.end or "completed"
        self.total = self.total or time.monotonic() - self.started

    @property
    def error(self) -> tuple[str, str]:
        """Return the error's source and code; two empty texts without an error.

        The bridge marks its own errors, so all others are upstream's. A client that leaves is not an
        error; an incomplete answer is not one either.
        """
        if not (self.error_by or self.status >= 400 or self.end in FAILED_ENDS):
            return "", ""
        code = self.error_code or (f"http_{self.status}" if self.status >= 400 else self.end)
        return self.error_by or "upstream", code

    @property
    def tokens(self) -> dict[str, int]:
        """Return the valid token counts of the usage."""
        counts = {}
        for kind in TOKEN_KINDS:
            n = self.usage.get(kind)
            if type(n) is int and 0 <= n < TOKEN_LIMIT:
                counts[kind] = n
        return counts


def _printable(text: object) -> str:
    """Replace characters that JSON in UTF-8 or /metrics cannot carry: lone surrogates, control characters."""
    text = text[:TEXT_CHARS] if isinstance(text, str) else f"({type(text).__name__})"
    if text.isprintable():
        return text
    return one_line(text)


"".encode("unicode_escape")  # loads the codec now: a first load without a free file descriptor fails forever


def _word(*texts: object) -> str:
    """Return a value of the log line: ASCII without spaces; texts are joined by commas; none is a dash."""
    words = []
    for text in texts:
        word = text[:TEXT_CHARS] if isinstance(text, str) else f"({type(text).__name__})"
        words.append(word.encode("unicode_escape").decode("ascii").replace(" ", "\\x20"))
    return ",".join(words) or "-"


def log_line(record: Record) -> str:
    """Return a finished request's log line. The model is its only value from the request's body."""
    first_byte = "-" if record.first_byte is None else f"{record.first_byte * 1000:.0f}ms"
    client = _word(record.client) + (f"/{_word(record.key)}" if record.key else "")
    error = ""
    if record.error[0]:
        error = f" error={':'.join(map(_word, record.error))}"
    begin = f"{_word(record.id)} {client} {_word(record.method)} {_word(record.path)}"
    end = f"end={_word(record.end)}{error}"
    if not record.model and not record.slug:  # no model request: nothing is known of rules, events, tokens
        return f"{begin} status={record.status} total={record.total * 1000:.0f}ms bytes={record.bytes} {end}"
    tokens = [f"{kind}:{n}" for kind, n in record.tokens.items()]
    share, cached = cached_share(record.tokens), ""
    if share is not None:
        cached = f" cached={share * 100:.0f}%"
    return (
        f"{begin} {_word(record.model)}->{_word(record.slug)}"
        f" rules={_word(*record.rules)} repairs={_word(*record.repairs)} status={record.status}"
        f" first_byte={first_byte} total={record.total * 1000:.0f}ms events={record.events}"
        f" bytes={record.bytes} tokens={_word(*tokens)}{cached} {end}"
    )


def cached_share(tokens: Mapping[str, int]) -> float | None:
    """Return the share of the input tokens that upstream had cached; None if it does not say."""
    if not tokens.get("input") or "cached" not in tokens:
        return None
    return min(1.0, tokens["cached"] / tokens["input"])


def _row(record: Record) -> dict[str, Any]:
    """Convert a record to JSON values: printable texts, valid token counts, the error's source and code."""
    row = vars(record).copy()
    del row["asks_for_key"], row["started"]  # a monotonic time, meaningless outside this process
    row["error_by"], row["error_code"] = record.error
    for name in TEXTS:
        text = row[name]
        if not isinstance(text, str) or len(text) > TEXT_CHARS or not text.isprintable():
            row[name] = _printable(text)
    for name in ("rules", "repairs"):
        row[name] = [_printable(value) for value in row[name]]
    row["usage"] = record.tokens
    return row


def _header_number(text: object) -> float | None:
    """Read a plain decimal number; float() would also accept nan, inf and 1_0."""
    plain = isinstance(text, str) and DECIMAL.fullmatch(text.strip())
    if plain:
        return float(plain[0])
    return None


def parse_rate_limits(headers: Mapping[str, str]) -> dict[str, Any]:
    """Read the plan's limits from a reply's headers (WIRE 5); skip invalid values."""
    lowered = {name.lower(): value for name, value in headers.items()}
    limits: dict[str, Any] = {}
    for window in WINDOWS:
        names = WINDOW_HEADERS[window]
        columns = {column: _header_number(lowered.get(name)) for column, name in names.items()}
        if columns["used_percent"] is not None:
            limits[window] = columns
    credits = {column: lowered.get(name) for column, name in CREDIT_HEADERS.items()}
    if any(credits.values()):
        limits["credits"] = {name: _printable(text) for name, text in credits.items() if text}
    if lowered.get("x-codex-plan-type"):
        limits["plan_type"] = _printable(lowered["x-codex-plan-type"])
    return limits


def event_limits(event: Mapping[str, Any]) -> dict[str, Any]:
    """Read the plan's limits from a `codex.rate_limits` event (WIRE 6); skip invalid values."""
    given = or_empty(event.get("rate_limits"), dict)
    limits: dict[str, Any] = {}
    for window in WINDOWS:
        column_values = or_empty(given.get(window), dict)
        columns = {column: finite_number(column_values.get(column)) for column in LIMIT_GAUGES}
        if columns["used_percent"] is not None:
            limits[window] = columns
    credits = {name: _printable(str(value)) for name, value in or_empty(event.get("credits"), dict).items()
               if name in CREDITS and value is not None}
    if credits:
        limits["credits"] = credits
    if isinstance(event.get("plan_type"), str):
        limits["plan_type"] = _printable(event["plan_type"])
    return limits


def is_quiet(path: str) -> bool:
    """Tell whether a path is about the bridge itself; an open status page would crowd out other requests."""
    return path.rstrip("/").rpartition("/")[2] in QUIET


class Telemetry:
    """The counters, open streams, recent requests and last rate limits, all of bounded size."""

    def __init__(self) -> None:
        self._born = time.monotonic()
        self._lock = threading.Lock()  # guards every field below; its holder never blocks or calls out
        self._open: dict[str, Record] = {}
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT_REQUESTS)
        self._minutes: dict[int, dict[str, int]] = {}  # by unix time // 60
        self._counters: dict[tuple[str, Labels], int] = {}
        self._label_values: dict[str, set[str]] = {}
        self._durations: dict[tuple[str, str], list[float]] = {}  # (name, path) -> counts, then the sum
        self._limits: dict[str, Any] = {}
        self._last_headers: list[str] = []  # limit headers of the last reply

    def begin(self, record: Record) -> None:
        """Show a request as running."""
        if not is_quiet(_printable(record.path)):
            with self._lock:
                self._open[record.id] = record

    def finish(self, record: Record, now: float) -> bool:
        """Count a request that ended at the Unix time `now`; tell whether the log should show it.

        The record itself is not kept.
        """
        record.finish()
        row = {**_row(record), "time": now}
        del row["waiting"]
        quiet = is_quiet(row["path"])
        if not quiet or (row["error_by"] and not record.asks_for_key):
            with self._lock:
                self._open.pop(record.id, None)
                self._recent.append(row)
                self._add_minute(row)
                self._add_totals(row)
        return not quiet or record.status >= 400

    def discard(self, record: Record) -> None:
        """Undo `begin`, for a connection that became a WebSocket."""
        with self._lock:
            self._open.pop(record.id, None)

    def count(self, name: str, n: int = 1, **labels: str) -> None:
        """Add to the counter qoo_bridge_{name}_total of /metrics."""
        with self._lock:
            named = [(label, self._known(label, _printable(labels[label]))) for label in sorted(labels)]
            key = name, tuple(named)
            self._counters[key] = self._counters.get(key, 0) + n

    def rate_limits(self, headers: Mapping[str, str], now: float) -> None:
        """Keep the plan's limits from a reply's headers, if they name any."""
        self.keep_limits(parse_rate_limits(headers), now)

    def keep_limits(self, limits: Mapping[str, Any], now: float) -> None:
        """Keep the plan's limits; a window that is not among new ones is gone."""
        if limits:
            with self._lock:
                old = self._limits
                if not limits.keys().isdisjoint(WINDOWS):
                    old = without(old, *WINDOWS)
                self._limits = {**old, **limits, "seen": now}

    def snapshot(self, now: float) -> dict[str, Any]:
        """Return everything at the Unix time `now` as JSON values; the caller may add to the dict."""
        clock = time.monotonic()
        with self._lock:
            running = list(self._open.values())
            recent = list(self._recent)
            minutes = {minute: dict(sums) for minute, sums in self._minutes.items()}
            counters = sorted(self._counters.items())
            limits = dict(self._limits)
            durations = [(key, list(counts)) for key, counts in sorted(self._durations.items())]
        last = int(now // 60)
        hour = range(last - HOUR_MINUTES + 1, last + 1)
        empty = {"requests": 0, "errors": 0, "tokens": 0}
        clients = _client_sums(counters)
        return {
            "version": __version__,
            "now": now,
            "uptime": clock - self._born,
            "open": [{**_row(record), "age": clock - record.started} for record in running],
            "recent": recent[::-1],  # newest first
            "hour": [{"time": minute * 60, **minutes.get(minute, empty)} for minute in hour],
            "clients": clients,
            "totals": {name: sum(row[name] for row in clients) for name in CLIENT_SUMS},
            "errors": [{**dict(labels), "count": n} for (name, labels), n in counters if name == "errors"],
            "rate_limits": limits,
            "counters": [{"name": key[0], "labels": dict(key[1]), "value": n} for key, n in counters],
            "histograms": [
                {"name": name, "path": path, "counts": counts, "sum": seconds}
                for (name, path), (*counts, seconds) in durations
            ],
        }

    # Call the methods below with the lock held.

    def _known(self, label: str, value: str, admit: bool = True) -> str:
        """Return the value if it is one of the label's first LABEL_VALUES values, else "other"."""
        values = self._label_values.setdefault(label, set())
        if admit and len(values) < LABEL_VALUES:
            values.add(value)
        if value in values:
            return value
        return "other"

    def _observe(self, name: str, path: str, seconds: float) -> None:
        counts = self._durations.setdefault((name, path), [0] * (len(BUCKETS) + 2))
        counts[bisect_left(BUCKETS, seconds)] += 1
        counts[-1] += seconds

    def _add_minute(self, row: Mapping[str, Any]) -> None:
        minute = int(row["time"] // 60)
        if minute not in self._minutes:  # also drops future minutes, which a clock set back leaves
            hour = range(minute - HOUR_MINUTES + 1, minute)
            self._minutes = {m: sums for m, sums in self._minutes.items() if m in hour}
            self._minutes[minute] = {"requests": 0, "errors": 0, "tokens": 0}
        sums = self._minutes[minute]
        sums["requests"] += 1
        sums["errors"] += bool(row["error_by"])
        sums["tokens"] += row["usage"].get("input", 0) + row["usage"].get("output", 0)

    def _add_totals(self, row: Mapping[str, Any]) -> None:
        # A request that the bridge refused must not add a label value: otherwise a stranger who tries
        # many paths, models and addresses could use up all values.
        admit = row["error_by"] != "bridge"
        client = ("client", self._known("client", row["key"] or row["client"], admit))
        model = ("model", self._known("model", row["slug"] or row["model"], admit))
        path = self._known("path", row["path"], admit)
        failed = int(bool(row["error_by"]))
        sums: dict[tuple[str, Labels], int] = {
            ("requests", (client, model)): 1, ("failed_requests", (client, model)): failed,
            ("events", (client, model)): row["events"], ("sent_bytes", (client, model)): row["bytes"],
        }
        for kind, n in row["usage"].items():
            sums["tokens", (client, ("kind", kind), model)] = n
        end = ("end", self._known("end", row["end"]))
        sums["responses", (end, ("status", str(row["status"])))] = 1
        if failed:
            code = ("code", self._known("code", row["error_code"]))
            sums["errors", (("by", row["error_by"]), code)] = 1
        for key, n in sums.items():
            self._counters[key] = self._counters.get(key, 0) + n
        self._observe("request_seconds", path, row["total"])
        if row["first_byte"] is not None:
            self._observe("first_byte_seconds", path, row["first_byte"])


def _client_sums(counters: Iterable[tuple[tuple[str, Labels], int]]) -> list[dict[str, Any]]:
    """Sum the counters by client, the busiest client first."""
    rows: dict[str, dict[str, Any]] = {}
    for (name, labels), n in counters:
        named = dict(labels)
        column = named.get("kind", name)
        if "client" in named and column in CLIENT_SUMS:
            client = named["client"]
            row = rows.setdefault(client, {"client": client, **dict.fromkeys(CLIENT_SUMS, 0)})
            row[column] += n
    for row in rows.values():
        row["cached_share"] = cached_share(row)
    return sorted(rows.values(), key=lambda row: -row["requests"])


def _label_pairs(labels: Mapping[str, str]) -> str:
    """Return labels as `{a="b"}`, with backslash, quote and line end escaped (exposition format 0.0.4)."""
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    pairs = ",".join(f'{name}="{value.translate(escapes)}"' for name, value in labels.items())
    if pairs:
        return f"{{{pairs}}}"
    return ""


def _histogram_samples(histogram: Mapping[str, Any]) -> Iterable[Sample]:
    path = {"path": histogram["path"]}
    below = 0
    for bound, n in zip((*BUCKETS, "+Inf"), histogram["counts"]):
        below += n
        yield "_bucket", {**path, "le": str(bound)}, below
    yield "_sum", path, histogram["sum"]
    yield "_count", path, below


def metrics_text(snapshot: Mapping[str, Any]) -> str:
    """Return a snapshot in Prometheus' text exposition format 0.0.4."""
    families: dict[str, dict[str, list[Sample]]] = {"gauge": {}, "counter": {}, "histogram": {}}
    gauges = families["gauge"]
    gauges["info"] = [("", {"version": snapshot["version"]}, 1)]
    gauges["uptime_seconds"] = [("", {}, snapshot["uptime"])]
    gauges["waiting_requests"] = [("", {}, sum(row["waiting"] for row in snapshot["open"]))]
    gauges["open_streams"] = [("", {}, len(snapshot["open"]))]
    for window in WINDOWS:
        for column, (name, factor) in LIMIT_GAUGES.items():
            value = snapshot["rate_limits"].get(window, {}).get(column)
            if value is not None:
                gauges.setdefault(name, []).append(("", {"window": window}, round(value * factor, 6)))
    for counter in snapshot["counters"]:
        samples = families["counter"].setdefault(counter["name"] + "_total", [])
        samples.append(("", counter["labels"], counter["value"]))
    for histogram in snapshot["histograms"]:
        families["histogram"].setdefault(histogram["name"], []).extend(_histogram_samples(histogram))
    lines = []
    for metric_type, members in families.items():
        for name, samples in members.items():
            lines.append(f"# HELP qoo_bridge_{name} {METRIC_HELP.get(name, name.replace('_', ' '))}")
            lines.append(f"# TYPE qoo_bridge_{name} {metric_type}")
            lines += [f"qoo_bridge_{name}{end}{_label_pairs(labels)} {n}" for end, labels, n in samples]
    return "\n".join(lines) + "\n"


def next_id() -> str:
    """Return a short random id for the log."""
    return os.urandom(4).hex()


# == 28 log ===================================================================
# Standard error and bridge.log.

DEVICES = ("/dev/", "/proc/")  # beginnings of paths that are never rotated, whatever is behind them


class Log(logging.Handler):
    """A log handler for bridge.log (mode 0600, rotated at LOG_SIZE, one old file kept) and the console.

    The file comes first. A thread of its own writes to the console: one that takes nothing (Ctrl-S, a pipe
    that nobody reads) stops only that thread, and lines beyond CONSOLE_LINES are dropped.
    """

    CONSOLE_LINES = 1000  # that wait for the console's thread at most; it can hold as many itself
    MOMENT = 0.01  # seconds; the console gets the lines of so long at once
    LOOK_SECONDS = 1  # between two looks whether another program has moved or removed the file

    def __init__(self, path: str) -> None:
        super().__init__()
        if path and not path.startswith(DEVICES):
            path = os.path.realpath(path)  # a link is none of the log's: what it leads to is rotated
        self._path = path  # "" for the console only
        self._file = -1
        self._regular = False  # it can be rotated; a device or a pipe cannot, nor what /dev/stdout is
        self._size = 0  # bytes written since the last look
        self._look_at = 0.0  # monotonic
        self.problem = ""
        self._second = (0, "")  # a second and its text; formatting it costs as much as the rest of a line
        self._console: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self._has_thread = start_thread("console", self._write_console)
        if path:
            self._open()

    def _open(self) -> None:
        """Open the file. O_NONBLOCK: a pipe that nobody reads must not stop the start."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)
        try:
            self._file = os.open(self._path, flags, 0o600)
            is_file = stat.S_ISREG(os.fstat(self._file).st_mode)
            self._regular = is_file and not self._path.startswith(DEVICES)
            if self._regular:
                os.chmod(self._path, 0o600)  # for a file that already existed
        except OSError as exc:
            self._file = -1
            self.problem = f"cannot write {self._path} ({exc.strerror}); logging to standard error only"

    def emit(self, entry: logging.LogRecord) -> None:
        """Write one line; ignore errors of the log, so that a full disk stops no request."""
        if self._second[0] != int(entry.created):
            now = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.created))
            self._second = (int(entry.created), now)
        text = escape_unprintable(entry.getMessage())
        if entry.exc_info:  # each line is marked: no text in it can pass for a line of the log
            trace = logging.Formatter().formatException(entry.exc_info)
            text += "".join(f"\n  | {escape_unprintable(line)}" for line in trace.split("\n"))
        text = f"{self._second[1]},{int(entry.msecs):03d} {entry.levelname} {text}\n"
        line = text.encode("utf-8", "backslashreplace")
        self._write_file(line)
        if self._console.qsize() < self.CONSOLE_LINES:
            self._console.put(line)
        if not self._has_thread:  # the system gave none; it may give one now
            self._has_thread = start_thread("console", self._write_console)

    def _write_file(self, line: bytes) -> None:
        if self._regular and (self._size > LOG_SIZE // 10 or time.monotonic() > self._look_at):
            self._look_at, self._size = time.monotonic() + self.LOOK_SECONDS, 0
            self._follow()
        if self._file >= 0:
            with contextlib.suppress(OSError):
                self._size += os.write(self._file, line)

    def look_again(self) -> None:
        """Look before the next line whether another program has moved or removed the file."""
        self._look_at = 0.0

    def _follow(self) -> None:
        """Open the file anew if another program has moved or removed it; rotate it if it is too large."""
        with contextlib.suppress(OSError):
            ours = os.fstat(self._file)
            moved = not os.path.exists(self._path) or not os.path.samestat(ours, os.stat(self._path))
            if moved or ours.st_size > LOG_SIZE:
                os.close(self._file)
                self._file = -1
                if not moved:
                    os.replace(self._path, f"{self._path}.1")
        if self._file < 0:
            self._open()

    def _write_console(self) -> None:
        """Write what is logged to standard error, in a thread of its own.

        It takes the lines of a moment at once: to wake up for each would delay the requests of a busy bridge.
        """
        while True:
            entries = [self._console.get()]
            time.sleep(self.MOMENT)
            entries += [self._console.get() for _ in range(self._console.qsize())]
            with contextlib.suppress(OSError, ValueError, AttributeError):  # the last: no stderr
                sys.stderr.buffer.write(b"".join(entry for entry in entries if isinstance(entry, bytes)))
                sys.stderr.buffer.flush()
            for entry in entries:
                if isinstance(entry, threading.Event):
                    entry.set()

    def flush(self) -> None:
        """Wait a second at most until the console has taken every line."""
        if self._has_thread:
            written = threading.Event()
            self._console.put(written)
            written.wait(1)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        super().close()


def set_up_log(config: Config) -> None:
    """Log to standard error, and to the log file unless --log-file is `-` or the file cannot be written."""
    handler = Log("" if config.log_file == "-" else config.log_file)
    log.addHandler(handler)
    log.setLevel(config.log_level.upper())
    log.propagate = False
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # no line shows these
    if handler.problem:
        log.warning("%s", handler.problem)


def discard_output() -> None:
    """Redirect standard output to the null device, because its reader has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def has_terminal() -> bool:
    """Tell whether this program has a terminal that is still open, wherever its output goes."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError as exc:
        return exc.errno not in (errno.ENXIO, errno.EIO, errno.ENODEV, errno.ENOENT)  # else it cannot be told
    except AttributeError:  # Windows
        return False
    return True


# == 29 store =================================================================
# The last responses, for clients that rely on a storage that the backend does not have.

class Cache:
    """Values in memory, bounded in the sum of their sizes, least recently used out first.

    An owner (a client's key or address) is part of every name, so that nobody gets what is another's. `_lock`
    guards the entries and their sum.
    """

    ENTRY_BYTES = 800  # what an entry costs beside its value, measured on 3.11

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str, str, str], tuple[int, Any]] = OrderedDict()
        self._held = 0  # bytes

    def put(self, owner: str, kind: str, name: str, value: Any, size: int = 0) -> bool:
        """Keep a value under its owner, kind and name; tell whether it is small enough.

        `size` is the value's in bytes, by default its length.
        """
        size = self.ENTRY_BYTES + (size or len(value))
        fits = size <= self.limit  # else it would evict all other entries, and then itself
        with self._lock:
            removed = [self._entries.pop((owner, kind, name), (0, None))]  # freed outside the lock
            self._held -= removed[0][0]
            if fits:
                self._entries[owner, kind, name] = size, value
                self._held += size
            while self._held > self.limit:
                removed.append(self._entries.popitem(last=False)[1])
                self._held -= removed[-1][0]
        return fits

    def get(self, owner: str, kind: str, name: Any) -> Any:
        """Return a kept value; None when it is not there, or no longer."""
        if not isinstance(name, str):
            return None
        with self._lock:
            _, value = self._entries.get((owner, kind, name), (0, None))
            if value is not None:
                self._entries.move_to_end((owner, kind, name))
            return value


class LastRequests(Cache):
    """The last request of each conversation: what the next one has in common with it is not parsed again.

    A conversation's name is a guess. Of two conversations with one name, each request takes the place of the
    other's: more is parsed, but never another value.
    """

    def get_last(self, owner: str, conversation: str, start: str) -> Spans:
        """Return a conversation's last request, else the last one of the same start, else an empty one.

        A client's new conversation has instructions and tools in common with its last one.
        """
        last = self.get(owner, "request", conversation)
        return last or self.get(owner, "request", self.get(owner, "start", start)) or NOTHING_READ

    def keep(self, owner: str, conversation: str, start: str, spans: Spans) -> bool:
        """Keep a request that is no longer used; tell whether it can be the last one, and is small enough."""
        size = spans.settle(self.limit) + len(conversation)
        if not spans.order:
            return False  # `settle` says why
        kept = self.put(owner, "request", conversation, spans, size)
        return kept and self.put(owner, "start", start, conversation)


class Store(Cache):
    """The last responses and their conversations, in JSON bytes, because the backend stores none."""

    # -- responses, for previous_response_id and item_reference

    def keep_response(self, owner: str, response: Mapping[str, Any], request: StoredInput) -> None:
        """Keep a response and its request. Call before the client knows of the response's end.

        Turns are linked, not copied: else the tenth would hold the first nine once more.
        """
        output, name = response.get("output"), response.get("id")
        if not isinstance(output, list) or not isinstance(name, str) or not request.items:
            return
        self.put(owner, "response", name, json_bytes(response))
        self.put(owner, "turn", name, json.dumps(request.previous).encode() + b"\n" + request.items)
        for item in output:
            if isinstance(item, dict) and isinstance(item.get("id"), str):
                self.put(owner, "item", item["id"], name.encode("utf-8", "surrogatepass"))

    def resolve(self, owner: str, request: dict[str, Any], limit: int,
                hold: Callable[[int], None]) -> dict[str, Any]:
        """Replay the conversation that `previous_response_id` names; put items in the place of references.

        `hold` gets how many bytes parsing will take. Raises InvalidRequest for an unknown response id,
        BodyTooLarge when it makes more than `limit` bytes, and what `hold` raises.
        """
        replay = Replay(self, owner, hold)
        if request.get("previous_response_id") is not None:
            earlier = replay.conversation(request["previous_response_id"], limit)
            items = input_to_list(request, Context()).get("input", [])
            request = {**without(request, "previous_response_id"), "input": [*earlier, *items]}
        items = request.get("input")
        if isinstance(items, list) and any(is_reference(item) for item in items):
            request = map_items(request, replay.dereference)
        if replay.size > limit:
            raise BodyTooLarge(f"the conversation is above the limit of {limit} bytes")
        return request

    # -- reasoning, which a chat client cannot send back

    def keep_reasoning(self, owner: str, history: ChatHistory, output: Any) -> None:
        """Keep the reasoning items of a response under the calls and texts that they belong to."""
        pending: list[Any] = []
        for item in dicts_in(output):
            name = history.add(item)
            if item.get("type") == "reasoning":
                pending.append(item)
            elif pending and name:
                self.put(owner, "reasoning", name, json_bytes(pending))
                pending = []

    def with_reasoning(self, owner: str, history: ChatHistory, items: list[Any]) -> list[Any]:
        """Put kept reasoning back in front of the calls and texts of a chat, each item once."""
        restored: list[Any] = []
        seen: set[str] = set()
        for item in items:
            for kept in json.loads(self.get(owner, "reasoning", history.add(item)) or b"[]"):
                if str(kept.get("id")) not in seen:
                    seen.add(str(kept.get("id")))
                    restored.append(kept)
            restored.append(item)
        return restored


class Replay:
    """What one request gets of the store. Each kept response is parsed once, after its memory is reserved."""

    def __init__(self, store: Store, owner: str, hold: Callable[[int], None]) -> None:
        self._store = store
        self._owner = owner
        self._hold = hold
        self._outputs: dict[bytes, list[Any]] = {}  # a response's id -> its items
        self._placed: set[str] = set()  # ids of items that stand in the place of a reference
        self.size = 0  # bytes of JSON that the request got

    def conversation(self, name: Any, limit: int) -> list[Any]:
        """Follow a response's links back to the first turn; return the items of all turns.

        Raises InvalidRequest, and BodyTooLarge before more than `limit` bytes are parsed.
        """
        turns: list[tuple[bytes, bytes]] = []
        seen: set[str] = set()
        while name != "" or not turns:
            turn = self._store.get(self._owner, "turn", name)
            response = self._store.get(self._owner, "response", name)
            if turn is None or response is None or name in seen:
                raise InvalidRequest("unknown previous_response_id: this bridge keeps only the last "
                                     "conversations, in memory; send the full input", "previous_response_id")
            seen.add(name)
            previous, _, items = turn.partition(b"\n")
            name = json.loads(previous)
            self.size += len(items) + len(response)
            turns.append((items, response))
        if self.size > limit:
            raise BodyTooLarge(f"the conversation is above the limit of {limit} bytes")
        self._hold(sum(parsed_size(part) for turn in turns for part in turn))
        return [item for items, response in reversed(turns)
                for item in (*json.loads(items), *json.loads(response)["output"])]

    def dereference(self, item: dict[str, Any]) -> Any:
        """Return the kept item that an item refers to, once; other items as they are."""
        if not is_reference(item):
            return item
        name = self._store.get(self._owner, "item", item.get("id"))
        if name is None:
            return item
        if name not in self._outputs:
            response = self._store.get(self._owner, "response", name.decode("utf-8", "surrogatepass"))
            self._hold(parsed_size(response or b""))
            self._outputs[name] = dicts_in(json.loads(response or b"{}").get("output"))
        kept = next((each for each in self._outputs[name] if each.get("id") == item["id"]), None)
        if kept is None:
            return item
        if item["id"] in self._placed:
            return DROPPED_ITEM
        self._placed.add(item["id"])
        self.size += len(json_bytes(kept))
        return kept


class Conversations:
    """The names under which conversations go upstream, so that the backend caches them (WIRE 4).

    MAX_CONVERSATIONS are kept in memory, least recently used out first. `_lock` guards the fields.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: OrderedDict[str, str] = OrderedDict()  # a conversation's hash -> its name
        self._replaced: OrderedDict[tuple[str, str], None] = OrderedDict()  # owner, key: not used by upstream
        self._told = False  # the log says that keys are replaced

    def name(self, conversation: str) -> str:
        """Return a conversation's name: a UUIDv7 of the time at which it was first seen."""
        with self._lock:
            name = self._names.pop(conversation, "") or uuid7(time.time(), os.urandom(10))
            self._names[conversation] = name
            if len(self._names) > MAX_CONVERSATIONS:
                self._names.popitem(last=False)
            return name

    def is_replaced(self, owner: str, key: str) -> bool:
        """Tell whether upstream has used another key in the place of a client's own."""
        return (owner, key) in self._replaced

    def replace(self, owner: str, key: str) -> bool:
        """Note that upstream has used another key; tell whether this is the first time at all."""
        with self._lock:
            self._replaced[owner, key] = None
            if len(self._replaced) > MAX_CONVERSATIONS:
                self._replaced.popitem(last=False)
            first, self._told = not self._told, True
            return first


def uuid7(unix: float, random: bytes) -> str:
    """Return the UUIDv7 of a time with ten random bytes (RFC 9562, 5.7)."""
    number = int(unix * 1000) << 80 | int.from_bytes(random, "big")
    number = number & ~(0xF << 76 | 0x3 << 62) | 0x7 << 76 | 0x2 << 62  # version and variant
    digits = f"{number:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


class StoredInput(NamedTuple):
    """The part of a request that the store keeps."""

    previous: str  # id of the response that the request continues; "" for none
    items: bytes  # a JSON list; empty where it is too large to keep


class ChatHistory:
    """Names the calls and texts of a chat, so that its client's echo of one is recognized.

    A call is named by its id. A text is named by all that came before it: two conversations in which the
    assistant once said "Done." share no reasoning. Of an assistant's items only their text and call ids
    count, because clients echo no more than these.
    """

    def __init__(self) -> None:
        self._said = hashlib.sha256()

    def add(self, item: Any) -> str:
        """Add the next item; return its name, "" for what no reasoning belongs to."""
        if not isinstance(item, dict):
            return ""
        kind, role, call_id = str(item.get("type")), item.get("role"), or_empty(item.get("call_id"), str)
        text = assistant_text(item)
        if text == "" or not ECHOED_ITEM.fullmatch(kind):
            return ""
        add_to_hash(self._said, [kind, role, call_id, text or item.get("content"), item.get("output")])
        if text:
            return f"text {self._said.hexdigest()}"
        if kind.endswith("_call") and call_id:
            return f"call {call_id}"
        return ""


def assistant_text(item: Mapping[str, Any]) -> str | None:
    """Return the text of an assistant's message; None for another item."""
    if item.get("type") != "message" or item.get("role") != "assistant":
        return None
    return "".join(str(part["text"]) for part in dicts_in(item.get("content")) if part.get("text"))


ECHOED_ITEM = re.compile(r"message|function_call|custom_tool_call|\w+_output")  # by a chat's client


def is_reference(item: Any) -> bool:
    """Tell whether an item is only a reference to another item."""
    return isinstance(item, dict) and item.get("type") == "item_reference"


def stored_input(spans: Spans, codex: bool, limit: int) -> StoredInput | None:
    """Return the part of a request to store; None for Codex and for store=false, which need no store.

    Items of more than `limit` bytes are left out: the store would not take them.
    """
    request = spans.request
    if codex or request.get("store") is False:
        return None
    try:
        given = request.get("input")
        if isinstance(given, list) and "input" in spans.fields:
            items = spans.value_bytes("input", limit)
        elif isinstance(given, str) and len(given) > limit:
            items = b""  # before it is copied
        else:
            items = json_bytes(input_to_list(request, Context()).get("input", []))
    except (ValueError, RecursionError):  # no number of JSON, or too deep: upstream will say so
        return None
    return StoredInput(request.get("previous_response_id") or "", items if len(items) <= limit else b"")


# == 30 admission =============================================================
# Limits on what runs at once: memory for request bodies, requests per key. And the keys themselves.

class Budget:
    """A limit on the bytes of request bodies in memory at once. `_lock` guards the sum."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._lock = threading.Lock()
        self.expanding = threading.Lock()  # decompress or parse one large body at a time

    def take(self, size: int) -> None:
        """Reserve bytes. Raises Overloaded beyond the limit."""
        with self._lock:
            if self._held + size > self._limit:
                raise Overloaded("too many large requests at once; retry in 5 s", retry_after=5)
            self._held += size

    def room(self) -> int:
        """Return how many bytes are left."""
        return self._limit - self._held

    def give(self, size: int) -> None:
        """Release bytes."""
        with self._lock:
            self._held -= size

    def parse(self, body: bytes, last: Spans = NOTHING_READ) -> Spans:
        """Parse a body; large ones one at a time, so that the events of other requests pass between them.

        Raises InvalidRequest.
        """
        if len(body) < LARGE_BODY:
            return read_request(body, last)
        with self.expanding:
            return read_request(body, last)


def load_key_file(path: str) -> tuple[tuple[NamedSecret, ...], int]:
    """Return a file's keys and the file's permission bits. Raises OSError and ValueError."""
    with open(path, "rb") as file:
        raw, mode = file.read(), os.fstat(file.fileno()).st_mode & 0o777
    encoding = "utf-8-sig"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"  # as Windows' own programs write it
    try:
        return read_key_file(raw.decode(encoding)), mode
    except UnicodeDecodeError as exc:
        raise ValueError(f"it is not {encoding} text: save it as UTF-8") from exc


class KeyRing:
    """The keys of --api-key and --api-key-file; the file is reread when it changes.

    `_lock` guards the file's keys and signature.
    """

    def __init__(self, given: tuple[NamedSecret, ...], path: str) -> None:
        self._given = given
        self._path = path
        self._lock = threading.Lock()
        self._signature: Any = UNREAD  # the file's signature when it was last read
        self._from_file: tuple[NamedSecret, ...] = ()
        self._problem = ""  # the last one that was logged
        self.locked = bool(given or path)  # clients need a key; with an empty file no key works

    def keys(self) -> tuple[NamedSecret, ...]:
        """Return the currently valid keys.

        Raises BridgeError if the file is unreadable and none of its keys were loaded earlier.
        """
        if not self._path:
            return self._given
        with self._lock:
            try:
                signature = file_signature(self._path)
                if signature is None or signature != self._signature:
                    self._read()
                    self._signature, self._problem = signature, ""
            except (OSError, ValueError) as exc:
                self._log_once((exc.strerror if isinstance(exc, OSError) else None) or str(exc))
                if not self._from_file:
                    raise BridgeError("the bridge cannot read its key file; its log has the reason") from exc
            return self._given + self._from_file

    def _log_once(self, problem: str) -> None:
        """Log a problem of the file, once and not at each request."""
        if problem != self._problem:
            kept = "; keeping the previously loaded keys" if self._from_file else ""
            log.error("cannot read the key file %s (%s)%s", self._path, problem, kept)
        self._problem = problem

    def reread(self) -> None:
        """Reread the file at its next use, even if it looks unchanged."""
        self._signature = UNREAD

    def _read(self) -> None:
        self._from_file, mode = load_key_file(self._path)
        if not self._from_file and not self._given:
            log.warning("the key file %s has no key: every request will get 401", self._path)
        if os.name == "posix" and mode & 0o077:
            log.warning("other users of this host can read %s: run chmod 600 on it", self._path)


class KeyQueue:
    """The limit of requests that run at once per key; further requests wait in order of arrival.

    `_lock` guards the counts and the queues.
    """

    QUEUE = 64  # waiting requests per key, at most
    WAIT = 120  # seconds that a request waits, at most

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._running: dict[str, int] = {}
        self._queues: dict[str, deque[threading.Event]] = {}

    def has_room(self, name: str) -> bool:
        """Tell whether a request of a key need not wait."""
        with self._lock:
            return name not in self._limits or self._running.get(name, 0) < self._limits[name]

    def slot(self, name: str, raise_if_closed: Callable[[], None],
             wait: bool = True) -> contextlib.AbstractContextManager[None]:
        """Hold one of the key's slots. Raises TooManyRequests, and ClientLeft if the client leaves."""
        if name not in self._limits:
            return contextlib.nullcontext()
        return self._hold(name, raise_if_closed, self.QUEUE if wait else 0)

    @contextlib.contextmanager
    def _hold(self, name: str, raise_if_closed: Callable[[], None], longest: int) -> Iterator[None]:
        self._enter(name, raise_if_closed, longest)
        try:
            yield
        finally:
            self._leave(name)

    def _enter(self, name: str, raise_if_closed: Callable[[], None], longest: int) -> None:
        with self._lock:
            queue = self._queues.setdefault(name, deque())
            if self._running.get(name, 0) < self._limits[name]:
                self._running[name] = self._running.get(name, 0) + 1
                return
            if len(queue) >= longest:
                raise TooManyRequests(f"too many requests wait for key {name!r}; retry later", retry_after=10)
            ticket = threading.Event()
            queue.append(ticket)
        until = time.monotonic() + self.WAIT
        try:
            while not ticket.wait(0.2):
                raise_if_closed()
                if time.monotonic() > until:
                    running = self._limits[name]
                    raise TooManyRequests(f"key {name!r} has {running} requests running", retry_after=10)
        except BaseException:
            with self._lock:
                given = ticket not in queue
                if not given:
                    queue.remove(ticket)
            if given:  # the slot arrived at the same moment: pass it on
                self._leave(name)
            raise

    def _leave(self, name: str) -> None:
        """Pass the slot to the request that has waited longest."""
        with self._lock:
            queue = self._queues[name]
            if queue:
                queue.popleft().set()
            else:
                self._running[name] -= 1


# == 31 exchange ==============================================================
# One client request and its response; the relay, which copies upstream's reply to the client piece by piece.

def plain_path(path: str) -> str:
    """Return a path without `/v1` (once or twice), doubled slashes and a final slash."""
    if "//" in path:
        path = re.sub("/{2,}", "/", path)
    for _ in range(2):
        if path == "/v1" or path.startswith("/v1/"):
            path = path[3:]
    return path.removesuffix("/") or "/"  # `/models/` is `/models`


def status_line(status: int) -> str:
    """Return the first line of a response's head."""
    return f"HTTP/1.1 {status} {http.client.responses.get(status, 'Unknown')}"


def error_response(error: BridgeError, headers: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Return head and body of an error's response; the head includes `headers`."""
    body = json_bytes(error.body()) + b"\n"
    head = {"x-qoo-bridge-error": error.by, **error.headers, "content-type": "application/json",
            "content-length": str(len(body)), **headers}
    if "connection" in error.headers and "connection" in headers:
        head["connection"] = f"{error.headers['connection']}, {headers['connection']}"
    return render_head(status_line(error.status), head.items()), body


class Pulse:
    """Whether one side of a WebSocket is still alive: a silent side is pinged, and must answer."""

    def __init__(self, end: str) -> None:
        self.end = end  # how requests end when this side is dead; one of ENDS
        self.last_read = self._last_ping = time.monotonic()
        self._unanswered = 0

    def hear(self) -> None:
        """Note that this side has sent something."""
        self.last_read = time.monotonic()
        self._unanswered = 0

    def is_dead(self, now: float, keepalive: float) -> bool:
        """Tell whether it has let too many pings pass."""
        return self._unanswered >= UNANSWERED_PINGS and now - self._last_ping >= keepalive

    def is_due(self, now: float, keepalive: float) -> bool:
        """Tell whether it is to be pinged now."""
        if now - max(self.last_read, self._last_ping) < keepalive:
            return False
        self._last_ping = now
        self._unanswered += 1
        return True


class Background:
    """A call in a thread of its own, for a thread that must not wait.

    `_lock` guards `_next` and the setting of `done`.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self.done = threading.Event()
        self._lock = threading.Lock()
        self._next: Callable[[], None] = lambda: None
        self._value: Any = None
        self._error: BaseException | None = None
        if not start_thread("background", self._run, call):
            self._run(call)

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self._value = call()
        except BaseException as exc:  # noqa: BLE001  # raised again by `result`
            self._error = exc
        with self._lock:
            self.done.set()
        self._next()

    def result(self) -> Any:
        """Return what the call returned; raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._value

    def when_done(self, then: Callable[[], None]) -> None:
        """Call `then` once, as soon as the call has ended: in its thread, or now."""
        with self._lock:
            if not self.done.is_set():
                self._next = then
                return
        then()


class State(enum.Enum):
    """The progress of the response to one request."""

    NEW = "nothing is decided"
    HEAD_READY = "a stream's head waits for the first piece; an error can still replace that head"
    STREAMING = "the head is sent: the status cannot change"
    DONE = "the response is sent"


class Exchange:
    """One client request and its response. Only the connection's thread uses it."""

    def __init__(self, connection: Connection, head: RequestHead, client: Client, record: Record) -> None:
        self.connection = connection
        self.head = head
        self.client = client
        self.record = record
        self.path_as_sent, _, self.query = head.target.partition("?")
        self.path = plain_path(self.path_as_sent)
        self.client_headers = read_client_headers(head.headers)
        self.user_agent_kind = "codex" if self.client_headers.codex else "other"
        record.method, record.path = head.method, self.path_as_sent
        record.user_agent_kind = self.user_agent_kind
        self.extra_headers: dict[str, str] = {}  # headers for the response, whatever its status
        self.conversation = ""  # the name under which a WebSocket's handshake went upstream
        self.upgraded: Callable[..., None] | None = None  # WebSocketRelay.run, after a 101
        self.state = State.NEW
        self._stream_head: tuple[int, Mapping[str, str]] = (200, {})  # status and headers of a stream
        self._chunked = False
        self._first = True  # no piece of the stream is sent yet
        self._bare = head.method == "HEAD"  # the response has no body
        self._client_keeps = keeps_connection(head.minor, head.headers)
        self._aborted = False  # the connection closes after this response
        self._length = body_length(head.headers)
        if self._length == -1 and not head.minor:
            raise MalformedHttp("an HTTP/1.0 request must not have Transfer-Encoding")
        self._unread = bool(self._length)
        self._held_bytes = 0  # bytes of the body that the budget counts

    @property
    def started(self) -> bool:
        """Tell whether the first byte of the response is sent."""
        return self.state in (State.STREAMING, State.DONE)

    def persists(self) -> bool:
        """Tell whether the connection can carry another request.

        After an unread body it cannot: the server would parse the body as the next request.
        """
        return self._client_keeps and not self._unread and not self._aborted

    def abort(self) -> None:
        """Close the connection after this response: the request is malformed, or the response is cut."""
        self._aborted = True

    def identify(self, key: str) -> None:
        """Set the name of the client's key."""
        self.client = self.client._replace(key=key)
        self.record.key = key

    # -- the request's body

    def read_body(self, limit: int, budget: Budget) -> bytes:
        """Read and decompress the body, of at most `limit` bytes. It is not copied: it may be a bytearray.

        Raises BodyTooLarge, SlowRequest, Overloaded, ClientLeft, and what `decompress` raises.
        """
        length = self._length or 0
        if length > limit:
            raise BodyTooLarge(f"the body is {length} bytes, the limit is {limit}")
        if not self._unread:
            return b""
        if "100-continue" in self.head.headers.get("expect", "").lower() and self.head.minor:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        decoder = ChunkedBody() if length < 0 else LengthBody(length)
        received = bytearray()
        until = time.monotonic() + BODY_STALL
        while not decoder.done:
            piece = decoder.feed(self._read_some(until))
            self.hold(budget, len(piece))
            if self._held_bytes > limit:
                raise BodyTooLarge(f"the body is above the limit of {limit} bytes")
            received += piece
            until = min(until + len(piece) / BODY_RATE, time.monotonic() + BODY_STALL)
        self._unread = False
        self.connection.buffer = decoder.rest
        coding = self.head.headers.get("content-encoding")
        if not coding:
            return received  # type: ignore[return-value]  # used as bytes; a copy would stop all threads
        body = bytes(received)
        received.clear()
        with budget.expanding:
            body = decompress(body, coding, limit)
            self.hold(budget, len(body) - self._held_bytes)
        return body

    def hold_parsed(self, body: bytes, budget: Budget) -> None:
        """Reserve memory for what parsing makes of the body. Raises Overloaded.

        The worst case is reserved if half of the budget stays free: an estimate takes 2 ms a MB.
        """
        size = WORST_PARSED * len(body)
        if size > budget.room() - MAX_BODIES / 2:
            size = parsed_size(body)
        self.hold(budget, max(0, size - self._held_bytes))

    def hold(self, budget: Budget, size: int) -> None:
        """Reserve memory for the body, or for what it refers to. Raises Overloaded."""
        budget.take(size)
        self._held_bytes += size

    def release_body(self, budget: Budget, kept: int = 0) -> None:
        """Release the body's memory but for `kept` bytes. Call this when nothing refers to more of it."""
        if self._held_bytes > kept:
            budget.give(self._held_bytes - kept)
            self._held_bytes = kept

    def _read_some(self, until: float) -> bytes:
        """Read the next bytes of the body. Raises ClientLeft and SlowRequest."""
        while True:
            try:
                raw = self.connection.read()
            except OSError as exc:
                raise ClientLeft("client_closed") from exc
            if raw:
                return raw
            if raw is not None:
                raise ClientLeft("client_closed")
            if not self.connection.wait(until - time.monotonic()):
                raise SlowRequest(f"the request body arrived too slowly: send at least {BODY_RATE} bytes/s")

    # -- a response in one piece

    def send_response(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send a complete response."""
        if status in (204, 304):
            self._bare = True
        else:
            headers = {**headers, "content-length": str(len(body))}
        self._send_whole(status, self._render_head(status, headers), body)

    def send_json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        """Send a complete response in JSON."""
        headers = {**(headers or {}), "content-type": "application/json"}
        self.send_response(status, headers, json_bytes(value) + b"\n")

    def send_error(self, error: BridgeError) -> None:
        """Send an error in the OpenAI shape."""
        if isinstance(error, MalformedHttp):
            self.abort()
        head, body = error_response(error, self._own_headers())
        self._send_whole(error.status, head, body)

    def _send_whole(self, status: int, head: bytes, body: bytes) -> None:
        self.record.status = status
        self.state = State.DONE
        if self._bare:
            self.send(head)
        else:
            self.send(head + body)
            self.record.bytes += len(body)

    # -- a stream

    def prepare_stream(self, status: int, headers: Mapping[str, str]) -> None:
        """Set a stream's head, for the first piece or filler; until that is sent, an error can replace it."""
        self._stream_head = (status, headers)
        self.state = State.HEAD_READY

    def write(self, payload: bytes, last: bool = False) -> None:
        """Send a piece of a prepared stream; put the head before the first piece, the end after the last."""
        if self._bare or not payload:
            return
        self.record.bytes += len(payload)
        head = b""
        if self.state is State.HEAD_READY:
            head = self._begin_stream()
        if self._first:
            self._first = False
            self.record.mark_first_byte()
        if self._chunked:
            payload = b"%b%x\r\n%b\r\n%b" % (head, len(payload), payload, LAST_CHUNK if last else b"")
        elif head:
            payload = head + payload
        if last:
            self.state = State.DONE
        self.send(payload)

    def write_silence(self, filler: bytes) -> None:
        """Send a keepalive to a waiting client, if the response is a stream."""
        if self._bare or self.state in (State.NEW, State.DONE):
            return
        head = self._begin_stream() if self.state is State.HEAD_READY else b""
        self.send(head + (chunk(filler) if self._chunked else filler))

    def finish_stream(self, last: bytes = b"") -> None:
        """Send the last piece of a stream, and its end."""
        if last and not self._bare:
            self.write(last, last=True)
            return
        head = self._begin_stream() if self.state is State.HEAD_READY else b""
        self.state = State.DONE
        self.send(head + (LAST_CHUNK if self._chunked and not self._bare else b""))

    def _begin_stream(self) -> bytes:
        """Return the head of a stream: chunked for 1.1, ended by the connection's end for 1.0."""
        status, headers = self._stream_head
        self.record.status = status
        self.state = State.STREAMING
        if status in (204, 304):
            self._bare = True
        elif self.head.minor == 1:
            self._chunked = True
            headers = {**headers, "transfer-encoding": "chunked"}
        else:
            self.abort()
        return self._render_head(status, headers)

    def start_websocket(self, accept: str, headers: Mapping[str, str]) -> None:
        """Accept a client's WebSocket handshake; this connection then carries no other request."""
        self.state = State.DONE
        headers = {**headers, "connection": "Upgrade", "upgrade": "websocket", "sec-websocket-accept": accept}
        self.send(self._render_head(101, headers))
        self.abort()

    # -- bytes

    def _own_headers(self) -> dict[str, str]:
        """Return the headers that this bridge adds to every response."""
        headers = {**self.extra_headers, "x-qoo-bridge-id": self.record.id}
        if not self.persists():
            headers["connection"] = "close"
        elif not self.head.minor:
            headers["connection"] = "keep-alive"
        return headers

    def _render_head(self, status: int, headers: Mapping[str, str]) -> bytes:
        return render_head(status_line(status), {**self._own_headers(), **headers}.items())

    def send(self, payload: bytes) -> None:
        """Send bytes to the client. Raises ClientLeft."""
        try:
            self.connection.send(payload, WRITE_TIMEOUT)
        except OSError as exc:
            raise ClientLeft("client_stalled" if isinstance(exc, TimeoutError) else "client_closed") from exc


def is_sign_of_life(payload: bytes) -> bool:
    """Tell whether upstream's bytes only say that it is there: a keepalive event, or comments alone."""
    if len(payload) > SIGN_BYTES:
        return False
    return KEEPALIVE_MARK in payload or COMMENTS.fullmatch(payload) is not None


def warn_of_overflow(assembler: ResponseAssembler, record: Record) -> None:
    """Log that a response's items were too large to be kept."""
    if assembler.overflowed:
        log.warning("request %s: the items exceed %d bytes: `output` is not filled", record.id, MAX_EVENT)


class Relay:
    """Copies a reply to the client piece by piece, and keeps back its last piece, with the terminal event.

    So the caller can store the response before the client knows of its end.
    """

    def __init__(self, reply: Reply, exchange: Exchange, output: ResponsesOutput, keepalive: float,
                 idle_timeout: float) -> None:
        self.reply = reply
        self.output = output
        self.last: bytes | None = None  # the last piece
        self.error: BridgeError | None = None  # why there is no last piece
        self._exchange = exchange
        self._keepalive = keepalive  # seconds of silence after which the client gets a filler
        self._idle_timeout = idle_timeout  # seconds without an event, but for upstream's own keepalives
        self._last_read = self._last_write = time.monotonic()

    def run(self, opening: bool = False) -> None:
        """Copy to the end; with `opening` only until the answer itself has begun. Raises ClientLeft.

        Set `last`, or `error`: the failure that upstream reported, BadUpstream if upstream ends without a
        terminal event, UpstreamTimeout after `idle_timeout` seconds.
        """
        if self.last is not None or self.error is not None:
            return
        try:
            self._copy(opening)
        except BridgeError as exc:
            self.reply.close()
            self.error = exc.with_traceback(None)  # its frames would keep the request in memory
        except BaseException:
            self.reply.close()
            raise

    def _copy(self, opening: bool) -> None:
        """Copy piece by piece, and fill the silence."""
        reply, exchange, output = self.reply, self._exchange, self.output
        seconds = min(self._keepalive, self._idle_timeout)
        while not (opening and output.begun):
            payload = reply.read(seconds, exchange.connection)
            now = time.monotonic()
            if payload:
                if not is_sign_of_life(payload):
                    self._last_read = now
                ready = output.feed(payload)
                exchange.record.events = output.count  # for /status
                if output.done:
                    self.last = ready
                    return
                if ready:
                    exchange.write(ready)
                    self._last_write = now
            if payload == b"":
                output.break_off()
            if output.failure is not None:
                raise output.failure
            if now - min(self._last_read, self._last_write) >= seconds:
                self._fill_silence(now)

    def _fill_silence(self, now: float) -> None:
        """Fill the client's silence, or an event that comes in drops. Raises UpstreamTimeout."""
        if now - self._last_read >= self._idle_timeout:
            raise UpstreamTimeout(f"upstream was silent for {self._idle_timeout:g} s")
        if now - self._last_write >= self._keepalive:
            self._exchange.write_silence(self.output.filler)
            self._last_write = now


# == 32 dialects ==============================================================
# What a request of each API becomes upstream, and what its answer becomes for the client.

class ResponsesApi:
    """A request to the Responses API: upstream's own form, except for references to the store."""

    def __init__(self, exchange: Exchange, store: Store, budget: Budget, max_bytes: int) -> None:
        self._hold = functools.partial(exchange.hold, budget)
        self._codex = exchange.client_headers.codex
        self._owner = exchange.client.owner
        self._store = store
        self._max_bytes = max_bytes
        self._stored: StoredInput | None = None  # the input to store; None if the client needs no store
        self.kept_bytes = 0  # of the request, until the answer's end
        self.streamed = False  # the client requested a stream

    def to_upstream(self, spans: Spans) -> dict[str, Any]:
        """Return the request with its references resolved; the same object without references.

        Raises InvalidRequest and BodyTooLarge.
        """
        body: dict[str, Any] = spans.request
        self.streamed = body.get("stream") is True
        self._stored = stored_input(spans, self._codex, self._store.limit)
        if self._stored is not None:
            self.kept_bytes = len(self._stored.items)
        references = map(is_reference, spans.judge(body, "input", is_usual))
        if body.get("previous_response_id") is None and not any(references):
            return body
        return self._store.resolve(self._owner, body, self._max_bytes, self._hold)

    def output(self, audience: Audience) -> ResponsesOutput:
        """Return the converter of upstream's events to the client's bytes."""
        if self._stored is not None:  # upstream does not know the id
            fields = {"previous_response_id": self._stored.previous or None}
            audience = audience._replace(final_fields=fields)
        if self.streamed:
            return ResponsesOutput(audience)
        return JsonOutput(audience)

    def to_json(self, response: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON response for a request without a stream."""
        return response

    def keep(self, response: dict[str, Any]) -> None:
        """Store the response. Call this before the client gets the terminal event."""
        if self._stored is not None:
            self._store.keep_response(self._owner, response, self._stored)


class ChatApi:
    """A request to Chat Completions, translated to Responses; its events are translated back."""

    PREFIX = "chatcmpl-"

    kept_bytes = 0  # of the request, until the answer's end

    def __init__(self, exchange: Exchange, store: Store, budget: Budget, max_bytes: int) -> None:
        self._owner = exchange.client.owner
        self._store = store
        self._history = ChatHistory()
        self._id = self.PREFIX + exchange.record.id
        self._created = int(time.time())
        self._model = ""
        self._include_usage = self._legacy_functions = False
        self.streamed = False  # the client requested a stream

    def to_upstream(self, spans: Spans) -> dict[str, Any]:
        """Return the Responses request. Raises InvalidRequest."""
        body = spans.request
        self.streamed = body.get("stream") is True
        self._model = body["model"]
        self._include_usage = wants_usage(body)
        self._legacy_functions = "functions" in body
        request = self._convert(body)
        return {**request, "input": self._store.with_reasoning(self._owner, self._history, request["input"])}

    def output(self, audience: Audience) -> ResponsesOutput:
        """Return the converter of upstream's events to the client's bytes."""
        if self.streamed:
            return ChatOutput(self._stream(), audience)
        return JsonOutput(audience)

    def to_json(self, response: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON response for a request without a stream."""
        return chat_completion(response, self._id, self._created, self._model, self._legacy_functions)

    def keep(self, response: dict[str, Any]) -> None:
        """Store a response's reasoning, because a chat client cannot send reasoning back."""
        self._store.keep_reasoning(self._owner, self._history, response.get("output"))

    def _convert(self, body: dict[str, Any]) -> dict[str, Any]:
        return chat_request(body)

    def _stream(self) -> ChatStream:
        return ChatStream(self._id, self._created, self._model, self._include_usage, self._legacy_functions)


class CompletionApi(ChatApi):
    """A request to the legacy Completions API."""

    PREFIX = "cmpl-"

    def to_json(self, response: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON response for a request without a stream."""
        return text_completion(response, self._id, self._created, self._model)

    def _convert(self, body: dict[str, Any]) -> dict[str, Any]:
        return completion_request(body)

    def _stream(self) -> ChatStream:
        return CompletionStream(self._id, self._created, self._model, self._include_usage)


class Attempt:
    """One model request to upstream, over HTTP or a WebSocket: its next payload and its repairs."""

    def __init__(self, request: dict[str, Any], spans: Spans, context: Context, keep: Callable[[Spans], bool],
                 repairs: tuple[str, ...] = ()) -> None:
        self.request = request  # in the Responses form, before the rules
        self.context = context
        self.rules: tuple[str, ...] = ()
        self.repairs = repairs  # for the client and the log, each with what it changed: `drop-parameter=foo`
        self.repaired = 0  # how many repairs were made; `repairs` may begin with what was known before
        self.normalized = request
        self._spans = spans  # the client's own bytes, which go up wherever no rule changes a value
        self._keep = keep  # keeps the spans for the conversation's next request, or returns False

    def next_payload(self, *left_out: str) -> bytes:
        """Return the bytes to send now: where nothing changes the client's own, item by item.

        Omit the fields in `left_out`. Raises InvalidRequest.
        """
        request = without(self.request, *left_out) if left_out else self.request
        self.normalized, self.rules = normalize(request, self.context, self._spans)
        return encode(self.normalized, self._spans)

    def free(self) -> None:
        """Keep the request for the conversation's next one, or free a large one in steps.

        The attempt is of no use afterwards.
        """
        if not self._keep(self._spans) and len(self._spans.raw) >= LARGE_BODY:
            free_items(self._spans, self.request, self.normalized)

    def call_ids(self) -> dict[str, bytes]:
        """Return the client's long call ids, JSON-escaped, by the short ones that upstream got."""
        if "call-ids" not in self.rules:
            return {}
        return {short: json.dumps(long)[1:-1].encode("ascii")
                for short, long in long_call_ids(self.request).items()}


# == 33 turns =================================================================
# Model requests, sent until upstream accepts them.

STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
                  "x-accel-buffering": "no"}  # a plain nginx would hold the events back
NAMING_BYTES = 128  # of a request, by which a session's threads are told apart
START_BYTES = 1024  # of a request, in which a client's conversations are alike


class Learned(NamedTuple):
    """What refusals have taught about a model, for later requests."""

    dropped: frozenset[str] = frozenset()  # parameters that it does not know
    item_fixes: tuple[ItemFix, ...] = ()  # fields of items that it does not know
    lite_only: bool = False  # it is a lite model, and refuses the plain form


class Turns:
    """The handler of model requests: client's body to upstream, upstream's reply to the client."""

    def __init__(self, config: Config, account: Account, catalog: Catalog, telemetry: Telemetry) -> None:
        self.config = config
        self.account = account
        self.catalog = catalog
        self.telemetry = telemetry
        self.identity = Identity(config.originator, config.client_version)
        self.budget = Budget(MAX_BODIES)
        self.store = Store(STORE_SIZE)
        self.last_requests = LastRequests(LAST_REQUESTS_SIZE)
        self.conversations = Conversations()
        self.large_sessions: deque[tuple[str, str]] = deque(maxlen=256)  # owner, session: not for WebSockets
        self._learned: OrderedDict[str, Learned] = OrderedDict()  # slug -> what its repairs have taught
        local = parse_target(config.upstream)[0].host in LOOPBACK  # compression saves nothing on this host
        self._compresses = config.compress == "on" or (config.compress == "auto" and not local)

    def serve(self, make_api: Callable[..., ResponsesApi | ChatApi], exchange: Exchange) -> None:
        """Answer a model request of any API, with a stream or with one JSON object."""
        api = make_api(exchange, self.store, self.budget, self.config.max_body)
        attempt = self._read_attempt(api, exchange)
        while True:
            reply = self.send_until_accepted(attempt, exchange)
            relay = self._begin_answer(api, attempt, exchange, reply)
            if not self._repair_reported(attempt, exchange, relay):
                break
        attempt.free()
        del attempt  # frees the request during the response, except the part that the store needs
        exchange.release_body(self.budget, api.kept_bytes)
        with reply:
            try:
                relay.run()
            finally:
                end, response = relay.output.final()
                exchange.record.observe_final(end, response)
                self.observe_side_events(relay.output.side_events.values())
            self._end_answer(api, exchange, relay)

    def _begin_answer(self, api: ResponsesApi | ChatApi, attempt: Attempt, exchange: Exchange,
                      reply: Reply) -> Relay:
        """Copy a reply until the answer itself has begun: until then its request can be repeated."""
        codex, etag = exchange.client_headers.codex, ""
        if codex:
            etag = self.catalog.etag(exchange.client_headers.version)
        output = api.output(Audience(codex, etag, attempt.call_ids()))
        if api.streamed:
            exchange.prepare_stream(200, {**self.client_headers(reply, exchange), **STREAM_HEADERS})
        relay = Relay(reply, exchange, output, self.config.keepalive, self.config.idle_timeout)
        relay.run(opening=True)
        self.observe_created(exchange, attempt, output.created)
        return relay

    def _repair_reported(self, attempt: Attempt, exchange: Exchange, relay: Relay) -> bool:
        """Repair a failure that upstream reports inside its 200 before the client has got anything."""
        error: BridgeError | None = relay.error
        if relay.output.final()[0] == "failed":
            error = relay.output.assembler.failure()
        if exchange.started or not isinstance(error, UpstreamRefusal) or not self.repair(attempt, error):
            return False
        relay.reply.close()
        return True

    def _end_answer(self, api: ResponsesApi | ChatApi, exchange: Exchange, relay: Relay) -> None:
        """Send the end of an answer. Raises the error of a failed one."""
        end, response = relay.output.final()
        if relay.error is not None:
            if exchange.started:
                exchange.write(relay.output.render_error(relay.error))
            raise relay.error
        if f"response.{end}" in STORED_EVENTS:
            api.keep(response)
        warn_of_overflow(relay.output.assembler, exchange.record)
        if api.streamed:
            exchange.finish_stream(relay.last or b"")
        else:
            headers = self.client_headers(relay.reply, exchange)
            exchange.send_json(200, api.to_json(relay.output.assembler.response()), headers)

    def _read_attempt(self, api: ResponsesApi | ChatApi, exchange: Exchange) -> Attempt:
        """Read a client's request. Raises InvalidRequest and what `Exchange.read_body` raises."""
        spans = self.read_json(exchange)
        check_request(spans.request)
        exchange.record.model = spans.request["model"]
        request = api.to_upstream(spans)
        context = self.context(exchange, request)
        exchange.record.slug = context.slug
        return self.attempt(exchange, request, spans, context)

    def read_json(self, exchange: Exchange) -> Spans:
        """Read a client's JSON. Raises InvalidRequest and what `Exchange.read_body` raises."""
        raw = exchange.read_body(self.config.max_body, self.budget)
        if len(raw) > COUNTED_BODY:
            exchange.hold_parsed(raw, self.budget)
        return self.parse(exchange, raw)

    def parse(self, exchange: Exchange, raw: bytes) -> Spans:
        """Parse a client's request; what is as in its conversation's last one is taken from there.

        Raises InvalidRequest.
        """
        if len(raw) <= COUNTED_BODY:
            return self.budget.parse(raw)
        names = guess_conversation(exchange, raw)
        return self.budget.parse(raw, self.last_requests.get_last(exchange.client.owner, *names))

    def attempt(self, exchange: Exchange, request: dict[str, Any], spans: Spans, context: Context) -> Attempt:
        """Return a request's first attempt; it tells what the lite form will lose where that is known."""
        repairs: tuple[str, ...] = ()
        if context.is_lite and not context.lite_header and lite_losses(request):
            repairs = (f"{FORM_REPAIR}={'+'.join(lite_losses(request))}",)
        return Attempt(request, spans, context, functools.partial(self._keep, exchange), repairs)

    def _keep(self, exchange: Exchange, spans: Spans) -> bool:
        """Keep a request that upstream has accepted, as `parse` will look for it; tell whether it is kept."""
        if len(spans.raw) <= COUNTED_BODY:
            return False
        names = guess_conversation(exchange, spans.raw)
        return self.last_requests.keep(exchange.client.owner, *names, spans)

    def context(self, exchange: Exchange, request: Mapping[str, Any], websocket: bool = False) -> Context:
        """Return the rules' context."""
        headers, client, name = exchange.head.headers, exchange.client_headers, request["model"]
        metadata = request.get("client_metadata") or {}
        lite_header = LITE_HEADER in headers or (isinstance(metadata, dict) and LITE_METADATA in metadata)
        slug, model, effort = self.catalog.lookup(name, client.version, needed=not lite_header)
        learned = self._learned.get(slug, Learned())
        plain = model is not None and model.lite and not lite_header and not learned.lite_only \
            and bool(lite_losses(request))
        return Context(
            slug=slug, effort=effort, model=model, codex=client.codex, websocket=websocket,
            name=self.conversation_name(exchange, request, slug), lite_header=lite_header, plain=plain,
            strict=self.config.continuity == "strict", dropped=learned.dropped,
            item_fixes=learned.item_fixes)

    def conversation_name(self, exchange: Exchange, request: Mapping[str, Any], slug: str) -> str:
        """Return what names a request's conversation upstream (WIRE 4).

        That is the name of the WebSocket that carries it, whose headers are sent already; else the client's
        own key or session header, unless the backend has replaced it; else one that this bridge makes.
        """
        owner, client = exchange.client.owner, exchange.client_headers
        key = or_empty(request.get("prompt_cache_key"), str)
        own = key or client.session
        if client.codex:
            own = client.session or key
        if exchange.conversation and not client.codex:
            return exchange.conversation
        if own and (client.codex or not self.conversations.is_replaced(owner, cache_name(own))):
            return cache_name(own)
        return self.conversations.name(conversation_hash(request, owner, slug))

    def handshake_name(self, exchange: Exchange) -> str:
        """Return what names a WebSocket upstream: the client's session, else a name for this connection."""
        owner, session = exchange.client.owner, exchange.client_headers.session
        if not session:
            return self.conversations.name(f"connection {exchange.record.id}")
        name = cache_name(session)
        if exchange.client_headers.codex or not self.conversations.is_replaced(owner, name):
            return name
        return self.conversations.name(f"session {owner} {name}")

    def observe_created(self, exchange: Exchange, attempt: Attempt, created: Mapping[str, Any]) -> None:
        """Learn from an accepted request: whether its model wants lite, and which cache key upstream uses.

        `created` is the response of `response.created`; {} if no such event came.
        """
        context = attempt.context
        if created and attempt.repairs and context.is_lite and not context.lite_header \
                and lite_losses(attempt.request):
            self._learn(context, lite_only=True)
        echoed, sent = created.get("prompt_cache_key"), attempt.normalized.get("prompt_cache_key")
        if not isinstance(echoed, str) or not echoed or echoed == sent:
            return
        self.telemetry.count("replaced_keys")
        if self.conversations.replace(exchange.client.owner, str(sent)):
            log.warning("upstream does not use the cache key (prompt_cache_key) that a request names: a "
                        "client's own key gives way to one of this bridge's; this is logged once")

    def send_until_accepted(self, attempt: Attempt, exchange: Exchange) -> Reply:
        """Send a request upstream, and again after each known repair of a refusal, until a stream comes.

        Raises UpstreamRefusal and other BridgeErrors, and ClientLeft.
        """
        record = exchange.record
        while True:
            payload = attempt.next_payload()
            record.rules, record.repairs, record.slug = attempt.rules, attempt.repairs, attempt.context.slug
            if attempt.repairs:
                exchange.extra_headers["x-qoo-bridge-repaired"] = header_text(", ".join(attempt.repairs))
            headers, payload = self._pack(attempt, exchange, payload)
            reply = self.account.open("POST", "/responses", headers, payload, exchange.connection)
            self.observe_headers(reply)
            if is_stream(reply):
                self.account.open_ahead(reply)
                return reply
            error = self.read_refusal(reply, exchange)
            if not self.repair(attempt, error):
                try:
                    raise error
                finally:
                    del error  # error -> traceback -> this frame -> error would keep the request in memory

    def _pack(self, attempt: Attempt, exchange: Exchange, payload: bytes) -> tuple[dict[str, str], bytes]:
        """Return a request's upstream headers, and its body, compressed if large."""
        request, context = attempt.normalized, attempt.context
        headers = upstream_headers(exchange.head.headers, exchange.client_headers, self.identity,
                                   context.name)
        if context.is_lite:
            headers[LITE_HEADER] = "true"
        headers.update({"x-codex-routing-hint": routing_hint(request), "accept": "text/event-stream",
                        "content-type": "application/json"})
        if self._compresses and len(payload) >= COMPRESS_FROM:
            packed = zstd_compress(payload)
            if packed is not None:
                headers["content-encoding"], payload = "zstd", packed
        return headers, payload

    def observe_headers(self, reply: Reply) -> None:
        """Read the plan's limits and the model list's ETag from a reply's headers."""
        self.telemetry.rate_limits(reply.headers, time.time())
        etag = reply.headers.get("x-models-etag")
        if etag:
            self.catalog.observe_etag(etag)

    def observe_side_events(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Read the plan's limits and the model list's ETag from side events."""
        for event in events:
            if event.get("type") == LIMITS_EVENT:
                self.telemetry.keep_limits(event_limits(event), time.time())
            elif side_etag(event):
                self.catalog.observe_etag(side_etag(event))

    def client_headers(self, reply: Reply, exchange: Exchange) -> dict[str, str]:
        """Return the headers of a reply for the client; a Codex gets the ETag of this bridge's list."""
        headers = downstream_headers(reply.headers)
        if exchange.client_headers.codex:
            etag = self.catalog.etag(exchange.client_headers.version)
            if etag:
                headers["x-models-etag"] = etag
        return headers

    def read_refusal(self, reply: Reply, exchange: Exchange) -> UpstreamRefusal:
        """Return the error for a reply that is not a stream. Raises what `Reply.read_body` raises."""
        with reply:
            seconds = min(ERROR_BODY_SECONDS, self.config.idle_timeout)
            body = reply.read_body(MAX_ERROR_BODY, seconds, exchange.connection)
        headers = reply.headers
        coding = headers.get("content-encoding", "identity")
        if coding != "identity":
            body = f"unrequested Content-Encoding {coding[:40]!r}".encode()
        error = refusal(reply.status, headers.get("content-type", ""), body, headers.get("retry-after"))
        resets_at = finite_number(error.error.get("resets_at"))
        if reply.status == 429 and resets_at is not None:
            error.headers.setdefault("retry-after", retry_after_seconds(resets_at - time.time()) or "1")
        if reply.status == 401:
            error.error["message"] = error.message = f"{error.message} ({self.account.hint})"
        if reply.status == 426:  # RFC 9110, 15.5.22: it must name the protocol
            error.headers.update(UpgradeRequired.always_sends)
        passed = downstream_headers(headers)
        error.headers.update({name: value for name, value in passed.items()
                              if name not in ("content-type", "etag", "retry-after")})
        return error

    def repair(self, attempt: Attempt, error: UpstreamRefusal) -> bool:
        """Repair a refused attempt; tell whether a known repair changed it."""
        if not error.may_be_repaired or attempt.repaired >= MAX_REPAIRS:
            return False
        matched = match_repair(f"{error.message} {error.code}")
        if matched is None:
            return False
        repair, match = matched
        if repair.name == FORM_REPAIR:
            context, changed = self._repair_form(attempt)
        else:
            context, changed = repair.apply(attempt.context, match, attempt.normalized)
        if context == attempt.context:
            return False
        self._learn(context)
        attempt.context = context
        attempt.repairs = (*attempt.repairs, "=".join(filter(None, (repair.name, changed))))
        attempt.repaired += 1
        self.telemetry.count("repairs", repair=repair.name)
        return True

    def may_wait(self, attempt: Attempt, error: UpstreamRefusal) -> bool:
        """Tell whether `repair` would fetch the model list for this refusal."""
        matched = match_repair(f"{error.message} {error.code}")
        return matched is not None and matched[0].name == FORM_REPAIR and not attempt.context.plain

    def _repair_form(self, attempt: Attempt) -> tuple[Context, str]:
        """Return the context for the model's other form, and what that form loses.

        A plain form that was tried for what lite would lose goes lite. Else the model list is fetched again.
        """
        context = attempt.context
        if context.plain:
            return context._replace(plain=False), "+".join(lite_losses(attempt.request))
        if FORM_REPAIR in attempt.repairs:
            return context, ""
        self.catalog.refresh()
        slug, model, effort = self.catalog.resolve(attempt.request["model"], self.catalog.get())
        return context._replace(slug=slug, model=model, effort=effort), ""

    def _learn(self, context: Context, lite_only: bool = False) -> None:
        """Remember for a model what a repair has taught: up to 64 parameters, and 16 fields of items.

        Not a list that was emptied: another request's may be right.
        """
        slug = context.slug
        known = self._learned.get(slug, Learned())  # another request may have learned meanwhile
        fixes = [fix for fix in context.item_fixes if not fix.empties and fix not in known.item_fixes]
        dropped = known.dropped | context.dropped
        learned = Learned(dropped if len(dropped) <= 64 else known.dropped,
                          (*known.item_fixes, *fixes)[:16], known.lite_only or lite_only)
        if learned != known:
            self._learned[slug] = learned
        if len(self._learned) > 64:
            self._learned.popitem(last=False)

    def pass_on(self, exchange: Exchange) -> None:
        """Forward a side request with this host's sign-in, and copy its reply back piece by piece."""
        method, path = SIDE_ROUTES[exchange.path]
        body = b""
        if method == "POST":
            body = exchange.read_body(self.config.max_body, self.budget)
        given, client = exchange.head.headers, exchange.client_headers
        name = self.conversation_name(exchange, {}, "")
        headers = {"accept": "application/json", **upstream_headers(given, client, self.identity, name)}
        if method == "POST":
            headers["content-type"] = given.get("content-type", "application/json")
            body = self._without_alias(exchange, body)
        if LITE_HEADER in given:
            headers[LITE_HEADER] = given[LITE_HEADER]
        reply = self.account.open(method, path, headers, body, exchange.connection)
        self.observe_headers(reply)
        if not 200 <= reply.status < 300:
            raise self.read_refusal(reply, exchange)
        exchange.release_body(self.budget)
        if path == USAGE_PATH and not exchange.client.key:
            exchange.send_json(200, limits_only(reply.read_all(MAX_REPLY, ERROR_BODY_SECONDS).json()))
            return
        with reply:
            exchange.prepare_stream(reply.status, downstream_headers(reply.headers))
            while piece := reply.read(self.config.idle_timeout, exchange.connection):
                exchange.write(piece)
            if piece is None:
                raise UpstreamTimeout(f"upstream was silent for {self.config.idle_timeout:g} s")
            exchange.finish_stream()

    def _without_alias(self, exchange: Exchange, body: bytes) -> bytes:
        """Replace an alias in a side request's body with the model; leave the rest unchanged."""
        if not body[:64].lstrip().startswith(b"{"):
            return body  # a form with images
        exchange.hold_parsed(body, self.budget)
        try:
            spans = self.budget.parse(body)
        except InvalidRequest:
            return body
        request = spans.request
        if not isinstance(request, dict) or not self.catalog.is_alias(request.get("model")):
            return body
        slug = self.catalog.resolve(request["model"], self.catalog.get(wait=CATALOG_WAIT)).slug
        return encode({**request, "model": slug}, spans)

    def count_tokens(self, exchange: Exchange) -> None:
        """Answer with an estimate of a request's input tokens; nothing is sent upstream."""
        body = self.read_json(exchange).request
        check_request({"model": "-", **body} if isinstance(body, dict) else body)
        exchange.send_json(200, {"object": "response.input_tokens", "input_tokens": estimate_tokens(body)})


def guess_conversation(exchange: Exchange, raw: bytes) -> tuple[str, str]:
    """Return names for a request's conversation and for its start, which other conversations can share.

    Both are known before the request is parsed. A session can have several threads, whose requests mostly
    begin with different ids. A WebSocket has one thread, and its requests begin with the last response's id.
    Else the first 16 KiB tell a conversation: while they still change, its start does not.
    """
    if exchange.conversation:
        return f"websocket {exchange.conversation}", "websocket"
    session, start = exchange.client_headers.session, str(zlib.crc32(raw[:START_BYTES]))
    if session:
        return f"session {session} {zlib.crc32(raw[:NAMING_BYTES])}", start
    return f"start {zlib.crc32(raw[:COUNTED_BODY])}", start


def is_stream(reply: Reply) -> bool:
    """Tell whether a reply is a stream as requested: 200, server-sent events, not compressed."""
    content_type = reply.headers.get("content-type", "text/event-stream")
    return reply.status == 200 and "event-stream" in content_type and \
        reply.headers.get("content-encoding", "identity") == "identity"


def limits_only(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Return what everybody on an open LAN may know of the plan's usage: no email, no ids."""
    return {name: value for name, value in usage.items()
            if name in ("plan_type", "credits") or name.endswith(("rate_limit", "rate_limits"))}


# == 34 in flight =============================================================
# What a WebSocket holds beside its frames: requests without an answer, chains, messages that are incomplete.

class InFlight:
    """One response.create without a complete answer."""

    def __init__(self, record: Record, held: Held) -> None:
        self.record = record
        self.held = held  # memory for the request
        self.attempt: Attempt | None = None  # for a repair; None once its answer has begun
        self.begun = False  # the first event of its answer has gone to the client
        self.stored: StoredInput | None = None  # for the store, where the client counts on one
        self.assembler = ResponseAssembler()
        self.created: dict[str, Any] = {}  # the response of response.created
        self.call_ids: dict[str, bytes] = {}  # short call id -> the client's own, JSON-escaped
        self.slot = contextlib.ExitStack()  # holds the key's slot
        self.chain_fields: dict[str, str] = {}  # hashes of the chain's tools and instructions from here on

    def begin(self) -> None:
        """Note that the answer begins: the request is not repeated any more."""
        if self.attempt is not None:
            self.attempt.free()
        self.begun, self.attempt = True, None
        self.record.mark_first_byte()
        self.held.release(len(self.stored.items) if self.stored else 0)

    def end(self) -> None:
        """Free what the request holds."""
        self.slot.close()
        self.held.release()

    def complete(self, parsed: Mapping[str, Any], size: int) -> bytes | None:
        """Add an event of `size` bytes; return a terminal event's bytes if it is completed, else None."""
        self.assembler.add(parsed, size)
        if event_type(parsed) not in TERMINAL_EVENTS:
            return None
        warn_of_overflow(self.assembler, self.record)
        changed = self.assembler.fill()
        if self.stored and self.stored.previous:  # upstream may not know it
            changed = self.assembler.set_fields({"previous_response_id": self.stored.previous}) or changed
        if not changed:
            return None
        return json_bytes(self.assembler.final)

    def observe_end(self, event: Mapping[str, Any], end: str) -> None:
        """Record how the answer ended: by an event, or with the connection, as one of ENDS says."""
        record, kind = self.record, event_type(event)
        response = or_empty(event.get("response"), dict)
        if kind == "error":
            record.observe_final("error", event)
            error = failure(event)
            record.status, record.error_code = error.status, error.code
        elif kind:
            record.observe_final(kind.rpartition(".")[2], response)
        if end == "cut":
            record.fail(BadUpstream("upstream closed the connection mid-response"), end)
        elif end:
            record.end = end


class Waiting(NamedTuple):
    """A request that waits for a call in the background, and what goes on with it then."""

    in_flight: InFlight
    background: Background
    resume: Callable[[InFlight, Background], None]

    def abandon(self) -> None:
        """Free what the request holds as soon as the call has ended: nobody waits for its result."""
        self.background.when_done(self.in_flight.end)


class Held:
    """Memory that a WebSocket's message holds of the budget for all bodies."""

    def __init__(self, budget: Budget, size: int) -> None:
        """Reserve the memory. Raises Overloaded."""
        budget.take(size)
        self._budget = budget
        self._size = size

    def grow(self, size: int) -> None:
        """Reserve more. Raises Overloaded."""
        self._budget.take(size)
        self._size += size

    def release(self, kept: int = 0) -> None:
        """Release the memory but for `kept` bytes; a second time does nothing."""
        kept = min(kept, self._size)
        self._budget.give(self._size - kept)
        self._size = kept


class Incomplete:
    """A client's message that is not complete: its memory, and the time that it has left."""

    def __init__(self, budget: Budget) -> None:
        self.until = float("inf")  # monotonic
        self._budget = budget
        self._size = 0

    def grow(self, size: int) -> None:
        """Note how many bytes of a message are here; 0 for none. Raises Overloaded."""
        now, grown = time.monotonic(), size - self._size
        if size == 0:
            self.until = float("inf")
        elif self._size == 0:
            self.until = now + BODY_STALL
        else:
            self.until = min(self.until + max(0, grown) / BODY_RATE, now + BODY_STALL)
        self._budget.take(grown)
        self._size = size


class Chains:
    """The tools and instructions that upstream knows of each chain of responses, as hashes.

    Upstream keeps both for the connection's chain, which `previous_response_id` continues (WIRE 6).
    """

    NEWEST = 64  # responses that are kept

    def __init__(self) -> None:
        self._fields: OrderedDict[str, dict[str, str]] = OrderedDict()  # response id -> field -> hash

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def keep(self, name: Any, fields: dict[str, str]) -> None:
        """Keep what a response's chain knows."""
        if isinstance(name, str):
            self._fields[name] = fields
            if len(self._fields) > self.NEWEST:
                self._fields.popitem(last=False)

    def known(self, in_flight: InFlight, frame: Mapping[str, Any]) -> set[str]:
        """Return the fields of a lite frame that repeat its chain's. Raises InvalidRequest."""
        try:
            sent = {**frame, "tools": chosen_tools(frame)}
            given = {key: stable_id(json.dumps(sent[key], sort_keys=True))
                     for key in ("tools", "instructions") if sent.get(key)}
        except RecursionError as exc:
            raise InvalidRequest("the request is nested too deeply") from exc
        earlier = self._fields.get(str(frame.get("previous_response_id")), {})
        in_flight.chain_fields = {**earlier, **given}
        choice = frame.get("tool_choice")
        if isinstance(choice, dict) and is_forced(choice):  # the rules look for the tool among the frame's
            given.pop("tools", None)
        return {key for key in given if earlier.get(key) == given[key]}


class AfterError:
    """What may follow an `error` frame: upstream's `response.failed` of the same request, or one of ours.

    An `error` without a status means nothing to Codex, which waits for its idle timeout (WIRE 6).
    """

    def __init__(self) -> None:
        self.until = float("inf")  # monotonic; when ours is due
        self._failed: dict[str, Any] = {}  # ours
        self._expected = False  # upstream's may come
        self._hidden = False  # upstream's is not for the client
        self._response: Any = None  # the id of the response that it ends, if that is known
        self._begun = 0.0  # monotonic

    def begin(self, event: Mapping[str, Any], created: Mapping[str, Any], codex: bool) -> None:
        """Note that an `error` has gone to the client."""
        self._expected, self._hidden, self._response = True, False, created.get("id")
        self._begun = time.monotonic()
        if codex and not reported_status(event):
            self._failed, self.until = failed_event(event, created), time.monotonic() + FAILURE_WAIT

    def hide(self) -> None:
        """Note that an `error` was repaired: the client hears nothing of it."""
        self._expected, self._hidden, self._response = True, True, None
        self._begun = time.monotonic()

    def take_ours(self) -> dict[str, Any]:
        """Return our `response.failed` to send now; {} if none is due. Upstream's then comes too late."""
        failed, self._failed, self.until = self._failed, {}, float("inf")
        self._hidden = self._hidden or bool(failed)
        return failed

    def take_theirs(self, response: Any = None, in_flight: bool = False) -> bool | None:
        """Tell whether upstream's `response.failed` goes to the client; None if it ends another request.

        With another one in flight, its response's id tells which one it ends; if that is unknown, the time.
        """
        known = self._response and response
        late = in_flight and not known and time.monotonic() > self._begun + FAILURE_WAIT
        if not self._expected or late or (known and response != self._response):
            return None
        self._expected, self._failed, self.until = False, {}, float("inf")
        return not self._hidden

    def end(self) -> None:
        """Note that another response has begun: none of the earlier request follows."""
        self._expected = False


# == 35 websockets ============================================================
# One WebSocket to the client, one to upstream, and frames both ways.

class WebSocketRelay:
    """A relay between the client's and the backend's WebSocket. Only the connection's thread uses it."""

    IN_FLIGHT = 32  # requests that may run at once

    def __init__(self, turns: Turns, key_queue: KeyQueue, exchange: Exchange, reply: Reply) -> None:
        self._turns = turns
        self._key_queue = key_queue
        self._exchange = exchange
        self._client, self._upstream = exchange.connection, reply.connection
        self._in_flight: deque[InFlight] = deque()  # oldest first: answers come in the order of the requests
        self._chains = Chains()
        self._codex = exchange.client_headers.codex
        self._from_client = FrameReader(masked=True, max_message=min(turns.config.max_body, MAX_FRAME - 1))
        self._from_upstream = FrameReader(masked=False, max_message=MAX_EVENT)
        self._open = True
        self._end_of_rest = "cut"  # the `end` of requests in flight at the connection's end
        self._after_error = AfterError()
        self._progress = 0.0  # monotonic; when upstream last sent more than a sign of life
        self._waiting: Waiting | None = None  # the request that the client's next frames wait for
        self._texts: deque[tuple[bytes, Held]] = deque()  # the client's frames that wait for that
        self._incomplete = Incomplete(turns.budget)
        self._set_idle: Callable[[bool], None] = lambda idle: None
        self._log_request: Callable[[Record], None] = lambda record: None

    def run(self, set_idle: Callable[[bool], None], log_request: Callable[[Record], None]) -> None:
        """Forward frames both ways until one side ends; then close the other side.

        `set_idle` gets whether no request is running; `log_request` gets each finished record.
        """
        self._set_idle, self._log_request = set_idle, log_request
        try:
            self._set_idle(True)
            self._pass_frames(self._turns.config.keepalive, self._turns.config.idle_timeout)
        except ClientLeft as exc:
            self._end_of_rest = str(exc)
            self._close(CLOSE_GOING_AWAY, CLOSE_GOING_AWAY, str(exc))
        except OSError as exc:
            self._close_after_cut(describe_error(exc))
        finally:
            self._open = False
            self._incomplete.grow(0)
            for _, held in self._texts:
                held.release()
            if self._waiting is not None:
                self._waiting.abandon()
                self._log_end(self._waiting.in_flight, {}, self._end_of_rest)
            while self._in_flight:
                self._settle({}, self._end_of_rest)
            linger(self._upstream)  # closing with unread frames would reset TCP and lose our close frame
            self._upstream.close()

    def _pass_frames(self, keepalive: float, idle_timeout: float) -> None:
        client, upstream = Pulse("client_closed"), Pulse("cut")
        while self._open:
            seconds = min(self._incomplete.until, self._after_error.until) - time.monotonic()
            seconds = min(keepalive, max(0.0, seconds))
            if self._waiting is not None:
                seconds = min(seconds, BACKGROUND_POLL)
            client_ready, upstream_ready = self._wait(seconds)
            if upstream_ready:
                upstream.hear()
                self._read(self._upstream, self._from_upstream, self._upstream_message)
            if client_ready and self._open:
                client.hear()
                self._read(self._client, self._from_client, self._client_message)
                self._count_incomplete()
            if self._open:
                self._check_pulses(client, upstream, keepalive, idle_timeout)
            if time.monotonic() >= self._after_error.until:
                self._send_own_failure()
            if self._waiting is not None and self._waiting.background.done.is_set():
                self._resume(self._waiting)

    def _check_pulses(self, client: Pulse, upstream: Pulse, keepalive: float, idle_timeout: float) -> None:
        """End the connection if a side is dead or upstream stuck; ping a side that is silent."""
        now = time.monotonic()
        since = self._progress if self._in_flight else upstream.last_read
        if now - since > idle_timeout:
            reason = f"upstream was silent for {idle_timeout:g} s"
            self._close(CLOSE_BAD_GATEWAY, CLOSE_GOING_AWAY, reason)
        elif now >= self._incomplete.until:
            self._close(CLOSE_POLICY, CLOSE_GOING_AWAY, "the message came too slowly")
        elif client.is_dead(now, keepalive) or upstream.is_dead(now, keepalive):
            self._end_of_rest = client.end if client.is_dead(now, keepalive) else upstream.end
            self._close_after_cut(f"{UNANSWERED_PINGS} pings were not answered")
        else:
            if client.is_due(now, keepalive):
                self._exchange.send(encode_frame(OP_PING, b""))
            if upstream.is_due(now, keepalive):
                self._to_upstream(OP_PING, b"")

    def _resume(self, waiting: Waiting) -> None:
        """Go on with a request that had to wait, and then with the frames behind it."""
        self._waiting = None
        waiting.resume(waiting.in_flight, waiting.background)
        while self._texts and self._waiting is None and self._open:
            self._take_text(*self._texts.popleft())

    def raise_if_closed(self) -> None:
        """Raise ClientLeft after the end of this connection: nobody waits any more."""
        if not self._open:
            raise ClientLeft("client_closed")

    def _wait(self, seconds: float) -> tuple[bool, bool]:
        """Wait for either side; return whether the client's and whether upstream's bytes are available."""
        client_ready, upstream_ready = self._client.has_buffered(), self._upstream.has_buffered()
        if not client_ready and not upstream_ready:
            upstream_ready, client_ready = self._upstream.poll(seconds, self._client)
        return client_ready, upstream_ready

    def _read(self, connection: Connection, reader: FrameReader, handle: Callable[[Message], None]) -> None:
        """Read the available bytes and handle their messages; close both sides after a protocol error."""
        from_client = connection is self._client
        try:
            raw = connection.read()
        except OSError as exc:
            log.debug("WebSocket connection failed: %s", describe_error(exc))
            raw = b""
        if raw is None:
            return
        if not raw:
            self._end_of_rest = "client_closed" if from_client else "cut"
            self._close_after_cut("")
            return
        for message in reader.feed(raw):
            if self._open:
                handle(message)
        if reader.error is not None and self._open:
            self._close_after_breach(reader.error, from_client)

    def _count_incomplete(self) -> None:
        """Count an incomplete message of the client against the budget of all bodies, and time it as one."""
        try:
            self._incomplete.grow(self._from_client.incomplete_bytes if self._open else 0)
        except Overloaded as exc:
            self._close(CLOSE_TRY_AGAIN, CLOSE_GOING_AWAY, exc.message)

    def _close_after_breach(self, error: FrameError, from_client: bool) -> None:
        """Close both sides after a protocol error; the code for the innocent side blames the other one."""
        log.info("invalid WebSocket frame from %s: %s", "the client" if from_client else "upstream", error)
        if from_client and error.code == CLOSE_TOO_BIG:
            self._leave_to_http()
        if from_client:
            self._close(error.code, CLOSE_GOING_AWAY, str(error))
        else:
            self._close(CLOSE_BAD_GATEWAY, error.code, str(error))

    def _leave_to_http(self) -> None:
        """Answer the session's next handshake with 426: its message is too big here, and HTTP takes it."""
        session = self._exchange.client_headers.session
        if session:  # all clients without a name share ""
            self._turns.large_sessions.append((self._exchange.client.owner, session))

    # -- client -> upstream

    def _client_message(self, message: Message) -> None:
        if message.opcode == OP_TEXT:
            self._client_text(message.payload)
        elif message.opcode == OP_PING:
            self._exchange.send(encode_frame(OP_PONG, message.payload))
        elif message.opcode == OP_CLOSE:
            self._end_of_rest = "client_closed"
            code, reason = parse_close(message.payload)
            self._close(code, code, reason)
        elif message.opcode == OP_BINARY:
            self._close(CLOSE_UNSUPPORTED, CLOSE_GOING_AWAY, "send text frames, not binary ones")

    def _client_text(self, raw: bytes) -> None:
        """Take a client's frame, behind those that wait."""
        try:
            if len(self._texts) >= self.IN_FLIGHT:
                raise TooManyRequests("too many requests wait on this connection")
            held = Held(self._turns.budget, parsed_size(raw))
        except BridgeError as exc:
            self._refuse_record(self._new_record(), exc)
            return
        if self._waiting is None:
            self._take_text(raw, held)
        else:
            self._texts.append((raw, held))

    def _take_text(self, raw: bytes, held: Held) -> None:
        """Forward a client's frame; normalize a response.create like a request."""
        in_flight = InFlight(self._new_record(), held)
        try:
            spans = self._turns.parse(self._exchange, raw)
            frame = spans.request
            if isinstance(frame, dict) and event_type(frame) not in ("", "response.create"):
                held.release()
                self._to_upstream(OP_TEXT, raw)
                return
            check_request(frame)
            in_flight.record.model = frame["model"]
            if len(self._in_flight) >= self.IN_FLIGHT:
                raise TooManyRequests("too many requests are running on this connection", retry_after=5)
            client = self._exchange.client
            if self._turns.catalog.is_at_hand(frame["model"]) and self._key_queue.has_room(client.key):
                self._accept(spans, in_flight)
                self._send_accepted(in_flight)
            else:
                in_flight.record.waiting = True
                self._turns.telemetry.begin(in_flight.record)
                background = Background(lambda: self._accept(spans, in_flight))
                self._waiting = Waiting(in_flight, background, self._resume_create)
                self._note_idle()
        except BridgeError as exc:
            self._refuse(in_flight, exc)

    def _resume_create(self, in_flight: InFlight, waited: Background) -> None:
        """Send a response.create that had to wait, or say why it cannot be sent."""
        try:
            waited.result()
            self._send_accepted(in_flight)
        except BridgeError as exc:
            self._refuse(in_flight, exc)

    def _send_accepted(self, in_flight: InFlight) -> None:
        in_flight.record.waiting = False
        self._turns.telemetry.begin(in_flight.record)
        self._in_flight.append(in_flight)
        self._note_idle()
        self._progress = time.monotonic()
        self._send_create(in_flight)

    def _new_record(self) -> Record:
        """Return a new record for one response.create."""
        client = self._exchange.client
        record = Record(client.address)
        record.method, record.path = "WS", self._exchange.path_as_sent
        record.key, record.status = client.key, 200
        record.user_agent_kind = self._exchange.user_agent_kind
        return record

    def _accept(self, spans: Spans, in_flight: InFlight) -> None:
        """Prepare a response.create and take a place for it. Raises BridgeError, ClientLeft."""
        frame = spans.request
        context = self._turns.context(self._exchange, frame, websocket=True)
        in_flight.record.slug = context.slug
        in_flight.stored = stored_input(spans, context.codex, self._turns.store.limit)
        if in_flight.stored:
            frame = self._resolve(frame, in_flight.held)
        in_flight.attempt = self._turns.attempt(self._exchange, frame, spans, context)
        slot = self._key_queue.slot(self._exchange.client.key, self.raise_if_closed, wait=not self._in_flight)
        in_flight.slot.enter_context(slot)

    def _resolve(self, frame: dict[str, Any], held: Held) -> dict[str, Any]:
        """Expand a previous_response_id of another connection, because upstream knows it only there."""
        if str(frame.get("previous_response_id")) in self._chains:
            return frame
        owner, limit = self._exchange.client.owner, self._turns.config.max_body
        return self._turns.store.resolve(owner, frame, limit, held.grow)

    def _send_create(self, in_flight: InFlight) -> None:
        """Normalize a response.create and send it; send the client's own bytes if no rule changes it."""
        attempt = in_flight.attempt
        if attempt is None:
            return
        try:
            known: set[str] = set()
            if attempt.context.model is not None and attempt.context.is_lite:
                known = self._chains.known(in_flight, attempt.request)
            payload = attempt.next_payload(*known)
            record = in_flight.record
            record.rules, record.repairs, record.slug = attempt.rules, attempt.repairs, attempt.context.slug
            in_flight.call_ids = attempt.call_ids()
            self._to_upstream(OP_TEXT, payload)
        except BridgeError as exc:
            self._in_flight.remove(in_flight)
            self._refuse(in_flight, exc)

    def _refuse(self, in_flight: InFlight, error: BridgeError) -> None:
        """Answer a response.create with an `error` frame instead of forwarding it."""
        in_flight.end()
        self._refuse_record(in_flight.record, error)
        self._note_idle()

    def _refuse_record(self, record: Record, error: BridgeError) -> None:
        """Answer a frame with an `error` frame, and log it."""
        record.status = error.status
        record.fail(error)
        event = {"type": "error", "status": error.status, **error.body()}
        self._exchange.send(encode_frame(OP_TEXT, json_bytes(event)))
        self._log_request(record)

    # -- upstream -> client

    def _upstream_message(self, message: Message) -> None:
        if message.opcode == OP_TEXT:
            self._upstream_text(message.payload)
        elif message.opcode == OP_PING:
            self._to_upstream(OP_PONG, message.payload)
        elif message.opcode == OP_CLOSE:
            code, reason = parse_close(message.payload)
            if code == CLOSE_TOO_BIG:
                self._leave_to_http()
            self._close(code, code, reason)
        elif message.opcode == OP_BINARY:
            self._exchange.send(encode_frame(OP_BINARY, message.payload))

    def _upstream_text(self, payload: bytes) -> None:
        """Forward an event unchanged; parse it first if it may be notable."""
        in_flight = next(iter(self._in_flight), None)
        if in_flight is not None:
            payload = restore_call_ids(payload, in_flight.call_ids)
            in_flight.record.events += 1
            if KEEPALIVE_MARK not in payload:
                self._progress = time.monotonic()
        if not SPECIAL_FRAME.search(payload):
            self._pass(in_flight, payload)
            return
        parsed = or_empty(json_or_none(payload), dict)
        kind = event_type(parsed)
        if is_side_event(kind):
            self._side_frame(parsed, payload)
        elif in_flight is not None:
            self._response_event(in_flight, parsed, payload)
        elif kind != "response.failed" or self._after_error.take_theirs() is not False:
            self._pass(None, payload)

    def _side_frame(self, parsed: dict[str, Any], payload: bytes) -> None:
        """Read a frame that is no part of a response; only a Codex gets it."""
        self._turns.observe_side_events([parsed])
        if self._codex:
            own = with_etag(parsed, self._turns.catalog.etag(self._exchange.client_headers.version))
            if own is not parsed:
                payload = json_bytes(own)
            self._exchange.send(encode_frame(OP_TEXT, payload))

    def _response_event(self, in_flight: InFlight, parsed: dict[str, Any], payload: bytes) -> None:
        """Pass on an event of a response, unless it ends an earlier one, or a repair takes its place."""
        kind = event_type(parsed)
        if kind == "response.created":
            self._send_own_failure()
            self._after_error.end()
            in_flight.created = or_empty(parsed.get("response"), dict)
            if in_flight.attempt is not None:
                self._turns.observe_created(self._exchange, in_flight.attempt, in_flight.created)
        elif kind == "response.failed":
            response = or_empty(parsed.get("response"), dict)
            goes_on = self._after_error.take_theirs(response.get("id"), in_flight=True)
            if goes_on is not None:  # it ends the request of the `error`, not this one
                if goes_on:
                    self._exchange.send(encode_frame(OP_TEXT, payload))
                return
        if kind in ("error", "response.failed") and self._repair(in_flight, parsed):
            if kind == "error":
                self._after_error.hide()
            return
        self._notable_event(in_flight, parsed, payload)

    def _send_own_failure(self) -> None:
        """Send the `response.failed` that upstream has not sent behind its `error`, if one is due."""
        failed = self._after_error.take_ours()
        if failed:
            self._exchange.send(encode_frame(OP_TEXT, json_bytes(failed)))

    def _notable_event(self, in_flight: InFlight, parsed: dict[str, Any], payload: bytes) -> None:
        """Pass on an event that adds to the response or ends it; its end is stored and logged."""
        kind = event_type(parsed)
        completed = in_flight.complete(parsed, len(payload))
        if kind in STORED_EVENTS and in_flight.stored is not None:
            response = or_empty((in_flight.assembler.final or {}).get("response"), dict)
            self._turns.store.keep_response(self._exchange.client.owner, response, in_flight.stored)
        self._pass(in_flight, completed or payload)
        if kind in TERMINAL_EVENTS or kind == "error":
            if kind == "error":
                self._after_error.begin(parsed, in_flight.created, self._codex)
            self._settle(parsed)

    def _pass(self, in_flight: InFlight | None, payload: bytes) -> None:
        frame = encode_frame(OP_TEXT, payload)
        if in_flight is not None:
            in_flight.record.bytes += len(frame)
        self._exchange.send(frame)
        if in_flight is not None and not in_flight.begun:
            in_flight.begin()

    def _repair(self, in_flight: InFlight, event: dict[str, Any]) -> bool:
        """Repair and resend a refused frame if its refusal has a known repair; tell whether that is tried."""
        attempt = in_flight.attempt
        if attempt is None or self._waiting is not None:
            return False
        refused = failure(event)
        if self._turns.may_wait(attempt, refused):
            self._in_flight.popleft()  # until the model list is there
            background = Background(lambda: self._turns.repair(attempt, refused))
            self._waiting = Waiting(in_flight, background,
                                    lambda _, waited: self._resume_repair(in_flight, waited, event))
            return True
        if not self._turns.repair(attempt, refused):
            return False
        self._in_flight.popleft()
        self._resend(in_flight)
        return True

    def _resume_repair(self, in_flight: InFlight, waited: Background, event: dict[str, Any]) -> None:
        """Resend a frame whose repair had to wait, or pass its refusal on."""
        if waited.result():
            self._resend(in_flight)
            return
        self._in_flight.appendleft(in_flight)
        self._notable_event(in_flight, event, json_bytes(event))

    def _resend(self, in_flight: InFlight) -> None:
        self._in_flight.append(in_flight)  # its answer now comes after those of all other requests
        self._progress = time.monotonic()  # what the repair waited for was not upstream's silence
        self._send_create(in_flight)

    def _settle(self, event: Mapping[str, Any], end: str = "") -> None:
        """Log the oldest response.create and free its slot: it has its answer, or the connection ended."""
        in_flight = self._in_flight.popleft()
        in_flight.end()
        response = or_empty(event.get("response"), dict)
        self._chains.keep(response.get("id"), in_flight.chain_fields)
        self._log_end(in_flight, event, end)
        self._note_idle()

    def _note_idle(self) -> None:
        self._set_idle(self._waiting is None and not self._in_flight)

    def _log_end(self, in_flight: InFlight, event: Mapping[str, Any], end: str) -> None:
        in_flight.observe_end(event, end)
        self._log_request(in_flight.record)

    # -- both ways

    def _to_upstream(self, opcode: int, payload: bytes) -> None:
        self._upstream.send(encode_frame(opcode, payload, mask=os.urandom(4)), WRITE_TIMEOUT)

    def _close_after_cut(self, reason: str) -> None:
        """Close both sides because one is gone; a cut never sends 1001, which many take for a clean end."""
        to_client = CLOSE_GOING_AWAY
        if self._in_flight:
            to_client = CLOSE_BAD_GATEWAY
        self._close(to_client, CLOSE_GOING_AWAY, reason)

    def _close(self, to_client: int, to_upstream: int, reason: str) -> None:
        """Send a close frame to both sides; it also answers a received close frame."""
        self._open = False
        with contextlib.suppress(OSError):
            self._to_upstream(OP_CLOSE, close_payload(to_upstream, reason))
        with contextlib.suppress(ClientLeft):
            self._exchange.send(encode_frame(OP_CLOSE, close_payload(to_client, reason)))


# == 36 pages =================================================================
# The status page.

# The page contains no values: its script fetches `status` every 2 s and shows the values as text nodes.
# The page is the same for every client, so it needs no key.
PAGE_STYLE = """
:root { color-scheme: light dark; --back: #f7f7f5; --card: #fff; --line: #e4e3de; --text: #21211f;
  --soft: #6b6a65; --fill: #2f6f8f; --warn: #a86400; --bad: #b3362b; --good: #3b7d4f }
@media (prefers-color-scheme: dark) { :root { --back: #161617; --card: #1e1e20; --line: #343437;
  --text: #e6e5e1; --soft: #9f9e98; --fill: #6fb1cf; --warn: #dda14a; --bad: #ea8076; --good: #7dbd8f } }
* { box-sizing: border-box } [hidden] { display: none !important } p { margin: 0 }
body { margin: 0 auto; padding: 24px 20px 48px; max-width: 1120px; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums }
header { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; margin-bottom: 18px }
h1 { font-size: 20px; font-weight: 600; margin: 0 } h2 { font-size: 14px; font-weight: 600; margin: 0 0 10px }
#state { margin-left: auto } .soft, th { color: var(--soft) }
.bad { color: var(--bad) } .good { color: var(--good) }
main { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px }
main.stale { opacity: .55 } .all { grid-column: 1 / -1 }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px }
#tiles { display: grid; grid-template-columns: 1.6fr repeat(4, 1fr); gap: 12px 20px }
#tiles b { display: block; font-size: 21px; font-weight: 600; line-height: 1.35; overflow-wrap: anywhere }
#tiles p, th, small { font-size: 13px } .pair { display: flex; justify-content: space-between; gap: 12px }
.bar { height: 8px; border-radius: 4px; background: var(--line); overflow: hidden; margin: 4px 0 2px }
.bar div { height: 100%; background: var(--fill) } .bar .warn { background: var(--warn) }
.bar .bad { background: var(--bad) } .gap { margin-bottom: 12px }
table { width: 100%; border-collapse: collapse; font-size: 14px }
th { text-align: left; font-weight: 400 } th, td { padding: 4px 14px 4px 0; vertical-align: top }
th:last-child, td:last-child { padding-right: 0 } tbody tr { border-top: 1px solid var(--line) }
.n { text-align: right; white-space: nowrap } .t { white-space: nowrap } .any { overflow-wrap: anywhere }
.who { min-width: 8em }
#recent { max-height: 480px; overflow-y: auto; padding-right: 8px }
svg { display: block; width: 100%; height: 56px; border-bottom: 1px solid var(--line); margin: 4px 0 }
rect { fill: var(--fill) } .err { fill: var(--bad) } .hit { fill: transparent } .hit:hover { fill: #8884 }
pre { margin: 0; overflow-x: auto; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace }
button, input { font: inherit; color: inherit; background: var(--back); border: 1px solid var(--line);
  border-radius: 6px; padding: 4px 12px } input { min-width: 0; flex: 1 } button { cursor: pointer }
form { display: flex; gap: 8px; max-width: 480px }
@media (max-width: 700px) { body { padding: 16px 12px 32px } main { grid-template-columns: minmax(0, 1fr) }
  #tiles { grid-template-columns: 1fr 1fr } #tiles > :first-child { grid-column: 1 / -1 }
  .wide, #recent thead { display: none }
  #recent tr { display: grid; gap: 0 10px; padding: 5px 0;
    grid-template-columns: auto minmax(0, auto) 1fr auto }
  #recent td { padding: 0; color: var(--soft) } #recent .n { order: -1; color: inherit }
  #recent .model { grid-column: 1 / 4; order: -2; color: inherit }
  #recent td:last-child { grid-column: 3 / 5; text-align: right } }
"""
PAGE_SCRIPT = r"""
"use strict";
const $ = id => document.getElementById(id), STORED = "qoo-bridge-key";
const integer = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 1});
const brief = (text, most = 36) => text.length > most ? text.slice(0, most - 1) + "…" : text;
const percent = (part, all) => all ? (100 * part / all).toFixed(1) + " %" : "";
const near = seconds => Math.abs(seconds) < 64800;
let key = "", asking = false, timer;
try { key = sessionStorage.getItem(STORED) || ""; } catch { /* no storage: only this page keeps the key */ }

function el(tag, look, ...children) {  // a string child becomes text, never markup
  const node = document.createElement(tag);
  if (look) node.className = look;
  node.append(...children);
  return node;
}
function put(id, ...children) {  // replaces only changed nodes, so that a text selection stays
  const fresh = $(id).cloneNode(false);
  fresh.append(...children);
  if (!fresh.isEqualNode($(id))) $(id).replaceChildren(...fresh.childNodes);
}
function table(id, none, rows, ...columns) {  // a column: title, class, row => child
  const line = (tag, cell) => el("tr", "", ...columns.map(column => el(tag, column[1], cell(column))));
  const body = rows.map(row => line("td", column => column[2](row)));
  const head = el("thead", "", line("th", column => column[0]));
  put(id, rows.length ? el("table", "", head, el("tbody", "", ...body)) : el("p", "soft", none));
}
function span(seconds) {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  if (seconds < 1) return Math.round(seconds * 1000) + " ms";
  if (seconds < 60) return seconds.toFixed(1) + " s";
  if (hours < 1) return minutes + " min " + Math.floor(seconds % 60) + " s";
  if (hours < 48) return hours + " h " + minutes % 60 + " min";
  return Math.floor(hours / 24) + " d " + hours % 24 + " h";
}
function clock(unix, today) {
  const day = today ? {} : {weekday: "short", day: "numeric", month: "short"};
  return new Date(unix * 1000).toLocaleString([], {hour: "2-digit", minute: "2-digit", ...day});
}
function model(row) {
  const name = row.slug || row.model || row.path;
  return (row.model && row.model !== name ? brief(row.model) + " → " : "") + brief(name);
}
function result(row) {
  const by = row.error_by ? " (" + row.error_by + ")" : "", what = brief(row.error_code || row.end) + by;
  return el("span", row.error_by ? "bad" : "", row.status ? row.status + " " + what : what);
}

function tiles(s) {
  const tile = (title, value, detail, look) =>
    el("p", "", el("span", "soft", title), el("b", look, value), el("span", "soft", detail));
  const sum = s.totals, sign = s.sign_in, hour = s.hour.reduce((n, minute) => n + minute.requests, 0);
  const left = typeof sign.expires_in !== "number" ? "" :
    sign.expires_in > 0 ? "token expires in " + span(sign.expires_in) : "token expired";
  const signedIn = sign.state === "ok";
  const details = [sign.plan, left, sign.message].filter(Boolean).join(" · ");
  put("tiles", tile("Sign-in", signedIn ? "signed in" : sign.state, details, signedIn ? "good" : "bad"),
    tile("Running", s.open.length, "now"),
    tile("Requests", integer.format(sum.requests), integer.format(hour) + " in the last hour"),
    tile("Errors", integer.format(sum.failed_requests), percent(sum.failed_requests, sum.requests)),
    tile("Tokens", short.format(sum.input + sum.output),
      sum.input ? percent(sum.cached, sum.input) + " of input cached" : ""));
}
function limit(w, now) {
  const left = w.reset_at - now, over = w.reset_at && left <= 0, used = over ? 0 : w.used_percent;
  const minutes = w.window_minutes || 0, fill = el("div", used >= 90 ? "bad" : used >= 75 ? "warn" : "");
  fill.style.width = Math.min(used, 100) + "%";
  const title = !minutes ? "window" : minutes % 1440 ? span(minutes * 60).replace(" 0 min", "") :
    minutes / 1440 + " d";
  const when = w.reset_at && clock(w.reset_at, near(left));
  const reset = !when ? "" : over ? "reset at " + when : "resets " + when + ", in " + span(left);
  return el("div", "gap", el("div", "pair", title, el("b", "", Math.round(used) + " %")),
    el("div", "bar", fill), el("small", "soft", reset));
}
function plan(s) {
  const limits = s.rate_limits, balance = limits.credits && limits.credits.balance;
  const parts = [limits.primary, limits.secondary].filter(Boolean).map(w => limit(w, s.now));
  const notes = [limits.plan_type && "plan " + limits.plan_type, balance && "credits " + balance,
    limits.seen && "as of " + span(Math.max(0, s.now - limits.seen)) + " ago"];
  if (!parts.length) parts.push(el("p", "soft", "The limits appear after upstream's first reply."));
  put("plan", ...parts, el("small", "soft", notes.filter(Boolean).join(" · ")));
}
function shape(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  node.append(...children);
  return node;
}
function plot(title, minutes, column, errors) {
  const values = minutes.map(minute => minute[column]), top = Math.max(...values), scale = 100 / (top || 1);
  const bar = (i, height, look, ...tip) =>
    shape("rect", {x: i * 10, y: 100 - height, width: 8, height, "class": look}, ...tip);
  const bars = minutes.flatMap((minute, i) => {
    const failed = errors ? minute.errors : 0, suffix = failed ? ", errors " + failed : "";
    const tip = shape("title", {}, clock(minute.time, true) + ": " + short.format(values[i]) + suffix);
    return [bar(i, values[i] * scale, ""), bar(i, failed * scale, "err"), bar(i, 100, "hit", tip)];
  });
  const sum = short.format(values.reduce((a, b) => a + b, 0)), peak = ", peak " + short.format(top);
  return el("div", "gap", el("div", "pair", title, el("small", "soft", sum + peak + " per minute")),
    shape("svg", {viewBox: "0 0 600 100", preserveAspectRatio: "none"}, ...bars));
}
function catalog(c) {
  const aliases = Object.entries(c.aliases).map(([name, slug]) => name + " → " + slug);
  put("catalog", el("p", "", c.models.join(", ")), el("p", "", aliases.join(", ")));
}
function render(s) {
  const count = name => row => integer.format(row[name]), tokens = name => row => short.format(row[name]);
  const who = row => brief(row.key || row.client || "–", 26);
  const used = row => row.usage.input === undefined ? "" :
    short.format(row.usage.input) + " → " + short.format(row.usage.output || 0);
  put("version", s.version + ", up " + span(s.uptime));
  tiles(s);
  plan(s);
  put("hour", plot("Requests", s.hour, "requests", true), plot("Tokens", s.hour, "tokens", false),
    el("small", "pair soft", el("span", "", clock(s.hour[0].time, true)), el("span", "", "now")));
  table("open", "No request is running.", s.open, ["Model", "any", model], ["Client", "", who],
    ["Age", "n", row => span(row.age) + (row.waiting ? " waiting" : "")], ["Events", "n", count("events")]);
  table("clients", "No clients yet.", s.clients, ["Client", "any", who], ["Requests", "n", count("requests")],
    ["Errors", "n", count("failed_requests")], ["In", "n", tokens("input")],
    ["Cached", "n wide", row => percent(row.cached, row.input)], ["Out", "n", tokens("output")]);
  table("recent", "No requests yet.", s.recent, ["Time", "t", row => clock(row.time, near(s.now - row.time))],
    ["Client", "who any", who], ["Model", "model any", model], ["Path", "wide any", row => brief(row.path)],
    ["First byte", "n wide", row => row.first_byte === null ? "" : span(row.first_byte)],
    ["Total", "n", row => span(row.total)], ["Tokens", "n wide", used], ["Result", "", result]);
  table("errors", "No errors.", s.errors, ["Source", "", row => row.by], ["Code", "any", row => row.code],
    ["Count", "n", count("count")]);
  catalog(s.catalog);
  put("client_config", s.client_config);
}

function ask(why) {
  asking = Boolean(why);
  put("why", why);
  $("ask").hidden = !asking;
  if (asking) $("key").focus();
}
async function refresh() {
  const headers = key ? {authorization: "Bearer " + key} : {};
  const reply = await fetch("status", {headers, cache: "no-store", signal: AbortSignal.timeout(10000)});
  if (reply.status === 401) return ask(key ? "Unknown key. Enter another one." : "Enter this bridge's key.");
  if (!reply.ok) throw new Error("HTTP status " + reply.status);
  render(await reply.json());
  $("main").hidden = false;
}
async function tick() {
  let trouble = "";
  clearTimeout(timer);
  if (!asking && !document.hidden) {
    await refresh().catch(error => { trouble = "no reply: " + error.message; });
  }
  put("state", trouble || (asking ? "waiting for the key" : "live"));
  $("state").className = trouble ? "bad" : "soft";
  $("main").className = trouble || asking ? "stale" : "";
  timer = setTimeout(tick, 2000);
}
$("door").addEventListener("submit", event => {
  event.preventDefault();
  key = $("key").value.trim();
  if (!/^[!-~]+$/.test(key)) return ask("A key has only visible ASCII characters, no spaces.");
  try { sessionStorage.setItem(STORED, key); } catch { /* as above */ }
  ask("");
  tick();
});
$("copy").addEventListener("click", () => {  // navigator.clipboard exists only on https pages
  getSelection().selectAllChildren($("client_config"));
  document.execCommand("copy");
});
tick();
"""
PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>qoo-bridge</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{PAGE_STYLE}</style></head><body>
<header><h1>qoo-bridge</h1><span id="version" class="soft"></span><span id="state"></span></header>
<noscript>This page needs JavaScript to show the values of /status.</noscript>
<section id="ask" hidden><h2 id="why"></h2><form id="door">
<input id="key" type="password" aria-labelledby="why" autocomplete="off"><button>Show</button>
</form></section>
<main id="main" hidden>
<section id="tiles" class="all"></section>
<section><h2>Plan</h2><div id="plan"></div></section>
<section><h2>Last hour</h2><div id="hour"></div></section>
<section><h2>Running</h2><div id="open"></div></section>
<section><h2>Clients</h2><div id="clients"></div></section>
<section class="all"><h2>Recent requests</h2><div id="recent"></div></section>
<section><h2>Errors</h2><div id="errors"></div></section>
<section><h2>Models</h2><div id="catalog"></div></section>
<section class="all"><h2 class="pair">Configuration of a new client <button id="copy">Copy</button></h2>
<pre id="client_config"></pre></section>
</main><script>{PAGE_SCRIPT}</script></body></html>
"""


@functools.lru_cache(maxsize=1)
def page_csp() -> str:
    """Return the page's Content-Security-Policy: only its own style and script (by hash), and /status."""
    digests = (hashlib.sha256(text.encode()).digest() for text in (PAGE_STYLE, PAGE_SCRIPT))
    style, script = (base64.b64encode(digest).decode() for digest in digests)
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


# == 37 client config =========================================================
# What a person pastes or saves on another machine. Pure: texts in, text out.

PROFILE = "local_lan"
DEFAULT_MODEL = OPTION["alias"].default.partition("=")[0]
PROFILE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # a profile is a file's name and a word of a shell command
LITELLM_PORT = 4000  # where run.sh starts LiteLLM, always in plain http
MAX_OUTPUT_TOKENS = 128_000  # of all GPT-5 and GPT-6 models; the catalogue does not say
CONTEXT_WINDOW = 272_000  # tokens; used where no catalogue entry says more

# The keys of the file come before the table's header. Keys below the header would belong to the table, and
# Codex would send the prompt to OpenAI without a word (WIRE 7).
CODEX_CONFIG = """\
model = {model}
model_provider = "lan"
approval_policy = "never"

[model_providers.lan]
name = "LAN ChatGPT Bridge"
base_url = {url}
wire_api = "responses"
requires_openai_auth = false
stream_idle_timeout_ms = 20000
supports_websockets = true
model_catalog_url = {catalog_url}
# Any word in this header has Codex offer web search and images. The bridge keeps it to itself.
http_headers = {{ "x-openai-actor-authorization" = "lan" }}
{auth}

# Save this file on the client. The name of the file is the name of the profile:
#   {save}
# (for a ~/.qoo home: ~/.qoo/{profile}.config.toml)
# Then try it. Outside a Git repository, add --skip-git-repo-check:
#   codex exec --profile {profile} "say hello to me then run 1 shell cmd"
# A Codex older than 0.134 does not read this file. Put the table into ~/.codex/config.toml, and its three
# first lines below it, under the header [profiles.{profile}].
"""
OPENAI_CONFIG = """\
export OPENAI_BASE_URL={shell_url}
export OPENAI_API_KEY={shell_key}
# model: {model}
"""
# `openai/NAME` works for both of LiteLLM's own endpoints, chat completions and responses.
LITELLM_MODEL = """\
  - model_name: {name}
    litellm_params:
      model: {model}
      api_base: {url}
      api_key: {key}
    model_info:
      supports_reasoning: {reasoning}
      supports_vision: {vision}
      supports_function_calling: true
      max_input_tokens: {max_input}
      max_output_tokens: {max_output}
"""
# A model has only one deployment here: a cooldown after one client's error would lock every client out, and a
# retry would repeat a request that the bridge has already repaired and repeated where that helps.
LITELLM_ROUTER = """\
router_settings:
  disable_cooldowns: true
  num_retries: 0
"""
# Claude Code joins `/v1/messages` to the base URL.
CLAUDE_CONFIG = """\
# Claude Code asks LiteLLM (port {port}), which ./run.sh starts beside the bridge; not the bridge itself.
export ANTHROPIC_BASE_URL={shell_litellm}
export ANTHROPIC_AUTH_TOKEN={shell_token}{token_hint}
export ANTHROPIC_MODEL={shell_model}
export CLAUDE_CODE_MAX_CONTEXT_TOKENS={tokens}  # else Claude Code assumes 1,000,000 for this name
"""
CURL_KEY = '-H "authorization: Bearer $QOO_BRIDGE_KEY" '  # curl's option for a client's key
CURL_CONFIG = """\
curl {shell_responses} -H 'content-type: application/json' \\
  {header}-d {shell_body}
"""
CLIENT_CONFIGS = {  # what is served and printed, and what it is
    "codex": "one file for Codex CLI",
    "openai": "two variables for OpenAI's SDKs",
    "litellm": "a litellm.yaml for a LiteLLM on another machine",
    "claude": "variables for Claude Code, through LiteLLM",
    "curl": "a request to try",
}
UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")  # not raw in YAML or TOML, but raw in JSON
SURROGATE = re.compile("[\ud800-\udfff]")


def quoted(text: str) -> str:
    """Return a text in double quotes, as TOML, YAML and JSON all read it.

    JSON's own ASCII form will not do: TOML refuses its surrogate pairs, and YAML reads two characters.
    """
    plain = json.dumps(SURROGATE.sub("\ufffd", text), ensure_ascii=False)
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", plain)


def shell_word(text: str) -> str:
    """Return a text in double quotes, as POSIX shells read it literally."""
    return '"' + re.sub(r'(["$`\\])', r"\\\1", one_line(text)) + '"'


def codex_save_command(url: str, locked: bool, model: str, profile: str) -> str:
    """Return the one command of a client: fetch the file of Codex, and save it under the profile's name."""
    query = []
    if profile != PROFILE:
        query.append(("profile", profile))
    if model != DEFAULT_MODEL:
        query.append(("model", SURROGATE.sub("\ufffd", model)))
    target = urllib.parse.quote(url, safe=":/[]%") + "/client-config/codex"
    if query:
        target = f"'{target}?{urllib.parse.urlencode(query)}'"
    key = ""
    if locked:
        key = CURL_KEY
    return f"curl -fsS --create-dirs {key}{target} -o ~/.codex/{profile}.config.toml"


def codex_config(url: str, locked: bool, model: str, profile: str) -> str:
    """Return the one file of Codex.

    While the bridge is open, Codex gets any literal token: an unset env_key variable is an error (WIRE 7).
    """
    auth = 'experimental_bearer_token = "lan"'
    if locked:
        auth = 'env_key = "QOO_BRIDGE_KEY"  # export this variable: the key that you were given'
    return CODEX_CONFIG.format(
        model=quoted(model), url=quoted(url), catalog_url=quoted(f"{url}/models"), auth=auth, profile=profile,
        save=codex_save_command(url, locked, model, profile))


def context_window(entry: Mapping[str, Any]) -> int:
    """Return how many tokens a model takes, by its entry of the catalogue."""
    tokens = entry.get("context_window")
    if type(tokens) is int and tokens > 0:
        return tokens
    return CONTEXT_WINDOW


def litellm_model(name: str, model: str, url: str, key: str, entry: Mapping[str, Any]) -> str:
    """Return a model of litellm.yaml; LiteLLM refuses `thinking` for names whose model_info lacks it.

    `entry` is the model's entry of the catalogue; {} stands for a present model.
    """
    modalities = entry.get("input_modalities")
    vision = not isinstance(modalities, list) or "image" in modalities
    reasoning = entry.get("supported_reasoning_levels") != []
    return LITELLM_MODEL.format(
        name=quoted(name), model=quoted(f"openai/{model}"), url=quoted(url), key=quoted(key),
        vision=json.dumps(vision), reasoning=json.dumps(reasoning), max_input=context_window(entry),
        max_output=MAX_OUTPUT_TOKENS)


def litellm_yaml(models: Iterable[tuple[str, Mapping[str, Any]]], first: str, url: str, key: str) -> str:
    """Return model_list and router_settings of a litellm.yaml. `models` are (name, catalogue entry).

    The entry `claude-*` sends Claude Code's own model names to the model `first`.
    """
    listed = dict(models)
    blocks = [litellm_model(name, name, url, key, entry) for name, entry in listed.items()]
    blocks.append(litellm_model("claude-*", first, url, key, listed.get(first, {})))
    return "model_list:\n" + "".join(blocks) + LITELLM_ROUTER


def claude_config(url: str, locked: bool, model: str, entry: Mapping[str, Any]) -> str:
    """Return the variables of Claude Code, for the LiteLLM beside the bridge.

    Claude Code 2.1 takes a name that it does not know for a model with a context window of 1,000,000 tokens.
    """
    host = re.sub(r":[0-9]*$", "", urllib.parse.urlsplit(url).netloc)
    token, hint = "lan", ""
    if locked:
        token, hint = "$LITELLM_KEY", "  # master_key in litellm.yaml on the bridge's host"
    return CLAUDE_CONFIG.format(
        port=LITELLM_PORT, shell_litellm=shell_word(f"http://{host}:{LITELLM_PORT}"),
        shell_token=f'"{token}"', token_hint=hint, shell_model=shell_word(model),
        tokens=context_window(entry))


def curl_config(url: str, locked: bool, model: str) -> str:
    """Return a request to try."""
    body = '{"model": ' + quoted(model) + ', "input": "say hello", "stream": false}'
    header = ""
    if locked:
        header = CURL_KEY
    responses = f"{url}/responses"
    if re.fullmatch(r"[A-Za-z0-9:/.\[\]_-]+", responses) is None:
        responses = shell_word(responses)
    return CURL_CONFIG.format(shell_responses=responses, header=header,
                              shell_body="'" + body.replace("'", "'\\''") + "'")


def openai_config(url: str, locked: bool, model: str) -> str:
    """Return the variables of OpenAI's SDKs."""
    key = '"lan"'
    if locked:
        key = '"$QOO_BRIDGE_KEY"'
    return OPENAI_CONFIG.format(shell_url=shell_word(url), shell_key=key, model=one_line(model))


def client_config(client: str, url: str, locked: bool, model: str, profile: str = PROFILE,
                  entry: Mapping[str, Any] | None = None) -> str:
    """Return the configuration for another machine, for one of CLIENT_CONFIGS.

    `entry` is the model's entry of the catalogue, if there is one.
    """
    if client == "codex":
        return codex_config(url, locked, model, profile)
    if client == "litellm":
        key = "lan"
        if locked:
            key = "os.environ/QOO_BRIDGE_KEY"  # LiteLLM reads variables only in this notation
        return litellm_yaml([(model, entry or {})], model, url, key)
    if client == "claude":
        return claude_config(url, locked, model, entry or {})
    if client == "openai":
        return openai_config(url, locked, model)
    return curl_config(url, locked, model)


def client_config_list(url: str) -> str:
    """Return what /v1/client-config answers: each address and what it gives, one a line."""
    return "".join(f"{url}/client-config/{name:<8} {what}\n" for name, what in CLIENT_CONFIGS.items())


def default_model(config: Config) -> str:
    """Return the model for a client's configuration: the first alias."""
    return next(iter(config.alias))


# == 38 routes ================================================================
# Path and method -> handler; and one request from its head to its error.

class Bridge:
    """One running bridge with all its parts; `respond` answers one request."""

    on_fault: Callable[[BaseException], None] | None = None  # tests collect unhandled exceptions here

    def __init__(self, config: Config) -> None:
        self.config = config
        self.telemetry = Telemetry()
        self.upstream = Upstream(config.connect_timeout, config.idle_timeout, self.telemetry.count)
        self.identity = Identity(config.originator, config.client_version)
        self.account = Account(config, self.upstream, self.identity.headers(),
                               lambda: self.telemetry.count("refreshes"))
        self.catalog = Catalog(self._fetch_models, config.alias, config.client_version)
        self.turns = Turns(config, self.account, self.catalog, self.telemetry)
        hosts = (socket.gethostname(), *config.allow_host)
        self.policy = Policy(config.allow, config.allow_origin, tuple(map(str.lower, hosts)))
        self.key_ring = KeyRing(config.api_key, config.api_key_file)
        self.key_queue = KeyQueue(config.limit)
        self.routes = self._routes()
        self.routes_by_id = {"/models/": self.get_model, "/responses/": self.get_response}

    def _routes(self) -> dict[str, dict[str, Action]]:
        """Return the routes: path -> method -> handler. HEAD uses GET's handler; every path has OPTIONS."""
        serve, accept = self.turns.serve, accept_websocket
        return {
            "/responses": {"POST": functools.partial(serve, ResponsesApi),
                           "GET": functools.partial(accept, self.turns, self.key_queue)},
            "/responses/input_tokens": {"POST": self.turns.count_tokens},
            "/chat/completions": {"POST": functools.partial(serve, ChatApi)},
            "/completions": {"POST": functools.partial(serve, CompletionApi)},
            "/models": {"GET": self.get_models},
            "/healthz": {"GET": self.get_health},
            "/status": {"GET": self.get_status},
            "/metrics": {"GET": self.get_metrics},
            "/": {"GET": self.get_page},
            "/client-config": {"GET": self.get_client_configs},
            **{f"/client-config/{client}": {"GET": self.get_client_config} for client in CLIENT_CONFIGS},
            **{path: {method: self.turns.pass_on} for path, (method, _) in SIDE_ROUTES.items()},
        }

    # -- one request

    def respond(self, exchange: Exchange) -> None:
        """Answer one request; turn every failure into a response, unless a response has already begun."""
        record = exchange.record
        try:
            action = self._route(exchange)
            key = ""
            if exchange.head.method == "POST":
                key = exchange.client.key
            record.waiting = True
            with self.key_queue.slot(key, exchange.connection.raise_if_closed):
                record.waiting = False
                action(exchange)
        except ClientLeft as exc:
            record.end = str(exc)
            exchange.abort()
        except BridgeError as exc:
            exchange.release_body(self.turns.budget)  # before the client knows that it may try again
            self._fail(exchange, exc)
        except Exception as exc:  # after any exception the client gets a response and the server goes on
            log.exception("unhandled exception in request %s", record.id)
            where = f"see request {record.id} in bridge.log"
            self._fail(exchange, BridgeError(f"internal error ({type(exc).__name__}), {where}"))
            if self.on_fault is not None:
                self.on_fault(exc)
        finally:
            exchange.release_body(self.turns.budget)

    def _fail(self, exchange: Exchange, error: BridgeError) -> None:
        """Answer with an error; leave a stream that has begun without its end, to show the client the cut."""
        if exchange.started:
            exchange.record.fail(error, "cut")
            exchange.abort()
            return
        exchange.record.fail(error)
        exchange.record.asks_for_key = isinstance(error, MissingKey) and exchange.path == "/status"
        try:
            exchange.send_error(error)
        except ClientLeft:
            exchange.abort()

    def _route(self, exchange: Exchange) -> Action:
        """Check the client's access, and return the request's handler.

        Raises Forbidden, InvalidKey, NotFound, MethodNotAllowed.
        """
        headers, method = exchange.head.headers, exchange.head.method
        preflight = method == "OPTIONS" and "access-control-request-method" in headers
        check_browser(method, headers, self.policy)
        if "origin" in headers:
            exchange.extra_headers.update(cors_headers(headers, self.policy, preflight))
        path = exchange.path
        methods = self._methods(path)
        if self.key_ring.locked and not preflight and path not in PUBLIC:
            exchange.identify(check_key(headers, self.key_ring.keys()))
        if methods is None:
            raise NotFound(f"no such endpoint: {exchange.path_as_sent!r}{self._hint(path)}")
        if method == "OPTIONS":
            return self.options
        action = methods.get("GET" if method == "HEAD" else method)
        if action is None:
            raise MethodNotAllowed(f"{path} does not support {method}: use {', '.join(methods)}",
                                   allow=allowed_methods(methods))
        return action

    def _hint(self, path: str) -> str:
        """Return what to do about an unknown path."""
        if path.startswith("/client-config/"):
            return f"; there are {', '.join(CLIENT_CONFIGS)}"
        if path == "/messages" or path.startswith("/messages/"):
            return "; Claude clients use LiteLLM on port 4000, see /v1/client-config/claude"
        return ""

    def _methods(self, path: str) -> dict[str, Action] | None:
        """Return a path's handlers by method; None for an unknown path."""
        for prefix, action in self.routes_by_id.items():
            if path.startswith(prefix) and "/" not in path[len(prefix):]:
                return self.routes.get(path) or {"GET": action}
        return self.routes.get(path)

    def options(self, exchange: Exchange) -> None:
        """Answer OPTIONS, including a browser's preflight."""
        methods = self._methods(exchange.path) or {}
        exchange.send_response(204, {"allow": allowed_methods(methods)}, b"")

    # -- responses and models

    def get_response(self, exchange: Exchange) -> None:
        """Answer with a stored response."""
        name = exchange.path[len("/responses/"):]
        response = self.turns.store.get(exchange.client.owner, "response", name)
        if response is None:
            raise NotFound(f"no such response: {name!r} (this bridge keeps only the last ones, in memory)")
        exchange.send_response(200, {"content-type": "application/json"}, response)

    def _fetch_models(self, version: str, etag: str) -> BufferedReply:
        """Request the model list from upstream, as a Codex of that version does."""
        condition = {}
        if etag:
            condition = {"if-none-match": etag}
        path = f"/models?client_version={urllib.parse.quote(version, safe='')}"
        return self.account.get(path, {**condition, "version": version})

    def get_models(self, exchange: Exchange) -> None:
        """Answer with the model list: in Codex's shape for a `client_version` query, else in OpenAI's."""
        query = urllib.parse.parse_qs(exchange.query)
        version = query.get("client_version", [""])[0]
        if version and not re.fullmatch(r"[0-9A-Za-z.-]{1,40}", version):
            raise InvalidRequest(f"client_version must be a version, not {version[:40]!r}", "client_version")
        models = self.catalog.require(version)
        if version:
            body, etag = self.catalog.codex_list(version, models)
        else:
            body = json_bytes({"object": "list", "data": self.catalog.openai_list(models)})
            etag = entity_tag(body)
        if exchange.head.headers.get("if-none-match") == etag:
            exchange.send_response(304, {"etag": etag}, b"")
        else:
            exchange.send_response(200, {"content-type": "application/json", "etag": etag}, body)

    def get_model(self, exchange: Exchange) -> None:
        """Answer with one model or alias in OpenAI's shape."""
        name = exchange.path[len("/models/"):]
        models, wanted = self.catalog.require(), urllib.parse.unquote(name)
        listed = self.catalog.openai_list(models)
        found = next((model for model in listed if model["id"] == wanted), None)
        if found is None and self.catalog.resolve(wanted, models).effort:  # an effort in the name
            found = {**listed[0], "id": wanted}
        if found is not None:
            return exchange.send_json(200, found)
        raise NotFound(f"no such model: {name!r} (see /v1/models)")

    # -- about the bridge

    def get_health(self, exchange: Exchange) -> None:
        """Answer that the bridge is alive; say nothing more, because this path needs no key."""
        exchange.send_json(200, {"status": "ok", "version": __version__})

    def get_client_config(self, exchange: Exchange) -> None:
        """Answer with a client's configuration, as text."""
        send_text(exchange, self._client_config(exchange.path.rpartition("/")[2], exchange))

    def get_client_configs(self, exchange: Exchange) -> None:
        """Answer with the list of configurations, as text."""
        send_text(exchange, client_config_list(self._base_url(exchange)))

    def _client_config(self, client: str, exchange: Exchange) -> str:
        """Return a client's configuration; `?model=` and `?profile=` choose others than the defaults."""
        query = urllib.parse.parse_qs(exchange.query)
        default = default_model(self.config)
        model = query.get("model", [default])[0]
        profile = query.get("profile", [PROFILE])[0]
        if not PROFILE_NAME.fullmatch(profile):
            raise InvalidRequest("profile must be 1 to 64 letters, digits, - or _", "profile")
        models, entry = self.catalog.cached(self.catalog.version), None
        if models:
            entry = models.entries.get(self.catalog.resolve(model, models)[0])
        return client_config(client, self._base_url(exchange), self.key_ring.locked, model, profile, entry)

    def _base_url(self, exchange: Exchange) -> str:
        """Return the base URL that this client used to reach the bridge."""
        host, port = exchange.connection.sock.getsockname()[:2]
        own = exchange.head.headers.get("host") or authority(host, port)  # HTTP/1.0 may lack a Host
        scheme = "http"
        if self.config.tls_cert:
            scheme = "https"
        return f"{scheme}://{own}/v1"

    def status(self) -> dict[str, Any]:
        """Return the values of the status page, without any secret."""
        now = time.time()
        snapshot = self.telemetry.snapshot(now)
        try:
            sign_in = self.account.sign_in()
            left = None
            if sign_in.expires:
                left = int(sign_in.expires - now)
            snapshot["sign_in"] = {"state": "ok", "plan": sign_in.plan, "expires_in": left}
        except NotSignedIn as exc:
            snapshot["sign_in"] = {"state": "not signed in", "message": exc.message}
        models = self.catalog.get()
        snapshot["catalog"] = {
            "models": [entry["slug"] for entry in visible_models(models)] if models else [],
            "aliases": self.catalog.aliases(models), "refused_aliases": self.catalog.refused,
        }
        return snapshot

    def get_status(self, exchange: Exchange) -> None:
        """Answer with the status, for programs and for the page."""
        status = {**self.status(), "client_config": self._client_config("codex", exchange)}
        exchange.send_json(200, status, {"cache-control": "no-store"})

    def get_metrics(self, exchange: Exchange) -> None:
        """Answer with the counters in Prometheus' text format."""
        text = metrics_text(self.telemetry.snapshot(time.time())).encode("utf-8")
        exchange.send_response(200, {"content-type": "text/plain; version=0.0.4; charset=utf-8"}, text)

    def get_page(self, exchange: Exchange) -> None:
        """Answer with the status page; at the base URL, where a person may look, with a sentence."""
        if exchange.path_as_sent.startswith("/v1"):
            url = self._base_url(exchange)
            send_text(exchange, f"{url} is the base URL for OpenAI clients.\n{url}/client-config lists what "
                                f"to set up on them.\n{url[:-2]} is the status page.\n")
            return
        exchange.send_response(200, {
            "content-type": "text/html; charset=utf-8", "content-security-policy": page_csp(),
            "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
            "cache-control": "no-store",
        }, PAGE.encode())

    # -- beside the requests

    def reread(self) -> None:
        """Reread the key file and the sign-in at their next use, even if they look unchanged."""
        self.key_ring.reread()
        self.account.reread()

    def tidy(self) -> None:
        """Do what is due every few seconds: close dead connections, write what could not be written."""
        self.upstream.prune()
        with contextlib.suppress(NotSignedIn):
            self.account.sign_in()

    def warm_up(self, stop: threading.Event) -> None:
        """Wait for a sign-in; then open a connection and fetch routing and model list, before any request."""
        return_large_blocks()
        while True:
            try:
                self.account.warm_up()
            except NotSignedIn:
                if stop.wait(1):
                    return
            else:
                self.catalog.refresh_soon()
                return


Action = Callable[[Exchange], None]


def send_text(exchange: Exchange, text: str) -> None:
    """Answer with a text for a person."""
    exchange.send_response(200, {"content-type": "text/plain; charset=utf-8"}, text.encode("utf-8"))


def allowed_methods(methods: Iterable[str]) -> str:
    """Return the Allow header's value for a route."""
    listed = list(methods)
    return ", ".join([*listed, *(["HEAD"] if "GET" in listed else []), "OPTIONS"])


def accept_websocket(turns: Turns, key_queue: KeyQueue, exchange: Exchange) -> None:
    """Answer a WebSocket handshake after the backend has accepted ours; set `exchange.upgraded`.

    Raises BridgeError; after a 426 Codex falls back to HTTP at once (WIRE 6).
    """
    headers = exchange.head.headers
    if exchange.head.method != "GET":
        raise MethodNotAllowed("/responses does not support HEAD; use POST", allow="POST")
    if not is_upgrade(headers) or not exchange.head.minor:  # also where a front took `Upgrade` away
        raise UpgradeRequired("GET /responses requires a WebSocket handshake; use POST")
    if (exchange.client.owner, exchange.client_headers.session) in turns.large_sessions:
        raise UpgradeRequired("this session's messages are too large for upstream's WebSocket; use POST")
    if headers.get("sec-websocket-version") != WEBSOCKET_VERSION:
        raise UpgradeRequired("unsupported WebSocket version: use version 13")
    if not valid_key(headers.get("sec-websocket-key", "")):
        raise InvalidRequest("Sec-WebSocket-Key must be 16 bytes in base64")
    reply = open_upstream_websocket(turns, exchange)
    try:
        turns.telemetry.discard(exchange.record)  # each response.create has its own record
        accept = accept_key(headers["sec-websocket-key"])
        exchange.start_websocket(accept, turns.client_headers(reply, exchange))
    except BaseException:
        reply.close()
        raise
    exchange.upgraded = WebSocketRelay(turns, key_queue, exchange, reply).run


def open_upstream_websocket(turns: Turns, exchange: Exchange) -> Reply:
    """Do the WebSocket handshake with upstream. Raises its refusal; UpgradeRequired for 404, 405, 501."""
    client = exchange.client_headers
    key = base64.b64encode(os.urandom(16)).decode("ascii")
    exchange.conversation = turns.handshake_name(exchange)
    headers = upstream_headers(exchange.head.headers, client, turns.identity, exchange.conversation)
    headers.update({"openai-beta": WEBSOCKET_BETA, "connection": "Upgrade", "upgrade": "websocket",
                    "sec-websocket-version": WEBSOCKET_VERSION, "sec-websocket-key": key})
    reply = turns.account.open("GET", "/responses", headers, b"", exchange.connection)
    turns.observe_headers(reply)
    if reply.status in (404, 405, 501):
        reply.close()
        raise UpgradeRequired("upstream does not support WebSockets; use POST")
    if reply.status != 101:
        raise turns.read_refusal(reply, exchange)
    accepted = is_upgrade(reply.headers) and reply.headers.get("sec-websocket-accept") == accept_key(key)
    if not accepted or "sec-websocket-extensions" in reply.headers:
        reply.close()
        raise BadUpstream("upstream sent an invalid WebSocket handshake")
    return reply


# == 39 server ================================================================
# Threads, their limit, and a shutdown that lets running streams end.

class Handler(socketserver.BaseRequestHandler):
    """One client connection in its own thread: request after request, until either side closes it."""

    server: Server
    client_address: tuple[Any, ...]

    def handle(self) -> None:
        """Serve the connection."""
        self.accepted = self.request
        with contextlib.suppress(OSError):
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.server.tls is not None and not self._handshake(self.server.tls):
            return
        connection = Connection(self.request)
        try:
            while not self.server.stopping.is_set():
                exchange = self._read_request(connection)
                if exchange is None or not self._answer(connection, exchange):
                    break
        except (ClientLeft, OSError, EOFError) as exc:
            log.debug("client connection ended: %s", exc)  # no request is active: nothing to answer
        finally:
            connection.close()

    def _handshake(self, context: ssl.SSLContext) -> bool:
        """Do the TLS handshake in the connection's own thread; tell whether the handshake succeeded."""
        self.server.set_idle(self, True)  # until its request has come, it gives way to others
        started = time.monotonic()
        try:
            self.request.settimeout(HEAD_TIMEOUT)
            begun = self.request.recv(16, socket.MSG_PEEK)
            if re.match(rb"[A-Z]{3,8} ", begun):
                log.warning("%s sent plain http: this bridge serves https", self.client_address[0])
                self._refuse(Connection(self.request), MalformedHttp(
                    "this bridge serves https only: use https://"), begun, started)
                return False
            self.request.settimeout(max(0.1, started + HEAD_TIMEOUT - time.monotonic()))
            self.request = context.wrap_socket(self.request, server_side=True)
        except (OSError, ValueError) as exc:
            log.debug("TLS handshake with %s failed: %s", self.client_address[0], describe_error(exc))
            return False
        return True

    def _read_request(self, connection: Connection) -> Exchange | None:
        """Read a request's head, and answer what is invalid; None when the connection does not go on."""
        self.server.set_idle(self, True)
        if not connection.wait(IDLE_CLIENT):
            return None
        started, head = time.monotonic(), b""
        error: MalformedHttp
        try:
            received = connection.read_head(started + HEAD_TIMEOUT)
            if received == b"":
                received = connection.read_head(started + HEAD_TIMEOUT)  # behind two empty lines
            if received is None:
                return None  # the client has ended the connection
            head = received
            if not self.server.set_idle(self, False):
                return None  # it has just given way to another connection
            client = Client(str(self.client_address[0]))
            return Exchange(connection, parse_request(head), client, Record(client.address, started))
        except TimeoutError:
            error = SlowRequest(f"the head did not come within {HEAD_TIMEOUT} s")
        except MalformedHttp as exc:
            error = exc
        self._refuse(connection, error, head or connection.buffer, started)
        return None

    def _answer(self, connection: Connection, exchange: Exchange) -> bool:
        """Answer a request; tell whether the connection goes on."""
        self.server.bridge.telemetry.begin(exchange.record)
        self.server.bridge.respond(exchange)
        if exchange.upgraded is not None:
            exchange.upgraded(functools.partial(self.server.set_idle, self), self.server.log_request)
            linger(connection)
            return False
        self.server.log_request(exchange.record)
        if exchange.persists():
            return True
        if exchange.state is not State.NEW:
            linger(connection)
        return False

    def _refuse(self, connection: Connection, error: MalformedHttp, head: bytes, started: float) -> None:
        """Answer invalid HTTP, and end the connection. A response to HEAD has no body."""
        record, head = Record(str(self.client_address[0]), started), head.lstrip(b"\r\n")
        match = REQUEST_LINE.match(head.decode("latin-1"))
        if match:
            record.method, record.path = match[1], match[2].partition("?")[0]
        response, body = error_response(error, {"x-qoo-bridge-id": record.id, "connection": "close"})
        record.status = error.status
        record.fail(error)
        with contextlib.suppress(OSError):
            connection.send(response if head.startswith(b"HEAD ") else response + body, WRITE_TIMEOUT)
        self.server.log_request(record)
        linger(connection)


def server_tls(config: Config) -> ssl.SSLContext | None:
    """Return the server's TLS context; None without a certificate. Raises UsageError."""
    if not config.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslsocket_class = TlsSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except OSError as exc:
        raise UsageError(f"--tls-cert, --tls-key: {describe_error(exc)}") from exc
    return context


def raise_file_limit(connections: int) -> None:
    """Raise the limit of open files to two per connection, plus the pool; macOS starts with 256 in total."""
    try:
        import resource
    except ImportError:
        return  # Windows has no such limit
    files = 2 * connections + 2 * POOL_SIZE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        files = min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


class Server(http.server.ThreadingHTTPServer):
    """The listening server, with one thread per connection, up to --max-connections.

    `_lock` guards the connections. An idle connection is between two requests, or in a request's head.
    """

    request_queue_size = 1024  # connections that wait to be accepted
    allow_reuse_address = os.name != "nt"  # on Windows SO_REUSEADDR would let two programs share the port

    def __init__(self, config: Config) -> None:
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self.bridge = Bridge(config)
        self.stopping = threading.Event()
        self._limit = config.max_connections
        self._lock = threading.Condition()
        self._addresses: dict[Any, str] = {}  # accepted socket -> the client's address
        self._open: dict[Any, Any] = {}  # accepted socket -> socket in use (TLS wraps it); all connections
        self.tls = server_tls(config)
        self._waiting: dict[Any, Any] = {}  # handler -> its socket, for idle connections, oldest first
        super().__init__((config.host, config.port), Handler)

    def server_bind(self) -> None:
        """Bind the socket; `::` also gets IPv4. HTTPServer's method would look this host's name up in DNS."""
        if self.address_family == socket.AF_INET6 and hasattr(socket, "IPV6_V6ONLY"):
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; pause without a free file descriptor, or select() would spin on it."""
        try:
            return super().get_request()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                self.stopping.wait(0.1)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Refuse a client outside --allow or a connection beyond the limit, before a thread starts.

        An idle connection gives way, also one whose head is not complete. One machine leaves an eighth of
        the connections to others; loopback, where a front may serve all clients, may have all.
        """
        address = str(client_address[0])
        if not network_allows(address, self.bridge.policy.networks):
            return self._turn_away(request, Forbidden(f"{address} is not in this bridge's --allow"))
        with self._lock:
            greedy = address not in LOOPBACK and self._has_share(address)
            if greedy:
                greedy = not self._close_idle(address)
            elif len(self._open) >= self._limit:
                self._close_idle()
            if len(self._open) < self._limit and not greedy:
                self._open[request] = request
                self._addresses[request] = address
                return True
        if greedy:
            error = Overloaded("this machine has its share of all connections in use", retry_after=2)
            return self._turn_away(request, error)
        return self._turn_away(request, Overloaded("all connections are in use", retry_after=2))

    def _has_share(self, address: str) -> bool:
        """Tell whether a machine has its share of all connections. The caller holds `_lock`."""
        share = self._limit - max(1, self._limit // 8)
        return list(self._addresses.values()).count(address) >= max(1, share)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own; where the system gives none, answer 503."""
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            self._turn_away(request, Overloaded("this host starts no more threads", retry_after=2))
            self.shutdown_request(request)

    def _turn_away(self, request: Any, error: BridgeError) -> bool:
        """Answer with an error, without waiting for the request."""
        head, body = error_response(error, {"connection": "close"})
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(head + body)
            request.shutdown(socket.SHUT_WR)
            request.recv(READ_SIZE)  # closing with unread bytes would reset the connection
        return False

    def _close_idle(self, address: str = "") -> bool:
        """Close a machine's connection that has been idle longest, and tell whether there is one.

        By default it is the machine that has most of them. The caller holds `_lock`.
        """
        most = Counter(str(handler.client_address[0]) for handler in self._waiting).most_common(1)
        for handler, request in self._waiting.items():
            if str(handler.client_address[0]) == (address or most[0][0]):
                del self._waiting[handler]
                # The connection no longer counts, though its thread still runs.
                del self._open[handler.accepted], self._addresses[handler.accepted]
                shut_down(request)
                return True
        return False

    def set_idle(self, handler: Handler, idle: bool) -> bool:
        """Record whether a connection is idle; tell whether it was, and has not given way to another one."""
        with self._lock:
            if not idle:
                return self._waiting.pop(handler, None) is not None
            if self.stopping.is_set():
                shut_down(handler.request)
            elif handler.accepted in self._open:
                self._waiting[handler] = self._open[handler.accepted] = handler.request
            return True

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection that has ended, and close it."""
        with self._lock:
            self._open.pop(request, None)
            self._addresses.pop(request, None)
            for handler in [each for each in self._waiting if each.accepted is request]:
                del self._waiting[handler]
            self._lock.notify_all()
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an exception that could not become a response."""
        log.exception("unhandled exception in connection thread")
        fault = sys.exc_info()[1]
        if self.bridge.on_fault is not None and fault is not None:
            self.bridge.on_fault(fault)

    def log_request(self, record: Record) -> None:
        """Count a finished request, and write its log line."""
        level = logging.DEBUG
        if self.bridge.telemetry.finish(record, time.time()):
            level = logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "%s", log_line(record))

    def drain(self, seconds: float) -> bool:
        """Stop accepting, let running requests end for so long; tell whether all of them did.

        A refresh that is under way is waited for: its tokens must be written.
        """
        with self._lock:
            self.stopping.set()
        self.shutdown()
        self.socket.close()
        with self._lock:
            for request in self._waiting.values():
                shut_down(request)
            ended = self._lock.wait_for(lambda: not self._open, seconds)
            for request in self._open.values():
                shut_down(request)
        self.bridge.account.finish(REFRESH_SECONDS)
        self.bridge.upstream.close()
        return ended


###############################################################################
# E  commands
# May enter: what a person types. Only this part prints.
# May not leave: anything secret but a new key. What a command needs of the sign-in is a result of part B.
###############################################################################


# == 40 commands ==============================================================
# serve, client-config, new-key, login, litellm-config.

SWITCH_SECONDS = 0.0002  # that a thread may compute while others wait: an event goes first, a body can wait
EVERY_ADDRESS = ("0.0.0.0", "::", "")  # values of --host that listen on all of this host's addresses
NAME_SECONDS = 0.3  # for the system to find this host's own name


def base_url(config: Config, port: int) -> str:
    """Return the base URL that clients use."""
    host = config.host
    if config.host in EVERY_ADDRESS:
        host = lan_address()
    return f"{'https' if config.tls_cert else 'http'}://{authority(host, port)}/v1"


def greeting(server: Server, config: Config) -> str:
    """Return the start-up line: the bridge's address, the plan, and whether clients need a key."""
    try:
        plan = server.bridge.account.sign_in().plan
        account = f"signed in to ChatGPT{f' ({plan})' if plan else ''}"
    except NotSignedIn:
        account = f"not signed in yet: {sign_in_hint(config.auth_file)}"
    access = "open to the LAN: no key is set"
    if own_names_only(config.host):
        access = "only this host can use it"
    if server.bridge.key_ring.locked:
        access = "clients need a key"
    url, name = base_url(config, server.server_port), ""
    if config.host in EVERY_ADDRESS:
        name = local_name()
    if name:
        url = f"{url} and http{'s' * bool(config.tls_cert)}://{name}:{server.server_port}/v1"
    return f"qoo-bridge {__version__} on {url}, {account}, {access}"


def local_name() -> str:
    """Return this host's name by mDNS, such as `kitchen.local`; "" if the name does not lead here at once."""
    name = f"{socket.gethostname().partition('.')[0].lower()}.local"
    look_up = Background(lambda: resolve_host(name, 0))
    if look_up.done.wait(NAME_SECONDS):
        with contextlib.suppress(BridgeError):
            if lan_address() in look_up.result():
                return name
    return ""


def warn_of_access(server: Server, config: Config) -> None:
    """Warn about suspicious settings: an unreadable key file, a --limit without a key, a strange --allow."""
    try:
        keys = server.bridge.key_ring.keys()
    except BridgeError:
        keys = ()  # KeyRing has logged the reason
    for name in sorted(config.limit.keys() - {key.name for key in keys}):
        log.warning("--limit: no key has the name %s", name)
    address = lan_address()
    if not own_names_only(config.host) and not network_allows(address, config.allow):
        log.warning("this host's address %s is not in --allow: LAN clients will get 403", address)


def serve(config: Config, started: Callable[[Server], None] = lambda server: None) -> int:
    """Serve until SIGTERM or Ctrl-C; then give running streams DRAIN_SECONDS to end.

    A second signal ends the program at once.
    """
    set_up_log(config)
    raise_file_limit(config.max_connections)
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        server = Server(config)
    except OSError as exc:
        print(f"cannot listen on {config.host} port {config.port}: {exc.strerror or exc}"
              + ("; is a bridge running already?" if exc.errno == errno.EADDRINUSE else ""), file=sys.stderr)
        return 1
    stop = threading.Event()
    signals = catch_signals(server)
    threading.Thread(target=server.serve_forever, args=(0.5,), name="accept", daemon=True).start()
    threading.Thread(target=server.bridge.warm_up, args=(stop,), name="warm-up", daemon=True).start()
    log.info("%s", greeting(server, config))
    warn_of_access(server, config)
    started(server)
    tidy_at = time.monotonic() + TIDY_SECONDS
    while not signals:
        time.sleep(0.25)
        if time.monotonic() > tidy_at:
            tidy_at = time.monotonic() + TIDY_SECONDS
            server.bridge.tidy()
    stop.set()
    log.info("stopping; running streams have %d s to end", DRAIN_SECONDS)
    server.drain(DRAIN_SECONDS)
    return 0


def catch_signals(server: Server) -> list[int]:
    """Return a list that grows by each signal to stop; SIGHUP has the files read anew."""
    signals = stop_signals(lambda: True)
    hang_ups = getattr(signal, "SIGHUP", None)  # not on Windows
    had_terminal = has_terminal() and hang_ups and signal.getsignal(hang_ups) != signal.SIG_IGN  # else nohup

    def hang_up(number: int, _: Any) -> None:
        if had_terminal and not has_terminal():
            signals.append(number)  # the terminal was closed: nobody could stop this program any more
        server.bridge.reread()
        for handler in log.handlers:
            if isinstance(handler, Log):
                handler.look_again()

    if hang_ups:
        signal.signal(hang_ups, hang_up)
    return signals


def stop_signals(waits: Callable[[], bool]) -> list[int]:
    """Return a list that grows by each SIGTERM or Ctrl-C.

    Each raises KeyboardInterrupt, but the first one while `waits` returns true. It is not an Event: a signal
    handler that takes a lock can deadlock with itself.
    """
    signals: list[int] = []

    def stop(number: int, _: Any) -> None:
        signals.append(number)
        if len(signals) > 1 or not waits():
            raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return signals


class Command(NamedTuple):
    """One command of the command line."""

    name: str
    run: Callable[[Config, argparse.Namespace], int]
    help: str


def print_client_config(config: Config, words: argparse.Namespace) -> int:
    """Print a client's configuration, to paste on another machine."""
    client = words.words[0] if words.words else "codex"
    if client not in CLIENT_CONFIGS:
        raise UsageError(f"client-config: must be one of {', '.join(CLIENT_CONFIGS)}, not {client!r}")
    locked = KeyRing(config.api_key, config.api_key_file).locked
    model = words.model or default_model(config)
    profile = words.profile or PROFILE
    if not PROFILE_NAME.fullmatch(profile):
        raise UsageError("--profile: must be 1 to 64 letters, digits, - or _")
    print(client_config(client, base_url(config, config.port), locked, model, profile), end="")
    return 0


def new_key(config: Config, words: argparse.Namespace) -> int:
    """Generate a key; print its line for the key file and its line for the client."""
    if len(words.words) != 1:
        raise UsageError("new-key needs exactly one name: new-key NAME")
    if "=" in words.words[0]:
        raise UsageError("new-key: a name has no =")
    try:
        key = read_key(f"{words.words[0]}=qoo-{base64.urlsafe_b64encode(os.urandom(24)).decode('ascii')}")
    except ValueError as exc:
        raise UsageError(f"new-key: {exc}") from exc
    print(f"{key.name}={key.secret}")
    print("# Append the line above to the bridge's --api-key-file (chmod 600).\n"
          f"# On the client, run:\nexport QOO_BRIDGE_KEY={key.secret}", file=sys.stderr)
    return 0


def login(config: Config, words: argparse.Namespace) -> int:
    """Sign this host in to ChatGPT with a code typed in any browser, and write auth.json."""
    fetch = Upstream(config.connect_timeout, config.idle_timeout).fetch
    try:
        sign_in = device_sign_in(fetch, config.issuer, config.auth_file, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print("\ncancelled; auth.json is unchanged")
        return 130
    except BridgeError as exc:
        print(f"not signed in: {escape_unprintable(exc.message)}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"not signed in: cannot write {config.auth_file}: {describe_error(exc)}", file=sys.stderr)
        return 1
    account = _printable(sign_in.email) or f"account {sign_in.account or 'without an id'}"
    plan = _printable(sign_in.plan) or "unknown"
    print(f"Signed in as {account}, plan {plan}; saved to {config.auth_file}")
    return 0


LITELLM_KEY = b"master key of the LiteLLM beside qoo-bridge"  # HMAC message: derives LiteLLM's key


def own_url(config: Config) -> str:
    """Return the base URL at which this host reaches its own bridge."""
    every = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}
    return base_url(config._replace(host=every.get(config.host, config.host)), config.port)


def get_from_own_bridge(config: Config, path: str, key: str = "") -> BufferedReply:
    """Send a GET to the bridge on this host. Raises BadUpstream and UpstreamTimeout."""
    parts = urllib.parse.urlsplit(own_url(config))
    headers = {"authorization": f"Bearer {key}"} if key else {}
    upstream = Upstream(10, 10, own_bridge=True)
    try:
        return upstream.fetch("GET", f"{parts.scheme}://{parts.netloc}{path}", headers)
    except BadUpstream as exc:
        raise BadUpstream(f"no bridge answers on {own_url(config)}: {exc.message}") from exc.__cause__
    finally:
        upstream.close()


def own_models(config: Config, key: str) -> dict[str, dict[str, Any]]:
    """Return the running bridge's models and aliases with their catalogue entries. Raises BridgeError."""
    reply = get_from_own_bridge(config, f"/v1/models?client_version={config.client_version}", key)
    models = {str(entry.get("slug")): entry for entry in dicts_in(reply.json_or_raise().get("models"))
              if entry.get("visibility", "list") == "list"}
    if not models:
        raise BadUpstream(f"the bridge on {own_url(config)} lists no models")
    return models


def litellm_config(config: Config, words: argparse.Namespace) -> int:
    """Print a litellm.yaml with the running bridge's models."""
    try:
        keys = KeyRing(config.api_key, config.api_key_file).keys()
        key = next((key.secret for key in keys if key.name == "litellm"), keys[0].secret if keys else "")
        models = own_models(config, key)
    except BridgeError as exc:
        print(f"litellm-config: {escape_unprintable(' '.join(exc.message.split()))}", file=sys.stderr)
        return 1
    access = "dangerously_permit_weak_or_unset_master_key: true"  # LiteLLM is open because the bridge is open
    if key:
        access = f'master_key: "sk-{hmac.new(key.encode("ascii"), LITELLM_KEY, "sha256").hexdigest()}"'
    first = default_model(config)
    if first not in models:
        first = next(iter(models))
    models_and_router = litellm_yaml(models.items(), first, own_url(config), key or "lan")
    print(f"{models_and_router}general_settings:\n  {access}")
    return 0


def own_names_only(host: str) -> bool:
    """Tell whether an address is a loopback name, which works only on this host."""
    return host in ("localhost", "::1") or host.startswith("127.")


# == 41 doctor ================================================================
# Checks of every step between this host and a reply, each with a remedy.

class Finding(NamedTuple):
    """A check's result; `state` is ok, failed, none (does not apply) or skipped (an earlier check failed)."""

    state: str
    text: str
    todo: str = ""


class Check(NamedTuple):
    """One line of the doctor's table."""

    name: str
    needs: tuple[str, ...]  # checks that must pass first
    run: Callable[[Doctor], Finding]
    todo: str = ""  # what to do after an exception


class Doctor:
    """The checks' shared state: a bridge that does not serve, and upstream's reply without a sign-in."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.bridge = Bridge(config)
        self.anonymous_reply = BufferedReply(0, {}, b"")
        self.login = sign_in_hint(config.auth_file)

    def examine(self, checks: Iterable[Check]) -> Iterator[tuple[Check, Finding]]:
        """Run the checks in order; skip a check if one of its needs has failed."""
        unmet: set[str] = set()
        for check in checks:
            missing = [name for name in check.needs if name in unmet]
            try:
                finding = Finding("skipped", f"skipped, see {missing[0]}") if missing else check.run(self)
            except (BridgeError, OSError) as exc:
                finding = Finding("failed", describe_error(exc), check.todo)
            if finding.state in ("failed", "skipped"):
                unmet.add(check.name)
            yield check, finding if finding.state == "failed" else finding._replace(todo="")

    def get(self, path: str) -> dict[str, Any]:
        """Get JSON from upstream with this host's sign-in. Raises BridgeError."""
        return self.bridge.account.get(path).json_or_raise()


def check_python(doctor: Doctor) -> Finding:
    """Show the interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("ok", f"{version}, {ssl.OPENSSL_VERSION}, {sys.platform}")  # older ones fail at import


def check_file(doctor: Doctor) -> Finding:
    """Check that auth.json exists, is readable and complete, and holds a ChatGPT plan's sign-in."""
    path = doctor.config.auth_file
    try:
        doctor.bridge.account.sign_in()
    except NotSignedIn as exc:
        settings = keyring_setting(path)
        if settings:
            return Finding("failed", f"{path} does not exist: Codex keeps the sign-in in the system keyring",
                           f'set cli_auth_credentials_store = "file" in {settings}, then run `codex login`')
        return Finding("failed", exc.message.replace(f"; {doctor.login}", ""), doctor.login)
    return Finding("ok", f"{path} is valid")


def check_private(doctor: Doctor) -> Finding:
    """Check that other users of this host cannot read auth.json."""
    path = doctor.config.auth_file
    if os.name != "posix":
        return Finding("none", "not checked on this system")
    mode = auth_file_mode(path)
    return Finding("failed" if mode & 0o077 else "ok", f"mode {mode:04o}", f"chmod 600 {shlex.quote(path)}")


def check_token(doctor: Doctor) -> Finding:
    """Check when the access token expires; the bridge refreshes an expired one."""
    sign_in = doctor.bridge.account.sign_in()
    left = sign_in.expires - time.time()
    plan = f"plan {_printable(sign_in.plan) or 'unknown'}"
    if not sign_in.expires:
        return Finding("none", f"{plan}; the token's expiry is unknown")
    if left > 0:
        when = local_time(sign_in.expires)
        return Finding("ok", f"{plan}; the token expires in {format_duration(left)}, {when}")
    if sign_in.renewable:
        return Finding("ok", f"{plan}; expired {format_duration(-left)} ago, the bridge will refresh it")
    return Finding("failed", f"{plan}; expired {format_duration(-left)} ago", doctor.login)


def check_name(doctor: Doctor) -> Finding:
    """Check that upstream's host name resolves; with a proxy, check the proxy's name instead."""
    target, _ = parse_target(doctor.config.upstream)
    proxy = find_proxy(target)
    host, port = (proxy.hostname or "", proxy.port or 80) if proxy else (target.host, target.port)
    addresses = resolve_host(host, port)
    return Finding("ok", f"{'the proxy ' if proxy else ''}{host} is {', '.join(addresses[:2])}"
                   + (f" and {len(addresses) - 2} more" if len(addresses) > 2 else ""))


def check_tls(doctor: Doctor) -> Finding:
    """Connect to upstream without the sign-in; show the certificate's issuer, which reveals a TLS proxy."""
    config = doctor.config
    url = f"{config.upstream}/models?client_version={config.client_version}"
    try:
        reply = doctor.bridge.upstream.request("GET", url, doctor.bridge.identity.headers(), timeout=10)
    except BadUpstream as exc:
        if not isinstance(exc.__cause__, ssl.SSLCertVerificationError):
            raise
        return Finding("failed", exc.message, "if a proxy decrypts TLS: set SSL_CERT_FILE=<its CA (PEM)>")
    tls = reply.tls()
    doctor.anonymous_reply = reply.read_all(MAX_ERROR_BODY, 10)
    if tls is None:
        return Finding("none", "http without TLS")
    return Finding("ok", f"{tls[0]}; the certificate is issued by {_printable(tls[1]) or 'unknown'}")


def check_cloudflare(doctor: Doctor) -> Finding:
    """Check that upstream itself answers, and not a block page."""
    error = doctor.anonymous_reply.refusal()
    if error.code == "upstream_web_page" or error.status >= 500:
        return Finding("failed", error.message, "try again without VPN or proxy, or later")
    status = doctor.anonymous_reply.status
    return Finding("ok", f"reachable, no block page (HTTP {status} without sign-in, as expected)")


def check_routing(doctor: Doctor) -> Finding:
    """Check the account's routing."""
    try:
        upstream, override = doctor.bridge.account.ask_routing()
    except NotSignedIn as exc:
        return Finding("failed", exc.message, doctor.login)
    return Finding("ok", f"requests go to {upstream}, {override or 'no constraint'}")


def check_models(doctor: Doctor) -> Finding:
    """Check the model list, and show the aliases' models."""
    catalog = doctor.bridge.catalog
    models = catalog.require()
    text = f"{len(visible_models(models))} models; {catalog.describe_aliases(models)}"
    return Finding("ok", escape_unprintable(text[:500]))


def check_usage(doctor: Doctor) -> Finding:
    """Show the plan's windows as bars."""
    limits = or_empty(doctor.get("/backend-api/wham/usage").get("rate_limit"), dict)
    windows = dicts_in([limits.get(name) for name in ("primary_window", "secondary_window")])
    lines = [usage_line(window) for window in windows]
    if limits.get("limit_reached") is True:
        return Finding("failed", "\n".join(lines), "the plan's limit is reached: wait for the reset")
    return Finding("ok" if lines else "none", "\n".join(lines) or "the plan has no windows")


def usage_line(window: Mapping[str, Any]) -> str:
    """Return the line of one plan window: length, usage bar, reset time."""
    length, used, reset = (finite_number(window.get(key)) or 0 for key in (
        "limit_window_seconds", "used_percent", "reset_at"))
    full = round(min(max(used, 0), 100) / 5)
    bar = "█" * full + "░" * (20 - full)
    return f"{format_duration(length):<4} {bar} {used:3.0f} % used, resets {local_time(reset)}"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units."""
    counts: list[str] = []
    rest = int(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or counts:
            counts.append(f"{count} {unit}")
    return " ".join(count for count in counts[:2] if not count.startswith("0 ")) or "0 s"


def local_time(unix: float) -> str:
    """Return a Unix time in this host's local time."""
    try:
        return time.strftime("%a %d %b %H:%M", time.localtime(unix))
    except (OverflowError, OSError, ValueError):
        return "at an unknown time"


def check_port(doctor: Doctor) -> Finding:
    """Check that the port is free, or that a bridge uses it."""
    config = doctor.config
    try:
        check_can_listen(config.host, 0)
    except OSError as exc:
        text = f"cannot listen on --host {config.host}: {describe_error(exc)}"
        where = authority(config.host, config.port)
        return Finding("failed", text, "use an address of this host, or 0.0.0.0 for all of them; to ask "
                       f"another machine's bridge: curl http://{where}/healthz")
    try:
        reply = get_from_own_bridge(config, "/healthz")
        if reply.status == 200 and reply.json().get("status") == "ok":
            version = _printable(reply.json().get("version"))
            return Finding("ok", f"a bridge runs on port {config.port}, version {version}")
    except BadUpstream as exc:
        if isinstance(exc.__cause__, OSError):  # nothing listens there
            check_can_listen(config.host, config.port)
            return Finding("ok", f"port {config.port} is free")
    return Finding("failed", f"port {config.port} is used by another program",
                   "stop that program, or choose another --port")


def check_access(doctor: Doctor) -> Finding:
    """Check the key file and the certificate's files."""
    config = doctor.config
    path = config.api_key_file
    try:
        server_tls(config)
        if not path:
            return Finding("none", f"{len(config.api_key)} keys" if config.api_key else "open: no key is set")
        keys, mode = load_key_file(path)
    except UsageError as exc:  # the message names the option
        return Finding("failed", describe_error(exc), "correct the option or the file")
    except (OSError, ValueError) as exc:
        return Finding("failed", f"{path}: {describe_error(exc)}", "correct the file or --api-key-file")
    readable = os.name == "posix" and mode & 0o077
    return Finding("failed" if readable else "ok", f"{len(keys)} keys in {path}, mode {mode:04o}",
                   f"chmod 600 {path}")


def check_lan(doctor: Doctor) -> Finding:
    """Check the address at which other machines reach this host."""
    config = doctor.config
    if own_names_only(config.host):
        return Finding("none", f"--host {config.host} serves only this host")
    address = lan_address()
    if own_names_only(address):
        return Finding("failed", "this host has no LAN address", "connect it to the network")
    if not network_allows(address, config.allow):
        return Finding("failed", f"this host's address {address} is not in --allow: LAN clients will get 403",
                       f"allow your network, such as --allow {address}/24")
    return Finding("ok", base_url(config, config.port))


FIREWALL = {  # by sys.platform; {0} is the port
    "linux": "sudo ufw allow {0}/tcp (or: sudo firewall-cmd --add-port={0}/tcp --permanent)",
    "darwin": "System Settings > Network > Firewall > Options: allow Python",
    "win32": "netsh advfirewall firewall add rule name=qoo-bridge dir=in action=allow "
             "protocol=TCP localport={0}",
}


def check_firewall(doctor: Doctor) -> Finding:
    """Show how to open the port, because this host cannot test its own firewall."""
    hint = FIREWALL.get(sys.platform, "open TCP port {0}").format(doctor.config.port)
    return Finding("none", f"not testable from this host; if others cannot connect: {hint}")


def check_zstd(doctor: Doctor) -> Finding:
    """Check that large requests can be sent compressed."""
    if zstd_module() or libzstd():
        return Finding("ok", "Python's own" if zstd_module() else "libzstd")
    return Finding("none", "missing, large requests go uncompressed: install libzstd (brew install zstd)")


def check_live(doctor: Doctor) -> Finding:
    """Send one tiny request through a temporary bridge on loopback, and time the answer."""
    server = Server(doctor.config._replace(
        host="127.0.0.1", port=0, tls_cert="", tls_key="", api_key=(), api_key_file="", limit={}))
    threading.Thread(target=server.serve_forever, args=(0.1,), name="accept", daemon=True).start()
    payload = {"model": default_model(doctor.config), "input": "Say hi.", "reasoning": {"effort": "low"},
            "stream": True}
    try:
        return live_turn(f"http://127.0.0.1:{server.server_port}/v1/responses", json_bytes(payload))
    finally:
        server.drain(1)


def live_turn(url: str, payload: bytes) -> Finding:
    """Send a request, and time its first event, its first word and its end."""
    started = time.monotonic()
    seen: dict[str, float] = {}
    upstream = Upstream(10, 60)
    reply = upstream.request("POST", url, {"content-type": "application/json"}, payload, timeout=60)
    if reply.status != 200:
        raise reply.read_all(MAX_ERROR_BODY, 10).refusal()
    events, assembler = Events(), ResponseAssembler()
    for piece in iter(lambda: reply.read(60) or b"", b""):
        for event in split_events(events.feed(piece)):
            parsed = event_json(event) or {}
            seen.setdefault(event_type(parsed), time.monotonic() - started)
            assembler.add(parsed)
    response, total = assembler.response(), time.monotonic() - started
    tokens = token_counts(response)
    word = seen.get("response.output_text.delta", total)
    return Finding("ok", f"{_printable(response.get('model'))}: first event {min(seen.values()):.2f} s, "
                   f"first word {word:.2f} s, end {total:.2f} s; "
                   f"{tokens.get('input', 0)} tokens in, {tokens.get('output', 0)} out")


NETWORK = "check this host's network, DNS and firewall; behind a proxy: HTTPS_PROXY=http://host:port"
REFUSED = "see the message; run `codex` on this host to test the plan itself"
CHECKS = (
    Check("python", (), check_python),
    Check("sign-in file", (), check_file),
    Check("file mode", ("sign-in file",), check_private),
    Check("token", ("sign-in file",), check_token),
    Check("name", (), check_name, NETWORK),
    Check("TLS", ("name",), check_tls, NETWORK),
    Check("Cloudflare", ("TLS",), check_cloudflare),
    Check("account", ("sign-in file", "token", "Cloudflare"), check_routing, REFUSED),
    Check("models", ("sign-in file", "token", "Cloudflare"), check_models, REFUSED),
    Check("usage", ("sign-in file", "token", "Cloudflare"), check_usage, REFUSED),
    Check("port", (), check_port, "stop the program that uses it, or choose another --port or --host"),
    Check("access", (), check_access),
    Check("LAN address", ("port",), check_lan),
    Check("firewall", ("LAN address",), check_firewall),
    Check("zstd", (), check_zstd),
)
LIVE = Check("live", ("models",), check_live, REFUSED)
MARKS = {"ok": "✓", "failed": "✗", "none": "–", "skipped": "–"}
PLAIN = str.maketrans("✓✗–█░→", "+!-#.>")  # for a terminal without these characters


def doctor(config: Config, words: argparse.Namespace) -> int:
    """Print the checks row by row, or all of them in JSON, without any secret."""
    log.addHandler(logging.NullHandler())  # the table shows what the log would
    log.propagate = False
    rows, examined = [], Doctor(config)
    signals = stop_signals(examined.bridge.account.is_refreshing)
    try:
        for check, finding in examined.examine((*CHECKS, LIVE) if words.live else CHECKS):
            if signals:
                raise KeyboardInterrupt
            rows.append({"name": check.name, **finding._asdict()})
            if not words.json:
                print_finding(check.name, finding)
    finally:
        examined.bridge.account.finish(REFRESH_SECONDS)
    healthy = all(row["state"] != "failed" for row in rows)
    if words.json:
        print(json.dumps({"version": __version__, "ok": healthy, "checks": rows}, indent=2))
    if healthy:
        return 0
    return 1


def print_finding(name: str, finding: Finding) -> None:
    """Print a check's row within 80 columns, and below a failure what to do."""
    import textwrap  # late: only this command needs it

    todo = ""
    if finding.todo:
        todo = f"\n→ {finding.todo}"
    wrapper = textwrap.TextWrapper(65, break_long_words=False, break_on_hyphens=False)
    lines = [part for line in (finding.text + todo).split("\n")
             for part in wrapper.wrap(escape_unprintable(line))]
    row = f"{MARKS[finding.state]} {name:<12} " + f"\n{'':15}".join(lines)
    try:
        row.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        row = row.translate(PLAIN).encode("ascii", "replace").decode("ascii")
    print(row, flush=True)


# == 42 demo ==================================================================
# The complete bridge with a built-in stand-in backend, which needs no account and no network.

DEMO_PACE = 0.03  # seconds between two words
DEMO_COMMAND = "echo hello from the demo"
DEMO_SHELLS: dict[str, Any] = {  # shell tools of Codex and others -> the arguments that run the command
    "exec_command": {"cmd": DEMO_COMMAND},
    "shell_command": {"command": DEMO_COMMAND},
    "shell": {"command": ["sh", "-c", DEMO_COMMAND]},
}
DEMO_MODEL = {  # the fields that Codex requires of a model
    "description": "Says what it was sent.", "default_reasoning_level": "low", "visibility": "list",
    "supported_reasoning_levels": [{"effort": "low", "description": "none at all"}], "supported_in_api": True,
    "shell_type": "unified_exec", "default_reasoning_summary": "none", "support_verbosity": False,
    "truncation_policy": {"mode": "tokens", "limit": 10000}, "context_window": 200000, "priority": 1,
    "supports_parallel_tool_calls": False, "experimental_supported_tools": [], "input_modalities": ["text"],
    "base_instructions": "You are a demo.",
}


def demo_pages() -> dict[str, Any]:
    """Return the demo backend's GET responses: end of the path -> JSON."""
    lite = {**DEMO_MODEL, "use_responses_lite": True, "priority": 2}
    models = [{**model, "slug": name, "display_name": name}
              for name, model in (("demo-plain", DEMO_MODEL), ("demo-lite", lite))]
    window = {"used_percent": 12, "limit_window_seconds": 5 * 3600, "reset_at": int(time.time()) + 3600}
    return {
        "/models": {"models": models},
        "/accounts/check": {"accounts": [{"id": "demo", "account_routing_override": "NO_CONSTRAINT"}]},
        "/usage": {"plan_type": "demo", "rate_limit": {"primary_window": window}},
    }


def demo_sign_in() -> dict[str, Any]:
    """Return an auth.json with invented tokens."""
    claims = {"exp": int(time.time()) + 365 * 86400, AUTH_CLAIM: {"chatgpt_plan_type": "demo"}}
    token = f"demo.{base64.urlsafe_b64encode(json_bytes(claims)).decode('ascii')}.demo"
    tokens = {"id_token": token, "access_token": token, "account_id": "demo"}
    return {"auth_mode": "chatgpt", "tokens": tokens}


def demo_tools(tools: Any) -> list[str]:
    """Return the names of a request's tools, also of the lite form's groups."""
    return [name for tool in dicts_in(tools)
            for name in demo_tools(tool.get("tools")) or [str(tool.get("name") or tool.get("type"))]]


def demo_text(item: Mapping[str, Any]) -> str:
    """Return an item's text."""
    content = item.get("content")
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text") or "") for part in dicts_in(content))


def demo_item(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer's item: a call of the shell tool if it has not been called yet, else a text."""
    items = dicts_in(request.get("input"))
    tools = [name for holder in (request, *items) for name in demo_tools(holder.get("tools"))]
    ran = any(item.get("type") == "function_call_output" for item in items)
    shell = next((name for name in DEMO_SHELLS if name in tools), "")
    if shell and not ran:
        return {"type": "function_call", "id": f"fc_{next_id()}", "call_id": f"call_{next_id()}",
                "name": shell, "arguments": json.dumps(DEMO_SHELLS[shell]), "status": "completed"}
    size = len(str(request.get("instructions") or "")) + sum(  # Codex sends them as developer messages
        len(demo_text(item)) for item in items if item.get("role") == "developer")
    last_text = next((demo_text(item) for item in reversed(items) if item.get("role") == "user"), "")
    done = ""
    if ran:
        done = f" Your machine ran `{DEMO_COMMAND}`."
    text = (f"Hello! This is qoo-bridge's demo, not a model.{done} You sent {request.get('model')} "
            f"{len(items)} items, {len(tools)} tools and {size} characters of instructions. "
            f"Your last text was: {' '.join(last_text.split())[:300]}")
    return {"type": "message", "id": f"msg_{next_id()}", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": text, "annotations": []}]}


def demo_events(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of an answer in the backend's form, with one word of text per event."""
    response: dict[str, Any] = {
        "id": f"resp_{next_id()}", "object": "response", "created_at": int(time.time()), "output": [],
        "status": "in_progress", "model": request.get("model")}
    yield {"type": "response.created", "response": response}
    words = 0
    if request.get("generate") is not False:  # false: a WebSocket's first request, a warm-up (WIRE 6)
        for event in demo_item_events(demo_item(request)):
            words += event["type"].endswith(".delta")
            yield event
    counts = {"input_tokens": len(str(request.get("input"))) // 4, "output_tokens": words}
    usage = {**counts, "total_tokens": sum(counts.values()), "input_tokens_details": {"cached_tokens": 0},
             "output_tokens_details": {"reasoning_tokens": 0}}
    yield {"type": "response.completed", "response": {**response, "status": "completed", "usage": usage}}


def demo_item_events(item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of one item."""
    place = {"item_id": item["id"], "output_index": 0}
    if item["type"] == "function_call":
        yield {"type": "response.output_item.added", "output_index": 0, "item": {**item, "arguments": ""}}
        yield {"type": "response.function_call_arguments.delta", **place, "delta": item["arguments"]}
        yield {"type": "response.function_call_arguments.done", **place, "arguments": item["arguments"]}
    else:
        part, place = item["content"][0], {**place, "content_index": 0}
        yield {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}}
        yield {"type": "response.content_part.added", **place, "part": {**part, "text": ""}}
        for word in re.findall(r"\S+\s*", part["text"]):
            yield {"type": "response.output_text.delta", **place, "delta": word}
        yield {"type": "response.output_text.done", **place, "text": part["text"]}
        yield {"type": "response.content_part.done", **place, "part": part}
    yield {"type": "response.output_item.done", "output_index": 0, "item": item}


class DemoHandler(http.server.BaseHTTPRequestHandler):
    """A stand-in for ChatGPT's backend; each response ends its connection."""

    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer requests for catalogue, account and usage, and a WebSocket's requests."""
        path = self.path.partition("?")[0]
        if path.endswith("/responses"):
            return self._websocket()
        for ending, page in demo_pages().items():
            if path.endswith(ending):
                return self._answer(200, page)
        return self._answer(404, {"detail": "not in the demo"})

    def do_POST(self) -> None:
        """Answer a turn, word by word."""
        length = self.headers.get("content-length", "")
        body = b""
        if re.fullmatch(r"[0-9]{1,12}", length):
            body = self.rfile.read(int(length))
        try:
            request = parse_json(decompress(body, self.headers.get("content-encoding", ""), MAX_EVENT))
        except BridgeError as exc:
            return self._answer(exc.status, exc.body())
        if not self.path.endswith("/responses") or not isinstance(request, dict):
            return self._answer(404, {"detail": "not in the demo"})
        self._head(200, "text/event-stream")
        return self._tell(request, render_event)

    def _websocket(self) -> None:
        """Answer one request after the other; each has only the new items since the previous one."""
        accept = accept_key(self.headers.get("sec-websocket-key", ""))
        self.wfile.write(render_head("HTTP/1.1 101 Switching Protocols", [
            ("upgrade", "websocket"), ("connection", "Upgrade"), ("sec-websocket-accept", accept)]))
        reader = FrameReader(masked=True, max_message=MAX_EVENT)
        conversation: dict[str, Any] = {}
        with contextlib.suppress(OSError):  # the client has left
            for received in iter(lambda: self.connection.recv(READ_SIZE), b""):
                for message in reader.feed(received):
                    if message.opcode == OP_CLOSE:
                        return
                    frame = None
                    if message.opcode == OP_TEXT:
                        frame = json_or_none(message.payload)
                    if isinstance(frame, dict):
                        earlier = {}
                        if frame.get("previous_response_id"):
                            earlier = conversation
                        items = [*earlier.get("input", []), *(frame.get("input") or [])]
                        conversation = {**earlier, "generate": True, **frame, "input": items}
                        self._tell(conversation, lambda event: encode_frame(OP_TEXT, json_bytes(event)))

    def _tell(self, request: dict[str, Any], render: Callable[[Mapping[str, Any]], bytes]) -> None:
        """Send the events of an answer, word by word."""
        with contextlib.suppress(OSError):  # the client has left
            for number, event in enumerate(demo_events(request)):
                self.wfile.write(render({**event, "sequence_number": number}))
                time.sleep(DEMO_PACE if event["type"] == "response.output_text.delta" else 0)

    def _answer(self, status: int, value: Any) -> None:
        body = json_bytes(value)
        self._head(status, "application/json", len(body))
        self.wfile.write(body)

    def _head(self, status: int, content_type: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        if length is not None:
            self.send_header("content-length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because the bridge logs each request."""


def demo(config: Config, words: argparse.Namespace) -> int:
    """Serve with the demo backend until SIGTERM or Ctrl-C; then delete its invented sign-in."""
    import tempfile  # late: only this command needs it

    with tempfile.TemporaryDirectory(prefix="qoo-demo-") as folder, \
            socketserver.ThreadingTCPServer(("127.0.0.1", 0), DemoHandler) as backend:
        backend.daemon_threads = True
        auth_file = os.path.join(folder, "auth.json")
        write_private(auth_file, demo_sign_in())
        threading.Thread(target=backend.serve_forever, name="demo", daemon=True).start()
        origin = f"http://127.0.0.1:{backend.server_address[1]}"
        return serve(config._replace(upstream=f"{origin}/backend-api/codex", issuer=origin,
                                     auth_file=auth_file, log_file="-"), print_demo)


def print_demo(server: Server) -> None:
    """Print what to try while the demo runs."""
    config = server.bridge.config
    url, locked = base_url(config, server.server_port), bool(server.bridge.key_ring.keys())
    curl = client_config("curl", url, locked, default_model(config))
    save = codex_save_command(url, locked, default_model(config), PROFILE)
    print(f"\nA demo without account, network or model. On any machine of the LAN, try\n\n{curl}\n"
          f"or set Codex up, and ask it:\n\n{save}\n"
          f'codex exec --skip-git-repo-check --profile {PROFILE} "say hello to me"\n', flush=True)


# == 43 main ==================================================================
# The command line.

COMMANDS = (
    Command("serve", lambda config, words: serve(config), "serve (the default)"),
    Command("client-config", print_client_config,
            "print a client's configuration: codex (the default), openai, litellm, claude, curl"),
    Command("login", login, "sign this host in to ChatGPT with a code typed in any browser"),
    Command("doctor", doctor, "check every step between this host and a reply (--live, --json)"),
    Command("demo", demo, "serve with a built-in backend: no account, no network"),
    Command("litellm-config", litellm_config, "print a litellm.yaml with the running bridge's models"),
    Command("new-key", new_key, "generate a key for a client: new-key NAME"),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser, built from OPTIONS and COMMANDS."""
    commands = "\n".join(f"  {command.name:<16} {command.help}" for command in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="qoo_bridge.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Let every machine on a LAN use the ChatGPT plan of the one host that is signed in.",
        epilog=f"commands:\n{commands}\n\nEvery option has an environment variable: --max-body is "
               "QOO_BRIDGE_MAX_BODY. Options marked +\ncan be repeated; in the environment, use commas.")
    parser.add_argument("command", nargs="?", default="serve", choices=[command.name for command in COMMANDS],
                        metavar="command", help="see below")
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--model", metavar="MODEL", help="client-config: the model to name")
    parser.add_argument("--profile", metavar="NAME", help="client-config codex: the name of the profile")
    parser.add_argument("--live", action="store_true", help="doctor: send one tiny request as well")
    parser.add_argument("--json", action="store_true", help="doctor: print JSON")
    parser.add_argument("--version", action="version", version=f"qoo-bridge {__version__}")
    for option in OPTIONS:
        default = ""
        if option.default and option.name != "allow":
            default = f" (default: {option.default})"
        parser.add_argument(option.flag, dest=option.name, action="append", metavar=option.metavar,
                            help=(option.help + default + (" +" if option.many else "")).replace("%", "%%"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # no console, or one that a test has put there
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for narrow code pages
    try:
        words = build_parser().parse_intermixed_args(sys.argv[1:] if argv is None else argv)
        command = next(command for command in COMMANDS if command.name == words.command)
        status = command.run(load_config(vars(words), os.environ), words)
        print(end="", flush=True)  # inside the try, which handles a closed pipe
        return status
    except UsageError as exc:
        print(f"qoo_bridge.py: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `doctor | head`: the reader has closed the pipe
        discard_output()
        return 1


if __name__ == "__main__":
    sys.exit(main())
