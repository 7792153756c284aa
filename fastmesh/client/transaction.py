"""A message that is prepared first and then committed or rolled back, and what is remembered of it.

The broker holds a prepared message back. When it does not hear of its fate, because this process,
a connection or the broker died, it asks any client of the publisher group. A client that decided
it remembers; for every other message the group's check callback looks into the application's data.
"""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any, Protocol

from fastmesh import limits
from fastmesh.client.errors import AmbiguousError, ClientError, NotTakenError
from fastmesh.client.model import Fate, Receipt, Stats
from fastmesh.protocols import push as words

log = logging.getLogger("fastmesh.client")


class Fates:
    """What this client knows of its transactions, by message id."""

    def __init__(self, most: int = limits.CLIENT_DECISIONS_MAX) -> None:
        self._open: set[str] = set()
        self._decided: dict[str, Fate] = {}
        self._most = most

    def begin(self, id: str) -> None:
        self._open.add(id)

    def decide(self, id: str, fate: Fate) -> None:
        self._open.discard(id)
        self._decided[id] = fate
        if len(self._decided) > self._most:
            del self._decided[next(iter(self._decided))]

    def get(self, id: str) -> Fate | None:
        """None when it never was ours, or is long ago."""
        if id in self._open:
            return Fate.UNKNOWN
        return self._decided.get(id)


class Send(Protocol):
    """How a transaction publishes; see Publisher.send()."""

    def __call__(
        self, headers: Mapping[str, str], content: bytes, *, idempotent: bool
    ) -> Coroutine[Any, Any, Mapping[str, str]]: ...


class Transaction:
    """`async with`: prepared on entry, committed when the block ends, rolled back when it raises.

    The block is the local transaction: what it did must be durable when it ends, because a message
    is committed right after it. Entry raises NotTakenError, RejectedError or AmbiguousError, and
    the message will not be delivered then. The end raises AmbiguousError when the broker did not
    confirm the commit: the decision stands all the same, and the broker learns it by its check.
    """

    def __init__(
        self,
        send: Send,
        fates: Fates,
        headers: Mapping[str, str],
        content: bytes,
        *,
        idempotent: bool,
        stats: Stats,
    ) -> None:
        self._send = send
        self._fates = fates
        self._headers = dict(headers)
        self._content = content
        self._idempotent = idempotent
        self._stats = stats
        self._state = "new"
        self.id = headers[words.ID]
        """The id of the message: keep it with the application's data, for the check to find."""
        self.receipt: Receipt | None = None
        """The broker that holds it; from the entry on."""

    async def __aenter__(self) -> Transaction:
        if self._state != "new":
            raise RuntimeError(f"transaction {self.id} is {self._state}; each is entered once")
        self._fates.begin(self.id)
        headers = {**self._headers, words.TX: words.PREPARE}
        try:
            answer = await self._send(headers, self._content, idempotent=self._idempotent)
        except BaseException:
            # The block does not run, so whatever the broker holds is to be thrown away.
            self._decide(Fate.ROLLBACK)
            raise
        self.receipt = Receipt(self.id, answer.get(words.BROKER, ""))
        self._state = "prepared"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._state != "prepared":
            return
        if kind is None:
            await self.commit()
            return
        try:
            await self.rollback()
        except ClientError as failure:
            # What the block raised matters more; the broker's check will tell it.
            log.warning("the rollback of message %s was not confirmed: %s", self.id, failure)

    async def commit(self) -> None:
        """Before the block ends; the end then does nothing. Raises as the end does."""
        await self._tell(Fate.COMMIT)
        self._stats.published += 1

    async def rollback(self) -> None:
        """The same for giving it up."""
        await self._tell(Fate.ROLLBACK)

    async def _tell(self, fate: Fate) -> None:
        if self._state != "prepared":
            raise RuntimeError(f"transaction {self.id} is {self._state}, not prepared")
        assert self.receipt is not None
        # Decided before it is told: from now on a check gets this answer, whatever becomes of it.
        self._decide(fate)
        headers = {
            words.OP: words.PUBLISH,
            words.TOPIC: self._headers[words.TOPIC],
            words.GROUP: self._headers[words.GROUP],
            words.ID: self.id,
            words.BROKER: self.receipt.broker,
            words.TX: fate.value,
            words.IDEMPOTENT: "1",
        }
        try:
            await self._send(headers, b"", idempotent=True)
        except NotTakenError as error:
            told = f"the {fate.value} did not reach the broker ({error}); its check will"
            raise AmbiguousError(self.id, told) from error

    def _decide(self, fate: Fate) -> None:
        self._state = {Fate.COMMIT: "committed", Fate.ROLLBACK: "rolled back"}[fate]
        self._fates.decide(self.id, fate)
