"""Another process, held by its pidfd: whether it has ended, and the means to end it.

A pid may be another process's by the time it is used; a pidfd never is. That it is readable is the
one proof that its process runs no more; a connection that ended proves nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal

from fastmesh.errors import HandoverError


def own_pidfd() -> int:
    """This process, for another one to hold. Belongs to the caller. Raises OSError."""
    return os.pidfd_open(os.getpid())


class Fence:
    """Owns `pidfd` from the call on, also when it raises."""

    def __init__(self, pidfd: int, pid: int) -> None:
        """`pid` is what the process calls itself: in its own PID namespace. Raises HandoverError
        when the descriptor is no pidfd, or one of another process."""
        self.pidfd = pidfd
        self.pid = pid
        try:
            self.seen_pid, own = _pids_of(pidfd)
            """As seen from here: -1 it has ended, 0 it lives in a namespace beside or above."""
            if own not in (0, pid):
                raise HandoverError("descriptor of the process", own, f"must be of process {pid}")
        except HandoverError:
            self.close()
            raise

    def dead(self) -> bool:
        """It runs no more, whether or not its parent has taken notice."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def kill(self) -> bool:
        """SIGKILL. False when that is not permitted; True also when it has ended already. When it
        is dead `dead()` says so, a little later."""
        return self._signal(signal.SIGKILL)

    def can_signal(self) -> bool:
        """Whether `kill()` would be permitted: same user, and a PID namespace that is ours or
        below."""
        return self._signal(0)

    def _signal(self, number: int) -> bool:
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return True
        except OSError:  # EPERM another user, EINVAL another namespace, ENOSYS a sandbox
            return False
        return True

    def close(self) -> None:
        if self.pidfd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.pidfd)
            self.pidfd = -1


def _pids_of(fd: int) -> tuple[int, int]:
    """The pid as seen from here, and in the process's own namespace (0: cannot be known). Raises
    HandoverError: what came is another kind of descriptor, or cannot be looked at."""
    found: dict[str, list[str]] = {}
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                found[name] = value.split()
        if "Pid" not in found:
            raise HandoverError("descriptor of the process", None, "is no pidfd")
        seen = int(found["Pid"][0])
        # "NSpid" goes from our namespace down to its own (a kernel without them has no such line).
        inner = found.get("NSpid", ["0"])
        return seen, int(inner[-1]) if seen > 0 else 0
    except (OSError, ValueError, IndexError) as error:
        raise HandoverError(f"descriptor of the process: {error}") from error
