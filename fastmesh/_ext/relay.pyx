# cython: language_level=3
"""Frames (contract: relay.pxd)."""

from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from .bytes cimport memcpy, memset
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
    queue_append,
    queue_frame,
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
    C_IN_FLIGHT,
    C_ONEWAY_ACCEPTED,
    C_ONEWAY_DROPPED,
    C_RETRIED,
    C_SENT,
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
from .pool cimport (
    pool_answered,
    pool_failed,
    pool_goaway,
    pool_lost,
    pool_pick,
    pool_release,
)
from .route cimport BIND_PER_CLIENT, SERVER_REQUESTS_REFUSE, ListenerRoutes, MeshLimits, Rule, route_find
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
    CONN_DOOMED,
    CONN_DRAINING,
    CONN_OPEN,
    DRAIN_LOOK_MS,
    DRAIN_QUIET_MS,
    ENTRY_ANSWER,
    ENTRY_ONEWAY,
    ENTRY_PART,
    ENTRY_REQUEST,
    EVENT_CLOSED,
    EVENT_PARKED,
    EVENT_SAMPLE,
    FLOW_OPEN,
    FLOW_PAUSED,
    FLOW_SHEDDING,
    HOLD_EOF,
    HOLD_ORDER,
    HOLD_PARKED,
    HOLD_PUNT,
    HOLD_QUOTA,
    PARKED_MAX,
    PART_IN_AREA_BYTES,
    PAUSE_MS,
    LINGER_MS,
    READ_BYTES,
    READ_BYTES_PER_TURN,
    ROLE_DOWNSTREAM,
    ROLE_UPSTREAM,
    TIMER_PARKED,
    TIMER_SLOT,
    Bucket,
    Cluster,
    Conn,
    Endpoint,
    Entry,
    Link,
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
    HOLD_PARSING = HOLD_QUOTA | HOLD_PARKED | HOLD_PUNT | HOLD_ORDER
    LOGS_PER_SECOND = 10     # abnormal ends reported, per reason: the counters have them all
    PUNT_RETRY_MS = 10
    PARK_TOLD_BYTES = 1 << 16   # of a parked frame that Python sees
    LOOK_AGAIN_MS = 60000    # a client connection that owes or is owed something, and nothing limits it
    SHED_PERCENT = 90        # of the memory budget: requests are answered "overload"
    TIGHT_PERCENT = 75       # of the memory budget: whoever has requests queued is paused
    TIGHT_BYTES = 1 << 16    # ... beyond this much
    NO_RETRY = 255

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
    cdef uint8_t[128] frame
    cdef uint32_t size = to.codec.answer(id, hint, cause, frame)
    if queue_own(w, to, frame, size) == NULL:
        conn_doom(w, to, CLOSED_MEMORY, 0)


cdef inline int block_of(const Slot* slot) noexcept nogil:
    """Direction of a slot: asked of an upstream = a request, asked of a client = a push."""
    return REQUESTS if (<Conn*>slot.table_owner).role == ROLE_UPSTREAM else PUSHES


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
    row_of(w.counters, slot.row).c[block_of(slot) + C_IN_FLIGHT] -= 1
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
        slot_rest(&on.sent, slot, miss)
        timer_set(&w.wheel, &slot.timer, w.now_ms + SLOT_REST_MS)


cdef void fail(World* w, Slot* slot, int cause) noexcept nogil:
    """Nobody will answer this request any more: its asker is told, the ledger says why. The caller
    ends the slot."""
    cdef Conn* asker = conn_of(w, slot.asker)
    cdef uint64_t* c = row_of(w.counters, slot.row).c
    if cause == CAUSE_DEADLINE:
        c[block_of(slot) + C_EXPIRED] += 1
    else:
        c[block_of(slot) + C_FAILED + cause] += 1
    if slot.sampled:
        sample(w, slot, cause, 0)
    if asker != NULL:
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
        if link.flow == FLOW_OPEN and c.links_count == 1 and c.sent.used == 0 and c.state == CONN_OPEN:
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


cdef Slot* new_slot(World* w, Conn* on, Conn* asker, FrameView* view, uint32_t row, uint32_t cluster) noexcept nogil:
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
    slot.bytes = view.size
    slot.cluster = <uint16_t>cluster
    slot_link(&asker.asked, slot)
    flight_link(&on.flying, slot)
    asker.asked_count += 1
    row_of(w.counters, row).c[block_of(slot) + C_IN_FLIGHT] += 1
    if on.role == ROLE_UPSTREAM:
        on.endpoint.in_flight += 1
        row_of(w.counters, on.endpoint.row).c[REQUESTS + C_IN_FLIGHT] += 1
    if on.codec.correlation == CORRELATE_BY_ORDER:
        slot_order_push(&on.sent, slot)
    return slot


cdef bint send_request(World* w, Conn* on, Conn* asker, FrameView* view, uint32_t row, uint32_t cluster,
                       Link* link, uint64_t due_ms) noexcept nogil:
    """Slot, id, queue. False = no slot or no memory, nothing has changed."""
    cdef FrameId id
    cdef Entry* e
    cdef Slot* slot = new_slot(w, on, asker, view, row, cluster)
    if slot == NULL:
        return False
    memset(&id, 0, sizeof(id))
    id.number = slot_id(slot)
    e = queue_patched(w, on, view, &id, ENTRY_REQUEST)
    if e == NULL:
        leave_flight(w, slot)
        free_slot(w, slot, MISS_NONE)
        return False
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
    return True


cdef void forward_request(World* w, Conn* c, FrameView* view, uint32_t row, Cluster* k, uint64_t due_ms) noexcept nogil:
    """A request or one-way frame that was accepted, towards its cluster."""
    cdef int cause = CAUSE_NONE
    cdef Conn* up
    cdef FrameId id
    cdef Entry* e
    cdef Link* link = link_for(w, c, k.id)
    cdef bint oneway = view.kind == FRAME_ONEWAY
    if link == NULL or over_quota(w, c, link, view.size):
        cause = CAUSE_OVERLOAD
    else:
        up = pool_pick(w, k, link, conn_handle(c), view.dialect, &cause)
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
                if send_request(w, up, c, view, row, k.id, link, due_ms):
                    follow_stream(c, up, view, row, REQUESTS)
                    if c.codec.correlation == CORRELATE_BY_ORDER:
                        conn_hold(w, c, HOLD_ORDER)
                    return
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
                    take_quota(w, c, link, e)
                    if not (view.flags & FLAG_LAST):
                        e.tries = NO_RETRY
                    follow_stream(c, up, view, row, REQUESTS)
                    return
                cause = CAUSE_OVERLOAD
    follow_stream(c, NULL, view, row, REQUESTS)
    refuse(w, c, view, row, REQUESTS, cause)


cdef void on_request(World* w, Conn* c, FrameView* view) noexcept nogil:
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
    forward_request(w, c, view, row, k, deadline_ms(w, view))


cdef void say_and_close(World* w, Conn* c, int reason) noexcept nogil:
    """The explanation leaves, then our side closes. What the client still sends is read and thrown
    away for a moment: closing over unread
    bytes would reset the connection, and the reset would overtake the explanation."""
    if c.state == CONN_DOOMED:
        return
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
            if send_request(w, c, up, view, row, 0, NULL, deadline_ms(w, view)):
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
        if slot.asker == 0 and view.kind == FRAME_HEARTBEAT_ACK:
            c.heartbeat_open = NULL
            free_slot(w, slot, MISS_DUPLICATE)
        else:
            # Of the wrong kind, or before its question was sent whole: a guess, not an answer.
            w.counters.p[P_DROPPED + MISS_UNKNOWN] += 1
            follow_stream(c, NULL, view, 0, REQUESTS)
        return
    asker = conn_of(w, slot.asker)
    block = block_of(slot)
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
    if block == REQUESTS:
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
        forward_request(w, c, &view, p.row, k, due)
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
        if c.role == ROLE_DOWNSTREAM:
            on_request(w, c, view)
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
    while c.state != CONN_DOOMED and c.hold == 0 and not c.part_ready:
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


cdef void relay_resume(World* w) noexcept nogil:
    cdef Conn* c
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
        size = c.part_size
        base = area_take(w, size)
        if base == NULL:
            flush_all(w)
            base = area_take(w, size)
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
    cdef bint owes = c.asked_count != 0 or c.sent.used > c.sent.resting or c.parked != NULL
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
    if c.hold & HOLD_PUNT and c.parked != NULL:
        if tell_parked(w, c.parked) == 0:
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

cdef void fail_sent(World* w, Conn* c, int cause) noexcept nogil:
    """Every request that we sent on `c` and that nobody will answer now."""
    cdef uint32_t cursor = 0
    cdef Slot* slot
    while slot_order_pop(&c.sent) != NULL:
        pass
    slot = slot_each(&c.sent, &cursor)
    while slot != NULL:
        if slot.state == SLOT_IN_FLIGHT and slot.asker:
            fail(w, slot, cause)
            leave_flight(w, slot)
        else:
            timer_clear(&w.wheel, &slot.timer)
        slot_release(&c.sent, slot, MISS_NONE)
        slot = slot_each(&c.sent, &cursor)


cdef void abandon_asked(World* w, Conn* c) noexcept nogil:
    """Every request of `c` that waits elsewhere: nobody is left to answer."""
    cdef Slot* slot
    while c.asked != NULL:
        slot = c.asked
        row_of(w.counters, slot.row).c[block_of(slot) + C_FAILED + CAUSE_CLIENT_GONE] += 1
        if slot.sampled:
            sample(w, slot, CAUSE_CLIENT_GONE, 0)
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
    up = pool_pick(w, k, e.link, client, view.dialect, &cause)
    if up == NULL:
        return False
    memset(&id, 0, sizeof(id))
    if old != NULL:
        view.id = old.orig
        view.hint = old.hint
        due = old.timer.at_ms
        slot = new_slot(w, up, asker, &view, old.row, k.id)
        if slot == NULL:
            return False
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
