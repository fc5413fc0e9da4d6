"""Frames between the supervisor and a confined interpreter: commands on the job socket, answers on the report.

A command is sent when the answer to the one before has come, so nobody reads ahead. What comes back is bounded by the
supervisor and believed in nothing that matters: user code shares the process that writes it.
"""

from __future__ import annotations

import json
import os
import struct
from typing import Any

FRAME = struct.Struct("!cIII")
"""Kind, sequence number, bytes of JSON, bytes of data."""
HEAD_BYTES = 512 * 1024
"""The most JSON that an answer has; whatever may be large travels as data."""

EXEC = b"X"
"""settings: stdin_size, rich, processes. data: code and standard input. Answer: exception, exit_code, rss,
display (see `display.packed`; the texts are the data)."""
PUT = b"P"
"""settings: path. data: the file."""
GET = b"G"
"""settings: path, cap. Answered with the file as data."""
LIST = b"L"
"""Answered with the paths as data, a NUL between two. Answer: sizes, a list of theirs."""
FORK = b"F"
"""settings: see `branch.plan`; dead: folders of copies that have ended; processes: what RLIMIT_NPROC must be. Followed
by one byte that carries the copy's job socket, stdout, stderr and report."""
SLEEP = b"Z"
"""Become a snapshot: ignore signals, be no longer inspected by processes of the same user."""
DONE = b"D"
"""The answer to any command, on the report. JSON: `error` (code and message) when it failed."""

WRITTEN = b"W"
"""What a program's report begins with when it was given files: they are there, and its code begins. What comes later
may be the code's word."""

BORN, SETTLED = b"I", b"R"
"""What a copy says on its job socket, in this order. The kernel adds who it is."""
UNSAFE, FAILED = b"U", b"F"
"""What it says instead, followed by the reason."""


def pack(kind: bytes, number: int, fields: dict[str, Any] | None = None, data: bytes = b"") -> bytes:
    """One frame."""
    body = json.dumps(fields, separators=(",", ":")).encode("ascii") if fields else b""
    return FRAME.pack(kind, number, len(body), len(data)) + body + data


def read_exactly(fd: int, size: int) -> bytes:
    """`size` bytes of a blocking descriptor; the process ends where the supervisor has gone away."""
    data = os.read(fd, size) if size else b""
    if len(data) == size:
        return data
    chunks = [data]
    missing = size - len(data)
    while missing:
        chunk = os.read(fd, min(missing, 1 << 20)) if chunks[-1] else b""
        if not chunk:
            os._exit(0)
        chunks.append(chunk)
        missing -= len(chunk)
    return b"".join(chunks)


def write_exactly(fd: int, data: bytes) -> None:
    """All of `data` to a blocking descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
