"""The scheduling policy keeps what schedule.pxd promises: on every prefix, with nodes coming and
going."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmesh._ext import schedule as native
from fastmesh._ext.schedule import GroupShare, Message, Schedule

KEYS = 100_000
PLAIN = Message({})
WHY = dict(enumerate(native.WHY))
Pairs = Sequence[tuple[str, int]]
Rules = Sequence[tuple[Sequence[tuple[str, str]], Pairs]]


def compiled(nodes: Pairs, rules: Rules = (), local: str = "a", **options: Any) -> Schedule:
    """Everybody but the local node has an endpoint."""
    endpoints = {name: 7 + i for i, (name, _) in enumerate(nodes) if name != local}
    return Schedule(nodes, rules=rules, local=local, **({"endpoints": endpoints} | options))


class Group:
    """One group under one schedule after another; names in, names out."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.share = GroupShare(schedule)

    def under(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.share.reset(schedule)

    def choose(
        self,
        message: Message = PLAIN,
        *,
        down: Sequence[str] = (),
        ordered: bool = False,
    ) -> tuple[str | None, str]:
        names = self.schedule.nodes
        reachable = bytes(name not in down for name in names)
        node, why = self.schedule.choose(self.share, message, reachable, ordered=ordered)
        return (None if node < 0 else names[node]), WHY[why]


def where_keys_live(
    schedule: Schedule, down: Sequence[str] = (), headers: Mapping[str, str] | None = None
) -> list[str | None]:
    group = Group(schedule)
    return [
        group.choose(Message({"fm.key": f"order-{n}"} | dict(headers or {})), down=down,
                     ordered=True)[0]
        for n in range(KEYS)
    ]  # fmt: skip


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0, 1, 3, 20, 33, 50, 67, 99, 100])
def test_the_local_share_is_exact_on_every_prefix(weight: int) -> None:
    group = Group(compiled([("a", weight), ("b", 100)]))
    local = 0
    for number in range(1, 1001):
        node, why = group.choose()
        assert why == "share"
        local += node == "a"
        assert abs(local - number * weight / 100) <= 0.5, number


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 9)), max_size=60))
def test_no_change_of_weight_makes_the_share_jump(steps: list[tuple[int, int]]) -> None:
    """Half a message off the sum of the weights in force, however often they change."""
    group = Group(compiled([("a", 50), ("b", 100)]))
    ideal = local = 0  # hundredths of a message, messages
    for weight, messages in steps:
        group.under(compiled([("a", weight), ("b", 100), *[("c", 100)] * (weight % 2)]))
        for _ in range(messages):
            ideal += weight
            local += group.choose()[0] == "a"
            assert abs(100 * local - ideal) <= 50


CHANGE = st.sampled_from(["none"] * 6 + ["down", "up", "join", "leave", "half", "full"])


@given(st.lists(st.tuples(CHANGE, st.integers(1, 7)), max_size=200), st.integers(0, 30))
@settings(max_examples=300, deadline=None)
def test_the_rest_is_even_between_any_two_that_stay(
    steps: list[tuple[str, int]], weight: int
) -> None:
    """In every stretch in which two peers of weight 100 are reachable, neither is ahead by two,
    whoever else goes down, comes back, joins, is removed or changes its weight."""
    weights = {f"n{i}": 100 for i in range(1, 8)}
    present = {"n1", "n2", "n3", "n4"}
    down: set[str] = set()

    def now() -> Schedule:
        return compiled([("a", weight), *((n, weights[n]) for n in sorted(present))])

    group = Group(now())
    served: Counter[str] = Counter()
    # pair: (lowest, highest) lead of the first over the second since both were there
    leads: dict[tuple[str, str], tuple[int, int]] = {}
    for change, which in steps:
        name = f"n{which}"
        if change == "down":
            down.add(name)
        elif change == "up":
            down.discard(name)
        elif change == "join":
            present.add(name)
        elif change == "leave":
            present.discard(name)
        elif change in ("half", "full"):
            weights[name] = 50 if change == "half" else 100
        if change != "none":
            group.under(now())
        node, why = group.choose(down=sorted(down))
        up = {n for n in present - down if weights[n] == 100}
        assert why == ("share" if node == "a" or up else "no_peer")
        if node not in (None, "a"):
            assert node in up, f"{node} cannot be reached"
            served[str(node)] += 1
        pairs = {(x, y) for x in up for y in up if x < y}
        leads = {pair: leads.get(pair, (10**9, -(10**9))) for pair in pairs}
        for x, y in pairs:
            lead = served[x] - served[y]
            leads[x, y] = low, high = min(leads[x, y][0], lead), max(leads[x, y][1], lead)
            assert high - low <= 1, f"{x} and {y}"


@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_every_round_serves_each_peer_once(count: int) -> None:
    """Never a message off the even part on any prefix, and no two senders begin alike."""
    names = [f"n{i}" for i in range(count)]
    firsts = set()
    for local in ("a", "b", "c", "d"):
        group = Group(compiled([(local, 0), *((n, 100) for n in names)], local=local))
        served: Counter[str | None] = Counter()
        order = []
        for number in range(1, 3 * count + 1):
            order.append(group.choose()[0])
            served[order[-1]] += 1
            assert all(abs(served[n] - number / count) < 1 for n in names)
        firsts.add(order[0])
        assert len(set(order[:count])) == count
    assert len(firsts) > 1 or count < 7


def test_a_peer_of_any_other_weight_takes_nothing_from_others() -> None:
    group = Group(compiled([("a", 0), ("b", 99), ("c", 100), ("d", 0)]))
    assert {group.choose()[0] for _ in range(100)} == {"c"}


# --- nobody to send to ----------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    ("nodes", "down"),
    [
        ([("a", 0), ("b", 0), ("c", 0)], ()),
        ([("a", 0)], ()),
        ([("a", 0), ("b", 100)], ("b",)),
        ([("a", 0), ("b", 50), ("c", 100)], ("c", "a")),
    ],
    ids=["all weights 0", "alone", "the only peer is down", "the only full peer is down"],
)
def test_nobody_reachable_stays_here(nodes: Pairs, down: Sequence[str], ordered: bool) -> None:
    group = Group(compiled(nodes))
    message = Message({"fm.key": "k"})
    for _ in range(50):
        assert group.choose(message, down=down, ordered=ordered) == (None, "no_peer")


def test_peers_that_come_back_owe_nothing_for_the_time_they_were_away() -> None:
    group = Group(compiled([("a", 0), ("b", 100), ("c", 100)]))
    for _ in range(100):
        group.choose(down=["b", "c"])
    assert Counter(group.choose()[0] for _ in range(10)) == {"b": 5, "c": 5}


def test_without_an_endpoint_a_peer_is_not_reachable() -> None:
    nodes = [("a", 0), ("b", 100), ("c", 100)]
    group = Group(compiled(nodes, endpoints={"b": 3, "c": 0}))
    assert {group.choose()[0] for _ in range(9)} == {"b"}


@pytest.mark.parametrize("ordered", [False, True])
def test_a_node_that_is_not_in_the_schedule_keeps_everything(ordered: bool) -> None:
    rules: Rules = [([("colour", "blue")], [("b", 100)])]
    group = Group(compiled([("b", 100)], rules, local="a", endpoints={"b": 1}))
    message = Message({"fm.colour": "blue", "fm.key": "k"})
    assert group.choose(message, ordered=ordered) == (None, "unscheduled")
    assert Group(compiled([])).choose() == (None, "unscheduled")


@pytest.mark.parametrize("ordered", [False, True])
def test_weight_100_keeps_everything(ordered: bool) -> None:
    group = Group(compiled([("a", 100), ("b", 100)]))
    for number in range(200):
        message = Message({"fm.key": str(number)})
        assert group.choose(message, ordered=ordered) == ("a", "share")


# --- rules ----------------------------------------------------------------------------------------

BLUE: Rules = [([("colour", "blue")], [("b", 100)])]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("colour", "fm.colour"),
        ("lane", "fm.lane"),
        ("version", "fm.version"),
        ("key", "fm.key"),
        ("h.region", "h.region"),
    ],
)
def test_a_rule_comes_before_weights(name: str, header: str, ordered: bool) -> None:
    group = Group(compiled([("a", 100), ("b", 0)], [([(name, "eu")], [("b", 100)])]))
    assert group.choose(Message({header: "eu"}), ordered=ordered) == ("b", "rule")
    for other in ("e", "eu1", "us", "EU", ""):
        assert group.choose(Message({header: other}), ordered=ordered) == ("a", "share"), other
    assert group.choose(Message({header + "x": "eu"}), ordered=ordered) == ("a", "share")


def test_all_matches_must_hold_and_the_first_rule_wins() -> None:
    rules: Rules = [
        ([("colour", "blue"), ("h.region", "eu")], [("b", 100)]),
        ([("colour", "blue")], [("c", 100)]),
        ([("colour", "blue")], [("d", 100)]),
    ]
    group = Group(compiled([("a", 100), ("b", 0), ("c", 0), ("d", 0)], rules))
    assert group.choose(Message({"fm.colour": "blue", "h.region": "eu"})) == ("b", "rule")
    assert group.choose(Message({"fm.colour": "blue", "h.region": "us"})) == ("c", "rule")
    assert group.choose(Message({"fm.colour": "blue"}), down=["c"]) == (None, "no_peer")
    assert group.choose(Message({"h.region": "eu"})) == ("a", "share")


def test_an_empty_value_is_a_value() -> None:
    group = Group(compiled([("a", 100), ("b", 0)], [([("lane", "")], [("b", 100)])]))
    assert group.choose(Message({"fm.lane": ""})) == ("b", "rule")
    assert group.choose(Message({})) == ("a", "share")


@pytest.mark.parametrize("ordered", [False, True])
def test_this_node_takes_part_in_a_rule_while_it_has_a_consumer(ordered: bool) -> None:
    rules: Rules = [([("colour", "blue")], [("a", 100), ("b", 100)])]
    group = Group(compiled([("a", 0), ("b", 0)], rules))

    def nodes(*down: str) -> set[str | None]:
        return {
            group.choose(
                Message({"fm.colour": "blue", "fm.key": str(n)}), down=down, ordered=ordered
            )[0]
            for n in range(40)
        }

    assert nodes() == {"a", "b"}
    assert nodes("a") == {"b"}
    assert nodes("b") == {"a"}
    assert nodes("a", "b") == {None}


def test_weight_0_in_a_rule_takes_no_part() -> None:
    rules: Rules = [([("colour", "blue")], [("b", 0), ("c", 1)])]
    group = Group(compiled([("a", 100), ("b", 100), ("c", 0)], rules))
    blue = Message({"fm.colour": "blue"})
    assert {group.choose(blue)[0] for _ in range(20)} == {"c"}
    assert group.choose(blue, down=["c"]) == (None, "no_peer")


WEIGHTS = st.lists(st.integers(1, 100) | st.sampled_from([1, 100]), min_size=1, max_size=12)


@given(WEIGHTS)
@settings(max_examples=200, deadline=None)
def test_a_rule_is_exact_on_every_prefix(weights: list[int]) -> None:
    """Tijdeman's bound: no node is ever a whole message off its part."""
    names = [f"n{i}" for i in range(len(weights))]
    nodes = list(zip(names, weights, strict=True))
    group = Group(compiled([("a", 100), *nodes], [([("colour", "blue")], nodes)]))
    blue = Message({"fm.colour": "blue"})
    served: Counter[str | None] = Counter()
    total = sum(weights)
    for number in range(1, 2 * min(total, 400) + 1):
        served[group.choose(blue)[0]] += 1
        for name, weight in nodes:
            assert abs(served[name] * total - number * weight) < total
    assert group.share.owed(0)[0] == total


@given(WEIGHTS, st.integers(0, 2**32), st.sampled_from([0.01, 0.1, 0.6]))
@settings(max_examples=200, deadline=None)
def test_a_rule_stays_even_when_nodes_come_and_go(
    weights: list[int], seed: int, often: float
) -> None:
    """Who is down gets nothing; in each stretch between two changes nobody is two messages off its
    part of that stretch; what is owed in all is nothing."""
    rng = random.Random(seed)
    names = [f"n{i}" for i in range(len(weights))]
    weight = dict(zip(names, weights, strict=True))
    blue = Message({"fm.colour": "blue"})

    def now() -> Schedule:
        nodes = list(weight.items())
        return compiled([("a", 100), *nodes], [([("colour", "blue")], nodes)])

    group = Group(now())
    down: list[str] = []
    served: Counter[str | None] = Counter()
    number = 0
    for _ in range(300):
        if rng.random() < often:
            if rng.random() < 0.5:
                down = rng.sample(names, rng.randint(0, len(names) - 1))
            else:
                weight[rng.choice(names)] = rng.randint(1, 100)
                group.under(now())
            served.clear()
            number = 0
        node, why = group.choose(blue, down=down)
        assert (why, node in down) == ("rule", False)
        served[node] += 1
        number += 1
        up = {n: weight[n] for n in names if n not in down}
        total = sum(up.values())
        for name, part in up.items():
            assert abs(served[name] * total - number * part) < 2 * total
        known, owed = group.share.owed(0)
        assert (known, set(owed), sum(owed.values())) == (total, set(up), 0)


def test_a_small_weight_is_served_although_a_neighbour_flaps() -> None:
    """A change of who is reachable does not begin the count anew: one in a hundred stays one in a
    hundred when the set changes with every third message."""
    rules: Rules = [([("colour", "blue")], [("b", 99), ("c", 1), ("d", 1)])]
    group = Group(compiled([("a", 100), ("b", 0), ("c", 0), ("d", 0)], rules))
    blue = Message({"fm.colour": "blue"})
    served = Counter(group.choose(blue, down=["d"] if n // 3 % 2 else [])[0] for n in range(10_000))
    assert 80 <= served["c"] <= 120


# --- ordered groups -------------------------------------------------------------------------------


def percent(moved: int) -> float:
    return 100 * moved / KEYS


@pytest.mark.parametrize("weight", [0, 1, 20, 50, 99, 100])
def test_the_hash_space_is_divided_by_weight(weight: int) -> None:
    found = Counter(where_keys_live(compiled([("a", weight), ("b", 100), ("c", 100)])))
    assert abs(percent(found["a"]) - weight) <= 1
    for peer in "bc":
        assert abs(percent(found[peer]) - (100 - weight) / 2) <= 1


@pytest.mark.parametrize(("old", "new"), [(100, 20), (20, 21), (30, 70), (0, 100)])
def test_a_change_of_weight_moves_only_the_share_that_must_move(old: int, new: int) -> None:
    before, after = (
        where_keys_live(compiled([("a", w), *((f"n{i}", 100) for i in range(5))]))
        for w in (old, new)
    )
    moved = [(x, y) for x, y in zip(before, after, strict=True) if x != y]
    assert abs(percent(len(moved)) - abs(old - new)) <= 1
    assert all("a" in pair for pair in moved), "none from peer to peer"


def test_a_node_that_leaves_moves_only_its_own_keys() -> None:
    nodes = [("a", 10), *((f"n{i}", 100) for i in range(9))]
    before = where_keys_live(compiled(nodes))
    for after in (
        where_keys_live(compiled(nodes), down=["n3"]),
        where_keys_live(compiled([n for n in nodes if n[0] != "n3"])),
    ):
        for x, y in zip(before, after, strict=True):
            assert (x == y) == (x != "n3")
        spread = Counter(y for x, y in zip(before, after, strict=True) if x == "n3")
        assert len(spread) == 8
        assert max(spread.values()) < 1.25 * min(spread.values())


def test_a_rule_divides_the_hash_space_by_its_weights() -> None:
    blue = {"fm.colour": "blue"}

    def rule(*nodes: tuple[str, int]) -> Schedule:
        return compiled(
            [("a", 0), ("b", 0), ("c", 0), ("d", 0)], [([("colour", "blue")], list(nodes))]
        )

    before = where_keys_live(rule(("a", 20), ("b", 30), ("c", 50)), headers=blue)
    found = Counter(before)
    for name, part in (("a", 20), ("b", 30), ("c", 50)):
        assert abs(percent(found[name]) - part) <= 1
    after = where_keys_live(rule(("a", 20), ("b", 30), ("c", 50)), down=["b"], headers=blue)
    assert all((x == y) == (x != "b") for x, y in zip(before, after, strict=True))
    after = where_keys_live(rule(("a", 20), ("b", 60), ("c", 50)), headers=blue)
    moved = [(x, y) for x, y in zip(before, after, strict=True) if x != y]
    assert all(y == "b" for _, y in moved)
    assert abs(percent(len(moved)) - 100 * (60 / 130 - 30 / 100)) <= 1


def test_equal_weights_in_a_rule_decide_as_unequal_ones_would() -> None:
    """The short cut for equal weights is the same function."""
    blue = {"fm.colour": "blue"}
    nodes = [("a", 0), ("b", 0), ("c", 0)]
    found = [
        where_keys_live(compiled([*nodes, ("z", 0)], [([("colour", "blue")], chosen)]), ["z"], blue)
        for chosen in (
            [("a", 50), ("b", 50), ("c", 50)],
            [("a", 50), ("b", 50), ("c", 50), ("z", 1)],
        )
    ]
    assert found[0] == found[1]


def test_all_nodes_agree_where_a_key_goes() -> None:
    """Whichever node a broker pushes to: what it does not keep goes to the same peer, when the same
    ones are reachable."""
    nodes = [("a", 0), ("b", 0), ("c", 100), ("d", 100), ("e", 100)]
    one, two = (where_keys_live(compiled(nodes, local=local)) for local in ("a", "b"))
    assert one == two


def test_what_has_no_key_is_counted_although_the_group_is_ordered() -> None:
    group = Group(compiled([("a", 25), ("b", 100)]))
    assert Counter(group.choose(ordered=True)[0] for _ in range(100)) == {"a": 25, "b": 75}


def test_an_empty_key_is_a_key() -> None:
    group = Group(compiled([("a", 50), ("b", 100)]))
    assert len({group.choose(Message({"fm.key": ""}), ordered=True) for _ in range(9)}) == 1


HASHES = {
    b"": 13985675420741483929,
    b"a": 17864486249312343294,
    b"order-1": 14924677440299646500,
    b"12345678": 14939846911152670768,
    b"123456789": 7839319555457364222,
    b"\x00": 8874655573193180658,
    b"\x00\x00\x00\x00\x00\x00\x00\x00": 4117718718145711354,
    b"x" * 255: 17205187139386314187,
}
MIXED = 815575690806614222


def test_hashes_never_change() -> None:
    """Written down: a node of another version, and the same node tomorrow, must agree."""
    assert native.hash_bytes(b"") == HASHES[b""]
    assert {data: native.hash_bytes(data) for data in HASHES} == HASHES
    assert native.mix(1, 2) == native.mix(2, 1) == MIXED
    code = "from fastmesh._ext.schedule import hash_bytes; print(hash_bytes(b'order-1'))"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(fresh.stdout) == HASHES[b"order-1"]


# --- a schedule that changes ----------------------------------------------------------------------


def test_what_rules_owe_is_kept_when_only_weights_change() -> None:
    def now(weight: int, *more: tuple[str, int]) -> Schedule:
        nodes = [("b", weight), ("c", 100 - weight), *more]
        return compiled([("a", 100), ("b", 0), ("c", 0), ("d", 0)], [([("lane", "x")], nodes)])

    message = Message({"fm.lane": "x"})
    group = Group(now(50))
    served: Counter[str | None] = Counter()
    ideal = 0.0
    for number in range(500):
        weight = (10, 50, 90)[number % 3]
        group.under(now(weight))
        served[group.choose(message)[0]] += 1
        ideal += weight / 100
        assert abs(served["b"] - ideal) <= 1.01, "a rounded unit now and then, never a message"
    group.under(now(50, ("d", 50)))
    assert group.share.owed(0) == (0, {}), "another rule starts anew"
    group.choose(message)
    group.under(compiled([("a", 100)]))
    with pytest.raises(ValueError, match="there are 0"):
        group.share.owed(0)


def test_a_larger_and_a_smaller_schedule_follow_each_other() -> None:
    rng = random.Random(5)
    group = Group(compiled([("a", 50)]))
    for _ in range(300):
        nodes = [("a", rng.randint(0, 100))]
        nodes += [(f"n{i}", rng.choice([0, 100])) for i in range(rng.choice([0, 1, 5, 200]))]
        rules = [
            ([("lane", str(i))], [(n, rng.randint(0, 100)) for n, _ in nodes])
            for i in range(rng.randint(0, 5))
        ]
        group.under(compiled(nodes, rules))
        for lane in range(6):
            node, why = group.choose(Message({"fm.lane": str(lane)}))
            assert why in ("share", "rule", "no_peer")
            assert node is None or node in group.schedule.nodes


# --- what cannot be compiled ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": [("a", 101)]}, r"nodes\[0\]: 101; it must be a whole number 0..100"),
        ({"nodes": [("a", -1)]}, r"nodes\[0\]: -1; it must"),
        ({"nodes": [("a", True)]}, r"nodes\[0\]: True; it must"),
        ({"nodes": [("a", 1.5)]}, r"nodes\[0\]: 1.5; it must"),
        ({"nodes": [("", 1)]}, r"nodes\[0\]: 0 bytes; it must have 1..255"),
        ({"nodes": [("é" * 128, 1)]}, r"nodes\[0\]: 256 bytes; it must have 1..255"),
        ({"nodes": [(b"a", 1)]}, r"nodes\[0\]: b'a' is not text"),
        ({"nodes": [("a", 1), ("a", 2)]}, r"nodes\[1\]: 'a' is there twice"),
        ({"nodes": [(str(i), 1) for i in range(1025)]}, "nodes: 1025 are too many; .* 1024"),
        ({"local": ""}, "local: 0 bytes"),
        ({"endpoints": {"x": 1}}, "endpoints: 'x' is not a node"),
        ({"endpoints": {"a": -1}}, r"endpoints\['a'\]: -1; it must be a whole number"),
        ({"endpoints": {"a": 1 << 32}}, r"endpoints\['a'\]: 4294967296; it must"),
        ({"rules": [([], [("a", 1)])]}, r"rules\[0\].matches: is empty"),
        ({"rules": [([("color", "x")], [("a", 1)])]}, r"'color'; it must be one of colour, lane"),
        ({"rules": [([("h.", "x")], [("a", 1)])]}, r"rules\[0\].matches: 2 bytes"),
        ({"rules": [([("lane", 5)], [("a", 1)])]}, r"rules\[0\].matches: 5 is not text"),
        ({"rules": [([("lane", "x" * 256)], [])]}, r"rules\[0\].matches: 256 bytes"),
        ({"rules": [([("lane", "x")] * 9, [])]}, r"rules\[0\].matches: 9 are too many"),
        ({"rules": [([("lane", "x")], [])] * 65}, "rules: 65 are too many"),
        ({"rules": [([("lane", "x")], [("b", 1)])]}, r"rules\[0\].nodes\[0\]: 'b' is not a node"),
        ({"rules": [([("lane", "x")], [("a", 1)] * 2)]}, r"rules\[0\].nodes\[1\]: 'a' is there tw"),
        ({"rules": [([("lane", "x")], [("a", 300)])]}, r"rules\[0\].nodes\[0\]: 300; it must"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"nodes": [("a", 1)], "local": "a", "endpoints": {}}
    Schedule(**good)
    with pytest.raises(ValueError, match=message):
        Schedule(**(good | arguments))


def test_too_many_nodes_in_all_rules() -> None:
    nodes = [(str(i), 1) for i in range(1024)]
    four: Rules = [([("lane", str(i))], nodes) for i in range(4)]
    Schedule(nodes, rules=four, local="a", endpoints={})
    with pytest.raises(ValueError, match="4097 nodes in all are too many; there may be 4096"):
        Schedule(
            nodes, rules=[*four, ([("lane", "x")], [("1", 1), ("2", 0)])], local="a", endpoints={}
        )


def test_a_share_belongs_to_its_schedule() -> None:
    one, two = compiled([("a", 1)]), compiled([("a", 1), ("b", 2)])
    share = GroupShare(one)
    with pytest.raises(ValueError, match="reset it with this one first"):
        two.choose(share, PLAIN, b"\1\1")
    with pytest.raises(ValueError, match="1 bytes; it must have 2"):
        two.choose(GroupShare(two), PLAIN, b"\1")


def test_a_schedule_outlives_a_share_that_was_made_of_it() -> None:
    share = GroupShare(compiled([("a", 30), ("b", 100)]))
    share.reset(compiled([("a", 60)]))
    assert share.part == 50
