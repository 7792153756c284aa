"""The live table: rates and recent latencies from two looks."""

from __future__ import annotations

import copy
from typing import Any

from fastmesh.observe import top

NONE = {"no_route": 0, "overload": 0}


def look() -> dict[str, Any]:
    def latency() -> dict[str, Any]:
        return {"p50_us": 0, "p99_us": 0, "counts": [100, 0, 0, 0]}

    return {
        "latency_bounds_us": [10.0, 20.0, 40.0, 80.0],
        "listeners": [{"listener": "rpc", "connections": 3}],
        "routes": [
            {
                "listener": "rpc",
                "route": "[red]*",
                "cluster": "orders",
                "answered": 1000,
                "expired": 1,
                "failed": dict(NONE),
                "in_flight": 0,
                "latency": latency(),
            }
        ],
        "endpoints": [
            {
                "cluster": "orders",
                "endpoint": "127.0.0.1:1",
                "sent": 900,
                "connect_failed": 0,
                "in_flight": 2,
                "up": 1,
                "ejected": False,
                "weight": 100,
                "latency": latency(),
            }
        ],
    }


def test_rates_and_latencies_are_of_the_interval_not_of_all_time() -> None:
    before, after = look(), copy.deepcopy(look())
    route = after["routes"][0]
    route |= {
        "answered": 1500,
        "expired": 2,
        "failed": {"no_route": 3, "overload": 1},
        "in_flight": 7,
    }
    route["latency"]["counts"] = [100, 0, 98, 2]
    lines = top.compare(before, after, 2.0)
    assert [line.kind for line in lines] == ["route", "endpoint"]
    assert lines[0].rate_per_s == 250
    assert lines[0].failed_per_s == 2.5
    assert lines[0].in_flight == 7
    assert (lines[0].p50_us, lines[0].p99_us) == (40.0, 80.0)
    assert (lines[1].rate_per_s, lines[1].p50_us) == (0, 0)


def test_what_was_not_there_before_starts_at_zero() -> None:
    before = look()
    before["routes"] = []
    assert top.compare(before, look(), 1.0)[0].rate_per_s == 0


def test_quantiles() -> None:
    bounds = [1.0, 2.0, 3.0]
    assert top.quantile([0, 0, 0], bounds, 0.5) == 0
    assert top.quantile([1, 0, 0], bounds, 0.99) == 1
    assert top.quantile([99, 0, 1], bounds, 0.99) == 1
    assert top.quantile([98, 0, 2], bounds, 0.99) == 3


def test_plain_text_is_aligned_and_markup_is_text() -> None:
    lines = top.compare(look(), look(), 1.0)
    text = top.plain(lines).splitlines()
    assert len({line.index("req/s") for line in text[:1]}) == 1
    assert "[red]*" in text[1]
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=200, force_terminal=False)
    console.print(top.rich_table("title", lines))
    assert "[red]*" in console.file.getvalue()  # type: ignore[attr-defined]
