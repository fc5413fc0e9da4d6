"""All sessions and snapshots of a supervisor: opened, found, copied, rolled back, and ended when nobody wants them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sandbox.supervisor.cores import pid_of
from sandbox.supervisor.outcome import digest
from sandbox.supervisor.run import neighbours
from sandbox.supervisor.sessions_fork import MAX_DEPTH, copy, raise_error
from sandbox.supervisor.sessions_interpreter import Interpreter
from sandbox.supervisor.sessions_live import Admission, LiveSession, Past, Reply, Request
from sandbox.supervisor.sessions_tree import MAX_MEMBERS, Tree
from sandbox.supervisor.unit import Child, Unit
from sandbox.types import ExecResult, Limits, SandboxError, SandboxInfraError, SessionError, Status
from sandbox.worker import channel
from sandbox.worker.runner import JOB_HEADER

Take = Callable[[str], Awaitable[tuple[Unit, Child, Callable[[bool], None]]]]
"""A ready child of a profile, and what to call when it and all its copies have ended (with whether it is clean)."""
COMMAND_S = 20.0
SWEEP_S = 0.25
SNAPSHOT_TTL_S = 3600.0
_TOMBSTONES = 2048
TOMBSTONE_S = 60.0
"""So long, at least, a session that has ended by itself says why, and hands out its last results."""
_MAX_TTL_S = 7 * 86400.0


@dataclass(eq=False)
class Snapshot:
    """A sleeping copy. What a session restored from it starts with."""

    id: str
    tree: Tree
    interpreter: Interpreter
    seed: int
    step: int
    past: Past
    depth: int
    ttl_s: float
    forks: int = 0
    expires: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while it is copied: one copy at a time."""


def derive(seed: int, index: int) -> int:
    """The seed of copy `index` of something that has `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big")


class Sessions:
    """The registry. Every method may raise `SessionError` and other `SandboxError`s."""

    def __init__(
        self, take: Take, admission: Admission, counts: Counter[str], max_sessions: int, max_snapshots: int
    ) -> None:
        self.max_sessions, self.max_snapshots = max_sessions, max_snapshots
        self._take, self._admission, self._counts = take, admission, counts
        self._live: dict[str, LiveSession] = {}
        self._ended: OrderedDict[str, LiveSession] = OrderedDict()
        self._snapshots: OrderedDict[str, Snapshot] = OrderedDict()  # least recently used first
        self._gone: OrderedDict[str, str] = OrderedDict()  # snapshots that were evicted, and why
        self._opening = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sweeper: asyncio.Task[None] | None = None

    # --- opening and finding --------------------------------------------------------------------------------------

    def _reserve(self, count: int) -> None:
        """Room for `count` more sessions. The caller subtracts it from `_opening` again."""
        if len(self._live) + self._opening + count > self.max_sessions:
            raise SessionError(
                f"{len(self._live)} of {self.max_sessions} sessions are open: close some, or raise max_sessions",
                "too_many",
            )
        self._opening += count

    async def open(self, limits: Limits, seed: int, ttl_s: float, profile: str = "") -> LiveSession:
        """A fresh session."""
        self._reserve(1)
        try:
            unit, child, give_back = await self._take(profile)
            try:
                pid = pid_of(child.process)
                tree = Tree(unit, child, pid, limits, give_back)
            except OSError:
                await unit.destroy(child)
                give_back(True)
                raise SandboxInfraError("the ready child had ended", "lost_child") from None
            interpreter = Interpreter(child, pid)
            tree.add(interpreter)
            self._begin(interpreter, tree, seed)
            session = LiveSession(secrets.token_hex(16), tree, interpreter, seed, self._admission)
            return self._admit(session, ttl_s)
        finally:
            self._opening -= 1

    def _begin(self, interpreter: Interpreter, tree: Tree, seed: int) -> None:
        """Send the job that makes the child a session."""
        limits, unit = tree.limits, tree.unit
        settings = {
            "mode": "session",
            "memory_mb": limits.memory_mb,
            "processes": limits.processes + neighbours(unit),
            "file_mb": limits.file_mb,
            "branches": 0 if unit.tier.deny_fork else MAX_MEMBERS,
            "frozen": tree.allow(interpreter),
            "seed": seed,
            "stdin_size": 0,
        }
        head = json.dumps(settings).encode()
        interpreter.send_job(JOB_HEADER.pack(len(head), 0) + head)

    def _admit(self, session: LiveSession, ttl_s: float) -> LiveSession:
        session.ttl_s = ttl_s
        session.renew()
        session.on_end = self._bury
        if session.ended or session.interpreter.child.exited.done():
            session.end("its process has ended")
            self._spawn(session.tree.release(session.interpreter))
            if session.depth:  # a copy: its own code may have done that
                raise SessionError("the copy ended at once", "fork_unsafe")
            raise SandboxInfraError("the new session's process ended at once", "lost_child")
        self._live[session.id] = session
        self._counts["sessions_opened"] += 1
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().create_task(self._sweep())
        return session

    def find(self, ident: str) -> LiveSession:
        """A session that is open or has ended by itself; its lease is renewed."""
        session = self._live.get(ident) or self._ended.get(ident)
        if session is None:
            raise SessionError("there is no such session: it was never opened, or it was closed", "no_session")
        session.renew()
        return session

    # --- executions and commands ----------------------------------------------------------------------------------

    def execute(self, ident: str, request: Request, expect: int | None, reply: Callable[[Reply], None]) -> None:
        """See `LiveSession.execute`."""
        self.find(ident).execute(request, expect, reply)

    def refuse(self, ident: str, request: Request, reason: str) -> ExecResult:
        """The result of code that is not run; it is no step."""
        session = self.find(ident)
        session.check()
        unit = session.tree.unit
        profile = unit.settings.profile
        inputs = (request.code, request.stdin, str(session.seed), profile, Status.REJECTED.value)
        return ExecResult(
            Status.REJECTED,
            stderr=reason,
            digest=digest(*inputs),
            isolation=unit.tier.name,
            profile=profile,
            step=session.step,
        )

    async def command(
        self, session: LiveSession, kind: bytes, fields: dict[str, Any], data: bytes = b"", cap: int = 0
    ) -> tuple[dict[str, Any], bytes]:
        """Have an idle session do something that is not user code."""
        session.claim()
        try:
            async with asyncio.timeout(COMMAND_S):
                answer, body = await session.interpreter.ask(kind, fields, data, cap)
        except TimeoutError:
            self._end(session, "it did not answer")
            raise SessionError("the session has ended: it did not answer", "session_ended") from None
        finally:
            session.claimed = False
        raise_error(answer)
        return answer, body

    # --- copies ---------------------------------------------------------------------------------------------------

    async def fork(self, session: LiveSession, count: int, seeds: Sequence[int] | None) -> list[LiveSession]:
        """`count` live copies."""
        self._can_copy(session.tree, session.depth + 1, count)
        session.claim()
        try:
            return await self._multiply(session, count, seeds, session.limits, session.ttl_s)
        finally:
            session.claimed = False

    def _can_copy(self, tree: Tree, depth: int, count: int) -> None:
        if tree.unit.tier.deny_fork:
            raise SessionError(
                f"tier {tree.unit.tier.name} forbids new processes: sessions cannot fork", "fork_unsupported"
            )
        if depth > MAX_DEPTH:
            raise SessionError(
                f"copies of copies go {MAX_DEPTH} deep (the kernel stacks 16 Landlock layers)", "fork_unsafe"
            )
        if len(tree.members) + count > MAX_MEMBERS:
            raise SessionError(f"a tree holds {MAX_MEMBERS} sessions and snapshots: close some", "too_many")

    async def _multiply(
        self, source: LiveSession | Snapshot, count: int, seeds: Sequence[int] | None, limits: Limits, ttl_s: float
    ) -> list[LiveSession]:
        """New sessions from a session or a snapshot: all of them, or none."""
        self._reserve(count)
        made: list[LiveSession] = []
        try:
            for number in range(count):
                seed = seeds[number] if seeds is not None else derive(source.seed, source.forks)
                source.forks += 1
                interpreter = await copy(source.interpreter, source.tree, seed, layer=True)
                session = LiveSession(secrets.token_hex(16), source.tree, interpreter, seed, self._admission)
                session.limits, session.step, session.past = limits, source.step, source.past.copy()
                session.depth = source.depth + 1
                made.append(self._admit(session, ttl_s))
                self._counts["forks"] += 1
        except BaseException as error:
            for session in made:
                self.close(session.id)
            if isinstance(error, SessionError) and error.code == "session_ended" and isinstance(source, LiveSession):
                self._end(source, "it did not answer")
            raise
        finally:
            self._opening -= count
        return made

    async def snapshot(self, session: LiveSession) -> Snapshot:
        """A sleeping copy of an idle session. It lives in the session's own domain: no Landlock layer is spent."""
        self._can_copy(session.tree, session.depth, 1)
        session.claim()
        try:
            interpreter = await copy(session.interpreter, session.tree, None, layer=False)
            try:
                async with asyncio.timeout(COMMAND_S):
                    await interpreter.ask(channel.SLEEP)
            except BaseException as error:
                self._spawn(session.tree.release(interpreter))
                if isinstance(error, SessionError):  # it has ended, not the session
                    raise TimeoutError from None
                raise
        except TimeoutError:
            raise SessionError("the snapshot did not fall asleep", "fork_unsafe") from None
        finally:
            session.claimed = False
        snapshot = Snapshot(
            secrets.token_hex(16),
            session.tree,
            interpreter,
            session.seed,
            session.step,
            session.past.copy(),
            session.depth,
            SNAPSHOT_TTL_S,
        )
        snapshot.expires = time.monotonic() + snapshot.ttl_s
        self._snapshots[snapshot.id] = snapshot
        interpreter.child.exited.add_done_callback(lambda _: self._forget(snapshot, "its process has ended"))
        while len(self._snapshots) > self.max_snapshots:
            oldest = next(
                (row for row in self._snapshots.values() if not row.lock.locked() and row is not snapshot), None
            )
            if oldest is None:
                break
            self._counts["snapshots_evicted"] += 1
            self._forget(oldest, f"evicted: {self.max_snapshots} newer ones were kept")
        return snapshot

    def find_snapshot(self, ident: str) -> Snapshot:
        """A snapshot that is kept; it becomes the most recently used."""
        snapshot = self._snapshots.get(ident)
        if snapshot is None:
            why = self._gone.get(ident, "it never existed, or it was dropped")
            raise SessionError(f"there is no such snapshot: {why}", "no_snapshot")
        self._snapshots.move_to_end(ident)
        snapshot.expires = time.monotonic() + snapshot.ttl_s
        return snapshot

    async def restore(self, session: LiveSession, snapshot: Snapshot) -> None:
        """Roll back in place: a copy of the snapshot takes over; the old process is killed."""
        if snapshot.tree is not session.tree:
            raise SessionError("the snapshot is not of this session's tree: use Sandbox.restore", "no_snapshot")
        same = (
            snapshot.interpreter.place.domain == session.interpreter.place.domain
        )  # then the copy may live where the old process did
        self._can_copy(snapshot.tree, snapshot.depth + (not same), 1)
        session.claim()
        try:
            async with self._using(snapshot):
                interpreter = await copy(snapshot.interpreter, snapshot.tree, None, layer=not same)
            if session.ended:
                self._spawn(session.tree.release(interpreter))
            session.check()
        finally:
            session.claimed = False
        old = session.interpreter
        session.adopt(interpreter)
        session.step, session.past, session.seed = snapshot.step, snapshot.past.copy(), snapshot.seed
        if not same:
            session.depth = snapshot.depth + 1
        await session.tree.release(old)

    @contextlib.asynccontextmanager
    async def _using(self, snapshot: Snapshot) -> AsyncIterator[None]:
        async with snapshot.lock:
            self.find_snapshot(snapshot.id)  # it may have been dropped meanwhile
            try:
                yield
            except SessionError as error:
                if error.code != "session_ended":
                    raise
                self._forget(snapshot, "its process has ended")
                raise SessionError("there is no such snapshot: its process has ended", "no_snapshot") from None

    async def restore_new(
        self, snapshot: Snapshot, count: int, seeds: Sequence[int] | None, ttl_s: float
    ) -> list[LiveSession]:
        """New sessions from a snapshot."""
        self._can_copy(snapshot.tree, snapshot.depth + 1, count)
        async with self._using(snapshot):
            return await self._multiply(snapshot, count, seeds, snapshot.tree.limits, ttl_s)

    def drop_snapshot(self, ident: str) -> None:
        """Forget a snapshot."""
        self._forget(self.find_snapshot(ident), "it was dropped")

    def _forget(self, snapshot: Snapshot, why: str) -> None:
        if self._snapshots.pop(snapshot.id, None) is None:
            return
        self._gone[snapshot.id] = why
        while len(self._gone) > _TOMBSTONES:
            self._gone.popitem(last=False)
        self._spawn(snapshot.tree.release(snapshot.interpreter))

    # --- the end --------------------------------------------------------------------------------------------------

    def close(self, ident: str) -> asyncio.Task[None] | None:
        """End a session and forget it; the task ends when its processes have. Closing twice is fine."""
        self._ended.pop(ident, None)
        session = self._live.get(ident)
        if session is None:
            return None
        session.on_end = lambda _: None
        session.end("it was closed")
        del self._live[ident]
        return self._spawn(session.tree.release(session.interpreter))

    def _end(self, session: LiveSession, reason: str) -> None:
        session.end(reason)

    def _bury(self, session: LiveSession) -> None:
        """It has ended, but not by its caller's wish: its last results stay readable until the lease runs out."""
        self._live.pop(session.id, None)
        session.expires = time.monotonic() + max(session.ttl_s, TOMBSTONE_S)
        self._ended[session.id] = session
        while len(self._ended) > _TOMBSTONES:
            self._ended.popitem(last=False)
        self._counts["sessions_ended"] += 1
        self._spawn(session.tree.release(session.interpreter))

    async def _sweep(self) -> None:
        """Leases."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            for session in [row for row in self._live.values() if row.expires < now]:
                if session.running is not None or session.claimed:
                    session.renew()  # something is under way: it is in use
                    continue
                self._counts["sessions_expired"] += 1
                session.end(f"its lease of {session.ttl_s:g} s expired")
            for ident in [row.id for row in self._ended.values() if row.expires < now]:
                del self._ended[ident]
            for snapshot in [row for row in self._snapshots.values() if row.expires < now and not row.lock.locked()]:
                self._forget(snapshot, f"its lease of {snapshot.ttl_s:g} s expired")

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def stats(self) -> dict[str, int]:
        """What is open now."""
        return {"sessions": len(self._live), "snapshots": len(self._snapshots)}

    async def close_all(self) -> None:
        """The supervisor ends: so does everything here."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._admission.close()
        for session in list(self._live.values()):
            session.on_end = lambda _: None
            session.end("the sandbox was closed")
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def describe(session: LiveSession) -> dict[str, Any]:
    """What a client's handle needs."""
    return {
        "session": session.id,
        "ttl_s": session.ttl_s,
        "step": session.step,
        "limits": asdict(session.limits),
        "profile": session.tree.unit.settings.profile,
    }


def lease(seconds: float) -> float:
    """A usable lease. Raises `ValueError`."""
    if not 0 < seconds <= _MAX_TTL_S:
        raise ValueError(f"ttl_s must be more than 0 and at most {_MAX_TTL_S:g}, not {seconds}")
    return float(seconds)


__all__ = ["SandboxError", "Sessions", "describe", "lease"]
