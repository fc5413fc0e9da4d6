"""`retool sandbox bench`: the figures of this machine as tables, and as JSON."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import httpx

from retool.console import console, table
from retool.errors import UserError
from retool.files import write_json
from sandbox.bench.main import Options, machine, measure
from sandbox.loops import new_event_loop
from sandbox.profiles import AUTO, available
from sandbox.tiers import BY_NAME

_SAME = ("machine", "cores", "kernel", "python")
_HEADER = ["where", "callers", "per second", "p50 ms", "p95 ms", "p99 ms", "not ok"]


def _cells(where: str, row: dict[str, Any]) -> list[str]:
    callers = row.get("callers", f"{row['arrivals_per_s']}/s" if "arrivals_per_s" in row else "")
    other = ", ".join(f"{count} {status}" for status, count in row["other"].items())
    figures = [f"{row[name]:g}" for name in ("per_s", "p50_ms", "p95_ms", "p99_ms")]
    return [where, str(callers), *figures, other]


def _print(report: dict[str, Any]) -> None:
    rows = []
    for part in ("embedded", "http"):
        for found in report.get(part, []):
            where = " ".join(filter(None, (part, found.get("tier"), found["profile"])))
            rows += [_cells(where, row) for row in found["ladder"]]
            rows.append(_cells(f"{where}, half load", found["half_load"]))
    rows += [_cells(f"{row['peer']}, {row['code']}", row) for row in report.get("peers", [])]
    if overload := report.get("overload"):
        for name, callers in zip(("peak", "overload"), overload["callers"], strict=True):
            rows.append(_cells(f"http py-bare, {name}", {**overload[name], "callers": callers}))
    if rows:
        console.print(table("print(1), one process per run", _HEADER, rows))
    if overload:
        console.print(f"goodput under ten times the callers: {overload['goodput_ratio']:.2f} of the peak")
    if found := report.get("snippets"):
        header = ["snippet", "computing ms", "service ms", "overhead ms", "cold Python ms", "ratio"]
        cells = [[str(value) for value in row.values()] for row in found["rows"]]
        console.print(table("snippets over HTTP", header, cells))
        console.print(
            f"median overhead {found['overhead_p50_ms']} ms, cold Python {found['cold_ratio_p50']} times as long"
        )
    if found := report.get("sessions"):
        console.print_json(data=found)
    speed = ", ".join(f"{part} {before:g} and {after:g}" for part, (before, after) in report["speed"].items())
    console.print(f"a cold `python -c pass` before and after each part, ms: {speed}")


def _earlier(output: Path | None, seconds: float, tier: str | None) -> dict[str, Any]:
    """The report in `output`, measured in the same way on a machine as this one; nothing where there is none."""
    if output is None:
        raise UserError("--update: name the report with --output")
    if not output.exists():
        return {}
    try:
        found = json.loads(output.read_bytes())
        there = {**{name: found["host"][name] for name in _SAME}, "seconds": found["seconds"], "tier": found["tier"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--update: {output} is no report of this command ({error!r:.200})") from None
    here = {**{name: value for name, value in machine().items() if name in _SAME}, "seconds": seconds, "tier": tier}
    if there != here:
        raise UserError(f"--update: {output} was measured with {there}, this is {here}")
    return dict(found)


def _check(output: Path) -> None:
    """Before minutes of measuring. Raises `UserError` where the report could not be written."""
    if output.is_dir():
        raise UserError(f"--output {output}: that is a folder; name a file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}") from None


def _check_other(url: str) -> None:
    """Before minutes of measuring. Raises `UserError` where no other server runs code."""
    program = {"code": "print(1)", "language": "python"}
    try:
        httpx.post(f"{url}/run_code", json=program, timeout=60, trust_env=False).json()["status"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--vs {url}: no server with SandboxFusion's API answers there ({error!r:.200})") from None


def bench(
    seconds: float,
    tier: str | None,
    profiles: list[str],
    parts: list[str],
    versus: str,
    output: Path | None,
    update: bool,
    quick: bool,
) -> int:
    """Measure and print. Raises `UserError` for a tier, profile or part that does not exist, and for a report that
    cannot be updated."""
    earlier = _earlier(output, seconds, tier) if update else {}
    known = {"tier": [*BY_NAME], "profile": [*available(), AUTO], "part": [*Options.parts]}
    for name, values in (("tier", [tier] if tier else []), ("profile", profiles), ("part", parts)):
        for value in values:
            if value not in known[name]:
                raise UserError(f"--{name} {value!r}: choose from {', '.join(known[name])}")
    if versus and not versus.startswith("http://"):
        raise UserError(f"--vs {versus!r}: write a URL without TLS, e.g. http://127.0.0.1:8080")
    if versus and parts and "http" not in parts:
        raise UserError("--vs is measured with --part http")
    if output is not None:
        _check(output)
    versus = versus.rstrip("/")
    if versus:
        _check_other(versus)
    options = Options(seconds, tier, tuple(profiles) or Options.profiles, versus, tuple(parts) or Options.parts, quick)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:  # a client that costs little, as the server
            report = runner.run(measure(options, lambda what: console.print(f"measuring {what} …", style="dim")))
    except (RuntimeError, OSError) as error:
        raise UserError(f"the measurement stopped: {error}") from None
    _print(report)
    if output is not None:
        write_json(output, {**earlier, **report, "speed": {**earlier.get("speed", {}), **report["speed"]}})
        console.print(f"written to {output}", markup=False)
    return 0
