"""The taking side: a new process asks the one that serves for everything that lives.

`Taker.run()` goes through the machine (states.py) and says how it ended: `owner` (everything is
ours), `fresh` (nobody was there, or it died: started anew) or `refused`. What the steps do to the
mesh that is being built is said by `Taking`, which the composition root is.
"""

from __future__ import annotations

import os
import resource
import secrets
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastmesh import limits
from fastmesh._version import __version__
from fastmesh.errors import FastmeshError, HandoverError
from fastmesh.handover import document, endpoint, launch, wire
from fastmesh.handover.document import Document
from fastmesh.handover.driver import Driver, NobodyError
from fastmesh.handover.fence import Fence, own_pidfd
from fastmesh.handover.states import Action, Machine
from fastmesh.observe.log import Log


@dataclass(slots=True)
class Door:
    """A listening socket that was received."""

    listener: wire.Listener
    fd: int


@dataclass(slots=True)
class Came:
    """What the giver sent: descriptors belong to whoever holds this, until somebody takes them."""

    doors: list[Door] = field(default_factory=list)
    lock: int = -1
    stdio: tuple[int, int] | None = None
    process: wire.Process | None = None
    process_fd: int = -1
    states: dict[int, wire.State] = field(default_factory=dict)
    memfds: dict[int, int] = field(default_factory=dict)
    descriptors: dict[int, array[int]] = field(default_factory=dict)
    end: wire.End | None = None
    end_fd: int = -1

    def close_connections(self) -> None:
        """What belongs to the giver again, or died with it."""
        for found in self.descriptors.values():
            endpoint.close_all(found)
        self.descriptors.clear()
        endpoint.close_all(self.memfds.values())
        self.memfds.clear()
        endpoint.close_all(fd for fd in (self.process_fd, self.end_fd) if fd >= 0)
        self.process_fd = self.end_fd = -1

    def close_doors(self) -> None:
        endpoint.close_all(door.fd for door in self.doors)
        self.doors.clear()
        endpoint.close_all([self.lock] if self.lock >= 0 else [])
        self.lock = -1
        endpoint.close_all(self.stdio or ())
        self.stdio = None


class Taking(Protocol):
    """What a hand-over does with the mesh that is being built."""

    def threads(self) -> int: ...
    async def prepare(self, came: Came, process: Document | None) -> None:
        """Bind what is new, compile. `came` keeps its descriptors: they may be needed again."""

    async def load(self, thread: int, memfd: int, descriptors: Sequence[int]) -> None:
        """One world. The descriptors are the mesh's from here on, also when it raises."""

    async def restore(self, process: Document) -> None:
        """The process document as it stood when everything was frozen."""

    async def own(self) -> None:
        """Start the threads on what was loaded, accept, serve."""

    async def own_listeners(self) -> None:
        """Start without connections; brokers are told by the new process."""

    async def discard(self) -> None:
        """Close everything that was built or loaded, without shutting anything down and without
        removing a path."""

    async def start_fresh(self) -> None: ...
    async def start_fresh_with_listeners(self, came: Came) -> None: ...
    def pauses_ms(self) -> list[float]:
        """Per engine thread of the giver: from its freeze until everything was armed here."""

    def moved(self) -> dict[str, int]:
        """listeners, downstream, upstream, requests, pushes, bytes."""

    def left(self) -> list[dict[str, str]]: ...


class Taker:
    """One hand-over, from the side of the process that wants everything."""

    def __init__(
        self,
        mesh: Taking,
        path: str,
        log: Log,
        *,
        mode: wire.Mode = "auto",
        stdio: bool = False,
        needs_giver: bool = False,
        reported: Callable[[dict[str, Any]], None] = lambda report: None,
    ) -> None:
        """`stdio`: the giver's output is taken over as well. `needs_giver`: where nobody serves
        nothing is started. `reported` is called once, with the report (launch.py)."""
        self._mesh = mesh
        self._path = path
        self._log = log
        self._mode = mode
        self._stdio = stdio
        self._needs_giver = needs_giver
        self._reported = reported
        self._nonce = secrets.token_hex(wire.NONCE_CHARS // 2)
        self._nofile = _raise_nofile()
        self._books = wire.Received(nonce=self._nonce, nofile=self._nofile)
        self._came = Came()
        self._last: wire.Record | None = None
        self._ack: wire.Ack | None = None
        self._code = ""
        self._began = time.monotonic()
        self.stop_asked = False
        """SIGTERM came when it could not be obeyed."""
        actions: dict[Action, Any] = {
            "connect": self._connect,
            "send_hello": self._send_hello,
            "keep": self._keep,
            "prepare": self._prepare,
            "send_prepared": lambda: self.driver.send(wire.Prepared()),
            "load": self._load,
            "send_ready": lambda: self.driver.send(wire.Ready()),
            "own": self._own,
            "own_listeners": self._own_listeners,
            "discard": self._discard,
            "discard_all": self._discard_all,
            "start_fresh": self._start_fresh,
            "start_fresh_with_listeners": self._start_fresh_with_listeners,
            "exit_refused": lambda: None,  # whoever runs this sees how it ended
            "stop_later": self._remember_stop,
            "report": self._report,
        }
        self.driver: Driver = Driver(Machine("taker"), log, actions=actions, heard=self._heard)

    @property
    def reason(self) -> str:
        return self.driver.machine.reason

    @property
    def code(self) -> str:
        """Of the refusal: a wire.Code, `nobody`, or `failed`."""
        return self._code or "failed"

    async def run(self) -> str:
        """owner | fresh | refused."""
        try:
            await self.driver.run("start")
        finally:
            self._came.close_connections()
            self._came.close_doors()
        return self.driver.machine.state

    # --- records ----------------------------------------------------------------------------------

    def _heard(self, record: wire.Record, fds: list[int]) -> None:
        self._books.take(record, len(fds))
        came = self._came
        if isinstance(record, wire.Ack):
            self._ack = record
            fence = Fence(fds.pop(), record.pid)
            self.driver.machine.can_signal = record.fence and fence.can_signal()
            if self.driver.fence is None:
                self.driver.watch(fence)
            else:
                fence.close()
        elif isinstance(record, wire.Refuse):
            self._code = record.code
        elif isinstance(record, wire.Listeners):
            for listener in record.listeners:
                came.doors.append(Door(listener, fds.pop(0)))
            if record.lock:
                came.lock = fds.pop(0)
            if record.stdio:
                came.stdio = (fds.pop(0), fds.pop(0))
        elif isinstance(record, wire.Process):
            came.process = record
            came.process_fd = fds.pop()
        elif isinstance(record, wire.State):
            came.states[record.thread] = record
            came.memfds[record.thread] = fds.pop()
            came.descriptors[record.thread] = array("i")
        elif isinstance(record, wire.Conns):
            came.descriptors[record.thread].extend(fds)
            fds.clear()
        elif isinstance(record, wire.End):
            came.end = record
            came.end_fd = fds.pop()
        self._last = record

    def _keep(self) -> None:
        """What came was kept when it was heard. The giver sends descriptors only as fast as they
        are taken out of the socket."""
        if isinstance(self._last, wire.Conns):
            thread = self._last.thread
            acked = wire.Acked(thread, len(self._came.descriptors[thread]))
            assert self.driver.sock is not None
            endpoint.send_now(self.driver.sock, wire.encode(acked))

    # --- actions ----------------------------------------------------------------------------------

    async def _connect(self) -> None:
        sock = await endpoint.connect(self._path, limits.HANDOVER_HELLO_MS / 1000)
        if sock is None:
            raise NobodyError
        peer = endpoint.peer_of(sock)
        if peer.uid != os.geteuid():
            sock.close()
            raise HandoverError("handover.sock", f"user {peer.uid}", "must be served by this user")
        if peer.pid:  # (0: it lives in another PID namespace)
            self.driver.watch(Fence(os.pidfd_open(peer.pid), peer.pid))
        self.driver.attach(sock)

    async def _send_hello(self) -> None:
        hello = wire.Hello(
            state_versions=wire.state_versions(),
            build=__version__,
            pid=os.getpid(),
            nonce=self._nonce,
            mode=self._mode,
            nofile=self._nofile,
            threads=self._mesh.threads(),
            stdio=self._stdio,
        )
        await self.driver.send_with(hello, own_pidfd())

    async def _prepare(self) -> None:
        came = self._came
        process = None
        if came.process is not None:
            data = document.from_memfd(came.process_fd, came.process.bytes, came.process.sha256)
            process = document.decode(data)
        await self._mesh.prepare(came, process)

    async def _load(self) -> None:
        came = self._came
        assert came.end is not None
        for thread in sorted(came.states):
            state = came.states[thread]
            memfd = came.memfds[thread]
            found = document.digest_of(memfd, state.bytes)
            if found != state.sha256:
                raise HandoverError("STATE.sha256", state.sha256, f"the memfd has {found}")
            await self._mesh.load(thread, memfd, came.descriptors.pop(thread))
        data = document.from_memfd(came.end_fd, came.end.bytes, came.end.sha256)
        await self._mesh.restore(document.decode(data))

    async def _own(self) -> None:
        self._take_output()
        await self._mesh.own()

    async def _own_listeners(self) -> None:
        self._take_output()
        await self._mesh.own_listeners()

    def _take_output(self) -> None:
        if self._came.stdio is not None:
            for number, fd in enumerate(self._came.stdio, 1):
                os.dup2(fd, number)

    async def _discard(self) -> None:
        self._came.close_connections()
        await self._mesh.discard()

    async def _discard_all(self) -> None:
        await self._discard()
        self._came.close_doors()

    async def _start_fresh(self) -> None:
        # One that died half-way is replaced: it was serving, and nothing else will.
        if self._needs_giver and self.driver.fence is None:
            self._code = "nobody"
            raise FastmeshError(f"no fastmesh serves behind {self._path}: start one with run")
        await self._mesh.start_fresh()

    async def _start_fresh_with_listeners(self) -> None:
        await self._mesh.start_fresh_with_listeners(self._came)
        self._take_output()

    def _remember_stop(self) -> None:
        self.stop_asked = True

    def _old_pid(self) -> int:
        return self._ack.pid if self._ack is not None else 0

    def _report(self) -> None:
        state = self.driver.machine.state
        if state == "refused":
            self._reported(launch.refused(self.code, self.reason, old_pid=self._old_pid()))
            return
        if state == "starting":
            self._log.warning("started anew", reason=self.reason or "nobody was there")
        moved, pauses_ms = self._mesh.moved(), self._mesh.pauses_ms()
        report: dict[str, Any] = {
            "ok": True,
            "code": "",
            "reason": self.reason,
            "mode": {"starting": "fresh", "owning_drain": "drain"}.get(state, "move"),
            "old_pid": self._old_pid(),
            "new_pid": os.getpid(),
            "moved": moved,
            "pause_ms": pauses_ms,
            "left": self._mesh.left(),
            "took_ms": round((time.monotonic() - self._began) * 1000),
        }
        self._log.info(
            "took over",
            mode=report["mode"],
            old_pid=report["old_pid"],
            pause_ms=",".join(f"{pause:.3g}" for pause in pauses_ms),
            **moved,
        )
        self._reported(report)


def _raise_nofile() -> int:
    """As many descriptors as this process may have. Returns that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 2**62
