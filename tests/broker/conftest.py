from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.broker.bench import Bench
from tests.coroutines import run_if_coroutine

TEST_S = 30.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    return run_if_coroutine(pyfuncitem, TEST_S)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """`make(**options)`: a broker in a directory of its own."""
    made: list[Bench] = []

    def build(**options: Any) -> Bench:
        made.append(Bench(tmp_path / f"data{len(made)}", **options))
        return made[-1]

    yield build
    for bench in made:
        bench.store.close()


@pytest.fixture
def bench(make: Callable[..., Bench]) -> Bench:
    return make()
