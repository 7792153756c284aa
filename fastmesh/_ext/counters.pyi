"""Reading side of the counters. Names are those of counters.pxd without their prefix, in lower
case.
"""

ROW_NAMES: dict[str, int]
"""Offset of each row counter: "requests.accepted", "requests.failed.no_route", "pushes.in_flight",
"bytes_in", "closed.idle", …
"""
PROCESS_NAMES: dict[str, int]
"""Offset of each process counter: "turns", "reads", "dropped.late", "malformed.checksum", …"""
HOP_NAMES: tuple[str, ...]
ROWS_MAX: int

class Reading:
    """A sum of the consistent copies of all engine threads at one moment."""

    def row(self, row: int) -> dict[str, int]:
        """Every counter of one row by name."""
    def value(self, row: int, name: str) -> int: ...
    def process(self) -> dict[str, int]: ...
    def hop(self, name: str) -> tuple[list[int], int]:
        """Bucket counts of a hop's histogram and the sum in nanoseconds."""
    def latency(self, row: int) -> list[int]: ...
    rows_used: int

def hop_bounds_ns() -> list[int]:
    """Exclusive upper bound of each hop bucket."""

def latency_bounds_ns() -> list[int]: ...
def quantile_ns(buckets: list[int], bounds: list[int], q: float) -> float:
    """Upper bound of the bucket where the q-quantile lies; 0.0 when the histogram is empty."""

class ThreadCounters:
    """The counters of one engine thread, for tests: written by name instead of by an engine."""

    copied: int
    """The last question (a number that `ask` returned) that a whole copy answers."""
    def add(self, row: int, name: str, by: int = 1) -> None: ...
    def add_process(self, name: str, by: int = 1) -> None: ...
    def record_hop(self, name: str, ns: int) -> None: ...
    def record_latency(self, row: int, ns: int) -> None: ...
    def ask(self) -> int: ...
    def copy(self) -> None:
        """End of a turn."""
    def read_into(self, reading: Reading) -> None: ...

def sizes() -> dict[str, int]:
    """Bytes of each native struct, by name."""

def bench(rounds: int) -> float:
    """Nanoseconds of counting one request and its answer: four counters, two hops, one latency."""
