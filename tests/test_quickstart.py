"""docs/quickstart.md is pasted into a shell as it stands, but for ports, places and patience."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "quickstart.md").read_text()
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
PORTS = ("12300", "12310", "12400", "12500", "12510", "7070", "7071", "7072", "7080", "7081")
TIMEOUT_S = 60


def free_ports() -> dict[str, str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in PORTS]
        return {p: str(s.getsockname()[1]) for p, s in zip(PORTS, sockets, strict=True)}


def elsewhere(text: str, ports: dict[str, str]) -> str:
    return re.sub(r"\b\d{4,5}\b", lambda found: ports.get(found[0], found[0]), text)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page is for people with curl")
def test_the_page_works_when_pasted(tmp_path: Path) -> None:
    ports = free_ports()
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for path in (tmp_path / "examples" / "mesh").iterdir():
        path.write_text(elsewhere(path.read_text(), ports))
    script = elsewhere("set -e\n" + "".join(SHELL), ports)
    for as_it_stands, here in (
        ("make build\n", ""),
        (".venv/bin/python examples/mesh_async.py", "{} --mesh 127.0.0.1:{} --registration {}"),
        ("mesh_traffic.py --name node-1", "{} --mesh 127.0.0.1:{} --registration {}"),
        ("sleep 5\n", "sleep 3\n"),
        (".venv/bin/python", sys.executable),
    ):
        assert as_it_stands in script
        url = f"http://127.0.0.1:{ports['7071']}"
        script = script.replace(as_it_stands, here.format(as_it_stands, ports["12300"], url))
    shell = subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        shown, _ = shell.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(shell.pid, signal.SIGKILL)
        pytest.fail(shell.communicate()[0])
    assert shell.returncode == 0, shown
    assert shown.count('{"state":"serving"}') == 3, shown
    assert '"client":"by-hand"' in shown
    assert "20 orders taken, 20 billed" in shown
    assert re.search(r'"name":"billing".*"lag":0,.*"consumed":20,', shown), shown
    assert re.search(r"^node-1: \d+ from the broker, \d+ from node-2$", shown, re.MULTILINE), shown
    assert '"forwarded_per_s"' in shown
    assert not (tmp_path / "run").exists()


def test_the_page_and_its_files_speak_of_the_same_ports() -> None:
    files = "".join(p.read_text() for p in sorted((ROOT / "examples" / "mesh").iterdir()))
    assert set(re.findall(r":(\d{4,5})\b", files)) == set(PORTS) - {"7072"}
    assert set(PORTS) <= set(re.findall(r"\b\d{4,5}\b", PAGE))
