"""`retool eval`: a model on held-out problems, a table, and on request every trajectory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from retool.config import ProblemsConfig, Recipe
from retool.console import bar, console, table
from retool.errors import UserError
from retool.evaluate import evaluate, scorecard
from retool.files import write_json
from retool.models import load_model, load_tokenizer
from retool.problems import load_problems
from retool.protocols.codec import Codec
from retool.recipe import default_recipe, load_recipe
from retool.records import Trajectory
from retool.train import set_threads, tags_of
from retool.viewer.page import trace_view
from retool.workshop import open_workshop

STYLES = {"prompt": "dim", "policy": "", "code": "cyan", "observation": "yellow"}


def run_eval(
    model: str,
    problems: Path,
    overrides: Sequence[str],
    *,
    recipe: Path | None,
    k: int,
    limit: int | None,
    tool: bool,
    out: Path | None,
    show: int,
) -> dict[str, Any]:
    """Raises `UserError` when model, problems or recipe cannot be used."""
    settings = eval_recipe(model, problems, overrides, recipe, k, limit)
    set_threads(settings)
    assert settings.eval.problems is not None
    rows = load_problems(settings.eval.problems)
    tokenizer = load_tokenizer(settings.model, tags_of(settings))
    network = load_model(settings.model, tokenizer, settings.seed)

    async def run() -> tuple[list[Trajectory], Codec]:
        with bar("evaluation", len(rows) * k) as progress:
            async with open_workshop(settings, network, tokenizer, lockstep=settings.deterministic) as workshop:
                trajectories = await evaluate(
                    workshop, settings, rows, tool=tool, progress=lambda done, _: progress.update(done)
                )
                return trajectories, workshop.codec

    trajectories, codec = asyncio.run(run())
    card = scorecard(trajectories)
    print_card(card, f"{model}, {'with' if tool else 'without'} the tool{probe_note(settings)}")
    for t in trajectories[:show]:
        print_trajectory(t, codec)
    if out is not None:
        write_json(out, {"figures": card, "trajectories": [trajectory_row(t, codec) for t in trajectories]})
        console.print(f"wrote {out}", markup=False)
    return card


def probe_note(recipe: Recipe) -> str:
    """What the title of a table says about temperatures that depend on the position."""
    e = recipe.eval
    if e.fork_temperature is None and e.rest_temperature is None:
        return ""
    fork = e.temperature if e.fork_temperature is None else e.fork_temperature
    rest = e.temperature if e.rest_temperature is None else e.rest_temperature
    return f", temperature {fork:g} where the entropy is above {e.fork_entropy:g}, {rest:g} elsewhere"


def eval_recipe(
    model: str, problems: Path, overrides: Sequence[str], recipe: Path | None, k: int, limit: int | None
) -> Recipe:
    """The recipe of an evaluation: from `--recipe`, or from PROBLEMS when that is a recipe, else the defaults."""
    is_recipe = problems.suffix in (".yaml", ".yml")
    base = recipe or (problems if is_recipe else None)
    settings = load_recipe(base, overrides) if base is not None else default_recipe(overrides)
    if is_recipe:
        held_out = load_recipe(problems).eval.problems if recipe is not None else settings.eval.problems
        if held_out is None:
            raise UserError(f"{problems} has no eval.problems; add it, or give a .jsonl of problems")
    elif problems.suffix in (".jsonl", ".parquet"):
        held_out = (settings.eval.problems or ProblemsConfig()).model_copy(
            update={"kind": problems.suffix[1:], "path": str(problems)}
        )
    else:
        raise UserError(f"problems {str(problems)!r}: give a recipe (.yaml), or rows (.jsonl, .parquet)")
    if limit is not None:
        held_out = held_out.model_copy(update={"count": min(limit, held_out.count or limit)})
    start = settings.model if model == "-" else settings.model.model_copy(update={"path": model, "tiny": None})
    return settings.model_copy(
        update={
            "model": start,
            "eval": settings.eval.model_copy(update={"problems": held_out, "samples": k}),
        }
    )


def print_card(card: dict[str, Any], title: str) -> None:
    """Accuracy with interval, share of answers with code, of calls that ran, tokens, truncated and lost ones."""
    parts = {"all": card, **(card["by_family"] if len(card["by_family"]) > 1 else {})}
    header = ["problems", "n", "accuracy (95 %)", "code", "calls ok", "length", "cut", "lost"]
    rows = []
    for name, p in parts.items():
        figures = [p.get(key, float("nan")) for key in ("code_ratio", "calls_ok", "length", "truncated")]
        low, high = p["ci95"]
        rows.append(
            [name, str(p["n"]), f"{p['accuracy']:.2f} ({low:.2f}–{high:.2f})"]
            + [f"{v:.2f}" for v in figures]
            + [str(p["dropped"])]
        )
    console.print(table(title, header, rows))


def print_trajectory(trajectory: Trajectory, codec: Codec) -> None:
    """A whole trajectory, coloured by who wrote what."""
    view = trace_view(trajectory, codec)
    console.rule(f"{view.verdict}: {trajectory.problem.id}")
    text = Text()
    for part in view.parts:
        text.append(part.text, style=STYLES[part.kind])
    console.print(text)
    console.print(view.notes, markup=False, style="dim")


def trajectory_row(t: Trajectory, codec: Codec) -> dict[str, Any]:
    """A trajectory as JSON."""
    return {
        "id": t.id,
        "problem": t.problem.id,
        "prompt": t.problem.prompt,
        "reference": t.problem.answer,
        "status": t.status,
        "accuracy": t.reward.accuracy if t.reward is not None else None,
        "answer": t.reward.answer if t.reward is not None else None,
        "flags": [*t.flags, *(t.reward.flags if t.reward is not None else ())],
        "parts": [{"kind": p.kind, "text": p.text} for p in trace_view(t, codec).parts],
        "tool_calls": [{"code": c.code, "status": c.status, "observation": c.observation} for c in t.tool_calls],
    }
