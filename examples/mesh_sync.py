"""Without a loop, and with transactions: payments are published only when they are booked.

    python examples/mesh_sync.py --messages 10

The book is a SQLite table. A payment's message is prepared first, the booking is made, then the
message is committed. When anything dies in between, the broker asks a client of the publish group,
and the check looks into the book.
"""

from __future__ import annotations

import argparse
import logging
import sqlite3
import sys
import tempfile
import threading
from pathlib import Path

from fastmesh.client import Fate, Group, Message, SyncMeshClient

PAYING = Group("paying", topic="payments", role="publish")
RECEIPTS = Group("receipts", topic="payments", prefetch=4)


class Book:
    """Bookings by message id; safe from any thread, each opens the file for itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as db:
            db.execute("create table if not exists booked (id text primary key, amount integer)")
        db.close()

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=10)

    def book(self, id: str, amount: int) -> None:
        if amount % 5 == 4:
            raise ValueError(f"no cover for {amount}")
        with self._open() as db:
            db.execute("insert into booked values (?, ?)", (id, amount))
        db.close()

    def fate(self, message: Message) -> Fate:
        """The answer to a check: what is booked is to be delivered."""
        with self._open() as db:
            row = db.execute("select 1 from booked where id = ?", (message.id,)).fetchone()
        db.close()
        # Not booked, and asked by the broker long after it was prepared: it never will be.
        return Fate.COMMIT if row else Fate.ROLLBACK


def pay(client: SyncMeshClient, book: Book, amounts: range) -> int:
    """How many were booked, each with its message committed."""
    paid = 0
    for amount in amounts:
        try:
            with client.transaction("payments", str(amount).encode()) as transaction:
                book.book(transaction.id, amount)
        except ValueError as error:
            print(f"refused: {error}")
        else:
            paid += 1
    return paid


def run(options: argparse.Namespace, book: Book) -> int:
    receipts: set[str] = set()
    news = threading.Condition()

    def write_receipt(message: Message) -> None:
        """Runs in a thread of the group, so it may block."""
        with news:
            receipts.add(message.id)
            print(f"receipt for {int(message.content)}")
            news.notify_all()

    client = SyncMeshClient(
        app="till",
        groups=[PAYING, RECEIPTS],
        mesh=options.mesh,
        registration=options.registration,
    )
    client.check(PAYING, book.fate)
    client.subscribe(RECEIPTS, write_receipt)
    with client:
        paid = pay(client, book, range(options.messages))
        with news:
            news.wait_for(lambda: len(receipts) == paid, timeout=options.timeout)
    print(f"{paid} payments, {len(receipts)} receipts")
    return 0 if len(receipts) == paid else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mesh", default="127.0.0.1:12300", help="host:port or unix:path")
    parser.add_argument("--registration", default="http://127.0.0.1:7071")
    parser.add_argument("--messages", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds until all have come")
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        return run(parser.parse_args(), Book(Path(folder) / "book"))


if __name__ == "__main__":
    sys.exit(main())
