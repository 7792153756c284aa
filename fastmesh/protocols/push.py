"""The words of the message mesh's protocol: header maps <-> what they say.

    headers --X.parse--> Hello | Subscribe | Announce | Publish
    Hello, Subscribe --headers()--> headers,   rows --announce_parts--> headers of several frames

docs/protocol/mesh-push.md is the specification; the frames themselves are fastmesh._ext.push's. The
names of all keys stand here and nowhere else. Everything is pure. Parsers raise ValueError that
names the key, the value and what would be right; they look at no key that they do not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from fastmesh import limits

VERSION = "1"
"""Of the protocol; fm.protocol of a hello."""

# --- keys -----------------------------------------------------------------------------------------

OP = "fm.op"
RESULT = "fm.result"
RETRY_MS = "fm.retry_ms"
REASON = "fm.reason"
PROTOCOL = "fm.protocol"
APP = "fm.app"
CLIENT = "fm.client"
GROUP = "fm.group"
TOPIC = "fm.topic"
ROLE = "fm.role"
PREFETCH = "fm.prefetch"
MODE = "fm.mode"
ORDERED = "fm.ordered"
EPOCH = "fm.epoch"
PART = "fm.part"
PARTS = "fm.parts"
ID = "fm.id"
KEY = "fm.key"
COLOUR = "fm.colour"
LANE = "fm.lane"
MESSAGE_VERSION = "fm.version"
BORN_MS = "fm.born_ms"
TRACE = "fm.trace"
ATTEMPT = "fm.attempt"
DELAY_MS = "fm.delay_ms"
IDEMPOTENT = "fm.idempotent"
TX = "fm.tx"
BROKER = "fm.broker"
HOP = "fm.hop"
ORIGIN = "fm.origin"
FILTER = "fm.filter."
"""Before a group's name: its filter expression."""
USER = "h."
"""Before a user header's name."""

# --- words ----------------------------------------------------------------------------------------

HELLO = "hello"
SUBSCRIBE = "subscribe"
ANNOUNCE = "announce"
SUSPEND = "suspend"
RESUME = "resume"
GOAWAY = "goaway"
PUBLISH = "publish"
DELIVER = "deliver"
CHECK = "check"
FORWARD = "forward"

CONSUMED = "consumed"
LATER = "later"
NO_CONSUMER = "no_consumer"
REJECT = "reject"
COMMIT = "commit"
ROLLBACK = "rollback"
UNKNOWN = "unknown"
RESULTS = (CONSUMED, LATER, NO_CONSUMER, REJECT, COMMIT, ROLLBACK, UNKNOWN)

PREPARE = "prepare"
PHASES = (PREPARE, COMMIT, ROLLBACK)
ROLES = (SUBSCRIBE, PUBLISH)
CLUSTER = "cluster"
BROADCAST = "broadcast"
MODES = (CLUSTER, BROADCAST)
OVERLOAD = "overload"
"""The one fm.reason that programs read: with "later" it says that no consumer has seen this
attempt, so that it does not count as one."""

_NAME = re.compile(rf"[A-Za-z0-9_.:@/%-]{{1,{limits.MESH_NAME_CHARS_MAX}}}")
_NAME_RULE = f'must be 1..{limits.MESH_NAME_CHARS_MAX} letters, digits or any of "_.:@/%-"'
_DIGITS = re.compile(r"[0-9]{1,16}")

# What is said from hop to hop, and no part of the message.
_NOT_CARRIED = frozenset(
    {OP, GROUP, TX, BROKER, DELAY_MS, IDEMPOTENT} | {ATTEMPT, HOP, ORIGIN, RESULT, RETRY_MS, REASON}
)


def carried(headers: Mapping[str, str]) -> dict[str, str]:
    """Of a publish what belongs to the message: stored by a broker, and delivered as it is.

    The rest is between two parties; from a producer it could send a delivery astray.
    """
    return {key: value for key, value in headers.items() if key not in _NOT_CARRIED}


def answer(
    result: str, reason: str = "", *, retry_ms: int | None = None, **more: str
) -> dict[str, str]:
    """Headers of an answer; `protocol="1"` among `more` is fm.protocol. Reasons are cut, not
    refused."""
    said = {RESULT: result}
    if result == LATER or retry_ms is not None:
        said[RETRY_MS] = str(min(retry_ms or 0, limits.MESSAGE_RETRY_MS_MAX))
    if reason:
        raw = reason.encode(errors="replace")[: limits.REASON_BYTES_MAX]
        said[REASON] = raw.decode(errors="ignore")
    return said | {f"fm.{key}": value for key, value in more.items()}


def retry_ms(headers: Mapping[str, str]) -> int:
    """fm.retry_ms of somebody else's answer: 0 where there is none or no number, at most a day."""
    text = headers.get(RETRY_MS, "")
    return min(int(text), limits.MESSAGE_RETRY_MS_MAX) if _DIGITS.fullmatch(text) else 0


# --- hello ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """Who speaks on this connection: a client with its application, or a node, whose name is
    `client` (`app` is "" where it serves several)."""

    app: str
    client: str
    protocol: str = VERSION

    @property
    def understood(self) -> bool:
        return self.protocol == VERSION

    def headers(self) -> dict[str, str]:
        said = {OP: HELLO, PROTOCOL: self.protocol, CLIENT: self.client}
        return {**said, APP: self.app} if self.app else said

    def answer(self) -> dict[str, str]:
        """The answer of one that speaks version 1: consumed, or reject with what it understands."""
        if self.understood:
            return answer(CONSUMED, protocol=VERSION)
        reason = f"{PROTOCOL} is {_shown(self.protocol)}; understood: {VERSION}"
        return answer(REJECT, reason, protocol=VERSION)

    @classmethod
    def parse(cls, headers: Mapping[str, str]) -> Hello:
        """Of another version only fm.protocol is looked at: the rest is that version's to say."""
        protocol = headers.get(PROTOCOL, "")
        app, client = headers.get(APP, ""), headers.get(CLIENT, "")
        if protocol == VERSION:
            _name(CLIENT, client)
            if app:
                _name(APP, app)
        return cls(app, client, protocol)


# --- subscribe ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Subscribe:
    """The whole set of groups of a connection, each with its prefetch; None = the registration's.
    Either all have one or none."""

    groups: Mapping[str, int | None]

    def headers(self) -> dict[str, str]:
        """Raises ValueError when some groups have a prefetch and some do not."""
        said = {OP: SUBSCRIBE, GROUP: ",".join(self.groups)}
        given = [number for number in self.groups.values() if number is not None]
        if given and len(given) != len(self.groups):
            raise ValueError(f"{PREFETCH}: some groups have one and some do not; all must or none")
        if given:
            one = len(set(given)) == 1
            said[PREFETCH] = str(given[0]) if one else ",".join(map(str, given))
        return said

    @classmethod
    def parse(cls, headers: Mapping[str, str]) -> Subscribe:
        names = _groups(headers)
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{GROUP}: {_shown(twice)} stands there twice; once is right")
        numbers = _list(headers, PREFETCH)
        if not numbers:
            return cls(dict.fromkeys(names))
        if len(numbers) == 1:
            numbers *= len(names)
        if len(numbers) != len(names):
            raise ValueError(
                f"{PREFETCH}: {len(numbers)} numbers for {len(names)} groups;"
                " it must be one for all, or one for each"
            )
        most = limits.PREFETCH_MAX
        values = [_number(PREFETCH, number, 1, most) for number in numbers]
        return cls(dict(zip(names, values, strict=True)))


# --- announce -------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One role of one group in an announce. A group in both roles has two rows."""

    group: str
    topic: str
    role: str = SUBSCRIBE
    credit: int = 0
    """Deliveries that may be unanswered at a time: the sum of prefetch over live connections."""
    mode: str = CLUSTER
    ordered: bool = False
    filter: str = ""


@dataclass(frozen=True, slots=True)
class Announce:
    """One part of a full subscription. To a peer a row has nothing but its group."""

    epoch: int
    rows: tuple[Row, ...]
    part: int = 1
    parts: int = 1

    @classmethod
    def parse(cls, headers: Mapping[str, str]) -> Announce:
        """What a mesh tells a broker."""
        groups = _groups(headers)
        columns = [_list(headers, key) for key in (TOPIC, ROLE, PREFETCH, MODE, ORDERED)]
        for key, column in zip((TOPIC, ROLE, PREFETCH, MODE, ORDERED), columns, strict=True):
            if len(column) != len(groups):
                raise ValueError(
                    f"{key}: {len(column)} items for {len(groups)} groups; it must be one for each"
                )
        rows = []
        for group, topic, role, credit, mode, ordered in zip(groups, *columns, strict=True):
            expression = headers.get(FILTER + group, "") if role == SUBSCRIBE else ""
            if expression:
                try:
                    Filter.parse(expression)
                except ValueError as e:
                    raise ValueError(f"{FILTER}{_shown(group)}: {e}") from None
            rows.append(
                Row(
                    group,
                    _name(TOPIC, topic),
                    _one_of(ROLE, role, ROLES),
                    _number(PREFETCH, credit, 0, limits.CREDIT_MAX),
                    _one_of(MODE, mode, MODES),
                    _one_of(ORDERED, ordered, ("0", "1")) == "1",
                    expression,
                )
            )
        roles = [(row.group, row.role) for row in rows]
        if len(set(roles)) != len(roles):
            twice = next(role for role in roles if roles.count(role) > 1)
            raise ValueError(f"{GROUP}: {_shown(twice[0])} stands there twice as {twice[1]}")
        return cls(_epoch(headers), tuple(rows), *_part(headers))

    @classmethod
    def parse_peer(cls, headers: Mapping[str, str]) -> Announce:
        """What a node tells a peer: groups and no more."""
        rows = tuple(Row(name, "") for name in _groups(headers))
        return cls(_epoch(headers), rows, *_part(headers))


def announce_parts(
    rows: Iterable[Row],
    epoch: int,
    *,
    peer: bool = False,
    bytes_max: int = limits.HEADER_SECTION_BYTES_MAX,
) -> list[dict[str, str]]:
    """The headers of the frames that tell these rows, in order; at least one. Raises ValueError
    when they need more than ANNOUNCE_PARTS_MAX."""
    keys = (GROUP,) if peer else (GROUP, TOPIC, ROLE, PREFETCH, MODE, ORDERED)
    fixed = {OP: ANNOUNCE, EPOCH: str(epoch), PART: "999", PARTS: "999", **dict.fromkeys(keys, "")}
    room = bytes_max - sum(map(_pair_bytes, fixed, fixed.values()))
    chunks: list[list[Row]] = [[]]
    used = 0
    for row in rows:
        cost = sum(len(text) + 1 for text in _columns(row, peer))
        if row.filter and not peer:
            cost += _pair_bytes(FILTER + row.group, row.filter)
        if chunks[-1] and used + cost > room:
            chunks.append([])
            used = 0
        chunks[-1].append(row)
        used += cost
    if len(chunks) > limits.ANNOUNCE_PARTS_MAX:
        raise ValueError(
            f"announce: {len(chunks)} parts; there may be at most {limits.ANNOUNCE_PARTS_MAX}"
        )
    made = []
    for number, chunk in enumerate(chunks, 1):
        said = {**fixed, PART: str(number), PARTS: str(len(chunks))}
        columns = [_columns(row, peer) for row in chunk]
        for at, key in enumerate(keys):
            said[key] = ",".join(column[at] for column in columns)
        if not peer:
            said |= {FILTER + row.group: row.filter for row in chunk if row.filter}
        made.append(said)
    return made


class Assembler:
    """Parts of announces in, whole ones out: what a receiver keeps per connection."""

    def __init__(self) -> None:
        self.epoch = -1
        """Of the last one that was whole."""
        self._epoch = -1
        self._parts: dict[int, Announce] = {}

    def add(self, part: Announce) -> tuple[Row, ...] | None:
        """All rows, when this part was the last that was missing; else None.

        Parts may come in any order and more than once. A part of an announce that is whole, or of
        one before the newest, is late and says nothing. ValueError when the parts of one announce
        do not agree on their number.
        """
        if part.epoch < self._epoch or part.epoch <= self.epoch:
            return None
        if part.epoch > self._epoch:
            self._epoch, self._parts = part.epoch, {}
        for other in self._parts.values():
            if other.parts != part.parts:
                raise ValueError(
                    f"{PARTS}: {part.parts} after {other.parts} in epoch {part.epoch};"
                    " it must be the same in all parts"
                )
        self._parts[part.part] = part
        if len(self._parts) < part.parts:
            return None
        whole = [self._parts[number] for number in sorted(self._parts)]
        self.epoch, self._parts = part.epoch, {}
        return tuple(row for one in whole for row in one.rows)

    def parts(self) -> list[Announce]:
        """Of the announce that is not whole: with them and `epoch`, another one goes on."""
        return [self._parts[number] for number in sorted(self._parts)]

    @classmethod
    def going_on(cls, epoch: int, parts: Iterable[Announce]) -> Assembler:
        """Raises ValueError when one of the parts is late, or makes the announce whole."""
        made = cls()
        made.epoch = made._epoch = epoch
        for part in parts:
            if part.epoch <= epoch or made.add(part) is not None:
                raise ValueError(f"{PART}: {part.part} is not of an announce that is not whole")
        return made


# --- publish --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Publish:
    """What a broker must know of a publish; `carried` says what it stores."""

    topic: str
    id: str
    group: str = ""
    """The publisher group; a prepare needs one."""
    key: str | None = None
    delay_ms: int = 0
    idempotent: bool = False
    tx: str = ""
    """prepare, commit, rollback; "" outside transactions."""
    broker: str = ""
    """Of a commit or rollback: who has what was prepared."""

    @classmethod
    def parse(cls, headers: Mapping[str, str]) -> Publish:
        tx = headers.get(TX, "")
        if tx:
            _one_of(TX, tx, PHASES)
        group = headers.get(GROUP, "")
        if group:
            _name(GROUP, group)
        elif tx == PREPARE:
            raise ValueError(f"{GROUP}: missing; a prepare names who is asked about its fate")
        for key in (KEY, COLOUR, LANE, MESSAGE_VERSION):
            _bytes(key, headers.get(key, ""), 0, limits.MESSAGE_KEY_BYTES_MAX)
        if BORN_MS in headers:
            _number(BORN_MS, headers[BORN_MS], 0, limits.NUMBER_MAX)
        delay_ms = _number(DELAY_MS, headers.get(DELAY_MS, "0"), 0, limits.DELAY_MS_MAX)
        if delay_ms and tx:
            raise ValueError(f"{DELAY_MS}: {delay_ms} with {TX} {tx}; it must be one or the other")
        return cls(
            _name(TOPIC, headers.get(TOPIC, "")),
            _bytes(ID, headers.get(ID, ""), 1, limits.MESSAGE_ID_BYTES_MAX),
            group,
            headers.get(KEY),
            delay_ms,
            _one_of(IDEMPOTENT, headers.get(IDEMPOTENT, "0"), ("0", "1")) == "1",
            tx,
            headers.get(BROKER, ""),
        )


# --- filter ---------------------------------------------------------------------------------------

_ATTRIBUTES = {"colour": COLOUR, "lane": LANE, "version": MESSAGE_VERSION, "key": KEY}
_FILTER_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which messages of its topic a group wants: `colour=blue|green&region=eu`.

    Two that want the same are equal, however they are written.
    """

    terms: tuple[tuple[str, frozenset[str]], ...]
    """(header key, its alternatives), all of which must hold; sorted by key."""
    text: str = field(default="", compare=False)
    """As it was written."""

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Raises ValueError."""
        _bytes("filter", text, 1, limits.FILTER_CHARS_MAX)
        parts = text.split("&")
        if len(parts) > limits.FILTER_TERMS_MAX:
            raise ValueError(
                f"filter: {len(parts)} terms; there may be at most {limits.FILTER_TERMS_MAX}"
            )
        terms: dict[str, frozenset[str]] = {}
        for part in parts:
            name, equals, values = part.partition("=")
            if not equals or _FILTER_NAME.fullmatch(name) is None:
                raise ValueError(
                    f"filter: {_shown(part)}; a term must be name=value, its name letters, digits"
                    ' or any of "_.-"'
                )
            key = _ATTRIBUTES.get(name, USER + name)
            if key in terms:
                raise ValueError(
                    f"filter: {name} stands there twice; alternatives are written {name}=a|b"
                )
            alternatives = values.split("|")
            if len(alternatives) > limits.FILTER_VALUES_MAX:
                raise ValueError(
                    f"filter: {len(alternatives)} alternatives of {name};"
                    f" there may be at most {limits.FILTER_VALUES_MAX}"
                )
            terms[key] = frozenset(_unescaped(value) for value in alternatives)
        return cls(tuple(sorted(terms.items(), key=lambda term: term[0])), text)

    def matches(self, headers: Mapping[str, str]) -> bool:
        """Whether all terms hold; one whose header is absent does not."""
        return all(headers.get(key) in values for key, values in self.terms)


def _unescaped(value: str) -> str:
    if "=" in value:
        raise ValueError(f'filter: {_shown(value)} has a "=" of its own; it must be written %3D')
    if "%" not in value:
        return value
    if _ESCAPE.search(value):
        raise ValueError(
            f"filter: {_shown(value)}; a % must be followed by two hexadecimal digits,"
            " and one of its own is written %25"
        )
    try:
        return unquote_to_bytes(value).decode()
    except UnicodeDecodeError:
        raise ValueError(f"filter: {_shown(value)}; what % spells must be UTF-8") from None


# --- values ---------------------------------------------------------------------------------------


def _shown(text: str) -> str:
    """A value that somebody else sent, as part of a message for people."""
    most = limits.REMOTE_BYTES_SHOWN_MAX
    return ascii(text if len(text) <= most else text[:most] + "...")


def _name(key: str, text: str) -> str:
    if not text:
        raise ValueError(f"{key}: missing; it {_NAME_RULE}")
    if _NAME.fullmatch(text) is None:
        raise ValueError(f"{key}: {_shown(text)}; it {_NAME_RULE}")
    return text


def _bytes(key: str, text: str, low: int, high: int) -> str:
    size = len(text.encode(errors="surrogatepass"))
    if not low <= size <= high:
        raise ValueError(f"{key}: {size} bytes; it must have {low}..{high}")
    return text


def _number(key: str, text: str, low: int, high: int) -> int:
    if _DIGITS.fullmatch(text) is None or not low <= int(text) <= high:
        raise ValueError(f"{key}: {_shown(text)}; it must be a decimal number {low}..{high}")
    return int(text)


def _one_of(key: str, text: str, words: tuple[str, ...]) -> str:
    if text not in words:
        raise ValueError(f"{key}: {_shown(text)}; it must be one of {', '.join(words)}")
    return text


def _list(headers: Mapping[str, str], key: str) -> list[str]:
    text = headers.get(key, "")
    return text.split(",") if text else []


def _groups(headers: Mapping[str, str]) -> list[str]:
    names = _list(headers, GROUP)
    for name in names:
        _name(GROUP, name)
    return names


def _epoch(headers: Mapping[str, str]) -> int:
    return _number(EPOCH, headers.get(EPOCH, ""), 0, limits.NUMBER_MAX)


def _part(headers: Mapping[str, str]) -> tuple[int, int]:
    most = limits.ANNOUNCE_PARTS_MAX
    parts = _number(PARTS, headers.get(PARTS, "1"), 1, most)
    return _number(PART, headers.get(PART, "1"), 1, parts), parts


def _columns(row: Row, peer: bool) -> tuple[str, ...]:
    if peer:
        return (row.group,)
    credit = str(min(row.credit, limits.CREDIT_MAX))
    return (row.group, row.topic, row.role, credit, row.mode, "1" if row.ordered else "0")


def _pair_bytes(key: str, value: str) -> int:
    return 8 + len(key.encode()) + len(value.encode())
