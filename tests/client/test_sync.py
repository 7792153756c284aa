"""The façade without a loop: the same client, from any thread, and nothing of it left behind."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import pytest

from fastmesh.client import (
    Fate,
    Group,
    MeshClient,
    Message,
    NotTakenError,
    RejectedError,
    SyncMeshClient,
)
from fastmesh.client.sync import ClientOptions, MessageOptions, PublishOptions
from tests.client.mesh import FakeMesh, answers

BILLING = Group("billing", "orders", prefetch=2)
PAYING = Group("paying", "payments", role="publish")
WAIT_S = 10.0


class Runner:
    """A fake mesh on a loop of its own, and a way to have things done there."""

    def __init__(self, mesh: FakeMesh, loop: asyncio.AbstractEventLoop) -> None:
        self.mesh = mesh
        self.loop = loop

    def do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def deliver(self, group: str, id: str = "m1") -> concurrent.futures.Future[Any]:
        async def there() -> Any:
            return (await (await self.mesh.peer(*self.groups)).deliver(group, id)).headers

        return asyncio.run_coroutine_threadsafe(there(), self.loop)

    groups: tuple[str, ...] = ("billing",)


@contextmanager
def elsewhere() -> Iterator[Runner]:
    ready: concurrent.futures.Future[Runner] = concurrent.futures.Future()
    done = threading.Event()

    async def run() -> None:
        async with FakeMesh() as mesh:
            ready.set_result(Runner(mesh, asyncio.get_running_loop()))
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        yield ready.result(WAIT_S)
    finally:
        done.set()
        thread.join()


def client_of(mesh: FakeMesh, *groups: Group, **options: Any) -> SyncMeshClient:
    return SyncMeshClient(
        app="demo",
        groups=groups,
        topics=["orders"],
        mesh=mesh.address,
        registration=mesh.registration,
        **options,
    )


def test_publish_and_consume() -> None:
    seen: list[str] = []

    def handler(message: Message) -> None:
        seen.append(threading.current_thread().name)
        client.publish("audit", b"from within a handler")

    with elsewhere() as there, client_of(there.mesh, BILLING) as client:
        assert client.publish("orders", b"x", key="k").broker == "b1"
        client.subscribe("billing", handler)
        assert there.deliver("billing").result(WAIT_S) == {"fm.result": "consumed"}
        assert seen[0].startswith("fastmesh-billing")
        assert client.stats.published == 2
        client.unsubscribe("billing")
        there.do(there.mesh.peer())


def test_many_at_once() -> None:
    with elsewhere() as there, client_of(there.mesh) as client:
        futures = [client.publish_soon("orders", b"%d" % i) for i in range(200)]
        assert len({future.result(WAIT_S).id for future in futures}) == 200


def test_calls_from_many_threads() -> None:
    with (
        elsewhere() as there,
        client_of(there.mesh) as client,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        receipts = list(pool.map(lambda i: client.publish("orders", b"%d" % i), range(200)))
        assert len({receipt.id for receipt in receipts}) == 200


def test_errors_come_through() -> None:
    with elsewhere() as there, client_of(there.mesh) as client:
        there.mesh.on["publish"] = answers(result="reject", reason="no topic")
        with pytest.raises(RejectedError, match="no topic"):
            client.publish("orders", b"x")
        with pytest.raises(ValueError, match=r"fm\.topic"):
            client.publish("", b"x")


def test_transaction() -> None:
    with elsewhere() as there, client_of(there.mesh, PAYING) as client:
        client.check("paying", lambda message: Fate.UNKNOWN)
        with client.transaction("payments", b"x") as tx:
            assert tx.receipt == (tx.id, "b1")
        with pytest.raises(KeyError), client.transaction("payments", b"y"):
            raise KeyError
        with client.transaction("payments", b"z") as tx:
            tx.rollback()
        with client.transaction("payments", b"z") as tx:
            tx.commit()
        phases = [f.headers.get("fm.tx") for f in there.mesh.live[0].seen]
        assert [p for p in phases if p] == [
            "prepare",
            "commit",
            "prepare",
            "rollback",
            "prepare",
            "rollback",
            "prepare",
            "commit",
        ]


def test_a_start_that_fails_leaves_nothing() -> None:
    client = SyncMeshClient(
        app="demo", topics=["t"], mesh="127.0.0.1:1", registration=None, start_timeout_ms=100
    )
    with pytest.raises(NotTakenError):
        client.start()
    client.close()
    with pytest.raises(RuntimeError, match="started once"):
        client.start()


def test_a_call_from_its_own_loop_is_said_instead_of_hanging() -> None:
    seen: list[str] = []

    async def handler(message: Message) -> None:
        try:
            client.publish("orders", b"x")
        except RuntimeError as error:
            seen.append(str(error))

    with elsewhere() as there:
        client = client_of(there.mesh, BILLING)
        client.subscribe("billing", handler)
        with client:
            assert there.deliver("billing").result(WAIT_S) == {"fm.result": "consumed"}
        assert "client's own loop" in seen[0]


def test_outside_of_its_life() -> None:
    client = SyncMeshClient(app="demo", topics=["t"])
    with pytest.raises(RuntimeError, match="not started"):
        client.publish("orders", b"x")
    client.close()


def test_an_interrupt_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(peer: Any, frame: Any) -> None:
        pass

    with elsewhere() as there, client_of(there.mesh) as client:
        there.mesh.on["publish"] = never
        real = concurrent.futures.Future.result

        def interrupted(self: Any, timeout: float | None = None) -> Any:
            monkeypatch.setattr(concurrent.futures.Future, "result", real)
            raise KeyboardInterrupt

        monkeypatch.setattr(concurrent.futures.Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.publish("orders", b"x", timeout_ms=60_000)
        del there.mesh.on["publish"]
        client.publish("orders", b"y")


def test_options_are_those_of_the_client() -> None:
    def named(call: Any, *without: str) -> dict[str, Any]:
        hints = get_type_hints(call)
        names = [p for p in inspect.signature(call).parameters if p not in {"self", *without}]
        return {name: hints[name] for name in names}

    assert named(MeshClient.__init__, "app") == get_type_hints(ClientOptions)
    assert named(MeshClient.publish, "topic", "content") == get_type_hints(PublishOptions)
    assert named(MeshClient.transaction, "topic", "content", "group") == get_type_hints(
        MessageOptions
    )
