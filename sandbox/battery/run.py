"""Runs attacks and judges them: statuses, what the program got done, what was hit outside, what is left, the next run.

Each attack runs confined in an embedded sandbox, alone (but for its own neighbour), and its control unconfined in a
process that is thrown away. After each one the sandbox must be as before and the next run must work.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox.battery.attack import Attack, Control
from sandbox.battery.target import Target
from sandbox.battery.throwaway import run_unconfined
from sandbox.local import LocalSandbox
from sandbox.types import ExecResult, Limits, SandboxError, Status

_CONTROL_S = 60.0
_OUTLIVES_S = 1.5
_SETTLE_S = 15.0
_COUNTERS = ("leaked", "restarts", "infra_errors")  # these never go back
_KEPT = 32
_LINE = re.compile(r"^(did|refused) ([^:]+): ", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """What became of one attack. `verdict`: `held`; `known` (works, and is documented to in this tier); `unproven`
    (held, but something did not work unconfined here either: `control`); `breach` (`got` says what)."""

    name: str
    origin: str
    theme: str
    control: str
    expected: str
    got: str
    verdict: str


@dataclass
class _Seen:
    """What was observed of one confined attack."""

    status: str = ""
    did: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def labels(verb: str, text: str) -> list[str]:
    """The labels that a program says it `did` or was `refused`."""
    return [found[1] for found in _LINE.findall(text) if found[0] == verb]


class Battery:
    """One sandbox under attack. `await settle()` before the first attack; `attack` runs one."""

    def __init__(self, box: LocalSandbox, target: Target, victim: Target) -> None:
        self.box, self.target, self.victim = box, target, victim
        self.grouped = False
        self._rest: dict[str, int] = {}

    async def settle(self) -> None:
        """Note how the idle sandbox looks."""
        self.grouped = (await self.box.capabilities())["cgroup"] != "none"
        for _ in range(4):
            await self.box.exec("print(1)")
        for _ in range(100):  # a busy machine takes a while to make all children ready
            stats = await self.box.stats()
            if stats["ready"] >= stats["workers"]:
                break
            await asyncio.sleep(0.1)
        for _ in range(10):
            await asyncio.sleep(0.1)
            for name, value in (await self._state()).items():
                self._rest[name] = max(value, self._rest.get(name, 0))

    async def _state(self) -> dict[str, int]:
        stats = await self.box.stats()
        supervisor = int(stats["supervisor_pid"])
        alive = descendants(supervisor)
        # Empty process namespaces are kept for later runs: an init and two descriptors each. A run cannot pass for
        # one, since whatever it leaves in tier `ns` is below an init.
        kept = idle_inits(alive) if self.box.tier == "ns" else 0
        return {
            "processes": len(alive) - kept,
            "descriptors": descriptors(supervisor) - 2 * kept,
            "kept namespaces": max(0, kept - _KEPT),
            "mounts": mounts(),
            "leaked": int(stats["leaked"]),
            "restarts": int(stats["restarts"]) + int(stats["supervisor_restarts"]),
            "infra_errors": int(stats.get("infra_errors", 0)),
        }

    async def _differences(self) -> list[str]:
        """What of the sandbox is not as before; it may take a moment to refill."""
        end = time.monotonic() + _SETTLE_S
        while True:
            now = await self._state()
            worse = [f"{name} {self._rest[name]} -> {value}" for name, value in now.items() if value > self._rest[name]]
            if not worse:
                return []
            lasting = any(now[name] > self._rest[name] for name in _COUNTERS)
            if lasting or time.monotonic() > end:
                self._rest = now
                return worse
            await asyncio.sleep(0.05)

    async def attack(self, attack: Attack) -> Row:
        """Run one attack with its control and judge it."""
        (control, unproven), seen = await asyncio.gather(self._control(attack), self._confined(attack))
        allowed = () if attack.grouped and self.grouped else attack.known.get(self.box.tier, ())
        breaches = [label for label in seen.did if label not in allowed]
        known = [label for label in seen.did if label in allowed]
        expected = "|".join(attack.statuses(self.box.tier)) or "-"
        got = [seen.status]
        if breaches:
            got.append("DID " + ", ".join(breaches))
        if known:
            got.append("did " + ", ".join(known))
        got += seen.wrong
        ended = attack.act is not None or seen.status in attack.statuses(self.box.tier)
        if breaches or seen.wrong or not ended:
            verdict = "breach"
        elif known:
            verdict = "known"
        else:
            verdict = "unproven" if unproven else "held"
        return Row(attack.name, attack.origin, attack.theme, control, expected, "; ".join(got), verdict)

    async def _confined(self, attack: Attack) -> _Seen:
        seen = _Seen()
        try:
            if attack.act is not None:
                text = "".join(f"{line}\n" for line in await attack.act(self.box, self.target))
                seen.status = "ok"
            else:
                result, text = await self._exec(attack)
                seen.status = result.status.value
                ran = result.status is not Status.ERROR
                if attack.says and ran and not re.search(attack.says, result.stdout, re.DOTALL):
                    seen.wrong.append(f"said {result.stdout[-60:]!r}")
                if result.status is Status.ERROR and result.exception and not attack.plain:
                    seen.wrong += _unexpected(result, attack, self.box.tier)
            seen.did, seen.refused = labels("did", text), labels("refused", text)
        except SandboxError as error:
            seen.status = f"infrastructure: {error.code}"
            seen.wrong.append(str(error)[:120])
        seen.wrong += self.target.disturbances()
        try:
            after = await self.box.exec("print(6 * 7)", limits=Limits(wall_s=30))
            if after.stdout != "42\n":
                seen.wrong.append(f"the next run: {after.status.value} {after.stdout!r}")
            seen.wrong += await self._differences()
        except SandboxError as error:
            seen.wrong.append(f"the next run: {error}")
        return seen

    async def _exec(self, attack: Attack) -> tuple[ExecResult, str]:
        told = json.dumps(self._told(self.target)) + "\n"
        stdin = attack.stdin if attack.plain else told + attack.stdin
        runs = [self.box.exec(attack.program(), stdin=stdin, limits=attack.limits)]
        if attack.neighbour:
            runs.append(self.box.exec(attack.neighbour, stdin=told, limits=attack.limits))
        results = await asyncio.gather(*runs)
        return results[0], "\n".join(result.stdout for result in results)

    def _told(self, target: Target) -> dict[str, Any]:
        return {**target.told(), "package": str(Path(__file__).resolve())}

    async def _control(self, attack: Attack) -> tuple[str, list[str]]:
        """What the program does unconfined, in words, and what of it proves nothing."""
        if attack.act is not None or attack.control is Control.NONE:
            return f"none: {attack.why}", []
        told = json.dumps(self._told(self.victim)) + "\n"
        stdin = attack.stdin if attack.plain else told + attack.stdin
        seconds = _OUTLIVES_S if attack.control is Control.OUTLIVES else _CONTROL_S
        runs = [run_unconfined(attack.program(), stdin, seconds)]
        if attack.neighbour:
            runs.append(run_unconfined(attack.neighbour, told, seconds))
        try:
            done = await asyncio.gather(*runs)
        except (OSError, ValueError) as error:
            return f"failed: {type(error).__name__}: {error}", ["everything"]
        finally:
            self.victim.restore()
        first, text = done[0], "\n".join(run.stdout for run in done)
        if attack.control is Control.WORKS:
            failed, works = labels("refused", text), labels("did", text)
            if not works:
                return first.ending, ["everything"]
            return f"works, but not: {', '.join(failed)}" if failed else "works", failed
        good = {
            Control.OUTLIVES: first.ending == "alive",
            Control.LEAVES: first.left > 0,
            Control.KILLS: first.ending not in ("alive", "exit 0"),
        }[attack.control]
        shown = f"leaves {first.left}" if attack.control is Control.LEAVES else first.ending
        return shown, [] if good else ["everything"]


def _unexpected(result: ExecResult, attack: Attack, tier: str) -> list[str]:
    """An attack that ended with an exception where it should not have: the attack itself may be broken."""
    assert result.exception is not None
    if "error" in attack.statuses(tier):
        return []
    return [result.exception.traceback.strip().splitlines()[-1][:120]]


def mounts() -> int:
    """Mounts that we can see, but for those of container engines, which come and go without us."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return sum(not any(word in line for word in ("docker", "containerd", "overlay")) for line in lines)


def descriptors(pid: int) -> int:
    """Files that a process has open, but for those of control groups, which are kept for later runs."""
    count = 0
    for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
        try:
            count += not os.readlink(f"/proc/{pid}/fd/{name}").endswith("/cgroup.procs")  # noqa: PTH115
        except OSError:
            continue
    return count


def idle_inits(pids: set[int]) -> int:
    """How many of these are inits of namespaces that hold nothing else."""
    parents = {parent for parent, children in _family().items() if children}
    count = 0
    for pid in pids - parents:
        try:
            count += Path(f"/proc/{pid}/comm").read_text() == "sandbox-init\n"
        except OSError:
            continue
    return count


def descendants(pid: int) -> set[int]:
    """Every live process below `pid`; zombies do not count."""
    children = _family()
    found: set[int] = set()
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found.add(child)
            todo.append(child)
    return found


def _family() -> dict[int, list[int]]:
    """Parent -> live children, of all processes."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rsplit(") ", 1)[1].split()[:2]
            except (OSError, ValueError):
                continue
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry.name))
    return children


@asynccontextmanager
async def open_battery(tier: str | None, profile: str = "py-bare") -> AsyncIterator[Battery]:
    """A sandbox of `tier` (default: the strongest here) with something to attack. Raises `SandboxError`."""
    with Target(unconfined=False) as target, Target(unconfined=True) as victim:
        async with LocalSandbox(profile, workers=3, tier=tier) as box:
            battery = Battery(box, target, victim)
            await battery.settle()
            yield battery


async def run_battery(attacks: Sequence[Attack], tier: str | None = None) -> AsyncGenerator[tuple[str, Row], None]:
    """(tier, row) of each attack as it is done. Raises `SandboxError` when no sandbox can be opened."""
    async with open_battery(tier) as battery:
        for attack in attacks:
            yield battery.box.tier, await battery.attack(attack)
