"""One-shot executions: throughput and latency against concurrency, at half load, under overload; and real snippets."""

from __future__ import annotations

import asyncio
from typing import Any

from sandbox.bench.load import Call, Sample, closed_loop, paced, percentile
from sandbox.bench.snippets import SNIPPETS, in_process

PRINT = "print(1)"
CALLERS = (1, 2, 4, 8, 16)


async def ladder(call: Call, seconds: float, callers: tuple[int, ...] = CALLERS) -> list[dict[str, Any]]:
    """`print(1)` in a closed loop with more and more callers."""
    await closed_loop(call, PRINT, 2, min(1.0, seconds))  # warm
    rows = []
    for count in callers:
        sample = await closed_loop(call, PRINT, count, seconds)
        rows.append({"callers": count, **sample.row()})
    return rows


async def half_load(call: Call, peak_per_s: float, seconds: float) -> dict[str, Any]:
    """`print(1)` arriving at half the rate that the ladder reached."""
    await asyncio.sleep(0.5)
    sample = await paced(call, PRINT, max(1.0, peak_per_s / 2), seconds)
    return {"arrivals_per_s": round(peak_per_s / 2, 1), **sample.row()}


async def overload(call: Call, callers: int, seconds: float) -> dict[str, Any]:
    """Ten times the callers that reach the peak: what is still served, and how the rest is turned away."""
    peak = await closed_loop(call, PRINT, callers, seconds)
    flood = await closed_loop(call, PRINT, 10 * callers, seconds)
    return {
        "callers": [callers, 10 * callers],
        "peak": peak.row(),
        "overload": flood.row(),
        "goodput_ratio": round(flood.row()["per_s"] / max(peak.row()["per_s"], 0.1), 3),
    }


async def _median_ms(call: Call, code: str, repeats: int) -> float:
    sample = Sample()
    for _ in range(repeats):
        status = await sample.call(call, code)
        if status != "ok":
            raise RuntimeError(f"a snippet ended with {status!r}: it cannot be measured")
        await asyncio.sleep(0.02)
    return percentile(sample.latencies_ms, 0.5)


async def snippets(call: Call, peer: Call, repeats: int = 15) -> list[dict[str, Any]]:
    """Each snippet's median in the sandbox, its own computing in a warm interpreter, and with `peer` (a cold Python).

    The three take turns, so that a noisy machine is noisy for all. Milliseconds. Raises `RuntimeError`.
    """
    rows = []
    own = await asyncio.to_thread(in_process, repeats)
    for name, code in SNIPPETS.items():
        await call(code)
        service = await _median_ms(call, code, repeats)
        other = await _median_ms(peer, code, max(3, repeats // 5))
        inside = percentile(own[name], 0.5)
        row = {"in_process_ms": inside, "service_ms": service, "overhead_ms": service - inside, "cold_ms": other}
        rows.append({"snippet": name, **{key: round(value, 2) for key, value in row.items()}})
        rows[-1]["cold_ratio"] = round(other / service, 1)
    return rows
