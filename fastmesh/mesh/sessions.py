"""Client connections: who they are, which groups they named, and what the engine was told of it.

    hello -> (checked against the registration) -> greeted -> subscribe -> joined -> gone

What a connection *wants* is remembered beside what it *has*: a group that is taken out of the
registration ends for its connections, and comes back by itself when it is registered again. The
engine knows groups by number, and only those of its snapshot: a subscribe whose groups are not
compiled yet is answered when they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import msgspec

from fastmesh import limits, saved
from fastmesh._ext import push
from fastmesh._ext.push import Push
from fastmesh.mesh import wire as w
from fastmesh.mesh.registration import Client, Key
from fastmesh.mesh.wire import Wire, answer
from fastmesh.protocols import push as words
from fastmesh.protocols.push import Hello, Subscribe


class Clients(Protocol):
    """The part of the registry that is asked here."""

    def client(self, app: str, client: str) -> Client | None: ...
    def hold(self, app: str, client: str, connections: int = 1) -> None: ...
    def release(self, app: str, client: str, now_ms: int) -> None: ...


@dataclass(slots=True)
class Session:
    """One client connection."""

    handle: int
    key: Key | None = None
    """None until its hello was accepted."""
    wanted: dict[str, int | None] = field(default_factory=dict)
    """Group -> prefetch of this connection; None = what the registration says."""
    has: tuple[tuple[int, int], ...] = ()
    """(group id, prefetch): what the engine was told last."""
    suspended: bool = False
    leaving: bool = False
    waiting: Push | None = None
    """A subscribe that is answered when its groups are in the snapshot ..."""
    waits_until_ms: int = 0
    """... or then."""


Prefetch = Annotated[int, msgspec.Meta(ge=0, le=limits.PREFETCH_MAX)]
Groups = Annotated[dict[saved.Text, Prefetch | None], msgspec.Meta(max_length=limits.GROUPS_MAX)]


class SavedAsked(msgspec.Struct, gc=False):
    """All that the answer to a request needs of it."""

    id: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**32 - 1)]
    hint: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class SavedSession(msgspec.Struct, gc=False, omit_defaults=True):
    handle: saved.Handle
    app: saved.Text = ""
    client: saved.Text = ""
    """Both "" until its hello was accepted."""
    wanted: Groups = {}
    has: Annotated[
        list[tuple[saved.GroupId, Prefetch]], msgspec.Meta(max_length=limits.GROUPS_MAX)
    ] = []
    suspended: bool = False
    leaving: bool = False
    waiting: SavedAsked | None = None
    waits_ms: saved.Ms = 0


class SavedSessions(msgspec.Struct, omit_defaults=True):
    sessions: Annotated[list[SavedSession], msgspec.Meta(max_length=limits.SAVED_NAMES_MAX)] = []
    stale: list[saved.Handle] = []
    """Whose registration changed since the last snapshot."""
    closed: bool = False
    going: saved.Text = ""


class Sessions:
    """All client connections of this node."""

    def __init__(self, wire: Wire, registry: Clients) -> None:
        self._wire = wire
        self._registry = registry
        self._ids: Mapping[str, int] = {}
        self._sessions: dict[int, Session] = {}
        self._of_client: dict[Key, set[int]] = {}
        self._of_group: dict[str, set[int]] = {}
        self._stale: set[int] = set()
        self._waiting: set[int] = set()
        self._restored: dict[int, SavedSession] = {}
        """What was restored, until something happens here."""
        self._closed = False
        """No connection is in a group, whatever it wants."""
        self._going = ""
        """Why connections are about to be closed; "" when they are not."""

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, handle: int) -> bool:
        return handle in self._sessions

    def all(self) -> Iterable[Session]:
        return self._sessions.values()

    # --- from the engine --------------------------------------------------------------------------

    def opened(self, handle: int) -> None:
        self._restored = {}
        self._sessions[handle] = Session(handle)

    def gone(self, handle: int, now_ms: int) -> None:
        self._restored = {}
        session = self._sessions.pop(handle, None)
        if session is None:
            return
        self._forget(session)
        if session.key is not None:
            self._registry.release(*session.key, now_ms)

    def frame(self, handle: int, asked: Push, now_ms: int) -> None:
        """A control frame. Exactly one reply, now or when its groups are compiled."""
        self._restored = {}
        session = self._sessions.get(handle)
        if session is None:
            return
        op = asked.headers.get(words.OP, "")
        if op == words.HELLO:
            self._hello(session, asked)
        elif session.key is None:
            what = w.shown(op) or "a request without fm.op"
            self._refuse(session, asked, f"{what} before hello")
        elif op == words.SUBSCRIBE:
            self._subscribe(session, asked, now_ms)
        elif op in (words.SUSPEND, words.RESUME):
            session.suspended = op == words.SUSPEND
            self._tell(session)
            self._answer(session, asked, words.answer(words.CONSUMED))
        elif op == words.GOAWAY:
            session.leaving = True
            self._tell(session)
            self._answer(session, asked, words.answer(words.CONSUMED))
        else:
            known = "hello, subscribe, suspend, resume, goaway, publish"
            said = f"fm.op {w.shown(op)}" if op else "a request without fm.op"
            self._refuse(session, asked, f"{said} is not taken from a client; there are: {known}")

    def _answer(self, session: Session, asked: Push, headers: Mapping[str, str]) -> None:
        self._wire.reply(session.handle, answer(asked, headers))

    def _refuse(self, session: Session, asked: Push, reason: str) -> None:
        self._answer(session, asked, words.answer(words.REJECT, reason))

    def _hello(self, session: Session, asked: Push) -> None:
        try:
            said = Hello.parse(asked.headers)
        except ValueError as wrong:
            self._refuse(session, asked, str(wrong))
            return
        key = Key(said.app, said.client)
        if not said.understood:
            self._answer(session, asked, said.answer())
        elif not said.app:
            self._refuse(session, asked, f"{words.APP}: missing; a client names its application")
        elif session.key not in (None, key):
            assert session.key is not None
            mine = f"{session.key.app}/{session.key.client}"
            self._refuse(session, asked, f"this connection is {mine}; another needs its own")
        elif session.key is None and self._registry.client(*key) is None:
            reason = f"{said.app}/{said.client} is not registered: POST /v1/registrations first"
            self._refuse(session, asked, reason)
        else:
            if session.key is None:
                session.key = key
                self._of_client.setdefault(key, set()).add(session.handle)
                self._registry.hold(*key)
            self._wire.reply(session.handle, answer(asked, said.answer()), greet=True)

    def _subscribe(self, session: Session, asked: Push, now_ms: int) -> None:
        assert session.key is not None
        known = self._registry.client(*session.key)
        registered = known.registration.groups if known else {}
        try:
            wanted = dict(Subscribe.parse(asked.headers).groups)
        except ValueError as wrong:
            self._refuse(session, asked, str(wrong))
            return
        if unknown := [name for name in wanted if name not in registered]:
            who = f"{session.key.app}/{session.key.client}"
            reason = (
                f"group {w.shown(unknown[0])} is not in the registration of {who}"
                if known
                else f"{who} is not registered any more: POST /v1/registrations comes first"
            )
            self._refuse(session, asked, reason)
        elif session.leaving:
            self._refuse(session, asked, "this connection has said goaway")
        elif self._going:
            retry_ms = limits.CONTROL_RETRY_MS
            said = words.answer(words.LATER, self._going, retry_ms=retry_ms)
            self._answer(session, asked, said)
        else:
            self._want(session, wanted)
            if asked.kind == "request":
                session.waiting = asked
                session.waits_until_ms = now_ms + limits.SUBSCRIBE_WAIT_MS
                self._waiting.add(session.handle)
            else:
                self._wire.reply(session.handle, b"")
            self._tell(session)

    # --- from the control plane -------------------------------------------------------------------

    def changed(self, clients: Iterable[Key]) -> None:
        """These registrations came, changed or went; `compiled` follows."""
        for key in clients:
            self._stale |= self._of_client.get(key, set())

    def compiled(self, ids: Mapping[str, int]) -> None:
        """The numbers of groups in the snapshot that was just published."""
        self._restored = {}
        before, self._ids = self._ids, dict(ids)
        for name in before.keys() | ids.keys():
            if before.get(name) != ids.get(name):
                self._stale |= self._of_group.get(name, set())
        stale, self._stale = self._stale, set()
        for handle in sorted(stale | self._waiting):
            self._tell(self._sessions[handle])

    def close_groups(self) -> None:
        """Every connection leaves its groups, and gets no delivery any more; what each wants is
        remembered. Twice is once."""
        self._set_closed(True)

    def open_groups(self) -> None:
        """`close_groups` is taken back."""
        self._set_closed(False)

    def _set_closed(self, closed: bool) -> None:
        if self._closed is not closed:
            self._closed = closed
            for session in self._sessions.values():
                self._tell(session)

    def goaway(self, reason: str) -> None:
        """Tell every client that its connection is going to be closed: it asks nothing new. There
        is no way back. Twice is once."""
        if self._going:
            return
        self._going = reason
        self.close_groups()
        frame = push.request(1, {words.OP: words.GOAWAY, words.REASON: reason}, oneway=True)
        for session in self._sessions.values():
            if session.key is not None:
                self._wire.send(session.handle, frame)

    def tick(self, now_ms: int) -> None:
        """Answer whoever waited too long for a snapshot."""
        for handle in sorted(self._waiting):
            session = self._sessions[handle]
            if now_ms >= session.waits_until_ms:
                reason = "its groups are not in force yet"
                self._settle(
                    session, words.answer(words.LATER, reason, retry_ms=limits.CONTROL_RETRY_MS)
                )

    @property
    def due_ms(self) -> int | None:
        return min((self._sessions[h].waits_until_ms for h in self._waiting), default=None)

    # --- hand-over --------------------------------------------------------------------------------

    def save(self, now_ms: int) -> SavedSessions:
        return SavedSessions(
            [
                SavedSession(
                    s.handle,
                    s.key.app if s.key else "",
                    s.key.client if s.key else "",
                    s.wanted,
                    list(s.has),
                    s.suspended,
                    s.leaving,
                    SavedAsked(s.waiting.id, s.waiting.hint) if s.waiting else None,
                    max(0, s.waits_until_ms - now_ms) if s.waiting else 0,
                )
                for s in self._sessions.values()
            ],
            sorted(self._stale),
            self._closed,
            self._going,
        )

    def restore(self, data: object, ids: Mapping[str, int], now_ms: int) -> None:
        """Go on with the connections of another process, and no others; `ids`: the numbers of
        groups in its last snapshot. Each connection of a client holds its registration. Nothing is
        said: what is due is said by `compiled` and `tick`. Raises HandoverError, and has to be
        called again then."""
        found = saved.read(data, SavedSessions, "sessions")
        self._ids = dict(ids)
        before, self._restored = self._restored, {item.handle: item for item in found.sessions}
        if len(self._restored) != len(found.sessions):
            handles = [item.handle for item in found.sessions]
            raise saved.wrong("sessions.sessions.handle", handles, "each must stand there once")
        # Ten thousand of them are restored a second time while everything stands still, and few are
        # others by then.
        for handle in [h for h in self._sessions if self._restored.get(h) != before.get(h, h)]:
            self._forget(self._sessions.pop(handle))
        for handle, item in self._restored.items():
            if handle not in self._sessions:
                self._restore(item)
            if item.waiting is not None:
                self._sessions[handle].waits_until_ms = now_ms + item.waits_ms
        # In the order in which they connected.
        self._sessions = {handle: self._sessions[handle] for handle in self._restored}
        for key, handles_of in self._of_client.items():
            self._registry.hold(*key, len(handles_of))
        self._stale = {handle for handle in found.stale if handle in self._sessions}
        self._closed, self._going = found.closed, found.going

    def _restore(self, item: SavedSession) -> None:
        session = self._sessions[item.handle] = Session(item.handle)
        if item.app:
            session.key = Key(item.app, item.client)
            self._of_client.setdefault(session.key, set()).add(item.handle)
        self._want(session, dict(item.wanted))
        session.has = tuple(item.has)
        session.suspended, session.leaving = item.suspended, item.leaving
        if (asked := item.waiting) is not None:
            try:
                push.response(asked.id, asked.hint, {})
            except (ValueError, OverflowError) as error:
                what = "sessions.sessions.waiting"
                raise saved.wrong(what, (asked.id, asked.hint), str(error)) from None
            session.waiting = Push("request", asked.id, asked.hint, 0, 0, {}, b"", b"")
            self._waiting.add(item.handle)

    # --- inside -----------------------------------------------------------------------------------

    def _forget(self, session: Session) -> None:
        """It is in no index any more."""
        self._waiting.discard(session.handle)
        self._stale.discard(session.handle)
        self._want(session, {})
        if session.key is not None:
            _drop(self._of_client, session.key, session.handle)

    def _want(self, session: Session, wanted: dict[str, int | None]) -> None:
        for name in session.wanted.keys() - wanted.keys():
            _drop(self._of_group, name, session.handle)
        for name in wanted.keys() - session.wanted.keys():
            self._of_group.setdefault(name, set()).add(session.handle)
        session.wanted = wanted

    def _tell(self, session: Session) -> None:
        """Make the engine's view what it has to be, and answer the subscribe that waits for it."""
        self._restored = {}
        pairs, missing = self._due(session)
        if pairs != session.has:
            session.has = pairs
            self._wire.subscribe(session.handle, pairs)
        if session.waiting is None:
            return
        if not missing:
            self._settle(session, words.answer(words.CONSUMED))
        elif gone := [name for name, registered in missing.items() if not registered]:
            reason = f"group {gone[0]} is not registered any more"
            self._settle(session, words.answer(words.REJECT, reason))

    def _due(self, session: Session) -> tuple[tuple[tuple[int, int], ...], dict[str, bool]]:
        """What it should have now; and wanted groups that it cannot have -> still registered."""
        known = self._registry.client(*session.key) if session.key else None
        registered = known.registration.groups if known else {}
        pairs = []
        missing = {}
        for name, asked in session.wanted.items():
            member, number = registered.get(name), self._ids.get(name)
            if member is None or number is None:
                missing[name] = member is not None
                continue
            said = member.subscription.prefetch if member.subscription else limits.PREFETCH
            pairs.append((number, asked or said))
        if session.suspended or session.leaving or self._closed:
            pairs = []
        return tuple(pairs), missing

    def _settle(self, session: Session, headers: Mapping[str, str]) -> None:
        assert session.waiting is not None
        self._restored = {}
        self._answer(session, session.waiting, headers)
        session.waiting = None
        self._waiting.discard(session.handle)


def _drop(index: dict[Any, set[int]], key: object, handle: int) -> None:
    found = index.get(key)
    if found is not None:
        found.discard(handle)
        if not found:
            del index[key]
