"""Which warm interpreter code gets, and what control groups and required properties do."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import ConfinementUnavailable, Limits, LocalSandbox, SandboxError, Status
from sandbox.profiles import PROFILES, available, choose
from sandbox.supervisor import cgroups
from sandbox.tiers import PROPERTIES

ALL = tuple(PROFILES)


@pytest.mark.parametrize(
    ("code", "profile"),
    [
        ("print(1)", "py-bare"),
        ("import numpy as np", "py-math"),
        ("from sympy.solvers import solve", "py-math"),
        ("x = __import__('mpmath')", "py-math"),
        ("import json; import scipy.stats as s", "py-data"),
        ("import pandas\nimport numpy", "py-data"),
        ("numpyish = 1; my_pandas = 2", "py-bare"),
    ],
)
def test_the_smallest_profile_that_has_what_is_mentioned(code: str, profile: str) -> None:
    assert choose(code, ALL) == profile


@given(st.text(max_size=300), st.sets(st.sampled_from(ALL), min_size=1))
def test_some_profile_is_always_chosen(code: str, installed: set[str]) -> None:
    assert choose(code, tuple(installed)) in installed


async def test_auto_runs_each_program_where_its_modules_are_warm() -> None:
    async with LocalSandbox() as box:
        plain, maths = await asyncio.gather(
            box.exec("import sys\n'num' + 'py' in sys.modules"),
            box.exec("import sys\nimport numpy\n'sympy' in sys.modules"),
        )
        assert (plain.profile, plain.stdout) == ("py-bare", "False\n")
        assert (maths.profile, maths.stdout) == ("py-math", "True\n")
        forced = await box.exec("import sys\n'sympy' in sys.modules", profile="py-math")
        assert (forced.profile, forced.stdout) == ("py-math", "True\n")
        async with box.session() as session:
            assert (await session.exec("import sys; 'sympy' in sys.modules")).stdout == "True\n"


@pytest.mark.skipif("py-data" not in available(), reason="scipy or pandas is missing: pip install 'retool-rl[pydata]'")
async def test_data_profile_has_scipy_and_pandas_warm() -> None:
    async with LocalSandbox("py-data", Limits(wall_s=20)) as box:
        result = await box.exec("import sys\n'scipy.stats' in sys.modules and 'pandas' in sys.modules")
        assert result.stdout == "True\n", result
        worked = await box.exec("import pandas, scipy.stats\npandas.Series([1, 2]).sum() + scipy.stats.norm.cdf(0)")
        assert worked.stdout == "np.float64(3.5)\n", worked


async def test_a_profile_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="py-moth"):
        LocalSandbox("py-moth")
    async with LocalSandbox("py-bare") as box:
        with pytest.raises((ValueError, SandboxError), match="py-moth"):
            await box.exec("1", profile="py-moth")


CROWD = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        block = bytearray(100 << 20)
        block[::4096] = b"x" * len(block[::4096])
        time.sleep(1.5)
        os._exit(0)
print(sum(os.wait()[1] == 0 for _ in range(6)))
"""


async def test_control_groups_limit_all_processes_together() -> None:
    """Six times 100 MiB under a limit of 200: some are killed in the group, none without groups (the control)."""
    limits = Limits(wall_s=30, cpu_s=20, memory_mb=200)
    for use in (True, False):
        async with LocalSandbox("py-bare", limits, workers=1, cgroups=use) as box:
            found = (await box.capabilities())["cgroup"]
            if use and found == "none":
                pytest.skip("no control groups that this user may write to")
            assert use or found == "none"
            result = await box.exec(CROWD)
            assert result.status is Status.OK, result
            survived = int(result.stdout)
            assert survived < 6 if use else survived == 6
            assert (await box.exec("print(1)")).ok
            assert ("total_memory" in (await box.capabilities())["properties"]) is use


async def test_a_killed_supervisor_leaves_no_control_group() -> None:
    async with LocalSandbox("py-bare", workers=1) as box:
        pid = (await box.stats())["supervisor_pid"]
        if (await box.capabilities())["cgroup"] == "none":
            pytest.skip("no control groups that this user may write to")
        folders = [place / f"retool-sandbox-{pid}" for _, place in cgroups._places()]
        assert any(folder.exists() for folder in folders)
        assert box._link is not None
        box._link.process.kill()
        for _ in range(100):
            if box._link.dead:
                break
            await asyncio.sleep(0.02)
        assert (await box.exec("print(1)")).ok
        assert not any(folder.exists() for folder in folders)


async def test_required_properties_are_given_or_the_start_is_refused() -> None:
    async with LocalSandbox("py-bare", require=["files", "network", "kernel"]) as box:
        assert {"files", "network", "kernel"} <= set((await box.capabilities())["properties"])
    for allowed in (False, True):
        with pytest.raises(ConfinementUnavailable, match=r"private_root.*tier ns") as refused:
            async with LocalSandbox("py-bare", tier="self", require=["private_root"], allow_unconfined=allowed):
                pass
        assert "allow_unconfined" not in str(refused.value), "it would not help"
    with pytest.raises(ValueError, match="walls"):
        LocalSandbox("py-bare", require=["walls"])
    assert all(PROPERTIES.values())
