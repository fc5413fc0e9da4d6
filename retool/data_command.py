"""`retool data generate` and `retool data inspect`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.markup import escape

from data_gen import Report, generate, inspect
from retool.config import Recipe
from retool.console import bar, console, table
from retool.demonstrations import default_traces
from retool.errors import UserError
from retool.files import writable_folder
from retool.models import load_tokenizer
from retool.problems import load_problems
from retool.protocols import build_protocol
from retool.protocols.codec import Codec
from retool.train import tags_of
from retool.workshop import make_sandbox

STYLES = {"prompt": "dim", "tool": "yellow"}


def generate_data(recipe: Recipe) -> Report:
    """Write the recipe's traces and print what was kept and what was rejected."""
    if recipe.data is None:
        raise UserError("this recipe has no `data` section; add one (problems, tool_share) or use another recipe")
    out = default_traces(recipe)
    writable_folder(out.parent)
    codec = Codec(load_tokenizer(recipe.model, tags_of(recipe)), build_protocol(recipe.protocol))

    async def run(total: int) -> Report:
        async with make_sandbox(recipe.sandbox) as sandbox:
            with bar("traces", total) as progress:
                return await generate(
                    recipe, sandbox, codec, out, progress=lambda done, _, kept: progress.update(done, f"{kept} kept")
                )

    report = asyncio.run(run(len(load_problems(recipe.data.problems))))
    rejected = ", ".join(f"{n} for {reason}" for reason, n in report.rejected.items()) or "none"
    kept = f"{report.accepted} traces, {report.tool_traces} of them with a tool call"
    console.print(f"wrote {kept}, to {out}; rejected: {rejected}", markup=False)
    return report


def inspect_data(file: Path, show: int) -> None:
    """Statistics and a few traces."""
    found = inspect(file, show)
    rows = [[k, str(v)] for k, v in found.items() if k not in ("samples", "families")]
    rows += [
        [f"family {f}", f"{v['traces']} traces, {v['tool_share']:.2f} with a call"]
        for f, v in found["families"].items()
    ]
    console.print(table(str(file), ["what", "value"], rows))
    for row in found["samples"]:
        console.rule(row["id"])
        for segment in row["segments"]:
            console.print(escape(segment["text"]), style=STYLES.get(segment["origin"], ""), end="")
        console.print()
