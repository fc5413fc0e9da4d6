"""The attack battery: what is in it, and that it turns red when a protection is taken out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.battery import ATTACKS, Control, select
from tests.sandbox.conftest import ROOT

pytestmark = pytest.mark.slow
REQUIRED = {*range(1, 14), *range(15, 21), *range(22, 29), 30, 32, 33, *range(35, 46), *range(47, 55), 56, 58, 59, 60}
REQUIRED |= {62, 64, 67, 68, 69}
"""Numbers of the attacks that any sandbox must stand. (#70, killing the service under load, is in test_chaos.py.)"""


def test_every_required_attack_is_there_and_has_a_control_or_a_reason() -> None:
    numbers = {int(number) for attack in ATTACKS for number in re.findall(r"#(\d+)", attack.origin)}
    assert numbers >= REQUIRED, sorted(REQUIRED - numbers)
    assert len([attack for attack in ATTACKS if "own" in attack.origin]) >= 40
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
    for attack in ATTACKS:
        assert attack.control is not Control.NONE or attack.why, attack.name


def test_names_themes_and_numbers_select() -> None:
    assert {attack.theme for attack in select("network")} >= {"network"}
    assert [attack.name for attack in select("fork cap")] == ["fork cap"]
    assert all("#39" in attack.origin for attack in select("#39"))
    with pytest.raises(ValueError, match="no attack is called"):
        select("nonsense")


HOLES = {
    "seccomp: one may kill oneself": (
        (
            "linux/seccomp.py",
            "*(_arg(1), (_JEQ, 1, 0, _SIGKILL), allow, _arg(0)",
            "*(_arg(1), (_JEQ, 1, 0, 200), allow, _arg(0)",
        ),
        "kill oneself",
    ),
    "landlock: truncate is not handled": (
        ("linux/landlock.py", "        files |= _TRUNCATE\n", "        pass\n"),
        "write outside",
    ),
    "jail: descriptors stay open": (
        ("worker/jail.py", 'calls.add("close_range", REPORT + 1, _LAST, 0)', "pass"),
        "inherited descriptors",
    ),
    "seccomp: tracing is allowed": (
        ("linux/numbers.py", '    "access": 21,\n', '    "access": 21, "kcmp": 312, "ptrace": 101,\n'),
        "trace, read",
    ),
    "seccomp: outside folders may be watched": (
        ("linux/numbers.py", '    "access": 21,\n', '    "access": 21, "watch": 253, "watch more": 254,\n'),
        "watch outside",
    ),
}


@pytest.mark.parametrize("hole", HOLES)
def test_a_missing_protection_turns_it_red(hole: str, tmp_path: Path) -> None:
    """The prober does not look for these, so the sandbox starts; the battery must see them."""
    *changes, only = HOLES[hole]
    shutil.copytree(ROOT / "sandbox", tmp_path / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    for change in changes:
        assert isinstance(change, tuple)
        name, old, new = change
        file = tmp_path / "sandbox" / name
        text = file.read_text()
        assert old in text, old
        file.write_text(text.replace(old, new))
    program = f"""
import asyncio, json, sys
sys.path.insert(0, {str(tmp_path)!r})
from sandbox.battery import run_battery, select
async def main():
    print(json.dumps([row.verdict async for _, row in run_battery(select({only!r}), "self")]))
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "breach" in json.loads(done.stdout)
