"""The message mesh's frames: what the engine reads of them, and the few that it makes itself.

They are Bolt frames (bolt.pxd) of class `fastmesh.push.v1`; everything that is read stands in the
header section and the content is never touched. docs/protocol/mesh-push.md is the specification.
Nothing here allocates, waits or keeps state; frames were scanned by the codec before.

A delivery on its way from mesh to mesh:
  scan -> push_read: op DELIVER -> the schedule names a peer -> push_forward_size, push_forward: a copy
  with op FORWARD, fm.hop 1 and our name -> the peer: push_read: op FORWARD, hop 1 -> push_as_deliver
  -> its client, who sees a delivery with fm.hop and fm.origin.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t

from .frame cimport Codec, FrameId, FrameView, Span

cdef enum PushOp:  # value of fm.op in a request
    OP_NONE = 0        # no push request: another class, a response, or fm.op is missing
    OP_HELLO = 1
    OP_SUBSCRIBE = 2
    OP_ANNOUNCE = 3
    OP_SUSPEND = 4
    OP_RESUME = 5
    OP_GOAWAY = 6
    OP_PUBLISH = 7
    OP_DELIVER = 8
    OP_CHECK = 9
    OP_FORWARD = 10
    OP_UNKNOWN = 11    # of a later version, or nonsense: answered "reject", never dropped

cdef enum PushResult:  # value of fm.result in a response
    RESULT_NONE = 0        # not said: the outcome is ambiguous (or it is no answer at all)
    RESULT_CONSUMED = 1    # the answerer took responsibility
    RESULT_LATER = 2       # not now: offer it again after fm.retry_ms
    RESULT_NO_CONSUMER = 3
    RESULT_REJECT = 4      # never: fm.reason says why
    RESULT_COMMIT = 5      # of a check, these three
    RESULT_ROLLBACK = 6
    RESULT_UNKNOWN = 7
    RESULT_OTHER = 8       # a word that we do not know

cdef enum:
    # Bit of FrameView.hint: the asker is a broker or a peer, not a client. The engine sets it on what
    # comes from them, so that PUSH.answer() knows whom it tells. Bits 0..1 are Bolt's, this one is free.
    PUSH_HINT_DELIVERY = 4
    PUSH_ANSWER_MAX = 256      # longest frame of push_answer() and of PUSH.answer()
    PUSH_REASON_MAX = 128      # bytes of fm.reason that fit into it; the rest is cut off
    PUSH_NODE_MAX = 64         # bytes of a node's name (limits.NAME_CHARS_MAX, ASCII)
    PUSH_HOP_MAX = 255         # forwards make 1; a counter that one byte holds leaves room to see others
    PUSH_RETRY_MS_MAX = 86400000   # a day, as all times that a peer may name

    PUSH_RETRY_UNREACHABLE_MS = 1000  # no broker can be reached: about one reconnect away
    PUSH_RETRY_OVERLOAD_MS = 100      # queues drain faster than that when they drain at all

cdef struct PushFields:
    uint8_t op             # PushOp; requests only
    uint8_t result         # PushResult; responses only
    uint8_t idempotent     # 1: a publish that may be sent to a second broker after a failure
    int32_t hop            # -1 absent; 0..PUSH_HOP_MAX: how often it was forwarded
    uint32_t retry_ms      # of "later", 0 absent; at most PUSH_RETRY_MS_MAX
    uint32_t op_at         # offset of fm.op's value in the frame: push_as_deliver() rewrites it there
    # Texts as they lie in the frame, valid as long as it; at = NULL when absent (an empty one is
    # there with size 0). Requests carry all of them, responses only id.
    Span topic             # a publish is routed by it
    Span group             # a delivery goes to its connections
    Span key               # of an ordered group: same key, same consumer
    Span colour            # these three: what scheduling rules match
    Span lane
    Span version
    Span origin            # node that forwarded it: one that meets its own name refuses
    Span id                # the message's own id, for samples and counters

# --- read -----------------------------------------------------------------------------------------

# One pass over the header section. 1: a push request (class and fm.op) or an answer (fm.result, of
# any class: libraries name it after the object that the handler returned). 0: neither, `out` says so
# (op OP_NONE, result RESULT_NONE). -1: the header section is malformed, or a number in it is no
# decimal number within its bounds; `out` must not be read. The first occurrence of a key wins, pairs
# with a null are passed over.
cdef int push_read(const FrameView* view, PushFields* out) noexcept nogil

# --- forward: mesh to mesh --------------------------------------------------------------------------

# Bytes of the frame that push_forward() would make of this delivery. 0: it cannot be forwarded (its
# header section would exceed 32767 bytes, `node` is no name of 1..PUSH_NODE_MAX bytes, or it is no
# delivery: a forward is never forwarded).
cdef uint32_t push_forward_size(const FrameView* view, const PushFields* fields,
                                const Span* node) noexcept nogil
# The whole new frame into `out`, which has push_forward_size() bytes: op "forward", fm.hop 1 and
# fm.origin in front of what was there (values of those two keys that it came with are left out),
# lengths and CRC right, same id.
cdef void push_forward(const FrameView* view, const PushFields* fields, const Span* node,
                       uint8_t* out) noexcept nogil
# op "forward" -> "deliver" in place, CRC right. `fields` are of this view and stay right but for op.
cdef void push_as_deliver(FrameView* view, const PushFields* fields) noexcept nogil

# --- answer -----------------------------------------------------------------------------------------

# A response of class fastmesh.push.v1 with fm.result (RESULT_CONSUMED .. RESULT_UNKNOWN),
# fm.retry_ms where the result is "later", and fm.reason where `reason` is not NULL; dialect, codec and
# switch of the frame that gave `hint`. Returns its size, at most PUSH_ANSWER_MAX.
cdef uint32_t push_answer(const FrameId* id, uint32_t hint, int result, uint32_t retry_ms,
                          const char* reason, uint8_t* out) noexcept nogil

# --- the codec "push" -------------------------------------------------------------------------------

# BOLT, but the route key is fm.topic and the mesh's own answers say fm.result where the outcome is
# certain. To a client that published: NO_ROUTE, UNDECODABLE reject; NO_ENDPOINT, CONNECT, OVERLOAD
# later; UPSTREAM_LOST, CLIENT_GONE, DEADLINE Bolt's own status without fm.result, because a broker may
# have the message. To a broker or peer that asked (PUSH_HINT_DELIVERY): NO_ROUTE no_consumer,
# UNDECODABLE reject, everything else later, because offering a message again is what they do then.
cdef Codec PUSH
