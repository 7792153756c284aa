"""The running mesh over a fake engine: start, reload, drain, stop, and what a failure leaves."""

# ruff: noqa: ASYNC240 - a test rewrites small local files between awaits

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastmesh import config as configuration
from fastmesh.address import Address
from fastmesh.app import Mesh, fit_descriptors
from fastmesh.control.listeners import bind
from fastmesh.errors import ConfigError, ListenError, NeedsUpgradeError, StateError
from tests.conftest import SMALL, LogLines, with_listener
from tests.fake_engine import Event, FakeEngine

Running = Callable[..., Any]


def open_fds() -> set[str]:
    return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _there(fd)}


def _there(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < end, "not in time"
        await asyncio.sleep(0.005)


def test_it_accepts_only_when_every_thread_knows_the_snapshot(running: Running) -> None:
    async def main() -> None:
        async with running() as mesh:
            names = [call[0] for call in mesh.engine.calls]
            assert names == ["start", "listen"]
            host, _, port = mesh.addresses()["rpc"].rpartition(":")
            with socket.create_connection((host, int(port))):
                pass
        assert [c[0] for c in mesh.engine.calls] == ["start", "listen", "drain", "stop"]

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["listener", "admin", "state", "engine", "in force"])
def test_a_start_that_fails_leaves_nothing_behind(
    config_file: Path, log_lines: LogLines, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = bind(Address("127.0.0.1", 0), "blocker")
    port = f'"{blocker.actual}"'
    text = SMALL
    if fault == "listener":
        text = SMALL.replace('listen: "127.0.0.1:0"\n    protocol', f"listen: {port}\n    protocol")
    elif fault == "admin":
        text = SMALL.replace('admin: {listen: "127.0.0.1:0"}', f"admin: {{listen: {port}}}")
    elif fault == "state":
        (config_file.parent / "run").mkdir(mode=0o777)
        (config_file.parent / "run").chmod(0o777)
    config_file.write_text(text)
    monkeypatch.setattr("fastmesh.limits.PUBLISH_TIMEOUT_S", 0.02)

    def engine(**options: Any) -> FakeEngine:
        if fault == "engine":
            raise OSError("no threads")
        made = FakeEngine(**options)
        made.takes_snapshots = fault != "in force"
        return made

    async def main() -> None:
        before = os.listdir("/proc/self/fd")
        mesh = Mesh(configuration.load(config_file), log_lines.log, engine_factory=engine)
        with pytest.raises((ListenError, StateError, OSError, Exception)) as caught:
            await mesh.start()
        assert not isinstance(caught.value, AssertionError)
        if fault == "in force":
            assert mesh.engine.stopped
            mesh.engine.close_events()
        assert len(os.listdir("/proc/self/fd")) == len(before)
        assert mesh.state == "starting"

    asyncio.run(main())
    blocker.close()


def test_reload_moves_listeners_and_keeps_ids(running: Running, config_file: Path) -> None:
    async def main() -> None:
        async with running() as mesh:
            first = mesh.compiled
            old_address = mesh.addresses()["rpc"]
            more = with_listener(SMALL, "rpc2")
            config_file.write_text(more)
            assert await mesh.reload() == 2
            assert set(mesh.addresses()) == {"rpc", "rpc2"}
            assert mesh.addresses()["rpc"] == old_address
            assert mesh.compiled.listener_ids["rpc"] == first.listener_ids["rpc"]
            second = mesh.compiled.listener_ids["rpc2"]
            assert ("listen", second) in mesh.engine.calls
            # Published before anything is accepted for it.
            assert mesh.engine.calls.index(("publish", 2)) < mesh.engine.calls.index(
                ("listen", second)
            )

            config_file.write_text(SMALL)
            gone = mesh.addresses()["rpc2"]
            assert await mesh.reload() == 3
            assert ("unlisten", second) in mesh.engine.calls
            host, _, port = gone.rpartition(":")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((host, int(port)))

    asyncio.run(main())


def test_a_reload_that_cannot_bind_changes_nothing(running: Running, config_file: Path) -> None:
    blocker = bind(Address("127.0.0.1", 0), "blocker")

    async def main() -> None:
        async with running() as mesh:
            before = (mesh.compiled, dict(mesh.addresses()), list(mesh.engine.calls))
            good = with_listener(SMALL, "new")
            config_file.write_text(with_listener(good, "bad", str(blocker.actual)))
            with pytest.raises(ConfigError) as caught:
                await mesh.reload()
            assert [p.path for p in caught.value.problems] == ["listeners[2].listen"]
            assert (mesh.compiled, mesh.addresses(), mesh.engine.calls) == before

    asyncio.run(main())
    blocker.close()


def test_a_snapshot_that_the_engine_refuses_closes_the_new_sockets(
    running: Running, config_file: Path
) -> None:
    refuse = [False]

    def factory(version: int, limits: Any) -> Any:
        from fastmesh._ext.route import Snapshot

        if refuse[0]:
            raise ValueError("out of range")
        return Snapshot(version, limits)

    async def main() -> None:
        async with running(snapshot_factory=factory) as mesh:
            refuse[0] = True
            fds = len(os.listdir("/proc/self/fd"))
            config_file.write_text(with_listener(SMALL, "new"))
            for _ in range(3):
                with pytest.raises(ConfigError):
                    await mesh.reload()
            assert len(os.listdir("/proc/self/fd")) == fds
            refuse[0] = False
            assert await mesh.reload() == 2

    asyncio.run(main())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "listeners: [",
        "\x00",
        "[" * 10_000,
        SMALL.replace("weight", "w") + "x: 1\n",
        SMALL[: len(SMALL) // 2],
    ],
)
def test_a_broken_file_is_refused_and_the_old_one_stays(
    running: Running, config_file: Path, text: str
) -> None:
    async def main() -> None:
        async with running() as mesh:
            before = (mesh.compiled, list(mesh.engine.calls), mesh.config.sha256)
            config_file.write_text(text)
            with pytest.raises(ConfigError):
                await mesh.reload()
            config_file.unlink()
            with pytest.raises(ConfigError):
                await mesh.reload()
            assert (mesh.compiled, mesh.engine.calls, mesh.config.sha256) == before

    asyncio.run(main())


def test_keys_that_need_an_upgrade_are_named(running: Running, config_file: Path) -> None:
    async def main() -> None:
        async with running() as mesh:
            config_file.write_text(
                SMALL.replace("state_dir: run", "state_dir: other") + "engine: {threads: 3}\n"
            )
            with pytest.raises(NeedsUpgradeError) as caught:
                await mesh.reload()
            assert caught.value.keys == ("engine.threads", "state_dir")

    asyncio.run(main())


def test_a_hundred_reloads_leave_descriptors_and_ids_as_they_were(
    running: Running, config_file: Path
) -> None:
    async def main() -> None:
        async with running() as mesh:
            await mesh.reload()
            fds = len(os.listdir("/proc/self/fd"))
            for number in range(100):
                config_file.write_text(SMALL.replace("12201", str(13000 + number % 2)))
                assert await mesh.reload() == number + 3
            assert len(os.listdir("/proc/self/fd")) == fds
            assert len(mesh._names) < 10

    asyncio.run(main())


def test_hangups_during_a_reload_become_one_more(
    running: Running, config_file: Path, log_lines: LogLines
) -> None:
    async def main() -> None:
        async with running() as mesh:
            mesh.ask_reload()
            await asyncio.sleep(0)
            assert mesh._changing.locked(), "the file is being read in a helper thread"
            for _ in range(50):
                mesh.ask_reload()
            await mesh._reload_task
            assert mesh.compiled.version == 3
            config_file.write_text("x: 1\n")
            mesh.ask_reload()
            await mesh._reload_task
            assert mesh.compiled.version == 3

    asyncio.run(main())
    assert "reload refused path=x" in log_lines.text()


def test_a_changed_name_is_taken_up_without_a_reload(
    running: Running, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file.write_text(SMALL.replace('"127.0.0.1:12201"', '"orders.example:12201"'))
    answer = ["10.0.0.1"]

    async def resolve(host: str) -> list[str]:
        return list(answer)

    async def main() -> None:
        async with running(resolve=resolve) as mesh:
            answer[:] = ["10.0.0.2", "10.0.0.3"]
            await mesh._refresh_names()
            assert [str(e.address) for e in mesh.compiled.endpoints][:2] == [
                "10.0.0.2:12201",
                "10.0.0.3:12201",
            ]
            assert mesh.engine.published[-1].version == 2
            await mesh._refresh_names()
            assert mesh.engine.published[-1].version == 2, "nothing changed, nothing published"

    asyncio.run(main())


def test_a_stop_waits_for_what_is_in_flight_and_then_no_longer(
    running: Running, log_lines: LogLines
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with running() as mesh:
            mesh.engine.drains_at_once = False
            began = loop.time()
            stopping = asyncio.ensure_future(mesh.stop())
            await until(lambda: mesh.state == "draining")
            assert not mesh.addresses()
            await stopping
            assert 0.15 <= loop.time() - began < 2
            assert [c[0] for c in mesh.engine.calls][-3:] == ["drain", "abort", "stop"]

    asyncio.run(main())
    assert "stopping with requests or connections left" in log_lines.text()


def test_a_stop_ends_as_soon_as_all_threads_are_drained(
    running: Running, config_file: Path
) -> None:
    config_file.write_text(
        SMALL.replace("stop_timeout_ms: 200", "stop_timeout_ms: 60000") + "engine: {threads: 2}\n"
    )

    async def main() -> None:
        async with running() as mesh:
            mesh.engine.drains_at_once = False
            stopping = asyncio.ensure_future(mesh.run_until_stopped())
            mesh.ask_stop()
            await until(lambda: mesh.state == "draining")
            mesh.engine.say(Event("drained", 0))
            mesh.engine.say(Event("drained", 0))
            await asyncio.sleep(0.05)
            assert not mesh.drained, "one thread says it twice, the other has not"
            mesh.engine.say(Event("drained", 1))
            await asyncio.wait_for(stopping, 2)
            assert ("abort",) not in mesh.engine.calls

    asyncio.run(main())


def test_the_second_signal_stops_at_once(running: Running, config_file: Path) -> None:
    config_file.write_text(SMALL.replace("stop_timeout_ms: 200", "stop_timeout_ms: 60000"))

    async def main() -> None:
        async with running() as mesh:
            mesh.engine.drains_at_once = False
            stopping = asyncio.ensure_future(mesh.run_until_stopped())
            mesh.ask_stop()
            await until(lambda: mesh.state == "draining")
            mesh.ask_stop()
            await asyncio.wait_for(stopping, 3)
            assert ("abort",) in mesh.engine.calls

    asyncio.run(main())


def test_nothing_is_left_after_a_stop(running: Running, config_file: Path) -> None:
    async def main() -> None:
        async with running():
            pass
        fds = len(os.listdir("/proc/self/fd"))
        async with running() as mesh:
            pass
        mesh.engine.close_events()
        assert len(os.listdir("/proc/self/fd")) == fds

    asyncio.run(main())


def test_two_cannot_share_a_state_directory(running: Running) -> None:
    async def main() -> None:
        async with running():
            with pytest.raises(StateError, match="in use by process"):
                async with running():
                    pass

    asyncio.run(main())


def test_connections_are_clamped_to_the_descriptors_there_are(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = configuration.load(config_file)
    config_file.write_text(SMALL.replace("100", "1000000"))
    large = configuration.load(config_file)
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: set_to.append(limit))
    assert fit_descriptors(small) == (100, "")
    assert set_to == []
    fits, why = fit_descriptors(large)
    assert 800 < fits < 1000
    assert set_to == [(1000, 1000)]
    assert "limits.connections_max 1000000" in why
    assert "the limit is 1000" in why
