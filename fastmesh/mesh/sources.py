"""Where brokers and schedules come from: watched files, or PUT /v1/schedule.

What cannot be read or does not pass never replaces what is in force: the last good one is kept, the
problem stands in the log and in the status. Files are looked at several times a second, so that a
change is in force within one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from fastmesh import config as configuration
from fastmesh import limits, saved
from fastmesh._ext.schedule import Schedule
from fastmesh.address import Address, parse_address
from fastmesh.config import Broker
from fastmesh.document import read_regular
from fastmesh.errors import ConfigError, ManagedElsewhereError, Problem, StaleError
from fastmesh.mesh import schedule as scheduling
from fastmesh.mesh.persist import SaveError
from fastmesh.mesh.schedule import AppSchedule, ScheduleSpec
from fastmesh.observe.log import Log


class WatchedFile:
    """Bytes of a small file, read again when it looks different."""

    _LOOKS_AFTER_A_CHANGE = 10
    """A file that is written twice within one tick of its timestamp looks the same twice: after a
    change it is read anyway, this many times."""

    def __init__(self, path: str, bytes_max: int) -> None:
        self.path = path
        self._bytes_max = bytes_max
        self._seen: tuple[int, ...] = ()
        self._sum = b""
        self._again = 0

    def read(self) -> bytes:
        """Its bytes now. Raises OSError, ValueError."""
        data = read_regular(self.path, self._bytes_max)
        if len(data) > self._bytes_max:
            raise ValueError(f"is longer than {self._bytes_max} bytes")
        self._sum = hashlib.sha256(data).digest()
        return data

    def look(self) -> bytes | None:
        """Its bytes when they differ from what was read last. Raises OSError, ValueError. Blocks as
        the filesystem does."""
        found = os.stat(self.path)
        seen = (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev)
        if seen != self._seen:
            self._again = self._LOOKS_AFTER_A_CHANGE
        if not self._again:
            return None
        self._again -= 1
        before = self._sum
        data = self.read()
        self._seen = seen
        return data if self._sum != before else None


def reason_of(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def log_problems(log: Log, what: str, source: str, problems: tuple[Problem, ...]) -> str:
    """Every problem as a line; the first one in one sentence."""
    for p in problems:
        log.limited(
            "error",
            f"{what} {p.path}",
            f"{what} not taken: the last good one stays",
            source=source,
            path=p.path,
            line=p.line,
            value=str(p.value),
            message=p.message,
        )
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{first.path} {first.message}".strip() + more


class SavedBroker(msgspec.Struct, omit_defaults=True):
    name: saved.Text
    address: saved.Text
    weight: Annotated[int, msgspec.Meta(ge=0, le=100)] = 100
    topics: Annotated[list[saved.Text], msgspec.Meta(max_length=limits.BROKER_TOPICS_MAX)] = (
        msgspec.field(default_factory=lambda: ["*"])
    )


class SavedBrokers(msgspec.Struct, omit_defaults=True):
    file: saved.Text = ""
    now: Annotated[list[SavedBroker], msgspec.Meta(max_length=limits.BROKERS_MAX)] = []
    """The last good list of that file; [] without one."""


class Brokers:
    """The brokers in force. `last`: what another process had from a file; its last good list is
    kept here as it was there, when the file has become empty."""

    def __init__(self, push: configuration.Push, log: Log, last: object = None) -> None:
        """Raises HandoverError."""
        self.failure = ""
        """Why the file is not taken; "" while it is."""
        self._log = log
        self.now: tuple[Broker, ...] = ()
        self._empty = 0
        if last is not None:
            self.now = _brokers(saved.read(last, SavedBrokers, "brokers"), push)
        self.configure(push)

    def save(self) -> SavedBrokers:
        if self._file is None:
            return SavedBrokers()
        return SavedBrokers(
            self._file.path,
            [SavedBroker(b.name, str(b.address), b.weight, list(b.topics)) for b in self.now],
        )

    def configure(self, push: configuration.Push) -> None:
        """At start and reload: `config.load` has just read the file, and it was good."""
        self._file: WatchedFile | None = None
        self._empty = 0
        if not push.brokers_file:
            self.now, self.failure = push.brokers, ""
            return
        self._file = WatchedFile(push.brokers_file, limits.CONFIG_BYTES_MAX)
        try:
            self._take(self._file.read(), first=not self.now)
        except (OSError, ValueError) as error:
            self._fail(reason_of(error))

    async def poll(self) -> bool:
        """Look at the file. True when there are other brokers now."""
        if self._file is None:
            return False
        file = self._file
        try:
            data = await asyncio.to_thread(file.look)
        except (OSError, ValueError) as error:
            self._fail(reason_of(error))
            return False
        if file is not self._file:  # reloaded meanwhile
            return False
        if data is None:
            return self._confirm_empty()
        return self._take(data)

    def _take(self, data: bytes, first: bool = False) -> bool:
        assert self._file is not None
        path = self._file.path
        try:
            found = configuration.parse_brokers(data, base=os.path.dirname(path), source=path)
        except ConfigError as wrong:
            self.failure = log_problems(self._log, "brokers", path, wrong.problems)
            return False
        self._empty = 0
        self.failure = ""
        if not found and self.now and not first:
            self._empty = 1
            self.failure = "is empty: believed when it stays so"
            self._log.limited("warning", "brokers empty", "no brokers any more?", source=path)
            return False
        return self._adopt(found)

    def _confirm_empty(self) -> bool:
        if not self._empty:
            return False
        self._empty += 1
        if self._empty < limits.EMPTY_POLLS:
            return False
        self._empty = 0
        self.failure = ""
        return self._adopt(())

    def _adopt(self, found: tuple[Broker, ...]) -> bool:
        if found == self.now:
            return False
        self.now = found
        self._log.info("brokers", names=",".join(b.name for b in found) or "none")
        return True

    def _fail(self, reason: str) -> None:
        assert self._file is not None
        self.failure = reason
        self._log.limited(
            "error",
            "brokers file",
            "brokers file cannot be read: the last good one stays",
            source=self._file.path,
            reason=reason,
        )


def _brokers(found: SavedBrokers, push: configuration.Push) -> tuple[Broker, ...]:
    """Of the file that is looked at here. Raises HandoverError."""
    if not push.brokers_file or found.file != push.brokers_file:
        return ()
    brokers = []
    for at, item in enumerate(found.now):
        try:
            address = parse_address(item.address)
        except ValueError as error:
            raise saved.wrong(f"brokers.now[{at}].address", item.address, str(error)) from None
        brokers.append(Broker(item.name, address, item.weight, tuple(item.topics)))
    return tuple(brokers)


class SavedSchedule(msgspec.Struct, omit_defaults=True):
    version: saved.Count = 0
    etag: saved.Text = ""
    source: saved.Text = ""
    stored: Annotated[bytes, msgspec.Meta(max_length=limits.SCHEDULE_BYTES_MAX)] | None = None
    """What PUT gave last."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A schedule in force."""

    plan: ScheduleSpec
    text: bytes
    etag: str
    source: str
    """file | put | none"""


def read_schedule(file: str) -> ScheduleSpec:
    """The schedule in a file. Raises ConfigError with all problems."""
    return scheduling.parse(_schedule_bytes(file), file)


def _schedule_bytes(file: str) -> bytes:
    try:
        return WatchedFile(file, limits.SCHEDULE_BYTES_MAX).read()
    except (OSError, ValueError) as error:
        problem = Problem("push.schedule.file", file, f"cannot be read: {reason_of(error)}")
        raise ConfigError([problem], file) from error


class Schedules:
    """The schedule in force, and its native form for each application."""

    def __init__(
        self,
        log: Log,
        *,
        node: str,
        file: str,
        stored: bytes | None,
        keep: Callable[[bytes], Any],
        last: object = None,
    ) -> None:
        """`stored`: what the last process was given by PUT. `keep` makes bytes durable (a coroutine
        function; raises SaveError). `last`: what the process that this one takes over from saved;
        it says what was put, and versions go on from there. Raises ConfigError when the file cannot
        be used, HandoverError for what was saved."""
        self.version = 0
        self.failure = ""
        self._log = log
        self._node = node
        self._keep = keep
        self._stored = stored
        self._path = ""
        self._file: WatchedFile | None = None
        self._native: dict[str, tuple[AppSchedule, dict[str, int], Schedule | None]] = {}
        self._lock = asyncio.Lock()
        self._held = False
        self.now: Scheduled = self._made(b"apps: {}\n", "none")
        before = SavedSchedule()
        if last is not None:
            before = saved.read(last, SavedSchedule, "schedule")
            self._stored = before.stored
        self.adopt(self.check(file), file)
        if before.version:
            same = (before.etag, before.source) == (self.now.etag, self.now.source)
            self.version = before.version + (not same)

    def save(self) -> SavedSchedule:
        return SavedSchedule(self.version, self.now.etag, self.now.source, self._stored)

    async def hold(self) -> None:
        """Until `thaw` nothing is put: who waits is refused; what is under way ends."""
        self._held = True
        async with self._lock:
            pass

    def thaw(self) -> None:
        self._held = False

    def check(self, file: str) -> Scheduled:
        """The schedule that a configuration with this file means. Raises ConfigError with all
        problems; nothing has changed."""
        if not file:
            if self._stored is None:
                return self._made(b"apps: {}\n", "none")
            try:
                return self._made(self._stored, "put")
            except ConfigError as wrong:
                # Of another version of fastmesh: told loudly, and nothing is scheduled.
                self.failure = log_problems(self._log, "schedule", "state", wrong.problems)
                return self._made(b"apps: {}\n", "none")
        return self._made(_schedule_bytes(file), "file", file)

    def adopt(self, found: Scheduled, file: str) -> None:
        """Put in force what `check` returned."""
        if file != self._path or (file and self._file is None):
            self._path = file
            self._file = WatchedFile(file, limits.SCHEDULE_BYTES_MAX) if file else None
        if found.etag != self.now.etag or found.source != self.now.source or not self.version:
            self.now = found
            self.version += 1
        if found.source == "file":
            self.failure = ""

    def _made(self, data: bytes, source: str, where: str = "schedule") -> Scheduled:
        plan = scheduling.parse(data, where)
        return Scheduled(plan, data, hashlib.sha256(data).hexdigest()[:32], source)

    async def poll(self) -> bool:
        """Look at the file. True when another schedule is in force."""
        file = self._file
        if file is None:
            return False
        try:
            data = await asyncio.to_thread(file.look)
            if data is None or file is not self._file:
                return False
            found = self._made(data, "file")
        except ConfigError as wrong:
            self.failure = log_problems(self._log, "schedule", file.path, wrong.problems)
            return False
        except (OSError, ValueError) as error:
            self.failure = reason_of(error)
            self._log.limited(
                "error",
                "schedule file",
                "schedule file cannot be read: the last good one stays",
                source=file.path,
                reason=self.failure,
            )
            return False
        before = self.version
        self.adopt(found, self._path)
        if self.version != before:
            self._log.limited("info", "schedule", "schedule", source="file", version=self.version)
        return self.version != before

    async def put(self, data: bytes, match: str | None) -> None:
        """PUT /v1/schedule: in force with the next snapshot, and after a restart. `match` is
        If-Match. Raises ConfigError (all problems), ManagedElsewhereError, StaleError, SaveError.
        """
        async with self._lock:
            if self._held:
                raise SaveError(503, "fastmesh is being upgraded: try again")
            self._refuse_with_file()
            if match not in (None, "*", self.now.etag):
                raise StaleError(f"the schedule in force has the ETag {self.now.etag}")
            found = self._made(data, "put")
            await self._keep(data)
            self._stored = data
            self._refuse_with_file()
            self.adopt(found, "")
            self._log.limited("info", "schedule", "schedule", source="put", version=self.version)

    def _refuse_with_file(self) -> None:
        if self._path:
            raise ManagedElsewhereError(
                f"push.schedule.file decides about the schedule: change {self._path}"
            )

    def peers(self) -> Mapping[str, Address]:
        return self.now.plan.peers(self._node)

    def native(self, app: str, endpoints: Mapping[str, int]) -> Schedule | None:
        """The same object as last time while neither the schedule nor an endpoint has changed, so
        that shares go on where they were."""
        spec = self.now.plan.apps.get(app)
        if spec is None:
            self._native.pop(app, None)
            return None
        mine = {n.name: endpoints[n.name] for n in spec.nodes if n.name in endpoints}
        known = self._native.get(app)
        if known is None or known[:2] != (spec, mine):
            known = (spec, mine, self.now.plan.compile(app, self._node, mine))
            self._native[app] = known
        return known[2]
