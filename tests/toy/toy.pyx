"""A toy protocol of text lines: every value of the codec contract that Bolt does not need.

    ask <id> <service> <timeout_ms> <body> [key=value ...]      two-way request; service "-" = none
    tell <id> <service> <timeout_ms> <body> [key=value ...]     oneway
    ans <id> <status> <body> [key=value ...]                    response
    beat <id>                                                   heartbeat
    back <id>                                                   its ack
    bye                                                         goaway

A line is printable ASCII, words are parted by one space, LF ends it after at most LINE_MAX bytes.
An id is 1 to 15 decimal digits. <body> is a number of bytes that follow the line, or "*": chunks
follow, each a line with its number of bytes and then those bytes; the chunk of number 0 ends the
body. Numbers have 1 to 9 digits, a status is at most 65535.

There are two tables. `by_id`: ids are text, so another id changes the frame's length and patch()
gives three segments. `by_order`: the lines have no <id> word, and the nth answer belongs to the nth
request.

With parts=0 a frame is whole. With parts=1 a chunked frame comes in parts: its line (FIRST), each
chunk, the end (LAST); that a body is under way, and of which kind of frame, is the per-connection
state. Only the FIRST part has an id.

What wins among errors: a byte that cannot be in a line (protocol, at once), a line too long
(length), then, when the line is there, in its order: the verb (type), the number of words
(command), the id (command; length when it has too many digits), timeout or status (command), the
body's word (length), the size (too_large), each chunk (length, too_large). Words after the body
are looked at by header() only. An `ask` whose id was read is answerable, but not by a chunk that
came in parts: its id is gone.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport UINT32_MAX, int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from fastmesh._ext.bytes cimport get32, memcmp, memcpy, memset, put32
from fastmesh._ext.frame cimport (
    CORRELATE_BY_ID,
    CORRELATE_BY_ORDER,
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
    ID_TEXT,
    ID_TEXT_MAX,
    PARSE_MALFORMED,
    PARSE_NEED_MORE,
    PARSE_OK,
    PATCH_IN_PLACE,
    PATCH_SEGMENTS,
    ROW_UNTIL_ANSWER,
    VIEW_PARTS,
    Codec,
    FrameId,
    FrameView,
    Limits,
    ParseStatus,
    Span,
)

from collections import namedtuple

cdef enum:
    LINE_MAX = 256
    NUMBER_DIGITS_MAX = 9
    STATUS_MAX = 65535
    STATUS_OF_CAUSE = 100  # the mesh's own answers: 100 + cause
    MADE_MAX = 32
    SAVED_BYTES = 7
    SAVED_VERSION = 1
    LF = 10

cdef struct State:
    uint8_t in_body
    uint8_t kind    # of the frame whose body is under way
    uint32_t parts  # so far, of all frames; saved so that a loss would show


# ---------------------------------------------------------------------------------------- words


cdef inline bint next_word(const uint8_t** at, const uint8_t* end, Span* word) noexcept nogil:
    """The bytes up to the next space or the end, which may be none; False when the line is over."""
    cdef const uint8_t* start = at[0]
    if start > end:
        return False
    while at[0] < end and at[0][0] != c" ":
        at[0] += 1
    word.at = start
    word.size = <uint32_t>(at[0] - start)
    at[0] += 1  # past the space; one past `end` says that nothing is left
    return True


cdef inline bint all_digits(const Span* word) noexcept nogil:
    cdef uint32_t i
    for i in range(word.size):
        if word.at[i] < c"0" or word.at[i] > c"9":
            return False
    return word.size > 0


cdef inline int32_t number(const Span* word) noexcept nogil:
    """Its value, or -1 when it is not 1..9 digits."""
    cdef int32_t value = 0
    cdef uint32_t i
    if not all_digits(word) or word.size > NUMBER_DIGITS_MAX:
        return -1
    for i in range(word.size):
        value = value * 10 + (word.at[i] - c"0")
    return value


cdef inline bint reads(const Span* word, const char* text, uint32_t size) noexcept nogil:
    return word.size == size and memcmp(word.at, text, size) == 0


cdef inline uint8_t kind_of(const Span* verb) noexcept nogil:
    if reads(verb, b"ask", 3):
        return FRAME_REQUEST
    if reads(verb, b"tell", 4):
        return FRAME_ONEWAY
    if reads(verb, b"ans", 3):
        return FRAME_RESPONSE
    if reads(verb, b"beat", 4):
        return FRAME_HEARTBEAT
    if reads(verb, b"back", 4):
        return FRAME_HEARTBEAT_ACK
    if reads(verb, b"bye", 3):
        return FRAME_GOAWAY
    return FRAME_NONE


cdef int take_id(const Span* word, FrameId* id) noexcept nogil:
    """0, or the error. `number` is the value where 32 bits hold it, else 0: nobody's slot."""
    cdef uint64_t value = 0
    cdef uint32_t i
    if not all_digits(word):
        return ERROR_COMMAND
    if word.size > ID_TEXT_MAX:
        return ERROR_LENGTH
    for i in range(word.size):
        value = value * 10 + (word.at[i] - c"0")
    id.number = <uint32_t>value if value <= UINT32_MAX else 0
    id.text_size = <uint8_t>word.size
    memcpy(id.text, word.at, word.size)
    return 0


# ----------------------------------------------------------------------------------------- scan


cdef inline ParseStatus need_more(FrameView* view, size_t size) noexcept nogil:
    cdef uint8_t* data = view.data
    memset(view, 0, sizeof(FrameView))
    view.data = data
    view.need = <uint32_t>size
    return PARSE_NEED_MORE


cdef inline ParseStatus malformed(FrameView* view, int error) noexcept nogil:
    """Answerable when the line of an `ask` was read as far as its id."""
    cdef uint8_t* data = view.data
    cdef FrameId id = view.id
    cdef bint answerable = view.kind == FRAME_REQUEST and view.flags & FLAG_ANSWERABLE
    memset(view, 0, sizeof(FrameView))
    view.data = data
    view.error = <uint8_t>error
    if answerable:
        view.kind = FRAME_REQUEST
        view.flags = FLAG_ANSWERABLE
        view.id = id
    return PARSE_MALFORMED


cdef ParseStatus scan_line(const uint8_t* data, size_t n, FrameView* view,
                           size_t* size) noexcept nogil:
    """How long the line at `data` is, LF included."""
    cdef size_t i
    for i in range(n if n < LINE_MAX else LINE_MAX):
        if data[i] == LF:
            size[0] = i + 1
            return PARSE_OK
        if data[i] < 0x20 or data[i] > 0x7E:
            return malformed(view, ERROR_PROTOCOL)
    if n >= LINE_MAX:
        return malformed(view, ERROR_LENGTH)
    return need_more(view, n + 1)


cdef ParseStatus scan_chunk(size_t at, size_t n, const Limits* limits, FrameView* view,
                            size_t* end, bint* last) noexcept nogil:
    """The chunk `at` bytes after the start of the view; `end` counts from there too."""
    cdef const uint8_t* digits = view.data + at
    cdef Span word
    cdef size_t i = at
    cdef int32_t size
    while i < n and view.data[i] != LF:
        if i - at == NUMBER_DIGITS_MAX or view.data[i] < c"0" or view.data[i] > c"9":
            return malformed(view, ERROR_LENGTH)
        i += 1
    if i == n:
        return need_more(view, n + 1)
    word.at = digits
    word.size = <uint32_t>(i - at)
    size = number(&word)
    if size < 0:
        return malformed(view, ERROR_LENGTH)
    end[0] = i + 1 + <size_t>size
    last[0] = size == 0
    if end[0] > limits.frame_bytes_max:
        return malformed(view, ERROR_TOO_LARGE)
    if end[0] > n:
        return need_more(view, end[0])
    return PARSE_OK


cdef ParseStatus scan_frame(State* state, uint8_t* data, size_t n, const Limits* limits, int parts,
                            FrameView* view, bint with_id) noexcept nogil:
    cdef const uint8_t* at = data
    cdef const uint8_t* end
    cdef Span word
    cdef Span words[3]
    word.at = NULL
    word.size = 0
    cdef size_t size = 0
    cdef bint last = False
    cdef int32_t value
    cdef int error, i, wanted
    cdef ParseStatus got
    memset(view, 0, sizeof(FrameView))
    view.data = data

    if parts and state.in_body:
        got = scan_chunk(0, n, limits, view, &size, &last)
        if got == PARSE_OK:
            view.kind = state.kind
            view.flags = FLAG_LAST if last else 0
            view.size = <uint32_t>size
            state.in_body = not last
            state.parts += 1
        return got

    got = scan_line(data, n, view, &size)
    if got != PARSE_OK:
        return got
    end = data + size - 1
    next_word(&at, end, &word)
    view.kind = kind_of(&word)
    if view.kind == FRAME_NONE:
        return malformed(view, ERROR_TYPE)
    if with_id and view.kind != FRAME_GOAWAY:
        if not next_word(&at, end, &word):
            return malformed(view, ERROR_COMMAND)
        error = take_id(&word, &view.id)
        if error:
            return malformed(view, error)
        view.id_at = <uint32_t>(word.at - data)
    view.flags = FLAG_ANSWERABLE  # from here on malformed() may use the id
    if view.kind >= FRAME_HEARTBEAT:  # acks and goaways too: no words left
        if at <= end:
            return malformed(view, ERROR_COMMAND)
        wanted = 0
    else:
        wanted = 2 if view.kind == FRAME_RESPONSE else 3
        for i in range(wanted):
            if not next_word(&at, end, &words[i]):
                return malformed(view, ERROR_COMMAND)
            if words[i].size == 0:
                return malformed(view, ERROR_COMMAND)
        view.headers_at = <uint32_t>((at if at <= end else end) - data)
        view.headers_size = <uint32_t>(size - 1) - view.headers_at
        value = number(&words[wanted - 2])
        if value < 0 or (view.kind == FRAME_RESPONSE and value > STATUS_MAX):
            return malformed(view, ERROR_COMMAND)
        if view.kind == FRAME_RESPONSE:
            view.status = <uint16_t>value
        else:
            view.timeout_ms = value
        if reads(&words[wanted - 1], b"*", 1):
            if size > limits.frame_bytes_max:
                return malformed(view, ERROR_TOO_LARGE)
            if parts:
                state.in_body = 1
                state.kind = view.kind
                state.parts += 1
                view.flags = FLAG_FIRST
                view.size = <uint32_t>size
                return PARSE_OK
            while not last:
                got = scan_chunk(size, n, limits, view, &size, &last)
                if got != PARSE_OK:
                    return got
        else:
            value = number(&words[wanted - 1])
            if value < 0:
                return malformed(view, ERROR_LENGTH)
            size += <size_t>value
    if size > limits.frame_bytes_max:
        return malformed(view, ERROR_TOO_LARGE)
    if size > n:
        return need_more(view, size)
    view.flags = FLAG_FIRST | FLAG_LAST
    view.size = <uint32_t>size
    if parts:
        state.parts += 1
    return PARSE_OK


cdef ParseStatus scan_by_id(void* state, uint8_t* data, size_t n, const Limits* limits, int parts,
                            FrameView* view) noexcept nogil:
    return scan_frame(<State*>state, data, n, limits, parts, view, True)


cdef ParseStatus scan_by_order(void* state, uint8_t* data, size_t n, const Limits* limits,
                               int parts, FrameView* view) noexcept nogil:
    return scan_frame(<State*>state, data, n, limits, parts, view, False)


# ------------------------------------------------------------------------- what the engine asks


cdef int find_service(const FrameView* view, Span* found) noexcept nogil:
    """The word after the verb, and after the id where there is one."""
    cdef const uint8_t* at = view.data
    cdef const uint8_t* end = view.data + view.headers_at
    found.at = NULL
    found.size = 0
    if not view.flags & FLAG_FIRST:
        return 0
    if view.kind != FRAME_REQUEST and view.kind != FRAME_ONEWAY:
        return 0
    next_word(&at, end, found)
    if view.id.text_size:
        next_word(&at, end, found)
    next_word(&at, end, found)
    return 0 if reads(found, b"-", 1) else 1


cdef int find_header(const FrameView* view, const uint8_t* key, uint32_t key_size,
                     Span* found) noexcept nogil:
    cdef const uint8_t* at = view.data + view.headers_at
    cdef const uint8_t* end = at + view.headers_size
    cdef Span word
    cdef uint32_t i
    found.at = NULL
    found.size = 0
    if view.headers_size == 0:
        return 0
    while next_word(&at, end, &word):
        i = 0
        while i < word.size and word.at[i] != c"=":
            i += 1
        if i == word.size or i == 0:
            return -1
        if i == key_size and memcmp(word.at, key, key_size) == 0:
            found.at = word.at + i + 1
            found.size = word.size - i - 1
            return 1
    return 0


cdef uint32_t write_id(const FrameId* id, uint8_t* out) noexcept nogil:
    """Text as it was, a number in decimal."""
    cdef uint8_t reverse[10]
    cdef uint32_t value = id.number
    cdef uint32_t n = 0
    cdef uint32_t i
    if id.text_size:
        memcpy(out, id.text, id.text_size)
        return id.text_size
    while True:
        reverse[n] = <uint8_t>(c"0" + value % 10)
        value //= 10
        n += 1
        if value == 0:
            break
    for i in range(n):
        out[i] = reverse[n - 1 - i]
    return n


cdef int patch_by_id(FrameView* view, const FrameId* id, uint8_t* scratch,
                     Span* out) noexcept nogil:
    cdef uint32_t after = view.id_at + view.id.text_size
    if view.id.text_size == 0:  # a later part: nothing to change
        out[0].at = view.data
        out[0].size = view.size
        return 1
    out[0].at = view.data
    out[0].size = view.id_at
    out[1].at = scratch
    out[1].size = write_id(id, scratch)
    out[2].at = view.data + after
    out[2].size = view.size - after
    return 3


cdef int patch_by_order(FrameView* view, const FrameId* id, uint8_t* scratch,
                        Span* out) noexcept nogil:
    out[0].at = view.data
    out[0].size = view.size
    return 1


cdef uint32_t write_made(const char* verb, const FrameId* id, int status,
                         uint8_t* out) noexcept nogil:
    """verb [id] [status 0] LF; `id` NULL and `status` 0 leave theirs out."""
    cdef uint32_t n = 0
    cdef FrameId decimal
    while verb[n]:
        out[n] = <uint8_t>verb[n]
        n += 1
    if id != NULL:
        out[n] = c" "
        n += 1 + write_id(id, out + n + 1)
    if status:
        memset(&decimal, 0, sizeof(FrameId))
        decimal.number = <uint32_t>status
        out[n] = c" "
        n += 1 + write_id(&decimal, out + n + 1)
        memcpy(out + n, <const char*>b" 0", 2)
        n += 2
    out[n] = LF
    return n + 1


cdef uint32_t answer_by_id(const FrameId* id, uint32_t hint, int cause,
                           uint8_t* out) noexcept nogil:
    return write_made(b"ans", id, STATUS_OF_CAUSE + cause, out)


cdef uint32_t answer_by_order(const FrameId* id, uint32_t hint, int cause,
                              uint8_t* out) noexcept nogil:
    return write_made(b"ans", NULL, STATUS_OF_CAUSE + cause, out)


cdef uint32_t heartbeat_by_id(const FrameId* id, int dialect, uint8_t* out) noexcept nogil:
    return write_made(b"beat", id, 0, out)


cdef uint32_t heartbeat_by_order(const FrameId* id, int dialect, uint8_t* out) noexcept nogil:
    return write_made(b"beat", NULL, 0, out)


cdef uint32_t ack_by_id(const FrameView* view, uint8_t* out) noexcept nogil:
    return write_made(b"back", &view.id, 0, out)


cdef uint32_t ack_by_order(const FrameView* view, uint8_t* out) noexcept nogil:
    return write_made(b"back", NULL, 0, out)


cdef bint refuses = False


def refuse_to_save(on: bool) -> None:
    """Whether no state can be saved, as that of a protocol that cannot travel."""
    global refuses
    refuses = on


cdef int save_state(const void* state, uint8_t* out, size_t room) noexcept nogil:
    cdef const State* s = <const State*>state
    if room < SAVED_BYTES or refuses:
        return -1
    out[0] = SAVED_VERSION
    out[1] = s.in_body
    out[2] = s.kind
    put32(out + 3, s.parts)
    return SAVED_BYTES


cdef int load_state(void* state, const uint8_t* data, size_t n) noexcept nogil:
    cdef State* s = <State*>state
    if n != SAVED_BYTES or data[0] != SAVED_VERSION or data[1] > 1 or data[2] > FRAME_RESPONSE:
        return -1
    if data[1] and data[2] == FRAME_NONE:
        return -1
    s.in_body = data[1]
    s.kind = data[2]
    s.parts = get32(data + 3)
    return SAVED_BYTES


cdef Codec BY_ID
cdef Codec BY_ORDER

BY_ID.name = b"toy_by_id"
BY_ID.correlation = CORRELATE_BY_ID
BY_ID.row_lifetime = ROW_UNTIL_ANSWER
BY_ID.id_width = ID_TEXT
BY_ID.view = VIEW_PARTS
BY_ID.patch_kind = PATCH_SEGMENTS
BY_ID.state_bytes = sizeof(State)
BY_ID.answer_bytes_max = MADE_MAX
BY_ID.scan = scan_by_id
BY_ID.service = find_service
BY_ID.header = find_header
BY_ID.patch = patch_by_id
BY_ID.answer = answer_by_id
BY_ID.heartbeat = heartbeat_by_id
BY_ID.heartbeat_ack = ack_by_id
BY_ID.save = save_state
BY_ID.load = load_state

BY_ORDER = BY_ID
BY_ORDER.name = b"toy_by_order"
BY_ORDER.correlation = CORRELATE_BY_ORDER
BY_ORDER.id_width = ID_32
BY_ORDER.patch_kind = PATCH_IN_PLACE
BY_ORDER.scan = scan_by_order
BY_ORDER.patch = patch_by_order
BY_ORDER.answer = answer_by_order
BY_ORDER.heartbeat = heartbeat_by_order
BY_ORDER.heartbeat_ack = ack_by_order


def by_id() -> object:
    """A PyCapsule named "fastmesh.codec"."""
    return PyCapsule_New(<void*>&BY_ID, "fastmesh.codec", NULL)


def by_order() -> object:
    """A PyCapsule named "fastmesh.codec"."""
    return PyCapsule_New(<void*>&BY_ORDER, "fastmesh.codec", NULL)


# -------------------------------------------------------------------------- the face for tests

Scan = namedtuple(
    "Scan",
    "outcome kind id text need size first last error answerable timeout_ms status"
    " id_at headers_at headers_size",
)
cdef tuple OUTCOMES = ("ok", "need_more", "malformed")
cdef tuple KINDS = (None, "request", "oneway", "response", "heartbeat", "heartbeat_ack", "goaway")
cdef tuple ERRORS = (None, "protocol", "type", "command", "length", "too_large")


cdef class Connection:
    """One connection's state and the functions of its table, over exactly sized copies."""

    cdef const Codec* codec
    cdef State state
    cdef uint8_t* copy
    cdef FrameView view

    def __cinit__(self, way: str):
        self.codec = &BY_ID if way == "by_id" else &BY_ORDER

    def __dealloc__(self):
        free(self.copy)

    def scan(self, data: bytes, frame_bytes_max: int = 4194304, parts: bool = False):
        cdef Limits limits
        cdef size_t n = PyBytes_GET_SIZE(data)
        cdef FrameView* v = &self.view
        cdef ParseStatus got
        free(self.copy)
        self.copy = <uint8_t*>malloc(n)
        if self.copy == NULL and n:
            raise MemoryError
        memcpy(self.copy, PyBytes_AS_STRING(data), n)
        limits.frame_bytes_max = frame_bytes_max
        got = self.codec.scan(&self.state, self.copy, n, &limits, parts, v)
        return Scan(
            OUTCOMES[<int>got], KINDS[v.kind], v.id.number, (<char*>v.id.text)[:v.id.text_size],
            v.need, v.size, v.flags & FLAG_FIRST != 0, v.flags & FLAG_LAST != 0, ERRORS[v.error],
            v.flags & FLAG_ANSWERABLE != 0, v.timeout_ms, v.status, v.id_at, v.headers_at,
            v.headers_size,
        )

    def service(self):
        """Of the frame that scan() returned last, as all that follow."""
        cdef Span found
        cdef int got = self.codec.service(&self.view, &found)
        return taken(&found) if got else None

    def header(self, key: bytes):
        cdef Span found
        cdef int got = self.codec.header(&self.view, <const uint8_t*>PyBytes_AS_STRING(key),
                                         <uint32_t>PyBytes_GET_SIZE(key), &found)
        if got < 0:
            raise ValueError("headers")
        return taken(&found) if got else None

    def patch(self, number: int = 0, text: bytes = b"") -> list[bytes]:
        """The segments with that id; text wins over the number."""
        cdef FrameId id = made_id(number, text)
        cdef uint8_t scratch[32]
        cdef Span out[3]
        cdef int i
        return [taken(&out[i]) for i in range(self.codec.patch(&self.view, &id, scratch, out))]

    def answer(self, cause: int, number: int = 0, text: bytes = b"") -> bytes:
        cdef FrameId id = made_id(number, text)
        cdef uint8_t out[MADE_MAX]
        return out[:self.codec.answer(&id, 0, cause, out)]

    def heartbeat(self, number: int) -> bytes:
        cdef FrameId id = made_id(number, b"")
        cdef uint8_t out[MADE_MAX]
        return out[:self.codec.heartbeat(&id, 0, out)]

    def heartbeat_ack(self) -> bytes:
        cdef uint8_t out[MADE_MAX]
        return out[:self.codec.heartbeat_ack(&self.view, out)]

    def save(self, room: int = 64) -> bytes | None:
        cdef uint8_t out[64]
        cdef int n = self.codec.save(&self.state, out, min(room, 64))
        return None if n < 0 else out[:n]

    def load(self, data: bytes) -> bool:
        return self.codec.load(&self.state, <const uint8_t*>PyBytes_AS_STRING(data),
                               PyBytes_GET_SIZE(data)) >= 0


cdef FrameId made_id(number, bytes text):
    cdef FrameId id
    memset(&id, 0, sizeof(FrameId))
    id.number = number
    id.text_size = <uint8_t>min(len(text), ID_TEXT_MAX)
    memcpy(id.text, PyBytes_AS_STRING(text), id.text_size)
    return id


cdef bytes taken(const Span* span):
    return PyBytes_FromStringAndSize(<const char*>span.at, span.size)
