"""C4, C5: registrations survive a kill at every system call, every error the kernel may give, and a
disk that fills up.

The system calls are those that the kernel really saw: strace records one save, and then kills the
process, or fails the call, at each of them in turn. Where ptrace is not allowed these tests fail:
a run without them would prove nothing and look like one that does.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastmesh.address import Address
from fastmesh.control.state_dir import StateDir
from fastmesh.mesh.durable import DurableRegistry
from fastmesh.mesh.persist import GenerationStore, Loaded
from fastmesh.mesh.registration import Registry, decode_state
from tests.admin.http import ask
from tests.chaos import saver
from tests.conftest import LogLines

pytestmark = pytest.mark.chaos

ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT")
SAVE_ERRORS = {getattr(errno, name) for name in (*ERRORS, "EFBIG")}
KILLED = -signal.SIGKILL
"""What strace ends with too: it dies of what its child died of."""
FILE_CALLS = (
    "open",
    "openat",
    "write",
    "fsync",
    "link",
    "linkat",
    "rename",
    "renameat",
    "renameat2",
)
"""Where the kernel may say one of ERRORS."""
OTHER_CALLS = ("unlink", "unlinkat", "close")
"""Where it may say some of them."""
PASSING = (
    "brk",
    "mmap",
    "munmap",
    "mprotect",
    "futex",
    "rt_sigaction",
    "rt_sigprocmask",
    "madvise",
)
"""Calls of the interpreter: killed at too, but failing them breaks Python, not the save."""


def document(client: str, group: str = "g") -> bytes:
    groups = [{"name": group, "topic": "orders", "role": "subscribe"}]
    return json.dumps({"app": "shop", "client": client, "groups": groups}).encode()


def state(*clients: str) -> bytes:
    registry = Registry()
    for client in clients:
        assert registry.register(document(client), 0).status == 201
    return registry.state()


OLDER, OLD, NEW = state("c1"), state("c1", "c2"), state("c1", "c2", "c3")


def load(path: Path) -> Loaded[bytes]:
    """What the next process finds: whole, and a state that the registry takes."""
    state_dir = StateDir(str(path))
    store = GenerationStore(state_dir, saver.NAME, saver.MOST)

    def accept(payload: bytes) -> bytes:
        Registry().restore(decode_state(payload), 0)
        return payload

    try:
        found = store.load(accept)
    finally:
        store.close()
        state_dir.close()
    assert set(os.listdir(path)) <= {"lock", *(f"{saver.NAME}.state{x}" for x in ("", ".previous"))}
    return found


# --- strace ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    name: str
    number: int
    """Which call of that name in the life of the process, from 1: what `when=` counts."""
    text: str


@dataclass(frozen=True)
class Ran:
    error: int
    """The errno of the save, 0 when it worked, KILLED."""
    log: str

    def calls(self) -> list[Call]:
        """What lies between the marks."""
        counts: dict[str, int] = {}
        found: list[Call] = []
        inside = False
        for line in self.log.splitlines():
            match = re.match(r"(?:\d+ +)?(\w+)\(", line)
            if match is None:
                continue
            name = match[1]
            counts[name] = counts.get(name, 0) + 1
            if '"END"' in line:
                inside = False
            if inside:
                found.append(Call(name, counts[name], line))
            if '"BEGIN"' in line:
                inside = True
        return found

    @property
    def reached(self) -> str:
        return "end" if '"END"' in self.log else "begin" if '"BEGIN"' in self.log else "nothing"


class Bench:
    """A directory with a state in it, and saves of NEW over it."""

    def __init__(self, folder: Path, generations: tuple[bytes, ...]) -> None:
        self.folder = folder
        self.path = folder / "run"
        self.generations = generations
        self.log = folder / "strace.log"
        self.payload = folder / "payload"
        self.payload.write_bytes(NEW)

    @property
    def before(self) -> bytes | None:
        return self.generations[-1] if self.generations else None

    def fresh(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        state_dir = StateDir(str(self.path))
        store = GenerationStore(state_dir, saver.NAME, saver.MOST)
        for generation in self.generations:
            store.save(generation)
        store.close()
        state_dir.close()

    def save(self, *inject: str, limit: int | None = None) -> Ran:
        """One save in a child, under strace with these options, or without it."""
        child = [
            sys.executable,
            "-S",
            "-E",
            "-B",
            saver.__file__,
            str(self.path),
            str(self.payload),
        ]
        if limit is not None:
            child.append(str(limit))
        tracer = ["strace", "-o", str(self.log), *inject] if inject else []
        self.log.write_text("")
        done = subprocess.run(
            [*tracer, *child],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            # The same system calls in every run.
            env={"PATH": os.environ["PATH"], "PYTHONHASHSEED": "0", "PYTHONNOUSERSITE": "1"},
        )
        assert done.returncode in (0, KILLED, *SAVE_ERRORS), (done.returncode, done.stderr)
        return Ran(done.returncode, self.log.read_text())

    def recorded(self) -> list[Call]:
        self.save("-e", "trace=all")  # whatever is written once (caches) is written now
        self.fresh()
        ran = self.save("-e", "trace=all")
        assert (ran.error, ran.reached) == (0, "end")
        return ran.calls()

    def inject(self, call: Call, what: str) -> Ran:
        """Break one call. Void unless it really was that call of the save."""
        self.fresh()
        ran = self.save("-e", f"trace={call.name},access", "-e", f"inject={call.name}:{what}")
        assert ran.reached != "nothing", f"void: not in the save\n{ran.log}"
        return ran


@pytest.fixture(params=["first save", "second save", "later save"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    if shutil.which("strace") is None:
        pytest.fail("strace is not installed: python -m perf.setup strace")
    tried = subprocess.run(
        ["strace", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode != 0:
        pytest.fail(
            "ptrace is not allowed here, so no system call can be broken"
            f" (in a container: --cap-add SYS_PTRACE): {tried.stderr.strip()}"
        )
    kinds = {"first save": (), "second save": (OLD,), "later save": (OLDER, OLD)}
    return Bench(tmp_path, kinds[request.param])


def test_c4_kill_at_every_system_call_of_a_save(bench: Bench) -> None:
    """Old, then new, and nothing else ever."""
    calls = bench.recorded()
    # A kill cannot show what the loss of power would: that rests on the order of these calls.
    order = [re.sub(r"at2?$", "", call.name) for call in calls if call.name not in PASSING]
    assert order == [
        *("unlink", "open", "write", "fsync", "close"),
        *(("unlink", "link") if bench.before is not None else ()),
        *("rename", "fsync"),
    ]
    found: list[Loaded[bytes]] = []
    for call in calls:
        ran = bench.inject(call, f"signal=SIGKILL:when={call.number}")
        assert ran.error == KILLED, f"void: alive\n{ran.log}"
        assert ran.reached == "begin", f"void: killed after the save\n{ran.log}"
        found.append(load(bench.path))
        assert found[-1].value in (bench.before, NEW), call.text
        assert not found[-1].problems, "the newest is whole at every instant"
        # And the next process saves as if nothing had been.
        assert bench.save().error == 0
        assert load(bench.path) == Loaded(NEW, "newest", (), len(NEW))
    values = [one.value for one in found]
    assert values[0] == bench.before
    assert values[-1] == NEW, "killed at the last call, which only makes it durable"
    assert values == sorted(values, key=lambda value: value == NEW), "once new, always new"


@pytest.mark.parametrize("error", ERRORS)
def test_c4_an_error_of_every_system_call_of_a_save(bench: Bench, error: str) -> None:
    calls = [c for c in bench.recorded() if c.name not in PASSING]
    assert {c.name for c in calls} <= {*FILE_CALLS, *OTHER_CALLS}, "say what these are"
    renamed = max(i for i, call in enumerate(calls) if call.name.startswith("rename"))
    reported = 0
    for place, call in enumerate(calls):
        # Once, and from then on: also what cleans up fails.
        for when in (f"{call.number}", f"{call.number}+"):
            ran = bench.inject(call, f"error={error}:when={when}")
            assert "(INJECTED)" in ran.log, f"void: nothing was broken\n{ran.log}"
            found = load(bench.path)
            failed = ran.error != 0
            reported += failed
            assert ran.error in (0, getattr(errno, error))
            # Only the sync of the directory comes after the new state is in its place.
            expected = NEW if not failed or place > renamed else bench.before
            assert found.value == expected, f"{call.text} {when}: {found}"
            assert not found.problems
            assert failed or call.name not in FILE_CALLS, f"{call.text}: not told"
            assert bench.save().error == 0, "the next save recovers"
            assert load(bench.path) == Loaded(NEW, "newest", (), len(NEW))
    assert reported >= 10


# --- disks that are really full -------------------------------------------------------------------


def test_c4_a_file_size_limit_at_every_byte(tmp_path: Path) -> None:
    """A write that ends half-way, for real: RLIMIT_FSIZE."""
    bench = Bench(tmp_path, (OLD,))
    size = len(NEW) + 52
    for limit in (0, 1, 51, 52, 53, size // 2, size - 1):
        bench.fresh()
        ran = bench.save(limit=limit)
        assert ran.error == errno.EFBIG, limit
        assert load(bench.path) == Loaded(OLD, "newest", (), len(OLD))
    assert bench.save(limit=size).error == 0
    assert load(bench.path).value == NEW


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(path)]
    mount = shutil.which("mount")
    done = subprocess.run(command, capture_output=True, text=True, check=False) if mount else None
    if done is None or done.returncode != 0:
        reason = done.stderr.strip() if done else "no mount"
        pytest.skip(f"may not mount a tmpfs ({reason}); RLIMIT_FSIZE stands in for it above")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.asynccontextmanager
async def durable_in(path: Path, lines: LogLines) -> AsyncIterator[DurableRegistry]:
    state_dir = StateDir(str(path))
    durable = DurableRegistry(state_dir, lines.log)
    durable.load()
    durable.start()
    try:
        yield durable
    finally:
        await durable.close()
        state_dir.close()


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 512)


async def test_c4_a_full_disk(tiny_disk: Path, log_lines: LogLines) -> None:
    filler = tiny_disk / "filler"
    async with durable_in(tiny_disk / "run", log_lines) as durable:
        assert (await durable.register(document("c1"))).status == 201
        fill(filler)
        for number in range(5):
            refused = await durable.register(document(f"x{number}"))
            assert refused.status == 507
            assert "free some space" in refused.body["error"]
        assert (await durable.register(document("c1"))).status == 200, "renewals go on"
        assert [c.registration.client for c in durable.registry.clients()] == ["c1"]
        assert load_beside(tiny_disk / "run") == ["c1"]
        await asyncio.to_thread(filler.unlink)
        assert (await durable.register(document("c2"))).status == 201
    async with durable_in(tiny_disk / "run", log_lines) as durable:
        assert [c.registration.client for c in durable.registry.clients()] == ["c1", "c2"]


def load_beside(path: Path) -> list[str]:
    """What is on disk while its owner lives: read from a copy, because the directory is held."""
    copy = path.parent.parent / "copy"
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns("lock"))
    found = load(copy).value
    shutil.rmtree(copy)
    return [r.client for r in decode_state(found or b"")]


# --- a process that is killed while it registers --------------------------------------------------


SERVE = """
import asyncio, sys
from types import SimpleNamespace
from fastmesh.address import Address
from fastmesh.control.listeners import bind
from fastmesh.control.state_dir import StateDir
from fastmesh.mesh.durable import DurableRegistry
from fastmesh.mesh.registration_http import RegistrationServer
from fastmesh.observe.log import Log

async def main():
    durable = DurableRegistry(StateDir(sys.argv[1]), Log())
    durable.load()
    durable.start()
    at = Address(path=sys.argv[2])
    section = SimpleNamespace(listen=at, token=None, hosts=())
    await RegistrationServer(section, durable, Log()).start(bind(at, "registration").sock)
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Registrars:
    """Clients that register one name after the other, and know which were answered."""

    def __init__(self, at: Address) -> None:
        self.at = at
        self.answered: set[str] = set()
        self.unanswered: set[str] = set()
        self.enough = 0
        self.reached = asyncio.Event()

    async def register(self, prefix: str) -> None:
        """Until the process is killed."""
        for number in range(1000):
            name = f"{prefix}-{number}"
            self.unanswered.add(name)
            try:
                reply = await ask(self.at, "/v1/registrations", "POST", body=document(name))
            except OSError:
                return
            if reply.status != 201:
                return
            self.unanswered.discard(name)
            self.answered.add(name)
            if len(self.answered) >= self.enough:
                self.reached.set()

    async def check(self) -> None:
        """What was answered is there, what is there was sent."""
        listed = (await ask(self.at, "/v1/registrations")).json()["registrations"]
        here = {r["client"] for r in listed}
        assert self.answered <= here, f"lost: {self.answered - here}"
        assert here <= self.answered | self.unanswered, "never sent"
        # What came through unanswered must stay from now on, and the rest must not come back.
        self.answered, self.unanswered = here, set()


async def test_c4_what_was_answered_survives_kill_9(tmp_path: Path) -> None:
    """Twelve lives of one process, killed at moments of no choice while clients register."""
    seed = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1 << 32)
    print(f"SEED={seed}")
    chance = random.Random(seed)
    it = Registrars(Address(path=str(tmp_path / "r.sock")))
    for life in range(12):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            SERVE,
            str(tmp_path / "run"),
            it.at.path,
            stdout=asyncio.subprocess.PIPE,
            cwd=saver.ROOT,
        )
        assert process.stdout is not None
        assert (await asyncio.wait_for(process.stdout.readline(), 20)) == b"ready\n"
        await it.check()
        it.enough = len(it.answered) + chance.randrange(1, 60)
        it.reached.clear()
        clients = [asyncio.ensure_future(it.register(f"c{life}-{i}")) for i in range(4)]
        await it.reached.wait()
        await asyncio.sleep(chance.random() * 0.005)  # an answer is no special moment
        process.kill()
        await process.wait()
        await asyncio.gather(*clients)
        assert it.unanswered, "void: nothing was under way at the kill"
    assert len(it.answered) > 12
