"""A world in a file: how one engine thread's state goes to another process, or comes from one.

save: world_freeze() takes every descriptor out of epoll; world_save() writes what the world holds into
a memfd and seals it; world_thaw() goes on. The world is the same after a save as before.
load: handover_verify() reads the whole blob without a world and believes nothing; handover_build()
makes connections, slots and queues of it. Only memory can fail then, and that is undone as a whole.

Layout: BlobHead, then records: a RecordHead, `fixed` bytes of the struct of that kind, `data` bytes
behind it, both padded to 8. A reader takes as many of the fixed bytes as it knows and reads the rest
as zero, so a field may be added at a struct's end when zero means what it meant before; a kind that
is added is RECORD_OPTIONAL if it may be passed over. Numbers are the machine's own: both processes
run on one host. Times are ages and remainders, descriptors are ordinals, pointers are ordinals of the
record that they point at (NONE = NULL) or handles. What can be counted is counted anew and stands
nowhere: gauges, queue lengths, credit in use, how many copies of a broadcast are open.

Records come in the order of their kinds; the slots of a connection and then its queue follow its
table (BLOB_SLOTS).

One request on its way: half of it is `part` of its client's BLOB_CONN. Whole and queued: BLOB_SLOT in
the table of the upstream (asker: the client's handle, orig: its id) and BLOB_ENTRY, which names slot
and link. Sent: BLOB_SLOT alone; the answer comes to the new process with the slot's id, is found by
index and generation and goes to the asker by its handle.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from .frame cimport Codec, FrameId
from .slots cimport Slot
from .world cimport Conn, Endpoint, Fan, Key, Link, Member, World

cdef enum:
    BLOB_VERSION = 1
    CODEC_NAME_BYTES = 24
    CODEC_STATE_MAX = 256     # bytes that codec.save() may need
    CODECS_MAX = 32           # that a process knows
    HEAD_BYTES_MIN = 64       # of BlobHead: what every version has
    BLOB_BYTES_MIN = 128
    CONNS_MAX = 1 << 22       # handles of one thread: more than descriptors can be had

cdef uint32_t NONE            # 0xffffffff: no such record, no descriptor

cdef enum BlobKind:
    BLOB_PROCESS = 1          # counters that belong to no row
    BLOB_ROW = 2
    BLOB_WORLD = 3
    BLOB_BUCKET = 4
    BLOB_INDEX = 5            # generations of all handles
    BLOB_ENDPOINT = 6
    BLOB_GROUP = 7
    BLOB_CONN = 8
    BLOB_LINK = 9
    BLOB_MEMBER = 10
    BLOB_KEY = 11
    BLOB_FAN = 12
    BLOB_SLOTS = 13           # then its slots in flight, newest first, then the others ...
    BLOB_SLOT = 14
    BLOB_ENTRY = 15           # ... then its queue, first to leave first
    BLOB_END = 16
    BLOB_KINDS = 17

cdef enum:
    RECORD_OPTIONAL = 1       # RecordHead.flags

cdef struct BlobHead:
    uint8_t magic[8]          # "fmworld\n"
    uint32_t version
    uint32_t head_bytes       # of this struct
    uint64_t bytes            # of the whole blob
    uint32_t crc              # CRC-32 of what follows the head, then of the head with this field 0
    uint32_t thread
    uint32_t threads          # of the process that wrote it
    uint32_t records          # BLOB_END included
    uint32_t conns
    uint32_t descriptors
    uint32_t links
    uint32_t members
    uint32_t keys
    uint32_t fans
    uint64_t limits_mark      # hash of the limits that its timers were set by
    uint64_t frozen_at_ns     # CLOCK_MONOTONIC

cdef struct RecordHead:
    uint16_t kind
    uint16_t flags
    uint32_t fixed
    uint64_t data

cdef struct BlobProcess:      # data: counters, hop sums, hop buckets, u64 each
    uint32_t counters
    uint32_t hops
    uint32_t buckets          # of each hop
    uint32_t pad

cdef struct BlobRow:          # data: counters, latency buckets, u64 each; gauges are not read
    uint32_t row
    uint32_t counters
    uint32_t latencies
    uint32_t pad

cdef struct BlobWorld:
    uint64_t tickets
    uint64_t sample_count

cdef struct BlobBucket:
    uint32_t row
    uint32_t pad
    uint64_t tokens_micro
    uint64_t filled_age_ns

cdef struct BlobIndex:        # data: u32 generation of each index
    uint32_t high
    uint32_t pad

cdef struct BlobEndpoint:     # data: u32 ids of the groups that live there, ascending
    uint32_t id
    uint32_t cluster
    uint32_t row
    uint32_t live_groups
    uint8_t codec[24]         # of its cluster, likewise the next two
    uint8_t binding
    uint8_t kind
    uint8_t ever_up
    uint8_t pad[5]
    uint32_t pad2
    uint32_t address_size
    uint8_t address[128]
    uint32_t failures
    uint32_t ejections
    uint64_t retry_in_ms
    uint64_t ejected_for_ms   # 0 = not ejected
    uint64_t ramp_age_ms      # + 1; 0 = at full weight
    uint64_t backoff_step

cdef struct BlobGroup:        # data: u32 totals, i32 owed, u8 here: see Share
    uint32_t id
    uint32_t rules
    uint32_t entries
    uint32_t has_share
    uint64_t layout
    uint64_t last
    uint32_t part
    uint32_t pad
    uint64_t turns

cdef struct BlobConn:         # data: codec state, then the half frame
    uint32_t index
    uint32_t generation
    uint32_t descriptor       # NONE: still connecting, or left behind
    uint32_t source           # listener or endpoint id
    uint32_t row
    uint32_t state_bytes
    uint32_t part_bytes
    uint32_t stream_row
    uint8_t codec[24]
    uint8_t role
    uint8_t state
    uint8_t hold
    uint8_t kind
    uint8_t spoke
    uint8_t greeted
    uint8_t told              # Python waits to hear of its end
    uint8_t left              # it stayed behind: lost, for whoever reads this
    uint8_t lingering
    uint8_t close_reason
    uint8_t cut_through
    uint8_t dialect
    uint8_t blocked
    uint8_t streaming
    uint8_t stream_block
    uint8_t answer_open
    uint64_t owner            # handles
    uint64_t last_client
    uint64_t stream_to
    uint64_t opened_age_ms
    uint64_t read_age_ms
    uint64_t wrote_age_ms
    uint64_t blocked_age_ms
    uint64_t began_age_ms     # of the half frame, + 1; 0 = none
    uint64_t heartbeat_age_ms
    uint64_t linger_in_ms
    uint64_t timer_in_ms      # + 1; 0 = look at once

cdef struct BlobLink:
    uint32_t conn             # NONE: its client has gone, entries have not
    uint32_t cluster
    uint64_t upstream         # handle
    uint32_t flow
    uint32_t pad
    uint64_t pause_in_ms

cdef struct BlobMember:
    uint32_t conn             # NONE, and no group: it left, deliveries have not
    uint32_t group
    uint32_t prefetch
    uint32_t pad
    uint64_t turn

cdef struct BlobKey:
    uint32_t group            # NONE: it has ended
    uint32_t member           # NONE: at `endpoint`
    uint64_t hash
    uint32_t endpoint
    uint32_t pad

cdef struct BlobFan:
    uint64_t asker            # handle
    FrameId orig
    uint32_t hint
    uint8_t later
    uint8_t consumed
    uint8_t silent
    uint8_t pad

cdef struct BlobSlots:        # data: free slots as BlobFree, next to be used first; u16 order of answers
    uint32_t conn
    uint32_t pages
    uint32_t free
    uint32_t order
    uint32_t heartbeat        # index + 1 of the slot of our unanswered heartbeat, 0 = none
    uint32_t pad

cdef struct BlobFree:
    uint16_t index
    uint16_t generation
    uint16_t last_cause

cdef struct BlobSlot:         # data: u32 ids of the endpoints that may take it, then the copy
    uint16_t index
    uint16_t generation
    uint8_t state
    uint8_t rest_cause
    uint8_t last_cause
    uint8_t tries
    uint8_t sampled
    uint8_t block
    uint16_t cluster
    uint32_t hint
    uint32_t row
    uint32_t bytes
    FrameId orig
    uint32_t pad
    uint64_t asker            # handle, 0 = the mesh itself
    uint64_t timer_in_ms      # + 1; 0 = none
    uint64_t received_age_ns  # + 1; 0 = not said
    uint64_t sent_age_ns      # + 1; 0 = not sent yet
    # what it is besides
    uint8_t delivery          # DeliveryKind + 1, 0 = nothing
    uint8_t limited           # only these endpoints, if any
    uint16_t only             # how many ids
    uint32_t copy_bytes
    uint32_t group
    uint32_t member
    uint32_t key
    uint32_t fan
    uint64_t ticket           # DELIVERY_CALL
    uint64_t trace

cdef struct BlobEntry:        # data: u32 ids of the endpoints that may take it, then the bytes left
    uint32_t size
    uint32_t row
    uint32_t link
    uint32_t slot             # index + 1, 0 = none
    uint8_t kind
    uint8_t block
    uint8_t begun
    uint8_t tries
    uint8_t limited
    uint8_t pad
    uint16_t only
    uint64_t received_age_ns  # + 1; 0 = no hop to measure

# --- the side that gives ------------------------------------------------------------------------------

# Everything out of epoll. Nothing is doomed or dirty, and nothing lies in the read area. `number`:
# what World.frozen becomes.
cdef void world_freeze(World* w, uint64_t number) noexcept nogil
# Everything into epoll again; times of silence are moved by how long it stood. Also how an adopted
# world begins.
cdef void world_thaw(World* w) noexcept nogil
# Of a frozen world with nothing untold, doomed or dirty. Fills w.saved: descriptor, counts, or errno.
cdef void world_save(World* w) noexcept nogil
# What a save left and nobody fetched.
cdef void saved_drop(World* w) noexcept nogil

# --- the side that takes ------------------------------------------------------------------------------

cdef struct SeenConn:         # what verifying must remember of a connection
    uint32_t index
    uint32_t generation
    uint8_t role
    uint8_t kind
    uint8_t plain             # its codec patches in place and keeps no state
    uint8_t by_order
    const Codec* codec

cdef struct Tally:            # of a blob that was verified
    uint64_t need             # bytes of memory
    uint32_t downstream
    uint32_t upstream
    uint32_t left
    uint32_t requests
    uint32_t pushes
    uint32_t resting
    uint64_t queued_bytes
    uint64_t partial_bytes

cdef struct Load:
    const uint8_t* blob
    uint64_t size
    BlobHead head
    const Codec* codecs[32]
    uint32_t codecs_count
    # what is wrong, and where; NULL = nothing
    const char* wrong
    uint64_t at
    Tally tally
    # tables of verifying; freed by load_end()
    SeenConn* seen
    uint32_t seen_count
    uint32_t* ordinal_of      # by index, NONE = nobody
    const uint32_t* generations
    uint32_t high
    uint8_t* fd_seen
    uint32_t fds_seen
    uint8_t* endpoint_seen    # by id
    uint32_t links_count
    uint32_t members_count
    uint32_t keys_count
    uint32_t fans_count
    uint8_t* link_orphan
    uint32_t* link_used
    uint32_t* key_member
    uint32_t* key_used
    uint32_t* fan_used
    # the table being read
    uint32_t table_of         # its connection
    uint8_t* slot_seen        # by index
    uint32_t slots_count
    uint32_t slots_left       # not described yet
    const uint8_t* order
    uint32_t order_count
    uint32_t heartbeat
    uint32_t ours             # slots in flight that nobody asked for
    bint first_entry
    # what is built
    World* w
    bint same_limits
    bint named                # handles are translated
    uint32_t built            # connections
    Conn* on                  # whose table it is
    Slot** flying_tail
    bint merged               # into a world that has connections of its own: with other handles
    const int* fds
    Conn** conns
    Link** links
    Member** members
    Key** keys
    Fan** fans
    Endpoint** gone           # endpoints that the snapshot does not know
    uint32_t gone_count

# 0, or -1: `wrong` says what, at byte `at` (ValueError), or is NULL: no memory for the tables.
cdef int handover_verify(Load* load) noexcept nogil
# Of a verified blob, into a frozen world. 0, or -1: no memory, and the world is as it was but for its
# counters: its engine can only be dropped.
cdef int handover_build(Load* load) noexcept nogil
cdef void load_end(Load* load) noexcept nogil

# For Python: map a sealed memfd and verify it. ValueError, MemoryError, OSError; blob_close() in any case.
cdef int blob_open(Load* load, int memfd) except -1
cdef int blob_verify(Load* load) except -1
cdef void blob_close(Load* load) noexcept
