"""How a copy comes into being: what it inherits, what is done around it, and that a birth that fails leaves nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sandbox import LocalSandbox
from tests.sandbox.test_sessions import refused
from tests.sandbox.test_sessions_fork import said

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("module", ["os", "posix"])
async def test_what_user_code_wants_done_around_a_fork_is_done(box: LocalSandbox, module: str) -> None:
    async with box.session() as session:
        await said(
            session,
            f"import {module}\nseen = []\n{module}.register_at_fork(before=lambda: seen.append('before'), "
            "after_in_parent=lambda: seen.append('parent'), after_in_child=lambda: seen.append('child'))",
        )
        (branch,) = await session.fork()
        assert await said(branch, "print(*seen)") == "before child"
        assert await said(session, "print(*seen)") == "before parent"


async def test_a_copy_can_do_what_its_original_can(box: LocalSandbox) -> None:
    """Threads, processes, signals: Python's own work after a fork is left out, and nothing may be missing."""
    async with box.session() as session:
        await said(session, "import threading, os, signal, time, concurrent.futures as c\nlock = threading.RLock()")
        await said(session, "with c.ThreadPoolExecutor(2) as pool: print(sum(pool.map(abs, range(9))))")
        (branch,) = await session.fork()
        for copy in (branch, *await branch.fork()):
            assert await said(copy, "with c.ThreadPoolExecutor(2) as pool: print(sum(pool.map(abs, range(9))))") == "36"
            assert await said(copy, "with lock: print(threading.main_thread() is threading.current_thread())") == "True"
            assert await said(copy, "threading.active_count()") == "1"
            child = "pid = os.fork()\nif not pid: os._exit(7)\nprint(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
            assert await said(copy, child) == "7"
            alarm = "hit = []\nold = signal.signal(signal.SIGALRM, lambda *_: hit.append(1))\nsignal.alarm(1)\n"
            assert await said(copy, alarm + "while not hit: time.sleep(0.01)\nprint(hit)") == "[1]"
            assert await said(copy, "import tempfile; print(tempfile.gettempdir() == os.getcwd() == os.environ['PWD'])")


async def test_it_lives_in_its_own_folder_before_its_first_command(box: LocalSandbox) -> None:
    where = "import os\nprint(os.getcwd(), os.environ['HOME'], os.environ['TMPDIR'], os.environ['PWD'])"
    async with box.session() as session:
        await said(session, where)
        branches = await session.fork(4)
        homes = [(await said(branch, where)).split() for branch in (session, *branches)]
        assert all(len(set(home)) == 1 for home in homes) and len({home[0] for home in homes}) == 5


@pytest.mark.parametrize(
    ("where", "there"),
    [
        ("os.makedirs('a/b'); os.chdir('a/b')", "/a/b"),
        ("os.chdir('/usr')", ""),
        ("os.mkdir('gone'); os.chdir('gone'); os.rmdir(os.getcwd())", ""),
    ],
)
async def test_it_is_where_its_original_is(box: LocalSandbox, where: str, there: str) -> None:
    async with box.session() as session:
        await said(session, f"import os; {where}")
        (branch,) = await session.fork()
        assert await said(branch, "print(os.getcwd() == os.environ['HOME'] + " + repr(there) + ")") == "True"
        (inner,) = await branch.fork()
        assert await said(inner, "print(os.getcwd() == os.environ['HOME'] + " + repr(there) + ")") == "True"


async def becomes(wanted: int, pid: int) -> bool:
    """Whether the process soon has that many descriptors: its pool of ready children may just be filling up."""
    for _ in range(100):
        if descriptors(pid) == wanted:
            return True
        await asyncio.sleep(0.02)
    return False


def descriptors(pid: int) -> int:
    """How many the process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


async def test_births_that_fail_leave_nothing(box: LocalSandbox) -> None:
    """The copy cannot be seeded: it has said who it is by then, and must go again with its folder and descriptors."""
    supervisor = int((await box.stats())["supervisor_pid"])
    async with box.session() as session:
        await said(session, "import random, os\nkept = random.seed\n1")
        await asyncio.sleep(0.3)
        before = descriptors(supervisor)
        await said(session, "def no(*_): raise ValueError('seeds are out')\nrandom.seed = no")
        for _ in range(20):
            assert "seeds are out" in str(await refused("fork_unsafe", session.fork()))
        assert await becomes(before, supervisor), (before, descriptors(supervisor))
        await said(session, "random.seed = kept")
        (branch,) = await session.fork()
        assert await said(branch, "print(random.random() < 1)") == "True"
        assert await said(session, "print(len(os.listdir('.branches')))") == "1"


async def test_copies_that_have_ended_leave_nothing(box: LocalSandbox) -> None:
    supervisor = int((await box.stats())["supervisor_pid"])
    async with box.session() as session:
        await said(session, "import os")
        await asyncio.sleep(0.3)
        before = descriptors(supervisor)
        for _ in range(3):
            await asyncio.gather(*(branch.close() for branch in await session.fork(5)))
        assert await becomes(before, supervisor), (before, descriptors(supervisor))
        (last,) = await session.fork()  # which has the folders of the others removed
        for _ in range(100):
            if (left := await said(session, "print(*os.listdir('.branches'))")).count(" ") == 0:
                break
            await asyncio.sleep(0.02)
        assert (await said(last, "import os; print(os.getcwd())")).endswith(f"/{left}")


async def test_a_refusal_leaves_no_descriptor_in_the_session(box: LocalSandbox) -> None:
    """Those of the copy that was not made: the next fork would find them, and code could write to them."""
    async with box.session() as session:
        await said(session, "import os\nends = os.pipe()")
        for _ in range(3):
            assert "pipe" in str(await refused("fork_unsafe", session.fork()))
        assert await said(session, "for end in ends: os.close(end)\nlowest = os.open('.', 0); lowest") == "3"
        await said(session, "os.close(lowest)")
        (branch,) = await session.fork()
        assert await said(branch, "print(os.open('.', 0))") == await said(session, "print(os.open('.', 0))") == "3"


async def test_a_refusal_for_threads_does_not_disturb_the_next_fork(box: LocalSandbox) -> None:
    """The original has been asked by then, and waits for descriptors that never come."""
    async with box.session() as session:
        await said(
            session, "import threading\nend = threading.Event()\nt = threading.Thread(target=end.wait)\nt.start()"
        )
        for _ in range(3):
            assert "2 threads" in str(await refused("fork_unsafe", session.fork()))
        assert await said(session, "end.set(); t.join(); print('joined')") == "joined"
        (branch,) = await session.fork()
        assert await said(branch, "print(t.is_alive())") == "False"
        assert await said(session, "import os; print(len(os.listdir('.branches')))") == "1"
