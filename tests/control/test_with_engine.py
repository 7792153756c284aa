"""The control plane over the real engine: reloads under load, what is removed, what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from fastmesh import config as configuration
from fastmesh._ext.load import EchoServer, LoadRun
from fastmesh.admin.views import routes_view
from fastmesh.app import Mesh
from tests.admin.http import ask
from tests.conftest import LogLines

CONFIG = """\
state_dir: run
admin: {{listen: "127.0.0.1:0"}}
engine: {{threads: {threads}}}
listeners:
  - name: rpc
    listen: "127.0.0.1:0"
    protocol: bolt
    routes:
      - {{match: {{service: "com.example.Order:1.0"}}, cluster: orders}}
      - {{match: {{service: "com.example.*"}}, cluster: others}}
clusters:
  - {{name: orders, protocol: bolt, endpoints: [{orders}]}}
  - {{name: others, protocol: bolt, endpoints: [{others}]}}
limits: {{connections_max: {connections_max}, stop_timeout_ms: 500, {more}}}
"""
BODYLESS = struct.pack(">BBHBIBihhi", 1, 1, 1, 1, 7, 1, 3000, 0, 0, 0)


class World:
    """Two echo services and a mesh whose file a test rewrites."""

    def __init__(self, path: Path, log: LogLines, threads: int) -> None:
        self.path = path
        self.log = log
        self.threads = threads
        self.one = EchoServer("127.0.0.1:0")
        self.two = EchoServer("127.0.0.1:0")
        self.mesh: Any = None

    def write(
        self, *, one: int | None = 100, two: int | None = 100, text: str = CONFIG, **more: Any
    ) -> None:
        endpoints = [
            f'{{address: "{server.address}", weight: {weight}}}'
            for server, weight in ((self.one, one), (self.two, two))
            if weight is not None
        ]
        values = {"connections_max": 300, "more": "", "threads": self.threads} | more
        self.path.write_text(
            text.format(orders=", ".join(endpoints), others=endpoints[-1], **values)
        )

    async def __aenter__(self) -> World:
        self.one.start()
        self.two.start()
        self.write()
        self.mesh = Mesh(configuration.load(self.path), self.log.log)
        await self.mesh.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.mesh.state != "stopping":
            await self.mesh.stop()
        self.one.stop()
        self.two.stop()

    @property
    def target(self) -> str:
        return str(self.mesh.addresses()["rpc"])

    def load(self, **options: Any) -> LoadRun:
        return LoadRun(
            self.target, **({"connections": 8, "warmup_ms": 0, "duration_ms": 1000} | options)
        )

    async def view(self) -> dict[str, Any]:
        reading = await self.mesh.readings.counters()
        return routes_view(self.mesh.compiled, reading, self.mesh.events)


async def finished(run: LoadRun) -> Any:
    await asyncio.to_thread(run.wait, 60.0)
    return run.result()


async def until(condition: Callable[[], bool | Awaitable[bool]], timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while True:
        found = condition()
        if not isinstance(found, bool):
            found = await found
        if found:
            return
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.01)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def world(request: pytest.FixtureRequest, tmp_path: Path, log_lines: LogLines) -> World:
    return World(tmp_path / "fastmesh.yaml", log_lines, request.param)


def memory_kib() -> int:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def test_a_hundred_reloads_a_second_lose_nothing_and_keep_memory_flat(world: World) -> None:
    async def main() -> None:
        async with world:
            run = world.load(duration_ms=3000, depth=4)
            run.start()
            began = time.monotonic()
            reloads = after_first = 0
            while not run.wait(0):
                reloads += 1
                world.write(one=1 + reloads % 7, two=1 + reloads % 5)
                await world.mesh.reload()
                if reloads == 50:
                    after_first = memory_kib()
                await asyncio.sleep(max(0.0, began + reloads / 100 - time.monotonic()))
            result = await finished(run)
            assert result.ok, result.errors
            assert result.sent_total == world.one.stats().requests + world.two.stats().requests
            assert reloads >= 60, "too few reloads to mean anything"
            assert memory_kib() - after_first < 4096
            route = (await world.view())["routes"][0]
            assert route["accepted"] == route["answered"] == result.sent_total
            assert world.mesh.compiled.version == reloads + 1

    uvloop.run(main())


def test_a_removed_endpoint_gets_nothing_new_and_loses_nothing(world: World) -> None:
    async def main() -> None:
        async with world:
            run = world.load(duration_ms=2000)
            run.start()
            await until(lambda: min(world.one.stats().requests, world.two.stats().requests) > 100)
            world.write(two=None)
            await world.mesh.reload()
            # What was under way when the snapshot changed may still arrive; after a second nothing.
            seen = [-1]

            async def quiet() -> bool:
                seen.append(world.two.stats().requests)
                before = world.one.stats().requests
                # Quiet means: nothing arrived there while a hundred requests went elsewhere.
                await until(lambda: world.one.stats().requests > before + 100)
                return world.two.stats().requests == seen[-1]

            await until(quiet, timeout_s=1.0)
            assert not run.wait(0), "the load still runs"
            result = await finished(run)
            assert result.ok, result.errors
            await until(lambda: world.two.stats().connections == 0)

    uvloop.run(main())


def refused(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_removed_listener_refuses_the_new_and_finishes_the_old(world: World) -> None:
    more = CONFIG.replace(
        "clusters:",
        '  - {{name: second, listen: "127.0.0.1:0", protocol: bolt,'
        " routes: [{{cluster: orders}}]}}\nclusters:",
    )

    async def main() -> None:
        async with world:
            world.write(text=more)
            await world.mesh.reload()
            host, _, port = world.mesh.addresses()["second"].rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(BODYLESS)
            answer = await asyncio.wait_for(reader.readexactly(20), 5)
            lengths = struct.unpack(">HHI", answer[12:20])
            await asyncio.wait_for(reader.readexactly(sum(lengths)), 5)
            world.write()
            await world.mesh.reload()
            # (the engine closes its end of the socket in its next turn)
            await until(lambda: refused(host, int(port)))
            # Closed, not reset: a reset would raise here.
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()

    uvloop.run(main())


def test_a_reload_that_is_refused_disturbs_no_request(world: World) -> None:
    from fastmesh.errors import ConfigError

    async def main() -> None:
        async with world:
            run = world.load(duration_ms=1000)
            run.start()
            refusals = 0
            while not run.wait(0):
                world.path.write_text("listeners: [" * (1 + refusals % 50))
                with pytest.raises(ConfigError):
                    await world.mesh.reload()
                refusals += 1
            result = await finished(run)
            assert result.ok, result.errors
            assert refusals > 10
            assert world.mesh.compiled.version == 1

    uvloop.run(main())


def test_metrics_balance_and_scrapes_do_not_disturb(world: World) -> None:
    async def main() -> None:
        async with world:
            runs = [
                world.load(),
                world.load(service="com.example.Stock:1.0"),
                world.load(service="org.none"),
            ]
            for run in runs:
                run.start()
            scrapes = 0
            while not all(run.wait(0) for run in runs):
                reply = await ask(world.mesh.admin_address, "/metrics")
                assert reply.status == 200
                scrapes += 1
                samples = parse_metrics(reply.body.decode())
                ledger = {
                    name: total(samples, f"fastmesh_requests_{name}", direction="request")
                    for name in (
                        "accepted_total",
                        "answered_total",
                        "expired_total",
                        "failed_total",
                        "in_flight",
                    )
                }
                accepted = ledger.pop("accepted_total")
                assert accepted == sum(ledger.values()), (accepted, ledger)
            assert scrapes > 3
            for run in runs[:2]:
                result = await finished(run)
                assert result.ok, result.errors
            none = await finished(runs[2])
            assert {k for k, v in none.errors.items() if v} == {"status.6"}
            samples = parse_metrics((await ask(world.mesh.admin_address, "/metrics")).body.decode())
            assert (
                total(samples, "fastmesh_requests_failed_total", cause="no_route")
                == none.sent_total
            )
            assert total(samples, "fastmesh_requests_in_flight") == 0
            assert total(samples, "fastmesh_hop_seconds_count", hop="mesh") > 0
            assert total(samples, "fastmesh_hop_seconds_count", hop="upstream") > 0
            assert total(samples, "fastmesh_upstream_up", cluster="orders") == 2

    uvloop.run(main())


def parse_metrics(text: str) -> list[Any]:
    from prometheus_client.parser import text_string_to_metric_families

    return [s for family in text_string_to_metric_families(text) for s in family.samples]


def total(samples: list[Any], name: str, **labels: str) -> float:
    return sum(
        s.value
        for s in samples
        if s.name == name and all(s.labels.get(k) == v for k, v in labels.items())
    )


@pytest.mark.parametrize(
    ("first", "seems"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "seems=TLS"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "seems=HTTP"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "seems=SSH"),
        (b"\x00" * 30, "reason=malformed"),
    ],
)
def test_a_wrong_protocol_is_closed_with_one_line(world: World, first: bytes, seems: str) -> None:
    async def main() -> None:
        async with world:
            host, _, port = world.target.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(first)
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
            await until(lambda: "connection closed" in world.log.text())
            lines = [line for line in world.log.text().splitlines() if "connection closed" in line]
            assert len(lines) == 1
            assert seems in lines[0]
            assert "Traceback" not in world.log.text()

            async def counted() -> bool:
                reading = await world.mesh.readings.counters()
                return bool(reading.process()["dropped.malformed"] == 1)

            await until(counted)

    uvloop.run(main())


def test_admin_stays_reachable_when_no_client_fits_any_more(world: World) -> None:
    async def main() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with world:
            world.write(connections_max=20)
            await world.mesh.reload()
            host, _, port = world.target.rpartition(":")
            held = [socket.create_connection((host, int(port))) for _ in range(40)]
            await until(lambda: "connection refused: connections_max" in world.log.text())
            assert (await ask(world.mesh.admin_address, "/readyz")).status == 200
            status = (await ask(world.mesh.admin_address, "/v1/connections")).json()
            clients = [c for c in status["connections"] if c["role"] == "downstream"]
            assert len(clients) == 20
            assert all(c["listener"] == "rpc" for c in clients)
            for sock in held:
                sock.close()

            async def empty() -> bool:
                return all(x["connections"] == 0 for x in (await world.view())["listeners"])

            await until(empty)
            result = await finished(_started(world.load(duration_ms=300)))
            assert result.ok, result.errors
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == hard
        assert soft

    uvloop.run(main())


def _started(run: LoadRun) -> LoadRun:
    run.start()
    return run


def test_a_rate_limit_is_kept_and_told_as_overload(world: World) -> None:
    text = CONFIG.replace(
        'service: "com.example.Order:1.0"}}, cluster: orders',
        'service: "com.example.Order:1.0"}}, cluster: orders,'
        " rate_limit: {{per_second: 100, burst: 10}}",
    )

    async def main() -> None:
        async with world:
            world.write(text=text)
            await world.mesh.reload()
            result = await finished(_started(world.load(duration_ms=1000, rate=1000.0)))
            passed = world.one.stats().requests + world.two.stats().requests
            # Each engine thread has a bucket of its own.
            assert 80 <= passed <= (150 + 10) * world.threads
            assert result.errors["status.4"] == result.sent_total - passed
            route = (await world.view())["routes"][0]
            assert route["failed"]["overload"] == result.errors["status.4"]

    uvloop.run(main())


def test_samples_are_shown(world: World) -> None:
    async def main() -> None:
        async with world:
            world.write(text=CONFIG + "observe: {{sample_every: 10}}\n")
            await world.mesh.reload()
            result = await finished(_started(world.load(duration_ms=300)))
            assert result.ok, result.errors
            await until(lambda: len(world.mesh.events.samples) > 5)
            samples = (await ask(world.mesh.admin_address, "/v1/samples")).json()["samples"]
            for sample in samples:
                assert sample["outcome"] == "answered"
                assert (
                    0
                    < sample["received_ns"]
                    <= sample["sent_ns"]
                    <= sample["answered_ns"]
                    <= sample["forwarded_ns"]
                )
                assert sample["row"] == world.mesh.compiled.routes[0].row

    uvloop.run(main())


def test_a_graceful_stop_answers_what_is_in_flight(world: World) -> None:
    async def main() -> None:
        async with world:
            with EchoServer("127.0.0.1:0", delay_ms=200) as slow:
                world.one, before = slow, world.one
                world.write(two=None)
                await world.mesh.reload()
                host, _, port = world.target.rpartition(":")
                reader, writer = await asyncio.open_connection(host, int(port))
                # No service: no route here, so a service header is needed to reach the slow one.
                key, value = b"service", b"com.example.Order:1.0"
                section = struct.pack(">i", len(key)) + key + struct.pack(">i", len(value)) + value
                head = struct.pack(">BBHBIBihhi", 1, 1, 1, 1, 7, 1, 3000, 0, len(section), 0)
                writer.write(head + section)
                await until(lambda: slow.stats().requests == 1)
                stopping = asyncio.ensure_future(world.mesh.stop())
                answer = await asyncio.wait_for(reader.read(), 5)
                assert answer[:10] == struct.pack(">BBHBIB", 1, 0, 2, 1, 7, 1)
                assert struct.unpack(">H", answer[10:12]) == (0,)
                await stopping
                writer.close()
                world.one = before
        assert "requests or connections left" not in world.log.text()

    uvloop.run(main())
