"""Shared fixtures: a configuration file to change, and a mesh over a fake engine."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastmesh import config as configuration
from fastmesh.app import Mesh
from fastmesh.observe.log import Log
from tests.fake_engine import FakeEngine

SMALL = """\
node: {name: n1, app: shop}
state_dir: run
admin: {listen: "127.0.0.1:0"}
listeners:
  - name: rpc
    listen: "127.0.0.1:0"
    protocol: bolt
    routes:
      - {match: {service: "com.example.Order:1.0"}, cluster: orders}
      - {cluster: others}
clusters:
  - {name: orders, protocol: bolt, endpoints: [{address: "127.0.0.1:12201"}]}
  - {name: others, protocol: bolt, endpoints: [{address: "127.0.0.1:12202"}]}
limits: {connections_max: 100, stop_timeout_ms: 200}
"""


def with_listener(text: str, name: str, address: str = "127.0.0.1:0") -> str:
    """The same with one more listener."""
    line = f'{{name: {name}, listen: "{address}", protocol: bolt, routes: [{{cluster: others}}]}}'
    return text.replace("clusters:\n", f"  - {line}\nclusters:\n", 1)


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    """A mesh that serves takes all that lives out of the collector's sight. In a process of tests
    that would keep every engine of every test, with its descriptors."""
    yield
    gc.unfreeze()


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "fastmesh.yaml"
    path.write_text(SMALL)
    return path


class LogLines:
    """A Log whose lines a test reads."""

    def __init__(self, **options: Any) -> None:
        self._read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.log = Log(level="debug", fd=write, **options)
        self._text = ""

    def text(self) -> str:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._read, 65536):
                self._text += data.decode()
        return self._text


@pytest.fixture
def log_lines() -> LogLines:
    return LogLines()


@pytest.fixture
def running(config_file: Path, log_lines: LogLines) -> Callable[..., Any]:
    """`async with running() as mesh:` a mesh over a fake engine, stopped at the end."""

    @contextlib.asynccontextmanager
    async def run(**options: Any) -> AsyncIterator[Mesh]:
        engine = options.pop("engine_factory", FakeEngine)
        config = configuration.load(config_file)
        mesh = Mesh(config, log_lines.log, engine_factory=engine, **options)
        await mesh.start()
        try:
            yield mesh
        finally:
            if mesh.state != "stopping":
                await mesh.stop()

    return run
