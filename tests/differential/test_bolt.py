"""Bolt: the native codec against its twin, over drawn frames and over a million mutated ones."""

import os
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from fastmesh._ext import bolt as native
from tests.fuzz.fuzz_bolt import check, repair
from tests.fuzz.mutate import corpus, mutants
from tests.reference import bolt as twin

FRAMES = int(os.environ.get("FASTMESH_FRAMES", "1000000"))
SEED = int(os.environ.get("FASTMESH_SEED", "1"))
BATCH = 10_000

BYTE = st.integers(0, 255)
LENGTH = st.none() | st.sampled_from([0, 1, 0x7FFF, 0x8000, 0xFFFF])
TEXT = st.none() | st.sampled_from(["service", "sofa_head_target_service", "a", ""]) | st.text()
FRAME = st.builds(
    twin.frame,
    proto=st.sampled_from([1, 2, 2, 2, 0, 3]),
    ver1=st.sampled_from([1, 2, 2, 2, 0, 3]),
    type=st.sampled_from([0, 1, 1, 2, 3]),
    cmd=st.sampled_from([0, 1, 1, 2, 100, 3, 256]),
    ver2=BYTE,
    id=st.integers(0, 0xFFFFFFFF),
    codec=BYTE,
    switch=st.sampled_from([0, 1, 1, 126, 127, 128, 255]),
    timeout_ms=st.integers(-(1 << 31), (1 << 31) - 1),
    status=st.integers(0, 0xFFFF),
    class_name=st.binary(max_size=50),
    headers=st.lists(st.tuples(TEXT, TEXT), max_size=4).map(twin.encode_headers)
    | st.binary(max_size=40),
    content=st.binary(max_size=300),
    class_len=LENGTH,
    header_len=LENGTH,
    content_len=st.none() | st.sampled_from([0, 1, 70_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]),
    crc=st.none() | st.just(0xBADC0DE),
)


@given(FRAME, st.integers(0, 400), st.binary(max_size=30))
@settings(max_examples=400, deadline=None)
def test_drawn_frames(frame: bytes, size: int, trailing: bytes) -> None:
    check(frame)
    check(frame[:size])
    check(frame + trailing)
    check(frame, frame_bytes_max=len(frame))
    check(frame, frame_bytes_max=len(frame) - 1)


@given(st.lists(st.tuples(TEXT, TEXT), max_size=6), st.text(max_size=20), st.integers(0, 200))
@settings(max_examples=300, deadline=None)
def test_drawn_headers(pairs: list[tuple[str | None, str | None]], key: str, size: int) -> None:
    section = twin.encode_headers(pairs)
    for headers in (section, section[:size]):
        frame = twin.request(1, headers=headers)
        check(frame)
        (said,) = twin.frames(frame)
        names = {name for name, _ in pairs if name is not None} | {key}
        for name in names:
            try:
                value = twin.header_of(said, name.encode())
            except twin.HeaderError:
                value = ValueError
            try:
                found = native.header(frame, name.encode())
            except ValueError:
                found = ValueError
            assert found == value


def test_mutated_frames() -> None:
    """FASTMESH_FRAMES of them, a million unless it says otherwise; FASTMESH_SEED draws others."""
    seeds = list(corpus("bolt").values())
    outcomes: Counter[str] = Counter()
    done = 0
    while done < FRAMES:
        seed = SEED * 1_000_003 + done
        data = b""
        try:
            for data in mutants(seeds, seed, min(BATCH, FRAMES - done), repair):
                outcomes[check(data)] += 1
        except AssertionError as e:
            e.add_note(f"input {data.hex()}")
            raise
        done += BATCH
    # A mutator that never gets past the checks would compare nothing: each outcome has its share.
    total = sum(outcomes.values())
    assert total == FRAMES
    for outcome in ("ok", "need_more", "protocol", "type", "command", "length", "too_large"):
        assert outcomes[outcome] > total / 100, outcomes
    assert outcomes["checksum"] > total / 1000, outcomes
