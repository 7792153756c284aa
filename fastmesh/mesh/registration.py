"""Who takes part in the message mesh on this node: applications, their clients, topics and groups.

    document --parse--> Registration --Draft.register--> Outcome, then Registry.adopt(draft)

A *registration* is what one client (a process of an application) said last; a later one of the same
client replaces it whole. A *group* is the union of what its clients said. Everything here is pure:
documents and times (CLOCK_MONOTONIC, ms) come in as arguments, nothing is read, written or waited
for.

Changes are made in two steps, so that they can be made durable in between: a `Draft` says how the
requests are answered and what the state will be, `adopt` puts it in force. `Registry.register` and
`remove` are both steps at once, for a registry without a disk.

Rules
-----
* The same group, registered by several clients, agrees on everything but prefetch: application,
  topic, and among its subscribers filter, ordered and mode. What differs is a conflict (409) that
  names the field, both values and whose stands. Roles unite: one client may publish and another
  subscribe with a group, and one client may do both (two entries of that name).
* Who differs from nobody else may change anything: a conflict is only ever with *other* clients.
* A lease ends `lease_ms` after the last registration, `touch` or the end of the last live
  connection (`hold`, `release`). A client with a live connection never expires.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import msgspec

from fastmesh import limits, saved
from fastmesh.document import MISSING, Problems, Table, read_json
from fastmesh.errors import HandoverError, Problem
from fastmesh.protocols.push import (
    BROADCAST,
    CLUSTER,
    MODES,
    PUBLISH,
    ROLES,
    SUBSCRIBE,
    Filter,
)

_NAME = re.compile(rf"[A-Za-z0-9_.:@/%-]{{1,{limits.MESH_NAME_CHARS_MAX}}}\Z")
NAME_RULE = f'must be a name of 1..{limits.MESH_NAME_CHARS_MAX} letters, digits or any of "_.:@/%-"'


# --- what is known --------------------------------------------------------------------------------


class Key(NamedTuple):
    """A client's identity."""

    app: str
    client: str


@dataclass(frozen=True, slots=True)
class Subscription:
    filter: str = ""
    """The expression as registered; "" takes every message of the topic."""
    prefetch: int = limits.PREFETCH
    """Unanswered deliveries per connection, unless the connection names its own number."""
    ordered: bool = False
    mode: str = CLUSTER


@dataclass(frozen=True, slots=True)
class Membership:
    """One group as one client registered it."""

    name: str
    topic: str
    publishes: bool = False
    subscription: Subscription | None = None


@dataclass(frozen=True, slots=True)
class Registration:
    """What one client said last. Equal registrations have equal documents."""

    app: str
    client: str
    lease_ms: int
    topics: tuple[str, ...]
    """Sorted; what the client named beside the topics of its groups."""
    groups: Mapping[str, Membership]
    document: bytes = field(default=b"", compare=False)
    """Itself as JSON: what is kept on disk, shown by GET, and can be sent again."""

    @property
    def key(self) -> Key:
        return Key(self.app, self.client)


@dataclass(frozen=True, slots=True)
class Group:
    """The union of what the clients of a group registered."""

    name: str
    app: str
    topic: str
    publishers: frozenset[str]
    """Clients that publish with it."""
    prefetch: Mapping[str, int]
    """Of each client that subscribes with it, per connection."""
    filter: str = ""
    ordered: bool = False
    mode: str = CLUSTER

    @property
    def roles(self) -> frozenset[str]:
        return frozenset(
            role
            for role, is_one in ((PUBLISH, self.publishers), (SUBSCRIBE, self.prefetch))
            if is_one
        )


@dataclass(frozen=True, slots=True)
class Client:
    """One registration and its lease."""

    registration: Registration
    expires_ms: int
    connections: int
    """Live ones: above 0 the lease does not run."""

    def remaining_ms(self, now_ms: int) -> int:
        lease_ms = self.registration.lease_ms
        return lease_ms if self.connections else max(0, self.expires_ms - now_ms)

    def document(self, now_ms: int) -> bytes:
        """The registration as JSON, with `remaining_ms` and `connections` added."""
        more = f',"remaining_ms":{self.remaining_ms(now_ms)},"connections":{self.connections}}}'
        return self.registration.document[:-1] + more.encode()


@dataclass(frozen=True, slots=True)
class Change:
    """What differs since the last call of `on_change`."""

    generation: int
    clients: frozenset[Key]
    """Registered, changed or gone; ask `Registry.client` which."""
    groups: frozenset[str]
    """Groups that came, went or differ in any field; ask `Registry.groups()` how. Empty when only
    topics or leases changed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request is answered: 201 registered · 200 the same or changed · 204 removed · 404
    nothing to remove · 409 conflict or bound · 422 faulty document. `body` is the JSON of it."""

    status: int
    body: Mapping[str, Any]
    changed: bool = False
    """True when the state differs: the answer must wait until that is durable."""


OnChange = Callable[[Change], None]


# --- from bytes to a registration -----------------------------------------------------------------


class InvalidError(ValueError):
    """A document that is no registration. Carries *all* problems, not the first."""

    def __init__(self, problems: Problems) -> None:
        self.problems = list(problems.found)
        if problems.count > len(self.problems):
            rest = problems.count - len(self.problems)
            self.problems.append(Problem("", None, f"and {rest} more problems"))
        plural = "s" if problems.count != 1 else ""
        super().__init__(f"{problems.count} problem{plural} in the registration")

    def outcome(self) -> Outcome:
        errors = [{"path": p.path, "value": p.value, "message": p.message} for p in self.problems]
        return Outcome(422, {"error": str(self), "errors": errors})


def parse(document: bytes) -> Registration:
    """Check the body of POST /v1/registrations. Raises InvalidError."""
    return _parsed(document, _Table)


def _parsed(document: bytes, of: type[_Table]) -> Registration:
    problems = Problems()
    if len(document) > limits.REGISTRATION_BODY_BYTES_MAX:
        most = limits.REGISTRATION_BODY_BYTES_MAX
        problems.add("", len(document), f"must be at most {most} bytes long")
        raise InvalidError(problems)
    tree = read_json(document, problems, "app, client, topics and groups")
    if problems.count:
        raise InvalidError(problems)
    return _checked(of(tree, "", problems))


class _Table(Table):
    """With what the names and lists of a registration are."""

    def mesh_name(self, key: str) -> str:
        value = self.raw(key)
        if value is MISSING:
            return ""
        if not isinstance(value, str) or not is_name(value):
            self.wrong(key, value, NAME_RULE)
            return ""
        return value

    def items(self, key: str, what: str) -> Iterator[_Table]:
        """A list of mappings, or nothing."""
        if self.tree.get(key) in (None, []):
            self.known.append(key)
            return
        for table in self.tables(key, limits.REGISTRATION_GROUPS_MAX, what=what):
            yield type(self)(table.tree, table.path, table.problems)


class _SavedTable(_Table):
    """As another version of fastmesh wrote it: what is not known here is passed over."""

    def done(self) -> None:
        pass


def is_name(text: str) -> bool:
    """Whether this could be an application, client, topic or group."""
    return _NAME.match(text) is not None


def _checked(table: _Table) -> Registration:
    """Raises InvalidError."""
    app = table.mesh_name("app")
    client = table.mesh_name("client")
    lease_ms = table.integer("lease_ms", limits.LEASE_MS_MIN, limits.LEASE_MS_MAX, limits.LEASE_MS)
    topics = set()
    for item in table.items("topics", "topic"):
        topics.add(item.mesh_name("name"))
        item.done()
    groups: dict[str, Membership] = {}
    entries: dict[tuple[str, str], str] = {}
    for item in table.items("groups", "group"):
        role, group = _group(item)
        if role and group.name:
            first = entries.setdefault((group.name, role), item.path)
            if first != item.path:
                item.wrong("name", group.name, f"stands with role {role} in {first} already")
            else:
                groups[group.name] = _united(groups.get(group.name), group, item)
    table.done()
    if not topics and not groups and not table.problems.count:
        table.wrong("groups", None, "must have at least one group, or topics one topic")
    if table.problems.count:
        raise InvalidError(table.problems)
    return _with_document(
        Registration(
            app,
            client,
            lease_ms or limits.LEASE_MS,
            tuple(sorted(topics)),
            MappingProxyType(dict(sorted(groups.items()))),
        )
    )


def _group(table: _Table) -> tuple[str, Membership]:
    """The role ("" when it is not one) and what it says."""
    name = table.mesh_name("name")
    topic = table.mesh_name("topic")
    role = table.choice("role", ROLES) or ""
    if role != SUBSCRIBE:
        # mode: cluster says nothing about a publisher, and generated documents carry it.
        if table.choice("mode", MODES, CLUSTER) == BROADCAST and role:
            table.wrong("mode", BROADCAST, "belongs to role subscribe: leave it out")
        for key in ("filter", "prefetch", "ordered"):
            value = table.raw(key, None)
            if value is not MISSING and role:
                table.wrong(key, value, "belongs to role subscribe: leave it out")
        table.done()
        return role, Membership(name, topic, publishes=True)
    subscription = Subscription(
        filter=_filter(table),
        prefetch=table.integer("prefetch", 1, limits.PREFETCH_MAX, limits.PREFETCH)
        or limits.PREFETCH,
        ordered=table.flag("ordered"),
        mode=table.choice("mode", MODES, CLUSTER) or CLUSTER,
    )
    if subscription.ordered and subscription.mode == BROADCAST:
        table.wrong(
            "ordered", True, "goes with mode cluster: a broadcast group has no one consumer"
        )
    table.done()
    return role, Membership(name, topic, subscription=subscription)


def _filter(table: _Table) -> str:
    text = table.text("filter", "") or ""
    if text:
        try:
            Filter.parse(text)
        except ValueError as error:
            table.wrong("filter", text, str(error))
    return text


def _same(name: str, mine: Any, stands: Any) -> bool:
    """Whether two subscriptions agree on a field; filters do when they want the same, however they
    are written."""
    if name == "filter" and mine and stands:
        return Filter.parse(mine) == Filter.parse(stands)
    return bool(mine == stands)


def _united(first: Membership | None, second: Membership, table: _Table) -> Membership:
    """Both roles of one group of one client."""
    if first is None:
        return second
    if first.topic and second.topic and first.topic != second.topic:
        table.wrong("topic", second.topic, f"must be {first.topic}, as in its other role")
    return Membership(
        first.name,
        first.topic,
        first.publishes or second.publishes,
        first.subscription or second.subscription,
    )


def _with_document(registration: Registration) -> Registration:
    groups: list[dict[str, Any]] = []
    for group in registration.groups.values():
        if group.publishes:
            groups.append({"name": group.name, "topic": group.topic, "role": PUBLISH})
        if (said := group.subscription) is not None:
            entry: dict[str, Any] = {"name": group.name, "topic": group.topic, "role": SUBSCRIBE}
            if said.filter:
                entry["filter"] = said.filter
            entry |= {"prefetch": said.prefetch, "ordered": said.ordered, "mode": said.mode}
            groups.append(entry)
    document = {
        "app": registration.app,
        "client": registration.client,
        "topics": [{"name": name} for name in registration.topics],
        "groups": groups,
        "lease_ms": registration.lease_ms,
    }
    return Registration(
        registration.app,
        registration.client,
        registration.lease_ms,
        registration.topics,
        registration.groups,
        msgspec.json.encode(document),
    )


# --- the state on disk ----------------------------------------------------------------------------


def decode_state(data: bytes) -> tuple[Registration, ...]:
    """What `Draft.state` or `Registry.state` encoded. Raises ValueError: all of it, or nothing."""
    problems = Problems()
    tree = read_json(data, problems, "registrations")
    table = _Table(tree, "", problems)
    found = []
    if not problems.count and tree != {"registrations": []}:
        for item in table.tables("registrations", limits.REGISTRATIONS_MAX, what="registration"):
            found.append(_checked(_Table(item.tree, item.path, problems)))
        table.done()
    if problems.count:
        raise InvalidError(problems)
    return tuple(found)


def _state(registrations: Iterable[Registration]) -> bytes:
    """Whole state. Documents are encoded once per registration, so this is a copy of memory."""
    return b'{"registrations":[' + b",".join(r.document for r in registrations) + b"]}"


_STATE_FRAME_BYTES = len(_state(()))


# --- the registry ---------------------------------------------------------------------------------


class SavedClient(msgspec.Struct, gc=False):
    document: msgspec.Raw
    """The registration."""
    remaining_ms: saved.Ms = 0
    """Of its lease; one with live connections gets a whole one when the last of them ends."""


class SavedRegistry(msgspec.Struct, omit_defaults=True):
    generation: saved.Count = 0
    clients: Annotated[list[SavedClient], msgspec.Meta(max_length=limits.REGISTRATIONS_MAX)] = []


@dataclass(slots=True)
class _Lease:
    registration: Registration
    expires_ms: int


class Registry:
    """What is in force. Not thread-safe: it belongs to the loop.

    `on_change` is called once for every effective change (a batch that is adopted together is one),
    after the views show it. It must not raise.
    """

    def __init__(self, on_change: OnChange | None = None) -> None:
        self.on_change = on_change
        self.generation = 0
        """Rises by one with every effective change."""
        self._leases: dict[Key, _Lease] = {}
        self._per_app: dict[str, int] = {}
        self._members: dict[str, dict[Key, Membership]] = {}
        self._groups: dict[str, Group] = {}
        self._connections: dict[Key, int] = {}
        self._document_bytes = 0

    # --- views ------------------------------------------------------------------------------------

    def groups(self) -> Mapping[str, Group]:
        """By name. A live view: copy what must outlast the next change."""
        return MappingProxyType(self._groups)

    def topics(self) -> dict[str, frozenset[str]]:
        """Topic -> applications that named it, alone or with a group."""
        found: dict[str, set[str]] = {}
        for key, lease in self._leases.items():
            registration = lease.registration
            for topic in registration.topics:
                found.setdefault(topic, set()).add(key.app)
            for group in registration.groups.values():
                found.setdefault(group.topic, set()).add(key.app)
        return {topic: frozenset(apps) for topic, apps in sorted(found.items())}

    def client(self, app: str, client: str) -> Client | None:
        key = Key(app, client)
        lease = self._leases.get(key)
        if lease is None:
            return None
        return Client(lease.registration, lease.expires_ms, self._connections.get(key, 0))

    def clients(self, app: str | None = None, client: str | None = None) -> list[Client]:
        """In the order of their names."""
        return [
            Client(lease.registration, lease.expires_ms, self._connections.get(key, 0))
            for key, lease in sorted(self._leases.items())
            if app in (None, key.app) and client in (None, key.client)
        ]

    def state(self) -> bytes:
        """What belongs on disk."""
        return _state(lease.registration for _, lease in sorted(self._leases.items()))

    # --- changes ----------------------------------------------------------------------------------

    def draft(self) -> Draft:
        return Draft(self)

    def adopt(self, draft: Draft, now_ms: int) -> None:
        """Put a draft in force; its registrations have full leases from now. What expired since
        the draft was made stays gone, unless the draft registers it."""
        self._put(draft.puts, now_ms)

    def register(self, document: bytes, now_ms: int) -> Outcome:
        """Draft and adopt at once."""
        try:
            registration = parse(document)
        except InvalidError as error:
            return error.outcome()
        draft = self.draft()
        outcome = draft.register(registration, now_ms)
        self.adopt(draft, now_ms)
        return outcome

    def remove(self, app: str, client: str) -> bool:
        """Take a client's registration back, whatever its lease and connections."""
        key = Key(app, client)
        if key not in self._leases:
            return False
        self._put({key: None}, 0)
        return True

    def restore(self, registrations: Iterable[Registration], now_ms: int) -> None:
        """Fill an empty registry from disk, with full leases; `on_change` is not called. Raises
        ValueError (with nothing changed) when they do not go together."""
        draft = self.draft()
        for registration in registrations:
            outcome = draft.register(registration, now_ms)
            if outcome.status != 201:
                raise ValueError(f"{registration.key}: {outcome.body.get('error', 'stands twice')}")
        on_change, self.on_change = self.on_change, None
        try:
            self.adopt(draft, now_ms)
        finally:
            self.on_change = on_change

    # --- leases -----------------------------------------------------------------------------------

    def touch(self, app: str, client: str, now_ms: int) -> bool:
        """Renew a lease; False when there is none."""
        lease = self._leases.get(Key(app, client))
        if lease is None:
            return False
        lease.expires_ms = now_ms + lease.registration.lease_ms
        return True

    def hold(self, app: str, client: str, connections: int = 1) -> None:
        """A connection of this client is live (or so many): its lease does not run until the same
        number of `release` calls. Also before it registers."""
        key = Key(app, client)
        self._connections[key] = self._connections.get(key, 0) + connections

    def release(self, app: str, client: str, now_ms: int) -> None:
        """A connection of this client is gone; with the last one its lease starts anew."""
        key = Key(app, client)
        left = self._connections.get(key, 0) - 1
        if left < 0:
            raise ValueError(f"{app}/{client} has no live connection to release")
        if left:
            self._connections[key] = left
        else:
            del self._connections[key]
            self.touch(app, client, now_ms)

    def expire(self, now_ms: int) -> tuple[Key, ...]:
        """Remove everyone whose lease has run out by now; who they were."""
        gone = tuple(
            key
            for key, lease in self._leases.items()
            if lease.expires_ms <= now_ms and key not in self._connections
        )
        if gone:
            self._put(dict.fromkeys(gone), now_ms)
        return gone

    def give_back(self, gap_ms: int) -> None:
        """Lengthen every lease: nobody could renew it while this process did not run."""
        for lease in self._leases.values():
            lease.expires_ms += gap_ms

    def stood_still(self, gap_ms: int, now_ms: int) -> None:
        """As `give_back`, but no lease gets longer than it was given: some may have begun within
        the gap."""
        for lease in self._leases.values():
            lease.expires_ms = min(lease.expires_ms + gap_ms, now_ms + lease.registration.lease_ms)

    # --- hand-over --------------------------------------------------------------------------------

    def save(self, now_ms: int) -> SavedRegistry:
        """Who is registered, and what is left of the leases. Connections are not part of it: who
        takes over the connections holds for them."""
        return SavedRegistry(
            self.generation,
            [
                SavedClient(
                    msgspec.Raw(lease.registration.document),
                    min(max(0, lease.expires_ms - now_ms), lease.registration.lease_ms),
                )
                for _, lease in sorted(self._leases.items())
            ],
        )

    def inherit(self, data: object, now_ms: int) -> bool:
        """Become what another process saved: its leases go on with what was left of them, and
        nobody holds one. True when somebody else is registered now, or otherwise; `on_change` is
        not called. Raises HandoverError with nothing changed."""
        found = saved.read(data, SavedRegistry, "registrations")
        standing = {x.registration.document: x.registration for x in self._leases.values()}
        known: list[tuple[Registration, int]] = []
        for at, item in enumerate(found.clients):
            document = bytes(item.document)
            registration = standing.get(document)
            if registration is None:
                try:
                    registration = _parsed(document, _SavedTable)
                except InvalidError as error:
                    first = error.problems[0]
                    raise saved.wrong(
                        f"registrations.clients[{at}].document.{first.path}",
                        first.value,
                        first.message,
                    ) from None
            known.append((registration, item.remaining_ms))
        same = len(known) == len(standing) and all(r.document in standing for r, _ in known)
        if not same:
            fresh = Registry()
            try:
                fresh.restore((registration for registration, _ in known), now_ms)
            except ValueError as error:
                raise HandoverError(f"registrations: {error}") from None
            self._leases, self._per_app = fresh._leases, fresh._per_app
            self._members, self._groups = fresh._members, fresh._groups
            self._document_bytes = fresh._document_bytes
        for registration, remaining_ms in known:
            lease = self._leases[registration.key]
            lease.expires_ms = now_ms + min(remaining_ms, registration.lease_ms)
        self._connections.clear()
        self.generation = found.generation
        return not same

    # --- inside -----------------------------------------------------------------------------------

    def _put(self, puts: Mapping[Key, Registration | None], now_ms: int) -> None:
        clients: set[Key] = set()
        touched: set[str] = set()
        for key, registration in puts.items():
            lease = self._leases.get(key)
            old = None if lease is None else lease.registration
            if registration is not None:
                self._leases[key] = _Lease(registration, now_ms + registration.lease_ms)
            else:
                self._leases.pop(key, None)
            if (old and old.document) == (registration and registration.document):
                continue
            clients.add(key)
            self._count(key.app, (registration is not None) - (old is not None))
            for group in old.groups.values() if old else ():
                self._members[group.name].pop(key)
                touched.add(group.name)
            for group in registration.groups.values() if registration else ():
                self._members.setdefault(group.name, {})[key] = group
                touched.add(group.name)
            self._document_bytes += _cost(registration) - _cost(old)
        if not clients:
            return
        self.generation += 1
        groups = frozenset(name for name in touched if self._united(name))
        if self.on_change is not None:
            self.on_change(Change(self.generation, frozenset(clients), groups))

    def _count(self, app: str, by: int) -> None:
        number = self._per_app.get(app, 0) + by
        if number:
            self._per_app[app] = number
        else:
            self._per_app.pop(app, None)

    def _united(self, name: str) -> bool:
        """Work a group out anew from its members; whether it differs."""
        before = self._groups.get(name)
        members = self._members.get(name)
        if not members:
            self._members.pop(name, None)
            self._groups.pop(name, None)
            return before is not None
        key, first = next(iter(members.items()))
        said = next((m.subscription for m in members.values() if m.subscription), Subscription())
        group = Group(
            name=name,
            app=key.app,
            topic=first.topic,
            publishers=frozenset(k.client for k, m in members.items() if m.publishes),
            prefetch=MappingProxyType(
                {k.client: m.subscription.prefetch for k, m in members.items() if m.subscription}
            ),
            filter=said.filter,
            ordered=said.ordered,
            mode=said.mode,
        )
        self._groups[name] = group
        return group != before


def _cost(registration: Registration | None) -> int:
    """Bytes of the state that are this registration's, with its comma."""
    return 0 if registration is None else len(registration.document) + 1


class Draft:
    """Changes that are not in force yet. One at a time per registry: while a draft waits for the
    disk, nothing but an expiry may change what it was made from."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.puts: dict[Key, Registration | None] = {}
        """None removes."""

    @property
    def changed(self) -> bool:
        return any(
            (new and new.document) != (old and old.document)
            for key, new in self.puts.items()
            for old in [self._in_force(key)]
        )

    def state(self) -> bytes:
        """What belongs on disk once this is adopted."""
        found = {key: lease.registration for key, lease in self._registry._leases.items()}
        for key, registration in self.puts.items():
            if registration is None:
                found.pop(key, None)
            else:
                found[key] = registration
        return _state(registration for _, registration in sorted(found.items()))

    def register(self, registration: Registration, now_ms: int) -> Outcome:
        """How this registration is answered. One that stands already only has its lease renewed,
        at once: that is nothing to wait for."""
        key = registration.key
        old = self._standing(key)
        if old is not None and old.document == registration.document:
            if key not in self.puts:
                self._registry.touch(*key, now_ms)
            return Outcome(200, _accepted(registration, "same"), changed=key in self.puts)
        if (conflict := self._conflict(registration)) is not None:
            return conflict
        if (beyond := self._beyond(registration, old)) is not None:
            return beyond
        self.puts[key] = registration
        if old is None:
            return Outcome(201, _accepted(registration, "new"), changed=True)
        return Outcome(200, _accepted(registration, "changed"), changed=True)

    def remove(self, app: str, client: str) -> Outcome:
        key = Key(app, client)
        if self._standing(key) is None:
            return Outcome(404, {"error": f"{app}/{client} is not registered"})
        self.puts[key] = None
        return Outcome(204, {}, changed=True)

    # --- inside -----------------------------------------------------------------------------------

    def _in_force(self, key: Key) -> Registration | None:
        lease = self._registry._leases.get(key)
        return None if lease is None else lease.registration

    def _standing(self, key: Key) -> Registration | None:
        return self.puts[key] if key in self.puts else self._in_force(key)

    def _others(self, name: str, but: Key) -> Iterator[tuple[Key, Membership]]:
        """Who else is in a group."""
        for key, registration in self.puts.items():
            if key != but and registration is not None and name in registration.groups:
                yield key, registration.groups[name]
        for key, member in self._registry._members.get(name, {}).items():
            if key != but and key not in self.puts:
                yield key, member

    def _conflict(self, registration: Registration) -> Outcome | None:
        found: list[dict[str, Any]] = []
        for group in registration.groups.values():
            # Those who stand agree with each other, so one of each kind speaks for all.
            anyone = next(self._others(group.name, registration.key), None)
            if anyone is None:
                continue
            key, member = anyone
            if key.app != registration.app:
                found.append(_difference(group.name, "app", registration.app, key.app, key))
            if member.topic != group.topic:
                found.append(_difference(group.name, "topic", group.topic, member.topic, key))
            if group.subscription is None:
                continue
            subscriber = next(
                ((k, m) for k, m in self._others(group.name, registration.key) if m.subscription),
                None,
            )
            if subscriber is None:
                continue
            key, member = subscriber
            for name in ("filter", "ordered", "mode"):
                mine, stands = getattr(group.subscription, name), getattr(member.subscription, name)
                if not _same(name, mine, stands):
                    found.append(_difference(group.name, name, mine, stands, key))
        if not found:
            return None
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        body = {"error": f"conflict: {found[0]['message']}{more}", "conflicts": found}
        return Outcome(409, body)

    def _beyond(self, registration: Registration, old: Registration | None) -> Outcome | None:
        registry = self._registry
        if old is None:
            coming = [
                (key, (new is not None) - (self._in_force(key) is not None))
                for key, new in self.puts.items()
            ]
            here = len(registry._leases) + sum(by for _, by in coming)
            if here >= limits.REGISTRATIONS_MAX:
                return _bound("registrations", limits.REGISTRATIONS_MAX)
            of_app = sum(by for key, by in coming if key.app == registration.app)
            if registry._per_app.get(registration.app, 0) + of_app >= (
                limits.REGISTRATION_CLIENTS_MAX
            ):
                return _bound(f"clients of {registration.app}", limits.REGISTRATION_CLIENTS_MAX)
        after = {**self.puts, registration.key: registration}
        size = _STATE_FRAME_BYTES + registry._document_bytes
        size += sum(_cost(new) - _cost(self._in_force(key)) for key, new in after.items())
        if size > limits.REGISTRATION_STATE_BYTES_MAX:
            return _bound("bytes of all registrations", limits.REGISTRATION_STATE_BYTES_MAX)
        most_groups = len(registry._groups) + sum(len(new.groups) for new in after.values() if new)
        if most_groups > limits.GROUPS_MAX and self._groups_with(registration) > limits.GROUPS_MAX:
            return _bound("groups", limits.GROUPS_MAX)
        return None

    def _groups_with(self, registration: Registration) -> int:
        """Different groups once this registration stands too; walks all, so only near the bound."""
        names = set(registration.groups)
        for key, lease in self._registry._leases.items():
            if key != registration.key and key not in self.puts:
                names |= lease.registration.groups.keys()
        for key, new in self.puts.items():
            if key != registration.key and new is not None:
                names |= new.groups.keys()
        return len(names)


def _accepted(registration: Registration, word: str) -> dict[str, Any]:
    return {
        "registration": word,
        "app": registration.app,
        "client": registration.client,
        "lease_ms": registration.lease_ms,
    }


def _difference(group: str, name: str, mine: Any, stands: Any, key: Key) -> dict[str, Any]:
    def words(value: Any) -> str:
        return "none" if value == "" else json.dumps(value)

    return {
        "group": group,
        "field": name,
        "value": mine,
        "stands": stands,
        "app": key.app,
        "client": key.client,
        "message": f"group {group}: {name} {words(mine)} differs from {words(stands)}, which client"
        f" {key.client} of {key.app} registered",
    }


def _bound(what: str, most: int) -> Outcome:
    message = f"this node has as many {what} as it takes: {most}; others must go first"
    return Outcome(409, {"error": message, "conflicts": []})
