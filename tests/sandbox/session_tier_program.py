"""Run on another kind of host by `test_sessions_tiers.py`: uses sessions as their users do and prints what happened."""

# ruff: noqa: ASYNC240 (a script that looks at folders)
from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from sandbox import Limits, LocalSandbox, Session, SessionError

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
attack('term', lambda: os.kill(pid, 15))
attack('kill', lambda: os.kill(pid, 9))
attack('limit', lambda: resource.prlimit(pid, resource.RLIMIT_AS, (1, 1)))
attack('memory', lambda: open(f'/proc/{pid}/mem', 'rb'))
attack('all', lambda: os.kill(-1, 9))
"""
STRANGERS = """
import ctypes, os, time
libc = ctypes.CDLL(None)
number = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]
for _ in range(5):  # children of our parent, which does not know them
    if libc.syscall(number, 0x8000 | 17, 0, 0, 0, 0) == 0: os._exit(0)
print('made')
"""


async def attempt(call: Any) -> str:
    """The code of a `SessionError`, or the result as text."""
    try:
        return str(await call)
    except SessionError as error:
        return error.code


async def close_all(sessions: list[Session]) -> None:
    """End them."""
    await asyncio.gather(*(session.close() for session in sessions))


LOOK = """
for attack in (lambda: open(folder + '/mine').read(), lambda: open(folder + '/mine', 'r+').write('x')):
    try: attack(); print('WORKED')
    except OSError as error: print(type(error).__name__)
"""


async def look_back(box: LocalSandbox) -> str:
    """What runs that began later see of a live session's work folder."""
    session = await box.session()
    made = await session.exec("import os; open('mine', 'w').write('secret'); print(os.getcwd())")
    told = [await box.exec(f"folder = {made.stdout.strip()!r}\n{LOOK}") for _ in range(6)]
    kept = await session.exec("print(open('mine').read())")
    await session.close()
    return " ".join(sorted({word for result in told for word in result.stdout.split()})) + " " + kept.stdout.strip()


async def explore() -> dict[str, Any]:
    """What the tests look at."""
    seen: dict[str, Any] = {}
    async with LocalSandbox("py-bare", Limits(wall_s=20, cpu_s=10, processes=12), workers=2) as box:
        seen["tier"], seen["capabilities"] = box.tier, (await box.capabilities())["fork"]
        session = await box.session()
        await session.exec("x = 1\nimport random")
        seen["later"] = await look_back(box)
        for name, code, limits in (
            ("state", "print(x)", None),
            ("timeout", "while True: pass", Limits(wall_s=0.3)),
            ("cpu", "while True: pass", Limits(wall_s=20, cpu_s=0.3)),
            ("memory", "bytearray(1 << 40)", None),
            ("output", "while True: print('x' * 1000)", None),
            ("after", "print(x)", None),
        ):
            result = await session.exec(code, limits=limits)
            seen[name] = [result.status.value, result.stdout[:9], result.alive, result.isolation]
        await session.write_file("d/f", b"data")
        seen["files"] = [(await session.read_file("d/f")).decode(), len(await session.list_files())]
        if seen["capabilities"]:
            await close_all(await session.fork(3))
        else:
            seen["fork"] = await attempt(session.fork(1))
            seen["snapshot"] = await attempt(session.snapshot())
        if seen["capabilities"]:
            await trees(box, session, seen)
        await session.close()
        died = await box.session()
        seen["died"] = (await died.exec("import os; os._exit(3)")).exit_code
        many = [await box.session() for _ in range(30)]
        results = await asyncio.gather(*(one.exec(f"print({number})") for number, one in enumerate(many)))
        seen["many"] = [result.stdout for result in results] == [f"{number}\n" for number in range(30)]
        await close_all(many)
        stats = await box.stats()
        seen["leaked"], seen["restarts"], seen["open"] = stats["leaked"], stats["restarts"], stats["sessions"]
        assert box._link is not None
        folder = Path(box._link.folder)
        for _ in range(500):
            if sum(entry.name.isdigit() for entry in folder.iterdir()) <= stats["workers"]:
                break
            await asyncio.sleep(0.02)
        seen["folders"] = sum(entry.name.isdigit() for entry in folder.iterdir()) <= stats["workers"]
    return seen


async def trees(box: LocalSandbox, session: Any, seen: dict[str, Any]) -> None:
    """Copies, snapshots and what siblings can do."""
    first, second = await session.fork(2)
    told = (
        await first.exec("import os\nopen('mine', 'w').write('secret')\nprint(os.getpid(), os.getcwd())")
    ).stdout.split()
    seen["attacks"] = (await second.exec(f"pid, folder = {told[0]}, {told[1]!r}\n" + ATTACKS)).stdout
    seen["unharmed"] = (await first.exec("print(x, open('mine').read(), open('d/f').read())")).stdout
    seen["draws"] = [(await one.exec("print(random.random())")).stdout for one in (first, second)]
    aborted = await second.exec("import os; os.abort()")
    seen["aborted"] = [aborted.status.value, aborted.signal, aborted.attested, aborted.alive]
    snapshot = await first.snapshot()
    await first.exec("x = 5")
    await first.restore(snapshot)
    seen["restored"] = (await first.exec("print(x)")).stdout
    (other,) = await box.restore(snapshot)
    seen["new"] = (await other.exec("print(x)")).stdout
    await session.close()
    await box.drop_snapshot(snapshot)
    seen["orphan"] = (await first.exec("print(x)")).stdout
    await first.close()
    seen["strangers"] = (await other.exec(STRANGERS)).stdout
    await other.exec("import os\nif not os.fork():\n  os.setsid()\n  import time; time.sleep(99)")
    await other.close()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(explore())))
    sys.stdout.flush()
