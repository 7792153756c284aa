"""Where to listen or connect: `host:port`, `[v6]:port` or `unix:path`."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass

from fastmesh import limits as bounds

LOOPBACK_NAMES = ("localhost",)
HOSTNAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?\Z")


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen or connect: a host and port, or the path of a UNIX socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def is_unix(self) -> bool:
        return bool(self.path)

    @property
    def is_literal(self) -> bool:
        """True when no name has to be resolved."""
        return self.is_unix or _ip(self.host) is not None

    @property
    def is_loopback(self) -> bool:
        if self.is_unix or self.host in LOOPBACK_NAMES:
            return True
        ip = _ip(self.host)
        return ip is not None and ip.is_loopback

    def __str__(self) -> str:
        if self.is_unix:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, base: str = "", *, port_min: int = 1) -> Address:
    """`host:port`, `[v6]:port` or `unix:path`. Raises ValueError that says what would be right."""
    if text.startswith("unix:"):
        return unix_address(text[5:], base)
    host, colon, port_text = text.rpartition(":")
    if not colon or not host:
        raise ValueError('must be "host:port", "[v6 address]:port" or "unix:path"')
    if not (port_text.isascii() and port_text.isdigit()) or not (
        port_min <= int(port_text[:6]) <= 65535
    ):
        raise ValueError(f"the port must be {port_min}..65535")
    if host.startswith("[") and host.endswith("]"):
        ip = _ip(host[1:-1])
        if ip is None or ip.version != 6:
            raise ValueError("what stands in brackets must be an IPv6 address")
        return Address(host=str(ip), port=int(port_text))
    if ":" in host:
        raise ValueError('an IPv6 address stands in brackets: "[::1]:12200"')
    ip = _ip(host)
    if ip is None and re.fullmatch(r"[0-9.]+", host):
        raise ValueError("is not an IPv4 address")
    if ip is None and (len(host) > 253 or not HOSTNAME.match(host)):
        raise ValueError("must have an IP address or a host name before the port")
    return Address(host=str(ip) if ip else host.lower().rstrip("."), port=int(port_text))


def unix_address(path: str, base: str) -> Address:
    if not path or "\0" in path:
        raise ValueError('must be "unix:" and a path')
    full = os.path.normpath(os.path.join(base, path))
    size = len(os.fsencode(full))
    if size > bounds.UNIX_PATH_BYTES_MAX:
        raise ValueError(
            f"the path of a UNIX socket is at most {bounds.UNIX_PATH_BYTES_MAX} bytes;"
            f" {full} has {size}"
        )
    return Address(path=full)


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
