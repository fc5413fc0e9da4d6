"""Sessions of the embedded sandbox, two versions side by side: executions, or forks of a session that holds 100 MiB.

    git worktree add ../before COMMIT
    python -m benchmarks.sandbox_embedded ../before . --what fork --output benchmarks/sandbox_fork.json

Each version has a sandbox and a session of its own; blocks are measured in turn. Written down: p10, p50 and p90 of
each in milliseconds (as the caller sees it, over the embedded socket), the ratio of the medians, and the median of the
blocks' ratios. Tier `uid` needs an interpreter that other users can read.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from sandbox import Limits, LocalSandbox
from sandbox.bench.load import percentile
from sandbox.bench.main import machine
from sandbox.loops import new_event_loop
from sandbox.types import Session

BLOCKS = {"exec": 300, "fork": 20}
"""What is measured -> how many of it make a block."""
_STATE = {"exec": "x = 0", "fork": "import numpy as np\nblock = np.ones(100 * 2**17)"}


async def executions(session: Session, count: int) -> list[float]:
    """Milliseconds of each."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        await session.exec("x += 1")
        times.append(1e3 * (time.perf_counter() - started))
    return times


async def forks(session: Session, count: int) -> list[float]:
    """Milliseconds of each."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        (branch,) = await session.fork()
        times.append(1e3 * (time.perf_counter() - started))
        await branch.close()
        await asyncio.sleep(0.01)
    return times


async def work(what: str, tier: str) -> None:
    """One version: a block for every line that comes in."""
    limits = Limits(wall_s=60)
    measured = {"exec": executions, "fork": forks}[what]
    async with LocalSandbox("py-math", limits, 2, tier=tier) as box, box.session(profile="py-math") as session:
        await session.exec(_STATE[what])
        while await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await measured(session, BLOCKS[what])), flush=True)


def measure(folders: tuple[Path, Path], what: str, tier: str, blocks: int) -> dict[str, Any]:
    """Blocks in turn."""
    from benchmarks import versions

    workers = [versions.start(__file__, folder, "--worker", what, tier) for folder in folders]
    try:
        for worker in workers:
            versions.ask(worker)  # the first are slower
        pairs = list(versions.turns(blocks, lambda index: json.loads(versions.ask(workers[index]))))
    finally:
        for worker in workers:
            worker.communicate()
    both = [[value for row in rows for value in row] for rows in zip(*pairs, strict=True)]
    figures = [{f"p{round(100 * q)}_ms": round(percentile(row, q), 3) for q in (0.1, 0.5, 0.9)} for row in both]
    ratios = [percentile(second, 0.5) / percentile(first, 0.5) for first, second in pairs]
    return {
        "what": what,
        "tier": tier,
        "count": blocks * BLOCKS[what],
        "first": figures[0],
        "second": figures[1],
        "ratio_of_p50": round(figures[1]["p50_ms"] / figures[0]["p50_ms"], 3),
        "median_of_ratios": round(percentile(ratios, 0.5), 3),
    }


def compare() -> None:
    """See the module."""
    from benchmarks import versions

    parser = versions.parser(__doc__)
    parser.add_argument("--what", choices=BLOCKS, default="exec")
    parser.add_argument("--tier", action="append", help="ns, uid (repeatable; default: ns)")
    parser.add_argument("--blocks", type=int, default=15, help=f"for each version; of {BLOCKS}")
    options = parser.parse_args()
    folders = versions.pair(parser, options)
    report: dict[str, Any] = {"host": machine(), "rounds": []}
    for tier in options.tier or ["ns"]:
        row = measure(folders, options.what, tier, options.blocks)
        print(json.dumps(row), flush=True)
        report["rounds"].append(row)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(work(*sys.argv[2:]))
    else:
        compare()
