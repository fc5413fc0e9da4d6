"""Ten thousand mixed executions, hostile among benign: what leaks, what fails, what neighbours notice.

python -m benchmarks.sandbox_battery [--runs 10000] [--tier ns] [--output FILE]

Three parts. *Leaks*: all runs through one embedded sandbox, a fifth of them attacks of the battery; afterwards no
process, mount, descriptor or user id may be gone, no run may have ended as our failure, and the supervisor may not have
grown. *Server*: the same runs over HTTP, and how much the server's process has grown, stored results included.
*Neighbours*: the latency of short runs beside hostile ones, against the same beside as many benign jobs that are
bound by the processor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from sandbox import ExecResult, Limits, LocalSandbox, SandboxError
from sandbox.battery import ATTACKS, Attack, Control
from sandbox.battery.run import descendants, descriptors, idle_inits, mounts
from sandbox.battery.target import Target
from sandbox.bench.targets import server
from sandbox.remote import RemoteSandbox

BENIGN = (
    "print(1)",
    "sum(i * i for i in range(20_000))",
    "print('x' * 5000)",
    "import json; print(json.dumps({'a': [1, 2, 3]}))",
    "def f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f(15))",
    "1 / 0",
    "with open('f', 'w') as file: file.write('x' * 1000)\nprint(open('f').read()[:3])",
    "import itertools; print(len(list(itertools.permutations(range(7)))))",
    "raise SystemExit(3)",
)
CPU_BOUND = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
HOSTILE = (
    "while True: pass",
    "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "while True: print('z' * 100_000)",
    "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "import os\nn = 0\nwhile True:\n  n += 1\n  try: open(f'{n}', 'wb').write(bytes(1 << 20))\n  except OSError: pass",
    "import threading\ndef f():\n  while True: pass\nwhile True:\n"
    "  try: threading.Thread(target=f, daemon=True).start()\n  except RuntimeError: pass",
)
_SHORT = Limits(wall_s=0.5, cpu_s=1, memory_mb=128, file_mb=4, processes=8)


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def rss_mb(pid: int) -> float:
    """Resident MiB of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def state(stats: dict[str, Any], box: LocalSandbox) -> dict[str, int]:
    """What may not grow."""
    pid = stats["supervisor_pid"]
    alive = descendants(pid)
    kept = idle_inits(alive)
    return {
        "processes": len(alive) - kept,
        "mounts": mounts(),
        "descriptors": descriptors(pid) - 2 * kept,
        "folders": sum(entry.name.isdigit() for entry in Path(box._link.folder).iterdir()) if box._link else 0,
    }


def hostile_programs(target: Target) -> list[tuple[str, str, Limits]]:
    """(program, standard input, limits) of the battery's attacks, with less time each."""
    told = json.dumps({**target.told(), "package": __file__}) + "\n"
    programs = []
    for attack in ATTACKS:
        if attack.act is None and not attack.neighbour and len(attack.code) < 100_000:
            programs.append((attack.program(), _stdin(attack, told), _limits(attack)))
    return programs


def _stdin(attack: Attack, told: str) -> str:
    return attack.stdin[:1000] if attack.plain else told + attack.stdin[:1000]


def _limits(attack: Attack) -> Limits:
    endless = attack.control is Control.OUTLIVES
    return Limits(wall_s=0.5 if endless else 5, cpu_s=1 if endless else 5, memory_mb=128, file_mb=4, processes=12)


async def mixed(
    run: Callable[..., Awaitable[ExecResult]], attacks: list[tuple[str, str, Limits]], runs: int, at_once: int
) -> dict[str, Any]:
    """How `runs` programs end, a fifth of them attacks, `at_once` at a time."""
    chance = random.Random(0)
    ends: Counter[str] = Counter()
    waiting = iter(range(runs))

    async def drain() -> None:
        for _ in waiting:
            if chance.random() < 0.2:
                code, stdin, limits = chance.choice(attacks)
            else:
                code, stdin, limits = chance.choice(BENIGN), "", Limits(wall_s=60)
            try:
                ends[(await run(code, stdin=stdin, limits=limits)).status.value] += 1
            except SandboxError as error:
                ends[f"infra:{error.code}"] += 1

    started = time.perf_counter()
    await asyncio.gather(*(drain() for _ in range(at_once)))
    return {
        "runs": runs,
        "seconds": round(time.perf_counter() - started, 1),
        "ends": dict(sorted(ends.items())),
        "infra_errors": sum(count for name, count in ends.items() if name.startswith("infra")),
    }


async def leaks(runs: int, tier: str | None) -> dict[str, Any]:
    """Part one."""
    with Target(unconfined=False) as target:
        attacks = hostile_programs(target)
        async with LocalSandbox("py-bare", tier=tier) as box:
            await _warm(box.exec)
            await asyncio.sleep(2)
            stats = await box.stats()
            before, base = state(stats, box), rss_mb(stats["supervisor_pid"])
            ended = await mixed(box.exec, attacks, runs, 32)
            for _ in range(60):
                await asyncio.sleep(0.5)
                stats = await box.stats()
                after = state(stats, box)
                if all(after[name] <= before[name] for name in before):
                    break
            return {
                "tier": box.tier,
                **ended,
                "leaked": {name: after[name] - before[name] for name in before},
                "leaked_user_ids_or_runs": stats["leaked"],
                "restarts": stats["restarts"],
                "supervisor_rss_growth_mb": round(rss_mb(stats["supervisor_pid"]) - base, 1),
                "disturbances_outside": target.disturbances(),
            }


async def served(runs: int, tier: str | None) -> dict[str, Any]:
    """Part two."""
    options = ("--profile", "py-bare", "--max-wall", "60", *(("--tier", tier) if tier else ()))
    with Target(unconfined=False) as target:
        async with server(*options) as (url, pid), RemoteSandbox(url) as box:
            await _warm(box.exec)
            base = rss_mb(pid)
            ended = await mixed(box.exec, hostile_programs(target), runs, 32)
            return {**ended, "server_rss_growth_mb": round(rss_mb(pid) - base, 1)}


async def _warm(run: Callable[..., Awaitable[ExecResult]]) -> None:
    """Until caches and pools are as large as they get."""
    await asyncio.gather(*(run("print(1)") for _ in range(300)))


async def company(
    box: LocalSandbox, programs: tuple[str, ...], limits: Limits, probes: int, beside: int
) -> list[float]:
    """Milliseconds of `probes` short runs, beside `beside` others that never stop coming."""
    latencies: list[float] = []
    done = asyncio.Event()

    async def keep_coming(first: int) -> None:
        index = first
        while not done.is_set():
            await box.exec(programs[index % len(programs)], limits=limits)
            index += 1

    others = [asyncio.create_task(keep_coming(index)) for index in range(beside)]
    await asyncio.sleep(0.5)
    for _ in range(probes):
        before = time.perf_counter()
        assert (await box.exec("print(1)", limits=Limits(wall_s=60))).ok
        latencies.append(1e3 * (time.perf_counter() - before))
        await asyncio.sleep(0.01)
    done.set()
    await asyncio.gather(*others)
    return latencies


async def neighbours(probes: int, tier: str | None) -> dict[str, Any]:
    """Part three: as many others as there are cores, with one worker free for the short runs."""
    cores = len(os.sched_getaffinity(0))
    rows: dict[str, Any] = {"probes": probes, "beside": cores}
    async with LocalSandbox("py-bare", tier=tier, workers=cores + 1) as box:
        for name, programs in (("benign", (CPU_BOUND,)), ("hostile", HOSTILE)):
            values = await company(box, programs, _SHORT if name == "hostile" else Limits(), probes, cores)
            rows[name] = {f"p{int(100 * share)}_ms": round(percentile(values, share), 2) for share in (0.5, 0.95, 0.99)}
        assert (await box.stats())["leaked"] == 0
    rows["p99_ratio"] = round(rows["hostile"]["p99_ms"] / rows["benign"]["p99_ms"], 2)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--probes", type=int, default=2000)
    parser.add_argument("--tier", default=None)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release().split('-')[0]}",
        "neighbours": asyncio.run(neighbours(options.probes, options.tier)),
        "leaks": asyncio.run(leaks(options.runs, options.tier)),
        "server": asyncio.run(served(options.runs, options.tier)),
    }
    result["load"] = round(os.getloadavg()[0], 2)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
