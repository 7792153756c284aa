"""Log lines: one line each, nothing remote unescaped, never more than the limit."""

from __future__ import annotations

import json
import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmesh import limits
from fastmesh.errors import HandoverError
from fastmesh.observe.log import Log, escape, escape_remote
from tests.conftest import LogLines

NASTY = 'a\r\nb \x1b[31mred\x1b[0m \u202egnp.exe \u2028 \x00 "q" \\ é'


def test_a_line_is_a_line(log_lines: LogLines) -> None:
    log_lines.log.info(
        "it happened", name=NASTY, data=NASTY.encode(), number=3, share=0.25, none=None
    )
    text = log_lines.text()
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert all(c.isprintable() for c in text[:-1])
    assert r"a\x0d\x0ab" in text
    assert "é" in text
    assert text.rstrip().endswith("number=3 share=0.25 none=None")


@given(st.one_of(st.text(), st.binary()))
def test_escaped_is_printable_and_short(value: str | bytes) -> None:
    safe = escape(value, 20)
    assert all(c.isprintable() for c in safe)
    assert len(safe) <= 20 * 10 + 20
    if isinstance(value, bytes):
        assert safe.isascii()


def test_remote_bytes_are_cut() -> None:
    shown = escape_remote(b"x" * 1000)
    assert (
        shown
        == "x" * limits.REMOTE_BYTES_SHOWN_MAX + f"...(+{1000 - limits.REMOTE_BYTES_SHOWN_MAX})"
    )


def test_json_lines_are_json() -> None:
    lines = LogLines(form="json")
    lines.log.warning("it happened", name=NASTY, data=b"\xff\n", number=3)
    record = json.loads(lines.text())
    assert record["level"] == "warning"
    assert record["event"] == "it happened"
    assert record["data"] == r"\xff\x0a"
    assert record["number"] == 3
    assert "\n" not in record["name"]


def test_a_flood_of_one_cause_is_ten_lines_a_second_and_a_number() -> None:
    now = [0.0]
    lines = LogLines(clock=lambda: now[0])
    for _ in range(1000):
        lines.log.limited("warning", "flood", "flooded")
    lines.log.limited("warning", "calm", "calm")
    assert lines.text().count("flooded") == limits.LOG_LINES_PER_S
    assert lines.text().count("calm") == 1, "another cause has its own allowance"
    now[0] = 1.5
    lines.log.limited("warning", "flood", "flooded")
    assert "flooded suppressed=990" in lines.text()


def test_what_was_held_back_is_said_even_when_the_flood_is_over() -> None:
    now = [0.0]
    lines = LogLines(clock=lambda: now[0])
    for _ in range(12):
        lines.log.limited("warning", "flood", "flooded")
    lines.log.flush()
    assert "lines suppressed" not in lines.text()
    now[0] = 2.0
    lines.log.flush()
    assert "lines suppressed cause=flood count=2" in lines.text()


def test_causes_are_bounded() -> None:
    lines = LogLines(clock=lambda: 0.0)
    for number in range(limits.LOG_CAUSES_MAX + 100):
        lines.log.limited("info", f"cause {number}", "event")
    assert len(lines.log._buckets) == limits.LOG_CAUSES_MAX + 1


def test_a_full_or_closed_pipe_loses_lines_and_nothing_else() -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    log = Log(fd=write)
    for _ in range(5000):
        log.info("x", data="y" * 200)
    assert log.lines_lost > 0
    os.close(read)
    log.info("x")  # SIGPIPE is ignored by Python: an OSError, swallowed
    os.close(write)


def test_levels(log_lines: LogLines) -> None:
    log_lines.log.configure(form="text", level="warning")
    log_lines.log.info("quiet")
    log_lines.log.limited("debug", "c", "quiet")
    log_lines.log.error("loud")
    assert "quiet" not in log_lines.text()
    assert "loud" in log_lines.text()


def test_lost_lines_are_counted_on_by_a_successor() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    before, after = Log(fd=writer), Log(fd=writer)
    for _ in range(3):
        before.info("nobody reads")
    after.info("nobody reads")
    os.close(writer)
    after.restore(before.save())
    assert after.lines_lost == 4
    before.lines_lost += 1
    after.restore(msgspec.Raw(msgspec.json.encode(before.save())))
    assert after.lines_lost == 5, "twice is as the second time alone"
    after.restore({})
    assert after.lines_lost == 1
    with pytest.raises(HandoverError, match="log"):
        after.restore({"lines_lost": -1})
