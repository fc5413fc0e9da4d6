"""Every algorithm as a composition of small pure functions. Knows tensors and the typed configuration, nothing else."""

from retool.objectives.aggregate import Aggregation
from retool.objectives.base import (
    Aside,
    Critic,
    KlPenalty,
    ObjectiveError,
    ObjectiveState,
    OffPolicy,
    Reference,
    Structure,
    Term,
)
from retool.objectives.batch import Atom, Batch, Forward, MissingColumn
from retool.objectives.build import build_objective
from retool.objectives.objective import Finalized, Objective
from retool.objectives.preset import Preset
from retool.objectives.presets import PRESETS, find_preset, preset_fragment
from retool.objectives.tracker import priorities
from retool.objectives.validate import validate

__all__ = [
    "PRESETS",
    "Aggregation",
    "Aside",
    "Atom",
    "Batch",
    "Critic",
    "Finalized",
    "Forward",
    "KlPenalty",
    "MissingColumn",
    "Objective",
    "ObjectiveError",
    "ObjectiveState",
    "OffPolicy",
    "Preset",
    "Reference",
    "Structure",
    "Term",
    "build_objective",
    "find_preset",
    "preset_fragment",
    "priorities",
    "validate",
]
