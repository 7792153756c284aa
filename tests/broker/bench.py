"""A broker's core over a real store, without sockets: a test says what comes in and when, and sees
what goes out. Commits happen when the test says so, in its own thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmesh._ext.push import Push, parse, request, response
from fastmesh.broker.core import Core, Options
from fastmesh.broker.store import Store, StoreFullError

START_MS = 1_700_000_000_000


class Delivery:
    """A call of the broker: a delivery or a check."""

    def __init__(self, handle: int, ticket: int, frame: bytes) -> None:
        self.handle = handle
        self.ticket = ticket
        self.push = parse(frame)
        self.headers = self.push.headers
        self.id = self.headers.get("fm.id", "")
        self.attempt = int(self.headers.get("fm.attempt", "0"))

    def __repr__(self) -> str:
        return f"<{self.headers.get('fm.op')} {self.id} to {self.handle} #{self.attempt}>"


class Bench:
    """`crash()` and `reopen()` are what kill -9 and a restart do to it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.options = Options(**options)
        self.now_ms = START_MS
        self.open()

    def open(self) -> None:
        self.store = Store(str(self.folder), bytes_max=self.options.bytes_max)
        self.core = Core(self.options, self.store, self.store.load(), self.now_ms)
        self.answers: list[tuple[int, Push]] = []
        self.deliveries: list[Delivery] = []
        self._id = 0
        self._epochs: dict[int, int] = {}

    def crash(self) -> None:
        """What was not committed is gone: nothing is flushed, nothing said."""
        self.store.close()
        self.open()

    # --- in -----------------------------------------------------------------------------------

    def frame(self, handle: int, headers: Mapping[str, str], content: bytes = b"") -> int:
        self._id += 1
        self.core.now_ms = self.now_ms
        self.core.frame(handle, parse(request(self._id, dict(headers), content)))
        return self._id

    def ask(self, handle: int, headers: Mapping[str, str], content: bytes = b"") -> dict[str, str]:
        """The answer to a request, with everything written that it has to wait for."""
        number = self.frame(handle, headers, content)
        self.run()
        found = [push for to, push in self.answers if to == handle and push.id == number]
        assert len(found) == 1, found
        return found[0].headers

    def hello(self, handle: int, client: str = "") -> None:
        said = {"fm.op": "hello", "fm.protocol": "1", "fm.client": client or f"n{handle}"}
        assert self.ask(handle, said)["fm.result"] == "consumed"

    def announce(self, handle: int, *groups: Mapping[str, str]) -> dict[str, str]:
        """Each group: name, and topic, role, prefetch, mode, ordered, filter where they matter."""
        if handle not in self.core.sessions:
            self.hello(handle)
        self._epochs[handle] = self._epochs.get(handle, 0) + 1
        column = {
            key: ",".join(group.get(key, default) for group in groups)
            for key, default in (
                ("group", ""),
                ("topic", "orders"),
                ("role", "subscribe"),
                ("prefetch", "10"),
                ("mode", "cluster"),
                ("ordered", "0"),
            )
        }
        headers = {f"fm.{key}": text for key, text in column.items()}
        headers |= {
            f"fm.filter.{group['group']}": group["filter"] for group in groups if "filter" in group
        }
        epoch = str(self._epochs[handle])
        return self.ask(handle, {"fm.op": "announce", "fm.epoch": epoch, **headers})

    def publish(
        self, id: str, content: bytes = b"x", *, handle: int = 1, topic: str = "orders", **more: str
    ) -> dict[str, str]:
        """Keyword arguments are header names without `fm.`: key="k", delay_ms="5", tx="prepare"."""
        if handle not in self.core.sessions:
            self.hello(handle)
        extra = {f"fm.{name}": value for name, value in more.items() if not name.startswith("h_")}
        extra |= {f"h.{name[2:]}": value for name, value in more.items() if name.startswith("h_")}
        said = {"fm.op": "publish", "fm.topic": topic, "fm.id": id, **extra}
        return self.ask(handle, said, content)

    def publish_many(self, ids: list[str], **more: str) -> None:
        for id in ids:
            assert self.publish(id, **more)["fm.result"] == "consumed"

    def answer(self, delivery: Delivery, result: str = "consumed", **more: str) -> None:
        said = {"fm.result": result, **{f"fm.{name}": value for name, value in more.items()}}
        self.core.now_ms = self.now_ms
        push = parse(response(1, delivery.push.hint, said))
        self.core.answer(delivery.ticket, 0, push)
        self.run()

    def fail(self, delivery: Delivery, outcome: int = 8) -> None:
        self.core.now_ms = self.now_ms
        self.core.answer(delivery.ticket, outcome, None)
        self.run()

    def gone(self, handle: int) -> None:
        self.core.now_ms = self.now_ms
        self.core.gone(handle)
        self.run()

    # --- time and disk --------------------------------------------------------------------------

    def run(self, after_ms: int = 0, *, full: bool = False) -> None:
        """Time goes on, everything due is done and written. `full`: nothing can be written."""
        self.now_ms += after_ms
        core = self.core
        core.now_ms = self.now_ms
        for _ in range(1000):
            core.turn()
            batch = core.seal()
            if batch is not None:
                if full:
                    core.committed(StoreFullError("no room"))
                else:
                    self.store.commit(batch)
                    core.committed()
            self.take()
            if batch is None and core.due_ms() > self.now_ms:
                return
        raise AssertionError("the broker does not come to rest")

    def settle(self) -> None:
        """Positions are written some milliseconds later than anybody waits for."""
        self.run(10)
        assert self.core.is_idle() or self.core.in_flight()

    def take(self) -> None:
        for handle, data in self.core.sends:
            self.answers.append((handle, parse(data)))
        self.core.sends.clear()
        for handle, ticket, data, _ in self.core.calls:
            self.deliveries.append(Delivery(handle, ticket, data))
        self.core.calls.clear()

    # --- out --------------------------------------------------------------------------------------

    def delivered(self) -> list[Delivery]:
        """What was delivered since the last look."""
        found, self.deliveries = self.deliveries, []
        return found

    def drain(self, result: str = "consumed") -> list[Delivery]:
        """Answer everything, and everything that comes then, until nothing more does."""
        found: list[Delivery] = []
        while some := self.delivered():
            for delivery in some:
                self.answer(delivery, result)
            found += some
        self.settle()
        return found
