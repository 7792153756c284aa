"""What all peers agree on: arguments, payloads, the message `Blob {bytes data = 1;}` of protobuf.

Runs in the peers' own environment: imports nothing of fastmesh.
"""

from __future__ import annotations

import sys


def options() -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in sys.argv[1:])


def payload(caller: str, number: int, size: int) -> bytes:
    """Bytes that no other call of any client has (from a dozen bytes on)."""
    pattern = f"{number}#{caller}#".encode()
    return (pattern * (size // len(pattern) + 1))[:size]


def blob(data: bytes) -> bytes:
    if not data:
        return b""
    head, rest = b"\x0a", len(data)
    while rest >= 0x80:
        head += bytes([rest & 0x7F | 0x80])
        rest >>= 7
    return head + bytes([rest]) + data


def unblob(message: bytes) -> bytes:
    """Raises ValueError when these bytes are not one whole Blob."""
    if not message:
        return b""
    if message[0] != 0x0A:
        raise ValueError(f"not a Blob: field {message[0]}")
    at, length, shift = 1, 0, 0
    while True:
        byte = message[at]
        length |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    if length != len(message) - at:
        raise ValueError(f"a Blob of {length} bytes in {len(message)}")
    return message[at:]
