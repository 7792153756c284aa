"""What is said in a hand-over: golden bytes, hostile bytes, counts that are compared, versions."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest

from fastmesh import limits
from fastmesh.errors import HandoverError
from fastmesh.handover import wire
from fastmesh.handover.states import EVENTS, Side
from fastmesh.handover.wire import (
    Abort,
    Ack,
    Acked,
    Commit,
    Conns,
    End,
    Handed,
    Hello,
    Listener,
    Listeners,
    Prepared,
    Process,
    Ready,
    Received,
    Record,
    Refuse,
    Standing,
    State,
    check_descriptors,
    clip,
    decode,
    descriptors,
    encode,
    event_of,
    judge,
    negotiate,
    split,
)
from tests.fuzz.mutate import corpus, mutants

NONCE = "00112233445566778899aabbccddeeff"
SHA256 = "ab" * 32
HELLO = Hello((3, 4), "1.2.3", 4711, NONCE, "auto", 65536, 2, True)
ACK = Ack("move", 4, "1.2.2", 4700, NONCE, 10_000, 10_003, True)
LISTENERS = Listeners(
    (
        Listener("rpc", "engine", "127.0.0.1:12200", None),
        Listener("admin", "admin", "unix:/run/fm/admin.sock", (2049, 131)),
    ),
    last=True,
    lock=True,
    stdio=True,
)

# --- the frozen sub-protocol ----------------------------------------------------------------------

GOLDEN: list[tuple[Record, bytes, int, str]] = [
    (
        HELLO,
        b'{"type":"HELLO","state_versions":[3,4],"build":"1.2.3","pid":4711,'
        b'"nonce":"00112233445566778899aabbccddeeff","mode":"auto","nofile":65536,"threads":2,'
        b'"stdio":true,"magic":"fastmesh-handover","protocol":1}',
        1,
        "HELLO",
    ),
    (
        ACK,
        b'{"type":"ACK","mode":"move","state_version":4,"build":"1.2.2","pid":4700,'
        b'"nonce":"00112233445566778899aabbccddeeff","connections":10000,"descriptors":10003,'
        b'"fence":true}',
        1,
        "ACK.move",
    ),
    (
        Refuse("busy", "another hand-over is under way"),
        b'{"type":"REFUSE","code":"busy","reason":"another hand-over is under way"}',
        0,
        "REFUSE",
    ),
    (
        LISTENERS,
        b'{"type":"LISTENERS","listeners":[{"name":"rpc","kind":"engine",'
        b'"address":"127.0.0.1:12200","inode":null},{"name":"admin","kind":"admin",'
        b'"address":"unix:/run/fm/admin.sock","inode":[2049,131]}],"last":true,"lock":true,'
        b'"stdio":true}',
        5,
        "LISTENERS.last",
    ),
    (Prepared(), b'{"type":"PREPARED"}', 0, "PREPARED"),
    (Handed(), b'{"type":"HANDED"}', 0, "HANDED"),
    (Abort("no \u2713"), '{"type":"ABORT","reason":"no \u2713"}'.encode(), 0, "ABORT"),
]
"""These bytes are what every version understands: they are never changed, only added to."""

OTHERS: list[tuple[Record, int, str]] = [
    (dataclasses.replace(ACK, mode="drain", state_version=0), 1, "ACK.drain"),
    (dataclasses.replace(LISTENERS, last=False, lock=False, stdio=False), 2, "LISTENERS"),
    (Process(1234, SHA256), 1, "PROCESS"),
    (State(0, 2**31, SHA256, 2400), 1, "STATE"),
    (Conns(1, 240, 240), 240, "CONNS"),
    (Acked(1, 480), 0, "ACKED"),
    (End(2, 4800, 1500, SHA256), 1, "END"),
    (Ready(), 0, "READY"),
    (Commit(), 0, "COMMIT"),
]
RECORDS = [record for record, *_ in GOLDEN] + [record for record, *_ in OTHERS]


@pytest.mark.parametrize(("record", "data", "fds", "event"), GOLDEN)
def test_golden_bytes(record: Record, data: bytes, fds: int, event: str) -> None:
    assert encode(record) == data
    assert decode(data) == record
    assert (descriptors(record), event_of(record)) == (fds, event)


def test_what_is_frozen_has_golden_bytes() -> None:
    assert {wire.NAMES[type(record)] for record, *_ in GOLDEN} == wire.FROZEN


@pytest.mark.parametrize(("record", "fds", "event"), OTHERS)
def test_the_others_come_back_as_they_were(record: Record, fds: int, event: str) -> None:
    assert decode(encode(record)) == record
    assert (descriptors(record), event_of(record)) == (fds, event)


def test_every_record_is_here() -> None:
    assert {type(record) for record in RECORDS} == set(wire.NAMES)
    events = {event for side in ("giver", "taker") for event in EVENTS[side_of(side)]}
    assert {event_of(record) for record in RECORDS} <= events


def side_of(name: str) -> Side:
    return "giver" if name == "giver" else "taker"


@pytest.mark.parametrize("record", RECORDS)
def test_what_a_later_version_adds_is_ignored(record: Record) -> None:
    tree = json.loads(encode(record)) | {"later": {"x": [1, None]}, "later_too": 2**70}
    assert decode(json.dumps(tree).encode()) == record


def test_words_of_a_later_version_are_taken() -> None:
    refused = decode(b'{"type":"REFUSE","code":"a_new_one","reason":"because"}')
    assert refused == Refuse("a_new_one", "because")
    tree = json.loads(encode(LISTENERS))
    tree["listeners"][0]["kind"] = "quic"
    found = decode(json.dumps(tree).encode())
    assert isinstance(found, Listeners)
    assert found.listeners[0].kind == "quic"


# --- hostile bytes --------------------------------------------------------------------------------

WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**31,
    2**63,
    2**64,
    10**4000,
    1.5,
    1e308,
    "",
    "x" * 2000,
    "\x00",
    "a\nb",
    "1",
    [],
    [1],
    [1, 2, 3],
    [[[]]],
    {},
    {"a": 1},
)
MISSING = object()


def allowed(record: type, key: str, value: Any) -> bool:
    """Values among WRONG that are right for this field."""
    if value is MISSING:
        return False
    if key in ("last", "lock", "stdio", "fence"):
        return value is True
    if key in ("build", "reason"):
        return value in ("", "1")
    if key == "code" or (record is Listener and key in ("name", "kind", "address")):
        return value == "1"
    if key == "inode":
        return value is None
    if key == "listeners":
        return value == []
    if key == "bytes" and record is State:
        return value == 2**31
    return key == "nofile" and value == 2**31


@pytest.mark.parametrize("record", RECORDS)
def test_every_field_with_every_wrong_value(record: Record) -> None:
    name = wire.NAMES[type(record)]
    tree = json.loads(encode(record))
    for key in tree.keys() - {"type"}:
        for value in (*WRONG, MISSING):
            spoilt = {k: v for k, v in tree.items() if k != key or value is not MISSING}
            if value is not MISSING:
                spoilt[key] = value
            check_spoilt(spoilt, type(record), key, value, f"{name}.{key}")


def test_every_field_of_a_listener_with_every_wrong_value() -> None:
    tree = json.loads(encode(LISTENERS))
    for key in tree["listeners"][1]:
        for value in (*WRONG, MISSING):
            one = {
                k: v for k, v in tree["listeners"][1].items() if k != key or value is not MISSING
            }
            if value is not MISSING:
                one[key] = value
            spoilt = {**tree, "listeners": [tree["listeners"][0], one]}
            check_spoilt(spoilt, Listener, key, value, f"LISTENERS.listeners[1].{key}")


def check_spoilt(tree: Any, record: type, key: str, value: Any, field: str) -> None:
    data = dumps(tree).encode()
    if allowed(record, key, value):
        decode(data)
        return
    with pytest.raises(HandoverError) as caught:
        decode(data)
    error = caught.value
    assert len(str(error)) < 1000
    if value != 10**4000:  # Python itself refuses to read that
        assert error.field.startswith(field), (field, value, str(error))
    assert error.message


def dumps(tree: Any) -> str:
    """JSON with numbers of any length, which json.dumps refuses to write."""
    if isinstance(tree, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{dumps(v)}" for k, v in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(dumps, tree)) + "]"
    if isinstance(tree, int) and not isinstance(tree, bool) and tree.bit_length() > 1000:
        return "1" + "0" * 4999
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("data", "field", "says"),
    [
        (b"", "record", "one JSON document"),
        (b"\xff\xfe", "record", "one JSON document"),
        (b"null", "record", "a JSON object"),
        (b"[]", "record", "a JSON object"),
        (b"{}", "type", "one of HELLO, ACK"),
        (b'{"type":5}', "type", "one of HELLO, ACK"),
        (b'{"type":"hello"}', "type", "one of HELLO, ACK"),
        (b'{"type":"READY"} {"type":"READY"}', "record", "one JSON document"),
        (b'{"type":"READY","type":"COMMIT"}', "record", "one JSON document"),
        (b'{"type":"READY","x":NaN}', "record", "one JSON document"),
        (b'{"type":"READY","x":' + b"[" * 50_000, "record", "nested"),
        (b'{"type":"READY","x":' + b'{"a":' * 10_000, "record", "nested"),
        (b'{"type":"READY","x":"' + b"x" * 70_000 + b'"}', "record", "at most 61440 bytes"),
        (b'{"type":"ABORT","reason":"\\ud800"}', "ABORT.reason", "control characters"),
        (b'{"type":"ABORT","reason":"a\\u001b[31m"}', "ABORT.reason", "control characters"),
    ],
)
def test_what_is_no_record(data: bytes, field: str, says: str) -> None:
    with pytest.raises(HandoverError) as caught:
        decode(data)
    assert caught.value.field == field
    assert says in caught.value.message
    assert len(str(caught.value)) < 1000


def test_random_mutations() -> None:
    """For any bytes: a record that can be sent again, or HandoverError, never anything else."""
    from tests.fuzz import fuzz_handover

    seed = random.SystemRandom().getrandbits(32)
    outcomes = set()
    for data in mutants(list(corpus("handover").values()), seed, 4000, fuzz_handover.repair):
        try:
            outcomes.add(fuzz_handover.check(data))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {data!r}") from error
    assert "error" in outcomes
    assert len(outcomes) > 5


# --- what we would send ---------------------------------------------------------------------------


def test_nothing_out_of_bounds_is_sent() -> None:
    with pytest.raises(HandoverError, match=r"CONNS.count \(241\) must be a whole number 1..240"):
        encode(Conns(0, 0, 241))
    with pytest.raises(HandoverError, match=r"HELLO\.nonce"):
        encode(dataclasses.replace(HELLO, nonce="xyz"))
    with pytest.raises(HandoverError, match=r"listeners\[0\].name"):
        encode(Listeners((Listener("", "engine", "a:1", None),), True, False, False))


def test_reasons_are_cut_to_what_fits() -> None:
    found = decode(encode(Abort("line\nline\t\x1b[0m \ud800" + "x" * 5000)))
    assert isinstance(found, Abort)
    assert len(found.reason) == limits.HANDOVER_REASON_CHARS_MAX
    assert found.reason.startswith("line line  [0m  x")
    assert found.reason.endswith("...")
    assert clip("as it is") == "as it is"


def test_many_listeners_fit_into_records() -> None:
    many = [
        Listener("\u00e4" * 60 + f"{n:04}", "engine", "unix:/" + "\u20ac" * 100, (2**63, 2**64 - 1))
        for n in range(limits.HANDOVER_LISTENERS_MAX)
    ]
    records = split(many, lock=True, stdio=True)
    assert [r.last for r in records] == [False] * (len(records) - 1) + [True]
    assert [(r.lock, r.stdio) for r in records[:-1]] == [(False, False)] * (len(records) - 1)
    assert sum(
        (r.listeners for r in map(decode, map(encode, records)) if isinstance(r, Listeners)), ()
    ) == tuple(many)
    books = Received(nonce=NONCE, nofile=1024)
    for record in records:
        books.take(record, descriptors(record))
    assert split([], lock=True, stdio=False) == [Listeners((), True, True, False)]


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", RECORDS)
def test_descriptors_are_counted(record: Record) -> None:
    right = descriptors(record)
    check_descriptors(record, right)
    for wrong in {0, right - 1, right + 1, 253} - {right, -1}:
        with pytest.raises(HandoverError, match=f"must come with {right}"):
            check_descriptors(record, wrong)
    with pytest.raises(HandoverError, match="cut off"):
        check_descriptors(record, right, truncated=True)


def books(*records: Record, nofile: int = 10_000) -> Received:
    found = Received(nonce=NONCE, nofile=nofile)
    for record in records:
        found.take(record, descriptors(record))
    return found


S0, S1 = State(0, 10, SHA256, 3), State(1, 10, SHA256, 0)


def test_an_honest_giver_gets_through() -> None:
    found = books(
        ACK,
        LISTENERS,
        Process(1, SHA256),
        S0,
        S1,
        Conns(0, 0, 2),
        Conns(0, 2, 1),
        End(2, 3, 1, SHA256),
    )
    assert found.came == {0: 3, 1: 0}
    assert found.names == {"rpc", "admin"}


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ((dataclasses.replace(ACK, nonce="0" * 32),), "ACK.nonce"),
        ((LISTENERS, LISTENERS), "LISTENERS.name (rpc) must not come twice"),
        ((Listeners((), False, False, False),), "must be at least 1"),
        ((dataclasses.replace(LISTENERS, last=False),), "LISTENERS.last (False) must be true"),
        ((S0, S0), "STATE.thread (0) must not come twice"),
        ((Conns(0, 0, 1),), "CONNS.thread (0) must be one whose STATE came"),
        ((S0, Conns(0, 1, 1)), "CONNS.first (1) must be 0"),
        ((S0, Conns(0, 0, 2), Conns(0, 0, 1)), "CONNS.first (0) must be 2"),
        ((S0, Conns(0, 0, 4)), "CONNS.count (4) must be at most 3"),
        ((S0, Conns(0, 0, 3), Conns(0, 3, 1)), "CONNS.count (1) must be at most 0"),
        ((S0, End(1, 3, 1, SHA256)), "0 descriptors of thread 0"),
        ((S0, Conns(0, 0, 3), End(2, 3, 1, SHA256)), "END.threads (2)"),
        ((S0, Conns(0, 0, 3), End(1, 4, 1, SHA256)), "END.descriptors (4) must be 3"),
        ((S1, End(1, 0, 1, SHA256)), "END.threads (1)"),
        ((State(0, 1, SHA256, 9999),), "STATE.descriptors (9999) must be at most"),
        (
            (State(0, 1, SHA256, 9000), State(1, 1, SHA256, 1000)),
            "STATE.descriptors (10000) must be at most",
        ),
    ],
)
def test_a_giver_that_lies_about_counts(records: tuple[Record, ...], says: str) -> None:
    with pytest.raises(HandoverError) as caught:
        books(*records)
    assert says in str(caught.value)
    books(*records[:-1])


def test_a_giver_that_sends_listeners_for_ever() -> None:
    many = [
        Listeners((Listener(f"l{n}", "engine", "a:1", None),), False, False, False)
        for n in range(limits.HANDOVER_LISTENERS_MAX + 1)
    ]
    found = books(*many[:-1])
    with pytest.raises(HandoverError, match="must be at most 72"):
        found.take(many[-1], 1)


# --- versions and refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("giver", "taker", "written"),
    [
        ((4, 4), (4, 4), 4),
        ((3, 4), (4, 5), 4),  # an upgrade
        ((4, 5), (3, 4), 5),  # and back: the older one takes the fields that it knows
        ((3, 4), (5, 6), None),
        ((5, 6), (3, 4), None),
        ((5, 5), (4, 4), None),  # the newer one says that the older cannot read it
        ((4, 6), (3, 4), None),
        ((1, 1), (1, 9), 1),
    ],
)
def test_negotiate(giver: tuple[int, int], taker: tuple[int, int], written: int | None) -> None:
    assert negotiate(giver, taker) == written


STANDING = Standing("serving", False, 1000, 1000, 4711, (3, 4), 500)


@pytest.mark.parametrize(
    ("hello", "standing", "code"),
    [
        ({}, {}, "move"),
        ({"mode": "move"}, {}, "move"),
        ({"mode": "drain"}, {}, "drain"),
        ({}, {"peer_pid": 0}, "move"),
        ({"state_versions": (6, 7)}, {}, "drain"),
        ({"state_versions": (6, 7), "mode": "move"}, {}, "version"),
        ({"protocol": 2}, {}, "version"),
        ({}, {"peer_uid": 0}, "user"),
        ({}, {"peer_uid": 1001}, "user"),
        ({}, {"peer_pid": 4712}, "user"),
        ({}, {"phase": "draining"}, "draining"),
        ({}, {"phase": "stopping"}, "stopping"),
        ({}, {"phase": "starting"}, "stopping"),
        ({}, {"busy": True}, "busy"),
        ({"nofile": 627}, {}, "limits"),
        ({"nofile": 628}, {}, "move"),
        ({"nofile": 64, "mode": "drain"}, {}, "drain"),
    ],
)
def test_judge(hello: dict[str, Any], standing: dict[str, Any], code: str) -> None:
    found = judge(dataclasses.replace(HELLO, **hello), dataclasses.replace(STANDING, **standing))
    assert (found.code if isinstance(found, Refuse) else found) == code
    if isinstance(found, Refuse):
        assert found.reason
        assert decode(encode(found)) == found
