"""The attack battery. Each attack either has a control that works without confinement, or asks the kernel for something
only confinement forbids. Nothing here may hang, leak, become our own failure, or disturb the next run."""

# ruff: noqa: E501, ASYNC240, PTH120 (attack programs on one line; tests may block)
from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from sandbox import Limits, LocalSandbox, Status
from tests.sandbox.conftest import processes

pytestmark = pytest.mark.asyncio(loop_scope="module")

TRY = """
def attempt(act):
    try:
        print("did", act())
    except BaseException as error:
        print("refused", type(error).__name__, getattr(error, "errno", ""))
"""


async def both(box: LocalSandbox, bare: LocalSandbox, code: str) -> tuple[str, str]:
    """Output of the same code confined and unconfined."""
    confined, control = await asyncio.gather(box.exec(TRY + code), bare.exec(TRY + code))
    assert confined.status is Status.OK and control.status is Status.OK, (confined, control)
    return confined.stdout, control.stdout


async def test_reads_nothing_outside(box: LocalSandbox, bare: LocalSandbox, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    secret = tmp_path / "secret"
    secret.write_text("the answer")
    secret.chmod(0o644)
    for path in (secret, Path(__file__)):
        confined, control = await both(box, bare, f"attempt(lambda: len(open({str(path)!r}).read()))")
        assert control.startswith("did") and confined.startswith("refused")
    link = f"import os\nos.symlink({str(secret)!r}, 'link')\nattempt(lambda: open('link').read())"
    confined, control = await both(box, bare, link)
    assert "the answer" in control and confined.startswith("refused")
    for path in ("/etc/shadow", "/root/.ssh", "/proc/1/environ", "/proc/1/mem", "/sys/kernel", "/var/run"):
        result = await box.exec(
            TRY + f"attempt(lambda: (__import__('os').listdir if {path!r}[-1] in 'lhn' else open)({path!r}))"
        )
        assert result.stdout.startswith("refused"), path


async def test_writes_nothing_outside(box: LocalSandbox, bare: LocalSandbox, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    code = f"attempt(lambda: open({str(tmp_path)!r} + '/mark', 'w').write('x'))"
    confined, control = await both(box, bare, code)
    assert control.startswith("did") and confined.startswith("refused")
    for path in (
        "/usr/mark",
        "/lib/mark",
        "/etc/passwd",
        os.path.dirname(os.__file__) + "/mark.py",
        "/proc/sys/kernel/core_pattern",
    ):
        result = await box.exec(TRY + f"attempt(lambda: open({path!r}, 'w'))")
        assert result.stdout.startswith("refused"), path
    for path in ("/usr/mark", os.path.dirname(os.__file__) + "/mark.py"):
        assert not Path(path).exists()


async def test_reaches_no_listener(box: LocalSandbox, bare: LocalSandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket\nattempt(lambda: socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5))"
        confined, control = await both(box, bare, code)
        assert control.startswith("did") and confined.startswith("refused")
    name = f"\0retool-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        code = f"import socket\ns = socket.socket\nattempt(lambda: s(socket.AF_UNIX).connect({name!r}))"
        confined, control = await both(box, bare, code)
        assert control.startswith("did") and confined.startswith("refused")


@pytest.mark.parametrize(
    "family",
    ["socket.AF_INET", "socket.AF_INET6", "socket.AF_UNIX", "socket.AF_NETLINK", "socket.AF_PACKET", "38", "40"],
)
@pytest.mark.parametrize("kind", ["socket.SOCK_STREAM", "socket.SOCK_DGRAM", "socket.SOCK_RAW"])
async def test_no_socket_of_any_family(box: LocalSandbox, family: str, kind: str) -> None:
    result = await box.exec(TRY + f"import socket\nattempt(lambda: socket.socket({family}, {kind}))")
    assert result.stdout == "refused PermissionError 1\n"


async def test_name_lookup_fails_and_stream_pairs_work(box: LocalSandbox) -> None:
    code = """
import asyncio, socket
attempt(lambda: socket.getaddrinfo("example.com", 80))
attempt(lambda: asyncio.run(asyncio.sleep(0.01, "asyncio")))
attempt(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
"""
    lines = (await box.exec(TRY + code)).stdout.splitlines()
    assert lines[0].startswith("refused gaierror") and lines[1:] == [
        "did asyncio",
        "refused PermissionError 1",
    ]


async def test_signals_nobody(box: LocalSandbox, bare: LocalSandbox) -> None:
    code = f"import os\nattempt(lambda: os.kill({os.getpid()}, 0))"
    confined, control = await both(box, bare, code)
    assert control.startswith("did") and confined.startswith("refused")
    result = await box.exec(
        "import os, signal\nsignal.signal(15, signal.SIG_IGN)\nfor p in (os.getppid(), 1, -1):\n  try: os.kill(p, 15)\n  except OSError: pass\nprint('still here')"
    )
    assert result.stdout == "still here\n"
    assert (await box.stats())["restarts"] == 0


SELF_KILLS = {
    "kill": "os.kill(os.getpid(), 9)",
    "group": "os.kill(0, 9)",
    "negative": "os.kill(-os.getpgrp(), 9)",
    "everybody": "os.kill(-1, 9)",
    "raise": "signal.raise_signal(9)",
    "thread": "signal.pthread_kill(threading.get_ident(), 9)",
    "pidfd": "signal.pidfd_send_signal(os.pidfd_open(os.getpid()), 9)",
    "child": "subprocess.run(['/bin/sh', '-c', 'kill -9 $PPID'], check=True)",
    "timer": "libc.timer_create(0, (ctypes.c_int * 16)(0, 0, 9, 0), (ctypes.c_int * 4)()) and 1/0",
    "own": "fcntl.fcntl(0, 10, 9)",
    "parent death": "libc.prctl(1, 9) and 1/0",
    "cpu limit": "resource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
    "cpu prlimit": "resource.prlimit(0, resource.RLIMIT_CPU, (1, 1))",
}


@pytest.mark.parametrize("how", SELF_KILLS)
async def test_no_sigkill_of_ones_own_making(box: LocalSandbox, how: str) -> None:
    """Otherwise a program could make its own end look like our failure, and be dropped instead of scored."""
    code = f"import ctypes, fcntl, os, resource, signal, subprocess, threading\nlibc = ctypes.CDLL(None)\nattempt(lambda: {SELF_KILLS[how]})"
    result = await box.exec(TRY + code)
    assert result.status is Status.OK and result.stdout.startswith("refused"), result


async def test_killing_ones_own_child_is_allowed(box: LocalSandbox) -> None:
    code = "import subprocess\np = subprocess.Popen(['/bin/sleep', '100'])\np.kill()\nprint(p.wait())"
    assert (await box.exec(code)).stdout == "-9\n"


SURFACE = {
    "unshare user": "libc.unshare(0x10000000)",
    "unshare net": "libc.unshare(0x40000000)",
    "setns": "libc.setns(0, 0)",
    "mount": "libc.mount(b'none', b'/run', b'tmpfs', 0, None)",
    "umount": "libc.umount2(b'/proc', 2)",
    "chroot": "libc.chroot(b'/')",
    "ptrace": "libc.ptrace(16, os.getppid() or 1, 0, 0)",
    "read memory": "libc.syscall(310, os.getppid() or 1, 0, 0, 0, 0, 0)",
    "pidfd_getfd": "libc.syscall(438, os.pidfd_open(os.getpid()), 0, 0)",
    "bpf": "libc.syscall(321, 0, 0, 0)",
    "perf": "libc.syscall(298, 0, 0, 0, 0, 0)",
    "userfaultfd": "libc.syscall(323, 0)",
    "keyctl": "libc.syscall(250, 0, 0, 0)",
    "modules": "libc.syscall(175, 0, 0, 0)",
    "mknod": "libc.mknod(b'disk', 0o60660, 0x800)",
    "shared memory": "libc.shmget(1, 4096, 0o1600)",
    "message queue": "libc.msgget(1, 0o1600)",
    "setuid 0": "libc.setuid(0)",
    "clock": "libc.settimeofday((ctypes.c_long * 2)(1, 1), None)",
    "personality": "libc.personality(0x40000)",
    "handle": "libc.syscall(304, 0, 0, 0)",
    "splice": "libc.splice(0, 0, 1, 0, 1, 0)",
    "nice": "libc.nice(-5)",
    "mlock": "libc.mlock(ctypes.create_string_buffer(1 << 20), 1 << 20)",
    "raise limits": "libc.setrlimit(7, (ctypes.c_ulong * 2)(100000, 100000))",
    "other's limits": "libc.syscall(302, 1, 7, 0, 0)",
}


@pytest.mark.parametrize("name", SURFACE)
async def test_kernel_surface(box: LocalSandbox, name: str) -> None:
    if os.uname().machine != "x86_64" and "syscall(" in SURFACE[name]:
        pytest.skip("raw system call numbers of this test are x86_64's")
    code = f"import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nr = {SURFACE[name]}\nprint(r, ctypes.get_errno())"
    result = await box.exec(code)
    returned, number = result.stdout.split()
    assert returned == "-1" and int(number) in (1, 12, 22), result.stdout  # EPERM; ENOMEM: mlock; EINVAL: unmapped id


@pytest.mark.parametrize("number", [425, 426, 427, 435, 999])
async def test_new_calls_do_not_exist(box: LocalSandbox, number: int) -> None:
    result = await box.exec(
        f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.syscall({number}, 0, 0, 0), ctypes.get_errno())"
    )
    assert result.stdout == "-1 38\n"


async def test_environment_and_descriptors_are_clean(box: LocalSandbox) -> None:
    os.environ["RETOOL_TEST_TOKEN"] = "secret"
    code = "import os, fcntl\nprint(sorted(os.environ))\nfds = []\nfor fd in range(1024):\n  try: fcntl.fcntl(fd, 1); fds.append(fd)\n  except OSError: pass\nprint(len([fd for fd in fds if fd > 2]))"
    names, extra = (await box.exec(code)).stdout.strip().split("\n")
    assert "TOKEN" not in names and "CANARY" not in names
    assert int(extra) <= 1  # the report, whose words are never trusted
    del os.environ["RETOOL_TEST_TOKEN"]


async def test_fork_bomb_is_capped_and_gone(box: LocalSandbox) -> None:
    code = "import os, time\nn = 0\nwhile True:\n  try:\n    if os.fork() == 0: time.sleep(654)\n    n += 1\n  except OSError as e:\n    print(n, type(e).__name__, flush=True); break\n"
    for _ in range(3):  # an id or namespace that was not emptied would make the second run fail
        result = await box.exec(code, limits=Limits(processes=12, wall_s=20))
        assert result.stdout in ("11 BlockingIOError\n",), result
    storm = await box.exec(
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", limits=Limits(processes=8, wall_s=1)
    )
    assert storm.status in (Status.TIMEOUT, Status.CPU_LIMIT)
    assert (await box.exec("print(1)")).ok


async def test_thread_bomb(box: LocalSandbox) -> None:
    code = "import threading, time\nfor n in range(1000):\n  try: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n  except RuntimeError: break\nprint(n)"
    result = await box.exec(code, limits=Limits(processes=10))
    assert int(result.stdout) <= 10, result


async def test_daemon_dies_with_its_run(box: LocalSandbox) -> None:
    code = "import os, subprocess\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    os.closerange(0, 64)\n    os.execv('/bin/sleep', ['/bin/sleep', '98765.4'])\n  os._exit(0)\nos.wait()\nimport time; time.sleep(0.2); print('left')"
    run = asyncio.create_task(box.exec(code))
    while not processes("sleep 98765.4"):  # the control: it does start
        assert not run.done(), await run
        await asyncio.sleep(0.01)
    assert (await run).stdout == "left\n"
    for _ in range(500):  # an answer does not wait until all that is left of its run is dead
        if not processes("sleep 98765.4"):
            break
        await asyncio.sleep(0.01)
    assert processes("sleep 98765.4") == []


async def test_background_children_die_with_a_timeout(box: LocalSandbox) -> None:
    code = (
        "import subprocess, time\nsubprocess.Popen(['/bin/sh', '-c', 'sleep 98766.5 & sleep 98766.5'])\ntime.sleep(1e6)"
    )
    assert (await box.exec(code, limits=Limits(wall_s=1))).status is Status.TIMEOUT
    assert processes("sleep 98766.5") == []


async def test_disk(box: LocalSandbox) -> None:
    code = """
import os
def big():
    with open("big", "wb") as f:
        while True: f.write(b"x" * 1_000_000)
def sparse():
    with open("sparse", "wb") as f: f.truncate(1 << 40)
def many():
    for i in range(100): open(f"f{i}", "wb").write(b"x" * 8_000_000)
def inodes():
    for i in range(100_000): open(f"i{i}", "w").close()
for act in (big, sparse, many, inodes): attempt(act)
"""
    result = await box.exec(TRY + code, limits=Limits(file_mb=10, wall_s=30))
    lines = result.stdout.splitlines()
    assert lines[0] == lines[1] == "refused OSError 27", result  # EFBIG
    if box.tier == "ns":
        assert lines[2] == lines[3] == "refused OSError 28", result  # ENOSPC
    assert (await box.exec("open('x', 'w').write('x')")).ok


async def test_descriptor_bomb(box: LocalSandbox) -> None:
    result = await box.exec(TRY + "def act():\n  fs = []\n  while True: fs.append(open('/dev/null'))\nattempt(act)")
    assert result.stdout == "refused OSError 24\n"


async def test_sees_only_its_own_processes(box: LocalSandbox, bare: LocalSandbox) -> None:
    confined, control = await both(box, bare, "import os\nprint(sum(name.isdigit() for name in os.listdir('/proc')))")
    assert int(control) > 3 and int(confined) == 3  # init, itself, its anchor


async def test_runs_are_invisible_to_each_other(box: LocalSandbox) -> None:
    write = "open('/tmp/shared', 'w').write('x')\nimport time; time.sleep(1)"
    read = "import os, time; time.sleep(0.3); print(os.path.exists('/tmp/shared'), os.listdir('/dev/shm'))"
    _, seen = await asyncio.gather(box.exec(write), box.exec(read))
    assert seen.stdout == "False []\n"


async def test_no_core_file_and_no_new_privileges(box: LocalSandbox) -> None:
    code = "import resource\nprint(resource.getrlimit(resource.RLIMIT_CORE))\nprint([l.split()[1] for l in open('/proc/self/status') if l.startswith(('CapEff', 'CapPrm', 'CapBnd', 'NoNewPrivs', 'Seccomp:'))])"
    core, status = (await box.exec(code)).stdout.strip().split("\n")
    assert core == "(0, 0)"
    assert status == str(["0" * 16, "0" * 16, "0" * 16, "1", "2"])


async def test_interpreter_can_be_broken_from_inside_without_harm(box: LocalSandbox) -> None:
    """Damage to the interpreter's own state is the program's failure, or none; never ours."""
    for code in (
        "import sys; sys.stdout = None",
        "import sys; sys.stdout.close()",
        "import os; os.close(1); os.close(2)",
        "import os; os.closerange(0, 1024); print('x')",
        "import builtins; del builtins.print, builtins.repr; 5",
        "import sys; sys.modules.clear()",
        "import gc\nfor o in gc.get_objects():\n  if type(o) is dict and '_finish' in o: o.clear()",
        "import threading; threading._shutdown = None; import atexit; atexit.register(lambda: 1/0)",
        "import json, os; json.dumps = os._exit = None; raise ValueError",
        "import signal, os; signal.raise_signal(19)",
    ):
        result = await box.exec(code, limits=Limits(wall_s=2))
        assert result.status in (Status.OK, Status.ERROR, Status.EXIT, Status.TIMEOUT, Status.SIGNAL), (code, result)
    assert (await box.exec("print(1)")).stdout == "1\n"
    assert (await box.stats())["restarts"] == 0


async def test_neighbours_do_not_notice(box: LocalSandbox) -> None:
    hostile = [
        "while True: pass",
        "x = bytearray(1 << 40)",
        "while True: print('z' * 100_000)",
        "import os; os._exit(9)",
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    ]
    good = [box.exec(f"print({n} ** 2)", limits=Limits(wall_s=60)) for n in range(15)]
    bad = [box.exec(code, limits=Limits(wall_s=1, cpu_s=1)) for code in hostile]
    results = await asyncio.gather(*good, *bad)
    assert [r.stdout for r in results[:15]] == [f"{n**2}\n" for n in range(15)]
    assert not any(r.ok for r in results[15:])
