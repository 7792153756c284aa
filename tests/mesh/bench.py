"""The control plane of the message mesh over a fake engine, without loop and clock: a test says
what happens and when, and looks at what was said to the engine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

from fastmesh import config as configuration
from fastmesh._ext import push
from fastmesh._ext.push import Push
from fastmesh.config import Address
from fastmesh.control.snapshot import Compiled, Directory, MeshView, compile_snapshot
from fastmesh.handover import document as documents
from fastmesh.mesh.push import PushControl
from fastmesh.mesh.registration import Registry
from fastmesh.mesh.wire import EngineWire
from tests.conftest import LogLines
from tests.fake_engine import Event, FakeEngine, FakeSnapshot

CONFIG = """\
node: {name: n1, app: shop}
listeners: [{name: msg, listen: "127.0.0.1:12300", protocol: push}]
push:
  brokers:
    - {name: b1, address: "127.0.0.1:12401"}
    - {name: b2, address: "127.0.0.1:12402"}
  forward: {listen: "127.0.0.1:12500"}
registration: {listen: "127.0.0.1:7071"}
limits: {heartbeat_ms: 1000}
"""


def group(name: str, role: str = "subscribe", topic: str = "orders", **more: Any) -> dict[str, Any]:
    return {"name": name, "topic": topic, "role": role, **more}


class Bench:
    """`document`: of the process that this one takes over from, see `save`."""

    def __init__(
        self, text: str = CONFIG, *, document: bytes = b"", now_ms: int = 1_000_000
    ) -> None:
        self.config = configuration.parse(text.encode(), base="/base")
        self.log = LogLines()
        self.engine = FakeEngine()
        self.wire = EngineWire()
        self.wire.attach(self.engine)
        self.now_ms = now_ms
        self.recompiles = 0
        self.registry = Registry()
        self.control = PushControl(
            self.wire,
            self.registry,
            self.log.log,
            node=self.config.node.name,
            app=self.config.node.app,
            interval_ms=1000,
            name=self.name,
            recompile=self.recompile,
        )
        self.registry.on_change = self.control.registered
        self.peers: dict[str, Address] = {"n2": Address("127.0.0.1", 12501)}
        self.schedule: Any = lambda app, endpoints: None
        self.compiled: Compiled
        self._directory = Directory(4096)
        self._versions = itertools.count(1)
        if document:
            self.restore(document)
        self._handles = itertools.count(1 << 40)
        self._ids = itertools.count(7)
        self.compile()

    # --- hand-over --------------------------------------------------------------------------------

    def save(self) -> bytes:
        parts = {
            "directory": self._directory.save(self.compiled.version),
            "registry": self.registry.save(self.now_ms),
            "control": self.control.save(self.now_ms),
            "wire": self.wire.save(),
        }
        return documents.encode(parts)

    def restore(self, document: bytes) -> None:
        parts = documents.decode(document)
        version = self._directory.restore(parts.part("directory"))
        self._versions = itertools.count(version + 1)
        self.registry.inherit(parts.part("registry"), self.now_ms)
        self.control.restore(parts.part("control"), self.now_ms)
        self.wire.restore(parts.part("wire"))

    # --- the outside ------------------------------------------------------------------------------

    def recompile(self) -> None:
        self.recompiles += 1

    def name(self, number: int) -> str:
        return next((e.name for e in self.compiled.endpoints if e.id == number), str(number))

    def view(self) -> MeshView:
        assert self.config.push is not None
        return MeshView(
            brokers=self.config.push.brokers,
            # In the order of their names: whoever compiles the same has the same new ids.
            groups=sorted(self.control.groups(), key=lambda found: found.name),
            topics=self.registry.topics().keys(),
            peers=self.peers,
            schedule=self.schedule,
            paused=self.control.announcer.paused_endpoints(),
        )

    def compile(self) -> FakeSnapshot:
        self.compiled = compile_snapshot(
            self.config,
            version=next(self._versions),
            directory=self._directory,
            addresses=lambda address: (address,),
            connections_max=100,
            factory=FakeSnapshot,
            mesh=self.view(),
        )
        self.control.compiled(self.compiled)
        self.settle()
        snapshot: Any = self.compiled.snapshot
        assert snapshot.sealed
        return snapshot

    def register(self, client: str, *groups: Mapping[str, Any], app: str = "shop") -> int:
        body = {"app": app, "client": client, "topics": [], "groups": list(groups)}
        return self.registry.register(json.dumps(body).encode(), self.now_ms).status

    def endpoint(self, name: str) -> int:
        return next(e.id for e in self.compiled.endpoints if e.name == name)

    # --- events -----------------------------------------------------------------------------------

    def event(self, kind: str, a: int = 0, b: int = 0, c: int = 0, data: bytes = b"") -> None:
        if kind == "answer":
            self.wire.answered(a, b, data, self.now_ms)
        else:
            self.control.take(Event(kind, 0, a, b, c, data), self.now_ms)
        self.settle()

    def settle(self) -> None:
        self.control.tick(self.now_ms)
        self.wire.flush()

    def wait(self, ms: int) -> None:
        """Time passes, and what is due is said when it is due."""
        until = self.now_ms + ms
        while (due := self.control.due_ms) is not None and due <= until:
            self.now_ms = max(self.now_ms, due)
            before = len(self.engine.calls)
            self.settle()
            if len(self.engine.calls) == before and self.control.due_ms == due:
                raise AssertionError("due, and nothing done")
        self.now_ms = until

    def client(self) -> int:
        """A client has connected."""
        return self._open("msg")

    def peer_client(self) -> int:
        """A peer has connected to our forward service."""
        return self._open("__forward__")

    def _open(self, listener: str) -> int:
        handle = next(self._handles)
        self.event("opened", handle, self.compiled.listener_ids[listener], 0)
        return handle

    def dialled(self, name: str) -> int:
        """The connection to a broker or peer is up."""
        handle = next(self._handles)
        self.event("opened", handle, self.endpoint(name), 1)
        return handle

    def frame(self, handle: int, headers: Mapping[str, str], *, oneway: bool = False) -> None:
        link = handle in self.control.announcer or handle in self.control.peers._links
        data = push.request(next(self._ids), headers, timeout_ms=1000, oneway=oneway)
        self.event("frame", handle, 0, 1 if link else 0, data)

    def ask(self, handle: int, **fields: str) -> Push | None:
        """A control frame; the reply to it, or None while there is none."""
        before = len(self.engine.said("reply"))
        self.frame(handle, {f"fm.{key}": value for key, value in fields.items()})
        found = self.engine.said("reply")[before:]
        assert len(found) <= 1
        if not found:
            return None
        assert found[0][1] == handle
        reply: Push = found[0][2]
        return reply

    def hello(self, handle: int, client: str = "c1", app: str = "shop") -> Push:
        reply = self.ask(handle, op="hello", protocol="1", app=app, client=client)
        assert reply is not None
        return reply

    def joined(self, client: str, groups: str) -> int:
        """A client connection that said hello and named these groups."""
        handle = self.client()
        assert self.hello(handle, client).headers["fm.result"] == "consumed"
        reply = self.ask(handle, op="subscribe", group=groups)
        assert reply is not None
        assert reply.headers["fm.result"] == "consumed", reply.headers
        return handle

    def live(self, name: str, connections: int, credit: int) -> None:
        self.event("group", self.compiled.group_ids[name], connections, credit)

    # --- what was said ----------------------------------------------------------------------------

    def calls(self, handle: int, op: str = "") -> list[tuple[Push, int]]:
        """(request, ticket) of our own on a connection, oldest first."""
        return [
            (frame, ticket)
            for _, at, frame, ticket in self.engine.said("call")
            if at == handle and op in ("", frame.headers["fm.op"])
        ]

    def answer(self, ticket: int, **fields: str) -> None:
        """Somebody answers a request of ours."""
        fields = fields or {"result": "consumed"}
        headers = {f"fm.{key}": value for key, value in fields.items()}
        asked = next(c[2] for c in self.engine.said("call") if c[3] == ticket)
        self.event("answer", ticket, 0, 0, push.response(1, asked.hint, headers))

    def met(self, name: str) -> int:
        """A broker or peer that is connected and accepted our hello."""
        handle = self.dialled(name)
        self.answer(self.calls(handle, "hello")[-1][1])
        return handle

    def subscribed(self, handle: int) -> tuple[tuple[int, int], ...]:
        """What the engine was told last of a client connection."""
        found: tuple[tuple[int, int], ...]
        found = next(c[2] for c in reversed(self.engine.said("subscribe")) if c[1] == handle)
        return found
