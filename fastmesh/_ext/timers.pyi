"""The timer wheel as tests see it; an engine thread calls its functions directly."""

class TimerWheel:
    """A wheel with `timers` timers, named 0 .. timers - 1; every time is passed in, in
    milliseconds.

    IndexError for a timer that does not exist.
    """

    timers: int
    armed: int
    def __init__(self, timers: int, now_ms: int = 0) -> None: ...
    def set(self, name: int, at_ms: int) -> None: ...
    def clear(self, name: int) -> None: ...
    def due(self, now_ms: int) -> int | None: ...
    def sleep_ms(self, now_ms: int) -> int:
        """0 = something may be due, -1 = nothing is armed."""
    def check(self) -> None:
        """Walk everything; AssertionError when an invariant does not hold."""

def sizes() -> dict[str, int]:
    """Bytes of each native struct, by name."""
