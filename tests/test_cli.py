"""The command line: what it says, with which code it ends, and what a real `fastmesh run` costs."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastmesh import __version__, cli
from fastmesh._ext.load import EchoServer, LoadRun

COMMANDS = (
    "broker",
    "run",
    "upgrade",
    "check",
    "status",
    "top",
    "drain",
    "demo",
    "bench",
    "version",
)
CONFIG = """\
node: {{name: real, app: test}}
state_dir: run
listeners:
  - {{name: rpc, listen: "127.0.0.1:0", protocol: bolt, routes: [{{cluster: echo}}]}}
clusters:
  - {{name: echo, protocol: bolt, endpoints: [{{address: "{0}"}}]}}
limits: {{connections_max: 200, stop_timeout_ms: 1000}}
"""
RSS_MAX_KIB = 40 * 1024
READY_MAX_S = 0.5


def call(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    return int(ended.value.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    assert "Usage: fastmesh " + command in capsys.readouterr().out


def test_help_shows_commands_examples_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    text = capsys.readouterr().out
    assert set(COMMANDS) == set(cli.cli.commands)
    for word in (*COMMANDS, "Examples:", "Exit codes:"):
        assert word in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("version") == 0
    assert capsys.readouterr().out.strip() == __version__


def test_check_says_what_it_found(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", "-c", str(config_file)) == 0
    assert "1 listeners, 2 rules, 2 clusters, 2 endpoints" in capsys.readouterr().out
    assert not (config_file.parent / "run").exists(), "checking leaves nothing behind"


def test_check_reads_the_schedule_too(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file.write_text(
        'listeners: [{name: msg, listen: "127.0.0.1:1", protocol: push}]\n'
        'push: {brokers: [{name: b1, address: "127.0.0.1:2"}], schedule: {file: s.yaml}}\n'
        'registration: {listen: "127.0.0.1:3"}\n'
    )
    schedule = config_file.parent / "s.yaml"
    assert call("check", "-c", str(config_file)) == 64
    assert "push.schedule.file cannot be read" in capsys.readouterr().err
    schedule.write_text("apps:\n  shop: {nodes: [{name: n1}]}\n")
    assert call("check", "-c", str(config_file)) == 64
    assert f"{schedule}:2: apps.shop.nodes[0].address is missing" in capsys.readouterr().err
    schedule.write_text('apps: {shop: {nodes: [{name: n1, address: "127.0.0.1:4"}]}}')
    assert call("check", "-c", str(config_file)) == 0
    assert "1 brokers" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "run", "status", "drain", "top"])
def test_a_faulty_configuration_is_64_with_one_line_per_problem(
    config_file: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    config_file.write_text("node: {nam: x}\nlimits: {in_flight_max: 1}\n")
    assert call(command, "-c", str(config_file)) == 64
    lines = capsys.readouterr().err.splitlines()
    assert f"{config_file}:1: node.nam is not a known key: did you mean name?" in lines
    assert f"{config_file}:2: limits.in_flight_max must be a whole number 16..65536 (is 1)" in lines
    assert lines[-1] == f"fastmesh: 4 problems in {config_file}"


def test_nobody_there_is_69(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for where in (["--admin", "127.0.0.1:1"], ["--admin", f"unix:{config_file}.sock"]):
        assert call("status", *where) == 69
        err = capsys.readouterr().err
        assert err.startswith("fastmesh: no fastmesh answers at ")
        assert err.count("\n") == 1


def test_wrong_usage_is_2() -> None:
    assert call("status") == 2
    assert call("status", "-c", "x", "--admin", "y:1") == 2
    assert call("status", "--admin", "nonsense") == 2
    assert call("nothing") == 2
    assert call("run") == 2


def test_tracebacks_only_with_debug(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(path: str) -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr("fastmesh.app.run", fault)
    assert call("run", "-c", str(config_file)) == 1
    err = capsys.readouterr().err
    assert err == "fastmesh: RuntimeError: surprise (--debug shows more)\n"
    for args in (["--debug", "run", "-c", "x"], ["run", "--debug", "-c", "x"]):
        with pytest.raises(RuntimeError):
            cli.main(args)


# --- the real thing -------------------------------------------------------------------------------


class Process:
    """A `fastmesh run` of its own, ready when it says so."""

    def __init__(self, path: Path, wrapper: list[str] | None = None) -> None:
        command = wrapper or [sys.executable, "-m", "fastmesh"]
        began = time.monotonic()
        self.popen = subprocess.Popen(
            [*command, "run", "-c", str(path)], stderr=subprocess.PIPE, text=True
        )
        assert self.popen.stderr is not None
        self.lines: list[str] = []
        while " ready " not in (line := self.popen.stderr.readline()):
            assert line, f"ended before it was ready: {self.lines}"
            self.lines.append(line)
        self.lines.append(line)
        # Less the time it was ready to run and another process had the core: the promise is
        # about fastmesh, not about what else runs on this host.
        waited_ns = int(Path(f"/proc/{self.popen.pid}/schedstat").read_text().split()[1])
        self.ready_s = time.monotonic() - began - waited_ns / 1e9
        self.listen = line.split('listeners="rpc=')[1].split('"')[0]

    def memory_kib(self) -> int:
        text = Path(f"/proc/{self.popen.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0])

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(timeout=15)

    def rest(self) -> str:
        assert self.popen.stderr is not None
        return self.popen.stderr.read()


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    with EchoServer("127.0.0.1:0") as server:
        yield server


@pytest.fixture
def real_config(tmp_path: Path, echo: EchoServer) -> Path:
    path = tmp_path / "fastmesh.yaml"
    path.write_text(CONFIG.format(echo.address))
    return path


@pytest.fixture
def start(real_config: Path) -> Iterator[Callable[..., Process]]:
    with contextlib.ExitStack() as stack:

        def begin(**options: Any) -> Process:
            process = Process(real_config, **options)
            assert process.popen.stderr is not None
            stack.callback(process.popen.stderr.close)
            stack.callback(process.popen.wait)
            stack.callback(process.popen.kill)
            return process

        yield begin


def fastmesh(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastmesh", *args],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_idle_it_is_small_and_ready_soon(start: Callable[..., Process]) -> None:
    ready = []  # the best of three
    for _ in range(3):
        process = start()
        ready.append(process.ready_s)
        assert process.memory_kib() <= RSS_MAX_KIB
        assert process.stop() == 0
        if ready[-1] <= READY_MAX_S:
            break
    assert min(ready) <= READY_MAX_S, ready


def test_what_run_never_loads(start: Callable[..., Process], tmp_path: Path) -> None:
    """Asked from inside, after a scrape: the modules, and the memory with all that this loads."""
    script = tmp_path / "inside.py"
    found = tmp_path / "modules.json"
    script.write_text(
        "import atexit, json, sys\n"
        "from fastmesh.cli import main\n"
        f"atexit.register(lambda: open({str(found)!r}, 'w').write(json.dumps(list(sys.modules))))\n"
        "main(sys.argv[1:])\n"
    )
    env = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), env]))
    try:
        process = start(wrapper=[sys.executable, str(script)])
    finally:
        os.environ["PYTHONPATH"] = env
    client = cli._client(None, f"unix:{tmp_path}/run/admin.sock", None)
    client.get("/v1/routes")
    for _ in range(3):
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(f"{tmp_path}/run/admin.sock")
        connection.request("GET", "/metrics")
        assert connection.getresponse().status == 200
        connection.close()
    memory = process.memory_kib()
    assert process.stop() == 0
    modules = set(json.loads(found.read_text()))
    assert "prometheus_client" in modules
    assert "fastmesh._ext.engine" in modules
    for name in ("numpy", "rich", "psutil", "fastmesh.bench", "fastmesh.demo"):
        assert name not in modules, name
    assert memory <= RSS_MAX_KIB


def test_traffic_status_top_reload_drain_and_stop(
    start: Callable[..., Process], real_config: Path, echo: EchoServer
) -> None:
    process = start()
    with LoadRun(process.listen, connections=4, duration_ms=1500, warmup_ms=0) as run:
        config = ["-c", str(real_config)]
        status = fastmesh("status", *config)
        assert status.returncode == 0
        assert "node real" in status.stdout
        assert "state    serving" in status.stdout
        assert f"listens  rpc on {process.listen}" in status.stdout
        process.popen.send_signal(signal.SIGHUP)
        assert run.wait(10)
    result = run.result()
    assert result.ok, result.errors
    assert result.sent_total == echo.stats().requests
    top = fastmesh("top", *config, "--once", "--interval", "0.1")
    assert top.returncode == 0
    assert "route     rpc *" in top.stdout
    assert f"endpoint  echo {echo.address}" in top.stdout
    status_json = json.loads(
        fastmesh("status", "--json", "--admin", f"unix:{real_config.parent}/run/admin.sock").stdout
    )
    assert status_json["config"]["version"] == 2
    drain = fastmesh("drain", *config, "--wait", "--timeout", "20")
    assert (drain.returncode, drain.stdout) == (0, "safe to stop\n"), drain.stderr
    status = fastmesh("status", *config)
    assert "draining, drained" in status.stdout
    assert "drain    step done, safe to stop" in status.stdout
    assert process.stop() == 0
    assert "reloaded version=2" in process.rest()


def test_what_drain_says_and_its_exit_codes(
    start: Callable[..., Process], real_config: Path
) -> None:
    process = start()
    config = ["-c", str(real_config)]
    host, _, port = process.listen.rpartition(":")
    with socket.create_connection((host, int(port))) as idle:
        idle.sendall(b"\x01\x01")  # half a frame: it owes us the rest
        refused = fastmesh("drain", *config, "--cancel")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "no drain is under way (HTTP 409)" in refused.stderr
        begun = fastmesh("drain", *config)
        assert (begun.returncode, begun.stdout) == (0, "draining\n")
        left = fastmesh("drain", *config, "--wait", "--timeout", "0.3")
        assert (left.returncode, left.stdout) == (75, "")
        assert left.stderr.count("\n") == 1
        assert "not safe to stop after 0.3 s" in left.stderr
        assert "step clients waits for connections on rpc 1" in left.stderr
        assert "waits for connections on rpc 1" in fastmesh("status", *config).stdout
        for late in (["--cancel"], ["--hold"]):
            refused = fastmesh("drain", *config, *late)
            assert refused.returncode == 1
            assert "clients are being let go already" in refused.stderr
    safe = fastmesh("drain", *config, "--wait", "--timeout", "20")
    assert (safe.returncode, safe.stdout) == (0, "safe to stop\n")
    assert fastmesh("drain", *config, "--cancel", "--wait").returncode == 2
    assert process.stop() == 0
    assert fastmesh("drain", *config, "--wait").returncode == 69


def test_two_signals_stop_at_once_and_a_second_process_is_refused(
    start: Callable[..., Process], real_config: Path
) -> None:
    real_config.write_text(
        real_config.read_text().replace("stop_timeout_ms: 1000", "stop_timeout_ms: 60000")
    )
    process = start()
    second = fastmesh("run", "-c", str(real_config))
    assert second.returncode == 75
    assert f"is in use by process {process.popen.pid}" in second.stderr
    assert second.stderr.count("\n") == 1
    host, _, port = process.listen.rpartition(":")
    with EchoServer("127.0.0.1:0", delay_ms=30000) as slow:
        real_config.write_text(
            real_config.read_text().replace(
                "endpoints: [{address: ",
                f'endpoints: [{{address: "{slow.address}", weight: 1}}, {{weight: 0, address: ',
            )
        )
        process.popen.send_signal(signal.SIGHUP)
        client = cli._client(str(real_config), None, None)
        end = time.monotonic() + 10
        while client.get("/v1/status")["config"]["version"] < 2:
            assert time.monotonic() < end
        with LoadRun(
            f"{host}:{port}", connections=1, duration_ms=500, warmup_ms=0, timeout_ms=30000
        ) as run:
            while run.progress().in_flight == 0:
                assert time.monotonic() < end
            process.popen.send_signal(signal.SIGTERM)
            while client.get("/v1/status")["state"] != "draining":
                assert time.monotonic() < end
            assert process.popen.poll() is None, "a request is in flight and has 60 s"
            began = time.monotonic()
            assert process.stop() == 0
            assert time.monotonic() - began < 8
            run.stop()


def test_without_descriptors_it_refuses_clients_and_answers_operators(
    start: Callable[..., Process], real_config: Path
) -> None:
    text = real_config.read_text().replace("connections_max: 200", "connections_max: 100000")
    real_config.write_text(text)
    process = start(wrapper=["prlimit", "--nofile=100:200", sys.executable, "-m", "fastmesh"])
    assert "connections_max clamped" in "".join(process.lines)
    client = cli._client(str(real_config), None, None)
    most = client.get("/v1/status")["connections_max"]
    assert 30 < most < 200 - 100
    fds = Path(f"/proc/{process.popen.pid}/fd")
    before = len(list(fds.iterdir()))
    host, _, port = process.listen.rpartition(":")
    for _ in range(3):
        held = [socket.create_connection((host, int(port))) for _ in range(most + 50)]
        wait_for(lambda: clients(client) == most)
        assert client.get("/readyz") == {"state": "serving"}
        for sock in held:
            sock.close()
        wait_for(lambda: clients(client) == 0)
    wait_for(lambda: len(list(fds.iterdir())) <= before)
    with LoadRun(process.listen, connections=2, duration_ms=200, warmup_ms=0) as run:
        assert run.result().ok
    assert process.stop() == 0


def clients(client: Any) -> int:
    return sum(int(x["connections"]) for x in client.get("/v1/routes")["listeners"])


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "not in time"
