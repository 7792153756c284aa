"""Every path of the admin interface, over a real socket."""

# ruff: noqa: ASYNC240 - a test rewrites small local files between awaits

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmesh import __version__
from tests.admin.http import ask
from tests.conftest import SMALL
from tests.fake_engine import Event, FakeEngine

Running = Callable[..., Any]


def test_probes_and_status(running: Running, config_file: Path) -> None:
    async def main() -> None:
        async with running() as mesh:
            at = mesh.admin_address
            assert (await ask(at, "/healthz")).status == 200
            ready = await ask(at, "/readyz")
            assert (ready.status, ready.json()) == (200, {"state": "serving"})
            status = (await ask(at, "/v1/status")).json()
            assert status["version"] == __version__
            assert status["node"] == "n1"
            assert status["state"] == "serving"
            assert status["config"] == {
                "version": 1,
                "sha256": mesh.config.sha256,
                "source": str(config_file),
            }
            assert status["pid"] > 0
            assert status["uptime_s"] >= 0
            assert status["listeners"]["rpc"].startswith("127.0.0.1:")

    asyncio.run(main())


def test_ready_whatever_the_upstreams_and_not_while_draining(running: Running) -> None:
    async def main() -> None:
        async with running() as mesh:
            mesh.engine.say(Event("endpoint_down", a=1, data=b"connect"))
            assert (await ask(mesh.admin_address, "/readyz")).status == 200
            mesh.engine.drains_at_once = False
            drain = await ask(mesh.admin_address, "/v1/drain", "POST")
            assert (drain.status, drain.json()) == (202, {"state": "draining"})
            ready = await ask(mesh.admin_address, "/readyz")
            assert (ready.status, ready.json()) == (503, {"state": "draining"})
            assert not (await ask(mesh.admin_address, "/v1/status")).json()["drained"]
            assert (await ask(mesh.admin_address, "/v1/reload", "POST")).status == 409
            mesh.engine.finish_draining()
            until = asyncio.get_running_loop().time() + 5
            while not (await ask(mesh.admin_address, "/v1/status")).json()["drained"]:
                assert asyncio.get_running_loop().time() < until

    asyncio.run(main())


def test_a_drain_says_what_is_left_of_each_kind_once(running: Running) -> None:
    async def main() -> None:
        async with running() as mesh:
            mesh.engine.drains_at_once = False
            route = next(r.row for r in mesh.compiled.routes if r.name == "*")
            endpoint = mesh.compiled.endpoints[0].row
            listener = mesh.compiled.listener_rows["rpc"]
            cluster = next(iter(mesh.compiled.cluster_rows.values()))
            for row, counter, count in (
                (route, "requests.in_flight", 2),
                (endpoint, "requests.in_flight", 2),  # the same ones, seen from there
                (listener, "connections", 3),
                (cluster, "pushes.in_flight", 1),
            ):
                mesh.engine.counted.add(row, counter, count)
            assert (await ask(mesh.admin_address, "/v1/status")).json()["drain"] == {"step": "none"}
            assert (await ask(mesh.admin_address, "/v1/drain", "POST")).status == 202
            until = asyncio.get_running_loop().time() + 5
            waiting: dict[str, Any] = {}
            while not waiting:
                assert asyncio.get_running_loop().time() < until
                waiting = (await ask(mesh.admin_address, "/v1/status")).json()["drain"][
                    "waiting_for"
                ]
            assert waiting == {"connections": {"rpc": 3}, "requests": 3}
            text = (await ask(mesh.admin_address, "/metrics")).body.decode()
            for line in (
                'fastmesh_drain_step{step="clients"} 1.0',
                'fastmesh_drain_waiting_for{what="connections"} 3.0',
                'fastmesh_drain_waiting_for{what="requests"} 3.0',
                'fastmesh_drain_steps_total{outcome="skipped",step="suspend"} 1.0',
                "fastmesh_safe_to_stop 0.0",
            ):
                assert line in text, line
            mesh.engine.finish_draining()

    asyncio.run(main())


def test_metrics_and_routes_show_what_was_counted(running: Running) -> None:
    async def main() -> None:
        async with running() as mesh:
            row = next(r.row for r in mesh.compiled.routes if r.name == "*")
            mesh.engine.counted.add(row, "requests.accepted", 7)
            mesh.engine.counted.add(row, "requests.answered", 6)
            mesh.engine.counted.add(row, "requests.in_flight", 1)
            mesh.engine.counted.record_latency(row, 500_000)
            metrics = await ask(mesh.admin_address, "/metrics")
            assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
            line = (
                'fastmesh_requests_accepted_total{cluster="others",direction="request",'
                'listener="rpc",route="*"} 7.0'
            )
            assert line in metrics.body.decode()
            routes = (await ask(mesh.admin_address, "/v1/routes")).json()
            shown = next(r for r in routes["routes"] if r["route"] == "*")
            assert (shown["accepted"], shown["answered"], shown["in_flight"]) == (7, 6, 1)
            assert 500 <= shown["latency"]["p50_us"] <= 640
            assert "counts" not in shown["latency"]
            counts = (await ask(mesh.admin_address, "/v1/routes?counts")).json()
            shown = next(r for r in counts["routes"] if r["route"] == "*")
            assert sum(shown["latency"]["counts"]) == 1
            assert len(counts["latency_bounds_us"]) == len(shown["latency"]["counts"])

    asyncio.run(main())


def test_an_engine_that_does_not_answer_is_503_and_hurts_nobody_else(
    running: Running, monkeypatch: Any
) -> None:
    monkeypatch.setattr("fastmesh.observe.readings.poll.__defaults__", (0.05,))

    async def main() -> None:
        async with running() as mesh:
            mesh.engine.answers = False
            scrape = asyncio.create_task(ask(mesh.admin_address, "/metrics"))
            assert (await ask(mesh.admin_address, "/healthz")).status == 200
            assert (await scrape).status == 503
            mesh.engine.answers = True
            assert (await ask(mesh.admin_address, "/metrics")).status == 200

    asyncio.run(main())


def test_connections_are_listed_with_names(running: Running) -> None:
    async def main() -> None:
        async with running() as mesh:
            listener = mesh.compiled.listener_ids["rpc"]
            endpoint = mesh.compiled.endpoints[0].id
            mesh.engine.show_connections(
                {
                    "handle": 2**63 + 1,
                    "role": "downstream",
                    "listener_id": listener,
                    "peer": b"\xff",
                },
                {"handle": 2, "role": "upstream", "endpoint_id": endpoint, "peer": "127.0.0.1:1"},
            )
            found = (await ask(mesh.admin_address, "/v1/connections")).json()
            assert found["total"] == 2
            assert found["connections"][0]["handle"] == "8000000000000001"
            assert found["connections"][0]["listener"] == "rpc"
            assert found["connections"][1]["cluster"] == "orders"
            many = [
                {"handle": n, "role": "downstream", "listener_id": listener} for n in range(5000)
            ]
            mesh.engine.show_connections(*many)
            found = (await ask(mesh.admin_address, "/v1/connections")).json()
            assert (found["total"], len(found["connections"])) == (5000, 1000)

    asyncio.run(main())


def test_the_configuration_is_shown_whole_and_does_not_change_by_itself(running: Running) -> None:
    async def main() -> None:
        async with running() as mesh:
            first = await ask(mesh.admin_address, "/v1/config")
            mesh.engine.say(Event("endpoint_up", a=1, b=1))
            assert (await ask(mesh.admin_address, "/v1/config")).body == first.body
            shown = first.json()
            assert shown["limits"]["request_timeout_ms"] == 3000
            assert shown["listeners"][0]["routes"][1] == {
                "name": "*",
                "match": {},
                "cluster": "others",
            }

    asyncio.run(main())


def test_samples(running: Running) -> None:
    async def main() -> None:
        async with running() as mesh:
            assert (await ask(mesh.admin_address, "/v1/samples")).json() == {"samples": []}

    asyncio.run(main())


def test_reload_answers_200_422_and_409(running: Running, config_file: Path) -> None:
    async def main() -> None:
        async with running() as mesh:
            at = mesh.admin_address
            config_file.write_text(SMALL.replace("12201", "12209"))
            done = await ask(at, "/v1/reload", "POST")
            assert (done.status, done.json()) == (200, {"version": 2})
            before = (await ask(at, "/v1/status")).json()["config"]

            config_file.write_text(SMALL.replace("name: n1", "nam: n1").replace("100", "-5"))
            wrong = await ask(at, "/v1/reload", "POST")
            assert wrong.status == 422
            assert [(e["path"], e["value"]) for e in wrong.json()["errors"]] == [
                ("node.nam", None),
                ("limits.connections_max", -5),
            ]
            assert (await ask(at, "/v1/status")).json()["config"] == before

            config_file.write_text(SMALL + "engine: {threads: 2}\n")
            needs = await ask(at, "/v1/reload", "POST")
            assert needs.status == 409
            assert needs.json()["keys"] == ["engine.threads"]
            assert (await ask(at, "/v1/status")).json()["config"] == before

    asyncio.run(main())


def test_paths_and_methods(running: Running) -> None:
    async def main() -> None:
        async with running() as mesh:
            at = mesh.admin_address
            assert (await ask(at, "/")).status == 404
            assert (await ask(at, "/v1/status/")).status == 404
            wrong = await ask(at, "/v1/status", "POST")
            assert (wrong.status, wrong.headers["allow"]) == (405, "GET")
            wrong = await ask(at, "/v1/reload")
            assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
            assert mesh.state == "serving"
            assert json.loads((await ask(at, "/nothing")).body)["error"] == "no such path"

    asyncio.run(main())


def test_everything_over_a_unix_socket(running: Running, config_file: Path) -> None:
    config_file.write_text(SMALL.replace('admin: {listen: "127.0.0.1:0"}\n', ""))

    async def main() -> None:
        async with running() as mesh:
            assert mesh.admin_address.path == str(config_file.parent / "run" / "admin.sock")
            assert (await ask(mesh.admin_address, "/v1/status")).status == 200
        assert not Path(mesh.admin_address.path).exists()

    asyncio.run(main())


def test_uvloop_serves_both_kinds_of_socket(running: Running, config_file: Path) -> None:
    import uvloop

    async def main() -> None:
        async with running(engine_factory=FakeEngine) as mesh:
            assert (await ask(mesh.admin_address, "/v1/status")).status == 200

    uvloop.run(main())
    config_file.write_text(SMALL.replace('admin: {listen: "127.0.0.1:0"}\n', ""))
    uvloop.run(main())
