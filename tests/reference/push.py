"""The message mesh's frames in plain Python: the oracle of the native helpers, for test peers too.

On top of tests/reference/bolt.py, which frames them. Read a frame (`read`, `headers_of`), make the
mesh's own (`forward`, `as_deliver`, `own_answer`, `answer`) and those of everybody else (`request`,
`response`). docs/protocol/mesh-push.md is the specification.

All that is read stands in the header section. Of a request of class fastmesh.push.v1 it is the
first non-null value of fm.op, fm.topic, fm.group, fm.key, fm.colour, fm.lane, fm.version,
fm.origin, fm.id, fm.hop (0..255) and fm.idempotent (0..1); of a response, whatever its class, that
of fm.result, fm.retry_ms (0..86400000) and fm.id. A number is 1 to 10 decimal digits.
"""

import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from tests.reference import bolt

CLASS: Final = b"fastmesh.push.v1"
CODEC: Final = bolt.CODEC_PROTOBUF
HEADERS_BYTES_MAX: Final = 0x7FFF
NODE_BYTES_MAX: Final = 64
REASON_BYTES_MAX: Final = 128

OPS: Final = (
    b"hello",
    b"subscribe",
    b"announce",
    b"suspend",
    b"resume",
    b"goaway",
    b"publish",
    b"deliver",
    b"check",
    b"forward",
)
RESULTS: Final = (
    b"consumed",
    b"later",
    b"no_consumer",
    b"reject",
    b"commit",
    b"rollback",
    b"unknown",
)
HOP_MAX: Final = 255
RETRY_MS_MAX: Final = 86_400_000

# (result, retry_ms, reason) by cause, or the cause alone where Bolt's status is all that is said.
TO_A_CLIENT: Final[dict[str, tuple[str, int, bytes | None] | None]] = {
    "no_route": ("reject", 0, b"no broker serves this topic"),
    "no_endpoint": ("later", 1000, b"no broker of this topic is up"),
    "overload": ("later", 100, b"overload"),
    "connect": ("later", 1000, b"no broker of this topic can be reached"),
    "upstream_lost": None,
    "client_gone": None,
    "undecodable": ("reject", 0, b"not a frame of this protocol"),
    "deadline": None,
}
TO_A_DELIVERER: Final[dict[str, tuple[str, int, bytes | None]]] = {
    "no_route": ("no_consumer", 0, None),
    "no_endpoint": ("later", 0, b"peer not reachable"),
    "overload": ("later", 100, b"overload"),
    "connect": ("later", 0, b"peer not reachable"),
    "upstream_lost": ("later", 0, b"peer gone before its answer"),
    "client_gone": ("later", 0, b"consumer gone before its answer"),
    "undecodable": ("reject", 0, b"not a frame of this protocol"),
    "deadline": ("later", 0, b"no answer in time"),
}


class Fields(NamedTuple):
    op: str | None = None
    result: str | None = None
    idempotent: int = 0
    hop: int = -1
    retry_ms: int = 0
    op_at: int = 0
    topic: bytes | None = None
    group: bytes | None = None
    key: bytes | None = None
    colour: bytes | None = None
    lane: bytes | None = None
    version: bytes | None = None
    origin: bytes | None = None
    id: bytes | None = None


# ----------------------------------------------------------------------------------------- reading


def places(frame: bolt.Frame) -> dict[bytes, tuple[int, bytes]]:
    """Of every key its first non-null value, and where in the frame that stands.

    Raises bolt.HeaderError.
    """
    found: dict[bytes, tuple[int, bytes]] = {}
    at = headers_at(frame)
    for key, value in bolt.header_pairs(frame.headers):
        at += 8 + len(key or b"")
        if key is not None and value is not None:
            found.setdefault(key, (at, value))
        at += len(value or b"")
    return found


def split(data: bytes, frame_bytes_max: int) -> tuple[list[bytes], int]:
    """Whole frames and the bytes that they are. Raises ValueError when a malformed one is first."""
    found: list[bytes] = []
    at = 0
    while at < len(data):
        got = bolt.decode(memoryview(data)[at:], frame_bytes_max)
        if isinstance(got, bolt.Malformed) and not found:
            raise ValueError(got.reason)
        if not isinstance(got, bolt.Frame):
            break
        found.append(got.data)
        at += len(got.data)
    return found, at


def headers_at(frame: bolt.Frame) -> int:
    return bolt.header_size(frame.data) + len(frame.class_name)


def headers_of(frame: bolt.Frame) -> dict[str, str]:
    """The header map as text; what stands behind the first value of a key is not looked at.

    Raises ValueError (a HeaderError or a UnicodeDecodeError).
    """
    found: dict[str, str] = {}
    for key, value in bolt.decode_headers(frame.headers):
        if key is None or value is None:
            continue
        name = key.decode()
        if name not in found:
            found[name] = value.decode()
    return found


def number(text: bytes, most: int) -> int:
    """Raises ValueError for what is no decimal number in 0..most."""
    if re.fullmatch(rb"[0-9]{1,10}", text) is None or int(text) > most:
        raise ValueError(f"{text!r} is no number in 0..{most}")
    return int(text)


def read(frame: bolt.Frame) -> Fields | None:
    """None: no frame of the mesh. Raises ValueError for a malformed section or number."""
    if frame.kind == bolt.RESPONSE:
        found = places(frame)
        texts = {key: value for key, (_, value) in found.items()}
        retry_ms = number(texts.get(b"fm.retry_ms", b"0"), RETRY_MS_MAX)
        if b"fm.result" not in texts:
            return None
        return Fields(
            result=word(texts[b"fm.result"], RESULTS),
            retry_ms=retry_ms,
            id=texts.get(b"fm.id"),
        )
    if frame.kind not in (bolt.REQUEST, bolt.ONEWAY) or frame.class_name != CLASS:
        return None
    found = places(frame)
    texts = {key: value for key, (_, value) in found.items()}
    hop = number(texts[b"fm.hop"], HOP_MAX) if b"fm.hop" in texts else -1
    idempotent = number(texts.get(b"fm.idempotent", b"0"), 1)
    if b"fm.op" not in texts:
        return None
    return Fields(
        op=word(texts[b"fm.op"], OPS),
        idempotent=idempotent,
        hop=hop,
        op_at=found[b"fm.op"][0],
        topic=texts.get(b"fm.topic"),
        group=texts.get(b"fm.group"),
        key=texts.get(b"fm.key"),
        colour=texts.get(b"fm.colour"),
        lane=texts.get(b"fm.lane"),
        version=texts.get(b"fm.version"),
        origin=texts.get(b"fm.origin"),
        id=texts.get(b"fm.id"),
    )


def word(text: bytes, known: Iterable[bytes]) -> str:
    return text.decode() if text in known else "other"


# ---------------------------------------------------------------------------------------- building


def request(
    id: int,
    headers: Mapping[str, str | None] | Iterable[tuple[str | None, str | None]],
    content: bytes = b"",
    *,
    timeout_ms: int = 0,
    oneway: bool = False,
    dialect: int = 0,
    crc: bool = False,
    class_name: bytes = CLASS,
) -> bytes:
    return bolt.frame(
        proto=2 if dialect else 1,
        ver1=dialect or 1,
        type=bolt.TYPE_ONEWAY if oneway else bolt.TYPE_REQUEST,
        id=id,
        codec=CODEC,
        switch=bolt.SWITCH_CRC if crc else 0,
        timeout_ms=timeout_ms,
        class_name=class_name,
        headers=bolt.encode_headers(headers),
        content=content,
    )


def response(
    asked: bolt.Frame | bolt.Malformed,
    headers: Mapping[str, str | None] | Iterable[tuple[str | None, str | None]],
    content: bytes = b"",
    *,
    status: int = 0,
    class_name: bytes = CLASS,
) -> bytes:
    return bolt.frame(
        proto=asked.proto,
        ver1=asked.ver1,
        type=bolt.TYPE_RESPONSE,
        cmd=bolt.CMD_RESPONSE,
        id=asked.id,
        codec=asked.codec,
        switch=asked.switch,
        status=status,
        class_name=class_name,
        headers=bolt.encode_headers(headers),
        content=content,
    )


# ------------------------------------------------------------------------------ what the mesh does


def forward(frame: bolt.Frame, node: bytes) -> bytes | None:
    """What a mesh sends to a peer instead of this delivery; None when it cannot be forwarded."""
    said = read(frame)
    assert said is not None
    if said.op != "deliver" or not 1 <= len(node) <= NODE_BYTES_MAX:
        return None
    pairs: list[tuple[bytes | None, bytes | None]] = [(b"fm.hop", b"1"), (b"fm.origin", node)]
    replaced = False
    for key, value in bolt.decode_headers(frame.headers):
        if key in (b"fm.hop", b"fm.origin") and value is not None:
            continue
        if key == b"fm.op" and value is not None and not replaced:
            pairs.append((key, b"forward"))
            replaced = True
        else:
            pairs.append((key, value))
    section = encode(pairs)
    if len(section) > HEADERS_BYTES_MAX:
        return None
    return bolt.frame(
        proto=frame.proto,
        ver1=frame.ver1,
        type=frame.type,
        cmd=frame.cmd,
        ver2=frame.ver2,
        id=frame.id,
        codec=frame.codec,
        switch=frame.switch,
        timeout_ms=frame.timeout_ms,
        class_name=frame.class_name,
        headers=section,
        content=frame.content,
    )


def encode(pairs: Iterable[tuple[bytes | None, bytes | None]]) -> bytes:
    """Pairs of any bytes; bolt.encode_headers takes text."""
    out = b""
    for pair in pairs:
        for text in pair:
            out += struct.pack(">i", -1) if text is None else struct.pack(">i", len(text)) + text
    return out


def as_deliver(frame: bolt.Frame) -> bytes:
    """What the peer gives its client."""
    said = read(frame)
    assert said is not None
    assert said.op == "forward"
    out = frame.data[: said.op_at] + b"deliver" + frame.data[said.op_at + 7 :]
    if frame.crc is not None:
        out = out[:-4] + struct.pack(">I", zlib.crc32(out[:-4]))
    return out


def own_answer(
    asked: bolt.Frame | bolt.Malformed, result: str, retry_ms: int = 0, reason: bytes | None = None
) -> bytes:
    """A response with that result, as the mesh makes it."""
    pairs = {"fm.result": result}
    if result == "later":
        pairs["fm.retry_ms"] = str(retry_ms)
    if reason is not None:
        pairs["fm.reason"] = reason[:REASON_BYTES_MAX].decode()
    return response(asked, pairs)


def answer(asked: bolt.Frame | bolt.Malformed, cause: str, *, delivery: bool = False) -> bytes:
    """The mesh's own answer to a request that failed for that cause."""
    said = TO_A_DELIVERER[cause] if delivery else TO_A_CLIENT[cause]
    if said is None:
        return bolt.mesh_answer(asked, cause)
    return own_answer(asked, *said)
