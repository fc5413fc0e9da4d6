"""`make demo`: the main job on a small model, start to end, in a few minutes on two CPU cores.

Cold-start traces (every block executed) -> SFT of a from-scratch model -> multi-turn RL with the live sandbox ->
evaluation on held-out problems with the tool and with the code tag banned -> table, report.html, summary.json.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

from retool.config import Recipe
from retool.console import bar, console, metrics_line, table
from retool.data_command import generate_data
from retool.errors import UserError
from retool.evaluate import evaluate, scorecard
from retool.files import writable_folder, write_json, write_text
from retool.models import load_model, load_tokenizer
from retool.problems import load_problems
from retool.protocols import build_protocol
from retool.protocols.codec import Codec
from retool.recipe import dump_recipe
from retool.records import Trajectory
from retool.sft import sft
from retool.train import set_threads, tags_of, train
from retool.viewer.demo_page import STAGES, demo_page, summary_rows
from retool.viewer.page import render
from retool.workshop import open_workshop

OURS = ("sft", "rl", "traces.jsonl", "report.html", "summary.json", "recipe.yaml")


def run_demo(recipe: Recipe) -> dict[str, Any]:
    """Run every stage, print the table, write the files. Returns the summary. Raises `UserError`, `SandboxError`."""
    if recipe.sft is None or recipe.data is None or recipe.eval.problems is None:
        raise UserError("a demo recipe needs the sections data, sft and eval.problems")
    out = _fresh(Path(recipe.out))
    write_text(out / "recipe.yaml", dump_recipe(recipe))
    started = time.monotonic()
    seconds: dict[str, float] = {}
    evaluations: dict[str, dict[str, list[Trajectory]]] = {}

    def timed(stage: str, since: float) -> None:
        seconds[stage] = round(time.monotonic() - since, 1)

    t = time.monotonic()
    generate_data(recipe)
    timed("data", t)
    evaluations["base"] = evaluate_stage(recipe, "base")
    t = time.monotonic()
    with bar("SFT", recipe.sft.steps) as progress:
        sft_result = sft(recipe, on_step=lambda s, m: progress.update(s + 1, metrics_line(m)))
    timed("sft", t)
    after_sft = with_model(recipe, sft_result.folder.model)
    evaluations["sft"] = evaluate_stage(after_sft, "sft")
    t = time.monotonic()
    with bar("RL", recipe.steps) as progress:
        rl_recipe = after_sft.model_copy(update={"out": str(out / "rl")})
        rl = asyncio.run(train(rl_recipe, on_step=lambda s, m: progress.update(s + 1, metrics_line(m))))
    timed("rl", t)
    evaluations["rl"] = evaluate_stage(with_model(recipe, rl.folder.model), "rl")
    timed("total", started)
    summary = {
        "stages": {stage: stage_summary(evaluations[stage]) for stage in STAGES},
        "seconds": seconds,
        "rollout": rollout_summary(rl.metrics),
    }
    write_json(out / "summary.json", summary)
    codec = Codec(load_tokenizer(recipe.model, tags_of(recipe)), build_protocol(recipe.protocol))
    write_text(out / "report.html", render(demo_page(summary, sft_result.metrics, rl.metrics, evaluations, codec)))
    print_summary(summary)
    console.print(f"report: {out / 'report.html'}   figures: {out / 'summary.json'}", markup=False)
    return summary


def with_model(recipe: Recipe, path: Path) -> Recipe:
    """The same recipe with another starting model."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(path), "tiny": None})})


def evaluate_stage(recipe: Recipe, stage: str) -> dict[str, list[Trajectory]]:
    """Held-out trajectories with the tool and without it."""
    set_threads(recipe)
    assert recipe.eval.problems is not None
    problems = load_problems(recipe.eval.problems)
    tokenizer = load_tokenizer(recipe.model, tags_of(recipe))
    model = load_model(recipe.model, tokenizer, recipe.seed)
    each = len(problems) * recipe.eval.samples

    async def run() -> dict[str, list[Trajectory]]:
        out: dict[str, list[Trajectory]] = {}
        with bar(f"evaluation ({stage})", 2 * each) as progress:
            async with open_workshop(recipe, model, tokenizer, lockstep=recipe.deterministic) as workshop:
                for i, (name, tool) in enumerate((("tool", True), ("no_tool", False))):
                    out[name] = await evaluate(
                        workshop,
                        recipe,
                        problems,
                        tool=tool,
                        progress=lambda done, _, offset=i * each: progress.update(offset + done),
                    )
        return out

    return asyncio.run(run())


def stage_summary(evaluation: dict[str, list[Trajectory]]) -> dict[str, Any]:
    """{"tool": figures, "no_tool": figures, "by_family": {family: {"tool": ..., "no_tool": ...}}}"""
    cards = {name: scorecard(trajectories) for name, trajectories in evaluation.items()}
    by_family: dict[str, dict[str, Any]] = {}
    for name, card in cards.items():
        for family, figures in card.pop("by_family").items():
            by_family.setdefault(family, {})[name] = figures
    return {**cards, "by_family": by_family}


def rollout_summary(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Whole-run guarantees: nothing lost to infrastructure, trained ids are the sampled ones, log-probs agree."""
    return {
        "infra_failures": metrics[-1].get("count/infra_failures", 0.0),
        "trained_equals_sampled": min(m.get("trained_equals_sampled", 1.0) for m in metrics),
        "max_logprob_gap": max(m.get("max_logprob_gap", 0.0) for m in metrics),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """The table in the terminal."""
    header, rows = summary_rows(summary)
    console.print(table("held-out problems (intervals are 95 %)", header, rows))
    console.print("  ".join(f"{k} {v} s" for k, v in summary["seconds"].items()), markup=False)


def _fresh(out: Path) -> Path:
    """An empty demo folder; what an earlier demo left is removed, anything else in it is left alone."""
    writable_folder(out)
    for name in OURS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return out
