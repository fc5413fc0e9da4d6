"""A seccomp filter for CPython with numpy: an allowlist of system calls, in raw BPF (Linux `seccomp(2)`).

Whatever is not listed fails with EPERM (ENOSYS for calls newer than the list, so that libc falls back politely). Some
calls are judged by their arguments: no new namespaces, no sockets but stream pairs, no SIGKILL to oneself. The last is
about blame: a SIGKILL nobody here sent must mean that the machine, not the program, ended the run. Runs that share a
kernel user share its quotas: nothing is passed on in a message, no pipe is made larger, no file is leased.
"""

from __future__ import annotations

import errno
import functools
import struct
from collections.abc import Iterable

from sandbox.linux.numbers import ALLOWED, SPECIAL
from sandbox.linux.syscalls import MACHINE, SeccompProgram

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LD, _JA, _JEQ, _JGE, _JSET, _AND, _RET = 0x20, 0x05, 0x15, 0x35, 0x45, 0x54, 0x06
_JUMP_MAX = 255  # instructions that a comparison can skip
_DENY = _ERRNO | errno.EPERM
_MISSING = _ERRNO | errno.ENOSYS
_UNSUPPORTED = _ERRNO | errno.EOPNOTSUPP
_NEWEST_KNOWN = 450  # calls above this number are answered "no such call"
_NEW_NAMESPACES = 0x7E020080
_CLONE_THREAD = 0x00010000
_SIGKILL, _SIGCHLD = 9, 17
_PRCTL_ALLOWED = (
    *(3, 4),  # PR_GET_DUMPABLE, PR_SET_DUMPABLE: a process that is not dumpable is only safer
    *(15, 16),  # PR_SET_NAME, PR_GET_NAME: threads are named
    *(21, 22),  # PR_GET_SECCOMP, PR_SET_SECCOMP: further filters can only narrow
    *(23,),  # PR_CAPBSET_READ
    *(38, 39),  # PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS
    *(41, 42),  # PR_SET_THP_DISABLE, PR_GET_THP_DISABLE: huge pages, for allocators
    0x53564D41,  # PR_SET_VMA: names of anonymous mappings, which libc's allocator sets
)
_FCNTL_ALLOWED = (
    *(0, 1030),  # F_DUPFD, F_DUPFD_CLOEXEC
    *(1, 2),  # F_GETFD, F_SETFD: whether executed programs get it
    *(3, 4),  # F_GETFL, F_SETFL: blocking, appending. Each run has opened what it has
    *(5, 6, 7),  # F_GETLK, F_SETLK, F_SETLKW: sqlite locks its files
    *(36, 37, 38),  # F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW: the same for one open file
    1032,  # F_GETPIPE_SZ: to read only
    *(1033, 1034),  # F_ADD_SEALS, F_GET_SEALS: of memory files, which are one's own
)
"""Not: F_SETOWN, F_SETSIG and F_SETOWN_EX (any signal, SIGKILL too, to any process when a descriptor becomes ready),
F_SETLEASE (the host's own opening of the file would wait), F_NOTIFY (signals that tell what happens in a folder of
others), F_SETPIPE_SZ (takes from what all pipes of the kernel user may hold together), hints that stay with a file."""

# In the tier without a user of its own, the files and processes of that user are the caller's too.
_FORK_CALLS = ("fork", "vfork")
_CHANGE_CALLS = (
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat"),
    *("utime", "utimes", "futimesat", "utimensat"),
)
_CLOCK_CALLS = ("clock_gettime", "clock_getres", "clock_nanosleep")
_OF_A_THREAD, _OWN_CLOCKS = 4, -8 & 0xFFFFFFFF  # a bit of negative clock numbers; process 0's, which is oneself
_ATTRIBUTE_CALLS = ("getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr", "flistxattr")

Rule = list[tuple[int, int, int, int]]


def _instruction(code: int, jt: int, jf: int, k: int) -> bytes:
    return struct.pack("=HBBI", code, jt, jf, k & 0xFFFFFFFF)


def _arg(index: int) -> tuple[int, int, int, int]:
    """Load the low half of an argument."""
    return (_LD, 0, 0, 16 + 8 * index)


def _returns_if_equal(values: Iterable[int], result: int) -> Rule:
    return [step for value in values for step in ((_JEQ, 0, 1, value), (_RET, 0, 0, result))]


def _argument_rules(pid: int, deny_fork: bool, pidfds: bool) -> dict[str, Rule]:
    """What to do with the calls of `SPECIAL`. Every rule ends in a return."""
    allow, deny, missing = (_RET, 0, 0, _ALLOW), (_RET, 0, 0, _DENY), (_RET, 0, 0, _MISSING)
    everybody, own_group = -1 & 0xFFFFFFFF, -pid & 0xFFFFFFFF
    rules: dict[str, Rule] = {
        # Threads and processes, but no new namespaces: inside a user namespace a program would be root again, and most
        # of the kernel's privileged code would be open to it. Tier `self` has no processes either. The low byte is the
        # signal that the parent gets at the end: SIGKILL there would kill it.
        "clone": [
            *(_arg(0), (_JSET, 0, 1, _NEW_NAMESPACES), deny),
            *((_AND, 0, 0, 0xFF), (_JEQ, 2, 0, 0), (_JEQ, 1, 0, _SIGCHLD), deny),
        ],
        # Its flags lie in memory, where a filter cannot read them; libc falls back to clone.
        "clone3": [missing],
        # Rings make system calls that no filter sees, sockets among them.
        "io_uring_setup": [missing],
        "io_uring_enter": [missing],
        "io_uring_register": [missing],
        # AF_UNIX stream pairs only: a datagram end could be re-addressed to somebody else's socket.
        "socketpair": [_arg(0), (_JEQ, 0, 4, 1), _arg(1), (_AND, 0, 0, 0xF), (_JEQ, 0, 1, 1), allow, deny],
        # Not MSG_OOB: no ordinary code sends urgent bytes, and they have been a hole in the kernel.
        "sendto": [_arg(3), (_JSET, 0, 1, 1), deny, allow],
        # SIGKILL: to other groups only. A single number might be one of our own threads, and killing that kills us:
        # tgkill names the process as well, so it alone may kill others one by one (the runner's os.kill uses it).
        "kill": [
            *(_arg(1), (_JEQ, 1, 0, _SIGKILL), allow, _arg(0), (_JGE, 1, 0, 0x80000000), deny),
            *(*_returns_if_equal((everybody, own_group), _DENY), allow),
        ],
        "tkill": [_arg(1), (_JEQ, 0, 1, _SIGKILL), deny, allow],
        "tgkill": [_arg(2), (_JEQ, 1, 0, _SIGKILL), allow, _arg(0), (_JEQ, 0, 1, pid), deny, allow],
        # Names, dumpability and filters of one's own. Not: PDEATHSIG (a SIGKILL of one's choice), subreaper (orphans
        # that escape their run's end), capabilities, memory maps.
        "prctl": [_arg(0), *_returns_if_equal(_PRCTL_ALLOWED, _ALLOW), deny],
        # TIOCSTI and TIOCLINUX type into a terminal that we might have been given. Those of type 0xFF tell what a pidfd
        # stands for, and open its namespaces.
        "ioctl": [
            *(_arg(1), *_returns_if_equal((0x5412, 0x541C), _DENY)),
            *((_AND, 0, 0, 0xFF00), (_JEQ, 0, 1, 0xFF00), deny, allow),
        ],
        "fcntl": [_arg(1), *_returns_if_equal(_FCNTL_ALLOWED, _ALLOW), deny],
        # Watching a child's end is all that it is good for. Without a process namespace the host's processes could be
        # watched as well; Python then waits in another way.
        "pidfd_open": [allow if pidfds else missing],
        # Of oneself only: where runs share a user, another's limits or processors could be taken away.
        "prlimit64": [_arg(0), *_returns_if_equal((0, pid), _ALLOW), deny],
        "sched_setaffinity": [_arg(0), *_returns_if_equal((0, pid), _ALLOW), deny],
    }
    # Landlock does not judge them, and they are not always as public as a file's size. Copying tools go on without.
    rules |= {name: [(_RET, 0, 0, _UNSUPPORTED)] for name in _ATTRIBUTE_CALLS}
    # Below 0 are CPU clocks: the kernel lets everybody read every process's, and so watch what it does. Threads'
    # clocks it keeps to their own process.
    clock = [_arg(0), (_JGE, 0, 2, 1 << 31), (_JSET, 1, 0, _OF_A_THREAD), (_JGE, 0, 1, _OWN_CLOCKS), allow, deny]
    rules |= dict.fromkeys(_CLOCK_CALLS, clock)
    rules["clone"] += [_arg(0), (_JSET, 0, 1, _CLONE_THREAD), allow, deny] if deny_fork else [allow]
    return rules


def _segments(pid: int, deny_fork: bool, pidfds: bool) -> list[tuple[int, Rule]]:
    """What happens to which call: (number, rule) holds from that number up to the next. A rule ends in a return."""
    special = {SPECIAL[MACHINE][name]: rule for name, rule in _argument_rules(pid, deny_fork, pidfds).items()}
    refused = (*_FORK_CALLS, *_CHANGE_CALLS) if deny_fork else ()
    allowed = {number for name, number in ALLOWED[MACHINE].items() if name not in refused}
    segments: list[tuple[int, Rule]] = []
    for number in range(max(_NEWEST_KNOWN, *allowed, *special) + 2):
        verdict = _ALLOW if number in allowed else _DENY if number <= _NEWEST_KNOWN else _MISSING
        rule = special.get(number, [(_RET, 0, 0, verdict)])
        if not segments or segments[-1][1] != rule:
            segments.append((number, rule))
    return segments


def _search(segments: list[tuple[int, Rule]]) -> Rule:
    """A binary search for the loaded call number. When a filter is installed the kernel walks through it for every
    number there is: as a list this one took half as long again."""
    if len(segments) == 1:
        return segments[0][1]
    middle = len(segments) // 2
    below, above = _search(segments[:middle]), _search(segments[middle:])
    first = segments[middle][0]
    if len(below) > _JUMP_MAX:
        return [(_JGE, 0, 1, first), (_JA, 0, 0, len(below)), *below, *above]
    return [(_JGE, len(below), 0, first), *below, *above]


_NUMBER = struct.Struct("=I")
_SOMEBODY = 0x7ABCDEF1  # no process has this id, and no other number of the program is equal to it


@functools.lru_cache(maxsize=4)
def _template(deny_fork: bool, pidfds: bool) -> tuple[bytes, list[tuple[int, int]]]:
    """The program for `_SOMEBODY`, and where that number stands in it (1) or its negative (-1)."""
    program = _compile(_SOMEBODY, deny_fork, pidfds)
    places = []
    for sign in (1, -1):
        for offset in range(4, len(program), 8):
            if _NUMBER.unpack_from(program, offset)[0] == sign * _SOMEBODY & 0xFFFFFFFF:
                places.append((offset, sign))
    return program, places


class Filter:
    """The filter, ready to be installed; a process that is not number `pid` has to `aim` it at itself first.

    `deny_fork`: no processes; `pidfds`: processes may be opened, for where only the run's own can be seen."""

    def __init__(self, deny_fork: bool, pidfds: bool, pid: int) -> None:
        program, self._places = _template(deny_fork, pidfds)
        self._program = SeccompProgram(program)
        self.aim(pid)

    def aim(self, pid: int) -> None:
        """`pid`: the process that installs it, as it sees itself."""
        for offset, sign in self._places:
            self._program.put(offset, sign * pid & 0xFFFFFFFF)

    def install(self) -> None:
        """Filter this process and its future children, for good; `no_new_privs` must be set."""
        self._program.install()


def _compile(pid: int, deny_fork: bool, pidfds: bool) -> bytes:
    program: Rule = [(_LD, 0, 0, 4), (_JEQ, 1, 0, _AUDIT_ARCH[MACHINE]), (_RET, 0, 0, _KILL), (_LD, 0, 0, 0)]
    if MACHINE == "x86_64":
        program += [(_JGE, 0, 1, 0x40000000), (_RET, 0, 0, _KILL)]  # x32
    program += _search(_segments(pid, deny_fork, pidfds))
    return b"".join(_instruction(*step) for step in program)


_RLIMIT_NUMBERS = {"x86_64": (160, 302), "aarch64": (164, 261)}


def build_limit_lock(kind: int) -> bytes:
    """Another, tiny filter that freezes a resource limit, installed once the run's own is set.

    RLIMIT_CPU: a program could lower it to die of a SIGKILL that looks like our machine's fault. RLIMIT_NPROC: a
    session's may be raised, for its copies, but not by its code.
    """
    setrlimit, prlimit = _RLIMIT_NUMBERS[MACHINE]
    program: Rule = [
        (_LD, 0, 0, 0),
        *((_JEQ, 0, 4, setrlimit), _arg(0), (_JEQ, 0, 1, kind), (_RET, 0, 0, _DENY), (_RET, 0, 0, _ALLOW)),
        *((_JEQ, 1, 0, prlimit), (_RET, 0, 0, _ALLOW), _arg(1), (_JEQ, 1, 0, kind), (_RET, 0, 0, _ALLOW)),
        *(_arg(2), (_JEQ, 0, 3, 0), (_LD, 0, 0, 16 + 8 * 2 + 4), (_JEQ, 0, 1, 0), (_RET, 0, 0, _ALLOW)),
        (_RET, 0, 0, _DENY),
    ]
    return b"".join(_instruction(*step) for step in program)


def build_tree_lock() -> bytes:
    """For a session before its first copy is made; copies inherit it. Nobody in the tree sends SIGKILL any more, and
    limits and processors are changed for oneself only.

    A copy that was killed by its original would look like our machine's fault.
    """
    allow, deny = (_RET, 0, 0, _ALLOW), (_RET, 0, 0, _DENY)
    program: Rule = [(_LD, 0, 0, 0)]
    for name, signal in (("kill", 1), ("tkill", 1), ("tgkill", 2)):
        program += [(_JEQ, 0, 4, SPECIAL[MACHINE][name]), _arg(signal), (_JEQ, 0, 1, _SIGKILL), deny, allow]
    for name in ("prlimit64", "sched_setaffinity"):
        program += [(_JEQ, 0, 4, SPECIAL[MACHINE][name]), _arg(0), (_JEQ, 0, 1, 0), allow, deny]
    program.append(allow)
    return b"".join(_instruction(*step) for step in program)


def install(program: bytes) -> None:
    """Filter this process and its future children, for good; `no_new_privs` must be set."""
    _ready(program).install()


@functools.lru_cache(maxsize=4)
def _ready(program: bytes) -> SeccompProgram:
    return SeccompProgram(program)


def prepare(program: bytes) -> None:
    """Do what `install` would do before the kernel is called, so that a fork of this process finds it done."""
    _ready(program)
