"""Side by side: every scenario for every contender, in alternating rounds, paired by round.

    python -m perf.run                          everything, 5 rounds (make bench)
    python -m perf.run --rounds 7 --only c64,c1000
    python -m perf.run --only c64,fastmesh,haproxy
    python -m perf.run --only c64 --into FILE   put c64 beside what FILE has already

Writes one JSON file under perf/results/, a picture per scenario, and the table in perf/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perf import host, report
from perf.contenders import CONTENDERS, DIRECT, Place
from perf.scenarios import SCENARIOS, Scenario
from perf.targets import OURS, beside
from perf.trial import Measurement, TrialError, contender_or_none, measure, syscalls_per_message

ROUNDS = 5
ATTEMPTS_PER_ROUND = 2
"""So many attempts are made for each round that is wanted; a busy host must not keep us for ever.
"""
DURATION_MS = 1500
RESULTS = host.ROOT / "perf" / "results"


def names(only: str) -> tuple[list[str], list[str]]:
    """Scenarios and contenders that a comma list names; a kind it does not mention is whole."""
    wanted = [part for part in only.split(",") if part]
    everyone = [DIRECT, *CONTENDERS]
    unknown = [name for name in wanted if name not in SCENARIOS and name not in everyone]
    if unknown:
        known = ", ".join([*SCENARIOS, *everyone])
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {known}")
    scenarios = [name for name in SCENARIOS if name in wanted] or list(SCENARIOS)
    contenders = [name for name in everyone if name in wanted] or everyone
    # Added latency is counted from the direct path, so that it runs always.
    return scenarios, contenders if DIRECT in contenders else [DIRECT, *contenders]


def known_contenders(wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Version and configuration of each, or that it is missing and how to get it."""
    found: dict[str, dict[str, Any]] = {}
    for name in wanted:
        contender = contender_or_none(name, CONTENDERS)
        if contender is None:
            found[name] = {"what": "no proxy"}
            continue
        binary = contender.find()
        if binary is None:
            found[name] = {"what": contender.what, "missing": contender.install}
            continue
        with tempfile.TemporaryDirectory() as folder:
            place = Place("127.0.0.1:12200", "127.0.0.1:12201", Path(folder))
            command = contender.command(binary, place)
            texts = [path.read_text() for path in sorted(Path(folder).iterdir())]
            found[name] = {
                "what": contender.what,
                "version": contender.version(binary),
                "command": [part.replace(folder, ".") for part in command[1:]],
                "configuration": "\n".join(texts).replace(folder, "."),
            }
    return found


def one_round(
    scenario: Scenario, contenders: list[str], duration_ms: int, failed: dict[str, str]
) -> dict[str, Measurement]:
    """One trial of each contender, back to back, so that all of them meet the same weather."""
    measured = {}
    for name in contenders:
        if name in failed:
            continue
        # fastmesh's run of a neighbouring scenario is a contender like any other
        runs = SCENARIOS[scenario.beside] if name == beside(scenario.beside) else scenario
        contender = (
            CONTENDERS[OURS] if runs is not scenario else contender_or_none(name, CONTENDERS)
        )
        try:
            measured[name] = measure(contender, runs, duration_ms)
        except TrialError as error:
            failed[name] = str(error)
            print(f"    {name}: {error}", flush=True)
    return measured


def run_scenario(
    scenario: Scenario,
    contenders: list[str],
    calibration: host.Calibration,
    *,
    rounds: int,
    duration_ms: int,
    keep_stolen: bool,
    syscalls: bool,
) -> dict[str, Any]:
    print(f"{scenario.name}: {scenario.title}", flush=True)
    failed = {
        name: CONTENDERS[name].cannot[scenario.name]
        for name in contenders
        if name in CONTENDERS and scenario.name in CONTENDERS[name].cannot
    }
    failed |= {
        name: f"not installed: {CONTENDERS[name].install}"
        for name in contenders
        if name in CONTENDERS and CONTENDERS[name].find() is None
    }
    for name, why in failed.items():
        print(f"    {name}: left out, {why}", flush=True)
    if scenario.beside and OURS in contenders:
        contenders = [*contenders, beside(scenario.beside)]
    kept: list[dict[str, Any]] = []
    discarded: list[str] = []
    for attempt in range(rounds * ATTEMPTS_PER_ROUND):
        # Each round begins with another contender: being first or last is nobody's privilege.
        shift = attempt % len(contenders)
        before = calibration.begin()
        measured = one_round(scenario, contenders[shift:] + contenders[:shift], duration_ms, failed)
        stolen = before or calibration.end()
        if stolen and not keep_stolen:
            discarded.append(stolen)
            print(f"    round thrown away: {stolen}", flush=True)
            continue
        kept.append({name: asdict(measurement) for name, measurement in measured.items()})
        line = "   ".join(
            f"{name} {_brief(measured[name])}" for name in contenders if name in measured
        )
        print(f"    {len(kept)}/{rounds}  {line}", flush=True)
        if len(kept) == rounds:
            break
    if len(kept) < rounds:
        print(f"    only {len(kept)} of {rounds} rounds are good: the host was busy", flush=True)
    return {
        "title": scenario.title,
        "load": {key: list(v) if isinstance(v, tuple) else v for key, v in scenario.load.items()},
        "unix": scenario.unix,
        "threads": scenario.threads,
        "spin_us": scenario.spin_us,
        "placement": host.placement(scenario.threads).describe(),
        "rounds": kept,
        "discarded": discarded,
        "left_out": failed,
        "syscalls_per_message": _syscalls(scenario, contenders, failed) if syscalls else {},
    }


def _brief(measurement: Measurement) -> str:
    if measurement.errors:
        return f"ERRORS {measurement.errors}"
    cpu = measurement.cpu_us_per_message
    return f"{measurement.p50_us:.0f}/{measurement.p99_us:.0f} µs" + (
        f" {cpu:.2f} cpu" if cpu else ""
    )


def _syscalls(
    scenario: Scenario, contenders: list[str], failed: dict[str, str]
) -> dict[str, dict[str, float]]:
    counts = {}
    for name in contenders:
        contender = CONTENDERS.get(name)
        if contender is None or name in failed:
            continue
        try:
            found = syscalls_per_message(contender, scenario)
        except TrialError as error:
            print(f"    system calls of {name}: {error}", flush=True)
            continue
        if found:
            counts[name] = found
    return counts


def continued(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The result so far, ready for further scenarios. Another host, kernel, commit or length of
    trials would make two results look like one: SystemExit.
    """
    for what, old, new in (
        ("the host or commit", before["host"], now["host"]),
        ("the length of a trial", before["duration_ms"], now["duration_ms"]),
    ):
        if old != new:
            raise SystemExit(f"--into: {what} is another one: {old} there, {new} here")
    return before | {
        "contenders": before["contenders"] | now["contenders"],
        "kept_stolen_rounds": before["kept_stolen_rounds"] or now["kept_stolen_rounds"],
    }


def in_order(scenarios: dict[str, Any]) -> dict[str, Any]:
    """As the list has them, however the pieces came."""
    return {name: scenarios[name] for name in SCENARIOS if name in scenarios}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("ROUNDS") or ROUNDS))
    parser.add_argument(
        "--only", default=os.environ.get("ONLY") or "", help="scenarios, contenders"
    )
    parser.add_argument("--duration-ms", type=int, default=DURATION_MS, help="of one trial")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, help="default: perf/results/DATE-COMMIT.json")
    where.add_argument(
        "--into",
        type=Path,
        help="a result to add to (or to begin): a long run in pieces, on this host and commit",
    )
    parser.add_argument(
        "--no-syscalls", action="store_true", help="leave out the pass under strace"
    )
    parser.add_argument(
        "--keep-stolen", action="store_true", help="keep rounds in which the host stole time"
    )
    parser.add_argument("--no-report", action="store_true", help="leave README and pictures alone")
    options = parser.parse_args()
    scenarios, contenders = names(options.only)
    host.raise_open_files()
    calibration = host.Calibration(host.placement().load | host.placement().proxy)
    for _ in range(3):
        calibration.begin()  # the yardstick: the best spin so far
    now = datetime.now(UTC)
    result: dict[str, Any] = {
        "schema": 1,
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "host": host.facts(),
        "duration_ms": options.duration_ms,
        "kept_stolen_rounds": options.keep_stolen,
        "contenders": known_contenders(contenders),
        "scenarios": {},
    }
    for name, known in result["contenders"].items():
        print(f"{name}: {known.get('version') or known.get('missing', known['what'])}", flush=True)
    print(host.placement().describe(), flush=True)
    commit = str(result["host"]["commit"])
    output = options.into or options.output
    output = output or RESULTS / f"{now.strftime('%Y%m%d-%H%M')}-{commit}.json"
    if options.into and options.into.exists():
        result = continued(json.loads(options.into.read_text()), result)
    for name in scenarios:
        result["scenarios"][name] = run_scenario(
            SCENARIOS[name],
            contenders,
            calibration,
            rounds=options.rounds,
            duration_ms=options.duration_ms,
            keep_stolen=options.keep_stolen,
            syscalls=not options.no_syscalls,
        )
        result["scenarios"] = in_order(result["scenarios"])
        # After each scenario: an interrupted run keeps what it has.
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    print(report.text(result))
    print(f"written: {output}")
    if not options.no_report:
        report.publish(result, output)
    wrong = report.errors(result)
    for line in wrong:
        print(f"ERROR {line}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
