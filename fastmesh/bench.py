"""`fastmesh bench`: the command line of the native load generator, echo service and push source.

Everything that is measured or checked happens in `_ext/load`; this file reads options and writes
reports.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from typing import Any

import click

from fastmesh import limits
from fastmesh._ext.load import BODY_BYTES_MAX, EchoServer, EchoStats, LoadResult, LoadRun

BUSY_SHARE = 0.85
"""From here on the tool, and not what it measures, may decide the figures."""

TOPIC = "bench"
"""Of deliveries that name none."""

FAILED = 1
"""Exit code of a run in which anything went wrong."""


class Sizes(click.ParamType[tuple[int, ...]]):
    """Body sizes: "256" or a mix, "64,256,16k"; k is 1024."""

    name = "bytes[,bytes...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(_size(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r}: expected numbers like 256 or 64,256,16k", param, ctx)
        if any(not 0 <= size <= BODY_BYTES_MAX for size in sizes):
            self.fail(f"{value!r}: each must be at most {BODY_BYTES_MAX} bytes", param, ctx)
        return sizes


def _size(text: str) -> int:
    text = text.strip().lower()
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


class Seconds(click.ParamType[float]):
    """A finite length of time, 0 or more."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            seconds = float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r}: expected seconds like 5 or 0.5", param, ctx)
        if not math.isfinite(seconds) or seconds < 0:
            self.fail(f"{value!r}: must be a finite number of seconds, 0 or more", param, ctx)
        return seconds


class DefaultGroup(click.Group):
    """A group whose first command is meant when none is named: `bench ADDR` is `bench run ADDR`."""

    default = "run"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in {"--help", "-h"}):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


@click.group(cls=DefaultGroup, context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Load a Bolt service, or be one.

    \b
    fastmesh bench 127.0.0.1:12200                    64 connections, one request in flight each
    fastmesh bench 127.0.0.1:12200 -c 16 -d 32        deeper
    fastmesh bench 127.0.0.1:12200 --rate 20000       open loop: latency at a given rate
    fastmesh bench serve --listen 127.0.0.1:12201     an echo service to load
    fastmesh bench run --help                         every option of a run
    """


@bench.command()
@click.argument("target", default="127.0.0.1:12200")
@click.option("-c", "--connections", default=64, show_default=True, help="Connections.")
@click.option(
    "-d", "--depth", default=0, help="In flight per connection; 0: 1, or 256 in the open loop."
)
@click.option(
    "--size",
    type=Sizes(),
    default="256",
    show_default=True,
    help="Bytes of a body; a mix: 64,256,16k.",
)
@click.option("--threads", default=1, show_default=True, help="Native threads.")
@click.option(
    "--duration", type=Seconds(), default=5.0, show_default=True, help="Seconds measured."
)
@click.option(
    "--warmup", type=Seconds(), default=0.5, show_default=True, help="Seconds before that."
)
@click.option("--rate", default=0.0, help="Open loop: requests a second in all; 0: closed loop.")
@click.option(
    "--connect-rate", default=0.0, help="New connections a second; 0: as fast as it goes."
)
@click.option("--connect-timeout-ms", default=10000, show_default=True)
@click.option(
    "--active", default=1.0, show_default=True, help="Share of connections that carry load."
)
@click.option("--v2", is_flag=True, help="Version 2 of the protocol.")
@click.option("--crc", is_flag=True, help="With checksums (implies --v2).")
@click.option("-n", "--requests", default=0, help="End after so many requests, if not before.")
@click.option("--timeout-ms", default=3000, show_default=True, help="Deadline in each request.")
@click.option(
    "--service",
    default="com.example.Order:1.0",
    show_default=True,
    help="The service header; empty: none.",
)
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="A further header.")
@click.option(
    "--consume",
    metavar="APP/CLIENT/GROUP",
    help="Be consumers of that group of a message mesh: ask nothing, answer 'consumed'.",
)
@click.option(
    "--prefetch",
    type=click.IntRange(1, limits.PREFETCH_MAX),
    help=f"With --consume: messages in flight per connection; {limits.PREFETCH} by default.",
)
@click.option("--seed", default=0, help="Decides bodies and the order of sizes; 0: drawn.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.option("--histogram", is_flag=True, help="The whole distribution.")
def run(
    *,
    target: str,
    connections: int,
    depth: int,
    size: tuple[int, ...],
    threads: int,
    duration: float,
    warmup: float,
    rate: float,
    connect_rate: float,
    connect_timeout_ms: int,
    active: float,
    requests: int,
    v2: bool,
    crc: bool,
    timeout_ms: int,
    service: str,
    headers: tuple[str, ...],
    consume: str | None,
    prefetch: int | None,
    seed: int,
    as_json: bool,
    histogram: bool,
) -> None:
    """Load TARGET ("127.0.0.1:12200", "[::1]:12200", "unix:./run/rpc.sock") and check every answer.

    Exit code 0: every request got its own answer, whole. 1: anything else, counted by kind.
    """
    pairs = [header.partition("=") for header in headers]
    for name, sign, _ in pairs:
        if not name or not sign:
            raise click.UsageError(f"--header {name + sign!r}: expected NAME=VALUE")
    if prefetch is not None and consume is None:
        raise click.UsageError("--prefetch needs --consume")
    try:
        load = LoadRun(
            target,
            connections=connections,
            depth=depth,
            sizes=size,
            threads=threads,
            duration_ms=round(duration * 1000),
            warmup_ms=round(warmup * 1000),
            rate=rate,
            connect_rate=connect_rate,
            connect_timeout_ms=connect_timeout_ms,
            active=active,
            requests=requests,
            version=2 if v2 or crc else 1,
            crc=crc,
            timeout_ms=timeout_ms,
            service=service,
            headers=[(name, value) for name, _, value in pairs],
            consume=None if consume is None else (*consumer(consume), prefetch or limits.PREFETCH),
            seed=seed,
        )
    except (ValueError, OSError) as error:
        raise click.UsageError(
            f"{target}: {error}" if isinstance(error, OSError) else str(error)
        ) from error
    load.start()
    watch(load, live=sys.stderr.isatty())
    result = load.result()
    if as_json:
        click.echo(json.dumps(as_dict(result, histogram=histogram)))
    else:
        click.echo(report(result, target, rate))
        if histogram:
            click.echo(distribution(result))
    sys.exit(0 if result.ok else FAILED)


def consumer(text: str) -> tuple[str, str, str]:
    """(app, client, group) of --consume. Raises click.UsageError."""
    parts = text.split("/")
    if len(parts) != 3 or not all(parts):
        raise click.UsageError(f"--consume {text!r}: expected APP/CLIENT/GROUP")
    return parts[0], parts[1], parts[2]


def watch(load: LoadRun, *, live: bool) -> None:
    """Wait for the end; Ctrl-C ends the measurement early and still reports it."""
    answered = 0
    elapsed = 0.0
    while True:
        try:
            if load.wait(1.0):
                break
        except KeyboardInterrupt:
            load.stop()
            continue
        if live:
            now = load.progress()
            pace = (now.answered - answered) / max(now.elapsed_s - elapsed, 1e-9)
            answered, elapsed = now.answered, now.elapsed_s
            line = (
                f"\r{now.elapsed_s:6.0f} s  {now.state:<10} {now.connections} connections  "
                f"{pace:>9,.0f}/s  {now.in_flight} in flight  {now.errors} errors"
            )
            click.echo(f"{line:<100}", err=True, nl=False)
    if live:
        click.echo("\r" + " " * 100 + "\r", err=True, nl=False)


def as_dict(result: LoadResult, *, histogram: bool = False) -> dict[str, Any]:
    """A result as JSON knows it; the histogram only when it is wanted, because it is long."""
    known = result._asdict()
    known["latency"] = result.latency._asdict()
    known["sections"] = [section._asdict() for section in result.sections]
    if not histogram:
        del known["histogram"]
    return known


def microseconds(ns: float) -> str:
    return f"{ns / 1e6:,.2f} ms" if ns >= 1e6 else f"{ns / 1e3:,.1f} µs"


def report(result: LoadResult, target: str, rate: float) -> str:
    """What a person wants to know, the bad news last and marked."""
    lat = result.latency
    lines = [
        f"{target}: {result.connections} connections, {result.duration_s:.2f} s measured, "
        + (f"open loop at {rate:,.0f}/s" if rate else "closed loop"),
        f"  throughput  {result.throughput_per_s:,.0f}/s   ({result.answered:,} answers)",
        f"  latency     p50 {microseconds(lat.p50_ns)}   p90 {microseconds(lat.p90_ns)}   "
        f"p99 {microseconds(lat.p99_ns)}   p99.9 {microseconds(lat.p999_ns)}   "
        f"max {microseconds(lat.max_ns)}",
        f"  this tool   {result.cpu_share:.0%} of a core (busiest thread)",
    ]
    if result.answered:
        lines.append(
            f"  gap         {result.gap_ms_max:,.2f} ms at most between two answers of a connection"
        )
    if result.answered_for_peer:
        lines.append(f"  answered    {result.answered_for_peer:,} requests from the server side")
    if result.cpu_share > BUSY_SHARE:
        lines.append(
            "  WARNING     the load generator itself is the bottleneck: "
            "these figures are its own. Try --threads or fewer connections."
        )
    wrong = {kind: count for kind, count in result.errors.items() if count}
    if wrong:
        lines.append(
            "  ERRORS      " + ", ".join(f"{kind} {count:,}" for kind, count in wrong.items())
        )
        lines.append(
            f"              from {result.first_error_s or 0.0:.3f} s to "
            f"{result.last_error_s or 0.0:.3f} s; {result.resets:,} resets, "
            f"{result.kept:,} of {result.connections:,} connections kept"
        )
    elif not result.ok:
        lines.append("  ERRORS      nothing was answered")
    elif result.answered:
        lines.append("  errors      none: every answer was the right one, whole")
    else:
        lines.append("  errors      none")
    return "\n".join(lines)


def distribution(result: LoadResult) -> str:
    """Four lines per octave: where the answers are, and what share is done by then."""
    rows: dict[int, list[int]] = {}
    for bound, count in result.histogram:
        at = bound.bit_length() * 4 + ((bound >> max(0, bound.bit_length() - 3)) & 3)
        row = rows.setdefault(at, [bound, 0])
        row[0] = max(row[0], bound)
        row[1] += count
    total = sum(count for _, count in rows.values())
    most = max((count for _, count in rows.values()), default=1)
    seen = 0
    lines = []
    for _, (bound, count) in sorted(rows.items()):
        seen += count
        bar = "█" * max(1, round(40 * count / most))
        lines.append(f"  < {microseconds(bound):>12}  {seen / total:>9.4%}  {count:>10,}  {bar}")
    return "\n".join(lines)


@bench.command()
@click.option(
    "--listen", default="127.0.0.1:12201", show_default=True, help="Address; also unix:PATH."
)
@click.option("--threads", default=1, show_default=True, help="Native threads.")
@click.option("--delay-ms", default=0, help="Answer this much later.")
@click.option("--status", default=0, help="Answer with this status and no content.")
@click.option(
    "--frame-bytes-max", default=BODY_BYTES_MAX, show_default=True, help="Longest frame taken."
)
@click.option(
    "--push", is_flag=True, help="Also send requests to the clients, and check their answers."
)
@click.option(
    "--rate", default=100.0, show_default=True, help="Pushes a second on each connection."
)
@click.option(
    "-d", "--depth", default=64, show_default=True, help="Pushes in flight per connection."
)
@click.option(
    "--size", type=Sizes(), default="256", show_default=True, help="Bytes of a push's body."
)
@click.option("--timeout-ms", default=3000, show_default=True, help="Deadline in each push.")
@click.option(
    "--group",
    help="With --push: be a broker of a message mesh and push deliveries to this group.",
)
@click.option("--topic", help=f"With --group: the deliveries' topic; {TOPIC!r} by default.")
@click.option(
    "--duration",
    type=Seconds(),
    default=0.0,
    help="End by itself after so many seconds; 0: never.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end.")
def serve(
    *,
    listen: str,
    threads: int,
    delay_ms: int,
    status: int,
    frame_bytes_max: int,
    push: bool,
    rate: float,
    depth: int,
    size: tuple[int, ...],
    timeout_ms: int,
    group: str | None,
    topic: str | None,
    duration: float,
    as_json: bool,
) -> None:
    """Echo every request's content until SIGINT or SIGTERM (or --duration)."""
    if group is not None and not (push and group):
        raise click.UsageError(f"--group {group!r}: needs --push, and a name")
    if topic is not None and not (group and topic):
        raise click.UsageError(f"--topic {topic!r}: needs --group, and a name")
    signals = {signal.SIGINT, signal.SIGTERM}
    # Taken with sigtimedwait below; blocked from the start, so that none is missed.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        service = EchoServer(
            listen,
            threads=threads,
            delay_ms=delay_ms,
            status=status,
            frame_bytes_max=frame_bytes_max,
            push_rate=rate if push else 0.0,
            push_depth=depth,
            push_sizes=size,
            push_timeout_ms=timeout_ms,
            push_group=group or "",
            push_topic=topic or TOPIC,
        )
        service.start()
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{listen}: {error.strerror or error}") from error
    click.echo(f"listening on {service.address}")
    sys.stdout.flush()
    if duration > 0:
        signal.sigtimedwait(signals, duration)
    else:
        signal.sigwait(signals)
    settled = service.stop_push(timeout_ms + 1000) if push else True
    pushed = service.push_result() if push else None
    service.stop()
    stats = service.stats()
    if as_json:
        known: dict[str, Any] = stats._asdict()
        if pushed is not None:
            known["push"] = as_dict(pushed)
        click.echo(json.dumps(known))
    else:
        click.echo(echo_report(stats))
        if pushed is not None:
            click.echo(report(pushed, "pushes", rate))
    sys.exit(0 if settled and (pushed is None or pushed.ok) else FAILED)


def echo_report(stats: EchoStats) -> str:
    return (
        f"{stats.requests:,} requests, {stats.oneways:,} oneway, {stats.heartbeats:,} heartbeats "
        f"on {stats.accepted:,} connections; {stats.bytes_in:,} bytes in, {stats.bytes_out:,} out; "
        f"{stats.undecodable} undecodable, {stats.overloaded} refused for lack of memory; "
        f"{stats.cpu_s:.2f} s CPU"
    )


if __name__ == "__main__":
    bench()
