"""The native Bolt codec against what real peers put on the wire, written out by hand.

What the twin can decide is compared in tests/differential; here stand the facts themselves.
"""

import struct
import zlib

import pytest

from fastmesh._ext import bolt as native
from tests.reference import bolt as twin
from tests.support import cut, feed_three_ways, truncate_everywhere

# Bytes of sofa-bolt-node (1..5) and anthunder (6, 7).
GOLDEN = {
    1: bytes.fromhex("0101000001000000070100000bb80000000000000000"),
    2: bytes.fromhex("0100000001000000070100000000000000000000"),
    3: bytes.fromhex("02010100000100000007010000000bb80000000000000000"),
    4: bytes.fromhex("02020100000100000007010100000bb8000000000000000087629fc5"),
    5: bytes.fromhex("02020000000100000007010100000000000000000000c24327a9"),
    6: bytes.fromhex("0101000001") + bytes.fromhex("00000007") + b"\x0b" + bytes(12),
    7: bytes.fromhex("0100000001") + bytes.fromhex("00000007") + b"\x0b" + bytes(10),
}


# ------------------------------------------------------------------------------- golden vectors


@pytest.mark.parametrize(
    ("number", "kind", "size"),
    [
        (1, "heartbeat", 22),
        (2, "heartbeat_ack", 20),
        (3, "heartbeat", 24),
        (4, "heartbeat", 28),
        (5, "heartbeat_ack", 26),
        (6, "heartbeat", 22),
        (7, "heartbeat_ack", 20),
    ],
)
def test_golden_vector(number: int, kind: str, size: int) -> None:
    got = native.scan(GOLDEN[number])
    assert (got.outcome, got.kind, got.id, got.size) == ("ok", kind, 7, size)
    truncate_everywhere(native.scan, GOLDEN[number])


def test_golden_header_map() -> None:
    section = bytes.fromhex("00000001610000000162")
    assert twin.encode_headers({"a": "b"}) == section
    frame = twin.request(1, headers=section)
    assert native.header(frame, b"a") == b"b"
    assert native.header(frame, b"A") is None


@pytest.mark.parametrize(("beat", "ack"), [(1, 2), (4, 5), (6, 7)])
def test_heartbeats_are_acked_as_real_peers_ack_them(beat: int, ack: int) -> None:
    assert native.heartbeat_ack(GOLDEN[beat]) == GOLDEN[ack]


def test_ack_of_a_v2_heartbeat_without_crc() -> None:
    assert native.heartbeat_ack(GOLDEN[3]) == bytes.fromhex(
        "02010000000100000007010000000000000000000000"
    )


def test_our_heartbeat_is_that_of_a_real_client() -> None:
    assert native.heartbeat(7) == GOLDEN[1]
    assert native.scan(native.heartbeat(0x7FFFFFFF)).id == 0x7FFFFFFF


def test_feeding_golden_frames_in_pieces() -> None:
    feed_three_ways(native.scan, list(GOLDEN.values()), trailing=GOLDEN[4][:-1])


# ------------------------------------------------------------------------------------- the kinds

LEGAL = {
    (1, 1): "request",
    (2, 1): "oneway",
    (0, 2): "response",
    (1, 0): "heartbeat",
    (0, 0): "heartbeat_ack",
    (1, 100): "goaway",
    (2, 100): "goaway",
}


@pytest.mark.parametrize("proto", [1, 2])
def test_every_type_and_command(proto: int) -> None:
    for type in range(256):
        for cmd in (0, 1, 2, 3, 99, 100, 101, 255, 256, 257, 512, 25600, 65535):
            got = native.scan(twin.frame(proto=proto, type=type, cmd=cmd, id=5))
            if (type, cmd) in LEGAL:
                assert (got.outcome, got.kind, got.id) == ("ok", LEGAL[type, cmd], 5)
            else:
                error = "command" if type <= 2 else "type"
                assert (got.outcome, got.error) == ("malformed", error), (type, cmd)
                assert not got.answerable


def test_any_version_of_the_command_and_any_codec_is_carried() -> None:
    for value in range(256):
        got = native.scan(twin.frame(ver2=value, codec=255 - value))
        assert got.outcome == "ok"


def test_timeout_is_signed_and_status_is_not() -> None:
    for timeout_ms in (-1, 0, 3000, -(1 << 31), (1 << 31) - 1):
        assert native.scan(twin.request(1, timeout_ms=timeout_ms)).timeout_ms == timeout_ms
    got = native.scan(twin.response(1, status=0xFFFF))
    assert (got.status, got.timeout_ms) == (0xFFFF, 0)


# --------------------------------------------------------------------- refused as soon as seen


def refused_at(frame: bytes, frame_bytes_max: int = twin.FRAME_BYTES_MAX) -> tuple[int, str | None]:
    """After how many bytes a frame is malformed, and why; it stays so with more of them."""
    for size in range(len(frame) + 1):
        got = native.scan(frame[:size], frame_bytes_max)
        assert got.outcome != "ok"
        if got.outcome == "malformed":
            for more in range(size, len(frame) + 1):
                assert native.scan(frame[:more], frame_bytes_max) == got
            return size, got.error
    raise AssertionError("never refused")


@pytest.mark.parametrize(
    ("frame", "at", "error"),
    [
        (b"\x00" + bytes(30), 1, "protocol"),
        (b"\x03" + bytes(30), 1, "protocol"),
        (twin.frame(proto=2, ver1=0), 2, "protocol"),
        (twin.frame(proto=2, ver1=3), 2, "protocol"),
        (twin.frame(type=3), 2, "type"),
        (twin.frame(proto=2, type=3), 3, "type"),
        (twin.frame(cmd=3), 4, "command"),
        (twin.frame(proto=2, cmd=3), 5, "command"),
        (twin.frame(proto=2, switch=128), 12, "protocol"),
        (twin.frame(class_len=0x8000), 16, "length"),
        (twin.frame(header_len=0x8000), 18, "length"),
        (twin.frame(content_len=0x80000000), 22, "length"),
        (twin.frame(content_len=0x7FFFFFFF), 22, "too_large"),
        (twin.frame(type=0, cmd=2, class_len=0xFFFF), 14, "length"),
        (twin.frame(type=0, cmd=2, header_len=0xFFFF), 16, "length"),
        (twin.frame(type=0, cmd=2, content_len=0xFFFFFFFF), 20, "length"),
        (twin.frame(proto=2, class_len=0x8000), 18, "length"),
        (twin.frame(proto=2, header_len=0x8000), 20, "length"),
        (twin.frame(proto=2, content_len=0x7FFFFFFF), 24, "too_large"),
        (twin.frame(proto=2, ver1=2, switch=1, crc=1), 28, "checksum"),
    ],
)
def test_refused_at_the_first_byte_that_shows_it(frame: bytes, at: int, error: str) -> None:
    assert refused_at(frame) == (at, error)


@pytest.mark.parametrize(
    ("start", "who"),
    [
        (bytes.fromhex("1603010200010001fc0303"), "a TLS hello"),
        (b"GET / HTTP/1.1\r\n", "HTTP"),
        (b"PRI * HTTP/2.0\r\n", "HTTP/2"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "SSH"),
        (b"AMQP\x00\x00\x09\x01", "AMQP"),
        (b"\x00\x00\x00\xd4\x00\x00\x00\xb8{", "RocketMQ"),
        (b"\n", "a line feed"),
    ],
)
def test_another_protocol_is_refused_at_its_first_byte(start: bytes, who: str) -> None:
    assert refused_at(start) == (1, "protocol"), who


def test_no_bytes_at_all_are_a_legal_prefix() -> None:
    got = native.scan(b"")
    assert (got.outcome, got.need) == ("need_more", 20)


# ------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("kind", ["v1", "v2", "crc"])
@pytest.mark.parametrize("field", ["class_len", "header_len", "content_len"])
def test_lengths_of_16_and_32_bits(kind: str, field: str) -> None:
    versions = {"v1": {}, "v2": {"proto": 2}, "crc": {"proto": 2, "ver1": 2, "switch": 1}}[kind]
    signed = 1 << (31 if field == "content_len" else 15)
    values = [0, 1, signed - 1, signed, signed + 1, 2 * signed - 1]
    for value in values:
        frame = twin.frame(id=9, **versions, **{field: value})[: 22 if kind == "v1" else 24]
        got = native.scan(frame, 0xFFFFFFFF)
        if value >= signed:
            assert (got.outcome, got.error) == ("malformed", "length"), value
            assert (got.answerable, got.kind, got.id) == (True, "request", 9)
        elif value or kind == "crc":
            total = len(frame) + value + (4 if kind == "crc" else 0)
            assert (got.outcome, got.need) == ("need_more", total), value
        else:
            assert got.outcome == "ok"


def test_the_sum_of_three_lengths_does_not_overflow() -> None:
    frame = twin.frame(id=9, class_len=0x7FFF, header_len=0x7FFF, content_len=0x7FFFFFFF)
    got = native.scan(frame, 0x7FFFFFFF)
    assert (got.error, got.answerable, got.id) == ("too_large", True, 9)
    assert native.scan(frame, 0xFFFFFFFF).need == 22 + 0x7FFF * 2 + 0x7FFFFFFF


@pytest.mark.parametrize("versions", [{}, {"proto": 2}, {"crc": True}])
def test_the_limit_counts_the_whole_frame(versions: dict[str, object]) -> None:
    frame = twin.request(1, "a:1.0", b"x" * 100, **versions)
    assert native.scan(frame, len(frame)).outcome == "ok"
    assert native.scan(frame, len(frame) - 1).error == "too_large"


@pytest.mark.parametrize(
    ("frame", "answerable"),
    [
        (twin.frame(type=1, cmd=1, class_len=0x8000), True),
        (twin.frame(type=2, cmd=1, class_len=0x8000), False),
        (twin.frame(type=0, cmd=2, class_len=0x8000), False),
        (twin.frame(type=1, cmd=0, class_len=0x8000), False),
        (twin.frame(type=1, cmd=100, class_len=0x8000), False),
    ],
)
def test_only_a_two_way_request_can_be_told(frame: bytes, answerable: bool) -> None:
    got = native.scan(frame)
    assert (got.error, got.answerable) == ("length", answerable)
    assert (got.kind is not None) == answerable


def test_a_frame_smuggled_behind_a_negative_length_never_comes_out() -> None:
    # Java reads -1 and finds the second frame at once; who reads 65535 sees one long frame.
    smuggled = twin.request(99, "com.example.Secret:1.0")
    for field in ("class_len", "header_len"):
        stream = twin.request(1, "a:1.0") + twin.frame(id=2, **{field: 0xFFFF}) + smuggled
        with pytest.raises(ValueError, match="malformed after 1 frames"):
            cut(native.scan, [stream])


# ----------------------------------------------------------------------------------------- CRC


def test_trailer_only_with_ver1_2_and_bit_0() -> None:
    for ver1 in (1, 2):
        for switch in range(128):
            frame = twin.frame(proto=2, ver1=ver1, switch=switch, content=b"body")
            got = native.scan(frame)
            trailer = ver1 == 2 and switch & 1
            assert got.outcome == "ok"
            assert got.size == len(frame) == 28 + (4 if trailer else 0)
            assert got.checksum_at == (28 if trailer else 0)


def test_v1_has_no_switch_byte() -> None:
    # Byte 11 of a v1 request is in the middle of its timeout.
    frame = twin.request(1, "a:1.0", timeout_ms=0x01010101)
    assert native.scan(frame).checksum_at == 0


def test_every_flipped_bit_fails_the_checksum_or_the_header() -> None:
    frame = twin.request(7, "a:1.0", b"some content", crc=True)
    for bit in range(len(frame) * 8):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        got = native.scan(bytes(flipped))
        # A flipped ver1 or switch makes a legal frame of another length; nothing else does.
        legal = bit // 8 in (1, 11) and got.checksum_at == 0
        assert got.outcome != "ok" or legal, bit
        if got.error == "checksum":
            assert (got.answerable, got.kind, got.id) == (False, None, 0)


# ------------------------------------------------------------------------------------- patching


@pytest.mark.parametrize("versions", [{}, {"proto": 2}, {"crc": True}])
@pytest.mark.parametrize("new_id", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678])
def test_patch_changes_the_id_and_the_checksum_only(
    versions: dict[str, object], new_id: int
) -> None:
    frame = twin.request(7, "a:1.0", bytes(range(256)) * 3, **versions)
    changed = native.patch(frame, new_id)
    (said,) = twin.frames(changed)
    assert said.id == new_id
    at = 5 if said.proto == 1 else 6
    body = slice(at + 4, -4 if said.crc is not None else None)
    assert (changed[:at], changed[body]) == (frame[:at], frame[body])
    if said.crc is not None:
        assert struct.unpack(">I", changed[-4:])[0] == zlib.crc32(changed[:-4])
    assert native.patch(changed, 7) == frame


def test_patch_of_a_large_response_with_crc() -> None:
    frame = twin.response(7, b"x" * (3 << 20), crc=True)
    assert native.patch(frame, 0x01020304) == twin.response(0x01020304, b"x" * (3 << 20), crc=True)


# ------------------------------------------------------------------------------------- headers


def with_headers(*pairs: tuple[str | None, str | None]) -> bytes:
    return twin.request(1, headers=twin.encode_headers(pairs))


@pytest.mark.parametrize(
    ("frame", "service"),
    [
        (with_headers(), None),
        (with_headers(("service", "a:1.0")), b"a:1.0"),
        (with_headers(("k", "v"), ("service", "a:1.0")), b"a:1.0"),
        (with_headers(("service", "a:1.0"), ("service", "b:1.0")), b"a:1.0"),
        (with_headers(("sofa_head_target_service", "t:1.0")), b"t:1.0"),
        (with_headers(("sofa_head_target_service", "t:1.0"), ("service", "a:1.0")), b"a:1.0"),
        (
            with_headers(("sofa_head_target_service", "t"), ("sofa_head_target_service", "u")),
            b"t",
        ),
        (with_headers(("Service", "a:1.0"), ("SERVICE", "b")), None),
        (with_headers(("service ", "a"), ("servic", "b"), ("k", "service")), None),
        (with_headers(("service", "")), b""),
        (with_headers(("service", None)), None),
        (with_headers(("service", None), ("service", "a:1.0")), b"a:1.0"),
        # A null key is followed by its value all the same: it must not be taken for a key.
        (with_headers((None, "service"), ("service", "a:1.0")), b"a:1.0"),
        (with_headers((None, None), ("service", "a:1.0")), b"a:1.0"),
        (with_headers(("", ""), ("service", "a:1.0")), b"a:1.0"),
        (with_headers(("service", "größe:1.0")), "größe:1.0".encode()),
    ],
)
def test_route_key(frame: bytes, service: bytes | None) -> None:
    assert native.service(frame) == service


@pytest.mark.parametrize(
    "section",
    [
        b"\x00",
        b"\x00\x00\x00",
        b"\x00\x00\x00\x01",
        b"\x00\x00\x00\x01k",
        b"\x00\x00\x00\x01k\x00\x00\x00",
        b"\x00\x00\x00\x01k\x00\x00\x00\x05valu",
        b"\xff\xff\xff\xff",
        b"\xff\xff\xff\xfe\x00\x00\x00\x00",
        b"\x80\x00\x00\x00\x00\x00\x00\x00",
        b"\x7f\xff\xff\xff\x00\x00\x00\x00",
    ],
)
def test_header_section_that_does_not_parse(section: bytes) -> None:
    # Content follows, so that a walk past the section would find something.
    frame = twin.request(1, headers=section, content=b"\x00\x00\x00\x01v" * 4)
    assert native.scan(frame).outcome == "ok"
    with pytest.raises(ValueError, match="headers"):
        native.service(frame)
    with pytest.raises(ValueError, match="headers"):
        native.header(frame, b"lane")


def test_the_walk_stops_at_what_it_looks_for() -> None:
    good = twin.encode_headers({"service": "a:1.0", "lane": "blue"})
    frame = twin.request(1, headers=good + b"\x00\x00")
    assert native.service(frame) == b"a:1.0"
    assert native.header(frame, b"lane") == b"blue"
    with pytest.raises(ValueError, match="headers"):
        native.header(frame, b"tier")
    # The second choice must know that no `service` follows.
    target = twin.encode_headers({"sofa_head_target_service": "t:1.0"})
    with pytest.raises(ValueError, match="headers"):
        native.service(twin.request(1, headers=target + b"\x00\x00"))


# ------------------------------------------------------------------------ answers of the mesh

STATUS = {
    "no_route": 6,
    "no_endpoint": 6,
    "connect": 6,
    "overload": 4,
    "deadline": 7,
    "upstream_lost": 16,
    "client_gone": 16,
    "undecodable": 9,
}


@pytest.mark.parametrize("cause", STATUS)
def test_answer_to_a_v1_request(cause: str) -> None:
    asked = native.scan(twin.request(0x01020304, "a:1.0", codec=11))
    assert native.answer(asked.id, asked.hint, cause) == bytes.fromhex(
        f"010000020101020304 0b {STATUS[cause]:04x} 0000 0000 00000000"
    )


@pytest.mark.parametrize("cause", STATUS)
def test_answer_to_a_v2_request_with_crc(cause: str) -> None:
    asked = native.scan(twin.request(0x01020304, "a:1.0", crc=True))
    made = native.answer(asked.id, asked.hint, cause)
    assert made[:-4] == bytes.fromhex(
        f"0202000002010102030401 01 {STATUS[cause]:04x} 0000 0000 00000000"
    )
    assert struct.unpack(">I", made[-4:])[0] == zlib.crc32(made[:-4])


def test_answer_copies_ver1_and_switch_without_a_trailer() -> None:
    # What a Java client sends before its version is agreed: the switch on, and no CRC.
    asked = native.scan(twin.frame(proto=2, ver1=1, switch=1, id=5))
    assert native.answer(5, asked.hint, "overload") == bytes.fromhex(
        "02010000020100000005 01 01 0004 0000 0000 00000000"
    )


def test_answer_to_a_request_that_could_not_be_read() -> None:
    asked = native.scan(twin.frame(proto=2, ver1=2, switch=1, id=5, class_len=0x8000))
    made = native.answer(asked.id, asked.hint, "undecodable")
    (said,) = twin.frames(made)
    assert (said.kind, said.id, said.status, said.switch) == ("response", 5, 9, 1)


# ------------------------------------------------------------------------------- the contract


def test_capsule_and_state() -> None:
    assert '"fastmesh.codec"' in repr(native.capsule())
    assert native.state_survives()


def test_the_benchmark_loop_runs() -> None:
    for versions in ({}, {"proto": 2}, {"crc": True}):
        assert native.bench(twin.request(1, "a:1.0", b"x" * 256, **versions), 100) > 0
    with pytest.raises(ValueError, match="not a whole frame"):
        native.bench(b"\x01", 1)
