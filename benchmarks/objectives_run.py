"""One preset, one seed, a fixed small budget on the demo task: reward, held-out accuracy, entropy and the rest."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from retool.config import Recipe
from retool.data_command import generate_data
from retool.demo import with_model
from retool.entropy_law import fit_run
from retool.evaluate import evaluate, scorecard
from retool.files import write_json
from retool.learner.collate import collate
from retool.learner.layout import lay_out
from retool.learner.roles import language_role
from retool.models import load_model, load_tokenizer
from retool.objectives import PRESETS, preset_fragment
from retool.problems import load_problems
from retool.recipe import load_recipe, merge, read_yaml, resolve
from retool.records import Trajectory
from retool.rollout.groups import to_sample
from retool.rollout.log import RolloutLog
from retool.sft import sft
from retool.train import set_threads, tags_of, train
from retool.workshop import open_workshop

RUNS = Path("runs/objectives")
RECIPE = "recipes/demo.yaml"
PROMPTS, GROUP, UPDATES, LR, HELD_OUT = 8, 8, 4, 3e-4, 150
ENDS = 3
"""Steps at each end of a run that a first and a last value are the mean of."""

NO_KL = {"kl": {"place": "none", "beta": 0.0}, "reference": {"kind": "none"}}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo (no KL)": ("grpo", {"objective": {**NO_KL, "aggregation": {"mode": "token_mean"}}}),
    "grpo (dynamic)": ("dapo", {"objective": {"policy": {"clip_high": 0.2}}}),
    "vc_ppo (cold critic)": ("vc_ppo", {"objective": {"critic": {"pretrain": {"steps": 0}}}}),
}
"""Baselines that differ from their claim's preset in one thing only: name -> (preset, keys laid over it)."""

TWEAKS: dict[str, dict[str, Any]] = {
    "clip_cov": {
        "objective": {"select": [{"kind": "clip_cov", "share": 0.02, "source": "current", "denominator": "all_act"}]}
    },
    "kl_cov": {"objective": {"kl_cov": {"share": 0.02}}},
    "rloo": {"learner": {"updates": 1}},
}
"""What a budget of some thousand tokens a step needs: the papers' 2e-4 of them would be less than one token. RLOO has
neither ratio nor clip: it is for one update a rollout, and four of them ruined the policy."""


def names() -> list[str]:
    """Everything that can be run: each preset but imitation, and the variants whose preset is there."""
    return [n for n in PRESETS if n != "sft"] + [n for n, (base, _) in VARIANTS.items() if base in PRESETS]


def recipe_of(name: str, seed: int, steps: int, threads: int, out: Path) -> Recipe:
    """The demo's task, model and rollouts with the preset's own objective, reward map and sampling."""
    preset, keys = VARIANTS.get(name, (name, {}))
    raw = read_yaml(RECIPE)
    reward = {k: v for k, v in raw["reward"].items() if k not in ("correct", "wrong")}
    raw |= {"name": f"{name}-{seed}", "out": str(out), "seed": seed, "steps": steps, "checkpoint_every": steps}
    raw |= {"objective": {"preset": preset}, "reward": reward}
    raw["model"] = {"path": str(start_model())}
    raw["rollout"] = {**raw["rollout"], "prompts": PROMPTS, "group_size": GROUP}
    raw["learner"] = {"lr": LR, "updates": UPDATES, "micro_tokens": raw["learner"]["micro_tokens"], "threads": threads}
    raw["learner"] |= {"warmup_steps": 0, "weight_decay": 0.0}
    raw["eval"]["problems"]["count"] = HELD_OUT
    for more in (scaled(preset_fragment(preset), raw["rollout"]["max_tokens"]), TWEAKS.get(preset, {}), keys):
        raw = merge(raw, more)
    return resolve(raw, where=name)


def scaled(fragment: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Those of a preset's values that are lengths or phases of large runs, cut down to this budget."""
    out: dict[str, Any] = {}
    objective = fragment.get("objective", {})
    critic: dict[str, Any] = {}
    if objective.get("critic", {}).get("pretrain", {}).get("steps"):
        critic["pretrain"] = {"steps": 6, "every": 2, "patience": 6, "min_explained_variance": 1.0}
    if objective.get("critic", {}).get("warmup"):
        critic["warmup"] = 2
    for key, value in (
        ("critic", critic),
        ("aggregation", {"const_length": longest} if objective.get("aggregation", {}).get("mode") == "const" else {}),
        ("ptx", {"data": str(RUNS / "start" / "traces.jsonl")} if objective.get("ptx", {}).get("coef") else {}),
    ):
        if value:
            out.setdefault("objective", {})[key] = value
    if fragment.get("rollout", {}).get("dynamic", {}).get("kind", "none") != "none":
        out["rollout"] = {"dynamic": {"max_batches": 4}}
    return out


def start_model() -> Path:
    return RUNS / "start" / "sft" / "model"


def make_start(threads: int) -> dict[str, Any]:
    """Cold-start traces and SFT, once; what it can do before any RL."""
    out, figures = RUNS / "start", RUNS / "start" / "figures.json"
    # Heads as they were when the committed figures were measured.
    keys = [f"out={out}", "model.tiny.head_dim=24", f"learner.threads={threads}", f"eval.problems.count={HELD_OUT}"]
    recipe = load_recipe(RECIPE, keys)
    if not figures.exists():
        shutil.rmtree(out, ignore_errors=True)
        generate_data(recipe)
        set_threads(recipe)
        sft(recipe)
        card = scorecard(held_out(with_model(recipe, start_model()))[0])
        write_json(figures, card_figures(card))
    return dict(json.loads(figures.read_text(encoding="utf-8")))


def run_one(name: str, seed: int, steps: int, threads: int) -> dict[str, Any]:
    """Train, evaluate, measure. Raises what training raises."""
    out = RUNS / f"{name.replace(' ', '-').replace('(', '').replace(')', '')}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    recipe = recipe_of(name, seed, steps, threads, out)
    began = time.monotonic()
    result = asyncio.run(train(recipe))
    seconds = time.monotonic() - began
    trajectories, model = held_out(with_model(recipe, result.folder.model))
    with RolloutLog(result.folder.rollouts, read_only=True) as log:
        sampled = log.query("SELECT SUM(actions) AS n, COUNT(*) AS trajectories FROM trajectories")[0]
    law = fit_run(result.metrics)
    return {
        "seconds": round(seconds, 1),
        "tokens": int(sampled["n"]),
        "trajectories": int(sampled["trajectories"]),
        **card_figures(scorecard(trajectories)),
        "kl_to_start": kl_to_start(model, recipe, trajectories),
        **training_figures(result.metrics),
        **({"entropy_law": [round(law.a, 4), round(law.b, 4)]} if law is not None else {}),
        "curves": {
            key: [_short(m.get(metric, math.nan)) for m in result.metrics]
            for key, metric in (("accuracy", "rollout/accuracy"), ("entropy", "entropy"))
        },
    }


def held_out(recipe: Recipe) -> tuple[list[Trajectory], Any]:
    """Trajectories of the held-out problems with the tool, and the model that wrote them."""
    assert recipe.eval.problems is not None
    problems = load_problems(recipe.eval.problems)
    tokenizer = load_tokenizer(recipe.model, tags_of(recipe))
    model = load_model(recipe.model, tokenizer, recipe.seed)

    async def run() -> list[Trajectory]:
        async with open_workshop(recipe, model, tokenizer) as workshop:
            return await evaluate(workshop, recipe, problems)

    return asyncio.run(run()), model


def card_figures(card: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out figures that the table shows."""
    keys = ("accuracy", "code_ratio", "calls_ok", "length", "truncated")
    return {**{k: _short(card[k]) for k in keys}, "ci95": [_short(x) for x in card["ci95"]]}


def training_figures(metrics: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """First and last values (means of a few steps) and means over the run."""

    def values(*keys: str) -> list[float]:
        rows = [[m[k] for k in keys if k in m] for m in metrics]
        return [sum(row) for row in rows if row and all(map(math.isfinite, row))]

    def mean(found: Sequence[float]) -> float | None:
        return _short(statistics.fmean(found)) if found else None

    clips = sorted({k for m in metrics for k in m if k.rpartition("/")[2] in ("clip_low", "clip_high")})
    variance, entropy = values("value/explained_variance"), values("entropy")
    accuracy, reward, mixed = values("rollout/accuracy"), values("rollout/score"), values("filter/mixed_groups")
    return {
        "reward_first": mean(reward[:ENDS]),
        "reward_last": mean(reward[-ENDS:]),
        "train_gain": _short(_difference(accuracy)),
        "entropy_first": mean(entropy[:ENDS]),
        "entropy_last": mean(entropy[-ENDS:]),
        "clip_fraction": mean(values(*clips)) if clips else None,
        "explained_variance_first": mean(variance[:ENDS]),
        "explained_variance_last": mean(variance[-ENDS:]),
        "mixed_groups": mean(mixed),
        "starved": mean(values("dynamic/starved")),
        "infra_failures": metrics[-1].get("count/infra_failures", 0.0),
        "trained_equals_sampled": min((m["trained_equals_sampled"] for m in metrics if m.get("updates")), default=1.0),
    }


def _difference(values: Sequence[float]) -> float:
    half = len(values) // 2
    return statistics.fmean(values[half:]) - statistics.fmean(values[:half]) if half else math.nan


@torch.no_grad()
def kl_to_start(model: Any, recipe: Recipe, trajectories: Sequence[Trajectory]) -> float:
    """KL(policy || start) in nats a token, estimated (k3) on what the policy wrote on held-out problems."""
    tokenizer = load_tokenizer(recipe.model, tags_of(recipe))
    start = load_model(recipe.model.model_copy(update={"path": str(start_model())}), tokenizer, 0)
    roles = [language_role("now", model.eval(), 1.0), language_role("start", start.eval(), 1.0)]
    usable = [t for t in trajectories if t.usable and t.transcript.n_action]
    total, count = 0.0, 0
    for at in range(0, len(usable), 32):
        rollout = collate([to_sample(t) for t in usable[at : at + 32]], "sampled", torch.float32)
        inputs = lay_out(rollout.rows, rollout.starts, "padded", int(tokenizer.pad_token_id or 0))
        action = rollout.batch["action"]
        now, then = (role.logp(inputs.to(role.device), action.to(role.device)).need("logp") for role in roles)
        gap = (then - now)[action.to(now.device)].double()
        total, count = total + float((torch.exp(gap) - gap - 1).sum()), count + len(gap)
    return _short(total / max(count, 1))


def _short(value: float) -> float:
    """Five significant digits; JSON knows no nan."""
    return float(f"{value:.5g}") if math.isfinite(value) else -1.0
