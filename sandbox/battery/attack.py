"""What an attack is: a hostile program, the outcomes it may have, and the control that gives the result a meaning.

A program reports each thing it tries on a line of its own: `did LABEL: detail` or `refused LABEL: error`. Confined, a
`did` is a breach (unless the tier is documented not to protect from it: `known`); unconfined, a `refused` means that
the attack proves nothing here. What can be seen from outside (`target.py`) is judged there, not by the program's word.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from sandbox.types import Limits

if TYPE_CHECKING:
    from sandbox.battery.target import Target
    from sandbox.local import LocalSandbox


class Control(StrEnum):
    """What the same program must do unconfined, in a throwaway process with limits, for the attack to count."""

    WORKS = "works"  # says `did` to everything it tries
    OUTLIVES = "outlives"  # is still running when the clock is out
    KILLS = "kills"  # takes down the process that runs it
    LEAVES = "leaves"  # is gone, and something of it still runs
    NONE = "none"  # no control; `why` says why


LIMITS = Limits(wall_s=10, cpu_s=5, memory_mb=256, file_mb=10)
"""What an attack may use unless it says otherwise."""

Act = Callable[["LocalSandbox", "Target"], Awaitable[list[str]]]
"""An attack on the interface rather than from inside; returns the lines that a program would print."""


@dataclass(frozen=True)
class Attack:
    """`origin`: number in the list of attacks that any sandbox must stand (`#15`), or `own`. `expect`: statuses it may
    end with; `tiers`: other statuses in some tier. `known`: labels, by tier, that succeed there and are documented to;
    `grouped`: none does where control groups limit memory. `says`: pattern that standard output must match.
    `neighbour`: a program that runs beside it in another run. `plain`: run `code` as it is, without the helpers of
    `PRELUDE`. `act`: an attack on the interface, in place of `code`."""

    name: str
    origin: str
    code: str = ""
    expect: tuple[str, ...] = ("ok",)
    tiers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    known: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    grouped: bool = False
    says: str = ""
    control: Control = Control.WORKS
    why: str = ""
    limits: Limits = LIMITS
    stdin: str = ""
    neighbour: str = ""
    plain: bool = False
    act: Act | None = None
    theme: str = ""

    def statuses(self, tier: str) -> tuple[str, ...]:
        """The statuses it may end with in `tier`."""
        return tuple(self.tiers.get(tier, self.expect))

    def program(self) -> str:
        """The source that is run; empty when the attack is on the interface."""
        return self.code if self.plain else PRELUDE + self.code


PRELUDE = r"""
import ctypes, errno, fcntl, json, os, resource, signal, socket, stat, struct, subprocess, sys, threading, time
told = json.loads(sys.stdin.readline())
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

def say(verb, label, detail=""):
    os.write(1, f"{verb} {label}: {str(detail)[:80]!a}\n".encode())

def attempt(label, act):
    try:
        value = act()
    except BaseException as error:
        say("refused", label, f"{type(error).__name__} {getattr(error, 'errno', '')}")
    else:
        say("did", label, value)

def checked(result):
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result

def call(name, *args):
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in args]
    return checked(libc.syscall(ctypes.c_long(told["calls"][name]), *wide))

def reach(label, name, *args):
    # Bad arguments on purpose: what matters is whether the kernel looked at them at all.
    if name not in told["calls"]:
        return
    try:
        detail = call(name, *args)
    except OSError as error:
        if error.errno == errno.ENOSYS and told["unconfined"]:
            return say("absent", label, "not in this kernel")
        if error.errno in (errno.EPERM, errno.ENOSYS, errno.EACCES):
            return say("refused", label, error.errno)
        detail = error.errno
    say("did", label, detail)

def fatal(label, act):
    # Killing oneself: unconfined it is tried in a child, so that the control survives to tell.
    if not told["unconfined"]:
        return attempt(label, lambda: (act(), time.sleep(0.05)))
    pid = os.fork()
    if pid == 0:
        act()
        time.sleep(1.5)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    say("did" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9 else "refused", label, status)
"""
"""Helpers of every program that is not `plain`. The first line of standard input tells it what there is to attack."""
