"""Configuration: one YAML file becomes frozen dataclasses, or all its problems at once.

Every problem has a path (`clusters[0].endpoints[1].weight`), a line, the value that stands there
and what would be right. Nothing here has an effect outside the process: files are read, never
written, no socket is opened and no name is resolved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastmesh import limits as bounds
from fastmesh.errors import ConfigError, Problem

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

PROTOCOLS = ("bolt",)
BINDINGS = ("shared", "per_client")
SERVER_REQUESTS = ("any", "refuse")
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOOPBACK_NAMES = ("localhost",)

NEEDS_UPGRADE = ("engine", "admin", "state_dir")
"""Top-level keys that a running process cannot change under itself."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@/*={},\-]*\Z")
_HOSTNAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?\Z")
_MISSING = object()


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
class Address:
    """Where to listen or connect: a host and port, or the path of a UNIX socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def is_unix(self) -> bool:
        return bool(self.path)

    @property
    def is_literal(self) -> bool:
        """True when no name has to be resolved."""
        return self.is_unix or _ip(self.host) is not None

    @property
    def is_loopback(self) -> bool:
        if self.is_unix or self.host in LOOPBACK_NAMES:
            return True
        ip = _ip(self.host)
        return ip is not None and ip.is_loopback

    def __str__(self) -> str:
        if self.is_unix:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


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
        data = _read_regular(source, bounds.CONFIG_BYTES_MAX)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError([Problem("", source, f"cannot be read: {reason}")], source) from error
    return parse(data, base=os.path.dirname(source), source=source)


def parse(data: bytes, *, base: str, source: str = "config") -> Config:
    """Check the bytes of a configuration; relative paths in it start at `base`. Raises
    ConfigError."""
    problems = _Problems()
    config: Config | None = None
    if len(data) > bounds.CONFIG_BYTES_MAX:
        problems.add("", len(data), f"must be at most {bounds.CONFIG_BYTES_MAX} bytes long")
    else:
        tree = _read_tree(data, problems)
        if not problems.found:
            config = _build(_Table(tree, "", problems), base, problems)
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
    return found


def parse_address(text: str, base: str = "", *, port_min: int = 1) -> Address:
    """`host:port`, `[v6]:port` or `unix:path`. Raises ValueError that says what would be right."""
    if text.startswith("unix:"):
        return _unix_address(text[5:], base)
    host, colon, port_text = text.rpartition(":")
    if not colon or not host:
        raise ValueError('must be "host:port", "[v6 address]:port" or "unix:path"')
    if not (port_text.isascii() and port_text.isdigit()) or not (
        port_min <= int(port_text[:6]) <= 65535
    ):
        raise ValueError(f"the port must be {port_min}..65535")
    if host.startswith("[") and host.endswith("]"):
        ip = _ip(host[1:-1])
        if ip is None or ip.version != 6:
            raise ValueError("what stands in brackets must be an IPv6 address")
        return Address(host=str(ip), port=int(port_text))
    if ":" in host:
        raise ValueError('an IPv6 address stands in brackets: "[::1]:12200"')
    ip = _ip(host)
    if ip is None and re.fullmatch(r"[0-9.]+", host):
        raise ValueError("is not an IPv4 address")
    if ip is None and (len(host) > 253 or not _HOSTNAME.match(host)):
        raise ValueError("must have an IP address or a host name before the port")
    return Address(host=str(ip) if ip else host.lower().rstrip("."), port=int(port_text))


def _unix_address(path: str, base: str) -> Address:
    if not path or "\0" in path:
        raise ValueError('must be "unix:" and a path')
    full = os.path.normpath(os.path.join(base, path))
    size = len(os.fsencode(full))
    if size > bounds.UNIX_PATH_BYTES_MAX:
        raise ValueError(
            f"the path of a UNIX socket is at most {bounds.UNIX_PATH_BYTES_MAX} bytes;"
            f" {full} has {size}"
        )
    return Address(path=full)


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _read_regular(path: str, most: int) -> bytes:
    """Bytes of a regular file, one more than `most` at the longest. A FIFO or device is refused,
    not waited for."""
    if "\0" in path:
        raise ValueError("a path has no NUL")
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("is not a regular file")
        return file.read(most + 1)


# --- from bytes to a tree with line numbers -------------------------------------------------------


class _Tree(dict[str, Any]):
    """A mapping that knows the lines of its keys; `line` is its own."""

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        self.lines: dict[str, int] = {}


class _List(list[Any]):
    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        self.lines: list[int] = []


class _Problems:
    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, path: str, value: object, message: str, line: int = 0) -> None:
        if isinstance(value, (dict, list)):
            value = "a mapping" if isinstance(value, dict) else "a list"
        if isinstance(value, str) and len(value) > bounds.LOG_VALUE_CHARS_MAX:
            value = value[: bounds.LOG_VALUE_CHARS_MAX] + "..."
        if len(self.found) < bounds.CONFIG_PROBLEMS_MAX:
            self.found.append(Problem(path, value, message, line))

    def sorted(self) -> list[Problem]:
        return sorted(self.found, key=lambda problem: problem.line)


def _read_tree(data: bytes, problems: _Problems) -> _Tree:
    """YAML with a bound on depth and on expanded nodes. Problems instead of exceptions."""
    empty = _Tree(1)
    try:
        depth = 0
        # The event stream does not recurse, the composer does: depth is checked here first.
        for event in yaml.parse(data, Loader=Loader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > bounds.CONFIG_DEPTH_MAX:
                    line = event.start_mark.line + 1 if event.start_mark else 0
                    problems.add(
                        "",
                        None,
                        f"is nested deeper than {bounds.CONFIG_DEPTH_MAX} levels",
                        line,
                    )
                    return empty
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
        loader = Loader(data)
        try:
            node = loader.get_single_node()
            if node is None:
                problems.add("", None, "is empty: it needs at least listeners and clusters", 1)
                return empty
            tree = _Expansion(loader, problems).value(node, "", 0)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        problems.add("", None, f"is not YAML: {reason}", mark.line + 1 if mark else 0)
        return empty
    except _TooMuch as error:
        problems.add("", None, str(error), error.line)
        return empty
    except (ValueError, OverflowError) as error:  # a scalar such as 99-99-9999 or a bad encoding
        problems.add("", None, f"has a value that cannot be read: {error}")
        return empty
    if not isinstance(tree, _Tree):
        problems.add("", tree, "must be a mapping with listeners and clusters", 1)
        return empty
    return tree


class _TooMuch(Exception):
    def __init__(self, line: int) -> None:
        self.line = line
        super().__init__(
            f"has more than {bounds.CONFIG_NODES_MAX} values or {bounds.CONFIG_DEPTH_MAX} levels"
            " once its aliases are expanded"
        )


class _Expansion:
    """Nodes to values, counting nodes, so that aliases cannot multiply without end."""

    def __init__(self, loader: Any, problems: _Problems) -> None:
        self.loader = loader
        self.problems = problems
        self.nodes = 0

    def value(self, node: Any, path: str, depth: int) -> Any:
        self.nodes += 1
        line = node.start_mark.line + 1
        if self.nodes > bounds.CONFIG_NODES_MAX or depth > bounds.CONFIG_DEPTH_MAX:
            raise _TooMuch(line)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, depth, line)
        if isinstance(node, yaml.SequenceNode):
            found = _List(line)
            for index, item in enumerate(node.value):
                found.lines.append(item.start_mark.line + 1)
                found.append(self.value(item, f"{path}[{index}]", depth + 1))
            return found
        return self.loader.construct_object(node)

    def mapping(self, node: Any, path: str, depth: int, line: int) -> _Tree:
        found = _Tree(line)
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.add(path, None, "a key must be a plain word", key_line)
                continue
            key = key_node.value
            if key in found:
                self.problems.add(
                    _join(path, key),
                    None,
                    f"is given twice: first in line {found.lines[key]}",
                    key_line,
                )
                continue
            found.lines[key] = key_line
            found[key] = self.value(value_node, _join(path, key), depth + 1)
        return found


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


# --- from the tree to dataclasses -----------------------------------------------------------------


class _Table:
    """One mapping of the file: hands out checked values and remembers which keys exist."""

    def __init__(self, tree: _Tree, path: str, problems: _Problems) -> None:
        self.tree = tree
        self.path = path
        self.problems = problems
        self.known: list[str] = []

    def wrong(self, key: str, value: object, message: str) -> None:
        line = self.tree.lines.get(key, self.tree.line)
        self.problems.add(_join(self.path, key), value, message, line)

    def raw(self, key: str, default: object = _MISSING) -> Any:
        """The value of a key; _MISSING (with a problem when there is no default) when it is not
        there."""
        self.known.append(key)
        value = self.tree.get(key)
        if value is None:
            if default is _MISSING:
                self.wrong(key, None, "is missing")
            return _MISSING
        return value

    def text(self, key: str, default: object = _MISSING) -> str | None:
        value = self.raw(key, default)
        if value is _MISSING:
            return default if isinstance(default, str) else None
        if not isinstance(value, str):
            self.wrong(key, value, "must be text: put it in quotes")
            return None
        return value

    def name(self, key: str, default: object = _MISSING) -> str | None:
        value = self.text(key, default)
        if value is None or value is default:
            return value
        if len(value) > bounds.NAME_CHARS_MAX or not _NAME.match(value) or value.startswith("__"):
            self.wrong(
                key,
                value,
                f"must be a name of 1..{bounds.NAME_CHARS_MAX} letters, digits or any of"
                ' "_.:@/*={},-", not starting with "__"',
            )
            return None
        return value

    def integer(self, key: str, low: int, high: int, default: object = _MISSING) -> int | None:
        value = self.raw(key, default)
        if value is _MISSING:
            return default if isinstance(default, int) else None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.wrong(key, value, f"must be a whole number {low}..{high}")
            return None
        return value

    def choice(self, key: str, words: Sequence[str], default: object = _MISSING) -> str | None:
        value = self.raw(key, default)
        if value is _MISSING:
            return default if isinstance(default, str) else None
        if value not in words:
            self.wrong(key, value, "must be " + " or ".join(words))
            return None
        return str(value)

    def address(self, key: str, base: str, *, port_min: int = 1) -> Address | None:
        value = self.text(key)
        if value is None:
            return None
        try:
            return parse_address(value, base, port_min=port_min)
        except ValueError as error:
            self.wrong(key, value, str(error))
            return None

    def table(self, key: str) -> _Table:
        """A nested mapping; an empty one when the key is not there."""
        value = self.raw(key, None)
        if value is not _MISSING and not isinstance(value, _Tree):
            self.wrong(key, value, "must be a mapping")
            value = _MISSING
        if value is _MISSING:
            value = _Tree(self.tree.lines.get(key, self.tree.line))
        return _Table(value, _join(self.path, key), self.problems)

    def tables(self, key: str, most: int, *, what: str) -> Iterator[_Table]:
        """A list of mappings, at least one."""
        value = self.raw(key, None)
        if value is _MISSING or value == []:
            self.wrong(key, None, f"must have at least one {what}")
            return
        if not isinstance(value, _List):
            self.wrong(key, value, f"must be a list, each item one {what}")
            return
        if len(value) > most:
            self.wrong(key, len(value), f"must have at most {most} items")
            return
        for index, item in enumerate(value):
            path = f"{_join(self.path, key)}[{index}]"
            if isinstance(item, _Tree):
                yield _Table(item, path, self.problems)
            else:
                self.problems.add(path, item, f"must be a mapping: one {what}", value.lines[index])

    def done(self) -> None:
        """Everything that nobody asked for is a mistake."""
        for key in self.tree:
            if key not in self.known:
                import difflib  # only a faulty file pays for it

                near = difflib.get_close_matches(key, self.known, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(self.known)}"
                self.wrong(key, None, f"is not a known key: {hint}")


def _build(top: _Table, base: str, problems: _Problems) -> Config | None:
    before = len(problems.found)
    node = _node(top.table("node"))
    state_dir = _path(top, "state_dir", base, "run")
    engine = _engine(top.table("engine"))
    admin = _admin(top.table("admin"), base, state_dir)
    listeners = [
        _listener(t, base) for t in top.tables("listeners", bounds.LISTENERS_MAX, what="listener")
    ]
    clusters = [
        _cluster(t, base) for t in top.tables("clusters", bounds.CLUSTERS_MAX, what="cluster")
    ]
    limits = _limits(top.table("limits"))
    observe = _observe(top.table("observe"))
    log = _log(top.table("log"))
    top.done()
    _cross_check(top, listeners, clusters, admin)
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
    )


def _path(table: _Table, key: str, base: str, default: str) -> str:
    value = table.text(key, default) or default
    if "\0" in value:
        table.wrong(key, value, "a path has no NUL")
        value = default
    return os.path.normpath(os.path.join(base, value))


def _node(table: _Table) -> Node:
    name = table.name("name", "node") or ""
    app = table.name("app", "app") or ""
    table.done()
    return Node(name, app)


def _engine(table: _Table) -> EngineOptions:
    threads = table.integer("threads", 1, bounds.ENGINE_THREADS_MAX, 1) or 1
    spin_us = table.integer("spin_us", 0, bounds.SPIN_US_MAX, 0) or 0
    table.done()
    return EngineOptions(threads, spin_us)


def _observe(table: _Table) -> Observe:
    sample_every = table.integer("sample_every", 0, bounds.INT32_MAX, 0) or 0
    table.done()
    return Observe(sample_every)


def _log(table: _Table) -> LogOptions:
    form = table.choice("format", LOG_FORMATS, "text") or "text"
    level = table.choice("level", LOG_LEVELS, "info") or "info"
    table.done()
    return LogOptions(form, level)


def _admin(table: _Table, base: str, state_dir: str) -> Admin:
    listen: Address | None
    if "listen" in table.tree:
        listen = table.address("listen", base, port_min=0)
    else:
        table.known.append("listen")
        try:
            listen = _unix_address("admin.sock", state_dir)
        except ValueError as error:
            table.wrong("listen", None, f"is missing, and state_dir is too long for it: {error}")
            listen = None
    if listen is not None and not listen.is_literal and listen.host not in LOOPBACK_NAMES:
        table.wrong("listen", str(listen), "must be an IP address, localhost or unix:path")
    hosts: list[str] = []
    raw_hosts = table.raw("hosts", None)
    if raw_hosts is not _MISSING:
        if isinstance(raw_hosts, list) and all(
            isinstance(h, str) and _HOSTNAME.match(h) for h in raw_hosts
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
    return Admin(listen or Address(), token, tuple(hosts))


def _token(table: _Table, base: str) -> Secret | None:
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
        data = _read_regular(path, bounds.SECRET_BYTES_MAX)
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


def _listener(table: _Table, base: str) -> Listener:
    name = table.name("name") or ""
    listen = table.address("listen", base, port_min=0)
    if listen is not None and not listen.is_literal and listen.host not in LOOPBACK_NAMES:
        table.wrong("listen", str(listen), "must be an IP address, localhost or unix:path")
    protocol = table.choice("protocol", PROTOCOLS) or ""
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
    _no_double(table, "routes", [r.name for r in rules], "name")
    table.done()
    return Listener(name, listen or Address(), protocol, tuple(rules))


def _is_sound(table: _Table) -> bool:
    """True when no problem was found in this table: a faulty match is not taken for an empty
    one."""
    return not any(p.path.startswith(table.path + ".") for p in table.problems.found)


def _rule(table: _Table) -> Rule:
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


def _headers(match: _Table) -> tuple[tuple[str, str], ...]:
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


def _cluster(table: _Table, base: str) -> Cluster:
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
    _no_double(
        table,
        "endpoints",
        ["" if e.address == Address() else str(e.address) for e in endpoints],
        "address",
    )
    table.done()
    return Cluster(name, protocol, tuple(endpoints), connections, binding, server_requests)


def _limits(table: _Table) -> Limits:
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
    table.done()
    return Limits(**values)


def _no_double(table: _Table, key: str, values: Sequence[str], what: str) -> None:
    for index, value in enumerate(values):
        if value and value in values[:index]:
            items = table.tree.get(key)
            line = items.lines[index] if isinstance(items, _List) else 0
            path = f"{_join(table.path, key)}[{index}].{what}"
            first = f"{key}[{values.index(value)}]"
            table.problems.add(path, value, f"is taken already by {first}", line)


def _cross_check(
    top: _Table, listeners: Sequence[Listener], clusters: Sequence[Cluster], admin: Admin
) -> None:
    """What no section can see alone."""
    _no_double(top, "listeners", [x.name for x in listeners], "name")
    _no_double(top, "clusters", [x.name for x in clusters], "name")
    taken: dict[str, str] = {}
    if admin.listen.is_unix or admin.listen.port:
        taken[str(admin.listen)] = "admin.listen"
    by_name = {c.name: c for c in clusters}
    trees = _trees(top.tree.get("listeners"), "listeners")
    for (path, tree), listener in zip(trees, listeners, strict=True):
        table = _Table(tree, path, top.problems)
        address = str(listener.listen)
        if listener.listen.is_unix or listener.listen.port:
            if address in taken:
                table.wrong("listen", address, f"is taken already by {taken[address]}")
            taken.setdefault(address, f"{path}.listen")
        rule_trees = _trees(tree.get("routes"), f"{path}.routes")
        for (rule_path, rule_tree), rule in zip(rule_trees, listener.routes, strict=True):
            if not rule.cluster:
                continue
            at = _Table(rule_tree, rule_path, top.problems)
            cluster = by_name.get(rule.cluster)
            if cluster is None:
                names = ", ".join(list(by_name)[:8]) or "none"
                at.wrong("cluster", rule.cluster, f"is not a cluster; there are: {names}")
            elif "" not in (a := cluster.protocol, b := listener.protocol) and a != b:
                at.wrong("cluster", rule.cluster, f"speaks {a}, this listener {b}")


def _trees(items: object, path: str) -> list[tuple[str, _Tree]]:
    """The mappings of a list with their paths: what `_Table.tables` went through."""
    if not isinstance(items, _List):
        return []
    return [(f"{path}[{i}]", item) for i, item in enumerate(items) if isinstance(item, _Tree)]


# --- showing it -----------------------------------------------------------------------------------


def as_dict(config: Config) -> dict[str, Any]:
    """The whole configuration with its defaults, for people and JSON; secrets redact themselves."""
    return {
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


def _plain(value: Any) -> Any:
    if isinstance(value, Secret):
        return repr(value)
    if isinstance(value, Address):
        return str(value)
    if isinstance(value, Rule):
        return _plain_rule(value)
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
    return (
        f"{Path(config.source).name}: {len(config.listeners)} listeners, {rules} rules,"
        f" {len(config.clusters)} clusters, {endpoints} endpoints, sha256 {config.sha256[:12]}"
    )
