"""A test bed for the message mesh: the real engine, scripted push clients, brokers and peers,
and the part of Python played by the test.

with PushBed() as bed:
    broker, client = bed.broker(), bed.subscriber("g")
    broker.sendall(deliver(5, "g", b"x"))
    asked = client.frame()
    client.sendall(answer(asked, "consumed"))
    assert result(broker.frame()) == "consumed"
"""

from __future__ import annotations

import select
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from fastmesh._ext.engine import Engine, Event
from fastmesh._ext.push import parse, request, response
from fastmesh._ext.route import Snapshot
from fastmesh._ext.schedule import Schedule
from tests._ext.bed import LIMITS, WAIT_S, Peer, eventually
from tests.reference import bolt

PUSH, FORWARD, PUNT = 1, 2, 3
BROKERS, PEERS = 4, 5
BROKER_ID, PEER_ID = 100, 200
ROUTE_ROW, PUSH_ROW, FORWARD_ROW, PUNT_ROW = 10, 11, 12, 13
BROKERS_ROW, PEERS_ROW, BROKER_ROW, PEER_ROW = 14, 15, 30, 50
GROUP_ID, GROUP_ROW = 300, 70
HELLO_TICKET = 1 << 40


def headers_of(frame: bolt.Frame) -> dict[str, str]:
    return parse(frame.data).headers


def result(frame: bolt.Frame) -> str:
    return headers_of(frame).get("fm.result", f"status {frame.status}")


def deliver(id: int, group: str, content: bytes = b"", /, **more: str) -> bytes:
    return request(
        id, keyed({"fm.op": "deliver", "fm.group": group, "fm.topic": "t"}, more), content
    )


def publish(id: int, topic: str, content: bytes = b"", /, **more: str) -> bytes:
    return request(id, keyed({"fm.op": "publish", "fm.topic": topic}, more), content)


def keyed(first: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    return {**first, **{f"fm.{key}": value for key, value in more.items()}}


def answer(asked: bolt.Frame, said: str, content: bytes = b"", /, **more: str) -> bytes:
    frame = parse(asked.data)
    return response(frame.id, frame.hint, keyed({"fm.result": said}, more), content)


def gather(peers: Sequence[Peer], count: int) -> list[tuple[Peer, bolt.Frame]]:
    """The next `count` frames that come to any of them, with who got each."""
    found: list[tuple[Peer, bolt.Frame]] = []
    while len(found) < count:
        ready = [peer for peer in peers if peer.waiting()]
        if not ready:
            socks = [peer.sock for peer in peers]
            ready = [p for p in peers if p.sock in select.select(socks, [], [], WAIT_S)[0]]
            assert ready, f"{len(found)} of {count} came"
        found += [(peer, peer.frame()) for peer in ready]
    return found


class PushBed:
    """Brokers, peers, groups by name; `nodes` makes a schedule in which this node is "me"."""

    def __init__(
        self,
        *,
        brokers: int = 1,
        peers: int = 0,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        nodes: Mapping[str, int] | None = None,
        threads: int = 1,
        ring_bytes: int = 1 << 20,
        topics: Mapping[str, Sequence[int]] | None = None,
        **limits: int,
    ) -> None:
        self.limits = {**LIMITS, **limits}
        self.ring_bytes = ring_bytes
        self.groups = dict(groups or {"g": {}})
        self.topics = dict(topics or {})
        self.brokers = [self._server() for _ in range(brokers)]
        self.peers = [self._server() for _ in range(peers)]
        self.version = 0
        self.names: dict[socket.socket, Any] = {}  # of servers, which may be closed by now
        self.events: list[Event] = []
        self.open: list[Peer] = []
        self.schedule: Schedule | None = self.scheduled(nodes) if nodes else None
        self.engine = Engine(threads=threads, watchdog=False, seed=1, ring_bytes=ring_bytes)
        self.fronts = {number: self._server() for number in (PUSH, FORWARD, PUNT)}
        self.engine.start(self.snapshot())
        for number, front in self.fronts.items():
            self.engine.listen(number, front.fileno())

    def _server(self) -> socket.socket:
        server = socket.socket()
        server.bind(("127.0.0.1", 0))
        server.listen(512)
        server.settimeout(WAIT_S)
        return server

    def _name(self, server: socket.socket) -> Any:
        if server not in self.names:
            self.names[server] = server.getsockname()
        return self.names[server]

    def scheduled(self, nodes: Mapping[str, int]) -> Schedule:
        """`nodes`: weights by name; all but "me" are peers, in the order of `self.peers`."""
        others = [name for name in nodes if name != "me"]
        return Schedule(
            nodes=list(nodes.items()),
            rules=[],
            local="me",
            endpoints={name: PEER_ID + i for i, name in enumerate(others)},
        )

    def group_id(self, name: str) -> int:
        return GROUP_ID + list(self.groups).index(name)

    def group_items(self) -> list[tuple[int, str, Mapping[str, Any]]]:
        """What the next snapshot holds: number, name and how it is."""
        return [(i, name, how) for i, (name, how) in enumerate(self.groups.items())]

    def snapshot(self, **limits: int) -> Snapshot:
        self.version += 1
        self.limits.update(limits)
        made = Snapshot(self.version, self.limits)
        made.set_node(b"me")
        made.add_cluster(BROKERS, codec="push", row=BROKERS_ROW, kind="brokers")
        for i, server in enumerate(self.brokers):
            made.add_endpoint(
                BROKERS, BROKER_ID + i, address=self._name(server), weight=100, row=BROKER_ROW + i
            )
        made.add_cluster(PEERS, codec="push", row=PEERS_ROW, kind="peers")
        for i, server in enumerate(self.peers):
            made.add_endpoint(
                PEERS, PEER_ID + i, address=self._name(server), weight=100, row=PEER_ROW + i
            )
        made.add_listener(PUSH, codec="push", row=PUSH_ROW, kind="push")
        made.add_listener(FORWARD, codec="push", row=FORWARD_ROW, kind="forward")
        made.add_listener(PUNT, codec="push", row=PUNT_ROW, kind="punt")
        for topic, where in self.topics.items():
            made.add_rule(
                PUSH, cluster_id=BROKERS, row=ROUTE_ROW, service=topic.encode(),
                endpoints=[BROKER_ID + i for i in where],
            )  # fmt: skip
        made.add_rule(PUSH, cluster_id=BROKERS, row=ROUTE_ROW)
        if self.schedule is not None:
            made.add_schedule(1, self.schedule)
        for i, name, how in self.group_items():
            made.add_group(
                GROUP_ID + i,
                name=name.encode(),
                row=GROUP_ROW + i,
                schedule_id=None if self.schedule is None else 1,
                **how,
            )
        made.seal()
        return made

    def publish(self, **limits: int) -> None:
        self.engine.publish(self.snapshot(**limits))
        eventually(lambda: self.engine.in_force() == self.version, "snapshot in force")

    # --- the three kinds of peers -----------------------------------------------------------------

    def _connect(self, front: int) -> Peer:
        sock = socket.create_connection(self.fronts[front].getsockname(), timeout=WAIT_S)
        peer = Peer(sock)
        self.open.append(peer)
        return peer

    def _accept(self, server: socket.socket) -> Peer:
        peer = Peer(server.accept()[0])
        self.open.append(peer)
        return peer

    def client(self, front: int = PUSH) -> Peer:
        """Connected, and greeted by Python."""
        peer = self._connect(front)
        peer.sendall(request(1, {"fm.op": "hello"}))
        punted = self.punted(peer)
        self.engine.reply(punted.a, self.answered(punted, "consumed"), greet=True)
        assert result(peer.frame()) == "consumed"
        peer.handle = punted.a  # type: ignore[attr-defined]
        return peer

    def subscriber(self, *groups: str, prefetch: int = 32) -> Peer:
        peer = self.client()
        self.subscribe(peer, *groups, prefetch=prefetch)
        return peer

    def subscribe(self, peer: Peer, *groups: str, prefetch: int = 32) -> None:
        pairs = [(self.group_id(name), prefetch) for name in groups]
        self.engine.subscribe(peer.handle, pairs)  # type: ignore[attr-defined]
        # a round trip through the command ring: what was subscribed before it is in force
        self.process()

    def broker(self, number: int = 0) -> Peer:
        """The next connection to it, greeted by Python."""
        peer = self.accept_broker(number)
        self.greet(peer, number)
        return peer

    def accept_broker(self, number: int = 0) -> Peer:
        """The next connection to it; nothing was said yet."""
        return self._accept(self.brokers[number])

    def greet(self, peer: Peer, number: int = 0) -> None:
        """Say hello on the newest connection to a broker, and have it answered."""
        opened = eventually(lambda: [e for e in self.seen("opened") if e.b == BROKER_ID + number])
        self.engine.call_many([(opened[-1].a, HELLO_TICKET, request(1, {"fm.op": "hello"}), 5000)])
        asked = peer.frame()
        assert headers_of(asked)["fm.op"] == "hello"
        peer.sendall(answer(asked, "consumed"))
        eventually(lambda: [e for e in self.seen("answer") if e.a == HELLO_TICKET])
        self.events = [e for e in self.events if (e.kind, e.a) != ("answer", HELLO_TICKET)]

    def peer(self, number: int = 0, *groups: str) -> Peer:
        """A peer that is up and says that it has consumers of these groups."""
        up = self._accept(self.peers[number])
        eventually(lambda: [e for e in self.seen("opened") if e.b == PEER_ID + number])
        self.engine.peer_groups(PEER_ID + number, [self.group_id(name) for name in groups])
        self.process()
        return up

    # --- Python's part ----------------------------------------------------------------------------

    def seen(self, kind: str) -> list[Event]:
        self.events += self.engine.events()
        return [event for event in self.events if event.kind == kind]

    def wait_event(self, kind: str, count: int = 1) -> list[Event]:
        return eventually(
            lambda: found if len(found := self.seen(kind)) >= count else None, f"event {kind}"
        )

    def punted(self, peer: Peer) -> Event:
        """The next frame that Python was given; taken out of what was seen."""
        event = self.wait_event("frame")[0]
        self.events.remove(event)
        return event

    def answered(self, punted: Event, said: str, **more: str) -> bytes:
        frame = parse(punted.data)
        return response(frame.id, frame.hint, keyed({"fm.result": said}, more))

    # --- counters ---------------------------------------------------------------------------------

    def _read(self) -> Any:
        ticket = self.engine.ask_counters()
        eventually(lambda: self.engine.counters_ready(ticket), "counters")
        return self.engine.counters()

    def row(self, row: int = GROUP_ROW) -> dict[str, int]:
        return {name: value for name, value in self._read().row(row).items() if value}

    def process(self) -> dict[str, int]:
        return {name: value for name, value in self._read().process().items() if value}

    def balanced(self) -> bool:
        reading = self._read()
        rows = [ROUTE_ROW, PUSH_ROW, FORWARD_ROW, PUNT_ROW, BROKERS_ROW, PEERS_ROW]
        rows += [GROUP_ROW + i for i in range(len(self.groups))]
        for block in ("requests", "pushes"):
            sums: dict[str, int] = {}
            for row in rows:
                for name, value in reading.row(row).items():
                    kind, _, rest = name.partition(".")
                    if kind == block:
                        sums[rest] = sums.get(rest, 0) + value
            failed = sum(value for name, value in sums.items() if name.startswith("failed"))
            owed = sums["answered"] + failed + sums["expired"] + sums["in_flight"]
            assert sums["accepted"] == owed, (block, sums)
        return True

    def __enter__(self) -> PushBed:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self.open:
            peer.close()
        assert self.engine.stop(), "an engine thread did not stop"
        for server in (*self.brokers, *self.peers, *self.fronts.values()):
            server.close()
