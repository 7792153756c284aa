"""One timer wheel per thread: request deadlines, idle limits, frame limits, back-off, heartbeats.

Times are milliseconds of CLOCK_MONOTONIC that the caller passes in; the wheel reads no clock. A
timer is
embedded in what it guards and is never allocated. Setting and clearing are O(1). A deadline further
away than
one revolution stays in its bucket and is looked at once per revolution.

Invariants: a timer is in the wheel exactly when `link` is not NULL; `armed` counts those. A
bucket's bit is set exactly when
the bucket holds a timer. Memory of a timer is zero-filled before its first timer_set().
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef enum:
    WHEEL_BUCKETS = 4096
    WHEEL_TICK_MS = 4     # a revolution is 16.4 s; deadlines fire 0..4 ms late, never early

cdef struct Timer:
    Timer* next
    # what points at this timer (bucket head or a neighbour's next); NULL = not armed
    Timer** link
    uint64_t at_ms
    void* owner           # what it guards
    uint32_t kind         # the owner's word for what is due

cdef struct Wheel:
    Timer* bucket[4096]
    uint64_t occupied[64]   # one bit per bucket that holds a timer
    uint64_t tick           # every bucket before this tick has been served
    # found due and not handed out yet, oldest first: a bounded caller never looks at a bucket twice
    Timer* due
    # points into the wheel while `due` is empty, so a started wheel never moves
    Timer** due_tail
    uint32_t armed

cdef void wheel_start(Wheel* wheel, uint64_t now_ms) noexcept nogil
# Arms or moves the timer. A time in the past is due at the next wheel_due().
cdef void timer_set(Wheel* wheel, Timer* timer, uint64_t at_ms) noexcept nogil
cdef void timer_clear(Wheel* wheel, Timer* timer) noexcept nogil
# Takes one due timer out of the wheel, or NULL. The caller bounds how many it serves per turn.
cdef Timer* wheel_due(Wheel* wheel, uint64_t now_ms) noexcept nogil
# How long the thread may sleep: 0 = something is due, -1 = nothing armed; may be early, never late
# by more than a tick.
cdef int64_t wheel_sleep_ms(Wheel* wheel, uint64_t now_ms) noexcept nogil
