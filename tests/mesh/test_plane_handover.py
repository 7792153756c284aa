"""The message mesh of a process that gives it away, and of the one that takes it."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fastmesh._ext import push
from fastmesh.app import Mesh
from fastmesh.control.snapshot import Directory, compile_snapshot
from fastmesh.control.state_dir import StateDir
from fastmesh.errors import HandoverError
from fastmesh.mesh.plane import Plane
from tests.admin.http import ask
from tests.admin.test_mesh_views import MESH, SCHEDULE, group, meshed, register, until
from tests.conftest import LogLines
from tests.fake_engine import Event, FakeEngine, FakeSnapshot

Running = Callable[..., Any]
HANDLE = 5 << 32
BROKER = 6 << 32


def hear(mesh: Mesh, handle: int, **fields: str) -> None:
    """A control frame of a client."""
    data = push.request(7, {f"fm.{k}": v for k, v in fields.items()}, timeout_ms=1000)
    mesh.engine.say(Event("frame", 0, handle, 0, 0, data))


def replies(mesh: Mesh) -> int:
    return len(mesh.engine.said("reply"))


async def client(mesh: Mesh) -> None:
    """One that is in g1."""
    assert (await register(mesh, group("g1"))).status == 201
    await until(lambda: "g1" in mesh.compiled.group_ids)
    mesh.engine.say(Event("opened", 0, HANDLE, mesh.compiled.listener_ids["msg"], 0))
    hear(mesh, HANDLE, op="hello", protocol="1", app="shop", client="c1")
    hear(mesh, HANDLE, op="subscribe", group="g1")
    await until(lambda: bool(mesh.engine.said("subscribe")))
    mesh.engine.say(Event("group", 0, mesh.compiled.group_ids["g1"], 1, 32))
    await until(lambda: "g1" in mesh.plane.live)


def successor(mesh: Mesh, log: LogLines, lock: int) -> Plane:
    return Plane(
        mesh.config,
        StateDir.adopt(mesh.config.state_dir, os.dup(lock)),
        log.log,
        name=str,
        put_in_force=lambda: asyncio.sleep(0),
    )


def travelled(plane: Plane) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(plane.save()))


def lock_of(mesh: Mesh) -> int:
    path = os.path.join(mesh.config.state_dir, "lock")
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.path.samefile(f"/proc/self/fd/{name}", path):
                return int(name)
        except OSError:
            continue
    raise AssertionError("no lock")


def files(mesh: Mesh) -> dict[str, bytes]:
    folder = Path(mesh.config.state_dir)
    return {p.name: p.read_bytes() for p in folder.glob("*.state*")}


def test_while_it_is_held_only_connections_change(running: Running, config_file: Path) -> None:
    async def main() -> None:
        file = config_file.parent / "brokers.yaml"
        one = {"name": "b1", "address": "127.0.0.1:1"}
        file.write_text(json.dumps({"brokers": [one]}))
        text = MESH.replace('[{name: b1, address: "127.0.0.1:12401"}]', "{file: brokers.yaml}")
        async with meshed(running, config_file, text) as mesh:
            await client(mesh)
            await mesh.plane.hold(5)
            version = mesh.compiled.version
            before = files(mesh)
            two = {"name": "b2", "address": "127.0.0.1:2"}
            file.write_text(json.dumps({"brokers": [one, two]}))
            mesh.plane.ask_snapshot()
            reply = await register(mesh, group("g2"), client="c2")
            assert reply.status == 503
            assert reply.headers["retry-after"] == "1"
            put = await ask(mesh.admin_address, "/v1/schedule", "PUT", SCHEDULE)
            assert put.status == 503
            said = replies(mesh)
            hear(mesh, HANDLE, op="suspend")
            await until(lambda: replies(mesh) == said + 1)
            assert mesh.plane.save().asked
            # As long as two looks at the file and a snapshot take, and nothing of them.
            end = asyncio.get_running_loop().time() + 0.6
            while asyncio.get_running_loop().time() < end:
                assert [b.name for b in mesh.plane.brokers.now] == ["b1"]
                assert mesh.compiled.version == version
                await asyncio.sleep(0.05)
            assert files(mesh) == before
            mesh.plane.thaw()
            await until(lambda: {"b1", "b2"} <= {e.name for e in mesh.compiled.endpoints})
            assert (await register(mesh, group("g2"), client="c2")).status == 201

    asyncio.run(main())


def test_a_snapshot_under_way_is_for_who_has_the_lock_to_wait_for(
    running: Running, config_file: Path
) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            put_in_force = mesh.plane._put_in_force
            begun: list[int] = []

            async def put() -> None:
                begun.append(mesh.compiled.version)
                await put_in_force()

            mesh.plane._put_in_force = put
            async with mesh._changing:
                mesh.plane.ask_snapshot()
                await until(lambda: bool(begun))
                await mesh.plane.hold(5)
                assert mesh.plane.save().asked
                mesh.plane.ask_snapshot()
            await until(lambda: mesh.compiled.version == begun[0] + 1)
            for _ in range(20):
                await asyncio.sleep(0.01)  # three times as long as between two snapshots
                assert len(begun) == 1
            mesh.plane.thaw()
            await until(lambda: len(begun) == 2)

    asyncio.run(main())


def test_a_file_that_cannot_be_looked_at_keeps_it_from_being_handed_over(
    running: Running, config_file: Path
) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            entered, gate = asyncio.Event(), asyncio.Event()

            async def poll() -> bool:
                entered.set()
                await gate.wait()
                return False

            mesh.plane.brokers.poll = poll
            await entered.wait()
            with pytest.raises(HandoverError, match="did not come to its end"):
                await mesh.plane.hold(0.02)
            assert (await register(mesh, group("g0"), client="c0")).status == 201, "it goes on"
            holding = asyncio.ensure_future(mesh.plane.hold(5))
            await asyncio.sleep(0)
            assert not holding.done()
            gate.set()
            await holding
            mesh.plane.thaw()

    asyncio.run(main())


def test_what_is_said_while_the_engine_saves_itself_is_not_lost(
    running: Running, config_file: Path, log_lines: LogLines
) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            await client(mesh)
            broker = next(e.id for e in mesh.compiled.endpoints if e.name == "b1")
            mesh.engine.say(Event("opened", 0, BROKER, broker, 1))
            await until(lambda: bool(mesh.engine.said("call")))
            await mesh.plane.hold(5)
            first = travelled(mesh.plane)
            said = replies(mesh)
            mesh.plane.still()
            hear(mesh, HANDLE, op="suspend")
            await until(lambda: any(s.suspended for s in mesh.plane.control.sessions.all()))
            assert replies(mesh) == said, "the engine takes nothing any more"
            last = travelled(mesh.plane)

            made = successor(mesh, log_lines, lock_of(mesh))
            made.restore(first)
            assert not made.restore(last)
            engine = FakeEngine()
            made.attach(engine, mesh.readings)
            directory = Directory(4096)
            directory.restore(mesh._directory.save(mesh.compiled.version))
            compiled = compile_snapshot(
                mesh.config,
                version=9,
                directory=directory,
                addresses=lambda address: (address,),
                connections_max=9,
                factory=FakeSnapshot,
                mesh=made.view(),
            )
            assert compiled.group_ids == mesh.compiled.group_ids
            made.compiled(compiled)
            calls = [(c[0], c[1]) for c in engine.calls]
            assert calls == [("subscribe", HANDLE), ("reply", HANDLE), ("call", BROKER)]
            assert engine.said("subscribe")[0][2] == ()
            assert engine.said("call")[0][3] > mesh.engine.said("call")[-1][3]
            assert made.status()["clients"] == 1
            await made.detach()
            await made.close()

            mesh.plane.thaw()  # had it been for nothing
            await until(lambda: replies(mesh) == said + 1)

    asyncio.run(main())


def test_a_successor_has_all_of_it_and_the_one_before_writes_no_more(
    running: Running, config_file: Path, log_lines: LogLines
) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            await client(mesh)
            at = mesh.admin_address
            assert (await ask(at, "/v1/schedule", "PUT", SCHEDULE)).status == 200
            await until(lambda: "n2" in {e.name for e in mesh.compiled.endpoints})
            await mesh.plane.hold(5)
            mesh.plane.still()
            before = files(mesh)
            made = successor(mesh, log_lines, lock_of(mesh))
            made.restore(travelled(mesh.plane))
            assert files(mesh) == before
            assert made.schedule() == mesh.plane.schedule()
            assert dict(made.live) == dict(mesh.plane.live)
            mine, theirs = made.status(), mesh.plane.status()
            assert mine == theirs
            assert mine["registrations"]["generation"] == 1
            mesh.plane.abandon()
            made.start()
            made.ask_snapshot()
            await made.put_schedule(SCHEDULE.replace(b"20", b"30"), None)
            after = files(mesh)
            assert after["schedule.state.previous"] == before["schedule.state"]
            reply = await register(mesh, group("g2"), client="c2")
            assert reply.status == 503
            assert (await ask(at, "/v1/schedule", "PUT", SCHEDULE)).status == 503
            mesh.engine.say(Event("gone", 0, HANDLE, 0, 0))
            await until(lambda: not list(mesh.plane.control.sessions.all()))
            await mesh.stop()
            assert files(mesh) == after
            await made.detach()
            await made.close()

    asyncio.run(main())


def test_connections_that_did_not_come_are_forgotten_and_nothing_else(
    running: Running, config_file: Path, log_lines: LogLines
) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            await client(mesh)
            await mesh.plane.hold(5)
            mesh.plane.still()
            hear(mesh, HANDLE, op="suspend")
            await until(lambda: any(s.suspended for s in mesh.plane.control.sessions.all()))
            made = successor(mesh, log_lines, lock_of(mesh))
            made.restore(travelled(mesh.plane))
            made.forget_connections()
            engine = FakeEngine()
            made.attach(engine, mesh.readings)
            made.settle()
            assert not engine.calls
            assert made.status()["clients"] == 0
            assert made.status()["registrations"]["clients"] == 1
            (found,) = made.durable.registry.clients()
            assert found.connections == 0
            await made.detach()
            await made.close()
            mesh.plane.thaw()

    asyncio.run(main())


def test_a_document_that_is_none_is_refused(
    running: Running, config_file: Path, log_lines: LogLines
) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            await mesh.plane.hold(5)
            made = successor(mesh, log_lines, lock_of(mesh))
            for wrong in (
                {"durable": {"registry": {"clients": [{"document": 7}]}}},
                {"wire": {"queue": [{"kind": "explode", "to": 1}]}},
                {"control": {"sessions": {"sessions": [{"handle": 1}, {"handle": 1}]}}},
                {"schedule": {"version": "x"}},
                [],
            ):
                with pytest.raises(HandoverError):
                    made.restore(msgspec.Raw(msgspec.json.encode(wrong)))
            made.restore(msgspec.Raw(b"{}"))  # of a version that saves nothing
            assert made.status()["clients"] == 0
            await made.detach()
            await made.close()
            mesh.plane.thaw()

    asyncio.run(main())


def test_hostile_documents_are_refused_or_harmless(
    running: Running, config_file: Path, log_lines: LogLines
) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            await client(mesh)
            await ask(mesh.admin_address, "/v1/schedule", "PUT", SCHEDULE)
            await mesh.plane.hold()
            whole = bytes(travelled(mesh.plane))
            before = files(mesh)
            made = successor(mesh, log_lines, lock_of(mesh))
            chosen = random.Random(2)
            values = [None, -1, 0, 2**63, 2**70, 1.5, "", "x", "\x00", True, [], {}, [[]], [None]]
            refused = 0
            for _ in range(1500):
                tree = msgspec.json.decode(whole)
                for _ in range(chosen.randint(1, 2)):
                    at: Any = tree
                    while True:
                        key = chosen.choice(list(at) if isinstance(at, dict) else range(len(at)))
                        inner = at[key]
                        if (
                            not isinstance(inner, (dict, list))
                            or not inner
                            or chosen.random() < 0.2
                        ):
                            break
                        at = inner
                    at[key] = chosen.choice(values)
                    if not tree:
                        break
                try:
                    made.restore(msgspec.Raw(msgspec.json.encode(tree)))
                except HandoverError:
                    refused += 1
            assert 500 < refused < 1500
            made.restore(msgspec.Raw(whole))
            mine = made.status()
            mine["schedule"]["version"] = mesh.plane.schedule()["version"]
            assert mine == mesh.plane.status(), "and the next one is taken"
            assert files(mesh) == before
            await made.detach()
            await made.close()
            mesh.plane.thaw()

    asyncio.run(main())
