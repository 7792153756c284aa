"""A configuration and its resolved addresses, compiled into the engine's immutable snapshot.

The same listener, cluster or endpoint has the same id in every snapshot, and the same name the same
counter row for the life of the process: a row is never given to another name, so a counter never
jumps. Names beyond the table are counted together as `__other__`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmesh.config import Address, Config, Limits
from fastmesh.limits import NO_ROUTE_NAME, ROW_OTHER

if TYPE_CHECKING:
    from fastmesh._ext.route import Snapshot


@dataclass(frozen=True, slots=True)
class RowLabel:
    """What a counter row stands for; "" where a label does not apply."""

    kind: str
    """listener | route | cluster | endpoint"""
    listener: str = ""
    route: str = ""
    cluster: str = ""
    endpoint: str = ""


class Directory:
    """Hands out ids and rows, and remembers which is whose."""

    def __init__(self, rows_max: int) -> None:
        self._rows_max = rows_max
        self._rows: dict[RowLabel, int] = {}
        self._ids: dict[Hashable, int] = {}
        self._next_id = 1
        self._kept: set[Hashable] = set()
        self._used: set[Hashable] = set()

    def row(self, label: RowLabel) -> int:
        row = self._rows.get(label)
        if row is None:
            row = ROW_OTHER + 1 + len(self._rows)
            if row >= self._rows_max:
                return ROW_OTHER
            self._rows[label] = row
        return row

    def id(self, key: Hashable) -> int:
        self._used.add(key)
        found = self._ids.get(key)
        if found is None:
            found = self._ids[key] = self._next_id
            self._next_id += 1
        return found

    def turn(self) -> None:
        """End of a compilation. Forgets ids that neither this snapshot nor the last one used (names
        that come and go would fill memory); an id is never given out a second time."""
        alive = self._used | self._kept
        self._ids = {key: found for key, found in self._ids.items() if key in alive}
        self._kept, self._used = self._used, set()

    def rows(self) -> Mapping[RowLabel, int]:
        return self._rows


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
class EndpointInfo:
    id: int
    cluster: str
    name: str
    """As configured; several ids share it when a host name has several addresses."""
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


def engine_limits(limits: Limits, *, connections_max: int, sample_every: int) -> dict[str, int]:
    """Every field of the engine's MeshLimits by name."""
    values: dict[str, int] = dataclasses.asdict(limits)
    del values["stop_timeout_ms"]  # the control plane's own
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
) -> Compiled:
    """Build and seal a snapshot. Raises ValueError when the engine finds a value out of range.

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
    snapshot.seal()
    directory.turn()
    return Compiled(
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


def _engine_address(address: Address | None) -> tuple[str, int] | str | None:
    if address is None:
        return None
    return address.path if address.is_unix else (address.host, address.port)
