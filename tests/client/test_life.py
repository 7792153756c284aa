"""Starting, staying connected, leaving: against a mesh that goes away, forgets and refuses."""

from __future__ import annotations

import asyncio
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from fastmesh._ext.push import Push
from fastmesh.client import (
    AmbiguousError,
    ClosedError,
    Group,
    Message,
    NotTakenError,
    RegistrationError,
    RejectedError,
    VersionError,
    http,
)
from tests.client.mesh import (
    CONSUMED,
    Drop,
    FakeMesh,
    Peer,
    answers,
    client_of,
    silent_server,
    until,
)

BILLING = Group("billing", "orders", filter="colour=blue", prefetch=2)
PAYING = Group("paying", "payments", role="publish")


async def ignore(message: Message) -> None:
    pass


# --- starting -------------------------------------------------------------------------------------


async def test_what_is_registered_and_said() -> None:
    async with FakeMesh() as mesh:
        client = client_of(mesh, BILLING, PAYING, topics=["audit", "orders"], lease_ms=9000)
        client.subscribe("billing", ignore)
        async with client:
            assert mesh.posts == [
                {
                    "app": "demo",
                    "client": "c1",
                    "topics": [{"name": "audit"}, {"name": "orders"}, {"name": "payments"}],
                    "groups": [
                        {
                            "name": "billing",
                            "topic": "orders",
                            "role": "subscribe",
                            "filter": "colour=blue",
                            "prefetch": 2,
                            "ordered": False,
                            "mode": "cluster",
                        },
                        {"name": "paying", "topic": "payments", "role": "publish"},
                    ],
                    "lease_ms": 9000,
                }
            ]
            hello, subscribe = mesh.live[0].seen
            assert hello.headers == {
                "fm.op": "hello",
                "fm.protocol": "1",
                "fm.app": "demo",
                "fm.client": "c1",
            }
            assert subscribe.headers == {
                "fm.op": "subscribe",
                "fm.group": "billing",
                "fm.prefetch": "2",
            }
            assert (client.stats.connects, client.stats.registrations) == (1, 1)


async def test_names_are_made_when_there_is_none() -> None:
    async with FakeMesh() as mesh:
        one, two = client_of(mesh, client=None), client_of(mesh, client=None)
        assert one.client != two.client
        async with one, two:
            assert set(mesh.registered) == {("demo", one.client), ("demo", two.client)}


async def test_somebody_else_registers() -> None:
    async with FakeMesh() as mesh:
        mesh.registered["demo", "c1"] = {}
        client = client_of(mesh, BILLING, registration=None)
        client.subscribe("billing", ignore)
        async with client:
            await mesh.peer("billing")
        assert (mesh.posts, mesh.deletes) == ([], [])


async def test_the_mesh_may_start_after_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeMesh() as mesh:
        failures: list[Exception] = []

        async def watched(*arguments: Any, **options: Any) -> http.Answer:
            try:
                return await call(*arguments, **options)
            except OSError as error:
                failures.append(error)
                raise

        call = http.call
        monkeypatch.setattr(http, "call", watched)
        await mesh.stop()
        client = client_of(mesh, BILLING)
        client.subscribe("billing", ignore)
        starting = asyncio.create_task(client.start())
        await until(lambda: len(failures) >= 2)
        await mesh.listen()
        await starting
        await mesh.peer("billing")
        await client.close()


async def test_a_slow_registration_is_waited_for() -> None:
    asked, gate = asyncio.Event(), asyncio.Event()

    async def slow(method: str, document: Any) -> None:
        asked.set()
        await gate.wait()

    async with FakeMesh() as mesh:
        mesh.http = slow
        client = client_of(mesh, BILLING)
        starting = asyncio.create_task(client.start())
        await asked.wait()
        assert not mesh.peers, "nobody says hello before it is registered"
        gate.set()
        await starting
        await client.close()


@pytest.mark.parametrize("what", ["silence", "nobody", "no HTTP"])
async def test_no_registration_within_the_start_timeout(what: str) -> None:
    async with FakeMesh() as mesh, silent_server() as silent:
        if what == "nobody":
            await mesh.stop()
        where = {"silence": silent, "nobody": mesh.registration[7:], "no HTTP": mesh.address}[what]
        client = client_of(mesh, registration=f"http://{where}", start_timeout_ms=150)
        with pytest.raises(NotTakenError, match="within 150 ms") as caught:
            await client.start()
        if what == "nobody":
            assert "refused" in str(caught.value) or "Connect call failed" in str(caught.value)
        await client.close()


@pytest.mark.parametrize("status", [409, 422])
async def test_a_refused_registration_is_told_at_once(status: int) -> None:
    bodies: dict[int, dict[str, Any]] = {
        409: {"error": "group billing: ordered is true at client c7"},
        422: {"errors": [{"path": "groups[0].filter", "value": "=", "message": "name=value"}]},
    }

    async def refuse(method: str, document: Any) -> tuple[int, Any]:
        return status, bodies[status]

    async with FakeMesh() as mesh:
        mesh.http = refuse
        with pytest.raises(RegistrationError) as caught:
            await client_of(mesh, BILLING).start()
        assert caught.value.status == status
        if status == 422:
            assert "groups[0].filter: name=value (found '=')" in str(caught.value)
            assert caught.value.problems[0].path == "groups[0].filter"
        else:
            assert "ordered is true at client c7" in str(caught.value)
        assert not mesh.peers


@pytest.mark.parametrize("status", [404, 500, 503])
async def test_other_answers_of_the_registration_may_pass(status: int) -> None:
    rounds = 0

    async def script(method: str, document: Any) -> tuple[int, Any] | None:
        nonlocal rounds
        rounds += 1
        return (status, {"error": "not yet"}) if rounds < 3 else None

    async with FakeMesh() as mesh:
        mesh.http = script
        async with client_of(mesh):
            assert rounds == 3


async def test_another_version_of_the_protocol() -> None:
    async with FakeMesh() as mesh:
        mesh.on["hello"] = answers(result="reject", protocol="2,3")
        with pytest.raises(VersionError, match="speaks 2,3") as caught:
            await client_of(mesh).start()
        assert caught.value.theirs == "2,3"


async def test_a_refused_subscription_fails_the_start() -> None:
    async with FakeMesh() as mesh:
        mesh.on["subscribe"] = answers(result="reject", reason="no such group")
        client = client_of(mesh, BILLING)
        client.subscribe("billing", ignore)
        with pytest.raises(RejectedError, match=r"billing.*no such group"):
            await client.start()


async def test_later_to_hello_and_subscribe_is_tried_again() -> None:
    said: list[str] = []

    async def script(peer: Peer, frame: Push) -> dict[str, str]:
        op = frame.headers["fm.op"]
        said.append(op)
        if said.count(op) < 3:
            return {"fm.result": "later", "fm.retry_ms": "10"}
        return {**CONSUMED, "fm.protocol": "1"}

    async with FakeMesh() as mesh:
        mesh.on |= {"hello": script, "subscribe": script}
        client = client_of(mesh, BILLING)
        client.subscribe("billing", ignore)
        async with client:
            assert said == ["hello"] * 3 + ["subscribe"] * 3
            assert len(mesh.peers) == 1


async def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    async with FakeMesh() as mesh:
        gate = asyncio.Event()

        async def held(peer: Peer, frame: Push) -> None:
            await gate.wait()

        mesh.on["hello"] = held
        client = client_of(mesh)
        starting = asyncio.create_task(client.start())
        await until(lambda: mesh.live and mesh.live[0].seen)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await until(lambda: not mesh.live)
        with pytest.raises(ClosedError):
            await client.publish("orders", b"x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"app": ""}, "app ''"),
        ({"client": "a,b"}, "letters, digits"),
        ({"mesh": "localhost"}, "mesh 'localhost' must be"),
        ({"mesh": "::1:80"}, "stands in brackets"),
        ({"registration": "https://x:1"}, "TLS"),
        ({"registration": "unix:/" + "x" * 200}, "at most 107"),
        ({"connections": 0}, "connections 0: 1..16"),
        ({"lease_ms": 1}, "lease_ms 1"),
        ({"groups": [BILLING, BILLING]}, "once for each role"),
        ({"topics": []}, "at least one group or topic"),
        ({"topics": ["a b"]}, "topic 'a b'"),
    ],
)
def test_wrong_arguments_are_said(arguments: dict[str, Any], message: str) -> None:
    mesh = FakeMesh()
    mesh._ports = [1, 1]
    with pytest.raises(ValueError, match=message):
        client_of(mesh, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a b"}, "group name"),
        ({"topic": ""}, "group topic"),
        ({"role": "both"}, "'subscribe' or 'publish'"),
        ({"mode": "all"}, "'cluster' or 'broadcast'"),
        ({"prefetch": 0}, "prefetch 0"),
        ({"filter": "colour"}, "name=value"),
        ({"ordered": True, "mode": "broadcast"}, "'cluster' only"),
        ({"role": "publish", "ordered": True}, "for subscribe groups"),
    ],
)
def test_wrong_groups_are_said(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Group(**{"name": "g", "topic": "t", **arguments})


# --- staying --------------------------------------------------------------------------------------


async def test_reconnects_and_subscribes_again() -> None:
    async with FakeMesh() as mesh:
        client = client_of(mesh, BILLING)
        client.subscribe("billing", ignore)
        async with client:
            for round in range(1, 4):
                peer = await mesh.peer("billing")
                assert (await peer.deliver("billing")).headers == CONSUMED
                assert client.stats.connects == round
                peer.drop()
                await until(lambda: not peer.open)  # noqa: B023 - waited for in this round
            await mesh.peer("billing")
            assert len(mesh.posts) == 1, "the mesh still knows who we are"


async def test_a_mesh_that_restarts_and_has_forgotten() -> None:
    async with FakeMesh() as mesh:
        client = client_of(mesh, BILLING)
        client.subscribe("billing", ignore)
        async with client:
            await mesh.peer("billing")
            await mesh.stop()
            mesh.registered.clear()
            await until(lambda: not mesh.live)
            await mesh.listen()
            peer = await mesh.peer("billing")
            assert (await peer.deliver("billing")).headers == CONSUMED
            assert len(mesh.posts) == 2, "registered again because the subscription was refused"


async def test_a_mesh_that_forgot_behind_a_live_connection() -> None:
    async with FakeMesh() as mesh:
        client = client_of(mesh, BILLING, lease_ms=1000)
        client.subscribe("billing", ignore)
        async with client:
            peer = await mesh.peer("billing")
            mesh.registered.clear()
            peer.groups = {}
            await until(lambda: peer.groups == {"billing": 2})
            assert client.stats.forgotten == 1
            assert len(mesh.peers) == 1, "the connection stayed"


async def test_the_lease_is_renewed_in_time() -> None:
    async with FakeMesh() as mesh, client_of(mesh, lease_ms=1000):
        loop = asyncio.get_running_loop()
        times = [loop.time()]
        for count in range(2, 5):
            await until(lambda: len(mesh.posts) >= count)  # noqa: B023 - the same
            times.append(loop.time())
        assert all(b - a < 0.8 for a, b in itertools.pairwise(times))


async def test_renewal_goes_on_after_failures() -> None:
    failures = 0

    async def broken(method: str, document: Any) -> tuple[int, Any]:
        nonlocal failures
        failures += 1
        return (409, {"error": "conflict"}) if failures == 2 else (500, None)

    async with FakeMesh() as mesh, client_of(mesh, lease_ms=1000) as client:
        mesh.http = broken
        await until(lambda: failures >= 3)
        await client.publish("orders", b"goes on all the same")
        mesh.http = None
        posts = len(mesh.posts)
        await until(lambda: len(mesh.posts) > posts)


async def test_goaway_moves_to_a_new_connection_and_finishes_on_the_old() -> None:
    gate = asyncio.Event()

    async def handler(message: Message) -> None:
        await gate.wait()

    async def held(peer: Peer, frame: Push) -> dict[str, str]:
        await gate.wait()
        return {**CONSUMED, "fm.broker": "b1"}

    async with FakeMesh() as mesh:
        client = client_of(mesh, BILLING)
        client.subscribe("billing", handler)
        async with client:
            old = await mesh.peer("billing")
            delivery = old.deliver("billing")
            mesh.on["publish"] = held
            publish = asyncio.create_task(client.publish("orders", b"x"))
            await until(lambda: "publish" in old.ops() and client._consumers["billing"].running)
            assert (await old.send({"fm.op": "goaway"})).headers == CONSUMED
            await until(lambda: len(mesh.live) == 2 and mesh.live[-1].groups)
            del mesh.on["publish"]
            await client.publish("orders", b"y")
            assert old.ops().count("publish") == 1
            gate.set()
            assert (await delivery).headers == CONSUMED
            await publish
            await until(lambda: not old.open)
            assert len(mesh.live) == 1


async def test_heartbeats_are_answered() -> None:
    async with FakeMesh() as mesh, client_of(mesh):
        answer = await mesh.live[0].beat()
        assert answer.kind == "heartbeat_ack"


async def test_a_quiet_connection_stays_a_silent_one_goes() -> None:
    async with FakeMesh() as mesh, client_of(mesh, heartbeat_ms=20) as client:
        await until(lambda: mesh.live[0].beats >= 3)
        assert client.stats.connects == 1
        first = mesh.live[0]
        first.answers_heartbeats = False
        await until(lambda: client.stats.connects == 2)
        await until(lambda: not first.open)


@pytest.mark.parametrize("data", [b"HTTP/1.1 400 no\r\n" + b" " * 64, b"\x01\x01" + b"\xff" * 64])
async def test_what_is_no_frame_ends_the_connection(data: bytes) -> None:
    async with FakeMesh() as mesh, client_of(mesh) as client:
        first = mesh.live[0]
        first.writer.write(data)
        await until(lambda: not first.open and client.stats.connects == 2)
        await client.publish("orders", b"x")


async def test_a_subscription_that_is_not_answered_makes_another_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastmesh.limits.CLIENT_CONTROL_TIMEOUT_MS", 100)

    async def silence(peer: Peer, frame: Push) -> None:
        del mesh.on["subscribe"]

    async with FakeMesh() as mesh:
        mesh.on["subscribe"] = silence
        client = client_of(mesh, BILLING)
        client.subscribe("billing", ignore)
        async with client:
            assert len(mesh.peers) == 2
            await mesh.peer("billing")


async def test_attempts_become_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh that hangs up on hello is not hammered."""
    times: list[float] = []

    async def hang_up(peer: Peer, frame: Push) -> None:
        times.append(asyncio.get_running_loop().time())
        raise Drop

    async with FakeMesh() as mesh:
        mesh.on["hello"] = hang_up
        with pytest.raises(NotTakenError):
            await client_of(mesh, start_timeout_ms=900).start()
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert 3 <= len(gaps) <= 6
        assert gaps[-1] > 2 * gaps[0]


# --- leaving --------------------------------------------------------------------------------------


async def test_leaving_is_said_in_order() -> None:
    async with FakeMesh() as mesh:
        client = client_of(mesh, BILLING)
        client.subscribe("billing", ignore)
        async with client:
            peer = await mesh.peer("billing")
        assert peer.ops() == ["hello", "subscribe", "suspend", "goaway"]
        await until(lambda: not peer.open)
        assert mesh.deletes == ["/v1/registrations/demo/c1"]
        assert not mesh.registered
        await client.close()
        assert len(mesh.deletes) == 1


@pytest.mark.parametrize("plain", [False, True])
async def test_close_finishes_handlers_which_may_still_publish(plain: bool) -> None:
    gate, plain_gate = asyncio.Event(), threading.Event()
    begun: list[str] = []

    async def handler(message: Message) -> None:
        begun.append(message.id)
        await gate.wait()
        await client.publish("audit", b"done")

    def plainly(message: Message) -> None:
        begun.append(message.id)
        assert plain_gate.wait(5)

    async with FakeMesh() as mesh:
        client = client_of(mesh, BILLING)
        client.subscribe("billing", plainly if plain else handler)
        await client.start()
        peer = await mesh.peer("billing")
        deliveries = [peer.deliver("billing", f"m{i}") for i in range(3)]
        await until(lambda: begun == ["m0", "m1"])
        closing = asyncio.create_task(client.close())
        await until(lambda: peer.suspended)
        waiting = (await deliveries[2]).headers
        assert waiting == {"fm.result": "later", "fm.retry_ms": "0", "fm.reason": "overload"}
        late = await peer.deliver("billing", "m3")
        assert late.headers["fm.result"] == "later"
        assert not closing.done()
        assert "goaway" not in peer.ops()
        gate.set()
        plain_gate.set()
        await closing
        for delivery in deliveries[:2]:
            assert (await delivery).headers == CONSUMED
        assert peer.ops().count("publish") == (0 if plain else 2)
        assert begun == ["m0", "m1"]


async def test_close_waits_for_publishes_and_takes_no_new_ones() -> None:
    gate = asyncio.Event()

    async def held(peer: Peer, frame: Push) -> dict[str, str]:
        await gate.wait()
        return {**CONSUMED, "fm.broker": "b1"}

    async with FakeMesh() as mesh:
        client = client_of(mesh)
        await client.start()
        peer = mesh.live[0]
        mesh.on["publish"] = held
        publish = asyncio.create_task(client.publish("orders", b"x"))
        await until(lambda: "publish" in peer.ops())
        closing = asyncio.create_task(client.close())
        await until(lambda: client._publisher._stopped)
        with pytest.raises(ClosedError):
            await client.publish("orders", b"y")
        gate.set()
        assert (await publish).broker == "b1"
        await closing


async def test_close_has_an_end_when_a_handler_has_none() -> None:
    cancelled = asyncio.Event()

    async def handler(message: Message) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with FakeMesh() as mesh:
        client = client_of(mesh, BILLING)
        client.subscribe("billing", handler)
        await client.start()
        peer = await mesh.peer("billing")
        delivery = peer.deliver("billing")
        await until(lambda: client._consumers["billing"].running)
        await client.close(timeout_ms=50)
        assert cancelled.is_set()
        answer = (await delivery).headers
        assert answer == {
            "fm.result": "later",
            "fm.retry_ms": "0",
            "fm.reason": "handler cancelled",
        }
        assert peer.ops()[-1] == "goaway"


async def test_close_has_an_end_when_a_publish_has_none() -> None:
    async def never(peer: Peer, frame: Push) -> None:
        pass

    async with FakeMesh() as mesh:
        client = client_of(mesh)
        await client.start()
        mesh.on["publish"] = never
        publish = asyncio.create_task(client.publish("orders", b"x", timeout_ms=60_000))
        await until(lambda: "publish" in mesh.live[0].ops())
        await client.close(timeout_ms=50)
        with pytest.raises(AmbiguousError):
            await publish


async def test_a_close_that_is_cancelled_ends_everything_at_once() -> None:
    ended = asyncio.Event()

    async def handler(message: Message) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with FakeMesh() as mesh:
        client = client_of(mesh, BILLING)
        client.subscribe("billing", handler)
        await client.start()
        peer = await mesh.peer("billing")
        delivery = peer.deliver("billing")
        await until(lambda: client._consumers["billing"].running)
        closing = asyncio.create_task(client.close())
        await until(lambda: peer.suspended)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert ended.is_set()
        await until(lambda: not peer.open)
        assert (await delivery).headers["fm.result"] == "later", "none is acknowledged for it"
        await client.close()


async def test_close_while_the_mesh_is_away() -> None:
    async with FakeMesh() as mesh:
        client = client_of(mesh, BILLING)
        client.subscribe("billing", ignore)
        await client.start()
        await mesh.stop()
        await until(lambda: not mesh.live)
        publish = asyncio.create_task(client.publish("orders", b"x", timeout_ms=60_000))
        await asyncio.sleep(0)
        await client.close(timeout_ms=50)
        with pytest.raises(ClosedError):
            await publish


async def test_close_of_a_client_that_never_started() -> None:
    async with FakeMesh() as mesh:
        client = client_of(mesh, BILLING)
        client.subscribe("billing", lambda message: None)
        await client.close()
        with pytest.raises(RuntimeError, match="closed"):
            await client.start()


async def test_an_error_in_the_block_closes_as_well() -> None:
    async with FakeMesh() as mesh:
        with pytest.raises(KeyError):
            async with client_of(mesh):
                raise KeyError
        await until(lambda: not mesh.live)
        assert mesh.deletes


async def test_over_unix_sockets(tmp_path: Path) -> None:
    async with FakeMesh(tmp_path) as mesh, client_of(mesh) as client:
        assert (await client.publish("orders", b"x")).broker == "b1"


async def test_a_token_is_sent_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeMesh() as mesh:
        client = client_of(mesh, registration_token="s3cret-token")
        async with client:
            assert mesh.tokens == ["Bearer s3cret-token"]
        assert "s3cret" not in repr(client)

        async def refuse(method: str, document: Any) -> tuple[int, Any]:
            return 401, {"error": "a token is required"}

        mesh.http = refuse
        with pytest.raises(RegistrationError, match="a token is required") as caught:
            await client_of(mesh, registration_token="s3cret-token").start()
        assert "s3cret" not in str(caught.value) + caplog.text
