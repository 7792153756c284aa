"""Deliveries of the message mesh: what they cost, and what they add.

    python -m perf.deliver                     5 rounds, the table, perf/results/deliver.json
    python -m perf.deliver --rounds 7 --no-record

A native push source plays the broker and 64 native consumers the application, open loop at
10 000 deliveries a second. Each round measures, back to back: the source straight to the consumers;
through fastmesh; through two of them, so that every delivery travels from mesh to mesh; and plain
requests at the same rate through the same fastmesh, for the cost of a message. Added latency is the
difference to the direct path of the same round, CPU is the kernel's accounting of the first
fastmesh. Every answer is checked: a round with a wrong one is an error, not a figure.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastmesh._ext.load import EchoServer, LoadResult, LoadRun
from perf import host
from perf.contenders import CONTENDERS
from perf.trial import TrialError, free_port, running, tail

ROUNDS = 5
RATE = 10000.0
CONNECTIONS = 64
PREFETCH = 1000
SIZE = 256
DURATION_S = 1.5
SETTLE_S = 0.3
"""Between the first delivery and the measured window."""
TOOK_THE_WAY = 0.9
"""Share of the deliveries that must have come where the trial meant them to: the first ones may
come before a peer has said what it serves."""
READY_S = 15.0
TIMEOUT_MS = 3000
RESULT = host.ROOT / "perf" / "results" / "deliver.json"
README = host.ROOT / "perf" / "README.md"
BEGIN, END = "<!-- deliveries: begin -->", "<!-- deliveries: end -->"

TARGETS = {
    "added_p50_us": 200.0,
    "added_p99_us": 1000.0,
    "peer_added_p99_us": 2000.0,
    "cpu_ratio": 1.5,
}
"""Upper bounds of the medians: added latency of a delivery, the same through a peer, and CPU for
each delivery / CPU for each plain request."""

CONFIG = """\
node: {{name: {name}, app: perf}}
state_dir: {folder}/{name}
admin: {{listen: "unix:{folder}/{name}.admin"}}
listeners:
  - {{name: msg, listen: "127.0.0.1:{msg}", protocol: push}}
  - name: rpc
    listen: "127.0.0.1:{rpc}"
    protocol: bolt
    routes: [{{cluster: upstream}}]
clusters:
  - {{name: upstream, protocol: bolt, endpoints: [{{address: "{service}"}}]}}
push:
  brokers: [{{name: b1, address: "{broker}", topics: ["*"]}}]
  forward: {{listen: "127.0.0.1:{forward}"}}
  schedule: {{file: {folder}/schedule.yaml}}
registration: {{listen: "127.0.0.1:{registration}"}}
"""
SCHEDULE = """\
apps:
  perf:
    nodes:
      - {{name: one, address: "127.0.0.1:{one}", weight: {share}}}
      - {{name: two, address: "127.0.0.1:{two}", weight: 100}}
"""


@dataclass(frozen=True)
class Node:
    """Where one fastmesh of a trial listens."""

    name: str
    msg: int
    rpc: int
    forward: int
    registration: int

    @classmethod
    def anywhere(cls, name: str) -> Node:
        return cls(name, free_port(), free_port(), free_port(), free_port())


@dataclass(frozen=True)
class Round:
    """Figures of one round; latencies in µs."""

    direct_p50_us: float
    direct_p99_us: float
    p50_us: float
    p99_us: float
    peer_p50_us: float
    peer_p99_us: float
    cpu_us_per_delivery: float
    cpu_us_per_request: float

    @property
    def added_p50_us(self) -> float:
        return self.p50_us - self.direct_p50_us

    @property
    def added_p99_us(self) -> float:
        return self.p99_us - self.direct_p99_us

    @property
    def peer_added_p99_us(self) -> float:
        return self.peer_p99_us - self.direct_p99_us

    @property
    def cpu_ratio(self) -> float:
        return self.cpu_us_per_delivery / self.cpu_us_per_request


@contextmanager
def on_load_cpus() -> Iterator[None]:
    """Threads started here stay on the load's CPUs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, host.placement().load)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def source(rate: float) -> EchoServer:
    """A broker that pushes so much to each connection that wants it; not started yet."""
    return EchoServer(
        push_rate=rate,
        push_group="g",
        push_depth=16384,
        push_sizes=(SIZE,),
        push_timeout_ms=TIMEOUT_MS,
    )


def consumers(port: int, connections: int, duration_s: float) -> LoadRun:
    return LoadRun(
        f"127.0.0.1:{port}",
        connections=connections,
        consume=("perf", "perf", "g", PREFETCH),
        duration_ms=int(duration_s * 1000),
        warmup_ms=0,
    )


def register(port: int) -> None:
    """The consumers' group, at one node."""
    group = {"name": "g", "topic": "bench", "role": "subscribe", "prefetch": PREFETCH}
    body = {"app": "perf", "client": "perf", "topics": [{"name": "bench"}], "groups": [group]}
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    link.request(
        "POST", "/v1/registrations", json.dumps(body), {"Content-Type": "application/json"}
    )
    answer = link.getresponse()
    text = answer.read().decode(errors="replace")
    if answer.status not in (200, 201):
        raise TrialError(f"registration: {answer.status} {text}")
    link.close()


def checked(result: LoadResult, what: str) -> LoadResult:
    wrong = {kind: count for kind, count in result.errors.items() if count}
    if wrong or not result.latency.samples:
        raise TrialError(f"{what}: {wrong or 'nothing was delivered'}")
    return result


def await_deliveries(broker: EchoServer, what: str) -> None:
    until = time.monotonic() + READY_S
    while broker.push_result().answered == 0:
        if time.monotonic() > until:
            raise TrialError(f"{what}: no delivery was consumed within {READY_S:.0f} s")
        threading.Event().wait(0.01)


def deliver(
    port: int, broker: EchoServer, also: int | None = None, pid: int = 0
) -> tuple[Any, float]:
    """Consumers at `port` (and one at `also`), the source's figures and the CPU per delivery."""
    life_s = READY_S + DURATION_S + SETTLE_S + 5
    with ExitStack() as stack:
        with on_load_cpus():
            runs = [consumers(port, CONNECTIONS, life_s)]
            if also is not None:
                runs.append(consumers(also, 1, life_s))
            for run in runs:
                run.start()
                stack.callback(run.wait)
                stack.callback(run.stop)
        await_deliveries(broker, "deliveries")
        threading.Event().wait(SETTLE_S)
        before, used = broker.push_result().answered, host.cpu_ns(pid) if pid else 0
        threading.Event().wait(DURATION_S)
        delivered = broker.push_result().answered - before
        used = host.cpu_ns(pid) - used if pid else 0
        if not broker.stop_push(TIMEOUT_MS):
            raise TrialError("deliveries: some were not answered in time")
        figures = checked(broker.push_result(), "deliveries")
    for run in runs:
        wrong = {kind: count for kind, count in run.result().errors.items() if count}
        if wrong:
            raise TrialError(f"consumers: {wrong}")
    consumed = runs[0].result().answered_for_peer
    if consumed < figures.answered * TOOK_THE_WAY:
        raise TrialError(
            f"{consumed} of {figures.answered} deliveries came to the consumers measured"
        )
    return figures, used / 1000 / delivered if delivered else 0.0


def direct() -> Any:
    with on_load_cpus():
        broker = source(RATE / CONNECTIONS)
        broker.start()
    try:
        port = int(broker.address.rpartition(":")[2])
        return deliver(port, broker)[0]
    finally:
        broker.stop()


@contextmanager
def nodes(
    folder: Path, broker: str, service: str, share: int, count: int
) -> Iterator[list[tuple[Node, int]]]:
    """`count` meshed fastmesh; the first alone has the broker, and keeps `share` percent."""
    fastmesh = CONTENDERS["fastmesh"]
    binary = fastmesh.find()
    if binary is None:
        raise TrialError(f"fastmesh is not built: {fastmesh.install}")
    all_nodes = [Node.anywhere("one"), Node.anywhere("two")]
    (folder / "schedule.yaml").write_text(
        SCHEDULE.format(one=all_nodes[0].forward, two=all_nodes[1].forward, share=share)
    )
    nobody = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        found = []
        for node in all_nodes[:count]:
            config = folder / f"{node.name}.yaml"
            address = broker if node.name == "one" else nobody
            config.write_text(
                CONFIG.format(folder=folder, broker=address, service=service, **asdict(node))
            )
            log = folder / f"{node.name}.log"
            command = [binary, "-m", "fastmesh", "run", "-c", str(config)]
            process = stack.enter_context(running(command, host.placement().proxy, log))
            await_registration(node, log)
            found.append((node, process.pid))
        yield found


def await_registration(node: Node, log: Path) -> None:
    until = time.monotonic() + READY_S
    while True:
        try:
            return register(node.registration)
        except (OSError, http.client.HTTPException):
            if time.monotonic() > until:
                raise TrialError(f"{node.name} did not serve: {tail(log)}") from None
            threading.Event().wait(0.05)


def through(count: int, share: int) -> tuple[Any, float, float]:
    """Deliveries through `count` nodes: figures, CPU per delivery, CPU per plain request."""
    with tempfile.TemporaryDirectory(prefix="fmdeliver") as name, ExitStack() as stack:
        with on_load_cpus():
            broker = source(RATE)
            service = EchoServer()
            for server in (broker, service):
                server.start()
                stack.callback(server.stop)
        folder = Path(name)
        with nodes(folder, broker.address, service.address, share, count) as found:
            node, pid = found[0]
            also = found[1][0].msg if count > 1 else None
            if also is None:
                figures, cpu = deliver(node.msg, broker, pid=pid)
                return figures, cpu, plain(node.rpc, pid)
            # The broker must push to the first node for the second one to get anything.
            figures, cpu = deliver(also, broker, also=node.msg, pid=pid)
            return figures, cpu, 0.0


def plain(port: int, pid: int) -> float:
    """CPU µs for each plain request at the same rate."""
    with on_load_cpus():
        run = LoadRun(
            f"127.0.0.1:{port}",
            connections=CONNECTIONS,
            rate=RATE,
            sizes=(SIZE,),
            duration_ms=int((DURATION_S + 2 * SETTLE_S) * 1000),
            warmup_ms=int(SETTLE_S * 1000),
        )
        run.start()
    while run.progress().state != "running":
        if run.wait(0.002):
            break
    before, used = run.progress().answered, host.cpu_ns(pid)
    run.wait(DURATION_S)
    answered, used = run.progress().answered - before, host.cpu_ns(pid) - used
    run.wait()
    checked(run.result(), "plain requests")
    return used / 1000 / answered


def one_round() -> Round:
    straight = direct()
    figures, per_delivery, per_request = through(1, 100)
    peer, _, _ = through(2, 0)

    def us(result: Any) -> tuple[float, float]:
        return result.latency.p50_ns / 1000, result.latency.p99_ns / 1000

    return Round(*us(straight), *us(figures), *us(peer), per_delivery, per_request)


def medians(rounds: list[Round]) -> dict[str, float]:
    names = [*Round.__dataclass_fields__, *TARGETS]
    return {name: statistics.median(getattr(one, name) for one in rounds) for name in names}


def table(found: dict[str, float]) -> str:
    lines = ["| figure | median | target |", "|--|--|--|"]
    for name, value in found.items():
        most = TARGETS.get(name)
        said = "" if most is None else f"≤ {most:g}: {'met' if value <= most else 'MISSED'}"
        lines.append(f"| {name.replace('_', ' ')} | {value:,.2f} | {said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--no-record", action="store_true", help="write no result file")
    options = parser.parse_args()
    places = host.placement()
    print(places.describe(), flush=True)
    rounds: list[Round] = []
    for number in range(options.rounds):
        try:
            rounds.append(one_round())
        except TrialError as error:
            raise SystemExit(f"round {number + 1}: {error}") from error
        last = rounds[-1]
        print(
            f"  {number + 1}/{options.rounds}"
            f"  added {last.added_p50_us:.0f}/{last.added_p99_us:.0f} µs"
            f"  peer p99 {last.peer_added_p99_us:.0f} µs  cpu {last.cpu_us_per_delivery:.2f}"
            f" / {last.cpu_us_per_request:.2f} = {last.cpu_ratio:.2f}",
            flush=True,
        )
    found = medians(rounds)
    print(table(found))
    if not options.no_record:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "host": host.facts(),
            "rate_per_s": RATE,
            "connections": CONNECTIONS,
            "medians": found,
            "targets": TARGETS,
            "rounds": [asdict(one) for one in rounds],
        }
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
        page = README.read_text()
        start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
        said = f"{record['date']}, commit {host.commit()}, {len(rounds)} rounds, medians:\n\n"
        README.write_text(f"{page[:start]}\n{said}{table(found)}\n{page[end:]}")
    raise SystemExit(0 if all(found[name] <= most for name, most in TARGETS.items()) else 1)


if __name__ == "__main__":
    main()
