"""The giving side: the process that serves lets another one take everything over.

`Giver` listens on `handover.sock` as long as the process serves. Whoever connects gets a machine of
its own (states.py); only one at a time is let past HELLO. What the steps do to the running mesh is
said by `Giving`, which the composition root is.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastmesh import limits
from fastmesh._version import __version__
from fastmesh.errors import HandoverError
from fastmesh.handover import document, endpoint, faults, wire
from fastmesh.handover.driver import Driver
from fastmesh.handover.fence import Fence, own_pidfd
from fastmesh.handover.notify import notify
from fastmesh.handover.states import Action, Machine
from fastmesh.observe.log import Log


@dataclass(frozen=True, slots=True)
class World:
    """The state of one engine thread, as it travels."""

    thread: int
    memfd: int
    """Sealed; closed by whoever sent it."""
    descriptors: Sequence[int]
    """Of its connections, in the order of the state; they stay the engine's."""
    figures: dict[str, int]
    """downstream, upstream, requests, pushes, bytes."""


class Giving(Protocol):
    """What a running mesh does for a hand-over. Times out nowhere: the table has the deadlines."""

    def phase(self) -> str:
        """serving | draining | stopping."""

    def descriptors(self) -> int:
        """About how many would be handed over."""

    async def hold(self) -> None:
        """No reload, no new snapshot, no registration until `resume`."""

    def doors(self) -> list[tuple[wire.Listener, int]]:
        """Every listening socket, with its descriptor, which stays the mesh's."""

    def lock(self) -> int:
        """The descriptor that holds the state directory."""

    def process_document(self) -> bytes: ...
    async def close_doors(self) -> None:
        """Stop accepting on the admin and registration sockets; answers under way are given."""

    async def freeze(self) -> None: ...
    async def save(self) -> list[World]: ...
    async def thaw(self) -> None: ...
    async def resume(self) -> None:
        """Undo `hold`, `close_doors`, `stop_accepting` and `suspend`, whichever have been."""

    async def suspend(self) -> None: ...
    async def settle(self) -> None: ...
    def stop_accepting(self) -> None: ...
    async def let_go(self) -> None: ...
    async def release(self) -> None:
        """Close everything that was handed over; write nothing any more."""

    def handed_over(self) -> None:
        """This process has nothing left to do: it ends, with success."""


class Giver:
    """`open()` ... `close()`."""

    def __init__(self, mesh: Giving, path: str, log: Log, totals: Counter[str]) -> None:
        """`totals` counts how they ended: done | refused | failed."""
        self.totals = totals
        self._path = path
        self._mesh = mesh
        self._log = log
        self._door: endpoint.Door | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.active: _Giving | None = None
        self.last: dict[str, Any] = {}
        """The last one, for the status."""

    def open(self) -> None:
        """Raises StateError when the socket cannot be had."""
        self._door = endpoint.Door(self._path)
        asyncio.get_running_loop().add_reader(self._door.sock, self._accept)

    def close(self) -> None:
        """Nobody is let in any more. The path goes if it is still ours."""
        if self._door is not None:
            asyncio.get_running_loop().remove_reader(self._door.sock)
            self._door.close()
            self._door = None
        for task in list(self._tasks):
            task.cancel()

    def stop(self) -> None:
        """SIGTERM: a hand-over that is under way is told."""
        if self.active is not None:
            self.active.driver.stop()

    async def ended(self) -> None:
        """Until no hand-over is under way."""
        while self.active is not None:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    def status(self) -> dict[str, Any]:
        """`{state, step, last}`: state is of the table (states.py), "" while nobody asks."""
        here = None if self.active is None else self.active.driver.machine.here
        return {
            "state": "" if here is None else here.name,
            "step": "" if here is None else here.step,
            "last": self.last,
        }

    def _accept(self) -> None:
        assert self._door is not None
        try:
            sock = self._door.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            self._log.limited(
                "warning", "handover accept", "hand-over not begun", reason=str(error)
            )
            return
        if len(self._tasks) >= limits.HANDOVER_CONVERSATIONS_MAX:
            sock.close()
            return
        task = asyncio.ensure_future(_Giving(self, self._mesh, sock, self._log).run())
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._log.error("handover fault", error=repr(fault))


class _Giving:
    """One conversation."""

    def __init__(self, giver: Giver, mesh: Giving, sock: socket.socket, log: Log) -> None:
        self._giver = giver
        self._mesh = mesh
        self._log = log
        self._hello: wire.Hello | None = None
        self._peer = endpoint.peer_of(sock)
        self._refusal: wire.Refuse | None = None
        self._mode = ""
        """move | drain, once HELLO was judged."""
        self._descriptors = 0
        self._acked: dict[int, int] = {}
        self._news = asyncio.Event()
        self._worlds: list[World] = []
        self._frozen_at = self._frozen_ms = 0.0
        self._began = time.monotonic()
        actions: dict[Action, Any] = {
            "judge": self._judge,
            "hold": self._hold,
            "send_ack": self._send_ack,
            "send_refuse": lambda: self.driver.try_to_send(self._said_no()),
            "send_listeners": self._send_listeners,
            "close_doors": mesh.close_doors,
            "send_process": self._send_process,
            "freeze": self._freeze,
            "save": self._save,
            "send_state": self._send_state,
            "send_end": self._send_end,
            "send_commit": self._send_commit,
            "release": self._release,
            "thaw": self._thaw,
            "resume": mesh.resume,
            "suspend": mesh.suspend,
            "settle": mesh.settle,
            "stop_accepting": mesh.stop_accepting,
            "send_handed": lambda: self.driver.send(wire.Handed()),
            "let_go": mesh.let_go,
            "exit": mesh.handed_over,
            "stop_later": lambda: None,  # the mesh remembers it, and waits for `Giver.ended`
            "report": self._report,
        }
        self.driver: Driver = Driver(Machine("giver"), log, actions=actions, heard=self._heard)
        self.driver.attach(sock)

    async def run(self) -> None:
        try:
            await self.driver.run()
        finally:
            self._close_worlds()
            if self._giver.active is self:
                self._giver.active = None

    def _heard(self, record: wire.Record, descriptors: list[int]) -> None:
        wire.check_descriptors(record, len(descriptors))
        if isinstance(record, wire.Hello) and self._hello is None:
            self._hello = record
            fence = Fence(descriptors.pop(), record.pid)
            if self._peer.pid and fence.seen_pid not in (-1, self._peer.pid):
                # Else whoever connects could have another process killed.
                seen = fence.seen_pid
                fence.close()
                raise HandoverError("HELLO", seen, f"must be of process {self._peer.pid}")
            self.driver.watch(fence)
        elif isinstance(record, wire.Acked):
            self._acked[record.thread] = record.next
            self._news.set()

    # --- S2, S3 -----------------------------------------------------------------------------------

    def _judge(self) -> None:
        assert self._hello is not None
        self._descriptors = self._mesh.descriptors()
        found = wire.judge(
            self._hello,
            wire.Standing(
                phase=self._mesh.phase(),
                busy=self._giver.active is not None,
                uid=os.geteuid(),
                peer_uid=self._peer.uid,
                peer_pid=self._peer.pid,
                state_versions=wire.state_versions(),
                descriptors=self._descriptors,
            ),
        )
        if isinstance(found, wire.Refuse):
            self._refusal = found
            self.driver.feed("refuse", found.reason)
            return
        assert self.driver.fence is not None
        self._giver.active = self
        self._mode = found
        self.driver.machine.can_signal = self._peer.pid > 0 and self.driver.fence.can_signal()
        self.driver.feed(found)

    def _said_no(self) -> wire.Refuse:
        if self._refusal is None:
            return wire.Refuse("protocol", self.driver.machine.reason or "HELLO is awaited")
        return self._refusal

    async def _hold(self) -> None:
        assert self._hello is not None
        self._log.info("handover begins", mode=self._mode, to=self._hello.pid)
        await self._mesh.hold()

    async def _send_ack(self) -> None:
        assert self._hello is not None
        move = self._mode == "move"
        ack = wire.Ack(
            mode="move" if move else "drain",
            state_version=wire.state_versions()[1] if move else 0,
            build=__version__,
            pid=os.getpid(),
            nonce=self._hello.nonce,
            connections=self._descriptors,
            descriptors=self._descriptors,
            fence=self.driver.machine.can_signal,
        )
        await self.driver.send_with(ack, own_pidfd())

    async def _send_listeners(self) -> None:
        assert self._hello is not None
        doors = self._mesh.doors()
        records = wire.split(
            [listener for listener, _ in doors], lock=True, stdio=self._hello.stdio
        )
        at = 0
        for number, record in enumerate(records, 1):
            fds = [fd for _, fd in doors[at : at + len(record.listeners)]]
            at += len(record.listeners)
            if record.lock:
                fds.append(self._mesh.lock())
            if record.stdio:
                fds += [1, 2]
            faults.strike("giver", "S3", number)
            await self.driver.send(record, fds)

    async def _send_process(self) -> None:
        data = self._mesh.process_document()
        record = wire.Process(len(data), document.digest(data))
        await self.driver.send_with(record, document.to_memfd(data))

    # --- S4..S8 -----------------------------------------------------------------------------------

    async def _freeze(self) -> None:
        self._frozen_at = time.monotonic()
        await self._mesh.freeze()

    async def _save(self) -> None:
        self._worlds = await self._mesh.save()

    async def _send_state(self) -> None:
        number = 0
        for world in self._worlds:
            size = os.fstat(world.memfd).st_size
            state = wire.State(
                world.thread, size, document.digest_of(world.memfd, size), len(world.descriptors)
            )
            number += 1
            faults.strike("giver", "S5", number)
            await self.driver.send(state, [world.memfd])
            most = limits.HANDOVER_RECORD_FDS_MAX
            for first in range(0, len(world.descriptors), most):
                fds = world.descriptors[first : first + most]
                while (
                    first - self._acked.get(world.thread, 0) >= limits.HANDOVER_ACK_RECORDS * most
                ):
                    self._news.clear()
                    await self._news.wait()
                number += 1
                faults.strike("giver", "S5", number)
                await self.driver.send(wire.Conns(world.thread, first, len(fds)), fds)

    async def _send_end(self) -> None:
        data = self._mesh.process_document()
        total = sum(len(world.descriptors) for world in self._worlds)
        record = wire.End(len(self._worlds), total, len(data), document.digest(data))
        await self.driver.send_with(record, document.to_memfd(data))

    async def _release(self) -> None:
        # Before this process can end: a service manager that sees its main process end, and has
        # not heard of another one, stops the whole service.
        if self._peer.pid:
            notify(f"MAINPID={self._peer.pid}")
        await self._mesh.release()

    async def _send_commit(self) -> None:
        await self.driver.send(wire.Commit())
        self._frozen_ms = (time.monotonic() - self._frozen_at) * 1000

    async def _thaw(self) -> None:
        self._close_worlds()
        await self._mesh.thaw()
        self._frozen_ms = (time.monotonic() - self._frozen_at) * 1000

    def _close_worlds(self) -> None:
        for world in self._worlds:
            os.close(world.memfd)
        self._worlds = []

    def _report(self) -> None:
        state = self.driver.machine.state
        done = state in ("releasing", "gone", "letting_go")
        outcome = "done" if done else "refused" if self._giver.active is not self else "failed"
        self._giver.totals[outcome] += 1
        self._giver.last = {
            "outcome": outcome,
            "reason": "" if done else self.driver.machine.reason,
            "took_ms": round((time.monotonic() - self._began) * 1000),
            "frozen_ms": round(self._frozen_ms, 3),
            "peer": self._hello.pid if self._hello is not None else 0,
        }
        tell = self._log.info if done else self._log.warning
        tell("handover", **self._giver.last)
