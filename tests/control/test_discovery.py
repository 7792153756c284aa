"""Names to addresses: the last good answer is kept, and nobody waits for a dead resolver."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from fastmesh import config
from fastmesh.address import Address
from fastmesh.control.discovery import Discovery
from fastmesh.errors import HandoverError
from tests.conftest import SMALL, LogLines

NAMED = config.parse(
    SMALL.replace('"127.0.0.1:12201"', '"orders.example:12201"').encode(), base="/b"
)
ORDERS = Address("orders.example", 12201)


class Resolver:
    def __init__(self) -> None:
        self.answer: list[str] | None = ["10.0.0.2", "10.0.0.1"]
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        await self.gate.wait()
        if self.answer is None:
            raise OSError("no such name")
        return self.answer


def test_learning_changing_and_keeping(log_lines: LogLines) -> None:
    async def main() -> None:
        resolver = Resolver()
        discovery = Discovery(log_lines.log, resolver)
        assert discovery.addresses(Address("127.0.0.1", 1)) == (Address("127.0.0.1", 1),)
        assert discovery.addresses(ORDERS) == ()
        await discovery.learn(NAMED)
        both = (Address("10.0.0.1", 12201), Address("10.0.0.2", 12201))
        assert discovery.addresses(ORDERS) == both
        # A known name is not asked for again when a reload learns.
        await discovery.learn(NAMED)
        assert resolver.asked == ["orders.example"]
        resolver.answer = ["10.0.0.1", "10.0.0.2"]
        assert not await discovery.refresh(NAMED), "a rotated answer is not a change"
        resolver.answer = None
        assert not await discovery.refresh(NAMED)
        assert discovery.addresses(ORDERS) == both, "the last good answer is kept"
        resolver.answer = ["10.0.0.3"]
        assert await discovery.refresh(NAMED)
        assert discovery.addresses(ORDERS) == (Address("10.0.0.3", 12201),)

    asyncio.run(main())
    assert "name not resolved host=orders.example" in log_lines.text()


def test_a_resolver_that_hangs_delays_nobody_and_is_listened_to_later(log_lines: LogLines) -> None:
    async def main() -> None:
        resolver = Resolver()
        resolver.gate.clear()
        discovery = Discovery(log_lines.log, resolver)
        await asyncio.wait_for(discovery.learn(NAMED, timeout_s=0.01), 1)
        assert discovery.addresses(ORDERS) == ()
        await discovery.refresh(NAMED, timeout_s=0.01)
        assert resolver.asked == ["orders.example"], "one question at a time and name"
        resolver.gate.set()
        assert await discovery.refresh(NAMED)
        assert len(discovery.addresses(ORDERS)) == 2
        discovery.close()

    asyncio.run(main())


def test_names_no_longer_used_are_forgotten(log_lines: LogLines) -> None:
    async def main() -> None:
        discovery = Discovery(log_lines.log, Resolver())
        await discovery.learn(NAMED)
        await discovery.refresh(config.parse(SMALL.encode(), base="/b"))
        assert discovery.addresses(ORDERS) == ()

    asyncio.run(main())


def test_a_successor_asks_nobody_for_what_is_known(log_lines: LogLines) -> None:
    async def main() -> None:
        before = Discovery(log_lines.log, Resolver())
        await before.learn(NAMED)
        resolver = Resolver()
        after = Discovery(log_lines.log, resolver)
        after.restore(msgspec.Raw(msgspec.json.encode(before.save())))
        assert after.addresses(ORDERS) == before.addresses(ORDERS)
        await after.learn(NAMED)
        assert not resolver.asked
        resolver.answer = ["10.0.0.9"]
        assert await after.refresh(NAMED), "later it is asked as ever"
        assert after.addresses(ORDERS) == (Address("10.0.0.9", 12201),)

    asyncio.run(main())


@pytest.mark.parametrize(
    "data",
    [
        {"known": {"a": ["10.0.0.1; drop"]}},
        {"known": {"a": [""]}},
        {"known": {"a": ["10.0.0.1"] * 1000}},
        {"known": {"a": "10.0.0.1"}},
        {"known": []},
        [],
    ],
)
def test_addresses_that_are_none_are_refused(log_lines: LogLines, data: object) -> None:
    discovery = Discovery(log_lines.log, Resolver())
    with pytest.raises(HandoverError):
        discovery.restore(data)
    assert discovery.save().known == {}
