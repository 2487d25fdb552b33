"""Room errors: every class, its status and its code."""

from __future__ import annotations

import pytest

import qoo_bridge as q

KINDS: list[tuple[type[q.BridgeError], int, str, str]] = [
    (q.BridgeError, 500, "internal_error", "server_error"),
    (q.InvalidRequest, 400, "invalid_request", "invalid_request_error"),
    (q.MalformedHttp, 400, "malformed_http", "invalid_request_error"),
    (q.NotSignedIn, 401, "not_signed_in", "authentication_error"),
    (q.InvalidKey, 401, "invalid_api_key", "authentication_error"),
    (q.MissingKey, 401, "invalid_api_key", "authentication_error"),
    (q.Forbidden, 403, "forbidden", "permission_error"),
    (q.NotFound, 404, "not_found", "invalid_request_error"),
    (q.MethodNotAllowed, 405, "method_not_allowed", "invalid_request_error"),
    (q.SlowRequest, 408, "request_timeout", "invalid_request_error"),
    (q.BodyTooLarge, 413, "body_too_large", "invalid_request_error"),
    (q.TargetTooLong, 414, "target_too_long", "invalid_request_error"),
    (q.UnsupportedEncoding, 415, "unsupported_encoding", "invalid_request_error"),
    (q.UpgradeRequired, 426, "upgrade_required", "invalid_request_error"),
    (q.TooManyRequests, 429, "too_many_requests", "rate_limit_error"),
    (q.HeadTooLarge, 431, "head_too_large", "invalid_request_error"),
    (q.UnknownCoding, 501, "not_implemented", "invalid_request_error"),
    (q.BadUpstream, 502, "upstream_error", "upstream_error"),
    (q.Overloaded, 503, "bridge_overloaded", "server_error"),
    (q.UpstreamTimeout, 504, "upstream_timeout", "upstream_error"),
    (q.VersionNotSupported, 505, "http_version_not_supported", "invalid_request_error"),
]


@pytest.mark.parametrize(("kind", "status", "code", "type_"), KINDS)
def test_kinds(kind: type[q.BridgeError], status: int, code: str, type_: str) -> None:
    error = kind("why")
    assert (error.status, error.by, str(error)) == (status, "bridge", "why")
    assert error.body() == {"error": {"message": "why", "type": type_, "param": None, "code": code}}


def test_every_kind_stands_in_the_table() -> None:
    found = {kind for kind in vars(q).values() if isinstance(kind, type) and issubclass(kind, q.BridgeError)}
    assert {row[0] for row in KINDS} == found - {q.UpstreamRefusal}


def test_parameter_and_retry_after() -> None:
    error = q.Overloaded("full", param="model", retry_after=0)
    assert error.body()["error"]["param"] == "model"
    assert error.headers == {"retry-after": "0"}
    assert q.BridgeError("x").headers == {}


def test_headers_that_an_error_brings() -> None:
    assert q.InvalidKey("x").headers == {"www-authenticate": 'Bearer realm="qoo-bridge"'}
    assert q.UpgradeRequired("x").headers == {
        "sec-websocket-version": "13", "upgrade": "websocket", "connection": "Upgrade"}
