"""What docs/client.md shows and what lies in examples/ is run as it stands, but for addresses."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from tests.client.mesh import FakeMesh, relay

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "client.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
WAIT_S = 15.0


async def run(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        *arguments,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(WAIT_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
async def test_programs_of_the_page(number: int) -> None:
    async with FakeMesh() as mesh:
        mesh.on["publish"] = relay
        text = PROGRAMS[number]
        assert "127.0.0.1:12300" in text
        text = text.replace("http://127.0.0.1:7071", mesh.registration)
        output = await run("-c", text.replace("127.0.0.1:12300", mesh.address))
        seen = [frame for peer in mesh.peers for frame in peer.seen]
        assert any(frame.headers["fm.op"] == "publish" for frame in seen)
        if "bill" in text:
            assert "customer-7 b'...'" in output
        assert not mesh.registered, "closed gracefully"


def test_the_page_has_programs() -> None:
    assert len(PROGRAMS) == 3


async def test_the_asynchronous_example() -> None:
    async with FakeMesh() as mesh:
        mesh.on["publish"] = relay
        where = ["--mesh", mesh.address, "--registration", mesh.registration]
        output = await run("examples/mesh_async.py", *where, "--messages", "12")
        assert output.splitlines()[-1] == "12 orders taken, 12 billed"
        assert "billed 35 to customer-1 (EUR)" in output


async def test_the_synchronous_example() -> None:
    async with FakeMesh() as mesh:
        mesh.on["publish"] = relay
        where = ["--mesh", mesh.address, "--registration", mesh.registration]
        output = await run("examples/mesh_sync.py", *where, "--messages", "10")
        assert output.splitlines()[-1] == "8 payments, 8 receipts"
        assert "refused: no cover for 4" in output
        assert not mesh.prepared, "everything was decided"


async def test_an_example_without_a_mesh_says_so() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import asyncio; from fastmesh.client import MeshClient;"
        "asyncio.run(MeshClient(app='a', topics=['t'], mesh='127.0.0.1:1', registration=None,"
        " start_timeout_ms=200).start())",
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    last = errors.decode().splitlines()[-1]
    assert last.startswith("fastmesh.client.errors.NotTakenError: no connection to the mesh at")
