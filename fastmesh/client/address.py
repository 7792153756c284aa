"""Where the mesh and its registration listen, and connecting there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastmesh.address import Address, parse_address

P = TypeVar("P", bound=asyncio.Protocol)


def parse(what: str, text: str) -> Address:
    """`host:port`, `[v6]:port` or `unix:path`. `what` names the argument in the ValueError."""
    try:
        return parse_address(text)
    except ValueError as error:
        raise ValueError(f"{what} {text!r} {error}") from None


def parse_url(what: str, text: str) -> Address:
    """The same for the registration, where `http://host:port` is usual."""
    scheme, separator, rest = text.partition("://")
    if separator and scheme != "http":
        raise ValueError(f"{what} {text!r} must be http://host:port or unix:path, without TLS")
    return parse(what, rest.removesuffix("/") if separator else text)


async def connect(address: Address, factory: Callable[[], P]) -> P:
    """The protocol of a connection that stands. Raises OSError."""
    loop = asyncio.get_running_loop()
    if address.is_unix:
        _, protocol = await loop.create_unix_connection(factory, address.path)
    else:
        _, protocol = await loop.create_connection(factory, address.host, address.port)
    return protocol
