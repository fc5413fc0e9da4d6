"""`retool train --dry-run`: counted parameters and states are those of the real networks; the estimate stops nobody."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from retool import estimate as est
from retool.calibrate import calibrate
from retool.config import ModelConfig, Recipe, TinyModelConfig
from retool.learner import Learner
from retool.learner.optimiser import Optimiser
from retool.models import load_model, load_tokenizer
from retool.objectives import build_objective
from retool.recipe import load_recipe
from retool.train import tags_of

REPO = Path(__file__).parents[2]
TINY = REPO / "recipes/tiny.yaml"
SHAPES = {
    "llama, tied": LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen, untied, its own head width": Qwen3Config(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        tie_word_embeddings=False,
    ),
}


def saved(config: Any, folder: Path) -> ModelConfig:
    """Only the configuration: there are no weights to load."""
    config.save_pretrained(folder)
    return ModelConfig(path=str(folder))


def tensor_bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe(TINY, list(overrides))


@pytest.mark.parametrize("tiny", [TinyModelConfig(), TinyModelConfig(hidden=32, layers=2, heads=2, intermediate=64)])
def test_parameters_of_the_tiny_model(tiny: TinyModelConfig) -> None:
    config = ModelConfig(tiny=tiny)
    tokenizer = load_tokenizer(config)
    real = load_model(config, tokenizer)
    assert est.parameters(est.meta_model(config, len(tokenizer))) == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_a_configuration_without_weights(name: str, tmp_path: Path) -> None:
    meta = est.meta_model(saved(SHAPES[name], tmp_path))
    real = AutoModelForCausalLM.from_config(SHAPES[name])
    assert all(p.is_meta for p in meta.parameters())
    assert est.parameters(meta) == sum(p.numel() for p in real.parameters())
    shape = est.shape_of(meta)
    head = SHAPES[name].head_dim or 8
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (SHAPES[name].num_hidden_layers, 2, head)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimiser_states_are_counted_exactly(dtype: str) -> None:
    config = ModelConfig(tiny=TinyModelConfig(hidden=32, layers=2, heads=2, intermediate=64), dtype=dtype)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(config)
    real = load_model(config, tokenizer)
    optimiser = Optimiser(real, 1e-3, (0.9, 0.999), 0.0)
    ids = torch.arange(6)[None]
    real(input_ids=ids, labels=ids).loss.backward()
    grads = [m.grad for m in optimiser.masters if m.grad is not None]
    meta = est.meta_model(config, len(tokenizer))
    assert est.gradient_bytes(meta) == tensor_bytes(grads)
    from retool.learner.world import World

    optimiser.step(1.0, 1.0, World())
    assert est.optimiser_bytes(meta) == tensor_bytes(optimiser.state().values())
    assert est.weight_bytes(meta) == tensor_bytes(real.parameters())


@pytest.mark.parametrize("objective", ["grpo", "ppo_rlhf"])
def test_states_of_a_learner_are_within_a_seventh(objective: str) -> None:
    recipe = recipe_of(f"objective={objective}", "model.dtype=bfloat16")
    tokenizer = load_tokenizer(recipe.model, tags_of(recipe))
    built = build_objective(recipe)
    learner = Learner.create(recipe, built, load_model(recipe.model, tokenizer, 0), tokenizer)
    for role in learner.roles.values():
        for p in role.module.parameters() if role.optimiser is not None else ():
            p.grad = torch.zeros_like(p)
        if role.optimiser is not None:
            for m in role.optimiser.masters:
                m.grad = torch.zeros_like(m)
            role.optimiser.adam.step()
    measured = 0
    for role in learner.roles.values():
        measured += tensor_bytes(role.module.parameters())
        if role.optimiser is not None:
            measured += tensor_bytes(role.optimiser.state().values())
            measured += tensor_bytes(m.grad for m in role.optimiser.masters if m.grad is not None)
    found = est.estimate(recipe, measure=False).memory
    states = sum(n for name, n in found.items() if name not in ("activations", "KV cache"))
    assert abs(states - measured) <= 0.15 * measured
    assert ("critic" in found) is (built.critic is not None) and ("reference" in found) is (built.reference is not None)


@pytest.mark.parametrize("objective", ["grpo", "ppo_rlhf"])
def test_states_of_a_learner_with_adapters_are_counted(objective: str) -> None:
    """Only what learns has gradients and moments, and the reference is the policy without its adapters."""
    recipe = recipe_of(f"objective={objective}", "model.lora.rank=4", "objective.reference.kind=frozen")
    tokenizer = load_tokenizer(recipe.model, tags_of(recipe))
    learner = Learner.create(recipe, build_objective(recipe), load_model(recipe.model, tokenizer, 0), tokenizer)
    found = est.estimate(recipe, measure=False).memory
    policy = learner.policy
    assert policy.optimiser is not None
    assert found["weights"] == tensor_bytes(policy.module.parameters())
    assert found["gradients"] == tensor_bytes(policy.optimiser.masters)
    assert found["optimiser"] == 2 * found["gradients"] + 4 * len(policy.optimiser.masters)
    assert found["gradients"] < found["weights"] / 2 and "reference" not in found
    if "critic" in learner.roles:
        optimiser = learner.roles["critic"].optimiser
        assert optimiser is not None
        learnt = tensor_bytes(optimiser.masters)
        whole = tensor_bytes(learner.roles["critic"].module.parameters())
        assert found["critic"] == whole + 3 * learnt + 4 * len(optimiser.masters)


def test_a_vllm_server_is_counted_apart() -> None:
    recipe = recipe_of("engine.kind=vllm", "deterministic=false", "engine.slots=5", "rollout.max_tokens=40")
    found = est.estimate(recipe, measure=False)
    embedded = est.estimate(recipe_of("engine.slots=5", "rollout.max_tokens=40"), measure=False)
    assert found.server["weights"] == found.memory["weights"] and found.prompt_tokens is not None
    columns = -(-(found.prompt_tokens + 40) // 64) * 64
    assert found.server["KV cache"] == 5 * columns * found.cache_token == embedded.memory["KV cache"]
    assert "KV cache" not in found.memory and embedded.server == {}
    assert found.total + found.server["KV cache"] == embedded.total
    lines = "\n".join(est.report(recipe, found))
    assert "the server that the run starts, not counted above" in lines and "KiB of keys and values a token" in lines


def test_activations_are_of_the_right_size() -> None:
    recipe = recipe_of("model.tiny.hidden=64", "model.tiny.intermediate=128", "model.tiny.layers=3")
    tokenizer = load_tokenizer(recipe.model, tags_of(recipe))
    real = load_model(recipe.model, tokenizer, 0)
    kept: dict[int, int] = {}
    held = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        held.append(t)  # so that no address is used twice
        return t

    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        real.base_model(input_ids=torch.zeros(4, 100, dtype=torch.long), use_cache=False)
    measured = sum(n for address, n in kept.items() if address not in weights)
    shape = est.shape_of(real)
    logits = 4 * 4 * 400 * shape.vocabulary
    counted = est.activation_bytes(shape, 400, 4, False) - logits
    assert 0.6 * measured <= counted <= 1.6 * measured
    assert est.activation_bytes(shape, 400, 4, True) < est.activation_bytes(shape, 400, 4, False)


def test_the_cache_is_what_the_engine_allocates() -> None:
    from retool.engines.slot_cache import SlotCache

    recipe = recipe_of()
    tokenizer = load_tokenizer(recipe.model, tags_of(recipe))
    real = load_model(recipe.model, tokenizer, 0)
    cache = SlotCache(5)
    cache.reserve(70)
    cache.select(None, 5, torch.zeros(5, 1, dtype=torch.long), 1)
    real(input_ids=torch.ones(5, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert est.cache_bytes(est.shape_of(real), 5, 70, 4) == tensor_bytes([*cache._keys, *cache._values])


def test_tokens_of_a_step() -> None:
    found = est.estimate(recipe_of("rollout.prompts=3", "rollout.group_size=5", "rollout.max_tokens=40"), measure=False)
    assert (found.trajectories, found.rollout_tokens) == (15, 600)
    assert found.prompt_tokens is not None and found.trained_tokens == 15 * (40 + found.prompt_tokens)
    assert found.pace is None and found.seconds == {}


def test_pace_is_positive_and_leaves_the_threads_alone() -> None:
    before = torch.get_num_threads()
    pace = calibrate(SHAPES["qwen, untied, its own head width"], torch.device("cpu"), "float32", 4, threads=1)
    assert torch.get_num_threads() == before
    values = (pace.decode_layer_s, pace.forward_layer_s, pace.train_layer_s, pace.head_s)
    assert all(math.isfinite(v) and v > 0 for v in values)


def test_time_grows_with_the_work() -> None:
    few = est.estimate(recipe_of())
    assert set(few.seconds) >= {"sampling", "learning"}
    assert few.pace is not None
    more = est._seconds(
        recipe_of("rollout.max_tokens=96"),
        build_objective(recipe_of()),
        est.shape_of(est.meta_model(recipe_of().model, 100)),
        few.pace,
        few.trained_tokens,
    )
    assert more["sampling"] == pytest.approx(2 * few.seconds["sampling"])
    assert more["learning"] == pytest.approx(few.seconds["learning"])


def dry_run(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "retool", "train", str(TINY), *overrides, "--dry-run"]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO)


def test_the_recipe_is_on_stdout_and_the_estimate_on_stderr() -> None:
    done = dry_run()
    assert done.returncode == 0
    assert Recipe.model_validate(yaml.safe_load(done.stdout)) == recipe_of()
    for word in ("estimate", "parameters", "optimiser", "KV cache", "a step", "rough"):
        assert word in done.stderr


def test_a_model_that_is_not_there_is_no_reason_to_refuse() -> None:
    done = dry_run("model.tiny=null", "model.path=./no/such/model")
    assert done.returncode == 0 and "no estimate: there is no model folder" in done.stderr
    assert yaml.safe_load(done.stdout)["model"]["path"] == "./no/such/model"
