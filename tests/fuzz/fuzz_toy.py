"""For any bytes the native toy codec and its slow twin say the same, whole or in parts.

That holds by id and by order; and a connection whose state was saved and loaded between two parts
goes on as if nothing had happened.
"""

from tests.fuzz import run
from tests.reference import toy as twin
from tests.toy import toy as native

FRAME_BYTES_MAX = 2000
OTHER_IDS = (b"7", b"4294967295", b"123456789012345")
NUMBER_MAX = 0xFFFFFFFF


def check(data: bytes, frame_bytes_max: int = FRAME_BYTES_MAX) -> str:
    """Raises AssertionError where the two disagree; else what the whole way by id made of it."""
    for by_order in (False, True):
        way = "by_order" if by_order else "by_id"
        said = twin.decode(data, frame_bytes_max, by_order=by_order)
        connection = native.Connection(way)
        _agree(connection, connection.scan(data, frame_bytes_max), said, by_order)
        if not by_order:
            outcome = said.reason if isinstance(said, twin.Malformed) else type(said).__name__
        _check_parts(data, frame_bytes_max, way, by_order)
    return outcome


def _check_parts(data: bytes, frame_bytes_max: int, way: str, by_order: bool) -> None:
    body = twin.Body()
    connection = native.Connection(way)
    rest = data
    while True:
        was_under_way = body.kind
        said = twin.decode(rest, frame_bytes_max, by_order=by_order, body=body)
        got = connection.scan(rest, frame_bytes_max, True)
        _agree(connection, got, said, by_order)
        if not isinstance(said, twin.Part):
            break
        assert was_under_way is None or not said.first
        rest = rest[len(said.data) :]
        moved = native.Connection(way)
        assert moved.load(connection.save())
        assert moved.save() == connection.save()
        connection = moved


def _agree(
    connection: native.Connection,
    got: native.Scan,
    said: twin.Part | twin.Malformed | twin.NeedMore,
    by_order: bool,
) -> None:
    if isinstance(said, twin.NeedMore):
        assert (got.outcome, got.need) == ("need_more", said.need), (got, said)
        return
    number = int(said.id or b"0")
    expected_id = (number if number <= NUMBER_MAX else 0, said.id)
    if isinstance(said, twin.Malformed):
        if said.answerable:
            assert (got.id, got.text) == expected_id, (got, said)
        assert (got.outcome, got.error, got.answerable) == (
            "malformed",
            said.reason,
            said.answerable,
        ), (got, said)
        return
    assert (got.outcome, got.kind, got.size) == ("ok", said.kind, len(said.data)), (got, said)
    assert (got.id, got.text) == expected_id, (got, said)
    assert (got.first, got.last) == (said.first, said.last), (got, said)
    assert (got.timeout_ms, got.status) == (said.timeout_ms, said.status), (got, said)
    assert connection.service() == said.service
    for key in (b"lane", b"", b"k"):
        try:
            value = twin.header_of(said, key)
        except twin.HeaderError:
            value = ValueError
        try:
            found = connection.header(key)
        except ValueError:
            found = ValueError
        assert found == value, (key, found, value)
    for id in OTHER_IDS:
        segments = connection.patch(text=id)
        assert len(segments) == (3 if said.id else 1)
        assert b"".join(segments) == twin.patch_id(said, id)
    if said.kind == "heartbeat":
        own = None if by_order else said.id.decode()
        assert connection.heartbeat_ack() == twin.beat(own, "back")


def TestOneInput(data: bytes) -> None:
    check(data)


if __name__ == "__main__":
    raise SystemExit(run.main("toy", TestOneInput))
