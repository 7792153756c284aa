"""What the brokers are told: on each of their connections hello, then the full subscription, again
after every change.

    opened -> hello -> ready <-> announcing -> gone
                  \\-> refused, asked again later

Changes are folded: at most one announce is under way on a connection, and everything that changes
meanwhile becomes one more. What is refused or not answered is tried again after a while that
doubles, and stands in the status until it succeeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastmesh import limits
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
        self._unsuspended: set[int] = set()

    def __contains__(self, handle: int) -> bool:
        return handle in self._links

    def links(self) -> Iterable[BrokerLink]:
        return self._links.values()

    def paused_endpoints(self) -> frozenset[int]:
        """Ids of endpoints that are to get no new requests."""
        return frozenset(link.endpoint_id for link in self._links.values() if link.paused)

    # --- from the engine --------------------------------------------------------------------------

    def opened(self, handle: int, endpoint_id: int, now_ms: int) -> None:
        link = self._links[handle] = BrokerLink(handle, endpoint_id)
        self._hello(link)

    def gone(self, handle: int) -> None:
        link = self._links.pop(handle, None)
        self._unsuspended.discard(handle)
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
        """Tell every broker to push nothing more on our connections; for good."""
        self._suspended = True
        for link in self._links.values():
            self._suspend(link)

    @property
    def suspending(self) -> bool:
        """True while a broker has not answered the suspend."""
        return bool(self._unsuspended)

    def tick(self, now_ms: int) -> None:
        """Say what is due."""
        for link in self._links.values():
            if link.under_way or now_ms < link.due_ms:
                continue
            if link.state == "refused":
                self._hello(link)
            elif self._may_need(link):
                self._announce(link, now_ms)

    @property
    def due_ms(self) -> int | None:
        """When `tick` has something to do."""
        return min(
            (
                link.due_ms
                for link in self._links.values()
                if not link.under_way and (link.state == "refused" or self._may_need(link))
            ),
            default=None,
        )

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
            }
            for link in self._links.values()
        ]

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
            self._suspend(link)
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

    def _suspend(self, link: BrokerLink) -> None:
        if link.state != "ready":
            return
        self._unsuspended.add(link.handle)
        self._wire.call(
            link.handle,
            {words.OP: words.SUSPEND},
            lambda found, now_ms: self._unsuspended.discard(link.handle),
        )

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
