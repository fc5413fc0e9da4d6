"""One processor for a run of many threads.

Threads of one interpreter run one at a time, yet each that waits wakes every 5 ms on whatever processor is free. Linux
6.18 then let two such runs keep both processors of a machine for up to 80 ms, whoever else waited. On one processor
they disturb nobody. What they lose is the gain of code that lets go of the interpreter, as some of zlib and numpy does.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

LOOK_S = 0.02
"""So long a run has lasted when it is looked at for the first time: most have ended."""
NEXT_LOOK_S = 0.1

_ALL = os.sched_getaffinity(0)
_TURNS = itertools.cycle(sorted(_ALL))


def pid_of(pidfd: int) -> int:
    """The process id behind a pidfd, as we see it. Raises `ProcessLookupError` when it is gone."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            pid = int(line.split()[1])
            if pid > 0:
                return pid
    raise ProcessLookupError(f"nothing behind pidfd {pidfd}")


def settle(pidfd: int, bound: bool) -> bool:
    """Bind a process of several threads to one processor, and release one that has become single again.

    Returns whether it is bound now. What it starts later is bound with it; its other processes are left alone.
    """
    try:
        threads = os.listdir(f"/proc/{pid_of(pidfd)}/task")  # noqa: PTH208 (names are enough)
    except OSError:
        return bound
    several = len(threads) > 1
    if several != bound:
        where = {next(_TURNS)} if several else _ALL
        for thread in threads:
            with contextlib.suppress(OSError):  # ended meanwhile, or the machine does not allow it
                os.sched_setaffinity(int(thread), where)
    return several
