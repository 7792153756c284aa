"""One thread, one world: every struct that an engine thread owns. No code here, only what things
are.

A turn: wait -> read everything that is ready (bounded) -> parse -> decide -> queue -> timers ->
bury the dead -> flush every
destination once -> copy the counters if somebody asked. Who does what:

    conn.pyx    bytes in, bytes out: descriptors, read area, write queues, memory
    pool.pyx    endpoints: connecting, back-off, heartbeats, ejection, the weighted choice
    groups.pyx  push groups: members and their credit, keys, which node; what Python must be told
    relay.pyx   frames: route, slot, patch, queue, answer, expire, retry, hold back
    handover.pyx  all of it into a file, and out of one in another process
    engine.pyx  the thread: epoll, commands, events, accepting; and the class that Python drives

Calls go down that list only from bottom to top (engine -> handover -> relay -> groups -> pool ->
conn). What must travel the other way travels as state: a connection that has to die is put on the
doomed list, and relay buries it at one place in the turn, once.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from .counters cimport Counters
from .frame cimport Codec, FrameId
from .ring cimport Ring
from .route cimport ListenerRoutes, Rule, SnapshotData
from .schedule cimport Plan, Share
from .slots cimport Slot, SlotTable
from .timers cimport Timer, Wheel

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

cdef struct Conn
cdef struct Entry
cdef struct Link
cdef struct Endpoint
cdef struct Cluster
cdef struct World
cdef struct Parked
cdef struct Group
cdef struct Member
cdef struct Key
cdef struct Fan
cdef struct Delivery
cdef struct Notice
cdef struct ConnInfo
cdef struct Dump

cdef enum:
    AREA_BYTES = 1 << 20        # read area of a turn; full = flush, then the rest of the ready list
    READ_BYTES = 1 << 17        # offered to one recv
    READ_BYTES_PER_TURN = 1 << 18   # one busy connection gets no more per turn
    # a shorter half frame is copied to the area, a longer one is completed where it lies
    PART_IN_AREA_BYTES = 4096
    EVENTS_PER_TURN = 512       # ready descriptors taken per wait
    TIMERS_PER_TURN = 1024
    ACCEPTS_PER_TURN = 64
    IOVECS = 64
    FLUSH_BYTES = 1 << 18       # handed to one send
    # frames up to this length are gathered by copying, longer ones by reference
    COPY_BYTES = 1024
    STAGE_BYTES = 1 << 16
    PAUSE_MS = 1000             # a client over its quota is held back this long at most
    # after our last word to a client that is out of step, its bytes are thrown away this long
    LINGER_MS = 1000
    DRAIN_LOOK_MS = 50          # how often a draining connection is looked at
    # a draining client connection is closed when it owes nothing and was quiet this long
    DRAIN_QUIET_MS = 200
    IDS = 1 << 16               # ids of listeners, clusters and endpoints are below this
    NO_LISTENER = IDS           # of a client whose listener speaks something else by now
    PARKED_MAX = 1024           # frames awaiting a verdict, per thread
    NO_RETRY = 255              # Entry.tries of what is sent nowhere else
    HOME_THREAD = 0             # all push traffic lives here: groups are never shared

cdef enum Role:
    ROLE_DOWNSTREAM = 0
    ROLE_UPSTREAM = 1
    ROLE_LISTENER = 2
    ROLE_WAKE = 3               # the eventfd by which others wake the thread

cdef enum ConnState:
    CONN_CONNECTING = 0
    CONN_OPEN = 1
    CONN_DRAINING = 2           # takes no new requests, closes when nothing is owed
    CONN_DOOMED = 3             # on the doomed list; nothing reads or writes it any more

cdef enum Hold:                 # why a connection is not read (bits)
    HOLD_QUOTA = 1              # over its quota towards one cluster (bounded by PAUSE_MS)
    HOLD_SLOW_READER = 2        # it does not read its answers
    HOLD_PARKED = 4             # a frame of it waits for a verdict: order is kept by not reading on
    HOLD_PUNT = 8               # the event ring was full for a frame of it
    # it said its last word; what it asked is still answered (half-close)
    HOLD_EOF = 16
    HOLD_SHORTAGE = 64          # a listener that found no descriptor or no memory
    HOLD_CONTROL = 128          # Python has a control frame of it: what follows waits for the reply
    # answers by order: the next request waits until this one is answered
    HOLD_ORDER = 32

cdef enum Flow:
    FLOW_OPEN = 0
    FLOW_PAUSED = 1
    FLOW_SHEDDING = 2           # the pause is over and nothing moved: further requests are answered "overload"

cdef enum EntryKind:
    ENTRY_REQUEST = 0           # somebody waits for the answer: has a slot
    ENTRY_ONEWAY = 1
    ENTRY_ANSWER = 2            # somebody's answer, forwarded
    ENTRY_OWN = 3               # made by the mesh: errors, heartbeats, their acknowledgements
    ENTRY_PART = 4              # a middle or last part of a frame that is streamed

cdef enum TimerKind:
    # owner Conn: idle, first byte, half frame, pause, drain, connect, heartbeat, accept again
    TIMER_CONN = 0
    TIMER_SLOT = 1              # owner Slot: deadline or end of rest
    TIMER_ENDPOINT = 2          # owner Endpoint: reconnect, end of ejection
    TIMER_PARKED = 3            # owner Parked: deadline of a frame that waits for a verdict

cdef struct Budget:             # all buffers of one thread
    uint64_t used
    uint64_t max                # memory_bytes_max / threads
    uint64_t fail_at            # test hook: the k-th allocation from now fails, 0 = none

cdef struct Io:
    # A connection's I/O is these four: TLS, or a simulated network, is another set. recv and send
    # return bytes, 0 (recv: end of
    # stream), or -errno; EAGAIN means "would block". A recv that fills less than it was offered has
    # left nothing behind (see conn_arm), unless the event told of an end or an urgent byte.
    int64_t (*recv)(Conn* conn, iovec* iov, int count) noexcept nogil
    int64_t (*send)(Conn* conn, iovec* iov, int count) noexcept nogil
    void (*shutdown)(Conn* conn) noexcept nogil
    int (*can_move)(const Conn* conn) noexcept nogil

cdef struct Entry:              # one frame in a write queue
    Entry* next
    uint8_t* data
    uint32_t size
    uint32_t written
    # bytes allocated at `data`; 0 = it lies in the read area and must leave or be spilled this turn
    uint32_t room
    uint8_t kind                # EntryKind
    uint8_t block               # REQUESTS or PUSHES, for the ledger of one-way frames
    # a byte of it was written: it can neither be withdrawn nor sent elsewhere
    uint8_t begun
    uint8_t dropped             # withdrawn before its first byte was written: skipped by the flush
    uint8_t tries
    uint32_t row
    Slot* slot                  # ENTRY_REQUEST: gets sent_ns when the last byte is handed over
    Link* link                  # whose quota it uses, or NULL
    uint64_t only               # Rule.only, should it have to go elsewhere
    uint64_t received_ns        # 0 = no hop to measure

# one client connection's use of one cluster; outlives the client while entries point at it
cdef struct Link:
    Link* next
    Conn* client                # NULL once the client has gone
    uint64_t upstream           # BIND_PER_CLIENT: handle of its own upstream connection
    uint64_t queued_bytes
    uint32_t cluster            # stable id
    uint32_t entries
    uint8_t flow
    uint32_t ordinal            # of its record, while the world is saved
    uint64_t pause_until_ms

cdef struct Parked:
    Parked* next
    Timer timer
    uint64_t ticket
    uint64_t client
    uint8_t* data
    uint32_t size
    uint32_t row
    uint32_t cluster            # stable id
    uint8_t oneway
    uint64_t received_ns

cdef enum DeliveryKind:        # what a slot is besides a request that somebody waits for
    DELIVERY_LOCAL = 0          # at a client of ours: uses credit of its connection
    DELIVERY_FORWARD = 1        # at a peer: the copy is offered to a client of ours if it is refused there
    DELIVERY_PUBLISH = 2        # an idempotent publish: the copy may go to another broker
    DELIVERY_CALL = 3           # Python's own request: its outcome is an event

cdef struct Notice:             # an event that must not get lost when the ring is full
    Notice* next
    uint32_t kind               # EventKind
    uint8_t waiting             # on the list of those that found the ring full
    uint64_t a
    uint64_t b
    uint64_t c

cdef struct Delivery:
    Notice notice               # DELIVERY_CALL: its outcome, without a frame
    Delivery* free_next
    Member* member              # whose credit it uses, or NULL
    Key* key                    # ordered groups: the key that waits for its answer, or NULL
    Fan* fan                    # one copy of a broadcast, or NULL
    uint64_t only               # DELIVERY_PUBLISH: Rule.only
    uint8_t* copy               # whole frame, its id is whatever it was sent with; NULL = none
    uint32_t copy_size
    uint32_t group              # stable id, 0 = none
    uint8_t kind                # DeliveryKind

# one client connection's part in one group; outlives the connection while deliveries point at it
cdef struct Member:
    Group* group                # NULL = the group or its part in it has ended
    Conn* conn                  # NULL = likewise
    Member* next_of_conn
    uint64_t rank               # of the connection, for the choice by key
    uint64_t turn               # when it was chosen last: among equals the one that waited longest
    uint32_t prefetch           # deliveries that may be unanswered
    uint32_t in_flight
    uint32_t at                 # in Group.members
    uint32_t heap_at            # in Group.heap + 1; 0 = no credit left
    uint32_t ordinal            # of its record, while the world is saved

# a key of an ordered group with an unanswered delivery; the next one of the key goes to the same place
cdef struct Key:
    Key* next
    uint64_t hash
    Group* group                # NULL = the group has ended
    Member* member              # or NULL: at the peer behind ...
    uint32_t endpoint           # ... this endpoint
    uint32_t in_flight
    uint32_t ordinal            # of its record, while the world is saved

cdef struct Fan:                # a broadcast on its way: one answer for all copies
    uint64_t asker
    FrameId orig
    uint32_t hint
    uint32_t open               # copies that are not settled
    uint8_t later               # somebody did not consume it: all of it comes again
    uint8_t consumed            # somebody did
    uint8_t silent              # one-way: nobody waits for an answer
    uint32_t ordinal            # of its record, while the world is saved

cdef struct Group:
    uint32_t id
    uint32_t row
    uint8_t ordered
    uint8_t broadcast
    uint8_t changed             # Python is to be told how many live here
    uint64_t version            # of the last snapshot that had it
    Group* next
    Member** members            # all of them
    Member** heap               # those with credit, fewest in flight first; as long as `members`
    uint32_t members_count
    uint32_t members_room
    uint32_t heap_count
    uint64_t credit             # sum of prefetch
    uint64_t turns
    Key** keys                  # by hash, chained
    uint32_t keys_count
    uint32_t keys_room          # a power of two, 0 = none yet
    const Plan* schedule    # NULL = everything stays here
    Share* share
    size_t share_bytes
    uint8_t* reachable          # by node of the schedule, good while peers_seen == World.peers_version
    uint32_t reachable_room
    uint64_t peers_seen

cdef struct Conn:
    int fd
    uint32_t index              # handle = generation << 32 | index
    uint32_t generation
    uint8_t role
    uint8_t state
    uint8_t hold                # Hold bits; not 0 = EPOLLIN is off
    uint8_t close_reason        # CloseReason, once doomed
    uint32_t armed              # epoll events in force
    int close_errno
    const Codec* codec
    const Io* io
    void* codec_state
    Conn* dirty_next            # write list of the turn; a conn is on it exactly when `dirty`
    Conn* doomed_next
    uint8_t dirty
    # the kernel took less than offered: nothing is tried before EPOLLOUT
    uint8_t blocked
    uint8_t spoke               # a byte was ever received
    uint8_t lingering           # told why it ends: what it still sends is thrown away
    uint8_t cut_through         # parts are forwarded as they come
    uint8_t kind                # Kind of its listener or cluster
    uint8_t greeted             # a client that said hello, and Python agreed; a broker whose hello is queued
    # the half frame's buffer may hold whole frames: reading was held between two of them
    uint8_t part_ready
    uint8_t resuming            # on the resume list
    Conn* resume_next
    # half frame: bytes of a frame begun and not finished; NULL on an idle connection
    uint8_t* part
    uint32_t part_size
    uint32_t part_room
    uint32_t part_need          # bytes that the frame surely needs
    # write queue
    Entry* head
    Entry* tail
    Entry* fresh                # the first that may lie in the read area
    uint64_t queued_bytes
    uint64_t own_bytes          # of these, answers and what the mesh made ...
    uint64_t made_bytes         # ... and what the mesh made alone
    uint64_t blocked_ms         # when it got blocked
    # ids
    Slot* flying                # requests sent on this connection and in flight, newest first
    SlotTable sent              # requests that we sent on this connection
    Slot* asked                 # requests of this connection that wait for their answer elsewhere
    uint32_t asked_count
    # time, ms of CLOCK_MONOTONIC
    Timer timer
    uint64_t opened_ms
    uint64_t read_ms            # last byte received
    uint64_t wrote_ms           # last byte accepted by the kernel
    uint64_t linger_until_ms
    uint64_t frame_began_ms     # 0 = at a frame boundary
    # push
    Member* members             # its parts in groups
    Notice* notice              # allocated with it, so that its end can always be told; NULL = nobody asks
    # downstream
    uint32_t listener
    uint32_t row
    Link* links
    uint32_t links_count
    Parked* parked
    # upstream
    Endpoint* endpoint
    Conn* endpoint_next         # all connections of the endpoint
    Slot* heartbeat_open        # ours, not acknowledged yet
    uint64_t heartbeat_ms       # when it was sent
    uint64_t last_client        # handle of the client that used it last
    uint64_t owner              # BIND_PER_CLIENT: its client
    uint8_t dialect             # of its first frame: some peers answer everything in that; DIALECT_NONE before
    uint8_t counted             # Endpoint.up counts it
    # streamed frames (VIEW_PARTS, 1:1 bindings)
    # handle that the parts of the frame being received go to, 0 = discard
    uint64_t stream_to
    uint8_t streaming           # between FIRST and LAST
    uint8_t stream_block
    uint32_t stream_row
    # part of an answer was forwarded to this client and its LAST was not
    uint8_t answer_open
    # hand-over
    uint8_t left                # it stayed in the process before: ends when this world begins
    uint32_t ordinal            # of its record, while the world is saved

cdef struct Endpoint:
    uint32_t id
    uint32_t row
    uint32_t weight             # configured
    uint32_t effective          # weight x slow start x health, scaled; 0 = not chosen
    Cluster* cluster            # NULL once gone
    uint64_t version            # of the last snapshot that had it
    Conn* conns                 # every connection, draining ones too
    uint32_t conns_count
    uint32_t up                 # OPEN ones
    uint32_t in_flight
    uint32_t failures           # in a row
    uint32_t ejections          # in a row
    uint32_t backoff_step
    uint64_t retry_at_ms        # no connect before
    uint64_t ejected_until_ms   # 0 = not ejected
    uint64_t ramp_from_ms       # slow start began, 0 = at full weight
    Timer timer
    uint8_t gone                # not in the snapshot any more: freed with its last connection
    uint8_t ever_up
    # peers: ids of the groups that have a consumer there, ascending
    uint32_t* live_groups
    uint32_t live_groups_count
    uint32_t address_size
    uint8_t address[128]

cdef struct Cluster:
    uint32_t id
    uint32_t row
    const Codec* codec
    uint8_t binding
    uint8_t server_requests
    uint8_t kind                # Kind
    uint16_t connections
    Endpoint** endpoints
    uint32_t endpoints_count
    uint64_t* cumulative        # of the effective weights
    uint64_t total
    uint64_t recompute_ms       # cumulative is good until then (slow start moves it), 0 = now
    uint32_t endpoints_room
    uint32_t ejected
    uint64_t version            # of the last snapshot that had it
    Cluster* next

cdef struct Bucket:
    uint64_t tokens_micro       # a token is 1e6
    uint64_t filled_ns

cdef enum Owed:                 # events about the world itself (bits), told behind all others
    OWED_THAWED = 1
    OWED_FROZEN = 2
    OWED_SAVED = 4

cdef struct SavedWorld:         # what world_save() left for Python
    int memfd                   # -1 = none, or taken
    int error                   # errno, 0 = it is whole
    int* descriptors            # the connections' own, in the order of their records
    uint32_t count
    uint32_t downstream
    uint32_t upstream
    uint32_t requests
    uint32_t pushes
    uint32_t left
    uint64_t bytes

cdef struct World:
    int epfd
    # frozen: what was watched before. Nobody waits on it any more, so nothing is read of it; closing it
    # costs less than a thousand EPOLL_CTL_DEL, and does not make the pause longer. -1 = none
    int left_epfd
    int wake_fd
    int notify_fd               # wakes the main thread
    int reserve_fd              # given up for a moment when descriptors run out
    uint32_t thread
    uint32_t threads
    World* worlds               # all of them, for handing accepted connections over
    const SnapshotData* snapshot
    uint64_t version            # of `snapshot`, read by Python
    # by the stable ids that Python hands out (all < IDS); calloc'ed, so pages that nobody uses cost
    # nothing
    const ListenerRoutes** listener_of
    Cluster** cluster_of
    Endpoint** endpoint_of
    Cluster* clusters           # every cluster of the snapshot
    # push (home thread)
    Group** group_of            # by stable id
    Group* groups
    uint64_t peers_version      # moves when any endpoint came, went or changed what it serves
    Delivery* free_deliveries
    uint32_t free_deliveries_count
    Notice* untold              # events that found the ring full, oldest first ...
    Notice** untold_tail        # ... and where the next one goes
    uint8_t groups_changed      # some group's `changed` is set
    uint8_t refeed              # the frame being handled could not be told: it stays where it is
    Wheel wheel
    Counters* counters
    Budget budget
    uint64_t now_ns             # of the last clock reading
    uint64_t now_ms
    # connections
    Conn** conns
    uint32_t* generations
    uint32_t* free_indices
    uint32_t conns_room
    uint32_t free_count
    uint32_t conns_high
    uint32_t downstreams        # also read by the accepting thread
    Conn* dirty                 # to be flushed, in the order in which they got something to send
    Conn* dirty_tail            # its last one, while there is one
    Conn* doomed
    Conn* resume                # held connections that may go on with what they have buffered
    # memory of its own that the frame being handled lies in; NULL = the read area
    uint8_t* block
    uint32_t block_room
    Entry* free_entries
    uint32_t free_entries_count
    # read area and gather stage
    uint8_t* area
    uint32_t area_used
    uint8_t* stage
    # hooks
    Bucket* buckets             # by row
    Parked* parked
    uint32_t parked_count
    uint64_t tickets
    uint64_t sample_count
    uint32_t log_tokens[16]     # abnormal ends reported this second, by reason
    uint64_t log_second
    uint64_t refused_second
    # rings
    Ring commands               # Python -> this thread
    Ring events                 # this thread -> Python
    Ring inbox                  # thread 0 -> this thread: accepted descriptors
    uint32_t notify_due         # an event was pushed in this turn
    # state
    uint8_t draining
    uint8_t refusing            # the grace period is over
    uint8_t stopping
    uint8_t ended
    # hand-over. Frozen: nothing is in epoll, nothing is read, sent, connected or timed; commands are
    # executed, and what they queue waits in memory. An adopted world is frozen until it begins.
    uint64_t frozen             # which freeze it is, 0 = none; read by others with atomics
    uint64_t frozen_ns          # CLOCK_MONOTONIC when it was; of the process before, if adopted
    uint64_t stood_ms           # from when on its times stand still, 0 = they do not
    uint64_t thawed_ns
    uint8_t adopted             # it has not begun yet
    uint8_t saving              # asked for, not done
    uint8_t owed                # Owed
    uint8_t released            # another process's now: nothing is told, nothing counted
    # turns after a thaw in which nobody's time is up before what came meanwhile was read
    uint32_t catching_up
    SavedWorld saved
    uint64_t saved_ready        # stored when `saved` is whole: it is Python's then
    uint16_t first_generation
    uint64_t random
    uint64_t spin_ns
    # smoothed time between two wake-ups: spinning pays only while it is short
    uint64_t gap_ns
    uint64_t busy_ns            # when the last turn with events ended
    # watchdog: read and written with atomics
    uint64_t turn               # the turn that runs ...
    uint64_t awake              # ... 1 between wait and wait
    uint64_t seen_turn          # watchdog's own
    uint64_t stuck_ticks        # ... of 100 ms in which the same turn ran
    uint64_t stalls             # turns that ran for a tick or longer
    uint64_t stalled_ms         # longest stall not yet told to Python
    uint64_t pthread
    # dumps for the admin pages
    uint64_t dump_made
    Dump* dump                  # exchanged: whoever takes the pointer frees it

cdef struct ConnInfo:
    uint64_t handle
    uint8_t role
    uint8_t state
    uint8_t hold
    uint32_t listener
    uint32_t endpoint
    uint32_t in_flight
    uint32_t asked
    uint64_t queued_bytes
    uint32_t partial_bytes
    uint32_t age_ms
    uint32_t idle_ms
    uint32_t peer_size
    uint8_t peer[128]

cdef struct Dump:
    uint32_t count
    ConnInfo[1] rows            # `count` of them

cdef enum EventKind:
    EVENT_SNAPSHOT = 1
    EVENT_ENDPOINT_UP = 2
    EVENT_ENDPOINT_DOWN = 3
    EVENT_EJECTED = 4
    EVENT_RESTORED = 5
    EVENT_CLOSED = 6
    EVENT_REFUSED = 7
    EVENT_ACCEPT_PAUSED = 8
    EVENT_PARKED = 9
    EVENT_SAMPLE = 10
    EVENT_STALL = 11
    EVENT_DRAINED = 12
    EVENT_STOPPED = 13
    EVENT_FRAME = 14
    EVENT_OPENED = 15
    EVENT_GONE = 16
    EVENT_ANSWER = 17
    EVENT_GROUP = 18
    EVENT_FROZEN = 19
    EVENT_SAVED = 20
    EVENT_THAWED = 21

cdef enum CommandKind:
    COMMAND_PUBLISH = 1         # a = SnapshotData*
    COMMAND_LISTEN = 2          # a = listener id, b = fd (ours from now on)
    COMMAND_UNLISTEN = 3        # a = listener id
    COMMAND_DRAIN = 4
    COMMAND_ABORT = 5           # end of the grace period
    COMMAND_STOP = 6
    COMMAND_SEND = 7            # a = handle, payload = bytes
    COMMAND_CLOSE = 8           # a = handle
    # a = ticket, b = cluster id; c = 0 refuse, 1 its own cluster, 2 cluster b
    COMMAND_VERDICT = 9
    COMMAND_DUMP = 10
    COMMAND_STALL = 11          # test hook: a = ms
    COMMAND_FAIL_ALLOC = 12     # test hook: a = k
    COMMAND_REPLY = 13          # a = handle, b = 1: it may publish and be delivered to; payload = bytes
    COMMAND_CALL = 14           # a = handle, b = ticket, c = timeout ms, payload = request frame
    COMMAND_SUBSCRIBE = 15      # a = handle, payload = pairs of u32: group id, prefetch
    COMMAND_PEER_GROUPS = 16    # a = endpoint id, payload = u32 group ids
    COMMAND_FREEZE = 17
    COMMAND_SAVE = 18
    COMMAND_THAW = 19
    COMMAND_RELEASE = 20
    COMMAND_ACCEPT = 21         # a = 1: accept on every listener, 0: let connects wait in its backlog
