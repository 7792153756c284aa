"""C and the end of life: reloads, removals and SIGTERM under load lose nothing."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.load import Load, close_all, connect, connect_many, logged
from tests.chaos.mesh import Mesh, until
from tests.peers import server as peers
from tests.peers.canary import Canary
from tests.peers.server import BoltServer
from tests.peers.sockets import free_port, parse_address
from tests.reference import bolt
from tests.sim.ledger import Ledger

pytestmark = pytest.mark.chaos
THREADS = pytest.mark.parametrize("threads", [1, 2])


async def identity(mesh: Mesh) -> tuple[int, str]:
    found = (await mesh.get("/v1/status")).json()["config"]
    return found["version"], found["sha256"]


@THREADS
async def test_c1_bad_files_change_nothing(tmp_path: Path, threads: int) -> None:
    """Every kind of unusable file, by HTTP and by SIGHUP, under load: refused with all its
    problems, and the configuration in force stays what it was."""
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}, threads=threads) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        good = mesh.path.read_bytes()
        before = await identity(mesh)
        shown = (await mesh.get("/v1/config")).body
        files: dict[str, bytes] = {
            "empty": b"",
            "half written": good[: len(good) // 2],
            "no yaml": b"{[: ",
            "binary": bytes(range(256)) * 20,
            "huge": good + b"#" * (2 << 20),
            "deep": b"[" * 100_000,
            "bombs": b"a: &a [1,1,1,1,1,1,1,1]\n"
            + b"".join(
                b"%c: &%c [%s]\n" % (n + 1, n + 1, b",".join([b"*%c" % n] * 8))
                for n in range(ord("a"), ord("j"))
            ),
            "unknown keys": good + b"surprise: 1\nanother: 2\n",
            "two wrong values": good.replace(b"weight: 100", b"weight: -5").replace(
                b"protocol: bolt", b"protocol: smtp", 1
            ),
        }
        async with Load(mesh.address, ledger) as load:
            for name, data in files.items():
                # At once: the reload by the last signal must not read a half of the huge file.
                whole = mesh.path.with_suffix(".new")
                whole.write_bytes(data)
                whole.replace(mesh.path)
                answer = await mesh.http("POST", "/v1/reload")
                assert answer.status == 422, f"{name}: {answer.status} {answer.body[:300]!r}"
                errors = answer.json()["errors"]
                assert errors, name
                assert all({"path", "value", "message"} <= set(e) for e in errors), name
                if name in ("unknown keys", "two wrong values"):
                    assert len(errors) == 2, f"{name}: all problems at once: {errors}"
                mesh.signal(signal.SIGHUP)
                assert await identity(mesh) == before, name
            mesh.path.unlink()
            assert (await mesh.http("POST", "/v1/reload")).status == 422
            mesh.path.mkdir()
            assert (await mesh.http("POST", "/v1/reload")).status == 422
            mesh.path.rmdir()
            os.mkfifo(mesh.path)
            assert (await mesh.http("POST", "/v1/reload")).status == 422
            mesh.path.unlink()
            assert await identity(mesh) == before
            assert (await mesh.get("/v1/config")).body == shown, "byte-identical"
            mesh.path.write_bytes(good)
            assert (await mesh.http("POST", "/v1/reload")).status == 200
            await load.answered(50)
        assert set(load.statuses) == {0}
        await canary.check()
    ledger.judge().check(sent_min=50)


async def test_c1_start_with_a_bad_file_ends_with_64(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path, {"s": ["127.0.0.1:1"]})
    mesh.config["clusters"][0]["endpoints"][0]["weight"] = -1
    mesh.config["surprise"] = 1
    with pytest.raises(AssertionError, match="it ended"):
        await mesh.start()
    assert mesh.process.returncode == 64
    assert "weight" in mesh.log()
    assert "surprise" in mesh.log()
    assert "Traceback" not in mesh.log()


async def test_c2_valid_but_impossible_is_refused_before_the_swap(tmp_path: Path) -> None:
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        good = copy.deepcopy(mesh.config)
        before = await identity(mesh)

        def changed(change: Any) -> dict[str, Any]:
            config = copy.deepcopy(good)
            change(config)
            return config

        taken = server.address  # somebody else listens there
        listener = {**good["listeners"][0], "name": "second", "listen": taken}
        impossible = {
            "port in use": changed(lambda c: c["listeners"].append(listener)),
            "all weights zero": changed(
                lambda c: c["clusters"][0]["endpoints"][0].update(weight=0)
            ),
            "no endpoints": changed(lambda c: c["clusters"][0].update(endpoints=[])),
            "no clusters": changed(lambda c: c.update(clusters=[])),
            "unknown cluster": changed(
                lambda c: c["listeners"][0]["routes"].append({"cluster": "nowhere"})
            ),
        }
        async with Load(mesh.address, ledger) as load:
            for name, config in impossible.items():
                answer = await mesh.reload(config)
                assert answer.status == 422, f"{name}: {answer.status}"
                assert answer.json()["errors"][0]["path"], name
                assert await identity(mesh) == before, name
            needs_upgrade = changed(lambda c: c["engine"].update(threads=3))
            answer = await mesh.reload(needs_upgrade)
            assert answer.status == 409
            assert answer.json()["keys"] == ["engine.threads"]
            assert await identity(mesh) == before
            await load.answered(20)
        assert set(load.statuses) == {0}
        mesh.config = good
        await canary.check()
    ledger.judge().check(sent_min=20)


@THREADS
async def test_c3_reloads_without_pause_under_load(tmp_path: Path, threads: int) -> None:
    """As many reloads as the process takes, between two configurations that send to two clusters:
    no frame lost, each goes to one of the two, memory is flat."""
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as one,
        BoltServer(log=logged(ledger)) as two,
        Mesh(tmp_path, {"one": [one.address], "two": [two.address]}, threads=threads) as mesh,
        Canary(mesh.address, "one") as canary,
    ):
        a = copy.deepcopy(mesh.config)
        b = copy.deepcopy(mesh.config)
        b["listeners"][0]["routes"][-1]["cluster"] = "two"
        reloads = 0
        async with Load(mesh.address, ledger, clients=6, depth=8, service=None) as load:
            for _ in range(10):
                assert (await mesh.reload(b)).status == 200
                assert (await mesh.reload(a)).status == 200
            rss = mesh.rss_bytes()
            began = time.monotonic()
            while time.monotonic() - began < 2.5:
                for config in (b, a):
                    answer = await mesh.reload(config)
                    assert answer.status == 200, answer.body
                    reloads += 1
                mesh.signal(signal.SIGHUP)
            await load.answered(50)
        assert reloads >= 20, f"void: {reloads} reloads"
        assert set(load.statuses) == {0}
        assert one.requests > 0
        assert two.requests > 0, "void: the second configuration was never used"
        # Python keeps some arenas; a snapshot that leaked would be kilobytes each time.
        assert mesh.rss_bytes() - rss < (4 << 20) + reloads * 2048
        await canary.check()
    ledger.judge().check(sent_min=100)


@THREADS
async def test_removed_endpoint_gets_nothing_new_and_finishes(tmp_path: Path, threads: int) -> None:
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as stays,
        BoltServer(log=logged(ledger)) as goes,
        Mesh(
            tmp_path,
            {"s": [stays.address, goes.address]},
            threads=threads,
            limits={"slow_start_ms": 0},
        ) as mesh,
    ):
        async with Load(mesh.address, ledger, clients=8, timeout_ms=8000) as load:
            await load.answered(100)
            goes.behave = peers.hold
            await until(lambda: len(goes.held) >= 3, "requests wait at the one that goes")
            config = copy.deepcopy(mesh.config)
            del config["clusters"][0]["endpoints"][1]
            assert (await mesh.reload(config)).status == 200
            await asyncio.sleep(1.0)
            seen, held = goes.requests, len(goes.held)
            assert held > 0, "void: nothing was in flight there"
            await load.answered(100)
            assert goes.requests == seen, "it got something new a second after its removal"
            assert goes.connections, "its connection waits for what is in flight"
            assert goes.release() == held
            await until(lambda: not goes.connections, "then it is closed")
        assert set(load.statuses) == {0}
    ledger.judge().check(sent_min=200)


@THREADS
async def test_removed_listener_drains_and_others_stay(tmp_path: Path, threads: int) -> None:
    ledger = Ledger()
    second = f"127.0.0.1:{free_port()}"
    async with (
        BoltServer(peers.late(0.15), log=logged(ledger)) as server,
        BoltServer() as other,
        Mesh(tmp_path, {"s": [server.address], "other": [other.address]}, threads=threads) as mesh,
        Canary(mesh.address, "other") as canary,
    ):
        first = copy.deepcopy(mesh.config)
        both = copy.deepcopy(first)
        both["listeners"].append({**first["listeners"][0], "name": "second", "listen": second})
        assert (await mesh.reload(both)).status == 200
        clients = await connect_many(second, ledger, 6)
        await asyncio.gather(*(c.op("s") for c in clients))
        futures = [c.op("s") for c in clients for _ in range(5)]
        await until(lambda: server.requests >= 36, "they are in flight")
        assert (await mesh.reload(first)).status == 200
        with pytest.raises(OSError, match="onnect"):
            await connect(second)
        answers = await asyncio.gather(*futures)
        assert {a.status for a in answers} == {0}
        await asyncio.wait_for(asyncio.gather(*(c.closed for c in clients)), 3)
        await canary.check()
    ledger.judge().check(sent_min=36)


@THREADS
async def test_sigterm_under_load_loses_nothing(tmp_path: Path, threads: int) -> None:
    """What is in flight is answered, clients are let go when they are quiet, then the process
    leaves."""
    ledger = Ledger()
    async with (
        BoltServer(peers.late(0.1), log=logged(ledger)) as server,
        Mesh(
            tmp_path,
            {"s": [server.address]},
            threads=threads,
            limits={"stop_timeout_ms": 5000},
        ) as mesh,
        Load(mesh.address, ledger, clients=12, depth=6) as load,
    ):
        await load.answered(100)
        metrics = await mesh.metrics()
        assert metrics.in_flight > 0, "void: nothing was in flight"
        mesh.signal(signal.SIGTERM)

        async def draining() -> bool:
            return (await mesh.get("/readyz")).status == 503

        await until(draining, "it says so")
        with pytest.raises(OSError, match="onnect"):
            await connect(mesh.address)
        asked = load.asked
        await asyncio.sleep(0.3)
        assert load.asked > asked, "clients that are not quiet are still served"
        await load.stop()
        assert set(load.statuses) == {0}
        assert load.ended == 0
        began = time.monotonic()
        assert await asyncio.wait_for(mesh.process.wait(), 8) == 0, mesh.log()[-2000:]
        assert time.monotonic() - began < 3, "nothing was owed any more"
        await asyncio.wait_for(asyncio.gather(*(c.closed for c in load.clients)), 2)
    ledger.judge().check(sent_min=100)


@THREADS
async def test_sigterm_with_an_upstream_that_never_answers(tmp_path: Path, threads: int) -> None:
    """At the end of the grace period everything in flight gets an explicit answer before the
    close."""
    ledger = Ledger()
    async with (
        BoltServer(peers.never, log=logged(ledger)) as server,
        Mesh(
            tmp_path,
            {"s": [server.address]},
            threads=threads,
            limits={"stop_timeout_ms": 800},
        ) as mesh,
    ):
        clients = await connect_many(mesh.address, ledger, 10)
        futures = [c.op("s", timeout_ms=30_000) for c in clients for _ in range(20)]
        await mesh.in_flight(200)
        began = time.monotonic()
        mesh.signal(signal.SIGTERM)
        answers = await asyncio.wait_for(asyncio.gather(*futures), 5)
        took = time.monotonic() - began
        assert {a.status for a in answers} == {bolt.STATUS_CONNECTION_CLOSED}
        assert 0.7 < took < 2, f"{took:.2f} s"
        assert await asyncio.wait_for(mesh.process.wait(), 5) == 0, mesh.log()[-2000:]
        await close_all(clients)
    ledger.judge().check(ambiguous_max=200, sent_min=200)


async def test_sigterm_twice_leaves_at_once(tmp_path: Path) -> None:
    async with (
        BoltServer(peers.never) as server,
        Mesh(tmp_path, {"s": [server.address]}, limits={"stop_timeout_ms": 30_000}) as mesh,
    ):
        client = await connect(mesh.address)
        future = client.call("s", b"x", timeout_ms=60_000)
        await mesh.in_flight(1)
        mesh.signal(signal.SIGTERM)
        await until(lambda: "draining" in mesh.log(), "it drains")
        mesh.signal(signal.SIGTERM)
        assert await asyncio.wait_for(mesh.process.wait(), 5) == 0
        assert (await future).status == bolt.STATUS_CONNECTION_CLOSED


async def test_killed_mesh_starts_again_at_once(tmp_path: Path) -> None:
    """kill -9 and start: the port, the state directory and the UNIX socket are usable again."""
    ledger = Ledger()
    path = f"unix:{tmp_path}/rpc.sock"
    async with (
        BoltServer(log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}, listen=path) as mesh,
    ):
        async with Load(path, ledger, reconnects=True) as load:
            await load.answered(50)
            await mesh.kill()
            await mesh.start()
            assert time.monotonic() - mesh.started_at < 3
            await load.answered(50)
        assert load.ended > 0, "void: no connection noticed"
    assert not isinstance(parse_address(path), tuple)
    ledger.judge(reset_is="ambiguous").check(ambiguous_max=100, sent_min=100)


async def test_second_process_in_the_same_state_dir_is_refused(tmp_path: Path) -> None:
    async with (
        BoltServer() as server,
        Mesh(tmp_path, {"s": [server.address]}) as mesh,
    ):
        config, log = tmp_path / "other.yaml", tmp_path / "other.log"
        twin = Mesh(tmp_path, {"s": [server.address]})
        twin.path, twin.log_path = config, log
        with pytest.raises(AssertionError, match="it ended"):
            await twin.start()
        assert twin.process.returncode not in (0, None)
        assert "Traceback" not in log.read_text()
        client = await connect(mesh.address)
        assert (await client.call("s", b"x")).status == 0
        await client.close()
