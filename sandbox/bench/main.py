"""The whole measurement: embedded, over HTTP, sessions, and the peers beside them in one run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sandbox.bench import oneshot, state, targets
from sandbox.bench.http import Caller
from sandbox.bench.load import closed_loop, percentile
from sandbox.local import LocalSandbox
from sandbox.supervisor.settings import CLEAN_ENVIRONMENT
from sandbox.types import Limits

_PATIENT = Limits(wall_s=60, cpu_s=30)


@dataclass(frozen=True)
class Options:
    """`seconds` of each step. `versus`: URL of a server that speaks SandboxFusion's API. `tier`: None for the
    strongest. `parts`: which of `embedded`, `http`, `sessions`, `snippets`, `overload`."""

    seconds: float = 5.0
    tier: str | None = None
    profiles: tuple[str, ...] = ("py-bare", "py-math")
    versus: str = ""
    parts: tuple[str, ...] = ("embedded", "http", "sessions", "snippets", "overload")
    quick: bool = False


def machine() -> dict[str, Any]:
    """What the figures were taken on; `load` is the load average at that moment."""
    return {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def _best(rows: list[dict[str, Any]]) -> float:
    return max(float(row["per_s"]) for row in rows)


async def _embedded(options: Options, profile: str) -> dict[str, Any]:
    async with LocalSandbox(profile, _PATIENT, tier=options.tier) as box:
        call = targets.embedded(box)
        rows = await oneshot.ladder(call, options.seconds)
        half = await oneshot.half_load(call, _best(rows), options.seconds)
        stats = await box.stats()
        trouble = {name: stats.get(name, 0) for name in ("leaked", "infra_errors", "restarts")}
        return {"tier": box.tier, "profile": profile, "ladder": rows, "half_load": half, **trouble}


def _server_options(options: Options, profile: str) -> list[str]:
    return ["--profile", profile, *(["--tier", options.tier] if options.tier else [])]


async def _http(options: Options, profile: str) -> dict[str, Any]:
    async with targets.server(*_server_options(options, profile)) as (url, _):
        caller = Caller(url)
        call = targets.native(caller)
        rows = await oneshot.ladder(call, options.seconds)
        half = await oneshot.half_load(call, _best(rows), options.seconds)
        await caller.close()
        return {"profile": profile, "ladder": rows, "half_load": half}


async def _snippets(options: Options) -> dict[str, Any]:
    async with targets.server(*_server_options(options, "py-math")) as (url, _):
        caller = Caller(url)
        rows = await oneshot.snippets(targets.native(caller), targets.cold(), 5 if options.quick else 15)
        await caller.close()
    return {
        "rows": rows,
        "overhead_p50_ms": round(percentile([row["overhead_ms"] for row in rows], 0.5), 2),
        "cold_ratio_p50": percentile([row["cold_ratio"] for row in rows], 0.5),
    }


async def _overload(options: Options) -> dict[str, Any]:
    async with targets.server(*_server_options(options, "py-bare"), "--queue", "16") as (url, _):
        caller = Caller(url)
        result = await oneshot.overload(targets.native(caller), 8, options.seconds)
        await caller.close()
        return result


async def _peers(options: Options) -> list[dict[str, Any]]:
    rows = []
    sympy = "import sympy; print(sympy.factorint(60))"
    calls = {"cold python": targets.cold()}
    if options.versus:
        calls[options.versus] = targets.fusion(Caller(options.versus))
    for name, call in calls.items():
        for what, code in (("print(1)", oneshot.PRINT), ("sympy", sympy)):
            sample = await closed_loop(call, code, len(os.sched_getaffinity(0)), options.seconds)
            rows.append({"peer": name, "code": what, **sample.row()})
    async with targets.server(*_server_options(options, "auto")) as (url, _):
        caller = Caller(url)
        for what, code in (("print(1)", oneshot.PRINT), ("sympy", sympy)):
            sample = await closed_loop(targets.fusion(caller), code, len(os.sched_getaffinity(0)), options.seconds)
            rows.append({"peer": "retool, /run_code", "code": what, **sample.row()})
        await caller.close()
    return rows


async def _sessions(options: Options) -> dict[str, Any]:
    async with LocalSandbox("auto", _PATIENT, tier=options.tier) as box:
        return await state.measure(box, options.quick)


async def _part(part: str, options: Options, tell: Callable[[str], None]) -> dict[str, Any]:
    """What a part adds to the report."""
    if part in ("embedded", "http"):
        rows = []
        for profile in options.profiles:
            tell(f"{part}, {profile}")
            rows.append(await (_embedded if part == "embedded" else _http)(options, profile))
        if part == "embedded":
            return {part: rows}
        tell("peers")
        return {part: rows, "peers": await _peers(options)}
    tell(part)
    measured = {"sessions": _sessions, "snippets": _snippets, "overload": _overload}[part]
    return {part: await measured(options)}


def cold_start_ms(count: int = 21) -> float:
    """Median milliseconds from starting `python -c pass` to its end, one after another: how fast the machine is now."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        command = [sys.executable, "-c", "pass"]  # in a group of its own: Ctrl-C is for us
        subprocess.run(command, env=CLEAN_ENVIRONMENT, check=True, stdin=subprocess.DEVNULL, process_group=0)
        times.append(1e3 * (time.perf_counter() - started))
    return round(percentile(times, 0.5), 2)


async def measure(options: Options, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Everything that `options.parts` names; `tell` hears what is going on. Raises `SandboxError`, `RuntimeError`.

    `speed`: for each part `cold_start_ms` before and after it. A machine that others use is fast and slow by turns.
    """
    report: dict[str, Any] = {"host": machine(), "tier": options.tier, "seconds": options.seconds, "speed": {}}
    for part in options.parts:
        before = cold_start_ms()
        report |= await _part(part, options, tell)
        report["speed"][part] = [before, cold_start_ms()]
    report["host"]["load_after"] = round(os.getloadavg()[0], 2)
    return report
