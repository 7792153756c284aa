"""The broker's nouns: what it is told, what it keeps in memory, and who waits for what."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastmesh import limits
from fastmesh.broker.store import QueueRow
from fastmesh.protocols.push import Assembler, Filter

NEVER = 1 << 62
MESSAGE, DELAYED, PREPARED, ROLLBACK = range(4)
"""What a publish becomes."""


@dataclass(frozen=True, slots=True)
class Options:
    """How the broker behaves; times in milliseconds."""

    name: str = "b1"
    queues: int = 4
    sync: bool = True
    topics: Mapping[str, bool] = field(default_factory=dict)
    """Topics whose sync policy is not `sync`."""
    redeliver_ms: tuple[int, ...] = (1000, 5000, 10_000, 30_000, 60_000)
    """Until the second attempt, the third, ...; the last step repeats."""
    max_attempts: int = 16
    answer_timeout_ms: int = 60_000
    check_after_ms: int = 6000
    check_every_ms: int = 30_000
    check_max: int = 15
    start_first: bool = True
    """A group that is new begins with the oldest message that is still there, not with the next."""
    keep_ms: int = limits.DAY_MS
    """Consumed messages are kept this long ..."""
    keep_bytes: int = limits.GIB
    """... unless the store is larger than this."""
    bytes_max: int = limits.BROKER_STORE_BYTES_MAX


@dataclass(slots=True, eq=False)
class Message:
    """One message of a queue, in memory."""

    offset: int
    stored_ms: int
    headers: dict[str, str]
    content: bytes


@dataclass(slots=True, eq=False)
class Queue:
    topic: Topic
    number: int
    first: int = 0
    end: int = 0
    """Of what is on disk; what is on its way there is not delivered yet."""
    tail: dict[int, Message] = field(default_factory=dict)
    """The newest messages by offset."""

    def row(self) -> QueueRow:
        return QueueRow(self.topic.id, self.number, self.first, self.end)


@dataclass(slots=True, eq=False)
class Topic:
    id: int
    name: str
    sync: bool
    queues: list[Queue] = field(default_factory=list)
    cursors: list[Cursor] = field(default_factory=list)
    """Who reads it."""
    turn: int = 0
    published: int = 0


@dataclass(slots=True, eq=False)
class Publish:
    """Something on its way to disk, and who waits for it."""

    kind: int
    topic: Topic
    queue: int
    headers: dict[str, str]
    content: bytes
    seen: str = ""
    """Under which it is known while it may come again; "" when it cannot."""
    answers: list[tuple[int, int, int]] = field(default_factory=list)
    """handle, id, hint of those who published it; oneway publishers are not there."""
    due_ms: int = 0
    id: str = ""
    group: str = ""
    ends_prepared: bool = False
    ends_delayed: int = 0
    settles: Entry | None = None
    """Of a dead letter: what is over for its group once this is written."""
    settled: bool = False
    own: bool = False
    """Nobody can be told to come again: it stays until it is written."""


@dataclass(slots=True, eq=False)
class Place:
    """Where a cursor stands in one queue."""

    cursor: Cursor
    queue: Queue
    next: int
    outstanding: dict[int, None] = field(default_factory=dict)
    """Offsets below `next` that are not settled, ascending."""
    ahead: deque[Message] = field(default_factory=deque)
    """Read from disk and not yet delivered."""
    dirty: bool = False


@dataclass(slots=True, eq=False)
class Entry:
    """A message on its way to a consumer: waiting, in flight, or between two attempts."""

    place: Place
    offset: int
    attempts: int = 0
    kept: bool = False
    """The store knows it as a retry; otherwise it is outstanding at its place."""
    key: str | None = None
    """It holds this key of an ordered group."""

    def retry_key(self) -> tuple[int, int, int, int]:
        queue = self.place.queue
        return (self.place.cursor.group.id, queue.topic.id, queue.number, self.offset)


@dataclass(slots=True, eq=False)
class Cursor:
    """A reading of a group's topics: one of a cluster group, one per connection of a broadcast."""

    group: Group
    persistent: bool
    places: dict[tuple[int, int], Place] = field(default_factory=dict)
    order: list[Place] = field(default_factory=list)
    turn: int = 0
    links: list[Link] = field(default_factory=list)
    ready: deque[Link] = field(default_factory=deque)
    """Links with credit left, the longest unused first."""
    retries: list[tuple[int, int, Entry]] = field(default_factory=list)
    """A heap by due time."""
    runnable: deque[Entry] = field(default_factory=deque)
    """Ready before anything new: found unsettled at start, or freed by the one before."""
    keys: dict[str, deque[Entry]] = field(default_factory=dict)
    """Of an ordered group: keys in work, and who waits for each."""
    waiting: int = 0
    kept: int = 0
    """Messages that wait for another attempt, or are in it."""
    in_flight: int = 0
    generation: int = 0
    """Rises when the position is set: what is in flight then no longer counts."""
    armed_ms: int = NEVER


@dataclass(slots=True, eq=False)
class Group:
    id: int
    name: str
    suspended: bool = False
    broadcast: bool = False
    ordered: bool = False
    filter: Filter | None = None
    filter_text: str = ""
    known: bool = False
    """Announced since the start."""
    cursors: list[Cursor] = field(default_factory=list)
    delivered: int = 0
    consumed: int = 0
    redelivered: int = 0
    dead: int = 0
    dropped: int = 0
    filtered: int = 0


@dataclass(slots=True, eq=False)
class Link:
    """A group on a connection."""

    session: Session
    cursor: Cursor
    credit: int
    topics: frozenset[str] = frozenset()
    in_flight: int = 0
    is_ready: bool = False
    paused_until_ms: int = 0

    def may_take(self, now_ms: int) -> bool:
        session = self.session
        return (
            self.in_flight < self.credit
            and not session.suspended
            and not session.going
            and not session.gone
            and now_ms >= self.paused_until_ms
        )


@dataclass(slots=True, eq=False)
class Session:
    """A connection."""

    handle: int
    app: str = ""
    client: str = ""
    hello: bool = False
    suspended: bool = False
    going: bool = False
    gone: bool = False
    parts: Assembler = field(default_factory=Assembler)
    links: dict[str, Link] = field(default_factory=dict)
    publishes: set[str] = field(default_factory=set)
    tickets: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Flight:
    """A delivery or a check that is not answered."""

    session: Session
    link: Link | None
    entry: Entry | None
    generation: int
    check: Prepared | None = None


@dataclass(slots=True, eq=False)
class Prepared:
    id: str
    group: str
    topic: Topic
    headers: dict[str, str]
    checks: int = 0
    check_ms: int = 0
    ending: bool = False
    """Its end is on its way to disk."""
    checking: bool = False
