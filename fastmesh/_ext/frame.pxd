"""The codec contract: one struct that every codec fills and the engine understands.

A codec is a table of native functions over bytes. It touches no socket, no clock, no log, no
policy, and
keeps nothing but the state it declares. The engine calls codecs; codecs call nothing.

One frame on its way (Bolt request, client -> upstream):
  scan(bytes) -> FrameView{kind REQUEST, id 17, size 300, timeout 3000}
  service(view) -> "com.example.Order:1.0" -> the snapshot's first matching rule -> cluster ->
  endpoint
  slot taken on the upstream connection; its id replaces 17: patch(view, id) (CRC follows by its
  delta)
  the frame, whole, joins the upstream's write queue and leaves with the flush at the end of the
  turn
and back: scan -> RESPONSE with the slot's id -> slot found -> patch(view, 17) -> the client's write
queue.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum ParseStatus:
    # `FrameView` describes one whole frame (or one part of it, codecs with VIEW_PARTS)
    PARSE_OK = 0
    # a legal prefix; `view.need` = bytes from the frame's start that are surely needed
    PARSE_NEED_MORE = 1
    PARSE_MALFORMED = 2  # can never become legal; `view.error` says why, the connection is closed

cdef enum FrameKind:
    FRAME_NONE = 0
    FRAME_REQUEST = 1        # two-way: exactly one answer is owed
    FRAME_ONEWAY = 2         # no answer exists
    FRAME_RESPONSE = 3
    FRAME_HEARTBEAT = 4      # answered locally, never forwarded
    FRAME_HEARTBEAT_ACK = 5
    FRAME_GOAWAY = 6         # the sender takes no new requests on this connection

cdef enum FrameFlag:
    FLAG_FIRST = 1        # whole frames carry FIRST and LAST
    FLAG_LAST = 2
    # PARSE_MALFORMED only: kind, id and hint are sound, so the sender can be told
    FLAG_ANSWERABLE = 4

cdef enum FrameError:  # why a frame is malformed; one counter label each, in this order
    ERROR_NONE = 0
    ERROR_PROTOCOL = 1    # first byte (or version) of no protocol we speak on this port
    ERROR_TYPE = 2        # unknown frame type
    ERROR_COMMAND = 3     # unknown command code
    ERROR_LENGTH = 4      # a length outside its legal range (Bolt: >= 0x8000 in a signed field)
    ERROR_TOO_LARGE = 5   # longer than the limit
    ERROR_CHECKSUM = 6    # the id cannot be trusted: never answerable
    ERROR_HEADERS = 7     # the header section does not parse
    ERROR_COUNT = 8

cdef enum Cause:  # why the mesh answers in place of the upstream; also the `cause` label of metrics
    CAUSE_NONE = 0
    CAUSE_NO_ROUTE = 1
    CAUSE_NO_ENDPOINT = 2
    CAUSE_OVERLOAD = 3
    CAUSE_CONNECT = 4        # every endpoint tried refused or timed out
    CAUSE_UPSTREAM_LOST = 5  # the connection that carried the request closed before the answer
    CAUSE_CLIENT_GONE = 6    # nobody left to answer (requests), or the asked client left (pushes)
    CAUSE_UNDECODABLE = 7
    CAUSE_COUNT = 8
    CAUSE_DEADLINE = 8       # not "failed" but "expired" in the ledger

cdef enum CodecTrait:
    CORRELATE_BY_ID = 0      # an answer names its request
    CORRELATE_BY_CHANNEL = 1
    CORRELATE_BY_ORDER = 2   # the nth answer belongs to the nth request of that connection
    CORRELATE_NONE = 3
    ROW_UNTIL_ANSWER = 0     # a slot lives until its answer ...
    ROW_UNTIL_CLOSE = 1      # ... or until its channel closes
    ID_32 = 0
    ID_16 = 1
    ID_TEXT = 2              # decimal text: rewriting it changes the frame's length
    VIEW_WHOLE = 0
    VIEW_PARTS = 1           # scan(parts=1) may return FIRST, middle and LAST parts of one frame
    PATCH_IN_PLACE = 0
    PATCH_SEGMENTS = 1       # up to three segments

# Longest decimal id that is carried; a longer one is ERROR_LENGTH.
cdef enum:
    ID_TEXT_MAX = 15

cdef enum:
    DIALECT_NONE = 255

cdef struct FrameId:
    # The id as its sender wrote it. `text_size` 0 means numeric.
    uint32_t number
    uint8_t text_size
    uint8_t text[15]

cdef struct Span:
    const uint8_t* at
    uint32_t size

cdef struct Limits:
    # The part of the configured limits that a codec must know, checked before anything is
    # allocated.
    uint32_t frame_bytes_max

cdef struct FrameView:
    uint8_t* data            # first byte of the frame; valid until the end of the turn
    uint32_t size            # bytes of the frame (or part)
    # PARSE_NEED_MORE: total bytes from `data` that are surely needed, > bytes given
    # Which of its versions the protocol is spoken in here (Bolt: 0 v1, 1 v2, 2 v2 with ver1 = 2). Some
    # servers answer everything in the dialect of a connection's first frame (SOFABolt 1.6), so a shared
    # upstream connection carries one only.
    uint8_t dialect
    uint32_t need
    uint8_t kind             # FrameKind
    uint8_t flags            # FrameFlag
    uint8_t error            # FrameError, when PARSE_MALFORMED
    uint32_t id_at           # offset of the id field
    FrameId id
    # codec-private 32 bits: all that answer() needs to know of a request later
    uint32_t hint
    int32_t timeout_ms       # as on the wire: <= 0 means "none given"
    uint16_t status          # responses: the protocol's own status, 0 = success
    uint32_t class_at        # class section (Bolt); 0-size where the protocol has none
    uint32_t class_size
    uint32_t headers_at      # header section
    uint32_t headers_size
    uint32_t checksum_at     # 0 = none

ctypedef struct Codec:
    const char* name
    uint8_t correlation      # CodecTrait, one per line of the contract's table
    uint8_t row_lifetime
    uint8_t id_width
    uint8_t view
    uint8_t patch_kind
    uint32_t state_bytes     # per-connection state, 0 = none; zero-filled at start
    uint32_t answer_bytes_max  # longest answer()/heartbeat()/heartbeat_ack()

    # Describe the frame that starts at `data`. `n` >= 0 bytes are there. Never reads past
    # data[n-1], never
    # allocates. `parts` != 0: VIEW_PARTS codecs may return a frame in parts. PARSE_OK sets
    # everything above.
    ParseStatus (*scan)(void* state, uint8_t* data, size_t n, const Limits* limits, int parts,
                        FrameView* view) noexcept nogil
    # The route key, read in place: 1 found, 0 absent, -1 header section malformed.
    int (*service)(const FrameView* view, Span* found) noexcept nogil
    # First header `key`, case-sensitive: 1 found, 0 absent, -1 malformed.
    int (*header)(const FrameView* view, const uint8_t* key, uint32_t key_size, Span* found) noexcept nogil
    # Replace the id. PATCH_IN_PLACE: changes view.data, returns 1 and out[0] = the frame.
    # PATCH_SEGMENTS: returns 1..3 segments; `scratch` (32 bytes) may hold the new id and must
    # outlive them.
    int (*patch)(FrameView* view, const FrameId* id, uint8_t* scratch, Span* out) noexcept nogil
    # The mesh's own answer to a request of that id and hint. Returns its length in `out`.
    uint32_t (*answer)(const FrameId* id, uint32_t hint, int cause, uint8_t* out) noexcept nogil
    # Our heartbeat towards an upstream, and the answer to somebody else's.
    uint32_t (*heartbeat)(const FrameId* id, int dialect, uint8_t* out) noexcept nogil
    uint32_t (*heartbeat_ack)(const FrameView* view, uint8_t* out) noexcept nogil
    # Per-connection state for the hand-over: bytes written / read, -1 = does not fit or is not
    # ours.
    int (*save)(const void* state, uint8_t* out, size_t room) noexcept nogil
    int (*load)(void* state, const uint8_t* data, size_t n) noexcept nogil
