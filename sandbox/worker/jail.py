"""Confining one child, step by step, before it sees any user bytes. A step that fails raises.

The steps are system calls that the zygote has written down (`sandbox/linux/calls.py`); a child only performs them.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from dataclasses import dataclass

from sandbox.linux import landlock, seccomp
from sandbox.linux import syscalls as sys_
from sandbox.linux.calls import AT_FDCWD, Calls, Slot
from sandbox.tiers import Tier
from sandbox.worker import root

JAIL_ID = 1000
"""User and group id inside tier `ns`."""
INIT_SEES_CHILD_AS = 2
"""In its own process namespace the init is 1 and the child is the next: nearly always."""

JOB, REPORT = 512, 513
"""Numbers of the descriptors that a confined child keeps besides 0, 1 and 2: where the job comes from, and where it
answers. High, because descriptors are listed by the kernel up to the highest, and ordinary code opens low ones."""
_SINK, _PROC, _RULES = 514, 515, 516  # kept open by the zygote for the calls below; the last count upwards
_LAST = 0xFFFFFFFF
_LIMITS = (
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NOFILE, 256),
    (resource.RLIMIT_MEMLOCK, 0),
    (resource.RLIMIT_SIGPENDING, 256),  # real-time signals; what the kernel user may have is shared with other runs
)


@dataclass(frozen=True)
class Jail:
    """What every child of a warm unit gets. `readable`: what tiers without a root of their own let a child read."""

    tier: Tier
    readable: tuple[str, ...]
    tmp_mb: int
    work_root: str

    def workdir(self, ident: int) -> str:
        """The folder that child `ident` may write to."""
        return root.WORKDIR if self.tier.namespaces else f"{self.work_root}/{ident}"


def readable_paths(tier: Tier, python_paths: tuple[str, ...]) -> tuple[str, ...]:
    """In `ns` the root itself is private; elsewhere only what the interpreter needs may be read."""
    return ("/",) if tier.namespaces else (*root.SYSTEM_PATHS, *root.ETC_FILES, *python_paths)


def write_id_maps(proc: int, inside: int, uid: int, gid: int) -> None:
    """Map the one id this process has to `inside` in its new user namespace. `proc`: descriptor of a /proc."""
    for name, text in _id_maps(inside, uid, gid):
        fd = os.open(f"self/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _id_maps(inside: int, uid: int, gid: int) -> tuple[tuple[str, str], ...]:
    return ("setgroups", "deny"), ("uid_map", f"{inside} {uid} 1"), ("gid_map", f"{inside} {gid} 1")


class Confinement:
    """Made once in the zygote. For each child: `aim` before the fork, `apply` in it."""

    def __init__(self, jail: Jail) -> None:
        self._jail = jail
        self._tier = jail.tier
        self._job, self._stdout, self._stderr, self._report, self._group, self._uid = (Slot() for _ in range(6))
        self._workdir = ctypes.create_string_buffer(os.fsencode(jail.workdir(0)), 4096)
        self._rules = _RULES
        for fd in (JOB, REPORT):  # taken, so that nothing that comes in gets these numbers
            self._keep("/dev/null", fd, os.O_RDONLY)
        self._keep("/dev/null", _SINK, os.O_WRONLY)
        self._keep("/proc", _PROC, os.O_PATH)
        if self._tier.seccomp:
            self._filter = seccomp.Filter(self._tier.deny_fork, self._tier.namespaces, INIT_SEES_CHILD_AS)
        self._calls = self._list()

    @staticmethod
    def _keep(path: str, fd: int, flags: int) -> None:
        opened = os.open(path, flags | os.O_CLOEXEC)
        os.dup2(opened, fd, inheritable=False)
        os.close(opened)

    def aim(self, ident: int, uid: int, fds: list[int], group: int) -> None:
        """The next child. `uid`: the user id to take in tier `uid`; `fds`: job, stdout, stderr, report; `group`: where
        to join a control group, or -1: then it joins /dev/null."""
        group = group if group >= 0 else _SINK
        slots = (self._job, self._stdout, self._stderr, self._report, self._group, self._uid)
        for slot, value in zip(slots, (*fds[:4], group, uid), strict=True):
            self._calls.put(slot, value)
        if not self._tier.namespaces:
            self._workdir.value = os.fsencode(self._jail.workdir(ident))

    def apply(self) -> None:
        """In the child: take the tier's walls and move to its work folder. Raises `OSError`."""
        self._calls.perform()
        if self._tier.seccomp:
            # Also in `ns`: the kernel may still hold the number of a process that has just gone.
            if (pid := os.getpid()) != INIT_SEES_CHILD_AS:
                self._filter.aim(pid)
            self._filter.install()

    def _list(self) -> Calls:
        calls = Calls()
        self._descriptors(calls)
        calls.add("setsid")
        calls.add("umask", 0o077)
        if self._tier.namespaces:
            self._namespaces(calls)
        elif self._tier.own_uid:
            calls.add("setgroups", 0, 0)
            calls.add("setresgid", self._uid, self._uid, self._uid)
            calls.add("setresuid", self._uid, self._uid, self._uid)
        if not self._tier.namespaces:
            calls.add("mkdirat", AT_FDCWD, self._workdir, 0o700, says="mkdir of the work folder")
        calls.add("prctl", sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
        calls.add("chdir", self._workdir)
        for kind, limit in _LIMITS:
            calls.add("prlimit64", 0, kind, (ctypes.c_uint64 * 2)(limit, limit), 0)
        calls.add("prctl", sys_.PR_SET_NO_NEW_PRIVS, 1, says="no_new_privs")
        if self._tier.name != "none":
            self._privileges(calls)
            if landlock.abi() or self._tier.landlock:
                self._landlock(calls)
        calls.add("close_range", 3, JOB - 1, 0)
        calls.add("close_range", REPORT + 1, _LAST, 0)
        return calls

    def _descriptors(self, calls: Calls) -> None:
        """Each to its place, first of all the one that failures are reported to; what the zygote has open besides, and
        the calls below do not use, is closed. No open file is shared with another child: flags and locks, which belong
        to it, would be messages from one run to the next."""
        for slot, fd in ((self._report, REPORT), (self._job, JOB)):
            calls.add("dup3", slot, fd, os.O_CLOEXEC, returns=fd)
        calls.add("write", self._group, b"0", 1, says="joining the control group")
        calls.add("close", 0)
        calls.add("openat", AT_FDCWD, b"/dev/null", os.O_RDONLY, returns=0, says="open /dev/null")
        for fd, source in ((1, self._stdout), (2, self._stderr)):
            calls.add("dup3", source, fd, 0, returns=fd)
        calls.add("close_range", 3, JOB - 1, 0)

    def _namespaces(self, calls: Calls) -> None:
        """Own work folder and /proc, then a user namespace of its own: RLIMIT_NPROC counts per namespace and user.

        Where a container has masked parts of /proc the kernel refuses a new one; /proc is then empty.
        """
        flags = sys_.MS_NOSUID | sys_.MS_NODEV
        size = f"size={self._jail.tmp_mb}m,nr_inodes=4096,mode=700".encode()
        calls.add("prctl", sys_.PR_SET_DUMPABLE, 1)
        calls.add("unshare", sys_.CLONE_NEWNS, says="unshare(mounts)")
        calls.add("mount", b"tmpfs", self._workdir, b"tmpfs", flags, size, says=f"mount tmpfs on {root.WORKDIR}")
        calls.add("mount", b"proc", b"/proc", b"proc", flags | sys_.MS_NOEXEC, 0, says="mount proc on /proc")
        calls.otherwise("mount", b"tmpfs", b"/proc", b"tmpfs", flags | sys_.MS_RDONLY, b"size=4k,mode=555")
        calls.add("unshare", sys_.CLONE_NEWUSER, says="unshare(user)")
        for name, text in _id_maps(JAIL_ID, os.geteuid(), os.getegid()):
            # The first number that is free: everything up to the job has just been closed.
            calls.add("openat", _PROC, f"self/{name}".encode(), os.O_WRONLY | os.O_CLOEXEC, returns=3, says=name)
            calls.add("write", 3, text.encode(), len(text), returns=len(text), says=f"write {name}")
            calls.add("close", 3)

    def _privileges(self, calls: Calls) -> None:
        """Empty every capability set: bounding, ambient, permitted, effective, inheritable."""
        if self._tier.namespaces:  # there a child begins with all of them; elsewhere it has its zygote's
            for capability in range(sys_.capabilities()):
                calls.add("prctl", sys_.PR_CAPBSET_DROP, capability, says=f"drop capability {capability}")
        else:
            sys_.drop_bounding()
        calls.add("prctl", sys_.PR_CAP_AMBIENT, 4, 0, 0, 0, says="drop ambient capabilities")
        header, nothing = sys_.NO_CAPABILITIES
        calls.add("capset", header, nothing)

    def _landlock(self, calls: Calls) -> None:
        """A ruleset of this child's own: rules that were added to a shared one would let a run into the folders of all
        runs before it, and never go away."""
        rights = landlock.rights()
        calls.add("landlock_create_ruleset", rights.handled, rights.size, 0, returns=3)
        for path in self._jail.readable:
            self._rule(calls, path, rights.read)
        for path in root.DEVICES:
            self._rule(calls, path, rights.device)
        calls.add("openat", AT_FDCWD, self._workdir, os.O_PATH | os.O_CLOEXEC, returns=4, says="open the work folder")
        rule = landlock.PathRule(rights.everything, 4)
        calls.add("landlock_add_rule", 3, landlock.PATH_BENEATH, rule, 0, says="landlock: the work folder")
        calls.add("landlock_restrict_self", 3, 0)

    def _rule(self, calls: Calls, path: str, access: int) -> None:
        """What does not exist cannot be reached either."""
        try:
            self._keep(path, self._rules, os.O_PATH)
        except FileNotFoundError:
            return
        rule = landlock.PathRule(landlock.fitting(path, access), self._rules)
        calls.add("landlock_add_rule", 3, landlock.PATH_BENEATH, rule, 0, says=f"landlock: {path}")
        self._rules += 1
