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
