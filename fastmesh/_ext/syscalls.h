/* recv and send without the C library's cancellation points. */
#ifndef FASTMESH_SYSCALLS_H
#define FASTMESH_SYSCALLS_H
#include <errno.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static inline int64_t fm_result(long n) { return n >= 0 ? n : -(int64_t)errno; }

static inline int64_t sys_recv(int fd, void *buf, size_t n, int flags) {
    return fm_result(syscall(SYS_recvfrom, fd, buf, n, flags, NULL, NULL));
}
static inline int64_t sys_send(int fd, const void *buf, size_t n, int flags) {
    return fm_result(syscall(SYS_sendto, fd, buf, n, flags, NULL, 0));
}
static inline int64_t sys_recvmsg(int fd, struct msghdr *msg, int flags) {
    return fm_result(syscall(SYS_recvmsg, fd, msg, flags));
}
static inline int64_t sys_sendmsg(int fd, const struct msghdr *msg, int flags) {
    return fm_result(syscall(SYS_sendmsg, fd, msg, flags));
}

#endif
