"""What the broker's admin interface says, and what an operator moves through it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol
from urllib.parse import unquote

import msgspec

from fastmesh._version import __version__
from fastmesh.address import Address
from fastmesh.broker.core import Core
from fastmesh.broker.model import Cursor, Group
from fastmesh.http.server import TEXT, Answer, Request, error, to_json, wrong_method

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
GROUPS = "/v1/groups/"


class CommitTimes(Protocol):
    bounds_s: tuple[float, ...]
    buckets: dict[bool, list[int]]
    sum_s: dict[bool, float]


class Running(Protocol):
    """The part of the running broker that is shown and moved from here."""

    core: Core
    state: str
    pid: int
    size_bytes: int
    disk_bytes: int

    @property
    def uptime_s(self) -> float: ...
    @property
    def address(self) -> Address: ...
    @property
    def commits(self) -> CommitTimes: ...
    @property
    def settings(self) -> Any: ...
    def now_ms(self) -> int: ...
    async def written(self) -> None: ...


class Reset(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a reset: one of the two."""

    time_ms: int | None = None
    offset: str | None = None


class Views:
    """The handler of the admin interface."""

    def __init__(self, broker: Running) -> None:
        self._broker = broker
        self._routes: dict[str, Callable[[], Answer]] = {
            "/healthz": lambda: Answer(200, b"ok\n", TEXT),
            "/readyz": self._readyz,
            "/metrics": self._metrics,
            "/v1/status": self._status,
            "/v1/topics": self._topics,
            "/v1/groups": self._list_groups,
        }
        self._actions: dict[str, Callable[[str, Request], Awaitable[Answer]]] = {
            "suspend": self._suspend,
            "resume": self._resume,
            "reset": self._reset,
        }

    async def __call__(self, request: Request) -> Answer:
        view = self._routes.get(request.path)
        if view is not None:
            return view() if request.method == "GET" else wrong_method("GET")
        if not request.path.startswith(GROUPS):
            paths = [*sorted(self._routes), GROUPS + "{group}/suspend|resume|reset"]
            return error(404, "no such path", paths=paths)
        self._broker.core.now_ms = self._broker.now_ms()
        return await self._group(request)

    async def _group(self, request: Request) -> Answer:
        name, slash, action = request.path[len(GROUPS) :].rpartition("/")
        try:
            if request.method == "DELETE":
                return await self._delete(unquote(request.path[len(GROUPS) :]))
            if not slash:
                return self._one_group(unquote(action), request)
            act = self._actions.get(action)
            if act is None:
                return error(404, f"no such action; there are {', '.join(self._actions)}")
            if request.method != "POST":
                return wrong_method("POST")
            return await act(unquote(name), request)
        except KeyError as unknown:
            return error(404, f"no group {unknown.args[0]!r}")
        except TimeoutError:
            return error(503, "in force, and not on disk yet")

    def _readyz(self) -> Answer:
        state = self._broker.state
        return Answer(200 if state == "serving" else 503, to_json({"state": state}))

    def _status(self) -> Answer:
        broker = self._broker
        core, options = broker.core, broker.settings.options
        return Answer(
            200,
            to_json(
                {
                    "version": __version__,
                    "pid": broker.pid,
                    "broker": options.name,
                    "state": broker.state,
                    "uptime_s": round(broker.uptime_s, 3),
                    "listen": str(broker.address),
                    "data": broker.settings.data,
                    "sync": options.sync,
                    "redeliver_ms": options.redeliver_ms,
                    "max_attempts": options.max_attempts,
                    "store": {
                        "bytes": broker.size_bytes,
                        "disk_bytes": broker.disk_bytes,
                        "bytes_max": options.bytes_max,
                        "full": core.full,
                    },
                    "counts": core.counts,
                    "in_flight": core.in_flight(),
                    "prepared": len(core.prepared),
                    "sessions": [
                        {
                            "app": session.app,
                            "client": session.client,
                            "suspended": session.suspended,
                            "going": session.going,
                            "groups": {
                                name: {"credit": link.credit, "in_flight": link.in_flight}
                                for name, link in session.links.items()
                            },
                            "publishes": sorted(session.publishes),
                        }
                        for session in core.sessions.values()
                    ],
                }
            ),
        )

    def _topics(self) -> Answer:
        found = [
            {
                "name": topic.name,
                "sync": topic.sync,
                "published": topic.published,
                "depth": sum(queue.end - queue.first for queue in topic.queues),
                "queues": [
                    {"queue": queue.number, "first": queue.first, "end": queue.end}
                    for queue in topic.queues
                ],
                "groups": sorted({cursor.group.name for cursor in topic.cursors}),
            }
            for topic in self._broker.core.topics.values()
        ]
        return Answer(200, to_json({"topics": found}))

    def _list_groups(self) -> Answer:
        found = [self._shown(group) for group in self._broker.core.groups.values()]
        return Answer(200, to_json({"groups": found}))

    def _one_group(self, name: str, request: Request) -> Answer:
        if request.method != "GET":
            return wrong_method("GET", "DELETE")
        return Answer(200, to_json(self._shown(self._broker.core.groups[name])))

    def _shown(self, group: Group) -> dict[str, Any]:
        return {
            "name": group.name,
            "mode": "broadcast" if group.broadcast else "cluster",
            "ordered": group.ordered,
            "filter": group.filter_text,
            "suspended": group.suspended,
            "connections": sum(len(cursor.links) for cursor in group.cursors),
            "credit": sum(link.credit for cursor in group.cursors for link in cursor.links),
            "in_flight": sum(cursor.in_flight for cursor in group.cursors),
            "lag": self._broker.core.lag(group),
            "retrying": sum(cursor.kept for cursor in group.cursors),
            "delivered": group.delivered,
            "consumed": group.consumed,
            "redelivered": group.redelivered,
            "filtered": group.filtered,
            "dead": group.dead,
            "dropped": group.dropped,
            "positions": [
                {
                    "topic": place.queue.topic.name,
                    "queue": place.queue.number,
                    "next": place.next,
                    "unsettled": len(place.outstanding),
                    "end": place.queue.end,
                }
                for cursor in group.cursors
                for place in cursor.places.values()
            ],
        }

    # --- what moves something ---------------------------------------------------------------------

    async def _suspend(self, name: str, request: Request) -> Answer:
        self._broker.core.suspend_group(name, True)
        await self._broker.written()
        return Answer(200, to_json({"group": name, "suspended": True}))

    async def _resume(self, name: str, request: Request) -> Answer:
        self._broker.core.suspend_group(name, False)
        await self._broker.written()
        return Answer(200, to_json({"group": name, "suspended": False}))

    async def _reset(self, name: str, request: Request) -> Answer:
        try:
            body = msgspec.json.decode(request.body, type=Reset)
        except msgspec.MsgspecError as wrong:
            return error(422, f"body: {wrong}")
        if (body.time_ms is None) == (body.offset is None) or body.offset not in (
            None,
            "first",
            "last",
        ):
            right = '{"time_ms": milliseconds since 1970} or {"offset": "first" or "last"}'
            return error(422, f"body: it must be {right}")
        found = self._broker.core.reset_group(
            name, time_ms=body.time_ms, to_first=body.offset == "first"
        )
        await self._broker.written()
        return Answer(200, to_json({"group": name, "positions": found}))

    async def _delete(self, name: str) -> Answer:
        try:
            self._broker.core.delete_group(name)
        except ValueError as wrong:
            return error(409, str(wrong))
        await self._broker.written()
        return Answer(200, to_json({"group": name, "deleted": True}))

    # --- metrics ----------------------------------------------------------------------------------

    def _metrics(self) -> Answer:
        return Answer(200, "".join(self._lines()).encode(), METRICS_TYPE)

    def _lines(self) -> Iterable[str]:
        broker = self._broker
        core = broker.core
        topics = [({"topic": topic.name}, topic) for topic in core.topics.values()]
        groups = [({"group": group.name}, group) for group in core.groups.values()]
        counts = core.counts
        yield from _metric(
            "topic_depth", "gauge", "Messages that are kept.",
            [(label, sum(q.end - q.first for q in topic.queues)) for label, topic in topics],
        )  # fmt: skip
        yield from _metric(
            "published_total", "counter", "Messages stored in a topic since the start.",
            [(label, topic.published) for label, topic in topics],
        )  # fmt: skip
        for name, text in (
            ("delivered", "Deliveries made, each attempt."),
            ("consumed", "Deliveries answered with consumed."),
            ("redelivered", "Deliveries that were not the first."),
            ("dead", "Messages given up, to %DLQ%group."),
            ("dropped", "Messages of a broadcast group given up."),
            ("filtered", "Messages passed over by the group's filter."),
        ):
            rows = [(label, getattr(group, name)) for label, group in groups]
            yield from _metric(f"group_{name}_total", "counter", text, rows)
        yield from _metric(
            "group_lag", "gauge", "Messages that the group has not settled.",
            [(label, core.lag(group)) for label, group in groups],
        )  # fmt: skip
        for name, text, value in (
            ("in_flight", "Deliveries without an answer.", lambda c: c.in_flight),
            ("retrying", "Messages between two attempts or in a later one.", lambda c: c.kept),
            (
                "credit",
                "Deliveries that may be in flight.",
                _credit,
            ),
            ("connections", "Connections of the group.", lambda c: len(c.links)),
        ):
            rows = [(label, sum(map(value, group.cursors))) for label, group in groups]
            yield from _metric(f"group_{name}", "gauge", text, rows)
        yield from _metric(
            "group_suspended", "gauge", "1: an operator has suspended it.",
            [(label, int(group.suspended)) for label, group in groups],
        )  # fmt: skip
        for name, text in (
            ("duplicates", "Publishes that had come before."),
            ("later", "Publishes told to come again."),
            ("rejected", "Requests refused for good."),
            ("delayed", "Delayed messages taken."),
            ("committed", "Transactions committed."),
            ("rolled_back", "Transactions rolled back."),
            ("checks", "Publishers asked about a transaction."),
            ("late_answers", "Answers to what nobody waits for any more."),
            ("commits_failed", "Batches that could not be written."),
        ):
            yield from _metric(f"{name}_total", "counter", text, [({}, counts[name])])
        for name, text, number in (
            ("sessions", "Connections that have spoken.", len(core.sessions)),
            ("prepared", "Messages of open transactions.", len(core.prepared)),
            ("store_bytes", "What the store holds.", broker.size_bytes),
            ("store_disk_bytes", "What its files take.", broker.disk_bytes),
            ("store_full", "1: nothing new is taken.", int(core.full)),
        ):
            yield from _metric(name, "gauge", text, [({}, number)])
        yield from self._commit_lines()

    def _commit_lines(self) -> Iterable[str]:
        commits = self._broker.commits
        name = "fastmesh_broker_commit_seconds"
        yield f"# HELP {name} Transactions, with and without waiting for the disk.\n"
        yield f"# TYPE {name} histogram\n"
        for sync, buckets in commits.buckets.items():
            label = f'sync="{str(sync).lower()}"'
            count = 0
            for bound, number in zip((*commits.bounds_s, "+Inf"), buckets, strict=True):
                count += number
                yield f'{name}_bucket{{{label},le="{bound}"}} {count}\n'
            yield f"{name}_sum{{{label}}} {commits.sum_s[sync]}\n"
            yield f"{name}_count{{{label}}} {count}\n"


def _credit(cursor: Cursor) -> int:
    return sum(link.credit for link in cursor.links)


def _metric(
    name: str, kind: str, text: str, rows: Iterable[tuple[Mapping[str, str], float]]
) -> Iterable[str]:
    yield f"# HELP fastmesh_broker_{name} {text}\n# TYPE fastmesh_broker_{name} {kind}\n"
    for labels, value in rows:
        # Names are letters, digits and some signs, none of which needs escaping.
        inside = ",".join(f'{key}="{label}"' for key, label in labels.items())
        yield (
            f"fastmesh_broker_{name}{{{inside}}} {value}\n"
            if inside
            else (f"fastmesh_broker_{name} {value}\n")
        )
