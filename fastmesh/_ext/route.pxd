"""The snapshot: everything that Python decided, compiled into an immutable native table.

Python builds one (class Snapshot), seals it and publishes its pointer; an engine thread reads
exactly one per turn, so every frame
sees exactly one configuration. It is freed when no thread can hold it. Runtime state (health, in
flight, tokens) lives in the
engine, keyed by the stable ids that Python assigns: the same listener, cluster or endpoint keeps
its id across reloads.

Rules are tried in order and the first match wins. Exact services are found through a hash; only
rules with a prefix or without a
service are walked, so a thousand services cost what one does.

The message mesh adds push groups (found by name through a hash of their own), the schedules that say
which node of an application takes a delivery, and kinds of listeners and clusters, which say what
the frames on their connections mean.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from .frame cimport Codec, FrameView, Limits, Span
from .schedule cimport Plan, Schedule

cdef enum Binding:
    BIND_SHARED = 0        # all clients on `connections` per endpoint, ids remapped
    BIND_PER_CLIENT = 1    # one upstream connection per client connection

cdef enum ServerRequests:
    SERVER_REQUESTS_ANY = 0
    SERVER_REQUESTS_REFUSE = 1

cdef enum Kind:            # what the frames of a connection mean: listeners 0..3, clusters 0, 4, 5
    KIND_RELAY = 0         # requests are relayed; clusters: a service
    KIND_PUSH = 1          # push clients: publish by topic, control frames to Python
    KIND_FORWARD = 2       # peer nodes: forwarded deliveries, control frames to Python
    KIND_PUNT = 3          # every request goes to Python (the embedded broker)
    KIND_BROKER = 4        # brokers: deliver and check by group, other requests to Python
    KIND_PEER = 5          # the forward services of other nodes: their requests go to Python

cdef enum ServiceMatch:
    SERVICE_ANY = 0        # also what has no service at all
    SERVICE_EXACT = 1
    SERVICE_PREFIX = 2     # "com.example.*"

cdef struct HeaderMatch:
    const uint8_t* key
    uint32_t key_size
    const uint8_t* value
    uint32_t value_size

cdef struct Rule:
    uint8_t service_match
    uint8_t park           # 1 = hold the frame until Python's verdict
    uint32_t row
    uint32_t cluster       # index into Snapshot.clusters
    const uint8_t* service
    uint32_t service_size
    HeaderMatch* headers
    uint32_t headers_count
    uint32_t bucket_rate   # tokens per second, 0 = no bucket
    uint32_t bucket_burst
    uint32_t next_same     # exact: index + 1 of the next rule with the same hash chain, 0 = end
    # bit per endpoint of the cluster: only these, least in flight by weight; 0 = all, by the
    # weighted choice of two
    uint64_t only

cdef struct ListenerRoutes:
    uint32_t id            # stable
    uint32_t row
    uint8_t kind           # Kind
    const Codec* codec
    Rule* rules
    uint32_t rules_count
    # hash of service -> index + 1 of the first exact rule of that chain (chains in rule order)
    uint32_t* heads
    uint32_t heads_mask
    uint32_t* loose        # indices of the rules that are not exact, in order
    uint32_t loose_count
    # index of the first exact rule, rules_count = none: before it nobody needs the service
    uint32_t first_exact

cdef struct EndpointSpec:
    uint32_t id            # stable; an endpoint is (cluster, address)
    uint32_t row
    uint32_t cluster       # index into Snapshot.clusters
    uint32_t weight        # 0 = takes no new requests
    uint32_t address_size  # 0 = name not resolved yet
    uint8_t address[128]   # struct sockaddr

cdef struct ClusterSpec:
    uint32_t id            # stable
    uint32_t row           # pushes of this cluster are counted here
    const Codec* codec
    uint8_t binding
    uint8_t server_requests
    uint8_t kind           # Kind
    uint16_t connections   # per endpoint and engine thread
    uint32_t first_endpoint
    uint32_t endpoints_count

cdef struct GroupSpec:
    uint32_t id            # stable
    uint32_t row
    uint8_t ordered        # by key: one consumer for a key, nothing overtakes
    uint8_t broadcast      # every connection of the group gets every message
    const uint8_t* name
    uint32_t name_size
    const Plan* schedule   # NULL = everything stays on this node
    uint32_t next_same     # index + 1 of the next group on the same head, 0 = end

cdef struct MeshLimits:
    Limits codec           # frame_bytes_max
    uint32_t in_flight_max
    uint32_t in_flight_per_connection_max
    uint32_t connections_max
    uint64_t queue_bytes_max
    uint64_t memory_bytes_max
    uint32_t request_timeout_ms
    uint32_t request_timeout_ms_max    # a frame's own timeout is clamped to this
    uint32_t first_byte_timeout_ms
    uint32_t frame_timeout_ms
    uint32_t idle_timeout_ms
    uint32_t connect_timeout_ms
    uint32_t heartbeat_ms
    uint32_t backoff_ms                # first reconnect delay, doubled up to ...
    uint32_t backoff_ms_max
    uint32_t eject_failures            # consecutive failures that eject an endpoint
    # first ejection, times the number of ejections in a row up to ...
    uint32_t eject_ms
    uint32_t eject_ms_max
    # never more of a cluster's endpoints than this (and never the last one)
    uint32_t eject_percent_max
    # weight ramps up over this long after a reconnect or an ejection
    uint32_t slow_start_ms
    # other endpoints tried for a request of which no byte was written
    uint32_t retries_max
    uint32_t sample_every              # one request in so many goes to the event ring, 0 = none

cdef struct SnapshotData:
    uint64_t version
    MeshLimits limits
    ListenerRoutes* listeners
    uint32_t listeners_count
    ClusterSpec* clusters
    uint32_t clusters_count
    EndpointSpec* endpoints            # grouped by cluster
    uint32_t endpoints_count
    GroupSpec* groups
    uint32_t groups_count
    uint32_t* group_heads              # hash of name -> index + 1
    uint32_t group_heads_mask
    Span node                          # this node's name: the origin of what it forwards

# The first rule that matches, or NULL. *malformed = 1 when the header section does not parse as far
# as it had to be read.
cdef const Rule* route_find(const ListenerRoutes* listener, const FrameView* view, int* malformed) noexcept nogil

# The push group of that name, or NULL.
cdef const GroupSpec* group_find(const SnapshotData* snapshot, const Span* name) noexcept nogil

# The codec of that name; ValueError when there is none.
cdef const Codec* codec_named(str name) except NULL

cdef class Snapshot:
    cdef SnapshotData* data   # NULL until sealed
    cdef readonly uint64_t version
    cdef object _sealed, _listeners, _clusters, _limits, _keep
    cdef object _endpoint_ids, _groups, _group_names, _schedules, _node
    cdef void _open(self) except *
    cdef void _compile(self) except *
    cdef const ListenerRoutes* _listener(self, uint32_t listener_id) except NULL
