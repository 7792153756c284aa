"""A process that takes over goes on as the one before would have: nothing is asked again that was
answered, and nothing is forgotten that was not.

A random life is lived by one control plane. At some moment its document is given to another one,
with another clock; from then on the same happens to both, and both have to say the same.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from fastmesh import limits
from fastmesh._ext import push
from fastmesh.errors import HandoverError
from tests.mesh.bench import CONFIG, Bench, group

GROUPS = [f"g{n}" for n in range(6)]
CLIENTS = [f"c{n}" for n in range(4)]
EPOCHS = itertools.count(1)


class Life:
    """What happens, chosen once and done to everybody in `benches`."""

    def __init__(self, seed: int) -> None:
        self.chosen = random.Random(seed)
        self.benches = [Bench()]
        self.clients: list[int] = []
        self.peer_clients: list[int] = []
        self.links: dict[int, str] = {}
        """Broker or peer connections -> whose."""
        self.handles = itertools.count((7 << 32) + 1)
        self.ids = itertools.count(100)
        self.after = 0
        """Calls of the first bench that are older than the successor."""

    @property
    def first(self) -> Bench:
        return self.benches[0]

    def all(self, do: Callable[[Bench], Any]) -> None:
        for bench in self.benches:
            do(bench)

    def live(self, steps: int) -> None:
        doings = [
            self.register,
            self.compile,
            self.connect,
            self.say,
            self.say,
            self.say,
            self.leave,
            self.dial,
            self.answer,
            self.answer,
            self.answer,
            self.announce,
            self.announce,
            self.group_event,
            self.group_event,
            self.broker_says,
            self.broker_says,
            self.drain,
            self.wait,
            self.wait,
        ]
        for _ in range(steps):
            self.chosen.choice(doings)()

    # --- doings -----------------------------------------------------------------------------------

    def register(self) -> None:
        client = self.chosen.choice(CLIENTS)
        if self.chosen.random() < 0.2:
            self.all(lambda b: b.registry.remove("shop", client))
            return
        names = self.chosen.sample(GROUPS, self.chosen.randint(1, 4))
        roles = self.chosen.choice(["subscribe", "subscribe", "publish"])
        prefetch = {"prefetch": self.chosen.randint(1, 9)} if roles == "subscribe" else {}
        groups = [group(name, roles, **prefetch) for name in names]
        self.all(lambda b: b.register(client, *groups))
        if self.chosen.random() < 0.7:
            self.compile()

    def compile(self) -> None:
        self.all(lambda b: b.compile())

    def connect(self) -> None:
        handle = next(self.handles)
        listener = self.chosen.choice(["msg", "msg", "msg", "__forward__"])
        (self.clients if listener == "msg" else self.peer_clients).append(handle)
        self.all(lambda b: b.event("opened", handle, b.compiled.listener_ids[listener], 0))

    def dial(self) -> None:
        down = [name for name in ("b1", "b2", "n2") if name not in self.links.values()]
        if not down:
            return
        name, handle = self.chosen.choice(down), next(self.handles)
        self.links[handle] = name
        self.all(lambda b: b.event("opened", handle, b.endpoint(name), 1))

    def leave(self) -> None:
        everybody = [*self.clients, *self.peer_clients, *self.links]
        if not everybody:
            return
        handle = self.chosen.choice(everybody)
        for some in (self.clients, self.peer_clients):
            if handle in some:
                some.remove(handle)
        self.links.pop(handle, None)
        self.all(lambda b: b.event("gone", handle))

    def frame(self, handle: int, from_link: int, **fields: str) -> None:
        headers = {f"fm.{key.replace('__', '.')}": value for key, value in fields.items()}
        oneway = self.chosen.random() < 0.1
        data = push.request(next(self.ids), headers, timeout_ms=500, oneway=oneway)
        self.all(lambda b: b.event("frame", handle, 0, from_link, data))

    def say(self) -> None:
        if self.peer_clients and self.chosen.random() < 0.3:
            handle = self.chosen.choice(self.peer_clients)
            op = self.chosen.choice(["hello", "hello", "goaway", "deliver"])
            self.frame(handle, 0, op=op, protocol="1", app="shop", client="n7")
            return
        if not self.clients:
            return
        handle = self.chosen.choice(self.clients)
        op = self.chosen.choice(
            ["hello"] * 6 + ["subscribe"] * 8 + ["suspend", "resume", "goaway", "odd"]
        )
        more: dict[str, str] = {}
        if op == "hello":
            more = {"protocol": "1", "app": "shop", "client": self.chosen.choice(CLIENTS)}
        elif op == "subscribe":
            names = self.chosen.sample(GROUPS, self.chosen.randint(0, 2))
            more = {"group": ",".join(names)}
        self.frame(handle, 0, op=op, **more)

    def answer(self) -> None:
        """Somebody answers one of our calls, or does not in time: only what both have asked."""
        for bench in self.benches[:1]:
            calls = waiting(bench)
            if not calls:
                return
            call = self.chosen.choice(calls)
        kind = self.chosen.choice(["consumed"] * 6 + ["reject", "later", "deadline", "lost"])
        headers = {"fm.result": kind, "fm.retry_ms": "50"}
        for bench in self.benches:
            same = [
                c
                for c in bench.engine.said("call")
                if c[1] == call[1] and c[3] in bench.wire._waiting and op(c) == op(call)
            ]
            # Parts of one announce are answered in turn; in the successor the same one.
            if not same:
                continue
            if kind in ("deadline", "lost"):
                bench.event("answer", same[0][3], 8 if kind == "deadline" else 5)
            else:
                data = push.response(1, same[0][2].hint, headers)
                bench.event("answer", same[0][3], 0, 0, data)

    def announce(self) -> None:
        """The peer that we dialled says whom it serves, in one or two parts."""
        handle = next((h for h, name in self.links.items() if name == "n2"), 0)
        if not handle:
            return
        epoch, names = str(next(EPOCHS)), self.chosen.sample(GROUPS, 3)
        if self.chosen.random() < 0.5:
            self.frame(handle, 1, op="announce", group=",".join(names), epoch=epoch)
            return
        parts: list[tuple[str, str]] = [("1", names[0]), ("2", ",".join(names[1:]))]
        for part, some in parts[: self.chosen.randint(1, 2)]:
            more = {"epoch": epoch, "part": part, "parts": "2"}
            self.frame(handle, 1, op="announce", group=some, **more)

    def broker_says(self) -> None:
        handle = next((h for h, name in self.links.items() if name == "b1"), 0)
        if handle:
            op = self.chosen.choice(["suspend", "suspend", "resume", "publish"])
            self.frame(handle, 1, op=op)

    def drain(self) -> None:
        """Brokers are asked to push nothing more, and clients leave their groups; or back."""
        kind = self.chosen.choice(["suspend", "resume", "resume", "close"])
        if kind == "suspend":
            self.all(lambda b: b.control.suspend())
        elif kind == "close":
            self.all(lambda b: b.control.close_groups())
        else:
            self.all(lambda b: b.control.resume(b.now_ms))
        self.all(lambda b: b.settle())

    def group_event(self) -> None:
        ids = self.first.compiled.group_ids
        for _ in range(self.chosen.randint(1, 3) if ids else 0):
            number = self.chosen.choice(sorted(ids.values()))
            connections = self.chosen.choice([0, 1, 2])
            self.credit(number, connections, connections * self.chosen.randint(1, 5))

    def credit(self, number: int, connections: int, credit: int) -> None:
        self.all(lambda b: b.event("group", number, connections, credit))

    def wait(self) -> None:
        ms = self.chosen.choice([1, 30, 500, 1000, 4000])
        self.all(lambda b: b.wait(ms))

    # --- the hand-over ----------------------------------------------------------------------------

    def hand_over(self, shift_ms: int) -> Bench:
        """Another bench that has the document of the first."""
        self.after = len(self.first.engine.calls)
        data = self.first.save()
        assert data == self.first.save(), "saving changes nothing"
        made = Bench(document=data, now_ms=self.first.now_ms + shift_ms)
        self.benches.append(made)
        return made

    def settle(self) -> None:
        """Brokers may push, and everything that is asked is granted, until nothing is due soon."""
        self.all(lambda b: b.control.resume(b.now_ms))
        for bench in self.benches:
            for _ in range(100):
                for call in waiting(bench):
                    if call[3] in bench.wire._waiting:
                        bench.answer(call[3])
                bench.wait(limits.CONTROL_RETRY_MS_MAX // 20)

    # --- what can be seen -------------------------------------------------------------------------

    def said(self, bench: Bench) -> list[Any]:
        """What was said to connections since the hand-over, beside calls."""
        kinds = ("reply", "subscribe", "send", "close")
        calls = bench.engine.calls
        since = self.after if bench is self.first else 0
        return [shown(c) for c in calls[since:] if c[0] in kinds]

    def told(self, bench: Bench, handle: int) -> Any:
        """The last announce on a connection, by whoever said it."""
        return told(self.first.engine.calls[: self.after] + bench.engine.calls, handle)

    def picture(self, bench: Bench) -> dict[str, Any]:
        control = bench.control
        return {
            "status": control.status(),
            "live": dict(control.live),
            "sessions": {
                s.handle: (s.key, s.wanted, s.has, s.suspended, s.leaving, s.waiting is not None)
                for s in control.sessions.all()
            },
            "peers": {
                h: (link.met, link.groups, link.parts.epoch, len(link.parts.parts()))
                for h, link in control.peers._links.items()
            },
            "peer clients": {h: c.node for h, c in control.peers._clients.items()},
            "paused": control.announcer.paused_endpoints(),
            "brokers": {link.handle: announced(bench, link.handle) for link in links(bench)},
            "told": {link.handle: self.told(bench, link.handle) for link in links(bench)},
            "registered": bench.registry.state(),
            "leases": {
                (c.registration.app, c.registration.client): (
                    c.remaining_ms(bench.now_ms),
                    c.connections,
                )
                for c in bench.registry.clients()
            },
            "groups": bench.compiled.group_ids,
            "endpoints": bench.compiled.endpoints,
        }


def told(calls: list[Any], handle: int) -> Any:
    found = [c[2].headers for c in calls if c[:2] == ("call", handle) and op(c)[:8] == "announce"]
    return {k: v for k, v in found[-1].items() if k != "fm.epoch"} if found else None


def op(call: Any) -> str:
    headers: dict[str, str] = call[2].headers
    return headers["fm.op"] + headers.get("fm.part", "")


def waiting(bench: Bench) -> list[Any]:
    """Calls that were said, and are not answered."""
    return [c for c in bench.engine.said("call") if c[3] in bench.wire._waiting]


def asked(bench: Bench) -> set[tuple[int, str]]:
    """(handle, what about) of what is said and not answered. Who does not know whether the suspend
    before it was taken asks to resume at once."""
    about = {"suspend": "push", "resume": "push"}
    return {(c[1], about.get(op(c), op(c).rstrip("0123456789"))) for c in waiting(bench)}


def links(bench: Bench) -> list[Any]:
    return [link for link in bench.control.announcer.links() if link.state == "ready"]


def announced(bench: Bench, handle: int) -> Any:
    link = next(x for x in links(bench) if x.handle == handle)
    announcer = bench.control.announcer
    is_newest = link.taken == announcer._version and not announcer._stale
    return announcer._rows if is_newest else None


def shown(call: Any) -> Any:
    """Without what differs between two processes: epochs."""
    if call[0] in ("reply", "send") and call[2] is not None:
        headers = {k: v for k, v in call[2].headers.items() if k != "fm.epoch"}
        return (call[0], call[1], call[2].kind, headers, *call[3:])
    return call


@pytest.mark.parametrize("seed", range(120))
def test_both_go_on_the_same(seed: int) -> None:
    life = Life(seed)
    life.live(life.chosen.randrange(20, 400))
    if seed % 3 == 0:
        life.first.engine.ring_full = True  # what was said since then is not in the engine's ring
        life.live(20)
    made = life.hand_over(shift_ms=life.chosen.choice([-900_000, 0, 123_456_789]))
    open_calls = asked(life.first)
    life.first.engine.ring_full = False
    life.first.compile()
    before, after = (life.picture(bench) for bench in life.benches)
    if life.first.control.announcer._stale:
        # What is only suspected to be news the successor has looked at already.
        for picture in (before, after):
            for link in picture["status"]["brokers"]:
                del link["announced"]
    for name in ("status", "sessions", "peers", "peer clients", "paused", "live", "leases"):
        assert before[name] == after[name], name
    replies = [life.said(bench) for bench in life.benches]
    assert replies[0] == replies[1], "what was not said yet is said"
    again = asked(made)
    due = asked(life.first)
    assert again <= open_calls | due, "nothing else is asked"
    life.live(life.chosen.randrange(100))
    replies = [life.said(bench) for bench in life.benches]
    assert replies[0] == replies[1]
    life.settle()
    pictures = [life.picture(bench) for bench in life.benches]
    for name in pictures[0]:
        assert pictures[0][name] == pictures[1][name], name
    assert_epochs_rise(life, made)


def assert_epochs_rise(life: Life, made: Bench) -> None:
    """Of all that was announced on a connection by the first one and then by its successor."""
    newest: dict[int, int] = {}
    for call in life.first.engine.calls[: life.after] + made.engine.calls:
        if call[0] not in ("call", "send") or call[2].headers.get("fm.op") != "announce":
            continue
        epoch, part = int(call[2].headers["fm.epoch"]), call[2].headers["fm.part"]
        before = newest.get(call[1], 0)
        assert epoch > before or (epoch == before and part != "1")
        newest[call[1]] = epoch


# --- one thing at a time --------------------------------------------------------------------------


def with_groups() -> Bench:
    bench = Bench()
    bench.register("c1", group("g1", prefetch=3), group("g2"))
    bench.compile()
    return bench


def next_of(bench: Bench, ms: int = 0) -> Bench:
    """Whoever takes over, `ms` of its own clock later."""
    return Bench(document=bench.save(), now_ms=bench.now_ms - 500_000 + ms)


def test_a_failure_is_remembered_and_its_delay_goes_on_doubling() -> None:
    bench = with_groups()
    handle = bench.met("b1")
    for _ in range(3):
        bench.answer(bench.calls(handle, "announce")[-1][1], result="reject", reason="no")
        bench.wait(limits.CONTROL_RETRY_MS_MAX)
    bench.answer(bench.calls(handle, "announce")[-1][1], result="reject", reason="no")
    bench.wait(1000)
    made = next_of(bench)
    assert made.control.status()["brokers"][0]["failure"] == "announce: reject: no"
    made.wait(6999)
    assert not made.calls(handle), "8 s after the fourth time"
    made.wait(1)
    made.answer(made.calls(handle, "announce")[-1][1], result="reject", reason="no")
    made.wait(15_999)
    assert len(made.calls(handle)) == 1
    made.wait(1)
    assert len(made.calls(handle)) == 2, "16 s after the fifth"


def test_a_broker_that_knows_everything_is_told_nothing() -> None:
    bench = with_groups()
    bench.joined("c1", "g1")
    bench.live("g1", 1, 3)
    handle = bench.met("b1")
    bench.answer(bench.calls(handle, "announce")[-1][1])
    made = next_of(bench)
    assert made.control.status()["brokers"][0]["announced"]
    made.wait(60_000)
    assert not made.engine.said("call")
    assert not made.engine.said("subscribe")
    made.live("g1", 1, 9)
    made.wait(limits.ANNOUNCE_GAP_MS)
    ((frame, _),) = made.calls(handle, "announce")
    before = bench.calls(handle, "announce")[-1][0]
    assert int(frame.headers["fm.epoch"]) > int(before.headers["fm.epoch"])


def test_news_that_was_not_announced_yet_is_announced() -> None:
    bench = with_groups()
    handle = bench.met("b1")
    bench.answer(bench.calls(handle, "announce")[-1][1])
    bench.live("g1", 1, 3)
    assert len(bench.calls(handle, "announce")) == 1, "within the gap"
    made = next_of(bench)
    made.wait(limits.ANNOUNCE_GAP_MS)
    ((frame, _),) = made.calls(handle, "announce")
    assert frame.headers["fm.group"] == "g1"


def test_another_version_that_says_more_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = with_groups()
    bench.live("g1", 1, 3)
    handle = bench.met("b1")
    bench.answer(bench.calls(handle, "announce")[-1][1])
    data = bench.save().replace(b'"rows":"', b'"rows":"x')
    made = Bench(document=data)
    made.wait(limits.ANNOUNCE_GAP_MS)
    assert [frame.headers["fm.group"] for frame, _ in made.calls(handle, "announce")] == ["g1"]


@pytest.mark.parametrize("state", ["hello", "announce", "suspend"])
def test_what_was_not_answered_is_said_again_and_old_answers_are_nobodys(state: str) -> None:
    bench = with_groups()
    bench.live("g1", 1, 3)
    handle = bench.dialled("b1")
    if state != "hello":
        bench.answer(bench.calls(handle, "hello")[-1][1])
    if state == "suspend":
        bench.answer(bench.calls(handle, "announce")[-1][1])
        bench.control.suspend()
        bench.settle()
    ((old_frame, old),) = bench.calls(handle, state)
    made = next_of(bench)
    ((_, new),) = made.calls(handle, state)
    assert new > old
    made.event("answer", old, 0, 0, push.response(1, old_frame.hint, {"fm.result": "reject"}))
    assert made.control.status()["brokers"][0]["failure"] == ""
    made.answer(new)
    status = made.control.status()["brokers"][0]
    assert (status["state"], status["suspended"]) == ("ready", state == "suspend")
    assert len(made.calls(handle)) == (2 if state == "hello" else 1)


def test_a_subscribe_waits_for_what_was_left_of_its_time() -> None:
    bench = with_groups()
    handle = bench.client()
    bench.hello(handle)
    bench.register("c1", group("g1"), group("late"))
    assert bench.ask(handle, op="subscribe", group="late") is None
    bench.wait(1000)
    made = next_of(bench)
    assert made.subscribed(handle) == ((made.compiled.group_ids["late"], limits.PREFETCH),)
    (reply,) = made.engine.said("reply")
    assert (reply[1], reply[2].headers) == (handle, {"fm.result": "consumed"})

    bench.register("c1", group("g1"), group("late"), group("later"))
    assert bench.ask(handle, op="subscribe", group="late,later") is None
    asked = bench.control.sessions._sessions[handle].waiting
    bench.wait(1000)
    made.restore(bench.save())
    made.wait(limits.SUBSCRIBE_WAIT_MS - 1001)
    assert len(made.engine.said("reply")) == 1
    made.wait(1)
    reply = made.engine.said("reply")[1]
    assert asked is not None
    assert (reply[1], reply[2].id) == (handle, asked.id)
    assert reply[2].headers["fm.result"] == "later"


def test_a_registration_that_was_not_compiled_yet_reaches_its_connections() -> None:
    bench = with_groups()
    handle = bench.joined("c1", "g1")
    bench.register("c1", group("g1", prefetch=7), group("g2"))
    made = next_of(bench)
    assert made.subscribed(handle) == ((made.compiled.group_ids["g1"], 7),)


def test_connections_of_what_is_gone_from_the_configuration_are_still_known() -> None:
    bench = with_groups()
    number = bench.endpoint("b2")
    text = CONFIG.replace('    - {name: b2, address: "127.0.0.1:12402"}\n', "")
    made = Bench(text, document=bench.save())
    assert "b2" not in {e.name for e in made.compiled.endpoints}
    made.event("opened", 9 << 32, number, 1)
    assert len(made.calls(9 << 32, "hello")) == 1


def test_brokers_and_peers_hear_a_new_name() -> None:
    bench = with_groups()
    broker, peer = bench.met("b1"), bench.met("n2")
    bench.answer(bench.calls(broker, "announce")[-1][1])
    made = Bench(CONFIG.replace("name: n1", "name: n9"), document=bench.save())
    for handle in (broker, peer):
        ((hello, ticket),) = made.calls(handle)
        assert (hello.headers["fm.op"], hello.headers["fm.client"]) == ("hello", "n9")
        made.answer(ticket)
    assert len(made.calls(broker, "announce")) == 1
    assert not Bench(document=bench.save()).engine.said("call")


def test_a_peer_is_silent_when_it_was_silent_for_the_rest_of_its_time() -> None:
    bench = with_groups()
    handle = bench.met("n2")
    bench.frame(handle, {"fm.op": "announce", "fm.group": "g1", "fm.epoch": "1"})
    bench.wait(2000)
    made = next_of(bench)
    number = made.endpoint("n2")
    ids = (made.compiled.group_ids["g1"],)
    assert [c[1:] for c in made.engine.said("peer_groups")] == [(number, ids)]
    made.wait(999)
    assert len(made.engine.said("peer_groups")) == 1
    made.wait(1)
    assert [c[1:] for c in made.engine.said("peer_groups")][1:] == [(number, ())]


def test_half_an_announce_of_a_peer_becomes_whole() -> None:
    bench = with_groups()
    handle = bench.met("n2")
    said = {"fm.op": "announce", "fm.epoch": "5", "fm.parts": "2"}
    bench.frame(handle, {**said, "fm.group": "g1", "fm.part": "1"})
    made = next_of(bench)
    assert not made.engine.said("peer_groups")
    made.frame(handle, {**said, "fm.group": "g2", "fm.part": "2"})
    assert made.engine.said("peer_groups")[-1][2] == tuple(sorted(made.compiled.group_ids.values()))
    made.frame(handle, {**said, "fm.group": "", "fm.epoch": "4", "fm.parts": "1"})
    assert len(made.engine.said("peer_groups")) == 1, "late"


def test_peers_hear_again_when_they_would_have_heard() -> None:
    bench = with_groups()
    bench.live("g1", 1, 3)
    handle = bench.peer_client()
    bench.ask(handle, op="hello", protocol="1", app="shop", client="n7")
    assert len(bench.engine.said("send")) == 1
    bench.wait(400)
    made = next_of(bench)
    made.wait(599)
    assert not made.engine.said("send")
    made.wait(1)
    (sent,) = made.engine.said("send")
    assert sent[2].headers["fm.group"] == "g1"
    assert int(sent[2].headers["fm.epoch"]) > 1


def test_what_the_engine_was_not_told_is_told_first_and_in_order() -> None:
    bench = with_groups()
    handle = bench.client()
    bench.engine.ring_full = True
    for fields in ({"op": "hello", "client": "c1"}, {"op": "subscribe", "group": "g1"}):
        bench.ask(handle, protocol="1", app="shop", **fields)
    assert not bench.engine.said("reply")
    made = next_of(bench)
    kinds = [(call[0], call[1]) for call in made.engine.calls]
    assert kinds == [("reply", handle), ("subscribe", handle), ("reply", handle)]
    assert made.engine.calls[0][3], "it is greeted"


def taking_over(*documents_: bytes) -> Bench:
    """One after the other, and nothing in between."""
    made = Bench()
    for data in documents_:
        made.restore(data)
    return made


@pytest.mark.parametrize("seed", range(60))
def test_the_last_document_replaces_the_first_one(seed: int) -> None:
    life = Life(seed)
    life.live(life.chosen.randrange(200))
    first = life.first.save()
    life.live(life.chosen.choice([0, 5, 100]))
    last = life.first.save()
    one, two = taking_over(last), taking_over(first, last)
    three = taking_over(first, first, last, last)
    for made in (two, three):
        assert made.save() == one.save()
        assert made.registry._connections == one.registry._connections
        for name in ("_of_client", "_of_group", "_waiting", "_stale", "_ids"):
            mine, theirs = (getattr(b.control.sessions, name) for b in (made, one))
            assert mine == theirs, name
    benches = one, two, three
    for made in benches:
        made.compile()
        made.wait(3000)
    for made in benches[1:]:
        assert [shown(c) for c in made.engine.calls] == [shown(c) for c in one.engine.calls]


def test_what_happened_between_two_documents_does_not_stay() -> None:
    bench = with_groups()
    handle, other = bench.joined("c1", "g1"), bench.joined("c1", "g2")
    data = bench.save()
    made = taking_over(data)
    made.event("gone", other)
    made.ask(handle, op="suspend")
    assert made.save() != data
    made.restore(data)
    assert made.control.sessions.save(0) == bench.control.sessions.save(0)


def test_connections_that_did_not_come_are_gone() -> None:
    bench = with_groups()
    handle = bench.joined("c1", "g1")
    bench.live("g1", 1, 3)
    bench.met("b1")
    bench.dialled("n2")
    bench.peer_client()
    made = next_of(bench)
    made.control.forget_connections(made.now_ms)
    made.settle()
    status = made.control.status()
    assert (status["clients"], status["brokers"], status["peers"]) == (0, [], [])
    assert not made.control.live
    client = made.registry.client("shop", "c1")
    assert client is not None
    assert (client.connections, client.remaining_ms(made.now_ms)) == (0, 30_000)
    assert handle not in made.control.sessions
    again = made.met("b1")
    assert made.calls(again, "announce")[0][0].headers["fm.group"] == ""


# --- documents that are no such thing -------------------------------------------------------------


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(tree, (dict, list)):
        return [path]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [path, *(p for key, value in items for p in leaves(value, (*path, key)))]


def test_hostile_documents_are_refused_or_harmless() -> None:
    life = Life(4)
    life.live(300)
    life.first.engine.ring_full = True
    life.live(30)
    whole = life.first.save()
    tree = msgspec.json.decode(whole)
    chosen = random.Random(1)
    places = [path for path in leaves(tree) if path and path[0] == "parts"]
    values: list[Any] = [None, -1, 0, 1, 2**31, 2**63, 2**70, 1.5, "", "x" * 70_000, "\x00", True]
    values += [[], {}, [[]], [1], {"": 1}, {"handle": 1}, [None] * 5]
    refused = 0
    for _ in range(3000):
        other = msgspec.json.decode(whole)
        for _ in range(chosen.randint(1, 2)):
            path, at = chosen.choice(places), other
            try:
                for step in path[:-1]:
                    at = at[step]
                if chosen.random() < 0.2:
                    del at[path[-1]]
                else:
                    at[path[-1]] = chosen.choice(values)
            except (LookupError, TypeError):
                continue  # the first change has removed the place of the second
        try:
            made = Bench(document=msgspec.json.encode(other))
        except HandoverError:
            refused += 1
        else:
            made.wait(5000)
    assert 1000 < refused < 2990
