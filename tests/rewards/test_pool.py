"""Verifier processes that hang, die, or lose their trainer: retries and counters, never a verdict out of thin air."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retool.config import RewardConfig
from retool.rewards import Rewarder, VerifierError
from retool.rewards.pool import WorkerPool
from tests.rewards.conftest import boxed, protocol, trajectory

HANGS = "((10!)!)!"  # sympy computes for longer than anybody waits


def children_of(pid: int) -> list[int]:
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(p) for p in listing.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def gone(*pids: int) -> bool:
    """Within a generous time."""
    end = time.monotonic() + 30
    while any(alive(p) for p in pids):
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.02)
    return True


async def busy(pid: int) -> None:
    """Until the process has begun to compute."""

    def ticks() -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])

    start = ticks()
    while ticks() < start + 5:  # noqa: ASYNC110 (another process's state)
        await asyncio.sleep(0.02)


async def test_a_hang_is_killed_retried_and_unknown() -> None:
    async with Rewarder(RewardConfig(timeout_s=1.0, retries=1), protocol()) as rewarder:
        assert rewarder.pool is not None
        guard = rewarder.pool.workers[0].pid
        assert guard is not None
        first = [guard, *children_of(guard)]
        result = await rewarder.score(trajectory(boxed(HANGS), "3"))
        assert result.accuracy is None
        assert result.score == 0.0
        assert await gone(*first)
        counters = rewarder.counters
        assert (counters["killed_workers"], counters["restarts"], counters["unknown"]) == (2, 1, 1)
        assert (await rewarder.score(trajectory(boxed("0.5"), "1/2"))).accuracy == 1.0
        assert rewarder.counters["restarts"] == 2


@pytest.mark.parametrize("victim", ["guard", "grader"])
async def test_a_worker_killed_in_the_middle_is_replaced(victim: str) -> None:
    """kill -9 of either process while it computes: both go, the question is asked again."""
    async with WorkerPool(workers=1, timeout_s=60, retries=0) as pool:
        guard = pool.workers[0].pid
        assert guard is not None
        (grader,) = children_of(guard)
        asked = asyncio.create_task(pool.grade("3", HANGS))
        await busy(grader)
        os.kill(guard if victim == "guard" else grader, signal.SIGKILL)
        assert await asked is None
        assert await gone(guard, grader)
        assert pool.counters["dead_workers"] == 1
        assert await pool.grade("1/2", "0.5") is True
        assert pool.counters["restarts"] == 1


async def test_a_dead_worker_costs_a_retry_not_a_reward() -> None:
    async with WorkerPool(workers=1, timeout_s=60, retries=1) as pool:
        guard = pool.workers[0].pid
        assert guard is not None
        os.kill(guard, signal.SIGKILL)
        assert await pool.grade("1/2", "0.5") is True
        assert await pool.grade("1/2", "0.6") is False


async def test_a_cancelled_question_leaves_no_answer_behind() -> None:
    async with WorkerPool(workers=1, timeout_s=60, retries=0) as pool:
        guard = pool.workers[0].pid
        assert guard is not None
        (grader,) = children_of(guard)
        asked = asyncio.create_task(pool.grade("3", HANGS))
        await busy(grader)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert await gone(guard, grader)
        assert await pool.grade("1/2", "0.5") is True


async def test_many_questions_share_few_workers() -> None:
    async with WorkerPool(workers=2, timeout_s=60, retries=0) as pool:
        golds = [f"{n}/{n + 1}" for n in range(1, 25)]
        verdicts = await asyncio.gather(*(pool.grade(g, f"\\frac{{{n}}}{{{n + 1}}}") for n, g in enumerate(golds, 1)))
        assert verdicts == [True] * 24
        wrong = await asyncio.gather(*(pool.grade(g, "7.5") for g in golds))
        assert wrong == [False] * 24
        pids = [w.pid for w in pool.workers]
    assert await gone(*(p for p in pids if p is not None))


def read(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


def start_trainer(script: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)


async def test_no_process_survives_the_trainer(tmp_path: Path) -> None:
    """kill -9 of the trainer while the grader is stuck in C: nobody closes anything, and both processes go."""
    script = tmp_path / "trainer.py"
    script.write_text(
        "import asyncio\n"
        "from retool.rewards.pool import WorkerPool\n"
        "async def main():\n"
        "    async with WorkerPool(1, 600, 0) as pool:\n"
        "        print(pool.workers[0].pid, flush=True)\n"
        f"        await pool.grade('3', {HANGS!r})\n"
        "asyncio.run(main())\n"
    )
    with start_trainer(script) as trainer:
        assert trainer.stdout is not None
        guard = int(trainer.stdout.readline())
        (grader,) = children_of(guard)
        await busy(grader)
        trainer.kill()
        trainer.wait()
    assert await gone(guard, grader)


async def test_a_worker_that_cannot_start_says_why() -> None:
    pool = WorkerPool(1, 10, 0, command=(sys.executable, "-c", "raise ImportError('no math_verify here')"))
    with pytest.raises(VerifierError, match=r"no math_verify here.*pip install"):
        async with pool:
            raise AssertionError("it must not start")


async def test_the_worker_sees_no_secret_of_the_trainer_and_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    async with WorkerPool(workers=1, timeout_s=60, retries=0) as pool:
        guard = pool.workers[0].pid
        assert guard is not None
        (grader,) = children_of(guard)
        assert b"secret" not in read(grader, "environ")
        assert b"torch" not in read(grader, "maps")
