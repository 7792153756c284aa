"""The ring as tests see it; an engine thread calls its functions directly."""

class RingPair:
    """Both ends of one ring of `size` bytes. `push` and `produce` belong to one thread, the others
    to another.

    ValueError when `size` is no power of two, under 256, or more than there is memory.
    """

    head: int
    tail: int
    def __init__(self, size: int) -> None: ...
    def push(self, kind: int, a: int = 0, b: int = 0, c: int = 0, payload: bytes = b"") -> bool:
        """False = no room, and nothing was written. ValueError for kind 0: the filler's."""
    def peek(self) -> tuple[int, int, int, int, bytes] | None:
        """(kind, a, b, c, payload) of the oldest record."""
    def pop(self) -> tuple[int, int, int, int, bytes] | None: ...
    def produce(self, records: int, seed: int, payload_max: int, within_ms: int) -> int:
        """Push numbered records with payloads that `consume` can tell right from wrong. How many
        were pushed in time.
        """
    def consume(self, records: int, seed: int, payload_max: int, within_ms: int) -> tuple[int, int]:
        """(records taken, records that were not what `produce` pushes at that place)."""
