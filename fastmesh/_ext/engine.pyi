from array import array
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from .counters import Reading
from .route import Snapshot

class Event(NamedTuple):
    """Something that an engine thread tells the main thread. Unused fields are 0 or b""."""

    kind: str
    thread: int
    a: int
    b: int
    c: int
    data: bytes

EVENT_KINDS: tuple[str, ...]
"""Names and fields:

    snapshot        a=version                              the thread works with this snapshot from
    now on
    endpoint_up     a=endpoint_id, b=connections up
    endpoint_down   a=endpoint_id, b=connections left up, c=errno or 0, data=one byte, the reason
    ejected         a=endpoint_id, b=for ms
    restored        a=endpoint_id
    closed          a=handle, b=listener_id, c=close reason number, data=peer address, space, first
    bytes in hex;
                    only for abnormal ends and at most 10 a second and reason
    refused         a=listener_id, b=connections open, c=0 connections_max, 1 memory_bytes_max
    accept_paused   a=listener_id, b=errno                 no fd or no memory; accepting again by
    itself
    parked          a=ticket, b=route row, c=bytes of the frame, data=the first 64 KiB of it;
                    verdict() decides
    sample          a=trace, b=route row, c=outcome (0 answered, 1..7 Cause, 8 expired),
                    data=6 x u64 little-endian: received, sent, answered, forwarded (ns),
                    endpoint_id, asker handle
    stall           a=ms that one turn has been running
    frame           a=handle, b=listener_id or endpoint_id, c=0 of a client, 1 of an upstream,
                    data=the whole frame. Clients of push and forward listeners are not read on
                    until reply()
    opened          a=handle, b=listener_id or endpoint_id, c=0 client, 1 upstream; push, forward
                    and punt listeners, brokers and peers only
    gone            a=handle, b, c as opened; each opened has one, none is lost
    answer          a=ticket of call_many(), b=0 answered, 1..7 Cause, 8 deadline; data=the response
    group           a=group_id, b=live connections, c=credit (sum of their prefetch)
    drained         a=0                                    the thread has no downstream connection
    left
    stopped         a=0                                    the thread has ended
    frozen          a=frozen_at, ns of CLOCK_MONOTONIC     after freeze(): every event that the
                    thread owes stands in front of this one. None when thaw() came first
    saved           a=0 or errno, b=bytes of the memfd     after save(), likewise; see saved()
    thawed          a=ns of CLOCK_MONOTONIC when all was armed again, b=frozen_at, there or in the
                    process before (0 = start_adopted() without any load())
"""

STATE_VERSION: int
"""Of the blobs that save() writes. load() and inspect() read STATE_VERSION_MIN up to STATE_VERSION
+ 1: every record carries its length, so a reader takes what it knows and passes over the rest."""
STATE_VERSION_MIN: int

class Saved(NamedTuple):
    """One thread's world in a memfd, and what has to travel beside it."""

    memfd: int
    """Sealed against writing, growing and shrinking. The caller's: to send, and to close."""
    descriptors: array[int]
    """In the order that load() wants them in. They stay the engine's: send, never close them."""
    downstream: int
    upstream: int
    """Connections that move; those still connecting move without a descriptor and are counted."""
    requests: int
    pushes: int
    """Unanswered ones, of either direction."""
    bytes: int
    """Of the memfd."""
    left: int
    """Connections that cannot move (their I/O or codec says so): closed by release(), and settled
    as lost connections by whoever loads this."""

class Inspection(TypedDict):
    """What a blob says of itself; all of it was verified."""

    version: int
    thread: int
    threads: int
    frozen_at_ns: int
    bytes: int
    records: int
    descriptors: int
    downstream: int
    upstream: int
    left: int
    requests: int
    pushes: int
    resting: int
    queued_bytes: int
    partial_bytes: int
    members: int
    keys: int
    memory_bytes: int
    """That load() needs of the thread's share of memory_bytes_max."""

def inspect(memfd: int) -> Inspection:
    """Verify a blob as load() does, without a world. Neither moves nor closes `memfd`. Raises
    ValueError (what is wrong, and at which byte), OSError."""

class Engine:
    """The data plane: `threads` native threads, each with its own epoll, connections, timers and
    upstreams.

    Built and driven by the main thread only. Raises OSError when threads or descriptors cannot be
    had, ValueError
    for arguments out of range.
    """

    event_fd: int
    """Readable when `events()` has something; for `loop.add_reader`."""
    threads: int
    def __init__(
        self,
        *,
        threads: int = 1,
        spin_us: int = 0,
        memory_bytes_max: int = 536870912,
        watchdog: bool = True,
        first_generation: int = 1,
        seed: int = 0,
        ring_bytes: int = 1048576,
    ) -> None:
        """`first_generation` is a test hook (1..32767): where slot generations start.

        `ring_bytes`: room for commands and for events, each, per thread; a power of two. Pages that
        nobody uses cost nothing. A frame that goes to Python fills at most a quarter of it.
        """
    def start(self, snapshot: Snapshot) -> None:
        """Create the threads and give them their first snapshot. Call before the main thread lowers
        its priority."""
    # --- hand-over, the new side ---
    def adopt(self, snapshot: Snapshot) -> None:
        """Instead of start(): the threads' worlds take the snapshot, connect nowhere, do not run.
        Until start_adopted() only load(), listen() (taken up when the threads run), counters()
        (zero) and stop() make sense. Raises MemoryError as start() does."""
    def load(self, thread: int, memfd: int, descriptors: Sequence[int]) -> None:
        """Rebuild world `thread` of the process before, in ascending order from 0, each once: into
        the thread of that number, or, when there are fewer threads, into thread `thread` modulo
        their number, with other handles (thread 0 keeps all of its own).

        `memfd` stays the caller's. The descriptors are the engine's from the call on, whatever
        comes of it. Verifies seals, version, checksum, lengths and references before it builds.
        Ids that the snapshot does not know: endpoint: its connections drain; listener (or one of
        another codec or kind): its clients drain; group: its members are none any more.

        Raises ValueError (what is wrong, where), MemoryError with what would be needed, OSError.
        After any of them the engine can only be stopped or dropped: both close() the descriptors
        and say nothing on them."""
    def start_adopted(self) -> None:
        """Create the threads. Each arms its connections first, then: event endpoint_up once per
        endpoint with connections up, event thawed; what is missing is connected. Raises
        RuntimeError after a failed load(), or while a world of the process before is missing (none
        at all is fine: then it is start())."""
    # --- hand-over, the old side: freeze, save, and then thaw or release ---
    def freeze(self) -> None:
        """Stop accepting, reading, writing, connecting and timing in all threads. Nothing is lost:
        what arrives waits in the kernel, what is to be said in memory. Until thaw(): counters,
        connections, reply, send, send_many, call_many, subscribe, peer_groups, verdict and close
        work as ever (what they send leaves after thaw(), here or there); publish, listen, unlisten,
        drain and abort_in_flight raise RuntimeError. Event frozen, per thread."""
    def save(self) -> None:
        """Once every thread is frozen (its event was seen; else RuntimeError), and Python has said
        what it wanted to say. Event saved, per thread, then saved(thread). Give no command after it
        but thaw() or release(): it would not be in the blob."""
    def saved(self, thread: int) -> Saved:
        """Once per save() and thread: what it left. Raises RuntimeError when there is nothing
        (yet), OSError when saving failed."""
    def thaw(self) -> None:
        """Go on: at any time after freeze() and before release(), whatever else was asked for
        meanwhile. Silence is not held against anybody for the time it took; deadlines of requests
        have gone on. Event thawed, per thread."""
    def release(self) -> None:
        """They are another process's now: close every connection and listening descriptor without a
        word (never a shutdown) and end the threads. Counters stay as they were. Event stopped, per
        thread, and none other; stop() joins them."""
    # ---
    def publish(self, snapshot: Snapshot) -> None:
        """Put a sealed snapshot in force: each thread takes it before its next turn. Never
        blocks."""
    def in_force(self) -> int:
        """The version that *every* thread works with."""
    def listen(self, listener_id: int, fd: int) -> None:
        """Accept on this bound and listening, non-blocking socket. The engine owns a duplicate; the
        caller keeps `fd`."""
    def unlisten(self, listener_id: int) -> None:
        """Stop accepting there; connections already accepted drain: they finish what is in flight
        and are closed."""
    def accept(self, go_on: bool) -> None:
        """False: accept on no listener; whoever connects waits in its backlog, for another process
        that has the same socket or for `accept(True)`."""
    def drain(self) -> None:
        """Stop accepting everywhere; close each client connection once it owes nothing and is
        quiet."""
    def abort_in_flight(self) -> None:
        """End of the grace period: answer everything in flight with "upstream lost", flush,
        close."""
    def stop(self, timeout_ms: int = 5000) -> bool:
        """Stop and join the threads. True when they all ended in time. After adopt() without
        start_adopted(): drop what was loaded."""
    def send(self, handle: int, data: bytes) -> None:
        """Queue bytes on a connection. A stale handle is counted and ignored."""
    def close(self, handle: int) -> None: ...
    def send_many(self, frames: Sequence[tuple[int, bytes]]) -> int:
        """Queue bytes on connections of thread 0, (handle, bytes) each. Returns how many were
        taken: the rest did not fit and may be given again."""
    def call_many(self, calls: Sequence[tuple[int, int, bytes, int]]) -> int:
        """Requests of our own on connections of thread 0: (handle, ticket, frame, timeout_ms). The
        frame's id is replaced; the outcome is one event "answer" with that ticket. Returns how many
        were taken. The first one to a broker is the hello: nothing leaves before it."""
    def reply(self, handle: int, data: bytes, greet: bool = False) -> None:
        """Answer a control frame of a client and read on from it. `data` may be b"" (a one-way
        frame). `greet`: from now on it may publish and forward."""
    def subscribe(self, handle: int, groups: Sequence[tuple[int, int]]) -> None:
        """(group_id, prefetch): the whole set of this client connection; [] = none. Ids that are
        not in the snapshot in force are passed over."""
    def peer_groups(self, endpoint_id: int, group_ids: Sequence[int]) -> None:
        """What the peer behind that endpoint has live consumers for. Forgotten when its last
        connection ends."""
    def verdict(self, ticket: int, cluster_id: int | None) -> None:
        """Release a parked frame to its rule's cluster (-1), to another one, or refuse it as
        overload (None)."""
    def events(self, most: int = 4096) -> list[Event]: ...
    def ask_counters(self) -> int:
        """Ask every thread for a consistent copy. Returns a ticket for `counters_ready`."""
    def counters_ready(self, ticket: int) -> bool: ...
    def counters(self) -> Reading: ...
    def ask_connections(self) -> int: ...
    def connections_ready(self, ticket: int) -> bool: ...
    def connections(self) -> list[dict[str, object]]:
        """At most 10 000 a thread: handle, role (downstream|upstream), listener_id or endpoint_id,
        state, peer, in_flight,
        asked (requests it waits for), queued_bytes, partial_bytes, age_ms, idle_ms, thread."""
