"""`retool compare`: one run, several objectives, the same rollouts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from retool.compare import TOKEN_KINDS, Comparison, check, compare, measure, objective_recipe, token_kinds
from retool.errors import UserError
from retool.learner.collate import collate
from retool.objectives import PRESETS, build_objective
from retool.stored_run import StoredRun
from retool.transcript import Sample, Span, Transcript
from tests.learner.build_runs import policy_span, samples
from tests.system.runs import retool
from tests.system.test_resume import train_args
from tests.viewer.test_page import Tags

MIXED = ("reward.custom=tests.system.runs:by_parity", "steps=4", "checkpoint_every=2", "objective.entropy_coef=0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GRPO run whose groups are partly mixed."""
    out = tmp_path_factory.mktemp("compare") / "run"
    done = retool(*train_args(out, *MIXED))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def compared(run: Path) -> Comparison:
    return compare(StoredRun(run), ["grpo", "ppo_rlhf", "sft", "grpo"])


def test_the_weights_are_those_that_sampled_the_step(compared: Comparison) -> None:
    assert compared.steps == (2,) and compared.weights.endswith("00000002") and compared.age == 0
    assert all(r.max_logprob_gap < 1e-3 for r in compared.rows)


def test_what_the_run_lacks_is_named(compared: Comparison) -> None:
    assert [r.name for r in compared.rows] == ["grpo"]  # once, however often it is asked for
    assert "needs a critic" in compared.refused["ppo_rlhf"]
    assert "demonstrations" in compared.refused["sft"]


def test_token_weights_are_those_of_the_formula(run: Path) -> None:
    """At ratio 1 and without a KL the derivative by a log-prob is weight · A: tokens of groups without contrast have
    none, and the shares of the kinds add up."""
    stored = StoredRun(run)
    groups = stored.groups(stored.choose_steps(None))
    row, gradient = measure(stored, "grpo", groups)
    scores = {g.id: {t.reward.score for t in g.usable if t.reward is not None} for g in groups}
    expected = sum(t.transcript.n_action for g in groups if len(scores[g.id]) > 1 for t in g.usable)
    assert 0 < row.effective < row.tokens and row.effective == expected
    assert 0 < row.spread <= row.effective
    assert sum(row.shares.values()) == pytest.approx(1.0) and set(row.shares) == set(TOKEN_KINDS)
    assert row.norm == pytest.approx(float(gradient.norm()), rel=1e-4)
    again, other = measure(stored, "grpo", groups)
    assert again == row and torch.equal(gradient, other)


def test_critics_and_group_sizes_are_checked(run: Path) -> None:
    stored = StoredRun(run)
    stored.recipe = stored.recipe.model_copy(
        update={"rollout": stored.recipe.rollout.model_copy(update={"group_size": 1})}
    )
    assert "group_size must be >= 2" in compare(stored, ["grpo"]).refused["grpo"]
    recipe = objective_recipe(StoredRun(run).recipe, "ppo_rlhf")
    with pytest.raises(UserError, match="needs a critic"):
        check(StoredRun(run), recipe, build_objective(recipe))


def test_token_kinds_by_hand() -> None:
    spans = [
        Span("prompt", (1, 2)),
        policy_span([5] * 4, [-1.0] * 4, 0),
        Span("tool", (6,) * 3, 0, "observation"),
        policy_span([7] * 10, [-1.0] * 10, 1),
    ]
    spans[1] = Span("policy", (5,) * 4, 0, "text", (-1.0,) * 4, ((0, 0),), (1, 3), spans[1].digest)
    row = samples(1, 2)[0]
    long = type(row)("0.0.0", "0.0", Sample.whole(Transcript(spans)))
    short = type(row)("0.0.1", "0.0", Sample.whole(Transcript(spans[:2])))
    rollout = collate([long, short], "sampled", torch.float64)
    kinds = token_kinds(rollout.batch)
    by_id = {i: kinds[rollout.batch.row == r].tolist() for r, i in enumerate(rollout.ids)}
    assert by_id["0.0.1"] == [0, 1, 1, 0]
    assert by_id["0.0.0"][:4] == [0, 1, 1, 0] and by_id["0.0.0"][7:] == [2] * 8 + [0] * 2


def test_the_command_writes_a_table_a_page_a_plot_and_json(run: Path) -> None:
    done = retool("compare", str(run), "--objectives", "grpo,sft", "--steps", "2,3")
    assert done.returncode == 0, done.stderr
    assert "not comparable: sft" in done.stdout and "after-tool" in done.stdout
    data = json.loads((run / "compare" / "compare.json").read_text())
    assert data["steps"] == [2, 3] and data["cosine"] == {"names": ["grpo"], "matrix": [[1.0]]}
    assert data["trajectories"] == 32 and data["objectives"][0]["shares"].keys() == set(TOKEN_KINDS)
    assert all(math.isfinite(x) for x in data["objectives"][0]["shares"].values())
    assert (run / "compare" / "compare.svg").read_bytes().startswith(b"<?xml")
    page = Tags()
    page.feed((run / "compare" / "compare.html").read_text())
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object"}
    assert all(str(a["src"]).startswith("data:image/svg") for t, a in page.tags if t == "img")


def test_every_preset_is_compared_or_refused_with_a_reason(run: Path) -> None:
    result = compare(StoredRun(run), list(PRESETS))
    assert {r.name for r in result.rows} | set(result.refused) == set(PRESETS)
    assert all(len(reason) > 10 and "Traceback" not in reason for reason in result.refused.values())
    assert "grpo" in {r.name for r in result.rows}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--objectives", "grpoo"], "did you mean 'grpo'"),
        (["--objectives", "grpo", "--steps", "99"], "no rollouts of step 99"),
        (["--objectives", "grpo", "--steps", "x"], "numbers with commas"),
        (["--objectives", ","], "names none"),
    ],
)
def test_bad_input_ends_in_one_line(run: Path, arguments: list[str], said: str) -> None:
    done = retool("compare", str(run), *arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of an RL run"):
        StoredRun(tmp_path)
