"""The gate that CI runs (`make perf-gate`, under five minutes): what must never get worse without
being noticed.

Timings are paired: a round measures fastmesh and what it is compared with back to back, figures
are formed within the round, and the median over the rounds decides. When a timing fails, as many
rounds again are measured and the median over all of them decides, twice at the most: a noisy minute
is forgiven, a real regression is not. Errors and the instruction count have no second chance.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from perf import deliver, host, instructions
from perf.contenders import CONTENDERS
from perf.scenarios import SCENARIOS
from perf.trial import Measurement, TrialError, measure

ROUNDS = 5
DELIVERY_ROUNDS = 3
AGAIN = 2
"""How often as many rounds again are measured for a timing that failed."""
DURATION_MS = 1500
ADDED_P50_US_MAX = 200.0
ADDED_P99_US_MAX = 1000.0
CPU_RATIO_MAX = 0.65
"""Of HAProxy's. The target is 0.45; where this was written medians of five rounds read 0.54 to
0.62 by the hour, and a bare relay in C 0.56. A net that catches a regression, not the target.
"""
REPEAT = "make perf-gate"


@dataclass
class Check:
    """One bound, and the figure of each round."""

    what: str
    unit: str
    most: float
    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def ok(self) -> bool:
        return bool(self.rounds) and self.median <= self.most

    def __str__(self) -> str:
        numbers = ", ".join(f"{value:.3g}" for value in self.rounds)
        return (
            f"{'ok    ' if self.ok else 'FAILED'} {self.what}: median {self.median:.3g}{self.unit}"
            f", bound {self.most:g}{self.unit}; rounds: {numbers}"
        )


def open_loop_round(trial: Callable[[str, str], Measurement]) -> tuple[float, float]:
    """Added p50 and p99 of one round in µs."""
    direct, through = trial("direct", "rate20000"), trial("fastmesh", "rate20000")
    return through.p50_us - direct.p50_us, through.p99_us - direct.p99_us


def cpu_round(trial: Callable[[str, str], Measurement]) -> float:
    """fastmesh's CPU per message / HAProxy's, one round."""
    ours, theirs = trial("fastmesh", "c64"), trial("haproxy", "c64")
    if not ours.cpu_us_per_message or not theirs.cpu_us_per_message:
        raise TrialError("a trial was too short to read CPU time in it: the host is overloaded")
    return ours.cpu_us_per_message / theirs.cpu_us_per_message


class Gate:
    """Collects rounds and errors; `trial` and `delivery` are parameters, so that tests can play
    every outcome."""

    def __init__(
        self,
        trial: Callable[[str, str], Measurement],
        delivery: Callable[[], deliver.Round] = deliver.one_round,
    ) -> None:
        self._trial = trial
        self._delivery = delivery
        self.errors: list[str] = []
        self.p50 = Check("added p50, open loop at 20 000/s", " µs", ADDED_P50_US_MAX)
        self.p99 = Check("added p99, open loop at 20 000/s", " µs", ADDED_P99_US_MAX)
        self.cpu = Check("CPU per message at 64 × 1, fastmesh / haproxy", "", CPU_RATIO_MAX)
        self.deliveries = {
            name: Check(f"delivery at 10 000/s: {title}", unit, deliver.TARGETS[name])
            for name, title, unit in (
                ("added_p50_us", "added p50", " µs"),
                ("added_p99_us", "added p99", " µs"),
                ("peer_added_p99_us", "added p99 through a peer", " µs"),
                ("cpu_ratio", "CPU / a plain request's", ""),
            )
        }

    @property
    def checks(self) -> list[Check]:
        return [self.p50, self.p99, self.cpu, *self.deliveries.values()]

    def _watched(self, contender: str, scenario: str) -> Measurement:
        measured = self._trial(contender, scenario)
        if not measured.ok:
            self.errors.append(f"{contender}, {scenario}: {measured.errors or 'no answer at all'}")
        return measured

    def rounds(self, count: int, only: list[Check] | None = None) -> None:
        for _ in range(count):
            if only is None or self.p50 in only or self.p99 in only:
                p50, p99 = open_loop_round(self._watched)
                self.p50.rounds.append(p50)
                self.p99.rounds.append(p99)
            if only is None or self.cpu in only:
                self.cpu.rounds.append(cpu_round(self._watched))
        for _ in range(min(count, DELIVERY_ROUNDS)):
            if only is None or any(check in only for check in self.deliveries.values()):
                measured = self._delivery()
                for name, check in self.deliveries.items():
                    check.rounds.append(getattr(measured, name))

    def run(self, count: int = ROUNDS) -> bool:
        self.rounds(count)
        for _ in range(AGAIN):
            failed = [check for check in self.checks if not check.ok]
            if not failed or self.errors:
                break
            for check in failed:
                print(check)
            print(f"once more, {count} rounds: the median over all of them decides")
            self.rounds(count, failed)
        return not self.errors and all(check.ok for check in self.checks)


def missing() -> list[str]:
    """What the gate cannot do without, and how to get it."""
    return [
        f"{name} is missing: {CONTENDERS[name].install}"
        for name in ("fastmesh", "haproxy")
        if CONTENDERS[name].find() is None
    ]


def _trial(contender: str, scenario: str) -> Measurement:
    return measure(CONTENDERS.get(contender), SCENARIOS[scenario], DURATION_MS)


def _instructions() -> tuple[bool, str]:
    try:
        measured = instructions.measure()
    except TrialError as error:
        return False, str(error)
    return instructions.verdict(measured, json.loads(instructions.BASELINE.read_text()))


def main() -> None:
    lacking = missing()
    if lacking:
        raise SystemExit("\n".join(lacking))
    places = host.placement()
    print(places.describe())
    calibration = host.Calibration(places.load | places.proxy)
    calibration.begin()
    gate = Gate(_trial)
    try:
        ok = gate.run()
    except TrialError as error:
        raise SystemExit(f"FAILED {error}\nrepeat with: {REPEAT}") from error
    stolen = calibration.end()
    for check in gate.checks:
        print(check)
    for line in gate.errors:
        print(f"FAILED errors: {line}")
    if not gate.errors:
        print("ok     errors: none")
    counted, text = _instructions()
    print(f"{'ok    ' if counted else 'FAILED'} {text}")
    if stolen:
        # Said, not forgiven: the bounds are wide and the rounds paired.
        print(f"note   the machine was not ours alone: {stolen}")
    if not (ok and counted):
        raise SystemExit(f"repeat with: {REPEAT}")
    # The closing line that says how many checks there were.
    print(f"{len(gate.checks) + 2} passed, 0 failed")


if __name__ == "__main__":
    main()
