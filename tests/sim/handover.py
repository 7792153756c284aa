"""The world in which a hand-over is simulated: processes, a kernel, clients, a service, an oracle.

Real: the transition table with both its machines, the records and their codec, the books of the
taker, the rules by which a driver runs the table (the head of `states.py`), the ledger of
operations. Modelled, with a virtual clock and a seeded scheduler: all that takes time or can fail.

-   *Kernel*: stream connections as bytes in both directions, kept open by every duplicate of their
    descriptor; SOCK_SEQPACKET pairs with room for a few records (EAGAIN, EPIPE, EOF after the last
    record, descriptors in flight); pidfds; SIGKILL (first the descriptors of the dead are closed,
    then its pidfd becomes readable), SIGSTOP (everything of that process waits), SIGTERM; flock.
-   *Data plane*: an armed process reads bytes in random pieces, patches ids, relays. It remembers
    in its own memory the piece of a frame that it has, and whose answer is under way. That memory
    is what travels in a blob. Two readers, a stale blob, or a lost one show in the ledger at once.
-   *Clients* keep operations in flight, reconnect when a connection ends, and stop after a while.

`Simulation.broken` lists what the oracle saw, apart from the ledger's verdict:

    two owners           two living processes are armed (a stopped one wakes up one day)
    thaw after commit
    own without proof    neither COMMIT was sent nor is the giver's pidfd readable
    own twice
    stale                a connection was used after the state that is taken up was written
    nobody               nobody reads for longer than allowed, though whoever should is running
    unsettled            when all is quiet: a machine that is not at its end, a client that waits
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastmesh import limits
from fastmesh.errors import HandoverError
from fastmesh.handover import wire
from fastmesh.handover.states import (
    DROPPABLE,
    POINTS,
    TABLE,
    Action,
    Event,
    Machine,
    Row,
    Side,
)
from tests.sim.ledger import BODY_BYTES_MIN, Ledger, Operation, Verdict, encode

HEAD = struct.Struct(">IQ")
FDS_PER_RECORD = 2
"""Far fewer than the real 240, so that a few connections make many records."""
SOCKET_RECORDS = 5
STOP_MS = 10_000.0
DELAY_MS = 100.0
SLACK_MS = 600.0
"""For what a step may still take when its deadline is due: a blocked main thread, a kill."""
SETTLED_MS = 120_000.0

TAKES_MS: Mapping[str, tuple[float, float]] = {
    "freeze": (0.5, 20),
    "save": (0.5, 20),
    "prepare": (1, 80),
    "load": (0.5, 40),
    "thaw": (0.1, 2),
    "own": (0.5, 5),
    "own_listeners": (0.5, 5),
    "release": (0.1, 5),
    "suspend": (1, 30),
    "settle": (1, 60),
    "start_fresh": (1, 30),
    "start_fresh_with_listeners": (1, 30),
}


class Failure(Exception):
    """A local step went wrong."""


class Closed(Exception):
    """EPIPE."""


class Dropped(Exception):
    """This process is no more: nothing after this point is executed."""


# --- kernel ---------------------------------------------------------------------------------------


class Conn:
    """A stream connection between fastmesh and somebody outside; `refs` counts descriptors."""

    __slots__ = ("id", "kind", "moves", "peer", "refs", "sim", "to_mesh", "to_peer", "watchers")

    def __init__(self, sim: Simulation, kind: str, peer: Client | Service) -> None:
        self.sim = sim
        self.id = sim.number()
        self.kind = kind
        self.peer = peer
        self.refs = 0
        self.to_mesh = bytearray()
        self.to_peer = bytearray()
        self.watchers: list[World] = []
        self.moves = 0
        """Reads and writes by fastmesh so far."""

    def ref(self) -> None:
        self.refs += 1

    def unref(self) -> None:
        self.refs -= 1
        if self.refs == 0:
            self.sim.after(self.sim.latency(), self.peer.on_eof, self)

    def arrived(self) -> None:
        """Bytes are there to be read: every process that watches is woken."""
        for world in self.watchers:
            self.sim.at(world.process, self.sim.latency(), world.turn, self)

    def send_to_mesh(self, data: bytes) -> None:
        if self.refs:
            self.to_mesh += data
            self.arrived()

    def send_to_peer(self, data: bytes) -> None:
        self.moves += 1
        self.to_peer += data
        self.sim.after(self.sim.latency(), self.peer.on_data, self)


class Listener:
    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.refs = 0
        self.waiting: deque[Conn] = deque()
        self.accepting: list[Process] = []

    def ref(self) -> None:
        self.refs += 1

    def unref(self) -> None:
        self.refs -= 1
        if self.refs == 0:
            while self.waiting:
                self.waiting.popleft().unref()

    def connected(self) -> None:
        for process in self.accepting:
            self.sim.at(process, self.sim.latency(), process.accept)


class Lock:
    """flock: held by every duplicate of one open file, free when the last is closed."""

    def __init__(self) -> None:
        self.refs = 0

    def ref(self) -> None:
        self.refs += 1

    def unref(self) -> None:
        self.refs -= 1


@dataclass(frozen=True)
class Held:
    """A descriptor of which it only matters that it is there: a memfd, a pidfd, stdio."""

    what: Any

    def ref(self) -> None: ...

    def unref(self) -> None: ...


class End:
    """One end of a SOCK_SEQPACKET pair."""

    def __init__(self, sim: Simulation, process: Process) -> None:
        self.sim = sim
        self.process = process
        self.peer: End
        self.inbox: deque[tuple[bytes, tuple[Any, ...], bool]] = deque()
        self.closed = False
        self.driver: Driver | None = None
        self.sent = 0
        process.ends.append(self)

    def send(self, data: bytes, fds: Sequence[Any]) -> None:
        if self.peer.closed:
            raise Closed
        if len(self.peer.inbox) >= SOCKET_RECORDS or self.sim.rng.random() < self.sim.plan.eagain:
            raise BlockingIOError
        self.sent += 1
        data, fds, truncated = self.sim.tampered(self, data, tuple(fds))
        for fd in fds:
            fd.ref()
        self.peer.inbox.append((data, fds, truncated))
        self.peer.wake()

    def receive(self) -> tuple[bytes, tuple[Any, ...], bool] | None:
        if not self.inbox:
            return None
        got = self.inbox.popleft()
        self.peer.wake()
        return got

    @property
    def at_eof(self) -> bool:
        return self.peer.closed and not self.inbox

    def wake(self) -> None:
        if not self.closed and self.driver is not None:
            self.sim.at(self.process, self.sim.latency(), self.driver.poll)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            for _, fds, _ in self.inbox:
                for fd in fds:
                    fd.unref()
            self.inbox.clear()
            self.peer.wake()


# --- processes ------------------------------------------------------------------------------------


class World:
    """What one engine thread knows: connections with the piece of a frame that was read, slots."""

    def __init__(self, process: Process, thread: int) -> None:
        self.process = process
        self.thread = thread
        self.conns: dict[int, Conn] = {}
        self.partial: dict[int, bytearray] = {}
        self.upstream: Conn | None = None
        self.slots: dict[int, tuple[int, int]] = {}
        """Upstream id to (connection, the client's id)."""
        self.next_id = 1

    def add(self, conn: Conn, partial: bytes = b"") -> None:
        self.conns[conn.id] = conn
        self.partial[conn.id] = bytearray(partial)
        if conn.kind == "upstream":
            self.upstream = conn

    def arm(self) -> None:
        for conn in self.conns.values():
            conn.watchers.append(self)
            if conn.to_mesh:
                self.process.sim.at(self.process, self.process.sim.latency(), self.turn, conn)

    def disarm(self) -> None:
        for conn in self.conns.values():
            if self in conn.watchers:
                conn.watchers.remove(self)

    def turn(self, conn: Conn) -> None:
        """Read some of what is there, and do what it says."""
        if self not in conn.watchers or not conn.to_mesh:
            return
        sim = self.process.sim
        size = sim.rng.randint(1, len(conn.to_mesh))
        conn.moves += 1
        buffer = self.partial[conn.id]
        buffer += conn.to_mesh[:size]
        del conn.to_mesh[:size]
        for number, body in frames(buffer):
            if conn.kind == "client":
                self.request(conn, number, body)
            else:
                self.answer(number, body)
        if conn.to_mesh:
            sim.at(self.process, sim.latency(), self.turn, conn)

    def request(self, conn: Conn, number: int, body: bytes) -> None:
        if self.upstream is None:
            self.add(self.process.sim.service.connection())
            assert self.upstream is not None
            self.upstream.ref()
            self.process.held.append(self.upstream)
            self.upstream.watchers.append(self)
        self.slots[self.next_id] = conn.id, number
        self.upstream.send_to_peer(frame(self.next_id, body))
        self.next_id += 1

    def answer(self, number: int, body: bytes) -> None:
        conn_id, id = self.slots.pop(number, (0, 0))
        conn = self.conns.get(conn_id)
        if conn is not None:
            conn.send_to_peer(frame(id, body))

    def close(self, conn: Conn) -> None:
        del self.conns[conn.id], self.partial[conn.id]
        if self in conn.watchers:
            conn.watchers.remove(self)
        if conn is self.upstream:
            self.upstream = None
        self.slots = {k: v for k, v in self.slots.items() if v[0] != conn.id}
        if conn in self.process.held:
            self.process.held.remove(conn)
            conn.unref()

    def save(self) -> tuple[bytes, list[Conn]]:
        conns = list(self.conns.values())
        document = {
            "conns": [[c.id, self.partial[c.id].hex(), c.moves] for c in conns],
            "upstream": self.upstream.id if self.upstream else 0,
            "slots": [[k, *v] for k, v in self.slots.items()],
            "next_id": self.next_id,
        }
        return json.dumps(document).encode(), conns

    @staticmethod
    def load(process: Process, thread: int, blob: bytes, conns: Sequence[Conn]) -> World:
        document = json.loads(blob)
        world = World(process, thread)
        if len(conns) != len(document["conns"]):
            raise Failure(f"{len(conns)} descriptors for {len(document['conns'])} connections")
        for conn, (id, partial, _) in zip(conns, document["conns"], strict=True):
            if conn.id != id:
                raise Failure(f"connection {conn.id} where {id} should be")
            world.add(conn, bytes.fromhex(partial))
        world.slots = {k: (c, n) for k, c, n in document["slots"]}
        world.next_id = document["next_id"]
        world.saved_moves = {id: moves for id, _, moves in document["conns"]}
        return world

    saved_moves: dict[int, int] = {}  # noqa: RUF012 - replaced as a whole by load()


class Process:
    """A fastmesh, old or new."""

    def __init__(self, sim: Simulation, name: str) -> None:
        self.sim = sim
        self.name = name
        self.pid = sim.number() + 1000
        self.alive = True
        self.stopped = False
        self.pidfd_readable = False
        self.deferred: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.armed = False
        self.worlds: list[World] = []
        self.listener: Listener | None = None
        self.held: list[Any] = []
        """Everything of which this process has a descriptor."""
        self.ends: list[End] = []
        self.drivers: list[Driver] = []
        self.busy: Driver | None = None
        self.phase = "serving"
        self.versions = sim.plan.giver_versions
        self.signals = True
        """It can signal other processes."""
        sim.processes.append(self)

    # Life and death.

    def die(self, why: str) -> None:
        if not self.alive:
            return
        sim = self.sim
        sim.note(f"{self.name} dies: {why}")
        sim.account()
        self.alive = False
        self.armed = False
        for world in self.worlds:
            world.disarm()
        if self.listener is not None and self in self.listener.accepting:
            self.listener.accepting.remove(self)
        self.deferred.clear()
        gone = sim.latency() * 2
        sim.after(gone, self._close_all)
        sim.after(gone + sim.latency() * 2, self._dead)

    def _close_all(self) -> None:
        for end in self.ends:
            end.close()
        for one in self.held:
            one.unref()
        self.held.clear()

    def _dead(self) -> None:
        self.pidfd_readable = True
        for process in self.sim.processes:
            for driver in process.drivers:
                if driver.peer is self:
                    self.sim.at(process, self.sim.latency(), driver.poll)
        self.sim.after(self.sim.latency() * 50, self.sim.supervise)

    def stop_for(self, ms: float) -> None:
        if self.alive and not self.stopped:
            self.sim.note(f"{self.name} is stopped")
            self.sim.account()
            self.stopped = True
            self.sim.after(ms, self.go_on)

    def go_on(self) -> None:
        if self.alive and self.stopped:
            self.sim.note(f"{self.name} goes on")
            self.sim.account()
            self.stopped = False
            waiting, self.deferred = self.deferred, []
            self.sim.rng.shuffle(waiting)  # threads wake up in any order
            for what, args in waiting:
                self.sim.at(self, 0, what, *args)

    def sigterm(self) -> None:
        """Told to the hand-over that is under way, and obeyed at once unless it says later."""
        self.sim.note(f"{self.name} gets SIGTERM")
        for driver in self.drivers:
            if not driver.machine.final:
                driver.feed("stop")
                if driver.stop_later:
                    return
        self.shut_down()

    def shut_down(self) -> None:
        """An orderly end: nothing new, what is in flight is answered."""
        if self.phase == "serving" and self.alive and self.armed:
            self.phase = "stopping"
            self.stop_accepting()
            self.let_go()

    def let_go(self) -> None:
        for world in self.worlds:
            for conn in list(world.conns.values()):
                if conn.kind == "client":
                    self.sim.after(self.sim.latency(), conn.peer.on_goaway, conn)
        self.sim.at(self, 20, self._end_when_empty)

    def _end_when_empty(self) -> None:
        if any(c.kind == "client" for w in self.worlds for c in w.conns.values()):
            self.sim.at(self, 20, self._end_when_empty)
        else:
            self.die("empty")

    # Serving.

    def start(self) -> None:
        """From nothing."""
        assert self.sim.lock.refs == 0
        self.hold(self.sim.lock)
        listener = self.sim.bound = Listener(self.sim)
        self.hold(listener)
        self.listener = listener
        self.worlds = [World(self, thread) for thread in range(self.sim.plan.threads)]
        self.arm()
        self.accept_on()

    def hold(self, what: Any) -> None:
        what.ref()
        self.held.append(what)

    def arm(self) -> None:
        self.sim.account()
        self.armed = True
        for world in self.worlds:
            world.arm()
        self.sim.check_owners(self)

    def disarm(self) -> None:
        self.sim.account()
        self.armed = False
        for world in self.worlds:
            world.disarm()

    def accept_on(self) -> None:
        assert self.listener is not None
        if self not in self.listener.accepting:
            self.listener.accepting.append(self)
            if self.listener.waiting:
                self.sim.at(self, self.sim.latency(), self.accept)

    def stop_accepting(self) -> None:
        if self.listener is not None and self in self.listener.accepting:
            self.listener.accepting.remove(self)

    def accept(self) -> None:
        listener = self.listener
        if listener is None or self not in listener.accepting or not listener.waiting:
            return
        conn = listener.waiting.popleft()
        self.held.append(conn)  # the reference of the queue becomes this process's
        world = self.sim.rng.choice(self.worlds)
        world.add(conn)
        if self.armed:
            conn.watchers.append(world)
            if conn.to_mesh:
                conn.arrived()
        if listener.waiting:
            self.sim.at(self, self.sim.latency(), self.accept)


# --- drivers --------------------------------------------------------------------------------------

Step = Generator[float | None, None, None]
"""Yields how long to wait, None: until something wakes the driver."""


class Job:
    def __init__(self, actions: tuple[Action, ...]) -> None:
        self.actions = actions
        self.at: Action = actions[0]
        self.steps: Step | None = None
        self.waiting = False


class Driver:
    """Runs one machine by the rules at the head of states.py."""

    def __init__(self, sim: Simulation, process: Process, side: Side) -> None:
        self.sim = sim
        self.process = process
        self.side = side
        self.machine = Machine(side, table=sim.table)
        self.end: End | None = None
        self.peer: Process | None = None
        """By its pidfd."""
        self.job: Job | None = None
        self.next_jobs: list[Job] = []
        self.blocked_until = 0.0
        self.told_eof = self.told_dead = False
        self.stop_later = False
        self.record_of: dict[str, int] = {}
        """By step: how often its fault point was passed."""
        self.nonce = f"{sim.rng.getrandbits(128):032x}"
        self.hello: wire.Hello | None = None
        self.received: wire.Received | None = None
        self.kept_listener: Listener | None = None
        self.kept: list[Any] = []
        self.blobs: dict[int, tuple[wire.State, bytes]] = {}
        self.kept_conns: dict[int, list[Conn]] = {}
        self.process_document = b""
        self.loaded: list[World] = []
        self.saved: list[tuple[bytes, list[Conn]]] = []
        self.acked: dict[int, int] = {}
        process.drivers.append(self)
        self.arm_deadline()

    def attach(self, end: End) -> None:
        self.end = end
        end.driver = self
        end.wake()

    # Events.

    def poll(self) -> None:
        """Everything that is due, in the order that states.py asks for."""
        if self.sim.now < self.blocked_until:
            self.sim.at(self.process, self.blocked_until - self.sim.now, self.poll)
            return
        if self.machine.final and self.job is None:
            return
        end = self.end
        while end is not None and not end.closed and (got := end.receive()) is not None:
            self.took(*got)
            if self.blocked():
                return
        if (
            self.peer is not None
            and self.peer.pidfd_readable
            and not self.told_dead
            and (end is None or end.closed or not end.inbox)
        ):
            self.told_dead = True
            self.feed("peer_dead")
        if end is not None and not end.closed and end.at_eof and not self.told_eof:
            self.told_eof = True
            self.feed("eof")
        if self.job is not None and self.job.waiting:
            self.go_on(self.job)

    def blocked(self) -> bool:
        """This process does not go on now: it died, or was stopped and comes back later."""
        process = self.process
        if not process.alive:
            return True
        if process.stopped or self.sim.now < self.blocked_until:
            self.sim.at(process, 0, self.poll)
            return True
        return False

    def arm_deadline(self) -> None:
        ms = self.machine.deadline_ms
        if ms is not None:
            self.sim.at(self.process, ms, self.deadline, self.machine.clock)

    def deadline(self, clock: int) -> None:
        if self.sim.now < self.blocked_until:
            self.sim.at(self.process, self.blocked_until - self.sim.now, self.deadline, clock)
            return
        if clock != self.machine.clock:
            return
        self.poll()  # what is due at the same time comes first
        if clock == self.machine.clock and not self.machine.final and not self.blocked():
            self.feed("deadline")

    def took(self, data: bytes, fds: tuple[Any, ...], truncated: bool) -> None:
        try:
            record = wire.decode(data)
            if self.received is not None:
                self.received.take(record, len(fds), truncated=truncated)
            else:
                wire.check_descriptors(record, len(fds), truncated=truncated)
            event = wire.event_of(record)
            self.look(record, fds)
        except HandoverError as error:
            for fd in fds:
                fd.unref()
            self.feed("violation", str(error))
            return
        point = POINTS[self.side].get(wire.NAMES[type(record)])
        try:
            if point is not None:
                self.strike(point)
        except Failure as error:
            for fd in fds:
                fd.unref()
            self.feed("failed", str(error))
            return
        except Dropped:
            for fd in fds:  # with the process
                fd.unref()
            return
        self.incoming = record, fds
        kept = len(self.kept) + sum(map(len, self.kept_conns.values()))
        reason = record.reason if isinstance(record, (wire.Abort, wire.Refuse)) else ""
        self.feed(event, reason)
        if fds and kept == len(self.kept) + sum(map(len, self.kept_conns.values())):
            for fd in fds:  # nobody wanted it
                fd.unref()

    def look(self, record: wire.Record, fds: tuple[Any, ...]) -> None:
        """What the table does not see of a record."""
        if isinstance(record, wire.Hello):
            self.hello = record
            self.peer = self.pidfd(fds)
            self.machine.can_signal = self.process.signals
        elif isinstance(record, wire.Ack):
            self.peer = self.pidfd(fds)
            self.machine.can_signal = self.process.signals and record.fence
        elif isinstance(record, wire.Acked):
            self.acked[record.thread] = max(self.acked.get(record.thread, 0), record.next)

    def pidfd(self, fds: tuple[Any, ...]) -> Process:
        what = fds[0].what if isinstance(fds[0], Held) else None
        if not isinstance(what, Process):
            raise HandoverError("pidfd", None, "must be a pidfd")
        return what

    def feed(self, event: Event, reason: str = "") -> None:
        machine = self.machine
        if not self.process.alive:
            return
        before, clock = machine.state, machine.clock
        actions = machine.on(event, reason)
        if self.sim.trace is not None and (actions or machine.state != before):
            why = f" ({reason})" if reason else ""
            self.sim.note(
                f"{self.process.name}: {event}{why}: {before} -> {machine.state}"
                f" [{', '.join(actions)}]"
            )
        if machine.clock != clock:
            self.arm_deadline()
        if actions:
            if machine.state == before:
                self.at_once(actions)
            else:
                self.begin(Job(actions))
        if machine.final:
            self.ended()

    def at_once(self, actions: tuple[Action, ...]) -> None:
        try:
            for action in actions:
                for _ in self.do(action):
                    pass
        except Failure as error:
            self.feed("failed", str(error))
        except Closed:
            pass  # eof will be told by poll()
        except Dropped:
            pass

    def begin(self, job: Job) -> None:
        if self.job is None or self.job.at in DROPPABLE:
            self.job = job
            job.steps = self.run(job)
            self.go_on(job)
        else:
            self.next_jobs = [x for x in self.next_jobs if x.at not in DROPPABLE] + [job]

    def run(self, job: Job) -> Step:
        for action in job.actions:
            job.at = action
            point = POINTS[self.side].get(action)
            if point is not None and action not in ("send_listeners", "send_state"):
                self.strike(point)
                yield from self.stand_still()
            if action != "keep":
                low, high = TAKES_MS.get(action, (0.0, 0.3))
                yield self.sim.rng.uniform(low, high)
            yield from self.do(action)

    def stand_still(self) -> Step:
        while self.process.stopped or self.sim.now < self.blocked_until:
            yield max(0.0, self.blocked_until - self.sim.now)

    def go_on(self, job: Job) -> None:
        if job is not self.job or not self.process.alive:
            return
        if self.sim.now < self.blocked_until:
            self.sim.at(self.process, self.blocked_until - self.sim.now, self.go_on, job)
            return
        job.waiting = False
        assert job.steps is not None
        try:
            wait = next(job.steps)
        except StopIteration:
            self.finish(job, "done", "")
        except Failure as error:
            self.finish(job, "failed", str(error))
        except Closed:
            self.finish(job, "eof", "")
        except Dropped:
            self.job = None
        else:
            if wait is None:
                job.waiting = True
            else:
                self.sim.at(self.process, wait, self.go_on, job)

    def finish(self, job: Job, event: Event, reason: str) -> None:
        if job is not self.job:
            return
        self.job = None
        if self.next_jobs:
            # The state has moved on: what became of the old job is no news.
            self.begin(self.next_jobs.pop(0))
            return
        if event != "done":
            self.poll()  # what was received before the end comes first
        if event != "eof":
            self.feed(event, reason)

    def ended(self) -> None:
        if self.process.busy is self:
            self.process.busy = None
        if self.stop_later and self.process.alive and self.process.armed:
            self.process.shut_down()

    # Fault points.

    def strike(self, step: str) -> None:
        """Raises Failure for `error`, Dropped for `kill`; a stop or a delay holds up what comes
        next."""
        record = self.record_of[step] = self.record_of.get(step, 0) + 1
        kind = self.sim.fault_at(self, step, record)
        if kind == "error":
            raise Failure(f"injected at {step}")
        if kind == "kill":
            self.process.die(f"killed at {step}")
            raise Dropped
        if kind == "stop":
            self.process.stop_for(self.sim.plan.stop_ms)
        elif kind == "delay":
            self.blocked_until = self.sim.now + DELAY_MS

    # Actions.

    def do(self, action: Action) -> Step:
        method = getattr(self, f"do_{action}", None)
        if method is None:
            raise AssertionError(f"no {action}")
        found = method()
        if found is not None:
            yield from found

    def send(self, record: wire.Record, fds: Sequence[Any] = ()) -> Step:
        data = wire.encode(record)
        while True:
            if self.end is None or self.end.closed:
                raise Closed
            try:
                self.end.send(data, fds)
                return
            except BlockingIOError:
                yield 1.0 if len(self.end.peer.inbox) < SOCKET_RECORDS else None

    def send_if_room(self, record: wire.Record) -> None:
        try:
            assert self.end is not None
            if self.sim.rng.random() >= self.sim.plan.abort_lost:
                self.end.send(wire.encode(record), ())
        except (Closed, BlockingIOError):
            pass

    def do_close(self) -> None:
        if self.end is not None:
            self.end.close()

    def do_report(self) -> None:
        self.sim.reports.append((self.process.name, self.machine.state, self.machine.reason))

    def do_stop_later(self) -> None:
        self.stop_later = True

    def do_send_abort(self) -> None:
        self.send_if_room(wire.Abort(self.machine.reason))

    def do_kill_peer(self) -> None:
        assert self.peer is not None
        if not self.process.signals:
            raise Failure("EPERM")
        self.peer.die(f"killed by {self.process.name}")

    def do_exit(self) -> None:
        self.process.die("done")
        raise Dropped

    do_exit_refused = do_exit

    # Giver.

    def do_judge(self) -> None:
        assert self.hello is not None
        process = self.process
        standing = wire.Standing(
            phase=process.phase,
            busy=process.busy is not None,
            uid=1,
            peer_uid=1,
            peer_pid=self.hello.pid,
            state_versions=process.versions,
            descriptors=len(process.held),
        )
        verdict = wire.judge(self.hello, standing)
        if isinstance(verdict, wire.Refuse):
            self.refusal = verdict
            self.feed("refuse", verdict.reason)
        else:
            process.busy = self
            self.feed(verdict)

    refusal: wire.Refuse | None = None

    def do_send_refuse(self) -> None:
        self.send_if_room(self.refusal or wire.Refuse("protocol", self.machine.reason))

    def do_hold(self) -> None: ...

    def do_close_doors(self) -> None: ...

    def do_send_ack(self) -> Step:
        move = self.machine.state == "offering"
        count = len(self.process.held)
        assert self.hello is not None
        ack = wire.Ack(
            mode="move" if move else "drain",
            state_version=self.process.versions[1] if move else 0,
            build="old",
            pid=self.process.pid,
            nonce=self.hello.nonce,
            connections=count,
            descriptors=count,
            fence=self.process.signals,
        )
        yield from self.send(ack, [Held(self.process)])

    def do_send_listeners(self) -> Step:
        one = wire.Listener("a", "engine", "127.0.0.1:1", None)
        for record in wire.split(
            [one, wire.Listener("admin", "admin", "unix:admin", (1, 2))],
            lock=True,
            stdio=False,
            most=1,
        ):
            self.strike("S3")
            yield from self.stand_still()
            fds: list[Any] = [
                self.process.listener if x.kind == "engine" else Held(x) for x in record.listeners
            ]
            yield from self.send(record, [*fds, *([self.sim.lock] if record.lock else [])])

    def do_send_process(self) -> Step:
        yield from self.send(wire.Process(2, digest(b"{}")), [Held(b"{}")])

    def do_freeze(self) -> None:
        self.process.disarm()
        self.process.stop_accepting()

    def do_save(self) -> None:
        self.saved = [world.save() for world in self.process.worlds]

    def do_send_state(self) -> Step:
        for thread, (blob, conns) in enumerate(self.saved):
            self.strike("S5")
            yield from self.stand_still()
            state = wire.State(thread, len(blob), digest(blob), len(conns))
            yield from self.send(state, [Held(blob)])
            self.acked[thread] = 0
            for first in range(0, len(conns), FDS_PER_RECORD):
                while first - self.acked[thread] >= FDS_PER_RECORD * limits.HANDOVER_ACK_RECORDS:
                    yield None
                self.strike("S5")
                yield from self.stand_still()
                some = conns[first : first + FDS_PER_RECORD]
                yield from self.send(wire.Conns(thread, first, len(some)), some)
                yield self.sim.rng.uniform(0, 0.2)

    def do_send_end(self) -> Step:
        document = b'{"final":true}'
        total = sum(len(conns) for _, conns in self.saved)
        record = wire.End(len(self.saved), total, len(document), digest(document))
        yield from self.send(record, [Held(document)])

    def do_send_commit(self) -> Step:
        yield from self.send(wire.Commit())
        self.sim.committed.append(self.process)

    def do_release(self) -> None:
        process = self.process
        for one in process.held:
            one.unref()
        process.held.clear()
        process.worlds.clear()

    def do_thaw(self) -> None:
        if self.process in self.sim.committed:
            self.sim.violation("thaw after commit", self.process.name)
        if not self.process.armed:
            self.process.arm()

    def do_resume(self) -> None:
        if self.process.phase == "serving":  # else it was told to stop meanwhile
            self.process.accept_on()

    def do_suspend(self) -> None: ...

    def do_settle(self) -> None: ...

    def do_stop_accepting(self) -> None:
        self.process.stop_accepting()

    def do_send_handed(self) -> Step:
        yield from self.send(wire.Handed())
        self.sim.handed.append(self.process)

    def do_let_go(self) -> Step:
        process = self.process
        assert process.listener is not None
        process.held.remove(process.listener)
        process.listener.unref()
        process.phase = "draining"
        process.let_go()
        yield limits.CONFIGURABLE["stop_timeout_ms"].default  # the process ends when it is empty

    # Taker.

    def do_connect(self) -> Step:
        target = self.sim.serving_on_socket()
        if target is None:
            self.feed("nobody")
            return
        if self.process.signals:
            self.peer = target
        mine, theirs = End(self.sim, self.process), End(self.sim, target)
        mine.peer, theirs.peer = theirs, mine
        self.attach(mine)
        self.received = wire.Received(nonce=self.nonce, nofile=limits.FDS_RESERVED + 1000)
        self.sim.at(target, self.sim.latency(), accept_handover, self.sim, target, theirs)
        yield 0

    def do_send_hello(self) -> Step:
        plan = self.sim.plan
        hello = wire.Hello(
            state_versions=plan.taker_versions,
            build="new",
            pid=self.process.pid,
            nonce=self.nonce,
            mode=plan.mode,
            nofile=limits.FDS_RESERVED + 1000,
            threads=plan.threads,
            stdio=False,
        )
        yield from self.send(hello, [Held(self.process)])

    def do_keep(self) -> None:
        record, fds = self.incoming
        if isinstance(record, wire.Listeners):
            self.keep(fds)
            for one, fd in zip(record.listeners, fds, strict=False):
                if one.kind == "engine":
                    if not isinstance(fd, Listener):
                        raise Failure("what came is no listening socket")
                    self.kept_listener = fd
            if record.lock and not isinstance(fds[len(record.listeners)], Lock):
                raise Failure("what came is not the lock of the state directory")
        elif isinstance(record, (wire.Process, wire.End)):
            self.keep(fds)
            if not is_blob(fds[0]) or digest(fds[0].what) != record.sha256:
                raise Failure("the process document is not what was said")
        elif isinstance(record, wire.State):
            self.keep(fds)
            if not is_blob(fds[0]):
                raise Failure("what came is no sealed memfd")
            self.blobs[record.thread] = record, fds[0].what
            self.kept_conns[record.thread] = []
        elif isinstance(record, wire.Conns):
            if not all(isinstance(fd, Conn) for fd in fds):
                self.keep(fds)
                raise Failure("what came is no connection")
            self.kept_conns[record.thread] += fds
            self.process.held += fds
            self.sim.acks(self, wire.Acked(record.thread, record.first + record.count))

    def keep(self, fds: Iterable[Any]) -> None:
        fds = list(fds)
        self.kept += fds
        self.process.held += fds  # the reference in flight becomes this process's

    def do_prepare(self) -> None: ...

    def do_send_prepared(self) -> Step:
        yield from self.send(wire.Prepared())

    def do_load(self) -> None:
        worlds = []
        for thread, (state, blob) in sorted(self.blobs.items()):
            if len(blob) != state.bytes or digest(blob) != state.sha256:
                raise Failure(f"the state of thread {thread} is not what was said")
            worlds.append(World.load(self.process, thread, blob, self.kept_conns[thread]))
        self.loaded = worlds

    def do_send_ready(self) -> Step:
        yield from self.send(wire.Ready())

    def do_own(self) -> None:
        sim, process = self.sim, self.process
        if process.armed or process.worlds:
            sim.violation("own twice", process.name)
            return
        giver = self.peer
        assert giver is not None
        if giver not in sim.committed and not giver.pidfd_readable:
            sim.violation("own without proof", f"{process.name} while {giver.name} may live")
        process.worlds = self.loaded
        for world in self.loaded:
            for conn in world.conns.values():
                if conn.moves != world.saved_moves[conn.id]:
                    sim.violation("stale", f"connection {conn.id} moved on")
        self.take_listener()
        sim.owners.append(process)
        process.arm()
        process.accept_on()

    def take_listener(self) -> None:
        process = self.process
        process.listener = self.kept_listener
        process.versions = self.sim.plan.taker_versions
        self.sim.bound = self.kept_listener

    def do_own_listeners(self) -> None:
        giver = self.peer
        assert giver is not None
        if giver not in self.sim.handed and not giver.pidfd_readable:
            self.sim.violation("own without proof", f"listeners, by {self.process.name}")
        self.do_start_fresh_with_listeners()

    def do_discard(self) -> None:
        process = self.process
        for conns in self.kept_conns.values():
            for conn in conns:
                process.held.remove(conn)
                conn.unref()
            conns.clear()
        self.loaded = []

    def do_discard_all(self) -> None:
        self.do_discard()
        for one in self.kept:
            self.process.held.remove(one)
            one.unref()
        self.kept.clear()
        self.kept_listener = None

    def do_start_fresh(self) -> None:
        if self.sim.lock.refs:
            raise Failure("the lock is held")
        self.sim.owners.append(self.process)
        self.process.start()

    def do_start_fresh_with_listeners(self) -> None:
        self.take_listener()
        process = self.process
        process.worlds = [World(process, thread) for thread in range(self.sim.plan.threads)]
        self.sim.owners.append(process)
        process.arm()
        process.accept_on()


def accept_handover(sim: Simulation, process: Process, end: End) -> None:
    Driver(sim, process, "giver").attach(end)


# --- who is outside -------------------------------------------------------------------------------


class Service:
    """Executes what it gets, after a while, and answers."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.buffers: dict[int, bytearray] = {}

    def connection(self) -> Conn:
        return Conn(self.sim, "upstream", self)

    def on_data(self, conn: Conn) -> None:
        buffer = self.buffers.setdefault(conn.id, bytearray())
        buffer += conn.to_peer
        conn.to_peer.clear()
        for number, body in frames(buffer):
            self.sim.ledger.executed(body)
            wait = self.sim.rng.choice((1.0, 5.0, 20.0, 60.0))
            self.sim.after(wait, conn.send_to_mesh, frame(number, body))

    def on_eof(self, conn: Conn) -> None: ...

    def on_goaway(self, conn: Conn) -> None: ...


class Client:
    IN_FLIGHT_MAX = 3

    def __init__(self, sim: Simulation, number: int) -> None:
        self.sim = sim
        self.number = number
        self.epoch = 0
        self.seq = 0
        self.to_send = 0
        self.conn: Conn | None = None
        self.buffer = bytearray()
        self.waiting: set[int] = set()
        self.going = False
        """Told to go: nothing more on this connection."""
        self.resets = 0
        self.next_send = 0.0

    def connect(self) -> None:
        listener = self.sim.bound
        if self.conn is not None:
            return
        if listener is None or listener.refs == 0:
            self.sim.after(20, self.connect)
            return
        self.epoch += 1
        self.going = False
        self.buffer.clear()
        self.waiting.clear()
        self.conn = Conn(self.sim, "client", self)
        self.conn.ref()
        listener.waiting.append(self.conn)
        listener.connected()
        self.send_more()

    def send_more(self) -> None:
        if self.conn is None or self.going or not self.to_send:
            return
        if len(self.waiting) >= self.IN_FLIGHT_MAX or self.sim.now < self.next_send:
            return
        rng = self.sim.rng
        self.seq += 1
        self.to_send -= 1
        op = Operation(self.number, self.epoch, self.seq, rng.randbytes(16))
        self.sim.ledger.sent(op, self.seq)
        self.waiting.add(self.seq)
        data = frame(self.seq, encode(op, BODY_BYTES_MIN + rng.randint(0, 30)))
        cut = rng.randint(1, len(data) - 1)
        self.conn.send_to_mesh(data[:cut])
        self.sim.after(rng.uniform(0, 4), self.rest, self.conn, data[cut:])
        self.next_send = float("inf")

    def rest(self, conn: Conn, data: bytes) -> None:
        """The second half of a frame; only then the next one."""
        if conn is self.conn:
            conn.send_to_mesh(data)
            pause = self.sim.rng.uniform(0, 12)
            self.next_send = self.sim.now + pause
            self.sim.after(pause, self.send_more)

    def on_data(self, conn: Conn) -> None:
        if conn is not self.conn:
            return
        self.buffer += conn.to_peer
        conn.to_peer.clear()
        for number, body in frames(self.buffer, self.garbage):
            self.sim.ledger.outcome(self.number, self.epoch, number, 0, body)
            self.waiting.discard(number)
        if self.going and not self.waiting:
            self.leave()
        self.sim.after(0.1, self.send_more)

    def garbage(self, why: str) -> None:
        self.sim.ledger.garbage(self.number, self.epoch, why)

    def on_goaway(self, conn: Conn) -> None:
        if conn is self.conn:
            self.going = True
            if not self.waiting:
                self.leave()

    def leave(self) -> None:
        """Everything is answered: close, and come again."""
        conn = self.conn
        assert conn is not None
        self.sim.ledger.ended(self.number, self.epoch, by_client=True)
        self.conn = None
        self.next_send = 0.0
        for world in list(conn.watchers):
            self.sim.at(world.process, self.sim.latency(), close_if_there, world, conn)
        self.sim.after(1, self.connect)

    def on_eof(self, conn: Conn) -> None:
        if conn is self.conn:
            self.on_data(conn)  # what was still under way
        if conn is self.conn:
            self.resets += 1
            self.sim.ledger.ended(self.number, self.epoch, by_client=False)
            self.conn = None
            self.next_send = 0.0
            self.sim.after(self.sim.rng.uniform(1, 10), self.connect)


def close_if_there(world: World, conn: Conn) -> None:
    if conn.id in world.conns:
        world.close(conn)


def frame(number: int, body: bytes) -> bytes:
    return HEAD.pack(len(body), number) + body


def frames(
    buffer: bytearray, garbage: Callable[[str], None] | None = None
) -> Iterable[tuple[int, bytes]]:
    """Whole frames, taken from the front."""
    found = []
    while len(buffer) >= HEAD.size:
        size, number = HEAD.unpack_from(buffer)
        if size > 10_000:
            if garbage is not None:
                garbage(f"a frame of {size} bytes")
            buffer.clear()
            break
        if len(buffer) < HEAD.size + size:
            break
        found.append((number, bytes(buffer[HEAD.size : HEAD.size + size])))
        del buffer[: HEAD.size + size]
    return found


def is_blob(fd: Any) -> bool:
    return isinstance(fd, Held) and isinstance(fd.what, bytes)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- the run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strike:
    """A fault at a fault point."""

    side: Side
    step: str
    kind: str
    record: int = 1


@dataclass
class Plan:
    """What happens in a run, apart from chance."""

    strikes: tuple[Strike, ...] = ()
    later: tuple[tuple[float, str, str], ...] = ()
    """(ms after the upgrade began, old | new | other, kill | stop | term)."""
    takers: int = 1
    threads: int = 2
    clients: int = 4
    operations: int = 14
    """Of each client, while the upgrade is under way; two more when all is settled."""
    mode: wire.Mode = "auto"
    giver_versions: tuple[int, int] = (3, 4)
    taker_versions: tuple[int, int] = (3, 4)
    giver_signals: bool = True
    taker_signals: bool = True
    phase: str = "serving"
    stop_ms: float = STOP_MS
    eagain: float = 0.05
    abort_lost: float = 0.0
    tamper: tuple[str, int, str] | None = None
    """(name of the process, which of its records, how): `Simulation.tampered` knows the ways."""
    retry: bool = False
    """Another upgrade, undisturbed, when the first is over."""


@dataclass
class Outcome:
    giver: str
    """The state in which the giver's machine ended, or its process did; "" when it had none."""
    taker: str
    serves: str
    """Who serves in the end."""
    broken: list[str]
    verdict: Verdict
    resets: int
    struck: int
    in_flight: int
    """Operations without an outcome at the (first) strike."""
    ended_ms: float
    reports: list[tuple[str, str, str]]
    records: int
    """Of S5, sent by the first giver."""
    pause_ms: float
    """The longest time in which nobody read though somebody who could was there."""
    dark_ms: float
    """The longest time in which nobody read at all."""
    refused: int = 0
    retried: bool | None = None
    trace: list[str] = field(default_factory=list)


class Simulation:
    def __init__(
        self,
        plan: Plan,
        seed: int,
        *,
        table: Mapping[tuple[Side, str, Event], Row] = TABLE,
        trace: bool = False,
    ) -> None:
        self.plan = plan
        self.rng = random.Random(seed)
        self.table = table
        self.trace: list[str] | None = [] if trace else None
        self.now = 0.0
        self.queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.count = 0
        self.numbers = 0
        self.ledger = Ledger()
        self.broken: list[str] = []
        self.processes: list[Process] = []
        self.bound: Listener | None = None
        self.service = Service(self)
        self.lock = Lock()
        self.committed: list[Process] = []
        self.handed: list[Process] = []
        self.owners: list[Process] = []
        self.reports: list[tuple[str, str, str]] = []
        self.strikes = list(plan.strikes)
        self.struck = 0
        self.in_flight = 0
        self.pause_ms = 0.0
        self.dark_ms = 0.0
        self.supervised = 0
        self.clients = [Client(self, number) for number in range(1, plan.clients + 1)]

    # Time and chance.

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def latency(self) -> float:
        return self.rng.random() * 1.5

    def after(self, ms: float, what: Callable[..., None], *args: Any) -> None:
        self.count += 1
        # Whatever is due at the same time comes in any order.
        heapq.heappush(self.queue, (self.now + ms, self.rng.getrandbits(30), what, args))

    def at(self, process: Process, ms: float, what: Callable[..., None], *args: Any) -> None:
        """In that process, if it still lives then, and when it is not stopped."""
        self.after(ms, self._in, process, what, args)

    def _in(self, process: Process, what: Callable[..., None], args: tuple[Any, ...]) -> None:
        if process.stopped:
            process.deferred.append((what, args))
        elif process.alive:
            what(*args)

    def quiet(self, limit_ms: float) -> None:
        ends = self.now + limit_ms
        while self.queue and self.queue[0][0] <= ends:
            self.now, _, what, args = heapq.heappop(self.queue)
            what(*args)
        if any(what != self._in or args[0].alive for _, _, what, args in self.queue):
            self.violation("unsettled", f"still busy after {limit_ms} ms")
        self.queue.clear()

    # The oracle.

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:10.2f} {text}")

    def violation(self, what: str, detail: str) -> None:
        self.note(f"BROKEN {what}: {detail}")
        self.broken.append(f"{what}: {detail}")

    def check_owners(self, newest: Process) -> None:
        for process in self.processes:
            if process is not newest and process.alive and process.armed:
                shared = {id(c) for w in process.worlds for c in w.conns.values()}
                mine = {id(c) for w in newest.worlds for c in w.conns.values()}
                if shared & mine or (process.listener is newest.listener and self.accepts(process)):
                    self.violation("two owners", f"{process.name} and {newest.name}")

    def accepts(self, process: Process) -> bool:
        return process.listener is not None and process in process.listener.accepting

    def responsible(self) -> Process | None:
        """Who has to end a time in which nobody reads."""
        for driver in (d for p in self.processes for d in p.drivers if d.side == "taker"):
            giver = driver.peer
            if giver is None or not driver.process.alive:
                continue
            whole = driver.machine.state in ("ready", "orphaned", "fencing", "owning")
            if giver in self.committed or (not giver.alive and whole):
                return driver.process
        for process in self.processes:
            if process.alive and process.worlds and process not in self.committed:
                return process
        return None

    def account(self) -> None:
        """Called just before anything changes about who lives, runs and is armed."""
        if any(p.alive and p.armed for p in self.processes):
            self._unowned = 0.0
            self._dark_since = self.now
        else:
            self.dark_ms = max(self.dark_ms, self.now - self._dark_since)
            who = self.responsible()
            if who is not None and not who.stopped:
                self._unowned += self.now - self._since
            most = limits.HANDOVER_FROZEN_MS + SLACK_MS
            if who is not None and any(d.side == "taker" for d in who.drivers):
                most = limits.HANDOVER_COMMIT_MS + limits.HANDOVER_DEATH_MS + SLACK_MS
            if who is not None and self._unowned > most:
                self.violation("nobody", f"reads for {self._unowned:.0f} ms, {who.name} could")
                self._unowned = 0.0
            self.pause_ms = max(self.pause_ms, self._unowned)
        self._since = self.now

    _since = _dark_since = _unowned = 0.0

    # What processes ask the world.

    def serving_on_socket(self) -> Process | None:
        """Who listens on handover.sock: the process that serves, until it has given that away."""
        for process in reversed(self.processes):
            if process.alive and process.armed and process.phase != "stopped":
                return process
        return None

    def fault_at(self, driver: Driver, step: str, record: int) -> str:
        for strike in self.strikes:
            if (strike.side, strike.step, strike.record) == (driver.side, step, record):
                self.strikes.remove(strike)
                self.struck += 1
                self.note(f"FAULT {strike}")
                if self.struck == 1:
                    self.in_flight = self.ledger.unsettled()
                return strike.kind
        return ""

    def acks(self, driver: Driver, record: wire.Acked) -> None:
        """ACKED is sent as soon as there is room, without holding anything up."""
        end = driver.end
        if end is None or end.closed:
            return
        try:
            end.send(wire.encode(record), ())
        except BlockingIOError:
            self.at(driver.process, 1, self.acks, driver, record)
        except Closed:
            pass

    def tampered(
        self, end: End, data: bytes, fds: tuple[Any, ...]
    ) -> tuple[bytes, tuple[Any, ...], bool]:
        """What a hostile process, or a receiver at its descriptor limit, makes of a record."""
        tamper = self.plan.tamper
        if tamper is None or (end.process.name, end.sent) != tamper[:2]:
            return data, fds, False
        how = tamper[2]
        self.struck += 1
        self.note(f"TAMPER {tamper} {data[:60]!r}")
        if how == "cut":
            return data[: len(data) // 2], fds, False
        if how == "garbage":
            return self.rng.randbytes(self.rng.randint(0, 200)), fds, False
        if how == "truncated":
            return data, fds[:-1], True
        if how == "few":
            return data, fds[:-1] if fds else (Held("extra"),), False
        if how == "many":
            return data, (*fds, Held("extra")), False
        if how == "other":
            return data, tuple(Held("a file") for _ in fds), False
        assert how == "again"
        record = self.rng.choice(
            (wire.Commit(), wire.Ready(), wire.Prepared(), wire.Handed(), wire.Abort("hostile"))
        )
        return wire.encode(record), (), False

    def supervise(self) -> None:
        """Somebody starts fastmesh again when none is left."""
        if not any(not p.pidfd_readable for p in self.processes) and self.supervised < 3:
            self.supervised += 1
            self.note("the supervisor starts another one")
            Process(self, f"restart-{self.supervised}").start()

    # A run.

    def upgrade(self, name: str) -> Driver:
        process = Process(self, name)
        process.signals = self.plan.taker_signals
        driver = Driver(self, process, "taker")
        self.at(process, self.rng.uniform(0, 5), driver.feed, "start")
        return driver

    def run(self) -> Outcome:
        plan = self.plan
        old = Process(self, "old")
        old.signals = plan.giver_signals
        old.start()
        old.phase = plan.phase
        for client in self.clients:
            client.to_send = plan.operations
            self.after(self.rng.uniform(0, 10), client.connect)
        takers: list[Driver] = []

        def begin() -> None:
            takers.extend(
                self.upgrade("new" if number == 0 else f"other-{number}")
                for number in range(plan.takers)
            )
            for ms, name, what in plan.later:
                self.after(ms, self.happen, name, what)

        self.after(self.rng.uniform(15, 45), begin)
        self.quiet(SETTLED_MS)
        self.account()
        first = [d for d in old.drivers if d.side == "giver"]
        giver_end = first[0].machine.state if first else ""
        records = first[0].record_of.get("S5", 0) if first else 0
        struck, in_flight = self.struck, self.in_flight
        retried: bool | None = None
        if plan.retry and old.alive and not old.stopped:
            self.plan.tamper = None
            self.plan.later = ()
            self.strikes.clear()
            for client in self.clients:
                client.to_send = 6
                self.after(self.rng.uniform(0, 10), client.send_more)
            again: list[Driver] = []
            self.after(8, lambda: again.append(self.upgrade("again")))
            self.quiet(SETTLED_MS)
            self.account()
            retried = again[0].machine.state == "owner"
        # All is quiet: whoever is there serves.
        for client in self.clients:
            client.to_send = 2
            self.after(0, client.send_more)
        self.quiet(SETTLED_MS)
        for process in self.processes:
            for driver in process.drivers:
                if process.alive and not driver.machine.final:
                    self.violation("unsettled", f"{process.name} is {driver.machine.state}")
        serving = [p.name for p in self.processes if p.alive and p.armed]
        left = sum(c.to_send + len(c.waiting) for c in self.clients)
        if left or len(serving) != 1:
            self.violation("unsettled", f"{left} operations left, {serving} serve")
        return Outcome(
            giver=giver_end,
            taker=takers[0].machine.state if takers else "",
            serves=serving[0] if serving else "",
            broken=self.broken,
            verdict=self.ledger.judge(reset_is="ambiguous"),
            resets=sum(client.resets for client in self.clients),
            struck=struck,
            in_flight=in_flight,
            ended_ms=self.now,
            reports=self.reports,
            records=records,
            pause_ms=self.pause_ms,
            dark_ms=self.dark_ms,
            refused=sum(d.machine.state == "refused" for d in takers),
            retried=retried,
            trace=self.trace or [],
        )

    def happen(self, name: str, what: str) -> None:
        for process in self.processes:
            if process.name == name and process.alive:
                self.struck += 1
                if self.struck == 1:
                    self.in_flight = self.ledger.unsettled()
                if what == "kill":
                    process.die("killed")
                elif what == "stop":
                    process.stop_for(self.plan.stop_ms)
                else:
                    self.at(process, 0, process.sigterm)


def random_plan(seed: int) -> Plan:
    """Up to three faults of any kind at any moment, in any constellation of versions, signals and
    takers. A quarter of all runs is undisturbed."""
    rng = random.Random(seed ^ 0x5EED)
    sides: tuple[Side, Side] = ("giver", "taker")
    kinds = ("kill", "stop", "error", "delay")
    strikes: list[Strike] = []
    later: list[tuple[float, str, str]] = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3))):
        if rng.random() < 0.6:
            step = f"S{rng.randint(1, 8)}"
            record = rng.randint(1, 6) if step == "S5" else 1
            strikes.append(Strike(rng.choice(sides), step, rng.choice(kinds), record))
        else:
            when = rng.choice((rng.uniform(0, 200), rng.uniform(0, 3500), rng.uniform(0, 16_000)))
            what = rng.choice(("kill", "stop", "term"))
            later.append((when, rng.choice(("old", "new", "new", "other-1")), what))
    faulty = bool(strikes or later)
    tamper = None
    if faulty and rng.random() < 0.15:
        how = rng.choice(("cut", "garbage", "truncated", "few", "many", "other", "again"))
        tamper = (rng.choice(("old", "new")), rng.randint(1, 12), how)
    return Plan(
        strikes=tuple(strikes),
        later=tuple(later),
        takers=2 if faulty and rng.random() < 0.15 else 1,
        threads=rng.choice((1, 2)),
        clients=rng.randint(1, 3),
        operations=rng.randint(4, 12),
        mode=rng.choice(("auto", "auto", "auto", "move", "drain")),
        giver_versions=rng.choice(((3, 4), (3, 4), (4, 5), (5, 6))),
        giver_signals=not faulty or rng.random() < 0.85,
        taker_signals=not faulty or rng.random() < 0.85,
        stop_ms=rng.choice((30.0, 300.0, 700.0, 2300.0, STOP_MS)),
        eagain=rng.choice((0.0, 0.05, 0.3)),
        abort_lost=rng.choice((0.0, 0.0, 0.5, 1.0)),
        tamper=tamper,
    )
