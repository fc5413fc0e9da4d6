"""What our own processes run on: an event loop (uvloop, which costs less; asyncio's where it is not installed), and
standard streams."""

from __future__ import annotations

import asyncio
import os


def keep_standard_streams() -> None:
    """First of all in a process of ours: standard streams that are closed become /dev/null. Sockets would get their
    numbers otherwise, children would inherit them, and uvloop aborts when such a one is closed."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """For `asyncio.Runner(loop_factory=...)`."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
