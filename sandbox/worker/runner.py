"""Runs one program inside a confined child: reads the job, sets its limits, executes, reports, exits.

What is reported here is never trusted: user code shares this process. The outcome comes from the wait status; the
report only adds the text of an exception.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import io
import json
import linecache
import os
import random
import resource
import signal
import struct
import sys
import types
from typing import Any

from sandbox.linux import seccomp
from sandbox.linux.syscalls import SUPPORTED
from sandbox.worker.display import MAIN, describe, run_source

JOB_HEADER = struct.Struct("!II")
READY_BYTE = b"R"
CPU_LIMIT_LOCK = seccomp.build_cpu_limit_lock() if SUPPORTED else b""
_MIB = 1024 * 1024
_RESERVE = 32 * _MIB  # address space kept back so that a MemoryError can still be described


class _CountingFile(io.FileIO):
    """Standard output that knows whether anything was written."""

    written = 0

    def write(self, data: Any, /) -> int:
        self.written += len(data)
        return super().write(data)


def _read_exactly(fd: int, size: int) -> bytes:
    chunks = []
    while size:
        chunk = os.read(fd, min(size, 1 << 20))
        if not chunk:
            os._exit(0)  # the supervisor gave this child up
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def read_job(fd: int) -> tuple[dict[str, Any], str, bytes]:
    """Blocks until the job comes: (settings, code, stdin)."""
    settings_size, code_size = JOB_HEADER.unpack(_read_exactly(fd, JOB_HEADER.size))
    settings = json.loads(_read_exactly(fd, settings_size))
    code = _read_exactly(fd, code_size).decode("utf-8")
    return settings, code, _read_exactly(fd, settings["stdin_size"])


def _provide_stdin(data: bytes) -> None:
    """Standard input is a file in memory: nobody ever blocks on writing it."""
    fd = os.memfd_create("stdin", 0)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    os.dup2(fd, 0)
    os.close(fd)


def _lower(kind: int, soft: int, hard: int | None = None) -> None:
    ceiling = resource.getrlimit(kind)[1]
    hard = soft if hard is None else hard
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def apply_limits(settings: dict[str, Any], base_bytes: int, filtered: bool) -> None:
    """Set the run's own limits; memory counts from what the warm interpreter already maps."""
    memory = base_bytes + settings["memory_mb"] * _MIB
    _lower(resource.RLIMIT_AS, memory, memory + _RESERVE)
    _lower(resource.RLIMIT_FSIZE, settings["file_mb"] * _MIB)
    _lower(resource.RLIMIT_NPROC, settings["processes"])
    used = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
    _lower(resource.RLIMIT_CPU, used + settings["cpu_s"], used + settings["cpu_s"] + 1)
    if filtered:
        seccomp.install(CPU_LIMIT_LOCK)


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def _fresh_streams() -> _CountingFile:
    raw = _CountingFile(1, "wb", closefd=False)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="replace")
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "wb", closefd=False), encoding="utf-8", errors="backslashreplace", write_through=True
    )
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))
    return raw


def _main_module() -> dict[str, Any]:
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    module.__dict__["__file__"] = MAIN
    sys.modules["__main__"] = module
    sys.argv = [MAIN]
    return module.__dict__


def rehearse() -> list[types.ModuleType]:
    """In the zygote: do once what every run does, so that children find it done, and hide our modules from them.

    Returns the hidden modules; the caller keeps them alive.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for source in ("x = 1\nx", "def f():\n    1 / 0\nf()", "def"):
        try:
            with open(os.devnull, "wb", buffering=0) as null, contextlib.redirect_stdout(io.StringIO()):  # noqa: PTH123
                run_source(source, names, _CountingFile(null.fileno(), "wb", closefd=False))
        except Exception as error:
            json.loads(json.dumps(describe(error)))
    linecache.clearcache()
    _seed(0)
    ours = [name for name in sys.modules if name == "sandbox" or name.startswith("sandbox.")]
    return [sys.modules.pop(name) for name in ours]


def _exit_code(code: object) -> int:
    """Exit status of `SystemExit(code)`, as Python computes it; never 0 for a failure."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code if 0 <= code <= 255 else 255
    with contextlib.suppress(BaseException):
        sys.stderr.write(f"{code}\n")
    return 1


def _finish() -> None:
    """What the interpreter does at its end: threads, atexit, buffers. User code may break any of it."""
    import atexit
    import threading

    for step in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):  # type: ignore[attr-defined]
        with contextlib.suppress(BaseException):
            step()


def _flush_all(stdout: io.TextIOWrapper) -> None:
    for stream in (sys.stdout, stdout):
        with contextlib.suppress(BaseException):
            stream.flush()


def run(job_fd: int, report_fd: int, base_bytes: int, filtered: bool) -> None:
    """Waits for the job, runs it and exits; never returns."""
    settings, code, stdin = read_job(job_fd)
    os.close(job_fd)
    _provide_stdin(stdin)
    raw = _fresh_streams()
    stdout = sys.stdout
    names = _main_module()
    _seed(settings["seed"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.enable()
    apply_limits(settings, base_bytes, filtered)
    report: dict[str, Any] = {}
    status = 0
    try:
        run_source(code, names, raw)
    except SystemExit as error:
        status = _exit_code(error.code)
    except BaseException as error:
        status = 1
        if isinstance(error, MemoryError):
            _lower(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)[1])
        report = describe(error)
    _finish()
    _flush_all(stdout)  # type: ignore[arg-type]
    if report:
        with contextlib.suppress(BaseException):
            os.write(report_fd, json.dumps(report).encode("ascii"))
    os._exit(status)
