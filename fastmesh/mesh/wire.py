"""What the control plane of the message mesh says to the engine, and control frames as it reads
them.

    events of the engine -> PushControl -> Wire -> one queue, in order -> the engine's command ring

Nothing here blocks. A full command ring keeps what is left, in order, until `flush` is called
again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import msgspec

from fastmesh import limits, saved
from fastmesh._ext import push
from fastmesh.protocols import push as words

DEADLINE = 8
"""Outcome of a call that nobody answered in time; 1..7 are the engine's causes, 0 is an answer."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request of our own ended."""

    outcome: int
    """0 answered; 1..7 the engine's cause; 8 deadline."""
    headers: Mapping[str, str]
    """Of the answer; {} when there is none, or none that can be read."""

    @property
    def result(self) -> str:
        return self.headers.get(words.RESULT, "")

    @property
    def why(self) -> str:
        """Why it is not `consumed`, for people."""
        if self.outcome == 0:
            result = self.result or "an answer without fm.result"
            reason = self.headers.get(words.REASON, "")
            return f"{result}: {reason}" if reason else result
        return "no answer in time" if self.outcome == DEADLINE else "connection lost"


Done = Callable[[Outcome, int], None]
"""Called with the outcome and the time in ms."""


class Wire(Protocol):
    """All of it is queued in this order and done in this order."""

    def reply(self, handle: int, data: bytes, greet: bool = False) -> None:
        """Answer a control frame of a client or peer; b"" answers nothing. What it sent behind that
        frame is read from now on."""

    def send(self, handle: int, data: bytes) -> None: ...
    def call(self, handle: int, headers: Mapping[str, str], done: Done) -> None:
        """A request of our own; `done` is called exactly once."""

    def subscribe(self, handle: int, groups: Sequence[tuple[int, int]]) -> None:
        """The whole set of a client connection: (group id, prefetch)."""

    def peer_groups(self, endpoint_id: int, groups: Sequence[int]) -> None: ...
    def close(self, handle: int) -> None: ...


class SavedSaying(msgspec.Struct, gc=False, omit_defaults=True):
    """One thing that the engine was not told yet."""

    kind: saved.Text
    """reply | send | subscribe | peer_groups | close"""
    to: saved.Handle
    """A connection; of peer_groups an endpoint."""
    data: bytes = b""
    greet: bool = False
    groups: list[list[Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]]] = []
    """[[group id, prefetch]]; of peer_groups [[group id]]."""


class SavedWire(msgspec.Struct, omit_defaults=True):
    ticket: saved.Count = 0
    """Of the last call: an answer to a call of the old process is nobody's in the new one."""
    queue: list[SavedSaying] = []


class EngineWire:
    """The Wire to the real engine: queued until there is one."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._queue: deque[tuple[str, tuple[Any, ...], dict[str, Any]]] = deque()
        self._waiting: dict[int, Done] = {}
        self._ticket = 0

    def attach(self, engine: Any) -> None:
        """What is queued is handed over from now on."""
        self._engine = engine

    def detach(self) -> Any:
        """Nothing is handed over any more; who it was."""
        engine, self._engine = self._engine, None
        return engine

    def clear(self) -> None:
        """Forget what was not handed over."""
        self._queue.clear()
        self._waiting.clear()

    @property
    def attached(self) -> bool:
        return self._engine is not None

    def reply(self, handle: int, data: bytes, greet: bool = False) -> None:
        self._queue.append(("reply", (handle, data), {"greet": greet}))

    def send(self, handle: int, data: bytes) -> None:
        self._queue.append(("send_many", ([(handle, data)],), {}))

    def call(self, handle: int, headers: Mapping[str, str], done: Done) -> None:
        self._ticket += 1
        self._waiting[self._ticket] = done
        timeout_ms = limits.CONTROL_TIMEOUT_MS
        frame = push.request(1, headers, timeout_ms=timeout_ms)
        item = (handle, self._ticket, frame, timeout_ms)
        self._queue.append(("call_many", ([item],), {}))

    def subscribe(self, handle: int, groups: Sequence[tuple[int, int]]) -> None:
        self._queue.append(("subscribe", (handle, list(groups)), {}))

    def peer_groups(self, endpoint_id: int, groups: Sequence[int]) -> None:
        self._queue.append(("peer_groups", (endpoint_id, list(groups)), {}))

    def close(self, handle: int) -> None:
        self._queue.append(("close", (handle,), {}))

    def answered(self, ticket: int, outcome: int, data: bytes, now_ms: int) -> None:
        """Event "answer"."""
        done = self._waiting.pop(ticket, None)
        if done is None:
            return
        headers: Mapping[str, str] = {}
        if outcome == 0:
            try:
                headers = push.parse(data).headers
            except ValueError:
                headers = {words.REASON: "an answer that cannot be read"}
        done(Outcome(outcome, headers), now_ms)

    def save(self) -> SavedWire:
        """What was not handed over, in order, without the calls: what waits for their answers does
        not travel, so that whoever called says it again."""
        said = []
        for name, arguments, more in self._queue:
            if name == "reply":
                said.append(SavedSaying(name, arguments[0], arguments[1], more["greet"]))
            elif name == "send_many":
                said += [SavedSaying("send", handle, data) for handle, data in arguments[0]]
            elif name == "subscribe":
                groups = [list(pair) for pair in arguments[1]]
                said.append(SavedSaying(name, arguments[0], groups=groups))
            elif name == "peer_groups":
                groups = [[number] for number in arguments[1]]
                said.append(SavedSaying(name, arguments[0], groups=groups))
            elif name == "close":
                said.append(SavedSaying(name, arguments[0]))
        return SavedWire(self._ticket, said)

    def restore(self, data: object) -> None:
        """Queue what another process did not say any more, and nothing else. Raises
        HandoverError."""
        found = saved.read(data, SavedWire, "wire")
        for at, item in enumerate(found.queue):
            width = {"subscribe": 2, "peer_groups": 1}.get(item.kind, 0)
            if item.kind not in ("reply", "send", "subscribe", "peer_groups", "close"):
                # Passed over, something would not be said that somebody waits for.
                raise saved.wrong(f"wire.queue[{at}].kind", item.kind, "cannot be said here")
            if item.kind == "send" or (item.kind == "reply" and item.data):
                try:
                    push.parse(item.data)
                except ValueError as error:
                    raise saved.wrong(f"wire.queue[{at}].data", item.data, str(error)) from None
            if any(len(group) != width for group in item.groups):
                raise saved.wrong(f"wire.queue[{at}].groups", item.groups, f"each has {width}")
        self._ticket = found.ticket
        self.clear()
        for item in found.queue:
            if item.kind == "reply":
                self.reply(item.to, item.data, item.greet)
            elif item.kind == "send":
                self.send(item.to, item.data)
            elif item.kind == "subscribe":
                self.subscribe(item.to, [(number, prefetch) for number, prefetch in item.groups])
            elif item.kind == "peer_groups":
                self.peer_groups(item.to, [number for (number,) in item.groups])
            else:
                self.close(item.to)

    def flush(self) -> bool:
        """Hand over what is queued. False = the command ring is full: call again soon."""
        while self._queue and self._engine is not None:
            name, arguments, more = self._queue[0]
            try:
                taken = getattr(self._engine, name)(*arguments, **more)
            except BlockingIOError:
                return False
            if taken == 0:  # send_many and call_many say how many were
                return False
            self._queue.popleft()
        return True


def answer(asked: push.Push, headers: Mapping[str, str]) -> bytes:
    """The answer to a request; b"" for what wants none."""
    if asked.kind != "request":
        return b""
    return push.response(asked.id, asked.hint, headers)


def short(text: str, most: int = limits.LOG_VALUE_CHARS_MAX) -> str:
    """A sentence about somebody else, fit for a log line: printable, and not too long."""
    text = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return text if len(text) <= most else text[:most] + "..."


def shown(text: str) -> str:
    """A value that somebody else sent, as part of a sentence."""
    return short(text, limits.REMOTE_BYTES_SHOWN_MAX)
