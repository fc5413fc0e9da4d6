"""A verifier process: `python -m retool.rewards.worker`. JSON lines in, JSON lines out.

    {"id": 7, "gold": "1/2", "answer": "0.5"}   ->   {"id": 7, "verdict": true}

It is two processes: a guard that only waits, and the grader, which may be stuck in one endless C call and then notices
nothing. The guard kills the grader when the trainer goes away (its end of stdin closes), and the kernel kills the
grader when the guard dies. The grader's memory is limited, it may write no file, and it never sees the trainer's
environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys

MEMORY_BYTES = 4 << 30
_PR_SET_PDEATHSIG = 1


def main() -> None:
    guard = os.getpid()
    child = os.fork()
    if child:
        sys.exit(_guard(child))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != guard:  # it died in between
        os._exit(1)
    serve()


def _guard(child: int) -> int:
    """Waits for the child's end or the trainer's; returns the exit code."""
    exited = os.pidfd_open(child)
    poll = select.poll()
    poll.register(exited, select.POLLIN)
    poll.register(sys.stdin.fileno(), 0)  # hang-up only; the lines are the grader's
    os.close(sys.stdout.fileno())  # so that the trainer sees the end of the grader's output
    events = poll.poll()
    if not any(fd == exited for fd, _ in events):
        # The trainer is gone or has closed our input. Nobody waits for an answer any more.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) & 0xFF


def serve() -> None:
    """Answer until stdin ends. Nothing a library prints can reach the channel: stdout is moved away first."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from retool.rewards.mathematics import grade

    grade("\\frac{1}{2}", "x")  # the first parse builds tables
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _say(channel, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        _say(channel, {"id": request["id"], "verdict": grade(request["gold"], request["answer"])})


def _say(channel: object, message: dict[str, object]) -> None:
    channel.write(json.dumps(message) + "\n")  # type: ignore[attr-defined]
    channel.flush()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
