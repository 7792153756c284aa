"""The message mesh of one process on its loop: what the composition root starts, feeds with events
and asks for views.

    DurableRegistry ─┐
    Brokers (file) ──┼─> view() ─> snapshot ─> compiled() ─> PushControl ─> EngineWire ─> engine
    Schedules ───────┘                                        ▲ events

Changes ask for a snapshot; asks are folded, and there are at least COMPILE_GAP_S between two.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from fastmesh import limits
from fastmesh.address import Address
from fastmesh.config import Config
from fastmesh.control.snapshot import Compiled, MeshView
from fastmesh.control.state_dir import StateDir
from fastmesh.errors import EngineError, FastmeshError
from fastmesh.mesh.durable import DurableRegistry
from fastmesh.mesh.persist import GenerationStore, Saver
from fastmesh.mesh.push import Event, PushControl
from fastmesh.mesh.registration import Change
from fastmesh.mesh.sources import Brokers, Scheduled, Schedules
from fastmesh.mesh.topology import Rates, topology
from fastmesh.mesh.wire import EngineWire
from fastmesh.observe.log import Log
from fastmesh.observe.readings import Readings, poll

RING_FULL_WAIT_S = 0.005
FAULT_WAIT_S = 1.0
LEAVE_LOOK_S = 0.02
STORE_NAME = "schedule"


def monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class Plane:
    """`open()`, `attach()` an engine, `start()` ... `detach()`, `close()`.

    `put_in_force` compiles and publishes a snapshot. It raises FastmeshError or BlockingIOError
    when that fails, and is called again.
    """

    def __init__(
        self,
        config: Config,
        state_dir: StateDir,
        log: Log,
        *,
        name: Callable[[int], str],
        put_in_force: Callable[[], Awaitable[None]],
        clock_ms: Callable[[], int] = monotonic_ms,
    ) -> None:
        """Raises StateError."""
        assert config.push is not None
        self.config = config
        self.failure = ""
        """Why the last snapshot was not taken; "" when it was."""
        self._log = log
        self._put_in_force = put_in_force
        self._clock_ms = clock_ms
        self.durable = DurableRegistry(state_dir, log, on_change=self._registered)
        self._store = GenerationStore(state_dir, STORE_NAME, limits.SCHEDULE_BYTES_MAX)
        self._saver = Saver(self._store)
        self.wire = EngineWire()
        self.control = PushControl(
            self.wire,
            self.durable.registry,
            log,
            node=config.node.name,
            app=config.node.app,
            interval_ms=config.limits.heartbeat_ms,
            name=name,
            recompile=self.ask_snapshot,
        )
        self.brokers: Brokers
        self.schedules: Schedules
        self._rates = Rates()
        self._compiled: Compiled | None = None
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # --- life -------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take up what the last process left, and the files. Blocks: before anything is served.
        Raises ConfigError."""
        assert self.config.push is not None
        self.durable.load()
        loaded = self._store.load(bytes)
        for problem in loaded.problems:
            self._log.error("schedule damaged", detail=problem, used=loaded.source)
        self.brokers = Brokers(self.config.push, self._log)
        self.schedules = Schedules(
            self._log,
            node=self.config.node.name,
            file=self.config.push.schedule_file,
            stored=loaded.value,
            keep=self._saver.save,
        )

    def attach(self, engine: Any, readings: Readings) -> None:
        """The engine that runs the snapshot made of `view()`."""
        self.wire.attach(engine)
        self._readings = readings

    def start(self) -> None:
        self.durable.start()
        self._tasks = [
            asyncio.ensure_future(self._make_snapshots()),
            asyncio.ensure_future(self._watch()),
        ]

    async def detach(self) -> None:
        """Nothing is said to the engine any more: it is going to stop."""
        self.wire.attach(None)
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def close(self) -> None:
        await self.durable.close()
        await self._saver.close()

    # --- snapshots --------------------------------------------------------------------------------

    def view(self) -> MeshView:
        return MeshView(
            brokers=self.brokers.now,
            groups=self.control.groups(),
            topics=self.durable.registry.topics().keys(),
            peers=self.schedules.peers(),
            schedule=self.schedules.native,
            paused=self.control.announcer.paused_endpoints(),
        )

    def addresses(self) -> Iterable[Address]:
        """Of brokers and other nodes: their names are resolved with those of the configuration."""
        yield from (b.address for b in self.brokers.now)
        yield from self.schedules.peers().values()

    def compiled(self, compiled: Compiled) -> None:
        """This snapshot was just published."""
        self._compiled = compiled
        self.control.compiled(compiled)
        self.settle()

    def ask_snapshot(self) -> None:
        self._wake.set()

    async def _make_snapshots(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            began = time.monotonic()
            try:
                await self._put_in_force()
                self.failure = ""
            except (FastmeshError, BlockingIOError) as error:
                problems = getattr(error, "problems", ())
                self.failure = problems[0].message if problems else str(error)
                self._log.limited("error", "snapshot", "no new snapshot", reason=self.failure)
                self._wake.set()
            except Exception as fault:  # a fault of ours must not end all changes
                self.failure = repr(fault)
                self._log.limited("error", "mesh fault", "no new snapshot", error=self.failure)
                self._wake.set()
            # However large the mesh is, most of this thread's time is left for everything else.
            took_s = time.monotonic() - began
            await asyncio.sleep(max(limits.COMPILE_GAP_S, 2 * took_s))

    async def _watch(self) -> None:
        """Files, several times a second."""
        while True:
            await asyncio.sleep(limits.WATCH_INTERVAL_S)
            try:
                changed = await self.brokers.poll()
                if await self.schedules.poll() or changed:
                    self.ask_snapshot()
            except Exception as fault:  # a fault of ours must not end the watch
                self._log.limited("error", "mesh fault", "files not looked at", error=repr(fault))

    # --- reload -----------------------------------------------------------------------------------

    def check(self, config: Config) -> Scheduled:
        """What this configuration needs from elsewhere. Raises ConfigError with nothing changed."""
        assert config.push is not None
        return self.schedules.check(config.push.schedule_file)

    def adopt(self, config: Config, scheduled: Scheduled) -> None:
        assert config.push is not None
        self.config = config
        self.brokers.configure(config.push)
        self.schedules.adopt(scheduled, config.push.schedule_file)
        self.control.peers.interval_ms = config.limits.heartbeat_ms

    # --- events -----------------------------------------------------------------------------------

    def take(self, event: Event) -> None:
        """One of PushControl's events; `settle` follows."""
        now_ms = self._clock_ms()
        try:
            if event.kind == "answer":
                self.wire.answered(event.a, event.b, event.data, now_ms)
            else:
                self.control.take(event, now_ms)
        except Exception as fault:  # a fault of ours must not cost the events behind this one
            self._log.limited("error", "mesh fault", "event not taken", error=repr(fault))
            if event.kind == "frame":
                self.wire.close(event.a)  # nobody would answer it, and it would not be read on

    def settle(self) -> None:
        """After a batch: say what is due, and be back when something is."""
        if not self.wire.attached:
            return
        now_ms = self._clock_ms()
        faulty = False
        try:
            self.control.tick(now_ms)
        except Exception as fault:  # a fault of ours must not end all that is due later
            self._log.limited("error", "mesh fault", "what is due not said", error=repr(fault))
            faulty = True
        flushed = self.wire.flush()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_ms = self.control.due_ms
        wait_s = None if due_ms is None else max(0, due_ms - now_ms) / 1000
        if faulty:
            wait_s = FAULT_WAIT_S
        if not flushed:
            wait_s = RING_FULL_WAIT_S
        if wait_s is not None:
            # A millisecond is the grain: 0 would spin on what is due within this one.
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(wait_s, 0.001), self.settle)

    def _registered(self, change: Change) -> None:
        self.control.registered(change)
        self.settle()

    async def leave(self, timeout_s: float) -> None:
        """Brokers push nothing more, peers forward nothing more, what was pushed is answered (all
        of it within `timeout_s`), and clients hear that they will be let go."""
        until = time.monotonic() + timeout_s
        self.control.leave()
        self.settle()
        try:
            with contextlib.suppress(EngineError):
                await poll(lambda: not self.control.leaving, "brokers", timeout_s)
            await self._deliveries_done(until)
        finally:
            self.control.goaway()
            self.settle()

    async def _deliveries_done(self, until: float) -> None:
        while time.monotonic() < until:
            reading = await self._readings.counters()
            rows = self._compiled.group_rows.values() if self._compiled else ()
            if not any(reading.value(row, "pushes.in_flight") for row in set(rows)):
                return
            await asyncio.sleep(LEAVE_LOOK_S)

    # --- what others ask --------------------------------------------------------------------------

    @property
    def live(self) -> Mapping[str, tuple[int, int]]:
        """Group -> (live connections, credit) on this node."""
        return self.control.live

    def status(self) -> dict[str, Any]:
        figures = self.durable.figures()
        registry = self.durable.registry
        return {
            **self.control.status(),
            "registrations": {
                "clients": len(registry.clients()),
                "groups": len(registry.groups()),
                "generation": registry.generation,
                "unsaved": figures.unsaved,
                "save_failures": figures.save_failures,
                "load_problems": figures.load_problems,
                "expired": figures.expired,
            },
            "schedule": {k: v for k, v in self.schedule().items() if k != "schedule"},
            "brokers_failure": self.brokers.failure,
            "snapshot_failure": self.failure,
        }

    async def topology(self) -> dict[str, Any]:
        """The JSON of /v1/topology. Raises EngineError."""
        assert self._compiled is not None
        window_s = await self._rates.look(self._readings.counters)
        return topology(
            self._compiled,
            self.durable.registry,
            self.control,
            rates=self._rates,
            window_s=window_s,
            node=self.config.node.name,
        )

    def schedule(self) -> dict[str, Any]:
        """The JSON of GET /v1/schedule."""
        now = self.schedules.now
        return {
            "version": self.schedules.version,
            "source": now.source,
            "etag": now.etag,
            "failure": self.schedules.failure,
            "schedule": now.plan.as_dict(),
        }

    async def put_schedule(self, data: bytes, match: str | None) -> None:
        """Raises as Schedules.put."""
        await self.schedules.put(data, match)
        self.ask_snapshot()
