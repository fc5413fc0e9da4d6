"""A code interpreter for language models: isolated, typed outcomes, embedded or served.

This package stands alone: it imports nothing of the trainer and needs no torch.

    async with LocalSandbox(profile="py-math", limits=Limits(wall_s=5)) as box:
        result = await box.exec("print(2**100)")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sandbox.types import (
    ConfinementUnavailable,
    ExceptionInfo,
    ExecResult,
    FileInfo,
    Limits,
    Sandbox,
    SandboxError,
    SandboxInfraError,
    SandboxOverloaded,
    SandboxProtocolError,
    SandboxUnavailable,
    Session,
    SessionError,
    Status,
    Usage,
)

if TYPE_CHECKING:
    from sandbox.docker_box import DockerSandbox
    from sandbox.local import LocalSandbox

__all__ = [
    "ConfinementUnavailable",
    "DockerSandbox",
    "ExceptionInfo",
    "ExecResult",
    "FileInfo",
    "Limits",
    "LocalSandbox",
    "Sandbox",
    "SandboxError",
    "SandboxInfraError",
    "SandboxOverloaded",
    "SandboxProtocolError",
    "SandboxUnavailable",
    "Session",
    "SessionError",
    "Status",
    "Usage",
]


def __getattr__(name: str) -> Any:
    """The sandboxes are loaded when asked for: the sandbox's own small processes do without the clients."""
    if name == "LocalSandbox":
        from sandbox.local import LocalSandbox

        return LocalSandbox
    if name == "DockerSandbox":
        from sandbox.docker_box import DockerSandbox

        return DockerSandbox
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
