"""Runs one program without confinement in a process that is thrown away: the control of an attack.

`python throwaway.py SECONDS` as a script: reads the program and its input as JSON, runs it with limits in a session of
its own, kills whatever it leaves, and writes what happened as JSON. It stands alone, imports nothing of ours, and is
never given a program that would harm the machine: those have no control (`Attack.why`).
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_MIB = 1 << 20
_LIMITS = (
    (resource.RLIMIT_CPU, 20),
    (resource.RLIMIT_AS, 8192 * _MIB),
    (resource.RLIMIT_NOFILE, 4096),
    (resource.RLIMIT_CORE, 0),
)


@dataclass(frozen=True)
class Unconfined:
    """`ending`: `exit N`, `signal N` or `alive` (still running when the clock was out). `left`: processes it left."""

    ending: str
    stdout: str
    left: int


async def run_unconfined(code: str, stdin: str, seconds: float) -> Unconfined:
    """Run `code` without confinement for at most `seconds`. Raises `OSError` or `ValueError` when that fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-s", "-P", __file__, str(seconds)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    try:
        out, _ = await process.communicate(json.dumps([code, stdin]).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Unconfined(**json.loads(out))


def _children() -> list[int]:
    """Live children of this process; orphans of the program become ours."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rsplit(") ", 1)[1].split()[:2]
            except (OSError, ValueError):
                continue
            if int(parent) == os.getpid() and state != "Z":
                found.append(int(entry.name))
    return found


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0] > 0:
            pass
    except ChildProcessError:
        pass


def _start(code: str, stdin: str, folder: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        os.chdir(folder)
        source = os.memfd_create("input", 0)
        os.write(source, stdin.encode("utf-8", "surrogateescape"))
        os.lseek(source, 0, os.SEEK_SET)
        sink = os.open(folder + ".out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        null = os.open(os.devnull, os.O_WRONLY)
        for number, fd in enumerate((source, sink, null)):
            os.dup2(fd, number)
        os.closerange(3, 256)
        for kind, value in _LIMITS:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        os.execv(sys.executable, [sys.executable, "-s", "-c", code])
    finally:
        os._exit(127)


def _main() -> None:
    code, stdin = json.load(sys.stdin)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    folder = tempfile.mkdtemp(prefix="retool-control-")
    try:
        pid = _start(code, stdin, folder)
        pidfd = os.pidfd_open(pid)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        ending = "alive"
        if poller.poll(1000 * float(sys.argv[1])):
            status = os.waitpid(pid, 0)[1]
            code_ = os.waitstatus_to_exitcode(status)
            ending = f"signal {-code_}" if code_ < 0 else f"exit {code_}"
        _reap()
        left = len(_children())
        while alive := _children():
            for child in alive:
                os.kill(child, signal.SIGKILL)
            _reap()
            select.poll().poll(2)
        with Path(folder + ".out").open("rb") as file:
            said = file.read(65536).decode(errors="replace")
        print(json.dumps({"ending": ending, "stdout": said, "left": left}), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder + ".out").unlink(missing_ok=True)


if __name__ == "__main__":
    _main()
