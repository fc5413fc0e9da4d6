"""The OpenAPI document, made from the table of routes and the models that check requests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, TypeAdapter

from sandbox.codec import SESSION_STATUS
from sandbox.server.routes import Route
from sandbox.types import ExecResult

_REF = "#/components/schemas/{model}"
_STEP = {"type": "integer", "description": "Number of its last execution."}
_SESSION = {"type": "object", "properties": {"id": {"type": "string"}, "step": _STEP, "ttl_s": {"type": "number"}}}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "retryable", "class"],
            "properties": {
                "code": {"type": "string", "examples": ["overloaded", "unavailable", *SESSION_STATUS]},
                "message": {"type": "string"},
                "retryable": {"type": "boolean"},
                "class": {"enum": ["request", "auth", "session", "overload", "infrastructure"]},
                "retry_after": {"type": "number", "description": "Seconds, where the header Retry-After is set."},
            },
        }
    },
}
_ERRORS = {
    "401": "No valid token.",
    "404": "No such session, snapshot, file or path.",
    "409": "The session cannot do this now, or the idempotency key was used for something else.",
    "410": "The session has ended.",
    "413": "Too large.",
    "431": "Request line and headers are too large.",
    "422": "Refused before it ran.",
    "429": "Overloaded: wait `Retry-After` seconds.",
    "500": "A failure of the service.",
    "503": "The service is unavailable or shutting down.",
}


def _fixed_schemas() -> dict[str, Any]:
    listing = {"type": "object", "properties": {"path": {"type": "string"}, "size": {"type": "integer"}}}
    return {
        "Object": {"type": "object"},
        "Text": {"type": "string"},
        "Error": _ERROR,
        "Session": _SESSION,
        "Sessions": {"type": "object", "properties": {"sessions": {"type": "array", "items": _SESSION}}},
        "Snapshot": {"type": "object", "properties": {"snapshot": {"type": "string"}, "step": _STEP}},
        "Files": {"type": "object", "properties": {"files": {"type": "array", "items": listing}}},
    }


def _add(schemas: dict[str, Any], name: str, schema: dict[str, Any]) -> None:
    schemas.update(schema.pop("$defs", {}))
    schemas[name] = schema


def _content(kind: str, schemas: dict[str, Any]) -> dict[str, Any]:
    if "/" in kind:
        return {kind: {"schema": {"type": "string"}}}
    return {"application/json": {"schema": {"$ref": _REF.format(model=kind)}}}


def _operation(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    name = route.handler.__name__
    text = (route.handler.__doc__ or "").strip()
    done = {"description": "Done.", "content": _content(route.returns, schemas)}
    refusals = {
        code: {
            "description": meaning,
            "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
        }
        for code, meaning in _ERRORS.items()
    }
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": text.splitlines()[0],
        "description": text,
        "tags": [route.tag],
        "responses": {str(route.status): done, **refusals},
        "parameters": [
            {"name": part, "in": "path", "required": True, "schema": {"type": "string"}}
            for part in re.findall(r"{(\w+)[:}]", route.path)
        ],
    }
    if isinstance(route.takes, str):
        operation["requestBody"] = {"required": True, "content": _content(route.takes, schemas)}
    elif route.takes is not None:
        model: type[BaseModel] = route.takes
        _add(schemas, model.__name__, model.model_json_schema(ref_template=_REF))
        content = _content(model.__name__, schemas)
        examples = schemas[model.__name__].get("examples", [])
        content["application/json"]["examples"] = {f"{n + 1}": {"value": value} for n, value in enumerate(examples)}
        operation["requestBody"] = {"required": True, "content": content}
    if isinstance(route.takes, type) and "idempotency_key" in route.takes.model_fields:
        operation["parameters"].append(
            {"name": "Idempotency-Key", "in": "header", "required": False, "schema": {"type": "string"}}
        )
    return operation


def describe(routes: Iterable[Route], title: str) -> dict[str, Any]:
    """The document."""
    schemas = _fixed_schemas()
    _add(schemas, "ExecResult", TypeAdapter(ExecResult).json_schema(ref_template=_REF, mode="serialization"))
    paths: dict[str, Any] = {}
    for route in routes:
        path = re.sub(r":\w+}", "}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": "1", "description": "A code interpreter for language models."},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }
