"""Routes: the first rule that matches wins, whatever shortcut finds it."""

import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmesh._ext import bolt, route
from fastmesh._ext.route import LIMITS, Snapshot
from tests.reference import bolt as reference

SERVICES = [
    b"a",
    b"ab",
    b"abc",
    b"abcdefghijklmnop",
    b"abcdefghijklmnopq",
    b"com.example.Order:1.0",
]
KEYS = [b"lane", b"colour", b"x", b"service"]
VALUES = [b"blue", b"green", b"", b"a"]


class Rule(NamedTuple):
    service: bytes | None = None
    prefix: bool = False
    headers: tuple[tuple[bytes, bytes], ...] = ()


def limits(**changed: int) -> dict[str, int]:
    return {name: min(max(low, 1 << 22), high) for name, (low, high) in LIMITS.items()} | changed


def compiled(rules: Iterable[Rule], *, seal: bool = True) -> Snapshot:
    """Listener 1, clusters 10 and 11; rule n has row n % 4096 and cluster 10 + n % 2."""
    snapshot = Snapshot(1, limits())
    for cluster_id in (10, 11):
        snapshot.add_cluster(cluster_id, codec="bolt", row=2)
    snapshot.add_listener(1, codec="bolt", row=3)
    for number, rule in enumerate(rules):
        snapshot.add_rule(
            1,
            cluster_id=10 + number % 2,
            row=number % 4096,
            service=rule.service,
            prefix=rule.prefix,
            headers=rule.headers,
        )
    if seal:
        snapshot.seal()
    return snapshot


def section(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    pairs = (struct.pack(">i", len(text)) + text for pair in headers for text in pair)
    return b"".join(pairs)


def frame(*headers: tuple[bytes, bytes], raw: bytes | None = None) -> bytes:
    return reference.request(7, headers=section(headers) if raw is None else raw)


def of(service: bytes) -> bytes:
    return frame((b"service", service))


def slow_find(rules: list[Rule], data: bytes) -> tuple[int, int] | None:
    """The obvious twin: rule by rule, everything read anew. Raises reference.HeaderError."""
    asked = reference.decode(data)
    assert isinstance(asked, reference.Frame)
    for number, rule in enumerate(rules):
        if rule.service is not None:
            service = reference.service_of(asked)
            if service is None:
                continue
            if rule.prefix and not service.startswith(rule.service):
                continue
            if not rule.prefix and service != rule.service:
                continue
        if all(reference.header_of(asked, key) == value for key, value in rule.headers):
            return number % 4096, 10 + number % 2
    return None


def same_as_twin(snapshot: Snapshot, rules: list[Rule], data: bytes) -> str:
    try:
        expected = slow_find(rules, data)
    except reference.HeaderError:
        with pytest.raises(ValueError, match="header section"):
            snapshot.find(1, data)
        return "malformed"
    assert snapshot.find(1, data) == expected
    return "nobody" if expected is None else "found"


# --- what is found


def test_first_rule_wins_whatever_its_kind() -> None:
    exact, prefix, anything = Rule(b"abc"), Rule(b"ab", prefix=True), Rule()
    for rules in ([exact, prefix, anything], [prefix, exact, anything], [anything, exact, prefix]):
        assert compiled(rules).find(1, of(b"abc")) == (0, 10)
    assert compiled([exact, prefix, anything]).find(1, of(b"abd")) == (1, 11)
    assert compiled([exact, prefix, anything]).find(1, of(b"b")) == (2, 10)
    assert compiled([exact, prefix, anything]).find(1, frame()) == (2, 10)
    assert compiled([exact, prefix]).find(1, frame()) is None
    assert compiled([]).find(1, of(b"abc")) is None


def test_a_prefix_is_not_completed_by_what_follows_the_service() -> None:
    snapshot = compiled([Rule(b"abc", prefix=True)])
    last = section([(b"service", b"ab")])
    assert snapshot.find(1, reference.request(7, headers=last, content=b"cdef")) is None
    whole = section([(b"service", b"abc")])
    assert snapshot.find(1, reference.request(7, headers=whole, content=b"d")) == (0, 10)


def test_the_service_is_the_header_service_or_else_the_second_name() -> None:
    snapshot = compiled([Rule(b"abc")])
    second = (b"sofa_head_target_service", b"abc")
    assert snapshot.find(1, frame(second)) == (0, 10)
    assert snapshot.find(1, frame((b"service", b"b"), second)) is None
    assert snapshot.find(1, frame((b"Service", b"abc"))) is None


def test_headers_must_all_match_in_their_first_occurrence() -> None:
    blue, big = (b"lane", b"blue"), (b"size", b"big")
    rules = [Rule(b"abc", headers=(blue, big)), Rule(b"abc", headers=(blue,)), Rule(b"abc")]
    snapshot = compiled(rules)
    asked = (b"service", b"abc")
    assert snapshot.find(1, frame(asked, big, blue)) == (0, 10)
    assert snapshot.find(1, frame(asked, blue)) == (1, 11)
    assert snapshot.find(1, frame(asked, (b"lane", b"blu"), blue)) == (2, 10)
    assert snapshot.find(1, frame(asked, (b"LANE", b"blue"))) == (2, 10)
    assert snapshot.find(1, frame(asked, (b"lane", b"blueish"))) == (2, 10)
    assert compiled([Rule(headers=(blue,))]).find(1, frame(blue)) == (0, 10)


def test_broken_headers_matter_only_to_who_has_to_read_that_far() -> None:
    broken = b"\x00\x00\x7f\xff"
    good = section([(b"service", b"abc"), (b"lane", b"blue")])
    anything = compiled([Rule(), Rule(b"abc")])
    assert anything.find(1, frame(raw=broken)) == (0, 10)
    exact = compiled([Rule(b"abc"), Rule()])
    assert exact.find(1, frame(raw=good + broken)) == (0, 10)
    with pytest.raises(ValueError, match="header section"):
        exact.find(1, frame(raw=broken + good))
    lane = compiled([Rule(headers=((b"lane", b"blue"),)), Rule()])
    assert lane.find(1, frame(raw=good + broken)) == (0, 10)
    size = compiled([Rule(headers=((b"size", b"big"),)), Rule()])
    with pytest.raises(ValueError, match="header section"):
        size.find(1, frame(raw=good + broken))


def test_a_frame_that_is_none() -> None:
    snapshot = compiled([Rule()])
    for data in (b"", b"\x01", b"hello, this is no frame at all", of(b"abc")[:-1]):
        with pytest.raises(ValueError, match="frame"):
            snapshot.find(1, data)


def test_listeners_have_rules_of_their_own() -> None:
    snapshot = Snapshot(9, limits())
    snapshot.add_cluster(5, codec="bolt", row=2)
    for listener_id in (70, 71):
        snapshot.add_listener(listener_id, codec="bolt", row=3)
        snapshot.add_rule(listener_id, cluster_id=5, row=listener_id, service=b"abc")
    snapshot.add_rule(71, cluster_id=5, row=99)
    snapshot.seal()
    assert snapshot.version == 9
    assert snapshot.find(70, of(b"abc")) == (70, 5)
    assert snapshot.find(71, of(b"abc")) == (71, 5)
    assert snapshot.find(70, of(b"b")) is None
    assert snapshot.find(71, of(b"b")) == (99, 5)
    with pytest.raises(ValueError, match="listener_id: 72"):
        snapshot.find(72, of(b"b"))


# --- against the twin

rules_of = st.lists(
    st.builds(
        lambda service, prefix, headers: Rule(service, prefix and service is not None, headers),
        st.sampled_from([None, *SERVICES]),
        st.booleans(),
        st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), max_size=2).map(tuple),
    ),
    max_size=12,
)
headers_of = st.lists(
    st.tuples(
        st.sampled_from([*KEYS, b"sofa_head_target_service"]),
        st.sampled_from([*VALUES, *SERVICES]),
    ),
    max_size=6,
)


@settings(max_examples=400, deadline=None)
@given(rules=rules_of, headers=headers_of, damage=st.none() | st.integers(0, 60))
def test_small_tables_against_the_twin(
    rules: list[Rule], headers: list[tuple[bytes, bytes]], damage: int | None
) -> None:
    raw = section(headers)
    if damage is not None:
        raw = raw[: min(damage, len(raw))] + b"\x00\x00\x10\x00"
    same_as_twin(compiled(rules), rules, frame(raw=raw))


@pytest.mark.parametrize("seed", range(4))
def test_large_tables_against_the_twin(seed: int) -> None:
    rng = random.Random(seed)
    names = [b"com.example.%d" % rng.randrange(3000) for _ in range(3000)]
    rules = []
    for name in names:
        headers = tuple(
            (b"key%d" % rng.randrange(20), rng.choice(VALUES))
            for _ in range(rng.choice([0, 0, 0, 1, 2]))
        )
        kind = rng.random()
        if kind < 0.9:
            rules.append(Rule(name, headers=headers))
        elif kind < 0.97:
            rules.append(Rule(name[: rng.randrange(12, len(name) + 1)], True, headers))
        else:
            rules.append(Rule(headers=((b"key%d" % rng.randrange(20), b"blue"), *headers)))
    rng.shuffle(rules)
    snapshot = compiled(rules)
    seen = set()
    for _ in range(300):
        headers_there = [
            (b"key%d" % rng.randrange(20), rng.choice(VALUES)) for _ in range(rng.randrange(12))
        ]
        if rng.random() < 0.9:
            name = rng.choice(names) if rng.random() < 0.7 else b"org.other.%d" % rng.randrange(100)
            headers_there.insert(rng.randrange(len(headers_there) + 1), (b"service", name))
        raw = section(headers_there)
        if rng.random() < 0.1:
            raw = raw[: rng.randrange(len(raw) + 1)] + b"\x00\x00\x10\x00"
        seen.add(same_as_twin(snapshot, rules, frame(raw=raw)))
    assert seen == {"found", "nobody", "malformed"}


# --- what it costs


def test_a_hundred_thousand_services_cost_what_one_does() -> None:
    one = compiled([Rule(b"com.example.Order0:1.0")])
    many = compiled(Rule(b"com.example.Order%d:1.0" % number) for number in range(100_000))
    cost_one = min(one.bench(1, of(b"com.example.Order0:1.0"), 20_000) for _ in range(3))
    for wanted in (0, 50_000, 99_999):
        data = of(b"com.example.Order%d:1.0" % wanted)
        assert many.find(1, data) == (wanted % 4096, 10 + wanted % 2)
        # A walk would be ten thousand times slower; 30 leaves room for caches and neighbours.
        assert min(many.bench(1, data, 20_000) for _ in range(3)) < 30 * cost_one + 1000
    chains = many.chains(1)
    assert sum(chains) == 100_000
    assert max(chains) <= 16


def test_the_order_of_the_hash_table_is_different_in_every_process() -> None:
    # Who chooses service names must not be able to choose names that share a chain (R5).
    script = """
import sys
from tests._ext.test_route import Rule, compiled
print(compiled(Rule(b"service%d" % number) for number in range(200)).chains(1))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        for _ in range(2)
    }
    assert len(outputs) == 2


def test_a_thousand_rules_on_one_header_read_a_large_section_once() -> None:
    # R5: as many tiny headers as fit, and a key that none of them has.
    data = frame(*[(b"k%d" % (n % 10), b"") for n in range(3000)])
    few = compiled([Rule(headers=((b"lane", b"v"),))])
    many = compiled([Rule(headers=((b"lane", b"v%d" % n),)) for n in range(2000)])
    assert many.find(1, data) is None
    cost_few = min(few.bench(1, data, 20) for _ in range(3))
    cost_many = min(many.bench(1, data, 20) for _ in range(3))
    assert cost_many < 30 * cost_few


# --- what is refused


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("add_cluster", {"cluster_id": 10}, "cluster_id: 10 is taken"),
        ("add_cluster", {"cluster_id": -1}, r"cluster_id: -1 is out of range; it must be in 0\.\."),
        ("add_cluster", {"cluster_id": "ten"}, "cluster_id: 'ten' is not a whole number"),
        ("add_cluster", {"cluster_id": True}, "cluster_id: True is not a whole number"),
        ("add_cluster", {"codec": "morse"}, "codec: 'morse' is unknown; it must be one of .*bolt"),
        ("add_cluster", {"row": 4096}, r"row: 4096 is out of range; it must be in 0\.\.4095"),
        ("add_cluster", {"binding": "loose"}, "binding: 'loose' is unknown; .* shared, per_client"),
        ("add_cluster", {"connections": 0}, r"connections: 0 is out of range; it must be in 1\.\."),
        ("add_cluster", {"server_requests": "all"}, "server_requests: 'all' .* any, refuse"),
        ("add_endpoint", {"cluster_id": 12}, "cluster_id: 12 is unknown; add the cluster"),
        ("add_endpoint", {"endpoint_id": 100}, "endpoint_id: 100 is taken"),
        ("add_endpoint", {"weight": -1}, "weight: -1 is out of range"),
        ("add_endpoint", {"address": ("localhost", 1)}, "address: 'localhost' is no IP address"),
        ("add_endpoint", {"address": ("127.0.0.1", 0)}, r"port: 0 is out of range; .* 1\.\.65535"),
        ("add_endpoint", {"address": ("127.0.0.1", "80")}, "port: '80' is not a whole number"),
        ("add_endpoint", {"address": ("::g", 80)}, "address: '::g' is no IP address"),
        ("add_endpoint", {"address": "/" + "x" * 107}, r"address: .* is 108 bytes; .* 1\.\.107"),
        ("add_endpoint", {"address": ""}, "address: '' is 0 bytes"),
        ("add_endpoint", {"address": "/a\0b"}, "address"),
        ("add_endpoint", {"address": 80}, "address: 80 must be"),
        ("add_listener", {"listener_id": 1}, "listener_id: 1 is taken"),
        ("add_listener", {"codec": "morse"}, "codec: 'morse' is unknown"),
        ("add_rule", {"listener_id": 2}, "listener_id: 2 is unknown; add the listener"),
        ("add_rule", {"cluster_id": 12}, "cluster_id: 12 is unknown; add the cluster"),
        ("add_rule", {"service": b""}, r"service: 0 bytes are too few; it must have 1\.\."),
        ("add_rule", {"service": b"x" * 32768}, "service: 32768 bytes are too many"),
        ("add_rule", {"service": "abc"}, "service: 'abc' is not bytes"),
        ("add_rule", {"prefix": True}, "prefix: True needs a service"),
        ("add_rule", {"headers": [(b"", b"x")]}, "headers: key: 0 bytes are too few"),
        ("add_rule", {"headers": [(b"k", None)]}, "headers: value: None is not bytes"),
        ("add_rule", {"headers": [(b"k", b"v")] * 65}, "headers: 65 are too many"),
        ("add_rule", {"rate_per_s": 10}, r"burst: 0 is out of range; it must be in 1\.\."),
        ("add_rule", {"rate_per_s": -1}, "rate_per_s: -1 is out of range"),
    ],
)
def test_what_is_out_of_range_is_named(
    method: str, arguments: dict[str, Any], message: str
) -> None:
    right: dict[str, dict[str, Any]] = {
        "add_cluster": {"cluster_id": 20, "codec": "bolt", "row": 2},
        "add_endpoint": {
            "cluster_id": 10,
            "endpoint_id": 101,
            "address": None,
            "weight": 1,
            "row": 2,
        },
        "add_listener": {"listener_id": 20, "codec": "bolt", "row": 2},
        "add_rule": {"listener_id": 1, "cluster_id": 10, "row": 2},
    }
    snapshot = compiled([Rule(b"abc")], seal=False)
    snapshot.add_endpoint(10, 100, address=None, weight=1, row=2)
    call = getattr(snapshot, method)
    with pytest.raises(ValueError, match=message):
        call(**right[method] | arguments)
    call(**right[method])
    snapshot.seal()
    assert snapshot.find(1, of(b"abc")) == (0, 10), "the refused call left nothing behind"


def test_limits_are_all_there_known_and_in_range() -> None:
    for name, (low, high) in LIMITS.items():
        Snapshot(1, limits(**{name: low}))
        Snapshot(1, limits(**{name: high}))
        for value in (low - 1, high + 1):
            with pytest.raises(ValueError, match=f"{name}: {value} is out of range"):
                Snapshot(1, limits(**{name: value}))
        missing = limits()
        del missing[name]
        with pytest.raises(ValueError, match=f"limits: {name} is missing"):
            Snapshot(1, missing)
    with pytest.raises(ValueError, match="limits: 'luck' is unknown"):
        Snapshot(1, limits(luck=7))


def test_a_sealed_snapshot_does_not_change_and_an_open_one_is_not_read() -> None:
    snapshot = compiled([Rule(b"abc")], seal=False)
    with pytest.raises(ValueError, match="not sealed"):
        snapshot.find(1, of(b"abc"))
    with pytest.raises(ValueError, match="not sealed"):
        snapshot.endpoint_addresses(10)
    snapshot.seal()
    for change in (
        snapshot.seal,
        lambda: snapshot.add_cluster(30, codec="bolt", row=2),
        lambda: snapshot.add_endpoint(10, 30, address=None, weight=1, row=2),
        lambda: snapshot.add_listener(30, codec="bolt", row=2),
        lambda: snapshot.add_rule(1, cluster_id=10, row=2),
    ):
        with pytest.raises(ValueError, match="snapshot: 1 is sealed"):
            change()
    with pytest.raises(ValueError, match="exists already"):
        snapshot.__init__(2, limits())  # type: ignore[misc]
    assert snapshot.find(1, of(b"abc")) == (0, 10)


def test_addresses_are_what_the_kernel_takes() -> None:
    snapshot = compiled([], seal=False)
    path = "/" + "x" * 106
    addresses: list[Any] = [
        ("192.0.2.7", 12201),
        None,
        ("2001:db8::7", 65535),
        "./run/a.sock",
        path,
    ]
    for number, address in enumerate(addresses):
        # Of two clusters in turn: they are grouped by cluster in the table.
        snapshot.add_endpoint(10 + number % 2, number, address=address, weight=1, row=2)
    snapshot.seal()
    zeros = bytes(8)
    assert snapshot.endpoint_addresses(10) == [
        (
            0,
            struct.pack("=H", socket.AF_INET)
            + struct.pack(">H", 12201)
            + bytes([192, 0, 2, 7])
            + zeros,
        ),
        (
            2,
            struct.pack("=H", socket.AF_INET6)
            + struct.pack(">HI", 65535, 0)
            + socket.inet_pton(socket.AF_INET6, "2001:db8::7")
            + bytes(4),
        ),
        (4, struct.pack("=H", socket.AF_UNIX) + path.encode() + b"\0"),
    ]
    assert snapshot.endpoint_addresses(11) == [
        (1, b""),
        (3, struct.pack("=H", socket.AF_UNIX) + b"./run/a.sock\0"),
    ]
    with pytest.raises(ValueError, match="cluster_id: 12"):
        snapshot.endpoint_addresses(12)


def test_codecs_are_known_by_name() -> None:
    assert "bolt" in route.codec_names()
    route.register_codec("bolt", bolt.capsule())
    route.register_codec("bolt-again", bolt.capsule())
    assert "bolt-again" in route.codec_names()
    snapshot = compiled([], seal=False)
    snapshot.add_cluster(30, codec="bolt-again", row=2)
    with pytest.raises(ValueError, match="cluster_id: 30 speaks bolt-again; listener 1 needs"):
        snapshot.add_rule(1, cluster_id=30, row=2)
    with pytest.raises(ValueError, match="PyCapsule"):
        route.register_codec("nothing", object())


def test_built_in_codecs_are_found_by_name() -> None:
    script = """
from fastmesh._ext import route
assert route.codec_names() == ["bolt", "push"]
snapshot = route.Snapshot(1, {name: high for name, (low, high) in route.LIMITS.items()})
snapshot.add_cluster(1, codec="bolt", row=2)
snapshot.add_cluster(2, codec="push", row=2)
print("held")
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout == "held\n", ended.stderr
