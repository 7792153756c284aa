"""The message mesh's frames as Python sees them (docs/protocol/mesh-push.md).

`parse`, `split`, `request` and `response` are what the control plane, the broker and the client
work with. Below them stands the face for tests and benchmarks: the functions that the engine calls,
each on a copy of its input in an allocation of exactly that size.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

CLASS: bytes
"""The class of every frame of this protocol: b"fastmesh.push.v1"."""

class Push(NamedTuple):
    """One whole frame. Numbers that its kind does not have are 0."""

    kind: Literal["request", "oneway", "response", "heartbeat", "heartbeat_ack", "goaway"]
    id: int
    hint: int
    """Dialect, codec and switch: what `response` needs to answer in kind."""
    timeout_ms: int
    """As on the wire: <= 0 says none."""
    status: int
    headers: dict[str, str]
    """First occurrence of a key; pairs with a null are left out."""
    content: bytes
    class_name: bytes
    """CLASS, or what other frames carry: a request of another class is none of ours, a response may
    have any (libraries name it after the object that the handler returned)."""

def parse(frame: bytes) -> Push:
    """The frame that `frame` is, exactly. Raises ValueError, saying what is wrong with it: cut off,
    followed by more, malformed, a header section that does not parse or is not UTF-8."""

def split(buffer: bytes | bytearray | memoryview, frame_bytes_max: int) -> tuple[list[bytes], int]:
    """The whole frames that `buffer` starts with, and the bytes that they are; what follows is kept
    by the caller until there is more of it. Raises ValueError when a malformed frame comes first:
    frames before one are returned, and the next call raises."""

def request(
    id: int,
    headers: Mapping[str, str],
    content: bytes | bytearray | memoryview = b"",
    *,
    timeout_ms: int = 0,
    oneway: bool = False,
    dialect: int = 0,
    crc: bool = False,
) -> bytes:
    """A request of our class, codec byte 11. `dialect` 0 is v1; 1 and 2 are v2 with that ver1, and
    only 2 has a CRC. Raises ValueError when the headers need more than 32767 bytes or are no text,
    OverflowError when a number does not fit its field."""

def response(
    id: int,
    hint: int,
    headers: Mapping[str, str],
    content: bytes | bytearray | memoryview = b"",
    *,
    status: int = 0,
) -> bytes:
    """The answer to the request of that id and hint. Raises as `request` does."""

def capsule() -> Any:
    """A PyCapsule named "fastmesh.codec" around the codec "push"."""

class Fields(NamedTuple):
    """What push_read found; names of PushOp and PushResult in small letters, "other" where it is
    none of them, None where there is none."""

    op: str | None
    result: str | None
    idempotent: int
    hop: int
    retry_ms: int
    op_at: int
    topic: bytes | None
    group: bytes | None
    key: bytes | None
    colour: bytes | None
    lane: bytes | None
    version: bytes | None
    origin: bytes | None
    id: bytes | None

def read(frame: bytes) -> Fields | None:
    """None: no frame of the mesh. Raises ValueError for a malformed section or number."""

def forward(frame: bytes, node: bytes) -> bytes | None:
    """What a mesh sends to a peer instead of this delivery; None when it cannot be forwarded.
    Raises ValueError when `frame` is no frame of the mesh."""

def as_deliver(frame: bytes) -> bytes:
    """What the peer gives its client. Raises ValueError when `frame` is no forward."""

def own_answer(
    id: int, hint: int, result: str, retry_ms: int = 0, reason: bytes | None = None
) -> bytes:
    """A response with that result, as the engine makes it."""

def answer(id: int, hint: int, cause: str) -> bytes:
    """The codec's answer to a request that failed for that cause."""

def service(frame: bytes) -> bytes | None:
    """The route key: the first fm.topic. Raises ValueError for broken headers."""

def bench(frame: bytes, rounds: int) -> float:
    """Nanoseconds per push_read of one frame, without the GIL."""
