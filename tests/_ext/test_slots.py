"""The slot table: an id names one request and never another one's."""

import random
import subprocess
import sys

import pytest

from fastmesh._ext import slots
from fastmesh._ext.slots import GENERATIONS, Table

PAGE = 64
NOBODY = (None, None)


def taken(table: Table, orig: int, asker: int = 0, deadline_ms: int = 1000) -> int:
    id = table.take(orig, asker, deadline_ms)
    assert id is not None
    return id


def test_an_id_is_generation_and_index_with_bit_31_clear() -> None:
    table = Table(1000)
    ids = [taken(table, orig) for orig in range(200)]
    assert [id & 0xFFFF for id in ids] == list(range(200))
    assert {id >> 16 for id in ids} == {1}
    assert [table.find(id) for id in ids] == [(orig, 0, "none") for orig in range(200)]
    table.check()


def test_free_slots_are_reused_last_in_first_out() -> None:
    table = Table(100)
    ids = [taken(table, i) for i in range(10)]
    for id in (ids[3], ids[7], ids[5]):
        table.release(id, "duplicate")
    assert [taken(table, 0) & 0xFFFF for _ in range(4)] == [5, 7, 3, 10]


def test_generations_wrap_past_zero_and_keep_apart() -> None:
    # I1: start three before the wrap, so that every slot passes it.
    table = Table(16, first_generation=GENERATIONS - 2)
    ids: list[int] = []
    for turn in range(7):
        id = taken(table, turn)
        assert table.find(id) == (turn, 0, "none")
        assert id not in ids
        assert 0 < id < 1 << 31
        for stale in ids:
            assert table.find(stale)[:2] == NOBODY
        ids.append(id)
        table.release(id, "duplicate")
    top = GENERATIONS
    assert [id >> 16 for id in ids] == [top - 2, top - 1, top, 1, 2, 3, 4]


@pytest.mark.parametrize("first", [0, GENERATIONS + 1, 0xFFFF])
def test_a_first_generation_that_would_break_the_id_is_not_taken(first: int) -> None:
    assert taken(Table(16, first_generation=first), 0) >> 16 == 1


def test_all_generations_of_one_slot_are_different_and_then_come_again() -> None:
    table = Table(16)
    ids = []
    for _ in range(GENERATIONS + 2):
        ids.append(taken(table, 0))
        table.release(ids[-1], "duplicate")
    assert len(set(ids)) == GENERATIONS
    assert ids[-2:] == ids[:2]


def test_why_nobody_is_found() -> None:
    table = Table(100)
    answered, late, gone, withdrawn = (taken(table, i) for i in range(4))
    table.release(answered, "duplicate")
    table.rest(late, "late", 61_000)
    table.rest(gone, "client_gone", 61_000)
    table.release(withdrawn, "none")
    assert table.find(answered) == (*NOBODY, "duplicate")
    assert table.find(late) == (1, 0, "late"), "a resting slot is found, with its cause"
    assert table.find(gone) == (2, 0, "client_gone")
    assert table.find(withdrawn) == (*NOBODY, "unknown"), "its id never left"
    # The rest is over and the answer has still not come.
    table.release(late, "late")
    assert table.find(late) == (*NOBODY, "late")
    # The slot lives again: its last end is remembered, the one before is not.
    again = taken(table, 9)
    assert again & 0xFFFF == late & 0xFFFF
    assert table.find(again) == (9, 0, "none")
    assert table.find(late) == (*NOBODY, "late")
    table.release(again, "duplicate")
    assert table.find(late) == (*NOBODY, "unknown")
    assert table.find(again) == (*NOBODY, "duplicate")


@pytest.mark.parametrize(
    "forged",
    [
        0,
        1,  # generation 0
        0x0001_0001,  # a slot of the page that was never in use
        0x0001_0040,  # a page that does not exist
        0x0001_FFFF,
        0x0003_0000,  # a generation to come
        0x0002_0000,  # the next one
        0x8001_0000,  # bit 31
        0xFFFF_FFFF,
        0x7FFF_0000,  # before 1, as generations go; the slot has only ever been of generation 1
    ],
)
def test_ids_that_were_never_ours(forged: int) -> None:
    table = Table(100)
    assert table.find(forged) == (*NOBODY, "unknown")
    assert taken(table, 5) == 0x0001_0000
    assert table.find(forged) == (*NOBODY, "unknown")
    with pytest.raises(KeyError):
        table.release(forged, "duplicate")
    table.check()


@pytest.mark.parametrize("first", [1, GENERATIONS])
def test_only_the_generation_before_is_told_from_the_unknown(first: int) -> None:
    table = Table(16, first_generation=first)
    id = taken(table, 0)
    table.release(id, "duplicate")
    told = {
        generation for generation in range(1 << 16) if table.find(generation << 16)[2] != "unknown"
    }
    assert told == {first}, "neither generation 0 nor anything with bit 31"
    assert table.find(id) == (*NOBODY, "duplicate")


def test_a_late_answer_does_not_reach_who_has_the_slot_now() -> None:
    # I3: every slot is taken, expires, is released at the end of its rest and taken again by
    # somebody else.
    table = Table(16)
    old = [taken(table, orig, asker=1) for orig in range(16)]
    assert table.take(99, 2, 0) is None
    for id in old:
        table.rest(id, "late", 60_000)
    assert table.take(99, 2, 0) is None, "a resting slot keeps its place"
    assert (table.used, table.resting) == (16, 16)
    for id in old:
        table.release(id, "late")
    new = [taken(table, 100 + orig, asker=2) for orig in range(16)]
    assert {id & 0xFFFF for id in new} == {id & 0xFFFF for id in old}
    for id in old:
        assert table.find(id) == (*NOBODY, "late")
    assert sorted(table.find(id)[0] or 0 for id in new) == list(range(100, 116))


def test_a_full_table_refuses_at_once_and_recovers() -> None:
    # I6: all 65536, the last index included.
    table = Table(65536)
    ids = [taken(table, orig, orig % 256) for orig in range(65536)]
    assert ids[-1] & 0xFFFF == 0xFFFF
    assert len(set(ids)) == 65536
    assert table.take(1, 1, 1) is None
    assert (table.used, table.pages) == (65536, 1024)
    table.check()
    table.release(ids[65535], "duplicate")
    assert taken(table, 7) & 0xFFFF == 0xFFFF
    for id in ids[:65535]:
        table.release(id, "duplicate")
    table.check()
    assert [taken(table, 0) & 0xFFFF for _ in range(3)] == [65534, 65533, 65532]


def test_taking_costs_the_same_in_a_full_table() -> None:
    # A scan for a free slot would be a thousand times slower at that depth; 20 leaves room for
    # caches and neighbours.
    empty = min(slots.bench(20_000, 0) for _ in range(3))
    full = min(slots.bench(20_000, 65_000) for _ in range(3))
    assert full < 20 * empty + 1000


def test_the_capacity_need_not_fill_a_page_and_may_be_lowered_and_raised() -> None:
    table = Table(70)
    ids = [taken(table, i) for i in range(70)]
    assert table.take(0, 0, 0) is None
    assert table.pages == 2
    table.capacity = 20
    assert [table.find(id)[0] for id in ids] == list(range(70)), "nothing in flight is dropped"
    for id in ids[:50]:
        table.release(id, "duplicate")
        assert table.take(0, 0, 0) is None
    table.release(ids[50], "duplicate")
    taken(table, 1)
    assert table.take(0, 0, 0) is None
    table.capacity = 21
    taken(table, 2)
    table.capacity = 1 << 20
    while table.take(0, 0, 0) is not None:
        pass
    assert table.used == 65536, "16 bits name no more"
    table.check()


def test_pages_come_as_they_are_needed_and_are_given_back() -> None:
    table = Table(65536)
    assert (table.bytes, table.pages) == (0, 0), "an idle connection owns nothing"
    taken(table, 0)
    one = table.bytes
    assert one == slots.sizes()["page"] + 4 * 8
    for orig in range(1, PAGE):
        taken(table, orig)
    assert table.bytes == one
    taken(table, PAGE)
    assert table.bytes == one + slots.sizes()["page"]
    for orig in range(1000):
        taken(table, orig)
    grown = table.bytes
    assert table.stop() == grown
    assert table.take(0, 0, 0) is None


def sanitized() -> bool:
    with open("/proc/self/maps") as maps:
        return "libasan" in maps.read()


@pytest.mark.skipif(
    sanitized(), reason="the sanitizer's own allocator ends a process without memory"
)
def test_no_memory_is_a_full_table_and_nothing_worse() -> None:
    script = """
import resource
from fastmesh._ext.slots import Table

table = Table(65536)
first = table.take(0, 0, 0)
with open("/proc/self/statm") as statm:
    now = int(statm.read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (now, hard))
refused = 0
# Nothing in this loop is kept, so Python itself needs no more memory than it has.
for number in range(65536):
    if table.take(7, 0, 0) is None:
        refused += 1
        if refused == 100:
            break
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
assert refused == 100, (refused, table.used)
ids = table.ids()
assert first in ids
assert table.used == len(ids) == len(set(ids)) < 65536
assert table.used % 64 == 0, "the last page is used up"
table.check()
assert table.take(1, 0, 0) is not None, "it goes on when memory is back"
table.check()
print("held")
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout == "held\n", ended.stderr


def test_an_asker_finds_its_own_and_only_those_in_flight() -> None:
    table = Table(100)
    mine = [taken(table, i, asker=1) for i in range(4)]
    taken(table, 9, asker=2)
    assert table.of_asker(1) == mine[::-1]
    table.release(mine[1], "duplicate")
    table.rest(mine[3], "late", 5)
    assert table.of_asker(1) == [mine[2], mine[0]]
    table.release(mine[2], "duplicate")
    table.release(mine[0], "duplicate")
    assert table.of_asker(1) == []
    assert len(table.of_asker(2)) == 1
    table.check()


def test_walking_while_releasing() -> None:
    table = Table(1000)
    ids = [taken(table, i) for i in range(300)]
    for id in ids[::3]:
        table.release(id, "duplicate")
    for id in ids[1::3]:
        table.rest(id, "client_gone", 5)
    left = ids[1::3] + ids[2::3]
    assert sorted(table.ids()) == sorted(left)
    assert sorted(table.close()) == sorted(left)
    assert (table.used, table.resting, table.armed) == (0, 0, 0)
    assert table.ids() == []
    table.check()
    assert table.find(left[0]) == (*NOBODY, "unknown"), "of a connection that is closed"


def test_answers_by_order_keep_the_place_of_who_left() -> None:
    table = Table(100)
    assert table.order_pop() is None
    ids = [taken(table, i) for i in range(5)]
    for id in ids:
        table.order_push(id)
    table.rest(ids[1], "client_gone", 60_000)
    for orig, id in enumerate(ids):
        assert table.order_pop() == id
        assert table.find(id) == (orig, 0, "client_gone" if orig == 1 else "none")
        table.release(id, "duplicate")
    assert table.order_pop() is None
    again = taken(table, 7)
    table.order_push(again)
    assert table.order_pop() == again
    table.release(again, "duplicate")
    table.check()


def test_a_slot_rests_once() -> None:
    table = Table(16)
    id = taken(table, 0)
    table.rest(id, "late", 5)
    with pytest.raises(ValueError, match="rests"):
        table.rest(id, "client_gone", 5)


def test_timers_of_slots() -> None:
    table = Table(100, now_ms=1000)
    early, late = taken(table, 1, deadline_ms=1100), taken(table, 2, deadline_ms=1200)
    assert table.due(1099) is None
    assert table.due(1100) == (early, False)
    table.rest(early, "late", 1100 + slots.REST_MS)
    table.release(late, "duplicate")
    assert table.armed == 1
    assert table.due(1300) is None
    assert table.due(1100 + slots.REST_MS) == (early, True)


@pytest.mark.parametrize("seed", range(10))
def test_against_dictionaries(seed: int) -> None:
    rng = random.Random(seed)
    capacity = rng.choice([16, 70, 300])
    table = Table(capacity, first_generation=rng.choice([1, GENERATIONS - 3]))
    occupied: dict[int, tuple[int, int, str]] = {}
    ended: dict[int, tuple[int, str]] = {}  # index: the last id and how it ended
    seen: list[int] = []
    for number in range(5000):
        action = rng.random()
        if action < 0.4:
            asker = rng.randrange(5)
            id = table.take(number, asker, 0)
            assert (id is None) == (len(occupied) >= capacity)
            if id is not None:
                assert id not in occupied
                occupied[id] = (number, asker, "none")
                seen.append(id)
        elif action < 0.5 and occupied:
            id = rng.choice(list(occupied))
            if occupied[id][2] == "none":
                cause = rng.choice(["late", "client_gone"])
                table.rest(id, cause, 10)
                occupied[id] = (*occupied[id][:2], cause)
        elif action < 0.8 and occupied:
            id = rng.choice(list(occupied))
            cause = rng.choice(["duplicate", "late", "client_gone", "none"])
            table.release(id, cause)
            del occupied[id]
            ended[id & 0xFFFF] = (id, cause if cause != "none" else "unknown")
        elif seen:
            id = rng.choice(seen[-400:] if rng.random() < 0.9 else [rng.getrandbits(32)])
            if id in occupied:
                assert table.find(id) == occupied[id]
            else:
                last, cause = ended.get(id & 0xFFFF, (-1, ""))
                assert table.find(id) == (*NOBODY, cause if id == last else "unknown")
        if number % 50 == 0:
            table.check()
            assert sorted(table.ids()) == sorted(occupied)
            assert table.resting == sum(cause != "none" for _, _, cause in occupied.values())
