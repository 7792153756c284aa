"""Configuration: one YAML file becomes frozen dataclasses, or all its problems at once.

Every problem has a path (`clusters[0].endpoints[1].weight`), a line, the value that stands there
and what would be right. Nothing here has an effect outside the process: files are read, never
written, no socket is opened and no name is resolved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmesh import limits as bounds
from fastmesh.address import HOSTNAME, LOOPBACK_NAMES, Address, unix_address
from fastmesh.document import (
    MISSING,
    List,
    Problems,
    Table,
    Tree,
    mappings,
    no_double,
    read_regular,
    read_tree,
)
from fastmesh.errors import ConfigError, Problem

PROTOCOLS = ("bolt",)
"""What clusters speak, and listeners with routes."""
LISTENER_PROTOCOLS = (*PROTOCOLS, "push")
BINDINGS = ("shared", "per_client")
SERVER_REQUESTS = ("any", "refuse")
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")

NEEDS_UPGRADE = ("engine", "admin", "state_dir", "registration")
"""Top-level keys that a running process cannot change under itself; with a push section also `node`
and whether there is one."""

MESH_NAME = re.compile(rf"[A-Za-z0-9_.:@/%-]{{1,{bounds.MESH_NAME_CHARS_MAX}}}\Z")
MESH_NAME_RULE = f'must be 1..{bounds.MESH_NAME_CHARS_MAX} letters, digits or any of "_.:@/%-"'


class Secret:
    """Text that never shows itself: not in repr, str, format, pickle or JSON. `reveal()` is the one
    way out."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "<redacted>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return "<redacted>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash((Secret, self._text))

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        return (Secret, ("<redacted>",))


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    app: str


@dataclass(frozen=True, slots=True)
class EngineOptions:
    threads: int = 1
    spin_us: int = 0


@dataclass(frozen=True, slots=True)
class Admin:
    listen: Address
    token: Secret | None = None
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Registration:
    """Where applications register (fastmesh.mesh.registration_http)."""

    listen: Address
    token: Secret | None = None
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RateLimit:
    per_second: int
    burst: int


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a listener's routing table."""

    name: str
    cluster: str
    service: str | None = None
    """None matches every request, also one without a service; with `prefix`, what it starts
    with."""
    prefix: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    rate_limit: RateLimit | None = None


@dataclass(frozen=True, slots=True)
class Listener:
    name: str
    listen: Address
    protocol: str
    routes: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Broker:
    """A push broker: one connection, whatever the number of clients."""

    name: str
    address: Address
    weight: int = 100
    topics: tuple[str, ...] = ("*",)
    """Exact names, or what they start with and "*"."""

    def has(self, topic: str) -> bool:
        return any(topic.startswith(p[:-1]) if p.endswith("*") else topic == p for p in self.topics)


@dataclass(frozen=True, slots=True)
class Push:
    """The message mesh of this process."""

    brokers: tuple[Broker, ...] = ()
    """As configured; () when they stand in a file."""
    brokers_file: str = ""
    """Watched; "" when they stand in the configuration."""
    forward: Address | None = None
    """Where other nodes' meshes connect; None = this node takes no forwards."""
    schedule_file: str = ""
    """Watched; "" = PUT /v1/schedule decides."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    address: Address
    weight: int = 100


@dataclass(frozen=True, slots=True)
class Cluster:
    name: str
    protocol: str
    endpoints: tuple[Endpoint, ...]
    connections: int = 1
    binding: str = "shared"
    server_requests: str = "any"


@dataclass(frozen=True, slots=True)
class Limits:
    """One field per row of `limits.CONFIGURABLE`, where unit, reason and precedent stand."""

    frame_bytes_max: int
    in_flight_max: int
    in_flight_per_connection_max: int
    connections_max: int
    queue_bytes_max: int
    memory_bytes_max: int
    request_timeout_ms: int
    request_timeout_ms_max: int
    first_byte_timeout_ms: int
    frame_timeout_ms: int
    idle_timeout_ms: int
    connect_timeout_ms: int
    heartbeat_ms: int
    stop_timeout_ms: int
    drain_suspend_ms: int
    drain_answers_ms: int
    backoff_ms: int
    backoff_ms_max: int
    eject_failures: int
    eject_ms: int
    eject_ms_max: int
    eject_percent_max: int
    slow_start_ms: int
    retries_max: int


@dataclass(frozen=True, slots=True)
class Observe:
    sample_every: int = 0
    """One request in so many goes to the ring of /v1/samples; 0 = none."""


@dataclass(frozen=True, slots=True)
class LogOptions:
    format: str = "text"
    level: str = "info"


@dataclass(frozen=True, slots=True)
class Config:
    node: Node
    state_dir: str
    engine: EngineOptions
    admin: Admin
    listeners: tuple[Listener, ...]
    clusters: tuple[Cluster, ...]
    limits: Limits
    observe: Observe
    log: LogOptions
    push: Push | None = None
    registration: Registration | None = None
    source: str = field(default="", compare=False)
    """The file this came from."""
    sha256: str = field(default="", compare=False)
    """Of the file's bytes: the identity of a configuration."""

    def cluster(self, name: str) -> Cluster:
        return next(c for c in self.clusters if c.name == name)


def load(path: str | os.PathLike[str]) -> Config:
    """Read and check a configuration file. Raises ConfigError with all its problems."""
    source = os.path.abspath(os.fspath(path))
    try:
        data = read_regular(source, bounds.CONFIG_BYTES_MAX)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError([Problem("", source, f"cannot be read: {reason}")], source) from error
    return parse(data, base=os.path.dirname(source), source=source)


def parse(data: bytes, *, base: str, source: str = "config") -> Config:
    """Check the bytes of a configuration; relative paths in it start at `base`. Raises
    ConfigError."""
    problems = Problems()
    config: Config | None = None
    if len(data) > bounds.CONFIG_BYTES_MAX:
        problems.add("", len(data), f"must be at most {bounds.CONFIG_BYTES_MAX} bytes long")
    else:
        tree = read_tree(data, problems, "listeners")
        if not problems.found:
            config = _build(Table(tree, "", problems), base, problems)
    if problems.found or config is None:
        raise ConfigError(problems.sorted(), source)
    return dataclasses.replace(config, source=source, sha256=hashlib.sha256(data).hexdigest())


def needs_upgrade(old: Config, new: Config) -> list[str]:
    """Keys that differ and that a reload cannot change."""
    found = [
        f"engine.{name}"
        for name in ("threads", "spin_us")
        if getattr(old.engine, name) != getattr(new.engine, name)
    ]
    if old.admin != new.admin:
        found.append("admin")
    if old.state_dir != new.state_dir:
        found.append("state_dir")
    if old.registration != new.registration:
        found.append("registration")
    if (old.push is None) != (new.push is None):
        found.append("push")
    if new.push is not None and old.push is not None:
        # Brokers and peers know this node by its name from hello to goaway.
        found += [
            f"node.{name}"
            for name in ("name", "app")
            if getattr(old.node, name) != getattr(new.node, name)
        ]
    return found


def load_brokers(path: str) -> tuple[Broker, ...]:
    """Read a file of brokers, `{brokers: [...]}`; () for an empty list. Raises ConfigError with all
    its problems."""
    try:
        data = read_regular(path, bounds.CONFIG_BYTES_MAX)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError([Problem("", path, f"cannot be read: {reason}")], path) from error
    return parse_brokers(data, base=os.path.dirname(path), source=path)


def parse_brokers(data: bytes, *, base: str, source: str = "brokers") -> tuple[Broker, ...]:
    """Check the bytes of a file of brokers. Raises ConfigError."""
    problems = Problems()
    found: tuple[Broker, ...] = ()
    if len(data) > bounds.CONFIG_BYTES_MAX:
        problems.add("", len(data), f"must be at most {bounds.CONFIG_BYTES_MAX} bytes long")
    else:
        tree = read_tree(data, problems, "brokers")
        if not problems.found:
            table = Table(tree, "", problems)
            if tree.get("brokers") == []:
                table.known.append("brokers")  # said, not forgotten
            else:
                found = _brokers(table, "brokers", base)
            table.done()
    if problems.found:
        raise ConfigError(problems.sorted(), source)
    return found


def _build(top: Table, base: str, problems: Problems) -> Config | None:
    before = len(problems.found)
    node = _node(top.table("node"))
    state_dir = _path(top, "state_dir", base, "run")
    engine = _engine(top.table("engine"))
    admin = _admin(top.table("admin"), base, state_dir)
    listeners = [
        _listener(t, base) for t in top.tables("listeners", bounds.LISTENERS_MAX, what="listener")
    ]
    clusters = _clusters(top, base, listeners)
    limits = _limits(top.table("limits"))
    observe = _observe(top.table("observe"))
    log = _log(top.table("log"))
    push = _push(top.table("push"), base) if _given(top, "push") else None
    registration = _registration(top.table("registration"), base, push)
    top.done()
    _cross_check(top, listeners, clusters, admin=admin, push=push, registration=registration)
    if len(problems.found) > before:
        return None
    return Config(
        node=node,
        state_dir=state_dir,
        engine=engine,
        admin=admin,
        listeners=tuple(listeners),
        clusters=tuple(clusters),
        limits=limits,
        observe=observe,
        log=log,
        push=push,
        registration=registration,
    )


def _given(table: Table, key: str) -> bool:
    table.known.append(key)
    return table.tree.get(key) is not None


def _clusters(top: Table, base: str, listeners: Sequence[Listener]) -> list[Cluster]:
    """At least one wherever somebody could use it: a process may carry the message mesh alone."""
    push_alone = bool(listeners) and all(x.protocol == "push" for x in listeners)
    if push_alone and top.tree.get("clusters") in (None, []):
        top.known.append("clusters")
        return []
    return [_cluster(t, base) for t in top.tables("clusters", bounds.CLUSTERS_MAX, what="cluster")]


def _path(table: Table, key: str, base: str, default: str) -> str:
    value = table.text(key, default) or default
    if "\0" in value:
        table.wrong(key, value, "a path has no NUL")
        value = default
    return os.path.normpath(os.path.join(base, value))


def _node(table: Table) -> Node:
    name = table.name("name", "node") or ""
    app = table.name("app", "app") or ""
    table.done()
    return Node(name, app)


def _engine(table: Table) -> EngineOptions:
    threads = table.integer("threads", 1, bounds.ENGINE_THREADS_MAX, 1) or 1
    spin_us = table.integer("spin_us", 0, bounds.SPIN_US_MAX, 0) or 0
    table.done()
    return EngineOptions(threads, spin_us)


def _observe(table: Table) -> Observe:
    sample_every = table.integer("sample_every", 0, bounds.INT32_MAX, 0) or 0
    table.done()
    return Observe(sample_every)


def _log(table: Table) -> LogOptions:
    form = table.choice("format", LOG_FORMATS, "text") or "text"
    level = table.choice("level", LOG_LEVELS, "info") or "info"
    table.done()
    return LogOptions(form, level)


def _admin(table: Table, base: str, state_dir: str) -> Admin:
    listen: Address | None
    if "listen" in table.tree:
        listen = table.address("listen", base, port_min=0)
    else:
        table.known.append("listen")
        try:
            listen = unix_address("admin.sock", state_dir)
        except ValueError as error:
            table.wrong("listen", None, f"is missing, and state_dir is too long for it: {error}")
            listen = None
    return Admin(listen or Address(), *_guard(table, base, listen))


def _registration(table: Table, base: str, push: Push | None) -> Registration | None:
    if not table.tree:
        if push is not None:
            table.wrong("listen", None, "is missing: push clients are told from their registration")
        return None
    listen = table.address("listen", base, port_min=0)
    found = Registration(listen or Address(), *_guard(table, base, listen))
    if push is None:
        table.wrong("listen", str(found.listen), "needs a push section: nothing else registers")
    return found


def _guard(
    table: Table, base: str, listen: Address | None
) -> tuple[Secret | None, tuple[str, ...]]:
    """What stands beside the `listen` of an HTTP listener: its token and names."""
    _can_listen(table, listen)
    hosts: list[str] = []
    raw_hosts = table.raw("hosts", None)
    if raw_hosts is not MISSING:
        if isinstance(raw_hosts, list) and all(
            isinstance(h, str) and HOSTNAME.match(h) for h in raw_hosts
        ):
            hosts = [h.lower() for h in raw_hosts]
        else:
            table.wrong("hosts", raw_hosts, "must be a list of host names, without ports")
    token = _token(table, base)
    if (
        listen is not None
        and not listen.is_loopback
        and token is None
        and "token_file" not in table.tree
    ):
        table.wrong("token_file", None, f"is required, because {listen} is not a loopback address")
    table.done()
    return token, tuple(hosts)


def _can_listen(table: Table, listen: Address | None) -> None:
    if listen is not None and not listen.is_literal and listen.host not in LOOPBACK_NAMES:
        table.wrong("listen", str(listen), "must be an IP address, localhost or unix:path")


def _token(table: Table, base: str) -> Secret | None:
    if table.text("token_file", "") in ("", None):
        return None
    path = _path(table, "token_file", base, "")
    try:
        return read_token(path)
    except ConfigError as error:
        table.wrong("token_file", path, error.problems[0].message)
        return None


def read_token(path: str) -> Secret:
    """A token from its file. Raises ConfigError; no message quotes what the file holds."""
    try:
        mode = os.stat(path).st_mode
        if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
            raise ValueError("can be read or changed by others: chmod 600")
        data = read_regular(path, bounds.SECRET_BYTES_MAX)
        if len(data) > bounds.SECRET_BYTES_MAX:
            raise ValueError(f"is longer than {bounds.SECRET_BYTES_MAX} bytes")
        text = data.decode("ascii", "replace").strip()
        if not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError("must hold one token of printable ASCII characters")
        if len(text) < bounds.SECRET_CHARS_MIN:
            raise ValueError(f"must hold a token of at least {bounds.SECRET_CHARS_MIN} characters")
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        raise ConfigError([Problem("token_file", path, reason)], path) from error
    except ValueError as error:
        raise ConfigError([Problem("token_file", path, str(error))], path) from None
    return Secret(text)


def _listener(table: Table, base: str) -> Listener:
    name = table.name("name") or ""
    listen = table.address("listen", base, port_min=0)
    _can_listen(table, listen)
    protocol = table.choice("protocol", LISTENER_PROTOCOLS) or ""
    if protocol == "push":
        if "routes" in table.tree:
            message = "belongs to other protocols: a message goes to a broker of its topic"
            table.wrong("routes", table.tree["routes"], message)
            table.known.append("routes")
        table.done()
        return Listener(name, listen or Address(), protocol, ())
    rules: list[Rule] = []
    seen: dict[tuple[object, ...], str] = {}
    catch_all = ""
    for rule_table in table.tables("routes", bounds.RULES_MAX, what="rule"):
        rule = _rule(rule_table)
        key = (rule.service, rule.prefix, rule.headers)
        if catch_all:
            rule_table.wrong("match", None, f"can never match: {catch_all} already takes all")
        elif key in seen:
            rule_table.wrong("match", rule.service, f"can never match: {seen[key]} is the same")
        seen[key] = rule_table.path
        if rule.service is None and not rule.headers and _is_sound(rule_table):
            catch_all = rule_table.path
        rules.append(rule)
    no_double(table, "routes", [r.name for r in rules], "name")
    table.done()
    return Listener(name, listen or Address(), protocol, tuple(rules))


def _is_sound(table: Table) -> bool:
    """True when no problem was found in this table: a faulty match is not taken for an empty
    one."""
    return not any(p.path.startswith(table.path + ".") for p in table.problems.found)


def _rule(table: Table) -> Rule:
    match = table.table("match")
    service = match.text("service", "") or None
    prefix = False
    if service is not None:
        if len(service.encode("utf-8", "replace")) > bounds.SERVICE_BYTES_MAX:
            match.wrong("service", service, f"must be at most {bounds.SERVICE_BYTES_MAX} bytes")
        if "*" in service[:-1]:
            match.wrong("service", service, 'may have "*" only at the end')
        elif service == "*":
            match.wrong("service", service, "leave it out: a rule without a service matches all")
        elif service.endswith("*"):
            prefix, service = True, service[:-1]
    elif match.tree.get("service") == "":
        match.wrong("service", "", "must not be empty: leave it out to match all")
    headers = _headers(match)
    match.done()
    cluster = table.name("cluster") or ""
    pattern = ("*" if service is None else service + ("*" if prefix else "")) + (
        "{" + ",".join(f"{k}={v}" for k, v in headers) + "}" if headers else ""
    )
    name = table.name("name", pattern[: bounds.SERVICE_BYTES_MAX]) or ""
    rate_limit = None
    if "rate_limit" in table.tree:
        rate = table.table("rate_limit")
        per_second = rate.integer("per_second", 1, bounds.RATE_MAX)
        burst = rate.integer("burst", 1, bounds.RATE_MAX, per_second or 1)
        rate.done()
        rate_limit = RateLimit(per_second or 1, burst or 1)
    else:
        table.known.append("rate_limit")
    table.done()
    return Rule(name, cluster, service, prefix, headers, rate_limit)


def _headers(match: Table) -> tuple[tuple[str, str], ...]:
    table = match.table("header")
    found = []
    for key in table.tree:
        value = table.text(key)
        if value is None:
            continue
        if not key or max(len(key.encode()), len(value.encode())) > bounds.SERVICE_BYTES_MAX:
            table.wrong(key, value, f"key and value: at most {bounds.SERVICE_BYTES_MAX} bytes")
        else:
            found.append((key, value))
    if len(found) > bounds.RULE_HEADERS_MAX:
        match.wrong("header", len(found), f"may ask for at most {bounds.RULE_HEADERS_MAX} headers")
    return tuple(found)


def _cluster(table: Table, base: str) -> Cluster:
    name = table.name("name") or ""
    protocol = table.choice("protocol", PROTOCOLS) or ""
    most = bounds.CONNECTIONS_PER_ENDPOINT_MAX
    connections = table.integer("connections", 1, most, 1) or 1
    binding = table.choice("binding", BINDINGS, "shared") or ""
    if binding == "per_client" and connections != 1:
        table.wrong("connections", connections, "must be 1 with binding per_client")
    server_requests = table.choice("server_requests", SERVER_REQUESTS, "any") or ""
    endpoints = []
    for item in table.tables("endpoints", bounds.ENDPOINTS_MAX, what="endpoint"):
        address = item.address("address", base)
        weight = item.integer("weight", 0, bounds.WEIGHT_MAX, 100)
        item.done()
        endpoints.append(Endpoint(address or Address(), 100 if weight is None else weight))
    if endpoints and not any(e.weight for e in endpoints):
        table.wrong("endpoints", None, "must have a weight above 0 somewhere")
    no_double(
        table,
        "endpoints",
        ["" if e.address == Address() else str(e.address) for e in endpoints],
        "address",
    )
    table.done()
    return Cluster(name, protocol, tuple(endpoints), connections, binding, server_requests)


def _push(table: Table, base: str) -> Push:
    brokers: tuple[Broker, ...] = ()
    brokers_file = ""
    where = table.tree.get("brokers")
    if isinstance(where, Tree):
        at = table.table("brokers")
        if at.text("file"):
            brokers_file = _path(at, "file", base, "")
            try:
                load_brokers(brokers_file)
            except ConfigError as error:
                for p in error.problems:
                    said = f"{p.path} {p.message}" if p.path else p.message
                    at.wrong("file", brokers_file if not p.path else p.value, said)
        at.done()
    else:
        brokers = _brokers(table, "brokers", base)
    forward = None
    if _given(table, "forward"):
        at = table.table("forward")
        forward = at.address("listen", base, port_min=0)
        _can_listen(at, forward)
        at.done()
    schedule_file = ""
    if _given(table, "schedule"):
        at = table.table("schedule")
        if at.text("file"):
            schedule_file = _path(at, "file", base, "")
        at.done()
    table.done()
    return Push(brokers, brokers_file, forward, schedule_file)


def _brokers(table: Table, key: str, base: str) -> tuple[Broker, ...]:
    found = []
    for item in table.tables(key, bounds.BROKERS_MAX, what="broker"):
        name = item.name("name") or ""
        address = item.address("address", base)
        weight = item.integer("weight", 0, bounds.WEIGHT_MAX, 100)
        topics = _topics(item)
        item.done()
        found.append(Broker(name, address or Address(), 100 if weight is None else weight, topics))
    no_double(table, key, [b.name for b in found], "name")
    addresses = ["" if b.address == Address() else str(b.address) for b in found]
    no_double(table, key, addresses, "address")
    return tuple(found)


def _topics(table: Table) -> tuple[str, ...]:
    value = table.raw("topics", None)
    if value is MISSING:
        return ("*",)
    if not isinstance(value, list) or not value:
        table.wrong("topics", value, 'must be a list of topics: ["*"], ["orders"], ["orders.*"]')
        return ("*",)
    if len(value) > bounds.BROKER_TOPICS_MAX:
        most = bounds.BROKER_TOPICS_MAX
        table.wrong("topics", len(value), f"must have at most {most} items")
        return ("*",)
    for index, item in enumerate(value):
        if (
            not isinstance(item, str)
            or not 1 <= len(item) <= bounds.MESH_NAME_CHARS_MAX
            or "*" in item[:-1]
            or "," in item
        ):
            message = (
                f"must be a topic of 1..{bounds.MESH_NAME_CHARS_MAX} characters,"
                ' with "*" only at its end'
            )
            path = f"{table.path}.topics[{index}]"
            line = value.lines[index] if isinstance(value, List) else 0
            table.problems.add(path, item, message, line)
            return ("*",)
    return tuple(value)


def _limits(table: Table) -> Limits:
    values: dict[str, int] = {}
    for key, bound in bounds.CONFIGURABLE.items():
        value = table.integer(key, bound.low, bound.high, bound.default)
        values[key] = bound.default if value is None else value
    for low, high in (
        ("backoff_ms", "backoff_ms_max"),
        ("eject_ms", "eject_ms_max"),
        ("request_timeout_ms", "request_timeout_ms_max"),
        ("frame_bytes_max", "memory_bytes_max"),
    ):
        if values[low] > values[high]:
            # Name the key that stands in the file: the other one is a default.
            key = low if low in table.tree else high
            table.wrong(
                key, values[key], f"{low} ({values[low]}) must not be above {high} ({values[high]})"
            )
    if (both := values["drain_suspend_ms"] + values["drain_answers_ms"]) > values[
        "stop_timeout_ms"
    ]:
        key = "drain_answers_ms" if values["drain_answers_ms"] else "drain_suspend_ms"
        table.wrong(
            key,
            values[key],
            f"drain_suspend_ms and drain_answers_ms ({both} together) must not be above"
            f" stop_timeout_ms ({values['stop_timeout_ms']})",
        )
    table.done()
    return Limits(**values)


def _cross_check(
    top: Table,
    listeners: Sequence[Listener],
    clusters: Sequence[Cluster],
    *,
    admin: Admin,
    push: Push | None,
    registration: Registration | None,
) -> None:
    """What no section can see alone."""
    no_double(top, "listeners", [x.name for x in listeners], "name")
    no_double(top, "clusters", [x.name for x in clusters], "name")
    taken: dict[str, str] = {}

    def take(table: Table, address: Address | None) -> None:
        """Nobody else may listen there. Port 0 is a port of its own each time."""
        if address is None or not (address.is_unix or address.port):
            return
        if str(address) in taken:
            table.wrong("listen", str(address), f"is taken already by {taken[str(address)]}")
        taken.setdefault(str(address), f"{table.path}.listen")

    take(Table(Tree(0), "admin", top.problems), admin.listen)
    by_name = {c.name: c for c in clusters}
    trees = mappings(top.tree.get("listeners"), "listeners")
    for (path, tree), listener in zip(trees, listeners, strict=True):
        table = Table(tree, path, top.problems)
        take(table, listener.listen)
        if listener.protocol == "push" and push is None and "push" not in top.tree:
            table.wrong("protocol", "push", "needs a push section that names the brokers")
        rule_trees = mappings(tree.get("routes"), f"{path}.routes")
        for (rule_path, rule_tree), rule in zip(rule_trees, listener.routes, strict=False):
            if not rule.cluster:
                continue
            at = Table(rule_tree, rule_path, top.problems)
            cluster = by_name.get(rule.cluster)
            if cluster is None:
                names = ", ".join(list(by_name)[:8]) or "none"
                at.wrong("cluster", rule.cluster, f"is not a cluster; there are: {names}")
            elif "" not in (a := cluster.protocol, b := listener.protocol) and a != b:
                at.wrong("cluster", rule.cluster, f"speaks {a}, this listener {b}")
    if registration is not None:
        take(
            Table(_subtree(top, "registration"), "registration", top.problems), registration.listen
        )
    if push is None:
        return
    _check_names(top, push)
    tree = _subtree(top, "push")
    if listeners and all(x.protocol not in ("push", "") for x in listeners):
        top.wrong("push", None, "needs a listener with protocol push: nobody could reach it")
    take(Table(_subtree(tree, "forward"), "push.forward", top.problems), push.forward)
    brokers = zip(mappings(tree.get("brokers"), "push.brokers"), push.brokers, strict=False)
    for (path, item), broker in brokers:
        if (mine := taken.get(str(broker.address))) is not None:
            message = f"is this process itself: {mine}"
            Table(item, path, top.problems).wrong("address", str(broker.address), message)


def _check_names(top: Table, push: Push) -> None:
    """What is said to brokers and peers stands in comma-separated lists there."""
    node = Table(_subtree(top, "node"), "node", top.problems)
    for key in ("name", "app"):
        value = node.tree.get(key)
        if isinstance(value, str) and not MESH_NAME.match(value):
            node.wrong(key, value, f"with push, it {MESH_NAME_RULE}")
    items = mappings(_subtree(top, "push").get("brokers"), "push.brokers")
    for (path, item), broker in zip(items, push.brokers, strict=False):
        if broker.name and not MESH_NAME.match(broker.name):
            Table(item, path, top.problems).wrong("name", broker.name, MESH_NAME_RULE)


def _subtree(of: Table | Tree, key: str) -> Tree:
    tree = of.tree if isinstance(of, Table) else of
    found = tree.get(key)
    return found if isinstance(found, Tree) else Tree(tree.lines.get(key, tree.line))


# --- showing it -----------------------------------------------------------------------------------


def as_dict(config: Config) -> dict[str, Any]:
    """The whole configuration with its defaults, for people and JSON; secrets redact themselves."""
    found = {
        key: _plain(getattr(config, key))
        for key in (
            "node",
            "state_dir",
            "engine",
            "admin",
            "listeners",
            "clusters",
            "limits",
            "observe",
            "log",
        )
    }
    if config.push is not None:
        found["push"] = _plain_push(config.push)
    if config.registration is not None:
        found["registration"] = _plain(config.registration)
    return found


def _plain_push(push: Push) -> dict[str, Any]:
    """As it is written in the file."""
    found: dict[str, Any] = {
        "brokers": {"file": push.brokers_file} if push.brokers_file else _plain(push.brokers)
    }
    if push.forward is not None:
        found["forward"] = {"listen": str(push.forward)}
    if push.schedule_file:
        found["schedule"] = {"file": push.schedule_file}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Secret):
        return repr(value)
    if isinstance(value, Address):
        return str(value)
    if isinstance(value, Rule):
        return _plain_rule(value)
    if isinstance(value, Listener) and value.protocol == "push":
        return {"name": value.name, "listen": str(value.listen), "protocol": value.protocol}
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _plain_rule(rule: Rule) -> dict[str, Any]:
    """A rule as it is written in the file."""
    found: dict[str, Any] = {"name": rule.name, "match": {}, "cluster": rule.cluster}
    if rule.service is not None:
        found["match"]["service"] = rule.service + ("*" if rule.prefix else "")
    if rule.headers:
        found["match"]["header"] = dict(rule.headers)
    if rule.rate_limit is not None:
        found["rate_limit"] = dataclasses.asdict(rule.rate_limit)
    return found


def describe(config: Config) -> str:
    """One line for `fastmesh check`."""
    endpoints = sum(len(c.endpoints) for c in config.clusters)
    rules = sum(len(x.routes) for x in config.listeners)
    brokers = ""
    if config.push is not None:
        file = config.push.brokers_file
        brokers = (
            f" brokers in {Path(file).name}," if file else f" {len(config.push.brokers)} brokers,"
        )
    return (
        f"{Path(config.source).name}: {len(config.listeners)} listeners, {rules} rules,"
        f" {len(config.clusters)} clusters, {endpoints} endpoints,{brokers}"
        f" sha256 {config.sha256[:12]}"
    )
