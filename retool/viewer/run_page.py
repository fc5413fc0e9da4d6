"""`retool view RUN`: one offline page of an RL run, read from its rollout log and learner ledger."""

from __future__ import annotations

from pathlib import Path

import yaml

from retool.config import Recipe
from retool.entropy_law import fit_run
from retool.errors import UserError
from retool.files import write_text
from retool.models import load_tokenizer
from retool.protocols import build_protocol
from retool.protocols.codec import Codec
from retool.rollout.log import RolloutLog
from retool.rollout.step_ledger import read_steps
from retool.run_folder import LEDGER, RECIPE, ROLLOUTS
from retool.train import tags_of
from retool.viewer.demo_page import law_table, rl_charts
from retool.viewer.page import Page, render, trace_view

GROUPS_SHOWN = 3


def write_run_page(run: Path, out: Path) -> Path:
    """Raises `UserError` when `run` is not a run folder."""
    if not (run / RECIPE).exists() or not (run / LEDGER).exists():
        raise UserError(f"{str(run)!r} is not the folder of an RL run (no {RECIPE} and {LEDGER} in it)")
    recipe = Recipe.model_validate(yaml.safe_load((run / RECIPE).read_text(encoding="utf-8")))
    metrics = [r.metrics for r in read_steps(run / LEDGER) if r.metrics is not None]
    codec = Codec(load_tokenizer(recipe.model, tags_of(recipe)), build_protocol(recipe.protocol))
    page = Page(recipe.name, f"{len(metrics)} of {recipe.steps} steps, objective {recipe.objective.preset}.")
    page.charts = rl_charts(metrics)
    if metrics:
        last = metrics[-1]
        rows = [[k, f"{v:.6g}"] for k, v in sorted(last.items())]
        page.tables = [*law_table(fit_run(metrics)), ("Last step", ["metric", "value"], rows)]
        with RolloutLog(run / ROLLOUTS, read_only=True) as log:
            steps = log.steps()
            for step in dict.fromkeys((steps[0], steps[-1])) if steps else ():
                views = [
                    trace_view(t, codec, f"{g.problem.prompt} — sample {t.index}")
                    for g in log.read_step(step)[:GROUPS_SHOWN]
                    for t in g.trajectories[:2]
                ]
                page.trace_groups.append((f"Trajectories of step {step + 1}", views))
    write_text(out, render(page))
    return out
