"""The outermost layer: who may come in, whether there is room, and that every answer is an answer.

Raw ASGI, so that a refusal costs next to nothing and comes before the body is read.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandbox.server.bodies import Ticket
from sandbox.server.replies import Refused, internal_error
from sandbox.server.state import ServerState
from sandbox.server.tokens import ANONYMOUS

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/v1/ping"})
"""Need no token: they tell nothing and health checkers have none."""
WORK_PATHS = frozenset({"/v1/exec", "/v1/batch", "/run_code", "/run_jupyter"})
log = logging.getLogger("retool.sandbox")


def _unauthorized() -> Refused:
    return Refused(401, "unauthorized", "a valid token is needed: Authorization: Bearer TOKEN", "auth")


def _draining() -> Refused:
    return Refused(
        503, "draining", "the server is shutting down: use another", "infrastructure", retryable=True, wait=1
    )


class Gate:
    """ASGI middleware around the application."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app, self.state = app, state
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        state = self.state
        path, posted = scope["path"], scope["method"] == "POST"
        owner = self._owner(scope)
        if owner is None and path not in OPEN_PATHS:
            await self._refuse(_unauthorized(), send)
            return
        work = posted and (path in WORK_PATHS or path.endswith("/exec"))
        if state.draining and posted:
            await self._refuse(_draining(), send)
            return
        owner = owner or ANONYMOUS
        if work:  # it takes its place when it begins; refused here, its body is not even read
            try:
                state.load.check(owner)
            except Refused as refused:
                await self._refuse(refused, send)
                return
        self.active += 1
        ticket = scope["retool.ticket"] = Ticket(owner, state)
        try:
            await self._run(scope, receive, send, ticket)
        finally:
            self.active -= 1
            if ticket.bytes:
                ticket.release()

    def _owner(self, scope: Scope) -> str | None:
        tokens = self.state.tokens
        if not tokens.required:
            return ANONYMOUS
        for name, value in scope["headers"]:
            if name == b"authorization":
                return tokens.owner(value)
        return None

    async def _run(self, scope: Scope, receive: Receive, send: Send, ticket: Ticket) -> None:
        started = False

        async def note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, note)
        except ClientDisconnect:
            log.debug("%s: the client went away", scope["path"])
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("request %s %s failed", ticket.number, scope["path"].encode("ascii", "replace").decode())
            if not started:
                await internal_error(type(error).__name__).response().send(send)

    async def _refuse(self, refused: Refused, send: Send) -> None:
        self.state.refuse(refused.fields["code"])
        await refused.reply().response().send(send)
