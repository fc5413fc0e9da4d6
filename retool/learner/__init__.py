"""Objective to new weights: networks, packing, optimiser, checkpoints."""

from retool.learner.checkpoint import CheckpointError
from retool.learner.guard import LearnerStopped
from retool.learner.head import HeadError
from retool.learner.learner import Learner
from retool.learner.roles import Role
from retool.learner.sft import sft_recipe
from retool.learner.world import World

__all__ = ["CheckpointError", "HeadError", "Learner", "LearnerStopped", "Role", "World", "sft_recipe"]
