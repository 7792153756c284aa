"""docs/protocol/mesh-push.md says what the code does: its examples, byte for byte, and its limits.

A block that begins with "```hex NAME" is one frame. Its lines are bytes, then two spaces, then
what they are; the first says the fixed header, the next the three lengths, then come the class, the
pairs of the header section, the content and the CRC. Each frame is read by the native code and by
the twin, and built again from the words alone.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from fastmesh import limits
from fastmesh._ext import bolt as codec
from fastmesh._ext import push as native
from fastmesh.protocols import push as words
from tests.reference import bolt
from tests.reference import push as twin
from tests.support import feed_three_ways, truncate_everywhere

DOCUMENT = (Path(__file__).parents[2] / "docs/protocol/mesh-push.md").read_text()
BLOCK = re.compile(r"^```hex (\w+)\n(.*?)\n```$", re.S | re.M)
DELIVERY = 4


class Example(NamedTuple):
    data: bytes
    fixed: dict[str, int]
    """Of the fixed header: proto, ver1, type, cmdcode, ver2, id, codec, switch, timeout, status."""
    sizes: tuple[int, ...]
    class_name: bytes
    headers: dict[str, str]
    content: bytes
    crc: bool

    @property
    def dialect(self) -> int:
        return self.fixed.get("ver1", 0)


def example(text: str) -> Example:
    """Reads the words of a block, and takes its bytes from the hexadecimal digits alone."""
    rows = []
    for line in text.split("\n"):
        found = re.fullmatch(r"([0-9a-f ]+?)(?:  +(\S.*))?", line)
        assert found, line
        rows.append((found[1], found[2]))
    digits = "".join(digits for digits, _ in rows)
    first, sizes, *said = [word for _, word in rows if word is not None]
    fixed = {
        name: int(value)
        for name, value in re.findall(r"(\w+) (-?\d+)(?: \([a-z -]+\))?(?:, |$)", first)
    }
    class_name, headers, content, crc = b"", {}, b"", False
    for line in said:
        if pair := re.fullmatch(r"((?:fm|h)\.\S+): (.*)", line):
            headers[pair[1]] = pair[2]
        elif line.startswith("content "):
            content = line.removeprefix("content ").encode()
        elif line == "CRC-32":
            crc = True
        else:
            assert not class_name
            class_name = line.encode()
    numbers = re.fullmatch(r"class (\d+), headers (\d+), content (\d+) bytes", sizes)
    assert numbers, sizes
    return Example(
        bytes.fromhex(digits),
        fixed,
        tuple(map(int, numbers.groups())),
        class_name,
        headers,
        content,
        crc,
    )


EXAMPLES = {name: example(text) for name, text in BLOCK.findall(DOCUMENT)}


def frame_of(name: str) -> bolt.Frame:
    (frame,) = bolt.frames(EXAMPLES[name].data)
    return frame


def test_no_block_is_overlooked() -> None:
    assert len(EXAMPLES) == DOCUMENT.count("```hex") > 25


@pytest.mark.parametrize("name", EXAMPLES)
def test_both_readers_find_what_is_said(name: str) -> None:
    said = EXAMPLES[name]
    frame = frame_of(name)
    fixed = {"proto": frame.proto, "type": frame.type, "cmdcode": frame.cmd, "ver2": frame.ver2}
    fixed |= {"id": frame.id, "codec": frame.codec}
    if frame.proto == 2:
        fixed |= {"ver1": frame.ver1, "switch": frame.switch}
    if frame.type == bolt.TYPE_RESPONSE:
        fixed["status"] = frame.status
    else:
        fixed["timeout"] = frame.timeout_ms
    assert fixed == said.fixed
    assert (len(frame.class_name), len(frame.headers), len(frame.content)) == said.sizes
    assert frame.class_name == said.class_name
    assert twin.headers_of(frame) == said.headers
    assert (frame.content, frame.crc is not None) == (said.content, said.crc)

    got = native.parse(said.data)
    assert (got.id, got.class_name) == (said.fixed["id"], said.class_name)
    assert (got.headers, got.content) == (said.headers, said.content)
    assert got.status == said.fixed.get("status", 0)
    assert got.timeout_ms == said.fixed.get("timeout", 0)
    kinds = {0: "response", 1: "request", 2: "oneway"}
    assert got.kind == kinds[said.fixed["type"]]
    assert native.read(said.data) == twin.read(frame)


@pytest.mark.parametrize("name", EXAMPLES)
def test_built_again_from_the_words(name: str) -> None:
    said = EXAMPLES[name]
    fixed = said.fixed
    by_twin = bolt.frame(
        proto=fixed["proto"],
        ver1=fixed.get("ver1", 0),
        type=fixed["type"],
        cmd=fixed["cmdcode"],
        ver2=fixed["ver2"],
        id=fixed["id"],
        codec=fixed["codec"],
        switch=fixed.get("switch", 0),
        timeout_ms=fixed.get("timeout", 0),
        status=fixed.get("status", 0),
        class_name=said.class_name,
        headers=bolt.encode_headers(said.headers),
        content=said.content,
    )
    assert by_twin == said.data
    if fixed["type"] != bolt.TYPE_RESPONSE:
        made = native.request(
            fixed["id"],
            said.headers,
            said.content,
            timeout_ms=fixed["timeout"],
            oneway=fixed["type"] == bolt.TYPE_ONEWAY,
            dialect=said.dialect,
            crc=said.crc,
        )
        assert made == said.data
    elif said.class_name:
        hint = native.parse(said.data).hint
        made = native.response(
            fixed["id"], hint, said.headers, said.content, status=fixed["status"]
        )
        assert made == said.data


@pytest.mark.parametrize("name", EXAMPLES)
def test_cut_short_and_in_pieces(name: str) -> None:
    truncate_everywhere(codec.scan, EXAMPLES[name].data)
    feed_three_ways(codec.scan, [EXAMPLES[name].data] * 2, trailing=EXAMPLES[name].data[:-1])


def test_every_op_and_every_result_has_an_example() -> None:
    read = [native.read(said.data) for said in EXAMPLES.values()]
    ops = {found.op for found in read if found is not None}
    results = {found.result for found in read if found is not None}
    assert ops == {op.decode() for op in twin.OPS} | {None}
    assert results == {result.decode() for result in twin.RESULTS} | {None}


def test_examples_mean_what_they_should() -> None:
    hello = words.Hello.parse(EXAMPLES["hello"].headers)
    assert hello == words.Hello("demo", "demo-1")
    assert hello.headers() | EXAMPLES["hello"].headers == EXAMPLES["hello"].headers
    assert hello.answer() == EXAMPLES["hello_answer"].headers
    other = words.Hello.parse(EXAMPLES["hello_other_version"].headers)
    assert other.answer() == EXAMPLES["hello_refused"].headers
    subscribe = words.Subscribe.parse(EXAMPLES["subscribe"].headers)
    assert subscribe.groups == {"billing": 16, "audit": 4}
    assert subscribe.headers() == EXAMPLES["subscribe"].headers
    announce = words.Announce.parse(EXAMPLES["announce"].headers)
    assert words.announce_parts(announce.rows, 7) == [EXAMPLES["announce"].headers]
    peer = words.Announce.parse_peer(EXAMPLES["announce_peer"].headers)
    assert words.announce_parts(peer.rows, 3, peer=True) == [EXAMPLES["announce_peer"].headers]
    for name in ("publish", "prepare", "commit"):
        words.Publish.parse(EXAMPLES[name].headers)
    assert words.Publish.parse(EXAMPLES["commit"].headers).broker == "b1"


def test_a_delivery_carries_what_was_published() -> None:
    stored = words.carried(EXAMPLES["publish"].headers)
    between = {"fm.op": "deliver", "fm.group": "billing", "fm.attempt": "1"}
    assert EXAMPLES["deliver"].headers == stored | between
    assert EXAMPLES["deliver"].content == EXAMPLES["publish"].content


def test_the_forward_is_the_native_one() -> None:
    deliver, forward = EXAMPLES["deliver_v2_crc"].data, EXAMPLES["forward_v2_crc"].data
    assert native.forward(deliver, b"node-1") == forward
    assert twin.forward(frame_of("deliver_v2_crc"), b"node-1") == forward
    given = native.parse(native.as_deliver(forward))
    assert given.headers == EXAMPLES["forward_v2_crc"].headers | {"fm.op": "deliver"}


def test_answers_of_a_mesh_are_the_native_ones() -> None:
    publish = native.parse(EXAMPLES["publish"].data)
    for name, cause in (
        ("publish_reject", "no_route"),
        ("publish_later", "no_endpoint"),
        ("ambiguous", "deadline"),
    ):
        assert native.answer(publish.id, publish.hint, cause) == EXAMPLES[name].data
    deliver = native.parse(EXAMPLES["deliver"].data)
    for name, cause in (("no_consumer", "no_route"), ("later", "overload")):
        made = native.answer(deliver.id, deliver.hint | DELIVERY, cause)
        assert made == EXAMPLES[name].data


# ---------------------------------------------------------------------------- what the text says

LIMIT = re.compile(r"^\| [^|]+ \| ([^|]+) \| `([A-Z_]+)` \|$", re.M)


def test_limits_are_those_of_the_code() -> None:
    rows = LIMIT.findall(DOCUMENT)
    assert len(rows) > 12
    for text, name in rows:
        assert str(getattr(limits, name)) in re.findall(r"\d+", text), (name, text)


def test_every_key_is_in_the_specification() -> None:
    keys = [value for name, value in vars(words).items() if name.isupper() and is_key(value)]
    assert len(keys) > 25
    for key in keys:
        assert f"`{key}" in DOCUMENT, key


def is_key(value: object) -> bool:
    return isinstance(value, str) and value.startswith("fm.")


def test_what_is_not_carried_is_what_the_document_lists() -> None:
    listed = re.search(r"`(fm\.op fm\.group [a-z_. ]+)` are between", " ".join(DOCUMENT.split()))
    assert listed
    keys = listed[1].split()
    assert words.carried(dict.fromkeys(keys, "x")) == {}
    every = {value for value in vars(words).values() if is_key(value)}
    assert set(words.carried(dict.fromkeys(every, "x"))) == every - set(keys)


def test_filters_of_the_document_are_filters() -> None:
    found = words.Filter.parse("colour=blue|green&region=eu")
    assert f"`{found.text}`" in DOCUMENT
    assert found.matches(EXAMPLES["deliver"].headers)


def test_links_within_the_document_lead_somewhere() -> None:
    def anchor(heading: str) -> str:
        return re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")

    headings = {anchor(text) for text in re.findall(r"^#+ (.+)$", DOCUMENT, re.M)}
    links = re.findall(r"\]\(#([^)]+)\)", DOCUMENT)
    assert len(links) > 12
    assert set(links) <= headings
