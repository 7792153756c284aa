"""One HTTP/1.1 request, one answer, one connection: all that a registration needs."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, NamedTuple

import h11

from fastmesh import limits
from fastmesh._version import __version__
from fastmesh.address import Address


class Answer(NamedTuple):
    status: int
    document: Any
    """The decoded body; None when it is empty or no JSON."""


class HttpError(Exception):
    """What answered speaks no HTTP, or too much of it."""


async def call(
    address: Address,
    method: str,
    target: str,
    document: object = None,
    *,
    timeout_s: float,
    token: str | None = None,
) -> Answer:
    """Raises OSError (TimeoutError included) and HttpError; in both cases it may have happened."""
    async with asyncio.timeout(timeout_s):
        if address.is_unix:
            reader, writer = await asyncio.open_unix_connection(address.path)
        else:
            reader, writer = await asyncio.open_connection(address.host, address.port)
        try:
            request = _request(address, method, target, document, token)
            return await _exchange(reader, writer, address, request)
        except h11.RemoteProtocolError as error:
            raise HttpError(f"what answers at {address} speaks no HTTP/1.1: {error}") from error
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def _request(
    address: Address, method: str, target: str, document: object, token: str | None
) -> tuple[h11.Request, bytes]:
    body = b"" if document is None else json.dumps(document).encode()
    headers = [
        ("Host", "localhost" if address.is_unix else str(address)),
        ("User-Agent", f"fastmesh-client/{__version__}"),
        ("Accept", "application/json"),
        ("Connection", "close"),
        ("Content-Length", str(len(body))),
    ]
    if document is not None:
        headers.append(("Content-Type", "application/json"))
    if token is not None:
        headers.append(("Authorization", f"Bearer {token}"))
    return h11.Request(method=method, target=target, headers=headers), body


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    address: Address,
    request: tuple[h11.Request, bytes],
) -> Answer:
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=limits.ADMIN_HEAD_BYTES_MAX)
    head, body = request
    out = http.send(head) or b""
    if body:
        out += http.send(h11.Data(data=body)) or b""
    out += http.send(h11.EndOfMessage()) or b""
    writer.write(out)
    await writer.drain()

    status = 0
    received = bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            received += event.data
            if len(received) > limits.CLIENT_HTTP_BODY_BYTES_MAX:
                raise HttpError(f"{address} answers more than {limits.CLIENT_HTTP_BODY_BYTES_MAX}")
        elif isinstance(event, h11.EndOfMessage):
            break
        elif isinstance(event, h11.ConnectionClosed):
            raise HttpError(f"{address} closed the connection without an answer")
    try:
        return Answer(status, json.loads(received) if received else None)
    except ValueError:
        return Answer(status, None)
