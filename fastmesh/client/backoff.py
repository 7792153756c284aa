"""Delays that grow and differ, so that a thousand clients do not come back at once."""

from __future__ import annotations

import random

from fastmesh import limits


class Backoff:
    """Doubles from CLIENT_BACKOFF_MS to CLIENT_BACKOFF_MS_MAX; each delay is drawn from its upper
    half, so that it never is too short and never the same everywhere."""

    def __init__(self, draw: random.Random | None = None) -> None:
        self._draw = draw or random.Random()
        self._next_ms = limits.CLIENT_BACKOFF_MS

    def next_s(self) -> float:
        most_ms = self._next_ms
        self._next_ms = min(2 * most_ms, limits.CLIENT_BACKOFF_MS_MAX)
        return self._draw.uniform(most_ms / 2, most_ms) / 1000

    def reset(self) -> None:
        self._next_ms = limits.CLIENT_BACKOFF_MS
