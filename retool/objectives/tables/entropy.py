"""Presets that look after entropy: forking tokens, Clip-Cov, KL-Cov."""

from __future__ import annotations

from retool.objectives.preset import Preset

ROWS: tuple[Preset, ...] = ()
