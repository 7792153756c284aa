"""Who is refused by the admin interface, and that nothing secret ever leaves it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastmesh import limits
from fastmesh.address import Address
from fastmesh.config import Admin, Secret
from fastmesh.http.gate import Gate, Refused, split_host
from tests.admin.http import ask, raw
from tests.conftest import SMALL, LogLines
from tests.fake_engine import Event

Running = Callable[..., Any]
CANARY = "canary-4c1f0e9b7a35d862"


def refused(gate: Gate, **headers: str) -> int:
    """The status, 0 when it is let in."""
    try:
        gate.check(
            {k.replace("_", "-").lower().encode(): v.encode("latin-1") for k, v in headers.items()}
        )
    except Refused as no:
        return no.status
    return 0


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 0),
        ("LOCALHOST:7070", 0),
        ("127.0.0.1:7070", 0),
        ("[::1]:7070", 0),
        ("mesh.internal:7070", 0),
        ("evil.example", 403),
        ("localhost.evil.example:7070", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.5:7070", 403),
        ("", 403),
        ("localhost:", 0),
        ("localhost:abc", 403),
        ("localhost@evil.example", 403),
        ("[::1", 403),
        ("[::1]evil", 403),
        ("localhost\xff", 403),
    ],
)
def test_hosts_on_loopback(host: str, status: int) -> None:
    gate = Gate(Admin(Address("127.0.0.1", 7070), hosts=("mesh.internal",)))
    assert refused(gate, host=host) == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 0),
        ({"origin": "http://localhost:7070"}, 0),
        ({"origin": "https://localhost:7070"}, 403),
        ({"origin": "http://localhost:8080"}, 403),
        ({"origin": "http://localhost"}, 403),
        ({"origin": "http://127.0.0.1:7070"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "same-origin"}, 0),
    ],
)
def test_origins(headers: dict[str, str], status: int) -> None:
    gate = Gate(Admin(Address("127.0.0.1", 7070)))
    assert refused(gate, host="localhost:7070", **headers) == status


def test_elsewhere_a_literal_address_is_a_host_and_a_foreign_name_is_none() -> None:
    gate = Gate(Admin(Address("0.0.0.0", 7070), Secret(CANARY)))
    token = f"Bearer {CANARY}"
    assert refused(gate, host="10.0.0.5:7070", authorization=token) == 0
    assert refused(gate, host="evil.example:7070", authorization=token) == 403
    assert refused(gate, host="10.0.0.5:7070") == 401


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {CANARY}",
        f"Bearer {CANARY[:-1]}",
        f"Bearer {CANARY}x",
        CANARY,
        f"Bearer {CANARY.upper()}",
        "Bearer \xff",
    ],
)
def test_wrong_tokens(header: str) -> None:
    gate = Gate(Admin(Address("127.0.0.1", 1), Secret(CANARY)))
    assert refused(gate, host="localhost", authorization=header) == 401
    assert refused(gate, host="localhost", authorization=f"bearer {CANARY}") == 0


def test_brute_force_is_slowed_and_then_not_even_read() -> None:
    now = [0.0]
    gate = Gate(Admin(Address("127.0.0.1", 1), Secret(CANARY)), clock=lambda: now[0])
    statuses = [refused(gate, host="localhost", authorization="Bearer x") for _ in range(20)]
    assert statuses == [401] * limits.ADMIN_FAILURES_PER_S + [429] * (
        20 - limits.ADMIN_FAILURES_PER_S
    )
    assert refused(gate, host="localhost", authorization=f"Bearer {CANARY}") == 429
    now[0] = 1.5
    assert refused(gate, host="localhost", authorization=f"Bearer {CANARY}") == 0
    with pytest.raises(Refused) as no:
        gate.check({b"host": b"localhost"})
    assert no.value.delay_s >= 0.1


@pytest.mark.parametrize("text", ["", "a b", "[", "[]", "]", ":", "::1"])
def test_strange_hosts_never_raise(text: str) -> None:
    gate = Gate(Admin(Address("127.0.0.1", 1)))
    split_host(text)
    assert refused(gate, host=text) == 403


def test_over_the_wire_foreign_hosts_and_origins_change_nothing(running: Running) -> None:
    async def main() -> None:
        async with running() as mesh:
            at = mesh.admin_address
            assert (await ask(at, "/v1/drain", "POST", Host="evil.example")).status == 403
            assert (await ask(at, "/v1/drain", "POST", Origin="http://evil.example")).status == 403
            assert (await ask(at, "/metrics", Host="evil.example")).status == 403
            assert mesh.state == "serving"

    asyncio.run(main())


def test_a_wrong_token_waits_without_keeping_others_waiting(
    running: Running, config_file: Path
) -> None:
    token = config_file.parent / "token"
    token.write_text(CANARY)
    token.chmod(0o600)
    config_file.write_text(
        SMALL.replace(
            'admin: {listen: "127.0.0.1:0"}', 'admin: {listen: "127.0.0.1:0", token_file: token}'
        )
    )

    async def main() -> None:
        async with running() as mesh:
            loop = asyncio.get_running_loop()
            began = loop.time()
            wrong = asyncio.create_task(
                ask(mesh.admin_address, "/v1/status", Authorization="Bearer x")
            )
            right = await ask(mesh.admin_address, "/v1/status", Authorization=f"Bearer {CANARY}")
            assert right.status == 200
            reply = await wrong
            assert loop.time() - began >= limits.ADMIN_PENALTY_S
            assert reply.status == 401
            assert reply.headers["www-authenticate"] == "Bearer"

    asyncio.run(main())


@pytest.mark.parametrize(
    "target",
    [
        "/../../../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/%2e%2e/etc/passwd",
        "/v1/config/../../etc/passwd",
        "/v1/config%00",
        "//etc/passwd",
        "/v1\\config",
        "/v1/config;x",
        "http://evil.example/v1/config",
        "*",
        "/%0d%0aX-Evil:1",
        "/\xff\xfe",
    ],
)
def test_strange_paths_are_404_or_400_and_nothing_is_echoed_raw(
    running: Running, target: str
) -> None:
    async def main() -> None:
        async with running() as mesh:
            reply = await raw(
                mesh.admin_address,
                b"GET "
                + target.encode("latin-1")
                + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
            )
            assert reply.status in (400, 404)
            assert b"root:" not in reply.raw
            assert b"evil" not in reply.raw.lower()

    asyncio.run(main())


def test_request_bytes_cannot_forge_log_lines_or_headers(
    running: Running, log_lines: LogLines
) -> None:
    async def main() -> None:
        async with running() as mesh:
            reply = await raw(
                mesh.admin_address,
                b"GET /\x1b[31m\xe2\x80\xae HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n",
            )
            assert reply.status in (400, 403)
            await raw(
                mesh.admin_address,
                b"GET /a%0aerror=1 HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n",
            )
            mesh.engine.say(
                Event(
                    "closed",
                    b=1,
                    c=4,
                    data=b"1.2.3.4:5 " + b"\r\n2026 error forged\x1b[0m".hex().encode(),
                )
            )
            await asyncio.sleep(0)

    asyncio.run(main())
    text = log_lines.text()
    assert "\x1b" not in text
    assert not any(line.startswith("2026 error") for line in text.splitlines())


def test_a_planted_secret_is_found_nowhere(
    running: Running, config_file: Path, log_lines: LogLines, caplog: pytest.LogCaptureFixture
) -> None:
    token = config_file.parent / "token"
    token.write_text(CANARY)
    token.chmod(0o600)
    config_file.write_text(
        SMALL.replace(
            'admin: {listen: "127.0.0.1:0"}', 'admin: {listen: "127.0.0.1:0", token_file: token}'
        )
    )
    caplog.set_level(logging.DEBUG)
    seen: list[bytes] = []

    async def main() -> None:
        async with running() as mesh:
            for method, path in (
                ("GET", "/healthz"),
                ("GET", "/readyz"),
                ("GET", "/metrics"),
                ("GET", "/v1/status"),
                ("GET", "/v1/connections"),
                ("GET", "/v1/routes"),
                ("GET", "/v1/config"),
                ("GET", "/v1/samples"),
                ("POST", "/v1/reload"),
                ("GET", "/nothing"),
            ):
                reply = await ask(
                    mesh.admin_address, path, method, Authorization=f"Bearer {CANARY}"
                )
                assert reply.status in (200, 404), path
                seen.append(reply.raw)
            assert b"<redacted>" in b"".join(seen)
            seen.append(
                (await ask(mesh.admin_address, "/v1/config", Authorization=f"Bearer {CANARY}x")).raw
            )
            seen.append(repr(mesh.config).encode())
            token.write_text(CANARY + " no longer one token")
            reply = await ask(
                mesh.admin_address, "/v1/reload", "POST", Authorization=f"Bearer {CANARY}"
            )
            assert reply.status == 422
            seen.append(reply.raw)

    asyncio.run(main())
    everything = b"".join(seen) + log_lines.text().encode() + caplog.text.encode()
    assert CANARY.encode() not in everything
