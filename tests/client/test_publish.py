"""Publishing: what is taken, retried, ambiguous, refused; and what the wire shows of it."""

from __future__ import annotations

import asyncio

import pytest

from fastmesh import limits
from fastmesh._ext.push import Push
from fastmesh.client import AmbiguousError, ClosedError, NotTakenError, RejectedError
from tests.client.mesh import CONSUMED, Drop, FakeMesh, Peer, answers, client_of, until


async def test_receipt_and_headers() -> None:
    async with FakeMesh() as mesh, client_of(mesh) as client:
        receipt = await client.publish(
            "orders",
            b"\x00\xffraw",
            key="k",
            colour="blue",
            lane="canary",
            version="2",
            trace="t-1",
            headers={"region": "eu", "Ünicode": "größe"},
            delay_ms=1500,
        )
        (frame,) = [f for f in mesh.live[0].seen if f.headers["fm.op"] == "publish"]
        assert receipt == (frame.headers["fm.id"], "b1")
        assert frame.content == b"\x00\xffraw"
        born = int(frame.headers["fm.born_ms"])
        assert born > 1_600_000_000_000, "ms since 1970"
        assert frame.headers == {
            "fm.op": "publish",
            "fm.topic": "orders",
            "fm.id": receipt.id,
            "fm.born_ms": str(born),
            "fm.key": "k",
            "fm.colour": "blue",
            "fm.lane": "canary",
            "fm.version": "2",
            "fm.trace": "t-1",
            "fm.delay_ms": "1500",
            "h.region": "eu",
            "h.Ünicode": "größe",
        }
        assert 0 < frame.timeout_ms <= limits.CLIENT_PUBLISH_TIMEOUT_MS
        assert client.stats.published == 1


async def test_ids_are_unique_also_among_clients() -> None:
    async with FakeMesh() as mesh, client_of(mesh) as one, client_of(mesh, client="c2") as two:
        receipts = await asyncio.gather(
            *(client.publish("orders", b"") for client in (one, two) for _ in range(100))
        )
        assert len({receipt.id for receipt in receipts}) == 200
        assert (await one.publish("orders", b"", id="mine")).id == "mine"


async def test_later_is_tried_again_with_the_same_id() -> None:
    tries: list[str] = []

    async def busy(peer: Peer, frame: Push) -> dict[str, str]:
        tries.append(frame.headers["fm.id"])
        if len(tries) < 3:
            return {"fm.result": "later", "fm.retry_ms": "15", "fm.reason": "full"}
        return {**CONSUMED, "fm.broker": "b2"}

    async with FakeMesh() as mesh, client_of(mesh) as client:
        mesh.on["publish"] = busy
        assert (await client.publish("orders", b"x")).broker == "b2"
        assert len(tries) == 3
        assert len(set(tries)) == 1
        assert client.stats.publish_retries == 2


async def test_later_to_the_end_says_that_nothing_happened() -> None:
    async with FakeMesh() as mesh, client_of(mesh) as client:
        mesh.on["publish"] = answers(result="later", retry_ms="20", reason="no broker")
        with pytest.raises(NotTakenError, match="no broker"):
            await client.publish("orders", b"x", timeout_ms=100)


async def test_later_beyond_the_deadline_is_told_at_once() -> None:
    async with FakeMesh() as mesh, client_of(mesh) as client:
        mesh.on["publish"] = answers(result="later", retry_ms="60000")
        with pytest.raises(NotTakenError, match="in time"):
            await client.publish("orders", b"x", timeout_ms=10_000)
        assert mesh.live[0].ops().count("publish") == 1


async def test_reject() -> None:
    async with FakeMesh() as mesh, client_of(mesh) as client:
        mesh.on["publish"] = answers(result="reject", reason="no topic")
        with pytest.raises(RejectedError, match="no topic") as caught:
            await client.publish("nowhere", b"x")
        assert caught.value.reason == "no topic"
        assert client.stats.publish_rejected == 1


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"status": "7"}, "timed out"),
        ({"status": "16"}, "connection to the broker"),
        ({"status": "3"}, "status 3"),
        ({"fm.result": "commit"}, "'commit'"),
    ],
)
async def test_answers_that_leave_it_open(answer: dict[str, str], told: str) -> None:
    async def script(peer: Peer, frame: Push) -> dict[str, str]:
        return dict(answer)

    async with FakeMesh() as mesh, client_of(mesh) as client:
        mesh.on["publish"] = script
        with pytest.raises(AmbiguousError, match=told) as caught:
            await client.publish("orders", b"x", id="m7")
        assert caught.value.message_id == "m7"
        assert mesh.live[0].ops().count("publish") == 1, "not sent twice"
        assert client.stats.publish_ambiguous == 1


async def test_ambiguous_is_retried_when_idempotent() -> None:
    tries: list[dict[str, str]] = []

    async def script(peer: Peer, frame: Push) -> dict[str, str]:
        tries.append(frame.headers)
        return {"status": "16"} if len(tries) == 1 else {**CONSUMED, "fm.broker": "b1"}

    async with FakeMesh() as mesh, client_of(mesh) as client:
        mesh.on["publish"] = script
        await client.publish("orders", b"x", idempotent=True)
        assert len(tries) == 2
        assert tries[0] == tries[1]
        assert tries[0]["fm.idempotent"] == "1"


async def test_refused_after_an_attempt_that_may_have_happened_stays_ambiguous() -> None:
    tries = 0

    async def script(peer: Peer, frame: Push) -> dict[str, str]:
        nonlocal tries
        tries += 1
        return {"status": "7"} if tries == 1 else {"fm.result": "reject", "fm.reason": "gone"}

    async with FakeMesh() as mesh, client_of(mesh) as client:
        mesh.on["publish"] = script
        with pytest.raises(AmbiguousError, match=r"timed out.*gone"):
            await client.publish("orders", b"x", idempotent=True)


@pytest.mark.parametrize("idempotent", [False, True])
async def test_connection_lost_before_the_answer(idempotent: bool) -> None:
    tries: list[str] = []

    async def script(peer: Peer, frame: Push) -> dict[str, str]:
        tries.append(frame.headers["fm.id"])
        if len(tries) == 1:
            raise Drop
        return {**CONSUMED, "fm.broker": "b1"}

    async with FakeMesh() as mesh, client_of(mesh) as client:
        mesh.on["publish"] = script
        if idempotent:
            await client.publish("orders", b"x", id="m1", idempotent=True)
            assert tries == ["m1", "m1"]
            assert len(mesh.peers) == 2, "on a new connection"
        else:
            with pytest.raises(AmbiguousError, match="connection was lost"):
                await client.publish("orders", b"x")
            assert len(tries) == 1


async def test_no_answer_within_the_deadline_and_a_late_one() -> None:
    gate = asyncio.Event()

    async def script(peer: Peer, frame: Push) -> dict[str, str]:
        await gate.wait()
        return CONSUMED

    async with FakeMesh() as mesh, client_of(mesh) as client:
        mesh.on["publish"] = script
        with pytest.raises(AmbiguousError, match="deadline"):
            await client.publish("orders", b"x", timeout_ms=50)
        gate.set()
        await until(lambda: client.stats.answers_late == 1)
        del mesh.on["publish"]
        await client.publish("orders", b"y")


async def test_without_a_connection_nothing_happened() -> None:
    async with FakeMesh() as mesh, client_of(mesh) as client:
        await mesh.stop()
        await until(lambda: not mesh.live)
        with pytest.raises(NotTakenError, match="deadline"):
            await client.publish("orders", b"x", timeout_ms=80)
        waiting = asyncio.create_task(client.publish("orders", b"y", timeout_ms=10_000))
        await mesh.listen()
        assert (await waiting).broker == "b1", "sent when the mesh is back"


async def test_answers_find_their_requests_in_any_order() -> None:
    held: dict[str, asyncio.Event] = {str(i): asyncio.Event() for i in range(20)}

    async def script(peer: Peer, frame: Push) -> dict[str, str]:
        await held[frame.headers["fm.id"]].wait()
        return {**CONSUMED, "fm.broker": "of-" + frame.headers["fm.id"]}

    async with FakeMesh() as mesh, client_of(mesh) as client:
        mesh.on["publish"] = script
        tasks = [asyncio.create_task(client.publish("t", b"", id=id)) for id in held]
        await until(lambda: mesh.live[0].ops().count("publish") == 20)
        for gate in reversed(held.values()):
            gate.set()
        for id, receipt in zip(held, await asyncio.gather(*tasks), strict=True):
            assert receipt == (id, f"of-{id}")


async def test_cancelled_before_it_was_sent_is_not_sent() -> None:
    async with FakeMesh() as mesh, client_of(mesh) as client:
        task = asyncio.create_task(client.publish("orders", b"x", id="never"))
        await asyncio.sleep(0)  # one step: queued, and flushed only at the end of the turn
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.publish("orders", b"y", id="next")
        ids = [f.headers["fm.id"] for f in mesh.live[0].seen if f.headers["fm.op"] == "publish"]
        assert ids == ["next"]


async def test_unanswered_publishes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CLIENT_IN_FLIGHT_MAX", 3)
    gate = asyncio.Event()

    async def script(peer: Peer, frame: Push) -> dict[str, str]:
        await gate.wait()
        return CONSUMED

    async with FakeMesh() as mesh, client_of(mesh) as client:
        mesh.on["publish"] = script
        tasks = [asyncio.create_task(client.publish("t", b"")) for _ in range(5)]
        await until(lambda: mesh.live[0].ops().count("publish") == 3)
        with pytest.raises(NotTakenError, match="unanswered"):
            await client.publish("t", b"", timeout_ms=50)
        assert mesh.live[0].ops().count("publish") == 3
        gate.set()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topic": ""}, "fm.topic: missing"),
        ({"topic": "a,b"}, "letters, digits"),
        ({"id": "x" * 129}, "fm.id: 129 bytes"),
        ({"key": "x" * 256}, "fm.key: 256 bytes"),
        ({"content": b"x" * (4 << 20)}, "at most"),
        ({"delay_ms": -1}, "fm.delay_ms: .-1"),
        ({"headers": {"big": "x" * 40_000}}, "32767"),
    ],
)
async def test_what_fits_no_frame_is_said(arguments: dict[str, object], message: str) -> None:
    async with FakeMesh() as mesh, client_of(mesh) as client:
        with pytest.raises(ValueError, match=message):
            await client.publish(**{"topic": "orders", "content": b"", **arguments})  # type: ignore[arg-type]
        assert "publish" not in mesh.live[0].ops()


async def test_text_is_no_content() -> None:
    async with FakeMesh() as mesh, client_of(mesh) as client:
        with pytest.raises(TypeError, match="bytes, not str"):
            await client.publish("orders", "text")  # type: ignore[arg-type]


async def test_a_mesh_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CLIENT_WRITE_BYTES_MAX", 65536)
    async with FakeMesh() as mesh, client_of(mesh, close_timeout_ms=50) as client:
        mesh.live[0].writer.transport.pause_reading()  # type: ignore[attr-defined]
        big = b"x" * (3 << 20)
        tasks = [
            asyncio.create_task(client.publish("orders", big, timeout_ms=300)) for _ in range(6)
        ]
        await asyncio.wait(tasks)
        errors = [task.exception() for task in tasks]
        sent = [error for error in errors if isinstance(error, AmbiguousError)]
        held = [error for error in errors if isinstance(error, NotTakenError)]
        assert len(sent) + len(held) == 6
        assert sent
        assert held, "what did not fit in front of it was never sent"
        mesh.live[0].drop()


async def test_outside_of_its_life() -> None:
    async with FakeMesh() as mesh:
        client = client_of(mesh)
        with pytest.raises(ClosedError, match="not started"):
            await client.publish("orders", b"x")
        async with client:
            pass
        with pytest.raises(ClosedError):
            await client.publish("orders", b"x")
        with pytest.raises(RuntimeError, match="closed"):
            await client.start()


async def test_several_connections_share_the_load() -> None:
    gate = asyncio.Event()

    async def script(peer: Peer, frame: Push) -> dict[str, str]:
        await gate.wait()
        return CONSUMED

    async with FakeMesh() as mesh, client_of(mesh, connections=3) as client:
        mesh.on["publish"] = script
        tasks = [asyncio.create_task(client.publish("t", b"")) for _ in range(9)]
        await until(lambda: sum(peer.ops().count("publish") for peer in mesh.live) == 9)
        assert [peer.ops().count("publish") for peer in mesh.live] == [3, 3, 3]
        gate.set()
        await asyncio.gather(*tasks)
