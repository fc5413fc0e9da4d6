"""A tree: a child of the warm unit and every copy made of it. One user id, one process namespace, one trust domain."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from sandbox.linux import landlock
from sandbox.linux.calls import number
from sandbox.linux.syscalls import syscall
from sandbox.supervisor.cores import pid_of
from sandbox.supervisor.sessions_interpreter import Interpreter, Place
from sandbox.supervisor.unit import Child, Unit
from sandbox.tiers import Tier
from sandbox.types import Limits, SandboxInfraError, SessionError

MAX_MEMBERS = 256
"""Live interpreters of one tree, sleeping snapshots included."""
_END_S = 10.0
_SCOPED_SIGNALS = 6
"""The version of Landlock from which on nobody confined can signal whom it does not confine."""


class Tree:
    """`release` ends one member. When there is none left, and none on its way, the whole tree is killed and its user id
    given back."""

    def __init__(self, unit: Unit, root: Child, pid: int, limits: Limits, give_back: Callable[[bool], None]) -> None:
        self.unit, self.root, self.limits = unit, root, limits
        self.members: set[Interpreter] = set()
        self.copied = False
        """Whether there are, or ever were, several members."""
        self.user, _ = owner_and_parent(pid)
        self.namespace = _namespace(pid) if unit.tier.namespaces else ""
        self._give_back = give_back
        self._parents: dict[int, int] = {}  # Landlock domain -> the one it was made in; 0 is the root's
        self._places = 0
        self._empty: list[Place] = []  # of members that have ended
        self._copies = 0  # under way
        self._over = False

    @contextlib.asynccontextmanager
    async def copying(self) -> AsyncIterator[None]:
        """While a copy is made the tree does not end: the last member may be closed meanwhile."""
        self._copies += 1
        try:
            yield
        finally:
            self._copies -= 1
            await asyncio.shield(self._end_if_empty())

    def next_place(self, source: Place, layer: bool) -> Place:
        """Where a copy of somebody at `source` will live; no place is given twice."""
        self._places += 1
        if not layer:
            return Place(str(self._places), source.domain, source.domain)
        self._parents[self._places] = source.domain
        return Place(str(self._places), source.domain, self._places)

    def add(self, member: Interpreter) -> None:
        """A new member; the tree may hold that much more memory. Raises `OSError`, `SessionError`."""
        self.copied = self.copied or bool(self.members)
        self.members.add(member)
        if self.root.group is not None:
            try:
                self.root.group.limit(self.unit.group_mib(self.limits, len(self.members)))
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                # Of version 1 only: members that have ended let the others take what was theirs.
                raise SessionError("the session holds more memory than it and its copies may", "fork_unsafe") from None

    def dead_folders(self, domain: int) -> list[str]:
        """Folders that a member in `domain` may remove, each named once: nobody lives in or below them any more."""
        inhabited = {0}
        for member in self.members:
            number = member.place.domain
            while number not in inhabited:
                inhabited.add(number)
                number = self._parents[number]
        dead = [
            place
            for place in self._empty
            if place.outer == domain and (place.domain == place.outer or place.domain not in inhabited)
        ]
        self._empty = [place for place in self._empty if place not in dead]
        return [place.folder for place in dead]

    @property
    def processes(self) -> int:
        """What RLIMIT_NPROC of a member must be: it counts every process of the tree."""
        return self.limits.processes + max(0, len(self.members) - 1)

    def allow(self, member: Interpreter, processes: int = 0) -> bool:
        """Let a member have so many processes (0: as before); False where we may not. Then it does so itself, and so
        may its code."""
        try:
            pid = pid_of(member.child.process)
            with _real_user(self.user, self.unit.tier):
                soft, hard = resource.prlimit(pid, resource.RLIMIT_NPROC)
                if processes:
                    soft = processes if hard < 0 else min(processes, hard)
                    resource.prlimit(pid, resource.RLIMIT_NPROC, (soft, hard))
        except (OSError, ValueError):
            return False
        return True

    def holds(self, pid: int) -> bool:
        """Whether a process is of this tree and a child of the zygote. Raises `OSError` when it cannot be told."""
        user, parent = owner_and_parent(pid)
        if user != self.user or parent != self.unit.zygote_pid:
            return False
        return not self.namespace or _namespace(pid) == self.namespace

    def has(self, pid: int) -> bool:
        """Whether a process is a member already."""
        return any(member.pid == pid for member in self.members)

    def leave(self, place: Place) -> None:
        """Nobody lives there, or ever did: its folder goes when its neighbours make the next copy."""
        if place.folder and place not in self._empty:
            self._empty.append(place)

    async def release(self, member: Interpreter) -> None:
        """End a member and close what belongs to it."""
        if member not in self.members:
            return
        self.members.discard(member)
        member.kill()
        self.leave(member.place)
        await _ended(member.child)
        member.detach()
        if member.child is self.root:
            _close_streams(member.child)  # the rest is needed to end the tree
        else:
            member.child.close()
        await self._end_if_empty()

    async def _end_if_empty(self) -> None:
        if self.members or self._copies or self._over:
            return
        self._over = True
        clean = False
        try:
            clean = await self.unit.kill(self.root)
        finally:
            self.root.close()
            self._give_back(clean)


async def _ended(child: Child) -> None:
    """Until the kernel has said how it ended; not for ever."""
    try:
        async with asyncio.timeout(_END_S):
            await _quiet(asyncio.shield(child.exited))
    except TimeoutError:
        pass


async def _quiet(waiting: Awaitable[object]) -> None:
    with contextlib.suppress(SandboxInfraError):
        await waiting


def _close_streams(child: Child) -> None:
    for name in ("job", "stdout", "stderr", "report"):
        fd = getattr(child, name)
        if fd >= 0:
            os.close(fd)
            setattr(child, name, -1)


@contextlib.contextmanager
def _real_user(uid: int, tier: Tier) -> Iterator[None]:
    """For root without CAP_SYS_RESOURCE: whose real ids are those of a process may set its limits.

    And be sent its signals, which is why this is done only where its code can name no process outside.
    """
    if os.geteuid() != 0 or not (tier.namespaces or landlock.abi() >= _SCOPED_SIGNALS):
        yield
        return
    _set_real("setresgid", uid)
    try:
        _set_real("setresuid", uid)
        yield
    finally:
        _set_real("setresuid", 0)
        _set_real("setresgid", 0)


def _set_real(call: str, ident: int) -> None:
    """Of this thread alone, unlike `os.setresuid`, which waits until every thread of the process has done the same."""
    syscall(call, number(call), ctypes.c_int(ident), ctypes.c_int(-1), ctypes.c_int(-1))


def leads(pid: int) -> bool:
    """Whether a process leads a session and group of its own; it does for life then. Raises `OSError`."""
    return os.getsid(pid) == os.getpgid(pid) == pid


def owner_and_parent(pid: int) -> tuple[int, int]:
    """Real user id and parent of a process, as the kernel says. Raises `OSError`."""
    status = _status(pid)
    return _field(status, b"\nUid:"), _field(status, b"\nPPid:")


def threads(pid: int) -> int:
    """Threads of a process. Raises `OSError`.

    The kernel counts them as links of this folder, which is much quicker to ask than for all of its status.
    """
    return os.stat(f"/proc/{pid}/task").st_nlink - 2  # noqa: PTH116


def _status(pid: int) -> bytes:
    fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 8192)
    finally:
        os.close(fd)


def _field(status: bytes, name: bytes) -> int:
    """The first number of a line. Process names cannot hold a line break: the kernel escapes them."""
    start = status.index(name) + len(name)
    return int(status[start : status.index(b"\n", start)].split()[0])


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid")  # noqa: PTH115


__all__ = ["MAX_MEMBERS", "Tree", "leads", "owner_and_parent", "threads"]
