"""Before and after: did fastmesh get worse beyond doubt?

    python -m perf.compare OLD.json NEW.json [--contender fastmesh] [--reference haproxy]
    [--tolerance 0.05]

For each scenario of both files: the ratio new / old of the median with a 95 % bootstrap interval
over the rounds. Where both have the reference, each round's figure is divided by the reference's
of the same round first, so that the host's speed cancels out.
A regression is an interval that lies wholly above 1 + tolerance. Exit code 1 when there is one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIGURES = {
    "cpu_us_per_message": "CPU/message",
    "p50_us": "p50",
    "p99_us": "p99",
    "rss_bytes": "RSS",
}
"""Shorter is better for all of them."""
RESAMPLES = 4000
ROUNDS_MIN = 3
"""Fewer rounds have no spread to speak of."""


@dataclass(frozen=True)
class Change:
    scenario: str
    figure: str
    relative: bool
    ratio: float
    low: float
    high: float
    rounds: tuple[int, int]

    def worse(self, tolerance: float) -> bool:
        return self.low > 1 + tolerance

    def better(self, tolerance: float) -> bool:
        return self.high < 1 - tolerance


def series(
    scenario: dict[str, Any], contender: str, figure: str, reference: str | None
) -> list[float]:
    """The figure of each round, relative to the reference's of the same round if there is one."""
    found = []
    for measured in scenario["rounds"]:
        value = measured.get(contender, {}).get(figure)
        if value is None:
            continue
        if reference is None:
            found.append(float(value))
        elif base := measured.get(reference, {}).get(figure):
            found.append(float(value) / float(base))
    return found


def bootstrap(old: list[float], new: list[float], seed: int = 1) -> tuple[float, float]:
    """95 % interval of median(new) / median(old), both resampled. The same input gives the same
    answer.
    """
    dice = random.Random(seed)
    ratios = sorted(
        statistics.median(dice.choices(new, k=len(new)))
        / statistics.median(dice.choices(old, k=len(old)))
        for _ in range(RESAMPLES)
    )
    return ratios[round(0.025 * RESAMPLES)], ratios[round(0.975 * RESAMPLES) - 1]


def compare(
    old: dict[str, Any], new: dict[str, Any], contender: str, reference: str | None
) -> tuple[list[Change], list[str]]:
    """Changes, and what could not be compared and why."""
    changes, silent = [], []
    for name, after in new["scenarios"].items():
        before = old["scenarios"].get(name)
        if before is None:
            silent.append(f"{name}: only in the new file")
            continue
        for figure, title in FIGURES.items():
            # Memory does not depend on the hour; everything else does.
            base = reference if figure != "rss_bytes" else None
            if base and not (
                series(before, base, figure, None) and series(after, base, figure, None)
            ):
                base = None
            a = series(before, contender, figure, base)
            b = series(after, contender, figure, base)
            if min(len(a), len(b)) < ROUNDS_MIN or not all(a):
                silent.append(f"{name} {title}: fewer than {ROUNDS_MIN} rounds in one of the files")
                continue
            low, high = bootstrap(a, b)
            ratio = statistics.median(b) / statistics.median(a)
            changes.append(
                Change(name, title, base is not None, ratio, low, high, (len(a), len(b)))
            )
    silent += [
        f"{name}: only in the old file" for name in old["scenarios"] if name not in new["scenarios"]
    ]
    return changes, silent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--contender", default="fastmesh")
    parser.add_argument("--reference", default="haproxy", help='"" takes absolute figures')
    parser.add_argument("--tolerance", type=float, default=0.05)
    options = parser.parse_args()
    changes, silent = compare(
        json.loads(options.old.read_text()),
        json.loads(options.new.read_text()),
        options.contender,
        options.reference or None,
    )
    for change in changes:
        verdict = (
            "WORSE"
            if change.worse(options.tolerance)
            else "better"
            if change.better(options.tolerance)
            else ""
        )
        against = f" / {options.reference}" if change.relative else ""
        print(
            f"{change.scenario:<10} {change.figure + against:<24} × {change.ratio:.3f}  "
            f"[{change.low:.3f}, {change.high:.3f}]  {verdict}"
        )
    for line in silent:
        print(f"not compared: {line}")
    if not changes:
        raise SystemExit("nothing could be compared")
    raise SystemExit(1 if any(change.worse(options.tolerance) for change in changes) else 0)


if __name__ == "__main__":
    main()
