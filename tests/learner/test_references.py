"""References that move with the policy, and imitation beside RL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from retool.learner import CheckpointError, Learner
from retool.learner.batches import passes
from retool.learner.checkpoint import module_tensors
from retool.learner.collate import collate
from retool.learner.optimiser import Optimiser
from retool.learner.reference import MovingReference
from retool.learner.roles import Role
from retool.models import load_tokenizer
from retool.objectives import ObjectiveError, Reference, build_objective
from tests.learner.build_runs import GradientKeeper, busy_ppo, model, recipe, rollout_for, samples


def pair(policy: float, reference: float, dtype: torch.dtype, rule: Reference) -> tuple[MovingReference, Any, Any]:
    """(the rule, policy weights, reference weights): two networks of one layer with constant weights."""
    nets = []
    for value in (policy, reference):
        net = nn.Linear(2, 2, bias=False).to(dtype)
        nn.init.constant_(net.weight, value)
        nets.append(net)
    learns = Role("policy", nets[0], nets[0], Optimiser(nets[0], 1e-3, (0.9, 0.99), 0.0))
    return MovingReference(rule, learns, Role("reference", nets[1], nets[1])), nets[0].weight, nets[1].weight


@pytest.mark.parametrize(("share", "expected"), [(0.001, 1.002), (0.008, 1.016), (0.6, 2.2)])
def test_tv_ema(share: float, expected: float) -> None:
    moving, _, weight = pair(3.0, 1.0, torch.float64, Reference("ema", share))
    assert moving.tick("update")
    torch.testing.assert_close(weight, torch.full_like(weight, expected), rtol=0, atol=1e-9)


def test_tv_ema_three_steps() -> None:
    moving, _, weight = pair(1.0, 0.0, torch.float64, Reference("ema", 0.1))
    for _ in range(3):
        moving.tick("update")
    torch.testing.assert_close(weight, torch.full_like(weight, 0.271), rtol=0, atol=1e-9)


def test_a_bf16_reference_moves() -> None:
    """100 steps from 1.0 towards 1.01: in bf16 alone nothing would ever change."""
    moving, policy, weight = pair(1.01, 1.0, torch.bfloat16, Reference("ema", 0.1))
    naive = weight.detach().clone()
    with torch.no_grad():
        moving.sources["weight"].fill_(1.01)  # bf16 rounds 1.01 up; the policy's own master does not
    for _ in range(100):
        moving.tick("update")
        naive = 0.9 * naive + 0.1 * policy.detach()
    assert torch.equal(naive, torch.ones_like(naive))
    assert weight.dtype == torch.bfloat16 and bool((weight > 1.0).all())
    torch.testing.assert_close(moving.masters["weight"], torch.full((2, 2), 1.01), rtol=0, atol=1e-5)


def test_a_bf16_reference_keeps_what_bf16_cannot_show() -> None:
    moving, *_ = pair(1.01, 1.0, torch.bfloat16, Reference("ema", 0.001))
    for _ in range(100):
        moving.tick("update")
    gained = moving.masters["weight"] - 1.0
    target = 1 - (1 - 0.001) ** 100
    policy = float(moving.sources["weight"].detach()[0, 0]) - 1.0
    torch.testing.assert_close(gained, torch.full_like(gained, target * policy), rtol=1e-3, atol=0)
    assert moving.state().keys() == {"weight"}
    again, _, _ = pair(1.01, 1.0, torch.bfloat16, Reference("ema", 0.001))
    again.load(moving.clock, moving.state())
    assert torch.equal(again.masters["weight"], moving.masters["weight"]) and again.clock == 100


def test_hard_and_mix_move_every_so_often() -> None:
    for rule, expected in ((Reference("hard", 1.0, 3), 3.0), (Reference("mix", 0.6, 3), 2.2)):
        moving, _, weight = pair(3.0, 1.0, torch.float64, rule)
        assert [moving.tick("update") for _ in range(2)] == [False, False]
        assert float(weight.detach()[0, 0]) == 1.0
        assert moving.tick("update") and float(weight.detach()[0, 0]) == pytest.approx(expected)
    moving, _, weight = pair(3.0, 1.0, torch.float64, Reference("hard", 1.0, 1, "rollout"))
    assert not moving.tick("update") and moving.tick("rollout") and float(weight.detach()[0, 0]) == 3.0


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"kind": "frozen"}, Reference("frozen")),
        ({"kind": "ema", "eta": 0.01}, Reference("ema", 0.01, 1)),
        ({"kind": "hard"}, Reference("hard", 1.0, 400)),
        ({"kind": "hard", "every": 7, "after": "rollout"}, Reference("hard", 1.0, 7, "rollout")),
        ({"kind": "mix"}, Reference("mix", 0.6, 512)),
    ],
)
def test_reference_keys(keys: dict[str, Any], expected: Reference, tmp_path: Path) -> None:
    assert build_objective(recipe("ppo_rlhf", tmp_path, objective={"reference": keys})).reference == expected


def reference_learner(out: Path, dtype: torch.dtype = torch.float64, **keys: Any) -> Learner:
    base = recipe("ppo_rlhf", out, objective={"reference": keys, "critic": {"kind": "policy", "warmup": 1}})
    return Learner.create(base, build_objective(base), model(dtype=dtype), load_tokenizer(base.model))


def test_it_moves_after_policy_updates_only(tmp_path: Path) -> None:
    """Not in the critic's warm-up; then once an optimiser step, or once a rollout."""
    for after, moves in (("update", 2), ("rollout", 1)):
        made = reference_learner(tmp_path, kind="ema", eta=0.5, after=after)
        assert made.moving is not None
        start = {k: v.clone() for k, v in module_tensors(made.roles["reference"].module).items()}
        made.step(rollout_for("ppo_rlhf", 1))
        assert made.moving.clock == 0
        made.step(rollout_for("ppo_rlhf", 2))
        assert made.moving.clock == moves
        now = module_tensors(made.roles["reference"].module)
        assert any(not torch.equal(start[k], now[k]) for k in start)


def test_a_hard_reference_is_the_policy_after_its_move(tmp_path: Path) -> None:
    made = reference_learner(tmp_path, kind="hard", every=2)
    for seed in (1, 2):
        made.step(rollout_for("ppo_rlhf", seed))
    policy, reference = made.full_weights(), module_tensors(made.roles["reference"].module)
    assert all(torch.equal(policy[k], reference[k]) for k in policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_resume_with_equal_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """EMA reference (fp32 masters of a bf16 model included), normalised critic, imitation beside."""
    first = busy_ppo(tmp_path, dtype=dtype)
    for seed in (1, 2):
        first.step(rollout_for("ppo_rlhf", seed))
    first.save(tmp_path / "c")
    second = busy_ppo(tmp_path, dtype=dtype)
    second.load(tmp_path / "c")
    assert (tmp_path / "c" / "reference.master.safetensors").exists() == (dtype == torch.bfloat16)
    for made in (first, second):
        made.metrics = made.step(rollout_for("ppo_rlhf", 3))  # type: ignore[attr-defined]
    assert first.metrics == second.metrics  # type: ignore[attr-defined]
    for name in first.roles:
        a, b = module_tensors(first.roles[name].module), module_tensors(second.roles[name].module)
        assert all(torch.equal(a[k], b[k]) for k in a), name
    assert first.moving is not None and second.moving is not None and first.moving.clock == second.moving.clock == 6
    assert all(torch.equal(m, second.moving.masters[k]) for k, m in first.moving.masters.items())
    frozen = recipe("ppo_rlhf", tmp_path)
    still = Learner.create(frozen, build_objective(frozen), model(), load_tokenizer(frozen.model))
    still.save(tmp_path / "still")
    with pytest.raises(CheckpointError, match="frozen reference"):
        busy_ppo(tmp_path).load(tmp_path / "still")


def ptx_keeper(out: Path, coef: float, temperature: float = 1.0, **learner: Any) -> GradientKeeper:
    base = recipe(
        "ppo_rlhf",
        out,
        learner={"updates": 1, **learner},
        objective={"ptx": {"coef": coef, "batch": 5}},
        rollout={"group_size": 4, "prompts": 3, "temperature": temperature},
    )
    demos = samples(groups=2, size=2, seed=7, demo=True)
    made = GradientKeeper.create(base, build_objective(base), model(), load_tokenizer(base.model), demos=demos)
    assert isinstance(made, GradientKeeper)
    return made


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ptx_adds_exactly_its_own_gradient(temperature: float, tmp_path: Path) -> None:
    """c · ∇NLL of its own batch, at temperature 1, by its own denominator; the rest of the loss is untouched."""
    coef = 0.3
    without, beside = ptx_keeper(tmp_path, 0.0, temperature), ptx_keeper(tmp_path, coef, temperature)
    plain, mixed = without.step(rollout_for("ppo_rlhf")), beside.step(rollout_for("ppo_rlhf"))
    assert mixed["loss/policy"] == pytest.approx(plain["loss/policy"], abs=1e-12)
    net = beside.policy.model
    for p in net.parameters():
        p.grad = None
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for _, i in passes(len(beside.demos), 0, 5, "ptx/0"):
        rollout = collate([beside.demos[i]], "demo", torch.float64)
        ids = torch.from_numpy(rollout.rows[0])[None]
        logp = net(input_ids=ids).logits[0].log_softmax(-1)
        action = rollout.batch["action"]
        for place, on in enumerate(action.tolist()):
            at = rollout.starts[0] + place
            if on:
                total = total - logp[at - 1, ids[0, at]]
                tokens += 1
    nll = total / tokens
    assert mixed["loss/ptx"] == pytest.approx(float(nll.detach()), abs=1e-7)
    nll.backward()
    grads = {f"policy/{n}": p.grad for n, p in net.named_parameters()}
    assert any(float(g.abs().max()) > 1e-3 for g in grads.values() if g is not None)
    for name, grad in grads.items():
        expected = without.gradients[name] + coef * grad
        torch.testing.assert_close(beside.gradients[name], expected, rtol=0, atol=1e-7)


def test_ptx_does_not_depend_on_micro_batches(tmp_path: Path) -> None:
    whole = ptx_keeper(tmp_path, 0.3)
    expected = whole.step(rollout_for("ppo_rlhf"))["loss/ptx"]
    for layout, most in (("padded", 1), ("packed", 2)):
        split = ptx_keeper(tmp_path, 0.3, layout=layout, micro_samples=most)
        assert split.step(rollout_for("ppo_rlhf"))["loss/ptx"] == pytest.approx(expected, abs=1e-9)
        for name, grad in whole.gradients.items():
            torch.testing.assert_close(split.gradients[name], grad, rtol=0, atol=1e-7)


def test_ptx_rests_in_the_warm_up_and_needs_demonstrations(tmp_path: Path) -> None:
    base = recipe("ppo_rlhf", tmp_path, objective={"ptx": {"coef": 0.1}, "critic": {"kind": "policy", "warmup": 1}})
    args = (base, build_objective(base), model(), load_tokenizer(base.model))
    with pytest.raises(ObjectiveError, match=r"objective\.ptx\.data"):
        Learner.create(*args)
    made = Learner.create(*args, demos=samples(demo=True))
    assert "loss/ptx" not in made.step(rollout_for("ppo_rlhf", 1))
    assert made.step(rollout_for("ppo_rlhf", 2))["loss/ptx"] > 0
