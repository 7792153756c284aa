"""The demo: it ends by itself with a ledger that balances, and it fails when it must."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastmesh import demo
from fastmesh._ext.push import response
from fastmesh.broker.core import Core
from fastmesh.demo import Books, BrokerBooks, Counts, Look, Moved, Row, judge_books, judge_move

SECONDS, RATE = 3.0, 200.0
COLUMNS = 80


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the demo makes its temporary folder; a socket's path has to fit too."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def command(folder: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastmesh", "demo", *args],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_ends_by_itself_with_a_ledger_and_leaves_nothing(tmp_path: Path) -> None:
    with command(tmp_path, "--seconds", "4", "--rate", "100") as process:
        shown, errors = process.communicate(timeout=60)
    assert process.returncode == 0, shown + errors
    assert errors == ""
    assert "sent = consumed + dead + waiting: yes, yes" in shown
    assert "Nothing lost, doubled or misrouted; the traffic moved as scheduled." in shown
    wide = [x for x in shown.splitlines() if len(x) > COLUMNS and str(tmp_path) not in x]
    assert not wide, "a terminal of 80 columns shows it"
    assert not list(tmp_path.iterdir())


def test_a_signal_ends_it_with_nothing_left(tmp_path: Path) -> None:
    with command(tmp_path, "--seconds", "300") as process:
        assert process.stdout is not None
        while "producers send" not in (line := process.stdout.readline()):
            assert line, process.communicate()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == ""
    assert not list(tmp_path.iterdir())


def test_an_acknowledged_message_that_the_broker_forgets_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take = Core.frame

    def forget(core: Core, handle: int, push: Any) -> None:
        said = push.headers
        if said.get("fm.op") == "publish" and push.content.startswith(b"25 "):
            answer = {"fm.result": "consumed", "fm.id": said["fm.id"], "fm.broker": "b1"}
            core.sends.append((handle, response(push.id, push.hint, answer)))
            return
        take(core, handle, push)

    monkeypatch.setattr(Core, "frame", forget)
    assert demo.run(seconds=SECONDS, rate=RATE) == 1
    wrong = [x for x in capsys.readouterr().out.splitlines() if x.startswith("WRONG")]
    assert len(wrong) == 2, wrong
    assert wrong[0].startswith("WRONG: sent: the application counts ")
    assert wrong[1].startswith("WRONG: waiting: the application counts ")


def test_traffic_that_does_not_move_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "MOVE_S", 0.5)
    monkeypatch.setattr(demo, "WEIGHT_AFTER", 100)
    assert demo.run(seconds=SECONDS, rate=RATE) == 1
    said = capsys.readouterr().out
    assert "WRONG: node-2 passed nothing on within 0.5 s of the new schedule" in said
    assert "sent = consumed + dead + waiting: yes, yes" in said


# --- the judgement --------------------------------------------------------------------------------


def books(**more: Any) -> Books:
    found = Books(sent=set(range(10)), consumed=set(range(7)), dead={7, 8}, put_off={9})
    for name, value in more.items():
        setattr(found, name, value)
    return found


BROKER = BrokerBooks(sent=10, consumed=7, dead=2, waiting=1)


def test_books_that_agree_are_right() -> None:
    assert judge_books(books(), BROKER) == []


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"consumed": set(range(6))}, "consumed: the application counts 6, the broker 7"),
        ({"sent": set(range(11))}, "sent: the application counts 11, the broker 10"),
        ({"dead": {8}}, "dead: "),
        ({"dead": {6, 7, 8}}, "does not balance: 10 is not 11"),
        ({"sent": set(range(1, 11))}, "1 messages consumed or dead, and never sent"),
        ({"twice": 1}, "delivered again"),
        ({"strange": 1}, "not for"),
        ({"unsure": 1}, "not answered"),
        ({"refused": 1}, "not taken"),
        ({"sent": set(), "consumed": set(), "dead": set()}, "nothing was sent"),
    ],
)
def test_wrong_books_of_the_application_are_found(more: dict[str, Any], word: str) -> None:
    found = judge_books(books(**more), BROKER)
    assert any(word in problem for problem in found), found


@pytest.mark.parametrize("name", ["sent", "consumed", "dead", "waiting"])
def test_wrong_books_of_the_broker_are_found(name: str) -> None:
    wrong = replace(BROKER, **{name: getattr(BROKER, name) - 1})
    found = judge_books(books(), wrong)
    assert any(problem.startswith(f"{name}: ") for problem in found), found
    assert any("ledger of the broker does not balance" in problem for problem in found), found


def moved(kept: int, pushed: int = 1000, *, early: int = 0, other: int = 0) -> list[str]:
    before = {"node-1": Counts(500, 0, 500), "node-2": Counts(500, early, 500)}
    in_force = {"node-1": Counts(500, 0, 501), "node-2": Counts(500, early, 500)}
    after = {
        "node-1": Counts(1500, other, 2300),
        "node-2": Counts(500 + pushed, early + pushed - kept, 700),
    }
    return judge_move(Moved(before, in_force, 0.1), after)


def test_a_share_within_the_tolerance_is_right() -> None:
    assert moved(200) == moved(178) == moved(222) == []


@pytest.mark.parametrize(
    ("problems", "word"),
    [
        (moved(177), "kept 177 of 1,000 deliveries after the move: not 20 percent"),
        (moved(223), "kept 223"),
        (moved(1000), "kept 1,000"),
        (moved(2, 9), "10 are needed"),
        (moved(200, early=1), "node-2 passed 1 deliveries on while its weight was 100"),
        (moved(200, other=3), "node-1 passed 3 deliveries on while its weight was 100"),
        (
            judge_move(Moved({}, None, 0.0), {"node-1": Counts(0, 0, 0)}),
            "passed nothing on within 10 s",
        ),
    ],
)
def test_traffic_that_moved_otherwise_is_found(problems: list[str], word: str) -> None:
    assert len(problems) == 1
    assert word in problems[0]


# --- the table ------------------------------------------------------------------------------------


def test_the_table_fits_80_columns() -> None:
    from rich.console import Console

    row = Row("node-1", 100, 1234.0, 1234.0, 1234.0, 1234.0, 1.0)
    rows = (row, replace(row, node="node-2", weight=20, share=0.0))
    look = Look(599.0, 600.0, rows, 1_234_567, 1_234_567, 12_345, 12345.6)
    page = io.StringIO()
    console = Console(file=page, width=COLUMNS, force_terminal=False)
    console.print(demo.rich_table(look))
    shown = page.getvalue()
    assert "\u2026" not in shown, "nothing is cut"
    heads = ("node", "weight", "pushed/s", "kept/s", "passed/s", "taken/s", "share")
    assert all(word in shown for word in heads)
    for text in ("node-1", "node-2", "1,234", "12345.6 ms", "100% " + demo.BAR * "\u2588"):
        assert text in shown
    assert len(shown.splitlines()) == 9, "no line is wrapped"


def test_what_is_asked_for_later_is_a_small_part() -> None:
    first = [demo.answer_to(number, 1) for number in range(100)]
    assert sum(answer is None for answer in first) == 96
    second = [demo.answer_to(number, 2) for number in range(100)]
    assert sum(answer is None for answer in second) == 97


def test_its_interval_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(seconds: float, rate: float) -> int:
        return 3

    monkeypatch.setattr(demo, "_run", nothing)
    before = sys.getswitchinterval()
    began = time.monotonic()
    assert demo.run(seconds=1, rate=1) == 3
    assert time.monotonic() - began < 1
    assert sys.getswitchinterval() == pytest.approx(before)
