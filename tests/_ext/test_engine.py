"""The engine against scripted peers: one frame, one connection, one endpoint at a time."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tests._ext.bed import CLUSTER, CLUSTER_ROW, ENDPOINT_ROW, LISTENER_ROW, Bed, Peer, eventually
from tests.reference import bolt

NO_PROCESSOR, BUSY, TIMEOUT, CODEC, CLOSED = 6, 4, 7, 9, 16


def bodies(count: int) -> list[bytes]:
    return [b"%06d" % i for i in range(count)]


def echo(peer: Peer) -> None:
    """Answer everything until the connection ends."""
    while True:
        try:
            peer.sendall(bolt.response_to(peer.frame()))
        except (EOFError, OSError):
            return


def reset(peer: Peer) -> None:
    """End a connection with RST."""
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


class TestForwarding:
    @pytest.mark.parametrize("crc", [False, True])
    @pytest.mark.parametrize("threads", [1, 2])
    def test_everything_but_id_and_checksum_arrives_as_it_was_sent(self, threads, crc):
        with Bed(threads=threads) as bed:
            client = bed.client()
            sent = bolt.request(7, "com.example.Order:1.0", b"body", crc=crc)
            client.sendall(sent)
            uplink = bed.speaking(threads)
            asked = uplink.frame()
            assert asked.id not in (0, 7)
            assert asked.id < 1 << 31
            assert bolt.patch_id(asked.data, 7) == sent
            answer = bolt.response_to(asked, b"answer")
            uplink.sendall(answer)
            assert client.frame().data == bolt.patch_id(answer, 7)
            assert bed.row() == {"requests.accepted": 1, "requests.answered": 1} | {
                k: v for k, v in bed.row().items() if not k.startswith("requests")
            }

    @pytest.mark.parametrize("family", [socket.AF_INET6, socket.AF_UNIX])
    def test_every_kind_of_address_on_both_sides(self, family):
        with Bed(family=family) as bed:
            client = bed.client()
            client.sendall(bolt.request(7, "s", b"q"))
            uplink = bed.upstream()
            uplink.sendall(bolt.response_to(uplink.frame(), b"a"))
            assert client.frame().content == b"a"
            peers = {c["peer"] for c in bed.connections()}
            assert all(
                str(p).startswith("unix" if family == socket.AF_UNIX else "[::1]:") for p in peers
            )

    def test_spinning_stops_when_there_is_nothing_to_spin_for(self):
        with Bed(spin_us=500) as bed:
            client, uplink = bed.client(), bed.upstream()
            for i in range(200):
                client.sendall(bolt.request(i, "s"))
                uplink.sendall(bolt.response_to(uplink.frame()))
                client.frame()
            assert bed.process()["spins"] > 0
            time.sleep(0.05)  # not to synchronise: the time in which an idle thread must not spin
            before = bed.process()
            time.sleep(0.3)
            after = bed.process()
            # each look at the counters wakes the thread: a spin of 500 us at most for each
            assert after["waits"] - before["waits"] < 50

    def test_the_same_id_of_two_clients_and_twice_of_one(self):
        with Bed() as bed:
            first, second = bed.client(), bed.client()
            first.sendall(bolt.request(1, "s", b"a") + bolt.request(1, "s", b"b"))
            second.sendall(bolt.request(1, "s", b"c"))
            uplink = bed.upstream()
            asked = uplink.frames(3)
            assert len({frame.id for frame in asked}) == 3
            for frame in reversed(asked):
                uplink.sendall(bolt.response_to(frame, frame.content.upper()))
            assert {f.content for f in first.frames(2)} == {b"A", b"B"}
            assert second.frame().content == b"C"

    def test_ids_wrap(self):
        """Three generations before the wrap, ten requests one after the other through one slot."""
        with Bed(first_generation=0x7FFD) as bed:
            client, ids = bed.client(), []
            client.sendall(bolt.request(9, "s", b"0"))
            uplink = bed.upstream()
            for i in range(10):
                asked = uplink.frame()
                ids.append(asked.id)
                uplink.sendall(bolt.response_to(asked, asked.content))
                assert client.frame().content == b"%d" % i
                client.sendall(bolt.request(9, "s", b"%d" % (i + 1)))
            generations = [i >> 16 for i in ids]
            assert generations == [0x7FFD, 0x7FFE, 0x7FFF, 1, 2, 3, 4, 5, 6, 7]
            assert 0 not in ids

    def test_oneway_carries_no_id_that_could_be_answered(self):
        with Bed() as bed:
            client = bed.client()
            client.sendall(bolt.oneway(0x10001, "s", b"x"))
            uplink = bed.upstream()
            asked = uplink.frame()
            assert (asked.kind, asked.id, asked.content) == (bolt.ONEWAY, 0, b"x")
            uplink.sendall(bolt.response(0, content=b"?"))
            eventually(lambda: bed.process().get("dropped.unknown") == 1)
            row = bed.row()
            assert row["requests.oneway_accepted"] == row["requests.oneway_forwarded"] == 1
            assert client.silent()

    def test_large_bodies_both_ways(self):
        with Bed() as bed:
            client = bed.client()
            body = os.urandom(3 << 20)
            answer = b"".join(reversed([body[i : i + 1000] for i in range(0, len(body), 1000)]))
            sender = threading.Thread(
                target=client.sendall, args=(bolt.request(1, "s", body, crc=True),)
            )
            sender.start()
            uplink = bed.upstream()
            asked = uplink.frame()
            sender.join()
            assert asked.content == body
            replier = threading.Thread(
                target=uplink.sendall, args=(bolt.response_to(asked, answer),)
            )
            replier.start()
            assert client.frame().content == answer
            replier.join()
            # an idle connection owns no buffer: what is left is the slot page and the connections
            eventually(lambda: bed.process()["memory"] < 100_000)

    def test_a_frame_dribbled_byte_by_byte_reaches_the_upstream_whole(self):
        with Bed() as bed:
            client, canary = bed.client(), bed.client()
            frame = bolt.request(5, "s", b"dribble")
            uplink = bed.upstream()
            for i, byte in enumerate(frame):
                client.sendall(bytes([byte]))
                if i == len(frame) // 2:  # a slow sender does not hold the shared connection
                    canary.sendall(bolt.request(1, "s", b"canary"))
                    asked = uplink.frame()
                    assert asked.content == b"canary"
                    uplink.sendall(bolt.response_to(asked, b"ok"))
                    assert canary.frame().content == b"ok"
            assert uplink.frame().content == b"dribble"

    def test_half_closed_client_still_gets_its_answer(self):
        with Bed() as bed:
            client = bed.client()
            client.sendall(bolt.request(3, "s", b"x"))
            client.sock.shutdown(socket.SHUT_WR)
            uplink = bed.upstream()
            asked = uplink.frame()
            eventually(lambda: any("half_closed" in c["held"] for c in bed.connections()))
            uplink.sendall(bolt.response_to(asked, b"late but due"))
            assert client.frame().content == b"late but due"
            assert client.ended()


class TestEdges:
    """epoll tells once: whatever lies ready must be taken without another word from the peer."""

    @pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
    def test_more_than_a_turn_reads_and_then_the_end(self, family):
        count, body = 3000, b"x" * 500  # about 1.6 MB: several shares of a turn
        with Bed(family=family) as bed:
            client = bed.client()
            answerer = threading.Thread(target=echo, args=(bed.upstream(),))
            answerer.start()
            bed.engine._stall(50)

            def send() -> None:
                client.sendall(b"".join(bolt.request(i, "s", body) for i in range(count)))
                client.sock.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            assert sorted(f.id for f in client.frames(count)) == list(range(count))
            assert client.ended()
            sender.join()
            assert bed.row()["requests.answered"] == count
        answerer.join()

    def test_frames_on_both_sides_of_an_urgent_byte(self):
        """A recv stops before such a byte although more lies behind it."""
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            bed.engine._stall(50)
            client.sendall(bolt.request(1, "s", b"before"))
            client.sock.send(b"!", socket.MSG_OOB)
            client.sendall(bolt.request(2, "s", b"behind"))
            assert [f.content for f in uplink.frames(2)] == [b"before", b"behind"]

    def test_held_at_its_quota_again_and_again_it_is_still_read_to_the_end(self):
        """Released, a client goes on with the frames it has buffered, and then with its socket."""
        count = 300
        with Bed(queue_bytes_max=65536, frame_timeout_ms=1000) as bed:
            client, uplink = bed.client(), bed.upstream()
            uplink.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            frames = b"".join(bolt.request(i, "s", bytes(9000)) for i in range(count))
            sender = threading.Thread(target=client.sendall, args=(frames,))
            sender.start()
            eventually(lambda: bed.process().get("pauses"), "held")
            answerer = threading.Thread(target=echo, args=(uplink,))
            answerer.start()
            assert {f.id for f in client.frames(count)} == set(range(count))
            sender.join()
        answerer.join()


class TestRefusals:
    def test_no_route(self):
        with Bed(rule={"service": b"only.this"}) as bed:
            client = bed.client()
            client.sendall(bolt.request(4, "other") + bolt.request(5, None))
            assert [(f.id, f.status) for f in client.frames(2)] == [
                (4, NO_PROCESSOR),
                (5, NO_PROCESSOR),
            ]
            assert bed.row(LISTENER_ROW)["requests.failed.no_route"] == 2
            assert bed.balanced()

    def test_no_endpoint(self):
        with Bed() as bed:
            bed.upstream()
            for server in bed.servers:
                server.close()
            bed.open[0].close()
            eventually(lambda: "up" not in bed.row(ENDPOINT_ROW))
            client = bed.client()
            client.sendall(bolt.request(4, "s"))
            got = client.frame()
            assert (got.id, got.status) == (4, NO_PROCESSOR)
            assert bed.balanced()

    def test_deadline_then_late_answer(self):
        with Bed(request_timeout_ms=150) as bed:
            client = bed.client()
            began = time.monotonic()
            client.sendall(
                bolt.request(1, "s", timeout_ms=-1) + bolt.request(2, "s", timeout_ms=400)
            )
            uplink = bed.upstream()
            asked = uplink.frames(2)
            first = client.frame()
            took_s = time.monotonic() - began
            assert (first.id, first.status) == (1, TIMEOUT)
            assert 0.149 < took_s < 0.35
            assert client.frame().id == 2
            for frame in asked:
                uplink.sendall(bolt.response_to(frame, b"too late") * 2)
            eventually(lambda: bed.process().get("dropped.late", 0) >= 2)
            assert client.silent()
            row = bed.row()
            assert row["requests.expired"] == 2
            assert "requests.in_flight" not in row
            assert bed.balanced()

    def test_full_table_is_an_immediate_overload_and_nobody_else_notices(self):
        with Bed(in_flight_max=16) as bed:
            client, canary = bed.client(), bed.client()
            client.sendall(b"".join(bolt.request(i, "s") for i in range(17)))
            uplink = bed.upstream()
            asked = uplink.frames(16)
            assert (client.frame().status, bed.row()["requests.failed.overload"]) == (BUSY, 1)
            uplink.sendall(bolt.response_to(asked[0]))
            assert client.frame().status == 0
            canary.sendall(bolt.request(1, "s", b"canary"))
            assert uplink.frame().content == b"canary"

    def test_in_flight_per_connection(self):
        with Bed(in_flight_per_connection_max=4) as bed:
            client = bed.client()
            client.sendall(b"".join(bolt.request(i, "s") for i in range(6)))
            assert [(f.id, f.status) for f in client.frames(2)] == [(4, BUSY), (5, BUSY)]

    def test_connections_max(self):
        with Bed(connections_max=2) as bed:
            first, second = bed.client(), bed.client()
            for peer in (first, second):
                peer.sendall(bolt.heartbeat(1))
                peer.frame()
            assert bed.client().ended()
            bed.wait_event("refused")
            first.close()
            eventually(lambda: bed.process()["connections"] == 1)
            again = bed.client()
            again.sendall(bolt.heartbeat(2))
            assert again.frame().id == 2

    @pytest.mark.parametrize(
        ("bad", "status"),
        [
            (bolt.frame(id=8, header_len=0x8000), CODEC),
            (bolt.frame(id=8, content_len=0x80000000), CODEC),
            (bolt.frame(id=8, content_len=64 << 20), CODEC),
            (bolt.request(8, headers=struct.pack(">i", 99) + b"x"), CODEC),
            (bolt.request(8, "s", b"x", crc=True)[:-1] + b"?", None),
            (b"GET / HTTP/1.1\r\n\r\n", None),
            (b"SSH-2.0-OpenSSH_9.2\r\n", None),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", None),
        ],
    )
    def test_undecodable_closes_that_connection_alone(self, bad, status):
        # (a rule that wants the service makes the header section be read)
        with Bed(rule={"service": b"s"}) as bed:
            client, canary = bed.client(), bed.client()
            client.sendall(bad + b"\0" * 1000)  # unread bytes must not reset the explanation away
            if status is not None:
                got = client.frame()
                assert (got.id, got.status) == (8, status)
            assert client.ended()
            uplink = bed.upstream()
            canary.sendall(bolt.request(1, "s", b"canary"))
            asked = uplink.frame()
            assert asked.content == b"canary"
            uplink.sendall(bolt.response_to(asked, b"alive"))
            assert canary.frame().content == b"alive"
            [event] = bed.wait_event("closed")
            assert re.fullmatch(rb"127\.0\.0\.1:\d+ [0-9a-f]+", event.data)
            eventually(lambda: bed.row(LISTENER_ROW).get("closed.malformed") == 1)
            assert bed.balanced()


class TestUpstreams:
    def test_lost_upstream_gives_each_request_in_flight_one_explicit_error(self):
        with Bed() as bed:
            client = bed.client()
            client.sendall(b"".join(bolt.request(i, "s") for i in range(50)))
            uplink = bed.upstream()
            uplink.frames(50)
            reset(uplink)
            assert sorted((f.id, f.status) for f in client.frames(50)) == [
                (i, CLOSED) for i in range(50)
            ]
            assert client.silent()
            assert bed.row()["requests.failed.upstream_lost"] == 50
            again = bed.upstream()  # it comes back by itself
            eventually(lambda: bed.row(ENDPOINT_ROW).get("up") == 1)
            client.sendall(bolt.request(99, "s", b"again"))
            assert again.frame().content == b"again"
            assert bed.balanced()

    def test_what_was_not_written_goes_elsewhere_and_what_was_does_not(self):
        """A stuck endpoint is killed: each request reaches one endpoint, or is told of the loss."""
        with Bed(endpoints=2, queue_bytes_max=64 << 20, in_flight_per_connection_max=4096) as bed:
            stuck, healthy = bed.upstream(0), bed.upstream(1)
            eventually(lambda: bed.row(ENDPOINT_ROW + 1).get("up") == 1)
            client = bed.client()
            count, size = 400, 64 << 10
            body = b"z" * size
            seen: dict[int, int] = {}

            def serve(peer: Peer) -> None:
                for _ in range(count):
                    try:
                        asked = peer.frame()
                    except (EOFError, OSError):
                        return
                    number = int(asked.content[:6])
                    seen[number] = seen.get(number, 0) + 1
                    peer.sendall(bolt.response_to(asked, asked.content[:6]))

            threading.Thread(target=serve, args=(healthy,), daemon=True).start()
            sender = threading.Thread(
                target=lambda: [
                    client.sendall(bolt.request(i, "s", b"%06d" % i + body)) for i in range(count)
                ]
            )
            sender.start()
            answers: dict[int, int] = {}
            # Each is answered by the healthy one or stuck; then the stuck one dies with its queue.
            sender.join(10)
            eventually(lambda: bed.row(ENDPOINT_ROW).get("requests.in_flight", 0) > 60)
            reset(stuck)
            for _ in range(count):
                got = client.frame()
                answers[got.id] = got.status
            assert set(answers) == set(range(count))
            lost = {number for number, status in answers.items() if status == CLOSED}
            assert not lost & set(seen)
            assert set(seen) == set(range(count)) - lost
            assert max(seen.values()) == 1
            row = bed.row()
            assert row["requests.retried"] > 0
            assert lost, "the test wants requests of which bytes were written"
            assert row["requests.failed.upstream_lost"] == len(lost)
            assert bed.balanced()

    def test_heartbeats_are_ours_on_both_legs(self):
        with Bed(heartbeat_ms=60) as bed:
            uplink = bed.upstream()
            for _ in range(4):
                beat = uplink.frame()
                assert beat.kind == bolt.HEARTBEAT
                uplink.sendall(bolt.heartbeat_ack(beat.id))
            client = bed.client()
            client.sendall(bolt.heartbeat(77))
            assert (client.frame().kind, bed.process()["heartbeats_in"]) == (bolt.HEARTBEAT_ACK, 1)
            uplink.sendall(bolt.heartbeat(78))
            while (got := uplink.frame()).kind == bolt.HEARTBEAT:
                uplink.sendall(bolt.heartbeat_ack(got.id))
            assert (got.kind, got.id) == (bolt.HEARTBEAT_ACK, 78)
            assert bed.row(ENDPOINT_ROW)["up"] == 1

    def test_silent_upstream_is_closed_within_two_heartbeats(self):
        with Bed(heartbeat_ms=100) as bed:
            uplink = bed.upstream()
            client = bed.client()
            client.sendall(bolt.request(1, "s"))
            began = time.monotonic()
            assert uplink.frame().kind == bolt.REQUEST
            assert client.frame().status == CLOSED
            assert time.monotonic() - began < 0.5
            assert bed.row(ENDPOINT_ROW)["closed.heartbeat"] == 1

    def test_goaway_opens_a_fresh_connection_and_finishes_the_old_one(self):
        with Bed() as bed:
            client = bed.client()
            old = bed.upstream()
            client.sendall(bolt.request(1, "s", b"old"))
            asked = old.frame()
            old.sendall(bolt.goaway())
            fresh = bed.upstream()
            eventually(lambda: bed.row(ENDPOINT_ROW).get("up") == 1)
            client.sendall(bolt.request(2, "s", b"new"))
            assert fresh.frame().content == b"new"
            old.sendall(bolt.response_to(asked, b"done"))
            assert client.frame().content == b"done"
            assert old.ended()

    def test_a_second_dialect_gets_a_connection_of_its_own(self):
        """Some servers answer everything in the dialect of a connection's first frame."""
        with Bed() as bed:
            client = bed.client()
            client.sendall(bolt.request(1, "s", b"v1"))
            first = bed.upstream()
            assert first.frame().content == b"v1"
            client.sendall(bolt.request(2, "s", b"crc", crc=True) + bolt.request(3, "s", b"v1"))
            second = bed.upstream()
            asked = second.frame()
            assert (asked.proto, asked.content) == (2, b"crc")
            assert first.frame().content == b"v1"
            client.sendall(bolt.request(4, "s", b"crc", crc=True))
            assert second.frame().content == b"crc"
            assert first.silent()
            assert bed.row(ENDPOINT_ROW)["up"] == 2

    def test_several_connections_share_the_load(self):
        with Bed(connections=3) as bed:
            uplinks = [bed.upstream() for _ in range(3)]
            eventually(lambda: bed.row(ENDPOINT_ROW).get("up") == 3)
            client = bed.client()
            client.sendall(b"".join(bolt.request(i, "s") for i in range(30)))
            for uplink in uplinks:
                uplink.frames(10)

    def test_heartbeats_keep_to_the_dialect(self):
        with Bed(heartbeat_ms=80) as bed:
            client = bed.client()
            client.sendall(bolt.request(1, "s", crc=True))
            uplink = bed.upstream()
            asked = uplink.frame()
            uplink.sendall(bolt.response_to(asked))
            beat = uplink.frame()
            assert (beat.kind, beat.proto, beat.ver1, beat.crc) == (bolt.HEARTBEAT, 2, 2, None)

    def test_weights_and_shares(self):
        """20 to 80 by weight with nothing in flight, and within two points."""
        with Bed(endpoints=2, weights=(20, 80)) as bed:
            uplinks = [bed.upstream(0), bed.upstream(1)]
            eventually(lambda: bed.row(ENDPOINT_ROW + 1).get("up") == 1)
            client, count = bed.client(), 3000

            for peer in uplinks:
                threading.Thread(target=echo, args=(peer,), daemon=True).start()
            for i in range(count):
                client.sendall(bolt.request(i, "s"))
                client.frame()
            share = bed.row(ENDPOINT_ROW)["sent"] / count
            assert abs(share - 0.20) < 0.03, share

    def test_ejection_has_a_floor_and_ends(self):
        with Bed(endpoints=2, eject_failures=3, eject_ms=200, request_timeout_ms=60) as bed:
            uplinks = [bed.upstream(0), bed.upstream(1)]
            eventually(lambda: bed.row(ENDPOINT_ROW + 1).get("up") == 1)
            client = bed.client()
            client.sendall(b"".join(bolt.request(i, "s", timeout_ms=0) for i in range(40)))
            assert {f.status for f in client.frames(40)} == {TIMEOUT}
            assert len(uplinks) == 2
            ejected = bed.wait_event("ejected")
            assert len({event.a for event in ejected}) == 1  # both failed, one of two may go
            bed.wait_event("restored")

    def test_per_client_connections_come_and_go_with_their_client(self):
        with Bed(binding="per_client") as bed:
            first, second = bed.client(), bed.client()
            first.sendall(bolt.request(1, "s", b"1"))
            one = bed.upstream()
            second.sendall(bolt.request(1, "s", b"2"))
            two = bed.upstream()
            asked = one.frame()
            assert (asked.content, two.frame().content) == (b"1", b"2")
            one.sendall(bolt.request(50, "x", b"to my client"))
            pushed = first.frame()
            assert pushed.content == b"to my client"
            assert second.silent()
            first.sendall(bolt.response_to(pushed, b"taken"))
            assert one.frame().content == b"taken"
            reset(first)
            assert one.ended()
            assert two.silent()

    def test_removed_endpoint_finishes_and_gets_nothing_new(self):
        with Bed(endpoints=2) as bed:
            uplinks = [bed.upstream(0), bed.upstream(1)]
            client = bed.client()
            eventually(lambda: bed.row(ENDPOINT_ROW + 1).get("up") == 1)
            client.sendall(b"".join(bolt.request(i, "s") for i in range(40)))
            eventually(lambda: bed.row(ENDPOINT_ROW).get("requests.in_flight"))
            bed.publish(endpoints=[1])
            client.sendall(b"".join(bolt.request(i, "s", b"new") for i in range(40, 80)))
            old = bed.row(ENDPOINT_ROW)["requests.in_flight"]
            for frame in uplinks[0].frames(old):
                assert frame.content != b"new"
                uplinks[0].sendall(bolt.response_to(frame))
            assert uplinks[0].ended()
            for frame in uplinks[1].frames(80 - old):
                uplinks[1].sendall(bolt.response_to(frame))
            assert {f.status for f in client.frames(80)} == {0}
            bed.publish(endpoints=[0, 1])  # and back again
            assert bed.upstream(0).silent()

    def test_answers_for_clients_that_reset_reach_nobody_and_end_nothing(self):
        """A reset and the answer to it in one turn: the asker is doomed but not buried yet."""
        with Bed() as bed:
            uplink = bed.upstream()
            canary = bed.client()
            for round_number in range(30):
                clients = [bed.client() for _ in range(10)]
                for client in clients:
                    client.sendall(bolt.request(1, "s", b"x"))
                asked = uplink.frames(10)
                bed.engine._stall(20)  # both sides' news are ready when the thread wakes up
                for client in clients:
                    reset(client)
                uplink.sendall(b"".join(bolt.response_to(frame) for frame in asked))
                canary.sendall(bolt.request(round_number, "s", b"canary"))
                asked = uplink.frame()
                uplink.sendall(bolt.response_to(asked))
                assert canary.frame().id == round_number
            assert bed.balanced()
            assert bed.process()["dropped.client_gone"] > 0

    def test_hostile_answers_reach_nobody(self):
        with Bed() as bed:
            client = bed.client()
            client.sendall(bolt.request(1, "s", b"x"))
            uplink = bed.upstream()
            asked = uplink.frame()
            for wrong in (asked.id ^ 0x10000, asked.id + 1, 0x7FFF0000, 0xFFFFFFFF, 0):
                uplink.sendall(bolt.response(wrong, content=b"stray"))
            uplink.sendall(bolt.heartbeat_ack(asked.id))
            uplink.sendall(bolt.response_to(asked, b"mine") * 2)
            assert client.frame().content == b"mine"
            assert client.silent()
            eventually(lambda: bed.process().get("dropped.duplicate") == 1)
            assert bed.process()["dropped.unknown"] == 6


class TestServerRequests:
    def test_to_the_client_that_is_waiting_and_back(self):
        with Bed() as bed:
            idle, busy = bed.client(), bed.client()
            for peer in (idle, busy):
                peer.sendall(bolt.request(1, "s", b"q"))
            uplink = bed.upstream()
            first, second = uplink.frames(2)
            uplink.sendall(bolt.response_to(first, b"a"))
            assert idle.frame().content == b"a"
            uplink.sendall(
                bolt.request(second.id, "callback", b"push")
            )  # an id equal to a request's
            pushed = busy.frame()
            assert (pushed.kind, pushed.content) == (bolt.REQUEST, b"push")
            busy.sendall(bolt.response_to(pushed, b"pushed"))
            got = uplink.frame()
            assert (got.kind, got.id, got.content) == (bolt.RESPONSE, second.id, b"pushed")
            uplink.sendall(bolt.response_to(second, b"b"))
            assert busy.frame().content == b"b"
            assert bed.row(CLUSTER_ROW)["pushes.answered"] == 1
            assert bed.balanced()

    def test_refuse_and_nobody_there(self):
        with Bed(server_requests="refuse") as bed:
            client = bed.client()
            client.sendall(bolt.request(1, "s"))
            uplink = bed.upstream()
            uplink.frame()
            uplink.sendall(bolt.request(5, "callback"))
            got = uplink.frame()
            assert (got.id, got.status) == (5, NO_PROCESSOR)
            assert client.silent()
        with Bed() as bed:
            uplink = bed.upstream()
            uplink.sendall(bolt.request(6, "callback"))
            assert (got := uplink.frame()).id == 6
            assert got.status == NO_PROCESSOR

    def test_client_that_leaves_owing_answers(self):
        with Bed() as bed:
            client = bed.client()
            client.sendall(bolt.request(1, "s"))
            uplink = bed.upstream()
            asked = uplink.frame()
            for i in range(20):
                uplink.sendall(bolt.request(100 + i, "callback"))
            client.frames(20)
            reset(client)
            got = uplink.frames(20)
            assert [(f.id, f.status) for f in got] == [(100 + i, CLOSED) for i in range(20)]
            uplink.sendall(bolt.response_to(asked))
            eventually(lambda: bed.process().get("dropped.client_gone") == 1)
            assert bed.row(CLUSTER_ROW)["pushes.failed.client_gone"] == 20
            assert bed.balanced()


class TestBackPressure:
    def test_both_sides_full_of_requests_and_all_answers_and_heartbeats_arrive(self):
        """Neither side reads before it has asked everything: nothing may wait in a circle."""
        with Bed(
            queue_bytes_max=16 << 20, request_timeout_ms=20000, in_flight_per_connection_max=65536
        ) as bed:
            client = bed.client()
            client.sendall(bolt.request(0, "s", b"first"))
            uplink = bed.upstream()
            uplink.sendall(bolt.response_to(uplink.frame()))
            client.frame()
            count, body = 300, b"x" * 8192
            results: dict[str, list[int]] = {"client": [], "uplink": []}
            beats = {"client": 0, "uplink": 0}

            def play(name: str, me: Peer) -> None:
                for i in range(1, count + 1):
                    me.sendall(bolt.request(i, "s", body))
                    if i % 100 == 0:
                        me.sendall(bolt.heartbeat(100000 + i))
                while len(results[name]) < count or beats[name] < 3:
                    got = me.frame()
                    if got.kind == bolt.REQUEST:
                        me.sendall(bolt.response_to(got, b"ok"))
                    elif got.kind == bolt.HEARTBEAT_ACK:
                        beats[name] += 1
                    else:
                        results[name].append(got.status)

            players = [
                threading.Thread(target=play, args=(name, peer), daemon=True)
                for name, peer in (("client", client), ("uplink", uplink))
            ]
            for player in players:
                player.start()
            for player in players:
                player.join(20)
            assert results == {"client": [0] * count, "uplink": [0] * count}
            assert beats == {"client": 3, "uplink": 3}

    def test_a_client_over_its_quota_is_paused_then_told(self):
        with Bed(queue_bytes_max=256 << 10, request_timeout_ms=20000) as bed:
            uplink = bed.upstream()  # it reads nothing
            client = bed.client()
            body = b"x" * 16384
            count = 2000
            sender = threading.Thread(
                target=lambda: [client.sendall(bolt.request(i, "s", body)) for i in range(count)],
                daemon=True,
            )
            sender.start()
            eventually(lambda: bed.process().get("pauses", 0) >= 1)
            held = eventually(lambda: [c for c in bed.connections() if "quota" in c["held"]])
            assert len(held) == 1
            got = client.frame()  # after at most a second: an explicit answer, not silence
            assert got.status == BUSY
            assert bed.process()["shed"] >= 1
            assert bed.process()["memory"] < 4 << 20
            reader = threading.Thread(target=echo, args=(uplink,), daemon=True)
            reader.start()
            statuses = [got.status] + [client.frame().status for _ in range(count - 1)]
            assert set(statuses) == {0, BUSY}
            sender.join(5)
            assert bed.balanced()

    def test_a_reader_that_does_not_read_is_closed_at_its_cap(self):
        with Bed(queue_bytes_max=512 << 10, in_flight_per_connection_max=65536) as bed:
            slow, canary = bed.client(), bed.client()
            uplink = bed.upstream()
            slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = b"x" * 65536

            def serve() -> None:
                while True:
                    try:
                        asked = uplink.frame()
                        uplink.sendall(
                            bolt.response_to(asked, body if asked.content == b"big" else b"ok")
                        )
                    except (EOFError, OSError):
                        return

            threading.Thread(target=serve, daemon=True).start()
            slow.sendall(b"".join(bolt.request(i, "s", b"big") for i in range(400)))
            eventually(lambda: bed.process().get("slow_consumers") == 1, wait_s=10)
            for i in range(20):
                canary.sendall(bolt.request(i, "s", b"canary"))
                assert canary.frame().content == b"ok"
            assert bed.process()["memory_max"] < 8 << 20
            assert bed.balanced()

    def test_idle_half_frame_and_first_byte_limits(self):
        with Bed(first_byte_timeout_ms=300, frame_timeout_ms=150, idle_timeout_ms=500) as bed:
            silent, dribbler, idle = bed.client(), bed.client(), bed.client()
            dribbler.sendall(bolt.request(1, "s")[:10])
            idle.sendall(bolt.heartbeat(1))
            idle.frame()
            began = time.monotonic()
            for peer, at_s in ((dribbler, 0.15), (silent, 0.3), (idle, 0.5)):
                assert peer.ended()
                assert at_s - 0.03 < time.monotonic() - began < at_s + 0.5
            row = bed.row(LISTENER_ROW)
            assert (
                row["closed.frame_timeout"] == row["closed.first_byte"] == row["closed.idle"] == 1
            )

    def test_memory_that_runs_out_closes_a_connection_not_the_process(self):
        """The k-th allocation fails, for every k: the ledger balances, the next is served."""
        with Bed(request_timeout_ms=500) as bed:
            uplinks: list[Peer] = []

            def serve() -> None:
                while True:
                    try:
                        peer = bed.upstream()
                    except OSError:
                        return
                    uplinks.append(peer)
                    threading.Thread(target=answer, args=(peer,), daemon=True).start()

            def answer(peer: Peer) -> None:
                peer.sock.settimeout(None)
                while True:
                    try:
                        peer.sendall(bolt.response_to(peer.frame(), b"r" * 5000))
                    except (EOFError, OSError):
                        return

            threading.Thread(target=serve, daemon=True).start()
            refused_before = 0
            for k in range(1, 25):
                eventually(lambda: bed.row(ENDPOINT_ROW).get("up") == 1)
                bed.engine._fail_alloc(k)
                client = bed.client()
                client.sock.settimeout(1)
                try:
                    for i in range(6):
                        data = bolt.request(i, "s", b"q" * 9000)
                        client.sendall(data[:7000])
                        client.sendall(data[7000:])
                        client.frame()
                except (EOFError, OSError):
                    pass
                client.close()
                bed.balanced()
            refused = bed.process()["alloc_refused"]
            assert refused > refused_before + 5, "the faults must really have struck"
            bed.engine._fail_alloc(0)
            eventually(lambda: bed.row(ENDPOINT_ROW).get("up") == 1)
            canary = bed.client()
            canary.sendall(bolt.request(1, "s", b"canary"))
            assert canary.frame().content == b"r" * 5000


class TestHooks:
    def test_token_bucket(self):
        with Bed(rule={"rate_per_s": 10, "burst": 5}) as bed:
            client = bed.client()
            uplink = bed.upstream()
            client.sendall(b"".join(bolt.request(i, "s") for i in range(8)))
            for frame in uplink.frames(5):
                uplink.sendall(bolt.response_to(frame))
            statuses = [f.status for f in client.frames(8)]
            assert sorted(statuses) == [0] * 5 + [BUSY] * 3
            eventually(lambda: (client.sendall(bolt.request(9, "s")), client_ok(client, uplink))[1])

    def test_park_and_every_verdict(self):
        with Bed(rule={"park": True}, request_timeout_ms=400) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(
                b"".join(bolt.request(i, "s", b"%d" % i, timeout_ms=0) for i in range(4))
            )
            [first] = bed.wait_event("parked")
            assert bolt.decode(first.data, 1 << 20).content == b"0"
            assert uplink.silent()
            assert bed.row()["requests.in_flight"] == 1
            bed.engine.verdict(first.a, -1)
            assert uplink.frame().content == b"0"
            second = bed.wait_event("parked", 2)[1]
            bed.engine.verdict(second.a, CLUSTER)
            assert uplink.frame().content == b"1"  # order is kept
            third = bed.wait_event("parked", 3)[2]
            bed.engine.verdict(third.a, None)
            got = client.frame()
            assert (got.id, got.status) == (2, BUSY)
            bed.wait_event("parked", 4)  # nobody decides: its deadline does
            ids = {client.frame().id for _ in range(3)}
            assert ids == {0, 1, 3}
            bed.engine.verdict(bed.wait_event("parked", 4)[3].a, -1)  # too late: a counted nothing
            assert uplink.silent()
            assert bed.balanced()

    def test_sampled_events(self):
        with Bed(sample_every=2) as bed:
            client, uplink = bed.client(), bed.upstream()
            for i in range(6):
                client.sendall(bolt.request(i, "s"))
                uplink.sendall(bolt.response_to(uplink.frame()))
                client.frame()
            events = bed.wait_event("sample", 3)
            assert len(events) == 3
            for event in events:
                received, sent, answered, forwarded, endpoint, asker = struct.unpack(
                    "<6Q", event.data
                )
                assert received <= sent <= answered <= forwarded
                assert (endpoint, event.c) == (1, 0)
                assert asker
            assert len({event.a for event in events}) == 3

    def test_send_and_close_by_handle_and_a_stale_one(self):
        with Bed() as bed:
            client = bed.client()
            client.sendall(bolt.heartbeat(1))
            client.frame()
            [handle] = [c["handle"] for c in bed.connections() if c["role"] == "downstream"]
            bed.engine.send(handle, bolt.response(5, content=b"by hand"))
            assert client.frame().content == b"by hand"
            bed.engine.close(handle)
            assert client.ended()
            bed.engine.send(handle, b"nobody")
            bed.engine.close(handle)
            eventually(lambda: bed.process().get("stale_handle") == 2)

    def test_watchdog_reports_a_stall(self):
        with Bed(watchdog=True) as bed:
            bed.engine._stall(350)
            [event] = bed.wait_event("stall")
            assert event.a >= 100
            client = bed.client()
            client.sendall(bolt.heartbeat(1))
            assert client.frame().kind == bolt.HEARTBEAT_ACK

    def test_watchdog_aborts_with_the_stack_of_the_stuck_thread(self):
        script = """
            from tests._ext.bed import Bed
            import time
            bed = Bed(watchdog=True)
            bed.engine._stall(60000)
            time.sleep(30)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == -signal.SIGABRT
        assert "stuck in one turn" in done.stderr
        assert "engine" in done.stderr.split("its stack:")[1]


def client_ok(client: Peer, uplink: Peer) -> bool:
    """Whether the request just sent was let through (answering it if so)."""
    uplink.sock.settimeout(0.05)
    try:
        asked = uplink.frame()
    except TimeoutError:
        assert client.frame().status == BUSY
        return False
    finally:
        uplink.sock.settimeout(5)
    uplink.sendall(bolt.response_to(asked))
    return client.frame().status == 0


class TestCornersOfATurn:
    """Two things of one turn that know nothing of each other."""

    def test_verdict_for_a_client_that_was_closed_in_the_same_turn(self):
        with Bed(rule={"park": True}) as bed:
            client = bed.client()
            client.sendall(bolt.request(1, "s", b"x"))
            [event] = bed.wait_event("parked")
            [handle] = [c["handle"] for c in bed.connections() if c["role"] == "downstream"]
            bed.engine._stall(50)
            bed.engine.close(handle)
            bed.engine.verdict(event.a, -1)
            assert client.ended()
            eventually(lambda: bed.row().get("requests.failed.client_gone") == 1)
            assert bed.balanced()

    def test_a_parked_frame_outlives_a_lower_limit_and_a_large_one_is_told(self):
        with Bed(rule={"park": True}) as bed:
            client, uplink = bed.client(), bed.upstream()
            body = os.urandom(600_000)
            client.sendall(bolt.request(1, "s", body))
            [event] = bed.wait_event("parked")
            assert (event.c > len(body), len(event.data)) == (True, 65536)
            bed.publish(frame_bytes_max=1024)
            bed.engine.verdict(event.a, -1)
            assert uplink.frame().content == body

    def test_answer_and_idle_limit_in_one_turn(self):
        with Bed(idle_timeout_ms=300, request_timeout_ms=5000) as bed:
            client = bed.client()
            client.sendall(bolt.request(1, "s"))
            uplink = bed.upstream()
            asked = uplink.frame()
            later = bed.snapshot(connect_timeout_ms=999)  # other limits: every timer is looked at
            time.sleep(0.4)  # not to synchronise: the limit must have passed
            bed.engine._stall(50)
            bed.engine.publish(later)
            uplink.sendall(bolt.response_to(asked, b"just in time"))
            assert client.frame().content == b"just in time"
            began = time.monotonic()
            assert client.ended()
            assert 0.2 < time.monotonic() - began < 1

    def test_a_client_is_not_told_overload_for_ever(self):
        """Over its quota while nothing could be queued, and served as soon as something can."""
        with Bed(queue_bytes_max=65536) as bed:
            bed.upstream().close()
            address = bed.servers[0].getsockname()
            bed.servers[0].close()
            eventually(lambda: "up" not in bed.row(ENDPOINT_ROW))
            client = bed.client()
            for i in range(3):
                client.sendall(bolt.request(i, "s", b"x" * 60000))
                assert client.frame().status == NO_PROCESSOR
            bed.servers[0] = socket.create_server(address, backlog=64)
            bed.servers[0].settimeout(5)
            uplink = bed.upstream()
            eventually(lambda: bed.row(ENDPOINT_ROW).get("up") == 1)
            client.sendall(bolt.request(9, "s", b"tiny"))
            assert uplink.frame().content == b"tiny"

    def test_per_client_oneways_outlive_their_client(self):
        with Bed(binding="per_client") as bed:
            client = bed.client()
            client.sendall(bolt.oneway(1, "s", b"x") * 5)
            client.close()
            uplink = bed.upstream()
            assert len(uplink.frames(5)) == 5
            assert uplink.ended()
            assert bed.row()["requests.oneway_forwarded"] == 5

    def test_a_second_dialect_that_cannot_connect_backs_off(self):
        with Bed(backoff_ms=1000, backoff_ms_max=1000) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            asked = uplink.frame()
            bed.servers[0].close()
            for i in range(20):
                client.sendall(bolt.request(10 + i, "s", crc=True))
                assert client.frame().status == NO_PROCESSOR
            assert bed.row(ENDPOINT_ROW)["connect_failed"] <= 3
            uplink.sendall(bolt.response_to(asked, b"v1 goes on"))
            assert client.frame().content == b"v1 goes on"

    def test_many_large_answers_at_once_for_a_client_that_reads(self):
        with Bed(queue_bytes_max=1 << 20) as bed:
            client = bed.client()
            client.sendall(b"".join(bolt.request(i, "s") for i in range(3)))
            uplink = bed.upstream()
            data = b"".join(bolt.response_to(f, b"y" * 1_000_000) for f in uplink.frames(3))
            sender = threading.Thread(target=uplink.sendall, args=(data,))
            sender.start()
            assert {len(f.content) for f in client.frames(3)} == {1_000_000}
            sender.join()

    def test_what_a_held_unix_client_sent_before_it_left_is_read(self):
        with Bed(family=socket.AF_UNIX, rule={"park": True}) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.oneway(1, "s", b"first") + bolt.oneway(2, "s", b"second"))
            [first] = bed.wait_event("parked")
            client.close()
            eventually(lambda: bed.process()["turns"] > 3)
            before = bed.process()["turns"]
            bed.engine.verdict(first.a, -1)
            assert uplink.frame().content == b"first"
            bed.engine.verdict(bed.wait_event("parked", 2)[1].a, -1)
            assert uplink.frame().content == b"second"
            assert bed.process()["turns"] - before < 100, "a hung-up connection must not spin"

    def test_a_reload_that_changes_the_binding(self):
        with Bed(binding="per_client") as bed:
            first = bed.client()
            first.sendall(bolt.request(1, "s", b"own"))
            own = bed.upstream()
            asked = own.frame()
            bed.cluster["binding"] = "shared"
            bed.publish()
            second = bed.client()
            shared = bed.upstream()
            eventually(lambda: bed.row(ENDPOINT_ROW).get("up") == 1)
            second.sendall(bolt.request(1, "s", b"shared"))
            assert shared.frame().content == b"shared"
            own.sendall(bolt.response_to(asked, b"done"))
            assert first.frame().content == b"done"
            assert own.ended()


class TestStopping:
    def test_drain_closes_the_quiet_and_serves_the_busy(self):
        with Bed() as bed:
            quiet, busy = bed.client(), bed.client()
            quiet.sendall(bolt.heartbeat(1))
            quiet.frame()
            busy.sendall(bolt.request(1, "s"))
            uplink = bed.upstream()
            asked = uplink.frame()
            bed.engine.drain()
            assert quiet.ended()
            busy.sendall(bolt.request(2, "s"))
            uplink.sendall(bolt.response_to(asked) + bolt.response_to(uplink.frame()))
            assert [f.id for f in busy.frames(2)] == [1, 2]
            assert busy.ended()
            bed.wait_event("drained")
            assert bed.row(LISTENER_ROW)["closed.drained"] == 2

    def test_abort_tells_everybody_in_flight(self):
        with Bed() as bed:
            client = bed.client()
            client.sendall(bolt.request(1, "s") + bolt.request(2, "s"))
            uplink = bed.upstream()
            uplink.frames(2)
            bed.engine.drain()
            bed.engine.abort_in_flight()
            assert sorted((f.id, f.status) for f in client.frames(2)) == [(1, CLOSED), (2, CLOSED)]
            assert client.ended()
            assert bed.balanced()

    def test_a_hundred_snapshots_under_load(self):
        with Bed(endpoints=2, threads=2) as bed:
            stop = threading.Event()

            def serve(server: int) -> None:
                while not stop.is_set():
                    try:
                        peer = bed.upstream(server)
                    except OSError:
                        return
                    threading.Thread(target=echo, args=(peer,), daemon=True).start()

            for i in range(2):
                threading.Thread(target=serve, args=(i,), daemon=True).start()
            statuses: list[int] = []

            def ask() -> None:
                client = bed.client()
                i = 0
                while not stop.is_set():
                    i += 1
                    client.sendall(bolt.request(i, "s"))
                    got = client.frame()
                    assert got.id == i
                    statuses.append(got.status)

            askers = [threading.Thread(target=ask) for _ in range(3)]
            for asker in askers:
                asker.start()
            for i in range(100):
                # However slow the machine is, each snapshot sees traffic before the next one comes.
                answered = len(statuses)
                bed.publish(endpoints=[i % 2, (i + 1) % 2] if i % 3 else [0, 1])
                eventually(lambda answered=answered: len(statuses) > answered + 1)
            stop.set()
            for asker in askers:
                asker.join(5)
            assert len(statuses) > 100
            assert set(statuses) == {0}
            assert bed.balanced()


def test_idle_connection_owns_no_buffer():
    with Bed() as bed:
        clients = [bed.client() for _ in range(200)]
        for client in clients:
            client.sendall(bolt.heartbeat(1))
        for client in clients:
            client.frame()
        before = eventually(lambda: bed.process() if bed.process()["connections"] == 200 else None)
        assert before["memory"] / 200 < 1024


def test_wrong_arguments_are_refused():
    from fastmesh._ext.engine import Engine

    for wrong in ({"threads": 0}, {"threads": 65}, {"spin_us": -1}, {"first_generation": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Engine(**wrong)


class TestToy:
    """The second codec: text ids of any length, answers by order, bodies in parts."""

    @pytest.fixture(autouse=True)
    def _codecs(self):
        from fastmesh._ext.route import register_codec
        from tests.toy import toy

        register_codec("toy", toy.by_id())
        register_codec("toy-order", toy.by_order())

    def test_text_ids_change_the_length_and_come_back(self):
        with Bed(codec="toy") as bed:
            client = bed.client()
            client.sendall(b"ask 999999999999999 s 0 5\nhelloask 7 s 0 0\n")
            uplink = bed.upstream()
            uplink.expect(b"ask 65536 s 0 5\nhello")
            uplink.expect(b"ask 65537 s 0 0\n")
            uplink.sendall(b"ans 65537 0 2\nb!ans 65536 0 2\na!")
            client.expect(b"ans 7 0 2\nb!ans 999999999999999 0 2\na!")
            assert bed.balanced()

    def test_answers_by_order(self):
        """Two clients, one upstream, no ids: the nth answer belongs to the nth request."""
        with Bed(codec="toy-order", request_timeout_ms=300) as bed:
            first, second = bed.client(), bed.client()
            uplink = bed.upstream()
            first.sendall(
                b"ask s 0 1\n1" * 2
            )  # one at a time: the second waits for the first's answer
            uplink.expect(b"ask s 0 1\n1")
            second.sendall(b"ask s 0 1\n2")
            uplink.expect(b"ask s 0 1\n2")
            uplink.sendall(b"ans 0 1\nAans 0 1\nB")
            first.expect(b"ans 0 1\nA")
            second.expect(b"ans 0 1\nB")
            uplink.expect(b"ask s 0 1\n1")
            # an answer after its deadline keeps its place in the order and reaches nobody
            first.expect(b"ans 108 0\n")
            second.sendall(b"ask s 0 1\n3")
            uplink.expect(b"ask s 0 1\n3")
            uplink.sendall(b"ans 0 4\nlateans 0 4\ngood")
            second.expect(b"ans 0 4\ngood")
            assert bed.balanced()

    @pytest.mark.parametrize("binding", ["shared", "per_client"])
    def test_streamed_bodies(self, binding):
        """1:1 the parts go as they come; on a shared connection the frame waits to be whole."""
        with Bed(codec="toy", binding=binding) as bed:
            client = bed.client()
            client.sendall(b"ask 1 s 0 *\n3\nabc")
            uplink = bed.upstream()
            head = b"ask 65536 s 0 *\n"
            if binding == "per_client":
                assert uplink.raw(len(head) + 5) == head + b"3\nabc"
            else:
                assert uplink.silent()
            client.sendall(b"2\nde0\n")
            whole = head + b"3\nabc2\nde0\n"
            rest = b"2\nde0\n" if binding == "per_client" else whole
            assert uplink.raw(len(rest)) == rest
            uplink.sendall(b"ans 65536 0 *\n1\nx")
            if binding == "per_client":
                client.expect(b"ans 1 0 *\n1\nx")
                uplink.close()  # half an answer went out: it must not be taken for whole
                assert client.ended()
            else:
                assert client.silent()
                uplink.sendall(b"0\n")
                client.expect(b"ans 1 0 *\n1\nx0\n")
            assert bed.balanced()

    def test_lost_upstream_discards_the_rest_of_a_streamed_request(self):
        with Bed(codec="toy", binding="per_client") as bed:
            client = bed.client()
            client.sendall(b"ask 1 s 0 *\n3\nabc")
            uplink = bed.upstream()
            uplink.raw(21)
            reset(uplink)
            client.expect(b"ans 1 105 0\n")
            client.sendall(b"2\nde0\nask 2 s 0 0\n")
            again = bed.upstream()
            again.expect(b"ask 65536 s 0 0\n")
            assert bed.balanced()
