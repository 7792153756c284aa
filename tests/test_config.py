"""Configuration: what loads, and everything that is wrong with what does not, at once."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmesh import config, limits
from fastmesh.address import Address, parse_address
from fastmesh.admin.views import to_json
from fastmesh.config import Secret
from fastmesh.errors import ConfigError
from tests.conftest import SMALL

EXAMPLE = Path(__file__).parent.parent / "examples" / "fastmesh.yaml"


def parse(text: str, base: str = "/base") -> config.Config:
    return config.parse(text.encode(), base=base)


def problems(text: str, base: str = "/base") -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, base)
    return {p.path: p.message for p in caught.value.problems}


def test_the_example_loads_as_it_stands() -> None:
    found = config.load(EXAMPLE)
    assert [x.name for x in found.listeners] == ["rpc"]
    assert [(r.service, r.prefix, r.headers, r.cluster) for r in found.listeners[0].routes] == [
        ("com.example.Order:1.0", False, (), "orders"),
        ("com.example.", True, (("lane", "blue"),), "others"),
        (None, False, (), "others"),
    ]
    assert [e.weight for e in found.cluster("others").endpoints] == [20, 80]
    assert found.state_dir == str(EXAMPLE.parent / "run" / "node-1")
    assert found.limits.in_flight_max == 65536
    assert len(found.sha256) == 64


def test_the_example_of_a_mesh_loads_as_it_stands() -> None:
    found = config.load(EXAMPLE.with_name("push.yaml"))
    assert found.push is not None
    assert [b.topics for b in found.push.brokers] == [("*",), ("orders", "stock.*")]
    assert found.clusters == ()


def test_every_limit_has_a_field_a_range_and_a_reason() -> None:
    assert {f.name for f in dataclasses.fields(config.Limits)} == set(limits.CONFIGURABLE)
    for name, bound in limits.CONFIGURABLE.items():
        assert bound.low <= bound.default <= bound.high, name
        assert bound.why, name
        assert bound.precedent, name
        suffix = {"ms": "_ms", "bytes": "_bytes_max"}.get(bound.unit, "")
        assert suffix in name, name


def test_the_engine_accepts_every_limit_at_both_ends() -> None:
    from fastmesh._ext.route import Snapshot
    from fastmesh.control.snapshot import engine_limits

    for pick in ("low", "default", "high"):
        values = {k: getattr(b, pick) for k, b in limits.CONFIGURABLE.items()}
        made = engine_limits(
            config.Limits(**values), connections_max=values["connections_max"], sample_every=0
        )
        Snapshot(1, made).seal()


# One fault each: what is replaced in SMALL, by what, the path of the problem, a word of it.
FAULTS = [
    ("name: n1", "nam: n1", "node.nam", "did you mean name?"),
    ("name: n1", "name: 7", "node.name", "quotes"),
    ("name: n1", "name: __x", "node.name", "must be a name"),
    ("state_dir: run", "state_dir: [1]", "state_dir", "text"),
    ("state_dir: run", 'state_dir: "a\\0b"', "state_dir", "NUL"),
    ("listeners:", "listners:", "listeners", "at least one listener"),
    ("  - name: rpc", "  - nme: rpc", "listeners[0].name", "missing"),
    ('listen: "127.0.0.1:0"\n', 'listen: "127.0.0.1"\n', "listeners[0].listen", "host:port"),
    ('listen: "127.0.0.1:0"\n', 'listen: "127.0.0.1:65536"\n', "listeners[0].listen", "0..65535"),
    ('listen: "127.0.0.1:0"\n', 'listen: "::1:80"\n', "listeners[0].listen", "brackets"),
    ('listen: "127.0.0.1:0"\n', 'listen: "example.org:80"\n', "listeners[0].listen", "IP address"),
    ('listen: "127.0.0.1:0"\n', "listen: 12200\n", "listeners[0].listen", "quotes"),
    (
        "    protocol: bolt\n    routes",
        "    protocol: htp\n    routes",
        "listeners[0].protocol",
        "bolt",
    ),
    (
        "cluster: others}\nclusters",
        "cluster: other}\nclusters",
        "listeners[0].routes[1].cluster",
        "not a cluster; there are: orders, others",
    ),
    ('"com.example.Order:1.0"', '"com.*.Order"', "listeners[0].routes[0].match.service", "the end"),
    ('"com.example.Order:1.0"', '""', "listeners[0].routes[0].match.service", "leave it out"),
    ('"com.example.Order:1.0"', '"*"', "listeners[0].routes[0].match.service", "leave it out"),
    ('"com.example.Order:1.0"', "x" * 256, "listeners[0].routes[0].match.service", "255"),
    (
        'service: "com.example.Order:1.0"',
        "header: {a: 1}",
        "listeners[0].routes[0].match.header.a",
        "quotes",
    ),
    (
        'service: "com.example.Order:1.0"',
        "servce: a",
        "listeners[0].routes[0].match.servce",
        "service?",
    ),
    (
        'match: {service: "com.example.Order:1.0"}, ',
        "",
        "listeners[0].routes[1].match",
        "can never match",
    ),
    (
        "cluster: orders}",
        "cluster: orders, rate_limit: {per_second: 0}}",
        "listeners[0].routes[0].rate_limit.per_second",
        "1..",
    ),
    (
        "cluster: orders}",
        "cluster: orders, rate_limit: {}}",
        "listeners[0].routes[0].rate_limit.per_second",
        "missing",
    ),
    ('"127.0.0.1:12201"', '"127.0.0.1:0"', "clusters[0].endpoints[0].address", "1..65535"),
    ('"127.0.0.1:12201"', '"127.0.0:80"', "clusters[0].endpoints[0].address", "IPv4"),
    ('"127.0.0.1:12201"', '"unix:"', "clusters[0].endpoints[0].address", "path"),
    ('"127.0.0.1:12201"', '"unix:' + "x" * 120 + '"', "clusters[0].endpoints[0].address", "107"),
    (
        'address: "127.0.0.1:12201"',
        'address: "127.0.0.1:1", weight: -1',
        "clusters[0].endpoints[0].weight",
        "0..",
    ),
    (
        'address: "127.0.0.1:12201"',
        'address: "127.0.0.1:1", weight: true',
        "clusters[0].endpoints[0].weight",
        "whole number",
    ),
    (
        'address: "127.0.0.1:12201"',
        'address: "127.0.0.1:1", weight: 0',
        "clusters[0].endpoints",
        "above 0",
    ),
    ('[{address: "127.0.0.1:12201"}]', "[]", "clusters[0].endpoints", "at least one endpoint"),
    (
        '[{address: "127.0.0.1:12201"}]',
        '[{address: "a:1"}, {address: "A:1"}]',
        "clusters[0].endpoints[1].address",
        "taken already",
    ),
    ("name: others, protocol", "name: orders, protocol", "clusters[1].name", "taken already"),
    (
        "name: orders, protocol: bolt",
        "name: orders, protocol: bolt, binding: own",
        "clusters[0].binding",
        "shared or per_client",
    ),
    (
        "name: orders, protocol: bolt",
        "name: orders, protocol: bolt, server_requests: no",
        "clusters[0].server_requests",
        "any or refuse",
    ),
    (
        "name: orders, protocol: bolt",
        "name: orders, protocol: bolt, binding: per_client, connections: 2",
        "clusters[0].connections",
        "must be 1",
    ),
    ("connections_max: 100", "conections_max: 100", "limits.conections_max", "connections_max?"),
    ("connections_max: 100", "in_flight_max: 15", "limits.in_flight_max", "16..65536"),
    ("connections_max: 100", "in_flight_max: 65537", "limits.in_flight_max", "16..65536"),
    ("connections_max: 100", "frame_bytes_max: 1e6", "limits.frame_bytes_max", "whole number"),
    ("connections_max: 100", "backoff_ms: 60000", "limits.backoff_ms", "backoff_ms_max"),
    ("connections_max: 100", "drain_answers_ms: 201", "limits.drain_answers_ms", "stop_timeout_ms"),
    ("connections_max: 100", "drain_suspend_ms: 201", "limits.drain_suspend_ms", "stop_timeout_ms"),
    (
        "connections_max: 100",
        "connections_max: 100, connections_max: 7",
        "limits.connections_max",
        "twice",
    ),
    (
        'admin: {listen: "127.0.0.1:0"}',
        'admin: {listen: "0.0.0.0:7070"}',
        "admin.token_file",
        "not a loopback",
    ),
    (
        'admin: {listen: "127.0.0.1:0"}',
        'admin: {listen: "[::]:7070"}',
        "admin.token_file",
        "not a loopback",
    ),
    (
        'admin: {listen: "127.0.0.1:0"}',
        "admin: {token_file: nothing-here}",
        "admin.token_file",
        "No such file",
    ),
    ('admin: {listen: "127.0.0.1:0"}', "admin: {token_file: /dev/zero}", "admin.token_file", ""),
    ('admin: {listen: "127.0.0.1:0"}', "admin: 7", "admin", "mapping"),
    ('admin: {listen: "127.0.0.1:0"}', "engine: {threads: 0}", "engine.threads", "1..64"),
    (
        'admin: {listen: "127.0.0.1:0"}',
        "observe: {sample_every: -1}",
        "observe.sample_every",
        "0..",
    ),
    ('admin: {listen: "127.0.0.1:0"}', "log: {format: xml}", "log.format", "text or json"),
]


@pytest.mark.parametrize(
    ("old", "new", "path", "word"), FAULTS, ids=[f"{f[2]}-{n}" for n, f in enumerate(FAULTS)]
)
def test_each_fault_is_named_where_it_is(old: str, new: str, path: str, word: str) -> None:
    assert old in SMALL
    found = problems(SMALL.replace(old, new, 1))
    assert path in found, found
    assert word in found[path]


def test_all_faults_are_reported_at_once_with_line_and_value() -> None:
    text = (
        SMALL.replace("name: n1", "nam: n1")
        .replace("100", "-1")
        .replace("cluster: orders", "cluster: nix")
    )
    with pytest.raises(ConfigError) as caught:
        parse(text)
    found = {(p.path, p.line, p.value) for p in caught.value.problems}
    assert found == {
        ("node.nam", 1, None),
        ("listeners[0].routes[0].cluster", 9, "nix"),
        ("limits.connections_max", 14, -1),
    }
    assert caught.value.exit_code == 64


def test_two_listeners_cannot_share_an_address() -> None:
    text = SMALL.replace(
        'listen: "127.0.0.1:0"\n    protocol', 'listen: "127.0.0.1:77"\n    protocol'
    )
    one, rest = text.split("  - name: rpc\n")
    body, rest = rest.split("clusters:\n", 1)
    twice = one + "  - name: rpc\n" + body + "  - name: rpc2\n" + body + "clusters:\n" + rest
    assert "taken already by listeners[0].listen" in problems(twice)["listeners[1].listen"]


def test_a_broken_item_does_not_shift_the_paths_of_others() -> None:
    text = SMALL.replace("listeners:\n", "listeners:\n  - 7\n").replace(
        "cluster: orders", "cluster: nix"
    )
    assert set(problems(text)) == {"listeners[0]", "listeners[1].routes[0].cluster"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "- 1",
        "a: [1, 2",
        "\x00",
        "\t- x",
        "a: &a [*a]",
        "a: 99999999999-99-99",
        "? [1, 2] : 3",
        "a: !!python/object/apply:os.system ['true']",
        "a: !!binary '*'",
        "--- 1\n--- 2",
        "a: " + "9" * 10_000,
    ],
)
def test_what_is_no_configuration_is_a_readable_error(text: str) -> None:
    found = problems(text)
    assert found
    assert all("\n" not in message for message in found.values())


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_config_error(data: bytes) -> None:
    with pytest.raises(ConfigError):
        config.parse(data, base="/base")


def test_deep_nesting_is_refused_before_anything_recurses() -> None:
    assert "nested deeper" in problems("[" * 500_000)[""]
    assert "nested deeper" in problems("a: " + "{a: " * 5000)[""]


def test_a_billion_laughs_is_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)]
    assert "aliases are expanded" in problems("\n".join(lines))[""]


def test_a_huge_file_is_refused_unparsed(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    path.write_bytes(b"#" * (limits.CONFIG_BYTES_MAX + 10))
    with pytest.raises(ConfigError, match="1 problem"):
        config.load(path)


def test_a_directory_a_fifo_and_nothing_are_refused_without_waiting(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    for name in ("", "fifo", "missing"):
        with pytest.raises(ConfigError) as caught:
            config.load(tmp_path / name)
        assert "cannot be read" in caught.value.problems[0].message


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("127.0.0.1:80", Address("127.0.0.1", 80)),
        ("[::1]:80", Address("::1", 80)),
        ("[0:0::1]:80", Address("::1", 80)),
        ("Example.org.:80", Address("example.org", 80)),
        ("localhost:1", Address("localhost", 1)),
        ("unix:a/../b.sock", Address(path="/base/b.sock")),
        ("unix:/x/b.sock", Address(path="/x/b.sock")),
    ],
)
def test_addresses(text: str, want: Address) -> None:
    assert parse_address(text, "/base") == want
    assert parse_address(str(want), "/base") == want


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":80",
        "a",
        "a:",
        "a:b",
        "a:-1",
        "a:٣",
        "[1.2.3.4]:1",
        "[::1]",
        "a b:1",
        "-a:1",
        "256.1.1.1:1",
        "a\r\nb:1",
        "unix:a\0b",
        "a/b:1",
        "a:1 ",
        "a" * 300 + ":1",
    ],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_address(text, "/base")


def test_a_token_file_is_read_relative_to_the_configuration(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    token.chmod(0o600)
    text = SMALL.replace('listen: "127.0.0.1:0"}', 'listen: "0.0.0.0:0", token_file: token}')
    found = parse(text, str(tmp_path))
    assert found.admin.token == Secret("0123456789abcdef")


@pytest.mark.parametrize(
    ("content", "mode", "word"),
    [
        (b"0123456789abcdef", 0o644, "chmod 600"),
        (b"0123456789abcdef", 0o620, "chmod 600"),
        (b"short", 0o600, "at least 16"),
        (b"0123456789abcdef\r\nX: y", 0o600, "printable"),
        (b"\xff" * 20, 0o600, "printable"),
        (b"x" * 5000, 0o600, "longer"),
    ],
)
def test_token_files_that_cannot_be_used(
    tmp_path: Path, content: bytes, mode: int, word: str
) -> None:
    token = tmp_path / "token"
    token.write_bytes(content)
    token.chmod(mode)
    text = SMALL.replace('listen: "127.0.0.1:0"}', 'listen: "127.0.0.1:0", token_file: token}')
    message = problems(text, str(tmp_path))["admin.token_file"]
    assert word in message
    assert "0123" not in message


def test_a_secret_never_shows_itself() -> None:
    secret = Secret("canary-7f3a")
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r:>20}", "%s" % secret]  # noqa: UP031
    shown += [
        to_json({"a": secret}).decode(),
        repr(dataclasses.replace(config.Admin(Address()), token=secret)),
    ]
    shown.append(repr(pickle.dumps(secret)))
    shown.append(repr(copy.deepcopy(secret)))
    assert "canary" not in "".join(shown)
    assert secret.reveal() == "canary-7f3a"
    assert secret == Secret("canary-7f3a")
    assert secret != Secret("other")


def test_the_shown_configuration_is_whole_and_loads_again() -> None:
    found = parse(SMALL)
    shown = json.loads(to_json(config.as_dict(found)))
    del shown["admin"]["token"]
    again = parse(json.dumps(shown))
    assert again == found


def test_what_needs_an_upgrade() -> None:
    old = parse(SMALL)
    for change, keys in (
        (
            SMALL.replace('admin: {listen: "127.0.0.1:0"}', 'admin: {listen: "127.0.0.1:1"}'),
            ["admin"],
        ),
        (SMALL.replace("state_dir: run", "state_dir: run2"), ["state_dir"]),
        (SMALL + "engine: {threads: 2, spin_us: 5}\n", ["engine.threads", "engine.spin_us"]),
        (SMALL.replace("12201", "12209"), []),
    ):
        assert config.needs_upgrade(old, parse(change)) == keys


def test_the_documentation_has_every_limit_with_its_default_and_range() -> None:
    text = (EXAMPLE.parent.parent / "docs" / "configuration.md").read_text()
    for name, bound in limits.CONFIGURABLE.items():
        assert f"| `{name}` | {bound.default} | {bound.low}..{bound.high} | {bound.unit}: " in text


# --- the message mesh -----------------------------------------------------------------------------

PUSH = """\
node: {name: n1, app: shop}
state_dir: run
admin: {listen: "127.0.0.1:0"}
listeners: [{name: msg, listen: "127.0.0.1:12300", protocol: push}]
push:
  brokers:
    - {name: b1, address: "127.0.0.1:12400", topics: ["*"]}
    - {name: b2, address: "broker.example:12400", weight: 20, topics: [orders, "stock.*"]}
  forward: {listen: "127.0.0.1:12500"}
  schedule: {file: schedule.yaml}
registration: {listen: "127.0.0.1:7071"}
"""


def test_push_alone_is_a_configuration() -> None:
    found = parse(PUSH)
    assert found.clusters == ()
    assert found.listeners[0].routes == ()
    assert found.push == config.Push(
        brokers=(
            config.Broker("b1", Address("127.0.0.1", 12400)),
            config.Broker("b2", Address("broker.example", 12400), 20, ("orders", "stock.*")),
        ),
        forward=Address("127.0.0.1", 12500),
        schedule_file="/base/schedule.yaml",
    )
    assert found.registration == config.Registration(Address("127.0.0.1", 7071))
    assert "2 brokers" in config.describe(found)
    assert parse(SMALL).push is None


def test_push_beside_rpc() -> None:
    rpc = SMALL.split("listeners:\n")[1]
    text = PUSH.replace("listeners: [", "listeners:\n  - ").replace("push}]", "push}") + "x: 1\n"
    text = text.replace("protocol: push}\n", "protocol: push}\n" + rpc.split("clusters:")[0])
    text = text.replace("x: 1\n", "clusters:" + rpc.split("clusters:")[1])
    found = parse(text)
    assert [x.protocol for x in found.listeners] == ["push", "bolt"]
    assert len(found.clusters) == 2


@pytest.mark.parametrize(
    ("topic", "brokers"),
    [("orders", ["b1", "b2"]), ("orders.x", ["b1"]), ("stock.x", ["b1", "b2"]), ("stock", ["b1"])],
)
def test_a_topic_belongs_to_every_broker_with_a_pattern_for_it(
    topic: str, brokers: list[str]
) -> None:
    push = parse(PUSH).push
    assert push is not None
    assert [b.name for b in push.brokers if b.has(topic)] == brokers


LISTENER = 'listeners: [{name: msg, listen: "127.0.0.1:12300", protocol: push}]'
PUSH_FAULTS = [
    (
        "protocol: push}",
        "protocol: push, routes: []}",
        "listeners[0].routes",
        "broker of its topic",
    ),
    ("protocol: push}", "protocol: push, rate: 1}", "listeners[0].rate", "not a known key"),
    (PUSH[PUSH.index("push:\n") :], "", "listeners[0].protocol", "needs a push section"),
    ("push:\n", "psh:\n", "psh", "did you mean push?"),
    (
        LISTENER,
        'listeners: [{name: r, listen: "127.0.0.1:1", protocol: bolt, routes: [{cluster: c}]}]\n'
        'clusters: [{name: c, protocol: bolt, endpoints: [{address: "127.0.0.1:2"}]}]',
        "push",
        "nobody could reach it",
    ),
    ('registration: {listen: "127.0.0.1:7071"}\n', "", "registration.listen", "is missing"),
    ("127.0.0.1:7071", "127.0.0.1:12500", "push.forward.listen", "taken already by registration"),
    ("127.0.0.1:7071", "127.0.0.1:12300", "registration.listen", "taken already by listeners[0]"),
    ("127.0.0.1:12500", "127.0.0.1:12300", "push.forward.listen", "taken already by listeners[0]"),
    ("127.0.0.1:7071", "0.0.0.0:7071", "registration.token_file", "not a loopback"),
    ("127.0.0.1:12400", "127.0.0.1:12300", "push.brokers[0].address", "this process itself"),
    ("127.0.0.1:12400", "broker.example:12400", "push.brokers[1].address", "taken already"),
    ("name: b2", "name: b1", "push.brokers[1].name", "taken already by brokers[0]"),
    ("name: b2", 'name: "b,2"', "push.brokers[1].name", "letters, digits"),
    ("name: n1", 'name: "n,1"', "node.name", "with push, it must be"),
    ("weight: 20", "weight: -1", "push.brokers[1].weight", "0..10000"),
    ('topics: ["*"]', "topics: []", "push.brokers[0].topics", "must be a list of topics"),
    ('topics: ["*"]', 'topics: ["a*b"]', "push.brokers[0].topics[0]", "only at its end"),
    ('topics: ["*"]', "topics: [7]", "push.brokers[0].topics[0]", "must be a topic"),
    ('topics: ["*"]', "topics: [a]\n    - 7", "push.brokers", ""),
    ("{file: schedule.yaml}", "{}", "push.schedule.file", "is missing"),
    ('{listen: "127.0.0.1:12500"}', "{}", "push.forward.listen", "is missing"),
    ("127.0.0.1:12500", "peer.example:12500", "push.forward.listen", "IP address"),
]


@pytest.mark.parametrize(
    ("old", "new", "path", "word"),
    PUSH_FAULTS,
    ids=[f"{f[2]}-{n}" for n, f in enumerate(PUSH_FAULTS)],
)
def test_each_fault_of_a_mesh_is_named_where_it_is(
    old: str, new: str, path: str, word: str
) -> None:
    assert old in PUSH
    text = PUSH.replace(old, new, 1)
    if path == "push.brokers":
        with pytest.raises(ConfigError):
            parse(text)
        return
    found = problems(text)
    assert path in found, found
    assert word in found[path]


def test_more_brokers_than_there_are_bits() -> None:
    many = ", ".join(f'{{name: b{n}, address: "127.0.0.1:{n + 1}"}}' for n in range(65))
    text = (
        PUSH.split("  brokers:", maxsplit=1)[0]
        + f"  brokers: [{many}]\n"
        + PUSH[PUSH.index("  forward") :]
    )
    assert "at most 64" in problems(text)["push.brokers"]


def test_something_has_to_be_there() -> None:
    assert "at least one listener" in problems('admin: {listen: "127.0.0.1:0"}')["listeners"]
    text = PUSH.replace("brokers:\n", "brokers: []\n").split("    - {name: b1")[0]
    assert (
        "at least one broker"
        in problems(text + 'registration: {listen: "127.0.0.1:1"}')["push.brokers"]
    )


def test_brokers_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "brokers.yaml"
    file.write_text('brokers: [{name: b1, address: "127.0.0.1:1"}]')
    start, end = PUSH.index("  brokers:\n"), PUSH.index("  forward")
    text = PUSH[:start] + "  brokers: {file: brokers.yaml}\n" + PUSH[end:]
    found = parse(text, str(tmp_path))
    assert found.push is not None
    assert (found.push.brokers, found.push.brokers_file) == ((), str(file))
    assert config.load_brokers(str(file)) == (config.Broker("b1", Address("127.0.0.1", 1)),)
    file.write_text("brokers: []")
    assert config.load_brokers(str(file)) == ()
    for wrong in ("brokers:", "broker: []", "brokers: [{name: b1}]", "", "brokers: 7"):
        file.write_text(wrong)
        with pytest.raises(ConfigError):
            config.load_brokers(str(file))
        assert "push.brokers.file" in problems(text, str(tmp_path))
    file.unlink()
    assert "cannot be read" in problems(text, str(tmp_path))["push.brokers.file"]


def test_the_shown_mesh_is_whole_and_loads_again() -> None:
    found = parse(PUSH)
    shown = json.loads(to_json(config.as_dict(found)))
    del shown["admin"]["token"]
    del shown["registration"]["token"]
    assert parse(json.dumps(shown)) == found


def test_what_of_a_mesh_needs_an_upgrade() -> None:
    old = parse(PUSH)
    for change, keys in (
        (PUSH.replace("7071", "7072"), ["registration"]),
        (PUSH.replace("name: n1", "name: n2"), ["node.name"]),
        (PUSH.replace("12500", "12501").replace("12400", "12401"), []),
        (SMALL, ["registration", "push"]),
    ):
        assert config.needs_upgrade(old, parse(change)) == keys
