from collections.abc import Mapping, Sequence
from typing import Any

from .schedule import Schedule

def register_codec(name: str, capsule: Any) -> None:
    """Make a codec known by name. `capsule` is a PyCapsule named "fastmesh.codec" around a
    `Codec*`.
    """

def codec_names() -> list[str]: ...

class Snapshot:
    """One immutable configuration for the engine. Build it top to bottom, then `seal()` it.

    All ids and rows are chosen by the caller and stay the same for the same name across snapshots.
    Raises ValueError for an unknown codec, a reference to nothing, or a value out of its range.
    """

    version: int
    def __init__(self, version: int, limits: Mapping[str, int]) -> None:
        """`limits`: every field of MeshLimits by name (`frame_bytes_max` included)."""
    def add_cluster(
        self,
        cluster_id: int,
        *,
        codec: str,
        row: int,
        binding: str = "shared",
        connections: int = 1,
        server_requests: str = "any",
        kind: str = "service",
    ) -> None:
        """`kind`: service, brokers or peers (one connection each, on thread 0 only)."""
    def add_endpoint(
        self,
        cluster_id: int,
        endpoint_id: int,
        *,
        address: tuple[str, int] | str | None,
        weight: int,
        row: int,
    ) -> None:
        """`address`: ("127.0.0.1", 12201) or ("::1", 12201), a UNIX socket path, or None = not
        resolved yet.
        """
    def add_listener(self, listener_id: int, *, codec: str, row: int, kind: str = "relay") -> None:
        """`kind`: relay, push, forward or punt; connections of the last three live on thread 0."""
    def add_rule(
        self,
        listener_id: int,
        *,
        cluster_id: int,
        row: int,
        service: bytes | None = None,
        prefix: bool = False,
        headers: Sequence[tuple[bytes, bytes]] = (),
        rate_per_s: int = 0,
        burst: int = 0,
        park: bool = False,
        endpoints: Sequence[int] = (),
    ) -> None:
        """`service` None matches everything; with `prefix` it is what that must start with.
        `endpoints`: ids of the cluster's endpoints that it may go to, () = all; at most 64 in such
        a cluster.
        """
    def add_schedule(self, schedule_id: int, schedule: Schedule) -> None:
        """Give the same object again while nothing in it has changed: shares go on where they
        were."""
    def add_group(
        self,
        group_id: int,
        *,
        name: bytes,
        row: int,
        ordered: bool = False,
        broadcast: bool = False,
        schedule_id: int | None = None,
    ) -> None:
        """A push group, found by `name` in `fm.group`; `group_id` is in 1..65535."""
    def set_node(self, name: bytes) -> None:
        """This node's name, as its peers know it: the origin of what it forwards."""
    def seal(self) -> None: ...
    def find(self, listener_id: int, frame: bytes) -> tuple[int, int] | None:
        """For tests and `fastmesh check`: (row, cluster_id) that a frame would be routed to, or
        None.
        """
    def bench(self, listener_id: int, frame: bytes, rounds: int) -> float:
        """Nanoseconds per lookup of one frame, without the GIL."""
    def chains(self, listener_id: int) -> list[int]:
        """For tests: how many rules hang on each head of a listener's hash table, in the table's
        order.
        """
    def endpoint_addresses(self, cluster_id: int) -> list[tuple[int, bytes]]:
        """For tests: (endpoint_id, `struct sockaddr`) of a sealed snapshot's cluster; b"" = not
        resolved yet.
        """

LIMITS: dict[str, tuple[int, int]]
"""Every limit that a snapshot needs: lowest and highest legal value."""
