"""What a confined child does: reads its job, and is then one program's process or a session's interpreter.

What is reported here is never trusted: user code shares this process. A program's outcome comes from the wait status;
the report only adds the text of an exception, rich results and files.
"""

from __future__ import annotations

import _signal  # what `signal` wraps in enumerations, which a run has no use for
import atexit
import contextlib
import gc
import io
import json
import os
import signal
import struct
import sys
import threading
import types
from typing import Any

from sandbox.linux.syscalls import kill_process
from sandbox.worker import channel, files, session, stage
from sandbox.worker.anchor import Anchor
from sandbox.worker.display import MAIN, describe, packed, rich_results, run_source

JOB_HEADER = struct.Struct("!II")
READY_BYTE = b"R"


def read_job(fd: int) -> tuple[dict[str, Any], str, bytes]:
    """Blocks until the job comes: (settings, code, stdin)."""
    settings_size, code_size = JOB_HEADER.unpack(channel.read_exactly(fd, JOB_HEADER.size))
    settings = json.loads(channel.read_exactly(fd, settings_size))
    code = channel.read_exactly(fd, code_size).decode("utf-8")
    return settings, code, channel.read_exactly(fd, settings["stdin_size"])


def rehearse() -> list[types.ModuleType]:
    """In the zygote: do once what every run does, so that children find it done, and hide our modules from them.

    Returns the hidden modules; the caller keeps them alive.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for source in ("x = 1\nx", "def f():\n    1 / 0\nf()", "def"):
        try:
            with open(os.devnull, "wb", buffering=0) as null, contextlib.redirect_stdout(io.StringIO()):  # noqa: PTH123
                run_source(source, names, stage.CountingFile(null.fileno(), "wb", closefd=False))
        except Exception as error:
            json.loads(json.dumps(describe(error)))
    os.kill = sys.modules["posix"].kill = _kill  # type: ignore[attr-defined]
    ours = [name for name in sys.modules if name == "sandbox" or name.startswith("sandbox.")]
    return [sys.modules.pop(name) for name in ours]


def _kill(pid: int, number: int, /) -> None:
    """`os.kill` for user code: SIGKILL goes by tgkill, which cannot hit one of our own threads by its id.

    The filter refuses the other way, because a SIGKILL to oneself would look like our failure.
    """
    if number == signal.SIGKILL and pid > 0:
        kill_process(pid)
    else:
        _plain_kill(pid, number)


_plain_kill = os.kill


def _finish() -> None:
    """What the interpreter does at its end, but for its buffers: threads, atexit. User code may break any of it."""
    for step in (_end_threads, atexit._run_exitfuncs):
        with contextlib.suppress(BaseException):
            step()


def _end_threads() -> None:
    """Wait for them, if there were any: where there are none it is a dear way of doing nothing."""
    if threading.active_count() > 1 or getattr(threading, "_threading_atexits", True):
        threading._shutdown()  # type: ignore[attr-defined]


def _receive_files(fd: int, table: list[tuple[str, int]]) -> str:
    """Write the job's files; why that failed, or nothing."""
    failed = ""
    for path, size in table:
        data = channel.read_exactly(fd, size)
        try:
            files.write(".", path, data)
        except files.FileError as error:
            failed = failed or str(error)
    return failed


def _fetch(folder: str, paths: list[str], cap: int, report: dict[str, Any]) -> bytes:
    """The files that exist and are regular, one after another; which they are and their sizes go into the report."""
    table, bodies = [], []
    for number, path in enumerate(paths):
        try:
            body = files.read(folder, path, cap)
        except (files.FileError, OSError) as error:
            if isinstance(error, files.FileError) and error.code == "too_large":
                report["too_large"] = str(error)
            continue
        cap -= len(body)
        table.append((number, len(body)))
        bodies.append(body)
    report["files"] = table
    return b"".join(bodies)


_HUGE = 1 << 40
_SETTINGS = {"stdin_size": 0, "memory_mb": _HUGE >> 20, "processes": 1 << 30, "file_mb": _HUGE >> 20, "cpu_s": 1 << 30}
_JOB = json.dumps(_SETTINGS).encode()
_SOURCE = b"print(end='')\nNone"


def prepare(stand: stage.Stand) -> None:
    """Once through what every program will do. In the child, before anybody waits for it, so that the memory that is
    written then is this process's own already; in the zygote several times, so that the code is optimised."""
    near, far = os.pipe()
    os.write(far, JOB_HEADER.pack(len(_JOB), len(_SOURCE)) + _JOB + _SOURCE)
    settings, code, _ = read_job(near)
    os.close(near)
    os.close(far)
    gc.freeze()
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # as it is
    stage.apply_limits(settings, 0, filtered=False)  # more than anybody asks for
    run_source(code, {"__name__": "__main__"}, stand.raw)
    stand.raw.write(b"")
    _finish()
    stage.flush_all(stand.stdout)


def run(
    stand: stage.Stand, job_fd: int, report_fd: int, base_bytes: int, filtered: bool, anchor: Anchor | None
) -> None:
    """Waits for the job and does it; never returns."""
    settings, code, stdin = read_job(job_fd)
    gc.freeze()  # what there is now is nothing that a collection in this process could free
    gc.enable()
    if settings.get("mode") == "session":
        session.serve(stand, job_fd, report_fd, settings, base_bytes, filtered)
    settings["processes"] += anchor is not None
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)  # ignored until here
    if stdin:
        stage.provide_stdin(stdin)
    report: dict[str, Any] = {}
    unwritten = _receive_files(job_fd, settings.get("files", []))
    os.close(job_fd)
    if settings["seed"]:  # the zygote has begun with 0
        stage.seed_all(settings["seed"])
    stage.apply_limits(settings, base_bytes, filtered)
    if anchor is not None:
        anchor.drop()  # not before: code can make it do anything, so it needs every limit and filter that there is
    folder = os.getcwd()  # noqa: PTH109
    shown: list[Any] = []
    display = b""
    status = 0
    if unwritten:
        channel.write_exactly(report_fd, channel.pack(channel.DONE, 0, {"unwritten": unwritten}))
        os._exit(0)
    if settings.get("files"):
        channel.write_exactly(report_fd, channel.WRITTEN)
    try:
        run_source(code, stand.names, stand.raw, MAIN, shown if settings.get("rich") else None)
        if settings.get("rich"):
            report["display"], display = packed(rich_results(shown))
    except SystemExit as error:
        status = stage.exit_code(error.code)
    except BaseException as error:
        status = 1
        with stage.memory_reserve() if isinstance(error, MemoryError) else contextlib.nullcontext():
            report["exception"] = describe(error)
    _finish()
    stage.flush_all(stand.stdout)
    with contextlib.suppress(BaseException):
        body = _fetch(folder, settings["fetch"], settings["fetch_cap"], report) if settings.get("fetch") else b""
        if report or body:
            channel.write_exactly(report_fd, channel.pack(channel.DONE, 0, report, display + body))
    os._exit(status)
