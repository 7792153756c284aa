"""Consuming: what a handler gets, what it answers, how many run at once and in which order."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading

import pytest

from fastmesh._ext import push
from fastmesh._ext.push import Push
from fastmesh.client import Fate, Group, Message, Result, consumed, later, reject
from tests.client.mesh import FakeMesh, client_of, until

BILLING = Group("billing", "orders", prefetch=3)
LEDGER = Group("ledger", "orders", prefetch=8, ordered=True)
PAYING = Group("paying", "orders", role="publish")


async def test_what_a_handler_gets() -> None:
    got: list[Message] = []

    async def handler(message: Message) -> None:
        got.append(message)

    async with FakeMesh() as mesh, client_of(mesh, BILLING) as client:
        client.subscribe("billing", handler)
        peer = await mesh.peer("billing")
        answer = await peer.send(
            {
                "fm.op": "deliver",
                "fm.topic": "orders",
                "fm.group": "billing",
                "fm.id": "m1",
                "fm.key": "k1",
                "fm.colour": "blue",
                "fm.lane": "canary",
                "fm.version": "2",
                "fm.born_ms": "1700000000000",
                "fm.attempt": "3",
                "fm.trace": "t",
                "fm.hop": "1",
                "fm.origin": "node-2",
                "fm.unheard_of": "carried, ignored",
                "h.region": "größe",
            },
            b"\x00raw",
        )
        assert (answer.status, answer.headers) == (0, {"fm.result": "consumed"})
        assert got == [
            Message(
                topic="orders",
                group="billing",
                id="m1",
                content=b"\x00raw",
                key="k1",
                colour="blue",
                lane="canary",
                version="2",
                born_ms=1_700_000_000_000,
                attempt=3,
                headers={"region": "größe"},
                trace="t",
                origin="node-2",
            )
        ]
        await peer.deliver("billing", "m2", born_ms="soon", attempt="-1")
        assert (got[1].born_ms, got[1].attempt, got[1].headers) == (None, 1, {})


@pytest.mark.parametrize(
    ("found", "headers"),
    [
        (None, {"fm.result": "consumed"}),
        (consumed(), {"fm.result": "consumed"}),
        (later(), {"fm.result": "later", "fm.retry_ms": "0"}),
        (later(250, "stock"), {"fm.result": "later", "fm.retry_ms": "250", "fm.reason": "stock"}),
        (reject("no such item"), {"fm.result": "reject", "fm.reason": "no such item"}),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
async def test_what_a_handler_returns(
    found: Result | None, headers: dict[str, str], plain: bool
) -> None:
    def plainly(message: Message) -> Result | None:
        return found

    async def asynchronously(message: Message) -> Result | None:
        return found

    async with FakeMesh() as mesh, client_of(mesh, BILLING) as client:
        client.subscribe("billing", plainly if plain else asynchronously)
        answer = await (await mesh.peer("billing")).deliver("billing")
        assert answer.headers == headers


@pytest.mark.parametrize("plain", [False, True])
async def test_a_handler_that_fails_means_later(
    plain: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def plainly(message: Message) -> None:
        raise ValueError("the password is 1234")

    async def asynchronously(message: Message) -> None:
        plainly(message)

    async with FakeMesh() as mesh, client_of(mesh, BILLING) as client:
        client.subscribe("billing", plainly if plain else asynchronously)
        peer = await mesh.peer("billing")
        answer = await peer.deliver("billing", "m9")
        assert answer.headers == {
            "fm.result": "later",
            "fm.retry_ms": "0",
            "fm.reason": "handler error: ValueError",
        }
        assert (client.stats.handler_errors, client.stats.later) == (1, 1)
        (record,) = [r for r in caplog.records if r.exc_info]
        assert "billing" in record.message
        assert "m9" in record.message


async def test_nonsense_from_a_handler_is_an_error_and_no_success() -> None:
    async def handler(message: Message) -> bool:
        return False

    async with FakeMesh() as mesh, client_of(mesh, BILLING) as client:
        client.subscribe("billing", handler)  # type: ignore[arg-type]
        answer = await (await mesh.peer("billing")).deliver("billing")
        assert answer.headers["fm.result"] == "later"
        assert answer.headers["fm.reason"] == "handler error: TypeError"


async def test_a_handler_that_is_cancelled_from_within_means_later() -> None:
    async def handler(message: Message) -> None:
        raise asyncio.CancelledError

    async with FakeMesh() as mesh, client_of(mesh, BILLING) as client:
        client.subscribe("billing", handler)
        answer = await (await mesh.peer("billing")).deliver("billing")
        assert answer.headers["fm.result"] == "later"


async def test_plain_handlers_leave_the_loop_free() -> None:
    gate = threading.Event()
    where: list[str] = []
    context = contextvars.ContextVar("context", default="none")

    def handler(message: Message) -> None:
        where.append(threading.current_thread().name)
        assert context.get() == "none"
        assert gate.wait(5.0)

    async with FakeMesh() as mesh, client_of(mesh, BILLING) as client:
        client.subscribe("billing", handler)
        peer = await mesh.peer("billing")
        answers = [peer.deliver("billing", f"m{i}") for i in range(3)]
        await until(lambda: len(where) == 3)
        await client.publish("orders", b"meanwhile")
        assert all(name.startswith("fastmesh-billing") for name in where)
        assert len(set(where)) == 3
        gate.set()
        await asyncio.gather(*answers)


async def test_objects_and_partials_are_handlers() -> None:
    seen: list[str] = []

    class Consumer:
        async def __call__(self, message: Message) -> None:
            seen.append("object")

    async def handler(tag: str, message: Message) -> None:
        seen.append(tag)

    groups = [Group("a", "orders"), Group("b", "orders"), Group("c", "orders")]
    async with FakeMesh() as mesh, client_of(mesh, *groups) as client:
        client.subscribe("a", Consumer())
        client.subscribe("b", functools.partial(handler, "partial"))
        client.subscribe("c", lambda message: handler("lambda", message))
        peer = await mesh.peer("a", "b", "c")
        for group in ("a", "b", "c"):
            assert (await peer.deliver(group)).headers["fm.result"] == "consumed"
        assert seen == ["object", "partial", "lambda"]


# --- how many -------------------------------------------------------------------------------------


async def test_no_more_than_the_prefetch_at_once() -> None:
    gate = asyncio.Event()
    running: set[str] = set()
    most = 0

    async def handler(message: Message) -> None:
        nonlocal most
        running.add(message.id)
        most = max(most, len(running))
        await gate.wait()
        running.discard(message.id)

    async with FakeMesh() as mesh, client_of(mesh, BILLING) as client:
        client.subscribe("billing", handler)
        peer = await mesh.peer("billing")
        assert peer.groups == {"billing": 3}
        # A mesh that pays no heed to it: what is too much waits, what is far too much is refused.
        answers = [peer.deliver("billing", f"m{i}") for i in range(10)]
        await until(lambda: sum(a.done() for a in answers) == 4)
        refused = [a.result().headers for a in answers if a.done()]
        assert {h["fm.result"] for h in refused} == {"later"}
        assert {h["fm.reason"] for h in refused} == {"overload"}, "counts as no attempt"
        assert all(int(h["fm.retry_ms"]) > 0 for h in refused)
        assert running == {"m0", "m1", "m2"}
        gate.set()
        results = [(await a).headers["fm.result"] for a in answers]
        assert results == ["consumed"] * 6 + ["later"] * 4
        assert most == 3
        assert client.stats.deliveries_refused == 4


async def test_prefetch_is_shared_out_over_connections() -> None:
    groups = (Group("a", "orders", prefetch=5), Group("b", "orders", prefetch=1))

    async def handler(message: Message) -> None:
        pass

    async with FakeMesh() as mesh, client_of(mesh, *groups, connections=2) as client:
        client.subscribe("a", handler)
        client.subscribe("b", handler)
        await until(lambda: sorted(len(p.groups) for p in mesh.live) == [1, 2])
        assert sorted((p.groups for p in mesh.live), key=len) == [{"a": 2}, {"a": 3, "b": 1}]


async def test_a_stuck_group_holds_up_no_other() -> None:
    gate = asyncio.Event()

    async def stuck(message: Message) -> None:
        await gate.wait()

    async def quick(message: Message) -> None:
        pass

    async with FakeMesh() as mesh, client_of(mesh, BILLING, Group("mail", "orders")) as client:
        client.subscribe("billing", stuck)
        client.subscribe("mail", quick)
        peer = await mesh.peer("billing", "mail")
        held = [peer.deliver("billing", f"b{i}") for i in range(6)]
        for i in range(50):
            assert (await peer.deliver("mail", f"m{i}")).headers["fm.result"] == "consumed"
        assert not any(answer.done() for answer in held)
        gate.set()
        await asyncio.gather(*held)


# --- in which order -------------------------------------------------------------------------------


async def test_order_by_key() -> None:
    gates: dict[str, asyncio.Event] = {}
    begun: list[str] = []

    async def handler(message: Message) -> None:
        begun.append(message.id)
        gate = gates.setdefault(message.id, asyncio.Event())
        await gate.wait()

    async with FakeMesh() as mesh, client_of(mesh, LEDGER) as client:
        client.subscribe("ledger", handler)
        peer = await mesh.peer("ledger")
        answers = {
            id: peer.deliver("ledger", id, key=id[0]) for id in ("a1", "a2", "b1", "a3", "b2", "c1")
        }
        keyless = [peer.deliver("ledger", id) for id in ("x1", "x2")]
        await until(lambda: len(begun) == 5)
        assert sorted(begun) == ["a1", "b1", "c1", "x1", "x2"], "one per key; keyless are free"
        for id in ("a1", "b1", "a2", "c1", "b2", "a3", "x1", "x2"):
            await until(lambda: id in gates)  # noqa: B023 - waited for in this round
            gates[id].set()
        await asyncio.gather(*answers.values(), *keyless)
        assert [id for id in begun if id[0] == "a"] == ["a1", "a2", "a3"]
        assert [id for id in begun if id[0] == "b"] == ["b1", "b2"]


async def test_a_failure_of_a_key_does_not_block_it() -> None:
    seen: list[str] = []

    async def handler(message: Message) -> None:
        seen.append(message.id)
        if message.id == "a1":
            raise RuntimeError

    async with FakeMesh() as mesh, client_of(mesh, LEDGER) as client:
        client.subscribe("ledger", handler)
        peer = await mesh.peer("ledger")
        answers = [peer.deliver("ledger", id, key="a") for id in ("a1", "a2")]
        results = [(await answer).headers["fm.result"] for answer in answers]
        assert results == ["later", "consumed"]
        assert seen == ["a1", "a2"]


async def test_a_key_waits_for_its_handler_also_across_a_reconnect() -> None:
    gate = asyncio.Event()
    running: set[str] = set()
    begun: list[int] = []

    async def handler(message: Message) -> None:
        assert message.key not in running, "two of one key at once"
        assert message.key is not None
        running.add(message.key)
        begun.append(message.attempt)
        await gate.wait()
        running.discard(message.key)

    async with FakeMesh() as mesh, client_of(mesh, LEDGER) as client:
        client.subscribe("ledger", handler)
        peer = await mesh.peer("ledger")
        lost = [peer.deliver("ledger", id, key="a") for id in ("a1", "a2")]
        await until(lambda: begun == [1])
        peer.drop()
        await until(lambda: not peer.open)
        again = (await mesh.peer("ledger")).deliver("ledger", "a1", key="a", attempt="2")
        await client.publish("orders", b"in order with the delivery, so that it has come")
        await until(lambda: client._consumers["ledger"]._waiting == 1)
        assert begun == [1], "a2 of the lost connection is dropped, the redelivery waits"
        gate.set()
        assert (await again).headers["fm.result"] == "consumed"
        assert begun == [1, 2]
        assert client.stats.answers_lost == 1
        for answer in lost:
            with pytest.raises(ConnectionError):
                await answer


# --- which groups ---------------------------------------------------------------------------------


async def test_a_group_without_a_handler_is_refused_at_once() -> None:
    async with FakeMesh() as mesh, client_of(mesh, BILLING):
        await until(lambda: mesh.live)
        answer = await mesh.live[0].deliver("billing")
        assert answer.headers == {"fm.result": "no_consumer"}


async def test_subscribe_before_the_start_and_unsubscribe() -> None:
    gate = asyncio.Event()

    async def handler(message: Message) -> None:
        await gate.wait()

    async with FakeMesh() as mesh:
        client = client_of(mesh, BILLING, LEDGER)
        client.subscribe("billing", handler)
        client.subscribe(LEDGER, handler)
        async with client:
            assert mesh.live[0].groups == {"billing": 3, "ledger": 8}, "in force after the start"
            assert mesh.live[0].ops() == ["hello", "subscribe"]
            held = mesh.live[0].deliver("billing")
            await until(lambda: client._consumers["billing"].running)
            leaving = asyncio.create_task(client.unsubscribe("billing"))
            await mesh.peer("ledger")
            assert not leaving.done(), "waits for its handler"
            assert (await mesh.live[0].deliver("billing")).headers["fm.result"] == "no_consumer"
            gate.set()
            await leaving
            assert (await held).headers["fm.result"] == "consumed"
            await client.unsubscribe("ledger")
            await mesh.peer()
            client.subscribe("billing", handler)
            await mesh.peer("billing")


async def test_wrong_groups_are_said() -> None:
    async def handler(message: Message) -> None:
        pass

    async with FakeMesh() as mesh:
        client = client_of(mesh, BILLING, PAYING)
        with pytest.raises(
            ValueError, match="'nope' is not one of this client's subscribe groups: billing"
        ):
            client.subscribe("nope", handler)
        with pytest.raises(ValueError, match="subscribe groups: billing"):
            client.subscribe("paying", handler)
        with pytest.raises(ValueError, match="publish groups: paying"):
            client.check("billing", lambda message: Fate.UNKNOWN)
        client.subscribe("billing", handler)
        with pytest.raises(ValueError, match="has a handler"):
            client.subscribe("billing", handler)
        with pytest.raises(ValueError, match="has no handler"):
            await client_of(mesh, BILLING).unsubscribe("billing")
        async with client:
            pass


async def test_what_waits_is_dropped_with_its_connection() -> None:
    gate = asyncio.Event()
    begun: list[str] = []

    async def handler(message: Message) -> None:
        begun.append(message.id)
        await gate.wait()

    one_by_one = Group("one", "orders", prefetch=2, ordered=True)
    async with FakeMesh() as mesh, client_of(mesh, one_by_one) as client:
        client.subscribe("one", handler)
        peer = await mesh.peer("one")
        # x and a1 run, a2 waits behind a1, b1 for a place.
        lost = [peer.deliver("one", id, key=id[0], attempt="1") for id in ("x1", "a1", "a2", "b1")]
        worker = client._consumers["one"]
        await until(lambda: worker._waiting == 2)
        peer.drop()
        await until(lambda: not peer.open)
        again = await mesh.peer("one")
        assert worker._waiting == 0
        answers = [again.deliver("one", id, key=id[0], attempt="2") for id in ("b1", "a2")]
        await until(lambda: worker._waiting == 2)
        gate.set()
        assert [(await a).headers["fm.result"] for a in answers] == ["consumed", "consumed"]
        assert begun[:2] == ["x1", "a1"]
        assert sorted(begun[2:]) == ["a2", "b1"]
        assert all(isinstance(answer.exception(), ConnectionError) for answer in lost)


async def test_ready_and_behind_it_are_dropped_together() -> None:
    gate = asyncio.Event()
    begun: list[str] = []

    async def handler(message: Message) -> None:
        begun.append(message.id)
        await gate.wait()

    one = Group("one", "orders", prefetch=2, ordered=True)
    async with FakeMesh() as mesh, client_of(mesh, one, connections=2) as client:
        client.subscribe("one", handler)
        await until(lambda: all(peer.groups == {"one": 1} for peer in mesh.live))
        first, second = mesh.live
        kept = [first.deliver("one", id, key=id[0]) for id in ("x1", "y1")]
        await until(lambda: len(begun) == 2)
        second.deliver("one", "a1", key="a")
        second.deliver("one", "a2", key="a")
        await until(lambda: client._consumers["one"]._waiting == 2)
        second.drop()
        await until(lambda: client._consumers["one"]._waiting == 0)
        gate.set()
        await asyncio.gather(*kept)
        assert begun == ["x1", "y1"]


async def test_a_request_of_another_class_is_refused() -> None:
    async def handler(message: Message) -> None:
        pytest.fail("this is no delivery")

    async with FakeMesh() as mesh, client_of(mesh, BILLING) as client:
        client.subscribe("billing", handler)
        peer = await mesh.peer("billing")
        frame = push.request(7, {"fm.op": "deliver", "fm.group": "billing"})
        answer = peer.expect(7)
        peer.writer.write(frame.replace(push.CLASS, b"fastmesh.posh.v1"))
        assert (await answer).headers["fm.result"] == "reject"


async def test_unknown_requests_are_refused_and_one_way_ones_ignored() -> None:
    async with FakeMesh() as mesh, client_of(mesh, BILLING) as client:
        peer = mesh.live[0]
        answer: Push = await peer.send({"fm.op": "dance"})
        assert answer.headers["fm.result"] == "reject"
        assert "dance" in answer.headers["fm.reason"]
        assert client.stats.consumed == 0


# --- checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("fate", list(Fate))
async def test_checks_are_answered_by_the_callback(fate: Fate, plain: bool) -> None:
    asked: list[Message] = []

    def plainly(message: Message) -> Fate:
        asked.append(message)
        return fate

    async def asynchronously(message: Message) -> Fate:
        return plainly(message)

    async with FakeMesh() as mesh, client_of(mesh, PAYING) as client:
        client.check("paying", plainly if plain else asynchronously)
        peer = await mesh.peer("paying")
        answer = await peer.check("paying", "of-another-process", b"prepared")
        assert answer.headers == {"fm.result": fate.value}
        assert (asked[0].id, asked[0].content) == ("of-another-process", b"prepared")
        assert client.stats.checks == 1


async def test_a_check_that_fails_is_unknown() -> None:
    def callback(message: Message) -> Fate:
        raise OSError("database is away")

    async with FakeMesh() as mesh, client_of(mesh, PAYING) as client:
        client.check("paying", callback)
        answer = await (await mesh.peer("paying")).check("paying", "m1")
        assert answer.headers == {"fm.result": "unknown", "fm.reason": "handler error: OSError"}


async def test_no_callback_no_check() -> None:
    async with FakeMesh() as mesh, client_of(mesh, PAYING):
        answer = await mesh.live[0].check("paying", "m1")
        assert answer.headers == {"fm.result": "no_consumer"}
