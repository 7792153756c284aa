"""Fault points: where tests kill, stop, fail or delay one side of a hand-over, on purpose.

    FASTMESH_FAULT=<old|new>.<step>[.<record>]:<kill|stop|error[=ERRNO]|delay[=ms]>

`old` is the giver, `new` the taker; the steps S1..S8 are the points of `states.POINTS`, and
`record` counts from 1 what is sent or received there (1 if it is not given). Several stand with
commas in between. Each strikes once in the life of a process, and says so on stderr first, so that
a run can prove that its fault happened. Only builds for tests look at the variable (`_ext.points`).
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass
from typing import Final, Literal, cast

from fastmesh._ext.points import FAULT_POINTS
from fastmesh.handover.states import Side

VARIABLE: Final = "FASTMESH_FAULT"
STEPS: Final = tuple(f"S{number}" for number in range(1, 9))
DELAY_MS: Final = 100
"""Delay that names no length: clearly longer than a step takes, clearly shorter than the freeze
may last."""
DELAY_MS_MAX: Final = 60_000

Kind = Literal["kill", "stop", "error", "delay"]
_SIDES: Final[dict[str, Side]] = {"old": "giver", "new": "taker"}


@dataclass(frozen=True, slots=True)
class Fault:
    side: Side
    step: str
    record: int
    kind: Kind
    number: int
    """Of `error` the errno, of `delay` the milliseconds, else 0."""

    def __str__(self) -> str:
        name = "old" if self.side == "giver" else "new"
        how: dict[Kind, str] = {
            "error": f"={errno.errorcode.get(self.number)}",
            "delay": f"={self.number}",
        }
        return f"{name}.{self.step}.{self.record}:{self.kind}{how.get(self.kind, '')}"


def parse(text: str) -> tuple[Fault, ...]:
    """The faults in `text`. Raises ValueError that says what is wrong and what would be right."""
    return tuple(_parse(part.strip()) for part in text.split(",") if part.strip())


def _parse(text: str) -> Fault:
    where, colon, how = text.partition(":")
    name, _, rest = where.partition(".")
    step, dot, number = rest.partition(".")
    if not colon or name not in _SIDES or step not in STEPS:
        raise ValueError(f"{VARIABLE}: {text!r} must begin with old or new, a step S1..S8, a colon")
    if dot and not (number.isascii() and number.isdigit() and 1 <= int(number[:9]) < 10**8):
        raise ValueError(f"{VARIABLE}: record {number!r} must be a whole number from 1 on")
    kind, equals, value = how.partition("=")
    if kind not in ("kill", "stop", "error", "delay"):
        raise ValueError(f"{VARIABLE}: {kind!r} must be kill, stop, error or delay")
    what = 0
    if kind == "error":
        found = getattr(errno, value, None) if equals else errno.ENOBUFS
        if not isinstance(found, int):
            raise ValueError(f"{VARIABLE}: {value!r} must be the name of an error, as in errno(3)")
        what = found
    elif kind == "delay":
        if equals and not (value.isascii() and value.isdigit() and int(value[:9]) <= DELAY_MS_MAX):
            raise ValueError(f"{VARIABLE}: {value!r} must be 0..{DELAY_MS_MAX} ms")
        what = int(value) if equals else DELAY_MS
    elif equals:
        raise ValueError(f"{VARIABLE}: {kind} takes no value, but {value!r} is there")
    return Fault(_SIDES[name], step, int(number) if dot else 1, cast(Kind, kind), what)


class _Armed:
    faults: list[Fault] | None = None
    """None: the environment was not looked at yet."""


def arm(faults: tuple[Fault, ...] | None = None) -> None:
    """Strike these from now on; None: what the environment says, if this build looks at it."""
    if faults is None:
        faults = parse(os.environ.get(VARIABLE, "")) if FAULT_POINTS else ()
    _Armed.faults = list(faults)


def strike(side: Side, step: str, record: int = 1) -> None:
    """A fault point: returns, or returns late, or raises OSError, or never returns.

    `record` counts from 1 what is sent or received in this step. Raises ValueError, at the first
    point of a process, when the variable cannot be read.
    """
    if _Armed.faults is None:
        arm()
    assert _Armed.faults is not None
    for fault in _Armed.faults:
        if (fault.side, fault.step, fault.record) == (side, step, record):
            _Armed.faults.remove(fault)
            _do(fault)
            return


def _do(fault: Fault) -> None:
    os.write(2, f"fault {fault}\n".encode())
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)  # returns when somebody sends SIGCONT
    elif fault.kind == "error":
        raise OSError(fault.number, f"{os.strerror(fault.number)}: injected at {fault}")
    else:
        # The whole process stands still, as it would in a page fault or a slow system call.
        time.sleep(fault.number / 1000)
