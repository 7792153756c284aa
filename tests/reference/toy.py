"""The toy protocol in plain Python: the oracle of tests/toy/toy.pyx, which has the grammar.

`decode` reads one frame, or one part of one when a `Body` remembers that a body is under way. It is
written with splits and regular expressions, from the grammar and not from the native code.
"""

import re
from dataclasses import dataclass
from typing import Final, NamedTuple

FRAME_BYTES_MAX: Final = 4 * 1024 * 1024
LINE_MAX: Final = 256
ID_TEXT_MAX: Final = 15

VERBS: Final = {
    b"ask": "request",
    b"tell": "oneway",
    b"ans": "response",
    b"beat": "heartbeat",
    b"back": "heartbeat_ack",
    b"bye": "goaway",
}
WORDS: Final = {"request": 3, "oneway": 3, "response": 2}  # after verb and id, headers apart


class Part(NamedTuple):
    """A frame (`first` and `last`) or a part of one. `data` is all of it, line and sizes too."""

    kind: str
    id: bytes  # b"" where there is none
    service: bytes | None
    timeout_ms: int
    status: int
    headers: bytes
    first: bool
    last: bool
    data: bytes


class Malformed(NamedTuple):
    reason: str  # "protocol", "type", "command", "length", "too_large"
    id: bytes = b""
    answerable: bool = False


class NeedMore(NamedTuple):
    need: int


class HeaderError(ValueError):
    """A word after the body that is no key=value."""


@dataclass
class Body:
    """What a connection remembers between parts."""

    kind: str | None = None  # of the frame whose body is under way


def _number(word: bytes) -> int | None:
    return int(word) if re.fullmatch(rb"[0-9]{1,9}", word) else None


def _chunk(data: bytes, at: int, limit: int) -> tuple[int, bool] | str | NeedMore:
    """End of the chunk at `at` and whether it was the last one, or what is wrong with it."""
    found = re.compile(rb"([0-9]{0,9})").match(data, at)
    assert found is not None
    if found.end() == len(data):
        return NeedMore(len(data) + 1)
    if data[found.end()] != ord("\n") or not found[1]:
        return "length"
    end = found.end() + 1 + int(found[1])
    if end > limit:
        return "too_large"
    if end > len(data):
        return NeedMore(end)
    return end, int(found[1]) == 0


def decode(
    data: bytes,
    frame_bytes_max: int = FRAME_BYTES_MAX,
    *,
    by_order: bool = False,
    body: Body | None = None,
) -> Part | Malformed | NeedMore:
    """The frame that `data` starts with; in parts when there is a `body` to remember them by."""
    if body is not None and body.kind is not None:
        got = _chunk(data, 0, frame_bytes_max)
        if isinstance(got, str):
            return Malformed(got)
        if isinstance(got, NeedMore):
            return got
        end, last = got
        part = Part(body.kind, b"", None, 0, 0, b"", False, last, data[:end])
        if last:
            body.kind = None
        return part

    ended = re.match(rb"([ -~]*)\n", data[:LINE_MAX])
    if ended is None:
        if re.search(rb"[^ -~]", data[:LINE_MAX]):
            return Malformed("protocol")
        return Malformed("length") if len(data) >= LINE_MAX else NeedMore(len(data) + 1)
    size = ended.end()
    verb, *words = ended[1].split(b" ")
    kind = VERBS.get(verb)
    if kind is None:
        return Malformed("type")
    id = b""
    if not by_order and kind != "goaway":
        if not words or not re.fullmatch(rb"[0-9]+", words[0]):
            return Malformed("command")
        id = words.pop(0)
        if len(id) > ID_TEXT_MAX:
            return Malformed("length")

    def refuse(reason: str) -> Malformed:
        return Malformed(reason, id, True) if kind == "request" else Malformed(reason)

    wanted = WORDS.get(kind, 0)
    if len(words) < wanted or b"" in words[:wanted] or (not wanted and words):
        return refuse("command")
    service = None
    timeout_ms = status = 0
    if wanted:
        number = _number(words[wanted - 2])
        if number is None or (kind == "response" and number > 65535):
            return refuse("command")
        if kind == "response":
            status = number
        else:
            timeout_ms = number
            service = None if words[0] == b"-" else words[0]
    headers = b" ".join(words[wanted:])

    def part(end: int, last: bool) -> Part:
        return Part(kind, id, service, timeout_ms, status, headers, True, last, data[:end])

    if wanted and words[wanted - 1] == b"*":
        if size > frame_bytes_max:
            return refuse("too_large")
        if body is not None:
            body.kind = kind
            return part(size, False)
        last = False
        while not last:
            chunk = _chunk(data, size, frame_bytes_max)
            if isinstance(chunk, str):
                return refuse(chunk)
            if isinstance(chunk, NeedMore):
                return chunk
            size, last = chunk
    elif wanted:
        number = _number(words[wanted - 1])
        if number is None:
            return refuse("length")
        size += number
    if size > frame_bytes_max:
        return refuse("too_large")
    if size > len(data):
        return NeedMore(size)
    return part(size, True)


def header_of(part: Part, key: bytes) -> bytes | None:
    """The value of the first `key`. Raises HeaderError for a word before it that has no key."""
    if not part.headers:
        return None
    for word in part.headers.split(b" "):
        name, equals, value = word.partition(b"=")
        if not equals or not name:
            raise HeaderError(word)
        if name == key:
            return value
    return None


def patch_id(part: Part, id: bytes) -> bytes:
    """The same with another id, which may be longer or shorter. Without one nothing changes."""
    return re.sub(rb"^([a-z]+) [0-9]+", rb"\1 " + id, part.data) if part.id else part.data


def ask(
    id: int | str | None,
    service: str = "-",
    content: bytes | list[bytes] = b"",
    *,
    timeout_ms: int = 3000,
    verb: str = "ask",
    **headers: str,
) -> bytes:
    """A request; `id` None is the grammar by order, a list of chunks streams the body."""
    return _frame(verb, id, f" {service} {timeout_ms}", content, headers)


def answer(
    id: int | str | None,
    content: bytes | list[bytes] = b"",
    *,
    status: int = 0,
    **headers: str,
) -> bytes:
    return _frame("ans", id, f" {status}", content, headers)


def beat(id: int | str | None, verb: str = "beat") -> bytes:
    return (verb if id is None else f"{verb} {id}").encode() + b"\n"


def _frame(
    verb: str,
    id: int | str | None,
    words: str,
    content: bytes | list[bytes],
    headers: dict[str, str],
) -> bytes:
    size = str(len(content)) if isinstance(content, bytes) else "*"
    named = "".join(f" {key}={value}" for key, value in headers.items())
    line = f"{verb}{'' if id is None else f' {id}'}{words} {size}{named}\n".encode()
    if isinstance(content, bytes):
        return line + content
    return line + b"".join(b"%d\n%b" % (len(chunk), chunk) for chunk in [*content, b""])
