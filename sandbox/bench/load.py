"""Load generators: as many callers as one likes in a closed loop, or a fixed rate of arrivals; and their statistics."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

Call = Callable[[str], Awaitable[str]]
"""Runs code; returns a status: `ok`, another outcome, or `refused` with the seconds to wait after a colon."""


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the sorted values do not exceed; 0 without values."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else 0.0


@dataclass
class Sample:
    """Latencies in milliseconds of the calls that ended `ok`, all statuses, and how long it took."""

    latencies_ms: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """Throughput in executions per second; p50, p95, p99 in milliseconds."""
        good = len(self.latencies_ms)
        return {
            "per_s": round(good / self.seconds, 1) if self.seconds else 0.0,
            **{f"p{round(100 * q)}_ms": round(percentile(self.latencies_ms, q), 2) for q in (0.5, 0.95, 0.99)},
            "ok": good,
            "other": {status: count for status, count in sorted(self.statuses.items()) if status != "ok"},
        }

    async def call(self, call: Call, code: str) -> str:
        """One call, recorded."""
        started = time.perf_counter()
        status = await call(code)
        if status == "ok":
            self.latencies_ms.append(1e3 * (time.perf_counter() - started))
        self.statuses[status.split(":")[0]] += 1
        return status


async def closed_loop(call: Call, code: str, callers: int, seconds: float) -> Sample:
    """`callers` at once, each calling again as soon as it has its answer; a refused caller waits as it was told."""
    sample = Sample()
    end = time.perf_counter() + seconds

    async def caller() -> None:
        while time.perf_counter() < end:
            status = await sample.call(call, code)
            if status.startswith("refused:"):
                await asyncio.sleep(float(status.partition(":")[2]))

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    sample.seconds = time.perf_counter() - started
    return sample


async def paced(call: Call, code: str, per_s: float, seconds: float) -> Sample:
    """Arrivals at a fixed rate, whether or not earlier ones have been answered."""
    sample = Sample()
    tasks = []
    started = time.perf_counter()
    for number in range(max(1, int(per_s * seconds))):
        await asyncio.sleep(max(0.0, started + number / per_s - time.perf_counter()))
        tasks.append(asyncio.ensure_future(sample.call(call, code)))
    await asyncio.gather(*tasks)
    sample.seconds = time.perf_counter() - started
    return sample
