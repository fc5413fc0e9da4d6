"""The worked example of docs/objectives.md runs, and is what it says it is."""

from __future__ import annotations

import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from retool.config import Recipe
from retool.objectives import PRESETS, Forward, build_objective, preset_fragment
from tests.objectives.build_batches import f64, ragged

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def test_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None and len(code[1].splitlines()) < 30
    module = types.ModuleType("my_module")
    monkeypatch.setitem(sys.modules, "my_module", module)
    exec(compile(code[1], str(PAGE), "exec"), module.__dict__)
    objective = build_objective(Recipe(**preset_fragment("my_module:GMPO")))
    assert [type(t).__name__ for t in objective.terms] == ["GeometricMean", "KlTerm"]
    columns = {"logp_old": [[-1.0] * 4], "logp_ref": [[-1.0] * 4]}
    up, down = math.exp(0.025), math.exp((0.4 - 0.2 + 0.2) / 4)
    for sign, first, expected in (
        (1.0, -0.9, -up),
        (-1.0, -0.9, up),
        (1.0, -0.1, -down),
        (-1.0, -0.1, math.exp(0.225)),
    ):
        batch = ragged([[1] * 4], {**columns, "advantage": [[sign] * 4]})
        logp = f64([first, -1.2, -0.8, -1])
        final = objective.finalize(batch, objective.initial_state())
        value = objective.loss(final.batch, Forward(logp=logp))["policy"] * final.scale("policy")
        torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_every_preset_has_a_card() -> None:
    """Formula, source, defaults, invariants, discrepancies, when to use it, and a predicted direction."""
    cards = dict(
        re.findall(r"^#### `(\w+)`\n(.*?)(?=^###|\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    )
    assert set(PRESETS) <= set(cards)
    for name in PRESETS:
        wanted = ("Formula", "Source", "Defaults", "Invariants", "Discrepancies", "Use it", "Expect")
        assert [w for w in wanted if f"**{w}**" not in cards[name]] == [], name
