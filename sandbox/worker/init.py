"""Process 1 of a run's process namespace: reaps orphans, and on command kills everything else in the namespace.

It is ours and never sees user bytes. The namespace is used for one run after another: making and destroying one costs
as much as a whole run. Between two runs it is empty, which is checked here and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from typing import NoReturn

from sandbox.linux import syscalls as sys_

CLEAR = b"C"
"""To the init: kill everything but yourself. Answered with one of the next three."""
EMPTY = b"E"
"""Nothing is left, and the next process will be number 2 again."""
WORN = b"W"
"""Nothing is left, but process numbers could not be set back: use another namespace."""
STUCK = b"S"
"""Something does not die."""
_PATIENCE = 500  # rounds of kill and wait, several seconds in all


def _last_pid() -> int:
    """A descriptor that sets the number of the last process of this namespace; -1 where the kernel refuses."""
    try:
        return os.open("/proc/sys/kernel/ns_last_pid", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def serve(control: socket.socket) -> NoReturn:
    """Until the supervisor closes its end; the kernel then kills whatever is in the namespace."""
    try:
        sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
        sys_.name_process("sandbox-init")
        fd = os.dup2(control.fileno(), 0)
        for number in range(1, signal.NSIG):
            with contextlib.suppress(OSError, ValueError):
                # Ignored SIGCHLD: the kernel reaps for us. The rest: nobody inside may disturb us.
                signal.signal(number, signal.SIG_IGN)
        last_pid = _last_pid()
        if last_pid >= 0:
            os.dup2(last_pid, 1)
        os.closerange(2, 4096)
        while os.read(fd, 1):
            os.write(fd, _clear(1 if last_pid >= 0 else -1))
    finally:
        os._exit(0)


def _clear(last_pid: int) -> bytes:
    for attempt in range(_PATIENCE):
        try:
            os.kill(-1, signal.SIGKILL)  # atomic against fork bombs: a fork under way sees the signal
        except ProcessLookupError:
            break
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)  # children that die are reaped by the kernel; this returns when none is left
        time.sleep(min(attempt, 10) / 1000)
    else:
        return STUCK
    try:
        os.pwrite(last_pid, b"1", 0)
    except OSError:
        return WORN
    return EMPTY
