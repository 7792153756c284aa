"""Style that a machine can judge, and no more: import direction, banned names, format.

An exception to a rule stands in its allow-list below, with the reason. A name on a list that is no
longer needed fails too, so that the lists stay short.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COLUMNS_MAX = {".pyi": 100, ".pyx": 120, ".pxd": 120}
"""Signatures carry `noexcept nogil`; wrapping them costs more than twenty columns."""

# --- import direction -----------------------------------------------------------------------------
# cli -> app -> {mesh, handover, admin, broker} -> http -> {protocols, control, observe} -> _ext:
# a module may import from floors below its own, and within its own package.

FLOORS = {
    "": 0,  # the package itself: public names only
    "_version": -1,
    "limits": 0,
    "errors": 0,
    "_ext": 1,
    "saved": 1,
    "address": 1,
    "document": 1.5,  # addresses stand in documents
    "config": 2,
    "protocols": 3,
    "control": 3,
    "observe": 3,
    "http": 3.5,  # it logs, and every interface stands on it
    "mesh": 4,
    "handover": 4,
    "admin": 4,
    "broker": 4,
    "client": 4,
    "app": 5,
    "bench": 5,
    "demo": 6,
    "cli": 7,
    "__main__": 8,
}

EXT_MAY_IMPORT = {"errors"}
"""All that the fast path knows of fastmesh."""

IMPORTS_ALLOWED: dict[tuple[str, str], str] = {}
"""(importer, imported) -> why that direction is right all the same."""


def sources(suffix: str, *folders: str) -> list[Path]:
    found = [p for folder in folders for p in sorted((ROOT / folder).rglob(f"*{suffix}"))]
    return [p for p in found if "node_modules" not in p.parts]


def package_of(path: Path) -> str:
    """The part of fastmesh that a file belongs to: `_ext`, `admin`, `cli`."""
    first = path.relative_to(ROOT / "fastmesh").parts[0]
    name = first.removesuffix(".py")
    return "" if name == "__init__" else name


def python_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, relative imports resolved."""
    parts = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


CIMPORT = re.compile(r"^\s*(?:from\s+(\S+)\s+c?import\s+(\w+)|c?import\s+([\w.]+))")


def cython_imports(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if found := CIMPORT.match(line):
            module = f"{found[1]}.{found[2]}" if found[1] else found[3]
            if module.startswith("."):
                dots = len(module) - len(module.lstrip("."))
                base = path.relative_to(ROOT).parts[:-dots]
                module = ".".join([*base, module.lstrip(".")])
            yield number, module


def wrong_imports() -> Iterator[tuple[tuple[str, str], str]]:
    files = [(p, python_imports(p)) for p in sources(".py", "fastmesh")]
    files += [(p, python_imports(p)) for p in sources(".pyi", "fastmesh")]
    files += [(p, cython_imports(p)) for p in sources(".pyx", "fastmesh")]
    files += [(p, cython_imports(p)) for p in sources(".pxd", "fastmesh")]
    for path, imports in files:
        importer = package_of(path)
        assert importer in FLOORS, f"give {importer} a floor in FLOORS"
        for line, name in imports:
            parts = name.split(".")
            where = f"{path.relative_to(ROOT)}:{line}"
            if parts[0] in ("tests", "perf"):
                yield (importer, parts[0]), f"{where} imports {name}"
            if parts[0] != "fastmesh" or len(parts) == 1:
                continue
            imported = parts[1] if parts[1] in FLOORS else ""
            if imported == importer:
                continue
            if importer == "_ext":
                right = imported in EXT_MAY_IMPORT
            else:
                right = FLOORS[imported] < FLOORS[importer]
            if not right:
                yield (importer, imported), f"{where} imports {name}"


def test_imports_point_down_only() -> None:
    found = list(wrong_imports())
    wrong = [text for pair, text in found if pair not in IMPORTS_ALLOWED]
    assert not wrong, "\n".join(wrong)
    unused = set(IMPORTS_ALLOWED) - {pair for pair, _ in found}
    assert not unused, f"not needed any more: {unused}"


# --- banned names ---------------------------------------------------------------------------------

BANNED = {
    "time.time": "time.monotonic: the wall clock jumps",
    "time.time_ns": "time.monotonic_ns: the wall clock jumps",
    "datetime.datetime.utcnow": "datetime.now(UTC), and only for people to read",
    "time.sleep": "a gate, or a poll of a state with a deadline",
    "os.system": "subprocess.run with a list",
    "os.popen": "subprocess.run with a list",
    "pickle.loads": "msgspec: bytes of others must not run code",
    "pickle.load": "msgspec: bytes of others must not run code",
    "yaml.load": "yaml.safe_load, or a loader derived from the safe one",
    "yaml.unsafe_load": "yaml.safe_load",
    "asyncio.get_event_loop": "asyncio.get_running_loop",
    "socket.SO_REUSEPORT": "one listening socket: with several, connections are lost when one goes",
    "tempfile.mktemp": "tempfile.mkstemp",
}

BANNED_IN_CYTHON = {
    "CLOCK_REALTIME": "CLOCK_MONOTONIC: the wall clock jumps",
    "gettimeofday": "clock_gettime(CLOCK_MONOTONIC)",
    "SO_REUSEPORT": "one listening socket: with several, connections are lost when one goes",
    "strcpy": "memcpy with a length that was checked",
    "sprintf": "snprintf",
    "alloca": "a bounded buffer",
}

NAMES_ALLOWED: dict[tuple[str, str], str] = {
    ("fastmesh/handover/faults.py", "time.sleep"): "the fault is that nothing happens meanwhile",
    ("fastmesh/client/client.py", "time.time_ns"): "fm.born_ms is read on other hosts",
    ("tests/_ext/bed.py", "time.sleep"): "between two looks of the poll with a deadline",
    ("tests/_ext/test_engine.py", "time.sleep"): "time in which nothing must happen",
    ("tests/_ext/test_handover.py", "time.sleep"): "time in which nothing must happen",
    ("tests/_ext/test_handover_review.py", "time.sleep"): "time in which nothing must happen",
    ("tests/_ext/test_groups_stress.py", "time.sleep"): "between two tries at a full command ring",
    ("tests/interop/harness.py", "time.sleep"): "between two looks of the poll with a deadline",
    ("tests/interop/peers/python/client.py", "time.sleep"): "paces the load, nothing waits on it",
    (
        "tests/interop/peers/python/server.py",
        "time.sleep",
    ): "one-way frames have no answer to wait for",
}
"""(file, name) -> why it is right there."""


def used_names(path: Path) -> Iterator[tuple[int, str]]:
    """Dotted names as they are meant: `import time as t; t.time` is `time.time`."""
    tree = ast.parse(path.read_text())
    meaning: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                meaning[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                meaning[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = [node.attr]
            inner = node.value
            while isinstance(inner, ast.Attribute):
                chain.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                root = meaning.get(inner.id, inner.id)
                yield node.lineno, ".".join([root, *reversed(chain)])


def banned_uses() -> Iterator[tuple[tuple[str, str], str]]:
    for path in sources(".py", "fastmesh", "tests", "perf"):
        name = str(path.relative_to(ROOT))
        for line, used in used_names(path):
            if used in BANNED:
                yield (name, used), f"{name}:{line}: {used}; use {BANNED[used]}"
    for suffix in (".pyx", ".pxd"):
        for path in sources(suffix, "fastmesh", "tests"):
            name = str(path.relative_to(ROOT))
            for number, text in enumerate(path.read_text().splitlines(), 1):
                code = text.partition("#")[0]
                for banned, better in BANNED_IN_CYTHON.items():
                    if re.search(rf"\b{banned}\b", code):
                        yield (name, banned), f"{name}:{number}: {banned}; use {better}"


def test_no_banned_names() -> None:
    found = list(banned_uses())
    wrong = [text for pair, text in found if pair not in NAMES_ALLOWED]
    assert not wrong, "\n".join(wrong)
    unused = set(NAMES_ALLOWED) - {pair for pair, _ in found}
    assert not unused, f"not needed any more: {unused}"


@pytest.mark.parametrize(
    "text",
    [
        "import time\ntime.time()",
        "import time as t\nt.time()",
        "from time import time\ntime()",
        "from time import sleep as nap\nnap(1)",
        "import asyncio\nasyncio.get_event_loop()",
    ],
)
def test_disguises_are_seen_through(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.py"
    path.write_text(text)
    assert any(name in BANNED for _, name in used_names(path))


# --- format ---------------------------------------------------------------------------------------


def test_python_is_formatted() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "--quiet", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr + "repair it: ruff format ."


def test_cython_is_formatted() -> None:
    wrong = []
    for suffix, columns in COLUMNS_MAX.items():
        for path in sources(suffix, "fastmesh", "tests"):
            text = path.read_text()
            name = path.relative_to(ROOT)
            if not text.endswith("\n") or text.endswith("\n\n"):
                wrong.append(f"{name}: one newline at the end")
            for number, line in enumerate(text.splitlines(), 1):
                if len(line) > columns:
                    wrong.append(f"{name}:{number}: {len(line)} columns")
                if line != line.rstrip():
                    wrong.append(f"{name}:{number}: trailing space")
                if "\t" in line:
                    wrong.append(f"{name}:{number}: a tab")
    assert not wrong, "\n".join(wrong)
