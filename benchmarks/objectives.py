"""Every preset trains for the same small budget from one start, and each card's prediction is put to the test.

    python -m benchmarks.objectives [--steps 16] [--seeds 0 1 2] [--jobs 2] [--budget-minutes 60] [--only grpo dapo]

The demo's task, model and live sandbox; 8 problems x 8 trajectories a step, four optimiser steps each. The first seed
runs for all presets, the others for those that a claim is about. What is finished is kept in benchmarks/objectives.json
and not run again; the table goes to benchmarks/objectives.md, the picture to benchmarks/objectives.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.objectives_claims import CLAIMS, claimed, judge
from benchmarks.objectives_run import GROUP, HELD_OUT, LR, PROMPTS, RUNS, UPDATES, make_start, names, run_one
from benchmarks.objectives_table import picture, tables
from retool.console import console
from retool.files import write_json, write_text

OUT = Path(__file__).with_suffix(".json")


def settings(steps: int) -> dict[str, Any]:
    """What makes two results comparable."""
    rollout = {"steps": steps, "prompts": PROMPTS, "group_size": GROUP}
    return {"recipe": "recipes/demo.yaml", **rollout, "updates": UPDATES, "lr": LR, "held_out": HELD_OUT}


def plan(seeds: list[int], only: list[str] | None) -> list[tuple[str, int]]:
    """(name, seed) in order of importance: everything once, then what claims need."""
    wanted = [n for n in names() if not only or n in only]
    rest = [n for n in wanted if n in claimed()]
    return [(n, seeds[0]) for n in wanted] + [(n, s) for s in seeds[1:] for n in rest]


def load(out: Path, steps: int) -> dict[str, Any]:
    """What is there already. Exits when it was measured with other settings."""
    if not out.exists():
        return {"settings": settings(steps), "start": {}, "runs": {}}
    found = json.loads(out.read_text(encoding="utf-8"))
    if found["settings"] != settings(steps):
        raise SystemExit(f"{out} was measured with {found['settings']}, this is {settings(steps)}; move it away first")
    return dict(found)


def start(name: str, seed: int, steps: int, threads: int) -> tuple[subprocess.Popen[bytes], Path]:
    """One run as a process of its own; its result and its output stand beside its folder."""
    RUNS.mkdir(parents=True, exist_ok=True)
    stem = RUNS / f"{''.join(c if c.isalnum() or c == '_' else '-' for c in name)}-{seed}"
    result, log = stem.with_suffix(".json"), stem.with_suffix(".log")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.objectives", "--one", name, str(seed), str(result)]
    command += ["--steps", str(steps), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment), result


def collect(out: Path, data: dict[str, Any], todo: list[tuple[str, int]], args: argparse.Namespace) -> None:
    """Run what is missing, `--jobs` at a time; each result is written as soon as it is there."""
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    limit = time.monotonic() + 60 * args.budget_minutes
    running: dict[tuple[str, int], tuple[subprocess.Popen[bytes], Path]] = {}
    waiting = [t for t in todo if str(t[1]) not in data["runs"].get(t[0], {})]
    total, done = len(waiting), 0
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs and time.monotonic() < limit:
                key = waiting.pop(0)
                running[key] = start(*key, args.steps, threads)
            if not running:
                console.print(f"out of time: {len(waiting)} runs are left; start it again to go on")
                return
            time.sleep(0.2)
            for key, (process, result) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[key]
                done += 1
                if process.returncode == 0 and result.exists():
                    data["runs"].setdefault(key[0], {})[str(key[1])] = json.loads(result.read_text(encoding="utf-8"))
                    data["failed"] = [f for f in data.get("failed", []) if f["run"] != list(key)]
                    write_json(out, data)
                    console.print(f"{done}/{total} {key[0]}, seed {key[1]}", markup=False)
                else:
                    tail = result.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
                    others = [f for f in data.get("failed", []) if f["run"] != list(key)]
                    data["failed"] = [*others, {"run": list(key), "why": " ".join(tail)[-300:]}]
                    write_json(out, data)
                    console.print(f"{done}/{total} {key[0]}, seed {key[1]}: failed, see its log; {tail}", markup=False)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def report(out: Path, data: Mapping[str, Any]) -> None:
    """Verdicts into the JSON, the tables and the picture beside it."""
    verdicts = [judge(c, data["runs"]) for c in CLAIMS]
    write_json(out, {**data, "claims": verdicts})
    write_text(out.with_suffix(".md"), tables(data, verdicts))
    if data["runs"]:
        out.with_suffix(".svg").write_bytes(picture(data))
    for row in verdicts:
        console.print(f"{row['verdict']:<32} {row['claim']}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of presets or variants")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--budget-minutes", type=float, default=1e9, help="start no further run after so long")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=3, metavar=("NAME", "SEED", "RESULT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, seed, result = args.one
        write_json(Path(result), run_one(name, int(seed), args.steps, args.threads))
        return
    if unknown := set(args.only or ()) - set(names()):
        raise SystemExit(f"there is no {', '.join(sorted(unknown))}; names: {', '.join(names())}")
    data = load(args.out, args.steps)
    data["start"] = make_start(os.cpu_count() or 1)
    collect(args.out, data, plan(args.seeds, args.only), args)
    report(args.out, data)


if __name__ == "__main__":
    main()
