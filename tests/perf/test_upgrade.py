"""The upgrade scenario: its arithmetic, and a checker that sees what was lost and nothing else."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from perf import host, replacing, trial, upgrade, upgrade_report
from perf.contenders import CONTENDERS, Contender, Place

GOOD = upgrade_report.Trial(
    connections=1000,
    rate_per_s=10000,
    upgrades=2,
    kept=1000,
    resets=0,
    failed={},
    broken={},
    answered=90000,
    gap_before_ms=4.0,
    gaps_ms=[20.0, 30.0],
    slowest_ms=25.0,
    errors_s=None,
    gone_s=[1.0, 1.5],
    command_s=[1.1, 1.6],
    newcomers=100,
    newcomers_failed={},
    newcomer_slowest_ms=9.0,
    reports=[{"ok": True, "pause_ms": [10.0]}, {"ok": True, "pause_ms": [12.5]}],
)
BAD = replace(
    GOOD,
    kept=900,
    resets=40,
    failed={"lost": 120, "status.5": 3},
    broken={"disconnected": 100},
    gone_s=[1.0, None],
    newcomers_failed={"connect_failed": 7},
    reports=[],
)


def result(**ways: list[upgrade_report.Trial]) -> dict[str, Any]:
    entries = {
        name: {
            "trials": [asdict(one) for one in trials],
            "discarded": [],
            "left_out": "" if trials else "no room",
            "failed": "",
            "wanted": 10000,
            "commit": "abc",
        }
        for name, trials in ways.items()
    }
    return {
        "date": "today",
        "host": {
            "commit": "abc",
            "cpus": 2,
            "cpu": "x",
            "kernel": "6",
            "open_files_max": 20000,
        },
        "placement": "pinned",
        "kept_stolen_rounds": False,
        "contenders": {name: {"how": "somehow", "version": "1"} for name in ways},
        "sizes": {"c10000": entries},
    }


def test_the_table_adds_what_must_not_happen_and_shows_the_worst_times() -> None:
    text = upgrade_report.text(result(fastmesh=[GOOD, GOOD], haproxy=[BAD], envoy=[]))
    ours, theirs, nobody = (line for line in text.splitlines() if line.startswith("| 1"))
    assert "| 100.0% (2,000 of 2,000, 4 upgrades) | 0 | 0 of 180,000 | 30.0 (4.0) | 25.0 |" in ours
    assert "| 1.50 | 10.00 / 12.50 / 12.50 |" in ours
    assert "90.0% (900 of 1,000" in theirs
    assert "123 of 90,123 (lost 120, status.5 3)" in theirs
    assert "| 7 of 100 | not gone | – |" in theirs
    assert "left out: no room" in nobody


@pytest.mark.parametrize(
    ("worse", "missed"),
    [
        ({}, False),
        ({"reports": [{"pause_ms": [50.1]}]}, True),
        ({"kept": 999}, True),
        ({"failed": {"late": 1}}, True),
    ],
    ids=str,
)
def test_targets_are_for_the_longest_pause_and_for_nothing_lost(
    worse: dict[str, Any], missed: bool
) -> None:
    said = "\n".join(upgrade_report.verdict(result(fastmesh=[GOOD, replace(GOOD, **worse)])))
    assert ("missed" in said) is missed
    assert "met" in said


def test_a_trial_that_failed_is_told_beside_those_that_did_not() -> None:
    found = result(fastmesh=[GOOD])
    assert upgrade_report.failures(found) == []
    found["sizes"]["c10000"]["fastmesh"]["failed"] = "no end within 30 s"
    assert "fastmesh at 10,000 connections failed: no end within 30 s" in upgrade_report.text(found)


@pytest.mark.parametrize(
    "error", [trial.TrialError("refused"), OSError(24, "too many"), TimeoutError("late")], ids=str
)
def test_an_error_of_any_kind_ends_a_contender_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(way: replacing.Way, connections: int) -> upgrade_report.Trial:
        raise error

    monkeypatch.setattr(upgrade, "one_trial", fail)
    calibration = host.Calibration(host.ALL_CPUS)
    found = upgrade.measure(
        replacing.WAYS["mosn"], 10, 2, calibration=calibration, keep_stolen=True
    )
    assert found["failed"] == str(error)
    assert found["trials"] == []


def test_nothing_is_judged_that_was_not_measured() -> None:
    assert upgrade_report.verdict(result(haproxy=[BAD])) == []


@pytest.mark.parametrize(
    ("q", "expected"), [(0.0, 1.0), (0.5, 50.0), (0.99, 99.0), (0.995, 100.0), (1.0, 100.0)]
)
def test_quantiles_are_values_that_occurred(q: float, expected: float) -> None:
    assert upgrade_report.quantile([float(n) for n in range(100, 0, -1)], q) == expected


def test_the_picture_is_well_formed_and_names_everybody() -> None:
    import xml.etree.ElementTree as ET

    ways = {"fastmesh": [GOOD], "fastmesh (70 %)": [GOOD], "mosn": [BAD], "envoy": []}
    drawn = upgrade_report.picture(result(**ways))
    texts = [element.text or "" for element in ET.fromstring(drawn).iter()]
    assert {"fastmesh", "fastmesh (70 %)", "mosn", "stays"} <= set(texts)
    assert "envoy" not in texts
    assert any("paused for 10.0 ms (at most 12.5)" in text for text in texts)
    assert {"1,000, 70 %", "10.0 / 12.5 / 12.5 of 2"} <= set(texts)


@pytest.mark.parametrize(
    ("value", "share"), [(0.5, 0.0), (1.0, 0.0), (10.0, 0.25), (100.0, 0.5), (10000.0, 1.0)]
)
def test_the_scale_by_tens(value: float, share: float) -> None:
    assert upgrade_report.scaled(value, 10000.0, by_tens=True) == pytest.approx(share)


def test_sizes_end_at_the_descriptor_limit_and_relays_get_what_fits() -> None:
    assert upgrade.sizes(20000)["cmax"] == 19500
    assert upgrade.sizes(1 << 20)["cmax"] == upgrade.CLIENTS_MAX
    ours = replace(replacing.WAYS["mosn"], contender="fastmesh")
    relay = replace(ours, descriptors=2)
    assert upgrade.left_out(ours, 19500, 20000) == (19500, "")
    assert upgrade.left_out(relay, 10000, 20000) == (9800, "")
    count, why = upgrade.left_out(relay, 19500, 20000)
    assert count == 0
    assert "two descriptors" in why


def test_a_contender_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "mosn", replace(CONTENDERS["mosn"], find=lambda: None))
    assert "perf.setup mosn" in upgrade.left_out(replacing.WAYS["mosn"], 1000, 20000)[1]
    known = upgrade.versions([replacing.WAYS["mosn"]])
    assert "perf.setup mosn" in known["mosn"]["missing"]


def test_only_takes_sizes_and_ways_and_refuses_others() -> None:
    assert upgrade.names("c1000,mosn") == (["c1000"], ["mosn"])
    assert upgrade.names("") == (list(upgrade.sizes(0)), list(replacing.WAYS))
    with pytest.raises(SystemExit, match="nonsense"):
        upgrade.names("nonsense")


def test_pieces_of_one_host_make_one_result_whatever_their_commits() -> None:
    before, now = result(mosn=[GOOD]), result(haproxy=[BAD])
    now["host"] = now["host"] | {"commit": "def"}
    now["sizes"] = {}
    whole = upgrade.continued(before, now)
    assert set(whole["contenders"]) == {"mosn", "haproxy"}
    assert whole["sizes"] == before["sizes"]
    with pytest.raises(SystemExit, match="another host"):
        upgrade.continued(before, now | {"host": now["host"] | {"kernel": "7"}})


@pytest.mark.parametrize("name", ["haproxy", "envoy", "mosn"])
def test_configurations_of_processes_that_will_be_replaced(name: str, tmp_path: Path) -> None:
    place = Place("127.0.0.1:11111", "127.0.0.1:22222", tmp_path, patience_s=5.0)
    command = " ".join(CONTENDERS[name].command("program", place))
    text = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    expected = {
        "haproxy": (" -W ", "hard-stop-after 5000ms"),
        "envoy": ("--parent-shutdown-time-s 5", "11111"),
        "mosn": ("/conf/mosn.json", '"graceful_timeout": "5s"'),
    }[name]
    assert expected[0] in command
    assert expected[1] in text


# --- the checker ----------------------------------------------------------------------------------


def service(listen: str) -> list[str]:
    return [sys.executable, "-m", "fastmesh.bench", "serve", "--listen", listen]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> replacing.Way:
    """A contender that is only an echo service, and short phases."""
    monkeypatch.setitem(
        CONTENDERS,
        "toy",
        Contender(
            "toy",
            "an echo service",
            lambda: sys.executable,
            lambda binary: "1",
            lambda binary, place: service(place.listen),
            "nothing",
        ),
    )
    for name, value in {"BEFORE_S": 0.3, "BETWEEN_S": 0.2, "AFTER_S": 0.1}.items():
        monkeypatch.setattr(upgrade, name, value)
    return replacing.Way("toy", "toy", "somehow", lambda site: None, 1, 10.0, rate=2000.0)  # type: ignore[arg-type,return-value]


def replace_rudely(site: replacing.Site) -> replacing.Replaced:
    """The old one ends, and then somebody else listens there."""
    done = replacing.Replaced(site.pid, replacing.pidfd(site.pid))
    os.kill(site.pid, 15)
    assert done.gone(10.0)
    new = trial.running(
        service(site.place.listen), host.placement().proxy, site.place.folder / "new.log"
    )
    done.new_pid = site.stack.enter_context(new).pid
    return done


def replace_nothing(site: replacing.Site) -> replacing.Replaced:
    """Something else ends; clients cannot notice."""
    other = subprocess.Popen([sys.executable, "-c", ""])
    done = replacing.Replaced(other.pid, replacing.pidfd(other.pid), new_pid=site.pid)
    site.stack.callback(other.wait)
    return done


def test_the_checker_sees_every_connection_that_ended(toy: replacing.Way) -> None:
    found = upgrade.one_trial(replace(toy, replace=replace_rudely), 40)
    assert found.kept == 0
    assert found.broken["disconnected"] >= 40
    assert max(found.gaps_ms) > 50.0
    assert found.gone_s[0] is not None
    assert found.gone_s[0] < 10.0
    assert found.errors_s is not None


def test_the_checker_sees_nothing_where_nothing_happens(toy: replacing.Way) -> None:
    found = upgrade.one_trial(replace(toy, replace=replace_nothing, upgrades=2), 40)
    assert found.kept == found.connections == 40
    assert found.failed == found.broken == found.newcomers_failed == {}
    assert found.errors_s is None
    assert len(found.gaps_ms) == len(found.gone_s) == 2
    assert found.newcomers > 0
    assert found.answered > 500


def test_a_successor_that_ended_is_no_replacement(toy: replacing.Way) -> None:
    def into_nothing(site: replacing.Site) -> replacing.Replaced:
        done = replace_nothing(site)
        done.new_pid = subprocess.Popen([sys.executable, "-c", ""]).pid
        with suppress(ChildProcessError):
            os.waitpid(done.new_pid, 0)
        return done

    with pytest.raises(trial.TrialError, match="new process has ended"):
        upgrade.one_trial(replace(toy, replace=into_nothing), 40)


def report_of(pid: int, **changed: Any) -> dict[str, Any]:
    return {"ok": True, "old_pid": pid, "new_pid": pid + 1, "pause_ms": [1.0]} | changed


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        (1, report_of(7, ok=False, reason="too old"), "too old"),
        (0, report_of(8), "another process than 7"),
        (0, report_of(7, new_pid=7), "another process than 7"),
        (64, None, "code 64: broken"),
    ],
    ids=["refused", "of another one", "not replaced", "no report"],
)
def test_a_report_that_is_not_of_this_upgrade_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    code: int,
    said: dict[str, Any] | None,
    reason: str,
) -> None:
    """The command is played by a shell; the process that it reports must be the one we know."""
    shell = tmp_path / "fastmesh"
    text = "broken" if said is None else json.dumps(said)
    shell.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    shell.chmod(0o755)
    monkeypatch.setattr(replacing, "pidfd", lambda pid: os.open(os.devnull, os.O_RDONLY))
    monkeypatch.setattr(replacing, "end_process", lambda pid: None)
    place = Place("127.0.0.1:1", "", tmp_path)
    with ExitStack() as stack, pytest.raises(trial.TrialError, match=reason):
        replacing.replace_fastmesh(
            replacing.Site(CONTENDERS["fastmesh"], str(shell), place, 7, stack)
        )
