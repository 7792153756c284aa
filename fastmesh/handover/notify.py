"""What a service manager is told (sd_notify(3)), without its library."""

from __future__ import annotations

import os
import socket

_PATIENCE_S = 0.1
"""The manager reads at once; a full queue must not hold up the mesh."""


def notify(*lines: str) -> bool:
    """`READY=1`, `MAINPID=123` ... in one message. Whether somebody was told: False without a
    service manager, and when it cannot be reached. Never raises."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    try:
        # The abstract name of "@name" begins with NUL.
        name = os.fsencode("\0" + address[1:] if address[0] == "@" else address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(_PATIENCE_S)
            sock.sendto("\n".join(lines).encode(), name)
    except (OSError, ValueError):
        return False
    return True
