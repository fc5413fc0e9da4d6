"""Reading requests: bounded while they stream in, JSON that cannot hurt, checked before anything runs."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from sandbox.server.replies import Refused

MAX_BODY = 32 * 1024 * 1024
"""Bytes of the largest request."""
MAX_VALUES = 200_000
"""Values in the JSON of one request. Nobody is served while it is read, and 32 MiB of `[],` would take seconds and a
GiB of memory."""
BODY_TIMEOUT_S = 60.0
"""Seconds a client may take to send a request."""
Model = TypeVar("Model", bound=BaseModel)


class Holder(Protocol):
    """Counts the request bytes in memory and names requests."""

    def hold(self, owner: str, size: int) -> None:
        """Count bytes. Raises `Refused` (429) for too many, which are counted."""
        ...

    def request_number(self) -> str:
        """A new name."""
        ...


class Ticket:
    """What the gate knows of a request: whose it is, its name in the log, the bytes it holds."""

    def __init__(self, owner: str, holder: Holder) -> None:
        self.owner, self._holder = owner, holder
        self.number = holder.request_number()
        self.bytes = 0

    def hold(self, size: int) -> None:
        """Count bytes of the body; the gate gives them back. Raises `Refused` (429) for too many."""
        self.bytes += size
        self._holder.hold(self.owner, size)

    def release(self) -> None:
        """The body is not in memory any more."""
        self._holder.hold(self.owner, -self.bytes)


def ticket(request: Request) -> Ticket:
    """The request's ticket."""
    found = request.scope["retool.ticket"]
    assert isinstance(found, Ticket)
    return found


def content_length(request: Request) -> int:
    """Announced size; 0 when none is. Raises `Refused` (400)."""
    for name, value in request.scope["headers"]:
        if name == b"content-length":
            if not value.isdigit() or len(value) > 18:
                raise Refused(400, "invalid_request", "Content-Length is not a number")
            return int(value)
    return 0


def _too_large() -> Refused:
    return Refused(413, "too_large", f"a request may have {MAX_BODY} bytes")


async def read_body(request: Request) -> bytes:
    """The whole body. Raises `Refused`: 413 as soon as it is known to be too large, 429 when memory holds too much of
    others, 408 when it takes too long."""
    if content_length(request) > MAX_BODY:
        raise _too_large()
    held = ticket(request)
    message = await _chunk(request, BODY_TIMEOUT_S)
    body: bytes = message.get("body", b"")
    held.hold(len(body))
    if not message.get("more_body", False):
        return body
    chunks, deadline = [body], asyncio.get_running_loop().time() + BODY_TIMEOUT_S
    while message.get("more_body", False):
        message = await _chunk(request, deadline - asyncio.get_running_loop().time())
        chunks.append(message.get("body", b""))
        held.hold(len(chunks[-1]))
        if held.bytes > MAX_BODY:
            raise _too_large()
    return b"".join(chunks)


async def _chunk(request: Request, seconds: float) -> Any:
    try:
        if "retool.complete" in request.scope:  # nothing to wait for
            message = await request.receive()
        else:
            async with asyncio.timeout(seconds):
                message = await request.receive()
    except TimeoutError:
        raise Refused(408, "invalid_request", "the request did not arrive in time", retryable=True) from None
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_not_a_number)


def _marks(body: bytes) -> int:
    """Commas and opening brackets: at least as many as values but one. Deleting them is the quick way to count."""
    return len(body) - len(body.translate(None, b",[{"))


def _crowded(body: bytes) -> bool:
    """Whether JSON holds more than `MAX_VALUES` values. Strings are left out of account: code is full of brackets."""
    if _marks(body) <= MAX_VALUES:
        return False
    outside = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"', 2 * MAX_VALUES)[::2]
    return _marks(b"".join(outside)) > MAX_VALUES


async def read_json(request: Request) -> Any:
    """The body as JSON. Raises `Refused` (413, 422). Lone surrogates in escapes are kept: they are judged as text
    later."""
    body = await read_body(request)
    if _crowded(body):
        raise Refused(413, "too_large", f"the JSON of a request may hold {MAX_VALUES} values")
    try:
        return _JSON.decode(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused(422, "invalid_json", f"the body is not JSON: {error!s:.200}") from None


def check(model: type[Model], data: Any) -> Model:
    """`data` as a `model`. Raises `Refused` (422) that names every wrong field."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [
            ".".join(str(part) for part in item["loc"])[:200] + ": " + item["msg"].removeprefix("Value error, ")
            for item in error.errors(include_url=False, include_context=False, include_input=False)[:20]
        ]
        message = "; ".join(line.removeprefix(": ") for line in lines)
        raise Refused(422, "invalid_request", message[:4000]) from None
    except RecursionError:
        raise Refused(422, "invalid_request", "the body is nested too deeply") from None


async def read(request: Request, model: type[Model]) -> Model:
    """The body as a `model`; an empty body is an empty object. Raises `Refused`."""
    if content_length(request) == 0 and not _chunked(request):
        return check(model, {})
    return check(model, await read_json(request))


def _chunked(request: Request) -> bool:
    return any(name == b"transfer-encoding" for name, _ in request.scope["headers"])
