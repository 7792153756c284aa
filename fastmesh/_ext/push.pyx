"""The message mesh's frames over the Bolt codec: read, forwarded, answered, and built for Python.

The functions that the engine calls are in push.pxd. They trust a FrameView that BOLT.scan filled and
nothing else: the header section is walked with every length checked. What follows them is the face
for the control plane, the embedded broker and the client, at about a microsecond a frame.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.pycapsule cimport PyCapsule_New
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport UINT32_MAX, int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport strlen

from .bolt cimport (
    BOLT,
    CMD_REQUEST,
    CMD_RESPONSE,
    CODEC_PROTOBUF,
    HINT_PROTO,
    HINT_SWITCH,
    HINT_VER1,
    RESPONSE_HEAD_MAX,
    SIGNED16_MAX,
    SWITCH_CRC,
    TRAILER_SIZE,
    Copy,
    find_header,
    has_trailer,
    next_pair,
    taken,
    whole,
    write_response_head,
    write_trailer,
)
from .bytes cimport get32, memcmp, memcpy, memset, put16, put32
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
    FRAME_ONEWAY,
    FRAME_REQUEST,
    FRAME_RESPONSE,
    PARSE_NEED_MORE,
    PARSE_OK,
    FrameId,
    FrameView,
    Limits,
    ParseStatus,
    Span,
)

from collections import namedtuple
from time import perf_counter_ns

cdef enum:
    CLASS_SIZE = 16
    OP_TEXT = 7              # bytes of "deliver" and of "forward": one is written over the other
    PAIR = 8                 # the two lengths of a header pair
    HOP_SIZE = PAIR + 6 + 1  # fm.hop: 1
    ORIGIN_SIZE = PAIR + 9   # fm.origin, without its value
    DIGITS_MAX = 10          # of a number; more are refused unread
    CONTENT_MAX = 0x7FFFFFFF  # contentLen is signed
    REQUEST_HEAD_MAX = 24

cdef const char* CLASS_TEXT = b"fastmesh.push.v1"
cdef const char* OPS[12]
OPS[:] = [
    b"", b"hello", b"subscribe", b"announce", b"suspend", b"resume", b"goaway", b"publish", b"deliver",
    b"check", b"forward", b"",
]
cdef const char* RESULTS[9]
RESULTS[:] = [
    b"", b"consumed", b"later", b"no_consumer", b"reject", b"commit", b"rollback", b"unknown", b"",
]


# --- read ------------------------------------------------------------------------------------------

cdef inline bint same(const Span* text, const char* word, uint32_t size) noexcept nogil:
    return text.size == size and memcmp(text.at, word, size) == 0


cdef uint8_t word_in(const char** words, int first, int last, const Span* text,
                     int otherwise) noexcept nogil:
    cdef int i
    for i in range(first, last + 1):
        if same(text, words[i], <uint32_t>strlen(words[i])):
            return <uint8_t>i
    return <uint8_t>otherwise


cdef inline int64_t decimal(const Span* text, int64_t most) noexcept nogil:
    """The number 0..most that the text is, or -1."""
    cdef int64_t value = 0
    cdef uint32_t i
    if text.size < 1 or text.size > DIGITS_MAX:
        return -1
    for i in range(text.size):
        if text.at[i] < c"0" or text.at[i] > c"9":
            return -1
        value = value * 10 + (text.at[i] - c"0")
    return value if value <= most else -1


cdef inline void first(Span* field, const Span* value) noexcept nogil:
    if field.at == NULL:
        field[0] = value[0]


cdef inline bint is_ours(const FrameView* view) noexcept nogil:
    return (view.class_size == CLASS_SIZE
            and memcmp(view.data + view.class_at, CLASS_TEXT, CLASS_SIZE) == 0)


cdef int read_request(const FrameView* view, PushFields* out) noexcept nogil:
    cdef const uint8_t* at = view.data + view.headers_at
    cdef const uint8_t* end = at + view.headers_size
    cdef Span key, value
    cdef int got
    cdef bint idempotent_seen = 0
    cdef int64_t number
    while at < end:
        got = next_pair(&at, end, &key, &value)
        if got < 0:
            return -1
        if got == 0 or key.size < 5 or memcmp(key.at, b"fm.", 3) != 0:
            continue
        if key.size == 5:
            if memcmp(key.at + 3, b"op", 2) == 0:
                if out.op_at == 0:
                    out.op_at = <uint32_t>(value.at - view.data)
                    out.op = word_in(OPS, OP_HELLO, OP_FORWARD, &value, OP_UNKNOWN)
            elif memcmp(key.at + 3, b"id", 2) == 0:
                first(&out.id, &value)
        elif key.size == 6:
            if memcmp(key.at + 3, b"key", 3) == 0:
                first(&out.key, &value)
            elif memcmp(key.at + 3, b"hop", 3) == 0 and out.hop < 0:
                number = decimal(&value, PUSH_HOP_MAX)
                if number < 0:
                    return -1
                out.hop = <int32_t>number
        elif key.size == 7:
            if memcmp(key.at + 3, b"lane", 4) == 0:
                first(&out.lane, &value)
        elif key.size == 8:
            if memcmp(key.at + 3, b"topic", 5) == 0:
                first(&out.topic, &value)
            elif memcmp(key.at + 3, b"group", 5) == 0:
                first(&out.group, &value)
        elif key.size == 9:
            if memcmp(key.at + 3, b"colour", 6) == 0:
                first(&out.colour, &value)
            elif memcmp(key.at + 3, b"origin", 6) == 0:
                first(&out.origin, &value)
        elif key.size == 10:
            if memcmp(key.at + 3, b"version", 7) == 0:
                first(&out.version, &value)
        elif key.size == 13 and not idempotent_seen and memcmp(key.at + 3, b"idempotent", 10) == 0:
            number = decimal(&value, 1)
            if number < 0:
                return -1
            out.idempotent = <uint8_t>number
            idempotent_seen = 1
    if out.op == OP_NONE:
        clear(out)
        return 0
    return 1


cdef int read_response(const FrameView* view, PushFields* out) noexcept nogil:
    cdef const uint8_t* at = view.data + view.headers_at
    cdef const uint8_t* end = at + view.headers_size
    cdef Span key, value
    cdef int got
    cdef bint retry_seen = 0
    cdef int64_t number
    while at < end:
        got = next_pair(&at, end, &key, &value)
        if got < 0:
            return -1
        if got == 0 or key.size < 5 or memcmp(key.at, b"fm.", 3) != 0:
            continue
        if key.size == 9:
            if out.result == RESULT_NONE and memcmp(key.at + 3, b"result", 6) == 0:
                out.result = word_in(RESULTS, RESULT_CONSUMED, RESULT_UNKNOWN, &value, RESULT_OTHER)
        elif key.size == 11:
            if not retry_seen and memcmp(key.at + 3, b"retry_ms", 8) == 0:
                number = decimal(&value, PUSH_RETRY_MS_MAX)
                if number < 0:
                    return -1
                out.retry_ms = <uint32_t>number
                retry_seen = 1
        elif key.size == 5 and memcmp(key.at + 3, b"id", 2) == 0:
            first(&out.id, &value)
    if out.result == RESULT_NONE:
        clear(out)
        return 0
    return 1


cdef inline void clear(PushFields* out) noexcept nogil:
    memset(out, 0, sizeof(PushFields))
    out.hop = -1


cdef int push_read(const FrameView* view, PushFields* out) noexcept nogil:
    clear(out)
    if view.kind == FRAME_RESPONSE:
        return read_response(view, out)
    if (view.kind == FRAME_REQUEST or view.kind == FRAME_ONEWAY) and is_ours(view):
        return read_request(view, out)
    return 0


# --- forward ---------------------------------------------------------------------------------------

cdef inline bint is_hop_or_origin(const Span* key) noexcept nogil:
    return same(key, b"fm.hop", 6) or same(key, b"fm.origin", 9)


cdef uint32_t kept_size(const FrameView* view, const PushFields* fields) noexcept nogil:
    """Bytes of the header section without fm.hop and fm.origin, wherever they stand in it."""
    cdef const uint8_t* at = view.data + view.headers_at
    cdef const uint8_t* end = at + view.headers_size
    cdef const uint8_t* began
    cdef Span key, value
    cdef uint32_t left = view.headers_size
    if fields.hop < 0 and fields.origin.at == NULL:
        return left
    while at < end:
        began = at
        if next_pair(&at, end, &key, &value) == 1 and is_hop_or_origin(&key):
            left -= <uint32_t>(at - began)
    return left


cdef uint32_t push_forward_size(const FrameView* view, const PushFields* fields,
                                const Span* node) noexcept nogil:
    cdef uint32_t kept, headers
    if fields.op != OP_DELIVER or node.size < 1 or node.size > PUSH_NODE_MAX:
        return 0
    kept = kept_size(view, fields)
    headers = kept + HOP_SIZE + ORIGIN_SIZE + node.size
    if headers > SIGNED16_MAX:
        return 0
    return view.size - view.headers_size + headers


cdef inline uint8_t* put_pair(uint8_t* at, const char* key, uint32_t key_size, const uint8_t* value,
                              uint32_t value_size) noexcept nogil:
    put32(at, key_size)
    memcpy(at + 4, key, key_size)
    at += 4 + key_size
    put32(at, value_size)
    memcpy(at + 4, value, value_size)
    return at + 4 + value_size


cdef void push_forward(const FrameView* view, const PushFields* fields, const Span* node,
                       uint8_t* out) noexcept nogil:
    cdef const uint8_t* at = view.data + view.headers_at
    cdef const uint8_t* end = at + view.headers_size
    cdef const uint8_t* op = view.data + fields.op_at
    cdef const uint8_t* began
    cdef uint8_t* to = out + view.headers_at
    cdef uint8_t* headers
    cdef uint32_t content_size
    cdef Span key, value
    memcpy(out, view.data, view.headers_at)  # fixed header and class
    headers = to
    to = put_pair(to, b"fm.hop", 6, <const uint8_t*>b"1", 1)
    to = put_pair(to, b"fm.origin", 9, node.at, node.size)
    if fields.hop < 0 and fields.origin.at == NULL:
        memcpy(to, at, view.headers_size)
        memcpy(to + (op - at), b"forward", OP_TEXT)
        to += view.headers_size
    else:
        while at < end:
            began = at
            if next_pair(&at, end, &key, &value) == 1:
                if is_hop_or_origin(&key):
                    continue
                if value.at == op:
                    memcpy(to, began, at - began - OP_TEXT)
                    to += at - began
                    memcpy(to - OP_TEXT, b"forward", OP_TEXT)
                    continue
            memcpy(to, began, at - began)
            to += at - began
    put16(out + view.class_at - 6, <uint16_t>(to - headers))
    content_size = get32(out + view.class_at - 4)
    memcpy(to, end, content_size)
    to += content_size
    if view.checksum_at:
        put32(to, crc32_of(0, out, <size_t>(to - out)))


cdef inline void patch_word(FrameView* view, uint32_t at, uint32_t word) noexcept nogil:
    """Change four bytes in place; the checksum follows by its delta."""
    cdef uint8_t* place = view.data + at
    cdef uint8_t* crc
    if view.checksum_at:
        crc = view.data + view.checksum_at
        put32(crc, crc32_patch(get32(crc), get32(place), word, view.checksum_at - at - 4))
    put32(place, word)


cdef void push_as_deliver(FrameView* view, const PushFields* fields) noexcept nogil:
    # Seven bytes as two words that share one.
    patch_word(view, fields.op_at, get32(<const uint8_t*>b"deliver"))
    patch_word(view, fields.op_at + 3, get32(<const uint8_t*>b"deliver" + 3))


# --- answer ----------------------------------------------------------------------------------------

cdef uint32_t put_decimal(uint8_t* out, uint32_t number) noexcept nogil:
    cdef uint8_t[10] digits
    cdef uint32_t count = 0
    cdef uint32_t i
    while True:
        digits[count] = <uint8_t>(c"0" + number % 10)
        count += 1
        number //= 10
        if number == 0:
            break
    for i in range(count):
        out[i] = digits[count - 1 - i]
    return count


cdef uint32_t push_answer(const FrameId* id, uint32_t hint, int result, uint32_t retry_ms,
                          const char* reason, uint8_t* out) noexcept nogil:
    cdef uint8_t[PUSH_ANSWER_MAX] headers
    cdef uint8_t[10] digits
    cdef uint8_t* to = headers
    cdef uint32_t size, headers_size
    to = put_pair(to, b"fm.result", 9, <const uint8_t*>RESULTS[result],
                  <uint32_t>strlen(RESULTS[result]))
    if result == RESULT_LATER:
        to = put_pair(to, b"fm.retry_ms", 11, digits, put_decimal(digits, retry_ms))
    if reason != NULL:
        size = <uint32_t>strlen(reason)
        if size > PUSH_REASON_MAX:
            size = PUSH_REASON_MAX
        to = put_pair(to, b"fm.reason", 9, <const uint8_t*>reason, size)
    headers_size = <uint32_t>(to - headers)
    size = write_response_head(id.number, hint, CMD_RESPONSE, 0, CLASS_SIZE, headers_size, 0, out)
    memcpy(out + size, CLASS_TEXT, CLASS_SIZE)
    size += CLASS_SIZE
    memcpy(out + size, headers, headers_size)
    return write_trailer(out, size + headers_size, hint)


cdef uint32_t answer_client(const FrameId* id, uint32_t hint, int cause,
                            uint8_t* out) noexcept nogil:
    if cause == CAUSE_NO_ROUTE:
        return push_answer(id, hint, RESULT_REJECT, 0, b"no broker serves this topic", out)
    if cause == CAUSE_UNDECODABLE:
        return push_answer(id, hint, RESULT_REJECT, 0, b"not a frame of this protocol", out)
    if cause == CAUSE_NO_ENDPOINT:
        return push_answer(id, hint, RESULT_LATER, PUSH_RETRY_UNREACHABLE_MS,
                           b"no broker of this topic is up", out)
    if cause == CAUSE_CONNECT:
        return push_answer(id, hint, RESULT_LATER, PUSH_RETRY_UNREACHABLE_MS,
                           b"no broker of this topic can be reached", out)
    if cause == CAUSE_OVERLOAD:
        return push_answer(id, hint, RESULT_LATER, PUSH_RETRY_OVERLOAD_MS, b"overload", out)
    # A broker may have it: what Bolt's own status says is all that is known.
    return BOLT.answer(id, hint, cause, out)


cdef uint32_t answer_deliverer(const FrameId* id, uint32_t hint, int cause,
                               uint8_t* out) noexcept nogil:
    if cause == CAUSE_NO_ROUTE:
        return push_answer(id, hint, RESULT_NO_CONSUMER, 0, NULL, out)
    if cause == CAUSE_UNDECODABLE:
        return push_answer(id, hint, RESULT_REJECT, 0, b"not a frame of this protocol", out)
    if cause == CAUSE_OVERLOAD:
        return push_answer(id, hint, RESULT_LATER, PUSH_RETRY_OVERLOAD_MS, b"overload", out)
    if cause == CAUSE_NO_ENDPOINT or cause == CAUSE_CONNECT:
        return push_answer(id, hint, RESULT_LATER, 0, b"peer not reachable", out)
    if cause == CAUSE_UPSTREAM_LOST:
        return push_answer(id, hint, RESULT_LATER, 0, b"peer gone before its answer", out)
    if cause == CAUSE_DEADLINE:
        return push_answer(id, hint, RESULT_LATER, 0, b"no answer in time", out)
    return push_answer(id, hint, RESULT_LATER, 0, b"consumer gone before its answer", out)


# --- the codec ---------------------------------------------------------------------------------------

cdef int find_topic(const FrameView* view, Span* found) noexcept nogil:
    return find_header(view, <const uint8_t*>b"fm.topic", 8, found)


cdef uint32_t write_answer(const FrameId* id, uint32_t hint, int cause,
                           uint8_t* out) noexcept nogil:
    if hint & PUSH_HINT_DELIVERY:
        return answer_deliverer(id, hint, cause, out)
    return answer_client(id, hint, cause, out)


PUSH = BOLT
PUSH.name = b"push"
PUSH.service = find_topic
PUSH.answer = write_answer
PUSH.answer_bytes_max = PUSH_ANSWER_MAX


def capsule() -> object:
    return PyCapsule_New(<void*>&PUSH, "fastmesh.codec", NULL)


# --- the face for the control plane, the broker and the client ---------------------------------------

CLASS = b"fastmesh.push.v1"

Push = namedtuple("Push", "kind id hint timeout_ms status headers content class_name")
cdef tuple KINDS = (None, "request", "oneway", "response", "heartbeat", "heartbeat_ack", "goaway")
cdef tuple ERRORS = (None, "its first bytes are of no known version", "its type is unknown",
                     "its command is unknown", "a length is negative", "it is longer than the limit",
                     "its checksum is wrong", "its header section does not parse")
cdef tuple OP_NAMES = (None, "hello", "subscribe", "announce", "suspend", "resume", "goaway",
                       "publish", "deliver", "check", "forward", "other")
cdef tuple RESULT_NAMES = (None, "consumed", "later", "no_consumer", "reject", "commit", "rollback",
                           "unknown", "other")


cdef dict header_map(const FrameView* view):
    cdef const uint8_t* at = view.data + view.headers_at
    cdef const uint8_t* end = at + view.headers_size
    cdef Span key, value
    cdef int got
    cdef dict found = {}
    while at < end:
        got = next_pair(&at, end, &key, &value)
        if got < 0:
            raise ValueError("headers: a length runs past the section; it must end with it")
        if got == 0:
            continue
        try:
            name = PyUnicode_DecodeUTF8(<const char*>key.at, key.size, NULL)
            if name not in found:
                found[name] = PyUnicode_DecodeUTF8(<const char*>value.at, value.size, NULL)
        except UnicodeDecodeError as e:
            raise ValueError(f"headers: {e.object[:64]!r} is not UTF-8; all text must be") from None
    return found


def parse(frame: bytes) -> object:
    cdef Limits limits
    cdef FrameView view
    cdef Py_ssize_t size = PyBytes_GET_SIZE(frame)
    cdef ParseStatus outcome
    limits.frame_bytes_max = UINT32_MAX
    outcome = BOLT.scan(NULL, <uint8_t*>PyBytes_AS_STRING(frame), size, &limits, 0, &view)
    if outcome != PARSE_OK:
        if outcome == PARSE_NEED_MORE:
            raise ValueError(f"frame: {size} bytes are cut off; it has at least {view.need}")
        raise ValueError(f"frame: {ERRORS[view.error]}")
    if <Py_ssize_t>view.size != size:
        raise ValueError(f"frame: {size - view.size} bytes too many; it has {view.size}")
    cdef uint32_t content_at = view.headers_at + view.headers_size
    cdef uint32_t content_end = view.checksum_at if view.checksum_at else view.size
    return Push(
        KINDS[view.kind], view.id.number, view.hint, view.timeout_ms, view.status,
        header_map(&view), frame[content_at:content_end],
        CLASS if is_ours(&view) else frame[view.class_at:view.headers_at],
    )


def split(buffer: bytes | bytearray | memoryview, frame_bytes_max: int) -> tuple:
    cdef Py_buffer raw
    cdef Limits limits
    cdef FrameView view
    cdef ParseStatus outcome
    cdef uint8_t* data
    cdef Py_ssize_t at = 0
    cdef list frames = []
    limits.frame_bytes_max = frame_bytes_max
    PyObject_GetBuffer(buffer, &raw, PyBUF_SIMPLE)
    try:
        data = <uint8_t*>raw.buf
        while at < raw.len:
            outcome = BOLT.scan(NULL, data + at, raw.len - at, &limits, 0, &view)
            if outcome != PARSE_OK:
                if outcome != PARSE_NEED_MORE and not frames:
                    raise ValueError(f"frame: {ERRORS[view.error]}")
                break
            frames.append(PyBytes_FromStringAndSize(<char*>data + at, view.size))
            at += view.size
    finally:
        PyBuffer_Release(&raw)
    return frames, at


cdef bytes encode_headers(headers):
    cdef list parts = []
    cdef uint8_t[4] length
    cdef Py_ssize_t total = 0
    cdef bytes raw
    for pair in headers.items():
        for text in pair:
            if not isinstance(text, str):
                raise ValueError(f"headers: {pair[0]!r}: {text!r} is no text; it must be a str")
            raw = (<str>text).encode()
            total += 4 + PyBytes_GET_SIZE(raw)
            if total > SIGNED16_MAX:
                raise ValueError(
                    f"headers: {total} bytes up to {pair[0]!r}; all of them must fit into {SIGNED16_MAX}"
                )
            put32(length, <uint32_t>PyBytes_GET_SIZE(raw))
            parts.append(PyBytes_FromStringAndSize(<char*>length, 4))
            parts.append(raw)
    return b"".join(parts)


cdef bytes content_of(content):
    cdef bytes raw = content if type(content) is bytes else bytes(memoryview(content))
    if PyBytes_GET_SIZE(raw) > CONTENT_MAX:
        raise ValueError(f"content: {len(raw)} bytes; there may be at most {CONTENT_MAX}")
    return raw


cdef bytes with_trailer(bytes frame, uint32_t hint):
    if not has_trailer(hint):
        return frame
    cdef uint8_t[4] crc
    put32(crc, crc32_of(0, <const uint8_t*>PyBytes_AS_STRING(frame), PyBytes_GET_SIZE(frame)))
    return frame + PyBytes_FromStringAndSize(<char*>crc, TRAILER_SIZE)


def request(id: int, headers: object, content: object = b"", *, timeout_ms: int = 0,
            oneway: bool = False, dialect: int = 0, crc: bool = False) -> bytes:
    cdef uint8_t[REQUEST_HEAD_MAX] head
    cdef uint8_t* at = head
    cdef uint32_t hint
    if dialect not in (0, 1, 2):
        raise ValueError(f"dialect: {dialect!r} is unknown; it must be 0 (v1), 1 or 2 (v2)")
    if crc and dialect != 2:
        raise ValueError(f"crc: dialect {dialect} has none; it must be 2")
    cdef bytes section = encode_headers(headers)
    cdef bytes body = content_of(content)
    at[0] = 2 if dialect else 1
    at += 1
    if dialect:
        at[0] = <uint8_t>(<int>dialect)
        at += 1
    at[0] = 2 if oneway else 1
    put16(at + 1, CMD_REQUEST)
    at[3] = 1
    put32(at + 4, <uint32_t>id)
    at[8] = CODEC_PROTOBUF
    at += 9
    hint = 0
    if dialect:
        at[0] = SWITCH_CRC if crc else 0
        hint = <uint32_t>dialect << HINT_VER1 | <uint32_t>at[0] << HINT_SWITCH
        at += 1
    put32(at, <uint32_t>(<int32_t>timeout_ms))
    put16(at + 4, CLASS_SIZE)
    put16(at + 6, <uint16_t>PyBytes_GET_SIZE(section))
    put32(at + 8, <uint32_t>PyBytes_GET_SIZE(body))
    at += 12
    frame = b"".join([PyBytes_FromStringAndSize(<char*>head, at - head), CLASS, section, body])
    return with_trailer(frame, hint)


def response(id: int, hint: int, headers: object, content: object = b"", *,
             status: int = 0) -> bytes:
    cdef uint8_t[RESPONSE_HEAD_MAX] head
    cdef bytes section = encode_headers(headers)
    cdef bytes body = content_of(content)
    cdef uint32_t size
    if hint & HINT_PROTO not in (1, 2):
        raise ValueError(f"hint: {hint:#x} is of no frame; it must be the request's")
    size = write_response_head(id, hint, CMD_RESPONSE, status, CLASS_SIZE,
                               <uint32_t>PyBytes_GET_SIZE(section),
                               <uint32_t>PyBytes_GET_SIZE(body), head)
    frame = b"".join([PyBytes_FromStringAndSize(<char*>head, size), CLASS, section, body])
    return with_trailer(frame, hint)


# ------------------------------------------------------- the face for tests, fuzzing and benchmarks

Fields = namedtuple(
    "Fields",
    "op result idempotent hop retry_ms op_at topic group key colour lane version origin id",
)
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


cdef object text_or_none(const Span* span):
    return None if span.at == NULL else taken(span)


cdef Span span_of(bytes text):
    cdef Span span
    span.at = <const uint8_t*>PyBytes_AS_STRING(text)
    span.size = <uint32_t>PyBytes_GET_SIZE(text)
    return span


def read(frame: bytes) -> object | None:
    cdef Copy copy = whole(frame)
    cdef PushFields f
    cdef int got = push_read(&copy.view, &f)
    if got < 0:
        raise ValueError("headers")
    if got == 0:
        return None
    return Fields(
        OP_NAMES[f.op], RESULT_NAMES[f.result], f.idempotent, f.hop, f.retry_ms, f.op_at,
        text_or_none(&f.topic), text_or_none(&f.group), text_or_none(&f.key),
        text_or_none(&f.colour), text_or_none(&f.lane), text_or_none(&f.version),
        text_or_none(&f.origin), text_or_none(&f.id),
    )


def forward(frame: bytes, node: bytes) -> bytes | None:
    cdef Copy copy = whole(frame)
    cdef Copy made
    cdef PushFields f
    cdef Span name = span_of(node)
    if push_read(&copy.view, &f) != 1:
        raise ValueError("not a push frame")
    cdef uint32_t size = push_forward_size(&copy.view, &f, &name)
    if size == 0:
        return None
    made = Copy(bytes(size))
    push_forward(&copy.view, &f, &name, made.data)
    return PyBytes_FromStringAndSize(<char*>made.data, size)


def as_deliver(frame: bytes) -> bytes:
    cdef Copy copy = whole(frame)
    cdef PushFields f
    if push_read(&copy.view, &f) != 1 or f.op != OP_FORWARD:
        raise ValueError("not a forward")
    push_as_deliver(&copy.view, &f)
    return PyBytes_FromStringAndSize(<char*>copy.data, copy.view.size)


def own_answer(id: int, hint: int, result: str, retry_ms: int = 0,
               reason: bytes | None = None) -> bytes:
    cdef uint8_t[PUSH_ANSWER_MAX] out
    cdef FrameId asked
    cdef const char* why = NULL
    if reason is not None:
        why = reason
    asked.number = id
    asked.text_size = 0
    return out[:push_answer(&asked, hint, RESULT_NAMES.index(result), retry_ms, why, out)]


def answer(id: int, hint: int, cause: str) -> bytes:
    cdef uint8_t[PUSH_ANSWER_MAX] out
    cdef FrameId asked
    asked.number = id
    asked.text_size = 0
    return out[:PUSH.answer(&asked, hint, CAUSES[cause], out)]


def service(frame: bytes) -> bytes | None:
    cdef Copy copy = whole(frame)
    cdef Span found
    cdef int got = PUSH.service(&copy.view, &found)
    if got < 0:
        raise ValueError("headers")
    return taken(&found) if got else None


def bench(frame: bytes, rounds: int) -> float:
    cdef Copy copy = whole(frame)
    cdef PushFields f
    cdef int64_t left = rounds
    cdef int64_t good = 0
    started = perf_counter_ns()
    with nogil:
        while left > 0:
            good += push_read(&copy.view, &f)
            left -= 1
    elapsed = perf_counter_ns() - started
    if good != rounds:
        raise ValueError("not a push frame")
    return elapsed / rounds
