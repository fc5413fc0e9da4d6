"""The system calls Python has no function for, by ctypes. libc is resolved at import, hence before any fork.

Every wrapper raises `OSError` with the call's name, so that a failed confinement step says which step it was.
"""

from __future__ import annotations

import ctypes
import errno
import os

MACHINE = os.uname().machine if hasattr(os, "uname") else ""  # `platform` would bring `subprocess` with it
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
PR_SET_NAME = 15
PR_SET_SECCOMP = 22
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47

_NUMBERS = {
    "x86_64": {"pivot_root": 155, "mount_setattr": 442, "tgkill": 234},
    "aarch64": {"pivot_root": 41, "mount_setattr": 442, "tgkill": 131},
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


def mount_readonly(target: str, *, device: bool = False) -> None:
    """Make the mount at `target` and everything mounted below it read-only, without setuid or devices (Linux 5.12).

    A `device` can still be opened, and written to."""
    attr = _MountAttr(ATTR_RDONLY | ATTR_NOSUID | (0 if device else ATTR_NODEV), 0, 0, 0)
    syscall(
        f"mount_setattr {target}",
        _NUMBERS[MACHINE]["mount_setattr"],
        ctypes.c_int(-100),
        os.fsencode(target),
        ctypes.c_uint(AT_RECURSIVE),
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
    )


_PRCTL = _LIBC.prctl
_PRCTL.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


def prctl(option: int, value: int = 0, third: int = 0) -> int:
    """`prctl(2)` with integer arguments."""
    result = int(_PRCTL(option, value, third, 0, 0))
    _checked(f"prctl({option})", result)
    return result


def kill_process(pid: int) -> None:
    """SIGKILL to the process whose first thread is `pid`; raises `ProcessLookupError` for the id of another thread."""
    syscall("tgkill", _NUMBERS[MACHINE]["tgkill"], ctypes.c_int(pid), ctypes.c_int(pid), ctypes.c_int(9))


def name_process(name: str) -> None:
    """What `ps` and `top` show; at most 15 characters."""
    _checked(
        "prctl(PR_SET_NAME)",
        int(_PRCTL(PR_SET_NAME, ctypes.addressof(ctypes.create_string_buffer(name.encode())), 0, 0, 0)),
    )


_FORK = ctypes.PyDLL(None, use_errno=True).fork


def fork() -> int:
    """`fork(2)` without Python's own handlers, which cost as much again as the fork of a small process.

    Only for a process with one thread, and only where the child seeds its random numbers itself. Raises `OSError`.
    """
    pid = int(_FORK())
    if pid < 0:
        raise OSError(ctypes.get_errno(), "fork")
    return pid


_FDOPEN, _SETVBUF, _CLONE = _LIBC.fdopen, _LIBC.setvbuf, _LIBC.clone
_FDOPEN.restype = ctypes.c_void_p
_SETVBUF.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_CLONE.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
_GETC = ctypes.cast(_LIBC.getc_unlocked, ctypes.c_void_p)
_CLONE_VM = 0x00000100


def free_memory() -> tuple[int, int]:
    """(bytes, address): what libc's allocator has free between its blocks, and where its free end begins.

    (0, 0) where libc does not tell (glibc 2.33 does).
    """
    try:
        info = _LIBC.mallinfo2
    except AttributeError:
        return 0, 0
    info.restype = _MallocInfo
    found = info()
    return found.free - found.end, int(_SBRK(0)) - found.end


class _MallocInfo(ctypes.Structure):
    _fields_ = (
        *((f"other_{n}", ctypes.c_size_t) for n in range(8)),
        ("free", ctypes.c_size_t),
        ("end", ctypes.c_size_t),
    )


_SBRK = _LIBC.sbrk
_SBRK.restype, _SBRK.argtypes = ctypes.c_size_t, (ctypes.c_long,)
malloc, free = _LIBC.malloc, _LIBC.free
malloc.restype, malloc.argtypes = ctypes.c_size_t, (ctypes.c_size_t,)
free.restype, free.argtypes = None, (ctypes.c_size_t,)


def read_stream(fd: int, buffer: int, size: int) -> ctypes.c_void_p:
    """A C stream that reads `fd` through the memory at `buffer`, so that reading allocates nothing."""
    stream = ctypes.c_void_p(_FDOPEN(ctypes.c_int(fd), b"r"))
    if not stream.value or _SETVBUF(stream, buffer, 0, size):
        raise OSError(ctypes.get_errno(), "fdopen")
    return stream


def clone_reader(stack_top: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
    """A process that shares our memory, reads one character and ends; its id, or -1. See `worker/anchor.py`."""
    return int(_CLONE(_GETC, stack_top, _CLONE_VM, stream))


_MADVISE = _LIBC.madvise
_MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
MADV_COLLAPSE = 25


def madvise(address: int, size: int, advice: int) -> bool:
    """`madvise(2)`; False when the kernel refuses."""
    return int(_MADVISE(address, size, advice)) == 0


class SeccompProgram:
    """A BPF program in the form that the kernel takes, made once so that installing it is one call."""

    def __init__(self, program: bytes) -> None:
        self._buffer = ctypes.create_string_buffer(program, len(program))
        self._header = _SeccompHeader(len(program) // 8, ctypes.cast(self._buffer, ctypes.c_void_p))
        self._address = ctypes.addressof(self._header)

    def put(self, offset: int, value: int) -> None:
        """Change 32 bits of the program."""
        ctypes.c_uint32.from_buffer(self._buffer, offset).value = value

    def install(self) -> None:
        """Filter this process and its future children, for good; `no_new_privs` must be set."""
        _checked("seccomp", int(_PRCTL(PR_SET_SECCOMP, 2, self._address, 0, 0)))


class _SeccompHeader(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


NO_CAPABILITIES = ((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
"""Header and contents for `capset`, version 3: nothing at all for the calling process."""


def capabilities() -> int:
    """How many there are in this kernel."""
    count = 0
    while _PRCTL(PR_CAPBSET_READ, count, 0, 0, 0) >= 0:
        count += 1
    return count


def drop_bounding() -> None:
    """Empty this process's bounding set: no program that it or its children execute gains anything.

    Without CAP_SETPCAP (EPERM) nothing happens: there is nothing to regain then either, because no_new_privs follows.
    """
    for capability in range(capabilities()):
        if _PRCTL(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            if ctypes.get_errno() == errno.EPERM:
                return
            _checked(f"drop capability {capability}", -1)
