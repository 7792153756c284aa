# cython: language_level=3
"""Endpoints and the connections to them (contract: pool.pxd)."""

from libc.errno cimport EINPROGRESS, ENOMEM, ETIMEDOUT, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from .bytes cimport memcmp, memcpy, memset
from .conn cimport (
    conn_arm,
    conn_check_by,
    conn_dirty,
    conn_doom,
    conn_free,
    conn_handle,
    conn_new,
    conn_of,
    conn_release,
    conn_thaw,
    event_push,
    mem_give,
    mem_take,
    notice_gone,
    notice_opened,
    queue_own,
    world_random,
)
from .counters cimport (
    C_CONNECT_FAILED,
    C_CONNECTIONS,
    C_EJECTED,
    C_EJECTIONS,
    C_IN_FLIGHT,
    C_OPENED,
    C_UP,
    CLOSED_CONNECT,
    CLOSED_DRAINED,
    CLOSED_HEARTBEAT,
    CLOSED_IO_ERROR,
    CLOSED_MEMORY,
    P_HEARTBEATS_OUT,
    P_UPSTREAMS,
    REQUESTS,
    row_of,
)
from .frame cimport (
    CAUSE_CONNECT,
    CAUSE_NO_ENDPOINT,
    CAUSE_OVERLOAD,
    CORRELATE_BY_ORDER,
    DIALECT_NONE,
    FrameId,
)
from .route cimport BIND_PER_CLIENT, KIND_RELAY, ClusterSpec, EndpointSpec, SnapshotData
from .slots cimport (
    MISS_LATE,
    SLOT_REST_MS,
    Slot,
    slot_id,
    slot_order_push,
    slot_rest,
    slot_take,
    slots_start,
)
from .timers cimport timer_clear, timer_set
from .world cimport (
    CONN_CONNECTING,
    CONN_DOOMED,
    CONN_DRAINING,
    CONN_OPEN,
    DRAIN_LOOK_MS,
    EVENT_EJECTED,
    EVENT_ENDPOINT_DOWN,
    EVENT_ENDPOINT_UP,
    EVENT_RESTORED,
    HOLD_PUNT,
    HOME_THREAD,
    ROLE_UPSTREAM,
    TIMER_ENDPOINT,
    TIMER_SLOT,
    Cluster,
    Conn,
    Endpoint,
    Link,
    World,
)

cdef extern from "<sys/socket.h>" nogil:
    struct sockaddr:
        unsigned short sa_family
    int socket(int domain, int type, int protocol)
    int connect(int fd, const sockaddr* address, unsigned int size)
    int getsockopt(int fd, int level, int name, void* value, unsigned int* size)
    int setsockopt(int fd, int level, int name, const void* value, unsigned int size)
    int AF_UNIX
    int SOCK_STREAM
    int SOCK_NONBLOCK
    int SOCK_CLOEXEC
    int SOL_SOCKET
    int SO_ERROR

cdef extern from "thread.h" nogil:
    void fm_plain_congestion(int fd, const void* address)

cdef extern from "<netinet/in.h>" nogil:
    int IPPROTO_TCP

cdef extern from "<netinet/tcp.h>" nogil:
    int TCP_NODELAY

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<sys/epoll.h>" nogil:
    uint32_t EPOLLIN
    uint32_t EPOLLOUT

cdef enum:
    NO_FD = -1000000      # of a connection that waits for the world to go on; no errno
    STEADY_MS = 5000      # a connection that lived this long ends the back-off that led to it
    RAMP_STEP_MS = 100    # how often a slow start is recomputed
    RAMP_PERCENT = 10     # where a slow start begins
    WEIGHT_SCALE = 1000   # fixed point of effective weights

cdef uint64_t NEVER = ~(<uint64_t>0)


# === the snapshot's clusters and endpoints ========================================================

cdef Cluster* cluster_for(World* w, const ClusterSpec* spec) noexcept nogil:
    cdef Cluster* k = w.cluster_of[spec.id]
    if k == NULL:
        k = <Cluster*>mem_take(w, sizeof(Cluster))
        if k == NULL:
            return NULL
        memset(k, 0, sizeof(Cluster))
        k.id = spec.id
        k.next = w.clusters
        w.clusters = k
        w.cluster_of[spec.id] = k
    if k.endpoints_room < spec.endpoints_count:
        endpoints = <Endpoint**>mem_take(w, spec.endpoints_count * sizeof(Endpoint*))
        sums = <uint64_t*>mem_take(w, spec.endpoints_count * sizeof(uint64_t))
        if endpoints == NULL or sums == NULL:
            mem_give(w, endpoints, spec.endpoints_count * sizeof(Endpoint*))
            mem_give(w, sums, spec.endpoints_count * sizeof(uint64_t))
            return NULL
        if k.endpoints_count:
            memcpy(endpoints, k.endpoints, k.endpoints_count * sizeof(Endpoint*))
        mem_give(w, k.endpoints, k.endpoints_room * sizeof(Endpoint*))
        mem_give(w, k.cumulative, k.endpoints_room * sizeof(uint64_t))
        k.endpoints = endpoints
        k.cumulative = sums
        k.endpoints_room = spec.endpoints_count
        k.recompute_ms = 0
    return k


cdef Endpoint* endpoint_for(World* w, const EndpointSpec* spec) noexcept nogil:
    cdef Endpoint* e = w.endpoint_of[spec.id]
    if e != NULL:
        return e
    e = <Endpoint*>mem_take(w, sizeof(Endpoint))
    if e == NULL:
        return NULL
    memset(e, 0, sizeof(Endpoint))
    e.id = spec.id
    e.timer.owner = e
    e.timer.kind = TIMER_ENDPOINT
    w.endpoint_of[spec.id] = e
    return e


cdef void endpoint_drain(World* w, Endpoint* e) noexcept nogil:
    cdef Conn* c = e.conns
    cdef Conn* after
    while c != NULL:
        after = c.endpoint_next
        pool_goaway(w, c)
        c = after


cdef void drop_live_groups(World* w, Endpoint* e) noexcept nogil:
    mem_give(w, e.live_groups, e.live_groups_count * sizeof(uint32_t))
    e.live_groups = NULL
    e.live_groups_count = 0
    w.peers_version += 1


cdef int pool_peer_groups(World* w, Endpoint* e, const uint32_t* ids, uint32_t count) noexcept nogil:
    cdef uint32_t* kept = NULL
    cdef uint32_t i, j, id
    if e.up == 0:
        return 0        # it went down meanwhile: whatever it said before says nothing now
    if count:
        kept = <uint32_t*>mem_take(w, count * sizeof(uint32_t))
        if kept == NULL:
            return -1
        # sorted by insertion: they come sorted, and it is once per announcement
        for i in range(count):
            id = ids[i]
            j = i
            while j > 0 and kept[j - 1] > id:
                kept[j] = kept[j - 1]
                j -= 1
            kept[j] = id
    drop_live_groups(w, e)
    e.live_groups = kept
    e.live_groups_count = count
    return 0


cdef void endpoint_forget(World* w, Endpoint* e) noexcept nogil:
    """Not in the snapshot any more: nothing new goes there, what is in flight finishes."""
    e.gone = 1
    e.cluster = NULL
    timer_clear(&w.wheel, &e.timer)
    if w.endpoint_of[e.id] == e:
        w.endpoint_of[e.id] = NULL
    row_of(w.counters, e.row).c[C_EJECTED] -= 1 if e.ejected_until_ms else 0
    drop_live_groups(w, e)
    endpoint_drain(w, e)
    if e.conns == NULL:
        mem_give(w, e, sizeof(Endpoint))


cdef void move_gauges(World* w, Endpoint* e, uint32_t row) noexcept nogil:
    cdef uint64_t* old = row_of(w.counters, e.row).c
    cdef uint64_t* new = row_of(w.counters, row).c
    cdef Conn* c = e.conns
    if e.row == row:
        return
    old[C_CONNECTIONS] -= e.conns_count
    new[C_CONNECTIONS] += e.conns_count
    old[C_UP] -= e.up
    new[C_UP] += e.up
    old[REQUESTS + C_IN_FLIGHT] -= e.in_flight
    new[REQUESTS + C_IN_FLIGHT] += e.in_flight
    if e.ejected_until_ms:
        old[C_EJECTED] -= 1
        new[C_EJECTED] += 1
    e.row = row
    while c != NULL:
        c.row = row
        c = c.endpoint_next


cdef void forget_strays(World* w, const SnapshotData* s) noexcept nogil:
    """Endpoints made for a snapshot that was refused belong to no cluster."""
    cdef uint32_t i
    cdef Endpoint* e
    for i in range(s.endpoints_count):
        e = w.endpoint_of[s.endpoints[i].id]
        if e != NULL and e.cluster == NULL:
            w.endpoint_of[e.id] = NULL
            mem_give(w, e, sizeof(Endpoint))


cdef int pool_sync(World* w, const SnapshotData* s) noexcept nogil:
    cdef uint32_t i, j
    cdef const ClusterSpec* cs
    cdef const EndpointSpec* es
    cdef Cluster* k
    cdef Cluster** link
    cdef Endpoint* e
    cdef bint rebound
    # First everything that may fail, so that a refusal leaves the old clusters whole.
    for i in range(s.clusters_count):
        if cluster_for(w, &s.clusters[i]) == NULL:
            return -1
    for i in range(s.endpoints_count):
        if endpoint_for(w, &s.endpoints[i]) == NULL:
            forget_strays(w, s)
            return -1
    for i in range(s.clusters_count):
        cs = &s.clusters[i]
        k = w.cluster_of[cs.id]
        for j in range(cs.first_endpoint, cs.first_endpoint + cs.endpoints_count):
            w.endpoint_of[s.endpoints[j].id].version = s.version
        # endpoints that this cluster had and has no more
        for j in range(k.endpoints_count):
            if k.endpoints[j].version != s.version:
                endpoint_forget(w, k.endpoints[j])
        rebound = k.version != 0 and k.binding != cs.binding
        k.version = s.version
        k.row = cs.row
        k.codec = cs.codec
        k.binding = cs.binding
        k.server_requests = cs.server_requests
        k.kind = cs.kind
        k.connections = cs.connections
        k.endpoints_count = cs.endpoints_count
        k.recompute_ms = 0
        k.ejected = 0
        for j in range(cs.endpoints_count):
            es = &s.endpoints[cs.first_endpoint + j]
            e = w.endpoint_of[es.id]
            k.endpoints[j] = e
            e.cluster = k
            e.weight = es.weight
            move_gauges(w, e, es.row)
            if e.ejected_until_ms:
                k.ejected += 1
            if e.address_size != es.address_size or memcmp(e.address, es.address, es.address_size) != 0:
                # the name moved: new connections go to the new address
                e.address_size = es.address_size
                memcpy(e.address, es.address, sizeof(e.address))
                e.retry_at_ms = 0
                e.backoff_step = 0
                if e.conns != NULL:
                    endpoint_drain(w, e)
            elif rebound:
                endpoint_drain(w, e)
            pool_endpoint_due(w, e)
    link = &w.clusters
    while link[0] != NULL:
        k = link[0]
        if k.version == s.version:
            link = &k.next
            continue
        for j in range(k.endpoints_count):
            if k.endpoints[j].cluster == k:
                endpoint_forget(w, k.endpoints[j])
        link[0] = k.next
        w.cluster_of[k.id] = NULL
        mem_give(w, k.endpoints, k.endpoints_room * sizeof(Endpoint*))
        mem_give(w, k.cumulative, k.endpoints_room * sizeof(uint64_t))
        mem_give(w, k, sizeof(Cluster))
    return 0


cdef void pool_stop(World* w) noexcept nogil:
    """Free every cluster and endpoint. All connections are gone already."""
    cdef Cluster* k = w.clusters
    cdef Cluster* after
    cdef uint32_t j
    while k != NULL:
        after = k.next
        for j in range(k.endpoints_count):
            timer_clear(&w.wheel, &k.endpoints[j].timer)
            drop_live_groups(w, k.endpoints[j])
            w.endpoint_of[k.endpoints[j].id] = NULL
            mem_give(w, k.endpoints[j], sizeof(Endpoint))
        w.cluster_of[k.id] = NULL
        mem_give(w, k.endpoints, k.endpoints_room * sizeof(Endpoint*))
        mem_give(w, k.cumulative, k.endpoints_room * sizeof(uint64_t))
        mem_give(w, k, sizeof(Cluster))
        k = after
    w.clusters = NULL


# === connecting ===================================================================================

cdef uint64_t backoff(World* w, Endpoint* e) noexcept nogil:
    """Exponential with a jitter of a quarter either way, so that a thousand sidecars do not return
    in step."""
    cdef uint64_t delay = w.snapshot.limits.backoff_ms
    cdef uint32_t step = e.backoff_step if e.backoff_step < 16 else 16
    delay = delay << step
    if delay > w.snapshot.limits.backoff_ms_max:
        delay = w.snapshot.limits.backoff_ms_max
    return delay * 3 // 4 + world_random(w) % (delay // 2 + 1)


cdef void connect_failed(World* w, Endpoint* e, int error) noexcept nogil:
    cdef uint8_t reason = CLOSED_CONNECT
    event_push(w, EVENT_ENDPOINT_DOWN, e.id, e.up, <uint64_t>error, &reason, 1)
    row_of(w.counters, e.row).c[C_CONNECT_FAILED] += 1
    e.retry_at_ms = w.now_ms + backoff(w, e)
    e.backoff_step += 1
    if e.cluster != NULL:
        e.cluster.recompute_ms = 0
        timer_set(&w.wheel, &e.timer, e.retry_at_ms)


cdef int connect_to(const Endpoint* e) noexcept nogil:
    """A descriptor that is connecting, or -errno."""
    cdef const sockaddr* address = <const sockaddr*>e.address
    cdef int one = 1
    cdef int error
    cdef int fd = socket(address.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    if fd < 0:
        return -errno
    fm_plain_congestion(fd, address)
    if address.sa_family != AF_UNIX:
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
    if connect(fd, address, e.address_size) != 0 and errno != EINPROGRESS:
        # (a UNIX socket whose backlog is full says EAGAIN: that too is "not now")
        error = errno
        close(fd)
        return -error
    return fd


cdef Conn* pool_connect(World* w, Endpoint* e, uint64_t owner) noexcept nogil:
    """Begin a connection. NULL = it failed at once (counted, back-off planned)."""
    cdef Conn* c
    cdef int fd = connect_to(e) if w.frozen == 0 else NO_FD
    if fd < 0 and fd != NO_FD:
        connect_failed(w, e, -fd)
        return NULL
    c = conn_new(w, fd, ROLE_UPSTREAM)
    if c == NULL:
        if fd != NO_FD:
            close(fd)
        connect_failed(w, e, ENOMEM)
        return NULL
    c.state = CONN_CONNECTING
    c.kind = e.cluster.kind
    # What the mesh itself says to a broker or peer is in dialect 0, and comes first.
    c.dialect = DIALECT_NONE if c.kind == KIND_RELAY else 0
    c.codec = e.cluster.codec
    c.row = e.row
    c.endpoint = e
    c.owner = owner
    slots_start(&c.sent, w.snapshot.limits.in_flight_max, w.first_generation)
    if c.codec.state_bytes:
        c.codec_state = mem_take(w, c.codec.state_bytes)
        if c.codec_state == NULL:
            conn_free(w, c)
            connect_failed(w, e, ENOMEM)
            return NULL
        memset(c.codec_state, 0, c.codec.state_bytes)
    if conn_arm(w, c, EPOLLOUT) != 0:
        conn_free(w, c)
        connect_failed(w, e, ENOMEM)
        return NULL
    c.endpoint_next = e.conns
    e.conns = c
    e.conns_count += 1
    w.counters.p[P_UPSTREAMS] += 1
    row_of(w.counters, e.row).c[C_CONNECTIONS] += 1
    conn_check_by(w, c, w.now_ms + w.snapshot.limits.connect_timeout_ms)
    return c


cdef void connect_now(World* w, Conn* c) noexcept nogil:
    """A connection that could not begin while the world was frozen, or began in another process."""
    cdef Endpoint* e = c.endpoint
    cdef int fd
    if e.gone:
        conn_doom(w, c, CLOSED_DRAINED, 0)
        return
    if e.address_size == 0 or w.now_ms < e.retry_at_ms:
        conn_doom(w, c, CLOSED_DRAINED, 0)      # what waits for it goes elsewhere
        return
    fd = connect_to(e)
    if fd < 0:
        conn_doom(w, c, CLOSED_CONNECT, -fd)
        return
    c.fd = fd
    c.opened_ms = w.now_ms
    conn_thaw(w, c)
    conn_check_by(w, c, w.now_ms + w.snapshot.limits.connect_timeout_ms)


cdef void pool_thaw(World* w) noexcept nogil:
    cdef Cluster* k
    cdef Conn* c
    cdef uint32_t i
    for i in range(w.conns_high):
        c = w.conns[i]
        if c != NULL and c.role == ROLE_UPSTREAM and c.state == CONN_CONNECTING and c.fd < 0:
            connect_now(w, c)
    k = w.clusters
    while k != NULL:
        for i in range(k.endpoints_count):
            if w.adopted and k.endpoints[i].up:
                event_push(w, EVENT_ENDPOINT_UP, k.endpoints[i].id, k.endpoints[i].up, 0, NULL, 0)
            elif w.adopted:
                drop_live_groups(w, k.endpoints[i])     # nobody came who said it
            pool_endpoint_due(w, k.endpoints[i])
        k = k.next


cdef void pool_attach(World* w, Endpoint* e, Conn* c) noexcept nogil:
    c.endpoint = e
    c.row = e.row
    c.endpoint_next = e.conns
    e.conns = c
    e.conns_count += 1
    w.counters.p[P_UPSTREAMS] += 1
    row_of(w.counters, e.row).c[C_CONNECTIONS] += 1
    if c.state == CONN_OPEN:
        c.counted = 1
        e.up += 1
        row_of(w.counters, e.row).c[C_UP] += 1
    if c.state != CONN_CONNECTING:
        e.ever_up = 1
    w.peers_version += 1


cdef void pool_detach(World* w, Conn* c) noexcept nogil:
    cdef Endpoint* e = c.endpoint
    cdef Conn** link = &e.conns
    while link[0] != c:
        link = &link[0].endpoint_next
    link[0] = c.endpoint_next
    e.conns_count -= 1
    if c.counted:
        e.up -= 1


cdef Endpoint* pool_gone(World* w, uint32_t id, uint32_t row) noexcept nogil:
    cdef Endpoint* e = <Endpoint*>mem_take(w, sizeof(Endpoint))
    if e == NULL:
        return NULL
    memset(e, 0, sizeof(Endpoint))
    e.id = id
    e.row = row
    e.gone = 1
    e.timer.owner = e
    e.timer.kind = TIMER_ENDPOINT
    return e


cdef bint floor_allows(World* w, const Cluster* k) noexcept nogil:
    """One more ejected: a share of the cluster, and never its last endpoint."""
    return k.ejected + 1 < k.endpoints_count and \
        (k.ejected + 1) * 100 <= k.endpoints_count * w.snapshot.limits.eject_percent_max


cdef void pool_eject(World* w, Endpoint* e, uint64_t for_ms) noexcept nogil:
    cdef Cluster* k = e.cluster
    if k == NULL or e.ejected_until_ms or not floor_allows(w, k):
        return
    e.ejected_until_ms = w.now_ms + for_ms
    w.peers_version += 1
    k.ejected += 1
    k.recompute_ms = 0
    row_of(w.counters, e.row).c[C_EJECTED] += 1


cdef void pool_connected(World* w, Conn* c) noexcept nogil:
    cdef int error = 0
    cdef unsigned int size = sizeof(error)
    cdef Endpoint* e = c.endpoint
    if getsockopt(c.fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0:
        error = errno
    if error:
        conn_doom(w, c, CLOSED_CONNECT, error)
        return
    if e.gone:
        conn_doom(w, c, CLOSED_DRAINED, 0)
        return
    c.state = CONN_OPEN
    c.opened_ms = c.read_ms = c.wrote_ms = w.now_ms
    c.counted = 1
    e.up += 1
    row_of(w.counters, e.row).c[C_UP] += 1
    row_of(w.counters, e.row).c[C_OPENED] += 1
    if e.ever_up and e.up == 1 and c.owner == 0 and w.snapshot.limits.slow_start_ms:
        e.ramp_from_ms = w.now_ms
    e.ever_up = 1
    e.cluster.recompute_ms = 0
    w.peers_version += 1
    if w.snapshot.limits.heartbeat_ms:
        conn_check_by(w, c, w.now_ms + w.snapshot.limits.heartbeat_ms)
    event_push(w, EVENT_ENDPOINT_UP, e.id, e.up, 0, NULL, 0)
    if c.kind != KIND_RELAY and not notice_opened(w, c, e.id, 1):
        conn_doom(w, c, CLOSED_MEMORY, 0)
        return
    if conn_arm(w, c, EPOLLIN) != 0:
        conn_doom(w, c, CLOSED_IO_ERROR, errno)
        return
    conn_dirty(w, c)
    if c.owner and conn_of(w, c.owner) == NULL:
        pool_goaway(w, c)


cdef void pool_lost(World* w, Conn* c) noexcept nogil:
    cdef Endpoint* e = c.endpoint
    cdef Conn** link = &e.conns
    cdef uint8_t reason = c.close_reason
    cdef uint64_t due
    while link[0] != c:
        link = &link[0].endpoint_next
    link[0] = c.endpoint_next
    e.conns_count -= 1
    notice_gone(w, c)
    w.peers_version += 1
    w.counters.p[P_UPSTREAMS] -= 1
    row_of(w.counters, e.row).c[C_CONNECTIONS] -= 1
    if c.counted:
        e.up -= 1
        row_of(w.counters, e.row).c[C_UP] -= 1
        event_push(w, EVENT_ENDPOINT_DOWN, e.id, e.up, <uint64_t>c.close_errno, &reason, 1)
    if e.up == 0:
        drop_live_groups(w, e)
    if e.gone:
        return
    e.cluster.recompute_ms = 0
    if reason == CLOSED_CONNECT:
        connect_failed(w, e, c.close_errno)
        pool_failed(w, e)
        return
    if not c.counted:
        # it drained, or ended while connecting for a reason of ours: whatever is missing is opened
        if e.cluster.binding != BIND_PER_CLIENT and e.timer.link == NULL:
            due = w.now_ms + w.snapshot.limits.backoff_ms
            timer_set(&w.wheel, &e.timer, due if due > e.retry_at_ms else e.retry_at_ms)
        return
    if w.now_ms - c.opened_ms >= STEADY_MS:
        e.backoff_step = 0
    if e.cluster.binding != BIND_PER_CLIENT:
        e.retry_at_ms = w.now_ms + backoff(w, e)
        e.backoff_step += 1
        timer_set(&w.wheel, &e.timer, e.retry_at_ms)


cdef void pool_release(World* w, Endpoint* e) noexcept nogil:
    if e.gone and e.conns == NULL:
        mem_give(w, e, sizeof(Endpoint))


cdef void pool_goaway(World* w, Conn* c) noexcept nogil:
    cdef Endpoint* e = c.endpoint
    if c.state == CONN_CONNECTING:
        if c.head == NULL or e.gone or c.owner == 0:
            conn_doom(w, c, CLOSED_DRAINED, 0)
        return      # what its client queued before it left goes first: pool_connected() comes back here
    if c.state != CONN_OPEN:
        return
    c.state = CONN_DRAINING
    c.counted = 0
    e.up -= 1
    w.peers_version += 1
    row_of(w.counters, e.row).c[C_UP] -= 1
    if e.cluster != NULL:
        e.cluster.recompute_ms = 0
    if not e.gone:
        timer_set(&w.wheel, &e.timer, w.now_ms)   # a fresh connection beside it
    conn_check_by(w, c, w.now_ms + DRAIN_LOOK_MS)
    pool_settle(w, c)


cdef void pool_settle(World* w, Conn* c) noexcept nogil:
    # (a late answer would have nobody to reach)
    cdef uint32_t awaited = c.sent.used - c.sent.resting
    if c.heartbeat_open != NULL:
        awaited -= 1
    if c.state == CONN_DRAINING and awaited == 0 and c.head == NULL and c.asked_count == 0:
        conn_doom(w, c, CLOSED_DRAINED, 0)


# === the choice ===================================================================================

cdef bint can_be_chosen(World* w, Cluster* k, Endpoint* e) noexcept nogil:
    if e.weight == 0 or e.address_size == 0 or e.ejected_until_ms:
        return False
    if k.binding == BIND_PER_CLIENT:
        return w.now_ms >= e.retry_at_ms
    return e.up > 0


cdef void recompute(World* w, Cluster* k) noexcept nogil:
    cdef uint32_t i
    cdef Endpoint* e
    cdef uint64_t percent, elapsed
    k.total = 0
    k.recompute_ms = NEVER
    for i in range(k.endpoints_count):
        e = k.endpoints[i]
        e.effective = 0
        if can_be_chosen(w, k, e):
            percent = 100
            if e.ramp_from_ms:
                elapsed = w.now_ms - e.ramp_from_ms
                if elapsed >= w.snapshot.limits.slow_start_ms:
                    e.ramp_from_ms = 0
                    if e.failures == 0:
                        e.ejections = 0
                else:
                    percent = RAMP_PERCENT + (100 - RAMP_PERCENT) * elapsed // w.snapshot.limits.slow_start_ms
                    k.recompute_ms = w.now_ms + RAMP_STEP_MS
            e.effective = <uint32_t>(e.weight * WEIGHT_SCALE * percent // 100)
        elif k.binding == BIND_PER_CLIENT and e.retry_at_ms > w.now_ms and e.retry_at_ms < k.recompute_ms:
            k.recompute_ms = e.retry_at_ms
        k.total += e.effective
        k.cumulative[i] = k.total


cdef Endpoint* roll(World* w, Cluster* k) noexcept nogil:
    cdef uint64_t at = ((<uint64_t>world_random(w) << 32) | world_random(w)) % k.total
    cdef uint32_t low = 0, high = k.endpoints_count - 1, middle
    while low < high:
        middle = (low + high) // 2
        if k.cumulative[middle] > at:
            high = middle
        else:
            low = middle + 1
    return k.endpoints[low]


cdef Endpoint* choose(World* w, Cluster* k) noexcept nogil:
    """Two rolls by weight, the one with fewer in flight per weight wins; NULL = nobody can be
    chosen."""
    cdef Endpoint* a
    cdef Endpoint* b
    if w.now_ms >= k.recompute_ms:
        recompute(w, k)
    if k.total == 0:
        return NULL
    if k.endpoints_count == 1:
        return k.endpoints[0]
    a = roll(w, k)
    b = roll(w, k)
    if a != b and <uint64_t>b.in_flight * a.effective < <uint64_t>a.in_flight * b.effective:
        return b
    return a


cdef uint32_t speaking(Endpoint* e, int dialect) noexcept nogil:
    """How many connections of the endpoint speak that dialect, or will once they are up."""
    cdef Conn* c = e.conns
    cdef uint32_t count = 0
    while c != NULL:
        if c.dialect == dialect and c.owner == 0 and \
                (c.state == CONN_OPEN or c.state == CONN_CONNECTING):
            count += 1
        c = c.endpoint_next
    return count


cdef Conn* lightest(Endpoint* e, int state, int dialect) noexcept nogil:
    """The endpoint's connection in that state and dialect with the fewest ids in use and one left.

    One that has not spoken yet takes any dialect, while fewer than `connections` speak it. Or NULL.
    """
    cdef bint may_claim = speaking(e, dialect) < e.cluster.connections
    cdef Conn* c = e.conns
    cdef Conn* best = NULL
    while c != NULL:
        if c.state == state and c.owner == 0 and c.sent.used < c.sent.capacity and \
                (c.dialect == dialect or (may_claim and c.dialect == DIALECT_NONE)):
            if best == NULL or c.sent.used < best.sent.used or \
                    (c.sent.used == best.sent.used and c.dialect == dialect):
                best = c
        c = c.endpoint_next
    return best


cdef Conn* usable(World* w, Endpoint* e, int dialect) noexcept nogil:
    """A connection of this endpoint for a frame of that dialect; a new one where none speaks it."""
    cdef Conn* c = lightest(e, CONN_OPEN, dialect)
    if c == NULL:
        c = lightest(e, CONN_CONNECTING, dialect)
    if c == NULL and speaking(e, dialect) == 0 and w.now_ms >= e.retry_at_ms:
        c = pool_connect(w, e, 0)
    if c != NULL:
        c.dialect = <uint8_t>dialect
    return c


cdef Endpoint* choose_of(World* w, Cluster* k, uint64_t only) noexcept nogil:
    """Of these endpoints the one with the fewest in flight by weight; among equals (with little
    traffic nothing is in flight anywhere) by chance and weight. NULL = none can be chosen."""
    cdef Endpoint* e
    cdef Endpoint* best = NULL
    cdef uint64_t mine, least, equals = 0
    cdef uint32_t i
    if w.now_ms >= k.recompute_ms:
        recompute(w, k)
    for i in range(k.endpoints_count):
        e = k.endpoints[i]
        if not among(only, i) or not e.effective:
            continue
        if best != NULL:
            mine = <uint64_t>e.in_flight * best.effective
            least = <uint64_t>best.in_flight * e.effective
            if mine > least:
                continue
            if mine == least:
                equals += e.effective
                if ((<uint64_t>world_random(w) << 32) | world_random(w)) % equals < e.effective:
                    best = e
                continue
        best = e
        equals = e.effective
    return best


cdef inline bint among(uint64_t only, uint32_t at) noexcept nogil:
    return only == 0 or (at < 64 and (only >> at) & 1)


cdef Conn* pick_shared(World* w, Cluster* k, int dialect, uint64_t only, int* cause) noexcept nogil:
    cdef Endpoint* e = choose_of(w, k, only) if only else choose(w, k)
    cdef Conn* c
    cdef uint32_t i
    if e != NULL:
        c = usable(w, e, dialect)
        if c != NULL:
            return c
        # every id of the chosen one is in use: any other endpoint with room is better than "overload"
        for i in range(k.endpoints_count):
            if k.endpoints[i].effective and among(only, i):
                c = usable(w, k.endpoints[i], dialect)
                if c != NULL:
                    return c
        cause[0] = CAUSE_OVERLOAD if speaking(e, dialect) else CAUSE_CONNECT
        return NULL
    # Nobody is up. A connect under way is worth waiting for (it is bounded): so a client that comes
    # with our first breath, or in the moment of a reconnect, is served.
    for i in range(k.endpoints_count):
        e = k.endpoints[i]
        if e.weight and not e.ejected_until_ms and among(only, i):
            c = lightest(e, CONN_CONNECTING, dialect)
            if c != NULL:
                c.dialect = <uint8_t>dialect
                return c
    cause[0] = CAUSE_NO_ENDPOINT
    return NULL


cdef Conn* pool_peer(World* w, Endpoint* e) noexcept nogil:
    cdef Conn* c = e.conns
    while c != NULL:
        if c.state == CONN_OPEN and c.sent.used < c.sent.capacity:
            return c
        c = c.endpoint_next
    return NULL


cdef Conn* pool_pick(World* w, Cluster* k, Link* link, uint64_t client, int dialect,
                     uint64_t only, int* cause) noexcept nogil:
    cdef Conn* c
    cdef Endpoint* e
    if k.kind != KIND_RELAY:
        # One connection to a broker, on which we said hello in dialect 0: another one would have to
        # say it first. Whoever answers all in the dialect of the first frame answers in v1 then,
        # which everybody reads.
        dialect = 0
    if k.binding != BIND_PER_CLIENT:
        return pick_shared(w, k, dialect, only, cause)
    c = conn_of(w, link.upstream)
    if c != NULL and c.state != CONN_DRAINING:
        if c.sent.used < c.sent.capacity:
            return c
        cause[0] = CAUSE_OVERLOAD
        return NULL
    e = choose(w, k)
    if e == NULL:
        cause[0] = CAUSE_NO_ENDPOINT
        return NULL
    c = pool_connect(w, e, client)
    if c == NULL:
        cause[0] = CAUSE_CONNECT
        return NULL
    c.dialect = <uint8_t>dialect
    link.upstream = conn_handle(c)
    return c


# === health =======================================================================================

cdef void pool_answered(World* w, Endpoint* e) noexcept nogil:
    e.failures = 0


cdef void pool_failed(World* w, Endpoint* e) noexcept nogil:
    cdef Cluster* k = e.cluster
    cdef uint64_t span
    e.failures += 1
    if k == NULL or e.ejected_until_ms or w.snapshot.limits.eject_failures == 0 or \
            e.failures < w.snapshot.limits.eject_failures:
        return
    if not floor_allows(w, k):
        return
    e.ejections += 1
    span = <uint64_t>w.snapshot.limits.eject_ms * e.ejections
    if span > w.snapshot.limits.eject_ms_max:
        span = w.snapshot.limits.eject_ms_max
    pool_eject(w, e, span)
    row_of(w.counters, e.row).c[C_EJECTIONS] += 1
    event_push(w, EVENT_EJECTED, e.id, span, 0, NULL, 0)
    if e.timer.link == NULL or e.timer.at_ms > e.ejected_until_ms:
        timer_set(&w.wheel, &e.timer, e.ejected_until_ms)


cdef bint twin(Endpoint* e, const Conn* like) noexcept nogil:
    """Another open connection of the endpoint speaks the same dialect."""
    cdef Conn* c = e.conns
    while c != NULL:
        if c != like and c.state == CONN_OPEN and c.owner == 0 and c.dialect == like.dialect:
            return True
        c = c.endpoint_next
    return False


cdef void pool_endpoint_due(World* w, Endpoint* e) noexcept nogil:
    """Its timer, or a new snapshot: end an ejection, open what is missing, plan the next look."""
    cdef Cluster* k = e.cluster
    cdef Conn* c
    cdef uint32_t have = 0
    cdef uint64_t next_ms = NEVER
    if e.ejected_until_ms:
        if w.now_ms >= e.ejected_until_ms:
            e.ejected_until_ms = 0
            w.peers_version += 1
            e.failures = 0
            k.ejected -= 1
            if w.snapshot.limits.slow_start_ms:
                e.ramp_from_ms = w.now_ms
            row_of(w.counters, e.row).c[C_EJECTED] -= 1
            event_push(w, EVENT_RESTORED, e.id, 0, 0, NULL, 0)
        else:
            next_ms = e.ejected_until_ms
    k.recompute_ms = 0
    if k.kind != KIND_RELAY and w.thread != HOME_THREAD:
        return      # brokers and peers are connected to once per process
    if k.binding != BIND_PER_CLIENT and e.address_size and e.weight and not w.stopping and w.frozen == 0:
        c = e.conns
        while c != NULL:
            if c.owner == 0 and (c.state == CONN_OPEN or c.state == CONN_CONNECTING):
                have += 1
            c = c.endpoint_next
        while have < k.connections and w.now_ms >= e.retry_at_ms:
            if pool_connect(w, e, 0) == NULL:
                break
            have += 1
        if have < k.connections and e.retry_at_ms < next_ms:
            next_ms = e.retry_at_ms
        # The surplus of a configuration with fewer connections drains. (A connection that a second
        # dialect opened is no surplus: the last one that speaks a dialect stays.)
        c = e.conns
        while c != NULL and have > k.connections:
            if c.state == CONN_OPEN and c.owner == 0 and (c.dialect == DIALECT_NONE or twin(e, c)):
                pool_goaway(w, c)
                have -= 1
            c = c.endpoint_next
    if next_ms != NEVER:
        timer_set(&w.wheel, &e.timer, next_ms)
    else:
        timer_clear(&w.wheel, &e.timer)


cdef void send_heartbeat(World* w, Conn* c) noexcept nogil:
    """Through a slot like any request: its id can then never be taken for one of a client's."""
    cdef size_t grew = 0
    cdef FrameId id
    cdef uint8_t[64] frame
    cdef Slot* slot = slot_take(&c.sent, &grew)
    w.budget.used += grew
    if c.dialect == DIALECT_NONE:
        c.dialect = 0
    if slot == NULL:
        return   # every id is in flight: the answers owed prove life as well as a heartbeat would
    slot.timer.owner = slot
    slot.timer.kind = TIMER_SLOT
    slot.table_owner = c
    if c.codec.correlation == CORRELATE_BY_ORDER:
        slot_order_push(&c.sent, slot)
    memset(&id, 0, sizeof(id))
    id.number = slot_id(slot)
    slot.sent_ns = w.now_ns
    if queue_own(w, c, frame, c.codec.heartbeat(&id, c.dialect, frame)) == NULL:
        conn_doom(w, c, CLOSED_MEMORY, 0)
        return
    c.heartbeat_open = slot
    c.heartbeat_ms = w.now_ms
    w.counters.p[P_HEARTBEATS_OUT] += 1


cdef void pool_conn_due(World* w, Conn* c) noexcept nogil:
    """An upstream connection's timer: connect deadline, heartbeat, or its missing answer."""
    cdef uint64_t due
    cdef uint32_t every = w.snapshot.limits.heartbeat_ms
    if c.hold & HOLD_PUNT:
        conn_release(w, c, HOLD_PUNT)       # the event ring was full: the frame is tried again
        c.read_ms = w.now_ms        # we did not listen: its silence says nothing
    if c.state == CONN_CONNECTING:
        due = c.opened_ms + w.snapshot.limits.connect_timeout_ms
        if w.now_ms >= due:
            conn_doom(w, c, CLOSED_CONNECT, ETIMEDOUT)
        else:
            conn_check_by(w, c, due)
        return
    # Any byte received proves life; silence for `heartbeat_ms` asks, another such silence closes
    # (N2: <= 2 x heartbeat).
    if c.heartbeat_open != NULL and c.read_ms >= c.heartbeat_ms:
        # It lives, but this one was not acknowledged: its id rests like that of any late answer.
        slot_rest(&c.sent, c.heartbeat_open, MISS_LATE)
        timer_set(&w.wheel, &c.heartbeat_open.timer, w.now_ms + SLOT_REST_MS)
        c.heartbeat_open = NULL
    if every == 0:
        due = NEVER
    elif c.heartbeat_open != NULL:
        due = c.heartbeat_ms + every
        if w.now_ms >= due:
            conn_doom(w, c, CLOSED_HEARTBEAT, 0)
            return
    else:
        due = c.read_ms + every
        if w.now_ms >= due:
            send_heartbeat(w, c)
            due = w.now_ms + every
    if c.state == CONN_DRAINING:
        pool_settle(w, c)
        due = w.now_ms + DRAIN_LOOK_MS if due > w.now_ms + DRAIN_LOOK_MS else due
    if c.state != CONN_DOOMED:
        conn_check_by(w, c, due)
