"""`retool sandbox attack`: the whole battery on this machine, as a table or as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from dataclasses import asdict

from rich.markup import escape

from retool.console import bar, console, table
from retool.errors import UserError
from sandbox.battery import Row, run_battery, select
from sandbox.tiers import TIERS

_MEANING = {
    "held": "nothing got through, and the control did",
    "known": "works in this tier and is documented to",
    "unproven": "nothing got through, but without confinement something of it fails here too",
    "breach": "got through, or ended otherwise than it must",
}
_COLOURS = {"held": "green", "known": "yellow", "unproven": "cyan", "breach": "bold red"}


async def _collect(only: str, tier: str | None, quiet: bool) -> tuple[str, list[Row]]:
    try:
        attacks = select(only)
    except ValueError as error:
        raise UserError(str(error)) from None
    rows: list[Row] = []
    name = ""
    if quiet:
        async for name, row in run_battery(attacks, tier):
            rows.append(row)
        return name, rows
    with bar("attacks", len(attacks)) as progress:
        async for name, row in run_battery(attacks, tier):
            rows.append(row)
            progress.update(len(rows), row.name)
    return name, rows


def attack(tier: str | None, only: str, as_json: bool) -> int:
    """Run the battery and print it. Returns 1 when anything was breached, else 0."""
    if tier is not None and tier not in (names := [known.name for known in TIERS]):
        raise UserError(f"--tier {tier!r}: choose from {', '.join(names)}")
    name, rows = asyncio.run(_collect(only, tier, as_json))
    counts = Counter(row.verdict for row in rows)
    if as_json:
        json.dump({"tier": name, "counts": counts, "attacks": [asdict(row) for row in rows]}, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        header = ["theme", "attack", "from", "unconfined", "expected", "got", "verdict"]
        cells = [
            [
                *(escape(text) for text in (row.theme, row.name, row.origin, row.control, row.expected, row.got)),
                f"[{_COLOURS[row.verdict]}]{row.verdict}[/]",
            ]
            for row in rows
        ]
        console.print(table(f"attacks on tier {name}", header, cells, figures=False))
        for verdict, meaning in _MEANING.items():
            console.print(f"{counts[verdict]:4} {verdict}: {meaning}", markup=False)
    return 1 if counts["breach"] else 0
