"""The live table: two looks at /v1/routes make rates and recent latencies.

The arithmetic and the plain text need nothing; rich is imported only to draw on a terminal, and
never by `fastmesh run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Look = Mapping[str, Any]
"""What /v1/routes?counts answers."""


@dataclass(frozen=True, slots=True)
class Line:
    """One route or endpoint over the last interval."""

    kind: str
    name: str
    rate_per_s: float
    failed_per_s: float
    in_flight: int
    p50_us: float
    p99_us: float
    note: str


HEADINGS = ("", "name", "req/s", "failed/s", "in flight", "p50 µs", "p99 µs", "")


def compare(before: Look, after: Look, seconds: float) -> list[Line]:
    """Lines of what happened between two looks."""
    bounds = after["latency_bounds_us"]
    seconds = max(seconds, 1e-6)
    lines = []
    old = {_key(item): item for item in (*before["routes"], *before["endpoints"])}
    for item in after["routes"]:
        was = old.get(_key(item), item)
        failed = sum(item["failed"].values()) + item["expired"]
        failed -= sum(was["failed"].values()) + was["expired"]
        lines.append(
            Line(
                "route",
                f"{item['listener']} {item['route']}",
                (item["answered"] - was["answered"]) / seconds,
                failed / seconds,
                item["in_flight"],
                *_recent(was, item, bounds),
                f"-> {item['cluster']}",
            )
        )
    for item in after["endpoints"]:
        was = old.get(_key(item), item)
        note = "ejected" if item["ejected"] else ("up" if item["up"] else "down")
        lines.append(
            Line(
                "endpoint",
                f"{item['cluster']} {item['endpoint']}",
                (item["sent"] - was["sent"]) / seconds,
                (item["connect_failed"] - was["connect_failed"]) / seconds,
                item["in_flight"],
                *_recent(was, item, bounds),
                f"{note} weight {item['weight']}",
            )
        )
    return lines


def _key(item: Mapping[str, Any]) -> tuple[str, str, str]:
    if "route" in item:
        return (item["listener"], item["route"], item["cluster"])
    return ("", item["cluster"], item["endpoint"])


def _recent(
    was: Mapping[str, Any], now: Mapping[str, Any], bounds: Sequence[float]
) -> tuple[float, float]:
    counts = [
        b - a for a, b in zip(was["latency"]["counts"], now["latency"]["counts"], strict=True)
    ]
    return quantile(counts, bounds, 0.5), quantile(counts, bounds, 0.99)


def quantile(counts: Sequence[int], bounds: Sequence[float], q: float) -> float:
    """Upper bound of the bucket where the q-quantile lies; 0 when nothing was counted."""
    total = sum(counts)
    if total <= 0:
        return 0.0
    left = max(1.0, q * total)
    for count, bound in zip(counts, bounds, strict=True):
        left -= count
        if left <= 0:
            return bound
    return bounds[-1]


def title(status: Mapping[str, Any], look: Look) -> str:
    connections = sum(item["connections"] for item in look["listeners"])
    return (
        f"fastmesh {status['version']}  {status['node']}  {status['state']}"
        f"  up {status['uptime_s']:.0f} s  config {status['config']['version']}"
        f" {status['config']['sha256'][:12]}  clients {connections}"
    )


def plain(lines: Sequence[Line]) -> str:
    rows = [HEADINGS, *(_cells(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    text = []
    for row in rows:
        cells = [
            cell.rjust(width) if 2 <= i <= 6 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def _cells(line: Line) -> tuple[str, ...]:
    return (
        line.kind,
        line.name,
        f"{line.rate_per_s:,.0f}",
        f"{line.failed_per_s:,.0f}",
        str(line.in_flight),
        f"{line.p50_us:,.0f}",
        f"{line.p99_us:,.0f}",
        line.note,
    )


def rich_table(heading: str, lines: Sequence[Line]) -> Any:
    """The same for a terminal. Raises ImportError without rich."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(heading), title_justify="left", expand=True)
    for number, name in enumerate(HEADINGS):
        table.add_column(name, justify="right" if 2 <= number <= 6 else "left", no_wrap=True)
    for line in lines:
        # Text, not str: a route may be named "[red]".
        table.add_row(*(Text(cell) for cell in _cells(line)))
    return table
