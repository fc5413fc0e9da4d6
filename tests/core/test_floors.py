"""The house has floors: an import only points down or sideways, never up (see docs/training.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
FLOORS = (
    {"sandbox"},
    {"retool", "retool.errors", "retool.files"},
    {
        "retool.config",
        "retool.transcript",
        "retool.records",
        "retool.models",
        "retool.protocols",
        "retool.problems",
        "retool.lora",
    },
    {"retool.objectives", "retool.engines", "retool.rewards"},
    {"retool.learner", "retool.rollout"},
    {"data_gen", "loops"},
    {"retool.cli", "retool.__main__"},
)
FILES = [p for top in ("sandbox", "data_gen", "retool") for p in sorted((REPO / top).rglob("*.py"))]


def room(module: str) -> str:
    """The room a module belongs to; modules of `retool` that are no room of their own are loops."""
    parts = module.split(".")
    if parts[0] in ("sandbox", "data_gen"):
        return parts[0]
    name = ".".join(parts[:2])
    return name if any(name in floor for floor in FLOORS) else "loops"


def floor_of(name: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if name in floor)


def imports(file: Path) -> set[str]:
    """Our own modules that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" if node.module == "retool" else node.module for alias in node.names}
    return {m for m in found if m.split(".")[0] in ("sandbox", "data_gen", "retool")}


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(REPO)))
def test_imports_point_down(file: Path) -> None:
    module = ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
    mine = floor_of(room(module))
    above = {m for m in imports(file) if floor_of(room(m)) > mine}
    assert not above, f"{module} imports from above: {above}"
    if room(module) == "sandbox":
        assert {m.split(".")[0] for m in imports(file)} <= {"sandbox"}
    if room(module) == "retool.objectives":
        assert {room(m) for m in imports(file)} <= {"retool.objectives", "retool.config", "retool.errors"}
