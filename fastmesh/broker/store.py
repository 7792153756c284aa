"""What the broker keeps on disk: topics, queues, messages and everybody's positions, in SQLite.

The nouns are RocketMQ's, so that its clients can be served from the same file later: a message has
a *position* in the one log of the store and an *offset* in one queue of its topic; a group has a
position per queue, and what it has to see again, what is not due yet and what is only prepared wait
beside the queues.

Everything that one turn of the broker changes is one `Batch`, and a batch is one transaction. The
writing connection belongs to a helper thread (`commit`), the reading one to the loop's thread; the
write-ahead log lets both work at once. Whatever `commit` returned for is there after `kill -9`, and
when the batch said `sync` also after a power cut.

All times are wall clock milliseconds: they outlive the process.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from fastmesh import limits
from fastmesh.control.state_dir import LOCK_NAME, StateDir
from fastmesh.errors import FastmeshError

FILE_NAME = "store.sqlite3"
APPLICATION_ID = 0x464D4251
"""Says in the file's header whose it is ("FMBQ")."""
SCHEMA_VERSION = 1

_encode = msgspec.msgpack.Encoder().encode
_decode_headers = msgspec.msgpack.Decoder(dict[str, str]).decode
_decode_holes = msgspec.msgpack.Decoder(list[int]).decode

SCHEMA = """
CREATE TABLE topics(
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, queues INTEGER NOT NULL
);
CREATE TABLE messages(
    position INTEGER PRIMARY KEY, topic INTEGER NOT NULL, queue INTEGER NOT NULL,
    offset INTEGER NOT NULL, stored_ms INTEGER NOT NULL, headers BLOB NOT NULL,
    content BLOB NOT NULL
);
CREATE UNIQUE INDEX messages_by_offset ON messages(topic, queue, offset);
-- What is left of a queue's offsets when its messages are deleted.
CREATE TABLE queues(
    topic INTEGER, queue INTEGER, first INTEGER NOT NULL, end INTEGER NOT NULL,
    PRIMARY KEY(topic, queue)
) WITHOUT ROWID;
CREATE TABLE groups(
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, suspended INTEGER NOT NULL
);
-- All below next is settled but for the holes: a list of how far each lies before next.
CREATE TABLE positions(
    grp INTEGER, topic INTEGER, queue INTEGER, next INTEGER NOT NULL, holes BLOB NOT NULL,
    PRIMARY KEY(grp, topic, queue)
) WITHOUT ROWID;
CREATE TABLE retries(
    grp INTEGER, topic INTEGER, queue INTEGER, offset INTEGER, attempts INTEGER NOT NULL,
    due_ms INTEGER NOT NULL, PRIMARY KEY(grp, topic, queue, offset)
) WITHOUT ROWID;
CREATE TABLE delayed(
    number INTEGER PRIMARY KEY, due_ms INTEGER NOT NULL, topic INTEGER NOT NULL,
    headers BLOB NOT NULL, content BLOB NOT NULL
);
CREATE INDEX delayed_by_due ON delayed(due_ms);
CREATE TABLE prepared(
    id TEXT PRIMARY KEY, grp TEXT NOT NULL, topic INTEGER NOT NULL, checks INTEGER NOT NULL,
    check_ms INTEGER NOT NULL, headers BLOB NOT NULL, content BLOB NOT NULL
) WITHOUT ROWID;
-- One row: the log's end, which must not come back when the newest messages are deleted.
CREATE TABLE log(one INTEGER PRIMARY KEY CHECK(one = 1), end INTEGER NOT NULL);
INSERT INTO log VALUES(1, 1);
"""


class StoreError(FastmeshError):
    """The directory cannot be used as a store; the text says why and what would help."""


class StoreFullError(FastmeshError):
    """The batch did not fit: nothing of it is there. It may be tried again."""


class TopicRow(NamedTuple):
    id: int
    name: str
    queues: int


class MessageRow(NamedTuple):
    """A message in its queue."""

    position: int
    topic: int
    queue: int
    offset: int
    stored_ms: int
    headers: dict[str, str]
    content: bytes


class GroupRow(NamedTuple):
    id: int
    name: str
    suspended: bool


class PositionRow(NamedTuple):
    """Where a group stands in a queue: all below `next` is settled, but for `holes`, ascending."""

    group: int
    topic: int
    queue: int
    next: int
    holes: Sequence[int]


class RetryRow(NamedTuple):
    """A message that a group sees again once `due_ms` has come; `attempts` were made."""

    group: int
    topic: int
    queue: int
    offset: int
    attempts: int
    due_ms: int


class DelayedRow(NamedTuple):
    number: int
    due_ms: int
    topic: int
    headers: dict[str, str]
    content: bytes


class PreparedRow(NamedTuple):
    """A message whose producer has not said yet whether it counts."""

    id: str
    group: str
    topic: int
    checks: int
    check_ms: int
    headers: dict[str, str]
    content: bytes


class QueueRow(NamedTuple):
    """The offsets of a queue that can be read are first..end-1."""

    topic: int
    queue: int
    first: int
    end: int


@dataclass(slots=True)
class Batch:
    """Everything that one transaction writes."""

    sync: bool = False
    """Wait for the disk, not only for the kernel."""
    topics: list[TopicRow] = field(default_factory=list)
    groups: list[GroupRow] = field(default_factory=list)
    groups_gone: list[int] = field(default_factory=list)
    messages: list[MessageRow] = field(default_factory=list)
    positions: list[PositionRow] = field(default_factory=list)
    retries_cleared: list[int] = field(default_factory=list)
    """Groups that forget all their retries; done before `retries` are written."""
    retries: dict[tuple[int, int, int, int], RetryRow | None] = field(default_factory=dict)
    """By group, topic, queue, offset; None takes it out."""
    delayed: list[DelayedRow] = field(default_factory=list)
    delayed_gone: list[int] = field(default_factory=list)
    prepared: list[PreparedRow] = field(default_factory=list)
    prepared_checked: list[tuple[int, int, str]] = field(default_factory=list)
    """checks, check_ms, id"""
    prepared_gone: list[str] = field(default_factory=list)
    trimmed: list[QueueRow] = field(default_factory=list)
    """Queues whose messages below `first` are deleted."""
    log_end: int = 0
    """With `trimmed`."""

    def is_empty(self) -> bool:
        return not (
            self.messages
            or self.positions
            or self.retries
            or self.topics
            or self.groups
            or self.groups_gone
            or self.retries_cleared
            or self.delayed
            or self.delayed_gone
            or self.prepared
            or self.prepared_checked
            or self.prepared_gone
            or self.trimmed
        )


@dataclass(slots=True)
class Loaded:
    """All that the broker keeps in memory, as it was when it ended."""

    topics: list[TopicRow]
    queues: list[QueueRow]
    groups: list[GroupRow]
    positions: list[PositionRow]
    retries: list[RetryRow]
    prepared: list[PreparedRow]
    """Without their content."""
    recent_ids: list[tuple[int, str]]
    """(topic, fm.id) of the newest messages, and of what is delayed; newest last."""
    log_end: int
    stored_ms: int
    """When the newest message was stored; 0 when there is none."""
    delayed_end: int


class Store:
    """One directory, held from construction to `close()`. Raises StoreError, StateError."""

    def __init__(self, path: str, *, bytes_max: int = limits.BROKER_STORE_BYTES_MAX) -> None:
        self.path = path
        self.file = os.path.join(path, FILE_NAME)
        _refuse_foreign(path)
        self._directory = StateDir(path, called="--data")
        self._open_files: list[sqlite3.Connection] = []
        try:
            self._writer = self._open()
            self._prepare(bytes_max)
            self._reader = self._open()
            self._reader.execute("PRAGMA query_only=1")
            self._synchronous = ""
        except sqlite3.Error as error:
            self.close()
            raise StoreError(self._why(error)) from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> sqlite3.Connection:
        # One thread at a time uses each connection, but not the one that opened it.
        base = sqlite3.connect(
            self.file, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        self._open_files.append(base)
        base.execute("PRAGMA busy_timeout=5000")
        return base

    def _prepare(self, bytes_max: int) -> None:
        run = self._writer.execute
        owner = run("PRAGMA application_id").fetchone()[0]
        version = run("PRAGMA user_version").fetchone()[0]
        tables = run("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if owner != APPLICATION_ID and (owner or tables):
            raise StoreError(f"--data {self.path}: {FILE_NAME} is not a broker's store")
        run("PRAGMA journal_mode=WAL")
        run(f"PRAGMA wal_autocheckpoint={limits.BROKER_WAL_PAGES}")
        run(f"PRAGMA journal_size_limit={limits.BROKER_WAL_BYTES_KEPT}")
        page_bytes = run("PRAGMA page_size").fetchone()[0]
        self.page_bytes = int(page_bytes)
        if owner != APPLICATION_ID:
            with _transaction(self._writer):
                for statement in filter(str.strip, SCHEMA.split(";")):
                    run(statement)
                run(f"PRAGMA application_id={APPLICATION_ID}")
                run(f"PRAGMA user_version={SCHEMA_VERSION}")
            _sync_directory(self.path)
        elif version != SCHEMA_VERSION:
            raise StoreError(
                f"--data {self.path}: written with schema {version}, this broker knows"
                f" {SCHEMA_VERSION}; use the version that wrote it, or an empty directory"
            )
        elif os.path.getsize(self.file) <= limits.BROKER_CHECK_BYTES_MAX:
            found = run("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise StoreError(self._why(found))
        # Beyond our own bound, so that positions can still be written when messages no longer are.
        run(f"PRAGMA max_page_count={(bytes_max + limits.BROKER_STORE_RESERVE) // self.page_bytes}")

    def _why(self, error: object) -> str:
        return (
            f"--data {self.path}: {FILE_NAME} cannot be used: {error};"
            " restore it from a copy, or start with an empty directory"
        )

    def close(self) -> None:
        """Let go. A second call does nothing."""
        while self._open_files:
            with contextlib.suppress(sqlite3.Error):
                self._open_files.pop().close()
        self._directory.close()

    # --- the helper thread ------------------------------------------------------------------------

    def commit(self, batch: Batch) -> float:
        """Write it all, or nothing. Returns how many seconds it took.

        Raises StoreFullError (no room, nothing written), StoreError (the file is broken).
        """
        began = time.perf_counter()
        synchronous = "FULL" if batch.sync else "NORMAL"
        try:
            if synchronous != self._synchronous:
                self._writer.execute(f"PRAGMA synchronous={synchronous}")
                self._synchronous = synchronous
            with _transaction(self._writer):
                self._write(batch)
        except sqlite3.OperationalError as error:
            # Full, read-only, an I/O error, a lock that somebody else holds: it may pass.
            raise StoreFullError(f"the store cannot be written: {error}") from error
        except sqlite3.DatabaseError as error:
            raise StoreError(self._why(error)) from error
        return time.perf_counter() - began

    def _write(self, batch: Batch) -> None:
        if batch.topics:
            self._put("INSERT INTO topics VALUES", 3, batch.topics)
        if batch.messages:
            self._put(
                "INSERT INTO messages VALUES",
                7,
                [(a, b, c, d, e, _encode(f), g) for a, b, c, d, e, f, g in batch.messages],
            )
        run = self._writer.execute
        for number in batch.groups_gone:
            for table in ("positions", "retries"):
                run(f"DELETE FROM {table} WHERE grp=?", (number,))
            run("DELETE FROM groups WHERE id=?", (number,))
        if batch.groups:
            self._put("REPLACE INTO groups VALUES", 3, batch.groups)
        if batch.positions:
            self._put(
                "REPLACE INTO positions VALUES",
                5,
                [
                    (a, b, c, end, _encode([end - hole for hole in holes]))
                    for a, b, c, end, holes in batch.positions
                ],
            )
        for number in batch.retries_cleared:
            run("DELETE FROM retries WHERE grp=?", (number,))
        if batch.retries:
            self._write_retries(batch)
        if batch.delayed:
            rows = [(a, b, c, _encode(d), e) for a, b, c, d, e in batch.delayed]
            self._put("INSERT INTO delayed VALUES", 5, rows)
        if batch.delayed_gone:
            self._take_out("DELETE FROM delayed WHERE number IN", batch.delayed_gone)
        if batch.prepared:
            halves = [(*row[:5], _encode(row.headers), row.content) for row in batch.prepared]
            self._put("INSERT INTO prepared VALUES", 7, halves)
        for checked in batch.prepared_checked:
            run("UPDATE prepared SET checks=?, check_ms=? WHERE id=?", checked)
        if batch.prepared_gone:
            self._take_out("DELETE FROM prepared WHERE id IN", batch.prepared_gone)
        for row in batch.trimmed:
            run(
                "DELETE FROM messages WHERE topic=? AND queue=? AND offset<?",
                (row.topic, row.queue, row.first),
            )
            run("REPLACE INTO queues VALUES(?, ?, ?, ?)", row)
        if batch.trimmed:
            run("UPDATE log SET end=max(end, ?)", (batch.log_end,))

    def _write_retries(self, batch: Batch) -> None:
        kept = [row for row in batch.retries.values() if row is not None]
        gone = [key for key, row in batch.retries.items() if row is None]
        if kept:
            self._put("REPLACE INTO retries VALUES", 6, kept)
        if gone:
            self._writer.executemany(
                "DELETE FROM retries WHERE grp=? AND topic=? AND queue=? AND offset=?", gone
            )

    def _put(self, statement: str, columns: int, rows: Sequence[tuple[Any, ...]]) -> None:
        """Many rows a statement. Each statement lets the interpreter go and has to wait for it
        again, which costs far more than the rows do when the loop's thread is busy."""
        one = "(" + ",".join("?" * columns) + ")"
        at = 0
        while at < len(rows):
            count = next(n for n in _ROWS_AT_ONCE if n <= len(rows) - at)
            values = [value for row in rows[at : at + count] for value in row]
            self._writer.execute(statement + ",".join([one] * count), values)
            at += count

    def _take_out(self, statement: str, keys: Sequence[object]) -> None:
        for at in range(0, len(keys), 256):
            some = keys[at : at + 256]
            self._writer.execute(f"{statement} ({','.join('?' * len(some))})", some)

    # --- the loop's thread ------------------------------------------------------------------------

    def load(self, ids_max: int = limits.BROKER_IDS_REMEMBERED) -> Loaded:
        """Everything that is kept in memory. Raises StoreError."""
        try:
            return self._load(ids_max)
        except (sqlite3.DatabaseError, msgspec.MsgspecError) as error:
            raise StoreError(self._why(error)) from error

    def _load(self, ids_max: int) -> Loaded:
        run = self._reader.execute
        topics = [TopicRow(*row) for row in run("SELECT * FROM topics ORDER BY id")]
        kept = {(t, q): (first, end) for t, q, first, end in run("SELECT * FROM queues")}
        queues = []
        for topic in topics:
            for number in range(topic.queues):
                where = (topic.id, number)
                first, end = kept.get(where, (0, 0))
                # Two look-ups in the index; both ends in one statement would walk all of it.
                low, high = (
                    run(
                        f"SELECT {what}(offset) FROM messages WHERE topic=? AND queue=?", where
                    ).fetchone()[0]
                    for what in ("min", "max")
                )
                if low is not None:
                    first, end = low, max(end, high + 1)
                queues.append(QueueRow(topic.id, number, first, end))
        positions = []
        for group, topic_id, number, end, holes in run("SELECT * FROM positions"):
            before = sorted(end - hole for hole in _decode_holes(holes))
            positions.append(PositionRow(group, topic_id, number, end, before))
        newest = run("SELECT max(position) FROM messages").fetchone()[0] or 0
        stored = run("SELECT stored_ms FROM messages WHERE position=?", (newest,)).fetchone()
        recent = run(
            "SELECT topic, headers FROM messages ORDER BY position DESC LIMIT ?", (ids_max,)
        )
        ids = [(topic_id, _decode_headers(h).get("fm.id", "")) for topic_id, h in recent][::-1]
        late = run("SELECT topic, headers FROM delayed ORDER BY number DESC LIMIT ?", (ids_max,))
        ids += [(topic_id, _decode_headers(h).get("fm.id", "")) for topic_id, h in late]
        return Loaded(
            topics=topics,
            queues=queues,
            groups=[GroupRow(a, b, bool(c)) for a, b, c in run("SELECT * FROM groups")],
            positions=positions,
            retries=[RetryRow(*row) for row in run("SELECT * FROM retries ORDER BY offset")],
            prepared=[
                PreparedRow(a, b, c, d, e, _decode_headers(f), b"")
                for a, b, c, d, e, f in run(
                    "SELECT id, grp, topic, checks, check_ms, headers FROM prepared"
                    " ORDER BY check_ms"
                )
            ],
            recent_ids=ids,
            log_end=max(newest + 1, run("SELECT end FROM log").fetchone()[0]),
            stored_ms=stored[0] if stored else 0,
            delayed_end=(run("SELECT max(number) FROM delayed").fetchone()[0] or 0) + 1,
        )

    def read(
        self, topic: int, queue: int, offset: int, count: int, bytes_max: int
    ) -> list[MessageRow]:
        """Up to `count` messages of a queue from `offset` on, in order; fewer once their content
        reaches `bytes_max`, but one at least where there is one."""
        found: list[MessageRow] = []
        size = 0
        for row in self._reader.execute(
            "SELECT position, topic, queue, offset, stored_ms, headers, content FROM messages"
            " WHERE topic=? AND queue=? AND offset>=? ORDER BY offset LIMIT ?",
            (topic, queue, offset, count),
        ):
            position, _, _, at, stored_ms, headers, content = row
            found.append(
                MessageRow(position, topic, queue, at, stored_ms, _decode_headers(headers), content)
            )
            size += len(content)
            if size >= bytes_max:
                break
        return found

    def offset_at(self, queue: QueueRow, time_ms: int) -> int:
        """The first offset stored at or after this time; the queue's end when there is none."""
        low, high = queue.first, queue.end
        while low < high:
            middle = (low + high) // 2
            row = self._reader.execute(
                "SELECT stored_ms FROM messages WHERE topic=? AND queue=? AND offset=?",
                (queue.topic, queue.queue, middle),
            ).fetchone()
            if row is None or row[0] < time_ms:
                low = middle + 1
            else:
                high = middle
        return low

    def stored_ms(self, topic: int, queue: int, offset: int) -> int | None:
        row = self._reader.execute(
            "SELECT stored_ms FROM messages WHERE topic=? AND queue=? AND offset=?",
            (topic, queue, offset),
        ).fetchone()
        return None if row is None else int(row[0])

    def delayed_next_ms(self) -> int | None:
        """When the next delayed message is due."""
        return self._one("SELECT min(due_ms) FROM delayed")

    def delayed_due(self, now_ms: int, count: int) -> list[DelayedRow]:
        return [
            DelayedRow(a, b, c, _decode_headers(d), e)
            for a, b, c, d, e in self._reader.execute(
                "SELECT number, due_ms, topic, headers, content FROM delayed WHERE due_ms<=?"
                " ORDER BY due_ms, number LIMIT ?",
                (now_ms, count),
            )
        ]

    def delayed_count(self) -> int:
        return self._one("SELECT count(*) FROM delayed") or 0

    def prepared_content(self, id: str) -> bytes | None:
        row = self._reader.execute("SELECT content FROM prepared WHERE id=?", (id,)).fetchone()
        return None if row is None else row[0]

    def size_bytes(self) -> int:
        """What messages and all else take, without pages that are free to be used again."""
        pages = (self._one("PRAGMA page_count") or 0) - (self._one("PRAGMA freelist_count") or 0)
        return pages * self.page_bytes

    def disk_bytes(self) -> int:
        """What the files take on disk."""
        names = (FILE_NAME, FILE_NAME + "-wal", FILE_NAME + "-shm")
        found = 0
        for name in names:
            with contextlib.suppress(OSError):
                found += os.stat(os.path.join(self.path, name)).st_blocks * 512
        return found

    def _one(self, statement: str) -> int | None:
        row = self._reader.execute(statement).fetchone()
        return row[0] if row else None


_ROWS_AT_ONCE = (256, 64, 16, 4, 1)
"""Few different statements, so that each stays prepared."""


@contextlib.contextmanager
def _transaction(base: sqlite3.Connection) -> Iterator[None]:
    base.execute("BEGIN IMMEDIATE")
    try:
        yield
        base.execute("COMMIT")
    except BaseException:
        # SQLite has already rolled back where the disk was full.
        if base.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                base.execute("ROLLBACK")
        raise


def _refuse_foreign(path: str) -> None:
    """A directory with other things in it is somebody else's: a typing error must not fill it."""
    try:
        names = set(os.listdir(path))
    except OSError:
        return  # not there yet, or StateDir says what is wrong with it
    if names and FILE_NAME not in names and names != {LOCK_NAME}:
        other = sorted(names - {LOCK_NAME})[0]
        raise StoreError(
            f"--data {path}: holds {other!r} and no {FILE_NAME}; give an empty directory or a"
            " broker's own"
        )


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
