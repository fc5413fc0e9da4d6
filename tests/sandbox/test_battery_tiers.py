"""The attack battery in the strongest tier of this machine, and in the weaker ones on hosts that have no better one,
made for real out of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sandbox.battery import ATTACKS
from tests.sandbox import other_host

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("battery_program.py")
HOSTS = {"uid": "container", "self": "capless"}
HERE = "here"
Runs = dict[str, "Future[subprocess.CompletedProcess[str]]"]


def _here() -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    command = [sys.executable, "-W", "error", str(PROGRAM)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """All batteries at once: most of their time they wait for attacks to time out."""
    with ThreadPoolExecutor() as threads:
        found: Runs = {HERE: threads.submit(_here)}
        if os.geteuid() == 0:
            for tier, host in HOSTS.items():
                found[tier] = threads.submit(other_host.run, host, PROGRAM, {"RETOOL_TEST_TIER": tier}, 400)
        yield found


def _rows(runs: Runs, name: str) -> tuple[set[str], list[dict[str, Any]]]:
    """Tiers and rows of a run; no attack got through."""
    done = runs[name].result()
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    breaches = [row for _, row in rows if row["verdict"] == "breach"]
    assert not breaches, json.dumps(breaches, indent=1)
    assert len(rows) == len(ATTACKS)
    return {tier for tier, _ in rows}, [row for _, row in rows]


def test_nothing_gets_through_here(runs: Runs) -> None:
    tiers, rows = _rows(runs, HERE)
    assert len(tiers) == 1
    if os.geteuid() == 0 and not os.path.exists("/.dockerenv"):  # noqa: PTH110 (elsewhere not every control can work)
        weak = [f"{row['name']}: {row['control']}" for row in rows if row["verdict"] == "unproven"]
        assert len(weak) <= 2, weak


@pytest.mark.parametrize("tier", HOSTS)
def test_nothing_gets_through_elsewhere(tier: str, runs: Runs) -> None:
    if tier not in runs:
        pytest.skip("only root can make itself another kind of host")
    tiers, rows = _rows(runs, tier)
    assert tiers == {tier}
    proven = [row for row in rows if row["verdict"] in ("held", "known")]
    assert len(proven) >= len(ATTACKS) - 20  # without privilege some controls cannot work
