"""The `objective` section: which algorithm, and every choice it is made of."""

from __future__ import annotations

from retool.config.base import Section


class ObjectiveConfig(Section):
    """To be filled by objectives work; see algorithms-a appendix B."""

    preset: str = "grpo"
    """Name of the preset whose values fill everything not written in the recipe."""
