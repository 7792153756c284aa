"""The ring (contract: ring.pxd) and `RingPair`, both ends of one, for tests with one or two
threads.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from .bytes cimport memcpy, memset
from .debug cimport FM_DEBUG, holds

cdef extern from "atomics.h" nogil:
    uint64_t fm_load(const uint64_t* at)
    void fm_store(uint64_t* at, uint64_t value)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    RING_MIN = 256   # a quarter of it and a filler still fit together


cdef inline uint64_t bytes_of(uint32_t payload) noexcept nogil:
    return (sizeof(Record) + payload + 7) & ~<uint64_t>7


cdef int ring_start(Ring* ring, uint64_t size) noexcept nogil:
    memset(ring, 0, sizeof(Ring))
    if size < RING_MIN or size & (size - 1):
        return -1
    ring.data = <uint8_t*>malloc(size)
    if ring.data == NULL:
        return -1
    ring.size = size
    return 0


cdef void ring_stop(Ring* ring) noexcept nogil:
    free(ring.data)
    memset(ring, 0, sizeof(Ring))


cdef int ring_push(Ring* ring, uint32_t kind, uint64_t a, uint64_t b, uint64_t c,
                   const void* payload, uint32_t size) noexcept nogil:
    cdef uint64_t tail = ring.tail
    cdef uint64_t room
    cdef uint64_t at = tail & (ring.size - 1)
    cdef uint64_t to_end = ring.size - at
    cdef uint64_t need = bytes_of(size)
    cdef uint64_t filler = to_end if need > to_end else 0
    cdef Record* record
    if size > ring.size // 4:
        return -1
    room = ring.size - (tail - fm_load(&ring.head))
    if FM_DEBUG:
        holds(kind != 0)
        holds(room <= ring.size)
    if filler + need > room:
        return -1
    if filler:
        # There are at least 8 bytes before the end: size and kind fit, the rest of a header may
        # not.
        record = <Record*>(ring.data + at)
        record.size = 0
        record.kind = 0
        tail += filler
        at = 0
    record = <Record*>(ring.data + at)
    record.size = size
    record.kind = kind
    record.a = a
    record.b = b
    record.c = c
    if size:
        memcpy(<uint8_t*>record + sizeof(Record), payload, size)
    fm_store(&ring.tail, tail + need)
    return 0


cdef const Record* ring_peek(Ring* ring) noexcept nogil:
    cdef uint64_t head = ring.head
    cdef uint64_t tail = fm_load(&ring.tail)
    cdef const Record* record
    if head == tail:
        return NULL
    record = <const Record*>(ring.data + (head & (ring.size - 1)))
    if record.kind == 0:
        # The filler and the record behind it became visible together.
        head += ring.size - (head & (ring.size - 1))
        fm_store(&ring.head, head)
        if FM_DEBUG:
            holds(head < tail)
        record = <const Record*>ring.data
    return record


cdef void ring_pop(Ring* ring) noexcept nogil:
    cdef uint64_t head = ring.head
    cdef const Record* record = <const Record*>(ring.data + (head & (ring.size - 1)))
    if FM_DEBUG:
        holds(head < fm_load(&ring.tail))
        holds(record.kind != 0)
    fm_store(&ring.head, head + bytes_of(record.size))


cdef uint64_t mixed(uint64_t x) noexcept nogil:
    x = (x ^ (x >> 30)) * <uint64_t>0xbf58476d1ce4e5b9
    x = (x ^ (x >> 27)) * <uint64_t>0x94d049bb133111eb
    return x ^ (x >> 31)


cdef uint64_t now_ms() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000 + <uint64_t>now.tv_nsec // 1000000


cdef class RingPair:
    """Both ends of one ring. `push` and `produce` belong to one thread, the others to another."""

    cdef Ring ring

    def __cinit__(self, uint64_t size):
        if ring_start(&self.ring, size) < 0:
            raise ValueError(
                f"size: {size}; it must be a power of two from {RING_MIN} up that fits in memory"
            )

    def __dealloc__(self):
        ring_stop(&self.ring)

    def push(self, uint32_t kind, uint64_t a=0, uint64_t b=0, uint64_t c=0, bytes payload=b""):
        """False = no room, and nothing was written."""
        if kind == 0:
            raise ValueError("kind: 0 is the filler's; use any other")
        cdef uint32_t size = <uint32_t>len(payload)
        return ring_push(&self.ring, kind, a, b, c, <const char*>payload, size) == 0

    def peek(self):
        """(kind, a, b, c, payload) of the oldest record, or None."""
        cdef const Record* record = ring_peek(&self.ring)
        if record == NULL:
            return None
        payload = (<const char*>record_payload(record))[:record.size]
        return record.kind, record.a, record.b, record.c, payload

    def pop(self):
        """The oldest record, taken out, or None."""
        record = self.peek()
        if record is not None:
            ring_pop(&self.ring)
        return record

    @property
    def head(self):
        return fm_load(&self.ring.head)

    @property
    def tail(self):
        return fm_load(&self.ring.tail)

    def produce(self, uint64_t records, uint64_t seed, uint32_t payload_max, uint64_t within_ms):
        """Push numbered records with payloads that `consume` can tell right from wrong. How many
        were pushed in time.

        Runs without the GIL, yields the processor while the ring is full.
        """
        cdef uint64_t deadline_ms = now_ms() + within_ms
        cdef uint64_t number = 0
        cdef uint64_t word
        cdef uint32_t size, kind
        cdef uint8_t payload[4096]
        if payload_max >= 4096 or payload_max > self.ring.size // 4:
            raise ValueError(f"payload_max: {payload_max} is over 4095 or a quarter of the ring")
        with nogil:
            while number < records:
                word = mixed(seed + number)
                size = <uint32_t>(word % (payload_max + 1))
                memset(payload, <int>(word >> 32) & 0xff, size)
                kind = 1 + (number & 7)
                while ring_push(&self.ring, kind, number, word, ~word, payload, size) < 0:
                    if now_ms() > deadline_ms:
                        break
                    sched_yield()
                else:
                    number += 1
                    continue
                break
        return number

    def consume(self, uint64_t records, uint64_t seed, uint32_t payload_max, uint64_t within_ms):
        """(records taken, records that were not what `produce` pushes at that place)."""
        cdef uint64_t deadline_ms = now_ms() + within_ms
        cdef uint64_t number = 0
        cdef uint64_t wrong = 0
        cdef uint64_t word
        cdef const Record* record
        cdef const uint8_t* payload
        cdef uint32_t i
        cdef bint right
        with nogil:
            while number < records:
                record = ring_peek(&self.ring)
                if record == NULL:
                    if now_ms() > deadline_ms:
                        break
                    sched_yield()
                    continue
                word = mixed(seed + number)
                right = (
                    record.kind == 1 + (number & 7)
                    and record.a == number
                    and record.b == word
                    and record.c == ~word
                    and record.size == word % (payload_max + 1)
                )
                if right:
                    payload = record_payload(record)
                    for i in range(record.size):
                        if payload[i] != ((word >> 32) & 0xff):
                            right = False
                if not right:
                    wrong += 1
                ring_pop(&self.ring)
                number += 1
        return number, wrong
