"""A test bed: the real engine in this process, between plain blocking sockets that a test scripts.

with Bed() as bed:
    client, upstream = bed.client(), bed.upstream()
    client.sendall(bolt.request(7, "s", b"x"))
    asked = upstream.frame()
    upstream.sendall(bolt.response_to(asked, b"y"))
    assert client.frame().id == 7
"""

from __future__ import annotations

import os
import select
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from fastmesh._ext.engine import Engine, Event
from fastmesh._ext.route import Snapshot
from tests.reference import bolt

WAIT_S = 5.0
LIMITS = {
    "frame_bytes_max": 4 << 20,
    "in_flight_max": 65536,
    "in_flight_per_connection_max": 4096,
    "connections_max": 1000,
    "queue_bytes_max": 8 << 20,
    "memory_bytes_max": 512 << 20,
    "request_timeout_ms": 3000,
    "request_timeout_ms_max": 3600000,
    "first_byte_timeout_ms": 90000,
    "frame_timeout_ms": 10000,
    "idle_timeout_ms": 90000,
    "connect_timeout_ms": 1000,
    "heartbeat_ms": 15000,
    "backoff_ms": 20,
    "backoff_ms_max": 100,
    "eject_failures": 1000,
    "eject_ms": 1000,
    "eject_ms_max": 30000,
    "eject_percent_max": 50,
    "slow_start_ms": 0,
    "retries_max": 2,
    "sample_every": 0,
}
LISTENER, CLUSTER = 1, 1
ROUTE_ROW, CLUSTER_ROW, LISTENER_ROW, ENDPOINT_ROW = 10, 11, 12, 20


def eventually(look: Callable[[], Any], what: str = "", wait_s: float = WAIT_S) -> Any:
    """Poll until `look()` is true; returns what it returned."""
    end = time.monotonic() + wait_s
    while not (found := look()):
        assert time.monotonic() < end, f"not within {wait_s} s: {what or look}"
        time.sleep(0.002)
    return found


class Peer:
    """One end of a connection, speaking Bolt unless read as raw bytes."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(WAIT_S)
        self.sock = sock
        self._reader = bolt.FrameReader(1 << 30)
        self._frames: list[bolt.Frame] = []

    def sendall(self, data: bytes) -> None:
        self.sock.sendall(data)

    def frame(self) -> bolt.Frame:
        """The next frame; EOFError when the other side closed, TimeoutError when nothing came."""
        while not self._frames:
            data = self.sock.recv(1 << 20)
            if not data:
                raise EOFError
            self._frames += self._reader.feed(data)
        return self._frames.pop(0)

    def waiting(self) -> bool:
        """A whole frame was read already."""
        return bool(self._frames)

    def frames(self, count: int) -> list[bolt.Frame]:
        return [self.frame() for _ in range(count)]

    def raw(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            assert piece, f"closed after {data!r}"
            data += piece
        return data

    def expect(self, data: bytes) -> None:
        """Exactly these bytes come next."""
        assert self.raw(len(data)) == data

    def ended(self) -> bool:
        """The other side closes, now or within WAIT_S, and says nothing more."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def silent(self, for_s: float = 0.1) -> bool:
        """Nothing comes for a while (used where nothing may come, never to synchronise)."""
        return not self._frames and not select.select([self.sock], [], [], for_s)[0]

    def close(self) -> None:
        self.sock.close()


class Bed:
    """`endpoints` listening sockets behind one cluster, one listener before it."""

    def __init__(
        self,
        *,
        endpoints: int = 1,
        threads: int = 1,
        codec: str = "bolt",
        binding: str = "shared",
        connections: int = 1,
        server_requests: str = "any",
        weights: Sequence[int] = (),
        rule: dict[str, Any] | None = None,
        first_generation: int = 1,
        watchdog: bool = False,
        spin_us: int = 0,
        family: int = socket.AF_INET,
        **limits: int,
    ) -> None:
        self.family = family
        self.folder = (
            tempfile.TemporaryDirectory(prefix="bed") if family == socket.AF_UNIX else None
        )
        self.limits = {**LIMITS, **limits}
        self.cluster = {"codec": codec, "binding": binding, "connections": connections,
                        "server_requests": server_requests}  # fmt: skip
        self.codec = codec
        self.rule = rule or {}
        self.weights = list(weights) or [100] * endpoints
        self.servers = [self._server() for _ in range(endpoints)]
        self.version = 0
        self.names: dict[int, Any] = {}  # of servers, which may be closed by now
        self.endpoints: Sequence[int] | None = None  # of the newest snapshot, None = all
        self.events: list[Event] = []
        self.open: list[Peer] = []
        self.engine = Engine(
            threads=threads,
            watchdog=watchdog,
            first_generation=first_generation,
            spin_us=spin_us,
            seed=1,
        )
        self.front = self._server()
        self.engine.start(self.snapshot())
        self.engine.listen(LISTENER, self.front.fileno())

    def _server(self) -> socket.socket:
        server = socket.socket(self.family)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.folder is not None:
            server.bind(f"{self.folder.name}/{len(os.listdir(self.folder.name))}.sock")
        else:
            server.bind(("127.0.0.1" if self.family == socket.AF_INET else "::1", 0))
        server.listen(512)
        server.settimeout(WAIT_S)
        return server

    def snapshot(self, endpoints: Sequence[int] | None = None, **limits: int) -> Snapshot:
        self.version += 1
        self.endpoints = endpoints
        self.limits.update(limits)
        made = Snapshot(self.version, self.limits)
        made.add_cluster(CLUSTER, row=CLUSTER_ROW, **self.cluster)
        for i in range(len(self.servers)) if endpoints is None else endpoints:
            if i not in self.names:
                self.names[i] = self.servers[i].getsockname()
            name = self.names[i]
            made.add_endpoint(
                CLUSTER, i + 1, address=name if isinstance(name, str) else name[:2],
                weight=self.weights[i], row=ENDPOINT_ROW + i,
            )  # fmt: skip
        made.add_listener(LISTENER, codec=self.codec, row=LISTENER_ROW)
        made.add_rule(LISTENER, cluster_id=CLUSTER, row=ROUTE_ROW, **self.rule)
        made.seal()
        return made

    def publish(self, endpoints: Sequence[int] | None = None, **limits: int) -> None:
        self.engine.publish(self.snapshot(endpoints, **limits))
        eventually(lambda: self.engine.in_force() == self.version, "snapshot in force")

    def client(self) -> Peer:
        sock = socket.socket(self.family)
        sock.settimeout(WAIT_S)
        sock.connect(self.front.getsockname())
        peer = Peer(sock)
        self.open.append(peer)
        return peer

    def upstream(self, endpoint: int = 0) -> Peer:
        """The next connection that the engine opens (or has opened) to this endpoint."""
        peer = Peer(self.servers[endpoint].accept()[0])
        self.open.append(peer)
        return peer

    def speaking(self, count: int) -> Peer:
        """Of the `count` connections to the first endpoint, the one that a request came down."""
        peers = [self.upstream() for _ in range(count)]
        ready = select.select([peer.sock for peer in peers], [], [], WAIT_S)[0]
        return next(peer for peer in peers if peer.sock in ready)

    def seen(self, kind: str) -> list[Event]:
        self.events += self.engine.events()
        return [event for event in self.events if event.kind == kind]

    def wait_event(self, kind: str, count: int = 1) -> list[Event]:
        return eventually(
            lambda: found if len(found := self.seen(kind)) >= count else None, f"event {kind}"
        )

    def _read(self) -> Any:
        ticket = self.engine.ask_counters()
        eventually(lambda: self.engine.counters_ready(ticket), "counters")
        return self.engine.counters()

    def row(self, row: int = ROUTE_ROW) -> dict[str, int]:
        """Counters of a row that are not zero."""
        return {name: value for name, value in self._read().row(row).items() if value}

    def process(self) -> dict[str, int]:
        return {name: value for name, value in self._read().process().items() if value}

    def balanced(self) -> bool:
        """The ledger of both directions over all rows but the endpoints', from one copy."""
        reading = self._read()
        for block in ("requests", "pushes"):
            sums: dict[str, int] = {}
            for row in (ROUTE_ROW, CLUSTER_ROW, LISTENER_ROW):
                for name, value in reading.row(row).items():
                    kind, _, rest = name.partition(".")
                    if kind == block:
                        sums[rest] = sums.get(rest, 0) + value
            failed = sum(value for name, value in sums.items() if name.startswith("failed"))
            owed = sums["answered"] + failed + sums["expired"] + sums["in_flight"]
            assert sums["accepted"] == owed, (block, sums)
        return True

    def connections(self) -> Iterator[dict[str, object]]:
        ticket = self.engine.ask_connections()
        eventually(lambda: self.engine.connections_ready(ticket), "connections")
        return iter(self.engine.connections())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self.open:
            peer.close()
        assert self.engine.stop(), "an engine thread did not stop"
        for server in (*self.servers, self.front):
            server.close()
        if self.folder is not None:
            self.folder.cleanup()
