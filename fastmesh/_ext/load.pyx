"""Load generator, echo service and push source: one kind of native thread that asks, answers, or
both.

A thread (`Loop`) owns its epoll, its connections and its figures and shares nothing but `Shared`.
Per readable connection and turn there is one recv() and one send(): frames are read into one area
for the whole thread, answers and new requests are gathered in an arena and leave together. Frames
are found by the codec; what they must contain is checked here, byte for byte.

Every body is named (see load.pyi) and filled from a slice of random bytes that only this run has,
so that a check is a comparison of memory, which costs less than any checksum and misses nothing.

Request ids look like those of real clients, small numbers that are the same on all connections:
index (15 bits) | generation (14 bits). A mesh that forgets to replace them is found out at once.
"""

import os
import re
import socket
import struct
from typing import NamedTuple

from fastmesh._ext.push import request as push_request

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport UINT32_MAX, UINT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc

from .bolt cimport BOLT, CMD_RESPONSE, write_response_head
from .bytes cimport memcmp, memcpy, memmove, memset, put16, put32
from .crc32 cimport crc32_of
from .frame cimport (
    FRAME_GOAWAY,
    FRAME_HEARTBEAT,
    FRAME_ONEWAY,
    FRAME_REQUEST,
    FRAME_RESPONSE,
    PARSE_NEED_MORE,
    PARSE_OK,
    FrameView,
    Limits,
    ParseStatus,
)
from .push cimport OP_ANNOUNCE, OP_SUBSCRIBE, RESULT_CONSUMED, PushFields, push_read

cdef extern from *:
    """
    #include <errno.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <poll.h>
    #include <pthread.h>
    #include <signal.h>
    #include <sys/epoll.h>
    #include <sys/eventfd.h>
    #include <sys/prctl.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>
    #include "atomics.h"

    static inline uint64_t fm_clock(clockid_t which) {
        struct timespec t;
        clock_gettime(which, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    /* Nanoseconds matter to the open loop: a millisecond is twenty requests late. Kernels before
     * 5.11 get the millisecond below, so that they wake early and look again. */
    static inline int fm_epoll_wait(int fd, struct epoll_event *events, int most, int64_t ns) {
        static int have_pwait2 = 1;
        if (ns <= 0 || !have_pwait2)
            return epoll_wait(fd, events, most, ns < 0 ? -1 : (int)(ns / 1000000));
        struct timespec t = {ns / 1000000000, ns % 1000000000};
        int n = epoll_pwait2(fd, events, most, &t, NULL);
        if (n < 0 && errno == ENOSYS) {
            have_pwait2 = 0;
            return epoll_wait(fd, events, most, (int)(ns / 1000000));
        }
        return n;
    }
    static inline int fm_nodelay(int fd) {
        int one = 1;
        return setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    }
    static inline int fm_socket_error(int fd) {
        int error = 0;
        socklen_t n = sizeof error;
        if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &n) < 0)
            return errno;
        return error;
    }
    static inline ssize_t fm_send(int fd, struct iovec *iov, int count) {
        struct msghdr m;
        if (count == 1)
            return send(fd, iov->iov_base, iov->iov_len, MSG_NOSIGNAL | MSG_DONTWAIT);
        memset(&m, 0, sizeof m);
        m.msg_iov = iov;
        m.msg_iovlen = (size_t)count;
        return sendmsg(fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    /* Signals stay with Python's threads: a native thread starts with all of them blocked. */
    static inline int fm_thread(pthread_t *thread, void *(*body)(void *), void *argument) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, &before);
        int error = pthread_create(thread, NULL, body, argument);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return error;
    }
    static inline void fm_thread_begin(const char *name) {
        prctl(PR_SET_NAME, name, 0, 0, 0);
        prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0); /* 50 us of slack would be added to every latency */
    }
    #define fm_top_bit(v) (63 - __builtin_clzll(v))
    """
    ctypedef int clockid_t
    ctypedef unsigned long pthread_t
    int EAGAIN, EINPROGRESS, EINTR, EMFILE, ENFILE, ECONNABORTED, ECONNRESET
    int errno
    clockid_t CLOCK_MONOTONIC, CLOCK_THREAD_CPUTIME_ID
    int EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLLEXCLUSIVE
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL
    int EFD_CLOEXEC, EFD_NONBLOCK, SOCK_STREAM, SOCK_NONBLOCK, SOCK_CLOEXEC, MSG_DONTWAIT, POLLIN
    cdef struct iovec:
        void* iov_base
        size_t iov_len
    ctypedef union epoll_data_t:
        void* ptr
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    cdef struct sockaddr:
        pass
    cdef struct pollfd:
        int fd
        short events
        short revents
    int epoll_create1(int flags) noexcept nogil
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event) noexcept nogil
    int eventfd(unsigned int start, int flags) noexcept nogil
    int socket_ "socket"(int domain, int kind, int protocol) noexcept nogil
    int connect_ "connect"(int fd, const sockaddr* address, unsigned int size) noexcept nogil
    int accept4(int fd, sockaddr* address, unsigned int* size, int flags) noexcept nogil
    ssize_t recv(int fd, void* into, size_t n, int flags) noexcept nogil
    ssize_t read_ "read"(int fd, void* into, size_t n) noexcept nogil
    ssize_t write_ "write"(int fd, const void* data, size_t n) noexcept nogil
    int close_ "close"(int fd) noexcept nogil
    int poll(pollfd* fds, unsigned long n, int timeout_ms) noexcept nogil
    int pthread_join(pthread_t thread, void** result) noexcept nogil
    uint64_t clock_ns "fm_clock"(clockid_t which) noexcept nogil
    int epoll_wait_ns "fm_epoll_wait"(int fd, epoll_event* events, int most, int64_t ns) \
        noexcept nogil
    int no_delay "fm_nodelay"(int fd) noexcept nogil
    int socket_error "fm_socket_error"(int fd) noexcept nogil
    ssize_t send_all "fm_send"(int fd, iovec* iov, int count) noexcept nogil
    int thread_start "fm_thread"(pthread_t* thread, void* (*body)(void*) noexcept nogil,
                                 void* argument) noexcept nogil
    void thread_begin "fm_thread_begin"(const char* name) noexcept nogil
    int top_bit "fm_top_bit"(uint64_t v) noexcept nogil
    uint32_t load32 "fm_load"(uint32_t* at) noexcept nogil
    void store32 "fm_store"(uint32_t* at, uint32_t v) noexcept nogil
    uint32_t add32 "fm_add"(uint32_t* at, uint32_t v) noexcept nogil

cdef enum:
    NAME_BYTES = 32            # run 8, connection 4, epoch 4, sequence 8, check 8
    FILL_SLICES = 64           # how many different bodies there are of one size ...
    FILL_STEP = 64             # ... each a slice that begins this many bytes further on
    # contents up to this are copied next to their header, longer ones are referred to
    SMALL_BYTES = 2048
    AREA_BYTES = 262144        # read at once per connection and turn
    ARENA_BYTES = 262144       # gathered before a send; far above one turn's worth of small frames
    OUT_IOV = 256
    EVENTS = 512               # per epoll_wait
    ACCEPTS = 256              # per turn
    BURST = 4096               # open loop: requests per turn, so that answers are read in between
    # at once: below the accept backlog that Linux grants by default (4096), with room for others
    CONNECTING_MAX = 256
    OUT_PAUSE_BYTES = 1048576  # an echo service stops reading from who does not read
    DELAYED_BYTES_MAX = 67108864  # memory for answers that wait for --delay-ms, per thread
    REQUEST_PREFIX_MAX = 40000  # header 24, class 44, header section up to 32767
    STATUS_ROWS = 16           # different statuses told apart
    # 128 buckets an octave up to 2**41 ns (36 minutes), then the last one
    HISTOGRAM = 4480
    GENERATIONS = 0x3fff
    C_CONNECTIONS_MAX = 65535
    C_DEPTH_MAX = 32768        # index: 15 bits
    C_THREADS_MAX = 64
    C_BODY_MAX = 16777216
    MESH_CLASS_BYTES = 16
    CONSUMED_BYTES = 25
    SECTIONS = 64              # of a run: what is asked about its parts fits a page or two
    # of what a consumer says at first: requests have index and generation in 29 bits
    GREETING_ID = 0x7ffffff0

cdef uint64_t SECOND_NS = 1000000000
cdef uint64_t RETRY_NS = 50000000  # before a lost connection is tried again
cdef uint64_t ACCEPT_RETRY_NS = 100000000  # after "no descriptor"

cdef enum:  # error kinds, in the order of ERROR_KINDS
    E_LOST = 0
    E_DOUBLED = 1
    E_MISROUTED = 2
    E_TORN = 3
    E_UNEXPECTED = 4
    E_LATE = 5
    E_UNDECODABLE = 6
    E_DISCONNECTED = 7
    E_CONNECT_FAILED = 8
    E_UNSENT = 9
    E_REFUSED = 10
    E_COUNT = 11
    E_STATUS = 11     # of a section only: any status

cdef enum State:  # of a connection
    FREE = 0
    WAITING = 1       # to be connected when its time comes
    CONNECTING = 2
    UP = 3
    DEAD = 4          # will not come back in this run

cdef enum Phase:
    NEW = 0
    CONNECT = 1
    WARM = 2
    RUN = 3
    DRAIN = 4
    DONE = 5

cdef enum Ended:  # how the last request of a slot ended
    NEVER = 0
    ANSWERED = 1
    GIVEN_UP = 2

cdef struct Ask:  # one request slot of a connection
    Ask* older             # all requests in flight of a thread, in the order of sending
    Ask* newer
    Conn* conn
    # latency counts from here: intended (open loop) or handed to the kernel (closed loop)
    uint64_t start_ns
    uint64_t sent_ns       # 0 = not handed over yet
    uint64_t sequence
    uint32_t size          # of the body
    uint16_t index
    uint16_t next_free     # index + 1
    uint16_t generation
    uint8_t open
    uint8_t ended          # Ended

cdef struct Conn:
    int fd
    uint8_t state          # State
    uint8_t active         # carries load
    uint8_t broken         # a send failed; closed at the next safe place
    uint8_t paused         # not read from while it does not read
    uint8_t want_out       # EPOLLOUT is set
    uint8_t was_reset      # ended by a reset, and not by an orderly close
    uint8_t ended_once     # since the load began
    uint32_t number        # its name in bodies
    uint32_t epoch         # moves on with every new socket
    uint32_t place         # in Loop.active
    uint64_t sequence
    uint64_t answered_ns   # last right answer, or when the load began; 0 = neither
    uint64_t due_ns        # WAITING: when to connect; CONNECTING: when to give up
    Ask* asks
    uint32_t made          # slots ever used
    uint32_t in_flight
    uint32_t free_head     # index + 1
    uint8_t* in_data       # a frame that has not come whole
    size_t in_size
    size_t in_room
    uint8_t* out_data      # what the kernel did not take
    size_t out_at
    size_t out_size        # bytes from out_at on
    size_t out_room
    Conn* next             # free list or waiting list

cdef struct Part:  # figures of one section of a run
    uint64_t answered
    uint64_t gap_ns            # longest time between two answers of one connection
    uint64_t slowest_ns
    uint64_t errors[12]        # by kind, and E_STATUS

cdef struct Delayed:  # an answer that waits
    Delayed* next
    Conn* conn
    uint32_t epoch
    uint32_t size
    uint64_t due_ns
    # bytes follow

# one run or one service; written before the threads start unless said otherwise
cdef struct Shared:
    uint32_t serves            # an echo service; else a load run
    uint32_t threads
    uint32_t depth
    uint32_t version
    uint32_t checksum
    uint32_t closed            # closed loop
    uint32_t push_at_once
    # speaks the message mesh's protocol: a broker that announcements start, or a consumer
    uint32_t mesh
    uint8_t* greeting          # what a consumer says when its connection is up
    uint32_t greeting_size
    uint32_t status
    # open loop: between two requests of one thread; push: of one connection; 0 = does not ask
    double interval_ns
    double connect_interval_ns
    uint64_t run               # random
    uint64_t connect_ns
    uint64_t warmup_ns
    uint64_t duration_ns
    uint64_t timeout_ns        # until a request counts as lost
    uint64_t delay_ns
    Limits limits
    uint32_t sizes
    uint32_t* size
    uint8_t* fill
    uint8_t* prefix            # header, class and header section of a request
    uint32_t prefix_size
    uint8_t address[128]
    uint32_t address_size
    int domain
    int done                   # event fd: readable when every thread has ended
    # written by the threads, or by Python while they run
    uint32_t stop              # 1 = end the load, 2 = leave at once
    uint32_t stop_push
    uint32_t ready             # threads whose connections stand
    uint32_t gone              # threads that have ended
    uint32_t go                # the three times below are set
    uint64_t started_ns
    uint64_t begin_ns          # measured window
    uint64_t end_ns
    uint32_t section           # where figures go now
    uint64_t section_ns[64]    # when each began

cdef struct Loop:
    Shared* shared
    pthread_t thread
    int epoll
    int wake                   # event fd
    int listener               # -1 = none
    int listener_paused
    int joined
    uint32_t phase
    Conn** conns               # every connection, by place
    uint32_t conns_made
    Conn* spare                # FREE ones (service)
    Conn* waiting              # WAITING ones, earliest first as every wait is equally long
    Conn* waiting_tail
    Conn** active              # UP and carrying load
    uint32_t active_size
    uint32_t active_at         # whose turn it is in the open loop
    uint32_t connecting
    uint32_t up
    uint32_t began             # load run: UP when the load began
    uint32_t to_come           # load run: connections not UP and not DEAD
    double next_connect_ns
    double next_ns             # open loop: when the next request is due
    Ask* oldest
    Ask* newest
    Ask* unstamped             # from here on built, not handed over
    uint32_t in_flight
    uint64_t left              # requests that it may still send
    uint64_t draws             # state of the random numbers
    uint64_t connect_until_ns
    uint64_t listen_again_ns
    Delayed* delayed
    Delayed* delayed_tail
    size_t delayed_bytes
    uint64_t finished_ns       # when the last of an agreed number of requests was settled
    uint64_t cpu_begin_ns
    uint64_t cpu_ns            # of the measured window
    uint64_t cpu_all_ns        # written at the end of a turn now and then, and at the end
    uint8_t* area
    uint8_t* arena
    size_t arena_used
    iovec iov[256]
    int iov_count
    size_t iov_bytes
    # figures
    Part sections[64]
    uint64_t errors[11]
    uint64_t first_error_ns    # 0 = none
    uint64_t last_error_ns
    uint64_t resets
    uint32_t kept              # load run: up from the beginning of the load to its end
    uint32_t status[16]
    uint64_t status_count[16]
    uint64_t sent_total
    uint64_t answered_total
    uint64_t sent
    uint64_t answered
    uint64_t bytes_in
    uint64_t bytes_out
    uint64_t answered_for_peer
    uint64_t accepted
    uint64_t oneways
    uint64_t heartbeats
    uint64_t overloaded
    uint64_t samples
    uint64_t sum_ns
    uint64_t max_ns
    uint64_t histogram[4480]

cdef const uint8_t* REQUEST_CLASS = b"com.alipay.sofa.rpc.core.request.SofaRequest"
cdef const uint8_t* RESPONSE_CLASS = b"com.alipay.sofa.rpc.core.response.SofaResponse"
cdef const uint8_t* MESH_CLASS = b"fastmesh.push.v1"
cdef const uint8_t* CONSUMED = b"\0\0\0\x09fm.result\0\0\0\x08consumed"
cdef enum:
    REQUEST_CLASS_BYTES = 44
    RESPONSE_CLASS_BYTES = 46

cdef inline uint64_t now_ns() noexcept nogil:
    return clock_ns(CLOCK_MONOTONIC)

cdef inline Part* section_of(Loop* loop) noexcept nogil:
    return &loop.sections[load32(&loop.shared.section)]

cdef void count_errors(Loop* loop, int kind, uint64_t n) noexcept nogil:
    cdef uint64_t now = now_ns()
    if kind < E_COUNT:
        loop.errors[kind] += n
    section_of(loop).errors[kind] += n
    if loop.first_error_ns == 0:
        loop.first_error_ns = now
    loop.last_error_ns = now

# --- histogram: 0.8 % wide buckets, because added latency is a small difference of two of them ----

cdef inline uint32_t bucket_of(uint64_t ns) noexcept nogil:
    cdef int shift
    cdef uint32_t at
    if ns < 128:
        return <uint32_t>ns
    shift = top_bit(ns) - 7
    at = (<uint32_t>(shift + 1) << 7) + <uint32_t>((ns >> shift) & 127)
    return at if at < HISTOGRAM else HISTOGRAM - 1

cdef inline uint64_t bucket_bound(uint32_t at) noexcept nogil:
    cdef int shift
    if at < 128:
        return at + 1
    shift = <int>(at >> 7) - 1
    return (<uint64_t>(128 + (at & 127)) + 1) << shift

# --- random numbers and names ---------------------------------------------------------------------

cdef inline uint64_t mix(uint64_t v) noexcept nogil:
    # splitmix64's finish: one bit changed in, half of them changed out
    v = (v ^ (v >> 30)) * <uint64_t>0xbf58476d1ce4e5b9
    v = (v ^ (v >> 27)) * <uint64_t>0x94d049bb133111eb
    return v ^ (v >> 31)

cdef inline uint64_t draw(uint64_t* state) noexcept nogil:
    state[0] += <uint64_t>0x9e3779b97f4a7c15
    return mix(state[0])

cdef struct Name:
    uint64_t run
    uint32_t number
    uint32_t epoch
    uint64_t sequence
    uint64_t check

cdef inline uint64_t name_check(const Name* name) noexcept nogil:
    return mix(name.run ^ mix((<uint64_t>name.number << 32 | name.epoch) ^ mix(name.sequence)))

cdef inline const uint8_t* fill_of(const Shared* shared, uint64_t sequence) noexcept nogil:
    return shared.fill + (sequence & (FILL_SLICES - 1)) * FILL_STEP

# --- output: gathered for one connection at a time, sent once -------------------------------------

cdef void conn_watch(Loop* loop, Conn* conn) noexcept nogil:
    cdef epoll_event event
    event.events = (0 if conn.paused else EPOLLIN) | (EPOLLOUT if conn.want_out else 0)
    event.data.ptr = conn
    epoll_ctl(loop.epoll, EPOLL_CTL_MOD, conn.fd, &event)

cdef int out_keep(Conn* conn, const uint8_t* data, size_t n) noexcept nogil:
    # Append to what waits for the kernel. -1 = no memory.
    cdef size_t room
    cdef uint8_t* grown
    if conn.out_at + conn.out_size + n > conn.out_room:
        if conn.out_at:
            memmove(conn.out_data, conn.out_data + conn.out_at, conn.out_size)
            conn.out_at = 0
        if conn.out_size + n > conn.out_room:
            room = (conn.out_size + n) * 2
            grown = <uint8_t*>realloc(conn.out_data, room)
            if grown == NULL:
                return -1
            conn.out_data = grown
            conn.out_room = room
    memcpy(conn.out_data + conn.out_at + conn.out_size, data, n)
    conn.out_size += n
    return 0

cdef void stamp(Loop* loop) noexcept nogil:
    # Requests gathered since the last send leave now.
    cdef Ask* ask = loop.unstamped
    cdef uint64_t now = now_ns()
    cdef bint counts = loop.shared.begin_ns <= now and now < loop.shared.end_ns
    while ask != NULL:
        ask.sent_ns = now
        if ask.start_ns == 0:
            ask.start_ns = now
        if counts:
            loop.sent += 1
            loop.bytes_out += loop.shared.prefix_size + ask.size
        ask = ask.newer
    loop.unstamped = NULL

cdef void conn_flush(Loop* loop, Conn* conn) noexcept nogil:
    cdef int count = loop.iov_count
    cdef int i
    cdef ssize_t n
    cdef size_t taken = 0, size
    if count == 0:
        return
    if loop.unstamped != NULL:
        stamp(loop)
    loop.iov_count = 0
    loop.arena_used = 0
    if conn.broken or conn.state != UP:
        return
    if conn.out_size == 0:
        n = send_all(conn.fd, loop.iov, count)
        if n < 0:
            if errno != EAGAIN and errno != EINTR:
                conn.was_reset = errno == ECONNRESET
                conn.broken = 1
                return
        else:
            taken = <size_t>n
            if loop.shared.serves:
                loop.bytes_out += taken
    for i in range(count):
        size = loop.iov[i].iov_len
        if taken >= size:
            taken -= size
            continue
        if out_keep(conn, <uint8_t*>loop.iov[i].iov_base + taken, size - taken) < 0:
            conn.broken = 1
            return
        taken = 0
    if conn.out_size and not conn.want_out:
        conn.want_out = 1
        if loop.shared.serves and conn.out_size > OUT_PAUSE_BYTES:
            conn.paused = 1
        conn_watch(loop, conn)
    elif loop.shared.serves and conn.out_size > OUT_PAUSE_BYTES and not conn.paused:
        conn.paused = 1
        conn_watch(loop, conn)

cdef inline uint8_t* out_room(Loop* loop, Conn* conn, size_t need) noexcept nogil:
    # Room for one frame: `need` bytes of the arena and four iovec entries, so that no frame is cut
    # by a send.
    if loop.arena_used + need > ARENA_BYTES or loop.iov_count + 4 > OUT_IOV:
        conn_flush(loop, conn)
    return loop.arena + loop.arena_used

cdef inline void out_add(Loop* loop, const uint8_t* at, size_t n) noexcept nogil:
    cdef iovec* last
    if loop.iov_count:
        last = &loop.iov[loop.iov_count - 1]
        if <uint8_t*>last.iov_base + last.iov_len == at:
            last.iov_len += n
            return
    last = &loop.iov[loop.iov_count]
    last.iov_base = <void*>at
    last.iov_len = n
    loop.iov_count += 1

cdef inline void out_arena(Loop* loop, size_t n) noexcept nogil:
    out_add(loop, loop.arena + loop.arena_used, n)
    loop.arena_used += n

# --- asking ---------------------------------------------------------------------------------------

cdef inline bint can_ask(const Loop* loop, const Conn* conn) noexcept nogil:
    return conn.free_head != 0 or conn.made < loop.shared.depth

cdef void ask_build(Loop* loop, Conn* conn, uint64_t start_ns) noexcept nogil:
    """Take a slot (the caller has seen that there is one) and gather its request. start_ns 0 =
    when it is sent.
    """
    cdef Shared* shared = loop.shared
    cdef Ask* ask
    cdef Name name
    cdef uint8_t* at
    cdef uint8_t* begin
    cdef uint32_t id, content, head, crc
    if conn.free_head:
        ask = &conn.asks[conn.free_head - 1]
        conn.free_head = ask.next_free
    else:
        ask = &conn.asks[conn.made]
        memset(ask, 0, sizeof(Ask))
        ask.index = <uint16_t>conn.made
        ask.conn = conn
        conn.made += 1
    ask.generation = <uint16_t>(ask.generation + 1 if ask.generation < GENERATIONS else 1)
    ask.open = 1
    ask.start_ns = start_ns
    ask.sent_ns = 0
    conn.sequence += 1
    ask.sequence = conn.sequence
    ask.size = shared.size[0]
    if shared.sizes > 1:
        ask.size = shared.size[draw(&loop.draws) % shared.sizes]
    ask.newer = NULL
    ask.older = loop.newest
    if loop.newest != NULL:
        loop.newest.newer = ask
    else:
        loop.oldest = ask
    loop.newest = ask
    conn.in_flight += 1
    loop.in_flight += 1
    loop.sent_total += 1
    loop.left -= 1

    content = ask.size
    begin = out_room(loop, conn, shared.prefix_size + SMALL_BYTES + NAME_BYTES + 4)
    if loop.unstamped == NULL:
        loop.unstamped = ask
    at = begin
    memcpy(at, shared.prefix, shared.prefix_size)
    id = <uint32_t>ask.index << 14 | ask.generation
    if shared.version == 1:
        put32(at + 5, id)
        put32(at + 18, content)
    else:
        put32(at + 6, id)
        put32(at + 20, content)
    at += shared.prefix_size
    head = 0
    if content:
        name.run = shared.run
        name.number = conn.number
        name.epoch = conn.epoch
        name.sequence = ask.sequence
        name.check = name_check(&name)
        memcpy(at, &name, NAME_BYTES)
        at += NAME_BYTES
        head = NAME_BYTES
        if content <= SMALL_BYTES:
            memcpy(at, fill_of(shared, ask.sequence), content - NAME_BYTES)
            at += content - NAME_BYTES
            head = content
    crc = 0
    if shared.checksum:
        crc = crc32_of(0, begin, <size_t>(at - begin))
    if head == content:
        if shared.checksum:
            put32(at, crc)
            at += 4
        out_arena(loop, <size_t>(at - begin))
        return
    out_arena(loop, <size_t>(at - begin))
    out_add(loop, fill_of(shared, ask.sequence), content - NAME_BYTES)
    if shared.checksum:
        crc = crc32_of(crc, fill_of(shared, ask.sequence), content - NAME_BYTES)
        put32(loop.arena + loop.arena_used, crc)
        out_arena(loop, 4)

cdef void ask_end(Loop* loop, Ask* ask, int ended) noexcept nogil:
    cdef Conn* conn = ask.conn
    if loop.unstamped == ask:
        loop.unstamped = ask.newer
    if ask.older != NULL:
        ask.older.newer = ask.newer
    else:
        loop.oldest = ask.newer
    if ask.newer != NULL:
        ask.newer.older = ask.older
    else:
        loop.newest = ask.older
    ask.open = 0
    ask.ended = <uint8_t>ended
    ask.next_free = <uint16_t>conn.free_head
    conn.free_head = <uint32_t>ask.index + 1
    conn.in_flight -= 1
    loop.in_flight -= 1

cdef inline bint asking(const Loop* loop) noexcept nogil:
    return (loop.phase == WARM or loop.phase == RUN) and loop.left > 0

cdef void conn_fill(Loop* loop, Conn* conn) noexcept nogil:
    # Closed loop: as many in flight as agreed.
    while loop.left and can_ask(loop, conn) and not conn.broken:
        ask_build(loop, conn, 0)
    conn_flush(loop, conn)

cdef void count_status(Loop* loop, uint32_t status) noexcept nogil:
    # The last row takes what found no row of its own.
    cdef uint32_t i
    count_errors(loop, E_STATUS, 1)
    for i in range(STATUS_ROWS - 1):
        if loop.status[i] == status or loop.status[i] == 0:
            loop.status[i] = status
            loop.status_count[i] += 1
            return
    loop.status[STATUS_ROWS - 1] = status
    loop.status_count[STATUS_ROWS - 1] += 1

cdef enum Whose:
    MINE = 0
    OTHERS = 1
    NOBODYS = 2

cdef int whose(const Shared* shared, const Conn* conn, const uint8_t* content, uint32_t size,
               uint64_t* sequence) noexcept nogil:
    # Who a body says it belongs to.
    cdef Name name
    if size < NAME_BYTES:
        return NOBODYS
    memcpy(&name, content, NAME_BYTES)
    if name.check != name_check(&name):
        return NOBODYS
    sequence[0] = name.sequence
    if name.run != shared.run or name.number != conn.number or name.epoch != conn.epoch:
        return OTHERS
    return MINE

cdef inline void count_gap(Part* section, const Conn* conn, uint64_t now) noexcept nogil:
    if conn.answered_ns and now > conn.answered_ns and now - conn.answered_ns > section.gap_ns:
        section.gap_ns = now - conn.answered_ns

cdef void take_answer(Loop* loop, Conn* conn, const FrameView* view, uint64_t now) noexcept nogil:
    cdef Shared* shared = loop.shared
    cdef uint32_t index = view.id.number >> 14
    cdef uint32_t generation = view.id.number & GENERATIONS
    cdef uint32_t at = (20 if view.data[0] == 1 else 22) + view.class_size + view.headers_size
    cdef uint32_t size = (view.checksum_at if view.checksum_at else view.size) - at
    cdef const uint8_t* content = view.data + at
    cdef uint64_t sequence = 0, took
    cdef uint32_t last
    cdef Ask* ask
    cdef Part* section
    cdef PushFields said
    cdef int error = -1
    cdef int owner
    if index < conn.made:
        ask = &conn.asks[index]
        if ask.open and ask.generation == generation:
            if view.status:
                count_status(loop, view.status)
            elif shared.mesh and (push_read(view, &said) <= 0 or said.result != RESULT_CONSUMED):
                error = E_REFUSED
            elif ask.size == 0:
                if size:
                    error = E_TORN
            else:
                owner = whose(shared, conn, content, size, &sequence)
                if owner == NOBODYS:
                    error = E_TORN
                elif owner == OTHERS or sequence != ask.sequence:
                    error = E_MISROUTED
                elif size != ask.size or memcmp(content + NAME_BYTES, fill_of(shared, sequence),
                                                size - NAME_BYTES) != 0:
                    error = E_TORN
            if error >= 0:
                count_errors(loop, error, 1)
            elif view.status == 0:
                loop.answered_total += 1
                section = section_of(loop)
                if shared.begin_ns <= now and now < shared.end_ns:
                    loop.answered += 1
                    section.answered += 1
                    count_gap(section, conn, now)
                    if not shared.serves:
                        loop.bytes_in += view.size
                if shared.begin_ns <= ask.start_ns and ask.start_ns < shared.end_ns:
                    took = now - ask.start_ns if now > ask.start_ns else 0
                    loop.histogram[bucket_of(took)] += 1
                    loop.samples += 1
                    loop.sum_ns += took
                    if took > loop.max_ns:
                        loop.max_ns = took
                    if took > section.slowest_ns:
                        section.slowest_ns = took
                conn.answered_ns = now
            ask_end(loop, ask, ANSWERED)
            if shared.closed and asking(loop) and conn.active:
                ask_build(loop, conn, 0)
            return
        last = ask.generation
        if ask.open:
            last = last - 1 if last > 1 else GENERATIONS
        if generation == last and ask.ended != NEVER:
            if view.status == 0 and whose(shared, conn, content, size, &sequence) == OTHERS:
                count_errors(loop, E_MISROUTED, 1)
            else:
                count_errors(loop, E_LATE if ask.ended == GIVEN_UP else E_DOUBLED, 1)
            return
    owner = whose(shared, conn, content, size, &sequence) if view.status == 0 else NOBODYS
    if owner == OTHERS:
        count_errors(loop, E_MISROUTED, 1)
    elif owner == MINE:
        count_errors(loop, E_DOUBLED, 1)
    else:
        count_errors(loop, E_UNEXPECTED, 1)

cdef void ask_due(Loop* loop, uint64_t now) noexcept nogil:
    """Open loop: send what the schedule wants sent by now, in turn over the connections."""
    cdef Shared* shared = loop.shared
    cdef double interval = shared.interval_ns
    cdef uint64_t budget = BURST if BURST < loop.left else loop.left
    cdef uint64_t due, share
    cdef uint32_t tried = 0
    cdef Conn* conn
    if loop.active_size == 0:
        if shared.serves:
            # nobody to push to: the schedule starts anew with the first one
            loop.next_ns = <double>now
        return
    if shared.serves:
        interval /= loop.active_size
    while loop.next_ns <= <double>now and loop.next_ns < <double>shared.end_ns and budget:
        if tried >= loop.active_size:
            return  # all full: the answers will bring us back, the schedule waits for nobody
        if loop.active_at >= loop.active_size:
            loop.active_at = 0
        conn = loop.active[loop.active_at]
        loop.active_at += 1
        tried += 1
        due = <uint64_t>((<double>now - loop.next_ns) / interval) + 1
        share = due / loop.active_size + (1 if due % loop.active_size else 0)
        while share and budget and can_ask(loop, conn) and loop.next_ns <= <double>now:
            ask_build(loop, conn, <uint64_t>loop.next_ns)
            loop.next_ns += interval
            share -= 1
            budget -= 1
            tried = 0
        conn_flush(loop, conn)
        if conn.broken:
            conn_close(loop, conn, now)
            if loop.active_size == 0:
                return

# --- answering ------------------------------------------------------------------------------------

cdef uint32_t mesh_answer_prefix(const FrameView* view, uint32_t content, uint8_t* out) noexcept nogil:
    """The same for a message that was consumed; 63 bytes at most."""
    cdef uint32_t at = write_response_head(view.id.number, view.hint, CMD_RESPONSE, 0, MESH_CLASS_BYTES,
                                           CONSUMED_BYTES, content, out)
    memcpy(out + at, MESH_CLASS, MESH_CLASS_BYTES)
    memcpy(out + at + MESH_CLASS_BYTES, CONSUMED, CONSUMED_BYTES)
    return at + MESH_CLASS_BYTES + CONSUMED_BYTES

cdef uint32_t answer_prefix(const FrameView* view, uint32_t status, uint32_t content,
                            uint8_t* out) noexcept nogil:
    # Header and class of the response to a request; 68 bytes at most. The checksum switch is the
    # request's.
    cdef const uint8_t* data = view.data
    cdef uint32_t class_size = RESPONSE_CLASS_BYTES if status == 0 else 0
    cdef uint32_t at
    out[0] = data[0]
    if data[0] == 1:
        out[1] = 0
        put16(out + 2, 2)
        memcpy(out + 4, data + 4, 6)  # version, id, codec
        at = 10
    else:
        out[1] = data[1]
        out[2] = 0
        put16(out + 3, 2)
        memcpy(out + 5, data + 5, 7)  # version, id, codec, switch
        at = 12
    put16(out + at, <uint16_t>status)
    put16(out + at + 2, <uint16_t>class_size)
    put16(out + at + 4, 0)
    put32(out + at + 6, content)
    memcpy(out + at + 10, RESPONSE_CLASS, class_size)
    return at + 10 + class_size

cdef inline uint32_t prefix_of(const Shared* shared, const FrameView* view, uint32_t status,
                               uint32_t content, uint8_t* out) noexcept nogil:
    if shared.mesh and status == 0:
        return mesh_answer_prefix(view, content, out)
    return answer_prefix(view, status, content, out)

cdef void answer_request(Loop* loop, Conn* conn, const FrameView* view,
                         uint64_t now) noexcept nogil:
    cdef Shared* shared = loop.shared
    cdef uint32_t at = (22 if view.data[0] == 1 else 24) + view.class_size + view.headers_size
    cdef uint32_t end = view.checksum_at if view.checksum_at else view.size
    cdef uint32_t status = shared.status
    cdef uint32_t content, prefix, crc
    cdef uint64_t delay = shared.delay_ns
    cdef uint8_t* out
    cdef Delayed* later
    cdef PushFields asked
    if shared.mesh and shared.serves and push_read(view, &asked) > 0:
        # a mesh announces its groups; a consumer without a mesh subscribes right here
        if (asked.op == OP_ANNOUNCE or asked.op == OP_SUBSCRIBE) and asked.group.size:
            if not conn.active and shared.interval_ns > 0:
                push_to(loop, conn, now)
    loop.answered_for_peer += 1
    content = end - at if status == 0 else 0
    if delay:
        if loop.delayed_bytes + content + sizeof(Delayed) + 72 <= DELAYED_BYTES_MAX:
            later = <Delayed*>malloc(sizeof(Delayed) + content + 72)
        else:
            later = NULL
        if later == NULL:
            loop.overloaded += 1
            status = 4  # SERVER_THREADPOOL_BUSY: said at once, because there is no room to wait in
            content = 0
            delay = 0
        else:
            out = <uint8_t*>(later + 1)
            prefix = prefix_of(shared, view, status, content, out)
            memcpy(out + prefix, view.data + at, content)
            later.size = prefix + content
            if view.checksum_at:
                put32(out + later.size, crc32_of(0, out, later.size))
                later.size += 4
            later.conn = conn
            later.epoch = conn.epoch
            later.due_ns = now + delay
            later.next = NULL
            if loop.delayed_tail != NULL:
                loop.delayed_tail.next = later
            else:
                loop.delayed = later
            loop.delayed_tail = later
            loop.delayed_bytes += later.size + sizeof(Delayed)
            return
    out = out_room(loop, conn, 72 + SMALL_BYTES + 4)
    prefix = prefix_of(shared, view, status, content, out)
    crc = 0
    if content <= SMALL_BYTES:
        memcpy(out + prefix, view.data + at, content)
        prefix += content
        if view.checksum_at:
            put32(out + prefix, crc32_of(0, out, prefix))
            prefix += 4
        out_arena(loop, prefix)
        return
    out_arena(loop, prefix)
    out_add(loop, view.data + at, content)
    if view.checksum_at:
        crc = crc32_of(crc32_of(0, out, prefix), view.data + at, content)
        put32(loop.arena + loop.arena_used, crc)
        out_arena(loop, 4)

cdef void send_delayed(Loop* loop, uint64_t now) noexcept nogil:
    cdef Delayed* later
    cdef Delayed* spent = NULL
    cdef Conn* conn
    while loop.delayed != NULL and loop.delayed.due_ns <= now:
        conn = loop.delayed.conn
        # One send for neighbours of the same connection; their memory is ours until it is done.
        while loop.delayed != NULL and loop.delayed.due_ns <= now and loop.delayed.conn == conn:
            later = loop.delayed
            loop.delayed = later.next
            if loop.delayed == NULL:
                loop.delayed_tail = NULL
            loop.delayed_bytes -= later.size + sizeof(Delayed)
            if conn.state == UP and conn.epoch == later.epoch:
                out_room(loop, conn, 0)
                out_add(loop, <uint8_t*>(later + 1), later.size)
            later.next = spent
            spent = later
        conn_flush(loop, conn)
        while spent != NULL:
            later = spent
            spent = later.next
            free(later)
        if conn.broken:
            conn_close(loop, conn, now)

# --- connections ----------------------------------------------------------------------------------

cdef void conn_activate(Loop* loop, Conn* conn) noexcept nogil:
    conn.active = 1
    conn.place = loop.active_size
    loop.active[loop.active_size] = conn
    loop.active_size += 1

cdef void conn_deactivate(Loop* loop, Conn* conn) noexcept nogil:
    cdef Conn* moved
    if conn.place >= loop.active_size or loop.active[conn.place] != conn:
        return
    loop.active_size -= 1
    moved = loop.active[loop.active_size]
    loop.active[conn.place] = moved
    moved.place = conn.place

cdef void conn_drop(Loop* loop, Conn* conn) noexcept nogil:
    # The socket and its buffers go; what was asked on it will not be answered.
    cdef uint32_t i
    if conn.fd >= 0:
        close_(conn.fd)  # takes it out of epoll, too
        conn.fd = -1
    free(conn.in_data)
    free(conn.out_data)
    conn.in_data = NULL
    conn.out_data = NULL
    conn.in_size = conn.in_room = conn.out_at = conn.out_size = conn.out_room = 0
    conn.broken = conn.paused = conn.want_out = 0
    if conn.in_flight:
        for i in range(conn.made):
            if conn.asks[i].open:
                count_errors(loop, E_LOST, 1)
                ask_end(loop, &conn.asks[i], GIVEN_UP)
    conn_deactivate(loop, conn)

cdef void conn_wait(Loop* loop, Conn* conn, uint64_t due_ns) noexcept nogil:
    conn.state = WAITING
    conn.due_ns = due_ns
    conn.next = NULL
    if loop.waiting_tail != NULL:
        loop.waiting_tail.next = conn
    else:
        loop.waiting = conn
    loop.waiting_tail = conn

cdef void conn_close(Loop* loop, Conn* conn, uint64_t now) noexcept nogil:
    """An UP connection ended without our doing."""
    if conn.state != UP:
        return
    loop.up -= 1
    loop.resets += conn.was_reset
    conn.ended_once = 1
    conn.was_reset = 0
    conn_drop(loop, conn)
    if loop.shared.serves:
        conn.state = FREE
        conn.next = loop.spare
        loop.spare = conn
        return
    count_errors(loop, E_DISCONNECTED, 1)
    if loop.phase <= RUN:
        loop.to_come += 1
        conn_wait(loop, conn, now + RETRY_NS)
    else:
        conn.state = DEAD

cdef void conn_failed(Loop* loop, Conn* conn, uint64_t now) noexcept nogil:
    """A connection that did not come up: again in a moment, unless the time for it is over."""
    loop.connecting -= 1
    count_errors(loop, E_CONNECT_FAILED, 1)
    conn_drop(loop, conn)
    if loop.phase <= RUN and (loop.phase != CONNECT or now + RETRY_NS < loop.connect_until_ns):
        conn_wait(loop, conn, now + RETRY_NS)
    else:
        conn.state = DEAD
        loop.to_come -= 1

cdef void conn_up(Loop* loop, Conn* conn) noexcept nogil:
    conn.state = UP
    conn.want_out = 0
    loop.connecting -= 1
    loop.to_come -= 1
    loop.up += 1
    conn_watch(loop, conn)
    if loop.shared.greeting_size:
        memcpy(out_room(loop, conn, loop.shared.greeting_size), loop.shared.greeting,
               loop.shared.greeting_size)
        out_arena(loop, loop.shared.greeting_size)
        conn_flush(loop, conn)
    if conn.active:
        conn_activate(loop, conn)
        if asking(loop) and loop.shared.closed:
            conn_fill(loop, conn)

cdef int conn_connect(Loop* loop, Conn* conn, uint64_t now) noexcept nogil:
    """Begin to connect. 0, or -1 = the other side's backlog is full (UNIX sockets say so): later.
    """
    cdef Shared* shared = loop.shared
    cdef epoll_event event
    cdef int result
    conn.fd = socket_(shared.domain, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    loop.connecting += 1
    conn.state = CONNECTING
    if conn.fd < 0:
        conn_failed(loop, conn, now)
        return 0
    no_delay(conn.fd)  # a UNIX socket refuses: it needs none
    result = connect_(conn.fd, <const sockaddr*>shared.address, shared.address_size)
    if result < 0 and errno == EAGAIN:
        close_(conn.fd)
        conn.fd = -1
        loop.connecting -= 1
        return -1
    if result < 0 and errno != EINPROGRESS:
        conn_failed(loop, conn, now)
        return 0
    conn.epoch += 1
    conn.want_out = 1
    conn.due_ns = now + shared.connect_ns
    event.events = EPOLLOUT
    event.data.ptr = conn
    if epoll_ctl(loop.epoll, EPOLL_CTL_ADD, conn.fd, &event) < 0:
        conn_failed(loop, conn, now)
        return 0
    if result == 0:
        conn_up(loop, conn)
    return 0

cdef void connect_due(Loop* loop, uint64_t now) noexcept nogil:
    cdef Conn* conn
    while loop.waiting != NULL and loop.waiting.due_ns <= now and loop.connecting < CONNECTING_MAX:
        if loop.shared.connect_interval_ns > 0 and loop.next_connect_ns > <double>now:
            return
        conn = loop.waiting
        loop.waiting = conn.next
        if loop.waiting == NULL:
            loop.waiting_tail = NULL
        loop.next_connect_ns += loop.shared.connect_interval_ns
        if conn_connect(loop, conn, now) < 0:
            # It goes back to the front: the backlog needs a moment, not a place at the end.
            conn.state = WAITING
            conn.due_ns = now + 1000000
            conn.next = loop.waiting
            loop.waiting = conn
            if loop.waiting_tail == NULL:
                loop.waiting_tail = conn
            return

cdef void accept_ready(Loop* loop, uint64_t now) noexcept nogil:
    cdef int fd, _
    cdef Conn* conn
    cdef epoll_event event
    for _ in range(ACCEPTS):
        fd = accept4(loop.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd < 0:
            if errno == EMFILE or errno == ENFILE:
                epoll_ctl(loop.epoll, EPOLL_CTL_DEL, loop.listener, NULL)
                loop.listener_paused = 1
                loop.listen_again_ns = now + ACCEPT_RETRY_NS
            elif errno == ECONNABORTED or errno == EINTR:
                continue
            return
        conn = loop.spare
        if conn != NULL:
            loop.spare = conn.next
        elif loop.conns_made < C_CONNECTIONS_MAX:
            conn = <Conn*>calloc(1, sizeof(Conn))
            if conn != NULL:
                conn.number = loop.conns_made
                loop.conns[loop.conns_made] = conn
                loop.conns_made += 1
        if conn == NULL:
            close_(fd)
            continue
        no_delay(fd)
        conn.fd = fd
        conn.epoch += 1
        conn.active = 0
        conn.answered_ns = 0
        conn.place = UINT32_MAX
        conn.next = NULL
        conn.state = UP
        event.events = EPOLLIN
        event.data.ptr = conn
        loop.up += 1
        loop.accepted += 1
        if epoll_ctl(loop.epoll, EPOLL_CTL_ADD, fd, &event) < 0:
            conn_close(loop, conn, now)
            continue
        if loop.shared.interval_ns > 0 and loop.shared.push_at_once:
            push_to(loop, conn, now)

cdef void push_to(Loop* loop, Conn* conn, uint64_t now) noexcept nogil:
    # From now on this connection is pushed to.
    if conn.asks == NULL:
        conn.asks = <Ask*>malloc(loop.shared.depth * sizeof(Ask))
        if conn.asks == NULL:
            return
    if loop.active_size == 0:
        loop.next_ns = <double>now
    conn_activate(loop, conn)

# --- reading --------------------------------------------------------------------------------------

cdef int keep_rest(Conn* conn, uint8_t* at, size_t left, size_t need) noexcept nogil:
    """Keep the beginning of a frame until the rest comes; the codec has checked `need` against the
    limit. -1 = no memory.
    """
    cdef uint8_t* data
    cdef size_t room
    if left == 0:
        free(conn.in_data)
        conn.in_data = NULL
        conn.in_size = conn.in_room = 0
        return 0
    if need < left:
        need = left
    if conn.in_data == NULL or conn.in_room < need + 1:
        # a little more than the frame, so that the next header tends to come with it
        room = need + 4096
        data = <uint8_t*>malloc(room)
        if data == NULL:
            return -1
        memcpy(data, at, left)
        free(conn.in_data)
        conn.in_data = data
        conn.in_room = room
    elif at != conn.in_data:
        memmove(conn.in_data, at, left)
    conn.in_size = left
    return 0

cdef void conn_read(Loop* loop, Conn* conn) noexcept nogil:
    cdef Shared* shared = loop.shared
    cdef FrameView view
    cdef PushFields said
    cdef ParseStatus status
    cdef uint8_t* at
    cdef uint8_t* out
    cdef size_t left, need = 0
    cdef ssize_t n
    cdef uint64_t now
    if conn.in_size:
        n = recv(conn.fd, conn.in_data + conn.in_size, conn.in_room - conn.in_size, MSG_DONTWAIT)
    else:
        n = recv(conn.fd, loop.area, AREA_BYTES, MSG_DONTWAIT)
    if n <= 0:
        if n == 0 or (errno != EAGAIN and errno != EINTR):
            conn.was_reset = n < 0 and errno == ECONNRESET
            conn_close(loop, conn, now_ns())
        return
    now = now_ns()
    if conn.in_size:
        at = conn.in_data
        left = conn.in_size + <size_t>n
    else:
        at = loop.area
        left = <size_t>n
    if shared.serves:
        loop.bytes_in += <uint64_t>n
        if shared.interval_ns > 0 and not conn.active and not shared.mesh:
            push_to(loop, conn, now)
    while left:
        status = BOLT.scan(NULL, at, left, &shared.limits, 0, &view)
        if status != PARSE_OK:
            if status == PARSE_NEED_MORE:
                need = view.need
                break
            count_errors(loop, E_UNDECODABLE, 1)
            conn_flush(loop, conn)
            conn_close(loop, conn, now)
            return
        if view.kind == FRAME_RESPONSE and view.id.number >= GREETING_ID:
            if push_read(&view, &said) <= 0 or said.result != RESULT_CONSUMED:
                count_errors(loop, E_REFUSED, 1)     # our hello or subscribe
        elif view.kind == FRAME_RESPONSE:
            take_answer(loop, conn, &view, now)
        elif view.kind == FRAME_REQUEST:
            answer_request(loop, conn, &view, now)
        elif view.kind == FRAME_ONEWAY:
            loop.oneways += 1
        elif view.kind == FRAME_HEARTBEAT:
            loop.heartbeats += 1
            out = out_room(loop, conn, BOLT.answer_bytes_max)
            out_arena(loop, BOLT.heartbeat_ack(&view, out))
        elif view.kind == FRAME_GOAWAY and not shared.serves:
            # No ordinary client understands it: whoever sends it to us would break real ones.
            count_errors(loop, E_UNEXPECTED, 1)
        at += view.size
        left -= view.size
    conn_flush(loop, conn)
    if conn.broken or keep_rest(conn, at, left, need) < 0:
        conn_close(loop, conn, now)

cdef void conn_write(Loop* loop, Conn* conn) noexcept nogil:
    cdef iovec rest
    cdef ssize_t n
    if conn.out_size:
        rest.iov_base = conn.out_data + conn.out_at
        rest.iov_len = conn.out_size
        n = send_all(conn.fd, &rest, 1)
        if n < 0:
            if errno != EAGAIN and errno != EINTR:
                conn.was_reset = errno == ECONNRESET
                conn_close(loop, conn, now_ns())
            return
        if loop.shared.serves:
            loop.bytes_out += <uint64_t>n
        conn.out_at += <size_t>n
        conn.out_size -= <size_t>n
    if conn.out_size == 0:
        free(conn.out_data)
        conn.out_data = NULL
        conn.out_at = conn.out_room = 0
        conn.want_out = 0
        conn.paused = 0
        conn_watch(loop, conn)
    elif conn.paused and conn.out_size < OUT_PAUSE_BYTES // 2:
        conn.paused = 0
        conn_watch(loop, conn)

# --- the turn -------------------------------------------------------------------------------------

cdef void wake_all(Loop* loops, uint32_t count) noexcept nogil:
    cdef uint64_t one = 1
    cdef uint32_t i
    for i in range(count):
        if write_(loops[i].wake, &one, 8) < 0:
            pass  # the counter is full: it is awake

cdef void begin_drain(Loop* loop, uint64_t now) noexcept nogil:
    cdef double late
    cdef Part* section = section_of(loop)
    cdef uint32_t i
    # Who has waited the longest has no answer yet that would tell.
    for i in range(loop.conns_made):
        if loop.conns[i].active:
            count_gap(section, loop.conns[i], loop.shared.end_ns)
    loop.cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID) - loop.cpu_begin_ns
    if loop.phase == WARM:
        loop.cpu_ns = 0
    loop.phase = DRAIN
    if not loop.shared.closed and loop.left:
        late = <double>loop.shared.end_ns - loop.next_ns
        if late > 0:
            count_errors(loop, E_UNSENT, <uint64_t>(late / loop.shared.interval_ns) + 1)

cdef void load_phase(Loop* loop, Loop* all_loops, uint64_t now) noexcept nogil:
    """Where a load run is: connections, then warm-up, the measured window, and the wait for the
    last answers.
    """
    cdef Shared* shared = loop.shared
    cdef uint32_t stop = load32(&shared.stop)
    cdef uint32_t i
    cdef double turn
    cdef Conn* conn
    if stop == 2:
        loop.phase = DONE
        return
    if loop.phase == CONNECT:
        if now >= loop.connect_until_ns and loop.to_come:
            for i in range(loop.conns_made):
                conn = loop.conns[i]
                if conn.state == CONNECTING:
                    conn_failed(loop, conn, now)
                elif conn.state == WAITING:
                    count_errors(loop, E_CONNECT_FAILED, 1)
                    loop.to_come -= 1
                conn.state = DEAD if conn.state != UP else UP
            loop.waiting = loop.waiting_tail = NULL
        if loop.to_come == 0 and not loop.joined:
            loop.joined = 1
            if add32(&shared.ready, 1) == shared.threads:
                shared.begin_ns = now + shared.warmup_ns
                shared.end_ns = shared.begin_ns + shared.duration_ns
                store32(&shared.go, 1)
                wake_all(all_loops, shared.threads)
        if stop:
            loop.phase = DONE
            return
        if not load32(&shared.go):
            return
        loop.phase = WARM
        loop.began = loop.up
        for i in range(loop.conns_made):
            loop.conns[i].ended_once = 0
            loop.conns[i].answered_ns = now
        # Threads take turns within one interval, so that together they are one even stream.
        turn = <double>(loop - all_loops) / shared.threads
        loop.next_ns = <double>now + shared.interval_ns * turn
        if loop.up == 0:
            loop.phase = DONE
            return
        if shared.closed:
            i = 0
            while i < loop.active_size:
                conn = loop.active[i]
                conn_fill(loop, conn)
                if conn.broken:
                    conn_close(loop, conn, now)
                else:
                    i += 1
    if loop.phase == WARM and now >= shared.begin_ns:
        loop.phase = RUN
        loop.cpu_begin_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID)
    if loop.phase == WARM or loop.phase == RUN:
        if stop and shared.end_ns > now:
            shared.end_ns = now  # every thread does the same within a moment
        if now >= shared.end_ns:
            if not shared.closed:
                # What was due before the end and could not be sent because this thread came late
                # is sent now: only full connections leave a request unsent.
                ask_due(loop, shared.end_ns)
            begin_drain(loop, now)
    if (loop.phase == WARM or loop.phase == RUN) and loop.left == 0 and loop.in_flight == 0:
        loop.cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID) - loop.cpu_begin_ns
        loop.finished_ns = now
        loop.phase = DONE
    if loop.phase == DRAIN and loop.in_flight == 0:
        loop.phase = DONE

cdef void give_up_due(Loop* loop, uint64_t now) noexcept nogil:
    # Requests that waited past their time are lost; the closed loop goes on without them.
    cdef Ask* ask = loop.oldest
    cdef Conn* conn
    while ask != NULL and ask.sent_ns and ask.sent_ns + loop.shared.timeout_ns <= now:
        conn = ask.conn
        count_errors(loop, E_LOST, 1)
        ask_end(loop, ask, GIVEN_UP)
        if loop.shared.closed and asking(loop) and conn.state == UP and conn.active:
            ask_build(loop, conn, 0)
            conn_flush(loop, conn)
            if conn.broken:
                conn_close(loop, conn, now)
        ask = loop.oldest

cdef int64_t sleep_ns(const Loop* loop, uint64_t now) noexcept nogil:
    """Until the next thing that is due; -1 = only an event wakes us."""
    cdef const Shared* shared = loop.shared
    cdef uint64_t due = UINT64_MAX
    cdef uint64_t at
    if loop.oldest != NULL:
        due = loop.oldest.sent_ns + shared.timeout_ns
    elif loop.phase == DRAIN or loop.left == 0:
        return 0  # the last answer was given up a moment ago: nothing is left to wake us
    if loop.phase == CONNECT:
        if loop.to_come and loop.connect_until_ns < due:
            due = loop.connect_until_ns
    elif loop.phase == WARM:
        if shared.begin_ns < due:
            due = shared.begin_ns
    if loop.phase == WARM or loop.phase == RUN:
        if shared.end_ns < due:
            due = shared.end_ns
        if not shared.closed and shared.interval_ns > 0 \
                and loop.in_flight < shared.depth * loop.active_size \
                and not load32(<uint32_t*>&shared.stop_push):
            at = <uint64_t>loop.next_ns + 1
            if at < due:
                due = at
    if loop.waiting != NULL and loop.connecting < CONNECTING_MAX:
        at = loop.waiting.due_ns
        if shared.connect_interval_ns > 0 and <uint64_t>loop.next_connect_ns + 1 > at:
            at = <uint64_t>loop.next_connect_ns + 1
        if at < due:
            due = at
    if loop.delayed != NULL and loop.delayed.due_ns < due:
        due = loop.delayed.due_ns
    if loop.listener_paused and loop.listen_again_ns < due:
        due = loop.listen_again_ns
    if due == UINT64_MAX:
        return -1
    return <int64_t>(due - now) if due > now else 0

cdef void* loop_body(void* argument) noexcept nogil:
    cdef Loop* loop = <Loop*>argument
    cdef Shared* shared = loop.shared
    cdef Loop* all_loops = (<Loop**>loop.area)[0]
    cdef epoll_event events[512]
    cdef epoll_event event
    cdef Conn* conn
    cdef uint64_t now = now_ns()
    cdef uint64_t one = 1
    cdef uint32_t turns = 0
    cdef int64_t wait
    cdef int n, i
    thread_begin(b"fastmesh-echo" if shared.serves else b"fastmesh-load")
    loop.phase = RUN if shared.serves else CONNECT
    loop.connect_until_ns = now + shared.connect_ns
    loop.next_connect_ns = <double>now
    loop.next_ns = <double>now
    while True:
        now = now_ns()
        if shared.serves:
            if load32(&shared.stop):
                break
            if loop.listener_paused and now >= loop.listen_again_ns:
                event.events = EPOLLIN | (EPOLLEXCLUSIVE if shared.threads > 1 else 0)
                event.data.ptr = &loop.listener
                if epoll_ctl(loop.epoll, EPOLL_CTL_ADD, loop.listener, &event) == 0:
                    loop.listener_paused = 0
                else:
                    loop.listen_again_ns = now + ACCEPT_RETRY_NS
        else:
            if loop.waiting != NULL:
                connect_due(loop, now)
            load_phase(loop, all_loops, now)
            if loop.phase == DONE:
                break
        if loop.delayed != NULL:
            send_delayed(loop, now)
        if loop.oldest != NULL:
            give_up_due(loop, now)
        if shared.interval_ns > 0 and asking(loop) and not load32(&shared.stop_push):
            ask_due(loop, now)
        turns += 1
        wait = sleep_ns(loop, now)
        if wait > 0:
            wait = sleep_ns(loop, now_ns())  # sending took its time, and the open loop counts it
        if wait < 0 or turns & 1023 == 0:
            loop.cpu_all_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID)
        n = epoll_wait_ns(loop.epoll, events, EVENTS, wait)
        for i in range(n):
            if events[i].data.ptr == &loop.wake:
                if read_(loop.wake, &one, 8) < 0:
                    pass  # somebody else's news was read with ours
                continue
            if events[i].data.ptr == &loop.listener:
                accept_ready(loop, now)
                continue
            conn = <Conn*>events[i].data.ptr
            if conn.state == CONNECTING:
                if events[i].events & (EPOLLERR | EPOLLHUP) or socket_error(conn.fd):
                    conn_failed(loop, conn, now)
                else:
                    conn_up(loop, conn)
                continue
            if conn.state == UP and events[i].events & EPOLLOUT:
                conn_write(loop, conn)
            if conn.state == UP and events[i].events & ~(<uint32_t>EPOLLOUT):
                conn_read(loop, conn)
    loop.phase = DONE
    # What is still owed here was given up by our own doing (stop), so nobody lost it.
    for i in range(<int>loop.conns_made):
        conn = loop.conns[i]
        loop.kept += conn.state == UP and not conn.ended_once
        if conn.fd >= 0:
            close_(conn.fd)
            conn.fd = -1
        conn.state = DEAD
    loop.up = 0
    loop.cpu_all_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID)
    if add32(&shared.gone, 1) == shared.threads:
        if write_(shared.done, &one, 8) < 0:
            pass  # cannot be: nobody else writes there
    return NULL

# --- Python's side --------------------------------------------------------------------------------

cdef void loops_free(Shared* shared, Loop* loops) noexcept:
    """The threads have ended or were never started."""
    cdef uint32_t i, j
    cdef Delayed* later
    if loops != NULL:
        for i in range(shared.threads):
            for j in range(loops[i].conns_made):
                if loops[i].conns[j].fd >= 0:
                    close_(loops[i].conns[j].fd)
                free(loops[i].conns[j].asks)
                free(loops[i].conns[j].in_data)
                free(loops[i].conns[j].out_data)
                free(loops[i].conns[j])
            while loops[i].delayed != NULL:
                later = loops[i].delayed
                loops[i].delayed = later.next
                free(later)
            free(loops[i].conns)
            free(loops[i].active)
            free(loops[i].area)
            free(loops[i].arena)
            if loops[i].epoll > 0:
                close_(loops[i].epoll)
            if loops[i].wake > 0:
                close_(loops[i].wake)
        free(loops)
    free(shared.size)
    free(shared.fill)
    free(shared.prefix)
    free(shared.greeting)
    if shared.done > 0:
        close_(shared.done)
    memset(shared, 0, sizeof(Shared))


ERROR_KINDS = (
    "lost",
    "doubled",
    "misrouted",
    "torn",
    "unexpected",
    "late",
    "undecodable",
    "disconnected",
    "connect_failed",
    "unsent",
    "refused",
)
BODY_BYTES_MIN = NAME_BYTES
BODY_BYTES_MAX = C_BODY_MAX
CONNECTIONS_MAX = C_CONNECTIONS_MAX
DEPTH_MAX = C_DEPTH_MAX
THREADS_MAX = C_THREADS_MAX
SECTIONS_MAX = SECTIONS
_STATES = ("new", "connecting", "warmup", "running", "draining", "done")


class Latency(NamedTuple):
    samples: int
    mean_ns: float
    p50_ns: int
    p90_ns: int
    p99_ns: int
    p999_ns: int
    max_ns: int


class Progress(NamedTuple):
    state: str
    elapsed_s: float
    connections: int
    sent: int
    answered: int
    in_flight: int
    errors: int


class Section(NamedTuple):
    begin_s: float
    answered: int
    gap_ms_max: float
    latency_ms_max: float
    errors: dict


class LoadResult(NamedTuple):
    ok: bool
    duration_s: float
    connections: int
    sent: int
    answered: int
    throughput_per_s: float
    bytes_out: int
    bytes_in: int
    latency: Latency
    errors: dict
    histogram: list
    cpu_share: float
    answered_for_peer: int
    sent_total: int
    kept: int
    resets: int
    gap_ms_max: float
    first_error_s: float | None
    last_error_s: float | None
    sections: list


class EchoStats(NamedTuple):
    connections: int
    accepted: int
    requests: int
    oneways: int
    heartbeats: int
    undecodable: int
    overloaded: int
    bytes_in: int
    bytes_out: int
    cpu_s: float


def _parse(address):
    """(family, what bind() and connect() of the socket module take) of an address as load.pyi
    writes it.
    """
    if address.startswith("unix:"):
        path = address[5:]
        if not path or len(os.fsencode(path)) > 107:
            raise ValueError(f"UNIX socket path must have 1 to 107 bytes: {address!r}")
        return socket.AF_UNIX, path
    found = re.fullmatch(r"(?:\[([^]]+)]|([^:\[\]]+)):(\d{1,5})", address)
    if not found or int(found[3]) > 65535:
        raise ValueError(f'address must be "host:port", "[ipv6]:port" or "unix:path": {address!r}')
    family, _, _, _, where = socket.getaddrinfo(
        found[1] or found[2], int(found[3]), type=socket.SOCK_STREAM
    )[0]
    return family, where


def _sockaddr(family, where):
    """The kernel's form of an address: struct sockaddr_un, _in or _in6."""
    if family == socket.AF_UNIX:
        return struct.pack("=H", family) + os.fsencode(where) + b"\0"
    if family == socket.AF_INET:
        port = struct.pack("!H", where[1])
        return struct.pack("=H", family) + port + socket.inet_aton(where[0]) + bytes(8)
    return (
        struct.pack("=H", family)
        + struct.pack("!HI", where[1], where[2])
        + socket.inet_pton(family, where[0])
        + struct.pack("=I", where[3])
    )


def _between(name, value, least, most):
    if not least <= value <= most:
        raise ValueError(f"{name} must be {least} to {most}: {value!r}")
    return value


def _greeting(consume, timeout_ms):
    """hello and subscribe of a consumer: (app, client, group, prefetch)."""
    app, client, group, prefetch = consume
    hello = {"fm.op": "hello", "fm.protocol": "1", "fm.app": app, "fm.client": client}
    subscribe = {"fm.op": "subscribe", "fm.group": group, "fm.prefetch": str(prefetch)}
    return push_request(GREETING_ID, hello, timeout_ms=timeout_ms) + push_request(
        GREETING_ID + 1, subscribe, timeout_ms=timeout_ms
    )


def _request_prefix(version, crc, timeout_ms, service, headers):
    """Everything of a request in front of its body; id and body length are filled in per request.
    """
    pairs = ([("service", service)] if service else []) + list(headers)
    section = b""
    for key, value in pairs:
        for text in (key, value):
            data = text.encode()
            section += struct.pack("!i", len(data)) + data
    _between("header section", len(section), 0, 32767)  # read as signed by Java and JavaScript
    cls = REQUEST_CLASS[:REQUEST_CLASS_BYTES]
    if version == 1:
        head = struct.pack("!BBHBIBiHHI", 1, 1, 1, 1, 0, 1, timeout_ms, len(cls), len(section), 0)
    else:
        head = struct.pack(
            "!BBBHBIBBiHHI", 2, 2 if crc else 1, 1, 1, 1, 0, 1, 1 if crc else 0, timeout_ms,
            len(cls), len(section), 0,
        )
    return head + cls + section


cdef class _Threads:
    """What a run and a service have in common: the memory, the threads, their end and their
    figures.
    """

    cdef Shared shared
    cdef Loop* loops
    cdef bint started
    cdef bint ended

    cdef int _set_up(self, threads, sizes, prefix, seed, uint32_t conns_room) except -1:
        """Allocate everything; MemoryError and OSError leave it to __dealloc__."""
        cdef Shared* shared = &self.shared
        cdef uint64_t state
        cdef uint64_t word
        cdef size_t fill_size, i
        cdef uint32_t t
        cdef Loop* loop
        cdef epoll_event event
        cdef const uint8_t[::1] view
        sizes = tuple(sizes)
        _between("number of sizes", len(sizes), 1, 4096)
        for size in sizes:
            if size:
                _between("a body size other than 0", size, NAME_BYTES, C_BODY_MAX)
        state = seed or int.from_bytes(os.urandom(8), "little")
        shared.run = draw(&state)
        shared.sizes = len(sizes)
        shared.size = <uint32_t*>malloc(len(sizes) * sizeof(uint32_t))
        shared.prefix_size = len(prefix)
        shared.prefix = <uint8_t*>malloc(len(prefix) + 1)
        fill_size = <size_t>max(sizes) + FILL_SLICES * FILL_STEP + 8
        shared.fill = <uint8_t*>malloc(fill_size)
        shared.threads = threads
        self.loops = <Loop*>calloc(threads, sizeof(Loop))
        if shared.size == NULL or shared.prefix == NULL or shared.fill == NULL \
                or self.loops == NULL:
            if self.loops == NULL:
                shared.threads = 0
            raise MemoryError
        for i, size in enumerate(sizes):
            shared.size[i] = size
        view = prefix
        if len(prefix):
            memcpy(shared.prefix, &view[0], len(prefix))
        for i in range(fill_size // 8):
            word = draw(&state)
            memcpy(shared.fill + i * 8, &word, 8)
        shared.done = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        shared.begin_ns = shared.end_ns = UINT64_MAX
        if shared.done < 0:
            raise OSError(errno, os.strerror(errno))
        for t in range(shared.threads):
            loop = &self.loops[t]
            loop.shared = shared
            loop.listener = -1
            loop.left = UINT64_MAX
            loop.draws = draw(&state)
            loop.conns = <Conn**>calloc(conns_room, sizeof(void*))
            loop.active = <Conn**>calloc(conns_room, sizeof(void*))
            loop.area = <uint8_t*>malloc(AREA_BYTES)
            loop.arena = <uint8_t*>malloc(ARENA_BYTES)
            if loop.conns == NULL or loop.active == NULL or loop.area == NULL or loop.arena == NULL:
                raise MemoryError
            loop.epoll = epoll_create1(EPOLL_CLOEXEC)
            loop.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
            if loop.epoll < 0 or loop.wake < 0:
                raise OSError(errno, os.strerror(errno))
            event.events = EPOLLIN
            event.data.ptr = &loop.wake
            if epoll_ctl(loop.epoll, EPOLL_CTL_ADD, loop.wake, &event) < 0:
                raise OSError(errno, os.strerror(errno))
        return 0

    cdef int _start(self) except -1:
        cdef uint32_t t
        cdef int error
        if self.started:
            raise RuntimeError("already started")
        self.started = True
        self.shared.started_ns = now_ns()
        for t in range(self.shared.threads):
            # The thread finds its siblings through the first word of its area, which it has not
            # used yet.
            (<Loop**>self.loops[t].area)[0] = self.loops
            error = thread_start(&self.loops[t].thread, loop_body, &self.loops[t])
            if error:
                self._ask_stop(2)
                # Those that never ran count as gone, so that the end can be waited for.
                if add32(&self.shared.gone, self.shared.threads - t) == self.shared.threads:
                    write_(self.shared.done, b"\1\0\0\0\0\0\0\0", 8)
                self._join(t)
                raise OSError(error, os.strerror(error))
        return 0

    cdef void _ask_stop(self, uint32_t how) noexcept:
        if load32(&self.shared.stop) < how:
            store32(&self.shared.stop, how)
        if self.loops != NULL:
            wake_all(self.loops, self.shared.threads)

    cdef void _join(self, uint32_t count) noexcept:
        cdef uint32_t t
        if self.ended or not self.started:
            return
        self.ended = True
        with nogil:
            for t in range(count):
                pthread_join(self.loops[t].thread, NULL)

    cdef bint _wait(self, timeout_s) except -1:
        cdef pollfd fds
        cdef int n, slice_ms
        cdef uint64_t until = UINT64_MAX
        cdef uint64_t now, left
        if not self.started:
            raise RuntimeError("was never started")
        if self.ended:
            return True
        if timeout_s is not None:
            until = now_ns() + <uint64_t>(max(0.0, timeout_s) * 1e9)
        while True:
            now = now_ns()
            slice_ms = 100  # Ctrl-C is looked for this often
            if until != UINT64_MAX:
                left = (until - now) // 1000000 + 1 if now < until else 0
                if left < 100:
                    slice_ms = <int>left
            with nogil:
                fds.fd = self.shared.done
                fds.events = POLLIN
                n = poll(&fds, 1, slice_ms)
            if n > 0:
                self._join(self.shared.threads)
                return True
            PyErr_CheckSignals()
            if now >= until:
                return False

    def __dealloc__(self):
        if self.started and not self.ended:
            self._ask_stop(2)
            self._join(self.shared.threads)
        loops_free(&self.shared, self.loops)
        self.loops = NULL

    cdef object _result(self, uint64_t begin, uint64_t end, uint32_t connections):
        cdef uint32_t t, i
        cdef uint64_t total, max_ns = 0
        cdef Loop* loop
        errors = dict.fromkeys(ERROR_KINDS, 0)
        statuses = {}
        histogram = []
        sent = answered = bytes_in = bytes_out = samples = sum_ns = for_peer = sent_total = 0
        kept = resets = 0
        first = last = None
        cpu = 0.0
        for t in range(self.shared.threads):
            loop = &self.loops[t]
            sent += loop.sent
            answered += loop.answered
            bytes_in += loop.bytes_in
            bytes_out += loop.bytes_out
            samples += loop.samples
            sum_ns += loop.sum_ns
            if loop.max_ns > max_ns:
                max_ns = loop.max_ns
            for_peer += loop.answered_for_peer
            sent_total += loop.sent_total
            kept += loop.kept
            resets += loop.resets
            if loop.first_error_ns:
                first = min(first or UINT64_MAX, loop.first_error_ns)
                last = max(last or 0, loop.last_error_ns)
            if end > begin:
                cpu = max(cpu, <double>loop.cpu_ns / <double>(end - begin))
            for i, kind in enumerate(ERROR_KINDS):
                errors[kind] += loop.errors[i]
            for i in range(<uint32_t>STATUS_ROWS):
                if loop.status_count[i]:
                    name = f"status.{loop.status[i]}"
                    statuses[name] = statuses.get(name, 0) + loop.status_count[i]
        for i in range(<uint32_t>HISTOGRAM):
            total = 0
            for t in range(self.shared.threads):
                total += self.loops[t].histogram[i]
            if total:
                histogram.append((bucket_bound(i), total))
        errors.update(sorted(statuses.items()))
        counted = sum(count for _, count in histogram)
        slowest = max_ns

        def quantile(q):
            seen = 0
            for bound, count in histogram:
                seen += count
                if seen >= q * counted:
                    return min(bound, slowest)
            return 0

        duration = (end - begin) / 1e9 if end > begin else 0.0
        # A run that never began has errors all the same.
        since = begin or self.shared.started_ns
        sections = [self._section(i, since) for i in range(self.shared.section + 1)]
        return LoadResult(
            ok=(answered > 0 or (self.shared.greeting_size and for_peer > 0))
            and not any(errors.values()),
            duration_s=duration,
            connections=connections,
            sent=sent,
            answered=answered,
            throughput_per_s=answered / duration if duration else 0.0,
            bytes_out=bytes_out,
            bytes_in=bytes_in,
            latency=Latency(
                samples, sum_ns / samples if samples else 0.0,
                quantile(0.5), quantile(0.9), quantile(0.99), quantile(0.999), max_ns,
            ),
            errors=errors,
            histogram=histogram,
            cpu_share=cpu,
            answered_for_peer=for_peer,
            sent_total=sent_total,
            kept=kept,
            resets=resets,
            gap_ms_max=max(section.gap_ms_max for section in sections),
            first_error_s=None if first is None else (<double>first - <double>since) / 1e9,
            last_error_s=None if last is None else (<double>last - <double>since) / 1e9,
            sections=sections,
        )

    cdef object _section(self, uint32_t at, uint64_t since):
        cdef uint32_t t
        cdef Part* part
        errors = dict.fromkeys((*ERROR_KINDS, "status"), 0)
        answered = gap = slowest = 0
        for t in range(self.shared.threads):
            part = &self.loops[t].sections[at]
            answered += part.answered
            gap = max(gap, part.gap_ns)
            slowest = max(slowest, part.slowest_ns)
            for i, kind in enumerate(errors):
                errors[kind] += part.errors[i]
        begin_s = (<double>self.shared.section_ns[at] - <double>since) / 1e9 if at else 0.0
        return Section(
            begin_s, answered, gap / 1e6, slowest / 1e6, {k: n for k, n in errors.items() if n}
        )


cdef class LoadRun(_Threads):
    def __init__(
        self,
        target,
        *,
        connections=64,
        depth=0,
        sizes=(256,),
        threads=1,
        duration_ms=5000,
        warmup_ms=500,
        rate=0.0,
        connect_rate=0.0,
        connect_timeout_ms=10000,
        active=1.0,
        requests=0,
        version=1,
        crc=False,
        timeout_ms=3000,
        service="com.example.Order:1.0",
        headers=(),
        consume=None,
        seed=0,
    ):
        cdef Shared* shared = &self.shared
        cdef uint32_t i
        cdef Loop* loop
        cdef Conn* conn
        cdef const uint8_t[::1] view
        if self.loops != NULL:
            raise RuntimeError("already set up")
        _between("connections", connections, 1, CONNECTIONS_MAX)
        _between("depth", depth, 0, DEPTH_MAX)
        _between("threads", threads, 1, min(THREADS_MAX, connections))
        _between("duration_ms", duration_ms, 1, 86400000)
        _between("warmup_ms", warmup_ms, 0, 3600000)
        _between("connect_timeout_ms", connect_timeout_ms, 1, 3600000)
        _between("timeout_ms", timeout_ms, 1, 3600000)
        _between("rate", rate, 0, 1e8)
        _between("connect_rate", connect_rate, 0, 1e6)
        _between("active", active, 0, 1)
        _between("requests", requests, 0, 1 << 62)
        _between("version", version, 1, 2)
        if crc and version == 1:
            raise ValueError("a checksum needs version 2 of the protocol")
        family, where = _parse(target)
        view = _sockaddr(family, where)
        memcpy(shared.address, &view[0], len(view))
        shared.address_size = len(view)
        shared.domain = family
        shared.depth = depth or (256 if rate else 1)
        shared.version = version
        shared.checksum = bool(crc)
        shared.closed = not rate
        shared.interval_ns = 1e9 * threads / rate if rate else 0.0
        shared.connect_interval_ns = 1e9 * threads / connect_rate if connect_rate else 0.0
        shared.connect_ns = <uint64_t>connect_timeout_ms * 1000000
        shared.warmup_ns = <uint64_t>warmup_ms * 1000000
        shared.duration_ns = <uint64_t>duration_ms * 1000000
        shared.timeout_ns = <uint64_t>timeout_ms * 1000000 + SECOND_NS
        shared.limits.frame_bytes_max = C_BODY_MAX + 65536
        prefix = _request_prefix(version, crc, timeout_ms, service, headers)
        self._set_up(threads, sizes, prefix, seed, (connections + threads - 1) // threads)
        if consume is not None:
            said = _greeting(consume, timeout_ms)
            shared.greeting = <uint8_t*>malloc(len(said))
            if shared.greeting == NULL:
                raise MemoryError
            view = said
            memcpy(shared.greeting, &view[0], len(said))
            shared.greeting_size = len(said)
            shared.mesh = 1
        if requests:
            for i in range(shared.threads):
                self.loops[i].left = requests // threads + (i < requests % threads)
        # The loaded connections are spread evenly, and so over the threads; there is at least one.
        busy = 0 if consume is not None else max(1, round(connections * active))
        for i in range(<uint32_t>connections):
            loop = &self.loops[i % shared.threads]
            conn = <Conn*>calloc(1, sizeof(Conn))
            if conn == NULL:
                raise MemoryError
            conn.fd = -1
            loop.conns[loop.conns_made] = conn
            loop.conns_made += 1
            loop.to_come += 1
            conn.number = i
            conn.active = (i + 1) * busy // connections > i * busy // connections
            conn.place = UINT32_MAX
            if conn.active:
                conn.asks = <Ask*>malloc(shared.depth * sizeof(Ask))
                if conn.asks == NULL:
                    raise MemoryError
            conn_wait(loop, conn, 0)

    def start(self):
        self._start()

    def stop(self):
        self._ask_stop(1)

    def mark(self):
        cdef uint32_t at = self.shared.section + 1
        if not self.started:
            raise RuntimeError("was never started")
        if at >= SECTIONS:
            raise RuntimeError(f"a run has {SECTIONS} sections at most")
        self.shared.section_ns[at] = now_ns()
        store32(&self.shared.section, at)
        return at

    def wait(self, timeout_s=None):
        return bool(self._wait(timeout_s))

    def progress(self):
        cdef uint32_t t, i, phase = DONE
        connections = sent = answered = in_flight = errors = 0
        for t in range(self.shared.threads):
            phase = min(phase, self.loops[t].phase)
            connections += self.loops[t].up
            sent += self.loops[t].sent_total
            answered += self.loops[t].answered_total
            in_flight += self.loops[t].in_flight
            for i in range(<uint32_t>E_COUNT):
                errors += self.loops[t].errors[i]
            for i in range(<uint32_t>STATUS_ROWS):
                errors += self.loops[t].status_count[i]
        elapsed = (now_ns() - self.shared.started_ns) / 1e9 if self.started else 0.0
        return Progress(_STATES[phase], elapsed, connections, sent, answered, in_flight, errors)

    def result(self):
        self._wait(None)
        cdef uint32_t t, up = 0
        for t in range(self.shared.threads):
            up += self.loops[t].began
        if not load32(&self.shared.go):
            return self._result(0, 0, up)
        end = 0
        for t in range(self.shared.threads):
            # A thread that sent its agreed number was done before the window closed.
            end = max(end, self.loops[t].finished_ns or self.shared.end_ns)
        return self._result(self.shared.begin_ns, min(end, self.shared.end_ns), up)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, kind, error, trace):
        self.stop()
        self.wait()


cdef class EchoServer(_Threads):
    cdef object _socket
    cdef object _path
    cdef readonly str address

    def __init__(
        self,
        listen="127.0.0.1:0",
        *,
        threads=1,
        delay_ms=0,
        status=0,
        frame_bytes_max=16777216,
        push_rate=0.0,
        push_depth=64,
        push_sizes=(256,),
        push_timeout_ms=3000,
        push_at_once=False,
        push_service="com.example.Push:1.0",
        push_group="",
        push_topic="bench",
        seed=0,
    ):
        cdef Shared* shared = &self.shared
        cdef uint32_t t
        cdef epoll_event event
        if self.loops != NULL:
            raise RuntimeError("already set up")
        _between("threads", threads, 1, THREADS_MAX)
        _between("delay_ms", delay_ms, 0, 3600000)
        _between("status", status, 0, 65535)
        _between("frame_bytes_max", frame_bytes_max, 1024, 1073741824)
        _between("push_rate", push_rate, 0, 1e7)
        _between("push_depth", push_depth, 1, DEPTH_MAX)
        _between("push_timeout_ms", push_timeout_ms, 1, 3600000)
        shared.serves = 1
        shared.depth = push_depth
        shared.version = 1
        shared.push_at_once = bool(push_at_once)
        shared.status = status
        shared.delay_ns = <uint64_t>delay_ms * 1000000
        shared.interval_ns = 1e9 / push_rate if push_rate else 0.0
        shared.timeout_ns = <uint64_t>push_timeout_ms * 1000000 + SECOND_NS
        shared.limits.frame_bytes_max = frame_bytes_max
        prefix = _request_prefix(1, False, push_timeout_ms, push_service, ())
        if push_group:
            shared.mesh = 1
            said = {"fm.op": "deliver", "fm.topic": push_topic, "fm.group": push_group}
            prefix = push_request(0, said, timeout_ms=push_timeout_ms)
        self._set_up(threads, push_sizes, prefix, seed, C_CONNECTIONS_MAX)
        shared.begin_ns = 0
        family, where = _parse(listen)
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        if family == socket.AF_UNIX:
            self._path = where
        else:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(where)
        self._socket.listen(4096)
        if family == socket.AF_UNIX:
            self.address = listen
        elif family == socket.AF_INET6:
            self.address = "[%s]:%d" % self._socket.getsockname()[:2]
        else:
            self.address = "%s:%d" % self._socket.getsockname()
        for t in range(shared.threads):
            self.loops[t].listener = self._socket.fileno()
            # One wake-up per connection and not one per thread.
            event.events = EPOLLIN | (EPOLLEXCLUSIVE if threads > 1 else 0)
            event.data.ptr = &self.loops[t].listener
            if epoll_ctl(self.loops[t].epoll, EPOLL_CTL_ADD, self.loops[t].listener, &event) < 0:
                raise OSError(errno, os.strerror(errno))

    def start(self):
        self._start()

    def stop(self):
        if self.started and not self.ended:
            self._ask_stop(2)
            self._wait(None)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            if self._path is not None:
                try:
                    os.unlink(self._path)
                except FileNotFoundError:
                    pass

    def stats(self):
        cdef uint32_t t
        cdef Loop* loop
        up = accepted = requests = oneways = heartbeats = undecodable = overloaded = 0
        bytes_in = bytes_out = cpu_ns = 0
        for t in range(self.shared.threads):
            loop = &self.loops[t]
            up += loop.up
            accepted += loop.accepted
            requests += loop.answered_for_peer
            oneways += loop.oneways
            heartbeats += loop.heartbeats
            undecodable += loop.errors[E_UNDECODABLE]
            overloaded += loop.overloaded
            bytes_in += loop.bytes_in
            bytes_out += loop.bytes_out
            cpu_ns += loop.cpu_all_ns
        return EchoStats(
            up, accepted, requests, oneways, heartbeats, undecodable, overloaded, bytes_in,
            bytes_out, cpu_ns / 1e9
        )

    def stop_push(self, timeout_ms=5000):
        cdef uint64_t until = now_ns() + <uint64_t>timeout_ms * 1000000
        cdef uint32_t t, owed
        store32(&self.shared.stop_push, 1)
        wake_all(self.loops, self.shared.threads)
        while True:
            owed = 0
            for t in range(self.shared.threads):
                owed += self.loops[t].in_flight
            if owed == 0:
                return True
            if now_ns() >= until:
                return False
            with nogil:
                poll(NULL, 0, 1)

    def push_result(self):
        cdef uint32_t t
        up = 0
        for t in range(self.shared.threads):
            up += self.loops[t].up
        return self._result(self.shared.started_ns, now_ns(), up)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, kind, error, trace):
        self.stop()


def bench(rounds=1000000):
    """See load.pyi. The parts run as in a real turn, but for the system calls."""
    cdef LoadRun run = LoadRun("unix:bench", connections=1, depth=1, sizes=(256,), seed=1)
    cdef Loop* loop = &run.loops[0]
    cdef Conn* conn = loop.conns[0]
    cdef uint64_t n = max(1, rounds)
    cdef uint64_t i, _, start, built, recorded, checked
    cdef uint64_t sum_ns = 0
    cdef uint64_t sequence = 0
    cdef uint64_t wrong = 0
    cdef const uint8_t* body
    with nogil:
        start = now_ns()
        for i in range(n):
            loop.histogram[bucket_of(i * 977)] += 1
        recorded = now_ns()
        for i in range(n):
            # The connection is not UP: flushing drops what was gathered and sends nothing.
            ask_build(loop, conn, 1)
            ask_end(loop, &conn.asks[0], ANSWERED)
            if i & 127 == 127:
                conn_flush(loop, conn)
        built = now_ns()
        conn_flush(loop, conn)
        ask_build(loop, conn, 1)
        body = loop.arena + run.shared.prefix_size
        checked = now_ns()
        for _ in range(n):
            if whose(&run.shared, conn, body, 256, &sequence) != MINE or memcmp(
                    body + NAME_BYTES, fill_of(&run.shared, sequence), 256 - NAME_BYTES) != 0:
                wrong += 1
        sum_ns = now_ns() - checked
    if wrong:
        raise RuntimeError(f"{wrong} of {n} own bodies were not recognised")
    return {
        "histogram": <double>(recorded - start) / <double>n,
        "build_256": (built - recorded) / <double>n,
        "check_256": sum_ns / <double>n,
    }
