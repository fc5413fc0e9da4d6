"""The application: routes, the shape of errors, and the gate around it all."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import FastAPI
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from sandbox.server.gate import Gate
from sandbox.server.openapi import describe
from sandbox.server.replies import Refused, error_reply, internal_error
from sandbox.server.routes import ROUTES, Route
from sandbox.server.state import ServerState
from sandbox.types import SandboxError


class _Anything(Convertor[str]):
    """A rest of a path, whatever characters it has: file names may hold newlines."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("anything", _Anything())


def _endpoint(state: ServerState, route: Route) -> Any:
    async def endpoint(request: Request) -> Response:
        return await route.handler(state, request)

    functools.update_wrapper(endpoint, route.handler, assigned=("__doc__", "__name__"), updated=())
    del endpoint.__wrapped__  # type: ignore[attr-defined]
    return endpoint


def create_app(state: ServerState) -> Gate:
    """The ASGI application of one server."""
    app = FastAPI(title="retool sandbox", docs_url="/docs", redoc_url=None, openapi_url="/openapi.json")
    for route in ROUTES:
        app.router.add_route(route.path, _endpoint(state, route), [route.method], include_in_schema=False)
    app.add_exception_handler(Refused, _on_refused(state))
    app.add_exception_handler(SandboxError, _on_failure)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_mistake)
    app.openapi = functools.cache(lambda: describe(ROUTES, app.title))  # type: ignore[method-assign]
    return Gate(app, state)


def _on_refused(state: ServerState) -> Any:
    async def handler(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        state.refuse(error.fields["code"])
        return error.reply().response()

    return handler


async def _on_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, SandboxError)
    return error_reply(error).response()


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{request.method} {request.url.path[:200]}: {error.detail}; GET /docs lists what there is"
    reply = Refused(error.status_code, code, message).reply()
    return Response(reply.body, reply.status, error.headers, "application/json")


async def _on_mistake(request: Request, error: Exception) -> Response:
    return internal_error(type(error).__name__).response()
