"""Fault points: read strictly, struck once, and only in builds for tests."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from fastmesh._ext.points import FAULT_POINTS
from fastmesh.handover import faults
from fastmesh.handover.faults import Fault, parse, strike


@pytest.fixture(autouse=True)
def nothing_stays_armed() -> Iterator[None]:
    yield
    faults.arm(())


def test_parse() -> None:
    assert parse("") == ()
    assert parse("old.S5.7:kill, new.S3:error=EMFILE") == (
        Fault("giver", "S5", 7, "kill", 0),
        Fault("taker", "S3", 1, "error", errno.EMFILE),
    )
    assert [str(f) for f in parse("new.S1:delay,old.S2:stop,old.S4:error,new.S8:delay=7")] == [
        "new.S1.1:delay=100",
        "old.S2.1:stop",
        "old.S4.1:error=ENOBUFS",
        "new.S8.1:delay=7",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("S5:kill", "must begin with old or new"),
        ("giver.S5:kill", "must begin with old or new"),
        ("old.S9:kill", "a step S1..S8"),
        ("old.S5", "a colon"),
        ("old.S5.0:kill", "record '0' must be"),
        ("old.S5.-1:kill", "record '-1' must be"),
        ("old.S5.x:kill", "record 'x' must be"),
        ("old.S5:explode", "'explode' must be kill, stop, error or delay"),
        ("old.S5:kill=9", "kill takes no value, but '9' is there"),
        ("old.S5:error=ENOSUCH", "'ENOSUCH' must be the name of an error"),
        ("old.S5:error=errorcode", "must be the name of an error"),
        ("old.S5:delay=x", "'x' must be 0..60000 ms"),
        ("old.S5:delay=60001", "must be 0..60000 ms"),
    ],
)
def test_what_cannot_be_read_is_told(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="FASTMESH_FAULT: ") as caught:
        parse(text)
    assert says in str(caught.value)


def test_error_strikes_once_and_only_there(capfd: pytest.CaptureFixture[str]) -> None:
    faults.arm(parse("old.S5.2:error"))
    for side, step, record in (("giver", "S5", 1), ("taker", "S5", 2), ("giver", "S6", 2)):
        strike(side, step, record)
    with pytest.raises(OSError, match=r"injected at old\.S5\.2:error=ENOBUFS") as caught:
        strike("giver", "S5", 2)
    assert caught.value.errno == errno.ENOBUFS
    strike("giver", "S5", 2)
    assert capfd.readouterr().err == "fault old.S5.2:error=ENOBUFS\n"


def test_delay_holds_everything_up() -> None:
    faults.arm(parse("new.S6:delay=30"))
    before = time.monotonic()
    strike("taker", "S6")
    assert time.monotonic() - before >= 0.03


def child(fault: str, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"from fastmesh.handover.faults import strike\n{code}"],
        env={**os.environ, "FASTMESH_FAULT": fault},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(not FAULT_POINTS, reason="this build has no fault points")
def test_kill_kills() -> None:
    with child("new.S4:kill", "strike('taker', 'S4'); print('lived')") as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (-signal.SIGKILL, "", "fault new.S4.1:kill\n")


@pytest.mark.skipif(not FAULT_POINTS, reason="this build has no fault points")
def test_stop_stops_until_somebody_says_go_on() -> None:
    with child("old.S7:stop", "strike('giver', 'S7'); print('went on')") as process:
        # It ends, or it stops: both are news of a child.
        found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=30)
    assert found is not None
    assert (found.si_code, found.si_status) == (os.CLD_STOPPED, signal.SIGSTOP)
    assert out == "went on\n"


@pytest.mark.skipif(not FAULT_POINTS, reason="this build has no fault points")
def test_a_mistake_in_the_variable_is_no_run_without_a_fault() -> None:
    with child("old.S77:stop", "strike('giver', 'S1')") as process:
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "a step S1..S8" in err


def test_builds_for_everybody_look_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FAULT_POINTS", False)
    monkeypatch.setenv("FASTMESH_FAULT", "old.S1:error, nonsense")
    faults.arm()
    strike("giver", "S1")
