"""A disk that a test can stop, and break, under a store."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterator

import pytest

from fastmesh.mesh.persist import GenerationStore


class Disk:
    """Between a store and its files; `saves` are the payloads that were asked for."""

    def __init__(self, store: GenerationStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.saves: list[bytes] = []
        self.error = 0
        """The errno that every save ends with; 0 = none."""
        self._held = False
        self._entered = threading.Semaphore(0)
        self._go_on = threading.Semaphore(0)
        self._save = store.save
        monkeypatch.setattr(store, "save", self.save)

    def save(self, payload: bytes) -> None:
        self.saves.append(payload)
        if self._held:
            self._entered.release()
            assert self._go_on.acquire(timeout=20)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self._save(payload)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Saves that begin inside wait until the end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._go_on.release(100)

    async def entered(self) -> None:
        """Until one more save is held."""
        assert await asyncio.to_thread(self._entered.acquire, timeout=20)
