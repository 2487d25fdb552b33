"""The sign-in server's state (tokens that rotate, a device code that waits for its person), and auth.json."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import time
import urllib.parse
from typing import Any

from .events import COUNTER, Event
from .exchange import Exchange
from .http1 import Request, dump
from .leaks import issue
from .wish import detail, fault, parse_json

CLIENT_ID = "app_EMoamEEZ73f0CkXaXp7hrann"
AUTH_CLAIM = "https://api.openai.com/auth"
REFRESH_REASONS = ("proactive_expiry", "unauthorized_recovery")


def b64url(raw: bytes) -> str:
    """Return base64url without padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def jwt(claims: Event) -> str:
    """Return a token of a JWT's shape; its signature is a placeholder, nobody checks it here."""
    head = {"alg": "RS256", "kid": "wire", "typ": "JWT"}
    return ".".join([b64url(dump(head)), b64url(dump(claims)), b64url(b"signature of the stand-in")])


class SignIn:
    """Issue, rotate and judge tokens. `lock` guards everything below it."""

    def __init__(self, issuer: str) -> None:
        self.lock = threading.Lock()
        self.token_issuer = issuer
        self.account_id = "0b0f4a5e-6c1d-4b7e-9a53-7f2d8e1c4a90"
        self.plan = "pro"
        self.expires_in = 864_000.0  # seconds an access token lives from its issue
        self.refreshes = 0
        self.device_enabled = True
        self.device_interval = "5"  # seconds, as text: so the real server sends it
        self._accepted: dict[str, float] = {}
        self._spent: set[str] = set()
        self._device: dict[str, str] = {}
        self._approved = False
        self.tokens: dict[str, str] = {}
        self._issue()

    @property
    def access_token(self) -> str:
        """Return the newest access token."""
        return self.tokens["access_token"]

    @property
    def refresh_token(self) -> str:
        """Return the one refresh token that is accepted now."""
        return self.tokens["refresh_token"]

    def _issue(self) -> dict[str, str]:
        now = time.time()
        expires = now + self.expires_in
        number = next(COUNTER)
        auth = {
            "chatgpt_account_id": self.account_id, "chatgpt_plan_type": self.plan,
            "chatgpt_user_id": "user-wire", "chatgpt_account_is_fedramp": False, "user_id": "user-wire",
        }
        common = {
            "iss": self.token_issuer, "sub": "auth0|wire", "iat": int(now), "jti": str(number),
            AUTH_CLAIM: auth,
        }
        identity = {**common, "aud": [CLIENT_ID], "email": "someone@example.com", "exp": int(now + 3600)}
        access = {**common, "aud": ["https://api.openai.com/v1"], "client_id": CLIENT_ID, "exp": int(expires)}
        self.tokens = {
            "id_token": jwt(identity),
            "access_token": jwt(access),
            "refresh_token": f"rt_wire_{number}",
        }
        for name, token in self.tokens.items():
            issue(name, token)
        self._accepted[self.access_token] = expires
        return dict(self.tokens)

    def rotate(self) -> dict[str, str]:
        """Do what another program's refresh does: spend the refresh token and issue new tokens."""
        with self.lock:
            self._spent.add(self.refresh_token)
            return self._issue()

    def revoke(self) -> None:
        """Refuse every access token issued so far with 401."""
        with self.lock:
            self._accepted.clear()

    def revoke_refresh(self) -> None:
        """Refuse the current refresh token as one that was used before."""
        with self.lock:
            self._spent.add(self.refresh_token)

    def approve_device(self) -> None:
        """Do what the person does who types the code."""
        with self.lock:
            self._approved = True

    def check_bearer(self, request: Request) -> None:
        """Raise Refused unless the request carries a live access token and its account."""
        scheme, _, token = (request.header("authorization") or "").partition(" ")
        with self.lock:
            expires = self._accepted.get(token, 0.0)
        if scheme != "Bearer" or expires <= time.time():
            raise detail(401, "Could not validate credentials")
        if request.header("chatgpt-account-id") != self.account_id:
            raise detail(401, "Account id does not match the token")

    def token(self, exchange: Exchange) -> None:
        """Answer `/oauth/token`: a refresh in JSON, or a device's code as a form."""
        kind = (exchange.request.header("content-type") or "").partition(";")[0]
        if kind == "application/x-www-form-urlencoded":
            answer = self._exchange_code(dict(urllib.parse.parse_qsl(exchange.request.body.decode("ascii"))))
        elif kind == "application/json":
            answer = self._refresh(parse_json(exchange.request.body))
        else:
            raise fault(400, f"content-type {kind!r}", "invalid_request")
        exchange.json(200, answer)

    def _refresh(self, wish: Event) -> Event:
        expected = {"client_id", "grant_type", "refresh_token", "refresh_reason"}
        if set(wish) != expected or wish["client_id"] != CLIENT_ID or wish["grant_type"] != "refresh_token":
            raise fault(400, f"bad refresh, fields {sorted(wish)}", "invalid_request")
        if wish["refresh_reason"] not in REFRESH_REASONS:
            raise fault(400, "unknown refresh_reason", "invalid_request")
        with self.lock:
            if wish["refresh_token"] in self._spent:
                message = "Your refresh token has already been used to generate a new access token."
                raise fault(401, message, "refresh_token_reused")
            if wish["refresh_token"] != self.refresh_token:
                raise fault(401, "Your refresh token has been invalidated.", "refresh_token_invalidated")
            self._spent.add(self.refresh_token)
            self.refreshes += 1
            return {
                **self._issue(),
                "token_type": "Bearer",
                "expires_in": int(self.expires_in),
                "scope": "openid",
            }

    def usercode(self, exchange: Exchange) -> None:
        """Answer the first step of the device sign-in."""
        if not self.device_enabled:
            raise detail(404, "Not Found")
        if parse_json(exchange.request.body) != {"client_id": CLIENT_ID}:
            raise fault(400, "client_id is wanted, and nothing else", "invalid_request")
        with self.lock:
            number = next(COUNTER)
            self._device = {"device_auth_id": f"deviceauth_{number}", "user_code": f"WIRE-{number:05d}"}
            exchange.json(200, {**self._device, "interval": self.device_interval})

    def device_token(self, exchange: Exchange) -> None:
        """Answer a poll: 403 until the person has typed the code."""
        with self.lock:
            if not self._device or parse_json(exchange.request.body) != self._device:
                raise fault(400, "not the device that asked", "invalid_request")
            if not self._approved:
                raise fault(403, "Device authorization is pending.", "deviceauth_authorization_pending")
            verifier = f"verifier-{self._device['device_auth_id']}"
            challenge = b64url(hashlib.sha256(verifier.encode()).digest())
            code = f"ac_{self._device['device_auth_id']}"
            exchange.json(
                200, {"authorization_code": code, "code_challenge": challenge, "code_verifier": verifier}
            )

    def _exchange_code(self, form: dict[str, str]) -> Event:
        with self.lock:
            device = self._device.get("device_auth_id")
            expected = {
                "grant_type": "authorization_code", "client_id": CLIENT_ID, "code": f"ac_{device}",
                "redirect_uri": f"{self.token_issuer}/deviceauth/callback",
                "code_verifier": f"verifier-{device}",
            }
            if not self._approved or form != expected:
                raise fault(400, "bad code exchange", "invalid_grant")
            self._device, self._approved = {}, False
            return {**self._issue(), "token_type": "Bearer"}


def auth_json(backend: SignIn, **overrides: Any) -> Event:
    """Return the sign-in file that Codex writes, with keys that the bridge does not know.

    An override replaces a key; the one of `tokens` is merged into it.
    """
    tokens = {
        **backend.tokens, "account_id": backend.account_id, "oauth_provenance": {"flow": "browser"},
        "login_owner_id": "owner-wire", **overrides.pop("tokens", {}),
    }
    return {
        "auth_mode": "chatgpt", "OPENAI_API_KEY": None, "tokens": tokens,
        "last_refresh": "2026-11-22T05:38:54.757848000Z", "agent_identity": {"kept": True}, **overrides,
    }


def write_auth(path: str | os.PathLike[str], backend: SignIn, **overrides: Any) -> None:
    """Write `auth_json` to `path`, mode 0600, in one step as Codex does."""
    temporary = f"{os.fspath(path)}.{next(COUNTER)}.tmp"
    number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(number, "wb") as file:
        file.write(json.dumps(auth_json(backend, **overrides), indent=2).encode())
    os.replace(temporary, path)
