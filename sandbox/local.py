"""The embedded sandbox: a supervisor process of our own behind a socket pair. No Docker, no port, no service.

async with LocalSandbox(profile="py-math") as box:
    print((await box.exec("2**100")).stdout)
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sandbox.profiles import PROFILES
from sandbox.supervisor.settings import CLEAN_ENVIRONMENT, Settings
from sandbox.tiers import BY_NAME
from sandbox.types import (
    ConfinementUnavailable,
    ExceptionInfo,
    ExecResult,
    Limits,
    SandboxError,
    SandboxInfraError,
    SandboxOverloaded,
    SandboxProtocolError,
    SandboxUnavailable,
    Status,
    Usage,
)
from sandbox.wire import pack_frame, read_frame

_BOOT = Path(__file__).resolve().parent / "boot.py"
_CANARY = "RETOOL_SANDBOX_CANARY"


def module_paths(profile: str) -> tuple[str, ...]:
    """Folders that hold the profile's modules. Raises `SandboxError` when one is missing."""
    folders = []
    for name in PROFILES[profile].modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise SandboxError(f"profile {profile} needs the module {name}, which is not installed: pip install {name}")
        folders.append(str(Path(spec.origin).resolve().parent.parent))
    return tuple(dict.fromkeys(folders))


class _Link:
    """One supervisor process and the requests under way."""

    def __init__(self, settings: Settings) -> None:
        self.folder = tempfile.mkdtemp(prefix="retool-sandbox-")
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        if os.geteuid() == 0:
            Path(self.folder).chmod(0o711)  # runs with a user id of their own must reach their work folders
        values = {**settings.__dict__, "work_root": self.folder, "client_fd": far.fileno(), "client_pid": os.getpid()}
        self.log = Path(self.folder, "supervisor.log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-P", str(_BOOT), "supervisor", Settings(**values).to_json()],
                env={**CLEAN_ENVIRONMENT, _CANARY: secrets.token_hex(16)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(far.fileno(),),
                cwd="/",
                start_new_session=True,
            )
        far.close()
        self.near = near
        self.pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.dead = False
        self._reading: asyncio.Task[None] | None = None

    async def open(self) -> dict[str, Any]:
        """Wait for the supervisor's first words."""
        reader, self.writer = await asyncio.open_connection(sock=self.near)
        hello: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.pending[0] = hello
        self._reading = asyncio.create_task(self._read(reader))
        return await hello

    async def _read(self, reader: asyncio.StreamReader) -> None:
        reason = "the sandbox supervisor died"
        try:
            while (message := await read_frame(reader)) is not None:
                future = self.pending.pop(int(message["id"]), None)
                if future is not None and not future.done():
                    future.set_result(message)
        except SandboxProtocolError as error:
            reason = str(error)
        finally:
            self.dead = True
            for future in self.pending.values():
                if not future.done():
                    future.set_exception(SandboxUnavailable(reason + self._last_words()))
            self.pending.clear()

    def _last_words(self) -> str:
        try:
            text = self.log.read_text(errors="replace").strip()
        except OSError:
            return ""
        return f": {text[-2000:]}" if text else ""

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message for the supervisor."""
        self.writer.write(pack_frame(message))

    async def close(self) -> None:
        """Hang up and wait until the supervisor, and with it everything it started, has ended."""
        self.dead = True
        if hasattr(self, "writer"):
            self.writer.close()
        else:
            self.near.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        try:
            await asyncio.to_thread(self.process.wait, 15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        shutil.rmtree(self.folder, ignore_errors=True)


class LocalSandbox:
    """Runs Python in isolated, forked children of a warm interpreter; see `docs/sandbox.md`.

    `profile`: `py-math` (numpy and sympy imported) or `py-bare`. `limits`: defaults of every run. `workers`: runs at
    once (default 1.5 per core); the rest wait in order. `tier`: insist on one tier. `allow_unconfined`: when no tier
    holds here, run without isolation instead of raising `ConfinementUnavailable`.

    One instance may be shared by any number of tasks of one event loop. A supervisor that dies raises
    `SandboxUnavailable` in the calls under way; the next call starts a fresh one.
    """

    def __init__(
        self,
        profile: str = "py-math",
        limits: Limits | None = None,
        workers: int | None = None,
        allow_unconfined: bool = False,
        tier: str | None = None,
    ) -> None:
        if profile not in PROFILES:
            raise ValueError(f"unknown profile {profile!r}: choose from {', '.join(PROFILES)}")
        if tier is not None and tier not in BY_NAME:
            raise ValueError(f"unknown tier {tier!r}: choose from {', '.join(BY_NAME)}")
        cores = len(os.sched_getaffinity(0))
        self.limits = limits or Limits()
        self.settings = Settings(
            profile=profile,
            workers=workers or max(1, round(1.5 * cores)),
            tier=tier or "",
            allow_unconfined=allow_unconfined,
            limits=self.limits,
            module_paths=module_paths(profile),
        )
        self.tier = ""
        self._owner = os.getpid()
        self._ids = itertools.count(1)
        self._link: _Link | None = None
        self._opened = False
        self._starting = asyncio.Lock()
        self._supervisor_restarts = 0
        self._lost = 0

    async def __aenter__(self) -> Self:
        self._opened = True
        await self._connect()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the supervisor and everything it runs. May be called twice."""
        self._opened = False
        link, self._link = self._link, None
        if link is not None and os.getpid() == self._owner:
            await link.close()

    async def _connect(self) -> _Link:
        if os.getpid() != self._owner:
            raise SandboxUnavailable("this sandbox belongs to the process that opened it; open another after a fork")
        if not self._opened:
            raise SandboxUnavailable("the sandbox is not open: use `async with LocalSandbox(...) as box`")
        async with self._starting:
            if self._link is not None and not self._link.dead:
                return self._link
            if self._link is not None:
                self._supervisor_restarts += 1
                await self._link.close()
                self._link = None
            link = _Link(self.settings)
            try:
                hello = await link.open()
                if "error" in hello:
                    raise _error(hello["error"])
            except BaseException:
                await link.close()
                raise
            self.tier = hello["tier"]
            self._link = link
            return link

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        link = await self._connect()
        ident = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        link.pending[ident] = future
        try:
            link.send({"id": ident, **message})
            return await future
        except asyncio.CancelledError:
            if not link.dead and message.get("key") is None:
                link.send({"id": next(self._ids), "op": "cancel", "target": ident})
            raise
        finally:
            link.pending.pop(ident, None)

    async def exec(
        self,
        code: str,
        *,
        stdin: str = "",
        limits: Limits | None = None,
        seed: int = 0,
        idempotency_key: str | None = None,
    ) -> ExecResult:
        """Run `code` in a fresh interpreter. What the code does is in the result; only our own failures raise
        (`SandboxUnavailable`, `SandboxInfraError`, `SandboxOverloaded`, `ConfinementUnavailable`)."""
        message = {
            "op": "exec",
            "code": code,
            "stdin": stdin,
            "limits": asdict(limits or self.limits),
            "seed": seed,
            "key": idempotency_key,
        }
        try:
            reply = await self._ask(message)
        except SandboxUnavailable:
            self._lost += 1
            raise
        if "error" in reply:
            raise _error(reply["error"])
        return _result(reply["result"])

    async def stats(self) -> dict[str, Any]:
        """Counters of the supervisor (executions, status:*, infra:*, restarts, leaked, ...) and of this client."""
        reply = await self._ask({"op": "stats"})
        own = {"supervisor_restarts": self._supervisor_restarts, "unavailable": self._lost}
        pid = self._link.process.pid if self._link else 0
        return {"executions": 0, "leaked": 0, "restarts": 0, **reply["stats"], **own, "supervisor_pid": pid}


_ERRORS: dict[str, type[SandboxError]] = {
    error.__name__: error for error in (ConfinementUnavailable, SandboxUnavailable, SandboxProtocolError)
}


def _error(fields: dict[str, Any]) -> SandboxError:
    message = str(fields["message"])
    if fields["kind"] == SandboxOverloaded.__name__:
        return SandboxOverloaded(message, float(fields["retry_after"]))
    if fields["kind"] in _ERRORS:
        return _ERRORS[fields["kind"]](message)
    return SandboxInfraError(message, str(fields["code"]), bool(fields["retryable"]))


def _result(fields: dict[str, Any]) -> ExecResult:
    exception = fields.pop("exception")
    return ExecResult(
        **{
            **fields,
            "status": Status(fields["status"]),
            "usage": Usage(**fields["usage"]),
            "exception": ExceptionInfo(**exception) if exception else None,
        }
    )


async def survey(profile: str = "py-bare") -> list[dict[str, Any]]:
    """Attack every tier on this machine: rows of tier, holds, reason, needs. Raises `SandboxError`."""
    link = _Link(Settings(profile=profile, workers=1, survey=True, module_paths=module_paths(profile)))
    try:
        hello = await link.open()
        if "error" in hello:
            raise _error(hello["error"])
        return list(hello["survey"])
    finally:
        await link.close()
