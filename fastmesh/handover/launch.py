"""Starting the process that takes over, and waiting for its report.

The report is one JSON object that the new process writes to a pipe, once, when it serves or knows
that it never will:

    {ok, mode, old_pid, new_pid, moved: {listeners, downstream, upstream, requests, pushes, bytes},
     pause_ms: [per engine thread], left: [{what, why}], code, reason}

`code` and `reason` are "" when `ok`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from fastmesh.errors import EXIT_CONFIG, EXIT_FAILURE, EXIT_UNAVAILABLE

EXIT_CODES = {"": 0, "configuration": EXIT_CONFIG, "nobody": EXIT_UNAVAILABLE}
"""Code of a report -> exit code of `fastmesh upgrade`; every other refusal is EXIT_FAILURE."""


def exit_code(report: dict[str, Any]) -> int:
    return EXIT_CODES.get(report["code"], EXIT_FAILURE)


def refused(code: str, reason: str, **more: Any) -> dict[str, Any]:
    """The report of an upgrade that did not happen."""
    return {"ok": False, "code": code, "reason": reason, "pause_ms": [], "left": [], **more}


def explain(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    if not report["ok"]:
        return [f"fastmesh: no upgrade ({report['code']}): {report['reason']}"]
    if report["mode"] == "fresh":  # the old one died half-way
        return [f"process {report['new_pid']} serves now, started anew: {report['reason']}"]
    moved = report["moved"]
    lines = [f"process {report['new_pid']} serves now, process {report['old_pid']} is leaving"]
    if report["mode"] == "move":
        lines.append(
            f"moved    {moved['listeners']} listeners, {moved['downstream']} client and"
            f" {moved['upstream']} upstream connections, {moved['requests']} requests and"
            f" {moved['pushes']} pushes in flight, {moved['bytes']} bytes"
        )
        pauses = ", ".join(f"{pause:.3g}" for pause in report["pause_ms"])
        lines.append(f"paused   {pauses} ms (each engine thread)")
    else:
        lines.append("moved    the listeners; its connections end by themselves")
    lines += [f"left     {item['what']}: {item['why']}" for item in report["left"]]
    return lines


def write_report(fd: int, report: dict[str, Any]) -> None:
    """Once, and the pipe is closed. Whoever asked may be gone: that changes nothing here."""
    with contextlib.suppress(OSError):
        os.write(fd, msgspec.json.encode(report) + b"\n")
    os.close(fd)


def upgrade(path: str, *, mode: str = "auto", timeout_s: float) -> dict[str, Any]:
    """Start a process with this interpreter and this configuration that takes over from the one
    that serves, detached, and wait for its report. Blocks.

    After `timeout_s` nobody waits any more. Nothing is killed then: every step of the hand-over has
    a deadline of its own, and the new process may own the connections already."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    command = [sys.executable, "-m", "fastmesh", "run", "--takeover", "-c", os.path.abspath(path)]
    command += ["--handover-mode", mode, "--report-fd", str(writer)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,  # until it owns the output of the process that it replaces
            pass_fds=(writer,),
            start_new_session=True,
        )
    except OSError as error:
        os.close(reader)
        os.close(writer)
        return refused("failed", f"no process could be started: {error.strerror}")
    os.close(writer)
    try:
        report = _read(reader, time.monotonic() + timeout_s)
    finally:
        os.close(reader)
    if report is not None:
        return {**report, "new_pid": process.pid}
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1.0)
    if process.returncode is None:
        reason = f"process {process.pid} has not reported after {timeout_s:g} s: ask `status`"
        return refused("late", reason, new_pid=process.pid)
    code = "configuration" if process.returncode == EXIT_CONFIG else "failed"
    ended = f"signal {-process.returncode}" if process.returncode < 0 else process.returncode
    return refused(code, f"the new process ended with {ended}", new_pid=process.pid)


def _read(fd: int, until: float) -> dict[str, Any] | None:
    """The report; None when the other end was closed without one, or the time is over."""
    data = bytearray()
    poll = select.poll()  # (select(2) ends at descriptor 1024)
    poll.register(fd, select.POLLIN)
    while (left_s := until - time.monotonic()) > 0:
        if not poll.poll(left_s * 1000):
            return None
        piece = os.read(fd, 65536)
        if not piece:
            break
        data += piece
    try:
        found: dict[str, Any] = msgspec.json.decode(bytes(data))
    except msgspec.DecodeError:
        return None
    return found


class Launcher:
    """Runs `upgrade` on a thread that was made before the main thread lowered its priority: a
    process inherits the priority of the thread that starts it, and an engine must have it whole."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="launcher", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        self._jobs.put(None)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
