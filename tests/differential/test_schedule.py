"""The scheduling policy: the native decision against its twin, message by message, over drawn
schedules that change, nodes that come and go, and every kind of message."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmesh._ext import schedule as native
from tests.reference import schedule as twin

NAMES = [f"node-{i}" for i in range(12)]
COLOURS = ["blue", "green", ""]
WEIGHT = st.sampled_from([0, 1, 50, 99, 100, 100, 100]) | st.integers(0, 100)
MATCH = st.tuples(
    st.sampled_from(["colour", "lane", "version", "key", "h.region", "h.colour"]),
    st.sampled_from(COLOURS),
)


@st.composite
def schedules(draw: st.DrawFn) -> twin.Schedule:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=len(NAMES)))
    nodes = tuple((name, draw(WEIGHT)) for name in names)
    one = st.lists(st.sampled_from(names), unique=True) if names else st.just([])
    rules = tuple(
        twin.Rule(
            tuple(draw(st.lists(MATCH, min_size=1, max_size=3))),
            tuple((name, draw(WEIGHT)) for name in draw(one)),
        )
        for _ in range(draw(st.integers(0, 4)))
    )
    local = draw(st.sampled_from(NAMES[:3]))
    return twin.Schedule(nodes, rules, local, frozenset(names) - draw(st.sets(st.just(NAMES[5]))))


HEADERS = st.dictionaries(
    st.sampled_from(["fm.colour", "fm.lane", "fm.version", "fm.key", "h.region", "h.colour", "x"]),
    st.sampled_from(COLOURS) | st.text(max_size=12),
)


def compiled(schedule: twin.Schedule) -> native.Schedule:
    dialled = {n: number for number, (n, _) in enumerate(schedule.nodes, 1)}
    return native.Schedule(
        schedule.nodes,
        rules=[(rule.matches, rule.nodes) for rule in schedule.rules],
        local=schedule.local,
        endpoints={name: id for name, id in dialled.items() if name in schedule.dialled},
    )


class Both:
    """One group, decided twice."""

    def __init__(self, schedule: twin.Schedule) -> None:
        self.schedule = schedule
        self.native = compiled(schedule)
        self.native_share = native.GroupShare(self.native)
        self.share = twin.Share()
        self.share.reset(schedule)

    def change(self, schedule: twin.Schedule) -> None:
        self.schedule = schedule
        self.native = compiled(schedule)
        self.native_share.reset(self.native)
        self.share.reset(schedule)

    def decide(self, headers: dict[str, str], here: set[str], ordered: bool) -> None:
        names = self.native.nodes
        reachable = bytes(name in here for name in names)
        node, why = self.native.choose(
            self.native_share, native.Message(headers), reachable, ordered=ordered
        )
        found = (None if node < 0 else names[node]), native.WHY[why]
        assert found == twin.choose(self.schedule, self.share, headers, here, ordered)
        assert self.native_share.part == self.share.part
        for number, claims in enumerate(self.share.claims):
            assert self.native_share.owed(number) == (claims.total, claims.owed)


@given(schedules(), st.lists(HEADERS, min_size=1, max_size=6), st.integers(0, 2**32), st.booleans())
@settings(max_examples=300, deadline=None)
def test_drawn_schedules(
    schedule: twin.Schedule, messages: list[dict[str, str]], seed: int, ordered: bool
) -> None:
    rng = random.Random(seed)
    both = Both(schedule)
    here = set(NAMES)
    for _ in range(60):
        chance = rng.random()
        if chance < 0.1:
            here = set(rng.sample(NAMES, rng.randint(0, len(NAMES))))
        elif chance < 0.2:
            both.change(changed(both.schedule, rng))
        both.decide(rng.choice(messages), here, ordered)


def changed(schedule: twin.Schedule, rng: random.Random) -> twin.Schedule:
    """Weights alone, or the nodes, or the rules."""
    weights = [0, 1, 20, 50, 99, 100, 100]
    kind = rng.randrange(4)
    if kind == 0:
        return replace(schedule, nodes=tuple((n, rng.choice(weights)) for n, _ in schedule.nodes))
    if kind == 1:
        nodes = list(schedule.nodes)
        rng.shuffle(nodes)
        return replace(schedule, nodes=tuple(nodes))
    rules = [
        twin.Rule(rule.matches, tuple((n, rng.choice(weights)) for n, _ in rule.nodes))
        for rule in schedule.rules
    ]
    if kind == 2:
        rng.shuffle(rules)
    return replace(schedule, rules=tuple(rules))


@pytest.mark.parametrize("ordered", [False, True])
def test_three_hundred_nodes(ordered: bool) -> None:
    rng = random.Random(3)
    names = [f"n{i}" for i in range(300)]
    schedule = twin.Schedule(
        tuple((n, 30 if n == "n7" else 100) for n in names),
        (twin.Rule((("colour", "blue"),), tuple((n, rng.randint(0, 100)) for n in names)),),
        "n7",
        frozenset(names),
    )
    both = Both(schedule)
    here = set(names)
    for number in range(300):
        if number % 50 == 0:
            here = set(rng.sample(names, 290))
        headers = {"fm.key": str(number)} | ({"fm.colour": "blue"} if number % 2 else {})
        both.decide(headers, here, ordered)


@given(st.binary(max_size=70))
@settings(max_examples=500)
def test_hashes(data: bytes) -> None:
    found = native.hash_bytes(data)
    assert found == twin.stable_hash(data)
    assert native.mix(found, 12345) == twin.mix(found, 12345)
