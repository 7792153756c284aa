"""Tests of this folder may be coroutines: each runs on a uvloop of its own, within TEST_S."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
import uvloop

TEST_S = 60.0
"""A hang is a finding, not a reason to wait. Tests here take seconds."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in names}

    async def bounded() -> None:
        async with asyncio.timeout(TEST_S):
            await test(**arguments)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())
    return True
