"""The recipe that supervised fine-tuning runs with: the `sft` section in the place of the RL one."""

from __future__ import annotations

from retool.config import ObjectiveConfig, Recipe, SftConfig
from retool.objectives import preset_fragment


def sft_recipe(recipe: Recipe) -> Recipe:
    """The same run with objective `sft` and the learning rate, schedule and steps of `recipe.sft` (or its defaults)."""
    sft = recipe.sft or SftConfig()
    learner = recipe.learner.model_copy(
        update={
            "lr": sft.lr,
            "schedule": sft.schedule,
            "warmup_steps": sft.warmup_steps,
            "weight_decay": sft.weight_decay,
            "updates": 1,
            "epochs": 1,
        }
    )
    objective = ObjectiveConfig(**preset_fragment("sft")["objective"])
    return recipe.model_copy(update={"objective": objective, "learner": learner, "steps": sft.steps})
