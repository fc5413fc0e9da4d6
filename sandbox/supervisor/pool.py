"""Ready children: forked and confined before anybody asks, so that a run starts in well under a millisecond."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter, deque

from sandbox.supervisor import folders
from sandbox.supervisor.cgroups import Group, Groups
from sandbox.supervisor.settings import Settings
from sandbox.supervisor.unit import Child, Unit, UnitFailed, next_ident
from sandbox.tiers import Tier
from sandbox.types import SandboxInfraError

UID_WAIT_S = 10.0
"""So long a run may wait for a user id."""
FIRST_RETRY_S = 0.5
"""Between two attempts to end what a run has left, the first time."""
_LAST_RETRY_S = 60.0


def uids_needed(settings: Settings) -> int:
    """User ids of a pool of tier `uid`: two for each child that is ready or running (its own, and its killer's), for
    each session, and a margin."""
    return 2 * (2 * settings.workers + settings.max_sessions + 2)


class Pool:
    """Keeps a warm unit alive and up to `spare` ready children. `counts` are the supervisor's counters."""

    def __init__(
        self, settings: Settings, tier: Tier, uid_base: int, counts: Counter[str], groups: Groups | None = None
    ) -> None:
        self.settings, self.tier, self.counts, self.groups = settings, tier, counts, groups
        self.spare = settings.workers
        self.uid_base = uid_base
        self._free_uids = deque(range(uid_base, uid_base + uids_needed(settings), 2))
        self._known_uids: set[int] = set()
        self._ready: deque[Child] = deque()
        self._uid_freed = asyncio.Event()
        self._clearing: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._unit: Unit | None = None
        self._starting = asyncio.Lock()
        self._refilling: asyncio.Task[None] | None = None
        self._spawn_slots = asyncio.Semaphore(max(1, os.cpu_count() or 1))

    async def unit(self) -> Unit:
        """The live unit; starts a new one when the last was lost. Raises `SandboxInfraError(spawn_failed)`."""
        async with self._starting:
            if self._unit is not None and not self._unit.lost.is_set():
                return self._unit
            if self._unit is not None:
                self.counts["restarts"] += 1
                while self._ready:
                    self._forget(self._ready.pop())
                await self._unit.stop()
            unit = Unit(self.settings, self.tier, self.uid_base)
            try:
                await unit.start()
            except (UnitFailed, SandboxInfraError) as error:
                raise SandboxInfraError(f"the warm interpreter did not start: {error}", "spawn_failed") from None
            self._unit = unit
            return unit

    async def take(self) -> tuple[Unit, Child]:
        """A ready child, or a fresh one. Raises `SandboxInfraError`."""
        unit = await self.unit()
        while self._ready:
            child = self._ready.popleft()
            if not child.exited.done():
                return unit, child
            await self.discard(unit, child)
        return unit, await self._spawn(unit)

    async def _spawn(self, unit: Unit) -> Child:
        async with self._spawn_slots:
            uid = await self._take_uid() if self.tier.own_uid else 0
            group = None
            try:
                group = self.groups.take() if self.groups else None
                if uid and uid not in self._known_uids:  # an earlier supervisor may have left something behind
                    await unit.purge(uid, uid)
                    self._known_uids.add(uid)
                return await unit.spawn(uid, group)
            except OSError as error:
                self._release(uid, group)
                raise SandboxInfraError(f"no control group for the run: {error}", "spawn_failed") from None
            except BaseException:
                self._known_uids.discard(uid)
                self._release(uid, group)
                raise

    async def _take_uid(self) -> int:
        try:
            async with asyncio.timeout(UID_WAIT_S):
                while not self._free_uids:  # all others wait for their files to be removed
                    self._uid_freed.clear()
                    await self._uid_freed.wait()
        except TimeoutError:
            raise SandboxInfraError(
                "every user id is in use, or waits for what its last run has left", "spawn_failed"
            ) from None
        return self._free_uids.popleft()

    def refill(self) -> None:
        """Make ready children in the background."""
        if self._refilling is None or self._refilling.done():
            self._refilling = asyncio.get_running_loop().create_task(self._refill())

    async def _refill(self) -> None:
        try:
            unit = await self.unit()
            while len(self._ready) < self.spare:
                child = await self._spawn(unit)
                if unit is not self._unit or unit.lost.is_set():
                    self._forget(child)
                    return
                self._ready.append(child)
        except SandboxInfraError:
            self.counts["refill_failures"] += 1  # the next run spawns its own child and reports the reason

    async def discard(self, unit: Unit, child: Child) -> None:
        """End a child that was not used."""
        await unit.destroy(child)
        self.recycle(unit, child, clean=True)

    def recycle(self, unit: Unit, child: Child, clean: bool) -> None:
        """After a run: remove its files and give its user id back, as soon as nothing of it is alive."""
        if not clean and not child.uid:  # without a user of its own nobody can tell any more what is left of it
            self.counts["leaked"] += 1
            return
        group, child.group = child.group, None
        folder = unit.folder(child)
        if clean and (not folder or folders.remove_empty(folder)):
            self._release(child.uid, group)
        else:  # however much it wrote, nobody waits for the removal
            task = asyncio.get_running_loop().create_task(self._clear(folder, child.uid, group, clean))
            self._clearing.add(task)
            task.add_done_callback(self._clearing.discard)

    async def _clear(self, folder: str, uid: int, group: Group | None, dead: bool) -> None:
        """Until the run's processes are dead and its folder is gone: again and again, ever more seldom."""
        pause, counted = FIRST_RETRY_S, False
        while not (dead and (not folder or await asyncio.to_thread(folders.remove, folder, uid))):
            if not counted:
                self.counts["leaked"] += 1
                counted = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._closing.wait()
            if self._closing.is_set():
                return
            pause = min(2 * pause, _LAST_RETRY_S)
            dead = dead or await self._purged(uid)
        if counted:
            self.counts["leaked"] -= 1
        self._release(uid, group)

    async def _purged(self, uid: int) -> bool:
        """Kill whatever runs as `uid`."""
        try:
            return await (await self.unit()).purge(next_ident(), uid)
        except SandboxInfraError:
            return False

    def _release(self, uid: int, group: Group | None) -> None:
        if uid:
            self._free_uids.append(uid)
            self._uid_freed.set()
        if group is not None and self.groups is not None:
            self.groups.give_back(group)

    def _forget(self, child: Child) -> None:
        """A child of a unit that was lost: its user id has to be emptied before it is used again."""
        child.close()
        self._known_uids.discard(child.uid)
        self._release(child.uid, child.group)

    def describe(self) -> dict[str, int]:
        """Processes and ready children, for `stats`."""
        unit = self._unit
        alive = unit is not None and not unit.lost.is_set()
        return {
            "ready": len(self._ready),
            "warden_pid": unit.pid if unit and alive else 0,
            "zygote_pid": unit.zygote_pid if unit and alive else 0,
        }

    async def close(self) -> None:
        """End everything."""
        if self._refilling is not None:
            self._refilling.cancel()
            await asyncio.gather(self._refilling, return_exceptions=True)
        self._closing.set()
        await asyncio.gather(*self._clearing, return_exceptions=True)
        if self._unit is not None:
            await self._unit.stop()
        while self._ready:
            self._forget(self._ready.pop())
