"""Talking to a running fastmesh from the command line: blocking, one connection per call."""

from __future__ import annotations

import http.client
import socket
from typing import Any

import msgspec

from fastmesh.address import Address
from fastmesh.config import Secret
from fastmesh.errors import FastmeshError, UnavailableError

TIMEOUT_S = 10.0


class RefusedError(FastmeshError):
    """The running fastmesh said no."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(f"{reason} (HTTP {status})")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class AdminClient:
    def __init__(
        self, address: Address, token: Secret | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._address = address
        self._token = token
        self._timeout_s = timeout_s

    def get(self, path: str) -> Any:
        return self._call("GET", path)

    def post(self, path: str) -> Any:
        return self._call("POST", path)

    def put(self, path: str, body: bytes) -> Any:
        return self._call("PUT", path, body)

    def _call(self, method: str, path: str, body: bytes | None = None) -> Any:
        """The decoded answer. Raises UnavailableError, RefusedError."""
        at = self._address
        connection: http.client.HTTPConnection
        if at.is_unix:
            connection = _UnixConnection(at.path, self._timeout_s)
        else:
            connection = http.client.HTTPConnection(at.host, at.port, timeout=self._timeout_s)
        headers = {"Authorization": f"Bearer {self._token.reveal()}"} if self._token else {}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnavailableError(f"no fastmesh answers at {at}: {reason}") from error
        finally:
            connection.close()
        try:
            decoded = msgspec.json.decode(data)
        except msgspec.DecodeError as error:
            raise UnavailableError(f"what answers at {at} is not fastmesh") from error
        if answer.status >= 400 and path != "/readyz":
            reason = decoded.get("error", "refused") if isinstance(decoded, dict) else "refused"
            raise RefusedError(answer.status, reason)
        return decoded
