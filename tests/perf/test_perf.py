"""The harness: arithmetic and verdicts. A gate that cannot fail would be worse than none."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perf import compare, deliver, gate, host, instructions, report, run, targets, trial
from perf.contenders import CONTENDERS, Place
from perf.scenarios import SCENARIOS, Scenario

GOOD = trial.Measurement(
    throughput_per_s=1000.0,
    p50_us=100.0,
    p90_us=150.0,
    p99_us=200.0,
    p999_us=300.0,
    max_us=400.0,
    cpu_us_per_message=5.0,
    proxy_cpu_share=0.5,
    load_cpu_share=0.5,
    rss_bytes=30 << 20,
    rss_ready_bytes=29 << 20,
    rss_per_idle_connection_bytes=None,
    idle_cpu_share=None,
    connections=64,
    answered=1000,
    errors={},
)


def measured(**changed: Any) -> dict[str, Any]:
    return replace(GOOD, **changed).__dict__


def result(rounds: list[dict[str, dict[str, Any]]], **changed: Any) -> dict[str, Any]:
    scenario = {
        "title": "64 × 1",
        "load": {},
        "placement": "pinned",
        "rounds": rounds,
        "discarded": [],
        "left_out": {},
        "syscalls_per_message": {"fastmesh": {"recvfrom": 1.0, "sendto": 1.0}},
    }
    return {
        "date": "today",
        "duration_ms": 1500,
        "kept_stolen_rounds": False,
        "host": {
            "commit": "abc",
            "cpus": 2,
            "cpu": "x",
            "kernel": "6",
            "congestion_control": "bbr",
        },
        "contenders": {
            "fastmesh": {"what": "us", "version": "1"},
            "mosn": {"what": "them", "missing": "python -m perf.setup mosn"},
        },
        "scenarios": {"c64": scenario | changed},
    }


# --- gate -----------------------------------------------------------------------------------------

DELIVERED = deliver.Round(
    direct_p50_us=50.0,
    direct_p99_us=100.0,
    p50_us=120.0,
    p99_us=300.0,
    peer_p50_us=200.0,
    peer_p99_us=500.0,
    cpu_us_per_delivery=10.0,
    cpu_us_per_request=9.0,
)


def gate_of(
    *,
    added_p50: float = 40.0,
    added_p99: float = 90.0,
    ratio: float = 0.45,
    errors: bool = False,
    delivered: deliver.Round | None = None,
) -> gate.Gate:
    def play(contender: str, scenario: str) -> trial.Measurement:
        if scenario == "rate20000" and contender == "fastmesh":
            return replace(
                GOOD,
                p50_us=GOOD.p50_us + added_p50,
                p99_us=GOOD.p99_us + added_p99,
                errors={"torn": 1} if errors else {},
            )
        if contender == "fastmesh":
            return replace(GOOD, cpu_us_per_message=10 * ratio)
        return replace(GOOD, cpu_us_per_message=10.0)

    return gate.Gate(play, lambda: delivered or DELIVERED)


def test_the_gate_passes_what_is_within_its_bounds() -> None:
    checked = gate_of()
    assert checked.run(3)
    assert [len(check.rounds) for check in checked.checks] == [3] * 7


@pytest.mark.parametrize(
    "broken", [{"added_p50": 201.0}, {"added_p99": 1001.0}, {"ratio": 0.66}], ids=str
)
def test_the_gate_fails_what_is_not_after_measuring_it_again(broken: dict[str, float]) -> None:
    checked = gate_of(**broken)  # type: ignore[arg-type]
    assert not checked.run(3)
    failed = [check for check in checked.checks if not check.ok]
    assert len(failed) == 1
    assert len(failed[0].rounds) == 3 * (1 + gate.AGAIN)
    assert "FAILED" in str(failed[0])


@pytest.mark.parametrize(
    "worse",
    [
        {"p50_us": 251.0},
        {"p99_us": 1101.0},
        {"peer_p99_us": 2101.0},
        {"cpu_us_per_delivery": 13.6},
    ],
    ids=str,
)
def test_deliveries_have_bounds_of_their_own(worse: dict[str, float]) -> None:
    checked = gate_of(delivered=replace(DELIVERED, **worse))
    assert not checked.run(3)
    assert len([check for check in checked.checks if not check.ok]) == 1


def test_one_error_fails_the_gate_without_a_second_chance() -> None:
    checked = gate_of(errors=True)
    assert not checked.run(3)
    assert len(checked.errors) == 3
    assert len(checked.p50.rounds) == 3


def test_a_noisy_first_half_is_forgiven_once() -> None:
    calls = 0

    def play(contender: str, scenario: str) -> trial.Measurement:
        nonlocal calls
        calls += contender == "fastmesh" and scenario == "c64"
        noisy = contender == "fastmesh" and scenario == "c64" and calls <= 2
        return replace(
            GOOD, cpu_us_per_message=9.0 if noisy else 4.0 if contender == "fastmesh" else 10.0
        )

    checked = gate.Gate(play, lambda: DELIVERED)
    assert checked.run(3)
    assert len(checked.cpu.rounds) == 6


def test_the_gate_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = replace(CONTENDERS["haproxy"], find=lambda: None)
    monkeypatch.setitem(CONTENDERS, "haproxy", lost)
    assert any("apt-get install haproxy" in line for line in gate.missing())
    with pytest.raises(SystemExit) as stopped:
        gate.main()
    assert "haproxy is missing" in str(stopped.value)


# --- instructions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("now", "ok"), [(4000, True), (4119, True), (4121, False), (3000, True)])
def test_instructions_within_three_per_cent(now: int, ok: bool) -> None:
    baseline = {"instructions_per_message": 4000, "compiler": "cc 12"}
    verdict, text = instructions.verdict(
        {"instructions_per_message": now, "compiler": "cc 12"}, baseline
    )
    assert verdict is ok
    assert f"{now:,}" in text


def test_the_recorded_baseline_is_readable() -> None:
    baseline = json.loads(instructions.BASELINE.read_text())
    assert baseline["instructions_per_message"] > 0
    assert baseline["compiler"]


def test_callgrind_totals_are_added_by_thread(tmp_path: Path) -> None:
    for number, (thread, total) in enumerate([(1, 5), (2, 70), (2, 30)]):
        (tmp_path / f"calls.{number}").write_text(
            f"version: 1\nthread: {thread}\n\ntotals: {total}\n"
        )
    (tmp_path / "calls.x").write_text("garbage")
    assert instructions.thread_totals(tmp_path.iterdir()) == {"1": 5, "2": 100}


# --- compare --------------------------------------------------------------------------------------


def rounds_of(cost: float, host_speed: float = 1.0) -> list[dict[str, dict[str, Any]]]:
    return [
        {
            "fastmesh": measured(
                cpu_us_per_message=cost * host_speed * wobble, p50_us=host_speed, p99_us=host_speed
            ),
            "haproxy": measured(
                cpu_us_per_message=10 * host_speed * wobble, p50_us=host_speed, p99_us=host_speed
            ),
        }
        for wobble in (0.98, 1.0, 1.01, 1.02, 0.99)
    ]


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, compare.Change]:
    found, _ = compare.compare(old, new, "fastmesh", "haproxy")
    return {change.figure: change for change in found}


def test_a_regression_is_seen() -> None:
    change = changes(result(rounds_of(5.0)), result(rounds_of(6.0)))["CPU/message"]
    assert change.worse(0.05)
    assert change.low <= change.ratio <= change.high


def test_the_same_is_not_a_regression_and_a_gain_is_a_gain() -> None:
    assert not changes(result(rounds_of(5.0)), result(rounds_of(5.0)))["CPU/message"].worse(0.05)
    assert changes(result(rounds_of(5.0)), result(rounds_of(4.0)))["CPU/message"].better(0.05)


def test_a_slower_host_is_not_a_regression() -> None:
    found = changes(result(rounds_of(5.0)), result(rounds_of(5.0, host_speed=1.5)))
    assert not any(change.worse(0.05) for change in found.values())


def test_too_few_rounds_are_said_and_not_judged() -> None:
    found, silent = compare.compare(
        result(rounds_of(5.0)[:2]), result(rounds_of(9.0)[:2]), "fastmesh", "haproxy"
    )
    assert not found
    assert any("fewer than" in line for line in silent)


# --- report ---------------------------------------------------------------------------------------


def paired_result() -> dict[str, Any]:
    rounds = [
        {
            "direct": measured(p50_us=50.0, cpu_us_per_message=None, rss_bytes=None),
            "fastmesh": measured(p50_us=90.0, cpu_us_per_message=4.0 * drift),
            "haproxy": measured(p50_us=100.0, cpu_us_per_message=10.0 * drift),
        }
        for drift in (1.0, 2.0, 3.0)
    ]
    return result(rounds, left_out={"mosn": "not installed: x"}, discarded=["stolen"])


def test_ratios_are_paired_by_round() -> None:
    scenario = paired_result()["scenarios"]["c64"]
    best = report.best_relay(scenario)
    assert best is not None
    assert best[0] == "haproxy"
    assert best[1] == pytest.approx(0.4)
    assert targets.added(scenario, "fastmesh", "p50_us") == [40.0, 40.0, 40.0]


def test_the_table_names_what_is_missing_and_what_was_thrown_away() -> None:
    text = report.text(paired_result())
    assert "MISSING, python -m perf.setup mosn" in text
    assert "left out: not installed: x" in text
    assert "1 thrown away" in text
    assert "fastmesh / haproxy = 0.40" in text


def test_a_trial_with_errors_is_reported() -> None:
    wrong = result([{"fastmesh": measured(errors={"misrouted": 2})}, {"fastmesh": measured()}])
    assert report.errors(wrong) == ["c64 round 1 fastmesh: {'misrouted': 2}"]


def test_publish_replaces_only_what_is_between_the_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "README", page)
    monkeypatch.setattr(report, "PICTURES", tmp_path / "pictures")
    report.publish(paired_result(), tmp_path / "x.json")
    report.publish(paired_result(), tmp_path / "x.json")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("| scenario | contender |") == 1
    picture = (tmp_path / "pictures" / "c64.svg").read_text()
    assert picture.count("<rect") >= 6
    assert "0.40 of haproxy" in picture
    assert "target, dashed: 0.45" in picture
    open_loop = paired_result()["scenarios"]["c64"] | {"load": {"rate": 20000.0}}
    assert "added latency" in report.picture("rate20000", open_loop)


# --- targets --------------------------------------------------------------------------------------


def test_a_target_is_met_or_missed_by_how_much() -> None:
    def judged(ratio: float) -> targets.Verdict:
        rounds = [
            {
                "fastmesh": measured(cpu_us_per_message=10 * ratio),
                "haproxy": measured(cpu_us_per_message=12.0),
                "nginx": measured(cpu_us_per_message=10.0),
            }
        ]
        return targets.verdicts(result(rounds))[0]

    assert judged(0.45).target.most == 0.45
    assert judged(0.45).text == "met"
    assert judged(0.54).text == "missed by 20%"
    assert targets.verdicts(result([{"fastmesh": measured()}]))[0].text == "not measured"


def test_added_latency_is_compared_where_the_other_adds_any() -> None:
    def round_of(direct: float, ours: float, theirs: float) -> dict[str, dict[str, Any]]:
        return {
            "direct": measured(p99_us=direct),
            "fastmesh": measured(p99_us=ours),
            "haproxy": measured(p99_us=theirs),
        }

    scenario = {"rounds": [round_of(100, 130, 200), round_of(100, 150, 200), round_of(100, 90, 80)]}
    assert targets.added_ratios(scenario, "p99_us", "haproxy") == [0.3, 0.5]


def test_every_target_names_a_scenario_and_whom_it_is_measured_against() -> None:
    for target in targets.TARGETS:
        scenario = SCENARIOS[target.scenario]
        known = {"", "relays", *CONTENDERS, targets.beside(scenario.beside)}
        assert target.against in known, target
        assert (
            target.scenario not in CONTENDERS.get(target.against, CONTENDERS["fastmesh"]).cannot
        ), target


# --- host, trial, run -----------------------------------------------------------------------------


def test_stolen_time_is_noticed() -> None:
    calibration = host.Calibration(host.ALL_CPUS)
    calibration.best = dict.fromkeys(host.ALL_CPUS, 1)  # nothing is ever that fast again
    assert "spin" in calibration.begin()


def test_cpu_time_of_this_process_grows_with_work() -> None:
    before = host.cpu_ns(os.getpid())
    host.spin_ns(min(host.ALL_CPUS))
    assert host.cpu_ns(os.getpid()) - before > 1_000_000
    assert os.sched_getaffinity(0) == host.ALL_CPUS


def test_memory_of_this_process_is_plausible() -> None:
    assert 5 << 20 < host.rss_bytes(os.getpid()) < 4 << 30


def test_strace_tables_are_read() -> None:
    table = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.000600           3       200        10 recvfrom
 40.00    0.000400           4       100           sendto
------ ----------- ----------- --------- --------- ----------------
100.00    0.001000           3       300        10 total
"""
    assert trial.parse_strace(table) == {"recvfrom": 200, "sendto": 100}


@pytest.mark.parametrize("name", list(CONTENDERS))
def test_every_configuration_names_both_addresses(name: str, tmp_path: Path) -> None:
    place = Place("127.0.0.1:11111", "127.0.0.1:22222", tmp_path, connections=1000)
    command = CONTENDERS[name].command("program", place)
    assert command[0] == "program"
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "11111" in text
    assert "22222" in text


def test_only_takes_scenarios_and_contenders_and_refuses_others() -> None:
    assert run.names("c64,haproxy") == (["c64"], ["direct", "haproxy"])
    assert run.names("")[0] == list(SCENARIOS)
    with pytest.raises(SystemExit, match="nonsense"):
        run.names("nonsense")


def test_pieces_of_a_run_make_one_result_on_one_host_and_commit_only() -> None:
    piece = {"host": {"commit": "a"}, "duration_ms": 1, "kept_stolen_rounds": False}
    before = piece | {"contenders": {"nginx": {}}, "scenarios": {"unix": 1, "c64": 2}}
    now = piece | {"contenders": {"haproxy": {}}, "scenarios": {}}
    whole = run.continued(before, now)
    assert set(whole["contenders"]) == {"nginx", "haproxy"}
    assert list(run.in_order(whole["scenarios"])) == ["c64", "unix"]
    with pytest.raises(SystemExit, match="host or commit"):
        run.continued(before, now | {"host": {"commit": "b"}})
    with pytest.raises(SystemExit, match="length of a trial"):
        run.continued(before, now | {"duration_ms": 2})


def test_a_neighbouring_scenario_is_measured_in_the_same_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, str]] = []

    def play(contender: Any, scenario: Scenario, _: int) -> trial.Measurement:
        seen.append((contender.name if contender else "direct", scenario.name))
        return GOOD

    monkeypatch.setattr(run, "measure", play)
    found = run.one_round(SCENARIOS["unix"], ["direct", "fastmesh", "fastmesh (c64)"], 1, {})
    assert seen == [("direct", "unix"), ("fastmesh", "unix"), ("fastmesh", "c64")]
    assert list(found) == ["direct", "fastmesh", "fastmesh (c64)"]


def test_a_contender_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "mosn", replace(CONTENDERS["mosn"], find=lambda: None))
    assert "perf.setup mosn" in run.known_contenders(["mosn"])["mosn"]["missing"]


def test_a_direct_trial_measures() -> None:
    got = trial.measure(None, Scenario("small", "small", {"connections": 2}), 100)
    assert got.ok, got.errors
    assert got.connections == 2
    assert got.cpu_us_per_message is None


def test_a_proxy_that_does_not_start_is_an_error_with_its_own_words() -> None:
    broken = replace(
        CONTENDERS["haproxy"],
        find=lambda: "/bin/sh",
        command=lambda binary, place: [binary, "-c", "echo no such thing; exit 3"],
    )
    with pytest.raises(trial.TrialError, match=r"code 3: no such thing"):
        trial.measure(broken, SCENARIOS["c1"], 100)


@pytest.mark.parametrize("wanted", [1, 1000, 10000])
def test_connections_fit_the_descriptors_of_a_relay(wanted: int) -> None:
    assert trial.connections_possible(wanted, 20000) <= 9800
    assert trial.connections_possible(wanted, 1 << 20) == wanted
