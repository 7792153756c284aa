"""What an application pays for: the client brings nothing of the mesh itself along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("uvloop", "numpy", "click", "rich", "yaml", "msgspec", "prometheus_client", "psutil")
OURS = ("engine", "relay", "route", "pool", "conn", "counters")


def test_the_client_alone() -> None:
    code = "import sys, fastmesh.client; print('\\n'.join(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(found.stdout.split())
    assert "fastmesh._ext.push" in loaded
    assert not loaded & set(HEAVY)
    assert not loaded & {f"fastmesh._ext.{name}" for name in OURS}
    assert not loaded & {f"fastmesh.{name}" for name in ("app", "config", "control", "mesh", "cli")}
