"""Tests of this folder may be coroutines, bounded by TEST_S."""

from __future__ import annotations

import pytest

from tests.coroutines import run_if_coroutine

TEST_S = 20.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    return run_if_coroutine(pyfuncitem, TEST_S)
