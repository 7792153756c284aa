"""Every input that was kept, replayed, cut short everywhere and fed in pieces."""

import pytest

from fastmesh._ext import bolt
from tests.fuzz import fuzz_bolt, fuzz_handover, fuzz_push, fuzz_toy, run
from tests.fuzz.mutate import corpus
from tests.support import cut, feed_three_ways, truncate_everywhere
from tests.toy import toy

BOLT = corpus("bolt")
PUSH = corpus("push")
TOY = corpus("toy")
HANDOVER = corpus("handover")

# What the files whose names begin so must come to: the corpus may grow, but not change sides.
BOLT_OUTCOMES = {
    "golden": "ok",
    "v1": "ok",
    "v2": "ok",
    "headers": "ok",
    "heartbeat": "ok",
    "mixed": "ok",
    "length_content_7fffffff": "too_large",
    "length_v2_crc_content_7fffffff": "too_large",
    "length_sum": "too_large",
    "length_v2_crc_sum": "too_large",
    "length": "length",
    "response_class": "length",
    "crc": "checksum",
    "switch": "protocol",
    "ver1": "protocol",
    "proto": "protocol",
    "type": "type",
    "command": "command",
    "oneway_heartbeat": "command",
    "response_of": "command",
    "request_of": "command",
    "tls": "protocol",
    "http": "protocol",
    "ssh": "protocol",
    "amqp": "protocol",
}

PUSH_OUTCOMES = {
    **dict.fromkeys(("deliver", "forward", "hello", "subscribe", "announce", "publish"), "request"),
    **dict.fromkeys(("suspend", "resume", "goaway", "check", "op_", "idempotent_0"), "request"),
    **dict.fromkeys(("hop", "empty_values", "keys_beside", "mixed_stream"), "request"),
    **dict.fromkeys(("consumed", "later", "result", "retry_ms_day"), "response"),
    **dict.fromkeys(("retry_ms", "idempotent", "headers"), "headers"),
    **dict.fromkeys(("hop_256", "hop_minus", "hop_empty", "hop_hex", "hop_without"), "headers"),
    **dict.fromkeys(("op_missing", "op_upper_case", "other_class", "class_empty"), "none"),
    **dict.fromkeys(("headers_empty", "headers_op_as_value", "sofa_request"), "none"),
    **dict.fromkeys(("heartbeat", "result_missing"), "none"),
    # Text is looked at by parse() only: the engine reads bytes.
    "headers_not_utf8": "request",
    "crc_wrong": "checksum",
    "truncated": "need_more",
}


def scan_toy(data: bytes) -> toy.Scan:
    return toy.Connection("by_id").scan(data)


@pytest.mark.parametrize("name", BOLT)
def test_bolt_input(name: str) -> None:
    outcome = fuzz_bolt.check(BOLT[name])
    longest = max((key for key in BOLT_OUTCOMES if name.startswith(key)), key=len)
    assert outcome == BOLT_OUTCOMES[longest]
    for size in range(len(BOLT[name])):
        fuzz_bolt.check(BOLT[name][:size])


@pytest.mark.parametrize("name", PUSH)
def test_push_input(name: str) -> None:
    outcome = fuzz_push.check(PUSH[name])
    longest = max((key for key in PUSH_OUTCOMES if name.startswith(key)), key=len)
    assert outcome == PUSH_OUTCOMES[longest]
    for size in range(len(PUSH[name])):
        fuzz_push.check(PUSH[name][:size])


@pytest.mark.parametrize("name", TOY)
def test_toy_input(name: str) -> None:
    fuzz_toy.check(TOY[name])
    for size in range(len(TOY[name])):
        fuzz_toy.check(TOY[name][:size])


@pytest.mark.parametrize("name", HANDOVER)
def test_handover_input(name: str) -> None:
    outcome = fuzz_handover.check(HANDOVER[name])
    assert (outcome == "error") == name.startswith("error_")
    for size in range(len(HANDOVER[name])):
        fuzz_handover.check(HANDOVER[name][:size])


def test_bolt_frames_truncated_and_in_pieces() -> None:
    whole = [data for data in BOLT.values() if bolt.scan(data).outcome == "ok"]
    assert len(whole) > 20
    frames = cut(bolt.scan, whole)[0]
    for frame in frames:
        truncate_everywhere(bolt.scan, frame)
    feed_three_ways(bolt.scan, frames)
    feed_three_ways(bolt.scan, frames, trailing=frames[0][:-1])


def test_toy_frames_truncated_and_in_pieces() -> None:
    whole = [data for data in TOY.values() if scan_toy(data).outcome == "ok"]
    assert len(whole) > 10
    frames = cut(scan_toy, whole)[0]
    for frame in frames:
        truncate_everywhere(scan_toy, frame)
    feed_three_ways(scan_toy, frames)
    feed_three_ways(scan_toy, frames, trailing=frames[0][:-1])


@pytest.mark.parametrize(
    ("protocol", "target"),
    [
        ("bolt", fuzz_bolt.TestOneInput),
        ("push", fuzz_push.TestOneInput),
        ("toy", fuzz_toy.TestOneInput),
        ("handover", fuzz_handover.TestOneInput),
    ],
)
def test_the_fuzz_command_runs(protocol: str, target: object) -> None:
    assert run.main(protocol, target, argv=["--seconds", "0.1", "--own", "--seed", "1"]) == 0


def test_the_fuzz_command_keeps_what_it_found(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses_long_input(data: bytes) -> None:
        assert len(data) < 60

    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        run.main("bolt", refuses_long_input, argv=["--seconds", "5", "--own", "--seed", "1"])
    (kept,) = tmp_path.iterdir()
    assert f"python -m tests.fuzz.fuzz_bolt --replay {kept.name}" in capsys.readouterr().out
    with pytest.raises(AssertionError):
        run.main("bolt", refuses_long_input, argv=["--replay", str(kept)])
