"""Keeps one registration alive: makes it, renews its lease, makes it anew when it was forgotten.

POST both makes and renews, so there is one request only: 201 says that the mesh did not know us,
200 that it did. A 201 where 200 was due means that it forgot us, and with us what our connections
had subscribed to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from urllib.parse import quote

from fastmesh import limits
from fastmesh.address import Address
from fastmesh.client import http
from fastmesh.client.backoff import Backoff
from fastmesh.client.errors import NotTakenError, RegistrationError
from fastmesh.client.model import Group, Stats
from fastmesh.errors import Problem

log = logging.getLogger("fastmesh.client")

PATH = "/v1/registrations"


class Registrar:
    """`register()` once, then `run()` as a task; `remove()` at the end."""

    def __init__(
        self,
        address: Address,
        *,
        app: str,
        client: str,
        topics: Sequence[str],
        groups: Sequence[Group],
        token: str | None,
        lease_ms: int,
        stats: Stats,
        on_forgotten: Callable[[], None],
    ) -> None:
        self._address = address
        self._token = token
        self._target = f"{PATH}/{quote(app, safe='')}/{quote(client, safe='')}"
        self._document = {
            "app": app,
            "client": client,
            "topics": [{"name": name} for name in topics],
            "groups": [group.document() for group in groups],
            "lease_ms": lease_ms,
        }
        self._interval_s = lease_ms / limits.CLIENT_LEASE_PARTS / 1000
        self._stats = stats
        self._on_forgotten = on_forgotten
        self._wanted = asyncio.Event()
        self._known = False
        self.rounds = 0
        """Answers of the registration, whatever they said."""

    async def register(self) -> None:
        """One request. Raises RegistrationError when it is refused, NotTakenError when it failed
        in a way that may pass."""
        try:
            answer = await http.call(
                self._address,
                "POST",
                PATH,
                self._document,
                token=self._token,
                timeout_s=limits.CLIENT_HTTP_TIMEOUT_MS / 1000,
            )
        except (OSError, http.HttpError) as error:
            reason = str(error) or type(error).__name__
            raise NotTakenError(f"the registration at {self._address} failed: {reason}") from error
        self.rounds += 1
        if answer.status in (200, 201):
            self._stats.registrations += 1
            forgotten = answer.status == 201 and self._known
            self._known = True
            if forgotten:
                self._stats.forgotten += 1
                log.info("the mesh had forgotten this client; registered again")
                self._on_forgotten()
            return
        reason, problems = _explain(answer)
        if answer.status in (400, 401, 403, 409, 413, 422):
            raise RegistrationError(answer.status, reason, problems)
        raise NotTakenError(
            f"the registration at {self._address} failed: {reason} (HTTP {answer.status})"
        )

    def renew_soon(self) -> None:
        """The mesh does not seem to know us: do not wait for the lease."""
        self._wanted.set()

    async def run(self) -> None:
        """Renews until it is cancelled; what fails is logged and tried again."""
        backoff = Backoff()
        delay_s = self._interval_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._wanted.wait()
            self._wanted.clear()
            try:
                await self.register()
            except (RegistrationError, NotTakenError) as error:
                delay_s = min(backoff.next_s(), self._interval_s)
                log.warning("%s; next attempt in %.2f s", error, delay_s)
            else:
                backoff.reset()
                delay_s = self._interval_s

    async def remove(self, timeout_s: float) -> None:
        """Best effort: what stays behind ends with its lease."""
        try:
            await http.call(
                self._address, "DELETE", self._target, token=self._token, timeout_s=timeout_s
            )
        except (OSError, http.HttpError) as error:
            log.info("the registration stays until its lease ends: %s", error)


def _explain(answer: http.Answer) -> tuple[str, list[Problem]]:
    document = answer.document if isinstance(answer.document, dict) else {}
    reason = document.get("error") or document.get("message")
    problems = [
        Problem(str(e.get("path", "")), e.get("value"), str(e.get("message", "")))
        for e in document.get("errors") or []
        if isinstance(e, dict)
    ]
    words = {401: "a token is required", 409: "it contradicts another client's"}
    return str(reason or words.get(answer.status, "refused")), problems
