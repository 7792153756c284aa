"""A1: the admin interface of a real process, asked by whoever has no business there."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from tests.chaos.mesh import Mesh
from tests.peers.canary import Canary
from tests.peers.server import BoltServer

pytestmark = pytest.mark.chaos

FOREIGN_HOSTS = (
    "evil.example",
    "evil.example:7070",
    "127.0.0.1.evil.example",
    "",
    "localhost.evil.example",
)
FOREIGN_ORIGINS = (
    "http://evil.example",
    "https://127.0.0.1",
    "null",
    "file://",
    "http://localhost:1",
)


async def test_a1_browsers_and_rebound_names_are_refused(tmp_path: Path) -> None:
    async with (
        BoltServer() as server,
        Mesh(tmp_path, {"s": [server.address]}) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        before = (await mesh.get("/v1/status")).json()["config"]
        own = f"127.0.0.1:{mesh.admin_port}"
        for host in FOREIGN_HOSTS:
            for method, path in (
                ("GET", "/v1/config"),
                ("POST", "/v1/reload"),
                ("POST", "/v1/drain"),
            ):
                answer = await mesh.http(method, path, headers={"Host": host})
                assert answer.status in (400, 403, 421), f"{host} {method} {path}: {answer.status}"
                assert b"clusters" not in answer.body
        for origin in FOREIGN_ORIGINS:
            for method, path in (
                ("GET", "/v1/config"),
                ("POST", "/v1/reload"),
                ("POST", "/v1/drain"),
            ):
                answer = await mesh.http(method, path, headers={"Origin": origin})
                assert answer.status == 403, f"{origin} {method} {path}: {answer.status}"
        assert (
            await mesh.http("GET", "/v1/config", headers={"Origin": f"http://{own}"})
        ).status == 200
        after = (await mesh.get("/v1/status")).json()
        assert (after["state"], after["config"]) == ("serving", before)
        await canary.check()


async def test_a1_unknown_paths_methods_and_broken_requests(tmp_path: Path) -> None:
    async with (
        BoltServer() as server,
        Mesh(tmp_path, {"s": [server.address]}) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        assert (await mesh.get("/v1/../etc/passwd")).status == 404
        assert (await mesh.get("/%2e%2e/%2e%2e/etc/passwd")).status == 404
        assert (await mesh.http("DELETE", "/v1/status")).status == 405
        assert (await mesh.http("GET", "/v1/reload")).status == 405
        junk = [
            b"\x00" * 100,
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"A" * 70_000,
            b"\x16\x03\x01",
        ]
        for data in junk:
            reader, writer = await asyncio.open_connection("127.0.0.1", mesh.admin_port)
            writer.write(data)
            writer.write_eof()
            try:
                raw = await asyncio.wait_for(reader.read(), 5)
            except ConnectionError:
                raw = b""
            assert raw == b"" or raw.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), raw[:100]
            writer.close()
        # Nobody speaks: held connections do not keep the next scrape out.
        silent = [socket.create_connection(("127.0.0.1", mesh.admin_port)) for _ in range(30)]
        assert (await mesh.get("/healthz")).status == 200
        for held in silent:
            held.close()
        await canary.check()


async def test_a1_other_addresses_need_a_token(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path, {"s": ["127.0.0.1:1"]})
    mesh.config["admin"]["listen"] = f"0.0.0.0:{mesh.admin_port}"
    with pytest.raises(AssertionError, match="it ended"):
        await mesh.start()
    assert mesh.process.returncode == 64
    assert "token_file" in mesh.log()
    token = tmp_path / "token"
    token.write_text("correct-horse-battery-staple\n")
    token.chmod(0o600)
    mesh.config["admin"]["token_file"] = str(token)
    mesh.admin_headers = {"Authorization": "Bearer correct-horse-battery-staple"}
    async with mesh:
        for wrong in ("", "Bearer x", "Basic correct-horse-battery-staple"):
            answer = await mesh.http("POST", "/v1/drain", headers={"Authorization": wrong})
            assert answer.status == 401, wrong
        assert (await mesh.get("/v1/status")).json()["state"] == "serving"
        shown = (await mesh.get("/v1/config")).body + (await mesh.get("/metrics")).body
        assert b"correct-horse" not in shown
        assert "correct-horse" not in mesh.log()


async def test_a1_unix_socket_is_for_us_only(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    mesh = Mesh(tmp_path, {"s": ["127.0.0.1:1"]})
    mesh.config["admin"]["listen"] = f"unix:{path}"
    mesh.admin_socket = str(path)
    async with mesh:
        assert path.stat().st_mode & 0o777 == 0o600
        assert (await mesh.get("/healthz")).status == 200
        refused = await mesh.http("GET", "/v1/config", headers={"Origin": "http://localhost"})
        assert refused.status == 403
