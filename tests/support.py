"""What the tests of every protocol share: feeding bytes in pieces, and cutting frames short.

A `scan` here is a codec's face for tests: bytes in; out comes something with `outcome` ("ok",
"need_more", "malformed"), `size` and `need`.
"""

import random
from collections.abc import Callable, Iterable
from typing import Protocol


class Scanned(Protocol):
    """What is looked at of a codec's word about some bytes."""

    @property
    def outcome(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def need(self) -> int: ...


def cut(scan: Callable[[bytes], Scanned], pieces: Iterable[bytes]) -> tuple[list[bytes], bytes]:
    """The frames of a stream that comes in pieces, and what is left of it.

    Checks on the way that a codec keeps its word: no frame is whole before the bytes that it said
    were surely needed. Raises ValueError where the stream is malformed.
    """
    frames = []
    rest = b""
    promised = 0
    for piece in pieces:
        rest += piece
        while rest:
            got = scan(rest)
            if got.outcome == "malformed":
                raise ValueError(f"malformed after {len(frames)} frames: {got}")
            if got.outcome == "need_more":
                assert got.need > len(rest), got
                promised = got.need
                break
            assert 0 < got.size <= len(rest), got
            assert got.size >= promised, (got, promised)
            frames.append(rest[: got.size])
            rest = rest[got.size :]
            promised = 0
    return frames, rest


def feed_three_ways(
    scan: Callable[[bytes], Scanned], frames: list[bytes], trailing: bytes = b"", seed: int = 1
) -> None:
    """The stream of these frames comes out the same: whole, byte by byte, and at random cuts.

    `trailing` is the beginning of one more frame, which must stay where it is.
    """
    stream = b"".join(frames) + trailing
    draw = random.Random(seed)
    cuts = sorted(draw.randrange(len(stream) + 1) for _ in range(2 * len(frames)))
    ways = {
        "whole": [stream],
        "bytes": [stream[i : i + 1] for i in range(len(stream))],
        f"cuts, seed {seed}": [
            stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        ],
    }
    for way, pieces in ways.items():
        got, rest = cut(scan, pieces)
        assert got == frames, way
        assert rest == trailing, way


def truncate_everywhere(scan: Callable[[bytes], Scanned], frame: bytes) -> None:
    """Every proper prefix of this frame asks for more, and never for more than the frame."""
    for size in range(len(frame)):
        got = scan(frame[:size])
        assert got.outcome == "need_more", (size, got)
        assert size < got.need <= len(frame), (size, got)
    got = scan(frame)
    assert (got.outcome, got.size) == ("ok", len(frame)), got
