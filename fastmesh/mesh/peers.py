"""The other nodes: hello, and who has a live consumer of which group.

On every pair of nodes there are two connections, one dialled by each. The node that was dialled
announces its live groups on it, so that whoever dialled knows what it may forward there:

    we dial a peer     -> we say hello; it announces; the engine is told (`peer_groups`)
    a peer dials us    -> it says hello; we announce, on every change and each interval

A peer that has said nothing for three intervals is taken to have no consumer at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from fastmesh import limits, saved
from fastmesh._ext import push
from fastmesh._ext.push import Push
from fastmesh.mesh import wire as w
from fastmesh.mesh.wire import Outcome, Wire, answer
from fastmesh.observe.log import Log
from fastmesh.protocols import push as words
from fastmesh.protocols.push import Announce, Assembler, Hello, Row, announce_parts


@dataclass(slots=True)
class PeerLink:
    """A connection that we dialled: to the forward service of another node."""

    handle: int
    endpoint_id: int
    met: bool = False
    due_ms: int | None = None
    """When hello is said again; None = it is under way, or was accepted."""
    heard_ms: int = 0
    parts: Assembler = field(default_factory=Assembler)
    groups: frozenset[str] = frozenset()
    told: tuple[int, ...] | None = None
    """None: nothing yet, and what was said last of the connection before may still be in force."""
    failure: str = ""


@dataclass(slots=True)
class PeerClient:
    """A connection that a peer dialled: to our forward service."""

    handle: int
    node: str = ""
    """Its name, once it said hello."""
    due_ms: int = 0
    """When it is told again, changed or not."""
    told: int = -1


Names = Annotated[list[saved.Text], msgspec.Meta(max_length=limits.SAVED_NAMES_MAX)]


class SavedPart(msgspec.Struct, gc=False):
    """Of an announce that is not whole."""

    epoch: saved.Count
    groups: Names
    part: Annotated[int, msgspec.Meta(ge=1, le=limits.ANNOUNCE_PARTS_MAX)]
    parts: Annotated[int, msgspec.Meta(ge=1, le=limits.ANNOUNCE_PARTS_MAX)]


class SavedPeerLink(msgspec.Struct, gc=False, omit_defaults=True):
    handle: saved.Handle
    endpoint: saved.Id
    met: bool = False
    due_in_ms: saved.Ms | None = None
    """0 when its hello was not answered: it is said again."""
    heard_ms_ago: saved.Ms = 0
    epoch: Annotated[int, msgspec.Meta(ge=-1, le=limits.NUMBER_MAX)] = -1
    parts: Annotated[list[SavedPart], msgspec.Meta(max_length=limits.ANNOUNCE_PARTS_MAX)] = []
    groups: Names = []
    failure: saved.Text = ""


class SavedPeerClient(msgspec.Struct, gc=False, omit_defaults=True):
    handle: saved.Handle
    node: saved.Text = ""
    due_in_ms: saved.Ms = 0
    told: Annotated[int, msgspec.Meta(ge=-1)] = -1


class SavedPeers(msgspec.Struct, omit_defaults=True):
    links: list[SavedPeerLink] = []
    clients: list[SavedPeerClient] = []
    version: saved.Count = 0
    epoch: saved.Count = 0
    leaving: bool = False
    seen: Names = []
    changed: bool = False


class Peers:
    """All connections with other nodes."""

    def __init__(
        self,
        wire: Wire,
        log: Log,
        *,
        node: str,
        app: str,
        interval_ms: int,
        name: Callable[[int], str],
        live: Callable[[], Iterable[str]],
    ) -> None:
        self.interval_ms = interval_ms
        self._wire = wire
        self._log = log
        self._node = node
        self._app = app
        self._name = name
        self._live = live
        self._links: dict[int, PeerLink] = {}
        self._clients: dict[int, PeerClient] = {}
        self._ids: Mapping[str, int] = {}
        self._version = 0
        self._epoch = 0
        self._leaving = False
        self._seen: frozenset[str] = frozenset()
        """Groups that were alive when peers were last told."""
        self._changed = False
        self._untold = False
        """The engine is to be told again what peers serve."""

    def __contains__(self, handle: int) -> bool:
        return handle in self._links or handle in self._clients

    def handles(self) -> list[int]:
        return [*self._links, *self._clients]

    # --- connections that we dialled --------------------------------------------------------------

    def opened(self, handle: int, endpoint_id: int, now_ms: int) -> None:
        link = self._links[handle] = PeerLink(handle, endpoint_id, heard_ms=now_ms)
        self._hello(link)

    def _hello(self, link: PeerLink) -> None:
        link.due_ms = None
        said = Hello(self._app, self._node).headers()

        def met(found: Outcome, now_ms: int) -> None:
            if self._links.get(link.handle) is not link:
                return
            link.met = found.result == words.CONSUMED
            if link.met:
                link.failure = ""
                return
            link.due_ms = now_ms + limits.CONTROL_RETRY_MS_MAX
            link.failure = w.short(found.why)
            self._log.limited(
                "warning",
                f"peer {link.endpoint_id}",
                "peer refuses hello",
                peer=self._name(link.endpoint_id),
                reason=link.failure,
            )

        self._wire.call(link.handle, said, met)

    def _announced(self, link: PeerLink, asked: Push, now_ms: int) -> None:
        """Raises ValueError."""
        rows = link.parts.add(Announce.parse_peer(asked.headers))
        link.heard_ms = now_ms
        if rows is not None:
            link.groups = frozenset(row.group for row in rows)
            self._tell(link)

    def _tell(self, link: PeerLink) -> None:
        ids = tuple(sorted(self._ids[name] for name in link.groups if name in self._ids))
        if ids != link.told:
            link.told = ids
            self._wire.peer_groups(link.endpoint_id, ids)

    # --- connections that peers dialled -----------------------------------------------------------

    def accepted(self, handle: int) -> None:
        self._clients[handle] = PeerClient(handle)

    def _greet(self, client: PeerClient, asked: Push, now_ms: int) -> None:
        try:
            said = Hello.parse(asked.headers)
        except ValueError as wrong:
            self._refuse(client, asked, str(wrong))
            return
        if said.understood and said.client == self._node:
            reason = f"{words.CLIENT} is {self._node}, the name of this node itself"
            self._refuse(client, asked, reason)
            return
        if said.understood:
            client.node = said.client
            client.due_ms = now_ms
            client.told = -1
        reply = answer(asked, said.answer())
        self._wire.reply(client.handle, reply, greet=said.understood)

    def _refuse(self, client: PeerClient, asked: Push, reason: str) -> None:
        self._wire.reply(client.handle, answer(asked, words.answer(words.REJECT, reason)))

    # --- both -------------------------------------------------------------------------------------

    def gone(self, handle: int) -> None:
        self._links.pop(handle, None)  # the engine has already forgotten what it served
        self._clients.pop(handle, None)

    def frame(self, handle: int, asked: Push, now_ms: int) -> None:
        """What a peer asks beside forwards."""
        op = asked.headers.get(words.OP, "")
        if (client := self._clients.get(handle)) is not None:
            if op == words.HELLO:
                self._greet(client, asked, now_ms)
            elif op == words.GOAWAY:
                client.node = ""  # nothing more is said to it
                self._wire.reply(handle, answer(asked, words.answer(words.CONSUMED)))
            elif not client.node:
                self._refuse(client, asked, f"{w.shown(op) or 'a request'} before hello")
            else:
                known = ", ".join((words.HELLO, words.FORWARD, words.GOAWAY))
                self._refuse(client, asked, f"{words.OP} {w.shown(op)} is none of {known}")
        elif (link := self._links.get(handle)) is not None:
            said = answer(asked, self._heard(link, op, asked, now_ms))
            if said:
                self._wire.send(handle, said)

    def _heard(self, link: PeerLink, op: str, asked: Push, now_ms: int) -> Mapping[str, str]:
        """What is answered to a peer that we dialled."""
        if op == words.ANNOUNCE:
            try:
                self._announced(link, asked, now_ms)
            except ValueError as wrong:
                link.failure = w.short(f"announce: {wrong}")
                return words.answer(words.REJECT, str(wrong))
        elif op == words.GOAWAY:
            link.groups = frozenset()
            self._tell(link)
        else:
            reason = f"{words.OP} {w.shown(op)} is not taken from a peer"
            return words.answer(words.REJECT, reason)
        return words.answer(words.CONSUMED)

    def compiled(self, ids: Mapping[str, int]) -> None:
        """The numbers of groups in the snapshot that was just published."""
        before, self._ids = self._ids, dict(ids)
        moved = {n for n in before.keys() | ids.keys() if before.get(n) != ids.get(n)}
        for link in self._links.values():
            if not moved.isdisjoint(link.groups):
                self._tell(link)

    def changed(self) -> None:
        """Some group may have come to life, or have nobody left."""
        self._changed = True

    def leave(self) -> None:
        """We serve nobody any more: peers forward nothing from now on."""
        self._leaving = True
        self._version += 1

    def stay(self) -> None:
        """`leave` is taken back."""
        self._leaving = False
        self._version += 1

    def tick(self, now_ms: int) -> None:
        """Say and forget what is due."""
        if self._untold:
            self._untold = False
            for link in self._links.values():
                if link.told is None and link.groups:
                    self._tell(link)
        if self._changed:
            self._changed = False
            now = frozenset(self._live())
            if now != self._seen:  # more of the same is no news
                self._seen = now
                self._version += 1
        due = [
            client
            for client in self._clients.values()
            if client.node and (client.told != self._version or now_ms >= client.due_ms)
        ]
        if due:
            frames = self._frames()
            for client in due:
                client.told = self._version
                client.due_ms = now_ms + self.interval_ms
                for frame in frames:
                    self._wire.send(client.handle, frame)
        silent_ms = self.interval_ms * limits.PEER_SILENT_INTERVALS
        for link in self._links.values():
            if link.due_ms is not None and now_ms >= link.due_ms:
                self._hello(link)
            if link.groups and now_ms - link.heard_ms >= silent_ms:
                self._log.limited(
                    "warning",
                    f"silent {link.endpoint_id}",
                    "peer is silent: nothing is forwarded there",
                    peer=self._name(link.endpoint_id),
                    after_ms=now_ms - link.heard_ms,
                )
                link.groups = frozenset()
                self._tell(link)

    @property
    def due_ms(self) -> int | None:
        """When `tick` has something to do."""
        found = [0] if self._changed or self._untold else []
        found += [
            0 if client.told != self._version else client.due_ms
            for client in self._clients.values()
            if client.node
        ]
        for link in self._links.values():
            if link.due_ms is not None:
                found.append(link.due_ms)
            if link.groups:
                found.append(link.heard_ms + self.interval_ms * limits.PEER_SILENT_INTERVALS)
        return min(found, default=None)

    def status(self) -> list[dict[str, Any]]:
        return [
            {
                "peer": self._name(link.endpoint_id),
                "greeted": link.met,
                "groups": len(link.groups),
                "failure": link.failure,
            }
            for link in self._links.values()
        ]

    def serving(self, group: str) -> list[str]:
        """Peers that have a live consumer of a group."""
        return [self._name(x.endpoint_id) for x in self._links.values() if group in x.groups]

    # --- hand-over --------------------------------------------------------------------------------

    def save(self, now_ms: int) -> SavedPeers:
        links = []
        for link in self._links.values():
            due_ms = link.due_ms
            if due_ms is None and not link.met:
                due_ms = now_ms  # who waits for the answer to hello does not travel
            links.append(
                SavedPeerLink(
                    link.handle,
                    link.endpoint_id,
                    link.met,
                    None if due_ms is None else max(0, due_ms - now_ms),
                    max(0, now_ms - link.heard_ms),
                    link.parts.epoch,
                    [
                        SavedPart(p.epoch, [row.group for row in p.rows], p.part, p.parts)
                        for p in link.parts.parts()
                    ],
                    sorted(link.groups),
                    link.failure,
                )
            )
        clients = [
            SavedPeerClient(c.handle, c.node, max(0, c.due_ms - now_ms), c.told)
            for c in self._clients.values()
        ]
        return SavedPeers(
            links,
            clients,
            self._version,
            self._epoch,
            self._leaving,
            sorted(self._seen),
            self._changed,
        )

    def restore(self, data: object, ids: Mapping[str, int], now_ms: int) -> None:
        """Go on with the connections of another process, and no others; `ids`: the numbers of
        groups in its last snapshot. Nothing is said here; `tick` does. What peers serve the engine
        is told once more: that is the same or it is needed. Raises HandoverError, and has to be
        called again then."""
        found = saved.read(data, SavedPeers, "peers")
        self._ids = dict(ids)
        self._links.clear()
        self._clients.clear()
        for item in found.links:
            parts = [
                Announce(p.epoch, tuple(Row(name, "") for name in p.groups), p.part, p.parts)
                for p in item.parts
            ]
            try:
                assembler = Assembler.going_on(item.epoch, parts)
            except ValueError as error:
                raise saved.wrong("peers.links.parts", len(parts), str(error)) from None
            self._links[item.handle] = PeerLink(
                item.handle,
                item.endpoint,
                item.met,
                None if item.due_in_ms is None else now_ms + item.due_in_ms,
                now_ms - item.heard_ms_ago,
                assembler,
                frozenset(item.groups),
                failure=item.failure,
            )
        for one in found.clients:
            due_ms = now_ms + one.due_in_ms
            self._clients[one.handle] = PeerClient(one.handle, one.node, due_ms, one.told)
        self._version, self._epoch = found.version, found.epoch
        self._leaving, self._changed = found.leaving, found.changed
        self._seen = frozenset(found.seen)
        self._untold = any(link.groups for link in self._links.values())

    def introduce(self, now_ms: int) -> None:
        """Say hello on every connection that we dialled again."""
        for link in self._links.values():
            link.met, link.due_ms = False, now_ms

    def _frames(self) -> list[bytes]:
        self._epoch += 1
        names = () if self._leaving else sorted(self._seen)
        parts = announce_parts([Row(name, "") for name in names], self._epoch, peer=True)
        return [push.request(1, headers, oneway=True) for headers in parts]
