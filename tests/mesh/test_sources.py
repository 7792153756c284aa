"""Watched files and schedules: what is taken, what is kept, and when."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fastmesh import limits
from fastmesh.config import Push
from fastmesh.errors import ConfigError, HandoverError, ManagedElsewhereError, StaleError
from fastmesh.mesh.persist import SaveError
from fastmesh.mesh.sources import Brokers, Schedules, WatchedFile
from tests.conftest import LogLines

ONE = 'brokers: [{name: b1, address: "127.0.0.1:1"}]'
TWO = 'brokers: [{name: b1, address: "127.0.0.1:1"}, {name: b2, address: "127.0.0.1:2"}]'


def schedule(weight: int = 100, app: str = "shop") -> bytes:
    nodes = [
        {"name": "n1", "address": "127.0.0.1:11", "weight": weight},
        {"name": "n2", "address": "127.0.0.1:12"},
    ]
    return json.dumps({"apps": {app: {"nodes": nodes}}}).encode()


def test_a_file_is_read_when_it_looks_different(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("a")
    file = WatchedFile(str(path), 100)
    assert file.read() == b"a"
    assert file.look() is None
    path.write_text("b")
    assert file.look() == b"b"
    assert file.look() is None
    path.with_suffix(".new").write_text("c")
    path.with_suffix(".new").rename(path)
    assert file.look() == b"c"
    path.write_text("c")
    assert file.look() is None, "written again, and the same"
    path.write_bytes(b"x" * 101)
    with pytest.raises(ValueError, match="longer than 100"):
        file.look()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file.look()
    path.write_text("d")
    assert file.look() == b"d"


def test_a_change_within_one_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("a")
    stamp = os.stat(path)
    file = WatchedFile(str(path), 100)
    assert file.look() == b"a"
    path.write_text("b")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.look() == b"b"


def brokers(path: Path, log: LogLines) -> Brokers:
    return Brokers(Push(brokers_file=str(path)), log.log)


def names(found: Brokers) -> list[str]:
    return [b.name for b in found.now]


def test_the_last_good_brokers_stay(tmp_path: Path, log_lines: LogLines) -> None:
    async def main() -> None:
        path = tmp_path / "brokers.yaml"
        path.write_text(ONE)
        found = brokers(path, log_lines)
        assert names(found) == ["b1"]
        assert not await found.poll()
        path.write_text(TWO)
        assert await found.poll()
        assert names(found) == ["b1", "b2"]
        for wrong in ("brokers: [{name: b1}]", "", "brokers: 7", "x" * 20, "\0"):
            path.write_text(wrong)
            assert not await found.poll()
            assert names(found) == ["b1", "b2"]
            assert found.failure
        path.unlink()
        assert not await found.poll()
        assert "No such file" in found.failure
        path.write_text(TWO)
        assert not await found.poll(), "the same as before"
        assert found.failure == ""
        assert "brokers not taken" in log_lines.text()

    asyncio.run(main())


def test_an_empty_list_is_believed_when_it_stays(tmp_path: Path, log_lines: LogLines) -> None:
    async def main() -> None:
        path = tmp_path / "brokers.yaml"
        path.write_text(TWO)
        found = brokers(path, log_lines)
        path.write_text("brokers: []")
        for _ in range(limits.EMPTY_POLLS - 1):
            assert not await found.poll()
            assert names(found) == ["b1", "b2"]
            assert "empty" in found.failure
        path.write_text(ONE)
        assert await found.poll()
        assert (names(found), found.failure) == (["b1"], "")
        path.write_text("brokers: []")
        polls = 0
        while not await found.poll():
            polls += 1
        assert polls == limits.EMPTY_POLLS - 1
        assert (names(found), found.failure) == ([], "")

    asyncio.run(main())


def test_an_empty_file_at_the_start_removes_nobody(tmp_path: Path, log_lines: LogLines) -> None:
    path = tmp_path / "brokers.yaml"
    path.write_text("brokers: []")
    assert names(brokers(path, log_lines)) == []


class Kept:
    """Where PUT schedules go."""

    def __init__(self) -> None:
        self.saved: list[bytes] = []
        self.error: Exception | None = None

    async def save(self, data: bytes) -> None:
        if self.error is not None:
            raise self.error
        self.saved.append(data)


def schedules(log: LogLines, kept: Kept, file: str = "", stored: bytes | None = None) -> Schedules:
    return Schedules(log.log, node="n1", file=file, stored=stored, keep=kept.save)


def weight(found: Schedules) -> int:
    return found.now.plan.apps["shop"].nodes[0].weight


def test_a_schedule_that_is_put_is_durable_before_it_is_in_force(log_lines: LogLines) -> None:
    async def main() -> None:
        kept = Kept()
        found = schedules(log_lines, kept)
        assert (found.now.source, dict(found.peers())) == ("none", {})
        version = found.version
        await found.put(schedule(20), None)
        assert (weight(found), found.now.source, kept.saved) == (20, "put", [schedule(20)])
        assert found.version == version + 1
        assert set(found.peers()) == {"n2"}
        await found.put(schedule(20), None)
        assert found.version == version + 1, "the same again is nothing new"
        kept.error = SaveError(507, "disk full")
        with pytest.raises(SaveError):
            await found.put(schedule(30), None)
        assert weight(found) == 20
        assert weight(schedules(log_lines, Kept(), stored=kept.saved[-1])) == 20, "a restart"

    asyncio.run(main())


def test_a_schedule_may_be_put_only_over_the_one_that_was_read(log_lines: LogLines) -> None:
    async def main() -> None:
        found = schedules(log_lines, Kept())
        first = found.now.etag
        await found.put(schedule(20), first)
        with pytest.raises(StaleError):
            await found.put(schedule(30), first)
        await found.put(schedule(30), found.now.etag)
        await found.put(schedule(40), "*")
        assert weight(found) == 40

    asyncio.run(main())


def test_a_faulty_schedule_is_told_whole_and_changes_nothing(log_lines: LogLines) -> None:
    async def main() -> None:
        kept = Kept()
        found = schedules(log_lines, kept)
        await found.put(schedule(20), None)
        bad = b'{"apps": {"shop": {"nodes": [{"name": "n1", "weight": 101}, {"name": "n2"}]}}}'
        with pytest.raises(ConfigError) as caught:
            await found.put(bad, None)
        paths = {p.path for p in caught.value.problems}
        assert "apps.shop.nodes[0].weight" in paths
        assert {"apps.shop.nodes[0].address", "apps.shop.nodes[1].address"} <= paths
        assert (weight(found), len(kept.saved)) == (20, 1)

    asyncio.run(main())


def test_a_file_decides_alone(tmp_path: Path, log_lines: LogLines) -> None:
    async def main() -> None:
        path = tmp_path / "schedule.yaml"
        path.write_bytes(schedule(50))
        found = schedules(log_lines, Kept(), str(path), stored=schedule(1))
        assert (weight(found), found.now.source) == (50, "file")
        with pytest.raises(ManagedElsewhereError, match=r"schedule\.yaml"):
            await found.put(schedule(20), None)
        assert not await found.poll()
        path.write_bytes(schedule(60))
        assert await found.poll()
        assert weight(found) == 60
        path.write_bytes(b"apps: {shop: {}}")
        assert not await found.poll()
        assert (weight(found), bool(found.failure)) == (60, True)
        path.unlink()
        assert not await found.poll()
        path.write_bytes(schedule(70))
        assert await found.poll()
        assert (weight(found), found.failure) == (70, "")
        found.adopt(found.check(""), "")
        assert (weight(found), found.now.source) == (1, "put"), "without a file, what was put"

    asyncio.run(main())


def test_a_schedule_file_that_cannot_be_used_stops_a_start(
    tmp_path: Path, log_lines: LogLines
) -> None:
    with pytest.raises(ConfigError) as caught:
        schedules(log_lines, Kept(), str(tmp_path / "none"))
    assert caught.value.problems[0].path == "push.schedule.file"


def test_a_stored_schedule_of_another_version_is_told_and_left(log_lines: LogLines) -> None:
    found = schedules(log_lines, Kept(), stored=b"apps: {shop: {knots: []}}")
    assert found.now.source == "none"
    assert found.failure
    assert "schedule not taken" in log_lines.text()


def test_the_native_schedule_is_the_same_object_while_nothing_in_it_changes(
    log_lines: LogLines,
) -> None:
    async def main() -> None:
        found = schedules(log_lines, Kept())
        await found.put(schedule(20), None)
        first = found.native("shop", {"n2": 7})
        assert first is not None
        assert found.native("shop", {"n2": 7, "other": 9}) is first
        assert found.native("nobody", {"n2": 7}) is None
        both: Any = json.loads(schedule(20))
        both["apps"]["more"] = json.loads(schedule(3))["apps"]["shop"]
        await found.put(json.dumps(both).encode(), None)
        assert found.native("shop", {"n2": 7}) is first, "another application's change"
        assert found.native("shop", {"n2": 8}) is not first, "another endpoint"
        await found.put(schedule(21), None)
        assert found.native("shop", {"n2": 8}) is not first
        await found.put(b"apps: {}", None)
        assert found.native("shop", {"n2": 8}) is None

    asyncio.run(main())


# --- hand-over ------------------------------------------------------------------------------------


def saved(found: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(found.save()))


def test_a_successor_keeps_the_last_good_brokers_of_the_same_file(
    tmp_path: Path, log_lines: LogLines
) -> None:
    async def main() -> None:
        path = tmp_path / "brokers.yaml"
        path.write_text(
            'brokers: [{name: b1, address: "[::1]:1", weight: 7, topics: [a, "b*"]},'
            ' {name: b2, address: "unix:/run/b2.sock"}]'
        )
        before = brokers(path, log_lines)
        last = saved(before)
        path.write_text("brokers: []")
        push = Push(brokers_file=str(path))
        after = Brokers(push, log_lines.log, last)
        assert after.now == before.now, "as whoever has seen it full: not believed at once"
        for _ in range(limits.EMPTY_POLLS):
            await after.poll()
        assert after.now == ()
        assert Brokers(push, log_lines.log).now == (), "who starts afresh believes it"
        path.write_text("brokers: 7")
        assert Brokers(push, log_lines.log, last).now == before.now
        path.write_text(TWO)
        assert names(Brokers(push, log_lines.log, last)) == ["b1", "b2"]
        other = tmp_path / "other.yaml"
        other.write_text("brokers: []")
        assert Brokers(Push(brokers_file=str(other)), log_lines.log, last).now == ()
        listed = Push(brokers=before.now[:1])
        assert names(Brokers(listed, log_lines.log, last)) == ["b1"]
        assert Brokers(listed, log_lines.log).save().now == []

    asyncio.run(main())


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "b", "address": "nowhere"},
        {"name": "b", "address": 7},
        {"address": "127.0.0.1:1"},
        {"name": "b", "address": "127.0.0.1:1", "weight": 101},
        {"name": "b", "address": "127.0.0.1:1", "topics": "*"},
    ],
)
def test_brokers_that_are_none_are_refused(
    tmp_path: Path, log_lines: LogLines, wrong: dict[str, Any]
) -> None:
    path = tmp_path / "brokers.yaml"
    path.write_text(ONE)
    with pytest.raises(HandoverError, match="brokers"):
        Brokers(Push(brokers_file=str(path)), log_lines.log, {"file": str(path), "now": [wrong]})


def taken(log: LogLines, file: str = "", last: object = None) -> Schedules:
    async def keep(data: bytes) -> None:
        pass

    return Schedules(log.log, node="n1", file=file, stored=None, keep=keep, last=last)


def test_a_successor_has_the_schedule_that_was_put_and_counts_on(
    tmp_path: Path, log_lines: LogLines
) -> None:
    async def main() -> None:
        before = taken(log_lines)
        for weight in (1, 2, 3):
            await before.put(schedule(weight), None)
        after = taken(log_lines, last=saved(before))
        assert after.now == before.now
        assert after.version == before.version == 4
        await after.put(schedule(4), before.now.etag)
        assert after.version == 5
        file = tmp_path / "schedule.yaml"
        file.write_bytes(schedule(50))
        other = taken(log_lines, str(file), saved(after))
        assert (other.version, other.now.source) == (6, "file")
        same = taken(log_lines, str(file), saved(other))
        assert same.version == 6
        back = taken(log_lines, "", saved(same))
        assert (back.version, back.now.source) == (7, "put")
        assert back.now.etag == after.now.etag, "what was put stays known under a file"
        odd = taken(log_lines, last={"version": 9, "stored": base64(b"apps: 7")})
        assert (odd.version, odd.now.source) == (10, "none")
        assert "schedule not taken" in log_lines.text()
        with pytest.raises(HandoverError, match="schedule"):
            taken(log_lines, last={"stored": "not base 64!"})

    asyncio.run(main())


def base64(data: bytes) -> str:
    found: str = msgspec.to_builtins(data)
    return found


def test_nothing_is_put_while_it_is_held(log_lines: LogLines) -> None:
    async def main() -> None:
        entered, gate = asyncio.Event(), asyncio.Event()
        kept: list[bytes] = []

        async def keep(data: bytes) -> None:
            entered.set()
            await gate.wait()
            kept.append(data)

        found = Schedules(log_lines.log, node="n1", file="", stored=None, keep=keep)
        under_way = asyncio.ensure_future(found.put(schedule(1), None))
        await entered.wait()
        behind = asyncio.ensure_future(found.put(schedule(2), None))
        await asyncio.sleep(0)
        holding = asyncio.ensure_future(found.hold())
        await asyncio.sleep(0)
        assert not holding.done()
        gate.set()
        await holding
        await under_way
        for late in (behind, asyncio.ensure_future(found.put(schedule(3), None))):
            with pytest.raises(SaveError, match="upgraded") as caught:
                await late
            assert caught.value.status == 503
        assert kept == [schedule(1)]
        found.thaw()
        await found.put(schedule(4), None)
        assert kept == [schedule(1), schedule(4)]

    asyncio.run(main())
