"""The command line. Errors are one readable line; `--debug` adds the traceback.

Exit codes: 0 done, 1 failure, 2 wrong usage, 64 the configuration cannot be used, 69 no fastmesh
answers, 75 the state directory is in use, or (drain --wait) it is not safe to stop yet.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from fastmesh._version import __version__
from fastmesh.errors import EXIT_FAILURE, ConfigError, FastmeshError, NotSafeError

if TYPE_CHECKING:
    from fastmesh.admin.client import AdminClient
    from fastmesh.handover.wire import Mode

F = TypeVar("F", bound=Callable[..., Any])
POLL_S = 0.1


@dataclass(slots=True)
class Settings:
    debug: bool = False


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Settings).debug = True


def debug_option(function: F) -> F:
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_set_debug,
        help="Show the traceback of an error.",
    )(function)


def config_option(function: F) -> F:
    return click.option(
        "-c", "--config", "path", required=True, metavar="FILE", help="The configuration file."
    )(function)


def admin_options(function: F) -> F:
    """-c FILE or --admin ADDR, turned into a client."""
    for option in (
        click.option(
            "-c", "--config", "path", metavar="FILE", help="Find it by its configuration."
        ),
        click.option("--admin", "admin", metavar="ADDR", help="host:port or unix:path."),
        click.option("--token-file", metavar="FILE", help="Token for --admin."),
        debug_option,
    ):
        function = option(function)
    return function


def _client(path: str | None, admin: str | None, token_file: str | None) -> AdminClient:
    from fastmesh import config as configuration
    from fastmesh.address import parse_address
    from fastmesh.admin.client import AdminClient

    if (path is None) == (admin is None):
        raise click.UsageError("give either -c FILE or --admin ADDR")
    if path is not None:
        found = configuration.load(path).admin
        return AdminClient(found.listen, found.token)
    try:
        address = parse_address(admin or "", os.getcwd())
    except ValueError as error:
        raise click.UsageError(f"--admin {admin}: {error}") from error
    token = configuration.read_token(token_file) if token_file else None
    return AdminClient(address, token)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  fastmesh check -c fastmesh.yaml     is the configuration right?
  fastmesh run -c fastmesh.yaml       serve until SIGTERM; SIGHUP reloads
  fastmesh top -c fastmesh.yaml       what goes through it just now
  fastmesh demo                       see it work, nothing else needed
\b
Exit codes: 1 failure, 2 wrong usage, 64 configuration, 69 no fastmesh answers,
75 state directory in use, or not safe to stop yet.
""",
)
@click.version_option(__version__, message="%(version)s")
@debug_option
def cli() -> None:
    """A message mesh: one process beside every application that carries its traffic."""


HANDOVER_MODES = click.Choice(["auto", "move", "drain"])


@cli.command(
    epilog="\b\nExamples:\n  fastmesh run -c /etc/fastmesh.yaml\n"
    "  fastmesh run --takeover -c /etc/fastmesh.yaml"
)
@config_option
@click.option(
    "--takeover",
    is_flag=True,
    help="Take everything over from the process that serves with the same state_dir; where there"
    " is none, just start.",
)
@click.option("--handover-mode", type=HANDOVER_MODES, default="auto", hidden=True)
@click.option("--report-fd", type=click.IntRange(3), default=None, hidden=True)
@debug_option
def run(path: str, takeover: bool, handover_mode: Mode, report_fd: int | None) -> None:
    """Serve until SIGTERM or SIGINT (twice: at once). SIGHUP reads FILE again."""
    from fastmesh import app

    if not takeover:
        app.run(path)
        return
    fd = -1 if report_fd is None else report_fd
    app.run(path, app.Takeover(mode=handover_mode, report_fd=fd))


@cli.command(
    epilog="\b\nExamples:\n  fastmesh upgrade -c fastmesh.yaml\n"
    "  fastmesh upgrade -c fastmesh.yaml --json\n\b\n"
    "Exit codes: 0 the new process serves, 1 refused or failed (the old one serves on),\n"
    "64 FILE cannot be used (nothing was touched), 69 no fastmesh serves."
)
@config_option
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
@click.option(
    "--mode",
    type=HANDOVER_MODES,
    default="auto",
    show_default=True,
    help="move: everything or nothing. drain: the listeners only, connections end by themselves."
    " auto: move, or drain where the versions are too far apart.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1.0, 3600.0),
    default=60.0,
    show_default=True,
    help="Seconds to wait for the report.",
)
@debug_option
def upgrade(path: str, as_json: bool, mode: str, timeout: float) -> int:
    """Replace the running fastmesh by a new process: this code, this FILE.

    Live connections move with everything that is under way on them. Either all of it moves, or
    nothing does and the old process serves on.
    """
    import msgspec

    from fastmesh import config as configuration
    from fastmesh.handover import launch

    configuration.load(path)  # what is wrong with it is said before a process is started
    report = launch.upgrade(path, mode=mode, timeout_s=timeout)
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        for line in launch.explain(report):
            click.echo(line, err=not report["ok"])
    return launch.exit_code(report)


@cli.command(epilog="\b\nExample:\n  fastmesh check -c fastmesh.yaml && systemctl reload fastmesh")
@config_option
@debug_option
def check(path: str) -> None:
    """Check FILE and report everything that is wrong with it. Opens no socket, resolves no name."""
    from fastmesh import config as configuration

    config = configuration.load(path)
    if config.push is not None and config.push.schedule_file:
        from fastmesh.mesh.sources import read_schedule

        read_schedule(config.push.schedule_file)
    click.echo(configuration.describe(config) + ": ok")


@cli.command(
    epilog="\b\nExamples:\n  fastmesh status -c fastmesh.yaml\n"
    "  fastmesh status --admin 127.0.0.1:7070 --json"
)
@click.option("--json", "as_json", is_flag=True, help="The answer of /v1/status as it is.")
@admin_options
def status(path: str | None, admin: str | None, token_file: str | None, as_json: bool) -> None:
    """What runs, since when, with which configuration."""
    found = _client(path, admin, token_file).get("/v1/status")
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    config = found["config"]
    click.echo(f"fastmesh {found['version']}, process {found['pid']}, node {found['node']}")
    drained = ", drained" if found["drained"] else ""
    click.echo(f"state    {found['state']}{drained}, up {found['uptime_s']:.0f} s")
    if (drain := found["drain"])["step"] != "none":
        safe = ", safe to stop" if drain["safe_to_stop"] else ""
        left = f", waits for {_left(drain['waiting_for'])}" if drain["waiting_for"] else ""
        click.echo(f"drain    step {drain['step']}{safe}, {drain['since_ms'] / 1000:.1f} s{left}")
    click.echo(f"config   {config['version']}, sha256 {config['sha256'][:12]}, {config['source']}")
    for name, address in found["listeners"].items():
        click.echo(f"listens  {name} on {address}")
    for warning in found["warnings"]:
        click.echo(f"warning  {warning}")


@cli.command(
    epilog="\b\nExamples:\n  fastmesh top -c fastmesh.yaml\n"
    "  fastmesh top --admin unix:run/admin.sock --once"
)
@click.option("--once", is_flag=True, help="One plain table; also when the output is no terminal.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 60.0),
    default=1.0,
    show_default=True,
    help="Seconds between looks.",
)
@admin_options
def top(
    path: str | None, admin: str | None, token_file: str | None, once: bool, interval: float
) -> None:
    """Live rates, latencies and requests in flight per route and endpoint."""
    from fastmesh.observe import top as table

    client = _client(path, admin, token_file)

    def look() -> tuple[Any, float]:
        return client.get("/v1/routes?counts"), time.monotonic()

    before, then = look()
    _pause(interval)
    if once or not sys.stdout.isatty():
        after, now = look()
        click.echo(table.title(client.get("/v1/status"), after))
        click.echo(table.plain(table.compare(before, after, now - then)))
        return
    try:
        from rich.live import Live
    except ImportError as error:
        raise FastmeshError("the live table needs rich (or use --once)") from error
    with Live(screen=True, auto_refresh=False) as live:
        while True:
            after, now = look()
            heading = table.title(client.get("/v1/status"), after)
            lines = table.compare(before, after, now - then)
            live.update(table.rich_table(heading, lines), refresh=True)
            before, then = after, now
            _pause(interval)


@cli.command(
    epilog="\b\nExamples:\n"
    "  fastmesh drain -c fastmesh.yaml --wait --timeout 60 && systemctl stop fastmesh\n"
    "  fastmesh drain -c fastmesh.yaml --hold --wait\n"
    "  fastmesh drain -c fastmesh.yaml --cancel\n\b\n"
    "Exit code: 0 when it is safe to stop (without --wait: when the drain has begun), 75 when it\n"
    "is not yet after SECONDS, 1 when fastmesh refuses or the drain was cancelled."
)
@click.option("--wait", is_flag=True, help="Come back when it is safe to stop.")
@click.option(
    "--hold", is_flag=True, help="Suspend brokers and let pushes be answered; clients stay."
)
@click.option("--cancel", is_flag=True, help="Serve again, as long as clients are not let go.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 86400.0),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="With --wait: wait at most so long. The drain goes on.",
)
@admin_options
def drain(
    *,
    path: str | None,
    admin: str | None,
    token_file: str | None,
    wait: bool,
    hold: bool,
    cancel: bool,
    timeout: float,
) -> None:
    """Prepare a stop: brokers push nothing more, what they pushed is answered, clients go.

    The process stays, and says when it is safe to stop it. SIGTERM does the same within
    limits.stop_timeout_ms.
    """
    client = _client(path, admin, token_file)
    if cancel:
        if wait or hold:
            raise click.UsageError("--cancel goes with neither --wait nor --hold")
        click.echo(client.post("/v1/drain/cancel")["state"])
        return
    client.post("/v1/drain?hold" if hold else "/v1/drain")
    if not wait:
        click.echo("draining")
        return
    until = time.monotonic() + timeout
    while True:
        found = client.get("/v1/status")["drain"]
        if found["step"] == "none":
            raise FastmeshError("the drain was cancelled")
        if found["safe_to_stop"]:
            break
        if time.monotonic() >= until:
            left = _left(found["waiting_for"]) or "its end"
            raise NotSafeError(
                f"not safe to stop after {timeout:g} s: step {found['step']} waits for {left}"
            )
        _pause(POLL_S)
    click.echo("safe to stop")
    for step in found["steps"]:
        if step["left"]:
            click.echo(f"step {step['step']} {step['outcome']}: {_left(step['left'])}")


def _left(waiting: dict[str, Any]) -> str:
    """`waiting_for` of a drain as a sentence."""
    found = []
    for what, some in waiting.items():
        named = some
        if isinstance(some, dict):
            named = ", ".join(f"{name} {count}" for name, count in some.items())
        elif isinstance(some, list):
            named = ", ".join(some)
        found.append(f"{_WORDS.get(what, what)} {named}")
    return "; ".join(found)


_WORDS = {"groups": "pushes of", "connections": "connections on", "brokers": "brokers"}


@cli.command(
    epilog="\b\nExamples:\n  fastmesh demo\n  fastmesh demo --seconds 60 --rate 1000\n\b\n"
    "Exit code: 0 when sent = consumed + dead + waiting, and the share of the\n"
    "deliveries that stays on the node is its weight (within 2 percent of all)."
)
@click.option(
    "--seconds",
    type=click.FloatRange(4.0, 600.0),
    default=16.0,
    show_default=True,
    help="How long messages are sent.",
)
@click.option(
    "--rate",
    type=click.FloatRange(50.0, 2000.0),
    default=500.0,
    show_default=True,
    help="Messages a second, as far as the machine can.",
)
@debug_option
def demo(seconds: float, rate: float) -> int:
    """A message mesh in one process: a broker, two nodes, producers and consumers.

    A live table shows which node takes what. Half-way the weight of one node moves from 100 to 20,
    and the traffic with it. At the end stands the ledger of all messages. It needs nothing else,
    leaves nothing behind, and ends by itself.
    """
    from fastmesh import demo as show

    return show.run(seconds=seconds, rate=rate)


class Duration(click.ParamType[int]):
    """`250ms`, `1s`, `5m`, `2h`, `1d`, as milliseconds."""

    name = "time"
    _units: ClassVar = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

    def __init__(self, low_ms: int, high_ms: int) -> None:
        self._low_ms = low_ms
        self._high_ms = high_ms

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,9})(ms|s|m|h|d)", str(value).strip())
        if found is None:
            self.fail(f"{value!r} is no time: a number and ms, s, m, h or d, as in 30s", param, ctx)
        time_ms = int(found[1]) * self._units[found[2]]
        if not self._low_ms <= time_ms <= self._high_ms:
            self.fail(f"{value!r} is not within {self._low_ms}..{self._high_ms} ms", param, ctx)
        return time_ms


class Durations(Duration):
    """Some of them, separated by commas, as a tuple."""

    name = "times"

    def convert(  # type: ignore[override]
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        convert = super().convert
        return tuple(convert(item, param, ctx) for item in str(value).split(","))


class Listen(click.ParamType[Any]):
    """Where to listen; port 0 lets the kernel choose."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from fastmesh.address import parse_address

        try:
            return parse_address(value, os.getcwd(), port_min=0)
        except ValueError as error:
            self.fail(f"{value!r} {error}", param, ctx)


@cli.command(
    epilog="\b\nExample:\n"
    "  fastmesh broker --listen 127.0.0.1:12400 --admin 127.0.0.1:7072 --data /var/lib/fastmesh-b1"
)
@click.option("--listen", required=True, type=Listen(), metavar="ADDR", help="For meshes.")
@click.option("--admin", required=True, type=Listen(), metavar="ADDR", help="For operators.")
@click.option("--admin-token-file", metavar="FILE", help="Needed where --admin is not loopback.")
@click.option("--data", required=True, metavar="DIR", help="The store. One broker at a time.")
@click.option("--name", default="b1", show_default=True, help="As push.brokers[].name says it.")
@click.option(
    "--redeliver",
    type=Durations(1, 86_400_000),
    default="1s,5s,10s,30s,1m",
    show_default=True,
    metavar="STEPS",
    help="Until the second attempt, the third, ...; the last repeats.",
)
@click.option(
    "--max-attempts",
    type=click.IntRange(1, 10_000),
    default=16,
    show_default=True,
    help="After these a message goes to %DLQ%group.",
)
@click.option(
    "--sync",
    type=click.Choice(["sync", "async"]),
    default="sync",
    show_default=True,
    help="Publishers are answered when the disk has it, or when the kernel has it.",
)
@click.option(
    "--topic", "topics", multiple=True, metavar="NAME=sync|async", help="The same for one topic."
)
@click.option(
    "--queues", type=click.IntRange(1, 64), default=4, show_default=True, help="Of new topics."
)
@click.option(
    "--start",
    type=click.Choice(["first", "last"]),
    default="first",
    show_default=True,
    help="Where a new group begins: the oldest message that is kept, or the next.",
)
@click.option(
    "--answer-timeout",
    type=Duration(100, 3_600_000),
    default="60s",
    show_default=True,
    help="A delivery without an answer for so long is made again.",
)
@click.option("--check-after", type=Duration(10, 86_400_000), default="6s", show_default=True,
              help="A prepared message is asked about after this ...")  # fmt: skip
@click.option("--check-every", type=Duration(10, 86_400_000), default="30s", show_default=True,
              help="... and then so often ...")  # fmt: skip
@click.option("--check-max", type=click.IntRange(1, 10_000), default=15, show_default=True,
              help="... and rolled back after so many.")  # fmt: skip
@click.option("--keep", type=Duration(0, 365 * 86_400_000), default="1d", show_default=True,
              help="Consumed messages are kept so long ...")  # fmt: skip
@click.option("--keep-mib", type=click.IntRange(1, 1 << 20), default=1024, show_default=True,
              help="... while the store is smaller than this.")  # fmt: skip
@click.option("--max-mib", type=click.IntRange(1, 1 << 20), default=16384, show_default=True,
              help="A larger store takes nothing new.")  # fmt: skip
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info"
)
@debug_option
def broker(**given: Any) -> None:
    """A push broker on this machine, for development and tests: one process, one directory."""
    from fastmesh import app
    from fastmesh import config as configuration
    from fastmesh.broker.model import Options
    from fastmesh.broker.server import Settings as BrokerSettings

    topics = {}
    for text in given["topics"]:
        name, _, policy = text.rpartition("=")
        if not name or policy not in ("sync", "async"):
            raise click.UsageError(f"--topic {text}: must be NAME=sync or NAME=async")
        topics[name] = policy == "sync"
    if re.fullmatch(r"[A-Za-z0-9_.:-]{1,127}", given["name"]) is None:
        raise click.UsageError(
            f"--name {given['name']}: must be 1..127 letters, digits or any of _.:-"
        )
    if not given["admin"].is_loopback and given["admin_token_file"] is None:
        raise click.UsageError(
            f"--admin {given['admin']}: is not a loopback address: it needs --admin-token-file"
        )
    token = given["admin_token_file"] and configuration.read_token(given["admin_token_file"])
    options = Options(
        name=given["name"],
        queues=given["queues"],
        sync=given["sync"] == "sync",
        topics=topics,
        redeliver_ms=given["redeliver"],
        max_attempts=given["max_attempts"],
        answer_timeout_ms=given["answer_timeout"],
        check_after_ms=given["check_after"],
        check_every_ms=given["check_every"],
        check_max=given["check_max"],
        start_first=given["start"] == "first",
        keep_ms=given["keep"],
        keep_bytes=given["keep_mib"] << 20,
        bytes_max=given["max_mib"] << 20,
    )
    app.run_broker(
        BrokerSettings(
            listen=given["listen"],
            admin=configuration.Admin(given["admin"], token),
            data=os.path.abspath(given["data"]),
            options=options,
            log_format=given["log_format"],
            log_level=given["log_level"],
        )
    )


@cli.command()
def version() -> None:
    """The version."""
    click.echo(__version__)


def _pause(seconds: float) -> None:
    """Between two looks at a running fastmesh; nothing is synchronised by it."""
    threading.Event().wait(seconds)


class _LazyBench(click.Command):
    """Stands for `bench`, which lives in its own module that nothing else needs."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        from fastmesh.bench import bench

        return bench.make_context(info_name, args, parent, **extra)


cli.add_command(_LazyBench("bench", help="Load a Bolt service, or be one."))


def explain(error: FastmeshError) -> list[str]:
    """The lines that a person reads."""
    if not isinstance(error, ConfigError):
        return [f"fastmesh: {error}"]
    lines = []
    for problem in error.problems:
        where = f"{error.source}:{problem.line}" if problem.line else error.source
        what = f"{problem.path} {problem.message}" if problem.path else problem.message
        value = "" if problem.value is None else f" (is {problem.value!r})"
        lines.append(f"{where}: {what}{value}")
    return [*lines, f"fastmesh: {error}"]


def main(args: list[str] | None = None) -> None:
    """Entry point. Always ends with SystemExit."""
    settings = Settings()
    try:
        code = cli.main(args=args, prog_name="fastmesh", obj=settings, standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        # The reader has left (`| head`); Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILURE
    except FastmeshError as error:
        for line in explain(error):
            click.echo(line, err=True)
        if settings.debug:
            raise
        code = error.exit_code
    except Exception as error:
        click.echo(f"fastmesh: {type(error).__name__}: {error} (--debug shows more)", err=True)
        if settings.debug:
            raise
        code = EXIT_FAILURE
    raise SystemExit(code if isinstance(code, int) else 0)
