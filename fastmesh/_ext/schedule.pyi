from collections.abc import Mapping, Sequence

NODES_MAX: int
RULES_MAX: int
MATCHES_MAX: int
ENTRIES_MAX: int
"""Nodes of all rules together, those of weight 0 apart."""
TEXT_MAX: int
"""Bytes of a name or a value."""
WEIGHT_MAX: int

WHY: tuple[str, ...]
"""Names of the second number that `choose` gives, by number."""

class Schedule:
    """One application's schedule as one node sees it, compiled; never changed. Made anew for every
    change, and given to `Snapshot.add_schedule`.
    """

    local: str
    nodes: tuple[str, ...]
    """Names, in the order of the numbers that `choose` gives."""
    def __init__(
        self,
        nodes: Sequence[tuple[str, int]],
        *,
        rules: Sequence[tuple[Sequence[tuple[str, str]], Sequence[tuple[str, int]]]] = (),
        local: str,
        endpoints: Mapping[str, int],
    ) -> None:
        """`nodes`: (name, weight in percent). `rules`: (matches, nodes) with matches (name, value),
        name one of colour, lane, version, key, h.<header>, all of which must hold, and nodes (name,
        weight). `local`: this node's name, whether it is among the nodes or not. `endpoints`: name
        to the stable id (from 1) of the endpoint of its forward service; a node without one is
        never chosen. Raises ValueError that names the field.
        """
    def choose(
        self, share: GroupShare, message: Message, reachable: bytes, *, ordered: bool = False
    ) -> tuple[int, int]:
        """What the engine decides for one delivery: (node or -1 = it stays here for want of
        another, index into WHY). `reachable`: a byte per node, 0 = not. For tests and simulation.
        """
    def bench(
        self, message: Message, reachable: bytes, rounds: int, *, ordered: bool = False
    ) -> float:
        """Nanoseconds per decision, without the GIL."""

class GroupShare:
    """What one group has seen so far."""

    def __init__(self, schedule: Schedule) -> None: ...
    def reset(self, schedule: Schedule) -> None:
        """Go on under another schedule, as the engine does when it gets one."""
    @property
    def part(self) -> int:
        """Hundredths of a message that are due to this node, 0..99."""
    def owed(self, rule: int) -> tuple[int, dict[str, int]]:
        """(total weight, node to what it is owed in messages times total) of those that were
        reachable when that rule was last used.
        """

class Message:
    """What the policy reads of a message: fm.key, fm.colour, fm.lane, fm.version and h.*, by their
    names on the wire.
    """

    def __init__(self, headers: Mapping[str, str]) -> None: ...

def hash_bytes(data: bytes) -> int:
    """The stable 64-bit hash of a key or a name."""

def mix(key: int, name: int) -> int:
    """What rendezvous hashing compares, of two such hashes; the highest wins."""
