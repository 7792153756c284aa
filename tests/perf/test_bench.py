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
        ("127.0.0.1:1", "--duration", "nan"),
        ("127.0.0.1:1", "--duration", "soon"),
        ("127.0.0.1:1", "--warmup", "inf"),
        ("127.0.0.1:1", "--warmup", "-1"),
        ("127.0.0.1:1", "--consume", "app/client"),
        ("127.0.0.1:1", "--consume", "app//group"),
        ("127.0.0.1:1", "--prefetch", "5"),
        ("127.0.0.1:1", "--consume", "a/b/c", "--prefetch", "0"),
        ("serve", "--listen", "nowhere"),
        ("serve", "--duration", "-1"),
        ("serve", "--duration", "nan"),
        ("serve", "--group", "g"),
        ("serve", "--push", "--topic", "t"),
        ("serve", "--push", "--group", ""),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_readable_message(arguments: tuple[str, ...]) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert "Error:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_duration_that_is_no_length_is_named_with_what_would_be_right() -> None:
    done = bench("127.0.0.1:1", "--duration", "nan")
    assert "--duration" in done.stderr
    assert "'nan': must be a finite number of seconds, 0 or more" in done.stderr


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


def test_consumers_of_a_group_and_the_broker_that_pushes_to_it() -> None:
    with serving("--push", "--group", "g", "--topic", "t", "--rate", "500", "--json") as found:
        address, broker = found
        consumers = subprocess.Popen(
            [*BENCH, address, "-c", "2", "--consume", "app/client/g", "--prefetch", "16",
             "--duration", "30", "--json"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )  # fmt: skip
        try:
            # Somebody else's answers show that time passes for the service; a request's answer of
            # a broker is "consumed", which these two looks take for a wrong echo: their own affair.
            for _ in range(2):
                bench(address, *QUICK, "-c", "1")
            broker.send_signal(signal.SIGTERM)
            out, _ = broker.communicate(timeout=15)
        finally:
            consumers.send_signal(signal.SIGINT)
            consumed, _ = consumers.communicate(timeout=15)
    pushed = json.loads(out)["push"]
    assert pushed["answered"] > 0
    assert not any(pushed["errors"].values()), pushed["errors"]
    assert json.loads(consumed)["answered_for_peer"] == pushed["answered"]


def test_the_group_is_the_one_that_is_pushed_to() -> None:
    with serving("--push", "--group", "g", "--rate", "500", "--json") as (address, broker):
        done = bench(address, "-c", "1", "--consume", "app/client/g", "--duration", "0.3")
        assert done.returncode == 0, done.stdout
        assert "requests from the server side" in done.stdout
        broker.send_signal(signal.SIGTERM)
        broker.communicate(timeout=15)


def test_json_tells_how_connections_fared() -> None:
    with serving() as (address, _):
        result = json.loads(bench(address, *QUICK, "-c", "3", "--json").stdout)
    assert result["kept"] == result["connections"] == 3
    assert result["resets"] == 0
    assert result["first_error_s"] is None
    assert [section["answered"] for section in result["sections"]] == [result["answered"]]
    assert 0 < result["gap_ms_max"] == result["sections"][0]["gap_ms_max"]
