"""Every state that both machines can reach together, whatever fails and in whatever order.

The simulation draws schedules; here all of them are visited, for ownership alone, in a model small
enough for that: time does not exist (a deadline is due whenever it likes, so nothing depends on
how long anything takes), a thread's state is one STATE, and an action that concerns nobody's
ownership does nothing. Everything else is the real table and the real machine:

-   every record waits in a queue until its receiver looks, or is lost with the receiver; ABORT may
    find no room;
-   a process may be killed at any moment: its end closes first, its pidfd is readable later; one
    that is stopped is one that does nothing for a while, which every order contains;
-   every action that may fail does, and an action that may be dropped is, by the rules at the head
    of states.py;
-   SIGTERM comes at any moment;
-   the taker may lie once: it says ABORT and goes on all the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest

from fastmesh.handover.states import (
    DROPPABLE,
    INITIAL,
    STATES,
    TABLE,
    Action,
    Event,
    Machine,
    Move,
    Row,
    Side,
    go,
)

Table = Mapping[tuple[Side, str, Event], Row]

SENT: dict[str, Event] = {
    "send_hello": "HELLO",
    "send_refuse": "REFUSE",
    "send_listeners": "LISTENERS.last",
    "send_process": "PROCESS",
    "send_prepared": "PREPARED",
    "send_state": "STATE",
    "send_end": "END",
    "send_ready": "READY",
    "send_commit": "COMMIT",
    "send_handed": "HANDED",
    "send_abort": "ABORT",
}
"""ACK is told apart by mode."""
MATTERS = {
    *SENT,
    "send_ack",
    "connect",
    "judge",
    "freeze",
    "save",
    "thaw",
    "release",
    "exit",
    "exit_refused",
    "close",
    "kill_peer",
    "load",
    "own",
    "own_listeners",
    "let_go",
    "start_fresh",
    "start_fresh_with_listeners",
}
"""Actions with an effect in the model; the others are left out of jobs."""
FAILS = (DROPPABLE & MATTERS) | {"own", "own_listeners", "release", "let_go", "start_fresh"}


class Party(NamedTuple):
    """One process."""

    state: str
    job: tuple[str, ...] = ()
    busy: bool = False
    """The job has not been told `done` yet."""
    next_jobs: tuple[tuple[str, ...], ...] = ()
    inbox: tuple[str, ...] = ()
    closed: bool = False
    """Its end of the connection."""
    life: str = "alive"
    """alive, dying (killed, its pidfd not readable yet), dead."""
    armed: bool = False
    told: str = ""
    """e: eof, d: peer_dead, s: stop."""


class World(NamedTuple):
    giver: Party
    taker: Party
    connected: bool = False
    saved: bool = False
    moved: bool = False
    """The giver went on after its state was saved."""
    committed: bool = False
    handed: bool = False
    lied: bool = False


class Broken(Exception):
    pass


class Model:
    def __init__(
        self, table: Table, signals: tuple[bool, bool], mode: str, *, done_first: bool = True
    ) -> None:
        self.done_first = done_first
        self.table = table
        self.signals = {"giver": signals[0], "taker": signals[0] and signals[1]}
        self.can_kill = {"giver": signals[0], "taker": signals[1]}
        self.mode = mode
        self.step = functools.cache(self._step)

    def _step(self, side: Side, state: str, event: Event) -> tuple[str, tuple[Action, ...]]:
        machine = Machine(side, can_signal=self.signals[side], table=self.table)
        machine.state = state
        actions = machine.on(event)
        return machine.state, actions

    def first(self) -> World:
        return World(
            Party(INITIAL["giver"], armed=True), self.feed_party(Party(INITIAL["taker"]), "start")
        )

    def feed_party(self, party: Party, event: Event) -> Party:
        state, actions = self.step("taker", party.state, event)
        return party._replace(state=state, job=(*actions,), busy=True)

    # --- what can happen --------------------------------------------------------------------------

    def moves(self, world: World) -> Iterator[tuple[str, World]]:
        for side in ("giver", "taker"):
            yield from self.party_moves(world, side)

    def party_moves(self, world: World, side: Side) -> Iterator[tuple[str, World]]:
        me: Party = getattr(world, side)
        other: Party = getattr(world, opposite(side))
        if me.life == "dying":
            yield f"{side} is dead", self.put(world, side, life="dead")
        if me.life != "alive":
            return
        here = STATES[side, me.state]
        yield f"{side} is killed", self.die(world, side)
        if me.busy and not me.job:
            yield f"{side} is done", self.finish(world, side, "done")
            if self.done_first:
                return  # before anything else is looked at
        if world.connected and not me.closed:
            if me.inbox:
                event = me.inbox[0]
                taken = self.put(world, side, inbox=me.inbox[1:])
                yield f"{side} reads {event}", self.feed(taken, side, event)
            elif other.closed and "e" not in me.told:
                yield (
                    f"{side} sees EOF",
                    self.feed(self.put(world, side, told=me.told + "e"), side, "eof"),
                )
        # What the dead one left is read before its death is told.
        if (
            other.life == "dead"
            and "d" not in me.told
            and world.connected
            and (me.closed or not me.inbox)
        ):
            yield (
                f"{side} sees the pidfd",
                self.feed(self.put(world, side, told=me.told + "d"), side, "peer_dead"),
            )
        if me.job:
            action = me.job[0]
            yield from self.act(world, side, action)
            if action in FAILS:
                yield f"{side} fails to {action}", self.finish(world, side, "failed")
        if here.deadline_ms is not None:
            yield f"{side}: deadline", self.feed(world, side, "deadline")
        if side == "taker" and not world.lied and not me.closed and not other.closed:
            lie = self.put(world, "giver", inbox=(*other.inbox, "ABORT"))
            yield "taker: ABORT, a lie", lie._replace(lied=True)
        if "s" not in me.told and not here.final:
            yield (
                f"{side}: SIGTERM",
                self.feed(self.put(world, side, told=me.told + "s"), side, "stop"),
            )

    @staticmethod
    def put(world: World, side: Side, **what: Any) -> World:
        return world._replace(**{side: getattr(world, side)._replace(**what)})

    def die(self, world: World, side: Side) -> World:
        return self.put(
            world,
            side,
            life="dying",
            closed=True,
            inbox=(),
            armed=False,
            job=(),
            busy=False,
            next_jobs=(),
        )

    def feed(self, world: World, side: Side, event: Event) -> World:
        me: Party = getattr(world, side)
        if me.life != "alive":
            return world
        state, actions = self.step(side, me.state, event)
        if state == me.state:
            for action in actions:
                if action == "kill_peer":
                    world = self.kill(world, side)
            return world
        world = self.put(world, side, state=state)
        if not actions:
            return world
        job = (*(a for a in actions if a in MATTERS),)
        if not me.busy or (me.job and me.job[0] in DROPPABLE):
            return self.put(world, side, job=job, busy=True)
        waiting = (*(x for x in me.next_jobs if not x or x[0] not in DROPPABLE), job)
        return self.put(world, side, next_jobs=waiting)

    def finish(self, world: World, side: Side, event: Event) -> World:
        me: Party = getattr(world, side)
        if me.next_jobs:
            return self.put(world, side, job=me.next_jobs[0], next_jobs=me.next_jobs[1:])
        return self.feed(self.put(world, side, job=(), busy=False), side, event)

    def kill(self, world: World, side: Side) -> World:
        other = opposite(side)
        if not self.can_kill[side]:
            raise Broken("a signal that cannot be sent")
        return self.die(world, other) if getattr(world, other).life == "alive" else world

    def act(self, world: World, side: Side, action: str) -> Iterator[tuple[str, World]]:
        me: Party = getattr(world, side)
        other: Party = getattr(world, opposite(side))
        rest = self.put(world, side, job=me.job[1:])
        said = f"{side}: {action}"
        if action in SENT or action == "send_ack":
            event = SENT.get(action) or ("ACK.move" if self.mode == "move" else "ACK.drain")
            best_effort = action in ("send_abort", "send_refuse")
            if best_effort:
                yield f"{said} is lost", rest
            if other.closed:
                if not best_effort and not me.inbox:  # else that is read first
                    told = self.put(world, side, told=me.told + "e")
                    yield f"{said}: EPIPE", self.finish(told, side, "eof")
                return
            sent = self.put(rest, opposite(side), inbox=(*other.inbox, event))
            if action == "send_commit":
                sent = sent._replace(committed=True)
            elif action == "send_handed":
                sent = sent._replace(handed=True)
            yield said, sent
        elif action == "connect":
            if world.giver.life == "alive":
                yield said, rest._replace(connected=True)
            else:
                yield f"{said}: nobody", self.feed(world, side, "nobody")
        elif action == "judge":
            yield f"{said}: yes", self.feed(world, side, "move" if self.mode == "move" else "drain")
            yield f"{said}: no", self.feed(world, side, "refuse")
        elif action in ("exit", "exit_refused"):
            yield said, self.die(rest, side)
        elif action == "close":
            yield said, self.put(rest, side, closed=True, inbox=())
        elif action == "kill_peer":
            yield said, self.kill(rest, side)
        elif action in ("freeze", "release"):
            yield said, self.put(rest, side, armed=False)
        elif action == "save":
            yield said, rest._replace(saved=True, moved=False)
        elif action == "thaw":
            if world.committed:
                raise Broken("thaw after commit")
            yield said, self.put(rest, side, armed=True)._replace(moved=world.saved)
        elif action == "start_fresh" and world.giver.life == "alive":
            yield f"{said}: the lock is held", self.finish(world, side, "failed")
        else:
            yield said, self.own(rest, side, action)

    def own(self, world: World, side: Side, action: str) -> World:
        giver = world.giver
        if action == "own":
            if not world.committed and giver.life != "dead":
                raise Broken("own without proof")
            if world.moved:
                raise Broken("stale")
            if not world.saved:
                raise Broken("own nothing")
        elif action == "own_listeners":
            if not world.handed and giver.life != "dead":
                raise Broken("own without proof")
        elif action == "start_fresh_with_listeners":
            if giver.life != "dead":
                raise Broken("own without proof")
        elif action in ("let_go", "load"):
            return world
        if giver.armed and not world.handed:
            raise Broken("two owners")
        return self.put(world, side, armed=True)

    # --- all of it --------------------------------------------------------------------------------

    def explore(self, states_max: int = 3_000_000) -> set[World]:
        first = self.first()
        came: dict[World, tuple[World | None, str]] = {first: (None, "")}
        todo = [first]
        while todo:
            world = todo.pop()
            try:
                for said, after in self.moves(world):
                    if after not in came:
                        came[after] = world, said
                        self.check(after)
                        todo.append(after)
            except Broken as broken:
                raise Broken(f"{broken}\n" + "\n".join(self.way(came, world))) from None
            assert len(came) <= states_max, "the model has grown too large"
        return set(came)

    def check(self, world: World) -> None:
        """When nothing can happen any more but a death, somebody serves: unless both are gone."""
        giver, taker = world.giver, world.taker
        for side, me, good in (
            ("giver", giver, {"ended"}),
            ("taker", taker, {"owner", "fresh"}),
        ):
            at_rest = me.life == "alive" and not me.busy and STATES[side, me.state].final
            if at_rest and not (me.armed and me.state in good):
                raise Broken(f"the {side} rests in {me.state} and serves nobody")

    @staticmethod
    def way(came: dict[World, tuple[World | None, str]], world: World) -> list[str]:
        steps: list[str] = []
        at: World | None = world
        while at is not None:
            before, said = came[at]
            steps.append(f"{said:40} {at.giver.state}/{at.taker.state}")
            at = before
        return steps[::-1]


def opposite(side: Side) -> Side:
    return "taker" if side == "giver" else "giver"


@pytest.mark.parametrize("mode", ["move", "drain"])
@pytest.mark.parametrize("signals", [(True, True), (True, False), (False, True), (False, False)])
def test_nothing_that_can_happen_breaks_ownership(signals: tuple[bool, bool], mode: str) -> None:
    worlds = Model(TABLE, signals, mode).explore()
    ends = {(w.giver.state, w.taker.state) for w in worlds}
    wanted = {
        ("gone", "owner") if mode == "move" else ("letting_go", "owner"),
        ("ended", "refused"),
    }
    assert wanted <= ends
    assert len(worlds) > 20_000


def planted(*rows: tuple[Side, str, Event, Move]) -> Table:
    return {**TABLE, **{(side, state, event): Row(move) for side, state, event, move in rows}}


OWN = go("owning", "close", "own", "report")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (planted(("taker", "ready", "eof", OWN)), "own without proof"),
        (planted(("taker", "ready", "deadline", OWN)), "own without proof"),
        (planted(("taker", "loading", "done", OWN)), "own without proof"),
        (planted(("taker", "receiving", "peer_dead", OWN)), "own nothing"),
        (
            planted(("giver", "ending", "ABORT", go("parting", "thaw", "resume", "close"))),
            "stale",
        ),
        (
            planted(("giver", "ending", "deadline", go("parting", "thaw", "resume", "close"))),
            "stale",
        ),
        (planted(("giver", "releasing", "failed", go("ended", "thaw"))), "thaw after commit"),
        (planted(("giver", "fencing", "peer_dead", go("ended", "resume"))), "serves nobody"),
        (
            planted(
                (
                    "taker",
                    "doubting_listed",
                    "deadline",
                    go("starting", "start_fresh_with_listeners"),
                )
            ),
            "own without proof",
        ),
    ],
)
def test_the_model_sees_a_planted_violation(table: Table, says: str) -> None:
    with pytest.raises(Broken, match=says):
        Model(table, (True, True), "move").explore()


def test_who_cannot_signal_must_not_adopt() -> None:
    """The rule that looks most like caution is needed: without it a stale snapshot is taken up."""
    row = TABLE["taker", "ready", "peer_dead"].move
    with pytest.raises(Broken, match="stale"):
        Model(planted(("taker", "ready", "peer_dead", row)), (False, True), "move").explore()


def test_a_driver_must_look_at_done_first() -> None:
    """Else the giver sees the new owner die, or close its end, before it knows that COMMIT left."""
    with pytest.raises(Broken, match="thaw after commit"):
        Model(TABLE, (True, True), "move", done_first=False).explore()
