"""Landlock: file, TCP and signal confinement that needs no privilege (Linux 5.13; kernel Documentation/userspace-api).

A ruleset is built once, in the zygote, and applied in each child. Rights this kernel does not know are left out; what
that means for a tier is found out by attacking it (`sandbox/supervisor/probe.py`), never assumed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from sandbox.linux.syscalls import syscall

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_FILE_ONLY = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV


class _RulesetAttr(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathAttr(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("fd", ctypes.c_int32))


def abi() -> int:
    """Version of Landlock this kernel offers; 0 when it has none or it is switched off."""
    try:
        return syscall("landlock_create_ruleset", _CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    except OSError:
        return 0


def _handled(version: int) -> tuple[int, int, int]:
    """Rights to take away (files, network, scopes) that ABI `version` knows."""
    files = (1 << 13) - 1  # everything of ABI 1
    if version >= 2:
        files |= 1 << 13  # REFER
    if version >= 3:
        files |= _TRUNCATE
    if version >= 5:
        files |= _IOCTL_DEV
    return files, 3 if version >= 4 else 0, 3 if version >= 6 else 0


def build(read: Iterable[str], write: Iterable[str], devices: Iterable[str]) -> int:
    """A ruleset's file descriptor: `read` may be read and executed, `write` (folders) used freely, `devices` opened.

    Paths that do not exist are skipped: they cannot be reached either. Raises `OSError` when Landlock is missing.
    """
    files, net, scoped = _handled(abi())
    attr = _RulesetAttr(files, net, scoped)
    size = 8 if not net else (16 if not scoped else 24)
    ruleset = syscall("landlock_create_ruleset", _CREATE, ctypes.byref(attr), ctypes.c_size_t(size), ctypes.c_uint(0))
    for paths, access in ((read, _READ), (write, files), (devices, _READ_FILE | _WRITE_FILE)):
        for path in paths:
            allow(ruleset, path, access & files)
    return ruleset


def allow_write(ruleset: int, path: str) -> None:
    """Let the folder `path` be used freely."""
    allow(ruleset, path, _handled(abi())[0])


def allow(ruleset: int, path: str, access: int) -> None:
    """Grant `access` beneath `path`; nothing happens when it does not exist."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):  # noqa: PTH112
            access &= _FILE_ONLY
        rule = _PathAttr(access, fd)
        syscall(
            "landlock_add_rule",
            _ADD,
            ctypes.c_int(ruleset),
            ctypes.c_int(1),
            ctypes.byref(rule),
            ctypes.c_uint(0),
        )
    finally:
        os.close(fd)


def restrict_self(ruleset: int) -> None:
    """Confine this process and its future children; `no_new_privs` must be set."""
    syscall("landlock_restrict_self", _RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint(0))
