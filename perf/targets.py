"""Where fastmesh must stand, as data, and how a result compares: met, or missed by how much.

Every figure is a ratio or difference of trials of one round, then the median over the rounds, so
that the host's speed is in none of them.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

RELAYS = ("haproxy", "nginx", "envoy")
OURS = "fastmesh"


def values(scenario: dict[str, Any], contender: str, figure: str) -> list[float]:
    """One figure of one contender, round by round; rounds without it are left out."""
    found = [r[contender].get(figure) for r in scenario["rounds"] if contender in r]
    return [float(value) for value in found if value is not None]


def paired(scenario: dict[str, Any], figure: str, left: str, right: str) -> list[float]:
    """left / right of the same round: what the host did to both cancels out."""
    ratios = []
    for measured in scenario["rounds"]:
        if left in measured and right in measured:
            a, b = measured[left].get(figure), measured[right].get(figure)
            if a is not None and b:
                ratios.append(a / b)
    return ratios


def added(scenario: dict[str, Any], contender: str, figure: str) -> list[float]:
    """Latency above the direct path of the same round."""
    return [
        measured[contender][figure] - measured["direct"][figure]
        for measured in scenario["rounds"]
        if contender in measured and "direct" in measured
    ]


def added_ratios(scenario: dict[str, Any], figure: str, against: str) -> list[float]:
    """fastmesh's added latency / another's, in the rounds where the other's is one at all."""
    ours, theirs = added(scenario, OURS, figure), added(scenario, against, figure)
    if len(ours) != len(theirs):
        return []
    return [a / b for a, b in zip(ours, theirs, strict=True) if b > 0]


def cheapest_relay(scenario: dict[str, Any]) -> str | None:
    """The relay with the least CPU per message."""
    costs = {
        name: statistics.median(found)
        for name in RELAYS
        if (found := values(scenario, name, "cpu_us_per_message"))
    }
    return min(costs, key=lambda name: costs[name]) if costs else None


@dataclass(frozen=True)
class Target:
    """One bound of one scenario."""

    scenario: str
    kind: str
    """cpu: CPU per message against `against`; p50_us, p99_us: added latency against `against`;
    idle_cpu_share, rss_per_idle_connection_bytes: the figure itself.
    """
    most: float
    against: str = ""
    """A contender, "relays" (the cheapest of them), or fastmesh's own run of another scenario."""

    @property
    def what(self) -> str:
        if self.kind == "cpu":
            whom = "the cheapest relay" if self.against == "relays" else self.against
            return f"CPU per message / {whom}"
        if self.against:
            return f"added {self.kind.removesuffix('_us')} / {self.against}'s"
        return KINDS[self.kind]

    def measure(self, scenario: dict[str, Any]) -> list[float]:
        """The figure of each round; empty where the result cannot tell."""
        if self.kind == "cpu":
            whom = cheapest_relay(scenario) if self.against == "relays" else self.against
            return paired(scenario, "cpu_us_per_message", OURS, whom) if whom else []
        if self.against:
            return added_ratios(scenario, self.kind, self.against)
        return values(scenario, OURS, self.kind)


KINDS = {
    "idle_cpu_share": "CPU share of idle connections",
    "rss_per_idle_connection_bytes": "bytes per idle connection",
}
MOSN_MOST = 0.35
NO_CPU = 0.002
"""Of one core: what a second's accounting cannot tell from nothing."""


def beside(scenario: str) -> str:
    """The name under which fastmesh's run of another scenario stands in a round."""
    return f"{OURS} ({scenario})"


TARGETS = (
    Target("c1", "cpu", 1.00, "relays"),
    Target("c64", "cpu", 0.45, "relays"),
    Target("c1000", "cpu", 0.37, "relays"),
    Target("c16d32", "cpu", 0.75, "relays"),
    Target("body16k", "cpu", 0.40, "relays"),
    *(
        Target(name, "cpu", MOSN_MOST, "mosn")
        for name in (
            "c1", "c64", "c1000", "c16d32", "c10000", "body64", "body16k", "body256k", "mixed",
            "rate20000",
        )
    ),
    Target("rate20000", "p50_us", 0.9, "haproxy"),
    Target("rate20000", "p99_us", 0.6, "haproxy"),
    Target("busy", "p50_us", 0.9, "haproxy"),
    Target("busy", "p99_us", 0.6, "haproxy"),
    Target("spin", "p50_us", 0.5, "nginx"),
    Target("unix", "cpu", 1.0, beside("c64")),
    Target("threads2", "cpu", 1.0, beside("c64")),
    Target("c10000", "idle_cpu_share", NO_CPU),
    Target("c10000", "rss_per_idle_connection_bytes", 1024),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    target: Target
    rounds: list[float]

    @property
    def median(self) -> float | None:
        return statistics.median(self.rounds) if self.rounds else None

    @property
    def text(self) -> str:
        if self.median is None:
            return "not measured"
        if self.median <= self.target.most:
            return "met"
        return f"missed by {self.median / self.target.most - 1:.0%}"


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """One for each target whose scenario is in the result."""
    scenarios = result["scenarios"]
    return [
        Verdict(target, target.measure(scenarios[target.scenario]))
        for target in TARGETS
        if target.scenario in scenarios
    ]
