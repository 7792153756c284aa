"""The registry with its disk: a change is in force, and answered, only once it would survive.

Requests that come while a save runs are folded into one more save. A request that changes nothing
(a renewal) never waits for the disk. When the disk fails, the requests that waited are answered
507 or 503 with what to do, the state in force stays as it was, serving goes on, and what is in
force is written again until that succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from fastmesh import limits, saved
from fastmesh.control.state_dir import StateDir
from fastmesh.errors import HandoverError
from fastmesh.mesh.persist import GenerationStore, Loaded, SaveError, Saver
from fastmesh.mesh.registration import (
    Draft,
    InvalidError,
    Key,
    OnChange,
    Outcome,
    Registration,
    Registry,
    SavedRegistry,
    decode_state,
    parse,
)
from fastmesh.observe.log import Log

STORE_NAME = "registrations"
UPGRADING = Outcome(503, {"error": "fastmesh is being upgraded: try again"})
STOPPING = Outcome(503, {"error": "fastmesh is stopping: register again with its successor"})


def monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Figures:
    """For metrics."""

    saves: int = 0
    save_failures: int = 0
    load_problems: int = 0
    """Generations that could not be used at the start."""
    expired: int = 0
    unsaved: bool = False
    """What is in force is not (known to be) on disk."""


class SavedDurable(msgspec.Struct, omit_defaults=True):
    registry: SavedRegistry = msgspec.field(default_factory=SavedRegistry)
    saves: saved.Count = 0
    save_failures: saved.Count = 0
    load_problems: saved.Count = 0
    expired: saved.Count = 0
    unsaved: saved.Count = 0
    retry_in_ms: saved.Ms = 0
    retry_s: Annotated[float, msgspec.Meta(gt=0, le=limits.REGISTRATION_RETRY_S_MAX)] = (
        limits.REGISTRATION_RETRY_S
    )
    newest_is_good: bool = False
    """The newest generation on the disk."""


@dataclass(slots=True)
class _Request:
    key: Key
    registration: Registration | None
    """None takes the registration back."""
    future: asyncio.Future[Outcome] = field(repr=False)

    def apply(self, draft: Draft, now_ms: int) -> Outcome:
        if self.registration is None:
            return draft.remove(*self.key)
        return draft.register(self.registration, now_ms)


class DurableRegistry:
    """`load()`, then `start()` ... `close()`; `registry` has the views, `hold` and `release`."""

    def __init__(
        self,
        state_dir: StateDir,
        log: Log,
        *,
        on_change: OnChange | None = None,
        clock_ms: Callable[[], int] = monotonic_ms,
        save_timeout_s: float = limits.REGISTRATION_SAVE_TIMEOUT_S,
    ) -> None:
        """Raises StateError."""
        self.registry = Registry(on_change)
        self.clock_ms = clock_ms
        self.store = GenerationStore(state_dir, STORE_NAME, limits.REGISTRATION_STATE_BYTES_MAX)
        self._saver = Saver(self.store)
        self._save_timeout_s = save_timeout_s
        self._log = log
        self._waiting: list[_Request] = []
        self._pending: Counter[Key] = Counter()
        """Requests of each client that are not answered yet."""
        self._wake = asyncio.Event()
        self._closing = False
        self._unsaved = 0
        """Reasons since the last save why what is in force is not (known to be) on disk."""
        self._retry_at_ms = 0
        self._retry_s = limits.REGISTRATION_RETRY_S
        self._load_problems = 0
        self._expired = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._settling = asyncio.Lock()
        self._held_ms: int | None = None
        """Since when nothing changes; None while anything may."""
        self.abandoned = False

    # --- life -------------------------------------------------------------------------------------

    def load(self) -> Loaded[tuple[Registration, ...]]:
        """Take up what the last process left, with full leases. Blocks: before anything is served.
        Damage is told loudly and falls back to the generation before, then to nothing (clients
        register again)."""
        now_ms = self.clock_ms()

        def accept(payload: bytes) -> tuple[Registration, ...]:
            found = decode_state(payload)
            self.registry.restore(found, now_ms)
            return found

        loaded = self.store.load(accept)
        self._load_problems = len(loaded.problems)
        for problem in loaded.problems:
            self._log.error("registrations damaged", detail=problem, used=loaded.source)
        if loaded.source == "previous":
            self._unsaved += 1  # two good generations again as soon as possible
        return loaded

    def start(self) -> None:
        self._tasks = [asyncio.ensure_future(self._work()), asyncio.ensure_future(self._tick())]
        self._wake.set()

    async def close(self) -> None:
        """A save under way ends, who waits is answered, nothing new is taken."""
        if self.abandoned:
            for task in self._tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            return
        self.thaw()
        self._closing = True
        self._wake.set()
        if self._tasks:
            work, tick = self._tasks
            tick.cancel()
            await asyncio.wait([work], timeout=self._save_timeout_s + 1.0)
            work.cancel()
            for task in self._tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._answer([(request, STOPPING) for request in self._waiting])
        self._waiting.clear()
        await self._saver.close(self._save_timeout_s)

    def figures(self) -> Figures:
        return Figures(
            self._saver.saves,
            self._saver.failures,
            self._load_problems,
            self._expired,
            self._unsaved > 0,
        )

    # --- hand-over --------------------------------------------------------------------------------

    async def hold(self, timeout_s: float) -> None:
        """Until `thaw()` nothing changes and nothing is written: who waits is answered 503, a save
        under way ends, leases stand still. Raises HandoverError, thawed, when the disk does not
        answer within `timeout_s`: what is under way there could still overwrite what a successor
        writes."""
        self._held_ms = self.clock_ms()
        waiting, self._waiting = self._waiting, []
        self._answer([(request, UPGRADING) for request in waiting])
        try:
            async with asyncio.timeout(timeout_s):
                async with self._settling:
                    await self._saver.idle()
        except TimeoutError:
            self.thaw()
            raise HandoverError(
                f"registrations are being saved, and the disk of {self.store.path} has not"
                f" answered for {timeout_s:g} s"
            ) from None
        except BaseException:
            self.thaw()
            raise

    def thaw(self) -> None:
        """Go on after `hold()`; the time in between is no time for a lease."""
        if self._held_ms is None or self.abandoned:
            return
        now_ms = self.clock_ms()
        self.registry.stood_still(now_ms - self._held_ms, now_ms)
        self._held_ms = None
        self._wake.set()

    def abandon(self) -> None:
        """After `hold()`: another process has what was saved. Nothing is ever written again."""
        assert self._held_ms is not None
        self.abandoned = True
        for task in self._tasks:
            task.cancel()
        self._saver.abandon()

    def save(self) -> SavedDurable:
        """What a successor goes on with. Leases have what was left when they were held."""
        now_ms = self.clock_ms()
        figures = self.figures()
        return SavedDurable(
            self.registry.save(now_ms if self._held_ms is None else self._held_ms),
            figures.saves,
            figures.save_failures,
            figures.load_problems,
            figures.expired,
            self._unsaved,
            max(0, self._retry_at_ms - now_ms),
            self._retry_s,
            self.store.newest_is_good,
        )

    def restore(self, data: object) -> bool:
        """Instead of `load()`: go on where another process stopped, with the generations on the
        disk as they are. Twice is as the second time alone. True when the registrations are others
        than before. Raises HandoverError with nothing changed."""
        found = saved.read(data, SavedDurable, "registrations")
        now_ms = self.clock_ms()
        differs = self.registry.inherit(found.registry, now_ms)
        self._saver.saves, self._saver.failures = found.saves, found.save_failures
        self._load_problems, self._expired = found.load_problems, found.expired
        self._unsaved = found.unsaved
        self._retry_at_ms, self._retry_s = now_ms + found.retry_in_ms, found.retry_s
        self.store.newest_is_good = found.newest_is_good
        return differs

    # --- requests ---------------------------------------------------------------------------------

    async def register(self, document: bytes) -> Outcome:
        """The answer to POST /v1/registrations, given when it is durable."""
        try:
            registration = parse(document)
        except InvalidError as error:
            return error.outcome()
        key = registration.key
        if not self._pending[key] and self._held_ms is None:
            standing = self.registry.client(*key)
            if standing is not None and standing.registration.document == registration.document:
                return self.registry.draft().register(registration, self.clock_ms())
        return await self._ask(key, registration)

    async def remove(self, app: str, client: str) -> Outcome:
        """The answer to DELETE, given when it is durable."""
        return await self._ask(Key(app, client), None)

    async def _ask(self, key: Key, registration: Registration | None) -> Outcome:
        if self._closing:
            return STOPPING
        if self._held_ms is not None:
            return UPGRADING
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._pending[key] += 1
        self._waiting.append(_Request(key, registration, future))
        self._wake.set()
        return await future

    # --- inside -----------------------------------------------------------------------------------

    async def _work(self) -> None:
        while not self._closing or self._waiting:
            await self._wake.wait()
            self._wake.clear()
            async with self._settling:
                if self._held_ms is None:
                    await self._work_once()

    async def _work_once(self) -> None:
        batch, self._waiting = self._waiting, []
        if not batch and not self._retry_is_due():
            return
        answers: list[tuple[_Request, Outcome]] = []
        try:
            answers = await self._settle(batch)
        except Exception as fault:  # a fault of ours must not end registration
            self._log.limited("error", "registration fault", "fault", error=repr(fault))
            answered = {id(request) for request, _ in answers}
            fault_outcome = Outcome(500, {"error": "a fault of fastmesh: see its log"})
            answers += [(r, fault_outcome) for r in batch if id(r) not in answered]
        self._answer(answers)

    async def _settle(self, batch: list[_Request]) -> list[tuple[_Request, Outcome]]:
        draft = self.registry.draft()
        now_ms = self.clock_ms()
        answers = [(request, request.apply(draft, now_ms)) for request in batch]
        changed = draft.changed
        if not changed and not self._retry_is_due():
            return answers
        state = draft.state()
        covered = self._unsaved  # an expiry meanwhile is one more
        try:
            await self._saver.save(state, self._save_timeout_s)
        except SaveError as error:
            self._unsaved += 1
            self._retry_at_ms = self.clock_ms() + round(self._retry_s * 1000)
            self._retry_s = min(self._retry_s * 2, limits.REGISTRATION_RETRY_S_MAX)
            self._log.limited("error", "registration save", "not saved", reason=str(error))
            if not changed:
                return answers
            # Conflicts too: they may be with what has just not come into force.
            failed = Outcome(error.status, {"error": f"{error}. Nothing has changed; try again"})
            return [
                (request, outcome if outcome.status == 200 and not outcome.changed else failed)
                for request, outcome in answers
            ]
        if self._retry_s != limits.REGISTRATION_RETRY_S:
            self._log.info("registrations saved again")
        self._unsaved -= covered
        self._retry_s, self._retry_at_ms = limits.REGISTRATION_RETRY_S, 0
        try:
            self.registry.adopt(draft, self.clock_ms())
        except Exception as fault:  # of whoever listens to changes: the state is in force
            self._log.limited("error", "registration fault", "on_change", error=repr(fault))
        return answers

    def _retry_is_due(self) -> bool:
        return self._unsaved > 0 and self.clock_ms() >= self._retry_at_ms

    def _answer(self, answers: list[tuple[_Request, Outcome]]) -> None:
        for request, outcome in answers:
            self._pending[request.key] -= 1
            if not self._pending[request.key]:
                del self._pending[request.key]
            if not request.future.done():  # else whoever asked has gone
                request.future.set_result(outcome)

    async def _tick(self) -> None:
        looked_ms = self.clock_ms()
        while True:
            await asyncio.sleep(limits.REGISTRATION_TICK_S)
            now_ms = self.clock_ms()
            self.look(now_ms, now_ms - looked_ms)
            looked_ms = now_ms

    def look(self, now_ms: int, gap_ms: int) -> None:
        """Expire; `gap_ms` after the last look. Called once a second by `start()`'s ticker."""
        if self._held_ms is not None:
            return  # nobody can renew now: the clock of the leases stands still
        if gap_ms > limits.REGISTRATION_STALL_S * 1000:
            self.registry.give_back(gap_ms)
            self._log.warning("leases lengthened", reason="this process did not run", ms=gap_ms)
        try:
            gone = self.registry.expire(now_ms)
        except Exception as fault:  # of whoever listens to changes: they are gone all the same
            self._log.limited("error", "registration fault", "on_change", error=repr(fault))
            gone = ()
            self._unsaved += 1
        for app, client in gone:
            self._log.limited("info", "lease", "registration expired", app=app, client=client)
        self._expired += len(gone)
        self._unsaved += len(gone)
        if self._retry_is_due():
            self._wake.set()
