"""Push groups: who takes a delivery, on which node, and how many more may be under way.

A group's members are the client connections that named it. A member with credit stands in a heap,
fewest in flight first and, among equals, whoever waited longest; one whose `prefetch` deliveries are
unanswered is not in it. Nothing is queued beyond credit: whoever finds no credit says "later".

An ordered group sends a key to one consumer: while a delivery of the key is unanswered the next one
goes to the same place, else rendezvous hashing over the live members decides.

Credit comes back when the slot of a delivery is free again, not when its deadline passes: a consumer
that never answers is not sent more than its prefetch.

A delivery on its way (broker -> client): group_named() -> group_place() -> member_pick() ->
delivery_new(), member_take() -> the slot carries it -> delivery_end() when the slot is released.

Invariants: heap[0..heap_count) are exactly the members with in_flight < prefetch; credit is the sum
of prefetch over members; a Member or Key is freed when nothing is in flight for it and its group or
connection has let go of it.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from .frame cimport FrameView, Span
from .push cimport PushFields
from .route cimport SnapshotData
from .slots cimport Slot
from .world cimport Conn, Delivery, Group, Key, Member, World

# Room for the groups of this snapshot: all that may fail. -1 = no memory: nothing has changed.
cdef int groups_ready(World* w, const SnapshotData* snapshot) noexcept nogil
# Make the runtime groups those of this snapshot, for which groups_ready() has made room.
cdef void groups_sync(World* w, const SnapshotData* snapshot) noexcept nogil
cdef void groups_stop(World* w) noexcept nogil

# membership
# `pairs`: (group id, prefetch)*, the whole set of this connection; a prefetch of 0 is as if it was not
# there. Unknown ids are passed over (a snapshot took them away meanwhile). -1 = no memory: it is in none.
cdef int groups_join(World* w, Conn* c, const uint32_t* pairs, uint32_t count) noexcept nogil
cdef void groups_leave(World* w, Conn* c) noexcept nogil

# the choice
cdef Group* group_named(World* w, const Span* name) noexcept nogil
# The endpoint id of the peer that takes it, or 0: it stays here. *why is a Why of schedule.pxd.
cdef uint32_t group_place(World* w, Group* g, const FrameView* view, const PushFields* fields,
                          uint8_t* why) noexcept nogil
# A member with credit: by `hash` if `keyed`, else fewest in flight. NULL: *cause = CAUSE_NO_ROUTE
# (nobody lives here) or CAUSE_OVERLOAD (no credit).
cdef Member* member_pick(Group* g, bint keyed, uint64_t hash, int* cause) noexcept nogil
cdef bint member_has_credit(const Member* m) noexcept nogil

# an unanswered delivery
cdef Delivery* delivery_new(World* w, int kind) noexcept nogil        # NULL = no memory
cdef void member_take(Member* m) noexcept nogil                       # one more in flight
cdef Key* key_find(Group* g, uint64_t hash) noexcept nogil
# One more in flight for that key, at `member` or at the peer behind `endpoint`. NULL = no memory.
cdef Key* key_take(World* w, Group* g, uint64_t hash, Member* member, uint32_t endpoint) noexcept nogil
# Credit, key and copy come back; the slot carries nothing any more.
cdef void delivery_end(World* w, Slot* slot) noexcept nogil
# The same for one that no slot carries (yet).
cdef void delivery_drop(World* w, Delivery* d) noexcept nogil
# It will not be offered again: its memory need not wait for the slot.
cdef void delivery_forget_copy(World* w, Slot* slot) noexcept nogil

# Hand-over: a member as it was in another process, without what it has in flight; whoever restores
# counts that, and then settles it: into the heap, or, where it is no member any more (no group, no
# connection) and nothing is in flight, away. NULL = no memory.
cdef Member* member_restore(World* w, Conn* c, Group* g, uint32_t prefetch, uint64_t turn) noexcept nogil
cdef void member_settle(World* w, Member* m) noexcept nogil
# Of a connection or group that will not be restored after all. Nothing is in flight for it.
cdef void member_remove(World* w, Member* m) noexcept nogil
# A key without what is in flight for it; `g` NULL = its group has ended. NULL = no memory.
cdef Key* key_restore(World* w, Group* g, uint64_t hash, Member* member, uint32_t endpoint) noexcept nogil
# Of no delivery any more.
cdef void key_remove(World* w, Key* key) noexcept nogil

# EVENT_GROUP of every group that changed
cdef void groups_tell(World* w) noexcept nogil
