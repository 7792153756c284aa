"""A process that is held by its pidfd: whether it has ended, and the end of it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastmesh.errors import HandoverError
from fastmesh.handover.fence import Fence, own_pidfd
from tests.handover.users import as_another_user

SLEEPER = [sys.executable, "-c", "import signal; signal.pause()"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(SLEEPER) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_dead(fence: Fence, most_s: float = 10.0) -> None:
    poll = select.poll()
    poll.register(fence.pidfd, select.POLLIN)
    assert poll.poll(most_s * 1000), "it lives on"


def test_a_process_is_killed_and_seen_dead_before_it_is_reaped(
    child: subprocess.Popen[bytes],
) -> None:
    fence = Fence(os.pidfd_open(child.pid), child.pid)
    assert (fence.dead(), fence.can_signal(), fence.seen_pid) == (False, True, child.pid)
    assert fence.kill()
    wait_dead(fence)
    assert fence.dead()  # a zombie: nobody has waited for it
    assert (fence.kill(), fence.can_signal()) == (True, True)
    assert child.wait() == -signal.SIGKILL
    assert fence.dead()
    assert (fence.kill(), fence.can_signal()) == (True, True)  # ESRCH: what was wanted is so
    fence.close()
    fence.close()


def test_a_stopped_process_is_killed_as_well(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    fence = Fence(os.pidfd_open(child.pid), child.pid)
    assert not fence.dead()
    assert fence.kill()
    wait_dead(fence)
    fence.close()


def test_one_that_has_ended_already_is_taken(child: subprocess.Popen[bytes]) -> None:
    pidfd = os.pidfd_open(child.pid)
    child.kill()
    child.wait()
    fence = Fence(pidfd, child.pid)
    assert (fence.dead(), fence.seen_pid) == (True, -1)
    fence.close()


def test_our_own_is_for_another_one_to_hold() -> None:
    pidfd = own_pidfd()
    assert not os.get_inheritable(pidfd)
    fence = Fence(pidfd, os.getpid())
    assert (fence.dead(), fence.can_signal()) == (False, True)
    fence.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pidfd)


@pytest.mark.parametrize("kind", ["file", "pipe", "epoll", "socket", "memfd", "directory", "event"])
def test_another_kind_of_descriptor_is_found_out_and_closed(kind: str, tmp_path: Path) -> None:
    if kind == "file":
        fd = os.open(tmp_path / "f", os.O_CREAT | os.O_RDWR)
    elif kind == "pipe":
        fd, writer = os.pipe()
        os.close(writer)
    elif kind == "epoll":
        with select.epoll() as epoll:
            fd = os.dup(epoll.fileno())
    elif kind == "socket":
        fd = socket.socket().detach()
    elif kind == "memfd":
        fd = os.memfd_create("Pid: 1")
    elif kind == "event":
        fd = os.eventfd(1)
    else:
        fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(HandoverError, match="no pidfd"):
        Fence(fd, os.getpid())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_one_that_is_not_open_is_an_error() -> None:
    with pytest.raises(HandoverError):
        Fence(-1, os.getpid())


def test_the_pidfd_of_another_process_is_found_out(child: subprocess.Popen[bytes]) -> None:
    """Else a taker could be made to wait for, and to kill, whoever it is told to."""
    pidfd = os.pidfd_open(child.pid)
    with pytest.raises(HandoverError, match=f"must be of process {os.getpid()}"):
        Fence(pidfd, os.getpid())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pidfd)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_may_not_be_signalled(child: subprocess.Popen[bytes]) -> None:
    fence = Fence(os.pidfd_open(child.pid), child.pid)
    said = as_another_user(lambda: fence.can_signal() << 2 | fence.kill() << 1 | fence.dead())
    assert said == 0
    assert child.poll() is None
    assert as_another_user(lambda: Fence(os.dup(fence.pidfd), child.pid).can_signal()) == 0
    fence.close()


BESIDE = """
import array, os, select, socket, sys
from fastmesh.handover.fence import Fence, own_pidfd

sock = socket.socket(fileno=int(sys.argv[1]))
rights = array.array("i", [own_pidfd()])
sock.sendmsg([str(os.getpid()).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
data, control, _, _ = sock.recvmsg(64, 64)
fence = Fence(array.array("i", control[0][2])[0], int(data))
print(fence.seen_pid, fence.can_signal(), fence.kill(), fence.dead(), flush=True)
if sys.stdin.readline() == "watch\\n":
    select.select([fence.pidfd], [], [], 10)
    print(fence.dead(), flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="makes PID namespaces")
def test_a_process_in_a_namespace_beside_is_not_signalled_but_seen_to_end() -> None:
    """As two containers are to each other: each holds the pidfd of the other one."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*unshare, "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no PID namespace can be made here")
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    both = [
        subprocess.Popen(
            [*unshare, sys.executable, "-c", BESIDE, str(end.fileno())],
            pass_fds=[end.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for end in ends
    ]
    for end in ends:
        end.close()
    try:
        for process in both:
            assert process.stdout is not None
            assert process.stdout.readline() == "0 False False False\n"
        said, _ = both[0].communicate("end\n", timeout=10)
        assert (both[0].returncode, said) == (0, "")
        said, _ = both[1].communicate("watch\n", timeout=15)
        assert (both[1].returncode, said) == (0, "True\n")
    finally:
        for process in both:
            process.kill()
            process.wait()
