"""SOFA Bolt v1 and v2: frame bounds, route key, id in place, and the frames that the mesh makes.

Field offsets are in bolt.pxd. Fields are judged in the order of the wire, each one as soon as its
last byte is there, and the first that is wrong decides:

  proto, ver1        ERROR_PROTOCOL   ver1 is 1 or 2: a Java decoder frames no other
  type               ERROR_TYPE
  cmdcode            ERROR_COMMAND    also of a pair that no sender uses: a oneway heartbeat
  switch             ERROR_PROTOCOL   outside 0..127, where Java throws
  the three lengths  ERROR_LENGTH     negative as a signed field: Java and JS read them so
  their sum          ERROR_TOO_LARGE  the fixed header and the trailer count
  CRC                ERROR_CHECKSUM   only when the frame is whole

A two-way request that fails on its lengths is answerable: its id was read before them. Of what is
not answerable, and of an unfinished frame, nothing but the error or the need is told.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport UINT32_MAX, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from .bytes cimport get16, get32, memcmp, memcpy, memset, put16, put32
from .crc32 cimport crc32_of, crc32_patch
from .frame cimport (
    CAUSE_CLIENT_GONE,
    CAUSE_CONNECT,
    CAUSE_DEADLINE,
    CAUSE_NO_ENDPOINT,
    CAUSE_NO_ROUTE,
    CAUSE_OVERLOAD,
    CAUSE_UNDECODABLE,
    CAUSE_UPSTREAM_LOST,
    CORRELATE_BY_ID,
    ERROR_CHECKSUM,
    ERROR_COMMAND,
    ERROR_LENGTH,
    ERROR_PROTOCOL,
    ERROR_TOO_LARGE,
    ERROR_TYPE,
    FLAG_ANSWERABLE,
    FLAG_FIRST,
    FLAG_LAST,
    FRAME_GOAWAY,
    FRAME_HEARTBEAT,
    FRAME_HEARTBEAT_ACK,
    FRAME_NONE,
    FRAME_ONEWAY,
    FRAME_REQUEST,
    FRAME_RESPONSE,
    ID_32,
    PARSE_MALFORMED,
    PARSE_NEED_MORE,
    PARSE_OK,
    PATCH_IN_PLACE,
    ROW_UNTIL_ANSWER,
    VIEW_WHOLE,
    FrameId,
    FrameView,
    Limits,
    ParseStatus,
    Span,
)

from collections import namedtuple
from time import perf_counter_ns

cdef enum:
    TYPE_RESPONSE = 0
    TYPE_REQUEST = 1
    TYPE_ONEWAY = 2

    VER2 = 1  # of the frames that the mesh makes
    SWITCH_MAX = 127
    SIGNED32_MAX = 0x7FFFFFFF
    HEARTBEAT_TIMEOUT_MS = 3000  # what sofa-bolt-node sends; no peer that was read looks at it
    MADE_MAX = 26                # v2 response header and trailer

    STATUS_SUCCESS = 0
    STATUS_UNKNOWN = 3
    STATUS_BUSY = 4              # SERVER_THREADPOOL_BUSY
    STATUS_NO_PROCESSOR = 6
    STATUS_TIMEOUT = 7
    STATUS_CODEC_EXCEPTION = 9
    STATUS_CONNECTION_CLOSED = 16


cdef inline uint8_t kind_of(uint8_t type, uint16_t cmd) noexcept nogil:
    if type == TYPE_REQUEST:
        if cmd == CMD_REQUEST:
            return FRAME_REQUEST
        if cmd == CMD_HEARTBEAT:
            return FRAME_HEARTBEAT
    elif type == TYPE_RESPONSE:
        if cmd == CMD_RESPONSE:
            return FRAME_RESPONSE
        if cmd == CMD_HEARTBEAT:
            return FRAME_HEARTBEAT_ACK
    elif cmd == CMD_REQUEST:
        return FRAME_ONEWAY
    if cmd == CMD_GOAWAY and type != TYPE_RESPONSE:
        return FRAME_GOAWAY
    return FRAME_NONE


cdef inline ParseStatus need_more(FrameView* view, uint8_t* data, size_t size) noexcept nogil:
    memset(view, 0, sizeof(FrameView))
    view.data = data
    view.need = <uint32_t>size
    return PARSE_NEED_MORE


cdef inline ParseStatus malformed(FrameView* view, uint8_t* data, int error) noexcept nogil:
    memset(view, 0, sizeof(FrameView))
    view.data = data
    view.error = <uint8_t>error
    return PARSE_MALFORMED


cdef inline ParseStatus refused(FrameView* view, int error) noexcept nogil:
    """Malformed, but a sender that waits for an answer can have one."""
    if view.kind != FRAME_REQUEST:
        return malformed(view, view.data, error)
    view.error = <uint8_t>error
    view.flags = FLAG_ANSWERABLE
    view.checksum_at = 0
    return PARSE_MALFORMED


cdef ParseStatus scan_frame(void* state, uint8_t* data, size_t n, const Limits* limits, int parts,
                            FrameView* view) noexcept nogil:
    cdef uint8_t proto, type
    cdef uint8_t kind
    cdef uint8_t ver1 = 0
    cdef uint8_t switches = 0
    cdef uint32_t class_size, headers_size, content_size
    cdef size_t head, at, checked
    cdef uint64_t total
    if n < 1:
        return need_more(view, data, 20)
    proto = data[0]
    if proto != 1 and proto != 2:
        return malformed(view, data, ERROR_PROTOCOL)
    head = 18 + 2 * <size_t>proto  # a response's, the shortest
    if proto == 2:
        if n < 2:
            return need_more(view, data, head)
        ver1 = data[1]
        if ver1 != 1 and ver1 != 2:
            return malformed(view, data, ERROR_PROTOCOL)
    at = proto  # the type follows proto and ver1
    if n < at + 1:
        return need_more(view, data, head)
    type = data[at]
    if type > TYPE_ONEWAY:
        return malformed(view, data, ERROR_TYPE)
    if type != TYPE_RESPONSE:
        head += 2
    if n < at + 3:
        return need_more(view, data, head)
    kind = kind_of(type, get16(data + at + 1))
    if kind == FRAME_NONE:
        return malformed(view, data, ERROR_COMMAND)
    if proto == 2:
        if n < 12:
            return need_more(view, data, head)
        switches = data[11]
        if switches > SWITCH_MAX:
            return malformed(view, data, ERROR_PROTOCOL)

    # Lengths are the last eight bytes of the fixed header. With the first of them the id is there
    # too.
    checked = head - 8
    if n < checked + 2:
        return need_more(view, data, head)
    memset(view, 0, sizeof(FrameView))
    view.data = data
    view.kind = kind
    view.dialect = ver1
    view.id_at = <uint32_t>(at + 4)
    view.id.number = get32(data + at + 4)
    view.hint = (proto | (<uint32_t>ver1 << HINT_VER1) | (<uint32_t>data[at + 8] << HINT_CODEC)
                 | (<uint32_t>switches << HINT_SWITCH))
    class_size = get16(data + checked)
    if class_size > SIGNED16_MAX:
        return refused(view, ERROR_LENGTH)
    if n < checked + 4:
        return need_more(view, data, head)
    headers_size = get16(data + checked + 2)
    if headers_size > SIGNED16_MAX:
        return refused(view, ERROR_LENGTH)
    if n < head:
        return need_more(view, data, head)
    content_size = get32(data + checked + 4)
    if content_size > SIGNED32_MAX:
        return refused(view, ERROR_LENGTH)
    total = <uint64_t>head + class_size + headers_size + content_size
    if ver1 == 2 and switches & SWITCH_CRC:
        view.checksum_at = <uint32_t>total
        total += TRAILER_SIZE
    if total > limits.frame_bytes_max:
        return refused(view, ERROR_TOO_LARGE)
    if n < total:
        return need_more(view, data, total)

    if view.checksum_at and crc32_of(0, data, view.checksum_at) != get32(data + view.checksum_at):
        return malformed(view, data, ERROR_CHECKSUM)
    if type == TYPE_RESPONSE:
        view.status = get16(data + checked - 2)
    else:
        view.timeout_ms = <int32_t>get32(data + checked - 4)
    view.size = <uint32_t>total
    view.flags = FLAG_FIRST | FLAG_LAST
    view.class_at = <uint32_t>head
    view.class_size = class_size
    view.headers_at = <uint32_t>head + class_size
    view.headers_size = headers_size
    return PARSE_OK


cdef int find_service(const FrameView* view, Span* found) noexcept nogil:
    """First `service`, else first `sofa_head_target_service`.

    One pass that ends at the first `service`: damage after it is not looked for. A pair with a
    null says nothing and is passed over.
    """
    cdef const uint8_t* at = view.data + view.headers_at
    cdef const uint8_t* end = at + view.headers_size
    cdef Span key, value
    cdef int got
    cdef int second = 0
    found.at = NULL
    found.size = 0
    while at < end:
        got = next_pair(&at, end, &key, &value)
        if got < 0:
            return -1
        if got == 0:
            continue
        if key.size == 7 and memcmp(key.at, b"service", 7) == 0:
            found[0] = value
            return 1
        if key.size == 24 and not second and memcmp(key.at, b"sofa_head_target_service", 24) == 0:
            found[0] = value
            second = 1
    return second


cdef int find_header(const FrameView* view, const uint8_t* name, uint32_t name_size,
                     Span* found) noexcept nogil:
    cdef const uint8_t* at = view.data + view.headers_at
    cdef const uint8_t* end = at + view.headers_size
    cdef Span key
    cdef int got
    while at < end:
        got = next_pair(&at, end, &key, found)
        if got < 0:
            return -1
        if got and key.size == name_size and memcmp(key.at, name, name_size) == 0:
            return 1
    found.at = NULL
    found.size = 0
    return 0


cdef int patch_id(FrameView* view, const FrameId* id, uint8_t* scratch, Span* out) noexcept nogil:
    cdef uint8_t* at = view.data + view.id_at
    cdef uint8_t* crc
    if view.checksum_at:
        crc = view.data + view.checksum_at
        put32(crc, crc32_patch(get32(crc), get32(at), id.number,
                               view.checksum_at - view.id_at - 4))
    put32(at, id.number)
    out.at = view.data
    out.size = view.size
    return 1


cdef uint32_t write_response_head(uint32_t id, uint32_t hint, uint16_t cmd, uint16_t status,
                                  uint32_t class_size, uint32_t headers_size, uint32_t content_size,
                                  uint8_t* out) noexcept nogil:
    cdef uint8_t proto = hint & HINT_PROTO
    cdef uint8_t* at = out
    at[0] = proto
    at += 1
    if proto == 2:
        at[0] = (hint >> HINT_VER1) & 255
        at += 1
    at[0] = TYPE_RESPONSE
    put16(at + 1, cmd)
    at[3] = VER2
    put32(at + 4, id)
    at[8] = (hint >> HINT_CODEC) & 255
    at += 9
    if proto == 2:
        at[0] = <uint8_t>(hint >> HINT_SWITCH)
        at += 1
    put16(at, status)
    put16(at + 2, <uint16_t>class_size)
    put16(at + 4, <uint16_t>headers_size)
    put32(at + 6, content_size)
    return <uint32_t>(at + 10 - out)


cdef bint has_trailer(uint32_t hint) noexcept nogil:
    return (hint >> HINT_VER1) & 255 == 2 and (hint >> HINT_SWITCH) & SWITCH_CRC


cdef uint32_t write_trailer(uint8_t* frame, uint32_t size, uint32_t hint) noexcept nogil:
    if not has_trailer(hint):
        return size
    put32(frame + size, crc32_of(0, frame, size))
    return size + TRAILER_SIZE


cdef uint32_t write_response(uint32_t id, uint32_t hint, uint16_t cmd, uint16_t status,
                             uint8_t* out) noexcept nogil:
    """A response without payload."""
    cdef uint32_t size = write_response_head(id, hint, cmd, status, 0, 0, 0, out)
    return write_trailer(out, size, hint)


cdef uint32_t write_answer(const FrameId* id, uint32_t hint, int cause,
                           uint8_t* out) noexcept nogil:
    cdef uint16_t status
    if cause == CAUSE_NO_ROUTE or cause == CAUSE_NO_ENDPOINT or cause == CAUSE_CONNECT:
        status = STATUS_NO_PROCESSOR
    elif cause == CAUSE_OVERLOAD:
        status = STATUS_BUSY
    elif cause == CAUSE_DEADLINE:
        status = STATUS_TIMEOUT
    elif cause == CAUSE_UPSTREAM_LOST or cause == CAUSE_CLIENT_GONE:
        status = STATUS_CONNECTION_CLOSED
    elif cause == CAUSE_UNDECODABLE:
        status = STATUS_CODEC_EXCEPTION
    else:
        status = STATUS_UNKNOWN  # as mosn does for anything else
    return write_response(id.number, hint, CMD_RESPONSE, status, out)


cdef uint32_t write_heartbeat(const FrameId* id, int dialect, uint8_t* out) noexcept nogil:
    """In the dialect of the connection; v1 is byte for byte the heartbeat of sofa-bolt-node."""
    cdef uint8_t* at = out
    at[0] = 1 if dialect == 0 else 2
    at += 1
    if dialect:
        at[0] = <uint8_t>dialect
        at += 1
    at[0] = TYPE_REQUEST
    put16(at + 1, CMD_HEARTBEAT)
    at[3] = VER2
    put32(at + 4, id.number)
    at[8] = CODEC_HESSIAN
    at += 9
    if dialect:
        at[0] = 0    # switch: Java puts no checksum on heartbeats either
        at += 1
    put32(at, HEARTBEAT_TIMEOUT_MS)
    memset(at + 4, 0, 8)
    return <uint32_t>(at + 12 - out)


cdef uint32_t write_heartbeat_ack(const FrameView* view, uint8_t* out) noexcept nogil:
    return write_response(view.id.number, view.hint, CMD_HEARTBEAT, STATUS_SUCCESS, out)


cdef int save_state(const void* state, uint8_t* out, size_t room) noexcept nogil:
    return 0


cdef int load_state(void* state, const uint8_t* data, size_t n) noexcept nogil:
    return 0 if n == 0 else -1


BOLT.name = b"bolt"
BOLT.correlation = CORRELATE_BY_ID
BOLT.row_lifetime = ROW_UNTIL_ANSWER
BOLT.id_width = ID_32
BOLT.view = VIEW_WHOLE
BOLT.patch_kind = PATCH_IN_PLACE
BOLT.state_bytes = 0
BOLT.answer_bytes_max = MADE_MAX
BOLT.scan = scan_frame
BOLT.service = find_service
BOLT.header = find_header
BOLT.patch = patch_id
BOLT.answer = write_answer
BOLT.heartbeat = write_heartbeat
BOLT.heartbeat_ack = write_heartbeat_ack
BOLT.save = save_state
BOLT.load = load_state


def capsule() -> object:
    return PyCapsule_New(<void*>&BOLT, "fastmesh.codec", NULL)


# ------------------------------------------------------- the face for tests, fuzzing and benchmarks

Scan = namedtuple(
    "Scan",
    "outcome kind id need size error answerable hint timeout_ms status"
    " id_at class_at class_size headers_at headers_size checksum_at",
)
cdef tuple OUTCOMES = ("ok", "need_more", "malformed")
cdef tuple KINDS = (None, "request", "oneway", "response", "heartbeat", "heartbeat_ack", "goaway")
cdef tuple ERRORS = (None, "protocol", "type", "command", "length", "too_large", "checksum",
                     "headers")
cdef dict CAUSES = {
    "no_route": CAUSE_NO_ROUTE,
    "no_endpoint": CAUSE_NO_ENDPOINT,
    "overload": CAUSE_OVERLOAD,
    "connect": CAUSE_CONNECT,
    "upstream_lost": CAUSE_UPSTREAM_LOST,
    "client_gone": CAUSE_CLIENT_GONE,
    "undecodable": CAUSE_UNDECODABLE,
    "deadline": CAUSE_DEADLINE,
}


cdef class Copy:
    def __cinit__(self, data: bytes):
        self.size = PyBytes_GET_SIZE(data)
        self.data = <uint8_t*>malloc(self.size)
        if self.data == NULL and self.size:
            raise MemoryError
        memcpy(self.data, PyBytes_AS_STRING(data), self.size)

    def __dealloc__(self):
        free(self.data)

    cdef ParseStatus scan(self, uint32_t frame_bytes_max) noexcept:
        cdef Limits limits
        limits.frame_bytes_max = frame_bytes_max
        return BOLT.scan(NULL, self.data, self.size, &limits, 0, &self.view)


cdef Copy whole(bytes data):
    cdef Copy copy = Copy(data)
    if copy.scan(UINT32_MAX) != PARSE_OK:
        raise ValueError("not a whole frame")
    return copy


cdef bytes taken(const Span* span):
    return PyBytes_FromStringAndSize(<const char*>span.at, span.size)


def scan(data: bytes, frame_bytes_max: int = 4194304) -> object:
    cdef Copy copy = Copy(data)
    cdef ParseStatus outcome = copy.scan(frame_bytes_max)
    cdef FrameView* v = &copy.view
    return Scan(
        OUTCOMES[<int>outcome], KINDS[v.kind], v.id.number, v.need, v.size, ERRORS[v.error],
        v.flags & FLAG_ANSWERABLE != 0, v.hint, v.timeout_ms, v.status,
        v.id_at, v.class_at, v.class_size, v.headers_at, v.headers_size, v.checksum_at,
    )


def service(data: bytes) -> bytes | None:
    cdef Copy copy = whole(data)
    cdef Span found
    cdef int got = BOLT.service(&copy.view, &found)
    if got < 0:
        raise ValueError("headers")
    return taken(&found) if got else None


def header(data: bytes, key: bytes) -> bytes | None:
    cdef Copy copy = whole(data)
    cdef Span found
    cdef int got = BOLT.header(&copy.view, <const uint8_t*>PyBytes_AS_STRING(key),
                               <uint32_t>PyBytes_GET_SIZE(key), &found)
    if got < 0:
        raise ValueError("headers")
    return taken(&found) if got else None


def patch(data: bytes, new_id: int) -> bytes:
    cdef Copy copy = whole(data)
    cdef FrameId id
    cdef Span out
    id.number = new_id
    id.text_size = 0
    BOLT.patch(&copy.view, &id, NULL, &out)
    return taken(&out)


def answer(id: int, hint: int, cause: str) -> bytes:
    cdef uint8_t out[MADE_MAX]
    cdef FrameId asked
    asked.number = id
    asked.text_size = 0
    return out[:BOLT.answer(&asked, hint, CAUSES[cause], out)]


def heartbeat(id: int, dialect: int = 0) -> bytes:
    cdef uint8_t out[MADE_MAX]
    cdef FrameId ours
    ours.number = id
    ours.text_size = 0
    return out[:BOLT.heartbeat(&ours, dialect, out)]


def heartbeat_ack(data: bytes) -> bytes:
    cdef Copy copy = whole(data)
    cdef uint8_t out[MADE_MAX]
    return out[:BOLT.heartbeat_ack(&copy.view, out)]


def state_survives() -> bool:
    """Whether the empty state saves as nothing and loads from nothing only."""
    cdef uint8_t one = 0
    return (BOLT.save(NULL, NULL, 0) == 0 and BOLT.load(NULL, NULL, 0) == 0
            and BOLT.load(NULL, &one, 1) == -1)


def bench(data: bytes, rounds: int) -> float:
    cdef Copy copy = whole(data)
    cdef FrameView view
    cdef Limits limits
    cdef FrameId id
    cdef Span found
    cdef Span out
    cdef int64_t left = rounds
    cdef uint64_t good = 0
    limits.frame_bytes_max = UINT32_MAX
    memset(&id, 0, sizeof(FrameId))
    started = perf_counter_ns()
    with nogil:
        while left > 0:
            if BOLT.scan(NULL, copy.data, copy.size, &limits, 0, &view) == PARSE_OK:
                good += 1
            BOLT.service(&view, &found)
            id.number += 1
            BOLT.patch(&view, &id, NULL, &out)
            left -= 1
    elapsed = perf_counter_ns() - started
    if good != <uint64_t>rounds:
        raise AssertionError("a patched frame did not scan")
    return elapsed / rounds
