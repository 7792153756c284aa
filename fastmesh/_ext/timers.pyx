"""The timer wheel (contract: timers.pxd) and `TimerWheel`, the face that tests drive it by."""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free

from .bytes cimport memset
from .debug cimport FM_DEBUG, holds

cdef extern from *:
    int first_bit "__builtin_ctzll"(uint64_t word) noexcept nogil


cdef inline uint64_t tick_of(uint64_t at_ms) noexcept nogil:
    # Rounded up, so that a timer never fires early. Written so that the largest time does not
    # overflow.
    return at_ms // WHEEL_TICK_MS + (at_ms % WHEEL_TICK_MS != 0)


cdef inline void put(Timer** link, Timer* timer) noexcept nogil:
    timer.next = link[0]
    if timer.next != NULL:
        timer.next.link = &timer.next
    timer.link = link
    link[0] = timer


cdef inline void put_due(Wheel* wheel, Timer* timer) noexcept nogil:
    timer.next = NULL
    timer.link = wheel.due_tail
    wheel.due_tail[0] = timer
    wheel.due_tail = &timer.next


cdef inline void take_out(Wheel* wheel, Timer* timer) noexcept nogil:
    cdef Timer** link = timer.link
    cdef uint64_t bucket
    if FM_DEBUG:
        holds(link[0] == timer)
        holds(timer.next == NULL or timer.next.link == &timer.next)
        holds(wheel.armed > 0)
    link[0] = timer.next
    if timer.next != NULL:
        timer.next.link = link
    elif wheel.due_tail == &timer.next:
        wheel.due_tail = link
    elif link >= &wheel.bucket[0] and link <= &wheel.bucket[WHEEL_BUCKETS - 1]:
        # It was the only one of its bucket: a thread need not wake up for it any more.
        bucket = link - &wheel.bucket[0]
        wheel.occupied[bucket >> 6] &= ~(<uint64_t>1 << (bucket & 63))
    timer.next = NULL
    timer.link = NULL


cdef int64_t next_occupied(const Wheel* wheel, uint64_t tick) noexcept nogil:
    """How many ticks after `tick` the next occupied bucket comes round (0..4095), or -1."""
    cdef uint64_t start = tick & (WHEEL_BUCKETS - 1)
    cdef uint64_t word = start >> 6
    cdef uint64_t bits = wheel.occupied[word] & (~<uint64_t>0 << (start & 63))
    cdef int _step
    for _step in range(65):
        # The 65th step sees the first word again, now with the bits before `start`.
        if bits:
            return <int64_t>(((word << 6) + first_bit(bits) - start) & (WHEEL_BUCKETS - 1))
        word = (word + 1) & 63
        bits = wheel.occupied[word]
    return -1


cdef void wheel_start(Wheel* wheel, uint64_t now_ms) noexcept nogil:
    memset(wheel, 0, sizeof(Wheel))
    wheel.tick = now_ms // WHEEL_TICK_MS
    wheel.due_tail = &wheel.due


cdef void timer_set(Wheel* wheel, Timer* timer, uint64_t at_ms) noexcept nogil:
    cdef uint64_t tick = tick_of(at_ms)
    cdef uint64_t bucket
    if timer.link != NULL:
        take_out(wheel, timer)
    else:
        wheel.armed += 1
    timer.at_ms = at_ms
    if tick < wheel.tick:
        # Its bucket was served already, and would not be looked at for a whole revolution.
        put_due(wheel, timer)
        return
    bucket = tick & (WHEEL_BUCKETS - 1)
    put(&wheel.bucket[bucket], timer)
    wheel.occupied[bucket >> 6] |= <uint64_t>1 << (bucket & 63)


cdef void timer_clear(Wheel* wheel, Timer* timer) noexcept nogil:
    if timer.link != NULL:
        take_out(wheel, timer)
        wheel.armed -= 1


cdef Timer* wheel_due(Wheel* wheel, uint64_t now_ms) noexcept nogil:
    cdef uint64_t now_tick = now_ms // WHEEL_TICK_MS
    cdef Timer* timer
    cdef Timer* following
    cdef int64_t ahead
    while wheel.due == NULL and wheel.armed > 0 and wheel.tick <= now_tick:
        if now_tick - wheel.tick >= WHEEL_BUCKETS:
            # A long sleep or a stopped process: one revolution that ends now passes every bucket
            # once.
            wheel.tick = now_tick - (WHEEL_BUCKETS - 1)
        ahead = next_occupied(wheel, wheel.tick)
        if ahead < 0 or wheel.tick + <uint64_t>ahead > now_tick:
            wheel.tick = now_tick + 1
            break
        wheel.tick += <uint64_t>ahead
        timer = wheel.bucket[wheel.tick & (WHEEL_BUCKETS - 1)]
        while timer != NULL:
            following = timer.next
            # One of a later revolution stays where it is until the wheel comes round again.
            if tick_of(timer.at_ms) <= now_tick:
                take_out(wheel, timer)
                put_due(wheel, timer)
            timer = following
        wheel.tick += 1
    timer = wheel.due
    if timer != NULL:
        take_out(wheel, timer)
        wheel.armed -= 1
    return timer


cdef int64_t wheel_sleep_ms(Wheel* wheel, uint64_t now_ms) noexcept nogil:
    cdef uint64_t at_ms
    if wheel.armed == 0:
        return -1
    if wheel.due != NULL:
        return 0
    at_ms = (wheel.tick + <uint64_t>next_occupied(wheel, wheel.tick)) * WHEEL_TICK_MS
    return <int64_t>(at_ms - now_ms) if at_ms > now_ms else 0


cdef class TimerWheel:
    """A wheel with `timers` timers, named 0 .. timers - 1; every time is passed in."""

    cdef Wheel* wheel
    cdef Timer* timer
    cdef readonly int timers

    def __cinit__(self, int timers, uint64_t now_ms=0):
        self.wheel = <Wheel*>calloc(1, sizeof(Wheel))
        self.timer = <Timer*>calloc(timers, sizeof(Timer))
        if self.wheel == NULL or self.timer == NULL:
            raise MemoryError
        self.timers = timers
        wheel_start(self.wheel, now_ms)
        for i in range(timers):
            self.timer[i].kind = i

    def __dealloc__(self):
        free(self.timer)
        free(self.wheel)

    cdef Timer* at(self, int name) except NULL:
        if not 0 <= name < self.timers:
            raise IndexError(name)
        return &self.timer[name]

    def set(self, int name, uint64_t at_ms):
        timer_set(self.wheel, self.at(name), at_ms)

    def clear(self, int name):
        timer_clear(self.wheel, self.at(name))

    def due(self, uint64_t now_ms):
        cdef Timer* timer = wheel_due(self.wheel, now_ms)
        return None if timer == NULL else timer.kind

    def sleep_ms(self, uint64_t now_ms):
        return wheel_sleep_ms(self.wheel, now_ms)

    @property
    def armed(self):
        return self.wheel.armed

    def check(self):
        """Walk everything; AssertionError when an invariant does not hold."""
        cdef uint64_t found = 0
        cdef Timer** link = NULL
        cdef int bucket, at
        cdef bint marked
        for bucket in range(WHEEL_BUCKETS + 1):
            link = &self.wheel.due if bucket == WHEEL_BUCKETS else &self.wheel.bucket[bucket]
            if bucket < WHEEL_BUCKETS:
                marked = (self.wheel.occupied[bucket >> 6] >> (bucket & 63)) & 1
                if marked != (link[0] != NULL):
                    raise AssertionError(f"bit of bucket {bucket}")
            while link[0] != NULL:
                if link[0].link != link:
                    raise AssertionError(f"link of timer {link[0].kind}")
                at = <int>(tick_of(link[0].at_ms) % WHEEL_BUCKETS)
                if bucket < WHEEL_BUCKETS and at != bucket:
                    raise AssertionError(f"timer {link[0].kind} in bucket {bucket}")
                found += 1
                link = &link[0].next
        if self.wheel.due_tail != link:
            raise AssertionError("tail of the due list")
        if found != self.wheel.armed:
            raise AssertionError(f"armed {self.wheel.armed}, found {found}")


def sizes():
    """Bytes of each native struct, by name."""
    return {"Timer": sizeof(Timer), "Wheel": sizeof(Wheel)}
