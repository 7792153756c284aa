"""The directory that one running fastmesh owns: 0700, ours, held by a lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat

from fastmesh.errors import StateError

LOCK_NAME = "lock"


class StateDir:
    """Holds the directory from construction to `close()`. Raises StateError."""

    def __init__(self, path: str, *, called: str = "state_dir") -> None:
        """`called`: how the operator named it, for what is said about it."""
        self.path = path
        self._fd = -1
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            _check_directory(path, called)
            self._fd = os.open(
                os.path.join(path, LOCK_NAME),
                os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
                0o600,
            )
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sign()
        except OSError as error:
            holder = self._holder() if error.errno in (errno.EAGAIN, errno.EACCES) else ""
            self.close()
            reason = f"is in use{holder}" if holder else (error.strerror or str(error))
            raise StateError(f"{called} {path}: {reason}") from error

    @classmethod
    def adopt(cls, path: str, fd: int, *, called: str = "state_dir") -> StateDir:
        """The directory of a process that goes on holding it: `fd` is a duplicate of its lock's
        descriptor, so that the lock is held as long as one of the two has it. The descriptor is
        taken over, and closed when this raises StateError: it is not the lock of that directory,
        or the lock is somebody else's."""
        made = cls.__new__(cls)
        made.path, made._fd = path, fd
        try:
            _check_directory(path, called)
            found, stands = os.fstat(fd), os.lstat(os.path.join(path, LOCK_NAME))
            same = (found.st_dev, found.st_ino) == (stands.st_dev, stands.st_ino)
            if not same or not stat.S_ISREG(found.st_mode):
                raise StateError(f"{called} {path}: the descriptor that came is not its lock file")
            # Succeeds without waiting on the very description that has the lock, and on no other
            # one while that lives.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            in_use = error.errno in (errno.EAGAIN, errno.EACCES)
            reason = "is in use by another process" if in_use else (error.strerror or str(error))
            made.close()
            raise StateError(f"{called} {path}: {reason}") from error
        except BaseException:
            made.close()
            raise
        return made

    @property
    def fd(self) -> int:
        """Of the lock; a duplicate of it is what a successor adopts."""
        return self._fd

    def own(self) -> None:
        """This process is the one that holds the directory now: others are told its pid."""
        with contextlib.suppress(OSError):  # a full disk changes nothing about the lock
            self._sign()

    def _sign(self) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _holder(self) -> str:
        if self._fd < 0:
            return ""
        text = os.pread(self._fd, 32, 0).split(b"\n")[0]
        return f" by process {int(text)}" if text.isdigit() else " by another process"

    def close(self) -> None:
        """Let go, without unlocking: a successor that has a duplicate of the descriptor goes on
        holding the lock. The lock file stays: removing it would race with whoever waits for it."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


def _check_directory(path: str, called: str) -> None:
    """Raises StateError, OSError."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise StateError(f"{called} {path} is not a directory")
    if found.st_uid != os.geteuid():
        raise StateError(f"{called} {path} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StateError(f"{called} {path} can be written by others: chmod 700")
