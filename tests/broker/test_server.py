"""The broker on real sockets, the real engine and a real disk; and as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from fastmesh._ext.push import request
from fastmesh.address import parse_address
from fastmesh.broker.model import Options
from fastmesh.broker.server import Broker, Settings
from fastmesh.broker.store import Batch, StoreError, StoreFullError
from fastmesh.config import Admin
from tests.broker.client import WAIT_S, Client
from tests.conftest import LogLines

ANYWHERE = parse_address("127.0.0.1:0", port_min=0)
Start = Callable[..., contextlib.AbstractAsyncContextManager[Broker]]


async def eventually(look: Callable[[], Any]) -> Any:
    async with asyncio.timeout(WAIT_S):
        while not (found := look()):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return found


@pytest.fixture
def start(tmp_path: Path, log_lines: LogLines) -> Start:
    @contextlib.asynccontextmanager
    async def run(**options: Any) -> AsyncIterator[Broker]:
        settings = Settings(ANYWHERE, Admin(ANYWHERE), str(tmp_path / "data"), Options(**options))
        broker = Broker(settings, log_lines.log)
        await broker.start()
        try:
            yield broker
        finally:
            if broker.state != "stopping":
                await broker.stop()

    return run


async def call(broker: Broker, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.admin_address.port)
    data = b"" if body is None else json.dumps(body).encode()
    writer.write(
        f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-length: {len(data)}\r\n\r\n".encode()
        + data
    )
    head, _, found = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    status = int(head.split()[1])
    return status, json.loads(found) if b"application/json" in head else found.decode()


async def test_publish_deliver_consume(start: Start) -> None:
    async with start() as broker:
        producer = await Client.open(broker.address)
        consumer = await Client.open(broker.address)
        await consumer.announce()
        answer = await producer.publish("m1", b"hello", key="k")
        assert answer == {"fm.result": "consumed", "fm.id": "m1", "fm.broker": "b1"}
        push = await consumer.request()
        assert push.content == b"hello"
        assert push.headers["fm.op"] == "deliver"
        consumer.answer(push)
        group = broker.core.groups["g"]
        await eventually(lambda: broker.core.lag(group) == 0)
        assert (group.delivered, group.consumed) == (1, 1)


async def test_what_comes_at_once_is_written_at_once(start: Start) -> None:
    async with start() as broker:
        producer = await Client.open(broker.address)
        consumer = await Client.open(broker.address)
        await consumer.announce(prefetch=50)
        answers = [producer.send_publish(f"m{n}") for n in range(1000)]
        found = await consumer.consume(1000)
        assert sorted(found) == sorted(f"m{n}" for n in range(1000))
        results = {(await answer).headers["fm.result"] for answer in answers}
        assert results == {"consumed"}
        assert sum(broker.commits.buckets[True]) < 100


async def test_what_was_acknowledged_is_there_after_a_restart(start: Start) -> None:
    async with start() as broker:
        producer = await Client.open(broker.address)
        for n in range(20):
            await producer.publish(f"m{n}")
    async with start() as broker:
        consumer = await Client.open(broker.address)
        await consumer.announce()
        assert sorted(await consumer.consume(20)) == sorted(f"m{n}" for n in range(20))
    async with start() as broker:
        consumer = await Client.open(broker.address)
        await consumer.announce()
        await (await Client.open(broker.address)).publish("last")
        assert await consumer.consume(1) == ["last"]


async def test_consumed_messages_are_let_go_of(start: Start) -> None:
    """More than goes in one piece, without a pause of a second in between."""
    async with start(keep_ms=0, queues=1) as broker:
        producer = await Client.open(broker.address)
        consumer = await Client.open(broker.address)
        await consumer.announce(prefetch=1000)
        for n in range(3000):
            producer.send_publish(f"m{n}")
        await consumer.consume(3000)
        queue = broker.core.topics["orders"].queues[0]
        await eventually(lambda: queue.first == queue.end == 3000)
        assert broker.store.read(broker.core.topics["orders"].id, 0, 0, 10, 1 << 20) == []


async def test_no_answer_in_time_is_redelivered(start: Start) -> None:
    async with start(answer_timeout_ms=150, redeliver_ms=(20,)) as broker:
        consumer = await Client.open(broker.address)
        await consumer.announce()
        await (await Client.open(broker.address)).publish("m1")
        attempts = [(await consumer.request()).headers["fm.attempt"] for _ in range(2)]
        assert attempts == ["1", "2"]


async def test_a_connection_that_breaks_is_redelivered_elsewhere(start: Start) -> None:
    async with start(redeliver_ms=(20,)) as broker:
        first = await Client.open(broker.address)
        await first.announce()
        producer = await Client.open(broker.address)
        for n in range(5):
            await producer.publish(f"m{n}")
        for _ in range(5):
            await first.request()
        first.abort()
        second = await Client.open(broker.address)
        await second.announce()
        assert sorted(await second.consume(5)) == [f"m{n}" for n in range(5)]
        assert broker.core.groups["g"].redelivered == 5


async def test_large_messages(start: Start) -> None:
    """More than the rings hold at a time, in both directions."""
    async with start() as broker:
        producer = await Client.open(broker.address)
        content = os.urandom(3 << 20)
        answers = [producer.send_publish(f"m{n}", content) for n in range(12)]
        results = [(await answer).headers["fm.result"] for answer in answers]
        assert set(results) <= {"consumed", "later"}
        stored = results.count("consumed")
        assert stored
        consumer = await Client.open(broker.address)
        await consumer.announce(prefetch=12)
        for _ in range(stored):
            push = await consumer.request()
            assert push.content == content
            consumer.answer(push)


async def test_a_frame_over_the_bound_ends_its_connection(start: Start) -> None:
    async with start() as broker:
        client = await Client.open(broker.address)
        assert (await client.publish("m1", bytes(5 << 20)))["fm.result"] == "reject"
        with pytest.raises((ConnectionError, TimeoutError)):
            await client.publish("m1", bytes(5 << 20))
        assert await (await Client.open(broker.address)).publish("m2")


async def test_another_class_is_refused(start: Start) -> None:
    async with start() as broker:
        client = await Client.open(broker.address)
        frame = request(77, {"fm.op": "hello"})
        waiting = asyncio.get_running_loop().create_future()
        client._waiting[77] = waiting
        client.writer.write(frame.replace(b"fastmesh.push.v1", b"com.example.Foo1"))
        assert (await asyncio.wait_for(waiting, WAIT_S)).headers["fm.result"] == "reject"


@pytest.mark.parametrize("dialect", [0, 1, 2])
async def test_headers_that_cannot_be_read_are_refused(start: Start, dialect: int) -> None:
    async with start() as broker:
        client = await Client.open(broker.address)
        frame = request(78, {"fm.op": "hello", "key": "va\x00\x00"}, dialect=dialect)
        waiting = asyncio.get_running_loop().create_future()
        client._waiting[78] = waiting
        client.writer.write(frame.replace(b"va\x00\x00", b"va\xff\xff"))  # not UTF-8
        assert (await asyncio.wait_for(waiting, WAIT_S)).headers["fm.result"] == "reject"
        assert (await client.publish("m1"))["fm.result"] == "consumed"


async def test_disk_full_is_told_and_passes(start: Start, log_lines: LogLines) -> None:
    async with start() as broker:
        producer = await Client.open(broker.address)
        await producer.publish("m0")
        commit = broker.store.commit

        def full(batch: Batch) -> float:
            raise StoreFullError("the store cannot be written: disk full")

        broker.store.commit = full  # type: ignore[method-assign]
        answer = await producer.publish("m1")
        assert (answer["fm.result"], answer["fm.reason"]) == ("later", "disk full")
        broker.store.commit = commit  # type: ignore[method-assign]
        for _ in range(100):
            answer = await producer.publish("m1")
            if answer["fm.result"] == "consumed":
                break
            await asyncio.sleep(int(answer["fm.retry_ms"]) / 1000)
        assert answer["fm.result"] == "consumed"
        assert "store not written" in log_lines.text()


async def test_a_really_full_store(start: Start) -> None:
    async with start() as broker:
        producer = await Client.open(broker.address)
        await producer.publish("m0")
        base = broker.store._writer
        pages = base.execute("PRAGMA page_count").fetchone()[0]
        base.execute(f"PRAGMA max_page_count={pages + 10}")
        answers = [await producer.publish(f"m{n}", bytes(8000)) for n in range(1, 20)]
        assert answers[-1]["fm.result"] == "later"
        stored = sum(answer["fm.result"] == "consumed" for answer in answers) + 1
        consumer = await Client.open(broker.address)
        # A new group needs room too: it waits for it rather than being told what does not hold.
        base.execute(f"PRAGMA max_page_count={pages + 10_000}")
        await consumer.announce()
        assert len(await consumer.consume(stored)) == stored


async def test_a_broken_store_stops_the_broker(start: Start) -> None:
    async with start() as broker:
        producer = await Client.open(broker.address)
        serving = asyncio.ensure_future(broker.run_until_stopped())

        def broken(batch: Batch) -> float:
            raise StoreError("--data x: malformed")

        broker.store.commit = broken  # type: ignore[method-assign]
        assert (await producer.publish("m1"))["fm.result"] == "later"
        with pytest.raises(StoreError, match="malformed"):
            await asyncio.wait_for(serving, WAIT_S)


@pytest.mark.parametrize("where", ["size_bytes", "delayed_due"])
async def test_a_store_that_cannot_be_read_stops_the_broker(start: Start, where: str) -> None:
    """Half a turn leaves deliveries and credit that nobody counts: better an end that is seen."""
    async with start() as broker:
        producer = await Client.open(broker.address)
        await producer.publish("m0")
        serving = asyncio.ensure_future(broker.run_until_stopped())

        def broken(*arguments: object) -> int:
            raise sqlite3.OperationalError("disk I/O error")

        setattr(broker.store, where, broken)
        producer.send_publish("m1", delay_ms="1")
        with pytest.raises(StoreError, match="disk I/O error"):
            await asyncio.wait_for(serving, WAIT_S)


async def test_stop_waits_for_answers_and_says_goaway(start: Start) -> None:
    async with start() as broker:
        consumer = await Client.open(broker.address)
        await consumer.announce(prefetch=1)
        producer = await Client.open(broker.address)
        await producer.publish("m1")
        await producer.publish("m2")
        push = await consumer.request()
        stopping = asyncio.ensure_future(broker.stop())
        await asyncio.wait_for(consumer.goaway.wait(), WAIT_S)
        assert (await producer.publish("m3"))["fm.reason"] == "stopping"
        assert not stopping.done()
        consumer.answer(push)
        await asyncio.wait_for(stopping, WAIT_S)
        assert consumer.requests.empty()
    async with start() as broker:
        consumer = await Client.open(broker.address)
        await consumer.announce()
        assert await consumer.consume(1) == ["m2"]  # and m1 is done with
        assert broker.core.groups["g"].delivered == 1


async def test_admin_shows_depth_and_lag(start: Start) -> None:
    async with start() as broker:
        producer = await Client.open(broker.address)
        consumer = await Client.open(broker.address, "node-7")
        await consumer.announce(prefetch=2)
        for n in range(5):
            await producer.publish(f"m{n}")
        await consumer.request()
        assert (await call(broker, "GET", "/readyz"))[0] == 200
        _, status = await call(broker, "GET", "/v1/status")
        assert (status["broker"], status["in_flight"], status["state"]) == ("b1", 2, "serving")
        assert "node-7" in [session["client"] for session in status["sessions"]]
        _, topics = await call(broker, "GET", "/v1/topics")
        (topic,) = topics["topics"]
        assert (topic["name"], topic["depth"], topic["groups"]) == ("orders", 5, ["g"])
        _, groups = await call(broker, "GET", "/v1/groups")
        (group,) = groups["groups"]
        assert (group["lag"], group["in_flight"], group["credit"]) == (5, 2, 2)
        _, text = await call(broker, "GET", "/metrics")
        for line in (
            'fastmesh_broker_topic_depth{topic="orders"} 5',
            'fastmesh_broker_group_lag{group="g"} 5',
            'fastmesh_broker_group_in_flight{group="g"} 2',
            "fastmesh_broker_sessions 2",
        ):
            assert line + "\n" in text
        assert 'fastmesh_broker_commit_seconds_count{sync="true"}' in text


async def test_metrics_are_well_formed(start: Start) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    async with start() as broker:
        await (await Client.open(broker.address)).publish("m1", topic="%DLQ%a:b@c")
        _, text = await call(broker, "GET", "/metrics")
        families = {family.name: family for family in text_string_to_metric_families(text)}
        (sample,) = families["fastmesh_broker_topic_depth"].samples
        assert (sample.labels, sample.value) == ({"topic": "orders"}, 1.0) or sample.value == 1.0
        assert families["fastmesh_broker_commit_seconds"].type == "histogram"


async def test_admin_moves_groups(start: Start) -> None:
    async with start() as broker:
        producer = await Client.open(broker.address)
        consumer = await Client.open(broker.address)
        await consumer.announce("a/b")
        path = "/v1/groups/a%2Fb"
        for n in range(3):
            await producer.publish(f"m{n}")
        assert len(await consumer.consume(3)) == 3
        assert await call(broker, "POST", f"{path}/suspend") == (
            200,
            {"group": "a/b", "suspended": True},
        )
        status, found = await call(broker, "POST", f"{path}/reset", {"offset": "first"})
        assert status == 200
        assert set(found["positions"].values()) == {0}
        assert consumer.requests.empty()
        assert (await call(broker, "POST", f"{path}/resume"))[0] == 200
        assert len(await consumer.consume(3)) == 3
        later = broker.now_ms() + 60_000
        assert (await call(broker, "POST", f"{path}/reset", {"time_ms": later}))[0] == 200
        assert (await call(broker, "GET", path))[1]["lag"] == 0
        assert (await call(broker, "DELETE", path))[0] == 409
        await consumer.close()
        await eventually(lambda: not broker.core.groups["a/b"].cursors[0].links)
        assert (await call(broker, "DELETE", path))[0] == 200
        assert (await call(broker, "GET", path))[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/nothing", None, 404),
        ("POST", "/v1/groups", None, 405),
        ("POST", "/v1/groups/nobody/suspend", None, 404),
        ("POST", "/v1/groups/g/dance", None, 404),
        ("GET", "/v1/groups/g/suspend", None, 405),
        ("POST", "/v1/groups/g/reset", {}, 422),
        ("POST", "/v1/groups/g/reset", {"time_ms": 1, "offset": "first"}, 422),
        ("POST", "/v1/groups/g/reset", {"offset": "middle"}, 422),
        ("POST", "/v1/groups/g/reset", {"time": 1}, 422),
    ],
)
async def test_admin_refuses(start: Start, method: str, path: str, body: Any, status: int) -> None:
    async with start() as broker:
        await (await Client.open(broker.address)).announce()
        found, answer = await call(broker, method, path, body)
        assert found == status
        assert answer["error"]


# --- as a process ---------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastmesh", "broker", *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


LOCAL = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--listen", "nowhere"), "'--listen': 'nowhere' must be"),
        (("--redeliver", "1s,5x"), "'--redeliver': '5x' is no time"),
        (("--redeliver", ""), "'--redeliver': '' is no time"),
        (("--max-attempts", "0"), "'--max-attempts': 0 is not in the range"),
        (("--sync", "maybe"), "'--sync': 'maybe' is not one of"),
        (("--topic", "orders"), "--topic orders: must be NAME=sync or NAME=async"),
        (("--name", "a b"), "--name a b: must be"),
        (("--admin", "192.0.2.1:7072"), "needs --admin-token-file"),
        (("--answer-timeout", "1ms"), "'--answer-timeout': '1ms' is not within"),
    ],
)
def test_wrong_usage_names_flag_and_value(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    found = run(*LOCAL, "--data", str(tmp_path / "data"), *arguments)
    assert found.returncode == 2
    assert said in " ".join(found.stderr.split())
    assert not (tmp_path / "data").exists()


def test_a_process_and_its_directory(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    with subprocess.Popen(
        [sys.executable, "-m", "fastmesh", "broker", *LOCAL, "--data", data],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            assert " ready " in process.stderr.readline()
            second = run(*LOCAL, "--data", data)
            assert second.returncode == 75
            assert f"--data {data}: is in use by process {process.pid}" in second.stderr
        finally:
            process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(10) == 0
    assert "stopped" in rest
    other = tmp_path / "letters"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    found = run(*LOCAL, "--data", str(other))
    assert found.returncode == 1
    assert "mine.txt" in found.stderr


def test_a_mesh_does_not_pay_for_it() -> None:
    code = (
        "import sys, fastmesh.app, fastmesh.cli;"
        "print([m for m in sys.modules if m == 'sqlite3' or m.startswith('fastmesh.broker')])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True
    )
    assert found.stdout.strip() == "[]"
