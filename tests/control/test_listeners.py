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
