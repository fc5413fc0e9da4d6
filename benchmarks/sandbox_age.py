"""Whether a sandbox becomes slow with age: what an execution costs, thousand by thousand, since one start.

python -m benchmarks.sandbox_age [--runs 10000] [--tier ns] [--output FILE]

CPU time is that of the whole machine, because part of a run ends in the kernel after its process has been reaped:
nothing else should be running.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from sandbox import Limits, LocalSandbox
from sandbox.bench.main import machine

BLOCK = 1000
CALLERS = 2
_TICK_MS = 1000 / os.sysconf("SC_CLK_TCK")


def busy_ms() -> float:
    """CPU milliseconds that this machine has worked since it was started."""
    user, nice, system, _, _, irq, softirq, *_ = (int(text) for text in Path("/proc/stat").read_text().split()[1:9])
    return _TICK_MS * (user + nice + system + irq + softirq)


async def block(box: LocalSandbox) -> dict[str, float]:
    """`BLOCK` executions of `print(1)`."""

    async def caller() -> None:
        for _ in range(BLOCK // CALLERS):
            result = await box.exec("print(1)")
            assert result.stdout == "1\n", result

    before, started = busy_ms(), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    seconds = time.perf_counter() - started
    return {"per_s": round(BLOCK / seconds, 1), "cpu_ms_each": round((busy_ms() - before) / BLOCK, 2)}


async def measure(runs: int, tier: str | None) -> dict[str, Any]:
    """One row for each block."""
    rows = []
    async with LocalSandbox("py-bare", Limits(wall_s=60), tier=tier) as box:
        for number in range(runs // BLOCK):
            rows.append({"after": number * BLOCK, **await block(box)})
            print(rows[-1], flush=True)
        return {"tier": box.tier, "rows": rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--tier", help="default: the strongest that holds")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    host = machine()
    found = {"host": host, **asyncio.run(measure(options.runs, options.tier))}
    first, last = found["rows"][0]["cpu_ms_each"], found["rows"][-1]["cpu_ms_each"]
    print(f"CPU an execution: {first} ms at first, {last} ms at last")
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
