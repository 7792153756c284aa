"""The schedule document: what is understood, what is refused and how that is said, what is made of
it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmesh import limits
from fastmesh._ext import schedule as native
from fastmesh.address import Address
from fastmesh.errors import ConfigError
from fastmesh.mesh.schedule import AppSchedule, NodeSpec, RuleSpec, ScheduleSpec, parse

WHOLE = """\
apps:
  demo:
    nodes:
      - {name: n1, address: "10.0.0.1:12500"}
      - {name: n2, address: "node2.example:12500", weight: 20}
      - {name: n3, address: "unix:/run/n3.sock", weight: 0}
    rules:
      - match: {colour: blue, header: {region: eu, "": null}}
        nodes: [n2, {name: n3, weight: 10}]
      - match: {key: vip}
        nodes: [{name: n1}]
  empty:
    nodes: [{name: n1, address: "10.0.0.1:12500", weight: 100}]
    rules: []
""".replace(', "": null', "")


def demo(nodes: str = "", rules: str = "") -> str:
    nodes = nodes or '{name: a, address: "127.0.0.1:1"}, {name: b, address: "127.0.0.1:2"}'
    return f"apps:\n  demo:\n    nodes: [{nodes}]\n    rules: [{rules}]\n"


def problems(text: str | bytes) -> list[tuple[str, object, str, int]]:
    with pytest.raises(ConfigError) as caught:
        parse(text.encode() if isinstance(text, str) else text)
    return [(p.path, p.value, p.message, p.line) for p in caught.value.problems]


def test_the_whole_document() -> None:
    n1 = NodeSpec("n1", Address("10.0.0.1", 12500), 100)
    assert parse(WHOLE.encode()) == ScheduleSpec(
        {
            "demo": AppSchedule(
                "demo",
                (
                    n1,
                    NodeSpec("n2", Address("node2.example", 12500), 20),
                    NodeSpec("n3", Address(path="/run/n3.sock"), 0),
                ),
                (
                    RuleSpec((("colour", "blue"), ("h.region", "eu")), (("n2", 100), ("n3", 10))),
                    RuleSpec((("key", "vip"),), (("n1", 100),)),
                ),
            ),
            "empty": AppSchedule("empty", (n1,)),
        }
    )


def test_json_is_the_same() -> None:
    found = parse(WHOLE.encode())
    for indent in (None, 2):
        data = json.dumps(yaml.safe_load(WHOLE), indent=indent).encode()
        assert parse(data) == parse(b"\n " + data) == found
    # Escapes that YAML reads otherwise: a pair of surrogates, an escaped slash.
    text = demo(rules='{match: {colour: "WHAT"}, nodes: [a]}')
    data = json.dumps(yaml.safe_load(text)).encode().replace(b"WHAT", b"\\ud83d\\ude00\\/")
    assert parse(data).apps["demo"].rules[0].match == (("colour", "\U0001f600/"),)


def test_what_is_shown_means_the_same() -> None:
    found = parse(WHOLE.encode())
    assert parse(json.dumps(found.as_dict()).encode()) == found
    assert parse(yaml.safe_dump(found.as_dict()).encode()) == found


def test_nothing_scheduled_is_said_explicitly() -> None:
    assert parse(b"apps: {}").apps == {}
    assert parse(b'{"apps": {}}').apps == {}
    for text in ("", "apps:", "{}", "other: 1", "[]", "apps"):
        assert problems(text), text


def test_peers_are_the_nodes_of_all_applications_but_this_one() -> None:
    found = parse(WHOLE.encode())
    assert found.peers("n2") == {
        "n1": Address("10.0.0.1", 12500),
        "n3": Address(path="/run/n3.sock"),
    }
    assert set(found.peers("stranger")) == {"n1", "n2", "n3"}


def test_compiled_for_a_node() -> None:
    found = parse(WHOLE.encode())
    assert found.compile("unknown", "n1", {}) is None
    compiled = found.compile("demo", "n2", {"n1": 5, "elsewhere": 6})
    assert compiled is not None
    assert (compiled.local, compiled.nodes) == ("n2", ("n1", "n2", "n3"))
    share = native.GroupShare(compiled)
    blue = native.Message({"fm.colour": "blue", "h.region": "eu"})
    vip = native.Message({"fm.key": "vip"})
    chosen = [
        (compiled.choose(share, message, b"\1\1\1")[0])
        for message in (*[blue] * 5, vip, *[native.Message({})] * 5)
    ]
    assert chosen[:5] == [1] * 5, "n3 has no endpoint"
    assert chosen[5] == 0
    assert sorted(chosen[6:]) == [0, 0, 0, 0, 1], "one in five stays"


DOCUMENTS: list[tuple[str | bytes, str, object, str, int]] = [
    ("apps: [1]", "apps", "a list", "must be a mapping", 1),
    ("apps: {demo: }", "apps.demo", None, "is missing: it needs nodes", 1),
    ("apps: {demo: 5}", "apps.demo", 5, "must be a mapping", 1),
    ("apps: {demo: {}}", "apps.demo.nodes", None, "must have at least one node", 1),
    ("apps: {de mo: {}}", "apps.de mo", None, "an application is 1..127 letters", 1),
    ("apps: {}\napp: 1", "app", None, "is not a known key: did you mean apps?", 2),
    (demo() + "    rule: []\n", "apps.demo.rule", None, "is not a known key: did you me", 5),
    ('{"apps": {"demo": 5}', "", None, "is not YAML", 2),
    ('{"apps": {"demo":\n {"nodes": 5}}}', "apps.demo.nodes", 5, "must be a list, each", 0),
    ('{"apps": {}, "apps": {}}', "apps", None, "is given twice: first in line 1", 1),
    (b"apps: \xff\xfe", "", None, "", 0),
]
A = "{name: a, address: 'h:1'}"
NODES = [
    ("5", "[0]", 5, "must be a mapping: one node"),
    ("{address: 'h:1'}", "[0].name", None, "is missing"),
    ("{name: 'a b', address: 'h:1'}", "[0].name", "a b", "must be a name of 1..64 letters"),
    ("{name: a}", "[0].address", None, "is missing"),
    ("{name: a, address: h}", "[0].address", "h", 'must be "host:port"'),
    ("{name: a, address: 'h:0'}", "[0].address", "h:0", "the port must be 1..65535"),
    ("{name: a, address: 'unix:x'}", "[0].address", "unix:x", "must have an absolute path"),
    ("{name: a, address: 'h:1', weight: 101}", "[0].weight", 101, "must be a whole number 0..1"),
    ("{name: a, address: 'h:1', weight: 5.5}", "[0].weight", 5.5, "must be a whole number 0..1"),
    ("{name: a, address: 'h:1', wieght: 5}", "[0].wieght", None, "is not a known key: did you"),
    (f"{A}, {A}", "[1].name", "a", "is taken already by nodes[0]"),
    (A + ", {name: b, address: 'h:1'}", "[1].address", "h:1", "is taken already by a in apps.de"),
]
QUOTES = "must be text: put it in quotes"
LANE = "match: {lane: x}"
RULES = [
    ("5", "", 5, "must be a mapping: one rule"),
    ("{nodes: [a]}", ".match", None, "must ask for something: colour, lane, version, key, header"),
    ("{match: {}, nodes: [a]}", ".match", None, "must ask for something: colour, lane"),
    ("{match: {colour: 5}, nodes: [a]}", ".match.colour", 5, QUOTES),
    ("{match: {version: 1.0}, nodes: [a]}", ".match.version", 1.0, QUOTES),
    ("{match: {color: x}, nodes: [a]}", ".match.color", None, "is not a known key: did you mean"),
    (f"{{match: {{lane: {'x' * 256}}}, nodes: [a]}}", ".match.lane", "x" * 256, "must be text of"),
    ("{match: {header: {h.x: y}}, nodes: [a]}", ".match.header.h.x", "y", "is a user header, wri"),
    ("{match: {header: {'': y}}, nodes: [a]}", ".match.header.", None, "a header's name is 1..253"),
    ("{match: {header: {a: 1}}, nodes: [a]}", ".match.header.a", 1, QUOTES),
    (f"{{{LANE}}}", ".nodes", None, "must have at least one node"),
    (f"{{{LANE}, nodes: a}}", ".nodes", "a", "must be a list of names"),
    (f"{{{LANE}, nodes: [5]}}", ".nodes[0]", 5, "must be the name of a node: put it in quotes"),
    (f"{{{LANE}, nodes: [a, c]}}", ".nodes[1]", "c", "is not a node of this application: a, b"),
    (f"{{{LANE}, nodes: [a, {{name: a, weight: 5}}]}}", ".nodes[1]", "a", "is there twice"),
    (f"{{{LANE}, nodes: [{{name: a, weight: 0}}]}}", ".nodes", None, "must have a weight above 0"),
    (f"{{{LANE}, nodes: [{{name: a, weight: -1}}]}}", ".nodes[0].weight", -1, "must be a whole nu"),
]
ONE = DOCUMENTS
ONE += [(demo(nodes=n), f"apps.demo.nodes{path}", *more, 3) for n, path, *more in NODES]
ONE += [(demo(rules=r), f"apps.demo.rules[0]{path}", *more, 4) for r, path, *more in RULES]


@pytest.mark.parametrize(("text", "path", "value", "message", "line"), ONE)
def test_one_problem(text: str | bytes, path: str, value: object, message: str, line: int) -> None:
    ((found_path, found_value, found_message, found_line),) = problems(text)
    assert found_message.startswith(message), found_message
    assert (found_path, found_line) == (path, line)
    assert found_value == value or str(value).startswith(str(found_value))


def test_a_rule_that_is_never_reached() -> None:
    rules = "{match: {lane: x, key: y}, nodes: [a]}, {match: {key: y, lane: x}, nodes: [b]}"
    message = "is never reached: rules[0] matches the same"
    assert problems(demo(rules=rules)) == [("apps.demo.rules[1].match", None, message, 4)]


def test_all_problems_at_once() -> None:
    text = """\
apps:
  demo:
    nodes:
      - {name: a, address: nowhere}
      - {name: b, address: "127.0.0.1:2", weight: 500}
    rules:
      - {match: {colour: 1}, nodes: [zebra]}
  shop:
    nodes: [{name: b, address: "127.0.0.1:3"}]
"""
    assert [(path, line) for path, _, _, line in problems(text)] == [
        ("apps.demo.nodes[0].address", 4),
        ("apps.demo.nodes[1].weight", 5),
        ("apps.demo.rules[0].match.colour", 7),
        ("apps.demo.rules[0].nodes[0]", 7),
        ("apps.shop.nodes[0].address", 9),
    ]
    assert problems(text)[-1][2] == "b is 127.0.0.1:2 already in apps.demo.nodes[1]"


def test_half_a_surrogate_pair_is_refused() -> None:
    rule = {"match": {"colour": "\ud83d", "header": {"\udc00": "x"}}, "nodes": ["a"]}
    node = {"name": "a", "address": "127.0.0.1:1"}
    data = json.dumps({"apps": {"demo": {"nodes": [node], "rules": [rule]}}}).encode()
    assert [message[:20] for _, _, message, _ in problems(data)] == [
        "must be whole charac",
        "a header's name is 1",
    ]


def many(**counts: int) -> bytes:
    """A document of so many of everything."""
    count = {"apps": 1, "nodes": 1, "rules": 0, "of_a_rule": 1, "headers": 1} | counts
    nodes = [{"name": f"n{i}", "address": f"h{i}:1"} for i in range(count["nodes"])]
    rules = [
        {
            "match": {"header": {f"{i}.{j}": "x" for j in range(count["headers"])}},
            "nodes": [f"n{j}" for j in range(count["of_a_rule"])],
        }
        for i in range(count["rules"])
    ]
    apps = {f"app{i}": {"nodes": nodes, "rules": rules} for i in range(count["apps"])}
    return json.dumps({"apps": apps}).encode()


@pytest.mark.parametrize(
    ("most", "message"),
    [
        ({"apps": limits.SCHEDULE_APPS_MAX}, "must have at most 1024 applications"),
        ({"nodes": limits.SCHEDULE_NODES_MAX}, "must have at most 1024 items"),
        ({"rules": limits.SCHEDULE_RULES_MAX}, "must have at most 64 items"),
        ({"headers": limits.SCHEDULE_MATCHES_MAX, "rules": 1}, "may ask for at most 8"),
        ({"rules": 4, "of_a_rule": 1024, "nodes": 1024}, "may name at most 4096 nodes in all"),
    ],
)
def test_bounds(most: dict[str, int], message: str) -> None:
    """The bound itself can be compiled; one more is refused."""
    spec = parse(many(**most))
    compiled = spec.compile("app0", "n0", {})
    assert compiled is not None
    key = next(iter(most))
    assert problems(many(**(most | {key: most[key] + 1})))[0][2].startswith(message)


def test_the_compiled_form_has_the_same_bounds() -> None:
    assert (
        native.NODES_MAX,
        native.RULES_MAX,
        native.MATCHES_MAX,
        native.ENTRIES_MAX,
        native.TEXT_MAX,
    ) == (
        limits.SCHEDULE_NODES_MAX,
        limits.SCHEDULE_RULES_MAX,
        limits.SCHEDULE_MATCHES_MAX,
        limits.SCHEDULE_RULE_NODES_MAX,
        limits.SERVICE_BYTES_MAX,
    )


def test_too_long_a_document() -> None:
    assert problems(b"apps: {} #" + b"x" * limits.CONFIG_BYTES_MAX)[0][2].startswith(
        "must be at most 1048576 bytes long"
    )


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["a", "b", "127.0.0.1:1", "blue"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            [
                *("apps", "demo", "nodes", "rules", "name", "address", "weight"),
                *("match", "header", "colour", "lane", "version", "key"),
            ]
        )
        | st.text(max_size=3),
        inner,
        max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


@given(JUNK, st.sampled_from(["top", "app", "node", "rule", "match"]), st.booleans())
@settings(max_examples=400, deadline=None)
def test_anything_else_is_a_problem_and_nothing_worse(junk: Any, where: str, as_json: bool) -> None:
    node: Any = {"name": "a", "address": "127.0.0.1:1"}
    rule: Any = {"match": {"colour": "blue"}, "nodes": ["a"]}
    rule = {"rule": junk, "match": rule | {"match": junk}}.get(where, rule)
    app: Any = {"nodes": [junk if where == "node" else node], "rules": [rule]}
    tree = {"top": junk, "app": {"apps": {"demo": junk}}}.get(where, {"apps": {"demo": app}})
    data = json.dumps(tree) if as_json else yaml.safe_dump(tree)
    try:
        found = parse(data.encode())
    except ConfigError as refused:
        wrong = refused
    else:
        for name in found.apps:
            assert found.compile(name, "a", {"a": 1}) is not None
        return
    shown = [(p.path, str(p.value), p.message) for p in wrong.problems]
    assert all(message for _, _, message in shown)
    str(shown).encode()


DOCUMENT = Path(__file__).parents[2] / "docs" / "scheduling.md"


def test_the_examples_of_the_document_are_right() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        assert parse(block.encode()).apps
