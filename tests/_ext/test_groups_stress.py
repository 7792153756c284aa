"""Everything at once: clients, brokers and peers subscribe, publish, deliver, answer, die, while
snapshots change groups and schedules and memory runs out; then all of it must add up."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import time
from typing import Any

import pytest

from fastmesh._ext.push import parse, request, response
from fastmesh._ext.schedule import Schedule
from tests._ext.bed import Peer, eventually
from tests._ext.push_bed import FORWARD, GROUP_ID, PEER_ID, PUSH, PushBed, keyed
from tests._ext.test_groups import reset

SEEDS = int(os.environ.get("FASTMESH_STRESS_SEEDS", "3"))
STEPS = int(os.environ.get("FASTMESH_STRESS_STEPS", "400"))
GROUPS = {
    "plain": {},
    "ordered": {"ordered": True},
    "all": {"broadcast": True},
    "other": {},
}
RESULTS = ["consumed"] * 6 + ["later", "no_consumer", "reject"]


class Actor:
    """One scripted end of a connection. `asks`: ids it waits for; `owes`: frames unanswered."""

    def __init__(self, kind: str, peer: Peer) -> None:
        self.kind = kind
        self.peer = peer
        self.asks: set[int] = set()
        self.owes: list[Any] = []
        self.next_id = 0
        self.alive = True
        self.handle = 0
        peer.sock.setblocking(False)


class Stress:
    def __init__(self, bed: PushBed, seed: int) -> None:
        self.bed = bed
        self.dice = random.Random(seed)
        self.actors: list[Actor] = []
        self.answers = 0

    # --- moving bytes ----------------------------------------------------------------------------

    def end(self, actor: Actor) -> None:
        actor.alive = False
        with contextlib.suppress(OSError):
            reset(actor.peer)
        self.actors.remove(actor)

    def write(self, actor: Actor, data: bytes) -> None:
        try:
            actor.peer.sock.setblocking(True)
            actor.peer.sock.settimeout(5)
            actor.peer.sock.sendall(data)
            actor.peer.sock.setblocking(False)
        except OSError:
            self.end(actor)

    def read(self, actor: Actor) -> None:
        try:
            data = actor.peer.sock.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.end(actor)
            return
        for frame in actor.peer._reader.feed(data):
            found = parse(frame.data)
            if found.kind == "response":
                # exactly once, and never an answer to a question that was not asked
                assert found.id in actor.asks, (actor.kind, found)
                actor.asks.remove(found.id)
                self.answers += 1
            elif found.kind == "request":
                actor.owes.append(found)
            elif found.kind == "heartbeat":
                pass

    def pump(self, wait_s: float = 0.0) -> bool:
        """Whatever came, to everybody, and Python's part. False = nothing did."""
        moved = False
        for server in self.bed.brokers + self.bed.peers:
            while select.select([server], [], [], 0)[0]:
                kind = "broker" if server in self.bed.brokers else "peer"
                self.actors.append(Actor(kind, Peer(server.accept()[0])))
                moved = True
        by_socket = {actor.peer.sock: actor for actor in self.actors}
        if by_socket:
            for sock in select.select(list(by_socket), [], [], wait_s)[0]:
                self.read(by_socket[sock])
                moved = True
        if self.lazy and self.dice.random() < 0.97:
            return moved  # Python has other things to do: the ring fills
        for event in self.bed.engine.events():
            moved = True
            if event.kind == "frame":
                found = parse(event.data)
                said = b""
                if found.kind == "request":
                    said = response(found.id, found.hint, {"fm.result": "consumed"})
                if event.c == 0:
                    self.command(lambda h=event.a, s=said: self.bed.engine.reply(h, s, greet=True))
                else:
                    self.command(lambda h=event.a, s=said: self.bed.engine.send(h, s))
            elif event.kind == "opened":
                if event.b in (PUSH, FORWARD) and event.c == 0:
                    self.handles.append(event.a)
                elif event.b < PEER_ID:
                    self.call(event.a, "hello", 5000)  # what is for a broker waits for it
                else:
                    self.command(
                        lambda e=event.b: self.bed.engine.peer_groups(e, self.some_groups())
                    )
            elif event.kind == "gone" and event.a in self.handles:
                self.handles.remove(event.a)
            elif event.kind == "answer":
                self.tickets.remove(event.a)
        return moved

    lazy = False
    handles: list[int]
    tickets: list[int]

    def command(self, give: Any) -> None:
        while True:
            try:
                give()
            except BlockingIOError:
                time.sleep(0.001)
            else:
                return

    def some_groups(self) -> list[int]:
        count = self.dice.randrange(len(GROUPS) + 1)
        return [GROUP_ID + i for i in self.dice.sample(range(len(GROUPS)), count)]

    # --- what may happen --------------------------------------------------------------------------

    def step(self) -> None:
        what = self.dice.choices(
            ["connect", "subscribe", "publish", "deliver", "forward", "answer", "die", "snapshot",
             "memory", "call", "half", "pump"],
            [12, 12, 15, 40, 8, 60, 2, 2, 3, 3, 1, 10],
        )[0]  # fmt: skip
        getattr(self, "do_" + what)()
        self.pump(self.dice.choice([0, 0, 0.002]))

    def one(self, *kinds: str) -> Actor | None:
        fit = [actor for actor in self.actors if actor.kind in kinds]
        return self.dice.choice(fit) if fit else None

    def do_pump(self) -> None:
        self.pump()

    def do_connect(self) -> None:
        if sum(actor.kind in ("client", "forwarder") for actor in self.actors) > 12:
            return
        kind, front = self.dice.choice([("client", PUSH), ("client", PUSH), ("forwarder", FORWARD)])
        sock = socket.create_connection(self.bed.fronts[front].getsockname(), timeout=5)
        actor = Actor(kind, Peer(sock))
        self.actors.append(actor)
        self.ask(actor, {"fm.op": "hello"})

    def ask(self, actor: Actor, headers: dict[str, str], content: bytes = b"", **how: Any) -> None:
        actor.next_id += 1
        dialect = self.dice.choice([0, 0, 1, 2])
        oneway = self.dice.random() < 0.1 and headers["fm.op"] != "hello"
        if not oneway:
            actor.asks.add(actor.next_id)
        self.write(
            actor,
            request(
                actor.next_id, headers, content, oneway=oneway, dialect=dialect,
                crc=dialect == 2 and self.dice.random() < 0.5,
                timeout_ms=self.dice.choice([0, 0, 30, 200]),
            ),
        )  # fmt: skip

    def content(self) -> bytes:
        return bytes(self.dice.choice([0, 10, 900, 5000, 60000]))

    def do_subscribe(self) -> None:
        if self.handles:
            handle = self.dice.choice(self.handles)
            pairs = [(group, self.dice.choice([0, 1, 2, 10])) for group in self.some_groups()]
            self.command(lambda: self.bed.engine.subscribe(handle, pairs))

    def do_publish(self) -> None:
        if actor := self.one("client"):
            headers = keyed({"fm.op": "publish", "fm.topic": "t"}, {"id": "m"})
            if self.dice.random() < 0.5:
                headers["fm.idempotent"] = "1"
            self.ask(actor, headers, self.content())

    def do_deliver(self) -> None:
        if actor := self.one("broker"):
            for _ in range(self.dice.randrange(1, 6)):
                if actor.alive:
                    op = self.dice.choice(
                        ["deliver"] * 8 + ["check"] + ["suspend"] * (20 if self.lazy else 2)
                    )
                    headers = {"fm.op": op, "fm.group": self.dice.choice(list(GROUPS))}
                    headers["fm.key"] = str(self.dice.randrange(5))
                    self.ask(actor, headers, self.content())

    def do_forward(self) -> None:
        if actor := self.one("forwarder"):
            group = self.dice.choice(list(GROUPS))
            origin = self.dice.choice(["z", "z", "z", "me"])
            headers = {"fm.op": "forward", "fm.group": group, "fm.hop": "1", "fm.origin": origin}
            headers["fm.key"] = str(self.dice.randrange(5))
            self.ask(actor, headers, self.content())

    def do_answer(self) -> None:
        for actor in list(self.actors):
            self.dice.shuffle(actor.owes)
            for _ in range(self.dice.randrange(4)):
                if actor.alive and actor.owes:
                    self.answer(actor)

    def answer(self, actor: Actor) -> None:
        asked = actor.owes.pop()
        said = {"fm.result": self.dice.choice(RESULTS)}
        if said["fm.result"] == "later":
            said["fm.retry_ms"] = "1"
        twice = 2 if self.dice.random() < 0.05 else 1
        self.write(actor, response(asked.id, asked.hint, said, self.content()) * twice)

    def do_die(self) -> None:
        for _ in range(self.dice.choice([1, 1, 2, 4])):
            if actor := self.one("client", "client", "forwarder", "broker", "peer"):
                self.end(actor)

    def do_half(self) -> None:
        if actor := self.one("client"):
            with contextlib.suppress(OSError):
                actor.peer.sock.shutdown(socket.SHUT_WR)
            actor.kind = "mute"

    def do_snapshot(self) -> None:
        names = {name for name in GROUPS if self.dice.random() < 0.8}
        self.bed.schedule = Schedule(
            nodes=[("me", self.dice.choice([0, 50, 100])), ("a", 100), ("b", 100)],
            rules=[], local="me", endpoints={"a": PEER_ID, "b": PEER_ID + 1},
        )  # fmt: skip
        self.publish(names)

    def publish(self, names: set[str]) -> None:
        made = self.bed.snapshot_of(names)
        self.command(lambda: self.bed.engine.publish(made))

    def do_memory(self) -> None:
        after = self.dice.choice([1, 1, 2, 3, 5, 8])
        self.command(lambda: self.bed.engine._fail_alloc(after))

    def do_call(self) -> None:
        if self.handles:
            self.call(self.dice.choice(self.handles), "goaway", 50)

    def call(self, handle: int, op: str, timeout_ms: int) -> None:
        ticket = len(self.tickets) + 1000 * self.dice.randrange(1, 1 << 40)
        self.tickets.append(ticket)
        call = (handle, ticket, request(1, {"fm.op": op}), timeout_ms)
        while not self.bed.engine.call_many([call]):
            time.sleep(0.001)

    # --- the end ----------------------------------------------------------------------------------

    def settle(self) -> None:
        """All that is owed is answered, and all that was asked."""
        self.lazy = False
        self.command(lambda: self.bed.engine._fail_alloc(0))
        end = time.monotonic() + 20
        while time.monotonic() < end:
            moved = self.pump(0.02)
            for actor in list(self.actors):
                while actor.alive and actor.owes and actor.kind != "mute":
                    self.answer(actor)
                    moved = True
            if not moved and not any(actor.asks for actor in self.actors) and not self.tickets:
                return
        asking = [(actor.kind, sorted(actor.asks)) for actor in self.actors if actor.asks]
        raise AssertionError(f"unanswered: {asking}, calls {self.tickets}")


class StressBed(PushBed):
    def snapshot_of(self, names: set[str]) -> Any:
        """A snapshot with these groups only; ids and rows stay."""
        whole, self.left_out = self.groups, set(GROUPS) - names
        try:
            return self.snapshot()
        finally:
            self.groups = whole

    left_out: set[str] = set()  # noqa: RUF012

    def group_items(self) -> list[tuple[int, str, Any]]:
        return [item for item in super().group_items() if item[1] not in self.left_out]


def rows_in_flight(bed: PushBed) -> dict[int, int]:
    reading = bed._read()
    return {
        row: count
        for row in range(100)
        for name, count in reading.row(row).items()
        if name.endswith("in_flight") and count
    }


@pytest.mark.parametrize("seed", range(SEEDS))
def test_it_all_adds_up(seed):
    with StressBed(
        brokers=2, peers=2, groups=GROUPS, nodes={"me": 50, "a": 100, "b": 100},
        request_timeout_ms=300, heartbeat_ms=0,
        ring_bytes=1 << (16 if seed % 2 else 18),
        queue_bytes_max=1 << 20, threads=1 + seed % 3 // 2,
    ) as bed:  # fmt: skip
        stress = Stress(bed, seed)
        stress.handles, stress.tickets = [], []
        stress.lazy = False
        for _ in range(50):
            stress.pump(0.001)
        before = bed.process()["memory"]
        stress.lazy = seed % 4 == 1
        for _ in range(STEPS):
            stress.step()
        stress.settle()
        assert stress.answers > 50
        eventually(lambda: not rows_in_flight(bed), "nothing is in flight")
        assert bed.balanced()
        for actor in list(stress.actors):
            if actor.kind not in ("broker", "peer"):
                stress.end(actor)
        eventually(lambda: stress.pump() or not bed.process().get("connections"), "gone")
        # Whatever still rests goes with its connection.
        for actor in list(stress.actors):
            stress.end(actor)
        for _ in range(20):
            stress.pump(0.02)
        stress.publish(set())
        eventually(lambda: bed.engine.in_force() == bed.version, "no groups any more")
        assert bed.balanced()
        spare = SPARES_MAX
        eventually(lambda: bed.process()["memory"] <= before + spare, "memory comes back")


SPARES_MAX = 32 << 10
"""What a thread keeps for the next turn: entries, deliveries, longer tables."""
