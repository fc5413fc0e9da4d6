"""System calls prepared in advance: a list that a freshly forked child only has to go through.

A child that confined itself in ordinary Python would touch hundreds of pages it shares with the zygote, and the kernel
copies each of them. Here everything that can be known before the fork is ready before it: numbers, texts, structures.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

from sandbox.linux.numbers import ALLOWED, PRIVILEGED, SPECIAL
from sandbox.linux.syscalls import MACHINE

_CALL = ctypes.PyDLL(None, use_errno=True).syscall
_CALL.restype = ctypes.c_long
_CALL.argtypes = (ctypes.c_long,) * 7

AT_FDCWD = -100


class Slot:
    """An argument that differs from child to child: `Calls.put` sets it before the fork."""


Argument = int | bytes | Slot | ctypes.Array[Any] | ctypes.Structure


def number(name: str) -> int:
    """The number of a system call on this processor. Raises `KeyError` for one that nobody here needed yet."""
    for table in (ALLOWED, SPECIAL, PRIVILEGED):
        if name in table[MACHINE]:
            return table[MACHINE][name]
    raise KeyError(name)


class Calls:
    """Made once, performed in every child. Texts and structures that are passed are kept alive here."""

    def __init__(self) -> None:
        self._rows: list[list[int]] = []
        self._steps: list[tuple[list[int], int, list[int] | None, str]] = []
        self._slots: dict[Slot, list[tuple[int, int]]] = {}
        self._kept: list[object] = []

    def add(self, name: str, *arguments: Argument, returns: int = -1, says: str = "") -> None:
        """Append the system call `name`. `returns`: what it must give (a descriptor's number), else anything but an
        error; `says`: how the call is named when it fails."""
        self._steps.append((self._row(name, arguments), returns, None, says or name))

    def otherwise(self, name: str, *arguments: Argument) -> None:
        """Where the call added last is refused with EPERM, do this one."""
        row, returns, _, says = self._steps[-1]
        self._steps[-1] = (row, returns, self._row(name, arguments), says)

    def _row(self, name: str, arguments: tuple[Argument, ...]) -> list[int]:
        row = [number(name), *(self._address(argument) for argument in arguments)]
        for position, argument in enumerate(arguments, 1):
            if isinstance(argument, Slot):
                self._slots.setdefault(argument, []).append((len(self._rows), position))
        row += [0] * (7 - len(row))
        self._rows.append(row)
        return row

    def _address(self, argument: Argument) -> int:
        if isinstance(argument, int):
            return argument
        if isinstance(argument, Slot):
            return 0
        if isinstance(argument, bytes):
            argument = ctypes.create_string_buffer(argument)
        self._kept.append(argument)
        return ctypes.addressof(argument)

    def put(self, slot: Slot, value: int) -> None:
        """Set an argument of the calls that are to come."""
        for row, position in self._slots.get(slot, ()):
            self._rows[row][position] = value

    def perform(self) -> None:
        """Make all calls, in order. Raises `OSError` that names the first one which fails."""
        call = _CALL
        for row, returns, instead, name in self._steps:
            result = call(*row)
            if result < 0 and instead is not None and ctypes.get_errno() == errno.EPERM:
                result = call(*instead)
            if result < 0:
                code = ctypes.get_errno()
                raise OSError(code, f"{name}: {os.strerror(code)}")
            if returns >= 0 and result != returns:
                raise OSError(errno.EBADF, f"{name}: got {result}, not {returns}")
