"""Calls of a remote sandbox that are cancelled, or whose answers are lost for good: they leave nothing behind, and the
session goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from sandbox.remote import RemoteSandbox
from sandbox.types import Limits, SandboxUnavailable, Session, SessionError
from tests.sandbox.serving import CuttingProxy, Served, served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--workers", "2", "--wall", "30") as it:
        yield it


@pytest.fixture
async def box(server: Served) -> AsyncIterator[RemoteSandbox]:
    async with RemoteSandbox(server.url) as it:
        yield it


async def cancelled(call: Callable[[], Awaitable[object]], seconds: float) -> None:
    """A call that its caller gives up."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call(), seconds)


async def sessions(box: RemoteSandbox) -> int:
    """Open on all servers."""
    return int((await box.stats())["sessions"])


async def until_sessions(box: RemoteSandbox, count: int) -> None:
    """Until so many are open."""
    async with asyncio.timeout(15):
        while await sessions(box) != count:  # noqa: ASYNC110 - the server's counter
            await asyncio.sleep(0.02)


async def test_a_session_goes_on_after_a_cancelled_execution(box: RemoteSandbox) -> None:
    async with box.session(limits=Limits(wall_s=30)) as session, asyncio.timeout(20):
        await session.exec("n = 1")
        for _ in range(2):
            await cancelled(lambda: session.exec("n += 1\nimport time; time.sleep(25)"), 0.4)
            assert (await session.exec("print(n)")).ok, "the execution was interrupted, it does not run for 25 s"
        result = await session.exec("print(n)")
        assert (result.stdout, result.step) == ("3\n", 6)
        await cancelled(lambda: session.exec("n = 0\nimport time; time.sleep(25)"), 0.4)
        await session.write_file("f", b"1")
        (branch,) = await session.fork(1)
        assert (await branch.exec("print(n)")).stdout == "0\n"
        await branch.close()


async def test_the_same_program_runs_anew_after_it_was_cancelled(box: RemoteSandbox) -> None:
    async with box.session(limits=Limits(wall_s=30)) as session, asyncio.timeout(20):
        await session.exec("import time; n = 0")
        code = "n += 1; time.sleep(0 if n > 1 else 25); print(n)"
        await cancelled(lambda: session.exec(code), 0.4)
        assert (await session.exec(code)).stdout == "2\n"


async def test_an_execution_that_was_cancelled_before_it_was_sent_never_runs(server: Served) -> None:
    async with CuttingProxy(server.address) as proxy, RemoteSandbox(proxy.url) as box, box.session() as session:
        await session.exec("n = 1")
        proxy.refuse = True
        box.endpoints[0].breaker.hold(0.6)
        await cancelled(lambda: session.exec("n = 2"), 0.2)
        proxy.refuse = False
        result = await session.exec("print(n)")
        assert (result.stdout, result.step) == ("1\n", 2)


async def test_who_names_a_step_may_come_back_for_it(box: RemoteSandbox) -> None:
    async with box.session() as session, asyncio.timeout(20):
        await session.exec("import time; n = 0")
        code = "n += 1; time.sleep(1.5); print(n)"
        await cancelled(lambda: session.exec(code, expect_step=2), 0.4)
        again = await session.exec(code, expect_step=2)
        assert (again.stdout, again.step) == ("1\n", 2), "attached to, not run again"
        assert (await session.exec("n")).stdout == "1\n"


async def test_a_lost_execution_is_found_or_followed(server: Served) -> None:
    async with CuttingProxy(server.address) as proxy, RemoteSandbox(proxy.url) as box, box.session() as session:
        await session.exec("n = 0")
        for retried in (True, False):
            box.budget.tokens = box.budget.floor = 0.0
            proxy.cut_answers = 1
            with pytest.raises(SandboxUnavailable):
                await session.exec("n += 1; print('n', n)")
            box.budget.tokens = box.budget.floor = 100.0
            if retried:
                assert (await session.exec("n += 1; print('n', n)")).stdout == "n 1\n", "it ran once"
        result = await session.exec("print(n)")
        assert (result.stdout, result.step) == ("2\n", 4)
        other = await box.attach(session.id)
        await other.exec("n = 7")
        with pytest.raises(SessionError) as conflict:
            await session.exec("print(n)")
        assert conflict.value.code == "step_conflict", "another handle writes"


async def test_closing_a_session_does_not_wait_for_what_was_cancelled(box: RemoteSandbox) -> None:
    before = await sessions(box)
    session = await box.session(limits=Limits(wall_s=30))
    stubborn = "import time\nwhile True:\n try: time.sleep(25)\n except KeyboardInterrupt: pass"
    await cancelled(lambda: session.exec(stubborn), 0.4)
    async with asyncio.timeout(10):
        await session.close()
    await until_sessions(box, before)


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


@pytest.mark.parametrize("turns", [1, 4, 12])
async def test_openings_that_are_cancelled_leave_no_session(box: RemoteSandbox, turns: int) -> None:
    before = await sessions(box)

    async def opening() -> Session:
        return await box.session()

    async with box.session() as session:
        snapshot = await session.snapshot()
        for call in (opening, lambda: session.fork(2), lambda: box.restore(snapshot, count=2)):
            for _ in range(3):
                await give_up(call, turns)
        async with asyncio.timeout(20):
            while box._left:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await until_sessions(box, before + 1)
    assert [endpoint.sessions for endpoint in box.endpoints] == [0]


async def test_what_is_given_up_just_before_the_end_leaves_no_session(server: Served, box: RemoteSandbox) -> None:
    before = await sessions(box)

    async def opening() -> Session:
        return await short.session()

    async with RemoteSandbox(server.url) as short:
        for _ in range(3):
            await give_up(opening, 6)
    await until_sessions(box, before)


async def test_an_opening_with_a_key_waits_for_its_caller(box: RemoteSandbox) -> None:
    before = await sessions(box)

    async def opening() -> Session:
        return await box.session(idempotency_key="mine")

    given_up = asyncio.ensure_future(opening())
    for _ in range(6):
        await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)  # cancelled, or on a slow day done before
    session = await opening()
    assert (await session.exec("print(1)")).stdout == "1\n" and await sessions(box) == before + 1
    await session.close()
