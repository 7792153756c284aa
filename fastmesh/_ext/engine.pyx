# cython: language_level=3
"""The thread, and what Python drives (contracts: engine.pxd, world.pxd, engine.pyi)."""

import os
import socket
import threading
from array import array
from typing import NamedTuple

from .handover import STATE_VERSION, STATE_VERSION_MIN, inspect  # no-cython-lint (the face of all of it is here)

from libc.errno cimport EAGAIN, ECONNABORTED, EINTR, EMFILE, ENFILE, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc

from .bytes cimport memcmp, memset
from .conn cimport (
    conn_arm,
    conn_check_by,
    conn_dirty,
    conn_doom,
    conn_free,
    conn_handle,
    conn_hold,
    conn_new,
    conn_of,
    conn_release,
    event_push,
    flush_all,
    mem_give,
    mem_take,
    notice_opened,
    notices_drop,
    notices_retry,
    queue_own,
    world_clock,
)
from .counters cimport (
    C_CONNECTIONS,
    C_OPENED,
    C_REFUSED,
    CLOSED_BY_COMMAND,
    CLOSED_BY_PEER,
    CLOSED_MEMORY,
    Counters,
    P_ACCEPT_PAUSES,
    P_CONNECTIONS,
    P_SPINS,
    P_STALE_HANDLE,
    P_STALLS,
    P_TIMERS,
    P_TURNS,
    P_WAITS,
    ROWS_MAX,
    counters_copy,
    counters_free,
    counters_new,
    reading_add,
    reading_new,
    row_of,
)
from .frame cimport VIEW_PARTS
from .handover cimport (
    Load,
    blob_close,
    blob_open,
    blob_verify,
    handover_build,
    saved_drop,
    world_freeze,
    world_save,
    world_thaw,
)
from .groups cimport groups_join, groups_ready, groups_stop, groups_sync, groups_tell
from .pool cimport (
    pool_conn_due,
    pool_connected,
    pool_endpoint_due,
    pool_peer_groups,
    pool_stop,
    pool_sync,
)
from .relay cimport (
    relay_abort,
    relay_bury,
    relay_call,
    relay_client_due,
    relay_parked_due,
    relay_readable,
    relay_resume,
    relay_slot_due,
    relay_verdict,
)
from .ring cimport Record, record_payload, ring_peek, ring_pop, ring_push, ring_start, ring_stop
from .route cimport BIND_PER_CLIENT, KIND_PUSH, KIND_RELAY, ListenerRoutes, Snapshot, SnapshotData
from .slots cimport Slot, slots_start
from .timers cimport Timer, wheel_due, wheel_sleep_ms, wheel_start
from .world cimport (
    ACCEPTS_PER_TURN,
    AREA_BYTES,
    COMMAND_ABORT,
    COMMAND_ACCEPT,
    COMMAND_CALL,
    COMMAND_CLOSE,
    COMMAND_DRAIN,
    COMMAND_DUMP,
    COMMAND_FAIL_ALLOC,
    COMMAND_FREEZE,
    COMMAND_LISTEN,
    COMMAND_PEER_GROUPS,
    COMMAND_PUBLISH,
    COMMAND_RELEASE,
    COMMAND_REPLY,
    COMMAND_SAVE,
    COMMAND_SEND,
    COMMAND_STALL,
    COMMAND_STOP,
    COMMAND_SUBSCRIBE,
    COMMAND_THAW,
    COMMAND_UNLISTEN,
    COMMAND_VERDICT,
    CONN_CONNECTING,
    CONN_DOOMED,
    CONN_DRAINING,
    CONN_OPEN,
    EVENT_ACCEPT_PAUSED,
    EVENT_CLOSED,
    EVENT_DRAINED,
    EVENT_FROZEN,
    EVENT_REFUSED,
    EVENT_SAVED,
    EVENT_SNAPSHOT,
    EVENT_STOPPED,
    EVENT_THAWED,
    EVENTS_PER_TURN,
    HOLD_CONTROL,
    HOLD_EOF,
    HOLD_SHORTAGE,
    HOME_THREAD,
    IDS,
    OWED_FROZEN,
    OWED_SAVED,
    OWED_THAWED,
    PART_IN_AREA_BYTES,
    ROLE_DOWNSTREAM,
    ROLE_LISTENER,
    ROLE_UPSTREAM,
    ROLE_WAKE,
    STAGE_BYTES,
    TIMER_CONN,
    TIMER_ENDPOINT,
    TIMER_SLOT,
    TIMERS_PER_TURN,
    Bucket,
    Cluster,
    Conn,
    ConnInfo,
    Dump,
    Endpoint,
    Group,
    Parked,
    World,
)

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_wait(int epfd, epoll_event* events, int most, int timeout_ms)
    int EPOLL_CLOEXEC
    uint32_t EPOLLIN
    uint32_t EPOLLOUT
    uint32_t EPOLLERR
    uint32_t EPOLLHUP
    uint32_t EPOLLPRI
    uint32_t EPOLLRDHUP

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int value, int flags)
    int EFD_NONBLOCK
    int EFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    int dup(int fd)
    long read(int fd, void* data, size_t n)
    long write(int fd, const void* data, size_t n)

cdef extern from "<fcntl.h>" nogil:
    int c_open "open"(const char* path, int flags)
    int O_RDONLY
    int O_CLOEXEC

cdef extern from "thread.h":
    void set_errno "fm_set_errno"(int error) nogil
    int fm_accept(int fd) nogil
    void fm_nodelay(int fd) nogil
    void fm_plain_congestion_of_listener(int fd) nogil
    uint32_t fm_peer(int fd, uint8_t* room) nogil
    int fm_writable(int fd) nogil
    uint64_t fm_enter_thread() nogil
    void fm_abort_thread(uint64_t thread) nogil
    void fm_nap_ms(uint64_t ms) nogil
    void fm_no_hurry() noexcept nogil

cdef extern from "atomics.h" nogil:
    void* exchange "fm_exchange"(void** p, void* v)
    uint64_t load64 "fm_load"(uint64_t* p)
    void store64 "fm_store"(uint64_t* p, uint64_t v)
    uint32_t load32 "fm_load"(uint32_t* p)
    uint32_t add32 "fm_add"(uint32_t* p, uint32_t v)
    bint likely "fm_likely"(bint x)
    bint unlikely "fm_unlikely"(bint x)

cdef enum:
    INBOX_BYTES = 1 << 16         # accepted descriptors on their way to another thread
    ACCEPT_AGAIN_MS = 100         # after a shortage of descriptors
    REFUSE_PERCENT = 90           # of the memory budget: no new connections
    RELIEVE_PERCENT = 95          # of the memory budget: the connection that holds most is closed
    SLEEP_MS_MAX = 60000
    WATCH_MS = 100                # the watchdog's tick
    STUCK_TICKS = 50              # ticks in one and the same turn until it aborts the process
    DUMP_MAX = 10000
    RING_BYTES_MIN = 1 << 16
    RING_BYTES_MAX = 1 << 30
    UNTOLD_LOOK_MS = 10           # how often events that found the ring full are tried again
    COPY_LOOKS = 200              # of 1 ms, at a thread that owes a copy of its counters


# === life of a world ==============================================================================

cdef int world_start(World* w, uint64_t ring_bytes) noexcept nogil:
    cdef Conn* wake
    w.epfd = w.left_epfd = w.wake_fd = w.reserve_fd = w.saved.memfd = -1
    world_clock(w)
    wheel_start(&w.wheel, w.now_ms)
    w.counters = counters_new()
    w.area = <uint8_t*>malloc(AREA_BYTES)
    w.stage = <uint8_t*>malloc(STAGE_BYTES)
    w.buckets = <Bucket*>calloc(ROWS_MAX, sizeof(Bucket))
    w.listener_of = <const ListenerRoutes**>calloc(IDS + 1, sizeof(void*))    # NO_LISTENER too
    w.cluster_of = <Cluster**>calloc(IDS, sizeof(void*))
    w.endpoint_of = <Endpoint**>calloc(IDS, sizeof(void*))
    w.group_of = <Group**>calloc(IDS, sizeof(void*))
    if w.counters == NULL or w.area == NULL or w.stage == NULL or w.buckets == NULL or w.listener_of == NULL or \
            w.cluster_of == NULL or w.endpoint_of == NULL or w.group_of == NULL:
        set_errno(ENOMEM)
        return -1
    if ring_start(&w.commands, ring_bytes) != 0 or ring_start(&w.events, ring_bytes) != 0 or \
            ring_start(&w.inbox, INBOX_BYTES) != 0:
        set_errno(ENOMEM)
        return -1
    w.epfd = epoll_create1(EPOLL_CLOEXEC)
    w.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    w.reserve_fd = c_open(b"/dev/null", O_RDONLY | O_CLOEXEC)
    if w.epfd < 0 or w.wake_fd < 0 or w.reserve_fd < 0:
        return -1
    wake = conn_new(w, w.wake_fd, ROLE_WAKE)
    if wake == NULL:
        set_errno(ENOMEM)
        return -1
    wake.state = CONN_OPEN
    return conn_arm(w, wake, EPOLLIN)


cdef void world_free(World* w) noexcept nogil:
    """After world_run() has returned (or was never called)."""
    if w.counters != NULL:
        counters_free(w.counters)
    free(w.area)
    free(w.stage)
    free(w.buckets)
    free(w.listener_of)
    free(w.cluster_of)
    free(w.endpoint_of)
    free(w.group_of)
    free(w.dump)
    saved_drop(w)
    free(w.conns)
    free(w.generations)
    free(w.free_indices)
    while w.commands.data != NULL and ring_peek(&w.commands) != NULL:
        if ring_peek(&w.commands).kind == COMMAND_LISTEN:
            close(<int>ring_peek(&w.commands).b)      # it came behind the stop
        ring_pop(&w.commands)
    ring_stop(&w.commands)
    ring_stop(&w.events)
    ring_stop(&w.inbox)
    if w.epfd >= 0:
        close(w.epfd)
    if w.left_epfd >= 0:
        close(w.left_epfd)
    if w.wake_fd >= 0:
        close(w.wake_fd)
    if w.reserve_fd >= 0:
        close(w.reserve_fd)


cdef void wake(int fd) noexcept nogil:
    cdef uint64_t one = 1
    write(fd, &one, sizeof(one))    # full = it is awake already


# === snapshots ====================================================================================

cdef void take_snapshot(World* w, const SnapshotData* s) noexcept nogil:
    """From this turn on every frame sees `s`, and nothing of the one before."""
    cdef const SnapshotData* old = w.snapshot
    cdef uint32_t i
    cdef Conn* c
    cdef bint limits_changed = old == NULL or memcmp(&old.limits, &s.limits, sizeof(s.limits)) != 0
    world_clock(w)      # the connects that begin here are timed from now
    w.snapshot = s
    w.budget.max = s.limits.memory_bytes_max // w.threads
    if groups_ready(w, s) != 0 or pool_sync(w, s) != 0:
        # No memory even for this: the old one stays in force, and `version` shows it.
        w.snapshot = old
        event_push(w, EVENT_SNAPSHOT, s.version, 1, 0, NULL, 0)
        return
    groups_sync(w, s)
    if old != NULL:
        for i in range(old.listeners_count):
            w.listener_of[old.listeners[i].id] = NULL
    for i in range(s.listeners_count):
        w.listener_of[s.listeners[i].id] = &s.listeners[i]
    if limits_changed:
        for i in range(w.conns_high):
            c = w.conns[i]
            if c != NULL and c.state != CONN_DOOMED and (c.role == ROLE_DOWNSTREAM or c.role == ROLE_UPSTREAM):
                c.sent.capacity = s.limits.in_flight_max
                conn_check_by(w, c, w.now_ms)
    store64(&w.version, s.version)
    event_push(w, EVENT_SNAPSHOT, s.version, 0, 0, NULL, 0)


# === accepting ====================================================================================

cdef bint may_cut_through(const World* w, const ListenerRoutes* routes) noexcept nogil:
    """Parts may be forwarded as they come only where both ends are bound 1:1, else parts of two
    frames could mix."""
    cdef uint32_t i
    if routes.codec.view != VIEW_PARTS or routes.rules_count == 0:
        return False
    for i in range(routes.rules_count):
        if routes.rules[i].cluster != routes.rules[0].cluster or routes.rules[i].park:
            return False
    return w.snapshot.clusters[routes.rules[0].cluster].binding == BIND_PER_CLIENT


cdef void adopt(World* w, int fd, uint32_t listener) noexcept nogil:
    """A new client connection; it was counted in `downstreams` by whoever accepted it."""
    cdef const ListenerRoutes* routes = w.listener_of[listener]
    cdef Conn* c = NULL
    if routes != NULL and not w.stopping:
        c = conn_new(w, fd, ROLE_DOWNSTREAM)
    if c == NULL:
        close(fd)
        add32(&w.downstreams, <uint32_t>-1)
        return
    c.codec = routes.codec
    c.listener = listener
    c.row = routes.row
    c.kind = routes.kind
    c.state = CONN_DRAINING if w.draining else CONN_OPEN
    c.cut_through = may_cut_through(w, routes)
    slots_start(&c.sent, w.snapshot.limits.in_flight_max, w.first_generation)
    if c.codec.state_bytes:
        c.codec_state = mem_take(w, c.codec.state_bytes)
        if c.codec_state != NULL:
            memset(c.codec_state, 0, c.codec.state_bytes)
    fm_nodelay(fd)
    if (c.codec.state_bytes and c.codec_state == NULL) or conn_arm(w, c, EPOLLIN) != 0 or \
            (c.kind != KIND_RELAY and not notice_opened(w, c, listener, 0)):
        conn_free(w, c)
        add32(&w.downstreams, <uint32_t>-1)
        return
    w.counters.p[P_CONNECTIONS] += 1
    row_of(w.counters, c.row).c[C_CONNECTIONS] += 1
    row_of(w.counters, c.row).c[C_OPENED] += 1
    if w.draining:
        conn_check_by(w, c, w.now_ms)
    elif w.snapshot.limits.first_byte_timeout_ms:
        conn_check_by(w, c, w.now_ms + w.snapshot.limits.first_byte_timeout_ms)


cdef World* least_loaded(World* w, uint32_t* total) noexcept nogil:
    cdef uint32_t i, count, fewest = 0xffffffff
    cdef World* best = w
    total[0] = 0
    for i in range(w.threads):
        count = load32(&w.worlds[i].downstreams)
        total[0] += count
        if count < fewest:
            fewest = count
            best = &w.worlds[i]
    return best


cdef void accept_some(World* w, Conn* listener) noexcept nogil:
    cdef int _i, fd, spare
    cdef uint32_t total = 0
    cdef bint short_of_memory
    cdef World* to
    cdef uint64_t* row = row_of(w.counters, listener.row).c
    for _i in range(ACCEPTS_PER_TURN):
        fd = fm_accept(listener.fd)
        if fd < 0:
            if errno == EAGAIN:
                return
            if errno == EINTR or errno == ECONNABORTED:
                continue
            if errno == EMFILE or errno == ENFILE:
                # One is let in and shown out on the descriptor kept for this, so that it is told
                # and not left hanging.
                spare = errno
                close(w.reserve_fd)
                fd = fm_accept(listener.fd)
                if fd >= 0:
                    row[C_REFUSED] += 1
                    close(fd)
                w.reserve_fd = c_open(b"/dev/null", O_RDONLY | O_CLOEXEC)
            else:
                spare = errno
            w.counters.p[P_ACCEPT_PAUSES] += 1
            event_push(w, EVENT_ACCEPT_PAUSED, listener.listener, <uint64_t>spare, 0, NULL, 0)
            conn_hold(w, listener, HOLD_SHORTAGE)
            conn_check_by(w, listener, w.now_ms + ACCEPT_AGAIN_MS)
            return
        to = least_loaded(w, &total)
        short_of_memory = w.budget.used * 100 >= w.budget.max * REFUSE_PERCENT
        if short_of_memory or total >= w.snapshot.limits.connections_max:
            row[C_REFUSED] += 1
            if w.refused_second != w.now_ms // 1000:     # one word a second: the counter has them all
                w.refused_second = w.now_ms // 1000
                event_push(w, EVENT_REFUSED, listener.listener, total, short_of_memory, NULL, 0)
            close(fd)
            continue
        if w.listener_of[listener.listener] != NULL and w.listener_of[listener.listener].kind != KIND_RELAY:
            to = &w.worlds[HOME_THREAD]
        add32(&to.downstreams, 1)
        if to != w:
            if ring_push(&to.inbox, 1, listener.listener, <uint64_t>fd, 0, NULL, 0) == 0:
                wake(to.wake_fd)
                continue
            add32(&to.downstreams, <uint32_t>-1)
            add32(&w.downstreams, 1)
        adopt(w, fd, listener.listener)


# === commands =====================================================================================

cdef void listen_on(World* w, uint32_t id, int fd) noexcept nogil:
    cdef Conn* c = conn_new(w, fd, ROLE_LISTENER)
    if c == NULL:
        close(fd)
        event_push(w, EVENT_ACCEPT_PAUSED, id, ENOMEM, 0, NULL, 0)
        return
    fm_plain_congestion_of_listener(fd)
    c.state = CONN_OPEN
    c.listener = id
    if w.listener_of[id] != NULL:
        c.row = w.listener_of[id].row
    if conn_arm(w, c, EPOLLIN) != 0:
        event_push(w, EVENT_ACCEPT_PAUSED, id, <uint64_t>errno, 0, NULL, 0)
        conn_free(w, c)


cdef void drain_clients(World* w, bint all, uint32_t listener) noexcept nogil:
    cdef uint32_t i
    cdef Conn* c
    for i in range(w.conns_high):
        c = w.conns[i]
        if c == NULL or c.state == CONN_DOOMED or not (all or c.listener == listener):
            continue
        if c.role == ROLE_LISTENER:
            conn_doom(w, c, CLOSED_BY_COMMAND, 0)
        elif c.role == ROLE_DOWNSTREAM:
            c.state = CONN_DRAINING
            conn_check_by(w, c, w.now_ms)


cdef void accept_or_wait(World* w, bint accept) noexcept nogil:
    """Connections that wait in a backlog are somebody else's to accept, or ours later."""
    cdef uint32_t i
    cdef Conn* c
    for i in range(w.conns_high):
        c = w.conns[i]
        if c != NULL and c.role == ROLE_LISTENER and c.state != CONN_DOOMED:
            if accept:
                conn_release(w, c, HOLD_CONTROL)
            else:
                conn_hold(w, c, HOLD_CONTROL)


cdef void make_dump(World* w) noexcept nogil:
    """A picture of the connections, in one block that whoever takes the pointer owns."""
    cdef uint32_t i
    cdef uint32_t most = w.conns_high if w.conns_high < DUMP_MAX else DUMP_MAX
    cdef Conn* c
    cdef ConnInfo* info
    cdef Dump* dump = <Dump*>calloc(1, sizeof(Dump) + most * sizeof(ConnInfo))
    if dump != NULL:
        for i in range(w.conns_high):
            c = w.conns[i]
            if dump.count == most:
                break
            if c == NULL or (c.role != ROLE_DOWNSTREAM and c.role != ROLE_UPSTREAM):
                continue
            info = &dump.rows[dump.count]
            dump.count += 1
            info.handle = conn_handle(c)
            info.role = c.role
            info.state = c.state
            info.hold = c.hold
            info.listener = c.listener
            info.endpoint = c.endpoint.id if c.endpoint != NULL else 0
            info.in_flight = c.sent.used - c.sent.resting
            info.asked = c.asked_count
            info.queued_bytes = c.queued_bytes
            info.partial_bytes = c.part_size
            info.age_ms = <uint32_t>(w.now_ms - c.opened_ms)
            info.idle_ms = <uint32_t>(w.now_ms - c.read_ms)
            info.peer_size = fm_peer(c.fd, info.peer)
    free(exchange(<void**>&w.dump, dump))


cdef void stop_world(World* w) noexcept nogil:
    cdef uint32_t i
    cdef const Record* r
    cdef Conn* c
    w.stopping = 1
    relay_bury(w)
    flush_all(w)
    for i in range(w.conns_high):
        c = w.conns[i]
        if c != NULL and c.role != ROLE_WAKE:
            conn_doom(w, c, CLOSED_BY_COMMAND, 0)
    relay_bury(w)
    for i in range(w.conns_high):
        if w.conns[i] != NULL:
            w.conns[i].fd = -1      # the wake-up's: others may still use it, world_free() closes it
            conn_free(w, w.conns[i])
    # descriptors that were on their way here
    r = ring_peek(&w.inbox)
    while r != NULL:
        close(<int>r.b)
        ring_pop(&w.inbox)
        r = ring_peek(&w.inbox)
    pool_stop(w)
    groups_stop(w)
    notices_drop(w)
    while w.free_entries != NULL:
        entry = w.free_entries
        w.free_entries = entry.next
        mem_give(w, entry, sizeof(entry[0]))
    w.ended = 1
    event_push(w, EVENT_STOPPED, 0, 0, 0, NULL, 0)


cdef void freeze(World* w, uint64_t number) noexcept nogil:
    """What this turn holds leaves as it would at its end; then nothing moves any more. A connect
    that is through, and only was not noticed, need not be done again."""
    cdef uint32_t i
    cdef Conn* c
    for i in range(w.conns_high):
        c = w.conns[i]
        if c != NULL and c.role == ROLE_UPSTREAM and c.state == CONN_CONNECTING and fm_writable(c.fd):
            pool_connected(w, c)
    settle(w)
    world_freeze(w, number)


cdef void settle(World* w) noexcept nogil:
    """Nobody is doomed, and nothing lies in the read area. (Spilling may doom somebody.)"""
    while True:
        relay_bury(w)
        flush_all(w)
        if w.doomed == NULL:
            return


cdef void release_world(World* w) noexcept nogil:
    """What it holds is another process's now: it ends, and neither counts nor tells what ends with
    it. (Frozen, it writes nothing.)"""
    cdef Counters* counters = w.counters
    cdef Counters* scratch = counters_new()
    if scratch != NULL:
        w.counters = scratch
    w.released = 1
    stop_world(w)
    w.released = 0
    w.counters = counters
    if scratch != NULL:
        counters_free(scratch)
    event_push(w, EVENT_STOPPED, 0, 0, 0, NULL, 0)


cdef void reply(World* w, Conn* c, const Record* r) noexcept nogil:
    """The answer to a control frame leaves, and what its sender sent behind it is read."""
    if c == NULL or c.kind == KIND_RELAY:
        w.counters.p[P_STALE_HANDLE] += 1
        return
    if r.size and queue_own(w, c, record_payload(r), r.size) == NULL:
        conn_doom(w, c, CLOSED_MEMORY, 0)
        return
    if r.b:
        c.greeted = 1
    conn_release(w, c, HOLD_CONTROL)


cdef void run_commands(World* w) noexcept nogil:
    cdef const Record* r
    cdef Conn* c
    while not w.ended:
        r = ring_peek(&w.commands)
        if r == NULL:
            break
        if r.kind == COMMAND_PUBLISH:
            take_snapshot(w, <const SnapshotData*>r.a)
        elif r.kind == COMMAND_LISTEN:
            listen_on(w, <uint32_t>r.a, <int>r.b)
        elif r.kind == COMMAND_UNLISTEN:
            drain_clients(w, False, <uint32_t>r.a)
        elif r.kind == COMMAND_DRAIN:
            w.draining = 1
            drain_clients(w, True, 0)
        elif r.kind == COMMAND_ACCEPT:
            accept_or_wait(w, r.a != 0)
        elif r.kind == COMMAND_ABORT:
            relay_abort(w)
        elif r.kind == COMMAND_SEND:
            c = conn_of(w, r.a)
            if c == NULL or c.codec == NULL:
                w.counters.p[P_STALE_HANDLE] += 1
            elif r.size and queue_own(w, c, record_payload(r), r.size) == NULL:
                conn_doom(w, c, CLOSED_MEMORY, 0)
        elif r.kind == COMMAND_CLOSE:
            c = conn_of(w, r.a)
            if c == NULL or c.role == ROLE_WAKE:
                w.counters.p[P_STALE_HANDLE] += 1
            else:
                conn_doom(w, c, CLOSED_BY_COMMAND, 0)
        elif r.kind == COMMAND_REPLY:
            reply(w, conn_of(w, r.a), r)
        elif r.kind == COMMAND_CALL:
            relay_call(w, r.a, r.b, r.c, record_payload(r), r.size)
        elif r.kind == COMMAND_SUBSCRIBE:
            c = conn_of(w, r.a)
            if c == NULL or c.kind != KIND_PUSH:
                w.counters.p[P_STALE_HANDLE] += 1
            elif c.hold & HOLD_EOF or c.lingering:
                pass        # it has left its groups: it can answer nothing any more
            elif groups_join(w, c, <const uint32_t*>record_payload(r), r.size // 8) != 0:
                conn_doom(w, c, CLOSED_MEMORY, 0)
        elif r.kind == COMMAND_PEER_GROUPS:
            if r.a < IDS and w.endpoint_of[r.a] != NULL:
                # (without memory it goes on with what the peer said before)
                pool_peer_groups(w, w.endpoint_of[r.a], <const uint32_t*>record_payload(r), r.size // 4)
        elif r.kind == COMMAND_VERDICT:
            relay_verdict(w, r.a, r.b, <int>r.c)
        elif r.kind == COMMAND_DUMP:
            make_dump(w)
            store64(&w.dump_made, r.a)
            w.notify_due = 1
        elif r.kind == COMMAND_STALL:
            fm_nap_ms(r.a)
        elif r.kind == COMMAND_FAIL_ALLOC:
            w.budget.fail_at = r.a
        elif r.kind == COMMAND_FREEZE:
            freeze(w, r.a)
        elif r.kind == COMMAND_SAVE:
            w.saving = 1
        elif r.kind == COMMAND_THAW:
            if w.frozen:
                world_thaw(w)
        elif r.kind == COMMAND_RELEASE:
            # Who took over arms its connections now, on this CPU perhaps: closing ours can wait.
            fm_no_hurry()
            release_world(w)
        elif r.kind == COMMAND_STOP:
            stop_world(w)
        ring_pop(&w.commands)
    if not w.ended:
        take_accepted(w)


cdef void take_accepted(World* w) noexcept nogil:
    """What the first thread accepted for this one."""
    cdef const Record* r = ring_peek(&w.inbox)
    while r != NULL:
        adopt(w, <int>r.b, <uint32_t>r.a)
        ring_pop(&w.inbox)
        r = ring_peek(&w.inbox)


# === a turn =======================================================================================

cdef void on_ready(World* w, uint64_t handle, uint32_t events) noexcept nogil:
    cdef Conn* c = conn_of(w, handle)
    cdef uint64_t count
    if c == NULL:
        return      # ended earlier in this turn
    if c.role == ROLE_WAKE:
        read(c.fd, &count, sizeof(count))
    elif c.role == ROLE_LISTENER:
        accept_some(w, c)
    elif c.state == CONN_CONNECTING:
        pool_connected(w, c)
    else:
        if events & EPOLLOUT:
            c.blocked = 0
            conn_dirty(w, c)
        if events & EPOLLIN:
            relay_readable(w, c, events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR | EPOLLPRI) != 0)
        elif events & EPOLLERR or (events & EPOLLHUP and c.hold & HOLD_EOF):
            # Gone in both directions: nothing can be answered any more.
            conn_doom(w, c, CLOSED_BY_PEER, 0)
        # (Held back and hung up, it is read to its end once it is released.)


cdef void run_timers(World* w) noexcept nogil:
    cdef int _i
    cdef Timer* t
    cdef Conn* c
    for _i in range(TIMERS_PER_TURN):
        t = wheel_due(&w.wheel, w.now_ms)
        if t == NULL:
            return
        w.counters.p[P_TIMERS] += 1
        if t.kind == TIMER_SLOT:
            relay_slot_due(w, <Slot*>t.owner)
        elif t.kind == TIMER_CONN:
            c = <Conn*>t.owner
            if c.role == ROLE_DOWNSTREAM:
                relay_client_due(w, c)
            elif c.role == ROLE_UPSTREAM:
                pool_conn_due(w, c)
            elif c.role == ROLE_LISTENER:
                conn_release(w, c, HOLD_SHORTAGE)
        elif t.kind == TIMER_ENDPOINT:
            pool_endpoint_due(w, <Endpoint*>t.owner)
        else:
            relay_parked_due(w, <Parked*>t.owner)


cdef void relieve(World* w) noexcept nogil:
    """Last step of the memory ladder (pause, shed, refuse, close): the connection that holds most
    gives way."""
    cdef uint32_t i
    cdef uint64_t most = 0, holds
    cdef Conn* c
    cdef Conn* largest = NULL
    if w.budget.used * 100 < w.budget.max * RELIEVE_PERCENT:
        return
    for i in range(w.conns_high):
        c = w.conns[i]
        if c != NULL and c.state != CONN_DOOMED and (c.role == ROLE_DOWNSTREAM or c.role == ROLE_UPSTREAM):
            holds = c.queued_bytes + c.part_room + (c.parked.size if c.parked != NULL else 0)
            if holds > most:
                most = holds
                largest = c
    if largest != NULL:
        conn_doom(w, largest, CLOSED_MEMORY, 0)


cdef int wait_ready(World* w, epoll_event* events) noexcept nogil:
    cdef int64_t sleep_ms
    cdef int n
    cdef uint64_t spin_until
    if w.doomed != NULL or w.resume != NULL or w.dirty != NULL or ring_peek(&w.commands) != NULL:
        sleep_ms = 0
    else:
        sleep_ms = wheel_sleep_ms(&w.wheel, w.now_ms)
        if sleep_ms < 0 or sleep_ms > SLEEP_MS_MAX:
            sleep_ms = SLEEP_MS_MAX
        if unlikely(w.untold != NULL or w.groups_changed or w.owed) and sleep_ms > UNTOLD_LOOK_MS:
            sleep_ms = UNTOLD_LOOK_MS
    w.counters.p[P_WAITS] += 1
    if w.spin_ns and sleep_ms and w.gap_ns < 2 * w.spin_ns:
        # Waking a sleeping thread costs more than the work: look again for a while before lying
        # down.
        spin_until = w.now_ns + w.spin_ns
        if sleep_ms * 1000000 < <int64_t>w.spin_ns:
            spin_until = w.now_ns + <uint64_t>sleep_ms * 1000000
        while True:
            n = epoll_wait(w.epfd, events, EVENTS_PER_TURN, 0)
            if n != 0:
                return n
            w.counters.p[P_SPINS] += 1
            world_clock(w)
            if w.now_ns >= spin_until:
                break
    return epoll_wait(w.epfd, events, EVENTS_PER_TURN, <int>sleep_ms)


cdef void tell_owed(World* w) noexcept nogil:
    """Behind everything else that is to be told."""
    if w.untold != NULL or w.groups_changed:
        return
    if w.owed & OWED_THAWED:
        if event_push(w, EVENT_THAWED, w.thawed_ns, w.frozen_ns, 0, NULL, 0) != 0:
            return
        w.owed &= <uint8_t>~<int>OWED_THAWED
    if w.owed & OWED_FROZEN:
        if event_push(w, EVENT_FROZEN, w.frozen_ns, 0, 0, NULL, 0) != 0:
            return
        w.owed &= <uint8_t>~<int>OWED_FROZEN
    if w.owed & OWED_SAVED:
        if event_push(w, EVENT_SAVED, <uint64_t>w.saved.error, w.saved.bytes, 0, NULL, 0) != 0:
            return
        w.owed &= <uint8_t>~<int>OWED_SAVED


cdef void frozen_turn(World* w, epoll_event* events) noexcept nogil:
    """Commands were executed; what they queued goes to memory, what they owe is told."""
    cdef uint64_t count
    cdef int sleep_ms = SLEEP_MS_MAX
    settle(w)
    tell_main(w)
    if w.saving and w.untold == NULL and not w.groups_changed and w.owed == 0:
        w.saving = 0
        take_accepted(w)        # every thread is frozen: nothing comes behind it
        world_save(w)
        store64(&w.saved_ready, 1)
        w.owed |= OWED_SAVED
        tell_main(w)
    if ring_peek(&w.commands) != NULL:
        sleep_ms = 0
    elif w.saving or w.owed or w.untold != NULL or w.groups_changed:
        sleep_ms = UNTOLD_LOOK_MS
    store64(&w.awake, 0)
    if epoll_wait(w.epfd, events, EVENTS_PER_TURN, sleep_ms) > 0:
        read(w.wake_fd, &count, sizeof(count))      # nothing else is watched
    world_clock(w)
    store64(&w.turn, w.turn + 1)
    store64(&w.awake, 1)


cdef void tell_main(World* w) noexcept nogil:
    """What the main thread asked for or must know, before anything else may put this thread to sleep."""
    if w.draining == 1 and load32(&w.downstreams) == 0:
        if event_push(w, EVENT_DRAINED, 0, 0, 0, NULL, 0) == 0:
            w.draining = 2
    if unlikely(w.untold != NULL):
        notices_retry(w)
    if unlikely(w.groups_changed):
        groups_tell(w)
    if unlikely(w.owed):
        tell_owed(w)
    w.counters.p[P_STALLS] = load64(&w.stalls)
    counters_copy(w.counters)
    if w.notify_due:
        w.notify_due = 0
        wake(w.notify_fd)


cdef void turn(World* w, epoll_event* events) noexcept nogil:
    cdef int i, n
    cdef uint64_t gap
    run_commands(w)
    if w.ended:
        return
    if unlikely(w.frozen != 0):
        frozen_turn(w, events)
        return
    relay_resume(w)
    relay_bury(w)       # what it queued still lies in the area: it must go elsewhere before that is reused
    flush_all(w)
    tell_main(w)
    store64(&w.awake, 0)
    n = wait_ready(w, events)
    world_clock(w)
    store64(&w.turn, w.turn + 1)
    store64(&w.awake, 1)
    w.counters.p[P_TURNS] += 1
    for i in range(n):
        if AREA_BYTES - w.area_used < 2 * PART_IN_AREA_BYTES + 65536:
            relay_bury(w)
            flush_all(w)
        on_ready(w, events[i].data.u64, events[i].events)
    if likely(w.catching_up == 0):
        run_timers(w)
    else:
        w.catching_up = w.catching_up - 1 if n == EVENTS_PER_TURN else 0
    relay_bury(w)
    if unlikely(w.budget.used * 100 >= w.budget.max * RELIEVE_PERCENT):
        relieve(w)
        relay_bury(w)
    flush_all(w)
    if w.spin_ns and n > 0:
        gap = w.now_ns - w.busy_ns
        w.gap_ns = (w.gap_ns * 3 + (gap if gap < 1000000000 else 1000000000)) // 4
        w.busy_ns = w.now_ns
    tell_main(w)


cdef void world_run(World* w) noexcept nogil:
    cdef epoll_event[512] events
    store64(&w.pthread, fm_enter_thread())
    if w.adopted:
        world_thaw(w)
    while not w.ended:
        turn(w, events)
    store64(&w.awake, 0)
    # the last word of the ledger, asked for or not
    store64(&w.counters.copied, load64(&w.counters.asked) - 1)
    counters_copy(w.counters)
    wake(w.notify_fd)


cdef void watch(World* worlds, uint32_t threads, uint64_t* go_on) noexcept nogil:
    """The watchdog counts its own ticks, so that a process that was stopped and resumed is not
    taken for a stalled one."""
    cdef uint32_t i
    cdef World* w
    cdef uint64_t turn
    fm_enter_thread()
    while load64(go_on):
        fm_nap_ms(WATCH_MS)
        for i in range(threads):
            w = &worlds[i]
            turn = load64(&w.turn)
            if load64(&w.awake) == 0 or turn != w.seen_turn or load64(&w.frozen):
                w.seen_turn = turn
                w.stuck_ticks = 0
                continue
            w.stuck_ticks += 1
            store64(&w.stalled_ms, w.stuck_ticks * WATCH_MS)
            if w.stuck_ticks == 1:
                store64(&w.stalls, w.stalls + 1)
                wake(w.notify_fd)
            elif w.stuck_ticks >= STUCK_TICKS:
                fm_abort_thread(w.pthread)


# === what Python drives ===========================================================================

class Saved(NamedTuple):
    memfd: int
    descriptors: array
    downstream: int
    upstream: int
    requests: int
    pushes: int
    bytes: int
    left: int


class Event(NamedTuple):
    kind: str
    thread: int
    a: int
    b: int
    c: int
    data: bytes


EVENT_KINDS = (
    "", "snapshot", "endpoint_up", "endpoint_down", "ejected", "restored", "closed", "refused",
    "accept_paused", "parked", "sample", "stall", "drained", "stopped",
    "frame", "opened", "gone", "answer", "group", "frozen", "saved", "thawed",
)
STATES = ("connecting", "open", "draining", "closing")
HOLDS = (
    (1, "quota"), (2, "slow_reader"), (4, "parked"), (8, "events"), (16, "half_closed"),
    (32, "order"), (64, "shortage"), (128, "control"),
)


def address_text(raw: bytes) -> str:
    """A struct sockaddr as people write it."""
    if len(raw) < 2:
        return "unix"
    family = int.from_bytes(raw[:2], "little")
    port = int.from_bytes(raw[2:4], "big") if len(raw) >= 4 else 0
    if family == socket.AF_INET and len(raw) >= 8:
        return f"{socket.inet_ntop(socket.AF_INET, raw[4:8])}:{port}"
    if family == socket.AF_INET6 and len(raw) >= 24:
        return f"[{socket.inet_ntop(socket.AF_INET6, raw[8:24])}]:{port}"
    name = raw[2:].split(b"\0")[0].decode("utf-8", "replace")
    return f"unix:{name}" if name else "unix"


cdef void each_once(const int* fds, size_t count) except *:
    """What is there twice would be closed twice, and the second time it may be somebody else's. (What
    is no socket ends as a broken connection does, and nothing waits on one that blocks.)"""
    cdef size_t i
    cdef int most = -1
    cdef uint8_t* seen
    for i in range(count):
        if fds[i] < 0:
            raise ValueError(f"descriptors[{i}]: {fds[i]} is none")
        most = max(most, fds[i])
    seen = <uint8_t*>calloc(1, <size_t>(most + 1) // 8 + 1)
    if seen == NULL:
        raise MemoryError
    try:
        for i in range(count):
            if seen[fds[i] >> 3] & (1 << (fds[i] & 7)):
                raise ValueError(f"descriptors[{i}]: {fds[i]} is there twice")
            seen[fds[i] >> 3] |= <uint8_t>(1 << (fds[i] & 7))
    finally:
        free(seen)


cdef bytes uint32s(object numbers):
    """As an array of the machine's own."""
    return array("I", numbers).tobytes()


cdef class Engine:
    cdef World* worlds
    cdef uint32_t count
    cdef uint64_t watching
    cdef uint64_t asked
    cdef uint64_t dumps
    cdef readonly int event_fd
    cdef list _threads
    cdef list _snapshots
    cdef object _watchdog
    cdef bint _started, _stopped, _watch
    # hand-over
    cdef bint _adopted, _failed, _frozen, _saving, _released
    cdef uint64_t _freezes
    cdef uint32_t _loaded, _expected    # worlds of the process before
    # descriptors that were given to load() and belong to no connection
    cdef int* _unplaced
    cdef size_t _unplaced_count

    def __cinit__(self, *, int threads=1, int spin_us=0, uint64_t memory_bytes_max=536870912, bint watchdog=True,
                  int first_generation=1, uint64_t seed=0, uint64_t ring_bytes=1048576):
        cdef uint32_t i
        cdef World* w
        self.event_fd = -1
        if not 1 <= threads <= 64:
            raise ValueError(f"threads: {threads} is not in 1..64")
        if not 0 <= spin_us <= 1000000:
            raise ValueError(f"spin_us: {spin_us} is not in 0..1000000")
        if not 1 <= first_generation <= 0x7fff:
            raise ValueError(f"first_generation: {first_generation} is not in 1..32767")
        if not RING_BYTES_MIN <= ring_bytes <= RING_BYTES_MAX or ring_bytes & (ring_bytes - 1):
            raise ValueError(
                f"ring_bytes: {ring_bytes} is no power of two in {RING_BYTES_MIN}..{RING_BYTES_MAX}"
            )
        self._threads = []
        self._snapshots = []
        self._watch = watchdog
        self.worlds = <World*>calloc(threads, sizeof(World))
        if self.worlds == NULL:
            raise MemoryError
        self.count = threads
        for i in range(self.count):
            self.worlds[i].epfd = self.worlds[i].left_epfd = -1
            self.worlds[i].wake_fd = self.worlds[i].reserve_fd = -1
            self.worlds[i].saved.memfd = -1
        self.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.event_fd < 0:
            raise OSError(errno, os.strerror(errno))
        for i in range(self.count):
            w = &self.worlds[i]
            w.thread = i
            w.threads = self.count
            w.worlds = self.worlds
            w.notify_fd = self.event_fd
            w.spin_ns = <uint64_t>spin_us * 1000
            w.first_generation = <uint16_t>first_generation
            w.random = (seed or int.from_bytes(os.urandom(7), "little")) + i + 1
            w.budget.max = memory_bytes_max // self.count
            if world_start(w, ring_bytes) != 0:
                raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        cdef uint32_t i
        if self.worlds == NULL:
            return
        if self._started and not self._stopped:
            return      # threads still run in this memory: leaking it is the only safe end
        self._drop()
        for i in range(self.count):
            world_free(&self.worlds[i])
        free(self.worlds)
        if self.event_fd >= 0:
            close(self.event_fd)

    @property
    def threads(self):
        return int(self.count)

    cdef void command(self, uint32_t thread, uint32_t kind, uint64_t a, uint64_t b, uint64_t c, bytes payload) except *:
        if thread >= self.count:
            raise ValueError(f"thread: {thread} is not in 0..{self.count - 1}")
        cdef World* w = &self.worlds[thread]
        cdef const char* data = payload
        if ring_push(&w.commands, kind, a, b, c, data, <uint32_t>len(payload)) != 0:
            raise BlockingIOError(EAGAIN, "the engine thread has not taken the commands given before")
        wake(w.wake_fd)

    def _run(self, uint32_t thread):
        cdef World* w = &self.worlds[thread]
        with nogil:
            world_run(w)

    def _watch_loop(self):
        cdef World* worlds = self.worlds
        cdef uint32_t threads = self.count
        cdef uint64_t* go_on = &self.watching
        with nogil:
            watch(worlds, threads, go_on)

    def start(self, Snapshot snapshot not None):
        self._take_first(snapshot, False)
        self._begin()

    cdef void _take_first(self, Snapshot snapshot, bint adopted) except *:
        cdef uint32_t i
        if self._started or self._adopted:
            raise RuntimeError("the engine was started already")
        if snapshot.data == NULL:
            raise ValueError("snapshot: it is not sealed")
        self._snapshots.append(snapshot)
        self._adopted = adopted
        for i in range(self.count):
            self.worlds[i].adopted = adopted
            self.worlds[i].frozen = ~(<uint64_t>0) if adopted else 0
            take_snapshot(&self.worlds[i], snapshot.data)
            if self.worlds[i].snapshot == NULL:
                raise MemoryError("memory_bytes_max: too little for the first snapshot")

    cdef void _begin(self) except *:
        cdef uint32_t i
        self._started = True
        for i in range(self.count):
            thread = threading.Thread(target=self._run, args=(i,), name=f"engine-{i}", daemon=True)
            thread.start()
            self._threads.append(thread)
        if self._watch:
            self.watching = 1
            self._watchdog = threading.Thread(target=self._watch_loop, name="engine-watchdog", daemon=True)
            self._watchdog.start()

    # --- hand-over, the new side ---

    def adopt(self, Snapshot snapshot not None):
        try:
            self._take_first(snapshot, True)
        except MemoryError:
            self._failed = True
            raise

    cdef const int* _own(self, object descriptors) except? NULL:
        """They are ours from here on, whatever comes of it."""
        numbers = array("i", descriptors)
        cdef size_t more = len(numbers)
        cdef size_t i
        cdef int* longer = <int*>realloc(self._unplaced, (self._unplaced_count + more + 1) * sizeof(int))
        if longer == NULL:
            for number in numbers:
                close(number)
            raise MemoryError("no memory for the descriptors")
        self._unplaced = longer
        for i in range(more):
            longer[self._unplaced_count + i] = numbers[i]
        self._unplaced_count += more
        return longer + self._unplaced_count - more

    def load(self, uint32_t thread, int memfd, descriptors not None):
        cdef Load load
        cdef const int* fds = self._own(descriptors)
        cdef size_t given = self._unplaced + self._unplaced_count - fds
        cdef int built
        if not self._adopted or self._started or self._stopped or self._failed:
            raise RuntimeError("load() comes after adopt(), before start_adopted(), and after no failed load()")
        if thread != self._loaded:
            raise RuntimeError(f"thread: {thread} is not next; worlds are loaded in order, and that is {self._loaded}")
        memset(&load, 0, sizeof(load))
        self._failed = True
        try:
            blob_open(&load, memfd)
            blob_verify(&load)
            if load.head.thread != thread or (self._expected and load.head.threads != self._expected):
                raise ValueError(
                    f"state: it is of thread {load.head.thread} of {load.head.threads}, "
                    f"not of thread {thread} of {self._expected or load.head.threads}"
                )
            if load.head.descriptors != given:
                raise ValueError(f"descriptors: {given} were given, the state has {load.head.descriptors}")
            each_once(fds, given)
            load.w = &self.worlds[thread % self.count]
            load.merged = thread >= self.count
            load.fds = fds
            with nogil:
                built = handover_build(&load)
            if built != 0:
                raise MemoryError(
                    f"state of thread {thread}: it needs {load.tally.need} bytes beside the {load.w.budget.used} in "
                    f"use; memory_bytes_max gives {load.w.budget.max} to each thread"
                )
        finally:
            blob_close(&load)
        self._failed = False
        self._loaded += 1
        self._expected = load.head.threads
        self._unplaced_count -= given       # connections own them now

    def start_adopted(self):
        if not self._adopted or self._started or self._stopped:
            raise RuntimeError("start_adopted() comes after adopt()")
        if self._failed:
            raise RuntimeError("a world could not be loaded: this engine can only be stopped")
        if self._loaded < self._expected:
            raise RuntimeError(f"{self._loaded} of {self._expected} worlds were loaded")
        self._begin()

    cdef void _drop(self) noexcept:
        """Of an adopted engine that never ran: close and free everything, without a word."""
        cdef uint32_t i
        cdef size_t j
        if self._adopted and not self._started:
            for i in range(self.count):
                if not self.worlds[i].ended:
                    release_world(&self.worlds[i])
        for j in range(self._unplaced_count):
            close(self._unplaced[j])
        self._unplaced_count = 0
        free(self._unplaced)
        self._unplaced = NULL

    # --- hand-over, the old side ---

    cdef void _insist(self, uint32_t kind, uint64_t a) except *:
        """To every thread, even if one must first take what it was given before."""
        cdef uint32_t i
        cdef int looks
        for i in range(self.count):
            looks = 0
            while True:
                try:
                    self.command(i, kind, a, 0, 0, b"")
                    break
                except BlockingIOError:
                    looks += 1
                    if looks == COPY_LOOKS:
                        raise
                with nogil:
                    fm_nap_ms(1)

    cdef void _moving(self) except *:
        if self._frozen:
            raise RuntimeError("the engine is frozen: thaw() it first")

    def freeze(self):
        if not self._started or self._stopped:
            raise RuntimeError("the engine does not run")
        self._moving()
        self._frozen = True
        self._freezes += 1
        self._insist(COMMAND_FREEZE, self._freezes)

    def save(self):
        cdef uint32_t i
        if not self._frozen or self._saving:
            raise RuntimeError("save() comes once after freeze()")
        for i in range(self.count):
            if load64(&self.worlds[i].frozen) != self._freezes:
                raise RuntimeError(f"thread {i} is not frozen yet: wait for its event")
        self._saving = True
        self._insist(COMMAND_SAVE, 0)

    def saved(self, uint32_t thread):
        cdef World* w
        cdef uint32_t i
        if thread >= self.count:
            raise ValueError(f"thread: {thread} is not in 0..{self.count - 1}")
        w = &self.worlds[thread]
        if not self._saving or load64(&w.saved_ready) == 0:
            raise RuntimeError(f"thread {thread} has not saved (yet): wait for its event")
        if w.saved.error:
            raise OSError(w.saved.error, os.strerror(w.saved.error))
        if w.saved.memfd < 0:
            raise RuntimeError(f"what thread {thread} saved was taken already")
        found = array("i")
        for i in range(w.saved.count):
            found.append(w.saved.descriptors[i])
        memfd = w.saved.memfd
        w.saved.memfd = -1
        return Saved(memfd, found, w.saved.downstream, w.saved.upstream, w.saved.requests, w.saved.pushes,
                     w.saved.bytes, w.saved.left)

    def thaw(self):
        if not self._frozen or self._released:
            raise RuntimeError("thaw() comes after freeze() and before release()")
        self._frozen = self._saving = False
        self._insist(COMMAND_THAW, 0)

    def release(self):
        if not self._frozen or self._released:
            raise RuntimeError("release() comes once after freeze()")
        self._released = True
        self._insist(COMMAND_RELEASE, 0)

    # ---

    def publish(self, Snapshot snapshot not None):
        cdef uint32_t i
        self._moving()
        if snapshot.data == NULL:
            raise ValueError("snapshot: it is not sealed")
        newest = <Snapshot>self._snapshots[len(self._snapshots) - 1] if self._snapshots else None
        if newest is not None and snapshot.version <= newest.version:
            raise ValueError(f"snapshot: version {snapshot.data.version} is not above the one before")
        self._snapshots.append(snapshot)
        for i in range(self.count):
            self.command(i, COMMAND_PUBLISH, <uint64_t>snapshot.data, 0, 0, b"")
        self._prune()

    cdef void _prune(self) except *:
        """Drop the snapshots that no thread can hold any more: those older than what every thread
        has taken."""
        cdef uint64_t oldest = self.in_force()
        while len(self._snapshots) > 1 and (<Snapshot>self._snapshots[0]).data.version < oldest:
            self._snapshots.pop(0)

    cpdef uint64_t in_force(self):
        cdef uint32_t i
        cdef uint64_t oldest = load64(&self.worlds[0].version)
        for i in range(1, self.count):
            oldest = min(oldest, load64(&self.worlds[i].version))
        return oldest

    def listen(self, uint32_t listener_id, int fd):
        self._moving()
        cdef int own = dup(fd)
        if own < 0:
            raise OSError(errno, os.strerror(errno))
        os.set_inheritable(own, False)
        try:
            self.command(0, COMMAND_LISTEN, listener_id, own, 0, b"")
        except BlockingIOError:
            close(own)
            raise

    def unlisten(self, uint32_t listener_id):
        self._moving()
        self._all(COMMAND_UNLISTEN, listener_id)

    def accept(self, bint go_on):
        self._moving()
        self._all(COMMAND_ACCEPT, go_on)

    def drain(self):
        self._moving()
        self._all(COMMAND_DRAIN, 0)

    def abort_in_flight(self):
        self._moving()
        self._all(COMMAND_ABORT, 0)

    cdef void _all(self, uint32_t kind, uint64_t a) except *:
        cdef uint32_t i
        for i in range(self.count):
            self.command(i, kind, a, 0, 0, b"")

    def stop(self, int timeout_ms=5000):
        cdef bint ended = True
        if self._adopted and not self._started:
            self._drop()
            self._stopped = True
        if not self._started or self._stopped:
            return True
        if not self._released:
            self._all(COMMAND_STOP, 0)
        for thread in self._threads:
            thread.join(timeout_ms / 1000)
            ended = ended and not thread.is_alive()
        if self._watchdog is not None:
            store64(&self.watching, 0)
            self._watchdog.join(1)
            ended = ended and not self._watchdog.is_alive()
        self._stopped = ended
        return bool(ended)

    def send(self, uint64_t handle, bytes data not None, uint32_t thread=0):
        self.command(thread, COMMAND_SEND, handle, 0, 0, data)

    def close(self, uint64_t handle, uint32_t thread=0):
        self.command(thread, COMMAND_CLOSE, handle, 0, 0, b"")

    def verdict(self, uint64_t ticket, cluster_id):
        """Tickets carry their thread."""
        what = 0 if cluster_id is None else 1 if cluster_id == -1 else 2
        cluster = cluster_id if what == 2 else 0
        self.command(<uint32_t>(ticket % self.count), COMMAND_VERDICT, ticket, cluster, what, b"")

    cdef bint queued(self, uint32_t kind, uint64_t a, uint64_t b, uint64_t c, bytes payload) except -1:
        """On the home thread's ring, without a wake-up. False = it is full."""
        cdef const char* data = payload
        return ring_push(&self.worlds[HOME_THREAD].commands, kind, a, b, c, data, <uint32_t>len(payload)) == 0

    def send_many(self, frames not None):
        cdef int taken = 0
        for handle, data in frames:
            if not self.queued(COMMAND_SEND, handle, 0, 0, data):
                break
            taken += 1
        wake(self.worlds[HOME_THREAD].wake_fd)
        return taken

    def call_many(self, calls not None):
        cdef int taken = 0
        for handle, ticket, frame, timeout_ms in calls:
            if not self.queued(COMMAND_CALL, handle, ticket, timeout_ms, frame):
                break
            taken += 1
        wake(self.worlds[HOME_THREAD].wake_fd)
        return taken

    def reply(self, uint64_t handle, bytes data not None, bint greet=False):
        self.command(HOME_THREAD, COMMAND_REPLY, handle, greet, 0, data)

    def subscribe(self, uint64_t handle, groups not None):
        self.command(HOME_THREAD, COMMAND_SUBSCRIBE, handle, 0, 0, uint32s(n for pair in groups for n in pair))

    def peer_groups(self, uint32_t endpoint_id, group_ids not None):
        self.command(HOME_THREAD, COMMAND_PEER_GROUPS, endpoint_id, 0, 0, uint32s(group_ids))

    def events(self, int most=4096):
        cdef uint32_t i
        cdef const Record* r
        cdef World* w
        cdef uint64_t count, stalled
        found = []
        read(self.event_fd, &count, sizeof(count))
        for i in range(self.count):
            w = &self.worlds[i]
            stalled = load64(&w.stalled_ms)
            if stalled:
                store64(&w.stalled_ms, 0)
                found.append(Event("stall", i, stalled, 0, 0, b""))
            while len(found) < most:
                r = ring_peek(&w.events)
                if r == NULL:
                    break
                data = (<const char*>record_payload(r))[:r.size]
                if r.kind == EVENT_CLOSED:
                    data = f"{address_text(data[4:4 + data[0]])} {data[132:132 + data[1]].hex()}".encode()
                found.append(Event(EVENT_KINDS[r.kind], i, r.a, r.b, r.c, data))
                ring_pop(&w.events)
        if len(found) >= most:
            wake(self.event_fd)     # there may be more
        self._prune()
        return found

    def ask_counters(self):
        cdef uint32_t i
        self.asked += 1
        for i in range(self.count):
            store64(&self.worlds[i].counters.asked, self.asked)
            wake(self.worlds[i].wake_fd)
        return self.asked

    def counters_ready(self, uint64_t ticket):
        cdef uint32_t i
        for i in range(self.count):
            if load64(&self.worlds[i].counters.copied) < ticket and not self._stopped:
                return False
        return True

    def counters(self):
        cdef uint32_t i
        cdef object reading = reading_new()
        # A copy that somebody asked for meanwhile must be whole before it is read.
        for _ in range(COPY_LOOKS):
            if self.counters_ready(self.asked):
                break
            with nogil:
                fm_nap_ms(1)
        for i in range(self.count):
            reading_add(reading, self.worlds[i].counters)
        return reading

    def ask_connections(self):
        self.dumps += 1
        self._all(COMMAND_DUMP, self.dumps)
        return self.dumps

    def connections_ready(self, uint64_t ticket):
        cdef uint32_t i
        for i in range(self.count):
            if load64(&self.worlds[i].dump_made) < ticket:
                return False
        return True

    def connections(self):
        cdef uint32_t i, j
        cdef ConnInfo* info
        cdef Dump* dump
        rows = []
        for i in range(self.count):
            dump = <Dump*>exchange(<void**>&self.worlds[i].dump, NULL)
            for j in range(dump.count if dump != NULL else 0):
                info = &dump.rows[j]
                down = info.role == ROLE_DOWNSTREAM
                rows.append({
                    "handle": info.handle,
                    "thread": i,
                    "role": "downstream" if down else "upstream",
                    "listener_id" if down else "endpoint_id": info.listener if down else info.endpoint,
                    "state": STATES[info.state],
                    "held": [name for bit, name in HOLDS if info.hold & bit],
                    "peer": address_text((<const char*>info.peer)[:info.peer_size]),
                    "in_flight": info.in_flight,
                    "asked": info.asked,
                    "queued_bytes": info.queued_bytes,
                    "partial_bytes": info.partial_bytes,
                    "age_ms": info.age_ms,
                    "idle_ms": info.idle_ms,
                })
            free(dump)
        return rows

    # --- test hooks: not reachable from configuration, command line or admin ---

    def _stall(self, uint64_t ms, uint32_t thread=0):
        """Make a thread sleep inside a turn, as a runaway loop would."""
        self.command(thread, COMMAND_STALL, ms, 0, 0, b"")

    def _fail_alloc(self, uint64_t k, uint32_t thread=0):
        """Make the k-th allocation from now fail, as memory running out would."""
        if self._adopted and not self._started:
            self.worlds[thread % self.count].budget.fail_at = k
            return
        self.command(thread, COMMAND_FAIL_ALLOC, k, 0, 0, b"")

    def _memory(self, uint32_t thread=0):
        """Bytes that a thread's buffers take; of one that does not run."""
        return self.worlds[thread % self.count].budget.used
