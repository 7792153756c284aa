"""Listening sockets: who gets which path and port, and what is left behind."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from fastmesh.address import Address
from fastmesh.control.listeners import Listeners, bind
from fastmesh.errors import ListenError

ANY_PORT = Address("127.0.0.1", 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_tcp_listens_and_does_not_block(host: str) -> None:
    bound = bind(Address(host, 0), "x")
    assert not bound.sock.getblocking()
    assert not bound.sock.get_inheritable()
    with socket.create_connection((bound.actual.host, bound.actual.port)):
        bound.sock.accept()[0].close()
    bound.close()


def test_a_port_in_use_is_an_error_that_names_it() -> None:
    first = bind(ANY_PORT, "one")
    with pytest.raises(ListenError, match=r"two.*in use"):
        bind(first.actual, "two")
    first.close()
    bind(first.actual, "two").close()


def test_a_unix_socket_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.sock"
    bound = bind(Address(path=str(path)), "x")
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    bound.close()
    assert not path.exists()


def test_a_stale_unix_socket_is_replaced_a_living_one_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    bound = bind(Address(path=path), "x")
    with pytest.raises(ListenError, match="somebody listens"):
        bind(Address(path=path), "y")
    bound.close()


def test_something_else_at_the_path_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    path.write_text("precious")
    with pytest.raises(ListenError, match="not a socket"):
        bind(Address(path=str(path)), "x")
    assert path.read_text() == "precious"


def test_a_successors_path_survives_our_end(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    old = bind(Address(path=path), "x")
    os.unlink(path)
    new = bind(Address(path=path), "x")
    old.close()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    new.close()


def test_a_failed_prepare_changes_nothing(tmp_path: Path) -> None:
    listeners = Listeners()
    kept = listeners.prepare([("a", ANY_PORT)])
    blocker = bind(ANY_PORT, "blocker")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ListenError):
        listeners.prepare([("a", ANY_PORT), ("b", Address("127.0.0.1", 0)), ("c", blocker.actual)])
    assert set(os.listdir("/proc/self/fd")) == before
    assert listeners.prepare([("a", ANY_PORT)])["a"] is kept["a"]
    listeners.close()
    blocker.close()


def test_a_renamed_listener_keeps_its_socket() -> None:
    listeners = Listeners()
    free = bind(ANY_PORT, "x")
    address = free.actual
    free.close()
    old = listeners.prepare([("a", address)])
    new = listeners.prepare([("b", address)])
    assert old["a"] is new["b"]
    listeners.keep_only(new)
    assert not new["b"].closed
    listeners.close()
    assert new["b"].closed


# --- hand-over ------------------------------------------------------------------------------------


def connected(address: Address) -> socket.socket:
    if not address.is_unix:
        return socket.create_connection((address.host, address.port))
    client = socket.socket(socket.AF_UNIX)
    client.connect(address.path)
    return client


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "localhost", "unix"])
def test_a_socket_is_handed_over_with_whoever_waits_in_it(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "a.sock")
    address = {
        "tcp": ANY_PORT,
        "tcp6": Address("::1", 0),
        "localhost": Address("localhost", 0),
        "unix": Address(path=path),
    }[kind]
    old, new = Listeners(), Listeners()
    given = old.prepare([("a", address)])["a"]
    waiting = connected(given.actual)
    new.adopt(address, "a", os.dup(given.sock.fileno()), given.inode)
    taken = new.prepare([("a", address)])["a"]
    assert (taken.actual, taken.inode, taken.owned) == (given.actual, given.inode, False)
    assert not taken.sock.getblocking()
    assert not taken.sock.get_inheritable()
    old.forget()
    assert given.closed
    new.own()
    with waiting, taken.sock.accept()[0] as found:
        found.send(b"x")
        assert waiting.recv(1) == b"x"
    new.close()
    assert not os.path.exists(path), "it was ours by then"


def test_a_successor_that_gives_up_leaves_the_path(tmp_path: Path) -> None:
    address = Address(path=str(tmp_path / "a.sock"))
    old, new = Listeners(), Listeners()
    given = old.prepare([("a", address)])["a"]
    new.adopt(address, "a", os.dup(given.sock.fileno()), given.inode)
    mine = new.prepare([("a", address), ("b", Address(path=str(tmp_path / "b.sock")))])
    new.close()
    assert mine["b"].closed
    assert not (tmp_path / "b.sock").exists()
    connected(address).close()
    old.close()
    assert not (tmp_path / "a.sock").exists()


def test_what_nobody_wants_any_more_goes_with_its_path(tmp_path: Path) -> None:
    gone = Address(path=str(tmp_path / "gone.sock"))
    admin = Address(path=str(tmp_path / "admin.sock"))
    old, new = Listeners(), Listeners()
    found = old.prepare([("kept", ANY_PORT), ("gone", gone), ("__admin__", admin)])
    for name, bound in found.items():
        new.adopt(bound.address, name, os.dup(bound.sock.fileno()), bound.inode)
    mine = new.take(admin, "__admin__")
    assert mine is not None
    assert new.take(admin, "__admin__") is None
    kept = new.prepare([("kept", ANY_PORT)])
    assert kept["kept"].actual == found["kept"].actual, "a port that the kernel chose stays"
    new.keep_only(kept)
    assert (tmp_path / "gone.sock").exists(), "as long as the other one may go on"
    old.forget()
    new.own()
    assert mine.owned
    assert not (tmp_path / "gone.sock").exists()
    connected(admin).close()
    mine.close()
    assert not (tmp_path / "admin.sock").exists()
    new.close()


def test_a_path_that_somebody_else_has_by_now_is_left_to_them(tmp_path: Path) -> None:
    address = Address(path=str(tmp_path / "a.sock"))
    old, new = Listeners(), Listeners()
    given = old.prepare([("a", address)])["a"]
    new.adopt(address, "a", os.dup(given.sock.fileno()), given.inode)
    os.unlink(address.path)
    other = bind(address, "other")
    old.forget()
    new.own()
    new.close()
    connected(address).close()
    other.close()


def test_what_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    unix, tcp = bind(Address(path=path), "u"), bind(ANY_PORT, "t")
    six = bind(Address("::1", tcp.actual.port), "6")
    quiet = socket.socket()
    quiet.bind(("127.0.0.1", 0))
    datagrams = socket.socket(type=socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 0))
    packets = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    packets.bind(str(tmp_path / "p.sock"))
    packets.listen()
    file = os.open(tmp_path, os.O_RDONLY)
    port = tcp.actual.port
    for fd, address in (
        (unix.sock.fileno(), ANY_PORT),
        (tcp.sock.fileno(), Address(path=path)),
        (tcp.sock.fileno(), Address("127.0.0.1", port + 1 if port < 65535 else 1)),
        (tcp.sock.fileno(), Address("127.0.0.2", port)),
        (tcp.sock.fileno(), Address("0.0.0.0", port)),
        (six.sock.fileno(), Address("127.0.0.1", port)),
        (tcp.sock.fileno(), Address("::1", port)),
        (unix.sock.fileno(), Address(path=path + "x")),
        (quiet.fileno(), ANY_PORT),
        (datagrams.fileno(), ANY_PORT),
        (packets.fileno(), Address(path=str(tmp_path / "p.sock"))),
        (file, ANY_PORT),
    ):
        came = os.dup(fd)
        with pytest.raises(ValueError, match="listener a: "):
            Listeners().adopt(address, "a", came, None)
        assert_closed(came)
    with pytest.raises(ValueError, match="listener a: "):
        Listeners().adopt(ANY_PORT, "a", 1 << 30, None)
    twice = Listeners()
    twice.adopt(tcp.actual, "a", os.dup(tcp.sock.fileno()), None)
    came = os.dup(tcp.sock.fileno())
    with pytest.raises(ValueError, match="came twice"):
        twice.adopt(tcp.actual, "b", came, None)
    assert_closed(came)
    twice.close()
    connected(tcp.actual).close()
    for sock in (unix, tcp, six, quiet, datagrams, packets):
        sock.close()
    os.close(file)


def assert_closed(fd: int) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
