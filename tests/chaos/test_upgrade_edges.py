"""What surrounds an upgrade: other configurations, other commands at the same time, those who are
not what they say, and what must not pile up."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.load import Load, connect, connect_many, logged
from tests.chaos.mesh import Mesh, until
from tests.chaos.test_upgrade import Watch, moved, planted, under_load
from tests.peers.server import BoltServer
from tests.peers.sockets import free_port
from tests.sim.ledger import Ledger

pytestmark = pytest.mark.chaos
FULL = pytest.mark.full


async def last(mesh: Mesh) -> dict[str, Any]:
    """How the serving process saw the last attempt."""
    found: dict[str, Any] = (await mesh.get("/v1/status")).json()["handover"]
    return found


async def goes_well(mesh: Mesh, load: Load) -> None:
    """After whatever it was: nobody noticed, and an upgrade succeeds."""
    await load.answered(20)
    await moved(mesh)
    await load.answered(20)
    assert load.ended == 0
    assert set(load.statuses) == {0}


# --- another configuration ------------------------------------------------------------------------


async def test_u9_back_and_forth_between_numbers_of_threads(tmp_path: Path) -> None:
    ledger = Ledger()
    async with under_load(tmp_path, ledger) as (mesh, load):
        had = 1
        for threads in (2, 1, 3, 1):
            config = copy.deepcopy(mesh.config)
            config["engine"]["threads"] = threads
            report = await moved(mesh, config=config)
            assert len(report["pause_ms"]) == min(had, threads)
            had = mesh.threads = threads
            await load.answered(50)
        assert load.ended == 0
        await load.stop()
        assert set(load.statuses) == {0}
        mesh.threads = 3  # what was opened for them may stay until it is empty
    ledger.judge().check(sent_min=200)


async def test_u11_listeners_come_and_go_and_the_admin_port_moves(tmp_path: Path) -> None:
    ledger = Ledger()
    second, third = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    async with under_load(tmp_path, ledger) as (mesh, load):
        first = copy.deepcopy(mesh.config)
        with_second = copy.deepcopy(first)
        with_second["listeners"].append(
            {**first["listeners"][0], "name": "second", "listen": second}
        )
        with_second["admin"]["listen"] = f"127.0.0.1:{free_port()}"
        old_admin = mesh.admin_port
        await moved(mesh, config=with_second)
        assert mesh.admin_port != old_admin
        assert (await mesh.get("/readyz")).status == 200
        with pytest.raises(OSError, match="onnect"):
            await connect(f"127.0.0.1:{old_admin}")
        guests = await connect_many(second, ledger, 4)
        assert [a.status for a in await asyncio.gather(*(c.op("s") for c in guests))] == [0] * 4

        rebound = copy.deepcopy(with_second)
        rebound["listeners"][1]["listen"] = third
        await moved(mesh, config=rebound)
        with pytest.raises(OSError, match="onnect"):
            await connect(second)
        others = await connect_many(third, ledger, 4, first=20)
        owed = [c.op("s") for c in others for _ in range(3)]
        assert {a.status for a in await asyncio.gather(*owed)} == {0}

        owed = [c.op("s") for c in others for _ in range(3)]
        await moved(mesh, config={**first, "admin": rebound["admin"]})
        assert {a.status for a in await asyncio.gather(*owed)} == {0}
        with pytest.raises(OSError, match="onnect"):
            await connect(third)
        # Those of a listener that is gone are let go when nothing is owed to them.
        await asyncio.wait_for(asyncio.gather(*(c.closed for c in others)), 3)
        await goes_well(mesh, load)
        for client in guests:
            await client.close()
    ledger.judge().check(sent_min=100)


async def test_u11_what_cannot_be_served_is_refused_before_anything_is_frozen(
    tmp_path: Path,
) -> None:
    ledger = Ledger()
    async with under_load(tmp_path, ledger) as (mesh, load):
        good, pid = copy.deepcopy(mesh.config), mesh.pid
        with socket.socket() as occupied:
            occupied.bind(("127.0.0.1", 0))
            occupied.listen(1)
            taken = copy.deepcopy(good)
            address = f"127.0.0.1:{occupied.getsockname()[1]}"
            taken["listeners"].append({**good["listeners"][0], "name": "two", "listen": address})
            report = await mesh.upgrade(config=taken)
        assert not report["ok"]
        assert report["exit"] in (1, 64)
        assert address in report["reason"], report
        seen = (await last(mesh))["last"]
        assert seen["outcome"] == "failed"
        assert seen["frozen_ms"] == 0

        wrong = copy.deepcopy(good)
        wrong["clusters"][0]["protocol"] = "smtp"
        report = await mesh.upgrade(config=wrong)
        assert report["exit"] == 64
        assert (await last(mesh))["last"] == seen, "the old one was not even asked"
        assert mesh.pid == pid
        mesh.config = good
        await goes_well(mesh, load)
    ledger.judge().check(sent_min=50)


# --- at the same time -----------------------------------------------------------------------------


async def test_u7_two_at_once(tmp_path: Path) -> None:
    ledger = Ledger()
    async with under_load(tmp_path, ledger) as (mesh, load):
        watch = Watch(mesh, load)
        slow = planted("new.S3:delay=2500")
        first = asyncio.ensure_future(mesh.upgrade("--mode", "move", environment=slow))
        await watch.wait()
        second = await mesh.upgrade("--mode", "move")
        assert (second["ok"], second["code"], second["exit"]) == (False, "busy", 1), second
        report = await first
        assert report["ok"], report
        await goes_well(mesh, load)
    ledger.judge().check(sent_min=50)


async def test_u7_no_upgrade_while_it_drains(tmp_path: Path) -> None:
    ledger = Ledger()
    async with under_load(tmp_path, ledger) as (mesh, load):
        assert (await mesh.http("POST", "/v1/drain")).status < 300
        report = await mesh.upgrade()
        assert (report["ok"], report["code"], report["exit"]) == (False, "draining", 1), report
        await load.stop()
        assert set(load.statuses) == {0}
    ledger.judge().check(sent_min=20)


async def test_u7_sigterm_before_the_freeze_calls_it_off(tmp_path: Path) -> None:
    ledger = Ledger()
    async with under_load(tmp_path, ledger) as (mesh, load):
        watch = Watch(mesh, load)
        slow = planted("new.S4:delay=1000")
        asked = asyncio.ensure_future(mesh.upgrade("--mode", "move", environment=slow))
        await watch.wait()
        mesh.signal(signal.SIGTERM)
        report = await asked
        assert not report["ok"], report
        await load.stop()
        assert set(load.statuses) == {0}
        assert await asyncio.wait_for(mesh.process.wait(), 5) == 0
    ledger.judge().check(sent_min=50)


@pytest.mark.parametrize("whom", ["old", "new"])
async def test_u7_sigterm_in_the_middle_waits_for_the_end(tmp_path: Path, whom: str) -> None:
    """Once it is frozen the hand-over goes through; whoever was told to stop does it then."""
    ledger = Ledger()
    async with under_load(tmp_path, ledger) as (mesh, load):
        watch = Watch(mesh, load)
        slow = planted("new.S7:delay=250" if whom == "old" else "old.S7:delay=250")
        if whom == "new":
            await moved(mesh, environment=slow)
            slow = {}
        asked = asyncio.ensure_future(mesh.upgrade("--mode", "move", environment=slow))
        await watch.wait()
        [new] = [pid for pid in mesh.takers() if pid != mesh.pid]
        os.kill(mesh.pid if whom == "old" else new, signal.SIGTERM)
        report = await asked
        assert report["ok"], (report, mesh.log()[-2000:])
        if whom == "old":
            await goes_well(mesh, load)
        else:
            await load.stop()
            assert set(load.statuses) == {0}
            assert await asyncio.wait_for(mesh.process.wait(), 5) == 0
    ledger.judge().check(sent_min=50)


async def test_u6_a_dead_process_is_replaced_at_once(tmp_path: Path) -> None:
    ledger = Ledger()
    async with under_load(tmp_path, ledger) as (mesh, load):
        await mesh.kill()
        assert (tmp_path / "run/handover.sock").exists(), "void: nothing stale is there"
        report = await mesh.upgrade()
        assert (report["ok"], report["code"], report["exit"]) == (False, "nobody", 69), report
        await mesh.takeover()
        took_s = time.monotonic() - mesh.started_at
        assert took_s < 3, took_s  # with the start of the interpreter
        [ready] = [line for line in mesh.log().splitlines() if " ready " in line][1:]
        after_ms = int(ready.partition("after_ms=")[2].split()[0])
        assert after_ms < 1000
        await load.answered(50)
        await moved(mesh)
        await load.answered(50)
    ledger.judge(reset_is="ambiguous").check(ambiguous_max=100, sent_min=50)


async def test_takeover_moves_everything_too(tmp_path: Path) -> None:
    """As a second container does it that shares the volume."""
    ledger = Ledger()
    async with under_load(tmp_path, ledger) as (mesh, load):
        for _ in range(2):
            await mesh.takeover()
            await load.answered(50)
        assert load.ended == 0
        await load.stop()
        assert set(load.statuses) == {0}
    ledger.judge().check(sent_min=100)


async def test_a_receiver_without_room_is_refused(tmp_path: Path) -> None:
    ledger = Ledger()
    async with under_load(tmp_path, ledger) as (mesh, load):
        guests = await connect_many(mesh.address, None, 200)
        report = await mesh.upgrade("--mode", "move", fds_max=300)
        assert (report["ok"], report["code"], report["exit"]) == (False, "limits", 1), report
        assert (await last(mesh))["last"]["frozen_ms"] == 0
        await goes_well(mesh, load)
        for client in guests:
            await client.close()
    ledger.judge().check(sent_min=50)


async def test_u12_the_late_end_of_the_old_one_takes_nothing_away(tmp_path: Path) -> None:
    """It sleeps through the whole life of its successor's start, then ends: the paths stay."""
    ledger = Ledger()
    path = f"unix:{tmp_path}/rpc.sock"
    async with under_load(tmp_path, ledger, faults=["old.S8:stop"], listen=path) as (mesh, load):
        old = mesh.process
        report = await mesh.upgrade("--mode", "move", leaves=None)
        assert report["ok"], report
        assert old.returncode is None, "void: it has left"
        await load.answered(20)
        os.kill(old.pid, signal.SIGCONT)
        assert await asyncio.wait_for(old.wait(), 5) == 0
        guest = await connect(path, ledger)
        assert (await guest.op("s")).status == 0
        await guest.close()
        await goes_well(mesh, load)
    ledger.judge().check(sent_min=50)


async def test_mode_drain_hands_the_listeners_over(tmp_path: Path) -> None:
    ledger = Ledger()
    async with under_load(tmp_path, ledger) as (mesh, load):
        old = mesh.process
        report = await mesh.upgrade("--mode", "drain")
        assert report["ok"], report
        assert report["mode"] == "drain"
        assert (await mesh.get("/v1/status")).json()["pid"] == report["new_pid"]
        guest = await connect(mesh.address, ledger)
        assert (await guest.op("s")).status == 0
        await guest.close()
        await load.stop()
        assert set(load.statuses) == {0}, "what was under way was answered by the old one"
        assert await asyncio.wait_for(old.wait(), 10) == 0
    ledger.judge().check(sent_min=20)


async def test_post_answers_with_the_report(tmp_path: Path) -> None:
    ledger = Ledger()
    async with under_load(tmp_path, ledger) as (mesh, load):
        old = mesh.process
        answer = await mesh.http("POST", "/v1/upgrade", timeout_s=15)
        assert answer.status == 200, answer.body
        report = answer.json()
        assert report["ok"]
        assert report["old_pid"] == old.pid
        await mesh.follow(report["new_pid"])
        await goes_well(mesh, load)
    ledger.judge().check(sent_min=50)


# --- those who are not what they say --------------------------------------------------------------


@contextlib.asynccontextmanager
async def hostile(side: str, mode: str, path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.chaos.hostile",
        side,
        mode,
        str(path),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 10) == b"ready\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


TAKERS = {
    # mode: whether it is killed; else it goes by itself when the connection is closed
    "garbage": False,
    "no_pidfd": False,
    "another_pid": False,
    "too_many": False,
    "bad_version": False,
    "leaves": False,
    "silent": False,
    "never_commits": True,
    "never_acks": True,
    "lies": False,
    "garbage_late": None,
}


async def test_a6_hostile_new(tmp_path: Path) -> None:
    """One after the other at the same process: each is sent away or killed, nobody notices, and
    nothing is kept of them."""
    ledger = Ledger()
    path = tmp_path / "run/handover.sock"
    async with under_load(tmp_path, ledger) as (mesh, load):
        fds = mesh.fds()
        for mode, killed in TAKERS.items():
            async with hostile("taker", mode, path) as process:
                await asyncio.wait_for(process.wait(), 8)
                codes = {True: {-signal.SIGKILL}, False: {0}, None: {0, -signal.SIGKILL}}[killed]
                assert process.returncode in codes, mode

            async def forgotten() -> bool:
                return bool((await last(mesh))["state"] == "")

            await until(forgotten, f"{mode}: the hand-over is over", within_s=8)
            assert (await last(mesh))["last"]["frozen_ms"] < 700, mode
            await load.answered(10)
            assert load.ended == 0, mode
        await until(lambda: mesh.fds() <= fds + 1, "descriptors come back")
        await goes_well(mesh, load)
    ledger.judge().check(sent_min=100)


@pytest.mark.parametrize(
    "mode",
    [
        "garbage",
        "another_nonce",
        "no_pidfd",
        "short",
        "too_many",
        "a_file",
        "forever",
        "silent",
        pytest.param("stops_there", marks=FULL),
    ],
)
async def test_a5_hostile_old(tmp_path: Path, mode: str) -> None:
    """The new one goes, with a reason, in time, and does no harm to whoever that is."""
    mesh = Mesh(tmp_path, {"s": [f"127.0.0.1:{free_port()}"]})
    state = tmp_path / "run"
    state.mkdir(mode=0o700)
    async with hostile("giver", mode, state / "handover.sock") as process:
        began = time.monotonic()
        report = await mesh.upgrade("--mode", "move")
        assert not report["ok"]
        assert report["exit"] == 1, report
        assert report["reason"], report
        assert time.monotonic() - began < 7
        assert process.returncode in (None, 0), "it was killed"
        assert "Traceback" not in mesh.log()


# --- nothing piles up -----------------------------------------------------------------------------


def registrations(pid: int) -> int:
    """Descriptors in all its epoll sets."""
    found = 0
    for fd in os.listdir(f"/proc/{pid}/fdinfo"):
        with contextlib.suppress(FileNotFoundError):
            found += Path(f"/proc/{pid}/fdinfo/{fd}").read_text().count("tfd:")
    return found


@pytest.mark.parametrize("upgrades", [6, pytest.param(50, marks=FULL)])
async def test_nothing_piles_up(tmp_path: Path, upgrades: int) -> None:
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}, threads=2) as mesh,
    ):
        clients = await connect_many(mesh.address, ledger, 20)

        async def quiet() -> dict[str, Any]:
            await asyncio.gather(*(c.op("s") for c in clients))
            await mesh.in_flight(0)
            await asyncio.sleep(0.2)
            threads = mesh.threads_of()
            nice = Counter(n for _, n in threads)
            own = os.getpriority(os.PRIO_PROCESS, 0)
            assert nice[own] >= 2, f"engine threads must not be slowed: {threads}"
            return {
                "fds": mesh.fds(),
                "threads": threads,
                "epoll": registrations(mesh.pid),
                "rss": mesh.rss_bytes(),
            }

        await moved(mesh)
        once = await quiet()
        for _ in range(upgrades - 1):
            await moved(mesh)
            await asyncio.gather(*(c.op("s") for c in clients))
        often = await quiet()
        assert abs(often["fds"] - once["fds"]) <= 1, (once, often)
        assert often["threads"] == once["threads"]
        assert abs(often["epoll"] - once["epoll"]) <= 1, (once, often)
        assert often["rss"] <= once["rss"] + (4 << 20), (once, often)
        assert all(c.is_open for c in clients)
        for client in clients:
            await client.close()
    ledger.judge().check(sent_min=100)
