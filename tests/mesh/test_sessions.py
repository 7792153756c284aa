"""Client connections: hello and subscribe against the registration, and what follows changes."""

from __future__ import annotations

import pytest

from fastmesh import limits
from fastmesh._ext import push
from fastmesh.mesh.registration import Key
from tests.mesh.bench import Bench, group


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    made.register("c1", group("g1"), group("g2", prefetch=7), group("p1", "publish"))
    made.compile()
    return made


def result(bench: Bench, handle: int, **fields: str) -> tuple[str, str]:
    reply = bench.ask(handle, **fields)
    assert reply is not None
    assert reply.kind == "response"
    assert reply.status == 0
    return reply.headers["fm.result"], reply.headers.get("fm.reason", "")


def test_hello_greets_a_registered_client(bench: Bench) -> None:
    handle = bench.client()
    reply = bench.hello(handle)
    assert reply.headers == {"fm.result": "consumed", "fm.protocol": "1"}
    assert bench.engine.said("reply")[-1][3] is True, "greeted: it may publish now"
    assert bench.hello(handle).headers["fm.result"] == "consumed", "the same again changes nothing"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"protocol": "2", "app": "shop", "client": "c1"}, "fm.protocol is '2'; understood: 1"),
        ({"app": "shop", "client": "c1"}, "fm.protocol is ''; understood: 1"),
        ({"protocol": "1", "client": "c1"}, "fm.app: missing"),
        ({"protocol": "1", "app": "shop"}, "fm.client: missing"),
        ({"protocol": "1", "app": "shop", "client": "c9"}, "shop/c9 is not registered"),
        ({"protocol": "1", "app": "a\x00\n" + "b" * 999, "client": "c"}, "fm.app: "),
    ],
)
def test_a_hello_that_is_refused_greets_nobody(
    bench: Bench, fields: dict[str, str], word: str
) -> None:
    handle = bench.client()
    verdict, reason = result(bench, handle, op="hello", **fields)
    assert verdict == "reject"
    assert word in reason
    assert reason.isprintable()
    assert bench.engine.said("reply")[-1][3] is False
    if "protocol is" in word:
        assert bench.engine.said("reply")[-1][2].headers["fm.protocol"] == "1"
    assert result(bench, handle, op="subscribe", group="g1") == ("reject", "subscribe before hello")
    assert result(bench, handle, op="publish", topic="orders")[0] == "reject"


def test_one_connection_is_one_identity(bench: Bench) -> None:
    bench.register("c2", group("g1"))
    handle = bench.client()
    bench.hello(handle)
    verdict, reason = result(bench, handle, op="hello", protocol="1", app="shop", client="c2")
    assert verdict == "reject"
    assert "this connection is shop/c1" in reason


def test_a_subscribe_joins_with_the_prefetch_of_the_registration_or_its_own(bench: Bench) -> None:
    ids = bench.compiled.group_ids
    handle = bench.joined("c1", "g1,g2,p1")
    assert set(bench.subscribed(handle)) == {
        (ids["g1"], limits.PREFETCH),
        (ids["g2"], 7),
        (ids["p1"], limits.PREFETCH),
    }
    assert result(bench, handle, op="subscribe", group="g1,g2", prefetch="3")[0] == "consumed"
    assert set(bench.subscribed(handle)) == {(ids["g1"], 3), (ids["g2"], 3)}
    assert result(bench, handle, op="subscribe", group="g2,g1", prefetch="1,65535")[0] == "consumed"
    assert set(bench.subscribed(handle)) == {(ids["g2"], 1), (ids["g1"], 65535)}
    assert result(bench, handle, op="subscribe", group="")[0] == "consumed"
    assert bench.subscribed(handle) == ()
    # The engine is told before the client is: its first delivery may follow at once.
    kinds = [call[0] for call in bench.engine.calls if call[0] in ("reply", "subscribe")]
    assert kinds[-2:] == ["subscribe", "reply"]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"group": "g1,g9"}, "group g9 is not in the registration of shop/c1"),
        ({"group": "g1,g1"}, "stands there twice"),
        ({"group": "g1,"}, "fm.group"),
        ({"group": "g1,g2", "prefetch": "1,2,3"}, "3 numbers for 2 groups"),
        ({"group": "g1", "prefetch": "0"}, "1..65535"),
        ({"group": "g1", "prefetch": "65536"}, "1..65535"),
        ({"group": "g1", "prefetch": "٣"}, "1..65535"),
        ({"group": "g1,g2", "prefetch": "1,"}, "1..65535"),
    ],
)
def test_a_subscribe_that_is_refused_changes_nothing(
    bench: Bench, fields: dict[str, str], word: str
) -> None:
    handle = bench.joined("c1", "g2")
    before = bench.engine.said("subscribe")
    verdict, reason = result(bench, handle, op="subscribe", **fields)
    assert verdict == "reject"
    assert word in reason
    assert bench.engine.said("subscribe") == before


def test_a_group_that_is_not_compiled_yet_is_waited_for(bench: Bench) -> None:
    handle = bench.joined("c1", "g1")
    bench.register("c1", group("g1"), group("new"))
    assert bench.recompiles
    assert bench.ask(handle, op="subscribe", group="g1,new") is None
    bench.compile()
    ids = bench.compiled.group_ids
    assert set(bench.subscribed(handle)) == {(ids["g1"], 32), (ids["new"], 32)}
    reply = bench.engine.said("reply")[-1]
    assert reply[1] == handle
    assert reply[2].headers["fm.result"] == "consumed"


def test_whoever_waits_for_a_group_is_answered_whatever_happens(bench: Bench) -> None:
    handle = bench.joined("c1", "g1")
    bench.register("c1", group("g1"), group("new"))
    assert bench.ask(handle, op="subscribe", group="new") is None
    bench.wait(limits.SUBSCRIBE_WAIT_MS)
    assert bench.engine.said("reply")[-1][2].headers["fm.result"] == "later"

    assert bench.ask(handle, op="subscribe", group="new") is None
    bench.register("c1", group("g1"))
    bench.compile()
    last = bench.engine.said("reply")[-1][2].headers
    assert last["fm.result"] == "reject"
    assert "new is not registered any more" in last["fm.reason"]


def test_a_registration_that_goes_and_comes_takes_its_connections_along(bench: Bench) -> None:
    handle = bench.joined("c1", "g1,g2")
    other = bench.client()
    bench.register("c2", group("g1"))
    bench.hello(other, "c2")
    assert result(bench, other, op="subscribe", group="g1")[0] == "consumed"
    bench.registry.remove("shop", "c1")
    bench.compile()
    assert bench.subscribed(handle) == ()
    assert len(bench.subscribed(other)) == 1
    verdict, reason = result(bench, handle, op="subscribe", group="g1")
    assert (verdict, "not registered any more" in reason) == ("reject", True)

    bench.register("c1", group("g1"), group("g2"))
    bench.compile()
    ids = bench.compiled.group_ids
    assert set(bench.subscribed(handle)) == {(ids["g1"], 32), (ids["g2"], 32)}


def test_a_prefetch_changed_by_registration_reaches_live_connections(bench: Bench) -> None:
    handle = bench.joined("c1", "g2")
    bench.register("c1", group("g2", prefetch=9))
    bench.compile()
    assert bench.subscribed(handle) == ((bench.compiled.group_ids["g2"], 9),)


def test_only_connections_that_a_change_touches_are_told_again(bench: Bench) -> None:
    bench.joined("c1", "g1")
    before = len(bench.engine.said("subscribe"))
    bench.register("c2", group("other"))
    bench.compile()
    bench.compile()
    assert len(bench.engine.said("subscribe")) == before


def test_suspend_resume_and_goaway(bench: Bench) -> None:
    handle = bench.joined("c1", "g1")
    had = bench.subscribed(handle)
    assert result(bench, handle, op="suspend") == ("consumed", "")
    assert bench.subscribed(handle) == ()
    assert result(bench, handle, op="subscribe", group="g1")[0] == "consumed"
    assert bench.subscribed(handle) == ()
    assert result(bench, handle, op="resume") == ("consumed", "")
    assert bench.subscribed(handle) == had
    assert result(bench, handle, op="goaway") == ("consumed", "")
    assert bench.subscribed(handle) == ()
    assert result(bench, handle, op="subscribe", group="g1")[0] == "reject"


def test_closed_groups_are_left_by_everybody_and_joined_again(bench: Bench) -> None:
    sessions = bench.control.sessions
    one, two = bench.joined("c1", "g1"), bench.joined("c1", "g1,g2")
    had = bench.subscribed(one), bench.subscribed(two)
    sessions.close_groups()
    sessions.close_groups()
    bench.settle()
    assert (bench.subscribed(one), bench.subscribed(two)) == ((), ())
    # Whoever comes now is taken, and gets nothing either.
    three = bench.joined("c1", "g1")
    before = len(bench.engine.said("subscribe"))
    assert all(call[1] != three for call in bench.engine.said("subscribe"))
    sessions.open_groups()
    bench.settle()
    assert (bench.subscribed(one), bench.subscribed(two)) == had
    assert bench.subscribed(three) == had[0]
    assert len(bench.engine.said("subscribe")) == before + 3


def test_who_is_let_go_hears_it_once_and_joins_nothing_any_more(bench: Bench) -> None:
    one, fresh = bench.joined("c1", "g1"), bench.client()
    bench.control.goaway()
    bench.control.goaway()
    bench.settle()
    assert bench.subscribed(one) == ()
    heard = [call for call in bench.engine.said("send") if call[1] in (one, fresh)]
    assert [(h, f.kind, f.headers) for _, h, f in heard] == [
        (one, "oneway", {"fm.op": "goaway", "fm.reason": "stopping"})
    ]
    assert result(bench, one, op="subscribe", group="g1")[0] == "later"


@pytest.mark.parametrize("op", ["", "announce", "deliver", "forward", "check", "xyz"])
def test_what_a_client_may_not_ask_is_refused_and_named(bench: Bench, op: str) -> None:
    handle = bench.joined("c1", "g1")
    verdict, reason = result(bench, handle, op=op)
    assert verdict == "reject"
    assert (op or "without fm.op") in reason


def test_one_way_frames_are_let_pass_without_an_answer(bench: Bench) -> None:
    handle = bench.client()
    bench.hello(handle)
    for headers in ({"fm.op": "subscribe", "fm.group": "g1"}, {"fm.op": "x"}):
        before = len(bench.engine.said("reply"))
        bench.frame(handle, headers, oneway=True)
        (reply,) = bench.engine.said("reply")[before:]
        assert reply[2] is None, "its connection is read on, nothing is sent"
    assert len(bench.subscribed(handle)) == 1


def test_a_live_connection_holds_the_lease_and_the_last_one_starts_it_anew(bench: Bench) -> None:
    first, second = bench.joined("c1", "g1"), bench.joined("c1", "g1")
    bench.now_ms += 10 * limits.LEASE_MS
    assert bench.registry.expire(bench.now_ms) == ()
    bench.event("gone", first)
    assert bench.registry.expire(bench.now_ms) == ()
    bench.event("gone", second)
    bench.event("gone", second)
    assert bench.registry.expire(bench.now_ms + limits.LEASE_MS - 1) == ()
    assert bench.registry.expire(bench.now_ms + limits.LEASE_MS) == (Key("shop", "c1"),)


def test_connections_that_went_leave_nothing_behind(bench: Bench) -> None:
    for _ in range(5):
        handle = bench.joined("c1", "g1,g2")
        bench.event("gone", handle)
    sessions = bench.control.sessions
    assert len(sessions) == 0
    assert not sessions._of_client
    assert not sessions._of_group
    assert not sessions._stale


def test_a_frame_that_is_not_text_ends_its_connection(bench: Bench) -> None:
    handle = bench.client()
    good = push.request(1, {"fm.op": "hello", "fm.app": "AAAA"})
    bench.event("frame", handle, 0, 0, good.replace(b"AAAA", b"\xff\xfe\xfd\xfc"))
    assert bench.engine.said("close") == [("close", handle)]


def test_a_full_command_ring_loses_nothing_and_keeps_the_order(bench: Bench) -> None:
    handle = bench.client()
    bench.engine.ring_full = True
    bench.frame(handle, {"fm.op": "hello", "fm.protocol": "1", "fm.app": "shop", "fm.client": "c1"})
    bench.frame(handle, {"fm.op": "subscribe", "fm.group": "g1"})
    assert not bench.wire.flush()
    assert not bench.engine.said("reply")
    bench.engine.ring_full = False
    assert bench.wire.flush()
    assert [call[0] for call in bench.engine.calls if call[1:2] == (handle,)] == [
        "reply",
        "subscribe",
        "reply",
    ]
