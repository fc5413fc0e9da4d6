"""The queue: no slot is lost, owners take turns, and whoever cannot be served in time hears it at once."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.supervisor.admission import Admission
from sandbox.types import SandboxOverloaded


async def admitted(queue: Admission, order: list[str], owner: str, deadline_s: float | None = None) -> None:
    await queue.acquire(owner, deadline_s)
    order.append(owner)


async def test_owners_take_turns() -> None:
    queue, order = Admission(1, 100), []
    await queue.acquire("a")
    tasks = [asyncio.create_task(admitted(queue, order, owner)) for owner in "aaaabbc"]
    await asyncio.sleep(0)
    for _ in tasks:
        queue.release()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert "".join(order) == "abcabaa"


async def test_a_full_queue_refuses_with_a_hint() -> None:
    queue = Admission(1, 1)
    queue.mean_s = 2.0
    await queue.acquire()
    waiting = asyncio.create_task(queue.acquire())
    await asyncio.sleep(0)
    with pytest.raises(SandboxOverloaded, match="1 executions wait") as caught:
        await queue.acquire()
    assert caught.value.retry_after == pytest.approx(4.0)  # two ahead of two seconds each, then one's own turn
    queue.release()
    await waiting


async def test_a_deadline_that_cannot_be_met_is_refused_before_it_is_waited_for() -> None:
    queue = Admission(2, 100)
    queue.mean_s = 10.0
    await queue.acquire()
    await queue.acquire()
    with pytest.raises(SandboxOverloaded, match="deadline"):
        await queue.acquire("", 1.0)
    assert queue.waiting == 0


async def test_a_deadline_that_passes_while_waiting_frees_the_place() -> None:
    queue = Admission(1, 100)
    queue.mean_s = 0.0
    await queue.acquire()
    with pytest.raises(SandboxOverloaded, match="not started"):
        await queue.acquire("x", 0.01)
    assert queue.waiting == 0 and queue.free == 0
    queue.release()
    assert queue.free == 1


@given(st.lists(st.sampled_from(["enter", "leave", "cancel", "expire"]), max_size=60), st.integers(1, 3))
def test_slots_are_conserved(steps: list[str], slots: int) -> None:
    async def play() -> None:
        queue = Admission(slots, 1000)
        queue.mean_s = 0.0
        tasks: list[asyncio.Task[None]] = []
        holding = 0

        def settle() -> int:
            """Count, once each, the tasks that hold a slot now."""
            held = [task for task in tasks if task.done() and not task.cancelled() and task.exception() is None]
            for task in list(tasks):
                if task.done():
                    tasks.remove(task)
            return len(held)

        for number, step in enumerate(steps):
            if step == "enter" or (step == "expire" and queue.free == 0):
                deadline = 0.0 if step == "expire" else None
                tasks.append(asyncio.ensure_future(queue.acquire(str(number % 3), deadline)))
            elif step == "leave" and holding:
                queue.release()
                holding -= 1
            elif step == "cancel" and tasks:
                tasks[0].cancel()
            for _ in range(5):
                await asyncio.sleep(0)
            await asyncio.sleep(0.001)
            holding += settle()
            assert queue.free + holding == slots, (step, queue.free, holding)
            assert queue.waiting == len(tasks)
            assert not (queue.free and queue.waiting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(play())
