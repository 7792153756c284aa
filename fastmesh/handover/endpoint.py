"""The socket of a hand-over: records with descriptors, and the path where a successor finds us.

SOCK_SEQPACKET keeps records whole: one is sent or received entirely, or not at all. What the kernel
does to descriptors on the way is in tests/chaos/test_kernel_facts.py; the one that shapes this file
is that a receiver whose table is full is told of a success, with some of the descriptors gone.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import os
import secrets
import socket
import stat
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from fastmesh import limits
from fastmesh.errors import HandoverError, StateError

_INT: Final = struct.calcsize("i")
_DATA_ROOM: Final = limits.HANDOVER_RECORD_BYTES_MAX + 1
_CONTROL_ROOM: Final = socket.CMSG_SPACE((limits.HANDOVER_RECORD_FDS_MAX + 16) * _INT)
"""More descriptors than a record may have fit, so that too many is told apart from truncated."""
_NOBODY: Final = frozenset({errno.ENOENT, errno.ECONNREFUSED})
_RETRY_S: Final = 0.005
"""A full backlog has no event: between two attempts to connect."""
_LOCK_S: Final = 0.02
"""The lock of the directory is held for a few system calls; a stopped process is not waited for."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as the kernel knows it."""

    pid: int
    """0: it lives in a PID namespace that cannot be seen from this one."""
    uid: int
    gid: int


class Door:
    """The listening socket at `path`, mode 0600, in a directory that only we can write.

    It is bound under another name and renamed over `path`: there is no moment without a socket when
    a successor opens its own before its predecessor is gone. `close()` leaves the successor's.
    """

    def __init__(self, path: str) -> None:
        """Raises StateError."""
        self.path = path
        self._name = os.path.basename(path)
        self._directory = -1
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.sock.setblocking(False)
            self._directory = _open_directory(path)
            with _locked(self._directory, _LOCK_S) as alone:
                if alone:
                    self._sweep()
                self._bind()
        except OSError as error:
            self._discard()
            raise StateError(f"{path}: {error.strerror or error}") from error
        except BaseException:
            self._discard()
            raise

    def _bind(self) -> None:
        at = self._directory
        name = f"{self._prefix}{secrets.token_hex(4)}"
        # The kernel makes the file with the mode of the socket: there is no moment with another
        # one, and no umask to change under the feet of other threads.
        os.fchmod(self.sock.fileno(), 0o600)
        self.sock.bind(_address(at, name))
        try:
            found = os.stat(name, dir_fd=at, follow_symlinks=False)
            self._inode = found.st_dev, found.st_ino
            self.sock.listen(limits.HANDOVER_CONVERSATIONS_MAX)
            os.rename(name, self._name, src_dir_fd=at, dst_dir_fd=at)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=at)
            raise

    @property
    def _prefix(self) -> str:
        return f".{self._name}."

    def _sweep(self) -> None:
        """What a process that was killed between bind and rename left."""
        for name in os.listdir(self._directory):
            if name.startswith(self._prefix):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._directory)

    def accept(self) -> socket.socket:
        """Raises BlockingIOError when nobody waits, OSError."""
        sock, _ = self.sock.accept()
        sock.setblocking(False)
        return sock

    def close(self) -> None:
        """The path goes if it is still this socket's."""
        if self._directory >= 0:
            # A successor that renames between the look and the removal would lose its socket.
            # When somebody is at it just now the path is left: a stale one harms nobody.
            with contextlib.suppress(OSError), _locked(self._directory, 0.0) as alone:
                if alone and self._is_ours():
                    os.unlink(self._name, dir_fd=self._directory)
        self._discard()

    def _is_ours(self) -> bool:
        found = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        return (found.st_dev, found.st_ino) == self._inode

    def _discard(self) -> None:
        self.sock.close()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


def _open_directory(path: str) -> int:
    """The directory of `path`, which must be ours. Raises StateError, OSError."""
    name = os.path.dirname(path) or "."
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(fd)
    wrong = ""
    if found.st_uid != os.geteuid():
        wrong = "belongs to another user"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        wrong = "can be written by others: chmod 700"
    if wrong:
        os.close(fd)
        raise StateError(f"{name} {wrong}")
    return fd


@contextlib.contextmanager
def _locked(directory: int, most_s: float) -> Iterator[bool]:
    """Whether the directory is locked, against another one that opens or closes here."""
    until = time.monotonic() + most_s
    while not (alone := _lock(directory)) and time.monotonic() < until:
        os.sched_yield()
    try:
        yield alone
    finally:
        if alone:
            fcntl.flock(directory, fcntl.LOCK_UN)


def _lock(directory: int) -> bool:
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _address(directory: int, name: str) -> str:
    """Of a socket in an open directory: short enough for sun_path however long the path is, and in
    that very directory, whatever becomes of its name. Raises OSError where that cannot be had."""
    place = f"/proc/self/fd/{directory}"
    if not os.path.exists(place):  # else ENOENT would be taken for "nobody is there"
        raise OSError(errno.ENOSYS, "/proc is not mounted, and a hand-over needs it")
    return f"{place}/{name}"


def peer_of(sock: socket.socket) -> Peer:
    """Who connected, or listened, when the connection was made (SO_PEERCRED)."""
    layout = struct.Struct("iII")
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    return Peer(*layout.unpack(found))


async def connect(path: str, timeout_s: float) -> socket.socket | None:
    """None: there is no socket, or nobody behind it. Raises OSError for what else is wrong, of it
    TimeoutError when the backlog stays full for `timeout_s`."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + timeout_s
    try:
        directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.setblocking(False)
        address = _address(directory, os.path.basename(path))
        while (fault := sock.connect_ex(address)) == errno.EAGAIN:
            if loop.time() >= give_up:
                raise TimeoutError(f"{path}: accepts nobody within {timeout_s:g} s")
            await asyncio.sleep(_RETRY_S)
        if fault in _NOBODY:
            sock.close()
            return None
        if fault:
            raise OSError(fault, os.strerror(fault), path)
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)
    return sock


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One record and its descriptors (close-on-exec), which are the caller's.

    Raises BlockingIOError when there is none, EOFError at the end, ConnectionResetError,
    HandoverError for a record that did not come whole; its descriptors are closed.
    """
    data, control, flags, _ = sock.recvmsg(
        _DATA_ROOM, _CONTROL_ROOM, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    )
    fds = array.array("i")
    for level, kind, content in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) // _INT * _INT])
    wrong: tuple[str, object, str] | None = None
    if flags & socket.MSG_CTRUNC:
        most = "descriptors came: the rest is lost, the table of this process is full"
        wrong = ("record", len(fds), most)
    elif flags & socket.MSG_TRUNC:
        wrong = ("record", None, f"is longer than {limits.HANDOVER_RECORD_BYTES_MAX} bytes")
    elif not data and fds:
        wrong = ("record", len(fds), "descriptors came without a byte")
    if wrong is not None:
        close_all(fds)
        raise HandoverError(*wrong)
    if not data:
        raise EOFError
    return data, fds.tolist()


async def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """One record, when there is room. Raises BrokenPipeError and ConnectionResetError when nobody
    reads any more, OSError as the kernel has it (ETOOMANYREFS, EMFILE, ENOBUFS, EMSGSIZE)."""
    while True:
        try:
            send_now(sock, data, fds)
            return
        except BlockingIOError:
            await _room(sock)


async def _room(sock: socket.socket) -> None:
    # The wait has a descriptor of its own: the reader of the connection is not touched, and a
    # connection that is closed meanwhile does not take the wait's registration with it.
    loop = asyncio.get_running_loop()
    came: asyncio.Future[None] = loop.create_future()
    fd = os.dup(sock.fileno())
    try:
        loop.add_writer(fd, lambda: None if came.done() else came.set_result(None))
        try:
            await came
        finally:
            loop.remove_writer(fd)
    finally:
        os.close(fd)


def send_now(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """One record at once, or BlockingIOError; else as `send`."""
    if sock.fileno() < 0:
        raise BrokenPipeError(errno.EPIPE, "the connection is closed")
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], control, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def close_all(fds: Iterable[int]) -> None:
    """Each of them, whatever is wrong with one."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
