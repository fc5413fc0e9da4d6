"""`/run_code`, `/run_jupyter` and `/v1/ping`: clients written for SandboxFusion work unchanged.

Differences, all additive or stricter: `request_id`, `error`, `usage`, `truncated` and `isolation` beside its fields;
failures of the service have an HTTP status of their own, with `status: SandboxError` in the body as there.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sandbox.codec import dumps, encode_bytes, error_status, result_fields
from sandbox.results import decode_result
from sandbox.server.bodies import check, read_json, ticket
from sandbox.server.execs import while_connected
from sandbox.server.fusion_models import RunCodeRequest, RunJupyterRequest
from sandbox.server.fusion_programs import program
from sandbox.server.replies import Refused, Reply, told
from sandbox.server.state import ServerState
from sandbox.types import ExecResult, Limits, SandboxError, Session, SessionOpening, Status

_TIME = (Status.TIMEOUT, Status.CPU_LIMIT)
_WHY = {
    Status.MEMORY_LIMIT: "memory limit exceeded",
    Status.OUTPUT_LIMIT: "output limit exceeded",
    Status.CANCELLED: "cancelled",
}


def _return_code(result: ExecResult) -> int | None:
    if result.status in _TIME:
        return None
    if result.exit_code is not None:
        return result.exit_code
    if result.signal is not None:
        return -result.signal
    return 0 if result.ok else -9 if result.status in _WHY else 1


def _stderr(result: ExecResult) -> str:
    """What a plain interpreter would have written: the traceback is on standard error."""
    text = result.stderr
    if result.exception is not None and result.exception.traceback not in text:
        text += ("\n" if text and not text.endswith("\n") else "") + result.exception.traceback
    if result.status in _WHY and result.exception is None:
        text += ("\n" if text and not text.endswith("\n") else "") + _WHY[result.status] + "\n"
    return text


def command_result(result: ExecResult) -> dict[str, Any]:
    """A `CommandRunResult`; times in seconds."""
    return {
        "status": "TimeLimitExceeded" if result.status in _TIME else "Finished",
        "execution_time": round(result.usage.wall_ms / 1e3, 6),
        "cpu_time": round(result.usage.cpu_ms / 1e3, 6),
        "return_code": _return_code(result),
        "stdout": result.stdout,
        "stderr": _stderr(result),
    }


def _extra(request: Request, result: ExecResult) -> dict[str, Any]:
    usage = result.usage
    return {
        "request_id": ticket(request).number,
        "outcome": result.status.value,
        "usage": {"wall_ms": usage.wall_ms, "cpu_ms": usage.cpu_ms, "queue_ms": usage.queue_ms},
        "truncated": result.truncated,
        "isolation": result.isolation,
        "error": None,
    }


def _failed(request: Request, error: SandboxError, result_name: str) -> Reply:
    """An infrastructure failure in SandboxFusion's shape."""
    reason = told(error)
    fields = {
        "status": "SandboxError",
        "message": f"{error.code}: {error}",
        result_name: None,
        "files": {},
        "executor_pod_name": None,
        "request_id": ticket(request).number,
        "error": reason,
    }
    return Reply(error_status(error), dumps(fields), False, reason.get("retry_after", 0.0))


def _limits(state: ServerState, seconds: float, memory_mb: int = -1) -> Limits:
    if seconds > state.options.max_wall_s:
        raise Refused(422, "invalid_request", f"this server allows {state.options.max_wall_s:g} s at most")
    if memory_mb > state.options.max_memory_mb:
        raise Refused(422, "invalid_request", f"this server allows {state.options.max_memory_mb} MiB at most")
    limits = replace(state.box.limits, wall_s=seconds, cpu_s=max(1.0, math.ceil(seconds)))
    return replace(limits, memory_mb=memory_mb) if memory_mb > 0 else limits


def _files(given: dict[str, bytes | None]) -> dict[str, bytes]:
    return {path: data for path, data in given.items() if data is not None}


async def run_code(state: ServerState, request: Request) -> Response:
    """Run one program."""
    body = check(RunCodeRequest, await read_json(request))
    limits = _limits(state, body.run_timeout, body.memory_limit_MB)
    reply = await while_connected(request, _run_code(state, request, body, limits))
    return reply.response() if reply is not None else Response(status_code=499)


async def _run_code(state: ServerState, request: Request, body: RunCodeRequest, limits: Limits) -> Reply:
    try:
        source, added, stdin = program(body.language, body.code, body.args)
        files = {**_files(body.files), **added}
        optional: dict[str, Any] = {"files": files} if files else {}
        if body.fetch_files:
            optional["fetch"] = body.fetch_files
        owner = ticket(request).owner
        stdin = stdin if stdin is not None else body.stdin or ""
        with state.load.place(owner):
            ended = await state.box.exec_fields(source, stdin=stdin, limits=limits, owner=owner, **optional)
    except UnicodeEncodeError as error:
        raise Refused(422, "invalid_request", f"code is not text: {error.reason} at {error.start}") from None
    except SandboxError as error:
        state.failed(error)
        return _failed(request, error, "run_result")
    state.ended(ended)
    result = decode_result(ended)
    fields = {
        "status": "Success" if result.ok else "Failed",
        "message": "",
        "compile_result": None,
        "run_result": command_result(result),
        "executor_pod_name": None,
        "files": {path: encode_bytes(data) for path, data in result.files.items()},
        **_extra(request, result),
    }
    return Reply(200, dumps(fields))


async def run_jupyter(state: ServerState, request: Request) -> Response:
    """Run cells, one after another, in one interpreter."""
    body = check(RunJupyterRequest, await read_json(request))
    limits = _limits(state, body.total_timeout)
    reply = await while_connected(request, _run_jupyter(state, request, body, limits))
    return reply.response() if reply is not None else Response(status_code=499)


async def _run_jupyter(state: ServerState, request: Request, body: RunJupyterRequest, limits: Limits) -> Reply:
    try:
        opening = state.box.session(limits=limits, ttl_s=body.total_timeout + 60)
        with state.load.place(ticket(request).owner):
            results, files = await _cells_and_files(state, opening, body, limits)
    except SandboxError as error:
        state.failed(error)
        return _failed(request, error, "driver")
    last = results[-1] if results else ExecResult(Status.OK)
    timed_out = any(result.status in _TIME for result in results)
    driver = {
        "status": "TimeLimitExceeded" if timed_out else "Finished",
        "execution_time": sum(result.usage.wall_ms for result in results) / 1e3,
        "return_code": None if timed_out else 0 if last.alive else 1,
        "stdout": "",
        "stderr": "" if last.alive else _stderr(last),
    }
    fields = {
        "status": "Failed" if timed_out or not last.alive else "Success",
        "message": "",
        "driver": driver,
        "cells": [_cell(result) for result in results],
        "executor_pod_name": None,
        "files": {path: encode_bytes(data) for path, data in files.items()},
        **_extra(request, last),
    }
    return Reply(200, dumps(fields))


async def _cells_and_files(
    state: ServerState, opening: SessionOpening, body: RunJupyterRequest, limits: Limits
) -> tuple[list[ExecResult], dict[str, bytes]]:
    async with opening as session:
        for path, data in _files(body.files).items():
            await session.write_file(path, data)
        results = await _cells(state, session, body, limits)
        return results, await _fetch(session, body.fetch_files) if all(each.alive for each in results) else {}


async def _cells(state: ServerState, session: Session, body: RunJupyterRequest, limits: Limits) -> list[ExecResult]:
    """An error ends its cell only; a limit or the end of the interpreter ends the run."""
    end = time.monotonic() + body.total_timeout
    results: list[ExecResult] = []
    for code in body.cells:
        left = end - time.monotonic()
        wall = max(0.001, min(left, body.cell_timeout or left))
        result = await session.exec(code, limits=replace(limits, wall_s=wall), rich=True)
        state.ended(result_fields(result))
        results.append(result)
        if not result.alive or result.status in _TIME:
            break
    return results


async def _fetch(session: Session, paths: list[str]) -> dict[str, bytes]:
    """Those of `paths` that are regular files."""
    if not paths:
        return {}
    there = {info.path for info in await session.list_files()}
    return {path: await session.read_file(path) for path in paths if path in there}


def _cell(result: ExecResult) -> dict[str, Any]:
    errors = []
    if result.exception is not None:
        trace = result.exception.traceback.splitlines()
        errors = [{"ename": result.exception.type, "evalue": result.exception.message, "traceback": trace}]
    elif not result.ok:
        text = _WHY.get(result.status, result.status.value)
        errors = [{"ename": result.status.value, "evalue": text, "traceback": []}]
    return {
        "stdout": result.stdout,
        "stderr": result.stderr,
        "display": [dict(item) for item in result.display],
        "error": errors,
    }


async def ping(state: ServerState, request: Request) -> Response:
    """SandboxFusion's liveness word; `/healthz` is the honest one."""
    return Response(b'"pong"', media_type="application/json")
