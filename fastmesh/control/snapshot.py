"""A configuration and its resolved addresses, compiled into the engine's immutable snapshot.

The same listener, cluster or endpoint has the same id in every snapshot, and the same name the same
counter row for the life of the process: a row is never given to another name, so a counter never
jumps. Names beyond the table are counted together as `__other__`.

The message mesh (`MeshView`) becomes, beside the configuration's listeners and clusters:

    brokers, other nodes -> two clusters, one endpoint each
    topics x brokers     -> rules of every push listener: a second phase goes to the broker that it
                            names, everything else to one of the brokers of its topic
    groups, schedules    -> tables of their own
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from fastmesh import limits as bounds
from fastmesh import saved
from fastmesh.address import Address
from fastmesh.config import Broker, Config, Limits
from fastmesh.errors import HandoverError
from fastmesh.limits import GROUP_ID_MAX, NO_ROUTE_NAME, ROW_OTHER

if TYPE_CHECKING:
    from fastmesh._ext.route import Snapshot

PUSH = "push"
"""Codec of everything that belongs to the message mesh."""
BROKERS = "__brokers__"
PEERS = "__peers__"
"""Clusters of the message mesh. Names of the configuration do not start with "__"."""
FORWARD = "__forward__"
"""The listener of the forward service."""


@dataclass(frozen=True, slots=True)
class RowLabel:
    """What a counter row stands for; "" where a label does not apply."""

    kind: str
    """listener | route | cluster | endpoint | group"""
    listener: str = ""
    route: str = ""
    cluster: str = ""
    endpoint: str = ""
    app: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class GroupView:
    """What the snapshot has to know of a registered group."""

    name: str
    app: str
    topic: str
    publishes: bool
    """Somebody publishes with it: what it publishes is counted apart."""
    ordered: bool = False
    broadcast: bool = False


@dataclass(frozen=True, slots=True)
class MeshView:
    """The message mesh as it is to be compiled."""

    brokers: Sequence[Broker] = ()
    groups: Sequence[GroupView] = ()
    topics: Iterable[str] = ()
    """Registered ones: nothing else can be published."""
    peers: Mapping[str, Address] = field(default_factory=dict)
    """Other nodes of the schedules -> their forward services."""
    schedule: Callable[[str, Mapping[str, int]], Any] = lambda app, endpoints: None
    """(app, node name -> endpoint id) -> its native schedule, the same object while nothing in it
    has changed; None when it has none."""
    paused: frozenset[int] = frozenset()
    """Ids of broker endpoints that want no new requests."""


class SavedRow(msgspec.Struct, gc=False, array_like=True):
    row: saved.Id
    kind: saved.Text
    listener: saved.Text = ""
    route: saved.Text = ""
    cluster: saved.Text = ""
    endpoint: saved.Text = ""
    app: saved.Text = ""
    group: saved.Text = ""


class SavedKey(msgspec.Struct, gc=False, array_like=True):
    id: saved.Id
    key: Any
    """Tuples are lists, an address is {"address": [host, port, path]}."""


class SavedDirectory(msgspec.Struct, omit_defaults=True):
    version: saved.Count = 0
    """Of the last snapshot."""
    rows: Annotated[list[SavedRow], msgspec.Meta(max_length=bounds.SAVED_NAMES_MAX)] = []
    ids: Annotated[list[SavedKey], msgspec.Meta(max_length=bounds.SAVED_NAMES_MAX)] = []
    next_id: saved.Id = 1
    kept: list[saved.Id] = []
    """Of the last snapshot ..."""
    used: list[saved.Id] = []
    """... and of one that could not be finished."""
    groups: Annotated[list[SavedKey], msgspec.Meta(max_length=GROUP_ID_MAX)] = []
    next_group: Annotated[int, msgspec.Meta(ge=1, le=GROUP_ID_MAX + 1)] = 1
    groups_kept: list[saved.GroupId] = []
    groups_used: list[saved.GroupId] = []
    groups_free: Annotated[list[saved.GroupId], msgspec.Meta(max_length=GROUP_ID_MAX)] = []


class Directory:
    """Hands out ids and rows, and remembers which is whose."""

    def __init__(self, rows_max: int) -> None:
        self._rows_max = rows_max
        self._rows: dict[RowLabel, int] = {}
        self._next_row = ROW_OTHER + 1
        self._ids: dict[Hashable, int] = {}
        self._next_id = 1
        self._kept: set[Hashable] = set()
        self._used: set[Hashable] = set()
        self._groups: dict[Hashable, int] = {}
        self._groups_used: set[Hashable] = set()
        self._groups_kept: set[Hashable] = set()
        self._groups_free: deque[int] = deque()
        self._groups_next = 1

    def row(self, label: RowLabel) -> int:
        row = self._rows.get(label)
        if row is None:
            row = self._next_row
            if row >= self._rows_max:
                return ROW_OTHER
            self._rows[label] = row
            self._next_row += 1
        return row

    def id(self, key: Hashable) -> int:
        self._used.add(key)
        found = self._ids.get(key)
        if found is None:
            found = self._ids[key] = self._next_id
            self._next_id += 1
        return found

    def group(self, key: Hashable) -> int:
        """Groups come and go with registrations and their ids are few (1..GROUP_ID_MAX), so that
        they are used again: fresh ones first, then the one that has rested longest. Raises
        ValueError when there are more groups than ids."""
        self._groups_used.add(key)
        found = self._groups.get(key)
        if found is None:
            if self._groups_next <= GROUP_ID_MAX:
                found = self._groups_next
                self._groups_next += 1
            elif self._groups_free:
                found = self._groups_free.popleft()
            else:
                raise ValueError(f"there are more than {GROUP_ID_MAX} groups")
            self._groups[key] = found
        return found

    def turn(self) -> None:
        """End of a compilation. Forgets ids that neither this snapshot nor the last one used (names
        that come and go would fill memory); an id is never given out a second time."""
        alive = self._used | self._kept
        self._ids = {key: found for key, found in self._ids.items() if key in alive}
        self._kept, self._used = self._used, set()
        rested = self._groups.keys() - self._groups_used - self._groups_kept
        for key in sorted(rested, key=lambda key: self._groups[key]):
            self._groups_free.append(self._groups.pop(key))
        self._groups_kept, self._groups_used = self._groups_used, set()

    def rows(self) -> Mapping[RowLabel, int]:
        return self._rows

    # --- hand-over --------------------------------------------------------------------------------

    def save(self, version: int) -> SavedDirectory:
        """Everything, so that a successor gives the same names the same numbers. `version`: of the
        last snapshot."""
        ids, groups = self._ids, self._groups
        return SavedDirectory(
            version=version,
            rows=[SavedRow(row, *_label_texts(label)) for label, row in self._rows.items()],
            ids=[SavedKey(number, _packed(key)) for key, number in ids.items()],
            next_id=self._next_id,
            kept=sorted(ids[key] for key in self._kept if key in ids),
            used=sorted(ids[key] for key in self._used if key in ids),
            groups=[SavedKey(number, _packed(key)) for key, number in groups.items()],
            next_group=self._groups_next,
            groups_kept=sorted(groups[key] for key in self._groups_kept if key in groups),
            groups_used=sorted(groups[key] for key in self._groups_used if key in groups),
            groups_free=list(self._groups_free),
        )

    def restore(self, data: object) -> int:
        """Become what was saved; returns the version of the last snapshot. Raises HandoverError
        with nothing changed, also when there are more rows than this build has counters for."""
        what = "directory"
        found = saved.read(data, SavedDirectory, what)
        rows: dict[RowLabel, int] = {}
        taken: set[int] = set()
        for item in found.rows:
            label = RowLabel(
                item.kind,
                item.listener,
                item.route,
                item.cluster,
                item.endpoint,
                item.app,
                item.group,
            )
            if not ROW_OTHER < item.row < self._rows_max or item.row in taken:
                right = f"each must be one of its own in {ROW_OTHER + 1}..{self._rows_max - 1}"
                raise saved.wrong(f"{what}.rows", item.row, right)
            taken.add(item.row)
            # A later version may tell apart what is one name here: the first row counts it then.
            rows.setdefault(label, item.row)
        ids = _unpacked(found.ids, f"{what}.ids", found.next_id)
        groups = _unpacked(found.groups, f"{what}.groups", found.next_group)
        free = set(found.groups_free)
        if len(free) != len(found.groups_free) or not free.isdisjoint(groups.values()):
            raise saved.wrong(
                f"{what}.groups_free", sorted(free), "each must be free, and stand there once"
            )
        if any(number >= found.next_group for number in free):
            raise saved.wrong(
                f"{what}.groups_free", max(free), f"must be below next_group {found.next_group}"
            )
        keys = {number: key for key, number in ids.items()}
        group_keys = {number: key for key, number in groups.items()}
        self._rows = rows
        self._next_row = max(taken, default=ROW_OTHER) + 1
        self._ids = ids
        self._next_id = found.next_id
        self._kept = {keys[number] for number in found.kept if number in keys}
        self._used = {keys[number] for number in found.used if number in keys}
        self._groups = groups
        self._groups_next = found.next_group
        self._groups_kept = {group_keys[n] for n in found.groups_kept if n in group_keys}
        self._groups_used = {group_keys[n] for n in found.groups_used if n in group_keys}
        self._groups_free = deque(found.groups_free)
        return found.version


_KEY_DEPTH_MAX = 4
"""Keys are tuples of texts, of addresses, and of one such tuple."""


def _label_texts(label: RowLabel) -> tuple[str, ...]:
    return (
        label.kind,
        label.listener,
        label.route,
        label.cluster,
        label.endpoint,
        label.app,
        label.group,
    )


def _packed(key: Hashable) -> Any:
    """A key of the directory as JSON can say it."""
    if isinstance(key, tuple):
        return [_packed(part) for part in key]
    if isinstance(key, Address):
        return {"address": [key.host, key.port, key.path]}
    assert key is None or isinstance(key, (str, bool, int))
    return key


def _unpacked(items: Iterable[SavedKey], what: str, next_number: int) -> dict[Hashable, int]:
    """Keys and their numbers, which are below the next one and each of one key. Raises
    HandoverError."""
    found: dict[Hashable, int] = {}
    for item in items:
        key = _unpacked_key(item.key, what)
        if item.id >= next_number:
            raise saved.wrong(what, item.id, f"must be below the next number {next_number}")
        if key in found:
            raise saved.wrong(what, key, "stands there twice")
        found[key] = item.id
    if len(set(found.values())) != len(found):
        raise HandoverError(f"{what}: one number has two keys; each has its own")
    return found


def _unpacked_key(value: Any, what: str, depth: int = 0) -> Hashable:
    if isinstance(value, list) and depth < _KEY_DEPTH_MAX:
        return tuple(_unpacked_key(part, what, depth + 1) for part in value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, dict):
        parts = value.get("address")
        if isinstance(parts, list) and [type(part) for part in parts] == [str, int, str]:
            return Address(*parts)
    raise saved.wrong(what, value, "a key is made of texts, numbers, addresses and lists of those")


@dataclass(frozen=True, slots=True)
class RouteInfo:
    listener: str
    name: str
    cluster: str
    row: int
    service: str | None
    prefix: bool
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PublishInfo:
    """A row that counts what is published."""

    listener: str
    topic: str
    group: str
    """The publisher group that messages name; "" for those that name none."""
    brokers: tuple[str, ...]
    row: int


@dataclass(frozen=True, slots=True)
class EndpointInfo:
    id: int
    cluster: str
    name: str
    """As configured; several ids share it when a host name has several addresses. Of brokers and
    other nodes: their names."""
    address: Address | None
    weight: int
    row: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """A sealed snapshot and what its numbers mean to people."""

    version: int
    config: Config
    snapshot: Snapshot
    limits: Mapping[str, int]
    listener_ids: Mapping[str, int]
    routes: tuple[RouteInfo, ...]
    endpoints: tuple[EndpointInfo, ...]
    cluster_rows: Mapping[str, int]
    listener_rows: Mapping[str, int]
    kinds: Mapping[int, str] = field(default_factory=dict)
    """Of the message mesh: id of a listener or endpoint -> push | forward | brokers | peers."""
    group_ids: Mapping[str, int] = field(default_factory=dict)
    group_rows: Mapping[str, int] = field(default_factory=dict)
    publishes: tuple[PublishInfo, ...] = ()


def engine_limits(limits: Limits, *, connections_max: int, sample_every: int) -> dict[str, int]:
    """Every field of the engine's MeshLimits by name."""
    values: dict[str, int] = dataclasses.asdict(limits)
    for name in ("stop_timeout_ms", "drain_suspend_ms", "drain_answers_ms"):
        del values[name]  # the control plane's own
    values["connections_max"] = connections_max
    values["sample_every"] = sample_every
    return values


def compile_snapshot(
    config: Config,
    *,
    version: int,
    directory: Directory,
    addresses: Callable[[Address], tuple[Address, ...]],
    connections_max: int,
    factory: Callable[[int, Mapping[str, int]], Any] | None = None,
    mesh: MeshView | None = None,
) -> Compiled:
    """Build and seal a snapshot. Raises ValueError when the engine finds a value out of range.
    `mesh` belongs to a configuration with `push`.

    A cluster whose protocol or binding changes gets a new id, so that connections of the old kind
    drain instead of changing under their clients; a listener whose address changes likewise.
    """
    if factory is None:
        from fastmesh._ext.route import Snapshot

        factory = Snapshot
    limits = engine_limits(
        config.limits, connections_max=connections_max, sample_every=config.observe.sample_every
    )
    snapshot = factory(version, limits)
    cluster_ids: dict[str, int] = {}
    cluster_rows: dict[str, int] = {}
    endpoints: list[EndpointInfo] = []
    for cluster in config.clusters:
        cluster_key = ("cluster", cluster.name, cluster.protocol, cluster.binding)
        cluster_id = cluster_ids[cluster.name] = directory.id(cluster_key)
        row = cluster_rows[cluster.name] = directory.row(RowLabel("cluster", cluster=cluster.name))
        snapshot.add_cluster(
            cluster_id,
            codec=cluster.protocol,
            row=row,
            binding=cluster.binding,
            connections=cluster.connections,
            server_requests=cluster.server_requests,
        )
        for endpoint in cluster.endpoints:
            name = str(endpoint.address)
            row = directory.row(RowLabel("endpoint", cluster=cluster.name, endpoint=name))
            for address in addresses(endpoint.address) or (None,):
                endpoint_id = directory.id((cluster_key, "endpoint", name, address))
                snapshot.add_endpoint(
                    cluster_id,
                    endpoint_id,
                    address=_engine_address(address),
                    weight=endpoint.weight,
                    row=row,
                )
                endpoints.append(
                    EndpointInfo(endpoint_id, cluster.name, name, address, endpoint.weight, row)
                )
    listener_ids: dict[str, int] = {}
    listener_rows: dict[str, int] = {}
    routes: list[RouteInfo] = []
    for listener in config.listeners:
        listener_id = directory.id(
            ("listener", listener.name, listener.protocol, str(listener.listen))
        )
        listener_ids[listener.name] = listener_id
        row = directory.row(RowLabel("listener", listener=listener.name, route=NO_ROUTE_NAME))
        listener_rows[listener.name] = row
        if listener.protocol == PUSH:
            snapshot.add_listener(listener_id, codec=PUSH, row=row, kind="push")
            continue
        snapshot.add_listener(listener_id, codec=listener.protocol, row=row)
        for rule in listener.routes:
            row = directory.row(
                RowLabel("route", listener=listener.name, route=rule.name, cluster=rule.cluster)
            )
            rate = rule.rate_limit
            snapshot.add_rule(
                listener_id,
                cluster_id=cluster_ids[rule.cluster],
                row=row,
                service=None if rule.service is None else rule.service.encode(),
                prefix=rule.prefix,
                headers=[(key.encode(), value.encode()) for key, value in rule.headers],
                rate_per_s=rate.per_second if rate else 0,
                burst=rate.burst if rate else 0,
            )
            routes.append(
                RouteInfo(
                    listener.name,
                    rule.name,
                    rule.cluster,
                    row,
                    rule.service,
                    rule.prefix,
                    rule.headers,
                )
            )
    compiled = Compiled(
        version,
        config,
        snapshot,
        limits,
        listener_ids,
        tuple(routes),
        tuple(endpoints),
        cluster_rows,
        listener_rows,
    )
    if mesh is not None and config.push is not None:
        compiled = _MeshBuilder(compiled, mesh, directory, addresses).build()
    snapshot.seal()
    directory.turn()
    return compiled


class _MeshBuilder:
    """Adds the message mesh to a snapshot that has everything else."""

    def __init__(
        self,
        base: Compiled,
        mesh: MeshView,
        directory: Directory,
        addresses: Callable[[Address], tuple[Address, ...]],
    ) -> None:
        self.base = base
        self.mesh = mesh
        self.directory = directory
        self.addresses = addresses
        self.snapshot: Any = base.snapshot
        self.endpoints: list[EndpointInfo] = []
        self.kinds: dict[int, str] = {}
        self.cluster_rows = dict(base.cluster_rows)
        self.routes: list[RouteInfo] = []
        self.publishes: list[PublishInfo] = []

    def build(self) -> Compiled:
        base, mesh, snapshot, directory = self.base, self.mesh, self.snapshot, self.directory
        config = base.config
        assert config.push is not None
        snapshot.set_node(config.node.name.encode())
        brokers = self._cluster(
            BROKERS, "brokers", {b.name: (b.address, b.weight) for b in mesh.brokers}
        )
        peers = self._cluster(PEERS, "peers", {name: (at, 100) for name, at in mesh.peers.items()})
        for listener in config.listeners:
            if listener.protocol == PUSH:
                self.kinds[base.listener_ids[listener.name]] = "push"
                self._publish_rules(listener.name, brokers)
        listener_ids, listener_rows = dict(base.listener_ids), dict(base.listener_rows)
        if config.push.forward is not None:
            number = directory.id(("listener", FORWARD, str(config.push.forward)))
            row = directory.row(RowLabel("listener", listener=FORWARD, route=NO_ROUTE_NAME))
            snapshot.add_listener(number, codec=PUSH, row=row, kind="forward")
            listener_ids[FORWARD], listener_rows[FORWARD] = number, row
            self.kinds[number] = "forward"
        group_ids, group_rows = self._groups(peers)
        return dataclasses.replace(
            base,
            listener_ids=listener_ids,
            listener_rows=listener_rows,
            cluster_rows=self.cluster_rows,
            endpoints=(*base.endpoints, *self.endpoints),
            routes=(*base.routes, *self.routes),
            kinds=self.kinds,
            group_ids=group_ids,
            group_rows=group_rows,
            publishes=tuple(self.publishes),
        )

    def _cluster(
        self, name: str, kind: str, members: Mapping[str, tuple[Address, int]]
    ) -> dict[str, int]:
        """Endpoint ids by name. A host name with several addresses is one connection all the same:
        a broker that is connected twice would push everything twice."""
        directory, snapshot = self.directory, self.snapshot
        number = directory.id(("cluster", name))
        row = self.cluster_rows[name] = directory.row(RowLabel("cluster", cluster=name))
        snapshot.add_cluster(number, codec=PUSH, row=row, kind=kind)
        found: dict[str, int] = {}
        for member, (configured, weight) in members.items():
            address = next(iter(self.addresses(configured)), None)
            endpoint_id = directory.id((name, member, str(configured), address))
            row = directory.row(RowLabel("endpoint", cluster=name, endpoint=member))
            used = 0 if endpoint_id in self.mesh.paused else weight
            snapshot.add_endpoint(
                number, endpoint_id, address=_engine_address(address), weight=used, row=row
            )
            self.endpoints.append(EndpointInfo(endpoint_id, name, member, address, weight, row))
            self.kinds[endpoint_id] = kind
            found[member] = endpoint_id
        return found

    def _publish_rules(self, listener: str, brokers: Mapping[str, int]) -> None:
        """First whatever names its broker, then the topics. What no rule takes has no topic."""
        for name, endpoint_id in brokers.items():
            self._rule(listener, (("fm.broker", name),), None, [endpoint_id])
        publishers: dict[str, list[str]] = {}
        for group in self.mesh.groups:
            if group.publishes:
                publishers.setdefault(group.topic, []).append(group.name)
        for topic in sorted(self.mesh.topics):
            names = [b.name for b in self.mesh.brokers if b.has(topic)]
            if not names:
                continue
            ids = [brokers[name] for name in names]
            for group_name in (*sorted(publishers.get(topic, ())), ""):
                headers = (("fm.group", group_name),) if group_name else ()
                row = self._rule(listener, headers, topic, ids)
                self.publishes.append(PublishInfo(listener, topic, group_name, tuple(names), row))

    def _rule(
        self,
        listener: str,
        headers: tuple[tuple[str, str], ...],
        topic: str | None,
        endpoints: Sequence[int],
    ) -> int:
        pattern = "".join(f"{{{key}={value}}}" for key, value in headers)
        name = (topic or "") + pattern
        row = self.directory.row(RowLabel("route", listener=listener, route=name, cluster=BROKERS))
        self.snapshot.add_rule(
            self.base.listener_ids[listener],
            cluster_id=self.directory.id(("cluster", BROKERS)),
            row=row,
            service=None if topic is None else topic.encode(),
            headers=[(key.encode(), value.encode()) for key, value in headers],
            endpoints=endpoints,
        )
        self.routes.append(RouteInfo(listener, name, BROKERS, row, topic, False, headers))
        return row

    def _groups(self, peers: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """Ids and rows by name, each group with the schedule of its application."""
        ids: dict[str, int] = {}
        rows: dict[str, int] = {}
        schedules: dict[str, int | None] = {}
        for group in self.mesh.groups:
            if group.app not in schedules:
                native = self.mesh.schedule(group.app, peers)
                schedules[group.app] = None
                if native is not None:
                    number = self.directory.id(("schedule", group.app))
                    self.snapshot.add_schedule(number, native)
                    schedules[group.app] = number
            # What changes these has to join anew: unanswered deliveries keep their old meaning.
            ids[group.name] = self.directory.group((group.name, group.ordered, group.broadcast))
            rows[group.name] = self.directory.row(
                RowLabel("group", app=group.app, group=group.name)
            )
            self.snapshot.add_group(
                ids[group.name],
                name=group.name.encode(),
                row=rows[group.name],
                ordered=group.ordered,
                broadcast=group.broadcast,
                schedule_id=schedules[group.app],
            )
        return ids, rows


def _engine_address(address: Address | None) -> tuple[str, int] | str | None:
    if address is None:
        return None
    return address.path if address.is_unix else (address.host, address.port)
