"""Composition root: builds the running mesh from a configuration, top to bottom, and tears it down
in reverse.

`Mesh.start()` is the list of what runs and why in this order; `Mesh.reload()` the list of what may
change under it. Only the main thread touches any of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvloop

from fastmesh import config as configuration
from fastmesh import limits, saved
from fastmesh._version import __version__
from fastmesh.address import Address, parse_address
from fastmesh.admin.views import Views
from fastmesh.config import Config
from fastmesh.control.discovery import Discovery, Resolve, resolve_with_system
from fastmesh.control.listeners import BoundSocket, Listeners, bind
from fastmesh.control.snapshot import FORWARD, Compiled, Directory, RowLabel, compile_snapshot
from fastmesh.control.state_dir import StateDir
from fastmesh.errors import (
    ConfigError,
    EngineError,
    FastmeshError,
    HandoverRefusedError,
    ListenError,
    NeedsUpgradeError,
    Problem,
    StateError,
)
from fastmesh.handover import document, launch, wire
from fastmesh.handover.document import Document
from fastmesh.handover.drain import IDLE, UPGRADE, Drain, Times
from fastmesh.handover.giver import Giver, World
from fastmesh.handover.hands import EngineHands
from fastmesh.handover.notify import notify
from fastmesh.handover.taker import Came, Taker
from fastmesh.http.gate import Gate
from fastmesh.http.server import HttpServer
from fastmesh.observe.events import Events
from fastmesh.observe.log import Log
from fastmesh.observe.metrics import DrainFigures, HandoverFigures
from fastmesh.observe.readings import Readings, poll

if TYPE_CHECKING:
    from fastmesh.broker.server import Settings as BrokerSettings
    from fastmesh.mesh.plane import Plane
    from fastmesh.mesh.registration_http import RegistrationServer

ADMIN, REGISTRATION = "__admin__", "__registration__"
"""Names of their sockets in a hand-over. Names of the configuration do not start with "__"."""
HANDOVER_SOCKET = "handover.sock"
DOOR_KINDS = ("engine", "admin", "registration")
MOVED = ("downstream", "upstream", "requests", "pushes", "bytes")
"""What the report counts of the engine's state."""

EVENTS_AT_ONCE = 4096
TICK_S = 1.0
ABORT_WAIT_S = 1.0
PR_SET_NO_NEW_PRIVS = 38


def _native_engine(**options: Any) -> Any:
    from fastmesh._ext.engine import Engine

    return Engine(**options)


class Mesh:
    """One running fastmesh. `state` is starting | serving | draining | stopping."""

    def __init__(
        self,
        config: Config,
        log: Log,
        *,
        engine_factory: Callable[..., Any] = _native_engine,
        snapshot_factory: Callable[..., Any] | None = None,
        resolve: Resolve = resolve_with_system,
        lower_priority: bool = False,
    ) -> None:
        self.config = config
        self.log = log
        self.state = "starting"
        self.drained = False
        self.pid = os.getpid()
        self.warnings: list[str] = []
        self._engine_factory = engine_factory
        self._snapshot_factory = snapshot_factory
        self._lower_priority = lower_priority
        self._started = time.monotonic()
        self._directory = Directory(_rows_max())
        self._discovery = Discovery(log, resolve)
        self._listeners = Listeners()
        self._sockets: dict[str, BoundSocket] = {}
        self._accepting: set[int] = set()
        self._admin_socket: BoundSocket | None = None
        self._registration_socket: BoundSocket | None = None
        self._servers: list[HttpServer | RegistrationServer] = []
        self._launcher: launch.Launcher | None = None
        self._asking: set[asyncio.Task[Any] | None] = set()
        """Requests that wait for the report of an upgrade."""
        self.giver: Giver | None = None
        """Where a successor asks."""
        self.plane: Plane | None = None
        """The message mesh; None without a push section."""
        self._compiled: Compiled | None = None
        self._version = 0
        self._names: dict[int, str] = {}
        self._connections_max = config.limits.connections_max
        self._changing = asyncio.Lock()
        self._drained_threads: set[int] = set()
        self._all_drained = asyncio.Event()
        self._stop_asked = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._reload_again = False
        self._reload_task: asyncio.Task[None] | None = None
        self.leaving: Drain | None = None
        """The drain that is under way, or was last."""
        self._drain_task: asyncio.Task[str] | None = None
        self._drain_totals: Counter[tuple[str, str]] = Counter()
        self._asked_names: set[str] = set()
        self._learning: asyncio.Task[None] | None = None
        self._heard: dict[str, dict[int, tuple[int, int]]] = {}
        """Event of a hand-over -> engine thread -> (a, b)."""
        self._news = asyncio.Event()
        self._held = self._frozen = self._stopped_accepting = False
        self._worlds: dict[str, int] = {}
        self._moved: dict[str, int] = {}
        self._handovers: Counter[str] = Counter()
        self._left: list[dict[str, str]] = []
        self._given = asyncio.Event()
        self._way: asyncio.Task[str] | None = None
        self._asked_to_go = asyncio.Event()
        self._may_go = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()

    # --- start ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Everything up and accepting, or an exception with nothing left behind."""
        try:
            # Nobody else may run with our state: checked before anything that others could see.
            await self._prepare(StateDir(self.config.state_dir))
            self.engine.start(self.compiled.snapshot)
            await self._go()
            _keep_objects()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _prepare(self, state_dir: StateDir, before: Document | None = None) -> None:
        """Everything that can fail before a thread runs: sockets, what the last process left,
        names, the snapshot, the engine. `before`: the document of a process that still serves."""
        config, stack = self.config, self._stack
        self._state_dir = state_dir
        stack.callback(state_dir.close)

        # Descriptors first: what follows is sized by them.
        self._connections_max = self._fit_descriptors(config)

        # Sockets are bound before anything serves, so that a port in use is an error and not an
        # outage.
        stack.callback(self._listeners.close)
        self._sockets = self._listeners.prepare(_wanted(config))
        self._admin_socket = self._door(config.admin.listen, ADMIN)
        if config.registration is not None:
            self._registration_socket = self._door(config.registration.listen, REGISTRATION)

        # What clients registered with the last process is in the first snapshot: they find their
        # groups as they left them. So are the files of brokers and schedules.
        if config.push is not None:
            # Imported only where there is one: a relay of RPC alone does not pay for it.
            from fastmesh.mesh.plane import Plane

            self.plane = Plane(
                config,
                state_dir,
                self.log,
                name=self._endpoint_name,
                put_in_force=self._put_mesh_in_force,
            )
            stack.push_async_callback(self.plane.close)
            if before is not None and "plane" in before.parts:
                self.plane.restore(before.part("plane"))
            else:
                self.plane.open()

        # Names that do not resolve in time are taken up later: a dead resolver must not stop a
        # start.
        stack.callback(self._discovery.close)
        await self._discovery.learn(config, self._mesh_addresses())
        self._compiled = self._compile(config, self._connections_max)

        self.engine = self._engine_factory(
            threads=config.engine.threads,
            spin_us=config.engine.spin_us,
            memory_bytes_max=config.limits.memory_bytes_max,
        )
        self.readings = Readings(self.engine)
        self.events = Events(
            self.log,
            listener_name=self._listener_name,
            endpoint_name=self._endpoint_name,
            verdict=self.engine.verdict,
            drained=self._thread_drained,
            push=self.plane.take if self.plane is not None else None,
        )

    async def _go(self) -> None:
        """The engine's threads run: listen to them, accept, and serve."""
        config, stack = self.config, self._stack
        loop = asyncio.get_running_loop()
        stack.push_async_callback(self._stop_engine)
        if self.plane is not None:
            # Before the first event: it has to be known what the numbers in it mean.
            self.plane.attach(self.engine, self.readings)
            stack.push_async_callback(self.plane.detach)
            self.plane.compiled(self.compiled)
        # Engine threads, and the one that starts a successor, were created before this thread
        # lowers its priority, because nice is inherited.
        self._launcher = launch.Launcher()
        stack.callback(self._launcher.close)
        if self._lower_priority:
            lower_priority()
        loop.add_reader(self.engine.event_fd, self._take_events)
        stack.callback(loop.remove_reader, self.engine.event_fd)

        # Accepting starts only when every thread knows where frames go.
        await self._wait_in_force(self.compiled.version)
        self._move_listeners()

        # Registering comes last of the mesh: what it changes is compiled and announced at once.
        if self.plane is not None and self._registration_socket is not None:
            from fastmesh.mesh.registration_http import RegistrationServer

            assert config.registration is not None
            self.plane.start()
            registration = RegistrationServer(config.registration, self.plane.durable, self.log)
            await registration.start(self._registration_socket.sock)
            stack.push_async_callback(registration.close)
            self._servers.append(registration)

        assert self._admin_socket is not None
        admin = HttpServer("admin", Gate(config.admin), Views(self), self.log)
        await admin.start(self._admin_socket.sock)
        stack.push_async_callback(admin.close)
        self._servers.append(admin)

        # A successor may ask from here on.
        self.giver = Giver(
            self, os.path.join(config.state_dir, HANDOVER_SOCKET), self.log, self._handovers
        )
        self.giver.open()
        stack.callback(self.giver.close)

        ticker = asyncio.ensure_future(self._tick())
        stack.push_async_callback(_cancel, ticker)
        self.state = "serving"
        self.log.info(
            "ready",
            version=__version__,
            node=config.node.name,
            pid=self.pid,
            listeners=",".join(f"{k}={v}" for k, v in self.addresses().items()),
            config=config.sha256[:12],
            after_ms=round(self.uptime_s * 1000),
        )

    def _door(self, address: Address, name: str) -> BoundSocket:
        """A listening socket of the control plane: the predecessor's, if it had the same."""
        bound = self._listeners.take(address, name) or bind(address, name)
        self._stack.callback(bound.close)
        return bound

    def _fit_descriptors(self, config: Config) -> int:
        connections_max, warning = fit_descriptors(config)
        if warning and warning not in self.warnings:
            self.warnings = [*self.warnings[-15:], warning]
            self.log.warning("connections_max clamped", detail=warning)
        return connections_max

    def _compile(self, config: Config, connections_max: int) -> Compiled:
        """Raises ConfigError for what only the engine can see."""
        try:
            compiled = compile_snapshot(
                config,
                version=self._version + 1,
                directory=self._directory,
                addresses=self._discovery.addresses,
                connections_max=connections_max,
                factory=self._snapshot_factory,
                mesh=self.plane.view() if self.plane is not None else None,
            )
        except ValueError as wrong:
            raise ConfigError([Problem("", None, str(wrong))], config.source) from wrong
        self._version = compiled.version
        names = {
            # Brokers and nodes have names of their own.
            e.id: e.name if e.id in compiled.kinds else f"{e.cluster}/{e.address or e.name}"
            for e in compiled.endpoints
        }
        names.update({number: name for name, number in compiled.listener_ids.items()})
        # Of the last snapshot too: its connections may still have something to say.
        before = self._compiled
        old: set[int] = set()
        if before is not None:
            old = {e.id for e in before.endpoints} | set(before.listener_ids.values())
        self._names = {**{k: v for k, v in self._names.items() if k in old}, **names}
        return compiled

    async def _wait_in_force(self, version: int) -> None:
        await poll(
            lambda: bool(self.engine.in_force() >= version), "snapshot", limits.PUBLISH_TIMEOUT_S
        )

    # --- what others ask --------------------------------------------------------------------------

    @property
    def compiled(self) -> Compiled:
        assert self._compiled is not None
        return self._compiled

    @property
    def rows(self) -> Mapping[RowLabel, int]:
        return self._directory.rows()

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._started

    @property
    def log_lines_lost(self) -> int:
        return self.log.lines_lost

    @property
    def admin_address(self) -> Address:
        assert self._admin_socket is not None
        return self._admin_socket.actual

    @property
    def registration_address(self) -> Address | None:
        socket = self._registration_socket
        return None if socket is None else socket.actual

    def addresses(self) -> dict[str, str]:
        """Where each listener listens, with real ports; {} once nothing is accepted any more. The
        forward service is there as `__forward__`."""
        return {name: str(s.actual) for name, s in self._sockets.items() if not s.closed}

    def is_ready(self) -> bool:
        return self.state == "serving"

    # --- reload -----------------------------------------------------------------------------------

    async def reload(self) -> int:
        """Read the file again and put it in force; returns the new version.

        Raises ConfigError or NeedsUpgradeError with nothing changed, StateError while not serving.
        """
        async with self._changing:
            if self.state != "serving":
                raise StateError(f"no reload while {self.state}")
            new = await asyncio.to_thread(configuration.load, self.config.source)
            if keys := configuration.needs_upgrade(self.config, new):
                raise NeedsUpgradeError(keys)
            connections_max = self._fit_descriptors(new)
            if self.plane is None:
                await self._discovery.learn(new)
                return await self._put_in_force(new, connections_max)
            before = self.config, self.plane.schedules.now
            self.plane.adopt(new, self.plane.check(new))
            try:
                await self._discovery.learn(new, self._mesh_addresses())
                return await self._put_in_force(new, connections_max)
            except (ConfigError, BlockingIOError):  # before anything was published
                self.plane.adopt(*before)
                raise

    async def _put_in_force(self, config: Config, connections_max: int) -> int:
        """Bind, compile, publish, then move the listeners. Whatever fails, fails before publish."""
        before = self._sockets
        try:
            sockets = self._listeners.prepare(_wanted(config))
        except ListenError as wrong:
            path = "push.forward.listen"
            if wrong.name != FORWARD:
                number = [x.name for x in config.listeners].index(wrong.name)
                path = f"listeners[{number}].listen"
            problem = Problem(path, wrong.address, f"cannot be bound: {wrong.reason}")
            raise ConfigError([problem], config.source) from wrong
        try:
            compiled = self._compile(config, connections_max)
        except ConfigError:
            self._listeners.keep_only(before)
            raise
        self.engine.publish(compiled.snapshot)
        self._compiled = compiled
        if self.plane is not None:
            # What it says to the engine now is done with this snapshot.
            self.plane.compiled(compiled)
        self._sockets = sockets
        self.config = config
        self.log.configure(form=config.log.format, level=config.log.level)
        await self._wait_in_force(compiled.version)
        if self.state == "serving":  # else a drain came in between and has closed them
            self._move_listeners()
        self.events.forget_endpoints({e.id for e in compiled.endpoints})
        return compiled.version

    def _move_listeners(self) -> None:
        """Make the engine accept on exactly the sockets of the snapshot in force."""
        wanted = {number: name for name, number in self.compiled.listener_ids.items()}
        # A socket that only changes its name is accepted on by both for an instant: no connect
        # fails.
        for number, name in wanted.items():
            if number not in self._accepting:
                self.engine.listen(number, self._sockets[name].sock.fileno())
                self._accepting.add(number)
        for number in self._accepting - wanted.keys():
            self.engine.unlisten(number)
        self._accepting &= wanted.keys()
        self._listeners.keep_only(self._sockets)

    def ask_reload(self) -> None:
        """SIGHUP. Signals that come while one is under way become one more reload."""
        if self._reload_task is not None and not self._reload_task.done():
            self._reload_again = True
            return
        self._reload_task = asyncio.ensure_future(self._reload_and_log())

    async def _reload_and_log(self) -> None:
        while True:
            self._reload_again = False
            try:
                version = await self.reload()
                sha = self.config.sha256[:12]
                self.log.limited("info", "reload", "reloaded", version=version, config=sha)
            except ConfigError as wrong:
                for p in wrong.problems:
                    self.log.limited(
                        "error",
                        "reload refused",
                        "reload refused",
                        path=p.path,
                        line=p.line,
                        value=str(p.value),
                        message=p.message,
                    )
            except FastmeshError as wrong:
                self.log.limited("error", "reload refused", "reload refused", reason=str(wrong))
            if not self._reload_again:
                return

    async def _tick(self) -> None:
        """Once a second: what was held back in the log; now and then: names."""
        ask_at = time.monotonic() + limits.RESOLVE_INTERVAL_S
        while True:
            await asyncio.sleep(TICK_S)
            self.log.flush()
            if time.monotonic() < ask_at:
                continue
            ask_at = time.monotonic() + limits.RESOLVE_INTERVAL_S
            try:
                await self._refresh_names()
            except FastmeshError as wrong:
                self.log.limited("error", "refresh", "names not taken up", reason=str(wrong))

    def _mesh_addresses(self) -> list[Address]:
        found = [] if self.plane is None else list(self.plane.addresses())
        self._asked_names = {a.host for a in found if not a.is_literal}
        return found

    async def _put_mesh_in_force(self) -> None:
        """A snapshot with what was registered, scheduled or found in a file since the last one.
        Names that are new with it are taken up when they resolve: nothing waits for them."""
        known = self._asked_names
        addresses = self._mesh_addresses()
        if self._asked_names - known and (self._learning is None or self._learning.done()):
            self._learning = asyncio.ensure_future(self._learn(addresses))
        async with self._changing:
            if self._takes_snapshots():
                await self._put_in_force(self.config, self._connections_max)

    def _takes_snapshots(self) -> bool:
        """Also in the first steps of a drain, which may be cancelled: registrations go on, and a
        broker that is new then is suspended like the others."""
        drain = self.leaving
        if self.state != "draining" or drain is None:
            return self.state == "serving"
        return not drain.is_letting_go and drain.cause != UPGRADE

    async def _learn(self, addresses: list[Address]) -> None:
        await self._discovery.learn(self.config, addresses)
        if self.plane is not None:
            self.plane.ask_snapshot()

    async def _refresh_names(self) -> None:
        if not await self._discovery.refresh(self.config, self._mesh_addresses()):
            return
        async with self._changing:
            if self._takes_snapshots():
                await self._put_in_force(self.config, self._connections_max)

    # --- upgrade ----------------------------------------------------------------------------------

    async def upgrade(self) -> dict[str, Any]:
        """Start a successor with the same interpreter and configuration file, and wait for its
        report (fastmesh.handover.launch)."""
        if self._launcher is None:
            return launch.refused("stopping", f"no upgrade while {self.state}")
        source, timeout_s = self.config.source, limits.HANDOVER_REPORT_S
        asking = asyncio.current_task()
        self._asking.add(asking)
        try:
            future = self._launcher.submit(lambda: launch.upgrade(source, timeout_s=timeout_s))
            return await asyncio.wrap_future(future)
        finally:
            self._asking.discard(asking)

    def handover_status(self) -> dict[str, Any]:
        return {} if self.giver is None else self.giver.status()

    def handover_figures(self) -> HandoverFigures:
        pauses_s = [pause / 1000 for pause in self.pauses_ms()]
        return HandoverFigures(self._handovers, pauses_s)

    # --- hand-over, the giving side (fastmesh.handover.giver) -------------------------------------

    def phase(self) -> str:
        return self.state

    def descriptors(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    async def hold(self) -> None:
        await self._changing.acquire()  # a reload under way ends first
        self._held = True
        if self.plane is not None:
            await self.plane.hold(limits.HANDOVER_ANSWERS_S)

    def doors(self) -> list[tuple[wire.Listener, int]]:
        found = [(name, "engine", bound) for name, bound in self._sockets.items()]
        if self._admin_socket is not None:
            found.append((ADMIN, "admin", self._admin_socket))
        if self._registration_socket is not None:
            found.append((REGISTRATION, "registration", self._registration_socket))
        return [
            (wire.Listener(name, kind, str(bound.address), bound.inode), bound.sock.fileno())
            for name, kind, bound in found
        ]

    def lock(self) -> int:
        return self._state_dir.fd

    def process_document(self) -> bytes:
        parts: dict[str, Any] = {
            "snapshot": self._directory.save(self._version),
            "names": self._discovery.save(),
            "log": self.log.save(),
            "moved": {"listeners": len(self.doors()), **self._worlds},
            "left": self._left,
            "handovers": self._handovers,
            "drains": [[*key, count] for key, count in self._drain_totals.items()],
            "events": self.events.save(),
        }
        if self.plane is not None:
            parts["plane"] = self.plane.save()
        return document.encode(parts)

    async def close_doors(self) -> None:
        # Whoever asked for this very upgrade is answered when it is over.
        late = [await s.hold(limits.HANDOVER_ANSWERS_S, self._asking) for s in self._servers]
        self._left = []
        if sum(late):
            what = f"{sum(late)} requests of the admin or registration interface"
            self._left.append({"what": what, "why": "the old process still answers them"})

    async def freeze(self) -> None:
        self._heard.clear()
        gc.disable()  # a collection would make the pause longer
        self.engine.freeze()
        self._frozen = True
        await self._hear("frozen")

    async def save(self) -> list[World]:
        if self.plane is not None:
            # What the engine had to say before it stood still is answered before anything is saved.
            while not self.plane.is_said():
                self.plane.settle()
                await asyncio.sleep(0)
            self.plane.still()
        self.engine.save()
        for thread, (error, _) in (await self._hear("saved")).items():
            if error:
                raise OSError(error, f"engine thread {thread} cannot save: {os.strerror(error)}")
        worlds = []
        for thread in range(self.config.engine.threads):
            state = self.engine.saved(thread)
            figures = {key: int(getattr(state, key)) for key in MOVED}
            worlds.append(World(thread, state.memfd, state.descriptors, figures))
        self._worlds = {key: sum(world.figures[key] for world in worlds) for key in MOVED}
        return worlds

    async def _hear(self, kind: str) -> dict[int, tuple[int, int]]:
        """What every engine thread said."""
        while len(found := self._heard.get(kind, {})) < self.config.engine.threads:
            self._news.clear()
            await self._news.wait()
        return found

    async def thaw(self) -> None:
        if self._frozen:  # (else the freeze itself has failed)
            self._frozen = False
            self.engine.thaw()
        gc.enable()

    async def resume(self) -> None:
        if self._way is not None:
            self._way.cancel()
            with contextlib.suppress(asyncio.CancelledError, FastmeshError):
                await self._way
            self._way = None
        if not self._stop_asked.is_set():
            if self._stopped_accepting:
                self._stopped_accepting = False
                self.engine.accept(True)
            for server in self._servers:
                await server.resume()
        if self._held:
            self._held = False
            if self.plane is not None:
                self.plane.thaw()
            self._changing.release()

    async def suspend(self) -> None:
        self._may_go.clear()
        self._asked_to_go.clear()

        async def listeners_may_go() -> None:
            self._asked_to_go.set()
            await self._may_go.wait()

        self._way = asyncio.ensure_future(self.give_way(listeners_may_go))

    async def settle(self) -> None:
        assert self._way is not None
        asked = asyncio.ensure_future(self._asked_to_go.wait())
        try:
            await asyncio.wait([self._way, asked], return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
        if self._way.done():
            self._way.result()  # raises why it went another way
            raise StateError("the drain ended before the listeners could go")

    def stop_accepting(self) -> None:
        self._stopped_accepting = True
        self.engine.accept(False)

    async def let_go(self) -> None:
        assert self._way is not None
        self._may_go.set()
        # They are the successor's, with their paths: this process ends later than it begins.
        for bound in (self._admin_socket, self._registration_socket):
            if bound is not None:
                bound.forget()
        await self._way
        self._way = None
        if not self._all_drained.is_set():
            self.engine.abort_in_flight()
            await _first(self._all_drained, timeout_s=ABORT_WAIT_S)

    async def release(self) -> None:
        self.engine.release()
        if self.plane is not None:
            self.plane.abandon()
        self._listeners.forget()
        for bound in (self._admin_socket, self._registration_socket):
            if bound is not None:
                bound.forget()
        await self._stop_engine()

    def handed_over(self) -> None:
        self.state = "gone"
        self._given.set()

    # --- hand-over, the taking side ---------------------------------------------------------------

    async def prepare_from(self, came: Came, before: Document | None) -> None:
        """Everything that can fail before connections come. `came` keeps its descriptors. Raises
        FastmeshError with nothing left behind."""
        try:
            if came.lock < 0:
                raise StateError("the lock of the state directory did not come")
            state_dir = StateDir.adopt(self.config.state_dir, os.dup(came.lock))
            for door in came.doors:
                one = door.listener
                if one.kind in DOOR_KINDS:
                    address = parse_address(one.address, "/", port_min=0)
                    self._listeners.adopt(address, one.name, os.dup(door.fd), one.inode)
            if before is not None:
                self._version = self._directory.restore(before.part("snapshot"))
                self._discovery.restore(before.part("names"))
            await self._prepare(state_dir, before)
        except BaseException:
            await self._stack.aclose()
            raise

    def adopt(self) -> None:
        """Ready to load: the engine knows the snapshot, and connects nowhere."""
        gc.disable()  # until it serves: a collection would make the pause longer
        self.engine.adopt(self.compiled.snapshot)

    def load(self, thread: int, memfd: int, descriptors: Sequence[int]) -> None:
        self.engine.load(thread, memfd, descriptors)

    def restore(self, process: Document) -> None:
        """The document as it stood when everything was frozen."""
        plane = self.plane if "plane" in process.parts else None
        if plane is not None and plane.restore(process.part("plane")):
            plane.ask_snapshot()  # what was registered since the first copy
        self.events.restore(process.part("events"))
        self.log.restore(process.part("log"))
        self._moved = saved.read(process.part("moved"), dict[str, saved.Count], "moved")
        self._left = saved.read(process.part("left") or [], list[dict[str, saved.Text]], "left")
        self._handovers.update(
            saved.read(process.part("handovers"), dict[str, saved.Count], "handovers")
        )
        self._handovers["done"] += 1
        shape = list[tuple[saved.Text, saved.Text, saved.Count]]
        for step, outcome, count in saved.read(process.part("drains") or [], shape, "drains"):
            self._drain_totals[step, outcome] += count

    async def own(self, *, loaded: bool) -> None:
        """Everything is ours: run, accept, serve. `loaded`: connections came."""
        if loaded:
            self.engine.start_adopted()
        else:
            if self.plane is not None:
                self.plane.forget_connections()
            self._moved = {"listeners": len(self.doors())}
            self.engine.start(self.compiled.snapshot)
        self._listeners.own()
        for bound in (self._admin_socket, self._registration_socket):
            if bound is not None:
                bound.own()
        self._state_dir.own()
        await self._go()
        if loaded:
            await self._hear("thawed")
        # Not before: the engine may arm its connections on the very CPU that this would take.
        _keep_objects()

    def pauses_ms(self) -> list[float]:
        return [
            round((armed - frozen) / 1e6, 3)
            for _, (armed, frozen) in sorted(self._heard.get("thawed", {}).items())
            if frozen
        ]

    def moved(self) -> dict[str, int]:
        return {key: self._moved.get(key, 0) for key in ("listeners", *MOVED)}

    def left(self) -> list[dict[str, str]]:
        return self._left

    async def discard(self) -> None:
        """Nothing of this is used: close what was built, shut nothing down, remove no path."""
        await self._stack.aclose()

    # --- events -----------------------------------------------------------------------------------

    def _take_events(self) -> None:
        for event in self.engine.events(EVENTS_AT_ONCE):
            if event.kind in ("frozen", "saved", "thawed"):
                self._heard.setdefault(event.kind, {})[event.thread] = (event.a, event.b)
                self._news.set()
            else:
                self.events.take(event)
        if self.plane is not None:
            self.plane.settle()

    def _listener_name(self, number: int) -> str:
        return self._names.get(number, str(number))

    _endpoint_name = _listener_name

    def _thread_drained(self, thread: int) -> None:
        self._drained_threads.add(thread)
        if len(self._drained_threads) >= self.config.engine.threads:
            self.drained = True
            if not self._all_drained.is_set():
                self._all_drained.set()
                self.log.info("drained")

    # --- stop -------------------------------------------------------------------------------------

    def drain(self, *, hold: bool = False, cause: str = "admin") -> None:
        """Nothing new comes, what came is answered, clients are let go one by one as they fall
        quiet (fastmesh.handover.drain). The process stays.

        With `hold` clients stay until it is asked without; StateError when they are being let go
        already, or fastmesh is not serving."""
        if self.state == "serving":
            self.log.info("draining")
            self._leave(self._new_drain(hold=hold, cause=cause))
        elif self.state != "draining" or self.leaving is None:
            raise StateError(f"no drain while {self.state}")
        elif hold:
            self.leaving.hold()
        else:
            self.leaving.release()

    def cancel_drain(self) -> None:
        """Back to serving, as long as clients are not being let go. Raises StateError."""
        if self.leaving is None:
            raise StateError("no drain is under way")
        self.leaving.cancel()
        self.state = "serving"

    async def give_way(self, listeners_may_go: Callable[[], Awaitable[None]]) -> str:
        """The drain of a hand-over that cannot move connections. Brokers are suspended and pushes
        answered; `listeners_may_go` is awaited: when it returns, another process has the listeners;
        clients are let go. Returns how the last step ended: what is left then, `stop()` answers.

        Raises what `listeners_may_go` raises, and StateError while not serving: serving goes on."""
        if self.state != "serving":
            raise StateError(f"no hand-over while {self.state}")
        self.log.info("draining")
        drain = self._new_drain(cause=UPGRADE, may_go=listeners_may_go)
        try:
            return await self._leave(drain)
        finally:
            if not drain.is_letting_go and self.state == "draining":
                self.state = "serving"

    def drain_status(self) -> Mapping[str, Any]:
        return IDLE if self.leaving is None else self.leaving.status()

    def drain_figures(self) -> DrainFigures:
        return DrainFigures() if self.leaving is None else self.leaving.figures()

    def _new_drain(self, **options: Any) -> Drain:
        hands = EngineHands(
            self.engine,
            self.plane,
            self.readings,
            rows=self._directory.rows,
            stop_accepting=self._leave_listeners,
            gone=self._all_drained.is_set,
        )
        times = Times.of(self.config.limits)
        return Drain(hands, self.log, times, totals=self._drain_totals, **options)

    def _leave_listeners(self, keep_paths: bool) -> None:
        if keep_paths:
            self._listeners.forget()
        else:
            self._listeners.close()

    def _leave(self, drain: Drain) -> asyncio.Task[str]:
        self.state = "draining"
        self.leaving = drain
        self._drain_task = asyncio.ensure_future(drain.run())
        drain.begin()
        return self._drain_task

    def ask_stop(self) -> None:
        """SIGTERM: gracefully; the second time: at once."""
        if self.giver is not None:
            self.giver.stop()
        if self._stop_asked.is_set():
            self._stop_now.set()
            if self.leaving is not None:
                self.leaving.cut()
        self._stop_asked.set()

    async def run_until_stopped(self) -> None:
        """Serve until `ask_stop()`, then drain for stop_timeout_ms, answer the rest, tear down; or
        until a successor has everything."""
        await _first(self._stop_asked, self._given)
        if self.giver is not None:
            await self.giver.ended()  # which way is soon known: every step has a deadline
        if self._given.is_set():
            # Whoever asked for this upgrade still waits for its answer.
            for server in self._servers:
                await server.hold(limits.HANDOVER_LAST_ANSWER_S)
            await self._stack.aclose()
            self.log.info("gone", uptime_s=round(self.uptime_s, 3))
        else:
            await self.stop()

    async def stop(self) -> None:
        until = asyncio.get_running_loop().time() + self.config.limits.stop_timeout_ms / 1000
        async with self._changing:  # a reload under way ends first: it is bounded
            if self.state == "serving":
                self.drain(cause="signal")
        if self.leaving is not None and self._drain_task is not None:
            self.leaving.stop(until)
            if self._stop_now.is_set():
                self.leaving.cut()
            await asyncio.wait([self._drain_task])
            task = self._drain_task
            if not task.cancelled() and (fault := task.exception()) is not None:
                self.log.error("drain failed", error=repr(fault))
        self.state = "stopping"
        if not self._all_drained.is_set():
            left = {} if self.leaving is None else self.leaving.told()
            self.log.warning("stopping with requests or connections left", **left)
            self.engine.abort_in_flight()
            await _first(self._all_drained, timeout_s=ABORT_WAIT_S)
        await self._stack.aclose()
        self.log.info("stopped", uptime_s=round(self.uptime_s, 3))

    async def _stop_engine(self) -> None:
        """In a helper thread, because joining blocks and the loop goes on taking events."""
        if not await asyncio.to_thread(self.engine.stop, limits.STOP_JOIN_MS):
            self.log.error("an engine thread did not end", after_ms=limits.STOP_JOIN_MS)
            raise EngineError("an engine thread did not end in time")


def fit_descriptors(config: Config) -> tuple[int, str]:
    """Raise the soft descriptor limit to what the configuration needs. Returns connections_max,
    lowered to what is left when the hard limit is too low, and why ("" when it was not lowered)."""
    wanted = config.limits.connections_max
    per_client = any(c.binding == "per_client" for c in config.clusters)
    shared = sum(
        len(c.endpoints) * c.connections * config.engine.threads
        for c in config.clusters
        if c.binding == "shared"
    )
    each = 2 if per_client else 1
    mesh = 0
    if config.push is not None:
        mesh = limits.BROKERS_MAX + limits.PEERS_EXPECTED
    # During a reload old and new listeners and upstreams are open side by side.
    fixed = 2 * (shared + mesh + len(config.listeners)) + limits.FDS_RESERVED
    need = wanted * each + fixed
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = need if hard == resource.RLIM_INFINITY else min(hard, need)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft == resource.RLIM_INFINITY or soft >= need:
        return wanted, ""
    fits = max(1, (soft - fixed) // each)
    return fits, (
        f"limits.connections_max {wanted} needs {need} file descriptors, the limit is {soft}:"
        f" {fits} connections are accepted"
    )


def lower_priority() -> None:
    """Let the engine threads go first. Needs no privilege; only this thread (and its children)
    changes."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), limits.MAIN_THREAD_NICE)


def drop_privileges_for_good() -> None:
    """No child or exec may gain what we do not have (PR_SET_NO_NEW_PRIVS)."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _wanted(config: Config) -> list[tuple[str, Address]]:
    """Name and address of every socket that the engine accepts on."""
    found = [(x.name, x.listen) for x in config.listeners]
    if config.push is not None and config.push.forward is not None:
        found.append((FORWARD, config.push.forward))
    return found


def _rows_max() -> int:
    from fastmesh._ext.counters import ROWS_MAX

    return ROWS_MAX


async def _cancel(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _first(*events: asyncio.Event, timeout_s: float | None = None) -> None:
    """Until one of the events is set or the time is over."""
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


class _LibraryLog(logging.Handler):
    """What libraries log (asyncio's "exception was never retrieved") as lines of ours."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = repr(record.exc_info[1]) if record.exc_info else None
        level = "error" if record.levelno >= logging.ERROR else "warning"
        self._log.limited(level, record.name, record.getMessage(), logger=record.name, error=error)


class Successor:
    """The mesh that is being built while another process still serves (fastmesh.handover.taker)."""

    def __init__(self, config: Config, log: Log) -> None:
        self._config = config
        self._log = log
        self.mesh: Mesh | None = None

    def _new(self) -> Mesh:
        self.mesh = Mesh(self._config, self._log, lower_priority=True)
        return self.mesh

    def _built(self) -> Mesh:
        assert self.mesh is not None
        return self.mesh

    def threads(self) -> int:
        return self._config.engine.threads

    async def prepare(self, came: Came, process: Document | None) -> None:
        await self._new().prepare_from(came, process)
        if process is not None:
            self._built().adopt()

    async def load(self, thread: int, memfd: int, descriptors: Sequence[int]) -> None:
        self._built().load(thread, memfd, descriptors)

    async def restore(self, process: Document) -> None:
        self._built().restore(process)

    async def own(self) -> None:
        await self._built().own(loaded=True)

    async def own_listeners(self) -> None:
        await self._built().own(loaded=False)

    async def discard(self) -> None:
        if self.mesh is not None:
            await self.mesh.discard()
            self.mesh = None

    async def start_fresh(self) -> None:
        await self._new().start()

    async def start_fresh_with_listeners(self, came: Came) -> None:
        mesh = self._new()
        await mesh.prepare_from(came, None)
        await mesh.own(loaded=False)

    def pauses_ms(self) -> list[float]:
        return self._built().pauses_ms()

    def moved(self) -> dict[str, int]:
        return self._built().moved()

    def left(self) -> list[dict[str, str]]:
        return self._built().left()


@dataclass(frozen=True, slots=True)
class Takeover:
    """How `fastmesh run --takeover` was asked."""

    mode: wire.Mode = "auto"
    report_fd: int = -1
    """Somebody waits for the report there: without a predecessor nothing is started, and its output
    is taken over."""


def _stops(ask_stop: Callable[[], None]) -> None:
    """SIGTERM and SIGINT ask this from now on."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ask_stop)
    loop.add_signal_handler(signal.SIGINT, ask_stop)


async def _serve(config: Config, log: Log) -> None:
    mesh = Mesh(config, log, lower_priority=True)
    # Before start(): a signal in the first milliseconds is a stop too, not an abort.
    _stops(mesh.ask_stop)
    await mesh.start()
    await _run(mesh)


async def _run(mesh: Mesh) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, mesh.ask_reload)
    notify("READY=1", f"MAINPID={mesh.pid}")
    await mesh.run_until_stopped()


async def _take_over(config: Config, log: Log, how: Takeover) -> None:
    """Become the successor of whoever serves with this state directory. Raises FastmeshError."""
    successor = Successor(config, log)
    waiting = how.report_fd >= 0

    def reported(report: dict[str, Any]) -> None:
        if waiting:
            launch.write_report(how.report_fd, report)

    taker = Taker(
        successor,
        os.path.join(config.state_dir, HANDOVER_SOCKET),
        log,
        mode=how.mode,
        stdio=waiting,
        needs_giver=waiting,
        reported=reported,
    )
    _stops(taker.driver.stop)
    if await taker.run() == "refused":
        raise HandoverRefusedError(taker.code, taker.reason)
    assert successor.mesh is not None
    _stops(successor.mesh.ask_stop)
    if taker.stop_asked:
        successor.mesh.ask_stop()
    await _run(successor.mesh)


def _keep_objects() -> None:
    """What lives now lives for long: the collector need not walk it again."""
    gc.enable()
    gc.collect()
    gc.freeze()


def run(path: str, takeover: Takeover | None = None) -> None:
    """`fastmesh run`: serve until SIGTERM. Raises FastmeshError."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    config = configuration.load(path)
    log = Log(form=config.log.format, level=config.log.level)
    logging.getLogger().addHandler(_LibraryLog(log))
    drop_privileges_for_good()
    if takeover is None:
        uvloop.run(_serve(config, log))
    else:
        uvloop.run(_take_over(config, log, takeover))


async def _serve_broker(settings: BrokerSettings, log: Log) -> None:
    from fastmesh.broker.server import Broker

    broker = Broker(settings, log)
    _stops(broker.ask_stop)
    await broker.start()
    await broker.run_until_stopped()


def run_broker(settings: BrokerSettings) -> None:
    """`fastmesh broker`: serve until SIGTERM. Raises FastmeshError."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is nothing to reload
    log = Log(form=settings.log_format, level=settings.log_level)
    logging.getLogger().addHandler(_LibraryLog(log))
    drop_privileges_for_good()
    sys.setswitchinterval(limits.BROKER_SWITCH_INTERVAL_S)
    uvloop.run(_serve_broker(settings, log))
