"""Landlock: file, TCP and signal confinement that needs no privilege (Linux 5.13; kernel Documentation/userspace-api).

Every child has a ruleset of its own. Rights this kernel does not know are left out; what that means for a tier is found
out by attacking it (`sandbox/supervisor/probe.py`), never assumed.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass

from sandbox.linux.syscalls import syscall

_CREATE, _ADD, _RESTRICT = 444, 445, 446
PATH_BENEATH = 1  # the only kind of rule about files
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_FILE_ONLY = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class PathRule(ctypes.Structure):
    """`struct landlock_path_beneath_attr`."""

    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("fd", ctypes.c_int32))


def abi() -> int:
    """Version of Landlock this kernel offers; 0 when it has none or it is switched off."""
    try:
        return require()
    except OSError:
        return 0


def require() -> int:
    """`abi`, but raises `OSError` when there is none."""
    return syscall("landlock_create_ruleset", _CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))


@dataclass(frozen=True)
class Rights:
    """What this kernel can take away, as `landlock_create_ruleset` wants it, and what is given back for which path."""

    handled: ctypes.Structure
    size: int
    everything: int
    read: int
    device: int


@functools.cache
def rights() -> Rights:
    """For this kernel's version of Landlock."""
    version = abi()
    files = (1 << 13) - 1  # everything of ABI 1
    if version >= 2:
        files |= 1 << 13  # REFER
    if version >= 3:
        files |= _TRUNCATE
    if version >= 5:
        files |= _IOCTL_DEV
    handled = _Ruleset(files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    return Rights(handled, size, files, _READ & files, (_READ_FILE | _WRITE_FILE) & files)


def fitting(path: str, access: int) -> int:
    """Of `access`, what the kernel accepts for `path`: a file has no rights of folders."""
    return access if os.path.isdir(path) else access & _FILE_ONLY  # noqa: PTH112


def grants(read: Iterable[str], devices: Iterable[str]) -> list[tuple[str, int]]:
    """(path, rights): `read` may be read and executed, `devices` opened.

    Paths that do not exist are skipped: they cannot be reached either.
    """
    given = rights()
    wanted = ((read, given.read), (devices, given.device))
    return [(path, fitting(path, access)) for paths, access in wanted for path in paths if os.path.exists(path)]  # noqa: PTH110


def build(granted: Iterable[tuple[str, int]]) -> int:
    """A ruleset's file descriptor. Raises `OSError` when Landlock is missing."""
    given = rights()
    ruleset = syscall(
        "landlock_create_ruleset", _CREATE, ctypes.byref(given.handled), ctypes.c_size_t(given.size), ctypes.c_uint(0)
    )
    for path, access in granted:
        _allow(ruleset, path, access)
    return ruleset


def _allow(ruleset: int, path: str, access: int) -> None:
    """Grant `access` beneath `path`; nothing happens when it does not exist any more."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rule = PathRule(access, fd)
        syscall(
            "landlock_add_rule",
            _ADD,
            ctypes.c_int(ruleset),
            ctypes.c_int(PATH_BENEATH),
            ctypes.byref(rule),
            ctypes.c_uint(0),
        )
    finally:
        os.close(fd)


def restrict_self(ruleset: int) -> None:
    """Confine this process and its future children; `no_new_privs` must be set."""
    syscall("landlock_restrict_self", _RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint(0))
