"""The operator's page knows everything that an upgrade can answer, and what it shows works."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import yaml

from fastmesh.cli import upgrade
from fastmesh.handover import launch, wire
from fastmesh.observe.metrics import HANDOVER_OUTCOMES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "operations/upgrade.md").read_text()
MOST_S = 10.0


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


def fenced(language: str, title: str) -> str:
    """The one block of that language in the section."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", section(title), re.DOTALL)
    return str(block)


def test_every_code_of_a_refusal_says_what_to_do() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", section("When it says no"), flags=re.MULTILINE))
    here = {code for code in launch.EXIT_CODES if code} | {"failed", "late"}
    assert rows == set(get_args(wire.Code)) | here


def test_every_option_and_outcome_is_explained() -> None:
    on_a_host, pause = section("On a host"), section("The pause")
    for option in ("--json", "--mode", "--timeout"):
        assert any(option in parameter.opts for parameter in upgrade.params)
        assert f"`{option}" in on_a_host
    for mode in get_args(wire.Mode):
        assert f"--mode {mode}" in on_a_host
    for outcome in HANDOVER_OUTCOMES:
        assert f"`{outcome}`" in pause


def test_every_field_of_the_report_is_explained_and_read_as_shown() -> None:
    report = json.loads(fenced("json", "The report"))
    rows = " ".join(re.findall(r"^\| (`.+?) \|", section("The report"), flags=re.MULTILINE))
    explained = set(re.findall(r"`\.?([\w.]+)`", rows))
    fields = set(report) - {"moved"} | {f"moved.{name}" for name in report["moved"]}
    assert {name.removeprefix("moved.") for name in fields} == {
        name.removeprefix("moved.") for name in explained
    }
    (text,) = re.findall(r"^```\n(process .*?)```", PAGE, re.DOTALL | re.MULTILINE)
    assert launch.explain(report) == text.splitlines()


def test_links_lead_to_headings() -> None:
    found = re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", PAGE)
    assert found
    for file, anchor in found:
        path = DOCS / "operations" / (file or "upgrade.md")
        titles = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert anchor in anchors, f"{path.name} has no heading #{anchor}"


def test_the_unit_lets_its_main_process_change(tmp_path: Path) -> None:
    text = fenced("ini", "Under systemd")
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    service = unit["Service"]
    assert (service["Type"], service["NotifyAccess"]) == ("notify", "all")
    assert "KillMode" not in service
    assert "PIDFile" not in service
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here to read the rest")
    path = tmp_path / "fastmesh.service"
    path.write_text(text.replace("/usr/bin/fastmesh", "/bin/true"))
    said = subprocess.run(
        ["systemd-analyze", "verify", str(path)], check=False, capture_output=True, text=True
    )
    wrong = [line for line in said.stderr.splitlines() if path.name in line]
    assert not wrong, said.stderr


def test_both_containers_of_the_pod_are_the_same_but_for_the_image() -> None:
    pod = yaml.safe_load(fenced("yaml", "In Kubernetes"))["spec"]
    one, other = pod["containers"]
    for key in ("command", "volumeMounts"):
        assert one[key] == other[key]
    assert one["image"] != other["image"]
    mounted = {mount["name"] for mount in one["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


Serve = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Starts the script of the page with a fastmesh that does what is said; what happens comes line
    by line on stdout."""
    script = tmp_path / "serve.sh"
    script.write_text(fenced("sh", "In Kubernetes"))
    sleep = tmp_path / "sleep"
    sleep.write_text(f'#!/bin/sh\necho idle "$@"\nexec {shutil.which("sleep")} "$@"\n')
    sleep.chmod(0o755)

    def start(does: str) -> subprocess.Popen[str]:
        fastmesh = tmp_path / "fastmesh"
        fastmesh.write_text(f'#!/bin/bash\necho fastmesh "$@"\n{does}\n')
        fastmesh.chmod(0o755)
        return subprocess.Popen(
            ["/bin/sh", str(script)],
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


RUN = "fastmesh run --takeover -c /etc/fastmesh/fastmesh.yaml"


def test_a_container_whose_mesh_was_taken_over_idles_until_it_is_stopped(serve: Serve) -> None:
    with serve("exit 0") as process:
        assert said(process) == RUN
        assert said(process) == "idle infinity"
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(MOST_S)
        assert said(process) == ""  # nobody of it has stdout any more: the sleep has ended too


@pytest.mark.parametrize("code", [1, 64, 75])
def test_a_container_that_was_refused_ends_with_the_reason(serve: Serve, code: int) -> None:
    with serve(f"exit {code}") as process:
        assert said(process) == RUN
        assert process.wait(MOST_S) == code
