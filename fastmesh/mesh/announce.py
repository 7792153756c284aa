"""What the brokers are told: on each of their connections hello, then the full subscription, again
after every change.

    opened -> hello -> ready <-> announcing -> gone
                  \\-> refused, asked again later

Changes are folded: at most one announce is under way on a connection, and everything that changes
meanwhile becomes one more. What is refused or not answered is tried again after a while that
doubles, and stands in the status until it succeeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from fastmesh import limits, saved
from fastmesh._ext.push import Push
from fastmesh.mesh import wire as w
from fastmesh.mesh.registration import Group
from fastmesh.mesh.wire import Outcome, Wire, answer
from fastmesh.observe.log import Log
from fastmesh.protocols import push as words
from fastmesh.protocols.push import Hello, Row, announce_parts

Live = Mapping[str, tuple[int, int]]
"""Group -> (live connections, credit); only those with a connection."""


def subscription(groups: Mapping[str, Group], live: Live) -> list[Row]:
    """One row of an announce for each role of each group that has a live connection."""
    return [
        Row(
            name,
            group.topic,
            role,
            live[name][1],
            group.mode,
            group.ordered,
            group.filter if role == words.SUBSCRIBE else "",
        )
        for name in sorted(live)
        if (group := groups.get(name)) is not None
        for role in words.ROLES
        if role in group.roles
    ]


@dataclass(slots=True)
class BrokerLink:
    """One broker connection."""

    handle: int
    endpoint_id: int
    state: str = "hello"
    """hello | refused | ready"""
    told: int = -1
    """The version of the subscription that it was sent last."""
    taken: int = -1
    """... and that it took."""
    under_way: int = 0
    """Frames of an announce (or a hello) that are not answered."""
    failure: str = ""
    """Why the last one was not taken; "" when it was."""
    failures: int = 0
    due_ms: int = 0
    """Not before then."""
    paused: bool = False
    """It asked for no new requests: suspend, or goaway."""
    suspended: bool | None = False
    """What it has taken last: that it pushes nothing. None = it was asked, and nobody knows."""
    asking: bool = False
    """Suspend or resume is not answered."""
    asks_again_ms: int = 0
    """Not before then."""
    unasked: str = ""
    """Why it did not take the last one; "" when it did."""


Version = Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]


class SavedBrokerLink(msgspec.Struct, gc=False, omit_defaults=True):
    handle: saved.Handle
    endpoint: saved.Id
    state: Literal["hello", "refused", "ready"] = "hello"
    """A hello that was not answered is said again."""
    told: Version = -1
    taken: Version = -1
    failure: saved.Text = ""
    failures: saved.Count = 0
    due_in_ms: saved.Ms = 0
    paused: bool = False
    suspended: bool | None = False
    asks_again_in_ms: saved.Ms = 0
    unasked: saved.Text = ""


class SavedAnnouncer(msgspec.Struct, omit_defaults=True):
    links: list[SavedBrokerLink] = []
    version: saved.Count = 0
    rows: saved.Text = ""
    """Sum of the subscription with that version."""
    epoch: saved.Count = 0
    suspended: bool = False


class Announcer:
    """All broker connections of this node. `paused` is called when a broker wants no requests, or
    wants them again."""

    def __init__(
        self,
        wire: Wire,
        log: Log,
        *,
        node: str,
        app: str,
        name: Callable[[int], str],
        view: Callable[[], tuple[Mapping[str, Group], Live]],
        paused: Callable[[], None],
    ) -> None:
        self._wire = wire
        self._log = log
        self._node = node
        self._app = app
        self._name = name
        self._view = view
        self._paused = paused
        self._links: dict[int, BrokerLink] = {}
        self._stale = False
        """Something changed since the subscription was worked out."""
        self._version = 0
        """Of the subscription: what differs from the last has another."""
        self._rows: list[Row] = []
        self._epoch = 0
        self._made: tuple[int, list[dict[str, str]]] = (-1, [])
        self._suspended = False

    def __contains__(self, handle: int) -> bool:
        return handle in self._links

    def links(self) -> Iterable[BrokerLink]:
        return self._links.values()

    def handles(self) -> list[int]:
        return list(self._links)

    def paused_endpoints(self) -> frozenset[int]:
        """Ids of endpoints that are to get no new requests."""
        return frozenset(link.endpoint_id for link in self._links.values() if link.paused)

    # --- from the engine --------------------------------------------------------------------------

    def opened(self, handle: int, endpoint_id: int, now_ms: int) -> None:
        link = self._links[handle] = BrokerLink(handle, endpoint_id)
        self._hello(link)

    def gone(self, handle: int) -> None:
        link = self._links.pop(handle, None)
        if link is not None and link.paused:
            self._paused()

    def frame(self, handle: int, asked: Push) -> None:
        """What a broker asks beside deliveries and checks."""
        link = self._links.get(handle)
        if link is None:
            return
        op = asked.headers.get(words.OP, "")
        if op in (words.GOAWAY, words.SUSPEND, words.RESUME):
            was, link.paused = link.paused, op != words.RESUME
            if was != link.paused:
                self._log.limited(
                    "info", f"broker {op}", f"broker said {op}", broker=self._name(link.endpoint_id)
                )
                self._paused()
            said = answer(asked, words.answer(words.CONSUMED))
        else:
            shown = w.shown(op) or "nothing"
            self._log.limited(
                "warning",
                "broker op",
                "broker asked what is not known here",
                broker=self._name(link.endpoint_id),
                op=shown,
            )
            reason = f"{words.OP} {shown} is not taken from a broker"
            said = answer(asked, words.answer(words.REJECT, reason))
        if said:
            self._wire.send(handle, said)

    # --- from the control plane -------------------------------------------------------------------

    def changed(self) -> None:
        """Groups, their live connections or their credit may be different."""
        self._stale = True

    def suspend(self) -> None:
        """Every broker is to push nothing more on our connections, those to come included."""
        self._want(True)

    def resume(self, now_ms: int) -> None:
        """Brokers may push again. What they are told of groups waits a moment: clients that were
        out of them are about to be back."""
        self._want(False)
        for link in self._links.values():
            link.due_ms = max(link.due_ms, now_ms + limits.ANNOUNCE_GAP_MS)

    def _want(self, suspended: bool) -> None:
        self._suspended = suspended
        for link in self._links.values():
            link.asks_again_ms = 0
            link.unasked = ""

    def suspending(self) -> list[str]:
        """Names of brokers that have not answered the suspend, one way or the other."""
        return [
            self._name(link.endpoint_id)
            for link in self._links.values()
            if self._suspended and self._differs(link) and not link.unasked
        ]

    def pushing(self) -> dict[str, str]:
        """Brokers that were asked to push nothing more and have not agreed -> why."""
        return {
            self._name(link.endpoint_id): link.unasked or "no answer yet"
            for link in self._links.values()
            if self._suspended and self._differs(link)
        }

    def _differs(self, link: BrokerLink) -> bool:
        """Whether it has not taken that it is to push nothing, or may again."""
        return link.state == "ready" and link.suspended is not self._suspended

    def tick(self, now_ms: int) -> None:
        """Say what is due."""
        for link in self._links.values():
            if self._differs(link) and not link.asking and now_ms >= link.asks_again_ms:
                self._ask(link)
            if link.under_way or now_ms < link.due_ms:
                continue
            if link.state != "ready":
                self._hello(link)
            elif self._may_need(link):
                self._announce(link, now_ms)

    @property
    def due_ms(self) -> int | None:
        """When `tick` has something to do."""
        found = [
            link.due_ms
            for link in self._links.values()
            if not link.under_way and (link.state != "ready" or self._may_need(link))
        ]
        found += [
            link.asks_again_ms
            for link in self._links.values()
            if self._differs(link) and not link.asking
        ]
        return min(found, default=None)

    def _may_need(self, link: BrokerLink) -> bool:
        """Whether it has (perhaps) not heard the newest subscription."""
        if link.state != "ready" or self._suspended:
            return False
        return self._stale or link.told != self._version

    def status(self) -> list[dict[str, Any]]:
        return [
            {
                "broker": self._name(link.endpoint_id),
                "state": link.state,
                "announced": link.taken == self._version and not self._stale,
                "failure": link.failure,
                "paused": link.paused,
                "suspended": link.suspended is True,
            }
            for link in self._links.values()
        ]

    # --- hand-over --------------------------------------------------------------------------------

    def save(self, now_ms: int) -> SavedAnnouncer:
        """What waits for an answer does not travel: a link is saved in the state in which that is
        said again, to be taken as new: announces have another epoch."""
        version, rows = self._version, self._rows
        if self._stale:
            # As the next announce would find it: the one who goes on knows only what is.
            rows = subscription(*self._view())
            version += rows != self._rows
        links = [
            SavedBrokerLink(
                link.handle,
                link.endpoint_id,
                link.state,  # type: ignore[arg-type]  # one of the three
                -1 if link.under_way else link.told,
                link.taken,
                link.failure,
                link.failures,
                0 if link.under_way else max(0, link.due_ms - now_ms),
                link.paused,
                link.suspended,  # None while the answer is awaited
                0 if link.asking else max(0, link.asks_again_ms - now_ms),
                link.unasked,
            )
            for link in self._links.values()
        ]
        return SavedAnnouncer(links, version, _sum(rows), self._epoch, self._suspended)

    def restore(self, data: object, now_ms: int) -> None:
        """Go on with the connections of another process, and no others. Registry and live groups
        are restored before. Nothing is said here; `tick` says what is due. Raises HandoverError,
        and has to be called again then."""
        found = saved.read(data, SavedAnnouncer, "brokers")
        self._links.clear()
        for item in found.links:
            if item.told > found.version or item.taken > found.version:
                right = f"is not above version {found.version}"
                raise saved.wrong("brokers.links.told", max(item.told, item.taken), right)
            self._links[item.handle] = BrokerLink(
                item.handle,
                item.endpoint,
                item.state,
                item.told,
                item.taken,
                failure=item.failure,
                failures=item.failures,
                due_ms=now_ms + item.due_in_ms,
                paused=item.paused,
                suspended=item.suspended,
                asks_again_ms=now_ms + item.asks_again_in_ms,
                unasked=item.unasked,
            )
        self._rows = subscription(*self._view())
        # Another version of fastmesh may tell brokers something else of the same groups.
        self._version = found.version + (_sum(self._rows) != found.rows)
        self._stale = False
        self._epoch = found.epoch
        self._made = (-1, [])
        self._suspended = found.suspended

    def introduce(self, now_ms: int) -> None:
        """Say hello on every connection again, and announce after it."""
        for link in self._links.values():
            link.state, link.told, link.due_ms = "hello", -1, now_ms

    # --- inside -----------------------------------------------------------------------------------

    def _hello(self, link: BrokerLink) -> None:
        link.state = "hello"
        link.under_way = 1
        said = Hello(self._app, self._node).headers()
        self._wire.call(link.handle, said, lambda found, now_ms: self._met(link, found, now_ms))

    def _met(self, link: BrokerLink, found: Outcome, now_ms: int) -> None:
        link.under_way = 0
        if self._links.get(link.handle) is not link:
            return
        if found.result != words.CONSUMED:
            link.state = "refused"
            self._failed(link, "hello", found, now_ms)
            return
        self._succeeded(link)
        link.state = "ready"
        if self._suspended:
            self._ask(link)
        else:
            self._announce(link, now_ms)

    def _announce(self, link: BrokerLink, now_ms: int) -> None:
        if self._stale:
            self._stale = False
            rows = subscription(*self._view())
            if rows != self._rows:
                self._rows = rows
                self._version += 1
        if link.told == self._version:
            return  # what changed is nothing that brokers are told
        if self._made[0] != self._version:
            # Nothing that is read has the same epoch: parts of two announces never make one.
            self._epoch += 1
            try:
                self._made = (self._version, announce_parts(self._rows, self._epoch))
            except ValueError as beyond:  # more than one announce may be
                self._failed(link, "announce", Outcome(0, {words.REASON: str(beyond)}), now_ms)
                return
        version, parts = self._made
        link.told = version
        link.under_way = len(parts)
        link.due_ms = now_ms + limits.ANNOUNCE_GAP_MS
        wrong: list[Outcome] = []

        def answered(found: Outcome, now_ms: int) -> None:
            link.under_way -= 1
            if found.result != words.CONSUMED:
                wrong.append(found)
            if link.under_way or self._links.get(link.handle) is not link:
                return
            if wrong:
                link.told = -1
                self._made = (-1, [])  # a new epoch for the next try
                self._failed(link, "announce", wrong[0], now_ms)
            else:
                link.taken = version
                self._succeeded(link)

        for headers in parts:
            self._wire.call(link.handle, headers, answered)

    def _ask(self, link: BrokerLink) -> None:
        """Suspend, or resume."""
        suspended = self._suspended
        op = words.SUSPEND if suspended else words.RESUME
        link.asking = True
        link.suspended = None

        def answered(found: Outcome, now_ms: int) -> None:
            link.asking = False
            if self._links.get(link.handle) is not link:
                return
            if found.result == words.CONSUMED:
                link.suspended = suspended
                link.unasked = ""
                return
            if suspended is not self._suspended:
                return  # the other is due by now
            wait_ms = limits.CONTROL_RETRY_MS
            if found.result == words.LATER:
                asked_ms = words.retry_ms(found.headers)
                wait_ms = min(limits.CONTROL_RETRY_MS_MAX, max(limits.ANNOUNCE_GAP_MS, asked_ms))
            else:
                link.unasked = w.short(found.why)
            link.asks_again_ms = now_ms + wait_ms
            self._log.limited(
                "warning",
                f"{op} {link.endpoint_id}",
                f"broker does not take {op}",
                broker=self._name(link.endpoint_id),
                reason=w.short(found.why),
            )

        self._wire.call(link.handle, {words.OP: op}, answered)

    def _failed(self, link: BrokerLink, what: str, found: Outcome, now_ms: int) -> None:
        link.failures += 1
        first, most = limits.CONTROL_RETRY_MS, limits.CONTROL_RETRY_MS_MAX
        wait_ms = min(most, first << min(link.failures - 1, 16))
        if found.result == words.LATER:
            wait_ms = min(most, max(limits.ANNOUNCE_GAP_MS, words.retry_ms(found.headers)))
        link.due_ms = now_ms + wait_ms
        link.failure = w.short(f"{what}: {found.why}")
        self._log.limited(
            "warning",
            f"announce {link.endpoint_id}",
            "broker does not take what it is told",
            broker=self._name(link.endpoint_id),
            what=what,
            reason=w.short(found.why),
            retry_ms=wait_ms,
        )

    def _succeeded(self, link: BrokerLink) -> None:
        link.failures = 0
        link.failure = ""


def _sum(rows: Sequence[Row]) -> str:
    return hashlib.sha256(msgspec.json.encode(rows)).hexdigest()[:32]
