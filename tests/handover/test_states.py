"""The table of the hand-over: complete, and with the rules of ownership visible in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from fastmesh import limits
from fastmesh.handover import picture, wire
from fastmesh.handover.states import (
    ACTIONS,
    DROPPABLE,
    EVENTS,
    GROUPS,
    INITIAL,
    POINTS,
    RECORDS,
    STATES,
    TABLE,
    Action,
    Event,
    Machine,
    Move,
    Side,
)

SIDES: tuple[Side, ...] = get_args(Side)
PAGE = Path(__file__).parents[2] / "docs" / "handover.md"


def moves(side: Side, *, alone: bool) -> Iterator[tuple[str, Event, Move]]:
    """Every row as it applies when the other one can be signalled, or cannot."""
    for (whose, state, event), row in TABLE.items():
        if whose == side:
            yield state, event, row.alone if alone and row.alone is not None else row.move


# --- complete -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_every_pair_is_defined(side: Side) -> None:
    for whose, state in STATES:
        for event in EVENTS[whose]:
            row = TABLE[whose, state, event]
            for move in (row.move, row.alone or row.move):
                assert (whose, move.next) in STATES, (whose, state, event)
                assert set(move.actions) <= set(ACTIONS), (whose, state, event)
    assert len(TABLE) == sum(len(EVENTS[whose]) for whose, _ in STATES)
    assert set().union(*(EVENTS[s] for s in SIDES)) == set(get_args(Event))
    assert (side, INITIAL[side]) in STATES


def test_every_action_is_asked_for_and_explained() -> None:
    used = {
        a
        for s in SIDES
        for alone in (False, True)
        for *_, m in moves(s, alone=alone)
        for a in m.actions
    }
    assert used == set(ACTIONS) == set(get_args(Action))
    assert used > DROPPABLE


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_every_state_is_reached_and_left(side: Side, alone: bool) -> None:
    edges = [(state, move.next) for state, _, move in moves(side, alone=alone)]
    names = {name for whose, name in STATES if whose == side}
    reached = _closure({INITIAL[side]}, edges)
    only_with_signals = {"fencing", "loading_alone", "orphaned"} if alone else set()
    if alone and side == "taker":
        only_with_signals -= {"orphaned"}  # loading_cut leads there
    assert names - reached <= only_with_signals
    final = {name for name in names if STATES[side, name].final}
    assert _closure(final, [(b, a) for a, b in edges]) >= reached


def _closure(start: set[str], edges: list[tuple[str, str]]) -> set[str]:
    found: set[str] = set()
    new = set(start)
    while new:
        found |= new
        new = {b for a, b in edges if a in found} - found
    return found


def test_final_states_do_nothing_more() -> None:
    for (side, name), state in STATES.items():
        if state.final:
            assert all(TABLE[side, name, e].move == Move(name) for e in EVENTS[side]), name


def test_every_wait_has_a_deadline_that_leads_on() -> None:
    without = {
        (side, name)
        for (side, name), state in STATES.items()
        if not state.final and state.deadline_ms is None
    }
    # Before it begins, and when it is this side's whatever happens: there is nobody to go back to.
    assert without == {
        ("taker", name) for name in ("initial", "owning", "owning_drain", "starting")
    }
    for (side, name), state in STATES.items():
        if state.deadline_ms is not None:
            assert TABLE[side, name, "deadline"].move != Move(name), (side, name)


def test_every_unexpected_record_is_as_bad_as_a_spoilt_one() -> None:
    """Nobody gets further by saying something else than what is awaited."""
    for (side, name), state in STATES.items():
        group = GROUPS[side, state.group]
        for event in RECORDS[side]:
            row = TABLE[side, name, event]
            if not row.own and "violation" in group and event not in ("ABORT", "REFUSE"):
                assert row.move == TABLE[side, name, "violation"].move, (side, name, event)


def test_deadlines_do_not_cross() -> None:
    giver, taker = (
        {name: s.deadline_ms or 0 for (w, name), s in STATES.items() if w == side} for side in SIDES
    )
    # The giver is done with fencing long before the taker begins with it.
    assert giver["ending"] + giver["fencing"] < taker["ready"]
    assert giver["freezing"] < taker["receiving"]
    assert giver["greeting"] < taker["greeting"]
    assert giver["suspending"] + giver["settling"] + giver["handing"] < taker["prepared_drain"]
    assert giver["offering"] <= taker["preparing"]


# --- ownership ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [False, True])
def test_the_taker_owns_by_commit_or_by_proof(alone: bool) -> None:
    found = {
        (state, event) for state, event, m in moves("taker", alone=alone) if "own" in m.actions
    }
    by_commit = {("ready", "COMMIT"), ("fencing", "COMMIT")}
    by_proof = {
        ("ready", "peer_dead"),
        ("orphaned", "peer_dead"),
        ("fencing", "peer_dead"),
        ("loading_alone", "done"),
    }
    if not alone:
        assert found == by_commit | by_proof
    else:
        # These states cannot be had where one cannot signal the other.
        reached = _closure(
            {INITIAL["taker"]}, [(s, m.next) for s, _, m in moves("taker", alone=True)]
        )
        assert {pair for pair in found if pair[0] in reached} == {("ready", "COMMIT")}


def test_the_taker_loads_before_it_may_own() -> None:
    """READY, and every way to own without COMMIT, comes after END was loaded."""
    before_load = {"initial", "connecting", "greeting", "listing", "listed", "preparing"}
    before_load |= {"receiving", "doubting", "doubting_listed"}
    for state, event, move in moves("taker", alone=False):
        if state in before_load:
            assert not {"own", "send_ready"} & set(move.actions), (state, event)
    assert [(s, e) for s, e, m in moves("taker", alone=False) if "load" in m.actions] == [
        ("receiving", "END")
    ]


@pytest.mark.parametrize("alone", [False, True])
def test_the_giver_never_takes_back_what_it_gave(alone: bool) -> None:
    commits = [(s, e) for s, e, m in moves("giver", alone=alone) if "send_commit" in m.actions]
    assert commits == [("ending", "READY")]
    given = _closure(
        {"releasing", "gone"}, [(s, m.next) for s, _, m in moves("giver", alone=alone)]
    )
    assert given == {"releasing", "gone"}
    for state, event, move in moves("giver", alone=alone):
        if state in given | {"letting_go"}:
            assert not {"thaw", "resume"} & set(move.actions), (state, event)


def test_the_giver_thaws_after_end_only_with_proof() -> None:
    for state, event, move in moves("giver", alone=False):
        if state in ("ending", "committing", "fencing") and "thaw" in move.actions:
            assert event == "peer_dead", (state, event)
    for state in ("freezing", "saving", "sending", "ending", "committing"):
        assert TABLE["giver", state, "deadline"].move == Move("fencing", ("kill_peer",))


def test_a_giver_that_cannot_signal_thaws_because_the_taker_then_never_adopts() -> None:
    for state in ("freezing", "saving", "sending", "ending", "committing"):
        move = TABLE["giver", state, "deadline"].alone
        assert move is not None
        assert "thaw" in move.actions
    for side in SIDES:
        for state, event, move in moves(side, alone=True):
            if "kill_peer" in move.actions:
                assert state == "fencing", (side, state, event)  # never entered then


def test_whoever_froze_thaws_or_gives_away() -> None:
    frozen = {name for (side, name), state in STATES.items() if state.frozen}
    assert frozen == {"freezing", "saving", "sending", "ending", "committing", "fencing"}
    for alone in (False, True):
        for state, event, move in moves("giver", alone=alone):
            if state in frozen and move.next not in frozen:
                assert "thaw" in move.actions or (state, event) == ("committing", "done")
            if state not in frozen and move.next in frozen:
                assert move.actions == ("freeze",)


def test_everything_held_back_is_taken_up_again() -> None:
    """hold, close_doors, stop_accepting and suspend are undone on every way to `ended`."""
    for alone in (False, True):
        for state, event, move in moves("giver", alone=alone):
            if STATES["giver", state].group in ("held", "frozen", "offered") or state == "fencing":
                back = move.next in ("parting", "ended")
                assert ("resume" in move.actions) == back, (state, event)


# --- the machine ----------------------------------------------------------------------------------


def walk(machine: Machine, *events: Event) -> list[str]:
    return [action for event in events for action in machine.on(event)]


def test_the_straight_way() -> None:
    giver, taker = Machine("giver"), Machine("taker")
    walk(giver, "HELLO", "move", "done", "PREPARED", "done", "done", "ACKED", "done", "done")
    assert (giver.state, giver.here.step, giver.deadline_ms) == (
        "ending",
        "S6",
        limits.HANDOVER_FROZEN_MS,
    )
    assert walk(giver, "READY") == ["send_commit"]
    assert walk(giver, "done", "done") == ["release", "close", "report", "exit"]
    assert giver.final
    assert giver.reason == ""
    walk(taker, "start", "done", "done", "ACK.move", "LISTENERS", "LISTENERS.last", "PROCESS")
    walk(taker, "done", "done", "STATE", "CONNS", "END", "done", "done")
    assert taker.state == "ready"
    assert walk(taker, "COMMIT") == ["close", "own", "report"]
    assert (walk(taker, "done"), taker.state, taker.reason) == ([], "owner", "")


def test_one_clock_runs_from_the_freeze_to_commit() -> None:
    giver = Machine("giver")
    walk(giver, "HELLO", "move", "PREPARED")
    frozen = giver.clock
    walk(giver, "done", "done", "done", "READY")
    assert (giver.state, giver.clock) == ("committing", frozen)
    walk(giver, "deadline")
    assert (giver.state, giver.clock) == ("fencing", frozen + 1)
    assert giver.on("deadline") == ("kill_peer",)
    assert (giver.state, giver.clock) == ("fencing", frozen + 2)


def test_a_record_of_the_other_direction_is_a_violation() -> None:
    giver = Machine("giver")
    walk(giver, "HELLO", "move")
    assert giver.on("COMMIT") == TABLE["giver", "offering", "violation"].move.actions
    assert "COMMIT is not for the giver" in giver.reason


def test_the_first_reason_is_the_one_that_is_told() -> None:
    taker = Machine("taker")
    walk(taker, "start", "done", "done", "ACK.move", "LISTENERS.last")
    taker.on("failed", "no more descriptors")
    taker.on("peer_dead")
    assert (taker.state, taker.reason) == ("refused", "no more descriptors")
    giver = Machine("giver")
    walk(giver, "HELLO", "move", "PREPARED", "deadline")
    assert (
        giver.reason
        == "nothing happened for 500 ms (S4, freezing: the world stops, thread by thread)"
    )


@pytest.mark.parametrize("side", SIDES)
def test_no_order_of_events_is_unknown(side: Side) -> None:
    rng = random.Random(side)
    for _ in range(300):
        machine = Machine(side, can_signal=rng.random() < 0.5)
        for _ in range(60):
            machine.on(rng.choice(EVENTS[side]))
            assert (side, machine.state) in STATES


def test_every_record_is_an_event_of_whoever_receives_it() -> None:
    words = {event.partition(".")[0] for side in SIDES for event in RECORDS[side]}
    assert words == set(wire.TYPES)


def test_fault_points_are_eight_a_side() -> None:
    for side in SIDES:
        assert sorted(set(POINTS[side].values())) == [f"S{n}" for n in range(1, 9)]
        assert all(word in ACTIONS or word in RECORDS[side] for word in POINTS[side])


# --- the picture ----------------------------------------------------------------------------------


def test_the_page_shows_the_table_as_it_is() -> None:
    page = PAGE.read_text()
    assert picture.put_into(page) == page, (
        "repair it: python -m fastmesh.handover.picture docs/handover.md"
    )


def test_the_picture_names_every_state_and_every_way_out() -> None:
    shown = picture.render()
    for side, name in STATES:
        assert f"| `{name}` |" in shown
        assert (side, STATES[side, name].group) in picture.NAMES
    assert "committing --> releasing: done" in shown
    assert "frozen_ --> fencing: deadline, eof" in shown


def test_a_page_without_markers_is_not_touched() -> None:
    with pytest.raises(ValueError, match="has no <!--"):
        picture.put_into("# Nothing here\n")
