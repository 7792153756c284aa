"""A client that can be as wrong as a test wants it to be."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastmesh.address import Address


class Reply:
    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        head, _, self.body = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1]) if lines[0] else 0
        self.headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}

    def json(self) -> Any:
        return json.loads(self.body)


async def connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.is_unix:
        return await asyncio.open_unix_connection(address.path)
    return await asyncio.open_connection(address.host, address.port)


async def raw(address: Address, data: bytes, *, timeout_s: float = 5.0) -> Reply:
    """Send bytes, read until the end."""
    reader, writer = await connect(address)
    try:
        writer.write(data)
        return Reply(await asyncio.wait_for(reader.read(-1), timeout_s))
    except ConnectionError:
        return Reply(b"")
    finally:
        writer.close()


async def ask(
    address: Address, path: str, method: str = "GET", body: bytes = b"", **headers: str
) -> Reply:
    sent = {"Host": str(address) if not address.is_unix else "localhost", "Connection": "close"}
    sent |= {k.replace("_", "-"): v for k, v in headers.items()}
    if body or method == "POST":
        sent.setdefault("Content-Length", str(len(body)))
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in sent.items() if v)
    return await raw(address, head.encode("latin-1") + b"\r\n" + body)
