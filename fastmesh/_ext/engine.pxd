"""The thread: epoll, commands, events, accepting; and the class that Python drives (see
engine.pyi)."""

from libc.stdint cimport uint64_t

from .world cimport World

# descriptors and memory; 0 or -1 (errno set)
cdef int world_start(World* w, uint64_t ring_bytes) noexcept nogil
cdef void world_run(World* w) noexcept nogil       # turns until it is told to stop
cdef void world_free(World* w) noexcept nogil
