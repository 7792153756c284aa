"""Leaving by direction: nothing new comes from the brokers, what came is answered, clients go.

    suspend   every broker is asked to push nothing more, every peer hears that nobody is here
    answers   pushes in flight are answered; those that still come are served. Then clients leave
              their groups: from here on their connections carry traffic in one direction only
    clients   they are told goaway and go one by one as they fall quiet
    done      nothing is left

Each step has a deadline, and an outcome when it passes: the drain goes on to the next step and says
what it did not wait for. Nothing is cut off by a deadline of the first two; what is left at the
last one is answered explicitly by whoever stops the process. A process without a message mesh
begins with the third step.

`Drain` knows neither engine nor brokers: it moves `Hands`. Times are the loop's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastmesh import limits
from fastmesh.config import Limits
from fastmesh.errors import EngineError, StateError
from fastmesh.observe.log import Log
from fastmesh.observe.metrics import DrainFigures

SUSPEND, ANSWERS, CLIENTS, DONE = STEPS = ("suspend", "answers", "clients", "done")
NONE = "none"
"""The step of a process that does not drain."""
IDLE = {"step": NONE}
"""`Drain.status()` of a process that never did."""
ADMIN, SIGNAL, UPGRADE = ("admin", "signal", "upgrade")
"""What asked for it."""


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of each step; together they are what a stop may take."""

    suspend_ms: int
    answers_ms: int
    clients_ms: int

    @classmethod
    def of(cls, found: Limits) -> Times:
        """As configured; what is 0 there is a share of stop_timeout_ms."""
        return cls(
            *limits.drain_times(
                found.stop_timeout_ms, found.drain_suspend_ms, found.drain_answers_ms
            )
        )

    @property
    def stop_ms(self) -> int:
        return self.suspend_ms + self.answers_ms + self.clients_ms


@dataclass(frozen=True, slots=True)
class Left:
    """What is under way at one moment."""

    groups: Mapping[str, int] = field(default_factory=dict)
    """Pushes that nobody has answered, by group; only groups that have some."""
    pushed: int = 0
    """Pushes taken in so far, of all groups."""
    requests: int = 0
    """Requests in flight that are no pushes to a group."""
    connections: Mapping[str, int] = field(default_factory=dict)
    """Of clients, by listener; only listeners that have some."""


class Hands(Protocol):
    """What a drain moves. Only what is a coroutine waits."""

    @property
    def has_mesh(self) -> bool:
        """There may be brokers. Else the drain begins with its third step."""

    def suspend(self) -> None:
        """Ask every broker, also those that connect later, to push nothing more; tell the peers
        that nobody is here."""

    def resume(self) -> None:
        """Take all of it back, `close_groups` too."""

    def suspending(self) -> Sequence[str]:
        """Names of brokers that have not answered yet."""

    def pushing(self) -> Mapping[str, str]:
        """Brokers that have not agreed -> why."""

    def close_groups(self) -> None:
        """Clients leave their groups: a push is refused (`no_consumer`). Twice is once."""

    async def groups_closed(self) -> None:
        """Until no delivery can reach a client any more. Raises EngineError when the engine does
        not answer."""

    def let_go(self, *, keep_paths: bool) -> bool:
        """Accept nothing new; close each client once it owes nothing and is quiet. `keep_paths`:
        the paths of UNIX listeners are somebody else's now. False: not all of it could be said to
        the engine; call again soon."""

    def gone(self) -> bool:
        """No client connection is left, and none can come. Only after `let_go`."""

    async def look(self) -> Left:
        """Raises EngineError when the engine does not answer."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A step that is over."""

    step: str
    outcome: str
    """done: nothing was left to wait for; late: the same, after its deadline; passed: its deadline,
    and the drain went on; skipped: nothing to do; cancelled; cut: by a second signal; fault: of
    ours, see the log."""
    took_ms: int
    left: dict[str, Any]
    """What it did not wait for, as `waiting_for` in the status; {} when nothing."""


class Drain:
    """One drain. `begin()`, then `run()` in a task of its own; everything else may be called at any
    time, from the same loop.

        planned    `run` ends when nothing is left, however long that takes
        a stop     `stop()` before or during `run`: it ends at the deadline at the latest
        hand-over  `may_go`: awaited between the second step and the third, with groups closed.
                   When it raises, nothing has happened: brokers are resumed, clients join their
                   groups again, and `run` raises the same. When it returns, the listeners are
                   somebody else's: our descriptors close, paths stay. `run` ends at the third
                   deadline at the latest.
    """

    def __init__(
        self,
        hands: Hands,
        log: Log,
        times: Times,
        *,
        cause: str = ADMIN,
        hold: bool = False,
        may_go: Callable[[], Awaitable[None]] | None = None,
        totals: Counter[tuple[str, str]] | None = None,
    ) -> None:
        """`cause`: admin | signal | upgrade. `hold`: the third step waits for `release()` or
        `stop()`. `totals` counts (step, outcome) over all drains of a process."""
        self.step = NONE
        """none | suspend | answers | clients | done"""
        self.safe = False
        """Nothing that was accepted would be lost by a stop now: nothing is in flight and no push
        can come. With `hold` clients may still be connected."""
        self.cause = cause
        self._hands = hands
        self._log = log
        self._times = times
        self._hold = hold
        self._may_go = may_go
        self._totals: Counter[tuple[str, str]] = Counter() if totals is None else totals
        self._clock = asyncio.get_running_loop().time
        self._began = self._since = self._clock()
        self._deadline: float | None = None
        """Of the step; None = it waits without one."""
        self._until: float | None = None
        """The process stops then."""
        self._timer: asyncio.Timeout | None = None
        self._news = asyncio.Event()
        self._outcome = ""
        self._waiting: dict[str, Any] = {}
        self._ended: list[Ended] = []
        self._cancelled = self._cut = self._closed = False

    # --- what others ask of it --------------------------------------------------------------------

    def begin(self) -> None:
        """Say what the first step says. `run` does it where nobody did."""
        self._began = self._clock()
        if self._hands.has_mesh:
            self._enter(SUSPEND)
            self._hands.suspend()
            return
        for step in (SUSPEND, ANSWERS):
            self._ended.append(Ended(step, "skipped", 0, {}))
            self._totals[step, "skipped"] += 1
        self.step = ANSWERS
        if self._may_go is None:
            self._enter(CLIENTS)
            self._go()

    def stop(self, until: float) -> None:
        """The process is going to stop: no hold, and `run` ends at that time of the loop at the
        latest."""
        self._until = until
        self._hold = False
        self._news.set()
        if self.step == CLIENTS:
            self._expect(until)
        elif self.step in (SUSPEND, ANSWERS):
            own = self._deadline
            self._expect(min(until, self._clock() + self._budget_s() if own is None else own))

    def cut(self) -> None:
        """At once: no step waits any more."""
        self._cut = True
        self._hold = False
        self._news.set()
        self._expect(self._clock())

    def hold(self) -> None:
        """Stay in the second step. Raises StateError when clients are being let go already, or
        somebody else decides."""
        self._refuse_when_late()
        self._hold = True

    def release(self) -> None:
        """On to the third step as soon as the second is over."""
        if self._hold:
            self._hold = False
            self._news.set()
            if self.step == ANSWERS and self._outcome == "passed":
                self._expect(self._clock())

    def cancel(self) -> None:
        """Back to serving: brokers are resumed, clients join their groups again. Raises StateError
        when clients are being let go already, or somebody else decides."""
        self._refuse_when_late()
        self._back()

    def status(self) -> dict[str, Any]:
        """`{step, cause, hold, since_ms, deadline_ms, waiting_for, outcome, safe_to_stop, steps}`.

        since_ms: so long has this step lasted. deadline_ms: so much it still has; None = it waits
        without one. outcome: "" while it waits, "passed" when it waits on after its deadline, else
        how it ended. waiting_for: {"brokers": [name]}, {"groups": {group: pushes}} or
        {"connections": {listener: n}, "requests": n, "groups": ...}, or {"engine": why}. steps:
        those that are over, each {step, outcome, took_ms, left}."""
        now = self._clock()
        deadline = self._deadline
        return {
            "step": self.step,
            "cause": self.cause,
            "hold": self._hold,
            "since_ms": round((now - self._since) * 1000),
            "deadline_ms": None if deadline is None else max(0, round((deadline - now) * 1000)),
            "waiting_for": self._waiting,
            "outcome": self._outcome,
            "safe_to_stop": self.safe,
            "steps": [
                {
                    "step": over.step,
                    "outcome": over.outcome,
                    "took_ms": over.took_ms,
                    "left": over.left,
                }
                for over in self._ended
            ],
        }

    def figures(self) -> DrainFigures:
        seconds = {over.step: over.took_ms / 1000 for over in self._ended}
        if self.step not in (NONE, DONE) and self.step not in seconds:
            seconds[self.step] = self._clock() - self._since
        waiting = {what: _count(found) for what, found in self._waiting.items()}
        return DrainFigures(self.step, self.safe, seconds, waiting, dict(self._totals))

    @property
    def is_letting_go(self) -> bool:
        """Clients are being let go, or gone: there is no way back."""
        return self.step in (CLIENTS, DONE)

    # --- the steps --------------------------------------------------------------------------------

    async def run(self) -> str:
        """How it ended: done | late | passed | cancelled | cut | fault. Cancelled as a task before
        clients are let go, it takes everything back."""
        try:
            if self.step == NONE and not self._cancelled:
                self.begin()
            if self.step == SUSPEND:
                await self._step(self._agreed)
            if self.step == SUSPEND:
                self._enter(ANSWERS)
                await self._step(self._answered)
                if not self._cancelled:
                    self._hands.close_groups()  # whatever the outcome; twice is once
            if self.step == ANSWERS and self._may_go is not None:
                await self._may_go()
        except BaseException:
            if self.step in (SUSPEND, ANSWERS):
                self._back()
            raise
        if self._cancelled:
            return "cancelled"
        if self.step == ANSWERS:
            self.safe = False
            self._enter(CLIENTS)
        outcome = await self._step(self._left)
        if outcome in ("done", "late"):
            self.step = DONE
            self.safe = True
            self._waiting = {}
            self._log.info("safe to stop")
        return outcome

    async def _agreed(self) -> None:
        """Every broker has answered suspend, one way or the other."""
        while names := self._hands.suspending():
            self._waiting = {"brokers": list(names)}
            await asyncio.sleep(self._pause_s())
        self._waiting = {}

    async def _answered(self) -> None:
        """No push is in flight, none has come for a while, and none can come any more."""
        quiet_most_s = min(limits.DRAIN_QUIET_S, self._times.answers_ms / 4000)
        pushed, quiet_since = -1, self._clock()
        while (left := await self._look(ANSWERS)) is None or left.groups or not self._closed:
            if left is not None and left.pushed != pushed:
                pushed, quiet_since = left.pushed, self._clock()
            quiet_s = self._clock() - quiet_since
            if left is not None and not left.groups and quiet_s >= quiet_most_s:
                await self._close_groups()
            else:
                await asyncio.sleep(self._pause_s())
        self.safe = True
        if self._hold:
            self._outcome = self._over_by_itself()
            self._expect(None)
            self._log.info("safe to stop", hold=True)
            while self._hold:
                self._news.clear()
                await self._news.wait()

    async def _close_groups(self) -> None:
        self._hands.close_groups()
        try:
            await self._hands.groups_closed()
            self._closed = True
        except EngineError as failure:
            self._waiting = {"engine": str(failure)}

    async def _left(self) -> None:
        """Every client is gone."""
        said = False
        while not (said := said or self._go()) or not self._hands.gone():
            await self._look(CLIENTS)
            await asyncio.sleep(self._pause_s())

    def _go(self) -> bool:
        return self._hands.let_go(keep_paths=self._may_go is not None)

    # --- inside -----------------------------------------------------------------------------------

    def _enter(self, step: str) -> None:
        self.step = step
        self._since = now = self._clock()
        self._outcome = ""
        self._waiting = {}
        deadline = now + self._budget_s()
        if step == CLIENTS:
            deadline = max(deadline, self._began + self._times.stop_ms / 1000)
            deadline = deadline if self._until is None else self._until
        elif self._until is not None:
            deadline = min(deadline, self._until)
        if self._cut:
            deadline = now
        self._deadline = deadline
        within_ms = max(0, round((deadline - now) * 1000))
        self._log.info("drain step begins", step=step, cause=self.cause, within_ms=within_ms)

    def _budget_s(self) -> float:
        return int(getattr(self._times, f"{self.step}_ms")) / 1000

    def _expect(self, deadline: float | None) -> None:
        """Another deadline for the step that is under way."""
        self._deadline = deadline
        if self._timer is not None:
            with contextlib.suppress(RuntimeError):  # it expires just now
                self._timer.reschedule(deadline)

    def _stays(self) -> bool:
        """The step goes on after its deadline: nobody waits for its end."""
        if self._until is not None or self._cut or self._cancelled:
            return False
        if self.step == ANSWERS:
            return self._hold
        return self.step == CLIENTS and self.cause != UPGRADE

    async def _step(self, wait: Callable[[], Awaitable[None]]) -> str:
        """Wait, within the deadline. Returns the outcome."""
        outcome = ""
        while not outcome:
            try:
                async with asyncio.timeout_at(self._deadline) as self._timer:
                    await wait()
                outcome = self._over_by_itself()
            except TimeoutError:
                if self._cancelled:
                    return "cancelled"
                if not self._stays():
                    outcome = "cut" if self._cut else "passed"
                elif self._outcome == "":
                    self._passed()
            except Exception as fault:  # a fault of ours must not keep a process from leaving
                self._log.error("drain step failed", step=self.step, error=repr(fault))
                outcome = "fault"
            finally:
                self._timer = None
        if self._cancelled:
            return "cancelled"
        self._over(outcome)
        return outcome

    def _over_by_itself(self) -> str:
        return "late" if self._outcome in ("passed", "late") else "done"

    def _passed(self) -> None:
        """The deadline, and it waits on."""
        self._outcome = "passed"
        self._deadline = None
        self._log.warning("drain step is late", step=self.step, **self.told())
        if self.step == ANSWERS:
            # What is in flight may still be answered; nothing joins it.
            self._hands.close_groups()

    def _over(self, outcome: str) -> None:
        is_done = outcome in ("done", "late")
        left = {} if is_done else dict(self._waiting)
        if self.step == SUSPEND and (pushing := self._hands.pushing()):
            left = {"brokers": dict(pushing)}
        took_ms = round((self._clock() - self._since) * 1000)
        self._outcome = outcome
        self._deadline = None
        self._ended.append(Ended(self.step, outcome, took_ms, left))
        self._totals[self.step, outcome] += 1
        self._waiting = left
        is_fine = is_done or outcome == "cancelled"
        tell = self._log.info if is_fine and not left else self._log.warning
        tell("drain step", step=self.step, outcome=outcome, took_ms=took_ms, **self.told())

    def told(self) -> dict[str, str]:
        """What is waited for, as fields of a log line."""
        return {what: shown(found) for what, found in self._waiting.items() if found}

    def _back(self) -> None:
        self._cancelled = True
        self._hands.resume()
        self._over("cancelled")
        self.step = NONE
        self.safe = False
        self._waiting = {}
        self._news.set()
        self._expect(self._clock())
        self._log.info("drain cancelled", cause=self.cause)

    def _refuse_when_late(self) -> None:
        if self.step == NONE:
            raise StateError("no drain is under way")
        if self._until is not None or self._cut:
            raise StateError("the process is stopping")
        if self.is_letting_go:
            raise StateError("clients are being let go already: start fastmesh again")
        if self.cause == UPGRADE:
            raise StateError("this drain belongs to an upgrade")

    def _pause_s(self) -> float:
        """Between two looks: often at first, seldom in what takes long."""
        young = self._clock() - self._since < limits.DRAIN_YOUNG_S
        return limits.DRAIN_LOOK_S if young else limits.DRAIN_LOOK_LATER_S

    async def _look(self, step: str) -> Left | None:
        """None when the engine does not answer."""
        try:
            left = await self._hands.look()
        except EngineError as failure:
            self._waiting = {"engine": str(failure)}
            return None
        waiting: dict[str, Any] = {}
        if left.groups:
            waiting["groups"] = _largest(left.groups)
        if step == CLIENTS:
            if left.connections:
                waiting["connections"] = dict(left.connections)
            if left.requests:
                waiting["requests"] = left.requests
        self._waiting = waiting
        return left


def _largest(groups: Mapping[str, int]) -> dict[str, int]:
    """Those with most pushes; the rest together under OTHER_NAME."""
    order = sorted(groups.items(), key=lambda item: (-item[1], item[0]))
    shown, rest = order[: limits.DRAIN_GROUPS_SHOWN], order[limits.DRAIN_GROUPS_SHOWN :]
    if rest:
        shown.append((limits.OTHER_NAME, sum(count for _, count in rest)))
    return dict(shown)


def _count(found: Any) -> int:
    if isinstance(found, int):
        return found
    if isinstance(found, dict) and all(isinstance(n, int) for n in found.values()):
        return sum(found.values())
    return 1 if isinstance(found, str) else len(found)


def shown(found: Any) -> str:
    """A part of `waiting_for` as text: `g1 3, g2 1`."""
    if isinstance(found, dict):
        return ", ".join(f"{name} {what}" for name, what in found.items())
    return ", ".join(found) if isinstance(found, list) else str(found)
