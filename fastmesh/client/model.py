"""What an application handles: groups, messages, receipts, and what a handler may answer."""

from __future__ import annotations

import enum
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from fastmesh import limits
from fastmesh.protocols import push as words

Role = Literal["subscribe", "publish"]
Mode = Literal["cluster", "broadcast"]


@dataclass(frozen=True, slots=True)
class Group:
    """A group of one topic, as it is registered. Raises ValueError for what cannot be right.

    All clients of an application that name the same group must agree on everything but `prefetch`.
    """

    name: str
    topic: str
    role: Role = "subscribe"
    """A publish group stands behind transactional messages: its members answer the checks."""
    filter: str = ""
    """`name=value` joined by "&", alternatives by "|": `colour=blue|green&region=eu`; "" = all."""
    prefetch: int = limits.PREFETCH
    """Handlers of this group running at once in this client, over all its connections."""
    ordered: bool = False
    """One message of a key at a time, in the order of their publication."""
    mode: Mode = "cluster"
    """cluster: one member of the group gets a message; broadcast: every one does."""

    def __post_init__(self) -> None:
        for field_name, value in (("name", self.name), ("topic", self.topic)):
            check_name(f"group {field_name}", value)
        if self.role not in ("subscribe", "publish"):
            raise ValueError(f"role {self.role!r} of group {self.name}: 'subscribe' or 'publish'")
        if self.mode not in ("cluster", "broadcast"):
            raise ValueError(f"mode {self.mode!r} of group {self.name}: 'cluster' or 'broadcast'")
        if not 1 <= self.prefetch <= limits.PREFETCH_MAX:
            raise ValueError(
                f"prefetch {self.prefetch} of group {self.name}: 1..{limits.PREFETCH_MAX} messages"
            )
        if self.ordered and self.mode == "broadcast":
            raise ValueError(f"group {self.name} is ordered: that goes with mode 'cluster' only")
        if self.filter:
            try:
                words.Filter.parse(self.filter)
            except ValueError as error:
                raise ValueError(f"group {self.name}: {error}") from None
        if self.role == "publish" and (self.filter or self.ordered or self.mode != "cluster"):
            raise ValueError(
                f"group {self.name} publishes: filter, ordered and mode are for subscribe groups"
            )

    def document(self) -> dict[str, object]:
        """What stands in the registration."""
        found: dict[str, object] = {"name": self.name, "topic": self.topic, "role": self.role}
        if self.role == "subscribe":
            found |= {"prefetch": self.prefetch, "ordered": self.ordered, "mode": self.mode}
            if self.filter:
                found["filter"] = self.filter
        return found


@dataclass(frozen=True, slots=True)
class Message:
    """One message as a handler, or a check, gets it."""

    topic: str
    group: str
    id: str
    """Chosen by the producer; a redelivery has the same."""
    content: bytes
    key: str | None = None
    colour: str | None = None
    lane: str | None = None
    version: str | None = None
    born_ms: int | None = None
    """When it was published, ms since 1970 by the producer's clock."""
    attempt: int = 1
    """1 at the first delivery to the group."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """The producer's headers."""
    trace: str | None = None
    origin: str | None = None
    """The node that forwarded it to this one; None when it came from the broker directly."""


class Receipt(NamedTuple):
    """A broker took responsibility for this message."""

    id: str
    broker: str


@dataclass(frozen=True, slots=True)
class Result:
    """What a handler says about a message; made by `consumed()`, `later()` and `reject()`."""

    kind: Literal["consumed", "later", "reject"]
    retry_ms: int | None = None
    reason: str = ""


_CONSUMED = Result("consumed")


def consumed() -> Result:
    """Done with; the same as returning None."""
    return _CONSUMED


def later(retry_ms: int | None = None, reason: str = "") -> Result:
    """Not now: to be delivered again, not before `retry_ms` (None: as the broker sees fit)."""
    if retry_ms is not None and not 0 <= retry_ms <= limits.MESSAGE_RETRY_MS_MAX:
        raise ValueError(f"retry_ms {retry_ms}: 0..{limits.MESSAGE_RETRY_MS_MAX} ms, or None")
    return Result("later", retry_ms, reason)


def reject(reason: str) -> Result:
    """Never: no use to deliver it again."""
    return Result("reject", None, reason)


class Fate(enum.Enum):
    """What became of the local transaction behind a prepared message: the answer to a check."""

    COMMIT = words.COMMIT
    ROLLBACK = words.ROLLBACK
    UNKNOWN = words.UNKNOWN
    """Not decided yet; the broker asks again."""


Handler = (
    Callable[[Message], Awaitable[Result | None]]
    | Callable[[Message], Result | None]
    | Callable[[Message], Awaitable[None]]
    | Callable[[Message], None]
)
"""A coroutine function runs on the client's loop; a plain one in a thread of the group."""

Check = Callable[[Message], Awaitable[Fate]] | Callable[[Message], Fate]


@dataclass(slots=True)
class Stats:
    """Counts since the client was made; plain numbers, read whenever you like."""

    published: int = 0
    """Taken by a broker."""
    publish_retries: int = 0
    publish_ambiguous: int = 0
    publish_rejected: int = 0
    consumed: int = 0
    later: int = 0
    rejected: int = 0
    handler_errors: int = 0
    """Handlers that raised or returned nonsense; each is in `later` as well."""
    deliveries_refused: int = 0
    """Not begun: no such group here, over the prefetch, or closing."""
    answers_lost: int = 0
    """Handlers that finished after their connection was gone: the broker delivers again."""
    answers_late: int = 0
    """Answers of the mesh that nobody waited for any more."""
    checks: int = 0
    connects: int = 0
    """Connections that said hello; the first included."""
    registrations: int = 0
    """Requests that the registration took."""
    forgotten: int = 0
    """Renewals that found the mesh without our registration, and so made it anew."""


def check_name(what: str, value: str) -> None:
    """Names of apps, clients, groups and topics travel in comma-separated lists."""
    most = limits.MESH_NAME_CHARS_MAX
    if not re.fullmatch(rf"[A-Za-z0-9_.:@/%-]{{1,{most}}}", value):
        raise ValueError(f'{what} {value!r}: 1..{most} letters, digits or any of "_.:@/%-"')
