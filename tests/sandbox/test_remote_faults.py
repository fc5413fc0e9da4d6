"""Connections that break between a client and a server: nothing is lost, nothing takes effect twice."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from sandbox.remote import RemoteSandbox
from sandbox.remote_endpoint import LostRequest
from sandbox.types import SandboxError, SandboxUnavailable, SessionError
from tests.sandbox.liars import liar
from tests.sandbox.serving import CuttingProxy, Served, served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--workers", "2", "--wall", "20") as it:
        yield it


async def executions(box: RemoteSandbox) -> int:
    return int((await box.stats())["executions"])


@pytest.mark.parametrize("after", [0, 20, 300])
async def test_a_lost_answer_is_asked_for_again_and_ran_once(server: Served, after: int) -> None:
    async with (
        CuttingProxy(server.address) as proxy,
        RemoteSandbox(proxy.url) as box,
        RemoteSandbox(server.url) as direct,
    ):
        before = await executions(direct)
        proxy.cut_answers, proxy.after = 2, after
        result = await box.exec("import time; print(time.time_ns())")
        assert result.ok and proxy.cuts == 2 and box.retries == 2
        assert await executions(direct) == before + 1


async def test_a_session_moves_one_step_however_often_the_answer_is_lost(server: Served) -> None:
    async with CuttingProxy(server.address) as proxy, RemoteSandbox(proxy.url) as box:
        sessions_before = (await box.stats())["sessions"]
        proxy.cut_answers = 1
        async with box.session() as session:
            await session.exec("n = 0")
            for step in range(2, 6):
                proxy.cut_answers = 1
                result = await session.exec("n += 1; print(n)")
                assert (result.stdout, result.step) == (f"{step - 1}\n", step)
            proxy.cut_answers = 1
            (branch,) = await session.fork(1)
            proxy.cut_answers = 1
            snapshot = await session.snapshot()
            stats = await box.stats()
            assert stats["sessions"] == sessions_before + 2 and stats["snapshots"] >= 1, "one of each"
            proxy.cut_answers = 1
            await session.restore(snapshot)
            proxy.cut_answers = 1
            await session.write_file("f", b"data")
            proxy.cut_answers = 1
            assert await session.read_file("f") == b"data"
            await branch.close()
        assert proxy.cuts == 10
        assert (await box.stats())["sessions"] == sessions_before


async def test_a_batch_that_breaks_off_is_completed(server: Served) -> None:
    async with (
        CuttingProxy(server.address) as proxy,
        RemoteSandbox(proxy.url) as box,
        RemoteSandbox(server.url) as direct,
    ):
        before = await executions(direct)
        proxy.cut_answers, proxy.after = 3, 700
        results = await asyncio.gather(*(box.exec(f"print({n})") for n in range(150)))
        assert [result.stdout for result in results] == [f"{n}\n" for n in range(150)]
        assert proxy.cuts == 3 and await executions(direct) == before + 150, "each ran once"


async def test_a_server_that_cannot_be_reached_is_unavailable(server: Served) -> None:
    async with CuttingProxy(server.address) as proxy, RemoteSandbox(proxy.url, total_s=1.5) as box:
        proxy.refuse = True
        proxy.cut_answers = 1000
        with pytest.raises(SandboxUnavailable) as lost:
            await box.exec("1")
        assert lost.value.retryable
        proxy.refuse, proxy.cut_answers = False, 0
        box.total_s = 60
        assert (await box.exec("print('back')")).stdout == "back\n"


async def test_without_a_budget_nothing_is_retried(server: Served) -> None:
    async with CuttingProxy(server.address) as proxy, RemoteSandbox(proxy.url) as box:
        box.budget.tokens = box.budget.floor = 0.0
        proxy.cut_answers = 1
        with pytest.raises(LostRequest):
            await box.exec("1")
        assert (box.retries, box.budget.refused) == (0, 1)


async def test_the_supervisor_dies_under_load_and_every_call_ends_well_or_typed() -> None:
    with served("--workers", "3") as server:
        async with RemoteSandbox(server.url, total_s=60) as box:
            calls = [asyncio.create_task(box.exec(f"import time; time.sleep(0.05); print({n})")) for n in range(120)]
            await asyncio.sleep(0.6)
            os.kill((await box.stats())["servers"][server.url]["supervisor_pid"], signal.SIGKILL)
            results = await asyncio.gather(*calls, return_exceptions=True)
            for n, result in enumerate(results):
                if isinstance(result, BaseException):
                    assert isinstance(result, SandboxError) and result.retryable, result
                    result = await box.exec(f"print({n})")
                assert result.stdout == f"{n}\n"
            assert (await box.stats())["supervisor_restarts"] == 1


async def test_a_session_whose_server_lost_its_supervisor_has_ended() -> None:
    with served() as server:
        async with RemoteSandbox(server.url, total_s=30) as box:
            session = await box.session()
            await session.exec("x = 1")
            os.kill((await box.stats())["servers"][server.url]["supervisor_pid"], signal.SIGKILL)
            with pytest.raises(SessionError) as ended:
                await session.exec("x")
            assert ended.value.code == "session_ended"
            await session.close()


# --- hanging up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coalesce", [True, False])
async def test_closing_ends_the_calls_under_way_and_leaves_no_connection(server: Served, coalesce: bool) -> None:
    box = await RemoteSandbox(server.url, coalesce=coalesce).__aenter__()
    calls = [asyncio.create_task(box.exec("import time; time.sleep(0.4)")) for _ in range(14)]
    await asyncio.sleep(0.2)
    async with asyncio.timeout(10):
        await box.close()
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, SandboxUnavailable) for result in results), results
    assert all(endpoint._client is None for endpoint in box.endpoints)
    async with box:
        assert (await box.exec("print('again')")).stdout == "again\n"


async def test_an_opening_that_is_cancelled_leaves_no_connection() -> None:
    async with liar(None) as it:
        box = RemoteSandbox(it.url)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(box.__aenter__(), 0.3)
        assert box.endpoints[0]._client is None and not box._background
