"""Does the demo really teach? Three seeds, and the same RL with shuffled rewards as the control.

    python -m benchmarks.demo_seeds [--seeds 0 1 2] [--recipe recipes/demo.yaml]

For each seed: the whole demo (data, SFT, RL, evaluations), then RL again from the same SFT model with the scores of
each step permuted over its trajectories. Writes benchmarks/demo_seeds.json: figures by family and four verdicts.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import math
import statistics
from pathlib import Path
from typing import Any

from retool.console import bar, console, metrics_line, table
from retool.demo import evaluate_stage, run_demo, stage_summary, with_model
from retool.files import write_json
from retool.recipe import load_recipe
from retool.rollout.step_ledger import read_steps
from retool.train import train
from retool.viewer.charts import line_chart
from retool.viewer.demo_page import by_family

EASY = "last"
OUT = Path(__file__).with_suffix(".json")
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t, two-sided, by degrees of freedom


def run_seed(recipe_path: str, seed: int) -> dict[str, Any]:
    """One demo and its shuffled control."""
    out = Path("runs/demo_seeds") / str(seed)
    recipe = load_recipe(recipe_path, [f"seed={seed}", f"out={out}"])
    summary = run_demo(recipe)
    control = with_model(recipe, out / "sft" / "model").model_copy(
        update={"out": str(out / "shuffled"), "reward": recipe.reward.model_copy(update={"shuffle": True})}
    )
    with bar("RL, shuffled rewards", control.steps) as progress:
        result = asyncio.run(train(control, on_step=lambda s, m: progress.update(s + 1, metrics_line(m))))
    shuffled = stage_summary(evaluate_stage(with_model(recipe, result.folder.model), "shuffled"))
    summary["stages"]["shuffled"] = shuffled
    return summary


def paired(differences: list[float]) -> dict[str, Any]:
    """Mean of per-seed differences with its 95 % t interval."""
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return {"mean": mean, "ci95": [math.nan, math.nan], "by_seed": differences}
    half = T_95.get(n - 1, 1.96) * statistics.stdev(differences) / math.sqrt(n)
    return {"mean": mean, "ci95": [mean - half, mean + half], "by_seed": differences}


def verdicts(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the demo claims, computed from the figures."""
    families = list(runs[0]["stages"]["rl"]["by_family"])
    hard = [f for f in families if f != EASY]

    def figure(run: dict[str, Any], stage: str, family: str, key: str) -> float:
        return float(run["stages"][stage]["by_family"][family]["tool"][key])

    def gain(family: str, stage: str) -> dict[str, Any]:
        return paired([figure(r, stage, family, "accuracy") - figure(r, "sft", family, "accuracy") for r in runs])

    def separated(run: dict[str, Any], family: str) -> bool:
        before, after = (run["stages"][s]["by_family"][family]["tool"]["ci95"] for s in ("sft", "rl"))
        return bool(after[0] > before[1])

    return {
        "gain_rl": {f: gain(f, "rl") for f in families},
        "gain_shuffled": {f: gain(f, "shuffled") for f in families},
        "rl_beats_sft_beyond_the_interval_on_tool_families": all(separated(r, f) for r in runs for f in hard),
        "easy_family_loses_no_accuracy": all(
            figure(r, "rl", EASY, "accuracy") >= r["stages"]["sft"]["by_family"][EASY]["tool"]["ci95"][0] for r in runs
        ),
        "easy_family_calls_less_than_tool_families": all(
            figure(r, "rl", EASY, "code_ratio") < min(figure(r, "rl", f, "code_ratio") for f in hard) for r in runs
        ),
        "shuffled_rewards_improve_nothing": all(gain(f, "shuffled")["ci95"][0] <= 0 for f in families),
    }


def write_picture(ledger: Path) -> None:
    """Who calls the tool over RL steps, by family, as an SVG beside this file."""
    metrics = [r.metrics for r in read_steps(ledger) if r.metrics is not None]
    uri = line_chart("Share of answers that call the tool", by_family(metrics, "code_ratio"), bounded=True)
    Path(__file__).with_name("demo_when.svg").write_bytes(base64.b64decode(uri.partition(",")[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    args = parser.parse_args()
    runs = [run_seed(args.recipe, seed) for seed in args.seeds]
    result = {
        "command": f"python -m benchmarks.demo_seeds --seeds {' '.join(map(str, args.seeds))} --recipe {args.recipe}",
        "verdicts": verdicts(runs),
        "runs": dict(zip(map(str, args.seeds), runs, strict=True)),
    }
    write_json(OUT, result)
    write_picture(Path("runs/demo_seeds") / str(args.seeds[0]) / "rl" / "learner.jsonl")
    rows = [[name, str(value)] for name, value in result["verdicts"].items() if isinstance(value, bool)]
    console.print(table("verdicts", ["claim", "holds"], rows))


if __name__ == "__main__":
    main()
