"""The process that shares a run's memory must be noticed by nobody, and outlive nobody."""

# ruff: noqa: ASYNC240 (tests may block)
from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from sandbox import Limits, LocalSandbox, Status
from sandbox.worker.jail import JOB, REPORT
from tests.sandbox.conftest import processes

OTHERS = "import os\nothers = [int(p) for p in os.listdir('/proc') if p.isdigit() and int(p) not in (1, os.getpid())]\n"


async def test_wait_does_not_find_it_and_it_takes_no_place() -> None:
    code = (
        OTHERS + "assert len(others) == 1, others\n"
        "try:\n  os.wait()\nexcept ChildProcessError:\n  print('no child')\n"
        "if os.fork() == 0: os._exit(3)\nprint(os.waitstatus_to_exitcode(os.wait()[1]))\n"
        "try:\n  [os.fork() or __import__('time').sleep(9) for _ in range(9)]\nexcept BlockingIOError:\n  print('full')"
    )
    async with LocalSandbox("py-bare", Limits(wall_s=10, processes=2), tier="ns") as box:
        result = await box.exec(code)
        assert result.stdout.splitlines() == ["no child", "3", "full"], result


@pytest.mark.parametrize("end", ["sys.exit(7)", "os._exit(7)", "os.execv('/bin/sh', ['sh', '-c', 'exit 7'])"])
@pytest.mark.parametrize("first", ["", "os.kill(others[0], 9)", "os.kill(others[0], 15); os.kill(-1, 15)"])
async def test_the_status_is_the_programs_own(first: str, end: str) -> None:
    guard = "import signal, sys; signal.signal(15, lambda *_: None)\n"
    async with LocalSandbox("py-bare", Limits(wall_s=10), tier="ns") as box:
        result = await box.exec(f"{OTHERS}{guard}{first}\n{end}")
        assert (result.status, result.exit_code) == (Status.EXIT, 7), result
        assert (await box.exec("print(1)")).stdout == "1\n"


async def test_every_ready_child_has_its_own() -> None:
    """They start side by side: whatever they shared, one of them would write over."""
    for _ in range(3):
        async with LocalSandbox("py-bare", Limits(wall_s=10), workers=12, tier="ns") as box:
            for _ in range(200):
                stats = await box.stats()
                if stats["ready"] == 12:
                    break
                await asyncio.sleep(0.1)
            zygote = stats["zygote_pid"]
            alive = _children()
            assert len(alive[zygote]) == 12
            assert [len(alive.get(child, ())) for child in alive[zygote]] == [1] * 12


def _children() -> dict[int, list[int]]:
    """Parent -> children, of all processes."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rsplit(") ", 1)[1].split()[:2]
                if state != "Z":
                    found.setdefault(int(parent), []).append(int(entry.name))
    return found


async def test_no_memory_is_shared_between_runs() -> None:
    code = "print([line for line in open('/proc/self/maps') if line.split()[1][1::2] == 'ws'])"
    async with LocalSandbox("py-bare", Limits(wall_s=10), tier="ns") as box, box.session() as session:
        assert (await box.exec(code)).stdout == "[]\n"
        assert (await session.exec(code)).stdout == "[]\n"


async def test_it_holds_nothing_that_another_run_has() -> None:
    """User code can make it do anything with its descriptors, and open again what is not a socket."""
    code = (
        OTHERS + "import ctypes, errno, stat, time\nctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n"
        "for name in sorted(os.listdir(f'/proc/{others[0]}/fd'), key=int):\n"
        "  path = f'/proc/{others[0]}/fd/{name}'\n  found = os.stat(path)\n"
        "  try: os.open(path, os.O_RDWR | os.O_NONBLOCK); again = 'again'\n"
        "  except OSError as error: again = errno.errorcode[error.errno]\n"
        "  kind = {stat.S_IFCHR: 'device', stat.S_IFSOCK: 'socket'}.get(stat.S_IFMT(found.st_mode), 'pipe')\n"
        "  print(name, kind, again if kind != 'pipe' else '', found.st_ino if kind != 'device' else '')\n"
        "time.sleep(1)"
    )
    async with LocalSandbox("py-bare", Limits(wall_s=10), workers=2, tier="ns") as box:
        results = await asyncio.gather(box.exec(code), box.exec(code))
    rows = [[line.split() for line in result.stdout.splitlines()] for result in results]
    for found in rows:
        assert [row[:2] for row in found] == [["0", "device"], ["1", "pipe"], ["2", "pipe"]] + [
            [str(number), "socket"] for number in (JOB, REPORT)
        ], results
        assert [row[2] for row in found[3:]] == ["ENXIO", "ENXIO"]
    inodes = [{row[-1] for row in found[1:]} for found in rows]
    assert len(inodes[0]) == len(inodes[1]) == 4 and not inodes[0] & inodes[1]


async def test_a_session_has_none() -> None:
    async with LocalSandbox("py-bare", Limits(wall_s=10), tier="ns") as box, box.session() as session:
        assert (await session.exec(OTHERS + "others")).stdout == "[]\n"


async def test_it_ends_with_us_even_where_no_namespace_ends_it() -> None:
    async with LocalSandbox("py-bare", Limits(wall_s=30), tier="none", allow_unconfined=True) as box:
        assert box._link is not None
        folder = box._link.folder
        assert (await box.exec("print(1)")).stdout == "1\n"
        stats = await box.stats()
        assert len(processes(folder)) > 3
        for name in ("warden_pid", "supervisor_pid"):
            os.kill(stats[name], signal.SIGKILL)
        for _ in range(100):
            if not processes(folder):
                break
            await asyncio.sleep(0.05)
        assert processes(folder) == []
    assert not Path(folder).exists()
