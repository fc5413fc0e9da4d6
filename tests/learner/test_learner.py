"""The learner as others use it: it learns, it stops on corrupt input, it resumes with equal bits."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from retool.learner import CheckpointError, Learner, LearnerStopped, sft_recipe
from retool.learner.guard import compare_digests
from retool.models import load_tokenizer
from retool.objectives import Objective, build_objective
from retool.records import TrainSample
from retool.transcript import Sample, Span, Transcript
from tests.learner.build_runs import (
    PRESET_NAMES,
    PROOFS,
    keeper,
    lengthen_tools,
    losses,
    model,
    objective,
    policy_span,
    recipe,
    rollout_for,
    samples,
)

ALL = (*PRESET_NAMES, *PROOFS)


def learner(name: str, out: Path, dtype: torch.dtype = torch.float32, **section: Any) -> Learner:
    base = recipe(name if name in PRESET_NAMES else "grpo", out, learner=section)
    return Learner.create(base, objective(name, out), model(dtype=dtype), load_tokenizer(base.model))


def weights(made: Learner) -> dict[str, torch.Tensor]:
    return {
        f"{role}/{name}": p.detach().clone()
        for role, r in made.roles.items()
        for name, p in r.module.named_parameters()
    }


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.parametrize("name", ALL)
def test_save_load_step_equals_undisturbed_steps(name: str, tmp_path: Path) -> None:
    plan = {"updates": 2, "epochs": 2, "schedule": "cosine", "warmup_steps": 2}
    if name == "grpo":
        plan["weight_decay"] = 0.1
    first = learner(name, tmp_path, **plan)
    start = weights(first)
    for seed in (1, 2):
        first.step(rollout_for(name, seed))
    first.save(tmp_path / "ckpt")
    metrics = first.step(rollout_for(name, 3))
    second = learner(name, tmp_path, **plan)
    second.load(tmp_path / "ckpt")
    assert (second.version, second.updates) == (2, first.updates - int(metrics["updates"]))
    assert second.step(rollout_for(name, 3)) == metrics
    assert_equal(weights(first), weights(second))
    assert second.state == first.state
    assert any(not torch.equal(start[k], v) for k, v in weights(first).items() if k.startswith("policy"))
    if "reference" in first.roles:
        frozen = {k: v for k, v in weights(first).items() if k.startswith("reference")}
        assert_equal(frozen, {k: start[k] for k in frozen})


def test_low_precision_weights_have_masters(tmp_path: Path) -> None:
    """With lr 1e-6 a bf16 weight does not move in one step, but its master does; and it resumes with equal bits."""
    first = learner("grpo", tmp_path, torch.bfloat16, lr=1e-6)
    before = weights(first)
    rows = [rollout_for("grpo", seed) for seed in range(3)]
    first.step(rows[0])
    optimiser = first.policy.optimiser
    assert optimiser is not None
    moved = [
        float((m.detach() - before[f"policy/{n}"].float()).abs().max())
        for n, m in zip(optimiser.names, optimiser.masters)
    ]
    assert all(0 < x < 1e-5 for x in moved)
    first.save(tmp_path / "c")
    second = learner("grpo", tmp_path, torch.bfloat16, lr=1e-6)
    second.load(tmp_path / "c")
    first.step(rows[1])
    second.step(rows[1])
    assert_equal(weights(first), weights(second))
    assert second.policy.optimiser is not None
    assert all(torch.equal(a, b) for a, b in zip(optimiser.masters, second.policy.optimiser.masters))


@pytest.mark.parametrize("name", ALL)
def test_lengthening_a_tool_span_changes_nothing(name: str, tmp_path: Path) -> None:
    """With the columns that come from networks stored, loss numerators and denominators stay what they were."""
    rows = rollout_for(name)
    results = []
    for extra in (0, 7):
        made = keeper(name, tmp_path)
        rollout, columns = stored(made, lengthen_tools(rows, extra), name)
        batch, state, _ = made.objective.prepare(rollout, made.state)
        logp = columns["logp"]
        final = made.objective.finalize(batch, state, columns_forward(batch, columns))
        numerators = made.objective.loss(final.batch, columns_forward(final.batch, columns))
        results.append(({k: float(v) for k, v in numerators.items()}, final.denominators, logp.shape))
    (first, dens, n), (second, dens2, n2) = results
    assert n != n2
    assert first == pytest.approx(second, abs=1e-9)
    assert dens == dens2


def stored(made: Learner, rows: list[TrainSample], name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The collated batch with network columns that depend on the action tokens only; poison on the others."""
    from retool.learner.collate import collate

    batch = collate(rows, made.objective.train_on, torch.float64).batch
    action = batch["action"]
    rng = torch.Generator().manual_seed(9)
    columns = {}
    for column in ("logp_old", "logp_ref", "logp", "value", "entropy"):
        values = torch.full((batch.n_tokens,), float("nan"), dtype=torch.float64)
        noise = torch.rand(int(action.sum()), generator=rng, dtype=torch.float64)
        values[action] = noise if column in ("value", "entropy") else -0.1 - 0.5 * noise
        columns[column] = values
    read = {k: v for k, v in columns.items() if k in made.objective.scores}
    if "bootstrap" in made.objective.scores:
        batch = batch.with_samples(bootstrap=torch.linspace(0, 1, len(batch), dtype=torch.float64))
    return batch.with_tokens(**read), columns


def columns_forward(batch: Any, columns: dict[str, torch.Tensor]) -> Any:
    from retool.objectives import Forward

    return Forward(logp=columns["logp"], entropy=columns["entropy"], value=columns["value"])


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_trained_is_sampled(name: str, tmp_path: Path) -> None:
    metrics = learner(name, tmp_path).step(rollout_for(name))
    if name == "sft":
        assert "trained_equals_sampled" not in metrics
    else:
        assert metrics["trained_equals_sampled"] == 1.0
        assert metrics["max_logprob_gap"] > 0.1


@pytest.mark.parametrize("what", ["id", "logprob", "digest"])
def test_one_corrupt_token_stops_the_run(what: str, tmp_path: Path) -> None:
    rows = rollout_for("grpo")
    spans = list(rows[5].sample.transcript.spans)
    span = spans[1]
    assert span.origin == "policy" and span.logprobs is not None
    if what == "id":
        span = replace(span, ids=(span.ids[0] ^ 1, *span.ids[1:]))
    elif what == "logprob":
        span = replace(span, logprobs=(*span.logprobs[:-1], span.logprobs[-1] - 1e-4))
    else:
        span = replace(span, digest="")
    spans[1] = span
    rows[5] = replace(rows[5], sample=Sample.whole(Transcript(spans)))
    made = learner("grpo", tmp_path)
    before = weights(made)
    with pytest.raises(LearnerStopped, match="1 of 24 sampled spans") as caught:
        made.step(rows)
    assert rows[5].id in str(caught.value)
    info = json.loads((caught.value.bundle / "info.json").read_text())
    assert rows[5].id in info["samples"] and info["recipe"]["objective"]["preset"] == "grpo"
    assert "token/logp_rollout" in load_file(caught.value.bundle / "batch.safetensors")
    assert_equal(before, weights(made))


def test_corruption_between_collation_and_the_model_is_seen(tmp_path: Path) -> None:
    """The check reads the model's own input tensor: one id changed there is found, wherever it is packed."""
    made = keeper("grpo", tmp_path)
    from retool.learner.collate import collate

    rollout = collate(rollout_for("grpo"), "sampled", torch.float64)
    for layout in ("padded", "packed"):
        made.recipe = recipe("grpo", tmp_path, learner={"layout": layout, "micro_samples": 5})
        for micro in made._micros(rollout):
            part = micro.rollout
            args = (part.batch["logp_rollout"], part.batch.offsets, part.checks)
            assert compare_digests(micro.inputs.targets, *args)[1] == []
            place = int(micro.inputs.source[torch.nonzero(part.batch["action"])[0, 0]])
            micro.inputs.ids.view(-1)[place] += 1
            assert len(compare_digests(micro.inputs.targets, *args)[1]) == 1


def test_a_view_of_part_of_a_span_is_checked_too(tmp_path: Path) -> None:
    rows = rollout_for("grpo")
    t = rows[0].sample.transcript
    rows[0] = replace(rows[0], sample=Sample(t, (t.prompt_len + 1, len(t) - 1)))
    assert learner("grpo", tmp_path).step(rows)["trained_equals_sampled"] == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_stops(value: float, tmp_path: Path) -> None:
    rows = rollout_for("ppo_rlhf")
    rows[2] = replace(rows[2], score=value)
    made = learner("ppo_rlhf", tmp_path)
    before = weights(made)
    with pytest.raises(LearnerStopped, match="not finite") as caught:
        made.step(rows)
    assert (caught.value.bundle / "batch.safetensors").is_file()
    assert_equal(before, weights(made))


def test_a_broken_network_stops(tmp_path: Path) -> None:
    made = learner("grpo", tmp_path)
    with torch.no_grad():
        next(made.policy.model.parameters())[7] = float("nan")
    with pytest.raises(LearnerStopped, match="not finite"):
        made.step(rollout_for("grpo"))
    assert made.version == 0


def test_groups_without_contrast_teach_nothing(tmp_path: Path) -> None:
    """`drop` leaves no sample: no optimiser step is taken, the version still counts the rollout."""
    base = recipe("grpo", tmp_path, objective={"filter": {"kind": "drop"}})
    made = Learner.create(base, build_objective(base), model(), load_tokenizer(base.model))
    before = weights(made)
    rows = [replace(r, accuracy=1.0, score=1.0) for r in samples()]
    metrics = made.step(rows)
    assert metrics["updates"] == 0 and metrics["filter/mixed_groups"] == 0 and made.version == 1
    assert_equal(before, weights(made))
    rows[0] = replace(rows[0], accuracy=0.0, score=0.0)
    metrics = made.step(rows)
    assert metrics["samples"] == 4 and metrics["updates"] == 1


def test_samples_out_of_the_loss_stay_in_the_statistics(tmp_path: Path) -> None:
    made = keeper("grpo", tmp_path)
    rows = samples(groups=1)
    made.step([replace(r, in_loss=i != 0) for i, r in enumerate(rows)])
    without = keeper("grpo", tmp_path)
    without.step(rows[1:])
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(made.gradients.values(), without.gradients.values())]
    assert not all(same)
    out = keeper("grpo", tmp_path)
    metrics = out.step([replace(r, in_loss=False) for r in rows])
    assert metrics["updates"] == 0 and not out.gradients


def test_critic_warm_up_leaves_the_policy_alone(tmp_path: Path) -> None:
    base = recipe("ppo_rlhf", tmp_path, objective={"critic": {"kind": "policy", "warmup": 1}})
    made = Learner.create(base, build_objective(base), model(), load_tokenizer(base.model))
    before = weights(made)
    made.step(rollout_for("ppo_rlhf"))
    after = weights(made)
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("policy"))
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("critic"))
    made.step(rollout_for("ppo_rlhf"))
    assert any(not torch.equal(before[k], v) for k, v in weights(made).items() if k.startswith("policy"))


@pytest.mark.parametrize("preset", ["grpo", "ppo_rlhf"])
def test_a_rewarded_token_is_learnt(preset: str, tmp_path: Path) -> None:
    """A bandit: one token after a fixed prompt, reward 1 for eight of the ids, sampled from the model itself."""
    wanted = range(8, 16)
    section = {"lr": 1e-2, "updates": 2}
    base = recipe(
        preset,
        tmp_path,
        rollout={"group_size": 16, "prompts": 2},
        learner=section,
        objective={"kl": {"place": "none"}, "reference": {"kind": "none"}},
    )
    made = Learner.create(base, build_objective(base), model(dtype=torch.float32), load_tokenizer(base.model))
    rng = random.Random(0)

    def chances() -> torch.Tensor:
        with torch.no_grad():
            return made.policy.model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].float().log_softmax(-1)

    def share() -> float:
        return float(chances().exp()[list(wanted)].sum())

    first = share()
    for step in range(40):
        logp = chances()
        rows = []
        for g in range(2):
            for i in range(16):
                token = rng.choices(range(len(logp)), weights=logp.exp().tolist())[0]
                span = policy_span([token], [float(logp[token])], 0)
                reward = float(token in wanted)
                sample = Sample.whole(Transcript([Span("prompt", (5, 6, 7)), span]))
                rows.append(TrainSample(f"{step}.{g}.{i}", f"{step}.{g}", sample, reward, reward))
        metrics = made.step(rows)
        assert metrics["max_logprob_gap"] < 1e-4
    assert first < 0.2 and share() > 0.9


def test_sft_lowers_the_loss_and_saves_a_model(tmp_path: Path) -> None:
    base = sft_recipe(recipe("grpo", tmp_path, sft={"steps": 30, "lr": 1e-2, "warmup_steps": 2}))
    assert base.objective.preset == "sft" and base.steps == 30
    tokenizer = load_tokenizer(base.model)
    made = Learner.create(base, build_objective(base), model(dtype=torch.float32), tokenizer)
    rows = samples(demo=True)
    history = [made.step(rows) for _ in range(30)]
    assert history[-1]["loss/nll"] < 0.8 * history[0]["loss/nll"]
    assert [h["lr"] for h in history[:3]] == pytest.approx([0.005, 0.01, 0.01])
    assert history[-1]["lr"] < 1e-3
    made.save_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), made.policy.model.parameters()))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == len(tokenizer)


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    made = learner("grpo", tmp_path)
    made.save(tmp_path / "c")
    made.save(tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    assert not any(p.suffix in (".pt", ".pkl", ".bin") for p in (tmp_path / "c").iterdir())
    with pytest.raises(CheckpointError, match="objective 'grpo'"):
        learner("ppo_rlhf", tmp_path).load(tmp_path / "c")
    with pytest.raises(CheckpointError, match="not a learner checkpoint"):
        made.load(tmp_path / "nothing")
    (tmp_path / "c").rename(tmp_path / ".c.old")
    made.load(tmp_path / "c")


def test_composed_objective_runs_by_its_name(tmp_path: Path) -> None:
    made = learner("gspo", tmp_path)
    assert isinstance(made.objective, Objective)
    assert losses(made.step(rollout_for("gspo"))).keys() == {"loss/policy"}
