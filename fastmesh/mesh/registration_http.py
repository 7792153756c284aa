"""The registration interface: `/v1/registrations` on a listener of its own, and nothing else.

It is apart from the admin interface because applications need it and must not need more: here
nobody can read metrics, reload or drain.
"""

from __future__ import annotations

import asyncio
import socket
import urllib.parse
from collections.abc import Collection
from typing import Any

from fastmesh import limits
from fastmesh.http.gate import Gate, Guarded
from fastmesh.http.server import Answer, HttpServer, Request, error, to_json, wrong_method
from fastmesh.mesh.durable import DurableRegistry
from fastmesh.mesh.registration import NAME_RULE, Outcome, is_name
from fastmesh.observe.log import Log

PATH = "/v1/registrations"
RETRY_AFTER = ("retry-after", "1")


class RegistrationServer:
    """Serves on one listening socket from `start()` to `close()`."""

    def __init__(self, guarded: Guarded, durable: DurableRegistry, log: Log) -> None:
        self._server = HttpServer(
            "registration",
            Gate(guarded),
            RegistrationViews(durable),
            log,
            body_bytes_max=limits.REGISTRATION_BODY_BYTES_MAX,
        )

    async def start(self, sock: socket.socket) -> None:
        await self._server.start(sock)

    async def hold(self, timeout_s: float, but: Collection[asyncio.Task[Any] | None] = ()) -> int:
        """As HttpServer.hold."""
        return await self._server.hold(timeout_s, but)

    async def resume(self) -> None:
        await self._server.resume()

    async def close(self) -> None:
        await self._server.close()


class RegistrationViews:
    """The handler of the registration interface."""

    def __init__(self, durable: DurableRegistry) -> None:
        self._durable = durable

    async def __call__(self, request: Request) -> Answer:
        if request.path == PATH:
            if request.method == "POST":
                return _answer(await self._durable.register(request.body))
            if request.method == "GET":
                return self._list(request.query)
            return wrong_method("GET", "POST")
        if request.path.startswith(PATH + "/"):
            return await self._one(request)
        return error(404, "no such path", paths=[PATH, PATH + "/{app}/{client}"])

    def _list(self, query: str) -> Answer:
        try:
            wanted = _names(query)
        except ValueError as wrong:
            return error(400, str(wrong))
        registry, now_ms = self._durable.registry, self._durable.clock_ms()
        found = registry.clients(wanted.get("app"), wanted.get("client"))
        body = b",\n".join(client.document(now_ms) for client in found)
        head = b'{"generation":%d,"registrations":[\n' % registry.generation
        return Answer(200, head + body + b"]}\n")

    async def _one(self, request: Request) -> Answer:
        # Split before decoding: a name may hold an encoded slash.
        parts = request.path[len(PATH) + 1 :].split("/")
        if request.method not in ("GET", "DELETE"):
            return wrong_method("GET", "DELETE")
        if len(parts) != 2:
            return error(404, "no such path", paths=[PATH, PATH + "/{app}/{client}"])
        app, client = (urllib.parse.unquote(part, errors="replace") for part in parts)
        for name in (app, client):
            if not is_name(name):
                return error(400, f"{name[: limits.MESH_NAME_CHARS_MAX]}: {NAME_RULE}")
        if request.method == "DELETE":
            return _answer(await self._durable.remove(app, client))
        found = self._durable.registry.client(app, client)
        if found is None:
            return error(404, f"{app}/{client} is not registered")
        return Answer(200, found.document(self._durable.clock_ms()) + b"\n")


def _names(query: str) -> dict[str, str]:
    """`app=...&client=...`, each at most once. Raises ValueError."""
    found: dict[str, str] = {}
    pairs = urllib.parse.parse_qsl(
        query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=8
    )
    for key, value in pairs:
        if key not in ("app", "client"):
            raise ValueError(f"{key[:64]}: ask with app and client")
        if key in found:
            raise ValueError(f"{key} is given twice")
        if not is_name(value):
            raise ValueError(f"{key} {NAME_RULE}")
        found[key] = value
    return found


def _answer(outcome: Outcome) -> Answer:
    body = b"" if outcome.status == 204 else to_json(outcome.body)
    retry = (RETRY_AFTER,) if outcome.status in (503, 507) else ()
    return Answer(outcome.status, body, headers=retry)
