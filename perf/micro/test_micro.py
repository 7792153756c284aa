"""Nanoseconds per operation of the fast path's parts: `python -m pytest perf/micro
--benchmark-only`.

The loop is native (each module's own bench()), so that Python's calls are not what is measured.
The column to read is `ns_per_operation` in the extra information; the times of the table are those
of ROUNDS operations.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastmesh._ext import bolt, counters, crc32, load, route, schedule, slots

ROUNDS = 200_000
REPEATS = 5
SERVICE = b"com.example.Order:1.0"


def request(body: int, *, checksum: bool = False) -> bytes:
    """A Bolt request as clients send it: class, service header, body."""
    name = b"com.alipay.sofa.rpc.core.request.SofaRequest"
    headers = struct.pack("!i", 7) + b"service" + struct.pack("!i", len(SERVICE)) + SERVICE
    sizes = struct.pack("!iHHI", 3000, len(name), len(headers), body)
    start = b"\x02\x02\x01\x00\x01\x01" if checksum else b"\x01\x01\x00\x01\x01"
    frame = start + struct.pack("!IB", 77, 1) + (b"\x01" if checksum else b"") + sizes
    frame += name + headers + bytes(body)
    return frame + (struct.pack("!I", zlib.crc32(frame)) if checksum else b"")


def timed(benchmark: BenchmarkFixture, operation: Callable[[], float]) -> None:
    """`operation` loops by itself and returns nanoseconds per operation; the best repeat counts."""
    found: list[float] = []
    run: Any = benchmark.pedantic  # untyped in its package
    run(lambda: found.append(operation()), rounds=REPEATS, warmup_rounds=1)
    assert min(found) > 0
    benchmark.extra_info["ns_per_operation"] = round(min(found), 2)
    print(f"\n{benchmark.name}: {min(found):.1f} ns")


@pytest.mark.parametrize("body", [64, 256, 16384])
@pytest.mark.parametrize("checksum", [False, True], ids=["v1", "crc"])
def test_codec(benchmark: BenchmarkFixture, body: int, checksum: bool) -> None:
    """Scan, service and patch of one frame."""
    data = request(body, checksum=checksum)
    timed(benchmark, lambda: bolt.bench(data, ROUNDS // 10))


@pytest.mark.parametrize("size", [256, 16384])
def test_checksum(benchmark: BenchmarkFixture, size: int) -> None:
    data = bytes(size)
    timed(benchmark, lambda: crc32.bench_crc32(data, ROUNDS // 10))


@pytest.mark.parametrize("following", [300, 16384])
def test_checksum_patch(benchmark: BenchmarkFixture, following: int) -> None:
    timed(benchmark, lambda: crc32.bench_patch(following, ROUNDS))


@pytest.mark.parametrize("depth", [0, 32, 1000])
def test_slots(benchmark: BenchmarkFixture, depth: int) -> None:
    """One request's life in the slot table."""
    timed(benchmark, lambda: slots.bench(ROUNDS, depth))


@pytest.mark.parametrize("rules", [1, 10, 100])
def test_route(benchmark: BenchmarkFixture, rules: int) -> None:
    """The last of so many rules is the one that matches."""
    limits = {name: min(max(low, 1 << 22), high) for name, (low, high) in route.LIMITS.items()}
    snapshot = route.Snapshot(1, limits)
    snapshot.add_cluster(0, codec="bolt", row=2)
    snapshot.add_endpoint(0, 0, address=("127.0.0.1", 12201), weight=100, row=3)
    snapshot.add_listener(0, codec="bolt", row=4)
    for number in range(rules - 1):
        service = b"com.example.Other%d:1.0" % number
        snapshot.add_rule(0, cluster_id=0, row=5 + number, service=service)
    snapshot.add_rule(0, cluster_id=0, row=5 + rules, service=SERVICE)
    snapshot.seal()
    frame = request(256)
    assert snapshot.find(0, frame) == (5 + rules, 0)
    timed(benchmark, lambda: snapshot.bench(0, frame, ROUNDS))


@pytest.mark.parametrize("nodes", [2, 10, 300])
@pytest.mark.parametrize("ordered", [False, True], ids=["in_turn", "by_key"])
@pytest.mark.parametrize("by", ["weight", "rule", "header_rule"])
def test_schedule(benchmark: BenchmarkFixture, nodes: int, ordered: bool, by: str) -> None:
    """Which node takes a delivery. Weights: nothing stays, so that a peer is always looked for."""
    peers = [(f"node-{number}", 100) for number in range(nodes - 1)]
    uneven = [(name, 1 + number % 100) for number, (name, _) in enumerate(peers)]
    compiled = schedule.Schedule(
        [("here", 0), *peers],
        rules=[([("colour", "blue")], uneven), ([("h.region", "eu")], uneven)],
        local="here",
        endpoints={name: number for number, (name, _) in enumerate(peers, 1)},
    )
    headers = {"fm.topic": "orders", "fm.group": "billing", "fm.id": "7f1c", "fm.key": "order-77"}
    headers |= {"weight": {}, "rule": {"fm.colour": "blue"}, "header_rule": {"h.region": "eu"}}[by]
    message = schedule.Message(headers)
    reachable = bytes([1] * nodes)
    rounds = ROUNDS // nodes
    timed(benchmark, lambda: compiled.bench(message, reachable, rounds, ordered=ordered))


def test_counters(benchmark: BenchmarkFixture) -> None:
    """Counting one request and its answer: counters, hop histograms, latency."""
    timed(benchmark, lambda: counters.bench(ROUNDS))


@pytest.mark.parametrize("part", ["histogram", "build_256", "check_256"])
def test_load_generator(benchmark: BenchmarkFixture, part: str) -> None:
    timed(benchmark, lambda: load.bench(ROUNDS)[part])
