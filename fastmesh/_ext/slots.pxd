"""The slot table of one connection: every request that we sent on it and that is not settled yet.

The id on the wire *is* the slot: bit 31 clear | generation (15 bits, never 0) | index (16 bits), so
0 is never
used and lookup is one array access. A freed slot's generation moves on, therefore a late or doubled
answer
fails the comparison instead of reaching a stranger. Free slots are reused last in, first out
(warm); a slot
whose request expired, or whose asker left, RESTS: it keeps its place until the answer comes, the
connection
closes or REST_MS pass. Pages of 64 slots are allocated as they are needed and never move, so Slot*
is stable.

Invariants: used == IN_FLIGHT + RESTING slots; used <= capacity; every FREE slot of a page is on the
free list.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from .debug cimport FM_DEBUG, holds
from .frame cimport FrameId
from .timers cimport Timer

cdef enum:
    SLOT_PAGE = 64
    SLOT_GENERATIONS = 0x7fff   # 1..0x7fff, then 1 again
    SLOT_REST_MS = 60000

cdef enum SlotState:
    SLOT_FREE = 0
    SLOT_IN_FLIGHT = 1
    SLOT_RESTING = 2

cdef enum SlotMiss:     # why slot_find() found nobody
    MISS_NONE = 0
    MISS_UNKNOWN = 1    # no such slot, or a generation that was not the last one
    MISS_DUPLICATE = 2  # the generation just before: its request was answered already
    MISS_LATE = 3       # the slot rests (or rested) because its request expired
    MISS_CLIENT_GONE = 4  # ... or because its asker left

cdef struct Slot:
    Timer timer              # deadline while in flight, end of rest while resting
    FrameId orig             # the id that the asker used
    uint32_t free_next       # next free index + 1 (up to 65536), 0 = end (FREE only)
    uint64_t asker           # handle of the connection that asked; 0 = the mesh itself (heartbeats)
    Slot* asker_next         # all slots of one asker, so that its end finds them
    Slot** asker_link        # NULL = on no list
    Slot* order_next         # answers by order: the slot whose answer comes after this one's
    Slot* flight_next        # all slots in flight of one connection, newest first
    Slot** flight_link       # NULL = not in flight
    void* table_owner        # the connection that the request was sent on
    void* entry              # its write-queue entry while no byte of it was written, else NULL
    uint64_t received_ns     # first byte chain of the request read
    uint64_t sent_ns         # last byte handed to the kernel, 0 = not yet
    uint32_t hint            # codec's hint of the request (see FrameView.hint)
    uint32_t row             # counter row of the route
    uint32_t bytes           # size of the request frame
    uint16_t index
    uint16_t generation
    uint8_t state            # SlotState
    uint8_t rest_cause       # SlotMiss while RESTING, else MISS_NONE
    uint8_t tries            # endpoints tried so far
    uint8_t sampled          # 1 = goes to the event ring when settled
    uint16_t cluster         # cluster index the request was routed to
    uint8_t last_cause       # why the generation before this one ended; valid in every state
    uint8_t block            # REQUESTS or PUSHES: where the ledger counts it
    uint64_t trace           # sampled: a number that ties its events together
    void* delivery           # what it is besides (see world.pxd), or NULL

cdef struct SlotTable:
    Slot** pages
    uint32_t pages_made
    uint32_t pages_room
    uint32_t capacity        # in_flight_max: 16..65536; lowering it never drops what is in flight
    uint32_t used            # IN_FLIGHT + RESTING
    uint32_t resting
    uint32_t free_head       # index + 1, 0 = none
    uint16_t first_generation  # of a new page; a test hook sets it near the wrap
    Slot* order_head         # answers by order only
    Slot* order_tail

cdef void slots_start(SlotTable* table, uint32_t capacity, uint16_t first_generation) noexcept nogil
# Frees the pages. Nothing may be armed or linked any more. Returns the bytes given back.
cdef size_t slots_stop(SlotTable* table) noexcept nogil
# A free slot, IN_FLIGHT, its fields cleared; NULL = full, or no memory for a page. *grew gets bytes
# allocated (0 usually).
cdef Slot* slot_take(SlotTable* table, size_t* grew) noexcept nogil
cdef inline uint32_t slot_id(const Slot* slot) noexcept nogil:
    return <uint32_t>slot.generation << 16 | slot.index

# The occupied (in flight or resting) slot of that id, or NULL and why in *miss.
# A RESTING slot is returned with *miss = its rest_cause: the caller counts and releases it.
cdef Slot* slot_find(SlotTable* table, uint32_t id, int* miss) noexcept nogil
# IN_FLIGHT -> RESTING. The caller sets the rest timer.
cdef void slot_rest(SlotTable* table, Slot* slot, int cause) noexcept nogil
# Any occupied state -> FREE, generation moves on. The caller has cleared timer and lists. `cause`
# is what slot_find() will say of
# an answer that still comes: MISS_DUPLICATE = it was answered, MISS_LATE, MISS_CLIENT_GONE,
# MISS_NONE = its id never left.
cdef void slot_release(SlotTable* table, Slot* slot, int cause) noexcept nogil
# Walks the occupied slots: start with *cursor = 0; NULL at the end. Releasing the returned slot is
# allowed.
cdef Slot* slot_each(SlotTable* table, uint32_t* cursor) noexcept nogil
cdef inline Slot* slot_at(const SlotTable* table, uint32_t index) noexcept nogil:
    return &table.pages[index // SLOT_PAGE][index % SLOT_PAGE]

# A table as it was in another process: pages whose slots are on no list yet (False = no memory), then
# each slot once, either free (the last one given is the first to be taken) or occupied.
cdef bint slots_restore(SlotTable* table, uint32_t pages, size_t* grew) noexcept nogil
cdef void slot_restore_free(SlotTable* table, uint32_t index, uint16_t generation, uint8_t last_cause) noexcept nogil
cdef Slot* slot_restore(SlotTable* table, uint32_t index, uint16_t generation, int state, int rest_cause,
                        int last_cause) noexcept nogil

cdef inline void slot_link(Slot** head, Slot* slot) noexcept nogil:
    if FM_DEBUG:
        holds(slot.asker_link == NULL)
    slot.asker_next = head[0]
    if slot.asker_next != NULL:
        slot.asker_next.asker_link = &slot.asker_next
    slot.asker_link = head
    head[0] = slot

cdef inline void slot_unlink(Slot* slot) noexcept nogil:
    if slot.asker_link == NULL:
        return
    slot.asker_link[0] = slot.asker_next
    if slot.asker_next != NULL:
        slot.asker_next.asker_link = slot.asker_link
    slot.asker_next = NULL
    slot.asker_link = NULL

# Answers by order: push when the request is queued, pop when an answer comes. Resting slots keep
# their place; NULL = nothing asked.
cdef void slot_order_push(SlotTable* table, Slot* slot) noexcept nogil
cdef Slot* slot_order_pop(SlotTable* table) noexcept nogil

cdef inline void flight_link(Slot** head, Slot* slot) noexcept nogil:
    slot.flight_next = head[0]
    if slot.flight_next != NULL:
        slot.flight_next.flight_link = &slot.flight_next
    slot.flight_link = head
    head[0] = slot

cdef inline void flight_unlink(Slot* slot) noexcept nogil:
    if slot.flight_link == NULL:
        return
    slot.flight_link[0] = slot.flight_next
    if slot.flight_next != NULL:
        slot.flight_next.flight_link = slot.flight_link
    slot.flight_next = NULL
    slot.flight_link = NULL
