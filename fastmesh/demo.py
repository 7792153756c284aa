"""A mesh to look at: Bolt services, fastmesh in front, load, a live table, and the ledger at the
end.

Everything runs in this process on loopback ports of the kernel's choice, and ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from fastmesh import config as configuration
from fastmesh.admin.views import routes_view
from fastmesh.app import Mesh
from fastmesh.observe import top
from fastmesh.observe.log import Log
from fastmesh.observe.metrics import CAUSES

LOOK_S = 1.0
CONFIG = """\
node: {{name: demo, app: demo}}
state_dir: {state_dir}
admin: {{listen: "127.0.0.1:0"}}
log: {{level: warning}}
listeners:
  - name: rpc
    listen: 127.0.0.1:0
    protocol: bolt
    routes:
      - {{match: {{service: "com.example.Order:1.0"}}, cluster: orders}}
      - {{cluster: others}}
clusters:
  - name: orders
    protocol: bolt
    endpoints: [{{address: "{0}"}}]
  - name: others
    protocol: bolt
    endpoints: [{{address: "{1}", weight: 20}}, {{address: "{2}", weight: 80}}]
limits: {{connections_max: 2000}}
"""

Show = Callable[[str, list[top.Line]], None]


def run(*, seconds: float, connections: int) -> int:
    """The exit code: 0 when every request was answered and the ledger balances."""
    import uvloop

    return uvloop.run(_run(seconds, connections))


async def _run(seconds: float, connections: int) -> int:
    from fastmesh._ext.load import EchoServer, LoadRun

    with contextlib.ExitStack() as stack:
        state_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastmesh-demo-"))
        services = [stack.enter_context(EchoServer("127.0.0.1:0")) for _ in range(3)]
        text = CONFIG.format(*(s.address for s in services), state_dir=state_dir)
        config = configuration.parse(text.encode(), base=state_dir, source="demo")
        print("3 Bolt services, one fastmesh in front of them, this configuration:\n")
        print(text)
        mesh = Mesh(config, Log(level="warning"))
        await mesh.start()
        try:
            target = mesh.addresses()["rpc"]
            loads = [
                LoadRun(
                    target,
                    connections=max(1, connections // 2),
                    service=service,
                    duration_ms=int(seconds * 1000),
                    warmup_ms=0,
                )
                for service in ("com.example.Order:1.0", "com.example.Stock:1.0")
            ]
            with _table() as show:
                for load in loads:
                    load.start()
                await _watch(mesh, loads, show)
            results = [load.result() for load in loads]
            reading = await mesh.readings.counters()
            view = routes_view(mesh.compiled, reading, mesh.events)
        finally:
            await mesh.stop()
        served = sum(service.stats().requests for service in services)
    return _summary(view, results, served)


async def _watch(mesh: Mesh, loads: list[Any], show: Show) -> None:
    """Show the table once a second until every load is over (each is bounded in time)."""
    before: top.Look | None = None
    then = time.monotonic()
    while not all(load.wait(0) for load in loads):
        reading = await mesh.readings.counters()
        now = time.monotonic()
        look = routes_view(mesh.compiled, reading, mesh.events, counts=True)
        if before is not None:
            clients = sum(item["connections"] for item in look["listeners"])
            heading = f"fastmesh demo  {clients} clients  {mesh.uptime_s:.0f} s"
            show(heading, top.compare(before, look, now - then))
        before, then = look, now
        await asyncio.sleep(LOOK_S)


@contextlib.contextmanager
def _table() -> Iterator[Show]:
    """A live table on a terminal, plain lines elsewhere (or without rich)."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.live import Live

            with Live(auto_refresh=False) as live:
                yield lambda heading, lines: live.update(
                    top.rich_table(heading, lines), refresh=True
                )
            return
    yield _print_lines


def _print_lines(heading: str, lines: list[top.Line]) -> None:
    print(heading)
    for line in lines:
        if line.rate_per_s:
            print(
                f"  {line.kind:8} {line.name:32} {line.rate_per_s:9,.0f}/s"
                f"  p50 {line.p50_us:6,.0f} µs  p99 {line.p99_us:6,.0f} µs"
                f"  in flight {line.in_flight}"
            )
    sys.stdout.flush()


def _summary(view: dict[str, Any], results: list[Any], served: int) -> int:
    blocks = [*view["routes"], *(item["unrouted"] for item in view["listeners"])]
    accepted = sum(b["accepted"] for b in blocks)
    answered = sum(b["answered"] for b in blocks)
    expired = sum(b["expired"] for b in blocks)
    in_flight = sum(b["in_flight"] for b in blocks)
    failed = {cause: sum(b["failed"][cause] for b in blocks) for cause in CAUSES}
    failed_all = sum(failed.values())
    balanced = accepted == answered + failed_all + expired + in_flight
    causes = ", ".join(f"{cause} {count}" for cause, count in failed.items() if count)

    print("\nThe ledger")
    print(f"  accepted  {accepted:12,}")
    print(f"  answered  {answered:12,}")
    print(f"  failed    {failed_all:12,}  {causes}".rstrip())
    print(f"  expired   {expired:12,}")
    print(f"  in flight {in_flight:12,}")
    print(f"  accepted = answered + failed + expired + in flight: {'yes' if balanced else 'NO'}")

    sent = sum(r.sent_total for r in results)
    errors: dict[str, int] = {}
    for result in results:
        for kind, count in result.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    print("The clients")
    print(f"  sent      {sent:12,}   the services saw {served:,}")
    for number, result in enumerate(results, 1):
        print(
            f"  load {number}    {result.throughput_per_s:12,.0f}/s"
            f"  p50 {result.latency.p50_ns / 1000:,.0f} µs"
            f"  p99 {result.latency.p99_ns / 1000:,.0f} µs"
        )
    wrong = {kind: count for kind, count in errors.items() if count}
    print("  errors    " + (", ".join(f"{k} {v}" for k, v in wrong.items()) or "none"))
    whole = sent == accepted == served and all(r.ok for r in results)
    fine = balanced and whole and failed_all == expired == in_flight == 0
    print("Nothing lost, doubled or misrouted." if fine else "SOMETHING IS WRONG: see above.")
    return 0 if fine else 1
