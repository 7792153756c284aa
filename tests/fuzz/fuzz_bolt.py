"""For any bytes the native Bolt codec and its slow twin say the same and read no byte past the end.

"The same" is all of it: outcome and reason, how many bytes are needed, every field of a whole
frame, its route key, the frame with another id, the answers that the mesh would make. Run it under
`make asan` for the second half.
"""

import zlib

from fastmesh._ext import bolt as native
from tests.fuzz import run
from tests.reference import bolt as twin

FRAME_BYTES_MAX = 70_000  # above three legal 16-bit lengths, below what a mutated length says
OTHER_ID = 0x7FFE0101
NOTHING = (0,) * 9  # from `hint` on: an unfinished frame tells nothing but its need


def hint_of(said: twin.Frame | twin.Malformed) -> int:
    return said.proto | said.ver1 << 8 | said.codec << 16 | said.switch << 24


def check(data: bytes, frame_bytes_max: int = FRAME_BYTES_MAX) -> str:
    """Raises AssertionError where the two disagree; else the outcome, or why it is malformed."""
    got = native.scan(data, frame_bytes_max)
    said = twin.decode(data, frame_bytes_max)
    if isinstance(said, twin.NeedMore):
        assert got == ("need_more", None, 0, twin.need(data), 0, None, False, *NOTHING), got
        return "need_more"
    if isinstance(said, twin.Malformed):
        assert got[:7] == (
            "malformed",
            "request" if said.answerable else None,
            said.id,
            0,
            0,
            said.reason,
            said.answerable,
        ), (got, said)
        assert got.hint == (hint_of(said) if said.answerable else 0), (got, said)
        if said.answerable:
            made = native.answer(got.id, got.hint, "undecodable")
            assert made == twin.mesh_answer(said, "undecodable")
        return said.reason
    _check_frame(data, got, said)
    return "ok"


def _check_frame(data: bytes, got: native.Scan, said: twin.Frame) -> None:
    head = len(said.data) - len(said.class_name) - len(said.headers) - len(said.content)
    if said.crc is not None:
        head -= 4
    headers_at = head + len(said.class_name)
    assert got == (
        "ok",
        said.kind,
        said.id,
        0,
        len(said.data),
        None,
        False,
        hint_of(said),
        said.timeout_ms,
        said.status,
        5 if said.proto == 1 else 6,
        head,
        len(said.class_name),
        headers_at,
        len(said.headers),
        0 if said.crc is None else len(said.data) - 4,
    ), (got, said)

    try:
        service = twin.service_of(said)
    except twin.HeaderError:
        service = ValueError
    try:
        found = native.service(data)
    except ValueError:
        found = ValueError
    assert found == service, (found, service)

    changed = native.patch(data, OTHER_ID)
    assert changed == twin.patch_id(said.data, OTHER_ID)
    assert native.patch(changed, said.id) == said.data
    if said.kind == "heartbeat":
        assert native.heartbeat_ack(data) == twin.mesh_heartbeat_ack(said)
    elif said.kind == "request":
        for cause in ("overload", "deadline"):
            assert native.answer(said.id, got.hint, cause) == twin.mesh_answer(said, cause)


def repair(data: bytes) -> bytes:
    """The same bytes with the CRC that they should have, where they are a whole frame but for
    it."""
    said = twin.decode(data, FRAME_BYTES_MAX)
    if not isinstance(said, twin.Malformed) or said.reason != "checksum":
        return data
    at = twin.need(data) - 4
    return data[:at] + zlib.crc32(data[:at]).to_bytes(4, "big") + data[at + 4 :]


def TestOneInput(data: bytes) -> None:
    check(data)


if __name__ == "__main__":
    raise SystemExit(run.main("bolt", TestOneInput, repair))
