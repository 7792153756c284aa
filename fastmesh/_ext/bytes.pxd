"""Big-endian loads and stores. Each one is unchecked: the caller has checked the bounds once."""

from libc.stdint cimport int16_t, int32_t, uint8_t, uint16_t, uint32_t

cdef extern from "<string.h>" nogil:
    void* memcpy(void* to, const void* frm, size_t n)
    void* memmove(void* to, const void* frm, size_t n)
    int memcmp(const void* a, const void* b, size_t n)
    void* memset(void* to, int c, size_t n)

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    static inline uint16_t fm_get16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return
    __builtin_bswap16(v); }
    static inline uint32_t fm_get32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return
    __builtin_bswap32(v); }
    static inline void fm_put16(uint8_t *p, uint16_t v) { v = __builtin_bswap16(v); memcpy(p, &v,
    2); }
    static inline void fm_put32(uint8_t *p, uint32_t v) { v = __builtin_bswap32(v); memcpy(p, &v,
    4); }
    """
    uint16_t get16 "fm_get16"(const uint8_t* p) noexcept nogil
    uint32_t get32 "fm_get32"(const uint8_t* p) noexcept nogil
    void put16 "fm_put16"(uint8_t* p, uint16_t v) noexcept nogil
    void put32 "fm_put32"(uint8_t* p, uint32_t v) noexcept nogil
