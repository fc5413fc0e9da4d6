"""One pool of ready children for each profile, all of one tier; started when first asked for."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter

from sandbox.profiles import AUTO, choose
from sandbox.supervisor.pool import Pool, uids_needed
from sandbox.supervisor.settings import Settings
from sandbox.supervisor.unit import Child, Unit
from sandbox.tiers import Tier
from sandbox.types import SandboxInfraError


class Pools:
    """`first` has been attacked and found to hold; the others share its tier."""

    def __init__(self, settings: Settings, first: Pool, counts: Counter[str], uid_base: int) -> None:
        self.settings, self.counts = settings, counts
        self.tier: Tier = first.tier
        self._first = first
        self._pools = {first.settings.profile: first}
        self._uid_base = uid_base
        self._warming: set[asyncio.Task[None]] = set()

    def name(self, profile: str | None, code: str) -> str:
        """The profile that `code` runs in: the one asked for, or the smallest that has what the code mentions."""
        wanted = profile or self.settings.profile
        return choose(code, self.settings.profiles) if wanted == AUTO else wanted

    def session_name(self, profile: str | None) -> str:
        """The profile of a session, whose code nobody knows yet: with numpy and sympy, unless another is asked for."""
        return self.name(profile, "numpy sympy")

    def pool(self, name: str) -> Pool:
        """The pool of a profile. Raises `SandboxInfraError` for one that is not installed here; never retryable."""
        if name not in self.settings.profiles:
            known = ", ".join(self.settings.profiles)
            raise SandboxInfraError(f"profile {name!r} is not available here: {known}", "no_profile", retryable=False)
        if name not in self._pools:
            base = self._uid_base + self.settings.profiles.index(name) * uids_needed(self.settings)
            settings = dataclasses.replace(self.settings, profile=name)
            self._pools[name] = Pool(settings, self.tier, base, self.counts, self._first.groups)
        return self._pools[name]

    async def take(self, name: str) -> tuple[Pool, Unit, Child]:
        """A child that waits for code. Raises `SandboxInfraError`."""
        pool = self.pool(name)
        unit, child = await pool.take()
        return pool, unit, child

    def warm(self) -> None:
        """Make ready children of the first pool now, and start the others in the background, one after another."""
        for pool in list(self._pools.values()):
            pool.refill()
        if self.settings.profile == AUTO:
            task = asyncio.get_running_loop().create_task(self._warm_others())
            self._warming.add(task)
            task.add_done_callback(self._warming.discard)

    async def _warm_others(self) -> None:
        for name in ("py-bare", "py-math"):
            if name in self.settings.profiles:
                try:
                    await self.pool(name).unit()
                except SandboxInfraError:
                    self.counts["refill_failures"] += 1  # whoever needs it starts it again and reports the reason
                else:
                    self.pool(name).refill()

    def describe(self) -> dict[str, object]:
        """Ready children and processes, of the first pool and by profile."""
        return {**self._first.describe(), "profiles": {name: pool.describe() for name, pool in self._pools.items()}}

    async def close(self) -> None:
        """End everything."""
        for task in list(self._warming):
            task.cancel()
        await asyncio.gather(*self._warming, return_exceptions=True)
        for pool in self._pools.values():
            await pool.close()
