"""A finished or running run, read back: its recipe, its rollouts, its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from retool.config import Recipe
from retool.errors import UserError
from retool.learner import Learner
from retool.learner import checkpoint as ckpt
from retool.lora import add_adapters
from retool.models import load_model, load_tokenizer
from retool.objectives import find_preset
from retool.records import Group
from retool.rollout.log import RolloutLog
from retool.run_folder import RECIPE, ROLLOUTS
from retool.train import tags_of


class StoredRun:
    """Opens `path` for reading. Raises `UserError` when it is not the folder of an RL run, or holds no weights yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / RECIPE).exists() or not (path / ROLLOUTS / "index.sqlite").exists():
            raise UserError(f"{str(path)!r} is not the folder of an RL run (no {RECIPE} and {ROLLOUTS} in it)")
        self.recipe = Recipe.model_validate(yaml.safe_load((path / RECIPE).read_text(encoding="utf-8")))
        folders = sorted(p for p in (path / "checkpoints").glob("*") if p.name.isdigit())
        self._checkpoints = {int(p.name): p for p in folders}
        if not self._checkpoints:
            raise UserError(
                f"{str(path)!r} has no checkpoint yet; it gets one every {self.recipe.checkpoint_every} steps"
            )
        with RolloutLog(path / ROLLOUTS, read_only=True) as log:
            self.steps = log.steps()
        exact = [c for c in self._checkpoints if c in self.steps]
        self.checkpoint = max(exact) if exact else max(self._checkpoints)
        """Steps done before the weights in use; rollouts of the step of that number were sampled with them."""

    @property
    def weights(self) -> Path:
        """The checkpoint in use."""
        return self._checkpoints[self.checkpoint]

    def choose_steps(self, wanted: Sequence[int] | None) -> list[int]:
        """`wanted` (numbers from 0), or the step that the checkpoint's weights sampled, else the last one. Given steps
        choose the newest checkpoint that is not newer than the first of them, where there is one."""
        if wanted is None:
            return [self.checkpoint] if self.checkpoint in self.steps else self.steps[-1:]
        if missing := [s for s in wanted if s not in self.steps]:
            known = f"{self.steps[0]}..{self.steps[-1]}" if self.steps else "none"
            raise UserError(f"the run has no rollouts of step {missing[0]}; steps: {known}")
        older = [c for c in self._checkpoints if c <= min(wanted)]
        self.checkpoint = max(older) if older else min(self._checkpoints)
        return sorted(set(wanted))

    def groups(self, steps: Sequence[int]) -> list[Group]:
        """Raises `UserError` when nothing in them could be judged."""
        with RolloutLog(self.path / ROLLOUTS, read_only=True) as log:
            found = [g for s in steps for g in log.read_step(s)]
        if not any(g.usable for g in found):
            raise UserError(f"steps {', '.join(map(str, steps))} hold no trajectory with a known reward")
        return found

    def load_policy(self) -> tuple[Any, Any]:
        """(the policy with the checkpoint's weights, tokenizer), fresh each time."""
        tokenizer = load_tokenizer(self._source(), tags_of(self.recipe))
        model = load_model(self._source(), tokenizer, self.recipe.seed)
        if self.recipe.model.lora is not None:
            add_adapters(model, self.recipe.model.lora, self.recipe.seed)
        path = self.weights / "policy.safetensors"
        ckpt.load_module(model, ckpt.read_tensors(path), str(path))
        return model, tokenizer

    def has_role(self, name: str) -> bool:
        return (self.weights / f"{name}.safetensors").exists()

    def has_reference(self) -> bool:
        """In the checkpoint, or as the model that the run started from (with adapters: the policy without them)."""
        return self.has_role("reference") or self._start_exists() or self.recipe.model.lora is not None

    def load_roles(self, learner: Learner) -> None:
        """Give a new learner's reference and critic the run's weights, and its objective what the run remembered."""
        if "reference" in learner.roles and not learner.roles["reference"].borrowed:
            module = learner.roles["reference"].module
            if self.has_role("reference"):
                path = self.weights / "reference.safetensors"
                ckpt.load_module(module, ckpt.read_tensors(path), str(path))
            else:
                tokenizer = load_tokenizer(self.recipe.model, tags_of(self.recipe))
                start = load_model(self.recipe.model, tokenizer, self.recipe.seed)
                module.load_state_dict(start.state_dict())
        if "critic" in learner.roles:
            path = self.weights / "critic.safetensors"
            ckpt.load_module(learner.roles["critic"].module, ckpt.read_tensors(path), str(path))
        state = json.loads((self.weights / "state.json").read_text(encoding="utf-8"))
        learner.version = int(state["version"])

    def family(self, name: str) -> str:
        return find_preset(name).family

    def _start_exists(self) -> bool:
        return self.recipe.model.tiny is not None or Path(self.recipe.model.path or "").is_dir()

    def _source(self) -> Any:
        """Where architecture and tokenizer come from: the model that the run started from, or the one it left (which
        has its adapters merged, so it is no base for them)."""
        if self.recipe.model.lora is None and not self._start_exists() and (self.path / "model").is_dir():
            return self.recipe.model.model_copy(update={"path": str(self.path / "model"), "tiny": None})
        return self.recipe.model
