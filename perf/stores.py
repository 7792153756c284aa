"""Which embedded store the broker should stand on: the same work for each candidate, by the clock.

    python -m perf.stores [--seconds 3] [--folder DIR] [lmdb sqlite rocksdict]

A message is what the broker writes for one of 256 B: a record in the log (position -> 360 B) and an
entry in its queue (topic, queue, offset -> position, time). A batch is one transaction. A candidate
that is not installed is left out. Each runs in a process of its own, so that memory is its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import resource
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

RECORD = os.urandom(360)
BATCHES = (1, 16, 256, 1000)
QUEUES = 4
KEY = struct.Struct(">Q")
ENTRY = struct.Struct(">IHQ")
POINTER = struct.Struct(">QQ")
READ_AT_ONCE = 256


class Candidate(Protocol):
    def append(self, first: int, count: int, sync: bool) -> None:
        """One transaction: messages first..first+count-1."""

    def read(self, first: int, count: int) -> int:
        """So many messages of one queue in order; returns how many there were."""

    def settle(self, offset: int, sync: bool) -> None:
        """One position of one group."""


class Lmdb:
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.env: Any = None
        self.open(True)

    def open(self, sync: bool) -> None:
        lmdb: Any = importlib.import_module("lmdb")
        if self.env is not None:
            self.env.close()
        self.sync = sync
        self.env = lmdb.open(self.folder, map_size=1 << 34, max_dbs=4, sync=sync, metasync=sync)
        self.log = self.env.open_db(b"log", integerkey=False)
        self.queues = self.env.open_db(b"queues")
        self.positions = self.env.open_db(b"positions")

    def append(self, first: int, count: int, sync: bool) -> None:
        if sync != self.sync:
            self.open(sync)
        numbers = range(first, first + count)
        with self.env.begin(write=True, buffers=True) as txn:
            log, queues = txn.cursor(self.log), txn.cursor(self.queues)
            log.putmulti([(KEY.pack(n), RECORD) for n in numbers], append=True)
            queues.putmulti(
                [(ENTRY.pack(1, n % QUEUES, n // QUEUES), POINTER.pack(n, n)) for n in numbers]
            )

    def read(self, first: int, count: int) -> int:
        with self.env.begin(buffers=True) as txn:
            cursor = txn.cursor(self.queues)
            cursor.set_range(ENTRY.pack(1, 0, first))
            keys: list[bytes] = []
            for _, value in cursor:
                keys.append(bytes(value[:8]))
                if len(keys) == count:
                    break
            found = txn.cursor(self.log).getmulti(keys)
            return len([bytes(value) for _, value in found])

    def settle(self, offset: int, sync: bool) -> None:
        if sync != self.sync:
            self.open(sync)
        with self.env.begin(write=True) as txn:
            txn.put(b"group/1/0", KEY.pack(offset), db=self.positions)


class Sqlite:
    def __init__(self, folder: str) -> None:
        self.base = sqlite3.connect(
            os.path.join(folder, "store"), isolation_level=None, check_same_thread=False
        )
        run = self.base.execute
        run("PRAGMA journal_mode=WAL")
        run("PRAGMA wal_autocheckpoint=4000")
        run("CREATE TABLE log(position INTEGER PRIMARY KEY, record BLOB)")
        run(
            "CREATE TABLE queues(topic INT, queue INT, offset INT, position INT, stored INT,"
            " PRIMARY KEY(topic, queue, offset)) WITHOUT ROWID"
        )
        run("CREATE TABLE positions(name TEXT PRIMARY KEY, offset INT) WITHOUT ROWID")

    def append(self, first: int, count: int, sync: bool) -> None:
        numbers = range(first, first + count)
        self.base.execute(f"PRAGMA synchronous={'FULL' if sync else 'NORMAL'}")
        self.base.execute("BEGIN IMMEDIATE")
        self.insert("log", 2, [(n, RECORD) for n in numbers])
        self.insert("queues", 5, [(1, n % QUEUES, n // QUEUES, n, n) for n in numbers])
        self.base.execute("COMMIT")

    def insert(self, table: str, columns: int, rows: list[tuple[object, ...]]) -> None:
        """Many rows a statement: the interpreter is let go and taken back once for all of them."""
        one = "(" + ",".join("?" * columns) + ")"
        while rows:
            count = next(n for n in (64, 16, 4, 1) if n <= len(rows))
            many = ",".join([one] * count)
            values = [value for row in rows[:count] for value in row]
            self.base.execute(f"INSERT INTO {table} VALUES{many}", values)
            rows = rows[count:]

    def read(self, first: int, count: int) -> int:
        found = self.base.execute(
            "SELECT record FROM queues JOIN log USING(position)"
            " WHERE topic=1 AND queue=0 AND offset>=? ORDER BY offset LIMIT ?",
            (first, count),
        )
        return len(found.fetchall())

    def settle(self, offset: int, sync: bool) -> None:
        self.base.execute(f"PRAGMA synchronous={'FULL' if sync else 'NORMAL'}")
        self.base.execute("INSERT OR REPLACE INTO positions VALUES('group/1/0', ?)", (offset,))


class SqliteRows(Sqlite):
    """The same, row by row."""

    def insert(self, table: str, columns: int, rows: list[tuple[object, ...]]) -> None:
        self.base.executemany(f"INSERT INTO {table} VALUES({','.join('?' * columns)})", rows)


class SqliteJson(Sqlite):
    """The same, in one statement a table however many rows: numbers as JSON, records as one blob
    that SQLite cuts up."""

    def append(self, first: int, count: int, sync: bool) -> None:
        rows, at = [], 0
        for n in range(first, first + count):
            rows.append((n, 1, n % QUEUES, n // QUEUES, n, at + 1, len(RECORD)))
            at += len(RECORD)
        numbers, records = msgspec.json.encode(rows).decode(), b"".join([RECORD] * count)
        run = self.base.execute
        run(f"PRAGMA synchronous={'FULL' if sync else 'NORMAL'}")
        run("BEGIN IMMEDIATE")
        run(
            "INSERT INTO log SELECT value->>0, substr(?2, value->>5, value->>6) FROM json_each(?1)",
            (numbers, records),
        )
        run(
            "INSERT INTO queues SELECT value->>1, value->>2, value->>3, value->>0, value->>4"
            " FROM json_each(?1)",
            (numbers,),
        )
        run("COMMIT")


class Rocks:
    def __init__(self, folder: str) -> None:
        rocksdict: Any = importlib.import_module("rocksdict")
        self.made = rocksdict
        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        self.base: Any = rocksdict.Rdict(folder, options)
        self.options = {}
        for sync in (False, True):
            self.options[sync] = rocksdict.WriteOptions()
            self.options[sync].sync = sync

    def append(self, first: int, count: int, sync: bool) -> None:
        batch = self.made.WriteBatch(raw_mode=True)
        for n in range(first, first + count):
            batch.put(b"l" + KEY.pack(n), RECORD)
            batch.put(b"q" + ENTRY.pack(1, n % QUEUES, n // QUEUES), POINTER.pack(n, n))
        self.base.write(batch, self.options[sync])

    def read(self, first: int, count: int) -> int:
        walk = self.base.iter()
        walk.seek(b"q" + ENTRY.pack(1, 0, first))
        keys: list[bytes] = []
        while (
            walk.valid() and len(keys) < count and walk.key()[:7] == b"q" + ENTRY.pack(1, 0, 0)[:6]
        ):
            keys.append(b"l" + walk.value()[:8])
            walk.next()
        return len(self.base.get(keys))

    def settle(self, offset: int, sync: bool) -> None:
        batch = self.made.WriteBatch(raw_mode=True)
        batch.put(b"pgroup/1/0", KEY.pack(offset))
        self.base.write(batch, self.options[sync])


CANDIDATES: dict[str, type[Any]] = {
    "lmdb": Lmdb,
    "sqlite": Sqlite,
    "sqlite-rows": SqliteRows,
    "sqlite-json": SqliteJson,
    "rocksdict": Rocks,
}


def rss_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def private_bytes() -> int:
    """Without the pages of mapped files, which the kernel may take back at any time."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure(name: str, folder: str, seconds: float) -> None:
    before, private = rss_bytes(), private_bytes()
    began = time.perf_counter()
    store: Candidate = CANDIDATES[name](folder)
    opened_ms = (time.perf_counter() - began) * 1000
    print(f"{name}: import and open {opened_ms:.1f} ms, {(rss_bytes() - before) / 1e6:.1f} MB")
    number = 0
    for sync in (True, False):
        for batch in BATCHES:
            began, cpu = time.perf_counter(), time.process_time()
            until, done = began + seconds, 0
            slowest = 0.0
            while (now := time.perf_counter()) < until:
                store.append(number, batch, sync)
                slowest = max(slowest, time.perf_counter() - now)
                number += batch
                done += batch
            took, cpu = time.perf_counter() - began, time.process_time() - cpu
            print(
                f"{name}: append {'fsync' if sync else 'async'} batch {batch:4}:"
                f" {done / took:9.0f} msg/s, {cpu / done * 1e6:6.1f} us CPU/msg,"
                f" slowest {slowest * 1000:.1f} ms",
                flush=True,
            )
    for interval_s in (0.005, 0.0005):
        number = beside_python(name, store, number, seconds, interval_s)
    began, cpu, found = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < began + seconds and found < number // QUEUES:
        found += store.read(found, READ_AT_ONCE)
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"{name}: read in order {found / took:9.0f} msg/s, {cpu / found * 1e6:6.1f} us CPU/msg")
    for sync in (True, False):
        began, done = time.perf_counter(), 0
        while time.perf_counter() < began + seconds / 2:
            store.settle(done, sync)
            done += 1
        word = "fsync" if sync else "async"
        print(f"{name}: position {word} {done / (time.perf_counter() - began):9.0f} /s")
    size = sum(e.stat().st_blocks * 512 for e in os.scandir(folder))
    print(
        f"{name}: {number} messages, {size / number:.0f} B on disk each;"
        f" memory {(rss_bytes() - before) / 1e6:.0f} MB,"
        f" of it private {(private_bytes() - private) / 1e6:.0f} MB"
    )


def spin(seconds: float) -> float:
    """Turns per second of a loop that never lets the interpreter go by itself."""
    turns, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        for _ in range(100):
            turns += 1
    return turns / seconds


def beside_python(
    name: str, store: Candidate, number: int, seconds: float, interval_s: float
) -> int:
    """The broker appends in a helper thread while the loop's thread is busy in Python."""
    batch = 256
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval_s)
    alone = spin(seconds / 2)
    over = threading.Event()
    done = 0

    def append() -> None:
        nonlocal done
        while not over.is_set():
            store.append(number + done, batch, True)
            done += batch

    helper = threading.Thread(target=append)
    helper.start()
    beside = spin(seconds)
    over.set()
    helper.join()
    sys.setswitchinterval(before)
    print(
        f"{name}: append fsync batch {batch} in a thread beside busy Python,"
        f" switch interval {interval_s * 1000:g} ms:"
        f" {done / seconds:.0f} msg/s, Python left with {beside / alone:.0%}",
        flush=True,
    )
    return number + done


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(CANDIDATES))
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--folder", help="on the disk that is meant; default: here")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.inside:
        measure(given.names[0], given.inside, given.seconds)
        return
    for name in given.names:
        if name in ("lmdb", "rocksdict") and importlib.util.find_spec(name) is None:
            print(f"{name}: not installed")
            continue
        folder = tempfile.mkdtemp(prefix=f"{name}.", dir=given.folder or os.getcwd())
        try:
            command = [sys.executable, "-m", "perf.stores", name, "--inside", folder]
            subprocess.run([*command, "--seconds", str(given.seconds)], check=False)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
