"""Native load generator, echo service and push source. Every class runs its own native threads;
Python only starts and reads.

    with EchoServer("127.0.0.1:0") as echo:
        run = LoadRun(echo.address, connections=64, duration_ms=2000)
        run.start()
        while not run.wait(1.0):
            print(run.progress())
        result = run.result()
        assert result.ok, result.errors

Addresses: "127.0.0.1:12200", "[::1]:12200", "unix:/path/to.sock" ("unix:" relative paths start at
the current directory).

Each request's body starts with 32 bytes that name it (run, connection and its epoch, sequence
number, check of these) and goes on with bytes that every answer is compared with, so that an answer
tells by itself whose it is. Bodies of size 0 carry nothing: for them only the id is checked. Error
kinds, counted over the whole run, warm-up and drain included:

    lost           no answer until timeout + 1 s, or its connection ended first
    doubled        a second answer to a request that was answered already
    misrouted      an answer whose body belongs to another request, connection or run
    torn           an answer whose body differs from what was sent
    unexpected     an answer to an id that was never used
    late           an answer to a request that was counted as lost before
    undecodable    bytes that are no frame (bad checksum included); the connection is closed
    disconnected   a connection that the other side closed during the run, in order or by a reset
    connect_failed a connection that was refused or did not come up in time
    unsent         open loop: due before the end and never sent, because every connection was full
    refused        message mesh: an answer that did not say "consumed"
    status.N       an answer with a status other than 0
"""

from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

ERROR_KINDS: tuple[str, ...]
"""The fixed kinds above, without status.N."""
BODY_BYTES_MIN: int
"""Smallest body that carries a name (32); a size is 0 or at least this."""
BODY_BYTES_MAX: int
CONNECTIONS_MAX: int
DEPTH_MAX: int
THREADS_MAX: int
SECTIONS_MAX: int
"""Sections that a run may have, the first one included."""

class Latency(NamedTuple):
    """Nanoseconds. Quantiles are upper bounds of buckets 0.8 % wide; `max_ns` is exact. All 0 when
    nothing was measured.
    """

    samples: int
    mean_ns: float
    p50_ns: int
    p90_ns: int
    p99_ns: int
    p999_ns: int
    max_ns: int

class Progress(NamedTuple):
    """A look at a run while it goes on. Counts are since the start, warm-up included."""

    state: str
    """"new", "connecting", "warmup", "running", "draining" or "done"."""
    elapsed_s: float
    connections: int
    sent: int
    answered: int
    in_flight: int
    errors: int

class Section(NamedTuple):
    """A part of a run: from one mark() to the next. Answers and gaps are of the measured window,
    latencies of requests that started in it, errors of the whole run.
    """

    begin_s: float
    """After the window began; the first one has 0."""
    answered: int
    gap_ms_max: float
    """The longest time between two right answers of one connection, however often it was opened
    anew in between; it counts where it ends, and what has not ended by the end of the window counts
    there. Of connections that carry load; without a stall it is the time between two requests.
    """
    latency_ms_max: float
    errors: dict[str, int]
    """Kinds that occurred; "status" counts every answer with a status."""

class LoadResult(NamedTuple):
    """What a run measured. sent/answered/throughput/bytes/latency are of the measured window,
    errors of the whole run.
    """

    ok: bool
    """Something was answered and every error count is zero."""
    duration_s: float
    """Length of the measured window; shorter than asked for after stop()."""
    connections: int
    """Connections that were up when the load began."""
    sent: int
    answered: int
    throughput_per_s: float
    bytes_out: int
    bytes_in: int
    latency: Latency
    errors: dict[str, int]
    """Every kind by name, zeros included; status.N only when it occurred."""
    histogram: list[tuple[int, int]]
    """(exclusive upper bound in ns, count) of each bucket that is not empty."""
    cpu_share: float
    """CPU time / wall time of the tool's busiest thread. Above 0.85 the tool itself is the
    bottleneck.
    """
    answered_for_peer: int
    """Requests from the server side that the connections of this run answered (whole run)."""
    sent_total: int
    """Requests sent in the whole run, warm-up included: what an echo service must have seen."""
    kept: int
    """Connections that were up when the load began and never ended until the run did; 0 for
    pushes."""
    resets: int
    """How many of the disconnected ones ended by a reset: what was on the way is gone."""
    gap_ms_max: float
    """The longest of all sections, see Section."""
    first_error_s: float | None
    """When the first error came, after the window began (negative: during warm-up); None without
    any."""
    last_error_s: float | None
    sections: list[Section]
    """One, and one more for each mark()."""

class EchoStats(NamedTuple):
    """Counts of an EchoServer since its start."""

    connections: int
    """Open now."""
    accepted: int
    requests: int
    oneways: int
    heartbeats: int
    undecodable: int
    """Connections closed because of bytes that are no frame."""
    overloaded: int
    """Requests answered with status 4 because the memory for delayed answers was used up."""
    bytes_in: int
    bytes_out: int
    cpu_s: float
    """CPU time of its threads."""

class LoadRun:
    """One run of load against `target`. Bounded in time: connect_timeout_ms + warmup_ms +
    duration_ms + timeout_ms + 1 s.

    Closed loop (`rate` 0): every active connection keeps `depth` requests in flight. Open loop:
    `rate` requests a second, all threads together, in turn over the active connections; latency
    counts from the moment at which the schedule wanted the request sent, so that a stall shows in
    every request that it delayed. `depth` 0 means 1 (closed) or 256 (open).

    `sizes`: bytes of the bodies; one is drawn for each request, all equally likely.
    `connect_rate`: new connections a second, 0 = at most 256 connecting at once and no other limit.
    `active`: share of the connections that carry load (at least one); the others are opened and
    stay silent.
    `requests`: end after so many instead of at the end of `duration_ms`; 0 = only time decides. All
    of them are measured when `warmup_ms` is 0.
    `consume`: (app, client, group, prefetch). The connections say hello, subscribe to that group of
    a message mesh and answer "consumed" to whatever they are asked; they ask nothing themselves.
    `version` 1 or 2 of the protocol; `crc` needs 2. `timeout_ms` goes into each request. `service`
    empty: no header section. Requests from the other side are echoed on every connection.

    Raises ValueError for values out of range, OSError for an address that cannot be resolved or
    missing descriptors.
    """

    def __init__(
        self,
        target: str,
        *,
        connections: int = 64,
        depth: int = 0,
        sizes: Sequence[int] = (256,),
        threads: int = 1,
        duration_ms: int = 5000,
        warmup_ms: int = 500,
        rate: float = 0.0,
        connect_rate: float = 0.0,
        connect_timeout_ms: int = 10000,
        active: float = 1.0,
        requests: int = 0,
        version: int = 1,
        crc: bool = False,
        timeout_ms: int = 3000,
        service: str = "com.example.Order:1.0",
        headers: Sequence[tuple[str, str]] = (),
        consume: tuple[str, str, str, int] | None = None,
        seed: int = 0,
    ) -> None:
        """`seed` 0 draws one; it decides bodies and the order of sizes."""
    def start(self) -> None:
        """Start the threads. Once only."""
    def stop(self) -> None:
        """End the measured window now; what is in flight is waited for. Any thread may call it, any
        number of times.
        """
    def mark(self) -> int:
        """Begin a new section of the result; returns its place in `sections`. Raises RuntimeError
        before start() and when there are SECTIONS_MAX already.
        """
    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait, without holding the GIL, until the run is over. True when it is."""
    def progress(self) -> Progress: ...
    def result(self) -> LoadResult:
        """Waits for the end. Raises RuntimeError when the run was never started."""
    def __enter__(self) -> Self:
        """Starts; leaving the block stops and waits."""
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

class EchoServer:
    """Answers every request with a response (class SofaResponse) of the same content, heartbeats
    with their acknowledgement.

    `delay_ms` later, when given; with `status` other than 0 the answer carries that status and no
    content. Listens from construction on (so that clients may connect already), serves from start()
    on.

    With `push_rate` it also asks: on each connection that sent its first bytes (a heartbeat counts)
    or, with `push_at_once`, that was accepted, `push_rate` requests a second of `push_sizes` bytes;
    their answers are checked like those of a LoadRun (see `push_result`).

    With `push_group` it is a broker of a message mesh: each connection that announced a group (or,
    without a mesh between, subscribed to one) is sent deliveries of `push_topic` to `push_group`,
    and every request is answered "consumed".
    """

    address: str
    """Where it listens, with the real port."""
    def __init__(
        self,
        listen: str = "127.0.0.1:0",
        *,
        threads: int = 1,
        delay_ms: int = 0,
        status: int = 0,
        frame_bytes_max: int = 16777216,
        push_rate: float = 0.0,
        push_depth: int = 64,
        push_sizes: Sequence[int] = (256,),
        push_timeout_ms: int = 3000,
        push_at_once: bool = False,
        push_service: str = "com.example.Push:1.0",
        push_group: str = "",
        push_topic: str = "bench",
        seed: int = 0,
    ) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None:
        """Close the listener and every connection, join the threads. Idempotent; bounded (under 1
        s).
        """
    def stats(self) -> EchoStats: ...
    def stop_push(self, timeout_ms: int = 5000) -> bool:
        """Ask nothing more and wait for the answers to what was asked; True when none is owed.
        Call it before the clients leave, or what is in flight then counts as lost.
        """
    def push_result(self) -> LoadResult:
        """What the pushes measured so far; the window is the time since the first push."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

def bench(rounds: int = 1000000) -> dict[str, float]:
    """Nanoseconds per operation of the generator's own parts: "histogram", "build_256",
    "check_256".
    """
