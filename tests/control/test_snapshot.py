"""From configuration to the engine's snapshot: stable ids, bounded rows, routes that are found."""

from __future__ import annotations

import random
import struct
from typing import Any

import msgspec
import pytest

from fastmesh import config
from fastmesh._ext import push
from fastmesh.address import Address
from fastmesh.config import Config
from fastmesh.control.snapshot import (
    Compiled,
    Directory,
    GroupView,
    MeshView,
    RowLabel,
    compile_snapshot,
)
from fastmesh.errors import HandoverError
from fastmesh.limits import ROW_OTHER
from tests.conftest import SMALL
from tests.fake_engine import FakeSnapshot


def parse(text: str = SMALL) -> Config:
    return config.parse(text.encode(), base="/base")


def build(found: Config, directory: Directory, version: int = 1, **more: Any) -> Compiled:
    more.setdefault("addresses", lambda address: (address,))
    return compile_snapshot(
        found, version=version, directory=directory, connections_max=100, **more
    )


def bolt_request(service: bytes = b"", **headers: str) -> bytes:
    pairs = [(b"service", service)] if service else []
    pairs += [(k.encode(), v.encode()) for k, v in headers.items()]
    section = b"".join(
        struct.pack(">i", len(k)) + k + struct.pack(">i", len(v)) + v for k, v in pairs
    )
    head = struct.pack(">BBHBIBihhi", 1, 1, 1, 1, 7, 1, 3000, 0, len(section), 0)
    return head + section


def test_the_first_rule_that_matches_decides() -> None:
    text = SMALL.replace(
        "      - {cluster: others}",
        '      - {name: b, match: {service: "com.example.*", header: {lane: blue}},'
        " cluster: orders}\n"
        "      - {cluster: others}",
    )
    made = build(parse(text), Directory(4096))
    rows = {route.row: route.name for route in made.routes}
    listener = made.listener_ids["rpc"]

    def found(frame: bytes) -> str:
        answer = made.snapshot.find(listener, frame)
        assert answer is not None
        return rows[answer[0]]

    assert found(bolt_request(b"com.example.Order:1.0")) == "com.example.Order:1.0"
    assert found(bolt_request(b"com.example.Stock:1.0", lane="blue")) == "b"
    assert found(bolt_request(b"com.example.Stock:1.0", lane="red")) == "*"
    assert found(bolt_request()) == "*"


def test_ids_and_rows_stay_with_their_names() -> None:
    directory = Directory(4096)
    first = build(parse(), directory)
    swapped = SMALL.replace(
        '  - {name: orders, protocol: bolt, endpoints: [{address: "127.0.0.1:12201"}]}\n', ""
    )
    swapped = swapped.replace(
        "limits:",
        "  - {name: orders, protocol: bolt, endpoints:"
        ' [{address: "127.0.0.1:9"}, {address: "127.0.0.1:12201"}]}\nlimits:',
    )
    second = build(parse(swapped), directory, 2)
    old = {(e.cluster, e.name): (e.id, e.row) for e in first.endpoints}
    new = {(e.cluster, e.name): (e.id, e.row) for e in second.endpoints}
    assert old.items() <= new.items()
    assert len({number for number, _ in new.values()}) == 3
    assert first.listener_ids == second.listener_ids
    assert first.cluster_rows == second.cluster_rows
    assert [r.row for r in first.routes] == [r.row for r in second.routes]


def test_what_moves_or_changes_kind_gets_a_new_id_and_keeps_its_row() -> None:
    directory = Directory(4096)
    first = build(parse(), directory)
    moved = SMALL.replace('listen: "127.0.0.1:0"\n', 'listen: "127.0.0.1:77"\n').replace(
        "name: orders, protocol: bolt", "name: orders, protocol: bolt, binding: per_client"
    )
    second = build(parse(moved), directory, 2)
    assert first.listener_ids["rpc"] != second.listener_ids["rpc"]
    assert first.listener_rows == second.listener_rows
    assert first.endpoints[0].id != second.endpoints[0].id
    assert first.endpoints[0].row == second.endpoints[0].row


def test_rows_beyond_the_table_are_counted_together() -> None:
    directory = Directory(6)
    made = build(parse(), directory)
    rows = [r.row for r in made.routes] + [e.row for e in made.endpoints]
    assert max(rows) == 5
    assert ROW_OTHER in rows
    assert sorted(directory.rows().values()) == [2, 3, 4, 5]


def test_names_that_come_and_go_do_not_fill_memory_and_ids_are_never_reused() -> None:
    directory = Directory(4096)
    seen: set[int] = set()
    for round_ in range(50):
        made = build(parse(SMALL.replace("12201", str(20000 + round_))), directory, round_ + 1)
        moved = next(e.id for e in made.endpoints if e.cluster == "orders")
        assert moved not in seen
        seen.add(moved)
    assert len(directory._ids) < 12


def test_a_name_with_several_addresses_is_several_endpoints_and_one_row() -> None:
    text = SMALL.replace('"127.0.0.1:12201"', '"orders.example:12201"')

    def addresses(address: Address) -> tuple[Address, ...]:
        if address.is_literal:
            return (address,)
        return (Address("10.0.0.1", 12201), Address("10.0.0.2", 12201))

    made = build(parse(text), Directory(4096), addresses=addresses)
    orders = [e for e in made.endpoints if e.cluster == "orders"]
    assert [str(e.address) for e in orders] == ["10.0.0.1:12201", "10.0.0.2:12201"]
    assert len({e.id for e in orders}) == 2
    assert len({e.row for e in orders}) == 1


def test_an_unresolved_name_keeps_its_place() -> None:
    text = SMALL.replace('"127.0.0.1:12201"', '"orders.example:12201"')
    made = build(parse(text), Directory(4096), addresses=lambda a: (a,) if a.is_literal else ())
    assert [e.address for e in made.endpoints if e.cluster == "orders"] == [None]


def test_a_row_label_says_what_it_counts() -> None:
    directory = Directory(4096)
    build(parse(), directory)
    assert {label.kind for label in directory.rows()} == {
        "listener",
        "route",
        "cluster",
        "endpoint",
    }
    assert RowLabel("route", "rpc", "*", "others") in directory.rows()


# --- the message mesh -----------------------------------------------------------------------------

MESH = """\
node: {name: n1, app: shop}
listeners:
  - {name: msg, listen: "127.0.0.1:0", protocol: push}
push:
  brokers:
    - {name: b1, address: "127.0.0.1:1", topics: [orders, "stock.*"]}
    - {name: b2, address: "127.0.0.1:2", topics: ["orders*"]}
    - {name: b3, address: "127.0.0.1:3", topics: ["*"], weight: 7}
  forward: {listen: "127.0.0.1:0"}
registration: {listen: "127.0.0.1:0"}
"""


def mesh_view(found: Config, **more: Any) -> MeshView:
    assert found.push is not None
    given: dict[str, Any] = {
        "brokers": found.push.brokers,
        "groups": (
            GroupView("g1", "shop", "orders", publishes=False, ordered=True),
            GroupView("p1", "shop", "orders", publishes=True),
            GroupView("g2", "other", "news", publishes=False, broadcast=True),
        ),
        "topics": ("orders", "orders.x", "stock.x", "news"),
        "peers": {"n2": Address("127.0.0.1", 12501), "n3": Address("n3.example", 12502)},
    } | more
    return MeshView(**given)


def build_mesh(directory: Directory | None = None, text: str = MESH, **more: Any) -> Any:
    found = parse(text)
    version = more.pop("version", 1)
    return build(
        found,
        directory or Directory(4096),
        version,
        factory=FakeSnapshot,
        mesh=mesh_view(found, **more),
    )


def test_a_topic_goes_to_all_brokers_that_have_it() -> None:
    snapshot = build_mesh().snapshot
    one, two, three = (f"('127.0.0.1', {n})" for n in (1, 2, 3))
    assert snapshot.brokers_of("orders") == [one, two, three]
    assert snapshot.brokers_of("orders.x") == [two, three]
    assert snapshot.brokers_of("stock.x") == [one, three]
    assert snapshot.brokers_of("news") == [three]
    assert snapshot.brokers_of("unregistered") == []
    assert snapshot.brokers_of("orders", **{"fm.broker": "b2"}) == [two], "a second phase"
    weights = sorted(e["weight"] for e in snapshot.endpoints.values())
    assert weights == [7, 100, 100, 100, 100]


def test_the_real_snapshot_takes_it_all() -> None:
    found = parse(MESH)
    view = mesh_view(found, peers={"n2": Address("127.0.0.1", 12501)})
    made = build(found, Directory(4096), mesh=view)
    listener = made.listener_ids["msg"]
    rows = {info.row: info.name for info in made.routes}

    def route(**headers: str) -> str | None:
        named = {f"fm.{key}": value for key, value in headers.items()}
        found = made.snapshot.find(listener, push.request(1, {"fm.op": "publish"} | named))
        return None if found is None else rows[found[0]]

    assert route(topic="orders") == "orders"
    assert route(topic="orders", group="p1") == "orders{fm.group=p1}"
    assert route(topic="orders", group="g1") == "orders"
    assert route(topic="orders", broker="b1") == "{fm.broker=b1}"
    assert route(topic="nothing") is None


def test_topics_without_a_broker_have_no_rule() -> None:
    text = MESH.replace('topics: ["*"], weight: 7', "topics: [a]")
    made = build_mesh(text=text)
    assert made.snapshot.brokers_of("news") == []
    assert "news" not in {info.topic for info in made.publishes}


def test_brokers_that_want_nothing_have_no_weight_and_keep_their_connection() -> None:
    directory = Directory(4096)
    first = build_mesh(directory)
    paused = next(e.id for e in first.endpoints if e.name == "b1")
    second = build_mesh(directory, version=2, paused=frozenset((paused,)))
    assert second.snapshot.endpoints[paused]["weight"] == 0
    assert [e.id for e in first.endpoints] == [e.id for e in second.endpoints]


def test_each_kind_of_number_says_what_it_is() -> None:
    made = build_mesh()
    kinds = {e.name: made.kinds[e.id] for e in made.endpoints}
    assert kinds == dict.fromkeys(("b1", "b2", "b3"), "brokers") | dict.fromkeys(
        ("n2", "n3"), "peers"
    )
    assert made.kinds[made.listener_ids["msg"]] == "push"
    assert made.kinds[made.listener_ids["__forward__"]] == "forward"
    assert made.snapshot.node == b"n1"
    assert {x["kind"] for x in made.snapshot.listeners.values()} == {"push", "forward"}


def test_a_host_name_is_one_connection_to_a_broker_or_node() -> None:
    found = parse(MESH)
    made = build(
        found,
        Directory(4096),
        factory=FakeSnapshot,
        mesh=mesh_view(found),
        addresses=lambda a: (
            (a,) if a.is_literal else (Address("10.0.0.1", a.port), Address("10.0.0.2", a.port))
        ),
    )
    assert len(made.endpoints) == 5


def test_groups_keep_their_numbers_and_rows() -> None:
    directory = Directory(4096)
    first = build_mesh(directory)
    second = build_mesh(directory, version=2)
    assert first.group_ids == second.group_ids
    assert first.group_rows == second.group_rows
    by_name = {g["name"]: g for g in first.snapshot.groups.values()}
    assert by_name[b"g1"]["ordered"]
    assert by_name[b"g2"]["broadcast"]
    unordered = tuple(
        GroupView(g.name, g.app, g.topic, g.publishes, broadcast=g.broadcast)
        for g in mesh_view(parse(MESH)).groups
    )
    third = build_mesh(directory, version=3, groups=unordered)
    assert third.group_ids["g1"] != first.group_ids["g1"], "its connections join anew"
    assert third.group_rows == first.group_rows


def test_groups_that_come_and_go_use_few_numbers_again(monkeypatch: Any) -> None:
    monkeypatch.setattr("fastmesh.control.snapshot.GROUP_ID_MAX", 8)
    directory = Directory(4096)
    last: dict[int, int] = {}
    for turn in range(100):
        groups = tuple(GroupView(f"g{turn}-{n}", "shop", "orders", False) for n in range(2))
        made = build_mesh(directory, version=turn + 1, groups=groups)
        for number in made.group_ids.values():
            assert turn - last.get(number, -9) > 2, "never while an older snapshot may have it"
            last[number] = turn
    many = tuple(GroupView(f"m{n}", "shop", "orders", False) for n in range(9))
    with pytest.raises(ValueError, match="more than 8 groups"):
        build_mesh(directory, version=101, groups=many)


def test_each_application_has_its_schedule_and_the_nodes_that_are_dialled() -> None:
    asked = []

    def schedule(app: str, endpoints: Any) -> object | None:
        asked.append((app, dict(endpoints)))
        return ("native", app) if app == "shop" else None

    made = build_mesh(schedule=schedule)
    numbers = {e.name: e.id for e in made.endpoints if e.cluster == "__peers__"}
    assert asked == [("shop", numbers), ("other", numbers)]
    (number,) = made.snapshot.schedules
    scheduled = {g["name"]: g["schedule_id"] for g in made.snapshot.groups.values()}
    assert scheduled == {b"g1": number, b"p1": number, b"g2": None}


# --- hand-over ------------------------------------------------------------------------------------


def successor(directory: Directory, version: int = 1, rows_max: int = 4096) -> Directory:
    made = Directory(rows_max)
    data = msgspec.json.encode(directory.save(version))
    assert made.restore(msgspec.Raw(data)) == version
    return made


KEYS: list[Any] = [
    ("cluster", "a", "bolt", "shared"),
    (("cluster", "a"), "endpoint", "h:1", Address("10.0.0.1", 1)),
    (("cluster", "a"), "endpoint", "h:1", None),
    ("x", Address("::1", 65535), Address(path="/run/ü.sock"), True, 7),
    *(("listener", f"l{n}") for n in range(30)),
]
LABELS = [RowLabel("route", listener="l", route=f"r{n}", cluster="c", app="a") for n in range(60)]


def step(chosen: random.Random, directories: list[Directory]) -> None:
    """The same for each of them, and the same answer."""
    kind = chosen.randrange(5)
    answers: set[int] = set()
    if kind == 0:
        key = chosen.choice(KEYS)
        answers = {d.id(key) for d in directories}
    elif kind == 1:
        label = chosen.choice(LABELS)
        answers = {d.row(label) for d in directories}
    elif kind in (2, 3):
        group = (f"g{chosen.randrange(50)}", chosen.random() < 0.5, False)
        answers = {d.group(group) for d in directories}
    elif chosen.random() < 0.3:
        for directory in directories:
            directory.turn()
    assert len(answers) <= 1


@pytest.mark.parametrize("seed", range(30))
def test_a_successor_gives_the_same_numbers_whatever_came_and_went(seed: int) -> None:
    chosen = random.Random(seed)
    one = Directory(40)
    for _ in range(chosen.randrange(400)):
        step(chosen, [one])
    two = successor(one, rows_max=40)
    assert two.rows() == one.rows()
    for _ in range(400):
        step(chosen, [one, two])
    assert two.save(1) == one.save(1)


def test_a_successor_goes_on_using_group_ids_again() -> None:
    one = Directory(4096)
    for number in range(65535):
        one.group((f"g{number}", False, False))
    for _ in range(3):
        one.turn()
    two = successor(one)
    for name in ("a", "b", "c"):
        assert one.group(name) == two.group(name)


def test_the_same_configuration_has_the_same_numbers_in_the_next_process() -> None:
    one = Directory(4096)
    first = build_mesh(one)
    two = successor(one)
    second = build_mesh(two, version=2)
    for name in (
        "listener_ids",
        "endpoints",
        "routes",
        "cluster_rows",
        "listener_rows",
        "kinds",
        "group_ids",
        "group_rows",
        "publishes",
    ):
        assert getattr(first, name) == getattr(second, name), name
        assert getattr(first, name), name


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"rows": [[2, "x"], [2, "y"]]}, "one of its own"),
        ({"rows": [[ROW_OTHER, "x"]]}, "one of its own"),
        ({"rows": [[4096, "x"]]}, "one of its own in"),
        ({"ids": [[1, "x"]], "next_id": 1}, "below the next number"),
        ({"ids": [[1, "x"], [1, "y"]], "next_id": 9}, "two keys"),
        ({"ids": [[1, "x"], [2, "x"]], "next_id": 9}, "stands there twice"),
        ({"ids": [[1, {"a": 1}]], "next_id": 9}, "a key is made of"),
        ({"ids": [[1, 1.5]], "next_id": 9}, "a key is made of"),
        ({"ids": [[1, {"address": ["a", "b", "c"]}]], "next_id": 9}, "a key is made of"),
        ({"ids": [[1, [[[[[["x"]]]]]]]], "next_id": 9}, "a key is made of"),
        ({"ids": [[0, "x"]]}, ">= 1"),
        ({"groups": [[70000, "x"]], "next_group": 65536}, "below the next number"),
        ({"groups": [[2, "x"]], "next_group": 3, "groups_free": [2]}, "must be free"),
        ({"next_group": 3, "groups_free": [1, 1]}, "must be free"),
        ({"next_group": 3, "groups_free": [7]}, "below next_group"),
        ({"next_group": 70000}, "<= 65536"),
        ({"version": -1}, ">= 0"),
        ([], "Expected `object`"),
    ],
)
def test_a_directory_that_is_none_is_refused(data: object, said: str) -> None:
    directory = Directory(4096)
    number = directory.id("before")
    with pytest.raises(HandoverError, match=said):
        directory.restore(data)
    assert directory.id("before") == number, "nothing has changed"


def test_a_directory_of_the_versions_beside_ours_is_read() -> None:
    directory = Directory(4096)
    data = {
        "later": 1,
        "rows": [[2, "listener", "l", "", "", "", "", "", "later"], [7, "cluster"]],
        "ids": [[3, ["a", "b"], "later"]],
        "next_id": 5,
    }
    assert directory.restore(data) == 0
    assert directory.row(RowLabel("listener", listener="l")) == 2
    assert directory.row(RowLabel("new")) == 8
    assert (directory.id(("a", "b")), directory.id("new")) == (3, 5)


def test_more_rows_than_this_build_counts_are_refused() -> None:
    directory = Directory(100)
    for number in range(50):
        directory.row(RowLabel("route", route=str(number)))
    with pytest.raises(HandoverError, match=r"directory.rows"):
        Directory(40).restore(directory.save(1))
