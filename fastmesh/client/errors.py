"""What can go wrong for an application, by what it may conclude about its message.

ClientError
├── NotTakenError        nothing happened; the same call may be made again
│   └── ClosedError      ... but not on this client: it is closed
├── AmbiguousError       it may or may not have happened
├── RejectedError        nothing happened and never will; repeating it is no use
│   ├── RegistrationError    the registration: groups that conflict or are malformed
│   └── VersionError         the mesh speaks other versions of the protocol
"""

from __future__ import annotations

from collections.abc import Iterable

from fastmesh.errors import FastmeshError, Problem


class ClientError(FastmeshError):
    """Every error that this package raises of its own; bad arguments are ValueError."""


class NotTakenError(ClientError):
    """Nothing happened within the deadline: no connection, or the mesh said "later" to the end."""


class ClosedError(NotTakenError):
    """The client is not started, closing or closed."""


class AmbiguousError(ClientError):
    """It may have happened: the frame was sent, and no word about its fate came back.

    Sending the message again may double it. `idempotent=True` says that this is harmless, and lets
    the client do it by itself.
    """

    def __init__(self, message_id: str, reason: str) -> None:
        self.message_id = message_id
        """The fm.id: consumers that keep the ids they have seen can tell a double by it."""
        self.reason = reason
        super().__init__(f"message {message_id} may or may not have been taken: {reason}")


class RejectedError(ClientError):
    """Refused for good by the mesh or the broker; `reason` is its word."""

    def __init__(self, what: str, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{what} was rejected: {reason}")


class RegistrationError(RejectedError):
    """Refused: it contradicts another client's (HTTP 409), is malformed (422), or may not (401)."""

    def __init__(self, status: int, reason: str, problems: Iterable[Problem] = ()) -> None:
        self.status = status
        self.problems = tuple(problems)
        """What is wrong with which field; 422 only."""
        told = [f"{p.path}: {p.message} (found {p.value!r})" for p in self.problems]
        super().__init__("the registration", "; ".join([f"{reason} (HTTP {status})", *told]))


class VersionError(RejectedError):
    """The mesh understands other versions of the push protocol only."""

    def __init__(self, ours: str, theirs: str) -> None:
        self.theirs = theirs
        super().__init__(
            "hello", f"version {ours} is not understood there; it speaks {theirs or 'no version'}"
        )
