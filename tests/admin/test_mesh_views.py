"""What the admin interface says of the message mesh: status, schedule, topology, metrics."""

from __future__ import annotations

import asyncio
import html.parser
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmesh.admin.pages import topology_page
from fastmesh.app import Mesh
from tests.admin.http import Reply, ask
from tests.fake_engine import Event, FakeSnapshot

Running = Callable[..., Any]

MESH = """\
node: {name: n1, app: shop}
state_dir: run
admin: {listen: "127.0.0.1:0"}
listeners: [{name: msg, listen: "127.0.0.1:0", protocol: push}]
push:
  brokers: [{name: b1, address: "127.0.0.1:12401"}]
  forward: {listen: "127.0.0.1:0"}
registration: {listen: "127.0.0.1:0"}
limits: {connections_max: 100, stop_timeout_ms: 200}
"""
SCHEDULE = b"""\
apps:
  shop:
    nodes: [{name: n1, address: "127.0.0.1:1", weight: 20}, {name: n2, address: "127.0.0.1:2"}]
"""


def meshed(running: Running, config_file: Path, text: str = MESH) -> Any:
    config_file.write_text(text)
    return running(snapshot_factory=FakeSnapshot)


async def register(mesh: Mesh, *groups: dict[str, Any], client: str = "c1") -> Reply:
    body = {"app": "shop", "client": client, "topics": [], "groups": list(groups)}
    at = mesh.registration_address
    assert at is not None
    return await ask(at, "/v1/registrations", "POST", json.dumps(body).encode())


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < end, "not in time"
        await asyncio.sleep(0.005)


def group(name: str, role: str = "subscribe", **more: Any) -> dict[str, Any]:
    return {"name": name, "topic": "orders", "role": role, **more}


def test_without_a_mesh_there_is_nothing_to_show(running: Running) -> None:
    async def main() -> None:
        async with running() as mesh:
            for path in ("/v1/schedule", "/v1/topology", "/topology"):
                reply = await ask(mesh.admin_address, path)
                assert reply.status == 404
                assert "no push section" in reply.json()["error"]
            assert "mesh" not in (await ask(mesh.admin_address, "/v1/status")).json()
            assert b"fastmesh_group" not in (await ask(mesh.admin_address, "/metrics")).body

    asyncio.run(main())


def test_a_registration_is_compiled_and_shown(running: Running, config_file: Path) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            assert (await register(mesh, group("g1"))).status == 201
            await until(lambda: "g1" in mesh.compiled.group_ids)
            status = (await ask(mesh.admin_address, "/v1/status")).json()
            assert status["mesh"]["registrations"]["groups"] == 1
            assert status["mesh"]["schedule"]["source"] == "none"
            assert status["listeners"]["__forward__"].startswith("127.0.0.1:")
            routes = (await ask(mesh.admin_address, "/v1/routes")).json()
            assert [r["route"] for r in routes["routes"]] == ["{fm.broker=b1}", "orders"]

    asyncio.run(main())


def test_the_schedule_is_put_read_and_guarded(running: Running, config_file: Path) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            at = mesh.admin_address
            first = await ask(at, "/v1/schedule")
            assert first.json()["source"] == "none"
            put = await ask(at, "/v1/schedule", "PUT", SCHEDULE, If_Match=first.headers["etag"])
            assert put.status == 200
            assert put.json()["version"] == first.json()["version"] + 1
            again = await ask(at, "/v1/schedule")
            assert again.headers["etag"] == put.headers["etag"] != first.headers["etag"]
            nodes = again.json()["schedule"]["apps"]["shop"]["nodes"]
            assert [(n["name"], n["weight"]) for n in nodes] == [("n1", 20), ("n2", 100)]
            await until(lambda: "n2" in {e.name for e in mesh.compiled.endpoints})

            stale = await ask(at, "/v1/schedule", "PUT", SCHEDULE, If_Match=first.headers["etag"])
            assert stale.status == 412
            bad = await ask(at, "/v1/schedule", "PUT", b"apps: {shop: {nodes: [{name: n1}]}}")
            assert bad.status == 422
            assert bad.json()["errors"][0]["path"] == "apps.shop.nodes[0].address"
            assert (await ask(at, "/v1/schedule")).headers["etag"] == put.headers["etag"]
            assert (await ask(at, "/v1/schedule", "POST")).headers["allow"] == "GET, PUT"
        async with meshed(running, config_file) as mesh:
            kept = (await ask(mesh.admin_address, "/v1/schedule")).json()
            assert (kept["source"], kept["etag"]) == ("put", put.json()["etag"])
            assert "n2" in {e.name for e in mesh.compiled.endpoints}, "in the first snapshot"

    asyncio.run(main())


def test_with_a_file_a_put_is_refused_and_the_file_watched(
    running: Running, config_file: Path
) -> None:
    file = config_file.parent / "schedule.yaml"
    file.write_bytes(SCHEDULE)
    text = MESH.replace("  forward:", "  schedule: {file: schedule.yaml}\n  forward:")

    async def main() -> None:
        async with meshed(running, config_file, text) as mesh:
            at = mesh.admin_address
            assert (await ask(at, "/v1/schedule")).json()["source"] == "file"
            refused = await ask(at, "/v1/schedule", "PUT", SCHEDULE)
            assert refused.status == 409
            assert "schedule.yaml" in refused.json()["error"]
            file.write_bytes(SCHEDULE.replace(b"n2", b"n3"))
            await until(lambda: "n3" in {e.name for e in mesh.compiled.endpoints}, 1.0)

    asyncio.run(main())


def test_the_topology_says_who_produces_and_consumes_what(
    running: Running, config_file: Path
) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            at = mesh.admin_address
            await register(mesh, group("g1", filter="colour=blue"), group("p1", "publish"))
            await until(lambda: "p1" in mesh.compiled.group_ids)
            first = (await ask(at, "/v1/topology")).json()
            assert first["topics"][0]["consumed_by"][0]["connections"] == 0
            mesh.engine.say(Event("group", a=mesh.compiled.group_ids["g1"], b=2, c=64))
            rows = {(p.topic, p.group): p.row for p in mesh.compiled.publishes}
            count = mesh.engine.counted.add
            count(rows["orders", "p1"], "requests.answered", 100)
            count(rows["orders", ""], "requests.answered", 50)
            count(mesh.compiled.group_rows["g1"], "pushes.answered", 80)
            count(mesh.compiled.group_rows["g1"], "forwarded", 20)
            count(mesh.compiled.group_rows["g1"], "pushes.in_flight", 3)

            async def rated() -> dict[str, Any]:
                while True:
                    look: dict[str, Any] = (await ask(at, "/v1/topology")).json()
                    if look["topics"][0]["consumed_by"][0]["rate_per_s"]:
                        return look

            look = await asyncio.wait_for(rated(), 5)
            (topic,) = look["topics"]
            assert (topic["topic"], topic["apps"], topic["brokers"]) == ("orders", ["shop"], ["b1"])
            window = look["window_s"]
            named, others = topic["produced_by"]
            assert (named["app"], named["group"], named["clients"]) == ("shop", "p1", ["c1"])
            assert abs(named["rate_per_s"] - 100 / window) < 1
            assert (others["group"], others["rate_per_s"] > 0) == (None, True)
            (consumer,) = topic["consumed_by"]
            assert abs(consumer["rate_per_s"] - 80 / window) < 1
            assert abs(consumer["forwarded_per_s"] - 20 / window) < 1
            assert (consumer["connections"], consumer["credit"], consumer["in_flight"]) == (
                2,
                64,
                3,
            )
            assert consumer["filter"] == "colour=blue"
            assert look["brokers"][0]["name"] == "b1"

            page = await ask(at, "/topology")
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            assert "default-src 'none'" in page.headers["content-security-policy"]
            assert b"g1" in page.body

    asyncio.run(main())


def test_the_metrics_of_groups(running: Running, config_file: Path) -> None:
    async def main() -> None:
        async with meshed(running, config_file) as mesh:
            await register(mesh, group("g1"))
            await until(lambda: "g1" in mesh.compiled.group_ids)
            mesh.engine.say(Event("group", a=mesh.compiled.group_ids["g1"], b=2, c=64))
            row = mesh.compiled.group_rows["g1"]
            mesh.engine.counted.add(row, "pushes.accepted", 7)
            mesh.engine.counted.add(row, "pushes.failed.overload", 2)
            mesh.engine.counted.add(row, "forwarded", 1)
            text = (await ask(mesh.admin_address, "/metrics")).body.decode()
            for line in (
                'fastmesh_group_deliveries_total{app="shop",group="g1"} 7.0',
                'fastmesh_group_refused_total{app="shop",cause="overload",group="g1"} 2.0',
                'fastmesh_group_forwarded_total{app="shop",group="g1"} 1.0',
                'fastmesh_group_connections{app="shop",group="g1"} 2.0',
                'fastmesh_group_credit{app="shop",group="g1"} 64.0',
            ):
                assert line in text
            series = [line.split(" ")[0] for line in text.splitlines() if line[0] != "#"]
            assert len(series) == len(set(series)), "no series twice"

    asyncio.run(main())


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("href", "src", "action", "onclick")]


def look(name: str, **more: Any) -> dict[str, Any]:
    consumer = {
        "app": name,
        "group": name,
        "mode": "broadcast",
        "ordered": False,
        "filter": f"colour={name}",
        "connections": 1,
        "credit": 32,
        "in_flight": 4,
        "rate_per_s": 12345.6,
        "forwarded_per_s": 2.5,
        "peers": [name],
        "clients": [name],
    }
    producer = {"app": name, "group": name, "rate_per_s": None, "clients": []}
    end = {"name": name, "address": None, "up": True, "sent_per_s": 0.0}
    topic = {
        "topic": name,
        "apps": [name],
        "brokers": [name],
        "produced_by": [producer],
        "consumed_by": [consumer],
    }
    return {
        "node": name,
        "window_s": 9.9,
        "topics": [topic],
        "brokers": [end],
        "peers": [end],
    } | more


def test_the_page_is_self_contained_and_escapes_everything() -> None:
    nasty = "<script>alert(1)</script>\"'&"
    text = topology_page(look(nasty)).decode()
    found = Tags()
    found.feed(text)
    assert "script" not in found.tags
    assert found.links == []
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "12,346/s" in text
    assert "2.5/s forwarded" in text
    assert "counted with others" in text
    assert "http:" not in text
    assert "url(" not in text


def test_an_empty_page_says_so() -> None:
    assert b"No topic is registered" in topology_page(look("n1", topics=[], peers=[]))
