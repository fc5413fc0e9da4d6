"""What requests look like. Checked strictly: an unknown field or a number in quotes is refused, not guessed at."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from sandbox.codec import decode_bytes
from sandbox.types import Limits

MAX_ITEMS = 1000
"""Executions in one batch."""
MAX_FILES = 1000
_OUTPUT = 2 * 1024 * 1024
_SEED = 2**63


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string is expected")
    return value


def _bytes(value: Any) -> bytes:
    return decode_bytes(_text(value))


Text = Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string"})]
"""Any string, lone surrogates included: whether code is text is for the sandbox to say."""
Base64 = Annotated[
    bytes, PlainValidator(_bytes), WithJsonSchema({"type": "string", "contentEncoding": "base64", "examples": ["aGk="]})
]
Key = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[\x21-\x7e]+$")]
Seed = Annotated[int, Field(ge=-_SEED, lt=_SEED)]


class Strict(BaseModel):
    """Base: nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LimitsModel(Strict):
    """Overrides of the server's default limits; seconds, MiB and bytes as named."""

    wall_s: float | None = Field(None, gt=0, le=86_400, allow_inf_nan=False)
    cpu_s: float | None = Field(None, gt=0, le=86_400, allow_inf_nan=False)
    memory_mb: int | None = Field(None, ge=16, le=1_048_576)
    processes: int | None = Field(None, ge=1, le=4096)
    file_mb: int | None = Field(None, ge=0, le=65_536)
    output_head_bytes: int | None = Field(None, ge=0, le=_OUTPUT)
    output_tail_bytes: int | None = Field(None, ge=0, le=_OUTPUT)
    output_kill_bytes: int | None = Field(None, ge=1, le=64 * 1024 * 1024)
    code_bytes: int | None = Field(None, ge=0, le=16 * 1024 * 1024)

    def over(self, defaults: Limits) -> Limits:
        """The defaults with these laid over."""
        return replace(defaults, **self.model_dump(exclude_none=True))


class ExecRequest(Strict):
    """One execution in a fresh interpreter."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"code": "print(2**100)"}, {"code": "print(input())", "stdin": "hi"}]}
    )

    code: Text
    """Python source."""
    stdin: Text = ""
    files: dict[Text, Base64] = Field(default_factory=dict, max_length=MAX_FILES)
    """Put into the work folder first: relative path -> base64."""
    fetch: list[Text] = Field(default_factory=list, max_length=MAX_FILES)
    """Paths to bring back in `files`."""
    limits: LimitsModel | None = None
    profile: Annotated[str, Field(max_length=64)] | None = None
    """Warm interpreter; `GET /v1/capabilities` lists them."""
    seed: Seed = 0
    """Of `random` and `numpy.random`."""
    rich: bool = False
    """Show the last expression in `display` instead of on standard output."""
    idempotency_key: Key | None = None
    """A retry with the same key never runs twice. The header `Idempotency-Key` does the same."""
    deadline_ms: float | None = Field(None, gt=0, le=86_400_000, allow_inf_nan=False)
    """Refuse (429) rather than let it wait longer than this in the queue."""


class BatchRequest(Strict):
    """Many executions; results are streamed as they finish."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [{"code": "print(1)"}, {"code": "print(2)"}]}]})

    items: list[Any] = Field(min_length=1, max_length=MAX_ITEMS, json_schema_extra={"items": {"type": "object"}})
    """Each as for `POST /v1/exec`; a malformed one fails alone."""


class OpenRequest(Strict):
    """A session: an interpreter that keeps its state."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"seed": 1, "ttl_s": 600}]})

    profile: Annotated[str, Field(max_length=64)] | None = None
    limits: LimitsModel | None = None
    seed: Seed = 0
    ttl_s: float = Field(600.0, gt=0, le=86_400, allow_inf_nan=False)
    """Seconds without a call after which it is ended."""
    idempotency_key: Key | None = None


class SessionExecRequest(Strict):
    """One execution in a session."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"code": "x = 41", "expect_step": 1}, {"code": "x + 1"}]})

    code: Text
    stdin: Text = ""
    limits: LimitsModel | None = None
    expect_step: int | None = Field(None, ge=1, lt=2**53)
    """The number this execution must get; a repeat of a finished step returns its stored result."""
    rich: bool = False
    idempotency_key: Key | None = None


class ForkRequest(Strict):
    """Live copies."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"count": 4, "seeds": [1, 2, 3, 4]}]})

    count: int = Field(1, ge=1, le=256)
    seeds: list[Seed] | None = Field(None, max_length=256)
    idempotency_key: Key | None = None


class RestoreRequest(Strict):
    """Roll back to a snapshot."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"snapshot": "0123456789abcdef0123456789abcdef"}]})

    snapshot: Annotated[str, Field(max_length=128)]
    idempotency_key: Key | None = None


class KeyRequest(Strict):
    """Nothing but, perhaps, an idempotency key."""

    idempotency_key: Key | None = None
