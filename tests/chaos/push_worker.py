"""A consumer in a process of its own: writes down each message before it answers it.

    python -m tests.chaos.push_worker '{"client": "w1", "groups": [...], ...}'

Says "ready" when it is subscribed, ends gracefully when its standard input does, and prints its
counts as JSON. A process that nobody ends leaves by itself after LIFE_S.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import random
import signal
import sys
import time
import zlib
from typing import Any

from fastmesh.client import Group, MeshClient, Message

LIFE_S = 100


async def serve(spec: dict[str, Any]) -> None:
    # One write of a line at the end of the file: whole, whoever else writes and whoever is killed.
    log = os.open(spec["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    low_s, high_s = spec["handler_s"]
    name, pid, numbers = spec["client"], os.getpid(), itertools.count(1)

    async def handle(message: Message) -> None:
        token = f"{pid}.{next(numbers)}"
        crc = zlib.crc32(message.content)
        began = time.monotonic_ns()
        what = f"{name} {message.group} {message.id} {message.attempt} {crc}"
        os.write(log, f"B {token} {began} {what}\n".encode())
        if high_s:
            await asyncio.sleep(random.uniform(low_s, high_s))
        os.write(log, f"E {token} {time.monotonic_ns()}\n".encode())

    ended = asyncio.Event()

    def heard() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            ended.set()

    loop = asyncio.get_running_loop()
    loop.add_reader(0, heard)
    client = MeshClient(
        app=spec["app"],
        client=name,
        groups=[Group(**group) for group in spec["groups"]],
        mesh=spec["mesh"],
        registration=spec["registration"],
        connections=spec["connections"],
        heartbeat_ms=500,
        close_timeout_ms=5000,
    )
    for group in spec["groups"]:
        client.subscribe(group["name"], handle)
    async with client:
        print("ready", flush=True)
        await ended.wait()
    print(json.dumps(dataclasses.asdict(client.stats)), flush=True)


if __name__ == "__main__":
    signal.alarm(LIFE_S)
    asyncio.run(serve(json.loads(sys.argv[1])))
