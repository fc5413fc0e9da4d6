"""The embedded sandbox: a supervisor process of our own behind a socket pair. No Docker, no port, no service.

async with LocalSandbox(profile="py-math") as box:
    print((await box.exec("2**100")).stdout)
"""

from __future__ import annotations

import asyncio
import base64
import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from sandbox.arguments import (
    check_copies,
    check_counts,
    check_id,
    check_lease,
    check_limits,
    check_options,
    check_profile_name,
    check_program,
)
from sandbox.link import Link
from sandbox.local_session import LocalSession, made
from sandbox.profiles import AUTO, PROFILES, available
from sandbox.results import decode_error, decode_result
from sandbox.supervisor.settings import Settings
from sandbox.tiers import BY_NAME, unknown_properties
from sandbox.types import ExecResult, Limits, SandboxError, SandboxUnavailable, Session, SessionOpening


def module_paths(profiles: Sequence[str]) -> tuple[str, ...]:
    """Folders that hold the modules of the profiles, which must be installed."""
    names = {name for profile in profiles for name in PROFILES[profile].modules}
    specs = [importlib.util.find_spec(name) for name in sorted(names)]
    folders = [str(Path(spec.origin).resolve().parent.parent) for spec in specs if spec and spec.origin]
    return tuple(dict.fromkeys(folders))


def check_profile(profile: str, installed: Sequence[str]) -> None:
    """Raises `ValueError` for an unknown profile, `SandboxError` for one whose modules are missing."""
    check_profile_name(str(profile))
    if profile != AUTO and profile not in installed:
        missing = [name for name in PROFILES[profile].modules if importlib.util.find_spec(name) is None]
        raise SandboxError(f"profile {profile} needs modules that are not installed: pip install {' '.join(missing)}")


class LocalSandbox:
    """Runs Python in isolated, forked children of a warm interpreter; see `docs/sandbox.md`.

    `profile`: the warm interpreter that code runs in: `py-bare` (standard library), `py-math` (numpy and sympy
    imported), `py-data` (scipy and pandas too), or `auto`, the smallest that has what the code mentions. `limits`:
    defaults of every run. `workers`: runs at once (default 1.5 per core); the rest wait in order. `tier`: insist on one
    tier. `require`: properties that the tier must have (see `sandbox.tiers.PROPERTIES`). `allow_unconfined`: when no
    tier holds here, run without isolation instead of raising `ConfinementUnavailable`. `cgroups`: limit the memory of
    whole runs where the machine allows it. `queue`: how many may wait before `SandboxOverloaded` is raised.
    `max_sessions`, `max_snapshots`: open at once.

    One instance may be shared by any number of tasks of one event loop. A supervisor that dies raises
    `SandboxUnavailable` in the calls under way; the next call starts a fresh one.
    """

    def __init__(
        self,
        profile: str = AUTO,
        limits: Limits | None = None,
        workers: int | None = None,
        allow_unconfined: bool = False,
        tier: str | None = None,
        max_sessions: int = 512,
        max_snapshots: int = 256,
        require: Sequence[str] = (),
        cgroups: bool = True,
        queue: int = 100_000,
    ) -> None:
        installed = available()
        check_profile(profile, installed)
        check_limits(limits)
        check_counts(workers=workers, queue=queue, max_sessions=max_sessions, max_snapshots=max_snapshots)
        if problem := unknown_properties(require):
            raise ValueError(problem)
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
            module_paths=module_paths(installed),
            profiles=installed,
            max_sessions=max_sessions,
            max_snapshots=max_snapshots,
            require=tuple(require),
            cgroups=cgroups,
            queue=queue,
        )
        self.tier = ""
        self._owner = os.getpid()
        self._link: Link | None = None
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

    async def _connect(self) -> Link:
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
            link = Link(self.settings)
            try:
                hello = await link.open()
                if "error" in hello:
                    raise decode_error(hello["error"])
            except BaseException:
                await link.close()
                raise
            self.tier = hello["tier"]
            self._link = link
            return link

    async def _ask(self, message: dict[str, Any], cancel: dict[str, Any] | None = None) -> dict[str, Any]:
        link = await self._connect()
        try:
            return await link.ask(message, cancel)
        except SandboxUnavailable:
            self._lost += 1
            raise

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
        owner: str = "",
    ) -> ExecResult:
        """See `Sandbox.exec`. `owner`: callers with different ones take turns in the queue.

        What the code does is in the result; only our own failures raise (`SandboxUnavailable`, `SandboxInfraError`,
        `SandboxOverloaded`, `ConfinementUnavailable`), and `ValueError` for arguments that are none.
        """
        check_program(code, stdin, limits, files)
        check_options(seed, profile, idempotency_key, fetch, deadline_s)
        options = {"files": files, "fetch": list(fetch), "rich": rich, "owner": owner}
        return decode_result(
            await self.exec_fields(
                code,
                stdin=stdin,
                limits=limits,
                seed=seed,
                idempotency_key=idempotency_key,
                profile=profile,
                deadline_s=deadline_s,
                **options,
            )
        )

    async def exec_fields(
        self,
        code: str,
        *,
        stdin: str = "",
        limits: Limits | None = None,
        seed: int = 0,
        idempotency_key: str | None = None,
        profile: str | None = None,
        deadline_s: float | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """`exec` for a server, which has checked the arguments: the result as JSON fields (`codec.result_fields`), as
        the supervisor wrote them."""
        message: dict[str, Any] = {
            "op": "exec",
            "code": code,
            "stdin": stdin,
            "limits": vars(limits or self.limits),
            "seed": seed,
            "key": idempotency_key,
        }
        message.update({name: value for name, value in options.items() if value})
        if files := message.get("files"):
            message["files"] = {path: base64.b64encode(data).decode() for path, data in files.items()}
        if profile is not None:
            message["profile"] = profile
        if deadline_s is not None:
            message["deadline_s"] = deadline_s
        reply = await self._ask(message, None if idempotency_key is not None else {"op": "cancel"})
        return cast("dict[str, Any]", reply["result"])

    def session(
        self,
        *,
        profile: str | None = None,
        limits: Limits | None = None,
        seed: int = 0,
        ttl_s: float = 600.0,
        idempotency_key: str | None = None,
    ) -> SessionOpening:
        """See `Sandbox.session`. Raises `ValueError` for arguments that are none."""
        check_options(seed, profile, idempotency_key)
        check_limits(limits)
        check_lease(ttl_s)
        message = {
            "op": "session.open",
            "profile": profile,
            "limits": asdict(limits or self.limits),
            "seed": seed,
            "ttl_s": ttl_s,
            "key": idempotency_key,
        }
        return SessionOpening(functools.partial(self._open_session, message))

    async def _open_session(self, message: dict[str, Any]) -> Session:
        link = await self._connect()
        if message["key"] is not None:  # a cancelled caller may come back for it
            return LocalSession(link, await link.ask(message))
        return (await made(link, message))[0]

    async def attach(self, session_id: str) -> Session:
        """See `Sandbox.attach`."""
        check_id(session_id)
        link = await self._connect()
        return LocalSession(link, await link.ask({"op": "session.attach", "session": session_id}))

    async def restore(self, snapshot: str, *, count: int = 1, seeds: Sequence[int] | None = None) -> list[Session]:
        """See `Sandbox.restore`."""
        check_id(snapshot)
        plain = check_copies(count, seeds)
        link = await self._connect()
        message = {"op": "snapshot.restore", "snapshot": snapshot, "count": count, "seeds": plain}
        return list(await made(link, message))

    async def drop_snapshot(self, snapshot: str) -> None:
        """See `Sandbox.drop_snapshot`."""
        check_id(snapshot)
        await self._ask({"op": "snapshot.drop", "snapshot": snapshot})

    async def stats(self) -> dict[str, Any]:
        """Counters of the supervisor (executions, status:*, infra:*, restarts, leaked, ...) and of this client."""
        reply = await self._ask({"op": "stats"})
        own = {"supervisor_restarts": self._supervisor_restarts, "unavailable": self._lost}
        pid = self._link.process.pid if self._link else 0
        return {"executions": 0, "leaked": 0, "restarts": 0, **reply["stats"], **own, "supervisor_pid": pid}

    async def capabilities(self) -> dict[str, Any]:
        """See `Sandbox.capabilities`."""
        return dict((await self._ask({"op": "capabilities"}))["capabilities"])


async def survey(profile: str = "py-bare") -> list[dict[str, Any]]:
    """Attack every tier on this machine: rows of tier, holds, reason, needs. Raises `SandboxError`."""
    installed = available()
    paths = module_paths(installed)
    link = Link(Settings(profile=profile, profiles=installed, workers=1, survey=True, module_paths=paths))
    try:
        hello = await link.open()
        if "error" in hello:
            raise decode_error(hello["error"])
        return list(hello["survey"])
    finally:
        await link.close()
