"""Tests that are coroutines: each runs on a uvloop of its own, and within a bound."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
import uvloop


def run_if_coroutine(pyfuncitem: pytest.Function, most_s: float) -> bool | None:
    """For a conftest's `pytest_pyfunc_call`. A hang is a finding, not a reason to wait."""
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in names}

    async def bounded() -> None:
        async with asyncio.timeout(most_s):
            await test(**arguments)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())
    return True
