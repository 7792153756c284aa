"""SOFA Bolt v1 and v2 frames (wire facts: sofa-bolt 1.6.12, sofa-bolt-node 2.0.1, mosn 1.6.1, all
big-endian).

Common: proto u8 (1|2), [v2: ver1 u8], type u8 (0 response, 1 request, 2 oneway), cmdcode u16 (0
heartbeat, 1 rpc
request, 2 rpc response, 100 goaway), ver2 u8, requestId u32, codec u8, [v2: switch u8, legal
0..127, bit 0 = CRC],
requests: timeout i32 ms (<= 0 none) | responses: status u16, classLen i16 (legal 0..0x7fff: Java
reads it signed), headerLen
i16 (same), contentLen i32 (0..limit), class, headers, content, [v2 with ver1 >= 2 and switch bit 0:
CRC-32 of all before it].

v1 header: request 22, response 20 bytes. v2: 24 and 22. Headers: (i32 keyLen, key, i32 valueLen,
value)*, -1 = null.
"""

from libc.stdint cimport UINT32_MAX, uint8_t, uint16_t, uint32_t

from .bytes cimport get32
from .frame cimport Codec, FrameView, ParseStatus, Span

cdef enum:
    CMD_HEARTBEAT = 0
    CMD_REQUEST = 1
    CMD_RESPONSE = 2
    CMD_GOAWAY = 100  # mosn

    CODEC_HESSIAN = 1
    CODEC_PROTOBUF = 11
    SWITCH_CRC = 1
    SIGNED16_MAX = 0x7FFF  # class and header section: Java and JS read their lengths signed

    # FrameView.hint: bits 0..1 proto, 2..7 free for who asks, 8..15 ver1, 16..23 codec, 24..31 switch
    HINT_PROTO = 3
    HINT_VER1 = 8
    HINT_CODEC = 16
    HINT_SWITCH = 24

    RESPONSE_HEAD_MAX = 22  # fixed header of a v2 response
    TRAILER_SIZE = 4        # the CRC behind the content

cdef Codec BOLT

# --- the header section -------------------------------------------------------------------------

cdef inline int next_text(const uint8_t** at, const uint8_t* end, Span* text) noexcept nogil:
    """1: a text, 0: null (length -1), -1: a length cut off, past the end or below -1."""
    cdef uint32_t size
    text.at = NULL
    text.size = 0
    if end - at[0] < 4:
        return -1
    size = get32(at[0])
    at[0] += 4
    if size == UINT32_MAX:
        return 0
    if size > <size_t>(end - at[0]):
        return -1
    text.at = at[0]
    text.size = size
    at[0] += size
    return 1

cdef inline int next_pair(const uint8_t** at, const uint8_t* end, Span* key,
                          Span* value) noexcept nogil:
    """1: a pair of texts, 0: one of them is null (both were read, as Java does), -1: malformed."""
    cdef int a = next_text(at, end, key)
    cdef int b
    if a < 0:
        return -1
    b = next_text(at, end, value)
    if b < 0:
        return -1
    return a & b

# First header `name`: 1 found, 0 absent, -1 malformed before it.
cdef int find_header(const FrameView* view, const uint8_t* name, uint32_t name_size,
                     Span* found) noexcept nogil

# --- frames that are made -----------------------------------------------------------------------

# The fixed header of a response in proto, ver1, codec and switch of the frame that gave `hint`.
# Returns its size, at most RESPONSE_HEAD_MAX; the sections follow it.
cdef uint32_t write_response_head(uint32_t id, uint32_t hint, uint16_t cmd, uint16_t status,
                                  uint32_t class_size, uint32_t headers_size, uint32_t content_size,
                                  uint8_t* out) noexcept nogil
# Whether frames of that hint end with a CRC.
cdef bint has_trailer(uint32_t hint) noexcept nogil
# The CRC behind the `size` bytes of a frame, where its hint asks for one. Returns the whole size.
cdef uint32_t write_trailer(uint8_t* frame, uint32_t size, uint32_t hint) noexcept nogil

# --- for the Python faces of codecs ---------------------------------------------------------------

cdef class Copy:
    """The input in an allocation of exactly its size: the sanitizer sees a byte read too far."""

    cdef uint8_t* data
    cdef size_t size
    cdef FrameView view

    cdef ParseStatus scan(self, uint32_t frame_bytes_max) noexcept

# `data` starts with a whole frame, and the copy's view is that of it. ValueError otherwise.
cdef Copy whole(bytes data)
cdef bytes taken(const Span* span)
