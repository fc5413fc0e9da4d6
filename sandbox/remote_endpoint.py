"""One sandbox server as a client sees it: how loaded, how healthy, and one attempt at one request."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from sandbox.codec import parse_error
from sandbox.remote_retry import Breaker
from sandbox.types import SandboxProtocolError, SandboxUnavailable

CONNECT_S = 5.0
MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of the largest answer."""
_KEEP_S = 60.0  # less than the server's
_LARGE = 1 << 20
_UNFIT = ("unavailable", "draining", "confinement_unavailable", "internal")


class LostRequest(SandboxUnavailable):
    """No answer. `sent`: the request may have reached the server and taken effect there."""

    def __init__(self, message: str, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


@dataclass(frozen=True)
class Answer:
    """What a server said: `body` as it came, or `parsed` where it was part of a larger answer."""

    status: int
    body: bytes
    json: bool = True
    parsed: Any = None

    def fields(self) -> dict[str, Any]:
        """The body. Raises `SandboxProtocolError` for anything but a JSON object."""
        if not self.json:
            raise SandboxProtocolError(f"the server answered {self.status} with something that is not JSON")
        try:
            value = json.loads(self.body) if self.parsed is None else self.parsed
        except (ValueError, RecursionError) as error:
            raise SandboxProtocolError(f"the server's answer is not JSON: {error!s:.100}") from None
        if not isinstance(value, dict):
            raise SandboxProtocolError(f"the server answered with a JSON {type(value).__name__}, not an object")
        return value

    def error(self) -> Exception | None:
        """What went wrong, as an exception; None for an answer (a rejected program is an answer, too)."""
        if self.status < 400:
            return None
        if not self.json and self.status in (502, 503, 504):  # a proxy in between
            return SandboxUnavailable(f"a gateway answered {self.status}")
        fields = self.fields()
        if self.status == 422 and "status" in fields:
            return None
        return parse_error(fields.get("error"))


class Endpoint:
    """`url`: `http://host:port`, `https://…` or `unix:/path`. Raises `ValueError` for anything else."""

    def __init__(self, url: str, token: str | None, connections: int) -> None:
        self.url = url.rstrip("/")
        self.in_flight = 0
        self.sessions = 0
        self.breaker = Breaker()
        self._uds = self.url.removeprefix("unix:") if self.url.startswith("unix:") else None
        if self._uds is None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"sandbox URL {url!r}: write http://HOST:PORT, https://HOST or unix:/PATH")
        self._base = str(URL(self.url)).rstrip("/") if self._uds is None else "http://sandbox"
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "retool-sandbox"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._connections = connections
        self._client: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        """Made at the first request: it belongs to the event loop that runs then."""
        if self._client is None:
            limit = self._connections
            self._client = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=limit, keepalive_timeout=_KEEP_S)
                if self._uds is None
                else aiohttp.UnixConnector(self._uds, limit=limit, keepalive_timeout=_KEEP_S),
                headers=self._headers,
                skip_auto_headers=("Content-Type",),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._client

    async def close(self) -> None:
        """Hang up."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One attempt. Raises `LostRequest` without an answer, `SandboxProtocolError` for an answer too large."""
        async with self.stream(method, path, body, seconds=seconds, headers=headers) as response:
            chunks, size = [], 0
            async for chunk in response.content.iter_any():
                size += len(chunk)
                if size > MAX_ANSWER:
                    raise SandboxProtocolError(f"{self.url}: an answer of more than {MAX_ANSWER} bytes")
                chunks.append(chunk)
            kind = response.headers.get("content-type", "")
            answer = Answer(response.status, b"".join(chunks), kind.startswith("application/json"))
        self.judge(answer)
        return answer

    def judge(self, answer: Answer) -> None:
        """A server that says it cannot work is left alone for a while."""
        if answer.status < 500:
            return
        try:
            code = answer.fields()["error"]["code"]
        except (SandboxProtocolError, KeyError, TypeError):
            code = "unavailable"
        if code in _UNFIT:
            self.breaker.fail(at_once=code == "draining")
        else:
            self.breaker.succeed()

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer whose body is read inside; raises `LostRequest` when the connection or the time ends."""
        probing = self.breaker.enter()
        self.in_flight += 1
        try:
            async with asyncio.timeout(max(0.001, seconds)):
                url = URL(self._base + path, encoded=True)  # as it is: a part of a path may be dots
                data = io.BytesIO(body) if body and len(body) > _LARGE else body  # sent in pieces
                async with self._open().request(
                    method, url, data=data, headers=headers, allow_redirects=False
                ) as response:
                    if response.status < 500:
                        self.breaker.succeed()
                    yield response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self.breaker.fail()
            raise LostRequest(f"{self.url} cannot be reached: {error!s}", sent=False) from error
        except aiohttp.InvalidURL as error:
            raise ValueError(str(error)) from error
        except TimeoutError as error:
            self.breaker.fail()
            raise LostRequest(f"{self.url}: no answer within {seconds:.1f} s", sent=True) from error
        except (aiohttp.ClientError, OSError) as error:
            self.breaker.fail()
            raise LostRequest(f"{self.url} broke off: {type(error).__name__} {error!s}", sent=True) from error
        finally:
            self.in_flight -= 1
            self.breaker.drop(probing)
