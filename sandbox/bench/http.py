"""A small HTTP/1.1 client for measuring: kept-alive connections, JSON in and out, next to no cost of its own."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast
from urllib.parse import urlsplit

_END = b"\r\n\r\n"


class _Connection(asyncio.Protocol):
    """One answer at a time, with a Content-Length."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._data = bytearray()
        self._answer: asyncio.Future[tuple[int, dict[str, str], bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the server hung up"))

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, dict[str, str], bytes]]:
        """Send a request; the future gives HTTP status, headers in lower case, and body."""
        self._answer = asyncio.get_running_loop().create_future()
        self._data.clear()
        assert self.transport is not None
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._data += data
        start = self._data.find(_END)
        if start < 0 or self._answer is None or self._answer.done():
            return
        first, *lines = self._data[:start].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = self._data[start + len(_END) :]
        if len(body) >= int(headers["content-length"]):
            self._answer.set_result((int(first.split()[1]), headers, bytes(body)))


class Caller:
    """Connections to one server, as many as are needed at once. Raises `OSError` when it cannot be reached."""

    def __init__(self, url: str, token: str = "") -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._base = parts.path.rstrip("/")
        self._authorization = f"Authorization: Bearer {token}\r\n" if token else ""
        self._idle: list[_Connection] = []

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], dict[str, Any]]:
        """(HTTP status, headers in lower case, decoded body)."""
        payload = json.dumps(body).encode()
        head = (
            f"POST {self._base}{path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"{self._authorization}Content-Length: {len(payload)}\r\n\r\n"
        )
        connection = await self._connection()
        assert connection.transport is not None
        try:
            status, headers, data = await connection.ask(head.encode() + payload)
        except BaseException:
            connection.transport.close()
            raise
        if headers.get("connection") == "close":
            connection.transport.close()
        else:
            self._idle.append(connection)
        return status, headers, json.loads(data)

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        _, made = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        return made

    async def close(self) -> None:
        """Hang up."""
        for connection in self._idle:
            if connection.transport is not None:
                connection.transport.close()
        self._idle.clear()
