"""Results and errors as they come out of the supervisor, and errors as they go in."""

from __future__ import annotations

import base64
from typing import Any

from sandbox.types import (
    ConfinementUnavailable,
    ExceptionInfo,
    ExecResult,
    SandboxError,
    SandboxInfraError,
    SandboxOverloaded,
    SandboxProtocolError,
    SandboxUnavailable,
    SessionError,
    Status,
    Usage,
)

_PLAIN: dict[str, type[SandboxError]] = {
    error.__name__: error for error in (ConfinementUnavailable, SandboxUnavailable, SandboxProtocolError)
}


def decode_result(fields: dict[str, Any]) -> ExecResult:
    """Inverse of `codec.result_fields`, for what our own supervisor says. Raises `SandboxProtocolError` when it is
    none."""
    try:
        exception = fields["exception"]
        changed = {
            "status": Status(fields["status"]),
            "usage": Usage(**fields["usage"]),
            "exception": ExceptionInfo(**exception) if exception else None,
            "display": tuple(fields.get("display", ())),
            "files": {path: base64.b64decode(data) for path, data in fields.get("files", {}).items()},
        }
        return ExecResult(**{**fields, **changed})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SandboxProtocolError(f"not a result: {type(error).__name__}: {error}") from None


def encode_error(error: SandboxError) -> dict[str, Any]:
    """Class, code, whether to retry, message."""
    return {
        "kind": type(error).__name__,
        "code": error.code,
        "retryable": error.retryable,
        "message": str(error),
        "retry_after": getattr(error, "retry_after", 0.0),
    }


def decode_error(fields: dict[str, Any]) -> SandboxError:
    """Inverse of `encode_error`."""
    message, kind = str(fields["message"]), fields["kind"]
    if kind == SandboxOverloaded.__name__:
        return SandboxOverloaded(message, float(fields["retry_after"]))
    if kind == SessionError.__name__:
        return SessionError(message, str(fields["code"]))
    if kind in _PLAIN:
        return _PLAIN[kind](message)
    return SandboxInfraError(message, str(fields["code"]), bool(fields["retryable"]))
