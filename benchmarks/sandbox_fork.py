"""Forks of a session that holds 100 MiB, two versions of the sandbox side by side: noise is noise for both.

    git worktree add ../before COMMIT
    python -m benchmarks.sandbox_fork ../before . --output benchmarks/sandbox_fork.json

Each version has a sandbox and a session of its own; blocks of forks are made in turn. Written down: p10, p50 and p90 of
each in milliseconds (as the caller sees it, over the embedded socket) and the ratio of the medians. Tier `uid` needs an
interpreter that other users can read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sandbox import Limits, LocalSandbox
from sandbox.bench.load import percentile
from sandbox.bench.main import machine
from sandbox.loops import new_event_loop

_BLOCK = 20


async def work(tier: str) -> None:
    """One version: a block of forks for every line that comes in."""
    limits = Limits(wall_s=60)
    async with LocalSandbox("py-math", limits, 2, tier=tier) as box, box.session(profile="py-math") as session:
        await session.exec("import numpy as np\nblock = np.ones(100 * 2**17)")
        while await asyncio.to_thread(sys.stdin.readline):
            times = []
            for _ in range(_BLOCK):
                started = time.perf_counter()
                (branch,) = await session.fork()
                times.append(1e3 * (time.perf_counter() - started))
                await branch.close()
                await asyncio.sleep(0.01)
            print(json.dumps(times), flush=True)


def start(folder: Path, tier: str) -> subprocess.Popen[str]:
    """A process that has `folder`'s sandbox."""
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", "--tier", tier],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def block(worker: subprocess.Popen[str]) -> list[float]:
    """Milliseconds of each fork of the next block."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit("a version's sandbox has ended; its error is above")
    times: list[float] = json.loads(line)
    return times


def measure(folders: list[Path], tier: str, blocks: int) -> dict[str, Any]:
    """Blocks of forks in turn."""
    workers = [start(folder, tier) for folder in folders]
    times: list[list[float]] = [[], []]
    try:
        for worker in workers:
            block(worker)  # the first forks are slower
        for number in range(blocks):
            for index in (0, 1) if number % 2 else (1, 0):
                times[index] += block(workers[index])
    finally:
        for worker in workers:
            worker.communicate()
    figures = [{f"p{round(100 * q)}_ms": round(percentile(row, q), 2) for q in (0.1, 0.5, 0.9)} for row in times]
    return {
        "tier": tier,
        "forks": blocks * _BLOCK,
        "first": figures[0],
        "second": figures[1],
        "ratio_of_p50": round(figures[1]["p50_ms"] / figures[0]["p50_ms"], 3),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="two checkouts: before and after")
    parser.add_argument("--tier", action="append", help="ns, uid (repeatable; default: ns)")
    parser.add_argument("--blocks", type=int, default=15, help=f"of {_BLOCK} forks each, for each version")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    tiers = options.tier or ["ns"]
    if options.worker:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(work(tiers[0]))
        return
    if len(options.folders) != 2:
        parser.error("name two folders: before and after")
    report: dict[str, Any] = {"host": machine(), "rounds": []}
    for tier in tiers:
        row = measure([folder.resolve() for folder in options.folders], tier, options.blocks)
        print(json.dumps(row), flush=True)
        report["rounds"].append(row)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
