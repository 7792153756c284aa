"""What the README shows must work when pasted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastmesh import config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_configuration_works_as_it_stands(tmp_path: Path) -> None:
    text, mesh = fenced("yaml")
    path = tmp_path / "mesh.yaml"
    path.write_text(text)
    found = config.load(path)
    assert [c.name for c in found.clusters] == ["orders", "others"]
    assert found.limits.request_timeout_ms == 3000
    assert found.state_dir == str(tmp_path / "run/node-1"), "relative paths start at the file"
    path.write_text(mesh)
    found = config.load(path)
    assert found.push is not None
    assert [b.name for b in found.push.brokers] == ["b1"]


def test_commands_are_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"^make ([a-z-]+)", "\n".join(fenced("sh")), re.MULTILINE))
    assert used >= {"demo", "test", "bench", "perf-gate"}
    assert used <= targets


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/quickstart.md",
        "docs/handover.md",
        "docs/operations/drain.md",
        "docs/operations/upgrade.md",
    ],
)
def test_linked_files_exist(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", path.read_text())
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


def test_every_make_target_explains_itself() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.findall(r"^\.PHONY: ([a-z-]+)$", text, re.MULTILINE)
    explained = re.findall(r"^([a-z-]+):.*## .+$", text, re.MULTILINE)
    assert phony == explained
