"""What one process saves of itself and its successor restores: shapes, read with every bound.

Each owner of state describes its saved form as a `msgspec.Struct` next to itself, gives it with
`save()` and takes it with `restore(data)`. A reader of a neighbouring version reads the same
document: keys that it does not know are passed over, keys that are missing have the defaults of
their shape. So a key is never given another meaning: it is left out, and a new one is added.

Points in time are saved as what is left, or as what has passed: the monotonic clock of the host is
not part of a document.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from fastmesh import limits
from fastmesh.errors import HandoverError

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A number of something, or a version that only rises."""
Id = Annotated[int, Meta(ge=1, le=2**32 - 1)]
"""Of a listener, cluster, endpoint or schedule in a snapshot."""
GroupId = Annotated[int, Meta(ge=1, le=limits.GROUP_ID_MAX)]
Handle = Annotated[int, Meta(ge=0)]
"""Of a connection: 64 bits, generation and index. One that is nobody's is not found, no more."""
Ms = Annotated[int, Meta(ge=0, le=limits.SAVED_MS_MAX)]
"""What is left, or has passed."""
Text = Annotated[str, Meta(max_length=limits.SAVED_TEXT_CHARS_MAX)]

_STEP = re.compile(r"\.([A-Za-z0-9_]+)|\[(\d+)\]")


def read(data: object, shape: type[T], what: str) -> T:
    """The saved form of `what`, from its owner's `save()` or from a document. Raises HandoverError
    that names the field, its value and what would be right."""
    if type(data) is shape:
        return data
    try:
        if isinstance(data, msgspec.Raw):
            return msgspec.json.decode(data, type=shape)
        return msgspec.convert(data, shape)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `")
        path = path.rstrip("`")
        raise HandoverError(
            f"{what}{path.removeprefix('$')}: {_shown(data, path)}{reason}"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HandoverError(f"{what}: is no JSON: {error}") from None
    except RecursionError:
        raise HandoverError(f"{what}: is nested too deep") from None


def wrong(what: str, value: object, right: str) -> HandoverError:
    """One thing in a document that its shape cannot tell."""
    text = ascii(value)
    most = limits.REMOTE_BYTES_SHOWN_MAX
    return HandoverError(f"{what}: {text if len(text) <= most else text[:most] + '...'}; {right}")


def _shown(data: object, path: str) -> str:
    """The value at a path like `$.links[3].state`, in front of the reason; "" where it cannot be
    had."""
    try:
        found: Any = msgspec.json.decode(data) if isinstance(data, msgspec.Raw) else data
        for key, index in _STEP.findall(path):
            found = found[int(index)] if index else found[key]
    except (LookupError, TypeError, ValueError, msgspec.DecodeError, RecursionError):
        return ""
    if isinstance(found, (dict, list)):
        return ""
    return f"{ascii(found)[: limits.REMOTE_BYTES_SHOWN_MAX]}; "
