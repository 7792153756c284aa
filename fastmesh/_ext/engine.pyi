from collections.abc import Sequence
from typing import NamedTuple

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
"""

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
    def drain(self) -> None:
        """Stop accepting everywhere; close each client connection once it owes nothing and is
        quiet."""
    def abort_in_flight(self) -> None:
        """End of the grace period: answer everything in flight with "upstream lost", flush,
        close."""
    def stop(self, timeout_ms: int = 5000) -> bool:
        """Stop and join the threads. True when they all ended in time."""
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
