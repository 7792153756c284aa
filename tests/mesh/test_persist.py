"""Generations on disk: what is whole is found, what is not is never believed (C5 of the fault
list)."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastmesh.control.state_dir import StateDir
from fastmesh.mesh import persist
from fastmesh.mesh.persist import GenerationStore, Loaded, SaveError, Saver, explain, pack, unpack

OLD, NEW = b'{"state":"old"}', b'{"state":"new one"}'
MOST = 4096


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[StateDir]:
    held = StateDir(str(tmp_path / "run"))
    yield held
    held.close()


@pytest.fixture
def store(state_dir: StateDir) -> Iterator[GenerationStore]:
    found = GenerationStore(state_dir, "r", MOST)
    yield found
    found.close()


def load(state_dir: StateDir) -> Loaded[bytes]:
    """As the next process would."""
    store = GenerationStore(state_dir, "r", MOST)
    try:
        return store.load(bytes)
    finally:
        store.close()


def files(store: GenerationStore) -> set[str]:
    return set(os.listdir(store.path)) - {"lock"}


def at(store: GenerationStore, name: str) -> Path:
    return Path(store.path, name)


# --- save and load --------------------------------------------------------------------------------


def test_nothing_was_ever_saved(store: GenerationStore) -> None:
    assert store.load(bytes) == Loaded(None, "none")


def test_two_generations_are_kept_and_no_more(store: GenerationStore, state_dir: StateDir) -> None:
    for number in range(5):
        store.save(b"%d" % number)
        assert load(state_dir) == Loaded(b"%d" % number, "newest", (), 1)
        names = {"r.state"} | ({"r.state.previous"} if number else set())
        assert files(store) == names
    assert unpack(at(store, "r.state.previous").read_bytes(), MOST) == b"3"
    assert at(store, "r.state").stat().st_mode & 0o777 == 0o600


def test_the_next_process_goes_on_with_the_generations(state_dir: StateDir) -> None:
    for payload in (OLD, NEW):
        store = GenerationStore(state_dir, "r", MOST)
        store.load(bytes)
        store.save(payload)
        store.close()
    assert unpack(Path(state_dir.path, "r.state.previous").read_bytes(), MOST) == OLD


def test_what_a_crash_left_is_removed_and_not_read(
    store: GenerationStore, state_dir: StateDir
) -> None:
    store.save(OLD)
    at(store, "r.state.new").write_bytes(pack(NEW))
    assert load(state_dir).value == OLD
    assert files(store) == {"r.state"}


def test_a_save_replaces_what_a_crash_left(store: GenerationStore, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    at(store, "r.state.new").symlink_to(tmp_path / "precious")
    store.save(OLD)
    assert store.load(bytes).value == OLD
    assert (tmp_path / "precious").read_text() == "precious"


def test_more_than_fits_is_refused_and_nothing_changes(store: GenerationStore) -> None:
    store.save(OLD)
    with pytest.raises(OSError, match="more than 4096 bytes"):
        store.save(b"x" * (MOST + 1))
    assert store.load(bytes).value == OLD
    store.save(b"x" * MOST)
    assert store.load(bytes).size_bytes == MOST


# --- C5: damage -----------------------------------------------------------------------------------


def check_damage(store: GenerationStore, state_dir: StateDir, damaged: bytes) -> None:
    at(store, "r.state").write_bytes(damaged)
    found = load(state_dir)
    assert (found.value, found.source) == (OLD, "previous")
    assert len(found.problems) == 1
    assert found.problems[0].startswith("r.state: ")


def test_every_truncation_is_seen(store: GenerationStore, state_dir: StateDir) -> None:
    store.save(OLD)
    store.save(NEW)
    whole = at(store, "r.state").read_bytes()
    for length in range(len(whole)):
        check_damage(store, state_dir, whole[:length])
    check_damage(store, state_dir, whole + b"\0")
    check_damage(store, state_dir, whole + whole)


def test_every_flipped_bit_is_seen(store: GenerationStore, state_dir: StateDir) -> None:
    store.save(OLD)
    store.save(NEW)
    whole = at(store, "r.state").read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            check_damage(store, state_dir, bytes(damaged))


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (pack(NEW, version=0), "has version 0; this fastmesh reads version 1"),
        (pack(NEW, version=2), "has version 2; this fastmesh reads version 1"),
        (b"", "is cut off: 0 bytes are no header"),
        (b"\0" * 4096, "is not a state file of fastmesh"),
        (pack(b"x" * (MOST + 1)), "announces 4097 bytes, more than 4096"),
        (pack(b"not for us"), "is not for us"),
    ],
)
def test_what_cannot_be_used_is_named(store: GenerationStore, damaged: bytes, message: str) -> None:
    def accept(payload: bytes) -> bytes:
        if payload == b"not for us":
            raise ValueError("is not for us")
        return payload

    store.save(OLD)
    store.save(NEW)
    at(store, "r.state").write_bytes(damaged)
    assert store.load(accept) == Loaded(OLD, "previous", (f"r.state: {message}",), len(OLD))
    at(store, "r.state.previous").write_bytes(damaged)
    found = store.load(accept)
    assert (found.value, found.source, len(found.problems)) == (None, "none", 2)


@pytest.mark.parametrize("kind", ["missing", "link", "fifo", "directory"])
def test_what_is_no_file_is_not_followed_or_waited_for(store: GenerationStore, kind: str) -> None:
    store.save(OLD)
    store.save(NEW)
    newest = at(store, "r.state")
    newest.rename(at(store, "elsewhere"))
    if kind == "link":
        newest.symlink_to("elsewhere")
    elif kind == "fifo":
        os.mkfifo(newest)
    elif kind == "directory":
        newest.mkdir()
    found = store.load(bytes)
    assert (found.value, found.source, len(found.problems)) == (OLD, "previous", 1)


def test_damage_never_becomes_the_previous_generation(
    store: GenerationStore, state_dir: StateDir
) -> None:
    store.save(OLD)
    store.save(NEW)
    at(store, "r.state").write_bytes(b"damage")
    after = GenerationStore(state_dir, "r", MOST)
    assert after.load(bytes).value == OLD
    after.save(b"third")
    assert after.load(bytes) == Loaded(b"third", "newest", (), 5)
    assert unpack(at(store, "r.state.previous").read_bytes(), MOST) == OLD
    after.close()


# --- errors ---------------------------------------------------------------------------------------


def failing(error: int) -> Any:
    def call(*_: Any, **__: Any) -> Any:
        raise OSError(error, os.strerror(error))

    return call


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "link", "rename"])
def test_an_error_at_any_step_leaves_the_old_state(
    store: GenerationStore, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    store.save(OLD)
    with monkeypatch.context() as broken:
        broken.setattr(os, call, failing(error))
        with pytest.raises(OSError, match=r".") as caught:
            store.save(NEW)
    assert caught.value.errno == error
    assert store.load(bytes) == Loaded(OLD, "newest", (), len(OLD))
    assert "r.state.new" not in files(store)
    store.save(NEW)
    assert store.load(bytes).value == NEW


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS])
def test_without_hard_links_the_newest_is_moved(
    store: GenerationStore, state_dir: StateDir, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    monkeypatch.setattr(os, "link", failing(error))
    store.save(OLD)
    store.save(NEW)
    assert files(store) == {"r.state", "r.state.previous"}
    rename = os.rename
    names: list[str] = []

    def second_fails(old: str, new: str, **more: Any) -> None:
        names.append(new)
        if len(names) == 2:
            raise OSError(errno.EIO, "no")
        rename(old, new, **more)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no"):
        store.save(b"third")
    assert names == ["r.state.previous", "r.state", "r.state"], "and it was moved back"
    assert load(state_dir) == Loaded(NEW, "newest", (), len(NEW))


def test_a_short_write_is_gone_on_with(
    store: GenerationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:1]))
    store.save(OLD)
    assert store.load(bytes).value == OLD


@pytest.mark.parametrize(
    ("error", "status", "advice"),
    [
        (errno.ENOSPC, 507, "free some space"),
        (errno.EDQUOT, 507, "quota"),
        (errno.EFBIG, 507, "RLIMIT_FSIZE"),
        (errno.EROFS, 503, "remount"),
        (errno.EIO, 503, "kernel's log"),
        (errno.EACCES, 503, "Permission denied"),
        (errno.EMFILE, 503, "Too many open files"),
    ],
)
def test_an_error_says_what_to_do(error: int, status: int, advice: str) -> None:
    found = explain(OSError(error, os.strerror(error)), "/state")
    assert found.status == status
    assert "/state" in str(found)
    assert advice in str(found)


# --- the saver ------------------------------------------------------------------------------------


class Gate:
    """A disk that answers when the test says so."""

    def __init__(self, store: GenerationStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        save = store.save

        def slow(payload: bytes) -> None:
            self.entered.release()
            assert self.go_on.acquire(timeout=20)
            save(payload)

        monkeypatch.setattr(store, "save", slow)


async def test_the_loop_does_not_wait_for_the_disk(
    store: GenerationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(store, monkeypatch)
    saver = Saver(store)
    saving = asyncio.ensure_future(saver.save(OLD))
    await asyncio.to_thread(gate.entered.acquire)
    for _ in range(100):  # the loop turns while the disk hangs
        await asyncio.sleep(0)
    assert not saving.done()
    assert store.load(bytes).value is None
    gate.go_on.release()
    await saving
    assert store.load(bytes).value == OLD
    assert (saver.saves, saver.failures) == (1, 0)
    await saver.close()


async def test_a_disk_that_hangs_is_a_clear_error_and_the_next_save_waits_its_turn(
    store: GenerationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(store, monkeypatch)
    saver = Saver(store)
    for payload in (OLD, b"never begun"):
        with pytest.raises(SaveError, match=r"has not answered for 0\.05 s") as caught:
            await saver.save(payload, 0.05)
        assert caught.value.status == 503
    assert gate.entered.acquire(blocking=False)
    assert not gate.entered.acquire(blocking=False), "two saves at once"
    saving = asyncio.ensure_future(saver.save(NEW))
    gate.go_on.release(2)
    await saving
    assert store.load(bytes).value == NEW
    assert unpack(at(store, "r.state.previous").read_bytes(), MOST) == OLD
    assert (saver.saves, saver.failures) == (1, 2)
    await saver.close()


async def test_no_thread_is_an_error_too(
    store: GenerationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    saver = Saver(store)
    with monkeypatch.context() as broken:
        broken.setattr(persist.threading.Thread, "start", no_thread)
        with pytest.raises(SaveError, match="start new thread"):
            await saver.save(OLD)
    await saver.save(NEW)
    assert store.load(bytes).value == NEW
    await saver.close()
