"""What brokers are told: hello, the full subscription, again after changes, folded, until taken."""

from __future__ import annotations

import pytest

from fastmesh import limits
from tests.mesh.bench import Bench, group


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    made.register(
        "c1",
        group("g1", filter="colour=blue|green&region=eu", ordered=True),
        group("g2", topic="stock", mode="broadcast"),
        group("p1", "publish"),
    )
    made.compile()
    return made


def announces(bench: Bench, handle: int) -> list[dict[str, str]]:
    return [frame.headers for frame, _ in bench.calls(handle, "announce")]


def take(bench: Bench, handle: int, **fields: str) -> None:
    """The broker answers the last announce."""
    bench.answer(bench.calls(handle, "announce")[-1][1], **fields)


def test_hello_comes_first_and_the_announce_when_it_is_taken(bench: Bench) -> None:
    handle = bench.dialled("b1")
    ((hello, ticket),) = bench.calls(handle)
    assert hello.headers == {
        "fm.op": "hello",
        "fm.protocol": "1",
        "fm.app": "shop",
        "fm.client": "n1",
    }
    assert hello.timeout_ms == limits.CONTROL_TIMEOUT_MS
    bench.answer(ticket)
    (first,) = announces(bench, handle)
    assert first["fm.group"] == "", "it is told, too, that nobody is here"
    take(bench, handle)
    assert bench.control.status()["brokers"][0]["announced"]


def test_an_announce_says_all_that_a_broker_needs(bench: Bench) -> None:
    handle = bench.met("b1")
    take(bench, handle)
    for name, connections, credit in (("g1", 2, 64), ("g2", 1, 32), ("p1", 1, 5)):
        bench.live(name, connections, credit)
        bench.wait(limits.ANNOUNCE_GAP_MS)
        take(bench, handle)
    last = announces(bench, handle)[-1]
    assert last == {
        "fm.op": "announce",
        "fm.epoch": last["fm.epoch"],
        "fm.part": "1",
        "fm.parts": "1",
        "fm.group": "g1,g2,p1",
        "fm.topic": "orders,stock,orders",
        "fm.role": "subscribe,subscribe,publish",
        "fm.prefetch": "64,32,5",
        "fm.mode": "cluster,broadcast,cluster",
        "fm.ordered": "1,0,0",
        "fm.filter.g1": "colour=blue|green&region=eu",
    }
    epochs = [int(said["fm.epoch"]) for said in announces(bench, handle)]
    assert epochs == sorted(set(epochs))
    bench.live("g1", 0, 0)
    bench.wait(limits.ANNOUNCE_GAP_MS)
    assert announces(bench, handle)[-1]["fm.group"] == "g2,p1"


def test_changes_are_folded_into_one_more(bench: Bench) -> None:
    handle = bench.met("b1")
    for credit in range(1, 500):
        bench.live("g1", 1, credit)
    assert len(announces(bench, handle)) == 1, "one is under way"
    take(bench, handle)
    bench.wait(limits.ANNOUNCE_GAP_MS)
    assert len(announces(bench, handle)) == 2
    assert announces(bench, handle)[-1]["fm.prefetch"] == "499"
    take(bench, handle)
    bench.wait(60_000)
    assert len(announces(bench, handle)) == 2


def test_what_brokers_are_not_told_is_no_news(bench: Bench) -> None:
    handle = bench.met("b1")
    take(bench, handle)
    bench.register("c9", group("nobody-there"))
    bench.live("g1", 1, 8)
    bench.live("g1", 0, 0)
    bench.wait(1000)
    assert len(announces(bench, handle)) == 1
    assert bench.control.status()["brokers"][0]["announced"]


def test_each_broker_is_told_on_its_own(bench: Bench) -> None:
    one, two = bench.met("b1"), bench.met("b2")
    bench.live("g1", 1, 8)
    take(bench, one)
    bench.wait(limits.ANNOUNCE_GAP_MS)
    assert announces(bench, one)[-1]["fm.group"] == "g1"
    assert len(announces(bench, two)) == 1, "it has not answered the first one yet"


def test_a_new_connection_is_told_everything(bench: Bench) -> None:
    bench.live("g1", 1, 8)
    handle = bench.met("b1")
    take(bench, handle)
    bench.event("gone", handle, bench.endpoint("b1"), 1)
    again = bench.met("b1")
    assert [said["fm.group"] for said in announces(bench, again)] == ["g1"]


@pytest.mark.parametrize("how", ["reject", "later", "timeout", "strange"])
def test_what_is_not_taken_is_told_again_and_shown(bench: Bench, how: str) -> None:
    handle = bench.met("b1")
    ticket = bench.calls(handle, "announce")[-1][1]
    wait_ms = limits.CONTROL_RETRY_MS
    if how == "reject":
        bench.answer(ticket, result="reject", reason="too many groups")
    elif how == "later":
        bench.answer(ticket, result="later", retry_ms="250")
        wait_ms = 250
    elif how == "timeout":
        bench.event("answer", ticket, 8)
    else:
        bench.answer(ticket, nothing="")
    status = bench.control.status()["brokers"][0]
    assert not status["announced"]
    assert {"reject": "too many groups", "timeout": "no answer in time"}.get(how, "") in (
        status["failure"]
    )
    assert "broker does not take what it is told" in bench.log.text()
    bench.wait(wait_ms - 1)
    assert len(announces(bench, handle)) == 1
    bench.wait(1)
    assert len(announces(bench, handle)) == 2
    first, second = announces(bench, handle)
    assert int(second["fm.epoch"]) > int(first["fm.epoch"])
    take(bench, handle)
    status = bench.control.status()["brokers"][0]
    assert (status["announced"], status["failure"]) == (True, "")


def test_retries_come_more_and_more_seldom(bench: Bench) -> None:
    handle = bench.met("b1")
    began = bench.now_ms
    while bench.now_ms - began < 300_000:
        bench.event("answer", bench.calls(handle, "announce")[-1][1], 8)
        bench.wait(limits.CONTROL_RETRY_MS_MAX)
    assert 10 <= len(announces(bench, handle)) <= 15


def test_a_hello_that_is_refused_is_said_again(bench: Bench) -> None:
    handle = bench.dialled("b1")
    bench.answer(bench.calls(handle)[0][1], result="reject", protocol="7", reason="speak 7")
    assert bench.control.status()["brokers"][0]["state"] == "refused"
    assert not announces(bench, handle)
    bench.wait(limits.CONTROL_RETRY_MS)
    assert len(bench.calls(handle, "hello")) == 2
    bench.answer(bench.calls(handle, "hello")[-1][1])
    assert bench.control.status()["brokers"][0]["state"] == "ready"
    assert len(announces(bench, handle)) == 1


def test_a_subscription_that_does_not_fit_one_frame_goes_in_parts() -> None:
    bench = Bench()
    names = [f"group-{n:04}-" + "x" * 100 for n in range(1000)]
    for at in range(0, 1000, 200):
        bench.register(
            f"c{at}", *(group(n, filter="colour=" + "b" * 90) for n in names[at : at + 200])
        )
    bench.compile()
    for name in names:
        bench.live(name, 1, 32)
    handle = bench.met("b1")
    parts = announces(bench, handle)
    assert len(parts) > 1
    assert [p["fm.part"] for p in parts] == [str(n) for n in range(1, len(parts) + 1)]
    assert {p["fm.parts"] for p in parts} == {str(len(parts))}
    assert len({p["fm.epoch"] for p in parts}) == 1
    assert [n for p in parts for n in p["fm.group"].split(",")] == names
    for p in parts:
        mine = p["fm.group"].split(",")
        assert len(p["fm.topic"].split(",")) == len(p["fm.prefetch"].split(",")) == len(mine)
        assert {k for k in p if k.startswith("fm.filter.")} == {f"fm.filter.{n}" for n in mine}
        size = sum(8 + len(k) + len(v) for k, v in p.items())
        assert size <= limits.HEADER_SECTION_BYTES_MAX
    # One part that is not taken is an announce that is not taken.
    tickets = [ticket for _, ticket in bench.calls(handle, "announce")]
    bench.answer(tickets[0], result="reject", reason="no")
    for ticket in tickets[1:]:
        bench.answer(ticket)
    assert not bench.control.status()["brokers"][0]["announced"]
    bench.wait(limits.CONTROL_RETRY_MS)
    assert len(announces(bench, handle)) == 2 * len(parts)


def test_a_group_with_both_roles_stands_twice(bench: Bench) -> None:
    bench.register("c2", group("both"), group("both", "publish"))
    bench.compile()
    bench.live("both", 1, 9)
    handle = bench.met("b1")
    (said,) = announces(bench, handle)
    assert (said["fm.group"], said["fm.role"]) == ("both,both", "subscribe,publish")


@pytest.mark.parametrize("op", ["goaway", "suspend"])
def test_a_broker_that_wants_no_requests_gets_none(bench: Bench, op: str) -> None:
    handle = bench.met("b1")
    before = bench.recompiles
    bench.frame(handle, {"fm.op": op})
    assert bench.engine.said("send")[-1][2].headers == {"fm.result": "consumed"}
    assert bench.recompiles == before + 1
    snapshot = bench.compile()
    weights = {bench.name(n): e["weight"] for n, e in snapshot.endpoints.items()}
    assert weights == {"b1": 0, "b2": 100, "n2": 100}
    if op == "suspend":
        bench.frame(handle, {"fm.op": "resume"})
    else:
        bench.event("gone", handle, bench.endpoint("b1"), 1)
    assert bench.recompiles == before + 2
    assert bench.compile().endpoints[bench.endpoint("b1")]["weight"] == 100


def test_what_a_broker_asks_besides_is_refused(bench: Bench) -> None:
    handle = bench.met("b1")
    bench.frame(handle, {"fm.op": "publish"})
    verdict = bench.engine.said("send")[-1][2].headers
    assert verdict["fm.result"] == "reject"
    sent = len(bench.engine.said("send"))
    bench.frame(handle, {"fm.op": "publish"}, oneway=True)
    assert len(bench.engine.said("send")) == sent


# --- suspend and resume ---------------------------------------------------------------------------


def test_suspend_is_asked_of_every_broker_and_nothing_is_announced_any_more(bench: Bench) -> None:
    one, two = bench.met("b1"), bench.dialled("b2")
    take(bench, one)
    announcer = bench.control.announcer
    bench.control.suspend()
    bench.settle()
    ((suspend, ticket),) = bench.calls(one, "suspend")
    assert suspend.headers == {"fm.op": "suspend"}
    assert announcer.suspending() == ["b1"]
    assert announcer.pushing() == {"b1": "no answer yet"}
    bench.answer(ticket)
    assert not announcer.suspending()
    assert not announcer.pushing()
    assert bench.control.status()["brokers"][0]["suspended"]
    bench.live("g1", 1, 1)
    bench.wait(1000)
    assert len(announces(bench, one)) == 1
    # One that was only just met is suspended as well.
    bench.answer(bench.calls(two, "hello")[0][1])
    assert len(bench.calls(two, "suspend")) == 1
    assert not announces(bench, two)
    assert announcer.suspending() == ["b2"]
    bench.event("gone", two, bench.endpoint("b2"), 1)
    assert not announcer.suspending()


@pytest.mark.parametrize("how", ["reject", "silent", "later"])
def test_a_broker_that_does_not_take_suspend_is_asked_again(bench: Bench, how: str) -> None:
    one = bench.met("b1")
    take(bench, one)
    announcer = bench.control.announcer
    bench.control.suspend()
    bench.settle()
    ((_, ticket),) = bench.calls(one, "suspend")
    if how == "silent":
        bench.event("answer", ticket, 8)
    elif how == "later":
        bench.answer(ticket, result="later", retry_ms="40")
    else:
        bench.answer(ticket, result="reject", reason="never heard of it")
    # "later" is no answer: it is waited for. The others have said all that they will.
    assert announcer.suspending() == (["b1"] if how == "later" else [])
    why = {"reject": "never heard", "silent": "no answer in time", "later": "no answer yet"}
    assert why[how] in announcer.pushing()["b1"]
    bench.wait(40 if how == "later" else limits.CONTROL_RETRY_MS)
    assert len(bench.calls(one, "suspend")) == 2
    bench.answer(bench.calls(one, "suspend")[1][1])
    assert not announcer.pushing()
    bench.wait(60_000)
    assert len(bench.calls(one, "suspend")) == 2


def test_resume_comes_after_the_suspend_whatever_became_of_it(bench: Bench) -> None:
    one, two = bench.met("b1"), bench.met("b2")
    for handle in (one, two):
        take(bench, handle)
    bench.control.suspend()
    bench.settle()
    bench.answer(bench.calls(one, "suspend")[0][1])
    bench.control.resume(bench.now_ms)
    bench.settle()
    assert len(bench.calls(one, "resume")) == 1
    # The other has not answered: what is asked next waits for that answer.
    assert not bench.calls(two, "resume")
    bench.answer(bench.calls(two, "suspend")[0][1], result="reject")
    assert len(bench.calls(two, "resume")) == 1
    bench.answer(bench.calls(one, "resume")[0][1])
    bench.event("answer", bench.calls(two, "resume")[0][1], 8)
    assert not bench.control.announcer.pushing()
    bench.wait(limits.CONTROL_RETRY_MS)
    assert len(bench.calls(one, "resume")) == 1
    assert len(bench.calls(two, "resume")) == 2, "nobody knows what it took: it is asked again"


def test_what_changed_meanwhile_is_announced_once_pushes_may_come_again(bench: Bench) -> None:
    one, two = bench.met("b1"), bench.dialled("b2")
    take(bench, one)
    bench.control.suspend()
    bench.settle()
    bench.answer(bench.calls(one, "suspend")[0][1])
    bench.answer(bench.calls(two, "hello")[0][1])
    bench.answer(bench.calls(two, "suspend")[0][1])
    bench.live("p1", 1, 0)
    bench.wait(1000)
    assert len(announces(bench, one)) == 1
    bench.control.resume(bench.now_ms)
    bench.settle()
    assert len(announces(bench, one)) == 1, "a moment later: clients join their groups again"
    bench.wait(limits.ANNOUNCE_GAP_MS)
    assert announces(bench, one)[-1]["fm.group"] == "p1"
    assert announces(bench, two)[-1]["fm.group"] == "p1"
