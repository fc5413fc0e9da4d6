"""What a preset is: a recipe fragment with its source, and what no recipe key can say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from retool.objectives.objective import Objective


@dataclass(frozen=True)
class Preset:
    """`fragment`: nested keys of a recipe. `source`: where the values come from. `compose`: for what no key can say:
    receives the objective that the keys describe and returns the one to use, e.g. with another term. `same_as`: presets
    whose gradient is the same on every rollout, which its card explains (they differ in sampling or schedule)."""

    name: str
    family: str
    source: str
    summary: str
    fragment: dict[str, Any] = field(default_factory=dict)
    compose: Callable[[Objective], Objective] | None = None
    same_as: tuple[str, ...] = ()
