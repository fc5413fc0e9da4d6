"""HTTP answers: one shape for every refusal, built once where it is hot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sandbox.codec import dumps, error_fields, error_status
from sandbox.types import SandboxError, SandboxOverloaded, Status

JSON = "application/json"
MAX_WAIT_S = 30.0
"""Longest `Retry-After`: estimates beyond it are worth little, and places become free earlier."""
_CONTENT_TYPE = (b"content-type", JSON.encode())


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished answer. `done`: the work took effect, so a retry with the same key gets this very answer."""

    status: int
    body: bytes
    done: bool = True
    retry_after: float = 0.0

    def response(self) -> Answer:
        """As an HTTP response."""
        return Answer(self)


class Answer(Response):
    """A `Reply` on its way: a Starlette response without what a whole body of JSON has no use for."""

    def __init__(self, reply: Reply) -> None:
        self.status_code, self.body, self.background = reply.status, reply.body, None
        self.raw_headers = [_CONTENT_TYPE, (b"content-length", b"%d" % len(reply.body))]
        if reply.retry_after:
            self.raw_headers.append((b"retry-after", b"%d" % max(1, math.ceil(reply.retry_after))))
        if reply.status == 401:
            self.raw_headers.append((b"www-authenticate", b"Bearer"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await self.send(send)

    async def send(self, send: Send) -> None:
        """The whole answer."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body})


class Refused(Exception):
    """A request that is turned away before it runs. `kind`: `request`, `auth` or `overload`."""

    def __init__(
        self, status: int, code: str, message: str, kind: str = "request", *, retryable: bool = False, wait: float = 0.0
    ) -> None:
        super().__init__(message)
        self.fields: dict[str, Any] = {"code": code, "message": message, "retryable": retryable, "class": kind}
        if wait:
            self.fields["retry_after"] = round(wait, 3)
        self.status, self.wait = status, wait

    def reply(self) -> Reply:
        """The answer."""
        return Reply(self.status, dumps({"error": self.fields}), False, self.wait)


def overloaded(message: str, wait: float) -> Refused:
    """429."""
    return Refused(
        429, SandboxOverloaded.code, message, "overload", retryable=True, wait=min(MAX_WAIT_S, max(0.05, wait))
    )


def result_reply(fields: dict[str, Any]) -> Reply:
    """200 for everything the code did; 422 with the result and an error for code that was never run."""
    if fields["status"] != Status.REJECTED:
        return Reply(200, dumps(fields))
    error = {"code": "rejected", "message": fields["stderr"], "retryable": False, "class": "request"}
    return Reply(422, dumps({**fields, "error": error}))


def error_reply(error: SandboxError) -> Reply:
    """What an infrastructure failure, or a session's refusal, looks like."""
    fields = told(error)
    return Reply(error_status(error), dumps({"error": fields}), False, fields.get("retry_after", 0.0))


def told(error: SandboxError) -> dict[str, Any]:
    """What goes under `error`, with `retry_after` wherever waiting may help."""
    fields = error_fields(error)
    if isinstance(error, SandboxOverloaded):
        fields["retry_after"] = max(0.05, fields["retry_after"])
    elif error_status(error) in (429, 503):
        fields["retry_after"] = 1.0
    return fields


def internal_error(name: str) -> Reply:
    """A mistake of ours; the details are in the server's log only."""
    message = f"the server failed ({name}); its log says more"
    return Reply(
        500,
        dumps({"error": {"code": "internal", "message": message, "retryable": False, "class": "infrastructure"}}),
        False,
    )
