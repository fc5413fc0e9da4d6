"""Synthetic rollouts, small float64 models, the objectives under test, and a learner that keeps its gradients."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from retool.config import Recipe, TinyModelConfig
from retool.learner import Learner, World
from retool.learner.collate import Rollout
from retool.learner.metrics import Mean
from retool.learner.shard import copy_into, full
from retool.models import load_tokenizer, tiny_model
from retool.objectives import (
    PRESETS,
    Aggregation,
    Critic,
    Objective,
    Reference,
    Structure,
    build_objective,
    preset_fragment,
)
from retool.objectives.estimators import Gae, NoAdvantage, Raw
from retool.objectives.selectors import LowProbability
from retool.objectives.terms import KlTerm, PairTerm, PolicyTerm, ValueTerm
from retool.records import TrainSample
from retool.transcript import Sample, Span, Transcript, digest_tokens

TINY = TinyModelConfig(hidden=16, layers=2, heads=2, intermediate=32, context=96)
PRESET_NAMES = ("sft", "grpo", "ppo_rlhf", "vapo", "gspo", "kl_cov")
"""Presets that every test runs; those of `test_invariance` run all."""
PROOFS = ("dpo", "gae", "spo_mix")
WIDE: dict[str, Any] = {"geo_rs": {"off_policy": {"reject": "geo", "low": 0.1, "high": 10.0, "denominator": "kept"}}}
"""Log-probs of these rollouts are made up, far from the model's: what would reject all of them is wider here."""


def recipe(preset: str, out: Path, **sections: dict[str, Any]) -> Recipe:
    """The preset's recipe with small-scale values; `sections` are merged over it key by key."""
    merged: dict[str, Any] = preset_fragment(preset)
    base = {"rollout": {"group_size": 4, "prompts": 3}, "learner": {"lr": 1e-3, "updates": 2}, "model": {"tiny": {}}}
    for source in (base, {"objective": WIDE.get(preset, {})}, sections):
        for name, values in source.items():
            merged[name] = {**merged.get(name, {}), **values}
    return Recipe(out=str(out), **merged)


def model(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    tokenizer = load_tokenizer(Recipe().model)
    return tiny_model(TINY, len(tokenizer), seed, tokenizer.eos_token_id, tokenizer.pad_token_id).to(dtype).eval()


def policy_span(ids: list[int], logps: list[float], turn: int) -> Span:
    return Span("policy", tuple(ids), turn, "text", tuple(logps), ((0, 0),), None, digest_tokens(ids, logps))


def samples(
    groups: int = 3, size: int = 4, seed: int = 0, demo: bool = False, pairs: bool = False
) -> list[TrainSample]:
    """Ragged two-turn trajectories with a tool span in the middle; every group has a right and a wrong answer."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(5, 100) for _ in range(rng.randint(low, high))]

    out = []
    for g in range(groups):
        for i in range(size):
            spans = [Span("prompt", tuple(ids(3, 8)))]
            for turn in range(2):
                tokens = ids(2, 9)
                logps = [-rng.uniform(2.0, 6.0) for _ in tokens]
                spans.append(Span("demo", tuple(tokens), turn) if demo else policy_span(tokens, logps, turn))
                if turn == 0 and rng.random() < 0.7:
                    spans.append(Span("tool", tuple(ids(1, 6)), 0, "observation"))
            accuracy = float(i == 0 or (i > 1 and rng.random() < 0.5))
            pair = (g * size + i) // 2 if pairs else -1
            score = accuracy if not pairs else float(i % 2)
            out.append(
                TrainSample(
                    f"0.{g}.{i}",
                    f"0.{g}",
                    Sample.whole(Transcript(spans)),
                    score,
                    accuracy,
                    pair,
                    truncated=i == 3,
                    void=i == 2 and g == 1,
                    tool_calls=i % 2,
                    tool_error_rate=0.5 * (i % 2),
                    problem=f"problem-{g}",
                    turn_rewards=(-0.1 * (i % 2), 0.1 * (i % 2)),
                )
            )
    return out


def objective(name: str, out: Path) -> Objective:
    """A preset's objective, or one of those that only prove the contracts."""
    if name in PRESETS:
        return build_objective(recipe(name, out))
    frozen = Reference()
    if name == "dpo":
        return Objective(name, NoAdvantage(), (PairTerm(),), Structure("pairs"), reference=frozen)
    if name == "gae":
        terms = (PolicyTerm(), ValueTerm())
        return Objective(name, Gae(0.99, 0.95, 0.98, bootstrap=True), terms, critic=Critic(normalise=True))
    policy = PolicyTerm(select=(LowProbability(0.9),))
    leash = KlTerm(coef=1e-2, aggregation=Aggregation("seq_mean_token_sum"), select=(LowProbability(0.9),))
    return Objective("spo_mix", Raw(), (policy, leash), reference=frozen)


def rollout_for(name: str, seed: int = 0) -> list[TrainSample]:
    return samples(seed=seed, demo=name == "sft", pairs=name == "dpo")


class GradientKeeper(Learner):
    """Scores, then moves the weights a little (ratios then differ from 1), and keeps gradients instead of stepping."""

    nudge = 0.02

    def _score(self, rollout: Rollout, metrics: Mean) -> Rollout:
        scored = super()._score(rollout, metrics)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for role in self.roles.values():
                if role.optimiser is not None:
                    for p in role.module.parameters():
                        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                        copy_into(p, full(p) + self.nudge * noise)
        self.gradients: dict[str, Tensor] = {}
        for name, role in self.roles.items():
            if role.optimiser is not None:
                self._keep(name, role.optimiser)
        return scored

    def _keep(self, name: str, optimiser: Any) -> None:
        def step(factor: float, clip: float, world: World) -> float:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in optimiser.masters]
            world.sum_([g for g in grads if not isinstance(g, DTensor)])
            for key, grad in zip(optimiser.names, grads):
                where = f"{name}/{key}"
                self.gradients[where] = self.gradients.get(where, 0) + full(grad).clone()
            optimiser.adam.zero_grad(set_to_none=True)
            return 1.0

        optimiser.step = step


def keeper(name: str, out: Path, world: World | None = None, **learner: Any) -> GradientKeeper:
    """A `GradientKeeper` for objective `name` on the small float64 model."""
    base = recipe(name if name in PRESETS else "grpo", out, learner=learner)
    made = GradientKeeper.create(base, objective(name, out), model(), load_tokenizer(base.model), world=world)
    assert isinstance(made, GradientKeeper)
    return made


def busy_ppo(out: Path, world: World | None = None, dtype: torch.dtype = torch.float64, **learner: Any) -> Learner:
    """PPO with everything that lives beside the rollout: a reference that moves and imitation of demonstrations."""
    changes = {
        "reference": {"kind": "ema", "eta": 0.3},
        "kl": {"place": "reward", "estimator": "k1", "beta": 0.5},
        "critic": {"kind": "policy", "normalise": True},
        "ptx": {"coef": 0.05, "batch": 3},
    }
    base = recipe("ppo_rlhf", out, learner=learner, objective=changes)
    tokenizer, demos = load_tokenizer(base.model), samples(groups=2, size=2, seed=7, demo=True)
    return Learner.create(base, build_objective(base), model(dtype=dtype), tokenizer, world=world, demos=demos)


def losses(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if k.startswith("loss/")}


def lengthen_tools(rows: list[TrainSample], extra: int) -> list[TrainSample]:
    """Every tool span gets `extra` more tokens."""
    out = []
    for row in rows:
        spans = [
            replace(s, ids=s.ids + tuple(range(5, 5 + extra))) if s.origin == "tool" else s
            for s in row.sample.transcript.spans
        ]
        out.append(replace(row, sample=Sample.whole(Transcript(spans))))
    return out
