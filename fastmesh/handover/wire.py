"""What the two processes of a hand-over say: one record of a SOCK_SEQPACKET socket is one JSON
document with "type"; descriptors travel beside it. docs/handover.md has the order.

Nothing that the other side says is believed: every field has a type and bounds, every count is
compared with what came, and nothing is allocated for a number that was announced.
Unknown keys are ignored. HELLO, ACK, REFUSE, LISTENERS, PREPARED, HANDED and ABORT are the frozen
sub-protocol, which versions too far apart for each other's state speak too: their keys are never
removed and never change their meaning.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from fastmesh import limits
from fastmesh.document import shown
from fastmesh.errors import HandoverError
from fastmesh.handover.states import Event

PROTOCOL: Final = 1
MAGIC: Final = "fastmesh-handover"
NONCE_CHARS: Final = 32
"""128 bits in lower-case hexadecimal, drawn anew by each taker."""

Mode = Literal["auto", "move", "drain"]
Code = Literal[
    "busy",  # another hand-over is under way
    "draining",
    "stopping",
    "version",  # too far apart, and the taker did not want to drain
    "user",  # SO_PEERCRED says somebody else than HELLO does
    "limits",  # the taker could not hold the descriptors
    "configuration",  # this process has nothing that could be handed over
    "protocol",  # no HELLO, or nothing in time
]
Kind = Literal["engine", "admin", "registration"]


@dataclass(frozen=True, slots=True)
class Hello:
    """taker -> giver, with the taker's pidfd."""

    state_versions: tuple[int, int]
    """The oldest state it can read, and its own."""
    build: str
    pid: int
    nonce: str
    mode: Mode
    nofile: int
    """Its RLIMIT_NOFILE."""
    threads: int
    """Engine threads that it will have."""
    stdio: bool
    """It wants stdout and stderr of the giver, because nobody reads its own."""
    magic: str = MAGIC
    protocol: int = PROTOCOL


@dataclass(frozen=True, slots=True)
class Ack:
    """giver -> taker, with the giver's pidfd."""

    mode: Literal["move", "drain"]
    state_version: int
    """Of the state that will be sent; 0 in mode drain."""
    build: str
    pid: int
    nonce: str
    """The taker's."""
    connections: int
    descriptors: int
    """About how many will come; the taker makes room, and counts for itself."""
    fence: bool
    """The giver can signal the taker by its pidfd. If not, the taker never adopts connections
    without COMMIT (`Machine.can_signal`)."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """giver -> taker: the giver is untouched."""

    code: str
    """A `Code`; a later version may know more."""
    reason: str


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket of LISTENERS."""

    name: str
    kind: str
    """A `Kind`; what a taker does not know it closes."""
    address: str
    """As configured."""
    inode: tuple[int, int] | None
    """(device, inode) of a UNIX socket's path: whoever owns the socket removes the path, if it is
    still this one."""


@dataclass(frozen=True, slots=True)
class Listeners:
    """giver -> taker, with one descriptor per listener, in this order; the last record has the lock
    of the state directory and then stdout and stderr, if it says so."""

    listeners: tuple[Listener, ...]
    last: bool
    lock: bool
    stdio: bool


@dataclass(frozen=True, slots=True)
class Process:
    """giver -> taker, with a sealed memfd: the process document, to compile with."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """taker -> giver: configuration good, new listeners bound, snapshot compiled."""


@dataclass(frozen=True, slots=True)
class State:
    """giver -> taker, with a sealed memfd: the world of one engine thread."""

    thread: int
    bytes: int
    sha256: str
    descriptors: int
    """That follow in CONNS of this thread."""


@dataclass(frozen=True, slots=True)
class Conns:
    """giver -> taker, with `count` descriptors, the ones from `first` on."""

    thread: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Acked:
    """taker -> giver: descriptors below `next` were taken out of the socket."""

    thread: int
    next: int


@dataclass(frozen=True, slots=True)
class End:
    """giver -> taker, with the sealed memfd of the final process document."""

    threads: int
    descriptors: int
    """Of all threads."""
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Ready:
    """taker -> giver: everything is verified and loaded."""


@dataclass(frozen=True, slots=True)
class Commit:
    """giver -> taker: everything is the taker's."""


@dataclass(frozen=True, slots=True)
class Handed:
    """giver -> taker, mode drain: the listeners are the taker's."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Either: this hand-over is over, and whoever says so owns what it owned before."""

    reason: str


Record: TypeAlias = (
    Hello
    | Ack
    | Refuse
    | Listeners
    | Process
    | Prepared
    | State
    | Conns
    | Acked
    | End
    | Ready
    | Commit
    | Handed
    | Abort
)

# --- fields ---------------------------------------------------------------------------------------

Check = Callable[[str, Any], Any]
"""(where, value) -> the value as the record has it; raises HandoverError."""
U31: Final = 2**31 - 1
U63: Final = 2**63 - 1


def integer(low: int, high: int) -> Check:
    def check(where: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise HandoverError(where, shown(value), f"must be a whole number {low}..{high}")
        return value

    return check


def text(most: int, least: int = 0) -> Check:
    def check(where: str, value: Any) -> str:
        if not isinstance(value, str) or not least <= len(value) <= most:
            raise HandoverError(where, shown(value), f"must be text of {least}..{most} characters")
        if any("\ud800" <= char <= "\udfff" or char < " " for char in value):
            raise HandoverError(where, shown(value), "must be text without control characters")
        return value

    return check


def hexadecimal(chars: int) -> Check:
    def check(where: str, value: Any) -> str:
        if (
            not isinstance(value, str)
            or len(value) != chars
            or any(char not in "0123456789abcdef" for char in value)
        ):
            raise HandoverError(where, shown(value), f"must be {chars} of 0-9a-f")
        return value

    return check


def word(*words: str) -> Check:
    def check(where: str, value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise HandoverError(where, shown(value), "must be " + " or ".join(words))
        return value

    return check


def flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise HandoverError(where, shown(value), "must be true or false")
    return value


def pair(low: int, high: int) -> Check:
    each = integer(low, high)

    def check(where: str, value: Any) -> tuple[int, int]:
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise HandoverError(where, shown(value), "must be two whole numbers")
        return each(f"{where}[0]", value[0]), each(f"{where}[1]", value[1])

    return check


def versions(where: str, value: Any) -> tuple[int, int]:
    low, high = pair(1, limits.HANDOVER_STATE_VERSION_MAX)(where, value)
    if low > high:
        raise HandoverError(where, f"{low}, {high}", "must be the lower one first")
    return low, high


def inode(where: str, value: Any) -> tuple[int, int] | None:
    return None if value is None else pair(0, 2**64 - 1)(where, value)


def listeners(where: str, value: Any) -> tuple[Listener, ...]:
    most = limits.HANDOVER_LISTENERS_MAX
    if not isinstance(value, (list, tuple)) or len(value) > most:
        raise HandoverError(where, shown(value), f"must be a list of at most {most} listeners")
    return tuple(
        item if isinstance(item, Listener) else _build(Listener, f"{where}[{index}]", item)
        for index, item in enumerate(value)
    )


_PID: Final = integer(1, U31)
_BUILD: Final = text(128)
_NONCE: Final = hexadecimal(NONCE_CHARS)
_SHA256: Final = hexadecimal(64)
_THREAD: Final = integer(0, limits.ENGINE_THREADS_MAX - 1)
_DESCRIPTORS: Final = integer(0, limits.HANDOVER_CONNECTIONS_MAX)
_REASON: Final = text(limits.HANDOVER_REASON_CHARS_MAX)

_FIELDS: Final[Mapping[type, Mapping[str, Check]]] = {
    Hello: {
        "magic": word(MAGIC),
        "protocol": integer(1, U31),
        "state_versions": versions,
        "build": _BUILD,
        "pid": _PID,
        "nonce": _NONCE,
        "mode": word("auto", "move", "drain"),
        "nofile": integer(1, U63),
        "threads": integer(1, limits.ENGINE_THREADS_MAX),
        "stdio": flag,
    },
    Ack: {
        "mode": word("move", "drain"),
        "state_version": integer(0, limits.HANDOVER_STATE_VERSION_MAX),
        "build": _BUILD,
        "pid": _PID,
        "nonce": _NONCE,
        "connections": _DESCRIPTORS,
        "descriptors": _DESCRIPTORS,
        "fence": flag,
    },
    Refuse: {"code": text(32, 1), "reason": _REASON},
    Listener: {
        "name": text(limits.NAME_CHARS_MAX, 1),
        "kind": text(32, 1),
        "address": text(512, 1),
        "inode": inode,
    },
    Listeners: {"listeners": listeners, "last": flag, "lock": flag, "stdio": flag},
    Process: {"bytes": integer(0, limits.HANDOVER_DOCUMENT_BYTES_MAX), "sha256": _SHA256},
    Prepared: {},
    State: {
        "thread": _THREAD,
        "bytes": integer(0, limits.HANDOVER_STATE_BYTES_MAX),
        "sha256": _SHA256,
        "descriptors": _DESCRIPTORS,
    },
    Conns: {
        "thread": _THREAD,
        "first": _DESCRIPTORS,
        "count": integer(1, limits.HANDOVER_RECORD_FDS_MAX),
    },
    Acked: {"thread": _THREAD, "next": _DESCRIPTORS},
    End: {
        "threads": integer(1, limits.ENGINE_THREADS_MAX),
        "descriptors": _DESCRIPTORS,
        "bytes": integer(0, limits.HANDOVER_DOCUMENT_BYTES_MAX),
        "sha256": _SHA256,
    },
    Ready: {},
    Commit: {},
    Handed: {},
    Abort: {"reason": _REASON},
}

TYPES: Final[Mapping[str, type[Record]]] = {
    "HELLO": Hello,
    "ACK": Ack,
    "REFUSE": Refuse,
    "LISTENERS": Listeners,
    "PROCESS": Process,
    "PREPARED": Prepared,
    "STATE": State,
    "CONNS": Conns,
    "ACKED": Acked,
    "END": End,
    "READY": Ready,
    "COMMIT": Commit,
    "HANDED": Handed,
    "ABORT": Abort,
}
NAMES: Final[Mapping[type[Record], str]] = {record: name for name, record in TYPES.items()}
FROZEN: Final = frozenset({"HELLO", "ACK", "REFUSE", "LISTENERS", "PREPARED", "HANDED", "ABORT"})
"""Understood by every version. The golden bytes in tests/handover/test_wire.py keep it so."""


# --- bytes ----------------------------------------------------------------------------------------


def encode(record: Record) -> bytes:
    """The record as it is sent. Raises HandoverError when a field is out of its bounds, or when it
    is too long (split LISTENERS with `split`). Reasons are cut to what fits."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    if "reason" in values:
        values["reason"] = clip(values["reason"])
    name = NAMES[type(record)]
    for key, check in _FIELDS[type(record)].items():
        check(f"{name}.{key}", values[key])
    if isinstance(record, Listeners):
        values["listeners"] = [dataclasses.asdict(one) for one in record.listeners]
        for index, one in enumerate(values["listeners"]):
            _build(Listener, f"LISTENERS.listeners[{index}]", one)
    data = json.dumps({"type": name, **values}, ensure_ascii=False, separators=(",", ":")).encode()
    if len(data) > limits.HANDOVER_RECORD_BYTES_MAX:
        raise HandoverError(
            name, f"{len(data)} bytes", f"must be at most {limits.HANDOVER_RECORD_BYTES_MAX} bytes"
        )
    return data


def decode(data: bytes) -> Record:
    """The record in `data`. Raises HandoverError for whatever else stands there."""
    if len(data) > limits.HANDOVER_RECORD_BYTES_MAX:
        raise HandoverError(
            "record",
            f"{len(data)} bytes",
            f"must be at most {limits.HANDOVER_RECORD_BYTES_MAX} bytes",
        )
    try:
        tree = json.loads(data.decode(), object_pairs_hook=_no_doubles, parse_constant=_no_constant)
    except RecursionError:
        raise HandoverError("record", None, "is nested too deep") from None
    except ValueError as error:  # no UTF-8, no JSON, thousands of digits, a doubled key
        raise HandoverError("record", shown(str(error)), "must be one JSON document") from None
    if not isinstance(tree, dict):
        raise HandoverError("record", shown(tree), "must be a JSON object")
    name = tree.get("type")
    if not isinstance(name, str) or name not in TYPES:
        raise HandoverError("type", shown(name), "must be one of " + ", ".join(TYPES))
    record: Record = _build(TYPES[name], name, tree)
    return record


def _build(record: type[Any], where: str, tree: Any) -> Any:
    if not isinstance(tree, dict):
        raise HandoverError(where, shown(tree), "must be a JSON object")
    values = {}
    for key, check in _FIELDS[record].items():
        if key not in tree:
            raise HandoverError(f"{where}.{key}", None, "is missing")
        values[key] = check(f"{where}.{key}", tree[key])
    return record(**values)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def clip(reason: str) -> str:
    """A reason as it can be sent: one line, without control characters, not too long."""
    plain = "".join(
        char if char >= " " and not "\ud800" <= char <= "\udfff" else " " for char in reason
    )
    most = limits.HANDOVER_REASON_CHARS_MAX
    return plain if len(plain) <= most else plain[: most - 3] + "..."


def split(
    listeners: Sequence[Listener], *, lock: bool, stdio: bool, most: int = limits.LISTENERS_MAX
) -> list[Listeners]:
    """LISTENERS records for all of these, `most` in each; the last has lock and stdio."""
    parts = [tuple(listeners[at : at + most]) for at in range(0, len(listeners), most)] or [()]
    last = len(parts) - 1
    return [
        Listeners(part, last=at == last, lock=lock and at == last, stdio=stdio and at == last)
        for at, part in enumerate(parts)
    ]


# --- meaning --------------------------------------------------------------------------------------


def event_of(record: Record) -> Event:
    """The event of the table (states.py) that this record is."""
    name = NAMES[type(record)]
    if isinstance(record, Ack):
        return "ACK.move" if record.mode == "move" else "ACK.drain"
    if isinstance(record, Listeners) and record.last:
        return "LISTENERS.last"
    return name  # type: ignore[return-value]


def descriptors(record: Record) -> int:
    """How many descriptors belong to it."""
    if isinstance(record, Conns):
        return record.count
    if isinstance(record, Listeners):
        return len(record.listeners) + record.lock + 2 * record.stdio
    return int(isinstance(record, (Hello, Ack, Process, State, End)))


def state_versions() -> tuple[int, int]:
    """The oldest state that this build reads, and the one that it writes."""
    from fastmesh._ext.engine import STATE_VERSION, STATE_VERSION_MIN

    return max(1, STATE_VERSION_MIN), STATE_VERSION


def negotiate(giver: tuple[int, int], taker: tuple[int, int]) -> int | None:
    """The version in which the giver's state is written, None when the taker cannot read it.

    A giver writes its own version. A taker reads what it says it reads, and one version more: every
    record in a blob has its own length, so that it takes the fields that it knows. Whether the
    newer one still allows that it says by its lower bound.
    """
    written = giver[1]
    if taker[0] <= written <= taker[1]:
        return written
    if written == taker[1] + 1 and giver[0] <= taker[1]:
        return written
    return None


@dataclass(frozen=True, slots=True)
class Standing:
    """What the giver knows when HELLO comes."""

    phase: str
    """serving | draining | stopping."""
    busy: bool
    """Another hand-over is under way."""
    uid: int
    """The own effective one."""
    peer_uid: int
    peer_pid: int
    """By SO_PEERCRED; 0 is a process of another PID namespace."""
    state_versions: tuple[int, int]
    descriptors: int
    """Of connections and listeners, to be handed over."""


def judge(hello: Hello, standing: Standing) -> Literal["move", "drain"] | Refuse:
    """How this HELLO is answered."""
    if standing.peer_uid != standing.uid:
        return Refuse("user", f"user {standing.peer_uid} is not user {standing.uid}")
    if standing.peer_pid not in (0, hello.pid):
        return Refuse("user", f"process {standing.peer_pid} says that it is {hello.pid}")
    if hello.protocol != PROTOCOL:
        return Refuse("version", f"protocol {hello.protocol} is not {PROTOCOL}")
    if standing.phase != "serving":
        code: Code = "draining" if standing.phase == "draining" else "stopping"
        return Refuse(code, f"this process is {standing.phase}: start another one when it is gone")
    if standing.busy:
        return Refuse("busy", "another hand-over is under way: ask again in a second")
    if hello.mode == "drain":
        return "drain"
    if negotiate(standing.state_versions, hello.state_versions) is None:
        if hello.mode == "auto":
            return "drain"
        low, high = hello.state_versions
        return Refuse(
            "version",
            f"state of version {standing.state_versions[1]} cannot be read by {low}..{high}:"
            " upgrade in smaller steps, or let it drain",
        )
    needed = standing.descriptors + limits.FDS_RESERVED
    if hello.nofile < needed:
        return Refuse(
            "limits", f"the descriptor limit {hello.nofile} must be at least {needed}: raise it"
        )
    return "move"


class Received:
    """The taker's books: what came is compared with what was said, record by record.

    `take` raises HandoverError; what it lets through is in order, within bounds and unrepeated.
    """

    def __init__(self, *, nonce: str, nofile: int) -> None:
        self._nonce = nonce
        self._room = nofile - limits.FDS_RESERVED
        self.names: set[str] = set()
        self.listeners = 0
        self.states: dict[int, State] = {}
        self.came: dict[int, int] = {}
        """Descriptors of connections, by thread."""

    def take(self, record: Record, fds: int, *, truncated: bool = False) -> None:
        """`fds`: how many descriptors came with it; `truncated`: MSG_CTRUNC or MSG_TRUNC is set."""
        check_descriptors(record, fds, truncated=truncated)
        if isinstance(record, Ack) and record.nonce != self._nonce:
            raise HandoverError("ACK.nonce", record.nonce, "must be the one of HELLO")
        if isinstance(record, Listeners):
            self._listeners(record)
        elif isinstance(record, State):
            if record.thread in self.states:
                raise HandoverError("STATE.thread", record.thread, "must not come twice")
            self.states[record.thread] = record
            self.came[record.thread] = 0
            self._fits("STATE.descriptors", sum(s.descriptors for s in self.states.values()))
        elif isinstance(record, Conns):
            self._conns(record)
        elif isinstance(record, End):
            self._end(record)

    def _listeners(self, record: Listeners) -> None:
        self.listeners += len(record.listeners)
        if self.listeners > limits.HANDOVER_LISTENERS_MAX:
            raise HandoverError(
                "LISTENERS", self.listeners, f"must be at most {limits.HANDOVER_LISTENERS_MAX}"
            )
        for one in record.listeners:
            if one.name in self.names:
                raise HandoverError("LISTENERS.name", shown(one.name), "must not come twice")
            self.names.add(one.name)
        if not record.last and not record.listeners:
            raise HandoverError(
                "LISTENERS.listeners", 0, "must be at least 1 unless it is the last"
            )
        if not record.last and (record.lock or record.stdio):
            raise HandoverError("LISTENERS.last", False, "must be true where lock or stdio are")

    def _conns(self, record: Conns) -> None:
        state = self.states.get(record.thread)
        if state is None:
            raise HandoverError("CONNS.thread", record.thread, "must be one whose STATE came")
        came = self.came[record.thread]
        if record.first != came:
            raise HandoverError("CONNS.first", record.first, f"must be {came}, the next one")
        if came + record.count > state.descriptors:
            left = state.descriptors - came
            raise HandoverError("CONNS.count", record.count, f"must be at most {left}")
        self.came[record.thread] = came + record.count

    def _end(self, record: End) -> None:
        if sorted(self.states) != list(range(record.threads)):
            raise HandoverError(
                "END.threads", record.threads, f"must be the {len(self.states)} whose STATE came"
            )
        for thread, state in self.states.items():
            if self.came[thread] != state.descriptors:
                raise HandoverError(
                    "END",
                    f"{self.came[thread]} descriptors of thread {thread}",
                    f"must be {state.descriptors}, as its STATE said",
                )
        total = sum(self.came.values())
        if record.descriptors != total:
            raise HandoverError("END.descriptors", record.descriptors, f"must be {total}")

    def _fits(self, where: str, total: int) -> None:
        if total > self._room:
            raise HandoverError(where, total, f"must be at most {self._room}, the room there is")


def check_descriptors(record: Record, fds: int, *, truncated: bool = False) -> None:
    """Raises HandoverError unless exactly the descriptors of this record came with it. The kernel
    delivers the bytes whole even when it had to drop descriptors (at RLIMIT_NOFILE)."""
    name = NAMES[type(record)]
    expected = descriptors(record)
    if truncated or fds != expected:
        got = f"{fds} descriptors" + (", cut off" if truncated else "")
        raise HandoverError(name, got, f"must come with {expected}")
