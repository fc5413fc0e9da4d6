"""The table of endpoints: method, path, handler, what it takes, what it returns. The OpenAPI page is made from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from sandbox.server import execs, fusion, health, models, sessions
from sandbox.server.fusion_models import RunCodeRequest, RunJupyterRequest
from sandbox.server.state import ServerState

Handler = Callable[[ServerState, Request], Awaitable[Response]]
BINARY = "application/octet-stream"


@dataclass(frozen=True)
class Route:
    """`takes`: model of a JSON body, or a media type. `returns`: name of a schema, or a media type."""

    method: str
    path: str
    handler: Handler
    tag: str
    takes: type[BaseModel] | str | None = None
    returns: str = "Object"
    status: int = 200


_ONE = "/v1/sessions/{session}"
_SNAPSHOT = "/v1/snapshots/{snapshot}"

ROUTES = (
    Route("POST", "/v1/exec", execs.exec_one, "execute", models.ExecRequest, "ExecResult"),
    Route("POST", "/v1/batch", execs.exec_batch, "execute", models.BatchRequest, "application/x-ndjson"),
    Route("POST", "/v1/sessions", sessions.open_session, "sessions", models.OpenRequest, "Session", 201),
    Route("GET", _ONE, sessions.show_session, "sessions", None, "Session"),
    Route("DELETE", _ONE, sessions.close_session, "sessions"),
    Route("POST", f"{_ONE}/exec", sessions.exec_in_session, "sessions", models.SessionExecRequest, "ExecResult"),
    Route("POST", f"{_ONE}/fork", sessions.fork_session, "sessions", models.ForkRequest, "Sessions", 201),
    Route("POST", f"{_ONE}/snapshot", sessions.snapshot_session, "sessions", models.KeyRequest, "Snapshot", 201),
    Route("POST", f"{_ONE}/restore", sessions.restore_session, "sessions", models.RestoreRequest, "Session"),
    Route("POST", f"{_ONE}/interrupt", sessions.interrupt_session, "sessions"),
    Route("POST", f"{_ONE}/heartbeat", sessions.heartbeat_session, "sessions"),
    Route("GET", f"{_ONE}/files", sessions.list_files, "files", None, "Files"),
    Route("GET", f"{_ONE}/files/{{path:anything}}", sessions.read_file, "files", None, BINARY),
    Route("PUT", f"{_ONE}/files/{{path:anything}}", sessions.write_file, "files", BINARY),
    Route("POST", f"{_SNAPSHOT}/restore", sessions.restore_snapshot, "sessions", models.ForkRequest, "Sessions", 201),
    Route("DELETE", _SNAPSHOT, sessions.drop_snapshot, "sessions"),
    Route("GET", "/v1/capabilities", health.capabilities, "service"),
    Route("GET", "/v1/stats", health.stats, "service"),
    Route("GET", "/healthz", health.healthz, "service"),
    Route("GET", "/readyz", health.ready, "service"),
    Route("GET", "/metrics", health.metrics, "service", None, "text/plain"),
    Route("POST", "/run_code", fusion.run_code, "SandboxFusion", RunCodeRequest),
    Route("POST", "/run_jupyter", fusion.run_jupyter, "SandboxFusion", RunJupyterRequest),
    Route("GET", "/v1/ping", fusion.ping, "SandboxFusion", None, "Text"),
)
