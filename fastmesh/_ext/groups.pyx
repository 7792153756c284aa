# cython: language_level=3
"""Push groups (contract: groups.pxd)."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from .bytes cimport memset
from .conn cimport conn_handle, event_push, mem_give, mem_grow, mem_take
from .frame cimport CAUSE_NO_ROUTE, CAUSE_OVERLOAD, FrameView, Span
from .push cimport PushFields
from .route cimport GroupSpec, SnapshotData, group_find
from .schedule cimport LOCAL, WHY_UNSCHEDULED, Share, schedule_choose, share_reset, share_size
from .slots cimport Slot
from .world cimport (
    CONN_DOOMED,
    DELIVERY_CALL,
    EVENT_GROUP,
    IDS,
    Conn,
    Delivery,
    Endpoint,
    Group,
    Key,
    Member,
    World,
)

cdef enum:
    MEMBERS_FIRST = 8           # room of a group's first members
    KEYS_FIRST = 64             # heads of an ordered group's first keys
    DELIVERIES_KEPT = 4096      # spare ones that a thread keeps

cdef uint64_t mixed(uint64_t x) noexcept nogil:
    """splitmix64's finisher: equal bits in, evenly spread bits out."""
    x = (x ^ (x >> 30)) * <uint64_t>0xbf58476d1ce4e5b9
    x = (x ^ (x >> 27)) * <uint64_t>0x94d049bb133111eb
    return x ^ (x >> 31)


# === the snapshot's groups ========================================================================

cdef void detach(World* w, Member* m) noexcept nogil:
    """Out of its group's members and heap, and off its connection's list. Deliveries may still
    point at it."""
    cdef Group* g = m.group
    cdef Member* last
    cdef Member** link
    heap_remove(g, m)
    g.credit -= m.prefetch
    g.members_count -= 1
    last = g.members[g.members_count]
    g.members[m.at] = last
    last.at = m.at
    mark_changed(w, g)
    link = &m.conn.members
    while link[0] != m:
        link = &link[0].next_of_conn
    link[0] = m.next_of_conn
    m.group = NULL
    m.conn = NULL
    if m.in_flight == 0:
        mem_give(w, m, sizeof(Member))


cdef void mark_changed(World* w, Group* g) noexcept nogil:
    g.changed = 1
    g.peers_seen = 0            # whether this node itself can take it may have changed
    w.groups_changed = 1


cdef void group_end(World* w, Group* g) noexcept nogil:
    """Its members and keys live on as long as deliveries point at them."""
    cdef uint32_t i
    cdef Key* key
    cdef Key* after
    while g.members_count:
        detach(w, g.members[g.members_count - 1])
    for i in range(g.keys_room):
        key = g.keys[i]
        while key != NULL:
            after = key.next
            key.group = NULL
            key.next = NULL
            key = after
    mem_give(w, g.keys, g.keys_room * sizeof(Key*))
    mem_give(w, g.members, g.members_room * sizeof(Member*))
    mem_give(w, g.heap, g.members_room * sizeof(Member*))
    mem_give(w, g.share, g.share_bytes)
    mem_give(w, g.reachable, g.reachable_room)
    w.group_of[g.id] = NULL
    mem_give(w, g, sizeof(Group))


cdef Group* group_for(World* w, const GroupSpec* spec) noexcept nogil:
    """The runtime group, with room for what this snapshot's schedule needs. NULL = no memory."""
    cdef Group* g = w.group_of[spec.id]
    cdef size_t share_bytes = 0
    cdef uint32_t nodes = 0
    cdef void* share
    cdef uint8_t* reachable
    if g == NULL:
        g = <Group*>mem_take(w, sizeof(Group))
        if g == NULL:
            return NULL
        memset(g, 0, sizeof(Group))
        g.id = spec.id
        g.next = w.groups
        w.groups = g
        w.group_of[spec.id] = g
    if spec.schedule == NULL or spec.schedule == g.schedule:
        return g
    share_bytes = share_size(spec.schedule)
    nodes = spec.schedule.nodes_count
    if share_bytes > g.share_bytes:
        share = mem_grow(w, g.share, g.share_bytes, share_bytes)
        if share == NULL:
            return NULL
        if g.share_bytes == 0:
            memset(share, 0, sizeof(Share))     # it says that it was none before
        g.share = <Share*>share
        g.share_bytes = share_bytes
    if nodes > g.reachable_room:
        reachable = <uint8_t*>mem_grow(w, g.reachable, g.reachable_room, nodes)
        if reachable == NULL:
            return NULL
        g.reachable = reachable
        g.reachable_room = nodes
    return g


cdef int groups_ready(World* w, const SnapshotData* s) noexcept nogil:
    cdef uint32_t i
    # (A group made for a snapshot that is refused has version 0 and goes with the next one.)
    for i in range(s.groups_count):
        if group_for(w, &s.groups[i]) == NULL:
            return -1
    return 0


cdef void groups_sync(World* w, const SnapshotData* s) noexcept nogil:
    cdef uint32_t i
    cdef const GroupSpec* spec
    cdef Group* g
    cdef Group** link
    for i in range(s.groups_count):
        spec = &s.groups[i]
        g = w.group_of[spec.id]
        g.version = s.version
        g.row = spec.row
        g.ordered = spec.ordered
        g.broadcast = spec.broadcast
        if spec.schedule != g.schedule:
            g.schedule = spec.schedule
            if g.schedule != NULL:
                share_reset(g.share, g.schedule)
        g.peers_seen = 0
    link = &w.groups
    while link[0] != NULL:
        g = link[0]
        if g.version == s.version:
            link = &g.next
            continue
        link[0] = g.next
        group_end(w, g)
    w.peers_version += 1


cdef void groups_stop(World* w) noexcept nogil:
    cdef Group* g
    cdef Delivery* d
    while w.groups != NULL:
        g = w.groups
        w.groups = g.next
        group_end(w, g)
    while w.free_deliveries != NULL:
        d = w.free_deliveries
        w.free_deliveries = d.free_next
        mem_give(w, d, sizeof(Delivery))
    w.free_deliveries_count = 0


# === the heap =====================================================================================

cdef inline bint before(const Member* a, const Member* b) noexcept nogil:
    return a.in_flight < b.in_flight or (a.in_flight == b.in_flight and a.turn < b.turn)


cdef inline void put(Group* g, Member* m, uint32_t at) noexcept nogil:
    g.heap[at] = m
    m.heap_at = at + 1


cdef void sift_up(Group* g, Member* m, uint32_t at) noexcept nogil:
    cdef uint32_t parent
    while at:
        parent = (at - 1) // 2
        if not before(m, g.heap[parent]):
            break
        put(g, g.heap[parent], at)
        at = parent
    put(g, m, at)


cdef void sift_down(Group* g, Member* m, uint32_t at) noexcept nogil:
    cdef uint32_t child
    while True:
        child = 2 * at + 1
        if child >= g.heap_count:
            break
        if child + 1 < g.heap_count and before(g.heap[child + 1], g.heap[child]):
            child += 1
        if not before(g.heap[child], m):
            break
        put(g, g.heap[child], at)
        at = child
    put(g, m, at)


cdef void heap_remove(Group* g, Member* m) noexcept nogil:
    cdef uint32_t at
    cdef Member* last
    if m.heap_at == 0:
        return
    at = m.heap_at - 1
    m.heap_at = 0
    g.heap_count -= 1
    last = g.heap[g.heap_count]
    if last == m:
        return
    sift_down(g, last, at)
    sift_up(g, last, last.heap_at - 1)


cdef void heap_fix(Group* g, Member* m) noexcept nogil:
    """Its in_flight, turn or prefetch has changed."""
    if m.in_flight >= m.prefetch:
        heap_remove(g, m)
        return
    if m.heap_at == 0:
        g.heap_count += 1
        sift_up(g, m, g.heap_count - 1)
        return
    sift_down(g, m, m.heap_at - 1)
    sift_up(g, m, m.heap_at - 1)


# === membership ===================================================================================

cdef Member* member_of(Conn* c, const Group* g) noexcept nogil:
    cdef Member* m = c.members
    while m != NULL and m.group != g:
        m = m.next_of_conn
    return m


cdef Member* member_new(World* w, Conn* c, Group* g) noexcept nogil:
    cdef Member* m
    cdef uint32_t room
    cdef Member** longer
    if g.members_count == g.members_room:
        room = g.members_room * 2 if g.members_room else MEMBERS_FIRST
        longer = <Member**>mem_grow(w, g.members, g.members_room * sizeof(Member*), room * sizeof(Member*))
        if longer == NULL:
            return NULL
        g.members = longer
        longer = <Member**>mem_grow(w, g.heap, g.members_room * sizeof(Member*), room * sizeof(Member*))
        if longer == NULL:
            # the longer `members` stays, counted as what `members_room` says
            w.budget.used -= (room - g.members_room) * sizeof(Member*)
            return NULL
        g.heap = longer
        g.members_room = room
    m = <Member*>mem_take(w, sizeof(Member))
    if m == NULL:
        return NULL
    memset(m, 0, sizeof(Member))
    m.group = g
    m.conn = c
    m.rank = mixed(conn_handle(c))
    m.at = g.members_count
    g.members[g.members_count] = m
    g.members_count += 1
    m.next_of_conn = c.members
    c.members = m
    return m


cdef int groups_join(World* w, Conn* c, const uint32_t* pairs, uint32_t count) noexcept nogil:
    cdef Member* m = c.members
    cdef Member* after
    cdef Group* g
    cdef uint32_t i
    # A member that stays keeps what it has in flight: only the difference moves.
    while m != NULL:
        after = m.next_of_conn
        for i in range(count):
            if pairs[2 * i] == m.group.id and pairs[2 * i + 1]:
                break
        else:
            detach(w, m)
        m = after
    for i in range(count):
        g = w.group_of[pairs[2 * i]] if pairs[2 * i] < IDS else NULL
        if g == NULL or pairs[2 * i + 1] == 0:
            continue
        m = member_of(c, g)
        if m == NULL:
            m = member_new(w, c, g)
            if m == NULL:
                groups_leave(w, c)
                return -1
        g.credit = g.credit - m.prefetch + pairs[2 * i + 1]
        m.prefetch = pairs[2 * i + 1]
        heap_fix(g, m)
        mark_changed(w, g)
    return 0


cdef void groups_leave(World* w, Conn* c) noexcept nogil:
    while c.members != NULL:
        detach(w, c.members)


# === the choice ===================================================================================

cdef Group* group_named(World* w, const Span* name) noexcept nogil:
    cdef const GroupSpec* spec = group_find(w.snapshot, name)
    return w.group_of[spec.id] if spec != NULL else NULL


cdef bint serves(const Endpoint* e, uint32_t group) noexcept nogil:
    cdef uint32_t low = 0, high = e.live_groups_count, middle
    while low < high:
        middle = (low + high) // 2
        if e.live_groups[middle] < group:
            low = middle + 1
        else:
            high = middle
    return low < e.live_groups_count and e.live_groups[low] == group


cdef void look_for_peers(World* w, Group* g) noexcept nogil:
    """Which nodes could take a delivery of this group now."""
    cdef uint32_t i, id
    cdef Endpoint* e
    for i in range(g.schedule.nodes_count):
        id = g.schedule.endpoint[i]
        if <int32_t>i == g.schedule.local:
            g.reachable[i] = g.members_count > 0
            continue
        e = w.endpoint_of[id] if 0 < id < IDS else NULL
        g.reachable[i] = e != NULL and e.up > 0 and e.ejected_until_ms == 0 and serves(e, g.id)
    g.peers_seen = w.peers_version


cdef uint32_t group_place(World* w, Group* g, const FrameView* view, const PushFields* fields,
                          uint8_t* why) noexcept nogil:
    cdef int32_t node
    if g.schedule == NULL:
        why[0] = WHY_UNSCHEDULED
        return 0
    if g.peers_seen != w.peers_version:
        look_for_peers(w, g)
    node = schedule_choose(g.schedule, g.share, view, fields, g.ordered, g.reachable, why)
    if node == LOCAL or node == g.schedule.local:
        return 0
    return g.schedule.endpoint[node]


cdef inline bint usable(const Member* m) noexcept nogil:
    """(One that was doomed earlier in this turn is not buried yet.)"""
    return m.conn.state != CONN_DOOMED and not m.conn.lingering


cdef bint member_has_credit(const Member* m) noexcept nogil:
    return m.in_flight < m.prefetch


cdef Member* member_by_key(Group* g, uint64_t hash) noexcept nogil:
    """Rendezvous: a member that comes or goes moves only its own keys."""
    cdef Member* best = NULL
    cdef uint64_t score, most = 0
    cdef uint32_t i
    for i in range(g.members_count):
        if usable(g.members[i]):
            score = mixed(hash ^ g.members[i].rank)
            if best == NULL or score > most:
                best = g.members[i]
                most = score
    return best


cdef Member* member_pick(Group* g, bint keyed, uint64_t hash, int* cause) noexcept nogil:
    cdef Member* m = NULL
    if keyed:
        m = member_by_key(g, hash)
        if m == NULL:
            cause[0] = CAUSE_NO_ROUTE
        elif not member_has_credit(m):
            cause[0] = CAUSE_OVERLOAD
            return NULL
        return m
    while g.heap_count:
        m = g.heap[0]
        if usable(m):
            return m
        heap_remove(g, m)       # its burial, in this turn, takes it out of the group
    cause[0] = CAUSE_OVERLOAD if anybody_lives(g) else CAUSE_NO_ROUTE
    return NULL


cdef bint anybody_lives(const Group* g) noexcept nogil:
    cdef uint32_t i
    for i in range(g.members_count):
        if usable(g.members[i]):
            return True
    return False


# === an unanswered delivery =======================================================================

cdef Delivery* delivery_new(World* w, int kind) noexcept nogil:
    cdef Delivery* d = w.free_deliveries
    if d != NULL:
        w.free_deliveries = d.free_next
        w.free_deliveries_count -= 1
    else:
        d = <Delivery*>mem_take(w, sizeof(Delivery))
        if d == NULL:
            return NULL
    memset(d, 0, sizeof(Delivery))
    d.kind = <uint8_t>kind
    return d


cdef void delivery_free(World* w, Delivery* d) noexcept nogil:
    if w.free_deliveries_count < DELIVERIES_KEPT:
        d.free_next = w.free_deliveries
        w.free_deliveries = d
        w.free_deliveries_count += 1
    else:
        mem_give(w, d, sizeof(Delivery))


cdef void member_take(Member* m) noexcept nogil:
    m.in_flight += 1
    m.group.turns += 1
    m.turn = m.group.turns
    heap_fix(m.group, m)


cdef void member_give(World* w, Member* m) noexcept nogil:
    m.in_flight -= 1
    if m.group != NULL:
        if usable(m):
            heap_fix(m.group, m)
        else:
            heap_remove(m.group, m)     # it is about to leave, and would stand in the wrong place
    elif m.in_flight == 0:
        mem_give(w, m, sizeof(Member))


cdef Key* key_find(Group* g, uint64_t hash) noexcept nogil:
    cdef Key* key
    if g.keys_room == 0:
        return NULL
    key = g.keys[hash & (g.keys_room - 1)]
    while key != NULL and key.hash != hash:
        key = key.next
    return key


cdef bint more_heads(World* w, Group* g) noexcept nogil:
    cdef uint32_t room = g.keys_room * 2 if g.keys_room else KEYS_FIRST
    cdef Key** heads = <Key**>mem_take(w, room * sizeof(Key*))
    cdef Key* key
    cdef Key* after
    cdef uint32_t i
    if heads == NULL:
        return False
    memset(heads, 0, room * sizeof(Key*))
    for i in range(g.keys_room):
        key = g.keys[i]
        while key != NULL:
            after = key.next
            key.next = heads[key.hash & (room - 1)]
            heads[key.hash & (room - 1)] = key
            key = after
    mem_give(w, g.keys, g.keys_room * sizeof(Key*))
    g.keys = heads
    g.keys_room = room
    return True


cdef Key* key_new(World* w, Group* g, uint64_t hash) noexcept nogil:
    cdef Key* key
    if g.keys_count >= g.keys_room and not more_heads(w, g) and g.keys_room == 0:
        return NULL     # (with too few heads it still works, slower)
    key = <Key*>mem_take(w, sizeof(Key))
    if key == NULL:
        return NULL
    memset(key, 0, sizeof(Key))
    key.hash = hash
    key.group = g
    key.next = g.keys[hash & (g.keys_room - 1)]
    g.keys[hash & (g.keys_room - 1)] = key
    g.keys_count += 1
    return key


cdef Key* key_take(World* w, Group* g, uint64_t hash, Member* member, uint32_t endpoint) noexcept nogil:
    cdef Key* key = key_find(g, hash)
    if key == NULL:
        key = key_new(w, g, hash)
        if key == NULL:
            return NULL
    key.member = member
    key.endpoint = endpoint
    key.in_flight += 1
    return key


cdef void key_give(World* w, Key* key) noexcept nogil:
    cdef Key** link
    key.in_flight -= 1
    if key.in_flight:
        return
    if key.group != NULL:
        link = &key.group.keys[key.hash & (key.group.keys_room - 1)]
        while link[0] != key:
            link = &link[0].next
        link[0] = key.next
        key.group.keys_count -= 1
    mem_give(w, key, sizeof(Key))


cdef void delivery_end(World* w, Slot* slot) noexcept nogil:
    cdef Delivery* d = <Delivery*>slot.delivery
    if d != NULL:
        slot.delivery = NULL
        delivery_drop(w, d)


cdef void delivery_forget_copy(World* w, Slot* slot) noexcept nogil:
    cdef Delivery* d = <Delivery*>slot.delivery
    if d != NULL and d.copy != NULL:
        mem_give(w, d.copy, d.copy_size)
        d.copy = NULL


cdef void delivery_drop(World* w, Delivery* d) noexcept nogil:
    # the key first: it may point at the member
    if d.key != NULL:
        key_give(w, d.key)
    if d.member != NULL:
        member_give(w, d.member)
    if d.copy != NULL:
        mem_give(w, d.copy, d.copy_size)
        d.copy = NULL
    if d.kind != DELIVERY_CALL or not d.notice.waiting:
        delivery_free(w, d)     # (a call that could not be told yet goes when it was: notices_retry)


# === as it was in another process =================================================================

cdef Member* member_restore(World* w, Conn* c, Group* g, uint32_t prefetch, uint64_t turn) noexcept nogil:
    cdef Member* m
    if g == NULL or c == NULL:
        m = <Member*>mem_take(w, sizeof(Member))
        if m == NULL:
            return NULL
        memset(m, 0, sizeof(Member))
    else:
        m = member_new(w, c, g)
        if m == NULL:
            return NULL
        g.credit += prefetch
        mark_changed(w, g)
    m.prefetch = prefetch
    m.turn = turn
    return m


cdef void member_settle(World* w, Member* m) noexcept nogil:
    if m.group != NULL:
        heap_fix(m.group, m)
    elif m.in_flight == 0:
        mem_give(w, m, sizeof(Member))


cdef void member_remove(World* w, Member* m) noexcept nogil:
    m.in_flight = 0
    if m.group != NULL:
        detach(w, m)
    else:
        mem_give(w, m, sizeof(Member))


cdef Key* key_restore(World* w, Group* g, uint64_t hash, Member* member, uint32_t endpoint) noexcept nogil:
    cdef Key* key
    if g != NULL:
        key = key_new(w, g, hash)
        if key == NULL:
            return NULL
    else:
        key = <Key*>mem_take(w, sizeof(Key))
        if key == NULL:
            return NULL
        memset(key, 0, sizeof(Key))
        key.hash = hash
    key.member = member
    key.endpoint = endpoint
    return key


cdef void key_remove(World* w, Key* key) noexcept nogil:
    key.in_flight = 1
    key_give(w, key)


# === telling Python ===============================================================================

cdef void groups_tell(World* w) noexcept nogil:
    cdef Group* g = w.groups
    if not w.groups_changed:
        return
    w.groups_changed = 0
    while g != NULL:
        if g.changed:
            if event_push(w, EVENT_GROUP, g.id, g.members_count, g.credit, NULL, 0) == 0:
                g.changed = 0
            else:
                w.groups_changed = 1
        g = g.next
