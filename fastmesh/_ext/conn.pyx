# cython: language_level=3
"""Connections as bytes (contract: conn.pxd)."""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport free, malloc, realloc
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from .bytes cimport memcpy, memset
from .counters cimport (
    C_BYTES_OUT,
    C_ONEWAY_DROPPED,
    C_ONEWAY_FORWARDED,
    CLOSED_BY_PEER,
    CLOSED_IO_ERROR,
    CLOSED_MEMORY,
    CLOSED_SLOW_CONSUMER,
    HOP_MESH,
    HOP_QUEUE,
    P_ALLOC_REFUSED,
    P_MEMORY,
    P_MEMORY_MAX,
    P_SLOW_CONSUMERS,
    P_WRITE_BYTES,
    P_WRITES,
    hop_record,
    row_of,
)
from .ring cimport ring_push
from .route cimport KIND_BROKER
from .slots cimport slots_stop
from .timers cimport timer_clear, timer_set
from .world cimport (
    AREA_BYTES,
    CONN_CONNECTING,
    CONN_DOOMED,
    COPY_BYTES,
    ENTRY_ANSWER,
    ENTRY_OWN,
    ENTRY_ONEWAY,
    ENTRY_REQUEST,
    EVENT_ANSWER,
    EVENT_GONE,
    EVENT_OPENED,
    FLOW_OPEN,
    FLUSH_BYTES,
    HOLD_EOF,
    HOLD_QUOTA,
    HOLD_SLOW_READER,
    IOVECS,
    ROLE_DOWNSTREAM,
    ROLE_UPSTREAM,
    ROLE_WAKE,
    STAGE_BYTES,
    TIMER_CONN,
    Conn,
    Delivery,
    Entry,
    Link,
    Notice,
    World,
    iovec,
)

cdef extern from "<time.h>" nogil:
    ctypedef long time_t
    struct timespec:
        time_t tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec* ts)
    int CLOCK_MONOTONIC

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        void* msg_name
        unsigned int msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags
    int c_shutdown "shutdown"(int fd, int how)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    int SHUT_WR

# The C library's own wrappers are points where a thread may be cancelled, and pay for it in every
# call; nobody cancels ours. Each returns >= 0 or -errno.
cdef extern from "syscalls.h" nogil:
    int64_t sys_recv(int fd, void* buf, size_t n, int flags)
    int64_t sys_send(int fd, const void* buf, size_t n, int flags)
    int64_t sys_recvmsg(int fd, msghdr* msg, int flags)
    int64_t sys_sendmsg(int fd, const msghdr* msg, int flags)

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int EPOLL_CLOEXEC
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int EPOLL_CTL_ADD
    int EPOLL_CTL_DEL
    int EPOLL_CTL_MOD
    uint32_t EPOLLIN
    uint32_t EPOLLOUT
    uint32_t EPOLLPRI
    uint32_t EPOLLRDHUP
    uint32_t EPOLLET

cdef extern from "atomics.h" nogil:
    bint likely "fm_likely"(bint x)
    bint unlikely "fm_unlikely"(bint x)

cdef enum:
    ENTRIES_KEPT = 4096      # spare write-queue entries that a thread keeps: a turn's worth
    STUCK_MS = 500           # a client over its cap that took nothing for this long does not read
    UPSTREAM_STUCK_MS = 5000
    OVER_CAP = 4             # this many times its cap is too much, however fast it reads
    # sends to one destination in one turn, so that a long queue does not hold up the rest
    FLUSHES_PER_TURN = 4


# === memory =======================================================================================

cdef void* mem_take(World* w, size_t n) noexcept nogil:
    cdef void* p
    if unlikely(w.budget.fail_at != 0):
        w.budget.fail_at -= 1
        if w.budget.fail_at == 0:
            w.counters.p[P_ALLOC_REFUSED] += 1
            return NULL
    if unlikely(w.budget.used + n > w.budget.max):
        w.counters.p[P_ALLOC_REFUSED] += 1
        return NULL
    p = malloc(n)
    if unlikely(p == NULL):
        w.counters.p[P_ALLOC_REFUSED] += 1
        return NULL
    w.budget.used += n
    w.counters.p[P_MEMORY] = w.budget.used
    if w.budget.used > w.counters.p[P_MEMORY_MAX]:
        w.counters.p[P_MEMORY_MAX] = w.budget.used
    return p


cdef void* mem_grow(World* w, void* p, size_t old, size_t new) noexcept nogil:
    cdef void* q
    if p == NULL:
        return mem_take(w, new)
    if unlikely(w.budget.fail_at != 0):
        w.budget.fail_at -= 1
        if w.budget.fail_at == 0:
            w.counters.p[P_ALLOC_REFUSED] += 1
            return NULL
    if unlikely(w.budget.used - old + new > w.budget.max):
        w.counters.p[P_ALLOC_REFUSED] += 1
        return NULL
    q = realloc(p, new)
    if unlikely(q == NULL):
        w.counters.p[P_ALLOC_REFUSED] += 1
        return NULL
    w.budget.used = w.budget.used - old + new
    w.counters.p[P_MEMORY] = w.budget.used
    if w.budget.used > w.counters.p[P_MEMORY_MAX]:
        w.counters.p[P_MEMORY_MAX] = w.budget.used
    return q


cdef void mem_give(World* w, void* p, size_t n) noexcept nogil:
    if p != NULL:
        free(p)
        w.budget.used -= n
        w.counters.p[P_MEMORY] = w.budget.used


cdef uint8_t* area_take(World* w, uint32_t size) noexcept nogil:
    cdef uint8_t* p
    if unlikely(w.area_used + size > AREA_BYTES):
        return NULL
    p = w.area + w.area_used
    w.area_used += size
    return p


# === time, chance, events =========================================================================

cdef void world_clock(World* w) noexcept nogil:
    cdef timespec ts
    clock_gettime(CLOCK_MONOTONIC, &ts)
    w.now_ns = <uint64_t>ts.tv_sec * 1000000000 + <uint64_t>ts.tv_nsec
    w.now_ms = w.now_ns // 1000000


cdef uint32_t world_random(World* w) noexcept nogil:
    # xorshift64*: fair dice for load balancing and jitter, not for secrets
    w.random ^= w.random >> 12
    w.random ^= w.random << 25
    w.random ^= w.random >> 27
    return <uint32_t>((w.random * <uint64_t>2685821657736338717) >> 32)


cdef int event_push(World* w, uint32_t kind, uint64_t a, uint64_t b, uint64_t c,
                    const void* data, uint32_t size) noexcept nogil:
    if w.released or ring_push(&w.events, kind, a, b, c, data, size) != 0:
        return -1
    w.notify_due = 1
    return 0


cdef void notice_tell(World* w, Notice* n) noexcept nogil:
    if w.untold == NULL and event_push(w, n.kind, n.a, n.b, n.c, NULL, 0) == 0:
        return
    n.waiting = 1
    n.next = NULL
    if w.untold == NULL:
        w.untold = n
    else:
        w.untold_tail[0] = n
    w.untold_tail = &n.next


cdef void notices_retry(World* w) noexcept nogil:
    cdef Notice* n
    while w.untold != NULL:
        n = w.untold
        if event_push(w, n.kind, n.a, n.b, n.c, NULL, 0) != 0:
            return
        w.untold = n.next
        n.waiting = 0
        if n.kind == EVENT_ANSWER:
            mem_give(w, n, sizeof(Delivery))    # which begins with its notice
        elif n.kind == EVENT_GONE:
            mem_give(w, n, sizeof(Notice))


cdef bint notice_opened(World* w, Conn* c, uint64_t source, uint64_t role) noexcept nogil:
    c.notice = <Notice*>mem_take(w, sizeof(Notice))
    if c.notice == NULL:
        return False
    memset(c.notice, 0, sizeof(Notice))
    c.notice.kind = EVENT_OPENED
    c.notice.a = conn_handle(c)
    c.notice.b = source
    c.notice.c = role
    notice_tell(w, c.notice)
    return True


cdef void notice_gone(World* w, Conn* c) noexcept nogil:
    cdef Notice* n = c.notice
    cdef Notice** link = &w.untold
    if n == NULL:
        return
    c.notice = NULL
    if not n.waiting:
        n.kind = EVENT_GONE
        notice_tell(w, n)
        if not n.waiting:
            mem_give(w, n, sizeof(Notice))
        return
    # Python never heard of it: then it need not hear of its end.
    while link[0] != n:
        link = &link[0].next
    link[0] = n.next
    if n.next == NULL:
        w.untold_tail = link
    mem_give(w, n, sizeof(Notice))


cdef void notices_drop(World* w) noexcept nogil:
    cdef Notice* n
    while w.untold != NULL:
        n = w.untold
        w.untold = n.next
        mem_give(w, n, sizeof(Delivery) if n.kind == EVENT_ANSWER else sizeof(Notice))


# === life =========================================================================================


cdef int grow_conns(World* w) noexcept nogil:
    cdef uint32_t room = w.conns_room * 2 if w.conns_room else 256
    cdef Conn** conns = <Conn**>mem_grow(w, w.conns, w.conns_room * sizeof(Conn*), room * sizeof(Conn*))
    cdef uint32_t* numbers
    if conns == NULL:
        return -1
    w.conns = conns
    numbers = <uint32_t*>mem_grow(w, w.generations, w.conns_room * 4, room * 4)
    if numbers == NULL:
        # the longer `conns` stays: conns_room says how much of it is in use, the books must agree
        # with the block
        w.budget.used -= (room - w.conns_room) * sizeof(Conn*)
        return -1
    w.generations = numbers
    numbers = <uint32_t*>mem_grow(w, w.free_indices, w.conns_room * 4, room * 4)
    if numbers == NULL:
        w.budget.used -= (room - w.conns_room) * (sizeof(Conn*) + 4)
        return -1
    w.free_indices = numbers
    memset(w.conns + w.conns_room, 0, (room - w.conns_room) * sizeof(Conn*))
    memset(w.generations + w.conns_room, 0, (room - w.conns_room) * 4)
    w.conns_room = room
    return 0


cdef Conn* conn_at(World* w, Conn* c, uint32_t index, int fd, int role) noexcept nogil:
    memset(c, 0, sizeof(Conn))
    w.generations[index] += 1
    if w.generations[index] == 0:
        w.generations[index] = 1
    w.conns[index] = c
    c.fd = fd
    c.index = index
    c.generation = w.generations[index]
    c.role = <uint8_t>role
    c.io = &SOCKET_IO
    c.opened_ms = c.read_ms = c.wrote_ms = w.now_ms
    c.timer.owner = c
    c.timer.kind = TIMER_CONN
    return c


cdef Conn* conn_new(World* w, int fd, int role) noexcept nogil:
    cdef Conn* c
    cdef uint32_t index
    if w.free_count == 0 and w.conns_high == w.conns_room and grow_conns(w) != 0:
        return NULL
    c = <Conn*>mem_take(w, sizeof(Conn))
    if c == NULL:
        return NULL
    if w.free_count:
        w.free_count -= 1
        index = w.free_indices[w.free_count]
    else:
        index = w.conns_high
        w.conns_high += 1
    return conn_at(w, c, index, fd, role)


cdef int conns_restore(World* w, const uint32_t* generations, uint32_t high) noexcept nogil:
    cdef uint32_t i
    while w.conns_room < high:
        if grow_conns(w) != 0:
            return -1
    for i in range(w.conns_high, high):
        w.generations[i] = generations[i]
    w.conns_high = high
    return 0


cdef void conns_restored(World* w) noexcept nogil:
    cdef uint32_t i
    w.free_count = 0
    # from the last to the first, so that the lowest is the first to go
    for i in range(w.conns_high - 1, 0, -1):
        if w.conns[i] == NULL:
            w.free_indices[w.free_count] = i
            w.free_count += 1


cdef Conn* conn_put(World* w, uint32_t index, int fd, int role) noexcept nogil:
    cdef Conn* c = <Conn*>mem_take(w, sizeof(Conn))
    if c == NULL:
        return NULL
    w.generations[index] -= 1       # conn_at() moves on to what it was
    return conn_at(w, c, index, fd, role)


cdef int conn_arm(World* w, Conn* c, uint32_t events) noexcept nogil:
    """Connections are watched by edges: epoll says once that bytes came, and does not poll every ready
    socket a second time at the next wait. What makes that sound: a recv that fills less than it was
    offered has taken all there was when the event was reported, and what comes later is another event;
    whoever stops before that calls conn_look_again(); and each change of what is watched makes the
    kernel look at the socket anew.
    """
    cdef epoll_event ev
    cdef int op
    ev.events = events
    if c.role == ROLE_DOWNSTREAM or c.role == ROLE_UPSTREAM:
        ev.events |= EPOLLET
        if events & EPOLLIN:
            # where a recv may be short and yet not the last: the end of the stream, an urgent byte
            ev.events |= EPOLLRDHUP | EPOLLPRI
    ev.data.u64 = conn_handle(c)
    if w.frozen:
        return 0
    # `armed` keeps a bit of its own for "registered", because a held connection is registered for
    # nothing
    op = EPOLL_CTL_MOD if c.armed != 0 else EPOLL_CTL_ADD
    if epoll_ctl(w.epfd, op, c.fd, &ev) != 0:
        return -1
    c.armed = events | REGISTERED
    return 0


cdef enum:
    REGISTERED = 1 << 27     # no epoll flag uses this bit


cdef void rearm(World* w, Conn* c) noexcept nogil:
    cdef uint32_t events = 0
    if c.state == CONN_DOOMED:
        return
    if c.state == CONN_CONNECTING:
        events = EPOLLOUT
    else:
        if c.hold == 0:
            events |= EPOLLIN
        if c.blocked:
            events |= EPOLLOUT
    if (events | REGISTERED) != c.armed:
        if conn_arm(w, c, events) != 0:
            conn_doom(w, c, CLOSED_IO_ERROR, errno)


cdef void conn_look_again(World* w, Conn* c) noexcept nogil:
    c.armed = REGISTERED     # whatever is watched: it is said anew
    rearm(w, c)


cdef bint watch_anew(World* w) noexcept nogil:
    """Another epoll instance, which watches nothing but the wake-up. Nobody waits on the old one any
    more; closing it takes everything out at once, and can wait until the pause is over. False = no
    descriptor for it."""
    cdef int epfd = epoll_create1(EPOLL_CLOEXEC)
    cdef epoll_event ev
    if epfd < 0:
        return False
    ev.events = EPOLLIN
    ev.data.u64 = conn_handle(w.conns[0])       # the world's first: see world_start()
    if epoll_ctl(epfd, EPOLL_CTL_ADD, w.wake_fd, &ev) != 0:
        close(epfd)
        return False
    w.left_epfd = w.epfd
    w.epfd = epfd
    return True


cdef void conns_freeze(World* w) noexcept nogil:
    cdef epoll_event ev
    cdef Conn* c
    cdef uint32_t i
    cdef bint out = watch_anew(w)
    for i in range(w.conns_high):
        c = w.conns[i]
        if c != NULL and c.role != ROLE_WAKE:
            if c.armed and not out:
                epoll_ctl(w.epfd, EPOLL_CTL_DEL, c.fd, &ev)
            c.armed = 0


cdef void conn_thaw(World* w, Conn* c) noexcept nogil:
    c.armed = 0
    rearm(w, c)
    # What was queued meanwhile leaves, and whoever only waited for its last answers may go.
    if c.head != NULL or c.hold & (HOLD_EOF | HOLD_SLOW_READER):
        conn_dirty(w, c)


cdef void conn_hold(World* w, Conn* c, int why) noexcept nogil:
    if c.hold & why:
        return
    c.hold |= <uint8_t>why
    rearm(w, c)


cdef void conn_release(World* w, Conn* c, int why) noexcept nogil:
    if not (c.hold & why):
        return
    c.hold &= <uint8_t>(~why & 0xff)
    if c.state == CONN_DOOMED:
        return
    if c.hold == 0 and c.frame_began_ms:
        c.frame_began_ms = w.now_ms   # it could not go on while we did not read
        if w.snapshot.limits.frame_timeout_ms:
            conn_check_by(w, c, w.now_ms + w.snapshot.limits.frame_timeout_ms)
    if c.part_ready and not c.resuming:
        c.resuming = 1
        c.resume_next = w.resume
        w.resume = c
    rearm(w, c)


cdef void conn_check_by(World* w, Conn* c, uint64_t at_ms) noexcept nogil:
    if at_ms != ~(<uint64_t>0) and (c.timer.link == NULL or c.timer.at_ms > at_ms):
        timer_set(&w.wheel, &c.timer, at_ms)


cdef void conn_doom(World* w, Conn* c, int reason, int error) noexcept nogil:
    cdef epoll_event ev
    if c.state == CONN_DOOMED:
        return
    c.state = CONN_DOOMED
    c.close_reason = <uint8_t>reason
    c.close_errno = error
    c.doomed_next = w.doomed
    w.doomed = c
    # Out of epoll before anything else: a descriptor that has a duplicate elsewhere would go on
    # firing after close().
    if c.armed:
        epoll_ctl(w.epfd, EPOLL_CTL_DEL, c.fd, &ev)
        c.armed = 0
    timer_clear(&w.wheel, &c.timer)


cdef void leave_lists(World* w, Conn* c) noexcept nogil:
    cdef Conn** link
    cdef Conn* before = NULL
    if c.dirty:
        link = &w.dirty
        while link[0] != c:
            before = link[0]
            link = &before.dirty_next
        link[0] = c.dirty_next
        if w.dirty_tail == c:
            w.dirty_tail = before
    if c.resuming:
        link = &w.resume
        while link[0] != c:
            link = &link[0].resume_next
        link[0] = c.resume_next


cdef void conn_free(World* w, Conn* c) noexcept nogil:
    """The only place where a connection's descriptor is closed. Nothing may point at `c` any more
    but its handle, which turns stale."""
    cdef Entry* e = c.head
    cdef Entry* after
    cdef size_t pages
    while e != NULL:
        after = e.next
        entry_free(w, e)
        e = after
    if c.part != NULL:
        mem_give(w, c.part, c.part_room)
    if c.codec_state != NULL:
        mem_give(w, c.codec_state, c.codec.state_bytes)
    pages = slots_stop(&c.sent)
    w.budget.used -= pages
    w.counters.p[P_MEMORY] = w.budget.used
    timer_clear(&w.wheel, &c.timer)
    leave_lists(w, c)
    close(c.fd)
    w.conns[c.index] = NULL
    w.free_indices[w.free_count] = c.index
    w.free_count += 1
    mem_give(w, c, sizeof(Conn))


# === out ==========================================================================================


cdef Entry* queue_frame(World* w, Conn* c, uint8_t* data, uint32_t size, uint32_t room, int kind) noexcept nogil:
    """Append a frame; with `room` the queue owns the block at `data`. NULL = no memory (the block
    stays the caller's)."""
    cdef Entry* e = w.free_entries
    if likely(e != NULL):
        w.free_entries = e.next
        w.free_entries_count -= 1
    else:
        e = <Entry*>mem_take(w, sizeof(Entry))
        if unlikely(e == NULL):
            return NULL
    memset(e, 0, sizeof(Entry))
    e.data = data
    e.size = size
    e.room = room
    e.kind = <uint8_t>kind
    queue_append(w, c, e)
    return e


cdef Entry* queue_own(World* w, Conn* c, const uint8_t* data, uint32_t size) noexcept nogil:
    """Append a copy of a small frame that the mesh made."""
    cdef uint8_t* p = area_take(w, size)
    cdef uint32_t room = 0
    cdef Entry* e
    if p == NULL:
        p = <uint8_t*>mem_take(w, size)
        if p == NULL:
            return NULL
        room = size
    memcpy(p, data, size)
    e = queue_frame(w, c, p, size, room, ENTRY_OWN)
    if e == NULL and room:
        mem_give(w, p, room)
    return e


cdef void queue_greeting(World* w, Conn* c, Entry* e) noexcept nogil:
    """The last frame of the queue, our hello, goes to its front: to a broker nothing has left yet,
    because publishes that came while it connected wait for this."""
    cdef Entry* before = c.head
    c.greeted = 1
    if before != e:
        while before.next != e:
            before = before.next
        before.next = NULL
        c.tail = before
        e.next = c.head
        c.head = e
        c.fresh = e         # (what is behind it and in memory of its own is looked at in vain)
    conn_dirty(w, c)


cdef void link_settle(World* w, Entry* e) noexcept nogil:
    """The bytes of an entry leave their client's quota; a paused client whose queue drained reads
    on."""
    cdef Link* link = e.link
    cdef uint64_t low
    if link == NULL:
        return
    e.link = NULL
    link.entries -= 1
    link.queued_bytes -= e.size
    if link.client == NULL:
        if link.entries == 0:
            mem_give(w, link, sizeof(Link))
        return
    if link.flow != FLOW_OPEN:
        low = w.snapshot.limits.queue_bytes_max // 2
        if link.queued_bytes <= low:
            link.flow = FLOW_OPEN
            if link.client.state != CONN_DOOMED:
                conn_release(w, link.client, HOLD_QUOTA)


cdef void entry_free(World* w, Entry* e) noexcept nogil:
    link_settle(w, e)
    if e.room:
        mem_give(w, e.data, e.room)
    if w.free_entries_count < ENTRIES_KEPT:
        e.next = w.free_entries
        w.free_entries = e
        w.free_entries_count += 1
    else:
        mem_give(w, e, sizeof(Entry))


cdef inline void uncount(Conn* c, const Entry* e) noexcept nogil:
    if e.kind >= ENTRY_ANSWER:
        c.own_bytes -= e.size
        if e.kind == ENTRY_OWN:
            c.made_bytes -= e.size


cdef void entry_drop(World* w, Conn* c, Entry* e) noexcept nogil:
    c.queued_bytes -= e.size
    uncount(c, e)
    link_settle(w, e)
    if e.room:
        mem_give(w, e.data, e.room)
        e.room = 0
    e.data = NULL
    e.size = 0
    e.slot = NULL
    e.dropped = 1


cdef void entry_done(World* w, Conn* c, Entry* e) noexcept nogil:
    """Its last byte is in the kernel's hands."""
    if e.kind == ENTRY_REQUEST:
        if e.slot != NULL:
            e.slot.sent_ns = w.now_ns
    elif e.kind == ENTRY_ONEWAY:
        row_of(w.counters, e.row).c[e.block + C_ONEWAY_FORWARDED] += 1
    if e.received_ns:
        hop_record(w.counters, HOP_MESH, w.now_ns - e.received_ns)
        if e.room:
            hop_record(w.counters, HOP_QUEUE, w.now_ns - e.received_ns)


cdef void spill(World* w, Conn* c) noexcept nogil:
    """The turn ends: what still lies in the read area moves to memory of its own. Without memory
    the connection ends."""
    cdef Entry* e = c.fresh
    cdef uint8_t* p
    cdef bint failed = False
    c.fresh = NULL
    while e != NULL:
        if e.room == 0 and not e.dropped:
            p = <uint8_t*>mem_take(w, e.size) if not failed else NULL
            if p != NULL:
                memcpy(p, e.data, e.size)
                e.data = p
                e.room = e.size
            else:
                failed = True
                # Lost from the area, so it cannot be sent elsewhere either: whoever waits for it
                # gets told when
                # the connection is buried.
                if e.kind == ENTRY_REQUEST and e.slot != NULL:
                    e.slot.entry = NULL
                elif e.kind == ENTRY_ONEWAY:
                    row_of(w.counters, e.row).c[e.block + C_ONEWAY_DROPPED] += 1
                entry_drop(w, c, e)
        e = e.next
    if failed:
        conn_doom(w, c, CLOSED_MEMORY, 0)


cdef void pop(World* w, Conn* c) noexcept nogil:
    cdef Entry* e = c.head
    c.head = e.next
    if c.head == NULL:
        c.tail = NULL
    if c.fresh == e:
        c.fresh = e.next
    entry_free(w, e)


cdef uint32_t gather(World* w, Conn* c, iovec* iov, int* count) noexcept nogil:
    """Describe the front of the queue in at most IOVECS pieces; returns its bytes.

    Frames that lie side by side are one piece as they are. Short pieces are copied together, because
    a piece costs the kernel more than copying a few hundred bytes costs us.
    """
    cdef Entry* e
    cdef uint8_t* at
    cdef uint32_t size, stage_used = 0, total = 0
    cdef int n = 0
    # withdrawn frames at the front go first, so that the head is always one that will be sent
    while c.head != NULL and c.head.dropped:
        pop(w, c)
    e = c.head
    while e != NULL and total < FLUSH_BYTES:
        if e.dropped:
            e = e.next
            continue
        at = e.data + e.written
        size = e.size - e.written
        e = e.next
        while e != NULL and e.data == at + size and not e.dropped and total + size < FLUSH_BYTES:
            size += e.size
            e = e.next
        if size <= COPY_BYTES and (n or e != NULL) and stage_used + size <= STAGE_BYTES:
            memcpy(w.stage + stage_used, at, size)
            at = w.stage + stage_used
            stage_used += size
            if n and <uint8_t*>iov[n - 1].iov_base + iov[n - 1].iov_len == at:
                iov[n - 1].iov_len += size
                total += size
                continue
        if n == IOVECS:
            break
        iov[n].iov_base = at
        iov[n].iov_len = size
        n += 1
        total += size
    count[0] = n
    return total


cdef void consume(World* w, Conn* c, uint64_t sent) noexcept nogil:
    """`sent` bytes from the front of the queue are gone."""
    cdef Entry* e
    cdef uint64_t left
    while sent > 0:
        e = c.head
        if e.dropped:
            pop(w, c)
            continue
        left = e.size - e.written
        if not e.begun:
            e.begun = 1
            if e.slot != NULL:
                e.slot.entry = NULL
        if sent < left:
            e.written += <uint32_t>sent
            return
        sent -= left
        entry_done(w, c, e)
        c.queued_bytes -= e.size
        uncount(c, e)
        pop(w, c)


cdef bint reader_stuck(World* w, const Conn* c) noexcept nogil:
    """A client over its cap that takes nothing any more, or that is far over it.

    A reader that is merely asked for more than it can take at once goes on taking; and a single
    answer longer than the cap is nobody's fault.
    """
    cdef uint64_t cap = w.snapshot.limits.queue_bytes_max
    cdef uint64_t behind = c.queued_bytes - c.head.size if c.head != NULL else 0
    if behind <= cap or not c.blocked:
        return False
    return behind > OVER_CAP * cap or w.now_ms >= stands_since_ms(c) + STUCK_MS


cdef bint upstream_stuck(World* w, const Conn* c) noexcept nogil:
    """An upstream that asks and does not read the answers.

    Everybody's requests are on this connection, so it has ten times a client's patience: a service
    may well push for a while before it reads. What the mesh itself says to it (acknowledgements,
    refusals) is small, and much of it unread is no service.
    """
    cdef uint64_t cap = w.snapshot.limits.queue_bytes_max
    cdef uint64_t stood_ms
    if not c.blocked or c.own_bytes <= cap:
        return False
    stood_ms = w.now_ms - stands_since_ms(c)
    if c.made_bytes > cap and (stood_ms >= STUCK_MS or c.made_bytes > OVER_CAP * cap):
        return True
    return stood_ms >= UPSTREAM_STUCK_MS


cdef void block(World* w, Conn* c) noexcept nogil:
    c.blocked = 1
    c.blocked_ms = w.now_ms
    conn_look_again(w, c)


cdef int flush_one(World* w, Conn* c) noexcept nogil:
    cdef iovec[64] iov
    cdef int count = 0
    cdef int rounds = 0
    cdef uint32_t total
    cdef int64_t sent
    cdef uint64_t cap
    if c.state == CONN_DOOMED:
        return 0
    if unlikely(w.frozen != 0):
        spill(w, c)
        return 0
    if c.state != CONN_CONNECTING and not c.blocked and (c.kind != KIND_BROKER or c.greeted):
        while True:
            total = gather(w, c, iov, &count)
            if count == 0:
                break
            if rounds == FLUSHES_PER_TURN:
                # the kernel would take more: EPOLLOUT calls us back in the next turn
                block(w, c)
                break
            rounds += 1
            w.counters.p[P_WRITES] += 1
            sent = c.io.send(c, iov, count)
            if sent == -EINTR:
                continue
            if sent == -EAGAIN:
                block(w, c)
                break
            if sent < 0:
                spill(w, c)
                conn_doom(w, c, CLOSED_IO_ERROR, <int>-sent)
                return -1
            world_clock(w)
            w.counters.p[P_WRITE_BYTES] += <uint64_t>sent
            row_of(w.counters, c.row).c[C_BYTES_OUT] += <uint64_t>sent
            c.wrote_ms = w.now_ms
            consume(w, c, <uint64_t>sent)
            if <uint64_t>sent < total:
                block(w, c)
                break
    if c.head != NULL:
        spill(w, c)
    if c.role == ROLE_DOWNSTREAM and (c.queued_bytes or c.hold & HOLD_SLOW_READER):
        cap = w.snapshot.limits.queue_bytes_max
        if reader_stuck(w, c):
            w.counters.p[P_SLOW_CONSUMERS] += 1
            conn_doom(w, c, CLOSED_SLOW_CONSUMER, 0)
            return 0
        if c.queued_bytes > cap:
            conn_check_by(w, c, w.now_ms + STUCK_MS)
        if c.queued_bytes > cap // 4 * 3:
            # Requests of a client that does not read its answers only make it worse. Its answers to
            # requests of the
            # other side are still read: holding those back could lock both sides.
            if c.sent.used == 0:
                conn_hold(w, c, HOLD_SLOW_READER)
        elif c.queued_bytes < cap // 2:
            conn_release(w, c, HOLD_SLOW_READER)
    elif upstream_stuck(w, c):
        # Heartbeats and pushes are answered, but not for one that never reads the answers.
        w.counters.p[P_SLOW_CONSUMERS] += 1
        conn_doom(w, c, CLOSED_SLOW_CONSUMER, 0)
        return 0
    if c.head == NULL and c.hold & HOLD_EOF and c.asked_count == 0 and c.role == ROLE_DOWNSTREAM:
        conn_doom(w, c, CLOSED_BY_PEER, 0)   # half-closed, and everything it asked for was answered
        return 0
    rearm(w, c)
    return 0


cdef void flush_all(World* w) noexcept nogil:
    """Flush every destination once, then the read area starts anew: no entry points into it any
    more."""
    cdef Conn* c
    while w.dirty != NULL:
        c = w.dirty
        w.dirty = c.dirty_next
        c.dirty = 0
        c.dirty_next = NULL
        flush_one(w, c)
    w.area_used = 0


# === the four functions of a plain socket =========================================================
# They never wait, whatever O_NONBLOCK says: every duplicate of a descriptor, in whatever process,
# shares that flag.

cdef int64_t socket_recv(Conn* c, iovec* iov, int count) noexcept nogil:
    cdef msghdr msg
    if count == 1:
        return sys_recv(c.fd, iov[0].iov_base, iov[0].iov_len, MSG_DONTWAIT)
    memset(&msg, 0, sizeof(msg))
    msg.msg_iov = iov
    msg.msg_iovlen = count
    return sys_recvmsg(c.fd, &msg, MSG_DONTWAIT)


cdef int64_t socket_send(Conn* c, iovec* iov, int count) noexcept nogil:
    cdef msghdr msg
    if count == 1:
        return sys_send(c.fd, iov[0].iov_base, iov[0].iov_len, MSG_NOSIGNAL | MSG_DONTWAIT)
    memset(&msg, 0, sizeof(msg))
    msg.msg_iov = iov
    msg.msg_iovlen = count
    return sys_sendmsg(c.fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT)


cdef void socket_shutdown(Conn* c) noexcept nogil:
    c_shutdown(c.fd, SHUT_WR)


cdef int socket_can_move(const Conn* c) noexcept nogil:
    return 1


SOCKET_IO.recv = socket_recv
SOCKET_IO.send = socket_send
SOCKET_IO.shutdown = socket_shutdown
SOCKET_IO.can_move = socket_can_move
