"""The base of every configuration section: unknown keys are refused, values are frozen."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen section; every field's description is what `retool explain KEY` prints."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
