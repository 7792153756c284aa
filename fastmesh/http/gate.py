"""Who may talk to a local HTTP interface (admin, registration).

A UNIX socket is guarded by its mode and the peer's uid. On TCP, a browser that was lured here (DNS
rebinding, a form posted across origins) is told by its Host and Origin; a token is asked for
wherever one is configured, which the configuration demands for every address that is not loopback.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from fastmesh import limits
from fastmesh.address import LOOPBACK_NAMES, Address
from fastmesh.config import Secret

_UCRED = struct.Struct("3i")


class Refused(Exception):
    """The answer is `status`, after `delay_s`."""

    def __init__(self, status: int, reason: str, delay_s: float = 0.0) -> None:
        self.status = status
        self.reason = reason
        self.delay_s = delay_s
        super().__init__(reason)


class Guarded(Protocol):
    """What a section of the configuration says about an HTTP listener."""

    @property
    def listen(self) -> Address: ...
    @property
    def token(self) -> Secret | None: ...
    @property
    def hosts(self) -> tuple[str, ...]: ...


class Gate:
    """Decides on one request at a time from its headers (lower-case names)."""

    def __init__(self, guarded: Guarded, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ValueError where a token is needed and there is none: the configuration says that
        in better words, but must not be the only one to look."""
        if not guarded.listen.is_loopback and guarded.token is None:
            raise ValueError(f"{guarded.listen} is not a loopback address: it needs a token")
        self._unix = guarded.listen.is_unix
        self._loopback = guarded.listen.is_loopback
        self._token = guarded.token
        self._names = {*LOOPBACK_NAMES, *guarded.hosts}
        self._clock = clock
        self._failures = 0
        self._failures_since = clock()

    def check_peer(self, sock: socket.socket) -> bool:
        """UNIX sockets: our own uid or root, nobody else, whatever the path's mode says by now."""
        if not self._unix:
            return True
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        uid: int = _UCRED.unpack(raw)[1]
        return uid in (0, os.geteuid())

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises Refused."""
        if not self._unix:
            host = headers.get(b"host", b"").decode("latin-1")
            if not self._host_allowed(host):
                raise Refused(403, "this Host is not served here")
            self._check_origin(headers)
        elif b"origin" in headers:
            raise Refused(403, "no browser has business here")
        if self._token is not None:
            self._check_token(headers.get(b"authorization", b""))

    def _host_allowed(self, host: str) -> bool:
        name, port = split_host(host)
        if name is None or not (port == "" or (port.isascii() and port.isdigit())):
            return False
        if name in self._names:
            return True
        try:
            ip = ipaddress.ip_address(name)
        except ValueError:
            return False
        # DNS rebinding needs a name. A literal address is what the client really typed.
        return ip.is_loopback or not self._loopback

    def _check_origin(self, headers: Mapping[bytes, bytes]) -> None:
        site = headers.get(b"sec-fetch-site", b"none")
        if site not in (b"none", b"same-origin"):
            raise Refused(403, "this Origin is not served here")
        origin = headers.get(b"origin")
        if origin is None:
            return
        scheme, _, rest = origin.decode("latin-1").partition("://")
        # Same host *and* port as the request itself: another service on this host is foreign too.
        if scheme != "http" or rest.lower() != headers[b"host"].decode("latin-1").lower():
            raise Refused(403, "this Origin is not served here")

    def _check_token(self, header: bytes) -> None:
        now = self._clock()
        if now - self._failures_since >= 1.0:
            self._failures, self._failures_since = 0, now
        if self._failures >= limits.ADMIN_FAILURES_PER_S:
            raise Refused(429, "too many wrong tokens", limits.ADMIN_PENALTY_S)
        scheme, _, given = header.partition(b" ")
        assert self._token is not None
        right = self._token.reveal().encode()
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), right):
            self._failures += 1
            raise Refused(401, "a token is required", limits.ADMIN_PENALTY_S)


def split_host(host: str) -> tuple[str | None, str]:
    """A Host header's name (lower case) and port; (None, "") when it is neither."""
    host = host.strip().lower()
    if host.startswith("["):
        name, bracket, rest = host[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            return None, ""
        return name, rest[1:]
    name, _, port = host.partition(":")
    return (name.rstrip(".") or None), port
