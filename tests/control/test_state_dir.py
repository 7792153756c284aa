"""The state directory: one owner, nobody else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fastmesh.control.state_dir import StateDir
from fastmesh.errors import StateError


def test_it_is_made_private_and_says_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "n1"
    held = StateDir(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    with pytest.raises(StateError, match=f"in use by process {os.getpid()}") as caught:
        StateDir(str(path))
    assert caught.value.exit_code == 75
    held.close()
    held.close()
    StateDir(str(path)).close()


def test_a_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StateError, match="chmod 700"):
        StateDir(str(tmp_path))


def test_a_link_a_file_and_a_link_for_a_lock_are_refused(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(StateError):
            StateDir(str(tmp_path / name))
    (tmp_path / "precious").write_text("precious")
    (real / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(StateError):
        StateDir(str(real))
    assert (tmp_path / "precious").read_text() == "precious"


def test_the_lock_travels_and_is_never_let_go(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    old = StateDir(path)
    new = StateDir.adopt(path, os.dup(old.fd))
    (tmp_path / "run" / "lock").write_text("1\n")
    new.own()
    assert (tmp_path / "run" / "lock").read_text() == f"{os.getpid()}\n"
    old.close()
    with pytest.raises(StateError, match=f"process {os.getpid()}"):
        StateDir(path)
    new.close()
    StateDir(path).close()


def test_a_successor_that_gives_up_takes_nothing_away(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    old = StateDir(path)
    StateDir.adopt(path, os.dup(old.fd)).close()
    with pytest.raises(StateError, match="in use"):
        StateDir(path)
    old.close()


def test_what_is_not_the_lock_of_this_directory_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    held = StateDir(path)
    other = StateDir(str(tmp_path / "other"))
    reader, writer = os.pipe()
    os.close(writer)
    opened = os.open(os.path.join(path, "lock"), os.O_RDWR)
    for fd, said in (
        (os.dup(other.fd), "not its lock file"),
        (os.open(path, os.O_RDONLY), "not its lock file"),
        (os.dup(reader), "not its lock file"),
        (opened, "in use by another process"),
        (1 << 30, "Bad file descriptor"),
    ):
        with pytest.raises(StateError, match=said):
            StateDir.adopt(path, fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    with pytest.raises(StateError, match="in use"):
        StateDir(path)
    (tmp_path / "run" / "lock").unlink()
    with pytest.raises(StateError):
        StateDir.adopt(path, os.dup(held.fd))
    os.close(reader)
    held.close()
    other.close()
