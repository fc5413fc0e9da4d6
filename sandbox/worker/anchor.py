"""A second process on the same memory, so that the end of a run is known before its memory has been taken down.

The kernel reports the end of a process only after it has freed what the process alone had mapped: one to several
milliseconds for an interpreter. While an anchor shares the memory, the wait status comes at once, and the memory goes
with the anchor, which is killed with everything else of the run when nobody waits any more.

The anchor runs one libc function, `getc_unlocked` on a stream of its own, on a stack of its own, deaf to all signals
but SIGKILL. The stream is the run's report: the supervisor holds the far end and never writes to it, so that all that
ever comes is its end, and no anchor outlives the supervisor. It is a socket of this run alone, because user code can do
to an anchor what it likes, and one that can be opened again, like a pipe in /proc, could be written to. `wait` does not
find an anchor, because it sends no signal when it ends. A session has none.

What code can write over is also the anchor's stack, so it can have it do what it wants. It is therefore made when the
run's limits are set and its filters are in force, which it inherits.
"""

from __future__ import annotations

import ctypes
import mmap
import signal

from sandbox.linux import syscalls as sys_
from sandbox.linux.calls import Calls

_STACK = 64 * 1024
_BUFFER = 4096


class Anchor:
    """Made in the zygote; `drop` is called in each child. `stream`: a descriptor that can be read, the same number in
    both."""

    def __init__(self, stream: int) -> None:
        # Private: by default it would be one piece of memory for all children, and one run could write on the stacks
        # of the others' anchors.
        self._memory = mmap.mmap(-1, _STACK + _BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._stream = sys_.read_stream(stream, base + _STACK, _BUFFER)
        self._top = ctypes.c_void_p(base + _STACK)
        all_signals, before = (ctypes.c_uint64 * 1)(2**64 - 1), (ctypes.c_uint64 * 1)()
        self._deaf, self._after = Calls(), Calls()
        self._deaf.add("rt_sigprocmask", signal.SIG_SETMASK, all_signals, before, 8)
        self._after.add("rt_sigprocmask", signal.SIG_SETMASK, before, 0, 8)

    def rehearse(self) -> None:
        """In the child, while nobody waits: what `drop` writes to is then this process's own memory already."""
        self._deaf.perform()
        sys_.clone_reader(ctypes.c_void_p(0), self._stream)  # libc refuses: there is no stack
        self._after.perform()

    def drop(self) -> None:
        """Start the anchor; a run that may not have one more process goes on without."""
        self._deaf.perform()
        sys_.clone_reader(self._top, self._stream)
        self._after.perform()
