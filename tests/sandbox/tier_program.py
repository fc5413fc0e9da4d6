"""Run on another kind of host by `test_sandbox_tiers.py`: uses the sandbox as its users do and prints what happened."""

# ruff: noqa: ASYNC110, ASYNC240 (a script that waits for processes)
from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

from sandbox import Limits, LocalSandbox, SandboxUnavailable

DAEMON = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 64)
        os.execv('/bin/sleep', ['/bin/sleep', '81001.1'])
    os._exit(0)
os.wait()
import time; time.sleep(0.2)
"""
FORK_STORM = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
FORK_COUNT = """
import os, time
n = 0
try:
    while os.fork(): n += 1
    time.sleep(99)
except OSError as error: print(n, error.errno)
"""
DEEP = "import os\nfor _ in range(1500): os.mkdir('d'); os.chdir('d')"
LOCKED = """
import os
path = 'a/b/c/d/e/f'
os.makedirs(path)
open(path + '/file', 'w').close()
while path:
    os.chmod(path, 0)
    path = os.path.dirname(path)
"""
THREADS = """
import threading, time
threads = [threading.Thread(target=time.sleep, args=(0.5,)) for _ in range(11)]
for thread in threads: thread.start()
"""
SPY = "import os; print([name for name in os.listdir('..')])"
OTHERS_FILES = "import os, time\nopen('mine', 'w').write('x'); print(os.getcwd(), flush=True); time.sleep(1)"


def sleepers() -> int:
    """Live processes that the daemon attack left."""
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line, state = (entry / "cmdline").read_bytes(), (entry / "stat").read_text().rsplit(") ", 1)[1][0]
            except OSError:
                continue
            count += b"81001.1" in line and state != "Z"
    return count


async def explore(tier: str) -> dict[str, object]:
    """What the tests look at."""
    seen: dict[str, object] = {}
    async with LocalSandbox("py-bare", Limits(wall_s=20, cpu_s=10, processes=12), workers=2) as box:
        seen["tier"] = box.tier
        assert box._link is not None
        folder = Path(box._link.folder)
        for name, code, limits in (
            ("ok", "import csv, wave; print(6 * 7)", None),
            ("error", "1/0", None),
            ("abort", "import os; os.abort()", None),
            ("cpu", "while True: pass", Limits(wall_s=30, cpu_s=1)),
            ("timeout", "import time; time.sleep(99)", Limits(wall_s=0.5)),
            ("memory", "bytearray(1 << 40)", None),
            ("output", "while True: print('x' * 10000)", None),
            ("storm", FORK_STORM, Limits(wall_s=1, processes=8)),
            ("forks", FORK_COUNT, None),
            ("forks again", FORK_COUNT, None),
            ("daemon", DAEMON, None),
            ("deep", DEEP, None),
            ("locked", LOCKED, None),
            ("self kill", "import os; os.kill(os.getpid(), 9)", None),
            ("kill client", f"import os; os.kill({os.getpid()}, 15)", None),
            ("kill all", "import os, signal; signal.signal(15, signal.SIG_IGN); os.kill(-1, 15)", None),
            ("others", SPY, None),
            ("shm", "open('/dev/shm/x', 'w')", None),
            ("proc", "open('/proc/1/environ').read()", None),
            ("chmod", f"import os; os.chmod({str(Path(__file__))!r}, 0)", None),
            ("sub", "import subprocess; print(subprocess.run(['/bin/echo', 'hi'], capture_output=True).stdout)", None),
        ):
            result = await box.exec(code, limits=limits)
            error = result.exception.type if result.exception else ""
            seen[name] = [result.status.value, error, result.stdout[:200], result.isolation]
        seen["sleepers"] = sleepers()
        roomy = Limits(wall_s=20, memory_mb=4000, processes=12)
        both = await asyncio.gather(*(box.exec(THREADS, limits=roomy) for _ in range(2)))
        seen["threads"] = [result.status.value for result in both]
        other = asyncio.create_task(box.exec(OTHERS_FILES))
        await asyncio.sleep(0.5)
        peek = (
            "import glob, os; print([p for f in glob.glob(os.getcwd() + '/../*') for p in (f, *glob.glob(f + '/*'))])"
        )
        seen["peek"] = (await box.exec(peek)).stdout
        await other
        stats = await box.stats()
        deadline = time.monotonic() + 10
        while (
            sum(entry.name.isdigit() for entry in folder.iterdir()) > stats["workers"] and time.monotonic() < deadline
        ):
            await asyncio.sleep(0.1)
        seen["folders"] = sum(entry.name.isdigit() for entry in folder.iterdir()) <= stats["workers"]
        stats = await box.stats()
        seen["leaked"], seen["restarts"] = stats["leaked"], stats["restarts"]
        if tier != "self":
            run = asyncio.create_task(box.exec(DAEMON + "time.sleep(99)", limits=Limits(wall_s=90)))
            while not sleepers():
                await asyncio.sleep(0.02)
            os.kill(stats["supervisor_pid"], signal.SIGKILL)
            try:
                await run
            except SandboxUnavailable:
                seen["supervisor killed"] = "unavailable"
            deadline = time.monotonic() + 20
            while sleepers() and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
            seen["survivors"] = sleepers()
        seen["after"] = (await box.exec("print(1)")).stdout
    seen["removed"] = not folder.exists()
    return seen


if __name__ == "__main__":
    print(json.dumps(asyncio.run(explore(os.environ["RETOOL_TEST_TIER"]))))
    sys.stdout.flush()
