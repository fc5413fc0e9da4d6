"""`RemoteSandbox` against real servers: the same interface and the same values and errors as the embedded one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import Limits, LocalSandbox, Sandbox, SandboxError, SandboxOverloaded, SandboxUnavailable, SessionError
from sandbox.remote import RemoteSandbox
from sandbox.remote_retry import Breaker, RetryBudget
from sandbox.types import SandboxInfraError, Session, Status
from tests.sandbox.serving import TOKEN, Served, served

_CODES = (
    "print(2**100)",
    "1/0",
    "import sys; sys.exit(3)",
    "import os; os.abort()",
    "while True: pass",
    "bytearray(10**10)",
    "while True: print('x' * 1000)",
    "\ud800",
    "import sys; print(repr(sys.stdin.read())); sys.stderr.write('e')",
    "def",
)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--workers", "3", "--queue", "400") as it:
        yield it


async def test_the_same_values_as_embedded(server: Served) -> None:
    limits = Limits(wall_s=0.7, cpu_s=5, memory_mb=256)
    async with RemoteSandbox(server.url, limits=limits) as far, LocalSandbox("py-bare", limits) as near:
        assert isinstance(far, Sandbox)
        for code in _CODES:
            there = await far.exec(code, stdin="in\udcff", seed=3)
            here = await near.exec(code, stdin="in\udcff", seed=3)
            for name in ("status", "exception", "exit_code", "signal", "digest", "attested", "isolation", "stdout"):
                if here.status is not Status.OUTPUT_LIMIT or name not in ("digest", "stdout"):
                    assert getattr(there, name) == getattr(here, name), (code, name)
        files = {"a/b.bin": b"\x00\xff"}
        code = "open('c', 'wb').write(open('a/b.bin', 'rb').read() * 2)\n1 + 1"
        result = await far.exec(code, files=files, fetch=["c", "no"], rich=True, profile="py-bare")
        assert result.files == {"c": b"\x00\xff\x00\xff"} and result.display == ({"text/plain": "2"},)
        assert (await far.capabilities())["tier"] == result.isolation


async def test_many_at_once_share_requests_and_none_is_mixed_up(server: Served) -> None:
    async with RemoteSandbox(server.url) as box:
        results = await asyncio.gather(*(box.exec(f"print({n})") for n in range(300)))
        assert [result.stdout for result in results] == [f"{n}\n" for n in range(300)]
        assert 0 < (await box.stats())["batches"] < 100
        assert (await box.exec("print('alone')")).stdout == "alone\n"
        before = (await box.stats())["batches"]
        await asyncio.gather(*(box.exec("1") for _ in range(5)))
        assert (await box.stats())["batches"] == before, "a few go by themselves"
        mixed = await asyncio.gather(*(box.exec("1/0" if n % 2 else "\ud800") for n in range(40)))
        assert {result.status for result in mixed} == {Status.ERROR, Status.REJECTED}


async def test_a_key_is_this_clients_own(server: Served) -> None:
    code = "import os; print(os.urandom(8).hex())"
    async with RemoteSandbox(server.url) as one, RemoteSandbox(server.url) as other:
        first = await one.exec(code, idempotency_key="a key with blanks, é")
        assert (await one.exec(code, idempotency_key="a key with blanks, é")).digest == first.digest
        assert (await other.exec(code, idempotency_key="a key with blanks, é")).digest != first.digest
        with pytest.raises(SandboxInfraError) as conflict:
            await one.exec("other", idempotency_key="a key with blanks, é")
        assert (conflict.value.code, conflict.value.retryable) == ("idempotency_conflict", False)


async def test_sessions_as_embedded(server: Served) -> None:
    async with RemoteSandbox(server.url) as box:
        async with box.session(seed=1, limits=Limits(wall_s=2)) as session:
            assert isinstance(session, Session)
            assert (await session.exec("x = 41")).step == 1
            branches = await session.fork(2, seeds=[1, 2])
            for n, branch in enumerate(branches):
                assert (await branch.exec(f"x += {n}; print(x)")).stdout == f"{41 + n}\n"
            assert (await session.exec("x")).stdout == "41\n"
            snapshot = await session.snapshot()
            await session.exec("x = 0")
            await session.restore(snapshot)
            again = await session.exec("x")
            assert (again.stdout, again.step) == ("41\n", 3)
            (copy,) = await box.restore(snapshot)
            assert (await copy.exec("x + 1")).stdout == "42\n"
            await box.drop_snapshot(snapshot)
            with pytest.raises(SessionError) as missing:
                await box.restore(snapshot)
            assert missing.value.code == "no_snapshot"
            await session.write_file("d/é \udcff.bin", b"\x00\x01")
            assert await session.read_file("d/é \udcff.bin") == b"\x00\x01"
            assert [(info.path, info.size) for info in await session.list_files()] == [("d/é \udcff.bin", 2)]
            large = bytes(range(256)) * 10_000
            await session.write_file("large", large)
            assert await session.read_file("large") == large
            for path, code in (("../x", "bad_path"), ("/x", "bad_path"), ("", "bad_path"), ("none", "no_file")):
                with pytest.raises(SessionError) as refused:
                    await session.read_file(path)
                assert refused.value.code == code, path
            assert await session.heartbeat() == 600 and await session.interrupt() is False
            attached = await box.attach(session.id)
            assert (await attached.exec("x")).step == 4
            with pytest.raises(SessionError) as conflict:
                await session.exec("x + 1")  # the other handle was there first
            assert conflict.value.code == "step_conflict"
        with pytest.raises(SessionError) as closed:
            await session.exec("1", expect_step=1)
        assert closed.value.code in ("no_session", "session_ended")
        for other in (*branches, copy):
            await other.close()
            await other.close()


async def test_an_interrupt_reaches_the_execution_under_way(server: Served) -> None:
    async with RemoteSandbox(server.url) as box, box.session(limits=Limits(wall_s=60)) as session:
        await session.exec("x = 7")
        assert not await session.interrupt()
        running = asyncio.create_task(session.exec("import time\ntime.sleep(60)"))
        await asyncio.sleep(0.5)
        assert await session.interrupt()
        with pytest.raises(SessionError) as busy:
            await session.exec("1")
        assert busy.value.code == "busy"
        result = await running
        assert result.exception is not None and result.exception.type == "KeyboardInterrupt"
        assert (await session.exec("x")).stdout == "7\n"


async def test_several_servers_share_the_load_and_one_may_die() -> None:
    with served("--workers", "1") as one:
        two = Served("--workers", "1")
        async with RemoteSandbox([one.url, two.url], coalesce=False) as box:
            await asyncio.gather(*(box.exec("import time; time.sleep(0.02)") for _ in range(60)))
            servers = (await box.stats())["servers"]
            assert all(10 <= fields["executions"] <= 50 for fields in servers.values()), servers
            sessions = [await box.session() for _ in range(4)]
            load = asyncio.gather(*(box.exec(f"import time; time.sleep(0.05); print({n})") for n in range(60)))
            await asyncio.sleep(0.4)
            two.process.send_signal(signal.SIGKILL)
            assert [result.stdout for result in await load] == [f"{n}\n" for n in range(60)]
            assert (await box.stats())["unreachable"] == 1
            box.total_s = 2.0
            ended = await asyncio.gather(*(session.exec("1") for session in sessions), return_exceptions=True)
            assert sum(isinstance(each, SandboxUnavailable) for each in ended) == 2, "two lived on each server"
        two.end()


async def test_a_server_that_comes_back_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "box.sock"
    first = Served("--uds", str(path))
    async with RemoteSandbox(f"unix:{path}", total_s=60) as box:
        assert (await box.exec("print(1)")).stdout == "1\n"
        first.process.kill()
        first.end()
        calls = [asyncio.create_task(box.exec(f"print({n})")) for n in range(20)]
        await asyncio.sleep(1.0)
        second = await asyncio.to_thread(Served, "--uds", str(path))
        assert [(await call).stdout for call in calls] == [f"{n}\n" for n in range(20)]
    second.end()


async def test_overload_is_waited_out_and_then_said() -> None:
    with served("--workers", "1", "--queue", "2") as server:
        async with RemoteSandbox(server.url, coalesce=False, total_s=60) as box:
            results = await asyncio.gather(*(box.exec("import time; time.sleep(0.1)") for _ in range(12)))
            assert all(result.ok for result in results) and box.retries > 0
            slow = [asyncio.create_task(box.exec("import time; time.sleep(1.5)")) for _ in range(3)]
            await asyncio.sleep(0.5)
            with pytest.raises(SandboxOverloaded) as crowded:
                await box.exec("1", deadline_s=0.5)
            assert crowded.value.retryable and crowded.value.retry_after > 0
            await asyncio.gather(*slow)


async def test_the_token_and_bad_arguments(tmp_path: Path) -> None:
    with served(env={"RETOOL_SANDBOX_TOKEN": TOKEN}) as server:
        async with RemoteSandbox(server.url, token=TOKEN) as box:
            assert (await box.exec("print(1)")).stdout == "1\n"
            with pytest.raises(ValueError, match="nope"):
                await box.exec("1", profile="nope")
            with pytest.raises(ValueError, match="300 s"):
                await box.exec("1", limits=Limits(wall_s=301))
        for token in (None, "0123456789abcdef-wrong"):
            with pytest.raises(SandboxError) as refused:
                async with RemoteSandbox(server.url, token=token):
                    pass
            assert not refused.value.retryable and "token" in str(refused.value)
    with pytest.raises(ValueError, match="at least one"):
        RemoteSandbox([])
    with pytest.raises(ValueError, match="http://HOST"):
        RemoteSandbox("localhost:8080")


async def test_nobody_there_is_said_when_it_opens(server: Served) -> None:
    dead = "http://127.0.0.1:1"
    with pytest.raises(SandboxUnavailable, match=r"127\.0\.0\.1:1"):
        async with RemoteSandbox(dead, total_s=2):
            pass
    async with RemoteSandbox([dead, server.url]) as box:
        results = await asyncio.gather(*(box.exec(f"print({n})") for n in range(40)))
        assert [result.stdout for result in results] == [f"{n}\n" for n in range(40)]
    with pytest.raises(SandboxUnavailable, match="not open"):
        await box.exec("1")


def test_the_budget_bounds_retries_to_a_share_of_the_requests() -> None:
    budget = RetryBudget(ratio=0.1, floor=5, floor_per_s=0)
    assert [budget.withdraw() for _ in range(6)] == [True] * 5 + [False]
    for _ in range(100):
        budget.deposit()
    assert sum(budget.withdraw() for _ in range(100)) in (9, 10)


def test_the_breaker_opens_probes_and_closes() -> None:
    breaker = Breaker(threshold=3, open_s=1000, most_s=2000)
    for _ in range(2):
        breaker.fail()
    assert breaker.closed and breaker.wait_s() == 0
    breaker.fail()
    assert not breaker.closed and breaker.wait_s() > 900 and breaker.opened == 1
    breaker.fail()
    assert breaker.opened == 1, "what was under way says nothing new"
    quick = Breaker(threshold=1, open_s=0.0)
    quick.fail()
    assert not quick.closed and quick.wait_s() == 0
    assert quick.enter() and quick.wait_s() > 0, "one probes, the others wait"
    quick.drop(True)
    assert quick.wait_s() == 0 and quick.enter()
    quick.succeed()
    assert quick.closed and not quick.enter()
