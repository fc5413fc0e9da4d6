"""The application: routes, the shape of errors, and the gate around it all."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import FastAPI
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

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
        try:
            return await route.handler(state, request)
        except Refused as refused:
            state.refuse(refused.fields["code"])
            return refused.reply().response()
        except SandboxError as error:
            return error_reply(error).response()

    functools.update_wrapper(endpoint, route.handler, assigned=("__doc__", "__name__"), updated=())
    del endpoint.__wrapped__  # type: ignore[attr-defined]
    return endpoint


class _Shortcut:
    """Calls endpoints itself where one look finds them: most requests save the way through routing and middleware.

    That is paths without parameters, and those whose only one is the third piece, such as a session's id.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._endpoints: dict[tuple[str, str], Any] = {}
        self._with_name: dict[tuple[str, str, str], tuple[Any, str]] = {}

    def add(self, method: str, path: str, endpoint: Any) -> None:
        """A path that starts with `/`, in FastAPI's notation."""
        kind, brace, rest = path.partition("{")
        name, _, verb = rest.partition("}")
        if not brace:
            self._endpoints[method, path] = endpoint
        elif kind.count("/") == 3 and "{" not in verb:
            self._with_name[method, kind, verb] = endpoint, name

    def _find(self, scope: Scope) -> Any:
        method, path = scope["method"], scope["path"]
        endpoint = self._endpoints.get((method, path))
        if endpoint is not None:
            return endpoint
        pieces = path.split("/", 4)  # "", "v1", "sessions", id, verb
        if len(pieces) < 4 or not pieces[3]:
            return None
        verb = f"/{pieces[4]}" if len(pieces) == 5 else ""
        found = self._with_name.get((method, f"/{pieces[1]}/{pieces[2]}/", verb))
        if found is None:
            return None
        endpoint, name = found
        scope["path_params"] = {name: pieces[3]}
        return endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._find(scope)
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def create_app(state: ServerState) -> Gate:
    """The ASGI application of one server."""
    app = FastAPI(
        title="retool sandbox", docs_url="/docs", redoc_url=None, openapi_url="/openapi.json", redirect_slashes=False
    )
    shortcut = _Shortcut(app)
    for route in ROUTES:
        endpoint = _endpoint(state, route)
        app.router.add_route(route.path, endpoint, [route.method], include_in_schema=False)
        shortcut.add(route.method, route.path, endpoint)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_mistake)
    app.openapi = functools.cache(lambda: describe(ROUTES, app.title))  # type: ignore[method-assign]
    return Gate(shortcut, state)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{request.method} {request.url.path[:200]}: {error.detail}; GET /openapi.json lists what there is"
    reply = Refused(error.status_code, code, message).reply()
    return Response(reply.body, reply.status, error.headers, "application/json")


async def _on_mistake(request: Request, error: Exception) -> Response:
    return internal_error(type(error).__name__).response()
