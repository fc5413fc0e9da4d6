"""`retool sandbox attack`: the whole battery on this machine, as a table or as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter, defaultdict
from contextlib import aclosing, nullcontext
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
    used = ""
    with nullcontext() if quiet else bar("attacks", len(attacks)) as progress:
        async with aclosing(run_battery(attacks, tier)) as battery:  # ended here, whatever stops us
            async for found, row in battery:
                used = found
                rows.append(row)
                if progress is not None:
                    progress.update(len(rows), row.name)
    return used, rows


def _print(tier: str, rows: list[Row]) -> None:
    cells = []
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        control, _, why = row.control.partition(": ")
        if control == "none":
            reasons[why].append(row.name)
        shown = control if control == "none" else row.control
        texts = (row.theme, row.name, row.origin, shown, row.expected.replace("|", " "), row.got)
        cells.append([*map(escape, texts), f"[{_COLOURS[row.verdict]}]{row.verdict}[/]"])
    header = ["theme", "attack", "from", "unconfined", "expected", "got", "verdict"]
    console.print(table(f"attacks on tier {tier}", header, cells, figures=False))
    for why, names in reasons.items():
        console.print(f"no control for {', '.join(names)}: {why}", markup=False)


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
        _print(name, rows)
        for verdict, meaning in _MEANING.items():
            console.print(f"{counts[verdict]:4} {verdict}: {meaning}", markup=False)
    return 1 if counts["breach"] else 0
