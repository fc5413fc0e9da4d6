"""Recipes: read a YAML file, lay it over its preset and the defaults, apply overrides, refuse what is wrong.

recipe = load_recipe("recipes/demo.yaml", ["objective.preset=ppo_rlhf", "learner.lr=1e-6"])
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from retool.config import Recipe
from retool.errors import UserError
from retool.objectives.presets import preset_fragment
from retool.objectives.validate import validate


class RecipeError(UserError):
    """A recipe that cannot be used; the message names the file and the key."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Precedence: overrides > recipe > preset > defaults. Raises `RecipeError`."""
    raw = read_yaml(path)
    for text in overrides:
        _apply(raw, text)
    return resolve(raw, where=str(path))


def default_recipe(overrides: Sequence[str] = ()) -> Recipe:
    """The defaults with overrides, without a file. Raises `RecipeError`."""
    raw: dict[str, Any] = {}
    for text in overrides:
        _apply(raw, text)
    return resolve(raw, where="defaults")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; a file may name another with `extends:` (relative to itself), whose values it
    overrides."""
    file = Path(path)
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [p.name for p in Path("recipes").glob("*.yaml")], 1)
        hint = f"; did you mean recipes/{near[0]}?" if near else "; the recipes that come with retool are in recipes/"
        raise RecipeError(f"there is no recipe {str(path)!r}{hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        raise RecipeError(f"{path}: cannot be read as YAML: {' '.join(str(e).split())}") from None
    if not isinstance(raw, dict) or not raw:
        raise RecipeError(f"{path}: a recipe is a non-empty YAML mapping, this holds {type(raw).__name__}")
    base = raw.pop("extends", None)
    return raw if base is None else merge(read_yaml(file.parent / str(base)), raw)


def resolve(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """A mapping as written by a user -> a complete, validated recipe."""
    objective = raw.get("objective", {})
    if isinstance(objective, str):  # `objective: dapo` is short for {preset: dapo}
        objective = {"preset": objective}
        raw = {**raw, "objective": objective}
    name = objective.get("preset", "grpo") if isinstance(objective, dict) else "grpo"
    try:
        fragment = preset_fragment(str(name))
    except ValueError as e:
        raise RecipeError(f"{where}: objective.preset: {e}") from None
    try:
        recipe = Recipe.model_validate(merge(fragment, raw))
    except ValidationError as e:
        raise RecipeError("\n".join(f"{where}: {line}" for line in _explain(e))) from None
    try:
        validate(recipe)
    except ValueError as e:
        raise RecipeError("\n".join(f"{where}: {line}" for line in str(e).split("; "))) from None
    return recipe


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, mapping by mapping; lists are replaced."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: reading it again gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def all_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its pydantic field."""
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key, info
        inner = _section(info.annotation)
        if inner is not None:
            yield from all_keys(inner, f"{key}.")


def nearest_key(key: str) -> str | None:
    """The valid dotted key most like `key`: a slip of the pen first, then the same name in another section."""
    keys = [k for k, _ in all_keys()]
    near = difflib.get_close_matches(key, keys, 1, 0.8)
    same_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    same_leaf.sort(key=lambda k: not k.startswith(("learner.", "rollout.")))  # RL's own before those of other stages
    return next(iter([*near, *same_leaf, *difflib.get_close_matches(key, keys, 1, 0.5)]), None)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section behind an annotation: of a key, of one of its alternatives, or of the items of a list."""
    options = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    if typing.get_origin(annotation) in (tuple, list):
        options = typing.get_args(annotation)[:1]
    for option in (annotation, *options):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _apply(raw: dict[str, Any], text: str) -> None:
    key, sep, value = text.partition("=")
    key = key.strip()
    if not sep or not key:
        raise RecipeError(f"override {text!r}: write it as key=value, e.g. learner.lr=1e-6")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise RecipeError(f"override {text!r}: the value is not YAML: {' '.join(str(e).split())}") from None
    *path, leaf = key.split(".")
    if path == [] and leaf == "objective" and isinstance(parsed, str):
        path, leaf = ["objective"], "preset"
    node = raw
    for part in path:
        if isinstance(node.get(part), str) and part == "objective":
            node[part] = {"preset": node[part]}
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"override {text!r}: {part!r} is a value, not a section")
        node = child
    node[leaf] = parsed


def _explain(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        key = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            near = nearest_key(key)
            hint = f"; did you mean {near!r}?" if near else ""
            yield f"unknown key {key!r}{hint}"
        else:
            got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r:.80})"
            yield f"{key or 'recipe'}: {item['msg'].removeprefix('Value error, ')}{got}"
