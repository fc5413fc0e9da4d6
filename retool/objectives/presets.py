"""The table of algorithms: each preset is a recipe fragment, merged under what the user wrote."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from retool.objectives.base import ObjectiveError
from retool.objectives.objective import Objective


@dataclass(frozen=True)
class Preset:
    """`fragment`: nested keys of a recipe. `source`: where the values come from. `compose`: for what no key can say:
    receives the objective that the keys describe and returns the one to use, e.g. with another term."""

    name: str
    family: str
    source: str
    summary: str
    fragment: dict[str, Any] = field(default_factory=dict)
    compose: Callable[[Objective], Objective] | None = None


_TABLE = (
    Preset(
        name="sft",
        family="imitation",
        source="token-mean negative log-likelihood over the global batch",
        summary="imitate demonstrations; tool output is context, never a target",
        fragment={
            "objective": {
                "train_on": "demo",
                "advantage": {"kind": "none"},
                "policy": {"kind": "none"},
                "nll": {"coef": 1.0},
                "aggregation": {"mode": "token_mean"},
            },
        },
    ),
    Preset(
        name="grpo",
        family="group",
        source="DeepSeekMath, arXiv 2402.03300: G 64, clip 0.2, k3 in the loss with beta 0.04, lr 1e-6",
        summary="clipped policy gradient with the group's mean and standard deviation as the baseline",
        fragment={
            "objective": {
                "structure": "group",
                "advantage": {"kind": "zscore", "std": "sample", "eps": 1e-6},
                "policy": {"kind": "clip", "clip_low": 0.2, "clip_high": 0.2},
                "aggregation": {"mode": "seq_mean_token_mean"},
                "kl": {"place": "loss", "estimator": "k3", "beta": 0.04},
                "reference": {"kind": "frozen"},
            },
            "rollout": {"group_size": 64},
            "learner": {"lr": 1e-6, "updates": 1},
        },
    ),
    Preset(
        name="ppo",
        family="actor-critic",
        source="PPO, arXiv 1707.06347, as in RLHF practice: lambda = gamma = 1, k1 in the reward with beta 0.01, "
        "value clip 0.2 (arXiv 2404.10719)",
        summary="clipped policy gradient with a critic; GAE skips tool output",
        fragment={
            "objective": {
                "advantage": {"kind": "gae", "gamma": 1.0, "lam": 1.0, "lam_value": 1.0, "whiten": True},
                "policy": {"kind": "clip", "clip_low": 0.2, "clip_high": 0.2},
                "aggregation": {"mode": "token_mean"},
                "kl": {"place": "reward", "estimator": "k1", "beta": 0.01},
                "reference": {"kind": "frozen"},
                "critic": {"kind": "policy", "value_clip": 0.2},
            },
            "rollout": {"group_size": 1},
            "learner": {"lr": 1e-6, "updates": 4},
        },
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _TABLE}


def find_preset(name: str) -> Preset:
    """A preset by name, or by `module:NAME`. Raises `ObjectiveError`, offering the nearest name."""
    if name in PRESETS:
        return PRESETS[name]
    if ":" in name:
        return _imported(name)
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ObjectiveError(
        f"there is no preset {name!r}; {hint}Presets: {', '.join(PRESETS)}; your own is named `module:NAME`"
    )


def preset_fragment(name: str) -> dict[str, Any]:
    """A copy of the preset's recipe fragment, its name included as `objective.preset`."""
    fragment = deepcopy(find_preset(name).fragment)
    fragment.setdefault("objective", {})["preset"] = name
    return fragment


def _imported(name: str) -> Preset:
    module, _, attribute = name.partition(":")
    try:
        value = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ObjectiveError(f"preset {name!r} cannot be imported: {error}") from error
    if not isinstance(value, Preset):
        raise ObjectiveError(f"{name!r} is a {type(value).__name__}, not a retool.objectives.Preset")
    return value
