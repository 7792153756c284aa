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

import msgspec

from fastmesh import limits, saved
from fastmesh.address import Address
from fastmesh.config import Config
from fastmesh.control.snapshot import Compiled, MeshView
from fastmesh.control.state_dir import StateDir
from fastmesh.errors import FastmeshError, HandoverError
from fastmesh.mesh.durable import DurableRegistry, SavedDurable
from fastmesh.mesh.persist import GenerationStore, Saver
from fastmesh.mesh.push import Event, PushControl, SavedControl
from fastmesh.mesh.registration import Change
from fastmesh.mesh.sources import (
    Brokers,
    SavedBrokers,
    SavedSchedule,
    Scheduled,
    Schedules,
)
from fastmesh.mesh.topology import Rates, topology
from fastmesh.mesh.wire import EngineWire, SavedWire
from fastmesh.observe.log import Log
from fastmesh.observe.readings import Readings

RING_FULL_WAIT_S = 0.005
FAULT_WAIT_S = 1.0
STORE_NAME = "schedule"


def monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class SavedPlane(msgspec.Struct, omit_defaults=True):
    durable: SavedDurable = msgspec.field(default_factory=SavedDurable)
    brokers: SavedBrokers = msgspec.field(default_factory=SavedBrokers)
    schedule: SavedSchedule = msgspec.field(default_factory=SavedSchedule)
    schedule_newest_is_good: bool = False
    """Of the generations on the disk."""
    control: SavedControl = msgspec.field(default_factory=SavedControl)
    wire: SavedWire = msgspec.field(default_factory=SavedWire)
    asked: bool = False
    """For a snapshot that was not made."""


class Plane:
    """`open()`, `attach()` an engine, `start()` ... `detach()`, `close()`.

    The one that gives everything to a successor: `hold()`, `save()`, `still()`, `save()`, then
    `abandon()`, or `thaw()` at any time before. The successor: `restore()` instead of `open()`,
    once more with what was saved last, then as ever.

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
        self._held = False
        self._free = asyncio.Event()
        self._free.set()
        """Not held."""
        self._making = False
        """A snapshot is asked for and not in force yet."""
        self._looking = asyncio.Lock()
        """At files."""
        self._stilled: Any = None
        self._restored: tuple[SavedBrokers, SavedSchedule] | None = None
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

    # --- hand-over --------------------------------------------------------------------------------

    async def hold(self, timeout_s: float = limits.HANDOVER_HOLD_S) -> None:
        """Until `thaw()` nothing changes but connections: no registration (503), no schedule (503),
        no look at a file, no lease that runs out; what of these is under way ends. Control frames
        are answered as ever. No snapshot is begun; one that is being put in force is waited for by
        who calls this, with the lock that `put_in_force` takes. Raises HandoverError, thawed, when
        something does not end within `timeout_s`."""
        self._held = True
        self._free.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self.durable.hold(timeout_s)
                await self.schedules.hold()
                await self._saver.idle()
                async with self._looking:
                    pass
        except TimeoutError:
            self.thaw()
            raise HandoverError(
                f"a file or a save did not come to its end within {timeout_s:g} s"
            ) from None
        except BaseException:
            self.thaw()
            raise

    def still(self) -> None:
        """Nothing is handed to the engine any more: it is about to save itself. What is said from
        now on is part of what `save()` gives. Events are taken as ever."""
        if self.wire.attached:
            self._stilled = self.wire.detach()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def thaw(self) -> None:
        """Take `still()` and `hold()` back."""
        if self._stilled is not None:
            self.wire.attach(self._stilled)
            self._stilled = None
        self.schedules.thaw()
        self.durable.thaw()
        self._held = False
        self._free.set()
        if self.wire.attached:
            self.settle()

    def abandon(self) -> None:
        """After `hold()`: another process goes on with what was saved. Nothing is written here any
        more, no snapshot made, no registration taken; connections that are still here go on."""
        assert self._held
        self.durable.abandon()
        self._saver.abandon()

    def save(self) -> SavedPlane:
        """What a successor goes on with; after `hold()`."""
        return SavedPlane(
            self.durable.save(),
            self.brokers.save(),
            self.schedules.save(),
            self._store.newest_is_good,
            self.control.save(self._clock_ms()),
            self.wire.save(),
            self._wake.is_set() or self._making,
        )

    def restore(self, data: object) -> bool:
        """Instead of `open()`, before the first `view()`: go on where another process stopped.
        Files are read as at a start; what was registered and put comes from `data`, the generations
        on the disk stay as they are. Once more with what was saved last, before `attach()`: as if
        only that had been restored. True when a snapshot made in between is not all that is needed:
        `ask_snapshot()`. Raises HandoverError, ConfigError."""
        assert self.config.push is not None
        found = saved.read(data, SavedPlane, "mesh")
        paused = self.control.announcer.paused_endpoints()
        differs = self.durable.restore(found.durable)
        if self._restored != (found.brokers, found.schedule):
            differs |= self._restored is not None
            self.brokers = Brokers(self.config.push, self._log, found.brokers)
            self.schedules = Schedules(
                self._log,
                node=self.config.node.name,
                file=self.config.push.schedule_file,
                stored=None,
                keep=self._saver.save,
                last=found.schedule,
            )
            self._restored = (found.brokers, found.schedule)
        self._store.newest_is_good = found.schedule_newest_is_good
        self.control.restore(found.control, self._clock_ms())
        self.wire.restore(found.wire)
        return differs or found.asked or paused != self.control.announcer.paused_endpoints()

    def forget_connections(self) -> None:
        """After `restore()`, when no connection came: who was registered stays, for a whole lease
        if it was connected."""
        self.control.forget_connections(self._clock_ms())
        self.wire.clear()

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
        self.wire.detach()
        self._stilled = None
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def close(self) -> None:
        await self.durable.close()
        if not self.durable.abandoned:
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
            while self._held:
                await self._free.wait()
            began = time.monotonic()
            try:
                self._wake.clear()
                self._making = True
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
            finally:
                self._making = False
            # However large the mesh is, most of this thread's time is left for everything else.
            took_s = time.monotonic() - began
            await asyncio.sleep(max(limits.COMPILE_GAP_S, 2 * took_s))

    async def _watch(self) -> None:
        """Files, several times a second."""
        while True:
            await asyncio.sleep(limits.WATCH_INTERVAL_S)
            try:
                async with self._looking:
                    if self._held:
                        continue
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

    # --- leaving (fastmesh.handover.drain says when) ----------------------------------------------

    def suspend_pushes(self) -> None:
        """Brokers are to push nothing more, peers to forward nothing more."""
        self.control.suspend()
        self.settle()

    def resume_pushes(self) -> None:
        """`suspend_pushes` and `close_groups` are taken back."""
        self.control.resume(self._clock_ms())
        self.settle()
        self.ask_snapshot()

    def suspending(self) -> list[str]:
        """Names of brokers that have not answered the suspend."""
        return self.control.announcer.suspending()

    def pushing(self) -> dict[str, str]:
        """Brokers that have not agreed to push nothing more -> why."""
        return self.control.announcer.pushing()

    def close_groups(self) -> None:
        """No delivery goes to a client any more, once the engine has done it."""
        self.control.close_groups()
        self.settle()

    def goaway(self) -> None:
        """Clients hear that they will be let go."""
        self.control.goaway()
        self.settle()

    def is_said(self) -> bool:
        """The engine has been handed all that was to be said to it."""
        return self.wire.flush()

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
