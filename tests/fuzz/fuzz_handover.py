"""Whatever bytes a process of a hand-over sends, they are a record that could be sent again as it
was understood, or HandoverError, never any other error."""

import contextlib
import json

from fastmesh import limits
from fastmesh.errors import HandoverError
from fastmesh.handover import wire
from fastmesh.handover.states import EVENTS
from tests.fuzz import run


def check(data: bytes) -> str:
    """The name of the record, or "error"."""
    try:
        record = wire.decode(data)
    except HandoverError as wrong:
        return _refused(wrong)
    assert len(data) <= limits.HANDOVER_RECORD_BYTES_MAX
    again = wire.encode(record)
    assert wire.decode(again) == record
    assert 0 <= wire.descriptors(record) <= limits.HANDOVER_RECORD_FDS_MAX
    assert wire.event_of(record) in EVENTS["giver"] + EVENTS["taker"]
    books = wire.Received(nonce="0" * wire.NONCE_CHARS, nofile=1024)
    with contextlib.suppress(HandoverError):
        books.take(record, wire.descriptors(record))
    return wire.NAMES[type(record)]


def _refused(wrong: HandoverError) -> str:
    assert wrong.field
    assert wrong.message
    assert len(str(wrong)) < 1500
    str(wrong).encode()
    return "error"


def repair(data: bytes) -> bytes:
    """Well-formed JSON again, where that needs no more than what stands around it."""
    start, end = data.find(b"{"), data.rfind(b"}")
    whole = data[start : end + 1] if 0 <= start < end else b"{" + data + b"}"
    try:
        json.loads(whole)
    except (ValueError, RecursionError):
        return data
    return whole


def TestOneInput(data: bytes) -> None:
    check(data)


if __name__ == "__main__":
    raise SystemExit(run.main("handover", TestOneInput, repair))
