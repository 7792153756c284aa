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
    "drain_suspend_ms": Bound(
        0,
        0,
        HOUR_MS // 2,
        "ms",
        "of stop_timeout_ms: until brokers have answered that they push nothing more;"
        " 0 = a fifth of it, at most 3 s",
        "a broker answers within a turn",
    ),
    "drain_answers_ms": Bound(
        0,
        0,
        HOUR_MS // 2,
        "ms",
        "of stop_timeout_ms: until the deliveries in flight are answered; 0 = three fifths of it;"
        " what is left of stop_timeout_ms is for clients to go",
        "Kubernetes grants 30 s in all",
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


def drain_times(stop_ms: int, suspend_ms: int, answers_ms: int) -> tuple[int, int, int]:
    """Milliseconds for the three steps of a drain (fastmesh.handover.drain), which are `stop_ms`
    together; 0 asks for the usual share. What does not fit is cut."""
    suspend = min(suspend_ms or min(stop_ms // 5, CONTROL_TIMEOUT_MS), stop_ms)
    answers = min(answers_ms or stop_ms * 3 // 5, stop_ms - suspend)
    return suspend, answers, stop_ms - suspend - answers


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

# --- drain ----------------------------------------------------------------------------------------
DRAIN_QUIET_S = 0.1
"""Without a new push, and with none in flight, until pushes count as over: what was on the wire
when a broker or peer was told. A round trip between data centres is less."""
DRAIN_LOOK_S = 0.02
"""Between two looks at what is left ..."""
DRAIN_YOUNG_S = 2.0
"""... and after this long in a step ..."""
DRAIN_LOOK_LATER_S = 0.1
"""... this: a drain that is held for an hour costs next to nothing."""
DRAIN_GROUPS_SHOWN = 32
"""Groups named in the status of a drain and in its log, those with most pushes first."""

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
HTTP_FRESH_GRACE_S = 0.1
"""For a connection that was accepted just before accepting stopped to say what it came for."""
STATUS_SAMPLES_MAX = 1024
"""Sampled requests kept for /v1/samples."""

# --- registration ---------------------------------------------------------------------------------
MESH_NAME_CHARS_MAX = 127
"""Characters of an application, client, topic or group. RocketMQ: topic 127, group 255."""
FILTER_CHARS_MAX = 1024
"""Characters of a filter expression: hundreds of them fit one header section of 32767 bytes."""
REGISTRATION_BODY_BYTES_MAX = 512 * 1024
"""Bytes of one registration: its 256 groups with the longest names and filters need 390 KiB."""
REGISTRATION_GROUPS_MAX = 256
"""Groups of one client, and topics beside them. An application has a few, a test dozens."""
REGISTRATION_CLIENTS_MAX = 1024
"""Registrations of one application on one node: its processes, not its instances everywhere."""
REGISTRATIONS_MAX = 4096
"""Registrations of a node. Each is looked at once a second, for its lease."""
GROUPS_MAX = 4096
"""Different groups of a node: about as many as there are counter rows."""
REGISTRATION_STATE_BYTES_MAX = 16 * MIB
"""Bytes of all registrations together: they are written whole after each change."""
LEASE_MS_MIN = 1000
"""Shortest lease: it has to be renewed over HTTP before it ends."""
LEASE_MS_MAX = DAY_MS
"""Longest lease: what died without a word is forgotten within a day."""
LEASE_MS = 30_000
"""Lease that names no length. RocketMQ's clients renew every 30 s; Eureka expires after 90 s."""
PREFETCH_MAX = 65535
"""Unanswered deliveries per connection and group; AMQP's prefetch-count has 16 bits."""
PREFETCH = 32
"""Prefetch that names no number. RocketMQ pulls 32 at a time."""
REGISTRATION_TICK_S = 1.0
"""Between looks for leases that ran out."""
REGISTRATION_STALL_S = 5.0
"""A longer gap between two looks is our own absence (stopped, swapped out): nobody could renew
then, so that time is given back to every lease."""
REGISTRATION_SAVE_TIMEOUT_S = 5.0
"""Until a request is told that the disk does not answer; a healthy one takes milliseconds."""
REGISTRATION_RETRY_S = 1.0
"""First delay before state that did not reach the disk is written again, doubled up to ..."""
REGISTRATION_RETRY_S_MAX = 30.0
"""... this."""

# --- scheduling -----------------------------------------------------------------------------------
# The compiled form has the same bounds (_ext/schedule.pxd).
SCHEDULE_APPS_MAX = 1024
"""Applications of a schedule: a node serves one or a few, a file for a whole site some hundreds."""
SCHEDULE_NODES_MAX = 1024
"""Nodes of an application: as many as a cluster has endpoints, and a decision may look at each."""
SCHEDULE_RULES_MAX = 64
"""Rules of an application: each is tried in turn for every delivery. Envoy advises tens a route."""
SCHEDULE_MATCHES_MAX = 8
"""Attributes and headers that one rule may ask for, as in a listener's rules."""
SCHEDULE_RULE_NODES_MAX = 4096
"""Nodes of all rules of an application together: 16 bytes each, and 5 for every group."""

# --- the message mesh's protocol (docs/protocol/mesh-push.md) -------------------------------------
HEADER_SECTION_BYTES_MAX = 32767
"""Bytes of a header section: Bolt's length is 16 bits, which Java and JS read as signed."""
MESSAGE_ID_BYTES_MAX = 128
"""Bytes of fm.id. A UUID has 36; RocketMQ's message ids 32, AMQP's message-id at most 255."""
MESSAGE_KEY_BYTES_MAX = 255
"""Bytes of fm.key, fm.colour, fm.lane and fm.version; AMQP's short strings."""
DELAY_MS_MAX = 40 * DAY_MS
"""Longest fm.delay_ms. RocketMQ 5 allows 3 days, RabbitMQ's plug-in 49."""
MESSAGE_RETRY_MS_MAX = DAY_MS
"""Longest fm.retry_ms; the compiled reader refuses more (push.pxd)."""
MESSAGE_HOPS_MAX = 255
"""Of fm.hop; a forward makes it 1, and nobody forwards twice (push.pxd)."""
NUMBER_MAX = 2**53 - 1
"""Of fm.born_ms and fm.epoch: the whole numbers that JavaScript tells apart."""
CREDIT_MAX = INT32_MAX
"""Of fm.prefetch in an announce: a sum over connections; more is announced as this."""
ANNOUNCE_PARTS_MAX = 256
"""Frames of one announce: 4096 groups in two roles with the longest names and filters need 180."""
REASON_BYTES_MAX = 256
"""Bytes of fm.reason that are sent: a sentence for people. The engine's own have 128."""
FILTER_TERMS_MAX = 16
"""Terms of a filter expression; each is a look-up per message and group."""
FILTER_VALUES_MAX = 64
"""Alternatives in one term."""

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

# --- hand-over (docs/handover.md) -----------------------------------------------------------------
HANDOVER_HELLO_MS = 2000
"""A connection to handover.sock that says nothing; one that cannot be written to."""
HANDOVER_ANSWER_MS = 3000
"""Until ACK, and each of LISTENERS and PROCESS, is here: longer than the giver waits for HELLO."""
HANDOVER_PREPARE_MS = 5000
"""To bind and compile. The giver serves on, but takes no reload and no registration meanwhile;
names take up to RESOLVE_TIMEOUT_S. tableflip waits 60 s, but for the whole start."""
HANDOVER_FROZEN_MS = 500
"""Nothing is read or written from the freeze to COMMIT or the thaw; 50 ms is the aim at 10 000
connections. Below every client's deadline (SOFA RPC 3000 ms) and most probes (1 s)."""
HANDOVER_STATE_MS = 2000
"""The taker's patience between PREPARED and END: four times what the giver allows itself."""
HANDOVER_LOAD_MS = 2000
"""To verify and load; the giver loses patience first, unless it is dead or stopped."""
HANDOVER_COMMIT_MS = 2000
"""After READY until the taker fences a silent giver. Clearly after HANDOVER_FROZEN_MS: were the two
to cross, each would kill the other."""
HANDOVER_DEATH_MS = 1000
"""Until a process that closed its end, or was killed, is seen dead by its pidfd."""
HANDOVER_SUSPEND_MS = 5000
"""Mode drain: until every broker was told to push nothing more, or is known to be gone."""
HANDOVER_SETTLE_MS = 30_000
"""Mode drain: until pushes in flight are answered. RocketMQ gives a consumer 15 min, AMQP brokers
30 min; what is late comes again to the successor."""
HANDOVER_HANDED_MS = 60_000
"""Mode drain: the taker's patience between PREPARED and HANDED, above the sum of the two."""
HANDOVER_ANSWERS_S = 0.5
"""For answers of the admin and registration interface that are under way when their doors close.
Serving goes on meanwhile; the taker waits HANDOVER_ANSWER_MS."""
HANDOVER_LAST_ANSWER_S = 3.0
"""For the answer to whoever asked for the upgrade: the successor reports when it serves."""
HANDOVER_REPORT_S = 60.0
"""Until a successor has reported; the deadlines of all steps together are below 20 s."""
HANDOVER_CONVERSATIONS_MAX = 8
"""Connections to handover.sock at a time: one hand-over, and a few that are refused."""
HANDOVER_RECORD_BYTES_MAX = 60 * 1024
"""Bytes of a record. SOCK_SEQPACKET sends it whole or fails; it fails at about 200 KiB."""
HANDOVER_RECORD_FDS_MAX = 240
"""Descriptors of a record. The kernel refuses 254 (SCM_MAX_FD 253)."""
HANDOVER_ACK_RECORDS = 4
"""CONNS that may be unanswered: descriptors in flight count against the sender's limit, which may
be 1024 (ETOOMANYREFS)."""
HANDOVER_LISTENERS_MAX = LISTENERS_MAX + 8
"""Listening sockets of a hand-over: the configured ones, admin, registration, the forward service,
and some that a later version may have."""
HANDOVER_REASON_CHARS_MAX = 1024
"""Characters of the reason in REFUSE and ABORT: some problems of a configuration, for people."""
HANDOVER_STATE_VERSION_MAX = 65535
"""Of the state's format: 16 bits in the blob."""
HANDOVER_CONNECTIONS_MAX = 2_000_000
"""Connections of a hand-over: downstream and upstream of the largest configuration."""
HANDOVER_STATE_BYTES_MAX = 1024 * GIB
"""Bytes of one engine thread's state: the largest `memory_bytes_max`. Only compared with the size
of a memfd, nothing is allocated for it."""
HANDOVER_DOCUMENT_BYTES_MAX = 256 * MIB
"""Bytes of the process document: all registrations are 16 MiB, a million sessions 100 MiB."""
HANDOVER_HOLD_S = REGISTRATION_SAVE_TIMEOUT_S + 1.0
"""For what is under way (saves, looks at files) to end before anything is handed over: a save that
takes longer counts as one that never ends."""
SAVED_MS_MAX = 40 * DAY_MS
"""Longest time in a document; the longest lease is a day, what is later is not waited for."""
SAVED_TEXT_CHARS_MAX = 65536
"""Characters of one text in a document: names have 127; a rule that is named after what it matches
has less than two header sections."""
SAVED_NAMES_MAX = 1_000_000
"""Names of one kind in a document, and sessions: as many as connections may be configured."""

# --- embedded broker ------------------------------------------------------------------------------
BROKER_STORE_BYTES_MAX = 16 * GIB
"""Of a store, unless told otherwise: publishers are told "later" above. RocketMQ refuses at 90 % of
the disk."""
BROKER_STORE_RESERVE = 64 * MIB
"""Bytes above that bound for positions and retries: what was accepted can still be consumed."""
BROKER_WAL_PAGES = 4000
"""Pages in the write-ahead log (16 MiB) after which they are moved to where they belong, which
takes some 20 ms."""
BROKER_WAL_BYTES_KEPT = 64 * MIB
"""Bytes to which an overgrown write-ahead log is cut again."""
BROKER_CHECK_BYTES_MAX = 256 * MIB
"""Stores up to this size are checked page by page at start, which takes up to a second."""
BROKER_IDS_REMEMBERED = 32768
"""Message ids (at least; at most twice as many) in which a publish that comes again is recognised:
more than a second of the fastest publisher. 200 B each."""
BROKER_TAIL_BYTES_MAX = 32 * MIB
"""Newest messages kept in memory, so that who keeps up never reads from disk."""
BROKER_TAIL_MESSAGE_BYTES = 1024
"""What a message in memory takes besides its content."""
BROKER_READ_MESSAGES = 64
"""Messages read from disk at once for a group that lags ..."""
BROKER_READ_BYTES = MIB
"""... and bytes: between the two the loop is held up for some tenths of a millisecond."""
BROKER_PENDING_BYTES_MAX = 64 * MIB
"""Published and not yet on disk, content and overhead; "later" above."""
BROKER_BATCH_MESSAGES = 4096
"""Messages in one transaction; the rest waits for the next, some 20 ms later."""
BROKER_BATCH_BYTES = 16 * MIB
"""Bytes in one transaction."""
BROKER_CREDIT_MAX = 65535
"""Deliveries unanswered on one connection and group: as many as its ids tell apart."""
BROKER_RETRIES_MAX = 100_000
"""Messages of one group waiting for another attempt; above, it gets nothing new until some are
done. 200 B each."""
BROKER_WAITING_MAX = 8192
"""Messages of one ordered group that wait for the one before them; above, its other keys wait
too. Each commit writes them down, 3 B each."""
BROKER_PREPARED_MAX = 65536
"""Messages prepared and neither committed nor rolled back; "later" above."""
BROKER_CHECKS_MAX = 64
"""Checks that are asked at a time: after a restart all may be due, each with its content."""
BROKER_TURN_DELIVERIES = 2048
"""Messages looked at for one group before the others have their turn."""
BROKER_QUEUES_MAX = 64
"""Queues of a topic; RocketMQ creates 4 to 16."""
BROKER_TOPICS_MAX = 4096
"""Topics of a broker: made by whoever publishes, so somebody has to stop it."""
BROKER_GROUPS_MAX = 4096
"""Groups of a broker, for the same reason."""
BROKER_TRIM_MESSAGES = 500
"""Messages of a queue deleted at once by retention, some 10 us each, so that nobody waits for it;
twenty times a second is faster than anybody publishes."""
BROKER_STOP_TIMEOUT_MS = 5000
"""Until deliveries are answered after SIGTERM; RocketMQ clients wait as long."""
BROKER_SWITCH_INTERVAL_S = 0.0005
"""How long the loop's thread keeps the interpreter from the one that writes: Python's 5 ms are
waited for at each statement, and group commits get ten times slower."""
BROKER_CLOSE_TIMEOUT_S = 1.0
"""Until the last answers are in the kernel and connections are closed."""
BROKER_WRITE_TIMEOUT_S = 2.0
"""Until what an operator changed is on disk."""
BROKER_CONNECTIONS_MAX = 1000
"""Connections: one per mesh process, and the tests' own."""
BROKER_RING_BYTES = 16 * MIB
"""Between the engine and Python, each way. Pages that nobody uses cost nothing."""
BROKER_FRAME_BYTES_MAX = BROKER_RING_BYTES // 4 - 64 * 1024
"""A frame fills at most a quarter of the ring; a delivery is a little larger than its publish."""
BROKER_QUEUE_BYTES_MAX = 64 * MIB
"""Answers and deliveries that a connection has not read yet; NATS MAX_PENDING 64 MiB."""
BROKER_ENGINE_BYTES_MAX = 512 * MIB
"""All buffers of the engine together."""
BROKER_GC_THRESHOLD = 50_000
"""New objects between two looks for cycles: messages have none, and a look walks over them all."""
# --- the message mesh -----------------------------------------------------------------------------
BROKERS_MAX = 64
"""Brokers of a process: a bit each in the rules that name some of them."""
BROKER_TOPICS_MAX = 1024
"""Topic patterns of a broker."""
GROUP_ID_MAX = 65535
"""Numbers of groups in the engine: 16 bits."""
CONTROL_TIMEOUT_MS = 3000
"""Until a hello or announce of ours counts as unanswered; a broker answers within a turn."""
CONTROL_RETRY_MS = 1000
"""First delay before what was refused or not answered is said again, doubled up to ..."""
CONTROL_RETRY_MS_MAX = 30_000
"""... this."""
ANNOUNCE_GAP_MS = 20
"""Between two announces on one connection: a thousand clients that connect at once are a few of
them, and nobody waits long enough to notice."""
SUBSCRIBE_WAIT_MS = 3000
"""Until a subscribe whose groups do not come into force is answered "later"; it takes 60 ms."""
PEER_SILENT_INTERVALS = 3
"""Heartbeats missed until a peer counts as having no consumer. SWIM and Consul: 3."""
COMPILE_GAP_S = 0.05
"""Between two snapshots that registrations, brokers or schedules ask for: compiling 4096 groups
takes about as long."""
PEERS_EXPECTED = 128
"""Connections with other nodes that descriptors are kept for; more of them share with clients."""
WATCH_INTERVAL_S = 0.25
"""Between two looks at a watched file: in force within a second, and four stats a second."""
EMPTY_POLLS = 20
"""Looks at an empty list of brokers before it is believed (5 s): a file that is being rewritten, or
a generator that lost its source, must not take a node off all brokers."""
SCHEDULE_BYTES_MAX = MIB
"""Bytes of a schedule, as of a configuration."""
RATE_WINDOW_S = 10.0
"""Over which the rates of /v1/topology are taken."""
RATE_SAMPLES_MAX = 32
"""Counter readings kept for it."""
RATE_GAP_S = 0.4
"""Between two of them: several viewers share one reading."""
# --- client ---------------------------------------------------------------------------------------
CLIENT_CHECKS_MAX = 16
"""Checks of one publisher group answered at once: they come a few after a crash, not in floods."""
CLIENT_THREADS_MAX = 64
"""Threads for the plain handlers of one group; past that the GIL is all they wait for."""
CLIENT_CONNECTIONS_MAX = 16
"""Connections of one client. One carries tens of thousands of messages a second."""
CLIENT_IN_FLIGHT_MAX = 1024
"""Publishes unanswered at once; a quarter of what the mesh lets one connection have, so that what
else the connection says is never refused for them."""
CLIENT_WRITE_BYTES_MAX = MIB
"""Bytes waiting for the mesh to read them, after which a publish waits before it is sent."""
CLIENT_PUBLISH_TIMEOUT_MS = 5000
"""Deadline of a publish that names none: one request to a broker and a retry."""
CLIENT_CONTROL_TIMEOUT_MS = 3000
"""Until hello, subscribe or suspend is answered; the mesh answers them itself."""
CLIENT_CONNECT_TIMEOUT_MS = 2000
"""Until a connection stands; the mesh is on this host."""
CLIENT_START_TIMEOUT_MS = 10_000
"""Until the client is registered, connected and subscribed: the mesh may be starting as well."""
CLIENT_CLOSE_TIMEOUT_MS = 20_000
"""For handlers to finish at close; Kubernetes grants 30 s in all."""
CLIENT_CANCEL_TIMEOUT_MS = 1000
"""For a handler to end after it was cancelled; one that refuses is left behind."""
CLIENT_HTTP_TIMEOUT_MS = 5000
"""For one registration request: the mesh writes it to disk before it answers."""
CLIENT_HTTP_BODY_BYTES_MAX = MIB
"""Bytes of an answer of the registration; errors of a hundred groups are some KiB."""
CLIENT_LEASE_PARTS = 3
"""A lease is renewed at this fraction of it, so that two renewals may fail."""
CLIENT_BACKOFF_MS = 50
"""First delay before the mesh is dialled again; it restarts within a second."""
CLIENT_BACKOFF_MS_MAX = 3000
"""Longest delay: a thousand clients are then some hundred attempts a second in all."""
CLIENT_HEARTBEAT_MS = 15_000
"""Own heartbeat on a connection where nothing was heard; bolt.tcp.heartbeat.interval 15 s."""
CLIENT_LATER_MS = 100
"""Before a publish that was told "later" without a time is tried again."""
CLIENT_LATER_MS_MIN = 10
"""Shortest wait after a "later", so that "at once" does not become a busy loop."""
CLIENT_DECISIONS_MAX = 10_000
"""Transactions whose fate is remembered for a check that comes after it was told."""
CLIENT_FRAME_OVERHEAD_BYTES = 65536
"""What a frame may carry besides its content: 32767 bytes of class, 32767 of headers, 28 fixed."""
