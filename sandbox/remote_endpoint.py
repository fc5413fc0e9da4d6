"""One sandbox server as a client sees it: how loaded, how healthy, and one attempt at one request."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from sandbox.codec import parse_error
from sandbox.remote_retry import Breaker
from sandbox.types import SandboxOverloaded, SandboxProtocolError, SandboxUnavailable

CONNECT_S = 5.0
MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of the largest answer."""
_KEEP_S = 60.0  # less than the server's
_LARGE = 1 << 20
_UNFIT = ("unavailable", "draining", "confinement_unavailable", "internal")
_JSON, _BYTES = "application/json", "application/octet-stream"
Value = TypeVar("Value")
Parse = Callable[["Answer"], Value]
"""Makes a value of an answer that is no error, or raises `SandboxProtocolError`."""


class LostRequest(SandboxUnavailable):
    """No answer. `sent`: the request may have reached the server and taken effect there. `late`: not within the time
    it had; the server may hang. `server`: which it was."""

    def __init__(self, message: str, *, sent: bool, late: bool = False, server: Endpoint | None = None) -> None:
        super().__init__(message)
        self.sent, self.late, self.server = sent, late, server

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_server(super().__reduce__())


class Nonsense(SandboxProtocolError):
    """An answer that is none of ours: a proxy's page, another program's JSON. Another server may give a proper one."""

    retryable = True

    def __init__(self, message: str, server: Endpoint) -> None:
        super().__init__(message)
        self.server: Endpoint | None = server

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_server(super().__reduce__())


def _without_server(reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """Connections stay in their process."""
    return *reduced[:-1], {**reduced[-1], "server": None}


@dataclass(frozen=True)
class Answer:
    """What a server said: `body` as it came, of type `kind`, or `parsed` where it was part of a larger answer."""

    status: int
    body: bytes
    kind: str = _JSON
    parsed: Any = None

    def fields(self) -> dict[str, Any]:
        """The body. Raises `SandboxProtocolError` for anything but a JSON object."""
        if not self.kind.startswith(_JSON):
            raise SandboxProtocolError(f"the server answered {self.status} with something that is not JSON")
        try:
            value = json.loads(self.body) if self.parsed is None else self.parsed
        except (ValueError, RecursionError) as error:
            raise SandboxProtocolError(f"the server's answer is not JSON: {error!s:.100}") from None
        if not isinstance(value, dict):
            raise SandboxProtocolError(f"the server answered with a JSON {type(value).__name__}, not an object")
        return value

    def content(self) -> bytes:
        """The body of an answer that is bytes. Raises `SandboxProtocolError`."""
        if not self.kind.startswith(_BYTES):
            raise SandboxProtocolError(f"the server answered with {self.kind or 'nothing'}, not with bytes")
        return self.body

    def error(self) -> Exception | None:
        """What went wrong, as an exception; None for an answer (a rejected program is an answer, too). Raises
        `SandboxProtocolError` for what no server of ours says."""
        if 200 <= self.status < 300:
            return None
        if self.status in (502, 503, 504) and not self.kind.startswith(_JSON):  # a proxy in between
            return SandboxUnavailable(f"a gateway answered {self.status}")
        fields = self.fields()
        if self.status == 422 and "status" in fields:
            return None
        if self.status < 400:
            raise SandboxProtocolError(f"the server answered {self.status}")
        return parse_error(fields.get("error"))


def _check(url: str, token: str | None) -> None:
    """Raises `ValueError` for what is no address, or no token."""
    wrong = f"sandbox URL {url!r:.200}: write http://HOST:PORT, https://HOST or unix:/PATH"
    if not isinstance(url, str):
        raise ValueError(wrong)
    if token is not None and (not isinstance(token, str) or not token.isprintable() or " " in token):
        raise ValueError("the token holds a blank, an end of line or something else that no token has")
    if url.startswith("unix:") and url != "unix:":
        return
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise ValueError(wrong) from None
    if token and parts.username is not None:
        raise ValueError("a sandbox URL with a user name and a token as well: the server takes one of them")


class Endpoint:
    """`url`: `http://host:port`, `https://…` or `unix:/path`. Raises `ValueError` for anything else."""

    def __init__(self, url: str, token: str | None, connections: int) -> None:
        _check(url, token)
        self.url = url.rstrip("/")
        self.in_flight = 0
        self.sessions = 0
        self.breaker = Breaker()
        self.trouble: LostRequest | Nonsense | None = None
        """Of the last request, if it came to that."""
        self._full_until = 0.0
        self._uds = self.url.removeprefix("unix:") if self.url.startswith("unix:") else None
        self._base = str(URL(self.url)).rstrip("/") if self._uds is None else "http://sandbox"
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "retool-sandbox"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._connections = connections
        self._client: aiohttp.ClientSession | None = None
        self._closed = False

    def open(self) -> None:
        """Take requests, after `close` again."""
        self._closed = False

    def _session(self) -> aiohttp.ClientSession:
        """Made at the first request: it belongs to the event loop that runs then."""
        if self._closed:
            raise LostRequest(f"{self.url}: the client was closed", sent=False, server=self)
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
        """Hang up: what is under way is lost."""
        self._closed = True
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
        """One attempt. Raises `LostRequest` without an answer, `Nonsense` for an answer too large."""
        async with self.stream(method, path, body, seconds=seconds, headers=headers) as response:
            return await self.read(response)

    async def read(self, response: aiohttp.ClientResponse) -> Answer:
        """All of an answer. Raises `Nonsense` for one too large."""
        chunks, size = [], 0
        async for chunk in response.content.iter_any():
            size += len(chunk)
            if size > MAX_ANSWER:
                raise self.nonsense(f"an answer of more than {MAX_ANSWER} bytes")
            chunks.append(chunk)
        return Answer(response.status, b"".join(chunks), response.headers.get("content-type", ""))

    async def ask(
        self,
        method: str,
        path: str,
        parse: Parse[Value],
        body: bytes | None = None,
        *,
        seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> Value:
        """One attempt, and what it brought: see `send` and `take`."""
        return self.take(await self.send(method, path, body, seconds=seconds, headers=headers), parse)

    def take(self, answer: Answer, parse: Parse[Value]) -> Value:
        """What `parse` makes of an answer. Raises the error that it holds, and `Nonsense` for one that is none of ours.
        Either way the answer shows how well the server is, and whether it has room."""
        try:
            error = answer.error()
            if error is None:
                value = parse(answer)
                self._well()
                return value
        except SandboxProtocolError as strange:
            raise self.nonsense(str(strange)) from None
        code = answer.fields()["error"]["code"] if answer.kind.startswith(_JSON) else "unavailable"
        if answer.status >= 500 and code in _UNFIT:
            self.breaker.fail(at_once=code == "draining")
            self.trouble = None
        else:
            self._well()
        if isinstance(error, SandboxOverloaded):
            self._full_until = time.monotonic() + error.retry_after
        raise error

    def _well(self) -> None:
        self.breaker.succeed()
        self.trouble = None

    def nonsense(self, message: str) -> Nonsense:
        """A failure of the server, to be raised."""
        self.breaker.fail()
        self.trouble = trouble = Nonsense(f"{self.url}: {message}", self)
        return trouble

    def lost(self, message: str, *, sent: bool, late: bool = False) -> LostRequest:
        """A failure of the server, to be raised."""
        self.breaker.fail()
        self.trouble = trouble = LostRequest(f"{self.url} {message}", sent=sent, late=late, server=self)
        return trouble

    def wait_s(self) -> float:
        """Seconds until the server may be asked, and said that it would have room; 0 for now."""
        return max(self.breaker.wait_s(), self._full_until - time.monotonic())

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
                async with self._session().request(
                    method, url, data=data, headers=headers, allow_redirects=False
                ) as response:
                    yield response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise self.lost(f"cannot be reached: {error!s}", sent=False) from error
        except aiohttp.InvalidURL as error:
            raise ValueError(str(error)) from error
        except TimeoutError as error:
            raise self.lost(f"gave no answer within {seconds:.1f} s", sent=True, late=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self.lost(f"broke off: {type(error).__name__} {error!s}", sent=True) from error
        finally:
            self.in_flight -= 1
            self.breaker.drop(probing)
