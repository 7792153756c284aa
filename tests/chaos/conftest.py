"""Tests of this folder may be coroutines, bounded by TEST_S: they take seconds;
those marked `full` by FULL_S."""

from __future__ import annotations

import pytest

from tests.coroutines import run_if_coroutine

TEST_S = 60.0
FULL_S = 400.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    full = pyfuncitem.get_closest_marker("full") is not None
    return run_if_coroutine(pyfuncitem, FULL_S if full else TEST_S)
