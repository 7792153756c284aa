"""The load generator must see every fault that it promises to see, and no other.

The faults are made by small services in plain Python that answer wrongly on purpose: a slow,
obvious second reading of the protocol, independent of the codec.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fastmesh._ext.load import (
    BODY_BYTES_MIN,
    ERROR_KINDS,
    SECTIONS_MAX,
    EchoServer,
    LoadResult,
    LoadRun,
    bench,
)

RESPONSE_CLASS = b"com.alipay.sofa.rpc.core.response.SofaResponse"
Reply = Callable[["Peer", int, bytes], bytes | None]
"""What a wrong service does with request (id, body) of a connection: bytes to send, None = hang up.
"""


def response(request_id: int, body: bytes, status: int = 0) -> bytes:
    head = struct.pack(
        "!BBHBIBHHHI", 1, 0, 2, 1, request_id, 1, status, len(RESPONSE_CLASS), 0, len(body)
    )
    return head + RESPONSE_CLASS + body


class Peer:
    """One connection of a wrong service: reads requests, lets `reply` decide."""

    def __init__(self, sock: socket.socket, reply: Reply, shared: dict[str, object]) -> None:
        self.sock = sock
        self.reply = reply
        self.shared = shared
        self.seen = 0

    def _exactly(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            got = self.sock.recv(n - len(data))
            if not got:
                raise ConnectionError
            data += got
        return data

    def serve(self) -> None:
        with suppress(OSError), self.sock:
            while True:
                head = self._exactly(22)
                class_size, header_size, body_size = struct.unpack("!HHI", head[14:22])
                payload = self._exactly(class_size + header_size + body_size)
                self.seen += 1
                answer = self.reply(
                    self, struct.unpack("!I", head[5:9])[0], payload[class_size + header_size :]
                )
                if answer is None:
                    return
                self.sock.sendall(answer)


@contextmanager
def service(reply: Reply) -> Iterator[str]:
    shared: dict[str, object] = {}
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=Peer(sock, reply, shared).serve, daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def load(target: str, **options: object) -> LoadResult:
    defaults: dict[str, object] = {
        "connections": 1,
        "duration_ms": 250,
        "warmup_ms": 0,
        "timeout_ms": 500,
        "sizes": (64,),
    }
    run = LoadRun(target, **(defaults | options))  # type: ignore[arg-type]
    run.start()
    assert run.wait(30.0), run.progress()
    return run.result()


def only(result: LoadResult, *kinds: str) -> None:
    """Exactly these kinds of error and no other."""
    assert not result.ok
    assert {kind for kind, count in result.errors.items() if count} == set(kinds), result.errors


def every(n: int, wrong: Reply) -> Reply:
    """Every nth request of a connection is treated wrongly, the others are echoed."""

    def reply(peer: Peer, request_id: int, body: bytes) -> bytes | None:
        return wrong(peer, request_id, body) if peer.seen % n == 0 else response(request_id, body)

    return reply


def echo(peer: Peer, request_id: int, body: bytes) -> bytes:
    return response(request_id, body)


# --- right answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "unix"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 32},
        {"version": 2},
        {"version": 2, "crc": True, "sizes": (0, 32, 64, 2048, 2049, 16384)},
        {"sizes": (0, 32, 33, 2080, 65536, 300000), "depth": 3},
        {"rate": 2000.0},
        {"service": "", "headers": [("lane", "blue")]},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_every_answer_of_the_echo_service_is_right(
    tmp_path: object, address: str, threads: int, options: dict[str, object]
) -> None:
    if address == "unix":
        address = f"unix:{tmp_path}/echo.sock"
    with EchoServer(address, threads=threads) as server:
        result = load(server.address, connections=8, threads=threads, duration_ms=100, **options)
        stats = server.stats()
    assert result.ok, result.errors
    assert result.connections == 8
    # Nothing was executed twice and nothing fell by the way.
    assert stats.requests == result.sent_total
    assert sum(count for _, count in result.histogram) == result.latency.samples > 0


def test_an_independent_service_is_understood_and_its_answers_are_right() -> None:
    with service(echo) as target:
        result = load(target, connections=4, depth=4, sizes=(32, 5000))
    assert result.ok, result.errors


def test_the_window_counts_what_falls_into_it_and_the_whole_run_is_counted_apart() -> None:
    with EchoServer() as server:
        result = load(server.address, warmup_ms=200, duration_ms=200, rate=1000.0)
    assert result.sent == pytest.approx(200, abs=3)
    assert result.sent_total == pytest.approx(400, abs=3)
    assert result.duration_s == pytest.approx(0.2)


def test_open_loop_latency_counts_from_the_intended_time() -> None:
    """A service that stalls once for 200 ms delays every request that was due meanwhile: half of
    those wait over 100 ms. Counted from the moment of sending, only one of them would show it."""
    stalled = threading.Event()
    gate = threading.Event()

    def stall(peer: Peer, request_id: int, body: bytes) -> bytes:
        if peer.seen == 100 and not stalled.is_set():
            stalled.set()
            gate.wait(0.2)
        return response(request_id, body)

    with service(stall) as target:
        result = load(target, rate=1000.0, depth=1, duration_ms=1000)
    assert result.ok, result.errors
    slow = sum(count for bound, count in result.histogram if bound > 100_000_000)
    assert 60 <= slow <= 300


def test_open_loop_names_what_it_could_not_send() -> None:
    with EchoServer(delay_ms=50) as server:
        result = load(server.address, rate=1000.0, depth=1, duration_ms=300)
    only(result, "unsent")
    assert result.errors["unsent"] + result.sent_total == pytest.approx(300, abs=3)


def test_delay_is_kept_and_order_too() -> None:
    with EchoServer(delay_ms=20) as server:
        result = load(server.address, connections=3, depth=4, version=2, crc=True)
    assert result.ok, result.errors
    assert 20_000_000 <= result.latency.p50_ns < 100_000_000


def test_idle_connections_are_opened_and_stay_silent() -> None:
    with EchoServer() as server:
        run = LoadRun(server.address, connections=200, active=0.01, duration_ms=200, warmup_ms=0)
        with run:
            assert run.wait(10.0)
        stats = server.stats()
    result = run.result()
    assert result.ok
    assert stats.accepted == result.connections == 200
    assert result.latency.max_ns > 0


def test_connect_rate_is_kept() -> None:
    with EchoServer() as server:
        run = LoadRun(
            server.address, connections=50, connect_rate=200.0, duration_ms=50, warmup_ms=0
        )
        run.start()
        assert run.wait(10.0)
    assert run.progress().elapsed_s > 49 / 200 + 0.05


@pytest.mark.parametrize("rate", [0.0, 20000.0])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_agreed_number_of_requests_is_sent_and_then_it_is_over(
    rate: float, threads: int
) -> None:
    with EchoServer() as server:
        result = load(
            server.address,
            connections=3,
            depth=4,
            requests=1001,
            threads=threads,
            rate=rate,
            duration_ms=20000,
        )
        assert server.stats().requests == 1001
    assert result.ok, result.errors
    assert result.sent == result.answered == result.latency.samples == result.sent_total == 1001
    assert result.duration_s < 10


def test_stop_ends_the_window_early_and_loses_nothing() -> None:
    with EchoServer() as server:
        run = LoadRun(server.address, duration_ms=60000, warmup_ms=0)
        run.start()
        while run.progress().answered < 100:
            assert not run.wait(0.01)
        run.stop()
        assert run.wait(10.0)
    result = run.result()
    assert result.ok, result.errors
    assert 0 < result.duration_s < 30


# --- sections, gaps, and how connections ended ---------------------------------------------------


def test_a_stall_is_a_gap_of_its_section_and_of_no_other() -> None:
    stall, go_on = threading.Event(), threading.Event()

    def reply(peer: Peer, request_id: int, body: bytes) -> bytes:
        if stall.is_set():
            go_on.wait(10)
        return response(request_id, body)

    with service(reply) as target:
        run = LoadRun(target, connections=2, warmup_ms=0, duration_ms=60000)
        run.start()
        assert until(lambda: run.progress().answered >= 100)
        assert run.mark() == 1
        stall.set()
        run.wait(0.3)
        stall.clear()
        go_on.set()
        seen = run.progress().answered
        assert until(lambda: run.progress().answered >= seen + 100)
        assert run.mark() == 2
        seen = run.progress().answered
        assert until(lambda: run.progress().answered >= seen + 100)
        run.stop()
        result = run.result()
    assert result.ok, result.errors
    before, during, after = result.sections
    assert 250 < during.gap_ms_max < 5000
    assert during.latency_ms_max > 250
    assert before.gap_ms_max < 250 > after.gap_ms_max
    assert result.gap_ms_max == during.gap_ms_max
    assert 0 == before.begin_s < during.begin_s < after.begin_s
    assert result.answered == sum(section.answered for section in result.sections)
    assert result.kept == 2
    assert result.first_error_s is result.last_error_s is None


def test_a_connection_that_never_answers_is_a_gap_as_long_as_the_window() -> None:
    def reply(peer: Peer, request_id: int, body: bytes) -> bytes:
        first = peer.shared.setdefault("first", peer) is peer
        return b"" if first else response(request_id, body)

    with service(reply) as target:
        result = load(target, connections=2, duration_ms=400, timeout_ms=3000)
    assert result.errors["lost"] == 1
    assert 390 <= result.gap_ms_max <= 400


@pytest.mark.parametrize("reset", [False, True])
def test_ended_connections_are_told_from_kept_ones_and_resets_from_closes(reset: bool) -> None:
    def reply(peer: Peer, request_id: int, body: bytes) -> bytes | None:
        victim = peer.shared.setdefault("victim", peer) is peer
        if not victim or peer.seen < 10:
            return response(request_id, body)
        if reset:
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return None

    with service(reply) as target:
        result = load(target, connections=3)
    only(result, "lost", "disconnected")
    assert result.errors["disconnected"] == result.errors["lost"] == 1
    assert result.resets == int(reset)
    assert result.connections == 3
    assert result.kept == 2
    assert result.first_error_s is not None
    assert result.last_error_s is not None
    assert 0 < result.first_error_s <= result.last_error_s < 0.25
    assert result.sections[0].errors == {"lost": 1, "disconnected": 1}


def test_a_status_is_an_error_of_its_section() -> None:
    with EchoServer(status=4) as server:
        result = load(server.address, requests=10, duration_ms=20000)
    assert result.sections[0].errors == {"status": 10}


def test_sections_need_a_start_and_have_a_bound() -> None:
    with EchoServer() as server:
        run = LoadRun(server.address, duration_ms=60000)
        with pytest.raises(RuntimeError, match="never started"):
            run.mark()
        run.start()
        assert [run.mark() for _ in range(SECTIONS_MAX - 1)] == list(range(1, SECTIONS_MAX))
        with pytest.raises(RuntimeError, match="at most"):
            run.mark()
        run.stop()
        assert len(run.result().sections) == SECTIONS_MAX


# --- wrong answers -------------------------------------------------------------------------------


def test_lost() -> None:
    with service(every(10, lambda peer, request_id, body: b"")) as target:
        result = load(target, depth=4, timeout_ms=1, duration_ms=1500)
    only(result, "lost")


def test_lost_with_its_connection() -> None:
    with service(every(10, lambda peer, request_id, body: None)) as target:
        result = load(target, depth=1)
    only(result, "lost", "disconnected")
    assert result.errors["lost"] == result.errors["disconnected"]


def test_doubled() -> None:
    with service(
        every(10, lambda peer, request_id, body: response(request_id, body) * 2)
    ) as target:
        result = load(target)
    only(result, "doubled")


def test_doubled_is_seen_after_its_slot_was_used_again() -> None:
    def reply(peer: Peer, request_id: int, body: bytes) -> bytes:
        kept = peer.shared.get("kept")
        peer.shared["kept"] = response(request_id, body)
        again = kept if peer.seen == 5 else b""
        assert isinstance(again, bytes)
        return again + response(request_id, body)

    with service(reply) as target:
        result = load(target)
    only(result, "doubled")
    assert result.errors["doubled"] == 1


def test_misrouted_between_requests_of_one_connection() -> None:
    def swap(peer: Peer, request_id: int, body: bytes) -> bytes:
        # Two requests in flight: each gets the other's body.
        kept = peer.shared.pop("kept", None)
        if kept is None:
            peer.shared["kept"] = (request_id, body)
            return b""
        assert isinstance(kept, tuple)
        return response(kept[0], body) + response(request_id, kept[1])

    with service(swap) as target:
        result = load(target, depth=2)
    only(result, "misrouted")


def test_misrouted_between_connections() -> None:
    lock = threading.Lock()

    def stray(peer: Peer, request_id: int, body: bytes) -> bytes:
        # Same ids on both connections, as with real clients: only the body tells.
        with lock:
            kept = peer.shared.get("body")
            peer.shared["body"] = body
        return response(
            request_id, kept if isinstance(kept, bytes) and peer.seen % 7 == 0 else body
        )

    with service(stray) as target:
        result = load(target, connections=2)
    only(result, "misrouted")


@pytest.mark.parametrize("size", [32, 33, 64, 4096])
@pytest.mark.parametrize("at", [0, 8, 20, 31, -1])
def test_torn_at_any_byte(size: int, at: int) -> None:
    def tear(peer: Peer, request_id: int, body: bytes) -> bytes:
        wrong = bytearray(body)
        wrong[at] ^= 1
        return response(request_id, bytes(wrong))

    with service(every(10, tear)) as target:
        result = load(target, sizes=(size,), duration_ms=50)
    only(result, "torn")


@pytest.mark.parametrize(
    "change", [lambda body: body[:-1], lambda body: body + b"x", lambda body: b""]
)
def test_torn_by_length(change: Callable[[bytes], bytes]) -> None:
    def cut(peer: Peer, request_id: int, body: bytes) -> bytes:
        return response(request_id, change(body))

    with service(every(10, cut)) as target:
        result = load(target, duration_ms=50)
    only(result, "torn")


def test_unexpected() -> None:
    with service(
        every(
            10,
            lambda peer, request_id, body: response(0x1FFF0001, b"") + response(request_id, body),
        )
    ) as target:
        result = load(target)
    only(result, "unexpected")


def test_a_goaway_reaches_no_ordinary_client() -> None:
    goaway = struct.pack("!BBHBIBiHHI", 1, 1, 100, 1, 9, 1, 0, 0, 0, 0)
    with service(
        every(10, lambda peer, request_id, body: goaway + response(request_id, body))
    ) as target:
        result = load(target)
    only(result, "unexpected")


def test_late() -> None:
    def late(peer: Peer, request_id: int, body: bytes) -> bytes:
        # Kept until the client gave it up: its next request, a second later, brings it out.
        kept = peer.shared.pop("kept", b"")
        assert isinstance(kept, bytes)
        if peer.seen == 3:
            peer.shared["kept"] = response(request_id, body)
            return b""
        return kept + response(request_id, body)

    with service(late) as target:
        result = load(target, timeout_ms=1, duration_ms=1500)
    only(result, "lost", "late")
    assert result.errors["lost"] == result.errors["late"] == 1


@pytest.mark.parametrize("status", [2, 4, 7, 16])
def test_status_by_code(status: int) -> None:
    with EchoServer(status=status) as server:
        result = load(server.address)
    only(result, f"status.{status}")


def test_undecodable() -> None:
    with service(every(10, lambda peer, request_id, body: b"HTTP/1.1 200 OK\r\n\r\n")) as target:
        result = load(target)
    only(result, "undecodable", "disconnected", "lost")


def test_wrong_checksum_is_undecodable() -> None:
    def broken(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with suppress(OSError), sock:
            while data := sock.recv(65536):
                request_id = data[6:10]
                head = b"\x02\x02\x00\x00\x02\x01" + request_id + b"\x01\x01" + bytes(10)
                sock.sendall(head + b"\0\0\0\0")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=broken, args=(listener,), daemon=True)
        thread.start()
        result = load(f"127.0.0.1:{listener.getsockname()[1]}", version=2, crc=True, duration_ms=30)
    only(result, "undecodable", "disconnected", "lost")


def test_refused_connections_end_the_run_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = load(f"127.0.0.1:{port}", connect_timeout_ms=200)
    only(result, "connect_failed")
    assert result.answered == 0


# --- pushes --------------------------------------------------------------------------------------


def test_pushes_are_answered_and_checked() -> None:
    with EchoServer(push_rate=500.0) as server:
        run = LoadRun(server.address, connections=3, duration_ms=400, warmup_ms=0)
        run.start()
        while run.progress().state != "running":
            assert not run.wait(0.01)
        assert not run.wait(0.2)
        assert server.stop_push()
        assert run.wait(10.0)
        pushed = server.push_result()
    result = run.result()
    assert result.ok, result.errors
    assert pushed.ok, pushed.errors
    assert result.answered_for_peer == pushed.sent_total > 50


def test_wrong_push_answers_are_seen() -> None:
    """A client that answers every push with the first one's body."""

    def client(address: str) -> None:
        host, _, port = address.rpartition(":")
        first = b""
        with suppress(OSError), socket.create_connection((host, int(port))) as sock:
            peer = Peer(sock, echo, {})
            for _ in range(20):
                head = peer._exactly(22)
                sizes = struct.unpack("!HHI", head[14:22])
                body = peer._exactly(sum(sizes))[sizes[0] + sizes[1] :]
                first = first or body
                sock.sendall(response(struct.unpack("!I", head[5:9])[0], first))

    with EchoServer(push_rate=1000.0, push_at_once=True) as server:
        thread = threading.Thread(target=client, args=(server.address,))
        thread.start()
        thread.join(10)
        server.stop_push()
        pushed = server.push_result()
    assert pushed.errors["misrouted"] >= 10


# --- the echo service and its bounds -------------------------------------------------------------


def connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)))
    sock.settimeout(5)
    return sock


def read(sock: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        got = sock.recv(n - len(data))
        assert got, f"closed after {len(data)} of {n} bytes"
        data += got
    return data


@pytest.mark.parametrize(
    ("beat", "ack"),
    [
        # Recorded from sofa-bolt-node.
        (
            "0101000001000000070100000bb80000000000000000",
            "0100000001000000070100000000000000000000",
        ),
        (
            "02020100000100000007010100000bb8000000000000000087629fc5",
            "02020000000100000007010100000000000000000000c24327a9",
        ),
    ],
)
def test_heartbeats_are_answered(beat: str, ack: str) -> None:
    with EchoServer() as server, connected(server.address) as sock:
        sock.sendall(bytes.fromhex(beat))
        assert read(sock, len(ack) // 2).hex() == ack
        assert server.stats().heartbeats == 1


def test_a_request_in_single_bytes_is_echoed() -> None:
    frame = (
        struct.pack("!BBHBIBiHHI", 1, 1, 1, 1, 77, 1, 3000, 3, 0, 40) + b"cls" + bytes(range(40))
    )
    expected = response(77, bytes(range(40)))
    with EchoServer() as server, connected(server.address) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(frame)):
            sock.sendall(frame[i : i + 1])
        assert read(sock, len(expected)) == expected


def test_oneway_is_counted_and_not_answered() -> None:
    oneway = struct.pack("!BBHBIBiHHI", 1, 2, 1, 1, 5, 1, 3000, 0, 0, 3) + b"abc"
    twoway = struct.pack("!BBHBIBiHHI", 1, 1, 1, 1, 6, 1, 3000, 0, 0, 3) + b"abc"
    with EchoServer() as server, connected(server.address) as sock:
        sock.sendall(oneway + twoway)
        assert read(sock, len(response(6, b"abc"))) == response(6, b"abc")
        stats = server.stats()
    assert (stats.oneways, stats.requests) == (1, 1)


def test_a_client_that_does_not_read_is_not_read_from() -> None:
    """The service must not hoard answers: it stops reading, so the client's sends block at last."""
    frame = struct.pack("!BBHBIBiHHI", 1, 1, 1, 1, 6, 1, 3000, 0, 0, 65536) + bytes(65536)
    with EchoServer() as server, connected(server.address) as sock:
        sock.settimeout(0.5)
        # 256 MiB: far above what sockets and the service may hold.
        with pytest.raises(TimeoutError):
            sock.sendall(frame * 4000)
        taken = server.stats().bytes_in
        assert taken < 64 << 20


def test_the_service_stops_with_connections_open_and_frees_its_address() -> None:
    server = EchoServer()
    server.start()
    with connected(server.address) as sock:
        # An answer proves that the connection was accepted; one still in the backlog would be
        # reset.
        sock.sendall(bytes.fromhex("0101000001000000070100000bb80000000000000000"))
        assert len(read(sock, 20)) == 20
        server.stop()
        server.stop()
        assert sock.recv(1) == b""
    with EchoServer(server.address):
        pass


# --- values out of range -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"connections": 0},
        {"depth": -1},
        {"threads": 2},
        {"sizes": ()},
        {"sizes": (BODY_BYTES_MIN - 1,)},
        {"sizes": (1 << 30,)},
        {"crc": True},
        {"version": 3},
        {"active": 1.5},
        {"rate": -1.0},
        {"duration_ms": 0},
        {"service": "x" * 40000},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        load("127.0.0.1:1", **options)


@pytest.mark.parametrize(
    "target", ["127.0.0.1", "127.0.0.1:99999", "unix:", "unix:" + "x" * 200, "::1:80"]
)
def test_bad_addresses_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"address|path"):
        load(target)


def test_result_needs_a_start_and_a_run_starts_once() -> None:
    with EchoServer() as server:
        run = LoadRun(server.address, duration_ms=10, warmup_ms=0)
        with pytest.raises(RuntimeError):
            run.result()
        run.start()
        with pytest.raises(RuntimeError):
            run.start()
        assert run.wait(10.0)
    assert set(ERROR_KINDS) <= set(run.result().errors)


def test_a_run_that_is_dropped_ends_its_threads() -> None:
    with EchoServer() as server:
        assert until(lambda: _threads() == {"fastmesh-echo"})
        run = LoadRun(server.address, duration_ms=60000)
        run.start()
        assert until(lambda: _threads() == {"fastmesh-echo", "fastmesh-load"})
        del run
        assert until(lambda: _threads() == {"fastmesh-echo"})
    assert until(lambda: _threads() == set())


def until(state: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """A thread gets its name, and leaves the list, a moment after the call that says so."""
    deadline = time.monotonic() + timeout_s
    while not state():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.001)
    return True


def _threads() -> set[str]:
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):
            names.append((task / "comm").read_text().strip())
    return {name for name in names if name.startswith("fastmesh-")}


def test_bench_measures_every_part() -> None:
    figures = bench(10000)
    assert set(figures) == {"histogram", "build_256", "check_256"}
    assert all(0 < value < 100000 for value in figures.values())
