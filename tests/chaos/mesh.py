"""A real `fastmesh run` process for a test: started, watched, judged, and ended within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.peers.sockets import free_port

READY_S = 10.0
STOP_S = 15.0
BASE_RSS_BYTES = 64 << 20
"""The process without any traffic, with room to spare: what its own test promises is 40 MiB."""
DIALECTS = 3
"""A shared upstream connection carries one dialect of Bolt: v1, v2, v2 with CRC."""
IDLE_CPU_SHARE = 0.02
IDLE_WINDOW_S = 0.5
LOG_LINES_PER_S_AND_CAUSE = 22
"""Ten and the line that says how many were held back, twice: two windows may touch one second."""

DIRECTIONS = ("request", "push")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Labels = frozenset[tuple[str, str]]


class Metrics:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for line in text.splitlines():
            if not line or line.startswith("#"):
                continue
            name, _, rest = line.partition("{")
            labels: dict[str, str] = {}
            if rest:
                inside, _, value = rest.rpartition("}")
                labels = dict(LABEL.findall(inside))
            else:
                name, _, value = line.partition(" ")
            self.samples.setdefault(name, []).append((labels, float(value.split()[0])))

    def sum(self, name: str, **labels: str) -> float:
        """Over all samples that carry these labels; 0 when there are none."""
        return sum(
            value
            for found, value in self.samples.get(f"fastmesh_{name}", [])
            if labels.items() <= found.items()
        )

    def ledger(self, direction: str) -> dict[str, float]:
        return {
            "accepted": self.sum("requests_accepted_total", direction=direction),
            "answered": self.sum("requests_answered_total", direction=direction),
            "failed": self.sum("requests_failed_total", direction=direction),
            "expired": self.sum("requests_expired_total", direction=direction),
            "in_flight": self.sum("requests_in_flight", direction=direction),
        }

    def check_ledger(self) -> None:
        """accepted = answered + failed + expired + in flight, in both directions."""
        for direction in DIRECTIONS:
            books = self.ledger(direction)
            accepted = books.pop("accepted")
            assert accepted == sum(books.values()), f"{direction}: accepted {accepted} != {books}"

    def failed(self, cause: str, direction: str = "request") -> float:
        return self.sum("requests_failed_total", direction=direction, cause=cause)

    def dropped(self, cause: str) -> float:
        return self.sum("frames_dropped_total", cause=cause)

    @property
    def in_flight(self) -> float:
        return self.sum("requests_in_flight")


class Answer:
    """What the admin interface said."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        self.status = int(head.split(b" ", 2)[1])
        if b"transfer-encoding: chunked" in head.lower():
            self.body = _unchunk(self.body)

    def json(self) -> Any:
        return json.loads(self.body)


def _unchunk(data: bytes) -> bytes:
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        count = int(size, 16)
        out, data = out + data[:count], data[count + 2 :]
    return out


async def until(
    what: Callable[[], bool] | Callable[[], Awaitable[bool]],
    why: str,
    *,
    within_s: float = 5.0,
    every_s: float = 0.01,
) -> float:
    """Poll a state until it holds. Returns how long that took; AssertionError when it never
    does."""
    began = time.monotonic()
    while True:
        holds = what()
        if isinstance(holds, bool):
            done = holds
        else:
            done = await holds
        took = time.monotonic() - began
        if done:
            return took
        assert took < within_s, f"not within {within_s} s: {why}"
        await asyncio.sleep(every_s)


class Adopted:
    """A process that somebody else started, with the face of asyncio's: a successor, whose parent
    is gone when it serves. It is ours to reap then, because this process adopts orphans."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.fd = os.pidfd_open(pid)

    @staticmethod
    def adopt_orphans() -> None:
        pr_set_child_subreaper = 36
        assert ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0) == 0

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.fd, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _reaped(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(0):
            return False
        try:
            found = os.waitid(os.P_PIDFD, self.fd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return False  # its parent still lives, and may reap it
        if found is None:
            return False
        how = found.si_status
        self.returncode = how if found.si_code == os.CLD_EXITED else -how
        os.close(self.fd)
        return True

    async def wait(self) -> int:
        while self.returncode is None and not self._reaped():  # noqa: ASYNC110 - its callers have a deadline
            await asyncio.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


class Mesh:
    """`clusters`: name -> endpoints ("host:port" or (address, weight)), or a mapping as the
    configuration has it. Without `routes`, each cluster serves the service of its name and the
    first one the rest."""

    def __init__(
        self,
        folder: Path,
        clusters: Mapping[str, Sequence[Any] | Mapping[str, Any]],
        *,
        routes: Sequence[Mapping[str, Any]] | None = None,
        limits: Mapping[str, int] | None = None,
        threads: int = 1,
        listen: str = "",
        environment: Mapping[str, str] | None = None,
        fds_max: int = 0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.threads = threads
        self.address = listen or f"127.0.0.1:{free_port()}"
        self.admin_port = free_port()
        self.admin_socket = ""
        """The path of a UNIX socket to ask the admin interface on, in place of the port."""
        self.admin_headers: dict[str, str] = {}
        self.path = folder / "mesh.yaml"
        self.log_path = folder / "mesh.log"
        self.environment = dict(environment or {})
        self.fds_max = fds_max
        self.config: dict[str, Any] = {
            "node": {"name": "chaos", "app": "tests"},
            "state_dir": "./run",
            "engine": {"threads": threads},
            "admin": {"listen": f"127.0.0.1:{self.admin_port}"},
            "listeners": [
                {
                    "name": "rpc",
                    "listen": self.address,
                    "protocol": "bolt",
                    "routes": list(routes) if routes else default_routes(list(clusters)),
                }
            ],
            "clusters": [cluster(name, what) for name, what in clusters.items()],
            "limits": {
                "memory_bytes_max": 256 << 20,
                "connections_max": 5000,
                "stop_timeout_ms": 2000,
                **(limits or {}),
            },
            **(extra or {}),
        }
        self.process: asyncio.subprocess.Process | Adopted
        self.left: list[asyncio.subprocess.Process | Adopted] = []
        """Those that have given everything to a successor."""
        self.fds_at_start = 0
        self.started_at = 0.0
        self.killed = False

    # --- life ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Mesh:
        await self.start()
        return self

    async def start(self) -> None:
        self.write_config()
        limit = f"ulimit -n {self.fds_max}; " if self.fds_max else ""
        with self.log_path.open("ab") as log:
            self.started_at = time.monotonic()
            self.process = await asyncio.create_subprocess_exec(
                "/bin/sh",
                "-c",
                f'{limit}exec "$@"',
                "sh",
                sys.executable,
                "-m",
                "fastmesh",
                *self.arguments(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )
        self.killed = False

        async def ready() -> bool:
            assert self.process.returncode is None, f"it ended: {self.log()[-2000:]}"
            with contextlib.suppress(OSError):
                return (await self.get("/readyz")).status == 200
            return False

        try:
            await until(ready, f"/readyz; log: {self.log_path}", within_s=READY_S)
        except BaseException:
            await self.kill()
            raise
        self.fds_at_start = self.fds()

    async def upgrade(
        self,
        *more: str,
        config: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        within_s: float = 20.0,
        leaves: int | None = 0,
        fds_max: int = 0,
    ) -> dict[str, Any]:
        """`fastmesh upgrade --json`: its report, and its exit code as `exit`. Where it succeeds the
        new process is followed from here on, and the old one has left with the code `leaves` (None,
        or mode drain: it leaves when it likes; see `left`)."""
        if config is not None:
            self.config = dict(config)
        self.write_config()
        Adopted.adopt_orphans()
        with self.log_path.open("ab") as log:
            limit = f"ulimit -n {fds_max}; " if fds_max else ""
            asked = await asyncio.create_subprocess_exec(
                "/bin/sh",
                "-c",
                f'{limit}exec "$@"',
                "sh",
                sys.executable,
                "-m",
                "fastmesh",
                "upgrade",
                "-c",
                str(self.path),
                "--json",
                *more,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )
        try:
            out, _ = await asyncio.wait_for(asked.communicate(), within_s)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                asked.kill()
            await asked.wait()
            raise
        report: dict[str, Any] = json.loads(out) if out else {"ok": False, "code": "", "reason": ""}
        report["exit"] = asked.returncode
        if report["ok"]:
            leaves = None if report["mode"] == "drain" else leaves
            await self.follow(report["new_pid"], leaves=leaves)
        return report

    async def follow(self, pid: int, *, leaves: int | None = 0) -> None:
        """From here on this is process `pid`; the one before has left with that code."""
        before, self.process = self.process, Adopted(pid)
        self.left.append(before)
        self.admin_port = int(self.config["admin"]["listen"].rpartition(":")[2])
        if leaves is not None:
            code = await asyncio.wait_for(before.wait(), STOP_S)
            assert code == leaves, f"the old process ended with {code}: {self.log()[-2000:]}"

    async def takeover(
        self, *, environment: Mapping[str, str] | None = None, gone: bool = True
    ) -> None:
        """`fastmesh run --takeover`, as in a second container: serves when this returns."""
        before = getattr(self, "process", None)
        self.write_config()
        with self.log_path.open("ab") as log:
            self.started_at = time.monotonic()
            taker = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "fastmesh",
                "run",
                "--takeover",
                "-c",
                str(self.path),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )

        async def serves() -> bool:
            assert taker.returncode is None, f"it ended: {self.log()[-2000:]}"
            with contextlib.suppress(OSError):
                return bool((await self.get("/v1/status")).json()["pid"] == taker.pid)
            return False

        try:
            await until(serves, f"the taker serves; log: {self.log_path}", within_s=READY_S)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                taker.kill()
            await taker.wait()
            raise
        self.process = taker
        self.killed = False
        if before is not None and before.returncode is None:
            self.left.append(before)
            if gone:
                assert await asyncio.wait_for(before.wait(), STOP_S) == 0, self.log()[-2000:]

    def takers(self) -> list[int]:
        """Processes that run, or stand still, to take over from this one, or that once did."""
        found = []
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                words = Path(f"/proc/{int(name)}/cmdline").read_bytes().split(b"\0")
                if b"--takeover" in words and os.fsencode(self.path) in words:
                    found.append(int(name))
        return found

    def threads_of(self) -> list[tuple[str, int]]:
        """(name, nice) of every thread."""
        found = []
        for task in os.listdir(f"/proc/{self.pid}/task"):
            with contextlib.suppress(FileNotFoundError):
                stat = Path(f"/proc/{self.pid}/task/{task}/stat").read_text()
                name, _, rest = stat.partition("(")[2].rpartition(")")
                found.append((name, int(rest.split()[16])))
        return sorted(found)

    def arguments(self) -> list[str]:
        return ["run", "-c", str(self.path)]

    def write_config(self) -> None:
        self.path.write_text(yaml.safe_dump(self.config, sort_keys=False))

    async def kill(self) -> None:
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def stop(self, *, within_s: float = STOP_S) -> int:
        """SIGTERM, and its exit code. Raises when it does not leave in time."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            return await asyncio.wait_for(self.process.wait(), within_s)
        except TimeoutError:
            await self.kill()
            raise AssertionError(f"SIGTERM was not obeyed within {within_s} s") from None

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and not self.killed and self.process.returncode is None:
                await self.settle()
                assert await self.stop() == 0, self.log()[-2000:]
            self.check_log()
        finally:
            if kind is not None:
                code = self.process.returncode
                print(f"--- {self.log_path} (exit code {code})\n{self.log()[-3000:]}")
            for process in [*self.left, self.process]:
                if process.returncode is None:
                    process.send_signal(signal.SIGCONT)
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await asyncio.wait_for(process.wait(), STOP_S)

    # --- looking at it ----------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def check_log(self) -> None:
        """No traceback, and no cause that floods."""
        text = self.log()
        assert "Traceback" not in text, text[-3000:]
        assert "broken invariant" not in text, text[-3000:]
        lines: Counter[tuple[str, str]] = Counter()
        for line in text.splitlines():
            parts = line.split(" ")
            if len(parts) >= 3:
                names = ("reason=", "endpoint=", "cause=", "path=")
                event = " ".join(p for p in parts[1:] if "=" not in p or p.startswith(names))
                lines[(parts[0][:19], event)] += 1
        for (second, event), count in lines.items():
            assert count <= LOG_LINES_PER_S_AND_CAUSE, f"{count} lines in {second}: {event}"

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def rss_bytes(self, field: str = "VmRSS") -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"{field}:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def cpu_ns(self) -> int:
        """Of all threads, from the scheduler's own books."""
        total = 0
        for task in os.listdir(f"/proc/{self.pid}/task"):
            with contextlib.suppress(FileNotFoundError):
                stat = Path(f"/proc/{self.pid}/task/{task}/schedstat").read_text()
                total += int(stat.split()[0])
        return total

    async def http(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        host: str | None = None,
        timeout_s: float = 5.0,
    ) -> Answer:
        fields = {
            "Host": host or f"127.0.0.1:{self.admin_port}",
            "Connection": "close",
            "Content-Length": str(len(body)),
            **self.admin_headers,
            **(headers or {}),
        }
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items())
        async with asyncio.timeout(timeout_s):
            if self.admin_socket:
                reader, writer = await asyncio.open_unix_connection(self.admin_socket)
            else:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.admin_port)
            try:
                writer.write(head.encode() + b"\r\n" + body)
                raw = await reader.read()
            finally:
                writer.close()
        if not raw:
            raise ConnectionError("the admin interface closed without an answer")
        return Answer(raw)

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.http("GET", path, headers=headers)

    async def reload(self, config: Mapping[str, Any] | None = None) -> Answer:
        if config is not None:
            self.config = dict(config)
        self.write_config()
        return await self.http("POST", "/v1/reload")

    async def metrics(self) -> Metrics:
        answer = await self.get("/metrics")
        assert answer.status == 200
        return Metrics(answer.body.decode())

    async def in_flight(self, count: int, *, within_s: float = 5.0) -> Metrics:
        """Until so many requests are in flight."""
        found: list[Metrics] = []

        async def reached() -> bool:
            found.append(await self.metrics())
            found[-1].check_ledger()
            return found[-1].in_flight == count

        try:
            await until(reached, f"{count} in flight", within_s=within_s, every_s=0.02)
        except AssertionError as error:
            left = (await self.get("/v1/connections")).body.decode()
            raise AssertionError(f"{error}; connections: {left}") from None
        return found[-1]

    # --- judging it ------------------------------------------------------------------------------

    def upstreams_max(self) -> int:
        """Upstream connections that shared bindings may keep: of each dialect of the protocol."""
        return sum(
            len(c["endpoints"]) * int(c.get("connections", 1)) * self.threads * DIALECTS
            for c in self.config["clusters"]
            if c.get("binding", "shared") == "shared"
        )

    async def settle(self, *, within_s: float = 6.0) -> Metrics:
        """After the fault, with all clients gone: nothing in flight, the ledger holds, descriptors
        and memory are given back, and nobody spins."""
        final = await self.in_flight(0, within_s=within_s)
        final.check_ledger()
        allowed = self.fds_at_start + self.upstreams_max()
        try:
            await until(
                lambda: self.fds() <= allowed,
                f"descriptors back to {allowed}",
                within_s=within_s,
                every_s=0.05,
            )
        except AssertionError as error:
            left = (await self.get("/v1/connections")).body.decode()
            raise AssertionError(f"{error}; {self.fds()} are open: {left}") from None
        cap = self.config["limits"]["memory_bytes_max"]
        peak = self.rss_bytes("VmHWM")
        assert peak <= BASE_RSS_BYTES + cap * 11 // 10, f"RSS reached {peak >> 20} MiB"

        async def idle() -> bool:
            before, began = self.cpu_ns(), time.monotonic_ns()
            await asyncio.sleep(IDLE_WINDOW_S)
            share = (self.cpu_ns() - before) / (time.monotonic_ns() - began)
            shares.append(round(share, 4))
            return share < IDLE_CPU_SHARE

        shares: list[float] = []
        try:
            await until(idle, "idle", within_s=4.0, every_s=0)
        except AssertionError:
            raise AssertionError(f"it is not idle: CPU shares {shares}") from None
        return final


def cluster(name: str, what: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    options = dict(what) if isinstance(what, Mapping) else {"endpoints": what}
    return {
        "name": name,
        "protocol": "bolt",
        **options,
        "endpoints": [
            e
            if isinstance(e, dict)
            else {"address": e, "weight": 100}
            if isinstance(e, str)
            else {"address": e[0], "weight": e[1]}
            for e in options["endpoints"]
        ],
    }


def default_routes(names: list[str]) -> list[dict[str, Any]]:
    routes: list[dict[str, Any]] = [{"match": {"service": name}, "cluster": name} for name in names]
    return [*routes, {"cluster": names[0]}]
