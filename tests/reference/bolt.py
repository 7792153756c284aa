"""SOFA Bolt v1 and v2 in plain Python: the oracle of the native codec, the codec of test peers.

Build frames from named fields (`request`, `oneway`, `response`, `heartbeat`, `heartbeat_ack`,
`goaway`; `frame` for anything, legal or not), read them back (`decode`, `frames`, `FrameReader`),
and say what the mesh would do with them (`service_of`, `patch_id`, `mesh_answer`, `mesh_heartbeat`,
`mesh_heartbeat_ack`).

Facts are those of sofa-bolt 1.6.12, sofa-bolt-node 2.0.1 and mosn 1.6.1; integers are big-endian.

               v1            v2
               req.   resp.  req.   resp.
    proto      0      0      0      0      u8: 1 or 2
    ver1       -      -      1      1      u8: 1 or 2 (a Java decoder frames no other)
    type       1      1      2      2      u8: 0 response, 1 request, 2 oneway
    cmdcode    2      2      3      3      u16: 0 heartbeat, 1 request, 2 response, 100 goaway
    ver2       4      4      5      5      u8: version of the command, any value
    requestId  5      5      6      6      u32
    codec      9      9      10     10     u8: 1 hessian2, 11 protobuf, any value
    switch     -      -      11     11     u8: 0..127 (Java refuses others), bit 0 = CRC
    timeout    10     -      12     -      i32 ms, <= 0 none given
    status     -      10     -      12     u16
    classLen   14     12     16     14     i16: 0..0x7fff (Java reads it signed)
    headerLen  16     14     18     16     i16: likewise
    contentLen 18     16     20     18     i32: >= 0
    payload    22     20     24     22     class, headers, content
    CRC-32     -      -      tail   tail   of all before it; when ver1 == 2 and switch bit 0

Which error wins: fields are judged in the order of the wire, each one as soon as its last byte is
there, and the first that is wrong decides: proto, ver1 (both "protocol"), type, cmdcode
("command"), switch ("protocol"), classLen, headerLen, contentLen ("length"), the sum of them
("too_large"), and when the frame is whole its CRC ("checksum"). Only "length" and "too_large" of a
two-way request are answerable: its id has been read by then.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

FRAME_BYTES_MAX: Final = 4 * 1024 * 1024

TYPE_RESPONSE: Final = 0
TYPE_REQUEST: Final = 1
TYPE_ONEWAY: Final = 2

CMD_HEARTBEAT: Final = 0
CMD_REQUEST: Final = 1
CMD_RESPONSE: Final = 2
CMD_GOAWAY: Final = 100

CODEC_HESSIAN: Final = 1
CODEC_PROTOBUF: Final = 11

SWITCH_CRC: Final = 1

REQUEST_CLASS: Final = b"com.alipay.sofa.rpc.core.request.SofaRequest"
RESPONSE_CLASS: Final = b"com.alipay.sofa.rpc.core.response.SofaResponse"

STATUS_SUCCESS: Final = 0
STATUS_BUSY: Final = 4  # SERVER_THREADPOOL_BUSY
STATUS_NO_PROCESSOR: Final = 6
STATUS_TIMEOUT: Final = 7
STATUS_CODEC_EXCEPTION: Final = 9
STATUS_CONNECTION_CLOSED: Final = 16

STATUS_BY_CAUSE: Final = {
    "no_route": STATUS_NO_PROCESSOR,
    "no_endpoint": STATUS_NO_PROCESSOR,
    "overload": STATUS_BUSY,
    "connect": STATUS_NO_PROCESSOR,
    "upstream_lost": STATUS_CONNECTION_CLOSED,
    "client_gone": STATUS_CONNECTION_CLOSED,
    "undecodable": STATUS_CODEC_EXCEPTION,
    "deadline": STATUS_TIMEOUT,
}
"""What the mesh puts into the status of its own answers, by cause."""

# What a frame is, by (type, cmdcode). A oneway heartbeat is in no sender's vocabulary (Java and
# Node build heartbeats as two-way requests only), so nobody would wait for its ack: it is refused
# like every other pair that is not here.
REQUEST: Final = "request"
ONEWAY: Final = "oneway"
RESPONSE: Final = "response"
HEARTBEAT: Final = "heartbeat"
HEARTBEAT_ACK: Final = "heartbeat_ack"
GOAWAY: Final = "goaway"
KINDS: Final = {
    (TYPE_REQUEST, CMD_REQUEST): REQUEST,
    (TYPE_ONEWAY, CMD_REQUEST): ONEWAY,
    (TYPE_RESPONSE, CMD_RESPONSE): RESPONSE,
    (TYPE_REQUEST, CMD_HEARTBEAT): HEARTBEAT,
    (TYPE_RESPONSE, CMD_HEARTBEAT): HEARTBEAT_ACK,
    (TYPE_REQUEST, CMD_GOAWAY): GOAWAY,
    (TYPE_ONEWAY, CMD_GOAWAY): GOAWAY,
}


class Frame(NamedTuple):
    """One whole frame. `headers` is the section as it came; `header_map` reads it."""

    kind: str
    proto: int
    ver1: int  # 0 in v1, which has no such byte
    type: int
    cmd: int
    ver2: int
    id: int
    codec: int
    switch: int  # 0 in v1
    timeout_ms: int  # 0 in responses
    status: int  # 0 in requests
    class_name: bytes
    headers: bytes
    content: bytes
    crc: int | None
    data: bytes  # the frame itself, exactly

    @property
    def header_map(self) -> dict[str, str]:
        """The headers as text, first occurrence of a key; pairs with a null are left out."""
        found: dict[str, str] = {}
        for key, value in header_pairs(self.headers):
            if key is not None and value is not None:
                found.setdefault(key.decode(), value.decode())
        return found


class Malformed(NamedTuple):
    """Bytes that can never become a frame. `id` and what follows it are 0 unless answerable."""

    reason: str  # "protocol", "type", "command", "length", "too_large", "checksum"
    answerable: bool
    id: int = 0
    proto: int = 0
    ver1: int = 0
    codec: int = 0
    switch: int = 0


class NeedMore:
    """A legal prefix; `need(data)` says how many bytes are surely needed."""

    def __repr__(self) -> str:
        return "NEED_MORE"


NEED_MORE: Final = NeedMore()


class HeaderError(ValueError):
    """The header section does not parse."""


# ----------------------------------------------------------------------------------------- headers


def encode_headers(
    headers: Mapping[str, str | None] | Iterable[tuple[str | None, str | None]],
) -> bytes:
    """(i32 keyLen, key, i32 valueLen, value)*, UTF-8, no count; -1 is null."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    out = bytearray()
    for pair in pairs:
        for text in pair:
            if text is None:
                out += struct.pack(">i", -1)
            else:
                raw = text.encode()
                out += struct.pack(">i", len(raw)) + raw
    return bytes(out)


def header_pairs(section: bytes) -> Iterator[tuple[bytes | None, bytes | None]]:
    """The pairs in order. A key's value is always read, also after a null key, as Java does.

    Raises HeaderError, when it gets there, where a length runs past the section or is below -1.
    """
    at = 0

    def text() -> bytes | None:
        nonlocal at
        if at + 4 > len(section):
            raise HeaderError("a length is cut off")
        size = struct.unpack_from(">i", section, at)[0]
        at += 4
        if size == -1:
            return None
        if size < 0 or at + size > len(section):
            raise HeaderError("a text runs past the section")
        at += size
        return section[at - size : at]

    while at < len(section):
        key = text()
        value = text()
        yield key, value


def decode_headers(section: bytes) -> list[tuple[bytes | None, bytes | None]]:
    """All pairs. Raises HeaderError."""
    return list(header_pairs(section))


def header_of(frame: Frame, key: bytes) -> bytes | None:
    """First non-null value of `key`, or None; what follows is not read. Raises HeaderError."""
    for name, value in header_pairs(frame.headers):
        if name == key and value is not None:
            return value
    return None


def service_of(frame: Frame) -> bytes | None:
    """The route key: first `service`, else first `sofa_head_target_service`; nulls are passed over.

    One pass that ends at the first `service`: damage after it is not seen. Raises HeaderError.
    """
    second = None
    for name, value in header_pairs(frame.headers):
        if value is None:
            continue
        if name == b"service":
            return value
        if name == b"sofa_head_target_service" and second is None:
            second = value
    return second


# ---------------------------------------------------------------------------------------- building


def frame(
    *,
    proto: int = 1,
    ver1: int = 1,
    type: int = TYPE_REQUEST,
    cmd: int = CMD_REQUEST,
    ver2: int = 1,
    id: int = 1,
    codec: int = CODEC_HESSIAN,
    switch: int = 0,
    timeout_ms: int = 0,
    status: int = 0,
    class_name: bytes = b"",
    headers: bytes = b"",
    content: bytes = b"",
    class_len: int | None = None,
    header_len: int | None = None,
    content_len: int | None = None,
    crc: int | None = None,
) -> bytes:
    """Any frame, legal or not. Lengths and CRC are those of the content unless given."""
    out = bytearray([proto & 255])
    if proto != 1:
        out.append(ver1 & 255)
    out += struct.pack(">BHBIB", type & 255, cmd & 65535, ver2 & 255, id & 0xFFFFFFFF, codec & 255)
    if proto != 1:
        out.append(switch & 255)
    if type == TYPE_RESPONSE:
        out += struct.pack(">H", status & 65535)
    else:
        out += struct.pack(">I", timeout_ms & 0xFFFFFFFF)
    out += struct.pack(
        ">HHI",
        (len(class_name) if class_len is None else class_len) & 65535,
        (len(headers) if header_len is None else header_len) & 65535,
        (len(content) if content_len is None else content_len) & 0xFFFFFFFF,
    )
    out += class_name + headers + content
    if proto == 2 and ver1 == 2 and switch & SWITCH_CRC:
        out += struct.pack(">I", zlib.crc32(out) if crc is None else crc)
    return bytes(out)


def _call(
    *,
    type: int,
    id: int,
    service: str | None,
    headers: Mapping[str, str | None] | bytes | None,
    content: bytes,
    timeout_ms: int,
    class_name: bytes,
    codec: int,
    proto: int,
    crc: bool,
) -> bytes:
    if not isinstance(headers, bytes):
        pairs: dict[str, str | None] = {} if service is None else {"service": service}
        headers = encode_headers({**pairs, **(headers or {})})
    return frame(
        proto=2 if crc else proto,
        ver1=2 if crc else 1,
        type=type,
        id=id,
        codec=codec,
        switch=SWITCH_CRC if crc else 0,
        timeout_ms=timeout_ms,
        class_name=class_name,
        headers=headers,
        content=content,
    )


def request(
    id: int,
    service: str | None = None,
    content: bytes = b"",
    *,
    headers: Mapping[str, str | None] | bytes | None = None,
    timeout_ms: int = 3000,
    class_name: bytes = REQUEST_CLASS,
    codec: int = CODEC_HESSIAN,
    proto: int = 1,
    crc: bool = False,
) -> bytes:
    """A two-way request. `crc` makes it v2, ver1 2 with a trailer; headers as bytes go in as is."""
    return _call(
        type=TYPE_REQUEST,
        id=id,
        service=service,
        headers=headers,
        content=content,
        timeout_ms=timeout_ms,
        class_name=class_name,
        codec=codec,
        proto=proto,
        crc=crc,
    )


def oneway(
    id: int,
    service: str | None = None,
    content: bytes = b"",
    *,
    headers: Mapping[str, str | None] | bytes | None = None,
    timeout_ms: int = -1,
    class_name: bytes = REQUEST_CLASS,
    codec: int = CODEC_HESSIAN,
    proto: int = 1,
    crc: bool = False,
) -> bytes:
    """A request that nobody answers."""
    return _call(
        type=TYPE_ONEWAY,
        id=id,
        service=service,
        headers=headers,
        content=content,
        timeout_ms=timeout_ms,
        class_name=class_name,
        codec=codec,
        proto=proto,
        crc=crc,
    )


def response(
    id: int,
    content: bytes = b"",
    *,
    status: int = STATUS_SUCCESS,
    headers: Mapping[str, str | None] | bytes = b"",
    class_name: bytes = RESPONSE_CLASS,
    codec: int = CODEC_HESSIAN,
    proto: int = 1,
    crc: bool = False,
) -> bytes:
    """An answer made from nothing; `response_to` makes the one that a real server would send."""
    return frame(
        proto=2 if crc else proto,
        ver1=2 if crc else 1,
        type=TYPE_RESPONSE,
        cmd=CMD_RESPONSE,
        id=id,
        codec=codec,
        switch=SWITCH_CRC if crc else 0,
        status=status,
        class_name=class_name,
        headers=headers if isinstance(headers, bytes) else encode_headers(headers),
        content=content,
    )


def response_to(
    asked: Frame,
    content: bytes = b"",
    *,
    status: int = STATUS_SUCCESS,
    headers: bytes = b"",
    class_name: bytes = RESPONSE_CLASS,
) -> bytes:
    """The answer of a server: same protocol, versions, codec, switch and id as the request."""
    return frame(
        proto=asked.proto,
        ver1=asked.ver1,
        type=TYPE_RESPONSE,
        cmd=CMD_RESPONSE,
        ver2=asked.ver2,
        id=asked.id,
        codec=asked.codec,
        switch=asked.switch,
        status=status,
        class_name=class_name,
        headers=headers,
        content=content,
    )


def heartbeat(
    id: int,
    *,
    timeout_ms: int = 3000,
    codec: int = CODEC_HESSIAN,
    proto: int = 1,
    crc: bool = False,
) -> bytes:
    """The defaults are the bytes of sofa-bolt-node."""
    return frame(
        proto=2 if crc else proto,
        ver1=2 if crc else 1,
        cmd=CMD_HEARTBEAT,
        id=id,
        codec=codec,
        switch=SWITCH_CRC if crc else 0,
        timeout_ms=timeout_ms,
    )


def heartbeat_ack(
    id: int, *, codec: int = CODEC_HESSIAN, proto: int = 1, crc: bool = False
) -> bytes:
    return frame(
        proto=2 if crc else proto,
        ver1=2 if crc else 1,
        type=TYPE_RESPONSE,
        cmd=CMD_HEARTBEAT,
        id=id,
        codec=codec,
        switch=SWITCH_CRC if crc else 0,
    )


def goaway(id: int = 1, *, proto: int = 1) -> bytes:
    """What MOSN sends: a request that nobody answers, cmdcode 100, no payload."""
    return frame(proto=proto, cmd=CMD_GOAWAY, id=id)


# ----------------------------------------------------------------------------------------- reading


def header_size(data: bytes | memoryview) -> int:
    """Bytes of the fixed header that starts here; the least it can be while its type is unknown."""
    if not data:
        return 20
    at_type = data[0]  # byte 1 in v1, byte 2 in v2
    extra = 0 if data[0] == 1 else 2
    if len(data) <= at_type or data[at_type] == TYPE_RESPONSE:
        return 20 + extra
    return 22 + extra


def need(data: bytes | memoryview) -> int:
    """For a prefix that decodes to NEED_MORE: how many bytes from its start are surely needed."""
    size = header_size(data)
    return size if len(data) < size else _sizes(data)[3]


def _sizes(data: bytes | memoryview) -> tuple[int, int, int, int]:
    """classLen, headerLen, contentLen and the whole frame, of a complete legal fixed header."""
    head = header_size(data)
    class_len, header_len, content_len = struct.unpack_from(">HHI", data, head - 8)
    total = head + class_len + header_len + content_len
    if data[0] == 2 and data[1] == 2 and data[11] & SWITCH_CRC:
        total += 4
    return class_len, header_len, content_len, total


def decode(
    data: bytes | memoryview, frame_bytes_max: int = FRAME_BYTES_MAX
) -> Frame | NeedMore | Malformed:
    """The frame that `data` starts with; more may follow. The top says which error wins."""
    n = len(data)
    if n < 1:
        return NEED_MORE
    proto = data[0]
    if proto not in (1, 2):
        return Malformed("protocol", False)
    ver1 = switch = 0
    at = 1
    if proto == 2:
        if n < 2:
            return NEED_MORE
        ver1 = data[1]
        if ver1 not in (1, 2):
            return Malformed("protocol", False)
        at = 2
    if n < at + 1:
        return NEED_MORE
    type = data[at]
    if type not in (TYPE_RESPONSE, TYPE_REQUEST, TYPE_ONEWAY):
        return Malformed("type", False)
    if n < at + 3:
        return NEED_MORE
    cmd = struct.unpack_from(">H", data, at + 1)[0]
    kind = KINDS.get((type, cmd))
    if kind is None:
        return Malformed("command", False)
    if n < at + 9:
        return NEED_MORE
    ver2, id, codec = struct.unpack_from(">BIB", data, at + 3)
    at += 9
    if proto == 2:
        if n < at + 1:
            return NEED_MORE
        switch = data[at]
        if switch > 127:
            return Malformed("protocol", False)
        at += 1
    at += 2 if type == TYPE_RESPONSE else 4  # status or timeout, any value

    def refuse(reason: str) -> Malformed:
        if kind == REQUEST:
            return Malformed(reason, True, id, proto, ver1, codec, switch)
        return Malformed(reason, False)

    for offset in (at, at + 2):  # classLen, headerLen
        if n < offset + 2:
            return NEED_MORE
        if struct.unpack_from(">h", data, offset)[0] < 0:
            return refuse("length")
    if n < at + 8:
        return NEED_MORE
    if struct.unpack_from(">i", data, at + 4)[0] < 0:
        return refuse("length")
    class_len, header_len, content_len, total = _sizes(data)
    if total > frame_bytes_max:
        return refuse("too_large")
    if n < total:
        return NEED_MORE

    whole = bytes(data[:total])
    crc = None
    if proto == 2 and ver1 == 2 and switch & SWITCH_CRC:
        crc = struct.unpack_from(">I", whole, total - 4)[0]
        if crc != zlib.crc32(whole[:-4]):
            return Malformed("checksum", False)
    timeout_ms = status = 0
    if type == TYPE_RESPONSE:
        status = struct.unpack_from(">H", whole, at - 2)[0]
    else:
        timeout_ms = struct.unpack_from(">i", whole, at - 4)[0]
    at += 8
    class_name = whole[at : at + class_len]
    at += class_len
    headers = whole[at : at + header_len]
    at += header_len
    content = whole[at : at + content_len]
    return Frame(
        kind,
        proto,
        ver1,
        type,
        cmd,
        ver2,
        id,
        codec,
        switch,
        timeout_ms,
        status,
        class_name,
        headers,
        content,
        crc,
        whole,
    )


def frames(data: bytes, frame_bytes_max: int = FRAME_BYTES_MAX) -> list[Frame]:
    """All frames of a stream that must end with the last of them. Raises ValueError otherwise."""
    reader = FrameReader(frame_bytes_max)
    found = reader.feed(data)
    if reader.pending:
        raise ValueError(f"{len(reader.pending)} bytes after the last whole frame")
    return found


class FrameReader:
    """Bytes in, frames out: what a test peer keeps per connection."""

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self.pending = b""
        self.frame_bytes_max = frame_bytes_max

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes. Raises ValueError when the stream is malformed."""
        self.pending += data
        rest = memoryview(self.pending)
        found = []
        while rest:
            got = decode(rest, self.frame_bytes_max)
            if isinstance(got, Malformed):
                raise ValueError(f"malformed: {got}")
            if isinstance(got, NeedMore):
                break
            found.append(got)
            rest = rest[len(got.data) :]
        self.pending = bytes(rest)
        return found


# ------------------------------------------------------------------------------ what the mesh does


def patch_id(data: bytes, new_id: int) -> bytes:
    """The same frame with another id; its CRC is computed anew over everything."""
    got = decode(data, len(data))
    assert isinstance(got, Frame)
    at = 5 if got.proto == 1 else 6
    out = bytearray(got.data)
    struct.pack_into(">I", out, at, new_id)
    if got.crc is not None:
        struct.pack_into(">I", out, len(out) - 4, zlib.crc32(out[:-4]))
    return bytes(out)


def mesh_answer(asked: Frame | Malformed, cause: str, id: int | None = None) -> bytes:
    """The mesh's own answer: no payload; proto, ver1, codec and switch of the request, ver2 1."""
    return frame(
        proto=asked.proto,
        ver1=asked.ver1,
        type=TYPE_RESPONSE,
        cmd=CMD_RESPONSE,
        id=asked.id if id is None else id,
        codec=asked.codec,
        switch=asked.switch,
        status=STATUS_BY_CAUSE[cause],
    )


def mesh_heartbeat(id: int, dialect: int = 0) -> bytes:
    """The mesh's heartbeat towards an upstream, in that dialect (0 = v1, else ver1)."""
    return frame(
        proto=2 if dialect else 1,
        ver1=dialect or 1,
        cmd=CMD_HEARTBEAT,
        id=id,
        timeout_ms=3000,
    )


def mesh_heartbeat_ack(asked: Frame) -> bytes:
    """The mesh's answer to a heartbeat: status 0; proto, ver1, codec and switch copied, ver2 1."""
    return frame(
        proto=asked.proto,
        ver1=asked.ver1,
        type=TYPE_RESPONSE,
        cmd=CMD_HEARTBEAT,
        id=asked.id,
        codec=asked.codec,
        switch=asked.switch,
    )
