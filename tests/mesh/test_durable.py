"""The registry with its disk: durable before answered, folded, and going on when the disk fails."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fastmesh import limits
from fastmesh.control.state_dir import StateDir
from fastmesh.errors import HandoverError
from fastmesh.mesh.durable import DurableRegistry
from fastmesh.mesh.registration import Change, Key, Outcome
from tests.conftest import LogLines
from tests.mesh.disk import Disk
from tests.mesh.test_registration import doc, pub, sub

S = 1000


class Bed:
    def __init__(
        self,
        path: str,
        lines: LogLines,
        monkeypatch: pytest.MonkeyPatch,
        *,
        before: Bed | None = None,
        **options: Any,
    ) -> None:
        """`before`: the one that this one takes over from."""
        self.now_ms = 1_000_000
        self.lines = lines
        self.changes: list[Change] = []
        if before is None:
            self.state_dir = StateDir(path)
        else:
            self.state_dir = StateDir.adopt(path, os.dup(before.state_dir.fd))
        self.durable = DurableRegistry(
            self.state_dir,
            lines.log,
            on_change=self.changes.append,
            clock_ms=lambda: self.now_ms,
            **options,
        )
        if before is None:
            self.loaded = self.durable.load()
        else:
            self.restore(before)
        self.disk = Disk(self.durable.store, monkeypatch)

    def restore(self, before: Bed) -> bool:
        return self.durable.restore(msgspec.Raw(msgspec.json.encode(before.durable.save())))

    def remaining_ms(self, client: str = "c1") -> int:
        found = self.durable.registry.client("shop", client)
        assert found is not None
        return found.remaining_ms(self.now_ms)

    async def register(self, *args: Any, **more: Any) -> Outcome:
        return await self.durable.register(doc(*args, **more))

    def ask(self, *args: Any, **more: Any) -> asyncio.Task[Outcome]:
        return asyncio.ensure_future(self.register(*args, **more))

    @property
    def clients(self) -> set[str]:
        return {c.registration.client for c in self.durable.registry.clients()}


@pytest.fixture
def running(
    tmp_path: Path, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., contextlib.AbstractAsyncContextManager[Bed]]:
    @contextlib.asynccontextmanager
    async def run(*, starts: bool = True, **options: Any) -> AsyncIterator[Bed]:
        bed = Bed(str(tmp_path / "run"), log_lines, monkeypatch, **options)
        if starts:
            bed.durable.start()
        try:
            yield bed
        finally:
            await bed.durable.close()
            bed.state_dir.close()

    return run


Running = Callable[..., contextlib.AbstractAsyncContextManager[Bed]]


async def until(true: Callable[[], bool]) -> None:
    end = asyncio.get_running_loop().time() + 10
    while not true():
        assert asyncio.get_running_loop().time() < end
        await asyncio.sleep(0.001)


async def turns(number: int = 50) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_it_survives_and_leases_are_full_again(running: Running) -> None:
    async with running() as bed:
        assert (await bed.register("c1", pub(), sub())).status == 201
        bed.now_ms += 20 * S
        state = bed.durable.registry.state()
    async with running() as bed:
        assert bed.loaded.source == "newest"
        assert bed.durable.registry.state() == state
        assert bed.durable.registry.groups()["g"].roles == {"publish", "subscribe"}
        client = bed.durable.registry.client("shop", "c1")
        assert client is not None
        assert client.remaining_ms(bed.now_ms) == 30 * S
        assert not bed.changes
        assert (await bed.register("c1", pub(), sub())).status == 200, "the same as before"
        assert not bed.disk.saves


async def test_an_answer_and_its_effect_wait_until_it_is_durable(running: Running) -> None:
    async with running() as bed:
        with bed.disk.held():
            asked = bed.ask("c1")
            await bed.disk.entered()
            await turns()
            assert not asked.done()
            assert not bed.clients
            assert not bed.changes
        assert (await asked).status == 201
        assert bed.clients == {"c1"}
        assert len(bed.changes) == 1


async def test_changes_during_a_save_become_one_more(running: Running) -> None:
    async with running() as bed:
        with bed.disk.held():
            first = bed.ask("c0")
            await bed.disk.entered()
            asked = [bed.ask(f"c{i}") for i in range(1, 20)]
            asked += [bed.ask("c21", sub(topic="x"))]
            gone = asyncio.ensure_future(bed.durable.remove("shop", "c3"))
            await turns()
        assert (await first).status == 201
        assert [(await a).status for a in asked] == [201] * 19 + [409]
        assert (await gone).status == 204
        assert len(bed.disk.saves) == 2
        assert len(bed.changes) == 2
        assert len(bed.clients) == 19


async def test_a_renewal_does_not_wait_for_the_disk(running: Running) -> None:
    async with running() as bed:
        await bed.register("c1")
        with bed.disk.held():
            other = bed.ask("c2")
            await bed.disk.entered()
            bed.now_ms += 20 * S
            same = await asyncio.wait_for(bed.register("c1"), 5)
            assert (same.status, other.done()) == (200, False)
            client = bed.durable.registry.client("shop", "c1")
            assert client is not None
            assert client.remaining_ms(bed.now_ms) == 30 * S
        await other


async def test_the_same_twice_at_once_waits_for_the_one_save(running: Running) -> None:
    async with running() as bed:
        with bed.disk.held():
            first, second = bed.ask("c1"), bed.ask("c1")
            await bed.disk.entered()
            third = bed.ask("c1")
            await turns()
            assert not first.done()
            assert not second.done()
            assert not third.done()
        assert [(await x).status for x in (first, second, third)] == [201, 200, 200]
        assert len(bed.disk.saves) == 1


async def test_there_and_back_during_a_save_is_no_renewal(running: Running) -> None:
    """What is in force is not what will be: the last word counts, in the order of asking."""
    async with running() as bed:
        await bed.register("c1", sub("g"))
        with bed.disk.held():
            there = bed.ask("c1", sub("h"))
            await bed.disk.entered()
            back = bed.ask("c1", sub("g"))
            await turns()
            assert not back.done()
        answers = [(await x).body["registration"] for x in (there, back)]
        assert answers == ["changed", "changed"]
        assert set(bed.durable.registry.groups()) == {"g"}


async def test_faulty_documents_and_conflicts_save_nothing(running: Running) -> None:
    async with running() as bed:
        await bed.register("c1")
        assert (await bed.durable.register(b"{}")).status == 422
        assert (await bed.register("c2", sub(topic="x"))).status == 409
        assert (await bed.durable.remove("shop", "c2")).status == 404
        assert len(bed.disk.saves) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EROFS, 503), (errno.EIO, 503)],
)
async def test_a_disk_that_fails_and_recovers(running: Running, error: int, status: int) -> None:
    async with running() as bed:
        await bed.register("c1")
        bed.disk.error = error
        refused = await bed.register("c2")
        assert refused.status == status
        assert "Nothing has changed; try again" in refused.body["error"]
        assert (await bed.durable.remove("shop", "c1")).status == status
        assert (await bed.register("c1", sub("g"), sub("h"))).status == status
        assert (bed.clients, len(bed.changes)) == ({"c1"}, 1), "what was in force is served on"
        assert (await bed.register("c1")).status == 200, "and renewed"
        assert bed.durable.figures().unsaved
        assert "not saved" in bed.lines.text()
        bed.disk.error = 0
        assert (await bed.register("c2")).status == 201
        assert bed.clients == {"c1", "c2"}
        figures = bed.durable.figures()
        assert (figures.unsaved, figures.save_failures) == (False, 3)
        assert "saved again" in bed.lines.text()
    async with running() as bed:
        assert bed.clients == {"c1", "c2"}


async def test_a_conflict_with_what_does_not_come_into_force_is_no_conflict(
    running: Running,
) -> None:
    async with running() as bed:
        await bed.register("c0", sub("other"))
        with bed.disk.held():
            first = bed.ask("c0", sub("other"), sub("more"))
            await bed.disk.entered()
            bed.disk.error = errno.ENOSPC
            later = [bed.ask("c1"), bed.ask("c2", sub(topic="x"))]
            await turns()
        assert [(await x).status for x in (first, *later)] == [507, 507, 507]


async def test_a_conflict_with_what_stands_is_told_while_the_disk_fails(running: Running) -> None:
    async with running() as bed:
        await bed.register("c1")
        bed.disk.error = errno.EIO
        assert (await bed.register("c2")).status == 503
        bed.now_ms += 60 * S  # another try is due with whatever comes next
        tries = len(bed.disk.saves)
        assert (await bed.register("c2", sub(topic="x"))).status == 409
        assert (await bed.durable.remove("shop", "c2")).status == 404
        assert len(bed.disk.saves) > tries


async def test_a_disk_that_hangs_takes_nothing_else_along(running: Running) -> None:
    async with running(save_timeout_s=0.05) as bed:
        await bed.register("c1")
        with bed.disk.held():
            refused = await bed.register("c2")
            assert refused.status == 503
            assert "has not answered" in refused.body["error"]
            assert (await bed.register("c1")).status == 200
            assert bed.clients == {"c1"}
        # It comes through late, and is then replaced by what is in force.
        bed.now_ms += 2 * S
        bed.durable.look(bed.now_ms, S)
        await until(lambda: not bed.durable.figures().unsaved)
        assert len(bed.disk.saves) >= 3
    async with running() as bed:
        assert bed.clients == {"c1"}


async def test_what_is_in_force_is_written_again_until_it_is_safe(running: Running) -> None:
    async with running() as bed:
        await bed.register("c1")
        bed.disk.error = errno.EIO
        await bed.register("c2")
        tries = len(bed.disk.saves)
        for _ in range(3):
            bed.now_ms += 100
            bed.durable.look(bed.now_ms, 100)
            await turns()
        assert len(bed.disk.saves) == tries, "not at once"
        bed.now_ms += S
        bed.durable.look(bed.now_ms, S)
        await until(lambda: bed.durable.figures().save_failures == 2)
        assert len(bed.disk.saves) == tries + 1
        bed.disk.error = 0
        bed.now_ms += 2 * S
        bed.durable.look(bed.now_ms, S)
        await until(lambda: not bed.durable.figures().unsaved)
        assert bed.disk.saves[-1] == bed.durable.registry.state()


async def test_expiry_is_told_and_saved_without_anybody_asking(running: Running) -> None:
    async with running() as bed:
        await bed.register("c1")
        await bed.register("c2")
        bed.durable.registry.hold("shop", "c2")
        bed.now_ms += 30 * S
        bed.durable.look(bed.now_ms, S)
        assert bed.clients == {"c2"}
        assert bed.changes[-1].clients == {Key("shop", "c1")}
        await until(lambda: not bed.durable.figures().unsaved)
        assert bed.durable.figures().expired == 1
        assert bed.disk.saves[-1] == bed.durable.registry.state()
    async with running() as bed:
        assert bed.clients == {"c2"}


async def test_an_expiry_during_a_save_is_saved_after_it(running: Running) -> None:
    async with running() as bed:
        await bed.register("c1")
        with bed.disk.held():
            asked = bed.ask("c2", sub("h"))
            await bed.disk.entered()
            bed.now_ms += 30 * S
            bed.durable.look(bed.now_ms, S)
            assert not bed.clients
        assert (await asked).status == 201
        assert bed.clients == {"c2"}
        await until(lambda: not bed.durable.figures().unsaved)
        assert bed.disk.saves[-1] == bed.durable.registry.state()


async def test_a_process_that_was_stopped_expires_nobody(running: Running) -> None:
    async with running() as bed:
        await bed.register("c1")
        bed.now_ms += 3600 * S
        bed.durable.look(bed.now_ms, 3600 * S)
        assert bed.clients == {"c1"}
        assert "leases lengthened" in bed.lines.text()
        bed.now_ms += 30 * S
        bed.durable.look(bed.now_ms, S)
        assert not bed.clients


async def test_the_ticker_looks(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REGISTRATION_TICK_S", 0.001)
    async with running() as bed:
        await bed.register("c1", lease_ms=1000)
        bed.now_ms += S
        await until(lambda: not bed.clients)


async def test_a_listener_that_fails_does_not_end_registration(running: Running) -> None:
    def wrong(change: Change) -> None:
        raise RuntimeError("not ours")

    async with running() as bed:
        bed.durable.registry.on_change = wrong
        assert (await bed.register("c1")).status == 201
        assert (await bed.register("c2")).status == 201
        assert bed.clients == {"c1", "c2"}
        bed.now_ms += 30 * S
        bed.durable.look(bed.now_ms, S)
        assert not bed.clients
        assert "not ours" in bed.lines.text()


async def test_closing_ends_the_save_under_way_and_takes_nothing_new(running: Running) -> None:
    async with running() as bed:
        with bed.disk.held():
            asked = bed.ask("c1")
            await bed.disk.entered()
            closing = asyncio.ensure_future(bed.durable.close())
            await turns()
            assert (await bed.register("c2")).status == 503
        assert (await asked).status == 201
        await closing
    async with running() as bed:
        assert bed.clients == {"c1"}


async def test_who_does_not_wait_for_the_answer_leaves_nothing_behind(running: Running) -> None:
    async with running() as bed:
        with bed.disk.held():
            asked = bed.ask("c1")
            await bed.disk.entered()
            asked.cancel()
            await turns()
        await until(lambda: bed.clients == {"c1"})
        assert (await asyncio.wait_for(bed.register("c1"), 5)).status == 200


def damage(bed: Bed) -> None:
    path = Path(bed.durable.store.path, bed.durable.store.newest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


async def test_damage_is_told_loudly_and_repaired(running: Running) -> None:
    async with running() as bed:
        await bed.register("c1")
        await bed.register("c2")
    damage(bed)
    async with running() as bed:
        assert bed.loaded.source == "previous"
        assert bed.clients == {"c1"}
        assert bed.durable.figures().load_problems == 1
        text = bed.lines.text()
        assert "registrations damaged" in text
        assert "checksum does not match" in text
        await until(lambda: not bed.durable.figures().unsaved)
    async with running() as bed:
        assert bed.loaded.source == "newest"
        assert bed.clients == {"c1"}


async def test_damage_of_both_generations_is_an_empty_start(running: Running) -> None:
    async with running() as bed:
        await bed.register("c1")
        await bed.register("c2")
    for name in ("registrations.state", "registrations.state.previous"):
        os.truncate(Path(bed.durable.store.path, name), 40)
    async with running() as bed:
        assert (bed.loaded.source, bed.durable.figures().load_problems) == ("none", 2)
        assert (await bed.register("c3")).status == 201
    async with running() as bed:
        assert bed.clients == {"c3"}


# --- hand-over ------------------------------------------------------------------------------------


def files(bed: Bed) -> dict[str, bytes]:
    folder = Path(bed.durable.store.path)
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}


async def test_while_it_is_held_nothing_changes_and_nothing_is_written(running: Running) -> None:
    async with running() as bed:
        await bed.register("c1")
        bed.durable._unsaved += 1  # something is due to be written
        await bed.durable.hold(5)
        before = files(bed), len(bed.disk.saves), bed.durable.registry.generation
        for asked in (
            bed.register("c2"),
            bed.register("c1"),
            bed.durable.remove("shop", "c1"),
        ):
            outcome = await asyncio.wait_for(asked, 5)
            assert outcome.status == 503
            assert "upgraded" in outcome.body["error"]
        bed.now_ms += 3600 * S
        bed.durable.look(bed.now_ms, 1000)
        bed.durable._wake.set()
        await turns()
        assert (files(bed), len(bed.disk.saves), bed.durable.registry.generation) == before
        bed.durable.thaw()
        await until(lambda: not bed.durable.figures().unsaved)
        assert bed.remaining_ms() == 30 * S, "nobody could renew it"
        assert (await bed.register("c2")).status == 201


async def test_a_save_under_way_ends_and_who_waits_behind_it_is_refused(running: Running) -> None:
    async with running() as bed:
        with bed.disk.held():
            first = bed.ask("c1")
            await bed.disk.entered()
            second = bed.ask("c2")
            await turns()
            holding = asyncio.ensure_future(bed.durable.hold(5))
            assert (await second).status == 503
            await turns()
            assert not holding.done()
            assert not first.done()
        await holding
        assert (await first).status == 201
        saved = bed.durable.save()
        assert [b"c1" in bytes(c.document) for c in saved.registry.clients] == [True]
        bed.durable.thaw()
        assert (await bed.register("c2")).status == 201


async def test_a_disk_that_hangs_keeps_it_from_being_handed_over(running: Running) -> None:
    async with running(save_timeout_s=0.05) as bed:
        with bed.disk.held():
            asked = bed.ask("c1")
            await bed.disk.entered()
            assert (await asked).status == 503, "its time is over, the save is not"
            with pytest.raises(HandoverError, match="has not answered"):
                await bed.durable.hold(0.05)
            assert (await bed.durable.register(b"{}")).status == 422
        assert (await bed.register("c2")).status == 201, "it goes on"
        await bed.durable.hold(5)
        bed.durable.thaw()


async def test_a_successor_goes_on_with_leases_figures_and_generations(running: Running) -> None:
    async with running() as old:
        await old.register("c1", lease_ms=30_000)
        await old.register("c2", lease_ms=60_000)
        await old.register("c3", lease_ms=1000)
        old.durable.registry.hold("shop", "c2")
        old.now_ms += 12 * S
        old.durable.look(old.now_ms, 1000)
        await until(lambda: not old.durable.figures().unsaved)
        old.now_ms += 500
        await old.durable.hold(5)
        figures = old.durable.figures()
        disk = files(old)
        old.now_ms += 400  # until it is saved
        async with running(before=old, starts=False) as new:
            assert files(new) == disk
            assert not new.disk.saves
            assert (new.remaining_ms("c1"), new.remaining_ms("c2")) == (17_500, 47_500)
            assert new.durable.figures() == figures
            assert figures.expired == 1
            assert figures.saves == 4
            new.durable.registry.hold("shop", "c2")
            old.durable.abandon()
            await old.durable.close()
            old.state_dir.close()
            new.state_dir.own()
            new.durable.start()
            assert not new.changes
            assert (await new.register("c1", lease_ms=30_000)).status == 200
            assert not new.disk.saves, "a renewal as ever"
            assert (await new.register("c4")).status == 201
            after = files(new)
            assert after["registrations.state.previous"] == disk["registrations.state"]
            new.now_ms += 3600 * S
            new.durable.look(new.now_ms, 1000)
            assert new.clients == {"c2"}
            assert new.durable.figures().expired == 3
            await until(lambda: not new.durable.figures().unsaved)
            assert new.durable.figures().saves == 6
    async with running() as bed:
        assert bed.clients == {"c2"}


async def test_whoever_was_abandoned_never_writes_again(running: Running) -> None:
    async with running() as old:
        await old.register("c1")
        old.durable._unsaved += 1
        await old.durable.hold(5)
        old.durable.abandon()
        disk = files(old)
        old.durable.thaw()
        old.durable.look(old.now_ms + 3600 * S, 1000)
        assert (await old.register("c2")).status == 503
        await turns()
        with pytest.raises(OSError, match="descriptor"):
            old.durable.store.save(b"late")
        await old.durable.close()
        await old.durable.close()
        assert files(old) == disk


async def test_a_successor_that_gives_up_has_written_nothing(running: Running) -> None:
    async with running() as old:
        await old.register("c1")
        old.durable._unsaved += 1
        await old.durable.hold(5)
        disk = files(old)
        async with running(before=old, starts=False) as new:
            assert new.durable.figures().unsaved
            await turns()
        assert files(old) == disk
        old.durable.thaw()
        await until(lambda: not old.durable.figures().unsaved)
        assert (await old.register("c2")).status == 201


async def test_a_process_that_is_stopped_while_it_is_held_stops(running: Running) -> None:
    async with running() as bed:
        await bed.register("c1")
        bed.durable._unsaved += 1
        await bed.durable.hold(5)
        await asyncio.wait_for(bed.durable.close(), 5)
        assert not bed.durable.figures().unsaved, "as without a hand-over"


async def test_a_retry_that_was_due_stays_due(running: Running) -> None:
    async with running() as old:
        old.disk.error = errno.EIO
        for _ in range(3):
            assert (await old.register("c1")).status == 503
        old.disk.error = 0
        await old.durable.hold(5)
        async with running(before=old, starts=False) as new:
            assert new.durable._retry_s == old.durable._retry_s == 8 * limits.REGISTRATION_RETRY_S
            left_ms = new.durable._retry_at_ms - new.now_ms
            assert left_ms == 4 * limits.REGISTRATION_RETRY_S * 1000
            assert new.durable.figures() == old.durable.figures()
            assert new.durable.figures().save_failures == 3
        old.durable.thaw()


async def test_the_last_state_replaces_the_first(running: Running) -> None:
    async with running() as old:
        await old.register("c1")
        async with running(before=old, starts=False) as new:
            await old.register("c2")
            await old.durable.hold(5)
            assert new.restore(old), "other registrations"
            assert not new.restore(old)
            assert new.clients == {"c1", "c2"}
            assert new.durable.figures() == old.durable.figures()
            with pytest.raises(HandoverError, match="registrations"):
                new.durable.restore({"saves": -1})
            with pytest.raises(HandoverError, match="retry_s"):
                new.durable.restore({"retry_s": 1e9})
            assert new.clients == {"c1", "c2"}
        old.durable.thaw()
