"""Every bound of the control plane, and every bound that the configuration may move, each with
its unit, its reason and a precedent.

`CONFIGURABLE` is the `limits:` section of the configuration: the loader, the documentation and
the snapshot are all driven by this one table. Everything else here is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

INT32_MAX = 2**31 - 1
MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound that the configuration may move within `low`..`high`."""

    default: int
    low: int
    high: int
    unit: str
    why: str
    precedent: str


CONFIGURABLE: dict[str, Bound] = {
    "frame_bytes_max": Bound(
        4 * MIB,
        1024,
        GIB,
        "bytes",
        "one frame, checked before a byte is allocated for it",
        "SOFA RPC 8 MiB payload; gRPC 4 MiB",
    ),
    "in_flight_max": Bound(
        65536,
        16,
        65536,
        "requests",
        "per upstream connection; the slot index in an id is 16 bits wide",
        "AMQP channel-max 65535",
    ),
    "in_flight_per_connection_max": Bound(
        4096,
        1,
        65536,
        "requests",
        "one client cannot take all slots of a shared connection",
        "HTTP/2 SETTINGS_MAX_CONCURRENT_STREAMS, 100..1000 in common servers",
    ),
    "connections_max": Bound(
        20000,
        1,
        1_000_000,
        "connections",
        "client connections of the process; clamped to what the descriptor limit allows",
        "NATS max_connections 65536; nginx worker_connections",
    ),
    "queue_bytes_max": Bound(
        8 * MIB,
        65536,
        4 * GIB,
        "bytes",
        "per client and cluster: the client is paused above, then refused; a reader that does"
        " not read is closed at it",
        "NATS MAX_PENDING 64 MiB; Envoy edge guide 32 KiB per connection",
    ),
    "memory_bytes_max": Bound(
        512 * MIB,
        8 * MIB,
        1024 * GIB,
        "bytes",
        "all buffers of the process together",
        "Envoy overload manager heap limit",
    ),
    "request_timeout_ms": Bound(
        3000,
        1,
        HOUR_MS,
        "ms",
        "deadline of a request that names none",
        "SOFA RPC default 3000 ms",
    ),
    "request_timeout_ms_max": Bound(
        10 * MINUTE_MS,
        1,
        DAY_MS,
        "ms",
        "a frame's own timeout is clamped to this, so that a slot cannot be held for 24 days",
        "Bolt's field is 31 bits of ms; AWS ALB idle limit 4000 s",
    ),
    "first_byte_timeout_ms": Bound(
        90000,
        100,
        DAY_MS,
        "ms",
        "a connection that has never spoken; real clients connect early and speak late",
        "SOFA Bolt server closes idle connections after 90 s",
    ),
    "frame_timeout_ms": Bound(
        10000, 100, HOUR_MS, "ms", "a frame begun and not finished", "RabbitMQ handshake 10 s"
    ),
    "idle_timeout_ms": Bound(
        90000,
        100,
        DAY_MS,
        "ms",
        "a client connection without traffic and without anything owed",
        "SOFA Bolt server 90 s",
    ),
    "connect_timeout_ms": Bound(
        1000,
        10,
        5 * MINUTE_MS,
        "ms",
        "connecting to an endpoint",
        "Envoy cluster.connect_timeout, 1 s in most samples",
    ),
    "heartbeat_ms": Bound(
        15000,
        100,
        HOUR_MS,
        "ms",
        "our own heartbeat on a quiet upstream connection; no answer for as long again closes it",
        "bolt.tcp.heartbeat.interval 15 s",
    ),
    "stop_timeout_ms": Bound(
        5000,
        0,
        HOUR_MS,
        "ms",
        "grace for what is in flight after SIGTERM; the rest is answered explicitly",
        "Kubernetes grants 30 s in all; MOSN 3 s",
    ),
    "backoff_ms": Bound(
        50, 1, MINUTE_MS, "ms", "first delay before reconnecting, doubled up to ...", "gRPC 1 s"
    ),
    "backoff_ms_max": Bound(
        1500,
        1,
        HOUR_MS,
        "ms",
        "at most about one connect per second and endpoint, and back within 2 s",
        "gRPC 120 s; Envoy 10 x base interval",
    ),
    "eject_failures": Bound(
        5,
        1,
        1000,
        "failures",
        "in a row, after which an endpoint gets nothing new for a while",
        "Envoy consecutive_5xx 5",
    ),
    "eject_ms": Bound(
        1000,
        10,
        HOUR_MS,
        "ms",
        "first ejection, times the number of ejections in a row up to ...",
        "Envoy base_ejection_time 30 s",
    ),
    "eject_ms_max": Bound(
        30000, 10, DAY_MS, "ms", "the longest ejection", "Envoy max_ejection_time 300 s"
    ),
    "eject_percent_max": Bound(
        50,
        0,
        100,
        "percent",
        "of a cluster's endpoints; never the last one; 0 turns ejection off",
        "Envoy max_ejection_percent 10",
    ),
    "slow_start_ms": Bound(
        3000,
        0,
        HOUR_MS,
        "ms",
        "weight ramps up over this long after a reconnect or an ejection; 0 = at once",
        "Envoy slow_start_window; nginx slow_start",
    ),
    "retries_max": Bound(
        1,
        0,
        16,
        "endpoints",
        "others tried for a request of which no byte was written yet",
        "Envoy num_retries 1",
    ),
}

# --- configuration ------------------------------------------------------------------------------
CONFIG_BYTES_MAX = MIB
"""Bytes of the file. Kubernetes keeps a ConfigMap under 1 MiB."""
CONFIG_DEPTH_MAX = 32
"""Levels of nesting; ours needs 7. Checked on the event stream, before anything recurses."""
CONFIG_NODES_MAX = 200_000
"""Nodes after aliases are expanded, so that a few lines cannot become gigabytes."""
CONFIG_PROBLEMS_MAX = 100
"""Problems that are reported; a person repairs them in rounds anyway."""
NAME_CHARS_MAX = 64
"""Characters of a node, listener, cluster or route name: they become metric labels."""
OTHER_NAME = "__other__"
"""What is counted together once the counter rows are used up; names of the configuration do not
start with "__"."""
NO_ROUTE_NAME = "__none__"
"""The route of what matched no rule."""
ROW_OTHER = 1
"""The counter row of OTHER_NAME; row 0 is the process (counters.pxd)."""
SERVICE_BYTES_MAX = 255
"""Bytes of a service or header in a rule. Java class names are at most 255 in practice."""
LISTENERS_MAX = 64
"""Listeners. nats-server and nginx have none; one socket and one row each."""
CLUSTERS_MAX = 1024
"""Clusters. Istio shards above this."""
ENDPOINTS_MAX = 1024
"""Endpoints of a cluster: one pool with state each."""
RULES_MAX = 4096
"""Rules of a listener: as many as there are counter rows."""
RULE_HEADERS_MAX = 8
"""Headers that one rule may ask for; each is a scan of the header section."""
WEIGHT_MAX = 10_000
"""Weight of an endpoint; HAProxy stops at 256, Envoy at 2**32."""
CONNECTIONS_PER_ENDPOINT_MAX = 64
"""Shared connections per endpoint and thread. More never helped in the trial."""
ENGINE_THREADS_MAX = 64
"""Engine threads; one saturates a core."""
SPIN_US_MAX = 10_000
"""Longest spin before blocking. The kernel's busy_poll advice is 50..100 us."""
RATE_MAX = 1_000_000_000
"""Tokens per second of a rate limit."""
UNIX_PATH_BYTES_MAX = 107
"""sun_path is 108 bytes with its NUL (unix(7))."""
SECRET_BYTES_MAX = 4096
"""Bytes of a token file."""
SECRET_CHARS_MIN = 16
"""Shortest token: 64 bits when it is hexadecimal."""

# --- control --------------------------------------------------------------------------------------
LISTEN_BACKLOG = 4096
"""Connections waiting for accept(); the kernel clamps it to net.core.somaxconn (4096 since 5.4)."""
ADDRESSES_PER_NAME_MAX = 16
"""Addresses taken from one DNS answer."""
RESOLVE_TIMEOUT_S = 2.0
"""One look-up at start or reload; a name that is late is taken up when it resolves."""
RESOLVE_INTERVAL_S = 5.0
"""Between look-ups of all names. Envoy's STRICT_DNS asks every 5 s."""
RESOLVE_CONCURRENT_MAX = 4
"""Look-ups under way; libuv has four threads for them."""
PUBLISH_TIMEOUT_S = 2.0
"""Until every engine thread works with a new snapshot; a turn lasts milliseconds."""
COUNTERS_TIMEOUT_S = 2.0
"""Until every engine thread has copied its counters."""
FDS_RESERVED = 128
"""Descriptors kept for epoll, eventfds, admin connections, logs and files."""
STOP_JOIN_MS = 5000
"""Until the engine threads have ended after everything was answered."""
MAIN_THREAD_NICE = 5
"""Nice value of the Python thread. In the trial it halved the p99 of the data plane under load."""

# --- admin ----------------------------------------------------------------------------------------
ADMIN_HEAD_BYTES_MAX = 16 * 1024
"""Bytes of a request head. h11 and IIS 16 KiB, Tomcat 8 KiB."""
ADMIN_BODY_BYTES_MAX = MIB
"""Bytes of a request body; nginx client_max_body_size 1 MiB."""
ADMIN_CONNECTIONS_MAX = 64
"""Connections open at once; a scraper, a probe and a few people need ten."""
ADMIN_HEAD_TIMEOUT_S = 10.0
"""Until a head (or body) is whole; Go's ReadHeaderTimeout advice is 5..10 s."""
ADMIN_IDLE_TIMEOUT_S = 60.0
"""A kept-alive connection between requests; Prometheus scrapes every 15..60 s."""
ADMIN_WRITE_TIMEOUT_S = 10.0
"""Until an answer is taken by its reader."""
ADMIN_PENALTY_S = 0.1
"""A wrong token is answered after this long. RabbitMQ waits 3 s."""
ADMIN_FAILURES_PER_S = 5
"""Wrong tokens a second (all peers together) after which every try is refused unread."""
ADMIN_CONNECTIONS_SHOWN_MAX = 1000
"""Connections listed by /v1/connections; the rest is a number."""
STATUS_SAMPLES_MAX = 1024
"""Sampled requests kept for /v1/samples."""

# --- observe --------------------------------------------------------------------------------------
LOG_LINES_PER_S = 10
"""Lines per cause and second; the rest is a number on the next line."""
LOG_CAUSES_MAX = 256
"""Causes told apart by the limiter; beyond that they share one bucket."""
LOG_VALUE_CHARS_MAX = 256
"""Characters of one value in a log line, after escaping."""
REMOTE_BYTES_SHOWN_MAX = 64
"""Bytes of what a peer sent that are ever shown."""
HOP_BUCKETS_S = (
    0.0001,
    0.0002,
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
)
"""Seconds; bounds of fastmesh_hop_seconds: 1, 2, 5 from 0.1 ms to 10 s."""
