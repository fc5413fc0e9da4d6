"""HTTP answers: one shape for every refusal, built once where it is hot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from sandbox.codec import dumps, error_fields, error_status, result_fields
from sandbox.types import ExecResult, SandboxError, SandboxOverloaded, Status

JSON = "application/json"


@dataclass(frozen=True)
class Reply:
    """A finished answer. `done`: the work took effect, so a retry with the same key gets this very answer."""

    status: int
    body: bytes
    done: bool = True
    retry_after: float = 0.0

    def response(self) -> Response:
        """As an HTTP response."""
        headers = {"Retry-After": str(max(1, math.ceil(self.retry_after)))} if self.retry_after else None
        return Response(self.body, self.status, headers, JSON)


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
    return Refused(429, SandboxOverloaded.code, message, "overload", retryable=True, wait=max(0.05, wait))


def result_reply(result: ExecResult) -> Reply:
    """200 for everything the code did; 422 with the result and an error for code that was never run."""
    fields = result_fields(result)
    if result.status is not Status.REJECTED:
        return Reply(200, dumps(fields))
    error = {"code": "rejected", "message": result.stderr, "retryable": False, "class": "request"}
    return Reply(422, dumps({**fields, "error": error}))


def error_reply(error: SandboxError) -> Reply:
    """What an infrastructure failure, or a session's refusal, looks like."""
    wait = max(0.05, error.retry_after) if isinstance(error, SandboxOverloaded) else 0.0
    status = error_status(error)
    if status == 503 or (status == 429 and not wait):
        wait = 1.0
    return Reply(status, dumps({"error": error_fields(error)}), False, wait)


def internal_error(name: str) -> Reply:
    """A mistake of ours; the details are in the server's log only."""
    message = f"the server failed ({name}); its log says more"
    return Reply(
        500,
        dumps({"error": {"code": "internal", "message": message, "retryable": False, "class": "infrastructure"}}),
        False,
    )
