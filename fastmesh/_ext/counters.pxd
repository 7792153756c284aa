"""Counters and histograms: flat arrays, written by one engine thread, read by Python without
stopping anyone.

A *row* belongs to one name that operators know (a route, an endpoint, a cluster's pushes, a
listener). Python hands out row numbers;
row 0 is the process, row 1 is `__other__`, where names beyond ROWS_MAX are counted. The ledger of a
direction:

    accepted == answered + failed (all causes) + expired + in flight

holds in every copy made by counters_copy(), because a thread copies at the end of a turn. `in
flight` is a count of
occupied slots that goes up when a slot is taken and down when it is released, never a difference of
the others.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    int leading_zeros "__builtin_clzll"(unsigned long long n) nogil

cdef enum:
    ROWS_MAX = 4096
    ROW_PROCESS = 0
    ROW_OTHER = 1

cdef enum:  # Block # offset of a direction's block in Row.c
    REQUESTS = 0             # client -> upstream
    PUSHES = 16              # upstream -> client

cdef enum:  # InBlock
    C_ACCEPTED = 0
    C_ANSWERED = 1
    C_EXPIRED = 2
    C_IN_FLIGHT = 3          # gauge
    C_FAILED = 4             # + Cause (1..7), so 5..11; 4 itself stays 0
    C_ONEWAY_ACCEPTED = 12
    C_ONEWAY_FORWARDED = 13
    C_ONEWAY_DROPPED = 14
    C_RETRIED = 15           # moved to another endpoint, no byte written

cdef enum:  # CloseReason # why a connection ended; offset from C_CLOSED
    CLOSED_BY_PEER = 0
    CLOSED_IDLE = 1
    CLOSED_FIRST_BYTE = 2
    CLOSED_FRAME_TIMEOUT = 3
    CLOSED_MALFORMED = 4
    CLOSED_SLOW_CONSUMER = 5
    CLOSED_MEMORY = 6
    CLOSED_IO_ERROR = 7
    CLOSED_CONNECT = 8       # never came up: refused or timed out
    CLOSED_HEARTBEAT = 9
    CLOSED_DRAINED = 10
    CLOSED_BY_COMMAND = 11
    CLOSED_COUNT = 12

cdef enum:  # InRow # after the two blocks
    C_BYTES_IN = 32
    C_BYTES_OUT = 33
    C_CONNECTIONS = 34       # gauge
    C_OPENED = 35
    C_REFUSED = 36           # accepted by the kernel, closed by a limit
    C_UP = 37                # gauge: usable connections of an endpoint
    C_EJECTED = 38           # gauge: 1 while ejected
    C_EJECTIONS = 39
    C_CONNECT_FAILED = 40
    C_SENT = 41              # requests that went to this endpoint
    C_FORWARDED = 42         # deliveries of a group that went to a peer
    C_STAYED = 43            # ... that should have, and no peer was reachable
    C_OFFERED = 44           # ... that a peer refused before execution: offered here
    C_LOOPS = 45             # forwards that had been forwarded before: refused
    C_CLOSED = 48            # + CloseReason
    ROW_COUNTERS = 64

cdef enum:  # InProcess # Counters.p: what belongs to no row
    P_TURNS = 0
    P_WAITS = 1              # epoll_wait calls
    P_READS = 2              # recv calls
    P_WRITES = 3             # send calls
    P_READ_BYTES = 4
    P_WRITE_BYTES = 5
    P_FRAMES = 6
    P_HEARTBEATS_IN = 7
    P_HEARTBEATS_OUT = 8
    P_EVENTS_LOST = 9        # samples and log events that found the ring full (never frames)
    P_PUNT_FULL = 10         # times a connection was paused because the punt ring was full
    P_STALE_HANDLE = 11
    P_MEMORY = 12            # gauge, bytes of all buffers
    P_MEMORY_MAX = 13        # gauge, highest so far
    P_ALLOC_REFUSED = 14
    P_PAUSES = 15            # clients paused over their quota
    P_SHED = 16              # requests answered "overload" because the quota stayed full
    P_SLOW_CONSUMERS = 17
    P_ACCEPT_PAUSES = 18
    P_STALLS = 19
    P_GOAWAYS = 20
    P_TIMERS = 21
    P_CONNECTIONS = 22       # gauge, downstream
    P_UPSTREAMS = 23         # gauge
    # + SlotMiss (unknown 1, duplicate 2, late 3, client_gone 4); 24 itself = malformed
    P_DROPPED = 24
    P_MALFORMED = 32         # + FrameError (1..7)
    P_SPINS = 40
    P_PARKED = 41            # gauge
    P_SAMPLES = 42
    P_PUNTED = 43            # frames handed to Python
    P_CALLS = 44             # requests that Python made
    PROCESS_COUNTERS = 64

cdef enum:  # Hop
    HOP_MESH = 0             # read -> handed to the kernel, both directions
    HOP_UPSTREAM = 1         # request handed to the kernel -> answer read
    # waiting in a write queue, frames that did not leave in the turn they came in
    HOP_QUEUE = 2
    HOPS = 3

cdef enum:
    # nanoseconds, 16 per octave: 6 % wide; the last one takes all >= 2**40 ns
    HISTOGRAM_BUCKETS = 592
    LATENCY_BUCKETS = 104    # microseconds, 4 per octave: 25 % wide; enough for a live table

cdef struct Row:
    uint64_t c[64]
    uint64_t latency[104]    # routes: read -> answer handed over; endpoints: time at the upstream

cdef struct Counters:
    uint64_t p[64]
    uint64_t hop[3][592]
    uint64_t hop_sum_ns[3]
    uint32_t rows_used       # rows below this one may be non-zero
    Row* rows                # ROWS_MAX of them, untouched pages cost nothing
    # the consistent copy
    uint64_t asked           # bumped by Python
    uint64_t copied          # = asked, stored after the copy is whole
    Counters* copy

cdef Counters* counters_new() noexcept nogil
cdef void counters_free(Counters* counters) noexcept nogil
# Engine thread, end of a turn: if asked != copied, copy everything and then publish `copied`.
cdef void counters_copy(Counters* counters) noexcept nogil
# Inline, because every frame is counted twice.
cdef inline uint32_t histogram_index(uint64_t ns) noexcept nogil:
    # 0..15 exactly, then 16 buckets for every power of two.
    cdef int octave
    if ns < 16:
        return <uint32_t>ns
    if ns >= <uint64_t>1 << 40:
        return HISTOGRAM_BUCKETS - 1
    octave = 63 - leading_zeros(ns)
    return <uint32_t>(((octave - 3) << 4) + <int>((ns >> (octave - 4)) & 15))

cdef inline uint32_t latency_index(uint64_t ns) noexcept nogil:
    # 0..3 us exactly, then 4 buckets for every power of two.
    cdef uint64_t us = ns // 1000
    cdef int octave
    if us < 4:
        return <uint32_t>us
    if us >= <uint64_t>1 << 27:
        return LATENCY_BUCKETS - 1
    octave = 63 - leading_zeros(us)
    return <uint32_t>(((octave - 1) << 2) + <int>((us >> (octave - 2)) & 3))

# exclusive upper bound of the bucket
cdef uint64_t histogram_bound_ns(uint32_t index) noexcept nogil
cdef uint64_t latency_bound_ns(uint32_t index) noexcept nogil

cdef inline void hop_record(Counters* counters, int hop, uint64_t ns) noexcept nogil:
    counters.hop[hop][histogram_index(ns)] += 1
    counters.hop_sum_ns[hop] += ns

# a row that nobody asked for before: `rows_used` moves on (never beyond ROWS_MAX)
cdef Row* row_first_used(Counters* counters, uint32_t row) noexcept nogil

cdef inline Row* row_of(Counters* counters, uint32_t row) noexcept nogil:
    if row >= counters.rows_used:
        return row_first_used(counters, row)
    return &counters.rows[row]


cdef class Reading:
    # The sum of the consistent copies of all engine threads; Python sees it read-only.
    cdef Counters* total
    cdef const Row* at(self, int row) except NULL

# A Reading of zeros; MemoryError when there is no memory for it.
cdef Reading reading_new()
# Adds a thread's *copy* (never its live counters). Gauges add up too; only P_MEMORY_MAX takes the
# highest.
cdef void reading_add(Reading reading, const Counters* counters) noexcept
