"""From configuration to the engine's snapshot: stable ids, bounded rows, routes that are found."""

from __future__ import annotations

import struct
from typing import Any

from fastmesh import config
from fastmesh.config import Address, Config
from fastmesh.control.snapshot import Compiled, Directory, RowLabel, compile_snapshot
from fastmesh.limits import ROW_OTHER
from tests.conftest import SMALL


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
