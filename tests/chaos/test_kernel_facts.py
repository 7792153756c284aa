"""What the hand-over takes for granted of the kernel, one test per letter of the design (faults,
section 2). One that fails here is no flaky test: a rule of the hand-over has lost its reason."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastmesh import limits
from tests.handover.users import without_privileges

pytestmark = pytest.mark.chaos

MOST_S = 10.0
"""Until what must come is here: a bound, not a pause."""
MOST_FDS = 253
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Of a hand-over: giver, taker."""
    giver, taker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    giver.settimeout(MOST_S)
    taker.settimeout(MOST_S)
    with giver, taker:
        yield giver, taker


@pytest.fixture
def line() -> Iterator[Pair]:
    """A connection on loopback: client, server."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        client = socket.create_connection(door.getsockname(), MOST_S)
        server, _ = door.accept()
    server.settimeout(MOST_S)
    with client, server:
        yield client, server


def give(sock: socket.socket, data: bytes, fds: list[int], flags: int = 0) -> None:
    rights = array.array("i", fds)
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], flags)


def take(
    sock: socket.socket, room: int = MOST_FDS, flags: int = socket.MSG_CMSG_CLOEXEC
) -> tuple[bytes, list[int], int]:
    """(data, descriptors, flags), with room for so many descriptors."""
    data, control, found, _ = sock.recvmsg(65536, socket.CMSG_SPACE(room * 4), flags)
    fds = array.array("i")
    for _, _, content in control:
        fds.frombytes(content)
    return data, fds.tolist(), found


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def forked(run: Callable[[], object]) -> int:
    """The pid of a process that does this and then nothing, until it is killed."""
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
        signal.pause()
    finally:
        os._exit(1)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def readable(fd: int, most_s: float = 0.0) -> bool:
    return bool(select.select([fd], [], [], most_s)[0])


@contextlib.contextmanager
def table_with_room(count: int) -> Iterator[None]:
    """The descriptor table of this process is full but for `count`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    top = os.dup(0)
    os.close(top)
    resource.setrlimit(resource.RLIMIT_NOFILE, (top + 20, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        close(held[:count])
        del held[:count]
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        close(held)


# --- a to k ---------------------------------------------------------------------------------------


def test_a_one_record_takes_253_descriptors(pair: Pair) -> None:
    giver, taker = pair
    give(giver, b"253", [0] * MOST_FDS)
    data, fds, flags = take(taker)
    assert (data, len(fds), flags & socket.MSG_CTRUNC) == (b"253", MOST_FDS, 0)
    close(fds)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        give(giver, b"254", [0] * (MOST_FDS + 1))
    assert limits.HANDOVER_RECORD_FDS_MAX < MOST_FDS


def test_b_what_does_not_fit_the_control_buffer_is_gone(pair: Pair) -> None:
    giver, taker = pair
    pipes = [os.pipe() for _ in range(10)]
    give(giver, b"ten", [writer for _, writer in pipes])
    close([writer for _, writer in pipes])
    data, fds, flags = take(taker, room=4)
    assert (data, len(fds)) == (b"ten", 4)
    assert flags & socket.MSG_CTRUNC
    # Gone, and not leaked: the other ends see that nobody has the six any more.
    ended = [os.read(reader, 1) == b"" for reader, _ in pipes[4:]]
    assert ended == [True] * 6
    assert not any(readable(reader) for reader, _ in pipes[:4])
    close(fds)
    close([reader for reader, _ in pipes])


def test_c_a_full_table_loses_descriptors_of_a_record_that_came_whole(pair: Pair) -> None:
    giver, taker = pair
    pipes = [os.pipe() for _ in range(10)]
    give(giver, b"ten descriptors", [writer for _, writer in pipes])
    close([writer for _, writer in pipes])
    taker.setblocking(False)
    with table_with_room(5):
        data, fds, flags = take(taker)
        assert (data, len(fds)) == (b"ten descriptors", 5)
        assert flags & socket.MSG_CTRUNC
        with pytest.raises(BlockingIOError):
            take(taker)  # they do not come later
    assert [os.read(reader, 1) for reader, _ in pipes[5:]] == [b""] * 5
    close(fds)
    close([reader for reader, _ in pipes])


def test_d_a_descriptor_on_its_way_outlives_its_sender(pair: Pair, line: Pair) -> None:
    giver, taker = pair
    client, server = line
    old = forked(lambda: give(giver, b"sent", [server.fileno()]))
    server.close()
    giver.close()
    # The record is there, unread, when its sender is killed.
    assert readable(taker.fileno(), MOST_S)
    assert taker.recv(16, socket.MSG_PEEK) == b"sent"
    kill(old)
    data, fds, flags = take(taker)
    assert (data, len(fds), flags & socket.MSG_CTRUNC) == (b"sent", 1, 0)
    with socket.socket(fileno=fds[0]) as moved:
        moved.settimeout(MOST_S)
        client.sendall(b"request")
        assert moved.recv(16) == b"request"
        moved.sendall(b"response")
        assert client.recv(16) == b"response"
    assert client.recv(16) == b""
    assert taker.recv(16) == b""


def test_e_a_client_sees_no_end_while_one_duplicate_lives(line: Pair) -> None:
    client, server = line
    duplicate = os.dup(server.fileno())
    server.close()
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.recv(1)
    os.write(duplicate, b"x")
    client.settimeout(MOST_S)
    assert client.recv(16) == b"x"
    os.close(duplicate)
    assert client.recv(1) == b""


def test_f_credentials_come_from_the_kernel_and_the_mode_from_the_umask(tmp_path: Path) -> None:
    layout = struct.Struct("iII")
    path = str(tmp_path / "s")
    before = os.umask(0o022)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
            door.bind(path)
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o755
            door.listen()
            door.settimeout(MOST_S)

            def call() -> None:
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                    sock.connect(path)
                    signal.pause()

            caller = forked(call)
            server, _ = door.accept()
            with server:
                found = server.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
                assert layout.unpack(found) == (caller, os.geteuid(), os.getegid())
                kill(caller)  # who it was stays known
                again = server.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
                assert again == found
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as narrow:
            os.fchmod(narrow.fileno(), 0o600)  # what the path is made with, without a umask
            narrow.bind(path + "2")
            assert stat.S_IMODE(os.stat(path + "2").st_mode) == 0o600
    finally:
        os.umask(before)


def test_g_two_readers_tear_one_stream(line: Pair) -> None:
    client, server = line
    with socket.socket(fileno=os.dup(server.fileno())) as second:
        second.settimeout(MOST_S)
        client.sendall(b"AAAABBBB")
        assert server.recv(4, socket.MSG_WAITALL) == b"AAAA"
        assert second.recv(4, socket.MSG_WAITALL) == b"BBBB"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(4)


def test_h_descriptors_in_flight_count_against_the_sender() -> None:
    """They are the user's, whichever process of it sent them: paced by what was taken out."""

    def sent(taken: int) -> int:
        giver, taker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        for count in range(25):
            try:
                give(giver, b"8", [0] * 8, socket.MSG_DONTWAIT)
            except OSError as error:
                return 8 * count if error.errno == errno.ETOOMANYREFS else 254
            if count < taken:
                close(take(taker)[1])
        return 255

    # Fewer where another process of this user has some under way just now.
    assert 0 < without_privileges(lambda: sent(taken=0)) <= 72
    assert without_privileges(lambda: sent(taken=25)) == 255  # all of them


def test_i_an_epoll_fires_forever_for_what_was_closed_but_not_removed(line: Pair) -> None:
    client, server = line
    number = server.fileno()
    duplicate = os.dup(number)
    with select.epoll() as epoll:
        epoll.register(number, select.EPOLLIN)
        server.close()
        client.sendall(b"x")
        for _ in range(3):
            assert epoll.poll(MOST_S) == [(number, select.EPOLLIN)]
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            epoll.unregister(number)
        assert epoll.poll(MOST_S) == [(number, select.EPOLLIN)]
        os.close(duplicate)
        assert epoll.poll(0) == []


def test_j_every_duplicate_shares_whether_it_blocks(pair: Pair, line: Pair) -> None:
    giver, taker = pair
    _, server = line
    give(giver, b"fd", [server.fileno()])
    _, fds, _ = take(taker)
    os.set_blocking(server.fileno(), True)
    assert os.get_blocking(fds[0])
    os.set_blocking(fds[0], False)
    assert not os.get_blocking(server.fileno())
    close(fds)


def test_k_a_shutdown_ends_the_connection_for_every_duplicate(pair: Pair, line: Pair) -> None:
    giver, taker = pair
    client, server = line
    give(giver, b"fd", [server.fileno()])
    _, fds, _ = take(taker)
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    assert client.recv(1) == b""
    with pytest.raises(BrokenPipeError), socket.socket(fileno=fds[0]) as moved:
        moved.send(b"x", socket.MSG_NOSIGNAL)


# --- what the state travels in --------------------------------------------------------------------

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def test_a_sealed_memfd_stays_what_it_is_in_the_hands_of_both(pair: Pair) -> None:
    giver, taker = pair
    memfd = os.memfd_create("state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(memfd, b"state" * 1000)
    shared = mmap.mmap(memfd, 0)
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, SEALS)  # somebody could still write
    shared.close()
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, SEALS)
    give(giver, b"memfd", [memfd])
    _, fds, _ = take(taker)
    refused = os.strerror(errno.EPERM)
    for fd in (memfd, *fds):
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
        with pytest.raises(PermissionError, match=refused):
            os.pwrite(fd, b"x", 0)
        for size in (0, 10_000):
            with pytest.raises(PermissionError, match=refused):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError, match=refused):
            mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError, match=refused):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(memfd)
    with mmap.mmap(fds[0], 0, mmap.MAP_SHARED, mmap.PROT_READ) as found:
        assert found[:] == b"state" * 1000
    close(fds)


def test_what_was_not_sealed_is_told_apart(tmp_path: Path) -> None:
    open_one = os.memfd_create("open", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    assert fcntl.fcntl(open_one, fcntl.F_GET_SEALS) == 0
    unsealable = os.memfd_create("unsealable", os.MFD_CLOEXEC)
    assert fcntl.fcntl(unsealable, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SEAL
    reader, writer = os.pipe()
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        fcntl.fcntl(reader, fcntl.F_GET_SEALS)
    close([open_one, unsealable, reader, writer])


def test_a_record_longer_than_the_send_buffer_never_goes(pair: Pair) -> None:
    """About 200 KiB as shipped: the state itself cannot be a record."""
    giver, taker = pair
    buffer = giver.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    with pytest.raises(OSError, match=os.strerror(errno.EMSGSIZE)):
        giver.send(b"x" * buffer, socket.MSG_DONTWAIT)
    record = b"x" * limits.HANDOVER_RECORD_BYTES_MAX
    assert giver.send(record, socket.MSG_DONTWAIT) == len(record) < buffer
    assert taker.recv(2 * len(record)) == record  # whole, in one


# --- who owns -------------------------------------------------------------------------------------


def locked_by_somebody(path: Path) -> bool:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_lock_belongs_to_the_open_file_and_moves_with_it(pair: Pair, tmp_path: Path) -> None:
    giver, taker = pair
    path = tmp_path / "lock"

    def hold() -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        give(giver, b"lock", [fd])

    old = forked(hold)
    _, fds, _ = take(taker)
    assert locked_by_somebody(path)
    fcntl.flock(fds[0], fcntl.LOCK_EX | fcntl.LOCK_NB)  # the very same: it is ours as well
    kill(old)
    assert locked_by_somebody(path)  # a process that ends unlocks nothing that was handed over
    close(fds)
    assert not locked_by_somebody(path)


def test_a_pidfd_is_a_process_in_the_hands_of_another(pair: Pair) -> None:
    giver, taker = pair
    pid = forked(lambda: give(giver, b"pidfd", [os.pidfd_open(os.getpid())]))
    _, fds, _ = take(taker)
    pidfd = fds[0]
    assert not readable(pidfd)
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    assert not readable(pidfd)  # stopped is not ended
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert readable(pidfd, MOST_S)  # and ended it is before anybody has waited for it
    signal.pidfd_send_signal(pidfd, 0)
    os.waitpid(pid, 0)
    assert readable(pidfd)
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, 0)  # never another process of the same number
    close(fds)


def test_the_end_of_a_connection_is_no_end_of_a_process(pair: Pair) -> None:
    """EOF is a hint, the pidfd is the proof."""
    giver, taker = pair

    def leave() -> None:
        give(giver, b"pidfd", [os.pidfd_open(os.getpid())])
        giver.close()

    pid = forked(leave)
    giver.close()
    _, fds, _ = take(taker)
    assert taker.recv(1) == b""
    assert not readable(fds[0])
    kill(pid)
    assert readable(fds[0])
    close(fds)
