"""anthunder's two clients under a bounded load; every answer is compared with what its call asked.

AioClient has the styles sync, future, callback and heartbeat, Client blocking and note (a oneway).

Arguments (key=value): target=HOST:PORT name service workers sizes=1,256 styles=... calls=N or
seconds=S pause_ms timeout_ms, expect=ok|error with `afterwards`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sys
import threading
import time

from anthunder import SERVICE_MAP, AioClient, Client
from mytracer import SpanContext
from wire import blob, options, payload, unblob


class Caller:
    def __init__(self, given: dict[str, str]) -> None:
        self.given = given
        self.name = given["name"]
        self.timeout_ms = int(given.get("timeout_ms", "5000"))
        host, port = given["target"].split(":")
        self.address = (host, int(port))
        for service in (given["service"], given.get("afterwards", given["service"])):
            if service not in SERVICE_MAP:  # A service is registered once and for all.
                SERVICE_MAP[service] = self.address
        self.asynchronous = AioClient("interop")
        self.blocking = Client("interop")
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()
        self.counts = {"calls": 0, "notes": 0, "heartbeats": 0, "wrong": 0, "expected": 0}
        self.errors: list[str] = []

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def call(self, style: str, number: int, size: int, service: str) -> None:
        data = payload(self.name, number, size)
        message, context = blob(data), SpanContext()
        keywords = {"spanctx": context, "timeout_ms": self.timeout_ms}
        if style == "heartbeat":
            self.heartbeat()
            return
        if style == "note":
            self.blocking.invoke_oneway(service, "note", message, spanctx=context)
            self.count("notes")
            return
        if style == "blocking":
            answer = self.blocking.invoke_sync(service, "echo", message, **keywords)
        elif style == "sync":
            answer = self.asynchronous.invoke_sync(service, "echo", message, **keywords)
        elif style == "future":
            future = self.asynchronous.invoke_async(service, "echo", message, **keywords)
            answer = future.result(self.timeout_ms / 1000).content
        elif style == "callback":
            done, answers = threading.Event(), []

            def called(content: bytes) -> None:
                answers.append(content)
                done.set()

            self.asynchronous.invoke_async(service, "echo", message, callback=called, **keywords)
            if not done.wait(self.timeout_ms / 1000):
                raise TimeoutError("no callback")
            answer = answers[0]
        else:
            raise ValueError(style)
        self.count("calls")
        if unblob(answer) != data:
            self.count("wrong")
            self.errors.append(f"call {number}: {len(answer)} bytes not mine: {answer[:60]!r}")

    def heartbeat(self) -> None:
        """One heartbeat, acknowledged.

        The library wakes the waiter when the acknowledgement comes and then finds no stored
        response for it: a KeyError of the id is its way to say "acknowledged"; without an
        acknowledgement it would wait until the timeout.
        """
        beat = self.asynchronous.invoke_heartbeat(self.address)
        try:
            asyncio.run_coroutine_threadsafe(beat, self.asynchronous._loop).result(5)
        except KeyError:
            self.count("heartbeats")

    def worker(self, end: float) -> None:
        sizes = [int(size) for size in self.given.get("sizes", "256").split(",")]
        styles = self.given.get("styles", "sync").split(",")
        calls = int(self.given.get("calls", "0"))
        while len(self.errors) < 20:
            number = next(self.numbers)
            if number > calls if calls else time.monotonic() >= end:
                return
            size = sizes[number % len(sizes)]
            style = styles[number // len(sizes) % len(styles)]
            try:
                self.call(style, number, size, self.given["service"])
            except Exception as error:
                self.errors.append(f"{style} {number} of {size} bytes: {error!r}")
            # Paces the load; nothing waits on it.
            time.sleep(int(self.given.get("pause_ms", "0")) / 1000)

    def refused(self) -> None:
        """Both clients fail with an error of their own, and both connections stay usable."""
        for style in ("blocking", "sync", "future") * int(self.given.get("calls", "1")):
            try:
                self.call(style, next(self.numbers), 64, self.given["service"])
                self.errors.append(f"{style}: answered although nobody serves it")
            except Exception as error:
                self.count("expected")
                print("ERROR", json.dumps(f"{style} {error!r}"), flush=True)
            self.call("blocking", next(self.numbers), 64, self.given["afterwards"])
            self.call("sync", next(self.numbers), 64, self.given["afterwards"])


def main() -> int:
    logging.disable(logging.CRITICAL)
    given = options()
    caller = Caller(given)
    print("READY 0", flush=True)
    if given.get("expect") == "error":
        caller.refused()
    else:
        end = time.monotonic() + float(given.get("seconds", "0"))
        workers = [
            threading.Thread(target=caller.worker, args=(end,))
            for _ in range(int(given.get("workers", "1")))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    summary = {"peer": "python-client", "name": caller.name, **caller.counts}
    print(
        json.dumps(summary | {"errors": len(caller.errors), "first_errors": caller.errors[:5]}),
        flush=True,
    )
    return 1 if caller.errors else 0


if __name__ == "__main__":
    sys.exit(main())
