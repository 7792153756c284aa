"""The broker's logic over a real store, without sockets."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from fastmesh import limits
from fastmesh.broker.core import NO_CONSUMER_PAUSE_MS
from fastmesh.broker.store import StoreFullError
from tests.broker.bench import Bench, Delivery

Make = Callable[..., Bench]
G = {"group": "g"}


def ids(deliveries: list[Delivery]) -> list[str]:
    return [delivery.id for delivery in deliveries]


# --- sessions -------------------------------------------------------------------------------------


def test_hello_says_the_version_and_the_name(bench: Bench) -> None:
    answer = bench.ask(1, {"fm.op": "hello", "fm.protocol": "1", "fm.client": "n1"})
    assert answer == {"fm.result": "consumed", "fm.protocol": "1", "fm.broker": "b1"}


def test_another_version_is_refused_with_what_is_understood(bench: Bench) -> None:
    answer = bench.ask(1, {"fm.op": "hello", "fm.protocol": "2"})
    assert (answer["fm.result"], answer["fm.protocol"]) == ("reject", "1")
    assert "'2'" in answer["fm.reason"]


@pytest.mark.parametrize("op", ["announce", "publish", "suspend"])
def test_hello_comes_first(bench: Bench, op: str) -> None:
    answer = bench.ask(1, {"fm.op": op, "fm.topic": "t", "fm.id": "1", "fm.epoch": "1"})
    assert (answer["fm.result"], answer["fm.reason"]) == ("reject", "hello comes first")


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"fm.op": "subscribe"}, "a broker takes announce"),
        ({"fm.op": "dance"}, "fm.op: 'dance' is not served by a broker"),
        ({"fm.op": "announce"}, "fm.epoch: ''"),
        ({"fm.op": "announce", "fm.epoch": "x"}, "fm.epoch: 'x'; it must be a decimal number"),
        (
            {"fm.op": "announce", "fm.epoch": "1", "fm.group": "a,b"},
            "0 items for 2 groups",
        ),
    ],
)
def test_what_is_wrong_is_named(bench: Bench, headers: dict[str, str], reason: str) -> None:
    bench.hello(1)
    answer = bench.ask(1, headers)
    assert answer["fm.result"] == "reject"
    assert reason in answer["fm.reason"]


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        ({"role": "reader"}, "fm.role: 'reader'; it must be one of subscribe, publish"),
        ({"mode": "all"}, "fm.mode: 'all'"),
        ({"prefetch": "-1"}, "fm.prefetch: '-1'"),
        ({"ordered": "yes"}, "fm.ordered: 'yes'"),
        ({"topic": ""}, "fm.topic: missing"),
        ({"topic": "a b"}, "fm.topic: 'a b'"),
        ({"filter": "colour"}, "fm.filter.'g'"),
    ],
)
def test_an_announcement_is_checked_whole(bench: Bench, group: dict[str, str], reason: str) -> None:
    bench.hello(1)
    answer = bench.announce(1, {"group": "good"}, {**G, **group})
    assert answer["fm.result"] == "reject"
    assert reason in answer["fm.reason"]
    assert not bench.core.groups


def test_an_announcement_in_parts_counts_when_it_is_whole(bench: Bench) -> None:
    bench.hello(1)
    common = {"fm.op": "announce", "fm.epoch": "7", "fm.parts": "2", "fm.topic": "orders"}
    common |= {"fm.role": "subscribe", "fm.prefetch": "5", "fm.mode": "cluster", "fm.ordered": "0"}
    assert bench.ask(1, {**common, "fm.part": "2", "fm.group": "b"})["fm.result"] == "consumed"
    assert not bench.core.groups
    bench.ask(1, {**common, "fm.part": "1", "fm.group": "a"})
    assert set(bench.core.groups) == {"a", "b"}
    # An older epoch that comes late changes nothing.
    bench.ask(1, {**common, "fm.epoch": "6", "fm.parts": "1", "fm.part": "1", "fm.group": "old"})
    assert "old" not in bench.core.groups


# --- publish --------------------------------------------------------------------------------------


def test_consumed_means_on_disk(bench: Bench) -> None:
    bench.hello(1)
    number = bench.frame(1, {"fm.op": "publish", "fm.topic": "orders", "fm.id": "m1"}, b"hi")
    bench.core.turn()
    assert bench.core.seal() is not None
    bench.take()
    assert not [push for _, push in bench.answers if push.id == number]
    bench.crash()  # sealed and not committed: nothing was promised
    assert bench.core.topics == {}
    assert bench.publish("m1", b"hi") == {
        "fm.result": "consumed",
        "fm.id": "m1",
        "fm.broker": "b1",
    }
    bench.crash()
    bench.announce(2, G)
    (delivery,) = bench.delivered()
    assert (delivery.id, delivery.push.content) == ("m1", b"hi")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"topic": ""}, "fm.topic: missing"),
        ({"topic": "a,b"}, "fm.topic: 'a,b'"),
        ({"topic": "x" * 128}, "fm.topic: 'xxx"),
        ({"delay_ms": "soon"}, "fm.delay_ms: 'soon'"),
        ({"tx": "maybe"}, "fm.tx: 'maybe'"),
        ({"tx": "prepare"}, "fm.group: missing"),
        ({"tx": "commit", "broker": "b2"}, "fm.broker: 'b2', and this is 'b1'"),
        ({"tx": "commit"}, "fm.id: 'm1' is not prepared here"),
        ({"h_large": "x" * 32000}, "headers: more than"),
    ],
)
def test_a_publish_that_cannot_be(bench: Bench, more: dict[str, str], reason: str) -> None:
    answer = bench.publish("m1", **more)
    assert answer["fm.result"] == "reject"
    assert reason in answer["fm.reason"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"key": "\u00e9" * 200}, "fm.key: 400 bytes"),
        ({"born_ms": "soon"}, "fm.born_ms: 'soon'"),
    ],
)
def test_a_known_topic_makes_nobody_less_careful(
    bench: Bench, more: dict[str, str], reason: str
) -> None:
    bench.publish("m1")
    answer = bench.publish("m2", **more)
    assert answer["fm.result"] == "reject"
    assert reason in answer["fm.reason"]


def test_a_publish_without_an_id(bench: Bench) -> None:
    answer = bench.publish("")
    assert (answer["fm.result"], answer["fm.reason"][:14]) == ("reject", "fm.id: 0 bytes")


def test_a_publish_that_comes_again_is_stored_once(bench: Bench) -> None:
    bench.hello(1)
    said = {"fm.op": "publish", "fm.topic": "orders", "fm.id": "m1"}
    first, second = bench.frame(1, said), bench.frame(1, said)  # both before anything is written
    bench.run()
    answers = {push.id: push.headers for _, push in bench.answers}
    assert answers[first] == answers[second] == bench.publish("m1")
    bench.crash()
    assert bench.publish("m1")["fm.result"] == "consumed"
    assert bench.core.counts["duplicates"] == 1
    assert bench.publish("m1", topic="other")["fm.result"] == "consumed"  # another message
    bench.announce(2, G)
    assert ids(bench.drain()) == ["m1"]


def test_headers_travel_and_what_only_a_broker_says_does_not(bench: Bench) -> None:
    bench.publish(
        "m1", b"\0\xff", key="k", colour="blue", h_a="1", x_unknown="u", hop="1", origin="evil"
    )
    bench.announce(2, G)
    (delivery,) = bench.delivered()
    assert delivery.push.content == b"\0\xff"
    assert int(delivery.headers.pop("fm.born_ms")) == bench.now_ms
    assert delivery.headers == {
        "fm.op": "deliver",
        "fm.group": "g",
        "fm.attempt": "1",
        "fm.topic": "orders",
        "fm.id": "m1",
        "fm.key": "k",
        "fm.colour": "blue",
        "h.a": "1",
        "fm.x_unknown": "u",
    }


def test_disk_full_is_later_and_the_broker_goes_on(bench: Bench) -> None:
    bench.announce(2, G)
    bench.publish_many(["m1"])
    (delivery,) = bench.delivered()
    number = bench.frame(1, {"fm.op": "publish", "fm.topic": "orders", "fm.id": "m2"})
    bench.run(full=True)
    (answer,) = (push.headers for _, push in bench.answers if push.id == number)
    assert (answer["fm.result"], answer["fm.retry_ms"]) == ("later", "1000")
    assert answer["fm.reason"] == "disk full"
    # Until the next try publishers are told at once, and consumers go on.
    assert bench.publish("m3")["fm.reason"] == "disk full"
    bench.answer(delivery)
    bench.run(2000)
    assert bench.publish("m2")["fm.result"] == "consumed"
    assert ids(bench.drain()) == ["m2"]
    bench.crash()
    bench.announce(2, G)
    assert bench.delivered() == []


def test_a_store_at_its_bound_takes_nothing_new(make: Make) -> None:
    bench = make(bytes_max=1 << 20)
    bench.publish_many(["m1"])
    bench.core.trim((1 << 20) + 1)
    assert bench.publish("m2")["fm.reason"] == "store full"
    bench.core.trim(1000)
    assert bench.publish("m2")["fm.result"] == "consumed"


def test_more_than_one_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BROKER_BATCH_MESSAGES", 3)
    bench.hello(1)
    said = {"fm.op": "publish", "fm.topic": "orders"}
    numbers = [bench.frame(1, {**said, "fm.id": f"m{n}"}) for n in range(10)]
    bench.run()
    assert {push.id for _, push in bench.answers} >= set(numbers)
    bench.announce(2, {**G, "prefetch": "100"})
    assert sorted(ids(bench.delivered())) == sorted(f"m{n}" for n in range(10))


def test_too_much_on_its_way_is_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BROKER_PENDING_BYTES_MAX", 4000)
    bench.hello(1)
    said = {"fm.op": "publish", "fm.topic": "orders"}
    for n in range(10):
        bench.frame(1, {**said, "fm.id": f"m{n}"}, bytes(1000))
    bench.run()
    results = Counter(push.headers["fm.result"] for _, push in bench.answers)
    assert results["later"] == 8
    assert bench.publish("m9")["fm.result"] == "consumed"


# --- deliver --------------------------------------------------------------------------------------


def test_credit_bounds_what_is_in_flight(bench: Bench) -> None:
    bench.publish_many([f"m{n}" for n in range(10)])
    bench.announce(2, {**G, "prefetch": "3"})
    first = bench.delivered()
    assert len(first) == 3
    bench.answer(first[0])
    assert len(bench.delivered()) == 1
    bench.announce(2, {**G, "prefetch": "5"})
    assert len(bench.delivered()) == 2


def test_connections_take_turns(bench: Bench) -> None:
    for handle in (2, 3, 4):
        bench.announce(handle, {**G, "prefetch": "100"})
    bench.publish_many([f"m{n}" for n in range(9)])
    assert Counter(d.handle for d in bench.delivered()) == {2: 3, 3: 3, 4: 3}


def test_each_group_gets_everything(bench: Bench) -> None:
    bench.announce(2, {"group": "a"}, {"group": "b"})
    bench.publish_many(["m1", "m2"])
    found = Counter((d.headers["fm.group"], d.id) for d in bench.delivered())
    assert found == {("a", "m1"): 1, ("a", "m2"): 1, ("b", "m1"): 1, ("b", "m2"): 1}


def test_consumed_is_not_delivered_again(bench: Bench) -> None:
    bench.announce(2, {**G, "prefetch": "100"})
    names = [f"m{n}" for n in range(20)]
    bench.publish_many(names)
    draw = random.Random(5)
    found = bench.delivered()
    draw.shuffle(found)
    for delivery in found[:13]:
        bench.answer(delivery)
    bench.settle()
    bench.crash()
    assert bench.core.lag(bench.core.groups["g"]) == 7
    bench.announce(2, {**G, "prefetch": "100"})
    assert sorted(ids(bench.drain())) == sorted(ids(found[13:]))
    assert bench.core.lag(bench.core.groups["g"]) == 0


def test_a_lagging_group_reads_from_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BROKER_TAIL_BYTES_MAX", 0)
    names = [f"m{n}" for n in range(300)]
    bench.publish_many(names)
    bench.announce(2, {**G, "prefetch": "7"})
    assert sorted(ids(bench.drain())) == sorted(names)


def test_without_credit_nothing_is_delivered(bench: Bench) -> None:
    bench.announce(2, {**G, "prefetch": "0"})
    bench.publish_many(["m1"])
    assert bench.delivered() == []


def test_suspend_and_resume_of_a_connection(bench: Bench) -> None:
    bench.announce(2, G)
    bench.ask(2, {"fm.op": "suspend"})
    bench.publish_many(["m1"])
    assert bench.delivered() == []
    bench.ask(2, {"fm.op": "resume"})
    assert ids(bench.delivered()) == ["m1"]


def test_after_goaway_nothing_new_and_what_is_in_flight_still_counts(bench: Bench) -> None:
    bench.announce(2, {**G, "prefetch": "1"})
    bench.publish_many(["m1", "m2"])
    (delivery,) = bench.delivered()
    bench.ask(2, {"fm.op": "goaway"})
    bench.answer(delivery)
    assert bench.delivered() == []
    bench.gone(2)
    bench.announce(3, G)
    assert ids(bench.delivered()) == ["m2"]


def test_filters(bench: Bench) -> None:
    bench.announce(2, {**G, "filter": "colour=blue|green&region=eu"})
    bench.publish("m1", colour="blue", h_region="eu")
    bench.publish("m2", colour="blue", h_region="us")
    bench.publish("m3", colour="red", h_region="eu")
    bench.publish("m4", colour="green", h_region="eu")
    assert ids(bench.drain()) == ["m1", "m4"]
    assert bench.core.lag(bench.core.groups["g"]) == 0
    assert bench.core.groups["g"].filtered == 2


def test_a_group_that_is_new_starts_where_it_was_told(make: Make) -> None:
    first, last = make(), make(start_first=False)
    for bench in (first, last):
        bench.publish_many(["m1"])
        bench.announce(2, G)
        bench.crash()
        bench.publish_many(["m2"])
        bench.announce(2, G)
    assert sorted(ids(first.drain())) == ["m1", "m2"]
    assert ids(last.drain()) == ["m2"]


def test_a_group_that_moves_to_another_topic(bench: Bench) -> None:
    bench.announce(2, G)
    bench.announce(2, {**G, "topic": "other"})
    bench.publish_many(["m1"])
    bench.publish("m2", topic="other")
    assert ids(bench.drain()) == ["m2"]


# --- redelivery -----------------------------------------------------------------------------------


def test_redelivery_by_steps(make: Make) -> None:
    bench = make(redeliver_ms=(1000, 5000))
    bench.announce(2, G)
    bench.publish_many(["m1"])
    waits = [1000, 5000, 5000]
    for attempt, wait in enumerate(waits, 1):
        (delivery,) = bench.delivered()
        assert delivery.attempt == attempt
        bench.answer(delivery, "later", retry_ms="0")
        bench.run(wait - 1)
        assert bench.delivered() == []
        bench.run(1)
    (delivery,) = bench.delivered()
    assert delivery.attempt == 4


def test_the_consumer_says_when(bench: Bench) -> None:
    bench.announce(2, G)
    bench.publish_many(["m1"])
    bench.answer(bench.delivered()[0], "later", retry_ms="70")
    bench.run(69)
    assert bench.delivered() == []
    bench.run(1)
    assert [d.attempt for d in bench.delivered()] == [2]


@pytest.mark.parametrize("outcome", [1, 3, 8])
def test_no_answer_is_redelivered(bench: Bench, outcome: int) -> None:
    bench.announce(2, G)
    bench.publish_many(["m1"])
    bench.fail(bench.delivered()[0], outcome)
    bench.run(1000)
    assert [(d.id, d.attempt) for d in bench.delivered()] == [("m1", 2)]


def test_an_answer_without_a_result_is_no_answer(bench: Bench) -> None:
    bench.announce(2, G)
    bench.publish_many(["m1"])
    bench.answer(bench.delivered()[0], "")
    bench.run(1000)
    assert [d.attempt for d in bench.delivered()] == [2]


def test_a_connection_that_ends_is_no_answer(bench: Bench) -> None:
    bench.announce(2, G)
    bench.publish_many(["m1", "m2"])
    assert len(bench.delivered()) == 2
    bench.gone(2)
    bench.announce(3, G)
    bench.run(1000)
    assert sorted((d.id, d.attempt) for d in bench.delivered()) == [("m1", 2), ("m2", 2)]


def test_a_late_answer_is_counted_and_nothing_else(bench: Bench) -> None:
    bench.announce(2, G)
    bench.publish_many(["m1"])
    (delivery,) = bench.delivered()
    bench.fail(delivery)
    bench.answer(delivery)
    assert bench.core.counts["late_answers"] == 1
    bench.run(1000)
    assert len(bench.delivered()) == 1


def test_retries_do_not_hold_up_the_others_and_survive(bench: Bench) -> None:
    bench.announce(2, {**G, "prefetch": "2"})
    bench.publish_many([f"m{n}" for n in range(6)])
    late = [d for d in bench.delivered() if d.id == "m0" or bench.answer(d) is None]
    bench.answer(late[0], "later", retry_ms="5000")
    assert sorted(ids(bench.drain())) == [f"m{n}" for n in range(2, 6)]
    bench.crash()
    bench.announce(2, G)
    assert bench.delivered() == []
    bench.run(5000)
    assert [(d.id, d.attempt) for d in bench.drain()] == [("m0", 2)]
    bench.crash()
    bench.announce(2, G)
    bench.run(60_000)
    assert bench.delivered() == []


def test_overload_on_the_way_does_not_age_a_message(make: Make) -> None:
    bench = make(max_attempts=3)
    bench.announce(2, G)
    bench.publish_many(["m1"])
    for _ in range(10):
        bench.answer(bench.delivered()[0], "later", retry_ms="100", reason="overload")
        bench.run(100)
    assert [d.attempt for d in bench.delivered()] == [1]


def test_no_consumer_pauses_the_connection_and_counts_nothing(bench: Bench) -> None:
    bench.announce(2, G)
    bench.publish_many(["m1"])
    bench.answer(bench.delivered()[0], "no_consumer")
    assert bench.delivered() == []
    # Another connection has somebody.
    bench.announce(3, G)
    (delivery,) = bench.delivered()
    assert (delivery.handle, delivery.attempt) == (3, 1)
    bench.answer(delivery, "no_consumer")
    bench.run(NO_CONSUMER_PAUSE_MS)
    (delivery,) = bench.delivered()
    assert delivery.attempt == 1
    bench.answer(delivery, "no_consumer")
    bench.announce(delivery.handle, G)  # it has somebody again
    assert [d.attempt for d in bench.delivered()] == [1]


def test_dead_after_the_last_attempt(make: Make) -> None:
    bench = make(max_attempts=3, redeliver_ms=(10,))
    bench.announce(2, G)
    bench.publish("m1", b"poison", colour="blue")
    for _ in range(3):
        bench.answer(bench.delivered()[0], "later", reason="cannot")
        bench.run(10)
    assert bench.delivered() == []
    bench.settle()
    assert bench.core.groups["g"].dead == 1
    assert bench.core.lag(bench.core.groups["g"]) == 0
    bench.crash()
    bench.announce(2, G)
    bench.announce(3, {"group": "undertaker", "topic": "%DLQ%g"})
    (letter,) = bench.drain()
    assert letter.push.content == b"poison"
    found = {key: letter.headers[f"fm.{key}"] for key in ("id", "topic", "colour")}
    assert found == {"id": "m1", "topic": "%DLQ%g", "colour": "blue"}
    assert letter.headers["fm.dead_topic"] == "orders"
    assert letter.headers["fm.dead_reason"] == "cannot"
    assert letter.headers["fm.dead_attempts"] == "3"


def test_reject_is_dead_at_once(bench: Bench) -> None:
    bench.announce(2, G)
    bench.publish_many(["m1"])
    bench.answer(bench.delivered()[0], "reject", reason="not mine")
    bench.run(100_000)
    assert bench.delivered() == []
    assert bench.core.topics["%DLQ%g"].published == 1


def test_a_dead_letter_and_its_end_are_one_transaction(bench: Bench) -> None:
    """Disk full in between: it is neither lost nor doubled."""
    bench.announce(2, G)
    bench.publish_many(["m1"])
    bench.core.now_ms = bench.now_ms
    (delivery,) = bench.delivered()
    bench.core._dead(bench.core._flying[delivery.ticket].entry, "x")  # type: ignore[arg-type]
    bench.run(full=True)
    bench.crash()
    bench.announce(2, G)
    (delivery,) = bench.delivered()
    bench.core._dead(bench.core._flying[delivery.ticket].entry, "x")  # type: ignore[arg-type]
    bench.run(full=True)
    bench.run(2000)
    bench.crash()
    assert [queue.end for queue in bench.core.topics["%DLQ%g"].queues].count(1) == 1
    bench.announce(2, G)
    assert bench.delivered() == []


def test_what_a_full_disk_held_back_is_written_later(make: Make) -> None:
    bench = make(max_attempts=2)
    bench.announce(2, {**G, "prefetch": "2"})
    bench.publish_many(["m1", "m2"])
    core = bench.core
    for delivery in bench.delivered():
        core.now_ms = bench.now_ms
        result = {"m1": "later", "m2": "reject"}[delivery.id]
        headers = {"fm.result": result, "fm.retry_ms": "9000"}
        core.answer(delivery.ticket, 0, delivery.push._replace(headers=headers))
    bench.run(10, full=True)
    assert core.counts["commits_failed"] == 1
    assert core.lag(core.groups["g"]) == 1
    bench.run(2000)
    bench.crash()
    bench.announce(2, {**G, "prefetch": "2"})
    assert bench.delivered() == []
    bench.run(9000)
    assert [(d.id, d.attempt) for d in bench.delivered()] == [("m1", 2)]


# --- order by key ---------------------------------------------------------------------------------

ORDERED = {"group": "g", "ordered": "1", "prefetch": "100"}


def test_the_next_of_a_key_waits_for_the_one_before(bench: Bench) -> None:
    bench.announce(2, ORDERED)
    for n in range(3):
        bench.publish(f"a{n}", key="a")
        bench.publish(f"b{n}", key="b")
        bench.publish(f"n{n}")
    first = bench.delivered()
    assert sorted(ids(first)) == ["a0", "b0", "n0", "n1", "n2"]
    by_id = {d.id: d for d in first}
    bench.answer(by_id["a0"], "later", retry_ms="500")
    bench.answer(by_id["b0"])
    (b1,) = bench.delivered()
    bench.answer(b1)
    (b2,) = bench.delivered()
    assert (b1.id, b2.id) == ("b1", "b2")
    bench.run(500)
    (again,) = bench.delivered()
    assert (again.id, again.attempt) == ("a0", 2)
    bench.answer(again)
    assert ids(bench.drain()) == ["a1", "a2"]
    assert bench.core.lag(bench.core.groups["g"]) == 4  # b2 and n0..n2 are in flight


def test_a_dead_message_frees_its_key_once_it_is_written(bench: Bench) -> None:
    bench.announce(2, ORDERED)
    bench.publish("a0", key="a")
    bench.publish("a1", key="a")
    bench.answer(bench.delivered()[0], "reject")
    assert ids(bench.delivered()) == ["a1"]


def test_order_survives_a_crash(bench: Bench) -> None:
    bench.announce(2, ORDERED)
    for n in range(4):
        bench.publish(f"a{n}", key="a")
    bench.answer(bench.delivered()[0])
    bench.answer(bench.delivered()[0], "later", retry_ms="1000")
    bench.settle()
    bench.crash()
    bench.announce(2, ORDERED)
    assert bench.delivered() == []
    bench.run(1000)
    assert ids(bench.drain()) == ["a1", "a2", "a3"]


def test_many_waiting_do_not_grow_without_bound(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BROKER_WAITING_MAX", 5)
    bench.announce(2, ORDERED)
    bench.publish_many([f"a{n}" for n in range(20)], key="a")
    cursor = bench.core.groups["g"].cursors[0]
    assert cursor.waiting == 5
    assert ids(bench.drain()) == [f"a{n}" for n in range(20)]
    assert cursor.waiting == 0


def test_order_under_random_answers(make: Make) -> None:
    """Whatever is answered and whenever it crashes: each key is consumed in order, all of it."""
    draw = random.Random(11)
    bench = make(redeliver_ms=(50, 100), max_attempts=1000)
    sent: dict[str, list[str]] = {}
    consumed: dict[str, list[str]] = {}
    count = 0
    bench.announce(2, ORDERED)
    open_: list[Delivery] = []
    for _ in range(1500):
        open_ += bench.delivered()
        what = draw.random()
        if what < 0.3:
            key = f"k{draw.randrange(5)}"
            id = f"m{count}"
            count += 1
            bench.publish(id, key=key)
            sent.setdefault(key, []).append(id)
        elif what < 0.9 and open_:
            delivery = open_.pop(draw.randrange(len(open_)))
            key = delivery.headers["fm.key"]
            kind = draw.random()
            if kind < 0.7:
                consumed.setdefault(key, []).append(delivery.id)
                bench.answer(delivery)
            elif kind < 0.85:
                bench.answer(delivery, "later", retry_ms=str(draw.choice((0, 10, 200))))
            else:
                bench.fail(delivery)
        elif what < 0.99:
            bench.run(draw.randrange(100))
        else:
            bench.settle()
            bench.crash()
            open_.clear()
            bench.announce(2, ORDERED)
    open_ += bench.delivered()
    for _ in range(10_000):
        if not open_:
            bench.run(1000)
            open_ = bench.delivered()
            if not open_:
                break
        delivery = open_.pop()
        consumed.setdefault(delivery.headers["fm.key"], []).append(delivery.id)
        bench.answer(delivery)
        open_ += bench.delivered()
    assert consumed == sent


# --- broadcast ------------------------------------------------------------------------------------

ALL = {"group": "all", "mode": "broadcast"}


def test_broadcast_reaches_every_connection_from_now_on(bench: Bench) -> None:
    bench.publish_many(["before"])
    bench.announce(2, ALL)
    bench.announce(3, ALL)
    bench.publish_many(["m1"])
    assert sorted((d.handle, d.id) for d in bench.drain()) == [(2, "m1"), (3, "m1")]
    bench.gone(3)
    bench.publish_many(["m2"])
    bench.announce(4, ALL)
    assert [(d.handle, d.id) for d in bench.drain()] == [(2, "m2")]


def test_broadcast_redelivers_to_the_same_connection_while_it_lives(make: Make) -> None:
    bench = make(redeliver_ms=(10,), max_attempts=3)
    bench.announce(2, ALL)
    bench.announce(3, ALL)
    bench.publish_many(["m1"])
    for delivery in bench.delivered():
        bench.answer(delivery, "consumed" if delivery.handle == 3 else "later")
    bench.run(10)
    (again,) = bench.delivered()
    assert (again.handle, again.attempt) == (2, 2)
    bench.answer(again, "later")
    bench.run(10)
    bench.answer(bench.delivered()[0], "later")
    assert bench.core.groups["all"].dropped == 1
    bench.publish_many(["m2"])
    assert len(bench.delivered()) == 2
    bench.gone(2)
    bench.run(60_000)
    assert bench.delivered() == []


# --- delayed --------------------------------------------------------------------------------------


def test_delayed_messages_come_when_they_are_due_and_survive(bench: Bench) -> None:
    bench.announce(2, G)
    assert bench.publish("m1", delay_ms="5000")["fm.result"] == "consumed"
    assert bench.publish("m2", delay_ms="100")["fm.result"] == "consumed"
    bench.run(100)
    assert ids(bench.drain()) == ["m2"]
    bench.crash()
    bench.announce(2, G)
    bench.run(4889)
    assert bench.delivered() == []
    assert bench.publish("m1", delay_ms="5000")["fm.result"] == "consumed"  # known
    bench.run(1)
    assert ids(bench.drain()) == ["m1"]
    bench.crash()
    bench.announce(2, G)
    bench.run(100_000)
    assert bench.delivered() == []


# --- transactions ---------------------------------------------------------------------------------

PUBLISHER = {"group": "pg", "role": "publish"}


def test_prepared_is_delivered_after_commit_only(bench: Bench) -> None:
    bench.announce(2, G)
    answer = bench.publish("m1", b"half", tx="prepare", group="pg")
    assert answer == {"fm.result": "consumed", "fm.id": "m1", "fm.broker": "b1"}
    assert bench.publish("m1", b"half", tx="prepare", group="pg") == answer
    assert bench.delivered() == []
    bench.crash()
    bench.announce(2, G)
    for _ in range(2):  # the second time it is done already
        assert bench.publish("m1", tx="commit", broker="b1")["fm.result"] == "consumed"
    assert [(d.id, d.push.content) for d in bench.drain()] == [("m1", b"half")]
    answer = bench.publish("m1", tx="rollback")
    assert (answer["fm.result"], answer["fm.reason"]) == ("reject", "fm.id: 'm1' is committed")


def test_rollback(bench: Bench) -> None:
    bench.announce(2, G)
    bench.publish("m1", tx="prepare", group="pg")
    for _ in range(2):
        assert bench.publish("m1", tx="rollback")["fm.result"] == "consumed"
    assert bench.publish("m1", tx="commit")["fm.result"] == "reject"
    bench.crash()
    bench.announce(2, G)
    assert bench.core.prepared == {}
    assert bench.delivered() == []


@pytest.mark.parametrize("result", ["commit", "rollback"])
def test_check_asks_a_live_connection_of_the_publisher(bench: Bench, result: str) -> None:
    bench.announce(2, G)
    bench.publish("m1", b"half", tx="prepare", group="pg", key="k")
    bench.run(6000)
    assert bench.delivered() == []  # nobody to ask, which ages nothing
    bench.announce(3, PUBLISHER)
    bench.run(30_000)
    (check,) = bench.delivered()
    assert (check.handle, check.push.content) == (3, b"half")
    assert {k: check.headers[f"fm.{k}"] for k in ("op", "group", "id", "topic", "key")} == {
        "op": "check",
        "group": "pg",
        "id": "m1",
        "topic": "orders",
        "key": "k",
    }
    bench.answer(check, result)
    assert ids(bench.drain()) == (["m1"] if result == "commit" else [])
    assert bench.core.prepared == {}


def test_unknown_for_too_long_is_rolled_back(make: Make) -> None:
    bench = make(check_max=3, check_after_ms=100, check_every_ms=200)
    bench.announce(3, PUBLISHER)
    bench.announce(2, G)
    bench.publish("m1", tx="prepare", group="pg")
    bench.run(100)
    bench.answer(bench.delivered()[0], "unknown")
    bench.settle()
    bench.crash()  # the checks made are remembered
    bench.announce(3, PUBLISHER)
    bench.announce(2, G)
    bench.run(200)
    bench.fail(bench.delivered()[0])
    bench.run(200)
    (check,) = bench.delivered()
    bench.answer(check, "unknown")
    assert bench.core.prepared == {}
    bench.run(10_000)
    assert bench.delivered() == []
    assert bench.core.counts["rolled_back"] == 1


@pytest.mark.parametrize("why", ["later", "gone"])
def test_a_check_that_nobody_has_looked_at_counts_for_nothing(make: Make, why: str) -> None:
    """Whoever decided to commit and could not say so must be asked before it is rolled back."""
    bench = make(check_max=3, check_after_ms=100, check_every_ms=200)
    bench.announce(2, G)
    bench.publish("m1", tx="prepare", group="pg")
    for handle in range(10, 16):
        bench.announce(handle, PUBLISHER)
        bench.run(300)
        (check,) = bench.delivered()
        if why == "later":
            bench.answer(check, "later", retry_ms="0", reason="client gone")
        bench.gone(handle)
    bench.announce(3, PUBLISHER)
    bench.run(300)
    (check,) = bench.delivered()
    bench.answer(check, "commit")
    assert ids(bench.drain()) == ["m1"]


def test_an_id_that_is_prepared_for_two_topics_at_once_is_refused_once(bench: Bench) -> None:
    bench.hello(1)
    said = {"fm.op": "publish", "fm.id": "m1", "fm.tx": "prepare", "fm.group": "pg"}
    numbers = [bench.frame(1, {**said, "fm.topic": topic}) for topic in ("orders", "bills")]
    bench.run()
    found = {push.id: push.headers for _, push in bench.answers}
    assert [found[n]["fm.result"] for n in numbers] == ["consumed", "reject"]
    assert found[numbers[1]]["fm.reason"] == "fm.id: 'm1' is prepared for another topic"
    assert bench.publish("m1", tx="rollback")["fm.result"] == "consumed"
    assert bench.publish("m1", topic="bills", tx="prepare", group="pg")["fm.result"] == "consumed"


def test_an_id_whose_prepare_did_not_fit_is_free_again(bench: Bench) -> None:
    bench.hello(1)
    said = {"fm.op": "publish", "fm.id": "m1", "fm.tx": "prepare", "fm.group": "pg"}
    bench.frame(1, {**said, "fm.topic": "orders"})
    bench.run(full=True)
    bench.run(2000)
    assert bench.publish("m1", topic="bills", tx="prepare", group="pg")["fm.result"] == "consumed"


def test_checks_are_asked_some_at_a_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart all are due at once, and each has its content in memory."""
    monkeypatch.setattr(limits, "BROKER_CHECKS_MAX", 3)
    bench = make(check_after_ms=100, check_every_ms=200)
    for n in range(10):
        bench.publish(f"m{n}", tx="prepare", group="pg")
    bench.run(1000)
    bench.crash()
    bench.announce(3, PUBLISHER)
    bench.announce(2, G)
    bench.run(200)
    asked = []
    while checks := [d for d in bench.delivered() if d.headers["fm.op"] == "check"]:
        assert len(checks) <= 3
        asked += ids(checks)
        for check in checks:
            bench.answer(check, "rollback")
    assert sorted(asked) == [f"m{n}" for n in range(10)]


def test_a_commit_that_does_not_fit_may_be_said_again(bench: Bench) -> None:
    bench.announce(2, G)
    bench.publish("m1", tx="prepare", group="pg")
    bench.frame(1, {"fm.op": "publish", "fm.tx": "commit", "fm.id": "m1", "fm.topic": "orders"})
    bench.run(full=True)
    assert bench.answers[-1][1].headers["fm.result"] == "later"
    bench.run(2000)
    assert bench.publish("m1", tx="commit")["fm.result"] == "consumed"
    assert ids(bench.drain()) == ["m1"]


# --- what an operator does ------------------------------------------------------------------------


def test_a_suspended_group_gets_nothing_until_it_is_resumed(bench: Bench) -> None:
    bench.announce(2, G)
    bench.core.suspend_group("g", True)
    bench.publish_many(["m1"])
    bench.settle()
    bench.crash()
    bench.announce(2, G)
    assert bench.delivered() == []
    bench.core.suspend_group("g", False)
    bench.run()
    assert ids(bench.drain()) == ["m1"]
    with pytest.raises(KeyError):
        bench.core.suspend_group("nobody", True)


def test_reset_to_a_time(bench: Bench) -> None:
    bench.announce(2, G)
    for n in range(5):
        bench.publish(f"m{n}", key="k")
        bench.run(1000)
    assert len(bench.drain()) == 5
    bench.core.reset_group("g", time_ms=bench.now_ms - 2500)
    bench.run()
    assert ids(bench.drain()) == ["m3", "m4"]
    bench.core.reset_group("g", to_first=True)
    bench.run()
    assert len(bench.drain()) == 5
    bench.core.reset_group("g", to_first=True)
    bench.core.reset_group("g")
    bench.run()
    assert bench.delivered() == []
    bench.settle()
    bench.crash()
    bench.announce(2, G)
    assert bench.delivered() == []


def test_reset_forgets_retries_and_what_is_in_flight(bench: Bench) -> None:
    bench.announce(2, {**ORDERED, "prefetch": "2"})
    bench.publish_many(["a0", "a1", "a2"], key="a")
    bench.publish_many(["b0"], key="b")
    by_id = {d.id: d for d in bench.delivered()}
    bench.answer(by_id["a0"], "later", retry_ms="100")
    bench.settle()
    bench.core.reset_group("g")
    bench.run()
    bench.answer(by_id["b0"], "later")  # of the old position
    bench.run(100_000)
    assert bench.delivered() == []
    assert bench.core.lag(bench.core.groups["g"]) == 0
    bench.publish_many(["a3", "a4"], key="a")
    assert ids(bench.drain()) == ["a3", "a4"]


def test_a_deleted_group_is_new_again(bench: Bench) -> None:
    bench.announce(2, G)
    bench.publish_many(["m1"])
    bench.drain()
    with pytest.raises(ValueError, match="is connected"):
        bench.core.delete_group("g")
    bench.gone(2)
    bench.core.delete_group("g")
    bench.settle()
    bench.crash()
    assert bench.core.groups == {}
    bench.announce(2, G)
    assert ids(bench.drain()) == ["m1"]


# --- retention ------------------------------------------------------------------------------------


def test_a_group_stays_deleted_when_the_batch_before_fails(bench: Bench) -> None:
    bench.hello(1)
    said = {"fm.op": "announce", "fm.epoch": "1", "fm.group": "g", "fm.topic": "orders"}
    said |= {"fm.role": "subscribe", "fm.prefetch": "1", "fm.mode": "cluster", "fm.ordered": "0"}
    bench.frame(1, said)
    assert bench.core.seal() is not None
    bench.core.gone(1)
    bench.core.delete_group("g")
    bench.core.committed(StoreFullError("no room"))
    bench.run(2000)
    bench.crash()
    assert "g" not in bench.core.groups


def test_consumed_messages_go_when_they_are_old(make: Make) -> None:
    bench = make(keep_ms=10_000, queues=1)
    bench.announce(2, G)
    bench.publish_many(["m0", "m1"])
    held = bench.delivered()
    bench.answer(held[1])
    bench.run(11_000)
    bench.publish_many(["m2"])
    bench.core.trim(1000)
    bench.settle()
    assert bench.core.topics["orders"].queues[0].first == 0  # m0 is not consumed
    bench.answer(held[0])
    bench.drain()
    bench.core.trim(1000)
    bench.settle()
    assert bench.core.topics["orders"].queues[0].first == 2  # m2 is not old
    bench.crash()
    assert bench.core.topics["orders"].queues[0].row()[2:] == (2, 3)
    bench.announce(2, G)
    bench.core.reset_group("g", to_first=True)
    bench.run()
    assert ids(bench.drain()) == ["m2"]


def test_a_crowded_store_lets_go_of_what_is_consumed(make: Make) -> None:
    bench = make(keep_bytes=1 << 20, queues=1)
    bench.announce(2, G)
    bench.publish_many(["m0", "m1"])
    held = bench.delivered()
    bench.answer(held[0])
    bench.answer(held[1], "later", retry_ms="1000")
    bench.core.trim(2 << 20)
    bench.settle()
    assert bench.core.topics["orders"].queues[0].first == 1
    bench.run(1000)
    assert ids(bench.drain()) == ["m1"]
    bench.core.trim(2 << 20)
    bench.settle()
    assert bench.core.topics["orders"].queues[0].first == 2
    assert bench.publish("m0")["fm.result"] == "consumed"


# --- the end --------------------------------------------------------------------------------------


def test_stop_takes_nothing_new_and_says_goaway(bench: Bench) -> None:
    bench.announce(2, G)
    bench.publish_many(["m1"])
    (delivery,) = bench.delivered()
    bench.core.stop()
    assert bench.publish("m2")["fm.reason"] == "stopping"
    goaways = [to for to, push in bench.answers if push.headers.get("fm.op") == "goaway"]
    assert sorted(goaways) == [1, 2]
    assert bench.core.in_flight() == 1
    bench.answer(delivery)
    bench.settle()
    assert bench.core.is_idle()


# --- whatever happens -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_ledger_holds_whatever_happens(make: Make, seed: int) -> None:
    """sent = consumed + dead + waiting, over crashes, full disks and every kind of answer."""
    draw = random.Random(seed)
    bench = make(redeliver_ms=(50, 500), max_attempts=4, queues=2)
    acknowledged: set[str] = set()
    consumed: Counter[str] = Counter()
    unsure: set[str] = set()
    open_: list[Delivery] = []
    count = 0
    links = [{"group": "g", "prefetch": "8"}]
    undertaker = {"group": "undertaker", "topic": "%DLQ%g"}
    bench.announce(4, {**undertaker, "prefetch": "0"})
    bench.announce(2, *links)
    bench.announce(3, *links)
    for _ in range(1200):
        open_ += bench.delivered()
        what = draw.random()
        if what < 0.35:
            count += 1
            id = f"m{count}"
            if bench.publish(id, key=f"k{count % 3}")["fm.result"] == "consumed":
                acknowledged.add(id)
        elif what < 0.8 and open_:
            delivery = open_.pop(draw.randrange(len(open_)))
            kind = draw.random()
            if kind < 0.6:
                bench.answer(delivery)
                consumed[delivery.id] += 1
                unsure.add(delivery.id)
            elif kind < 0.8:
                bench.answer(delivery, draw.choice(("later", "no_consumer", "reject", "")))
            else:
                bench.fail(delivery, draw.choice((1, 8)))
        elif what < 0.9:
            bench.run(draw.randrange(200))
            if not bench.core._dirty:
                unsure.clear()
        elif what < 0.93:
            bench.run(full=True)
        elif what < 0.96:
            handle = draw.choice((2, 3))
            bench.gone(handle)
            open_ = [d for d in open_ if d.handle != handle]
            bench.announce(handle, *links)
        elif what < 0.98:
            bench.core.trim(draw.choice((0, 2 << 30)))
        else:
            bench.crash()
            open_.clear()
            for id in unsure:  # its answer may not have been written
                consumed[id] = 1
            unsure.clear()
            bench.announce(2, *links)
            bench.announce(3, *links)
    for _ in range(100):
        open_ += bench.delivered()
        for delivery in open_:
            bench.answer(delivery)
            consumed[delivery.id] += 1
        open_.clear()
        bench.run(1000)
    bench.announce(4, {**undertaker, "prefetch": "100"})
    letters = [letter.id for letter in bench.drain()]
    assert bench.core.lag(bench.core.groups["g"]) == 0
    assert set(consumed) | set(letters) >= acknowledged
    assert len(letters) == len(set(letters))
