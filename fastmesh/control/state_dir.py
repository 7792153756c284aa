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
            found = os.lstat(path)
            if not stat.S_ISDIR(found.st_mode):
                raise StateError(f"{called} {path} is not a directory")
            if found.st_uid != os.geteuid():
                raise StateError(f"{called} {path} belongs to another user")
            if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise StateError(f"{called} {path} can be written by others: chmod 700")
            self._fd = os.open(
                os.path.join(path, LOCK_NAME),
                os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
                0o600,
            )
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            holder = self._holder() if error.errno in (errno.EAGAIN, errno.EACCES) else ""
            self.close()
            reason = f"is in use{holder}" if holder else (error.strerror or str(error))
            raise StateError(f"{called} {path}: {reason}") from error

    def _holder(self) -> str:
        if self._fd < 0:
            return ""
        text = os.pread(self._fd, 32, 0).split(b"\n")[0]
        return f" by process {int(text)}" if text.isdigit() else " by another process"

    def close(self) -> None:
        """Let go. The lock file stays: removing it would race with whoever waits for it."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
