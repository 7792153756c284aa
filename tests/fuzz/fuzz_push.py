"""For any bytes the native helpers of the message mesh and their slow twin say the same.

That is: which frames a buffer holds, what is read of each and what of it is refused, the forward of
a delivery and the delivery of a forward, and the answers of the mesh. What the codec itself says of
frames is the business of fuzz_bolt.
"""

from fastmesh._ext import push as native
from tests.fuzz import fuzz_bolt, run
from tests.reference import bolt
from tests.reference import push as twin

FRAME_BYTES_MAX = fuzz_bolt.FRAME_BYTES_MAX
NODE = b"node-1"
DELIVERY = 4

repair = fuzz_bolt.repair


def check(data: bytes, frame_bytes_max: int = FRAME_BYTES_MAX) -> str:
    """Raises AssertionError where the two disagree; else what the first frame is to the mesh.

    "request", "response", "none", "headers" (a section or number that is refused), or the reason
    why it is no whole frame.
    """
    said = bolt.decode(data, frame_bytes_max)
    _check_split(data, frame_bytes_max)
    if isinstance(said, bolt.NeedMore):
        _refused(native.parse, data)
        return "need_more"
    if isinstance(said, bolt.Malformed):
        if said.reason != "too_large":  # that is the reader's limit, and parse() has none
            _refused(native.parse, data)
        return said.reason
    if len(said.data) != len(data):
        _refused(native.parse, data)
    _check_parse(said)
    return _check_read(said)


def _refused(call: object, *arguments: object) -> None:
    try:
        got = call(*arguments)  # type: ignore[operator]
    except ValueError:
        return
    raise AssertionError(f"{got} instead of a ValueError")


def _check_split(data: bytes, frame_bytes_max: int) -> None:
    try:
        frames = twin.split(data, frame_bytes_max)
    except ValueError:
        _refused(native.split, data, frame_bytes_max)
        return
    assert native.split(data, frame_bytes_max) == frames


def _check_parse(said: bolt.Frame) -> None:
    try:
        headers = twin.headers_of(said)
    except ValueError:
        _refused(native.parse, said.data)
        return
    got = native.parse(said.data)
    assert got == (
        said.kind,
        said.id,
        fuzz_bolt.hint_of(said),
        said.timeout_ms,
        said.status,
        headers,
        said.content,
        said.class_name,
    ), (got, said)
    if said.kind in (bolt.REQUEST, bolt.RESPONSE):
        _check_built(got, said)


def _check_built(got: native.Push, said: bolt.Frame) -> None:
    """What was parsed can be built again, as far as our own frames can say it."""
    section = twin.encode((k.encode(), v.encode()) for k, v in got.headers.items())
    expected = bolt.frame(
        proto=said.proto,
        ver1=said.ver1,
        type=said.type,
        cmd=said.cmd,
        id=said.id,
        codec=said.codec if said.kind == bolt.RESPONSE else twin.CODEC,
        switch=said.switch,
        timeout_ms=said.timeout_ms,
        status=said.status,
        class_name=twin.CLASS,
        headers=section,
        content=said.content,
    )
    if said.kind == bolt.RESPONSE:
        assert (
            native.response(got.id, got.hint, got.headers, got.content, status=got.status)
            == expected
        )
    elif said.switch in (0, 1) and (said.switch == 0 or said.ver1 == 2):
        dialect = 0 if said.proto == 1 else said.ver1
        made = native.request(
            got.id,
            got.headers,
            got.content,
            timeout_ms=got.timeout_ms,
            dialect=dialect,
            crc=said.switch == 1,
        )
        assert made == expected


def _check_read(said: bolt.Frame) -> str:
    try:
        fields = twin.read(said)
    except ValueError:
        _refused(native.read, said.data)
        return "headers"
    got = native.read(said.data)
    assert got == fields, (got, fields)
    if fields is None:
        return "none"
    if said.kind == bolt.RESPONSE:
        return "response"
    assert native.service(said.data) == fields.topic
    for node in (NODE, b"n" * twin.NODE_BYTES_MAX, b"", b"n" * (twin.NODE_BYTES_MAX + 1)):
        forwarded = native.forward(said.data, node)
        assert forwarded == twin.forward(said, node)
        if forwarded is None:
            continue
        (sent,) = bolt.frames(forwarded, len(forwarded))
        assert sent.content == said.content
        assert native.read(forwarded)[:4] == ("forward", None, fields.idempotent, 1)
        assert native.as_deliver(forwarded) == twin.as_deliver(sent)
        assert native.forward(forwarded, node) is None
    if fields.op == "forward":
        assert native.as_deliver(said.data) == twin.as_deliver(said)
    if said.kind == bolt.REQUEST:
        hint = fuzz_bolt.hint_of(said)
        for cause in ("no_route", "overload", "client_gone"):
            assert native.answer(said.id, hint, cause) == twin.answer(said, cause)
            assert native.answer(said.id, hint | DELIVERY, cause) == twin.answer(
                said, cause, delivery=True
            )
    return "request"


def TestOneInput(data: bytes) -> None:
    check(data)


if __name__ == "__main__":
    raise SystemExit(run.main("push", TestOneInput, repair))
