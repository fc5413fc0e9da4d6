"""The folder of a run: its resolved recipe, rollout log, learner ledger and checkpoints.

out/recipe.yaml           the recipe with every value filled in
out/rollouts/             the rollout log (who said what, what was rewarded)
out/learner.jsonl         what was trained on, step by step, and the metrics
out/checkpoints/00000010  learner state after 10 steps; `latest` is the highest complete one
out/model/                the trained policy as a transformers folder
out/adapter/              with `model.lora`: its adapters alone (they are merged into out/model)
out/pretrain/, out/critic/  the value pretraining (see retool/pretrain.py) and the critic it made
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from retool.config import Recipe
from retool.errors import UserError
from retool.files import writable_folder, write_text
from retool.recipe import dump_recipe

# What may differ between a run and its continuation: nothing that changes what is sampled or learnt.
FREE_ON_RESUME = ("steps", "checkpoint_every", "eval", "out", "sandbox", "name")
KEEP_CHECKPOINTS = 2
RECIPE, LEDGER, ROLLOUTS = "recipe.yaml", "learner.jsonl", "rollouts"


class RunFolder:
    """Opens a new run, or an existing one to go on with. Raises `UserError` when asked for the wrong one."""

    def __init__(self, recipe: Recipe, *, resume: bool) -> None:
        self.path = Path(recipe.out)
        saved = self.path / RECIPE
        if saved.exists() and not resume and self._begun():
            raise UserError(
                f"{str(self.path)!r} already holds a run; add --resume to go on with it, "
                "or choose another folder with out=FOLDER"
            )
        if resume and not saved.exists():
            raise UserError(f"there is no run to resume in {str(self.path)!r}; leave out --resume to start one")
        if resume:
            _same_run(yaml.safe_load(saved.read_text(encoding="utf-8")), recipe, self.path)
        writable_folder(self.path)
        write_text(saved, dump_recipe(recipe))
        (self.path / "checkpoints").mkdir(exist_ok=True)

    def _begun(self) -> bool:
        """Whether the run that lies here sampled or learnt anything; one that could not open its engine did not."""
        shards, checkpoints = self.rollouts / "shards", self.path / "checkpoints"
        return any(folder.is_dir() and any(folder.iterdir()) for folder in (shards, checkpoints)) or any(
            file.exists() and file.stat().st_size > 0 for file in (self.ledger, self.path / "metrics.jsonl")
        )

    @property
    def rollouts(self) -> Path:
        return self.path / ROLLOUTS

    @property
    def ledger(self) -> Path:
        return self.path / LEDGER

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def checkpoint(self, steps_done: int) -> Path:
        return self.path / "checkpoints" / f"{steps_done:08d}"

    def latest(self) -> tuple[int, Path] | None:
        """(steps done, folder) of the newest complete checkpoint. Unfinished ones have a dot in front."""
        done = sorted(p for p in (self.path / "checkpoints").iterdir() if p.name.isdigit())
        return (int(done[-1].name), done[-1]) if done else None

    def prune(self) -> None:
        """Keep the newest checkpoints."""
        done = sorted(p for p in (self.path / "checkpoints").iterdir() if p.name.isdigit())
        for old in done[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)


def _same_run(saved: dict[str, Any], recipe: Recipe, path: Path) -> None:
    now = recipe.model_dump(mode="json")
    before = Recipe.model_validate(saved).model_dump(mode="json")
    changed = [k for k in now if k not in FREE_ON_RESUME and now[k] != before[k]]
    if changed:
        raise UserError(
            f"the recipe differs from the one that {str(path)!r} was started with, in: {', '.join(changed)}; "
            f"only {', '.join(FREE_ON_RESUME)} may change on --resume"
        )
