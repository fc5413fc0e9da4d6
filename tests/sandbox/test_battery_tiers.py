"""The attack battery in the weaker tiers, on hosts that have no better one, made for real out of this one."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from sandbox.battery import ATTACKS
from tests.sandbox import other_host

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("battery_program.py")
HOSTS = {"uid": "container", "self": "capless"}
Runs = dict[str, "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """Both batteries at once: most of their time they wait for attacks to time out."""
    if os.geteuid() != 0:
        pytest.skip("only root can make itself another kind of host")
    with ThreadPoolExecutor() as threads:
        found: Runs = {
            tier: threads.submit(other_host.run, host, PROGRAM, {"RETOOL_TEST_TIER": tier}, 400)
            for tier, host in HOSTS.items()
        }
    return found


@pytest.mark.parametrize("tier", HOSTS)
def test_nothing_gets_through(tier: str, runs: Runs) -> None:
    done = runs[tier].result()
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, _ in rows} == {tier} and len(rows) == len(ATTACKS)
    breaches = [row for _, row in rows if row["verdict"] == "breach"]
    assert not breaches, json.dumps(breaches, indent=1)
    proven = [row for _, row in rows if row["verdict"] in ("held", "known")]
    assert len(proven) >= len(ATTACKS) - 20  # without privilege some controls cannot work
