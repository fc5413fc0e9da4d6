"""What runs share below all walls, one kernel and one kernel user, must not be a way from one to another; and what
ordinary code needs of it must still work."""

# ruff: noqa: E501 (programs on one line)
from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sandbox import Limits, LocalSandbox
from sandbox.worker import root

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["ns", "self"])
async def box(request: pytest.FixtureRequest) -> AsyncIterator[LocalSandbox]:
    """Root can be given either tier."""
    async with LocalSandbox("py-bare", Limits(wall_s=20, cpu_s=10), workers=2, tier=request.param) as opened:
        yield opened
        stats = await opened.stats()
        assert (stats["leaked"], stats.get("infra_errors", 0)) == (0, 0)


RING = """
import os, socket
left, right = socket.socketpair()
try:
    for end in (left, right):
        socket.send_fds(end, [b"x"], [1, left.fileno(), right.fileno()])
except PermissionError:
    print("refused", flush=True)
os._exit(0)
"""


async def test_descriptors_cannot_be_put_into_flight(box: LocalSandbox) -> None:
    """Two sockets that hold each other in flight, and standard output, keep a run's pipes open after its death."""
    for _ in range(3):
        assert (await box.exec(RING)).stdout == "refused\n"
    code = "import array, socket\na, b = socket.socketpair()\ntry:\n  a.sendmsg([b'x'], [(1, 1, array.array('i', [1]))])\nexcept OSError as e: print(e.errno)"
    assert (await box.exec(code)).stdout == "1\n"


async def test_socket_pairs_work(box: LocalSandbox) -> None:
    code = """
import asyncio, socket, threading
a, b = socket.socketpair()
assert a.send(b"one") == 3 and b.recv(9) == b"one"
assert a.sendmsg([b"two", b"three"]) == 8 and b.recvmsg(20)[0] == b"twothree"
a.sendall(b"x" * 100)
a.shutdown(socket.SHUT_WR)
assert b.recv(200) == b"x" * 100 and b.recv(1) == b""
async def main():
    left, right = socket.socketpair()
    reader, first = await asyncio.open_connection(sock=left)
    second, writer = await asyncio.open_connection(sock=right)
    async def send():
        for _ in range(64):
            writer.writelines([b"y" * 32768, b"y" * 32768])
            await writer.drain()
        writer.write_eof()
    _, data = await asyncio.gather(send(), reader.read())
    print(len(data), await asyncio.to_thread(lambda: "thread"))
    first.close(); writer.close()
asyncio.run(main())
"""
    assert (await box.exec(code)).stdout == f"{1 << 22} thread\n"


PROCESSES = """
import asyncio, concurrent.futures, multiprocessing, os, subprocess
def square(x): return x * x
context = multiprocessing.get_context("fork")
with context.Pool(2) as pool: print(pool.map(square, range(4)))
with concurrent.futures.ProcessPoolExecutor(2, context) as pool: print(list(pool.map(square, range(4))))
left, right = context.Pipe()
process = context.Process(target=lambda: left.send([1, "two"])); process.start(); print(right.recv()); process.join()
print(process.exitcode, subprocess.run(["/bin/cat"], input=b"in", capture_output=True, timeout=5).stdout)
process = subprocess.Popen(["/bin/sh", "-c", "exit 3"]); print(process.wait(5))
async def main():
    process = await asyncio.create_subprocess_exec("/bin/cat", stdin=-1, stdout=-1)
    print(len((await process.communicate(b"z" * 300000))[0]), await process.wait())
asyncio.run(main())
"""


async def test_processes_work() -> None:
    expected = "[0, 1, 4, 9]\n[0, 1, 4, 9]\n[1, 'two']\n0 b'in'\n3\n300000 0\n"
    async with LocalSandbox("py-bare", Limits(wall_s=20, cpu_s=10), tier="ns") as box:
        result = await box.exec(PROCESSES)
        assert result.stdout == expected, result


PIDFD = """
import asyncio, os
try:
    os.close(os.pidfd_open(os.getpid()))
    print("opened")
except OSError as error:
    print(error.errno)
"""


async def test_processes_are_opened_only_where_no_other_run_can_be_seen(box: LocalSandbox) -> None:
    assert (await box.exec(PIDFD)).stdout == ("opened\n" if box.tier == "ns" else "38\n")  # ENOSYS


async def test_what_a_process_descriptor_stands_for_is_not_told(box: LocalSandbox) -> None:
    code = "import fcntl\ntry: fcntl.ioctl(0, 0xC040FF0B, bytes(64))\nexcept OSError as error: print(error.errno)"
    assert (await box.exec(code)).stdout == "1\n"  # EPERM; the device itself would say ENOTTY


@pytest.mark.parametrize("signal", [9, 15])
async def test_a_childs_end_is_no_signal_of_ones_choice(box: LocalSandbox, signal: int) -> None:
    code = f"""
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
number = {{"x86_64": 56}}.get(os.uname().machine, 220)
child = libc.syscall(number, {signal}, 0, 0, 0, 0)
if child == 0: os._exit(0)
time.sleep(0.3)
print(child, ctypes.get_errno())
"""
    assert (await box.exec(code)).stdout == "-1 1\n"


async def test_a_run_cannot_use_up_what_all_pipes_may_hold(box: LocalSandbox) -> None:
    hog = """
import fcntl, os, time
held = [os.pipe() for _ in range(100)]
enlarged = 0
try:
    for _, end in held:
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 1 << 20)
        enlarged += 1
except PermissionError: print(enlarged, flush=True)
time.sleep(1.5)
"""
    neighbour = "import fcntl, os, time\ntime.sleep(0.7)\nprint(fcntl.fcntl(os.pipe()[1], fcntl.F_GETPIPE_SZ))"
    first, second = await asyncio.gather(box.exec(hog), box.exec(neighbour))
    assert (first.stdout, second.stdout) == ("0\n", "65536\n")


CLOCKS = """
import threading, time
print(*(time.clock_gettime(clock) > 0 for clock in (2, 3, -6, -2, time.pthread_getcpuclockid(threading.get_ident()))))
time.clock_getres(-6); time.sleep(0)
for call in (time.clock_gettime, time.clock_getres):
    try: print(call((~{pid} << 3) | 2))
    except OSError as error: print(error.errno)
"""


async def test_nobody_reads_the_clock_of_anothers_processor_time(box: LocalSandbox) -> None:
    """The kernel tells everybody how much every process that they see has computed, to the nanosecond."""
    own = (~os.getpid() << 3) | 2
    assert time.clock_gettime(own) > 0
    pid = 1 if box.tier == "ns" else os.getpid()
    assert (await box.exec(CLOCKS.format(pid=pid))).stdout == "True True True True True\n1\n1\n"


QUEUE = """
import os, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, [40])
for _ in range({count}): os.kill(os.getpid(), 40)
time.sleep({pause})
count = 0
while signal.sigtimedwait([40], 0): count += 1
print(count)
"""


async def test_a_run_cannot_use_up_the_signals_that_may_wait(box: LocalSandbox) -> None:
    """Where the user is the caller's too, the caller could make no timer any more: each needs room for a signal."""
    hog = asyncio.ensure_future(box.exec(QUEUE.format(count=150_000, pause=2)))
    await asyncio.sleep(1)
    timer, libc = ctypes.c_void_p(), ctypes.CDLL(None)
    assert libc.timer_create(1, None, ctypes.byref(timer)) == 0
    libc.timer_delete(timer)
    if box.tier == "ns":  # in `self` all runs together have what one may have
        assert (await box.exec(QUEUE.format(count=100, pause=0))).stdout == "100\n"
    assert 200 < int((await hog).stdout) <= 256


async def test_nobody_waits_for_a_lease(box: LocalSandbox) -> None:
    code = "import fcntl, os\nopen('x', 'w').close()\nfd = os.open('x', os.O_RDONLY)\nfor command in (1024, 1026, 8, 10):\n  try: fcntl.fcntl(fd, command, 0)\n  except OSError as e: print(e.errno)"
    assert (await box.exec(code)).stdout == "1\n" * 4


async def test_locks_and_flags_of_ones_own_files_work(box: LocalSandbox) -> None:
    code = """
import fcntl, mmap, os, sqlite3, tempfile
base = sqlite3.connect("base.db")
base.execute("create table t(x)"); base.execute("insert into t values (1)"); base.commit()
assert sqlite3.connect("base.db").execute("select x from t").fetchall() == [(1,)]
with tempfile.TemporaryFile() as file:
    fcntl.lockf(file, fcntl.LOCK_EX); fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.set_blocking(file.fileno(), False); os.set_inheritable(file.fileno(), True)
    assert fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 100) >= 100
memory = os.memfd_create("m", os.MFD_ALLOW_SEALING)
fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
print(fcntl.fcntl(memory, fcntl.F_GET_SEALS))
"""
    assert (await box.exec(code)).stdout == "4\n"


async def test_files_have_no_extended_attributes(box: LocalSandbox) -> None:
    code = """
import os, shutil
open("a", "w").write("text")
for path in ("a", os.__file__):
    for act in (lambda: os.listxattr(path), lambda: os.getxattr(path, "user.x"), lambda: os.listxattr(path, follow_symlinks=False)):
        try: print(act())
        except OSError as error: print(error.errno, end=" ")
shutil.copyfile("a", "b")
shutil._copyxattr("a", "b")
shutil.COPY("a", "b")
print(open("b").read())
"""
    copy = "copyfile" if box.tier == "self" else "copy2"  # times and modes cannot be set in tier `self`
    assert (await box.exec(code.replace("COPY", copy))).stdout == "95 95 95 95 95 95 text\n"


DEVICES = """
import os
for name in ("null", "zero", "full", "random", "urandom"):
    path = "/dev/" + name
    try: os.utime(path); print("left a mark on", path)
    except OSError: pass
    with open(path, "rb") as file: assert len(file.read(1)) == (name != "null")
with open("/dev/null", "wb") as file: file.write(b"x")
print("done")
"""


async def test_devices_take_no_message_to_a_later_run(box: LocalSandbox) -> None:
    """Whoever may write to a file may set its times to the present."""
    before = _device_times()
    assert (await box.exec(DEVICES)).stdout == "done\n"
    assert before == _device_times()


def _device_times() -> list[int]:
    return [Path(path).stat().st_mtime_ns for path in root.DEVICES]


LEAVE = """
import fcntl, os, struct
fcntl.flock(0, fcntl.LOCK_EX)
fcntl.fcntl(0, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 1000, 7, 0))
fcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)
print("left")
"""
FIND = """
import fcntl, os, struct, time
mine = os.open("/dev/null", os.O_RDWR)
flags = fcntl.fcntl(0, fcntl.F_GETFL) & (os.O_NONBLOCK | os.O_APPEND)
for _ in range(40):  # the anchor of the run before may be about to die
    found = fcntl.fcntl(mine, fcntl.F_OFD_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 1000, 7, 0))
    try:
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kind, _, start, _ = struct.unpack_from("hhqq", found)
        held = kind != fcntl.F_UNLCK and start == 1000  # the host's own programs lock theirs: dockerd, all of it
    except BlockingIOError:
        held = True
    if not held:
        break
    time.sleep(0.05)
print(held, flags)
"""


async def test_standard_input_holds_nothing_of_an_earlier_run(box: LocalSandbox) -> None:
    """An open file that all runs were given would keep locks and flags from one to the next."""
    async with box.session() as session:
        assert (await session.exec(LEAVE)).stdout == "left\n"
    assert (await box.exec(LEAVE)).stdout == "left\n"
    for _ in range(4):  # those that were ready by then as well
        assert (await box.exec(FIND)).stdout == "False 0\n"


THREADS = """
import threading
everybody = threading.Barrier(12)
def work():
    blocks = [bytes(1000) for _ in range(1000)]
    everybody.wait(5)
    done.append(len(blocks))
done = []
threads = [threading.Thread(target=work) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sum(done))
"""


async def test_threads_fit_into_the_memory_of_a_run(box: LocalSandbox) -> None:
    """libc would reserve 64 MiB for each that allocates; a program that is started has the same limit."""
    assert (await box.exec(THREADS)).stdout == "12000\n"
    if box.tier != "self":
        started = f"import subprocess, sys\ndone = subprocess.run([sys.executable, '-c', {THREADS!r}], timeout=15)"
        assert (await box.exec(started)).stdout == "12000\n"
