"""The registration interface over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastmesh.address import Address, parse_address
from fastmesh.config import Secret
from fastmesh.control.listeners import bind
from fastmesh.control.state_dir import StateDir
from fastmesh.mesh.durable import DurableRegistry
from fastmesh.mesh.registration_http import PATH, RegistrationServer
from tests.admin.http import Reply, ask, connect, raw
from tests.conftest import LogLines
from tests.mesh.disk import Disk
from tests.mesh.test_registration import doc, pub, sub

ROOT = Path(__file__).parent.parent.parent
TOKEN = "registration-token-0123456789"


@dataclass(frozen=True)
class Section:
    """As the configuration has it."""

    listen: Address
    token: Secret | None = None
    hosts: tuple[str, ...] = ()


class Bed:
    def __init__(self, durable: DurableRegistry, address: Address, disk: Disk) -> None:
        self.durable = durable
        self.address = address
        self.disk = disk
        self.now_ms = 0

    async def ask(self, path: str = PATH, method: str = "GET", **more: Any) -> Reply:
        return await ask(self.address, path, method, **more)

    async def post(self, document: bytes, **headers: str) -> Reply:
        return await self.ask(PATH, "POST", body=document, **headers)


Running = Callable[..., contextlib.AbstractAsyncContextManager[Bed]]


@pytest.fixture
def running(tmp_path: Path, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch) -> Running:
    @contextlib.asynccontextmanager
    async def run(
        listen: str = "127.0.0.1:0", state: str = "run", **section: Any
    ) -> AsyncIterator[Bed]:
        address = parse_address(listen, str(tmp_path), port_min=0)
        state_dir = StateDir(str(tmp_path / state))
        now_ms = [0]
        durable = DurableRegistry(state_dir, log_lines.log, clock_ms=lambda: now_ms[0])
        durable.load()
        durable.start()
        bound = bind(address, "registration")
        server = RegistrationServer(Section(address, **section), durable, log_lines.log)
        await server.start(bound.sock)
        try:
            yield Bed(durable, bound.actual, Disk(durable.store, monkeypatch))
        finally:
            await server.close()
            bound.close()
            await durable.close()
            state_dir.close()

    return run


async def test_post_get_delete(running: Running) -> None:
    async with running() as bed:
        reply = await bed.post(doc("c1", pub(), sub(filter="colour=blue")))
        assert (reply.status, reply.json()["registration"]) == (201, "new")
        assert (await bed.post(doc("c1", sub(filter="colour=blue"), pub()))).status == 200
        assert (await bed.post(doc("c2", sub("h"), app="other"))).status == 201

        found = (await bed.ask()).json()
        assert found["generation"] == 2
        assert [(r["app"], r["client"]) for r in found["registrations"]] == [
            ("other", "c2"),
            ("shop", "c1"),
        ]
        one = found["registrations"][1]
        assert (one["remaining_ms"], one["connections"]) == (30000, 0)
        assert (await bed.ask(f"{PATH}/shop/c1")).json() == one
        for query in ("app=shop", "client=c1", "app=shop&client=c1", "client=%631"):
            assert (await bed.ask(f"{PATH}?{query}")).json()["registrations"] == [one]
        assert (await bed.ask(f"{PATH}?app=none")).json()["registrations"] == []

        reply = await bed.ask(f"{PATH}/shop/c1", "DELETE")
        assert (reply.status, reply.body) == (204, b"")
        assert "content-length" not in reply.headers
        for method in ("GET", "DELETE"):
            assert (await bed.ask(f"{PATH}/shop/c1", method)).status == 404
        assert set(bed.durable.registry.groups()) == {"h"}


async def test_what_get_shows_can_be_posted_again(running: Running) -> None:
    async with running() as bed:
        await bed.post(doc("c1", pub(), sub("h", mode="broadcast"), topics=[{"name": "t"}]))
        one = (await bed.ask(f"{PATH}/shop/c1")).json()
        del one["remaining_ms"], one["connections"]
        reply = await bed.post(json.dumps(one).encode())
        assert (reply.status, reply.json()["registration"]) == (200, "same")


async def test_names_in_a_path_may_hold_anything_a_name_may(running: Running) -> None:
    async with running() as bed:
        await bed.post(doc("%RETRY%/c@1:2", app="a/b"))
        path = f"{PATH}/a%2Fb/%25RETRY%25%2Fc@1:2"
        assert (await bed.ask(path)).json()["client"] == "%RETRY%/c@1:2"
        assert (await bed.ask(path, "DELETE")).status == 204


async def test_errors_and_conflicts_are_bodies(running: Running) -> None:
    async with running() as bed:
        reply = await bed.post(b'{"app": "shop", "client": "c 1"}')
        assert reply.status == 422
        assert reply.json()["errors"] == [
            {
                "path": "client",
                "value": "c 1",
                "message": 'must be a name of 1..127 letters, digits or any of "_.:@/%-"',
            },
        ]
        await bed.post(doc("c1"))
        reply = await bed.post(doc("c2", sub(topic="x")))
        assert reply.status == 409
        assert reply.json()["conflicts"][0]["stands"] == "orders"
        assert reply.json()["error"].startswith("conflict: group g: topic ")


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "GET", 404),
        ("/metrics", "GET", 404),
        ("/healthz", "GET", 404),
        ("/v1/config", "GET", 404),
        ("/v1/drain", "POST", 404),
        (PATH, "DELETE", 405),
        (PATH, "PUT", 405),
        (f"{PATH}/shop/c1", "POST", 405),
        (f"{PATH}/", "GET", 404),
        (f"{PATH}/shop", "DELETE", 404),
        (f"{PATH}/shop/c1/", "DELETE", 404),
        (f"{PATH}//c1", "DELETE", 400),
        (f"{PATH}/shop/..%2f..", "GET", 404),
        (f"{PATH}/shop/%00", "GET", 400),
        (f"{PATH}/shop/%ff", "GET", 400),
        (f"{PATH}/shop/%E2%80%A8", "GET", 400),
        (f"{PATH}?all", "GET", 400),
        (f"{PATH}?app=", "GET", 400),
        (f"{PATH}?app=a&app=b", "GET", 400),
        (f"{PATH}?group=g", "GET", 400),
        (f"{PATH}?" + "&".join(["app=a"] * 9), "GET", 400),
    ],
)
async def test_nothing_else_is_served(
    running: Running, path: str, method: str, status: int
) -> None:
    async with running() as bed:
        reply = await bed.ask(path, method)
        assert reply.status == status
        assert reply.json()["error"]


@pytest.mark.parametrize(("error", "status"), [(errno.ENOSPC, 507), (errno.EROFS, 503)])
async def test_a_disk_that_fails_is_a_clear_answer(
    running: Running, error: int, status: int
) -> None:
    async with running() as bed:
        bed.disk.error = error
        reply = await bed.post(doc("c1"))
        assert reply.status == status
        assert "Nothing has changed; try again" in reply.json()["error"]
        assert reply.headers["retry-after"] == "1"
        assert (await bed.ask()).json()["registrations"] == []
        bed.disk.error = 0
        assert (await bed.post(doc("c1"))).status == 201


async def test_get_does_not_wait_for_the_disk(running: Running) -> None:
    async with running() as bed:
        with bed.disk.held():
            asked = asyncio.ensure_future(bed.post(doc("c1")))
            await bed.disk.entered()
            found = await asyncio.wait_for(bed.ask(), 5)
            assert found.json()["registrations"] == []
            assert not asked.done()
        assert (await asked).status == 201


async def test_many_requests_on_one_connection(running: Running) -> None:
    async with running() as bed:
        reader, writer = await connect(bed.address)
        for expected in (201, 200, 200):
            body = doc("c1")
            writer.write(
                f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                "".encode()
                + body
            )
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert head.startswith(b"HTTP/1.1 %d" % expected)
            length = re.search(rb"content-length: (\d+)", head)
            assert length is not None
            await reader.readexactly(int(length[1]))
        writer.write(f"DELETE {PATH}/shop/c1 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 2)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 404")
        writer.close()


async def test_a_body_is_bounded_before_it_is_read(running: Running) -> None:
    async with running() as bed:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 524289\r\n\r\n"
        reply = await raw(bed.address, head.encode())
        assert (reply.status, reply.json()["error"]) == (413, "at most 524288 bytes")
        padded = doc("c1") + b" " * (524288 - len(doc("c1")))
        assert (await bed.post(padded)).status == 201


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
    ],
)
async def test_browsers_that_were_lured_are_refused(
    running: Running, log_lines: LogLines, headers: dict[str, str]
) -> None:
    async with running() as bed:
        assert (await bed.post(doc("c1"), **headers)).status == 403
        assert not bed.durable.registry.groups()
        assert "registration request refused" in log_lines.text()


async def test_a_token_is_asked_for(running: Running, log_lines: LogLines) -> None:
    async with running("0.0.0.0:0", token=Secret(TOKEN)) as bed:
        bed.address = Address("127.0.0.1", bed.address.port)
        reply = await bed.post(doc("c1"))
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert (await bed.post(doc("c1"), Authorization=f"Bearer {TOKEN}x")).status == 401
        assert (await bed.ask()).status == 401
        assert (await bed.post(doc("c1"), Authorization=f"Bearer {TOKEN}")).status == 201
        assert TOKEN not in log_lines.text()


async def test_an_open_address_without_a_token_is_not_served(running: Running) -> None:
    with pytest.raises(ValueError, match="needs a token"):
        async with running("0.0.0.0:0"):
            pass


async def test_a_unix_socket(running: Running) -> None:
    async with running("unix:registration.sock") as bed:
        assert os.stat(bed.address.path).st_mode & 0o777 == 0o600
        assert (await bed.post(doc("c1"))).status == 201
        assert (await bed.post(doc("c1"), Origin="http://localhost")).status == 403


# --- what the documentation shows -----------------------------------------------------------------

EXAMPLE = re.compile(r"```console\n(.*?)```", re.DOTALL)


def examples() -> list[tuple[str, str]]:
    """(command, what it prints) of every `$ curl` in the documentation, in order."""
    found = []
    for block in EXAMPLE.findall((ROOT / "docs" / "registration.md").read_text()):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.split("\n")
            last = next(i for i, line in enumerate(lines) if not line.endswith("\\"))
            command = "\n".join(lines[: last + 1]).replace("\\\n", " ")
            found.append((command, "\n".join(lines[last + 1 :]).strip()))
    return found


async def as_curl_would(bed: Bed, words: list[str]) -> str:
    """The few options that the documentation uses, where no curl is installed."""
    method, body, more = "GET", b"", ""
    rest = iter(words[1:-1])
    for word in rest:
        assert word in ("-s", "-X", "-d", "-w"), f"teach the test {word}"
        if word == "-X":
            method = next(rest)
        elif word == "-d":
            body = next(rest).encode()
            method = "POST"
        elif word == "-w":
            more = next(rest)
    path = words[-1].partition(str(bed.address))[2]
    reply = await ask(bed.address, path, method, body)
    return reply.body.decode() + more.replace("%{http_code}", str(reply.status))


async def test_the_examples_of_the_documentation_are_true(running: Running) -> None:
    ran = examples()
    assert len(ran) >= 6
    curl = shutil.which("curl")
    for real in (False, True) if curl else (False,):
        async with running(state=f"run-{real}") as bed:
            for command, expected in ran:
                words = shlex.split(command.replace("127.0.0.1:7071", str(bed.address)))
                assert words[0] == "curl"
                if real:
                    done = await asyncio.to_thread(
                        subprocess.run, words, capture_output=True, text=True, timeout=20
                    )
                    told = done.stdout
                else:
                    told = await as_curl_would(bed, words)
                assert told.strip() == expected, command
