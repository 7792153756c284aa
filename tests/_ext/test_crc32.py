"""The checksum against zlib's, and its linear delta against checksums computed anew."""

import random
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastmesh._ext import crc32 as native

WORDS = st.integers(0, 0xFFFFFFFF)


@pytest.fixture(params=["portable", "wide"], autouse=True, scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways of multiplying, where the processor has both."""
    wide = native.use_wide(request.param == "wide")
    if request.param == "wide" and not wide:
        pytest.skip("this processor has no carry-less multiplication")
    yield request.param
    native.use_wide(True)


def test_every_length_up_to_a_kibibyte() -> None:
    # All paths of the code meet at some length: lanes of 64, of 16, words of 8, single bytes.
    data = random.Random(7).randbytes(1100)
    for size in range(len(data)):
        assert native.crc32(data[:size]) == zlib.crc32(data[:size]), size


def test_a_body_of_16_kibibytes_and_one_of_three_mebibytes() -> None:
    for size in (16384, 3 << 20):
        data = random.Random(size).randbytes(size)
        assert native.crc32(data) == zlib.crc32(data)


@given(st.binary(max_size=400), st.binary(max_size=400))
def test_goes_on_from_an_earlier_checksum(first: bytes, second: bytes) -> None:
    assert native.crc32(second, native.crc32(first)) == zlib.crc32(first + second)


@given(st.binary(max_size=40), WORDS, WORDS, st.binary(max_size=700))
@example(b"", 0, 0xFFFFFFFF, b"")
@example(b"head", 1, 1, b"unchanged")
@example(b"head", 1, 0x80000000, bytes(255))
@example(b"head", 1, 0x80000000, bytes(256))
@example(b"head", 1, 0x80000000, bytes(257))
def test_patch_is_the_checksum_of_the_changed_bytes(
    before: bytes, old: int, new: int, after: bytes
) -> None:
    was = zlib.crc32(before + old.to_bytes(4, "big") + after)
    now = zlib.crc32(before + new.to_bytes(4, "big") + after)
    assert native.patch(was, old, new, len(after)) == now


@pytest.mark.parametrize("following", [16384, 65535, 65536, 3 << 20])
def test_patch_before_a_large_body(following: int) -> None:
    after = random.Random(following).randbytes(following)
    was = zlib.crc32(b"\x00\x00\x00\x07" + after)
    now = zlib.crc32(b"\x7f\x01\x00\x2a" + after)
    assert native.patch(was, 7, 0x7F01002A, following) == now


def times(a: int, b: int) -> int:
    """a * b mod P, one bit at a time; bit 31 is x^0."""
    product = 0
    for i in range(31, -1, -1):
        if a >> i & 1:
            product ^= b
        b = (b >> 1) ^ (0xEDB88320 if b & 1 else 0)
    return product


def x_to_the(n: int) -> int:
    power, base = 1 << 31, 1 << 30
    while n:
        if n & 1:
            power = times(power, base)
        base = times(base, base)
        n >>= 1
    return power


@given(WORDS, st.integers(0, (1 << 64) - 1))
@settings(max_examples=60)
def test_patch_before_more_than_any_memory_holds(flipped: int, following: int) -> None:
    bits = int.from_bytes(flipped.to_bytes(4, "big"), "little")
    assert native.patch(0, flipped, 0, following) == times(bits, x_to_the(8 * following + 32))
