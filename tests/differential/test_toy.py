"""The toy: the native codec against its twin, and what the contract promises beyond Bolt."""

import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_toy import check
from tests.fuzz.mutate import corpus, mutants
from tests.reference import toy as twin
from tests.toy import toy as native

FRAMES = int(os.environ.get("FASTMESH_FRAMES", "1000000")) // 20
SEED = int(os.environ.get("FASTMESH_SEED", "1"))

CONTENT = st.binary(max_size=60) | st.lists(st.binary(min_size=1, max_size=30), max_size=4)
ID = st.integers(0, 10**15 - 1) | st.sampled_from(["0", "007", "9" * 15, "9" * 16, "x", ""])


@given(ID | st.none(), CONTENT, st.integers(0, 10**10), st.binary(max_size=20))
@settings(max_examples=300, deadline=None)
def test_drawn_frames(id: int | str | None, content: bytes, number: int, trailing: bytes) -> None:
    for frame in (
        twin.ask(id, "order", content, timeout_ms=number, lane="blue"),
        twin.ask(id, "-", content, verb="tell"),
        twin.answer(id, content, status=number % 70_000),
        twin.beat(id),
    ):
        check(frame + trailing)
        check(frame, frame_bytes_max=len(frame))
        check(frame, frame_bytes_max=len(frame) - 1)
        check(frame[:-1])


def test_mutated_frames() -> None:
    seeds = list(corpus("toy").values())
    outcomes: Counter[str] = Counter()
    for data in mutants(seeds, SEED, FRAMES):
        try:
            outcomes[check(data)] += 1
        except AssertionError as e:
            e.add_note(f"input {data!r}")
            raise
    for outcome in ("Part", "NeedMore", "protocol", "type", "command", "length", "too_large"):
        assert outcomes[outcome] > FRAMES / 100, outcomes


def test_another_id_changes_the_length() -> None:
    connection = native.Connection("by_id")
    frame = twin.ask("7", "order", b"body")
    connection.scan(frame)
    assert connection.patch(number=4294967295) == [b"ask ", b"4294967295", b" order 3000 4\nbody"]
    assert b"".join(connection.patch(text=b"7")) == frame


def test_an_id_comes_back_as_its_sender_wrote_it() -> None:
    connection = native.Connection("by_id")
    asked = connection.scan(b"ask 007 order 0 0\n")
    assert (asked.id, asked.text) == (7, b"007")
    connection.scan(b"ans 2130771970 0 0\n")
    assert b"".join(connection.patch(text=asked.text)) == b"ans 007 0 0\n"


def test_an_id_past_32_bits_is_nobodys_slot() -> None:
    got = native.Connection("by_id").scan(b"ans 4294967297 0 0\n")
    assert (got.id, got.text) == (0, b"4294967297")


def test_by_order_nothing_is_patched_and_answers_carry_no_id() -> None:
    connection = native.Connection("by_order")
    got = connection.scan(b"ask order 0 2\nhi")
    assert (got.kind, got.id, got.text) == ("request", 0, b"")
    assert connection.service() == b"order"
    assert connection.patch(number=7) == [b"ask order 0 2\nhi"]
    assert connection.answer(3, number=7) == b"ans 103 0\n"
    assert connection.heartbeat(7) == b"beat\n"


def test_answers_by_id() -> None:
    connection = native.Connection("by_id")
    assert connection.answer(3, text=b"007") == b"ans 007 103 0\n"
    assert connection.answer(8, number=4294967295) == b"ans 4294967295 108 0\n"
    assert connection.heartbeat(12) == b"beat 12\n"
    connection.scan(b"beat 123456789012345\n")
    assert connection.heartbeat_ack() == b"back 123456789012345\n"


def test_a_streamed_frame_in_parts() -> None:
    stream = twin.ask(9, "order", [b"one", b"two"]) + twin.beat(1)
    connection = native.Connection("by_id")
    got = []
    while stream:
        part = connection.scan(stream, parts=True)
        got.append((part.kind, part.text, part.first, part.last, stream[: part.size]))
        stream = stream[part.size :]
    assert got == [
        ("request", b"9", True, False, b"ask 9 order 3000 *\n"),
        ("request", b"", False, False, b"3\none"),
        ("request", b"", False, False, b"3\ntwo"),
        ("request", b"", False, True, b"0\n"),
        ("heartbeat", b"1", True, True, b"beat 1\n"),
    ]


def test_a_streamed_frame_may_be_longer_than_the_limit_only_in_parts() -> None:
    frame = twin.ask(9, "order", [b"x" * 60] * 3)
    assert native.Connection("by_id").scan(frame, 100).error == "too_large"
    connection = native.Connection("by_id")
    rest = frame
    while rest:
        part = connection.scan(rest, 100, True)
        assert part.outcome == "ok"
        rest = rest[part.size :]


def test_whole_frames_leave_the_state_alone() -> None:
    connection = native.Connection("by_id")
    idle = connection.save()
    connection.scan(twin.ask(9, "order", [b"one"]))
    assert connection.save() == idle


def test_state_travels_between_parts() -> None:
    stream = twin.ask(9, "order", [b"one"])
    giver = native.Connection("by_id")
    first = giver.scan(stream, parts=True)
    blob = giver.save()
    taker = native.Connection("by_id")
    assert taker.load(blob)
    part = taker.scan(stream[first.size :], parts=True)
    assert (part.kind, part.first, part.last, part.size) == ("request", False, False, 5)


@pytest.mark.parametrize("room", range(7))
def test_state_that_does_not_fit_is_not_saved(room: int) -> None:
    assert native.Connection("by_id").save(room) is None
    assert len(native.Connection("by_id").save(7)) == 7


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\1\0\0\0\0\0",  # too short
        b"\1\0\0\0\0\0\0\0",  # too long
        b"\2\0\0\0\0\0\0",  # a version that we do not know
        b"\1\2\1\0\0\0\0",  # neither in a body nor not
        b"\1\1\0\0\0\0\0",  # in a body of nothing
        b"\1\1\4\0\0\0\0",  # in the body of a heartbeat
    ],
)
def test_state_that_is_not_ours_is_refused(blob: bytes) -> None:
    connection = native.Connection("by_id")
    was = connection.save()
    assert not connection.load(blob)
    assert connection.save() == was


def test_capsules() -> None:
    assert '"fastmesh.codec"' in repr(native.by_id())
    assert '"fastmesh.codec"' in repr(native.by_order())
