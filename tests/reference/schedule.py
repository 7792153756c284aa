"""The scheduling policy, slow and obvious: the twin of fastmesh/_ext/schedule.pyx.

The promises stand in schedule.pxd. Nothing here is compiled or kept between two decisions but what
the group has seen (`Share`), and that by name, so that a change of the schedule needs no care.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

ALL_64 = (1 << 64) - 1


def finish(h: int) -> int:
    """The finalizer of MurmurHash3."""
    h ^= h >> 33
    h = h * 0xFF51AFD7ED558CCD & ALL_64
    h ^= h >> 33
    h = h * 0xC4CEB9FE1A85EC53 & ALL_64
    return h ^ h >> 33


def stable_hash(data: bytes) -> int:
    h = 0x9E3779B97F4A7C15 ^ len(data)
    # Words of eight bytes, the last one (also an empty one) filled up with zeros.
    starts = range(0, max(len(data), 1), 8)
    for start in starts:
        word = int.from_bytes(data[start : start + 8], "little")
        h = (h ^ word) * 0xD6E8FEB86659FD93 & ALL_64
        if start != starts[-1]:
            h ^= h >> 32
    return finish(h)


def mix(key: int, name: int) -> int:
    return finish(key ^ name)


@dataclass(frozen=True)
class Rule:
    matches: tuple[tuple[str, str], ...]
    """(colour | lane | version | key | h.<header>, value): all of them must hold."""
    nodes: tuple[tuple[str, int], ...]

    def holds(self, headers: Mapping[str, str]) -> bool:
        return all(
            headers.get(name if name.startswith("h.") else f"fm.{name}") == value
            for name, value in self.matches
        )


@dataclass(frozen=True)
class Schedule:
    nodes: tuple[tuple[str, int], ...]
    rules: tuple[Rule, ...]
    local: str
    dialled: frozenset[str]
    """Who has a forward service that we know; `local` needs none."""

    def ring(self, names: Collection[str]) -> list[str]:
        """In the order of the ring: by hash, from this node on."""
        origin = stable_hash(self.local.encode())
        order = {name: number for number, (name, _) in enumerate(self.nodes)}
        return sorted(names, key=lambda n: ((stable_hash(n.encode()) - origin) & ALL_64, order[n]))

    def layout(self) -> object:
        """What must not have changed for the rules' claims to stay true."""
        return [
            (rule.matches, self.ring([name for name, weight in rule.nodes if weight]))
            for rule in self.rules
        ]


@dataclass
class Claims:
    """What the nodes of one rule are owed, in messages times `total`; only who was reachable."""

    total: int = 0
    owed: dict[str, int] = field(default_factory=dict)


@dataclass
class Share:
    part: int = 50
    last: str = ""
    """Who was last served in turn; "" = nobody yet: the ring begins behind this node."""
    claims: list[Claims] = field(default_factory=list)
    layout: object = None

    def reset(self, schedule: Schedule) -> None:
        if self.layout != schedule.layout():
            self.layout = schedule.layout()
            self.claims = [Claims() for _ in schedule.rules]


def choose(
    schedule: Schedule,
    share: Share,
    headers: Mapping[str, str],
    reachable: Collection[str],
    ordered: bool,
) -> tuple[str | None, str]:
    """The node that takes it (None: it stays here, for want of another) and why."""
    weights = dict(schedule.nodes)
    local = schedule.local
    if local not in weights:
        return None, "unscheduled"
    here = {n for n in reachable if n == local or n in schedule.dialled}
    key = stable_hash(headers["fm.key"].encode()) if ordered and "fm.key" in headers else None
    for number, rule in enumerate(schedule.rules):
        if rule.holds(headers):
            found = {name: weight for name, weight in rule.nodes if weight and name in here}
            order = schedule.ring(found)
            if not found:
                return None, "no_peer"
            if key is not None:
                return by_key(key, order, found), "rule"
            return by_claim(share.claims[number], order, found), "rule"
    if key is not None:
        if (key >> 32) * 100 >> 32 < weights[local]:
            return local, "share"
    else:
        share.part += weights[local]
        if share.part >= 100:
            share.part -= 100
            return local, "share"
    full = [name for name, weight in schedule.nodes if weight == 100 and name != local]
    order = schedule.ring([name for name in full if name in here])
    if not order:
        return None, "no_peer"
    if key is not None:
        return by_key(key, order, dict.fromkeys(order, 100)), "share"
    origin = stable_hash(local.encode())
    last = (stable_hash(share.last.encode()) - origin) & ALL_64 if share.last else 0
    behind = [n for n in order if (stable_hash(n.encode()) - origin) & ALL_64 > last]
    share.last = (behind or order)[0]
    return share.last, "share"


def by_key(key: int, order: Sequence[str], weights: Mapping[str, int]) -> str:
    """Rendezvous: each node draws an exponential time at the rate of its weight, the earliest
    wins. (With equal weights that is the highest draw.)"""

    def time(name: str) -> float:
        drawn = mix(key, stable_hash(name.encode()))
        return -math.log(((drawn >> 11) + 0.5) * 2.0**-53) / weights[name]

    if len(set(weights.values())) == 1:
        return max(order, key=lambda name: mix(key, stable_hash(name.encode())))
    return min(order, key=time)


def by_claim(claims: Claims, order: Sequence[str], weights: Mapping[str, int]) -> str:
    """Of those that are owed anything, the one whose claim would be a whole message first."""
    total = sum(weights.values())
    if claims.total != total or set(claims.owed) != set(order):
        settle(claims, order, weights, total)
    for name in order:
        claims.owed[name] += weights[name]
    due = [name for name in order if claims.owed[name] > 0]
    # (total - owed) / weight, compared without dividing
    first = due[0]
    for name in due[1:]:
        if (total - claims.owed[name]) * weights[first] < (total - claims.owed[first]) * weights[
            name
        ]:
            first = name
    claims.owed[first] -= total
    return first


def settle(claims: Claims, order: Sequence[str], weights: Mapping[str, int], total: int) -> None:
    """Claims of the leavers are shared out, the rest are told in units of the new total."""
    kept = {name: claims.owed.get(name, 0) for name in order}
    left = sum(kept.values())
    if claims.total:
        kept = {n: (kept[n] * total - left * weights[n]) // claims.total for n in order}
    if any(abs(claim) > total for claim in kept.values()) or not claims.total:
        kept = dict.fromkeys(order, 0)
    for name in order[: -sum(kept.values())]:
        kept[name] += 1
    claims.total = total
    claims.owed = kept
