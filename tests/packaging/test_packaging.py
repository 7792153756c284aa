"""sdist and wheel: each is built from a clean copy and installed into a clean environment, and
works there.

Takes about two minutes, so it has a target of its own (`make packaging`) and is no part of `make
test`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTENSIONS = {
    "bolt",
    "conn",
    "counters",
    "crc32",
    "engine",
    "load",
    "pool",
    "relay",
    "ring",
    "route",
}


def run(*command: str | Path, cwd: Path, seconds: float = 300) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FASTMESH_", "PYTHON"))}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both archives, built in isolation from what a clean checkout has; the wheel from the
    sdist."""
    tree = tmp_path_factory.mktemp("tree") / "fastmesh"
    ignore = shutil.ignore_patterns(
        ".git",
        ".venv",
        ".cache",
        "build",
        "dist",
        "*.egg-info",
        "*.so",
        "*.c",
        "__pycache__",
        "run",
        "node_modules",
        "target",
    )
    shutil.copytree(ROOT, tree, ignore=ignore)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, tree, cwd=out, seconds=600)
    return out


def install(archive: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    run(
        folder / "bin/python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
        archive,
        cwd=folder.parent,
        seconds=600,
    )
    return folder / "bin"


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def binaries(
    request: pytest.FixtureRequest, dist: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    (archive,) = dist.glob("*.whl" if request.param == "wheel" else "*.tar.gz")
    return install(archive, tmp_path_factory.mktemp(request.param) / "venv")


def test_wheel_holds_what_runs_and_what_types(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    built = {Path(n).name.split(".")[0] for n in names if n.endswith(".so")}
    assert built >= EXTENSIONS
    assert "toy" not in built, "a wheel carries no tests"
    assert "fastmesh/py.typed" in names
    assert "fastmesh/_ext/engine.pyi" in names
    assert not [n for n in names if n.startswith(("tests/", "perf/"))]
    assert not [n for n in names if n.endswith(".c")], "generated sources stay at home"
    assert [n for n in names if n.endswith("LICENSE")]


def test_sdist_holds_the_sources(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    for wanted in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastmesh/_ext/atomics.h"):
        assert wanted in names
    for name in EXTENSIONS:
        assert f"fastmesh/_ext/{name}.pyx" in names


def test_installed_command_works(binaries: Path, tmp_path: Path) -> None:
    assert "0." in run(binaries / "fastmesh", "version", cwd=tmp_path)
    assert "run" in run(binaries / "fastmesh", "--help", cwd=tmp_path)
    where = run(
        binaries / "python", "-c", "import fastmesh; print(fastmesh.__file__)", cwd=tmp_path
    )
    assert "site-packages" in where, "the checkout must not be what is tested here"


def test_installed_demo_carries_messages(binaries: Path, tmp_path: Path) -> None:
    """The whole of it, from the installed package, without the optional packages."""
    run(binaries / "fastmesh", "demo", cwd=tmp_path, seconds=60)


def test_readme_configuration_is_accepted(binaries: Path, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    config = text.partition("```yaml\n")[2].partition("```")[0]
    assert "listeners:" in config
    (tmp_path / "mesh.yaml").write_text(config)
    run(binaries / "fastmesh", "check", "-c", "mesh.yaml", cwd=tmp_path)
