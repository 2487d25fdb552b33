"""Room telemetry: records, counters, the log line's text, metrics."""

from __future__ import annotations

import json
import re
import threading
import time
from email.message import Message
from typing import Any

import pytest
import wire
from conftest import LogLines, RunningBridge, Start
from help import CODEX, KEY, NOW, STREAM, Object, ask, bearer, finished, record, until

import qoo_bridge
import qoo_bridge as q
from qoo_bridge import Telemetry, log_line, metrics_text, parse_rate_limits

HOSTILE_TEXTS = [
    'a" b="c',
    "back\\slash\\",
    "line\nqoo_bridge_requests_total 99",
    "cr\r\nlf\u2028\u2029\x85",
    "\x00\x1b[31m\x7f",
    "\ud800 lone surrogate",
    "\u202egnp.exe",
    "<script>alert(1)</script>",
    "{}#,=",
    "W" * 100_000,
]
SAMPLE = re.compile(
    r"(?P<name>qoo_bridge_[a-z_]+)"
    r'(?:\{(?P<labels>[a-z_]+="(?:[^"\\\n]|\\[\\"n])*"(?:,[a-z_]+="(?:[^"\\\n]|\\[\\"n])*")*)\})?'
    r" (?P<value>[0-9.e+-]+)"
)
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')


def samples(telemetry: Telemetry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Read /metrics back; fails at a line that is neither a comment nor one well-formed sample."""
    found = {}
    for line in metrics_text(telemetry.snapshot(NOW)).encode().decode().split("\n")[:-1]:
        if line.startswith(("# HELP qoo_bridge_", "# TYPE qoo_bridge_")):
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        key = match["name"], tuple(sorted(LABEL.findall(match["labels"] or "")))
        assert key not in found, line
        found[key] = float(match["value"])
    return found


def sample(telemetry: Telemetry, name: str, **labels: str) -> float:
    """Add up the samples of a metric that carry these labels."""
    wanted = set(labels.items())
    return sum(n for (each, of), n in samples(telemetry).items() if each == name and wanted <= set(of))


def test_log_line_says_everything_in_order() -> None:
    line = log_line(
        record(
            key="laptop",
            rules=("system-to-developer", "drop-unsupported"),
            repairs=("strict-continuity",),
            first_byte=0.1204,
            events=7,
            bytes=900,
            usage={"input": 10, "cached": 4, "output": 3, "reasoning": 1},
        )
    )
    assert line == (
        "r1 192.168.1.20/laptop POST /v1/responses local_md->gpt-5.5"
        " rules=system-to-developer,drop-unsupported repairs=strict-continuity status=200"
        " first_byte=120ms total=2000ms events=7 bytes=900"
        " tokens=input:10,cached:4,output:3,reasoning:1 cached=40% end=completed"
    )


def test_log_line_of_an_empty_record() -> None:
    line = log_line(record(id="", client="", method="", path="", model="", slug="", status=0, total=0.0,
                           end=""))
    assert line == (
        "- - - - status=0 total=0ms bytes=0 end=-"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"status": 502, "error_by": "bridge", "error_code": "upstream_timeout"}, "bridge:upstream_timeout"),
        ({"status": 404}, "upstream:http_404"),
        ({"end": "cut"}, "upstream:cut"),
        ({"end": "failed", "error_code": "rate limit\n"}, r"upstream:rate\x20limit\n"),
    ],
)
def test_log_line_names_the_error(fields: dict[str, Any], said: str) -> None:
    assert log_line(record(**fields)).endswith(f" error={said}")


@pytest.mark.parametrize("end", ["completed", "incomplete", "client-left"])
def test_these_ends_are_no_errors(end: str) -> None:
    assert "error=" not in log_line(record(end=end))


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
@pytest.mark.parametrize("name", ["client", "method", "path", "model", "slug", "end"])
def test_log_line_is_one_printable_ascii_line(name: str, text: str) -> None:
    plain, line = log_line(record()), log_line(record(**{name: text}))
    assert line.isascii() and line.isprintable()
    assert line.count(" ") == plain.count(" ")
    assert len(line) < 1500


@pytest.mark.parametrize(
    "value", [None, True, 1.5, [], ["a", {}], {"a": 1}, -1, pytest.param(10**400, id="huge")]
)
@pytest.mark.parametrize("name", ["client", "key", "path", "model", "slug", "end", "error_code", "usage"])
def test_no_json_value_breaks_anything(name: str, value: Any) -> None:
    odd = {"input": value, "output": 5} if name == "usage" else value
    hostile = record(**{name: odd, "rules": (value,), "repairs": (value,)})
    telemetry = finished(hostile)
    telemetry.begin(hostile)
    log_line(hostile)
    json.dumps(telemetry.snapshot(NOW), allow_nan=False)
    assert sample(telemetry, "qoo_bridge_requests_total") == 1


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_metrics_and_status_bear_hostile_texts(text: str) -> None:
    names = ("client", "key", "path", "model", "slug", "end", "error_code")
    hostile = record(error_by="upstream", **dict.fromkeys(names, text))
    telemetry = finished(hostile)
    telemetry.begin(hostile)
    telemetry.count("refreshes", reason=text)
    status = json.dumps(telemetry.snapshot(NOW), ensure_ascii=False).encode()
    assert len(status) < 20_000
    assert all(c.isprintable() for c in status.decode())
    assert sample(telemetry, "qoo_bridge_requests_total") == 1
    assert sample(telemetry, "qoo_bridge_refreshes_total") == 1


def test_metrics_escape_labels() -> None:
    found = samples(finished(record(slug='a\\b"c')))
    assert ("qoo_bridge_requests_total", (("client", "192.168.1.20"), ("model", r"a\\b\"c"))) in found


@pytest.mark.parametrize("count", [-1, True, 1.5, 2**53, "7", None])
def test_a_usage_that_is_no_count_is_not_added(count: Any) -> None:
    telemetry = finished(record(usage={"input": count, "output": 5, "else": 9}))
    assert telemetry.snapshot(NOW)["recent"][0]["usage"] == {"output": 5}
    assert sample(telemetry, "qoo_bridge_tokens_total") == 5


def test_totals_by_client_and_model() -> None:
    usage = {"input": 5, "cached": 4, "output": 2, "reasoning": 1}
    telemetry = finished(
        record(key="laptop", events=3, bytes=30, usage=usage),
        record(key="laptop", slug="gpt-5.5-mini", events=1, status=429, error_by="upstream"),
        record(events=1),
    )
    clients = telemetry.snapshot(NOW)["clients"]
    assert [(row["client"], row["requests"], row["failed_requests"]) for row in clients] == [
        ("laptop", 2, 1),
        ("192.168.1.20", 1, 0),
    ]
    sums = {"requests": 2, "failed_requests": 1, "events": 4, "sent_bytes": 30}
    assert clients[0] == {"client": "laptop", **sums, **usage, "cached_share": 0.8}
    assert telemetry.snapshot(NOW)["totals"]["events"] == 5
    assert sample(telemetry, "qoo_bridge_requests_total", client="laptop", model="gpt-5.5-mini") == 1
    assert sample(telemetry, "qoo_bridge_tokens_total", client="laptop", kind="cached") == 4
    assert sample(telemetry, "qoo_bridge_sent_bytes_total", model="gpt-5.5") == 30
    assert sample(telemetry, "qoo_bridge_responses_total", status="429") == 1


def test_errors_by_kind() -> None:
    bad_gateway = {"status": 502, "error_by": "bridge", "error_code": "upstream_unreachable"}
    telemetry = finished(record(**bad_gateway), record(**bad_gateway), record(end="cut"), record())
    assert telemetry.snapshot(NOW)["errors"] == [
        {"by": "bridge", "code": "upstream_unreachable", "count": 2},
        {"by": "upstream", "code": "cut", "count": 1},
    ]
    assert sample(telemetry, "qoo_bridge_errors_total", by="bridge") == 2


def test_count_adds_up_by_labels_in_any_order() -> None:
    telemetry = Telemetry()
    telemetry.count("repairs", repair="strict-continuity", slug="gpt-5.5")
    telemetry.count("repairs", 4, slug="gpt-5.5", repair="strict-continuity")
    telemetry.count("repairs", repair="drop-parameter", slug="gpt-5.5")
    assert sample(telemetry, "qoo_bridge_repairs_total", repair="strict-continuity") == 5
    assert sample(telemetry, "qoo_bridge_repairs_total", slug="gpt-5.5") == 6


@pytest.mark.parametrize("name", ["client", "slug", "path", "end", "error_code"])
def test_a_label_takes_a_bounded_number_of_values(name: str) -> None:
    many = 3 * qoo_bridge.LABEL_VALUES
    telemetry = finished(*(record(**{name: f"v{i}", "status": 500}) for i in range(many)))
    text = metrics_text(telemetry.snapshot(NOW))
    assert len(set(re.findall(r'"v\d+"', text))) == qoo_bridge.LABEL_VALUES
    assert '"other"' in text
    assert sample(telemetry, "qoo_bridge_requests_total") == many


@pytest.mark.parametrize("name", ["client", "slug", "path"])
def test_what_the_bridge_refused_claims_no_label_value(name: str) -> None:
    refused = {"status": 404, "error_by": "bridge", "error_code": "unknown_path"}
    scans = [record(**{name: f"scan{i}"}, **refused) for i in range(100)]
    mine, later = record(**{name: "mine"}), record(**{name: "later"})
    telemetry = finished(mine, *scans, later, record(**{name: "mine"}, **refused))
    text = metrics_text(telemetry.snapshot(NOW))
    assert "scan" not in text
    assert '"mine"' in text and '"later"' in text
    assert telemetry.snapshot(NOW)["recent"][2]["status"] == 404


def test_histogram_buckets_sum_and_count() -> None:
    totals = [0.01, 0.05, 0.0501, 7.0, 601.0]
    records = [record(total=total, first_byte=total / 2) for total in totals]
    found = samples(finished(*records, record(path="/v1/models")))

    path = ("path", "/v1/responses")
    for bound, below in {"0.05": 2, "0.1": 3, "5.0": 3, "10.0": 4, "600.0": 4, "+Inf": 5}.items():
        assert found["qoo_bridge_request_seconds_bucket", (("le", bound), path)] == below
    assert found["qoo_bridge_request_seconds_count", (path,)] == 5
    assert found["qoo_bridge_request_seconds_sum", (path,)] == pytest.approx(sum(totals))
    assert found["qoo_bridge_first_byte_seconds_sum", (path,)] == pytest.approx(sum(totals) / 2)
    buckets = [n for (name, of), n in found.items() if "_bucket" in name and ("path", "/v1/models") in of]
    assert len(buckets) == len(qoo_bridge.BUCKETS) + 1
    assert buckets == sorted(buckets) and buckets[-1] == 1


def test_a_reply_without_a_byte_is_in_no_first_byte_histogram() -> None:
    assert sample(finished(record(first_byte=None)), "qoo_bridge_first_byte_seconds_count") == 0


def test_hour_is_sixty_minutes_up_to_now() -> None:
    hour = Telemetry().snapshot(NOW + 59.9)["hour"]
    assert [minute["time"] for minute in hour] == [NOW - 60 * back for back in range(59, -1, -1)]


def test_hour_sums_by_minute_and_rolls_over() -> None:
    telemetry = finished(record(usage={"input": 10, "cached": 9, "output": 5, "reasoning": 4}))
    telemetry.finish(record(end="cut"), NOW + 59)
    telemetry.finish(record(), NOW + 60)
    hour = telemetry.snapshot(NOW + 60)["hour"]
    assert hour[-2] == {"time": NOW, "requests": 2, "errors": 1, "tokens": 15}
    assert hour[-1] == {"time": NOW + 60, "requests": 1, "errors": 0, "tokens": 0}
    assert telemetry.snapshot(NOW + 59 * 60)["hour"][0]["requests"] == 2
    assert telemetry.snapshot(NOW + 60 * 60)["hour"][0]["requests"] == 1
    assert sum(minute["requests"] for minute in telemetry.snapshot(NOW + 61 * 60)["hour"]) == 0


@pytest.mark.parametrize("step", [60, 61, -60, 86400])
def test_minutes_kept_are_bounded(step: int) -> None:
    telemetry = Telemetry()
    for i in range(200):
        telemetry.finish(record(), NOW + i * step)
    assert len(telemetry._minutes) <= qoo_bridge.HOUR_MINUTES
    assert telemetry.snapshot(NOW + 199 * step)["hour"][-1]["requests"] == 1


def test_open_streams_come_and_go() -> None:
    telemetry = Telemetry()
    running = record(id="r7", key="laptop", started=time.monotonic() - 5)
    telemetry.begin(running)
    running.events = 12
    (row,) = telemetry.snapshot(NOW)["open"]
    assert (row["id"], row["slug"], row["key"], row["events"]) == ("r7", "gpt-5.5", "laptop", 12)
    assert 5 <= row["age"] < 60
    assert "started" not in row
    assert sample(telemetry, "qoo_bridge_open_streams") == 1
    telemetry.finish(running, NOW)
    assert telemetry.snapshot(NOW)["open"] == []


def test_recent_requests_newest_first_and_bounded() -> None:
    telemetry = Telemetry()
    for i in range(2 * qoo_bridge.RECENT_REQUESTS):
        telemetry.finish(record(id=f"r{i}", rules=("drop-unsupported",)), NOW + i)
    recent = telemetry.snapshot(NOW)["recent"]
    assert len(recent) == qoo_bridge.RECENT_REQUESTS
    assert (recent[0]["id"], recent[0]["time"]) == ("r99", NOW + 99)
    assert recent[0]["rules"] == ["drop-unsupported"]


def test_finish_of_a_request_that_never_began() -> None:
    telemetry = Telemetry()
    telemetry.finish(record(status=403, error_by="bridge", error_code="network_not_allowed"), NOW)
    assert telemetry.snapshot(NOW)["totals"]["failed_requests"] == 1


@pytest.mark.parametrize("path", ["/", "/status", "/v1/status/", "/metrics", "/healthz"])
def test_asking_about_the_bridge_is_no_traffic(path: str) -> None:
    telemetry = Telemetry()
    telemetry.begin(record(path=path))
    assert telemetry.snapshot(NOW)["open"] == []
    telemetry.finish(record(path=path), NOW)
    shown = telemetry.snapshot(NOW)
    assert (shown["recent"], shown["hour"][-1]["requests"], shown["counters"]) == ([], 0, [])
    telemetry.finish(record(path=path, status=401, error_by="bridge"), NOW)
    assert telemetry.snapshot(NOW)["recent"][0]["status"] == 401


@pytest.mark.parametrize("path", ["/v1/responses/", "/v1/models", "/statuses", "/v1/models/status-1"])
def test_any_other_path_is_traffic(path: str) -> None:
    telemetry = Telemetry()
    telemetry.begin(record(path=path))
    assert len(telemetry.snapshot(NOW)["open"]) == 1


def test_snapshot_belongs_to_the_caller() -> None:
    telemetry = finished(record())
    first = telemetry.snapshot(NOW)
    first["sign_in"] = {"state": "ok"}
    first["hour"][-1]["requests"] = first["clients"][0]["requests"] = 99
    first["histograms"][0]["counts"].clear()
    second = telemetry.snapshot(NOW)
    assert "sign_in" not in second
    assert second["hour"][-1]["requests"] == second["clients"][0]["requests"] == 1
    assert sample(telemetry, "qoo_bridge_request_seconds_count") == 1


def test_version_and_uptime() -> None:
    telemetry = Telemetry()
    first, second = telemetry.snapshot(NOW)["uptime"], telemetry.snapshot(NOW)["uptime"]
    assert 0 <= first <= second
    assert sample(telemetry, "qoo_bridge_info", version=qoo_bridge.__version__) == 1


def test_threads_lose_no_count() -> None:
    telemetry, rounds, start = Telemetry(), 300, threading.Barrier(5)

    def work(name: str) -> None:
        start.wait(10)
        for i in range(rounds):
            each = record(id=f"{name}{i}", key=name, events=2)
            telemetry.begin(each)
            telemetry.count("refreshes")
            telemetry.finish(each, NOW)

    threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    start.wait(10)
    while any(thread.is_alive() for thread in threads):
        metrics_text(telemetry.snapshot(NOW))
    totals = telemetry.snapshot(NOW)["totals"]
    assert (totals["requests"], totals["events"]) == (4 * rounds, 8 * rounds)
    assert sample(telemetry, "qoo_bridge_refreshes_total") == 4 * rounds
    assert sample(telemetry, "qoo_bridge_request_seconds_count") == 4 * rounds

LIMIT_HEADERS = {
    "X-Codex-Primary-Used-Percent": "42.5",
    "x-codex-primary-window-minutes": "300",
    "x-codex-primary-reset-at": "1795392228",
    "x-codex-secondary-used-percent": " 7 ",
    "x-codex-secondary-window-minutes": "10080",
    "x-codex-secondary-reset-at": "1795678576",
    "x-codex-plan-type": "pro",
    "x-codex-credits-has-credits": "True",
    "x-codex-credits-balance": "12.50",
    "content-type": "text/event-stream",
}
LIMITS = {
    "primary": {"used_percent": 42.5, "window_minutes": 300.0, "reset_at": 1795392228.0},
    "secondary": {"used_percent": 7.0, "window_minutes": 10080.0, "reset_at": 1795678576.0},
    "plan_type": "pro",
    "credits": {"has_credits": "True", "balance": "12.50"},
}


def test_rate_limits_are_read_from_a_header() -> None:
    message = Message()
    for name, value in LIMIT_HEADERS.items():
        message[name] = value
    assert parse_rate_limits(LIMIT_HEADERS) == LIMITS
    assert parse_rate_limits(message) == LIMITS  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad", ["nan", "inf", "-1", "+1", "1_0", "1e3", "\u0663", "", "9" * 400, "4 2", "0x2a", None, 7]
)
def test_a_bad_limit_is_left_out(bad: Any) -> None:
    assert "primary" not in parse_rate_limits({**LIMIT_HEADERS, "X-Codex-Primary-Used-Percent": bad})
    limits = parse_rate_limits({**LIMIT_HEADERS, "x-codex-secondary-reset-at": bad})
    assert limits["secondary"] == {**LIMITS["secondary"], "reset_at": None}  # type: ignore[dict-item]


def test_rate_limits_stay_until_they_are_told_anew() -> None:
    telemetry = Telemetry()
    telemetry.rate_limits(LIMIT_HEADERS, NOW)
    telemetry.rate_limits({"content-type": "application/json"}, NOW + 5)
    assert telemetry.snapshot(NOW)["rate_limits"] == {**LIMITS, "seen": NOW}
    telemetry.rate_limits({"x-codex-primary-used-percent": "43"}, NOW + 9)
    limits = telemetry.snapshot(NOW)["rate_limits"]
    assert limits["primary"]["used_percent"] == 43
    assert ("secondary" in limits, limits["seen"]) == (False, NOW + 9)
    assert limits["credits"] == LIMITS["credits"]


def test_rate_limit_gauges() -> None:
    telemetry = Telemetry()
    telemetry.rate_limits(LIMIT_HEADERS, NOW)
    gauges: dict[str, dict[str, float]] = {
        "used_ratio": {"primary": 0.425, "secondary": 0.07},
        "window_seconds": {"primary": 18000, "secondary": 604800},
        "reset_timestamp_seconds": {"primary": 1795392228, "secondary": 1795678576},
    }
    for name, values in gauges.items():
        for window, value in values.items():
            assert sample(telemetry, f"qoo_bridge_rate_limit_{name}", window=window) == value


def test_every_family_stands_once_with_help_and_type() -> None:
    telemetry = finished(record(first_byte=1.0, end="cut", usage={"input": 1}))
    telemetry.rate_limits(LIMIT_HEADERS, NOW)
    telemetry.count("refreshes")
    text = metrics_text(telemetry.snapshot(NOW))
    helped = re.findall(r"^# HELP qoo_bridge_(\S+) (.+)$", text, re.MULTILINE)
    typed = re.findall(r"^# TYPE qoo_bridge_(\S+) (?:counter|gauge|histogram)$", text, re.MULTILINE)
    assert [name for name, _ in helped] == typed
    assert len(set(typed)) == len(typed)
    assert ("refreshes_total", "refreshes total") in helped
    assert set(qoo_bridge.METRIC_HELP.items()) < set(helped)
    assert text.endswith("\n") and "\n\n" not in text


# -- the cached share a client -----------------------------------------------------------


def counted(tokens: int, cached: int) -> wire.Reply:
    """Answer a turn that cost so much."""
    *events, last = wire.text_turn("hi")
    usage = {**wire.USAGE, "input_tokens": tokens, "input_tokens_details": {"cached_tokens": cached}}
    return wire.turn(*events, {**last, "response": {**last["response"], "usage": usage}})


def test_status_shows_each_clients_cached_share(start: Start, backend: wire.Backend) -> None:
    bridge = start("--api-key", f"ann={KEY}", "--api-key", f"bo={KEY}-of-bo", "--api-key", f"cy={KEY}-of-cy")
    backend.on("/responses", counted(100, 0), counted(300, 300), counted(50, 0),
               wire.turn(wire.created(), wire.failed("server_error", "x")))
    for secret in (KEY, KEY, f"{KEY}-of-bo", f"{KEY}-of-cy"):
        ask(bridge, STREAM, bearer(secret))
    assert until(lambda: wire.get(bridge.address, "/status", bearer(KEY)).json["totals"]["requests"] == 4)
    status = wire.get(bridge.address, "/status", bearer(KEY)).json
    shares = {row["client"]: row["cached_share"] for row in status["clients"]}
    assert shares == {"ann": pytest.approx(0.75, abs=0.01), "bo": 0, "cy": None}


def test_the_page_shows_each_clients_cached_share() -> None:
    (column,) = re.findall(r'\["Cached"[^\]]*\]', q.PAGE_SCRIPT)
    assert re.search(r"percent\(|cached_share", column)


@pytest.mark.parametrize(("usage", "said"), [
    ({"input": 1000, "cached": 940, "output": 5}, "94 %"), ({"input": 1000, "cached": 0}, "0 %"),
    ({"input": 3, "cached": 2}, "67 %"), ({"input": 1000, "cached": 1000}, "100 %"),
])
def test_the_log_line_says_what_share_was_cached(usage: dict[str, int], said: str) -> None:
    assert said.replace(" ", "") in q.log_line(record(usage=usage)).replace(" %", "%")


@pytest.mark.parametrize("usage", [{}, {"input": 0, "cached": 0}, {"input": 5}, {"cached": 5}])
def test_the_log_line_says_nothing_of_a_share_that_is_none(usage: dict[str, int]) -> None:
    assert "%" not in q.log_line(record(usage=usage))


def test_a_second_turn_is_seen_to_be_cached(bridge: RunningBridge, log_lines: LogLines) -> None:
    for _ in range(2):
        ask(bridge, STREAM, input="word " * 2000)
    assert until(lambda: len(log_lines.ended()) == 2)
    (client,) = wire.get(bridge.address, "/status").json["clients"]
    assert 0.4 < client["cached_share"] < 0.55  # nothing of the first turn, all of the second



# -- the plan's windows ------------------------------------------------------------------------


def head(*windows: str) -> list[tuple[str, str]]:
    """Return a head that tells of these windows."""
    columns = {"used-percent": "12.5", "window-minutes": "300", "reset-at": "1795346042"}
    return [*wire.SSE_HEADERS, ("x-codex-plan-type", "pro"), *(
        (f"x-codex-{window}-{name}", value) for window in windows for name, value in columns.items())]


@pytest.mark.parametrize(("heads", "windows"), [
    ([("primary", "secondary"), ("primary",)], ["primary"]),
    ([("primary",), ("primary", "secondary")], ["primary", "secondary"]),
    ([("primary", "secondary"), ("secondary",)], ["secondary"]),
    ([("primary", "secondary"), ()], ["primary", "secondary"]),  # says nothing of them
])
def test_a_window_that_upstream_no_longer_tells_of_is_gone(
    bridge: RunningBridge, backend: wire.Backend, heads: list[tuple[str, ...]], windows: list[str]
) -> None:
    for names in heads:
        backend.on("/responses", wire.turn(*wire.text_turn("hi"), headers=head(*names)))
        ask(bridge, STREAM)
    limits = wire.get(bridge.address, "/status").json["rate_limits"]
    assert [name for name in ("primary", "secondary") if limits.get(name)] == windows
    gauges = wire.get(bridge.address, "/metrics").body.decode()
    assert [name for name in ("primary", "secondary")
            if f'rate_limit_used_ratio{{window="{name}"}}' in gauges] == windows


FRAME = wire.rate_limits_frame({"used_percent": 40, "window_minutes": 1440, "reset_at": 1795346042})


@pytest.mark.parametrize("headers", [CODEX, {}], ids=["codex", "sdk"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_limits_in_an_event_of_a_stream_are_read_too(
    bridge: RunningBridge, backend: wire.Backend, stream: bool, headers: dict[str, str]
) -> None:
    backend.on("/responses", wire.turn(FRAME, *wire.text_turn("hi")))
    assert ask(bridge, STREAM, headers, stream=stream).status == 200
    limits: Object = wire.get(bridge.address, "/status").json["rate_limits"]
    assert limits["primary"] == {"used_percent": 40, "window_minutes": 1440, "reset_at": 1795346042}
    assert not limits.get("secondary")


@pytest.mark.parametrize("credits", [
    {"has_credits": True, "unlimited": False, "balance": "12.50"}, None, 5, {"balance": None},
])
def test_credits_in_an_event_are_read_or_left_out(
    bridge: RunningBridge, backend: wire.Backend, credits: Any
) -> None:
    backend.on("/responses", wire.turn({**FRAME, "credits": credits}, *wire.text_turn("hi")))
    ask(bridge, STREAM, CODEX)
    limits = wire.get(bridge.address, "/status").json["rate_limits"]
    assert limits["primary"]["used_percent"] == 40
    if isinstance(credits, dict) and credits["balance"]:
        assert limits["credits"]["balance"] == "12.50"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/client-config/codex", "/healthz"])
def test_log_line_without_a_model_is_readable(path: str) -> None:
    line = q.log_line(record(method="GET", path=path, model="", slug="", end="completed"))
    assert "->" not in line
    assert not re.search(r"=-(?: |$)", line)  # what there is not is not named
    for fact in (f"GET {path} ", "status=200", "total=2000ms", "end=completed"):
        assert fact in line


@pytest.mark.parametrize(("model", "slug", "said"), [
    ("local_md", "gpt-5.6-sol", " local_md->gpt-5.6-sol "), ("gpt-5.5", "gpt-5.5", " gpt-5.5->gpt-5.5 "),
    ("local_md", "", " local_md->- "),  # it never went up
])
def test_log_line_of_a_model_says_what_became_of_it(model: str, slug: str, said: str) -> None:
    assert said in q.log_line(record(model=model, slug=slug))


@pytest.mark.parametrize("waiting", [False, True])
def test_a_request_that_waits_is_shown_as_waiting(waiting: bool) -> None:
    telemetry, one = q.Telemetry(), record(waiting=waiting)
    telemetry.begin(one)
    (row,) = telemetry.snapshot(NOW)["open"]
    assert row["waiting"] is waiting
    one.waiting = False
    telemetry.finish(one, NOW)
    assert "waiting" not in telemetry.snapshot(NOW)["recent"][0]
    assert "qoo_bridge_waiting_requests" in q.metrics_text(telemetry.snapshot(NOW))
