"""The process document: what Python holds, as one JSON document in one sealed memfd.

    {"format": 1, "fastmesh": "1.2.3", "parts": {NAME: what its owner saved}}

The document knows nothing of its parts (fastmesh/saved.py): each is given by its owner's `save()`
and taken by its owner's `restore()`. A document of the format before or after ours is read as well;
one that is further away is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from fastmesh import limits, saved
from fastmesh._version import __version__
from fastmesh.errors import HandoverError

FORMAT = 1
"""Raised when what a reader of the last format makes of a document would be wrong."""
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
"""With all of them nobody can change the bytes or the size any more, not even who made them."""


class _Document(msgspec.Struct):
    format: int
    fastmesh: saved.Text = ""
    parts: dict[str, msgspec.Raw] = {}


@dataclass(frozen=True, slots=True)
class Document:
    """What was read."""

    format: int
    build: str
    """The version of fastmesh that wrote it."""
    parts: Mapping[str, msgspec.Raw]

    def part(self, name: str) -> Any:
        """For the `restore()` of its owner; that of a document without it is empty."""
        return self.parts.get(name, {})


def encode(parts: Mapping[str, Any]) -> bytes:
    """The document with these parts. Raises HandoverError when it is longer than
    HANDOVER_DOCUMENT_BYTES_MAX."""
    tree = {"format": FORMAT, "fastmesh": __version__, "parts": parts}
    data = msgspec.json.encode(tree)
    most = limits.HANDOVER_DOCUMENT_BYTES_MAX
    if len(data) > most:
        raise HandoverError(f"process document: {len(data)} bytes; it has at most {most}")
    return data


def decode(data: bytes) -> Document:
    """Raises HandoverError. The parts are checked when they are restored."""
    if len(data) > limits.HANDOVER_DOCUMENT_BYTES_MAX:
        most = limits.HANDOVER_DOCUMENT_BYTES_MAX
        raise saved.wrong("process document", len(data), f"it has at most {most} bytes")
    found = saved.read(msgspec.Raw(data), _Document, "process document")
    if abs(found.format - FORMAT) > 1:
        raise saved.wrong(
            "process document.format", found.format, f"{FORMAT - 1}..{FORMAT + 1} can be read"
        )
    return Document(found.format, found.fastmesh, found.parts)


# --- sealed memory --------------------------------------------------------------------------------


def to_memfd(data: bytes, name: str = "fastmesh-document") -> int:
    """A new sealed memfd with these bytes; the caller closes it. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def from_memfd(fd: int, size: int, sha256: str) -> bytes:
    """The bytes of a sealed memfd that somebody sent, which announced this size and this sum (hex).
    Nothing is read before it is sealed and as long as announced. `fd` stays the caller's. Raises
    HandoverError."""
    most = limits.HANDOVER_DOCUMENT_BYTES_MAX
    if not 0 < size <= most:
        raise saved.wrong("memfd.bytes", size, f"it must be 1..{most}")
    try:
        found = os.fstat(fd)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise HandoverError(f"memfd: descriptor {fd} is none: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode) or seals & SEALS != SEALS:
        raise saved.wrong("memfd.seals", seals, f"all of {SEALS} must be set")
    if found.st_size != size:
        raise saved.wrong("memfd.bytes", size, f"the memfd has {found.st_size}")
    data = bytearray()
    while len(data) < size:
        try:
            piece = os.pread(fd, size - len(data), len(data))
        except OSError as error:
            raise HandoverError(f"memfd: cannot be read: {error.strerror}") from error
        if not piece:
            break  # the sum tells
        data += piece
    whole = bytes(data)
    if digest(whole) != sha256:
        raise saved.wrong("memfd.sha256", sha256, f"the bytes have {digest(whole)}")
    return whole


def digest_of(memfd: int, size: int) -> str:
    """The same of the first `size` bytes of a memfd, without copying them. Raises OSError,
    HandoverError when it is shorter or may still change."""
    seals = fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
    if seals & SEALS != SEALS:
        raise saved.wrong("memfd.seals", seals, f"all of {SEALS} must be set")
    found = os.fstat(memfd).st_size
    if found != size:
        raise saved.wrong("memfd.bytes", size, f"the memfd has {found}")
    if size == 0:
        return digest(b"")
    with mmap.mmap(memfd, size, prot=mmap.PROT_READ) as mapped:
        return hashlib.sha256(mapped).hexdigest()


def digest(data: bytes) -> str:
    """As it stands in the record that goes with a memfd."""
    return hashlib.sha256(data).hexdigest()
