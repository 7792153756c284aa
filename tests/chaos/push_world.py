"""A whole message mesh of real processes, with its books: brokers, nodes, consumers, and producers
in the test's own process. What happened is judged by tests/sim/push_ledger.py.

    async with PushWorld(tmp_path) as world:
        async with world.producing():
            await world.kill("client", world.workers["w1"])
        await world.finish()
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from fastmesh.address import parse_address
from fastmesh.client import AmbiguousError, MeshClient, NotTakenError
from fastmesh.mesh.registration_http import PATH
from tests.admin.http import ask
from tests.chaos.mesh import READY_S, Mesh, until
from tests.peers.sockets import free_port
from tests.sim.push_ledger import MS, Consumption, Fault, Ledger, Published, Verdict, read_lines

ROOT = Path(__file__).parents[2]
APP = "shop"
TOPICS: dict[str, dict[str, bool]] = {
    "orders": {"orders.any": False, "orders.keyed": True},
    "events": {"events.any": False, "events.keyed": True},
}
"""topic -> group -> ordered."""
HANDLER_S = (0.03, 0.05)
FRESH_NS = 5 * MS
"""A handler that began so recently still runs when a signal arrives."""
NODE_LIMITS = {"heartbeat_ms": 300, "backoff_ms": 10, "backoff_ms_max": 100}


class BrokerProcess(Mesh):
    """`fastmesh broker`, watched as a mesh is."""

    def __init__(self, folder: Path, name: str, *, sync: str, answer_timeout: str) -> None:
        folder.mkdir()
        super().__init__(folder, {}, routes=[{}])
        self.name = name
        self.sync = sync
        self.answer_timeout = answer_timeout

    def arguments(self) -> list[str]:
        return [
            "broker",
            *("--listen", self.address),
            *("--admin", f"127.0.0.1:{self.admin_port}"),
            *("--data", str(self.folder / "data")),
            *("--name", self.name),
            *("--redeliver", "20ms,50ms,100ms"),
            *("--max-attempts", "10000"),
            *("--answer-timeout", self.answer_timeout),
            *("--sync", self.sync),
        ]

    async def groups(self) -> dict[str, dict[str, Any]]:
        return {g["name"]: g for g in (await self.get("/v1/groups")).json()["groups"]}

    async def settle(self, *, within_s: float = 6.0) -> Any:
        async def nothing() -> bool:
            return int((await self.get("/v1/status")).json()["in_flight"]) == 0

        await until(nothing, f"broker {self.name} waits for no answer", within_s=within_s)


class Node(Mesh):
    """A node that meets the brokers, takes forwards and registrations, and follows a schedule."""

    def __init__(
        self,
        folder: Path,
        name: str,
        brokers: Mapping[str, str],
        schedule: Path | None,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        folder.mkdir()
        super().__init__(folder, {}, routes=[{}], limits={**NODE_LIMITS, **(limits or {})})
        self.name = name
        self.forward = f"127.0.0.1:{free_port()}"
        self.registration = f"127.0.0.1:{free_port()}"
        del self.config["clusters"]
        self.config |= {
            "node": {"name": name, "app": APP},
            "listeners": [{"name": "msg", "listen": self.address, "protocol": "push"}],
            "push": {
                "brokers": [{"name": n, "address": a} for n, a in brokers.items()],
                "forward": {"listen": self.forward},
                **({"schedule": {"file": str(schedule)}} if schedule else {}),
            },
            "registration": {"listen": self.registration},
        }

    def upstreams_max(self) -> int:
        return 16  # brokers and peers, in both directions


class Worker:
    """A consumer process (tests/chaos/push_worker.py)."""

    def __init__(
        self,
        world: PushWorld,
        name: str,
        node: Node,
        groups: Sequence[Mapping[str, Any]],
        **more: Any,
    ) -> None:
        self.world = world
        self.name = name
        self.node = node
        self.groups = list(groups)
        self.more = {"handler_s": HANDLER_S, "connections": 1, **more}
        self.process: asyncio.subprocess.Process | None = None
        self.stats: list[dict[str, int]] = []

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self) -> Worker:
        spec = {
            "app": APP,
            "client": self.name,
            "groups": self.groups,
            "mesh": self.node.address,
            "registration": f"http://{self.node.registration}",
            "log": str(self.world.log_path),
            **self.more,
        }
        self.world.ledger.nodes = {**self.world.ledger.nodes, self.name: self.node.name}
        with (self.world.folder / f"{self.name}.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.chaos.push_worker",
                json.dumps(spec),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
            )
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), READY_S + 5)
        assert line == b"ready\n", (line, self.log())
        return self

    def log(self) -> str:
        return (self.world.folder / f"{self.name}.log").read_text()[-2000:]

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
            self.process = None

    async def stop(self) -> dict[str, int]:
        """Gracefully; what it counted."""
        process, self.process = self.process, None
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()
        out = b""
        try:
            assert process.stdout is not None
            out = await asyncio.wait_for(process.stdout.read(), 12)
            code = await asyncio.wait_for(process.wait(), 5)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise AssertionError(f"{self.name} did not leave: {self.log()}") from None
        assert code == 0, (self.name, code, self.log())
        self.stats.append(json.loads(out))
        return self.stats[-1]


class PushWorld:
    """`proxied`: a ToxicProxy's address by broker, where the nodes are to meet it instead."""

    def __init__(
        self,
        folder: Path,
        *,
        brokers: int = 2,
        nodes: int = 2,
        workers: int = 2,
        topics: Mapping[str, Mapping[str, bool]] = TOPICS,
        answer_timeout: str = "10s",
        prefetch: int = 8,
        node_limits: Mapping[str, int] | None = None,
        schedule_file: bool = True,
    ) -> None:
        self.folder = folder
        self.topics = {topic: dict(groups) for topic, groups in topics.items()}
        self.ledger = Ledger(self.topics)
        self.log_path = folder / "consumed.log"
        self.schedule_path = folder / "schedule.yaml" if schedule_file else None
        self.random = random.Random()
        self.prefetch = prefetch
        self.workers_per_node = workers
        self.node_limits = node_limits
        self.nodes_count = nodes
        self.brokers = {
            name: BrokerProcess(
                folder / name,
                name,
                sync="async" if number % 2 else "sync",
                answer_timeout=answer_timeout,
            )
            for number, name in enumerate(f"b{n + 1}" for n in range(brokers))
        }
        self.lines = {name: broker.address for name, broker in self.brokers.items()}
        """Where the nodes meet each broker; a test may put a proxy there before it enters."""
        self.nodes: dict[str, Node] = {}
        self.workers: dict[str, Worker] = {}
        self.publish_failures: list[BaseException] = []
        self._stack = contextlib.AsyncExitStack()
        self._read_at = 0
        self._open: dict[str, Consumption] = {}
        self._ended: list[Consumption] = []
        self._numbers: dict[str, int] = {}

    # --- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> PushWorld:
        try:
            for broker in self.brokers.values():
                await self._stack.enter_async_context(broker)
            names = [f"n{n + 1}" for n in range(self.nodes_count)]
            self.nodes = {
                name: Node(
                    self.folder / name, name, self.lines, self.schedule_path, self.node_limits
                )
                for name in names
            }
            if self.schedule_path is not None:
                self.schedule(dict.fromkeys(names, 100))
            for node in self.nodes.values():
                await self._stack.enter_async_context(node)
            self._stack.push_async_exit(self._end_workers)
            made = [
                self.worker(f"w{number + 1}-{node.name}", node)
                for node in self.nodes.values()
                for number in range(self.workers_per_node)
            ]
            await asyncio.gather(*(worker.start() for worker in made))
        except BaseException:
            await self._stack.__aexit__(*sys.exc_info())
            raise
        return self

    async def __aexit__(self, *error: Any) -> None:
        if error[0] is not None:
            print(f"faults: {[str(f) for f in self.ledger.faults]}; consumed: {self.log_path}")
        await self._stack.__aexit__(*error)

    async def _end_workers(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self.workers.values():
            await worker.kill()

    def worker(
        self,
        name: str,
        node: Node,
        groups: Iterable[str] | None = None,
        *,
        prefetch: int | None = None,
        **more: Any,
    ) -> Worker:
        """Not started yet. Without `groups`: all of them."""
        documents = [
            {
                "name": group,
                "topic": topic,
                "role": "subscribe",
                "ordered": ordered,
                "prefetch": prefetch or self.prefetch,
            }
            for topic, found in self.topics.items()
            for group, ordered in found.items()
            if groups is None or group in groups
        ]
        made = self.workers[name] = Worker(self, name, node, documents, **more)
        return made

    def schedule(self, weights: Mapping[str, int]) -> None:
        """In force within a second: a file that is replaced."""
        assert self.schedule_path is not None
        fresh = self.schedule_path.with_suffix(".new")
        fresh.write_text(yaml.safe_dump(self._schedule(weights)))
        fresh.replace(self.schedule_path)

    async def put_schedule(self, weights: Mapping[str, int]) -> None:
        """In a world without that file."""
        body = json.dumps(self._schedule(weights)).encode()
        kind = {"Content-Type": "application/json"}
        for node in self.nodes.values():
            answer = await node.http("PUT", "/v1/schedule", headers=kind, body=body)
            assert answer.status == 200, answer.body

    def _schedule(self, weights: Mapping[str, int]) -> dict[str, Any]:
        listed = [
            {"name": name, "address": node.forward, "weight": weights[name]}
            for name, node in self.nodes.items()
        ]
        return {"apps": {APP: {"nodes": listed}}}

    # --- registrations ----------------------------------------------------------------------------

    async def churn(self, stopping: asyncio.Event) -> Counter[int]:
        """Other clients' registrations come and go, those of the living are told again, and
        contradicted. Returns the statuses."""
        statuses: Counter[int] = Counter()
        number = 0
        while not stopping.is_set():
            number += 1
            node = self.random.choice(list(self.nodes.values()))
            at = parse_address(node.registration)
            alive = [w for w in self.workers.values() if w.node is node and w.process is not None]
            other = f"other-{number % 7}"
            group = {"name": f"{other}.g{number % 3}", "topic": "orders", "role": "subscribe"}
            documents = [{"app": APP, "client": other, "groups": [group]}]
            for worker in alive[:1]:
                same = {"app": APP, "client": worker.name, "groups": worker.groups}
                wrong = [{**found, "ordered": not found["ordered"]} for found in worker.groups]
                documents += [same, {"app": APP, "client": other, "groups": wrong}]
            with contextlib.suppress(OSError):
                for document in documents:
                    answer = await ask(at, PATH, "POST", body=json.dumps(document).encode())
                    statuses[answer.status] += 1
                if number % 2:
                    answer = await ask(at, f"{PATH}/{APP}/{other}", "DELETE")
                    statuses[answer.status] += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await stopping.wait()
        return statuses

    # --- producers --------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def producing(
        self,
        *,
        keys: int = 6,
        pause_s: float = 0.06,
        topics: Sequence[str] | None = None,
        nodes: Sequence[str] | None = None,
    ) -> AsyncIterator[None]:
        """Two publishes per key and round trip: `keys` producers at each node, one key each. Ends
        with every publish answered."""
        stopping = asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            tasks = []
            for name in nodes or self.nodes:
                node = self.nodes[name]
                client = MeshClient(
                    app=APP,
                    client=f"producer-{name}-{len(self._numbers)}",
                    topics=list(self.topics),
                    mesh=node.address,
                    registration=f"http://{node.registration}",
                    heartbeat_ms=500,
                )
                await stack.enter_async_context(client)
                for number in range(keys):
                    topic = (topics or list(self.topics))[number % len(topics or self.topics)]
                    key = f"k{len(self._numbers)}"
                    self._numbers[key] = 0
                    tasks.append(
                        asyncio.ensure_future(self._produce(client, topic, key, pause_s, stopping))
                    )
            try:
                yield
            finally:
                stopping.set()
                await asyncio.gather(*tasks)

    async def _produce(
        self, client: MeshClient, topic: str, key: str, pause_s: float, stopping: asyncio.Event
    ) -> None:
        while not stopping.is_set():
            seq = self._numbers[key] = self._numbers[key] + 1
            id = f"{key}-{seq}"
            content = f"{id} {topic} {key} ".encode() + os.urandom(self.random.randrange(1500))
            message = Published(id, topic, key, seq, zlib.crc32(content), time.monotonic_ns())
            self.ledger.published[id] = message
            try:
                receipt = await client.publish(topic, content, key=key, id=id, timeout_ms=8000)
            except AmbiguousError:
                message.outcome = "doubtful"
            except NotTakenError:
                message.outcome = "not_taken"
            else:
                assert receipt.id == id, "another publish's answer"
                message.outcome, message.broker = "taken", receipt.broker
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s * self.random.uniform(0.5, 1.5)):
                    await stopping.wait()

    async def taken(self, count: int, *, within_s: float = 10.0) -> None:
        """Until so many more messages were acknowledged."""
        goal = self._taken() + count
        await until(lambda: self._taken() >= goal, f"{count} more taken", within_s=within_s)

    def _taken(self) -> int:
        return sum(1 for p in self.ledger.published.values() if p.outcome == "taken")

    # --- consumers' books -------------------------------------------------------------------------

    def read(self) -> list[Consumption]:
        """All that was consumed so far, or begun."""
        if self.log_path.exists():
            with self.log_path.open("rb") as file:
                file.seek(self._read_at)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read_at += len(whole)
            self._ended += read_lines(whole.decode().splitlines(), self._open)
        self.ledger.consumptions = [*self._ended, *self._open.values()]
        return self.ledger.consumptions

    async def consumed(self, count: int, *, within_s: float = 10.0, **of: str) -> None:
        """Until so many more were consumed, e.g. by client="w1-n1"."""

        def found() -> int:
            self.read()
            return sum(all(getattr(c, k) == v for k, v in of.items()) for c in self._ended)

        goal = found() + count
        await until(
            lambda: found() >= goal, f"{count} more consumed {of}", within_s=within_s, every_s=0.02
        )

    # --- faults -----------------------------------------------------------------------------------

    async def strike(
        self,
        kind: Literal["client", "node", "broker", "line", "stop"],
        name: str,
        act: Callable[[], object],
        *,
        within_s: float = 10.0,
    ) -> Fault:
        """Does it while a handler runs whose answer it meets: the ledger proves that from the
        books, because a handler takes at least HANDLER_S."""

        def running() -> bool:
            self.read()
            now = time.monotonic_ns()
            return any(
                now - c.begin_ns < FRESH_NS and self.ledger.concerns(kind, name, c)
                for c in self._open.values()
            )

        await until(
            running, f"a handler runs behind {kind} {name}", within_s=within_s, every_s=0.001
        )
        fault = Fault(kind, name, time.monotonic_ns())
        act()
        self.ledger.faults.append(fault)
        return fault

    def lasted(self, fault: Fault) -> None:
        """Until now."""
        at = self.ledger.faults.index(fault)
        self.ledger.faults[at] = dataclasses.replace(fault, until_ns=time.monotonic_ns())

    async def kill_client(self, worker: Worker) -> None:
        """kill -9, and started again."""
        assert worker.process is not None
        await self.strike("client", worker.name, worker.process.kill)
        await worker.kill()
        await worker.start()

    async def kill_node(self, node: Node) -> None:
        await self.strike("node", node.name, lambda: node.signal(signal.SIGKILL))
        await node.kill()
        await node.start()

    async def kill_broker(self, broker: BrokerProcess) -> None:
        await self.strike("broker", broker.name, lambda: broker.signal(signal.SIGKILL))
        await broker.kill()
        await broker.start()

    # --- the end ----------------------------------------------------------------------------------

    async def lag(self) -> dict[str, int]:
        """What the brokers hold for each group, due or not."""
        found: dict[str, int] = {}
        for broker in self.brokers.values():
            for name, group in (await broker.groups()).items():
                held = group["lag"] + group["retrying"]
                found[name] = found.get(name, 0) + held
        return found

    async def finish(
        self, *, taken_min: int = 200, within_s: float = 20.0, void: bool = True
    ) -> Verdict:
        """After the producers: until the brokers hold nothing more, then everybody leaves, and the
        ledger is judged."""
        lag: dict[str, int] = {}

        async def settled() -> bool:
            lag.clear()
            lag.update(await self.lag())
            return not any(lag.values())

        try:
            await until(settled, "the brokers hold nothing", within_s=within_s, every_s=0.1)
        except AssertionError:
            print(f"lag after {within_s} s: {lag}")
        for worker in self.workers.values():
            if worker.process is not None:
                await worker.stop()
        self.read()
        verdict = self.ledger.judge(lag)
        print(verdict)
        return verdict.check(taken_min=taken_min, void=void)
