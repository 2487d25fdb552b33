"""The routes of the backend, and what they answer when no script says otherwise."""

from __future__ import annotations

import collections
import hashlib
import json
import urllib.parse
from collections.abc import Callable

from .cache import PromptCache
from .catalog import CATALOG_JSON
from .events import Event, answer_items, items_turn
from .exchange import Exchange, Reply
from .http1 import Request, dump
from .listener import BASE, Listener
from .refusals import REFUSALS, VERSION, refuse_headers, refuse_library_agent, require_headers
from .replies import TURN_HEADERS, cloudflare, turn
from .signin import SignIn
from .websocket import MAX_MESSAGE, FrameReply, WebSocketExchange, answer_frame, check_handshake
from .wish import Refused, Wish, detail, fault, parse_json

USAGE_REPORT = {
    "user_id": "user-wire", "account_id": "user-wire", "email": "someone@example.com", "plan_type": "pro",
    "rate_limit": {
        "allowed": True, "limit_reached": False,
        "primary_window": {
            "used_percent": 12, "limit_window_seconds": 18000, "reset_after_seconds": 1800,
            "reset_at": 1795346042,
        },
        "secondary_window": {
            "used_percent": 3, "limit_window_seconds": 604800, "reset_after_seconds": 90000,
            "reset_at": 1795932842,
        },
    },
    "code_review_rate_limit": None, "additional_rate_limits": None,
    "credits": {"has_credits": False, "unlimited": False, "balance": "0"},
}


class Backend(Listener, SignIn):
    """Play chatgpt.com and auth.openai.com on one loopback port.

    Use it as a context manager; leaving it raises what went wrong in its threads. Attributes without an
    underscore may be set by a test at any time.
    """

    def __init__(self, tls: bool = True) -> None:
        Listener.__init__(self, tls)
        SignIn.__init__(self, self.issuer)
        self.catalog: list[Event] = json.loads(CATALOG_JSON)
        self.routing: tuple[str, str] = ("https://chatgpt.com", "NO_CONSTRAINT")
        self.hosts = (f"localhost:{self.address[1]}", f"127.0.0.1:{self.address[1]}")
        self.required_headers: dict[str, str] = {}
        self.partners: dict[str, str] = {}  # an item's id -> the reasoning item that must come with it
        self.enforce_lite = True
        self.takes_plain: set[str] = set()  # lite models that are answered in the plain form, too
        self.cache = PromptCache()
        self.side_frames = False  # two frames open each turn of a WebSocket, before `response.created`
        self.max_message = MAX_MESSAGE
        self.require_instructions = False
        self.refusals: list[str] = []
        self.frames: list[Event] = []
        self.websocket_status: int | None = None
        self._frame_scripts: collections.deque[FrameReply] = collections.deque()

    def __enter__(self) -> Backend:
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise the first thing that went wrong in a thread."""
        if self.errors:
            raise AssertionError(f"the stand-in met {self.errors!r}") from self.errors[0]

    def note(self, text: str) -> None:
        """Remember why something was refused, for the reader of a failed test."""
        with self.changed:
            self.refusals.append(text)

    @property
    def etag(self) -> str:
        """Return the catalogue's tag; it changes when the catalogue does."""
        return f'W/"{hashlib.sha256(dump(self.catalog)).hexdigest()[:16]}"'

    def on_frame(self, *replies: FrameReply) -> None:
        """Queue replies for the next frames, one each; a frame that breaks a rule is refused all the same."""
        with self.changed:
            self._frame_scripts.extend(replies)

    def wait_for_frames(self, count: int, timeout: float = 5.0) -> list[Event]:
        """Wait until `count` frames came, and return them all."""
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.frames) >= count, timeout):
                raise AssertionError(f"{len(self.frames)} of {count} frames came in {timeout} s")
            return list(self.frames)

    def next_frame_reply(self, frame: Event) -> FrameReply:
        """Remember a frame, and return what answers it."""
        with self.changed:
            self.frames.append(frame)
            self.changed.notify_all()
            return self._frame_scripts.popleft() if self._frame_scripts else answer_frame

    def default(self, exchange: Exchange) -> None:
        """Answer as the real backend does."""
        request = exchange.request
        upgrade = "websocket" if request.header("upgrade") else ""
        route = ROUTES.get((request.method, request.path, upgrade))
        self.answer(exchange, route or Backend.missing)

    def answer(self, exchange: Exchange, route: Route) -> None:
        """Run a route; what it refuses is answered and remembered."""
        try:
            route(self, exchange)
        except Refused as exc:
            self.note(str(exc))
            send_refusal(exchange, exc)

    def missing(self, exchange: Exchange) -> None:
        """Answer a path that does not exist."""
        raise detail(404, "Not Found")

    def check_client(self, request: Request, websocket: bool = False) -> None:
        """Raise Refused unless the request's headers are those of a signed-in Codex."""
        refuse_library_agent(request)
        self.check_bearer(request)
        refuse_headers(request, websocket)
        require_headers(self, request)

    def check_turn(self, request: Request, body: Event, websocket: bool = False) -> None:
        """Raise Refused unless a request for a turn is one that the backend takes."""
        wish = Wish(self, request, body, websocket)
        for rule in REFUSALS:
            rule(wish)

    def turn_body(self, request: Request) -> Event:
        """Return the body of a request for a turn; raise Refused unless all of the request is right."""
        self.check_client(request)
        encoding = request.header("content-encoding")
        if encoding not in (None, "identity", "zstd"):
            raise detail(415, f"content-encoding {encoding}")
        body = parse_json(request.body)
        self.check_turn(request, body)
        return body

    def responses(self, exchange: Exchange) -> None:
        """Answer `POST /responses`: echo the last text of the input, or do what it asks for."""
        body = self.turn_body(exchange.request)
        charge = self.cache.charge(exchange.request, body)
        headers = [*TURN_HEADERS, ("x-models-etag", self.etag)]
        turn(*charge.sign(items_turn(*answer_items(body), model=body["model"])), headers=headers)(exchange)

    def models(self, exchange: Exchange) -> None:
        """Answer `GET /models`, also with 304."""
        self.check_client(exchange.request)
        query = urllib.parse.parse_qs(exchange.request.query)
        if set(query) != {"client_version"} or not VERSION.match(query["client_version"][0]):
            raise fault(400, "client_version is wanted", "missing_required_parameter", "client_version")
        tag = self.etag
        if exchange.request.header("if-none-match") == tag:
            exchange.whole(304, b"", [("etag", tag)])
            return
        exchange.json(200, {"models": self.catalog}, [("etag", tag)])

    def accounts(self, exchange: Exchange) -> None:
        """Answer the question where this account's requests go."""
        self.check_client(exchange.request)
        origin, override = self.routing
        account = {
            "id": self.account_id, "name": None, "structure": "personal", "plan_type": self.plan,
            "workspace_backend_origin": origin, "account_routing_override": override,
        }
        exchange.json(200, {"accounts": [account], "default_account_id": self.account_id})

    def usage(self, exchange: Exchange) -> None:
        """Answer with the plan's limits."""
        self.check_client(exchange.request)
        exchange.json(200, USAGE_REPORT)

    def websocket(self, exchange: Exchange) -> None:
        """Answer a handshake on `/responses`, then every frame."""
        if self.websocket_status is not None:
            raise detail(self.websocket_status, "WebSocket is not served")
        self.check_client(exchange.request, websocket=True)
        check_handshake(exchange.request)
        WebSocketExchange(self, exchange).serve()


Route = Callable[[Backend, Exchange], None]
ROUTES: dict[tuple[str, str, str], Route] = {
    ("POST", f"{BASE}/responses", ""): Backend.responses,
    ("GET", f"{BASE}/responses", "websocket"): Backend.websocket,
    ("GET", f"{BASE}/models", ""): Backend.models,
    ("GET", "/backend-api/wham/accounts/check", ""): Backend.accounts,
    ("GET", "/backend-api/wham/usage", ""): Backend.usage,
    ("POST", "/oauth/token", ""): Backend.token,
    ("POST", "/api/accounts/deviceauth/usercode", ""): Backend.usercode,
    ("POST", "/api/accounts/deviceauth/token", ""): Backend.device_token,
}


def send_refusal(exchange: Exchange, refusal: Refused) -> None:
    """Answer with a refusal: a page for people, or JSON."""
    if isinstance(refusal.body, str):
        cloudflare()(exchange)
        return
    exchange.json(refusal.status, refusal.body, [("cf-ray", "9a1b2c3d4e5f-FRA")])


def checked(backend: Backend, reply: Reply) -> Reply:
    """Hold a request for a turn to the rules first, and answer it with `reply` only if it passes."""

    def route(_: Backend, exchange: Exchange) -> None:
        backend.cache.charge(exchange.request, backend.turn_body(exchange.request))
        reply(exchange)

    def judged(exchange: Exchange) -> None:
        backend.answer(exchange, route)

    return judged
