"""`retool objectives`, `retool explain` and `retool doctor`: the house describes itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys

from rich.markup import escape

from retool.console import console, table
from retool.errors import UserError
from retool.recipe import all_keys, nearest_key

NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "math-verify", "sympy", "pydantic", "matplotlib")


def print_objectives(as_json: bool) -> None:
    """The table of presets."""
    from retool.objectives.presets import PRESETS

    rows = [{"name": p.name, "family": p.family, "summary": p.summary, "source": p.source} for p in PRESETS.values()]
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    console.print(
        table("objectives", list(rows[0]), [[escape(str(v)) for v in row.values()] for row in rows], figures=False)
    )
    console.print("use one with: retool train RECIPE objective=NAME", markup=False)


def print_key(key: str) -> None:
    """One key, or all keys of a section. Raises `UserError` for an unknown one."""
    known = dict(all_keys())
    if key not in known:
        near = nearest_key(key)
        raise UserError(f"there is no recipe key {key!r}" + (f"; did you mean {near!r}?" if near else ""))
    info = known[key]
    console.print(f"[bold]{escape(key)}[/]  {escape(_type_name(info.annotation))}")
    if info.description:
        console.print(info.description, markup=False)
    if not info.is_required() and info.default_factory is None and not key_is_section(key, known):
        console.print(f"default: {info.default!r}", markup=False)
    for inner, inner_info in known.items():
        if inner.startswith(f"{key}.") and inner.count(".") == key.count(".") + 1:
            console.print(f"  {inner}: {inner_info.description or ''}", markup=False, soft_wrap=True)


def key_is_section(key: str, known: dict[str, object]) -> bool:
    return any(k.startswith(f"{key}.") for k in known)


def _type_name(annotation: object) -> str:
    return getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")


def print_doctor() -> None:
    """Versions, cores, GPU and the sandbox's tiers, each with what to do when something is missing."""
    rows = [["python", platform.python_version(), "" if sys.version_info >= (3, 11) else "3.11 or newer is needed"]]
    for name in NEEDED:
        try:
            rows.append([name, importlib.metadata.version(name), ""])
        except importlib.metadata.PackageNotFoundError:
            rows.append([name, "missing", "make install"])
    rows.append(["cores", str(os.cpu_count()), ""])
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    rows.append(["gpu", gpu, "" if gpu != "none" else "not needed; large models want one"])
    console.print(table("this machine", ["what", "found", "what to do"], rows, figures=False))
    from retool.sandbox_command import print_capabilities

    print_capabilities()
