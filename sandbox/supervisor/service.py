"""The service behind every transport: picks the tier, admits requests, runs them, keeps the counters."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import resource
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandbox import paths
from sandbox.codec import result_fields
from sandbox.profiles import AUTO
from sandbox.results import encode_error
from sandbox.supervisor import cgroups, folders
from sandbox.supervisor.admission import Admission as Slots
from sandbox.supervisor.cgroups import Groups
from sandbox.supervisor.idempotency import IdempotencyStore, content
from sandbox.supervisor.outcome import digest
from sandbox.supervisor.pool import Pool, uids_needed
from sandbox.supervisor.pools import Pools
from sandbox.supervisor.probe import Probe, attempt
from sandbox.supervisor.run import Job, Run
from sandbox.supervisor.sessions import Sessions
from sandbox.supervisor.sessions_live import Admission, Request
from sandbox.supervisor.sessions_wire import SessionRequests
from sandbox.supervisor.settings import Settings
from sandbox.supervisor.unit import Child, Unit
from sandbox.tiers import BY_NAME, NONE, TIERS, Tier, lacking
from sandbox.types import (
    ConfinementUnavailable,
    ExecResult,
    Limits,
    SandboxError,
    SandboxInfraError,
    Status,
)

STDIN_BYTES = 16 * 1024 * 1024
"""Largest standard input of one run."""
FILES_NEEDED = 1024
"""Open files that a supervisor must be allowed: children are handed theirs as numbers above 512."""
_UID_BLOCK, _UID_BLOCKS = 512, 60
_UNCONFINED = "allow_unconfined=True (`serve`: --allow-unconfined)"


def reserve_uids(count: int) -> tuple[int, list[socket.socket]]:
    """The first of enough user ids that nobody else of us uses here, and the locks that say so; (0, []) without root.

    Two supervisors must not share ids: one kills everything that runs as an id it thinks is its own.
    """
    if os.geteuid() != 0:
        return 0, []
    mapped = sum(int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text().splitlines())
    start = 2_000_000 if mapped > 2_200_000 else 30_000
    if mapped > 2_000_000_000:
        # Another container's locks are not seen from here, but its processes count against the same ids' limits.
        start += secrets.randbelow(60_000) * _UID_BLOCKS * _UID_BLOCK
    wanted = count // _UID_BLOCK + 1
    locks: list[socket.socket] = []
    for block in range(_UID_BLOCKS):
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            lock.bind(f"\0retool-sandbox-uids-{start + block * _UID_BLOCK}")
            locks.append(lock)
        except OSError:
            for held in (lock, *locks):
                held.close()
            locks = []
        if len(locks) == wanted:
            return start + (block + 1 - wanted) * _UID_BLOCK, locks
    for held in locks:
        held.close()
    raise ConfinementUnavailable("no free user ids: too many sandboxes of root on this machine (or too many workers)")


class Service:
    """`await start()`, then any number of concurrent `execute` calls, then `await close()`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self.uid_base = 0
        self._uid_locks: list[socket.socket] = []
        self._slots = Slots(settings.workers, settings.queue)
        self._running: dict[int, Run] = {}
        self._cleaning: set[asyncio.Task[None]] = set()
        self._groups: Groups | None = None
        self._idempotency = IdempotencyStore()
        self._pools: Pools | None = None
        self.sessions = Sessions(
            self._lend,
            Admission(self._slots, self._count),
            self.counts,
            settings.max_sessions,
            settings.max_snapshots,
        )
        self.session_requests = SessionRequests(self.sessions, _refusal)

    def _count(self, name: str) -> None:
        self.counts[name] += 1

    async def _lend(self, profile: str) -> tuple[Unit, Child, Callable[[bool], None]]:
        """A ready child for a session; what is returned with it takes it back."""
        assert self._pools is not None
        pool, unit, child = await self._pools.take(self._pools.session_name(profile or None))
        pool.refill()

        def give_back(clean: bool) -> None:
            pool.recycle(unit, child, clean=clean)

        return unit, child, give_back

    def cancel_session(self, ident: str, target: int) -> None:
        """Whoever asked for an execution in a session, by message `target`, has gone away."""
        with contextlib.suppress(SandboxError):
            self.sessions.find(ident).cancel(target)

    @property
    def tier(self) -> str:
        """Name of the tier in use."""
        return self._pools.tier.name if self._pools else ""

    def _candidates(self) -> list[Tier]:
        name, allowed = self.settings.tier, self.settings.allow_unconfined
        if name == NONE.name and not allowed:
            raise ConfinementUnavailable(f"tier 'none' confines nothing: it also needs {_UNCONFINED}")
        if name:
            return [BY_NAME[name]]
        return [*TIERS, *([NONE] if allowed else [])]

    def _first_settings(self) -> Settings:
        """Of the pool that is attacked: the default profile's."""
        profile = self.settings.profile
        return replace(self.settings, profile=self.settings.profiles[0] if profile == AUTO else profile)

    def _reserve(self) -> None:
        """What this process needs before anything can be tried. Raises `ConfinementUnavailable` with the fix."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if 0 <= files < FILES_NEEDED:
            raise ConfinementUnavailable(
                f"this process may have {files} files open (`ulimit -Hn`); the sandbox needs {FILES_NEEDED}, and six "
                "for each session. Raise the limit, in a container with --ulimit nofile=65536."
            )
        ids = uids_needed(self.settings) * len(self.settings.profiles)
        self.uid_base, self._uid_locks = reserve_uids(ids)

    async def start(self) -> None:
        """Take the strongest tier that holds. Raises `ConfinementUnavailable` with what failed and the fix."""
        self._reserve()
        failures = []
        if self.settings.cgroups:
            self._groups = cgroups.find()
        with Probe(self.settings) as probe:
            first = self._first_settings()
            for tier in self._candidates():
                if lack := lacking(tier, self.settings.require, self._groups is not None):
                    failures.append(f"  {tier.name}: {lack}")
                    continue
                pool = Pool(first, tier, self.uid_base, self.counts, self._groups)
                try:
                    reason = await attempt(probe, pool) if tier is not NONE else await _starts(pool)
                except BaseException:
                    await pool.close()
                    raise
                if not reason:
                    self._pools = Pools(self.settings, pool, self.counts, self.uid_base)
                    self._pools.warm()
                    return
                await pool.close()
                failures.append(f"  {tier.name}: {reason}\n    needs {tier.needs}")
        if folders.full(self.settings.work_root):
            where = Path(self.settings.work_root).parent
            raise SandboxInfraError(f"the disk of {where} is full: make room, or set TMPDIR", "disk_full")
        raise ConfinementUnavailable(
            f"no isolation tier {'gives what is required' if self.settings.require else 'holds'} on this machine:\n"
            + "\n".join(failures)
            + f"\nFix one of these{self._way_out()}."
        )

    def _way_out(self) -> str:
        """What else helps when no tier holds."""
        if self.settings.tier or self.settings.require:
            return ", or ask for less"
        if self.settings.allow_unconfined:
            return ""
        return f", or pass {_UNCONFINED} to run code you trust without isolation"

    async def survey(self) -> list[dict[str, Any]]:
        """Every tier, whether it holds here, and why not. Raises `ConfinementUnavailable` when none can be tried."""
        self._reserve()
        rows = []
        with Probe(self.settings) as probe:
            for tier in TIERS:
                pool = Pool(self.settings, tier, self.uid_base, self.counts)
                try:
                    reason = await attempt(probe, pool)
                finally:
                    await pool.close()
                rows.append({"tier": tier.name, "holds": not reason, "reason": reason, "needs": tier.needs})
        return rows

    async def execute(self, request: dict[str, Any], handle: int) -> dict[str, Any]:
        """Run one request; the reply holds `result` or `error`. `handle` names it for `cancel`."""
        key = request.get("key")
        if key is None:
            return (await self._execute(request, handle))[0]
        asked = content(request)
        try:
            earlier = self._idempotency.find(key, asked)
        except SandboxInfraError as conflict:
            return error_reply(conflict)
        if earlier is not None:
            self.counts["idempotent_hits"] += 1
            return await asyncio.shield(earlier)
        self._idempotency.begin(key, asked)
        reply: dict[str, Any] = error_reply(SandboxInfraError("the request was dropped", "shutdown"))
        size = 0
        try:
            reply, size = await self._execute(request, handle)
        finally:
            self._idempotency.finish(key, reply, size, keep="result" in reply)
        return reply

    async def _execute(self, request: dict[str, Any], handle: int) -> tuple[dict[str, Any], int]:
        try:
            result = await self._admit(request, handle)
        except SandboxError as error:
            self.counts["infra_errors"] += 1
            self.counts[f"infra:{error.code}"] += 1
            return error_reply(error), 0
        self.counts["executions"] += 1
        self.counts[f"status:{result.status.value}"] += 1
        size = len(result.stdout) + len(result.stderr) + sum(len(data) for data in result.files.values()) + 1024
        size += sum(len(text) for shown in result.display for text in shown.values())
        return {"result": result_fields(result)}, size

    async def _admit(self, request: dict[str, Any], handle: int) -> ExecResult:
        limits = Limits(**request["limits"])
        files = {path: base64.b64decode(data) for path, data in (request.get("files") or {}).items()}
        fetch = tuple(dict.fromkeys(request.get("fetch") or ()))
        job = Job(request["code"], request["stdin"], request["seed"], limits, files, fetch, bool(request.get("rich")))
        refused = _refusal(job) or _refused_files(job)
        if refused:
            inputs = (job.code, job.stdin, str(job.seed), self.settings.profile, Status.REJECTED.value)
            return ExecResult(Status.REJECTED, stderr=refused, digest=digest(*inputs), isolation=self.tier)
        queued = time.monotonic()
        await self._slots.acquire(request.get("owner", ""), request.get("deadline_s"))
        started = time.monotonic()
        try:
            assert self._pools is not None
            pool, unit, child = await self._pools.take(self._pools.name(request.get("profile"), job.code))
        except BaseException:
            self._slots.release()
            raise
        run = Run(unit, child, job)
        self._running[handle] = run
        result = None
        try:
            result = await run.execute(1e3 * (time.monotonic() - queued))
            return result
        finally:
            del self._running[handle]
            task = asyncio.get_running_loop().create_task(self._clean(pool, run, started))
            self._cleaning.add(task)
            task.add_done_callback(self._cleaning.discard)
            # At a limit nobody is in a hurry, whoever set it wants to see it kept, and there is much to clean: the
            # caller's next run shall not take a neighbour's slot meanwhile.
            if run.killed or (result is not None and result.status is Status.MEMORY_LIMIT):
                await asyncio.shield(task)

    async def _clean(self, pool: Pool, run: Run, started: float) -> None:
        """Nothing of the run stays alive, and only then its slot is free. An ordinary answer does not wait for that."""
        clean = False
        try:
            clean = await run.clean()
        finally:
            pool.recycle(run.unit, run.child, clean=clean)
            pool.refill()
            self._slots.release()
            self._slots.took(time.monotonic() - started)

    def cancel(self, handle: int) -> bool:
        """End a running request; False when it is not running."""
        run = self._running.get(handle)
        if run is not None:
            run.cancel()
        return run is not None

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what is going on now."""
        return {
            **self.counts,
            "tier": self.tier,
            "workers": self.settings.workers,
            "running": len(self._running),
            "waiting": self._slots.waiting,
            **self.sessions.stats(),
            **(self._pools.describe() if self._pools else {}),
        }

    def capabilities(self) -> dict[str, Any]:
        """What this sandbox can do."""
        tier = BY_NAME[self.tier]
        return {
            "tier": tier.name,
            "profiles": list(self.settings.profiles),
            "profile": self.settings.profile,
            "fork": not tier.deny_fork,
            "properties": [*tier.properties, *(["total_memory"] if self._groups else [])],
            "cgroup": self._groups.driver.name if self._groups else "none",
            "limits": self.settings.limits.__dict__,
            "workers": self.settings.workers,
            "max_sessions": self.settings.max_sessions,
            "max_snapshots": self.settings.max_snapshots,
        }

    async def close(self) -> None:
        """End every run and the warm unit."""
        await self.sessions.close_all()
        await asyncio.gather(*self._cleaning, return_exceptions=True)
        if self._pools is not None:
            await self._pools.close()
        if self._groups is not None:
            self._groups.close()
        for lock in self._uid_locks:
            lock.close()


def _refusal(job: Job | Request) -> str:
    try:
        code, stdin = job.code.encode(), job.stdin.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        return f"not text: {error.reason} at character {error.start}"
    if len(code) > job.limits.code_bytes:
        return f"code of {len(code)} bytes exceeds the limit of {job.limits.code_bytes}"
    if len(stdin) > STDIN_BYTES:
        return f"standard input of {len(stdin)} bytes exceeds the limit of {STDIN_BYTES}"
    return ""


def _refused_files(job: Job) -> str:
    if reason := paths.refusals(job.files) or paths.refusals(job.fetch):
        return reason
    size = sum(len(data) for data in job.files.values())
    return f"files of {size} bytes exceed the limit of {paths.MAX_BYTES}" if size > paths.MAX_BYTES else ""


async def _starts(pool: Pool) -> str:
    try:
        await pool.unit()
    except SandboxInfraError as error:
        return str(error)
    return ""


def error_reply(error: SandboxError) -> dict[str, Any]:
    """An infrastructure failure as a reply."""
    return {"error": encode_error(error)}
