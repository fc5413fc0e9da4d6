"""Sessions that nobody wants any more, and supervisors that die with live ones: nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from sandbox import Limits, LocalSandbox, SandboxUnavailable, SessionError
from tests.sandbox.conftest import processes
from tests.sandbox.test_sandbox_lifecycle import descriptors, until
from tests.sandbox.test_sessions import refused

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def counts(box: LocalSandbox) -> dict[str, int]:
    """What sessions take of a supervisor and of the machine."""
    assert box._link is not None
    stats = await box.stats()
    fds = {name: descriptors(stats[name]) for name in ("supervisor_pid", "warden_pid", "zygote_pid")}
    return {"sessions": stats["sessions"], "processes": len(processes(box._link.folder)), **fds}


async def baseline(box: LocalSandbox) -> dict[str, int]:
    """Counts after use: some process namespaces are kept for the next."""
    sessions = [await box.session() for _ in range(5)]
    await asyncio.gather(*(session.close() for session in sessions))
    await asyncio.sleep(0.5)
    return await counts(box)


async def at_most(box: LocalSandbox, before: dict[str, int]) -> None:
    """Wait until nothing is more than it was, but for what is kept: one empty process namespace a worker, 16 groups."""
    workers = (await box.stats())["workers"]
    kept = {"sessions": 0, "processes": workers, "supervisor_pid": 16 + 2 * workers}
    for _ in range(1000):
        now = await counts(box)
        if all(now[name] <= before[name] + kept.get(name, 2 * workers) for name in before):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{now} is more than {before}")


async def test_a_lease_ends_and_says_so() -> None:
    async with LocalSandbox("py-bare", workers=1) as box:
        session = await box.session(ttl_s=0.6)
        assert await session.heartbeat() == 0.6
        for _ in range(4):
            await asyncio.sleep(0.3)
            assert (await session.exec("1")).ok  # every call renews it
        assert (await session.exec("import time; time.sleep(1.5)\n2")).stdout == "2\n"  # so does being at work
        await asyncio.sleep(1.2)
        assert "0.6 s expired" in str(await refused("session_ended", session.exec("1")))
        for ttl in (0, -1, float("nan")):
            with pytest.raises(ValueError, match="ttl_s"):
                box.session(ttl_s=ttl)


async def test_abandoned_sessions_give_everything_back() -> None:
    """200 opened and forgotten, some at work, some forked, some with daemons: counts return to where they were."""
    daemon = "import os\nif not os.fork():\n  os.setsid()\n  import time; time.sleep(600)"
    async with LocalSandbox("py-bare", Limits(wall_s=600), workers=2, max_sessions=300) as box:
        before = await baseline(box)
        tasks = []
        for number in range(200):
            session = await box.session(ttl_s=1.5)
            if number % 20 == 0:
                await session.exec(daemon)
            elif number % 20 == 1:
                await session.fork(2)
                await session.snapshot()
            elif number % 20 == 2:
                await session.write_file("f", b"x")
            elif number == 3:
                tasks.append(asyncio.create_task(session.exec("while True: pass", limits=Limits(wall_s=1, cpu_s=9))))
        await asyncio.gather(*tasks)
        before["sessions"] = 0
        snapshots = (await box.stats())["snapshots"]
        assert snapshots == 10  # their lease is longer
        await until_sessions_gone(box)
        fresh = {**before, "processes": before["processes"] + 2 * snapshots}
        fresh |= {name: before[name] + 10 * snapshots for name in before if name.endswith("_pid")}
        await at_most(box, fresh)
        stats = await box.stats()
        assert (stats["leaked"], stats["restarts"], stats["sessions_expired"]) == (0, 0, 220)


async def until_sessions_gone(box: LocalSandbox) -> None:
    """Wait for the leases to end."""
    for _ in range(1000):
        if (await box.stats())["sessions"] == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("sessions are still open")


async def test_closed_trees_give_everything_back() -> None:
    async with LocalSandbox("py-bare", workers=2) as box:
        before = await baseline(box)
        for _ in range(8):
            session = await box.session()
            branches = await session.fork(4)
            snapshots = [await branch.snapshot() for branch in branches]
            made = await box.restore(snapshots[0], count=2)
            await branches[1].restore(snapshots[1])
            await asyncio.gather(*(row.close() for row in (session, *branches, *made)))
            for snapshot in snapshots:
                await box.drop_snapshot(snapshot)
        await at_most(box, before)
        assert (await box.stats())["leaked"] == 0


async def test_no_more_sessions_than_allowed() -> None:
    async with LocalSandbox("py-bare", workers=1, max_sessions=3) as box:
        sessions = [await box.session() for _ in range(3)]
        error = await refused("too_many", box.session())  # type: ignore[arg-type]
        assert error.retryable and "max_sessions" in str(error)
        await refused("too_many", sessions[0].fork())
        await sessions[0].close()
        assert len(await sessions[1].fork()) == 1


async def test_opening_twice_with_a_key_opens_one() -> None:
    async with LocalSandbox("py-bare", workers=1) as box:
        opened = await asyncio.gather(*(box._open_session({**OPEN, "key": "k"}) for _ in range(4)))
        assert len({session.id for session in opened}) == 1 and (await box.stats())["sessions"] == 1
        again = await box.session(ttl_s=60.0, idempotency_key="k")
        assert again.id == opened[0].id


OPEN = {"op": "session.open", "profile": None, "limits": Limits().__dict__, "seed": 0, "ttl_s": 60.0}


async def test_a_dead_supervisor_is_a_typed_error_and_leaves_nothing() -> None:
    async with LocalSandbox("py-bare", workers=1) as box:
        session = await box.session()
        (branch,) = await session.fork()
        await branch.exec("import os\nif not os.fork():\n  os.execv('/bin/sleep', ['/bin/sleep', '82002.2'])")
        await until(lambda: bool(processes("82002.2")), "the daemon")
        running = asyncio.create_task(session.exec("while True: pass"))
        await asyncio.sleep(0.3)
        assert box._link is not None
        folder = box._link.folder
        os.kill((await box.stats())["supervisor_pid"], signal.SIGKILL)
        with pytest.raises(SandboxUnavailable):
            await running
        await refused("session_ended", session.exec("1"))
        await refused("session_ended", branch.fork())
        await session.close()
        assert (await box.exec("print(1)")).stdout == "1\n"
        await refused("no_session", box.attach(session.id))
        await until(lambda: not processes("82002.2") and not processes(folder), "what ran to be gone")
        assert not Path(folder).exists()  # noqa: ASYNC240


async def test_a_dead_zygote_ends_its_sessions() -> None:
    async with LocalSandbox("py-bare", workers=1) as box:
        session = await box.session()
        (branch,) = await session.fork()
        snapshot = await branch.snapshot()
        running = asyncio.create_task(session.exec("while True: pass"))
        await asyncio.sleep(0.2)
        os.kill((await box.stats())["zygote_pid"], signal.SIGKILL)
        with pytest.raises(Exception, match="warm interpreter died") as caught:
            await running
        assert getattr(caught.value, "code", "") == "lost_child"
        await refused("session_ended", branch.exec("1"))
        await refused("no_snapshot", box.restore(snapshot))
        async with box.session() as fresh:
            assert (await fresh.exec("1 + 1")).stdout == "2\n"
        with pytest.raises(SessionError):
            await session.fork()
