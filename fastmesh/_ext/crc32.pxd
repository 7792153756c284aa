"""IEEE CRC-32 (zlib's) and its linear delta: how a checksum follows a changed field without reading
the body again.

CRC is linear over GF(2): flipping bits d in a field that is followed by n bytes changes the
checksum by d * x^(8n) mod P. So after a
request id changed, crc32_patch() gives the new checksum in a few multiplications, whatever the
body's length.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef uint32_t crc32_of(uint32_t crc, const uint8_t* data, size_t n) noexcept nogil
# The checksum after the big-endian word before `following` bytes changed from `old` to `new`.
cdef uint32_t crc32_patch(uint32_t crc, uint32_t old, uint32_t new, uint64_t following) noexcept nogil
