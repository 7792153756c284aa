/* What an engine thread needs of the C library that is shorter said in C. */
#ifndef FASTMESH_THREAD_H
#define FASTMESH_THREAD_H
#include <errno.h>
#include <execinfo.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags);

static inline void fm_set_errno(int error) { errno = error; }

static inline int fm_accept(int fd) { return accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC); }

static inline void fm_nodelay(int fd) {
    int one = 1;   /* fails on a UNIX socket, where there is nothing to delay */
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

/* Loopback has no network that could be congested: there the plainest algorithm does (it needs no privilege).
 * What others compute per acknowledgement, pacing timers above all, is saved. Elsewhere the host's choice stands. */
static inline void fm_plain_congestion(int fd, const void *raw) {
    const struct sockaddr *address = raw;
    int loopback = 0;
    if (address->sa_family == AF_INET)
        loopback = (ntohl(((const struct sockaddr_in *)raw)->sin_addr.s_addr) >> 24) == 127;
    else if (address->sa_family == AF_INET6)
        loopback = IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)raw)->sin6_addr);
    if (loopback)
        (void)setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
}

/* Accepted connections inherit it from their listener. */
static inline void fm_plain_congestion_of_listener(int fd) {
    struct sockaddr_storage own;
    socklen_t size = sizeof own;
    if (getsockname(fd, (struct sockaddr *)&own, &size) == 0)
        fm_plain_congestion(fd, &own);
}

static inline int fm_writable(int fd) {
    struct pollfd one = { .fd = fd, .events = POLLOUT };
    return poll(&one, 1, 0) == 1;
}

static inline uint32_t fm_peer(int fd, uint8_t *room) {
    socklen_t size = 128;
    if (getpeername(fd, (struct sockaddr *)room, &size) != 0 || size > 128) return 0;
    return (uint32_t)size;
}

/* An engine thread works for microseconds at a time. Asking the scheduler for slices that short lets a
 * wake-up preempt whoever holds the processor, instead of waiting up to a whole slice of some 3 ms. It
 * needs no privilege and changes nobody's share; Linux 6.12 introduced it, older kernels ignore it. */
static inline void fm_short_slice(void) {
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime_ns, deadline_ns, period_ns;
    } attr = { .size = sizeof attr, .runtime_ns = 100000 };
    attr.nice = getpriority(PRIO_PROCESS, 0);
    (void)syscall(SYS_sched_setattr, 0, &attr, 0);
}

/* Engine threads take no signals: those belong to the main thread. SIGABRT stays open, because the
 * watchdog
 * makes a stuck thread print its own stack that way. */
static inline uint64_t fm_enter_thread(void) {
    sigset_t all;
    sigfillset(&all);
    sigdelset(&all, SIGABRT);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    fm_short_slice();
    return (uint64_t)pthread_self();
}

static inline void fm_on_abort(int sig) {
    void *frames[64];
    static const char head[] =
        "fastmesh: an engine thread was stuck in one turn for 5 s; its stack:\n";
    ssize_t ignored = write(2, head, sizeof head - 1);
    (void)ignored;
    backtrace_symbols_fd(frames, backtrace(frames, 64), 2);
    signal(SIGABRT, SIG_DFL);
    raise(sig);
}

static inline void fm_abort_thread(uint64_t thread) {
    void *warm[1];
    (void)backtrace(warm, 1);   /* loads what it needs outside the handler */
    signal(SIGABRT, fm_on_abort);
    pthread_kill((pthread_t)thread, SIGABRT);
    sleep(2);
    abort();
}

/* What this thread does from here on may wait for anybody else who wants its CPU (of the thread, not of its
 * process; needs no privilege). */
static inline void fm_no_hurry(void) {
    struct sched_param none = {0};
    (void)pthread_setschedparam(pthread_self(), SCHED_IDLE, &none);
}

static inline void fm_nap_ms(uint64_t ms) {
    struct timespec ts = { (time_t)(ms / 1000), (long)(ms % 1000) * 1000000L };
    nanosleep(&ts, NULL);
}
#endif
