"""Which build this is: with fault points, for tests, or without, for everybody else."""

cdef extern from *:
    """
    #ifndef FM_DEBUG
    #define FM_DEBUG 0
    #endif
    #ifndef FM_FAULTS
    #define FM_FAULTS FM_DEBUG
    #endif
    """
    const bint FM_FAULTS

FAULT_POINTS = bool(FM_FAULTS)
