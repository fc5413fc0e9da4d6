"""The memory of a warm interpreter, laid out so that forks are cheap."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from sandbox.linux import syscalls as sys_

_HUGE = 2 << 20
_SIZES = (*(2**power for power in range(16, 10, -1)), *range(1016, 0, -16))  # large ones first: what is left is smaller
_BYTES_HEADER = sys.getsizeof(b"")


def address_space() -> int:
    """Bytes this process has mapped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def threads() -> int:
    """Threads of this process: a zygote must have one, or forks would copy locks nobody will release."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def collapse_heap() -> int:
    """Gather the heap in huge pages (Linux 6.1); returns how many.

    A fork then copies one page table entry where it would copy 512, and the exit of the child drops one. Only an
    optimisation: where the kernel refuses nothing changes.
    """
    count = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, *rest = line.split()
        if rights != "rw-p" or rest[3:] not in ([], ["[heap]"]):
            continue
        start, end = (int(edge, 16) for edge in span.split("-"))
        for address in range(-(-start // _HUGE) * _HUGE, end - _HUGE + 1, _HUGE):
            count += sys_.madvise(address, _HUGE, sys_.MADV_COLLAPSE)
    return count


def fill_pools() -> list[bytes]:
    """Use up the free blocks among the objects of this process; keep what is returned.

    What a child allocates then comes to lie in fresh pages of its own, instead of making it copy one page here and
    one there. Only an optimisation: where the allocator has no statistics nothing changes.
    """
    fillers = []
    for size, free in _free_blocks().items():
        fillers += [bytes(size - _BYTES_HEADER) for _ in range(free) if size >= _BYTES_HEADER]
    return fillers


def fill_heap() -> int:
    """The same for what libc has free between its blocks; returns how many bytes are used up."""
    used = 0
    left, top = sys_.free_memory()
    for size in _SIZES:
        while used < left:
            block = sys_.malloc(size)
            if not block or block >= top:  # nothing of that size is left in between
                sys_.free(block)
                break
            used += size
    return used


def _free_blocks() -> dict[int, int]:
    """Of CPython's allocator: size of a block -> how many are free in pools that are in use."""
    saved, report = os.dup(2), os.memfd_create("allocator")
    try:
        os.dup2(report, 2)
        sys._debugmallocstats()
        os.dup2(saved, 2)
        text = os.pread(report, 1 << 20, 0).decode("ascii", "replace")
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(report)
    rows = re.findall(r"^ *\d+ +(\d+) +\d+ +\d+ +(\d+)$", text, re.MULTILINE)
    return {int(size): int(free) for size, free in rows}
