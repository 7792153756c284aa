"""A seeded mutator: under the differential tests, and the fuzz targets where atheris is missing.

It knows nothing of a protocol but its corpus. `repair` is a target's chance to make a checksum
right again, without which no mutated frame would ever get past it.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

CORPUS = Path(__file__).parent.parent / "corpus"

# Lengths and counters that were somebody's bug: zero, one, signs, and just beside them.
BYTES = (0, 1, 2, 3, 10, 32, 48, 57, 100, 127, 128, 255)
WORDS = (0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
LONGS = (0, 1, 0xFFFF, 0x10000, 0x3FFFFF, 0x400000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def corpus(protocol: str) -> dict[str, bytes]:
    """The inputs kept for a protocol, by file name."""
    return {path.name: path.read_bytes() for path in sorted((CORPUS / protocol).iterdir())}


def mutants(
    seeds: list[bytes], seed: int, count: int, repair: Callable[[bytes], bytes] | None = None
) -> Iterator[bytes]:
    """`count` inputs, the same ones for the same seed."""
    draw = random.Random(seed)
    number = draw.random
    for _ in range(count):
        data = bytearray(seeds[int(number() * len(seeds))])
        for _ in range(1 + int(number() ** 2 * 4)):
            at = int(number() * (len(data) + 1))
            what = int(number() * 10)
            if what == 0:
                data[at : at + 1] = bytes([int(number() * 256)])
            elif what == 1 and at < len(data):
                data[at] ^= 1 << int(number() * 8)
            elif what == 2:
                data[at : at + 1] = bytes([BYTES[int(number() * len(BYTES))]])
            elif what == 3:
                data[at : at + 2] = WORDS[int(number() * len(WORDS))].to_bytes(2, "big")
            elif what == 4:
                data[at : at + 4] = LONGS[int(number() * len(LONGS))].to_bytes(4, "big")
            elif what == 5:
                del data[at:]
            elif what == 6:
                del data[at : at + 1 + int(number() * 4)]
            elif what == 7:
                data[at:at] = data[at : at + int(number() * 16)]
            elif what == 8:
                other = seeds[int(number() * len(seeds))]
                data[at:] = other[int(number() * len(other)) :]
            elif at:
                # The head holds every decision: change it more often than a body.
                head = int(number() * min(at, 32))
                data[head] = (data[head] + 1 - 2 * int(number() * 2)) & 255
        made = bytes(data)
        yield repair(made) if repair is not None and number() < 0.7 else made
