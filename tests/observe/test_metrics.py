"""Metric names that dashboards rely on, and the figures behind them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from fastmesh._ext.counters import (
    HOP_NAMES,
    PROCESS_NAMES,
    ROW_NAMES,
    Reading,
    ThreadCounters,
    hop_bounds_ns,
)
from fastmesh.control.snapshot import RowLabel
from fastmesh.limits import NO_ROUTE_NAME as NO_ROUTE
from fastmesh.observe import metrics
from fastmesh.observe.metrics import Situation, cumulative, render

ROWS = {
    RowLabel("listener", "rpc", NO_ROUTE): 2,
    RowLabel("route", "rpc", "com.example.*", "orders"): 3,
    RowLabel("cluster", cluster="orders"): 4,
    RowLabel("endpoint", cluster="orders", endpoint="127.0.0.1:1"): 5,
    RowLabel("endpoint", cluster="orders", endpoint="127.0.0.1:2"): 6,
}
SITUATION = Situation(
    ROWS.items(), ["rpc"], [("orders", "127.0.0.1:1")], node="n1", config_version=3
)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(counted: ThreadCounters, situation: Situation = SITUATION) -> Samples:
    counted.ask()
    counted.copy()
    reading = Reading()
    counted.read_into(reading)
    text = render(reading, situation).decode()
    return {
        (s.name, tuple(sorted((k, v) for k, v in s.labels.items() if v))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def at(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


ROUTE = {"direction": "request", "listener": "rpc", "route": "com.example.*", "cluster": "orders"}


def test_the_promised_names_are_there() -> None:
    samples = scrape(ThreadCounters())
    for name in ("accepted", "answered", "expired"):
        assert at(samples, f"fastmesh_requests_{name}_total", **ROUTE) == 0
    for cause in (
        "no_route",
        "no_endpoint",
        "overload",
        "connect",
        "upstream_lost",
        "client_gone",
        "undecodable",
    ):
        assert at(samples, "fastmesh_requests_failed_total", cause=cause, **ROUTE) == 0
    assert at(samples, "fastmesh_requests_in_flight", **ROUTE) == 0
    assert at(samples, "fastmesh_requests_in_flight", direction="push", cluster="orders") == 0
    for name in ("accepted", "forwarded", "dropped"):
        assert at(samples, f"fastmesh_oneway_{name}_total", **ROUTE) == 0
    for cause in ("late", "unknown", "duplicate", "client_gone", "malformed"):
        assert at(samples, "fastmesh_frames_dropped_total", cause=cause) == 0
    assert at(samples, "fastmesh_connections", listener="rpc") == 0
    assert at(samples, "fastmesh_upstream_up", cluster="orders", endpoint="127.0.0.1:1") == 0
    for hop in ("mesh", "upstream"):
        for bound in ("0.0001", "0.0002", "0.0005", "0.001", "0.002", "0.005", "10.0", "+Inf"):
            assert at(samples, "fastmesh_hop_seconds_bucket", hop=hop, le=bound) == 0
        assert at(samples, "fastmesh_hop_seconds_count", hop=hop) == 0
        assert at(samples, "fastmesh_hop_seconds_sum", hop=hop) == 0


def test_each_counter_arrives_under_its_own_name() -> None:
    """Every counter gets a value of its own; whatever is shown must be the right one."""
    counted = ThreadCounters()
    for row in (2, 3, 4, 5):
        for number, name in enumerate(ROW_NAMES):
            counted.add(row, name, row * 1000 + number)
    for number, name in enumerate(PROCESS_NAMES):
        counted.add_process(name, 100_000 + number)
    samples = scrape(counted)
    names = list(ROW_NAMES)

    def row(number: int, name: str) -> int:
        return number * 1000 + names.index(name)

    for cause in metrics.CAUSES:
        assert at(samples, "fastmesh_requests_failed_total", cause=cause, **ROUTE) == row(
            3, f"requests.failed.{cause}"
        )
        assert at(
            samples,
            "fastmesh_requests_failed_total",
            cause=cause,
            direction="push",
            cluster="orders",
        ) == row(4, f"pushes.failed.{cause}")
    unrouted = {"direction": "request", "listener": "rpc", "route": NO_ROUTE}
    assert at(samples, "fastmesh_requests_accepted_total", **unrouted) == row(
        2, "requests.accepted"
    )
    assert at(samples, "fastmesh_oneway_dropped_total", **ROUTE) == row(
        3, "requests.oneway_dropped"
    )
    assert at(samples, "fastmesh_connections", listener="rpc") == row(2, "connections")
    assert at(
        samples, "fastmesh_connections_closed_total", listener="rpc", reason="slow_consumer"
    ) == row(2, "closed.slow_consumer")
    which = {"cluster": "orders", "endpoint": "127.0.0.1:1"}
    assert at(samples, "fastmesh_upstream_up", **which) == 1
    assert at(samples, "fastmesh_upstream_connections", **which) == row(5, "up")
    assert at(samples, "fastmesh_upstream_requests_total", **which) == row(5, "sent")
    process = list(PROCESS_NAMES)
    for cause in metrics.DROPS:
        assert at(samples, "fastmesh_frames_dropped_total", cause=cause) == 100_000 + process.index(
            f"dropped.{cause}"
        )
    assert at(samples, "fastmesh_slow_consumers_total") == 100_000 + process.index("slow_consumers")
    assert at(samples, "fastmesh_buffer_bytes") == 100_000 + process.index("memory")


def test_all_that_is_read_exists_in_the_counters() -> None:
    assert set(metrics.HOPS) == set(HOP_NAMES)
    shown = {c for _, c, _ in (*metrics._PROCESS_COUNTERS, *metrics._PROCESS_GAUGES)}
    shown |= {f"dropped.{c}" for c in metrics.DROPS} | {f"malformed.{c}" for c in metrics.MALFORMED}
    assert set(PROCESS_NAMES) - shown == {"connections", "upstreams"}


def test_an_endpoint_that_is_gone_shows_no_gauge_but_keeps_its_counters() -> None:
    samples = scrape(ThreadCounters())
    gone = {"cluster": "orders", "endpoint": "127.0.0.1:2"}
    assert ("fastmesh_upstream_up", tuple(sorted(gone.items()))) not in samples
    assert at(samples, "fastmesh_upstream_requests_total", **gone) == 0


def test_what_has_no_row_of_its_own_is_other() -> None:
    counted = ThreadCounters()
    counted.add(1, "requests.accepted", 5)
    samples = scrape(counted)
    other = {
        "direction": "request",
        "listener": "__other__",
        "route": "__other__",
        "cluster": "__other__",
    }
    assert at(samples, "fastmesh_requests_accepted_total", **other) == 5


def test_labels_with_quotes_and_newlines_stay_labels() -> None:
    rows = {RowLabel("route", "rpc", 'a"\n\\b{x="y"}', "orders"): 2}
    samples = scrape(ThreadCounters(), Situation(rows.items(), [], []))
    labels = {**ROUTE, "route": 'a"\n\\b{x="y"}'}
    assert at(samples, "fastmesh_requests_accepted_total", **labels) == 0


def test_hop_buckets_never_flatter() -> None:
    counted = ThreadCounters()
    for ns in (1, 99_000, 100_000, 150_000, 3_000_000, 60_000_000_000):
        counted.record_hop("mesh", ns)
    samples = scrape(counted)
    got = {
        dict(labels)["le"]: value
        for (name, labels), value in samples.items()
        if name == "fastmesh_hop_seconds_bucket" and dict(labels)["hop"] == "mesh"
    }
    assert got["0.0001"] <= 3
    assert got["0.0001"] >= 1
    assert got["0.0005"] == 4
    assert got["0.005"] == 5
    assert got["10.0"] == 5
    assert got["+Inf"] == 6
    values = list(got.values())
    assert values == sorted(values)
    assert at(samples, "fastmesh_hop_seconds_sum", hop="mesh") * 1e9 == 60_003_349_001


def test_folding_takes_whole_buckets_only() -> None:
    bounds = [50_000, 100_000, 150_000, 250_000]
    assert cumulative([1, 2, 4, 8], bounds)[:3] == [("0.0001", 3), ("0.0002", 7), ("0.0005", 15)]
    assert len(hop_bounds_ns()) > 500
