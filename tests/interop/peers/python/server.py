"""anthunder's AioListener, answering with what it was asked until its standard input ends.

Arguments: port=N service=NAME. The library never sends an empty answer, so callers send no empty
message.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time

from anthunder import AioListener, BaseService
from wire import options, unblob

lock = threading.Lock()
counts = {"answered": 0, "notes": 0}
distinct: set[tuple[int, bytes]] = set()


class Echo(BaseService):
    def echo(self, body: bytes) -> bytes:
        with lock:
            counts["answered"] += 1
        return body

    def note(self, body: bytes) -> bytes:
        with lock:
            counts["notes"] += 1
            # The number and the caller stand first; minutes of whole notes would be much.
            data = unblob(body)
            distinct.add((len(data), data[:40]))
        return body


class Lines(logging.Handler):
    """The library reports a misfit only in its log, so what it logs is part of the verdict."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        # There is no registry here, and a stranger's probe of the port is no request.
        if "mesh client" not in text and "first request" not in text:
            self.lines.append(text[:300])


def main() -> int:
    given = options()
    log = Lines()
    logging.getLogger().addHandler(log)
    listener = AioListener(("127.0.0.1", int(given["port"])), "interop")
    listener.handler.register_interface(given["service"], Echo)
    listener.run_threading()
    print("READY", given["port"], flush=True)
    sys.stdin.read()
    # Nobody answers a note, so the last ones may still be on their way here when we are told to
    # end: look until none has come for a while. One that is lost is missed all the same.
    seen = -1
    for _ in range(12):
        if seen == counts["notes"]:
            break
        seen = counts["notes"]
        time.sleep(0.25)
    print(
        json.dumps(
            {"peer": "python-server", **counts, "notes_distinct": len(distinct), "wrong": 0}
            | {"log": log.lines[:5]}
        ),
        flush=True,
    )
    listener.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
