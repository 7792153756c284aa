"""The oracle of the message mesh: joins what producers published, what consumers consumed and what
was broken meanwhile, and names every violation.

    lost        acknowledged to its producer, and a group of its topic never consumed it
    unconsumed  the same, though the broker's books say that the group has: an answer was made up
    misrouted   consumed by a group that is none of its topic's
    torn        consumed with other content than was published
    unexpected  consumed, and never published, or the producer was told that nothing happened
    reordered   in a group that is ordered, begun before the one before it of its key had ended
    duplicated  consumed again, and no fault explains it

A duplicate is explained by a fault that struck between the two, and that the first one's answer can
have met: see `explains`. A fault that met no consumption is no evidence: see `struck`.

It does no I/O and knows no clock. All times are CLOCK_MONOTONIC in ns, one clock for all processes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal, NamedTuple

CLASSES: Final = (
    "lost",
    "unconsumed",
    "misrouted",
    "torn",
    "unexpected",
    "reordered",
    "duplicated",
)
MS: Final = 1_000_000
ANSWER_NS: Final = 1000 * MS
"""So long before a fault a handler may have begun whose answer it met: the handlers of these tests
take tens of ms, a broker keeps positions some ms, and the machine is shared."""
LATE_NS: Final = 500 * MS
"""So long after it may a handler begin that was on its way to its process before it."""


@dataclass(slots=True)
class Published:
    """What a producer knows of one message."""

    id: str
    topic: str
    key: str
    seq: int
    """Rises per key; the next one of a key leaves only when this one has its outcome."""
    crc: int
    sent_ns: int
    outcome: Literal["", "taken", "doubtful", "not_taken"] = ""
    broker: str = ""
    """Which one took it."""


class Consumption(NamedTuple):
    """One call of a handler. `end_ns` 0: it never ended, its process was killed."""

    begin_ns: int
    end_ns: int
    client: str
    group: str
    id: str
    attempt: int
    crc: int


@dataclass(frozen=True, slots=True)
class Fault:
    """What was broken: a client, node or broker killed, the line of a broker cut or silenced, or a
    consumer stopped for longer than the broker waits."""

    kind: Literal["client", "node", "broker", "line", "stop"]
    name: str
    """Of the client, node or broker."""
    at_ns: int
    """Just before."""
    until_ns: int = 0
    """The end of a silence or a stop; 0: it struck at once."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name} at {self.at_ns / 1e9:.3f}"


@dataclass(frozen=True, slots=True)
class Verdict:
    counts: Mapping[str, int]
    examples: Mapping[str, list[str]]
    outcomes: Mapping[str, int]
    """Messages by what their producer was told."""
    consumed: int
    """Handlers called."""
    explained: Mapping[Fault, int]
    """Duplicates, by the fault that each is laid to."""
    struck: Mapping[Fault, int]
    """Handlers that ran at that moment, of that client, node or broker."""

    @property
    def taken(self) -> int:
        return self.outcomes.get("taken", 0)

    def check(self, *, taken_min: int = 1, void: bool = True) -> Verdict:
        """Raises AssertionError naming each violation, and for a run that proves nothing."""
        wrong = [
            f"{name}: {self.counts[name]}, e.g. {self.examples[name]}"
            for name in CLASSES
            if self.counts[name]
        ]
        assert not wrong, "\n".join([*wrong, str(self)])
        assert self.taken >= taken_min, f"void: {self}"
        missed = [str(fault) for fault, count in self.struck.items() if not count]
        assert not (void and missed), f"void: nothing was in flight at {missed}"
        return self

    def __str__(self) -> str:
        faults = Counter(f.kind for f in self.struck)
        doubles: Counter[str] = Counter()
        for fault, count in self.explained.items():
            doubles[fault.kind] += count
        return (
            f"messages {dict(self.outcomes)}, {self.consumed} consumptions, faults {dict(faults)}"
            f" with {sum(self.struck.values())} in flight, duplicates by fault {dict(doubles)};"
            f" {dict(self.counts)}"
        )


@dataclass(slots=True)
class Ledger:
    """`groups`: topic -> group -> ordered. `nodes`: client -> the node that it is connected to."""

    groups: Mapping[str, Mapping[str, bool]]
    nodes: Mapping[str, str] = field(default_factory=dict)
    published: dict[str, Published] = field(default_factory=dict)
    consumptions: list[Consumption] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    EXAMPLES_MAX = 5

    def missing(self) -> set[tuple[str, str]]:
        """(group, id) that were acknowledged and not consumed so far."""
        seen = {(c.group, c.id) for c in self.consumptions}
        return {
            (group, p.id)
            for p in self.published.values()
            if p.outcome == "taken"
            for group in self.groups.get(p.topic, ())
        } - seen

    def explains(self, fault: Fault, first: Consumption, again: Consumption) -> bool:
        """Whether this fault can have eaten the answer of `first`, so that `again` had to be."""
        until_ns = fault.until_ns or fault.at_ns
        if not fault.at_ns - ANSWER_NS <= first.begin_ns <= until_ns + LATE_NS:
            return False
        if again.begin_ns < fault.at_ns:
            return False
        if fault.kind == "client":
            return first.client == fault.name
        if fault.kind == "stop":
            # What it had not begun was consumed elsewhere first, and by it when it went on.
            return fault.name in (first.client, again.client)
        if fault.kind == "node":
            return True  # either end of a forward
        message = self.published.get(first.id)
        return message is None or message.broker in ("", fault.name)

    def struck(self, fault: Fault) -> int:
        """Handlers running at that moment whose answer had to pass what was broken."""
        return sum(
            1
            for c in self.consumptions
            if c.begin_ns <= fault.at_ns
            and (c.end_ns == 0 or c.end_ns > fault.at_ns)
            and c.begin_ns > fault.at_ns - ANSWER_NS
            and self.concerns(fault.kind, fault.name, c)
        )

    def concerns(self, kind: str, name: str, c: Consumption) -> bool:
        if kind in ("client", "stop"):
            return c.client == name
        if kind == "node":
            return self.nodes.get(c.client) == name
        message = self.published.get(c.id)
        return message is not None and message.broker == name

    def judge(self, lag: Mapping[str, int] | None = None) -> Verdict:
        """`lag`: group -> messages that the brokers still hold for it."""
        counts: Counter[str] = Counter()
        examples: dict[str, list[str]] = {name: [] for name in CLASSES}
        explained: Counter[Fault] = Counter()

        def note(name: str, what: object) -> None:
            counts[name] += 1
            if len(examples[name]) < self.EXAMPLES_MAX:
                examples[name].append(str(what))

        by_message: defaultdict[tuple[str, str], list[Consumption]] = defaultdict(list)
        for c in sorted(self.consumptions):
            by_message[c.group, c.id].append(c)
            message = self.published.get(c.id)
            if message is None:
                note("unexpected", c)
                continue
            if c.crc != message.crc:
                note("torn", c)
            if c.group not in self.groups.get(message.topic, ()):
                note("misrouted", f"{message.topic}: {c}")
            if message.outcome == "not_taken":
                note("unexpected", f"the producer was told that nothing happened: {c}")
        for group, id in sorted(self.missing()):
            known = (lag or {}).get(group, 0) == 0
            note("unconsumed" if known and lag is not None else "lost", (group, self.published[id]))
        for found in by_message.values():
            for first, again in pairwise(found):
                why = [f for f in self.faults if self.explains(f, first, again)]
                if why:
                    # The nearest before the second one: there may be several.
                    explained[max(why, key=lambda f: f.at_ns)] += 1
                else:
                    note("duplicated", (first, again))
        self._judge_order(by_message, note)
        return Verdict(
            counts={name: counts[name] for name in CLASSES},
            examples=examples,
            outcomes=Counter(p.outcome or "open" for p in self.published.values()),
            consumed=len(self.consumptions),
            explained=explained,
            struck={fault: self.struck(fault) for fault in self.faults},
        )

    def _judge_order(
        self,
        by_message: Mapping[tuple[str, str], list[Consumption]],
        note: Callable[[str, object], None],
    ) -> None:
        """One broker keeps the order of one key. What is doubtful has no place in it."""
        lines: defaultdict[tuple[str, str, str], list[Published]] = defaultdict(list)
        for p in self.published.values():
            if p.outcome == "taken":
                lines[p.topic, p.key, p.broker].append(p)
        for (topic, _, _), line in lines.items():
            line.sort(key=lambda p: p.seq)
            for group, ordered in self.groups.get(topic, {}).items():
                if not ordered:
                    continue
                for before, after in pairwise(line):
                    first = by_message.get((group, before.id))
                    then = by_message.get((group, after.id))
                    if not first or not then:
                        continue  # lost, and said so
                    ends = [c.end_ns for c in first if c.end_ns]
                    if not ends or min(ends) > then[0].begin_ns:
                        note("reordered", (then[0], first))


def read_lines(lines: Iterable[str], open_calls: dict[str, Consumption]) -> list[Consumption]:
    """What consumers wrote: `B token ns client group id attempt crc` before a handler works, and
    `E token ns` after it. Returns those that ended; `open_calls` keeps the others by token."""
    ended = []
    for line in lines:
        kind, token, time_ns, *rest = line.split()
        if kind == "B":
            client, group, id, attempt, crc = rest
            open_calls[token] = Consumption(
                int(time_ns), 0, client, group, id, int(attempt), int(crc)
            )
        else:
            ended.append(open_calls.pop(token)._replace(end_ns=int(time_ns)))
    return ended
