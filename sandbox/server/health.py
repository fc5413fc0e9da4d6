"""Whether the service works, what it can do, and what it has done."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from sandbox.codec import dumps
from sandbox.server.replies import JSON, Refused, Reply, error_reply
from sandbox.server.state import ServerState
from sandbox.types import SandboxError, SandboxUnavailable


async def ready(state: ServerState, request: Request) -> Response:
    """Whether to send work here: the supervisor answers and the server is not draining."""
    if state.draining:
        raise Refused(503, "draining", "the server is shutting down", "infrastructure", retryable=True, wait=1)
    try:
        async with asyncio.timeout(5):
            await state.box.stats()
    except TimeoutError:
        return error_reply(SandboxUnavailable("the supervisor does not answer")).response()
    return Reply(200, dumps({"status": "ready", "tier": state.box.tier})).response()


async def capabilities(state: ServerState, request: Request) -> Response:
    """What the sandbox can do, and the server's own limits."""
    server = {
        "queue": state.options.queue,
        "max_wall_s": state.options.max_wall_s,
        "max_memory_mb": state.options.max_memory_mb,
        "languages": ["python", "pytest", "bash"],
    }
    return Response(
        dumps({**await state.box.capabilities(), "server": server}),
        media_type=JSON,
    )


async def stats(state: ServerState, request: Request) -> Response:
    """Counters of the supervisor and of the server."""
    server = {
        "load": state.load.total,
        "held_bytes": state.load.held_bytes,
        "idempotent_hits": state.once.hits,
        "detached": state.once.running,
        "draining": state.draining,
    }
    return Response(dumps({**await state.box.stats(), "server": server}), media_type=JSON)


async def metrics(state: ServerState, request: Request) -> Response:
    """Prometheus exposition. Without an answer of the supervisor the counters are still told."""
    try:
        async with asyncio.timeout(5):
            found = await state.box.stats()
    except (SandboxError, TimeoutError):
        found = {}
    state.metrics.load.set(state.load.total)
    state.metrics.draining.set(state.draining)
    text = state.metrics.render(found, state.box.tier, state.options.profile)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def healthz(state: ServerState, request: Request) -> Response:
    """A real execution."""
    return (await state.health.reply()).response()
