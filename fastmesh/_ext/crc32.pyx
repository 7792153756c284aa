"""IEEE CRC-32: eight tables made at import, carry-less multiplication where the processor has it.

Everything works in zlib's bit order: bit 31 of a word is the coefficient of x^0. `crc32_of` runs
over bytes; `crc32_patch` never does: it multiplies the flipped bits by x^(8n) mod P, one
multiplication per non-zero byte of n, so a few tens of nanoseconds at most for any body.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from .bytes cimport memcpy

from time import perf_counter_ns

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    static uint32_t fm_table[8][256];  /* [k][b]: byte b followed by k zero bytes */
    static uint32_t fm_power[8][256];  /* [k][d]: x^(8 * d * 256^k) mod P */
    static uint64_t fm_fold[4];        /* folds 128 bits over 512 and over 128 bits */
    static int fm_wide;                /* 1 = the processor multiplies without carries */

    static inline uint64_t fm_le64(const uint8_t *p) {
        uint64_t v;
        memcpy(&v, p, 8);
    #if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        v = __builtin_bswap64(v);
    #endif
        return v;
    }

    #if defined(__x86_64__)
    #include <immintrin.h>

    static int fm_has_wide(void) {
        return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    }

    __attribute__((target("pclmul,sse4.1")))
    static uint64_t fm_multiply_wide(uint32_t a, uint32_t b) {
        __m128i r = _mm_clmulepi64_si128(_mm_cvtsi32_si128((int)a), _mm_cvtsi32_si128((int)b), 0);
        return (uint64_t)_mm_cvtsi128_si64(r);
    }

    __attribute__((target("pclmul,sse4.1")))
    static inline __m128i fm_fold_one(__m128i x, __m128i k, __m128i next) {
        return _mm_xor_si128(next, _mm_xor_si128(_mm_clmulepi64_si128(x, k, 0x00),
                                                 _mm_clmulepi64_si128(x, k, 0x11)));
    }

    /* Folds n bytes (a multiple of 16, at least 64) that start with a running remainder into 16
     * bytes with the same remainder: four lanes over 512 bits, then one over 128. The caller
     * divides those 16 bytes by table, which needs no constants of its own. */
    __attribute__((target("pclmul,sse4.1")))
    static void fm_fold_wide(uint32_t crc, const uint8_t *p, size_t n, uint8_t *out) {
        const __m128i *at = (const __m128i *)p;
        __m128i far = _mm_set_epi64x((long long)fm_fold[1], (long long)fm_fold[0]);
        __m128i near = _mm_set_epi64x((long long)fm_fold[3], (long long)fm_fold[2]);
        __m128i a = _mm_xor_si128(_mm_loadu_si128(at), _mm_cvtsi32_si128((int)crc));
        __m128i b = _mm_loadu_si128(at + 1);
        __m128i c = _mm_loadu_si128(at + 2);
        __m128i d = _mm_loadu_si128(at + 3);
        at += 4;
        n -= 64;
        while (n >= 64) {
            a = fm_fold_one(a, far, _mm_loadu_si128(at));
            b = fm_fold_one(b, far, _mm_loadu_si128(at + 1));
            c = fm_fold_one(c, far, _mm_loadu_si128(at + 2));
            d = fm_fold_one(d, far, _mm_loadu_si128(at + 3));
            at += 4;
            n -= 64;
        }
        a = fm_fold_one(a, near, b);
        a = fm_fold_one(a, near, c);
        a = fm_fold_one(a, near, d);
        while (n >= 16) {
            a = fm_fold_one(a, near, _mm_loadu_si128(at));
            at += 1;
            n -= 16;
        }
        _mm_storeu_si128((__m128i *)out, a);
    }
    #else
    static int fm_has_wide(void) { return 0; }
    static uint64_t fm_multiply_wide(uint32_t a, uint32_t b) { (void)a; (void)b; return 0; }
    static void fm_fold_wide(uint32_t crc, const uint8_t *p, size_t n, uint8_t *out) {
        (void)crc; (void)p; (void)n; (void)out;
    }
    #endif
    """
    uint32_t table "fm_table"[8][256]
    uint32_t power "fm_power"[8][256]
    uint64_t fold "fm_fold"[4]
    int wide "fm_wide"
    uint64_t le64 "fm_le64"(const uint8_t* p) noexcept nogil
    int has_wide "fm_has_wide"() noexcept nogil
    uint64_t multiply_wide "fm_multiply_wide"(uint32_t a, uint32_t b) noexcept nogil
    void fold_wide "fm_fold_wide"(uint32_t crc, const uint8_t* p, size_t n,
                                  uint8_t* out) noexcept nogil

cdef enum:
    POLYNOMIAL = 0xEDB88320  # x^32 left out, bit 31 = x^0
    X0 = 0x80000000
    X8 = 0x00800000


cdef inline uint32_t shift_word(uint32_t word) noexcept nogil:
    """word * x^32 mod P."""
    return (table[3][word & 255] ^ table[2][(word >> 8) & 255]
            ^ table[1][(word >> 16) & 255] ^ table[0][word >> 24])


cdef inline uint32_t multiply(uint32_t a, uint32_t b) noexcept nogil:
    """a * b mod P: 63 bits of product, whose high half (in x) is brought down by table."""
    cdef uint64_t product = 0
    cdef int i
    if wide:
        product = multiply_wide(a, b)
    else:
        for i in range(32):
            product ^= (<uint64_t>b << i) & (0 - (<uint64_t>(a >> i) & 1))
    product <<= 1  # 63 bits have x^0 at bit 62
    return <uint32_t>(product >> 32) ^ shift_word(<uint32_t>product)


cdef uint32_t update(uint32_t crc, const uint8_t* data, size_t n) noexcept nogil:
    """The running remainder (neither inverted at the start nor at the end) after n more bytes."""
    cdef uint8_t folded[16]
    cdef size_t some
    cdef uint64_t word
    if wide and n >= 64:
        some = n & ~<size_t>15
        fold_wide(crc, data, some, folded)
        crc = update(0, folded, 16)
        data += some
        n -= some
    while n >= 8:
        word = le64(data) ^ crc
        crc = (table[7][word & 255] ^ table[6][(word >> 8) & 255]
               ^ table[5][(word >> 16) & 255] ^ table[4][(word >> 24) & 255]
               ^ table[3][(word >> 32) & 255] ^ table[2][(word >> 40) & 255]
               ^ table[1][(word >> 48) & 255] ^ table[0][word >> 56])
        data += 8
        n -= 8
    while n:
        crc = table[0][(crc ^ data[0]) & 255] ^ (crc >> 8)
        data += 1
        n -= 1
    return crc


cdef uint32_t crc32_of(uint32_t crc, const uint8_t* data, size_t n) noexcept nogil:
    return ~update(~crc, data, n)


cdef uint32_t crc32_patch(uint32_t crc, uint32_t old, uint32_t new,
                          uint64_t following) noexcept nogil:
    # The flipped bits as they lie in memory, first byte lowest, moved past their own four bytes ...
    cdef uint32_t flipped = old ^ new
    cdef uint32_t delta
    cdef int k = 0
    flipped = ((flipped >> 24) | ((flipped >> 8) & 0xFF00)
               | ((flipped & 0xFF00) << 8) | (flipped << 24))
    delta = shift_word(flipped)
    # ... and past each digit of what follows. The inversions at both ends cancel out.
    while following and delta:
        if following & 255:
            delta = multiply(delta, power[k][following & 255])
        following >>= 8
        k += 1
    return crc ^ delta


cdef uint32_t raise_x(uint32_t exponent) noexcept nogil:
    """x^exponent mod P, one bit at a time: only for the constants below."""
    cdef uint32_t r = X0
    while exponent:
        r = (r >> 1) ^ (POLYNOMIAL & (0 - (r & 1)))
        exponent -= 1
    return r


cdef void make_tables() noexcept nogil:
    cdef uint32_t b, r, step
    cdef int i, k, _bit
    for b in range(256):
        r = b
        for _bit in range(8):
            r = (r >> 1) ^ (POLYNOMIAL & (0 - (r & 1)))
        table[0][b] = r
    for k in range(1, 8):
        for b in range(256):
            r = table[k - 1][b]
            table[k][b] = table[0][r & 255] ^ (r >> 8)
    step = X8
    for k in range(8):
        power[k][0] = X0
        for i in range(1, 256):
            power[k][i] = multiply(power[k][i - 1], step)
        step = multiply(power[k][255], step)
    # A lane of 128 bits is two halves, each multiplied by x to the distance that it moves.
    # Constants stand at the top of 33 bits, because a product of reflected words lies one bit low.
    fold[0] = <uint64_t>raise_x(512 + 32) << 1
    fold[1] = <uint64_t>raise_x(512 - 32) << 1
    fold[2] = <uint64_t>raise_x(128 + 32) << 1
    fold[3] = <uint64_t>raise_x(128 - 32) << 1


make_tables()
wide = has_wide()


# ----------------------------------------------------------------- the face for tests and perf/


def use_wide(on: bool) -> bool:
    """Chooses between the wide and the portable way; True if the wide one is now in use."""
    global wide
    wide = 1 if on and has_wide() else 0
    return wide != 0


def crc32(data: bytes, crc: int = 0) -> int:
    cdef size_t n = PyBytes_GET_SIZE(data)
    # An allocation of exactly this size, so that the sanitizer sees a byte read too far.
    cdef uint8_t* copy = <uint8_t*>malloc(n)
    if copy == NULL and n:
        raise MemoryError
    memcpy(copy, PyBytes_AS_STRING(data), n)
    try:
        return crc32_of(crc, copy, n)
    finally:
        free(copy)


def patch(crc: int, old: int, new: int, following: int) -> int:
    return crc32_patch(crc, old, new, following)


def bench_crc32(data: bytes, rounds: int) -> float:
    """Nanoseconds per pass over `data`, `rounds` times without the GIL."""
    cdef const uint8_t* at = <const uint8_t*>PyBytes_AS_STRING(data)
    cdef size_t n = PyBytes_GET_SIZE(data)
    cdef uint32_t crc = 0
    cdef int64_t left = rounds
    started = perf_counter_ns()
    with nogil:
        while left > 0:
            crc = crc32_of(crc, at, n)  # each round waits for the last: none can be left out
            left -= 1
    return (perf_counter_ns() - started + (crc & 0)) / rounds


def bench_patch(following: int, rounds: int) -> float:
    """Nanoseconds per patched checksum with `following` bytes after the word."""
    cdef uint64_t n = following
    cdef uint32_t crc = 1
    cdef int64_t left = rounds
    started = perf_counter_ns()
    with nogil:
        while left > 0:
            crc = crc32_patch(crc, crc, 0x01020304, n)
            left -= 1
    return (perf_counter_ns() - started + (crc & 0)) / rounds
