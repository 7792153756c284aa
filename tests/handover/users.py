"""Another user of this machine, and one without privileges."""

from __future__ import annotations

import os
from collections.abc import Callable

NOBODY = 65534


def as_another_user(ask: Callable[[], int]) -> int:
    """What `ask` (0..255) finds in a process of user and group NOBODY that has no capability. Only
    root can ask so."""
    return _forked(ask, NOBODY)


def without_privileges(ask: Callable[[], int]) -> int:
    """The same for root; who is not root has none, and asks in a process of its own."""
    return _forked(ask, NOBODY if os.geteuid() == 0 else None)


def _forked(ask: Callable[[], int], user: int | None) -> int:
    pid = os.fork()
    if pid == 0:
        found = 255
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            found = ask()
        finally:
            os._exit(found)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
