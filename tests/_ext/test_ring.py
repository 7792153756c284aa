"""The ring: every record comes out once, whole, in order, whatever wraps and whoever is faster."""

import random
import threading

import pytest

from fastmesh._ext.ring import RingPair

HEADER = 32


def padded(size: int) -> int:
    return (HEADER + size + 7) // 8 * 8


def test_empty_and_one() -> None:
    ring = RingPair(256)
    assert ring.pop() is None
    assert ring.push(3, 1, 2, 2**64 - 1, b"abc")
    assert ring.peek() == (3, 1, 2, 2**64 - 1, b"abc")
    assert ring.pop() == (3, 1, 2, 2**64 - 1, b"abc")
    assert ring.pop() is None
    assert ring.head == ring.tail == padded(3)


@pytest.mark.parametrize("size", [0, 8, 128, 255, 257, 3000])
def test_a_size_that_is_none(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        RingPair(size)


def test_kind_zero_is_the_fillers() -> None:
    with pytest.raises(ValueError, match="kind"):
        RingPair(256).push(0)


def test_full_writes_nothing() -> None:
    ring = RingPair(256)
    pushed = 0
    while ring.push(1, pushed):
        pushed += 1
    assert pushed == 256 // HEADER
    tail = ring.tail
    assert not ring.push(1, 99)
    assert ring.tail == tail
    assert [ring.pop() for _ in range(pushed)] == [(1, i, 0, 0, b"") for i in range(pushed)]


def started_at(size: int, start: int) -> RingPair:
    """An empty ring whose next record begins at `start`, a multiple of 8 that records of 32 and 40
    bytes add up to.
    """
    ring = RingPair(size)
    longer = start // 8 % 4
    for payload in [b"x"] * longer + [b""] * ((start - 40 * longer) // 32):
        assert ring.push(1, payload=payload)
        ring.pop()
    assert ring.head == ring.tail == start
    return ring


@pytest.mark.parametrize("start", range(896, 1024, 8))
def test_a_quarter_fits_into_an_empty_ring_wherever_it_begins_and_more_never_does(
    start: int,
) -> None:
    ring = started_at(1024, start)
    assert not ring.push(1, payload=b"y" * 257)
    assert ring.push(1, payload=b"y" * 256)
    assert ring.pop() == (1, 0, 0, 0, b"y" * 256)
    assert ring.pop() is None


@pytest.mark.parametrize("to_end", range(8, 72, 8))
def test_the_filler_at_every_distance_from_the_end(to_end: int) -> None:
    # 8, 16 and 24 bytes before the end not even the filler's own header would fit.
    ring = started_at(256, 256 - to_end)
    assert ring.push(2, 7, payload=b"12345678" * 4)
    assert ring.tail == 256 + 64 if to_end < 64 else 256
    assert ring.push(3, 8, payload=b"behind")
    assert ring.pop() == (2, 7, 0, 0, b"12345678" * 4)
    assert ring.pop() == (3, 8, 0, 0, b"behind")
    assert ring.pop() is None


def test_a_record_that_fits_without_its_filler_only_is_refused_whole() -> None:
    ring = RingPair(256)
    for number in range(7):
        assert ring.push(1, number)  # 224 bytes: 32 to the end
    for _ in range(2):
        ring.pop()  # 64 bytes at the start
    tail = ring.tail
    assert not ring.push(1, payload=b"z" * 40), "32 of filler and 72 do not fit into 96"
    assert ring.tail == tail
    assert ring.push(1, payload=b"z" * 32), "32 of filler and 64 do"
    assert [record[1] for record in iter(ring.pop, None)] == [2, 3, 4, 5, 6, 0]


@pytest.mark.parametrize("seed", range(20))
def test_against_a_list(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.choice([256, 512, 4096])
    ring = RingPair(size)
    waiting: list[tuple[int, int, int, int, bytes]] = []
    for number in range(3000):
        if rng.random() < 0.5:
            payload = rng.randbytes(rng.randrange(size // 4 + 2))
            record = (rng.randrange(1, 2**32), number, rng.getrandbits(64), 0, payload)
            free = size - (ring.tail - ring.head)
            to_end = size - ring.tail % size
            need = padded(len(payload))
            fits = len(payload) <= size // 4 and need + (to_end if need > to_end else 0) <= free
            assert ring.push(*record) == fits
            if fits:
                waiting.append(record)
        else:
            assert ring.pop() == (waiting.pop(0) if waiting else None)
        assert ring.head <= ring.tail <= ring.head + size


@pytest.mark.parametrize(("size", "payload_max"), [(1 << 9, 100), (1 << 12, 700), (1 << 20, 256)])
def test_two_threads(size: int, payload_max: int) -> None:
    records = 1_000_000 if size == 1 << 20 else 100_000
    ring = RingPair(size)
    pushed: list[int] = []
    taken: list[tuple[int, int]] = []
    threads = [
        threading.Thread(
            target=lambda: pushed.append(ring.produce(records, 7, payload_max, 60_000))
        ),
        threading.Thread(
            target=lambda: taken.append(ring.consume(records, 7, payload_max, 60_000))
        ),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pushed == [records]
    assert taken == [(records, 0)]
    assert ring.head == ring.tail


def test_the_consumer_can_tell_a_wrong_record() -> None:
    ring = RingPair(4096)
    assert ring.produce(10, 1, 16, 1000) == 10
    assert ring.consume(10, 2, 16, 1000) == (10, 10)
