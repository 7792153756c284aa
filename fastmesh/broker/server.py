"""The broker as a process: the engine's events go to the core, what the core says goes back to it,
and batches go to disk in a helper thread while the loop goes on reading.

Whatever came with one wake-up of the loop is one transaction. While one is on its way to disk the
next gathers, so that the disk sets the size of the groups: nobody waits for a timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import os
import queue
import resource
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastmesh import limits
from fastmesh._ext.push import CLASS, parse, request, response
from fastmesh._version import __version__
from fastmesh.address import Address
from fastmesh.broker.admin import Views
from fastmesh.broker.core import Core
from fastmesh.broker.model import NEVER, Options
from fastmesh.broker.store import Batch, Store, StoreError, StoreFullError
from fastmesh.config import Admin
from fastmesh.control.listeners import bind
from fastmesh.errors import EngineError
from fastmesh.http.gate import Gate
from fastmesh.http.server import HttpServer
from fastmesh.observe.events import Events
from fastmesh.observe.log import Log
from fastmesh.observe.readings import Readings, poll
from fastmesh.protocols import push as words

LISTENER_ID, LISTENER_ROW = 1, 10
EVENTS_AT_ONCE = 1024
TICK_S = 1.0
BUSY_RETRY_S = 0.001
"""Until the engine has made room in its command ring."""
TRIM_AGAIN_S = 0.05
ANSWERED = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that the command line says."""

    listen: Address
    admin: Admin
    data: str
    options: Options = field(default_factory=Options)
    connections_max: int = limits.BROKER_CONNECTIONS_MAX
    log_format: str = "text"
    log_level: str = "info"


class SteadyClock:
    """Wall clock milliseconds that never jump while the process runs: what is due is kept on disk,
    and still must not come early because somebody set the clock."""

    def __init__(self) -> None:
        wall = datetime.datetime.now(datetime.UTC).timestamp()
        self._offset_ms = wall * 1000 - time.monotonic() * 1000

    def now_ms(self) -> int:
        return int(self._offset_ms + time.monotonic() * 1000)


class Commits:
    """How long transactions took, as a histogram; with fsync and without apart."""

    def __init__(self) -> None:
        self.bounds_s: tuple[float, ...] = limits.HOP_BUCKETS_S
        self.buckets = {sync: [0] * (len(self.bounds_s) + 1) for sync in (True, False)}
        self.sum_s = {True: 0.0, False: 0.0}

    def add(self, sync: bool, took_s: float) -> None:
        self.buckets[sync][bisect_left(self.bounds_s, took_s)] += 1
        self.sum_s[sync] += took_s


def _native_engine(**options: Any) -> Any:
    from fastmesh._ext.engine import Engine

    return Engine(**options)


def _native_snapshot(connections_max: int) -> Any:
    """One listener whose every request goes to Python."""
    from fastmesh._ext.route import Snapshot

    engine_limits = {name: bound.default for name, bound in limits.CONFIGURABLE.items()}
    for name in ("stop_timeout_ms", "drain_suspend_ms", "drain_answers_ms"):
        del engine_limits[name]  # the control plane's own
    engine_limits |= {
        "frame_bytes_max": limits.BROKER_FRAME_BYTES_MAX,
        "connections_max": connections_max,
        "in_flight_per_connection_max": engine_limits["in_flight_max"],
        "queue_bytes_max": limits.BROKER_QUEUE_BYTES_MAX,
        "request_timeout_ms_max": limits.HOUR_MS,
        "sample_every": 0,
    }
    snapshot = Snapshot(1, engine_limits)
    snapshot.add_listener(LISTENER_ID, codec="push", row=LISTENER_ROW, kind="punt")
    snapshot.seal()
    return snapshot


class Broker:
    """One running broker. `state` is starting | serving | stopping."""

    def __init__(
        self,
        settings: Settings,
        log: Log,
        *,
        engine_factory: Callable[..., Any] = _native_engine,
        snapshot_factory: Callable[[int], Any] = _native_snapshot,
        clock: SteadyClock | None = None,
    ) -> None:
        self.settings = settings
        self.log = log
        self.state = "starting"
        self.pid = os.getpid()
        self.commits = Commits()
        self.failed: StoreError | None = None
        self._engine_factory = engine_factory
        self._snapshot_factory = snapshot_factory
        self._clock = clock or SteadyClock()
        self._started = time.monotonic()
        self._jobs: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._sealed = 0
        self._committed = 0
        self._written: dict[int, list[asyncio.Future[None]]] = {}
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._timer_ms = NEVER
        self._stop_asked = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._idle = asyncio.Event()
        self._drained = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()
        self.size_bytes = 0
        self.disk_bytes = 0

    # --- start ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Everything up and accepting, or an exception with nothing left behind."""
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _start(self) -> None:
        settings, stack = self.settings, self._stack
        self._loop = asyncio.get_running_loop()

        # The store first: nobody else may have it, and it says what there is to serve.
        self.store = Store(settings.data, bytes_max=settings.options.bytes_max)
        stack.callback(self.store.close)
        self.core = Core(settings.options, self.store, self.store.load(), self._clock.now_ms())
        self._writer = threading.Thread(target=self._write_batches, name="store", daemon=True)
        self._writer.start()
        stack.push_async_callback(self._end_writer)

        raise_descriptors(settings.connections_max + limits.FDS_RESERVED)
        self._socket = bind(settings.listen, "broker")
        stack.callback(self._socket.close)
        self._admin_socket = bind(settings.admin.listen, "admin")
        stack.callback(self._admin_socket.close)

        self.engine = self._engine_factory(
            threads=1,
            memory_bytes_max=limits.BROKER_ENGINE_BYTES_MAX,
            ring_bytes=limits.BROKER_RING_BYTES,
        )
        self.readings = Readings(self.engine)
        self.events = Events(
            self.log,
            listener_name=lambda number: settings.options.name,
            endpoint_name=str,
            verdict=self.engine.verdict,
            drained=lambda thread: self._drained.set(),
        )
        self.engine.start(self._snapshot_factory(settings.connections_max))
        stack.push_async_callback(self._stop_engine)
        await poll(lambda: bool(self.engine.in_force() >= 1), "snapshot", limits.PUBLISH_TIMEOUT_S)
        self._loop.add_reader(self.engine.event_fd, self._take_events)
        stack.callback(self._loop.remove_reader, self.engine.event_fd)
        stack.callback(self._disarm)

        admin = HttpServer("admin", Gate(settings.admin), Views(self), self.log)
        await admin.start(self._admin_socket.sock)
        stack.push_async_callback(admin.close)
        self._look_at_disk()
        ticker = asyncio.ensure_future(self._tick())
        stack.push_async_callback(_cancel, ticker)

        self.state = "serving"
        self.engine.listen(LISTENER_ID, self._socket.sock.fileno())
        self._turn()
        # What lives now lives for long, and what messages are made of has no cycles.
        gc.collect()
        gc.freeze()
        gc.set_threshold(limits.BROKER_GC_THRESHOLD, 20, 50)
        self.log.info(
            "ready",
            version=__version__,
            broker=settings.options.name,
            pid=self.pid,
            listen=str(self.address),
            admin=str(self.admin_address),
            data=settings.data,
            topics=len(self.core.topics),
            groups=len(self.core.groups),
            after_ms=round(self.uptime_s * 1000),
        )

    @property
    def address(self) -> Address:
        """Where it listens, with the real port."""
        return self._socket.actual

    @property
    def admin_address(self) -> Address:
        return self._admin_socket.actual

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._started

    def now_ms(self) -> int:
        return self._clock.now_ms()

    # --- a turn -----------------------------------------------------------------------------------

    def _take_events(self) -> None:
        try:
            self._hear()
        except Exception as fault:
            self._fault(fault)
        self._turn()

    def _hear(self) -> None:
        core = self.core
        core.now_ms = self._clock.now_ms()
        for event in self.engine.events(EVENTS_AT_ONCE):
            kind = event.kind
            if kind == "frame":
                self._frame(event.a, event.data)
            elif kind == "answer":
                self._answer(event.a, event.b, event.data)
            elif kind == "gone":
                core.gone(event.a)
            elif kind != "opened":
                self.events.take(event)

    def _frame(self, handle: int, data: bytes) -> None:
        try:
            push = parse(data)
        except ValueError as wrong:
            self.log.limited("warning", "bad frame", "bad frame", reason=str(wrong))
            if (refused := refusal(data, str(wrong))) is not None:
                self.core.sends.append((handle, refused))
            return
        if push.class_name != CLASS:
            if push.kind == "request":
                reason = "a broker of fastmesh.push.v1 is not asked in another class"
                answer = words.answer(words.REJECT, reason)
                self.core.sends.append((handle, response(push.id, push.hint, answer)))
            return
        self.core.frame(handle, push)

    def _answer(self, ticket: int, outcome: int, data: bytes) -> None:
        push = None
        if outcome == ANSWERED:
            try:
                push = parse(data)
            except ValueError as wrong:
                self.log.limited("warning", "bad answer", "bad answer", reason=str(wrong))
        self.core.answer(ticket, outcome, push)

    def _turn(self) -> None:
        """Whatever happened: deliver, write, send."""
        try:
            self._do_turn()
        except Exception as fault:
            self._fault(fault)

    def _fault(self, fault: Exception) -> None:
        """The store cannot be read, or the fault is ours: a turn that was done by half leaves
        deliveries and credit that nobody counts. What was promised is on disk, so start anew."""
        self._fail(StoreError(f"--data {self.settings.data}: {fault!r}"))

    def _fail(self, error: StoreError) -> None:
        if self.failed is None:
            self.failed = error
            self.log.error("store failed", reason=str(error))
        self._stop_asked.set()
        self._stop_now.set()

    def _do_turn(self) -> None:
        core = self.core
        core.now_ms = self._clock.now_ms()
        core.turn()
        if self._sealed == self._committed and self.failed is None:
            batch = core.seal()
            if batch is not None:
                self._sealed += 1
                self._jobs.put(batch)
        if core.sends:
            del core.sends[: self.engine.send_many(core.sends)]
        if core.calls:
            del core.calls[: self.engine.call_many(core.calls)]
        if core.closes:
            for handle in core.closes:
                with contextlib.suppress(BlockingIOError):
                    self.engine.close(handle)
            core.closes.clear()
        if core.sends or core.calls:
            self._disarm()
            self._timer = self._loop.call_later(BUSY_RETRY_S, self._on_timer)
            self._timer_ms = 0
        else:
            self._arm(core.due_ms())
        if self.state == "stopping" and core.is_idle():
            self._idle.set()

    def _arm(self, due_ms: int) -> None:
        if (
            self._sealed != self._committed
            and due_ms <= self.core.now_ms
            and not self.core.is_busy()
        ):
            return  # what is due is writing, and the writer says when it is done
        if due_ms == self._timer_ms or (due_ms > self._timer_ms > self.core.now_ms):
            return  # the one that is armed comes first, and arms again
        self._disarm()
        if due_ms == NEVER:
            return
        self._timer_ms = due_ms
        if due_ms <= self.core.now_ms:
            self._timer = self._loop.call_soon(self._on_timer)
        else:
            self._timer = self._loop.call_later((due_ms - self.core.now_ms) / 1000, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._timer_ms = NEVER
        self._turn()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_ms = NEVER

    # --- the writer -------------------------------------------------------------------------------

    def _write_batches(self) -> None:
        """The helper thread: one batch at a time, until None."""
        while (batch := self._jobs.get()) is not None:
            error: StoreError | StoreFullError | None = None
            took_s = 0.0
            try:
                took_s = self.store.commit(batch)
            except (StoreError, StoreFullError) as wrong:
                error = wrong
            except Exception as fault:  # a fault of ours: nothing is known to be written
                error = StoreError(f"--data {self.store.path}: {fault!r}")
            self._loop.call_soon_threadsafe(self._batch_done, batch, took_s, error)

    def _batch_done(
        self, batch: Batch, took_s: float, error: StoreError | StoreFullError | None
    ) -> None:
        self._committed += 1
        self.core.now_ms = self._clock.now_ms()
        if isinstance(error, StoreError):
            # The file is broken: whatever is promised from here on may not hold.
            self._fail(error)
            self.core.committed(StoreFullError(str(error)))
        else:
            if error is not None:
                self.log.limited("error", "store full", "store not written", reason=str(error))
            else:
                self.commits.add(batch.sync, took_s)
                if batch.trimmed:  # there may be more to let go of
                    self._loop.call_later(TRIM_AGAIN_S, self._trim_again)
            self.core.committed(error)
            waiting = self._written.pop(self._committed, [])
            if error is not None and waiting:  # it goes with the next one
                self._written.setdefault(self._committed + 1, []).extend(waiting)
            else:
                for future in waiting:
                    if not future.done():
                        future.set_result(None)
        self._turn()

    def _trim_again(self) -> None:
        if self.state == "serving":
            self._look_at_disk()
            self._turn()

    async def written(self) -> None:
        """Until everything that the core was told so far is on disk. Raises TimeoutError."""
        self._turn()
        future = self._loop.create_future()
        number = self._sealed + self.core.has_unwritten()
        if number == self._committed:
            return
        self._written.setdefault(number, []).append(future)
        async with asyncio.timeout(limits.BROKER_WRITE_TIMEOUT_S):
            await future

    async def _end_writer(self) -> None:
        self._jobs.put(None)
        await asyncio.to_thread(self._writer.join)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.log.flush()
            try:
                self._look_at_disk()
            except Exception as fault:
                self._fault(fault)
            self._turn()

    def _look_at_disk(self) -> None:
        self.size_bytes = self.store.size_bytes()
        self.disk_bytes = self.store.disk_bytes()
        self.core.now_ms = self._clock.now_ms()
        self.core.trim(self.size_bytes)

    # --- stop -------------------------------------------------------------------------------------

    def ask_stop(self) -> None:
        """SIGTERM: gracefully; the second time: at once."""
        if self._stop_asked.is_set():
            self._stop_now.set()
        self._stop_asked.set()

    async def run_until_stopped(self) -> None:
        """Serve until `ask_stop()`, then stop. Raises StoreError when the store is what failed."""
        await self._stop_asked.wait()
        await self.stop()
        if self.failed is not None:
            raise self.failed

    async def stop(self) -> None:
        """Push nothing more, wait for answers, say goodbye, close."""
        self.state = "stopping"
        self.log.info("stopping", in_flight=self.core.in_flight())
        self.engine.unlisten(LISTENER_ID)
        self.core.stop()
        self._turn()
        await _first(self._idle, self._stop_now, timeout_s=limits.BROKER_STOP_TIMEOUT_MS / 1000)
        if not self._idle.is_set():
            self.log.warning("stopping with answers missing", in_flight=self.core.in_flight())
        self.engine.drain()
        await _first(self._drained, self._stop_now, timeout_s=limits.BROKER_CLOSE_TIMEOUT_S)
        await self._stack.aclose()
        self.log.info("stopped", uptime_s=round(self.uptime_s, 3))

    async def _stop_engine(self) -> None:
        if not await asyncio.to_thread(self.engine.stop, limits.STOP_JOIN_MS):
            self.log.error("an engine thread did not end", after_ms=limits.STOP_JOIN_MS)
            raise EngineError("an engine thread did not end in time")


def refusal(frame: bytes, reason: str) -> bytes | None:
    """The answer to a well framed request whose headers cannot be read; None where it wants none.
    The connection carries many clients' messages and outlives one bad frame."""
    dialect = 0 if frame[0] == 1 else frame[1]
    at = 1 if dialect == 0 else 2
    if frame[at] != 1:
        return None
    id = int.from_bytes(frame[at + 4 : at + 8], "big")
    hint = parse(request(1, {}, dialect=dialect)).hint
    return response(id, hint, words.answer(words.REJECT, reason))


def raise_descriptors(wanted: int) -> None:
    """Raise the soft descriptor limit as far as it goes; beyond, the engine pauses accepting."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


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
