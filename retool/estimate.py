"""What a recipe will take before it starts: parameters, memory, tokens and time of a step (`retool train --dry-run`).

No weights are loaded: networks are made on torch's meta device, from the configuration alone. States (weights,
gradients, optimiser, reference, critic) are counted exactly; activations and time are estimates, and say so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from retool.calibrate import Pace, calibrate
from retool.config import ModelConfig, Recipe, TinyModelConfig
from retool.console import errors
from retool.errors import UserError
from retool.learner.head import CHUNK_ELEMENTS
from retool.lora import add_adapters, has_adapters
from retool.models import _existing, load_tokenizer, pick_device, tiny_model
from retool.objectives import Objective, build_objective
from retool.problems import load_problems
from retool.protocols import build_protocol
from retool.protocols.codec import Codec
from retool.train import tags_of

_PROMPTS_LOOKED_AT = 64
_MASTER = _MOMENT = 4  # bytes of an fp32 element
_GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    """What matters of an architecture. `vocabulary` and all widths in elements."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int


@dataclass(frozen=True)
class Estimate:
    """`memory`: bytes by what holds them, of the learner's process with its embedded engine; `server`: of each vLLM
    server, which has its own. `cache_token`: bytes of one token's keys and values. `learning`: parameters that are
    trained. `rollout_tokens`: most that a step can sample. `trained_tokens`: most that it can learn from, prompts
    included. `pace`: what was measured, or None. `seconds`: of a step, by part; empty without a measurement."""

    parameters: int
    memory: dict[str, int]
    trajectories: int
    rollout_tokens: int
    trained_tokens: int
    prompt_tokens: int | None
    pace: Pace | None
    seconds: dict[str, float]
    server: dict[str, int]
    cache_token: int
    learning: int

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.memory.values())


def meta_model(config: ModelConfig, vocabulary: int | None = None) -> Any:
    """The policy without its weights. `vocabulary`: of a from-scratch model's tokenizer. Raises `ModelError`, or what
    transformers raises for a configuration that cannot be had."""
    with torch.device("meta"):
        if config.path is None:
            return tiny_model(config.tiny or TinyModelConfig(), vocabulary or 128, 0, 1, 0).to(
                getattr(torch, config.dtype)
            )
        from transformers import AutoConfig, AutoModelForCausalLM

        found = AutoConfig.from_pretrained(_existing(config.path), trust_remote_code=False)
        return AutoModelForCausalLM.from_config(found, dtype=getattr(torch, config.dtype), attn_implementation="sdpa")


def shape_of(model: Any) -> Shape:
    """Read off a model's configuration."""
    c = model.config.get_text_config()
    heads = int(c.num_attention_heads)
    width = int(getattr(c, "intermediate_size", None) or 4 * c.hidden_size)
    if experts := getattr(c, "num_experts_per_tok", None):
        width = int(experts) * int(getattr(c, "moe_intermediate_size", None) or width)
    return Shape(
        layers=int(c.num_hidden_layers),
        hidden=int(c.hidden_size),
        intermediate=width,
        heads=heads,
        kv_heads=int(getattr(c, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(c, "head_dim", None) or c.hidden_size // heads),
        vocabulary=int(c.vocab_size),
        context=int(getattr(c, "max_position_embeddings", None) or 0),
    )


def parameters(model: nn.Module) -> int:
    """Elements of all parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Of parameters; tied ones count once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def optimiser_bytes(model: nn.Module) -> int:
    """Of everything that `Optimiser.state()` holds after a step: two moments and a step count for each parameter that
    learns, and an fp32 master copy of one of low precision."""
    total = 0
    for p in learning(model):
        low = p.dtype in (torch.bfloat16, torch.float16)
        wide = _MOMENT if low else p.element_size()
        total += 2 * wide * p.numel() + 4 + (_MASTER * p.numel() if low else 0)
    return total


def gradient_bytes(model: nn.Module) -> int:
    """Gradients are gathered in fp32 (wider for wider weights)."""
    return sum(p.numel() * max(4, p.element_size()) for p in learning(model))


def learning(model: nn.Module) -> list[nn.Parameter]:
    """What is trained: everything, or adapters."""
    return [p for p in model.parameters() if p.requires_grad]


def activation_bytes(shape: Shape, tokens: int, element: int, checkpointing: bool) -> int:
    """What the backward pass needs of a micro-batch of `tokens`. A layer of the Llama kind keeps: around each norm its
    input, the normalised and the scaled states; queries, keys, values (repeated for every head) and the attention's
    output; four times the feed-forward width. In low precision the norms keep an fp32 copy, too."""
    q = shape.heads * shape.head_dim
    norms = 6 * shape.hidden * element + (4 * shape.hidden * 4 if element < 4 else 0)
    layer = norms + 4 * q * element + 4 * shape.intermediate * element
    logits = 4 * 4 * min(tokens * shape.vocabulary, max(CHUNK_ELEMENTS, shape.vocabulary))
    if checkpointing:
        return tokens * (shape.layers * shape.hidden * element + layer) + logits
    return tokens * shape.layers * layer + logits


def cache_bytes(shape: Shape, slots: int, columns: int, element: int) -> int:
    """Keys and values of the embedded engine, with `columns` tokens in each slot (rounded up to its step of 64)."""
    return 2 * shape.layers * slots * shape.kv_heads * shape.head_dim * (-(-columns // 64) * 64) * element


def estimate(recipe: Recipe, *, measure: bool = True) -> Estimate:
    """Raises `UserError`, `OSError` or `ValueError` when the model's configuration cannot be had. `measure`: time one
    layer for about a second."""
    own = recipe.model.path is None
    tokenizer = load_tokenizer(recipe.model, tags_of(recipe)) if own else None
    model = meta_model(recipe.model, len(tokenizer) if tokenizer is not None else None)
    base = weight_bytes(model)
    if recipe.model.lora is not None:
        add_adapters(model, recipe.model.lora, 0)
    shape, objective = shape_of(model), build_objective(recipe)
    element = getattr(torch, recipe.model.dtype).itemsize
    prompt = _longest_prompt(recipe, tokenizer)
    context = recipe.engine.context or shape.context or (1 << 30)
    longest = min(context, (prompt or 0) + recipe.rollout.max_tokens)
    r = recipe.rollout
    trajectories = r.prompts * r.members
    trained = r.prompts * r.group_size * longest
    micro = max(longest, min(recipe.learner.micro_tokens, trained))
    memory = _states(model, objective)
    memory["activations"] = activation_bytes(shape, micro, element, recipe.learner.activation_checkpointing)
    if recipe.engine.kind == "transformers":
        slots = min(recipe.engine.slots, max(trajectories, r.concurrency))
        memory["KV cache"] = cache_bytes(shape, slots, longest, element)
    server: dict[str, int] = {}
    if recipe.engine.kind == "vllm":
        side_by_side = min(recipe.engine.slots, r.concurrency, trajectories)
        server = {"weights": base, "KV cache": cache_bytes(shape, side_by_side, longest, element)}
    pace = None
    if measure:
        threads = recipe.learner.threads or (1 if recipe.deterministic else None)
        pace = calibrate(
            model.config, pick_device(recipe.model.device), recipe.model.dtype, recipe.engine.slots, threads
        )
    seconds = _seconds(recipe, objective, shape, pace, trained) if pace is not None else {}
    tokens = trajectories * r.max_tokens
    each = cache_bytes(shape, 1, 64, element) // 64
    taught = sum(p.numel() for p in learning(model))
    return Estimate(
        parameters(model), memory, trajectories, tokens, trained, prompt, pace, seconds, server, each, taught
    )


def _states(model: Any, objective: Objective) -> dict[str, int]:
    """Bytes of the networks and what trains them, by name, as `retool.learner.networks` makes them."""
    out = {"weights": weight_bytes(model), "gradients": gradient_bytes(model), "optimiser": optimiser_bytes(model)}
    borrowed = objective.reference is not None and objective.reference.kind == "frozen" and has_adapters(model)
    if objective.reference is not None and not borrowed:
        out["reference"] = weight_bytes(model)
        low = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
        if objective.reference.kind != "frozen" and low:
            out["reference"] += _MASTER * sum(p.numel() for p in learning(model))
    if objective.critic is not None:
        head = nn.Linear(shape_of(model).hidden, 1, device="meta", dtype=next(model.parameters()).dtype)
        critic = nn.ModuleList([model.base_model, head])
        out["critic"] = weight_bytes(critic) + gradient_bytes(critic) + optimiser_bytes(critic)
    return out


def _longest_prompt(recipe: Recipe, tokenizer: Any) -> int | None:
    """Tokens of the longest of the first problems, where they and the tokenizer are at hand; else None."""
    if recipe.problems.kind == "hf":
        return None
    try:
        tokenizer = tokenizer or load_tokenizer(recipe.model, tags_of(recipe))
        codec = Codec(tokenizer, build_protocol(recipe.protocol))
        return max(len(codec.prompt_ids(p)) for p in load_problems(recipe.problems)[:_PROMPTS_LOOKED_AT])
    except (UserError, OSError, ValueError):
        return None


def _seconds(recipe: Recipe, objective: Objective, shape: Shape, pace: Pace, trained: int) -> dict[str, float]:
    """Seconds of a step's parts when every trajectory is as long as it may be."""
    r, c = recipe.rollout, recipe.learner
    out: dict[str, float] = {}
    if recipe.engine.kind == "transformers":
        side_by_side = min(recipe.engine.slots, r.concurrency, r.prompts * r.members)
        ticks = math.ceil(r.prompts * r.members / side_by_side) * r.max_tokens
        out["sampling"] = ticks * (shape.layers * pace.decode_layer_s + pace.head_s * side_by_side)
    forward = shape.layers * pace.forward_layer_s + pace.head_s
    backward = shape.layers * pace.train_layer_s + 3 * pace.head_s
    if c.activation_checkpointing:
        backward += forward
    scored = [{"logp_old", "entropy"}, {"logp_ref"}, {"value", "bootstrap"}]
    out["scoring"] = trained * forward * sum(bool(objective.scores & names) for names in scored)
    learners = 1 + (objective.critic is not None)
    out["learning"] = trained * c.epochs * (learners * backward + (forward if objective.current else 0.0))
    return {name: value for name, value in out.items() if value > 0}


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device, or None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    from retool.machine import memory

    return memory()[1] or None


def report(recipe: Recipe, found: Estimate) -> list[str]:
    """Lines for a person."""
    device = pick_device(recipe.model.device)
    free = available_bytes(device)
    r = recipe.rollout
    lines = [
        "estimate, made without loading the model: states are counted, activations and time are rough",
        f"  policy    {found.parameters:,} parameters"
        + (f" ({found.learning:,} of them learn)" if found.learning < found.parameters else "")
        + f", {recipe.model.dtype}, {device}",
        f"  memory    {size(found.total)}" + (f" of {size(free)} that are free" if free else ""),
        *(f"    {name:<12}{size(n)}" for name, n in found.memory.items()),
    ]
    if free and found.total > free:
        lines.append(
            "    that is more than there is: lower learner.micro_tokens or engine.slots, set "
            "learner.activation_checkpointing=true or model.dtype=bfloat16, or take a smaller model"
        )
    lines += _server_lines(recipe, found)
    lines.append(
        f"  rollout   {found.trajectories:,} trajectories, at most {found.rollout_tokens:,} tokens a step"
        + (f" (prompts of up to {found.prompt_tokens} tokens beside them)" if found.prompt_tokens else "")
    )
    if r.dynamic.kind != "none":
        lines.append(f"    dynamic sampling may take up to {r.dynamic.max_batches} times as many")
    if found.seconds and found.pace is not None:
        parts = ", ".join(f"{name} {duration(s)}" for name, s in found.seconds.items())
        whole = sum(found.seconds.values())
        lines += [
            f"  time      about {duration(whole)} a step, {duration(whole * recipe.steps)} for {recipe.steps} steps, "
            "if every trajectory is as long as it may be",
            f"    {parts}; without the tool's time and the cost of long attention",
            f"    measured here: one layer in {found.pace.measured_s:.1f} s",
        ]
    return lines


def _server_lines(recipe: Recipe, found: Estimate) -> list[str]:
    """What each vLLM server needs beside the trainer; nothing for an embedded engine."""
    if not found.server:
        return []
    own = "the server that the run starts" if not recipe.engine.urls else f"each of {len(recipe.engine.urls)} servers"
    return [
        f"  vLLM      {size(sum(found.server.values()))} for {own}, not counted above",
        *(f"    {name:<12}{size(n)}" for name, n in found.server.items()),
        f"    {size(found.cache_token)} of keys and values a token; vLLM sets room aside for them when it starts "
        "(CPU: 1 GiB, or VLLM_CPU_KVCACHE_SPACE; GPU: what --gpu-memory-utilization leaves), and trajectories that do "
        "not fit wait",
    ]


def print_estimate(recipe: Recipe) -> None:
    """On standard error, so that standard output stays the recipe. An estimate that cannot be made stops nobody."""
    try:
        lines = report(recipe, estimate(recipe))
    except (UserError, OSError, ValueError, RuntimeError, ImportError) as error:
        lines = [f"no estimate: {' '.join(str(error).split())[:300]}"]
    for line in lines:
        errors.print(line, markup=False, soft_wrap=True)


def size(n: int) -> str:
    """Bytes for a person."""
    if n < 1 << 20:
        return f"{n / 1024:.1f} KiB"
    return f"{n / _GIB:.1f} GiB" if n >= _GIB else f"{n / (1 << 20):.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds for a person."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
