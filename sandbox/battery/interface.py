"""Attacks on the interface: paths that lead outside, files that are none, sessions that are abandoned or broken."""

# ruff: noqa: E501 (programs)
from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from sandbox.battery.attack import Attack, Control
from sandbox.types import SandboxError, SessionError, Status

if TYPE_CHECKING:
    from sandbox.battery.target import Target
    from sandbox.local import LocalSandbox
    from sandbox.types import Session

_PATHS = (
    "../outside",
    "/etc/passwd",
    "a/../../outside",
    "",
    ".",
    "..",
    "a\0b",
    "/",
    "a//../../../b",
    "x" * 5000,
    "\ud800",
)
_TRAPS = """
import os
outside = {secret!r}
def sparse():
    with open("sparse", "wb") as file:
        file.truncate(1 << 40)
for make in (
    lambda: os.symlink(outside, "link"),
    lambda: os.symlink("/proc/self/environ", "environment"),
    lambda: os.mkfifo("pipe"),
    lambda: os.mkdir("folder"),
    lambda: os.symlink(os.path.dirname(outside), "way"),
    lambda: os.symlink("loop", "loop"),
    sparse,
):
    try:
        make()
    except OSError:
        pass
print("made")
"""
_SWAP = """
import os, threading
open("real", "w").close()
def swap():
    while True:
        for make in (lambda: os.symlink({secret!r}, "new"), lambda: open("new", "w").close()):
            try:
                make()
                os.rename("new", "swapped")
            except OSError:
                pass
threading.Thread(target=swap, daemon=True).start()
print("swapping")
"""


async def _tried(label: str, call: object, secret: str) -> str:
    """`refused` for a typed refusal or an answer without the secret in it."""
    try:
        answer = await call  # type: ignore[misc]
    except SandboxError as error:
        return f"refused {label}: {error.code}"
    return f"{'did' if secret.encode() in _bytes(answer) else 'refused'} {label}: {type(answer).__name__}"


def _bytes(answer: object) -> bytes:
    return answer if isinstance(answer, bytes) else repr(answer).encode()


async def _bad_paths(box: LocalSandbox, target: Target) -> list[str]:
    lines = []
    for path in _PATHS:
        label = f"put a file at {path[:20]!a}".replace(":", "")
        try:
            result = await box.exec("print(1)", files={path: b"breach"})
        except SandboxError as error:
            lines.append(f"refused {label}: {error.code}")
        else:
            lines.append(f"{'refused' if result.status is Status.REJECTED else 'did'} {label}: {result.status.value}")
        lines.append(await _tried(f"fetch {path[:20]!a}".replace(":", ""), _fetch(box, path), target.secret))
    many = {f"f{index}": b"" for index in range(10_000)}
    started = time.monotonic()
    try:
        result = await box.exec("print(1)", files=many)
        lines.append(f"refused 10000 files: {result.status.value} after {time.monotonic() - started:.1f} s")
    except SandboxError as error:
        lines.append(f"{'did' if error.retryable else 'refused'} 10000 files: {error.code}")
    return lines


async def _fetch(box: LocalSandbox, path: str) -> object:
    result = await box.exec("print(1)", fetch=[path])
    return b"".join(result.files.values())


async def _traps(box: LocalSandbox, target: Target) -> list[str]:
    secret = str(target.folder / "secret")
    names = ("link", "environment", "pipe", "folder", "way/secret", "loop", "sparse", "way/../secret")
    code = _TRAPS.format(secret=secret)
    lines = []
    for name in names:
        label = f"fetch {name}"

        async def once(name: str = name) -> bytes:
            result = await box.exec(code, fetch=[name])
            if not result.ok:
                raise SessionError(result.status.value, "bad_path")
            return b"".join(result.files.values())

        lines.append(await _tried(label, once(), target.secret))
    async with box.session() as session:
        await session.exec(code)
        for name in names:
            lines.append(await _tried(f"read {name} of a session", session.read_file(name), target.secret))
            lines.append(await _written(session, name, target))
        lines.append(await _tried("list a session's files", session.list_files(), "secret"))
    return lines


async def _written(session: Session, name: str, target: Target) -> str:
    try:
        await session.write_file(name, b"breach")
    except SandboxError as error:
        return f"refused write to {name} of a session: {error.code}"
    outside = (target.folder / "secret").read_bytes() == b"breach"
    return f"{'did' if outside else 'refused'} write to {name} of a session: replaced inside"


async def _race(box: LocalSandbox, target: Target) -> list[str]:
    lines = []
    async with box.session() as session:
        await session.exec(_SWAP.format(secret=str(target.folder / "secret")))
        seen = set()
        for _ in range(150):
            seen.add((await _tried("read what is swapped", session.read_file("swapped"), target.secret)).split(":")[0])
            seen.add((await _written(session, "swapped", target)).split(":")[0])
        lines += [f"{line}: raced" for line in sorted(seen)]
    return lines


async def _fork_with_threads(box: LocalSandbox, target: Target) -> list[str]:
    async with box.session() as session:
        await session.exec(
            "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
        )
        try:
            branches = await session.fork(1)
        except SessionError as error:
            expected = error.code in ("fork_unsafe", "fork_unsupported")
            return [f"{'refused' if expected else 'did'} fork with a thread: {error.code}"]
        for branch in branches:
            await branch.close()
        return ["did fork with a thread: no error"]


async def _abandon(box: LocalSandbox, target: Target) -> list[str]:
    count = 12
    sessions = [await box.session(ttl_s=1.0) for _ in range(count)]
    for session in sessions:
        await session.exec(
            "import os, time\nif hasattr(os, 'fork'):\n  try:\n    if os.fork() == 0: time.sleep(600)\n  except OSError: pass"
        )
    ended = 0
    for _ in range(6):  # a call renews the lease, so those that are found alive need all of it again
        await asyncio.sleep(2.5)
        for session in list(sessions):
            try:
                await session.exec("1")
            except SessionError as error:
                ended += error.code in ("session_ended", "no_session")
                sessions.remove(session)
        if not sessions:
            break
    return [f"{'refused' if ended == count else 'did'} outlive a lease: {ended} of {count} ended"]


_BREAKERS = {
    "kill itself": "import os; os.abort()",
    "leave": "import os; os._exit(0)",
    "close its descriptors": "import os; os.closerange(0, 4096)",
    "answer in our place": "import os\nfor fd in range(3, 1100):\n  try: os.write(fd, b'\\0\\0\\0\\x02{}' * 50)\n  except OSError: pass",
    "hear what is for us": "import os\nfor fd in range(3, 1100):\n  try:\n    os.set_blocking(fd, False); os.read(fd, 100)\n  except OSError: pass",
    "clear the modules": "import sys; sys.modules.clear()",
    "empty our objects": "import gc\nfor found in gc.get_objects():\n  if type(found) is dict and 'run_source' in found: found.clear()",
    "spin": "while True: pass",
}


async def _break(box: LocalSandbox, target: Target) -> list[str]:
    """Whatever a session does to itself is its own end: the next answer is typed, and other sessions go on."""
    from sandbox.types import Limits

    lines = []
    async with box.session() as witness:
        await witness.exec("x = 1")
        for label, code in _BREAKERS.items():
            session = await box.session()
            try:
                for program in (code, "print(2)"):
                    async with asyncio.timeout(30):
                        await session.exec(program, limits=Limits(wall_s=2, cpu_s=1))
                lines.append(f"refused {label}: typed")
            except SessionError as error:
                lines.append(f"{'refused' if error.code == 'session_ended' else 'did'} {label}: {error.code}")
            except (SandboxError, TimeoutError) as error:
                lines.append(f"did {label}: {type(error).__name__} {error}"[:150])
            finally:
                await session.close()
        alive = await witness.exec("print(x)")
        lines.append(f"{'refused' if alive.stdout == '1' + chr(10) else 'did'} disturb another session: {alive.status}")
    return lines


_LEAVE = """
import fcntl, os, struct
for act in (
    lambda: fcntl.flock(0, fcntl.LOCK_EX),
    lambda: fcntl.fcntl(0, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 1000, 7, 0)),
    lambda: fcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND),
):
    act()
"""
_FIND = """
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


async def _messages(box: LocalSandbox, target: Target) -> list[str]:
    """Locks and flags belong to an open file: one that all runs are given would keep them."""
    async with box.session() as session:
        left = [await session.exec(_LEAVE)]
    left.append(await box.exec(_LEAVE))
    found = [(await box.exec(_FIND)).stdout for _ in range(5)]
    seen = [text for text in found if text != "False 0\n"]
    lines = [f"did fail to leave a message: {result.status}" for result in left if not result.ok]
    return [*lines, f"{'did' if seen else 'refused'} find what an earlier run left at standard input: {seen}"]


_WHY = "there is no interface without the sandbox"
ATTACKS = (
    Attack("paths of files", "#32 #60", act=_bad_paths, control=Control.NONE, why=_WHY),
    Attack("fetch what is no file of its own", "#28", act=_traps, control=Control.NONE, why=_WHY),
    Attack("swap a file while it is fetched", "#30", act=_race, control=Control.NONE, why=_WHY),
    Attack("fork with a thread", "#67", act=_fork_with_threads, control=Control.NONE, why=_WHY),
    Attack("abandoned sessions", "#69", act=_abandon, control=Control.NONE, why=_WHY),
    Attack("messages at standard input", "own", act=_messages, control=Control.NONE, why=_WHY),
    Attack("a session that breaks itself", "#68 own", act=_break, control=Control.NONE, why=_WHY),
)
