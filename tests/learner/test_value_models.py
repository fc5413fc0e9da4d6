"""Critics and reward models: value pretraining, what they are saved as, where a critic may start from."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from retool.config import Recipe
from retool.config.objective import PretrainConfig
from retool.errors import UserError
from retool.learner import CheckpointError, Learner
from retool.learner.checkpoint import module_tensors
from retool.models import load_tokenizer
from retool.objectives import build_objective
from retool.objectives.phases import RewardHead, value_pretraining
from retool.pretrain import ERROR, EXPLAINED, enough, phase_recipe, pretrain_critic, split_problems
from retool.records import Problem, TrainSample
from retool.reward_model import Labelled, batch_of, held_out_accuracy, reward_learner
from retool.reward_model import _atoms as atoms_of
from retool.run_folder import RunFolder
from retool.sft import sft_stage
from retool.transcript import Sample, Span, Transcript
from tests.learner.build_runs import model, policy_span, recipe, rollout_for

PROBLEMS = [Problem(f"p{i}", "", "") for i in range(40)]
PRETRAIN = {"steps": 48, "min_explained_variance": 0.9, "patience": 2, "every": 4, "held_out": 0.2}


def vc_ppo(out: Path, **pretrain: Any) -> Recipe:
    """VC-PPO on a small model: its own λs and phase, the learning rate of a toy."""
    return recipe(
        "vc_ppo",
        out,
        learner={"lr": 1e-3, "critic_lr": 1e-2, "updates": 2},
        objective={"critic": {"kind": "policy", "pretrain": {**PRETRAIN, **pretrain}}},
        rollout={"group_size": 1, "prompts": 16},
    )


def learner_of(base: Recipe, dtype: torch.dtype = torch.float32) -> Learner:
    return Learner.create(base, build_objective(base), model(dtype=dtype), load_tokenizer(base.model))


def answers(step: int, problems: Sequence[Problem]) -> list[TrainSample]:
    """One answer a problem; its first token says whether it will be right (9) or wrong (8)."""
    out = []
    for g, problem in enumerate(problems):
        rng = random.Random(f"{step}/{problem.id}")
        value = rng.choice((-1.0, 1.0))
        ids = [9 if value > 0 else 8, *(rng.randrange(10, 100) for _ in range(29))]
        prompt = Span("prompt", (7, 10 + int(problem.id[1:])))
        sample = Sample.whole(Transcript([prompt, policy_span(ids, [-4.0] * len(ids), 0)]))
        out.append(TrainSample(f"{step}.{g}.0", f"{step}.{g}", sample, value, float(value > 0)))
    return out


async def sample(step: int, problems: Sequence[Problem]) -> list[TrainSample]:
    return answers(step, problems)


def phase(base: Recipe, learner: Learner, sampler: Any = sample) -> list[dict[str, float]]:
    mine = phase_recipe(base)
    folder = RunFolder(mine, resume=(Path(mine.out) / "recipe.yaml").exists())
    split = split_problems(PROBLEMS, 0.2, 16, 0)
    return asyncio.run(pretrain_critic(mine, split, learner, sampler, folder))


def test_value_pretraining_explains_held_out_problems(tmp_path: Path) -> None:
    """Held-out explained variance above 0.9 (only the first of thirty tokens cannot know), the policy untouched; and a
    pretrained critic begins PPO far ahead of a cold one."""
    base = vc_ppo(tmp_path)
    made = learner_of(base)
    before = {k: v.clone() for k, v in made.full_weights().items()}
    metrics = phase(base, made)
    scores = [m[EXPLAINED] for m in metrics if EXPLAINED in m]
    errors = [m[ERROR] for m in metrics if ERROR in m]
    assert scores[0] == 0.0 and scores[-1] > 0.9 and errors[-1] < 0.1 < errors[0]
    assert all(torch.equal(before[k], v) for k, v in made.full_weights().items())
    assert made.version == 0 and made.updates == 0
    cold = learner_of(base)
    rollout = answers(999, PROBLEMS)
    warm_start, cold_start = made.step(list(rollout)), cold.step(list(rollout))
    assert cold_start["value/explained_variance"] == 0.0
    assert warm_start["value/explained_variance"] > 0.85


def test_an_interrupted_pretraining_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Cut off between two checkpoints; steps after the last one are learnt again, the ledger tells each once."""
    base = vc_ppo(tmp_path / "a", steps=8, every=3, min_explained_variance=1.0)
    whole = learner_of(base)
    expected = phase(base, whole)
    other = base.model_copy(update={"out": str(tmp_path / "b")})

    async def cut(step: int, problems: Sequence[Problem]) -> list[TrainSample]:
        if step == 5:
            raise KeyboardInterrupt
        return answers(step, problems)

    with pytest.raises(KeyboardInterrupt):
        phase(other, learner_of(other), cut)
    resumed = learner_of(other)
    again = phase(other, resumed)
    strip = [{k: v for k, v in m.items() if k != "seconds"} for m in again]
    assert strip == expected and len(again) == 9
    ours, theirs = (module_tensors(x.roles["critic"].module) for x in (resumed, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    rollout = answers(999, PROBLEMS)
    assert resumed.step(list(rollout)) == whole.step(list(rollout))
    lines = (tmp_path / "b" / "pretrain" / "learner.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [s for s in range(9) for _ in range(2)]
    finished = learner_of(other)
    assert phase(other, finished) == again  # a finished phase is only read


def test_checkpoints_carry_a_pretrained_critic(tmp_path: Path) -> None:
    """Normalised returns as well: moments of the phase go on into PPO, the checkpoint resumes with equal bits."""
    base = vc_ppo(tmp_path, steps=4)
    critic = base.objective.critic.model_copy(update={"normalise": True, "decay": 0.9})
    base = base.model_copy(update={"objective": base.objective.model_copy(update={"critic": critic})})
    made = learner_of(base)
    phase(base, made)
    assert made.state.value_weight > 0.3 and made.state.value_square > 0
    made.save(tmp_path / "c")
    other = learner_of(base)
    other.load(tmp_path / "c")
    rollout = answers(999, PROBLEMS)
    assert made.step(list(rollout)) == other.step(list(rollout))
    for name in made.roles:
        a, b = module_tensors(made.roles[name].module), module_tensors(other.roles[name].module)
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_phase_regresses_on_monte_carlo_returns(tmp_path: Path) -> None:
    base = vc_ppo(tmp_path)
    made = learner_of(base, torch.float64)
    objective = value_pretraining(made.objective)
    assert [t.name for t in objective.terms] == ["value"] and objective.reference is None
    batch, _ = made.phase(base, objective).measure(answers(1, PROBLEMS))
    torch.testing.assert_close(batch["return"], batch.spread("score"))


def test_when_it_is_enough() -> None:
    plan = PretrainConfig(steps=100, min_explained_variance=0.5, patience=2)
    assert not enough([], plan) and not enough([0.6, 0.6], plan)
    assert not enough([0.4, 0.4, 0.4, 0.4], plan), "flat but low: go on"
    assert not enough([0.5, 0.6, 0.7], plan), "high but rising: go on"
    assert enough([0.2, 0.7, 0.7, 0.69], plan)
    assert enough([0.2, 0.7, 0.7005, 0.7008], plan), "a gain below a thousandth is none"
    assert not enough([0.9, 0.9, 0.9, 0.9], plan.model_copy(update={"min_explained_variance": 1.0}))


def test_held_out_problems_are_never_trained_on() -> None:
    split = split_problems(PROBLEMS, 0.25, 4, 3)
    assert len(split.train) == 30 and len(split.held_out) == 4
    assert not {p.id for p in split.train} & {p.id for p in split.held_out}
    assert split == split_problems(PROBLEMS, 0.25, 4, 3) != split_problems(PROBLEMS, 0.25, 4, 4)
    few = split_problems(PROBLEMS[:2], 0.9, 4, 0)
    assert len(few.train) == len(few.held_out) == 1
    with pytest.raises(UserError, match="two problems"):
        split_problems(PROBLEMS[:1], 0.1, 4, 0)


def test_the_phase_draws_other_answers_than_rl(tmp_path: Path) -> None:
    base = vc_ppo(tmp_path)
    mine = phase_recipe(base)
    assert mine.seed != base.seed and mine.out == str(tmp_path / "pretrain") and phase_recipe(base) == mine


# Where a critic may start from.


def started_from(out: Path, **critic: Any) -> Learner:
    return learner_of(recipe("ppo_rlhf", out, objective={"critic": critic}))


@pytest.mark.parametrize("normalise", [False, True])
def test_a_critic_starts_from_a_saved_one(normalise: bool, tmp_path: Path) -> None:
    """From `RUN/critic` and from a learner checkpoint: same weights, same moments, hence the same values."""
    made = started_from(tmp_path, kind="policy", normalise=normalise)
    made.step(rollout_for("ppo_rlhf"))
    made.save_critic(tmp_path / "critic")
    made.save(tmp_path / "checkpoint")
    expected = module_tensors(made.roles["critic"].module)
    for folder in ("critic", "checkpoint"):
        other = started_from(tmp_path, kind="checkpoint", path=str(tmp_path / folder), normalise=normalise)
        assert all(torch.equal(expected[k], v) for k, v in module_tensors(other.roles["critic"].module).items())
        assert other.state == replace(made.state, beta=other.state.beta)
        other.step(rollout_for("ppo_rlhf"))
        with pytest.raises(CheckpointError, match=r"critic\.normalise"):
            started_from(tmp_path, kind="checkpoint", path=str(tmp_path / folder), normalise=not normalise)
    with pytest.raises(CheckpointError, match=r"objective\.critic\.path"):
        started_from(tmp_path, kind="checkpoint", path=str(tmp_path))


def test_a_critic_with_a_smaller_vocabulary_is_refused(tmp_path: Path) -> None:
    made = started_from(tmp_path, kind="policy")
    made.save_critic(tmp_path / "critic")
    base = recipe("ppo_rlhf", tmp_path, objective={"critic": {"kind": "checkpoint", "path": str(tmp_path / "critic")}})
    wide = model(dtype=torch.float32)
    wide.resize_token_embeddings(200)
    with pytest.raises(CheckpointError, match="one tokenizer"):
        Learner.create(base, build_objective(base), wide, load_tokenizer(base.model))


def test_the_critic_learns_at_its_own_rate(tmp_path: Path) -> None:
    for section, objective, expected in (
        ({"lr": 1e-3}, {}, 2e-3),
        ({"lr": 1e-3}, {"lr_factor": 9.0}, 9e-3),
        ({"lr": 1e-3, "critic_lr": 0.5}, {"lr_factor": 9.0}, 0.5),
    ):
        base = recipe("ppo_rlhf", tmp_path, learner=section, objective={"critic": {"kind": "policy", **objective}})
        optimiser = learner_of(base).roles["critic"].optimiser
        assert optimiser is not None and optimiser.lr == pytest.approx(expected)


# Reward models.


def solutions(count: int, seed: int) -> list[list[Labelled]]:
    """Groups of four solutions; the right ones hold token 9 somewhere, the wrong ones never."""
    rng = random.Random(seed)
    groups = []
    for g in range(count):
        members = []
        for i in range(4):
            ids = [rng.randrange(10, 100) for _ in range(rng.randint(4, 9))]
            if i % 2:
                ids[rng.randrange(len(ids))] = 9
            prompt = Span("prompt", tuple(rng.randrange(10, 100) for _ in range(3)))
            members.append(Labelled(f"{seed}.{g}", bool(i % 2), Transcript([prompt, Span("demo", (*ids, 1), 0)])))
        groups.append(members)
    return groups


@pytest.mark.parametrize("head", ["pairwise", "pointwise"])
def test_a_reward_model_learns_and_becomes_a_critic(head: RewardHead, tmp_path: Path) -> None:
    """Held-out accuracy above 0.9 on a separable set; saved, it is what `critic.kind: reward_model` starts from."""
    section = {"head": head, "lr": 3e-3, "steps": 120, "batch_size": 16, "warmup_steps": 5}
    base = sft_stage(recipe("ppo_rlhf", tmp_path, sft=section))
    assert base.out == str(tmp_path / "reward_model")
    made = reward_learner(base, model(dtype=torch.float32), load_tokenizer(base.model))
    train = [a for members in solutions(60, 1) for a in atoms_of(members[0].group, members, head)]
    test = [a for members in solutions(30, 2) for a in atoms_of(members[0].group, members, head)]
    judges = batch_of(test, range(len(test)))
    assert len(train) == (120 if head == "pairwise" else 240)
    first = held_out_accuracy(made, judges, head)
    rng = random.Random(0)
    history = [made.step(batch_of(train, [rng.randrange(len(train)) for _ in range(16)])) for _ in range(120)]
    assert history[0]["loss/reward"] == pytest.approx(0.693147, abs=1e-5), "a fresh head cannot tell"
    assert first <= 0.5 < 0.9 < held_out_accuracy(made, judges, head)
    made.save_critic(tmp_path / "rm", "reward_model")
    critic = started_from(tmp_path, kind="reward_model", path=str(tmp_path / "rm")).roles["critic"]
    ours, theirs = module_tensors(critic.module), module_tensors(made.roles["critic"].module)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert json.loads((tmp_path / "rm" / "value_model.json").read_text())["kind"] == "reward_model"


def test_a_reward_model_resumes_with_equal_bits(tmp_path: Path) -> None:
    base = sft_stage(recipe("ppo_rlhf", tmp_path, sft={"head": "pairwise", "lr": 1e-3, "steps": 6, "warmup_steps": 2}))
    atoms = [a for members in solutions(6, 1) for a in atoms_of(members[0].group, members, "pairwise")]
    first = reward_learner(base, model(dtype=torch.float32), load_tokenizer(base.model))
    for picks in ([0, 1, 2], [3, 4, 5]):
        first.step(batch_of(atoms, picks))
    first.save(tmp_path / "c")
    second = reward_learner(base, model(dtype=torch.float32), load_tokenizer(base.model))
    second.load(tmp_path / "c")
    assert first.step(batch_of(atoms, [6, 7])) == second.step(batch_of(atoms, [6, 7]))
    ours, theirs = (module_tensors(x.roles["critic"].module) for x in (first, second))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_reward_losses_are_the_written_ones(tmp_path: Path) -> None:
    """-log σ(r_w - r_l) and binary cross-entropy, from the rewards themselves; micro-batches change nothing."""
    for head in ("pairwise", "pointwise"):
        section = {"head": head, "lr": 1e-3, "steps": 2, "batch_size": 4}
        for most in (None, 2):
            base = sft_stage(recipe("ppo_rlhf", tmp_path, sft=section, learner={"micro_samples": most}))
            made = reward_learner(base, model(), load_tokenizer(base.model))
            torch.nn.init.normal_(made.roles["critic"].module.head.weight, generator=torch.Generator().manual_seed(0))
            atoms = [a for members in solutions(3, 1) for a in atoms_of(members[0].group, members, head)]
            rows = batch_of(atoms, range(len(atoms)))
            batch, _ = made.measure(rows, frozenset({"bootstrap"}))
            reward, right = batch["bootstrap"], batch["accuracy"] > 0.5
            if head == "pairwise":
                order = torch.argsort(batch["pair"], stable=True)
                chosen, rejected = order[right[order]], order[~right[order]]
                expected = -torch.nn.functional.logsigmoid(reward[chosen] - reward[rejected]).mean()
            else:
                expected = -torch.nn.functional.logsigmoid(torch.where(right, reward, -reward)).mean()
            assert made.step(rows)["loss/reward"] == pytest.approx(float(expected), abs=1e-9)
