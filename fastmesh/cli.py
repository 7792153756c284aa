"""The command line. Errors are one readable line; `--debug` adds the traceback.

Exit codes: 0 done, 1 failure, 2 wrong usage, 64 the configuration cannot be used, 69 no fastmesh
answers, 75 the state directory is in use.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastmesh._version import __version__
from fastmesh.errors import EXIT_FAILURE, ConfigError, FastmeshError

if TYPE_CHECKING:
    from fastmesh.admin.client import AdminClient

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
    from fastmesh.admin.client import AdminClient

    if (path is None) == (admin is None):
        raise click.UsageError("give either -c FILE or --admin ADDR")
    if path is not None:
        found = configuration.load(path).admin
        return AdminClient(found.listen, found.token)
    try:
        address = configuration.parse_address(admin or "", os.getcwd())
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
75 state directory in use.
""",
)
@click.version_option(__version__, message="%(version)s")
@debug_option
def cli() -> None:
    """A message mesh: one process beside every application that carries its traffic."""


@cli.command(epilog="\b\nExample:\n  fastmesh run -c /etc/fastmesh.yaml")
@config_option
@debug_option
def run(path: str) -> None:
    """Serve until SIGTERM or SIGINT (twice: at once). SIGHUP reads FILE again."""
    from fastmesh import app

    app.run(path)


@cli.command(epilog="\b\nExample:\n  fastmesh check -c fastmesh.yaml && systemctl reload fastmesh")
@config_option
@debug_option
def check(path: str) -> None:
    """Check FILE and report everything that is wrong with it. Opens no socket, resolves no name."""
    from fastmesh import config as configuration

    click.echo(configuration.describe(configuration.load(path)) + ": ok")


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


@cli.command(epilog="\b\nExamples:\n  fastmesh drain -c fastmesh.yaml --wait --timeout 60")
@click.option("--wait", is_flag=True, help="Come back when nothing is left.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 86400.0),
    default=300.0,
    show_default=True,
    help="Seconds to wait at most.",
)
@admin_options
def drain(
    path: str | None, admin: str | None, token_file: str | None, wait: bool, timeout: float
) -> None:
    """Accept nothing new and let clients go as they fall quiet. The process stays until SIGTERM."""
    client = _client(path, admin, token_file)
    client.post("/v1/drain")
    until = time.monotonic() + timeout
    while wait and not client.get("/v1/status")["drained"]:
        if time.monotonic() >= until:
            raise FastmeshError(f"not drained after {timeout:g} s")
        _pause(POLL_S)
    click.echo("drained" if wait else "draining")


@cli.command(epilog="\b\nExample:\n  fastmesh demo --seconds 5")
@click.option("--seconds", type=click.FloatRange(1.0, 600.0), default=10.0, show_default=True)
@click.option("--connections", type=click.IntRange(2, 1000), default=64, show_default=True)
@debug_option
def demo(seconds: float, connections: int) -> int:
    """Bolt services, fastmesh in front, load, a live table and the ledger. Ends by itself."""
    from fastmesh import demo as show

    return show.run(seconds=seconds, connections=connections)


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
