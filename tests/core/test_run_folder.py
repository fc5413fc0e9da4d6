"""A run folder is opened anew only while nothing that a run made lies in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from retool.config import Recipe
from retool.errors import UserError
from retool.run_folder import RunFolder


@pytest.mark.parametrize("left", ["learner.jsonl", "metrics.jsonl", "checkpoints/00000001/x", "rollouts/shards/s.bin"])
def test_what_a_run_made_is_never_started_over(left: str, tmp_path: Path) -> None:
    recipe = Recipe(out=str(tmp_path / "run"))
    RunFolder(recipe, resume=False)
    again = RunFolder(recipe, resume=False)  # the first one could not open its engine, say
    file = again.path / left
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("x")
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        RunFolder(recipe, resume=False)
    RunFolder(recipe, resume=True)
