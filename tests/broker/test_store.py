"""The store alone: what is written is there, what is foreign is refused, what is full says so."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from fastmesh.broker.store import (
    FILE_NAME,
    SCHEMA_VERSION,
    Batch,
    DelayedRow,
    GroupRow,
    MessageRow,
    PositionRow,
    PreparedRow,
    QueueRow,
    RetryRow,
    Store,
    StoreError,
    StoreFullError,
    TopicRow,
)
from fastmesh.errors import StateError

TOPIC = TopicRow(1, "orders", 2)


def message(position: int, queue: int, offset: int, content: bytes = b"x") -> MessageRow:
    return MessageRow(
        position, 1, queue, offset, 1000 + position, {"fm.id": f"m{position}"}, content
    )


def filled(path: Path, count: int = 10) -> Store:
    store = Store(str(path))
    rows = [message(n + 1, n % 2, n // 2) for n in range(count)]
    store.commit(Batch(sync=True, topics=[TOPIC], messages=rows))
    return store


def test_everything_comes_back(tmp_path: Path) -> None:
    store = filled(tmp_path / "data")
    store.commit(
        Batch(
            groups=[GroupRow(1, "g", True)],
            positions=[PositionRow(1, 1, 0, 4, [1, 3])],
            retries={(1, 1, 1, 2): RetryRow(1, 1, 1, 2, 3, 5000)},
            delayed=[DelayedRow(1, 7000, 1, {"fm.id": "late"}, b"late")],
            prepared=[PreparedRow("p1", "pg", 1, 2, 8000, {"fm.id": "p1"}, b"half")],
        )
    )
    store.close()
    store = Store(str(tmp_path / "data"))
    found = store.load()
    assert found.topics == [TOPIC]
    assert found.queues == [QueueRow(1, 0, 0, 5), QueueRow(1, 1, 0, 5)]
    assert found.groups == [GroupRow(1, "g", True)]
    assert found.positions == [PositionRow(1, 1, 0, 4, [1, 3])]
    assert found.retries == [RetryRow(1, 1, 1, 2, 3, 5000)]
    assert found.prepared == [PreparedRow("p1", "pg", 1, 2, 8000, {"fm.id": "p1"}, b"")]
    assert found.recent_ids == [(1, f"m{n}") for n in range(1, 11)] + [(1, "late")]
    assert (found.log_end, found.stored_ms, found.delayed_end) == (11, 1010, 2)
    assert store.prepared_content("p1") == b"half"
    assert store.delayed_next_ms() == 7000
    assert store.delayed_due(6999, 10) == []
    assert [row.content for row in store.delayed_due(7000, 10)] == [b"late"]
    assert [row.offset for row in store.read(1, 0, 2, 10, 1 << 20)] == [2, 3, 4]
    assert [row.offset for row in store.read(1, 0, 2, 10, 1)] == [2]
    store.close()


def test_many_rows_at_once(tmp_path: Path) -> None:
    """More than fit one statement, and none of the sizes that statements come in."""
    store = filled(tmp_path / "data", 1111)
    found = store.read(1, 1, 0, 2000, 1 << 30)
    assert [row.offset for row in found] == list(range(555))
    store.close()


def test_a_batch_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    store = filled(tmp_path / "data")
    twice = Batch(messages=[message(11, 0, 5), message(12, 0, 5)])
    with pytest.raises(StoreError):
        store.commit(twice)
    store.commit(Batch(messages=[message(11, 0, 5)]))
    assert [row.position for row in store.read(1, 0, 4, 10, 1 << 20)] == [9, 11]
    store.close()


def test_offset_at_a_time(tmp_path: Path) -> None:
    store = filled(tmp_path / "data")
    queue = QueueRow(1, 0, 0, 5)  # stored at 1001, 1003, 1005, 1007, 1009
    assert [store.offset_at(queue, ms) for ms in (0, 1001, 1002, 1009, 1010)] == [0, 0, 1, 4, 5]
    store.close()


def test_trimmed_queues_keep_their_offsets(tmp_path: Path) -> None:
    store = filled(tmp_path / "data")
    store.commit(Batch(trimmed=[QueueRow(1, 0, 5, 5), QueueRow(1, 1, 2, 5)], log_end=11))
    store.close()
    store = Store(str(tmp_path / "data"))
    found = store.load()
    assert found.queues == [QueueRow(1, 0, 5, 5), QueueRow(1, 1, 2, 5)]
    assert found.log_end == 11
    assert [row.offset for row in store.read(1, 1, 0, 9, 1 << 20)] == [2, 3, 4]
    store.close()


def test_a_retry_is_taken_out(tmp_path: Path) -> None:
    store = filled(tmp_path / "data")
    store.commit(Batch(retries={(1, 1, 0, n): RetryRow(1, 1, 0, n, 1, 9) for n in (0, 1)}))
    store.commit(Batch(retries={(1, 1, 0, 0): None}))
    assert [row.offset for row in store.load().retries] == [1]
    store.commit(Batch(retries_cleared=[1]))
    assert store.load().retries == []
    store.close()


def test_full_says_so_and_goes_on(tmp_path: Path) -> None:
    store = filled(tmp_path / "data")
    pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
    store._writer.execute(f"PRAGMA max_page_count={pages + 20}")
    large = [message(11 + n, 0, 5 + n, bytes(4000)) for n in range(100)]
    with pytest.raises(StoreFullError, match="full"):
        store.commit(Batch(sync=True, messages=large))
    assert len(store.read(1, 0, 0, 100, 1 << 20)) == 5
    store.commit(Batch(positions=[PositionRow(1, 1, 0, 5, [])]))
    store._writer.execute(f"PRAGMA max_page_count={pages + 2000}")
    store.commit(Batch(sync=True, messages=large))
    assert len(store.read(1, 0, 0, 1000, 1 << 30)) == 105
    store.close()


def test_two_brokers_on_one_directory(tmp_path: Path) -> None:
    store = filled(tmp_path / "data")
    with pytest.raises(StateError, match=rf"--data .* in use by process {os.getpid()}"):
        Store(str(tmp_path / "data"))
    store.close()
    Store(str(tmp_path / "data")).close()


def test_a_foreign_directory(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds 'letters.txt' and no store.sqlite3"):
        Store(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["letters.txt"]


def test_a_foreign_database(tmp_path: Path) -> None:
    base = sqlite3.connect(tmp_path / FILE_NAME)
    base.execute("CREATE TABLE mine(x)")
    base.close()
    os.chmod(tmp_path, 0o700)
    with pytest.raises(StoreError, match="not a broker's store"):
        Store(str(tmp_path))


def test_a_newer_schema(tmp_path: Path) -> None:
    filled(tmp_path / "data").close()
    base = sqlite3.connect(tmp_path / "data" / FILE_NAME)
    base.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    base.close()
    with pytest.raises(StoreError, match=f"schema {SCHEMA_VERSION + 1}, this broker knows"):
        Store(str(tmp_path / "data"))


@pytest.mark.parametrize("what", ["text", "zeros in the middle", "cut"])
def test_damage(tmp_path: Path, what: str) -> None:
    filled(tmp_path / "data", 2000).close()
    path = tmp_path / "data" / FILE_NAME
    data = bytearray(path.read_bytes())
    if what == "text":
        data[:] = b"not a database at all " * 500
    elif what == "cut":
        del data[len(data) // 2 :]
    else:
        data[8192:40960] = bytes(32768)
    path.write_bytes(data)
    with pytest.raises(StoreError, match="restore it from a copy"):
        Store(str(tmp_path / "data"))
    # And lets go of the directory.
    for left in path.parent.glob(f"{FILE_NAME}*"):
        left.unlink()
    Store(str(tmp_path / "data")).close()


def test_a_directory_that_others_may_write(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    os.chmod(folder, 0o777)
    with pytest.raises(StateError, match="can be written by others"):
        Store(str(folder))
