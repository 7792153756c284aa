"""The oracle of the message mesh must name every violation that is planted into an honest history,
and nothing in the honest one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sim.push_ledger import CLASSES, MS, Consumption, Fault, Ledger, Published, read_lines

GROUPS = {"orders": {"any": False, "keyed": True}, "events": {"watch": False}}
FLAVOURS = ("client", "node", "broker", "line", "stop")


def consumption(group: str, id: str, at_ms: int, **other: Any) -> Consumption:
    number = int(id[1:])
    made = Consumption(at_ms * MS, (at_ms + 20) * MS, f"c{number % 2}", group, id, 1, number)
    return made._replace(**other)


def honest() -> Ledger:
    """20 messages, 100 ms apart, of two keys and two brokers."""
    ledger = Ledger(GROUPS, {"c0": "n1", "c1": "n2"})
    for number in range(20):
        id, at_ms = f"m{number}", 10_000 + 100 * number
        topic = "events" if number % 5 == 4 else "orders"
        broker = f"b{number // 2 % 2}"
        ledger.published[id] = Published(
            id, topic, f"k{number % 2}", number, number, at_ms * MS, "taken", broker
        )
        for place, group in enumerate(GROUPS[topic]):
            ledger.consumptions.append(consumption(group, id, at_ms + 5 + place))
    return ledger


def only(ledger: Ledger, name: str, count: int = 1, lag: dict[str, int] | None = None) -> None:
    found = ledger.judge(lag or {})
    assert {n: c for n, c in found.counts.items() if c} == {name: count}, found
    assert found.examples[name]
    with pytest.raises(AssertionError, match=name):
        found.check()


def drop(ledger: Ledger, group: str, id: str) -> Consumption:
    found = next(c for c in ledger.consumptions if (c.group, c.id) == (group, id))
    ledger.consumptions.remove(found)
    return found


def test_an_honest_history() -> None:
    found = honest().judge({}).check(taken_min=20)
    assert found.counts == dict.fromkeys(CLASSES, 0)
    assert found.consumed == 36


def test_lost() -> None:
    ledger = honest()
    drop(ledger, "any", "m3")
    assert ledger.missing() == {("any", "m3")}
    only(ledger, "lost", lag={"any": 1})


def test_acknowledged_but_unconsumed() -> None:
    ledger = honest()
    drop(ledger, "any", "m3")
    only(ledger, "unconsumed", lag={"any": 0})


def test_misrouted() -> None:
    ledger = honest()
    ledger.consumptions.append(consumption("watch", "m3", 10_500))
    only(ledger, "misrouted")


def test_torn() -> None:
    ledger = honest()
    ledger.consumptions.append(drop(ledger, "any", "m3")._replace(crc=99))
    only(ledger, "torn")


def test_unexpected() -> None:
    ledger = honest()
    ledger.consumptions.append(consumption("any", "m77", 10_500))
    only(ledger, "unexpected")
    ledger = honest()
    ledger.published["m4"].outcome = "not_taken"
    only(ledger, "unexpected")


def test_doubtful_may_be_either() -> None:
    ledger = honest()
    ledger.published["m4"].outcome = "doubtful"
    ledger.published["m3"].outcome = "doubtful"
    drop(ledger, "any", "m3")
    assert ledger.judge({}).check().outcomes == {"taken": 18, "doubtful": 2}


def test_reordered() -> None:
    # m1, m5 and m13 are of key k1 and broker b0; m9 is an event.
    ledger = honest()
    ledger.consumptions.append(consumption("keyed", "m1", 10_520))
    drop(ledger, "keyed", "m1")
    only(ledger, "reordered")
    # And already when the one before has begun and not ended.
    ledger = honest()
    late = drop(ledger, "keyed", "m1")
    ledger.consumptions.append(late._replace(end_ns=10_507 * MS))
    only(ledger, "reordered")
    # The group beside it promises no order.
    ledger = honest()
    ledger.consumptions.append(consumption("any", "m1", 10_900))
    drop(ledger, "any", "m1")
    ledger.judge({}).check()


def test_duplicated() -> None:
    ledger = honest()
    ledger.consumptions.append(consumption("any", "m3", 10_400))
    only(ledger, "duplicated")


@pytest.mark.parametrize("kind", FLAVOURS)
def test_a_duplicate_and_the_fault_that_explains_it(kind: Any) -> None:
    """m3: consumed by c1 on n2 at 10 305, from b1."""
    name = {"client": "c1", "node": "n2", "broker": "b1", "line": "b1", "stop": "c1"}[kind]

    def with_fault(name: str, at_ms: int, until_ms: int = 0) -> Ledger:
        ledger = honest()
        ledger.consumptions.append(consumption("any", "m3", 10_700, client="c0"))
        ledger.faults.append(Fault(kind, name, at_ms * MS, until_ms * MS))
        return ledger

    found = with_fault(name, 10_310).judge({}).check()
    assert list(found.explained.values()) == [1]
    assert next(iter(found.struck.values())) >= 1
    only(with_fault(name, 10_701), "duplicated")  # after the second one
    only(with_fault(name, 9_700), "duplicated")  # over before the first one
    with_fault(name, 9_700, 10_000).judge({}).check(void=False)
    long_before = with_fault(name, 9_000)
    long_before.consumptions[-1] = consumption("any", "m3", 12_900)
    only(long_before, "duplicated")
    if kind != "node":
        only(with_fault("another", 10_310), "duplicated")


def test_one_fault_explains_not_two_duplicates_of_one_message() -> None:
    ledger = honest()
    ledger.faults.append(Fault("client", "c1", 10_310 * MS))
    ledger.consumptions.append(consumption("any", "m3", 10_700, client="c0"))
    ledger.consumptions.append(consumption("any", "m3", 10_900, client="c0"))
    only(ledger, "duplicated")


def test_a_fault_that_met_nothing_is_void() -> None:
    ledger = honest()
    ledger.faults.append(Fault("client", "c1", 10_380 * MS))
    with pytest.raises(AssertionError, match="void"):
        ledger.judge({}).check()
    with pytest.raises(AssertionError, match="void"):
        honest().judge({}).check(taken_min=21)


def test_what_consumers_write() -> None:
    calls: dict[str, Consumption] = {}
    text = ["B 7.1 100 c1 any m1 1 4711", "B 7.2 110 c1 keyed m1 2 4711", "E 7.2 150"]
    assert read_lines(text, calls) == [Consumption(110, 150, "c1", "keyed", "m1", 2, 4711)]
    assert calls == {"7.1": Consumption(100, 0, "c1", "any", "m1", 1, 4711)}
    assert read_lines(["E 7.1 200"], calls)[0].end_ns == 200
    assert not calls
