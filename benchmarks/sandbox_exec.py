"""How fast the embedded sandbox is here: latency of print(1), executions per second, start-up. Writes JSON beside it.

python benchmarks/sandbox_exec.py [--profile py-math] [--tier ns] [--runs 300]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from sandbox import Limits, LocalSandbox


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the sorted values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def measure(profile: str, tier: str | None, runs: int, workers: int | None) -> dict[str, Any]:
    """One after the other, then many at once."""
    started = time.perf_counter()
    async with LocalSandbox(profile, Limits(wall_s=60), workers, tier == "none", tier) as box:
        start_s = time.perf_counter() - started
        await asyncio.sleep(0.5)
        serial = []
        for _ in range(runs):
            before = time.perf_counter()
            await box.exec("print(1)")
            serial.append(1e3 * (time.perf_counter() - before))
            await asyncio.sleep(0.02)  # as between the turns of one episode: the spare child is ready again
        before = time.perf_counter()
        results = await asyncio.gather(*(box.exec("print(1)") for _ in range(runs)))
        burst_s = time.perf_counter() - before
        assert all(result.ok for result in results)
        stats = await box.stats()
        assert stats["leaked"] == 0 and stats.get("infra_errors", 0) == 0
        return {
            "profile": profile,
            "tier": box.tier,
            "workers": box.settings.workers,
            "start_s": round(start_s, 3),
            "print_p50_ms": round(percentile(serial, 0.5), 2),
            "print_p95_ms": round(percentile(serial, 0.95), 2),
            "executions_per_s": round(runs / burst_s, 1),
            "runs": runs,
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="py-math")
    parser.add_argument("--tier", default=None)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    row = asyncio.run(measure(options.profile, options.tier, options.runs, options.workers))
    row["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release().split('-')[0]}"
    row["load"] = round(os.getloadavg()[0], 2)
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    rows = [old for old in rows if (old["profile"], old["tier"]) != (row["profile"], row["tier"])] + [row]
    options.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
