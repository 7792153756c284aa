"""The tests of the engine once more, with a hand-over wherever a peer reads or writes: whatever
holds of one engine must hold of several that hand their state on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests._ext import test_engine, test_groups, test_groups_review
from tests._ext.bed import Bed, Peer
from tests._ext.moving import move
from tests._ext.push_bed import PushBed

FIRST_MOVES = 20
"""So many operations are each preceded by a hand-over, then every 2nd, 4th, 8th ... of them is."""


class Mover:
    def __init__(self) -> None:
        self.bed: Bed | PushBed | None = None
        self.operations = 0
        self.next = 0
        self.moving = False
        self.moves = 0
        self.varied = True

    def operation(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self.operations += 1
        if self.bed is None or self.moving or self.operations < self.next:
            return
        self.next = self.operations + max(1, self.operations // FIRST_MOVES)
        self.moving = True
        try:
            threads = 1 + self.moves % 2 if self.varied and self.operations % 3 == 0 else None
            move(self.bed, threads=threads)
            self.moves += 1
        finally:
            self.moving = False


@pytest.fixture(autouse=True)
def mover(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mover]:
    found = Mover()
    found.varied = request.node.originalname not in SAME_THREADS

    def remember(kind: Any) -> None:
        begin, end = kind.__init__, kind.__exit__

        def __init__(self: Any, **how: Any) -> None:
            begin(self, **how)
            found.bed = self

        def __exit__(self: Any, *_: object) -> None:
            found.bed = None
            end(self)

        monkeypatch.setattr(kind, "__init__", __init__)
        monkeypatch.setattr(kind, "__exit__", __exit__)

    def before(name: str) -> None:
        act = getattr(Peer, name)

        def moved(self: Peer, *args: Any) -> Any:
            found.operation()
            return act(self, *args)

        monkeypatch.setattr(Peer, name, moved)

    remember(Bed)
    remember(PushBed)
    for name in ("frame", "sendall", "raw", "ended"):
        before(name)
    yield found
    assert found.moves or found.operations < 2


LEFT_OUT = {
    "test_spinning_stops_when_there_is_nothing_to_spin_for": "counts the waits of one engine",
    "test_ids_wrap": "its generations begin late in one engine",
    "test_park_and_every_verdict": "a parked frame is told anew, with another ticket",
    "test_a_parked_frame_outlives_a_lower_limit_and_a_large_one_is_told": "likewise",
    "test_what_a_held_unix_client_sent_before_it_left_is_read": "likewise",
    "test_verdict_for_a_client_that_was_closed_in_the_same_turn": "likewise",
    "test_drain_closes_the_quiet_and_serves_the_busy": "a draining engine is not handed over",
    "test_abort_tells_everybody_in_flight": "likewise",
    "test_memory_that_runs_out_closes_a_connection_not_the_process": "counts allocations",
    "test_a_snapshot_refused_for_memory_leaves_the_groups_as_they_were": "the last is refused",
    "test_nothing_is_lost_when_python_does_not_read": "a hand-over reads",
    "test_a_frame_longer_than_the_read_area_waits_for_room_in_the_ring": "likewise",
}
SAME_THREADS = {
    "test_lost_upstream_gives_each_request_in_flight_one_explicit_error",
    "test_heartbeats_are_ours_on_both_legs",
    "test_a_second_dialect_gets_a_connection_of_its_own",
    "test_answers_for_clients_that_reset_reach_nobody_and_end_nothing",
    "test_a_second_dialect_that_cannot_connect_backs_off",
    "test_sampled_events",
    "test_a_client_is_not_told_overload_for_ever",
}
"""They count what each thread does, or its connections to an upstream: each has its own."""


def take_over(module: Any) -> None:
    """Every test of a module, of whatever class, as one of this."""
    for name, found in list(vars(module).items()):
        if name.startswith("Test"):
            kept = {n: v for n, v in vars(found).items() if n not in LEFT_OUT}
            globals()[f"{name}Moved{module.__name__.rpartition('_')[2].title()}"] = type(
                name, (), {k: v for k, v in kept.items() if k not in ("__dict__", "__weakref__")}
            )
        elif name.startswith("test_") and name not in LEFT_OUT:
            globals()[f"{name}_moved"] = found


take_over(test_engine)
take_over(test_groups)
take_over(test_groups_review)
