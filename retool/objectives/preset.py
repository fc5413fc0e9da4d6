"""What a preset is: a recipe fragment with its source, and what no recipe key can say."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from retool.objectives.objective import Objective


def over(base: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A fragment laid over another one, mapping by mapping: what a preset changes about the one it starts from."""
    out = deepcopy(base)
    for name, values in sections.items():
        _lay(out.setdefault(name, {}), values)
    return out


def _lay(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _lay(below[key], value)
        else:
            below[key] = deepcopy(value)


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
