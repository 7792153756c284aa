"""What the admin interface says: paths, and the JSON of each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgspec

from fastmesh import config as configuration
from fastmesh import limits
from fastmesh._version import __version__
from fastmesh.admin import pages
from fastmesh.admin.pages import topology_page
from fastmesh.control.snapshot import Compiled, RowLabel
from fastmesh.errors import (
    ConfigError,
    EngineError,
    FastmeshError,
    ManagedElsewhereError,
    NeedsUpgradeError,
    StaleError,
    StateError,
)
from fastmesh.http.server import TEXT, Answer, Request, error, to_json, wrong_method
from fastmesh.observe import metrics
from fastmesh.observe.events import Events
from fastmesh.observe.metrics import CAUSES
from fastmesh.observe.readings import Readings


class Plane(Protocol):
    """The part of the message mesh that is shown and moved from here (fastmesh.mesh.plane)."""

    @property
    def live(self) -> Mapping[str, tuple[int, int]]: ...

    def status(self) -> dict[str, Any]: ...
    async def topology(self) -> dict[str, Any]:
        """Raises EngineError."""

    def schedule(self) -> dict[str, Any]:
        """version, source, etag, failure, schedule."""

    async def put_schedule(self, data: bytes, match: str | None) -> None:
        """Raises ConfigError, ManagedElsewhereError, StaleError; SaveError with a status."""


class Running(Protocol):
    """The part of the running mesh that is shown and moved from here."""

    state: str
    drained: bool
    readings: Readings
    events: Events
    pid: int
    warnings: list[str]

    @property
    def plane(self) -> Plane | None: ...
    @property
    def compiled(self) -> Compiled: ...
    @property
    def rows(self) -> Mapping[RowLabel, int]: ...
    @property
    def uptime_s(self) -> float: ...
    @property
    def log_lines_lost(self) -> int: ...
    def addresses(self) -> dict[str, str]: ...
    def is_ready(self) -> bool: ...
    async def reload(self) -> int: ...
    async def upgrade(self) -> dict[str, Any]: ...
    def handover_status(self) -> dict[str, Any]: ...
    def handover_figures(self) -> metrics.HandoverFigures: ...
    def drain(self, *, hold: bool = False) -> None:
        """Raises StateError."""

    def cancel_drain(self) -> None:
        """Raises StateError."""

    def drain_status(self) -> Mapping[str, Any]: ...
    def drain_figures(self) -> metrics.DrainFigures: ...


class Views:
    """The handler of the admin interface."""

    def __init__(self, mesh: Running) -> None:
        self._mesh = mesh
        self._routes: dict[str, dict[str, Callable[[Request], Awaitable[Answer]]]] = {
            "/healthz": {"GET": self._healthz},
            "/readyz": {"GET": self._readyz},
            "/metrics": {"GET": self._metrics},
            "/v1/status": {"GET": self._status},
            "/v1/connections": {"GET": self._connections},
            "/v1/routes": {"GET": self._list_routes},
            "/v1/config": {"GET": self._config},
            "/v1/samples": {"GET": self._samples},
            "/v1/reload": {"POST": self._reload},
            "/v1/upgrade": {"POST": self._upgrade},
            "/v1/drain": {"POST": self._drain},
            "/v1/drain/cancel": {"POST": self._cancel_drain},
            "/v1/schedule": {"GET": self._schedule, "PUT": self._put_schedule},
            "/v1/topology": {"GET": self._topology},
            "/topology": {"GET": self._topology_page},
        }

    async def __call__(self, request: Request) -> Answer:
        methods = self._routes.get(request.path)
        if methods is None:
            return error(404, "no such path", paths=sorted(self._routes))
        view = methods.get(request.method)
        if view is None:
            return wrong_method(*methods)
        try:
            return await view(request)
        except EngineError as failure:
            return error(503, str(failure))
        except BlockingIOError:  # its command ring is full: it is not running its turns
            return error(503, "the engine takes no commands")

    async def _healthz(self, request: Request) -> Answer:
        return Answer(200, b"ok\n", TEXT)

    async def _readyz(self, request: Request) -> Answer:
        ready = self._mesh.is_ready()
        return Answer(200 if ready else 503, to_json({"state": self._mesh.state}))

    async def _metrics(self, request: Request) -> Answer:
        reading = await self._mesh.readings.counters()
        mesh = self._mesh
        config = mesh.compiled.config
        text = metrics.render(
            reading,
            metrics.Situation(
                rows=mesh.rows.items(),
                listeners=[x.name for x in config.listeners],
                endpoints=[(e.cluster, e.name) for e in mesh.compiled.endpoints],
                node=config.node.name,
                state=mesh.state,
                config_version=mesh.compiled.version,
                config_sha256=config.sha256,
                uptime_s=mesh.uptime_s,
                log_lines_lost=mesh.log_lines_lost,
                handover=mesh.handover_figures(),
                groups=None if mesh.plane is None else mesh.plane.live,
                drain=mesh.drain_figures(),
            ),
        )
        return Answer(200, text, metrics.CONTENT_TYPE)

    async def _status(self, request: Request) -> Answer:
        mesh = self._mesh
        compiled = mesh.compiled
        more = {} if mesh.plane is None else {"mesh": mesh.plane.status()}
        return Answer(
            200,
            to_json(
                {
                    "version": __version__,
                    "pid": mesh.pid,
                    "node": compiled.config.node.name,
                    "app": compiled.config.node.app,
                    "state": mesh.state,
                    "drained": mesh.drained,
                    "drain": mesh.drain_status(),
                    "uptime_s": round(mesh.uptime_s, 3),
                    "config": {
                        "version": compiled.version,
                        "sha256": compiled.config.sha256,
                        "source": compiled.config.source,
                    },
                    "listeners": mesh.addresses(),
                    "connections_max": compiled.limits["connections_max"],
                    "warnings": mesh.warnings,
                    "handover": mesh.handover_status(),
                    **more,
                }
            ),
        )

    async def _connections(self, request: Request) -> Answer:
        found = await self._mesh.readings.connections()
        shown = found[: limits.ADMIN_CONNECTIONS_SHOWN_MAX]
        names = _names(self._mesh.compiled)
        items = []
        for item in shown:
            plain: dict[str, object] = {
                key: value.decode("latin-1") if isinstance(value, bytes) else value
                for key, value in item.items()
            }
            # Handles have 64 bits, more than a JSON number keeps in most readers.
            plain["handle"] = f"{item['handle']:016x}"
            if item.get("role") == "downstream":
                plain["listener"] = names.listeners.get(item.get("listener_id"), "")
            else:
                plain["cluster"], plain["endpoint"] = names.endpoints.get(
                    item.get("endpoint_id"), ("", "")
                )
            items.append(plain)
        return Answer(200, to_json({"total": len(found), "connections": items}))

    async def _list_routes(self, request: Request) -> Answer:
        reading = await self._mesh.readings.counters()
        mesh = self._mesh
        counts = request.query == "counts"
        return Answer(200, to_json(routes_view(mesh.compiled, reading, mesh.events, counts)))

    async def _config(self, request: Request) -> Answer:
        return Answer(200, to_json(configuration.as_dict(self._mesh.compiled.config)))

    async def _samples(self, request: Request) -> Answer:
        return Answer(200, to_json({"samples": list(self._mesh.events.samples)}))

    async def _reload(self, request: Request) -> Answer:
        try:
            version = await self._mesh.reload()
        except NeedsUpgradeError as needs:
            return error(409, str(needs), keys=needs.keys)
        except StateError as wrong_time:
            return error(409, str(wrong_time), keys=[])
        except ConfigError as wrong:
            return _problems(wrong)
        return Answer(200, to_json({"version": version}))

    async def _upgrade(self, request: Request) -> Answer:
        """Answered by the process that was asked, when it is known how it ended."""
        report = await self._mesh.upgrade()
        if report["ok"]:
            return Answer(200, to_json(report))
        status = {"configuration": 422, "late": 504}.get(report["code"], 409)
        return Answer(status, to_json({"error": report["reason"], **report}))

    async def _drain(self, request: Request) -> Answer:
        if request.query not in ("", "hold"):
            return error(400, f"{request.query[:64]}: nothing, or hold")
        try:
            self._mesh.drain(hold=request.query == "hold")
        except StateError as late:
            return error(409, str(late))
        return Answer(202, to_json({"state": self._mesh.state}))

    async def _cancel_drain(self, request: Request) -> Answer:
        try:
            self._mesh.cancel_drain()
        except StateError as late:
            return error(409, str(late))
        return Answer(200, to_json({"state": self._mesh.state}))

    async def _schedule(self, request: Request) -> Answer:
        if (plane := self._mesh.plane) is None:
            return _no_mesh()
        found = plane.schedule()
        return Answer(200, to_json(found), headers=(("etag", f'"{found["etag"]}"'),))

    async def _put_schedule(self, request: Request) -> Answer:
        if (plane := self._mesh.plane) is None:
            return _no_mesh()
        given = request.headers.get(b"if-match")
        match = None if given is None else given.decode("latin-1").strip().strip('"')
        try:
            await plane.put_schedule(request.body, match)
        except ConfigError as wrong:
            return _problems(wrong)
        except ManagedElsewhereError as file:
            return error(409, str(file))
        except StaleError as stale:
            return error(412, str(stale))
        except FastmeshError as failed:
            return error(getattr(failed, "status", 503), f"{failed}. Nothing has changed")
        found = plane.schedule()
        body = to_json({key: found[key] for key in ("version", "source", "etag")})
        return Answer(200, body, headers=(("etag", f'"{found["etag"]}"'),))

    async def _topology(self, request: Request) -> Answer:
        if (plane := self._mesh.plane) is None:
            return _no_mesh()
        return Answer(200, to_json(await plane.topology()))

    async def _topology_page(self, request: Request) -> Answer:
        if (plane := self._mesh.plane) is None:
            return _no_mesh()
        page = topology_page(await plane.topology())
        return Answer(200, page, pages.CONTENT_TYPE, pages.HEADERS)


def _no_mesh() -> Answer:
    return error(404, "this process has no push section: there is no message mesh")


def _problems(wrong: ConfigError) -> Answer:
    found = [
        {
            "path": p.path,
            "line": p.line,
            "value": p.value
            if isinstance(p.value, (str, int, float, type(None)))
            else str(p.value),
            "message": p.message,
        }
        for p in wrong.problems
    ]
    return Answer(422, to_json({"errors": found}))


class _Names(msgspec.Struct):
    listeners: dict[Any, str]
    endpoints: dict[Any, tuple[str, str]]


def _names(compiled: Compiled) -> _Names:
    return _Names(
        {number: name for name, number in compiled.listener_ids.items()},
        {e.id: (e.cluster, str(e.address or e.name)) for e in compiled.endpoints},
    )


def _block(reading: Any, row: int, block: str) -> dict[str, Any]:
    values = reading.row(row)
    return {
        "accepted": values[f"{block}.accepted"],
        "answered": values[f"{block}.answered"],
        "expired": values[f"{block}.expired"],
        "in_flight": values[f"{block}.in_flight"],
        "failed": {cause: values[f"{block}.failed.{cause}"] for cause in CAUSES},
        "oneway": {
            kind: values[f"{block}.oneway_{kind}"] for kind in ("accepted", "forwarded", "dropped")
        },
    }


def routes_view(
    compiled: Compiled, reading: Any, events: Events, counts: bool = False
) -> dict[str, Any]:
    """Listeners with their rules, clusters with their endpoints, each with its counters.

    With `counts` also the latency histograms, from which the live table takes the last second.
    """
    from fastmesh._ext.counters import latency_bounds_ns, quantile_ns

    bounds = latency_bounds_ns()

    def latency(row: int) -> dict[str, Any]:
        buckets = reading.latency(row)
        found: dict[str, Any] = {
            "p50_us": quantile_ns(buckets, bounds, 0.5) / 1000,
            "p99_us": quantile_ns(buckets, bounds, 0.99) / 1000,
        }
        if counts:
            found["counts"] = buckets
        return found

    routes: list[dict[str, Any]] = []
    for info in compiled.routes:
        match: dict[str, Any] = {}
        if info.service is not None:
            match["service"] = info.service + ("*" if info.prefix else "")
        if info.headers:
            match["header"] = dict(info.headers)
        routes.append(
            {
                "listener": info.listener,
                "route": info.name,
                "match": match,
                "cluster": info.cluster,
                **_block(reading, info.row, "requests"),
                "latency": latency(info.row),
            }
        )
    listeners = []
    for name, row in compiled.listener_rows.items():
        values = reading.row(row)
        listeners.append(
            {
                "listener": name,
                "connections": values["connections"],
                "unrouted": _block(reading, row, "requests"),
            }
        )
    clusters = [
        {"cluster": name, "pushes": _block(reading, row, "pushes")}
        for name, row in compiled.cluster_rows.items()
    ]
    endpoints: list[dict[str, Any]] = []
    seen: dict[int, dict[str, Any]] = {}
    for endpoint in compiled.endpoints:
        health = events.health.get(endpoint.id)
        addresses = {
            "address": str(endpoint.address) if endpoint.address else None,
            "ejected": bool(health and health.ejected),
            "reason": health.reason if health else "",
        }
        if endpoint.row in seen and endpoint.row > 1:
            seen[endpoint.row]["addresses"].append(addresses)
            continue
        values = reading.row(endpoint.row)
        entry = {
            "cluster": endpoint.cluster,
            "endpoint": endpoint.name,
            "weight": endpoint.weight,
            "up": values["up"],
            "ejected": bool(values["ejected"]),
            "sent": values["sent"],
            "in_flight": values["requests.in_flight"],
            "connect_failed": values["connect_failed"],
            "latency": latency(endpoint.row),
            "addresses": [addresses],
        }
        seen[endpoint.row] = entry
        endpoints.append(entry)
    return {
        "version": compiled.version,
        "latency_bounds_us": [bound / 1000 for bound in bounds] if counts else [],
        "listeners": listeners,
        "routes": routes,
        "clusters": clusters,
        "endpoints": endpoints,
    }
