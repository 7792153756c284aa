"""U and A4-A7: a new process takes everything over under load, or nothing changes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.load import Load, logged
from tests.chaos.mesh import Mesh, Metrics, until
from tests.chaos.push_world import PushWorld
from tests.peers import server as peers
from tests.peers.canary import Canary
from tests.peers.server import BoltServer
from tests.peers.sockets import free_port
from tests.sim.ledger import Ledger
from tests.sim.test_handover import FRESH, HANDED, KEPT, KILL_TABLE, KINDS, RESTART

pytestmark = pytest.mark.chaos
THREADS = pytest.mark.parametrize("threads", [1, 2])
FULL = pytest.mark.full


def check_monotonic(before: Metrics, after: Metrics) -> None:
    """No counter of any row has gone back."""
    seen = 0
    for name, samples in before.samples.items():
        if not name.endswith(("_total", "_count", "_sum", "_bucket")):
            continue
        now = {frozenset(labels.items()): value for labels, value in after.samples.get(name, [])}
        for labels, value in samples:
            assert now.get(frozenset(labels.items()), 0) >= value, (name, labels, value)
            seen += 1
    assert seen > 50, f"void: {seen} counters"


async def moved(mesh: Mesh, **options: Any) -> dict[str, Any]:
    """One upgrade that moves everything."""
    report = await mesh.upgrade("--mode", "move", **options)
    assert report["ok"], (report, mesh.log()[-3000:])
    assert report["mode"] == "move"
    assert report["exit"] == 0
    return report


@THREADS
async def test_u1_upgrades_in_a_row_under_load(tmp_path: Path, threads: int) -> None:
    """Nobody notices: the same sockets answer before and after, nothing is lost or made twice, and
    the books go on where they stood."""
    ledger = Ledger()
    async with (
        BoltServer(peers.late(0.02), log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}, threads=threads) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        async with Load(mesh.address, ledger, clients=9, depth=6) as load:
            await load.answered(100)
            in_flight = 0
            before = await mesh.metrics()
            for _ in range(5):
                report = await moved(mesh)
                in_flight += report["moved"]["requests"]
                assert report["moved"]["downstream"] >= 9
                assert max(report["pause_ms"]) < 500
                await load.answered(100)
                after = await mesh.metrics()
                after.check_ledger()
                check_monotonic(before, after)
                assert after.sum("requests_accepted_total") > before.sum("requests_accepted_total")
                before = after
            assert in_flight > 0, "void: nothing was in flight at any of them"
        assert set(load.statuses) == {0}
        assert load.ended == 0
        await canary.check()
    ledger.judge().check(sent_min=500)


# --- the kill table -------------------------------------------------------------------------------

OLD, NEW = "giver", "taker"
NAMES = {OLD: "old", NEW: "new"}
STANDS_S = {
    (NEW, "S1"): 2.5,
    (NEW, "S2"): 3.5,
    (NEW, "S8"): 1.0,
    (OLD, "S8"): 1.0,
}
"""How long a stopped process stands where nobody ends the wait: past the deadline of the other
side, or of its own. Everywhere else it stands until the other side has told how it ended."""


def fault(side: str, step: str, kind: str) -> str:
    return f"{NAMES[side]}.{step}:{kind}"


def planted(*faults: str) -> dict[str, str]:
    return {"FASTMESH_FAULT": ",".join(faults)}


class Watch:
    """Sees when a fault strikes, and what was in flight then."""

    def __init__(self, mesh: Mesh, load: Load) -> None:
        self.mesh = mesh
        self.load = load
        self.before = mesh.log().count("\nfault ")
        self.in_flight = 0
        self.struck = False

    async def wait(self, *, within_s: float = 8.0) -> None:
        def found() -> bool:
            self.struck = self.mesh.log().count("\nfault ") > self.before
            if not self.struck:
                load = self.load
                self.in_flight = load.asked - sum(load.statuses.values()) - load.ended
            return self.struck

        await until(found, "the fault strikes", within_s=within_s, every_s=0.002)


async def cell(
    mesh: Mesh, load: Load, side: str, step: str, kind: str, *, then: dict[str, str] | None = None
) -> str:
    """One upgrade with that fault; an `old` one is in the serving process already. Returns what
    came of it, as KILL_TABLE says it. `then` are faults of the new process as the next old one."""
    old = mesh.process
    environment = planted(fault(side, step, kind)) if side == NEW else then
    watch = Watch(mesh, load)
    asked = asyncio.ensure_future(
        mesh.upgrade("--mode", "move", environment=environment, leaves=None)
    )
    try:
        await watch.wait()
        assert watch.in_flight > 0, "void: nothing was in flight"
        if kind == "stop":
            began = time.monotonic()
            stands_s = STANDS_S.get((side, step), 10.0)
            await asyncio.wait([asked], timeout=stands_s)
            if (side, step) in STANDS_S:
                await asyncio.sleep(max(0.0, stands_s - (time.monotonic() - began)))
            stood = mesh.takers() if side == NEW else [old.pid]
            for pid in stood:
                if old.returncode is None or pid != old.pid:
                    os.kill(pid, signal.SIGCONT)
        report = await asked
    except BaseException:
        asked.cancel()
        raise
    if not report["ok"]:
        assert report["exit"] == 1, report
        if side == NEW and step == "S8":
            assert await asyncio.wait_for(old.wait(), 5) == 0
            return RESTART
        assert old.returncode is None, mesh.log()[-3000:]
        return KEPT
    assert report["exit"] == 0, report
    code = await asyncio.wait_for(old.wait(), 5)
    dies = side == OLD and (kind == "kill" or (kind, step) == ("stop", "S7"))
    assert code == (-signal.SIGKILL if dies else 0), mesh.log()[-3000:]
    return {"move": HANDED, "fresh": FRESH}[report["mode"]]


async def check_cell(
    mesh: Mesh, load: Load, side: str, step: str, kind: str, *, then: dict[str, str] | None = None
) -> None:
    expected = KILL_TABLE[side, step][KINDS.index(kind)]  # type: ignore[index]
    ended = load.ended
    found = await cell(mesh, load, side, step, kind, then=then)
    if (side, step, kind) == (NEW, "S1", "stop") and found == HANDED:
        expected = HANDED  # it had promised nothing to anybody yet, and may still connect
    assert found == expected, (side, step, kind, found, mesh.log()[-4000:])
    if found == RESTART:
        await mesh.start()
    if found in (FRESH, RESTART):
        assert load.ended > ended, "void: no connection noticed"
    else:
        assert load.ended == ended, (side, step, kind, "a connection was reset")
    await load.answered(30)


@contextlib.asynccontextmanager
async def under_load(
    folder: Path, ledger: Ledger, *, faults: Sequence[str] = (), **options: Any
) -> AsyncIterator[tuple[Mesh, Load]]:
    async with (
        BoltServer(peers.late(0.05), log=logged(ledger)) as server,
        Mesh(folder, {"s": [server.address]}, environment=planted(*faults), **options) as mesh,
        Load(mesh.address, ledger, clients=6, depth=4, timeout_ms=20_000, reconnects=True) as load,
    ):
        await load.answered(20)
        yield mesh, load


async def test_new_dies_before_commit_and_nobody_notices(tmp_path: Path) -> None:
    """Each step, one after the other at one process, which serves on each time; the last one goes
    well."""
    ledger = Ledger()
    async with under_load(tmp_path, ledger, threads=2) as (mesh, load):
        pid = mesh.pid
        for number in range(1, 8):
            await check_cell(mesh, load, NEW, f"S{number}", "kill")
            assert mesh.pid == pid
        await moved(mesh)
        await load.answered(50)
        assert load.ended == 0
        await load.stop()
        assert set(load.statuses) == {0}
    ledger.judge().check(sent_min=100)


async def test_old_fails_before_commit_and_nobody_notices(tmp_path: Path) -> None:
    """Each step fails once in the same process; then the hand-over is whole."""
    ledger = Ledger()
    steps = [f"S{number}" for number in range(1, 8)]
    faults = [fault(OLD, step, "error") for step in steps]
    async with under_load(tmp_path, ledger, faults=faults, threads=2) as (mesh, load):
        for step in steps:
            await check_cell(mesh, load, OLD, step, "error")
        await moved(mesh)
        await load.answered(50)
        assert load.ended == 0
        await load.stop()
        assert set(load.statuses) == {0}
    ledger.judge().check(sent_min=100)


async def test_a_frozen_process_thaws_when_its_successor_stands_still(tmp_path: Path) -> None:
    """S5, S6 and S7: at the deadline the old one kills it, sees it dead, and serves on."""
    ledger = Ledger()
    async with under_load(tmp_path, ledger) as (mesh, load):
        for step in ("S5", "S6", "S7"):
            await check_cell(mesh, load, NEW, step, "stop")
        await moved(mesh)
        await load.stop()
        assert set(load.statuses) == {0}
    ledger.judge().check(sent_min=100)


async def test_what_is_whole_is_adopted_when_the_old_one_dies_or_stands_still(
    tmp_path: Path,
) -> None:
    """S7 and S8 of the old one, by kill -9 and by a stop: no connection notices."""
    ledger = Ledger()
    cells = [("S7", "kill"), ("S8", "kill"), ("S8", "error"), ("S7", "stop")]
    first, *rest = [planted(fault(OLD, *found)) for found in cells]
    async with under_load(tmp_path, ledger, faults=[first["FASTMESH_FAULT"]]) as (mesh, load):
        for (step, kind), then in zip(cells, [*rest, planted()], strict=True):
            await check_cell(mesh, load, OLD, step, kind, then=then)
        await moved(mesh)
        assert load.ended == 0
        await load.stop()
        assert set(load.statuses) == {0}
    ledger.judge().check(sent_min=100)


@pytest.mark.parametrize("step", [1, 3, 5])
async def test_old_dies_with_what_it_knew(tmp_path: Path, step: int) -> None:
    """A plain crash in the middle: connections end, and the new one serves within a second."""
    ledger = Ledger()
    faults = [fault(OLD, f"S{step}", "kill")]
    async with under_load(tmp_path, ledger, faults=faults) as (mesh, load):
        await check_cell(mesh, load, OLD, f"S{step}", "kill")
    ledger.judge(reset_is="ambiguous").check(ambiguous_max=200, sent_min=40)


async def test_both_are_gone_after_commit(tmp_path: Path) -> None:
    ledger = Ledger()
    async with under_load(tmp_path, ledger) as (mesh, load):
        await check_cell(mesh, load, NEW, "S8", "kill")
    ledger.judge(reset_is="ambiguous").check(ambiguous_max=200, sent_min=40)


@FULL
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("side", "step"), KILL_TABLE)
async def test_every_cell(tmp_path: Path, side: str, step: str, kind: str) -> None:
    ledger = Ledger()
    faults = [fault(side, step, kind)] if side == OLD else []
    async with under_load(tmp_path, ledger, faults=faults, threads=2) as (mesh, load):
        await check_cell(mesh, load, side, step, kind)
        # Whatever came of it can be upgraded.
        await moved(mesh)
        await load.answered(30)
    expected = KILL_TABLE[side, step][KINDS.index(kind)]  # type: ignore[index]
    reset = expected in (FRESH, RESTART)
    verdict = ledger.judge(reset_is="ambiguous") if reset else ledger.judge()
    verdict.check(ambiguous_max=400 if reset else 0, sent_min=50)


# --- with messages --------------------------------------------------------------------------------


@pytest.mark.parametrize("upgrades", [5, pytest.param(20, marks=FULL)])
async def test_u3_pushes_and_ordered_keys_through_upgrades(tmp_path: Path, upgrades: int) -> None:
    """A node is replaced again and again under its brokers and consumers: every message once, keys
    in order, nobody connects again."""
    async with PushWorld(tmp_path) as world:
        node = world.nodes["n1"]
        pushes = 0
        async with world.producing():
            await world.consumed(50)
            for _ in range(upgrades):
                report = await moved(node)
                pushes += report["moved"]["pushes"]
                await world.taken(10)
                await world.consumed(20)
                (await node.metrics()).check_ledger()
        assert pushes > 0, "void: no push was in flight at any of them"
        verdict = await world.finish(taken_min=100)
        assert set(verdict.outcomes) == {"taken"}, verdict
        for worker in world.workers.values():
            [stats] = worker.stats
            assert (stats["connects"], stats["forgotten"], stats["answers_lost"]) == (1, 0, 0)


# --- many of both ---------------------------------------------------------------------------------


@FULL
@pytest.mark.parametrize("threads", [1, 2])
async def test_u1_fifty_upgrades_with_many_connections(tmp_path: Path, threads: int) -> None:
    """As many connections as the descriptors allow, up to ten thousand; every answer is checked by
    a native client, which is done only when the last upgrade is."""
    _, nofile = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = min(10_000, nofile - 1000)
    upstream = f"127.0.0.1:{free_port()}"
    service = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fastmesh", "bench", "serve", "--listen", upstream),
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        async with Mesh(
            tmp_path,
            {"s": [upstream]},
            threads=threads,
            limits={"connections_max": connections + 100, "memory_bytes_max": 1 << 30},
        ) as mesh:
            load = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "fastmesh", "bench", "run", mesh.address, "--json"),
                *("-c", str(connections), "--rate", "4000", "--duration", "100"),
                *("--connect-timeout-ms", "30000", "--timeout-ms", "10000"),
                stdout=asyncio.subprocess.PIPE,
            )
            try:

                async def connected() -> bool:
                    assert load.returncode is None, "the load has ended"
                    metrics = await mesh.metrics()
                    return metrics.sum("connections") >= connections

                await until(connected, "all are connected", within_s=40, every_s=0.5)
                pauses_ms: list[float] = []
                requests = 0
                for _ in range(50):
                    report = await moved(mesh)
                    assert report["moved"]["downstream"] == connections
                    requests += report["moved"]["requests"]
                    pauses_ms += report["pause_ms"]
                assert load.returncode is None, "void: it ended before the last upgrade"
                out, _ = await asyncio.wait_for(load.communicate(), 120)
            finally:
                if load.returncode is None:
                    load.kill()
                    await load.wait()
        assert load.returncode == 0, out[-3000:]
        assert requests > 0, "void: nothing was in flight at any of them"
        pauses_ms.sort()
        print(
            f"{connections} connections, {requests} requests in flight at 50 upgrades, pause ms"
            f" p50 {pauses_ms[len(pauses_ms) // 2]:.1f} max {pauses_ms[-1]:.1f}"
        )
    finally:
        service.kill()
        await service.wait()
