"""Who is measured: how each proxy is found, configured the way its own manual recommends, and
started.

A contender that is not installed is reported with its name and how to get it (`python -m
perf.setup`), never left out.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from perf.host import CACHE, ROOT

Address = str
"""As `fastmesh bench` writes it: "127.0.0.1:12200" or "unix:/path"."""


@dataclass(frozen=True)
class Place:
    """One trial's surroundings."""

    listen: Address
    upstream: Address
    folder: Path
    threads: int = 1
    connections: int = 64
    spin_us: int = 0
    busy: bool = False
    patience_s: float = 0.0
    """Other than 0: the process will be replaced under load, and the old one has so long to let its
    connections go.
    """


@dataclass(frozen=True)
class Contender:
    name: str
    what: str
    find: Callable[[], str | None]
    version: Callable[[str], str]
    command: Callable[[str, Place], list[str]]
    """Writes the configuration into the folder and returns what to run; it stays in the foreground.
    """
    install: str
    cannot: dict[str, str] = field(default_factory=dict)
    """Scenario -> why this proxy cannot carry it at all."""
    environment: Callable[[Place], dict[str, str]] = lambda place: {}


def _hostport(address: Address) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _unix(address: Address) -> str | None:
    return address[5:] if address.startswith("unix:") else None


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[0].strip() if lines else "unknown"


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


# --- fastmesh -------------------------------------------------------------------------------------

FASTMESH = """\
node: {{name: perf, app: perf}}
state_dir: {folder}
engine: {{threads: {threads}, spin_us: {spin_us}}}
admin: {{listen: "unix:{folder}/admin.sock"}}
listeners:
  - name: perf
    listen: "{listen}"
    protocol: bolt
    routes:
      - {{match: {{service: "com.example.Order:1.0"}}, cluster: upstream}}
      - {{cluster: upstream}}
clusters:
  - name: upstream
    protocol: bolt
    endpoints: [{{address: "{upstream}", weight: 100}}]
"""


def _fastmesh(binary: str, place: Place) -> list[str]:
    config = place.folder / "fastmesh.yaml"
    config.write_text(
        FASTMESH.format(
            folder=place.folder,
            threads=place.threads,
            spin_us=place.spin_us,
            listen=place.listen,
            upstream=place.upstream,
        )
    )
    module = "perf.busy" if place.busy else "fastmesh"
    return [binary, "-m", module, "run", "-c", str(config)]


def _find_fastmesh() -> str | None:
    built = any((ROOT / "fastmesh" / "_ext").glob("engine.*.so"))
    return sys.executable if built else None


# --- haproxy --------------------------------------------------------------------------------------

HAPROXY = """\
global
    nbthread {threads}
    maxconn {connections}
    {stop}
defaults
    mode tcp
    timeout connect 5s
    timeout client 300s
    timeout server 300s
frontend perf
    bind {listen}
    maxconn {connections}
    default_backend upstream
backend upstream
    server upstream {upstream}
"""


def _haproxy(binary: str, place: Place) -> list[str]:
    config = place.folder / "haproxy.cfg"

    def name(address: Address) -> str:
        path = _unix(address)
        return f"unix@{path}" if path else address

    config.write_text(
        HAPROXY.format(
            threads=place.threads,
            connections=place.connections + 100,
            stop=f"hard-stop-after {place.patience_s * 1000:.0f}ms" if place.patience_s else "",
            listen=name(place.listen),
            upstream=name(place.upstream),
        )
    )
    # A master that starts a new worker at each reload, or one process alone.
    return [binary, "-W" if place.patience_s else "-db", "-f", str(config)]


# --- nginx ----------------------------------------------------------------------------------------

NGINX = """\
{module}
user {user};
daemon off;
pid {folder}/nginx.pid;
error_log stderr error;
worker_processes {threads};
worker_rlimit_nofile {files};
events {{
    use epoll;
    worker_connections {files};
}}
stream {{
    server {{
        listen {listen};
        tcp_nodelay on;
        proxy_connect_timeout 5s;
        proxy_timeout 300s;
        proxy_pass {upstream};
    }}
}}
"""
NGINX_STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


def _nginx(binary: str, place: Place) -> list[str]:
    config = place.folder / "nginx.conf"

    def name(address: Address) -> str:
        path = _unix(address)
        return f"unix:{path}" if path else address

    config.write_text(
        NGINX.format(
            module=f"load_module {NGINX_STREAM};" if NGINX_STREAM.exists() else "",
            user=pwd.getpwuid(os.getuid()).pw_name,
            folder=place.folder,
            threads=place.threads,
            files=place.connections * 2 + 200,
            listen=name(place.listen) + (" backlog=4096" if not _unix(place.listen) else ""),
            upstream=name(place.upstream),
        )
    )
    return [binary, "-e", "stderr", "-c", str(config)]


def _find_nginx() -> str | None:
    binary = _which("nginx")
    if binary is None or NGINX_STREAM.exists():
        return binary
    built_in = subprocess.run(
        [binary, "-V"], capture_output=True, text=True, check=False, timeout=30
    )
    return (
        binary if "--with-stream" in built_in.stderr.replace("--with-stream=dynamic", "") else None
    )


# --- envoy ----------------------------------------------------------------------------------------


def _envoy(binary: str, place: Place) -> list[str]:
    def name(address: Address) -> dict[str, object]:
        path = _unix(address)
        if path:
            return {"pipe": {"path": path}}
        host, port = _hostport(address)
        return {"socket_address": {"address": host, "port_value": port}}

    proxy = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
    many = {"max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000}
    endpoint = {"endpoint": {"address": name(place.upstream)}}
    config = place.folder / "envoy.json"
    config.write_text(
        json.dumps(
            {
                "static_resources": {
                    "listeners": [
                        {
                            "name": "perf",
                            "address": name(place.listen),
                            "filter_chains": [
                                {
                                    "filters": [
                                        {
                                            "name": "envoy.filters.network.tcp_proxy",
                                            "typed_config": {
                                                "@type": proxy,
                                                "stat_prefix": "perf",
                                                "cluster": "upstream",
                                                "idle_timeout": "300s",
                                            },
                                        }
                                    ]
                                }
                            ],
                        }
                    ],
                    "clusters": [
                        {
                            "name": "upstream",
                            "type": "STATIC",
                            "connect_timeout": "5s",
                            "circuit_breakers": {"thresholds": [many]},
                            "load_assignment": {
                                "cluster_name": "upstream",
                                "endpoints": [{"lb_endpoints": [endpoint]}],
                            },
                        }
                    ],
                }
            },
            indent=1,
        )
    )
    return [
        binary,
        *(_hot_restart(place) if place.patience_s else ["--disable-hot-restart"]),
        "--concurrency",
        str(place.threads),
        "--log-level",
        "error",
        "-c",
        str(config),
    ]


def _hot_restart(place: Place) -> list[str]:
    """Of the first process; its successor finds the base id in the file."""
    return [
        "--use-dynamic-base-id",
        "--base-id-path",
        str(place.folder / "base-id"),
        *envoy_patience(place.patience_s),
    ]


def envoy_patience(patience_s: float) -> list[str]:
    """The parent's end must come after its drain: they are whole seconds."""
    return [
        "--drain-time-s",
        str(max(1, round(patience_s) - 1)),
        "--parent-shutdown-time-s",
        str(max(2, round(patience_s))),
    ]


def _find_envoy() -> str | None:
    found = sorted((CACHE / "envoy").glob("lib/python*/site-packages/envoy/_bin/envoy"))
    return str(found[0]) if found else _which("envoy")


# --- mosn -----------------------------------------------------------------------------------------


def _mosn(binary: str, place: Place) -> list[str]:
    # MOSN keeps pid and logs beside the folder of its configuration, its hand-over sockets in it.
    config = place.folder / ("conf/mosn.json" if place.patience_s else "mosn.json")
    config.parent.mkdir(exist_ok=True)
    graceful = {"graceful_timeout": f"{place.patience_s:g}s"} if place.patience_s else {}
    proxy = {
        "downstream_protocol": "Auto",
        "upstream_protocol": "Auto",
        "router_config_name": "router",
        "extend_config": {"sub_protocol": "bolt,boltv2"},
    }
    match = {"headers": [{"name": "service", "value": ".*"}]}
    config.write_text(
        json.dumps(
            {
                "servers": [
                    {
                        "default_log_path": "stdout",
                        "default_log_level": "ERROR",
                        "processor": place.threads,
                        **graceful,
                        "routers": [
                            {
                                "router_config_name": "router",
                                "virtual_hosts": [
                                    {
                                        "name": "all",
                                        "domains": ["*"],
                                        "routers": [
                                            {"match": match, "route": {"cluster_name": "upstream"}}
                                        ],
                                    }
                                ],
                            }
                        ],
                        "listeners": [
                            {
                                "name": "perf",
                                "address": place.listen,
                                "bind_port": True,
                                "filter_chains": [
                                    {"filters": [{"type": "proxy", "config": proxy}]}
                                ],
                            }
                        ],
                    }
                ],
                "cluster_manager": {
                    "clusters": [
                        {
                            "name": "upstream",
                            "type": "SIMPLE",
                            "lb_type": "LB_RANDOM",
                            "max_request_per_conn": 1 << 30,
                            "conn_buffer_limit_bytes": 1 << 20,
                            "hosts": [{"address": place.upstream}],
                        }
                    ]
                },
            },
            indent=1,
        )
    )
    return [binary, "start", "-c", str(config)]


def _find_mosn() -> str | None:
    binary = CACHE / "mosn" / "mosn"
    return str(binary) if binary.exists() else None


SETUP = "python -m perf.setup"

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(
            "fastmesh",
            "parses every frame, one shared upstream connection",
            _find_fastmesh,
            lambda binary: _first_line(binary, "-m", "fastmesh", "version"),
            _fastmesh,
            "make build",
        ),
        Contender(
            "haproxy",
            "mode tcp: relays bytes, one upstream connection per client",
            lambda: _which("haproxy"),
            lambda binary: _first_line(binary, "-v"),
            _haproxy,
            f"{SETUP} haproxy (or: apt-get install haproxy)",
        ),
        Contender(
            "nginx",
            "stream: relays bytes, one upstream connection per client",
            _find_nginx,
            lambda binary: _first_line(binary, "-v"),
            _nginx,
            f"{SETUP} nginx (or: apt-get install nginx libnginx-mod-stream)",
        ),
        Contender(
            "envoy",
            "tcp_proxy: relays bytes, one upstream connection per client",
            _find_envoy,
            lambda binary: _first_line(binary, "--version").rpartition("version:")[2].strip(),
            _envoy,
            f"{SETUP} envoy",
        ),
        Contender(
            "mosn",
            "parses every Bolt frame, multiplexes",
            _find_mosn,
            lambda binary: "1.6.1 (built from its Go module)",
            _mosn,
            f"{SETUP} mosn (needs Go)",
            cannot={
                "crc": "its v2 codec does not know the checksum's four bytes",
                "crc16k": "its v2 codec does not know the checksum's four bytes",
                "unix": "not configured for UNIX sockets here",
            },
            environment=lambda place: {"GOMAXPROCS": str(place.threads)},
        ),
    )
}
DIRECT = "direct"
"""No proxy at all: the figure that added latency is counted from."""
