"""The engine's events: health, samples, and lines about what went wrong (never a traceback)."""

from __future__ import annotations

import errno

import msgspec
import pytest

from fastmesh.errors import HandoverError
from fastmesh.observe.events import CLOSE_REASONS, SAMPLE, Events
from tests.conftest import LogLines
from tests.fake_engine import Event


@pytest.fixture
def verdicts() -> list[tuple[int, int | None]]:
    return []


@pytest.fixture
def events(log_lines: LogLines, verdicts: list[tuple[int, int | None]]) -> Events:
    return Events(
        log_lines.log,
        listener_name=lambda number: f"listener-{number}",
        endpoint_name=lambda number: f"endpoint-{number}",
        verdict=lambda *verdict: verdicts.append(verdict),
        drained=lambda thread: None,
    )


@pytest.mark.parametrize(
    ("first", "seems"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "TLS"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP"),
        (b"SSH-2.0-OpenSSH_9\r\n", "SSH"),
        (b"AMQP\x00\x00\x09\x01", "AMQP"),
        (b"\xde\xad\xbe\xef", ""),
        (b"", ""),
    ],
)
def test_a_wrong_protocol_is_one_line_that_says_what_it_seems_to_be(
    events: Events, log_lines: LogLines, first: bytes, seems: str
) -> None:
    reason = CLOSE_REASONS.index("malformed")
    data = b"127.0.0.1:5555 " + first.hex().encode()
    events.take(Event("closed", a=1, b=3, c=reason, data=data))
    text = log_lines.text()
    assert text.count("\n") == 1
    assert "listener=listener-3 reason=malformed peer=127.0.0.1:5555" in text
    assert (f"seems={seems}" in text) == bool(seems)


def test_a_flood_of_wrong_protocols_stays_ten_lines(events: Events, log_lines: LogLines) -> None:
    for number in range(500):
        events.take(Event("closed", b=1, c=4, data=f"10.0.0.1:{number} 4745".encode()))
    assert log_lines.text().count("\n") <= 11


def test_health_adds_up_over_threads(events: Events) -> None:
    events.take(Event("endpoint_up", thread=0, a=7, b=2))
    events.take(Event("endpoint_up", thread=1, a=7, b=1))
    assert events.health[7].up == 3
    events.take(
        Event(
            "endpoint_down",
            thread=0,
            a=7,
            b=0,
            c=errno.ECONNREFUSED,
            data=bytes([CLOSE_REASONS.index("connect")]),
        )
    )
    assert events.health[7].up == 1
    assert events.health[7].reason == "ECONNREFUSED connect"
    events.take(Event("ejected", a=7, b=1000))
    assert events.health[7].ejected
    events.take(Event("restored", a=7))
    assert not events.health[7].ejected
    events.forget_endpoints({8})
    assert not events.health


def test_an_endpoint_that_stays_down_is_told_once_for_each_reason(
    events: Events, log_lines: LogLines
) -> None:
    refused = bytes([CLOSE_REASONS.index("connect")])
    for _ in range(5):
        events.take(Event("endpoint_down", a=7, b=0, c=errno.ECONNREFUSED, data=refused))
    assert log_lines.text().count("endpoint down") == 1
    events.take(Event("endpoint_down", a=7, b=0, c=errno.ETIMEDOUT, data=refused))
    assert log_lines.text().count("endpoint down") == 2
    events.take(Event("endpoint_up", a=7, b=1))
    events.take(Event("endpoint_down", a=7, b=0, c=errno.ETIMEDOUT, data=refused))
    assert log_lines.text().count("endpoint down") == 3


def test_a_sample_is_kept_and_the_ring_is_bounded(events: Events) -> None:
    data = SAMPLE.pack(1, 2, 3, 4, 5, 6)
    for number in range(3000):
        events.take(Event("sample", a=number, b=9, c=8, data=data))
    assert len(events.samples) == 1024
    assert events.samples[-1]["outcome"] == "expired"
    assert events.samples[-1]["forwarded_ns"] == 4
    assert events.samples[-1]["trace"] == f"{2999:016x}"


def test_a_parked_frame_goes_where_its_rule_says(
    events: Events, verdicts: list[tuple[int, int | None]]
) -> None:
    events.take(Event("parked", a=42, b=3, data=b"frame"))
    assert verdicts == [(42, -1)]


@pytest.mark.parametrize(
    "event",
    [
        Event("snapshot", a=3),
        Event("refused", a=1, b=100),
        Event("accept_paused", a=1, b=errno.EMFILE),
        Event("accept_paused", a=1, b=99999),
        Event("stall", a=150),
        Event("stopped"),
        Event("nobody knows this"),
        Event("closed", c=200, data=b"zz not hex"),
        Event("closed", c=0, data=b""),
    ],
    ids=lambda event: event.kind,
)
def test_every_event_is_one_line(events: Events, log_lines: LogLines, event: Event) -> None:
    events.take(event)
    assert log_lines.text().count("\n") == 1


def test_a_successor_knows_what_the_engine_does_not_say_again(
    events: Events, log_lines: LogLines
) -> None:
    down = CLOSE_REASONS.index("heartbeat").to_bytes()
    events.take(Event("endpoint_up", a=3, b=2))
    events.take(Event("endpoint_up", a=4, b=1))
    events.take(Event("endpoint_down", a=4, b=0, data=down))
    events.take(Event("ejected", a=3, b=1000))
    events.take(Event("stall", a=120))
    after = Events(
        log_lines.log,
        listener_name=str,
        endpoint_name=str,
        verdict=lambda ticket, cluster: None,
        drained=lambda thread: None,
    )
    for _ in range(2):
        after.restore(msgspec.Raw(msgspec.json.encode(events.save())))
    after.take(Event("endpoint_up", a=3, b=2))
    assert after.health == events.health
    assert after.stalls == events.stalls == 1
    with pytest.raises(HandoverError, match=r"events.health\[0\].endpoint: 0"):
        after.restore({"health": [{"endpoint": 0}]})
