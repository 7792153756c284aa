"""One producer, one consumer: how Python and an engine thread pass records without a lock.

A record is contiguous: header, payload, padding to 8 bytes; one that would wrap is preceded by a
filler. Positions only grow
(64 bits never wrap); the producer stores `tail` after the record is whole, the consumer stores
`head` when it is done with it.

Invariant: head <= tail <= head + size.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef struct Record:
    uint32_t size            # of the payload
    uint32_t kind            # 0 = filler, never seen by callers
    uint64_t a
    uint64_t b
    uint64_t c
    # payload follows

cdef struct Ring:
    uint8_t* data
    uint64_t size            # a power of two
    uint64_t pad0[6]
    uint64_t head            # consumer's
    uint64_t pad1[7]
    uint64_t tail            # producer's
    uint64_t pad2[7]

cdef int ring_start(Ring* ring, uint64_t size) noexcept nogil   # 0, or -1 = no memory
cdef void ring_stop(Ring* ring) noexcept nogil
# 0, or -1 = no room (nothing written). A payload over size/4 never fits.
cdef int ring_push(Ring* ring, uint32_t kind, uint64_t a, uint64_t b, uint64_t c,
                   const void* payload, uint32_t size) noexcept nogil
# The oldest record or NULL; it stays valid until ring_pop().
cdef const Record* ring_peek(Ring* ring) noexcept nogil
cdef void ring_pop(Ring* ring) noexcept nogil
cdef inline const uint8_t* record_payload(const Record* record) noexcept nogil:
    return <const uint8_t*>record + sizeof(Record)
