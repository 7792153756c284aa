"""Documents that people write: YAML (and so JSON) becomes a tree that knows its lines, and checked
values with all problems at once. What programs send is read as JSON alone.

Every problem has a path (`clusters[0].endpoints[1].weight`), a line, the value that stands there
and what would be right. The configuration, the schedule and registrations are read with this.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from fastmesh import limits as bounds
from fastmesh.address import Address, parse_address
from fastmesh.errors import Problem

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MISSING = object()
"""What `Table.raw` gives for a key that is not there."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@/*={},\-]*\Z")


def read_regular(path: str, most: int) -> bytes:
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


class Tree(dict[str, Any]):
    """A mapping that knows the lines of its keys; `line` is its own."""

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        self.lines: dict[str, int] = {}


class List(list[Any]):
    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        self.lines: list[int] = []


class Problems:
    def __init__(self) -> None:
        self.found: list[Problem] = []
        self.count = 0
        """Of all; the first CONFIG_PROBLEMS_MAX are in `found`."""

    def add(self, path: str, value: object, message: str, line: int = 0) -> None:
        self.count += 1
        if len(self.found) < bounds.CONFIG_PROBLEMS_MAX:
            self.found.append(Problem(str(shown(path)), shown(value), message, line))

    def sorted(self) -> list[Problem]:
        return sorted(self.found, key=lambda problem: problem.line)


def shown(value: object) -> object:
    """A value as it may stand in a message: short, and encodable whatever it was."""
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 63:
        return "a number beyond 64 bits"
    if isinstance(value, str):
        if len(value) > bounds.LOG_VALUE_CHARS_MAX:
            value = value[: bounds.LOG_VALUE_CHARS_MAX] + "..."
        return value.encode("utf-8", "backslashreplace").decode()  # lone surrogates
    return value


def read_tree(data: bytes, problems: Problems, needs: str) -> Tree:
    """YAML with a bound on depth and on expanded nodes. Problems instead of exceptions: an empty
    tree then. `needs` names the keys that the reader looks for: "listeners and clusters"."""
    empty = Tree(1)
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
                problems.add("", None, f"is empty: it needs at least {needs}", 1)
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
    if not isinstance(tree, Tree):
        problems.add("", tree, f"must be a mapping with {needs}", 1)
        return empty
    return tree


class _Pairs(list[tuple[str, Any]]):
    """A JSON object before its doubled keys are told."""


def read_json(data: bytes, problems: Problems, needs: str) -> Tree:
    """JSON, a hundred times faster than as YAML; there are no line numbers. Problems instead of
    exceptions, as in `read_tree`. (msgspec would take the last of doubled keys without a word.)"""
    empty = Tree(0)
    try:
        tree = json.loads(data.decode(), object_pairs_hook=_Pairs, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        problems.add("", None, f"is not UTF-8 at byte {error.start}")
        return empty
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        problems.add("", None, f"is not JSON: {error.msg} ({where})")
        return empty
    except RecursionError:
        problems.add("", None, f"is nested deeper than {bounds.CONFIG_DEPTH_MAX} levels")
        return empty
    except ValueError as error:  # NaN, or a number of thousands of digits
        problems.add("", None, f"is not JSON: {error}")
        return empty
    if not isinstance(tree, _Pairs):
        problems.add("", tree, f"must be a mapping with {needs}")
        return empty
    found: Tree = _from_json(tree, "", problems, 0)
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON value")


def _from_json(value: Any, path: str, problems: Problems, depth: int) -> Any:
    if not isinstance(value, list):
        return value
    if depth > bounds.CONFIG_DEPTH_MAX:
        problems.add(path, None, f"is nested deeper than {bounds.CONFIG_DEPTH_MAX} levels")
        return None
    if not isinstance(value, _Pairs):
        items = List(0)
        items.lines = [0] * len(value)
        items.extend(
            _from_json(item, f"{path}[{index}]", problems, depth + 1)
            for index, item in enumerate(value)
        )
        return items
    tree = Tree(0)
    for key, item in value:
        if key in tree:
            problems.add(join(path, key), None, "is given twice")
        else:
            tree[key] = _from_json(item, join(path, key), problems, depth + 1)
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

    def __init__(self, loader: Any, problems: Problems) -> None:
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
            found = List(line)
            for index, item in enumerate(node.value):
                found.lines.append(item.start_mark.line + 1)
                found.append(self.value(item, f"{path}[{index}]", depth + 1))
            return found
        return self.loader.construct_object(node)

    def mapping(self, node: Any, path: str, depth: int, line: int) -> Tree:
        found = Tree(line)
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.add(path, None, "a key must be a plain word", key_line)
                continue
            key = key_node.value
            if key in found:
                self.problems.add(
                    join(path, key),
                    None,
                    f"is given twice: first in line {found.lines[key]}",
                    key_line,
                )
                continue
            found.lines[key] = key_line
            found[key] = self.value(value_node, join(path, key), depth + 1)
        return found


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


# --- from the tree to dataclasses -----------------------------------------------------------------


class Table:
    """One mapping of the file: hands out checked values and remembers which keys exist."""

    def __init__(self, tree: Tree, path: str, problems: Problems) -> None:
        self.tree = tree
        self.path = path
        self.problems = problems
        self.known: list[str] = []

    def wrong(self, key: str, value: object, message: str) -> None:
        line = self.tree.lines.get(key, self.tree.line)
        self.problems.add(join(self.path, key), value, message, line)

    def raw(self, key: str, default: object = MISSING) -> Any:
        """The value of a key; MISSING (with a problem when there is no default) when it is not
        there."""
        self.known.append(key)
        value = self.tree.get(key)
        if value is None:
            if default is MISSING:
                self.wrong(key, None, "is missing")
            return MISSING
        return value

    def text(self, key: str, default: object = MISSING) -> str | None:
        value = self.raw(key, default)
        if value is MISSING:
            return default if isinstance(default, str) else None
        if not isinstance(value, str):
            self.wrong(key, value, "must be text: put it in quotes")
            return None
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            self.wrong(key, value, "must be whole characters: half a surrogate pair is none")
            return None
        return value

    def name(self, key: str, default: object = MISSING) -> str | None:
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

    def integer(self, key: str, low: int, high: int, default: object = MISSING) -> int | None:
        value = self.raw(key, default)
        if value is MISSING:
            return default if isinstance(default, int) else None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.wrong(key, value, f"must be a whole number {low}..{high}")
            return None
        return value

    def flag(self, key: str) -> bool:
        """False when the key is not there."""
        value = self.raw(key, None)
        if value is not MISSING and not isinstance(value, bool):
            self.wrong(key, value, "must be true or false")
        return value is True

    def choice(self, key: str, words: Sequence[str], default: object = MISSING) -> str | None:
        value = self.raw(key, default)
        if value is MISSING:
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

    def table(self, key: str) -> Table:
        """A nested mapping; an empty one when the key is not there."""
        value = self.raw(key, None)
        if value is not MISSING and not isinstance(value, Tree):
            self.wrong(key, value, "must be a mapping")
            value = MISSING
        if value is MISSING:
            value = Tree(self.tree.lines.get(key, self.tree.line))
        return Table(value, join(self.path, key), self.problems)

    def tables(self, key: str, most: int, *, what: str) -> Iterator[Table]:
        """A list of mappings, at least one."""
        value = self.raw(key, None)
        if value is MISSING or value == []:
            self.wrong(key, None, f"must have at least one {what}")
            return
        if not isinstance(value, List):
            self.wrong(key, value, f"must be a list, each item one {what}")
            return
        if len(value) > most:
            self.wrong(key, len(value), f"must have at most {most} items")
            return
        for index, item in enumerate(value):
            path = f"{join(self.path, key)}[{index}]"
            if isinstance(item, Tree):
                yield Table(item, path, self.problems)
            else:
                self.problems.add(path, item, f"must be a mapping: one {what}", value.lines[index])

    def done(self) -> None:
        """Everything that nobody asked for is a mistake."""
        for key in self.tree:
            if key not in self.known:
                import difflib  # only a faulty file pays for it

                near = difflib.get_close_matches(key[:64], self.known, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(self.known)}"
                self.wrong(key, None, f"is not a known key: {hint}")


def no_double(table: Table, key: str, values: Sequence[str], what: str) -> None:
    for index, value in enumerate(values):
        if value and value in values[:index]:
            items = table.tree.get(key)
            line = items.lines[index] if isinstance(items, List) else 0
            path = f"{join(table.path, key)}[{index}].{what}"
            first = f"{key}[{values.index(value)}]"
            table.problems.add(path, value, f"is taken already by {first}", line)


def mappings(items: object, path: str) -> list[tuple[str, Tree]]:
    """The mappings of a list with their paths: what `Table.tables` went through."""
    if not isinstance(items, List):
        return []
    return [(f"{path}[{i}]", item) for i, item in enumerate(items) if isinstance(item, Tree)]
