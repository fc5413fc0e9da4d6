"""Adapters: only they learn, the base is the reference, checkpoints hold nothing else, merging changes no logit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from retool.config import LoraConfig
from retool.errors import UserError
from retool.learner import CheckpointError, Learner
from retool.lora import adapters, adapters_off, add_adapters, is_adapter
from retool.models import load_tokenizer
from retool.objectives import build_objective
from tests.learner.build_runs import model, recipe, rollout_for

RANK = 3
PRESETS = ("sft", "grpo", "ppo_rlhf")
IDS = torch.arange(5, 45).reshape(2, 20)


def learner(name: str, out: Path, net: Any = None, **lora: Any) -> Learner:
    base = recipe(name, out, model={"lora": {"rank": RANK, **lora}}, learner={"lr": 1e-2})
    net = model(dtype=torch.float32) if net is None else net
    return Learner.create(base, build_objective(base), net, load_tokenizer(base.model))


def copies(made: Learner) -> dict[str, torch.Tensor]:
    return {
        f"{role}/{name}": p.detach().clone()
        for role, r in made.roles.items()
        for name, p in r.module.named_parameters()
    }


def logits(net: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = net(input_ids=IDS).logits
    return out


@pytest.mark.parametrize("name", PRESETS)
def test_only_adapters_learn(name: str, tmp_path: Path) -> None:
    made = learner(name, tmp_path)
    before = copies(made)
    for seed in (1, 2):
        made.step(rollout_for(name, seed))
    moved = {key for key, value in copies(made).items() if not torch.equal(value, before[key])}
    assert {k for k in moved if k.startswith("policy/")} == {
        f"policy/{n}" for n, _ in made.policy.module.named_parameters() if is_adapter(n)
    }
    assert made.policy.optimiser is not None and all(is_adapter(n) for n in made.policy.optimiser.names)
    if "critic" in made.roles:
        critic = {k.removeprefix("critic/") for k in moved if k.startswith("critic/")}
        assert {"head.weight", "head.bias"} <= critic
        assert all(is_adapter(n) for n in critic - {"head.weight", "head.bias"})
    frozen = [p for n, p in made.policy.module.named_parameters() if not is_adapter(n)]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)


def test_a_fresh_adapter_changes_nothing_and_seeds_decide() -> None:
    plain, adapted, same, other = (model(dtype=torch.float32) for _ in range(4))
    for net, seed in ((adapted, 1), (same, 1), (other, 2)):
        add_adapters(net, LoraConfig(rank=RANK), seed)
    assert torch.equal(logits(plain), logits(adapted))
    a, b, c = ([x.lora_A for x in adapters(net).values()] for net in (adapted, same, other))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not torch.equal(a[0], c[0])
    assert len({float(x.detach().sum()) for x in a}) == len(a)


def test_the_reference_is_the_base_and_takes_no_memory(tmp_path: Path) -> None:
    plain = model(dtype=torch.float32)
    made = learner("grpo", tmp_path)
    reference, policy = made.roles["reference"], made.policy
    assert reference.module is policy.module
    made.step(rollout_for("grpo", 1))
    twin = Learner.create(recipe("grpo", tmp_path), made.objective, plain, None)
    samples = rollout_for("grpo", 2)
    ours, _ = made.measure(samples, frozenset({"logp_ref", "logp_old"}))
    theirs, _ = twin.measure(samples, frozenset({"logp_ref"}))
    assert torch.allclose(ours["logp_ref"], theirs["logp_ref"], atol=1e-6)
    assert not torch.allclose(ours["logp_ref"], ours["logp_old"], atol=1e-4)
    with adapters_off(policy.module):
        assert torch.equal(logits(policy.module), logits(plain))
    assert not torch.allclose(logits(policy.module), logits(plain), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRESETS)
def test_resume_is_exact_and_checkpoints_hold_adapters_alone(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    first = learner(name, tmp_path, model(dtype=dtype))
    first.step(rollout_for(name, 1))
    first.save(tmp_path / "ckpt")
    kept = load_file(tmp_path / "ckpt" / "policy.safetensors")
    assert kept and all(is_adapter(n) for n in kept)
    assert not (tmp_path / "ckpt" / "reference.safetensors").exists()
    metrics = first.step(rollout_for(name, 2))
    second = learner(name, tmp_path, model(dtype=dtype))
    second.load(tmp_path / "ckpt")
    assert second.step(rollout_for(name, 2)) == metrics
    ours, theirs = copies(first), copies(second)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_reference_that_jumps_is_a_copy_and_resumes(tmp_path: Path) -> None:
    def made() -> Learner:
        base = recipe(
            "grpo",
            tmp_path,
            model={"lora": {"rank": RANK}},
            objective={"reference": {"kind": "hard", "every": 3}, "kl": {"place": "loss", "beta": 0.1}},
        )
        return Learner.create(base, build_objective(base), model(dtype=torch.float32), load_tokenizer(base.model))

    first = made()
    assert first.roles["reference"].module is not first.policy.module
    for seed in (1, 2):
        first.step(rollout_for("grpo", seed))
    first.save(tmp_path / "ckpt")
    second = made()
    second.load(tmp_path / "ckpt")
    assert second.step(rollout_for("grpo", 3)) == first.step(rollout_for("grpo", 3))
    ours, theirs = copies(first), copies(second)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert any(float(v.abs().sum()) > 0 for k, v in ours.items() if k.startswith("reference/") and "lora_B" in k)


def test_the_saved_model_is_merged_and_the_adapter_lies_beside_it(tmp_path: Path) -> None:
    made = learner("ppo_rlhf", tmp_path, alpha=8)
    made.step(rollout_for("ppo_rlhf", 1))
    made.save_model(tmp_path / "model")
    made.save_adapter(tmp_path / "adapter")
    made.save_critic(tmp_path / "critic")
    policy = made.policy.module
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert not adapters(loaded) and float((logits(loaded) - logits(policy)).abs().max()) <= 1e-5
    with adapters_off(policy):
        assert float((logits(loaded) - logits(policy)).abs().max()) > 1e-3
    files = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["lora_alpha"]) == ("LORA", RANK, 8)
    whole, base = loaded.state_dict(), model(dtype=torch.float32).state_dict()
    assert len(files) == 2 * len(adapters(policy))
    for name in adapters(policy):
        a, b = (files[f"base_model.model.{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        assert a.shape[0] == b.shape[1] == RANK and name.rsplit(".", 1)[-1] in about["target_modules"]
        assert torch.allclose(base[f"{name}.weight"] + 8 / RANK * b @ a, whole[f"{name}.weight"], atol=1e-6)
    critic = AutoModel.from_pretrained(tmp_path / "critic", dtype=torch.float32).eval()
    with torch.no_grad():
        states = made.roles["critic"].module.backbone(input_ids=IDS).last_hidden_state
        assert float((critic(input_ids=IDS).last_hidden_state - states).abs().max()) <= 1e-5


@pytest.mark.parametrize("section", [{"activation_checkpointing": True}, {"layout": "packed"}, {"micro_samples": 1}])
def test_memory_and_layout_change_no_gradient(section: dict[str, Any], tmp_path: Path) -> None:
    moved = []
    for more in ({}, section):
        base = recipe("ppo_rlhf", tmp_path, model={"lora": {"rank": RANK}}, learner={"lr": 1e-2, **more})
        made = Learner.create(base, build_objective(base), model(), load_tokenizer(base.model))
        made.step(rollout_for("ppo_rlhf", 1))
        moved.append(copies(made))
    assert all(torch.allclose(moved[0][k], moved[1][k], atol=1e-9) for k in moved[0])
    assert any(float(v.abs().sum()) > 0 for k, v in moved[0].items() if "lora_B" in k)


def test_targets(tmp_path: Path) -> None:
    made = learner("sft", tmp_path, targets=("q_proj", "v_proj"))
    assert {n.rsplit(".", 1)[-1] for n in adapters(made.policy.module)} == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match=r"no linear layer 'query'; it has .*q_proj"):
        learner("sft", tmp_path, targets=("query",))
    every = adapters(learner("sft", tmp_path).policy.module)
    assert len(every) == 14 and "lm_head" not in " ".join(every)


def test_a_checkpoint_without_adapters_is_refused(tmp_path: Path) -> None:
    base = recipe("grpo", tmp_path)
    whole = Learner.create(base, build_objective(base), model(dtype=torch.float32), load_tokenizer(base.model))
    whole.save(tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="written for another model"):
        learner("grpo", tmp_path).load(tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"learner": {"shard": "fsdp"}}, "shard fsdp"),
        ({"objective": {"reference": {"kind": "ema"}}}, "average of two adapters' factors"),
        ({"model": {"lora": None}, "engine": {"kind": "vllm", "weight_sync": "adapter"}}, "needs model.lora"),
    ],
)
def test_what_adapters_cannot_do_is_refused(sections: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=match):
        recipe("grpo", tmp_path, **({"model": {"lora": {}}} | sections))
