"""`retool objectives` and `retool explain`: the house describes itself."""

from __future__ import annotations

import difflib
import json
from typing import Any

import yaml
from rich.markup import escape

from retool.console import console, table
from retool.errors import UserError
from retool.recipe import all_keys, nearest_key, resolve


def objective_rows() -> list[dict[str, Any]]:
    """The table of presets; structure and needs are read off the objective that the preset builds with defaults."""
    from retool.objectives.presets import PRESETS

    out: list[dict[str, Any]] = []
    for p in PRESETS.values():
        structure, needs = describe(p.name)
        row = {"name": p.name, "family": p.family, "structure": structure, "needs": needs}
        out.append({**row, "summary": p.summary, "source": p.source, "same_as": list(p.same_as)})
    return out


def describe(name: str) -> tuple[str, list[str]]:
    """(structure, what it needs) of a preset with default values."""
    from retool.objectives import build_objective

    try:
        recipe = resolve({"objective": {"preset": name}}, where=name)
        objective = build_objective(recipe)
    except UserError as error:  # a preset may want a path before it can be built: that is what it needs
        return "?", [" ".join(str(error).split())]
    reads = objective.advantage.reads.union(*(t.reads for t in objective.terms), *(s.reads for s in objective.select))
    rollout, learner, pretrain = recipe.rollout, recipe.learner, getattr(recipe.objective.critic, "pretrain", None)
    found = {
        "demonstrations": objective.train_on == "demo" or getattr(objective, "aside", None) is not None,
        "a group of two or more": "in_baseline" in reads or recipe.objective.filter.kind != "keep",
        "preference pairs": objective.structure.kind == "pairs",
        "critic": objective.critic is not None,
        "value pretraining": bool(pretrain is not None and pretrain.steps),
        "critic warm-up": bool(objective.critic is not None and objective.critic.warmup),
        "reference": objective.reference is not None,
        "token entropies": "entropy" in objective.scores,
        "current log-probs": objective.current,
        f"{learner.updates * learner.epochs} updates a rollout": learner.updates * learner.epochs > 1,
        "one update a rollout": recipe.objective.off_policy.old == "detached",
        "dynamic sampling": rollout.dynamic.kind != "none",
        f"{rollout.oversample} x G samples": rollout.oversample > 1,
        "prioritised problems": rollout.priority != "none",
    }
    return objective.structure.kind, [need for need, holds in found.items() if holds]


def print_objectives(as_json: bool) -> None:
    """The table of presets."""
    rows = objective_rows()
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    header = ["name", "family", "structure", "needs", "source"]
    cells = [[escape(", ".join(v) if isinstance(v, list) else v) for v in (r[h] for h in header)] for r in rows]
    console.print(table("objectives", header, cells, figures=False))
    console.print(
        "what one of them is: retool explain NAME; use it with: retool train RECIPE objective=NAME", markup=False
    )


def print_key(key: str) -> None:
    """A recipe key, all keys of a section, or a preset by name. Numbers of list items (`objective.select.0.share`) are
    read over. Raises `UserError` for an unknown one, with the nearest."""
    from retool.objectives.presets import PRESETS

    known = dict(all_keys())
    key = ".".join(part for part in key.split(".") if not part.isdigit())
    preset = key.removeprefix("objective.preset=").removeprefix("objective=")
    if preset in PRESETS:
        _print_preset(preset)
    if preset in PRESETS and key not in known:
        return
    if key not in known:
        raise UserError(f"there is no recipe key or preset {key!r}" + _nearest(key, list(PRESETS)))
    info = known[key]
    console.print(f"[bold]{escape(key)}[/]  {escape(_type_name(info.annotation))}", soft_wrap=True)
    if info.description:
        console.print(info.description, markup=False)
    if not info.is_required() and info.default_factory is None and not key_is_section(key, known):
        console.print(f"default: {info.default!r}", markup=False)
    elif info.is_required():
        console.print("it must be given where its section is used", markup=False)
    for inner, inner_info in known.items():
        if inner.startswith(f"{key}.") and inner.count(".") == key.count(".") + 1:
            console.print(f"  {inner}: {inner_info.description or ''}", markup=False, soft_wrap=True)
    if key == "objective.preset":
        console.print(f"presets: {', '.join(PRESETS)}", markup=False, soft_wrap=True)


def _nearest(key: str, presets: list[str]) -> str:
    """`; did you mean ...?`: a slip of the pen in a preset's name first, then keys."""
    near = next(iter(difflib.get_close_matches(key, presets, 1, 0.75)), None) if "." not in key else None
    near = near or nearest_key(key) or next(iter(difflib.get_close_matches(key, presets, 1, 0.5)), None)
    return f"; did you mean {near!r}?" if near else ""


def _print_preset(name: str) -> None:
    from retool.objectives.presets import PRESETS

    preset = PRESETS[name]
    structure, needs = describe(name)
    console.print(f"[bold]{escape(name)}[/]  {escape(preset.family)}: {escape(preset.summary)}", soft_wrap=True)
    console.print(f"source: {preset.source}", markup=False, soft_wrap=True)
    console.print(f"structure: {structure}; needs: {', '.join(needs) or 'nothing more'}", markup=False, soft_wrap=True)
    if preset.same_as:
        console.print(f"same gradient as: {', '.join(preset.same_as)}", markup=False)
    console.print("what it fills in where a recipe says nothing:", markup=False)
    console.print(yaml.safe_dump(preset.fragment, sort_keys=False, allow_unicode=True).rstrip(), markup=False)
    if preset.compose is not None:
        console.print("and a part that no key can say: see its row in retool/objectives/tables/", markup=False)


def key_is_section(key: str, known: dict[str, object]) -> bool:
    return any(k.startswith(f"{key}.") for k in known)


def _type_name(annotation: object) -> str:
    return getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")
