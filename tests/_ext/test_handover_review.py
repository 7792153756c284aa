"""An engine hands its world to another: one thing at a time that must come through, and what must
be refused. (Everything else that an engine does is done once more with hand-overs in between in
test_handover_everywhere.py; everything at once in test_handover_stress.py.)"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fastmesh._ext.engine import STATE_VERSION, Saved, inspect
from fastmesh._ext.push import request
from fastmesh._ext.route import Snapshot
from tests._ext import moving
from tests._ext.bed import (
    CLUSTER,
    CLUSTER_ROW,
    ENDPOINT_ROW,
    LISTENER,
    LISTENER_ROW,
    ROUTE_ROW,
    Bed,
    Peer,
    eventually,
)
from tests._ext.moving import move
from tests._ext.push_bed import (
    BROKER_ID,
    FORWARD,
    GROUP_ROW,
    PushBed,
    answer,
    deliver,
    gather,
    headers_of,
    publish,
    result,
)
from tests.reference import bolt

NO_PROCESSOR, BUSY, TIMEOUT, CLOSED = 6, 4, 7, 16
FLIPS = int(os.environ.get("FASTMESH_FLIPS", "400"))
THREADS = [(1, 2), (2, 1), (2, 2)]
RATE: dict[str, Any] = {"rate_per_s": 1, "burst": 3}


def connections(bed: Any) -> list[dict[str, Any]]:
    ticket = bed.engine.ask_connections()
    eventually(lambda: bed.engine.connections_ready(ticket), "connections")
    return list(bed.engine.connections())


def reset(peer: Peer) -> None:
    """End a connection with RST."""
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def read_bytes(bed: Any, count: int) -> None:
    eventually(lambda: bed.process().get("read_bytes", 0) >= count, f"{count} bytes read")


def held(bed: Any, what: str, count: int = 1) -> None:
    """Until so many connections are held for that reason."""
    eventually(lambda: sum(what in c["held"] for c in connections(bed)) >= count, what)


def queued(bed: Any, role: str, least: int = 1) -> int:
    """Until a connection of that role has so many bytes queued; how many it has."""

    def look() -> int:
        most = max(
            (int(c["queued_bytes"]) for c in connections(bed) if c["role"] == role), default=0
        )
        return most if most >= least else 0

    return int(eventually(look, f"{least} bytes queued"))


def in_flight(bed: Any, count: int, row: int = ROUTE_ROW, block: str = "requests") -> None:
    eventually(lambda: bed.row(row).get(f"{block}.in_flight", 0) == count, f"{count} in flight")


class TightBed(Bed):
    """Its peers' sockets take a few KiB, so that a large frame leaves in many pieces."""

    def _server(self) -> socket.socket:
        server = super()._server()
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            server.setsockopt(socket.SOL_SOCKET, option, 4096)
        return server

    def client(self) -> Peer:
        sock = socket.socket(self.family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(5)
        sock.connect(self.front.getsockname())
        self.open.append(Peer(sock))
        return self.open[-1]


class TestHalfFrames:
    def test_a_request_cut_at_every_byte(self):
        sent = bolt.request(7, "com.example.Order:1.0", b"body")
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            for cut in range(1, len(sent)):
                client.sendall(sent[:cut])
                read_bytes(bed, cut)
                move(bed)
                client.sendall(sent[cut:])
                assert uplink.frame().content == b"body"
            assert uplink.silent(0.01)
            assert bed.row()["requests.accepted"] == len(sent) - 1
            assert bed.balanced()

    def test_an_answer_cut_at_every_byte(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(7, "s"))
            said = bolt.response_to(uplink.frame(), b"answer")
            for cut in range(1, len(said)):
                uplink.sendall(said[:cut])
                partial = lambda: any(c["partial_bytes"] == cut for c in connections(bed))  # noqa: B023, E731
                eventually(partial, "read")
                move(bed)
                uplink.sendall(said[cut:])
                assert client.frame().content == b"answer"
                client.sendall(bolt.request(7, "s"))
                said = bolt.response_to(uplink.frame(), b"answer")
            assert bed.balanced()

    @pytest.mark.parametrize("size", [5000, 70000, 2_500_000])
    def test_a_long_one_in_pieces_with_a_move_between_each(self, size):
        body = random.Random(size).randbytes(size)
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            sent = bolt.request(7, "s", body) + bolt.request(8, "s", b"next")
            step = len(sent) // 8 + 1
            for at in range(0, len(sent), step):
                client.sendall(sent[at : at + step])
                read_bytes(bed, min(at + step, len(sent)))
                move(bed)
            asked = uplink.frames(2)
            assert [f.content for f in asked] == [body, b"next"]
            said = bolt.response_to(asked[0], body) + bolt.response_to(asked[1], b"")
            for at in range(0, len(said), step):
                uplink.sendall(said[at : at + step])
                move(bed)
            assert [f.content for f in client.frames(2)] == [body, b""]
            assert bed.balanced()

    def test_whole_frames_behind_one_that_is_held_back(self):
        """Answers by order hold the next request back, many frames may wait in the buffer."""
        with Bed(rule={"park": True}) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(b"".join(bolt.request(i, "s", b"%d" % i) for i in range(5)))
            for i in range(5):
                bed.wait_event("parked")
                bed.events.clear()
                move(bed)
                again = bed.wait_event("parked")[0]
                bed.events.clear()
                bed.engine.verdict(again.a, -1)
                asked = uplink.frame()
                assert asked.content == b"%d" % i
                move(bed)
                uplink.sendall(bolt.response_to(asked))
                assert client.frame().id == i
            assert bed.row()["requests.accepted"] == 5
            assert bed.balanced()


class TestHalfWritten:
    @pytest.mark.parametrize("blobs", [None, moving.of_next_version])
    def test_towards_the_upstream(self, blobs):
        body = random.Random(1).randbytes(3_000_000)
        with TightBed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s", body) + bolt.request(2, "s", b"behind"))
            queued(bed, "upstream", 1000)
            raw = b""
            for _ in range(5):
                move(bed, blobs=blobs)
                raw += uplink.raw(50_000)
            frames = bolt.FrameReader(1 << 30)
            found = frames.feed(raw)
            while len(found) < 2:
                found += frames.feed(uplink.sock.recv(1 << 20))
            assert [f.content for f in found] == [body, b"behind"]
            for frame in found:
                uplink.sendall(bolt.response_to(frame))
            assert {f.id for f in client.frames(2)} == {1, 2}
            assert bed.balanced()

    def test_towards_the_client(self):
        body = random.Random(2).randbytes(3_000_000)
        with TightBed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s") + bolt.request(2, "s"))
            first, second = uplink.frames(2)
            uplink.sendall(bolt.response_to(first, body) + bolt.response_to(second, b"behind"))
            queued(bed, "downstream", 1000)
            raw = b""
            for _ in range(5):
                move(bed)
                raw += client.raw(50_000)
            frames = bolt.FrameReader(1 << 30)
            found = frames.feed(raw)
            while len(found) < 2:
                found += frames.feed(client.sock.recv(1 << 20))
            assert [f.content for f in found] == [body, b"behind"]
            assert bed.balanced()

    def test_one_way_frames_are_counted_once(self):
        with TightBed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.oneway(1, "s", bytes(1_000_000)) * 4)
            queued(bed, "upstream", 1000)
            move(bed)
            for _ in range(4):
                uplink.frame()
                move(bed)
            row = bed.row()
            assert (row["requests.oneway_accepted"], row["requests.oneway_forwarded"]) == (4, 4)

    def test_an_expired_request_that_is_being_written_keeps_its_id(self):
        with TightBed(family=socket.AF_UNIX) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s", bytes(2_000_000), timeout_ms=300))
            queued(bed, "upstream", 1000)
            assert client.frame().status == TIMEOUT
            move(bed)
            asked = uplink.frame()
            client.sendall(bolt.request(2, "s"))
            other = uplink.frame()
            assert other.id != asked.id
            move(bed)
            uplink.sendall(bolt.response_to(asked) + bolt.response_to(other))
            assert client.frame().id == 2
            eventually(lambda: bed.process().get("dropped.late") == 1, "dropped")
            assert bed.balanced()


class TestInFlight:
    @pytest.mark.parametrize("threads", THREADS)
    def test_both_directions_and_any_number_of_threads(self, threads):
        before, after = threads
        with Bed(threads=before, endpoints=1) as bed:
            clients = [bed.client() for _ in range(6)]
            uplinks = [bed.upstream() for _ in range(before)]
            for i, client in enumerate(clients):
                client.sendall(bolt.request(9, "s", b"%d" % i))
            asked = gather(uplinks, 6)
            pushed = {}
            for uplink in {peer for peer, _ in asked}:
                uplink.sendall(bolt.request(77, "callback", b"p"))
            for client, frame in gather(clients, len({peer for peer, _ in asked})):
                pushed[client] = frame
            move(bed, threads=after)
            for uplink, frame in asked:
                uplink.sendall(bolt.response_to(frame, frame.content * 2))
            for client, frame in pushed.items():
                client.sendall(bolt.response_to(frame, b"back"))
            for uplink in {peer for peer, _ in asked}:
                back = uplink.frame()
                assert (back.id, back.content) == (77, b"back")
            for i, client in enumerate(clients):
                assert client.frame().content == b"%d" % i * 2
            assert bed.balanced()
            process = bed.process()
            assert process["connections"] == 6
            # what is too much for the cluster goes, what is missing is opened
            eventually(lambda: bed.process()["upstreams"] == after, "upstreams")

    def test_late_and_doubled_answers_reach_nobody(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s", timeout_ms=50))
            late = uplink.frame()
            assert client.frame().status == TIMEOUT
            client.sendall(bolt.request(2, "s"))
            answered = uplink.frame()
            uplink.sendall(bolt.response_to(answered))
            client.frame()
            gone = bed.client()
            gone.sendall(bolt.request(3, "s"))
            orphan = uplink.frame()
            reset(gone)
            in_flight(bed, 0)
            move(bed)
            uplink.sendall(
                bolt.response_to(late) + bolt.response_to(answered) + bolt.response_to(orphan)
            )
            whys = ("dropped.late", "dropped.duplicate", "dropped.client_gone")
            eventually(lambda: [bed.process().get(why) for why in whys] == [1, 1, 1], "all known")
            client.sendall(bolt.request(4, "s"))
            assert uplink.frame().id not in (late.id, answered.id, orphan.id)
            assert bed.balanced()

    def test_ids_go_on_and_none_comes_twice(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            ids = set()
            for i in range(30):
                client.sendall(bolt.request(i, "s") * 3)
                for frame in uplink.frames(3):
                    assert frame.id not in ids
                    ids.add(frame.id)
                    uplink.sendall(bolt.response_to(frame))
                client.frames(3)
                if i % 3 == 0:
                    move(bed)

    def test_a_deadline_is_what_it_was(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(
                bolt.request(1, "s", timeout_ms=300) + bolt.request(2, "s", timeout_ms=60000)
            )
            uplink.frames(2)
            move(bed)
            first = client.frame()
            assert (first.id, first.status) == (1, TIMEOUT)
            assert client.silent()
            assert bed.row()["requests.in_flight"] == 1
            assert bed.balanced()

    def test_whoever_asked_last_gets_the_servers_requests(self):
        with Bed() as bed:
            first, second, uplink = bed.client(), bed.client(), bed.upstream()
            for client in (first, second):
                client.sendall(bolt.request(1, "s"))
            asked = uplink.frames(2)
            move(bed)
            uplink.sendall(bolt.request(5, "callback"))
            second.sendall(bolt.response_to(second.frame()))
            assert uplink.frame().id == 5
            for frame in asked:
                uplink.sendall(bolt.response_to(frame))
            first.frame()
            second.frame()
            move(bed)
            uplink.sendall(bolt.request(6, "callback"))
            assert second.frame().id
            assert first.silent(0.02)

    def test_a_client_lost_while_it_stood(self):
        with Bed() as bed:
            client, other, uplink = bed.client(), bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            asked = uplink.frame()
            move(bed, before_save=client.close)
            eventually(lambda: bed.process()["connections"] == 1, "gone")
            uplink.sendall(bolt.response_to(asked))
            other.sendall(bolt.request(1, "s"))
            assert uplink.frame()
            assert bed.balanced()

    def test_an_upstream_lost_while_it_stood(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            uplink.frame()
            move(bed, before_save=uplink.close)
            assert client.frame().status == CLOSED
            again = bed.upstream()
            client.sendall(bolt.request(2, "s"))
            again.sendall(bolt.response_to(again.frame(), b"y"))
            assert client.frame().content == b"y"
            assert bed.balanced()

    def test_what_waits_for_a_connect(self):
        """Nobody accepts: the connect is under way, requests are queued on it."""
        with Bed(connect_timeout_ms=3000) as bed:
            client, uplink = bed.client(), bed.upstream()
            fillers = []
            server = bed.servers[0]
            server.listen(0)
            while len(fillers) < 8:
                sock = socket.socket()
                sock.setblocking(False)
                sock.connect_ex(server.getsockname())
                fillers.append(sock)
            uplink.close()
            bed.wait_event("endpoint_down")
            eventually(
                lambda: any(c["state"] == "connecting" for c in connections(bed)), "connecting"
            )
            client.sendall(b"".join(bolt.request(i, "s", b"%d" % i) for i in range(5)))
            queued(bed, "upstream", 5)
            move(bed)
            server.listen(512)
            for sock in fillers:
                sock.close()
            while True:
                found = bed.upstream()
                try:
                    asked = found.frames(5)
                    break
                except (EOFError, OSError):
                    continue
            assert [f.content for f in asked] == [b"%d" % i for i in range(5)]
            for frame in asked:
                found.sendall(bolt.response_to(frame))
            assert {f.id for f in client.frames(5)} == set(range(5))
            assert bed.balanced()


class TestClients:
    def test_idle_ones_stay_and_own_nothing(self):
        with Bed() as bed:
            clients = [bed.client() for _ in range(200)]
            eventually(lambda: bed.process().get("connections") == 200, "connected")
            before = bed.process()["memory"]
            for threads in (2, 1, 1):
                move(bed, threads=threads)
            uplink = bed.upstream()
            assert bed.process()["connections"] == 200
            assert bed.process()["memory"] <= before + (1 << 16)
            for i, client in enumerate(clients):
                client.sendall(bolt.request(i, "s"))
            for frame in uplink.frames(200):
                uplink.sendall(bolt.response_to(frame))
            for i, client in enumerate(clients):
                assert client.frame().id == i
            assert bed.balanced()

    def test_handles_stay_true(self):
        with Bed() as bed:
            client = bed.client()
            eventually(lambda: bed.process().get("connections"), "connected")
            handle = next(c["handle"] for c in connections(bed) if c["role"] == "downstream")
            for _ in range(3):
                move(bed)
            bed.engine.send(handle, bolt.request(3, "from us"))
            assert client.frame().id == 3
            client.close()
            eventually(lambda: not bed.process().get("connections"), "gone")
            move(bed)
            other = bed.client()
            eventually(lambda: bed.process().get("connections"), "connected")
            bed.engine.send(handle, b"x")
            eventually(lambda: bed.process().get("stale_handle") == 1, "told apart")
            assert other.silent(0.02)

    def test_half_closed_ones_get_their_answers(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            client.sock.shutdown(socket.SHUT_WR)
            asked = uplink.frame()
            held(bed, "half_closed")
            move(bed)
            uplink.sendall(bolt.response_to(asked, b"y"))
            assert client.frame().content == b"y"
            assert client.ended()
            assert bed.balanced()

    def test_half_closed_while_it_stood(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            asked = uplink.frame()
            move(bed, before_save=lambda: client.sock.shutdown(socket.SHUT_WR))
            uplink.sendall(bolt.response_to(asked, b"y"))
            assert client.frame().content == b"y"
            assert client.ended()

    def test_lingering_ones_are_not_reset(self):
        with Bed() as bed:
            client = bed.client()
            client.sendall(b"\xff" * 100)
            eventually(lambda: bed.process().get("malformed.protocol"), "malformed")
            gone = client.ended()
            move(bed)
            assert gone
            eventually(lambda: not bed.process().get("connections"), "gone")

    def test_over_quota_and_paused(self):
        with TightBed(family=socket.AF_UNIX, queue_bytes_max=200_000) as bed:
            client, other, uplink = bed.client(), bed.client(), bed.upstream()
            body = bytes(40_000)
            sender = threading.Thread(
                target=lambda: client.sendall(
                    b"".join(bolt.request(i, "s", body) for i in range(12))
                )
            )
            sender.start()
            held(bed, "quota")
            move(bed)
            other.sendall(bolt.request(99, "s", b"other"))
            seen = uplink.frames(13)
            assert sorted(f.content for f in seen) == sorted([body] * 12 + [b"other"])
            for frame in seen:
                uplink.sendall(bolt.response_to(frame))
            assert {f.id for f in client.frames(12)} == set(range(12))
            sender.join()
            assert not any(c["held"] for c in connections(bed))
            assert bed.balanced()

    def test_a_slow_reader_is_held_back_and_released(self):
        with TightBed(queue_bytes_max=400_000) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(b"".join(bolt.request(i, "s") for i in range(9)))
            for frame in uplink.frames(9):
                uplink.sendall(bolt.response_to(frame, bytes(45_000)))
            held(bed, "slow_reader")
            move(bed)
            client.sendall(bolt.request(50, "s"))
            assert uplink.silent(0.02)
            client.frames(9)
            assert uplink.frame()

    def test_silence_is_not_held_against_anybody(self):
        with Bed(idle_timeout_ms=400, frame_timeout_ms=400, heartbeat_ms=300) as bed:
            client, half, uplink = bed.client(), bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            uplink.sendall(bolt.response_to(uplink.frame()))
            client.frame()
            half.sendall(bolt.request(2, "s", b"body")[:10])
            eventually(lambda: bed.process()["connections"] == 2, "connected")
            moving.freeze(bed)
            # not to synchronise: what a slow receiver may take, longer than every limit
            time.sleep(0.6)
            moving.thaw(bed)
            half.sendall(bolt.request(2, "s", b"body")[10:])
            client.sendall(bolt.request(3, "s"))
            seen: set[bytes] = set()
            while len(seen) < 2:
                frame = uplink.frame()
                uplink.sendall(bolt.response_to(frame))
                if frame.kind == bolt.REQUEST:
                    seen.add(frame.data)
            assert client.frame().id == 3
            assert half.frame().id == 2

    def test_heartbeats_of_ours_are_answered_there(self):
        with Bed(heartbeat_ms=100) as bed:
            uplink = bed.upstream()
            beat = uplink.frame()
            move(bed)
            uplink.sendall(bolt.heartbeat_ack(beat.id))
            assert uplink.frame().id != beat.id
            assert bed.process()["upstreams"] == 1
            assert not bed.process().get("dropped.unknown")

    def test_an_unanswered_heartbeat_still_ends_it(self):
        with Bed(heartbeat_ms=100) as bed:
            uplink = bed.upstream()
            uplink.frame()
            move(bed)
            assert uplink.ended()
            assert bed.wait_event("endpoint_down")

    def test_a_connection_of_each_clients_own(self):
        with Bed(binding="per_client") as bed:
            first, second = bed.client(), bed.client()
            first.sendall(bolt.request(1, "s", b"1"))
            mine = bed.upstream()
            asked = mine.frame()
            second.sendall(bolt.request(1, "s", b"2"))
            yours = bed.upstream()
            other = yours.frame()
            move(bed, threads=2)
            move(bed, threads=1)
            mine.sendall(bolt.request(3, "callback") + bolt.response_to(asked))
            pushed = first.frames(2)
            assert {f.id for f in pushed} >= {1}
            first.sendall(bolt.request(2, "s", b"again"))
            assert mine.frame().content == b"again"
            yours.sendall(bolt.response_to(other))
            assert second.frame().id == 1
            second.close()
            assert yours.ended()
            assert mine.silent(0.02)
            assert bed.balanced()

    def test_tokens_are_spent_once(self):
        with Bed(rule=RATE) as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s") * 2)
            uplink.frames(2)
            move(bed)
            client.sendall(bolt.request(2, "s") * 2)
            uplink.frame()
            assert client.frame().status == BUSY
            assert bed.balanced()

    def test_a_parked_frame_has_spent_its_token(self):
        with Bed(rule={**RATE, "park": True}) as bed:
            client, uplink = bed.client(), bed.upstream()
            for i in range(3):
                client.sendall(bolt.request(i, "s"))
                bed.wait_event("parked")
                bed.events.clear()
                for _ in range(3):
                    move(bed)
                    told = bed.wait_event("parked")[0]
                    bed.events.clear()
                bed.engine.verdict(told.a, -1)
                uplink.sendall(bolt.response_to(uplink.frame()))
                assert client.frame().status == 0
            client.sendall(bolt.request(4, "s"))
            assert client.frame().status == BUSY
            assert bed.balanced()

    def test_a_late_verdict_is_for_no_other_frame(self):
        """Tickets are not used twice, whatever the number of threads before and after."""
        with Bed(rule={"park": True}, threads=2) as bed:
            tickets: set[int] = set()
            for threads in (1, 2, 1, 1, 2, 2, 1):
                clients = [bed.client() for _ in range(6)]
                for client in clients:
                    client.sendall(bolt.request(1, "s"))
                told = bed.wait_event("parked", 6)
                new = {event.a for event in told}
                assert not new & tickets
                tickets |= new
                for client in clients:
                    client.close()
                eventually(lambda: not bed.process().get("connections"), "gone")
                bed.events.clear()
                move(bed, threads=threads)


class TestPush:
    def test_deliveries_credit_and_publishes(self):
        with PushBed(topics={"t": [0]}) as bed:
            broker, client = bed.broker(), bed.subscriber("g", prefetch=2)
            broker.sendall(deliver(1, "g") + deliver(2, "g") + deliver(3, "g"))
            asked = client.frames(2)
            assert result(broker.frame()) == "later"
            client.sendall(publish(8, "t", b"up"))
            up = broker.frame()
            move(bed)
            broker.sendall(deliver(4, "g"))
            assert result(broker.frame()) == "later"
            client.sendall(answer(asked[0], "consumed"))
            back = broker.frame()
            assert (back.id, result(back)) == (1, "consumed")
            broker.sendall(deliver(5, "g") + answer(up, "consumed"))
            client.sendall(answer(asked[1], "later"))
            assert {(f.id, result(f)) for f in [broker.frame()]} == {(2, "later")}
            got = client.frames(2)
            assert {f.id for f in got} >= {8}
            assert bed.row()["pushes.in_flight"] == 1
            assert bed.balanced()

    def test_ordered_keys_stay_where_their_last_one_is(self):
        with PushBed(groups={"g": {"ordered": True}}) as bed:
            broker, first = bed.broker(), bed.subscriber("g", prefetch=3)
            broker.sendall(deliver(1, "g", key="k"))
            one = first.frame()
            others = [bed.subscriber("g", prefetch=3) for _ in range(8)]
            move(bed)
            broker.sendall(deliver(2, "g", key="k"))
            two = first.frame()
            move(bed)
            for frame in (one, two):
                first.sendall(answer(frame, "consumed"))
            broker.frames(2)
            where = {}
            for n in range(40):
                broker.sendall(deliver(n + 1, "g", key=f"k{n}"))
                ((client, asked),) = gather([first, *others], 1)
                where[n] = client
                client.sendall(answer(asked, "consumed"))
                broker.frame()
            move(bed)
            for n in range(40):
                broker.sendall(deliver(n + 1, "g", key=f"k{n}"))
                asked = where[n].frame()
                where[n].sendall(answer(asked, "consumed"))
                broker.frame()
            assert bed.balanced()

    def test_a_member_that_left_and_still_owes(self):
        with PushBed(groups={"g": {"ordered": True}}) as bed:
            broker, client = bed.broker(), bed.subscriber("g")
            broker.sendall(deliver(1, "g", key="k"))
            asked = client.frame()
            bed.subscribe(client)
            move(bed)
            bed.subscriber("g")
            broker.sendall(deliver(2, "g", key="k"))
            assert result(broker.frame()) == "later"
            client.sendall(answer(asked, "consumed"))
            assert broker.frame().id == 1
            assert bed.balanced()

    def test_a_broadcast_is_answered_once_by_all(self):
        with PushBed(groups={"g": {"broadcast": True}}) as bed:
            broker = bed.broker()
            clients = [bed.subscriber("g") for _ in range(3)]
            broker.sendall(deliver(6, "g") + deliver(7, "g"))
            asked = [client.frames(2) for client in clients]
            clients[0].sendall(answer(asked[0][0], "consumed") + answer(asked[0][1], "later"))
            eventually(lambda: bed.row()["pushes.answered"] == 2, "two are answered")
            move(bed)
            for client, (one, two) in zip(clients[1:], asked[1:], strict=True):
                assert broker.silent(0.01)
                client.sendall(answer(one, "consumed") + answer(two, "consumed"))
            assert {(f.id, result(f)) for f in broker.frames(2)} == {(6, "consumed"), (7, "later")}
            assert bed.balanced()

    def test_calls_of_python(self):
        with PushBed() as bed:
            broker = bed.broker()
            handle = bed.wait_event("opened")[0].a
            bed.engine.call_many(
                [(handle, t, request(1, {"fm.op": "announce"}), 2000) for t in (7, 8)]
            )
            asked = broker.frames(2)
            frozen = request(1, {"fm.op": "ask"})
            move(bed, before_save=lambda: bed.engine.call_many([(handle, 9, frozen, 2000)]))
            asked.append(broker.frame())
            for frame in asked:
                broker.sendall(answer(frame, "consumed"))
            assert {(e.a, e.b) for e in bed.wait_event("answer", 3)} == {(7, 0), (8, 0), (9, 0)}
            bed.engine.call_many([(handle, 10, frozen, 100)])
            broker.frame()
            move(bed)
            assert [(e.a, e.b) for e in bed.wait_event("answer", 4)][-1] == (10, 8)

    def test_forwards_and_what_peers_serve(self):
        with PushBed(peers=1, nodes={"me": 0, "a": 100}) as bed:
            broker, client, peer = bed.broker(), bed.subscriber("g"), bed.peer(0, "g")
            broker.sendall(deliver(1, "g", b"1") + deliver(2, "g", b"2"))
            asked = peer.frames(2)
            move(bed)
            peer.sendall(answer(asked[0], "no_consumer") + answer(asked[1], "consumed"))
            here = client.frame()
            assert (here.content, headers_of(here)["fm.op"]) == (b"1", "deliver")
            client.sendall(answer(here, "consumed"))
            assert {f.id for f in broker.frames(2)} == {1, 2}
            broker.sendall(deliver(3, "g"))
            assert headers_of(peer.frame())["fm.op"] == "forward"
            assert bed.balanced()

    def test_shares_go_on(self):
        with PushBed(peers=1, nodes={"me": 30, "a": 100}) as bed:
            broker, client, peer = bed.broker(), bed.subscriber("g", prefetch=100), bed.peer(0, "g")
            for i in range(100):
                broker.sendall(deliver(i + 1, "g"))
                ((who, asked),) = gather([client, peer], 1)
                who.sendall(answer(asked, "consumed"))
                broker.frame()
                if i % 7 == 0:
                    move(bed)
            assert bed.row()["forwarded"] == 70
            assert bed.balanced()

    def test_a_control_frame_is_replied_to_there(self):
        with PushBed() as bed:
            client = bed._connect(1)
            client.sendall(request(1, {"fm.op": "hello"}) + request(2, {"fm.op": "subscribe"}))
            told = bed.punted(client)
            move(bed)
            bed.engine.reply(told.a, bed.answered(told, "consumed"), greet=True)
            assert result(client.frame()) == "consumed"
            second = bed.punted(client)
            reply = bed.answered(second, "consumed")
            move(bed, before_save=lambda: bed.engine.reply(second.a, reply))
            assert client.frame().id == 2
            client.sendall(request(3, {"fm.op": "subscribe"}))
            third = bed.punted(client)
            assert third.a == told.a
            bed.engine.reply(third.a, bed.answered(third, "consumed"))
            assert client.frame().id == 3
            assert len(bed.seen("opened")) == 2
            client.close()
            assert bed.wait_event("gone")[0].a == told.a

    def test_what_waits_for_the_hello(self):
        with PushBed(topics={"t": [0]}) as bed:
            broker = bed.accept_broker()
            eventually(lambda: bed.seen("opened"), "opened")
            client = bed.client()
            client.sendall(publish(4, "t", b"early"))
            queued(bed, "upstream")
            move(bed)
            assert broker.silent(0.02)
            bed.greet(broker)
            asked = broker.frame()
            assert asked.content == b"early"
            broker.sendall(answer(asked, "consumed"))
            assert client.frame().id == 4
            assert bed.balanced()

    def test_an_idempotent_publish_may_still_go_elsewhere(self):
        with PushBed(brokers=2) as bed:
            brokers = [bed.broker(0), bed.broker(1)]
            client = bed.client()
            client.sendall(publish(4, "t", b"once", idempotent="1"))
            ((first, asked),) = gather(brokers, 1)
            assert asked.content == b"once"
            move(bed)
            reset(first)
            other = next(b for b in brokers if b is not first)
            asked = other.frame()
            assert asked.content == b"once"
            other.sendall(answer(asked, "consumed"))
            assert result(client.frame()) == "consumed"
            assert bed.balanced()

    def test_a_group_that_is_no_more(self):
        with PushBed(groups={"g": {}, "h": {"ordered": True}}) as bed:
            broker, client = bed.broker(), bed.subscriber("g", "h")
            broker.sendall(deliver(1, "g") + deliver(2, "h", key="k"))
            asked = client.frames(2)
            snapshot = without_group(bed, "h")
            move(bed, snapshot=snapshot)
            broker.sendall(deliver(3, "h", key="k"))
            assert result(broker.frame()) == "no_consumer"
            for frame in asked:
                client.sendall(answer(frame, "consumed"))
            assert {(f.id, result(f)) for f in broker.frames(2)} == {
                (1, "consumed"),
                (2, "consumed"),
            }
            broker.sendall(deliver(4, "g"))
            assert client.frame()
            assert bed.balanced()


def without_group(bed: PushBed, name: str) -> Snapshot:
    """A snapshot that has not that group any more."""
    every = bed.group_items
    bed.group_items = lambda: [one for one in every() if one[1] != name]  # type: ignore[method-assign]
    return bed.snapshot()


class TestToy:
    """The second codec: state of its own, text ids, answers by order, bodies in parts."""

    @pytest.fixture(autouse=True)
    def _codecs(self) -> None:
        from fastmesh._ext.route import register_codec
        from tests.toy import toy

        register_codec("toy", toy.by_id())
        register_codec("toy-order", toy.by_order())

    def test_text_ids(self):
        with Bed(codec="toy") as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(b"ask 999999999999999 s 0 5\nhelloask 7 s 0 0\n")
            uplink.expect(b"ask 65536 s 0 5\nhello")
            uplink.expect(b"ask 65537 s 0 0\n")
            move(bed)
            uplink.sendall(b"ans 65537 0 2\nb!")
            client.expect(b"ans 7 0 2\nb!")
            move(bed)
            uplink.sendall(b"ans 65536 0 2\na!ask 000000000000005 call 0 0\n")
            client.expect(b"ans 999999999999999 0 2\na!")
            client.expect(b"ask 65536 call 0 0\n")
            move(bed)
            client.sendall(b"ans 65536 0 0\n")
            uplink.expect(b"ans 000000000000005 0 0\n")
            assert bed.balanced()

    @pytest.mark.parametrize("threads", [1, 2])
    def test_answers_by_order(self, threads):
        with Bed(codec="toy-order", request_timeout_ms=300) as bed:
            first, second, third = bed.client(), bed.client(), bed.client()
            uplink = bed.upstream()
            for i, client in enumerate((first, second, third)):
                client.sendall(b"ask s 0 1\n%d" % i * 2)
                uplink.expect(b"ask s 0 1\n%d" % i)
            first.expect(b"ans 108 0\n")  # its place in the order is kept
            uplink.expect(b"ask s 0 1\n0")
            move(bed, threads=threads)
            move(bed, threads=1)
            uplink.sendall(b"ans 0 4\nlate")
            for client in (second, third):
                client.expect(b"ans 108 0\n")
            uplink.sendall(b"ans 0 4\nlateans 0 4\nlateans 0 1\n0")
            first.expect(b"ans 0 1\n0")
            for i in (1, 2):
                uplink.expect(b"ask s 0 1\n%d" % i)
            move(bed)
            uplink.sendall(b"ans 0 1\n1ans 0 1\n2")
            second.expect(b"ans 0 1\n1")
            third.expect(b"ans 0 1\n2")
            assert bed.balanced()

    @pytest.mark.parametrize("threads", [1, 2])
    def test_streamed_bodies(self, threads):
        with Bed(codec="toy", binding="per_client") as bed:
            client, other = bed.client(), bed.client()
            client.sendall(b"ask 1 s 0 *\n3\nabc")
            uplink = bed.upstream()
            uplink.expect(b"ask 65536 s 0 *\n3\nabc")
            move(bed, threads=threads)
            client.sendall(b"2\nd")
            eventually(
                lambda: any(c["partial_bytes"] == 3 for c in connections(bed)), "half a chunk"
            )
            move(bed, threads=1)
            client.sendall(b"e0\nask 2 s 0 0\n")
            uplink.expect(b"2\nde0\nask 65537 s 0 0\n")
            uplink.sendall(b"ans 65536 0 *\n1\nx")
            client.expect(b"ans 1 0 *\n1\nx")
            move(bed)
            uplink.sendall(b"1\ny0\nans 65537 0 0\n")
            client.expect(b"1\ny0\nans 2 0 0\n")
            other.sendall(b"ask 1 s 0 0\n")
            assert bed.upstream().raw(16) == b"ask 65536 s 0 0\n"
            client.sendall(b"ask 3 s 0 *\n1\nx")
            uplink.expect(b"ask 131073 s 0 *\n1\nx")
            uplink.sendall(b"ans 131073 0 *\n1\nx")
            client.expect(b"ans 3 0 *\n1\nx")
            move(bed)
            uplink.close()  # half an answer went out: it must not be taken for whole
            assert client.ended()
            assert bed.balanced()


class TestAnotherConfiguration:
    def bare(self, bed: Bed, **how: Any) -> Snapshot:
        """A snapshot in which the listener, or its cluster, is no more (or another)."""
        bed.version += 1
        made = Snapshot(bed.version, bed.limits)
        if how.get("cluster", True):
            made.add_cluster(CLUSTER, row=CLUSTER_ROW, **bed.cluster)
            for i, server in enumerate(bed.servers):
                made.add_endpoint(
                    CLUSTER, i + 1, address=server.getsockname(), weight=100, row=ENDPOINT_ROW + i
                )
        if how.get("listener", True):
            codec = how.get("codec", bed.codec)
            made.add_listener(LISTENER, codec=codec, row=LISTENER_ROW)
            if how.get("cluster", True) and codec == bed.codec:
                made.add_rule(LISTENER, cluster_id=CLUSTER, row=ROUTE_ROW)
        made.seal()
        return made

    def busy(self, bed: Bed) -> tuple[Peer, Peer, Peer, bolt.Frame]:
        """A quiet client, one with a request in flight, the upstream, and the request there."""
        quiet, client, uplink = bed.client(), bed.client(), bed.upstream()
        for peer in (quiet, client):
            peer.sendall(bolt.request(1, "s"))
        uplink.sendall(bolt.response_to(uplink.frame()))
        quiet_first = not quiet.silent(0.2)
        if not quiet_first:
            quiet, client = client, quiet
        assert quiet.frame().id == 1
        return quiet, client, uplink, uplink.frame()

    @pytest.mark.parametrize("how", [{"listener": False}, {"codec": "push"}])
    def test_the_listener_is_gone_or_another(self, how):
        with Bed() as bed:
            quiet, client, uplink, asked = self.busy(bed)
            move(bed, snapshot=self.bare(bed, **how))
            assert quiet.ended()
            move(bed, snapshot=self.bare(bed, **how))
            move(bed, snapshot=self.bare(bed, **how), threads=2)
            uplink.sendall(bolt.response_to(asked, b"y"))
            assert client.frame().content == b"y"
            assert client.ended()
            assert bed.balanced()

    def test_the_cluster_is_gone(self):
        with Bed() as bed:
            quiet, client, uplink, asked = self.busy(bed)
            move(bed, snapshot=self.bare(bed, cluster=False))
            move(bed, snapshot=self.bare(bed, cluster=False))
            quiet.sendall(bolt.request(5, "s"))
            assert quiet.frame().status == NO_PROCESSOR
            uplink.sendall(bolt.response_to(asked, b"y"))
            assert client.frame().content == b"y"
            assert uplink.ended()
            assert not bed.process().get("upstreams")
            assert bed.balanced()

    def test_an_endpoint_is_gone(self):
        with Bed(endpoints=2) as bed:
            client = bed.client()
            uplinks = [bed.upstream(0), bed.upstream(1)]
            client.sendall(b"".join(bolt.request(i, "s") for i in range(20)))
            asked = gather(uplinks, 20)
            assert {peer for peer, _ in asked} == set(uplinks)
            move(bed, snapshot=bed.snapshot([1]))
            assert bed.seen("endpoint_up")[-1].a == 2
            client.sendall(b"".join(bolt.request(i, "s") for i in range(20, 40)))
            asked += [(uplinks[1], frame) for frame in uplinks[1].frames(20)]
            move(bed, snapshot=bed.snapshot([1]))
            for uplink, frame in asked:
                uplink.sendall(bolt.response_to(frame))
            assert {f.id for f in client.frames(40)} == set(range(40))
            assert uplinks[0].ended()
            assert not bed.row(ENDPOINT_ROW).get("connections")
            assert bed.balanced()

    def test_an_endpoint_lives_elsewhere_now(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            asked = uplink.frame()
            old = bed.servers[0]
            bed.servers[0] = bed._server()
            bed.names.clear()
            move(bed)
            client.sendall(bolt.request(2, "s"))
            there = bed.upstream()
            there.sendall(bolt.response_to(there.frame()))
            assert client.frame().id == 2
            uplink.sendall(bolt.response_to(asked))
            assert client.frame().id == 1
            assert uplink.ended()
            old.close()
            assert bed.balanced()

    def test_fewer_connections_and_lower_limits(self):
        with Bed(connections=3) as bed:
            client = bed.client()
            uplinks = [bed.upstream() for _ in range(3)]
            client.sendall(b"".join(bolt.request(i, "s", b"x" * 3000) for i in range(60)))
            asked = gather(uplinks, 60)
            bed.cluster["connections"] = 1
            lower = {
                "in_flight_max": 16, "in_flight_per_connection_max": 1, "connections_max": 1,
                "frame_bytes_max": 1000, "queue_bytes_max": 4096,
            }  # fmt: skip
            move(bed, snapshot=bed.snapshot(**lower))
            for uplink, frame in asked:
                uplink.sendall(bolt.response_to(frame, frame.content[:900]))
            assert {f.id for f in client.frames(60)} == set(range(60))
            eventually(lambda: bed.process()["upstreams"] == 1, "one is left")
            client.sendall(bolt.request(1, "s") + bolt.request(2, "s"))
            assert client.frame().status == BUSY
            refused = bed.client()
            assert refused.ended()
            assert bed.balanced()


def rich_bed() -> Iterator[Bed]:
    """Something of everything that a relay has: the bed stays alive as long as the iterator."""
    with TightBed(
        family=socket.AF_UNIX, endpoints=2, rule=RATE | {"rate_per_s": 10**6, "burst": 10**6}
    ) as bed:
        clients = [bed.client() for _ in range(5)]
        uplinks = [bed.upstream(0), bed.upstream(1)]
        clients[0].sendall(b"".join(bolt.request(i, "s", b"%d" % i) for i in range(8)))
        asked = gather(uplinks, 8)
        asked[0][0].sendall(bolt.request(9, "callback", b"p"))
        gather(clients, 1)
        clients[1].sendall(bolt.request(1, "s", timeout_ms=50))
        gather(uplinks, 1)
        assert clients[1].frame().status == TIMEOUT
        clients[2].sendall(bolt.request(3, "s", b"half a frame")[:-5])
        clients[3].sendall(
            bolt.request(4, "s", bytes(200_000)) * 2 + bolt.oneway(5, "s", bytes(30_000))
        )
        queued(bed, "upstream", 1000)
        yield bed


def rich_push_bed() -> Iterator[PushBed]:
    groups: dict[str, dict[str, Any]] = {
        "g": {}, "o": {"ordered": True}, "b": {"broadcast": True}, "f": {"ordered": True}
    }  # fmt: skip
    with PushBed(brokers=2, peers=1, groups=groups, nodes={"me": 50, "a": 100}) as bed:
        broker, peer = bed.broker(), bed.peer(0, "g", "f")
        waiting = bed.accept_broker(1)
        eventually(lambda: [e for e in bed.seen("opened") if e.b == BROKER_ID + 1], "opened")
        clients = [bed.subscriber("g", "o", "b", "f", prefetch=9) for _ in range(3)]
        other = bed.client(FORWARD)
        broker.sendall(b"".join(deliver(i + 1, "g", b"x%d" % i) for i in range(4)))
        broker.sendall(b"".join(deliver(i + 9, "o", key=f"k{i}") for i in range(4)))
        broker.sendall(b"".join(deliver(i + 20, "f", key=f"k{i}") for i in range(4)))
        broker.sendall(deliver(30, "b") + deliver(31, "b"))
        gather([*clients, peer], 18)
        bed.subscribe(clients[2], "g")
        clients[0].sendall(publish(5, "t", b"again", idempotent="1") + publish(6, "t", b"once"))
        clients[1].sendall(request(7, {"fm.op": "subscribe"}))
        bed.punted(clients[1])
        handle = next(e.a for e in bed.seen("opened") if e.b == BROKER_ID)
        bed.engine.call_many([(handle, 7, request(1, {"fm.op": "announce"}), 60000)])
        other.sendall(
            request(11, {"fm.op": "forward", "fm.group": "g", "fm.hop": "1", "fm.origin": "z"})
        )
        gather(clients, 1)
        eventually(lambda: bed.row(GROUP_ROW)["pushes.in_flight"] == 5, "all of it is in flight")
        assert waiting
        yield bed


def rich_toy_bed() -> Iterator[Bed]:
    from fastmesh._ext.route import register_codec
    from tests.toy import toy

    register_codec("toy", toy.by_id())
    register_codec("toy-order", toy.by_order())
    with Bed(codec="toy", binding="per_client") as bed:
        client, other = bed.client(), bed.client()
        client.sendall(b"ask 123456789012345 s 0 0\nask 2 s 0 *\n3\nabc")
        uplink = bed.upstream()
        uplink.raw(16 + 21)
        uplink.sendall(b"ask 77 c 0 0\n")
        client.raw(15)
        other.sendall(b"ask 1")
        eventually(lambda: any(c["partial_bytes"] == 5 for c in connections(bed)), "half a line")
        yield bed


def rich_order_bed() -> Iterator[Bed]:
    from fastmesh._ext.route import register_codec
    from tests.toy import toy

    register_codec("toy-order", toy.by_order())
    with Bed(codec="toy-order", heartbeat_ms=50) as bed:
        client, other, uplink = bed.client(), bed.client(), bed.upstream()
        client.sendall(b"ask s 50 0\n" * 3)
        other.sendall(b"ask s 0 0\n")
        client.raw(11)
        assert uplink
        yield bed


RICH = {"relay": rich_bed, "push": rich_push_bed, "toy": rich_toy_bed, "order": rich_order_bed}


@pytest.fixture(params=list(RICH))
def rich(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield from RICH[request.param]()


def saved_of(bed: Any) -> tuple[bytes, Saved]:
    """The first world in bytes; the engine stays frozen."""
    moving.freeze(bed)
    saved = moving.save(bed)
    blob = moving.content(saved[0].memfd)
    for one in saved:
        os.close(one.memfd)
    return blob, saved[0]


class Sockets:
    """Descriptors like those of a world, whose other ends say nothing."""

    def __init__(self, count: int) -> None:
        self.pairs = [socket.socketpair() for _ in range(count)]
        for pair in self.pairs:
            pair[0].setblocking(False)

    def copies(self) -> list[int]:
        return [os.dup(pair[0].fileno()) for pair in self.pairs]

    def close(self) -> None:
        for pair in self.pairs:
            for sock in pair:
                sock.close()


@pytest.fixture
def sockets() -> Iterator[list[Sockets]]:
    made: list[Sockets] = []
    yield made
    for one in made:
        one.close()


def taken(bed: Any, blob: bytes, fds: list[int], *, runs: bool = False, **how: Any) -> None:
    """Load one blob into an engine of its own, let it run for a moment if asked, and drop it."""
    engine = moving.successor(bed, 1, **how)
    try:
        engine.adopt(moving.again(bed))
        memfd = moving.sealed(blob)
        try:
            engine.load(0, memfd, fds)
        finally:
            os.close(memfd)
        if runs:
            engine.start_adopted()
            eventually(lambda: [e for e in engine.events() if e.kind == "thawed"], "runs")
    finally:
        assert engine.stop()


class TestBlobs:
    def test_what_it_says_of_itself(self, rich):
        blob, saved = saved_of(rich)
        memfd = moving.sealed(blob)
        said = inspect(memfd)
        os.close(memfd)
        assert said["version"] == STATE_VERSION
        assert said["bytes"] == len(blob) == saved.bytes
        for name in ("downstream", "upstream", "requests", "pushes", "left"):
            assert said[name] == getattr(saved, name), name
        assert said["descriptors"] == len(saved.descriptors)
        again = moving.assembled(blob, list(moving.records(blob)))
        assert again == blob
        moving.thaw(rich)

    def test_every_cut_is_refused(self, rich):
        blob, _ = saved_of(rich)
        dice = random.Random(1)
        cuts = {*range(130), *range(0, len(blob), max(8, len(blob) // 200 & ~7))}
        cuts |= {dice.randrange(len(blob)) for _ in range(50)}
        for cut in sorted(cuts):
            short = blob[:cut]
            for torn in (short, short + bytes(len(blob) - cut)):
                if torn != blob:
                    refused(torn)
            if cut >= 128:  # and with a head that says so
                refused(moving.checked(short[:16] + struct.pack("<Q", cut) + short[24:]))
        moving.thaw(rich)

    def test_every_flip_is_noticed(self, rich):
        blob, _ = saved_of(rich)
        dice = random.Random(2)
        for at in {*range(128), *(dice.randrange(len(blob)) for _ in range(300))}:
            torn = bytearray(blob)
            torn[at] ^= 1 << dice.randrange(8)
            refused(bytes(torn))
        moving.thaw(rich)

    def test_a_liar_is_refused_or_harmless(self, rich, sockets):
        """Anything may stand where the checksum holds: it is refused, or can be loaded and run."""
        blob, saved = saved_of(rich)
        moving.thaw(rich)
        sockets.append(Sockets(len(saved.descriptors)))
        dice = random.Random(FLIPS)
        values = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)
        ran = 0
        for n in range(FLIPS):
            torn = bytearray(blob)
            for _ in range(dice.choice((1, 1, 1, 2, 5))):
                at = dice.randrange(64 if dice.random() < 0.1 else len(torn))
                if dice.random() < 0.4:
                    torn[at] ^= 1 << dice.randrange(8)
                else:
                    width = dice.choice((1, 2, 4, 8))
                    at = at // width * width
                    value = dice.choice(values) & ((1 << 8 * width) - 1)
                    torn[at : at + width] = value.to_bytes(width, "little")
            lie = moving.checked(bytes(torn[: len(blob)]))
            try:
                taken(rich, lie, sockets[0].copies(), runs=n % 4 == 0)
                ran += 1
            except (ValueError, MemoryError):
                pass
        assert ran

    def test_records_left_out_doubled_or_elsewhere(self, rich, sockets):
        blob, saved = saved_of(rich)
        moving.thaw(rich)
        sockets.append(Sockets(len(saved.descriptors)))
        found = list(moving.records(blob))
        dice = random.Random(3)
        for _ in range(FLIPS // 2):
            other = list(found)
            at = dice.randrange(len(other))
            what = dice.random()
            if what < 0.3:
                other.pop(at)
            elif what < 0.6:
                other.insert(at, other[dice.randrange(len(other))])
            else:
                to = dice.randrange(len(other))
                other[at], other[to] = other[to], other[at]
            with contextlib.suppress(ValueError, MemoryError):
                taken(rich, moving.assembled(blob, other), sockets[0].copies(), runs=True)

    def test_versions(self, rich, sockets):
        blob, saved = saved_of(rich)
        moving.thaw(rich)
        sockets.append(Sockets(len(saved.descriptors)))
        found = list(moving.records(blob))
        for version in (STATE_VERSION - 1, STATE_VERSION, STATE_VERSION + 1):
            taken(rich, moving.assembled(blob, found, version=version), sockets[0].copies())
        taken(rich, moving.of_next_version(blob), sockets[0].copies(), runs=True)
        for version in (STATE_VERSION + 2, 1 << 31):
            with pytest.raises(ValueError, match="version"):
                taken(rich, moving.assembled(blob, found, version=version), sockets[0].copies())
        later = [*found[:-1], moving.Record(99, 0, b"", b""), found[-1]]
        with pytest.raises(ValueError, match="kind"):
            taken(rich, moving.assembled(blob, later), sockets[0].copies())

    def test_memory_that_runs_out_at_each_step(self, rich, sockets):
        """Each allocation of a load fails once: it is refused, and all of it is undone."""
        blob, saved = saved_of(rich)  # (frozen, it opens and closes nothing meanwhile)
        sockets.append(Sockets(len(saved.descriptors)))
        before = descriptors()
        for k in range(1, 100_000):
            engine = moving.successor(rich, 1)
            engine.adopt(moving.again(rich))
            engine._fail_alloc(k)
            memfd = moving.sealed(blob)
            try:
                engine.load(0, memfd, sockets[0].copies())
                done = True
            except MemoryError:
                done = False
            finally:
                os.close(memfd)
            assert engine.stop()
            del engine
            if done:
                assert k > 5
                break
        assert descriptors() == before
        moving.thaw(rich)


def refused(blob: bytes) -> None:
    memfd = moving.sealed(blob)
    try:
        with pytest.raises(ValueError, match="state: "):
            inspect(memfd)
    finally:
        os.close(memfd)


class TestRefusals:
    def not_taken(self, bed: Bed, blob: bytes, fds: list[int], why: str) -> None:
        with pytest.raises(ValueError, match=why):
            taken(bed, blob, fds)

    def test_what_is_given_must_fit(self, sockets):
        for bed in rich_bed():
            blob, saved = saved_of(bed)
            moving.thaw(bed)
            count = len(saved.descriptors)
            sockets.append(Sockets(count + 1))
            before = descriptors()
            self.not_taken(bed, blob, sockets[0].copies(), "were given")
            self.not_taken(bed, blob, [], "were given")
            fds = sockets[0].copies()
            os.close(fds.pop())
            os.close(fds.pop())
            self.not_taken(bed, blob, [*fds, fds[0]], "twice")
            assert descriptors() == before

    def test_unsealed_and_other_files(self):
        for bed in rich_order_bed():
            blob, saved = saved_of(bed)
            moving.thaw(bed)
            for seals in (0, moving.SEALS & ~1, moving.SEALS & ~8, moving.SEALS & ~2):
                memfd = moving.sealed(blob, seals)
                with pytest.raises(ValueError, match="sealed"):
                    inspect(memfd)
                os.close(memfd)
            null = os.open("/dev/null", os.O_RDONLY)
            with pytest.raises(ValueError, match="sealed"):
                inspect(null)
            os.close(null)
            assert saved.memfd

    def test_the_order_of_things(self):
        with Bed(threads=2) as bed:
            old = bed.engine
            for call in (old.save, old.thaw, old.release):
                with pytest.raises(RuntimeError):
                    call()
            with pytest.raises(RuntimeError):
                old.start_adopted()
            moving.freeze(bed)
            for refused_call in (
                old.freeze,
                lambda: old.publish(bed.snapshot()),
                lambda: old.listen(LISTENER, bed.front.fileno()),
                lambda: old.unlisten(LISTENER),
                old.drain,
                old.abort_in_flight,
                lambda: old.saved(0),
            ):
                with pytest.raises(RuntimeError):
                    refused_call()
            saved = moving.save(bed)
            with pytest.raises(RuntimeError):
                old.saved(0)
            taker = moving.successor(bed)
            taker.adopt(bed.snapshot())
            handed = [moving.hand(one) for one in saved]
            with pytest.raises(RuntimeError, match="not next"):
                taker.load(1, handed[1][0], [])
            taker.load(0, *handed[0])
            with pytest.raises(RuntimeError, match="1 of 2"):
                taker.start_adopted()
            with pytest.raises(ValueError, match="thread 0 of 2"):
                taker.load(1, handed[0][0], [])
            with pytest.raises(RuntimeError, match="only be stopped"):
                taker.start_adopted()
            assert taker.stop()
            for memfd, fds in handed[1:]:
                os.close(memfd)
                for fd in fds:
                    os.close(fd)
            os.close(handed[0][0])
            moving.thaw(bed)
            with pytest.raises(RuntimeError):
                old.thaw()

    def test_too_little_memory_there_and_nothing_is_lost_here(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(b"".join(bolt.request(i, "s", b"q" * 9999) for i in range(50)))
            asked = uplink.frames(50)
            client.sendall(bolt.request(50, "s", bytes(2_000_000))[:-1])
            eventually(
                lambda: any(int(c["partial_bytes"]) > 1_900_000 for c in connections(bed)), "read"
            )
            moving.freeze(bed)
            saved = moving.save(bed)
            taker = moving.successor(bed)
            taker.adopt(bed.snapshot(memory_bytes_max=1_500_000))
            with pytest.raises(MemoryError, match=r"it needs \d+ bytes"):
                moving.load(taker, saved)
            assert taker.stop()
            moving.thaw(bed)
            for frame in asked:
                uplink.sendall(bolt.response_to(frame))
            assert {f.id for f in client.frames(50)} == set(range(50))
            client.sendall(b"\0")
            assert uplink.frame()
            assert bed.balanced()


class TestGivingUp:
    def test_a_hundred_freezes_under_load(self):
        with Bed(threads=2, endpoints=2) as bed:
            clients = [bed.client() for _ in range(8)]
            uplinks = [bed.upstream(i % 2) for i in range(4)]
            stop = threading.Event()
            ends = [threading.Thread(target=echo, args=(uplink,)) for uplink in uplinks]
            done: list[int] = []
            asks = [threading.Thread(target=ask, args=(c, stop, done)) for c in clients]
            for thread in (*ends, *asks):
                thread.start()
            for n in range(100):
                moving.freeze(bed)
                if n % 3 == 1:
                    for one in moving.save(bed):
                        os.close(one.memfd)
                if n % 3 == 2:
                    bed.engine.save()
                moving.thaw(bed)
                bed.events.clear()
                eventually(lambda: len(done) > 20 * n, "answers go on")  # noqa: B023
            stop.set()
            for thread in asks:
                thread.join(10)
            assert bed.row()["requests.answered"] == bed.row()["requests.accepted"]
            assert bed.balanced()
            for uplink in uplinks:
                uplink.sock.shutdown(socket.SHUT_RDWR)

    def test_a_chain_of_moves_under_load_leaves_nothing_behind(self):
        with Bed(endpoints=2) as bed:
            clients = [bed.client() for _ in range(8)]
            uplinks = [bed.upstream(0), bed.upstream(1)]
            stop = threading.Event()
            ends = [threading.Thread(target=echo, args=(uplink,)) for uplink in uplinks]
            done: list[int] = []
            asks = [threading.Thread(target=ask, args=(c, stop, done)) for c in clients]
            for thread in (*ends, *asks):
                thread.start()
            move(bed)
            before, memory = descriptors(), bed.process()["memory"]
            for n in range(50):
                move(bed)
                bed.events.clear()
                eventually(lambda: len(done) > 20 * n, "answers go on")  # noqa: B023
            stop.set()
            for thread in asks:
                thread.join(10)
            assert not any(thread.is_alive() for thread in asks)
            assert bed.row()["requests.answered"] == bed.row()["requests.accepted"] == len(done)
            assert bed.balanced()
            assert descriptors() == before
            assert bed.process()["memory"] <= memory + (1 << 18)
            for uplink in uplinks:
                uplink.sock.shutdown(socket.SHUT_RDWR)

    def test_straight_after_one_another(self):
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            for _ in range(50):
                bed.engine.freeze()
                bed.engine.thaw()
                client.sendall(bolt.request(1, "s"))
                uplink.sendall(bolt.response_to(uplink.frame()))
                client.frame()
            assert bed.balanced()

    def test_stop_while_frozen_and_after_a_save(self):
        for saves in (False, True):
            with Bed() as bed:
                client = bed.client()
                eventually(lambda: bed.process().get("connections"), "connected")
                moving.freeze(bed)
                if saves:
                    for one in moving.save(bed):
                        os.close(one.memfd)
                assert bed.engine.stop()
                assert client.ended()

    def test_released_nothing_is_shut_down(self):
        """The connections live on in whoever has their descriptors."""
        with Bed() as bed:
            client, uplink = bed.client(), bed.upstream()
            client.sendall(bolt.request(1, "s"))
            uplink.frame()
            moving.freeze(bed)
            [saved] = moving.save(bed)
            fds = [os.dup(fd) for fd in saved.descriptors]
            os.close(saved.memfd)
            bed.engine.release()
            moving.wait(bed, "stopped", 1)
            assert bed.engine.stop()
            assert client.silent(0.02)
            assert uplink.silent(0.02)
            said = {os.fstat(fd).st_ino for fd in fds}
            assert len(said) == 2
            for fd in fds:
                with socket.socket(fileno=fd) as sock:
                    sock.send(b"still here")
            assert client.sock.recv(99) == uplink.sock.recv(99) == b"still here"


def echo(peer: Peer) -> None:
    while True:
        try:
            peer.sendall(bolt.response_to(peer.frame()))
        except (EOFError, OSError):
            return


def ask(client: Peer, stop: threading.Event, done: list[int]) -> None:
    """Questions of many sizes, one after the other, each with its own answer."""
    dice = random.Random(id(client))
    number = 0
    while not stop.is_set():
        number += 1
        body = dice.randbytes(dice.choice((0, 10, 1000, 20_000, 300_000)))
        client.sendall(bolt.request(number, "s", body))
        got = client.frame()
        assert (got.id, got.status) == (number, 0)
        done.append(number)


class TestCounters:
    def test_everything_that_only_grows_goes_on_growing(self):
        with Bed(sample_every=3) as bed:
            client, uplink = bed.client(), bed.upstream()
            before: dict[str, int] = {}
            for i in range(10):
                client.sendall(bolt.request(i, "s"))
                uplink.sendall(bolt.response_to(uplink.frame()))
                client.frame()
                reading = bed._read()
                after = {f"process.{k}": v for k, v in reading.process().items()}
                for row in (ROUTE_ROW, CLUSTER_ROW, LISTENER_ROW, ENDPOINT_ROW):
                    after |= {f"{row}.{k}": v for k, v in reading.row(row).items()}
                    after[f"{row}.latency"] = sum(reading.latency(row))
                grow = {k for k in after if not k.endswith(GAUGES)}
                assert all(after[k] >= before.get(k, 0) for k in grow), i
                assert after[f"{ROUTE_ROW}.latency"] == i + 1
                assert after[f"{ROUTE_ROW}.requests.answered"] == i + 1
                before = after
                move(bed, threads=1 + i % 2)
            assert bed.row(ENDPOINT_ROW)["connections"] >= 1
            assert bed.balanced()

    def test_gauges_are_right(self):
        with Bed(endpoints=2) as bed:
            clients = [bed.client() for _ in range(3)]
            uplinks = [bed.upstream(0), bed.upstream(1)]
            clients[0].sendall(bolt.request(1, "s") * 5)
            asked = gather(uplinks, 5)
            gauges = lambda: {  # noqa: E731
                (row, name): value
                for row in (ROUTE_ROW, LISTENER_ROW, CLUSTER_ROW, ENDPOINT_ROW, ENDPOINT_ROW + 1)
                for name, value in bed.row(row).items()
                if name.endswith(GAUGES)
            }
            before, process = gauges(), bed.process()
            move(bed)
            assert gauges() == before
            for name in ("connections", "upstreams"):
                assert bed.process()[name] == process[name]
            for uplink, frame in asked:
                uplink.sendall(bolt.response_to(frame))
            clients[0].frames(5)
            assert not bed.row().get("requests.in_flight")


GAUGES = ("in_flight", "connections", "up", "ejected", "memory", "upstreams", "parked")
