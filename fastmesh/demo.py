"""A message mesh to look at: a broker, two nodes of one application, producers, consumers, a live
table, a weight that moves half-way, and the ledger at the end.

Everything runs in this process on loopback ports of the kernel's choice, leaves nothing behind and
ends by itself. What is moved and read goes over the interfaces that an operator has:
`PUT /v1/schedule` and the counters of the nodes, `/v1/topics` and `/v1/groups` of the broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastmesh import config as configuration
from fastmesh import limits
from fastmesh.address import Address, parse_address
from fastmesh.app import Mesh
from fastmesh.broker.model import Options
from fastmesh.broker.server import Broker, Settings
from fastmesh.client import (
    AmbiguousError,
    ClientError,
    Group,
    MeshClient,
    Message,
    Result,
    http,
    later,
    reject,
)
from fastmesh.control.snapshot import FORWARD
from fastmesh.errors import FastmeshError
from fastmesh.observe.log import Log

APP, TOPIC = "shop", "orders"
BILLING = Group("billing", topic=TOPIC, prefetch=32)
NODES = ("node-1", "node-2")
MOVED = "node-2"
WEIGHT_BEFORE, WEIGHT_AFTER = 100, 20
TOLERANCE = 0.02
"""Of the share that stays on the moved node, as a part of all; the schedule itself promises a
message, and the counters are read while it runs."""
TOLERANCE_MESSAGES = 2
JUDGED_MIN = 10
"""Deliveries that a share is told from."""

CONSUMERS = 2
"""On each node."""
MAX_ATTEMPTS = 3
REDELIVER_MS = (200, 500)
HOUR_MS = 3_600_000
LOOK_S = 1.0
POLL_S = 0.02
PACE_S = 0.02
AT_ONCE_MAX = 64
"""Publishes of one producer that are not answered."""
READY_S = 30.0
MOVE_S = 10.0
DRAIN_S = 30.0
ASK_S = 10.0
BAR = 10

CONFIG = """\
node: {{name: {node}, app: shop}}
state_dir: {state_dir}
admin: {{listen: "127.0.0.1:0"}}
log: {{level: error}}
listeners: [{{name: msg, listen: "127.0.0.1:0", protocol: push}}]
push:
  brokers: [{{name: b1, address: "{broker}"}}]
  forward: {{listen: "127.0.0.1:0"}}
registration: {{listen: "127.0.0.1:0"}}
limits: {{connections_max: 200}}
"""


def run(*, seconds: float, rate: float) -> int:
    """The exit code: 0 when the ledger balances and the traffic moved as scheduled.

    `seconds` is how long messages are sent, `rate` how many of them a second in all. Raises
    FastmeshError when something does not start or answer.
    """
    import uvloop

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(limits.BROKER_SWITCH_INTERVAL_S)  # as `fastmesh broker` does
    try:
        return uvloop.run(_until_signal(_run(seconds, rate)))
    finally:
        sys.setswitchinterval(interval_s)


async def _until_signal(main: Any) -> int:
    """SIGTERM and SIGHUP end it as SIGINT does: with nothing left behind."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(main)
    got: list[int] = []

    def end(number: int) -> None:
        got.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end, number)
    try:
        return int(await task)
    except asyncio.CancelledError:
        if not got:
            raise
        return 128 + got[0]
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)


# --- what the application does --------------------------------------------------------------------


@dataclass(slots=True)
class Books:
    """What the application knows about its messages, by their numbers."""

    sent: set[int] = field(default_factory=set)
    """A broker has answered for them."""
    consumed: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)
    """Rejected, or put off as often as the broker bears."""
    put_off: set[int] = field(default_factory=set)
    """For an hour: they wait at the broker when the demo is over."""
    unsure: int = 0
    refused: int = 0
    twice: int = 0
    """Consumed, and then delivered again."""
    strange: int = 0
    """Deliveries of another topic or group."""
    redelivered: int = 0
    deliveries: dict[tuple[str, str | None], int] = field(default_factory=dict)
    """By the node where they arrived and the one that passed them on."""
    took_ms: list[float] = field(default_factory=list)
    """From publish to handler, of first attempts since somebody looked."""
    begun: int = 0

    def waiting(self) -> int:
        """Sent, and neither consumed nor dead."""
        return len(self.sent - self.consumed - self.dead)

    def unknown(self) -> int:
        """Consumed or dead, though nobody has sent them."""
        return len((self.consumed | self.dead) - self.sent)


class Producer:
    """Publishes `rate` messages a second. What a slow machine cannot keep up with is not sent:
    nothing piles up."""

    def __init__(self, client: MeshClient, books: Books, rate: float) -> None:
        self._client = client
        self._books = books
        self._rate = rate

    async def run(self, seconds: float) -> None:
        began = time.monotonic()
        done = 0
        while (elapsed := time.monotonic() - began) < seconds:
            due = int(elapsed * self._rate)
            count = min(due - done, AT_ONCE_MAX)
            done = due
            if count:
                await asyncio.gather(*(self._publish() for _ in range(count)))
            await asyncio.sleep(PACE_S)

    async def _publish(self) -> None:
        books = self._books
        number = books.begun
        books.begun += 1
        content = f"{number} {time.monotonic_ns()}".encode()
        try:
            await self._client.publish(TOPIC, content, idempotent=True)
        except AmbiguousError:
            books.unsure += 1
        except ClientError:
            books.refused += 1
        else:
            books.sent.add(number)


class Consumer:
    """One client of the group on a node. Now and then it wants a message later, or never."""

    def __init__(self, node: str, books: Books) -> None:
        self._node = node
        self._books = books

    async def take(self, message: Message) -> Result | None:
        books = self._books
        way = (self._node, message.origin)
        books.deliveries[way] = books.deliveries.get(way, 0) + 1
        if (message.topic, message.group) != (TOPIC, BILLING.name):
            books.strange += 1
        number, born_ns = map(int, message.content.split())
        if message.attempt == 1:
            books.took_ms.append((time.monotonic_ns() - born_ns) / 1e6)
        else:
            books.redelivered += 1
        if number in books.consumed or number in books.dead:
            books.twice += 1
        answer = answer_to(number, message.attempt)
        if answer is None:
            books.consumed.add(number)
        elif answer.kind == "reject" or message.attempt >= MAX_ATTEMPTS:
            books.dead.add(number)
        elif answer.retry_ms == HOUR_MS:
            books.put_off.add(number)
        return answer


def answer_to(number: int, attempt: int) -> Result | None:
    """Of two hundred messages: 192 are consumed at once and two at the second attempt, two never,
    two are rejected, and two have to wait for an hour."""
    match number % 100:
        case 7 if attempt == 1:
            return later(200, "the bank is busy")
        case 31:
            return later(reason="no such customer yet")
        case 63:
            return reject("not an order")
        case 95:
            return later(HOUR_MS, "the shop is closed")
    return None


# --- what is shown --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one node, since the start."""

    pushed: int
    """Deliveries that the broker made to it."""
    passed: int
    """Of those, handed to the other node."""
    consumed: int
    """Deliveries that its own clients got, from wherever."""

    @property
    def kept(self) -> int:
        return self.pushed - self.passed

    def __sub__(self, before: Counts) -> Counts:
        return Counts(
            self.pushed - before.pushed,
            self.passed - before.passed,
            self.consumed - before.consumed,
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One node over the last second."""

    node: str
    weight: int
    pushed_per_s: float
    kept_per_s: float
    passed_per_s: float
    consumed_per_s: float
    share: float
    """Of all that was consumed."""


@dataclass(frozen=True, slots=True)
class Look:
    elapsed_s: float
    seconds: float
    rows: tuple[Row, ...]
    sent: int
    consumed: int
    dead: int
    p50_ms: float
    """From publish to handler, in the last second."""


class Screen(Protocol):
    def show(self, look: Look) -> None: ...
    def say(self, text: str) -> None: ...


class Lines:
    """A line a second, for files, pipes and installations without rich."""

    def __init__(self) -> None:
        self._headed = False

    def show(self, look: Look) -> None:
        if not self._headed:
            self._headed = True
            names = "".join(f" | {row.node:^26}" for row in look.rows)
            print(f"{'':14}{names} |")
            columns = " | weight   kept passed taken" * len(look.rows)
            print(f"{'time':>5}   {'sent':>6}{columns} |    ms")
        cells = "".join(
            f" | {row.weight:6} {row.kept_per_s:6,.0f} {row.passed_per_s:6,.0f}"
            f" {row.consumed_per_s:5,.0f}"
            for row in look.rows
        )
        print(f"{look.elapsed_s:3.0f} s   {look.sent:6}{cells} | {look.p50_ms:5,.1f}", flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)


class Table:
    """The same as a table that stays in its place."""

    def __init__(self, live: Any) -> None:
        self._live = live

    def show(self, look: Look) -> None:
        self._live.update(rich_table(look), refresh=True)

    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)


def rich_table(look: Look) -> Any:
    """Fits 80 columns. Raises ImportError without rich."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(
        title=Text(f"fastmesh demo, {look.elapsed_s:.0f} of {look.seconds:.0f} s"),
        title_justify="left",
        caption=Text(
            f"sent {look.sent:,}  consumed {look.consumed:,}  dead {look.dead:,}"
            f"  on their way {look.p50_ms:.1f} ms"
            "\npushed by the broker, passed to the other node, taken by consumers here"
        ),
        caption_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        min_width=76,
    )
    table.add_column("node", no_wrap=True)
    for name in ("weight", "pushed/s", "kept/s", "passed/s", "taken/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("share", no_wrap=True)
    for row in look.rows:
        bar = "\u2588" * round(row.share * BAR)
        table.add_row(
            Text(row.node),
            Text(str(row.weight), style="bold" if row.weight < WEIGHT_BEFORE else ""),
            f"{row.pushed_per_s:,.0f}",
            f"{row.kept_per_s:,.0f}",
            f"{row.passed_per_s:,.0f}",
            f"{row.consumed_per_s:,.0f}",
            f"{row.share:4.0%} {bar:{BAR}}",
        )
    return table


@contextlib.contextmanager
def _screen() -> Iterator[Screen]:
    """A live table on a terminal, plain lines elsewhere (or without rich)."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.live import Live

            with Live(auto_refresh=False) as live:
                yield Table(live)
            return
    yield Lines()


# --- what runs ------------------------------------------------------------------------------------


class Show:
    """The broker, the nodes and the clients while they run."""

    def __init__(self, seconds: float, rate: float, books: Books) -> None:
        self._seconds = seconds
        self._rate = rate
        self.books = books
        self._weights = dict.fromkeys(NODES, WEIGHT_BEFORE)
        self._meshes: dict[str, Mesh] = {}
        self._clients = contextlib.AsyncExitStack()
        self._producers: list[Producer] = []

    async def start(self, stack: contextlib.AsyncExitStack, folder: str) -> None:
        log = Log(level="error")  # when they leave one by one, each warns that another one is gone
        anywhere = parse_address("127.0.0.1:0", folder, port_min=0)
        options = Options(name="b1", redeliver_ms=REDELIVER_MS, max_attempts=MAX_ATTEMPTS)
        admin = configuration.Admin(anywhere, None)
        settings = Settings(
            listen=anywhere,
            admin=admin,
            data=f"{folder}/b1",
            options=options,
            log_level="error",
        )
        self._broker = Broker(settings, log)
        await self._broker.start()
        stack.push_async_callback(self._broker.stop)
        for node in NODES:
            text = CONFIG.format(
                node=node, state_dir=f"{folder}/{node}", broker=self._broker.address
            )
            if not self._meshes:
                print(
                    f"A broker, and {len(NODES)} nodes of the application {APP} with this"
                    f" configuration:\n\n{text}"
                )
            config = configuration.parse(text.encode(), base=folder, source="demo")
            mesh = Mesh(config, log)
            await mesh.start()
            stack.push_async_callback(mesh.stop)
            self._meshes[node] = mesh
        stack.push_async_callback(self._clients.aclose)
        await self.put_schedule()
        for node in NODES:
            for number in range(1, CONSUMERS + 1):
                client = self._client(node, f"biller-{number}", groups=[BILLING])
                client.subscribe(BILLING, Consumer(node, self.books).take)
                await self._clients.enter_async_context(client)
            client = self._client(node, "till", topics=[TOPIC])
            await self._clients.enter_async_context(client)
            self._producers.append(Producer(client, self.books, self._rate / len(NODES)))
        async with _in_time(READY_S, "the nodes do not know one another"):
            while True:
                if all(self._knows_others(mesh) for mesh in self._meshes.values()):
                    break
                await asyncio.sleep(POLL_S)

    def _client(self, node: str, name: str, **more: Any) -> MeshClient:
        mesh = self._meshes[node]
        return MeshClient(
            app=APP,
            client=f"{name}.{node}",
            mesh=mesh.addresses()["msg"],
            registration=f"http://{mesh.registration_address}",
            publish_timeout_ms=int(READY_S * 1000),
            start_timeout_ms=int(READY_S * 1000),
            **more,
        )

    @staticmethod
    def _knows_others(mesh: Mesh) -> bool:
        assert mesh.plane is not None
        return len(mesh.plane.control.peers.serving(BILLING.name)) == len(NODES) - 1

    @property
    def topology_url(self) -> str:
        return f"http://{self._meshes[NODES[0]].admin_address}/topology"

    async def put_schedule(self) -> None:
        """The weights as they are now, to every node."""
        nodes = [
            {"name": name, "address": mesh.addresses()[FORWARD], "weight": self._weights[name]}
            for name, mesh in self._meshes.items()
        ]
        for mesh in self._meshes.values():
            document = {"apps": {APP: {"nodes": nodes}}}
            await _ask(mesh.admin_address, "PUT", "/v1/schedule", document)

    async def counts(self) -> dict[str, Counts]:
        rows = {}
        for node, mesh in self._meshes.items():
            reading = await mesh.readings.counters()
            row = reading.row(mesh.compiled.group_rows[BILLING.name])
            rows[node] = (row["pushes.accepted"], row["forwarded"])
        taken = self.books.deliveries
        found = {}
        for node, (accepted, passed) in rows.items():
            # A node counts what another one passed on to it too; that is no delivery of the broker.
            foreign = sum(n for (at, origin), n in taken.items() if at == node and origin)
            here = sum(n for (at, _), n in taken.items() if at == node)
            found[node] = Counts(accepted - foreign, passed, here)
        return found

    async def perform(self, screen: Screen) -> Moved:
        """All messages are sent when this returns, and the weight was moved half-way."""
        began = time.monotonic()
        loads = asyncio.gather(*(p.run(self._seconds) for p in self._producers))
        watching = asyncio.ensure_future(self._watch(screen, began))
        moving = asyncio.ensure_future(self._move(screen))
        try:
            await loads
            return await moving
        finally:
            for task in (loads, moving, watching):
                task.cancel()
            await asyncio.gather(loads, moving, watching, return_exceptions=True)

    async def _watch(self, screen: Screen, began: float) -> None:
        before, then = await self.counts(), time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            after, now = await self.counts(), time.monotonic()
            screen.show(self._look(before, after, now - then, now - began))
            before, then = after, now

    def _look(
        self, before: dict[str, Counts], after: dict[str, Counts], over_s: float, elapsed_s: float
    ) -> Look:
        news = {node: after[node] - before[node] for node in NODES}
        total = sum(new.consumed for new in news.values())
        books = self.books
        took_ms, books.took_ms = books.took_ms, []
        return Look(
            elapsed_s,
            self._seconds,
            tuple(
                Row(
                    node,
                    self._weights[node],
                    new.pushed / over_s,
                    new.kept / over_s,
                    new.passed / over_s,
                    new.consumed / over_s,
                    new.consumed / total if total else 0.0,
                )
                for node, new in news.items()
            ),
            sent=len(books.sent),
            consumed=len(books.consumed),
            dead=len(books.dead),
            p50_ms=statistics.median(took_ms) if took_ms else 0.0,
        )

    async def _move(self, screen: Screen) -> Moved:
        await asyncio.sleep(self._seconds / 2)
        before = await self.counts()
        asked = time.monotonic()
        screen.say(f"PUT /v1/schedule: the weight of {MOVED} is {WEIGHT_AFTER} from now on")
        self._weights[MOVED] = WEIGHT_AFTER
        await self.put_schedule()
        try:
            async with asyncio.timeout(MOVE_S):
                while True:
                    now = await self.counts()
                    if now[MOVED].passed > before[MOVED].passed:
                        break
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            return Moved(before, None, 0.0)
        return Moved(before, now, time.monotonic() - asked)

    async def drain(self) -> None:
        """Until the broker has nothing left but what was put off; then the clients go, so that the
        books are closed when they are read."""
        with contextlib.suppress(TimeoutError):  # what is left then is waiting, and is counted
            async with asyncio.timeout(DRAIN_S):
                while True:
                    if (await self._group())["lag"] <= len(self.books.put_off):
                        break
                    await asyncio.sleep(POLL_S)

    async def close(self) -> BrokerBooks:
        """The clients leave in order; what the broker says then."""
        await self._clients.aclose()
        async with _in_time(DRAIN_S, "deliveries are not answered"):
            while True:
                group = await self._group()
                if not group["in_flight"]:
                    break
                await asyncio.sleep(POLL_S)
        topics = (await _ask(self._broker.admin_address, "GET", "/v1/topics"))["topics"]
        return BrokerBooks(
            sent=sum(t["published"] for t in topics if t["name"] == TOPIC),
            consumed=group["consumed"],
            dead=group["dead"],
            waiting=group["lag"],
        )

    async def _group(self) -> Any:
        return await _ask(self._broker.admin_address, "GET", f"/v1/groups/{BILLING.name}")


async def _run(seconds: float, rate: float) -> int:
    books = Books()
    with tempfile.TemporaryDirectory(prefix="fastmesh-demo-") as folder:
        async with contextlib.AsyncExitStack() as stack:
            show = Show(seconds, rate, books)
            await show.start(stack, folder)
            print(
                f"{len(NODES)} producers send {rate:,.0f} messages a second for {seconds:g} s;"
                f" {CONSUMERS} consumers on each node take\nthem, want some later and reject"
                f" some. Look: {show.topology_url}\n",
                flush=True,
            )
            with _screen() as screen:
                moved = await show.perform(screen)
            await show.drain()
            after = await show.counts()
            broker = await show.close()
    problems = [*judge_books(books, broker), *judge_move(moved, after)]
    _print_move(moved, after)
    _print_ledger(books, broker)
    for problem in problems:
        print(f"WRONG: {problem}")
    if not problems:
        print("Nothing lost, doubled or misrouted; the traffic moved as scheduled.")
    return 1 if problems else 0


@contextlib.asynccontextmanager
async def _in_time(seconds: float, what: str) -> Any:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as late:
        raise FastmeshError(f"{what} after {seconds:g} s") from late


async def _ask(at: Address, method: str, target: str, document: object = None) -> Any:
    try:
        answer = await http.call(at, method, target, document, timeout_s=ASK_S)
    except (OSError, http.HttpError) as error:
        raise FastmeshError(f"{method} {target} at {at}: {error or 'no answer'}") from error
    if answer.status != 200:
        raise FastmeshError(f"{method} {target} at {at}: {answer.status} {answer.document}")
    return answer.document


# --- the judgement --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BrokerBooks:
    """What the broker counted."""

    sent: int
    consumed: int
    dead: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Moved:
    """Counters around the change of the weight."""

    before: dict[str, Counts]
    in_force: dict[str, Counts] | None
    """With the first delivery that was passed on; None when there was none."""
    after_s: float
    """From the PUT to that."""


def judge_books(books: Books, broker: BrokerBooks) -> list[str]:
    """What is wrong with the ledger, each in a line; [] when sent = consumed + dead + waiting on
    both sides and both sides agree."""
    found = []
    app = (len(books.sent), len(books.consumed), len(books.dead), books.waiting())
    theirs = (broker.sent, broker.consumed, broker.dead, broker.waiting)
    for name, ours, other in zip(("sent", "consumed", "dead", "waiting"), app, theirs, strict=True):
        if ours != other:
            found.append(f"{name}: the application counts {ours:,}, the broker {other:,}")
    for who, (sent, *rest) in (("application", app), ("broker", theirs)):
        if sent != sum(rest):
            found.append(f"the ledger of the {who} does not balance: {sent:,} is not {sum(rest):,}")
    for count, what in (
        (books.unknown(), "consumed or dead, and never sent"),
        (books.twice, "delivered again after they were done with"),
        (books.strange, "delivered to a group that they are not for"),
        (books.unsure, "sent, and not answered"),
        (books.refused, "not taken by the broker"),
    ):
        if count:
            found.append(f"{count:,} messages {what}")
    if not books.sent:
        found.append("nothing was sent")
    return found


def judge_move(moved: Moved, after: dict[str, Counts]) -> list[str]:
    """What is wrong with the traffic: before the move every node keeps all, afterwards the moved
    one keeps its weight, the others all."""
    found = [
        f"{node} passed {counts.passed:,} deliveries on while its weight was 100"
        for node, counts in (*moved.before.items(), *after.items())
        if counts.passed and (counts is moved.before[node] or node != MOVED)
    ]
    if moved.in_force is None:
        return [*found, f"{MOVED} passed nothing on within {MOVE_S:g} s of the new schedule"]
    news = after[MOVED] - moved.in_force[MOVED]
    if news.pushed < JUDGED_MIN:
        found.append(
            f"the broker made {news.pushed} deliveries to {MOVED} after the move:"
            f" {JUDGED_MIN} are needed to tell a share"
        )
    off = abs(news.kept - news.pushed * WEIGHT_AFTER / 100)
    if off > news.pushed * TOLERANCE + TOLERANCE_MESSAGES:
        found.append(
            f"{MOVED} kept {news.kept:,} of {news.pushed:,} deliveries after the move:"
            f" not {WEIGHT_AFTER} percent (± {TOLERANCE:.0%})"
        )
    return found


def _print_move(moved: Moved, after: dict[str, Counts]) -> None:
    print(f"\nThe traffic: what the broker delivered to {MOVED}")
    before = moved.before[MOVED]
    phases = [(WEIGHT_BEFORE, before, "")]
    if moved.in_force is not None:
        note = f", in force {moved.after_s:.2f} s after the PUT"
        phases.append((WEIGHT_AFTER, after[MOVED] - moved.in_force[MOVED], note))
    for weight, counts, note in phases:
        share = counts.kept / counts.pushed if counts.pushed else 0.0
        print(
            f"  weight {weight:3}: {counts.kept:7,} of {counts.pushed:7,} stayed,"
            f" {share:6.1%}{note}"
        )
    print(f"  wanted: {WEIGHT_BEFORE}, then {WEIGHT_AFTER} percent (± {TOLERANCE:.0%})")


def _print_ledger(books: Books, broker: BrokerBooks) -> None:
    print(f"\nThe ledger{'application':>18}{'broker':>12}")
    rows: list[tuple[str, int, int, str]] = [
        ("sent", len(books.sent), broker.sent, ""),
        ("consumed", len(books.consumed), broker.consumed, ""),
        ("dead", len(books.dead), broker.dead, f"  in %DLQ%{BILLING.name}"),
        ("waiting", books.waiting(), broker.waiting, "  put off for an hour"),
    ]
    for name, ours, theirs, note in rows:
        print(f"  {name:10}{ours:16,}{theirs:12,}{note}")
    sums = (
        len(books.sent) == len(books.consumed) + len(books.dead) + books.waiting(),
        broker.sent == broker.consumed + broker.dead + broker.waiting,
    )
    words = ["yes" if right else "NO" for right in sums]
    print(f"  sent = consumed + dead + waiting: {words[0]}, {words[1]}")
    print(f"  delivered more than once, as it was asked for: {books.redelivered:,}")
