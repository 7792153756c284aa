"""One engine hands its state to another: what must be the same afterwards, one thing at a time."""

from __future__ import annotations

import gc
import os
import random
import select
import socket
import threading
import time
from typing import Any

import pytest

from fastmesh._ext.engine import STATE_VERSION, STATE_VERSION_MIN, Engine, inspect
from fastmesh._ext.push import parse, request
from fastmesh._ext.route import register_codec
from fastmesh._ext.schedule import Schedule
from tests._ext import moving
from tests._ext.bed import (
    CLUSTER,
    CLUSTER_ROW,
    ENDPOINT_ROW,
    LISTENER,
    LISTENER_ROW,
    Bed,
    Peer,
    eventually,
)
from tests._ext.moving import freeze, load, move, save, successor, thaw
from tests._ext.push_bed import (
    BROKER_ID,
    GROUP_ID,
    GROUP_ROW,
    PEER_ID,
    PUSH,
    PushBed,
    answer,
    deliver,
    gather,
    publish,
    result,
)
from tests._ext.test_engine import BUSY, CLOSED, NO_PROCESSOR, TIMEOUT, echo, reset
from tests.reference import bolt


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class TestBytes:
    """Half frames, in both directions, on both sides."""

    @pytest.mark.parametrize("crc", [False, True])
    def test_a_request_cut_at_every_byte(self, crc):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            frame = bolt.request(7, "s", b"body", crc=crc)
            for cut in range(1, len(frame)):
                client.sendall(frame[:cut])
                eventually(lambda n=cut: [c for c in bed.connections() if c["partial_bytes"] == n])
                move(bed)
                client.sendall(frame[cut:])
                asked = uplink.frame()
                assert bolt.patch_id(asked.data, 7) == frame
                uplink.sendall(bolt.response_to(asked, b"%d" % cut))
                assert client.frame().content == b"%d" % cut
            assert bed.row()["requests.accepted"] == len(frame) - 1
            assert bed.balanced()

    def test_an_answer_cut_at_every_byte(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(7, "s", b"q"))
            asked = uplink.frame()
            frame = bolt.response_to(asked, b"answer")
            for cut in range(1, len(frame)):
                frame = bolt.response_to(asked, b"answer")
                uplink.sendall(frame[:cut])
                eventually(lambda n=cut: [c for c in bed.connections() if c["partial_bytes"] == n])
                move(bed)
                uplink.sendall(frame[cut:])
                assert client.frame().data == bolt.patch_id(frame, 7)
                client.sendall(bolt.request(7, "s", b"q"))
                asked = uplink.frame()
            assert bed.balanced()

    def test_bytes_that_wait_in_the_kernel_and_behind_a_half_frame(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            frames = [bolt.request(i, "s", b"%d" % i) for i in range(5)]
            client.sendall(frames[0][:20])
            eventually(lambda: [c for c in bed.connections() if c["partial_bytes"] == 20])
            move(bed, before_save=lambda: client.sendall(frames[0][20:] + b"".join(frames[1:])))
            assert [f.content for f in uplink.frames(5)] == [b"%d" % i for i in range(5)]

    def test_frames_longer_than_the_read_area(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            body = random.Random(1).randbytes(3 << 20)
            frame = bolt.request(1, "s", body, crc=True)
            for cut in (5000, 1 << 20, 2 << 20):
                client.sendall(frame[:cut])
                eventually(
                    lambda n=cut: [c for c in bed.connections() if c["partial_bytes"] == n],
                    "all of it was read",
                )
                move(bed)
                client.sendall(frame[cut:])
                asked = uplink.frame()
                assert asked.content == body
                uplink.sendall(bolt.response_to(asked, b"ok"))
                assert client.frame().content == b"ok"

    def slowly(self, bed: Bed, peer: Peer, count: int) -> list[bolt.Frame]:
        """So many frames, with a hand-over before every few thousand bytes."""
        reader, found, moves = bolt.FrameReader(1 << 30), [], 0
        while len(found) < count:
            if moves < 60:
                moves += 1
                move(bed)
            found += reader.feed(peer.sock.recv(8192))
        return found

    def test_half_written_frames_on_both_sides(self):
        """Neither side reads: what was begun goes on at the next byte, again and again."""
        with Bed(queue_bytes_max=32 << 20, request_timeout_ms=60000) as bed:
            client, uplink = bed.client(), bed.upstream()
            for peer in (client, uplink):
                peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            dice = random.Random(2)
            bodies = [dice.randbytes(size) for size in (700_000, 10, 300_000, 1500)]
            sender = threading.Thread(
                target=client.sendall,
                args=(b"".join(bolt.request(i, "s", b) for i, b in enumerate(bodies)),),
            )
            sender.start()
            asked = self.slowly(bed, uplink, len(bodies))
            sender.join()
            assert [f.content for f in asked] == bodies
            answers = b"".join(
                bolt.response_to(f, body[::-1]) for f, body in zip(asked, bodies, strict=True)
            )
            sender = threading.Thread(target=uplink.sendall, args=(answers,))
            sender.start()
            got = self.slowly(bed, client, len(bodies))
            sender.join()
            assert [f.content for f in got] == [body[::-1] for body in bodies]
            assert bed.balanced()

    def test_what_came_before_the_end_is_served_and_then_the_end_is_seen(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()

            def last_words() -> None:
                client.sendall(bolt.request(1, "s", b"last"))
                client.sock.shutdown(socket.SHUT_WR)

            move(bed, before_save=last_words)
            uplink.sendall(bolt.response_to(uplink.frame(), b"words"))
            assert client.frame().content == b"words"
            assert client.ended()


class TestIds:
    def test_in_flight_both_ways_with_equal_numbers(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s", b"q"))
            asked = uplink.frame()
            uplink.sendall(bolt.request(asked.id, "callback", b"p"))
            pushed = client.frame()
            [saved] = move(bed)
            assert (saved.requests, saved.pushes) == (1, 1)
            client.sendall(bolt.response_to(pushed, b"P"))
            got = uplink.frame()
            assert (got.kind, got.id, got.content) == (bolt.RESPONSE, asked.id, b"P")
            uplink.sendall(bolt.response_to(asked, b"Q"))
            assert client.frame().content == b"Q"
            assert bed.row(CLUSTER_ROW)["pushes.answered"] == 1
            assert bed.balanced()

    def test_generations_go_on_and_wrap(self):
        with Bed(first_generation=0x7FFD) as bed:
            client, uplink, ids = bed.client(), bed.upstream(), []
            for i in range(8):
                client.sendall(bolt.request(9, "s", b"%d" % i))
                asked = uplink.frame()
                ids.append(asked.id)
                move(bed)
                uplink.sendall(bolt.response_to(asked, asked.content))
                assert client.frame().content == b"%d" % i
            assert [i >> 16 for i in ids] == [0x7FFD, 0x7FFE, 0x7FFF, 1, 2, 3, 4, 5]
            assert len({i & 0xFFFF for i in ids}) == 1

    def test_late_and_doubled_answers_are_still_known_for_what_they_are(self):
        with Bed(request_timeout_ms=200) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s", timeout_ms=-1) + bolt.request(2, "s"))
            first, second = uplink.frames(2)
            uplink.sendall(bolt.response_to(second, b"once"))
            assert client.frame().content == b"once"
            assert client.frame().status == TIMEOUT
            move(bed)
            uplink.sendall(bolt.response_to(first, b"late") + bolt.response_to(second, b"twice"))
            eventually(lambda: bed.process().get("dropped.late") == 1)
            eventually(lambda: bed.process().get("dropped.duplicate") == 1)
            uplink.sendall(bolt.response_to(first, b"late again"))
            eventually(lambda: bed.process().get("dropped.late") == 2)
            assert client.silent()

    def test_an_asker_that_left_is_remembered(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            asked = uplink.frame()
            reset(client)
            eventually(lambda: bed.row().get("requests.failed.client_gone") == 1)
            [saved] = move(bed)
            assert saved.requests == 0
            uplink.sendall(bolt.response_to(asked))
            eventually(lambda: bed.process().get("dropped.client_gone") == 1)
            assert bed.balanced()

    def test_slots_are_used_in_the_order_in_which_they_came_free(self):
        """The same requests get the same ids with a hand-over as without."""

        def play(moved: bool) -> list[int]:
            ids: list[int] = []
            dice = random.Random(5)
            with Bed() as bed:
                client, uplink = bed.client(), bed.upstream()
                open_: list[bolt.Frame] = []
                for i in range(100):
                    if open_ and dice.random() < 0.5:
                        asked = open_.pop(dice.randrange(len(open_)))
                        uplink.sendall(bolt.response_to(asked))
                        client.frame()
                    else:
                        client.sendall(bolt.request(i, "s"))
                        open_.append(uplink.frame())
                        ids.append(open_[-1].id)
                    if moved and i % 5 == 0:
                        move(bed)
            return ids

        assert play(True) == play(False)

    def test_more_in_flight_than_the_new_limit_allows(self):
        with Bed(in_flight_max=65536) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(b"".join(bolt.request(i, "s") for i in range(200)))
            asked = uplink.frames(200)
            move(bed, snapshot=bed.snapshot(in_flight_max=16))
            client.sendall(bolt.request(500, "s"))
            assert (got := client.frame()).status == BUSY
            assert got.id == 500
            for frame in asked:
                uplink.sendall(bolt.response_to(frame))
            assert {f.id for f in client.frames(200)} == set(range(200))
            client.sendall(bolt.request(501, "s"))
            uplink.sendall(bolt.response_to(uplink.frame()))
            assert client.frame().id == 501
            assert bed.balanced()

    def test_deadlines_go_on(self):
        with Bed(request_timeout_ms=400) as bed:
            client, uplink = bed.client(), bed.upstream()
            began = time.monotonic()
            client.sendall(bolt.request(1, "s", timeout_ms=-1))
            uplink.frame()
            move(bed)
            assert client.frame().status == TIMEOUT
            assert 0.399 < time.monotonic() - began < 0.7
            assert bed.balanced()


class TestConnections:
    def test_python_keeps_its_handles_and_hears_of_no_connection_twice(self):
        with PushBed() as bed:
            broker, client = bed.broker(), bed.subscriber("g")
            bed.wait_event("group")
            bed.events.clear()
            move(bed)
            assert not bed.seen("opened")
            assert [(e.a, e.b) for e in bed.seen("endpoint_up")] == [(BROKER_ID, 1)]
            assert [(e.a, e.b, e.c) for e in bed.wait_event("group")] == [(GROUP_ID, 1, 32)]
            broker.sendall(deliver(1, "g", b"x"))
            client.sendall(answer(client.frame(), "consumed"))
            assert result(broker.frame()) == "consumed"
            bed.engine.send(client.handle, request(9, {"fm.op": "x"}))
            assert client.frame().id == 9
            reset(client)
            [gone] = bed.wait_event("gone")
            assert (gone.a, gone.b, gone.c) == (client.handle, PUSH, 0)

    def test_a_connect_under_way_is_begun_anew_and_what_waits_for_it_is_sent(self):
        with Bed(binding="per_client", connect_timeout_ms=20000) as bed:
            server = bed.servers[0]
            server.listen(0)
            filler = socket.create_connection(server.getsockname())
            client = bed.client()
            client.sendall(bolt.request(1, "s", b"first") + bolt.request(2, "s", b"second"))
            eventually(lambda: [c for c in bed.connections() if c["state"] == "connecting"])
            eventually(lambda: bed.row().get("requests.accepted") == 2)

            def make_room() -> None:
                server.listen(64)
                server.accept()[0].close()

            [saved] = move(bed, before_save=make_room)
            assert (saved.upstream, len(saved.descriptors)) == (1, 1)
            uplink = bed.upstream()
            asked = uplink.frames(2)
            assert [f.content for f in asked] == [b"first", b"second"]
            for frame in asked:
                uplink.sendall(bolt.response_to(frame))
            assert [f.id for f in client.frames(2)] == [1, 2]
            assert bed.balanced()
            filler.close()

    def test_a_connect_under_way_goes_on_after_a_thaw(self):
        with Bed(binding="per_client", connect_timeout_ms=20000) as bed:
            server = bed.servers[0]
            server.listen(0)
            filler = socket.create_connection(server.getsockname())
            client = bed.client()
            client.sendall(bolt.request(1, "s", b"first"))
            eventually(lambda: [c for c in bed.connections() if c["state"] == "connecting"])
            freeze(bed)
            server.listen(64)
            server.accept()[0].close()
            thaw(bed)
            assert bed.upstream().frame().content == b"first"
            assert bed.row(ENDPOINT_ROW).get("connect_failed") is None
            filler.close()

    def test_what_waits_for_a_connect_that_fails_in_the_new_process_is_told(self):
        with Bed(binding="per_client", connect_timeout_ms=20000) as bed:
            server = bed.servers[0]
            server.listen(0)
            filler = socket.create_connection(server.getsockname())
            client = bed.client()
            client.sendall(bolt.request(1, "s", b"first"))
            eventually(lambda: [c for c in bed.connections() if c["state"] == "connecting"])
            bed.snapshot()  # (its address is known from here on)
            move(bed, before_save=server.close)
            assert client.frame().status == NO_PROCESSOR
            assert bed.balanced()
            filler.close()

    def test_missing_upstreams_are_opened(self):
        with Bed(endpoints=2) as bed:
            bed.publish([0])
            bed.upstream(0)
            move(bed, snapshot=bed.snapshot([0, 1]))
            bed.upstream(1)
            eventually(lambda: bed.row(ENDPOINT_ROW + 1).get("up") == 1)
            assert bed.row(ENDPOINT_ROW)["opened"] == 1

    def test_fewer_connections_wanted_the_surplus_drains(self):
        with Bed(connections=3) as bed:
            uplinks = [bed.upstream() for _ in range(3)]
            eventually(lambda: bed.row(ENDPOINT_ROW).get("up") == 3)
            bed.cluster["connections"] = 1
            move(bed)
            eventually(lambda: bed.row(ENDPOINT_ROW).get("connections") == 1)
            assert bed.row(ENDPOINT_ROW)["up"] == 1
            for uplink in uplinks:
                uplink.sock.setblocking(False)
            ended = [uplink for uplink in uplinks if select.select([uplink.sock], [], [], 0)[0]]
            assert len(ended) == 2

    def test_a_removed_endpoint_finishes_and_gets_nothing_new(self):
        with Bed(endpoints=2) as bed:
            uplinks = [bed.upstream(0), bed.upstream(1)]
            eventually(lambda: bed.row(ENDPOINT_ROW).get("up") == 1)
            eventually(lambda: bed.row(ENDPOINT_ROW + 1).get("up") == 1)
            client = bed.client()
            asked: list[tuple[Peer, bolt.Frame]] = []
            number = 0
            while len({peer for peer, _ in asked}) < 2:
                client.sendall(bolt.request(number, "s"))
                asked += gather(uplinks, 1)
                number += 1
            move(bed, snapshot=bed.snapshot([1]))
            for i in range(20):
                client.sendall(bolt.request(1000 + i, "s"))
                frame = uplinks[1].frame()
                uplinks[1].sendall(bolt.response_to(frame))
                assert client.frame().id == 1000 + i
            for peer, frame in asked:
                peer.sendall(bolt.response_to(frame))
            assert {f.id for f in client.frames(number)} == set(range(number))
            assert uplinks[0].ended()
            assert bed.balanced()

    def test_a_removed_cluster_likewise(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            asked = uplink.frame()
            bed.version += 1
            made = type(bed.snapshot())(bed.version + 1, bed.limits)
            bed.version += 1
            made.add_listener(LISTENER, codec="bolt", row=LISTENER_ROW)
            made.seal()
            move(bed, snapshot=made)
            client.sendall(bolt.request(2, "s"))
            assert client.frame().status == NO_PROCESSOR
            uplink.sendall(bolt.response_to(asked, b"paid"))
            assert client.frame().content == b"paid"
            assert uplink.ended()
            assert bed.balanced()

    def test_a_removed_listener_lets_its_clients_finish(self):
        with Bed() as bed:
            client, idle, uplink = bed.client(), bed.client(), bed.upstream()
            for peer in (client, idle):
                peer.sendall(bolt.heartbeat(5))
                peer.frame()
            client.sendall(bolt.request(1, "s"))
            asked = uplink.frame()
            made = type(bed.snapshot())(bed.version + 1, bed.limits)
            bed.version += 1
            made.add_cluster(CLUSTER, row=CLUSTER_ROW, **bed.cluster)
            made.add_endpoint(
                CLUSTER, 1, address=bed.servers[0].getsockname(), weight=100, row=ENDPOINT_ROW
            )
            made.seal()
            move(bed, snapshot=made)
            assert idle.ended()
            uplink.sendall(bolt.response_to(asked, b"paid"))
            assert client.frame().content == b"paid"
            assert client.ended()
            assert bed.row(LISTENER_ROW)["closed.drained"] == 2
            assert uplink.silent()
            assert bed.balanced()

    def test_an_endpoint_at_another_address_gets_new_connections_there(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            asked = uplink.frame()
            other = bed._server()
            bed.names[0] = other.getsockname()
            move(bed)
            elsewhere = Peer(other.accept()[0])
            eventually(lambda: bed.row(ENDPOINT_ROW).get("up") == 1)
            client.sendall(bolt.request(2, "s", b"new"))
            assert elsewhere.frame().content == b"new"
            uplink.sendall(bolt.response_to(asked))
            assert client.frame().id == 1
            assert uplink.ended()
            elsewhere.close()
            other.close()

    def test_another_binding_drains(self):
        with Bed(binding="per_client") as bed:
            client = bed.client()
            client.sendall(bolt.request(1, "s", b"own"))
            own = bed.upstream()
            asked = own.frame()
            bed.cluster["binding"] = "shared"
            move(bed)
            shared = bed.upstream()
            eventually(lambda: bed.row(ENDPOINT_ROW).get("up") == 1)
            client.sendall(bolt.request(2, "s", b"shared"))
            assert shared.frame().content == b"shared"
            own.sendall(bolt.response_to(asked, b"done"))
            assert client.frame().content == b"done"
            assert own.ended()

    def test_half_closed_and_answered_while_frozen(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            asked = uplink.frame()
            client.sock.shutdown(socket.SHUT_WR)
            eventually(lambda: [c for c in bed.connections() if "half_closed" in c["held"]])
            move(bed, before_save=lambda: uplink.sendall(bolt.response_to(asked, b"a")))
            assert client.frame().content == b"a"
            assert client.ended()
            assert bed.balanced()

    def test_idle_clients_are_not_closed_early_and_not_kept_for_ever(self):
        with Bed(idle_timeout_ms=400) as bed:
            client = bed.client()
            client.sendall(bolt.heartbeat(1))
            client.frame()
            began = time.monotonic()
            for _ in range(5):
                move(bed)
            assert client.ended()
            assert 0.38 < time.monotonic() - began < 1.0
            assert bed.row(LISTENER_ROW)["closed.idle"] == 1

    def test_a_heartbeat_that_is_open(self):
        with Bed(heartbeat_ms=150) as bed:
            uplink = bed.upstream()
            beat = uplink.frame()
            assert beat.kind == bolt.HEARTBEAT
            move(bed)
            uplink.sendall(bolt.heartbeat_ack(beat.id))
            again = uplink.frame()
            assert again.kind == bolt.HEARTBEAT
            move(bed)
            assert uplink.ended()  # the second one is not answered
            assert bed.row(ENDPOINT_ROW)["closed.heartbeat"] == 1

    def test_health_is_remembered(self):
        with Bed(
            endpoints=2, eject_failures=1, eject_ms=60000, eject_ms_max=60000, request_timeout_ms=60
        ) as bed:
            uplinks = [bed.upstream(0), bed.upstream(1)]
            for row in (ENDPOINT_ROW, ENDPOINT_ROW + 1):
                eventually(lambda r=row: bed.row(r).get("up") == 1)
            client = bed.client()
            client.sendall(bolt.request(1, "s", timeout_ms=-1))
            [(bad, _)] = gather(uplinks, 1)
            assert client.frame().status == TIMEOUT
            [ejected] = bed.wait_event("ejected")
            move(bed)
            number = ejected.a - 1
            assert bed.row(ENDPOINT_ROW + number)["ejected"] == 1
            good = uplinks[1 - number]
            assert bad is uplinks[number]
            for i in range(20):
                client.sendall(bolt.request(10 + i, "s"))
                good.sendall(bolt.response_to(good.frame()))
                client.frame()

    @pytest.mark.parametrize("family", [socket.AF_INET6, socket.AF_UNIX])
    def test_every_kind_of_address(self, family):
        with Bed(family=family) as bed:
            client = bed.client()
            client.sendall(bolt.request(7, "s", b"q"))
            uplink = bed.upstream()
            asked = uplink.frame()
            move(bed)
            uplink.sendall(bolt.response_to(asked, b"a"))
            assert client.frame().content == b"a"


class TestThreads:
    @pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (2, 2), (3, 2), (1, 4)])
    def test_another_number_of_threads(self, old, new):
        with Bed(threads=old, endpoints=2) as bed:
            clients = [bed.client() for _ in range(8)]
            uplinks = [bed.upstream(i) for i in range(2) for _ in range(old)]
            for row in (ENDPOINT_ROW, ENDPOINT_ROW + 1):
                eventually(lambda r=row: bed.row(r).get("up") == old)
            for i, client in enumerate(clients):
                client.sendall(bolt.request(i, "s", b"%d" % i))
            asked = gather(uplinks, 8)
            for uplink in uplinks[:2]:
                uplink.sendall(bolt.request(3, "callback", b"?"))
            move(bed, threads=new)
            assert bed.row()["requests.in_flight"] == 8
            for peer, frame in asked:
                peer.sendall(bolt.response_to(frame, frame.content))
            pushes = 0
            for i, client in enumerate(clients):
                while (got := client.frame()).kind != bolt.RESPONSE:
                    client.sendall(bolt.response_to(got, b"!"))
                    pushes += 1
                assert (got.id, got.content) == (i, b"%d" % i)
            # per thread and endpoint one connection takes new requests, the others drain
            for row in (ENDPOINT_ROW, ENDPOINT_ROW + 1):
                eventually(lambda r=row: bed.row(r).get("up") == new)
            assert bed.balanced()
            assert bed.row(LISTENER_ROW)["connections"] == 8

    def test_handles_of_merged_worlds_are_told_apart(self):
        """Both worlds number their connections from 1: after the merge no answer goes astray."""
        with Bed(threads=2, binding="per_client") as bed:
            clients = [bed.client() for _ in range(10)]
            for i, client in enumerate(clients):
                client.sendall(bolt.request(1, "s", b"%d" % i))
            uplinks = [bed.upstream() for _ in range(10)]
            asked = [uplink.frame() for uplink in uplinks]
            move(bed, threads=1)
            for uplink, frame in zip(uplinks, asked, strict=True):
                uplink.sendall(bolt.response_to(frame, frame.content))
            assert [client.frame().content for client in clients] == [b"%d" % i for i in range(10)]
            for i, client in enumerate(clients):
                client.sendall(bolt.request(2, "s", b"%d again" % i))
            for uplink, frame in zip(uplinks, asked, strict=True):
                again = uplink.frame()
                assert again.content == frame.content + b" again"
                uplink.sendall(bolt.request(5, "to my client", frame.content))
            for i, client in enumerate(clients):
                pushed = client.frame()
                assert pushed.content == b"%d" % i
                client.sendall(bolt.response_to(pushed, b"taken"))
            assert [uplink.frame().content for uplink in uplinks] == [b"taken"] * 10
            for client in clients:
                reset(client)
            assert all(uplink.ended() for uplink in uplinks)


class TestMesh:
    def test_credit_is_used_up_on_both_sides_of_a_hand_over(self):
        with PushBed() as bed:
            broker, client = bed.broker(), bed.subscriber("g", prefetch=2)
            broker.sendall(deliver(1, "g") + deliver(2, "g"))
            asked = [client.frame(), client.frame()]
            [saved] = move(bed)
            assert saved.pushes == 2
            broker.sendall(deliver(3, "g"))
            assert result(broker.frame()) == "later"
            client.sendall(answer(asked[0], "consumed"))
            assert result(broker.frame()) == "consumed"
            broker.sendall(deliver(4, "g"))
            assert client.frame()
            assert bed.balanced()

    def test_a_key_stays_where_its_unanswered_message_is(self):
        with PushBed(groups={"g": {"ordered": True}}) as bed:
            broker = bed.broker()
            first = bed.subscriber("g", prefetch=4)
            broker.sendall(deliver(1, "g", key="k"))
            asked = first.frame()
            others = [bed.subscriber("g", prefetch=4) for _ in range(8)]
            for _ in range(3):
                move(bed)
                broker.sendall(deliver(2, "g", key="k"))
                [(who, again)] = gather([first, *others], 1)
                assert who is first
                who.sendall(answer(again, "consumed"))
                broker.frame()
            first.sendall(answer(asked, "consumed"))
            broker.frame()
            assert bed.balanced()

    def test_keys_go_to_the_same_consumer_before_and_after(self):
        with PushBed(groups={"g": {"ordered": True}}) as bed:
            broker = bed.broker()
            clients = [bed.subscriber("g") for _ in range(5)]

            def owners() -> list[int]:
                found = []
                for i in range(40):
                    broker.sendall(deliver(i, "g", key=f"k{i}"))
                    [(who, asked)] = gather(clients, 1)
                    found.append(clients.index(who))
                    who.sendall(answer(asked, "consumed"))
                    broker.frame()
                return found

            before = owners()
            move(bed)
            assert owners() == before
            assert len(set(before)) > 2

    def test_a_broadcast_under_way_gets_one_answer(self):
        with PushBed(groups={"g": {"broadcast": True}}) as bed:
            broker = bed.broker()
            clients = [bed.subscriber("g") for _ in range(3)]
            broker.sendall(deliver(1, "g", b"all"))
            asked = [client.frame() for client in clients]
            clients[0].sendall(answer(asked[0], "consumed"))
            bed.process()
            move(bed)
            clients[1].sendall(answer(asked[1], "consumed"))
            bed.process()
            move(bed)
            assert broker.silent()
            clients[2].sendall(answer(asked[2], "consumed"))
            got = broker.frame()
            assert (got.id, result(got)) == (1, "consumed")
            assert bed.row()["pushes.answered"] == 3
            assert bed.balanced()

    def test_a_group_that_is_no_more_with_deliveries_under_way(self):
        with PushBed(groups={"g": {"ordered": True}, "h": {}}) as bed:
            broker, client = bed.broker(), bed.subscriber("g", "h")
            broker.sendall(deliver(1, "g", key="k") + deliver(2, "h"))
            asked = [client.frame(), client.frame()]
            del bed.groups["g"]
            bed.groups = {"h": {}}
            bed.group_items = lambda: [(1, "h", {})]  # type: ignore[method-assign]
            move(bed)
            broker.sendall(deliver(3, "g"))
            assert result(broker.frame()) == "no_consumer"
            for frame in asked:
                client.sendall(answer(frame, "consumed"))
            assert [result(broker.frame()) for _ in asked] == ["consumed", "consumed"]
            assert bed.row(GROUP_ROW)["pushes.answered"] == 1

    def test_a_call_of_python_is_answered_to_the_next_one(self):
        with PushBed() as bed:
            client = bed.client()
            call = (client.handle, 77, request(1, {"fm.op": "goaway"}), 5000)
            assert bed.engine.call_many([call]) == 1
            asked = client.frame()
            move(bed)
            client.sendall(answer(asked, "consumed"))
            [told] = bed.wait_event("answer")
            assert (told.a, told.b) == (77, 0)

    def test_commands_while_frozen(self):
        """What Python says between the freeze and the save leaves in the new process."""
        with PushBed() as bed:
            client = bed._connect(PUSH)
            client.sendall(request(1, {"fm.op": "hello"}))
            punted = bed.punted(client)
            client.sendall(publish(2, "t", b"behind"))
            broker = bed.accept_broker()
            opened = eventually(lambda: [e for e in bed.seen("opened") if e.b == BROKER_ID])

            def speak() -> None:
                bed.engine.reply(punted.a, bed.answered(punted, "consumed"), greet=True)
                bed.engine.subscribe(punted.a, [(GROUP_ID, 5)])
                hello = (opened[-1].a, 3, request(1, {"fm.op": "hello"}), 5000)
                assert bed.engine.call_many([hello]) == 1
                bed.engine.send(punted.a, request(50, {"fm.op": "x"}))
                bed.process()
                assert client.silent()
                assert broker.silent()

            move(bed, before_save=speak)
            assert result(client.frame()) == "consumed"
            assert client.frame().id == 50
            hello = broker.frame()
            assert parse(hello.data).headers["fm.op"] == "hello"
            asked = broker.frame()
            assert parse(asked.data).content == b"behind"
            broker.sendall(answer(hello, "consumed") + answer(asked, "consumed"))
            assert client.frame().id == 2
            assert [e.a for e in bed.wait_event("answer")] == [3]
            broker.sendall(deliver(9, "g"))
            assert client.frame()

    def test_publishes_wait_for_the_hello_of_the_next_process(self):
        with PushBed() as bed:
            broker, client = bed.accept_broker(), bed.client()
            client.sendall(publish(1, "t", b"early"))
            eventually(lambda: bed.row(10).get("requests.accepted") == 1)
            move(bed)
            assert broker.silent()
            bed.greet(broker)
            assert parse(broker.frame().data).content == b"early"

    def test_an_idempotent_publish_still_goes_to_the_other_broker_of_its_topic(self):
        with PushBed(brokers=3, topics={"t": [0, 2]}) as bed:
            brokers = [bed.broker(i) for i in range(3)]
            client = bed.client()
            client.sendall(publish(1, "t", b"p", idempotent="1"))
            [(first, _)] = gather(brokers, 1)
            move(bed)
            reset(first)
            other = brokers[2 - brokers.index(first)]
            asked = other.frame()
            other.sendall(answer(asked, "consumed"))
            assert result(client.frame()) == "consumed"
            assert brokers[1].silent()

    def test_with_its_last_other_broker_gone_it_goes_nowhere(self):
        with PushBed(brokers=3, topics={"t": [0, 2]}) as bed:
            brokers = [bed.broker(i) for i in range(3)]
            client = bed.client()
            client.sendall(publish(1, "t", b"p", idempotent="1"))
            [(first, _)] = gather(brokers, 1)
            number = brokers.index(first)
            made = type(bed.snapshot())(bed.version + 1, bed.limits)
            bed.version += 1
            made.set_node(b"me")
            made.add_cluster(4, codec="push", row=14, kind="brokers")
            made.add_endpoint(
                4, BROKER_ID + 1, address=bed._name(bed.brokers[1]), weight=100, row=31
            )
            made.add_listener(PUSH, codec="push", row=11, kind="push")
            made.add_rule(PUSH, cluster_id=4, row=10)
            made.seal()
            move(bed, snapshot=made)
            reset(first)
            got = client.frame()
            assert result(got) == f"status {CLOSED}"
            assert brokers[1].silent()
            assert brokers[2 - number].ended()

    def test_the_share_of_a_schedule_goes_on(self):
        """Of 40 deliveries 16 are the peer's by weight, with a hand-over after each as without."""

        def play(moved: bool) -> list[bool]:
            with PushBed(peers=1, nodes={"me": 60, "a": 100}) as bed:
                broker, client, peer = bed.broker(), bed.subscriber("g"), bed.peer(0, "g")
                found = []
                for i in range(40):
                    if moved:
                        move(bed)
                    broker.sendall(deliver(i, "g"))
                    [(who, asked)] = gather([client, peer], 1)
                    found.append(who is peer)
                    who.sendall(answer(asked, "consumed"))
                    broker.frame()
                return found

        before = play(False)
        assert sum(before) == 16
        assert play(True) == before

    def test_another_plan_starts_where_it_can(self):
        with PushBed(peers=2, nodes={"me": 0, "a": 100, "b": 100}) as bed:
            broker, client = bed.broker(), bed.subscriber("g")
            peers = [bed.peer(0, "g"), bed.peer(1, "g")]
            broker.sendall(deliver(1, "g"))
            [(who, asked)] = gather(peers, 1)
            who.sendall(answer(asked, "consumed"))
            broker.frame()
            bed.schedule = Schedule(
                nodes=[("me", 0), ("a", 100), ("b", 100), ("c", 100)], rules=[], local="me",
                endpoints={"a": PEER_ID, "b": PEER_ID + 1},
            )  # fmt: skip
            move(bed)
            broker.sendall(deliver(2, "g"))
            [(other, asked)] = gather([*peers, client], 1)
            assert other in peers
            assert other is not who
            other.sendall(answer(asked, "consumed"))
            broker.frame()

    def test_a_forward_refused_after_the_move_is_offered_here(self):
        with PushBed(peers=1, nodes={"me": 0, "a": 100}) as bed:
            broker, client, peer = bed.broker(), bed.subscriber("g"), bed.peer(0, "g")
            broker.sendall(deliver(1, "g", b"content"))
            asked = peer.frame()
            move(bed)
            peer.sendall(answer(asked, "no_consumer"))
            offered = client.frame()
            assert parse(offered.data).content == b"content"
            client.sendall(answer(offered, "consumed"))
            assert result(broker.frame()) == "consumed"
            assert bed.row()["offered"] == 1
            assert bed.balanced()


class TestToy:
    """Text ids, answers by order, bodies in parts: state of the codec travels too."""

    @pytest.fixture(autouse=True)
    def _codecs(self):
        from tests.toy import toy

        register_codec("toy", toy.by_id())
        register_codec("toy-order", toy.by_order())

    def test_text_ids(self):
        with Bed(codec="toy") as bed:
            client = bed.client()
            client.sendall(b"ask 999999999999999 s 0 5\nhelloask 7 s 0 0\n")
            uplink = bed.upstream()
            uplink.expect(b"ask 65536 s 0 5\nhello")
            uplink.expect(b"ask 65537 s 0 0\n")
            move(bed)
            uplink.sendall(b"ans 65537 0 2\nb!ans 65536 0 2\na!")
            client.expect(b"ans 7 0 2\nb!ans 999999999999999 0 2\na!")
            assert bed.balanced()

    def test_answers_by_order(self):
        with Bed(codec="toy-order", request_timeout_ms=300) as bed:
            clients = [bed.client() for _ in range(3)]
            uplink = bed.upstream()
            for i, client in enumerate(clients):
                client.sendall(b"ask s 0 1\n%d" % i * 2)
                uplink.expect(b"ask s 0 1\n%d" % i)
            move(bed)
            for i, client in enumerate(clients[:2]):
                uplink.sendall(b"ans 0 1\n%d" % i)
                client.expect(b"ans 0 1\n%d" % i)
                uplink.expect(b"ask s 0 1\n%d" % i)
            clients[2].expect(b"ans 108 0\n")  # its deadline; its place in the order stays
            move(bed)
            clients[0].expect(b"ans 108 0\n")
            uplink.sendall(b"ans 0 4\nlateans 0 4\nlate")
            assert bed.balanced()

    @pytest.mark.parametrize("moves", [1, 3])
    def test_streamed_bodies(self, moves):
        def carry() -> None:
            bed.process()
            for _ in range(moves):
                move(bed)

        with Bed(codec="toy", binding="per_client") as bed:
            client = bed.client()
            client.sendall(b"ask 1 s 0 *\n3\nabc2\n")
            uplink = bed.upstream()
            uplink.expect(b"ask 65536 s 0 *\n3\nabc")
            carry()
            client.sendall(b"de")
            uplink.expect(b"2\nde")
            carry()
            client.sendall(b"0\n")
            uplink.expect(b"0\n")
            uplink.sendall(b"ans 65536 0 *\n1\nx")
            client.expect(b"ans 1 0 *\n1\nx")
            carry()
            uplink.sendall(b"0\n")
            client.expect(b"0\n")
            client.sendall(b"ask 2 s 0 0\n")
            uplink.expect(b"ask 131072 s 0 0\n")
            uplink.sendall(b"ans 131072 0 *\n1\nx")
            client.expect(b"ans 2 0 *\n1\nx")
            carry()
            uplink.close()  # half an answer went out: it must not be taken for whole
            assert client.ended()
            assert bed.balanced()

    def test_a_connection_that_cannot_be_saved_stays_behind(self):
        """Its requests are lost with it, each told once; everybody else goes on."""
        from tests.toy import toy

        with Bed(codec="toy", endpoints=2) as bed:
            client, other = bed.client(), bed.client()
            uplinks = [bed.upstream(0), bed.upstream(1)]
            for row in (ENDPOINT_ROW, ENDPOINT_ROW + 1):
                eventually(lambda r=row: bed.row(r).get("up") == 1)
            for peer in (client, other):
                peer.sendall(b"ask 1 s 0 0\n")
            eventually(lambda: bed.row().get("requests.in_flight") == 2)
            for uplink in uplinks:  # what was sent is read: nothing else comes but the end
                uplink.sock.setblocking(False)
                while select.select([uplink.sock], [], [], 0.05)[0]:
                    uplink.sock.recv(1 << 16)
                uplink.sock.settimeout(5)
            toy.refuse_to_save(True)
            try:
                [saved] = move(bed)
            finally:
                toy.refuse_to_save(False)
            assert (saved.left, list(saved.descriptors)) == (4, [])
            for peer in (client, other, *uplinks):
                assert peer.ended()
            assert bed.row()["requests.failed.client_gone"] == 2
            for row in (ENDPOINT_ROW, ENDPOINT_ROW + 1):
                eventually(lambda r=row: bed.row(r).get("up") == 1)
            fresh = bed.client()
            fresh.sendall(b"ask 1 s 0 0\n")
            eventually(lambda: bed.row().get("requests.in_flight") == 1)
            assert bed.balanced()


class TestParked:
    def test_a_parked_frame_is_told_anew_and_counted_once(self):
        with Bed(rule={"park": True}) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(b"".join(bolt.request(i, "s", b"%d" % i) for i in range(3)))
            bed.wait_event("parked")
            bed.events.clear()
            move(bed)
            for i in range(3):
                [parked] = bed.wait_event("parked")
                bed.events.clear()
                assert bed.row()["requests.accepted"] == i + 1
                bed.engine.verdict(parked.a, -1)
                asked = uplink.frame()
                assert asked.content == b"%d" % i
                uplink.sendall(bolt.response_to(asked))
                assert client.frame().id == i
            assert bed.row()["requests.accepted"] == 3
            assert bed.balanced()

    def test_one_whose_rule_parks_no_more_is_served(self):
        with Bed(rule={"park": True}) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s", b"q") + bolt.oneway(2, "s", b"o"))
            bed.wait_event("parked")
            bed.rule = {}
            move(bed)
            assert [f.content for f in uplink.frames(2)] == [b"q", b"o"]
            assert bed.row()["requests.accepted"] == 1
            assert bed.row()["requests.oneway_accepted"] == 1
            assert bed.balanced()

    def test_a_verdict_while_frozen_and_after_a_thaw(self):
        with Bed(rule={"park": True}) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s", b"1") + bolt.request(2, "s", b"2"))
            [first] = bed.wait_event("parked")
            bed.events.clear()
            freeze(bed)
            save_and_forget(bed)
            thaw(bed)
            bed.engine.verdict(first.a, -1)
            assert uplink.frame().content == b"1"
            [second] = bed.wait_event("parked")
            freeze(bed)
            bed.engine.verdict(second.a, -1)
            bed.process()
            assert uplink.silent()
            thaw(bed)
            assert uplink.frame().content == b"2"
            assert bed.row()["requests.accepted"] == 2
            assert bed.balanced()


def save_and_forget(bed: moving.AnyBed) -> None:
    for saved in save(bed):
        os.close(saved.memfd)


class TestThaw:
    def test_a_hundred_times_under_load(self):
        with Bed(threads=2, endpoints=2) as bed:
            uplinks = [bed.upstream(i) for i in range(2) for _ in range(2)]
            for uplink in uplinks:
                threading.Thread(target=echo, args=(uplink,), daemon=True).start()
            clients = [bed.client() for _ in range(6)]
            wrong: list[object] = []
            stop = threading.Event()
            counts = [0] * len(clients)

            def ask(number: int) -> None:
                client = clients[number]
                while not stop.is_set():
                    ids = [counts[number] + i for i in range(5)]
                    client.sendall(b"".join(bolt.request(i, "s", b"%d" % i) for i in ids))
                    got = client.frames(5)
                    if sorted((f.id, f.status) for f in got) != [(i, 0) for i in ids]:
                        wrong.append(got)
                    counts[number] += 5

            askers = [threading.Thread(target=ask, args=(i,)) for i in range(len(clients))]
            for asker in askers:
                asker.start()
            for i in range(100):
                freeze(bed)
                if i % 3 == 0:
                    save_and_forget(bed)
                thaw(bed)
            stop.set()
            for asker in askers:
                asker.join()
            assert not wrong
            assert min(counts) > 0
            assert bed.row()["requests.answered"] == sum(counts)
            assert bed.balanced()

    def test_straight_after_the_freeze(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            for i in range(50):
                bed.engine.freeze()
                bed.engine.thaw()
                client.sendall(bolt.request(i, "s"))
                uplink.sendall(bolt.response_to(uplink.frame()))
                assert client.frame().id == i
            assert len(moving.wait(bed, "thawed", 50)) == 50

    def test_nothing_moves_while_frozen(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            asked = uplink.frame()
            freeze(bed)
            client.sendall(bolt.request(2, "s"))
            uplink.sendall(bolt.response_to(asked))
            late = bed.client()
            late.sendall(bolt.request(3, "s"))
            assert uplink.silent()
            assert client.silent()
            before = bed.process()
            time.sleep(0.1)  # not to synchronise: the time in which a frozen thread must not spin
            assert bed.process()["reads"] == before["reads"]
            thaw(bed)
            assert client.frame().id == 1
            assert len({f.id for f in uplink.frames(2)}) == 2
            assert bed.balanced()

    def test_silence_while_frozen_is_held_against_nobody(self):
        with Bed(heartbeat_ms=100, idle_timeout_ms=150, frame_timeout_ms=150) as bed:
            uplink, idle, half = bed.upstream(), bed.client(), bed.client()
            idle.sendall(bolt.heartbeat(1))
            idle.frame()
            half.sendall(bolt.request(1, "s", b"body")[:10])
            eventually(lambda: [c for c in bed.connections() if c["partial_bytes"]])
            freeze(bed)
            time.sleep(0.4)  # not to synchronise: longer than every limit
            thaw(bed)
            half.sendall(bolt.request(1, "s", b"body")[10:])
            idle.sendall(bolt.request(2, "s", b"still here"))
            while (got := uplink.frame()).kind == bolt.HEARTBEAT:
                uplink.sendall(bolt.heartbeat_ack(got.id))
            assert got.content in (b"body", b"still here")
            assert "closed.heartbeat" not in bed.row(ENDPOINT_ROW)
            assert not any(name.startswith("closed") for name in bed.row(LISTENER_ROW))

    def test_an_answer_that_came_meanwhile_wins_over_its_deadline(self):
        with Bed(request_timeout_ms=150) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s", timeout_ms=-1))
            asked = uplink.frame()
            freeze(bed)
            uplink.sendall(bolt.response_to(asked, b"in time"))
            time.sleep(0.3)  # not to synchronise: until its deadline has passed
            thaw(bed)
            assert client.frame().content == b"in time"
            assert bed.balanced()

    def test_the_watchdog_takes_no_frozen_thread_for_a_stuck_one(self):
        with Bed(watchdog=True) as bed:
            freeze(bed)
            time.sleep(0.3)  # not to synchronise: three ticks of the watchdog
            assert not bed.seen("stall")
            thaw(bed)

    def test_events_that_found_the_ring_full_are_told_before_frozen(self):
        with PushBed(ring_bytes=1 << 16) as bed:
            clients = [bed._connect(PUSH) for _ in range(40)]
            for number, client in enumerate(clients):
                client.sendall(request(number, {"fm.op": "hello"}, bytes(15000)))
            eventually(lambda: bed.process().get("punt_full"), "the ring is full")
            bed.engine.freeze()
            heard: list[str] = []

            def look() -> bool:
                heard.extend(event.kind for event in bed.engine.events(most=1))
                return "frozen" in heard

            eventually(look)
            assert heard.count("opened") == 40 + (heard.count("endpoint_up") > 0)
            assert bed.engine.events() == []
            bed.engine.thaw()
            moving.wait(bed, "thawed", 1)
            assert len(bed.wait_event("frame", 40 - heard.count("frame")))


class TestMisuse:
    def test_what_is_out_of_order_is_said(self):
        with Bed() as bed:
            engine = bed.engine
            for call in (engine.save, engine.thaw, engine.release):
                with pytest.raises(RuntimeError):
                    call()
            with pytest.raises(RuntimeError, match="saved"):
                engine.saved(0)
            freeze(bed)
            with pytest.raises(RuntimeError, match="thaw"):
                engine.freeze()
            made = bed.snapshot()
            for call, args in (
                (engine.publish, (made,)),
                (engine.listen, (LISTENER, bed.front.fileno())),
                (engine.unlisten, (LISTENER,)),
                (engine.drain, ()),
                (engine.abort_in_flight, ()),
            ):
                with pytest.raises(RuntimeError, match="frozen"):
                    call(*args)
            save_and_forget(bed)
            with pytest.raises(RuntimeError, match="once"):
                engine.save()
            with pytest.raises(RuntimeError, match="taken"):
                engine.saved(0)
            with pytest.raises(ValueError, match="thread"):
                engine.saved(1)
            thaw(bed)
            engine.publish(made)

    def test_loading_out_of_order(self):
        with Bed(threads=2) as bed:
            freeze(bed)
            saved = save(bed)
            taker = successor(bed)
            memfd, fds = moving.hand(saved[0])
            with pytest.raises(RuntimeError, match="adopt"):
                taker.load(0, memfd, [])
            with pytest.raises(RuntimeError, match="adopt"):
                taker.start_adopted()
            taker.adopt(bed.snapshot())
            with pytest.raises(RuntimeError, match="started"):
                taker.adopt(bed.snapshot())
            other, other_fds = moving.hand(saved[1])
            with pytest.raises(RuntimeError, match="order"):
                taker.load(1, other, other_fds)
            taker.load(0, memfd, fds)
            with pytest.raises(RuntimeError, match="1 of 2"):
                taker.start_adopted()
            with pytest.raises(ValueError, match="thread 0 of 2"):
                taker.load(1, memfd, [])
            with pytest.raises(RuntimeError, match="only be stopped"):
                taker.start_adopted()
            assert taker.stop()
            thaw(bed)
            for one in saved:
                os.close(one.memfd)

    def test_descriptors_that_are_none_of_ours(self):
        with Bed() as bed:
            bed.client()
            bed.upstream()
            eventually(lambda: bed.row(ENDPOINT_ROW).get("up") == 1)
            freeze(bed)
            [saved] = save(bed)
            gc.collect()
            before = descriptors()

            def tried(*fds: int) -> str:
                taker = successor(bed)
                taker.adopt(bed.snapshot())
                with pytest.raises(ValueError, match="descriptors") as caught:
                    taker.load(0, saved.memfd, [os.dup(fd) for fd in fds])
                assert taker.stop()
                return str(caught.value)

            good = saved.descriptors[0]
            assert "1 were given" in tried(good)
            taker = successor(bed)
            taker.adopt(bed.snapshot())
            twice = os.dup(good)
            with pytest.raises(ValueError, match="twice"):
                taker.load(0, saved.memfd, [twice, twice])
            del taker
            gc.collect()
            assert descriptors() == before
            os.close(saved.memfd)
            thaw(bed)

    def test_what_is_no_socket_ends_as_a_broken_connection_does(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            uplink.frame()
            freeze(bed)
            [saved] = save(bed)
            taker = successor(bed)
            taker.adopt(bed.snapshot())
            with open("/dev/null", "rb") as null:
                fds = [os.dup(null.fileno()) for _ in saved.descriptors]
            taker.load(0, saved.memfd, fds)
            os.close(saved.memfd)
            giver, bed.engine = bed.engine, taker
            taker.start_adopted()
            eventually(lambda: not bed.row(LISTENER_ROW).get("connections"))
            assert bed.balanced()
            assert taker.stop()
            bed.engine = giver
            thaw(bed)
            assert client.silent()

    def test_a_descriptor_that_blocks_blocks_nobody(self):
        """The flag is the socket's: whoever has a duplicate of the descriptor may set it."""
        with Bed(frame_bytes_max=64 << 20, queue_bytes_max=64 << 20) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            asked = uplink.frame()
            freeze(bed)
            [saved] = save(bed)
            for fd in saved.descriptors:
                os.set_blocking(fd, True)
            os.close(saved.memfd)
            thaw(bed)
            uplink.sendall(bolt.response_to(asked, bytes(20_000_000)))
            move(bed)
            canary = bed.client()
            canary.sendall(bolt.heartbeat(1))
            assert canary.frame().id == 1
            assert len(client.frame().content) == 20_000_000

    def test_an_engine_that_adopted_nothing_is_a_plain_one(self):
        with Bed() as bed:
            assert bed.engine.stop()
            bed.engine = successor(bed)
            bed.engine.adopt(bed.snapshot())
            bed.engine.listen(LISTENER, bed.front.fileno())
            bed.engine.start_adopted()
            [event] = moving.wait(bed, "thawed", 1)
            assert event.b == 0
            bed.upstream()
            uplink, client = bed.upstream(), bed.client()
            client.sendall(bolt.request(1, "s"))
            uplink.sendall(bolt.response_to(uplink.frame()))
            assert client.frame().id == 1


class TestGivingUp:
    """All or nothing: a load that fails leaves whoever gave as he was."""

    def load_and_drop(self, bed: Bed, **how: Any) -> None:
        taker = successor(bed)
        taker.adopt(bed.snapshot())
        try:
            load(taker, save(bed), **how)
        finally:
            assert taker.stop()

    def test_loaded_and_dropped_without_a_word(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            asked = uplink.frame()
            client.sendall(bolt.request(2, "s")[:9])
            gc.collect()
            before = descriptors()
            for _ in range(3):
                freeze(bed)
                self.load_and_drop(bed)
                thaw(bed)
            gc.collect()
            assert descriptors() == before
            client.sendall(bolt.request(2, "s")[9:])
            again = uplink.frame()
            uplink.sendall(bolt.response_to(asked) + bolt.response_to(again))
            assert [f.id for f in client.frames(2)] == [1, 2]
            assert bed.balanced()

    def test_too_little_memory_names_what_is_needed(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s", bytes(3 << 20)))
            asked = uplink.frame()
            client.sendall(bolt.request(2, "s", bytes(3 << 20))[: 2 << 20])
            eventually(lambda: [c for c in bed.connections() if c["partial_bytes"] == 2 << 20])
            freeze(bed)
            taker = Engine(watchdog=False)
            limits = {**bed.limits, "memory_bytes_max": 1 << 20}
            made = type(bed.snapshot())(bed.version + 1, limits)
            made.seal()
            taker.adopt(made)
            with pytest.raises(MemoryError, match=r"needs 2[0-9]{6} bytes"):
                load(taker, save(bed))
            assert taker.stop()
            thaw(bed)
            uplink.sendall(bolt.response_to(asked))
            assert client.frame().id == 1

    def test_memory_that_ends_at_any_allocation(self):
        """Whatever was built is undone, to the byte and to the descriptor."""
        groups = {"g": {"ordered": True}, "all": {"broadcast": True}}
        with PushBed(groups=groups, peers=1, nodes={"me": 50, "a": 100}) as bed:
            broker, peer = bed.broker(), bed.peer(0, "g")
            clients = [bed.subscriber("g", "all") for _ in range(3)]
            broker.sendall(deliver(1, "all", b"x"))
            for number in range(2, 8):
                broker.sendall(deliver(number, "g", b"x", key=str(number)))
            clients[0].sendall(publish(1, "t", b"y", idempotent="1"))
            clients[1].sendall(publish(1, "t", b"y")[:20])
            eventually(lambda: bed.row(10).get("requests.accepted") == 1)
            eventually(lambda: bed.row(GROUP_ROW).get("pushes.accepted") == 6)
            freeze(bed)
            [saved] = save(bed)
            gc.collect()
            before = descriptors()
            plain = successor(bed)
            plain.adopt(bed.snapshot())
            assert plain.stop()
            nothing = plain._memory(0)
            failed = 0
            for k in range(1, 400):
                taker = successor(bed)
                taker.adopt(bed.snapshot())
                used = taker._memory(0)
                taker._fail_alloc(k)
                _, fds = moving.hand(saved)
                try:
                    taker.load(0, saved.memfd, fds)
                except MemoryError:
                    failed += 1
                    assert taker._memory(0) <= used + moving.TABLES_MAX
                    with pytest.raises(RuntimeError):
                        taker.start_adopted()
                assert taker.stop()
                assert taker._memory(0) == nothing
                if failed < k:
                    break
            assert 40 < failed < 399
            del plain, taker
            gc.collect()
            assert descriptors() == before
            os.close(saved.memfd)
            thaw(bed)
            assert not peer.waiting()
            assert bed.balanced()


class TestLeaks:
    def test_nothing_is_left_of_many(self):
        with Bed(threads=2, endpoints=2) as bed:
            clients = [bed.client() for _ in range(5)]
            uplinks = [bed.upstream(i) for i in range(2) for _ in range(2)]

            def traffic() -> None:
                for i, client in enumerate(clients):
                    client.sendall(bolt.request(i, "s", bytes(5000)))
                for peer, frame in gather(uplinks, len(clients)):
                    peer.sendall(bolt.response_to(frame, bytes(100)))
                for client in clients:
                    client.frame()

            traffic()
            move(bed)
            traffic()
            gc.collect()
            fds, memory = descriptors(), bed.process()["memory"]
            for _ in range(50):
                move(bed)
                traffic()
            gc.collect()
            assert descriptors() == fds
            assert bed.process()["memory"] <= memory
            before = bed.process()["turns"]
            time.sleep(0.2)  # not to synchronise: the time in which an idle engine must not spin
            assert bed.process()["turns"] - before < 20
            assert bed.balanced()


class TestBlobs:
    def test_what_a_blob_says_of_itself(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s") + bolt.request(2, "s")[:11])
            uplink.frame()
            eventually(lambda: [c for c in bed.connections() if c["partial_bytes"] == 11])
            [frozen] = freeze(bed)
            [saved] = save(bed)
            seen = inspect(saved.memfd)
            assert seen["frozen_at_ns"] == frozen.a
            assert seen["bytes"] == saved.bytes == os.fstat(saved.memfd).st_size
            assert (seen["version"], seen["thread"], seen["threads"]) == (STATE_VERSION, 0, 1)
            assert (seen["downstream"], seen["upstream"], seen["requests"]) == (1, 1, 1)
            assert (seen["partial_bytes"], seen["descriptors"]) == (11, 2)
            assert not os.get_inheritable(saved.memfd)
            with pytest.raises(OSError, match="permitted"):
                os.write(saved.memfd, b"x")
            with pytest.raises(OSError, match="permitted"):
                os.ftruncate(saved.memfd, 10)
            os.close(saved.memfd)
            thaw(bed)

    def test_versions(self):
        assert STATE_VERSION_MIN == STATE_VERSION - 1
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s", b"q") + bolt.request(2, "s")[:11])
            asked = uplink.frame()
            move(bed, blobs=moving.of_next_version)
            move(bed, blobs=moving.of_version_before)
            client.sendall(bolt.request(2, "s")[11:])
            uplink.sendall(bolt.response_to(asked) + bolt.response_to(uplink.frame()))
            assert [f.id for f in client.frames(2)] == [1, 2]
            assert bed.balanced()
            freeze(bed)
            [saved] = save(bed)
            blob = moving.content(saved.memfd)
            found = list(moving.records(blob))
            for version in (STATE_VERSION_MIN - 1, STATE_VERSION + 2, 1 << 31):
                memfd = moving.sealed(moving.assembled(blob, found, version=version % (1 << 32)))
                with pytest.raises(ValueError, match="version cannot be read"):
                    inspect(memfd)
                os.close(memfd)
            must_know = [found[0]._replace(kind=77, flags=0), *found]
            memfd = moving.sealed(moving.assembled(blob, must_know))
            with pytest.raises(ValueError, match="must know"):
                inspect(memfd)
            os.close(memfd)
            os.close(saved.memfd)
            thaw(bed)

    def test_what_is_no_blob(self):
        for data in (b"", b"x", bytes(4096), b"fmworld\n" + bytes(4096)):
            memfd = moving.sealed(data)
            with pytest.raises(ValueError, match="state"):
                inspect(memfd)
            os.close(memfd)
        with Bed() as bed:
            freeze(bed)
            [saved] = save(bed)
            memfd = moving.sealed(moving.content(saved.memfd), seals=0)
            with pytest.raises(ValueError, match="sealed"):
                inspect(memfd)
            os.close(memfd)
            os.close(saved.memfd)
            thaw(bed)
        with open("/dev/null", "rb") as null, pytest.raises(ValueError, match="sealed"):
            inspect(null.fileno())
        with pytest.raises((ValueError, OSError)):
            inspect(-1)


def busy_blobs() -> list[bytes]:
    """One with everything in it: a mesh with keys, broadcasts, forwards, calls and half frames; and
    one of the other protocol, with state of its own and answers by order."""
    from tests.toy import toy

    register_codec("toy", toy.by_id())
    register_codec("toy-order", toy.by_order())
    found = []
    groups = {"g": {"ordered": True}, "all": {"broadcast": True}}
    with PushBed(
        groups=groups, peers=1, nodes={"me": 50, "a": 100}, request_timeout_ms=9000
    ) as bed:
        broker, _peer = bed.broker(), bed.peer(0, "g")
        clients = [bed.subscriber("g", "all") for _ in range(3)]
        broker.sendall(deliver(1, "all", b"x"))
        for number in range(2, 8):
            broker.sendall(deliver(number, "g", b"x", key=str(number)))
        clients[0].sendall(publish(1, "t", b"y", idempotent="1"))
        clients[1].sendall(publish(1, "t", b"y")[:20])
        assert bed.engine.call_many([(clients[2].handle, 5, request(1, {"fm.op": "x"}), 9000)])
        eventually(lambda: bed.row(10).get("requests.accepted") == 1)
        eventually(lambda: bed.row(GROUP_ROW).get("pushes.accepted") == 6)
        freeze(bed)
        bed.engine.send(clients[0].handle, request(50, {"fm.op": "x"}))
        bed.engine.call_many([(clients[1].handle, 6, request(1, {"fm.op": "x"}), 9000)])
        [saved] = save(bed)
        found.append(moving.content(saved.memfd))
        os.close(saved.memfd)
        thaw(bed)
    for codec, binding in (("toy", "per_client"), ("toy-order", "shared")):
        with Bed(codec=codec, binding=binding, request_timeout_ms=9000) as bed:
            name = b"" if codec == "toy-order" else b"1 "
            clients = [bed.client() for _ in range(2)]
            for client in clients:
                client.sendall(b"ask " + name + b"s 0 *\n1\nx")
                client.sendall(b"0\n" if codec == "toy-order" else b"3\nab")
            eventually(lambda: bed.row().get("requests.in_flight") == 2)
            freeze(bed)
            [saved] = save(bed)
            found.append(moving.content(saved.memfd))
            os.close(saved.memfd)
            thaw(bed)
    return found


@pytest.fixture(scope="module")
def blobs() -> list[bytes]:
    return busy_blobs()


class TestHostile:
    """A blob that was damaged, or made to do damage, is refused, or is a world that runs."""

    def take(self, blob: bytes, bed: Bed | PushBed) -> bool:
        """What a new process would do with it; every descriptor is one end of a pair of sockets."""
        memfd = moving.sealed(blob)
        pairs: list[socket.socket] = []
        try:
            try:
                seen = inspect(memfd)
            except ValueError:
                return False
            taker = successor(bed, seen["threads"])
            taker.adopt(moving.again(bed))
            for _ in range(seen["descriptors"]):
                pairs += socket.socketpair()
            fds = [os.dup(sock.fileno()) for sock in pairs[::2]]
            try:
                taker.load(0, memfd, fds)
            except (ValueError, MemoryError):
                assert taker.stop()
                return False
            if seen["threads"] > 1:
                assert taker.stop()
                return True
            giver, bed.engine = bed.engine, taker
            try:
                taker.start_adopted()
                for sock in pairs[1::2]:
                    sock.setblocking(False)
                    sock.send(bolt.response(0x10000) + bolt.request(1, "s")[:5])
                bed.process()
                for sock in pairs[1::4]:
                    sock.close()
                bed.process()
                assert taker.stop()
            finally:
                bed.engine = giver
            return True
        finally:
            os.close(memfd)
            for sock in pairs:
                sock.close()

    def test_each_byte_cut_off(self, blobs):
        blob = blobs[0]
        for size in [*range(400), *range(400, len(blob), 97), len(blob) - 1]:
            memfd = moving.sealed(blob[:size])
            with pytest.raises(ValueError, match="state"):
                inspect(memfd)
            os.close(memfd)
            if size > moving.HEAD.size:
                short = bytearray(blob[: size & ~7])
                short[16:24] = len(short).to_bytes(8, "little")
                memfd = moving.sealed(moving.checked(bytes(short)))
                with pytest.raises(ValueError, match="state"):
                    inspect(memfd)
                os.close(memfd)

    def test_each_bit_turned_is_noticed(self, blobs):
        dice = random.Random(1)
        blob = blobs[0]
        for _ in range(2000):
            at = dice.randrange(len(blob))
            torn = bytearray(blob)
            torn[at] ^= 1 << dice.randrange(8)
            memfd = moving.sealed(bytes(torn))
            with pytest.raises(ValueError, match="state"):
                inspect(memfd)
            os.close(memfd)

    def test_lies_about_who_is_who(self, blobs):
        """What would take a client for an upstream, or one protocol for another, is refused."""

        def refused(blob: bytes, kind: str, at: int, new: bytes, where: dict[int, int]) -> str:
            """`new` at offset `at` of the first record of that kind with these bytes."""
            found = list(moving.records(blob))
            number = next(
                i
                for i, one in enumerate(found)
                if moving.KINDS[one.kind] == kind
                and all(one.fixed[offset] == value for offset, value in where.items())
            )
            fixed = found[number].fixed
            fixed = fixed[:at] + new + fixed[at + len(new) :]
            found[number] = found[number]._replace(fixed=fixed)
            memfd = moving.sealed(moving.assembled(blob, found))
            try:
                with pytest.raises(ValueError, match="state: byte") as caught:
                    inspect(memfd)
            finally:
                os.close(memfd)
            return str(caught.value)

        role, kind_of, asker, delivery = 56, 59, 48, 80
        mesh, toy, _ = blobs
        conns = [one.fixed for one in moving.records(mesh) if moving.KINDS[one.kind] == "conn"]
        client = next(fixed for fixed in conns if fixed[role] == 0)
        broker = next(fixed for fixed in conns if fixed[role] == 1)

        def handle(fixed: bytes) -> bytes:
            return fixed[:8]

        assert "a link" in refused(mesh, "link", 8, handle(client), {})
        assert "nobody asked" in refused(mesh, "slot", asker, handle(broker), {delivery: 3})
        assert "a member" in refused(mesh, "conn", kind_of, b"\0", {role: 0, kind_of: 1})
        assert "another protocol" in refused(toy, "conn", kind_of, b"\4", {role: 1})

    @pytest.mark.parametrize("seed", range(4))
    def test_damage_with_a_checksum_that_holds(self, blobs, seed):
        """Bytes, numbers, whole records: changed, doubled, left out, exchanged."""
        dice = random.Random(seed)
        taken = 0
        rounds = int(os.environ.get("FASTMESH_MUTATIONS", "150"))
        groups = {"g": {"ordered": True}, "all": {"broadcast": True}}
        with (
            PushBed(groups=groups, peers=1, nodes={"me": 50, "a": 100}) as mesh,
            Bed(codec="toy", binding="per_client") as toy,
            Bed(codec="toy-order") as ordered,
        ):
            beds = [mesh, toy, ordered]
            for bed, blob in zip(beds, blobs, strict=True):
                assert self.take(blob, bed)
            for _ in range(rounds):
                which = dice.choice([0, 0, 0, 1, 2])
                taken += self.take(self.damaged(blobs[which], dice), beds[which])
        assert taken > rounds // 20

    def damaged(self, blob: bytes, dice: random.Random) -> bytes:
        found = list(moving.records(blob))
        for _ in range(dice.choice([1, 1, 1, 2, 5])):
            # (not the counters: there are many, and no value of theirs is wrong)
            at = dice.choice([i for i, one in enumerate(found) if one.kind not in (1, 2)])
            one = found[at]
            what = dice.choice(["byte", "byte", "word", "word", "number", "drop", "twice", "swap"])
            if what in ("byte", "word", "number"):
                part = dice.choice(["fixed", "fixed", "data"])
                old = getattr(one, part)
                if not old:
                    continue
                width = {"byte": 1, "word": 4, "number": 8}[what]
                place = dice.randrange(0, len(old), width) if len(old) >= width else 0
                value = dice.choice(
                    [0, 1, 2, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, dice.getrandbits(64)]
                )
                new = (value % (1 << (8 * width))).to_bytes(width, "little")
                changed = (old[:place] + new + old[place + width :])[: len(old)]
                found[at] = one._replace(**{part: changed})
            elif what == "drop":
                del found[at]
            elif what == "twice":
                found.insert(at, one)
            else:
                other = dice.randrange(len(found))
                found[at], found[other] = found[other], found[at]
        return moving.assembled(blob, found)
