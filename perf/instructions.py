"""Instructions per forwarded message: the one figure that does not depend on the host's mood.

    python -m perf.instructions             measure and compare with the baseline
    python -m perf.instructions --record    write the baseline, after a change that was meant

fastmesh runs under callgrind, one connection with one request in flight, so that every message
takes the same way: two turns of the engine thread, no batching that timing could change. Counted
is the engine thread, user space only; the figure is the difference of a long and a short burst, so
that what is paid once (a connection, a first page) is not in it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastmesh._ext.load import LoadRun
from perf import host
from perf.contenders import CONTENDERS, Place
from perf.trial import TrialError, free_port, running, tail

BASELINE = host.ROOT / "perf" / "baselines" / "instructions.json"
TOLERANCE = 0.03
READY_S = 90.0
FEW, MANY = 500, 3000
"""Requests of the two bursts that a count is the difference of."""
BURST_MS_MAX = 30000
BURSTS = 3
"""The least of so many counts: an interrupted turn can only add instructions."""
INSTALL = "valgrind is missing: python -m perf.setup valgrind (or: apt-get install valgrind)"


def compiler() -> str:
    done = subprocess.run(
        ["cc", "--version"], capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout.partition("\n")[0].strip() or "unknown"


def thread_totals(files: Iterable[Path]) -> dict[str, int]:
    """Instructions of each thread, from callgrind's files, one a thread and dump."""
    totals: dict[str, int] = {}
    for path in files:
        text = path.read_text(errors="replace")
        thread = re.search(r"^thread: (\d+)", text, re.MULTILINE)
        total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
        if thread and total:
            totals[thread[1]] = totals.get(thread[1], 0) + int(total[1])
    return totals


def _control(pid: int, *arguments: str) -> None:
    done = subprocess.run(
        ["callgrind_control", *arguments, str(pid)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode:
        raise TrialError(f"callgrind_control {' '.join(arguments)}: {done.stderr or done.stdout}")


def _send(address: str, requests: int) -> None:
    """So many requests, one after the other. Raises TrialError unless each got its right answer."""
    run = LoadRun(
        address,
        connections=1,
        duration_ms=BURST_MS_MAX,
        requests=requests,
        warmup_ms=0,
        connect_timeout_ms=1000,
        timeout_ms=10000,
    )
    run.start()
    result = run.result()
    if not result.ok or result.sent_total != requests:
        wrong = {kind: count for kind, count in result.errors.items() if count}
        raise TrialError(f"{result.sent_total} of {requests} requests under valgrind: {wrong}")


def _burst(pid: int, listen: str, requests: int, folder: Path) -> int:
    """Instructions of the engine thread for so many requests on a new connection."""
    before = set(folder.glob("calls*"))
    _send(listen, requests)
    _control(pid, "--dump")  # which sets the counts back to zero, too
    totals = thread_totals(sorted(set(folder.glob("calls*")) - before))
    if not totals:
        raise TrialError("callgrind wrote no counts")
    # The engine thread is the one that works; Python's sleeps.
    return max(totals.values())


def _wait(listen: str, proxy: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + READY_S
    while True:
        if proxy.poll() is not None:
            raise TrialError(f"ended with code {proxy.returncode}: {tail(log)}")
        try:
            return _send(listen, 1)
        except TrialError:
            if time.monotonic() > until:
                raise TrialError(f"did not serve within {READY_S:.0f} s: {tail(log)}") from None


def measure() -> dict[str, Any]:
    """Raises TrialError when it cannot be measured."""
    if shutil.which("valgrind") is None:
        raise TrialError(INSTALL)
    fastmesh = CONTENDERS["fastmesh"]
    binary = fastmesh.find()
    if binary is None:
        raise TrialError(f"fastmesh is not built: {fastmesh.install}")
    folder = Path(tempfile.mkdtemp(prefix="fminstr"))
    try:
        upstream, listen = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        echo = [sys.executable, "-m", "fastmesh.bench", "serve", "--listen", upstream]
        command = [
            "valgrind",
            "--tool=callgrind",
            "--instr-atstart=no",
            "--separate-threads=yes",
            f"--callgrind-out-file={folder}/calls",
            *fastmesh.command(binary, Place(listen, upstream, folder)),
        ]
        log = folder / "valgrind.log"
        with (
            running(echo, host.ALL_CPUS, folder / "echo.log"),
            running(command, host.ALL_CPUS, log) as proxy,
        ):
            _wait(listen, proxy, log)
            _control(proxy.pid, "--instr=on")
            _burst(proxy.pid, listen, FEW, folder)  # what is paid once is paid here
            costs = []
            for _ in range(BURSTS):
                few = _burst(proxy.pid, listen, FEW, folder)
                many = _burst(proxy.pid, listen, MANY, folder)
                costs.append((many - few) / (MANY - FEW))
        return {
            "instructions_per_message": min(costs),
            "all": costs,
            "compiler": compiler(),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def verdict(measured: dict[str, Any], baseline: dict[str, Any]) -> tuple[bool, str]:
    """Within the tolerance above? Fewer instructions are no failure, only a baseline that is out
    of date.
    """
    now, then = measured["instructions_per_message"], baseline["instructions_per_message"]
    change = now / then - 1
    text = (
        f"{now:,.0f} instructions per message, baseline {then:,.0f} "
        f"({change:+.1%}, bound +{TOLERANCE:.0%})"
    )
    if measured["compiler"] != baseline["compiler"]:
        text += f"; baseline by {baseline['compiler']}, this is {measured['compiler']}"
    if change < -TOLERANCE:
        text += "; better than the baseline: record it (python -m perf.instructions --record)"
    return change <= TOLERANCE, text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    try:
        measured = measure()
    except TrialError as error:
        raise SystemExit(str(error)) from error
    if options.record:
        BASELINE.parent.mkdir(parents=True, exist_ok=True)
        BASELINE.write_text(json.dumps(measured | {"commit": host.commit()}, indent=1) + "\n")
        print(f"recorded: {measured['instructions_per_message']:,.0f} instructions per message")
        return
    ok, text = verdict(measured, json.loads(BASELINE.read_text()))
    print(text)
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
