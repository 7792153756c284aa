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
from typing import Any, Protocol

from fastmesh import limits
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


class EngineWire:
    """The Wire to the real engine: queued until there is one."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._queue: deque[tuple[str, tuple[Any, ...], dict[str, Any]]] = deque()
        self._waiting: dict[int, Done] = {}
        self._ticket = 0

    def attach(self, engine: Any) -> None:
        """None: nothing is handed over any more."""
        self._engine = engine

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
