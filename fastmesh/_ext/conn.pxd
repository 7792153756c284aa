"""Connections as bytes: descriptors, memory, the read area and the write queue. Knows nothing of
routes or requests.

Ownership: a Conn owns its fd, its half frame, its queue's entries. There is one way to end it:
conn_doom() puts it on the doomed list, and
whoever walks that list (relay_bury) settles what hung on it and calls conn_free(), the only place
where the fd is closed.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from .world cimport CONN_DOOMED, ENTRY_ANSWER, ENTRY_OWN, Conn, Entry, Io, Link, Notice, World, iovec

# memory: every buffer of a thread is taken and given back here, so that memory_bytes_max counts
# them all
# NULL = over the budget, or no memory
cdef void* mem_take(World* w, size_t n) noexcept nogil
cdef void* mem_grow(World* w, void* p, size_t old, size_t new) noexcept nogil
cdef void mem_give(World* w, void* p, size_t n) noexcept nogil

# reads CLOCK_MONOTONIC into now_ns and now_ms
cdef void world_clock(World* w) noexcept nogil
cdef uint32_t world_random(World* w) noexcept nogil
cdef int event_push(World* w, uint32_t kind, uint64_t a, uint64_t b, uint64_t c,
                    # 0, or -1 = ring full (nothing pushed, nothing counted)
                    const void* data, uint32_t size) noexcept nogil

# Events that must not get lost: what finds the ring full is told in a later turn, in order. The
# notice stays its owner's until it was told: a connection's (opened, gone) or a call's (answer).
cdef void notice_tell(World* w, Notice* notice) noexcept nogil
cdef void notices_retry(World* w) noexcept nogil
cdef void notices_drop(World* w) noexcept nogil
# `source`: listener or endpoint id; `role`: see Event in engine.pyi. False = no memory.
cdef bint notice_opened(World* w, Conn* c, uint64_t source, uint64_t role) noexcept nogil
cdef void notice_gone(World* w, Conn* c) noexcept nogil

# life
# owns fd from here on; NULL = no memory (fd still the caller's)
cdef Conn* conn_new(World* w, int fd, int role) noexcept nogil
# NULL = stale (or 0), and doomed ones count as stale
cdef inline Conn* conn_of(World* w, uint64_t handle) noexcept nogil:
    cdef uint32_t index = <uint32_t>handle
    cdef Conn* c
    if handle == 0 or index >= w.conns_high:
        return NULL
    c = w.conns[index]
    if c == NULL or c.generation != <uint32_t>(handle >> 32) or c.state == CONN_DOOMED:
        return NULL
    return c

cdef inline uint64_t conn_handle(const Conn* c) noexcept nogil:
    return (<uint64_t>c.generation << 32) | c.index

# Handles of another process, for a world that has none but its own first one: room for 0 .. high - 1
# with these generations (-1 = no memory), then the connections under their handles, then what nobody
# has is free.
cdef int conns_restore(World* w, const uint32_t* generations, uint32_t high) noexcept nogil
cdef Conn* conn_put(World* w, uint32_t index, int fd, int role) noexcept nogil
cdef void conns_restored(World* w) noexcept nogil
cdef void conn_doom(World* w, Conn* c, int reason, int error) noexcept nogil
cdef void conn_free(World* w, Conn* c) noexcept nogil
# makes epoll watch for exactly these events; 0, or -1 (errno set). In a frozen world: nothing.
cdef int conn_arm(World* w, Conn* c, uint32_t events) noexcept nogil
# it was not read (or written) to the end: epoll reports it once more if it is still ready
cdef void conn_look_again(World* w, Conn* c) noexcept nogil
# All of them out of epoll; each into it again, for whatever it should be watched for.
cdef void conns_freeze(World* w) noexcept nogil
cdef void conn_thaw(World* w, Conn* c) noexcept nogil
cdef void conn_hold(World* w, Conn* c, int why) noexcept nogil        # stop reading ...
# ... and read on when no reason is left
cdef void conn_release(World* w, Conn* c, int why) noexcept nogil
# its timer fires no later than that
cdef void conn_check_by(World* w, Conn* c, uint64_t at_ms) noexcept nogil

cdef inline void conn_dirty(World* w, Conn* c) noexcept nogil:
    if not c.dirty:
        c.dirty = 1
        c.dirty_next = NULL
        if w.dirty != NULL:
            w.dirty_tail.dirty_next = c
        else:
            w.dirty = c
        w.dirty_tail = c


# out: a frame joins the queue of its destination and leaves with the flush at the end of the turn
cdef Entry* queue_frame(World* w, Conn* c, uint8_t* data, uint32_t size, uint32_t room, int kind) noexcept nogil
# an entry that left another queue
cdef inline void queue_append(World* w, Conn* c, Entry* e) noexcept nogil:
    e.next = NULL
    if c.tail != NULL:
        c.tail.next = e
    else:
        c.head = e
    c.tail = e
    c.queued_bytes += e.size
    if e.kind >= ENTRY_ANSWER:
        c.own_bytes += e.size
        if e.kind == ENTRY_OWN:
            c.made_bytes += e.size
    if e.room == 0 and c.fresh == NULL:
        c.fresh = e
    conn_dirty(w, c)

cdef void queue_greeting(World* w, Conn* c, Entry* e) noexcept nogil
cdef Entry* queue_own(World* w, Conn* c, const uint8_t* data, uint32_t size) noexcept nogil
cdef void entry_free(World* w, Entry* e) noexcept nogil
# withdraw: no byte of it was written, none will be
cdef void entry_drop(World* w, Conn* c, Entry* e) noexcept nogil
# room until the end of the turn, NULL = area full
cdef uint8_t* area_take(World* w, uint32_t size) noexcept nogil
cdef bint reader_stuck(World* w, const Conn* c) noexcept nogil
# since when nothing of a standing queue was taken
cdef inline uint64_t stands_since_ms(const Conn* c) noexcept nogil:
    return c.wrote_ms if c.wrote_ms > c.blocked_ms else c.blocked_ms
cdef int flush_one(World* w, Conn* c) noexcept nogil
cdef void flush_all(World* w) noexcept nogil

cdef Io SOCKET_IO
