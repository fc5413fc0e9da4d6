"""A recipe for small sets, and a codec over the small tokenizer."""

from __future__ import annotations

from typing import Any

from retool.config import DataConfig, ProblemsConfig, ProtocolConfig, Recipe, RewardConfig, SandboxConfig
from retool.models import tiny_tokenizer
from retool.protocols import Codec, build_protocol

FAMILIES = ("product", "square_plus", "last")


def recipe(count: int = 30, tool_share: float = 0.4, data: dict[str, Any] | None = None, **problems: Any) -> Recipe:
    problems = problems or {"families": FAMILIES}
    return Recipe(
        data=DataConfig(problems=ProblemsConfig(count=count, **problems), tool_share=tool_share, **(data or {})),
        protocol=ProtocolConfig(fence=False, instructions=""),
        reward=RewardConfig(verifier="exact" if "families" in problems else "math", timeout_s=60),
        sandbox=SandboxConfig(profile="py-bare", retries=2),
    )


def codec_of(recipe: Recipe) -> Codec:
    return Codec(tiny_tokenizer(), build_protocol(recipe.protocol))
