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
from sandbox.worker.jail import REPORT
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


async def test_every_run_has_its_own_and_only_when_it_begins() -> None:
    """They start side by side: whatever they shared, one of them would write over."""
    async with LocalSandbox("py-bare", Limits(wall_s=30), workers=12, tier="ns") as box:
        for _ in range(3):
            runs = [asyncio.ensure_future(box.exec("import time\ntime.sleep(30)")) for _ in range(12)]
            zygote = (await box.stats())["zygote_pid"]
            for _ in range(200):
                await asyncio.sleep(0.1)
                alive = _children()
                counts = sorted(len(alive.get(child, ())) for child in alive[zygote])
                if counts.count(1) >= 12:
                    break
            assert (counts.count(1), counts.count(0)) == (12, len(counts) - 12), counts
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)


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
        kinds = [["0", "device"], ["1", "pipe"], ["2", "pipe"], [str(REPORT), "socket"]]
        assert [row[:2] for row in found] == kinds, results
        assert found[3][2] == "ENXIO"
    inodes = [{row[-1] for row in found[1:]} for found in rows]
    assert len(inodes[0]) == len(inodes[1]) == 3 and not inodes[0] & inodes[1]


HIJACK = f"""
import ctypes, mmap, os, socket, sys, time

def hijack(program, data, least=0):
    \"\"\"Have the anchor execute machine code, which is told where `data` lies, and make of it at least so much.\"\"\"
    frame = sys._getframe()
    while not hasattr(frame.f_locals.get("self"), "anchor"):
        frame = frame.f_back
    stack = (ctypes.c_uint64 * 8192).from_buffer(frame.f_locals["self"].anchor._memory)
    page = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    code = program(address + 4096)
    page[: len(code)], page[4096 : 4096 + len(data)] = code, data
    read = ctypes.cast(ctypes.CDLL(None).read, ctypes.c_void_p).value
    for index, word in enumerate(stack):
        if abs(word - read) < 4 << 20:  # a way back into libc
            stack[index] = address
    report = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno={REPORT})
    report.shutdown(socket.SHUT_RD)  # it reads the end, and goes back
    report.detach()
    end = time.monotonic() + 5
    while int.from_bytes(page[4096:4104], "little") < least and time.monotonic() < end: time.sleep(0.01)
    time.sleep(0.3)
    return int.from_bytes(page[4096:4104], "little")
"""
FORKS = """
def forty(counter):
    again = bytes.fromhex("b839000000 0f05 85c0 740b 7803 49ff07 ffcb 75ec 9090")  # fork, count it, forty times
    pause = bytes.fromhex("b822000000 0f05 ebf7")
    return b"\\xbb" + (40).to_bytes(4, "little") + b"\\x49\\xbf" + counter.to_bytes(8, "little") + again + pause
print(hijack(forty, bytes(8), 7))
"""
NO_TIME = """
def lower(limit):
    numbers = b"\\xb8" + (302).to_bytes(4, "little") + b"\\xbf" + os.getpid().to_bytes(4, "little")
    call = bytes.fromhex("31f6 48ba") + limit.to_bytes(8, "little") + bytes.fromhex("4531d2 0f05")
    return numbers + call + bytes.fromhex("b822000000 0f05 ebf7")  # prlimit64(we, RLIMIT_CPU, 0), and pause
hijack(lower, bytes(16))
end = time.process_time() + 0.1
while time.process_time() < end: pass
print("alive")
"""
x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="machine code")


@x86
async def test_it_has_the_limits_of_the_run() -> None:
    """Code that takes it over gains nothing."""
    async with LocalSandbox("py-bare", Limits(wall_s=10, processes=8), tier="ns") as box:
        result = await box.exec(HIJACK + FORKS)
        assert (result.status, result.stdout) == (Status.OK, "7\n"), result


@x86
async def test_it_cannot_make_the_runs_end_look_like_our_failure() -> None:
    async with LocalSandbox("py-bare", Limits(wall_s=10), tier="ns") as box:
        result = await box.exec(HIJACK + NO_TIME)
        assert (result.status, result.stdout) == (Status.OK, "alive\n"), result


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
