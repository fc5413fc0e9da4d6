"""Two versions of the sandbox side by side over HTTP, so that a noisy machine is noisy for both.

    git worktree add ../before COMMIT
    python -m benchmarks.sandbox_pair ../before . --output benchmarks/sandbox_pair.json

Both servers run at once; `print(1)` goes to them in turn, with a pause after each. Written down: p50, p90 and minimum
of each in milliseconds, the ratio of the medians, and the median of the ratios of neighbouring requests. Tier `uid`
needs an interpreter that other users can read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from sandbox.bench import targets
from sandbox.bench.http import Caller
from sandbox.bench.load import percentile
from sandbox.bench.main import machine
from sandbox.loops import new_event_loop

TRIES = 300


@contextlib.asynccontextmanager
async def _server(folder: Path, port: int, tier: str) -> Any:
    command = [sys.executable, "-m", "retool", "sandbox", "serve", "--port", str(port), "--tier", tier]
    process = await asyncio.create_subprocess_exec(
        *(*command, "--profile", "py-bare"),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=asyncio.subprocess.DEVNULL,
    )
    caller = Caller(f"http://127.0.0.1:{port}")
    call = targets.native(caller)
    try:
        for _ in range(TRIES):
            if process.returncode is not None:
                raise SystemExit(f"the server of {folder} ended")
            with contextlib.suppress(OSError):
                if await call("print(1)") == "ok":
                    break
            await asyncio.sleep(0.1)
        yield call
        await caller.close()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def measure(folders: list[Path], tier: str, count: int, pause_s: float) -> dict[str, Any]:
    """Alternating requests to a server of each folder."""
    times: list[list[float]] = [[], []]
    async with _server(folders[0], 18471, tier) as first, _server(folders[1], 18472, tier) as second:
        for number in range(count):
            for index in (0, 1) if number % 2 else (1, 0):
                started = time.perf_counter()
                status = await (first, second)[index]("print(1)")
                times[index].append(1e3 * (time.perf_counter() - started))
                if status != "ok":
                    raise SystemExit(f"{folders[index]}: {status}")
                await asyncio.sleep(pause_s)
    figures = [
        {
            "p50_ms": round(percentile(row, 0.5), 3),
            "p90_ms": round(percentile(row, 0.9), 3),
            "min_ms": round(min(row), 3),
        }
        for row in times
    ]
    return {
        "tier": tier,
        "first": figures[0],
        "second": figures[1],
        "ratio_of_p50": round(figures[1]["p50_ms"] / figures[0]["p50_ms"], 3),
        "median_of_ratios": round(percentile([b / a for a, b in zip(*times, strict=True)], 0.5), 3),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path, help="two checkouts: before and after")
    parser.add_argument("--tier", default="ns")
    parser.add_argument("--count", type=int, default=600, help="requests to each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.008, help="seconds after each")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folders = [folder.resolve() for folder in options.folders]
    report: dict[str, Any] = {"host": machine(), "pause_s": options.pause, "count": options.count, "rounds": []}
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        for _ in range(options.rounds):
            row = runner.run(measure(folders, options.tier, options.count, options.pause))
            print(json.dumps(row), flush=True)
            report["rounds"].append(row)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
