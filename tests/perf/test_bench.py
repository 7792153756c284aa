"""`fastmesh bench` as its users run it: options, output, exit codes."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = [sys.executable, "-m", "fastmesh.bench"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BENCH, *arguments], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    service = subprocess.Popen(
        [*BENCH, "serve", "--listen", "127.0.0.1:0", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert service.stdout is not None
        line = service.stdout.readline()
        assert line.startswith("listening on "), line
        yield line.split()[-1], service
    finally:
        service.terminate()
        service.communicate(timeout=10)


QUICK = ("--duration", "0.1", "--warmup", "0")


def test_a_run_without_a_command_is_a_run_and_succeeds() -> None:
    with serving() as (address, _):
        done = bench(address, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "errors      none" in done.stdout
    assert "p99.9" in done.stdout


def test_the_command_of_the_product_takes_an_address_at_once() -> None:
    with serving() as (address, _):
        done = subprocess.run(
            [sys.executable, "-m", "fastmesh", "bench", address, *QUICK],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=ROOT,
        )
    assert done.returncode == 0, done.stderr
    assert "errors      none" in done.stdout


def test_json_and_histogram() -> None:
    with serving() as (address, _):
        done = bench(address, *QUICK, "--json", "--histogram", "--size", "64,1k", "--crc")
    result = json.loads(done.stdout)
    assert result["ok"] is True
    assert sum(count for _, count in result["histogram"]) == result["latency"]["samples"]


def test_the_distribution_is_complete() -> None:
    with serving() as (address, _):
        done = bench(address, *QUICK, "--histogram", "-n", "500")
    rows = [line for line in done.stdout.splitlines() if line.startswith("  < ")]
    assert "100.0000%" in rows[-1]
    assert sum(int(row.split("%")[1].split()[0].replace(",", "")) for row in rows) == 500


def test_errors_make_the_exit_code() -> None:
    with serving("--status", "4") as (address, _):
        done = bench(address, *QUICK)
    assert done.returncode == 1
    assert "status.4" in done.stdout


def test_nobody_there() -> None:
    done = bench("127.0.0.1:1", *QUICK, "--connect-timeout-ms", "100")
    assert done.returncode == 1
    assert "connect_failed" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("127.0.0.1",),
        ("127.0.0.1:1", "--size", "x"),
        ("127.0.0.1:1", "--size", "7"),
        ("127.0.0.1:1", "-c", "0"),
        ("127.0.0.1:1", "--header", "no-value"),
        ("serve", "--listen", "nowhere"),
        ("serve", "--duration", "-1"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_readable_message(arguments: tuple[str, ...]) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert "Error:" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_reports_what_it_saw() -> None:
    service = subprocess.Popen(
        [*BENCH, "serve", "--listen", "127.0.0.1:0", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert service.stdout is not None
    address = service.stdout.readline().split()[-1]
    sent = json.loads(bench(address, *QUICK, "--json", "-n", "100").stdout)["sent_total"]
    service.send_signal(signal.SIGTERM)
    out, _ = service.communicate(timeout=10)
    assert service.returncode == 0
    assert sent == 100
    assert json.loads(out)["requests"] == 100


def test_push_reports_the_pushes() -> None:
    service = subprocess.Popen(
        [*BENCH, "serve", "--listen", "127.0.0.1:0", "--push", "--rate", "500", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert service.stdout is not None
    address = service.stdout.readline().split()[-1]
    # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    load = subprocess.Popen([*BENCH, address, "--duration", "30", "--json"], stdout=-1, cwd=ROOT)
    try:
        # Two more looks at the service tell that pushes flow; then it stops first, as a broker
        # does.
        for _ in range(2):
            bench(address, *QUICK, "-c", "1")
        service.send_signal(signal.SIGTERM)
        out, _ = service.communicate(timeout=15)
    finally:
        load.send_signal(signal.SIGINT)
        load.communicate(timeout=15)
    pushed = json.loads(out)["push"]
    assert pushed["answered"] > 0
    assert pushed["errors"]["misrouted"] == pushed["errors"]["torn"] == 0
