"""How many messages a second the embedded broker publishes, delivers and settles.

    python -m perf.broker [--seconds 10] [--rate 0] [--sync sync] [--folder DIR] [--profile FILE]

The broker is a process of its own (`fastmesh broker`) with its store in DIR, on the disk that is
meant. This process is the load: publishers keep `--window` publishes unanswered between them (or
send `--rate` a second, whatever comes back), consumers answer every delivery at once. It does as
little as it can for a frame, so that one core of it is enough. At the end everything that was
acknowledged must have been consumed, once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fastmesh._ext.push import parse, request, response, split
from perf.host import TICK_S

TOPIC, GROUP = "load", "readers"
ID_DIGITS = 12
READ_BYTES = 1 << 18
FRAME_BYTES_MAX = 1 << 20
ID_AT = 5
"""Of the request id in a frame of Bolt v1."""
SETTLE_S = 15.0


class Connection:
    """A non-blocking connection that speaks the mesh's protocol."""

    def __init__(self, address: tuple[str, int], name: str) -> None:
        self.sock = socket.create_connection(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self.out = bytearray()
        self.ask({"fm.op": "hello", "fm.protocol": "1", "fm.client": name})

    def ask(self, headers: dict[str, str]) -> None:
        """Blocking, for the beginning."""
        self.sock.sendall(request(1, headers))
        frames: list[bytes] = []
        while not frames:
            frames = self.frames()
        answer = parse(frames[0]).headers
        assert answer["fm.result"] == "consumed", answer

    def frames(self) -> list[bytes]:
        data = self.sock.recv(READ_BYTES)
        if not data:
            raise ConnectionError("the broker has closed the connection")
        data = self._rest + data
        frames, used = split(data, FRAME_BYTES_MAX)
        self._rest = data[used:]
        return frames

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.out:
                del self.out[: self.sock.send(self.out)]


@dataclass
class Seen:
    """What the load has seen."""

    published: int = 0
    acknowledged: int = 0
    put_off: int = 0
    consumed: int = 0
    again: int = 0
    ids: set[bytes] = field(default_factory=set)
    latencies_s: list[float] = field(default_factory=list)
    sent_at: dict[int, float] = field(default_factory=dict)


class Load:
    """Publishers and consumers on one selector."""

    def __init__(
        self, address: tuple[str, int], *, publishers: int, consumers: int, window: int,
        prefetch: int, bytes_each: int, rate: int,
    ) -> None:  # fmt: skip
        self.seen = Seen()
        self._window = window
        self._rate = rate
        headers = {
            "fm.op": "publish", "fm.topic": TOPIC, "fm.id": "0" * ID_DIGITS,
            "fm.key": "key-0000", "fm.born_ms": "1700000000000", "h.trace": "0123456789abcdef",
        }  # fmt: skip
        self._frame = request(1, headers, os.urandom(bytes_each))
        self._id_at = self._frame.index(b"0" * ID_DIGITS)
        self._consumed = b""
        self._selector = selectors.DefaultSelector()
        self.consumers = [Connection(address, f"c{n}") for n in range(consumers)]
        announce = {
            "fm.op": "announce", "fm.epoch": "1", "fm.group": GROUP, "fm.topic": TOPIC,
            "fm.role": "subscribe", "fm.prefetch": str(prefetch), "fm.mode": "cluster",
            "fm.ordered": "0",
        }  # fmt: skip
        for connection in self.consumers:
            connection.ask(announce)
        self.publishers = [Connection(address, f"p{n}") for n in range(publishers)]
        for connection in self.consumers + self.publishers:
            connection.sock.setblocking(False)
            self._selector.register(connection.sock, selectors.EVENT_READ, connection)

    def publish(self, count: int) -> None:
        frame, at, seen = self._frame, self._id_at, self.seen
        now = time.perf_counter()
        head, middle, tail = frame[:ID_AT], frame[ID_AT + 4 : at], frame[at + ID_DIGITS :]
        for _ in range(count):
            seen.published += 1
            number = seen.published
            connection = self.publishers[number % len(self.publishers)]
            connection.out += head + number.to_bytes(4, "big") + middle
            connection.out += b"%012d" % number + tail
            seen.sent_at[number] = now
        for connection in self.publishers:
            connection.flush()

    def take(self, connection: Connection) -> None:
        seen = self.seen
        now = time.perf_counter()
        for frame in connection.frames():
            if frame[1] == 0:
                sent = seen.sent_at.pop(int.from_bytes(frame[ID_AT : ID_AT + 4], "big"))
                if b"consumed" in frame:
                    seen.acknowledged += 1
                    seen.latencies_s.append(now - sent)
                else:
                    seen.put_off += 1
                continue
            if not self._consumed:
                self._consumed = response(1, parse(frame).hint, {"fm.result": "consumed"})
            at = frame.index(b"fm.id") + 9
            id = frame[at : at + ID_DIGITS]
            seen.again += id in seen.ids
            seen.ids.add(id)
            seen.consumed += 1
            done = self._consumed
            connection.out += done[:ID_AT] + frame[ID_AT : ID_AT + 4] + done[ID_AT + 4 :]
        if connection.out:
            connection.flush()

    def run(self, seconds: float) -> float:
        """Returns how long it took until everything acknowledged was consumed."""
        began = time.perf_counter()
        seen = self.seen
        while (now := time.perf_counter()) < began + seconds:
            if self._rate:
                owed = int((now - began) * self._rate) - seen.published
            else:
                owed = self._window - len(seen.sent_at)
            if owed > 0:
                self.publish(owed)
            self._look(0.001)
        until = time.perf_counter() + SETTLE_S
        while seen.sent_at or seen.consumed - seen.again < seen.acknowledged:
            if time.perf_counter() > until:
                raise AssertionError(f"not everything was consumed: {seen.acknowledged} stored,"
                                     f" {seen.consumed} consumed")  # fmt: skip
            self._look(0.01)
        return time.perf_counter() - began

    def _look(self, wait_s: float) -> None:
        for key, _ in self._selector.select(wait_s):
            self.take(key.data)
        for connection in self.consumers + self.publishers:
            if connection.out:
                connection.flush()


@contextlib.contextmanager
def broker(folder: str, sync: str, profile: str = "") -> Iterator[tuple[int, tuple[str, int], str]]:
    """A `fastmesh broker` process: its id, where it listens and its admin interface."""
    program = [sys.executable, "-m", "fastmesh"]
    if profile:
        program = [sys.executable, "-m", "cProfile", "-o", profile, "-m", "fastmesh"]
    addresses = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*program, "broker", *addresses, "--data", folder, "--sync", sync],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        ready = process.stderr.readline()
        found = re.search(r"listen=(\S+):(\d+) admin=(\S+)", ready)
        assert found, ready
        yield process.pid, (found[1], int(found[2])), found[3]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def cpu_s(pid: int) -> dict[str, float]:
    """CPU seconds of each thread of a process, by its name."""
    found: dict[str, float] = {}
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/stat") as file:
            text = file.read()
            name = text[text.index("(") + 1 : text.rindex(")")]
            user, system = text[text.rindex(")") :].split()[12:14]
            # The loop's thread and the writer have the program's name.
            name = "loop" if int(task) == pid else name
            found[name] = found.get(name, 0.0) + (int(user) + int(system)) * TICK_S
    return found


def scrape(admin: str, name: str) -> float:
    with urllib.request.urlopen(f"http://{admin}/metrics") as page:
        text = page.read().decode()
    return sum(
        float(line.split()[-1]) for line in text.splitlines() if re.match(rf"{name}[{{ ]", line)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=int, default=0, help="messages a second; 0: by window")
    parser.add_argument("--window", type=int, default=2048, help="publishes without an answer")
    parser.add_argument("--publishers", type=int, default=4, help="connections")
    parser.add_argument("--consumers", type=int, default=2, help="connections")
    parser.add_argument("--prefetch", type=int, default=512, help="of each consumer")
    parser.add_argument("--bytes", type=int, default=256)
    parser.add_argument("--sync", choices=("sync", "async"), default="sync")
    parser.add_argument("--folder", default=os.getcwd(), help="on the disk that is meant")
    parser.add_argument("--profile", default="", help="have the broker write a cProfile file")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    folder = tempfile.mkdtemp(prefix="broker.", dir=given.folder)
    try:
        with broker(folder, given.sync, given.profile) as (pid, address, admin):
            load = Load(
                address, publishers=given.publishers, consumers=given.consumers,
                window=given.window, prefetch=given.prefetch, bytes_each=given.bytes,
                rate=given.rate,
            )  # fmt: skip
            before, own = cpu_s(pid), time.process_time()
            took_s = load.run(given.seconds)
            own = time.process_time() - own
            used = {name: s - before.get(name, 0.0) for name, s in cpu_s(pid).items()}
            count = scrape(admin, "fastmesh_broker_commit_seconds_count")
            commit_s = scrape(admin, "fastmesh_broker_commit_seconds_sum") / count
            with open(f"/proc/{pid}/statm") as file:
                rss = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seen = load.seen
    times = sorted(seen.latencies_s)
    report = {
        "messages_per_s": round(seen.consumed / took_s),
        "acknowledged": seen.acknowledged,
        "consumed": seen.consumed,
        "again": seen.again,
        "put_off": seen.put_off,
        "publish_p50_ms": round(times[len(times) // 2] * 1000, 2),
        "publish_p99_ms": round(times[len(times) * 99 // 100] * 1000, 2),
        "batches_per_s": round(count / took_s),
        "batch_ms": round(commit_s * 1000, 2),
        "cpu_us_per_message": round(sum(used.values()) / seen.consumed * 1e6, 1),
        "cpu_by_thread": {k: round(s / took_s, 2) for k, s in used.items() if s > 0.01},
        "load_cpu": round(own / took_s, 2),
        "rss_mb": round(rss / 1e6),
    }
    if given.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
