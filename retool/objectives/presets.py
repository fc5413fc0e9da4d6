"""The table of algorithms: each preset is a recipe fragment, merged under what the user wrote."""

from __future__ import annotations

import difflib
from copy import deepcopy
from typing import Any

from retool.objectives.base import ObjectiveError
from retool.objectives.dotted import imported
from retool.objectives.preset import Preset
from retool.objectives.tables import actor_critic, agent, entropy, imitation, policy_gradient

_TABLE = (*imitation.ROWS, *policy_gradient.ROWS, *actor_critic.ROWS, *entropy.ROWS, *agent.ROWS)
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
    value = imported(name, "preset")
    if not isinstance(value, Preset):
        raise ObjectiveError(f"{name!r} is a {type(value).__name__}, not a retool.objectives.Preset")
    return value
