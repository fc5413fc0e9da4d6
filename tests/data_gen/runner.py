"""A small real interpreter for tests: every block runs in its own `python -I -c` process, without confinement."""

from __future__ import annotations

import asyncio
import sys
from types import TracebackType
from typing import Self

from sandbox.types import ExecResult, Limits, SandboxUnavailable, Status


class ProcessRunner:
    """`Sandbox` over subprocesses. `fail`: how many calls break first, as a dead supervisor would."""

    def __init__(self, fail: int = 0) -> None:
        self.fail = fail
        self.executed: list[str] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        return None

    async def exec(
        self,
        code: str,
        *,
        stdin: str = "",
        limits: Limits | None = None,
        seed: int = 0,
        idempotency_key: str | None = None,
    ) -> ExecResult:
        if self.fail > 0:
            self.fail -= 1
            raise SandboxUnavailable("the supervisor is gone")
        self.executed.append(code)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            "-c",
            code,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        status = Status.OK if process.returncode == 0 else Status.ERROR
        return ExecResult(status, out.decode(), err.decode(), exit_code=process.returncode)
