"""Transactions: two phases on the wire, and what a check hears at every moment between them."""

from __future__ import annotations

import asyncio

import pytest

from fastmesh._ext.push import Push
from fastmesh.client import (
    AmbiguousError,
    Fate,
    Group,
    Message,
    NotTakenError,
    Receipt,
    RejectedError,
)
from fastmesh.client.transaction import Fates
from tests.client.mesh import CONSUMED, FakeMesh, Peer, client_of, until

PAYING = Group("paying", "orders", role="publish")


def ask_the_database(message: Message) -> Fate:
    raise AssertionError("what this client decided itself it must not ask for")


def phases(peer: Peer) -> list[Push]:
    return [frame for frame in peer.seen if "fm.tx" in frame.headers]


async def test_commit() -> None:
    async with FakeMesh() as mesh, client_of(mesh, PAYING) as client:
        client.check(PAYING, ask_the_database)
        peer = await mesh.peer("paying")
        async with client.transaction("orders", b"prepared", key="k", headers={"a": "b"}) as tx:
            assert tx.receipt == Receipt(tx.id, "b1")
            (prepare,) = phases(peer)
            assert prepare.content == b"prepared"
            assert prepare.headers | {"fm.born_ms": ""} == {
                "fm.op": "publish",
                "fm.topic": "orders",
                "fm.group": "paying",
                "fm.id": tx.id,
                "fm.tx": "prepare",
                "fm.key": "k",
                "fm.born_ms": "",
                "h.a": "b",
            }
            assert (await peer.check("paying", tx.id)).headers == {"fm.result": "unknown"}
        _, commit = phases(peer)
        assert commit.content == b""
        assert commit.headers == {
            "fm.op": "publish",
            "fm.topic": "orders",
            "fm.group": "paying",
            "fm.id": tx.id,
            "fm.broker": "b1",
            "fm.tx": "commit",
            "fm.idempotent": "1",
        }
        assert (await peer.check("paying", tx.id)).headers == {"fm.result": "commit"}
        assert client.stats.published == 1


@pytest.mark.parametrize("error", [KeyError("no stock"), asyncio.CancelledError()])
async def test_rollback_when_the_block_raises(error: BaseException) -> None:
    async with FakeMesh() as mesh, client_of(mesh, PAYING) as client:
        client.check(PAYING, ask_the_database)
        peer = await mesh.peer("paying")
        with pytest.raises(type(error)):
            async with client.transaction("orders", b"x") as tx:
                raise error
        assert [frame.headers["fm.tx"] for frame in phases(peer)] == ["prepare", "rollback"]
        assert (await peer.check("paying", tx.id)).headers == {"fm.result": "rollback"}


async def test_by_hand() -> None:
    async with FakeMesh() as mesh, client_of(mesh, PAYING) as client:
        client.check(PAYING, ask_the_database)
        peer = await mesh.peer("paying")
        async with client.transaction("orders", b"x") as tx:
            await tx.rollback()
            with pytest.raises(RuntimeError, match="rolled back"):
                await tx.commit()
        async with client.transaction("orders", b"y") as tx:
            await tx.commit()
        assert [f.headers["fm.tx"] for f in phases(peer)] == [
            "prepare",
            "rollback",
            "prepare",
            "commit",
        ]
        with pytest.raises(RuntimeError, match="entered once"):
            await tx.__aenter__()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"fm.result": "reject", "fm.reason": "no"}, RejectedError),
        ({"fm.result": "later", "fm.retry_ms": "60000"}, NotTakenError),
        ({"status": "7"}, AmbiguousError),
    ],
)
async def test_a_prepare_that_fails_is_rolled_back_if_it_happened(
    answer: dict[str, str], error: type[Exception]
) -> None:
    async def script(peer: Peer, frame: Push) -> dict[str, str]:
        return dict(answer)

    async with FakeMesh() as mesh, client_of(mesh, PAYING) as client:
        client.check(PAYING, ask_the_database)
        peer = await mesh.peer("paying")
        mesh.on["publish"] = script
        with pytest.raises(error):
            async with client.transaction("orders", b"x", id="t1"):
                pytest.fail("the block must not run")
        assert (await peer.check("paying", "t1")).headers == {"fm.result": "rollback"}


async def test_an_unconfirmed_commit_stays_a_commit() -> None:
    tries = 0

    async def script(peer: Peer, frame: Push) -> dict[str, str]:
        nonlocal tries
        if frame.headers["fm.tx"] == "prepare":
            return {**CONSUMED, "fm.broker": "b1"}
        tries += 1
        return {"status": "16"}

    async with FakeMesh() as mesh, client_of(mesh, PAYING, publish_timeout_ms=300) as client:
        client.check(PAYING, ask_the_database)
        peer = await mesh.peer("paying")
        mesh.on["publish"] = script
        with pytest.raises(AmbiguousError):
            async with client.transaction("orders", b"x", id="t1"):
                pass
        assert tries > 1, "a second phase may be said again"
        assert (await peer.check("paying", "t1")).headers == {"fm.result": "commit"}


async def test_a_commit_that_never_left_is_ambiguous_and_decided() -> None:
    async with FakeMesh() as mesh, client_of(mesh, PAYING, publish_timeout_ms=100) as client:
        client.check(PAYING, ask_the_database)
        await mesh.peer("paying")
        tx = await client.transaction("orders", b"x", id="t1").__aenter__()
        await mesh.stop()
        await until(lambda: not mesh.live)
        with pytest.raises(AmbiguousError, match="its check will"):
            await tx.commit()
        await mesh.listen()
        peer = await mesh.peer("paying")
        assert (await peer.check("paying", "t1")).headers == {"fm.result": "commit"}


async def test_a_rollback_that_fails_does_not_hide_why() -> None:
    async def script(peer: Peer, frame: Push) -> dict[str, str]:
        if frame.headers["fm.tx"] == "prepare":
            return {**CONSUMED, "fm.broker": "b1"}
        return {"fm.result": "reject", "fm.reason": "what is this"}

    async with FakeMesh() as mesh, client_of(mesh, PAYING) as client:
        client.check(PAYING, ask_the_database)
        mesh.on["publish"] = script
        with pytest.raises(KeyError):
            async with client.transaction("orders", b"x"):
                raise KeyError


async def test_what_cannot_be_a_transaction() -> None:
    two = Group("second", "orders", role="publish")
    async with FakeMesh() as mesh, client_of(mesh, PAYING, two) as client:
        with pytest.raises(ValueError, match="2 publish groups have the topic"):
            client.transaction("orders", b"x")
        with pytest.raises(ValueError, match="no check callback"):
            client.transaction("orders", b"x", group="paying")
        client.check("paying", ask_the_database)
        with pytest.raises(ValueError, match="publishes to 'orders', not 'parcels'"):
            client.transaction("parcels", b"x", group="paying")
        with pytest.raises(ValueError, match="not one of this client's publish groups"):
            client.transaction("orders", b"x", group="third")
        with pytest.raises(ValueError, match="has a check callback"):
            client.check("paying", ask_the_database)


def test_decisions_are_remembered_within_a_bound() -> None:
    fates = Fates(most=2)
    fates.begin("open")
    for id in ("a", "b", "c"):
        fates.decide(id, Fate.COMMIT)
    assert [fates.get(id) for id in ("a", "b", "c", "open", "never")] == [
        None,
        Fate.COMMIT,
        Fate.COMMIT,
        Fate.UNKNOWN,
        None,
    ]
