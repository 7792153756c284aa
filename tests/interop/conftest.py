"""The peers are made first, and no process outlives its test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop import setup
from tests.interop.harness import Fleet, fleet


@pytest.fixture(scope="session")
def peers() -> None:
    """Made when they are out of date: a second run costs nothing."""
    setup.ensure(print)


@pytest.fixture
def ships(peers: None, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path) as started:
        yield started
