"""A mesh that does what a test tells it to: the wire of the real one, none of its decisions.

Unless told otherwise it behaves: it knows who registered, greets them, takes subscriptions and
publishes. `on[op]` replaces the answer to an op, `http` the answer of the registration.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import h11

from fastmesh._ext import bolt, push
from fastmesh._ext.push import Push
from fastmesh.client import Group, MeshClient
from fastmesh.protocols import push as words

FRAME_BYTES_MAX = 4 << 20
WAIT_S = 5.0
CONSUMED = {"fm.result": "consumed"}


async def until(state: Callable[[], object]) -> None:
    """Polls a state until it holds, with a deadline."""
    async with asyncio.timeout(WAIT_S):
        while not state():  # noqa: ASYNC110 - the state is anybody's
            await asyncio.sleep(0.001)


class Drop(Exception):
    """Raised by a script: the connection ends here, without an answer."""


Script = Callable[["Peer", Push], Awaitable[dict[str, str] | None]]
"""The headers of the answer; None for no answer at all."""


def answers(**headers: str) -> Script:
    """A script that always gives this answer: `answers(result="later", retry_ms="5")`."""

    async def script(peer: Peer, frame: Push) -> dict[str, str]:
        return {f"fm.{name}": value for name, value in headers.items()}

    return script


class Peer:
    """One client connection as the mesh sees it."""

    def __init__(
        self, mesh: FakeMesh, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.mesh = mesh
        self.reader = reader
        self.writer = writer
        self.seen: list[Push] = []
        """Everything that came, but heartbeats and answers."""
        self.beats = 0
        self.groups: dict[str, int | None] = {}
        """group -> prefetch, as subscribed last."""
        self.identity = ("", "")
        self.suspended = False
        self.open = True
        self.answers_heartbeats = True
        self._asked: dict[int, asyncio.Future[Push]] = {}
        self._next_id = 1
        self._scripts: set[asyncio.Task[None]] = set()

    def ops(self) -> list[str]:
        return [frame.headers["fm.op"] for frame in self.seen]

    # --- what the mesh does -----------------------------------------------------------------------

    def send(self, headers: dict[str, str], content: bytes = b"") -> asyncio.Future[Push]:
        """Asks the client; the future is its answer, or ConnectionError."""
        id, self._next_id = self._next_id, self._next_id + 1
        future = self.expect(id)
        if self.open:
            self.writer.write(push.request(id, headers, content))
        else:
            future.set_exception(ConnectionError("the client is gone"))
        return future

    def expect(self, id: int) -> asyncio.Future[Push]:
        """The answer with this id."""
        future = self._asked[id] = asyncio.get_running_loop().create_future()
        return future

    def deliver(
        self, group: str, id: str = "m1", content: bytes = b"", **more: str
    ) -> asyncio.Future[Push]:
        headers = {"fm.op": "deliver", "fm.topic": "orders", "fm.group": group, "fm.id": id}
        return self.send(headers | {f"fm.{k}": v for k, v in more.items()}, content)

    def check(self, group: str, id: str, content: bytes = b"") -> asyncio.Future[Push]:
        return self.send(
            {"fm.op": "check", "fm.topic": "orders", "fm.group": group, "fm.id": id}, content
        )

    def beat(self) -> asyncio.Future[Push]:
        id, self._next_id = self._next_id, self._next_id + 1
        self.writer.write(bolt.heartbeat(id))
        return self.expect(id)

    def drop(self) -> None:
        self.writer.transport.abort()

    # --- what the client does ---------------------------------------------------------------------

    async def run(self) -> None:
        buffer = bytearray()
        try:
            while data := await self.reader.read(65536):
                buffer += data
                frames, consumed = push.split(buffer, FRAME_BYTES_MAX)
                del buffer[:consumed]
                for raw in frames:
                    self._frame(raw)
        except OSError:
            pass
        finally:
            self.open = False
            for future in self._asked.values():
                if not future.done():
                    future.set_exception(ConnectionError("the client is gone"))
                    future.exception()  # not every test looks
            for task in list(self._scripts):
                task.cancel()
            self.writer.close()

    def _frame(self, raw: bytes) -> None:
        frame = push.parse(raw)
        if frame.kind == "heartbeat":
            self.beats += 1
            if self.answers_heartbeats:
                self.writer.write(bolt.heartbeat_ack(raw))
        elif frame.kind in ("response", "heartbeat_ack"):
            future = self._asked.pop(frame.id)
            if not future.done():
                future.set_result(frame)
        else:
            self.seen.append(frame)
            task = asyncio.get_running_loop().create_task(self._answer(frame))
            self._scripts.add(task)
            task.add_done_callback(self._scripts.discard)

    async def _answer(self, frame: Push) -> None:
        script = self.mesh.on.get(frame.headers["fm.op"], _behave)
        try:
            headers = await script(self, frame)
        except Drop:
            self.drop()
            return
        if headers is not None and frame.kind == "request":
            status = int(headers.pop("status", "0"))
            self.writer.write(push.response(frame.id, frame.hint, headers, status=status))


async def _behave(peer: Peer, frame: Push) -> dict[str, str]:
    headers = frame.headers
    match headers["fm.op"]:
        case "hello":
            hello = words.Hello.parse(headers)
            peer.identity = (hello.app, hello.client)
            return hello.answer()
        case "subscribe":
            if peer.identity not in peer.mesh.registered:
                return {"fm.result": "reject", "fm.reason": "not registered"}
            peer.groups = dict(words.Subscribe.parse(headers).groups)
            return CONSUMED
        case "publish":
            words.Publish.parse(headers)
            return {**CONSUMED, "fm.id": headers["fm.id"], "fm.broker": "b1"}
        case "suspend":
            peer.suspended = True
    return CONSUMED


async def relay(peer: Peer, frame: Push) -> dict[str, str]:
    """For `on["publish"]`: whoever subscribed to a group of that topic gets the message, once it is
    committed where it is prepared first. Nothing is delivered twice, whatever the answer."""
    mesh, said = peer.mesh, words.Publish.parse(frame.headers)
    headers, content = words.carried(frame.headers), frame.content
    if said.tx == words.PREPARE:
        mesh.prepared[said.id] = (headers, content)
    elif said.tx:
        headers, content = mesh.prepared.pop(said.id)
    if said.tx in ("", words.COMMIT):
        for name, topic in mesh.topics_of_groups().items():
            members = [p for p in mesh.live if name in p.groups]
            if topic == said.topic and members:
                about = {words.OP: words.DELIVER, words.GROUP: name, words.ATTEMPT: "1"}
                members[0].send({**headers, **about}, content)
    return words.answer(words.CONSUMED, id=said.id, broker="b1")


class FakeMesh:
    """`async with FakeMesh() as mesh:` listens for clients and for registrations, on loopback or
    on UNIX sockets in a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self.on: dict[str, Script] = {}
        self.peers: list[Peer] = []
        self.registered: dict[tuple[str, str], Any] = {}
        self.prepared: dict[str, tuple[dict[str, str], bytes]] = {}
        self.posts: list[Any] = []
        self.deletes: list[str] = []
        self.tokens: list[str] = []
        """The Authorization of each registration that had one."""
        self.http: Callable[[str, Any], Awaitable[tuple[int, Any] | None]] | None = None
        """(method, document) -> status and document; None falls through to the honest answer."""
        self._ports = [0, 0]
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> FakeMesh:
        await self.listen()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def listen(self) -> None:
        """Again on the same ports when it is a restart."""
        for i, serve in enumerate((self._client, self._http)):
            if self._folder is not None:
                server = await asyncio.start_unix_server(serve, self._folder / str(i))
            else:
                server = await asyncio.start_server(serve, "127.0.0.1", self._ports[i])
                self._ports[i] = server.sockets[0].getsockname()[1]
            self._servers.append(server)

    async def stop(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        for peer in self.peers:
            peer.drop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def address(self) -> str:
        return f"unix:{self._folder}/0" if self._folder else f"127.0.0.1:{self._ports[0]}"

    @property
    def registration(self) -> str:
        if self._folder is not None:
            return f"unix:{self._folder}/1"
        return f"http://127.0.0.1:{self._ports[1]}"

    @property
    def live(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.open]

    def topics_of_groups(self) -> dict[str, str]:
        groups = [group for found in self.registered.values() for group in found["groups"]]
        return {g["name"]: g["topic"] for g in groups if g["role"] == "subscribe"}

    async def peer(self, *groups: str) -> Peer:
        """The newest live connection, once it is subscribed to exactly these groups."""
        await until(lambda: self.live and set(self.live[-1].groups) == set(groups))
        return self.live[-1]

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(self, reader, writer)
        self.peers.append(peer)
        # (what is no frame at all ends the connection, as it does in a mesh)
        with self._tracked(), contextlib.suppress(ValueError):
            await peer.run()

    @contextlib.contextmanager
    def _tracked(self) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self._tracked(), contextlib.suppress(OSError):
            try:
                await self._serve(reader, writer)
            finally:
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        http = h11.Connection(h11.SERVER)
        head: h11.Request | None = None
        body = b""
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return
        assert head is not None
        document = json.loads(body) if body else None
        method = head.method.decode()
        if method == "POST":
            self.tokens += [v.decode() for k, v in head.headers if k == b"authorization"]
        found = await self.http(method, document) if self.http is not None else None
        status, answer = found or self._honest(method, head.target.decode(), document)
        out = json.dumps(answer).encode()
        writer.write(
            http.send(h11.Response(status_code=status, headers=[("Content-Length", str(len(out)))]))
            + http.send(h11.Data(data=out))
        )
        await writer.drain()

    def _honest(self, method: str, target: str, document: Any) -> tuple[int, Any]:
        if method == "DELETE":
            self.deletes.append(target)
            _, _, app, client = target.strip("/").split("/")
            return (200, {}) if self.registered.pop((app, client), None) else (404, {})
        self.posts.append(document)
        name = (document["app"], document["client"])
        known = name in self.registered
        self.registered[name] = document
        return (200 if known else 201), {}


def client_of(mesh: FakeMesh, /, *groups: Group, **options: Any) -> MeshClient:
    """A client of this mesh, not started."""
    return MeshClient(
        **{
            "app": "demo",
            "client": "c1",
            "groups": groups,
            "topics": ["orders"],
            "mesh": mesh.address,
            "registration": mesh.registration,
            "close_timeout_ms": 3000,
            **options,
        }
    )


@contextlib.asynccontextmanager
async def silent_server() -> AsyncIterator[str]:
    """An address that accepts and never says a word."""
    held: list[asyncio.StreamWriter] = []

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in held:
            writer.transport.abort()
