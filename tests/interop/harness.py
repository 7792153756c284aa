"""Start the peers and fastmesh as processes and collect their verdicts.

A peer prints `READY` when it is up and a summary as one line of JSON at its end, and exits
non-zero when anything was wrong. Servers serve until their standard input ends, so that none of
them outlives the test, whatever happens to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.interop import setup

ROOT = Path(__file__).resolve().parents[2]
PYTHON_SERVICE = "interop.Python:1.0"
NODE_SERVICE = "interop.Node:1.0"
JAVA_SERVICE = "interop.Java:1.0"
JAVA_TWO_SERVICE = "interop.JavaTwo:1.0"
MOSN_SERVICE = "interop.Mosn:1.0"
NOBODY = "interop.Nobody:1.0"

START_S = 30.0
"""A JVM on a busy two-core machine takes seconds; half a minute means that it will not come."""
HEARTBEAT_MS = 300
"""How quiet a Java client's connection must be before it sends a heartbeat (15 s by default)."""

JAVA = [
    "java",
    "-Xmx128m",
    "-XX:+UseSerialGC",
    # A peer short of memory is a failed run, not a slow one.
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:TieredStopAtLevel=1",
    # Bolt refuses to write on a channel with more than 64 KiB queued, which one body of 3 MiB is.
    "-Dbolt.netty.buffer.high.watermark=33554432",
    "-Dbolt.netty.buffer.low.watermark=16777216",
]


def eventually(what: str, check: Callable[[], Any], within_s: float = 10.0) -> Any:
    """The first true value of `check`. Raises AssertionError when there is none in time."""
    deadline = time.monotonic() + within_s
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {within_s} s: {what} (last: {found!r})"
        time.sleep(0.02)


_given: set[int] = set()


def free_port() -> int:
    """A loopback port, never given before, below the range of outgoing connections."""
    for _ in range(200):
        port = random.SystemRandom().randrange(20000, 32000)
        if port in _given:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given.add(port)
            return port
    raise AssertionError("no free port in 200 tries")


def listening(port: int) -> bool:
    """Whether somebody listens there. Nothing connects: a probe would be a silent client."""
    wanted = f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[1].endswith(wanted):
                    return True
    return False


class Peer:
    """One foreign process with its lines of output and, at its end, its summary."""

    def __init__(self, name: str, command: list[str], logs: Path, **environment: str) -> None:
        self.name = name
        self.lines: list[str] = []
        self._log = (logs / f"{name}.err").open("wb")
        self.process = subprocess.Popen(
            command,
            cwd=logs,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def ready(self, port: int = 0) -> Peer:
        def check() -> bool:
            assert self.process.poll() is None, f"{self.name} ended early: {self.told()}"
            said = any(line.startswith("READY") for line in self.lines)
            return said and (port == 0 or listening(port))

        eventually(f"{self.name} is ready", check, START_S)
        return self

    def tell(self, line: str) -> None:
        """One line on its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def said(self, word: str) -> list[Any]:
        """What stands behind that word in its lines so far."""
        begin = word + " "
        return [json.loads(line[len(begin) :]) for line in self.lines if line.startswith(begin)]

    def told(self) -> str:
        errors = Path(self._log.name).read_bytes()[-2000:].decode(errors="replace")
        return "\n".join([*self.lines[-20:], errors])

    @property
    def errors(self) -> list[str]:
        """What a client's library raised where an error was expected."""
        return [json.loads(line[6:]) for line in self.lines if line.startswith("ERROR ")]

    def end(self, within_s: float) -> dict[str, Any]:
        """Wait for the process; its summary. AssertionError when it ends badly or not in time."""
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} did not end in {within_s} s:\n{self.told()}"
            ) from None
        self._reader.join(5)
        assert code == 0, f"{self.name} exited with {code}:\n{self.told()}"
        summary: dict[str, Any] = json.loads(next(x for x in reversed(self.lines) if x[:1] == "{"))
        return summary

    def stop(self) -> dict[str, Any]:
        """End a server by ending its standard input; its summary."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.end(15)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        # What it had written before is read to the end.
        self._reader.join(5)
        self._log.close()


class Fleet:
    """All processes of one test: whatever it does, none is left over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._peers: list[Peer] = []
        self._numbers: dict[str, int] = defaultdict(int)

    def _start(self, name: str, command: list[str], **environment: str) -> Peer:
        self._numbers[name] += 1
        peer = Peer(f"{name}-{self._numbers[name]}", command, self.folder, **environment)
        self._peers.append(peer)
        return peer

    def close(self) -> None:
        for peer in self._peers:
            peer.kill()

    # servers

    def java_server(self, port: int, *services: str) -> Peer:
        wanted = ",".join(services)
        return self._java(
            "interop.Server", "java-server", {"port": port, "services": wanted}
        ).ready(port)

    def node_server(self, port: int, service: str = NODE_SERVICE) -> Peer:
        return self._node("server.js", "node-server", {"port": port, "service": service}).ready(
            port
        )

    def python_server(self, port: int, service: str = PYTHON_SERVICE) -> Peer:
        return self._python("server.py", "python-server", {"port": port, "service": service}).ready(
            port
        )

    def mosn(self, *listeners: tuple[int, int], goaway: bool = False) -> Peer:
        """MOSN with a Bolt listener for each (port, upstream port), listening."""
        config = self.folder / f"mosn-{listeners[0][0]}.json"
        config.write_text(json.dumps(mosn_config(listeners, config.with_suffix(".log"), goaway)))
        peer = self._start("mosn", [str(setup.MOSN), "start", "-c", str(config)])

        def check() -> bool:
            assert peer.process.poll() is None, f"MOSN ended early: {peer.told()}"
            return all(listening(port) for port, _ in listeners)

        eventually("MOSN listens", check, START_S)
        return peer

    # clients

    def java_client(self, target: int, name: str, **options: object) -> Peer:
        options = {"target": f"127.0.0.1:{target}", "name": name} | options
        return self._java("interop.Client", "java-client", options)

    def node_client(self, target: int, name: str, **options: object) -> Peer:
        options = {"target": f"127.0.0.1:{target}", "name": name} | options
        return self._node("client.js", "node-client", options)

    def python_client(self, target: int, name: str, **options: object) -> Peer:
        options = {"target": f"127.0.0.1:{target}", "name": name} | options
        return self._python("client.py", "python-client", options)

    def _java(self, program: str, peer: str, options: dict[str, object]) -> Peer:
        classes = f"{setup.JAVA_CLASSES}:{setup.JAVA_JARS}/*"
        return self.java_program(classes, program, peer, options)

    def java_program(
        self,
        classes: str,
        program: str,
        peer: str = "java",
        options: Mapping[str, object] = MappingProxyType({}),
    ) -> Peer:
        heartbeat = f"-Dbolt.tcp.heartbeat.interval={HEARTBEAT_MS}"
        return self._start(peer, [*JAVA, heartbeat, "-cp", classes, program, *pairs(options)])

    def _node(self, program: str, peer: str, options: dict[str, object]) -> Peer:
        return self.node_script(setup.PEERS / "node" / program, peer, options)

    def node_script(
        self,
        script: Path,
        peer: str = "node",
        options: Mapping[str, object] = MappingProxyType({}),
    ) -> Peer:
        command = ["node", "--max-old-space-size=128", str(script), *pairs(options)]
        return self._start(peer, command, NODE_PATH=str(setup.NODE_MODULES))

    def _python(self, program: str, peer: str, options: dict[str, object]) -> Peer:
        script = str(setup.PEERS / "python" / program)
        # It asks for a registry on the loopback; a proxy of the environment must not answer.
        return self._start(peer, [str(setup.PYTHON), script, *pairs(options)], no_proxy="*")

    # clients of the message mesh

    def node_push(self, name: str, **options: object) -> Peer:
        return self._node("push_consumer.js", "push-node", {"name": name} | options)

    def java_push(self, name: str, **options: object) -> Peer:
        return self._java("interop.PushConsumer", "push-java", {"name": name} | options)

    def python_push(self, name: str, **options: object) -> Peer:
        script = str(setup.PEERS / "python" / "push_consumer.py")
        command = [sys.executable, script, *pairs({"name": name} | options)]
        return self._start("push-python", command, PYTHONPATH=str(ROOT))

    # fastmesh

    def broker(self, name: str, port: int) -> Peer:
        """An embedded broker that redelivers and checks soon."""
        options = {
            "--listen": f"127.0.0.1:{port}",
            "--admin": f"127.0.0.1:{free_port()}",
            "--data": str(self.folder / name),
            "--name": name,
            "--redeliver": "100ms",
            "--check-after": "300ms",
            "--check-every": "300ms",
        }
        words = [word for pair in options.items() for word in pair]
        command = [sys.executable, "-m", "fastmesh", "broker", *words]
        peer = self._start("broker", command, PYTHONPATH=str(ROOT))

        def check() -> bool:
            assert peer.process.poll() is None, f"the broker ended early: {peer.told()}"
            return listening(port)

        eventually(f"broker {name} listens", check, START_S)
        return peer

    def mesh(self, config: dict[str, Any]) -> Mesh:
        mesh = Mesh(self.folder, config)
        self._peers.append(mesh)
        return mesh


def pairs(options: Mapping[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in options.items()]


def mosn_config(listeners: tuple[tuple[int, int], ...], log: Path, goaway: bool) -> dict[str, Any]:
    extend: dict[str, Any] = {"sub_protocol": "bolt"}
    if goaway:
        extend["bolt"] = {"enable_bolt_goaway": True}

    def listener(port: int) -> dict[str, Any]:
        proxy = {
            "downstream_protocol": "Auto",
            "upstream_protocol": "Auto",
            "router_config_name": f"router-{port}",
            "extend_config": extend,
        }
        return {
            "name": f"listener-{port}",
            "address": f"127.0.0.1:{port}",
            "bind_port": True,
            "filter_chains": [{"filters": [{"type": "proxy", "config": proxy}]}],
        }

    def router(port: int) -> dict[str, Any]:
        rule = {
            "match": {"headers": [{"name": "service", "value": ".*"}]},
            "route": {"cluster_name": f"cluster-{port}"},
        }
        host = {"name": f"host-{port}", "domains": ["*"], "routers": [rule]}
        return {"router_config_name": f"router-{port}", "virtual_hosts": [host]}

    def cluster(port: int, upstream: int) -> dict[str, Any]:
        return {
            "name": f"cluster-{port}",
            "type": "SIMPLE",
            "lb_type": "LB_RANDOM",
            "hosts": [{"address": f"127.0.0.1:{upstream}"}],
        }

    return {
        "servers": [
            {
                "default_log_path": str(log),
                "default_log_level": "WARN",
                "graceful_timeout": "5s",
                "routers": [router(port) for port, _ in listeners],
                "listeners": [listener(port) for port, _ in listeners],
            }
        ],
        "cluster_manager": {"clusters": [cluster(*pair) for pair in listeners]},
    }


Samples = dict[str, list[tuple[dict[str, str], float]]]


class Mesh(Peer):
    """One `fastmesh run`, asked over its admin address as an operator would."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.admin = free_port()
        config = {
            "node": {"name": "interop", "app": "interop"},
            "state_dir": str(folder / "state"),
            "admin": {"listen": f"127.0.0.1:{self.admin}"},
        } | config
        path = self.path = folder / "mesh.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        self._successor: tuple[int, int] | None = None
        """Pid and pidfd of the last one that took over."""
        command = [sys.executable, "-m", "fastmesh", "run", "-c", str(path)]
        super().__init__("fastmesh", command, folder, PYTHONPATH=str(ROOT))

        def check() -> bool:
            assert self.process.poll() is None, f"fastmesh ended early: {self.told()}"
            with contextlib.suppress(OSError):
                return bool(self.get("/readyz"))
            return False

        eventually("fastmesh is ready", check, START_S)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}{path}", timeout=5) as answer:
            text: str = answer.read().decode()
        return text

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.get("/v1/status"))
        return answer

    def metrics(self) -> Samples:
        samples: Samples = defaultdict(list)
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                samples[sample.name].append((sample.labels, sample.value))
        return samples

    def upgrade(self) -> dict[str, Any]:
        """Replace it by a new process; the report. The old one has ended when this returns."""
        command = [sys.executable, "-m", "fastmesh", "upgrade", "--json", "--mode", "move"]
        done = subprocess.run(
            [*command, "-c", str(self.path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            timeout=START_S,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout!r}\n{self.told()}"
        report: dict[str, Any] = json.loads(done.stdout)
        before, pid = self._successor, report["new_pid"]
        self._successor = pid, os.pidfd_open(pid)
        if before is None:
            assert self.process.wait(10) == 0, self.told()
        else:
            self._gone(before)
        return report

    def _gone(self, successor: tuple[int, int]) -> None:
        pid, pidfd = successor
        try:
            assert select.select([pidfd], [], [], 15)[0], f"process {pid} has not ended"
        finally:
            os.close(pidfd)

    def terminate(self) -> None:
        """SIGTERM, as a supervisor sends it, and a clean end."""
        if self._successor is not None:
            successor, self._successor = self._successor, None
            signal.pidfd_send_signal(successor[1], signal.SIGTERM)
            self._gone(successor)
            return
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(15)
        assert code == 0, f"fastmesh exited with {code}:\n{self.told()}"

    def kill(self) -> None:
        if self._successor is not None:
            successor, self._successor = self._successor, None
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(successor[1], signal.SIGKILL)
            self._gone(successor)
        super().kill()


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of a metric over all rows that carry these labels."""
    return sum(
        value for found, value in samples[name] if all(found.get(k) == v for k, v in labels.items())
    )


def ledger(samples: Samples, direction: str) -> dict[str, float]:
    """One direction's ledger."""
    names = ("accepted", "answered", "failed", "expired")
    book = {
        name: total(samples, f"fastmesh_requests_{name}_total", direction=direction)
        for name in names
    }
    book["in_flight"] = total(samples, "fastmesh_requests_in_flight", direction=direction)
    return book


def settled(mesh: Mesh) -> Samples:
    """The metrics once nothing is in flight any more; AssertionError when a ledger is off."""

    def check() -> Samples | None:
        samples = mesh.metrics()
        books = [ledger(samples, direction) for direction in ("request", "push")]
        for book in books:
            owed = book["answered"] + book["failed"] + book["expired"] + book["in_flight"]
            assert book["accepted"] == owed, f"the ledger does not balance: {book}"
        return None if any(book["in_flight"] for book in books) else samples

    found: Samples = eventually("nothing is in flight", check, 5.0)
    return found


@contextlib.contextmanager
def fleet(folder: Path) -> Iterator[Fleet]:
    ships = Fleet(folder)
    try:
        yield ships
    finally:
        ships.close()
