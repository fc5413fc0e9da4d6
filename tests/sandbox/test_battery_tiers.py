"""The attack battery in the weaker tiers, on hosts that have no better one, made for real out of this one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sandbox.battery import ATTACKS
from tests.sandbox import other_host

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("battery_program.py")
HOSTS = {"uid": "container", "self": "capless"}


@pytest.mark.parametrize("tier", HOSTS)
def test_nothing_gets_through(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make itself another kind of host")
    monkeypatch.setenv("RETOOL_TEST_TIER", tier)
    done = other_host.run(HOSTS[tier], PROGRAM)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, _ in rows} == {tier} and len(rows) == len(ATTACKS)
    assert [row for _, row in rows if row["verdict"] == "breach"] == []
    proven = [row for _, row in rows if row["verdict"] in ("held", "known")]
    assert len(proven) >= len(ATTACKS) - 20  # without privilege some controls cannot work
