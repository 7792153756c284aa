"""The process document: what is read, what is refused, and memory that nobody can change."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
import pytest

from fastmesh import limits, saved
from fastmesh.errors import HandoverError
from fastmesh.handover import document


class Inner(msgspec.Struct, omit_defaults=True):
    handle: saved.Handle
    left_ms: saved.Ms = 5


class Shape(msgspec.Struct, omit_defaults=True):
    name: saved.Text = ""
    links: Annotated[list[Inner], msgspec.Meta(max_length=3)] = []


WHOLE = document.encode({"shape": Shape("n", [Inner(1 << 63), Inner(2, 7)]), "log": {"n": 1}})


def tree() -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(WHOLE)
    return found


def encoded(found: object) -> bytes:
    return msgspec.json.encode(found)


def test_what_was_given_is_what_is_read() -> None:
    found = document.decode(WHOLE)
    assert (found.format, sorted(found.parts)) == (document.FORMAT, ["log", "shape"])
    assert found.build
    read = saved.read(found.part("shape"), Shape, "shape")
    assert read == Shape("n", [Inner(1 << 63), Inner(2, 7)])
    assert saved.read(read, Shape, "shape") is read
    assert saved.read(found.part("other"), Shape, "other") == Shape()


@pytest.mark.parametrize("by", [-1, 0, 1])
def test_the_versions_beside_ours_are_read(by: int) -> None:
    other = tree()
    other["format"] += by
    other["later"] = {"a": [1]}
    other["parts"]["later"] = {}
    other["parts"]["shape"]["later"] = None
    other["parts"]["shape"]["links"][0]["later"] = "x"
    del other["parts"]["shape"]["name"]
    del other["fastmesh"]
    read = saved.read(document.decode(encoded(other)).part("shape"), Shape, "shape")
    assert read == Shape("", [Inner(1 << 63), Inner(2, 7)])


@pytest.mark.parametrize("by", [-2, 2, 1000])
def test_versions_further_apart_are_refused(by: int) -> None:
    other = tree()
    other["format"] += by
    with pytest.raises(HandoverError, match=rf"format: {document.FORMAT + by}; .*can be read"):
        document.decode(encoded(other))


def test_a_torn_document_is_refused_wherever_it_ends() -> None:
    for end in range(len(WHOLE)):
        with pytest.raises(HandoverError):
            document.decode(WHOLE[:end])
    with pytest.raises(HandoverError):
        document.decode(WHOLE + b"x")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("name",), 7, "shape.name: 7; Expected `str`, got `int`"),
        (("links",), {}, "shape.links: Expected `array`, got `object`"),
        (("links", 1, "handle"), -1, "shape.links[1].handle: -1; Expected `int` >= 0"),
        (("links", 0, "left_ms"), 1 << 62, f"<= {limits.SAVED_MS_MAX}"),
        (("links", 0, "left_ms"), 1.5, "shape.links[0].left_ms: 1.5; Expected `int`"),
        (("links", 0), None, "shape.links[0]: None; Expected `object`"),
        (("links",), [{"handle": 1}] * 4, "length <= 3"),
        (("links", 0), {}, "missing required field `handle`"),
        (("name",), "x" * (limits.SAVED_TEXT_CHARS_MAX + 1), "length <= "),
    ],
)
def test_what_is_wrong_is_named(path: tuple[Any, ...], value: object, said: str) -> None:
    other = tree()
    at: Any = other["parts"]["shape"]
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(HandoverError) as caught:
        saved.read(document.decode(encoded(other)).part("shape"), Shape, "shape")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"format":"1"}',
        b'{"format":1,"parts":[]}',
        b"[" * 200_000,
        b'{"format":1,"parts":' + b'{"a":' * 100_000,
        b'{"format":1,"fastmesh":"\xff","parts":{}}',
        b'{"format":1e400}',
    ],
)
def test_other_things_are_refused(data: bytes) -> None:
    with pytest.raises(HandoverError):
        document.decode(data)


def test_mutations_are_read_or_refused_and_nothing_else() -> None:
    chosen = random.Random(5)
    read = refused = 0
    for _ in range(20_000):
        data = bytearray(WHOLE)
        for _ in range(chosen.randint(1, 4)):
            at = chosen.randrange(len(data))
            kind = chosen.randrange(3)
            if kind == 0:
                data[at] = chosen.randrange(256)
            elif kind == 1:
                del data[at]
            else:
                data.insert(at, chosen.choice(b'"{}[],:0919-.e\\ntrue\x00\xff'))
        try:
            saved.read(document.decode(bytes(data)).part("shape"), Shape, "shape")
            read += 1
        except HandoverError:
            refused += 1
    assert read > 100
    assert refused > 100


def test_a_document_that_is_too_long_is_refused_on_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "HANDOVER_DOCUMENT_BYTES_MAX", len(WHOLE) - 1)
    with pytest.raises(HandoverError, match="at most"):
        document.decode(WHOLE)
    with pytest.raises(HandoverError, match="at most"):
        document.encode({"shape": Shape("n" * len(WHOLE))})


# --- sealed memory --------------------------------------------------------------------------------


@contextmanager
def closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def test_memory_is_sealed_and_read_back() -> None:
    data = os.urandom(100_000)
    with closing(document.to_memfd(data)) as fd:
        assert not os.get_inheritable(fd)
        assert document.from_memfd(fd, len(data), document.digest(data)) == data
        os.lseek(fd, 0, os.SEEK_SET)
        with pytest.raises(PermissionError):
            os.write(fd, b"x")
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 1)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0)
        assert document.from_memfd(fd, len(data), document.digest(data)) == data


def test_memory_that_is_not_as_announced_is_refused() -> None:
    data = b"some bytes"
    right = document.digest(data)
    with closing(document.to_memfd(data)) as fd:
        for size, sum_ in (
            (len(data) - 1, right),
            (len(data) + 1, right),
            (0, right),
            (-1, right),
            (limits.HANDOVER_DOCUMENT_BYTES_MAX + 1, right),
            (len(data), document.digest(b"others")),
            (len(data), right.upper()),
            (len(data), ""),
        ):
            with pytest.raises(HandoverError):
                document.from_memfd(fd, size, sum_)


@pytest.mark.parametrize("missing", ["seal", "shrink", "grow", "write", "all"])
def test_memory_that_is_not_sealed_whole_is_refused(missing: str) -> None:
    left_out = {
        "seal": fcntl.F_SEAL_SEAL,
        "shrink": fcntl.F_SEAL_SHRINK,
        "grow": fcntl.F_SEAL_GROW,
        "write": fcntl.F_SEAL_WRITE,
        "all": document.SEALS,
    }[missing]
    data = b"some bytes"
    with closing(os.memfd_create("t", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as fd:
        os.write(fd, data)
        if seals := document.SEALS & ~left_out:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(HandoverError, match="seals"):
            document.from_memfd(fd, len(data), document.digest(data))


def test_other_descriptors_are_refused() -> None:
    data = b"some bytes"
    with tempfile.TemporaryFile() as file, socket.socket() as sock:
        file.write(data)
        file.flush()
        reader, writer = os.pipe()
        with closing(reader), closing(writer):
            os.write(writer, data)
            for fd in (file.fileno(), sock.fileno(), reader, 1 << 30, -1):
                with pytest.raises(HandoverError):
                    document.from_memfd(fd, len(data), document.digest(data))
