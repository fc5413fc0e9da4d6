"""Confining one child, step by step, before it sees any user bytes. A step that fails raises."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import dataclass

from sandbox.linux import landlock, seccomp
from sandbox.linux import syscalls as sys_
from sandbox.tiers import Tier
from sandbox.worker import root

JAIL_ID = 1000
"""User and group id inside tier `ns`."""


INIT_SEES_CHILD_AS = 2
"""In its own process namespace the init is 1 and the child is the next."""


@dataclass(frozen=True)
class Jail:
    """What every child of a warm unit gets. `ruleset`: Landlock file descriptor or -1."""

    tier: Tier
    ruleset: int
    tmp_mb: int
    work_root: str

    def workdir(self, ident: int) -> str:
        """The folder that child `ident` may write to."""
        return root.WORKDIR if self.tier.namespaces else f"{self.work_root}/{ident}"


def make_ruleset(tier: Tier, python_paths: tuple[str, ...]) -> int:
    """Landlock rules shared by all children of a unit; -1 where the tier has none. Write access is added by child."""
    if tier.name == "none" or (not tier.landlock and landlock.abi() == 0):
        return -1
    # In `ns` the root itself is private; elsewhere only what the interpreter needs may be read.
    read = ["/"] if tier.namespaces else [*root.SYSTEM_PATHS, *root.ETC_FILES, *python_paths]
    return landlock.build(read, [], root.DEVICES)


def _enter_namespaces(jail: Jail) -> None:
    """Own work folder and /proc, then a user namespace of its own: RLIMIT_NPROC counts per namespace and user."""
    sys_.prctl(sys_.PR_SET_DUMPABLE, 1)
    uid, gid = os.geteuid(), os.getegid()
    proc = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
    sys_.unshare(sys_.CLONE_NEWNS)
    root.private_mounts(jail.tmp_mb)
    sys_.unshare(sys_.CLONE_NEWUSER)
    write_id_maps(proc, JAIL_ID, uid, gid)
    os.close(proc)


def write_id_maps(proc: int, inside: int, uid: int, gid: int) -> None:
    """Map the one id this process has to `inside` in its new user namespace. `proc`: descriptor of a /proc."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {uid} 1"), ("gid_map", f"{inside} {gid} 1")):
        fd = os.open(f"self/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def confine(jail: Jail, ident: int, uid: int, pid: int) -> None:
    """Apply the tier to this freshly forked child and move to its work folder.

    `uid`: the user id to take in tier `uid`; `pid`: what the child calls itself in `ns`. Raises `OSError`.
    """
    tier = jail.tier
    workdir = jail.workdir(ident)
    os.umask(0o077)
    if tier.namespaces:
        _enter_namespaces(jail)
    elif tier.own_uid:
        _become(uid)
    if not tier.namespaces:
        os.mkdir(workdir, 0o700)  # noqa: PTH102 (this is done for every run)
    sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.chdir(workdir)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    sys_.prctl(sys_.PR_SET_NO_NEW_PRIVS, 1)
    if tier.name == "none":
        return
    sys_.drop_capabilities()
    if jail.ruleset >= 0:
        landlock.allow_write(jail.ruleset, workdir)
        landlock.restrict_self(jail.ruleset)
    seccomp.install(seccomp.build(pid or os.getpid(), tier.deny_fork))
