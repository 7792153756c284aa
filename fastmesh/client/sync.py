"""SyncMeshClient: the same client for programs without an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Iterable, Mapping
from types import TracebackType
from typing import Any, TypedDict, TypeVar, Unpack

from fastmesh.client.client import MeshClient
from fastmesh.client.model import Check, Group, Handler, Receipt, Stats
from fastmesh.client.transaction import Transaction

T = TypeVar("T")


class ClientOptions(TypedDict, total=False):
    """What MeshClient() takes besides `app`."""

    client: str | None
    groups: Iterable[Group]
    topics: Iterable[str]
    mesh: str
    registration: str | None
    registration_token: str | None
    connections: int
    lease_ms: int
    heartbeat_ms: int
    publish_timeout_ms: int
    start_timeout_ms: int
    close_timeout_ms: int
    frame_bytes_max: int


class MessageOptions(TypedDict, total=False):
    """What MeshClient.transaction() takes besides topic, content and group."""

    key: str | None
    headers: Mapping[str, str] | None
    colour: str | None
    lane: str | None
    version: str | None
    trace: str | None
    idempotent: bool
    id: str | None


class PublishOptions(MessageOptions, total=False):
    """What MeshClient.publish() takes besides topic and content."""

    delay_ms: int | None
    timeout_ms: int | None


class SyncMeshClient:
    """MeshClient behind plain calls and `with`, on a thread with a loop of its own.

    Arguments, methods and errors are those of MeshClient. Calls may come from any thread, handlers'
    threads included; not from coroutine handlers, which run on the loop that a call would wait for.
    """

    def __init__(self, *, app: str, **options: Unpack[ClientOptions]) -> None:
        self._client = MeshClient(app=app, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def stats(self) -> Stats:
        return self._client.stats

    @property
    def app(self) -> str:
        return self._client.app

    @property
    def client(self) -> str:
        return self._client.client

    def __enter__(self) -> SyncMeshClient:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        if self._thread is not None:
            raise RuntimeError("the client was started; each is started once")
        looping: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        # A daemon: a program that forgets close() still ends.
        self._thread = threading.Thread(
            target=self._run, args=(looping,), name="fastmesh-client", daemon=True
        )
        self._thread.start()
        self._loop = looping.result()
        try:
            self._wait(self._client.start())
        except BaseException:
            self._end()
            raise

    @staticmethod
    def _run(looping: concurrent.futures.Future[asyncio.AbstractEventLoop]) -> None:
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            loop.call_soon(looping.set_result, loop)
            loop.run_forever()

    def close(self, timeout_ms: int | None = None) -> None:
        """As MeshClient.close(). An interrupt (Ctrl-C) while it waits ends everything at once."""
        if self._loop is None:
            return
        try:
            self._wait(self._client.close(timeout_ms))
        finally:
            self._end()

    def _end(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()

    def subscribe(self, group: str | Group, handler: Handler) -> None:
        self._on_loop(self._client.subscribe, group, handler)

    def unsubscribe(self, group: str | Group, timeout_ms: int | None = None) -> None:
        self._wait(self._client.unsubscribe(group, timeout_ms))

    def check(self, group: str | Group, callback: Check) -> None:
        self._on_loop(self._client.check, group, callback)

    def publish(self, topic: str, content: bytes, **options: Unpack[PublishOptions]) -> Receipt:
        return self._wait(self._client.publish(topic, content, **options))

    def publish_soon(
        self, topic: str, content: bytes, **options: Unpack[PublishOptions]
    ) -> concurrent.futures.Future[Receipt]:
        """The same without waiting: many at once are much faster than one after the other."""
        return self._submit(self._client.publish(topic, content, **options))

    def transaction(
        self,
        topic: str,
        content: bytes,
        *,
        group: str | Group | None = None,
        **options: Unpack[MessageOptions],
    ) -> SyncTransaction:
        inner = self._client.transaction(topic, content, group=group, **options)
        return SyncTransaction(self, inner)

    # --- between the threads ----------------------------------------------------------------------

    def _on_loop(self, call: Any, *arguments: Any) -> None:
        if self._loop is None:
            call(*arguments)
            return

        async def there() -> None:
            call(*arguments)

        self._wait(there())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError(
                "this is the client's own loop, which the call would wait for;"
                " a coroutine handler belongs to a MeshClient"
            )
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            # An interrupt of the waiting thread: what it waited for ends as well.
            if future.cancel():
                concurrent.futures.wait([future])
            raise

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._loop is None:
            work.close()
            raise RuntimeError("the client is not started, or closed: `with client`")
        return asyncio.run_coroutine_threadsafe(work, self._loop)


class SyncTransaction:
    """Transaction behind `with`."""

    def __init__(self, client: SyncMeshClient, inner: Transaction) -> None:
        self._client = client
        self._inner = inner

    @property
    def id(self) -> str:
        return self._inner.id

    @property
    def receipt(self) -> Receipt | None:
        return self._inner.receipt

    def __enter__(self) -> SyncTransaction:
        self._client._wait(self._inner.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client._wait(self._inner.__aexit__(kind, error, trace))

    def commit(self) -> None:
        self._client._wait(self._inner.commit())

    def rollback(self) -> None:
        self._client._wait(self._inner.rollback())
