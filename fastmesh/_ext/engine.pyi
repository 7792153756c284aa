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
    ) -> None:
        """`first_generation` is a test hook (1..32767): where slot generations start."""
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
