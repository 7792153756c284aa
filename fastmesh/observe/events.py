"""The engine's events become log lines, endpoint health and a ring of samples."""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from fastmesh import limits, saved
from fastmesh.observe.log import Log, escape_remote

if TYPE_CHECKING:
    from fastmesh._ext.engine import Event

CLOSE_REASONS = (
    "by_peer",
    "idle",
    "first_byte",
    "frame_timeout",
    "malformed",
    "slow_consumer",
    "memory",
    "io_error",
    "connect",
    "heartbeat",
    "drained",
    "by_command",
)
OUTCOMES = (
    "answered",
    "no_route",
    "no_endpoint",
    "overload",
    "connect",
    "upstream_lost",
    "client_gone",
    "undecodable",
    "expired",
)
PUSH_KINDS = ("frame", "opened", "gone", "answer", "group")
"""Events of the message mesh (fastmesh.mesh.push)."""
RULE_CLUSTER = -1
"""The verdict "as its rule says"."""
SAMPLE = struct.Struct("<6Q")

_HINTS = (
    (b"\x16\x03", "TLS"),
    (b"GET ", "HTTP"),
    (b"POST ", "HTTP"),
    (b"HEAD ", "HTTP"),
    (b"PRI * HTTP/2", "HTTP/2"),
    (b"SSH-", "SSH"),
    (b"AMQP", "AMQP"),
)


def guess_protocol(first: bytes) -> str:
    """What somebody seems to speak, from the first bytes; "" when nothing is known."""
    return next((name for start, name in _HINTS if first.startswith(start)), "")


def unpack_sample(event: Event) -> dict[str, object]:
    """A sampled request. Times are nanoseconds of the monotonic clock."""
    received, sent, answered, forwarded, endpoint_id, asker = SAMPLE.unpack(event.data)
    return {
        "trace": f"{event.a:016x}",
        "row": event.b,
        "outcome": OUTCOMES[event.c] if event.c < len(OUTCOMES) else str(event.c),
        "received_ns": received,
        "sent_ns": sent,
        "answered_ns": answered,
        "forwarded_ns": forwarded,
        "endpoint_id": endpoint_id,
        "asker": f"{asker:016x}",
    }


class SavedHealth(msgspec.Struct, omit_defaults=True):
    endpoint: saved.Id
    ejected: bool = False
    reason: saved.Text = ""


class SavedEvents(msgspec.Struct, omit_defaults=True):
    stalls: saved.Count = 0
    health: list[SavedHealth] = []


@dataclass(slots=True)
class EndpointHealth:
    up: int = 0
    ejected: bool = False
    reason: str = ""


class Events:
    """Takes everything the engine says. `listener_name` and `endpoint_name` turn ids into names."""

    def __init__(
        self,
        log: Log,
        *,
        listener_name: Callable[[int], str],
        endpoint_name: Callable[[int], str],
        verdict: Callable[[int, int | None], None],
        drained: Callable[[int], None],
        push: Callable[[Any], None] | None = None,
    ) -> None:
        """`push` takes PUSH_KINDS; None where there is no message mesh."""
        self._log = log
        self._listener_name = listener_name
        self._endpoint_name = endpoint_name
        self._verdict = verdict
        self._drained = drained
        self._up: dict[tuple[int, int], int] = {}
        self.health: dict[int, EndpointHealth] = {}
        self.samples: deque[dict[str, object]] = deque(maxlen=limits.STATUS_SAMPLES_MAX)
        self.stalls = 0
        self._takers: Mapping[str, Callable[[Any], None]] = {
            "snapshot": self._on_snapshot,
            "endpoint_up": self._on_endpoint_up,
            "endpoint_down": self._on_endpoint_down,
            "ejected": self._on_ejected,
            "restored": self._on_restored,
            "closed": self._on_closed,
            "refused": self._on_refused,
            "accept_paused": self._on_accept_paused,
            "parked": self._on_parked,
            "sample": self._on_sample,
            "stall": self._on_stall,
            "drained": self._on_drained,
            "stopped": self._on_stopped,
        }
        if push is not None:
            self._takers = {**self._takers, **dict.fromkeys(PUSH_KINDS, push)}

    def save(self) -> SavedEvents:
        return SavedEvents(
            self.stalls, [SavedHealth(n, h.ejected, h.reason) for n, h in self.health.items()]
        )

    def restore(self, data: object) -> None:
        """What the engine does not say again: which endpoints are up, it does. Before the first
        event. Raises HandoverError."""
        found = saved.read(data, SavedEvents, "events")
        self.stalls = found.stalls
        self.health = {
            item.endpoint: EndpointHealth(0, item.ejected, item.reason) for item in found.health
        }

    def take(self, event: Event) -> None:
        taker = self._takers.get(event.kind)
        if taker is None:
            self._log.limited("warning", "unknown event", "unknown event", kind=event.kind)
        else:
            taker(event)

    def forget_endpoints(self, alive: set[int]) -> None:
        """Drop the health of endpoints that no snapshot knows any more."""
        self.health = {key: value for key, value in self.health.items() if key in alive}
        self._up = {key: value for key, value in self._up.items() if key[1] in alive}

    def _on_snapshot(self, event: Event) -> None:
        self._log.debug("snapshot in force", thread=event.thread, version=event.a)

    def _endpoint(self, event: Event, up: int | None = None) -> EndpointHealth:
        health = self.health.setdefault(event.a, EndpointHealth())
        if up is not None:
            self._up[event.thread, event.a] = up
            health.up = sum(n for (_, known), n in self._up.items() if known == event.a)
        return health

    def _on_endpoint_up(self, event: Event) -> None:
        health = self._endpoint(event, event.b)
        health.reason = ""
        name = self._endpoint_name(event.a)
        self._log.limited("info", f"up {event.a}", "endpoint up", endpoint=name, up=health.up)

    def _on_endpoint_down(self, event: Event) -> None:
        reason = CLOSE_REASONS[event.data[0]] if event.data else ""
        if event.c:
            reason = errno.errorcode.get(event.c, str(event.c)) + " " + reason
        known = self.health.get(event.a)
        news = known is None or known.up > 0 or known.reason != reason
        health = self._endpoint(event, event.b)
        health.reason = reason
        if not news:
            return  # one more attempt that failed as the one before did: the counters have it
        self._log.limited(
            "warning",
            f"down {event.a}",
            "endpoint down",
            endpoint=self._endpoint_name(event.a),
            up=health.up,
            reason=reason.strip(),
        )

    def _on_ejected(self, event: Event) -> None:
        self._endpoint(event).ejected = True
        name = self._endpoint_name(event.a)
        self._log.limited(
            "warning", f"ejected {event.a}", "endpoint ejected", endpoint=name, for_ms=event.b
        )

    def _on_restored(self, event: Event) -> None:
        self._endpoint(event).ejected = False
        name = self._endpoint_name(event.a)
        self._log.limited("info", f"restored {event.a}", "endpoint restored", endpoint=name)

    def _on_closed(self, event: Event) -> None:
        reason = CLOSE_REASONS[event.c] if event.c < len(CLOSE_REASONS) else str(event.c)
        peer, _, first_hex = event.data.partition(b" ")
        fields: dict[str, Any] = {
            "listener": self._listener_name(event.b),
            "reason": reason,
            "peer": peer,
        }
        try:
            first = bytes.fromhex(first_hex.decode("ascii"))
        except ValueError:
            first = first_hex
        if first:
            fields["first"] = escape_remote(first[:16])
            if reason == "malformed" and (seems := guess_protocol(first)):
                fields["seems"] = seems
        self._log.limited("warning", f"closed {reason}", "connection closed", **fields)

    def _on_refused(self, event: Event) -> None:
        self._log.limited(
            "warning",
            f"refused {event.c}",
            "connection refused: " + ("memory_bytes_max" if event.c else "connections_max"),
            listener=self._listener_name(event.a),
            open=event.b,
        )

    def _on_accept_paused(self, event: Event) -> None:
        self._log.limited(
            "warning",
            "accept paused",
            "accepting paused",
            listener=self._listener_name(event.a),
            errno=errno.errorcode.get(event.b, str(event.b)),
        )

    def _on_parked(self, event: Event) -> None:
        # Nobody here has an opinion on frames yet: what was parked goes where its rule says.
        self._verdict(event.a, RULE_CLUSTER)

    def _on_sample(self, event: Event) -> None:
        self.samples.append(unpack_sample(event))

    def _on_stall(self, event: Event) -> None:
        self.stalls += 1
        self._log.limited(
            "error", "stall", "engine thread stalls", thread=event.thread, turn_ms=event.a
        )

    def _on_drained(self, event: Event) -> None:
        self._drained(event.thread)

    def _on_stopped(self, event: Event) -> None:
        self._log.debug("engine thread ended", thread=event.thread)
