"""Simulation of traffic scheduling: many nodes, virtual time, news that arrives late, and a score.

A truth (the schedule document, who is alive) changes by events; every node has a view of its own
that follows late: a schedule after up to SCHEDULE_LATE_MS, who is reachable after up to
`Spec.news_ms`. A broker hands each message to a node that is alive; that node's policy decides by
its own view. The real policy is the native one, with everything that a node keeps.

The score of a run is the lowest of its parts, each 0..100 (100 = perfect):

    fairness   how far what each node was given is from what weights and views demand, as total
               variation: a tenth of all messages in the wrong place costs a third of the points
    exactness  the worst difference, in messages, between what a node kept and what its weight
               demanded, at any moment: half a message is promised, beyond one it costs 10 each
               (ordered groups: in standard deviations, of which four are free)
    reaction   the longest time from a change (a weight, a death, a join) until traffic followed it:
               beyond the lateness of the news every 10 ms cost a point
    forwarded  messages that were forwarded although weights demanded that they stay: each percent
               of all messages costs 20 points, and so does each percent that should have left
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastmesh._ext.schedule import WHY, GroupShare, Message, Schedule

SCHEDULE_LATE_MS = 300
"""Until a node works with a new schedule: the file is looked at four times a second, and a snapshot
takes tens of milliseconds."""
KINDS = 64
"""Messages are drawn from so many per colour; their headers are encoded once."""

Document = Mapping[str, int]
"""Node to weight."""
Rules = Sequence[tuple[Sequence[tuple[str, str]], Sequence[tuple[str, int]]]]


@dataclass(frozen=True)
class Spec:
    """A scenario and the score below which it fails."""

    name: str
    score_min: int
    nodes: int
    weights: Sequence[int]
    """Drawn from for every node."""
    seconds: int = 10
    messages_per_s: int = 3000
    ordered: bool = False
    blue_percent: int = 0
    """Of messages: a rule gives them to a tenth of the nodes, with weights 1..100."""
    news_ms: int = 200
    """Until every node knows that another one died or came back."""
    deaths_per_s: float = 0
    down_ms: int = 2000
    joins_per_s: float = 0
    leaves_per_s: float = 0
    changes_per_s: float = 0
    """Of the weight of one node each."""


class Policy(Protocol):
    """What one node decides by."""

    def schedule(self, document: Document, rules: Rules) -> None:
        """Another schedule is in force."""

    def choose(self, message: Message, reachable: set[str], ordered: bool) -> tuple[str, str]:
        """(node that takes it, why): this node itself when it stays."""


class NativePolicy:
    """The real one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.document: Document = {}
        self._share: GroupShare | None = None
        self._known: tuple[frozenset[str], bytes] = (frozenset(), b"")

    def schedule(self, document: Document, rules: Rules) -> None:
        self.document = document
        endpoints = {n: i for i, n in enumerate(document, 1) if n != self.name}
        self._plan = Schedule(
            list(document.items()), rules=rules, local=self.name, endpoints=endpoints
        )
        if self._share is None:
            self._share = GroupShare(self._plan)
        else:
            self._share.reset(self._plan)
        self._known = (frozenset(), b"")

    def choose(self, message: Message, reachable: set[str], ordered: bool) -> tuple[str, str]:
        assert self._share is not None
        if len(self._known[1]) == 0 or self._known[0] != reachable:
            found = bytes(n in reachable or n == self.name for n in self._plan.nodes)
            self._known = (frozenset(reachable), found)
        number, why = self._plan.choose(self._share, message, self._known[1], ordered=ordered)
        return (self._plan.nodes[number] if number >= 0 else self.name), WHY[why]


@dataclass
class Node:
    name: str
    policy: Policy
    document: Document
    rules: Rules
    version: int = -1
    """Of its schedule: an older one that comes late is not taken up."""
    reachable: set[str] = field(default_factory=set)
    """In this node's view."""
    kept: int = 0
    due: float = 0.0
    """Messages that it kept, and that its weight demanded, while there was anybody to send to."""
    chance: float = 0.0
    """Variance of `due` when keys decide."""
    pending: Counter[str] = field(default_factory=Counter)
    """Decisions since its view changed last, by kind."""


@dataclass
class Watch:
    """A change of a weight, and what its node did since: did traffic follow, and when?"""

    at_ms: float
    node: str
    weight: int
    seen: list[tuple[float, bool]] = field(default_factory=list)  # (time, kept)

    def reaction_ms(self) -> float | None:
        """Time after which every stretch is within a message of the weight; None: too few messages
        to say."""
        if len(self.seen) < 20:
            return None
        offs = [0.0]
        for _, kept in self.seen:
            offs.append(offs[-1] + kept - self.weight / 100)
        low = high = offs[-1]
        for index in range(len(self.seen) - 1, -1, -1):
            low, high = min(low, offs[index]), max(high, offs[index])
            if high - offs[index] > 1.001 or offs[index] - low > 1.001:
                return self.seen[index][0] - self.at_ms
        return 0.0


@dataclass(frozen=True)
class Score:
    fairness: float
    exactness: float
    reaction: float
    forwarded: float
    facts: Mapping[str, float]

    @property
    def total(self) -> float:
        return min(self.fairness, self.exactness, self.reaction, self.forwarded)

    def __str__(self) -> str:
        parts = ("fairness", "exactness", "reaction", "forwarded")
        shown = ", ".join(f"{part} {getattr(self, part):.0f}" for part in parts)
        facts = ", ".join(f"{name} {value:g}" for name, value in self.facts.items())
        return f"{self.total:5.1f} ({shown}; {facts})"


class Simulation:
    """One run. `policy` makes what a node decides by."""

    def __init__(
        self, spec: Spec, seed: int, policy: Callable[[str], Policy] = NativePolicy
    ) -> None:
        self.spec = spec
        self.rng = random.Random(seed)
        self.make = policy
        self.now = 0.0
        self.queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.count = 0
        self.document: dict[str, int] = {}
        self.rules: Rules = ()
        self.version = 0
        self.alive: dict[str, Node] = {}
        self.order: list[str] = []  # the names of `alive`, to draw from
        self.born = 0
        self.given: Counter[str] = Counter()
        self.ideal: defaultdict[str, float] = defaultdict(float)
        self.messages = self.forwards = 0
        self.demanded = 0.0
        self.worst_off = 0.0
        self.deaths: dict[str, float] = {}
        self.joins: dict[str, float] = {}
        self.watches: dict[str, Watch] = {}
        self.reactions: list[tuple[float, str]] = []
        self.events = 0
        self.kinds = [[self._message(colour) for _ in range(KINDS)] for colour in ("green", "blue")]

    def _message(self, colour: str) -> Message:
        key = f"order-{self.rng.getrandbits(60)}"
        return Message({"fm.topic": "t", "fm.key": key, "fm.colour": colour})

    # --- time -------------------------------------------------------------------------------------

    def after(self, ms: float, what: Callable[..., None], *args: Any) -> None:
        self.count += 1
        heapq.heappush(self.queue, (self.now + ms, self.count, what, args))

    def again(self, per_s: float, what: Callable[[], None]) -> None:
        """At random moments, so many a second."""

        def step() -> None:
            what()
            self.after(self.rng.expovariate(per_s / 1000), step)

        if per_s:
            self.after(self.rng.expovariate(per_s / 1000), step)

    def run(self) -> Score:
        spec = self.spec
        for _ in range(spec.nodes):
            self.new_node()
        names = list(self.document)
        if spec.blue_percent:
            chosen = self.rng.sample(names, max(2, len(names) // 10))
            weights = [(name, self.rng.randint(1, 100)) for name in chosen]
            self.rules = [([("colour", "blue")], weights)]
        for name in names:
            self.start(name, knows_all=True)
        self.again(spec.messages_per_s, self.message)
        self.again(spec.deaths_per_s, self.death)
        self.again(spec.joins_per_s, self.join)
        self.again(spec.leaves_per_s, self.leave)
        self.again(spec.changes_per_s, self.change)
        while self.queue and self.queue[0][0] <= spec.seconds * 1000:
            self.now, _, what, args = heapq.heappop(self.queue)
            what(*args)
        for node in self.alive.values():
            self.settle(node)
        for name in list(self.watches):
            self.judge_watch(name)
        return self.score()

    # --- what happens -----------------------------------------------------------------------------

    def new_node(self) -> str:
        self.born += 1
        name = f"node-{self.born}"
        self.document[name] = self.rng.choice(self.spec.weights)
        return name

    def start(self, name: str, knows_all: bool = False) -> None:
        """A process starts: it knows the schedule, and learns of others as they learn of it."""
        node = Node(name, self.make(name), dict(self.document), self.rules, self.version)
        node.policy.schedule(node.document, node.rules)
        self.alive[name] = node
        self.order.append(name)
        if knows_all:
            for other in self.alive.values():
                if other is not node:
                    other.reachable.add(name)
                    node.reachable.add(other.name)
        else:
            self.tell(name, True)
            for other in self.alive:
                if other != name:
                    self.after(self.rng.uniform(1, self.spec.news_ms), self.news, name, other, True)

    def tell(self, name: str, up: bool) -> None:
        for other in self.alive:
            if other != name:
                self.after(self.rng.uniform(1, self.spec.news_ms), self.news, other, name, up)

    def news(self, observer: str, about: str, up: bool) -> None:
        node = self.alive.get(observer)
        if node is None or up != (about in self.alive):
            return  # overtaken by later events
        if up != (about in node.reachable):
            self.settle(node)
            (node.reachable.add if up else node.reachable.discard)(about)

    def publish(self) -> None:
        """The document changed: every node takes it up in its own time."""
        document = dict(self.document)
        self.rules = [
            (match, [(name, weight) for name, weight in nodes if name in document])
            for match, nodes in self.rules
        ]
        self.version += 1
        for name in self.alive:
            late = self.rng.uniform(1, SCHEDULE_LATE_MS)
            self.after(late, self.take, name, document, self.rules, self.version)

    def take(self, name: str, document: Document, rules: Rules, version: int) -> None:
        node = self.alive.get(name)
        if node is not None and node.version < version:
            self.settle(node)
            node.version, node.document, node.rules = version, document, rules
            node.policy.schedule(document, rules)

    def death(self) -> None:
        if len(self.order) > 2:
            name = self.rng.choice(self.order)
            self.kill(name)
            self.after(self.spec.down_ms, self.back, name)

    def kill(self, name: str) -> None:
        self.events += 1
        self.settle(self.alive.pop(name))
        self.order.remove(name)
        self.joins.pop(name, None)
        self.judge_watch(name)
        self.deaths[name] = self.now
        self.tell(name, False)

    def back(self, name: str) -> None:
        if name in self.document and name not in self.alive:
            self.deaths.pop(name, None)
            self.start(name)
            self.joins[name] = self.now

    def join(self) -> None:
        name = self.new_node()
        self.events += 1
        self.start(name)
        self.joins[name] = self.now
        self.publish()

    def leave(self) -> None:
        """Taken out of the schedule; the process goes on for a while, as operators do it."""
        if len(self.document) > 2:
            name = self.rng.choice(list(self.document))
            self.events += 1
            del self.document[name]
            self.joins.pop(name, None)
            self.judge_watch(name)
            self.publish()

            def gone() -> None:
                if name in self.alive:
                    self.kill(name)

            self.after(2 * SCHEDULE_LATE_MS, gone)

    def change(self) -> None:
        name = self.rng.choice(list(self.document))
        self.judge_watch(name)
        self.events += 1
        weight = self.rng.choice(self.spec.weights)
        self.document[name] = weight
        self.joins.pop(name, None)
        if not self.spec.ordered:
            self.watches[name] = Watch(self.now, name, weight)
        self.publish()

    # --- traffic ----------------------------------------------------------------------------------

    def message(self) -> None:
        node = self.alive[self.order[int(self.rng.random() * len(self.order))]]
        blue = self.rng.random() * 100 < self.spec.blue_percent
        if self.spec.ordered:
            message = self._message("blue" if blue else "green")
        else:
            message = self.kinds[blue][int(self.rng.random() * KINDS)]
        target, why = node.policy.choose(message, node.reachable, self.spec.ordered)
        self.messages += 1
        self.given[target] += 1
        node.pending["blue" if blue and node.rules and node.name in node.document else "all"] += 1
        if target != node.name:
            if target in self.deaths:
                # Refused before it was executed: it is offered here. What counts is how long.
                self.reactions.append((self.now - self.deaths[target], f"to dead {target}"))
            elif target in self.joins and why == "share":
                self.reactions.append(
                    (self.now - self.joins.pop(target) - self.patience_ms(), f"to new {target}")
                )
        if why == "rule" or (blue and node.rules):
            return
        full = [n for n in node.reachable if node.document.get(n) == 100]
        if node.name in node.document and full:
            weight = node.document[node.name]
            node.due += weight / 100
            node.chance += weight / 100 * (1 - weight / 100)
            node.kept += target == node.name
            self.demanded += 1 - weight / 100
            self.forwards += target != node.name
            off = abs(node.kept - node.due)
            if self.spec.ordered:
                off = off / math.sqrt(max(9.0, node.chance)) - 4.0
            self.worst_off = max(self.worst_off, off)
            if (watch := self.watches.get(node.name)) is not None:
                watch.seen.append((self.now, target == node.name))

    def patience_ms(self) -> float:
        """In which a node of weight 100 is surely served: what is forwarded goes round all of
        them."""
        forwarded_per_s = (
            self.spec.messages_per_s
            * sum(1 - w / 100 for w in self.document.values())
            / max(1, len(self.document))
        )
        full = sum(w == 100 for w in self.document.values())
        return 12_000 * full / max(1.0, forwarded_per_s)

    def settle(self, node: Node) -> None:
        """What the decisions since the last change of a view should have given to whom."""
        document = node.document
        for kind, number in node.pending.items():
            weights: dict[str, float] = {}
            if kind == "blue":
                weights = {
                    n: w
                    for n, w in node.rules[0][1]
                    if n in document and (n in node.reachable or n == node.name)
                }
            elif node.name in document and document[node.name] < 100:
                full = [n for n in node.reachable if document.get(n) == 100]
                if full:
                    weights = dict.fromkeys(full, (100 - document[node.name]) / len(full))
                    weights[node.name] = document[node.name]
            total = sum(weights.values())
            for name, weight in (weights if total else {node.name: 1}).items():
                self.ideal[name] += number * weight / (total or 1)
        node.pending.clear()

    # --- the verdict ------------------------------------------------------------------------------

    def judge_watch(self, name: str) -> None:
        watch = self.watches.pop(name, None)
        if watch is not None and (ms := watch.reaction_ms()) is not None:
            self.reactions.append((ms, f"weight of {name}"))

    def score(self) -> Score:
        for name, at in self.joins.items():
            node = self.alive[name]
            if self.document.get(name) == 100 and node is not None:
                self.reactions.append((self.now - at - self.patience_ms(), f"never to {name}"))
        names = set(self.given) | set(self.ideal)
        wrong = sum(abs(self.given[n] - self.ideal[n]) for n in names) / 2 / self.messages
        slowest = max((ms for ms, _ in self.reactions), default=0.0)
        late = slowest - max(self.spec.news_ms, SCHEDULE_LATE_MS)
        excess = abs(self.forwards - self.demanded) - len(names)
        if self.spec.ordered:
            excess -= 3 * math.sqrt(self.messages)
        return Score(
            fairness=points(wrong * 100 * 10 / 3),
            exactness=points(10 * (self.worst_off - 1)),
            reaction=points(late / 10),
            forwarded=points(20 * 100 * excess / self.messages),
            facts={
                "messages": self.messages,
                "changes": self.events,
                "in the wrong place %": round(100 * wrong, 2),
                "worst off": round(self.worst_off, 2),
                "slowest ms": round(slowest),
                "forwarded": self.forwards,
                "demanded": round(self.demanded, 1),
            },
        )


def points(lost: float) -> float:
    return max(0.0, min(100.0, 100.0 - max(0.0, lost)))
