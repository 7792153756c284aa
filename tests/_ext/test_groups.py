"""The engine carries a message mesh: groups, credit, keys, peers, and Python's part."""

from __future__ import annotations

import socket
import struct
from typing import ClassVar

import pytest

from fastmesh._ext.push import parse, request
from tests._ext.bed import Peer, eventually
from tests._ext.push_bed import (
    BROKER_ID,
    FORWARD,
    GROUP_ID,
    GROUP_ROW,
    PEER_ID,
    PUNT,
    PUSH,
    PUSH_ROW,
    ROUTE_ROW,
    PushBed,
    answer,
    deliver,
    gather,
    headers_of,
    publish,
    result,
)


def reset(peer: Peer) -> None:
    """End a connection with RST."""
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


class TestHelloFirst:
    """Nothing leaves to a broker before our hello: a broker refuses for good what comes earlier."""

    def test_publishes_wait_for_it_and_go_behind_it(self) -> None:
        with PushBed() as bed:
            broker = bed.accept_broker()
            client = bed.client()
            for number in range(1, 4):
                client.sendall(publish(number, "t", b"early"))
            assert broker.silent()
            bed.greet(broker)  # the first frame is the hello
            client.sendall(publish(4, "t", b"late"))
            found = [broker.frame() for _ in range(4)]
            assert [parse(f.data).content for f in found] == [b"early"] * 3 + [b"late"]
            for asked in found:
                broker.sendall(answer(asked, "consumed"))
            assert [client.frame().id for _ in range(4)] == [1, 2, 3, 4]
            eventually(bed.balanced)

    def test_what_waits_is_sent_elsewhere_when_the_connection_ends(self) -> None:
        with PushBed(brokers=2, topics={"t": [0, 1]}) as bed:
            first, second = bed.accept_broker(0), bed.broker(1)
            client = bed.client()
            for number in range(1, 21):
                client.sendall(publish(number, "t"))
            assert first.silent()
            first.close()
            for _ in range(20):
                second.sendall(answer(second.frame(), "consumed"))
            assert {client.frame().id for _ in range(20)} == set(range(1, 21))
            eventually(bed.balanced)


class TestControlFrames:
    def test_they_go_to_python_and_never_to_a_broker(self):
        with PushBed() as bed:
            broker = bed.broker()
            client = bed._connect(PUSH)
            sent = request(
                9, {"fm.op": "subscribe", "fm.group": "g"}, b"whole", crc=True, dialect=2
            )
            client.sendall(sent)
            event = bed.punted(client)
            assert (event.b, event.c, event.data) == (PUSH, 0, sent)
            assert broker.silent()

    def test_what_follows_waits_for_the_reply(self):
        with PushBed() as bed:
            client = bed._connect(PUSH)
            client.sendall(
                request(1, {"fm.op": "hello"})
                + request(2, {"fm.op": "subscribe"})
                + publish(3, "t")
            )
            broker = bed.broker()
            first = bed.punted(client)
            assert parse(first.data).id == 1
            assert not bed.seen("frame")
            assert broker.silent()
            bed.engine.reply(first.a, bed.answered(first, "consumed"), greet=True)
            assert result(client.frame()) == "consumed"
            second = bed.punted(client)
            assert parse(second.data).id == 2
            assert broker.silent()
            bed.engine.reply(second.a, b"")
            assert headers_of(broker.frame())["fm.op"] == "publish"

    def test_a_publish_before_hello_goes_to_python(self):
        with PushBed() as bed:
            client = bed._connect(PUSH)
            client.sendall(publish(3, "t"))
            assert parse(bed.punted(client).data).headers["fm.op"] == "publish"

    def test_opened_and_gone_come_in_pairs(self):
        with PushBed(peers=1) as bed:
            broker, peer = bed.broker(), bed._accept(bed.peers[0])
            client = bed.client()
            opened = bed.wait_event("opened", 3)
            assert {(e.b, e.c) for e in opened} == {(BROKER_ID, 1), (PEER_ID, 1), (PUSH, 0)}
            for one in (broker, peer, client):
                one.close()
            gone = bed.wait_event("gone", 3)
            assert {e.a for e in gone} == {e.a for e in opened}

    def test_nothing_is_lost_when_python_does_not_read(self):
        """A ring that holds a handful of frames, and many connections that come, speak and go."""
        with PushBed(ring_bytes=1 << 16) as bed:
            clients = [bed._connect(PUNT) for _ in range(100)]
            for client in clients:
                client.sendall(b"".join(request(i, {"fm.op": "x"}, bytes(500)) for i in range(5)))
            eventually(lambda: bed.process().get("punt_full"), "the ring is full")
            heard = bed.wait_event("frame", 500)
            assert len(heard) == 500
            by_client: dict[int, list[int]] = {}
            for event in heard:
                by_client.setdefault(event.a, []).append(parse(event.data).id)
            assert sorted(by_client.values()) == [[0, 1, 2, 3, 4]] * 100
            for client in clients:
                client.close()
            assert len(bed.wait_event("gone", 100)) == 100
            assert len(bed.seen("opened")) == 101  # and the broker's

    def test_a_frame_that_never_fits_is_rejected(self):
        with PushBed(ring_bytes=1 << 16) as bed:
            client = bed._connect(PUNT)
            client.sendall(request(1, {"fm.op": "x"}, bytes(1 << 16)))
            assert result(client.frame()) == "reject"
            assert bed.balanced()


class TestCalls:
    def call(self, bed: PushBed, handle: int, ticket: int = 77, timeout_ms: int = 2000) -> None:
        assert (
            bed.engine.call_many([(handle, ticket, request(1, {"fm.op": "announce"}), timeout_ms)])
            == 1
        )

    def test_the_answer_comes_as_an_event(self):
        with PushBed() as bed:
            broker = bed.broker()
            handle = bed.wait_event("opened")[0].a
            self.call(bed, handle)
            asked = broker.frame()
            assert headers_of(asked) == {"fm.op": "announce"}
            broker.sendall(answer(asked, "consumed"))
            event = bed.wait_event("answer")[0]
            assert (event.a, event.b) == (77, 0)
            assert parse(event.data).headers == {"fm.result": "consumed"}
            broker.sendall(answer(asked, "consumed"))  # a second one reaches nobody
            eventually(lambda: bed.process().get("dropped.duplicate") == 1, "dropped")
            assert len(bed.seen("answer")) == 1

    def test_the_deadline_is_an_outcome_and_a_late_answer_is_dropped(self):
        with PushBed() as bed:
            broker = bed.broker()
            self.call(bed, bed.wait_event("opened")[0].a, timeout_ms=30)
            asked = broker.frame()
            event = bed.wait_event("answer")[0]
            assert (event.a, event.b, event.data) == (77, 8, b"")
            broker.sendall(answer(asked, "consumed"))
            eventually(lambda: bed.process().get("dropped.late") == 1, "dropped")

    def test_the_connection_ends(self):
        with PushBed() as bed:
            broker = bed.broker()
            handle = bed.wait_event("opened")[0].a
            self.call(bed, handle)
            broker.frame()
            broker.close()
            assert bed.wait_event("answer")[0].b == 5
            self.call(bed, handle, 78)
            assert [(e.a, e.b) for e in bed.wait_event("answer", 2)][1] == (78, 5)

    def test_what_is_no_request_is_refused(self):
        with PushBed() as bed:
            bed.broker()
            handle = bed.wait_event("opened")[0].a
            assert (
                bed.engine.call_many(
                    [(handle, 1, b"junk", 1000), (handle, 2, publish(1, "t")[:-1], 1000)]
                )
                == 2
            )
            assert [(e.a, e.b) for e in bed.wait_event("answer", 2)] == [(1, 7), (2, 7)]

    def test_a_full_ring_takes_what_fits(self):
        with PushBed(ring_bytes=1 << 16) as bed:
            broker = bed.broker()
            handle = bed.wait_event("opened")[0].a
            bed.engine._stall(200)
            frame = publish(1, "t", bytes(10000))
            taken = bed.engine.send_many([(handle, frame)] * 10)
            assert 0 < taken < 10
            broker.frames(taken)


class TestPublish:
    def test_goes_to_a_broker_of_its_topic_and_comes_back(self):
        with PushBed(brokers=2, topics={"blue": [0], "red": [1]}) as bed:
            one, two, client = bed.broker(0), bed.broker(1), bed.client()
            for topic, broker in (("blue", one), ("red", two)) * 3:
                client.sendall(publish(7, topic, b"c", id="m1"))
                asked = broker.frame()
                assert asked.content == b"c"
                broker.sendall(answer(asked, "consumed", id="m1"))
                back = client.frame()
                assert (back.id, headers_of(back)) == (7, {"fm.result": "consumed", "fm.id": "m1"})
            assert bed.row(ROUTE_ROW)["requests.answered"] == 6
            assert bed.balanced()

    def test_least_in_flight_of_the_brokers_of_a_topic(self):
        with PushBed(brokers=3, topics={"t": [0, 2]}) as bed:
            brokers, client = [bed.broker(i) for i in range(3)], bed.client()
            for i in range(10):
                client.sendall(publish(i, "t"))
            brokers[0].frames(5)
            brokers[2].frames(5)
            assert brokers[1].silent()

    def test_no_broker_is_later_and_nothing_happened(self):
        with PushBed() as bed:
            broker, client = bed.broker(), bed.client()
            bed.brokers[0].close()
            broker.close()
            bed.wait_event("gone")
            client.sendall(publish(1, "t"))
            said = headers_of(client.frame())
            assert said["fm.result"] == "later"
            assert int(said["fm.retry_ms"]) > 0

    def test_every_version_of_bolt_goes_by_the_one_connection(self):
        """Another one would need a hello of its own before it takes anything."""
        with PushBed() as bed:
            broker, client = bed.broker(), bed.client()
            headers = {"fm.op": "publish", "fm.topic": "t"}
            for dialect, crc in ((0, False), (1, False), (2, False), (2, True)):
                sent = request(5, headers, b"whole", dialect=dialect, crc=crc)
                client.sendall(sent)
                got = broker.frame()
                assert bolt_body(got.data) == bolt_body(sent)
                broker.sendall(answer(got, "consumed"))
                assert result(client.frame()) == "consumed"
            assert len(bed.seen("opened")) == 2  # the client's and the broker's
            assert bed.balanced()

    def test_a_broker_that_dies_leaves_each_publish_ambiguous(self):
        with PushBed() as bed:
            broker, client = bed.broker(), bed.client()
            client.sendall(publish(1, "t") + publish(2, "t"))
            broker.frames(2)
            broker.close()
            assert {(f.id, result(f)) for f in client.frames(2)} == {
                (1, "status 16"),
                (2, "status 16"),
            }
            assert bed.balanced()

    def test_an_idempotent_one_goes_to_another_broker(self):
        with PushBed(brokers=2) as bed:
            brokers, client = [bed.broker(0), bed.broker(1)], bed.client()
            sent = publish(5, "t", b"body", idempotent="1")
            client.sendall(sent)
            ((first, _),) = gather(brokers, 1)
            other = brokers[1 - brokers.index(first)]
            reset(first)
            asked = other.frame()
            assert bolt_body(asked.data) == bolt_body(sent)
            other.sendall(answer(asked, "consumed"))
            back = client.frame()
            assert (back.id, result(back)) == (5, "consumed")
            assert bed.row(ROUTE_ROW)["requests.retried"] == 1
            assert bed.balanced()


def bolt_body(frame: bytes) -> tuple[dict[str, str], bytes]:
    found = parse(frame)
    return found.headers, found.content


class TestDeliver:
    def test_to_one_connection_of_the_group_and_the_answer_back(self):
        with PushBed(groups={"g": {}, "h": {}}) as bed:
            broker, g, h = bed.broker(), bed.subscriber("g"), bed.subscriber("h")
            broker.sendall(deliver(41, "h", b"to h") + deliver(42, "g", b"to g"))
            for client, body in ((g, b"to g"), (h, b"to h")):
                asked = client.frame()
                assert asked.content == body
                client.sendall(answer(asked, "consumed", reason=body.decode()))
            back = {f.id: headers_of(f)["fm.reason"] for f in broker.frames(2)}
            assert back == {41: "to h", 42: "to g"}
            assert bed.row(GROUP_ROW)["pushes.answered"] == 1
            assert bed.balanced()

    def test_the_content_and_everything_unknown_is_untouched(self):
        with PushBed() as bed:
            broker, client = bed.broker(), bed.subscriber("g")
            headers = {"fm.op": "deliver", "fm.group": "g", "h.x": "ä", "fm.whatever": "1"}
            for dialect, crc in ((0, False), (1, False), (2, True)):
                sent = request(3, headers, bytes(range(256)) * 9, dialect=dialect, crc=crc)
                broker.sendall(sent)
                got = client.frame()
                assert bolt_body(got.data) == bolt_body(sent)
                client.sendall(answer(got, "consumed"))
                assert result(broker.frame()) == "consumed"

    def test_nobody_of_that_group_is_refused_at_once(self):
        with PushBed(groups={"g": {}, "h": {}}) as bed:
            broker = bed.broker()
            bed.subscriber("g")
            broker.sendall(deliver(1, "h") + deliver(2, "unheard of"))
            assert [(f.id, result(f)) for f in broker.frames(2)] == [
                (1, "no_consumer"),
                (2, "no_consumer"),
            ]
            assert bed.balanced()

    def test_least_in_flight_and_never_beyond_prefetch(self):
        with PushBed() as bed:
            broker = bed.broker()
            a, b = bed.subscriber("g", prefetch=2), bed.subscriber("g", prefetch=3)
            broker.sendall(b"".join(deliver(i, "g") for i in range(7)))
            refused = broker.frames(2)
            assert {result(f) for f in refused} == {"later"}
            assert int(headers_of(refused[0])["fm.retry_ms"]) > 0
            held = a.frames(2), b.frames(3)
            assert a.silent()
            b.sendall(answer(held[1][0], "consumed"))
            broker.frame()
            broker.sendall(deliver(9, "g"))
            b.frame()
            assert a.silent()

    def test_equals_take_turns(self):
        with PushBed() as bed:
            broker = bed.broker()
            clients = [bed.subscriber("g") for _ in range(5)]
            order = []
            for i in range(15):
                broker.sendall(deliver(i, "g"))
                ((client, asked),) = gather(clients, 1)
                order.append(client)
                client.sendall(answer(asked, "consumed"))
                broker.frame()
            assert order[:5] == order[5:10] == order[10:]
            assert len(set(order)) == 5

    def test_a_client_that_dies_leaves_each_delivery_refused_and_none_acknowledged(self):
        with PushBed() as bed:
            broker, client = bed.broker(), bed.subscriber("g")
            broker.sendall(deliver(1, "g") + deliver(2, "g"))
            client.frames(2)
            reset(client)
            back = broker.frames(2)
            assert {(f.id, result(f)) for f in back} == {(1, "later"), (2, "later")}
            bed.wait_event("gone")
            broker.sendall(deliver(3, "g"))
            assert result(broker.frame()) == "no_consumer"
            assert bed.balanced()

    def test_a_deadline_says_later_and_keeps_the_credit_of_a_stuck_consumer(self):
        with PushBed(request_timeout_ms=50) as bed:
            broker, client = bed.broker(), bed.subscriber("g", prefetch=1)
            broker.sendall(deliver(1, "g"))
            asked = client.frame()
            assert result(broker.frame()) == "later"
            broker.sendall(deliver(2, "g"))
            assert result(broker.frame()) == "later"
            assert client.silent()
            client.sendall(answer(asked, "consumed"))  # late: reaches nobody, gives the credit back
            eventually(lambda: bed.process().get("dropped.late"), "dropped")
            broker.sendall(deliver(3, "g"))
            assert headers_of(client.frame())["fm.op"] == "deliver"
            assert bed.row()["pushes.expired"] == 1

    def test_a_new_subscription_replaces_the_old_one(self):
        with PushBed(groups={"g": {}, "h": {}}) as bed:
            broker, client = bed.broker(), bed.subscriber("g", "h", prefetch=5)
            found = {(e.a, e.b, e.c) for e in bed.wait_event("group", 2)}
            assert found == {(GROUP_ID, 1, 5), (GROUP_ID + 1, 1, 5)}
            broker.sendall(deliver(1, "g"))
            asked = client.frame()
            bed.subscribe(client, "h", prefetch=7)
            broker.sendall(deliver(2, "g"))
            assert result(broker.frame()) == "no_consumer"
            client.sendall(answer(asked, "consumed"))  # what was under way is still answered
            assert result(broker.frame()) == "consumed"
            wanted = {GROUP_ID: (0, 0), GROUP_ID + 1: (1, 7)}
            eventually(lambda: {e.a: (e.b, e.c) for e in bed.seen("group")} == wanted, "told")

    def test_check_asks_a_publisher(self):
        with PushBed() as bed:
            broker, client = bed.broker(), bed.subscriber("g")
            broker.sendall(request(8, {"fm.op": "check", "fm.group": "g", "fm.id": "m"}))
            asked = client.frame()
            assert headers_of(asked)["fm.op"] == "check"
            client.sendall(answer(asked, "rollback"))
            assert result(broker.frame()) == "rollback"

    def test_other_requests_of_a_broker_go_to_python_and_hold_nothing_up(self):
        with PushBed() as bed:
            broker, client = bed.broker(), bed.subscriber("g")
            broker.sendall(request(1, {"fm.op": "suspend"}) + deliver(2, "g"))
            client.frame()
            event = bed.punted(broker)
            assert (event.b, event.c) == (BROKER_ID, 1)
            bed.engine.send_many([(event.a, bed.answered(event, "consumed"))])
            assert result(broker.frame()) == "consumed"

    def test_a_group_leaves_the_snapshot_with_deliveries_under_way(self):
        with PushBed(groups={"g": {}, "h": {"ordered": True}}) as bed:
            broker, client = bed.broker(), bed.subscriber("g", "h")
            broker.sendall(deliver(1, "g") + deliver(2, "h", key="k"))
            asked = client.frames(2)
            bed.groups = {"g": bed.groups["g"]}
            bed.publish()
            broker.sendall(deliver(3, "h", key="k"))
            assert result(broker.frame()) == "no_consumer"
            for frame in asked:
                client.sendall(answer(frame, "consumed"))
            assert {(f.id, result(f)) for f in broker.frames(2)} == {
                (1, "consumed"),
                (2, "consumed"),
            }

    def test_one_way_deliveries_use_no_credit(self):
        with PushBed() as bed:
            broker, client = bed.broker(), bed.subscriber("g", prefetch=1)
            broker.sendall(
                b"".join(
                    request(i, {"fm.op": "deliver", "fm.group": "g"}, oneway=True) for i in range(3)
                )
            )
            client.frames(3)
            assert bed.row()["pushes.oneway_forwarded"] == 3


class TestOrdered:
    def test_a_key_goes_to_one_consumer_and_follows_its_unanswered_message(self):
        with PushBed(groups={"g": {"ordered": True}}) as bed:
            broker = bed.broker()
            clients = [bed.subscriber("g", prefetch=100) for _ in range(4)]
            where: list[dict[str, int]] = []
            for _ in range(2):
                for n in range(40):
                    broker.sendall(deliver(n + 1, "g", key=f"k{n}"))
                at = {}
                for client, asked in gather(clients, 40):
                    at[headers_of(asked)["fm.key"]] = clients.index(client)
                    client.sendall(answer(asked, "consumed"))
                broker.frames(40)
                where.append(at)
            assert where[0] == where[1]
            assert len(set(where[0].values())) > 1

    def test_while_one_is_unanswered_the_next_goes_to_the_same_place_or_waits(self):
        with PushBed(groups={"g": {"ordered": True}}) as bed:
            broker, first = bed.broker(), bed.subscriber("g", prefetch=2)
            broker.sendall(deliver(1, "g", key="k"))
            held = first.frame()
            others = [bed.subscriber("g", prefetch=2) for _ in range(8)]
            broker.sendall(deliver(2, "g", key="k"))
            second = first.frame()
            broker.sendall(deliver(3, "g", key="k"))
            assert result(broker.frame()) == "later"
            assert all(other.silent(0.01) for other in others)
            bed.subscribe(first)  # it left: nothing overtakes what it holds
            broker.sendall(deliver(4, "g", key="k"))
            assert result(broker.frame()) == "later"
            for frame in (held, second):
                first.sendall(answer(frame, "consumed"))
            broker.frames(2)
            broker.sendall(deliver(5, "g", key="k"))
            eventually(lambda: any(not other.silent(0.01) for other in others), "moved on")

    def test_messages_without_a_key_go_to_the_least_busy(self):
        with PushBed(groups={"g": {"ordered": True}}) as bed:
            broker = bed.broker()
            a, b = bed.subscriber("g"), bed.subscriber("g")
            broker.sendall(deliver(1, "g") + deliver(2, "g"))
            a.frame()
            b.frame()


class TestBroadcast:
    def test_every_connection_gets_it_and_one_answer_comes_back(self):
        with PushBed(groups={"g": {"broadcast": True}}) as bed:
            broker = bed.broker()
            clients = [bed.subscriber("g") for _ in range(3)]
            for dialect, crc in ((0, False), (2, True)):
                headers = {"fm.op": "deliver", "fm.group": "g"}
                broker.sendall(request(6, headers, b"all" * 999, dialect=dialect, crc=crc))
                asked = [client.frame() for client in clients]
                assert {f.content for f in asked} == {b"all" * 999}
                for client, frame in zip(clients, asked, strict=True):
                    assert broker.silent(0.01)
                    client.sendall(answer(frame, "consumed"))
                back = broker.frame()
                assert (back.id, result(back)) == (6, "consumed")
            assert bed.row()["pushes.answered"] == 6
            assert bed.balanced()

    def test_one_that_did_not_consume_makes_it_come_again(self):
        with PushBed(groups={"g": {"broadcast": True}}) as bed:
            broker, a, b = bed.broker(), bed.subscriber("g"), bed.subscriber("g")
            broker.sendall(deliver(1, "g"))
            a.sendall(answer(a.frame(), "consumed"))
            b.sendall(answer(b.frame(), "later"))
            assert result(broker.frame()) == "later"

    def test_one_without_credit_means_none_gets_it(self):
        with PushBed(groups={"g": {"broadcast": True}}) as bed:
            broker, a, b = (
                bed.broker(),
                bed.subscriber("g", prefetch=1),
                bed.subscriber("g", prefetch=5),
            )
            broker.sendall(deliver(1, "g"))
            a.frame()
            b.sendall(answer(b.frame(), "consumed"))
            broker.sendall(deliver(2, "g"))
            back = broker.frame()
            assert (back.id, result(back)) == (2, "later")
            assert b.silent()

    def test_one_that_dies_is_owed_nothing(self):
        with PushBed(groups={"g": {"broadcast": True}}) as bed:
            broker, a, b = bed.broker(), bed.subscriber("g"), bed.subscriber("g")
            broker.sendall(deliver(1, "g"))
            a.frame()
            b.sendall(answer(b.frame(), "consumed"))
            reset(a)
            assert result(broker.frame()) == "consumed"
            assert bed.balanced()

    def test_nobody_there(self):
        with PushBed(groups={"g": {"broadcast": True}}) as bed:
            broker = bed.broker()
            broker.sendall(deliver(1, "g"))
            assert result(broker.frame()) == "no_consumer"


class TestForwarding:
    NODES: ClassVar = {"me": 20, "a": 100, "b": 100}

    def test_shares_and_what_the_peer_sees(self):
        with PushBed(peers=2, nodes=self.NODES) as bed:
            broker, client = bed.broker(), bed.subscriber("g", prefetch=100)
            peers = [bed.peer(0, "g"), bed.peer(1, "g")]
            broker.sendall(b"".join(deliver(i + 1, "g", b"body%d" % i) for i in range(100)))
            local = client.frames(20)
            assert client.silent(0.05)
            for frame in local:
                client.sendall(answer(frame, "consumed"))
            for peer in peers:
                for frame in peer.frames(40):
                    headers = headers_of(frame)
                    assert headers["fm.op"] == "forward"
                    assert (headers["fm.hop"], headers["fm.origin"]) == ("1", "me")
                    assert frame.content.startswith(b"body")
                    peer.sendall(answer(frame, "consumed"))
            assert sorted(f.id for f in broker.frames(100)) == list(range(1, 101))
            assert bed.row()["forwarded"] == 80
            assert bed.row()["pushes.answered"] == 100
            assert bed.balanced()

    def test_a_peer_that_is_down_or_has_no_consumer_is_left_out(self):
        with PushBed(peers=2, nodes=self.NODES) as bed:
            broker, client = bed.broker(), bed.subscriber("g", prefetch=100)
            bed.peer(0)  # up, and serves nobody
            gone = bed.peer(1, "g")
            gone.close()
            bed.wait_event("gone")
            broker.sendall(b"".join(deliver(i + 1, "g") for i in range(10)))
            client.frames(10)
            assert bed.row()["stayed"] == 8

    def test_refused_before_execution_it_is_offered_here_once(self):
        with PushBed(peers=1, nodes={"me": 0, "a": 100}) as bed:
            broker, client, peer = bed.broker(), bed.subscriber("g"), bed.peer(0, "g")
            for dialect, crc in ((0, False), (2, True)):
                sent = request(
                    4, {"fm.op": "deliver", "fm.group": "g"}, b"x" * 999, dialect=dialect, crc=crc
                )
                broker.sendall(sent)
                asked = peer.frame()
                peer.sendall(answer(asked, "no_consumer"))
                here = client.frame()
                assert headers_of(here)["fm.op"] == "deliver"
                assert here.content == b"x" * 999
                client.sendall(answer(here, "later", retry_ms="5"))
                back = broker.frame()
                assert (back.id, result(back)) == (4, "later")
            assert bed.row()["offered"] == 2
            assert bed.balanced()

    def test_unanswered_it_is_never_offered_twice(self):
        with PushBed(peers=1, nodes={"me": 0, "a": 100}) as bed:
            broker, client, peer = bed.broker(), bed.subscriber("g"), bed.peer(0, "g")
            broker.sendall(deliver(1, "g"))
            peer.frame()
            reset(peer)
            assert result(broker.frame()) == "later"
            assert client.silent()
            assert bed.balanced()

    def test_a_forward_whose_deadline_passes_is_later(self):
        with PushBed(peers=1, nodes={"me": 0, "a": 100}, request_timeout_ms=50) as bed:
            broker, client, peer = bed.broker(), bed.subscriber("g"), bed.peer(0, "g")
            broker.sendall(deliver(1, "g"))
            peer.frame()
            assert result(broker.frame()) == "later"
            assert client.silent()

    def test_keys_of_an_ordered_group_follow_their_unanswered_message(self):
        with PushBed(peers=1, nodes={"me": 0, "a": 100}, groups={"g": {"ordered": True}}) as bed:
            broker, client, peer = bed.broker(), bed.subscriber("g"), bed.peer(0, "g")
            broker.sendall(deliver(1, "g", key="k"))
            asked = peer.frame()
            bed.schedule = bed.scheduled({"me": 100, "a": 100})
            bed.publish()
            broker.sendall(deliver(2, "g", key="k"))
            second = peer.frame()
            for frame in (asked, second):
                peer.sendall(answer(frame, "consumed"))
            broker.frames(2)
            broker.sendall(deliver(3, "g", key="k"))
            assert client.frame()
            assert peer.silent()

    def test_a_forward_is_delivered_here_whatever_the_schedule_says(self):
        with PushBed(peers=1, nodes={"me": 0, "a": 100}) as bed:
            client, peer = bed.subscriber("g"), bed.peer(0, "g")
            other = bed.client(FORWARD)
            for dialect, crc in ((0, False), (2, True)):
                headers = {"fm.op": "forward", "fm.group": "g", "fm.hop": "1", "fm.origin": "z"}
                other.sendall(request(11, headers, b"body", dialect=dialect, crc=crc))
                asked = client.frame()
                assert headers_of(asked) == {**headers, "fm.op": "deliver"}
                client.sendall(answer(asked, "consumed"))
                back = other.frame()
                assert (back.id, result(back)) == (11, "consumed")
            assert peer.silent()
            assert bed.balanced()

    @pytest.mark.parametrize(
        "more",
        [
            {"fm.hop": "2", "fm.origin": "z"},
            {"fm.hop": "1", "fm.origin": "me"},
            {"fm.hop": "1"},
            {},
        ],
    )
    def test_loops_are_refused(self, more):
        with PushBed() as bed:
            client = bed.subscriber("g")
            other = bed.client(FORWARD)
            other.sendall(request(11, {"fm.op": "forward", "fm.group": "g", **more}))
            assert result(other.frame()) == "reject"
            assert client.silent()
            assert bed.row()["loops"] == 1

    def test_no_local_client_is_no_consumer(self):
        with PushBed() as bed:
            other = bed.client(FORWARD)
            other.sendall(
                request(1, {"fm.op": "forward", "fm.group": "g", "fm.hop": "1", "fm.origin": "z"})
            )
            assert result(other.frame()) == "no_consumer"


class TestHomeThread:
    def test_with_two_threads_all_push_traffic_lives_on_one(self):
        with PushBed(threads=2, peers=1) as bed:
            broker = bed.broker()
            clients = [bed.subscriber("g") for _ in range(4)]
            broker.sendall(b"".join(deliver(i, "g") for i in range(8)))
            for client in clients:
                for frame in client.frames(2):
                    client.sendall(answer(frame, "consumed"))
            broker.frames(8)
            ticket = bed.engine.ask_connections()
            eventually(lambda: bed.engine.connections_ready(ticket))
            assert {c["thread"] for c in bed.engine.connections()} == {0}
            assert bed.row(PUSH_ROW)["connections"] == 4

    def test_memory_comes_back(self):
        with PushBed(
            peers=1, nodes={"me": 50, "a": 100}, groups={"g": {"ordered": True}, "h": {}}
        ) as bed:
            broker, peer = bed.broker(), bed.peer(0, "g", "h")
            peer.close()
            bed.wait_event("gone")
            before = None
            for _ in range(3):
                clients = [bed.subscriber("g", "h") for _ in range(20)]
                broker.sendall(b"".join(deliver(i, "gh"[i % 2], key=f"k{i}") for i in range(200)))
                for client, asked in gather(clients, 200):
                    client.sendall(answer(asked, "consumed"))
                broker.frames(200)
                for client in clients:
                    client.close()
                eventually(lambda: "connections" not in bed.row(PUSH_ROW), "gone")
                used = bed.process()["memory"]
                assert before is None or used <= before
                before = used
