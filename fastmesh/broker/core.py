"""The broker's logic without a socket: frames, answers and times go in; answers, calls and one
batch of writes at a time come out.

    core.now_ms = ...                  before anything else of a turn
    core.frame / gone / answer         what the engine said
    core.turn()                        what is due, and deliveries as far as credit goes
    core.sends, calls, closes          to be handed to the engine and cleared
    batch = core.seal()                what has to be written; one at a time is on its way
    core.committed(error)              ... and is there, or is not

Whoever publishes is answered after `committed`, never before. Reads are the one exception: messages
that are no longer in memory are read where they are needed, some at a time.

What survives a crash: all that was committed. A group's row says up to where everything is settled
but for named holes, so that what was consumed is not delivered again but for the answers of the
last batch, and nothing that was not consumed is left out.
"""

from __future__ import annotations

import heapq
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from fastmesh import limits
from fastmesh._ext.push import Push, request, response
from fastmesh.broker.model import (
    DELAYED,
    MESSAGE,
    NEVER,
    PREPARED,
    ROLLBACK,
    Cursor,
    Entry,
    Flight,
    Group,
    Link,
    Message,
    Options,
    Place,
    Prepared,
    Publish,
    Queue,
    Session,
    Topic,
)
from fastmesh.broker.store import (
    Batch,
    DelayedRow,
    GroupRow,
    Loaded,
    MessageRow,
    PositionRow,
    PreparedRow,
    QueueRow,
    RetryRow,
    StoreFullError,
    TopicRow,
)
from fastmesh.protocols import push as words
from fastmesh.protocols.push import Announce, Filter, Hello, Row

DEAD_PREFIX = "%DLQ%"
NO_CONSUMER_PAUSE_MS = 1000
"""A mesh that has nobody of a group says so by an announcement, which is under way."""
FULL_RETRY_MS = 1000
"""Between two tries to write when the disk is full, and what publishers are told."""
OVERLOAD_RETRY_MS = 100
SETTLE_INTERVAL_MS = 5
"""Batches that carry nothing that anybody waits for are at least this far apart."""
HEADER_BYTES_MAX: Final = limits.HEADER_SECTION_BYTES_MAX - 1024
"""Of what a publish carries: a delivery adds its own, and a mesh its origin."""
LOOK_CLOSER = frozenset(
    (words.TX, words.DELAY_MS, words.COLOUR, words.LANE, words.MESSAGE_VERSION, words.IDEMPOTENT)
)
"""A publish without any of these to a topic that exists has little that can be wrong with it."""


class Reads(Protocol):
    """What the core asks of a store on its own."""

    def read(
        self, topic: int, queue: int, offset: int, count: int, bytes_max: int
    ) -> list[MessageRow]: ...
    def offset_at(self, queue: QueueRow, time_ms: int) -> int: ...
    def delayed_next_ms(self) -> int | None: ...
    def delayed_due(self, now_ms: int, count: int) -> list[DelayedRow]: ...
    def prepared_content(self, id: str) -> bytes | None: ...


class Core:
    """One broker. Not thread-safe; nothing here blocks but reads of the store."""

    def __init__(self, options: Options, store: Reads, loaded: Loaded, now_ms: int) -> None:
        self.options = options
        self.now_ms = now_ms
        self.sends: list[tuple[int, bytes]] = []
        self.calls: list[tuple[int, int, bytes, int]] = []
        self.closes: list[int] = []
        self.topics: dict[str, Topic] = {}
        self.groups: dict[str, Group] = {}
        self.prepared: dict[str, Prepared] = {}
        self.sessions: dict[int, Session] = {}
        self.stopping = False
        self.full = False
        """The store has reached its bound: nothing new is taken."""
        self.counts = dict.fromkeys(
            ("published", "duplicates", "later", "rejected", "delayed", "committed", "rolled_back"),
            0,
        )
        self.counts.update(dict.fromkeys(("checks", "late_answers", "commits_failed"), 0))
        self._store = store
        self._by_id: dict[int, Topic] = {}
        self._group_ids: dict[int, Group] = {}
        self._flying: dict[int, Flight] = {}
        self._ticket = 0
        self._tie = 0
        self._active: dict[Cursor, None] = {}
        self._timers: list[tuple[int, int, Cursor | Prepared]] = []
        self._publishers: dict[str, list[Session]] = {}
        self._due_checks: deque[Prepared] = deque()
        self._checks_asked = 0
        self._tail: deque[tuple[Queue, int, int]] = deque()
        self._tail_bytes = 0
        self._pending: deque[Publish] = deque()
        self._pending_own: deque[Publish] = deque()
        self._pending_bytes = 0
        self._acks: list[tuple[int, bytes]] = []
        """Answers of control frames that wait for the next batch."""
        self._dirty: list[Place] = []
        self._state = Batch()
        self._sealed: Batch | None = None
        self._sealed_publishes: list[Publish] = []
        self._sealed_acks: list[tuple[int, bytes]] = []
        self._sealed_places: list[Place] = []
        self._on_the_way: dict[str, Publish] = {}
        self._preparing: set[str] = set()
        """Ids of prepared messages among them: one topic may have each."""
        self._seen: dict[str, None] = {}
        self._seen_before: dict[str, None] = {}
        self._write_at_ms = 0
        self._settle_at_ms = 0
        self._stored_ms = loaded.stored_ms
        self._log_end = loaded.log_end
        self._delayed_end = loaded.delayed_end
        self._delayed_next_ms = store.delayed_next_ms() or NEVER
        self._delayed_moving = False
        self._restore(loaded)

    # --- start ------------------------------------------------------------------------------------

    def _restore(self, loaded: Loaded) -> None:
        for row in loaded.topics:
            topic = Topic(row.id, row.name, self._sync_of(row.name))
            topic.queues = [Queue(topic, number) for number in range(row.queues)]
            self.topics[topic.name] = self._by_id[topic.id] = topic
        for kept in loaded.queues:
            queue = self._by_id[kept.topic].queues[kept.queue]
            queue.first, queue.end = kept.first, kept.end
        for named in loaded.groups:
            group = Group(named.id, named.name, named.suspended)
            self.groups[group.name] = self._group_ids[group.id] = group
            group.cursors = [Cursor(group, persistent=True)]
        for position in loaded.positions:
            cursor = self._group_ids[position.group].cursors[0]
            queue = self._by_id[position.topic].queues[position.queue]
            place = self._add_place(cursor, queue, position.next)
            place.outstanding = dict.fromkeys(position.holes)
            cursor.runnable.extend(Entry(place, offset) for offset in position.holes)
        for again in loaded.retries:
            cursor = self._group_ids[again.group].cursors[0]
            entry = Entry(
                cursor.places[again.topic, again.queue], again.offset, again.attempts, kept=True
            )
            cursor.kept += 1
            self._push_retry(cursor, entry, again.due_ms)
        for topic_id, id in loaded.recent_ids:
            if id:
                self._remember(f"{topic_id} {id}")
        for waits in loaded.prepared:
            prepared = Prepared(
                waits.id,
                waits.group,
                self._by_id[waits.topic],
                waits.headers,
                waits.checks,
                waits.check_ms,
            )
            self.prepared[prepared.id] = prepared
            self._remember(f"{waits.topic} {waits.id}")
            self._arm_check(prepared)

    def _sync_of(self, topic: str) -> bool:
        return self.options.topics.get(topic, self.options.sync)

    # --- connections ------------------------------------------------------------------------------

    def gone(self, handle: int) -> None:
        """The connection is over: what it had in flight may or may not have been consumed."""
        session = self.sessions.pop(handle, None)
        if session is None:
            return
        session.gone = True
        for ticket in list(session.tickets):
            self.answer(ticket, 1, None)
        for link in session.links.values():
            self._unlink(link)
        session.links.clear()
        for group in session.publishes:
            self._unpublish(group, session)

    def _unlink(self, link: Link) -> None:
        cursor = link.cursor
        cursor.links.remove(link)
        link.credit = 0
        group = cursor.group
        if not cursor.persistent and cursor in group.cursors:
            # A broadcast reader leaves with its connection, and everything it had.
            group.cursors.remove(cursor)
            cursor.generation += 1
            for topic in {place.queue.topic for place in cursor.places.values()}:
                topic.cursors.remove(cursor)

    def _unpublish(self, group: str, session: Session) -> None:
        others = self._publishers.get(group, [])
        if session in others:
            others.remove(session)
        if not others:
            self._publishers.pop(group, None)

    # --- frames -----------------------------------------------------------------------------------

    def frame(self, handle: int, push: Push) -> None:
        """A request of a connection. Raises nothing: what is wrong with it is answered."""
        session = self.sessions.get(handle)
        if session is None:
            session = self.sessions[handle] = Session(handle)
        headers = push.headers
        op = headers.get("fm.op", "")
        if op == "publish":
            self._publish(session, push)
            return
        handler = self._ops.get(op)
        try:
            if handler is None:
                raise ValueError(f"{words.OP}: {op[:64]!r} is not served by a broker")
            if op != words.HELLO and not session.hello:
                raise ValueError("hello comes first")
            answer = handler(self, session, headers)
        except ValueError as wrong:
            self.counts["rejected"] += 1
            answer = words.answer(words.REJECT, str(wrong))
        if push.kind == "request":
            data = response(push.id, push.hint, answer)
            # What it changed must be on disk first: a group's beginning is a promise too.
            if self._state.groups or self._state.topics:
                self._acks.append((handle, data))
            else:
                self.sends.append((handle, data))

    def _hello(self, session: Session, headers: Mapping[str, str]) -> dict[str, str]:
        hello = Hello.parse(headers)
        if hello.understood:
            session.hello = True
            session.app = hello.app
            session.client = hello.client
        return {**hello.answer(), words.BROKER: self.options.name}

    def _subscribe(self, session: Session, headers: Mapping[str, str]) -> dict[str, str]:
        raise ValueError("subscribe is what a client tells its mesh; a broker takes announce")

    def _suspend(self, session: Session, headers: Mapping[str, str]) -> dict[str, str]:
        session.suspended = True
        return {"fm.result": "consumed"}

    def _resume(self, session: Session, headers: Mapping[str, str]) -> dict[str, str]:
        session.suspended = False
        for link in session.links.values():
            self._offer(link)
        return {"fm.result": "consumed"}

    def _goaway(self, session: Session, headers: Mapping[str, str]) -> dict[str, str]:
        session.going = True
        return {"fm.result": "consumed"}

    # --- announce ---------------------------------------------------------------------------------

    def _announce(self, session: Session, headers: Mapping[str, str]) -> dict[str, str]:
        wanted = session.parts.add(Announce.parse(headers))
        if wanted is None:
            return {"fm.result": "consumed"}
        # Everything is checked before anything changes.
        topics = {item.topic for item in wanted if item.topic} - self.topics.keys()
        groups = {item.group for item in wanted if item.role == "subscribe"} - self.groups.keys()
        if len(self.topics) + len(topics) > limits.BROKER_TOPICS_MAX:
            raise ValueError(f"more than {limits.BROKER_TOPICS_MAX} topics")
        if len(self.groups) + len(groups) > limits.BROKER_GROUPS_MAX:
            raise ValueError(f"more than {limits.BROKER_GROUPS_MAX} groups")
        self._take_announced(session, wanted)
        return {"fm.result": "consumed"}

    def _take_announced(self, session: Session, wanted: tuple[Row, ...]) -> None:
        publishes = {item.group for item in wanted if item.role == "publish"}
        for name in session.publishes - publishes:
            self._unpublish(name, session)
        for name in publishes - session.publishes:
            self._publishers.setdefault(name, []).append(session)
        session.publishes = publishes

        subscribed: dict[str, list[Row]] = {}
        for item in wanted:
            if item.role == "subscribe":
                subscribed.setdefault(item.group, []).append(item)
        for name in session.links.keys() - subscribed.keys():
            self._unlink(session.links.pop(name))
        for name, items in subscribed.items():
            group = self._group(name)
            self._set_up(group, items[0])
            link = session.links.get(name)
            if link is not None and link.cursor not in group.cursors:
                session.links.pop(name)  # the group's mode has changed under it
                link = None
            if link is None:
                if group.broadcast:
                    cursor = Cursor(group, persistent=False)
                    group.cursors.append(cursor)
                else:
                    cursor = group.cursors[0]
                link = session.links[name] = Link(session, cursor, 0)
                cursor.links.append(link)
            link.topics = frozenset(item.topic for item in items)
            for topic in sorted(link.topics):
                self._read_topic(link.cursor, self._topic(topic))
            self._choose(link.cursor)
            # A list says the same group once per topic; its credit is one.
            credit = max(item.credit for item in items)
            link.credit = min(credit, limits.BROKER_CREDIT_MAX)
            link.paused_until_ms = 0
            self._offer(link)

    def _set_up(self, group: Group, item: Row) -> None:
        """What the newest announcement says about a group holds for all of it."""
        group.known = True
        if item.filter != group.filter_text or (item.filter and group.filter is None):
            group.filter = Filter.parse(item.filter) if item.filter else None
            group.filter_text = item.filter
        broadcast = item.mode == "broadcast"
        if broadcast != group.broadcast or not group.cursors:
            self._forget_cursors(group)
            group.broadcast = broadcast
            if not broadcast:
                group.cursors = [Cursor(group, persistent=True)]
        if item.ordered != group.ordered:
            group.ordered = item.ordered
            for cursor in group.cursors:
                self._set_order(cursor)

    def _forget_cursors(self, group: Group) -> None:
        for cursor in group.cursors:
            cursor.generation += 1
            for topic in {place.queue.topic for place in cursor.places.values()}:
                topic.cursors.remove(cursor)
            for link in cursor.links:
                link.credit = 0
            if cursor.persistent and cursor.places:
                state = self._state
                state.retries = {k: v for k, v in state.retries.items() if k[0] != group.id}
                self._state.groups_gone.append(group.id)
                self._state.groups.append(GroupRow(group.id, group.name, group.suspended))
        group.cursors = []

    def _set_order(self, cursor: Cursor) -> None:
        """From now on by key, or no longer. What is in flight meanwhile holds no key."""
        for queue in cursor.keys.values():
            cursor.runnable.extend(queue)
        cursor.waiting = 0
        cursor.keys.clear()
        again = [entry for _, _, entry in cursor.retries]
        for entry in again:
            entry.key = None
        if not cursor.group.ordered:
            return
        # A key whose message waits for its next attempt is in work.
        for entry in sorted(again, key=lambda e: e.offset):
            message = self._message(entry.place.queue, entry.offset)
            key = message.headers.get("fm.key") if message is not None else None
            if key and key not in cursor.keys:
                cursor.keys[key] = deque()
                entry.key = key

    def _group(self, name: str) -> Group:
        group = self.groups.get(name)
        if group is None:
            group = Group(max(self._group_ids, default=0) + 1, name)
            self.groups[name] = self._group_ids[group.id] = group
            self._state.groups.append(GroupRow(group.id, name, False))
            self._state.sync = True
        return group

    def _topic(self, name: str) -> Topic:
        topic = self.topics.get(name)
        if topic is None:
            topic = Topic(max(self._by_id, default=0) + 1, name, self._sync_of(name))
            topic.queues = [Queue(topic, number) for number in range(self.options.queues)]
            self.topics[name] = self._by_id[topic.id] = topic
            self._state.topics.append(TopicRow(topic.id, name, len(topic.queues)))
        return topic

    def _read_topic(self, cursor: Cursor, topic: Topic) -> None:
        if cursor not in topic.cursors:
            topic.cursors.append(cursor)
        for queue in topic.queues:
            if (topic.id, queue.number) in cursor.places:
                continue
            first = self.options.start_first and cursor.persistent
            place = self._add_place(cursor, queue, queue.first if first else queue.end)
            if cursor.persistent:
                self._soil(place)
                self._state.sync = True

    def _choose(self, cursor: Cursor) -> None:
        """Only what somebody of the group still wants is read; its position stays."""
        wanted = frozenset().union(*(link.topics for link in cursor.links))
        cursor.order = [
            place for place in cursor.places.values() if place.queue.topic.name in wanted
        ]
        cursor.turn = 0

    def _add_place(self, cursor: Cursor, queue: Queue, offset: int) -> Place:
        place = Place(cursor, queue, offset)
        cursor.places[queue.topic.id, queue.number] = place
        if cursor not in queue.topic.cursors:
            queue.topic.cursors.append(cursor)
        return place

    def _offer(self, link: Link) -> None:
        """Its credit may allow more."""
        if not link.is_ready and link.may_take(self.now_ms):
            link.is_ready = True
            link.cursor.ready.append(link)
        self._active[link.cursor] = None

    # --- publish ----------------------------------------------------------------------------------

    def _publish(self, session: Session, push: Push) -> None:
        headers = push.headers
        asked = push.kind == "request"
        answer_to = (session.handle, push.id, push.hint)
        try:
            if not session.hello:
                raise ValueError("hello comes first")
            name = headers.get("fm.topic", "")
            id = headers.get("fm.id", "")
            topic = self.topics.get(name)
            tx, delay_ms = "", 0
            if topic is None or not LOOK_CLOSER.isdisjoint(headers) or _looks_odd(headers):
                closer = words.Publish.parse(headers)
                tx, delay_ms = closer.tx, closer.delay_ms
            if not 0 < len(id.encode()) <= limits.MESSAGE_ID_BYTES_MAX:
                raise ValueError(
                    f"fm.id: {len(id.encode())} bytes; it must have"
                    f" 1..{limits.MESSAGE_ID_BYTES_MAX}: the producer names its message"
                )
            if tx in ("commit", "rollback"):
                self._end(tx, id, headers, answer_to if asked else None)
                return
            if topic is None:
                if len(self.topics) >= limits.BROKER_TOPICS_MAX:
                    raise ValueError(f"more than {limits.BROKER_TOPICS_MAX} topics")
                topic = self._topic(name)
            seen = f"{topic.id} {id}"
            first = self._on_the_way.get(seen)
            if first is not None or seen in self._seen or seen in self._seen_before:
                self.counts["duplicates"] += 1
                if asked and first is not None:
                    first.answers.append(answer_to)
                elif asked:
                    self.sends.append((session.handle, self._taken(answer_to, id)))
                return
            stored = words.carried(headers)
            if "fm.born_ms" not in stored:
                stored["fm.born_ms"] = str(self.now_ms)
            size = sum(map(len, stored)) + sum(map(len, stored.values())) + 8 * len(stored)
            if 4 * size > HEADER_BYTES_MAX and _bytes_of(stored) > HEADER_BYTES_MAX:
                raise ValueError(f"headers: more than {HEADER_BYTES_MAX} bytes; a delivery adds to")
            kind, due_ms = MESSAGE, 0
            if tx:
                kind = PREPARED
                if id in self.prepared or id in self._preparing:
                    raise ValueError(f"fm.id: {id!r} is prepared for another topic")
            elif delay_ms:
                kind, due_ms = DELAYED, self.now_ms + delay_ms
        except ValueError as wrong:
            self.counts["rejected"] += 1
            if asked:
                refusal = words.answer(words.REJECT, str(wrong), broker=self.options.name)
                self.sends.append((session.handle, response(push.id, push.hint, refusal)))
            return
        if why := self._why_not_now(kind):
            self._put_off(answer_to if asked else None, *why)
            return
        key = stored.get("fm.key")
        if key:
            queue = zlib.crc32(key.encode()) % len(topic.queues)
        else:
            topic.turn = queue = (topic.turn + 1) % len(topic.queues)
        publish = Publish(
            kind,
            topic,
            queue,
            stored,
            push.content,
            seen,
            [answer_to] if asked else [],
            due_ms,
            id,
            headers.get("fm.group", ""),
        )
        self._on_the_way[seen] = publish
        if kind == PREPARED:
            self._preparing.add(id)
        self._pending.append(publish)
        self._pending_bytes += len(push.content) + limits.BROKER_TAIL_MESSAGE_BYTES

    def _why_not_now(self, kind: int) -> tuple[str, int] | None:
        if self.stopping:
            return "stopping", FULL_RETRY_MS
        if self.full:
            return "store full", FULL_RETRY_MS
        if self._write_at_ms > self.now_ms:
            return "disk full", FULL_RETRY_MS
        if self._pending_bytes > limits.BROKER_PENDING_BYTES_MAX:
            return "overload", OVERLOAD_RETRY_MS
        if kind == PREPARED and len(self.prepared) >= limits.BROKER_PREPARED_MAX:
            return "too many prepared", FULL_RETRY_MS
        return None

    def _put_off(self, to: tuple[int, int, int] | None, reason: str, retry_ms: int) -> None:
        self.counts["later"] += 1
        if to is None:
            return
        answer = words.answer(words.LATER, reason, retry_ms=retry_ms, broker=self.options.name)
        self.sends.append((to[0], response(to[1], to[2], answer)))

    def _taken(self, to: tuple[int, int, int], id: str) -> bytes:
        answer = {"fm.result": "consumed", "fm.id": id, "fm.broker": self.options.name}
        return response(to[1], to[2], answer)

    def _remember(self, seen: str) -> None:
        if len(self._seen) >= limits.BROKER_IDS_REMEMBERED:
            self._seen_before, self._seen = self._seen, {}
        self._seen[seen] = None

    # --- transactions -----------------------------------------------------------------------------

    def _end(
        self, tx: str, id: str, headers: Mapping[str, str], to: tuple[int, int, int] | None
    ) -> None:
        """The second phase: commit or rollback of what was prepared."""
        broker = headers.get("fm.broker", self.options.name)
        if broker != self.options.name:
            raise ValueError(f"fm.broker: {broker[:64]!r}, and this is {self.options.name!r}")
        prepared = self.prepared.get(id)
        if prepared is None:
            topic = self.topics.get(headers.get("fm.topic", ""))
            seen = f"{topic.id} {id}" if topic is not None else ""
            stored = seen in self._seen or seen in self._seen_before
            if seen in self._on_the_way:
                self._put_off(to, "not on disk yet", OVERLOAD_RETRY_MS)
            elif stored == (tx == "commit"):
                # Told twice, or it never came here: nothing is left to be done.
                if to is not None:
                    self.sends.append((to[0], self._taken(to, id)))
            elif tx == "commit":
                raise ValueError(f"fm.id: {id!r} is not prepared here")
            else:
                raise ValueError(f"fm.id: {id!r} is committed")
            return
        if prepared.ending or self.stopping or self._write_at_ms > self.now_ms:
            self._put_off(to, "not now", OVERLOAD_RETRY_MS)
            return
        self._stage_end(prepared, tx == "commit", [to] if to else [])

    def _stage_end(
        self, prepared: Prepared, commit: bool, answers: list[tuple[int, int, int]]
    ) -> None:
        topic = prepared.topic
        content: bytes | None = b""
        queue = 0
        if commit:
            content = self._store.prepared_content(prepared.id)
            key = prepared.headers.get("fm.key")
            if key:
                queue = zlib.crc32(key.encode()) % len(topic.queues)
            else:
                topic.turn = queue = (topic.turn + 1) % len(topic.queues)
        prepared.ending = True
        kind = MESSAGE if commit else ROLLBACK
        publish = Publish(
            kind, topic, queue, prepared.headers, content or b"", answers=answers, id=prepared.id
        )
        publish.ends_prepared = True
        # Nobody waits for the end that a check has brought.
        publish.own = not answers
        (self._pending_own if publish.own else self._pending).append(publish)
        self._pending_bytes += len(publish.content) + limits.BROKER_TAIL_MESSAGE_BYTES

    def _arm_check(self, prepared: Prepared) -> None:
        self._arm(prepared.check_ms, prepared)

    def _check(self, prepared: Prepared) -> None:
        """Ask a live connection of the publisher group what became of it."""
        if prepared.ending or prepared.checking or self.prepared.get(prepared.id) is not prepared:
            return
        if prepared.check_ms > self.now_ms:
            return
        sessions = self._publishers.get(prepared.group, ())
        session = next((s for s in sessions if not (s.suspended or s.going)), None)
        prepared.check_ms = self.now_ms + self.options.check_every_ms
        content = None if session is None else self._store.prepared_content(prepared.id)
        if session is None or content is None or self.stopping:
            self._arm_check(prepared)
            return
        self._publishers[prepared.group].remove(session)
        self._publishers[prepared.group].append(session)
        prepared.checking = True
        self._checks_asked += 1
        self.counts["checks"] += 1
        headers = {"fm.op": "check", "fm.group": prepared.group, **prepared.headers}
        self._call(Flight(session, None, None, 0, prepared), headers, content)

    def _checked(self, prepared: Prepared, result: str, *, counts: bool) -> None:
        prepared.checking = False
        if prepared.ending or self.prepared.get(prepared.id) is not prepared:
            return
        if result in ("commit", "rollback"):
            self._stage_end(prepared, result == "commit", [])
            return
        prepared.checks += counts
        if prepared.checks >= self.options.check_max:
            self._stage_end(prepared, False, [])
            return
        checked = (prepared.checks, prepared.check_ms, prepared.id)
        self._state.prepared_checked.append(checked)
        self._arm_check(prepared)

    # --- deliver ----------------------------------------------------------------------------------

    def turn(self) -> None:
        """Do what is due by now, and deliver as far as credit goes."""
        now = self.now_ms
        timers = self._timers
        while timers and timers[0][0] <= now:
            what = heapq.heappop(timers)[2]
            if isinstance(what, Prepared):
                self._due_checks.append(what)
            else:
                what.armed_ms = NEVER
                for link in what.links:
                    self._offer(link)
        while self._due_checks and self._checks_asked < limits.BROKER_CHECKS_MAX:
            self._check(self._due_checks.popleft())
        if self._delayed_next_ms <= now and not self._delayed_moving:
            self._move_delayed()
        if self.stopping:
            return
        active, self._active = self._active, {}
        for cursor in active:
            self._deliver(cursor)

    def due_ms(self) -> int:
        """When `turn` has something to do though nothing comes in; NEVER when it has not."""
        if self._active and not self.stopping:
            return self.now_ms
        due = self._timers[0][0] if self._timers else NEVER
        if not self._delayed_moving:
            due = min(due, self._delayed_next_ms)
        if self._pending or self._pending_own or self._acks:
            due = min(due, self._write_at_ms)
        elif self._dirty or not self._state.is_empty():
            due = min(due, max(self._settle_at_ms, self._write_at_ms))
        return due

    def _arm(self, due_ms: int, what: Cursor | Prepared) -> None:
        self._tie += 1
        heapq.heappush(self._timers, (due_ms, self._tie, what))

    def _deliver(self, cursor: Cursor) -> None:
        group = cursor.group
        if group.suspended or cursor not in group.cursors:
            return
        ready = cursor.ready
        now = self.now_ms
        left = limits.BROKER_TURN_DELIVERIES
        while ready:
            link = ready[0]
            if not link.may_take(now):
                ready.popleft()
                link.is_ready = False
                continue
            found, left = self._next(cursor, left)
            if found is None:
                break
            entry, message = found
            ready.rotate(-1)
            headers = {
                "fm.op": "deliver",
                "fm.group": group.name,
                "fm.attempt": str(entry.attempts + 1),
            }
            headers.update(message.headers)
            link.in_flight += 1
            cursor.in_flight += 1
            group.delivered += 1
            if entry.attempts:
                group.redelivered += 1
            self._call(
                Flight(link.session, link, entry, cursor.generation), headers, message.content
            )
        if left <= 0:
            self._active[cursor] = None
        elif cursor.retries and cursor.retries[0][0] < cursor.armed_ms:
            due = cursor.retries[0][0]
            if due > now:
                cursor.armed_ms = due
                self._arm(due, cursor)

    def _call(self, flight: Flight, headers: dict[str, str], content: bytes) -> None:
        self._ticket = ticket = self._ticket + 1
        self._flying[ticket] = flight
        flight.session.tickets.add(ticket)
        timeout_ms = self.options.answer_timeout_ms
        data = request(1, headers, content, timeout_ms=timeout_ms)
        self.calls.append((flight.session.handle, ticket, data, timeout_ms))

    def _next(self, cursor: Cursor, left: int) -> tuple[tuple[Entry, Message] | None, int]:
        """The message that this reading delivers next, and how many may still be looked at."""
        while left > 0:
            left -= 1
            if cursor.retries and cursor.retries[0][0] <= self.now_ms:
                entry = heapq.heappop(cursor.retries)[2]
            elif cursor.runnable:
                entry = cursor.runnable.popleft()
            else:
                new = self._next_new(cursor)
                if new is None:
                    return None, max(left, 1)
                if new[0] is None:
                    continue
                return (new[0], new[1]), left
            message = self._message(entry.place.queue, entry.offset)
            if message is None:
                self._done(entry)  # a reset went back behind what is kept
                continue
            if not self._take_key(cursor, entry, message):
                continue
            return (entry, message), left
        return None, left

    def _next_new(self, cursor: Cursor) -> tuple[Entry, Message] | tuple[None, None] | None:
        """None: nothing there. (None, None): something was there that is not to be delivered."""
        if (
            len(cursor.retries) >= limits.BROKER_RETRIES_MAX
            or cursor.waiting >= limits.BROKER_WAITING_MAX
        ):
            return None
        order = cursor.order
        turn = cursor.turn
        for _ in range(len(order)):
            turn = turn + 1 if turn + 1 < len(order) else 0
            place = order[turn]
            if place.next < place.queue.end:
                break
        else:
            return None
        cursor.turn = turn
        message = self._ahead(place)
        if message is None:
            return None, None
        place.next = message.offset + 1
        group = cursor.group
        if group.filter is not None and not group.filter.matches(message.headers):
            group.filtered += 1
            self._soil(place)
            return None, None
        place.outstanding[message.offset] = None
        entry = Entry(place, message.offset)
        if not self._take_key(cursor, entry, message):
            return None, None
        return entry, message

    def _take_key(self, cursor: Cursor, entry: Entry, message: Message) -> bool:
        """False when the one before it is not done: then it waits its turn."""
        if not cursor.group.ordered or entry.key is not None:
            return True
        key = message.headers.get("fm.key")
        if not key:
            return True
        waiting = cursor.keys.get(key)
        if waiting is None:
            cursor.keys[key] = deque()
            entry.key = key
            return True
        waiting.append(entry)
        cursor.waiting += 1
        return False

    def _free_key(self, entry: Entry) -> None:
        key, entry.key = entry.key, None
        if key is None:
            return
        cursor = entry.place.cursor
        waiting = cursor.keys.get(key)
        if waiting is None:
            return
        if waiting:
            after = waiting.popleft()
            cursor.waiting -= 1
            after.key = key
            cursor.runnable.append(after)
            self._active[cursor] = None
        else:
            del cursor.keys[key]

    def _ahead(self, place: Place) -> Message | None:
        """The next message of a place, from memory if it is there; None moves on by itself."""
        offset = place.next
        message = place.queue.tail.get(offset)
        if message is not None:
            return message
        ahead = place.ahead
        while ahead and ahead[0].offset < offset:
            ahead.popleft()
        if not ahead or ahead[0].offset != offset:
            ahead.clear()
            queue = place.queue
            rows = self._store.read(
                queue.topic.id,
                queue.number,
                offset,
                limits.BROKER_READ_MESSAGES,
                limits.BROKER_READ_BYTES,
            )
            ahead.extend(
                Message(row.offset, row.stored_ms, row.headers, row.content)
                for row in rows
                if row.offset < queue.end
            )
        if not ahead:
            place.next = place.queue.end
            self._soil(place)
            return None
        return ahead.popleft()

    def _message(self, queue: Queue, offset: int) -> Message | None:
        message = queue.tail.get(offset)
        if message is not None:
            return message
        rows = self._store.read(queue.topic.id, queue.number, offset, 1, 1)
        if not rows or rows[0].offset != offset:
            return None
        row = rows[0]
        return Message(row.offset, row.stored_ms, row.headers, row.content)

    # --- answers ----------------------------------------------------------------------------------

    def answer(self, ticket: int, outcome: int, push: Push | None) -> None:
        """What became of a call: 0 answered (by `push`), else why not."""
        flight = self._flying.pop(ticket, None)
        if flight is None:
            self.counts["late_answers"] += 1
            return
        flight.session.tickets.discard(ticket)
        headers = push.headers if outcome == 0 and push is not None else {}
        result = headers.get("fm.result", "")
        if flight.check is not None:
            self._checks_asked -= 1
            # Who has not looked at it has not said that he does not know.
            nobody = flight.session.gone or result in ("no_consumer", "later")
            self._checked(flight.check, result, counts=not nobody)
            return
        link, entry = flight.link, flight.entry
        assert link is not None
        assert entry is not None
        cursor = entry.place.cursor
        link.in_flight -= 1
        cursor.in_flight -= 1
        if not link.is_ready and link.may_take(self.now_ms):
            link.is_ready = True
            cursor.ready.append(link)
        self._active[cursor] = None
        if flight.generation != cursor.generation:
            return
        if result == "consumed":
            cursor.group.consumed += 1
            self._done(entry)
        elif result == "reject":
            self._dead(entry, headers.get("fm.reason", "rejected"))
        elif result == "no_consumer":
            # Nothing happened, and nothing will until the mesh has somebody again.
            if link.credit:
                link.paused_until_ms = self.now_ms + NO_CONSUMER_PAUSE_MS
                self._arm(link.paused_until_ms, cursor)
            cursor.runnable.appendleft(entry)
        elif result == "later":
            self._later(entry, headers)
        else:
            self._again(entry, entry.attempts + 1, None, headers.get("fm.reason", "unanswered"))

    def _later(self, entry: Entry, headers: Mapping[str, str]) -> None:
        reason = headers.get("fm.reason", "later")
        # Out of credit on the way: nobody has looked at it, so it does not age.
        attempts = entry.attempts + (reason != words.OVERLOAD)
        retry_ms = words.retry_ms(headers)
        self._again(entry, attempts, retry_ms or None, reason)

    def _again(self, entry: Entry, attempts: int, delay_ms: int | None, reason: str) -> None:
        entry.attempts = attempts
        if attempts >= self.options.max_attempts:
            self._dead(entry, reason)
            return
        if delay_ms is None:
            steps = self.options.redeliver_ms
            delay_ms = steps[min(max(attempts, 1), len(steps)) - 1]
        cursor = entry.place.cursor
        due = self.now_ms + delay_ms
        if cursor.persistent:
            group, topic, queue, offset = key = entry.retry_key()
            self._state.retries[key] = RetryRow(group, topic, queue, offset, attempts, due)
        if not entry.kept:
            entry.kept = True
            cursor.kept += 1
            entry.place.outstanding.pop(entry.offset, None)
            self._soil(entry.place)
        self._push_retry(cursor, entry, due)

    def _push_retry(self, cursor: Cursor, entry: Entry, due_ms: int) -> None:
        self._tie += 1
        heapq.heappush(cursor.retries, (due_ms, self._tie, entry))
        if due_ms < cursor.armed_ms:
            cursor.armed_ms = due_ms
            self._arm(due_ms, cursor)

    def _done(self, entry: Entry) -> None:
        self._settle(entry)
        if entry.key is not None:
            self._free_key(entry)

    def _settle(self, entry: Entry) -> None:
        if entry.kept:
            entry.place.cursor.kept -= 1
            if entry.place.cursor.persistent:
                self._state.retries[entry.retry_key()] = None
        else:
            entry.place.outstanding.pop(entry.offset, None)
            place = entry.place
            if not place.dirty:
                self._soil(place)

    def _soil(self, place: Place) -> None:
        """Its row has to be written."""
        if not place.dirty and place.cursor.persistent:
            place.dirty = True
            self._dirty.append(place)

    def _dead(self, entry: Entry, reason: str) -> None:
        cursor = entry.place.cursor
        group = cursor.group
        if not cursor.persistent:
            group.dropped += 1
            self._done(entry)
            return
        message = self._message(entry.place.queue, entry.offset)
        if message is None:
            self._done(entry)
            return
        group.dead += 1
        topic = self._topic(DEAD_PREFIX + group.name)
        headers = dict(message.headers)
        headers["fm.topic"] = topic.name
        # Of a letter that dies again the first death stays.
        headers.setdefault("fm.dead_topic", entry.place.queue.topic.name)
        headers.setdefault("fm.dead_attempts", str(max(entry.attempts, 1)))
        headers.setdefault("fm.dead_reason", reason[:200])
        topic.turn = queue = (topic.turn + 1) % len(topic.queues)
        publish = Publish(MESSAGE, topic, queue, headers, message.content, settles=entry, own=True)
        self._pending_own.append(publish)
        self._pending_bytes += len(publish.content) + limits.BROKER_TAIL_MESSAGE_BYTES

    # --- delayed ----------------------------------------------------------------------------------

    def _move_delayed(self) -> None:
        """Put what is due by now into its queue."""
        rows = self._store.delayed_due(self.now_ms, limits.BROKER_BATCH_MESSAGES // 4)
        if not rows:
            self._delayed_next_ms = self._store.delayed_next_ms() or NEVER
            return
        self._delayed_moving = True
        for row in rows:
            topic = self._by_id[row.topic]
            key = row.headers.get("fm.key")
            if key:
                queue = zlib.crc32(key.encode()) % len(topic.queues)
            else:
                topic.turn = queue = (topic.turn + 1) % len(topic.queues)
            publish = Publish(MESSAGE, topic, queue, row.headers, row.content, own=True)
            publish.ends_delayed = row.number
            self._pending_own.append(publish)
            self._pending_bytes += len(row.content) + limits.BROKER_TAIL_MESSAGE_BYTES

    # --- writing ----------------------------------------------------------------------------------

    def seal(self) -> Batch | None:
        """What has to be written now; None when that is nothing, or the last is still under way."""
        if self._sealed is not None or self._write_at_ms > self.now_ms:
            return None
        urgent = bool(self._pending or self._pending_own or self._acks)
        if not urgent and (
            (not self._dirty and self._state.is_empty())
            or (self.now_ms < self._settle_at_ms and not self.stopping)
        ):
            return None
        for publish in self._pending_own:
            # In the batch that writes the dead letter, and in no earlier one.
            if publish.settles is not None and not publish.settled:
                publish.settled = True
                self._settle(publish.settles)
        batch, self._state = self._state, Batch()
        publishes = self._take_pending()
        self._stored_ms = stored_ms = max(self._stored_ms, self.now_ms)
        position = self._log_end
        ends: dict[Queue, int] = {}
        for publish in publishes:
            topic = publish.topic
            if publish.kind == MESSAGE:
                queue = topic.queues[publish.queue]
                offset = ends.get(queue, queue.end)
                ends[queue] = offset + 1
                batch.messages.append(
                    MessageRow(
                        position,
                        topic.id,
                        publish.queue,
                        offset,
                        stored_ms,
                        publish.headers,
                        publish.content,
                    )
                )
                position += 1
                if publish.ends_delayed:
                    batch.delayed_gone.append(publish.ends_delayed)
            elif publish.kind == DELAYED:
                batch.delayed.append(
                    DelayedRow(
                        self._delayed_end,
                        publish.due_ms,
                        topic.id,
                        publish.headers,
                        publish.content,
                    )
                )
                self._delayed_end += 1
            elif publish.kind == PREPARED:
                batch.prepared.append(
                    PreparedRow(
                        publish.id,
                        publish.group,
                        topic.id,
                        0,
                        stored_ms + self.options.check_after_ms,
                        publish.headers,
                        publish.content,
                    )
                )
            if publish.ends_prepared:
                batch.prepared_gone.append(publish.id)
            if topic.sync:
                batch.sync = True
        places, self._dirty = self._dirty, []
        for place in places:
            place.dirty = False
            queue = place.queue
            if place.cursor not in place.cursor.group.cursors:
                continue  # forgotten meanwhile
            batch.positions.append(
                PositionRow(
                    place.cursor.group.id,
                    queue.topic.id,
                    queue.number,
                    place.next,
                    list(place.outstanding),
                )
            )
        self._sealed = batch
        self._sealed_publishes = publishes
        self._sealed_places = places
        self._sealed_acks, self._acks = self._acks, []
        return batch

    def _take_pending(self) -> list[Publish]:
        publishes = list(self._pending_own)
        self._pending_own.clear()
        size = sum(len(publish.content) for publish in publishes)
        pending = self._pending
        while (
            pending
            and len(publishes) < limits.BROKER_BATCH_MESSAGES
            and size < limits.BROKER_BATCH_BYTES
        ):
            publish = pending.popleft()
            publishes.append(publish)
            size += len(publish.content)
        return publishes

    def committed(self, error: StoreFullError | None = None) -> None:
        """The sealed batch is on disk; or nothing of it is, and `error` says why."""
        batch, self._sealed = self._sealed, None
        assert batch is not None
        publishes, self._sealed_publishes = self._sealed_publishes, []
        acks, self._sealed_acks = self._sealed_acks, []
        places, self._sealed_places = self._sealed_places, []
        self._settle_at_ms = self.now_ms + SETTLE_INTERVAL_MS
        if error is not None:
            self._take_back(batch, publishes, acks, places)
            return
        self.sends.extend(acks)
        for cut in batch.trimmed:
            queue = self._by_id[cut.topic].queues[cut.queue]
            queue.first = max(queue.first, cut.first)
        rows = iter(batch.messages)
        self._log_end += len(batch.messages)
        for publish in publishes:
            self._pending_bytes -= len(publish.content) + limits.BROKER_TAIL_MESSAGE_BYTES
            topic = publish.topic
            if publish.kind == MESSAGE:
                row = next(rows)
                queue = topic.queues[publish.queue]
                queue.end = row.offset + 1
                topic.published += 1
                size = len(row.content) + limits.BROKER_TAIL_MESSAGE_BYTES
                queue.tail[row.offset] = Message(
                    row.offset, row.stored_ms, row.headers, row.content
                )
                self._tail.append((queue, row.offset, size))
                self._tail_bytes += size
                for cursor in topic.cursors:
                    self._active[cursor] = None
                if publish.settles is not None:
                    self._free_key(publish.settles)
            elif publish.kind == DELAYED:
                self._delayed_next_ms = min(self._delayed_next_ms, publish.due_ms)
                self.counts["delayed"] += 1
            elif publish.kind == PREPARED:
                check_ms = self.now_ms + self.options.check_after_ms
                prepared = Prepared(publish.id, publish.group, topic, publish.headers, 0, check_ms)
                self.prepared[publish.id] = prepared
                self._arm_check(prepared)
            if publish.ends_prepared:
                self._ended(publish)
            if publish.seen:
                del self._on_the_way[publish.seen]
                if publish.kind == PREPARED:
                    self._preparing.discard(publish.id)
                self._remember(publish.seen)
            for to in publish.answers:
                self.sends.append((to[0], self._taken(to, publish.id)))
        self.counts["published"] += len(batch.messages)
        if batch.delayed_gone:
            self._delayed_moving = False
            self._delayed_next_ms = self._store.delayed_next_ms() or NEVER
        tail = self._tail
        while self._tail_bytes > limits.BROKER_TAIL_BYTES_MAX:
            queue, offset, size = tail.popleft()
            queue.tail.pop(offset, None)
            self._tail_bytes -= size

    def _ended(self, publish: Publish) -> None:
        """A transaction is over, one way or the other."""
        self.prepared.pop(publish.id, None)
        if publish.kind != ROLLBACK:
            self.counts["committed"] += 1
            return
        self.counts["rolled_back"] += 1
        # It never was: the same id may come again.
        seen = f"{publish.topic.id} {publish.id}"
        self._seen.pop(seen, None)
        self._seen_before.pop(seen, None)

    def _take_back(
        self,
        batch: Batch,
        publishes: list[Publish],
        acks: list[tuple[int, bytes]],
        places: list[Place],
    ) -> None:
        """Nothing was written: publishers come again, all else is tried again in a while."""
        self.counts["commits_failed"] += 1
        self._write_at_ms = self.now_ms + FULL_RETRY_MS
        state = self._state
        state.sync = state.sync or batch.sync
        state.topics[:0] = batch.topics
        state.groups[:0] = [row for row in batch.groups if row.id not in state.groups_gone]
        state.groups_gone[:0] = batch.groups_gone
        state.prepared_checked[:0] = batch.prepared_checked
        cleared = set(state.retries_cleared) | set(state.groups_gone)
        older = {key: row for key, row in batch.retries.items() if key[0] not in cleared}
        state.retries = {**older, **state.retries}
        state.retries_cleared[:0] = batch.retries_cleared
        for place in places:
            if place.cursor in place.cursor.group.cursors:
                self._soil(place)
        self._acks[:0] = acks
        own = [publish for publish in publishes if publish.own]
        self._pending_own.extendleft(reversed(own))
        waiting = [publish for publish in publishes if not publish.own] + list(self._pending)
        self._pending.clear()
        for publish in waiting:
            self._pending_bytes -= len(publish.content) + limits.BROKER_TAIL_MESSAGE_BYTES
            if publish.seen:
                del self._on_the_way[publish.seen]
                if publish.kind == PREPARED:
                    self._preparing.discard(publish.id)
            if publish.ends_prepared:
                self.prepared[publish.id].ending = False
                self._arm_check(self.prepared[publish.id])
            for to in publish.answers:
                self._put_off(to, "disk full", FULL_RETRY_MS)

    # --- retention --------------------------------------------------------------------------------

    def trim(self, size_bytes: int) -> None:
        """Have messages deleted that every group is done with and that are too old, or one too
        many for a store of this size. Some at a time; call it again."""
        self.full = size_bytes > self.options.bytes_max
        if self._state.trimmed or (self._sealed is not None and self._sealed.trimmed):
            return
        low = self._lowest_retries()
        crowded = size_bytes > min(self.options.keep_bytes, self.options.bytes_max)
        old_ms = self.now_ms - self.options.keep_ms
        for topic in self.topics.values():
            for queue in topic.queues:
                if queue.first >= queue.end:
                    continue
                cut = min(low.get(queue, queue.end), queue.first + limits.BROKER_TRIM_MESSAGES)
                for cursor in topic.cursors:
                    place = cursor.places.get((topic.id, queue.number))
                    if place is not None and cursor.persistent:
                        cut = min(cut, next(iter(place.outstanding), place.next))
                if not crowded and cut > queue.first:
                    row = QueueRow(topic.id, queue.number, queue.first, cut)
                    cut = self._store.offset_at(row, old_ms)
                if cut > queue.first:
                    row = QueueRow(topic.id, queue.number, cut, queue.end)
                    self._state.trimmed.append(row)
                    self._state.log_end = self._log_end

    def _lowest_retries(self) -> dict[Queue, int]:
        low: dict[Queue, int] = {}
        for group in self.groups.values():
            for cursor in group.cursors:
                if not cursor.persistent:
                    continue
                entries = [entry for _, _, entry in cursor.retries]
                entries += cursor.runnable
                entries += [entry for queue in cursor.keys.values() for entry in queue]
                for entry in entries:
                    queue = entry.place.queue
                    low[queue] = min(low.get(queue, entry.offset), entry.offset)
        for flight in self._flying.values():
            if flight.entry is not None:
                queue = flight.entry.place.queue
                low[queue] = min(low.get(queue, flight.entry.offset), flight.entry.offset)
        for publish in (*self._pending_own, *self._sealed_publishes):
            if publish.settles is not None:
                queue = publish.settles.place.queue
                low[queue] = min(low.get(queue, publish.settles.offset), publish.settles.offset)
        return low

    # --- what an operator does --------------------------------------------------------------------

    def suspend_group(self, name: str, suspended: bool) -> None:
        """Deliver nothing to a group until it is resumed; survives a restart. KeyError: no such
        group."""
        group = self.groups[name]
        group.suspended = suspended
        self._state.groups.append(GroupRow(group.id, name, suspended))
        for cursor in group.cursors:
            for link in cursor.links:
                self._offer(link)

    def reset_group(
        self, name: str, *, time_ms: int | None = None, to_first: bool = False
    ) -> dict[str, int]:
        """Set a group's position in all its queues: to the first message stored at or after a time,
        to the oldest, or to the end. What waits for another attempt is forgotten, what is in flight
        no longer counts. Returns the new position by "topic/queue". KeyError: no such group."""
        group = self.groups[name]
        found: dict[str, int] = {}
        for cursor in group.cursors:
            cursor.generation += 1
            cursor.retries.clear()
            cursor.runnable.clear()
            cursor.keys.clear()
            cursor.waiting = 0
            cursor.kept = 0
            for place in cursor.places.values():
                queue = place.queue
                if time_ms is not None:
                    place.next = self._store.offset_at(queue.row(), time_ms)
                else:
                    place.next = queue.first if to_first else queue.end
                place.outstanding.clear()
                place.ahead.clear()
                self._soil(place)
                found[f"{queue.topic.name}/{queue.number}"] = place.next
            self._active[cursor] = None
        # What died at the old position settles nothing at the new one.
        for publish in (*self._pending_own, *self._sealed_publishes):
            if publish.settles is not None and publish.settles.place.cursor.group is group:
                publish.settles = None
        self._state.retries = {k: v for k, v in self._state.retries.items() if k[0] != group.id}
        self._state.retries_cleared.append(group.id)
        return found

    def delete_group(self, name: str) -> None:
        """Forget a group and where it stands: retention waits for it no longer. KeyError: no such
        group; ValueError: it is connected."""
        group = self.groups[name]
        if any(cursor.links for cursor in group.cursors):
            raise ValueError(f"group {name} is connected")
        for cursor in group.cursors:
            cursor.generation += 1
            for topic in {place.queue.topic for place in cursor.places.values()}:
                topic.cursors.remove(cursor)
        group.cursors = []
        del self.groups[name]
        del self._group_ids[group.id]
        state = self._state
        state.retries = {k: v for k, v in state.retries.items() if k[0] != group.id}
        state.groups = [row for row in state.groups if row.id != group.id]
        state.groups_gone.append(group.id)

    # --- what is looked at ------------------------------------------------------------------------

    def in_flight(self) -> int:
        return len(self._flying)

    def is_idle(self) -> bool:
        """Nothing is in flight and nothing waits to be written."""
        return not (self._flying or self._sealed is not None or self.has_unwritten())

    def is_busy(self) -> bool:
        """`turn` would do something at once."""
        return bool(self._active) and not self.stopping

    def has_unwritten(self) -> bool:
        """Something waits for the next batch."""
        return bool(
            self._pending
            or self._pending_own
            or self._acks
            or self._dirty
            or not self._state.is_empty()
        )

    def stop(self) -> None:
        """Deliver and take nothing new from now on; tell every connection so."""
        self.stopping = True
        data = request(1, {"fm.op": "goaway", "fm.reason": "stopping"}, oneway=True)
        self.sends.extend((session.handle, data) for session in self.sessions.values())

    def lag(self, group: Group) -> int:
        """Messages that a group has not settled: not delivered, in flight, or to be seen again."""
        return sum(
            cursor.kept
            + sum(
                place.queue.end - place.next + len(place.outstanding)
                for place in cursor.places.values()
            )
            for cursor in group.cursors
        )

    _ops: Mapping[str, Callable[[Core, Session, Mapping[str, str]], dict[str, str]]] = {
        "hello": _hello,
        "announce": _announce,
        "subscribe": _subscribe,
        "suspend": _suspend,
        "resume": _resume,
        "goaway": _goaway,
    }


def _looks_odd(headers: Mapping[str, str]) -> bool:
    """Its key or its time may be past a bound: cheap, and never wrong the other way."""
    born = headers.get("fm.born_ms", "0")
    return (
        4 * len(headers.get("fm.key", "")) > limits.MESSAGE_KEY_BYTES_MAX
        or len(born) > 15
        or not (born.isascii() and born.isdigit())
    )


def _bytes_of(headers: Mapping[str, str]) -> int:
    return sum(len(key.encode()) + len(value.encode()) + 8 for key, value in headers.items())
