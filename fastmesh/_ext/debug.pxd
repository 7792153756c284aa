"""Invariants that are checked in debug builds (FASTMESH_DEBUG=1) and cost nothing in any other.

A broken invariant ends the process at once: a mesh that goes on with a torn table would give
somebody's answer to somebody else.
"""

cdef extern from *:
    """
    #ifndef FM_DEBUG
    #define FM_DEBUG 0
    #endif
    #if FM_DEBUG
    #include <stdio.h>
    #include <stdlib.h>
    #define fm_holds(x) do { if (!(x)) { \\
        fprintf(stderr, "fastmesh: broken invariant at %s:%d: %s\\n", __FILE__, __LINE__, #x); \\
        abort(); } } while (0)
    #else
    #define fm_holds(x) ((void)0)
    #endif
    """
    const bint FM_DEBUG
    void holds "fm_holds"(bint condition) noexcept nogil
