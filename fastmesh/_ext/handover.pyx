# cython: language_level=3
"""A world in a file (contract and layout: handover.pxd)."""

import os

from libc.errno cimport EINTR, ENOMEM, errno
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from .bytes cimport memcmp, memcpy, memset
from .conn cimport (
    conn_check_by,
    conn_doom,
    conn_free,
    conn_handle,
    conn_new,
    conn_of,
    conn_put,
    conn_thaw,
    conns_freeze,
    conns_restore,
    conns_restored,
    mem_give,
    mem_take,
    queue_append,
    world_clock,
)
from .counters cimport (
    C_ACCEPTED,
    C_CONNECTIONS,
    C_EJECTED,
    C_IN_FLIGHT,
    C_ONEWAY_ACCEPTED,
    C_UP,
    CLOSED_COUNT,
    CLOSED_DRAINED,
    HISTOGRAM_BUCKETS,
    HOPS,
    LATENCY_BUCKETS,
    P_CONNECTIONS,
    P_MEMORY,
    P_MEMORY_MAX,
    P_PARKED,
    P_STALLS,
    P_UPSTREAMS,
    PROCESS_COUNTERS,
    PUSHES,
    REQUESTS,
    ROW_COUNTERS,
    ROWS_MAX,
    Row,
    row_of,
)
from .crc32 cimport crc32_of
from .frame cimport CORRELATE_BY_ORDER, ID_TEXT_MAX, PARSE_OK, PATCH_IN_PLACE, FrameView, Limits
from .groups cimport (
    delivery_new,
    key_remove,
    key_restore,
    member_remove,
    member_restore,
    member_settle,
)
from .pool cimport pool_attach, pool_detach, pool_eject, pool_gone, pool_thaw
from .push cimport OP_FORWARD, PushFields, push_read
from .route cimport (
    KIND_BROKER,
    KIND_PEER,
    KIND_PUNT,
    KIND_PUSH,
    KIND_RELAY,
    ListenerRoutes,
    codec_named,
)
from .schedule cimport Share, here_of, owed_of, share_restore, stable_hash, totals_of
from .slots cimport (
    MISS_CLIENT_GONE,
    MISS_LATE,
    SLOT_GENERATIONS,
    SLOT_IN_FLIGHT,
    SLOT_PAGE,
    SLOT_RESTING,
    SLOT_REST_MS,
    Slot,
    slot_at,
    slot_each,
    slot_link,
    slot_order_push,
    slot_restore,
    slot_restore_free,
    slots_restore,
    slots_start,
)
from .timers cimport Timer, timer_clear, timer_set
from .world cimport (
    AREA_BYTES,
    CONN_CONNECTING,
    CONN_DRAINING,
    CONN_OPEN,
    DELIVERY_CALL,
    DELIVERY_FORWARD,
    DELIVERY_LOCAL,
    DELIVERY_PUBLISH,
    ENTRY_PART,
    ENTRY_REQUEST,
    EVENT_ANSWER,
    EVENT_OPENED,
    EVENTS_PER_TURN,
    FLOW_SHEDDING,
    HOLD_CONTROL,
    HOLD_EOF,
    HOLD_ORDER,
    HOLD_PARKED,
    HOLD_PUNT,
    HOLD_QUOTA,
    HOLD_SLOW_READER,
    IDS,
    NO_LISTENER,
    NO_RETRY,
    OWED_FROZEN,
    OWED_SAVED,
    OWED_THAWED,
    ROLE_DOWNSTREAM,
    ROLE_UPSTREAM,
    ROLE_WAKE,
    TIMER_SLOT,
    Cluster,
    Conn,
    Delivery,
    Endpoint,
    Entry,
    Fan,
    Group,
    Key,
    Link,
    Member,
    Notice,
    Parked,
    World,
)

cdef extern from "<sys/mman.h>" nogil:
    int memfd_create(const char* name, unsigned int flags)
    unsigned int MFD_CLOEXEC
    unsigned int MFD_ALLOW_SEALING
    void* mmap(void* at, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void* at, size_t size)
    int PROT_READ
    int MAP_PRIVATE
    void* MAP_FAILED

cdef extern from "<fcntl.h>" nogil:
    int fcntl(int fd, int command, ...)
    int F_ADD_SEALS
    int F_GET_SEALS
    int F_SEAL_SEAL
    int F_SEAL_SHRINK
    int F_SEAL_GROW
    int F_SEAL_WRITE

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    long write(int fd, const void* data, size_t n)
    long pwrite(int fd, const void* data, size_t n, long offset)

cdef extern from "<string.h>" nogil:
    size_t strnlen(const char* text, size_t most)
    int strcmp(const char* a, const char* b)

cdef extern from "atomics.h" nogil:
    void store64 "fm_store"(uint64_t* p, uint64_t v)
    uint32_t add32 "fm_add"(uint32_t* p, uint32_t v)

cdef enum:
    CRC_AT = 24                  # in BlobHead
    HOLD_MOVES = HOLD_QUOTA | HOLD_SLOW_READER | HOLD_PUNT | HOLD_EOF | HOLD_ORDER | HOLD_CONTROL
    HOLD_PARSING = HOLD_QUOTA | HOLD_PUNT | HOLD_ORDER | HOLD_CONTROL   # as in relay.pyx
    TOKEN_MICRO = 1000000        # likewise
    ONLY_MAX = 64                # bits of Rule.only
    PAGES_MAX = 1024             # slots' indices have 16 bits
    COUNTS_MAX = 1 << 16         # counters of a kind in one record
    FRAME_MAX = 0x7fffffff
    AGE_MS_MAX = 0x7fffffff      # what is older is as old as that, what is later never comes
    # in Load.slot_seen
    SEEN_FREE = 1
    SEEN_TAKEN = 2
    SEEN_FLYING = 4
    SEEN_OURS = 8                # in flight, and nobody asked: our heartbeat
    SEEN_ORDERED = 16
    SEEN_QUEUED = 32
    # in Load.endpoint_seen
    ENDPOINT_SAID = 1
    ENDPOINT_SAME = 2

cdef uint32_t NONE = 0xffffffff
cdef uint64_t NEVER = ~(<uint64_t>0)
cdef uint64_t STALE = 0x1ffffffff     # a handle of nobody, for ever: its index is never reached
cdef const char* MAGIC = b"fmworld\n"

STATE_VERSION = <int>BLOB_VERSION
STATE_VERSION_MIN = STATE_VERSION - 1
cdef uint32_t VERSION_MIN = <uint32_t>STATE_VERSION_MIN


# === freeze and thaw ==============================================================================

cdef void world_freeze(World* w, uint64_t number) noexcept nogil:
    world_clock(w)
    w.frozen_ns = w.now_ns
    w.stood_ms = w.now_ms
    conns_freeze(w)
    w.owed |= OWED_FROZEN
    store64(&w.frozen, number)


cdef inline uint64_t later(World* w, uint64_t at_ms, uint64_t stood_ms) noexcept nogil:
    """(What began while it stood stood for less.)"""
    return at_ms + stood_ms if at_ms + stood_ms < w.now_ms else w.now_ms


cdef void shift(World* w, Conn* c, uint64_t stood_ms) noexcept nogil:
    """Nobody was listened to, so nobody's silence counts."""
    cdef Link* link = c.links
    c.opened_ms = later(w, c.opened_ms, stood_ms)
    c.read_ms = later(w, c.read_ms, stood_ms)
    c.wrote_ms = later(w, c.wrote_ms, stood_ms)
    c.blocked_ms = later(w, c.blocked_ms, stood_ms)
    c.heartbeat_ms = later(w, c.heartbeat_ms, stood_ms)
    c.linger_until_ms += stood_ms
    if c.frame_began_ms:
        c.frame_began_ms = later(w, c.frame_began_ms, stood_ms)
    while link != NULL:
        link.pause_until_ms += stood_ms
        link = link.next


cdef void world_thaw(World* w) noexcept nogil:
    cdef uint32_t i
    cdef uint64_t stood_ms
    cdef Conn* c
    world_clock(w)
    stood_ms = w.now_ms - w.stood_ms if w.stood_ms else 0
    w.stood_ms = 0
    w.saving = 0
    w.owed &= <uint8_t>~<int>(OWED_FROZEN | OWED_SAVED)
    saved_drop(w)
    if w.left_epfd >= 0:
        close(w.left_epfd)
        w.left_epfd = -1
    store64(&w.frozen, 0)
    for i in range(w.conns_high):
        c = w.conns[i]
        if c == NULL or c.role == ROLE_WAKE:
            continue
        shift(w, c, stood_ms)
        if c.left:
            conn_doom(w, c, CLOSED_DRAINED, 0)
        elif c.fd >= 0:
            conn_thaw(w, c)
    pool_thaw(w)
    w.adopted = 0
    w.catching_up = w.conns_high // EVENTS_PER_TURN + 2
    world_clock(w)
    w.thawed_ns = w.now_ns
    w.owed |= OWED_THAWED


# === save =========================================================================================

cdef struct Writer:
    World* w
    int fd
    int error
    uint32_t used                # of the read area, which is idle and lent to us
    uint32_t crc
    BlobHead head
    uint32_t fds


cdef void write_all(Writer* out, const uint8_t* data, size_t n) noexcept nogil:
    cdef long done
    out.crc = crc32_of(out.crc, data, n)
    while n and out.error == 0:
        done = write(out.fd, data, n)
        if done < 0:
            if errno != EINTR:
                out.error = errno
            continue
        data += done
        n -= <size_t>done


cdef void put(Writer* out, const void* data, size_t n) noexcept nogil:
    out.head.bytes += n
    if n > AREA_BYTES - out.used:
        write_all(out, out.w.area, out.used)
        out.used = 0
        if n >= AREA_BYTES:
            write_all(out, <const uint8_t*>data, n)
            return
    if n:
        memcpy(out.w.area + out.used, data, n)
    out.used += <uint32_t>n


cdef void fill(Writer* out) noexcept nogil:
    """To the next multiple of 8."""
    cdef uint64_t zero = 0
    put(out, &zero, (8 - (out.head.bytes & 7)) & 7)


cdef void record(Writer* out, int kind, const void* fixed, uint32_t size, uint64_t data) noexcept nogil:
    """The head and the fixed part; the caller puts `data` bytes and fills up."""
    cdef RecordHead head
    head.kind = <uint16_t>kind
    head.flags = 0
    head.fixed = size
    head.data = data
    out.head.records += 1
    put(out, &head, sizeof(head))
    put(out, fixed, size)
    fill(out)


cdef inline uint64_t age(uint64_t now, uint64_t at) noexcept nogil:
    return now - at if now > at else 0


cdef inline uint64_t age_or_none(uint64_t now, uint64_t at) noexcept nogil:
    return age(now, at) + 1 if at else 0


cdef inline uint64_t left_ms(World* w, const Timer* t) noexcept nogil:
    """+ 1; 0 = not armed"""
    if t.link == NULL:
        return 0
    return age(t.at_ms, w.now_ms) + 1


cdef uint64_t limits_mark(World* w) noexcept nogil:
    return stable_hash(<const uint8_t*>&w.snapshot.limits, sizeof(w.snapshot.limits))


cdef uint32_t ids_of(World* w, uint32_t cluster, uint64_t only, uint32_t* ids) noexcept nogil:
    """Rule.only by the endpoints' stable ids."""
    cdef Cluster* k = w.cluster_of[cluster] if cluster < IDS else NULL
    cdef uint32_t i, count = 0
    if only == 0 or k == NULL:
        return 0
    for i in range(k.endpoints_count if k.endpoints_count < ONLY_MAX else <uint32_t>ONLY_MAX):
        if (only >> i) & 1:
            ids[count] = k.endpoints[i].id
            count += 1
    return count


cdef void name_codec(uint8_t* room, const Codec* codec) noexcept nogil:
    memset(room, 0, CODEC_NAME_BYTES)
    memcpy(room, codec.name, strnlen(codec.name, CODEC_NAME_BYTES - 1))


cdef inline bint moves(const Conn* c) noexcept nogil:
    return c != NULL and (c.role == ROLE_DOWNSTREAM or c.role == ROLE_UPSTREAM)


cdef void put_counters(Writer* out) noexcept nogil:
    cdef World* w = out.w
    cdef BlobProcess process
    cdef BlobRow row
    cdef Parked* p
    cdef uint32_t i, j
    cdef const uint64_t* numbers
    cdef bint used
    process.counters = PROCESS_COUNTERS
    process.hops = HOPS
    process.buckets = HISTOGRAM_BUCKETS
    process.pad = 0
    record(out, BLOB_PROCESS, &process, sizeof(process), sizeof(w.counters.p) + sizeof(w.counters.hop_sum_ns) +
           sizeof(w.counters.hop))
    put(out, w.counters.p, sizeof(w.counters.p))
    put(out, w.counters.hop_sum_ns, sizeof(w.counters.hop_sum_ns))
    put(out, w.counters.hop, sizeof(w.counters.hop))
    # A frame that waits for a verdict travels as unread bytes: it will be accepted again.
    p = w.parked
    while p != NULL:
        row_of(w.counters, p.row).c[REQUESTS + (C_ONEWAY_ACCEPTED if p.oneway else C_ACCEPTED)] -= 1
        p = p.next
    for i in range(w.counters.rows_used):
        numbers = <const uint64_t*>&w.counters.rows[i]
        used = False
        for j in range(sizeof(Row) // 8):
            if numbers[j]:
                used = True
                break
        if not used:
            continue
        row.row = i
        row.counters = ROW_COUNTERS
        row.latencies = LATENCY_BUCKETS
        row.pad = 0
        record(out, BLOB_ROW, &row, sizeof(row), sizeof(Row))
        put(out, numbers, sizeof(Row))
    p = w.parked
    while p != NULL:
        row_of(w.counters, p.row).c[REQUESTS + (C_ONEWAY_ACCEPTED if p.oneway else C_ACCEPTED)] += 1
        p = p.next


cdef void put_world(Writer* out) noexcept nogil:
    cdef World* w = out.w
    cdef BlobWorld world
    cdef BlobBucket bucket
    cdef BlobIndex index
    cdef Parked* p
    cdef uint32_t i
    world.tickets = w.tickets
    world.sample_count = w.sample_count
    record(out, BLOB_WORLD, &world, sizeof(world), 0)
    for i in range(<uint32_t>ROWS_MAX):
        if w.buckets[i].filled_ns == 0:
            continue
        bucket.row = i
        bucket.pad = 0
        bucket.tokens_micro = w.buckets[i].tokens_micro
        bucket.filled_age_ns = age(w.now_ns, w.buckets[i].filled_ns)
        # A frame that waits for a verdict will be accepted again, and take its token again.
        p = w.parked
        while p != NULL:
            if p.row == i:
                bucket.tokens_micro += TOKEN_MICRO
            p = p.next
        record(out, BLOB_BUCKET, &bucket, sizeof(bucket), 0)
    index.high = w.conns_high
    index.pad = 0
    record(out, BLOB_INDEX, &index, sizeof(index), <uint64_t>w.conns_high * 4)
    put(out, w.generations, <size_t>w.conns_high * 4)
    fill(out)


cdef void put_endpoints(Writer* out) noexcept nogil:
    cdef World* w = out.w
    cdef BlobEndpoint b
    cdef Cluster* k = w.clusters
    cdef Endpoint* e
    cdef uint32_t i
    while k != NULL:
        for i in range(k.endpoints_count):
            e = k.endpoints[i]
            memset(&b, 0, sizeof(b))
            b.id = e.id
            b.cluster = k.id
            b.row = e.row
            b.live_groups = e.live_groups_count
            name_codec(b.codec, k.codec)
            b.binding = k.binding
            b.kind = k.kind
            b.ever_up = e.ever_up
            b.address_size = e.address_size
            memcpy(b.address, e.address, sizeof(b.address))
            b.failures = e.failures
            b.ejections = e.ejections
            b.retry_in_ms = age(e.retry_at_ms, w.now_ms)
            if e.ejected_until_ms:
                b.ejected_for_ms = age(e.ejected_until_ms, w.now_ms) + 1
            b.ramp_age_ms = age_or_none(w.now_ms, e.ramp_from_ms)
            b.backoff_step = e.backoff_step
            record(out, BLOB_ENDPOINT, &b, sizeof(b), <uint64_t>e.live_groups_count * 4)
            put(out, e.live_groups, <size_t>e.live_groups_count * 4)
            fill(out)
        k = k.next


cdef void put_groups(Writer* out) noexcept nogil:
    cdef World* w = out.w
    cdef BlobGroup b
    cdef Group* g = w.groups
    cdef uint64_t size
    while g != NULL:
        memset(&b, 0, sizeof(b))
        b.id = g.id
        b.turns = g.turns
        size = 0
        if g.schedule != NULL:
            b.has_share = 1
            b.rules = g.share.rules_count
            b.entries = g.share.entries_count
            b.layout = g.share.layout
            b.last = g.share.last
            b.part = g.share.part
            size = 4 * <uint64_t>b.rules + 5 * <uint64_t>b.entries
        record(out, BLOB_GROUP, &b, sizeof(b), size)
        if size:
            put(out, totals_of(g.share), 4 * <size_t>b.rules)
            put(out, owed_of(g.share), 4 * <size_t>b.entries)
            put(out, here_of(g.share), b.entries)
            fill(out)
        g = g.next


cdef void put_conn(Writer* out, Conn* c) noexcept nogil:
    cdef World* w = out.w
    cdef BlobConn b
    cdef uint8_t[256] state
    cdef int state_bytes = 0
    cdef uint32_t part_bytes = c.part_size
    memset(&b, 0, sizeof(b))
    memset(state, 0, sizeof(state))
    if c.codec.state_bytes:
        state_bytes = c.codec.save(c.codec_state, state, sizeof(state))
    if state_bytes < 0 or not c.io.can_move(c):
        b.left = 1
        w.saved.left += 1
        state_bytes = 0
    if c.parked != NULL:
        part_bytes += c.parked.size
    b.index = c.index
    b.generation = c.generation
    b.descriptor = NONE
    if not b.left and c.state != CONN_CONNECTING:
        b.descriptor = out.fds
        w.saved.descriptors[out.fds] = c.fd
        out.fds += 1
    b.source = c.listener if c.role == ROLE_DOWNSTREAM else c.endpoint.id
    b.row = c.row
    b.state_bytes = <uint32_t>state_bytes
    b.part_bytes = part_bytes
    b.stream_row = c.stream_row
    name_codec(b.codec, c.codec)
    b.role = c.role
    b.state = c.state
    b.hold = c.hold
    if c.parked != NULL:
        b.hold &= <uint8_t>~<int>(HOLD_PARKED | HOLD_PUNT)
    b.kind = c.kind
    b.spoke = c.spoke
    b.greeted = c.greeted
    b.told = c.notice != NULL
    b.lingering = c.lingering
    b.close_reason = c.close_reason
    b.cut_through = c.cut_through
    b.dialect = c.dialect
    b.blocked = c.blocked
    b.streaming = c.streaming
    b.stream_block = c.stream_block
    b.answer_open = c.answer_open
    b.owner = c.owner
    b.last_client = c.last_client
    b.stream_to = c.stream_to
    b.opened_age_ms = age(w.now_ms, c.opened_ms)
    b.read_age_ms = age(w.now_ms, c.read_ms)
    b.wrote_age_ms = age(w.now_ms, c.wrote_ms)
    b.blocked_age_ms = age(w.now_ms, c.blocked_ms)
    b.began_age_ms = age_or_none(w.now_ms, c.frame_began_ms)
    b.heartbeat_age_ms = age(w.now_ms, c.heartbeat_ms)
    b.linger_in_ms = age(c.linger_until_ms, w.now_ms)
    b.timer_in_ms = left_ms(w, &c.timer)
    if c.role == ROLE_DOWNSTREAM:
        w.saved.downstream += 1
    else:
        w.saved.upstream += 1
    record(out, BLOB_CONN, &b, sizeof(b), <uint64_t>state_bytes + part_bytes)
    put(out, state, <size_t>state_bytes)
    if c.parked != NULL:
        put(out, c.parked.data, c.parked.size)
    put(out, c.part, c.part_size)
    fill(out)


cdef void put_link(Writer* out, Link* link) noexcept nogil:
    cdef BlobLink b
    memset(&b, 0, sizeof(b))
    b.conn = link.client.ordinal if link.client != NULL else NONE
    b.cluster = link.cluster
    b.upstream = link.upstream
    b.flow = link.flow
    b.pause_in_ms = age(link.pause_until_ms, out.w.now_ms)
    link.ordinal = out.head.links
    out.head.links += 1
    record(out, BLOB_LINK, &b, sizeof(b), 0)


cdef void put_member(Writer* out, Member* m) noexcept nogil:
    cdef BlobMember b
    memset(&b, 0, sizeof(b))
    b.conn = m.conn.ordinal if m.conn != NULL else NONE
    b.group = m.group.id if m.group != NULL else NONE
    b.prefetch = m.prefetch
    b.turn = m.turn
    m.ordinal = out.head.members
    out.head.members += 1
    record(out, BLOB_MEMBER, &b, sizeof(b), 0)


cdef void put_key(Writer* out, Key* key) noexcept nogil:
    cdef BlobKey b
    memset(&b, 0, sizeof(b))
    b.group = key.group.id if key.group != NULL else NONE
    b.member = key.member.ordinal if key.member != NULL else NONE
    b.hash = key.hash
    b.endpoint = key.endpoint
    key.ordinal = out.head.keys
    out.head.keys += 1
    record(out, BLOB_KEY, &b, sizeof(b), 0)


cdef void put_fan(Writer* out, Fan* fan) noexcept nogil:
    cdef BlobFan b
    memset(&b, 0, sizeof(b))
    b.asker = fan.asker
    b.orig = fan.orig
    b.hint = fan.hint
    b.later = fan.later
    b.consumed = fan.consumed
    b.silent = fan.silent
    fan.ordinal = out.head.fans
    out.head.fans += 1
    record(out, BLOB_FAN, &b, sizeof(b), 0)


cdef Delivery* next_delivery(World* w, uint32_t* at, uint32_t* cursor) noexcept nogil:
    """Of all connections; start with 0, 0."""
    cdef Slot* slot
    cdef Conn* c
    while at[0] < w.conns_high:
        c = w.conns[at[0]]
        if moves(c) and c.sent.used:
            slot = slot_each(&c.sent, cursor)
            while slot != NULL:
                if slot.delivery != NULL:
                    return <Delivery*>slot.delivery
                slot = slot_each(&c.sent, cursor)
        at[0] += 1
        cursor[0] = 0
    return NULL


cdef void put_shared(Writer* out) noexcept nogil:
    """What several slots or entries point at, each once: links, members, keys, fans."""
    cdef World* w = out.w
    cdef Conn* c
    cdef Link* link
    cdef Member* m
    cdef Entry* e
    cdef Delivery* d
    cdef uint32_t i, at, cursor
    for i in range(w.conns_high):
        c = w.conns[i]
        if not moves(c):
            continue
        e = c.head
        while e != NULL:
            if e.link != NULL:
                e.link.ordinal = NONE
            e = e.next
        m = c.members
        while m != NULL:
            m.ordinal = NONE
            m = m.next_of_conn
    at = cursor = 0
    d = next_delivery(w, &at, &cursor)
    while d != NULL:
        if d.member != NULL:
            d.member.ordinal = NONE
        if d.key != NULL:
            d.key.ordinal = NONE
        if d.fan != NULL:
            d.fan.ordinal = NONE
        d = next_delivery(w, &at, &cursor)
    for i in range(w.conns_high):
        c = w.conns[i]
        if moves(c):
            link = c.links
            while link != NULL:
                put_link(out, link)
                link = link.next
    for i in range(w.conns_high):
        c = w.conns[i]
        if moves(c):
            e = c.head
            while e != NULL:
                if e.link != NULL and e.link.ordinal == NONE:
                    put_link(out, e.link)
                e = e.next
    for i in range(w.conns_high):
        c = w.conns[i]
        if moves(c):
            m = c.members
            while m != NULL:
                put_member(out, m)
                m = m.next_of_conn
    at = cursor = 0
    d = next_delivery(w, &at, &cursor)
    while d != NULL:
        if d.member != NULL and d.member.ordinal == NONE:
            put_member(out, d.member)
        d = next_delivery(w, &at, &cursor)
    at = cursor = 0
    d = next_delivery(w, &at, &cursor)
    while d != NULL:
        if d.key != NULL and d.key.ordinal == NONE:
            put_key(out, d.key)
        d = next_delivery(w, &at, &cursor)
    at = cursor = 0
    d = next_delivery(w, &at, &cursor)
    while d != NULL:
        if d.fan != NULL and d.fan.ordinal == NONE:
            put_fan(out, d.fan)
        d = next_delivery(w, &at, &cursor)


cdef void put_slot(Writer* out, Slot* slot) noexcept nogil:
    cdef World* w = out.w
    cdef BlobSlot b
    cdef Delivery* d = <Delivery*>slot.delivery
    cdef uint32_t[64] ids
    memset(&b, 0, sizeof(b))
    b.index = slot.index
    b.generation = slot.generation
    b.state = slot.state
    b.rest_cause = slot.rest_cause
    b.last_cause = slot.last_cause
    b.tries = slot.tries
    b.sampled = slot.sampled
    b.block = slot.block
    b.cluster = slot.cluster
    b.hint = slot.hint
    b.row = slot.row
    b.bytes = slot.bytes
    b.orig = slot.orig
    b.asker = slot.asker if slot.state == SLOT_IN_FLIGHT else 0
    b.timer_in_ms = left_ms(w, &slot.timer)
    b.received_age_ns = age_or_none(w.now_ns, slot.received_ns)
    b.sent_age_ns = age_or_none(w.now_ns, slot.sent_ns)
    b.trace = slot.trace
    b.member = b.key = b.fan = NONE
    if d != NULL:
        b.delivery = d.kind + 1
        b.limited = d.only != 0
        b.only = <uint16_t>ids_of(w, slot.cluster, d.only, ids)
        b.copy_bytes = d.copy_size if d.copy != NULL else 0
        b.group = d.group
        if d.member != NULL:
            b.member = d.member.ordinal
        if d.key != NULL:
            b.key = d.key.ordinal
        if d.fan != NULL:
            b.fan = d.fan.ordinal
        b.ticket = d.notice.a
    if b.asker:
        if slot.block == PUSHES:
            w.saved.pushes += 1
        else:
            w.saved.requests += 1
    record(out, BLOB_SLOT, &b, sizeof(b), 4 * <uint64_t>b.only + b.copy_bytes)
    put(out, ids, 4 * <size_t>b.only)
    if b.copy_bytes:
        put(out, d.copy, b.copy_bytes)
    fill(out)


cdef void put_entry(Writer* out, const Entry* e) noexcept nogil:
    cdef World* w = out.w
    cdef BlobEntry b
    cdef uint32_t[64] ids
    memset(&b, 0, sizeof(b))
    b.size = e.size - e.written
    b.row = e.row
    b.link = e.link.ordinal if e.link != NULL else NONE
    b.slot = e.slot.index + 1 if e.slot != NULL else 0
    b.kind = e.kind
    b.block = e.block
    b.begun = e.begun
    b.tries = e.tries
    b.received_age_ns = age_or_none(w.now_ns, e.received_ns)
    if e.link != NULL:      # (nothing else is ever sent elsewhere)
        b.limited = e.only != 0
        b.only = <uint16_t>ids_of(w, e.link.cluster, e.only, ids)
    record(out, BLOB_ENTRY, &b, sizeof(b), 4 * <uint64_t>b.only + b.size)
    put(out, ids, 4 * <size_t>b.only)
    put(out, e.data + e.written, b.size)
    fill(out)


cdef void put_slots(Writer* out, Conn* c) noexcept nogil:
    """A connection's table, its slots, and its queue."""
    cdef BlobSlots b
    cdef BlobFree f
    cdef Slot* slot
    cdef Entry* e
    cdef uint32_t head, cursor = 0
    memset(&b, 0, sizeof(b))
    b.conn = c.ordinal
    b.pages = c.sent.pages_made
    head = c.sent.free_head
    while head:
        b.free += 1
        head = slot_at(&c.sent, head - 1).free_next
    slot = c.sent.order_head
    while slot != NULL:
        b.order += 1
        slot = slot.order_next
    b.heartbeat = c.heartbeat_open.index + 1 if c.heartbeat_open != NULL else 0
    record(out, BLOB_SLOTS, &b, sizeof(b), sizeof(BlobFree) * <uint64_t>b.free + 2 * <uint64_t>b.order)
    head = c.sent.free_head
    while head:
        slot = slot_at(&c.sent, head - 1)
        f.index = slot.index
        f.generation = slot.generation
        f.last_cause = slot.last_cause
        put(out, &f, sizeof(f))
        head = slot.free_next
    slot = c.sent.order_head
    while slot != NULL:
        put(out, &slot.index, 2)
        slot = slot.order_next
    fill(out)
    slot = c.flying
    while slot != NULL:
        put_slot(out, slot)
        slot = slot.flight_next
    slot = slot_each(&c.sent, &cursor)
    while slot != NULL:
        if slot.flight_link == NULL:
            put_slot(out, slot)
        slot = slot_each(&c.sent, &cursor)
    e = c.head
    while e != NULL:
        if not e.dropped:
            put_entry(out, e)
        e = e.next


cdef void saved_drop(World* w) noexcept nogil:
    if w.saved.memfd >= 0:
        close(w.saved.memfd)
    free(w.saved.descriptors)
    memset(&w.saved, 0, sizeof(w.saved))
    w.saved.memfd = -1
    store64(&w.saved_ready, 0)


cdef void world_save(World* w) noexcept nogil:
    cdef Writer out
    cdef BlobHead zero
    cdef uint32_t i
    saved_drop(w)
    world_clock(w)
    memset(&out, 0, sizeof(out))
    memset(&zero, 0, sizeof(zero))
    out.w = w
    for i in range(w.conns_high):
        if moves(w.conns[i]):
            w.conns[i].ordinal = out.head.conns
            out.head.conns += 1
    w.saved.descriptors = <int*>malloc(sizeof(int) * (out.head.conns + 1))
    if w.saved.descriptors == NULL:
        w.saved.error = ENOMEM
        return
    out.fd = memfd_create(b"fastmesh-world", MFD_CLOEXEC | MFD_ALLOW_SEALING)
    if out.fd < 0:
        w.saved.error = errno
        return
    w.saved.memfd = out.fd
    put(&out, &zero, sizeof(zero))
    write_all(&out, w.area, out.used)
    out.used = 0
    out.crc = 0                     # of what follows the head
    put_counters(&out)
    put_world(&out)
    put_endpoints(&out)
    put_groups(&out)
    for i in range(w.conns_high):
        if moves(w.conns[i]):
            put_conn(&out, w.conns[i])
    put_shared(&out)
    for i in range(w.conns_high):
        if moves(w.conns[i]) and (w.conns[i].sent.pages_made or w.conns[i].head != NULL):
            put_slots(&out, w.conns[i])
    record(&out, BLOB_END, NULL, 0, 0)
    write_all(&out, w.area, out.used)
    memcpy(out.head.magic, MAGIC, sizeof(out.head.magic))
    out.head.version = BLOB_VERSION
    out.head.head_bytes = sizeof(BlobHead)
    out.head.thread = w.thread
    out.head.threads = w.threads
    out.head.descriptors = out.fds
    out.head.limits_mark = limits_mark(w)
    out.head.frozen_at_ns = w.frozen_ns
    out.head.crc = 0
    out.head.crc = crc32_of(out.crc, <const uint8_t*>&out.head, sizeof(out.head))
    if out.error == 0 and pwrite(out.fd, &out.head, sizeof(out.head), 0) < 0:
        out.error = errno
    if out.error == 0 and fcntl(
            out.fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) != 0:
        out.error = errno
    w.saved.error = out.error
    w.saved.count = out.fds
    w.saved.bytes = out.head.bytes


# === verify =======================================================================================

cdef struct Piece:               # one record
    uint32_t kind
    uint32_t fixed_bytes
    const uint8_t* fixed
    const uint8_t* data
    uint64_t data_bytes
    uint64_t at
    uint64_t next


cdef int wrong(Load* load, uint64_t at, const char* what) noexcept nogil:
    load.wrong = what
    load.at = at
    return -1


cdef inline uint64_t padded(uint64_t n) noexcept nogil:
    return (n + 7) & ~<uint64_t>7


cdef int next_piece(Load* load, uint64_t at, Piece* piece) noexcept nogil:
    """The record at `at`. 1, or -1: it does not fit into the blob."""
    cdef const RecordHead* head
    cdef uint64_t left = load.size - at
    if left < sizeof(RecordHead):
        return wrong(load, at, b"it ends within a record's head")
    head = <const RecordHead*>(load.blob + at)
    left -= sizeof(RecordHead)
    if head.fixed > left or padded(head.fixed) > left:
        return wrong(load, at, b"a record is longer than the rest")
    left -= padded(head.fixed)
    if head.data > left or padded(head.data) > left:
        return wrong(load, at, b"a record's data is longer than the rest")
    piece.kind = head.kind
    if head.kind == 0 or head.kind >= BLOB_KINDS:
        if not head.flags & RECORD_OPTIONAL:
            return wrong(load, at, b"a record of a kind that this version must know and does not")
        piece.kind = 0
    piece.fixed_bytes = head.fixed
    piece.fixed = load.blob + at + sizeof(RecordHead)
    piece.data = piece.fixed + padded(head.fixed)
    piece.data_bytes = head.data
    piece.at = at
    piece.next = at + sizeof(RecordHead) + padded(head.fixed) + padded(head.data)
    return 1


cdef void take(const Piece* piece, void* room, uint32_t size) noexcept nogil:
    """What we know of the fixed part; what is not there is zero."""
    memset(room, 0, size)
    memcpy(room, piece.fixed, piece.fixed_bytes if piece.fixed_bytes < size else size)


cdef const Codec* codec_of(const Load* load, const uint8_t* name) noexcept nogil:
    cdef uint32_t i
    if strnlen(<const char*>name, CODEC_NAME_BYTES) == CODEC_NAME_BYTES:
        return NULL
    for i in range(load.codecs_count):
        if strcmp(load.codecs[i].name, <const char*>name) == 0:
            return load.codecs[i]
    return NULL


cdef uint32_t ordinal_named(const Load* load, uint64_t handle) noexcept nogil:
    """Of the connection with that handle in the blob, NONE = there is none."""
    cdef uint32_t index = <uint32_t>handle
    cdef uint32_t ordinal
    if index >= load.high:
        return NONE
    ordinal = load.ordinal_of[index]
    if ordinal == NONE or load.seen[ordinal].generation != <uint32_t>(handle >> 32):
        return NONE
    return ordinal


cdef void* table(Load* load, uint64_t count, size_t size) noexcept nogil:
    """(Counts were checked against what is left of the blob.)"""
    return calloc(count + 1, size)


cdef int verify_head(Load* load) noexcept nogil:
    cdef BlobHead head
    cdef uint32_t crc, zero = 0
    cdef uint64_t most = load.size // sizeof(RecordHead)
    memset(&load.head, 0, sizeof(load.head))
    if load.size < BLOB_BYTES_MIN:
        return wrong(load, 0, b"it is shorter than any world")
    memcpy(&head, load.blob, sizeof(head))
    if memcmp(head.magic, MAGIC, sizeof(head.magic)) != 0:
        return wrong(load, 0, b"it is no saved world")
    load.head.version = head.version
    if head.version < VERSION_MIN or head.version > BLOB_VERSION + 1:
        return wrong(load, 8, b"its version cannot be read here")
    if head.head_bytes < HEAD_BYTES_MIN or head.head_bytes & 7 or head.head_bytes > load.size:
        return wrong(load, 12, b"its head has no such length")
    if head.bytes != load.size or load.size & 7:
        return wrong(load, 16, b"it is not as long as it says")
    memset(&load.head, 0, sizeof(load.head))
    memcpy(&load.head, load.blob, head.head_bytes if head.head_bytes < sizeof(head) else sizeof(head))
    head = load.head
    crc = crc32_of(0, load.blob + head.head_bytes, load.size - head.head_bytes)
    crc = crc32_of(crc, load.blob, CRC_AT)
    crc = crc32_of(crc, <const uint8_t*>&zero, 4)
    crc = crc32_of(crc, load.blob + CRC_AT + 4, head.head_bytes - CRC_AT - 4)
    if crc != head.crc:
        return wrong(load, 24, b"its checksum does not hold")
    if head.threads == 0 or head.threads > 64 or head.thread >= head.threads:
        return wrong(load, 28, b"it is of no such thread")
    # (each of them has a record of its own)
    if head.records > most or head.conns > most or head.links > most or head.members > most or \
            head.keys > most or head.fans > most or head.descriptors > head.conns:
        return wrong(load, 40, b"it counts more than it can hold")
    return 0


cdef int verify_numbers(Load* load, const Piece* p) noexcept nogil:
    cdef BlobProcess process
    cdef BlobRow row
    cdef BlobBucket bucket
    if p.kind == BLOB_PROCESS:
        take(p, &process, sizeof(process))
        if process.counters > COUNTS_MAX or process.hops > COUNTS_MAX or process.buckets > COUNTS_MAX or \
                p.data_bytes != 8 * (process.counters + process.hops * (<uint64_t>process.buckets + 1)):
            return wrong(load, p.at, b"the process's counters have no such length")
    elif p.kind == BLOB_ROW:
        take(p, &row, sizeof(row))
        if row.row >= ROWS_MAX:
            return wrong(load, p.at, b"a row of counters that cannot be")
        if row.counters > COUNTS_MAX or row.latencies > COUNTS_MAX or \
                p.data_bytes != 8 * (<uint64_t>row.counters + row.latencies):
            return wrong(load, p.at, b"a row's counters have no such length")
    elif p.kind == BLOB_BUCKET:
        take(p, &bucket, sizeof(bucket))
        if bucket.row >= ROWS_MAX:
            return wrong(load, p.at, b"a bucket of a row that cannot be")
    return 0


cdef int verify_index(Load* load, const Piece* p) noexcept nogil:
    cdef BlobIndex index
    take(p, &index, sizeof(index))
    if load.ordinal_of != NULL:
        return wrong(load, p.at, b"the handles are there twice")
    if index.high == 0 or index.high > CONNS_MAX or p.data_bytes != 4 * <uint64_t>index.high:
        return wrong(load, p.at, b"the handles have no such length")
    load.ordinal_of = <uint32_t*>malloc(4 * <size_t>index.high)
    if load.ordinal_of == NULL:
        return -1
    memset(load.ordinal_of, 0xff, 4 * <size_t>index.high)
    load.high = index.high
    load.generations = <const uint32_t*>p.data
    load.tally.need += (2 * <uint64_t>index.high + 256) * (sizeof(Conn*) + 8)
    return 0


cdef int verify_endpoint(Load* load, const Piece* p) noexcept nogil:
    cdef BlobEndpoint b
    cdef uint32_t i
    cdef const uint32_t* ids = <const uint32_t*>p.data
    take(p, &b, sizeof(b))
    if b.id >= IDS or b.cluster >= IDS or load.endpoint_seen[b.id]:
        return wrong(load, p.at, b"an endpoint of no such id")
    if p.data_bytes != 4 * <uint64_t>b.live_groups:
        return wrong(load, p.at, b"an endpoint's groups have no such length")
    for i in range(1, b.live_groups):
        if ids[i] < ids[i - 1]:
            return wrong(load, p.at, b"an endpoint's groups do not ascend")
    if b.address_size > sizeof(b.address):
        return wrong(load, p.at, b"an endpoint's address has no such length")
    load.endpoint_seen[b.id] = ENDPOINT_SAID
    load.tally.need += sizeof(Endpoint) + p.data_bytes
    return 0


cdef int verify_group(Load* load, const Piece* p) noexcept nogil:
    cdef BlobGroup b
    take(p, &b, sizeof(b))
    if b.id >= IDS:
        return wrong(load, p.at, b"a group of no such id")
    if p.data_bytes != (4 * <uint64_t>b.rules + 5 * <uint64_t>b.entries if b.has_share else 0):
        return wrong(load, p.at, b"a group's share has no such length")
    return 0


cdef bint state_fits(const Codec* codec, const uint8_t* data, uint32_t size) noexcept nogil:
    cdef void* state = calloc(1, codec.state_bytes + 1)
    cdef bint fits = state != NULL and codec.load(state, data, size) >= 0
    free(state)
    return fits


cdef int verify_conn(Load* load, const Piece* p) noexcept nogil:
    cdef BlobConn b
    cdef SeenConn* seen
    cdef const Codec* codec
    take(p, &b, sizeof(b))
    if load.ordinal_of == NULL or load.seen_count == load.head.conns:
        return wrong(load, p.at, b"a connection too many")
    if b.index == 0 or b.index >= load.high or load.ordinal_of[b.index] != NONE or b.generation == 0 or \
            load.generations[b.index] != b.generation:
        return wrong(load, p.at, b"a connection whose handle cannot be")
    codec = codec_of(load, b.codec)
    if codec == NULL:
        return wrong(load, p.at, b"a connection whose codec is not known here")
    if b.role == ROLE_DOWNSTREAM:
        if b.state != CONN_OPEN and b.state != CONN_DRAINING or b.kind > KIND_PUNT:
            return wrong(load, p.at, b"a client connection in no such state")
    elif b.role == ROLE_UPSTREAM:
        if b.state > CONN_DRAINING or (b.kind != KIND_RELAY and b.kind != KIND_BROKER and b.kind != KIND_PEER) or \
                b.lingering:
            return wrong(load, p.at, b"an upstream connection in no such state")
    else:
        return wrong(load, p.at, b"a connection of no such role")
    if b.descriptor == NONE:
        if not b.left and b.state != CONN_CONNECTING:
            return wrong(load, p.at, b"a connection without a descriptor")
    elif b.left or b.state == CONN_CONNECTING or b.descriptor >= load.head.descriptors or \
            load.fd_seen[b.descriptor]:
        return wrong(load, p.at, b"a connection whose descriptor cannot be")
    else:
        load.fd_seen[b.descriptor] = 1
        load.fds_seen += 1
    # (a client whose listener speaks something else by now says NO_LISTENER)
    if b.hold & ~<int>HOLD_MOVES or b.close_reason >= CLOSED_COUNT or \
            (b.source >= IDS and (b.role != ROLE_DOWNSTREAM or b.source != NO_LISTENER)) or \
            (b.stream_block != REQUESTS and b.stream_block != PUSHES):
        return wrong(load, p.at, b"a connection with fields out of range")
    if b.state_bytes > CODEC_STATE_MAX or b.part_bytes > FRAME_MAX or \
            p.data_bytes != <uint64_t>b.state_bytes + b.part_bytes:
        return wrong(load, p.at, b"a connection's bytes have no such length")
    if codec.state_bytes == 0 or b.left:
        if b.state_bytes:
            return wrong(load, p.at, b"a connection with a codec's state that has none")
    elif not state_fits(codec, p.data, b.state_bytes):
        return wrong(load, p.at, b"a connection whose codec's state is not one")
    seen = &load.seen[load.seen_count]
    seen.index = b.index
    seen.generation = b.generation
    seen.role = b.role
    seen.kind = b.kind
    seen.plain = codec.state_bytes == 0 and codec.patch_kind == PATCH_IN_PLACE
    seen.by_order = codec.correlation == CORRELATE_BY_ORDER
    seen.codec = codec
    if b.kind != KIND_RELAY and not seen.plain:
        return wrong(load, p.at, b"a connection of the message mesh in another protocol")
    load.ordinal_of[b.index] = load.seen_count
    load.seen_count += 1
    load.tally.need += sizeof(Conn) + codec.state_bytes + b.part_bytes + sizeof(Notice)
    load.tally.partial_bytes += b.part_bytes
    if b.left:
        load.tally.left += 1
    if b.role == ROLE_DOWNSTREAM:
        load.tally.downstream += 1
    else:
        load.tally.upstream += 1
        load.tally.need += sizeof(Endpoint)     # should its own not be known any more
    return 0


cdef bint is_client(const Load* load, uint32_t ordinal) noexcept nogil:
    return ordinal < load.seen_count and load.seen[ordinal].role == ROLE_DOWNSTREAM


cdef bint one_protocol(const Load* load, uint32_t a, uint32_t b) noexcept nogil:
    """A frame that one of them scanned can be given another id by the other."""
    return load.seen[a].codec.scan == load.seen[b].codec.scan and load.seen[a].codec.patch == load.seen[b].codec.patch


cdef int verify_shared(Load* load, const Piece* p) noexcept nogil:
    cdef BlobLink link
    cdef BlobMember member
    cdef BlobKey key
    cdef BlobFan fan
    cdef uint32_t up
    if p.kind == BLOB_LINK:
        take(p, &link, sizeof(link))
        if load.links_count == load.head.links:
            return wrong(load, p.at, b"a link too many")
        up = ordinal_named(load, link.upstream)
        if (link.conn != NONE and not is_client(load, link.conn)) or link.cluster >= IDS or \
                link.flow > FLOW_SHEDDING or (up != NONE and load.seen[up].role != ROLE_UPSTREAM):
            return wrong(load, p.at, b"a link that cannot be")
        load.link_orphan[load.links_count] = link.conn == NONE
        load.links_count += 1
        load.tally.need += sizeof(Link)
    elif p.kind == BLOB_MEMBER:
        take(p, &member, sizeof(member))
        if load.members_count == load.head.members:
            return wrong(load, p.at, b"a member too many")
        if (member.conn == NONE) != (member.group == NONE) or \
                (member.conn != NONE and (not is_client(load, member.conn) or member.group >= IDS or
                                          load.seen[member.conn].kind != KIND_PUSH)):
            return wrong(load, p.at, b"a member that cannot be")
        load.members_count += 1
        load.tally.need += sizeof(Member) + 4 * sizeof(Member*)
    elif p.kind == BLOB_KEY:
        take(p, &key, sizeof(key))
        if load.keys_count == load.head.keys:
            return wrong(load, p.at, b"a key too many")
        if (key.group != NONE and key.group >= IDS) or (key.member != NONE and key.member >= load.members_count) or \
                key.endpoint >= IDS:
            return wrong(load, p.at, b"a key that cannot be")
        load.key_member[load.keys_count] = key.member
        load.keys_count += 1
        load.tally.need += sizeof(Key) + 4 * sizeof(Key*)
    else:
        take(p, &fan, sizeof(fan))
        if load.fans_count == load.head.fans or fan.orig.text_size > ID_TEXT_MAX:
            return wrong(load, p.at, b"a broadcast that cannot be")
        load.fans_count += 1
        load.tally.need += sizeof(Fan)
    return 0


cdef int finish_slots(Load* load, uint64_t at) noexcept nogil:
    """Every slot of the table was described once; what points at slots by index points at the right
    ones."""
    cdef uint32_t i
    cdef uint16_t index
    if load.slots_left:
        return wrong(load, at, b"slots of a connection are missing")
    for i in range(load.order_count):
        memcpy(&index, load.order + 2 * <size_t>i, 2)
        if index >= load.slots_count or not load.slot_seen[index] & SEEN_TAKEN or load.slot_seen[index] & SEEN_ORDERED:
            return wrong(load, at, b"an order of answers that cannot be")
        load.slot_seen[index] |= SEEN_ORDERED
    if load.ours != (load.heartbeat != 0) or \
            (load.heartbeat and (load.heartbeat > load.slots_count or
                                 not load.slot_seen[load.heartbeat - 1] & SEEN_OURS)):
        return wrong(load, at, b"a heartbeat that cannot be")
    load.order_count = 0
    load.heartbeat = 0
    load.ours = 0
    return 0


cdef int verify_slots(Load* load, const Piece* p) noexcept nogil:
    cdef BlobSlots b
    cdef BlobFree f
    cdef uint32_t i
    take(p, &b, sizeof(b))
    if b.conn >= load.seen_count or (load.table_of != NONE and b.conn <= load.table_of):
        return wrong(load, p.at, b"a table of no such connection")
    load.table_of = b.conn
    if b.pages > PAGES_MAX or b.free > b.pages * SLOT_PAGE or b.order > b.pages * SLOT_PAGE or \
            p.data_bytes != sizeof(BlobFree) * <uint64_t>b.free + 2 * <uint64_t>b.order:
        return wrong(load, p.at, b"a table of no such length")
    if (b.order and not load.seen[b.conn].by_order) or (b.heartbeat and load.seen[b.conn].role != ROLE_UPSTREAM):
        return wrong(load, p.at, b"a table that its codec does not keep")
    load.slots_count = b.pages * SLOT_PAGE
    load.slots_left = load.slots_count - b.free
    load.order = p.data + sizeof(BlobFree) * <size_t>b.free
    load.order_count = b.order
    load.heartbeat = b.heartbeat
    load.first_entry = True
    memset(load.slot_seen, 0, load.slots_count)
    for i in range(b.free):
        memcpy(&f, p.data + sizeof(BlobFree) * <size_t>i, sizeof(f))
        if f.index >= load.slots_count or load.slot_seen[f.index] or f.generation == 0 or \
                f.generation > SLOT_GENERATIONS or f.last_cause > MISS_CLIENT_GONE:
            return wrong(load, p.at, b"a free slot that cannot be")
        load.slot_seen[f.index] = SEEN_FREE
    load.tally.need += <uint64_t>b.pages * (SLOT_PAGE * sizeof(Slot) + 2 * sizeof(Slot*)) + 4 * sizeof(Slot*)
    return 0


cdef bint copy_reads(const Codec* codec, const uint8_t* copy, uint32_t size, bint as_forward) noexcept nogil:
    """It is one whole frame, and one that may be offered again as what it was."""
    cdef FrameView view
    cdef PushFields fields
    cdef Limits limits
    limits.frame_bytes_max = size
    # (scan does not write, and what the view points at is only read here)
    if codec.scan(NULL, <uint8_t*>copy, size, &limits, 0, &view) != PARSE_OK or view.size != size:
        return False
    return not as_forward or (push_read(&view, &fields) > 0 and fields.op == OP_FORWARD)


cdef int verify_delivery(Load* load, const Piece* p, const BlobSlot* b) noexcept nogil:
    cdef SeenConn* on = &load.seen[load.table_of]
    cdef uint32_t kind = b.delivery - 1
    cdef bint flying = b.state == SLOT_IN_FLIGHT
    cdef uint32_t at_member = NONE
    if kind > DELIVERY_CALL or not on.plain or b.group >= IDS:
        return wrong(load, p.at, b"a delivery that cannot be")
    if (kind == DELIVERY_CALL) != (flying and b.asker == 0) or \
            (kind == DELIVERY_PUBLISH and flying and not is_client(load, ordinal_named(load, b.asker))):
        return wrong(load, p.at, b"a delivery that nobody asked for")
    if (b.member != NONE and (b.member >= load.members_count or kind != DELIVERY_LOCAL)) or \
            (b.key != NONE and (b.key >= load.keys_count or kind == DELIVERY_PUBLISH or kind == DELIVERY_CALL)) or \
            (b.fan != NONE and (b.fan >= load.fans_count or kind != DELIVERY_LOCAL or not flying)):
        return wrong(load, p.at, b"a delivery that points at nothing")
    if b.key != NONE:
        at_member = load.key_member[b.key]
        if at_member != b.member:
            return wrong(load, p.at, b"a delivery that is not where its key is")
        load.key_used[b.key] += 1
    if b.fan != NONE:
        load.fan_used[b.fan] += 1
    if b.copy_bytes:
        if kind != DELIVERY_FORWARD and kind != DELIVERY_PUBLISH:
            return wrong(load, p.at, b"a delivery with a copy that it does not keep")
        if not copy_reads(on.codec, p.data + 4 * <size_t>b.only, b.copy_bytes, kind == DELIVERY_FORWARD):
            return wrong(load, p.at, b"a delivery whose copy is no frame")
    load.tally.need += sizeof(Delivery) + b.copy_bytes
    return 0


cdef int verify_slot(Load* load, const Piece* p) noexcept nogil:
    cdef BlobSlot b
    cdef uint32_t asker
    cdef uint8_t mark = SEEN_TAKEN
    take(p, &b, sizeof(b))
    if load.slots_left == 0 or b.index >= load.slots_count or load.slot_seen[b.index]:
        return wrong(load, p.at, b"a slot too many")
    if b.generation == 0 or b.generation > SLOT_GENERATIONS or b.last_cause > MISS_CLIENT_GONE or \
            (b.block != REQUESTS and b.block != PUSHES) or b.orig.text_size > ID_TEXT_MAX:
        return wrong(load, p.at, b"a slot with fields out of range")
    if b.state == SLOT_IN_FLIGHT:
        if b.rest_cause:
            return wrong(load, p.at, b"a slot that rests in flight")
        mark |= SEEN_FLYING
        if b.asker:
            asker = ordinal_named(load, b.asker)
            if asker == NONE:
                return wrong(load, p.at, b"a slot that nobody asked for")
            if not one_protocol(load, asker, load.table_of):
                return wrong(load, p.at, b"a slot that was asked for in another protocol")
            if b.block == PUSHES:
                load.tally.pushes += 1
            else:
                load.tally.requests += 1
        elif b.delivery == 0:
            mark |= SEEN_OURS
            load.ours += 1
    elif b.state == SLOT_RESTING:
        if b.rest_cause != MISS_LATE and b.rest_cause != MISS_CLIENT_GONE or b.asker:
            return wrong(load, p.at, b"a slot that rests for no reason")
        load.tally.resting += 1
    else:
        return wrong(load, p.at, b"a slot in no such state")
    if b.only > ONLY_MAX or b.copy_bytes > FRAME_MAX or p.data_bytes != 4 * <uint64_t>b.only + b.copy_bytes:
        return wrong(load, p.at, b"a slot's bytes have no such length")
    if b.delivery:
        if verify_delivery(load, p, &b) != 0:
            return -1
    elif b.only or b.copy_bytes:
        return wrong(load, p.at, b"a slot with a copy and no delivery")
    load.slot_seen[b.index] = mark
    load.slots_left -= 1
    return 0


cdef int verify_entry(Load* load, const Piece* p) noexcept nogil:
    cdef BlobEntry b
    cdef uint8_t mark
    take(p, &b, sizeof(b))
    if b.kind > ENTRY_PART or (b.block != REQUESTS and b.block != PUSHES) or \
            (b.begun and not load.first_entry):
        return wrong(load, p.at, b"a queued frame with fields out of range")
    load.first_entry = False
    if b.only > ONLY_MAX or b.size == 0 or b.size > FRAME_MAX or p.data_bytes != 4 * <uint64_t>b.only + b.size:
        return wrong(load, p.at, b"a queued frame has no such length")
    if b.slot:
        mark = load.slot_seen[b.slot - 1] if b.slot <= load.slots_count else <uint8_t>0
        if b.kind != ENTRY_REQUEST or not mark & SEEN_TAKEN or mark & SEEN_QUEUED or \
                not (b.begun or mark & SEEN_FLYING):
            return wrong(load, p.at, b"a queued frame of no such slot")
        load.slot_seen[b.slot - 1] |= SEEN_QUEUED
    if b.link != NONE:
        if b.link >= load.links_count:
            return wrong(load, p.at, b"a queued frame of no such link")
        load.link_used[b.link] += 1
    load.tally.need += sizeof(Entry) + b.size
    load.tally.queued_bytes += b.size
    return 0


cdef int verify_end(Load* load, const Piece* p, uint32_t records) noexcept nogil:
    cdef uint32_t i
    if p.next != load.size or records != load.head.records:
        return wrong(load, p.at, b"it has not as many records as it says")
    if load.ordinal_of == NULL or load.seen_count != load.head.conns or load.fds_seen != load.head.descriptors or \
            load.links_count != load.head.links or load.members_count != load.head.members or \
            load.keys_count != load.head.keys or load.fans_count != load.head.fans:
        return wrong(load, p.at, b"records are missing")
    for i in range(load.links_count):
        if load.link_orphan[i] and load.link_used[i] == 0:
            return wrong(load, p.at, b"a link that nothing uses")
    for i in range(load.keys_count):
        if load.key_used[i] == 0:
            return wrong(load, p.at, b"a key that nothing uses")
    for i in range(load.fans_count):
        if load.fan_used[i] == 0:
            return wrong(load, p.at, b"a broadcast without copies")
    return 1


cdef bint follows(uint32_t kind, uint32_t before) noexcept nogil:
    if kind == BLOB_SLOTS or kind == BLOB_END:
        return before < BLOB_END
    if kind == BLOB_SLOT:
        return before == BLOB_SLOTS or before == BLOB_SLOT
    if kind == BLOB_ENTRY:
        return before >= BLOB_SLOTS and before < BLOB_END
    return kind >= before


cdef int verify_piece(Load* load, const Piece* p, uint32_t before, uint32_t records) noexcept nogil:
    """0 = go on, 1 = that was the last one, -1 = wrong."""
    if not follows(p.kind, before):
        return wrong(load, p.at, b"a record out of its place")
    if before >= BLOB_SLOTS and (p.kind == BLOB_SLOTS or p.kind >= BLOB_ENTRY) and finish_slots(load, p.at) != 0:
        return -1
    if p.kind <= BLOB_BUCKET:
        return verify_numbers(load, p)
    if p.kind == BLOB_INDEX:
        return verify_index(load, p)
    if p.kind == BLOB_ENDPOINT:
        return verify_endpoint(load, p)
    if p.kind == BLOB_GROUP:
        return verify_group(load, p)
    if p.kind == BLOB_CONN:
        return verify_conn(load, p)
    if p.kind <= BLOB_FAN:
        return verify_shared(load, p)
    if p.kind == BLOB_SLOTS:
        return verify_slots(load, p)
    if p.kind == BLOB_SLOT:
        return verify_slot(load, p)
    if p.kind == BLOB_ENTRY:
        return verify_entry(load, p)
    return verify_end(load, p, records)


cdef int handover_verify(Load* load) noexcept nogil:
    cdef Piece p
    cdef uint64_t at
    cdef uint32_t before = 0, records = 0
    cdef int found = 0
    if verify_head(load) != 0:
        return -1
    load.seen = <SeenConn*>table(load, load.head.conns, sizeof(SeenConn))
    load.fd_seen = <uint8_t*>table(load, load.head.descriptors, 1)
    load.link_orphan = <uint8_t*>table(load, load.head.links, 1)
    load.link_used = <uint32_t*>table(load, load.head.links, 4)
    load.key_member = <uint32_t*>table(load, load.head.keys, 4)
    load.key_used = <uint32_t*>table(load, load.head.keys, 4)
    load.fan_used = <uint32_t*>table(load, load.head.fans, 4)
    load.slot_seen = <uint8_t*>table(load, PAGES_MAX * SLOT_PAGE, 1)
    load.endpoint_seen = <uint8_t*>table(load, IDS, 1)
    if load.seen == NULL or load.fd_seen == NULL or load.link_orphan == NULL or load.link_used == NULL or \
            load.key_member == NULL or load.key_used == NULL or load.fan_used == NULL or \
            load.slot_seen == NULL or load.endpoint_seen == NULL:
        return -1
    load.table_of = NONE
    at = load.head.head_bytes
    while found == 0:
        if next_piece(load, at, &p) < 0:
            return -1
        records += 1
        at = p.next
        if p.kind == 0:
            continue
        found = verify_piece(load, &p, before, records)
        before = p.kind
    return 0 if found == 1 else -1


cdef void load_end(Load* load) noexcept nogil:
    free(load.seen)
    free(load.ordinal_of)
    free(load.fd_seen)
    free(load.link_orphan)
    free(load.link_used)
    free(load.key_member)
    free(load.key_used)
    free(load.fan_used)
    free(load.slot_seen)
    free(load.endpoint_seen)
    free(load.conns)
    free(load.links)
    free(load.members)
    free(load.keys)
    free(load.fans)
    free(load.gone)


# === build ========================================================================================
# Of verified records only, so that nothing here can fail but memory. Whatever is made is in one of
# the tables of `load` or hangs on a connection that is, so that undo() finds it.

cdef inline uint64_t ago(uint64_t now, uint64_t age) noexcept nogil:
    return now - age if age < now else 1


cdef inline uint64_t ago_or_none(uint64_t now, uint64_t age) noexcept nogil:
    return ago(now, age - 1) if age else 0


cdef inline uint64_t ahead(uint64_t now_ms, uint64_t in_ms) noexcept nogil:
    return now_ms + (in_ms if in_ms < AGE_MS_MAX else <uint64_t>AGE_MS_MAX)


cdef uint64_t handle_of(Load* load, uint64_t handle) noexcept nogil:
    """What a handle of the other process is here. Of a connection that is gone: nobody's."""
    cdef uint32_t ordinal
    if handle == 0:
        return 0
    ordinal = ordinal_named(load, handle)
    return conn_handle(load.conns[ordinal]) if ordinal != NONE else STALE


cdef uint64_t client_of(Load* load, uint32_t of, uint64_t handle) noexcept nogil:
    """The same of a client to which requests of that upstream may go."""
    cdef uint32_t ordinal = ordinal_named(load, handle)
    if ordinal != NONE and not (is_client(load, ordinal) and one_protocol(load, ordinal, of)):
        return STALE
    return handle_of(load, handle)


cdef uint64_t mask_of(World* w, uint32_t cluster, const uint8_t* ids, uint32_t count) noexcept nogil:
    """Rule.only from stable ids; those that the cluster has not any more drop out."""
    cdef Cluster* k = w.cluster_of[cluster] if cluster < IDS else NULL
    cdef uint64_t only = 0
    cdef uint32_t i, j, id
    if k == NULL:
        return 0
    for j in range(count):
        memcpy(&id, ids + 4 * <size_t>j, 4)
        for i in range(k.endpoints_count if k.endpoints_count < ONLY_MAX else <uint32_t>ONLY_MAX):
            if k.endpoints[i].id == id:
                only |= <uint64_t>1 << i
    return only


cdef void add_counters(World* w, const Piece* p) noexcept nogil:
    cdef BlobProcess b
    cdef uint64_t most = w.counters.p[P_MEMORY_MAX]
    cdef const uint64_t* numbers = <const uint64_t*>p.data
    cdef uint32_t i, hop
    take(p, &b, sizeof(b))
    for i in range(b.counters if b.counters < PROCESS_COUNTERS else <uint32_t>PROCESS_COUNTERS):
        if i == P_MEMORY_MAX:
            w.counters.p[i] = most if most > numbers[i] else numbers[i]
        elif i == P_STALLS:
            w.stalls += numbers[i]      # the watchdog's; copied every turn
        elif i != P_MEMORY and i != P_CONNECTIONS and i != P_UPSTREAMS and i != P_PARKED:
            w.counters.p[i] += numbers[i]
    numbers += b.counters
    for hop in range(b.hops if b.hops < HOPS else <uint32_t>HOPS):
        w.counters.hop_sum_ns[hop] += numbers[hop]
        for i in range(b.buckets if b.buckets < HISTOGRAM_BUCKETS else <uint32_t>HISTOGRAM_BUCKETS):
            w.counters.hop[hop][i] += numbers[b.hops + <size_t>hop * b.buckets + i]


cdef void add_row(World* w, const Piece* p) noexcept nogil:
    cdef BlobRow b
    cdef Row* row
    cdef const uint64_t* numbers = <const uint64_t*>p.data
    cdef uint32_t i
    take(p, &b, sizeof(b))
    row = row_of(w.counters, b.row)
    for i in range(b.counters if b.counters < ROW_COUNTERS else <uint32_t>ROW_COUNTERS):
        if i != REQUESTS + C_IN_FLIGHT and i != PUSHES + C_IN_FLIGHT and i != C_CONNECTIONS and i != C_UP and \
                i != C_EJECTED:
            row.c[i] += numbers[i]
    numbers += b.counters
    for i in range(b.latencies if b.latencies < LATENCY_BUCKETS else <uint32_t>LATENCY_BUCKETS):
        row.latency[i] += numbers[i]


cdef void add_numbers(Load* load, const Piece* p) noexcept nogil:
    cdef World* w = load.w
    cdef BlobWorld world
    cdef BlobBucket bucket
    cdef uint32_t i
    if p.kind == BLOB_PROCESS:
        add_counters(w, p)
    elif p.kind == BLOB_ROW:
        add_row(w, p)
    elif p.kind == BLOB_WORLD:
        take(p, &world, sizeof(world))
        # Tickets count in steps of the number of threads: whatever any thread gave is given by none
        # again, else a late verdict would be for another frame.
        world.tickets = (world.tickets + 1) * load.head.threads // w.threads + 1
        for i in range(w.threads):
            if w.worlds[i].tickets < world.tickets:
                w.worlds[i].tickets = world.tickets
        if not load.merged:
            w.sample_count = world.sample_count
    else:
        take(p, &bucket, sizeof(bucket))
        w.buckets[bucket.row].tokens_micro += bucket.tokens_micro
        w.buckets[bucket.row].filled_ns = ago(w.now_ns, bucket.filled_age_ns)


cdef int build_endpoint(Load* load, const Piece* p) noexcept nogil:
    cdef World* w = load.w
    cdef BlobEndpoint b
    cdef Endpoint* e
    cdef Cluster* k
    take(p, &b, sizeof(b))
    e = w.endpoint_of[b.id]
    if e == NULL or e.cluster == NULL:
        return 0
    k = e.cluster
    if k.id == b.cluster and k.binding == b.binding and k.kind == b.kind and \
            k.codec == codec_of(load, b.codec) and e.address_size == b.address_size and \
            memcmp(e.address, b.address, b.address_size) == 0:
        load.endpoint_seen[b.id] = ENDPOINT_SAME
    if load.merged:
        return 0        # health is a thread's own: that of this one stands
    e.ever_up = b.ever_up != 0
    if load.endpoint_seen[b.id] != ENDPOINT_SAME:
        return 0        # what failed or serves at another place says nothing of this one
    e.failures = b.failures
    e.ejections = b.ejections
    e.backoff_step = <uint32_t>b.backoff_step
    if b.retry_in_ms:
        e.retry_at_ms = ahead(w.now_ms, b.retry_in_ms)
    e.ramp_from_ms = ago_or_none(w.now_ms, b.ramp_age_ms)
    if b.ejected_for_ms:
        pool_eject(w, e, b.ejected_for_ms - 1 if b.ejected_for_ms < AGE_MS_MAX else <uint64_t>AGE_MS_MAX)
    k.recompute_ms = 0
    if b.live_groups:
        e.live_groups = <uint32_t*>mem_take(w, 4 * <size_t>b.live_groups)
        if e.live_groups == NULL:
            return -1
        memcpy(e.live_groups, p.data, 4 * <size_t>b.live_groups)
        e.live_groups_count = b.live_groups
    w.peers_version += 1
    return 0


cdef void build_group(Load* load, const Piece* p) noexcept nogil:
    cdef BlobGroup b
    cdef Share seen
    cdef Group* g
    take(p, &b, sizeof(b))
    g = load.w.group_of[b.id]
    if g == NULL or load.merged:
        return          # (groups live in the first thread's world, which is never merged into another)
    g.turns = b.turns
    if not b.has_share or g.schedule == NULL:
        return
    memset(&seen, 0, sizeof(seen))
    seen.layout = b.layout
    seen.last = b.last
    seen.part = b.part
    seen.rules_count = b.rules
    seen.entries_count = b.entries
    share_restore(g.share, g.schedule, &seen, <const uint32_t*>p.data,
                  <const int32_t*>(p.data + 4 * <size_t>b.rules),
                  p.data + 4 * <size_t>b.rules + 4 * <size_t>b.entries)


cdef Endpoint* endpoint_named(Load* load, uint32_t id, uint32_t row) noexcept nogil:
    cdef Endpoint* e = load.w.endpoint_of[id]
    cdef uint32_t i
    if e != NULL and e.cluster != NULL:
        return e
    for i in range(load.gone_count):
        if load.gone[i].id == id:
            return load.gone[i]
    e = pool_gone(load.w, id, row)
    if e != NULL:
        load.gone[load.gone_count] = e
        load.gone_count += 1
    return e


cdef void place_client(Load* load, Conn* c, const BlobConn* b) noexcept nogil:
    cdef World* w = load.w
    cdef const ListenerRoutes* routes = w.listener_of[b.source]
    c.listener = b.source
    c.row = b.row
    if routes != NULL and routes.codec == c.codec and routes.kind == c.kind:
        c.row = routes.row
    else:
        # Nothing is accepted there any more, or it speaks something else: what is owed is paid.
        if routes != NULL:
            c.listener = NO_LISTENER
        c.state = CONN_DRAINING
    w.counters.p[P_CONNECTIONS] += 1
    row_of(w.counters, c.row).c[C_CONNECTIONS] += 1
    add32(&w.downstreams, 1)


cdef bint place_upstream(Load* load, Conn* c, const BlobConn* b) noexcept nogil:
    cdef World* w = load.w
    cdef Endpoint* e = endpoint_named(load, b.source, b.row)
    if e == NULL:
        return False
    if e.gone or load.endpoint_seen[b.source] != ENDPOINT_SAME or e.cluster.kind != c.kind or \
            e.cluster.codec != c.codec:
        # It serves something else now, or in another way: no new requests.
        if c.state == CONN_OPEN:
            c.state = CONN_DRAINING
        elif c.state == CONN_CONNECTING:
            c.left = 1          # never was one: what waits for it goes elsewhere
    pool_attach(w, e, c)
    return True


cdef int build_conn(Load* load, const Piece* p) noexcept nogil:
    cdef World* w = load.w
    cdef BlobConn b
    cdef Conn* c
    cdef uint32_t ordinal = load.built
    cdef int fd
    take(p, &b, sizeof(b))
    fd = load.fds[b.descriptor] if b.descriptor != NONE else -1
    c = conn_new(w, fd, b.role) if load.merged else conn_put(w, b.index, fd, b.role)
    if c == NULL:
        return -1
    load.conns[ordinal] = c
    load.built += 1
    c.codec = load.seen[ordinal].codec
    c.state = b.state
    c.hold = b.hold
    c.kind = b.kind
    c.spoke = b.spoke != 0
    c.greeted = b.greeted != 0
    c.left = b.left != 0
    c.lingering = b.lingering != 0
    c.close_reason = b.close_reason
    c.cut_through = b.cut_through != 0
    c.dialect = b.dialect
    c.blocked = b.blocked != 0
    c.streaming = b.streaming != 0
    c.stream_block = b.stream_block
    c.stream_row = b.stream_row
    c.answer_open = b.answer_open != 0
    c.owner = b.owner                   # translated when all are there
    c.last_client = b.last_client
    c.stream_to = b.stream_to
    c.opened_ms = ago(w.now_ms, b.opened_age_ms)
    c.read_ms = ago(w.now_ms, b.read_age_ms)
    c.wrote_ms = ago(w.now_ms, b.wrote_age_ms)
    c.blocked_ms = ago(w.now_ms, b.blocked_age_ms)
    c.heartbeat_ms = ago(w.now_ms, b.heartbeat_age_ms)
    c.linger_until_ms = ahead(w.now_ms, b.linger_in_ms)
    slots_start(&c.sent, w.snapshot.limits.in_flight_max, w.first_generation)
    if b.role == ROLE_DOWNSTREAM:
        place_client(load, c, &b)
    elif not place_upstream(load, c, &b):
        return -1
    if c.codec.state_bytes:
        c.codec_state = mem_take(w, c.codec.state_bytes)
        if c.codec_state == NULL:
            return -1
        memset(c.codec_state, 0, c.codec.state_bytes)
        if b.state_bytes:
            c.codec.load(c.codec_state, p.data, b.state_bytes)
    if b.told:
        c.notice = <Notice*>mem_take(w, sizeof(Notice))
        if c.notice == NULL:
            return -1
        memset(c.notice, 0, sizeof(Notice))
        c.notice.kind = EVENT_OPENED
        c.notice.a = conn_handle(c)
        c.notice.b = b.source
        c.notice.c = b.role == ROLE_UPSTREAM
    if b.part_bytes and not c.lingering and not c.hold & HOLD_EOF:
        # All of it is looked at anew, whole frames or not.
        c.part = <uint8_t*>mem_take(w, b.part_bytes)
        if c.part == NULL:
            return -1
        memcpy(c.part, p.data + b.state_bytes, b.part_bytes)
        c.part_size = c.part_room = c.part_need = b.part_bytes
        c.part_ready = 1
        c.frame_began_ms = ago_or_none(w.now_ms, b.began_age_ms)
        if c.frame_began_ms == 0:
            c.frame_began_ms = w.now_ms
        if not c.hold & HOLD_PARSING:
            c.resuming = 1
            c.resume_next = w.resume
            w.resume = c
    if b.timer_in_ms and c.state == b.state and load.same_limits:
        conn_check_by(w, c, ahead(w.now_ms, b.timer_in_ms - 1))
    else:
        conn_check_by(w, c, w.now_ms)
    return 0


cdef void name_anew(Load* load) noexcept nogil:
    """All connections are there: what they call each other by."""
    cdef uint32_t i
    cdef Conn* c
    for i in range(load.built):
        c = load.conns[i]
        c.owner = client_of(load, i, c.owner)
        c.last_client = client_of(load, i, c.last_client)
        c.stream_to = handle_of(load, c.stream_to)


cdef int build_link(Load* load, const Piece* p) noexcept nogil:
    cdef World* w = load.w
    cdef BlobLink b
    cdef Conn* up
    cdef Link* link = <Link*>mem_take(w, sizeof(Link))
    if link == NULL:
        return -1
    load.links[load.links_count] = link
    load.links_count += 1
    take(p, &b, sizeof(b))
    memset(link, 0, sizeof(Link))
    link.cluster = b.cluster
    link.upstream = handle_of(load, b.upstream)
    up = conn_of(w, link.upstream)
    if up != NULL and up.endpoint.cluster != NULL and up.endpoint.cluster.id != b.cluster:
        link.upstream = STALE
    link.flow = <uint8_t>b.flow
    link.pause_until_ms = ahead(w.now_ms, b.pause_in_ms)
    if b.conn != NONE:
        link.client = load.conns[b.conn]
        link.next = link.client.links
        link.client.links = link
        link.client.links_count += 1
    return 0


cdef int build_member(Load* load, const Piece* p) noexcept nogil:
    cdef World* w = load.w
    cdef BlobMember b
    cdef Group* g
    cdef Member* m
    take(p, &b, sizeof(b))
    g = w.group_of[b.group] if b.group != NONE else NULL
    m = member_restore(w, load.conns[b.conn] if b.conn != NONE else NULL, g, b.prefetch, b.turn)
    if m == NULL:
        return -1
    load.members[load.members_count] = m
    load.members_count += 1
    return 0


cdef int build_key(Load* load, const Piece* p) noexcept nogil:
    cdef BlobKey b
    cdef Key* key
    take(p, &b, sizeof(b))
    key = key_restore(load.w, load.w.group_of[b.group] if b.group != NONE else NULL, b.hash,
                      load.members[b.member] if b.member != NONE else NULL, b.endpoint)
    if key == NULL:
        return -1
    load.keys[load.keys_count] = key
    load.keys_count += 1
    return 0


cdef int build_fan(Load* load, const Piece* p) noexcept nogil:
    cdef BlobFan b
    cdef Fan* fan = <Fan*>mem_take(load.w, sizeof(Fan))
    if fan == NULL:
        return -1
    load.fans[load.fans_count] = fan
    load.fans_count += 1
    take(p, &b, sizeof(b))
    memset(fan, 0, sizeof(Fan))
    fan.asker = handle_of(load, b.asker)
    fan.orig = b.orig
    fan.hint = b.hint
    fan.later = b.later != 0
    fan.consumed = b.consumed != 0
    fan.silent = b.silent != 0
    return 0


cdef void order_slots(Load* load) noexcept nogil:
    """The table is whole: answers by order come in that order."""
    cdef uint32_t i
    cdef uint16_t index
    if load.on == NULL:
        return
    for i in range(load.order_count):
        memcpy(&index, load.order + 2 * <size_t>i, 2)
        slot_order_push(&load.on.sent, slot_at(&load.on.sent, index))
    if load.heartbeat:
        load.on.heartbeat_open = slot_at(&load.on.sent, load.heartbeat - 1)
    load.order_count = 0
    load.heartbeat = 0


cdef int build_slots(Load* load, const Piece* p) noexcept nogil:
    cdef World* w = load.w
    cdef BlobSlots b
    cdef BlobFree f
    cdef uint32_t i
    cdef size_t grew = 0
    cdef bint made
    take(p, &b, sizeof(b))
    load.on = load.conns[b.conn]
    load.flying_tail = &load.on.flying
    made = slots_restore(&load.on.sent, b.pages, &grew)
    w.budget.used += grew
    if not made:
        return -1
    for i in range(b.free, 0, -1):
        memcpy(&f, p.data + sizeof(BlobFree) * <size_t>(i - 1), sizeof(f))
        slot_restore_free(&load.on.sent, f.index, f.generation, <uint8_t>f.last_cause)
    load.order = p.data + sizeof(BlobFree) * <size_t>b.free
    load.order_count = b.order
    load.heartbeat = b.heartbeat
    return 0


cdef int build_delivery(Load* load, const Piece* p, const BlobSlot* b, Slot* slot) noexcept nogil:
    cdef World* w = load.w
    cdef Delivery* d = delivery_new(w, b.delivery - 1)
    if d == NULL:
        return -1
    slot.delivery = d
    d.group = b.group
    if b.member != NONE:
        d.member = load.members[b.member]
        d.member.in_flight += 1
    if b.key != NONE:
        d.key = load.keys[b.key]
        d.key.in_flight += 1
    if b.fan != NONE:
        d.fan = load.fans[b.fan]
        d.fan.open += 1
    if d.kind == DELIVERY_CALL:
        d.notice.kind = EVENT_ANSWER
        d.notice.a = b.ticket
    d.only = mask_of(w, b.cluster, p.data, b.only)
    if b.copy_bytes == 0 or (b.limited and d.only == 0):
        return 0        # (nobody that may take it is left: it goes nowhere else)
    d.copy = <uint8_t*>mem_take(w, b.copy_bytes)
    if d.copy == NULL:
        return -1
    d.copy_size = b.copy_bytes
    memcpy(d.copy, p.data + 4 * <size_t>b.only, b.copy_bytes)
    return 0


cdef int build_slot(Load* load, const Piece* p) noexcept nogil:
    cdef World* w = load.w
    cdef Conn* on = load.on
    cdef Conn* asker
    cdef BlobSlot b
    cdef Slot* slot
    take(p, &b, sizeof(b))
    slot = slot_restore(&on.sent, b.index, b.generation, b.state, b.rest_cause, b.last_cause)
    slot.timer.owner = slot
    slot.timer.kind = TIMER_SLOT
    slot.table_owner = on
    slot.orig = b.orig
    slot.tries = b.tries
    slot.sampled = b.sampled != 0
    slot.block = b.block
    slot.cluster = b.cluster
    slot.hint = b.hint
    slot.row = b.row
    slot.bytes = b.bytes
    slot.trace = b.trace
    slot.received_ns = ago_or_none(w.now_ns, b.received_age_ns)
    slot.sent_ns = ago_or_none(w.now_ns, b.sent_age_ns)
    if b.asker:
        slot.asker = handle_of(load, b.asker)
        asker = load.conns[ordinal_named(load, b.asker)]
        slot_link(&asker.asked, slot)
        asker.asked_count += 1
        # behind the one before: they come newest first
        slot.flight_link = load.flying_tail
        load.flying_tail[0] = slot
        load.flying_tail = &slot.flight_next
        row_of(w.counters, slot.row).c[slot.block + C_IN_FLIGHT] += 1
        if on.role == ROLE_UPSTREAM:
            on.endpoint.in_flight += 1
            row_of(w.counters, on.endpoint.row).c[REQUESTS + C_IN_FLIGHT] += 1
    if b.timer_in_ms:
        timer_set(&w.wheel, &slot.timer, ahead(w.now_ms, b.timer_in_ms - 1))
    elif b.state == SLOT_RESTING:
        timer_set(&w.wheel, &slot.timer, w.now_ms + SLOT_REST_MS)
    elif b.asker or b.delivery:
        timer_set(&w.wheel, &slot.timer, w.now_ms + w.snapshot.limits.request_timeout_ms)
    return build_delivery(load, p, &b, slot) if b.delivery else 0


cdef int build_entry(Load* load, const Piece* p) noexcept nogil:
    cdef World* w = load.w
    cdef BlobEntry b
    cdef Entry* e
    take(p, &b, sizeof(b))
    e = <Entry*>mem_take(w, sizeof(Entry))
    if e == NULL:
        return -1
    memset(e, 0, sizeof(Entry))
    e.data = <uint8_t*>mem_take(w, b.size)
    if e.data == NULL:
        mem_give(w, e, sizeof(Entry))
        return -1
    memcpy(e.data, p.data + 4 * <size_t>b.only, b.size)
    e.size = e.room = b.size
    e.kind = b.kind
    e.block = b.block
    e.begun = b.begun != 0
    e.tries = b.tries
    e.row = b.row
    e.received_ns = ago_or_none(w.now_ns, b.received_age_ns)
    if b.slot:
        e.slot = slot_at(&load.on.sent, b.slot - 1)
        if not e.begun:
            e.slot.entry = e
    if b.link != NONE:
        e.link = load.links[b.link]
        e.link.entries += 1
        e.link.queued_bytes += b.size
        e.only = mask_of(w, e.link.cluster, p.data, b.only)
        if b.limited and e.only == 0:
            e.tries = NO_RETRY      # nobody that may take it is left but the one it is queued for
    queue_append(w, load.on, e)
    return 0


cdef int build_piece(Load* load, const Piece* p) noexcept nogil:
    if p.kind >= BLOB_LINK and not load.named:
        load.named = True
        name_anew(load)
    if p.kind == BLOB_SLOTS or p.kind == BLOB_END:
        order_slots(load)
    if p.kind <= BLOB_BUCKET:
        add_numbers(load, p)
    elif p.kind == BLOB_INDEX:
        return 0 if load.merged else conns_restore(load.w, load.generations, load.high)
    elif p.kind == BLOB_ENDPOINT:
        return build_endpoint(load, p)
    elif p.kind == BLOB_GROUP:
        build_group(load, p)
    elif p.kind == BLOB_CONN:
        return build_conn(load, p)
    elif p.kind == BLOB_LINK:
        return build_link(load, p)
    elif p.kind == BLOB_MEMBER:
        return build_member(load, p)
    elif p.kind == BLOB_KEY:
        return build_key(load, p)
    elif p.kind == BLOB_FAN:
        return build_fan(load, p)
    elif p.kind == BLOB_SLOTS:
        return build_slots(load, p)
    elif p.kind == BLOB_SLOT:
        return build_slot(load, p)
    elif p.kind == BLOB_ENTRY:
        return build_entry(load, p)
    return 0


cdef void undo(Load* load) noexcept nogil:
    """No memory half-way. The descriptors stay the caller's."""
    cdef World* w = load.w
    cdef Conn* c
    cdef Slot* slot
    cdef Entry* e
    cdef Delivery* d
    cdef uint32_t i, cursor
    for i in range(load.built):
        c = load.conns[i]
        e = c.head
        while e != NULL:
            e.link = NULL
            e = e.next
        cursor = 0
        slot = slot_each(&c.sent, &cursor)
        while slot != NULL:
            timer_clear(&w.wheel, &slot.timer)
            d = <Delivery*>slot.delivery
            if d != NULL:
                if d.copy != NULL:
                    mem_give(w, d.copy, d.copy_size)
                mem_give(w, d, sizeof(Delivery))
            slot = slot_each(&c.sent, &cursor)
        mem_give(w, c.notice, sizeof(Notice))
    for i in range(load.keys_count):
        key_remove(w, load.keys[i])
    for i in range(load.members_count):
        member_remove(w, load.members[i])
    for i in range(load.fans_count):
        mem_give(w, load.fans[i], sizeof(Fan))
    for i in range(load.links_count):
        mem_give(w, load.links[i], sizeof(Link))
    for i in range(load.built):
        c = load.conns[i]
        if c.endpoint != NULL:
            pool_detach(w, c)
        elif c.role == ROLE_DOWNSTREAM:
            add32(&w.downstreams, <uint32_t>-1)
        c.fd = -1
        conn_free(w, c)
    for i in range(load.gone_count):
        mem_give(w, load.gone[i], sizeof(Endpoint))


cdef int handover_build(Load* load) noexcept nogil:
    cdef World* w = load.w
    cdef Piece p
    cdef uint64_t at = load.head.head_bytes
    cdef uint32_t i
    if w.stood_ms == 0:
        world_clock(w)
        w.stood_ms = w.now_ms
        w.frozen_ns = load.head.frozen_at_ns
    if w.budget.used + load.tally.need > w.budget.max:
        return -1
    load.links_count = load.members_count = load.keys_count = load.fans_count = 0
    load.order_count = load.heartbeat = 0
    load.same_limits = load.head.limits_mark == limits_mark(w)
    load.conns = <Conn**>table(load, load.head.conns, sizeof(Conn*))
    load.gone = <Endpoint**>table(load, load.head.conns, sizeof(Endpoint*))
    load.links = <Link**>table(load, load.head.links, sizeof(Link*))
    load.members = <Member**>table(load, load.head.members, sizeof(Member*))
    load.keys = <Key**>table(load, load.head.keys, sizeof(Key*))
    load.fans = <Fan**>table(load, load.head.fans, sizeof(Fan*))
    if load.conns == NULL or load.gone == NULL or load.links == NULL or load.members == NULL or \
            load.keys == NULL or load.fans == NULL:
        return -1
    while at < load.size:
        next_piece(load, at, &p)
        at = p.next
        if p.kind and build_piece(load, &p) != 0:
            undo(load)
            return -1
    for i in range(load.members_count):
        member_settle(w, load.members[i])
    if not load.merged:
        conns_restored(w)
    w.counters.p[P_MEMORY] = w.budget.used
    if w.budget.used > w.counters.p[P_MEMORY_MAX]:
        w.counters.p[P_MEMORY_MAX] = w.budget.used
    return 0


# === what Python sees of a blob ===================================================================

from .route import codec_names


cdef uint32_t codecs_known(const Codec** found) except 0xffffffff:
    """Every codec that this process can speak; blobs name them by what they call themselves."""
    cdef uint32_t count = 0
    for name in codec_names():
        if count == CODECS_MAX:
            break
        found[count] = codec_named(name)
        count += 1
    return count


cdef int blob_open(Load* load, int memfd) except -1:
    """Map a sealed blob. blob_close() unmaps it."""
    cdef int seals = fcntl(memfd, F_GET_SEALS)
    cdef int wanted = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE
    cdef void* mapped
    if seals < 0 or seals & wanted != wanted:
        raise ValueError("state: it is not sealed: whoever wrote it could still change it")
    load.size = os.fstat(memfd).st_size
    if load.size < BLOB_BYTES_MIN:
        raise ValueError(f"state: {load.size} bytes are shorter than any world")
    load.codecs_count = codecs_known(load.codecs)
    mapped = mmap(NULL, load.size, PROT_READ, MAP_PRIVATE, memfd, 0)
    if mapped == MAP_FAILED:
        raise OSError(errno, os.strerror(errno))
    load.blob = <const uint8_t*>mapped
    return 0


cdef void blob_close(Load* load) noexcept:
    load_end(load)
    if load.blob != NULL:
        munmap(<void*>load.blob, load.size)


cdef int blob_verify(Load* load) except -1:
    cdef int verified
    with nogil:
        verified = handover_verify(load)
    if verified == 0:
        return 0
    if load.wrong == NULL:
        raise MemoryError("state: no memory to verify it in")
    what = load.wrong.decode()
    if load.at == 8:
        what += f": {load.head.version}, and only {STATE_VERSION_MIN} to {STATE_VERSION + 1} can"
    raise ValueError(f"state: byte {load.at}: {what}")


def inspect(int memfd):
    cdef Load load
    memset(&load, 0, sizeof(load))
    try:
        blob_open(&load, memfd)
        blob_verify(&load)
        return {
            "version": load.head.version,
            "thread": load.head.thread,
            "threads": load.head.threads,
            "frozen_at_ns": load.head.frozen_at_ns,
            "bytes": load.size,
            "records": load.head.records,
            "descriptors": load.head.descriptors,
            "downstream": load.tally.downstream,
            "upstream": load.tally.upstream,
            "left": load.tally.left,
            "requests": load.tally.requests,
            "pushes": load.tally.pushes,
            "resting": load.tally.resting,
            "queued_bytes": load.tally.queued_bytes,
            "partial_bytes": load.tally.partial_bytes,
            "members": load.head.members,
            "keys": load.head.keys,
            "memory_bytes": load.tally.need,
        }
    finally:
        blob_close(&load)
