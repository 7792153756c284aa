"""One trial: an echo service, one contender in front of it (or none), one load, and what the
kernel saw of it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmesh._ext.load import LoadResult, LoadRun
from perf import host
from perf.contenders import DIRECT, Contender, Place
from perf.scenarios import Scenario

READY_S = 15.0
STOP_S = 5.0
WARMUP_MS = 300
STRACE_RATE = 2000.0
"""An open loop that a proxy under strace still keeps up with."""
IDLE_MS = 1000
SCRAPE_EVERY_S = 0.1
SCRAPES_PER_RELOAD = 10
EDGE_S = 0.02
"""CPU is read this long after the window opened and before it closes, so that both readings lie
inside.
"""


class TrialError(RuntimeError):
    """A contender that did not come up, or a load that did not run: named in the results, never a
    figure.
    """


@dataclass(frozen=True)
class Measurement:
    """One trial's figures. None where the trial does not tell."""

    throughput_per_s: float
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    max_us: float
    cpu_us_per_message: float | None
    proxy_cpu_share: float | None
    load_cpu_share: float
    rss_bytes: int | None
    rss_ready_bytes: int | None
    rss_per_idle_connection_bytes: float | None
    idle_cpu_share: float | None
    """Of a core, for connections that say nothing: above the share without any."""
    connections: int
    answered: int
    errors: dict[str, int]

    @property
    def ok(self) -> bool:
        return self.answered > 0 and not self.errors


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def running(
    command: list[str], cpus: frozenset[int], log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process pinned to these CPUs, output in `log`; stopped, and killed if it does not stop."""
    with log.open("wb") as output:
        # The child is pinned before it starts a thread: it inherits what this thread has at fork.
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}),
                cwd=host.ROOT,
            )
        finally:
            os.sched_setaffinity(0, before)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                for pid in reversed(host.family(process.pid)):
                    with suppress(ProcessLookupError):  # it was just about to end
                        os.kill(pid, signal.SIGKILL)
                process.wait(STOP_S)


def wait_until_serving(
    address: str, process: subprocess.Popen[bytes], log: Path, load: dict[str, Any]
) -> None:
    """Until one real request was answered rightly through it: an open port alone says nothing."""
    until = time.monotonic() + READY_S
    probe = {key: load[key] for key in ("version", "crc") if key in load}
    while time.monotonic() < until:
        if process.poll() is not None:
            raise TrialError(f"ended with code {process.returncode}: {tail(log)}")
        run = LoadRun(
            address,
            connections=1,
            duration_ms=20,
            warmup_ms=0,
            connect_timeout_ms=500,
            timeout_ms=200,
            **probe,
        )
        run.start()
        if run.result().ok:
            return
        threading.Event().wait(0.05)
    raise TrialError(f"did not serve within {READY_S:.0f} s: {tail(log)}")


def tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-400:] or "no output"


@contextmanager
def stage(
    contender: Contender | None,
    scenario: Scenario,
    *,
    connections: int | None = None,
    patience_s: float = 0.0,
) -> Iterator[tuple[str, subprocess.Popen[bytes] | None, Path]]:
    """Echo service and proxy, ready; yields the address to load, the proxy and its folder."""
    places = host.placement(scenario.threads)
    with ExitStack() as stack:
        # Short on purpose: UNIX socket paths have 107 bytes.
        folder = Path(tempfile.mkdtemp(prefix="fmperf"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        upstream = f"unix:{folder}/up.sock" if scenario.unix else f"127.0.0.1:{free_port()}"
        listen = f"unix:{folder}/in.sock" if scenario.unix else f"127.0.0.1:{free_port()}"
        serve = [sys.executable, "-m", "fastmesh.bench", "serve", "--listen", upstream]
        echo = stack.enter_context(running(serve, places.load, folder / "echo.log"))
        wait_until_serving(upstream, echo, folder / "echo.log", scenario.load)
        if contender is None:
            yield upstream, None, folder
            return
        binary = contender.find()
        if binary is None:
            raise TrialError(f"not installed: {contender.install}")
        place = Place(
            listen,
            upstream,
            folder,
            threads=scenario.threads,
            connections=connections or scenario.connections,
            spin_us=scenario.spin_us,
            busy=scenario.busy,
            patience_s=patience_s,
        )
        log = folder / f"{contender.name}.log"
        proxy = stack.enter_context(
            running(
                contender.command(binary, place), places.proxy, log, contender.environment(place)
            )
        )
        wait_until_serving(listen, proxy, log, scenario.load)
        yield listen, proxy, folder


def connections_possible(wanted: int, files_max: int) -> int:
    """A relay holds two descriptors per client connection; all contenders get the same number."""
    return min(wanted, (files_max - 400) // 2)


def measure(contender: Contender | None, scenario: Scenario, duration_ms: int) -> Measurement:
    """Run one trial. Raises TrialError when there is nothing to measure."""
    places = host.placement(scenario.threads)
    connections = connections_possible(scenario.connections, host.raise_open_files())
    load = scenario.load | {"connections": connections}
    with stage(contender, scenario, connections=connections) as (address, proxy, folder):
        pid = proxy.pid if proxy else None
        rss_ready = host.rss_bytes(pid) if pid else None
        idle = idle_cpu_share(pid, address, load, places) if pid and scenario.idle_share else None
        disturbed = scenario.busy and contender is not None and contender.name == "fastmesh"
        with disturbance(proxy, folder) if proxy and disturbed else nullcontext():
            run = _start(
                LoadRun(address, duration_ms=duration_ms, warmup_ms=WARMUP_MS, **load), places
            )
            cpu, share, rss = _watch(run, pid, duration_ms)
            result = run.result()
    return _measurement(
        result,
        idle=idle,
        scenario=scenario,
        cpu=cpu,
        share=share,
        rss=rss,
        rss_ready=rss_ready,
        connections=connections,
    )


def _start(run: LoadRun, places: host.Placement) -> LoadRun:
    """Its threads inherit the CPUs that this thread has at that moment."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, places.load)
    try:
        run.start()
    finally:
        os.sched_setaffinity(0, before)
    return run


def idle_cpu_share(
    pid: int, address: str, load: dict[str, Any], places: host.Placement
) -> float | None:
    """CPU share of the proxy while all connections are open and one request a second is sent, less
    its share without any connection.
    """

    def share(run: LoadRun | None) -> float:
        start, used = time.monotonic(), host.cpu_ns(pid)
        if run is None:
            threading.Event().wait(IDLE_MS / 1000)
        else:
            run.wait(IDLE_MS / 1000)
        return (host.cpu_ns(pid) - used) / 1e9 / (time.monotonic() - start)

    alone = share(None)
    run = _start(
        LoadRun(address, duration_ms=IDLE_MS * 2, warmup_ms=WARMUP_MS, **load | {"rate": 1.0}),
        places,
    )
    try:
        while run.progress().state in {"new", "connecting", "warmup"}:
            if run.wait(0.002):
                return None
        return share(run) - alone
    finally:
        run.stop()
        run.wait()


@contextmanager
def disturbance(proxy: subprocess.Popen[bytes], folder: Path) -> Iterator[None]:
    """Everything that an operator does to fastmesh, at once: scrapes and reloads. Raises TrialError
    when they did not happen: an undisturbed run must not pass for a disturbed one.
    """
    over = threading.Event()
    config = folder / "fastmesh.yaml"
    done = {"scrapes": 0, "reloads": 0}
    first = _config_version(folder)

    def disturb() -> None:
        while not over.wait(SCRAPE_EVERY_S):
            _config_version(folder)
            done["scrapes"] += 1
            if done["scrapes"] % SCRAPES_PER_RELOAD == 0:
                done["reloads"] += 1
                # A real change each time, so that a new snapshot is built and published.
                text = re.sub(
                    r"weight: \d+", f"weight: {100 + done['reloads'] % 2}", config.read_text()
                )
                config.write_text(text)
                proxy.send_signal(signal.SIGHUP)

    worker = threading.Thread(target=disturb, name="disturbance")
    worker.start()
    try:
        yield
    finally:
        over.set()
        worker.join()
    if not done["reloads"] or _config_version(folder) == first:
        raise TrialError(f"the disturbance did not happen: {done}")


def _config_version(folder: Path) -> int:
    """Scrapes /metrics and returns the version of the configuration in force."""
    with socket.socket(socket.AF_UNIX) as admin:
        admin.settimeout(STOP_S)
        admin.connect(f"{folder}/admin.sock")
        admin.sendall(b"GET /metrics HTTP/1.1\r\nHost: perf\r\nConnection: close\r\n\r\n")
        page = b""
        while piece := admin.recv(1 << 16):
            page += piece
    found = re.search(rb'config_version="(\d+)"', page)
    if found is None:
        raise TrialError(f"no metrics: {page[:200]!r}")
    return int(found[1])


def _watch(
    run: LoadRun, pid: int | None, duration_ms: int
) -> tuple[float | None, float | None, int | None]:
    """CPU µs per message and CPU share of the proxy inside the window, and its memory while it
    works.
    """
    while run.progress().state in {"new", "connecting", "warmup"}:
        if run.wait(0.002):
            return None, None, None
    if pid is None:
        return None, None, None
    run.wait(EDGE_S)
    start = time.monotonic()
    answered, used = run.progress().answered, host.cpu_ns(pid)
    rss = host.rss_bytes(pid)
    if run.wait(duration_ms / 1000 * 0.9 - 2 * EDGE_S):
        return None, None, rss
    messages = run.progress().answered - answered
    used = host.cpu_ns(pid) - used
    took = time.monotonic() - start
    return (used / 1000 / messages if messages else None), used / 1e9 / took, rss


def _measurement(
    result: LoadResult,
    *,
    scenario: Scenario,
    idle: float | None,
    cpu: float | None,
    share: float | None,
    rss: int | None,
    rss_ready: int | None,
    connections: int,
) -> Measurement:
    lat = result.latency
    per_idle = None
    if scenario.idle_share and rss is not None and rss_ready is not None:
        per_idle = (rss - rss_ready) / connections
    return Measurement(
        throughput_per_s=result.throughput_per_s,
        p50_us=lat.p50_ns / 1000,
        p90_us=lat.p90_ns / 1000,
        p99_us=lat.p99_ns / 1000,
        p999_us=lat.p999_ns / 1000,
        max_us=lat.max_ns / 1000,
        cpu_us_per_message=cpu,
        proxy_cpu_share=share,
        load_cpu_share=result.cpu_share,
        rss_bytes=rss,
        rss_ready_bytes=rss_ready,
        rss_per_idle_connection_bytes=per_idle,
        idle_cpu_share=idle,
        connections=result.connections,
        answered=result.answered,
        errors={kind: count for kind, count in result.errors.items() if count},
    )


def syscalls_per_message(contender: Contender, scenario: Scenario) -> dict[str, float] | None:
    """System calls of the proxy for each message, by name, under strace: a pass of its own,
    because it slows the proxy down several times. None where strace is missing or may not
    attach.
    """
    strace = shutil.which("strace")
    if strace is None:
        return None
    load = scenario.load | {"connections": min(scenario.connections, 1000)}
    if "rate" in load:
        load["rate"] = min(load["rate"], STRACE_RATE)
    with stage(contender, scenario) as (address, proxy, folder):
        assert proxy is not None
        summary, log = folder / "strace.txt", folder / "strace.log"
        run = LoadRun(address, duration_ms=10000, warmup_ms=WARMUP_MS, **load)
        run.start()
        try:
            while run.progress().state in {"new", "connecting", "warmup"}:
                if run.wait(0.002):
                    return None
            pids = [part for pid in host.family(proxy.pid) for part in ("-p", str(pid))]
            command = [strace, "-f", "-c", "-o", str(summary), *pids]
            with running(command, host.ALL_CPUS, log) as tracer:
                until = time.monotonic() + STOP_S
                while "attached" not in log.read_text(errors="replace"):
                    if tracer.poll() is not None or time.monotonic() > until:
                        return None
                    run.wait(0.002)
                answered = run.progress().answered
                run.wait(1.0)
                messages = run.progress().answered - answered
                tracer.send_signal(signal.SIGINT)
                tracer.wait(STOP_S)
        finally:
            run.stop()
            run.wait()
        counts = parse_strace(summary.read_text()) if summary.exists() else {}
    return {name: count / messages for name, count in counts.items()} if messages else None


def parse_strace(text: str) -> dict[str, int]:
    """Calls by name of an `strace -c` table."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        row = re.match(r"\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", line)
        if row and row[2] != "total":
            found[row[2]] = found.get(row[2], 0) + int(row[1])
    return found


def contender_or_none(name: str, known: dict[str, Contender]) -> Contender | None:
    return None if name == DIRECT else known[name]
