"""Records and descriptors come whole or are an error; the path is there for whoever serves."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import os
import resource
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fastmesh import limits
from fastmesh.errors import HandoverError, StateError
from fastmesh.handover import endpoint
from tests.handover.users import as_another_user, without_privileges

MOST_BYTES = limits.HANDOVER_RECORD_BYTES_MAX
MOST_FDS = limits.HANDOVER_RECORD_FDS_MAX
Pair = tuple[socket.socket, socket.socket]


def open_fds() -> set[int]:
    found = {int(name) for name in os.listdir("/proc/self/fd")}
    return {fd for fd in found if _is_open(fd)}  # without the one that listed them


def _is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.setblocking(False)
    other.setblocking(False)
    with one, other:
        yield one, other


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    return directory / "handover.sock"


def names(place: Path) -> list[str]:
    return sorted(os.listdir(place.parent))


# --- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, MOST_FDS])
def test_a_record_comes_whole_with_its_descriptors(pair: Pair, count: int) -> None:
    one, other = pair
    reader, writer = os.pipe()
    endpoint.send_now(one, b"x" * MOST_BYTES, [writer] * count)
    endpoint.send_now(one, b"second")
    data, fds = endpoint.receive(other)
    assert (data, len(fds)) == (b"x" * MOST_BYTES, count)
    for fd in fds:
        assert os.fstat(fd).st_ino == os.fstat(writer).st_ino
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert endpoint.receive(other) == (b"second", [])
    with pytest.raises(BlockingIOError):
        endpoint.receive(other)
    endpoint.close_all([reader, writer, *fds])


def test_what_does_not_come_whole_is_an_error_and_leaks_nothing(pair: Pair) -> None:
    one, other = pair
    before = open_fds()
    for size, fds in ((MOST_BYTES + 2, [0] * 3), (MOST_BYTES + 1000, []), (100_000, [0])):
        endpoint.send_now(one, b"x" * size, fds)
        with pytest.raises(HandoverError, match=f"longer than {MOST_BYTES}"):
            endpoint.receive(other)
    assert open_fds() == before
    endpoint.send_now(one, b"next")
    assert endpoint.receive(other) == (b"next", [])


def test_too_many_and_unannounced_descriptors_reach_the_one_who_counts(pair: Pair) -> None:
    """As many as the kernel lets through: the books of the other side refuse them (wire.py)."""
    one, other = pair
    before = open_fds()
    endpoint.send_now(one, b"{}", [0] * 253)
    data, fds = endpoint.receive(other)
    assert (data, len(fds)) == (b"{}", 253)
    endpoint.close_all(fds)
    assert open_fds() == before
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        endpoint.send_now(one, b"{}", [0] * 254)


def test_descriptors_without_a_byte_are_no_record(pair: Pair) -> None:
    one, other = pair
    before = open_fds()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1]))]
    one.sendmsg([b""], rights)
    with pytest.raises(HandoverError, match="without a byte"):
        endpoint.receive(other)
    assert open_fds() == before


def test_credentials_that_nobody_asked_for_are_not_taken_for_descriptors(pair: Pair) -> None:
    one, other = pair
    before = open_fds()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    endpoint.send_now(one, b"a", [0])
    data, fds = endpoint.receive(other)
    assert (data, len(fds)) == (b"a", 1)
    endpoint.close_all(fds)
    assert open_fds() == before


FULL_TABLE = """
import os, resource, socket, sys
from fastmesh.errors import HandoverError
from fastmesh.handover import endpoint

sock = socket.socket(fileno=os.dup(int(sys.argv[1])))  # a low number, whatever it was there
os.close(int(sys.argv[1]))
room = int(sys.argv[2])
here = len(os.listdir("/proc/self/fd")) - 1
highest = max(int(n) for n in os.listdir("/proc/self/fd"))
assert highest < 40, highest
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
while True:
    try:
        held.append(os.dup(0))
    except OSError:
        break
for fd in held[:room]:
    os.close(fd)
held = held[room:]
print("ready", flush=True)
sys.stdin.readline()
try:
    endpoint.receive(sock)
except HandoverError as error:
    print(error, flush=True)
taken = []
while True:  # the room that there was is there again: nothing leaked
    try:
        taken.append(os.dup(0))
    except OSError:
        break
print(len(taken), flush=True)
try:
    endpoint.receive(sock)
except BlockingIOError:
    print("nothing", flush=True)
"""


@pytest.mark.parametrize("room", [0, 5])
def test_a_full_table_at_the_receiver_is_an_error_and_leaks_nothing(pair: Pair, room: int) -> None:
    one, other = pair
    with subprocess.Popen(
        [sys.executable, "-c", FULL_TABLE, str(other.fileno()), str(room)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[other.fileno()],
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        endpoint.send_now(one, b"ten descriptors", [one.fileno()] * 10)
        child.stdin.write("\n")
        child.stdin.flush()
        said = child.stdout.readline()
        assert "the table of this process is full" in said
        assert f"({room})" in said
        assert child.stdout.readline() == f"{room}\n"
        assert child.stdout.readline() == "nothing\n"
    assert child.returncode == 0


def test_the_end_and_a_reset_are_told_apart_from_nothing(pair: Pair) -> None:
    one, other = pair
    with pytest.raises(BlockingIOError):
        endpoint.receive(other)
    endpoint.send_now(one, b"last")
    one.close()
    assert endpoint.receive(other) == (b"last", [])
    for _ in range(2):
        with pytest.raises(EOFError):
            endpoint.receive(other)
    with pytest.raises(BrokenPipeError):
        endpoint.send_now(other, b"nobody reads")
    with pytest.raises(BrokenPipeError):
        endpoint.send_now(one, b"closed here")


def test_a_peer_that_leaves_unread_records_behind_is_a_reset(pair: Pair) -> None:
    one, other = pair
    endpoint.send_now(other, b"never read", [0])
    one.close()
    with pytest.raises(ConnectionResetError):
        endpoint.receive(other)


def fill(sock: socket.socket, record: bytes) -> int:
    """Until there is no room. How many records that took."""
    for sent in range(10_000):
        try:
            endpoint.send_now(sock, record)
        except BlockingIOError:
            return sent
    raise AssertionError("there is always room")


async def test_send_waits_for_room_and_leaves_the_reader_alone(pair: Pair) -> None:
    one, other = pair
    loop = asyncio.get_running_loop()
    heard = asyncio.Event()
    loop.add_reader(one, heard.set)
    record = b"x" * MOST_BYTES
    sent = fill(one, record)
    before = open_fds()
    job = asyncio.ensure_future(endpoint.send(one, b"late", [one.fileno()]))
    endpoint.send_now(other, b"answer")
    await heard.wait()  # the reader works while a writer waits
    assert endpoint.receive(one) == (b"answer", [])
    assert not job.done()
    for _ in range(sent):
        assert endpoint.receive(other) == (record, [])
    await job
    heard.clear()
    endpoint.send_now(other, b"again")
    await heard.wait()
    data, fds = endpoint.receive(other)
    assert (data, len(fds)) == (b"late", 1)
    endpoint.close_all(fds)
    loop.remove_reader(one)
    assert open_fds() == before


@pytest.mark.parametrize("how", ["cancelled", "closed here", "closed there"])
async def test_a_send_that_waits_ends_with_its_connection(pair: Pair, how: str) -> None:
    one, other = pair
    before = open_fds() - {one.fileno(), other.fileno()}
    record = b"x" * MOST_BYTES
    fill(one, record)
    job = asyncio.ensure_future(endpoint.send(one, record))
    await asyncio.sleep(0)
    assert not job.done()
    if how == "cancelled":
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
    elif how == "closed here":
        one.close()
        endpoint.receive(other)
        while not job.done():  # room comes when enough is read
            try:
                endpoint.receive(other)
            except (BlockingIOError, EOFError):
                await asyncio.sleep(0)
        with pytest.raises(BrokenPipeError):
            await job
    else:
        other.close()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            await job
    one.close()
    other.close()
    assert open_fds() == before


def test_what_the_kernel_refuses_is_raised_as_it_is(pair: Pair) -> None:
    one, _ = pair
    with pytest.raises(OSError, match=os.strerror(errno.EMSGSIZE)):
        endpoint.send_now(one, b"x" * 1_000_000)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        endpoint.send_now(one, b"x", [9999])


def test_too_many_descriptors_under_way_are_said_and_go_when_some_are_taken(pair: Pair) -> None:
    """Root is not held to that bound, so a process without privileges tries."""
    one, other = pair

    def crowd() -> int:
        # In a child: what the tests before left open would fill its small table.
        endpoint.close_all(open_fds() - {0, 1, 2, one.fileno(), other.fileno()})
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        before = open_fds()
        fault = sent = 0
        while not fault:
            try:
                endpoint.send_now(one, b"8", [0] * 8)
                sent += 1
            except OSError as error:
                fault = error.errno or 0
        assert sent > 0
        assert open_fds() == before
        for _ in range(sent):  # nothing was half sent
            data, fds = endpoint.receive(other)
            assert (data, len(fds)) == (b"8", 8)
            endpoint.close_all(fds)
        endpoint.send_now(one, b"again", [0] * 8)
        endpoint.close_all(endpoint.receive(other)[1])
        assert open_fds() == before
        return fault

    assert without_privileges(crowd) == errno.ETOOMANYREFS


def test_close_all_goes_on_after_one_that_is_not_open() -> None:
    reader, writer = os.pipe()
    endpoint.close_all([reader, 9999, -1, reader, writer])
    assert not _is_open(reader)
    assert not _is_open(writer)


# --- the path -------------------------------------------------------------------------------------


async def test_who_connects_is_known_by_the_kernel(place: Path) -> None:
    door = endpoint.Door(str(place))
    with pytest.raises(BlockingIOError):
        door.accept()
    taker = await endpoint.connect(str(place), 1.0)
    assert taker is not None
    giver = door.accept()
    me = endpoint.Peer(os.getpid(), os.geteuid(), os.getegid())
    assert endpoint.peer_of(giver) == endpoint.peer_of(taker) == me
    for sock in (door.sock, taker, giver):
        assert sock.gettimeout() == 0.0
        assert fcntl.fcntl(sock, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    giver.close()
    taker.close()
    door.close()
    assert names(place) == []


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_the_socket_is_never_open_to_others(
    place: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mode is looked at straight after bind, under the temporary name: whatever the umask."""
    modes = []
    bind = socket.socket.bind

    class Looking(socket.socket):
        def bind(self, address: object) -> None:
            bind(self, address)  # type: ignore[arg-type]
            modes.append(stat.S_IMODE(os.stat(str(address)).st_mode))

    monkeypatch.setattr(socket, "socket", Looking)
    before = os.umask(umask)
    try:
        door = endpoint.Door(str(place))
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    door.close()


@pytest.fixture(params=["socket", "file", "symlink"])
def stale(request: pytest.FixtureRequest, place: Path, tmp_path: Path) -> Path:
    """What lies at the path; a file that a link points to."""
    other = tmp_path / "kept"
    other.write_text("kept")
    if request.param == "socket":
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(str(place))
    elif request.param == "file":
        place.write_text("")
    else:
        place.symlink_to(other)
    return other


async def test_what_lies_at_the_path_is_replaced(place: Path, stale: Path) -> None:
    assert await endpoint.connect(str(place), 1.0) is None
    door = endpoint.Door(str(place))
    taker = await endpoint.connect(str(place), 1.0)
    assert taker is not None
    taker.close()
    door.close()
    assert names(place) == []
    assert open(stale).read() == "kept"  # noqa: ASYNC230, SIM115


async def test_a_successor_binds_while_its_predecessor_is_there(place: Path) -> None:
    old = endpoint.Door(str(place))
    new = endpoint.Door(str(place))
    assert names(place) == ["handover.sock"]
    old.close()  # not its own any more
    assert names(place) == ["handover.sock"]
    taker = await endpoint.connect(str(place), 1.0)
    assert taker is not None
    new.accept().close()
    taker.close()
    new.close()
    new.close()
    assert names(place) == []


async def test_there_is_no_moment_without_a_socket(place: Path) -> None:
    """Doors follow each other while somebody connects all the time."""
    door = endpoint.Door(str(place))
    done = False
    found = 0

    async def knock() -> None:
        nonlocal found
        while not done:
            sock = await endpoint.connect(str(place), 1.0)
            assert sock is not None
            sock.close()
            found += 1
            await asyncio.sleep(0)

    job = asyncio.ensure_future(knock())
    for _ in range(100):
        successor = endpoint.Door(str(place))
        # Who renames first and closes late never meets a path that is gone.
        door.close()
        door = successor
        await asyncio.sleep(0)
    done = True
    await job
    assert found > 50
    door.close()


def test_what_a_killed_process_left_is_swept(place: Path) -> None:
    left = place.parent / ".handover.sock.0123abcd"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(left))
    kept = place.parent / ".handover"
    kept.write_text("")
    door = endpoint.Door(str(place))
    assert names(place) == [".handover", "handover.sock"]
    door.close()


def test_a_stopped_process_that_holds_the_directory_is_not_waited_for(place: Path) -> None:
    holder = os.open(place.parent, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    door = endpoint.Door(str(place))
    assert names(place) == ["handover.sock"]
    door.close()
    assert names(place) == ["handover.sock"]  # left: a successor may be at it just now
    os.close(holder)


async def test_a_path_may_be_longer_than_an_address(tmp_path: Path) -> None:
    place = tmp_path
    for _ in range(3):
        place /= "d" * 60
        place.mkdir(mode=0o700)
    place /= "handover.sock"
    assert len(str(place)) > limits.UNIX_PATH_BYTES_MAX
    door = endpoint.Door(str(place))
    taker = await endpoint.connect(str(place), 1.0)
    assert taker is not None
    taker.close()
    door.close()
    assert names(place) == []


async def test_a_relative_path_is_one_of_the_working_directory(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.parent)
    door = endpoint.Door(place.name)
    taker = await endpoint.connect(place.name, 1.0)
    assert taker is not None
    taker.close()
    door.close()
    assert names(place) == []


def test_a_directory_that_others_can_write_is_refused(place: Path, tmp_path: Path) -> None:
    before = open_fds()
    for mode in (0o770, 0o707, 0o1777):
        place.parent.chmod(mode)
        with pytest.raises(StateError, match="can be written by others"):
            endpoint.Door(str(place))
    place.parent.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(place.parent)
    for path in (link / "handover.sock", tmp_path / "none" / "s", tmp_path / "file" / "s"):
        (tmp_path / "file").write_text("")
        with pytest.raises(StateError):
            endpoint.Door(str(path))
    assert names(place) == []
    assert open_fds() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_directory_of_another_user_is_refused(place: Path) -> None:
    os.chown(place.parent, 65534, 65534)
    with pytest.raises(StateError, match="belongs to another user"):
        endpoint.Door(str(place))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_cannot_connect(place: Path) -> None:
    """Even where the directory lets it through."""
    door = endpoint.Door(str(place))
    place.parent.chmod(0o755)
    parents = [p for p in place.parents if p != place.parent]
    blocked = [p for p in parents if not p.stat().st_mode & stat.S_IXOTH]
    for parent in blocked:
        parent.chmod(parent.stat().st_mode | stat.S_IXOTH)

    def connect() -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            return sock.connect_ex(str(place))

    fault = as_another_user(connect)
    for parent in blocked:
        parent.chmod(parent.stat().st_mode & ~stat.S_IXOTH)
    assert fault == errno.EACCES
    with pytest.raises(BlockingIOError):
        door.accept()
    door.close()


async def test_nobody_is_told_apart_from_what_is_wrong(place: Path, tmp_path: Path) -> None:
    before = open_fds()
    assert await endpoint.connect(str(tmp_path / "none" / "handover.sock"), 1.0) is None
    assert await endpoint.connect(str(place), 1.0) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        await endpoint.connect(str(tmp_path / "file" / "handover.sock"), 1.0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.bind(str(place))
        stream.listen()
        with pytest.raises(OSError, match=os.strerror(errno.EPROTOTYPE)):
            await endpoint.connect(str(place), 1.0)
    assert open_fds() == before


async def test_a_full_backlog_is_waited_for_and_then_said(place: Path) -> None:
    door = endpoint.Door(str(place))
    waiting: list[socket.socket] = []
    for _ in range(limits.HANDOVER_CONVERSATIONS_MAX + 1):
        sock = await endpoint.connect(str(place), 1.0)
        assert sock is not None
        waiting.append(sock)
    with pytest.raises(TimeoutError, match="accepts nobody"):
        await endpoint.connect(str(place), 0.02)
    job = asyncio.ensure_future(endpoint.connect(str(place), 10.0))
    await asyncio.sleep(0)
    assert not job.done()
    door.accept().close()
    late = await job
    assert late is not None
    close: Sequence[socket.socket] = [late, *waiting]
    for sock in close:
        sock.close()
    door.close()


WITHOUT_PROC = """
import asyncio, sys
from fastmesh.errors import StateError
from fastmesh.handover import endpoint

try:
    endpoint.Door(sys.argv[1])
except StateError as error:
    print(error)
try:
    print(asyncio.run(endpoint.connect(sys.argv[1], 1.0)))
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="makes mount namespaces")
def test_a_missing_proc_is_said_and_not_taken_for_nobody(place: Path) -> None:
    """Else a taker would start anew beside the one that serves."""
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if subprocess.run([*hidden, "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no mount namespace can be made here")
    said = subprocess.run(
        [*hidden, sys.executable, "-c", WITHOUT_PROC, str(place)],
        check=True,
        capture_output=True,
        text=True,
        timeout=10,
    ).stdout.splitlines()
    missing = "/proc is not mounted, and a hand-over needs it"
    assert said == [f"{place}: {missing}", missing]
    assert names(place) == []


def test_no_descriptor_for_a_door_is_a_state_error(place: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_fds()) + 8, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        os.close(held.pop())  # one is left for the socket, none for its directory
        with pytest.raises(StateError, match="Too many open files"):
            endpoint.Door(str(place))
    finally:
        endpoint.close_all(held)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert names(place) == []
