"""What the machine says: who used which CPU for how long, how much memory, and whether somebody
stole time.

Everything comes from the kernel's own accounting; nothing here samples or estimates.
"""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "perf"
"""Where foreign programs are installed and trials keep their files; never committed."""

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
SPIN_BYTES = 1 << 20
SPIN_REPEATS = 16
STOLEN_SPIN_RATIO = 1.15
"""A spin this much slower than the best one of the session says that the CPU was not ours alone."""
STOLEN_SHARE = 0.01
"""More stolen time than this share of a round (the kernel's own `steal`) makes it worthless."""


# --- CPUs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """Which CPUs do what. Both sets are equal where there is only one CPU, and `pinned` says so."""

    load: frozenset[int]
    proxy: frozenset[int]
    pinned: bool

    def describe(self) -> str:
        if not self.pinned:
            return "one CPU for everything: figures of proxies that share it with the load"
        return f"load and upstream on CPU {_list(self.load)}, proxy on CPU {_list(self.proxy)}"


def placement(proxy_threads: int = 1) -> Placement:
    cpus = sorted(os.sched_getaffinity(threading.main_thread().native_id or 0) | ALL_CPUS)
    if len(cpus) < 2:
        return Placement(frozenset(cpus), frozenset(cpus), pinned=False)
    # A second proxy thread gets a CPU of its own only where load and upstream keep theirs.
    proxy = cpus[1 : 1 + proxy_threads] if len(cpus) > proxy_threads + 1 else cpus[1:2]
    return Placement(frozenset(cpus[:1]), frozenset(proxy), pinned=True)


ALL_CPUS = frozenset(os.sched_getaffinity(0))
"""Taken at import, before anything is pinned."""


def _list(cpus: frozenset[int]) -> str:
    return ",".join(str(cpu) for cpu in sorted(cpus))


# --- a process and everything it started ----------------------------------------------------------


def family(pid: int) -> list[int]:
    """The process and its descendants: nginx and others work in children."""
    found = [pid]
    for parent in found:
        for task in _tasks(parent):
            with suppress(OSError, ValueError):
                children = Path(f"/proc/{parent}/task/{task}/children").read_text()
                found += [int(child) for child in children.split() if int(child) not in found]
    return found


def _tasks(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def cpu_ns(pid: int) -> int:
    """Nanoseconds on a CPU, user and system, of all threads of a family. Threads that ended are
    not in it:
    compare two readings only while the same threads live (a proxy under load starts none)."""
    total = 0
    for member in family(pid):
        for task in _tasks(member):
            with suppress(OSError, ValueError):
                text = Path(f"/proc/{member}/task/{task}/schedstat").read_text()
                total += int(text.split()[0])
    return total


def rss_bytes(pid: int) -> int:
    """Resident memory of a family; pages that its members share count once for each (nginx: a few
    MiB).
    """
    total = 0
    for member in family(pid):
        with suppress(OSError, ValueError, IndexError):
            pages = int(Path(f"/proc/{member}/statm").read_text().split()[1])
            total += pages * resource.getpagesize()
    return total


def steal_s(cpus: frozenset[int]) -> float:
    """Seconds that the hypervisor kept from these CPUs since boot."""
    total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        fields = line.split()
        name = fields[0] if fields else ""
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cpus and len(fields) > 8:
            total += int(fields[8])
    return total * TICK_S


# --- is the machine ours? -------------------------------------------------------------------------


def spin_ns(cpu: int) -> int:
    """How long a fixed piece of work takes on that CPU, best of three (one interrupt is not a
    thief).
    """
    before = os.sched_getaffinity(0)
    data = bytes(SPIN_BYTES)
    best = 1 << 62
    os.sched_setaffinity(0, {cpu})
    try:
        for _ in range(3):
            start = time.monotonic_ns()
            for _ in range(SPIN_REPEATS):
                hashlib.sha256(data).digest()
            best = min(best, time.monotonic_ns() - start)
    finally:
        os.sched_setaffinity(0, before)
    return best


class Calibration:
    """Looks before and after each round whether the machine was ours; keeps the best spin as the
    yardstick.
    """

    def __init__(self, cpus: frozenset[int]) -> None:
        self.cpus = cpus
        self.best: dict[int, int] = {}
        self._steal = 0.0
        self._start = 0.0

    def _spin(self) -> float:
        worst = 1.0
        for cpu in sorted(self.cpus):
            took = spin_ns(cpu)
            self.best[cpu] = min(took, self.best.get(cpu, took))
            worst = max(worst, took / self.best[cpu])
        return worst

    def begin(self) -> str:
        """ "" or why the round that begins now would be worthless."""
        worst = self._spin()
        self._steal = steal_s(self.cpus)
        self._start = time.monotonic()
        return _verdict(worst, 0.0)

    def end(self) -> str:
        stolen = steal_s(self.cpus) - self._steal
        share = stolen / max(1e-9, (time.monotonic() - self._start) * len(self.cpus))
        return _verdict(self._spin(), share)


def _verdict(spin: float, stolen: float) -> str:
    why = []
    if spin > STOLEN_SPIN_RATIO:
        why.append(f"a calibration spin took {spin:.2f} times its best")
    if stolen > STOLEN_SHARE:
        why.append(f"the host stole {stolen:.1%} of the time")
    return " and ".join(why)


# --- what to write beside every figure ------------------------------------------------------------


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"


def facts() -> dict[str, object]:
    model = "unknown"
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "kernel": platform.release(),
        "cpu": model,
        "cpus": len(ALL_CPUS),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "congestion_control": _read("/proc/sys/net/ipv4/tcp_congestion_control"),
        "somaxconn": _read("/proc/sys/net/core/somaxconn"),
        "open_files_max": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit that was measured, marked when the tree holds more than it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD") or "none"
    return head + ("+changes" if git("status", "--porcelain") else "")


def raise_open_files() -> int:
    """As many descriptors as this user may have; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
