"""The service manager is told, where there is one; nothing depends on it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fastmesh.handover.notify import notify


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_all_lines_come_in_one_message(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(tmp_path / "n") if kind == "path" else f"@fastmesh-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0") if kind == "abstract" else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert notify("READY=1", "MAINPID=7", "STATUS=größer")
        assert (
            manager.recv(4096, socket.MSG_DONTWAIT) == "READY=1\nMAINPID=7\nSTATUS=größer".encode()
        )


def test_without_a_manager_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")


@pytest.mark.parametrize("name", ["", "relative", "vsock:2:1", "/nowhere/at/all", "/" + "x" * 300])
def test_a_manager_that_cannot_be_reached_harms_nobody(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    assert not notify("READY=1")


def test_a_manager_that_does_not_read_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        told = 0
        while notify("READY=1"):
            told += 1
            assert told < 10_000
        assert told > 0


def test_text_that_cannot_be_encoded_is_not_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert not notify("STATUS=\udcff")
