"""The message mesh's helpers against their twin, over drawn and over a million mutated frames."""

import os
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_push import check, repair
from tests.fuzz.mutate import corpus, mutants
from tests.reference import bolt
from tests.reference import push as twin

FRAMES = int(os.environ.get("FASTMESH_FRAMES", "1000000"))
SEED = int(os.environ.get("FASTMESH_SEED", "1"))
BATCH = 10_000

FIELDS = (
    *("op", "result", "id", "topic", "group", "key", "colour", "lane", "version", "origin"),
    *("hop", "retry_ms", "idempotent", "reason", "attempt"),
)
KEY = (
    st.sampled_from([f"fm.{name}" for name in FIELDS])
    | st.none()
    | st.text(max_size=14)
    | st.text("fm.opidkyh", min_size=3, max_size=7)
)
WORDS = [word.decode() for word in (*twin.OPS, *twin.RESULTS)]
NUMBERS = ["0", "1", "2", "-1", "+1", " 1", "01", "255", "256", "86400000", "86400001", "9" * 10]
VALUE = (
    st.sampled_from(WORDS)
    | st.sampled_from([*NUMBERS, "4294967297", "0" * 11, ""])
    | st.none()
    | st.text(max_size=20)
)
PAIRS = st.lists(st.tuples(KEY, VALUE), max_size=8)
OP = st.sampled_from(WORDS).map(lambda word: ("fm.op", word))
SECTION = (
    PAIRS.map(bolt.encode_headers)
    | st.tuples(PAIRS, OP, PAIRS).map(lambda p: bolt.encode_headers([*p[0], p[1], *p[2]]))
    | st.binary(max_size=40)
)
FRAME = st.builds(
    bolt.frame,
    proto=st.sampled_from([1, 2, 2]),
    ver1=st.sampled_from([1, 2, 2]),
    type=st.sampled_from([0, 1, 1, 1, 2]),
    cmd=st.sampled_from([0, 1, 1, 1, 1, 2, 100]),
    id=st.integers(0, 0xFFFFFFFF),
    codec=st.integers(0, 255),
    switch=st.sampled_from([0, 1, 1, 126, 127]),
    timeout_ms=st.integers(-(1 << 31), (1 << 31) - 1),
    status=st.integers(0, 0xFFFF),
    class_name=st.sampled_from([twin.CLASS] * 6 + [b"", b"fastmesh.push.v2", twin.CLASS + b"x"]),
    headers=SECTION,
    content=st.binary(max_size=300),
)
RESPONSE = st.builds(
    bolt.frame,
    proto=st.sampled_from([1, 2]),
    ver1=st.just(2),
    type=st.just(0),
    cmd=st.just(2),
    switch=st.sampled_from([0, 1]),
    class_name=st.sampled_from([twin.CLASS, b"", b"com.example.Answer"]),
    headers=SECTION,
    content=st.binary(max_size=30),
)


@given(FRAME | RESPONSE, st.integers(0, 400), st.binary(max_size=30))
@settings(max_examples=800, deadline=None)
def test_drawn_frames(frame: bytes, size: int, trailing: bytes) -> None:
    check(frame)
    check(frame[:size])
    check(frame + trailing)
    check(frame + frame)
    check(frame, frame_bytes_max=len(frame) - 1)


@given(
    st.sampled_from(["", "fm.hop", "fm.origin"]),
    st.integers(-40, 40),
    st.binary(max_size=9),
    st.sampled_from([(0, False), (1, False), (2, False), (2, True)]),
)
@settings(max_examples=200, deadline=None)
def test_forwards_about_the_longest_header_section(
    extra: str, beside: int, content: bytes, version: tuple[int, bool]
) -> None:
    dialect, crc = version
    pairs = [("h.pad", ""), ("fm.op", "deliver"), *([(extra, "1")] if extra else [])]
    room = twin.HEADERS_BYTES_MAX - 44 - len(bolt.encode_headers(pairs)) + beside
    pairs[0] = ("h.pad", "x" * room)
    check(twin.request(1, pairs, content, dialect=dialect, crc=crc), 1 << 20)


def test_mutated_frames() -> None:
    """FASTMESH_FRAMES of them, a million unless it says otherwise; FASTMESH_SEED draws others."""
    seeds = list(corpus("push").values())
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
    for outcome in ("request", "response", "none", "headers", "need_more"):
        assert outcomes[outcome] > total / 100, outcomes
    assert outcomes["checksum"] > total / 1000, outcomes
