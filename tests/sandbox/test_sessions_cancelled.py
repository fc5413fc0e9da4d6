"""Openings, copies and restorations that are cancelled: what nobody got is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from sandbox import LocalSandbox, Session, Status

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def give_up(call: Callable[[], Awaitable[object]], turns: int) -> None:
    """Start a call and cancel it after so many turns of the event loop."""
    task = asyncio.ensure_future(call())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    for found in await asyncio.gather(task, return_exceptions=True):  # on a slow day it was done before
        for session in found if isinstance(found, list) else [found]:
            if isinstance(session, Session):
                await session.close()


async def settled(box: LocalSandbox) -> int:
    """How many sessions are open once all that was asked for has been done."""
    await asyncio.sleep(0.5)
    return int((await box.stats())["sessions"])


@pytest.mark.parametrize("turns", [1, 2, 3])
async def test_what_nobody_got_is_closed(box: LocalSandbox, turns: int) -> None:
    before = await settled(box)

    async def opening() -> Session:
        return await box.session()

    async def entering() -> None:
        async with box.session():
            await asyncio.sleep(0)

    async with box.session() as session:
        await session.exec("x = 41")
        snapshot = await session.snapshot()
        for call in (opening, entering, lambda: session.fork(2), lambda: box.restore(snapshot, count=2)):
            for _ in range(3):
                await give_up(call, turns)
        assert await settled(box) == before + 1
        assert (await session.exec("x")).stdout == "41\n"
        (branch,) = await session.fork(1)
        assert (await branch.exec("x + 1")).stdout == "42\n"
        await branch.close()
    assert await settled(box) == before


async def test_who_names_a_key_may_come_back_for_the_session(box: LocalSandbox) -> None:
    before = await settled(box)

    async def opening() -> Session:
        return await box.session(idempotency_key="mine")

    await give_up(opening, 2)
    session = await opening()
    assert await settled(box) == before + 1
    assert (await session.exec("print(1)")).stdout == "1\n"
    await session.close()


@pytest.mark.parametrize("turns", [1, 2, 3])
async def test_who_is_told_busy_interrupts_nobody_by_going_away(box: LocalSandbox, turns: int) -> None:
    async with box.session() as session:
        running = asyncio.ensure_future(session.exec("import time\ntime.sleep(1)\nprint('done')"))
        await asyncio.sleep(0.3)
        for _ in range(3):
            task = asyncio.ensure_future(session.exec("print('another')"))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        result = await running
        assert (result.status, result.stdout, result.step) == (Status.OK, "done\n", 1), result
