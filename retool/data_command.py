"""`retool data generate` and `retool data inspect`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.markup import escape

from data_gen import Report, generate, inspect
from retool.config import Recipe
from retool.console import bar, console, table
from retool.errors import UserError
from retool.files import writable_folder
from retool.models import load_tokenizer
from retool.protocols import build_protocol
from retool.protocols.codec import Codec
from retool.sft import default_traces
from retool.train import tags_of
from retool.workshop import make_sandbox


def generate_data(recipe: Recipe) -> Report:
    """Write the recipe's traces and print what was kept and what was rejected."""
    if recipe.data is None:
        raise UserError("this recipe has no `data` section; add one (problems, tool_share) or use another recipe")
    out = default_traces(recipe)
    writable_folder(out.parent)
    codec = Codec(load_tokenizer(recipe.model, tags_of(recipe)), build_protocol(recipe.protocol))

    async def run() -> Report:
        async with make_sandbox(recipe.sandbox) as sandbox:
            with bar("traces", recipe.data.problems.count or 1 if recipe.data else 1) as progress:
                return await generate(recipe, sandbox, codec, out, progress=lambda done, _: progress.update(done))

    report = asyncio.run(run())
    console.print(f"wrote {report.kept} traces to {out}, rejected {report.rejected or 'none'}", markup=False)
    return report


def inspect_data(file: Path, show: int) -> None:
    """Statistics and a few traces."""
    found = inspect(file, show)
    console.print(table(str(file), ["what", "value"], [[k, str(v)] for k, v in found.statistics.items()]))
    for text in found.examples:
        console.rule()
        console.print(escape(text))
