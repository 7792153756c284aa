"""A shop on the message mesh, asynchronously: it takes orders and bills them.

    python examples/mesh_async.py --messages 20

Needs a fastmesh with a push listener and a registration, and a broker behind it:
docs/quickstart.md starts them.
Orders of one customer are billed in their order, those of different customers at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys

from fastmesh.client import AmbiguousError, Group, MeshClient, Message, NotTakenError, Result, later

BILLING = Group("billing", topic="orders", prefetch=8, ordered=True)


class Shop:
    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.billed: set[str] = set()
        self.all_billed = asyncio.Event()

    async def bill(self, message: Message) -> Result | None:
        """Called for each order. A message may come again, so its id is remembered."""
        order = json.loads(message.content)
        if order["amount"] > 90 and message.attempt == 1 and message.headers.get("wait") == "yes":
            return later(retry_ms=100, reason="the bank is slow")
        self.billed.add(message.id)
        print(f"billed {order['amount']} to {message.key} ({message.headers['currency']})")
        if len(self.billed) == self.expected:
            self.all_billed.set()
        return None


async def take_orders(client: MeshClient, number: int) -> int:
    """Publishes them; how many a broker surely has."""
    taken = 0
    for i in range(number):
        order = json.dumps({"number": i, "amount": i * 7 % 100}).encode()
        try:
            await client.publish(
                "orders", order, key=f"customer-{i % 4}", headers={"currency": "EUR"}
            )
        except NotTakenError as error:
            print(f"order {i} is not placed: {error}", file=sys.stderr)
        except AmbiguousError as error:
            print(f"order {i} may be placed: {error}", file=sys.stderr)
        else:
            taken += 1
    return taken


async def run(options: argparse.Namespace) -> int:
    shop = Shop(options.messages)
    client = MeshClient(
        app="shop", groups=[BILLING], mesh=options.mesh, registration=options.registration
    )
    client.subscribe(BILLING, shop.bill)
    async with client:
        taken = await take_orders(client, options.messages)
        try:
            async with asyncio.timeout(options.timeout):
                await shop.all_billed.wait()
        except TimeoutError:
            print("not every order was billed in time", file=sys.stderr)
    print(f"{taken} orders taken, {len(shop.billed)} billed")
    return 0 if taken == len(shop.billed) == options.messages else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mesh", default="127.0.0.1:12300", help="host:port or unix:path")
    parser.add_argument("--registration", default="http://127.0.0.1:7071")
    parser.add_argument("--messages", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds until all are billed")
    logging.basicConfig(level=logging.WARNING)
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
