"""The message mesh's engine where two things happen at once."""

from __future__ import annotations

import socket

from fastmesh._ext.push import parse, request
from tests._ext.bed import eventually
from tests._ext.push_bed import GROUP_ID, PUNT, PUSH, PushBed, answer, deliver, publish, result
from tests._ext.test_groups import reset


def test_a_frame_longer_than_the_read_area_waits_for_room_in_the_ring():
    with PushBed(ring_bytes=1 << 23) as bed:
        clients = [bed._connect(PUNT) for _ in range(6)]
        content = bytes(range(256)) * 7000
        for number, client in enumerate(clients):
            client.sendall(request(number, {"fm.op": "x"}, content) + request(99, {"fm.op": "y"}))
        eventually(lambda: bed.process().get("punt_full"), "the ring is full")
        heard = [parse(event.data) for event in bed.wait_event("frame", 12)]
        assert sorted(frame.id for frame in heard) == [0, 1, 2, 3, 4, 5] + [99] * 6
        assert {frame.content for frame in heard} == {content, b""}


def test_a_prefetch_of_nothing_ends_the_subscription():
    with PushBed() as bed:
        broker, client = bed.broker(), bed.subscriber("g", prefetch=3)
        bed.subscribe(client, "g", prefetch=0)
        broker.sendall(deliver(1, "g"))
        assert result(broker.frame()) == "no_consumer"
        eventually(lambda: [(e.b, e.c) for e in bed.seen("group")][-1] == (0, 0), "told")


def test_a_snapshot_refused_for_memory_leaves_the_groups_as_they_were():
    with PushBed(groups={"g": {}, "h": {}}) as bed:
        broker, client = bed.broker(), bed.subscriber("g", "h")
        both = bed.groups
        bed.groups = {"g": {}}
        bed.brokers.append(bed._server())
        bed.engine._fail_alloc(1)
        bed.engine.publish(bed.snapshot())
        eventually(lambda: [e for e in bed.seen("snapshot") if e.b == 1], "refused")
        broker.sendall(deliver(1, "h"))
        client.sendall(answer(client.frame(), "consumed"))
        assert result(broker.frame()) == "consumed"
        bed.groups = both
        bed.publish()
        broker.sendall(deliver(2, "h"))
        assert client.frame().id


def test_a_draining_connection_is_still_told_what_python_decides():
    with PushBed() as bed:
        client = bed._connect(PUSH)
        client.sendall(request(1, {"fm.op": "hello"}))
        asked = bed.punted(client)
        bed.engine.drain()
        assert client.silent(0.4)
        bed.engine.reply(asked.a, bed.answered(asked, "consumed"))
        assert result(client.frame()) == "consumed"
        assert client.ended()


def test_who_can_answer_nothing_any_more_is_in_no_group():
    with PushBed() as bed:
        broker, client = bed.broker(), bed.subscriber("g")
        client.sendall(publish(1, "t"))
        asked = broker.frame()
        client.sock.shutdown(socket.SHUT_WR)
        eventually(lambda: [(e.b, e.c) for e in bed.seen("group")][-1] == (0, 0), "left")
        bed.subscribe(client, "g")
        broker.sendall(deliver(1, "g"))
        assert result(broker.frame()) == "no_consumer"
        broker.sendall(answer(asked, "consumed"))
        assert result(client.frame()) == "consumed"
        assert {e.a for e in bed.seen("group")} == {GROUP_ID}


def test_a_broadcast_that_nobody_lived_to_consume_comes_again():
    with PushBed(groups={"g": {"broadcast": True}}) as bed:
        broker, a, b = bed.broker(), bed.subscriber("g"), bed.subscriber("g")
        broker.sendall(deliver(1, "g"))
        for client in (a, b):
            client.frame()
            reset(client)
        assert result(broker.frame()) == "later"
        assert bed.balanced()


def test_a_broker_is_not_taken_for_dead_while_python_does_not_read():
    with PushBed(ring_bytes=1 << 16, heartbeat_ms=80) as bed:
        broker = bed.broker()
        broker.sendall(b"".join(request(i, {"fm.op": "x"}, bytes(500)) for i in range(200)))
        eventually(lambda: bed.process().get("punt_full", 0) > 40, "held for a while")
        heard = bed.wait_event("frame", 200)
        assert [parse(event.data).id for event in heard] == list(range(200))
        assert not bed.seen("gone")
