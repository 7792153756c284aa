"""Host names of endpoints to addresses, asked again and again; the last good answer is kept.

The first look-up is bounded in time, so that a dead resolver delays neither start nor reload: an
endpoint whose name is not known yet is in the snapshot without an address and is taken up when the
name resolves.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, Protocol

import msgspec

from fastmesh import limits, saved
from fastmesh.address import Address
from fastmesh.config import Config

Resolve = Callable[[str], Awaitable[list[str]]]


async def resolve_with_system(host: str) -> list[str]:
    """IP addresses of a name, in the resolver's order, without doubles. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


class Lines(Protocol):
    """The part of a log that is needed here."""

    def info(self, event: str, **fields: str | int) -> None: ...
    def warning(self, event: str, **fields: str | int) -> None: ...


Addresses = Annotated[list[saved.Text], msgspec.Meta(max_length=limits.ADDRESSES_PER_NAME_MAX)]


class SavedNames(msgspec.Struct, omit_defaults=True):
    known: Annotated[
        dict[saved.Text, Addresses], msgspec.Meta(max_length=limits.SAVED_NAMES_MAX)
    ] = {}
    """Name -> IP addresses."""


class Discovery:
    """Knows the addresses of every name in use. Only the main loop touches it."""

    def __init__(self, log: Lines, resolve: Resolve = resolve_with_system) -> None:
        self._log = log
        self._resolve = resolve
        self._known: dict[str, tuple[str, ...]] = {}
        self._late: dict[str, asyncio.Task[bool]] = {}

    def addresses(self, address: Address) -> tuple[Address, ...]:
        """Where an endpoint's connections go; () while its name is not resolved."""
        if address.is_literal:
            return (address,)
        return tuple(
            Address(host=ip, port=address.port) for ip in self._known.get(address.host, ())
        )

    def save(self) -> SavedNames:
        """The last good answers."""
        return SavedNames({name: list(ips) for name, ips in self._known.items()})

    def restore(self, data: object) -> None:
        """Begin with the answers that another process had: `learn` asks only for other names, and
        the first snapshot has the same endpoints as the last one of that process. Raises
        HandoverError with nothing changed."""
        found = saved.read(data, SavedNames, "names")
        for name, ips in found.known.items():
            for ip in ips:
                try:
                    ipaddress.ip_address(ip)
                except ValueError:
                    raise saved.wrong(f"names.{name[:64]}", ip, "must be an IP address") from None
        self._known = {name: tuple(ips) for name, ips in found.known.items() if ips}

    async def learn(
        self,
        config: Config,
        also: Iterable[Address] = (),
        timeout_s: float = limits.RESOLVE_TIMEOUT_S,
    ) -> None:
        """Make sure that every name was asked once; look-ups that are late go on by themselves.
        `also`: addresses that stand elsewhere."""
        names = {name for name in _names(config, also) if name not in self._known}
        await self._ask(names, timeout_s)

    async def refresh(
        self,
        config: Config,
        also: Iterable[Address] = (),
        timeout_s: float = limits.RESOLVE_TIMEOUT_S,
    ) -> bool:
        """Ask for all names again and forget those no longer used. True when an answer changed."""
        names = set(_names(config, also))
        self._known = {name: ips for name, ips in self._known.items() if name in names}
        before = dict(self._known)
        await self._ask(names, timeout_s)
        return before != self._known

    async def _ask(self, names: Iterable[str], timeout_s: float) -> None:
        gate = asyncio.Semaphore(limits.RESOLVE_CONCURRENT_MAX)
        for name in names:
            if name not in self._late:
                self._late[name] = asyncio.ensure_future(self._one(name, gate))
        if self._late:
            # Not cancelled when late: the system resolver cannot be, and its answer is welcome then
            # too.
            await asyncio.wait(self._late.values(), timeout=timeout_s)
        for name in [n for n, task in self._late.items() if task.done()]:
            del self._late[name]

    async def _one(self, name: str, gate: asyncio.Semaphore) -> bool:
        async with gate:
            try:
                ips = await self._resolve(name)
            except OSError as error:
                kept = len(self._known.get(name, ()))
                self._log.warning("name not resolved", host=name, reason=str(error), kept=kept)
                return False
        # Sorted, because resolvers rotate their answers and a rotation is not a change.
        chosen = tuple(sorted(ips)[: limits.ADDRESSES_PER_NAME_MAX])
        if chosen and chosen != self._known.get(name):
            self._known[name] = chosen
            self._log.info("name resolved", host=name, addresses=",".join(chosen))
        return bool(chosen)

    def close(self) -> None:
        for task in self._late.values():
            task.cancel()
        self._late.clear()


def _names(config: Config, also: Iterable[Address]) -> Iterable[str]:
    listed = (e.address for c in config.clusters for e in c.endpoints)
    return dict.fromkeys(a.host for a in (*listed, *also) if not a.is_literal)
