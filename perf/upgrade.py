"""The process is replaced under load: what its clients notice of it.

    python -m perf.upgrade                         everything, 3 rounds (also in `make bench`)
    python -m perf.upgrade --only c1000,fastmesh --rounds 5
    python -m perf.upgrade --only mosn,c5000 --rounds 1 --add   beside those of this commit
    python -m perf.upgrade --report-only           README and picture again from the result

Every contender carries the same load, as many connections as the size says, and then replaces
itself the way its manual recommends: fastmesh by `fastmesh upgrade`, HAProxy by a reload of its
master, Envoy by hot restart, MOSN by its smooth upgrade. The same checker judges all of them, from
the clients' side: connections kept, requests failed and how, resets, the longest time without an
answer, and how long the old process stayed.

Results are added to perf/results/upgrade.json, one entry for each size and contender, so that a
long run can be made in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastmesh._ext.load import LoadResult, LoadRun
from perf import host
from perf.contenders import CONTENDERS, Place
from perf.deliver import on_load_cpus
from perf.replacing import BUSY_SHARE, PATIENCE_S, RATE, WAYS, Replaced, Site, Way, adopt_orphans
from perf.scenarios import Scenario
from perf.trial import TrialError, connections_possible, stage, tail
from perf.upgrade_report import Trial, failures, publish, quantile, text, verdict

ROUNDS = 3
ATTEMPTS_PER_ROUND = 2
BETWEEN_S = 0.5
"""From one of these to the next."""
WATCHERS = 16
"""Connections that ask often enough to see how long a stall lasts ..."""
WATCHED = 0.5
"""... and their share of the rate. The rest goes over all others, so that each one is tried."""
BEFORE_S = 1.5
AFTER_S = 1.0
"""Before the replacement begins and after it is over, when each connection has its turn, too."""
READY_S = 60.0
"""Until all connections of a load are up."""
LOAD_S = 300.0
"""A load ends by itself after this long, whatever happens to us."""
TIMEOUT_MS = 3000
SIZE = 256
NEWCOMER_EVERY_S = 0.05
FILES_KEPT = 500
"""Descriptors that the largest size leaves to the process itself."""
CLIENTS_MAX = 25000
"""One client address has 28 000 ports towards one server, as Linux comes."""
NEARLY = 0.95
"""Of a size: what is as good as all of it, when the descriptors allow no more."""
RESULT = host.ROOT / "perf" / "results" / "upgrade.json"


# --- sizes ----------------------------------------------------------------------------------------


def sizes(files_max: int) -> dict[str, int]:
    """Connections of each size, by name; the last is what the descriptor limit allows."""
    return {
        "c1000": 1000,
        "c5000": 5000,
        "c10000": 10000,
        "cmax": max(1, min(files_max - FILES_KEPT, CLIENTS_MAX)),
    }


# --- load -----------------------------------------------------------------------------------------


class Newcomers:
    """Clients that come while it happens: each opens a connection, asks once and goes."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.tried = self.failed = 0
        self.slowest_ms = 0.0
        self.kinds: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._come, name="newcomers")

    def _come(self) -> None:
        while not self._over.wait(NEWCOMER_EVERY_S):
            run = LoadRun(
                self.address,
                connections=1,
                requests=1,
                warmup_ms=0,
                duration_ms=TIMEOUT_MS,
                connect_timeout_ms=TIMEOUT_MS,
                timeout_ms=TIMEOUT_MS,
            )
            started = time.monotonic()
            run.start()
            result = run.result()
            self.slowest_ms = max(self.slowest_ms, (time.monotonic() - started) * 1000)
            self.tried += 1
            if not result.ok:
                self.failed += 1
                for kind, count in wrong(result).items():
                    self.kinds[kind] = self.kinds.get(kind, 0) + count

    def __enter__(self) -> Newcomers:
        with on_load_cpus():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def load(address: str, connections: int, rate: float, **more: Any) -> LoadRun:
    """One that runs, with all its connections."""
    run = LoadRun(
        address,
        connections=connections,
        rate=rate,
        sizes=(SIZE,),
        warmup_ms=300,
        duration_ms=int(LOAD_S * 1000),
        connect_timeout_ms=int(READY_S * 1000),
        timeout_ms=TIMEOUT_MS,
        **more,
    )
    with on_load_cpus():
        run.start()
    while run.progress().state != "running":
        if run.wait(0.005):
            raise TrialError(f"no load with {connections} connections: {wrong(run.result())}")
    if run.progress().connections != connections:
        raise TrialError(f"{run.progress().connections} of {connections} connections came up")
    return run


def capacity(address: str, connections: int) -> float:
    """Answers a second with a request in flight on each connection."""
    run = LoadRun(
        address,
        connections=connections,
        sizes=(SIZE,),
        warmup_ms=500,
        duration_ms=1500,
        connect_timeout_ms=int(READY_S * 1000),
        timeout_ms=TIMEOUT_MS,
    )
    with on_load_cpus():
        run.start()
    result = run.result()
    if not result.ok:
        raise TrialError(f"capacity: {wrong(result)}")
    return result.throughput_per_s


def wrong(result: LoadResult) -> dict[str, int]:
    return {kind: count for kind, count in result.errors.items() if count}


# --- one trial ------------------------------------------------------------------------------------

CONNECTION_KINDS = ("disconnected", "connect_failed")
"""Errors of connections; all others are of requests."""


def one_trial(way: Way, connections: int) -> Trial:
    """Raises TrialError when the replacement did not happen: there is nothing to report then."""
    contender = CONTENDERS[way.contender]
    scenario = Scenario("upgrade", "upgrade", {"connections": connections})
    with (
        stage(contender, scenario, connections=connections, patience_s=way.patience_s) as found,
        ExitStack() as stack,
    ):
        address, proxy, folder = found
        binary = contender.find()
        assert proxy is not None
        assert binary is not None
        place = Place(address, "", folder, connections=connections, patience_s=way.patience_s)
        # Successors end before the stage does, because its folder goes with it.
        site = Site(contender, binary, place, proxy.pid, stack)
        rate = way.rate or capacity(address, connections - 1) * BUSY_SHARE
        crowd_rate = rate * (1 - WATCHED)
        crowd = load(address, connections - WATCHERS, crowd_rate)
        watchers = load(address, WATCHERS, rate * WATCHED)
        runs = (crowd, watchers)
        for run in runs:
            stack.callback(run.wait)
            stack.callback(run.stop)
        replaced: list[Replaced] = []
        gone: list[float | None] = []
        with Newcomers(address) as newcomers:
            watchers.wait(BEFORE_S)
            for _ in range(way.upgrades):
                for run in runs:
                    run.mark()
                started = time.monotonic()
                replaced.append(way.replace(site))
                stack.callback(os.close, replaced[-1].old)
                ended = replaced[-1].gone(way.gone_s)
                gone.append(time.monotonic() - started if ended else None)
                watchers.wait(BETWEEN_S)
            # Each of the others is asked once more.
            watchers.wait(AFTER_S + connections / crowd_rate)
        if not Path(f"/proc/{replaced[-1].new_pid}").exists():
            raise TrialError(f"{way.name}: the new process has ended, too: {tail(site.log)}")
        for run in runs:
            run.stop()
        results = [run.result() for run in runs]
    seen = clients_saw(results)
    return Trial(
        connections=connections,
        rate_per_s=round(rate),
        upgrades=len(replaced),
        gone_s=gone,
        command_s=[one.command_s for one in replaced],
        newcomers=newcomers.tried,
        newcomers_failed=newcomers.kinds,
        newcomer_slowest_ms=newcomers.slowest_ms,
        reports=[one.report for one in replaced if one.report],
        **seen,
    )


def clients_saw(results: list[LoadResult]) -> dict[str, Any]:
    """The figures of a Trial that come from its load: the results of the crowd and, at the end, of
    the watchers.
    """
    errors: dict[str, int] = {}
    for result in results:
        for kind, count in wrong(result).items():
            errors[kind] = errors.get(kind, 0) + count
    watchers = results[-1]
    first = [r.first_error_s for r in results if r.first_error_s is not None]
    last = [r.last_error_s for r in results if r.last_error_s is not None]
    return {
        "kept": sum(result.kept for result in results),
        "resets": sum(result.resets for result in results),
        "failed": {kind: n for kind, n in errors.items() if kind not in CONNECTION_KINDS},
        "broken": {kind: n for kind, n in errors.items() if kind in CONNECTION_KINDS},
        "answered": sum(result.answered for result in results),
        "gap_before_ms": watchers.sections[0].gap_ms_max,
        "gaps_ms": [section.gap_ms_max for section in watchers.sections[1:]],
        "slowest_ms": max(s.latency_ms_max for result in results for s in result.sections[1:]),
        "errors_s": max(last) - min(first) if first else None,
    }


# --- all of them ----------------------------------------------------------------------------------


def left_out(way: Way, connections: int, files_max: int) -> tuple[int, str]:
    """Connections that this one can carry, and why it carries none if so."""
    contender = CONTENDERS[way.contender]
    if contender.find() is None:
        return 0, f"not installed: {contender.install}"
    if way.descriptors == 1:
        return connections, ""
    possible = connections_possible(connections, files_max)
    if possible < connections * NEARLY:
        return 0, f"needs two descriptors for each client, {files_max:,} are allowed"
    return possible, ""


def measure(
    way: Way, connections: int, rounds: int, calibration: host.Calibration, *, keep_stolen: bool
) -> dict[str, Any]:
    """`rounds` good trials, if the host gives them."""
    kept: list[dict[str, Any]] = []
    discarded: list[str] = []
    why = ""
    for _ in range(rounds * ATTEMPTS_PER_ROUND):
        before = calibration.begin()
        try:
            found = one_trial(way, connections)
        except (TrialError, OSError, subprocess.SubprocessError) as error:
            why = str(error) or repr(error)
            print(f"    {way.name}: {error}", flush=True)
            break
        stolen = before or calibration.end()
        if stolen and not keep_stolen:
            discarded.append(stolen)
            print(f"    {way.name}: thrown away: {stolen}", flush=True)
            continue
        kept.append(asdict(found))
        print(f"    {way.name} {len(kept)}/{rounds}: {brief(found)}", flush=True)
        if len(kept) == rounds:
            break
    return {"trials": kept, "discarded": discarded, "left_out": "", "failed": why}


def brief(found: Trial) -> str:
    gone = [one for one in found.gone_s if one is not None]
    said = [
        f"{found.kept} of {found.connections} kept at {found.rate_per_s:,.0f}/s",
        f"failed {found.failed or 0}, resets {found.resets}",
        f"gap {max(found.gaps_ms):.1f} ms (before {found.gap_before_ms:.1f})",
        f"slowest {found.slowest_ms:.1f} ms",
        f"old gone after {max(gone):.2f} s" if len(gone) == len(found.gone_s) else "old NOT gone",
        f"{found.newcomers} newcomers, failed {found.newcomers_failed or 0}",
    ]
    if found.pauses_ms:
        said.append(f"pause {quantile(found.pauses_ms, 0.5):.1f}/{max(found.pauses_ms):.1f} ms")
    return ", ".join(said)


def versions(ways: list[Way]) -> dict[str, dict[str, Any]]:
    """Version, command and configuration of each contender, or how to get it."""
    known: dict[str, dict[str, Any]] = {}
    for way in ways:
        contender = CONTENDERS[way.contender]
        binary = contender.find()
        if binary is None:
            known[way.name] = {"how": way.how, "missing": contender.install}
            continue
        with tempfile.TemporaryDirectory() as folder:
            place = Place(
                "127.0.0.1:12200", "127.0.0.1:12201", Path(folder), patience_s=way.patience_s
            )
            command = contender.command(binary, place)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            known[way.name] = {
                "how": way.how,
                "version": contender.version(binary),
                "command": [part.replace(folder, ".") for part in command[1:]],
                "configuration": "\n".join(f.read_text() for f in files).replace(folder, "."),
            }
    return known


def names(only: str) -> tuple[list[str], list[str]]:
    """Sizes and ways that a comma list names; a kind it does not mention is whole."""
    wanted = [part for part in only.split(",") if part]
    known_sizes = list(sizes(0))
    unknown = [name for name in wanted if name not in known_sizes and name not in WAYS]
    if unknown:
        known = ", ".join([*known_sizes, *WAYS])
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {known}")
    return (
        [name for name in known_sizes if name in wanted] or known_sizes,
        [name for name in WAYS if name in wanted] or list(WAYS),
    )


def continued(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What was measured so far, ready for more. Figures of another host or kernel would look like
    ours: SystemExit. Another commit is fine, each entry names its own.
    """

    def place(facts: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in facts.items() if key != "commit"}

    if place(before["host"]) != place(now["host"]):
        raise SystemExit(
            f"{RESULT.name} is of another host: {before['host']} there, {now['host']} here; "
            "name another file with --output"
        )
    return (
        before
        | now
        | {
            "contenders": before["contenders"] | now["contenders"],
            "sizes": before["sizes"],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default="", help="sizes, contenders")
    parser.add_argument("--output", type=Path, default=RESULT, help="added to when it is there")
    parser.add_argument(
        "--keep-stolen", action="store_true", help="keep rounds in which the host stole time"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the trials that this commit has already"
    )
    report = parser.add_mutually_exclusive_group()
    report.add_argument("--no-report", action="store_true", help="leave README and picture alone")
    report.add_argument("--report-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.report_only:
        publish(json.loads(options.output.read_text()))
        return
    wanted_sizes, wanted_ways = names(options.only)
    files_max = host.raise_open_files()
    adopt_orphans()
    places = host.placement()
    calibration = host.Calibration(places.load | places.proxy)
    for _ in range(3):
        calibration.begin()  # the yardstick: the best spin so far
    result: dict[str, Any] = {
        "schema": 1,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "host": host.facts(),
        "placement": places.describe(),
        "kept_stolen_rounds": options.keep_stolen,
        "rate_per_s": RATE,
        "patience_s": PATIENCE_S,
        "contenders": versions([WAYS[name] for name in wanted_ways]),
        "sizes": {},
    }
    commit = result["host"]["commit"]
    if options.output.exists():
        result = continued(json.loads(options.output.read_text()), result)
    print(places.describe(), flush=True)
    everything = sizes(files_max)
    for size in wanted_sizes:
        print(f"{size}: {everything[size]:,} connections", flush=True)
        for name in wanted_ways:
            way = WAYS[name]
            connections, why = left_out(way, everything[size], files_max)
            found: dict[str, Any] = {
                "trials": [],
                "discarded": [],
                "left_out": why,
                "failed": "",
            }
            if why:
                print(f"    {name}: left out, {why}", flush=True)
            else:
                found = measure(
                    way,
                    connections,
                    options.rounds,
                    calibration,
                    keep_stolen=options.keep_stolen,
                )
            found |= {"wanted": everything[size], "commit": commit}
            before = result["sizes"].get(size, {}).get(name)
            if options.add and before and before["commit"] == commit:
                found["trials"] = before["trials"] + found["trials"]
                found["discarded"] = before["discarded"] + found["discarded"]
                found["failed"] = found["failed"] or before["failed"]
            result["sizes"].setdefault(size, {})[name] = found
            result["sizes"] = {
                key: result["sizes"][key] for key in everything if key in result["sizes"]
            }
            # After each one: an interrupted run keeps what it has.
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(text(result))
    if not options.no_report:
        publish(result)
    missed = [line for line in verdict(result) if "**missed**" in line]
    raise SystemExit(1 if missed or failures(result) else 0)


if __name__ == "__main__":
    main()
