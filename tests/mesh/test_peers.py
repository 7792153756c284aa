"""Other nodes: who announces what to whom, and who counts as having nobody."""

from __future__ import annotations

import pytest

from fastmesh import limits
from fastmesh._ext.push import Push
from tests.mesh.bench import Bench, group


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    made.register("c1", group("g1"), group("g2"))
    made.compile()
    return made


def sent(bench: Bench, handle: int) -> list[Push]:
    return [call[2] for call in bench.engine.said("send") if call[1] == handle]


def heard(bench: Bench, name: str) -> tuple[int, ...]:
    """What the engine was told last of a peer."""
    found: tuple[int, ...]
    number = bench.endpoint(name)
    found = next(c[2] for c in reversed(bench.engine.said("peer_groups")) if c[1] == number)
    return found


def announce(bench: Bench, handle: int, groups: str, epoch: int = 1, **more: str) -> None:
    fields = {"fm.op": "announce", "fm.group": groups, "fm.epoch": str(epoch)}
    bench.frame(handle, fields | {f"fm.{k}": v for k, v in more.items()})


def test_a_peer_that_we_dial_tells_us_what_it_takes(bench: Bench) -> None:
    handle = bench.dialled("n2")
    ((hello, ticket),) = bench.calls(handle)
    assert (hello.headers["fm.op"], hello.headers["fm.client"]) == ("hello", "n1")
    bench.answer(ticket)
    announce(bench, handle, "g2,other,g1")
    ids = bench.compiled.group_ids
    assert heard(bench, "n2") == tuple(sorted((ids["g1"], ids["g2"])))
    assert sent(bench, handle)[-1].headers == {"fm.result": "consumed"}
    announce(bench, handle, "", 2)
    assert heard(bench, "n2") == ()


def test_a_group_that_is_registered_here_later_is_known_from_before(bench: Bench) -> None:
    handle = bench.dialled("n2")
    announce(bench, handle, "late")
    assert heard(bench, "n2") == ()
    bench.register("c9", group("late"))
    bench.compile()
    assert heard(bench, "n2") == (bench.compiled.group_ids["late"],)


def test_parts_make_one_announce_and_never_two(bench: Bench) -> None:
    handle = bench.dialled("n2")
    ids = bench.compiled.group_ids
    announce(bench, handle, "g1", 1, part="1", parts="2")
    assert not bench.engine.said("peer_groups")
    announce(bench, handle, "g2", 2, part="2", parts="2")
    assert not bench.engine.said("peer_groups"), "the first part was of another epoch"
    announce(bench, handle, "g1", 2, part="1", parts="2")
    assert heard(bench, "n2") == tuple(sorted(ids[n] for n in ("g1", "g2")))


@pytest.mark.parametrize(
    "more",
    [
        {"epoch": "x"},
        {"part": "2", "parts": "1"},
        {"part": "0"},
        {"parts": "9999"},
        {"parts": "1" * 40},
    ],
)
def test_an_announce_that_makes_no_sense_is_refused(bench: Bench, more: dict[str, str]) -> None:
    handle = bench.dialled("n2")
    announce(bench, handle, "g1", 5)
    before = bench.engine.said("peer_groups")
    fields = {"fm.op": "announce", "fm.group": "", "fm.epoch": "6"}
    bench.frame(handle, fields | {f"fm.{k}": v for k, v in more.items()})
    assert sent(bench, handle)[-1].headers["fm.result"] == "reject"
    assert bench.engine.said("peer_groups") == before


def test_what_is_behind_says_nothing(bench: Bench) -> None:
    handle = bench.dialled("n2")
    announce(bench, handle, "g1", 5)
    announce(bench, handle, "g2", 4)
    assert heard(bench, "n2") == (bench.compiled.group_ids["g1"],)


def test_a_peer_that_falls_silent_has_nobody(bench: Bench) -> None:
    handle = bench.dialled("n2")
    announce(bench, handle, "g1")
    silent_ms = 1000 * limits.PEER_SILENT_INTERVALS
    bench.wait(silent_ms - 1)
    assert heard(bench, "n2")
    announce(bench, handle, "g1")
    bench.wait(silent_ms - 1)
    assert heard(bench, "n2"), "the same again is a sign of life"
    bench.wait(1)
    assert heard(bench, "n2") == ()
    assert "peer is silent" in bench.log.text()
    announce(bench, handle, "g1", 2)
    assert heard(bench, "n2")


def test_a_peer_that_comes_back_starts_anew(bench: Bench) -> None:
    handle = bench.dialled("n2")
    announce(bench, handle, "g1", 9)
    bench.event("gone", handle, bench.endpoint("n2"), 1)
    again = bench.dialled("n2")
    announce(bench, again, "g1", 1)
    assert len(bench.engine.said("peer_groups")) == 2, "the engine had forgotten the first"


def test_what_was_said_of_the_connection_before_does_not_stay(bench: Bench) -> None:
    """The engine may take what was said last of a connection only after it has gone."""
    handle = bench.dialled("n2")
    announce(bench, handle, "g1", 9)
    bench.event("gone", handle, bench.endpoint("n2"), 1)
    again = bench.dialled("n2")
    announce(bench, again, "", 1)
    assert heard(bench, "n2") == ()


def test_peers_that_dial_us_are_told_at_once_on_change_and_at_each_interval(bench: Bench) -> None:
    handle = bench.peer_client()
    reply = bench.ask(handle, op="hello", protocol="1", app="shop", client="n2")
    assert reply is not None
    assert reply.headers["fm.result"] == "consumed"
    assert bench.engine.said("reply")[-1][3], "greeted: it may forward"
    assert [s.headers["fm.group"] for s in sent(bench, handle)] == [""]
    assert sent(bench, handle)[0].kind == "oneway"
    bench.live("g1", 1, 8)
    bench.live("g2", 1, 8)
    assert [s.headers["fm.group"] for s in sent(bench, handle)][1:] == ["g1", "g1,g2"]
    bench.live("g2", 2, 16)
    assert len(sent(bench, handle)) == 3, "more of the same is no news"
    bench.wait(1000)
    bench.wait(1000)
    assert len(sent(bench, handle)) == 5
    bench.live("g1", 0, 0)
    assert sent(bench, handle)[-1].headers["fm.group"] == "g2"
    epochs = [int(s.headers["fm.epoch"]) for s in sent(bench, handle)]
    assert epochs == sorted(set(epochs))
    bench.event("gone", handle)
    bench.wait(5000)
    assert len(sent(bench, handle)) == 6


@pytest.mark.parametrize(
    "fields",
    [
        {"protocol": "2", "client": "n2"},
        {"protocol": "1", "client": "n1"},
        {"protocol": "1"},
    ],
)
def test_a_peer_that_is_no_peer_is_not_greeted(bench: Bench, fields: dict[str, str]) -> None:
    handle = bench.peer_client()
    reply = bench.ask(handle, op="hello", **fields)
    assert reply is not None
    assert reply.headers["fm.result"] == "reject"
    assert not bench.engine.said("reply")[-1][3]
    assert not sent(bench, handle)
    reply = bench.ask(handle, op="forward")
    assert reply is not None
    assert reply.headers["fm.reason"] == "forward before hello"


def test_both_directions_say_goaway(bench: Bench) -> None:
    dialled, client = bench.dialled("n2"), bench.peer_client()
    announce(bench, dialled, "g1")
    bench.frame(dialled, {"fm.op": "goaway"})
    assert heard(bench, "n2") == ()
    bench.ask(client, op="hello", protocol="1", client="n3")
    reply = bench.ask(client, op="goaway")
    assert reply is not None
    assert reply.headers["fm.result"] == "consumed"
    before = len(sent(bench, client))
    bench.wait(5000)
    assert len(sent(bench, client)) == before


def test_leaving_tells_peers_that_nobody_is_here(bench: Bench) -> None:
    handle = bench.peer_client()
    bench.ask(handle, op="hello", protocol="1", client="n2")
    bench.live("g1", 1, 8)
    bench.control.suspend()
    bench.settle()
    assert sent(bench, handle)[-1].headers["fm.group"] == ""
    bench.wait(1000)
    assert sent(bench, handle)[-1].headers["fm.group"] == ""
    bench.control.resume(bench.now_ms)
    bench.settle()
    assert sent(bench, handle)[-1].headers["fm.group"] == "g1"


def test_a_refused_hello_is_shown_and_said_again(bench: Bench) -> None:
    handle = bench.dialled("n2")
    bench.answer(bench.calls(handle)[0][1], result="reject", reason="not you")
    assert "not you" in bench.control.status()["peers"][0]["failure"]
    bench.wait(limits.CONTROL_RETRY_MS_MAX)
    assert len(bench.calls(handle, "hello")) == 2


def test_groups_that_left_the_snapshot_are_not_announced(bench: Bench) -> None:
    handle = bench.peer_client()
    bench.ask(handle, op="hello", protocol="1", client="n2")
    bench.live("g1", 1, 8)
    bench.registry.remove("shop", "c1")
    bench.compile()
    assert sent(bench, handle)[-1].headers["fm.group"] == ""
