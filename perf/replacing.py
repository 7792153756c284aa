"""How each contender replaces its own process, the way its manual recommends."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perf import host
from perf.contenders import Contender, Place, envoy_patience
from perf.trial import TrialError, running, tail

UPGRADES = 10
"""In a row, under one load, for a contender that needs no pause between them."""
PATIENCE_S = 5.0
"""What an operator gives the old process to let its connections go ..."""
WAITS_S = 600.0
"""... or does not: for longer than any trial."""
RATE = 10000.0
"""Requests a second in all: half or less of what each of them can do with 1000 connections."""
GIVE_UP_S = 30.0
"""For a command that says when it is done."""
STOP_S = 5.0
BUSY_SHARE = 0.7


@dataclass
class Replaced:
    """One replacement that was begun."""

    old_pid: int
    old: int
    """pidfd of it."""
    new_pid: int = 0
    command_s: float = 0.0
    """Until the command that began it returned."""
    report: dict[str, Any] = field(default_factory=dict)
    """What the contender itself says of it."""

    def gone(self, timeout_s: float) -> bool:
        """Wait until the old process has ended; a pidfd is readable from then on."""
        poller = select.poll()
        poller.register(self.old, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))


@dataclass
class Site:
    """Where a contender runs, and what must be stopped in the end."""

    contender: Contender
    binary: str
    place: Place
    pid: int
    """The process that was started first: HAProxy's master, else the one that is replaced next."""
    stack: ExitStack

    @property
    def log(self) -> Path:
        return self.place.folder / f"{self.contender.name}.log"


def replace_haproxy(site: Site) -> Replaced:
    """The master runs itself anew on SIGUSR2; its new worker takes the old one's listeners."""
    old = host.family(site.pid)[1:]
    if len(old) != 1:
        raise TrialError(f"haproxy: expected one worker, found {old}")
    done = Replaced(old[0], pidfd(old[0]))
    os.kill(site.pid, signal.SIGUSR2)
    done.new_pid = await_process(
        lambda: [pid for pid in host.family(site.pid)[1:] if pid != old[0]], site
    )
    return done


def replace_envoy(site: Site) -> Replaced:
    """A second process with the next epoch asks the first one for its listeners."""
    done = Replaced(site.pid, pidfd(site.pid))
    base = (site.place.folder / "base-id").read_text().strip()
    patience = envoy_patience(site.place.patience_s)
    command = [
        site.binary, "--base-id", base, "--restart-epoch", "1", *patience,
        "--concurrency", str(site.place.threads), "--log-level", "error",
        "-c", str(site.place.folder / "envoy.json"),
    ]  # fmt: skip
    log = site.place.folder / "envoy-next.log"
    new = site.stack.enter_context(running(command, host.placement().proxy, log))
    done.new_pid = new.pid
    # Shared memory that two epochs used outlives both.
    memory = Path(f"/dev/shm/envoy_shared_memory_{int(base) * 10}")
    site.stack.callback(memory.unlink, missing_ok=True)
    return done


def replace_mosn(site: Site) -> Replaced:
    """On SIGHUP it starts its successor, gives it the listeners, and later one connection after the
    other.
    """
    done = Replaced(site.pid, pidfd(site.pid))
    os.kill(site.pid, signal.SIGHUP)
    done.new_pid = await_process(lambda: host.family(site.pid)[1:], site)
    site.stack.callback(end_process, done.new_pid)
    return done


def replace_fastmesh(site: Site) -> Replaced:
    """The command is done when the new process serves and the old one let everything go."""
    done = Replaced(site.pid, pidfd(site.pid))
    config = site.place.folder / "fastmesh.yaml"
    said = site.place.folder / "upgrade.json"
    command = [site.binary, "-m", "fastmesh", "upgrade", "-c", str(config), "--json"]
    started = time.monotonic()
    with running(command, host.placement().proxy, said) as upgrade:
        try:
            code = upgrade.wait(GIVE_UP_S)
        except subprocess.TimeoutExpired:
            raise TrialError(f"fastmesh upgrade: no end within {GIVE_UP_S:.0f} s") from None
    done.command_s = time.monotonic() - started
    try:
        done.report = json.loads(said.read_text().strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise TrialError(f"fastmesh upgrade: code {code}: {tail(said)}") from None
    if code or not done.report.get("ok"):
        raise TrialError(f"fastmesh upgrade: code {code}: {done.report}")
    done.new_pid = int(done.report["new_pid"])
    site.stack.callback(end_process, done.new_pid)
    if done.report["old_pid"] != site.pid or done.new_pid == site.pid:
        raise TrialError(f"fastmesh upgrade: another process than {site.pid}: {done.report}")
    site.pid = done.new_pid
    return done


@dataclass(frozen=True)
class Way:
    """One row of the comparison."""

    name: str
    contender: str
    how: str
    replace: Callable[[Site], Replaced]
    descriptors: int
    """Of the proxy, for each client connection."""
    gone_s: float
    """How long the old process is waited for: its own deadlines, and a margin."""
    upgrades: int = 1
    patience_s: float = PATIENCE_S
    rate: float = RATE
    """0 = BUSY_SHARE of what it can do with these connections, measured in the same trial."""


WAYS = {
    way.name: way
    for way in (
        Way(
            "fastmesh",
            "fastmesh",
            "`fastmesh upgrade`: the new process takes over everything",
            replace_fastmesh,
            1,
            10.0,
            upgrades=UPGRADES,
        ),
        Way(
            "fastmesh (70 %)",
            "fastmesh",
            f"the same at {BUSY_SHARE:.0%} of its own capacity",
            replace_fastmesh,
            1,
            10.0,
            upgrades=UPGRADES,
            rate=0.0,
        ),
        Way(
            "haproxy",
            "haproxy",
            f"reload of the master (SIGUSR2), `hard-stop-after` {PATIENCE_S:.0f} s",
            replace_haproxy,
            2,
            PATIENCE_S + 10.0,
        ),
        Way(
            "haproxy (waits)",
            "haproxy",
            f"the same with `hard-stop-after` {WAITS_S:.0f} s",
            replace_haproxy,
            2,
            PATIENCE_S,
            patience_s=WAITS_S,
        ),
        Way(
            "envoy",
            "envoy",
            f"hot restart, `--drain-time-s` {PATIENCE_S - 1:.0f}, `--parent-shutdown-time-s` "
            f"{PATIENCE_S:.0f}",
            replace_envoy,
            2,
            PATIENCE_S + 10.0,
        ),
        Way(
            "envoy (waits)",
            "envoy",
            f"the same with `--parent-shutdown-time-s` {WAITS_S:.0f}",
            replace_envoy,
            2,
            PATIENCE_S,
            patience_s=WAITS_S,
        ),
        Way(
            "mosn",
            "mosn",
            f"smooth upgrade (SIGHUP), `graceful_timeout` {PATIENCE_S:.0f} s",
            replace_mosn,
            1,
            # 3 s for its successor, twice the timeout, twice 15 s for reads under way.
            2 * PATIENCE_S + 33.0 + 15.0,
        ),
    )
}


# --- processes ------------------------------------------------------------------------------------

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """What an old process leaves behind becomes our child: it can be waited for, and nothing stays
    behind as a zombie.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise TrialError(f"process {pid} is gone before it was replaced") from None


def await_process(find: Callable[[], list[int]], site: Site) -> int:
    until = time.monotonic() + GIVE_UP_S
    while not (found := find()):
        if time.monotonic() > until:
            raise TrialError(f"{site.contender.name} started no successor: {tail(site.log)}")
        threading.Event().wait(0.002)
    return found[0]


def end_process(pid: int) -> None:
    """A successor that we did not start ourselves."""
    try:
        watch = os.pidfd_open(pid)
    except OSError:
        return
    try:
        poller = select.poll()
        poller.register(watch, select.POLLIN)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            if poller.poll(STOP_S * 1000):
                break
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
    finally:
        os.close(watch)
