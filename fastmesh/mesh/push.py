"""The control plane of the message mesh: everything that is decided per connection and per change,
never per message.

    engine events -> sessions (clients) · announce (brokers) · peers (other nodes) -> Wire -> engine
    registration, brokers, schedule -> MeshView -> snapshot -> `compiled`

`PushControl` knows no loop and no clock: events and times in ms come in, what has to be said goes
to a `Wire`, and `due_ms` tells when `tick` has something to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol

import msgspec

from fastmesh import limits, saved
from fastmesh._ext import push
from fastmesh.control.snapshot import Compiled, GroupView
from fastmesh.mesh.announce import Announcer, SavedAnnouncer
from fastmesh.mesh.peers import Peers, SavedPeers
from fastmesh.mesh.registration import Change, Group
from fastmesh.mesh.sessions import Clients, SavedSessions, Sessions
from fastmesh.mesh.wire import Wire, answer
from fastmesh.observe.log import Log
from fastmesh.protocols import push as words

CLIENT = 0
DIALLED = 1
"""c of an event about a connection: one of a client or a peer, or one that we dialled."""


class Registry(Clients, Protocol):
    """The part of the registration that is asked here."""

    def groups(self) -> Mapping[str, Group]: ...
    def topics(self) -> Mapping[str, frozenset[str]]: ...


class Event(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def a(self) -> int: ...
    @property
    def b(self) -> int: ...
    @property
    def c(self) -> int: ...
    @property
    def data(self) -> bytes: ...


Number = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class SavedControl(msgspec.Struct, omit_defaults=True):
    kinds: dict[saved.Id, saved.Text] = {}
    """Of the last snapshot: id of a listener or endpoint -> push | forward | brokers | peers."""
    groups: Annotated[
        dict[saved.Text, saved.GroupId], msgspec.Meta(max_length=limits.GROUP_ID_MAX)
    ] = {}
    """Of the last snapshot."""
    live: Annotated[
        dict[saved.Text, tuple[Number, Number]], msgspec.Meta(max_length=limits.GROUP_ID_MAX)
    ] = {}
    node: saved.Text = ""
    app: saved.Text = ""
    """Who brokers and peers were told that this is."""
    sessions: SavedSessions = msgspec.field(default_factory=SavedSessions)
    announcer: SavedAnnouncer = msgspec.field(default_factory=SavedAnnouncer)
    peers: SavedPeers = msgspec.field(default_factory=SavedPeers)


class PushControl:
    """`recompile` asks for a new snapshot, soon and folded; `name` turns the id of an endpoint into
    its name."""

    def __init__(
        self,
        wire: Wire,
        registry: Registry,
        log: Log,
        *,
        node: str,
        app: str,
        interval_ms: int,
        name: Callable[[int], str],
        recompile: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._wire = wire
        self._log = log
        self._recompile = recompile
        self._identity = (node, app)
        self._kinds: dict[int, str] = {}
        self._kept: set[int] = set()
        self._names: dict[int, str] = {}
        self.live: dict[str, tuple[int, int]] = {}
        """Group -> (live connections, credit) on this node; only those with a connection."""
        self.sessions = Sessions(wire, registry)
        self.announcer = Announcer(
            wire,
            log,
            node=node,
            app=app,
            name=name,
            view=lambda: (registry.groups(), self.live),
            paused=recompile,
        )
        self.peers = Peers(
            wire,
            log,
            node=node,
            app=app,
            interval_ms=interval_ms,
            name=name,
            live=lambda: self.live,
        )

    # --- from the engine --------------------------------------------------------------------------

    def take(self, event: Event, now_ms: int) -> None:
        """One of observe.events.PUSH_KINDS; answers are the wire's."""
        if event.kind == "frame":
            self._frame(event, now_ms)
        elif event.kind == "group":
            self._group(event.a, event.b, event.c)
        elif event.kind == "opened":
            self._opened(event, now_ms)
        elif event.kind == "gone":
            self.sessions.gone(event.a, now_ms)
            self.announcer.gone(event.a)
            self.peers.gone(event.a)

    def _opened(self, event: Event, now_ms: int) -> None:
        kind = self._kinds.get(event.b, "")
        if kind == "push":
            self.sessions.opened(event.a)
        elif kind == "forward":
            self.peers.accepted(event.a)
        elif kind == "brokers":
            self.announcer.opened(event.a, event.b, now_ms)
        elif kind == "peers":
            self.peers.opened(event.a, event.b, now_ms)

    def _frame(self, event: Event, now_ms: int) -> None:
        handle = event.a
        try:
            asked = push.parse(event.data)
        except ValueError as wrong:
            # The engine has read its header section before; what is left to be wrong is text that
            # is not UTF-8.
            self._log.limited(
                "warning",
                "control frame",
                "control frame cannot be read",
                reason=str(wrong),
                first=event.data[:16].hex(),
            )
            self._wire.close(handle)
            return
        if handle in self.sessions:
            self.sessions.frame(handle, asked, now_ms)
        elif handle in self.announcer:
            self.announcer.frame(handle, asked)
        elif handle in self.peers:
            self.peers.frame(handle, asked, now_ms)
        elif event.c == CLIENT:
            # Its listener is of no snapshot that we remember: it is being drained.
            reason = "this listener is closing"
            said = words.answer(words.LATER, reason, retry_ms=limits.CONTROL_RETRY_MS)
            self._wire.reply(handle, answer(asked, said))
        else:
            reason = "ask on the connection that said hello"
            if refusal := answer(asked, words.answer(words.REJECT, reason)):
                self._wire.send(handle, refusal)

    def _group(self, number: int, connections: int, credit: int) -> None:
        name = self._names.get(number)
        if name is None:
            return
        if connections:
            self.live[name] = (connections, credit)
        elif self.live.pop(name, None) is None:
            return
        self.announcer.changed()
        self.peers.changed()

    # --- from the control plane -------------------------------------------------------------------

    def registered(self, change: Change) -> None:
        """The registration is different."""
        self.sessions.changed(change.clients)
        if change.groups:
            self.announcer.changed()
        self._recompile()

    def compiled(self, compiled: Compiled) -> None:
        """A snapshot was published; nothing was said to the engine in between."""
        old = {number: self._kinds[number] for number in self._kept if number in self._kinds}
        self._kinds = {**old, **compiled.kinds}
        self._kept = set(compiled.kinds)
        self._names = {number: name for name, number in compiled.group_ids.items()}
        dead = [name for name in self.live if name not in compiled.group_ids]
        for name in dead:
            del self.live[name]
        if dead:
            self.announcer.changed()
        self.peers.changed()
        self.sessions.compiled(compiled.group_ids)
        self.peers.compiled(compiled.group_ids)

    def groups(self) -> tuple[GroupView, ...]:
        """What the snapshot needs to know of the groups."""
        return tuple(
            GroupView(g.name, g.app, g.topic, bool(g.publishers), g.ordered, g.mode == "broadcast")
            for g in self._registry.groups().values()
        )

    def suspend(self) -> None:
        """Nothing more is to be pushed to this node: brokers and peers are told."""
        self.announcer.suspend()
        self.peers.leave()

    def resume(self, now_ms: int) -> None:
        """`suspend` and `close_groups` are taken back."""
        self.sessions.open_groups()
        self.announcer.resume(now_ms)
        self.peers.stay()

    def close_groups(self) -> None:
        """Whatever is pushed from now on is refused: nobody here is in a group."""
        self.sessions.close_groups()

    def goaway(self) -> None:
        """Clients are told to ask nothing new: what follows is the end of their connections."""
        self.sessions.goaway("stopping")

    # --- hand-over --------------------------------------------------------------------------------

    def save(self, now_ms: int) -> SavedControl:
        return SavedControl(
            {number: self._kinds[number] for number in self._kept},
            {name: number for number, name in self._names.items()},
            dict(self.live),
            *self._identity,
            self.sessions.save(now_ms),
            self.announcer.save(now_ms),
            self.peers.save(now_ms),
        )

    def restore(self, data: object, now_ms: int) -> None:
        """Go on with the connections of another process, and no others, before the first
        `compiled`; the registry is restored before. Twice is as the second time alone. Raises
        HandoverError, and has to be called again then."""
        found = saved.read(data, SavedControl, "control")
        self._kinds = dict(found.kinds)
        self._kept = set(found.kinds)
        self._names = {number: name for name, number in found.groups.items()}
        self.live.clear()
        self.live.update(found.live)
        self.sessions.restore(found.sessions, found.groups, now_ms)
        self.announcer.restore(found.announcer, now_ms)
        self.peers.restore(found.peers, found.groups, now_ms)
        if (found.node, found.app) not in (("", ""), self._identity):
            # Configured otherwise now: brokers and peers hear who it is.
            self.announcer.introduce(now_ms)
            self.peers.introduce(now_ms)

    def forget_connections(self, now_ms: int) -> None:
        """None of the connections that were restored has come: all of them are gone."""
        for session in list(self.sessions.all()):
            self.sessions.gone(session.handle, now_ms)
        for handle in self.announcer.handles() + self.peers.handles():
            self.announcer.gone(handle)
            self.peers.gone(handle)
        self.live.clear()
        self.announcer.changed()
        self.peers.changed()

    # --- time -------------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> None:
        """Say what is due."""
        self.sessions.tick(now_ms)
        self.announcer.tick(now_ms)
        self.peers.tick(now_ms)

    @property
    def due_ms(self) -> int | None:
        """When `tick` has something to do; None = when something happens."""
        found = [self.sessions.due_ms, self.announcer.due_ms, self.peers.due_ms]
        return min((due for due in found if due is not None), default=None)

    def status(self) -> dict[str, Any]:
        return {
            "clients": len(self.sessions),
            "brokers": self.announcer.status(),
            "peers": self.peers.status(),
        }
