"""The slot table (contract: slots.pxd) and `Table`, the face that tests and simulations drive it
by.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from .bytes cimport memset
from .debug cimport FM_DEBUG, holds
from .timers cimport (
    Timer,
    Wheel,
    timer_clear,
    timer_set,
    wheel_due,
    wheel_sleep_ms,
    wheel_start,
)

cdef enum:
    PAGES_MAX = 1024   # 65536 slots: what a 16-bit index can name


cdef inline uint16_t generation_after(uint16_t generation) noexcept nogil:
    return 1 if generation >= SLOT_GENERATIONS else generation + 1


cdef inline void put_free(SlotTable* table, Slot* slot) noexcept nogil:
    slot.free_next = table.free_head
    table.free_head = <uint32_t>slot.index + 1


cdef inline void check_counts(const SlotTable* table) noexcept nogil:
    if FM_DEBUG:
        holds(table.resting <= table.used)
        holds(table.used <= table.pages_made * SLOT_PAGE)
        holds((table.free_head == 0) == (table.used == table.pages_made * SLOT_PAGE))


cdef bint make_page(SlotTable* table, size_t* grew) noexcept nogil:
    cdef Slot** pages
    cdef Slot* page
    cdef uint32_t room
    cdef int i
    if table.pages_made >= PAGES_MAX:
        return False
    if table.pages_made == table.pages_room:
        room = table.pages_room * 2 if table.pages_room else 4
        pages = <Slot**>realloc(table.pages, room * sizeof(Slot*))
        if pages == NULL:
            return False
        grew[0] += (room - table.pages_room) * sizeof(Slot*)
        table.pages = pages
        table.pages_room = room
    page = <Slot*>calloc(SLOT_PAGE, sizeof(Slot))
    if page == NULL:
        return False
    grew[0] += SLOT_PAGE * sizeof(Slot)
    table.pages[table.pages_made] = page
    # From the last to the first, so that the lowest index is the first to go.
    for i in range(SLOT_PAGE - 1, -1, -1):
        page[i].index = <uint16_t>(table.pages_made * SLOT_PAGE + <uint32_t>i)
        page[i].generation = table.first_generation
        put_free(table, &page[i])
    table.pages_made += 1
    return True


cdef bint slots_restore(SlotTable* table, uint32_t pages, size_t* grew) noexcept nogil:
    while table.pages_made < pages:
        if not make_page(table, grew):
            return False
    table.free_head = 0
    return True


cdef void slot_restore_free(SlotTable* table, uint32_t index, uint16_t generation, uint8_t last_cause) noexcept nogil:
    cdef Slot* slot = slot_at(table, index)
    slot.generation = generation
    slot.last_cause = last_cause
    put_free(table, slot)


cdef Slot* slot_restore(SlotTable* table, uint32_t index, uint16_t generation, int state, int rest_cause,
                        int last_cause) noexcept nogil:
    cdef Slot* slot = slot_at(table, index)
    slot.free_next = 0
    slot.generation = generation
    slot.state = <uint8_t>state
    slot.rest_cause = <uint8_t>rest_cause
    slot.last_cause = <uint8_t>last_cause
    table.used += 1
    if state == SLOT_RESTING:
        table.resting += 1
    return slot


cdef void slots_start(
    SlotTable* table, uint32_t capacity, uint16_t first_generation
) noexcept nogil:
    memset(table, 0, sizeof(SlotTable))
    table.capacity = capacity
    # 0 would allow an id of 0, and anything over 15 bits would set bit 31.
    table.first_generation = first_generation if 1 <= first_generation <= SLOT_GENERATIONS else 1


cdef size_t slots_stop(SlotTable* table) noexcept nogil:
    cdef size_t given_back = (
        table.pages_made * SLOT_PAGE * sizeof(Slot) + table.pages_room * sizeof(Slot*)
    )
    cdef uint32_t i
    for i in range(table.pages_made):
        free(table.pages[i])
    free(table.pages)
    memset(table, 0, sizeof(SlotTable))
    return given_back


cdef Slot* slot_take(SlotTable* table, size_t* grew) noexcept nogil:
    cdef Slot* slot
    cdef uint16_t index
    cdef uint16_t generation
    cdef uint8_t last_cause
    grew[0] = 0
    if table.used >= table.capacity:
        return NULL
    if table.free_head == 0 and not make_page(table, grew):
        return NULL
    slot = slot_at(table, table.free_head - 1)
    if FM_DEBUG:
        holds(slot.state == SLOT_FREE)
        holds(slot.timer.link == NULL)
        holds(slot.asker_link == NULL)
    table.free_head = slot.free_next
    index, generation, last_cause = slot.index, slot.generation, slot.last_cause
    memset(slot, 0, sizeof(Slot))
    slot.index, slot.generation, slot.last_cause = index, generation, last_cause
    slot.state = SLOT_IN_FLIGHT
    table.used += 1
    check_counts(table)
    return slot


cdef Slot* slot_find(SlotTable* table, uint32_t id, int* miss) noexcept nogil:
    cdef uint32_t index = id & 0xffff
    cdef uint32_t generation = id >> 16
    cdef Slot* slot
    if index >= table.pages_made * SLOT_PAGE:
        miss[0] = MISS_UNKNOWN
        return NULL
    slot = slot_at(table, index)
    if generation == slot.generation and slot.state != SLOT_FREE:
        miss[0] = slot.rest_cause
        return slot
    # With bit 31 set, or with generation 0, it is no id of ours, whatever follows it.
    if (
        1 <= generation <= SLOT_GENERATIONS
        and generation_after(<uint16_t>generation) == slot.generation
    ):
        miss[0] = slot.last_cause if slot.last_cause != MISS_NONE else MISS_UNKNOWN
    else:
        miss[0] = MISS_UNKNOWN
    return NULL


cdef void slot_rest(SlotTable* table, Slot* slot, int cause) noexcept nogil:
    if FM_DEBUG:
        holds(slot.state == SLOT_IN_FLIGHT)
        holds(cause == MISS_LATE or cause == MISS_CLIENT_GONE)
    slot.state = SLOT_RESTING
    slot.rest_cause = <uint8_t>cause
    table.resting += 1
    check_counts(table)


cdef void slot_release(SlotTable* table, Slot* slot, int cause) noexcept nogil:
    if FM_DEBUG:
        holds(slot.state != SLOT_FREE)
        holds(slot.timer.link == NULL)
        holds(slot.asker_link == NULL)
        holds(slot.order_next == NULL)
        holds(table.order_tail != slot)
    if slot.state == SLOT_RESTING:
        table.resting -= 1
    table.used -= 1
    slot.state = SLOT_FREE
    slot.rest_cause = MISS_NONE
    slot.last_cause = <uint8_t>cause
    slot.generation = generation_after(slot.generation)
    put_free(table, slot)
    check_counts(table)


cdef Slot* slot_each(SlotTable* table, uint32_t* cursor) noexcept nogil:
    cdef Slot* slot
    while cursor[0] < table.pages_made * SLOT_PAGE:
        slot = slot_at(table, cursor[0])
        cursor[0] += 1
        if slot.state != SLOT_FREE:
            return slot
    return NULL


cdef void slot_order_push(SlotTable* table, Slot* slot) noexcept nogil:
    slot.order_next = NULL
    if table.order_tail != NULL:
        table.order_tail.order_next = slot
    else:
        table.order_head = slot
    table.order_tail = slot


cdef Slot* slot_order_pop(SlotTable* table) noexcept nogil:
    cdef Slot* slot = table.order_head
    if slot != NULL:
        table.order_head = slot.order_next
        if table.order_head == NULL:
            table.order_tail = NULL
        slot.order_next = NULL
    return slot


cdef enum:
    FACE_ASKERS = 256

MISSES = ("none", "unknown", "duplicate", "late", "client_gone")
GENERATIONS = SLOT_GENERATIONS
REST_MS = SLOT_REST_MS


cdef class Table:
    """A slot table with a timer wheel and up to 256 askers; every time is passed in.

    Causes and misses go by their names in MISSES. A method that names a slot by an id of nobody
    raises KeyError.
    """

    cdef SlotTable table
    cdef Wheel* wheel
    cdef Slot* heads[FACE_ASKERS]
    cdef readonly size_t bytes   # allocated for pages so far

    def __cinit__(self, uint32_t capacity, uint16_t first_generation=1, uint64_t now_ms=0):
        slots_start(&self.table, capacity, first_generation)
        memset(self.heads, 0, sizeof(self.heads))
        self.bytes = 0
        self.wheel = <Wheel*>malloc(sizeof(Wheel))
        if self.wheel == NULL:
            raise MemoryError
        wheel_start(self.wheel, now_ms)

    def __dealloc__(self):
        slots_stop(&self.table)
        free(self.wheel)

    cdef Slot* named(self, uint32_t id) except NULL:
        cdef int miss
        cdef Slot* slot = slot_find(&self.table, id, &miss)
        if slot == NULL:
            raise KeyError(id)
        return slot

    def take(self, uint32_t orig, int asker, uint64_t deadline_ms):
        """The id of a new slot in flight, or None."""
        cdef size_t grew
        if not 0 <= asker < FACE_ASKERS:
            raise IndexError(asker)
        cdef Slot* slot = slot_take(&self.table, &grew)
        self.bytes += grew
        if slot == NULL:
            return None
        slot.orig.number = orig
        slot.asker = <uint64_t>asker
        slot_link(&self.heads[asker], slot)
        timer_set(self.wheel, &slot.timer, deadline_ms)
        slot.timer.owner = slot
        return slot_id(slot)

    def find(self, uint32_t id):
        """(orig, asker, miss) of an occupied slot, or (None, None, miss)."""
        cdef int miss
        cdef Slot* slot = slot_find(&self.table, id, &miss)
        if slot == NULL:
            return None, None, MISSES[miss]
        return slot.orig.number, slot.asker, MISSES[miss]

    def rest(self, uint32_t id, str cause, uint64_t until_ms):
        cdef Slot* slot = self.named(id)
        if slot.state != SLOT_IN_FLIGHT:
            raise ValueError(f"{id} rests already")
        slot_unlink(slot)
        slot_rest(&self.table, slot, MISSES.index(cause))
        timer_set(self.wheel, &slot.timer, until_ms)

    def release(self, uint32_t id, str cause):
        cdef Slot* slot = self.named(id)
        timer_clear(self.wheel, &slot.timer)
        slot_unlink(slot)
        slot_release(&self.table, slot, MISSES.index(cause))

    def due(self, uint64_t now_ms):
        """(id, resting) of the slot whose timer is due, or None. Its timer is off then."""
        cdef Timer* timer = wheel_due(self.wheel, now_ms)
        cdef Slot* slot
        if timer == NULL:
            return None
        slot = <Slot*>timer.owner
        return slot_id(slot), slot.state == SLOT_RESTING

    def sleep_ms(self, uint64_t now_ms):
        return wheel_sleep_ms(self.wheel, now_ms)

    def order_push(self, uint32_t id):
        slot_order_push(&self.table, self.named(id))

    def order_pop(self):
        cdef Slot* slot = slot_order_pop(&self.table)
        return None if slot == NULL else slot_id(slot)

    def ids(self):
        """Ids of all occupied slots, by index."""
        cdef uint32_t cursor = 0
        cdef Slot* slot
        found = []
        while True:
            slot = slot_each(&self.table, &cursor)
            if slot == NULL:
                return found
            found.append(slot_id(slot))

    def of_asker(self, int asker):
        """Ids of the slots of one asker that are in flight, youngest first."""
        if not 0 <= asker < FACE_ASKERS:
            raise IndexError(asker)
        cdef Slot* slot = self.heads[asker]
        found = []
        while slot != NULL:
            found.append(slot_id(slot))
            slot = slot.asker_next
        return found

    def close(self):
        """Release everything while walking, as the end of a connection does. The ids that were
        occupied.
        """
        cdef uint32_t cursor = 0
        cdef Slot* slot
        closed = []
        while slot_order_pop(&self.table) != NULL:
            pass
        while True:
            slot = slot_each(&self.table, &cursor)
            if slot == NULL:
                return closed
            closed.append(slot_id(slot))
            timer_clear(self.wheel, &slot.timer)
            slot_unlink(slot)
            slot_release(&self.table, slot, MISS_UNKNOWN)

    def stop(self):
        """Give the pages back. Returns the bytes; the table is empty and has no capacity
        afterwards.
        """
        self.close()
        return slots_stop(&self.table)

    @property
    def used(self):
        return self.table.used

    @property
    def resting(self):
        return self.table.resting

    @property
    def armed(self):
        return self.wheel.armed

    @property
    def pages(self):
        return self.table.pages_made

    @property
    def capacity(self):
        return self.table.capacity

    @capacity.setter
    def capacity(self, uint32_t capacity):
        self.table.capacity = capacity

    def check(self):
        """Walk everything; AssertionError when an invariant does not hold."""
        cdef uint32_t index
        cdef uint32_t head = self.table.free_head
        cdef uint32_t counted[3]
        cdef uint32_t on_list = 0
        cdef Slot* slot
        memset(counted, 0, sizeof(counted))
        for index in range(self.table.pages_made * SLOT_PAGE):
            slot = slot_at(&self.table, index)
            if slot.index != index or not 1 <= slot.generation <= SLOT_GENERATIONS:
                raise AssertionError(f"slot {index}: {slot.index}, generation {slot.generation}")
            if slot.state == SLOT_FREE and (slot.timer.link != NULL or slot.asker_link != NULL):
                raise AssertionError(f"slot {index} is free and still linked")
            counted[slot.state] += 1
        while head != 0:
            slot = slot_at(&self.table, head - 1)
            on_list += 1
            if slot.state != SLOT_FREE or on_list > counted[<int>SLOT_FREE]:
                raise AssertionError(f"slot {head - 1} on the free list")
            head = slot.free_next
        if on_list != counted[<int>SLOT_FREE]:
            raise AssertionError(f"{counted[<int>SLOT_FREE]} slots are free, {on_list} on the list")
        resting = counted[<int>SLOT_RESTING]
        if self.table.resting != resting:
            raise AssertionError(f"resting {self.table.resting}, found {resting}")
        if self.table.used != resting + counted[<int>SLOT_IN_FLIGHT]:
            raise AssertionError(f"used {self.table.used}")


def sizes():
    """Bytes of each native struct, by name."""
    return {"Slot": sizeof(Slot), "SlotTable": sizeof(SlotTable), "page": SLOT_PAGE * sizeof(Slot)}


cdef double now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec * 1e9 + now.tv_nsec


def bench(uint64_t rounds, uint32_t depth):
    """Nanoseconds of one request's life with `depth` others in flight: take, arm, link, find,
    clear, unlink, release.
    """
    cdef SlotTable table
    cdef Wheel* wheel = <Wheel*>malloc(sizeof(Wheel))
    cdef uint32_t* ids = <uint32_t*>calloc(depth + 1, sizeof(uint32_t))
    cdef Slot* asked = NULL
    cdef Slot* slot
    cdef size_t grew
    cdef int miss
    cdef uint64_t round = 0, now_ms = 1000
    cdef uint32_t at = 0
    cdef double began, ended
    if wheel == NULL or ids == NULL:
        free(wheel)
        free(ids)
        raise MemoryError
    if depth >= PAGES_MAX * SLOT_PAGE:
        free(wheel)
        free(ids)
        raise ValueError(f"depth: {depth} does not fit a table of {PAGES_MAX * SLOT_PAGE}")
    with nogil:
        slots_start(&table, PAGES_MAX * SLOT_PAGE, 1)
        wheel_start(wheel, now_ms)
        began = now_ns()
        for round in range(rounds + depth):
            if round == depth:
                began = now_ns()
            slot = slot_take(&table, &grew)
            if slot == NULL:
                break
            slot_link(&asked, slot)
            timer_set(wheel, &slot.timer, now_ms + 3000 + (round & 1023))
            ids[at] = slot_id(slot)
            # The oldest of depth + 1 is answered, as an upstream that works in order would.
            at = 0 if at == depth else at + 1
            if round < depth:
                continue
            slot = slot_find(&table, ids[at], &miss)
            if slot == NULL or miss != MISS_NONE:
                break
            timer_clear(wheel, &slot.timer)
            slot_unlink(slot)
            slot_release(&table, slot, MISS_DUPLICATE)
        ended = now_ns()
        slots_stop(&table)
    free(wheel)
    free(ids)
    if round + 1 < rounds + depth:
        raise MemoryError
    return (ended - began) / rounds if rounds else 0.0
