"""The schedule: which node of an application takes how much, as people write it.

One document (a YAML file, or the JSON body of PUT /v1/schedule) becomes frozen dataclasses, or all
its problems at once, each with path, line, value and what would be right. `compile` makes of it
what the engine decides by (fastmesh/_ext/schedule.pxd: the policy and its promises stand there).

    apps:
      demo:
        nodes:
          - {name: n1, address: "10.0.0.1:12500", weight: 100}
          - {name: n2, address: "10.0.0.2:12500", weight: 20}
        rules:
          - {match: {colour: blue, header: {region: eu}}, nodes: [n2, {name: n1, weight: 10}]}

Nothing here has an effect outside the process; no name is resolved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastmesh import limits
from fastmesh._ext.schedule import Schedule
from fastmesh.address import Address
from fastmesh.document import MISSING, List, Problems, Table, Tree, join, read_json, read_tree
from fastmesh.document import no_double as refuse_doubles
from fastmesh.errors import ConfigError

ATTRIBUTES = ("colour", "lane", "version", "key")
"""What a rule may match of a message, besides user headers: fm.colour, fm.lane, ..."""
HEADER_PREFIX = "h."
"""User headers stand under this prefix in a message; a schedule names them without it."""

_APP = re.compile(rf"[A-Za-z0-9_.:@/%-]{{1,{limits.MESH_NAME_CHARS_MAX}}}\Z")


@dataclass(frozen=True, slots=True)
class NodeSpec:
    name: str
    """As in `node.name` of that node's configuration."""
    address: Address
    """Of its forward service."""
    weight: int = 100
    """Percent of what brokers deliver to this node that stays here. Only nodes of weight 100 take
    what others do not keep."""


@dataclass(frozen=True, slots=True)
class RuleSpec:
    match: tuple[tuple[str, str], ...]
    """(colour | lane | version | key | h.<header>, value): all of them must hold."""
    nodes: tuple[tuple[str, int], ...]
    """(name, weight): who shares what matches."""


@dataclass(frozen=True, slots=True)
class AppSchedule:
    name: str
    nodes: tuple[NodeSpec, ...]
    rules: tuple[RuleSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class ScheduleSpec:
    """A whole schedule: every name in it means one address, and the other way round."""

    apps: Mapping[str, AppSchedule]

    def peers(self, local: str) -> dict[str, Address]:
        """The other nodes of all applications and their forward services."""
        return {
            node.name: node.address
            for app in self.apps.values()
            for node in app.nodes
            if node.name != local
        }

    def compile(self, app: str, local: str, endpoints: Mapping[str, int]) -> Schedule | None:
        """What the node `local` decides by for an application; None when it has no schedule.
        `endpoints`: name to the stable id of its endpoint, of any nodes; one that is not there is
        never chosen."""
        found = self.apps.get(app)
        if found is None:
            return None
        return Schedule(
            [(node.name, node.weight) for node in found.nodes],
            rules=[(rule.match, rule.nodes) for rule in found.rules],
            local=local,
            endpoints={n.name: endpoints[n.name] for n in found.nodes if n.name in endpoints},
        )

    def as_dict(self) -> dict[str, Any]:
        """As a document, with its defaults: what `parse` makes the same schedule of."""
        return {"apps": {name: _plain_app(app) for name, app in self.apps.items()}}


def parse(data: bytes, source: str = "schedule") -> ScheduleSpec:
    """Check the bytes of a schedule. Raises ConfigError with all problems; `source` names them."""
    problems = Problems()
    apps: dict[str, AppSchedule] = {}
    if len(data) > limits.CONFIG_BYTES_MAX:
        problems.add("", len(data), f"must be at most {limits.CONFIG_BYTES_MAX} bytes long")
    else:
        tree = _read(data, problems)
        if not problems.found:
            apps = _apps(Table(tree, "", problems))
    if problems.found:
        raise ConfigError(problems.sorted(), source)
    return ScheduleSpec(apps)


def _read(data: bytes, problems: Problems) -> Tree:
    """Programs send JSON, which is read a hundred times faster as such; whatever is wrong with it
    is told by the YAML reader, which knows lines (and takes {flow: style}, too)."""
    if data.lstrip()[:1] == b"{":
        attempt = Problems()
        tree = read_json(data, attempt, "apps")
        if not attempt.found:
            return tree
    return read_tree(data, problems, "apps")


# --- from the tree to dataclasses -----------------------------------------------------------------


def _apps(top: Table) -> dict[str, AppSchedule]:
    if top.raw("apps") is MISSING:
        # `apps: {}` schedules nothing and says so; `apps:` alone is a file cut off.
        top.done()
        return {}
    table = top.table("apps")
    top.done()
    if len(table.tree) > limits.SCHEDULE_APPS_MAX:
        top.wrong(
            "apps", len(table.tree), f"must have at most {limits.SCHEDULE_APPS_MAX} applications"
        )
        return {}
    found = {}
    seen = _Addresses()
    for name in table.tree:
        app = table.table(name)
        if not _APP.match(name):
            most = limits.MESH_NAME_CHARS_MAX
            table.wrong(
                name, None, f'an application is 1..{most} letters, digits or any of "_.:@/%-"'
            )
        elif isinstance(table.tree[name], Tree):
            found[name] = _app(app, name, seen)
        elif table.tree[name] is None:
            table.wrong(name, None, "is missing: it needs nodes")
    return found


class _Addresses:
    """A node is a process: it has one name and one forward service in all applications."""

    def __init__(self) -> None:
        self.by_name: dict[str, tuple[Address, str]] = {}
        self.by_address: dict[Address, tuple[str, str]] = {}

    def check(self, item: Table, name: str, address: Address) -> None:
        known, where = self.by_name.setdefault(name, (address, item.path))
        if known != address:
            item.wrong("address", str(address), f"{name} is {known} already in {where}")
        other, where = self.by_address.setdefault(address, (name, item.path))
        if other != name:
            item.wrong("address", str(address), f"is taken already by {other} in {where}")


def _app(table: Table, name: str, seen: _Addresses) -> AppSchedule:
    nodes = []
    for item in table.tables("nodes", limits.SCHEDULE_NODES_MAX, what="node"):
        node = item.name("name")
        address = item.address("address", "")
        if address is not None and address.is_unix and not address.path.startswith("/"):
            item.wrong("address", str(address), "must have an absolute path after unix:")
            address = None
        weight = item.integer("weight", 0, 100, 100)
        item.done()
        if node is not None and address is not None:
            seen.check(item, node, address)
        nodes.append(NodeSpec(node or "", address or Address(), 100 if weight is None else weight))
    refuse_doubles(table, "nodes", [node.name for node in nodes], "name")
    rules: list[RuleSpec] = []
    if table.raw("rules", None) not in (MISSING, []):
        # A node that is wrong itself is told once, not at every rule that names it.
        names = None if any(not node.name for node in nodes) else [node.name for node in nodes]
        rules = [
            _rule(item, names)
            for item in table.tables("rules", limits.SCHEDULE_RULES_MAX, what="rule")
        ]
        _cross_check(table, rules)
    table.done()
    return AppSchedule(name, tuple(nodes), tuple(rules))


def _cross_check(table: Table, rules: list[RuleSpec]) -> None:
    """What no rule can see alone."""
    most = limits.SCHEDULE_RULE_NODES_MAX
    if (count := sum(len(rule.nodes) for rule in rules)) > most:
        table.wrong("rules", count, f"may name at most {most} nodes in all")
    asked: dict[frozenset[tuple[str, str]], int] = {}
    for index, rule in enumerate(rules):
        first = asked.setdefault(frozenset(rule.match), index)
        if rule.match and first != index:
            items = table.tree["rules"]
            path = f"{join(table.path, 'rules')}[{index}].match"
            line = items.lines[index] if isinstance(items, List) else 0
            table.problems.add(
                path, None, f"is never reached: rules[{first}] matches the same", line
            )


def _rule(table: Table, names: list[str] | None) -> RuleSpec:
    match = table.table("match")
    found = []
    for key in ATTRIBUTES:
        value = _matched(match, key)
        if value is not None:
            found.append((key, value))
    header = match.table("header")
    for key in header.tree:
        value = _matched(header, key)
        # What the compiled form holds is the name on the wire, "h." included.
        most = limits.SERVICE_BYTES_MAX - len(HEADER_PREFIX)
        if not key or not _is_utf8(key) or len(key.encode()) > most:
            header.wrong(
                key, None, f"a header's name is 1..{most} bytes, without its {HEADER_PREFIX}"
            )
        elif key.startswith((HEADER_PREFIX, "fm.")):
            header.wrong(key, value, f"is a user header, written without {HEADER_PREFIX} or fm.")
        elif value is not None:
            found.append((HEADER_PREFIX + key, value))
    match.done()
    if not any(match.tree.get(key) is not None for key in match.tree):
        table.wrong("match", None, f"must ask for something: {', '.join(ATTRIBUTES)}, header")
    elif len(found) > limits.SCHEDULE_MATCHES_MAX:
        most = limits.SCHEDULE_MATCHES_MAX
        table.wrong("match", len(found), f"may ask for at most {most} attributes and headers")
    nodes = _rule_nodes(table, names)
    table.done()
    return RuleSpec(tuple(found), nodes)


def _matched(table: Table, key: str) -> str | None:
    """A value that is compared byte by byte; an empty one is a value."""
    value = table.text(key, None)
    if value is None:
        return None
    if len(value.encode()) > limits.SERVICE_BYTES_MAX:
        table.wrong(key, value, f"must be text of at most {limits.SERVICE_BYTES_MAX} bytes")
        return None
    return value


def _is_utf8(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _rule_nodes(table: Table, names: list[str] | None) -> tuple[tuple[str, int], ...]:
    """Names, or mappings of name and weight; a name alone weighs 100."""
    value = table.raw("nodes", None)
    if value is MISSING or value == []:
        table.wrong("nodes", None, "must have at least one node")
        return ()
    if not isinstance(value, List):
        table.wrong("nodes", value, "must be a list of names, or of {name: ..., weight: ...}")
        return ()
    if len(value) > limits.SCHEDULE_NODES_MAX:
        table.wrong("nodes", len(value), f"must have at most {limits.SCHEDULE_NODES_MAX} items")
        return ()
    problems = len(table.problems.found)
    found: list[tuple[str, int]] = []
    for index, item in enumerate(value):
        path = f"{join(table.path, 'nodes')}[{index}]"
        line = value.lines[index]
        weight: int | None = 100
        if isinstance(item, Tree):
            entry = Table(item, path, table.problems)
            name = entry.name("name")
            weight = entry.integer("weight", 0, 100, 100)
            entry.done()
        elif isinstance(item, str):
            name = item
        else:
            table.problems.add(path, item, "must be the name of a node: put it in quotes", line)
            continue
        if name is None:
            continue
        if names is not None and name not in names:
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            table.problems.add(path, name, f"is not a node of this application: {known}", line)
        if any(name == other for other, _ in found):
            table.problems.add(path, name, "is there twice", line)
        found.append((name, 100 if weight is None else weight))
    if found and len(table.problems.found) == problems and not any(w for _, w in found):
        table.wrong("nodes", None, "must have a weight above 0 somewhere")
    return tuple(found)


# --- showing it -----------------------------------------------------------------------------------


def _plain_app(app: AppSchedule) -> dict[str, Any]:
    return {
        "nodes": [
            {"name": node.name, "address": str(node.address), "weight": node.weight}
            for node in app.nodes
        ],
        "rules": [
            {
                "match": _plain_match(rule.match),
                "nodes": [{"name": name, "weight": weight} for name, weight in rule.nodes],
            }
            for rule in app.rules
        ],
    }


def _plain_match(match: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    plain: dict[str, Any] = {k: v for k, v in match if not k.startswith(HEADER_PREFIX)}
    headers = {k.removeprefix(HEADER_PREFIX): v for k, v in match if k.startswith(HEADER_PREFIX)}
    return plain | ({"header": headers} if headers else {})
