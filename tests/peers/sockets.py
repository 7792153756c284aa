"""What the peers need of sockets: addresses as text, free ports, ending a connection with a
reset."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import cast

Address = tuple[str, int] | str
"""(host, port), or the path of a UNIX socket."""


def parse_address(text: str) -> Address:
    """ "127.0.0.1:80", "[::1]:80" or "unix:/path", as the configuration writes them."""
    if text.startswith("unix:"):
        return text.removeprefix("unix:")
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def tcp_address(text: str) -> tuple[str, int]:
    """The same of an address that is known to be TCP."""
    found = parse_address(text)
    assert not isinstance(found, str), text
    return found


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago, outside the range that connect() takes
    from."""
    for port in range(_next_port[0], 32000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _next_port[0] = port + 1
        return port
    _next_port[0] = FIRST_PORT
    return free_port()


FIRST_PORT = 21000
_next_port = [FIRST_PORT + os.getpid() * 16 % 8000]


def reset(transport: asyncio.BaseTransport) -> None:
    """Close with RST: what the peer has not read yet is lost to it, as when a process is killed."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    cast("asyncio.Transport", transport).abort()  # uvloop has classes of its own
