"""Prometheus text from a reading of the counters.

Names and labels are a contract with dashboards (docs/admin.md). Labels come from the configuration,
never from traffic, so that their number is bounded by the counter rows; names beyond those are
`__other__`. prometheus_client is imported at the first scrape: it costs 5 MiB, which a mesh that
nobody scrapes does not pay.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fastmesh import limits
from fastmesh._version import __version__
from fastmesh.limits import OTHER_NAME as OTHER
from fastmesh.limits import ROW_OTHER
from fastmesh.observe.events import CLOSE_REASONS

if TYPE_CHECKING:
    from fastmesh._ext.counters import Reading

CAUSES = (
    "no_route",
    "no_endpoint",
    "overload",
    "connect",
    "upstream_lost",
    "client_gone",
    "undecodable",
)
DROPS = ("late", "unknown", "duplicate", "client_gone", "malformed")
MALFORMED = ("protocol", "type", "command", "length", "too_large", "checksum", "headers")
HOPS = ("mesh", "upstream", "queue")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

WHERE = ("direction", "listener", "route", "cluster")

# name, counter in a block, help
_LEDGER = (
    ("fastmesh_requests_accepted", "accepted", "Two-way requests taken over from whoever asked."),
    ("fastmesh_requests_answered", "answered", "Requests answered by who was asked."),
    ("fastmesh_requests_expired", "expired", "Requests that reached their deadline first."),
    ("fastmesh_requests_retried", "retried", "Requests moved to another endpoint, unsent."),
)
_ONEWAY = (
    ("fastmesh_oneway_accepted", "oneway_accepted", "Oneway frames taken over."),
    ("fastmesh_oneway_forwarded", "oneway_forwarded", "Oneway frames handed to the kernel."),
    ("fastmesh_oneway_dropped", "oneway_dropped", "Oneway frames that could not be forwarded."),
)
# name, process counter, help
_PROCESS_COUNTERS = (
    ("fastmesh_turns", "turns", "Turns of the engine threads."),
    ("fastmesh_waits", "waits", "epoll_wait calls."),
    ("fastmesh_reads", "reads", "recv calls."),
    ("fastmesh_writes", "writes", "send calls."),
    ("fastmesh_read_bytes", "read_bytes", "Bytes received."),
    ("fastmesh_written_bytes", "write_bytes", "Bytes handed to the kernel."),
    ("fastmesh_frames", "frames", "Frames parsed."),
    ("fastmesh_heartbeats_received", "heartbeats_in", "Heartbeats of others, answered locally."),
    ("fastmesh_heartbeats_sent", "heartbeats_out", "Own heartbeats on upstream connections."),
    ("fastmesh_goaways", "goaways", "Go-away frames received."),
    ("fastmesh_pauses", "pauses", "Times a client was paused over its quota."),
    ("fastmesh_shed", "shed", "Requests refused because a quota stayed full."),
    ("fastmesh_slow_consumers", "slow_consumers", "Connections closed: they did not read."),
    ("fastmesh_accept_pauses", "accept_pauses", "Times accepting paused (no descriptor)."),
    ("fastmesh_stalls", "stalls", "Turns that ran too long."),
    ("fastmesh_spins", "spins", "Waits that spun before blocking."),
    ("fastmesh_events_lost", "events_lost", "Samples and log events dropped (never frames)."),
    ("fastmesh_punt_ring_full", "punt_full", "Times a connection waited for the punt ring."),
    ("fastmesh_stale_handles", "stale_handle", "Commands for connections already gone."),
    ("fastmesh_allocations_refused", "alloc_refused", "Allocations over memory_bytes_max."),
    ("fastmesh_samples", "samples", "Requests sampled."),
    ("fastmesh_control_frames", "punted", "Frames that Python decided on."),
    ("fastmesh_control_calls", "calls", "Requests of the control plane: hello, announce, suspend."),
)
_PROCESS_GAUGES = (
    ("fastmesh_buffer_bytes", "memory", "Bytes of all buffers."),
    ("fastmesh_buffer_bytes_highest", "memory_max", "Highest bytes of all buffers so far."),
    ("fastmesh_timers", "timers", "Timers armed."),
    ("fastmesh_parked", "parked", "Frames that wait for a verdict."),
)
# name, row counter, help; of endpoint rows
_ENDPOINT_COUNTERS = (
    ("fastmesh_upstream_requests", "sent", "Requests that went to this endpoint."),
    ("fastmesh_upstream_connect_failures", "connect_failed", "Connects refused or timed out."),
    ("fastmesh_upstream_ejections", "ejections", "Times this endpoint was ejected."),
)


class Label(Protocol):
    """What a counter row stands for; "" where a label does not apply."""

    @property
    def kind(self) -> str:
        """listener | route | cluster | endpoint | group"""

    @property
    def listener(self) -> str: ...
    @property
    def route(self) -> str: ...
    @property
    def cluster(self) -> str: ...
    @property
    def endpoint(self) -> str: ...
    @property
    def app(self) -> str: ...
    @property
    def group(self) -> str: ...


DRAIN_STEPS = ("suspend", "answers", "clients", "done")
DRAIN_WAITS = ("brokers", "groups", "connections", "requests", "engine")


@dataclass(frozen=True, slots=True)
class DrainFigures:
    """Of the drain that is under way, or was last (fastmesh.handover.drain)."""

    step: str = "none"
    """none | one of DRAIN_STEPS"""
    safe: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long each step has taken so far."""
    waiting: Mapping[str, int] = field(default_factory=dict)
    """One of DRAIN_WAITS -> how many."""
    totals: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(step, outcome) -> over all drains of this process."""


HANDOVER_OUTCOMES = ("done", "refused", "failed")


@dataclass(frozen=True, slots=True)
class HandoverFigures:
    """Of upgrades, over all processes that handed over to each other (fastmesh.handover)."""

    totals: Mapping[str, int] = field(default_factory=dict)
    """One of HANDOVER_OUTCOMES -> how many."""
    pauses_s: Sequence[float] = ()
    """Of the upgrade that began this process, by engine thread; () when it began otherwise."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known beside the counters."""

    rows: Collection[tuple[Label, int]]
    listeners: Iterable[str]
    endpoints: Iterable[tuple[str, str]]
    """(cluster, endpoint) of the snapshot in force: what is gone shows no gauge."""
    node: str = ""
    state: str = "serving"
    config_version: int = 0
    config_sha256: str = ""
    uptime_s: float = 0.0
    log_lines_lost: int = 0
    handover: HandoverFigures = HandoverFigures()
    groups: Mapping[str, tuple[int, int]] | None = None
    """Of the message mesh: group -> (live connections, credit); None where there is none."""
    drain: DrainFigures = field(default_factory=DrainFigures)


class _Collector:
    """What prometheus_client asks for metric families."""

    def __init__(self, families: Callable[[], Iterator[Any]]) -> None:
        self.collect = families

    def describe(self) -> list[Any]:
        return []


def render(reading: Reading, situation: Situation) -> bytes:
    """The text of /metrics."""
    from prometheus_client.exposition import generate_latest
    from prometheus_client.registry import CollectorRegistry

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(lambda: _families(reading, situation)))
    return generate_latest(registry)


def _families(reading: Reading, now: Situation) -> Iterator[Any]:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    rows = {row: reading.row(row) for _, row in now.rows}
    rows[ROW_OTHER] = reading.row(ROW_OTHER)
    by_kind: dict[str, list[tuple[Label, dict[str, int]]]] = {}
    for label, row in now.rows:
        by_kind.setdefault(label.kind, []).append((label, rows[row]))
    other = rows[ROW_OTHER]
    ledgers = _ledgers(by_kind, other)

    for table in (_LEDGER, _ONEWAY):
        for name, counter, text in table:
            family = CounterMetricFamily(name, text, labels=WHERE)
            for labels, block, values in ledgers:
                family.add_metric(labels, values[f"{block}.{counter}"])
            yield family
    failed = CounterMetricFamily(
        "fastmesh_requests_failed",
        "Requests that the mesh answered itself, by cause.",
        labels=(*WHERE, "cause"),
    )
    for labels, block, values in ledgers:
        for cause in CAUSES:
            failed.add_metric([*labels, cause], values[f"{block}.failed.{cause}"])
    yield failed
    in_flight = GaugeMetricFamily(
        "fastmesh_requests_in_flight", "Requests accepted and not settled.", labels=WHERE
    )
    for labels, block, values in ledgers:
        in_flight.add_metric(labels, values[f"{block}.in_flight"])
    yield in_flight

    process = reading.process()
    dropped = CounterMetricFamily(
        "fastmesh_frames_dropped", "Frames dropped, by cause.", labels=["cause"]
    )
    for cause in DROPS:
        dropped.add_metric([cause], process[f"dropped.{cause}"])
    yield dropped
    malformed = CounterMetricFamily(
        "fastmesh_frames_malformed", "Malformed frames, by what is wrong.", labels=["error"]
    )
    for error in MALFORMED:
        malformed.add_metric([error], process[f"malformed.{error}"])
    yield malformed

    yield from _connection_families(by_kind, other, now)
    yield from _upstream_families(by_kind, now)
    if now.groups is not None:
        yield from _group_families(by_kind, other, now.groups)

    hop_bounds = _hop_bounds()
    hops = HistogramMetricFamily(
        "fastmesh_hop_seconds",
        "Time in the mesh, at the upstream, and in a write queue.",
        labels=["hop"],
    )
    for hop in HOPS:
        counts, sum_ns = reading.hop(hop)
        hops.add_metric([hop], cumulative(counts, hop_bounds), sum_ns / 1e9)
    yield hops

    for name, counter, text in _PROCESS_COUNTERS:
        yield CounterMetricFamily(name, text, value=process[counter])
    for name, counter, text in _PROCESS_GAUGES:
        yield GaugeMetricFamily(name, text, value=process[counter])
    yield GaugeMetricFamily(
        "fastmesh_upstream_connections_all", "Upstream connections.", value=process["upstreams"]
    )
    yield GaugeMetricFamily("fastmesh_uptime_seconds", "Since the start.", value=now.uptime_s)
    yield CounterMetricFamily(
        "fastmesh_log_lines_lost", "Log lines that nobody took.", value=now.log_lines_lost
    )
    yield from _drain_families(now.drain)
    upgrades = CounterMetricFamily(
        "fastmesh_upgrades", "Hand-overs to a successor, by how they ended.", labels=["outcome"]
    )
    for outcome in HANDOVER_OUTCOMES:
        upgrades.add_metric([outcome], now.handover.totals.get(outcome, 0))
    yield upgrades
    pause = GaugeMetricFamily(
        "fastmesh_upgrade_pause_seconds",
        "How long the traffic of an engine thread stood still when this process took over.",
        labels=["thread"],
    )
    for thread, pause_s in enumerate(now.handover.pauses_s):
        pause.add_metric([str(thread)], pause_s)
    yield pause
    info = GaugeMetricFamily(
        "fastmesh_info",
        "Always 1; the labels say what runs.",
        labels=["version", "node", "state", "config_version", "config_sha256"],
    )
    info.add_metric(
        [__version__, now.node, now.state, str(now.config_version), now.config_sha256], 1
    )
    yield info


def _ledgers(
    by_kind: Mapping[str, list[tuple[Label, dict[str, int]]]], other: dict[str, int]
) -> list[tuple[list[str], str, dict[str, int]]]:
    """(label values, block, counters): requests belong to routes (and to the listener, when no rule
    matched), pushes to clusters."""
    found = []
    for kind in ("listener", "route"):
        for label, values in by_kind.get(kind, ()):
            found.append(
                (["request", label.listener, label.route, label.cluster], "requests", values)
            )
    for label, values in by_kind.get("cluster", ()):
        found.append((["push", "", "", label.cluster], "pushes", values))
    found.append((["request", OTHER, OTHER, OTHER], "requests", other))
    found.append((["push", "", "", OTHER], "pushes", other))
    return found


def _connection_families(
    by_kind: Mapping[str, list[tuple[Label, dict[str, int]]]],
    other: dict[str, int],
    now: Situation,
) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    listeners = [(x.listener, values) for x, values in by_kind.get("listener", ())]
    listeners.append((OTHER, other))
    current = set(now.listeners) | {OTHER}
    gauge = GaugeMetricFamily(
        "fastmesh_connections", "Client connections open.", labels=["listener"]
    )
    for name, values in listeners:
        if name in current or values["connections"]:
            gauge.add_metric([name], values["connections"])
    yield gauge
    for metric, counter, text in (
        ("fastmesh_connections_opened", "opened", "Client connections accepted."),
        ("fastmesh_connections_refused", "refused", "Client connections over a limit."),
        ("fastmesh_received_bytes", "bytes_in", "Bytes received from clients."),
        ("fastmesh_sent_bytes", "bytes_out", "Bytes sent to clients."),
    ):
        family = CounterMetricFamily(metric, text, labels=["listener"])
        for name, values in listeners:
            family.add_metric([name], values[counter])
        yield family
    closed = CounterMetricFamily(
        "fastmesh_connections_closed", "Client connections ended.", labels=["listener", "reason"]
    )
    for name, values in listeners:
        for reason in CLOSE_REASONS:
            closed.add_metric([name, reason], values[f"closed.{reason}"])
    yield closed


def _upstream_families(
    by_kind: Mapping[str, list[tuple[Label, dict[str, int]]]], now: Situation
) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    which = ["cluster", "endpoint"]
    endpoints = by_kind.get("endpoint", [])
    current = set(now.endpoints)
    up = GaugeMetricFamily(
        "fastmesh_upstream_up", "1 while an endpoint has a usable connection.", labels=which
    )
    connections = GaugeMetricFamily(
        "fastmesh_upstream_connections", "Usable connections of an endpoint.", labels=which
    )
    ejected = GaugeMetricFamily(
        "fastmesh_upstream_ejected", "1 while an endpoint gets nothing new.", labels=which
    )
    flight = GaugeMetricFamily(
        "fastmesh_upstream_requests_in_flight", "Requests under way at it.", labels=which
    )
    for label, values in endpoints:
        if (label.cluster, label.endpoint) in current:
            key = [label.cluster, label.endpoint]
            up.add_metric(key, 1 if values["up"] else 0)
            connections.add_metric(key, values["up"])
            ejected.add_metric(key, 1 if values["ejected"] else 0)
            flight.add_metric(key, values["requests.in_flight"])
    yield from (up, connections, ejected, flight)
    for metric, counter, text in _ENDPOINT_COUNTERS:
        family = CounterMetricFamily(metric, text, labels=which)
        for label, values in endpoints:
            family.add_metric([label.cluster, label.endpoint], values[counter])
        yield family


# name, counter of a group's row, help
_GROUP_COUNTERS = (
    ("fastmesh_group_deliveries", "pushes.accepted", "Deliveries and checks taken over."),
    ("fastmesh_group_answered", "pushes.answered", "Deliveries answered by a client or peer."),
    ("fastmesh_group_expired", "pushes.expired", "Deliveries that reached their deadline first."),
    ("fastmesh_group_forwarded", "forwarded", "Deliveries handed to another node."),
    ("fastmesh_group_stayed", "stayed", "Deliveries that were to leave, and nobody reachable."),
    ("fastmesh_group_offered", "offered", "Forwards refused before execution, offered here."),
    ("fastmesh_group_loops", "loops", "Forwards refused: they had been forwarded before."),
)


def _group_families(
    by_kind: Mapping[str, list[tuple[Label, dict[str, int]]]],
    other: dict[str, int],
    live: Mapping[str, tuple[int, int]],
) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    which = ["app", "group"]
    groups = [([x.app, x.group], values) for x, values in by_kind.get("group", ())]
    groups.append(([OTHER, OTHER], other))
    for metric, counter, text in _GROUP_COUNTERS:
        family = CounterMetricFamily(metric, text, labels=which)
        for key, values in groups:
            family.add_metric(key, values[counter])
        yield family
    refused = CounterMetricFamily(
        "fastmesh_group_refused",
        "Deliveries that the mesh answered itself.",
        labels=[*which, "cause"],
    )
    for key, values in groups:
        for cause in CAUSES:
            refused.add_metric([*key, cause], values[f"pushes.failed.{cause}"])
    yield refused
    flight = GaugeMetricFamily(
        "fastmesh_group_in_flight", "Deliveries taken over and not settled.", labels=which
    )
    connections = GaugeMetricFamily(
        "fastmesh_group_connections", "Live connections of a group.", labels=which
    )
    credit = GaugeMetricFamily(
        "fastmesh_group_credit", "Deliveries that they take unanswered, in all.", labels=which
    )
    # A group has one application at a time, but an old one keeps its row.
    newest = {key[1]: key for key, _ in groups[:-1]}
    for key, values in groups:
        flight.add_metric(key, values["pushes.in_flight"])
        if newest.get(key[1]) == key and key[1] in live:
            connections.add_metric(key, live[key[1]][0])
            credit.add_metric(key, live[key[1]][1])
    yield from (flight, connections, credit)


def _drain_families(drain: DrainFigures) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    step = GaugeMetricFamily("fastmesh_drain_step", "1 for the step it is in.", labels=["step"])
    for name in DRAIN_STEPS:
        step.add_metric([name], int(name == drain.step))
    yield step
    seconds = GaugeMetricFamily(
        "fastmesh_drain_step_seconds", "Time of each step of the last drain.", labels=["step"]
    )
    for name in DRAIN_STEPS[:-1]:
        if name in drain.seconds:
            seconds.add_metric([name], drain.seconds[name])
    yield seconds
    waiting = GaugeMetricFamily(
        "fastmesh_drain_waiting_for", "What the step under way waits for.", labels=["what"]
    )
    for name in DRAIN_WAITS:
        waiting.add_metric([name], drain.waiting.get(name, 0))
    yield waiting
    steps = CounterMetricFamily(
        "fastmesh_drain_steps", "Steps of drains, by how they ended.", labels=["step", "outcome"]
    )
    for (name, outcome), count in sorted(drain.totals.items()):
        steps.add_metric([name, outcome], count)
    yield steps
    yield GaugeMetricFamily(
        "fastmesh_safe_to_stop", "1 once a drain has left nothing behind.", value=int(drain.safe)
    )


def _hop_bounds() -> list[int]:
    from fastmesh._ext.counters import hop_bounds_ns

    return hop_bounds_ns()


def cumulative(counts: Sequence[int], bounds_ns: Sequence[int]) -> list[tuple[str, int]]:
    """Fine buckets folded into ours. A fine bucket that straddles a bound counts above it, so that
    no figure flatters (by at most 6 %)."""
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    found = []
    for bound_s in limits.HOP_BUCKETS_S:
        whole = bisect_right(bounds_ns, round(bound_s * 1e9))
        found.append((repr(bound_s), sums[whole]))
    found.append(("+Inf", sums[-1]))
    return found
