"""A client of the message mesh on fastmesh.client, beside those that others wrote.

Arguments, commands and what it answers: as ../node/push_consumer.js; it knows no `prepare`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys

from fastmesh.client import Group, MeshClient, Message, Result, later

RETRY_MS = 50


def payload(caller: str, number: int, size: int) -> bytes:
    pattern = f"{number}#{caller}#".encode()
    return (pattern * (size // len(pattern) + 1))[:size]


def say(word: str, what: object) -> None:
    print(word, json.dumps(what), flush=True)


class Peer:
    def __init__(self, options: dict[str, str]) -> None:
        self.name = options["name"]
        rows = [text.split("/") for text in options["groups"].split(";")]
        groups = [
            Group(
                row[0],
                row[1],
                role="publish" if row[2] == "publish" else "subscribe",
                prefetch=int(row[3]) if len(row) > 3 else 32,
                filter=row[4] if len(row) > 4 else "",
            )
            for row in rows
        ]
        topics = [topic for topic in options.get("topics", "").split(",") if topic]
        self.client = MeshClient(
            app=options["app"],
            client=self.name,
            groups=groups,
            topics=topics,
            mesh=options["mesh"],
            registration=f"http://{options['registration']}",
        )
        self.groups = groups
        for group in groups:
            self.client.subscribe(group, self.consume)
        self.seen: set[tuple[str, str]] = set()
        self.got = self.put = 0
        self.errors: list[str] = []

    async def consume(self, message: Message) -> Result | None:
        self.got += 1
        once = (message.group, message.id)
        number = int(message.id.rpartition("-")[2])
        put_off = number % 7 == 3 and once not in self.seen and message.attempt == 1
        self.seen.add(once)
        line = {
            "group": message.group,
            "topic": message.topic,
            "id": message.id,
            "attempt": message.attempt,
            "key": message.key,
            "colour": message.colour,
            "note": message.headers.get("note"),
            "empty": message.headers.get("empty"),
            "said": "later" if put_off else "consumed",
            "size": len(message.content),
            "digest": hashlib.sha256(message.content).hexdigest(),
        }
        say("GOT", line)
        return later(RETRY_MS) if put_off else None

    async def publish(self, number: int, told: dict[str, str]) -> None:
        sizes = [int(size) for size in told["sizes"].split(",")]
        receipt = await self.client.publish(
            told["topic"],
            payload(self.name, number, sizes[number % len(sizes)]),
            id=f"{self.name}-{number}",
            key=f"key-{number % 5}" if "key" in told else None,
            colour=told.get("colour"),
            headers={"note": f"grüße ✓ {number}", "empty": ""},
        )
        self.put += 1
        say("PUT", {"id": receipt.id, "topic": told["topic"], "broker": receipt.broker})

    async def obey(self, line: str) -> None:
        word, *rest = line.split()
        if word != "publish":
            raise ValueError(f"no such command: {line}")
        told = dict(pair.split("=", 1) for pair in rest)
        numbers = iter(range(int(told["first"]), int(told["first"]) + int(told["count"])))

        async def one() -> None:
            for number in numbers:
                await self.publish(number, told)

        async with asyncio.TaskGroup() as window:
            for _ in range(int(told.get("window", "8"))):
                window.create_task(one())
        say("DONE", {"word": word, "topic": told["topic"], "count": int(told["count"])})

    async def run(self) -> None:
        async with self.client, asyncio.TaskGroup() as orders:
            print("READY 0", flush=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                orders.create_task(self.obey(line))


def main() -> int:
    peer = Peer(dict(pair.split("=", 1) for pair in sys.argv[1:]))
    try:
        asyncio.run(peer.run())
    except Exception as error:
        peer.errors.append(repr(error))
    summary = {
        "peer": "push-python",
        "name": peer.name,
        "got": peer.got,
        "put": peer.put,
        "errors": len(peer.errors),
        "first_errors": peer.errors[:5],
    }
    print(json.dumps(summary), flush=True)
    return 1 if peer.errors else 0


if __name__ == "__main__":
    sys.exit(main())
