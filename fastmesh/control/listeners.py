"""Listening sockets: bound before the snapshot that needs them, kept by address, given back in
order.

A UNIX socket's path is taken only from somebody who no longer answers, is 0600, and is removed at
the end only when the inode is still ours: a successor's path survives us.

A socket can be handed over: the successor `adopt`s a duplicate, which it does not `own` before its
predecessor has let go; the predecessor `forget`s its own. Neither of them removes the path then.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fastmesh import limits
from fastmesh.address import LOOPBACK_NAMES, Address
from fastmesh.errors import ListenError


@dataclass(slots=True)
class BoundSocket:
    """A socket that listens, and the way to give it back."""

    address: Address
    """As configured."""
    sock: socket.socket
    inode: tuple[int, int] | None = None
    owned: bool = True
    """False while another process still has it, too: closing is nobody's end then."""
    actual: Address = field(init=False)
    """With the port that the kernel chose, where port 0 was asked for."""
    closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.actual = self.address
        if not self.address.is_unix:
            host, port = self.sock.getsockname()[:2]
            self.actual = Address(host=host, port=port)

    def close(self) -> None:
        """Close, and remove the path if it is still this socket's. A second call does nothing."""
        if self.closed:
            return
        self.closed = True
        if self.owned:
            self._remove_path()
        self.sock.close()

    def own(self) -> None:
        """Whoever else had it has let go: closing is the end of its path, too."""
        self.owned = True
        if self.closed:
            self._remove_path()

    def forget(self) -> None:
        """Close our duplicate of what a successor has: it listens on, and the path stays."""
        self.owned = False
        self.close()

    def _remove_path(self) -> None:
        if self.inode is None:
            return
        with contextlib.suppress(OSError):
            found = os.lstat(self.address.path)
            if (found.st_dev, found.st_ino) == self.inode:
                os.unlink(self.address.path)


def adopt(address: Address, name: str, fd: int, inode: tuple[int, int] | None) -> BoundSocket:
    """A socket that another process bound to this address (as configured there) and listens on.

    `inode` is that of its path, for a UNIX socket. The descriptor is taken over, and closed when
    this raises ValueError: it is not what its name says.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ValueError(f"listener {name}: descriptor {fd} is no socket")
        sock = socket.socket(fileno=fd)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise ValueError(f"listener {name}: descriptor {fd}: {error.strerror}") from error
    except ValueError:
        os.close(fd)
        raise
    try:
        _check_listening(sock, address, name)
        sock.setblocking(False)  # it is already; this object has to know
        sock.set_inheritable(False)
    except OSError as error:
        sock.close()
        raise ValueError(f"listener {name}: {error.strerror or error}") from error
    except ValueError:
        sock.close()
        raise
    return BoundSocket(address, sock, inode if address.is_unix else None, owned=False)


def _check_listening(sock: socket.socket, address: Address, name: str) -> None:
    """Raises ValueError, OSError."""
    wanted = socket.AF_UNIX
    if not address.is_unix:
        host = _host(address)
        wanted = socket.AF_INET6 if ":" in host else socket.AF_INET
    if sock.family != wanted or sock.type != socket.SOCK_STREAM:
        raise ValueError(
            f"listener {name}: a socket of {sock.family!r} and {sock.type!r} came; {address} needs"
            f" a stream socket of {wanted!r}"
        )
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError(f"listener {name}: the socket that came does not listen")
    at = sock.getsockname()
    if address.is_unix:
        right = at == address.path
    else:
        same_host = ipaddress.ip_address(at[0]) == ipaddress.ip_address(host)
        right = same_host and address.port in (0, at[1])
    if not right:
        raise ValueError(
            f"listener {name}: a socket bound to {ascii(at)[: limits.LOG_VALUE_CHARS_MAX]} came;"
            f" it must be bound to {address}"
        )


def _host(address: Address) -> str:
    return "127.0.0.1" if address.host in LOOPBACK_NAMES else address.host


def bind(address: Address, name: str) -> BoundSocket:
    """Bind and listen, non-blocking. Raises ListenError."""
    try:
        return _bind_unix(address) if address.is_unix else _bind_tcp(address)
    except OSError as error:
        raise ListenError(name, str(address), error.strerror or str(error)) from error


def _bind_tcp(address: Address) -> BoundSocket:
    host = _host(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        # Only lets go of connections in TIME_WAIT: two live listeners still collide.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Otherwise [::] would take 0.0.0.0 along, and only on some hosts.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, address.port))
        sock.listen(limits.LISTEN_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return BoundSocket(address, sock)


def _bind_unix(address: Address) -> BoundSocket:
    path = address.path
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    _clear_stale(path)
    sock = socket.socket(
        socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )
    try:
        # The mode has to be right from the first instant: chmod after bind leaves a gap.
        before = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        found = os.lstat(path)
        sock.listen(limits.LISTEN_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return BoundSocket(address, sock, (found.st_dev, found.st_ino))


def _clear_stale(path: str) -> None:
    """Remove a socket that nobody answers on. Raises OSError when somebody does, or it is no
    socket."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EEXIST, "something that is not a socket stands there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # its backlog is full: very much alive
    raise OSError(errno.EADDRINUSE, "somebody listens there")


class Listeners:
    """The sockets in use, by address: a listener that is renamed keeps its socket and loses no
    connection."""

    def __init__(self) -> None:
        self._bound: dict[str, BoundSocket] = {}
        self._adopted: list[BoundSocket] = []

    def adopt(
        self, address: Address, name: str, fd: int, inode: tuple[int, int] | None
    ) -> BoundSocket:
        """Have a socket that another process listens on (see `adopt` of this module): `prepare` and
        `take` find it where they would bind otherwise. Raises ValueError, the descriptor closed."""
        bound = adopt(address, name, fd, inode)
        key = _key(address, name)
        if key in self._bound:
            bound.close()
            raise ValueError(f"listener {name}: {address} came twice")
        self._bound[key] = bound
        self._adopted.append(bound)
        return bound

    def take(self, address: Address, name: str) -> BoundSocket | None:
        """A socket that was adopted, for a listener that is not kept here; None when none came."""
        return self._bound.pop(_key(address, name), None)

    def own(self) -> None:
        """Whoever had them has let go: what was adopted is ours alone, its path included."""
        for bound in self._adopted:
            bound.own()
        self._adopted.clear()

    def forget(self) -> None:
        """Close all of our duplicates: a successor listens on, and the paths stay."""
        for bound in self._bound.values():
            bound.forget()
        self._bound.clear()

    def prepare(self, wanted: Iterable[tuple[str, Address]]) -> dict[str, BoundSocket]:
        """Sockets for all (name, address), by name; new ones are bound, nothing is closed.

        Raises ListenError with nothing changed.
        """
        found: dict[str, BoundSocket] = {}
        new: list[BoundSocket] = []
        try:
            for name, address in wanted:
                key = _key(address, name)
                bound = self._bound.get(key)
                if bound is None:
                    bound = self._bound[key] = bind(address, name)
                    new.append(bound)
                found[name] = bound
        except ListenError:
            self.drop(new)
            raise
        return found

    def keep_only(self, found: Mapping[str, BoundSocket]) -> None:
        """Close every socket that is not among these."""
        alive = {id(bound) for bound in found.values()}
        self.drop([bound for bound in self._bound.values() if id(bound) not in alive])

    def drop(self, gone: Iterable[BoundSocket]) -> None:
        for bound in gone:
            bound.close()
        self._bound = {key: bound for key, bound in self._bound.items() if not bound.closed}

    def close(self) -> None:
        self.drop(list(self._bound.values()))


def _key(address: Address, name: str) -> str:
    # Port 0 asks for a port of its own, and keeps it as long as the name stays.
    if address.is_unix or address.port:
        return str(address)
    return f"{address} {name}"
