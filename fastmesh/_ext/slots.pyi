"""The slot table as tests and simulations see it; an engine thread calls its functions directly."""

MISSES: tuple[str, ...]
"""What find() says, and the causes that rest() and release() take: none, unknown, duplicate, late,
client_gone.
"""
GENERATIONS: int
REST_MS: int

class Table:
    """A slot table with a timer wheel and up to 256 askers; every time is passed in, in
    milliseconds.

    A method that names a slot by the id of no occupied slot raises KeyError; an asker beyond 255
    raises IndexError.
    """

    used: int
    resting: int
    armed: int
    pages: int
    bytes: int
    capacity: int
    def __init__(self, capacity: int, first_generation: int = 1, now_ms: int = 0) -> None: ...
    def take(self, orig: int, asker: int, deadline_ms: int) -> int | None:
        """The id of a new slot in flight; None when the table is full or there is no memory."""
    def find(self, id: int) -> tuple[int | None, int | None, str]:
        """(orig, asker, miss) of an occupied slot, or (None, None, miss)."""
    def rest(self, id: int, cause: str, until_ms: int) -> None:
        """ValueError when it rests already."""
    def release(self, id: int, cause: str) -> None: ...
    def due(self, now_ms: int) -> tuple[int, bool] | None:
        """(id, resting) of a slot whose timer is due; the timer is off then."""
    def sleep_ms(self, now_ms: int) -> int: ...
    def order_push(self, id: int) -> None: ...
    def order_pop(self) -> int | None: ...
    def ids(self) -> list[int]:
        """Ids of all occupied slots, by index."""
    def of_asker(self, asker: int) -> list[int]:
        """Ids of the slots of one asker that are in flight, youngest first."""
    def close(self) -> list[int]:
        """Release everything while walking, as the end of a connection does. The ids that were
        occupied.
        """
    def stop(self) -> int:
        """Give the pages back. Returns the bytes; the table is empty and has no capacity
        afterwards.
        """
    def check(self) -> None:
        """Walk everything; AssertionError when an invariant does not hold."""

def sizes() -> dict[str, int]:
    """Bytes of each native struct, by name."""

def bench(rounds: int, depth: int) -> float:
    """Nanoseconds of one request's life with `depth` others in flight: take, arm, link, find,
    clear, unlink, release.
    """
