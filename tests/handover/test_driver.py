"""What a peer that has gone left behind is heard, in its order, before its end is."""

from __future__ import annotations

import asyncio
import socket

from fastmesh.handover import wire
from fastmesh.handover.driver import Driver
from fastmesh.handover.states import Machine
from fastmesh.observe.log import Log


def test_records_of_one_who_went_with_something_unread_come_before_its_end() -> None:
    async def run() -> None:
        heard: list[wire.Record] = []
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here.setblocking(False)
        driver = Driver(
            Machine("taker"),
            Log(level="error"),
            actions={},
            heard=lambda record, descriptors: heard.append(record),
        )
        driver.attach(here)
        here.send(wire.encode(wire.Acked(0, 1)))  # never read: the kernel answers with a reset
        left: list[wire.Record] = [wire.Conns(0, 0, 1), wire.End(1, 1, 10, "0" * 64), wire.Commit()]
        for record in left:
            there.send(wire.encode(record))
        there.close()
        found = [driver._next() for _ in range(5)]
        assert heard == left
        assert found == [("CONNS", ""), ("END", ""), ("COMMIT", ""), ("eof", ""), None]
        driver.close()

    asyncio.run(run())


def test_an_acknowledgement_that_nobody_reads_any_more_is_no_failure() -> None:
    """EOF is found where it stands: behind what was sent before it."""

    async def run() -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here.setblocking(False)

        def keep() -> None:
            here.send(wire.encode(wire.Acked(0, 1)))

        driver = Driver(
            Machine("taker"),
            Log(level="error"),
            actions={"keep": keep},
            heard=lambda record, descriptors: None,
        )
        driver.attach(here)
        there.send(wire.encode(wire.Commit()))
        there.close()
        driver._at_once("keep")
        assert [driver._next() for _ in range(3)] == [("COMMIT", ""), ("eof", ""), None]
        driver.close()

    asyncio.run(run())
