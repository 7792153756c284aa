"""The message mesh's frames: what is read of them, the forward, and the mesh's own answers.

What the twin can decide is compared in tests/differential; here stand the facts themselves.
"""

import struct
import zlib

import pytest

from fastmesh._ext import bolt as codec
from fastmesh._ext import push as native
from tests.reference import bolt
from tests.reference import push as twin
from tests.support import feed_three_ways, truncate_everywhere

DELIVER = {"fm.op": "deliver", "fm.topic": "orders", "fm.group": "g", "fm.id": "m1"}
VERSIONS = [{}, {"dialect": 1}, {"dialect": 2}, {"dialect": 2, "crc": True}]
TEXTS = ("topic", "group", "key", "colour", "lane", "version", "origin", "id")
DELIVERY = 4
SECTION_MAX = 0x7FFF


def one(data: bytes) -> bolt.Frame:
    (frame,) = bolt.frames(data, len(data))
    return frame


def request(headers: object, content: bytes = b"", **version: object) -> bytes:
    return twin.request(7, headers, content, **version)


def response(headers: object, **fields: object) -> bytes:
    return twin.response(one(request(DELIVER)), headers, **fields)


# ------------------------------------------------------------------------------------------ read


@pytest.mark.parametrize("op", [op.decode() for op in twin.OPS])
@pytest.mark.parametrize("oneway", [False, True])
def test_every_op(op: str, oneway: bool) -> None:
    frame = request({"a": "b", "fm.op": op}, oneway=oneway)
    said = native.read(frame)
    assert (said.op, said.result, said.idempotent, said.hop, said.retry_ms) == (op, None, 0, -1, 0)
    assert frame[said.op_at : said.op_at + len(op)] == op.encode()
    assert said[6:] == (None,) * 8


@pytest.mark.parametrize("result", [result.decode() for result in twin.RESULTS])
def test_every_result(result: str) -> None:
    said = native.read(response({"a": "b", "fm.result": result, "fm.id": "m1"}))
    assert (said.op, said.result, said.retry_ms, said.id) == (None, result, 0, b"m1")


@pytest.mark.parametrize("op", ["Deliver", "deliver ", "deliverx", "delive", "", "teleport"])
def test_another_op_is_named_so(op: str) -> None:
    assert native.read(request({"fm.op": op})).op == "other"


@pytest.mark.parametrize("result", ["Consumed", "consumedx", "", "no", "maybe"])
def test_another_result_is_named_so(result: str) -> None:
    assert native.read(response({"fm.result": result})).result == "other"


@pytest.mark.parametrize("name", TEXTS)
def test_every_text(name: str) -> None:
    position = native.Fields._fields.index(name)
    for value in ("x", "", "größe", "v" * 5000):
        said = native.read(request({"fm.op": "publish", f"fm.{name}": value}))
        assert said[position] == value.encode()
        assert [text for i, text in enumerate(said[6:], 6) if i != position] == [None] * 7
    for beside in (f"fm.{name}x", f"fm.{name[:-1]}", f"Fm.{name}", f"h.{name}", name):
        assert native.read(request({"fm.op": "publish", beside: "x"}))[position] is None


@pytest.mark.parametrize("name", TEXTS)
def test_the_first_one_wins_and_nulls_are_passed_over(name: str) -> None:
    key = f"fm.{name}"
    pairs = [(key, None), (None, key), ("fm.op", "publish"), (key, "1"), (key, "2")]
    said = native.read(request(pairs))
    assert getattr(said, name) == b"1"
    assert getattr(native.read(request([("fm.op", "publish"), (key, ""), (key, "2")])), name) == b""


def test_the_first_op_and_result_win() -> None:
    pairs = [("fm.op", None), ("fm.op", "check"), ("fm.op", "deliver")]
    assert native.read(request(pairs)).op == "check"
    pairs = [("fm.result", None), ("fm.result", "odd"), ("fm.result", "consumed")]
    assert native.read(response(pairs)).result == "other"


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("fm.hop", {"0": 0, "1": 1, "255": 255, "0000000007": 7}, ["256", "4294967296"]),
        ("fm.idempotent", {"0": 0, "1": 1, "01": 1}, ["2", "true"]),
    ],
)
def test_numbers_of_a_request(key: str, good: dict[str, int], bad: list[str]) -> None:
    name = key.removeprefix("fm.")
    for text, value in good.items():
        for more in ([], [(key, "bad")]):
            pairs = [("fm.op", "forward"), (key, text), *more]
            assert getattr(native.read(request(pairs)), name) == value
    for text in [*bad, "", "-1", "+1", " 1", "1 ", "1.0", "0x1", "a", "00000000001", "\u0661"]:
        for pairs in ([("fm.op", "forward"), (key, text)], [(key, text)]):
            with pytest.raises(ValueError, match="headers"):
                native.read(request(pairs))
        # Not a request's to say, so nobody minds:
        assert native.read(response([("fm.result", "consumed"), (key, text)])) is not None


def test_numbers_of_a_response() -> None:
    for text, value in {"0": 0, "100": 100, "86400000": 86_400_000, "0000000001": 1}.items():
        pairs = [("fm.retry_ms", text), ("fm.result", "later"), ("fm.retry_ms", "bad")]
        assert native.read(response(pairs)).retry_ms == value
    for text in ("86400001", "4294967296", "", "-1", "+1", "soon", "00000000001"):
        with pytest.raises(ValueError, match="headers"):
            native.read(response({"fm.result": "later", "fm.retry_ms": text}))
        assert native.read(request({"fm.op": "publish", "fm.retry_ms": text})) is not None


def test_the_class_decides_on_requests_and_not_on_responses() -> None:
    for name in (b"", b"fastmesh.push.v2", b"fastmesh.push.v", b"fastmesh.push.v1 ", b"x" * 16):
        assert native.read(request(DELIVER, class_name=name)) is None
        assert native.read(response({"fm.result": "later"}, class_name=name)).result == "later"


def test_what_is_no_frame_of_the_mesh() -> None:
    assert native.read(request({})) is None
    assert native.read(request({"fm.topic": "x", "fm.result": "consumed"})) is None
    assert native.read(response({"fm.op": "deliver", "fm.id": "m1"})) is None
    assert native.read(bolt.heartbeat(1)) is None
    beat = bolt.frame(cmd=0, class_name=twin.CLASS, headers=bolt.encode_headers(DELIVER))
    assert native.read(beat) is None
    goaway = bolt.frame(cmd=100, class_name=twin.CLASS, headers=bolt.encode_headers(DELIVER))
    assert native.read(goaway) is None


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00",
        b"\x00\x00\x00\x01k",
        b"\x00\x00\x00\x01k\x00\x00\x00\x05valu",
        b"\xff\xff\xff\xff",
        b"\xff\xff\xff\xfe\x00\x00\x00\x00",
        b"\x7f\xff\xff\xff\x00\x00\x00\x00",
    ],
)
def test_damage_anywhere_in_the_section_is_seen(damage: bytes) -> None:
    # Content follows, so that a walk past the section would find something.
    section = bolt.encode_headers(DELIVER)
    frame = bolt.frame(class_name=twin.CLASS, headers=section + damage, content=bytes(40))
    for call in (native.read, native.parse):
        with pytest.raises(ValueError, match="headers"):
            call(frame)
    answer = bolt.encode_headers({"fm.result": "consumed"}) + damage
    with pytest.raises(ValueError, match="headers"):
        native.read(bolt.frame(type=0, cmd=2, headers=answer))


def test_the_route_key_is_the_topic() -> None:
    assert (
        native.service(request([("fm.topic", None), ("fm.topic", "a"), ("fm.topic", "b")])) == b"a"
    )
    assert native.service(request({"service": "x"})) is None


# --------------------------------------------------------------------------------- parse and split


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_built_is_parsed(version: dict[str, object]) -> None:
    headers = {**DELIVER, "h.tenant": "größe", "empty": ""}
    for content in (b"", b"hello", bytes(range(256)) * 300):
        frame = native.request(9, headers, content, timeout_ms=3000, **version)
        assert frame == twin.request(9, headers, content, timeout_ms=3000, **version)
        got = native.parse(frame)
        assert got[:5] == ("request", 9, got.hint, 3000, 0)
        assert got[5:] == (headers, content, native.CLASS)
        answer = native.response(got.id, got.hint, {"fm.result": "consumed"}, content[:5])
        assert answer == twin.response(one(frame), {"fm.result": "consumed"}, content[:5])
        back = native.parse(answer)
        assert back == (
            "response",
            9,
            got.hint,
            0,
            0,
            {"fm.result": "consumed"},
            content[:5],
            native.CLASS,
        )


def test_whole_frames_come_out_of_any_pieces() -> None:
    frames = [native.request(i, DELIVER, b"x" * i, **v) for i, v in enumerate(VERSIONS)]
    frames += [twin.response(one(frames[-1]), {"fm.result": "later"}), bolt.heartbeat(1)]
    stream = b"".join(frames)
    for trailing in (b"", frames[0][:-1]):
        assert native.split(stream + trailing, 1 << 20) == (frames, len(stream))
        feed_three_ways(codec.scan, frames, trailing=trailing)
        rest, found = b"", []
        for i in range(len(stream)):  # byte by byte
            rest += stream[i : i + 1]
            more, consumed = native.split(bytearray(rest), 1 << 20)
            found += more
            rest = rest[consumed:]
        assert (found, rest) == (frames, b"")
    for frame in frames:
        truncate_everywhere(codec.scan, frame)
        for size in range(len(frame)):
            assert native.split(memoryview(frame)[:size], 1 << 20) == ([], 0)


def test_frames_before_a_malformed_one_come_out_first() -> None:
    good = native.request(1, DELIVER)
    frames, consumed = native.split(good + b"\x00" * 30, 1 << 20)
    assert (frames, consumed) == ([good], len(good))
    with pytest.raises(ValueError, match="frame: its first bytes are of no known version"):
        native.split(b"\x00" * 30, 1 << 20)
    with pytest.raises(ValueError, match="longer than the limit"):
        native.split(good, len(good) - 1)
    assert native.split(good, len(good)) == ([good], len(good))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "frame: 0 bytes are cut off; it has at least 20"),
        (request(DELIVER)[:-1], "cut off"),
        (request(DELIVER) + b"\x01\x02", "frame: 2 bytes too many"),
        (b"\x05" * 40, "no known version"),
        (bolt.frame(type=9), "type is unknown"),
        (bolt.frame(cmd=9), "command is unknown"),
        (bolt.frame(header_len=0x8000), "length is negative"),
        (bolt.frame(proto=2, ver1=2, switch=1, crc=1), "checksum is wrong"),
        (bolt.frame(headers=b"\0\0\0\1\xff\0\0\0\0"), r"headers: b'\\xff' is not UTF-8"),
        (bolt.frame(headers=b"\0\0\0\1k\0\0\0\1\xc3"), "is not UTF-8"),
    ],
)
def test_parse_says_what_is_wrong(frame: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.parse(frame)


def test_builders_refuse_what_does_not_fit() -> None:
    longest = {"k": "v" * (SECTION_MAX - 9)}
    assert native.parse(native.request(1, longest)).headers == longest
    too_long = {"k": "v" * (SECTION_MAX - 8)}
    for build in (lambda h: native.request(1, h), lambda h: native.response(1, 1, h)):
        with pytest.raises(ValueError, match="headers: 32768 bytes up to 'k'"):
            build(too_long)
        with pytest.raises(ValueError, match="headers: 'k': 5 is no text; it must be a str"):
            build({"k": 5})
    with pytest.raises(ValueError, match="dialect: 3 is unknown"):
        native.request(1, {}, dialect=3)
    with pytest.raises(ValueError, match="crc: dialect 1 has none"):
        native.request(1, {}, dialect=1, crc=True)
    with pytest.raises(ValueError, match="hint: 0x0 is of no frame"):
        native.response(1, 0, {})
    for id in (-1, 1 << 32):
        with pytest.raises(OverflowError):
            native.request(id, {})


# --------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256)) * 300])
def test_a_forward_is_the_delivery_with_two_pairs_in_front(
    version: dict[str, object], content: bytes
) -> None:
    pairs = [("a", None), ("fm.op", None), *DELIVER.items(), ("fm.op", "x"), ("h.größe", "ü")]
    frame = request(pairs, content, timeout_ms=30000, **version)
    forwarded = native.forward(frame, b"node-1")
    before, after = one(frame), one(forwarded)
    assert after.headers == bolt.encode_headers(
        [
            ("fm.hop", "1"),
            ("fm.origin", "node-1"),
            *pairs[:2],
            ("fm.op", "forward"),
            *pairs[3:],
        ]
    )
    assert after.content == content
    assert after[:12] == before[:12]  # kind, versions, id, codec, switch, timeout, status, class
    if before.crc is not None:
        assert struct.unpack(">I", forwarded[-4:])[0] == zlib.crc32(forwarded[:-4])
    said = native.read(forwarded)
    assert (said.op, said.hop, said.origin, said.topic) == ("forward", 1, b"node-1", b"orders")

    delivered = native.as_deliver(forwarded)
    assert native.read(delivered)[1:] == said[1:]
    assert one(delivered).headers == after.headers.replace(b"forward", b"deliver")
    assert one(delivered).content == content
    if before.crc is not None:
        assert struct.unpack(">I", delivered[-4:])[0] == zlib.crc32(delivered[:-4])


def test_what_a_delivery_says_of_hops_itself_is_left_out() -> None:
    pairs = [("fm.origin", "liar"), ("fm.hop", "7"), *DELIVER.items(), ("fm.hop", None)]
    pairs += [("fm.origin", "node-1"), ("fm.hop", "bad"), ("z", "")]
    kept = [("fm.op", "forward"), *list(DELIVER.items())[1:], ("fm.hop", None), ("z", "")]
    for version in VERSIONS:
        forwarded = one(native.forward(request(pairs, b"x", **version), b"n2"))
        assert forwarded.headers == bolt.encode_headers(
            [("fm.hop", "1"), ("fm.origin", "n2"), *kept]
        )
        assert forwarded.content == b"x"


def test_only_a_delivery_is_forwarded() -> None:
    for op in twin.OPS:
        got = native.forward(request({**DELIVER, "fm.op": op.decode()}), b"n2")
        assert (got is not None) == (op == b"deliver")
    forwarded = native.forward(request(DELIVER), b"n2")
    assert native.forward(forwarded, b"n3") is None
    with pytest.raises(ValueError, match="not a forward"):
        native.as_deliver(request(DELIVER))


def test_a_forward_fits_into_a_header_section_or_is_none() -> None:
    added = 15 + 17 + len(b"n2")
    for pairs in ([], [("fm.hop", "0")]):
        fixed = len(bolt.encode_headers([*DELIVER.items(), ("h.pad", "")]))
        room = SECTION_MAX - fixed - added
        for size, fits in ((room, True), (room + 1, False)):
            frame = request([*DELIVER.items(), *pairs, ("h.pad", "x" * size)], b"content")
            got = native.forward(frame, b"n2")
            assert (got is not None) == fits
            if got is not None:
                assert len(one(got).headers) == SECTION_MAX
                assert one(got).content == b"content"


def test_a_node_has_a_name_of_1_to_64_bytes() -> None:
    frame = request(DELIVER)
    assert native.forward(frame, b"") is None
    assert native.forward(frame, b"n" * 65) is None
    assert native.read(native.forward(frame, b"n" * 64)).origin == b"n" * 64


# --------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("cause", "client", "deliverer"),
    [
        ("no_route", ("reject", None), ("no_consumer", None)),
        ("no_endpoint", ("later", "1000"), ("later", "0")),
        ("overload", ("later", "100"), ("later", "100")),
        ("connect", ("later", "1000"), ("later", "0")),
        ("upstream_lost", 16, ("later", "0")),
        ("client_gone", 16, ("later", "0")),
        ("undecodable", ("reject", None), ("reject", None)),
        ("deadline", 7, ("later", "0")),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_own_answers(
    cause: str,
    client: int | tuple[str, str | None],
    deliverer: tuple[str, str | None],
    version: dict[str, object],
) -> None:
    asked = native.parse(request(DELIVER, **version))
    for hint, expected in ((asked.hint, client), (asked.hint | DELIVERY, deliverer)):
        data = native.answer(9, hint, cause)
        assert len(data) <= 256
        got = native.parse(data)
        assert (got.kind, got.id, got.hint) == ("response", 9, asked.hint)
        if isinstance(expected, int):
            # Nobody knows whether it happened, so no result is said.
            assert (got.status, got.headers, got.class_name) == (expected, {}, b"")
            continue
        assert (got.status, got.class_name, got.content) == (0, native.CLASS, b"")
        assert (got.headers["fm.result"], got.headers.get("fm.retry_ms")) == expected
        said = native.read(data)
        assert (said.result, said.retry_ms) == (expected[0], int(expected[1] or 0))


@pytest.mark.parametrize("result", [result.decode() for result in twin.RESULTS])
@pytest.mark.parametrize("reason", [None, b"", b"why not", b"x" * 128])
def test_an_answer_of_every_result(result: str, reason: bytes | None) -> None:
    for version in VERSIONS:
        asked = one(request(DELIVER, **version))
        hint = native.parse(asked.data).hint
        for retry_ms in (0, 9, 10, 86_400_000, 4_294_967_295):
            data = native.own_answer(7, hint, result, retry_ms, reason)
            assert data == twin.own_answer(asked, result, retry_ms, reason)
            assert len(data) <= 256


def test_a_longer_reason_is_cut() -> None:
    got = native.parse(native.own_answer(7, 2 | 2 << 8 | 1 << 24, "later", 4294967295, b"x" * 5000))
    assert got.headers["fm.reason"] == "x" * 128


# ------------------------------------------------------------------------------- the contract


def test_capsule() -> None:
    assert '"fastmesh.codec"' in repr(native.capsule())


def test_the_benchmark_loop_runs() -> None:
    assert native.bench(request(DELIVER), 100) > 0
    with pytest.raises(ValueError, match="not a push frame"):
        native.bench(request({}), 1)
