"""Structured logs: one line per event, rate limited per cause, remote bytes escaped and truncated.

A line is `2026-01-31T12:00:00.123Z info ready listeners=1` or the same as one JSON object. Values
are escaped here and nowhere else, so that no caller can forget it.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable

from fastmesh import limits

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.,:/@*+-[]{}%<>")

Value = str | bytes | int | float | bool | None


def escape(value: str | bytes, most: int = limits.LOG_VALUE_CHARS_MAX) -> str:
    """Printable text on one line: control characters, ANSI, bidi marks and non-ASCII bytes as \\x..
    or \\u...."""
    extra = len(value) - most
    if isinstance(value, bytes):
        text = value[:most].decode("latin-1")
        safe = "".join(
            c if " " <= c <= "~" and c not in '\\"' else f"\\x{ord(c):02x}" for c in text
        )
    else:
        safe = "".join(_escape_char(c) for c in value[:most])
    return f"{safe}...(+{extra})" if extra > 0 else safe


def _escape_char(char: str) -> str:
    if char in '\\"':
        return "\\" + char
    if char.isprintable():
        return char
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def escape_remote(data: bytes) -> str:
    """What a peer sent, as far as it is ever shown."""
    return escape(data, limits.REMOTE_BYTES_SHOWN_MAX)


class Log:
    """Writes lines to a descriptor. Only one thread may use it. Never raises, never waits for a
    full pipe twice."""

    def __init__(
        self,
        *,
        form: str = "text",
        level: str = "info",
        fd: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._form = form
        self._level = LEVELS[level]
        self._fd = fd
        self._clock = clock
        self._buckets: dict[str, list[float]] = {}  # cause -> [window start, lines, suppressed]
        self.lines_lost = 0
        self._inherited = 0

    def save(self) -> dict[str, int]:
        """What a successor goes on counting."""
        return {"lines_lost": self.lines_lost}

    def restore(self, data: object) -> None:
        """Count on from there, with what was lost here so far. Twice is as the second time alone.
        Raises HandoverError."""
        # Imported only where there is something to restore.
        from fastmesh import saved

        found = saved.read(data, dict[str, saved.Count], "log")
        before, self._inherited = self._inherited, found.get("lines_lost", 0)
        self.lines_lost += self._inherited - before

    def configure(self, *, form: str, level: str) -> None:
        self._form = form
        self._level = LEVELS[level]

    def debug(self, event: str, **fields: Value) -> None:
        self._emit("debug", event, fields)

    def info(self, event: str, **fields: Value) -> None:
        self._emit("info", event, fields)

    def warning(self, event: str, **fields: Value) -> None:
        self._emit("warning", event, fields)

    def error(self, event: str, **fields: Value) -> None:
        self._emit("error", event, fields)

    def limited(self, level: str, cause: str, event: str, **fields: Value) -> None:
        """A line of a cause of which there may be many: at most LOG_LINES_PER_S a second."""
        if LEVELS[level] < self._level:
            return
        now = self._clock()
        if cause not in self._buckets and len(self._buckets) >= limits.LOG_CAUSES_MAX:
            cause = "__other__"
        bucket = self._buckets.setdefault(cause, [now, 0, 0])
        if now - bucket[0] >= 1.0:
            bucket[0], bucket[1] = now, 0
        if bucket[1] >= limits.LOG_LINES_PER_S:
            bucket[2] += 1
            return
        bucket[1] += 1
        if bucket[2]:
            fields["suppressed"] = int(bucket[2])
            bucket[2] = 0
        self._emit(level, event, fields)

    def flush(self) -> None:
        """Say what was held back and not said since. Call about once a second."""
        now = self._clock()
        for cause, bucket in list(self._buckets.items()):
            if now - bucket[0] < 1.0:
                continue
            if bucket[2]:
                self._emit("warning", "lines suppressed", {"cause": cause, "count": int(bucket[2])})
            del self._buckets[cause]

    def _emit(self, level: str, event: str, fields: dict[str, Value]) -> None:
        if LEVELS[level] < self._level:
            return
        now = datetime.datetime.now(datetime.UTC)
        stamp = now.strftime("%Y-%m-%dT%H:%M:%S.") + f"{now.microsecond // 1000:03d}Z"
        if self._form == "json":
            line = _json_line(stamp, level, event, fields)
        else:
            parts = [stamp, level, escape(event)]
            parts += [f"{key}={_text_value(value)}" for key, value in fields.items()]
            line = " ".join(parts).encode("utf-8", "replace")
        try:
            os.write(self._fd, line + b"\n")
        except OSError:  # a closed or full pipe must not stop a mesh
            self.lines_lost += 1


def _text_value(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, (str, bytes)):
        return str(value)
    safe = escape(value)
    return safe if safe and _PLAIN.issuperset(safe) else f'"{safe}"'


def _json_line(stamp: str, level: str, event: str, fields: dict[str, Value]) -> bytes:
    import msgspec

    record: dict[str, Value] = {"time": stamp, "level": level, "event": escape(event)}
    for key, value in fields.items():
        record[key] = escape(value) if isinstance(value, (str, bytes)) else value
    return msgspec.json.encode(record)
