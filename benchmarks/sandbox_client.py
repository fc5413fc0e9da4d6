"""What `RemoteSandbox` costs its caller, two versions side by side: latency, rate, CPU time in the caller's process.

    git worktree add ../before COMMIT
    python -m benchmarks.sandbox_client ../before . --output benchmarks/sandbox_client.json

Each version has a client process and a server of its own. They take turns: `print(1)` one after another, in a session
and as one-shot runs, at once and after pauses; and in 32 sessions at the same time, as a trainer's rollouts would.
Written down: medians of the rounds, and of the rounds' ratios.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from sandbox.bench import targets
from sandbox.bench.load import percentile
from sandbox.bench.main import machine
from sandbox.loops import new_event_loop
from sandbox.remote import RemoteSandbox
from sandbox.types import Session

CASES = {"session": 0.0, "session, pauses": 0.008, "one-shot": 0.0, "one-shot, pauses": 0.008, "sessions": 0.0}
"""Seconds of pause before each execution."""
_SESSIONS = 32
Row = dict[str, float]


async def calls(interpreter: Session | RemoteSandbox, count: int, pause_s: float, times: list[float]) -> None:
    """So many executions, one after another; their milliseconds go into `times`."""
    for _ in range(count):
        await asyncio.sleep(pause_s)
        started = time.perf_counter()
        result = await interpreter.exec("print(1)")
        times.append(1e3 * (time.perf_counter() - started))
        assert result.ok, result


async def work(tier: str, count: int) -> None:
    """The client of one version: for each case named on standard input, one line of figures."""
    async with (
        targets.server("--tier", tier, "--profile", "py-bare") as (url, _),
        RemoteSandbox([url]) as box,
    ):
        sessions = [await box.session() for _ in range(_SESSIONS)]
        while name := (await asyncio.to_thread(sys.stdin.readline)).strip():
            interpreters = sessions if name == "sessions" else [box if name.startswith("one") else sessions[0]]
            times: list[float] = []
            started, cpu = time.perf_counter(), time.process_time()
            await asyncio.gather(*(calls(each, count, CASES[name], times) for each in interpreters))
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            row = {"p50_ms": percentile(times, 0.5), "per_s": len(times) / seconds, "cpu_ms": 1e3 * cpu / len(times)}
            print(json.dumps(row), flush=True)


def _medians(name: str, pairs: list[tuple[Row, Row]]) -> dict[str, Any]:
    report: dict[str, Any] = {"case": name, "pause_s": CASES[name]}
    for unit in ("p50_ms", "per_s", "cpu_ms"):
        first, second = ([pair[index][unit] for pair in pairs] for index in (0, 1))
        report[unit] = {
            "first": round(percentile(first, 0.5), 3),
            "second": round(percentile(second, 0.5), 3),
            "median_of_ratios": round(percentile([b / a for a, b in zip(first, second, strict=True)], 0.5), 3),
        }
    return report


def compare() -> None:
    """See the module."""
    from benchmarks import versions

    parser = versions.parser(__doc__)
    parser.add_argument("--tier", default="ns")
    parser.add_argument("--count", type=int, default=150, help="executions of a round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    worker = ("--worker", options.tier, str(options.count))
    clients = [versions.start(__file__, folder, *worker) for folder in versions.pair(parser, options)]
    report: dict[str, Any] = {"host": machine(), "tier": options.tier, "count": options.count, "cases": []}
    for name in CASES:
        pairs = versions.turns(options.rounds, lambda index, name=name: json.loads(versions.ask(clients[index], name)))
        report["cases"].append(_medians(name, list(pairs)))
        print(json.dumps(report["cases"][-1]), flush=True)
    for client in clients:
        client.communicate()
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(work(sys.argv[2], int(sys.argv[3])))
    else:
        compare()
