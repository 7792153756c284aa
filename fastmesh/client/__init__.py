"""The client of a message mesh: publish, and be called with what the application's groups get.

    from fastmesh.client import Group, MeshClient, later

    async with MeshClient(app="shop", groups=[Group("billing", topic="orders")]) as client:
        client.subscribe("billing", bill)
        await client.publish("orders", b"...", key="customer-7")

It needs the standard library, h11 and the compiled frames only, and runs on asyncio's loop as well
as on uvloop's. `SyncMeshClient` is the same for programs without a loop. See docs/client.md.
"""

from fastmesh.client.client import MeshClient
from fastmesh.client.errors import (
    AmbiguousError,
    ClientError,
    ClosedError,
    NotTakenError,
    RegistrationError,
    RejectedError,
    VersionError,
)
from fastmesh.client.model import (
    Fate,
    Group,
    Message,
    Receipt,
    Result,
    Stats,
    consumed,
    later,
    reject,
)
from fastmesh.client.sync import SyncMeshClient, SyncTransaction
from fastmesh.client.transaction import Transaction

__all__ = [
    "AmbiguousError",
    "ClientError",
    "ClosedError",
    "Fate",
    "Group",
    "MeshClient",
    "Message",
    "NotTakenError",
    "Receipt",
    "RegistrationError",
    "RejectedError",
    "Result",
    "Stats",
    "SyncMeshClient",
    "SyncTransaction",
    "Transaction",
    "VersionError",
    "consumed",
    "later",
    "reject",
]
