"""The attack battery: what is in it, and that it turns red when a protection is taken out."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.battery import ATTACKS, Control, run_battery, select
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
    "seccomp: a child's end may be any signal": (
        ("linux/seccomp.py", "(_JEQ, 1, 0, _SIGCHLD), deny)", "(_JEQ, 1, 0, _SIGCHLD), allow)"),
        "a child's end",
    ),
    "seccomp: pipes may be enlarged": (
        ("linux/seccomp.py", "    1032,  # F_GETPIPE_SZ", "    *(1031, 1032),  # F_GETPIPE_SZ"),
        "a neighbour's pipes",
    ),
    "seccomp: descriptors may be passed": (
        ("linux/numbers.py", '    "access": 21,\n', '    "access": 21, "sendmsg": 46, "sendmmsg": 307,\n'),
        "passing descriptors",
    ),
    "jail: standard input is one open file for all": (
        (
            "worker/jail.py",
            'calls.add("openat", AT_FDCWD, b"/dev/null", os.O_RDONLY, returns=0, says="open /dev/null")',
            'self._keep("/dev/null", 700, os.O_RDONLY)\n        calls.add("dup3", 700, 0, 0, returns=0)',
        ),
        "messages at standard input",
    ),
    "seccomp: outside folders may be watched": (
        ("linux/numbers.py", '    "access": 21,\n', '    "access": 21, "watch": 253, "watch more": 254,\n'),
        "watch outside",
    ),
}


def verdicts(changes: list[tuple[str, str, str]], only: str, tier: str, folder: Path) -> list[str]:
    """Of one attack on a copy of the package with `changes` (file, old text, new text)."""
    shutil.copytree(ROOT / "sandbox", folder / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in changes:
        file = folder / "sandbox" / name
        text = file.read_text()
        assert old in text, old
        file.write_text(text.replace(old, new))
    program = f"""
import asyncio, json, sys
sys.path.insert(0, {str(folder)!r})
from sandbox.battery import run_battery, select
async def main():
    print(json.dumps([row.verdict async for _, row in run_battery(select({only!r}), {tier!r})]))
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.parametrize("hole", HOLES)
def test_a_missing_protection_turns_it_red(hole: str, tmp_path: Path) -> None:
    """The prober does not look for these, so the sandbox starts; the battery must see them."""
    change, only = HOLES[hole]
    assert "breach" in verdicts([change], only, "self", tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="tier ns is certain for root only")
@pytest.mark.parametrize("attack", ["kill oneself", "high bits"])
def test_a_child_that_is_not_number_two_cannot_kill_itself_either(attack: str, tmp_path: Path) -> None:
    """The kernel gives number 3 or 4 when it has not yet let go of those of the run before; here it is never right."""
    change = ("worker/jail.py", "INIT_SEES_CHILD_AS = 2\n", "INIT_SEES_CHILD_AS = 7\n")
    assert set(verdicts([change], attack, "ns", tmp_path)) == {"held"}


async def test_a_lock_of_the_host_is_not_what_a_run_left() -> None:
    """Docker's daemon, among others, holds one on /dev/null."""
    file = os.open("/dev/null", os.O_RDONLY)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0))
        rows = [row async for _, row in run_battery(select("messages at standard input"))]
    finally:
        os.close(file)
    assert [row.verdict for row in rows] == ["held"], rows
