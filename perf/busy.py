"""fastmesh with a Python thread that burns 20 ms of every 100 ms.

Run as `python -m perf.busy run -c FILE`, for the scenario `busy` only. The thread stands for
whatever Python code may ever run in the process; like every thread that fastmesh itself would
start, it has the main thread's low priority.
"""

from __future__ import annotations

import os
import threading
import time

from fastmesh.cli import main

BURN_S = 0.020
EVERY_S = 0.100


def burn() -> None:
    """Hold the interpreter in pure Python, again and again, for as long as the process lives."""
    never = threading.Event()
    own, of_main = threading.get_native_id(), threading.main_thread().native_id or 0
    while True:
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, of_main))
        until = time.monotonic() + BURN_S
        while time.monotonic() < until:
            pass
        never.wait(EVERY_S - BURN_S)


if __name__ == "__main__":
    threading.Thread(target=burn, name="burn", daemon=True).start()
    main()
