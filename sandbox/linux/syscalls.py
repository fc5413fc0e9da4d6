"""The system calls Python has no function for, by ctypes. libc is resolved at import, hence before any fork.

Every wrapper raises `OSError` with the call's name, so that a failed confinement step says which step it was.
"""

from __future__ import annotations

import ctypes
import os
import platform

MACHINE = platform.machine()
_LIBC = ctypes.CDLL(None, use_errno=True)
_SYSCALL = _LIBC.syscall
_SYSCALL.restype = ctypes.c_long

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
AT_RECURSIVE = 0x8000

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47

_NUMBERS = {
    "x86_64": {"capset": 126, "pivot_root": 155, "mount_setattr": 442, "tgkill": 234},
    "aarch64": {"capset": 91, "pivot_root": 41, "mount_setattr": 442, "tgkill": 131},
}
SUPPORTED = MACHINE in _NUMBERS
"""Whether this processor's call numbers are known (x86_64 and aarch64)."""


def syscall(name: str, number: int, *args: object) -> int:
    """The raw system call `number`; raises `OSError` naming it."""
    result = int(_SYSCALL(ctypes.c_long(number), *args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def _checked(name: str, result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """Leave the shared namespaces named by `flags`."""
    _checked(f"unshare({flags:#x})", _LIBC.unshare(ctypes.c_int(flags)))


def setns(fd: int, flags: int) -> None:
    """Join the namespaces `flags` of a namespace file or pidfd."""
    _checked("setns", _LIBC.setns(ctypes.c_int(fd), ctypes.c_int(flags)))


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """`mount(2)`; paths are ours, never a user's."""
    result = _LIBC.mount(
        os.fsencode(source), os.fsencode(target), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None
    )
    _checked(f"mount {kind or source} on {target}", result)


def umount_detach(target: str) -> None:
    """Unmount lazily."""
    _checked(f"umount {target}", _LIBC.umount2(os.fsencode(target), ctypes.c_int(MNT_DETACH)))


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root; the old one appears at `old`."""
    syscall("pivot_root", _NUMBERS[MACHINE]["pivot_root"], os.fsencode(new), os.fsencode(old))


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount_readonly(target: str) -> None:
    """Make the mount at `target` and everything mounted below it read-only, without setuid or devices (Linux 5.12)."""
    attr = _MountAttr(ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, 0, 0, 0)
    syscall(
        f"mount_setattr {target}",
        _NUMBERS[MACHINE]["mount_setattr"],
        ctypes.c_int(-100),
        os.fsencode(target),
        ctypes.c_uint(AT_RECURSIVE),
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
    )


def prctl(option: int, value: int = 0, third: int = 0) -> int:
    """`prctl(2)` with integer arguments."""
    zero = ctypes.c_ulong(0)
    result = int(_LIBC.prctl(ctypes.c_int(option), ctypes.c_ulong(value), ctypes.c_ulong(third), zero, zero))
    _checked(f"prctl({option})", result)
    return result


def kill_process(pid: int) -> None:
    """SIGKILL to the process whose first thread is `pid`; raises `ProcessLookupError` for the id of another thread."""
    syscall("tgkill", _NUMBERS[MACHINE]["tgkill"], ctypes.c_int(pid), ctypes.c_int(pid), ctypes.c_int(9))


def drop_capabilities() -> None:
    """Empty every capability set of this process: bounding, ambient, permitted, effective, inheritable."""
    try:
        prctl(PR_CAP_AMBIENT, 4)
        for capability in range(64):
            prctl(PR_CAPBSET_DROP, capability)
    except OSError as error:
        # EINVAL: past the last capability of this kernel. EPERM: no CAP_SETPCAP, so nothing to regain either,
        # because no_new_privs follows.
        if error.errno not in (1, 22):
            raise
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    syscall("capset", _NUMBERS[MACHINE]["capset"], header, (ctypes.c_uint32 * 6)())
