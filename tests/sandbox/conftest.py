"""One warm sandbox for each test module, and ways to see what is left of it."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sandbox import Limits, LocalSandbox

ROOT = Path(__file__).resolve().parents[2]

if sys.platform != "linux":
    pytest.skip("the embedded sandbox needs Linux", allow_module_level=True)


def processes(text: str) -> list[int]:
    """Ids of live processes whose command line holds `text`; zombies do not count."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (entry / "stat").read_text().rsplit(") ", 1)[1][0]
            except (OSError, IndexError):
                continue
            if text in line and state != "Z":
                found.append(int(entry.name))
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def box() -> AsyncIterator[LocalSandbox]:
    """The strongest tier of this machine, with numpy and sympy."""
    async with LocalSandbox("py-math", Limits(wall_s=20, cpu_s=10), workers=3) as opened:
        yield opened
        assert (await opened.stats())["leaked"] == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bare() -> AsyncIterator[LocalSandbox]:
    """No isolation at all: for controls that show an attack working, harmless ones only."""
    async with LocalSandbox("py-bare", Limits(wall_s=20), workers=2, tier="none", allow_unconfined=True) as opened:
        yield opened
