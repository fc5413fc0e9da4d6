"""`retool doctor`: what this machine can do, what does not fit together, and the command that mends it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape

from retool.console import console, table
from retool.machine import docker, gpus, hardware
from retool.versions import Finding, check_versions
from sandbox.tools import capability_table
from sandbox.types import SandboxError

_MARKS = {"ok": "", "missing": "missing", "wrong": "WRONG"}


def examine() -> list[Finding]:
    """Everything, in the order in which it is shown. Takes a few seconds: the sandbox's tiers are attacked for real."""
    return [*check_versions(), *hardware(Path.cwd()), *gpus(), *sandbox(), *docker()]


def sandbox() -> list[Finding]:
    """The tiers of isolation; wrong when none of them holds."""
    try:
        rows = [row for row in capability_table() if str(row["name"]).startswith("tier ")]
    except SandboxError as error:
        return [Finding("sandbox", "tiers", str(error), "wrong", "retool sandbox doctor says more")]
    out = [
        Finding("sandbox", row["name"], row["detail"], "ok" if row["available"] else "missing", row["fix"])
        for row in rows
    ]
    if not any(row["available"] for row in rows):
        fix = "give this machine one of the tiers above, or use sandbox.kind=remote with a server on another machine"
        out.append(Finding("sandbox", "tiers", "none holds: model-written code cannot run here", "wrong", fix))
    return out


def verdict(found: Sequence[Finding]) -> int:
    """Exit code: 1 when something is wrong; a feature that is not installed is not."""
    return int(any(f.level == "wrong" for f in found))


def print_doctor(as_json: bool) -> int:
    """Returns the exit code."""
    found = examine()
    code = verdict(found)
    if as_json:
        print(json.dumps({"ok": code == 0, "findings": [asdict(f) for f in found]}, indent=1, ensure_ascii=False))
        return code
    cells = [[f.area, escape(f.name), escape(f.found), _MARKS[f.level]] for f in found]
    console.print(table("this machine", ["area", "what", "found", ""], cells, figures=False))
    for title, level in (("to mend:", "wrong"), ("only for what needs it:", "missing")):
        fixes: dict[str, list[str]] = {}
        for f in found:
            if f.level == level:
                fixes.setdefault(f.fix, []).append(f"{f.area}: {f.name}")
        if fixes:
            console.print(f"\n{title}", markup=False)
        for fix, what in fixes.items():
            console.print(f"  {', '.join(what)}\n    {fix}", markup=False, soft_wrap=True)
    if code == 0:
        console.print("\nwhat every run needs is here", markup=False)
    return code
