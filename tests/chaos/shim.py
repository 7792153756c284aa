"""A preloaded library that lies to one process: another wall clock, and an engine thread that
stalls.

Both are commands in a mapped file, so that a test gives them while the process runs, and both count
what they did, so that a test can prove that its fault happened.
"""

from __future__ import annotations

import mmap
import struct
import subprocess
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct orders {
    volatile int64_t wall_offset_s; /* added to the wall clock */
    volatile int64_t wall_reads;
    volatile int64_t stall_ms;      /* the next epoll_ctl of a thread that is not the main one */
    volatile int64_t stalls;
};
static struct orders none, *orders = &none;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("FAULT_SHIM");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *at = mmap(NULL, sizeof none, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED) orders = at;
    close(fd);
}

static int is_wall(clockid_t clock) {
    return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE || clock == CLOCK_TAI;
}

int clock_gettime(clockid_t clock, struct timespec *out) {
    int result = syscall(SYS_clock_gettime, clock, out);
    if (is_wall(clock) && result == 0) {
        __sync_fetch_and_add(&orders->wall_reads, 1);
        out->tv_sec += orders->wall_offset_s;
    }
    return result;
}

int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

static void maybe_stall(void) {
    int64_t ms = orders->stall_ms;
    if (ms <= 0 || syscall(SYS_gettid) == getpid()) return;
    if (!__sync_bool_compare_and_swap(&orders->stall_ms, ms, 0)) return;
    __sync_fetch_and_add(&orders->stalls, 1);
    struct timespec began, now;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &began);
    do syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    while ((now.tv_sec - began.tv_sec) * 1000 + (now.tv_nsec - began.tv_nsec) / 1000000 < ms);
}

int epoll_ctl(int epfd, int op, int fd, struct epoll_event *event) {
    maybe_stall();
    return (int)syscall(SYS_epoll_ctl, epfd, op, fd, event);
}
"""

ORDERS = struct.Struct("=4q")


class Shim:
    """Built once into `folder`; `environment` goes to the process that is to be lied to."""

    def __init__(self, folder: Path) -> None:
        source = folder / "shim.c"
        library = folder / "shim.so"
        orders = folder / "orders"
        source.write_text(SOURCE)
        orders.write_bytes(bytes(4096))
        subprocess.run(
            ["cc", "-O2", "-shared", "-fPIC", "-o", library, source],
            check=True,
            timeout=60,
        )
        with orders.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 4096)
        self.environment = {"LD_PRELOAD": str(library), "FAULT_SHIM": str(orders)}

    def move_wall_clock(self, seconds: int) -> None:
        struct.pack_into("=q", self._map, 0, seconds)

    def stall(self, ms: int) -> None:
        """An engine thread hangs so long in the turn that takes the next connection in."""
        struct.pack_into("=q", self._map, 16, ms)

    @property
    def wall_reads(self) -> int:
        return int(ORDERS.unpack_from(self._map)[1])

    @property
    def stalls(self) -> int:
        return int(ORDERS.unpack_from(self._map)[3])
