"""Endpoints and the connections to them: connecting, back-off, heartbeats, ejection, slow start,
the weighted choice.

Health is a thread's own: a thread counts what it saw on its own connections. An endpoint is
*chosen* only while it is in the snapshot with
a weight, has a connection that is up and is not ejected. It fails by refused connects, by
connections that die with requests in flight
and by deadlines; `eject_failures` of those in a row eject it, but never more than
`eject_percent_max` of a cluster and never its last one.
"""

from libc.stdint cimport uint32_t, uint64_t

from .route cimport SnapshotData
from .world cimport Cluster, Conn, Endpoint, Link, World

# Make the runtime clusters and endpoints those of this snapshot. -1 = no memory: what exists goes
# on as it was.
cdef int pool_sync(World* w, const SnapshotData* snapshot) noexcept nogil
cdef void pool_stop(World* w) noexcept nogil
# An upstream connection for one more request of this cluster. NULL: *cause is CAUSE_NO_ENDPOINT,
# CAUSE_CONNECT or CAUSE_OVERLOAD.
# A shared connection carries one dialect of its protocol, so a second dialect opens a connection of
# its own beside the first; the one to a broker carries all.
# `only`: Rule.only, a bit per endpoint that may take it (0 = any).
cdef Conn* pool_pick(World* w, Cluster* cluster, Link* link, uint64_t client, int dialect,
                     uint64_t only, int* cause) noexcept nogil
# An open connection to a peer with an id left, whatever its dialect: a peer answers each frame in
# its own. NULL = none.
cdef Conn* pool_peer(World* w, Endpoint* endpoint) noexcept nogil
# What the peer behind that endpoint has consumers for, until it says something else or goes down.
# -1 = no memory: what it said before stays.
cdef int pool_peer_groups(World* w, Endpoint* endpoint, const uint32_t* ids, uint32_t count) noexcept nogil
# Hand-over. A frozen world connects nowhere: connections that are asked for have no descriptor yet,
# and pool_thaw() opens it for them, and whatever else is missing.
cdef void pool_thaw(World* w) noexcept nogil
# A connection of another process at its endpoint: counted there as its state says.
cdef void pool_attach(World* w, Endpoint* endpoint, Conn* c) noexcept nogil
cdef void pool_detach(World* w, Conn* c) noexcept nogil
# An endpoint that no snapshot has: it goes with its last connection. NULL = no memory.
cdef Endpoint* pool_gone(World* w, uint32_t id, uint32_t row) noexcept nogil
# Its health, as another process saw it; what its cluster does not allow any more is not restored.
cdef void pool_eject(World* w, Endpoint* endpoint, uint64_t for_ms) noexcept nogil
# a CONNECTING connection became writable
cdef void pool_connected(World* w, Conn* c) noexcept nogil
# burial, first: out of the choice, the next connect planned
cdef void pool_lost(World* w, Conn* c) noexcept nogil
# burial, last: a gone endpoint goes with its last connection
cdef void pool_release(World* w, Endpoint* endpoint) noexcept nogil
# no new requests on it, a fresh one beside it
cdef void pool_goaway(World* w, Conn* c) noexcept nogil
# a draining one that owes nothing is closed
cdef void pool_settle(World* w, Conn* c) noexcept nogil
cdef void pool_answered(World* w, Endpoint* endpoint) noexcept nogil
cdef void pool_failed(World* w, Endpoint* endpoint) noexcept nogil
cdef void pool_endpoint_due(World* w, Endpoint* endpoint) noexcept nogil
cdef void pool_conn_due(World* w, Conn* c) noexcept nogil
