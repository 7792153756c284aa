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
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import uvloop

from fastmesh import config as configuration
from fastmesh import limits
from fastmesh._version import __version__
from fastmesh.address import Address
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
    ListenError,
    NeedsUpgradeError,
    Problem,
    StateError,
)
from fastmesh.http.gate import Gate
from fastmesh.http.server import HttpServer
from fastmesh.observe.events import Events
from fastmesh.observe.log import Log
from fastmesh.observe.readings import Readings, poll

if TYPE_CHECKING:
    from fastmesh.broker.server import Settings as BrokerSettings
    from fastmesh.mesh.plane import Plane

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
        self._drain_task: asyncio.Task[None] | None = None
        self._asked_names: set[str] = set()
        self._learning: asyncio.Task[None] | None = None
        self._stack = contextlib.AsyncExitStack()

    # --- start ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Everything up and accepting, or an exception with nothing left behind."""
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _start(self) -> None:
        config, stack = self.config, self._stack
        loop = asyncio.get_running_loop()

        # Nobody else may run with our state: checked before anything that others could see.
        state_dir = StateDir(config.state_dir)
        stack.callback(state_dir.close)

        # Descriptors first: what follows is sized by them.
        self._connections_max = self._fit_descriptors(config)

        # Sockets are bound before anything serves, so that a port in use is an error and not an
        # outage.
        stack.callback(self._listeners.close)
        self._sockets = self._listeners.prepare(_wanted(config))
        self._admin_socket = bind(config.admin.listen, "admin")
        stack.callback(self._admin_socket.close)
        if config.registration is not None:
            self._registration_socket = bind(config.registration.listen, "registration")
            stack.callback(self._registration_socket.close)

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
            self.plane.open()

        # Names that do not resolve in time are taken up later: a dead resolver must not stop a
        # start.
        stack.callback(self._discovery.close)
        await self._discovery.learn(config, self._mesh_addresses())
        compiled = self._compile(config, self._connections_max)

        # Engine threads are created before this thread lowers its priority, because nice is
        # inherited.
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
        self.engine.start(compiled.snapshot)
        stack.push_async_callback(self._stop_engine)
        self._compiled = compiled
        if self.plane is not None:
            # Before the first event: it has to be known what the numbers in it mean.
            self.plane.attach(self.engine, self.readings)
            stack.push_async_callback(self.plane.detach)
            self.plane.compiled(compiled)
        if self._lower_priority:
            lower_priority()
        loop.add_reader(self.engine.event_fd, self._take_events)
        stack.callback(loop.remove_reader, self.engine.event_fd)

        # Accepting starts only when every thread knows where frames go.
        await self._wait_in_force(compiled.version)
        self._move_listeners()

        # Registering comes last of the mesh: what it changes is compiled and announced at once.
        if self.plane is not None and self._registration_socket is not None:
            from fastmesh.mesh.registration_http import RegistrationServer

            assert config.registration is not None
            self.plane.start()
            registration = RegistrationServer(config.registration, self.plane.durable, self.log)
            await registration.start(self._registration_socket.sock)
            stack.push_async_callback(registration.close)

        admin = HttpServer("admin", Gate(config.admin), Views(self), self.log)
        await admin.start(self._admin_socket.sock)
        stack.push_async_callback(admin.close)

        ticker = asyncio.ensure_future(self._tick())
        stack.push_async_callback(_cancel, ticker)
        self.state = "serving"
        # What lives now lives for long: the collector need not walk it again.
        gc.collect()
        gc.freeze()
        self.log.info(
            "ready",
            version=__version__,
            node=config.node.name,
            pid=self.pid,
            listeners=",".join(f"{k}={v}" for k, v in self.addresses().items()),
            config=config.sha256[:12],
            after_ms=round(self.uptime_s * 1000),
        )

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
            if self.state == "serving":
                await self._put_in_force(self.config, self._connections_max)

    async def _learn(self, addresses: list[Address]) -> None:
        await self._discovery.learn(self.config, addresses)
        if self.plane is not None:
            self.plane.ask_snapshot()

    async def _refresh_names(self) -> None:
        if not await self._discovery.refresh(self.config, self._mesh_addresses()):
            return
        async with self._changing:
            if self.state == "serving":
                await self._put_in_force(self.config, self._connections_max)

    # --- events -----------------------------------------------------------------------------------

    def _take_events(self) -> None:
        for event in self.engine.events(EVENTS_AT_ONCE):
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

    def drain(self) -> None:
        """Accept nothing new; clients are let go one by one as they fall quiet. The process stays.

        With a message mesh brokers and peers are asked first to push nothing more: until they have
        agreed and what they pushed is answered, for at most stop_timeout_ms, clients stay."""
        if self.state != "serving":
            return
        self.state = "draining"
        self.log.info("draining")
        if self.plane is None:
            self._let_go()
        else:
            self._drain_task = asyncio.ensure_future(self._leave_mesh(self.plane))

    async def _leave_mesh(self, plane: Plane) -> None:
        leaving = asyncio.ensure_future(plane.leave(self.config.limits.stop_timeout_ms / 1000))
        stop_now = asyncio.ensure_future(self._stop_now.wait())
        try:
            await asyncio.wait([leaving, stop_now], return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() and (fault := leaving.exception()) is not None:
                self.log.error("brokers were not asked to stop", reason=repr(fault))
        finally:
            stop_now.cancel()
            leaving.cancel()
            self._let_go()

    def _let_go(self) -> None:
        self.engine.drain()
        # Our duplicates too: a connect must be refused, not wait in a backlog that nobody reads.
        self._listeners.close()

    def ask_stop(self) -> None:
        """SIGTERM: gracefully; the second time: at once."""
        if self._stop_asked.is_set():
            self._stop_now.set()
        self._stop_asked.set()

    async def run_until_stopped(self) -> None:
        """Serve until `ask_stop()`, then drain for stop_timeout_ms, answer the rest, tear down."""
        await self._stop_asked.wait()
        await self.stop()

    async def stop(self) -> None:
        until = time.monotonic() + self.config.limits.stop_timeout_ms / 1000
        async with self._changing:  # a reload under way ends first: it is bounded
            self.drain()
        if self._drain_task is not None:
            await self._drain_task
        timeout_s = max(0.0, until - time.monotonic())
        await _first(self._all_drained, self._stop_now, timeout_s=timeout_s)
        self.state = "stopping"
        if not self._all_drained.is_set():
            self.log.warning("stopping with requests or connections left")
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


async def _first(*events: asyncio.Event, timeout_s: float) -> None:
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


async def _serve(config: Config, log: Log) -> None:
    mesh = Mesh(config, log, lower_priority=True)
    loop = asyncio.get_running_loop()
    # Before start(): a signal in the first milliseconds is a stop too, not an abort.
    loop.add_signal_handler(signal.SIGTERM, mesh.ask_stop)
    loop.add_signal_handler(signal.SIGINT, mesh.ask_stop)
    await mesh.start()
    loop.add_signal_handler(signal.SIGHUP, mesh.ask_reload)
    await mesh.run_until_stopped()


def run(path: str) -> None:
    """`fastmesh run`: serve until SIGTERM. Raises FastmeshError."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    config = configuration.load(path)
    log = Log(form=config.log.format, level=config.log.level)
    logging.getLogger().addHandler(_LibraryLog(log))
    drop_privileges_for_good()
    uvloop.run(_serve(config, log))


async def _serve_broker(settings: BrokerSettings, log: Log) -> None:
    from fastmesh.broker.server import Broker

    broker = Broker(settings, log)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, broker.ask_stop)
    loop.add_signal_handler(signal.SIGINT, broker.ask_stop)
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
