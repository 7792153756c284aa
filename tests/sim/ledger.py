"""The oracle: joins what clients sent and saw with what upstreams executed, and names every
violation.

Each operation carries (client, conn_epoch, seq, nonce128, crc) in its body; the upstream logs and
echoes it. The ledger takes facts (`sent`, `executed`, `outcome`, `ended`, `garbage`) in any order
that can happen and `judge()`s them into seven classes, the same words everywhere:

    lost        accepted, and no terminal outcome (answer or explicit error)
    duplicated  executed twice, or two terminal outcomes
    misrouted   an outcome whose nonce belongs to another connection, or to another request
    torn        checksum mismatch or a frame boundary that moved
    unexpected  an outcome, or an execution, of an operation that was never sent
    ambiguous   an error was returned and the upstream executed it, or may have
    reordered   executed in another order than sent, where the protocol promises order

It does no I/O and knows no clock: when to judge is the caller's decision, and at that moment what
has no outcome is lost.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

MAGIC: Final = b"FMOP"
HEAD: Final = struct.Struct(">4sIIQ16s")
TAIL: Final = struct.Struct(">I")
BODY_BYTES_MIN: Final = HEAD.size + TAIL.size

CLASSES: Final = (
    "lost",
    "duplicated",
    "misrouted",
    "torn",
    "unexpected",
    "ambiguous",
    "reordered",
)

MAYBE_EXECUTED: Final = frozenset({1, 2, 7, 16})
"""Error statuses after which the upstream may have executed the request: a general error or
exception of its own, the deadline, and a connection that was lost. No route (6) and overload (4)
promise it did not."""


class Operation(NamedTuple):
    """Who asked, on which of its connections, how many before it, and a name that is nobody
    else's."""

    client: int
    epoch: int
    seq: int
    nonce: bytes


def new_operation(client: int, epoch: int, seq: int) -> Operation:
    return Operation(client, epoch, seq, os.urandom(16))


def encode(op: Operation, size: int = BODY_BYTES_MIN) -> bytes:
    """The operation as a body of `size` bytes (at least BODY_BYTES_MIN). The filler depends on the
    nonce, so that bytes of one body inside another never go unnoticed."""
    filler_size = max(0, size - BODY_BYTES_MIN)
    filler = (op.nonce * (filler_size // 16 + 1))[:filler_size]
    body = HEAD.pack(MAGIC, op.client, op.epoch, op.seq, op.nonce) + filler
    return body + TAIL.pack(zlib.crc32(body))


def decode(body: bytes) -> Operation | None:
    """The operation in a body, or None when the body is torn."""
    if len(body) < BODY_BYTES_MIN:
        return None
    if zlib.crc32(memoryview(body)[:-4]) != TAIL.unpack_from(body, len(body) - 4)[0]:
        return None
    magic, client, epoch, seq, nonce = HEAD.unpack_from(body)
    return Operation(client, epoch, seq, nonce) if magic == MAGIC else None


@dataclass(slots=True, eq=False)
class _Entry:
    op: Operation
    request_id: int
    oneway: bool
    idempotent: bool
    executions: int = 0
    answers: int = 0
    errors: list[int] = field(default_factory=list)
    ended: str = ""  # "" | "by_client" | "reset"

    @property
    def settled(self) -> bool:
        return bool(self.answers or self.errors or self.ended)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many of each class, a few examples, and the totals that show that anything happened at
    all."""

    counts: dict[str, int]
    examples: dict[str, list[str]]
    sent: int
    answered: int
    errors: dict[int, int]
    gone: int
    oneway_sent: int
    oneway_executed: int

    @property
    def oneway_dropped(self) -> int:
        return self.oneway_sent - self.oneway_executed

    def check(self, *, ambiguous_max: int = 0, sent_min: int = 1) -> Verdict:
        """Raises AssertionError naming each violation. `ambiguous_max` is above 0 only where an
        upstream or the network was faulted; fewer than `sent_min` operations make the run void."""
        assert self.sent + self.oneway_sent >= sent_min, f"void: {self.sent} operations"
        allowed = dict.fromkeys(CLASSES, 0) | {"ambiguous": ambiguous_max}
        wrong = [
            f"{name}: {self.counts[name]} (allowed {allowed[name]}), e.g. {self.examples[name]}"
            for name in CLASSES
            if self.counts[name] > allowed[name]
        ]
        assert not wrong, "\n".join([*wrong, str(self)])
        return self

    def __str__(self) -> str:
        return (
            f"{self.sent} sent, {self.answered} answered, errors {self.errors}, {self.gone} gone;"
            f" oneway {self.oneway_sent} sent, {self.oneway_executed} executed; {self.counts}"
        )


class Ledger:
    """`ordered`: executions of one connection must come in the order of their sequence numbers."""

    EXAMPLES_MAX = 5

    def __init__(self, *, ordered: bool = False) -> None:
        self._ordered = ordered
        self._entries: dict[bytes, _Entry] = {}
        # By connection, then by id, so that the end of one of many connections finds its own.
        self._waiting: defaultdict[tuple[int, int], dict[int, deque[_Entry]]] = defaultdict(dict)
        self._asked: dict[tuple[int, int, int], _Entry] = {}
        self._last_seq: dict[tuple[int, int], int] = {}
        self._counts: Counter[str] = Counter()
        self._examples: defaultdict[str, list[str]] = defaultdict(list)

    # --- facts ----------------------------------------------------------------------------------

    def sent(
        self, op: Operation, request_id: int, *, oneway: bool = False, idempotent: bool = False
    ) -> None:
        """A client handed the whole frame to its connection. Call before the first byte can
        leave."""
        entry = _Entry(op, request_id, oneway, idempotent)
        self._entries[op.nonce] = entry
        if not oneway:
            key = (op.client, op.epoch, request_id)
            self._waiting[key[:2]].setdefault(request_id, deque()).append(entry)
            self._asked[key] = entry

    def executed(self, body: bytes) -> Operation | None:
        """An upstream received this body. Returns the operation, None when it is torn."""
        op = decode(body)
        if op is None:
            self._note("torn", f"at the upstream: {len(body)} bytes {bytes(body[:48]).hex()}")
            return None
        self.executed_op(op)
        return op

    def executed_op(self, op: Operation) -> None:
        entry = self._entries.get(op.nonce)
        if entry is None or entry.op != op:
            self._note("unexpected", f"executed, never sent: {op}")
            return
        entry.executions += 1
        if self._ordered:
            connection = (op.client, op.epoch)
            if op.seq < self._last_seq.get(connection, -1):
                self._note("reordered", f"{op} after {self._last_seq[connection]}")
            else:
                self._last_seq[connection] = op.seq

    def outcome(
        self, client: int, epoch: int, request_id: int, status: int, body: bytes
    ) -> Operation | None:
        """An answer arrived on that client's connection. Returns the operation that it settles, if
        any.

        An answer with a body is recognised by the nonce in it, an error without one by its id.
        """
        key = (client, epoch, request_id)
        if body:
            return self._answered(key, status, body)
        waiting = self._waiting[key[:2]].get(request_id)
        if waiting:
            entry = waiting.popleft()
            entry.errors.append(status)
            if status == 0:
                self._note("torn", f"an empty answer to {entry.op}")
            return entry.op
        if (asked := self._asked.get(key)) is not None:
            asked.errors.append(status)
            return asked.op
        self._note("unexpected", f"status {status} for id {request_id} on {client}/{epoch}")
        return None

    def _answered(self, key: tuple[int, int, int], status: int, body: bytes) -> Operation | None:
        op = decode(body)
        if op is None:
            self._note("torn", f"on {key}: {len(body)} bytes {bytes(body[:48]).hex()}")
            return None
        entry = self._entries.get(op.nonce)
        if entry is None or entry.op != op or entry.oneway:
            self._note("unexpected", f"{op} on {key}")
            return None
        if (op.client, op.epoch, entry.request_id) != key:
            self._note("misrouted", f"{op} (id {entry.request_id}) arrived on {key}")
            return None
        waiting = self._waiting[key[:2]].get(key[2])
        if waiting and entry in waiting:
            waiting.remove(entry)
        if status == 0:
            entry.answers += 1
        else:
            entry.errors.append(status)
        return op

    def ended(self, client: int, epoch: int, *, by_client: bool) -> None:
        """That connection is gone. What it still waited for is the client's own doing, or a
        reset."""
        for waiting in self._waiting.pop((client, epoch), {}).values():
            for entry in waiting:
                entry.ended = "by_client" if by_client else "reset"

    def garbage(self, client: int, epoch: int, why: str) -> None:
        """Bytes arrived there that are no frame: a boundary moved."""
        self._note("torn", f"on {client}/{epoch}: {why}")

    # --- judgement ------------------------------------------------------------------------------

    def unsettled(self) -> int:
        """Two-way operations without an outcome so far."""
        return sum(1 for e in self._entries.values() if not e.oneway and not e.settled)

    def unexecuted_oneways(self) -> int:
        return sum(1 for e in self._entries.values() if e.oneway and not e.executions)

    def judge(self, *, reset_is: str = "lost") -> Verdict:
        """`reset_is` = "ambiguous" only in runs that kill fastmesh itself: then a connection that
        ended under a request is the outcome; in every other run the client was owed an answer."""
        counts = Counter(self._counts)
        examples = {name: list(self._examples[name]) for name in CLASSES}

        def note(name: str, entry: _Entry) -> None:
            counts[name] += 1
            if len(examples[name]) < self.EXAMPLES_MAX:
                examples[name].append(str(entry))

        errors: Counter[int] = Counter()
        for entry in self._entries.values():
            if entry.executions > 1 and not entry.idempotent:
                note("duplicated", entry)
            if entry.oneway:
                continue
            errors.update(entry.errors)
            if entry.answers + len(entry.errors) > 1:
                note("duplicated", entry)
            elif not entry.settled:
                note("lost", entry)
            elif entry.ended == "reset":
                note(reset_is, entry)
            elif entry.errors and (entry.executions or entry.errors[0] in MAYBE_EXECUTED):
                note("ambiguous", entry)
        two_way = [e for e in self._entries.values() if not e.oneway]
        oneway = [e for e in self._entries.values() if e.oneway]
        return Verdict(
            counts={name: counts[name] for name in CLASSES},
            examples=examples,
            sent=len(two_way),
            answered=sum(1 for e in two_way if e.answers),
            errors=dict(sorted(errors.items())),
            gone=sum(1 for e in two_way if e.ended == "by_client"),
            oneway_sent=len(oneway),
            oneway_executed=sum(1 for e in oneway if e.executions),
        )

    def read_log(self, operations: Iterable[Operation]) -> None:
        """Take over what an upstream of another process logged."""
        for op in operations:
            self.executed_op(op)

    def _note(self, name: str, text: str) -> None:
        self._counts[name] += 1
        if len(self._examples[name]) < self.EXAMPLES_MAX:
            self._examples[name].append(text)
