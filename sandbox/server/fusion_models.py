"""Requests in the shape of ByteDance's SandboxFusion: its field names and defaults. Unknown fields are ignored, as
there; what this server cannot do is refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from sandbox.codec import decode_bytes
from sandbox.server.models import MAX_FILES, Text

SUPPORTED = ("python", "pytest", "bash")
_SECONDS = Field(gt=0, le=86_400, allow_inf_nan=False)


def _content(value: object) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("base64 text or null is expected")
    return decode_bytes(value)


def _language(value: object) -> str:
    if value not in SUPPORTED:
        raise ValueError(f"language {str(value)[:40]!r} is not supported: choose from {', '.join(SUPPORTED)}")
    return str(value)


Content = Annotated[bytes | None, PlainValidator(_content), WithJsonSchema({"type": ["string", "null"]})]
Language = Annotated[str, PlainValidator(_language), WithJsonSchema({"type": "string", "enum": list(SUPPORTED)})]


class RunCodeRequest(BaseModel):
    """`POST /run_code`."""

    model_config = ConfigDict(
        frozen=True, json_schema_extra={"examples": [{"code": "print('hello')", "language": "python"}]}
    )

    code: Text
    language: Language
    stdin: Text | None = None
    compile_timeout: Annotated[float, _SECONDS] = 10
    """Accepted; nothing here is compiled."""
    run_timeout: Annotated[float, _SECONDS] = 10
    """Seconds."""
    memory_limit_MB: Annotated[int, Field(ge=-1, le=1_048_576)] = -1
    """MiB beyond the warm interpreter; -1: the server's default."""
    files: dict[Text, Content] = Field(default_factory=dict, max_length=MAX_FILES)
    """Path -> base64; null entries are ignored."""
    fetch_files: list[Text] = Field(default_factory=list, max_length=MAX_FILES)
    args: list[Annotated[str, Field(max_length=4096)]] = Field(default_factory=list, max_length=100)
    """Additional command-line arguments of pytest."""


class RunJupyterRequest(BaseModel):
    """`POST /run_jupyter`."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [{"cells": ["a = 123", "a"]}]})

    cells: list[Text] = Field(max_length=1000)
    cell_timeout: float = Field(0, ge=0, le=86_400, allow_inf_nan=False)
    """Seconds for each cell; 0: only the total counts."""
    total_timeout: Annotated[float, _SECONDS] = 45
    """Seconds for all cells."""
    kernel: Literal["python3"] = "python3"
    files: dict[Text, Content] = Field(default_factory=dict, max_length=MAX_FILES)
    fetch_files: list[Text] = Field(default_factory=list, max_length=MAX_FILES)
