"""Steady traffic on one node: sends parcels, takes parcels, and says every second whose they were.

    python examples/mesh_traffic.py --seconds 60

Start one on each node, move a weight (docs/scheduling.md) and see the traffic move.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections import Counter

from fastmesh.client import ClientError, Group, MeshClient, Message

SHIPPING = Group("shipping", topic="parcels")


class Depot:
    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()

    async def ship(self, message: Message) -> None:
        """`origin` is the node that passed it on; None when the broker pushed it to ours."""
        self.taken[message.origin or ""] += 1


async def send(client: MeshClient, rate: float) -> None:
    clock = asyncio.get_running_loop().time
    due = clock()
    while True:
        try:
            await client.publish("parcels", b"a parcel")
        except ClientError as error:
            print(f"not sent: {error}", file=sys.stderr)
        due = max(due + 1 / rate, clock() - 1)  # a second behind at most: what is older is not sent
        await asyncio.sleep(max(0.0, due - clock()))


async def run(options: argparse.Namespace) -> None:
    depot = Depot()
    client = MeshClient(
        app="shop", groups=[SHIPPING], mesh=options.mesh, registration=options.registration
    )
    client.subscribe(SHIPPING, depot.ship)
    async with client:
        sending = asyncio.create_task(send(client, options.rate))
        for _ in range(options.seconds):
            await asyncio.sleep(1)
            taken, depot.taken = depot.taken, Counter()
            others = "".join(f", {n} from {node}" for node, n in taken.items() if node)
            print(f"{options.name}: {taken['']} from the broker{others}", flush=True)
        sending.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mesh", default="127.0.0.1:12300", help="host:port or unix:path")
    parser.add_argument("--registration", default="http://127.0.0.1:7071")
    parser.add_argument("--rate", type=float, default=50.0, help="parcels a second")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--name", default="here", help="what its lines begin with")
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
