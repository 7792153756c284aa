"""The Bolt codec as Python sees it: a capsule for the snapshot, a face for tests and benchmarks.

The engine calls the functions of the table directly; nothing here is used per frame. Every function
works on a copy of its input in an allocation of exactly that size.
"""

from typing import Any, Literal, NamedTuple

class Scan(NamedTuple):
    """What the codec says about bytes that start a frame; numbers it does not know are 0."""

    outcome: Literal["ok", "need_more", "malformed"]
    kind: str | None
    id: int
    need: int
    """Bytes from the frame's start that are surely needed; "need_more" only."""
    size: int
    error: str | None
    answerable: bool
    hint: int
    timeout_ms: int
    status: int
    id_at: int
    class_at: int
    class_size: int
    headers_at: int
    headers_size: int
    checksum_at: int

def capsule() -> Any:
    """A PyCapsule named "fastmesh.codec" around the codec's table."""

def scan(data: bytes, frame_bytes_max: int = 4194304) -> Scan: ...
def service(data: bytes) -> bytes | None:
    """The route key of a whole frame. Raises ValueError for anything else or broken headers."""

def header(data: bytes, key: bytes) -> bytes | None:
    """The first value of `key`. Raises ValueError as service() does."""

def patch(data: bytes, new_id: int) -> bytes:
    """The frame with another id. Raises ValueError when `data` starts with no whole frame."""

def answer(id: int, hint: int, cause: str) -> bytes:
    """The mesh's own answer. Raises KeyError for a cause that is not in the metrics' list."""

def heartbeat(id: int, dialect: int = 0) -> bytes:
    """`dialect` 0 is v1; 1 and 2 are v2 with that ver1."""

def heartbeat_ack(data: bytes) -> bytes:
    """The answer to the heartbeat in `data`. Raises ValueError when that is no whole frame."""

def state_survives() -> bool:
    """Bolt keeps no state per connection: saves as nothing, loads from nothing only."""

def bench(data: bytes, rounds: int) -> float:
    """Nanoseconds per scan, service and patch of one frame, without the GIL."""
