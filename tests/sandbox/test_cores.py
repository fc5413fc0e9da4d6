"""Runs of many threads keep to one processor, and runs that reach a limit hold their slot until they are cleaned up."""

from __future__ import annotations

import os

import pytest

from sandbox import Limits, LocalSandbox, Status

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
]
several_processors = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
WATCH = """
import os, threading, time
def processors(thread=0): return len(os.sched_getaffinity(thread))
def until(wanted, thread=0):
    for _ in range(2000):
        if processors(thread) == wanted: return True
        time.sleep(0.005)
all_of_them, stop = processors(), threading.Event()
"""
BOUND = """
others = [threading.Thread(target=stop.wait) for _ in range(3)]
for other in others: other.start()
print([until(1, thread) for thread in [0, *(other.native_id for other in others)]])
late = threading.Thread(target=lambda: print(processors() == 1))
late.start()
late.join()
"""
RELEASED = """
stop.set()
for other in others: other.join()
print(until(all_of_them))
"""
ALONE = "end = time.monotonic() + 0.4\nwhile time.monotonic() < end: assert processors() == all_of_them\n"
PATIENT = Limits(wall_s=60, cpu_s=60)


@several_processors
async def test_a_run_has_one_processor_while_it_has_several_threads(box: LocalSandbox) -> None:
    result = await box.exec(WATCH + ALONE + BOUND + RELEASED, limits=PATIENT)
    assert result.stdout == "[True, True, True, True]\nTrue\nTrue\n", result


@several_processors
async def test_a_session_has_one_processor_while_it_has_several_threads(box: LocalSandbox) -> None:
    async with box.session(limits=PATIENT) as session:
        assert (await session.exec(WATCH + ALONE, limits=PATIENT)).ok
        assert (await session.exec(BOUND, limits=PATIENT)).stdout == "[True, True, True, True]\nTrue\n"
        assert (await session.exec(RELEASED, limits=PATIENT)).stdout == "True\n"


@several_processors
async def test_the_copy_of_a_session_is_not_bound(box: LocalSandbox) -> None:
    async with box.session(limits=PATIENT) as session:
        # The threads end with the execution, so that nobody looks between that and the fork.
        assert (await session.exec(WATCH + BOUND + "stop.set()\nfor other in others: other.join()", limits=PATIENT)).ok
        (copy,) = await session.fork(1)
        async with copy:
            assert (await copy.exec("print(processors() == all_of_them)")).stdout == "True\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", Status.MEMORY_LIMIT),
        ("while True: pass", Status.TIMEOUT),
        ("while True: print('x' * 100_000)", Status.OUTPUT_LIMIT),
    ],
)
async def test_after_a_limit_the_slot_is_free_with_the_answer(code: str, status: Status) -> None:
    async with LocalSandbox("py-bare", workers=1) as box:
        for _ in range(5):
            assert (await box.exec(code, limits=Limits(wall_s=0.5, memory_mb=256))).status is status
            assert (await box.exec("1", deadline_s=0.0)).ok  # refused if it had to wait
