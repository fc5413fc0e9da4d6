"""The sandbox service in a hardened container that this process starts and ends.

async with DockerSandbox("retool-sandbox", memory_mb=6144) as box:
    print((await box.exec("2**100")).stdout)

The container is the one of docker/sandbox.Dockerfile with the flags of docker/sandbox.compose.yml. It has no network at
all: it is spoken to over a Unix socket in a folder of this user's (`transport="port"`: over a port of 127.0.0.1).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from sandbox.docker_engine import Container, Engine, default_transport
from sandbox.remote import RemoteSandbox
from sandbox.types import (
    ConfinementUnavailable,
    ExecResult,
    Limits,
    SandboxError,
    SandboxUnavailable,
    Session,
    SessionOpening,
)

IMAGE = "retool-sandbox"
_POLL_S = 0.1
_MOST_RESTARTS = 5
_CALM_S = 60.0
log = logging.getLogger("retool.sandbox")


class DockerSandbox:
    """A `Sandbox` whose server runs in a container of its own, for as long as the `async with` block.

    `image`: built from docker/sandbox.Dockerfile; never pulled. `runtime`: None for the engine's default, `runsc` for
    gVisor. `memory_mb`, `cpus`: of the container, all executions together. `workers`: executions at once. `tier`:
    the one that the server must prove; by default `uid`, and with a `runtime` the strongest that holds inside.
    `start_s`: longest wait until it is ready. The other arguments are those of `RemoteSandbox`.

    A container that dies is started again, up to five times in a row; calls under way are retried there. It is removed
    at the end, at the interpreter's exit, and, where this process was killed, by the next `DockerSandbox` on this
    machine. Entering raises `ConfinementUnavailable` with the reason and the fix when there is no engine, no image, or
    no server that proves its tier.
    """

    def __init__(
        self,
        image: str = IMAGE,
        *,
        runtime: str | None = None,
        memory_mb: int = 6144,
        cpus: float | None = None,
        workers: int | None = None,
        tier: str | None = None,
        profile: str | None = None,
        limits: Limits | None = None,
        transport: Literal["auto", "socket", "port"] = "auto",
        start_s: float = 90.0,
        total_s: float = 300.0,
    ) -> None:
        if memory_mb < 256:
            raise ValueError(f"memory_mb {memory_mb}: a container of the sandbox needs 256 MiB or more")
        if cpus is not None and cpus <= 0:
            raise ValueError(f"cpus {cpus}: must be positive")
        if transport not in ("auto", "socket", "port"):
            raise ValueError(f"transport {transport!r}: choose auto, socket or port")
        self.image, self.runtime, self.memory_mb, self.cpus, self.start_s = image, runtime, memory_mb, cpus, start_s
        self.tier = tier or (None if runtime else "uid")
        self.transport = default_transport(runtime) if transport == "auto" else transport
        self.restarts = 0
        self._more = ["--workers", str(workers)] if workers else []
        self._client = {"profile": profile, "limits": limits, "total_s": total_s}
        self._token = secrets.token_hex(32)
        self._engine: Engine | None = None
        self._container: Container | None = None
        self._remote: RemoteSandbox | None = None
        self._watcher: asyncio.Task[None] | None = None

    # --- opening and closing ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Raises `ConfinementUnavailable` and other `SandboxError`s."""
        try:
            self._engine = await asyncio.to_thread(Engine)
            await asyncio.to_thread(self._engine.sweep)
            self._container = Container(self._engine, self.image, self._token, self.transport)
            atexit.register(self._container.remove)
            await self._start()
            self._remote = await self._connect()
        except BaseException:
            await asyncio.shield(self._end())
            raise
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def _start(self) -> None:
        assert self._container is not None
        tier = ["--tier", self.tier] if self.tier else []
        await asyncio.to_thread(
            self._container.start,
            command=[*tier, *self._more],
            runtime=self.runtime,
            memory_mb=self.memory_mb,
            cpus=self.cpus,
        )

    async def _connect(self) -> RemoteSandbox:
        """The client, as soon as the server proves its tier and answers."""
        container = self._container
        assert container is not None
        end = time.monotonic() + self.start_s
        while True:
            remote = RemoteSandbox(container.url, token=self._token, **self._client)  # type: ignore[arg-type]
            try:
                return await remote.__aenter__()
            except SandboxUnavailable as error:
                if container.ended.is_set():
                    raise ConfinementUnavailable(
                        f"the sandbox's container ({self.image}) ended before it was ready: {container.said()}"
                    ) from None
                if time.monotonic() > end:
                    raise SandboxUnavailable(
                        f"the sandbox's container ({self.image}) is not ready after {self.start_s:g} s: {error}; "
                        f"it said: {container.said()}"
                    ) from None
            await asyncio.sleep(_POLL_S)

    async def _watch(self) -> None:
        """Starts the container again when it dies."""
        assert self._container is not None
        recent = 0
        while True:
            started = time.monotonic()
            while not self._container.ended.is_set():  # noqa: ASYNC110 - set by a thread that reads its output
                await asyncio.sleep(_POLL_S)
            recent = 1 if time.monotonic() - started > _CALM_S else recent + 1
            said = self._container.said()
            if recent > _MOST_RESTARTS:
                log.error("the sandbox's container died %d times in a row; it said: %s", recent, said)
                return
            log.warning("the sandbox's container died and is started again; it said: %s", said)
            self.restarts += 1
            await asyncio.sleep(0.2 * (recent - 1))
            with contextlib.suppress(SandboxError):  # then it counts as dead at once, and is tried again
                await self._start()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the container and whatever runs in it. May be called twice."""
        await asyncio.shield(self._end())

    async def _end(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        if self._remote is not None:
            await self._remote.close()
        if self._container is not None:
            await asyncio.to_thread(self._container.remove)
            atexit.unregister(self._container.remove)
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)

    @property
    def remote(self) -> RemoteSandbox:
        """The client of the container's server. Raises `SandboxUnavailable` before it is open."""
        if self._remote is None:
            raise SandboxUnavailable("the sandbox is not open: use `async with DockerSandbox(...) as box`")
        return self._remote

    @property
    def container_id(self) -> str:
        """Of the container that runs now; empty before the first."""
        return self._container.id if self._container is not None else ""

    # --- the interface ------------------------------------------------------------------------------------------

    async def exec(
        self,
        code: str,
        *,
        stdin: str = "",
        limits: Limits | None = None,
        seed: int = 0,
        idempotency_key: str | None = None,
        profile: str | None = None,
        files: Mapping[str, bytes] | None = None,
        fetch: Sequence[str] = (),
        rich: bool = False,
        deadline_s: float | None = None,
    ) -> ExecResult:
        """As `Sandbox.exec`."""
        return await self.remote.exec(
            code,
            stdin=stdin,
            limits=limits,
            seed=seed,
            idempotency_key=idempotency_key,
            profile=profile,
            files=files,
            fetch=fetch,
            rich=rich,
            deadline_s=deadline_s,
        )

    def session(
        self,
        *,
        profile: str | None = None,
        limits: Limits | None = None,
        seed: int = 0,
        ttl_s: float = 600.0,
        idempotency_key: str | None = None,
    ) -> SessionOpening:
        """As `Sandbox.session`. Sessions die with the container."""
        return self.remote.session(
            profile=profile, limits=limits, seed=seed, ttl_s=ttl_s, idempotency_key=idempotency_key
        )

    async def attach(self, session_id: str) -> Session:
        """As `Sandbox.attach`."""
        return await self.remote.attach(session_id)

    async def restore(self, snapshot: str, *, count: int = 1, seeds: Sequence[int] | None = None) -> list[Session]:
        """As `Sandbox.restore`."""
        return await self.remote.restore(snapshot, count=count, seeds=seeds)

    async def drop_snapshot(self, snapshot: str) -> None:
        """As `Sandbox.drop_snapshot`."""
        await self.remote.drop_snapshot(snapshot)

    async def stats(self) -> dict[str, Any]:
        """As `RemoteSandbox.stats`, and how often the `container_restarts` were."""
        return {**await self.remote.stats(), "container_restarts": self.restarts}

    async def capabilities(self) -> dict[str, Any]:
        """As `Sandbox.capabilities`."""
        return await self.remote.capabilities()
