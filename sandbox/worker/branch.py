"""Copying a live interpreter: the fork itself, and what makes the copy a session of its own.

The copy is a child of the zygote (CLONE_PARENT), not of the interpreter that is copied: its end is attested by the
zygote's wait status, user code that waits for "any child" does not see it, and it outlives its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import random
import select
import signal
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sandbox.linux import landlock
from sandbox.linux import syscalls as sys_
from sandbox.linux.numbers import SPECIAL
from sandbox.paths import BRANCHES
from sandbox.worker import root, stage
from sandbox.worker.files import MAX_DEPTH, FileError, walk

COPY_BYTES = 32 * 1024 * 1024
"""Files of a work folder larger than this in all make it `fork_unsafe`."""
COPY_ENTRIES = 4_000
_CLONE_PARENT, _CLONE_CHILD_SETTID, _CLONE_CHILD_CLEARTID = 0x8000, 0x01000000, 0x00200000
_PR_GET_TID_ADDRESS, _PR_SET_DUMPABLE = 40, 4
_HARMLESS_DEVICES = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)}  # null, zero, full, random, urandom
_HELD = ctypes.PyDLL(None, use_errno=True)  # calls that keep the interpreter lock: nothing may run around a fork


def _tid_address() -> int:
    """Where libc keeps the main thread's id, which the kernel must correct in a copy; 0 when it cannot be told."""
    pointer = ctypes.c_void_p()
    if not sys_.SUPPORTED or _HELD.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(pointer), 0, 0, 0) != 0 or not pointer.value:
        return 0
    known = ctypes.c_int.from_address(pointer.value).value
    return pointer.value if known == os.getpid() else 0


_TID_ADDRESS = _tid_address()


def watch_handlers() -> None:
    """In the zygote, once warm: notice whether user code asks for something to be done around a fork.

    What Python and the libraries of a profile do there is for processes with threads and for random numbers; a copy has
    one thread and is seeded anyway, and it would cost a tenth of the copy's time.
    """

    def noticing(*args: Any, **kwargs: Any) -> None:
        register(*args, **kwargs)
        _HANDLERS.append(True)

    register = os.register_at_fork
    for module in (os, sys.modules["posix"]):
        module.register_at_fork = functools.update_wrapper(noticing, register)  # type: ignore[attr-defined]


_HANDLERS: list[bool] = []


def clone_sibling() -> int:
    """`os.fork` with our parent as the copy's parent. Returns 0 in the copy. Raises `OSError`."""
    flags = _CLONE_PARENT | signal.SIGCHLD
    if _TID_ADDRESS:
        flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
    tid, none = ctypes.c_void_p(_TID_ADDRESS), ctypes.c_void_p(0)
    last = (tid, none) if sys_.MACHINE == "x86_64" else (none, tid)
    number = ctypes.c_long(SPECIAL[sys_.MACHINE]["clone"])
    arguments = (number, ctypes.c_long(flags), none, none, *last)
    call, error = _HELD.syscall, ctypes.get_errno
    handlers = bool(_HANDLERS)
    if handlers:
        ctypes.pythonapi.PyOS_BeforeFork()
    pid = call(*arguments)
    if pid == 0:
        if handlers:
            ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    code = error()
    if handlers:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(code, f"clone: {os.strerror(code)}")
    return int(pid)


@dataclass
class Home:
    """Where an interpreter lives: its work folder, and the folder beneath which its Landlock layer lets it write."""

    folder: str
    domain: str


class Unsafe(Exception):
    """The interpreter cannot be copied; the message says why."""


def _all_descriptors() -> select.poll:
    poller = select.poll()
    for fd in range(3, 256):
        poller.register(fd, 0)
    return poller


_ALL = _all_descriptors()


def _open_descriptors(ours: Iterable[int]) -> list[int]:
    """Descriptors above 2 that are open and not ours. One `poll` asks for all of them."""
    closed = {fd for fd, event in _ALL.poll(0) if event & select.POLLNVAL}
    return [fd for fd in range(3, 256) if fd not in closed and fd not in ours]


def check(ours: Iterable[int]) -> list[tuple[int, int, int]]:
    """Whether a copy could be a session: (descriptor, device, inode) of files to be opened anew. Raises `Unsafe`."""
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        pass
    else:
        raise Unsafe(f"the session has a child process that {'nobody waited for' if ended else 'runs'}")
    files = []
    for fd in _open_descriptors(ours):
        found = os.fstat(fd)
        if stat.S_ISCHR(found.st_mode) and (os.major(found.st_rdev), os.minor(found.st_rdev)) in _HARMLESS_DEVICES:
            continue
        if stat.S_ISREG(found.st_mode) and found.st_nlink:
            files.append((fd, found.st_dev, found.st_ino))
        else:
            kind = "a deleted file" if stat.S_ISREG(found.st_mode) else "a pipe, socket or folder"
            raise Unsafe(f"descriptor {fd} is {kind}: copies would share it; close it first")
    return files


def copy_folder(old: str, new: str, cap: int) -> dict[tuple[int, int], str]:
    """Copy the files of `old` into the new folder `new`; (device, inode) -> path. Raises `Unsafe`, `OSError`."""
    try:
        os.mkdir(new, 0o700)  # noqa: PTH102
    except FileNotFoundError:  # the first copy
        with contextlib.suppress(FileExistsError):  # another member of the tree was quicker
            os.mkdir(os.path.dirname(new), 0o700)  # noqa: PTH102, PTH120
        os.mkdir(new, 0o700)  # noqa: PTH102
    paths: dict[tuple[int, int], str] = {}
    base = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not set(os.listdir(base)) - {BRANCHES}:  # noqa: PTH208
            return paths  # as most folders are
        _check_size(base, cap)
        for folder, name, path, found in walk(base):
            target = f"{new}/{path}"
            if stat.S_ISDIR(found.st_mode):
                os.mkdir(target, 0o700)  # noqa: PTH102
            elif stat.S_ISLNK(found.st_mode):
                os.symlink(os.readlink(name, dir_fd=folder), target)  # noqa: PTH211
            elif stat.S_ISREG(found.st_mode):
                _copy_file(folder, name, target)
                paths[found.st_dev, found.st_ino] = target
            else:
                raise Unsafe(f"the work folder holds {path!r}, which is neither file, folder nor link")
    finally:
        os.close(base)
    return paths


def _check_size(base: int, cap: int) -> None:
    total = 0
    for count, (_, _, _, found) in enumerate(walk(base), 1):
        total += found.st_size
        if total > cap or count > COPY_ENTRIES:
            raise Unsafe(
                f"the work folder holds {total} bytes or more in {count} entries or more; "
                f"at most {cap >> 20} MiB and {COPY_ENTRIES} entries are copied"
            )


def remove_folder(path: str, parent: int | None = None, deepest: int = MAX_DEPTH) -> None:
    """Best effort; links are not followed. `shutil.rmtree` would drag much of a warm interpreter into this process."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            for name in os.listdir(folder):  # noqa: PTH208
                try:
                    os.unlink(name, dir_fd=folder)
                except OSError:
                    if deepest:
                        remove_folder(name, folder, deepest - 1)
        finally:
            os.close(folder)
        os.rmdir(path, dir_fd=parent)


def _copy_file(folder: int, name: str, target: str) -> None:
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        found = os.fstat(source)
        copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            while os.sendfile(copy, source, None, 1 << 24):
                pass
            os.fchmod(copy, stat.S_IMODE(found.st_mode))
        finally:
            os.close(copy)
    finally:
        os.close(source)


def _reopen(files: list[tuple[int, int, int]], paths: dict[tuple[int, int], str]) -> None:
    """Let descriptors of the old folder's files mean the copies, at the same offset."""
    for fd, device, inode in files:
        path = paths.get((device, inode))
        if path is None:
            raise Unsafe(f"descriptor {fd} is a file outside the work folder: copies would share its offset; close it")
        flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC)
        offset = os.lseek(fd, 0, os.SEEK_CUR)
        inheritable = os.get_inheritable(fd)
        copy = os.open(path, flags | os.O_CLOEXEC)
        os.lseek(copy, offset, os.SEEK_SET)
        os.dup2(copy, fd, inheritable)
        os.close(copy)


def readable_paths(workdir: str) -> list[str]:
    """What a branch may still read besides its own folder: all that its parent may, save other work folders."""
    prefixes = (sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path)
    candidates = [*root.SYSTEM_PATHS, *root.ETC_FILES, "/etc", "/proc", "/dev", *prefixes]
    real = {os.path.realpath(path) for path in candidates if path}
    ours = ("/", workdir)
    found = [p for p in real if p not in ours and not workdir.startswith(p + "/") and os.path.exists(p)]  # noqa: PTH110
    return sorted(p for p in found if not any(p.startswith(other + "/") for other in found))


@dataclass
class Plan:
    """Where a copy will live, made ready for it by the original, which has done all this before: a fresh copy pays for
    every page that it is the first to touch."""

    new: Home
    workdir: str
    files: list[tuple[int, int, int]]
    paths: dict[tuple[int, int], str]
    ruleset: int
    seed: int | None

    def drop(self) -> None:
        """Close what the original does not need once it has been copied."""
        if self.ruleset >= 0:
            os.close(self.ruleset)
            self.ruleset = -1


def plan(home: Home, fields: dict[str, Any], ours: Iterable[int], granted: list[tuple[str, int]]) -> Plan:
    """In the original: check that it can be copied, copy its folder, and open what the copy's walls are made of.

    `granted`: what it may reach besides its folder. `fields`: folder (its name), layer (whether to add a Landlock
    layer), seed (None: keep the state).
    Raises `Unsafe`, `OSError`; nothing is left behind then.
    """
    files = check(ours)
    folder = f"{home.domain}/{BRANCHES}/{fields['folder']}"
    ruleset = -1
    try:
        paths = copy_folder(home.folder, folder, COPY_BYTES)
        if fields["layer"] and landlock.abi():
            ruleset = landlock.build([*granted, (folder, landlock.rights().everything)])
    except BaseException:
        remove_folder(folder)
        raise
    new = Home(folder, folder if fields["layer"] else home.domain)
    return Plan(new, _counterpart(home.folder, folder), files, paths, ruleset, fields["seed"])


def _counterpart(old: str, new: str) -> str:
    """Where the copy is when the original is where it is now; its folder where there is no such place."""
    try:
        inside = os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return new
    counterpart = new + inside[len(old) :]
    return counterpart if inside.startswith(old + "/") and os.path.isdir(counterpart) else new  # noqa: PTH112


def settle(plan: Plan) -> Home:
    """In the copy: take the folder, walls and random numbers of its own. Returns where it lives now.

    Raises `Unsafe`, `OSError`.
    """
    _reopen(plan.files, plan.paths)
    os.chdir(plan.workdir)
    if plan.ruleset >= 0:
        landlock.restrict_self(plan.ruleset)
    if plan.seed is not None:
        stage.seed_all(plan.seed)
    return plan.new


def furnish(home: Home) -> None:
    """In the copy, before its first command: the environment names its folder."""
    stage.set_home(home.folder)
    tempfile = sys.modules.get("tempfile")
    if tempfile is not None:
        tempfile.__dict__["tempdir"] = None  # found anew, from TMPDIR


def remove_dead(home: Home, names: Iterable[str]) -> None:
    """Folders of copies that nobody needs any more."""
    for name in names:
        remove_folder(f"{home.domain}/{BRANCHES}/{name}")


def sleep() -> None:
    """Turn this copy into a snapshot: processes of the same user can neither signal nor look into it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, set(range(1, signal.NSIG)) - {signal.SIGKILL, signal.SIGSTOP})
    sys_.prctl(_PR_SET_DUMPABLE, 0)


def wake() -> None:
    """In a copy of a snapshot: be an ordinary session again."""
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    sys_.prctl(_PR_SET_DUMPABLE, 1)


def random_states() -> tuple[Any, Any]:
    """States of `random` and numpy's global generator: a fork reseeds the first."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state() if numpy is not None else None


def set_random_states(states: tuple[Any, Any]) -> None:
    """Inverse of `random_states`."""
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])


__all__ = ["FileError", "Home", "Plan", "Unsafe", "check", "clone_sibling", "furnish", "plan", "remove_dead", "settle"]
