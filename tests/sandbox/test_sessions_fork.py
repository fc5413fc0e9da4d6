"""Copies of live sessions: what they share (nothing), what forbids them, what siblings can do to them (nothing)."""

from __future__ import annotations

import asyncio

import pytest

from sandbox import Limits, LocalSandbox, Session, SessionError, Status
from tests.sandbox.test_sessions import refused

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def said(session: Session, code: str) -> str:
    """Standard output of code that must work."""
    result = await session.exec(code)
    assert result.ok, result
    return result.stdout.strip()


async def test_copies_have_state_and_files_of_their_own(box: LocalSandbox) -> None:
    async with box.session() as session:
        await session.exec("import numpy\nx = numpy.arange(4)\nfrom pathlib import Path\nPath('d').mkdir()")
        await session.exec("Path('d/f').write_text('old'); Path('link').symlink_to('d/f')")
        branches = await session.fork(3)
        assert len({branch.id for branch in (session, *branches)}) == 4
        for number, branch in enumerate(branches):
            change = f"x += {number}; Path('d/f').write_text('new{number}'); Path('link').read_text()"
            assert await said(branch, change) == f"'new{number}'"
        for number, branch in enumerate(branches):
            assert await said(branch, "print(x.sum(), Path('d/f').read_text())") == f"{6 + 4 * number} new{number}"
        assert await said(session, "print(x.sum(), Path('d/f').read_text())") == "6 old"
        result = await branches[0].exec("1")
        assert result.step == 5  # numbering goes on from where it was
        for branch in branches:
            await branch.close()
        assert await said(session, "print(x.sum(), sorted(p.name for p in Path().iterdir() if p.name[0] != '.'))")


async def test_copies_draw_different_random_numbers(box: LocalSandbox) -> None:
    draw = "import random, numpy\nprint(random.random(), numpy.random.rand())"

    async def drawn(seed: int, seeds: list[int] | None) -> list[str]:
        async with box.session(seed=seed) as session:
            await session.exec("import numpy, random")
            branches = await session.fork(3, seeds=seeds)
            outputs = [await said(branch, draw) for branch in branches]
            outputs += [await said(branch, draw) for branch in await session.fork(1)]
            inner = await branches[0].fork(1)
            return [*outputs, await said(inner[0], draw)]

    first, again, other = await drawn(1, None), await drawn(1, None), await drawn(2, None)
    assert first == again and len({*first, *other}) == 10
    parts = [text.split() for text in first]
    assert len({part[0] for part in parts}) == len({part[1] for part in parts}) == 5
    chosen = await drawn(1, [7, 7, 8])
    assert chosen[0] == chosen[1] != chosen[2]


async def test_open_files_are_the_copys_own_at_the_same_place(box: LocalSandbox) -> None:
    async with box.session() as session:
        await session.exec(
            "open('f', 'w').write('abcdef')\nf = open('f', 'rb+', buffering=0)\nf.read(2)\nn = open('/dev/null')"
        )
        branches = await session.fork(2)
        assert [await said(branch, "print(f.read(2), f.write(b'XX'), f.tell())") for branch in branches] == [
            "b'cd' 2 6"
        ] * 2
        assert await said(session, "print(f.tell(), f.read())") == "2 b'cdef'"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "2 threads"),
        ("import subprocess; p = subprocess.Popen(['/bin/sleep', '60'])", "child process that runs"),
        ("import os\nif not os.fork(): os._exit(0)", "nobody waited for"),
        ("import os; r, w = os.pipe()", "pipe"),
        ("import socket; s = socket.socketpair()", "socket"),
        ("import tempfile; t = tempfile.TemporaryFile()", "deleted file"),
        ("import os; f = open(os.__file__)", "outside the work folder"),
        ("import os\nfor n in range(3): open(f'big{n}', 'wb').write(b'x' * (15 << 20))", "32 MiB"),
    ],
)
async def test_what_cannot_be_copied_is_refused_with_the_reason(box: LocalSandbox, code: str, why: str) -> None:
    async with box.session() as session:
        await said(session, code)
        await asyncio.sleep(0.05)
        error = await refused("fork_unsafe", session.fork())
        assert why in str(error) and not error.retryable
        await refused("fork_unsafe", session.snapshot())
        assert await said(session, "print('alive')") == "alive"


async def test_library_threads_are_seen(box: LocalSandbox) -> None:
    """Not only those that the threading module knows."""
    start = "import _thread, time; _thread.start_new_thread(time.sleep, (60,))"
    async with box.session() as session:
        await said(session, start)
        assert "2 threads" in str(await refused("fork_unsafe", session.fork()))


NEIGHBOUR = "import os, time\nopen('mine', 'w').write('secret')\nprint(os.getpid(), os.getcwd())"
ATTACKS = """
import os, resource
def attack(name, act):
    try: act()
    except (OSError, ValueError) as error: print(name, type(error).__name__)
    else: print(name, 'WORKED')
attack('read', lambda: open(folder + '/mine').read())
attack('list', lambda: os.listdir(folder))
attack('write', lambda: open(folder + '/mine', 'w').write('x'))
attack('new', lambda: open(folder + '/other', 'w'))
attack('link', lambda: os.link(folder + '/mine', 'stolen'))
attack('parent', lambda: open('/run/sandbox/original').read())
attack('term', lambda: os.kill(pid, 15))
attack('kill', lambda: os.kill(pid, 9))
attack('int', lambda: os.kill(pid, 2))
attack('limit', lambda: resource.prlimit(pid, resource.RLIMIT_AS, (1, 1)))
attack('cores', lambda: os.sched_setaffinity(pid, [0]))
attack('memory', lambda: open(f'/proc/{pid}/mem', 'rb'))
attack('descriptor', lambda: os.readlink(f'/proc/{pid}/fd/1'))
attack('self', lambda: os.kill(os.getpid(), 9))
attack('group', lambda: os.kill(0, 9))
attack('all', lambda: os.kill(-1, 9))
"""


async def test_siblings_can_do_nothing_to_each_other(box: LocalSandbox) -> None:
    async with box.session() as session:
        await said(session, "open('original', 'w').write('x')")
        first, second = await session.fork(2)
        pid, folder = (await said(first, NEIGHBOUR)).split()
        attacks = await said(second, f"pid, folder = {pid}, {folder!r}\n" + ATTACKS)
        assert attacks.count("\n") == 15 and "WORKED" not in attacks, attacks
        assert await said(first, "print(open('mine').read())") == "secret"
        assert await said(session, "print(open('original').read())") == "x"
        harmless = "\n".join(line for line in ATTACKS.splitlines() if "os.kill" not in line and "RLIMIT" not in line)
        own = await said(first, f"pid, folder = 0, {folder!r}\n" + harmless.replace("{pid}", "self"))
        for name in ("read", "list", "write", "new", "link", "cores", "memory", "descriptor"):  # the control
            assert f"{name} WORKED" in own, own


async def test_nobody_in_a_tree_can_make_a_branch_look_lost(box: LocalSandbox) -> None:
    async with box.session() as session:
        (branch,) = await session.fork()
        pid = await said(branch, "import os; print(os.getpid())")
        assert (await session.exec(f"import os; os.kill({pid}, 9)")).exception.type == "PermissionError"  # type: ignore[union-attr]
        await session.exec(f"import os; os.kill({pid}, 15)")  # an original may end its copy, not pretend it was us
        await asyncio.sleep(0.2)
        await refused("session_ended", branch.exec("1"))


async def test_a_dead_branch_leaves_the_others(box: LocalSandbox) -> None:
    async with box.session() as session:
        branches = await session.fork(4)
        result = await branches[0].exec("import os; os._exit(5)")
        assert (result.status, result.exit_code, result.attested, result.alive) == (Status.EXIT, 5, True, False)
        aborted = await branches[1].exec("import os; os.abort()")
        assert (aborted.status, aborted.signal, aborted.attested) == (Status.SIGNAL, 6, True)
        await branches[2].close()
        assert await said(branches[3], "print(1)") == await said(session, "print(1)") == "1"
        await session.close()
        assert await said(branches[3], "print(2)") == "2", "a copy outlives its original"
        grandchildren = await branches[3].fork(2)
        await branches[3].close()
        assert await said(grandchildren[1], "print(3)") == "3"
        for branch in grandchildren:
            await branch.close()
    assert (await box.stats())["leaked"] == 0


async def test_copies_are_not_children_of_user_code(box: LocalSandbox) -> None:
    async with box.session() as session:
        await session.fork(2)
        assert (await session.exec("import os; os.wait()")).exception.type == "ChildProcessError"  # type: ignore[union-attr]
        run = "import subprocess; print(subprocess.run(['/bin/echo', 'hi'], capture_output=True).stdout)"
        assert await said(session, run) == "b'hi\\n'"


async def test_processes_are_counted_for_each_branch(box: LocalSandbox) -> None:
    count = (
        "import os, time\nn = 0\ntry:\n  while True:\n    if not os.fork(): time.sleep(9); os._exit(0)\n    n += 1\n"
        "except OSError: print(n)"
    )
    async with box.session(limits=Limits(wall_s=20, processes=4)) as session:
        branches = await session.fork(6)
        assert await said(branches[0], count) == "3"
        await branches[0].close()


async def test_depth_is_bounded_and_said(box: LocalSandbox) -> None:
    async with box.session() as session:
        chain: list[Session] = [session]
        with pytest.raises(SessionError, match="14 deep") as caught:
            for _ in range(20):
                chain += await chain[-1].fork()
                assert await said(chain[-1], "open('f', 'w').write('x'); print(1)") == "1"
        assert caught.value.code == "fork_unsafe" and len(chain) == 15
        for link in reversed(chain):
            await link.close()


async def test_many_branches_and_the_cap_of_a_tree(box: LocalSandbox) -> None:
    async with box.session() as session:
        await said(session, "x = 1")
        branches = await session.fork(40)
        assert [await said(branch, f"x += {n}; x") for n, branch in enumerate(branches)] == [
            str(1 + n) for n in range(40)
        ]
        await refused("too_many", session.fork(250))
        await asyncio.gather(*(branch.close() for branch in branches))


async def test_concurrent_branches(box: LocalSandbox) -> None:
    async with box.session() as session:
        await said(session, "import time; x = 0")
        branches = await session.fork(6)

        async def work(branch: Session, number: int) -> str:
            for _ in range(20):
                await said(branch, f"x += {number}")
            return await said(branch, "x")

        assert await asyncio.gather(*(work(b, n) for n, b in enumerate(branches))) == [str(20 * n) for n in range(6)]


# --- snapshots ----------------------------------------------------------------------------------------------------


async def test_restore_brings_back_state_files_step_and_randomness(box: LocalSandbox) -> None:
    draw = "import random, numpy\nprint(random.random(), numpy.random.rand())"
    async with box.session() as session:
        await said(session, "x = [1]; open('f', 'w').write('old'); import numpy")
        snapshot = await session.snapshot()
        drawn = await said(session, draw)
        for attempt in range(3):
            result = await session.exec(f"x.append({attempt}); open('f', 'w').write('new'); open('extra', 'w')")
            assert result.step == 2 + (attempt == 0)
            await session.restore(snapshot)
            assert (
                await said(session, "import os; print(x, open('f').read(), os.path.exists('extra'))") == "[1] old False"
            )
            await session.restore(snapshot)
        assert await said(session, draw) == drawn
        assert (await session.exec("1", expect_step=3)).step == 3
        await session.restore(snapshot)
        assert (await session.exec("2", expect_step=2)).stdout == "2\n", "what was undone may be done differently"


async def test_rollback_can_go_on_for_ever(box: LocalSandbox) -> None:
    """Snapshot, try, roll back: no chain of it reaches the cap of nested copies."""
    async with box.session() as session:
        await said(session, "n = 0")
        for round_ in range(24):
            snapshot = await session.snapshot()
            await said(session, "n += 100")
            await session.restore(snapshot)
            await box.drop_snapshot(snapshot)
            assert await said(session, "n += 1; n") == str(round_ + 1)
        branches = await session.fork(2)
        assert await said(branches[1], "n") == "24"


async def test_the_folders_of_the_dead_are_removed(box: LocalSandbox) -> None:
    """Otherwise a session that is rolled back often would fill its disk."""
    async with box.session() as session:
        await said(session, "open('f', 'wb').write(b'x' * (6 << 20))")
        for _ in range(30):
            snapshot = await session.snapshot()
            await session.restore(snapshot)
            await box.drop_snapshot(snapshot)
        for _ in range(12):
            (branch,) = await session.fork()
            (inner,) = await branch.fork()
            await branch.close()
            assert await said(inner, "import os; os.path.getsize('f')") == str(6 << 20)
            await inner.close()


async def test_new_sessions_from_a_snapshot(box: LocalSandbox) -> None:
    async with box.session() as session:
        await said(session, "x = 1; import random, numpy")
        snapshot = await session.snapshot()
        await session.close()
        made = await box.restore(snapshot, count=3)
        draws = {await said(other, "x += 1; print(x, random.random(), numpy.random.rand())") for other in made}
        assert len(draws) == 3 and all(text.startswith("2 ") for text in draws)
        same = await box.restore(snapshot, count=2, seeds=[5, 5])
        assert len({await said(other, "print(random.random())") for other in same}) == 1
        await refused("no_snapshot", (await box.session()).restore(snapshot))  # another tree
        await box.drop_snapshot(snapshot)
        await refused("no_snapshot", box.restore(snapshot))
        await refused("no_snapshot", box.drop_snapshot(snapshot))
        assert await said(made[0], "x") == "2"
        for other in (*made, *same):
            await other.close()


async def test_a_snapshot_sleeps_through_what_the_session_sends_it(box: LocalSandbox) -> None:
    async with box.session() as session:
        pid = int(await said(session, "x = 1; import os; os.getpid()"))
        snapshot = await session.snapshot()
        sent = await said(
            session,
            f"import os\nfor pid in range({pid + 1}, {pid + 9}):\n  for number in (1, 2, 10, 15):\n"
            "    try: os.kill(pid, number); print('sent')\n    except OSError: pass\n"
            f"try: open(f'/proc/{pid + 1}/mem', 'rb+'); print('open')\nexcept OSError: print('closed')",
        )
        assert "sent" in sent and sent.endswith("closed")
        await session.restore(snapshot)
        assert await said(session, "x") == "1"


async def test_snapshots_are_few_and_the_oldest_goes(box: LocalSandbox) -> None:
    async with LocalSandbox("py-bare", workers=1, max_snapshots=2) as small, small.session() as session:
        snapshots = []
        for number in range(3):
            await said(session, f"x = {number}")
            snapshots.append(await session.snapshot())
            if number == 1:
                await session.restore(snapshots[0])  # used: now the other one is the oldest
        assert "evicted" in str(await refused("no_snapshot", small.restore(snapshots[1])))
        await session.restore(snapshots[0])
        assert await said(session, "x") == "0"
        assert (await small.stats())["snapshots"] == 2
