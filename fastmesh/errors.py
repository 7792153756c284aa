"""The exception tree, by whose fault it is.

Every class says with which code a command ends (sysexits.h where that file has a word for it).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

EXIT_FAILURE = 1
EXIT_CONFIG = 64
EXIT_UNAVAILABLE = 69
EXIT_BUSY = 75


class FastmeshError(Exception):
    """Anything that a person is told in one line; `--debug` adds where it came from."""

    exit_code = EXIT_FAILURE


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a configuration."""

    path: str
    """Where: `clusters[0].endpoints[1].weight`; "" is the file as a whole."""
    value: object
    """What stands there; None when something is missing."""
    message: str
    """What would be right."""
    line: int = 0
    """Line in the file, from 1; 0 when there is none to name."""


class ConfigError(FastmeshError):
    """The operator's configuration cannot be used. Carries *all* problems, not the first."""

    exit_code = EXIT_CONFIG

    def __init__(self, problems: Iterable[Problem], source: str = "") -> None:
        self.problems = tuple(problems)
        self.source = source
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in {source or 'config'}")


class NeedsUpgradeError(FastmeshError):
    """A reload changes keys that only a new process can take over."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = tuple(keys)
        super().__init__("needs an upgrade, not a reload: " + ", ".join(self.keys))


class StateError(FastmeshError):
    """The state directory cannot be used: wrong owner or mode, or another process holds it."""

    exit_code = EXIT_BUSY


class ManagedElsewhereError(FastmeshError):
    """Something was put here that a file decides."""


class StaleError(FastmeshError):
    """What was to be replaced is not what is in force any more."""


class ListenError(FastmeshError):
    """A listening socket could not be had."""

    def __init__(self, name: str, address: str, reason: str) -> None:
        self.name = name
        self.address = address
        self.reason = reason
        super().__init__(f"cannot listen on {address} ({name}): {reason}")


class EngineError(FastmeshError):
    """The data plane did not answer in time."""


class HandoverError(FastmeshError):
    """A hand-over between two processes cannot go on: what the other one sent cannot be used, or
    what is here cannot be given."""

    def __init__(self, field: str, value: object = None, message: str = "") -> None:
        self.field = field
        """Where: `CONNS.count`; or, alone, all there is to say."""
        self.value = value
        """What stands there, short and printable; None when something is missing."""
        self.message = message
        """What would be right."""
        said = "" if value is None else f" ({value})"
        super().__init__(f"hand-over: {field}{said} {message}".rstrip())


class HandoverRefusedError(FastmeshError):
    """The process that serves did not hand over; it serves on."""

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(f"no hand-over ({code}): {reason}")


class RemoteProtocolError(FastmeshError):
    """A peer said something that its protocol does not allow."""


class NotSafeError(FastmeshError):
    """A drain has not come to its end in time: a stop now would cut something off."""

    exit_code = EXIT_BUSY


class UnavailableError(FastmeshError):
    """The running fastmesh that a command wants to talk to cannot be reached."""

    exit_code = EXIT_UNAVAILABLE
