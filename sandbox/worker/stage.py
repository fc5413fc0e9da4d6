"""The stage that user code stands on: standard streams, limits, random seeds, a main module. Used once per process."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import random
import resource
import socket
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sandbox.linux import seccomp
from sandbox.linux.syscalls import SUPPORTED
from sandbox.worker.display import MAIN

CPU_LIMIT_LOCK = seccomp.build_limit_lock(resource.RLIMIT_CPU) if SUPPORTED else b""
_PROCESS_LIMIT_LOCK = seccomp.build_limit_lock(resource.RLIMIT_NPROC) if SUPPORTED else b""
_MIB = 1024 * 1024
_RESERVE = 32 * _MIB  # address space kept back so that a MemoryError can still be described


class CountingFile(io.FileIO):
    """Standard output that knows whether anything was written."""

    written = 0

    def write(self, data: Any, /) -> int:
        self.written += len(data)
        return super().write(data)


@dataclass(frozen=True)
class Stand:
    """Standard output as code sees it and what counts it, and the names of a fresh `__main__`."""

    raw: CountingFile
    stdout: Any
    names: dict[str, Any]


def set_up() -> Stand:
    """In the zygote: everything a program stands on that does not depend on it. Descriptors 1 and 2 are pipes
    meanwhile, as they will be in a run: a stream asks once what it is on."""
    saved = os.dup(1), os.dup(2)
    reader, writer = os.pipe()
    try:
        for fd in (1, 2):
            os.dup2(writer, fd)
        raw = fresh_streams()
        names = main_module()
        seed_all(0)
        return Stand(raw, sys.stdout, names)
    finally:
        for fd, old in zip((1, 2), saved, strict=True):
            os.dup2(old, fd)
        for fd in (*saved, reader, writer):
            os.close(fd)


def provide_stdin(data: bytes) -> None:
    """Standard input is a file in memory: nobody ever blocks on writing it."""
    fd = os.memfd_create("stdin", 0)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    os.dup2(fd, 0)
    os.close(fd)


def no_stdin() -> None:
    """Standard input is at its end."""
    fd = os.open("/dev/null", os.O_RDONLY)
    os.dup2(fd, 0)
    os.close(fd)


def open_stdin() -> None:
    """`sys.stdin` over descriptor 0, from its beginning."""
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.__stdin__ = sys.stdin  # type: ignore[misc]


def fresh_streams() -> CountingFile:
    """New `sys.stdin`, `sys.stdout`, `sys.stderr` over descriptors 0, 1, 2; returns what counts standard output."""
    raw = CountingFile(1, "wb", closefd=False)
    open_stdin()
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="replace")
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "wb", closefd=False), encoding="utf-8", errors="backslashreplace", write_through=True
    )
    for name in ("stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))
    return raw


def sendmsg(
    sock: socket.socket, buffers: Iterable[Any], ancillary: Iterable[Any] = (), flags: int = 0, address: Any = None, /
) -> int:
    """`socket.sendmsg` where the filter refuses it, without what can be passed in it: asyncio writes this way."""
    if [*ancillary] or address is not None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    return sock.send(b"".join(buffers), flags)


def set_home(folder: str) -> None:
    """Let the environment say that we live in `folder`."""
    for name in ("HOME", "TMPDIR", "PWD"):  # not by `update`, which asks of what kind its arguments are
        os.environ[name] = folder


def main_module() -> dict[str, Any]:
    """The names of a fresh `__main__`."""
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    module.__dict__["__file__"] = MAIN
    sys.modules["__main__"] = module
    sys.argv = [MAIN]
    return module.__dict__


def lower(kind: int, soft: int, hard: int | None = None) -> None:
    """Set a resource limit, never above what is allowed."""
    ceiling = resource.getrlimit(kind)[1]
    hard = soft if hard is None else hard
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def apply_limits(settings: dict[str, Any], base_bytes: int, filtered: bool) -> None:
    """Set the limits; memory counts from what the warm interpreter already maps.

    Without `cpu_s` there is no limit of CPU time; either way nobody changes it any more. `branches`: processes beyond
    `processes` that copies of this interpreter may take; `frozen`: it is the supervisor that allows them.
    """
    memory = base_bytes + settings["memory_mb"] * _MIB
    lower(resource.RLIMIT_AS, memory, memory + _RESERVE)
    lower(resource.RLIMIT_FSIZE, settings["file_mb"] * _MIB)
    lower(resource.RLIMIT_NPROC, settings["processes"], settings["processes"] + settings.get("branches", 0))
    if settings.get("cpu_s"):
        used = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
        lower(resource.RLIMIT_CPU, used + settings["cpu_s"], used + settings["cpu_s"] + 1)
    if filtered:
        seccomp.install(CPU_LIMIT_LOCK)
        if settings.get("frozen"):
            seccomp.install(_PROCESS_LIMIT_LOCK)


@contextlib.contextmanager
def memory_reserve() -> Any:
    """Use the address space that was kept back, for describing a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def seed_all(seed: int) -> None:
    """`random` and numpy's global generator start from `seed`."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def exit_code(code: object) -> int:
    """Exit status of `SystemExit(code)`, as Python computes it; never 0 for a failure."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code if 0 <= code <= 255 else 255
    with contextlib.suppress(BaseException):
        sys.stderr.write(f"{code}\n")
    return 1


def flush_all(stdout: Any) -> None:
    """Whatever user code has put there, and the stream that it was given."""
    for stream in (sys.stdout, sys.stderr, stdout):
        with contextlib.suppress(BaseException):
            stream.flush()
