"""Sessions: how quick an execution and a fork are, and what an idle one holds."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from sandbox.bench.load import percentile
from sandbox.local import LocalSandbox

_STATE = (
    "import numpy as np, sympy as sp\nx = sp.symbols('x')\nroots = sp.solve(x**2 - 3*x + 2, x)\na = np.arange(1000.0)"
)
_BIG = "import numpy as np\nblock = np.ones(100 * 2**17)"  # 100 MiB of float64, every page touched


def _private_dirty_kb(root: int) -> int:
    """Of every process below `root`."""
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        try:
            todo += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))
    return total


async def exec_latency(box: LocalSandbox, count: int = 2000) -> dict[str, float]:
    """`x += 1` in one session over the embedded socket, milliseconds."""
    async with box.session() as session:
        await session.exec("x = 0")
        times = []
        for _ in range(count):
            started = time.perf_counter()
            await session.exec("x += 1")
            times.append(1e3 * (time.perf_counter() - started))
    return {f"p{round(100 * q)}_ms": round(percentile(times, q), 3) for q in (0.5, 0.95, 0.99)}


async def fork_latency(box: LocalSandbox, count: int = 50) -> dict[str, float]:
    """One copy of a session that holds 100 MiB, milliseconds."""
    async with box.session(profile="py-math") as session:
        await session.exec(_BIG)
        times = []
        for _ in range(count):
            started = time.perf_counter()
            (branch,) = await session.fork()
            times.append(1e3 * (time.perf_counter() - started))
            await branch.close()
            await asyncio.sleep(0.01)
    return {f"p{round(100 * q)}_ms": round(percentile(times, q), 2) for q in (0.5, 0.95, 0.99)}


async def idle_memory(box: LocalSandbox, supervisor: int, count: int = 200) -> dict[str, Any]:
    """Private memory of idle sessions that hold numpy and sympy state: MiB each, as the slope over `count` of them."""
    sessions = [await box.session(profile="py-math") for _ in range(count // 4)]
    for session in sessions:
        await session.exec(_STATE)
    before, first = _private_dirty_kb(supervisor), len(sessions)
    for _ in range(count - first):
        sessions.append(await box.session(profile="py-math"))
        await sessions[-1].exec(_STATE)
    after = _private_dirty_kb(supervisor)
    for session in sessions:
        await session.close()
    return {"sessions": count, "private_dirty_mib_each": round((after - before) / 1024 / (count - first), 2)}


async def measure(box: LocalSandbox, quick: bool = False) -> dict[str, Any]:
    """All three; `fork` is left out where the tier cannot."""
    can_fork = (await box.capabilities())["fork"]
    supervisor = int((await box.stats())["supervisor_pid"])
    return {
        "exec": await exec_latency(box, 300 if quick else 2000),
        "fork_100_mib": await fork_latency(box, 10 if quick else 50) if can_fork else None,
        "idle": await idle_memory(box, supervisor, 20 if quick else 200),
    }
