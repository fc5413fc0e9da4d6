"""Health by doing: a real execution, shared by everybody who asks."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from sandbox.codec import dumps
from sandbox.server.models import ExecRequest
from sandbox.server.replies import Reply, error_reply
from sandbox.types import SandboxError, SandboxOverloaded, SandboxUnavailable, Status

if TYPE_CHECKING:
    from sandbox.server.state import ServerState

FRESH_S = 1.0
"""A successful execution, anybody's, proves health for so long: probes cannot overload the server."""
PROBE_S = 10.0
STATS_S = 3.0
"""Seconds within which a supervisor that works tells its counters."""
_CODE = "print(6 * 7)"


class Health:
    """Health by doing. At most one probe runs at a time; everybody waits for the same one."""

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self._probe: asyncio.Task[Reply] | None = None
        self._failed: tuple[float, Reply] | None = None

    async def reply(self) -> Reply:
        """200 when code runs, or when so much runs that the probe finds no place; 503 otherwise."""
        now = time.monotonic()
        if now - self.state.last_success < FRESH_S:
            return _healthy("ok")
        if self._failed is not None and now - self._failed[0] < FRESH_S:
            return self._failed[1]
        if self._probe is None or self._probe.done():
            self._probe = asyncio.ensure_future(self._run())
        return await asyncio.shield(self._probe)

    async def _run(self) -> Reply:
        reply = await self._try()
        self._failed = (time.monotonic(), reply) if reply.status != 200 else None
        return reply

    async def _try(self) -> Reply:
        state = self.state
        try:
            async with asyncio.timeout(PROBE_S):
                fields = await state.execute(ExecRequest(code=_CODE))
        except SandboxOverloaded:
            return _healthy("busy")
        except TimeoutError:
            if await self._waits_its_turn():
                return _healthy("busy")
            return error_reply(SandboxUnavailable(f"no execution within {PROBE_S:g} s"))
        except SandboxError as error:
            return error_reply(error)
        if fields["status"] == Status.OK and fields["stdout"] == "42\n":
            return _healthy("ok")
        return error_reply(SandboxUnavailable(f"the probe ended with {fields['status']}: {fields['stderr'][:200]!r}"))

    async def _waits_its_turn(self) -> bool:
        """Whether other people's work keeps the probe waiting. Requests that hang are load too, so the supervisor must
        answer besides; what it runs, it ends at its limits."""
        try:
            async with asyncio.timeout(STATS_S):
                await self.state.box.stats()
        except (SandboxError, TimeoutError):
            return False
        return self.state.load.total >= self.state.workers


def _healthy(word: str) -> Reply:
    return Reply(200, dumps({"status": word}))
