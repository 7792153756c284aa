"""The hand-over of one engine to another in this process: the test plays what stands between them,
and os.dup plays SCM_RIGHTS.

    move(bed)                     bed.engine is another one from here on, with everything it had
    move(bed, threads=2, snapshot=bed.snapshot(in_flight_max=16))

`blobs` changes what was saved on its way.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fastmesh._ext.engine import Engine, Event, Saved, inspect
from tests._ext.bed import Bed, eventually
from tests._ext.push_bed import PushBed

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

AnyBed = Bed | PushBed
TABLES_MAX = 64 << 10
"""Bytes of tables that a world keeps when what was built in them is undone."""


def fronts(bed: AnyBed) -> dict[int, Any]:
    return bed.fronts if isinstance(bed, PushBed) else {1: bed.front}


def wait(bed: AnyBed, kind: str, count: int) -> list[Event]:
    """The next `count` events of that kind, taken out of what was seen."""
    found = bed.wait_event(kind, count)
    bed.events = [event for event in bed.events if event.kind != kind]
    return found


def again(bed: AnyBed) -> Any:
    """The newest snapshot once more."""
    return bed.snapshot(bed.endpoints) if isinstance(bed, Bed) else bed.snapshot()


def freeze(bed: AnyBed) -> list[Event]:
    bed.engine.freeze()
    return wait(bed, "frozen", bed.engine.threads)


def thaw(bed: AnyBed) -> list[Event]:
    bed.engine.thaw()
    return wait(bed, "thawed", bed.engine.threads)


def save(bed: AnyBed) -> list[Saved]:
    bed.engine.save()
    for event in wait(bed, "saved", bed.engine.threads):
        assert event.a == 0, os.strerror(event.a)
    return [bed.engine.saved(thread) for thread in range(bed.engine.threads)]


def successor(bed: AnyBed, threads: int | None = None, **how: Any) -> Engine:
    made: dict[str, Any] = {"watchdog": False, "seed": 2, **how}
    if isinstance(bed, PushBed):
        made.setdefault("ring_bytes", bed.ring_bytes)
    return Engine(threads=threads or bed.engine.threads, **made)


def hand(saved: Saved) -> tuple[int, list[int]]:
    """The memfd, and duplicates of the descriptors."""
    return saved.memfd, [os.dup(fd) for fd in saved.descriptors]


def load(engine: Engine, saved: list[Saved], blobs: Callable[[bytes], bytes] | None = None) -> None:
    """Raises what load() does; closes the memfds in any case."""
    handed = [hand(one) for one in saved]
    try:
        for thread, (memfd, fds) in enumerate(handed):
            seen = inspect(memfd)
            assert seen["thread"] == thread
            assert seen["descriptors"] == len(fds)
            if blobs is None:
                engine.load(thread, memfd, fds)
                continue
            other = sealed(blobs(content(memfd)))
            try:
                engine.load(thread, other, fds)
            finally:
                os.close(other)
    finally:
        for memfd, _ in handed:
            os.close(memfd)


def move(
    bed: AnyBed,
    *,
    threads: int | None = None,
    snapshot: Any = None,
    blobs: Callable[[bytes], bytes] | None = None,
    before_save: Callable[[], None] | None = None,
    **how: Any,
) -> list[Saved]:
    """Hand `bed.engine` over. The old one is stopped, the new one is the bed's."""
    old = bed.engine
    taker = successor(bed, threads, **how)
    taker.adopt(again(bed) if snapshot is None else snapshot)
    freeze(bed)
    if before_save is not None:
        before_save()
    saved = save(bed)
    load(taker, saved, blobs)
    old.release()
    wait(bed, "stopped", old.threads)
    assert old.stop()
    bed.engine = taker
    for number, front in fronts(bed).items():
        taker.listen(number, front.fileno())
    taker.start_adopted()
    for event in wait(bed, "thawed", taker.threads):
        assert event.a >= event.b
    return saved


# --- blobs as bytes -------------------------------------------------------------------------------

HEAD = struct.Struct("<8sIIQIIIIIIIIIIQQ")
RECORD = struct.Struct("<HHIQ")
CRC_AT = 24
KINDS = (
    "", "process", "row", "world", "bucket", "index", "endpoint", "group", "conn", "link", "member",
    "key", "fan", "slots", "slot", "entry", "end",
)  # fmt: skip


class Record(NamedTuple):
    kind: int
    flags: int
    fixed: bytes
    data: bytes


def content(memfd: int) -> bytes:
    return os.pread(memfd, os.fstat(memfd).st_size, 0)


def sealed(data: bytes, seals: int = SEALS) -> int:
    memfd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    written = 0
    while written < len(data):
        written += os.write(memfd, data[written:])
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
    return memfd


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def records(blob: bytes) -> Iterator[Record]:
    at = HEAD.unpack_from(blob)[2]
    while at < len(blob):
        kind, flags, fixed, data = RECORD.unpack_from(blob, at)
        at += RECORD.size
        there = at + fixed + (-fixed % 8)
        yield Record(kind, flags, blob[at : at + fixed], blob[there : there + data])
        at = there + data + (-data % 8)


def checked(blob: bytes) -> bytes:
    """With the checksum that it should have."""
    (head_bytes,) = struct.unpack_from("<I", blob, 12)
    head_bytes = min(max(head_bytes, CRC_AT + 4), len(blob))
    crc = zlib.crc32(blob[head_bytes:])
    crc = zlib.crc32(blob[:CRC_AT] + bytes(4) + blob[CRC_AT + 4 : head_bytes], crc)
    return blob[:CRC_AT] + struct.pack("<I", crc) + blob[CRC_AT + 4 :]


def assembled(blob: bytes, found: list[Record], **head: int) -> bytes:
    """A blob of these records, with the head of another; `version` and `more` (bytes at the head's
    end) may differ."""
    fields = list(HEAD.unpack_from(blob))
    more = head.get("more", 0)
    fields[1] = head.get("version", fields[1])
    fields[2] = HEAD.size + more
    body = b"".join(
        RECORD.pack(one.kind, one.flags, len(one.fixed), len(one.data))
        + padded(one.fixed)
        + padded(one.data)
        for one in found
    )
    fields[3] = HEAD.size + more + len(body)
    fields[7] = len(found)
    return checked(HEAD.pack(*fields) + b"\xaa" * more + body)


def of_next_version(blob: bytes) -> bytes:
    """As the version after this one may write it: longer, with things unheard of in between."""
    found: list[Record] = []
    for one in records(blob):
        found += [one._replace(fixed=one.fixed + b"\x55" * 12), Record(99, 1, b"news", b"of later")]
    end = found[-2]
    return assembled(blob, [*found[:-2], end], version=HEAD.unpack_from(blob)[1] + 1, more=16)


SHORTER = ("world", "bucket", "endpoint", "group", "conn", "link", "member", "slot", "entry")


def of_version_before(blob: bytes) -> bytes:
    """As the version before this one would have written it, had it not known the last field of
    each record that may do without."""
    found = [
        one._replace(fixed=one.fixed[:-8]) if KINDS[one.kind] in SHORTER else one
        for one in records(blob)
    ]
    return assembled(blob, found, version=HEAD.unpack_from(blob)[1] - 1)


def nothing_open(bed: AnyBed) -> bool:
    return bool(eventually(lambda: not bed.process().get("connections"), "no client left"))
