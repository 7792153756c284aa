"""Each test of this folder runs on asyncio's loop and on uvloop's, within a bound, and must leave
no task, no socket and no thread behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

HERE = Path(__file__).parent
TEST_S = 20.0
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("error"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if inspect.iscoroutinefunction(metafunc.function):
        metafunc.fixturenames.append("loop_kind")
        metafunc.parametrize("loop_kind", list(LOOPS))


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
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if (
            left
        ):  # a connection that the other end has just given up ends by itself; a leak does not
            _, left = await asyncio.wait(left, timeout=1)
        assert not left, f"tasks are left: {left}"

    with asyncio.Runner(loop_factory=LOOPS[str(pyfuncitem.callspec.params["loop_kind"])]) as runner:
        runner.run(bounded())
    return True


def sockets() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if target.startswith("socket:"):
                found.add(target)
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = sockets()
    yield
    gc.collect()
    assert sockets() <= before, "sockets are left open"
    threads = [t for t in threading.enumerate() if t.name.startswith("fastmesh")]
    for thread in threads:
        thread.join(5.0)
    assert not any(thread.is_alive() for thread in threads), f"threads are left: {threads}"
