"""Counters: a copy is consistent, names are what the native offsets mean, histograms keep every
value in its bucket.
"""

import random
import resource
from itertools import pairwise

import pytest

from fastmesh._ext import counters
from fastmesh._ext.counters import (
    HOP_NAMES,
    PROCESS_NAMES,
    ROW_NAMES,
    ROWS_MAX,
    Reading,
    ThreadCounters,
    hop_bounds_ns,
    latency_bounds_ns,
    quantile_ns,
)


def read(*threads: ThreadCounters) -> Reading:
    reading = Reading()
    for thread in threads:
        thread.read_into(reading)
    return reading


def test_offsets_are_those_of_the_contract() -> None:
    assert ROW_NAMES["requests.accepted"] == 0
    assert ROW_NAMES["requests.failed.no_route"] == 5
    assert ROW_NAMES["requests.failed.undecodable"] == 11
    assert ROW_NAMES["requests.oneway_dropped"] == 14
    assert ROW_NAMES["pushes.in_flight"] == 16 + 3
    assert ROW_NAMES["pushes.failed.client_gone"] == 16 + 4 + 6
    assert ROW_NAMES["bytes_in"] == 32
    assert ROW_NAMES["closed.by_peer"] == 48
    assert ROW_NAMES["closed.idle"] == 49
    assert ROW_NAMES["closed.by_command"] == 59
    assert PROCESS_NAMES["turns"] == 0
    assert PROCESS_NAMES["dropped.malformed"] == 24
    assert PROCESS_NAMES["dropped.late"] == 27
    assert PROCESS_NAMES["malformed.checksum"] == 32 + 6
    assert HOP_NAMES == ("mesh", "upstream", "queue")
    for names in (ROW_NAMES, PROCESS_NAMES):
        assert len(set(names.values())) == len(names)
        assert all(0 <= offset < 64 for offset in names.values())


def test_every_name_counts_for_itself() -> None:
    thread = ThreadCounters()
    for by, name in enumerate(ROW_NAMES, 1):
        thread.add(7, name, by)
    for by, name in enumerate(PROCESS_NAMES, 100):
        thread.add_process(name, by)
    thread.ask()
    thread.copy()
    reading = read(thread)
    assert reading.row(7) == {name: by for by, name in enumerate(ROW_NAMES, 1)}
    assert reading.process() == {name: by for by, name in enumerate(PROCESS_NAMES, 100)}
    assert reading.value(7, "bytes_in") == reading.row(7)["bytes_in"]
    assert set(reading.row(8).values()) == {0}


def test_a_copy_is_made_when_asked_for_and_not_otherwise() -> None:
    thread = ThreadCounters()
    thread.add(2, "requests.accepted")
    thread.copy()
    assert read(thread).rows_used == 0, "nobody asked"
    ticket = thread.ask()
    assert thread.copied < ticket
    thread.copy()
    assert thread.copied == ticket
    thread.add(2, "requests.accepted")
    thread.copy()
    assert read(thread).value(2, "requests.accepted") == 1, "answered already: the copy stays"
    thread.ask()
    assert read(thread).value(2, "requests.accepted") == 1, "asked, and the turn goes on"
    thread.copy()
    assert read(thread).value(2, "requests.accepted") == 2


def test_the_ledger_balances_in_every_copy() -> None:
    rng = random.Random(4)
    thread = ThreadCounters()
    ends = ["requests.answered", "requests.expired", "requests.failed.overload"]
    live = 0
    for _ in range(2000):
        # One turn: some requests come, some of those in flight end; a question may come at any
        # point of it.
        for _ in range(rng.randrange(4)):
            thread.add(3, "requests.accepted")
            thread.add(3, "requests.in_flight")
            live += 1
        if rng.random() < 0.3:
            thread.ask()
        for _ in range(rng.randrange(live + 1)):
            thread.add(3, rng.choice(ends))
            thread.add(3, "requests.in_flight", 2**64 - 1)
            live -= 1
        thread.copy()
        row = read(thread).row(3)
        assert row["requests.accepted"] == row["requests.in_flight"] + sum(row[e] for e in ends)


def test_threads_add_up_and_the_memory_peak_does_not() -> None:
    one, two = ThreadCounters(), ThreadCounters()
    for thread, by in ((one, 5), (two, 9)):
        thread.add(4, "connections", by)
        thread.add_process("memory", by)
        thread.add_process("memory_max", by)
        thread.record_hop("queue", 1000 * by)
        thread.record_latency(4, 10_000)
        thread.ask()
        thread.copy()
    two.add(9, "sent")
    two.ask()
    two.copy()
    reading = read(one, two)
    assert reading.rows_used == 10
    assert reading.value(4, "connections") == 14
    assert reading.process()["memory"] == 14
    assert reading.process()["memory_max"] == 9
    buckets, sum_ns = reading.hop("queue")
    assert sum(buckets) == 2
    assert sum_ns == 14_000
    assert sum(reading.latency(4)) == 2
    assert sum(reading.hop("mesh")[0]) == 0


def test_rows_beyond_the_last_are_counted_under_other() -> None:
    thread = ThreadCounters()
    thread.add(ROWS_MAX - 1, "sent")
    thread.add(ROWS_MAX, "sent")
    thread.add(2**32 - 1, "sent")
    thread.ask()
    thread.copy()
    reading = read(thread)
    assert reading.value(1, "sent") == 2
    assert reading.value(ROWS_MAX - 1, "sent") == 1
    assert reading.rows_used == ROWS_MAX


def test_names_and_rows_that_do_not_exist() -> None:
    reading = Reading()
    for row in (-1, ROWS_MAX):
        with pytest.raises(IndexError):
            reading.row(row)
        with pytest.raises(IndexError):
            reading.latency(row)
    with pytest.raises(KeyError):
        reading.value(0, "requests.lost")
    with pytest.raises(KeyError):
        reading.hop("moon")


@pytest.mark.parametrize(
    ("record", "bounds", "unit", "width"),
    [("hop", hop_bounds_ns(), 1, 1 / 16), ("latency", latency_bounds_ns(), 1000, 1 / 4)],
)
def test_every_value_lies_below_its_bound_and_not_below_the_one_before(
    record: str, bounds: list[int], unit: int, width: float
) -> None:
    assert bounds == sorted(set(bounds))
    assert bounds[0] == unit
    last = bounds[-1]
    assert last == (1 << 40 if record == "hop" else (1 << 27) * 1000)
    for below, bound in pairwise([0, *bounds]):
        assert bound - below <= max(unit, below * width), "a bucket is wider than promised"
    rng = random.Random(1)
    values = [0, 1, 15, 16, 17, 3999, 4000, last - 1, last, 2**63, 2**64 - 1]
    values += [edge + d for edge in bounds[:-1] for d in (-1, 0)]
    values += [rng.getrandbits(rng.randrange(1, 41)) for _ in range(500)]
    for ns in values:
        thread = ThreadCounters()
        if record == "hop":
            thread.record_hop("mesh", ns)
        else:
            thread.record_latency(2, ns)
        thread.ask()
        thread.copy()
        reading = read(thread)
        buckets = reading.hop("mesh")[0] if record == "hop" else reading.latency(2)
        assert sum(buckets) == 1
        index = buckets.index(1)
        if ns < last:
            assert ([0, *bounds])[index] <= ns < bounds[index]
        else:
            assert index == len(bounds) - 1


def test_quantiles() -> None:
    bounds = [10, 20, 30, 40]
    assert quantile_ns([0, 0, 0, 0], bounds, 0.99) == 0.0
    assert quantile_ns([1, 0, 0, 0], bounds, 0.0) == 10.0
    assert quantile_ns([50, 49, 1, 0], bounds, 0.5) == 10.0
    assert quantile_ns([50, 49, 1, 0], bounds, 0.51) == 20.0
    assert quantile_ns([50, 49, 1, 0], bounds, 0.99) == 20.0
    assert quantile_ns([50, 49, 1, 0], bounds, 1.0) == 30.0
    with pytest.raises(ValueError, match="q"):
        quantile_ns([1], [1], 1.5)
    with pytest.raises(ValueError, match="shorter"):
        quantile_ns([0, 0, 1], [1], 0.5)


def resident_pages() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1])


def test_rows_that_nobody_uses_cost_nothing() -> None:
    whole = 2 * counters.sizes()["rows"]
    threads = [ThreadCounters() for _ in range(8)]
    before = resident_pages()
    more = [ThreadCounters() for _ in range(8)]
    for thread in more:
        thread.add(5, "sent")
        thread.ask()
        thread.copy()
    grown = (resident_pages() - before) * resource.getpagesize()
    assert grown < 8 * whole / 20
    assert len(threads + more) == 16
