"""Two versions of the sandbox side by side over HTTP, so that a noisy machine is noisy for both.

    git worktree add ../before COMMIT
    python -m benchmarks.sandbox_pair ../before . --output benchmarks/sandbox_pair.json

Both servers run at once; `print(1)` goes to them in turn, with a pause after each, as one-shot runs or (`--session`) in
a session of each. Written down: p50, p90 and minimum
of each in milliseconds, the ratio of the medians, and the median of the ratios of neighbouring requests. Tier `uid`
needs an interpreter that other users can read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

from sandbox.bench import targets
from sandbox.bench.http import Caller
from sandbox.bench.load import percentile
from sandbox.bench.main import machine
from sandbox.loops import new_event_loop


async def _path(caller: Caller, session: bool) -> str:
    """Where executions go; a session is opened for them."""
    if not session:
        return "/v1/exec"
    status, _, body = await caller.post("/v1/sessions", {})
    if status != 201:
        raise SystemExit(f"no session: {body}")
    return f"/v1/sessions/{body['id']}/exec"


async def measure(folders: list[Path], tier: str, count: int, pause_s: float, session: bool) -> dict[str, Any]:
    """Alternating requests to a server of each folder."""
    times: list[list[float]] = [[], []]
    options = ("--tier", tier, "--profile", "py-bare")
    async with (
        targets.server(*options, source=folders[0]) as (first, _),
        targets.server(*options, source=folders[1]) as (second, _),
    ):
        callers = [Caller(first), Caller(second)]
        calls = [targets.native(caller, path=await _path(caller, session)) for caller in callers]
        for number in range(count):
            for index in (0, 1) if number % 2 else (1, 0):
                started = time.perf_counter()
                status = await calls[index]("print(1)")
                times[index].append(1e3 * (time.perf_counter() - started))
                if status != "ok":
                    raise SystemExit(f"{folders[index]}: {status}")
                await asyncio.sleep(pause_s)
        for caller in callers:
            await caller.close()
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
        "session": session,
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
    parser.add_argument("--session", action="store_true", help="execute in a session of each")
    parser.add_argument("--pause", type=float, default=0.008, help="seconds after each")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folders = [folder.resolve() for folder in options.folders]
    report: dict[str, Any] = {"host": machine(), "pause_s": options.pause, "count": options.count, "rounds": []}
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        for _ in range(options.rounds):
            row = runner.run(measure(folders, options.tier, options.count, options.pause, options.session))
            print(json.dumps(row), flush=True)
            report["rounds"].append(row)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
