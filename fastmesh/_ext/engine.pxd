"""The thread: epoll, commands, events, accepting; and the class that Python drives (see
engine.pyi)."""

from .world cimport World

cdef int world_start(World* w) noexcept nogil      # descriptors and memory; 0 or -1 (errno set)
cdef void world_run(World* w) noexcept nogil       # turns until it is told to stop
cdef void world_free(World* w) noexcept nogil
