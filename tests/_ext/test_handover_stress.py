"""Everything at once, and a hand-over every few steps: clients, brokers and peers subscribe,
publish, deliver, answer, die; groups, schedules and the number of threads change with it, or it is
given up half-way. Every question has one answer, and all adds up after each."""

from __future__ import annotations

import os
from typing import Any

import pytest

from fastmesh._ext.schedule import Schedule
from tests._ext import moving
from tests._ext.bed import eventually
from tests._ext.push_bed import PEER_ID
from tests._ext.test_groups_stress import GROUPS, SPARES_MAX, Stress, StressBed, rows_in_flight

SEEDS = int(os.environ.get("FASTMESH_STRESS_SEEDS", "3"))
MOVES = int(os.environ.get("FASTMESH_STRESS_MOVES", "20"))
STEPS = int(os.environ.get("FASTMESH_STRESS_STEPS", "25"))


def sums(bed: Any) -> dict[tuple[int, str], int]:
    """Every counter that only grows, by row."""
    reading = bed._read()
    gauges = ("in_flight", "connections", "up", "ejected")
    return {
        (row, name): value
        for row in range(100)
        for name, value in reading.row(row).items()
        if value and name.rpartition(".")[2] not in gauges
    }


class Chain(Stress):
    def __init__(self, bed: StressBed, seed: int) -> None:
        super().__init__(bed, seed)
        self.handles, self.tickets = [], []
        self.lazy = False
        self.moved = self.thawed = self.in_flight = 0

    def take_events(self, kind: str) -> None:
        """Until each thread has told that kind; whatever else comes is dealt with as ever."""
        wanted = self.bed.engine.threads
        mine: list[Any] = []
        inner = self.bed.engine

        class Sifted:
            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

            def events(self, most: int = 4096) -> list[Any]:
                found = inner.events(most)
                mine.extend(event for event in found if event.kind == kind)
                return [event for event in found if event.kind != kind]

        self.bed.engine = Sifted()  # type: ignore[assignment]
        try:
            eventually(lambda: self.pump() is not None and len(mine) >= wanted, kind, wait_s=20)
        finally:
            self.bed.engine = inner
        for event in mine:
            assert kind != "saved" or event.a == 0, os.strerror(event.a)

    def other_world(self) -> Any:
        """What the next process is configured with: other groups, other weights, other limits."""
        self.bed.schedule = Schedule(
            nodes=[("me", self.dice.choice([0, 50, 100])), ("a", 100), ("b", 100)],
            rules=[], local="me", endpoints={"a": PEER_ID, "b": PEER_ID + 1},
        )  # fmt: skip
        self.bed.limits["in_flight_max"] = self.dice.choice([16, 4096, 65536])
        names = {name for name in GROUPS if self.dice.random() < 0.9}
        return self.bed.snapshot_of(names)

    def move(self) -> None:
        old = self.bed.engine
        before = sums(self.bed)
        taker = moving.successor(self.bed, self.dice.choice([1, 1, 2]))
        taker.adopt(self.other_world() if self.dice.random() < 0.7 else self.bed.snapshot())
        old.freeze()
        self.take_events("frozen")
        gives_up = self.dice.random()
        if gives_up < 0.2:
            self.go_on(taker)
            return
        old.save()
        self.take_events("saved")
        saved = [old.saved(thread) for thread in range(old.threads)]
        self.in_flight += sum(one.requests + one.pushes for one in saved)
        if gives_up < 0.4:
            for one in saved:
                os.close(one.memfd)
            self.go_on(taker)
            return
        change = self.dice.choice([None, None, moving.of_next_version, moving.of_version_before])
        moving.load(taker, saved, change)
        old.release()
        self.take_events("stopped")
        assert old.stop()
        self.bed.engine = taker
        for number, front in self.bed.fronts.items():
            taker.listen(number, front.fileno())
        taker.start_adopted()
        self.take_events("thawed")
        self.moved += 1
        after = sums(self.bed)
        assert all(after.get(name, 0) >= value for name, value in before.items())
        assert self.bed.balanced()

    def go_on(self, taker: Any) -> None:
        self.bed.engine.thaw()
        self.take_events("thawed")
        assert taker.stop()
        self.thawed += 1
        assert self.bed.balanced()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_twenty_hand_overs_under_load(seed):
    with StressBed(
        brokers=2, peers=2, groups=GROUPS, nodes={"me": 50, "a": 100, "b": 100},
        request_timeout_ms=1000, heartbeat_ms=0, ring_bytes=1 << (16 if seed % 2 else 18),
        queue_bytes_max=1 << 20, threads=1 + seed % 2,
    ) as bed:  # fmt: skip
        chain = Chain(bed, seed)
        for _ in range(50):
            chain.pump(0.001)
        before = bed.process()["memory"]
        while chain.moved < MOVES:
            for _ in range(STEPS):
                chain.step()
            chain.move()
        assert chain.in_flight
        chain.settle()
        assert chain.answers > 50
        eventually(lambda: not rows_in_flight(bed), "nothing is in flight")
        assert bed.balanced()
        for actor in list(chain.actors):
            if actor.kind not in ("broker", "peer"):
                chain.end(actor)
        eventually(lambda: chain.pump() or not bed.process().get("connections"), "gone")
        for actor in list(chain.actors):
            chain.end(actor)
        for _ in range(20):
            chain.pump(0.02)
        chain.publish(set())
        eventually(lambda: bed.engine.in_force() == bed.version, "no groups any more")
        assert bed.balanced()
        spare = SPARES_MAX * bed.engine.threads
        eventually(lambda: bed.process()["memory"] <= before + spare, "memory comes back")
