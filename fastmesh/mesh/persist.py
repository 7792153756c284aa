"""State that survives: whole generations of bytes in the state directory.

    NAME.state            the newest generation
    NAME.state.previous   the one before it
    NAME.state.new        a save under way; what a crash leaves of it is never read

Each file is a header (magic, version, length of the payload, SHA-256 over all of that and the
payload) and the payload. The newest generation is whole at every instant: a save writes the new one
aside, syncs it, keeps the newest under the previous name, renames, and syncs the directory. After a
crash at any point `load` finds the old state or the new one.

One writer: the directory is held by StateDir's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import stat
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from fastmesh import limits
from fastmesh.control.state_dir import StateDir
from fastmesh.errors import FastmeshError, StateError

T = TypeVar("T")

MAGIC = b"FMSTATE\n"
VERSION = 1
"""Of header and payload together: whoever changes either raises it."""
_FRONT = struct.Struct("!8sIQ")
_SUM_BYTES = 32
HEADER_BYTES = _FRONT.size + _SUM_BYTES

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What a filesystem without hard links says."""


class SaveError(FastmeshError):
    """State did not reach the disk. `status` is the HTTP answer to who waited for it."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(reason)


def explain(error: OSError, path: str) -> SaveError:
    """What failed and what to do about it."""
    known = {
        errno.ENOSPC: (507, f"the disk of {path} is full: free some space there"),
        errno.EDQUOT: (507, f"the disk quota of {path} is used up: free some space or raise it"),
        errno.EFBIG: (507, f"{path}: the file size limit (RLIMIT_FSIZE) is too low: raise it"),
        errno.EROFS: (503, f"{path} is mounted read-only: remount it writable"),
        errno.EIO: (503, f"the disk of {path} reports an I/O error: look at the kernel's log"),
    }
    reason = f"{path} cannot be written: {error.strerror or error}"
    status, reason = known.get(error.errno or 0, (503, reason))
    return SaveError(status, reason)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """What was found at the start."""

    value: T | None
    """None: nothing usable is there."""
    source: str
    """newest | previous | none."""
    problems: tuple[str, ...] = ()
    """Why a generation could not be used; empty at a first start and when the newest was fine."""
    size_bytes: int = 0
    """Of the payload."""


class GenerationStore:
    """Two generations of one state in a directory that is held. Everything here blocks."""

    def __init__(self, state_dir: StateDir, name: str, bytes_max: int) -> None:
        """Raises StateError."""
        self.path = state_dir.path
        self.newest = f"{name}.state"
        self.previous = f"{name}.state.previous"
        self.temporary = f"{name}.state.new"
        self._bytes_max = bytes_max
        self.newest_is_good = False
        """Only a good generation may become the previous one. False until one was loaded or saved,
        here or by the process whose store this goes on with."""
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
            self._directory = os.open(self.path, flags)
        except OSError as error:
            raise StateError(f"state_dir {self.path}: {error.strerror}") from error

    def close(self) -> None:
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    # --- load -------------------------------------------------------------------------------------

    def load(self, accept: Callable[[bytes], T]) -> Loaded[T]:
        """The newest generation that is whole and that `accept` takes (it raises ValueError for
        what it cannot use). Never raises for what stands in the files; what a crash left of a save
        is removed."""
        problems: list[str] = []
        with contextlib.suppress(OSError):  # a read-only disk can still be read
            self._remove(self.temporary)
        for name, source in ((self.newest, "newest"), (self.previous, "previous")):
            try:
                payload = self._read(name)
                value = accept(payload)
            except FileNotFoundError:
                if source == "newest":
                    problems.append(f"{name} is missing")
                continue
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                problems.append(f"{name}: {reason}")
                continue
            self.newest_is_good = source == "newest"
            return Loaded(value, source, tuple(problems), len(payload))
        if problems == [f"{self.newest} is missing"]:
            problems = []  # nothing was ever saved
        return Loaded(None, "none", tuple(problems))

    def _read(self, name: str) -> bytes:
        """The payload of a generation. Raises OSError, ValueError."""
        # Without O_NONBLOCK a FIFO that somebody put there would be waited for.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(name, flags, dir_fd=self._directory)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError("is not a regular file")
            data = file.read(HEADER_BYTES + self._bytes_max + 1)
        return unpack(data, self._bytes_max)

    # --- save -------------------------------------------------------------------------------------

    def save(self, payload: bytes) -> None:
        """Returns once the payload is the newest generation and would survive the loss of power.

        Raises OSError. The newest generation is then the old one or, when only the last step
        failed, the new one; never anything else.
        """
        if len(payload) > self._bytes_max:
            raise OSError(errno.EFBIG, f"more than {self._bytes_max} bytes of state")
        self._remove(self.temporary)
        kept_by_rename = False
        try:
            # A failed fsync is not tried again on the same file: the kernel may have dropped the
            # pages and call them clean. The next save begins with a new file.
            self._write(pack(payload))
            if self.newest_is_good:
                kept_by_rename = self._keep_newest()
            self._rename(self.temporary, self.newest)
        except BaseException:
            with contextlib.suppress(OSError):
                if kept_by_rename:
                    self._rename(self.previous, self.newest)
            with contextlib.suppress(OSError):
                self._remove(self.temporary)
            raise
        self.newest_is_good = True
        os.fsync(self._directory)

    def _write(self, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self.temporary, flags, 0o600, dir_fd=self._directory)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def _keep_newest(self) -> bool:
        """Give the newest the previous name too; True when it could only be moved there."""
        self._remove(self.previous)
        try:
            os.link(
                self.newest,
                self.previous,
                src_dir_fd=self._directory,
                dst_dir_fd=self._directory,
                follow_symlinks=False,
            )
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._rename(self.newest, self.previous)
            return True
        return False

    def _rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._directory)


def pack(payload: bytes, version: int = VERSION) -> bytes:
    """A generation as it stands in its file."""
    front = _FRONT.pack(MAGIC, version, len(payload))
    return front + _sum(front, payload) + payload


def unpack(data: bytes, bytes_max: int) -> bytes:
    """The payload of a generation. Raises ValueError that says how it is damaged."""
    if len(data) < HEADER_BYTES:
        raise ValueError(f"is cut off: {len(data)} bytes are no header")
    front = data[: _FRONT.size]
    magic, version, length = _FRONT.unpack(front)
    if magic != MAGIC:
        raise ValueError("is not a state file of fastmesh")
    if version != VERSION:
        # Before the sum: another version may sum differently.
        raise ValueError(f"has version {version}; this fastmesh reads version {VERSION}")
    if length > bytes_max:
        raise ValueError(f"announces {length} bytes, more than {bytes_max}")
    payload = data[HEADER_BYTES:]
    if len(payload) != length:
        raise ValueError(f"has {len(payload)} bytes where its header announces {length}")
    if _sum(front, payload) != data[_FRONT.size : HEADER_BYTES]:
        raise ValueError("is damaged: its checksum does not match")
    return payload


def _sum(front: bytes, payload: bytes) -> bytes:
    digest = hashlib.sha256(front)
    digest.update(payload)
    return digest.digest()


class Saver:
    """Runs the saves of a store, one at a time, in a thread of their own: the loop never waits for
    the disk. The thread is a daemon, because a disk that hangs must not keep the process alive."""

    def __init__(self, store: GenerationStore) -> None:
        self._store = store
        self._running: asyncio.Future[None] | None = None
        self.saves = 0
        """That reached the disk."""
        self.failures = 0

    async def save(
        self, payload: bytes, timeout_s: float = limits.REGISTRATION_SAVE_TIMEOUT_S
    ) -> None:
        """Returns once the payload is durable. Raises SaveError; only after a time-out may it
        reach the disk all the same, later."""
        path = self._store.path
        try:
            async with asyncio.timeout(timeout_s):
                if self._running is not None:
                    await asyncio.wait([self._running])
                self._running = self._start(payload)
                await asyncio.wait([self._running])
            self._running.result()
        except TimeoutError as error:
            self.failures += 1
            reason = f"the disk of {path} has not answered for {timeout_s:g} s: look at the host"
            raise SaveError(503, reason) from error
        except OSError as error:
            self.failures += 1
            raise explain(error, path) from error
        except RuntimeError as error:  # no thread to be had
            self.failures += 1
            raise SaveError(503, f"{path} cannot be written: {error}") from error
        self.saves += 1

    def _start(self, payload: bytes) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def settle(error: BaseException | None) -> None:
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
                future.exception()  # after a time-out nobody asks for it

        def work() -> None:
            failed: BaseException | None = None
            try:
                self._store.save(payload)
            except Exception as error:
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop has gone in the meantime
                loop.call_soon_threadsafe(settle, failed)

        threading.Thread(target=work, name="fastmesh-save", daemon=True).start()
        return future

    async def idle(self) -> None:
        """Until no save is under way, not even one that nobody waits for any more."""
        if self._running is not None:
            await asyncio.wait([self._running])

    def abandon(self) -> None:
        """Another process goes on with the store; no save is under way (`idle`), and none that is
        begun after this can reach a file."""
        self._store.close()

    async def close(self, timeout_s: float = limits.REGISTRATION_SAVE_TIMEOUT_S) -> None:
        """Wait for a save under way, and give the store back unless the disk hangs."""
        if self._running is not None:
            await asyncio.wait([self._running], timeout=timeout_s)
            if not self._running.done():
                return
        self._store.close()
