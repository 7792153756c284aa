"""Fetch and build the peers, pinned, into .cache/interop: `python -m tests.interop.setup`.

Each peer is one step whose stamp is a digest of what it was made from, so that a second run does
nothing. A missing toolchain or a failing step ends with a message and exit code 1: a peer is never
left out in silence.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
CACHE = HERE.parents[1] / ".cache" / "interop"

PYTHON = CACHE / "python" / "bin" / "python"
NODE_MODULES = CACHE / "node" / "node_modules"
JAVA_CLASSES = CACHE / "java" / "classes"
JAVA_JARS = CACHE / "java" / "jars"
MOSN = CACHE / "mosn" / "mosn"

STEP_S = 900.0
"""Longest a step may take: the Go modules of MOSN on a slow line are the worst of them."""

TOOLS = {
    "java": "openjdk-17-jdk-headless",
    "javac": "openjdk-17-jdk-headless",
    "mvn": "maven",
    "node": "nodejs",
    "npm": "npm",
    "go": "golang-go",
}
COPY_JARS = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies"


class SetupError(Exception):
    """A peer cannot be had; the message says which, and why."""


def run(what: str, command: list[str], cwd: Path, **environment: str) -> None:
    """Run one command of a step. Raises SetupError with the end of its output when it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=STEP_S,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"{what}: no end after {STEP_S:.0f} s: {' '.join(command)}") from None
    if done.returncode != 0:
        raise SetupError(f"{what}: {' '.join(command)}\n{done.stdout[-3000:]}")


def python() -> None:
    folder = CACHE / "python"
    shutil.rmtree(folder, ignore_errors=True)
    run("python", [sys.executable, "-m", "venv", str(folder)], HERE)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run("python", [*pip, "-r", str(PEERS / "python" / "requirements.txt")], HERE)
    run("python", [str(PYTHON), "-c", "import anthunder, mytracer"], HERE)


def node() -> None:
    folder = CACHE / "node"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(PEERS / "node" / name, folder / name)
    run("node", ["npm", "ci", "--ignore-scripts", "--no-progress"], folder)


def java() -> None:
    folder = CACHE / "java"
    shutil.rmtree(folder, ignore_errors=True)
    JAVA_CLASSES.mkdir(parents=True)
    pom = str(PEERS / "java" / "pom.xml")
    jars = [f"-DoutputDirectory={JAVA_JARS}", "-DincludeScope=runtime"]
    run("java", ["mvn", "-q", "-B", "-f", pom, COPY_JARS, *jars], folder)
    sources = sorted(str(path) for path in (PEERS / "java" / "src").rglob("*.java"))
    options = ["-Xlint:all,-processing", "-Werror", "-encoding", "UTF-8"]
    options += ["-d", str(JAVA_CLASSES), "-cp", f"{JAVA_JARS}/*"]
    run("java", ["javac", *options, *sources], folder)


def mosn() -> None:
    MOSN.parent.mkdir(parents=True, exist_ok=True)
    # No cgo: nothing of it is needed, and no C compiler is waited for.
    run(
        "mosn",
        ["go", "build", "-mod=readonly", "-trimpath", "-p", "2", "-o", str(MOSN), "."],
        PEERS / "mosn",
        CGO_ENABLED="0",
        GOFLAGS="-buildvcs=false",
    )


STEPS: dict[str, Callable[[], None]] = {"python": python, "node": node, "java": java, "mosn": mosn}

INPUTS = {
    "python": ("requirements.txt",),
    "node": ("package.json", "package-lock.json", ".npmrc"),
    "java": ("pom.xml", "src"),
    "mosn": ("go.mod", "go.sum", "main.go"),
}


def digest(name: str) -> str:
    """What a step was made from: its files, this file and the interpreter of the environment."""
    total = hashlib.sha256(sys.version.encode())
    paths = [Path(__file__)]
    for entry in INPUTS[name]:
        path = PEERS / name / entry
        paths += sorted(path.rglob("*.java")) if path.is_dir() else [path]
    for path in paths:
        total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def ensure(say: Callable[[str], None] = lambda _: None) -> None:
    """Bring every peer up to date. Raises SetupError."""
    missing = {tool: package for tool, package in TOOLS.items() if not shutil.which(tool)}
    if missing:
        raise SetupError(
            f"the interop peers need {', '.join(missing)}: "
            f"apt-get install {' '.join(sorted(set(missing.values())))}"
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    for name, step in STEPS.items():
        stamp = CACHE / f"{name}.stamp"
        wanted = digest(name)
        if stamp.exists() and stamp.read_text() == wanted:
            continue
        began = time.monotonic()
        stamp.unlink(missing_ok=True)
        step()
        stamp.write_text(wanted)
        say(f"interop peer {name}: made in {time.monotonic() - began:.0f} s")


def main() -> int:
    try:
        ensure(print)
    except SetupError as error:
        print(f"interop: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
