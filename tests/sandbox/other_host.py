"""Makes this process look like another kind of host, then runs a program: `python other_host.py KIND PROGRAM`.

Kinds, all made for real out of root on this machine:
- `container`: root with Docker's default capabilities, and namespaces and mounts refused as Docker's filter does;
- `capless`: an ordinary user in such a container;
- `user`: an ordinary user on the bare machine;
- `locked`: `capless` without Landlock either: nothing can be confined.
The interpreter's folders are made readable for other users, in a mount namespace of our own.
"""

from __future__ import annotations

import ctypes
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sandbox.linux import calls
from sandbox.linux import syscalls as sys_
from sandbox.linux.seccomp import _ALLOW, _JEQ, _JSET, _LD, _NEW_NAMESPACES, _RET, _arg, _instruction, install

DOCKER_CAPABILITIES = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
_NUMBERS = {
    "x86_64": {"refused": (272, 308, 165, 166, 155, 161, 442), "clone": 56, "clone3": 435},
    "aarch64": {"refused": (97, 268, 40, 39, 41, 442), "clone": 220, "clone3": 435},
}
ORDINARY_USER = 65534


def open_up(path: Path) -> None:
    """Let other users pass through the parents of `path`: cover a private folder by an open one that holds the path."""
    for parent in reversed(path.parents):
        if parent.stat().st_mode & 0o5 == 0o5:
            continue
        inner = parent / path.relative_to(parent).parts[0]
        held = tempfile.mkdtemp()
        sys_.mount(str(inner), held, "", sys_.MS_BIND | sys_.MS_REC)
        sys_.mount("tmpfs", str(parent), "tmpfs", 0, "mode=755")
        inner.mkdir()
        sys_.mount(held, str(inner), "", sys_.MS_BIND | sys_.MS_REC)


def refuse(landlock: bool) -> None:
    """Docker's seccomp profile as far as confinement is concerned."""
    numbers = _NUMBERS[platform.machine()]
    eperm, enosys = (_RET, 0, 0, 0x50001), (_RET, 0, 0, 0x50026)
    program = [(_LD, 0, 0, 0)]
    for number in numbers["refused"]:  # type: ignore[attr-defined]
        program += [(_JEQ, 0, 1, number), eperm]
    for number in (numbers["clone3"], *((444, 445, 446) if landlock else ())):
        program += [(_JEQ, 0, 1, number), enosys]  # type: ignore[list-item]
    program += [(_JEQ, 0, 3, numbers["clone"]), _arg(0), (_JSET, 0, 1, _NEW_NAMESPACES), eperm]  # type: ignore[list-item]
    program += [(_RET, 0, 0, _ALLOW)]
    install(b"".join(_instruction(*step) for step in program))


def keep_capabilities(kept: tuple[int, ...]) -> None:
    """Drop all others from the bounding set and from this process."""
    for capability in range(41):
        if capability not in kept:
            sys_.prctl(sys_.PR_CAPBSET_DROP, capability)
    mask = sum(1 << capability for capability in kept)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    sys_.syscall("capset", calls.number("capset"), header, data)


def become(kind: str) -> None:
    """Turn this process into one of `kind`."""
    sys_.unshare(sys_.CLONE_NEWNS)
    sys_.mount("none", "/", "", sys_.MS_REC | sys_.MS_PRIVATE)
    for path in {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve(), Path(__file__).resolve()}:
        open_up(path)
    if kind != "user":
        refuse(landlock=kind == "locked")
    if kind == "container":
        keep_capabilities(DOCKER_CAPABILITIES)
    else:
        os.setgroups([])
        os.setresgid(ORDINARY_USER, ORDINARY_USER, ORDINARY_USER)
        os.setresuid(ORDINARY_USER, ORDINARY_USER, ORDINARY_USER)
        sys_.prctl(sys_.PR_SET_DUMPABLE, 1)
    os.chdir("/")


def run(
    kind: str, program: Path, environment: dict[str, str] | None = None, timeout: float = 100
) -> subprocess.CompletedProcess[str]:
    """From a test: run `program` on such a host, with `environment` added to ours."""
    return subprocess.run(
        [sys.executable, "-W", "error", __file__, kind, str(program)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(environment or {})},
    )


if __name__ == "__main__":
    become(sys.argv[1])
    runpy.run_path(sys.argv[2], run_name="__main__")
