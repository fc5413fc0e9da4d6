"""Results and errors as JSON objects: what the HTTP service writes and the remote client reads. Nothing is pickled."""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Any

from sandbox.types import (
    ConfinementUnavailable,
    ExceptionInfo,
    ExecResult,
    FileInfo,
    SandboxError,
    SandboxInfraError,
    SandboxOverloaded,
    SandboxProtocolError,
    SandboxUnavailable,
    SessionError,
    Status,
    Usage,
)

SESSION_STATUS = {
    "no_session": 404,
    "no_snapshot": 404,
    "no_file": 404,
    "session_ended": 410,
    "step_conflict": 409,
    "busy": 409,
    "fork_unsafe": 409,
    "fork_unsupported": 409,
    "bad_path": 422,
    "too_large": 413,
    "too_many": 429,
}
"""`SessionError.code` -> HTTP status."""

_USAGE = ("wall_ms", "cpu_ms", "queue_ms", "max_rss_mb")
_TEXT = ("stdout", "stderr", "digest", "isolation", "profile")
_FLAGS = ("truncated", "attested", "alive")
_MOST_WAIT_S = 60.0


def dumps(value: Any) -> bytes:
    """Compact ASCII JSON, valid whatever text is in it: a lone surrogate is escaped."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def encode_bytes(data: bytes) -> str:
    """Base64."""
    return base64.b64encode(data).decode("ascii")


def decode_bytes(text: str) -> bytes:
    """Inverse of `encode_bytes`. Raises `ValueError` for anything that is not base64."""
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError(f"not base64: {error}") from None


def result_fields(result: ExecResult) -> dict[str, Any]:
    """An `ExecResult` as JSON fields; file contents as base64."""
    usage, exception = result.usage, result.exception
    return {
        "status": result.status.value,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "exception": exception
        and {"type": exception.type, "message": exception.message, "traceback": exception.traceback},
        "exit_code": result.exit_code,
        "signal": result.signal,
        "usage": {
            "wall_ms": round(usage.wall_ms, 3),
            "cpu_ms": round(usage.cpu_ms, 3),
            "queue_ms": round(usage.queue_ms, 3),
            "max_rss_mb": round(usage.max_rss_mb, 3),
        },
        "truncated": result.truncated,
        "digest": result.digest,
        "attested": result.attested,
        "isolation": result.isolation,
        "profile": result.profile,
        "display": list(result.display),
        "files": {name: encode_bytes(data) for name, data in result.files.items()},
        "step": result.step,
        "alive": result.alive,
    }


def parse_result(fields: Any) -> ExecResult:
    """Inverse of `result_fields`. Raises `SandboxProtocolError` for anything else; unknown fields are ignored."""
    try:
        exception = fields["exception"]
        texts: dict[str, Any] = {name: fields[name] for name in _TEXT}
        flags: dict[str, Any] = {name: bool(fields[name]) for name in _FLAGS}
        if not all(isinstance(text, str) for text in texts.values()):
            raise TypeError("text expected")
        return ExecResult(
            status=Status(fields["status"]),
            exception=ExceptionInfo(*(str(exception[name]) for name in ("type", "message", "traceback")))
            if exception
            else None,
            exit_code=_number(fields["exit_code"]),
            signal=_number(fields["signal"]),
            usage=Usage(*(float(fields["usage"][name]) for name in _USAGE)),
            display=tuple({str(kind): str(text) for kind, text in item.items()} for item in fields["display"]),
            files={str(name): decode_bytes(text) for name, text in fields["files"].items()},
            step=int(fields["step"]),
            **texts,
            **flags,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SandboxProtocolError(f"the server sent a malformed result: {error!r:.200}") from None


def parse_files(fields: Any) -> list[FileInfo]:
    """A listing of files. Raises `SandboxProtocolError`."""
    try:
        return [FileInfo(str(item["path"]), int(item["size"])) for item in fields["files"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SandboxProtocolError(f"the server sent a malformed listing: {error!r:.200}") from None


def _number(value: Any) -> int | None:
    return None if value is None else int(value)


def error_status(error: SandboxError) -> int:
    """The HTTP status of an infrastructure failure or a session's refusal."""
    if isinstance(error, SandboxOverloaded):
        return 429
    if isinstance(error, SessionError):
        return SESSION_STATUS.get(error.code, 409)
    if isinstance(error, SandboxUnavailable | ConfinementUnavailable) or error.retryable:
        return 503
    return 500


def error_fields(error: SandboxError) -> dict[str, Any]:
    """What goes under `error`: code, message, retryable, class (and retry_after in seconds when overloaded)."""
    if isinstance(error, SandboxOverloaded):
        kind = "overload"
    elif isinstance(error, SessionError):
        kind = "session"
    else:
        kind = "infrastructure"
    fields = {"code": error.code, "message": str(error), "retryable": error.retryable, "class": kind}
    if isinstance(error, SandboxOverloaded):
        fields["retry_after"] = round(error.retry_after, 3)
    return fields


def parse_error(fields: Any) -> SandboxError | ValueError:
    """The exception that `error_fields` described: the same type that an embedded sandbox raises; a request that the
    server refused as malformed is the caller's mistake, a `ValueError`. Raises `SandboxProtocolError` for anything
    else."""
    try:
        code, message, kind = str(fields["code"]), str(fields["message"]), str(fields["class"])
        retryable = bool(fields["retryable"])
    except (KeyError, TypeError) as error:
        raise SandboxProtocolError(f"the server sent a malformed error: {error!r:.200}") from None
    if kind == "overload":
        return SandboxOverloaded(message, _wait_s(fields.get("retry_after")))
    if kind == "session":
        return SessionError(message, code)
    if code == ConfinementUnavailable.code:
        return ConfinementUnavailable(message)
    if code in (SandboxUnavailable.code, "draining"):
        return SandboxUnavailable(message)
    if code == SandboxProtocolError.code:
        return SandboxProtocolError(message)
    if kind == "request" and code in ("invalid_request", "invalid_json"):
        return ValueError(message)
    return SandboxInfraError(message, code, retryable)


def _wait_s(value: Any) -> float:
    """A server's wish, as far as it can be granted."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return 1.0
    return min(max(float(value), 0.0), _MOST_WAIT_S)
