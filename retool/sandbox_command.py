"""`retool sandbox run`, `serve` and `doctor`."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from retool.console import console, errors, table
from retool.errors import UserError
from sandbox.profiles import AUTO, available
from sandbox.tools import capability_table, run_once
from sandbox.types import Limits, Status


def run_code(code: str, profile: str, wall: float, memory: int) -> int:
    """Run once; the code's output goes to our output. Returns the exit code."""
    known = (AUTO, *available())
    if profile not in known:
        raise UserError(f"--profile {profile!r}: choose from {', '.join(known)}")
    result = asyncio.run(run_once(code, profile=profile, limits=Limits(wall_s=wall, cpu_s=wall, memory_mb=memory)))
    said = result.stderr
    if result.exception is not None and result.exception.traceback not in said:
        said += result.exception.traceback
    if said and not said.endswith("\n"):
        said += "\n"
    _write(sys.stdout, result.stdout)
    _write(sys.stderr, said)
    if result.status is not Status.OK:
        errors.print(f"{result.status.value} after {result.usage.wall_ms:.0f} ms ({result.isolation})", markup=False)
    return 0 if result.ok else 1


def _write(stream: Any, text: str) -> None:
    """All of it, as far as the terminal can show it. Ends the command where nobody takes it."""
    if stream is None:  # it was closed when we started
        if text:
            errors.print("the output cannot be written: it is closed")
            raise SystemExit(1)
        return
    stream.reconfigure(errors="backslashreplace")
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is left in the buffer goes there
        if not isinstance(error, BrokenPipeError):
            errors.print(f"the output cannot be written: {error.strerror}", markup=False)
        raise SystemExit(1) from None


def serve_forever(**values: Any) -> None:
    """Serve over HTTP until SIGTERM. `values`: fields of `ServeOptions`. Raises `UserError` when it cannot start."""
    try:
        from sandbox.server.options import ServeError, ServeOptions
        from sandbox.server.serve import serve
    except ImportError as missing:
        raise UserError(f"serving needs the package {missing.name}: pip install 'retool-rl[serve]'") from None
    try:
        serve(ServeOptions(**values))
    except ServeError as error:
        raise UserError(str(error)) from None


def print_capabilities() -> None:
    """The isolation tiers of this machine, strongest first, as found by attacking them."""
    rows = capability_table()
    if rows:
        cells = [["yes" if v is True else "no" if v is False else str(v) for v in row.values()] for row in rows]
        console.print(table("what the sandbox finds here", list(rows[0]), cells, figures=False))
