"""Runs one machine (states.py): what happens becomes events, in the order that the table asks for,
and the actions that it gives are executed.

The two sides differ in what their actions do (giver.py, taker.py); what is the same stands here:
records in and out, the deadline, the other process's pidfd, jobs and their end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from fastmesh.errors import FastmeshError
from fastmesh.handover import endpoint, faults, wire
from fastmesh.handover.fence import Fence
from fastmesh.handover.states import DROPPABLE, POINTS, Action, Event, Machine
from fastmesh.observe.log import Log

PER_RECORD: Final = frozenset({"send_listeners", "send_state"})
"""Actions that come to their fault point once per record, and say so themselves."""

UNDO: Final = frozenset({"send_abort", "kill_peer", "thaw", "resume", "discard", "discard_all"})
"""The way back. What one of them cannot do keeps none of the others from being done: a mesh that
stayed frozen, or held, would be worse than anything that they can meet."""

Do = Callable[[], Awaitable[None] | None]
Heard = Callable[[wire.Record, list[int]], None]


class NobodyError(Exception):
    """Raised by an action: nobody is there. Not fed beside it: `done` would come first."""


class Driver:
    """`run()` until the machine is in a final state.

    `actions` says what each word does that is not the same on both sides; `heard` is told each
    record with its descriptors (those that it takes out of the list are its own, the rest is
    closed) and raises HandoverError for one that cannot be.
    """

    def __init__(
        self, machine: Machine, log: Log, *, actions: Mapping[Action, Do], heard: Heard
    ) -> None:
        self.machine = machine
        self.sock: socket.socket | None = None
        self.fence: Fence | None = None
        self._log = log
        self._actions: dict[Action, Do] = {
            "close": self.close,
            "kill_peer": self._kill_peer,
            "send_abort": lambda: self.try_to_send(wire.Abort(machine.reason)),
            **actions,
        }
        self._heard = heard
        self._wake = asyncio.Event()
        self._pending: list[tuple[Event, str]] = []
        self._job: asyncio.Task[None] | None = None
        self._doing: str = ""
        self._stop_asked = False
        self._eof = False
        self._death_told = False
        self._clock = -1
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._looked_at = 0

    # --- what happens -----------------------------------------------------------------------------

    def stop(self) -> None:
        """SIGTERM."""
        self._stop_asked = True
        self._wake.set()

    def feed(self, event: Event, reason: str = "") -> None:
        """An event that an action found out, besides `done` and `failed`."""
        self._pending.append((event, reason))
        self._wake.set()

    def attach(self, sock: socket.socket) -> None:
        """The connection, which is this driver's from now on."""
        self.sock = sock
        asyncio.get_running_loop().add_reader(sock, self._wake.set)
        self._wake.set()

    def watch(self, fence: Fence) -> None:
        """The other process, which is this driver's from now on: its end becomes `peer_dead`."""
        self.fence = fence
        asyncio.get_running_loop().add_reader(fence.pidfd, self._peer_ended)
        self._wake.set()

    def _peer_ended(self) -> None:
        assert self.fence is not None
        asyncio.get_running_loop().remove_reader(self.fence.pidfd)  # it stays readable
        self._wake.set()

    def close(self) -> None:
        """The connection; the other process is still watched."""
        if self.sock is not None:
            asyncio.get_running_loop().remove_reader(self.sock)
            self.sock.close()
            self.sock = None

    async def run(self, first: Event | None = None) -> None:
        if first is not None:
            self.feed(first)
        try:
            while not self.machine.final:
                self._arm()
                self._wake.clear()  # what comes from here on is not slept over
                found = self._next()
                if found is None:
                    await self._wake.wait()
                else:
                    self._take(*found)
            if self._job is not None:
                await self._job  # what a final state asks for is done to its end
        finally:
            self._end()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._job is not None:
            self._job.cancel()
        self.close()
        if self.fence is not None:
            asyncio.get_running_loop().remove_reader(self.fence.pidfd)
            self.fence.close()

    def _arm(self) -> None:
        machine = self.machine
        if machine.clock == self._clock:
            return
        self._clock = machine.clock
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = None
        if machine.deadline_ms is not None:
            loop = asyncio.get_running_loop()
            self._due = loop.time() + machine.deadline_ms / 1000
            self._timer = loop.call_at(self._due, self._wake.set)

    def _next(self) -> tuple[Event, str] | None:
        """The event that comes first of those that are due."""
        job = self._job
        ended = job is not None and job.done()
        if ended and job is not None and not job.cancelled() and job.exception() is None:
            self._job = None
            return "done", ""
        if (found := self._received()) is not None:
            return found
        if self.fence is not None and not self._death_told and self.fence.dead():
            self._death_told = True
            return "peer_dead", ""
        if self._eof:
            self._eof = False
            self.close()
            return "eof", ""
        if self._pending:
            return self._pending.pop(0)
        if ended and job is not None:
            self._job = None
            return self._why_failed(job)
        if self._stop_asked:
            self._stop_asked = False
            return "stop", ""
        if self._due is not None and asyncio.get_running_loop().time() >= self._due:
            self._due = None
            return "deadline", ""
        return None

    def _received(self) -> tuple[Event, str] | None:
        if self.sock is None or self._eof:
            return None
        try:
            try:
                data, descriptors = endpoint.receive(self.sock)
            except ConnectionResetError:
                # The other end has gone and left something of ours unread. The kernel says so
                # once, and ahead of the records that it had sent before: they are read all the
                # same, for END or COMMIT may be among them.
                data, descriptors = endpoint.receive(self.sock)
        except BlockingIOError:
            return None
        except (ConnectionResetError, EOFError):
            self._eof = True
            return None
        except (OSError, FastmeshError) as wrong:  # cut off, too long, no descriptors left
            return "violation", str(wrong)
        try:
            record = wire.decode(data)
            self._strike_record(record)
            self._heard(record, descriptors)
        except (FastmeshError, ValueError) as wrong:
            return "violation", str(wrong)
        except OSError as error:
            return "failed", str(error)
        finally:
            endpoint.close_all(descriptors)  # whatever nobody took
        reason = record.reason if isinstance(record, (wire.Abort, wire.Refuse)) else ""
        return wire.event_of(record), reason

    def _strike_record(self, record: wire.Record) -> None:
        step = POINTS[self.machine.side].get(wire.NAMES[type(record)])
        if step is not None:
            self._looked_at += 1
            faults.strike(self.machine.side, step, self._looked_at)
        if isinstance(record, wire.Listeners) and record.last:
            self._looked_at = 0  # S5 counts anew

    def _why_failed(self, job: asyncio.Task[None]) -> tuple[Event, str]:
        if job.cancelled():
            return "failed", "cut off"
        fault = job.exception()
        if isinstance(fault, NobodyError):
            return "nobody", ""
        if isinstance(fault, (BrokenPipeError, ConnectionResetError)):
            return "eof", ""
        if not isinstance(fault, (OSError, FastmeshError, ValueError, MemoryError)):
            self._log.error("handover fault", state=self.machine.state, error=repr(fault))
        return "failed", str(fault) or type(fault).__name__

    # --- what is done about it --------------------------------------------------------------------

    def _take(self, event: Event, reason: str) -> None:
        machine = self.machine
        before = machine.state
        actions = machine.on(event, reason)
        self._log.debug("handover", side=machine.side, got=event, state=machine.state)
        if not actions:
            return  # (a job that is under way goes on, and is done in the new state)
        if machine.state == before:
            for action in actions:
                self._at_once(action)
            return
        rest = self._drop_job()
        self._job = asyncio.ensure_future(self._work(actions, rest))
        self._job.add_done_callback(lambda _: self._wake.set())

    def _at_once(self, action: Action) -> None:
        try:
            self._strike(action)
            found = self._actions[action]()
            assert found is None, f"{action} waits for something: it must be a job"
        except (BrokenPipeError, ConnectionResetError):
            pass  # EOF is seen when everything that was sent before it has been read
        except (OSError, FastmeshError, ValueError) as wrong:
            self.feed("failed", str(wrong))

    def _drop_job(self) -> asyncio.Task[None] | None:
        """The state is left, and so is its job: at once if that may be, else it is waited for."""
        job, self._job = self._job, None
        if job is None or job.done():
            return None
        if self._doing in DROPPABLE:
            job.cancel()
        return job

    async def _work(self, actions: Sequence[Action], before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        for action in actions:
            self._doing = action
            try:
                self._strike(action)
                found = self._actions[action]()
                if found is not None:
                    await found
            except Exception as fault:
                if action not in UNDO:
                    raise
                self._log.error("handover fault", action=action, error=repr(fault))
            finally:
                self._doing = ""

    def _strike(self, action: Action) -> None:
        step = POINTS[self.machine.side].get(action)
        if step is not None and action not in PER_RECORD:
            faults.strike(self.machine.side, step)

    def _kill_peer(self) -> None:
        assert self.fence is not None
        self.fence.kill()

    async def send(self, record: wire.Record, descriptors: Sequence[int] = ()) -> None:
        """Raises BrokenPipeError when nobody reads any more, OSError for what the kernel
        refuses."""
        if self.sock is None:
            raise BrokenPipeError("the connection is closed")
        await endpoint.send(self.sock, wire.encode(record), descriptors)

    async def send_with(self, record: wire.Record, descriptor: int) -> None:
        """With a descriptor that is the other side's from here on: ours is closed, whatever comes
        of it."""
        try:
            await self.send(record, [descriptor])
        finally:
            os.close(descriptor)

    async def try_to_send(self, record: wire.Record) -> None:
        """If there is room and somebody reads: nothing depends on it."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(0.1):
                await self.send(record)
