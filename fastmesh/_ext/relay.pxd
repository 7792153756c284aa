"""Frames: what happens to each one. Route, slot, patch, queue; answer, expire, retry, hold back;
deliver by group; and the burial of connections.

One request on its way: relay_readable() reads and scans -> on_request(): rule -> quota ->
pool_pick() -> slot_take() -> patch -> queue.
One answer: relay_readable() on the upstream -> on_answer(): slot_find() -> patch -> the client's
queue -> the slot is free again.

One delivery: on_deliver() on a broker: group -> which node -> a member with credit -> hand_over() ->
the client's queue; its answer goes back as any other does.

The ledger rule: whatever is counted `accepted` is settled exactly once: settle(), expire() or
refuse() does it, nothing else touches it.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from .slots cimport Slot
from .world cimport Conn, Parked, World

# `to_end`: the event told of something that a short read might leave behind, so read until nothing comes
cdef void relay_readable(World* w, Conn* c, bint to_end) noexcept nogil
# connections that were held and have frames buffered
cdef void relay_resume(World* w) noexcept nogil
# every doomed connection: settle what hung on it, free it
cdef void relay_bury(World* w) noexcept nogil
cdef void relay_slot_due(World* w, Slot* slot) noexcept nogil
cdef void relay_client_due(World* w, Conn* c) noexcept nogil    # a client connection's timer
cdef void relay_parked_due(World* w, Parked* parked) noexcept nogil
# A request of Python's own on that connection; its outcome is an EVENT_ANSWER with this ticket.
cdef void relay_call(World* w, uint64_t handle, uint64_t ticket, uint64_t timeout_ms, const uint8_t* data,
                     uint32_t size) noexcept nogil
cdef void relay_verdict(World* w, uint64_t ticket, uint64_t cluster, int what) noexcept nogil
# the grace period is over: everything in flight is told so
cdef void relay_abort(World* w) noexcept nogil
