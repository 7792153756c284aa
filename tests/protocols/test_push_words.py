"""What the header maps of the message mesh say: parsed, built again, refused with a reason."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmesh import limits
from fastmesh._ext import push as frames
from fastmesh.protocols import push
from fastmesh.protocols.push import Announce, Assembler, Filter, Hello, Publish, Row, Subscribe

LONGEST = "n" * 127
NAMES = st.text("abzAZ09_.:@/%-", min_size=1, max_size=127)
BAD_NAMES = ["a b", "a,b", "ä", "a\n", "a&b", "n" * 128, "a=b", "a\x00"]


# ------------------------------------------------------------------------------------------ hello


def test_hello_there_and_back() -> None:
    said = Hello("demo", "demo-1")
    assert said.headers() == {
        "fm.op": "hello",
        "fm.protocol": "1",
        "fm.app": "demo",
        "fm.client": "demo-1",
    }
    assert Hello.parse(said.headers()) == said
    assert said.understood
    assert said.answer() == {"fm.result": "consumed", "fm.protocol": "1"}
    node = Hello("", "node-1")
    assert "fm.app" not in node.headers()
    assert Hello.parse(node.headers()) == node


@pytest.mark.parametrize("version", ["", "0", "2", "1.0", "01", " 1", "one"])
def test_another_version_is_refused_with_those_understood(version: str) -> None:
    # What else it says is its own business: not even its names are looked at.
    said = Hello.parse({"fm.protocol": version, "fm.app": "a b", "fm.client": ""})
    assert not said.understood
    answer = said.answer()
    assert (answer["fm.result"], answer["fm.protocol"]) == ("reject", "1")
    assert "understood: 1" in answer["fm.reason"]


@pytest.mark.parametrize("bad", BAD_NAMES)
def test_hello_refuses_names(bad: str) -> None:
    with pytest.raises(ValueError, match=r"^fm.client: .*; it must be 1..127 letters"):
        Hello.parse({"fm.protocol": "1", "fm.app": "demo", "fm.client": bad})
    with pytest.raises(ValueError, match=r"^fm.app: .*; it must be 1..127 letters"):
        Hello.parse({"fm.protocol": "1", "fm.app": bad, "fm.client": "demo-1"})


def test_hello_needs_a_client() -> None:
    with pytest.raises(ValueError, match=r"^fm.client: missing; it must be 1..127"):
        Hello.parse({"fm.protocol": "1", "fm.app": "demo"})


# -------------------------------------------------------------------------------------- subscribe


@pytest.mark.parametrize(
    ("groups", "names", "prefetch"),
    [
        ({}, "", None),
        ({"a": None}, "a", None),
        ({"a": None, "b": None}, "a,b", None),
        ({"a": 16, "b": 16}, "a,b", "16"),
        ({"a": 16, "b": 1}, "a,b", "16,1"),
        ({LONGEST: 65535}, LONGEST, "65535"),
    ],
)
def test_subscribe_there_and_back(
    groups: dict[str, int | None], names: str, prefetch: str | None
) -> None:
    said = Subscribe(groups)
    headers = said.headers()
    assert (headers["fm.op"], headers["fm.group"]) == ("subscribe", names)
    assert headers.get("fm.prefetch") == prefetch
    assert Subscribe.parse(headers) == said
    assert list(Subscribe.parse(headers).groups) == list(groups)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"fm.group": "a,,b"}, "fm.group: missing; it must be 1..127"),
        ({"fm.group": "a,"}, "fm.group: missing"),
        ({"fm.group": "a, b"}, "fm.group: ' b'; it must be"),
        ({"fm.group": "a,b,a"}, "fm.group: 'a' stands there twice"),
        ({"fm.group": "a,b,c", "fm.prefetch": "1,2"}, "fm.prefetch: 2 numbers for 3 groups"),
        ({"fm.prefetch": "1,2"}, "fm.prefetch: 2 numbers for 0 groups"),
        ({"fm.group": "a", "fm.prefetch": "0"}, "fm.prefetch: '0'; it must be .* 1..65535"),
        ({"fm.group": "a", "fm.prefetch": "65536"}, "fm.prefetch: '65536'"),
        ({"fm.group": "a", "fm.prefetch": "-1"}, "fm.prefetch: '-1'"),
        ({"fm.group": "a", "fm.prefetch": "1.5"}, "fm.prefetch: '1.5'"),
        ({"fm.group": "a", "fm.prefetch": "\u0661"}, r"fm.prefetch: '\\u0661'"),
        ({"fm.group": "a,b", "fm.prefetch": "1,"}, "fm.prefetch: ''"),
        ({"fm.group": "a", "fm.prefetch": "9" * 99}, "fm.prefetch: '9{64}\\.\\.\\.'"),
    ],
)
def test_subscribe_refuses(headers: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Subscribe.parse(headers)


def test_subscribe_has_a_prefetch_for_all_groups_or_none() -> None:
    with pytest.raises(ValueError, match=r"fm.prefetch: some groups have one"):
        Subscribe({"a": 1, "b": None}).headers()


# --------------------------------------------------------------------------------------- announce

ROWS = (
    Row("billing", "orders", "subscribe", 48, "cluster", True, "colour=blue|green&region=eu"),
    Row("billing", "orders", "publish"),
    Row("audit", "orders", "subscribe", 16, "broadcast"),
)


def test_announce_there_and_back() -> None:
    (headers,) = push.announce_parts(ROWS, 7)
    assert headers == {
        "fm.op": "announce",
        "fm.epoch": "7",
        "fm.part": "1",
        "fm.parts": "1",
        "fm.group": "billing,billing,audit",
        "fm.topic": "orders,orders,orders",
        "fm.role": "subscribe,publish,subscribe",
        "fm.prefetch": "48,0,16",
        "fm.mode": "cluster,cluster,broadcast",
        "fm.ordered": "1,0,0",
        "fm.filter.billing": "colour=blue|green&region=eu",
    }
    assert Announce.parse(headers) == Announce(7, ROWS)


def test_announce_of_nothing() -> None:
    (headers,) = push.announce_parts([], 1)
    assert headers["fm.group"] == ""
    assert Announce.parse(headers) == Announce(1, ())
    (headers,) = push.announce_parts([], 1, peer=True)
    assert Announce.parse_peer(headers) == Announce(1, ())


def test_a_peer_is_told_groups_and_no_more() -> None:
    (headers,) = push.announce_parts(ROWS[1:], 9, peer=True)
    assert headers == {
        "fm.op": "announce",
        "fm.epoch": "9",
        "fm.part": "1",
        "fm.parts": "1",
        "fm.group": "billing,audit",
    }
    assert Announce.parse_peer(headers) == Announce(9, (Row("billing", ""), Row("audit", "")))


def test_part_and_parts_may_be_left_out() -> None:
    (headers,) = push.announce_parts(ROWS, 7)
    del headers["fm.part"], headers["fm.parts"]
    assert Announce.parse(headers) == Announce(7, ROWS)


def test_more_credit_than_a_number_holds_is_announced_as_the_most() -> None:
    (headers,) = push.announce_parts([Row("a", "t", credit=1 << 40)], 1)
    assert headers["fm.prefetch"] == str(2**31 - 1)
    assert Announce.parse(headers).rows[0].credit == 2**31 - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fm.epoch": ""}, "fm.epoch: ''; it must be a decimal number"),
        ({"fm.epoch": "-1"}, "fm.epoch: '-1'"),
        ({"fm.epoch": str(2**53)}, "fm.epoch: '9007199254740992'"),
        ({"fm.part": "0"}, "fm.part: '0'; it must be a decimal number 1..1"),
        ({"fm.part": "2"}, "fm.part: '2'"),
        ({"fm.parts": "257"}, "fm.parts: '257'; it must be a decimal number 1..256"),
        ({"fm.group": "billing,bill ing,audit"}, "fm.group: 'bill ing'"),
        ({"fm.topic": "orders,orders"}, "fm.topic: 2 items for 3 groups"),
        ({"fm.topic": "orders,,orders"}, "fm.topic: missing"),
        ({"fm.topic": "orders,orders,a b"}, "fm.topic: 'a b'"),
        ({"fm.role": "subscribe,publish,both"}, "fm.role: 'both'; it must be one of subscribe"),
        ({"fm.role": "subscribe,subscribe,subscribe"}, "fm.group: 'billing' stands there twice"),
        ({"fm.prefetch": "48,0,-1"}, "fm.prefetch: '-1'; it must be a decimal number 0..214748"),
        ({"fm.prefetch": "48,0,2147483648"}, "fm.prefetch: '2147483648'"),
        ({"fm.mode": "cluster,cluster,Broadcast"}, "fm.mode: 'Broadcast'"),
        ({"fm.ordered": "1,0,true"}, "fm.ordered: 'true'; it must be one of 0, 1"),
        ({"fm.filter.billing": "colour"}, "fm.filter.'billing': filter: 'colour'; a term must"),
    ],
)
def test_announce_refuses(change: dict[str, str], message: str) -> None:
    (headers,) = push.announce_parts(ROWS, 7)
    with pytest.raises(ValueError, match=message):
        Announce.parse(headers | change)


def many(count: int) -> list[Row]:
    draw = random.Random(count)
    rows = []
    for i in range(count):
        name = f"{i}-".ljust(draw.randrange(8, 128), "g")
        text = f"colour={'ü' * draw.randrange(0, 400)}" if draw.random() < 0.3 else ""
        rows.append(Row(name, "t" * draw.randrange(1, 128), credit=i, filter=text))
    return rows


@pytest.mark.parametrize("peer", [False, True])
@pytest.mark.parametrize("count", [1, 100, 1000, 4096])
def test_what_does_not_fit_into_one_frame_is_told_in_parts(peer: bool, count: int) -> None:
    rows = many(count)
    parts = push.announce_parts(rows, 3, peer=peer)
    assert (len(parts) > 1) == (count >= 1000)
    parse = Announce.parse_peer if peer else Announce.parse
    sizes = []
    told: list[Row] = []
    for number, headers in enumerate(parts, 1):
        frame = frames.parse(frames.request(1, headers))  # refuses more than 32767 bytes
        sizes.append(sum(8 + len(k.encode()) + len(v.encode()) for k, v in headers.items()))
        part = parse(frame.headers)
        assert (part.epoch, part.part, part.parts) == (3, number, len(parts))
        told += part.rows
    assert told == ([Row(row.group, "") for row in rows] if peer else rows)
    assert all(size > 30000 for size in sizes[:-1])  # full, but for what the next row needs


def test_the_most_that_a_node_may_have_fits_into_the_parts_there_may_be() -> None:
    name = "g" * 122
    rows = [
        Row(f"{name}{i:05}", "t" * 127, role, limits.CREDIT_MAX, "broadcast", True, text)
        for i in range(limits.GROUPS_MAX)
        for role, text in (("subscribe", "a=" + "x" * 1022), ("publish", ""))
    ]
    assert 128 < len(push.announce_parts(rows, 1)) <= limits.ANNOUNCE_PARTS_MAX
    with pytest.raises(ValueError, match="parts; there may be at most 256"):
        push.announce_parts(rows * 2, 1)


def test_parts_in_any_order_make_a_whole() -> None:
    rows = many(1000)
    parts = [Announce.parse(headers) for headers in push.announce_parts(rows, 3)]
    draw = random.Random(1)
    for _ in range(10):
        draw.shuffle(parts)
        assembler = Assembler()
        *before, last = [assembler.add(part) for part in [*parts[:3], *parts]]
        assert before == [None] * len(before)
        assert last == tuple(rows)
        assert [assembler.add(part) for part in parts] == [None] * len(parts)  # late


def test_a_newer_announce_replaces_parts_of_an_older_one() -> None:
    old = [Announce(3, (Row(str(i), "t"),), i, 2) for i in (1, 2)]
    new = [Announce(4, (Row(str(i), "u"),), i, 2) for i in (1, 2)]
    assembler = Assembler()
    assert assembler.add(old[0]) is None
    assert assembler.add(new[1]) is None
    assert assembler.add(old[1]) is None  # would have made the old one whole
    assert assembler.epoch == -1
    assert assembler.add(new[0]) == (Row("1", "u"), Row("2", "u"))
    assert assembler.epoch == 4
    assert assembler.add(Announce(3, ())) is None
    assert assembler.add(Announce(4, ())) is None
    assert assembler.add(Announce(5, ())) == ()


def test_parts_must_agree_on_their_number() -> None:
    assembler = Assembler()
    assembler.add(Announce(1, (), 1, 3))
    with pytest.raises(ValueError, match=r"fm.parts: 2 after 3 in epoch 1"):
        assembler.add(Announce(1, (), 2, 2))


# ---------------------------------------------------------------------------------------- publish

MESSAGE = {"fm.op": "publish", "fm.topic": "orders", "fm.id": "m-1"}


def test_publish() -> None:
    assert Publish.parse(MESSAGE) == Publish("orders", "m-1")
    more = {
        "fm.group": "billing",
        "fm.key": "",
        "fm.delay_ms": "5000",
        "fm.idempotent": "1",
        "fm.born_ms": "1764000000000",
    }
    assert Publish.parse(MESSAGE | more) == Publish("orders", "m-1", "billing", "", 5000, True)
    ends = {"fm.tx": "commit", "fm.broker": "b1"}
    assert Publish.parse(MESSAGE | ends) == Publish("orders", "m-1", tx="commit", broker="b1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fm.topic": ""}, "fm.topic: missing"),
        ({"fm.topic": "a b"}, "fm.topic: 'a b'"),
        ({"fm.id": ""}, "fm.id: 0 bytes; it must have 1..128"),
        ({"fm.id": "x" * 129}, "fm.id: 129 bytes"),
        ({"fm.id": "ü" * 65}, "fm.id: 130 bytes"),
        ({"fm.key": "k" * 256}, "fm.key: 256 bytes; it must have 0..255"),
        ({"fm.colour": "k" * 256}, "fm.colour: 256 bytes"),
        ({"fm.lane": "k" * 256}, "fm.lane: 256 bytes"),
        ({"fm.version": "k" * 256}, "fm.version: 256 bytes"),
        ({"fm.group": "a,b"}, "fm.group: 'a,b'"),
        ({"fm.born_ms": "now"}, "fm.born_ms: 'now'"),
        ({"fm.delay_ms": "-5"}, "fm.delay_ms: '-5'"),
        ({"fm.delay_ms": "3456000001"}, "fm.delay_ms: .* 0..3456000000"),
        ({"fm.idempotent": "yes"}, "fm.idempotent: 'yes'; it must be one of 0, 1"),
        ({"fm.tx": "begin"}, "fm.tx: 'begin'; it must be one of prepare, commit, rollback"),
        ({"fm.tx": "prepare"}, "fm.group: missing; a prepare names who is asked"),
        ({"fm.tx": "commit", "fm.delay_ms": "1"}, "fm.delay_ms: 1 with fm.tx commit"),
    ],
)
def test_publish_refuses(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Publish.parse(MESSAGE | change)


def test_what_belongs_to_the_message_is_carried() -> None:
    message = {
        "fm.topic": "orders",
        "fm.id": "m-1",
        "fm.key": "k",
        "fm.colour": "blue",
        "fm.lane": "eu",
        "fm.version": "2",
        "fm.born_ms": "1",
        "fm.trace": "t",
        "h.tenant": "x",
        "fm.of_a_later_version": "y",
        "other": "z",
    }
    between = {
        "fm.op": "publish",
        "fm.group": "billing",
        "fm.tx": "prepare",
        "fm.broker": "b1",
        "fm.delay_ms": "1",
        "fm.idempotent": "1",
        "fm.attempt": "9",
        "fm.hop": "1",
        "fm.origin": "node-9",
        "fm.result": "consumed",
        "fm.retry_ms": "1",
        "fm.reason": "r",
    }
    assert push.carried(between | message) == message


# ---------------------------------------------------------------------------------------- answers


def test_answers() -> None:
    assert push.answer("consumed") == {"fm.result": "consumed"}
    assert push.answer("later", "busy", retry_ms=100) == {
        "fm.result": "later",
        "fm.retry_ms": "100",
        "fm.reason": "busy",
    }
    assert push.answer("later") == {"fm.result": "later", "fm.retry_ms": "0"}
    assert push.answer("later", retry_ms=10**12)["fm.retry_ms"] == "86400000"
    assert push.answer("consumed", id="m-1", broker="b1")["fm.broker"] == "b1"
    cut = push.answer("reject", "ü" * 200)["fm.reason"]
    assert cut == "ü" * 128
    assert push.answer("reject", "x" + "ü" * 200)["fm.reason"] == "x" + "ü" * 127


@pytest.mark.parametrize(
    ("text", "value"),
    [("100", 100), ("", 0), ("-1", 0), ("soon", 0), ("86400001", 86_400_000), ("9" * 40, 0)],
)
def test_retry_ms_of_somebody_else(text: str, value: int) -> None:
    assert push.retry_ms({"fm.retry_ms": text}) == value


def test_results_and_ops_are_those_of_the_compiled_reader() -> None:
    for op in ("hello", "subscribe", "announce", "suspend", "resume", "goaway"):
        assert frames.read(frames.request(1, {push.OP: op})).op == op == getattr(push, op.upper())
    for op in ("publish", "deliver", "check", "forward"):
        assert frames.read(frames.request(1, {push.OP: op})).op == op == getattr(push, op.upper())
    for result in push.RESULTS:
        assert frames.read(frames.response(1, 1, {push.RESULT: result})).result == result


# ----------------------------------------------------------------------------------------- filter


@pytest.mark.parametrize(
    ("text", "headers", "matches"),
    [
        ("colour=blue", {"fm.colour": "blue"}, True),
        ("colour=blue", {"fm.colour": "Blue"}, False),
        ("colour=blue", {"h.colour": "blue"}, False),
        ("colour=blue", {}, False),
        ("colour=blue|green", {"fm.colour": "green"}, True),
        ("colour=blue|green", {"fm.colour": "blue|green"}, False),
        ("colour=blue&region=eu", {"fm.colour": "blue", "h.region": "eu"}, True),
        ("colour=blue&region=eu", {"fm.colour": "blue", "h.region": "us"}, False),
        ("colour=blue&region=eu", {"fm.colour": "blue"}, False),
        ("lane=a&version=2&key=k", {"fm.lane": "a", "fm.version": "2", "fm.key": "k"}, True),
        ("topic=orders", {"fm.topic": "orders"}, False),
        ("topic=orders", {"h.topic": "orders"}, True),
        ("a=", {"h.a": ""}, True),
        ("a=", {}, False),
        ("a=|x", {"h.a": "x"}, True),
        ("a=b%26c%7Cd%3De%25", {"h.a": "b&c|d=e%"}, True),
        ("a=%C3%BC", {"h.a": "ü"}, True),
        ("a=ü", {"h.a": "ü"}, True),
        ("a= b ", {"h.a": " b "}, True),
        ("a=1,2", {"h.a": "1,2"}, True),
        ("x-y.z_0=1", {"h.x-y.z_0": "1"}, True),
    ],
)
def test_filter_matches(text: str, headers: dict[str, str], matches: bool) -> None:
    found = Filter.parse(text)
    assert found.matches(headers | {"fm.id": "m"}) is matches
    assert found.text == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "filter: 0 bytes; it must have 1..1024"),
        ("a=" + "x" * 1023, "filter: 1025 bytes"),
        ("colour", "filter: 'colour'; a term must be name=value"),
        ("=blue", "filter: '=blue'; a term must be name=value"),
        ("colour=blue&", "filter: ''; a term must be name=value"),
        ("&colour=blue", "filter: ''"),
        (" colour=blue", "filter: ' colour=blue'"),
        ("colour =blue", "a term must be"),
        ("größe=1", r"filter: 'gr\\xf6\\xdfe=1'"),
        ("a=b=c", "filter: 'b=c' has a \"=\" of its own; it must be written %3D"),
        ("colour==blue", "must be written %3D"),
        ("colour=a&colour=b", "filter: colour stands there twice; alternatives are written"),
        ("a=%", "filter: '%'; a % must be followed by two hexadecimal digits"),
        ("a=%4", "two hexadecimal digits"),
        ("a=100%", "one of its own is written %25"),
        ("a=%zz", "two hexadecimal digits"),
        ("a=%ff", "filter: '%ff'; what % spells must be UTF-8"),
        ("&".join(f"n{i}=v" for i in range(17)), "filter: 17 terms; there may be at most 16"),
        ("a=" + "|".join("b" * 65), "filter: 65 alternatives of a; there may be at most 64"),
    ],
)
def test_filter_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Filter.parse(text)


def test_filters_that_want_the_same_are_equal() -> None:
    one = Filter.parse("colour=blue|green&region=eu")
    assert one == Filter.parse("region=eu&colour=green|blue|green")
    assert hash(one) == hash(Filter.parse("region=%65u&colour=green|blue"))
    assert one != Filter.parse("region=eu&colour=green")


TERM_VALUES = st.lists(st.text(max_size=8), min_size=1, max_size=4)


@given(
    st.dictionaries(st.text("ab.-_", min_size=1, max_size=3), TERM_VALUES, min_size=1, max_size=4),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_any_values_can_be_written(terms: dict[str, list[str]], data: st.DataObject) -> None:
    def written(value: str) -> str:
        return re.sub("[&|=%]", lambda found: f"%{ord(found[0]):02x}", value)

    text = "&".join(f"{name}={'|'.join(map(written, v))}" for name, v in terms.items())
    found = Filter.parse(text)
    headers = {f"h.{name}": data.draw(st.sampled_from(v)) for name, v in terms.items()}
    assert found.matches(headers)
    name = data.draw(st.sampled_from(sorted(terms)))
    other = data.draw(st.text(max_size=8))
    assert found.matches(headers | {f"h.{name}": other}) == (other in terms[name])
    del headers[f"h.{name}"]
    assert not found.matches(headers)


@given(st.text(max_size=40) | st.text("ab=&|%2F", max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    try:
        found = Filter.parse(text)
    except ValueError:
        with pytest.raises(ValueError, match=r"^filter: "):
            Filter.parse(text)
    else:
        assert found.terms


@given(st.lists(NAMES, unique=True, max_size=5), st.integers(1, 65535))
@settings(max_examples=100, deadline=None)
def test_any_names_are_subscribed(names: list[str], prefetch: int) -> None:
    said = Subscribe(dict.fromkeys(names, prefetch))
    headers = frames.parse(frames.request(1, said.headers())).headers
    assert Subscribe.parse(headers) == said
