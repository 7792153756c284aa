"""Counters and histograms (contract: counters.pxd), and `Reading`, through which Python sees them.
"""

from libc.math cimport ceil
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from .bytes cimport memcpy
from .frame cimport (
    CAUSE_CLIENT_GONE,
    CAUSE_CONNECT,
    CAUSE_NO_ENDPOINT,
    CAUSE_NO_ROUTE,
    CAUSE_OVERLOAD,
    CAUSE_UNDECODABLE,
    CAUSE_UPSTREAM_LOST,
    ERROR_CHECKSUM,
    ERROR_COMMAND,
    ERROR_HEADERS,
    ERROR_LENGTH,
    ERROR_PROTOCOL,
    ERROR_TOO_LARGE,
    ERROR_TYPE,
)
from .slots cimport MISS_CLIENT_GONE, MISS_DUPLICATE, MISS_LATE, MISS_UNKNOWN

cdef extern from "atomics.h" nogil:
    uint64_t fm_load(const uint64_t* at)
    void fm_store(uint64_t* at, uint64_t value)
    uint64_t fm_add(uint64_t* at, uint64_t value)


cdef Counters* allocate() noexcept nogil:
    cdef Counters* counters = <Counters*>calloc(1, sizeof(Counters))
    cdef void* rows
    if counters == NULL:
        return NULL
    # Mapped, not malloc'ed: whatever the allocator does, a page of rows that nobody uses costs
    # nothing.
    rows = mmap(
        NULL, ROWS_MAX * sizeof(Row), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
    )
    if rows == MAP_FAILED:
        free(counters)
        return NULL
    counters.rows = <Row*>rows
    return counters


cdef Counters* counters_new() noexcept nogil:
    cdef Counters* counters = allocate()
    if counters == NULL:
        return NULL
    counters.copy = allocate()
    if counters.copy == NULL:
        counters_free(counters)
        return NULL
    return counters


cdef void counters_free(Counters* counters) noexcept nogil:
    if counters == NULL:
        return
    counters_free(counters.copy)
    munmap(counters.rows, ROWS_MAX * sizeof(Row))
    free(counters)


cdef Row* row_first_used(Counters* counters, uint32_t row) noexcept nogil:
    if row >= ROWS_MAX:
        row = ROW_OTHER
    if row >= counters.rows_used:
        counters.rows_used = row + 1
    return &counters.rows[row]


cdef void counters_copy(Counters* counters) noexcept nogil:
    cdef uint64_t asked = fm_load(&counters.asked)
    cdef Counters* copy = counters.copy
    if asked == counters.copied:
        return
    memcpy(copy.p, counters.p, sizeof(counters.p))
    memcpy(copy.hop, counters.hop, sizeof(counters.hop))
    memcpy(copy.hop_sum_ns, counters.hop_sum_ns, sizeof(counters.hop_sum_ns))
    memcpy(copy.rows, counters.rows, counters.rows_used * sizeof(Row))
    copy.rows_used = counters.rows_used
    # Not what `asked` says by now: a question that came while we copied gets a copy of its own.
    fm_store(&counters.copied, asked)


cdef uint64_t histogram_bound_ns(uint32_t index) noexcept nogil:
    cdef uint32_t octave
    if index < 16:
        return index + 1
    octave = (index >> 4) + 3
    return <uint64_t>((index & 15) + 17) << (octave - 4)


cdef uint64_t latency_bound_ns(uint32_t index) noexcept nogil:
    cdef uint32_t octave
    if index < 4:
        return (index + 1) * <uint64_t>1000
    octave = (index >> 2) + 1
    return (<uint64_t>((index & 3) + 5) << (octave - 2)) * 1000


cdef dict failures():
    return {
        "no_route": CAUSE_NO_ROUTE,
        "no_endpoint": CAUSE_NO_ENDPOINT,
        "overload": CAUSE_OVERLOAD,
        "connect": CAUSE_CONNECT,
        "upstream_lost": CAUSE_UPSTREAM_LOST,
        "client_gone": CAUSE_CLIENT_GONE,
        "undecodable": CAUSE_UNDECODABLE,
    }


cdef dict row_names():
    names = {}
    for block, start in (("requests", REQUESTS), ("pushes", PUSHES)):
        names[f"{block}.accepted"] = start + C_ACCEPTED
        names[f"{block}.answered"] = start + C_ANSWERED
        names[f"{block}.expired"] = start + C_EXPIRED
        names[f"{block}.in_flight"] = start + C_IN_FLIGHT
        for cause, number in failures().items():
            names[f"{block}.failed.{cause}"] = start + C_FAILED + number
        names[f"{block}.oneway_accepted"] = start + C_ONEWAY_ACCEPTED
        names[f"{block}.oneway_forwarded"] = start + C_ONEWAY_FORWARDED
        names[f"{block}.oneway_dropped"] = start + C_ONEWAY_DROPPED
        names[f"{block}.retried"] = start + C_RETRIED
    names["bytes_in"] = C_BYTES_IN
    names["bytes_out"] = C_BYTES_OUT
    names["connections"] = C_CONNECTIONS
    names["opened"] = C_OPENED
    names["refused"] = C_REFUSED
    names["up"] = C_UP
    names["ejected"] = C_EJECTED
    names["ejections"] = C_EJECTIONS
    names["connect_failed"] = C_CONNECT_FAILED
    names["sent"] = C_SENT
    names["forwarded"] = C_FORWARDED
    names["stayed"] = C_STAYED
    names["offered"] = C_OFFERED
    names["loops"] = C_LOOPS
    names["closed.by_peer"] = C_CLOSED + CLOSED_BY_PEER
    names["closed.idle"] = C_CLOSED + CLOSED_IDLE
    names["closed.first_byte"] = C_CLOSED + CLOSED_FIRST_BYTE
    names["closed.frame_timeout"] = C_CLOSED + CLOSED_FRAME_TIMEOUT
    names["closed.malformed"] = C_CLOSED + CLOSED_MALFORMED
    names["closed.slow_consumer"] = C_CLOSED + CLOSED_SLOW_CONSUMER
    names["closed.memory"] = C_CLOSED + CLOSED_MEMORY
    names["closed.io_error"] = C_CLOSED + CLOSED_IO_ERROR
    names["closed.connect"] = C_CLOSED + CLOSED_CONNECT
    names["closed.heartbeat"] = C_CLOSED + CLOSED_HEARTBEAT
    names["closed.drained"] = C_CLOSED + CLOSED_DRAINED
    names["closed.by_command"] = C_CLOSED + CLOSED_BY_COMMAND
    return names


cdef dict process_names():
    return {
        "turns": P_TURNS,
        "waits": P_WAITS,
        "reads": P_READS,
        "writes": P_WRITES,
        "read_bytes": P_READ_BYTES,
        "write_bytes": P_WRITE_BYTES,
        "frames": P_FRAMES,
        "heartbeats_in": P_HEARTBEATS_IN,
        "heartbeats_out": P_HEARTBEATS_OUT,
        "events_lost": P_EVENTS_LOST,
        "punt_full": P_PUNT_FULL,
        "stale_handle": P_STALE_HANDLE,
        "memory": P_MEMORY,
        "memory_max": P_MEMORY_MAX,
        "alloc_refused": P_ALLOC_REFUSED,
        "pauses": P_PAUSES,
        "shed": P_SHED,
        "slow_consumers": P_SLOW_CONSUMERS,
        "accept_pauses": P_ACCEPT_PAUSES,
        "stalls": P_STALLS,
        "goaways": P_GOAWAYS,
        "timers": P_TIMERS,
        "connections": P_CONNECTIONS,
        "upstreams": P_UPSTREAMS,
        "dropped.malformed": P_DROPPED,
        "dropped.unknown": P_DROPPED + MISS_UNKNOWN,
        "dropped.duplicate": P_DROPPED + MISS_DUPLICATE,
        "dropped.late": P_DROPPED + MISS_LATE,
        "dropped.client_gone": P_DROPPED + MISS_CLIENT_GONE,
        "malformed.protocol": P_MALFORMED + ERROR_PROTOCOL,
        "malformed.type": P_MALFORMED + ERROR_TYPE,
        "malformed.command": P_MALFORMED + ERROR_COMMAND,
        "malformed.length": P_MALFORMED + ERROR_LENGTH,
        "malformed.too_large": P_MALFORMED + ERROR_TOO_LARGE,
        "malformed.checksum": P_MALFORMED + ERROR_CHECKSUM,
        "malformed.headers": P_MALFORMED + ERROR_HEADERS,
        "spins": P_SPINS,
        "parked": P_PARKED,
        "samples": P_SAMPLES,
        "punted": P_PUNTED,
        "calls": P_CALLS,
    }


ROW_NAMES = row_names()
PROCESS_NAMES = process_names()
HOP_NAMES = ("mesh", "upstream", "queue")   # in the order of enum Hop
globals()["ROWS_MAX"] = <int>ROWS_MAX   # a plain assignment would be one to the C constant


cdef class Reading:
    """A sum of the consistent copies of all engine threads at one moment."""

    def __cinit__(self):
        self.total = allocate()
        if self.total == NULL:
            raise MemoryError

    def __dealloc__(self):
        counters_free(self.total)

    cdef const Row* at(self, int row) except NULL:
        if not 0 <= row < ROWS_MAX:
            raise IndexError(f"row: {row} is not in 0..{ROWS_MAX - 1}")
        return &self.total.rows[row]

    @property
    def rows_used(self):
        return self.total.rows_used

    def row(self, int row):
        cdef const Row* counted = self.at(row)
        cdef int offset
        found = {}
        for name, offset in ROW_NAMES.items():
            found[name] = counted.c[offset]
        return found

    def value(self, int row, str name):
        cdef int offset = ROW_NAMES[name]
        return self.at(row).c[offset]

    def process(self):
        cdef int offset
        found = {}
        for name, offset in PROCESS_NAMES.items():
            found[name] = self.total.p[offset]
        return found

    def hop(self, str name):
        cdef int hop, i
        if name not in HOP_NAMES:
            raise KeyError(name)
        hop = HOP_NAMES.index(name)
        buckets = [self.total.hop[hop][i] for i in range(HISTOGRAM_BUCKETS)]
        return buckets, self.total.hop_sum_ns[hop]

    def latency(self, int row):
        cdef const Row* counted = self.at(row)
        cdef int i
        return [counted.latency[i] for i in range(LATENCY_BUCKETS)]


cdef Reading reading_new():
    return Reading()


cdef void reading_add(Reading reading, const Counters* counters) noexcept:
    cdef Counters* total = reading.total
    cdef const Counters* copy = counters.copy
    cdef uint64_t memory_max = max(total.p[<int>P_MEMORY_MAX], copy.p[<int>P_MEMORY_MAX])
    cdef const uint64_t* more
    cdef uint64_t* sums
    cdef size_t i, hop
    for i in range(<size_t>PROCESS_COUNTERS):
        total.p[i] += copy.p[i]
    total.p[<int>P_MEMORY_MAX] = memory_max
    for hop in range(<size_t>HOPS):
        total.hop_sum_ns[hop] += copy.hop_sum_ns[hop]
        for i in range(<size_t>HISTOGRAM_BUCKETS):
            total.hop[hop][i] += copy.hop[hop][i]
    # A row is nothing but 64-bit counters, so all rows are one long array of them.
    sums = <uint64_t*>total.rows
    more = <const uint64_t*>copy.rows
    for i in range(copy.rows_used * (sizeof(Row) // sizeof(uint64_t))):
        sums[i] += more[i]
    if copy.rows_used > total.rows_used:
        total.rows_used = copy.rows_used


def hop_bounds_ns():
    """Exclusive upper bound of each hop bucket; the last one also holds everything longer."""
    return [histogram_bound_ns(i) for i in range(HISTOGRAM_BUCKETS)]


def latency_bounds_ns():
    """Exclusive upper bound of each latency bucket; the last one also holds everything longer."""
    return [latency_bound_ns(i) for i in range(LATENCY_BUCKETS)]


def quantile_ns(list buckets, list bounds, double q):
    """Upper bound of the bucket where the q-quantile lies; 0.0 when the histogram is empty."""
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"q: {q} is not in 0..1")
    total = sum(buckets)
    if total == 0:
        return 0.0
    left = max(1, <object>ceil(q * total))
    for count, bound in zip(buckets, bounds, strict=True):
        left -= count
        if left <= 0:
            return float(bound)
    return float(bounds[len(bounds) - 1])


cdef class ThreadCounters:
    """The counters of one engine thread, for tests: written by name instead of by an engine."""

    cdef Counters* counters

    def __cinit__(self):
        self.counters = counters_new()
        if self.counters == NULL:
            raise MemoryError

    def __dealloc__(self):
        counters_free(self.counters)

    def add(self, uint32_t row, str name, uint64_t by=1):
        cdef int offset = ROW_NAMES[name]
        row_of(self.counters, row).c[offset] += by

    def add_process(self, str name, uint64_t by=1):
        cdef int offset = PROCESS_NAMES[name]
        self.counters.p[offset] += by

    def record_hop(self, str name, uint64_t ns):
        hop_record(self.counters, HOP_NAMES.index(name), ns)

    def record_latency(self, uint32_t row, uint64_t ns):
        row_of(self.counters, row).latency[latency_index(ns)] += 1

    def ask(self):
        return fm_add(&self.counters.asked, 1)

    def copy(self):
        """End of a turn."""
        counters_copy(self.counters)

    @property
    def copied(self):
        return fm_load(&self.counters.copied)

    def read_into(self, Reading reading):
        reading_add(reading, self.counters)


def sizes():
    """Bytes of each native struct, by name."""
    return {"Row": sizeof(Row), "Counters": sizeof(Counters), "rows": ROWS_MAX * sizeof(Row)}


cdef double now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec * 1e9 + now.tv_nsec


def bench(uint64_t rounds):
    """Nanoseconds of counting one request and its answer: four counters, two hops, one latency."""
    cdef Counters* counters = counters_new()
    cdef Row* row
    cdef uint64_t round
    cdef double began, ended
    if counters == NULL:
        raise MemoryError
    with nogil:
        began = now_ns()
        for round in range(rounds):
            row = row_of(counters, 2 + (round & 7))
            row.c[<int>REQUESTS + <int>C_ACCEPTED] += 1
            row.c[<int>REQUESTS + <int>C_IN_FLIGHT] += 1
            row.c[<int>REQUESTS + <int>C_ANSWERED] += 1
            row.c[<int>REQUESTS + <int>C_IN_FLIGHT] -= 1
            hop_record(counters, HOP_MESH, 20000 + (round & 0xffff))
            hop_record(counters, HOP_UPSTREAM, 90000 + (round & 0xffff))
            row.latency[latency_index(90000 + (round & 0xffff))] += 1
        ended = now_ns()
    counters_free(counters)
    return (ended - began) / rounds if rounds else 0.0
