"""Presets for tool use and stale rollouts: void turns, resampling, turn returns, off-policy corrections."""

from __future__ import annotations

from retool.objectives.preset import Preset

ROWS: tuple[Preset, ...] = ()
