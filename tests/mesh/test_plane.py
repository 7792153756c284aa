"""The message mesh in the composition root, over a fake engine: what starts, stops and is left."""

# ruff: noqa: ASYNC240 - a test rewrites small local files between awaits

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastmesh import config as configuration
from fastmesh import limits
from fastmesh._ext import push
from fastmesh.app import Mesh
from fastmesh.errors import ConfigError, ListenError
from tests.admin.http import ask
from tests.admin.test_mesh_views import MESH, SCHEDULE, group, meshed, register, until
from tests.conftest import LogLines
from tests.fake_engine import Event, FakeEngine, FakeSnapshot

Running = Callable[..., Any]


@pytest.mark.parametrize("fault", ["registration", "forward", "brokers", "schedule", "engine"])
def test_a_start_that_fails_leaves_nothing_behind(
    config_file: Path, log_lines: LogLines, fault: str
) -> None:
    from fastmesh.control.listeners import bind

    blocker = bind(configuration.Address("127.0.0.1", 0), "blocker")
    at = f'"{blocker.actual}"'
    folder = config_file.parent
    (folder / "brokers.yaml").write_text('brokers: [{name: b1, address: "127.0.0.1:1"}]')
    (folder / "schedule.yaml").write_bytes(SCHEDULE)
    text = MESH.replace('[{name: b1, address: "127.0.0.1:12401"}]', "{file: brokers.yaml}")
    text = text.replace("  forward:", "  schedule: {file: schedule.yaml}\n  forward:")
    if fault == "registration":
        text = text.replace(
            'registration: {listen: "127.0.0.1:0"}', f"registration: {{listen: {at}}}"
        )
    elif fault == "forward":
        text = text.replace('forward: {listen: "127.0.0.1:0"}', f"forward: {{listen: {at}}}")
    config_file.write_text(text)

    def engine(**options: Any) -> FakeEngine:
        if fault == "engine":
            raise OSError("no threads")
        return FakeEngine(**options)

    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        if fault == "brokers":
            (folder / "brokers.yaml").write_text("brokers: [{name: 7}]")
            with pytest.raises(ConfigError):
                configuration.load(config_file)
            return
        config = configuration.load(config_file)
        if fault == "schedule":
            (folder / "schedule.yaml").write_text("apps: {shop: {}}")
        mesh = Mesh(config, log_lines.log, engine_factory=engine, snapshot_factory=FakeSnapshot)
        with pytest.raises((ListenError, ConfigError, OSError)):
            await mesh.start()
        assert len(os.listdir("/proc/self/fd")) == before
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    blocker.close()


def test_registrations_are_folded_into_few_snapshots(running: Running, config_file: Path) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            loop = asyncio.get_running_loop()
            began = loop.time()
            for number in range(100):
                await register(mesh, group(f"g{number}"), client=f"c{number}")
            await until(lambda: len(mesh.compiled.group_ids) == 100, 1.0)
            took = loop.time() - began
            assert mesh.compiled.version <= 3 + took / limits.COMPILE_GAP_S

    asyncio.run(main())


def test_an_engine_that_takes_no_snapshot_gets_it_later(
    running: Running, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            good = mesh.engine.publish

            def full(snapshot: Any) -> None:
                raise BlockingIOError("ring full")

            monkeypatch.setattr(mesh.engine, "publish", full)
            await register(mesh, group("g1"))
            await until(lambda: bool(mesh.plane.failure))
            assert "g1" not in mesh.compiled.group_ids
            monkeypatch.setattr(mesh.engine, "publish", good)
            await until(lambda: "g1" in mesh.compiled.group_ids, 1.0)
            assert mesh.plane.failure == ""

    asyncio.run(main())


def test_what_the_last_process_knew_is_in_the_first_snapshot(
    running: Running, config_file: Path
) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            await register(mesh, group("g1"))
        async with meshed(running, config_file) as mesh:
            assert mesh.compiled.version == 1
            assert "g1" in mesh.compiled.group_ids
            handle = 1 << 40
            listener = mesh.compiled.listener_ids["msg"]
            headers = {"fm.protocol": "1", "fm.app": "shop", "fm.client": "c1"}
            mesh.engine.say(
                Event("opened", a=handle, b=listener),
                Event("frame", a=handle, data=push.request(1, {"fm.op": "hello"} | headers)),
                Event(
                    "frame",
                    a=handle,
                    data=push.request(2, {"fm.op": "subscribe", "fm.group": "g1"}),
                ),
            )
            await until(lambda: len(mesh.engine.said("reply")) == 2)
            assert mesh.engine.said("subscribe")[0][2] == ((mesh.compiled.group_ids["g1"], 32),)

    asyncio.run(main())


def test_a_fault_of_our_own_costs_one_connection_and_no_more(
    running: Running, config_file: Path, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes behind it in the same batch, the end of a connection say, is never told again."""

    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            control = mesh.plane.control
            number = next(n for n, kind in mesh.compiled.kinds.items() if kind == "push")
            opened = [Event("opened", a=handle, b=number) for handle in (901, 902)]
            mesh.engine.say(*opened)
            await until(lambda: 902 in control.sessions)

            def broken(*arguments: object) -> None:
                raise RuntimeError("a fault")

            heard: list[int] = []
            with monkeypatch.context() as patched:
                patched.setattr(control.sessions, "frame", broken)
                patched.setattr(control, "tick", broken)
                hello = push.request(1, {"fm.op": "hello"})
                mesh.engine.say(
                    Event("frame", a=901, b=number, data=hello), Event("gone", a=902, b=number)
                )
                await until(lambda: 902 not in control.sessions)
                await until(lambda: "a fault" in log_lines.text())
                patched.setattr(control, "tick", heard.append)
                await until(lambda: bool(heard), 3.0)
            await until(lambda: ("close", 901) in mesh.engine.said("close"), 3.0)

    asyncio.run(main())


def test_a_full_command_ring_is_tried_again_without_an_event(
    running: Running, config_file: Path
) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            mesh.engine.ring_full = True
            endpoint = next(e.id for e in mesh.compiled.endpoints if e.name == "b1")
            mesh.engine.say(Event("opened", a=77, b=endpoint, c=1))
            await until(lambda: not mesh.plane.wire.flush())
            mesh.engine.ring_full = False
            await until(lambda: len(mesh.engine.said("call")) == 1, 1.0)

    asyncio.run(main())


def test_draining_suspends_brokers_before_clients_are_let_go(
    running: Running, config_file: Path
) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            endpoint = next(e.id for e in mesh.compiled.endpoints if e.name == "b1")
            mesh.engine.say(Event("opened", a=77, b=endpoint, c=1))
            await until(lambda: len(mesh.engine.said("call")) == 1)
            hello = mesh.engine.said("call")[0]
            mesh.engine.say(
                Event(
                    "answer",
                    a=hello[3],
                    data=push.response(1, hello[2].hint, {"fm.result": "consumed"}),
                )
            )
            await until(lambda: len(mesh.engine.said("call")) == 2)
            assert (await ask(mesh.admin_address, "/v1/drain", "POST")).status == 202
            await until(lambda: len(mesh.engine.said("call")) == 3)
            suspend = mesh.engine.said("call")[2]
            assert suspend[2].headers == {"fm.op": "suspend"}
            assert ("drain",) not in mesh.engine.calls
            mesh.engine.say(Event("answer", a=suspend[3], b=8))
            await until(lambda: ("drain",) in mesh.engine.calls, 1.0)
            await until(lambda: mesh.drained)

    asyncio.run(main())


def test_brokers_that_say_nothing_bound_the_drain(running: Running, config_file: Path) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            endpoint = next(e.id for e in mesh.compiled.endpoints if e.name == "b1")
            mesh.plane.control.announcer.opened(77, endpoint, 0)
            mesh.plane.control.announcer._links[77].state = "ready"
            row = next(iter(mesh.compiled.cluster_rows.values()))
            mesh.engine.counted.add(row, "pushes.in_flight", 1)
            loop = asyncio.get_running_loop()
            began = loop.time()
            await mesh.stop()
            assert loop.time() - began < 1.0

    asyncio.run(main())


def test_reload_takes_the_mesh_along_or_changes_nothing(
    running: Running, config_file: Path
) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            forward = mesh.addresses()["__forward__"]
            config_file.write_text(MESH.replace("12401", "12402").replace("shop}", "shop}"))
            assert await mesh.reload() == 2
            assert str(mesh.plane.brokers.now[0].address) == "127.0.0.1:12402"
            assert mesh.addresses()["__forward__"] == forward
            missing = MESH.replace("  forward:", "  schedule: {file: none.yaml}\n  forward:")
            config_file.write_text(missing.replace("12401", "12403"))
            reply = await ask(mesh.admin_address, "/v1/reload", "POST")
            assert reply.status == 422
            assert reply.json()["errors"][0]["path"] == "push.schedule.file"
            assert str(mesh.plane.brokers.now[0].address) == "127.0.0.1:12402"
            config_file.write_text(MESH.replace('  forward: {listen: "127.0.0.1:0"}\n', ""))
            await mesh.reload()
            assert "__forward__" not in mesh.addresses()

    asyncio.run(main())


def test_a_broker_file_with_a_name_waits_for_nobody(running: Running, config_file: Path) -> None:
    file = config_file.parent / "brokers.yaml"
    file.write_text('brokers: [{name: b1, address: "127.0.0.1:1"}]')
    text = MESH.replace('[{name: b1, address: "127.0.0.1:12401"}]', "{file: brokers.yaml}")
    gate = asyncio.Event()

    async def resolve(host: str) -> list[str]:
        await gate.wait()
        return ["127.0.0.9"]

    async def main() -> None:
        config_file.write_text(text)
        async with running(snapshot_factory=FakeSnapshot, resolve=resolve) as mesh:
            listed = [
                {"name": "b1", "address": "127.0.0.1:1"},
                {"name": "b2", "address": "slow.example:2"},
            ]
            file.write_text(json.dumps({"brokers": listed}))

            def address() -> Any:
                return next((e.address for e in mesh.compiled.endpoints if e.name == "b2"), "none")

            await until(lambda: address() is None, 1.0)
            gate.set()
            await until(lambda: str(address()) == "127.0.0.9:2", 3.0)

    asyncio.run(main())
