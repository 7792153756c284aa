"""The compiled snapshot (contract: route.pxd): built by Python, read by engine threads, changed by
nobody.
"""

import importlib
import os
import socket

from cpython.bytes cimport PyBytes_AS_STRING
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from .bytes cimport memcmp, memcpy
from .counters cimport ROWS_MAX
from .frame cimport PARSE_OK, Codec, FrameView, Span
from .schedule cimport Schedule

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>
    #include <arpa/inet.h>
    #include <netinet/in.h>
    #include <sys/socket.h>
    #include <sys/un.h>

    static inline uint64_t fm_fold(uint64_t a, uint64_t b) {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    static inline uint64_t fm_word(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return v; }

    /* Folded multiplication over 16 bytes at a time, keyed: who does not know the seed cannot
    choose names that collide. */
    static uint32_t fm_hash(const uint64_t *seed, const uint8_t *p, uint32_t n) {
        uint64_t h = seed[0] ^ n;
        uint64_t last[2] = {0, 0};
        for (; n > 16; p += 16, n -= 16)
            h = fm_fold(fm_word(p) ^ seed[1], fm_word(p + 8) ^ h);
        memcpy(last, p, n);
        h = fm_fold(last[0] ^ seed[1], last[1] ^ h);
        return (uint32_t)(fm_fold(h ^ seed[0], seed[1] | 1) >> 16);
    }

    static uint32_t fm_inet(uint8_t *out, const char *packed, uint16_t port) {
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
        memcpy(&a.sin_addr, packed, 4);
        memcpy(out, &a, sizeof(a));
        return sizeof(a);
    }
    static uint32_t fm_inet6(uint8_t *out, const char *packed, uint16_t port) {
        struct sockaddr_in6 a = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
        memcpy(&a.sin6_addr, packed, 16);
        memcpy(out, &a, sizeof(a));
        return sizeof(a);
    }
    static uint32_t fm_unix(uint8_t *out, const char *path, uint32_t n) {
        struct sockaddr_un a = {.sun_family = AF_UNIX};
        memcpy(a.sun_path, path, n);   /* n <= 107: the zero behind it is there */
        memcpy(out, &a, sizeof(a));
        return (uint32_t)(offsetof(struct sockaddr_un, sun_path) + n + 1);
    }
    """
    uint32_t hash_of "fm_hash"(const uint64_t* seed, const uint8_t* p, uint32_t n) noexcept nogil
    uint32_t put_inet "fm_inet"(uint8_t* out, const char* packed, uint16_t port) noexcept nogil
    uint32_t put_inet6 "fm_inet6"(uint8_t* out, const char* packed, uint16_t port) noexcept nogil
    uint32_t put_unix "fm_unix"(uint8_t* out, const char* path, uint32_t n) noexcept nogil

cdef enum:
    UNIX_PATH_MAX = 107      # sun_path holds 108 bytes, the last of them a zero
    TEXT_MAX = 0x7fff        # the longest header section of any codec so far
    HEADERS_MAX = 64         # matches of one rule
    WEIGHT_MAX = 1000000
    CONNECTIONS_MAX = 1024   # per endpoint and thread
    MEMO = 8                 # header keys whose value a lookup remembers
    SUBSET_MAX = 64          # endpoints of a cluster whose rules name some of them: bits of a mask

# Everything that hangs on the order of a hash table is different in every process.
cdef uint64_t[2] SEED
SEED[0], SEED[1] = [int.from_bytes(os.urandom(8), "little") for _ in range(2)]


# --- codecs
# --------------------------------------------------------------------------------------------------------------

# Imported when a configuration names them, and not before.
BUILT_IN = {"bolt": "fastmesh._ext.bolt", "push": "fastmesh._ext.push"}
cdef dict _codecs = {}


def register_codec(str name, capsule):
    """Make a codec known by name. `capsule` is a PyCapsule named "fastmesh.codec" around a
    `Codec*`.

    ValueError when it is something else, or when the name belongs to another codec.
    """
    cdef void* pointer = PyCapsule_GetPointer(capsule, "fastmesh.codec")
    if name in _codecs and PyCapsule_GetPointer(_codecs[name], "fastmesh.codec") != pointer:
        raise ValueError(f"codec: {name!r} is taken; each codec needs a name of its own")
    _codecs[name] = capsule


def codec_names():
    return sorted({*_codecs, *BUILT_IN})


cdef const Codec* codec_named(str name) except NULL:
    if name not in _codecs:
        if name not in BUILT_IN:
            known = ", ".join(codec_names())
            raise ValueError(f"codec: {name!r} is unknown; it must be one of {known}")
        register_codec(name, importlib.import_module(BUILT_IN[name]).capsule())
    return <const Codec*>PyCapsule_GetPointer(_codecs[name], "fastmesh.codec")


# --- checks
# --------------------------------------------------------------------------------------------------------------

cdef enum:
    UINT31 = 0x7fffffff

# Name: lowest and highest legal value. Most zeros mean "off"; those that would stop all traffic are
# not allowed.
LIMITS = {
    "frame_bytes_max": (64, UINT31),
    "in_flight_max": (16, 65536),
    "in_flight_per_connection_max": (1, UINT31),
    "connections_max": (1, UINT31),
    "queue_bytes_max": (1, 1 << 62),
    "memory_bytes_max": (1, 1 << 62),
    "request_timeout_ms": (1, UINT31),
    "request_timeout_ms_max": (1, UINT31),
    "first_byte_timeout_ms": (0, UINT31),
    "frame_timeout_ms": (0, UINT31),
    "idle_timeout_ms": (0, UINT31),
    "connect_timeout_ms": (1, UINT31),
    "heartbeat_ms": (0, UINT31),
    "backoff_ms": (1, UINT31),
    "backoff_ms_max": (1, UINT31),
    "eject_failures": (0, UINT31),
    "eject_ms": (0, UINT31),
    "eject_ms_max": (0, UINT31),
    "eject_percent_max": (0, 100),
    "slow_start_ms": (0, UINT31),
    "retries_max": (0, 255),
    "sample_every": (0, UINT31),
}
BINDINGS = {"shared": BIND_SHARED, "per_client": BIND_PER_CLIENT}
LISTENER_KINDS = {
    "relay": KIND_RELAY, "push": KIND_PUSH, "forward": KIND_FORWARD, "punt": KIND_PUNT
}
CLUSTER_KINDS = {"service": KIND_RELAY, "brokers": KIND_BROKER, "peers": KIND_PEER}
SERVER_REQUESTS = {"any": SERVER_REQUESTS_ANY, "refuse": SERVER_REQUESTS_REFUSE}


cdef int in_range(str name, value, low, high) except -1:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}: {value!r} is not a whole number; it must be in {low}..{high}")
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is out of range; it must be in {low}..{high}")
    return 0


cdef int an_id(str name, value) except -1:
    return in_range(name, value, 0, 0xffffffff)


cdef int a_row(value) except -1:
    return in_range("row", value, 0, <int>ROWS_MAX - 1)


cdef int one_of(str name, value, choices) except -1:
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is unknown; it must be one of {', '.join(choices)}")
    return 0


cdef int a_text(str name, value, low) except -1:
    if not isinstance(value, bytes):
        raise ValueError(f"{name}: {value!r} is not bytes")
    if not low <= len(value) <= TEXT_MAX:
        wrong = "many" if value else "few"
        raise ValueError(
            f"{name}: {len(value)} bytes are too {wrong}; it must have {low}..{TEXT_MAX}"
        )
    return 0


cdef bytes socket_address(address):
    """The `struct sockaddr` of an endpoint's address, b"" when it is not resolved yet."""
    cdef uint8_t out[128]
    cdef uint32_t size
    if address is None:
        return b""
    if isinstance(address, str):
        path = os.fsencode(address)
        if not 1 <= len(path) <= UNIX_PATH_MAX or b"\0" in path:
            raise ValueError(
                f"address: {address!r} is {len(path)} bytes; "
                f"a socket path has 1..{UNIX_PATH_MAX}, none of them zero"
            )
        size = put_unix(out, PyBytes_AS_STRING(path), <uint32_t>len(path))
        return (<char*>out)[:size]
    if not isinstance(address, tuple) or len(address) != 2 or not isinstance(address[0], str):
        raise ValueError(
            f"address: {address!r} must be (host, port), the path of a UNIX socket, or None"
        )
    host, port = address
    in_range("address: port", port, 1, 65535)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        packed = socket.inet_pton(family, host)
    except (OSError, ValueError):
        raise ValueError(
            f"address: {host!r} is no IP address; "
            "names are resolved before they come here (None = not yet)"
        ) from None
    if family == socket.AF_INET6:
        size = put_inet6(out, PyBytes_AS_STRING(packed), <uint16_t>port)
    else:
        size = put_inet(out, PyBytes_AS_STRING(packed), <uint16_t>port)
    return (<char*>out)[:size]


# --- the lookup
# ----------------------------------------------------------------------------------------------------------

cdef struct Lookup:
    # What one frame's lookup has read so far. Keys are interned by seal(), so the same key is the
    # same pointer.
    const FrameView* view
    const Codec* codec
    int service            # 1 found, 0 absent, -1 malformed, 2 not asked yet
    Span name
    int remembered
    const uint8_t* key[8]
    int found[8]
    Span value[8]


cdef inline int ask_service(Lookup* lookup) noexcept nogil:
    if lookup.service == 2:
        lookup.service = lookup.codec.service(lookup.view, &lookup.name)
    return lookup.service


cdef int ask_header(Lookup* lookup, const HeaderMatch* match, Span* value) noexcept nogil:
    cdef int i, found
    for i in range(lookup.remembered):
        if lookup.key[i] == match.key:
            value[0] = lookup.value[i]
            return lookup.found[i]
    found = lookup.codec.header(lookup.view, match.key, match.key_size, value)
    if lookup.remembered < MEMO:
        # A thousand rules on one key then scan a section of thousands of tiny headers once, not a
        # thousand times.
        i = lookup.remembered
        lookup.key[i] = match.key
        lookup.found[i] = found
        lookup.value[i] = value[0]
        lookup.remembered += 1
    return found


cdef int headers_match(Lookup* lookup, const Rule* rule) noexcept nogil:
    """1 = all of them, 0 = no, -1 = malformed."""
    cdef uint32_t i
    cdef int found
    cdef Span value
    cdef const HeaderMatch* match
    value.at = NULL
    value.size = 0
    for i in range(rule.headers_count):
        match = &rule.headers[i]
        found = ask_header(lookup, match, &value)
        if found < 0:
            return -1
        if found == 0 or value.size != match.value_size:
            return 0
        if memcmp(value.at, match.value, value.size) != 0:
            return 0
    return 1


cdef inline uint32_t of_service(
    const ListenerRoutes* listener, uint32_t chained, const Span* name
) noexcept nogil:
    """The first rule of that service from `chained` on (index + 1, as in the chain), 0 = none."""
    cdef const Rule* rule
    while chained:
        rule = &listener.rules[chained - 1]
        if rule.service_size == name.size and memcmp(rule.service, name.at, name.size) == 0:
            break
        chained = rule.next_same
    return chained


cdef const Rule* route_find(
    const ListenerRoutes* listener, const FrameView* view, int* malformed
) noexcept nogil:
    cdef Lookup lookup
    cdef const Rule* rule
    cdef uint32_t none = listener.rules_count
    cdef uint32_t loose, exact, head
    cdef uint32_t at = 0         # in the loose list
    cdef uint32_t chained = 0    # index + 1 in the chain of exact rules, once the service is known
    cdef bint hashed = False
    cdef int matches
    malformed[0] = 0
    lookup.view = view
    lookup.codec = listener.codec
    lookup.service = 2
    lookup.remembered = 0
    while True:
        loose = listener.loose[at] if at < listener.loose_count else none
        if not hashed and listener.first_exact < loose:
            hashed = True
            matches = ask_service(&lookup)
            if matches < 0:
                break
            if matches:
                head = hash_of(SEED, lookup.name.at, lookup.name.size) & listener.heads_mask
                chained = of_service(listener, listener.heads[head], &lookup.name)
        exact = chained - 1 if chained else none
        if loose < exact:
            at += 1
            rule = &listener.rules[loose]
            if rule.service_match == SERVICE_PREFIX:
                matches = ask_service(&lookup)
                if matches < 0:
                    break
                if (
                    matches == 0
                    or lookup.name.size < rule.service_size
                    or memcmp(lookup.name.at, rule.service, rule.service_size) != 0
                ):
                    continue
        elif exact < none:
            rule = &listener.rules[exact]
            chained = of_service(listener, rule.next_same, &lookup.name)
        else:
            return NULL
        if rule.headers_count == 0:
            return rule
        matches = headers_match(&lookup, rule)
        if matches < 0:
            break
        if matches:
            return rule
    malformed[0] = 1
    return NULL


cdef const GroupSpec* group_find(const SnapshotData* snapshot, const Span* name) noexcept nogil:
    cdef const GroupSpec* group
    cdef uint32_t at
    if snapshot.groups_count == 0 or name.at == NULL:
        return NULL
    at = snapshot.group_heads[hash_of(SEED, name.at, name.size) & snapshot.group_heads_mask]
    while at:
        group = &snapshot.groups[at - 1]
        if group.name_size == name.size and memcmp(group.name, name.at, name.size) == 0:
            return group
        at = group.next_same
    return NULL


# --- the builder
# ---------------------------------------------------------------------------------------------------------

cdef struct Arena:
    uint8_t* data
    size_t used
    size_t size


cdef inline size_t padded(size_t size) noexcept nogil:
    return (size + 7) & ~<size_t>7


cdef void* carve(Arena* arena, size_t size) except? NULL:
    cdef void* found = arena.data + arena.used
    if arena.used + padded(size) > arena.size:
        raise SystemError("a snapshot's arena is too small")
    arena.used += padded(size)
    return found


cdef uint32_t heads_of(object rules):
    """Size of the hash table: a power of two, at least twice the exact rules."""
    return table_size(sum(1 for r in rules if r["service"] is not None and not r["prefix"]))


cdef uint32_t table_size(object entries):
    return 1 << max(2 * entries - 1, 0).bit_length()


cdef class Snapshot:
    """One immutable configuration for the engine. Build it top to bottom, then `seal()` it.

    All ids and rows are chosen by the caller and stay the same for the same name across snapshots.
    Raises ValueError for an unknown codec, a reference to nothing, or a value out of its range.
    """

    def __init__(self, version, limits):
        in_range("version", version, 0, (1 << 64) - 1)
        if self._limits is not None:
            raise ValueError(f"snapshot {self.version} exists already; build another one")
        for name in limits:
            if name not in LIMITS:
                raise ValueError(f"limits: {name!r} is unknown; the limits are {', '.join(LIMITS)}")
        for name, (low, high) in LIMITS.items():
            if name not in limits:
                raise ValueError(f"limits: {name} is missing; it must be in {low}..{high}")
            in_range(name, limits[name], low, high)
        self.version = version
        self._limits = dict(limits)
        self._listeners = {}
        self._clusters = {}
        self._endpoint_ids = set()
        self._groups = {}
        self._group_names = set()
        self._schedules = {}
        self._node = b""
        self._sealed = False

    def __dealloc__(self):
        free(self.data)

    cdef void _open(self) except *:
        if self._sealed is not False:
            raise ValueError(f"snapshot: {self.version} is sealed; build another one")

    def add_cluster(
        self,
        cluster_id,
        *,
        str codec,
        row,
        binding="shared",
        connections=1,
        server_requests="any",
        kind="service",
    ):
        self._open()
        an_id("cluster_id", cluster_id)
        if cluster_id in self._clusters:
            raise ValueError(f"cluster_id: {cluster_id} is taken; each needs an id of its own")
        codec_named(codec)
        a_row(row)
        one_of("binding", binding, BINDINGS)
        in_range("connections", connections, 1, CONNECTIONS_MAX)
        one_of("server_requests", server_requests, SERVER_REQUESTS)
        one_of("kind", kind, CLUSTER_KINDS)
        if kind != "service" and binding != "shared":
            raise ValueError(f"binding: {binding!r} does not fit; a cluster of {kind} is shared")
        self._clusters[cluster_id] = {
            "codec": codec,
            "row": row,
            "binding": BINDINGS[binding],
            "connections": connections,
            "server_requests": SERVER_REQUESTS[server_requests],
            "kind": CLUSTER_KINDS[kind],
            "endpoints": [],
        }

    def add_endpoint(self, cluster_id, endpoint_id, *, address, weight, row):
        """`address`: ("127.0.0.1", 12201) or ("::1", 12201), a UNIX socket path, or None = not
        resolved yet.
        """
        self._open()
        self._cluster(cluster_id)
        an_id("endpoint_id", endpoint_id)
        if endpoint_id in self._endpoint_ids:
            raise ValueError(f"endpoint_id: {endpoint_id} is taken; each needs an id of its own")
        in_range("weight", weight, 0, WEIGHT_MAX)
        a_row(row)
        endpoint = (endpoint_id, socket_address(address), weight, row)
        self._clusters[cluster_id]["endpoints"].append(endpoint)
        self._endpoint_ids.add(endpoint_id)

    def add_listener(self, listener_id, *, str codec, row, kind="relay"):
        self._open()
        an_id("listener_id", listener_id)
        if listener_id in self._listeners:
            raise ValueError(f"listener_id: {listener_id} is taken; each needs an id of its own")
        codec_named(codec)
        a_row(row)
        one_of("kind", kind, LISTENER_KINDS)
        self._listeners[listener_id] = {
            "codec": codec, "row": row, "kind": LISTENER_KINDS[kind], "rules": []
        }

    def add_rule(
        self,
        listener_id,
        *,
        cluster_id,
        row,
        service=None,
        prefix=False,
        headers=(),
        rate_per_s=0,
        burst=0,
        park=False,
        endpoints=(),
    ):
        """`service` None matches everything; with `prefix` it is what the service must start with.
        `endpoints`: ids of the cluster's endpoints that it may go to, () = all of them.
        """
        self._open()
        if listener_id not in self._listeners:
            raise ValueError(f"listener_id: {listener_id!r} is unknown; add the listener first")
        listener = self._listeners[listener_id]
        cluster = self._cluster(cluster_id)
        if listener["codec"] != cluster["codec"]:
            raise ValueError(
                f"cluster_id: {cluster_id} speaks {cluster['codec']}; "
                f"listener {listener_id} needs a cluster that speaks {listener['codec']}"
            )
        a_row(row)
        if service is not None:
            a_text("service", service, 1)
        elif prefix:
            raise ValueError("prefix: True needs a service that says what the prefix is")
        if len(headers) > HEADERS_MAX:
            raise ValueError(f"headers: {len(headers)} are too many; it may have {HEADERS_MAX}")
        for key, value in headers:
            a_text("headers: key", key, 1)
            a_text("headers: value", value, 0)
        in_range("rate_per_s", rate_per_s, 0, UINT31)
        in_range("burst", burst, 1 if rate_per_s else 0, UINT31)
        listener["rules"].append(
            {
                "cluster": cluster_id,
                "row": row,
                "service": service,
                "prefix": bool(prefix),
                "headers": tuple((key, value) for key, value in headers),
                "rate": rate_per_s,
                "burst": burst,
                "park": bool(park),
                "only": self._subset(cluster, endpoints),
            }
        )

    def _subset(self, cluster, endpoints):
        """A bit for each of these endpoints, by its place in the cluster."""
        places = {endpoint[0]: at for at, endpoint in enumerate(cluster["endpoints"])}
        if endpoints and len(places) > SUBSET_MAX:
            raise ValueError(
                f"endpoints: the cluster has {len(places)}; a rule can name some of them "
                f"only where it has at most {SUBSET_MAX}"
            )
        mask = 0
        for endpoint_id in endpoints:
            if endpoint_id not in places:
                raise ValueError(f"endpoints: {endpoint_id!r} is none of the cluster's")
            mask |= 1 << places[endpoint_id]
        return mask

    def add_schedule(self, schedule_id, Schedule schedule not None):
        """Keeps the schedule alive as long as the snapshot. Give the same object again while
        nothing in it has changed: the groups' shares go on where they were."""
        self._open()
        an_id("schedule_id", schedule_id)
        if schedule_id in self._schedules:
            raise ValueError(f"schedule_id: {schedule_id} is taken; each needs an id of its own")
        self._schedules[schedule_id] = schedule

    def add_group(
        self, group_id, *, name, row, ordered=False, broadcast=False, schedule_id=None
    ):
        """A push group, found by `name` (bytes) in `fm.group`."""
        self._open()
        in_range("group_id", group_id, 1, 0xffff)
        if group_id in self._groups:
            raise ValueError(f"group_id: {group_id} is taken; each needs an id of its own")
        a_text("name", name, 1)
        if name in self._group_names:
            raise ValueError(f"name: {name!r} is taken; each group needs a name of its own")
        a_row(row)
        if ordered and broadcast:
            raise ValueError("ordered: a broadcast group has no order by key; it must be False")
        if schedule_id is not None and schedule_id not in self._schedules:
            raise ValueError(f"schedule_id: {schedule_id!r} is unknown; add the schedule first")
        self._group_names.add(name)
        self._groups[group_id] = {
            "name": name,
            "row": row,
            "ordered": bool(ordered),
            "broadcast": bool(broadcast),
            "schedule": schedule_id,
        }

    def set_node(self, name):
        """This node's name, as its peers know it."""
        self._open()
        a_text("node", name, 0)
        self._node = name

    def _cluster(self, cluster_id):
        if cluster_id not in self._clusters:
            raise ValueError(f"cluster_id: {cluster_id!r} is unknown; add the cluster first")
        return self._clusters[cluster_id]

    def seal(self):
        """Compile it. Nothing can be added afterwards. MemoryError when there is no memory; it may
        be tried again then.
        """
        self._open()
        try:
            self._compile()
        except BaseException:
            free(self.data)
            self.data = NULL
            self._keep = None
            raise
        self._sealed = True
        # A hundred thousand rules are ten times as long in Python as they are now.
        self._listeners = self._clusters = self._endpoint_ids = self._groups = None

    cdef void _compile(self) except *:
        cdef Arena arena
        cdef SnapshotData* data
        cdef ListenerRoutes* listener
        cdef ClusterSpec* cluster
        cdef EndpointSpec* endpoint
        cdef GroupSpec* group
        cdef Rule* rule
        cdef const uint8_t* text
        cdef uint32_t i, n, heads, slot
        cdef size_t size

        # Every different text once, in one block, so that equal header keys are equal pointers.
        places = {}
        pieces = []
        where = 0
        texts = [self._node, *(wanted["name"] for wanted in self._groups.values())]
        for wanted in self._listeners.values():
            for r in wanted["rules"]:
                texts += (r["service"], *sum(r["headers"], ()))
        for piece in texts:
            if piece is not None and piece not in places:
                places[piece] = where
                pieces.append(piece)
                # One byte more, so that no two texts share a place, whatever their length.
                where += len(piece) + 1
        self._keep = b"\0".join(pieces) + b"\0"
        text = <const uint8_t*>PyBytes_AS_STRING(self._keep)

        size = padded(sizeof(SnapshotData))
        size += padded(len(self._listeners) * sizeof(ListenerRoutes))
        size += padded(len(self._clusters) * sizeof(ClusterSpec))
        size += padded(len(self._endpoint_ids) * sizeof(EndpointSpec))
        heads = table_size(len(self._groups))
        size += padded(len(self._groups) * sizeof(GroupSpec)) + padded(heads * sizeof(uint32_t))
        for wanted in self._listeners.values():
            rules = wanted["rules"]
            size += padded(len(rules) * sizeof(Rule)) + padded(len(rules) * sizeof(uint32_t))
            size += padded(heads_of(rules) * sizeof(uint32_t))
            size += sum(len(r["headers"]) for r in rules) * padded(sizeof(HeaderMatch))
        arena.data = <uint8_t*>calloc(1, size)
        arena.used = 0
        arena.size = size
        if arena.data == NULL:
            raise MemoryError
        # The block's first bytes are the SnapshotData itself: freeing that frees everything.
        data = self.data = <SnapshotData*>carve(&arena, sizeof(SnapshotData))

        data.version = self.version
        self._put_limits()
        data.listeners_count = <uint32_t>len(self._listeners)
        data.listeners = <ListenerRoutes*>carve(
            &arena, data.listeners_count * sizeof(ListenerRoutes)
        )
        data.clusters_count = <uint32_t>len(self._clusters)
        data.clusters = <ClusterSpec*>carve(&arena, data.clusters_count * sizeof(ClusterSpec))
        data.endpoints_count = <uint32_t>len(self._endpoint_ids)
        data.endpoints = <EndpointSpec*>carve(&arena, data.endpoints_count * sizeof(EndpointSpec))

        data.node.at = text + <size_t>places[self._node]
        data.node.size = <uint32_t>len(self._node)
        data.groups_count = <uint32_t>len(self._groups)
        data.groups = <GroupSpec*>carve(&arena, data.groups_count * sizeof(GroupSpec))
        data.group_heads_mask = heads - 1
        data.group_heads = <uint32_t*>carve(&arena, heads * sizeof(uint32_t))
        for i, (group_id, wanted) in enumerate(self._groups.items()):
            group = &data.groups[i]
            group.id = group_id
            group.row = wanted["row"]
            group.ordered = wanted["ordered"]
            group.broadcast = wanted["broadcast"]
            group.name = text + <size_t>places[wanted["name"]]
            group.name_size = <uint32_t>len(wanted["name"])
            if wanted["schedule"] is not None:
                group.schedule = (<Schedule>self._schedules[wanted["schedule"]]).data
            slot = hash_of(SEED, group.name, group.name_size) & data.group_heads_mask
            group.next_same = data.group_heads[slot]
            data.group_heads[slot] = i + 1

        numbers = {}
        n = 0
        for i, (cluster_id, wanted) in enumerate(self._clusters.items()):
            numbers[cluster_id] = i
            cluster = &data.clusters[i]
            cluster.id = cluster_id
            cluster.row = wanted["row"]
            cluster.codec = codec_named(wanted["codec"])
            cluster.binding = wanted["binding"]
            cluster.server_requests = wanted["server_requests"]
            cluster.connections = wanted["connections"]
            cluster.kind = wanted["kind"]
            cluster.first_endpoint = n
            cluster.endpoints_count = <uint32_t>len(wanted["endpoints"])
            for endpoint_id, address, weight, row in wanted["endpoints"]:
                endpoint = &data.endpoints[n]
                endpoint.id = endpoint_id
                endpoint.row = row
                endpoint.cluster = i
                endpoint.weight = weight
                endpoint.address_size = <uint32_t>len(address)
                memcpy(endpoint.address, PyBytes_AS_STRING(address), len(address))
                n += 1

        for i, (listener_id, wanted) in enumerate(self._listeners.items()):
            rules = wanted["rules"]
            listener = &data.listeners[i]
            listener.id = listener_id
            listener.row = wanted["row"]
            listener.kind = wanted["kind"]
            listener.codec = codec_named(wanted["codec"])
            listener.rules_count = <uint32_t>len(rules)
            listener.first_exact = listener.rules_count
            listener.rules = <Rule*>carve(&arena, listener.rules_count * sizeof(Rule))
            listener.loose = <uint32_t*>carve(&arena, listener.rules_count * sizeof(uint32_t))
            heads = heads_of(rules)
            listener.heads_mask = heads - 1
            listener.heads = <uint32_t*>carve(&arena, heads * sizeof(uint32_t))
            for n, r in enumerate(rules):
                rule = &listener.rules[n]
                rule.park = r["park"]
                rule.only = r["only"]
                rule.row = r["row"]
                rule.cluster = numbers[r["cluster"]]
                rule.bucket_rate = r["rate"]
                rule.bucket_burst = r["burst"]
                if r["service"] is not None:
                    rule.service = text + <size_t>places[r["service"]]
                    rule.service_size = <uint32_t>len(r["service"])
                    rule.service_match = SERVICE_PREFIX if r["prefix"] else SERVICE_EXACT
                if rule.service_match != SERVICE_EXACT:
                    listener.loose[listener.loose_count] = n
                    listener.loose_count += 1
                elif listener.first_exact == listener.rules_count:
                    listener.first_exact = n
                rule.headers_count = <uint32_t>len(r["headers"])
                if rule.headers_count:
                    rule.headers = <HeaderMatch*>carve(
                        &arena, rule.headers_count * sizeof(HeaderMatch)
                    )
                for slot, (key, value) in enumerate(r["headers"]):
                    rule.headers[slot].key = text + <size_t>places[key]
                    rule.headers[slot].key_size = <uint32_t>len(key)
                    rule.headers[slot].value = text + <size_t>places[value]
                    rule.headers[slot].value_size = <uint32_t>len(value)
            # From the last to the first, each put in front: so every chain is in the order of the
            # rules.
            for n in range(listener.rules_count, 0, -1):
                rule = &listener.rules[n - 1]
                if rule.service_match == SERVICE_EXACT:
                    slot = hash_of(SEED, rule.service, rule.service_size) & listener.heads_mask
                    rule.next_same = listener.heads[slot]
                    listener.heads[slot] = n

    def _put_limits(self):
        cdef MeshLimits* limits = &self.data.limits
        wanted = self._limits
        limits.codec.frame_bytes_max = wanted["frame_bytes_max"]
        limits.in_flight_max = wanted["in_flight_max"]
        limits.in_flight_per_connection_max = wanted["in_flight_per_connection_max"]
        limits.connections_max = wanted["connections_max"]
        limits.queue_bytes_max = wanted["queue_bytes_max"]
        limits.memory_bytes_max = wanted["memory_bytes_max"]
        limits.request_timeout_ms = wanted["request_timeout_ms"]
        limits.request_timeout_ms_max = wanted["request_timeout_ms_max"]
        limits.first_byte_timeout_ms = wanted["first_byte_timeout_ms"]
        limits.frame_timeout_ms = wanted["frame_timeout_ms"]
        limits.idle_timeout_ms = wanted["idle_timeout_ms"]
        limits.connect_timeout_ms = wanted["connect_timeout_ms"]
        limits.heartbeat_ms = wanted["heartbeat_ms"]
        limits.backoff_ms = wanted["backoff_ms"]
        limits.backoff_ms_max = wanted["backoff_ms_max"]
        limits.eject_failures = wanted["eject_failures"]
        limits.eject_ms = wanted["eject_ms"]
        limits.eject_ms_max = wanted["eject_ms_max"]
        limits.eject_percent_max = wanted["eject_percent_max"]
        limits.slow_start_ms = wanted["slow_start_ms"]
        limits.retries_max = wanted["retries_max"]
        limits.sample_every = wanted["sample_every"]

    cdef const ListenerRoutes* _listener(self, uint32_t listener_id) except NULL:
        cdef uint32_t i
        if self.data == NULL:
            raise ValueError(f"snapshot: {self.version} is not sealed yet; seal it first")
        for i in range(self.data.listeners_count):
            if self.data.listeners[i].id == listener_id:
                return &self.data.listeners[i]
        raise ValueError(f"listener_id: {listener_id} is unknown")

    def find(self, listener_id, bytes frame):
        """For tests and `fastmesh check`: (row, cluster_id) that a frame would be routed to, or
        None.

        ValueError when `frame` is not one whole legal frame, as far as it had to be read.
        """
        an_id("listener_id", listener_id)
        cdef const ListenerRoutes* listener = self._listener(listener_id)
        cdef const Codec* codec = listener.codec
        cdef size_t size = len(frame)
        # A copy of exactly that size: a codec may write to its frames, and a sanitizer sees it read
        # one byte too many.
        cdef uint8_t* data = <uint8_t*>malloc(size if size else 1)
        cdef void* state = calloc(1, codec.state_bytes + 1)
        cdef FrameView view
        cdef const Rule* rule
        cdef int malformed
        try:
            if data == NULL or state == NULL:
                raise MemoryError
            memcpy(data, PyBytes_AS_STRING(frame), size)
            if codec.scan(state, data, size, &self.data.limits.codec, 0, &view) != PARSE_OK:
                speaks = codec.name.decode()
                raise ValueError(f"frame: {size} bytes are not one whole legal {speaks} frame")
            rule = route_find(listener, &view, &malformed)
            if malformed:
                raise ValueError("frame: its header section does not parse")
            if rule == NULL:
                return None
            return rule.row, self.data.clusters[rule.cluster].id
        finally:
            free(data)
            free(state)

    def bench(self, listener_id, bytes frame, uint64_t rounds):
        """Nanoseconds per route_find() of one frame, without the GIL."""
        self.find(listener_id, frame)
        cdef const ListenerRoutes* listener = self._listener(listener_id)
        cdef size_t size = len(frame)
        cdef uint8_t* data = <uint8_t*>malloc(size)
        cdef void* state = calloc(1, listener.codec.state_bytes + 1)
        cdef FrameView view
        cdef timespec began, ended
        cdef uint64_t _round
        cdef int malformed
        try:
            if data == NULL or state == NULL:
                raise MemoryError
            memcpy(data, PyBytes_AS_STRING(frame), size)
            listener.codec.scan(state, data, size, &self.data.limits.codec, 0, &view)
            with nogil:
                clock_gettime(CLOCK_MONOTONIC, &began)
                for _round in range(rounds):
                    route_find(listener, &view, &malformed)
                clock_gettime(CLOCK_MONOTONIC, &ended)
        finally:
            free(data)
            free(state)
        if rounds == 0:
            return 0.0
        return ((ended.tv_sec - began.tv_sec) * 1e9 + (ended.tv_nsec - began.tv_nsec)) / rounds

    def chains(self, listener_id):
        """For tests: how many rules hang on each head of a listener's hash table, in the table's
        order.
        """
        an_id("listener_id", listener_id)
        cdef const ListenerRoutes* listener = self._listener(listener_id)
        cdef uint32_t head, chained
        lengths = []
        for head in range(listener.heads_mask + 1):
            length = 0
            chained = listener.heads[head]
            while chained:
                length += 1
                chained = listener.rules[chained - 1].next_same
            lengths.append(length)
        return lengths

    def endpoint_addresses(self, cluster_id):
        """For tests: the `struct sockaddr` of each endpoint of a sealed snapshot's cluster, b"" =
        not resolved yet.
        """
        cdef uint32_t i, number
        cdef EndpointSpec* endpoint
        cdef ClusterSpec* cluster
        if self.data == NULL:
            raise ValueError(f"snapshot: {self.version} is not sealed yet; seal it first")
        for number in range(self.data.clusters_count):
            cluster = &self.data.clusters[number]
            if cluster.id == cluster_id:
                found = []
                for i in range(cluster.endpoints_count):
                    endpoint = &self.data.endpoints[cluster.first_endpoint + i]
                    found.append((endpoint.id, (<char*>endpoint.address)[:endpoint.address_size]))
                return found
        raise ValueError(f"cluster_id: {cluster_id} is unknown")
