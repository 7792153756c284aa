# cython: language_level=3
"""Frames (contract: relay.pxd)."""

from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from .bytes cimport memcmp, memcpy, memset
from .conn cimport (
    area_take,
    conn_check_by,
    conn_doom,
    conn_free,
    conn_handle,
    conn_hold,
    conn_look_again,
    conn_of,
    conn_release,
    entry_drop,
    entry_free,
    event_push,
    flush_all,
    flush_one,
    mem_give,
    mem_grow,
    mem_take,
    notice_gone,
    notice_tell,
    queue_append,
    queue_frame,
    queue_greeting,
    queue_own,
    reader_stuck,
    stands_since_ms,
    world_clock,
)
from .counters cimport (
    C_ACCEPTED,
    C_ANSWERED,
    C_BYTES_IN,
    C_CLOSED,
    C_CONNECTIONS,
    C_EXPIRED,
    C_FAILED,
    C_FORWARDED,
    C_IN_FLIGHT,
    C_LOOPS,
    C_OFFERED,
    C_ONEWAY_ACCEPTED,
    C_ONEWAY_DROPPED,
    C_RETRIED,
    C_SENT,
    C_STAYED,
    CLOSED_BY_COMMAND,
    CLOSED_BY_PEER,
    CLOSED_CONNECT,
    CLOSED_DRAINED,
    CLOSED_FIRST_BYTE,
    CLOSED_FRAME_TIMEOUT,
    CLOSED_IDLE,
    CLOSED_MALFORMED,
    CLOSED_MEMORY,
    CLOSED_SLOW_CONSUMER,
    HOP_UPSTREAM,
    P_CALLS,
    P_CONNECTIONS,
    P_DROPPED,
    P_EVENTS_LOST,
    P_FRAMES,
    P_GOAWAYS,
    P_HEARTBEATS_IN,
    P_MALFORMED,
    P_MEMORY,
    P_PARKED,
    P_PAUSES,
    P_PUNTED,
    P_PUNT_FULL,
    P_READ_BYTES,
    P_READS,
    P_SAMPLES,
    P_SHED,
    P_SLOW_CONSUMERS,
    PUSHES,
    REQUESTS,
    Row,
    hop_record,
    latency_index,
    row_of,
)
from .debug cimport holds
from .frame cimport (
    CAUSE_CLIENT_GONE,
    CAUSE_CONNECT,
    CAUSE_DEADLINE,
    CAUSE_NO_ENDPOINT,
    CAUSE_NO_ROUTE,
    CAUSE_NONE,
    CAUSE_OVERLOAD,
    CAUSE_UNDECODABLE,
    CAUSE_UPSTREAM_LOST,
    CORRELATE_BY_ORDER,
    ERROR_HEADERS,
    FLAG_ANSWERABLE,
    FLAG_FIRST,
    FLAG_LAST,
    FRAME_GOAWAY,
    FRAME_HEARTBEAT,
    FRAME_HEARTBEAT_ACK,
    FRAME_ONEWAY,
    FRAME_REQUEST,
    FRAME_RESPONSE,
    PARSE_NEED_MORE,
    PARSE_OK,
    FrameId,
    FrameView,
    Limits,
    ParseStatus,
    Span,
)
from .groups cimport (
    delivery_drop,
    delivery_end,
    delivery_forget_copy,
    delivery_new,
    group_named,
    group_place,
    groups_leave,
    key_find,
    key_take,
    member_has_credit,
    member_pick,
    member_take,
)
from .pool cimport (
    pool_answered,
    pool_failed,
    pool_goaway,
    pool_lost,
    pool_peer,
    pool_pick,
    pool_release,
)
from .push cimport (
    OP_CHECK,
    OP_DELIVER,
    OP_FORWARD,
    OP_PUBLISH,
    PUSH_HINT_DELIVERY,
    RESULT_CONSUMED,
    RESULT_LATER,
    RESULT_NO_CONSUMER,
    PushFields,
    push_answer,
    push_as_deliver,
    push_forward,
    push_forward_size,
    push_read,
)
from .route cimport (
    BIND_PER_CLIENT,
    KIND_BROKER,
    KIND_FORWARD,
    KIND_PEER,
    KIND_PUNT,
    KIND_PUSH,
    KIND_RELAY,
    SERVER_REQUESTS_REFUSE,
    ListenerRoutes,
    MeshLimits,
    Rule,
    route_find,
)
from .schedule cimport WHY_NO_PEER, stable_hash
from .slots cimport (
    MISS_CLIENT_GONE,
    MISS_DUPLICATE,
    MISS_LATE,
    MISS_NONE,
    MISS_UNKNOWN,
    SLOT_IN_FLIGHT,
    SLOT_RESTING,
    SLOT_REST_MS,
    Slot,
    flight_link,
    flight_unlink,
    slot_each,
    slot_find,
    slot_id,
    slot_link,
    slot_order_pop,
    slot_order_push,
    slot_release,
    slot_rest,
    slot_take,
    slot_unlink,
)
from .timers cimport timer_clear, timer_set
from .world cimport (
    AREA_BYTES,
    CONN_CONNECTING,
    CONN_DOOMED,
    CONN_DRAINING,
    CONN_OPEN,
    DELIVERY_CALL,
    DELIVERY_FORWARD,
    DELIVERY_LOCAL,
    DELIVERY_PUBLISH,
    DRAIN_LOOK_MS,
    DRAIN_QUIET_MS,
    ENTRY_ANSWER,
    ENTRY_ONEWAY,
    ENTRY_PART,
    ENTRY_REQUEST,
    EVENT_ANSWER,
    EVENT_CLOSED,
    EVENT_FRAME,
    EVENT_PARKED,
    EVENT_SAMPLE,
    FLOW_OPEN,
    FLOW_PAUSED,
    FLOW_SHEDDING,
    HOLD_CONTROL,
    HOLD_EOF,
    HOLD_ORDER,
    HOLD_PARKED,
    HOLD_PUNT,
    HOLD_QUOTA,
    IDS,
    PARKED_MAX,
    PART_IN_AREA_BYTES,
    PAUSE_MS,
    LINGER_MS,
    NO_RETRY,
    READ_BYTES,
    READ_BYTES_PER_TURN,
    ROLE_DOWNSTREAM,
    ROLE_UPSTREAM,
    TIMER_PARKED,
    TIMER_SLOT,
    Bucket,
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
    Parked,
    World,
    iovec,
)

cdef extern from "<sys/socket.h>" nogil:
    struct sockaddr:
        pass
    int getpeername(int fd, sockaddr* address, unsigned int* size)

cdef extern from "atomics.h" nogil:
    uint32_t fm_add(uint32_t* p, uint32_t v)
    bint likely "fm_likely"(bint x)
    bint unlikely "fm_unlikely"(bint x)

cdef enum:
    # between two frames, not after the last one
    HOLD_PARSING = HOLD_QUOTA | HOLD_PARKED | HOLD_PUNT | HOLD_ORDER | HOLD_CONTROL
    LOGS_PER_SECOND = 10     # abnormal ends reported, per reason: the counters have them all
    PUNT_RETRY_MS = 10
    RECORD_ROOM = 64         # of a ring record besides its frame
    PARK_TOLD_BYTES = 1 << 16   # of a parked frame that Python sees
    LOOK_AGAIN_MS = 60000    # a client connection that owes or is owed something, and nothing limits it
    SHED_PERCENT = 90        # of the memory budget: requests are answered "overload"
    TIGHT_PERCENT = 75       # of the memory budget: whoever has requests queued is paused
    TIGHT_BYTES = 1 << 16    # ... beyond this much

cdef uint64_t NEVER = ~(<uint64_t>0)


cdef inline uint64_t after(uint64_t at_ms, uint32_t span_ms) noexcept nogil:
    """A limit of 0 is off."""
    return at_ms + span_ms if span_ms else NEVER


# === small things =================================================================================

cdef void report_end(World* w, Conn* c, int reason, const uint8_t* data, uint32_t size) noexcept nogil:
    """Tell the main thread of an abnormal end: peer address and the first bytes, at most
    LOGS_PER_SECOND per reason."""
    cdef uint8_t[168] text
    cdef unsigned int address_size = 128
    if w.now_ms // 1000 != w.log_second:
        w.log_second = w.now_ms // 1000
        memset(w.log_tokens, 0, sizeof(w.log_tokens))
    if w.log_tokens[reason] >= LOGS_PER_SECOND:
        return
    w.log_tokens[reason] += 1
    memset(text, 0, sizeof(text))
    if getpeername(c.fd, <sockaddr*>(text + 4), &address_size) != 0 or address_size > 128:
        address_size = 0
    text[0] = <uint8_t>address_size
    text[1] = <uint8_t>(size if size < 32 else 32)
    if text[1]:
        memcpy(text + 132, data, text[1])
    if event_push(w, EVENT_CLOSED, conn_handle(c), c.listener, reason, text, sizeof(text)) != 0:
        w.counters.p[P_EVENTS_LOST] += 1


cdef void sample(World* w, const Slot* slot, int outcome, uint64_t answered_ns) noexcept nogil:
    cdef uint64_t[6] words
    cdef Conn* on = <Conn*>slot.table_owner
    words[0] = slot.received_ns
    words[1] = slot.sent_ns
    words[2] = answered_ns
    words[3] = w.now_ns
    words[4] = on.endpoint.id if on.endpoint != NULL else 0
    words[5] = slot.asker
    w.counters.p[P_SAMPLES] += 1
    if event_push(w, EVENT_SAMPLE, slot.trace, slot.row, outcome, words, sizeof(words)) != 0:
        w.counters.p[P_EVENTS_LOST] += 1


cdef void answer_own(World* w, Conn* to, const FrameId* id, uint32_t hint, int cause) noexcept nogil:
    """The mesh's own answer, as the protocol words it."""
    cdef uint8_t[256] frame  # answer_bytes_max of the wordiest codec (PUSH_ANSWER_MAX)
    cdef uint32_t size = to.codec.answer(id, hint, cause, frame)
    if queue_own(w, to, frame, size) == NULL:
        conn_doom(w, to, CLOSED_MEMORY, 0)


cdef Entry* queue_as_it_lies(World* w, Conn* to, uint8_t* data, uint32_t size, int kind) noexcept nogil:
    """Queue the frame being handled; the queue takes its memory over where it has some of its own."""
    cdef Entry* e = queue_frame(w, to, data, size, w.block_room if w.block != NULL else 0, kind)
    if e != NULL:
        w.block = NULL
        w.block_room = 0
    return e


cdef Entry* queue_patched(World* w, Conn* to, FrameView* view, const FrameId* id, int kind) noexcept nogil:
    """Give the frame its new id and queue it. The queue takes the frame's own memory over where it
    has some. NULL = no memory."""
    cdef Span[3] piece
    cdef uint8_t[32] scratch
    cdef uint8_t* whole
    cdef uint32_t total = 0, room = 0
    cdef Entry* e
    cdef int i, n = to.codec.patch(view, id, scratch, piece)
    if likely(n == 1):
        return queue_as_it_lies(w, to, <uint8_t*>piece[0].at, piece[0].size, kind)
    for i in range(n):
        total += piece[i].size
    whole = area_take(w, total)
    if whole == NULL:
        whole = <uint8_t*>mem_take(w, total)
        if whole == NULL:
            return NULL
        room = total
    total = 0
    for i in range(n):
        memcpy(whole + total, piece[i].at, piece[i].size)
        total += piece[i].size
    e = queue_frame(w, to, whole, total, room, kind)
    if e == NULL and room:
        mem_give(w, whole, room)
    return e


# === a slot's end =================================================================================

cdef void leave_flight(World* w, Slot* slot) noexcept nogil:
    """Out of the gauges, off its asker's list, its timer stopped."""
    cdef Conn* on = <Conn*>slot.table_owner
    cdef Conn* asker = conn_of(w, slot.asker)
    cdef Entry* e = <Entry*>slot.entry
    row_of(w.counters, slot.row).c[slot.block + C_IN_FLIGHT] -= 1
    if on.role == ROLE_UPSTREAM:
        on.endpoint.in_flight -= 1
        row_of(w.counters, on.endpoint.row).c[REQUESTS + C_IN_FLIGHT] -= 1
    flight_unlink(slot)
    if slot.asker_link != NULL:
        slot_unlink(slot)
        if asker != NULL:
            asker.asked_count -= 1
            if asker.hold & HOLD_ORDER:
                conn_release(w, asker, HOLD_ORDER)
    timer_clear(&w.wheel, &slot.timer)
    if e != NULL:
        entry_drop(w, on, e)
        slot.entry = NULL


cdef void order_remove(Conn* on, Slot* slot) noexcept nogil:
    """Answers by order: a request that was never sent gets no answer and leaves the order."""
    cdef Slot** link = &on.sent.order_head
    cdef Slot* before = NULL
    while link[0] != NULL and link[0] != slot:
        before = link[0]
        link = &link[0].order_next
    if link[0] == slot:
        link[0] = slot.order_next
        if on.sent.order_tail == slot:
            on.sent.order_tail = before
        slot.order_next = NULL


cdef void free_slot(World* w, Slot* slot, int miss) noexcept nogil:
    cdef Conn* on = <Conn*>slot.table_owner
    if slot.delivery != NULL:
        delivery_end(w, slot)
    if on.codec.correlation == CORRELATE_BY_ORDER:
        order_remove(on, slot)
    slot_release(&on.sent, slot, miss)
    if on.head != NULL and on.head.slot == slot:
        on.head.slot = NULL     # still being written: the next user of the slot is none of its business
    if on.role == ROLE_UPSTREAM and on.state == CONN_DRAINING:
        conn_check_by(w, on, w.now_ms)      # not now: frames behind this one may be waiting


cdef void end_in_flight(World* w, Slot* slot, int miss) noexcept nogil:
    """The request is settled. If it may still be answered its id rests, else it is free at once."""
    cdef bint unsent = slot.entry != NULL
    cdef Conn* on = <Conn*>slot.table_owner
    leave_flight(w, slot)
    if unsent or on.state == CONN_DOOMED:
        free_slot(w, slot, miss)
    else:
        delivery_forget_copy(w, slot)       # what may have been executed is not offered again
        slot_rest(&on.sent, slot, miss)
        timer_set(&w.wheel, &slot.timer, w.now_ms + SLOT_REST_MS)


cdef void fail(World* w, Slot* slot, int cause) noexcept nogil:
    """Nobody will answer this request any more: its asker is told, the ledger says why. The caller
    ends the slot."""
    cdef Conn* asker = conn_of(w, slot.asker)
    cdef uint64_t* c = row_of(w.counters, slot.row).c
    cdef Delivery* d = <Delivery*>slot.delivery
    if cause == CAUSE_DEADLINE:
        c[slot.block + C_EXPIRED] += 1
    else:
        c[slot.block + C_FAILED + cause] += 1
    if slot.sampled:
        sample(w, slot, cause, 0)
    if d != NULL and d.fan != NULL:
        # a copy of a broadcast whose connection has gone is owed to nobody
        fan_settled(w, d, cause != CAUSE_CLIENT_GONE)
    elif asker != NULL:
        answer_own(w, asker, &slot.orig, slot.hint, cause)


cdef void refuse(World* w, Conn* asker, const FrameView* view, uint32_t row, int block, int cause) noexcept nogil:
    """Counted accepted already, settled without ever having had a slot: answered by the mesh, or, where
    nobody waits for an answer, counted as dropped."""
    cdef uint64_t* c = row_of(w.counters, row).c
    if view.kind == FRAME_ONEWAY:
        c[block + C_ONEWAY_DROPPED] += 1
        return
    c[block + C_FAILED + cause] += 1
    answer_own(w, asker, &view.id, view.hint, cause)


cdef void relay_slot_due(World* w, Slot* slot) noexcept nogil:
    cdef Conn* on = <Conn*>slot.table_owner
    if slot.state == SLOT_RESTING:
        if on.codec.correlation == CORRELATE_BY_ORDER:
            # The place in the order cannot be given up: the next answer would be taken for
            # another's.
            conn_doom(w, on, CLOSED_BY_COMMAND, 0)
        elif on.head != NULL and on.head.slot == slot:
            timer_set(&w.wheel, &slot.timer, w.now_ms + SLOT_REST_MS)   # still being written
        else:
            free_slot(w, slot, slot.rest_cause)
        return
    if slot.asker == 0:
        call_over(w, slot, CAUSE_DEADLINE)
        return
    fail(w, slot, CAUSE_DEADLINE)
    if on.role == ROLE_UPSTREAM:
        pool_failed(w, on.endpoint)
    end_in_flight(w, slot, MISS_LATE)


# === requests, both directions ====================================================================

cdef uint64_t deadline_ms(World* w, const FrameView* view) noexcept nogil:
    """The frame's own timeout; the configured one where it says 0 or less (Bolt: none given)."""
    cdef const MeshLimits* limits = &w.snapshot.limits
    cdef uint64_t timeout = <uint64_t>view.timeout_ms if view.timeout_ms > 0 else limits.request_timeout_ms
    if timeout > limits.request_timeout_ms_max:
        timeout = limits.request_timeout_ms_max
    return w.now_ms + timeout


cdef Link* link_for(World* w, Conn* c, uint32_t cluster) noexcept nogil:
    cdef Link* link = c.links
    while link != NULL:
        if link.cluster == cluster:
            return link
        link = link.next
    link = <Link*>mem_take(w, sizeof(Link))
    if link == NULL:
        return NULL
    memset(link, 0, sizeof(Link))
    link.client = c
    link.cluster = cluster
    link.next = c.links
    c.links = link
    c.links_count += 1
    return link


cdef bint over_quota(World* w, Conn* c, Link* link, uint32_t size) noexcept nogil:
    """May no more requests of this size be queued towards the link's cluster? take_quota() pauses on
    the way to the limit.

    Only a client that uses one cluster and owes no answer to anybody is paused: for any other,
    reading on is what keeps its other
    traffic going, and it is told "overload" at the limit.
    """
    cdef uint64_t most = w.snapshot.limits.queue_bytes_max
    cdef uint64_t after = link.queued_bytes + size
    cdef uint64_t percent = w.budget.used * 100 // w.budget.max
    if link.flow == FLOW_SHEDDING and link.queued_bytes <= most // 2:
        link.flow = FLOW_OPEN
    # (a single frame longer than the whole quota passes when nothing else is queued)
    if percent >= SHED_PERCENT or link.flow == FLOW_SHEDDING or \
            (after > most and link.queued_bytes > 0):
        w.counters.p[P_SHED] += 1
        return True
    return False


cdef void take_quota(World* w, Conn* c, Link* link, Entry* e) noexcept nogil:
    """The frame is queued. On the way to the limit its client is paused, if that harms nobody else."""
    cdef uint64_t most = w.snapshot.limits.queue_bytes_max
    cdef bint tight = w.budget.used * 100 >= w.budget.max * TIGHT_PERCENT
    e.link = link
    link.entries += 1
    link.queued_bytes += e.size
    if link.queued_bytes > most // 4 * 3 or (tight and link.queued_bytes > TIGHT_BYTES):
        if link.flow == FLOW_OPEN and c.links_count == 1 and c.sent.used == 0 and c.state == CONN_OPEN and \
                c.kind == KIND_RELAY:
            link.flow = FLOW_PAUSED
            link.pause_until_ms = w.now_ms + PAUSE_MS
            w.counters.p[P_PAUSES] += 1
            conn_hold(w, c, HOLD_QUOTA)
            conn_check_by(w, c, link.pause_until_ms)


cdef bint bucket_take(World* w, const Rule* rule) noexcept nogil:
    """One token of the rule's bucket, refilled by time; each thread has its share of the rate."""
    cdef Bucket* b = &w.buckets[rule.row]
    cdef uint64_t most = <uint64_t>rule.bucket_burst * 1000000 // w.threads
    cdef uint64_t grown
    if most < 1000000:
        most = 1000000
    if b.filled_ns == 0:
        b.tokens_micro = most
    else:
        grown = (w.now_ns - b.filled_ns) // 1000 * rule.bucket_rate // w.threads
        b.tokens_micro = b.tokens_micro + grown if b.tokens_micro + grown < most else most
    b.filled_ns = w.now_ns
    if b.tokens_micro < 1000000:
        return False
    b.tokens_micro -= 1000000
    return True


cdef Slot* new_slot(World* w, Conn* on, Conn* asker, FrameView* view, uint32_t row, int block,
                    uint32_t cluster) noexcept nogil:
    """`block`: where the ledger counts it, REQUESTS or PUSHES (a delivery that goes to a peer is a
    push all the way)."""
    cdef size_t grew = 0
    cdef Slot* slot = slot_take(&on.sent, &grew) if w.budget.used <= w.budget.max else NULL
    if slot == NULL:
        return NULL
    if grew:
        w.budget.used += grew
        w.counters.p[P_MEMORY] = w.budget.used
    slot.timer.owner = slot
    slot.timer.kind = TIMER_SLOT
    slot.orig = view.id
    slot.asker = conn_handle(asker)
    slot.table_owner = on
    slot.received_ns = w.now_ns
    slot.hint = view.hint
    slot.row = row
    slot.block = <uint8_t>block
    slot.bytes = view.size
    slot.cluster = <uint16_t>cluster
    slot_link(&asker.asked, slot)
    flight_link(&on.flying, slot)
    asker.asked_count += 1
    row_of(w.counters, row).c[block + C_IN_FLIGHT] += 1
    if on.role == ROLE_UPSTREAM:
        on.endpoint.in_flight += 1
        row_of(w.counters, on.endpoint.row).c[REQUESTS + C_IN_FLIGHT] += 1
    if on.codec.correlation == CORRELATE_BY_ORDER:
        slot_order_push(&on.sent, slot)
    return slot


cdef Slot* send_request(World* w, Conn* on, Conn* asker, FrameView* view, uint32_t row, uint32_t cluster,
                        Link* link, uint64_t due_ms) noexcept nogil:
    """Slot, id, queue. NULL = no slot or no memory, nothing has changed."""
    cdef FrameId id
    cdef Entry* e
    cdef int block = REQUESTS if on.role == ROLE_UPSTREAM else PUSHES
    cdef Slot* slot = new_slot(w, on, asker, view, row, block, cluster)
    if slot == NULL:
        return NULL
    memset(&id, 0, sizeof(id))
    id.number = slot_id(slot)
    e = queue_patched(w, on, view, &id, ENTRY_REQUEST)
    if e == NULL:
        leave_flight(w, slot)
        free_slot(w, slot, MISS_NONE)
        return NULL
    e.slot = slot
    e.row = row
    e.received_ns = w.now_ns
    slot.entry = e
    if not (view.flags & FLAG_LAST):
        e.tries = NO_RETRY      # the rest of the frame follows on this very connection
    if link != NULL:
        take_quota(w, asker, link, e)
    timer_set(&w.wheel, &slot.timer, due_ms)
    if w.snapshot.limits.sample_every:
        w.sample_count += 1
        if w.sample_count >= w.snapshot.limits.sample_every:
            w.sample_count = 0
            w.tickets += 1
            slot.sampled = 1
            slot.trace = w.tickets * w.threads + w.thread
    return slot


cdef Slot* forward_request(World* w, Conn* c, FrameView* view, uint32_t row, Cluster* k, uint64_t only,
                           uint64_t due_ms, Delivery* delivery) noexcept nogil:
    """A request or one-way frame that was accepted, towards its cluster (`only`: see Rule). Takes
    `delivery` over, which may be NULL. Returns the request's slot; NULL = refused, or one-way."""
    cdef int cause = CAUSE_NONE
    cdef Conn* up
    cdef FrameId id
    cdef Entry* e
    cdef Slot* slot
    cdef Link* link = link_for(w, c, k.id)
    cdef bint oneway = view.kind == FRAME_ONEWAY
    if link == NULL or over_quota(w, c, link, view.size):
        cause = CAUSE_OVERLOAD
    else:
        up = pool_pick(w, k, link, conn_handle(c), view.dialect, only, &cause)
        if up != NULL and not (view.flags & FLAG_LAST) and k.binding != BIND_PER_CLIENT:
            # A frame in parts came while its cluster was bound 1:1, and is not any more: parts of
            # two clients would mix.
            up = NULL
            cause = CAUSE_NO_ENDPOINT
        if up != NULL:
            up.cut_through = c.cut_through if k.binding == BIND_PER_CLIENT else 0
            up.last_client = conn_handle(c)
            row_of(w.counters, up.endpoint.row).c[C_SENT] += 1
            if not oneway:
                slot = send_request(w, up, c, view, row, k.id, link, due_ms)
                if slot != NULL:
                    (<Entry*>slot.entry).only = only
                    slot.delivery = delivery
                    follow_stream(c, up, view, row, REQUESTS)
                    if c.codec.correlation == CORRELATE_BY_ORDER:
                        conn_hold(w, c, HOLD_ORDER)
                    return slot
                cause = CAUSE_OVERLOAD
            else:
                # Id 0 is never a slot: an upstream that answers a one-way frame all the same
                # reaches nobody.
                memset(&id, 0, sizeof(id))
                e = queue_patched(w, up, view, &id, ENTRY_ONEWAY)
                if e != NULL:
                    e.row = row
                    e.received_ns = w.now_ns
                    e.block = REQUESTS
                    e.only = only
                    take_quota(w, c, link, e)
                    if not (view.flags & FLAG_LAST):
                        e.tries = NO_RETRY
                    follow_stream(c, up, view, row, REQUESTS)
                    if delivery != NULL:
                        delivery_drop(w, delivery)
                    return NULL
                cause = CAUSE_OVERLOAD
    if delivery != NULL:
        delivery_drop(w, delivery)
    follow_stream(c, NULL, view, row, REQUESTS)
    refuse(w, c, view, row, REQUESTS, cause)
    return NULL


cdef void on_request(World* w, Conn* c, FrameView* view, bint idempotent) noexcept nogil:
    """client -> upstream, with an answer or without."""
    cdef const ListenerRoutes* routes = w.listener_of[c.listener]
    cdef const Rule* rule = NULL
    cdef int malformed = 0
    cdef int cause = CAUSE_NONE
    cdef bint oneway = view.kind == FRAME_ONEWAY
    cdef uint32_t row = c.row
    cdef Cluster* k
    if routes != NULL:
        rule = route_find(routes, view, &malformed)
    if rule != NULL:
        row = rule.row
    row_of(w.counters, row).c[REQUESTS + (C_ONEWAY_ACCEPTED if oneway else C_ACCEPTED)] += 1
    if malformed:
        cause = CAUSE_UNDECODABLE
    elif rule == NULL:
        cause = CAUSE_NO_ROUTE
    elif w.refusing:
        cause = CAUSE_UPSTREAM_LOST
    elif c.asked_count >= w.snapshot.limits.in_flight_per_connection_max and not oneway:
        cause = CAUSE_OVERLOAD
    elif rule.bucket_rate and not bucket_take(w, rule):
        cause = CAUSE_OVERLOAD
    if cause != CAUSE_NONE:
        follow_stream(c, NULL, view, row, REQUESTS)
        refuse(w, c, view, row, REQUESTS, cause)
        if malformed:
            w.counters.p[P_MALFORMED + ERROR_HEADERS] += 1
            report_end(w, c, CLOSED_MALFORMED, view.data, view.size)
            say_and_close(w, c, CLOSED_MALFORMED)
        return
    k = w.cluster_of[w.snapshot.clusters[rule.cluster].id]
    if rule.park and view.flags & FLAG_LAST:
        park(w, c, view, row, k.id)
        return
    forward_request(w, c, view, row, k, rule.only, deadline_ms(w, view),
                    keep_publish(w, view, rule.only) if idempotent else NULL)


cdef void say_and_close(World* w, Conn* c, int reason) noexcept nogil:
    """The explanation leaves, then our side closes. What the client still sends is read and thrown
    away for a moment: closing over unread
    bytes would reset the connection, and the reset would overtake the explanation."""
    if c.state == CONN_DOOMED:
        return
    groups_leave(w, c)
    abandon_asked(w, c)
    flush_one(w, c)
    if c.state == CONN_DOOMED:
        return
    if c.head != NULL:
        conn_doom(w, c, reason, 0)
        return
    c.io.shutdown(c)
    c.lingering = 1
    c.part_ready = 0
    c.close_reason = <uint8_t>reason
    c.frame_began_ms = 0
    c.linger_until_ms = w.now_ms + LINGER_MS
    conn_check_by(w, c, c.linger_until_ms)


cdef Conn* client_for_push(World* w, Conn* up) noexcept nogil:
    """Who gets a request of the server side: whoever asked last of those with a request in flight on
    that connection; with none in flight, whoever used it last."""
    cdef Slot* slot = up.flying
    cdef Conn* c
    if up.owner:
        return conn_of(w, up.owner)
    while slot != NULL:
        c = conn_of(w, slot.asker)
        if c != NULL and not c.hold & HOLD_EOF and not c.lingering:
            return c
        slot = slot.flight_next
    return conn_of(w, up.last_client)


cdef void on_push(World* w, Conn* up, FrameView* view) noexcept nogil:
    """upstream -> client: a request (or one-way frame) of the server side."""
    cdef Cluster* k = up.endpoint.cluster
    cdef uint32_t row = k.row if k != NULL else up.row
    cdef bint oneway = view.kind == FRAME_ONEWAY
    cdef int cause = CAUSE_NONE
    cdef Conn* c = NULL
    cdef Entry* e
    row_of(w.counters, row).c[PUSHES + (C_ONEWAY_ACCEPTED if oneway else C_ACCEPTED)] += 1
    if k == NULL or k.server_requests != SERVER_REQUESTS_REFUSE:
        c = client_for_push(w, up)
    if c == NULL:
        cause = CAUSE_NO_ROUTE
    elif c.hold & HOLD_EOF or c.lingering:
        cause = CAUSE_CLIENT_GONE
    elif up.own_bytes > w.snapshot.limits.queue_bytes_max or \
            c.queued_bytes > w.snapshot.limits.queue_bytes_max // 4 * 3 or \
            up.asked_count >= w.snapshot.limits.in_flight_max:
        cause = CAUSE_OVERLOAD
    if cause == CAUSE_NONE:
        if oneway:
            # nobody answers it: its id stays as the server wrote it
            e = queue_as_it_lies(w, c, view.data, view.size, ENTRY_ONEWAY)
            if e != NULL:
                e.row = row
                e.received_ns = w.now_ns
                e.block = PUSHES
                return
            cause = CAUSE_OVERLOAD
        else:
            if send_request(w, c, up, view, row, 0, NULL, deadline_ms(w, view)) != NULL:
                # It is called, so its answers must be read, whatever it owes or is owed.
                if c.hold & HOLD_QUOTA:
                    end_pause(w, c)
                return
            cause = CAUSE_OVERLOAD
    refuse(w, up, view, row, PUSHES, cause)


cdef void end_pause(World* w, Conn* c) noexcept nogil:
    """The second is over (or the client is needed): it is read again, and what stays over the quota
    is answered "overload"."""
    cdef Link* link = c.links
    cdef bint low
    while link != NULL:
        if link.flow == FLOW_PAUSED:
            low = link.queued_bytes <= w.snapshot.limits.queue_bytes_max // 2
            link.flow = FLOW_OPEN if low else FLOW_SHEDDING
        link = link.next
    conn_release(w, c, HOLD_QUOTA)


# === the message mesh =============================================================================

cdef uint64_t source_of(const Conn* c) noexcept nogil:
    return c.listener if c.role == ROLE_DOWNSTREAM else c.endpoint.id


cdef void tell_later(World* w, Conn* c) noexcept nogil:
    """The event ring is full: the frame being handled stays where it is, and so does what follows
    it, until there is room."""
    w.counters.p[P_PUNT_FULL] += 1
    w.refeed = 1
    conn_hold(w, c, HOLD_PUNT)
    conn_check_by(w, c, w.now_ms + PUNT_RETRY_MS)


cdef void punt(World* w, Conn* c, FrameView* view) noexcept nogil:
    """A frame that Python decides on. What a client sends behind it waits for the reply."""
    if view.size > w.events.size // 4 - RECORD_ROOM:
        row_of(w.counters, c.row).c[REQUESTS + (C_ONEWAY_ACCEPTED if view.kind == FRAME_ONEWAY else C_ACCEPTED)] += 1
        refuse(w, c, view, c.row, REQUESTS, CAUSE_UNDECODABLE)
        return
    if w.untold != NULL or event_push(
            w, EVENT_FRAME, conn_handle(c), source_of(c), c.role == ROLE_UPSTREAM, view.data, view.size) != 0:
        tell_later(w, c)
        return
    w.counters.p[P_PUNTED] += 1
    if c.kind == KIND_PUSH or c.kind == KIND_FORWARD:
        conn_hold(w, c, HOLD_CONTROL)


cdef void on_push_traffic(World* w, Conn* c, FrameView* view) noexcept nogil:
    """A request or one-way frame where a group, or Python, has the say."""
    cdef PushFields fields
    cdef int read
    if c.kind == KIND_PUNT or c.kind == KIND_PEER:
        punt(w, c, view)
        return
    read = push_read(view, &fields)
    if read > 0:
        if c.kind == KIND_PUSH and fields.op == OP_PUBLISH and c.greeted:
            on_request(w, c, view, fields.idempotent)
            return
        if c.kind == KIND_FORWARD and fields.op == OP_FORWARD and c.greeted:
            on_forward(w, c, view, &fields)
            return
        if c.kind == KIND_BROKER and (fields.op == OP_DELIVER or fields.op == OP_CHECK):
            on_deliver(w, c, view, &fields)
            return
    if read >= 0:
        punt(w, c, view)
        return
    w.counters.p[P_MALFORMED + ERROR_HEADERS] += 1
    take_in_push(w, c.row, view)
    refuse(w, c, view, c.row, PUSHES, CAUSE_UNDECODABLE)
    if c.role == ROLE_DOWNSTREAM:
        report_end(w, c, CLOSED_MALFORMED, view.data, view.size)
        say_and_close(w, c, CLOSED_MALFORMED)


cdef inline void take_in_push(World* w, uint32_t row, const FrameView* view) noexcept nogil:
    row_of(w.counters, row).c[PUSHES + (C_ONEWAY_ACCEPTED if view.kind == FRAME_ONEWAY else C_ACCEPTED)] += 1


cdef inline int delivery_hurdle(World* w, const Conn* asker, const Group* g) noexcept nogil:
    """What speaks against any delivery that `asker` asks for now."""
    if g == NULL:
        return CAUSE_NO_ROUTE
    if w.refusing:
        return CAUSE_UPSTREAM_LOST
    if asker.own_bytes > w.snapshot.limits.queue_bytes_max or asker.asked_count >= w.snapshot.limits.in_flight_max:
        return CAUSE_OVERLOAD
    return CAUSE_NONE


cdef void on_deliver(World* w, Conn* up, FrameView* view, PushFields* fields) noexcept nogil:
    """A broker's delivery, or its question for the fate of a prepared message."""
    cdef Group* g = group_named(w, &fields.group)
    cdef uint32_t row = g.row if g != NULL else up.row
    cdef int cause = delivery_hurdle(w, up, g)
    cdef bint keyed
    cdef uint64_t hash = 0
    cdef uint64_t due = deadline_ms(w, view)
    cdef uint32_t at
    cdef uint8_t why = 0
    cdef Key* key = NULL
    view.hint |= PUSH_HINT_DELIVERY
    take_in_push(w, row, view)
    if cause != CAUSE_NONE:
        refuse(w, up, view, row, PUSHES, cause)
        return
    if fields.op == OP_CHECK:
        deliver(w, up, view, g, False, 0, due)
        return
    if g.broadcast:
        broadcast(w, up, view, g, due)
        return
    keyed = g.ordered and fields.key.at != NULL
    if keyed:
        hash = stable_hash(fields.key.at, fields.key.size)
        key = key_find(g, hash)
    if key != NULL:
        at = key.endpoint       # to wherever its last message is unanswered
    else:
        at = group_place(w, g, view, fields, &why)
        if why == WHY_NO_PEER:
            row_of(w.counters, row).c[C_STAYED] += 1
    if at and view.kind == FRAME_REQUEST:
        if forward(w, up, view, fields, g, keyed, hash, at, due):
            return
        if key != NULL:
            refuse(w, up, view, row, PUSHES, CAUSE_OVERLOAD)
            return
        row_of(w.counters, row).c[C_STAYED] += 1
    deliver(w, up, view, g, keyed, hash, due)


cdef void on_forward(World* w, Conn* c, FrameView* view, PushFields* fields) noexcept nogil:
    """A peer's delivery: always for a client of ours, whatever the rules say."""
    cdef Group* g = group_named(w, &fields.group)
    cdef uint32_t row = g.row if g != NULL else c.row
    cdef const Span* node = &w.snapshot.node
    cdef int cause = delivery_hurdle(w, c, g)
    cdef bint keyed
    cdef uint64_t hash = 0
    view.hint |= PUSH_HINT_DELIVERY
    take_in_push(w, row, view)
    if fields.hop != 1 or fields.origin.at == NULL or (
            fields.origin.size == node.size and memcmp(fields.origin.at, node.at, node.size) == 0):
        row_of(w.counters, row).c[C_LOOPS] += 1
        cause = CAUSE_UNDECODABLE
    if cause != CAUSE_NONE:
        refuse(w, c, view, row, PUSHES, cause)
        return
    push_as_deliver(view, fields)
    keyed = g.ordered and fields.key.at != NULL
    if keyed:
        hash = stable_hash(fields.key.at, fields.key.size)
    deliver(w, c, view, g, keyed, hash, deadline_ms(w, view))


cdef inline bint too_full(World* w, const Conn* c) noexcept nogil:
    """It does not read what it gets: more would only lie here."""
    return c.queued_bytes > w.snapshot.limits.queue_bytes_max // 4 * 3


cdef bint hand_over(World* w, Conn* asker, FrameView* view, Group* g, Member* m, bint keyed, uint64_t hash,
                    Fan* fan, uint64_t due) noexcept nogil:
    """One delivery to one member. False = no memory or no id left; nothing has changed."""
    cdef Slot* slot
    cdef Delivery* d = delivery_new(w, DELIVERY_LOCAL)
    if d == NULL:
        return False
    if keyed:
        d.key = key_take(w, g, hash, m, 0)
    slot = send_request(w, m.conn, asker, view, g.row, 0, NULL, due) if d.key != NULL or not keyed else NULL
    if slot == NULL:
        delivery_drop(w, d)
        return False
    d.group = g.id
    d.member = m
    d.fan = fan
    member_take(m)
    slot.delivery = d
    return True


cdef void deliver(World* w, Conn* asker, FrameView* view, Group* g, bint keyed, uint64_t hash,
                  uint64_t due) noexcept nogil:
    """To a client of ours, or refused: nothing waits here."""
    cdef int cause = CAUSE_OVERLOAD
    cdef Key* key = key_find(g, hash) if keyed else NULL
    cdef Member* m = NULL
    cdef Entry* e
    if key == NULL:
        m = member_pick(g, keyed, hash, &cause)
    elif key.member != NULL and key.member.group == g and member_has_credit(key.member):
        m = key.member
    if m != NULL:
        cause = CAUSE_OVERLOAD
        if too_full(w, m.conn):
            pass
        elif view.kind == FRAME_ONEWAY:
            e = queue_as_it_lies(w, m.conn, view.data, view.size, ENTRY_ONEWAY)
            if e != NULL:
                e.row = g.row
                e.received_ns = w.now_ns
                e.block = PUSHES
                return
        elif hand_over(w, asker, view, g, m, keyed, hash, NULL, due):
            return
    refuse(w, asker, view, g.row, PUSHES, cause)


cdef void broadcast(World* w, Conn* up, FrameView* view, Group* g, uint64_t due) noexcept nogil:
    """To every client connection of the group, or to none: one that has no credit would miss it.
    Each copy is counted as a delivery of its own."""
    cdef uint32_t i, last = 0, takers = 0
    cdef Member* m
    cdef Fan* fan = NULL
    cdef FrameView copy
    cdef uint8_t* block = w.block
    cdef uint32_t room = w.block_room
    cdef uint8_t* p
    cdef bint oneway = view.kind == FRAME_ONEWAY
    cdef int cause = CAUSE_NONE
    for i in range(g.members_count):
        m = g.members[i]
        if m.conn.state == CONN_DOOMED or m.conn.lingering:
            continue
        takers += 1
        last = i
        if too_full(w, m.conn) or not (oneway or member_has_credit(m)):
            cause = CAUSE_OVERLOAD
    if takers == 0:
        cause = CAUSE_NO_ROUTE
    if cause == CAUSE_NONE:
        fan = <Fan*>mem_take(w, sizeof(Fan))
        if fan == NULL:
            cause = CAUSE_OVERLOAD
    if cause != CAUSE_NONE:
        refuse(w, up, view, g.row, PUSHES, cause)
        return
    memset(fan, 0, sizeof(Fan))
    fan.asker = conn_handle(up)
    fan.orig = view.id
    fan.hint = view.hint
    fan.silent = oneway
    fan.open = 1            # ours, until all copies are on their way
    row_of(w.counters, g.row).c[PUSHES + (C_ONEWAY_ACCEPTED if oneway else C_ACCEPTED)] += takers - 1
    for i in range(last + 1):
        m = g.members[i]
        if m.conn.state == CONN_DOOMED or m.conn.lingering:
            continue
        copy = view[0]
        w.block = block
        w.block_room = room
        if i != last:
            p = area_take(w, view.size)
            w.block = NULL
            w.block_room = 0
            if p == NULL:
                p = <uint8_t*>mem_take(w, view.size)
                w.block = p
                w.block_room = view.size
            if p != NULL:
                memcpy(p, view.data, view.size)
            copy.data = p
        if copy.data != NULL and one_copy(w, up, &copy, g, m, fan, due):
            continue
        if i != last and w.block != NULL:
            mem_give(w, w.block, w.block_room)
        fan.later = 1
        row_of(w.counters, g.row).c[PUSHES + (C_ONEWAY_DROPPED if oneway else C_FAILED + CAUSE_OVERLOAD)] += 1
    fan_close(w, fan)


cdef bint one_copy(World* w, Conn* up, FrameView* view, Group* g, Member* m, Fan* fan, uint64_t due) noexcept nogil:
    cdef Entry* e
    if view.kind == FRAME_ONEWAY:
        e = queue_as_it_lies(w, m.conn, view.data, view.size, ENTRY_ONEWAY)
        if e == NULL:
            return False
        e.row = g.row
        e.received_ns = w.now_ns
        e.block = PUSHES
        return True
    if not hand_over(w, up, view, g, m, False, 0, fan, due):
        return False
    fan.open += 1
    return True


cdef void fan_close(World* w, Fan* fan) noexcept nogil:
    """One more of a broadcast's copies is settled. The last one answers for all."""
    cdef uint8_t[256] frame
    cdef uint32_t size
    cdef Conn* asker
    fan.open -= 1
    if fan.open:
        return
    asker = conn_of(w, fan.asker)
    if asker != NULL and not fan.silent:
        if fan.later or not fan.consumed:
            size = push_answer(&fan.orig, fan.hint, RESULT_LATER, 0, b"not consumed by all", frame)
        else:
            size = push_answer(&fan.orig, fan.hint, RESULT_CONSUMED, 0, NULL, frame)
        if queue_own(w, asker, frame, size) == NULL:
            conn_doom(w, asker, CLOSED_MEMORY, 0)
    mem_give(w, fan, sizeof(Fan))


cdef void fan_settled(World* w, Delivery* d, bint again) noexcept nogil:
    """This copy of a broadcast is settled; `again`: it was not consumed."""
    cdef Fan* fan = d.fan
    d.fan = NULL
    if again:
        fan.later = 1
    fan_close(w, fan)


# --- to a peer, and back --------------------------------------------------------------------------

cdef bint forward(World* w, Conn* asker, FrameView* view, PushFields* fields, Group* g, bint keyed,
                  uint64_t hash, uint32_t at, uint64_t due) noexcept nogil:
    """To the peer behind endpoint `at`. False = it cannot be reached now; nothing has changed.

    The new frame is kept until it is answered: the queue refers to it, and should the peer refuse
    it, it is offered here.
    """
    cdef Endpoint* endpoint = w.endpoint_of[at] if at < IDS else NULL
    cdef Conn* up = pool_peer(w, endpoint) if endpoint != NULL else NULL
    cdef const MeshLimits* limits = &w.snapshot.limits
    cdef uint32_t size
    cdef Delivery* d
    cdef FrameView sent
    cdef FrameId id
    cdef Span[3] piece
    cdef uint8_t[32] scratch
    cdef Slot* slot
    cdef Entry* e
    if up == NULL or up.queued_bytes > limits.queue_bytes_max:
        return False
    size = push_forward_size(view, fields, &w.snapshot.node)
    if size == 0 or size > limits.codec.frame_bytes_max:
        return False
    d = delivery_new(w, DELIVERY_FORWARD)
    if d == NULL:
        return False
    d.group = g.id
    d.copy = <uint8_t*>mem_take(w, size)
    d.copy_size = size
    if keyed and d.copy != NULL:
        d.key = key_take(w, g, hash, NULL, at)
    if d.copy == NULL or (keyed and d.key == NULL):
        delivery_drop(w, d)
        return False
    push_forward(view, fields, &w.snapshot.node, d.copy)
    if up.codec.scan(NULL, d.copy, size, &limits.codec, 0, &sent) != PARSE_OK:
        delivery_drop(w, d)
        return False
    sent.id = view.id
    sent.hint = view.hint
    slot = new_slot(w, up, asker, &sent, g.row, PUSHES, 0)
    if slot == NULL:
        delivery_drop(w, d)
        return False
    memset(&id, 0, sizeof(id))
    id.number = slot_id(slot)
    up.codec.patch(&sent, &id, scratch, piece)
    e = queue_frame(w, up, d.copy, size, 0, ENTRY_REQUEST)
    if e == NULL:
        leave_flight(w, slot)
        free_slot(w, slot, MISS_NONE)
        delivery_drop(w, d)
        return False
    e.slot = slot
    e.row = g.row
    e.received_ns = w.now_ns
    e.tries = NO_RETRY
    slot.entry = e
    slot.delivery = d
    timer_set(&w.wheel, &slot.timer, due)
    row_of(w.counters, g.row).c[C_FORWARDED] += 1
    row_of(w.counters, endpoint.row).c[C_SENT] += 1
    return True


cdef bint again_from_copy(World* w, Slot* slot, FrameView* view, uint64_t* due) noexcept nogil:
    """The frame that a settled slot kept, as its asker sent it, in w.block: whoever queues it takes
    it over. The slot is out of flight and carries nothing any more; the caller releases it. False =
    there is none (and the slot is as it was)."""
    cdef Delivery* d = <Delivery*>slot.delivery
    cdef Conn* on = <Conn*>slot.table_owner
    cdef Limits limits
    cdef uint8_t* copy = d.copy
    if copy == NULL:
        return False
    limits.frame_bytes_max = d.copy_size     # it was accepted once: a limit lowered since is not for it
    if on.codec.scan(NULL, copy, d.copy_size, &limits, 0, view) != PARSE_OK:
        return False
    view.id = slot.orig
    view.hint = slot.hint
    due[0] = slot.timer.at_ms
    leave_flight(w, slot)
    w.block = copy
    w.block_room = d.copy_size
    d.copy = NULL
    delivery_end(w, slot)
    return True


cdef bint goes_on(World* w, Slot* slot) noexcept nogil:
    """What was lost with its connection, or refused there before it was executed, and may still go
    somewhere else: an idempotent publish to another broker, a forward to a client of ours. False =
    the slot is as it was and has to be settled; else it only remains to be released."""
    cdef Delivery* d = <Delivery*>slot.delivery
    cdef Conn* asker = conn_of(w, slot.asker)
    cdef Group* g
    cdef Cluster* k
    cdef Slot* next_slot
    cdef FrameView view
    cdef PushFields fields
    cdef uint8_t* block = w.block
    cdef uint32_t room = w.block_room
    cdef uint64_t due = 0, only = d.only
    cdef uint8_t tries = slot.tries
    cdef uint32_t row = slot.row
    cdef bint keyed
    cdef uint64_t hash
    if asker == NULL or w.stopping or d.fan != NULL:
        return False
    if d.kind == DELIVERY_FORWARD:
        g = w.group_of[d.group]
        keyed = d.key != NULL
        hash = d.key.hash if keyed else 0
        if g == NULL or not again_from_copy(w, slot, &view, &due):
            return False
        row_of(w.counters, row).c[C_OFFERED] += 1
        if push_read(&view, &fields) > 0:
            push_as_deliver(&view, &fields)
        deliver(w, asker, &view, g, keyed, hash, due)
    elif d.kind == DELIVERY_PUBLISH:
        k = w.cluster_of[slot.cluster]
        if k == NULL or tries >= w.snapshot.limits.retries_max or not again_from_copy(w, slot, &view, &due):
            return False
        row_of(w.counters, row).c[REQUESTS + C_RETRIED] += 1
        next_slot = forward_request(w, asker, &view, row, k, only, due, keep_publish(w, &view, only))
        if next_slot != NULL:
            next_slot.tries = tries + 1
    else:
        return False
    if w.block != NULL:
        mem_give(w, w.block, w.block_room)
    w.block = block
    w.block_room = room
    return True


cdef Delivery* keep_publish(World* w, const FrameView* view, uint64_t only) noexcept nogil:
    """A copy of an idempotent publish, so that it can go to another broker when this one dies. NULL
    = no memory: then it is like any other."""
    cdef Delivery* d = delivery_new(w, DELIVERY_PUBLISH)
    if d == NULL:
        return NULL
    d.only = only
    d.copy = <uint8_t*>mem_take(w, view.size)
    d.copy_size = view.size
    if d.copy == NULL:
        delivery_drop(w, d)
        return NULL
    memcpy(d.copy, view.data, view.size)
    return d


cdef bint delivery_answered(World* w, Slot* slot, const FrameView* view) noexcept nogil:
    """An answer that is not simply passed on: a copy of a broadcast, or a forward that the peer
    refused before execution. True = it is dealt with."""
    cdef Delivery* d = <Delivery*>slot.delivery
    cdef PushFields fields
    cdef int read
    if d.fan == NULL and d.kind != DELIVERY_FORWARD:
        return False
    read = push_read(view, &fields)
    if d.fan != NULL:
        row_of(w.counters, slot.row).c[slot.block + C_ANSWERED] += 1
        row_of(w.counters, slot.row).latency[latency_index(w.now_ns - slot.received_ns)] += 1
        hop_record(w.counters, HOP_UPSTREAM, w.now_ns - slot.sent_ns)
        if read > 0 and fields.result == RESULT_CONSUMED:
            d.fan.consumed = 1
            fan_settled(w, d, False)
        else:
            fan_settled(w, d, True)
        leave_flight(w, slot)
    elif read <= 0 or fields.result != RESULT_NO_CONSUMER or not goes_on(w, slot):
        return False
    free_slot(w, slot, MISS_DUPLICATE)
    return True


# --- Python's own requests ------------------------------------------------------------------------

cdef void call_told(World* w, Slot* slot, int cause) noexcept nogil:
    """Python hears that nobody will answer; the caller ends the slot."""
    cdef Delivery* d = <Delivery*>slot.delivery
    d.notice.b = <uint64_t>cause
    notice_tell(w, &d.notice)


cdef void call_over(World* w, Slot* slot, int cause) noexcept nogil:
    """Its deadline has passed: an id that left rests, as that of any late answer."""
    cdef Conn* on = <Conn*>slot.table_owner
    cdef Entry* e = <Entry*>slot.entry
    call_told(w, slot, cause)
    timer_clear(&w.wheel, &slot.timer)
    if e != NULL:
        entry_drop(w, on, e)
        slot.entry = NULL
        free_slot(w, slot, MISS_LATE)
        return
    delivery_end(w, slot)
    slot_rest(&on.sent, slot, MISS_LATE)
    timer_set(&w.wheel, &slot.timer, w.now_ms + SLOT_REST_MS)


cdef void call_answered(World* w, Conn* c, Slot* slot, FrameView* view) noexcept nogil:
    cdef Delivery* d = <Delivery*>slot.delivery
    if view.size > w.events.size // 4 - RECORD_ROOM:
        call_told(w, slot, CAUSE_UNDECODABLE)
    elif w.untold != NULL or event_push(w, EVENT_ANSWER, d.notice.a, 0, 0, view.data, view.size) != 0:
        tell_later(w, c)
        return
    timer_clear(&w.wheel, &slot.timer)
    free_slot(w, slot, MISS_DUPLICATE)


cdef void relay_call(World* w, uint64_t handle, uint64_t ticket, uint64_t timeout_ms, const uint8_t* data,
                     uint32_t size) noexcept nogil:
    cdef Conn* c = conn_of(w, handle)
    cdef Delivery* d = delivery_new(w, DELIVERY_CALL)
    cdef Slot* slot = NULL
    cdef uint8_t* p
    cdef uint32_t room = 0
    cdef size_t grew = 0
    cdef FrameView view
    cdef FrameId id
    cdef Span[3] piece
    cdef uint8_t[32] scratch
    cdef Entry* e = NULL
    cdef int cause = CAUSE_OVERLOAD
    w.counters.p[P_CALLS] += 1
    if d == NULL:
        if event_push(w, EVENT_ANSWER, ticket, CAUSE_OVERLOAD, 0, NULL, 0) != 0:
            w.counters.p[P_EVENTS_LOST] += 1
        return
    d.notice.kind = EVENT_ANSWER
    d.notice.a = ticket
    p = area_take(w, size)
    if p == NULL:
        p = <uint8_t*>mem_take(w, size)
        room = size
    if c == NULL or c.codec == NULL or c.state == CONN_CONNECTING:
        cause = CAUSE_UPSTREAM_LOST
    elif p != NULL:
        memcpy(p, data, size)
        if c.codec.patch_kind != 0 or c.codec.scan(NULL, p, size, &w.snapshot.limits.codec, 0, &view) != PARSE_OK or \
                view.size != size or view.kind != FRAME_REQUEST:
            cause = CAUSE_UNDECODABLE
        else:
            slot = slot_take(&c.sent, &grew)
            w.budget.used += grew
    if slot != NULL:
        slot.timer.owner = slot
        slot.timer.kind = TIMER_SLOT
        slot.table_owner = c
        slot.received_ns = w.now_ns
        slot.row = c.row
        slot.delivery = d
        memset(&id, 0, sizeof(id))
        id.number = slot_id(slot)
        c.codec.patch(&view, &id, scratch, piece)
        e = queue_frame(w, c, p, size, room, ENTRY_REQUEST)
        if e != NULL:
            e.slot = slot
            e.row = c.row
            e.tries = NO_RETRY
            slot.entry = e
            timer_set(&w.wheel, &slot.timer, w.now_ms + timeout_ms)
            if c.kind == KIND_BROKER and not c.greeted:
                queue_greeting(w, c, e)
            return
        slot.delivery = NULL
        free_slot(w, slot, MISS_NONE)
    if room:
        mem_give(w, p, room)
    d.notice.b = <uint64_t>cause
    notice_tell(w, &d.notice)
    if not d.notice.waiting:
        delivery_drop(w, d)


# === answers, both directions =====================================================================

cdef Slot* slot_for(World* w, Conn* c, const FrameView* view, int* miss) noexcept nogil:
    cdef Slot* slot
    miss[0] = 0
    if c.codec.correlation == CORRELATE_BY_ORDER:
        slot = c.sent.order_head
        if slot == NULL:
            miss[0] = MISS_UNKNOWN
        elif slot.state == SLOT_RESTING:
            miss[0] = slot.rest_cause
        return slot
    return slot_find(&c.sent, view.id.number, miss)


cdef void on_answer(World* w, Conn* c, FrameView* view) noexcept nogil:
    """An answer on `c` to a request that we sent there: from an upstream to a client, or from a
    client to an upstream."""
    cdef int miss = 0
    cdef int block
    cdef Slot* slot = slot_for(w, c, view, &miss)
    cdef Conn* asker
    cdef Entry* e
    cdef Row* row
    cdef uint64_t spent
    if unlikely(slot == NULL):
        w.counters.p[P_DROPPED + miss] += 1
        follow_stream(c, NULL, view, 0, REQUESTS)
        return
    if unlikely(miss != 0):            # it rested: expired, or its asker left
        w.counters.p[P_DROPPED + miss] += 1
        timer_clear(&w.wheel, &slot.timer)
        free_slot(w, slot, miss)
        follow_stream(c, NULL, view, 0, REQUESTS)
        return
    if unlikely(slot.asker == 0 or view.kind == FRAME_HEARTBEAT_ACK or slot.sent_ns == 0):
        if slot.asker == 0 and slot.delivery != NULL and slot.sent_ns != 0 and view.kind == FRAME_RESPONSE:
            call_answered(w, c, slot, view)
        elif slot.asker == 0 and slot.delivery == NULL and view.kind == FRAME_HEARTBEAT_ACK:
            c.heartbeat_open = NULL
            free_slot(w, slot, MISS_DUPLICATE)
        else:
            # Of the wrong kind, or before its question was sent whole: a guess, not an answer.
            w.counters.p[P_DROPPED + MISS_UNKNOWN] += 1
            follow_stream(c, NULL, view, 0, REQUESTS)
        return
    if slot.delivery != NULL and delivery_answered(w, slot, view):
        return
    asker = conn_of(w, slot.asker)
    block = slot.block
    if unlikely(asker == NULL):
        # It was doomed earlier in this turn and is not buried yet.
        w.counters.p[P_DROPPED + MISS_CLIENT_GONE] += 1
        row_of(w.counters, slot.row).c[block + C_FAILED + CAUSE_CLIENT_GONE] += 1
        follow_stream(c, NULL, view, 0, block)
        leave_flight(w, slot)
        free_slot(w, slot, MISS_DUPLICATE)
        return
    e = queue_patched(w, asker, view, &slot.orig, ENTRY_ANSWER)
    if unlikely(e == NULL):
        # No memory for its answer: the client learns it by losing its connection (its burial
        # settles the slot).
        conn_doom(w, asker, CLOSED_MEMORY, 0)
        follow_stream(c, NULL, view, 0, block)
        return
    e.row = slot.row
    e.received_ns = w.now_ns
    spent = w.now_ns - slot.sent_ns
    hop_record(w.counters, HOP_UPSTREAM, spent)
    row = row_of(w.counters, slot.row)
    row.latency[latency_index(w.now_ns - slot.received_ns)] += 1
    row.c[block + C_ANSWERED] += 1
    if c.role == ROLE_UPSTREAM:
        row = row_of(w.counters, c.endpoint.row)
        row.latency[latency_index(spent)] += 1
        row.c[REQUESTS + C_ANSWERED] += 1
        pool_answered(w, c.endpoint)
    if slot.sampled:
        sample(w, slot, 0, w.now_ns)
    follow_stream(c, asker, view, slot.row, block)
    leave_flight(w, slot)
    free_slot(w, slot, MISS_DUPLICATE)


# === streamed frames (VIEW_PARTS on 1:1 bindings) =================================================

cdef void follow_stream(Conn* c, Conn* to, const FrameView* view, uint32_t row, int block) noexcept nogil:
    """Where the next parts of the frame that `c` is sending go: to `to`, or nowhere."""
    if view.flags & FLAG_LAST:
        c.streaming = 0
        if to != NULL:
            to.answer_open = 0
        return
    c.streaming = 1
    c.stream_to = conn_handle(to) if to != NULL else 0
    c.stream_row = row
    c.stream_block = <uint8_t>block
    if to != NULL and to.role == ROLE_DOWNSTREAM:
        to.answer_open = 1


cdef void on_part(World* w, Conn* c, FrameView* view) noexcept nogil:
    """A middle or last part: to wherever the first one went. If that is gone, the rest of the frame
    goes nowhere."""
    cdef Conn* to = conn_of(w, c.stream_to)
    if to != NULL:
        if queue_as_it_lies(w, to, view.data, view.size, ENTRY_PART) == NULL:
            conn_doom(w, to, CLOSED_MEMORY, 0)
    if view.flags & FLAG_LAST:
        c.streaming = 0
        if to != NULL:
            to.answer_open = 0


# === parking ======================================================================================

cdef int tell_parked(World* w, const Parked* p) noexcept nogil:
    """Verdicts are given by what stands at the front of a frame: a ring must not be filled by bodies."""
    cdef uint32_t told = p.size if p.size < PARK_TOLD_BYTES else PARK_TOLD_BYTES
    return event_push(w, EVENT_PARKED, p.ticket, p.row, p.size, p.data, told)


cdef void park(World* w, Conn* c, FrameView* view, uint32_t row, uint32_t cluster) noexcept nogil:
    """Hold one frame until Python's verdict. Order is kept by reading nothing more of this
    connection meanwhile."""
    cdef Parked* p = NULL
    cdef bint oneway = view.kind == FRAME_ONEWAY
    cdef uint8_t* data = NULL
    if w.parked_count < PARKED_MAX and w.budget.used * 100 < w.budget.max * SHED_PERCENT:
        p = <Parked*>mem_take(w, sizeof(Parked))
        data = <uint8_t*>mem_take(w, view.size)
    if p == NULL or data == NULL:
        mem_give(w, p, sizeof(Parked))
        mem_give(w, data, view.size)
        refuse(w, c, view, row, REQUESTS, CAUSE_OVERLOAD)
        return
    memset(p, 0, sizeof(Parked))
    memcpy(data, view.data, view.size)
    p.data = data
    p.size = view.size
    p.row = row
    p.cluster = cluster
    p.client = conn_handle(c)
    p.oneway = oneway
    p.received_ns = w.now_ns
    w.tickets += 1
    p.ticket = w.tickets * w.threads + w.thread
    p.timer.owner = p
    p.timer.kind = TIMER_PARKED
    p.next = w.parked
    w.parked = p
    w.parked_count += 1
    w.counters.p[P_PARKED] = w.parked_count
    c.parked = p
    if not oneway:
        row_of(w.counters, row).c[REQUESTS + C_IN_FLIGHT] += 1
    timer_set(&w.wheel, &p.timer, deadline_ms(w, view))
    conn_hold(w, c, HOLD_PARKED)
    if tell_parked(w, p) != 0:
        # Python has too much to read already: this connection waits with its frame and tells again
        # in a moment.
        w.counters.p[P_PUNT_FULL] += 1
        conn_hold(w, c, HOLD_PUNT)
        conn_check_by(w, c, w.now_ms + PUNT_RETRY_MS)


cdef void unpark(World* w, Parked* p) noexcept nogil:
    cdef Parked** link = &w.parked
    while link[0] != p:
        link = &link[0].next
    link[0] = p.next
    w.parked_count -= 1
    w.counters.p[P_PARKED] = w.parked_count
    timer_clear(&w.wheel, &p.timer)


cdef void settle_parked(World* w, Parked* p, int cause, Cluster* k) noexcept nogil:
    """Forward it (cause CAUSE_NONE), or settle it with a cause."""
    cdef Conn* c = conn_of(w, p.client)
    cdef FrameView view
    cdef uint8_t[64] state
    cdef bint oneway
    cdef uint64_t due = p.timer.at_ms
    cdef Limits limits
    if c == NULL:
        return      # its client is doomed: the burial, in this very turn, settles it
    memset(state, 0, sizeof(state))
    limits.frame_bytes_max = p.size      # it was accepted once: a limit lowered since is not for it
    if c.codec.scan(state, p.data, p.size, &limits, 0, &view) != PARSE_OK:
        conn_doom(w, c, CLOSED_MALFORMED, 0)     # (cannot be: these bytes were a frame before)
        return
    unpark(w, p)
    oneway = view.kind == FRAME_ONEWAY
    if not oneway:
        row_of(w.counters, p.row).c[REQUESTS + C_IN_FLIGHT] -= 1
    w.block = p.data
    w.block_room = p.size
    if cause == CAUSE_NONE:
        forward_request(w, c, &view, p.row, k, 0, due, NULL)
    elif oneway:
        row_of(w.counters, p.row).c[REQUESTS + C_ONEWAY_DROPPED] += 1
    elif cause == CAUSE_DEADLINE:
        row_of(w.counters, p.row).c[REQUESTS + C_EXPIRED] += 1
        answer_own(w, c, &view.id, view.hint, cause)
    else:
        refuse(w, c, &view, p.row, REQUESTS, cause)
    if w.block == NULL:
        p.data = NULL
    w.block = NULL
    w.block_room = 0
    c.parked = NULL
    conn_release(w, c, HOLD_PARKED)
    conn_release(w, c, HOLD_PUNT)
    if p.data != NULL:
        mem_give(w, p.data, p.size)
    mem_give(w, p, sizeof(Parked))


cdef void relay_parked_due(World* w, Parked* p) noexcept nogil:
    settle_parked(w, p, CAUSE_DEADLINE, NULL)


cdef void relay_verdict(World* w, uint64_t ticket, uint64_t cluster, int what) noexcept nogil:
    cdef Parked* p = w.parked
    cdef Cluster* k
    while p != NULL and p.ticket != ticket:
        p = p.next
    if p == NULL:
        return      # it expired, or its client left: settled already
    if what == 0:
        settle_parked(w, p, CAUSE_OVERLOAD, NULL)
        return
    if what == 1:
        cluster = p.cluster
    k = w.cluster_of[cluster] if cluster < (1 << 16) else NULL
    if k == NULL:
        settle_parked(w, p, CAUSE_NO_ENDPOINT, NULL)
    else:
        settle_parked(w, p, CAUSE_NONE, k)


# === reading ======================================================================================

cdef void on_malformed(World* w, Conn* c, const FrameView* view, const uint8_t* data, uint32_t size) noexcept nogil:
    """Out of step with the peer: say so if the id is sound, then close."""
    w.counters.p[P_MALFORMED + view.error] += 1
    w.counters.p[P_DROPPED] += 1
    if c.role == ROLE_DOWNSTREAM:
        report_end(w, c, CLOSED_MALFORMED, data, size)
        if view.flags & FLAG_ANSWERABLE and view.kind == FRAME_REQUEST:
            row_of(w.counters, c.row).c[REQUESTS + C_ACCEPTED] += 1
            refuse(w, c, view, c.row, REQUESTS, CAUSE_UNDECODABLE)
            say_and_close(w, c, CLOSED_MALFORMED)
            return
    conn_doom(w, c, CLOSED_MALFORMED, 0)


cdef void dispatch(World* w, Conn* c, FrameView* view) noexcept nogil:
    cdef uint8_t[128] frame
    if c.streaming and not (view.flags & FLAG_FIRST):
        on_part(w, c, view)
        return
    if view.kind == FRAME_RESPONSE or (view.kind == FRAME_HEARTBEAT_ACK and c.role == ROLE_UPSTREAM):
        on_answer(w, c, view)
    elif view.kind == FRAME_REQUEST or view.kind == FRAME_ONEWAY:
        if c.kind != KIND_RELAY:
            on_push_traffic(w, c, view)
        elif c.role == ROLE_DOWNSTREAM:
            on_request(w, c, view, False)
        else:
            on_push(w, c, view)
    elif view.kind == FRAME_HEARTBEAT:
        w.counters.p[P_HEARTBEATS_IN] += 1
        if queue_own(w, c, frame, c.codec.heartbeat_ack(view, frame)) == NULL:
            conn_doom(w, c, CLOSED_MEMORY, 0)
    elif view.kind == FRAME_GOAWAY:
        w.counters.p[P_GOAWAYS] += 1
        if c.role == ROLE_UPSTREAM:
            pool_goaway(w, c)
    else:
        # an acknowledgement of a heartbeat that we never send to clients
        w.counters.p[P_DROPPED + MISS_UNKNOWN] += 1


cdef uint32_t feed(World* w, Conn* c, uint8_t* data, uint32_t n) noexcept nogil:
    """Handle every whole frame at `data`; returns the bytes taken. Sets part_need when the rest is
    a half frame."""
    cdef FrameView view
    cdef uint32_t at = 0, size
    cdef ParseStatus status
    c.part_ready = 0
    while at < n:
        if c.hold & HOLD_PARSING:
            c.part_ready = 1
            break
        status = c.codec.scan(c.codec_state, data + at, n - at, &w.snapshot.limits.codec, c.cut_through, &view)
        if likely(status == PARSE_OK):
            size = view.size
            w.counters.p[P_FRAMES] += 1
            dispatch(w, c, &view)
            if unlikely(w.refeed):
                # Python has too much to read: the frame stays where it is and is tried again.
                w.refeed = 0
                c.part_ready = 1
                break
            at += size
            if c.state == CONN_DOOMED or c.lingering:
                break
        elif status == PARSE_NEED_MORE:
            c.part_need = view.need
            break
        else:
            on_malformed(w, c, &view, data + at, n - at)
            break
    return at


cdef void drop_part(World* w, Conn* c) noexcept nogil:
    if c.part != NULL:
        mem_give(w, c.part, c.part_room)
        c.part = NULL
    c.part_room = 0
    c.part_size = 0
    c.frame_began_ms = 0


cdef bint part_fits(World* w, Conn* c, uint32_t size) noexcept nogil:
    """Room for `size` bytes in the half frame's buffer. It grows with what was received, never with
    what was announced."""
    cdef uint32_t room
    cdef void* p
    if size <= c.part_room:
        return True
    room = size * 2 if size > PART_IN_AREA_BYTES else (size + 63) & ~<uint32_t>63
    if room > c.part_need and c.part_need >= size:
        room = c.part_need
    p = mem_grow(w, c.part, c.part_room, room)
    if p == NULL:
        conn_doom(w, c, CLOSED_MEMORY, 0)
        return False
    c.part = <uint8_t*>p
    c.part_room = room
    return True


cdef void keep_part(World* w, Conn* c, const uint8_t* data, uint32_t left, bint fresh) noexcept nogil:
    """The turn ends with `left` bytes of a frame begun; `fresh`: it began with these bytes."""
    if c.state == CONN_DOOMED:
        return
    if left == 0 or c.lingering:
        drop_part(w, c)
        return
    if c.part_ready and c.part_need < left:
        c.part_need = left
    if not part_fits(w, c, left):
        return
    memcpy(c.part, data, left)
    c.part_size = left
    if fresh or c.frame_began_ms == 0:
        c.frame_began_ms = w.now_ms
        conn_check_by(w, c, after(w.now_ms, w.snapshot.limits.frame_timeout_ms))


cdef void on_eof(World* w, Conn* c) noexcept nogil:
    """Its last word. A client that only closed its sending half still gets what it is owed."""
    drop_part(w, c)
    if c.lingering:
        conn_doom(w, c, c.close_reason, 0)
    elif c.role == ROLE_DOWNSTREAM and (c.asked_count or c.head != NULL or c.parked != NULL):
        groups_leave(w, c)      # it can answer nothing any more
        conn_hold(w, c, HOLD_EOF)
    else:
        conn_doom(w, c, CLOSED_BY_PEER, 0)


cdef int64_t take_in(World* w, Conn* c, iovec* iov, int count) noexcept nogil:
    """One recv. > 0 bytes, 0 = nothing more now (or the connection ended)."""
    cdef int64_t n = -EINTR
    while n == -EINTR:
        w.counters.p[P_READS] += 1
        n = c.io.recv(c, iov, count)
    if n > 0:
        world_clock(w)
        c.read_ms = w.now_ms
        if unlikely(not c.spoke):
            c.spoke = 1
            if c.role == ROLE_DOWNSTREAM:
                conn_check_by(w, c, after(w.now_ms, w.snapshot.limits.idle_timeout_ms))
        w.counters.p[P_READ_BYTES] += <uint64_t>n
        row_of(w.counters, c.row).c[C_BYTES_IN] += <uint64_t>n
        return n
    if n == 0:
        on_eof(w, c)
    elif n != -EAGAIN:
        conn_doom(w, c, CLOSED_BY_PEER, <int>-n)
    return 0


cdef int64_t throw_away(World* w, Conn* c, uint32_t* offered) noexcept nogil:
    """What still comes after our last word. Returns as read_to_area()."""
    cdef iovec iov
    offered[0] = AREA_BYTES - w.area_used
    iov.iov_base = w.area + w.area_used
    iov.iov_len = offered[0]
    return take_in(w, c, &iov, 1)


cdef int64_t read_to_area(World* w, Conn* c, uint32_t* room) noexcept nogil:
    """Read behind the half frame's few bytes, handle what is whole, keep the rest. Returns the bytes
    of one recv, which was offered `room`; 0 = there is nothing more to read."""
    cdef iovec iov
    cdef uint8_t* base = w.area + w.area_used
    cdef uint32_t before = c.part_size
    cdef uint32_t offered = AREA_BYTES - w.area_used - before
    cdef uint32_t have, used
    cdef int64_t n
    if offered > READ_BYTES:
        offered = READ_BYTES
    room[0] = offered
    if before:
        memcpy(base, c.part, before)
    iov.iov_base = base + before
    iov.iov_len = offered
    n = take_in(w, c, &iov, 1)
    if n == 0:
        return 0
    have = before + <uint32_t>n
    w.area_used += have
    used = feed(w, c, base, have)
    keep_part(w, c, base + used, have - used, used > 0)
    return n


cdef int64_t read_to_part(World* w, Conn* c, uint32_t* offered) noexcept nogil:
    """Complete a long frame where it lies; what follows it goes to the area, in the same recv.
    Returns as read_to_area()."""
    cdef iovec[2] iov
    cdef uint8_t* base
    cdef uint32_t missing, behind, used, room
    cdef int count = 1
    cdef int64_t n
    cdef uint8_t* block
    if c.part_size == c.part_room and not part_fits(w, c, c.part_size + 1):
        return 0
    missing = c.part_room - c.part_size
    if c.part_need > c.part_size and missing > c.part_need - c.part_size:
        missing = c.part_need - c.part_size
    iov[0].iov_base = c.part + c.part_size
    iov[0].iov_len = missing
    base = w.area + w.area_used
    behind = 0
    if c.part_size + missing == c.part_need:
        behind = AREA_BYTES - w.area_used
        if behind > READ_BYTES:
            behind = READ_BYTES
        iov[1].iov_base = base
        iov[1].iov_len = behind
        count = 2
    offered[0] = missing + behind
    n = take_in(w, c, iov, count)
    if n == 0:
        return 0
    if <uint64_t>n < missing:
        c.part_size += <uint32_t>n
        return n
    c.part_size += missing
    behind = <uint32_t>n - missing
    w.area_used += behind
    if c.part_size < c.part_need:
        return n        # its buffer was full: it grows, and what is missing is read next
    # The frame may be whole. Whoever queues it takes the block over.
    block = c.part
    room = c.part_room
    w.block = block
    w.block_room = room
    used = feed(w, c, block, c.part_size)
    if w.block == NULL:
        block = NULL
    w.block = NULL
    w.block_room = 0
    if used == 0 and c.state != CONN_DOOMED:
        # Its announced need was not its whole length (text protocols): the bytes behind it belong
        # to it.
        if behind:
            if not part_fits(w, c, c.part_size + behind):
                return 0
            memcpy(c.part + c.part_size, base, behind)
            c.part_size += behind
        return n
    holds(c.state == CONN_DOOMED or c.lingering or used == c.part_size)    # one frame, the whole block
    c.part = NULL
    c.part_room = 0
    c.part_size = 0
    c.frame_began_ms = 0
    if block != NULL:
        mem_give(w, block, room)
    if c.state == CONN_DOOMED:
        return 0
    if behind:
        used = feed(w, c, base, behind)
        keep_part(w, c, base + used, behind - used, True)
    return n


cdef void relay_readable(World* w, Conn* c, bint to_end) noexcept nogil:
    """Read until the kernel has no more, the connection had its share of the turn, or the area is
    full."""
    cdef uint64_t taken = 0
    cdef uint32_t offered
    cdef int64_t n
    # (with `part_ready` its buffer holds whole frames, which relay_resume() takes first, in the next turn)
    while c.state != CONN_DOOMED and c.hold == 0:
        if c.part_ready:
            conn_look_again(w, c)
            return
        if taken >= READ_BYTES_PER_TURN or AREA_BYTES - w.area_used < 2 * PART_IN_AREA_BYTES:
            conn_look_again(w, c)
            return
        if c.lingering:
            n = throw_away(w, c, &offered)
        elif c.part_size <= PART_IN_AREA_BYTES:
            n = read_to_area(w, c, &offered)
        else:
            n = read_to_part(w, c, &offered)
        if n == 0 or (n < offered and not to_end):
            return
        taken += <uint64_t>n


cdef void feed_whole_part(World* w, Conn* c) noexcept nogil:
    """More is buffered than the read area holds: the buffer stands in for it, until what refers to it
    has left or was spilled."""
    cdef uint8_t* block = c.part
    cdef uint32_t room = c.part_room
    cdef uint32_t size = c.part_size
    cdef uint32_t used
    c.part = NULL
    c.part_room = 0
    c.part_size = 0
    used = feed(w, c, block, size)
    if used == 0 and c.state != CONN_DOOMED and not c.lingering:
        c.part = block
        c.part_room = room
        c.part_size = size
        return
    keep_part(w, c, block + used, size - used, True)
    relay_bury(w)
    flush_all(w)
    mem_give(w, block, room)


cdef void relay_resume(World* w) noexcept nogil:
    cdef Conn* c
    cdef uint64_t handle
    cdef uint8_t* base
    cdef uint32_t size, used
    while w.resume != NULL:
        c = w.resume
        w.resume = c.resume_next
        c.resuming = 0
        if c.lingering:
            drop_part(w, c)
        if c.state == CONN_DOOMED or c.hold & HOLD_PARSING or not c.part_ready:
            continue
        handle = conn_handle(c)
        size = c.part_size
        base = area_take(w, size)
        if base == NULL:
            relay_bury(w)       # (what was queued there still lies in the area)
            flush_all(w)
            if conn_of(w, handle) == NULL:
                continue
            base = area_take(w, size)
        if base == NULL:
            feed_whole_part(w, c)
            continue
        memcpy(base, c.part, size)
        used = feed(w, c, base, size)
        keep_part(w, c, base + used, size - used, used > 0)
        # what epoll reported since it was released was left lying behind these bytes
        conn_look_again(w, c)


# === timers of client connections =================================================================

cdef void relay_client_due(World* w, Conn* c) noexcept nogil:
    cdef const MeshLimits* limits = &w.snapshot.limits
    cdef uint64_t now = w.now_ms
    cdef uint64_t quiet = c.read_ms if c.read_ms > c.wrote_ms else c.wrote_ms
    cdef uint64_t due = NEVER
    cdef uint64_t at
    cdef Link* link
    cdef bint owes = c.asked_count != 0 or c.sent.used > c.sent.resting or c.parked != NULL or \
        c.hold & HOLD_CONTROL != 0
    if c.lingering:
        if now >= c.linger_until_ms:
            conn_doom(w, c, c.close_reason, 0)
        else:
            conn_check_by(w, c, c.linger_until_ms)
        return
    if c.hold & HOLD_QUOTA:
        link = c.links
        while link != NULL:
            if link.flow == FLOW_PAUSED:
                if now >= link.pause_until_ms:
                    end_pause(w, c)
                    break
                due = link.pause_until_ms if link.pause_until_ms < due else due
            link = link.next
    if c.hold & HOLD_PUNT:
        # a parked frame is told from here; any other is read again
        if c.parked == NULL or tell_parked(w, c.parked) == 0:
            conn_release(w, c, HOLD_PUNT)
        else:
            due = now + PUNT_RETRY_MS
    if not c.spoke:
        at = after(c.opened_ms, limits.first_byte_timeout_ms)
        if now >= at:
            conn_doom(w, c, CLOSED_FIRST_BYTE, 0)
            return
        due = at if at < due else due
    elif c.frame_began_ms and c.hold == 0:
        at = after(c.frame_began_ms, limits.frame_timeout_ms)
        if now >= at:
            report_end(w, c, CLOSED_FRAME_TIMEOUT, c.part, c.part_size)
            conn_doom(w, c, CLOSED_FRAME_TIMEOUT, 0)
            return
        due = at if at < due else due
    if reader_stuck(w, c):
        w.counters.p[P_SLOW_CONSUMERS] += 1
        conn_doom(w, c, CLOSED_SLOW_CONSUMER, 0)
        return
    if c.head != NULL and c.blocked:
        at = after(stands_since_ms(c), limits.idle_timeout_ms)
        if now >= at:
            w.counters.p[P_SLOW_CONSUMERS] += 1
            report_end(w, c, CLOSED_SLOW_CONSUMER, NULL, 0)
            conn_doom(w, c, CLOSED_SLOW_CONSUMER, 0)
            return
        due = at if at < due else due
    elif c.spoke and not owes and c.head == NULL:
        at = after(quiet, limits.idle_timeout_ms)
        if now >= at:
            conn_doom(w, c, CLOSED_IDLE, 0)
            return
        due = at if at < due else due
        if c.state == CONN_DRAINING and c.part_size == 0 and now >= quiet + DRAIN_QUIET_MS:
            conn_doom(w, c, CLOSED_DRAINED, 0)
            return
    elif c.state == CONN_DRAINING and not c.spoke and now >= c.opened_ms + DRAIN_QUIET_MS:
        conn_doom(w, c, CLOSED_DRAINED, 0)
        return
    if c.state == CONN_DRAINING:
        at = now + DRAIN_LOOK_MS
        due = at if at < due else due
    # While something is owed nothing limits it, but the moment when nothing is must not be missed by
    # more than the limit itself.
    at = now + (limits.idle_timeout_ms if 0 < limits.idle_timeout_ms < LOOK_AGAIN_MS else LOOK_AGAIN_MS)
    due = at if at < due else due
    conn_check_by(w, c, due)


# === burial =======================================================================================

cdef inline bint may_have_run(const Slot* slot) noexcept nogil:
    """Unless it is idempotent, what left whole is offered to nobody else."""
    return slot.sent_ns != 0 and (<Delivery*>slot.delivery).kind != DELIVERY_PUBLISH


cdef void fail_sent(World* w, Conn* c, int cause) noexcept nogil:
    """Every request that we sent on `c` and that nobody will answer now."""
    cdef uint32_t cursor = 0
    cdef Slot* slot
    while slot_order_pop(&c.sent) != NULL:
        pass
    slot = slot_each(&c.sent, &cursor)
    while slot != NULL:
        if slot.state == SLOT_IN_FLIGHT and slot.asker:
            if slot.delivery == NULL or may_have_run(slot) or not goes_on(w, slot):
                fail(w, slot, cause)
                leave_flight(w, slot)
        elif slot.state == SLOT_IN_FLIGHT and slot.delivery != NULL:
            timer_clear(&w.wheel, &slot.timer)
            call_told(w, slot, cause)
        else:
            timer_clear(&w.wheel, &slot.timer)
        delivery_end(w, slot)
        slot_release(&c.sent, slot, MISS_NONE)
        slot = slot_each(&c.sent, &cursor)


cdef void abandon_asked(World* w, Conn* c) noexcept nogil:
    """Every request of `c` that waits elsewhere: nobody is left to answer."""
    cdef Slot* slot
    while c.asked != NULL:
        slot = c.asked
        row_of(w.counters, slot.row).c[slot.block + C_FAILED + CAUSE_CLIENT_GONE] += 1
        if slot.sampled:
            sample(w, slot, CAUSE_CLIENT_GONE, 0)
        if slot.delivery != NULL and (<Delivery*>slot.delivery).fan != NULL:
            fan_settled(w, <Delivery*>slot.delivery, True)
        end_in_flight(w, slot, MISS_CLIENT_GONE)    # takes it off c.asked
    c.asked_count = 0


cdef bint send_elsewhere(World* w, Entry* e, uint8_t tries) noexcept nogil:
    """A frame of which no byte was written, to another connection. False = settle it as failed.
    Owns nothing: `e` stays the caller's if False."""
    cdef Slot* old = e.slot
    cdef Slot* slot
    cdef Conn* asker = NULL
    cdef Conn* up
    cdef Cluster* k
    cdef FrameView view
    cdef uint8_t[64] state
    cdef uint8_t[32] scratch
    cdef Span[3] piece
    cdef uint64_t due, client
    cdef FrameId id
    cdef int cause = CAUSE_NONE
    if e.link == NULL or tries > w.snapshot.limits.retries_max or w.stopping:
        return False
    k = w.cluster_of[e.link.cluster]
    if k == NULL or k.codec.patch_kind != 0 or (e.link.client == NULL and k.binding == BIND_PER_CLIENT):
        return False
    if old != NULL:
        asker = conn_of(w, old.asker)
        if asker == NULL:
            return False
    memset(state, 0, sizeof(state))
    if k.codec.scan(state, e.data, e.size, &w.snapshot.limits.codec, 0, &view) != PARSE_OK:
        return False     # the limit was lowered since
    client = conn_handle(e.link.client) if e.link.client != NULL else 0
    up = pool_pick(w, k, e.link, client, view.dialect, e.only, &cause)
    if up == NULL:
        return False
    memset(&id, 0, sizeof(id))
    if old != NULL:
        view.id = old.orig
        view.hint = old.hint
        due = old.timer.at_ms
        slot = new_slot(w, up, asker, &view, old.row, old.block, k.id)
        if slot == NULL:
            return False
        slot.delivery = old.delivery
        old.delivery = NULL
        slot.received_ns = old.received_ns
        slot.tries = tries
        slot.sampled = old.sampled
        slot.trace = old.trace
        slot.entry = e
        id.number = slot_id(slot)
        timer_set(&w.wheel, &slot.timer, due)
        # the old slot ends without a word in the ledger: the request lives on in the new one
        old.entry = NULL
        leave_flight(w, old)
        slot_release(&(<Conn*>old.table_owner).sent, old, MISS_NONE)
        e.slot = slot
    # view.id must be the id that the frame carries now, for the checksum's delta: scan it back
    k.codec.scan(state, e.data, e.size, &w.snapshot.limits.codec, 0, &view)
    k.codec.patch(&view, &id, scratch, piece)
    e.tries = tries
    row_of(w.counters, e.row).c[REQUESTS + C_RETRIED] += 1
    row_of(w.counters, up.endpoint.row).c[C_SENT] += 1
    if client:
        up.last_client = client
    queue_append(w, up, e)
    return True


cdef void empty_queue(World* w, Conn* c, bint elsewhere) noexcept nogil:
    """What was queued towards a dead connection: unwritten requests go elsewhere, the rest ends
    here, counted."""
    cdef Entry* e = c.head
    cdef Entry* after
    c.head = NULL
    c.tail = NULL
    c.fresh = NULL
    c.queued_bytes = 0
    c.own_bytes = 0
    c.made_bytes = 0
    while e != NULL:
        after = e.next
        e.next = NULL
        if not e.dropped:
            if elsewhere and not e.begun and e.tries != NO_RETRY and e.kind <= ENTRY_ONEWAY and \
                    send_elsewhere(w, e, <uint8_t>(e.tries + 1)):
                e = after
                continue
            if e.slot != NULL:
                e.slot.entry = NULL
            if e.kind == ENTRY_ONEWAY:
                row_of(w.counters, e.row).c[e.block + C_ONEWAY_DROPPED] += 1
            elif e.kind == ENTRY_ANSWER:
                w.counters.p[P_DROPPED + MISS_CLIENT_GONE] += 1
        entry_free(w, e)
        e = after


cdef void bury_client(World* w, Conn* c) noexcept nogil:
    cdef Link* link
    cdef Link* after
    cdef Conn* up
    cdef uint64_t* row = row_of(w.counters, c.row).c
    groups_leave(w, c)
    notice_gone(w, c)
    abandon_asked(w, c)
    empty_queue(w, c, False)
    fail_sent(w, c, CAUSE_CLIENT_GONE)
    if c.parked != NULL:
        if c.parked.oneway:
            row_of(w.counters, c.parked.row).c[REQUESTS + C_ONEWAY_DROPPED] += 1
        else:
            row_of(w.counters, c.parked.row).c[REQUESTS + C_IN_FLIGHT] -= 1
            row_of(w.counters, c.parked.row).c[REQUESTS + C_FAILED + CAUSE_CLIENT_GONE] += 1
        unpark(w, c.parked)
        mem_give(w, c.parked.data, c.parked.size)
        mem_give(w, c.parked, sizeof(Parked))
    link = c.links
    while link != NULL:
        after = link.next
        up = conn_of(w, link.upstream)
        if up != NULL and up.head == NULL:
            conn_doom(w, up, CLOSED_DRAINED, 0)
        elif up != NULL and up.streaming == 0 and not c.streaming:
            pool_goaway(w, up)      # one-way frames that it sent before it left are still delivered
        elif up != NULL:
            conn_doom(w, up, CLOSED_DRAINED, 0)     # half a streamed frame will never be whole
        link.client = NULL
        if link.entries == 0:
            mem_give(w, link, sizeof(Link))
        link = after
    if c.close_reason == CLOSED_SLOW_CONSUMER or c.close_reason == CLOSED_MEMORY:
        report_end(w, c, c.close_reason, NULL, 0)
    row[C_CONNECTIONS] -= 1
    row[C_CLOSED + c.close_reason] += 1
    w.counters.p[P_CONNECTIONS] -= 1
    fm_add(&w.downstreams, <uint32_t>-1)
    conn_free(w, c)


cdef void bury_upstream(World* w, Conn* c) noexcept nogil:
    cdef Endpoint* endpoint = c.endpoint
    cdef Conn* client
    cdef bint never_came_up = c.close_reason == CLOSED_CONNECT
    cdef uint32_t in_flight
    pool_lost(w, c)
    row_of(w.counters, c.row).c[C_CLOSED + c.close_reason] += 1
    client = conn_of(w, c.owner)
    if client != NULL and client.answer_open:
        # half an answer was forwarded: the rest will never come
        conn_doom(w, client, CLOSED_BY_PEER, 0)
    empty_queue(w, c, True)
    in_flight = c.sent.used - c.sent.resting
    if in_flight and not never_came_up and not endpoint.gone:
        pool_failed(w, endpoint)
    fail_sent(w, c, CAUSE_CONNECT if never_came_up else CAUSE_UPSTREAM_LOST)
    abandon_asked(w, c)
    conn_free(w, c)
    pool_release(w, endpoint)


cdef void relay_bury(World* w) noexcept nogil:
    """Bury until nobody is left: a burial may doom others (a client without memory for its error, a
    per-client upstream)."""
    cdef Conn* c
    while w.doomed != NULL:
        c = w.doomed
        w.doomed = c.doomed_next
        if c.role == ROLE_UPSTREAM:
            bury_upstream(w, c)
        elif c.role == ROLE_DOWNSTREAM:
            bury_client(w, c)
        else:
            conn_free(w, c)


cdef void relay_abort(World* w) noexcept nogil:
    """End of the grace period: every asker in flight gets its explicit answer now, later requests
    are refused the same way."""
    cdef uint32_t i
    cdef Conn* c
    cdef Slot* slot
    cdef Parked* parked = w.parked
    cdef Parked* after_parked
    w.refusing = 1
    while parked != NULL:
        after_parked = parked.next
        settle_parked(w, parked, CAUSE_UPSTREAM_LOST, NULL)
        parked = after_parked
    for i in range(w.conns_high):
        c = w.conns[i]
        if c == NULL or c.state == CONN_DOOMED:
            continue
        while c.asked != NULL:
            slot = c.asked
            fail(w, slot, CAUSE_UPSTREAM_LOST)
            end_in_flight(w, slot, MISS_LATE)
        if c.role == ROLE_DOWNSTREAM and not c.lingering:
            say_and_close(w, c, CLOSED_DRAINED)
