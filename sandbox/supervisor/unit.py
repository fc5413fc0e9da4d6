"""A warm unit as the supervisor sees it: a warden and a zygote behind two sockets, and the children they make."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sandbox import wire
from sandbox.supervisor import folders
from sandbox.supervisor.cell import Cell
from sandbox.supervisor.cgroups import Group
from sandbox.supervisor.settings import CLEAN_ENVIRONMENT, Settings
from sandbox.tiers import Tier
from sandbox.types import Limits, SandboxInfraError

LIBC = {"LD_BIND_NOW": "1", "MALLOC_ARENA_MAX": "1"}
"""For a warm unit: libraries are linked once, and not in every child anew as it comes to call their functions; and
threads share one heap, where each would reserve 64 MiB of a limited address space."""
BOOT = Path(__file__).resolve().parent.parent / "boot.py"
SPAWN_TIMEOUT_S = 20.0
WARM_TIMEOUT_S = 60.0
_COPY_MIB = 64


_IDENTS = itertools.count(1)
"""Ids of children, unique in this supervisor: work folders are named by them."""


def next_ident() -> int:
    """A new id for a child."""
    return next(_IDENTS)


class UnitFailed(Exception):
    """The unit could not start; the message names the step."""


@dataclass(eq=False)
class Child:
    """One forked, confined child. Descriptors are the supervisor's ends and belong to whoever runs the child."""

    ident: int
    job: int
    stdout: int
    stderr: int
    report: int
    uid: int = 0
    cell: Cell | None = None  # the run's process namespace in tier `ns`
    group: Group | None = None  # where the machine has control groups; goes back to whoever lent it
    process: int = -1  # pidfd of the child itself
    exited: asyncio.Future[tuple[int, int, int]] = field(default_factory=asyncio.Future)
    """(wait status, CPU microseconds, largest resident KiB), or an exception when the unit is lost."""
    on_exit: Callable[[], None] | None = None
    """Called in the very moment in which `exited` is done: its callbacks come a turn of the loop later."""

    def end(self, found: tuple[int, int, int] | SandboxInfraError) -> None:
        """It has ended, or nobody will ever know how."""
        if self.exited.done():
            return
        if isinstance(found, SandboxInfraError):
            self.exited.set_exception(found)
            self.exited.exception()  # a child nobody waits for is not an unhandled error
        else:
            self.exited.set_result(found)
        if self.on_exit is not None:
            self.on_exit()

    def close(self) -> None:
        """Close every descriptor once; the process namespace, unless it was given back, goes too."""
        for name in ("job", "stdout", "stderr", "report", "process"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)
        if self.cell is not None:
            self.cell.close()
            self.cell = None


class Unit:
    """Start with `await start()`, make children with `spawn`, end with `stop`. `lost` is set when it died."""

    def __init__(self, settings: Settings, tier: Tier, uid_base: int) -> None:
        self.settings = settings
        self.tier = tier
        self.uid_base = uid_base
        self.lost = asyncio.Event()
        self.base_bytes = 0
        self.zygote_pid = 0
        self._children: dict[int, Child] = {}
        self._replies: dict[tuple[bytes, int], asyncio.Future[tuple[bytes, tuple[int, ...], list[int]]]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._sockets: list[socket.socket] = []
        self._cells: list[Cell] = []
        self._errors = Path(settings.work_root) / f"unit-{tier.name}-{id(self)}.log"

    @property
    def pid(self) -> int:
        """Process id of the warden."""
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Start warden and zygote and wait until warm. Raises `UnitFailed`."""
        warden, warden_far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        zygote, zygote_far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        config = {
            "tier": self.tier.name,
            "profile": self.settings.profile,
            "python_paths": self.settings.python_paths(),
            "module_paths": self.settings.module_paths,
            "uid": self.uid_base if os.geteuid() == 0 else os.geteuid(),
            "tmp_mb": self.settings.tmp_mb,
            "work_root": self.settings.work_root,
            "warden_fd": warden_far.fileno(),
            "zygote_fd": zygote_far.fileno(),
        }
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: ASYNC220 (a vfork; milliseconds)
                [sys.executable, "-s", "-P", str(BOOT), "warden", json.dumps(config)],
                env={**CLEAN_ENVIRONMENT, **LIBC},
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=(warden_far.fileno(), zygote_far.fileno()),
                cwd="/",
            )
        warden_far.close()
        zygote_far.close()
        self._sockets = [warden, zygote]
        warm = self._expect(wire.READY, 0)
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            loop.add_reader(sock.fileno(), self._readable, sock)
        try:
            async with asyncio.timeout(WARM_TIMEOUT_S):  # `wait_for` of Python 3.11 may swallow a cancellation
                _, numbers, _ = await warm
        except (TimeoutError, SandboxInfraError) as error:
            reason = self._reason() or str(error) or f"not warm after {WARM_TIMEOUT_S} s"
            await self.stop()
            raise UnitFailed(reason) from None
        self.base_bytes, self.zygote_pid, threads = numbers[0], numbers[1], numbers[2]
        if threads != 1:
            await self.stop()
            raise UnitFailed(f"the warm interpreter has {threads} threads; forking it would be unsafe")

    def _reason(self) -> str:
        try:
            text = self._errors.read_text(errors="replace").strip()
        except OSError:
            return ""
        last = text.splitlines()[-1] if text else ""
        try:
            return str(json.loads(last)["step"])
        except (ValueError, KeyError, TypeError):
            return text[-2000:]

    def _expect(self, kind: bytes, ident: int) -> asyncio.Future[tuple[bytes, tuple[int, ...], list[int]]]:
        future = asyncio.get_running_loop().create_future()
        self._replies[kind, ident] = future
        return future

    def _readable(self, sock: socket.socket) -> None:
        try:
            packet = wire.receive_packet(sock, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if packet is None:
            self._lose()
            return
        kind, ident, numbers, fds = packet
        if kind == wire.EXITED:
            child = self._children.pop(ident, None)
            if child is not None:
                child.end((numbers[0], numbers[1], numbers[2]))
            return
        if kind == wire.FAILED:
            for key in [key for key in self._replies if key[1] == ident and key[0] != wire.READY]:
                message = f"{'fork' if key[0] == wire.SPAWNED else 'namespace'} failed: {os.strerror(numbers[0])}"
                self._replies.pop(key).set_exception(SandboxInfraError(message, "spawn_failed"))
            return
        future = self._replies.pop((kind, ident), None)
        if future is None or future.done():  # whoever asked was cancelled: end what was made
            for fd in fds:
                _kill(fd)
                os.close(fd)
        else:
            future.set_result((kind, numbers, fds))

    def _lose(self) -> None:
        """Warden or zygote is gone: everything of the unit goes with it."""
        if self.lost.is_set():
            return
        self.lost.set()
        self._close_sockets()
        if self._process is not None and self.tier.namespaces:
            self._process.kill()  # inits follow, and with them every process of every run
        error = "the warm interpreter died"
        for future in self._replies.values():
            if not future.done():
                future.set_exception(SandboxInfraError(error, "lost_child"))
        for child in self._children.values():
            child.end(SandboxInfraError(error, "lost_child"))
        self._replies.clear()
        self._children.clear()
        for cell in self._cells:
            cell.close()
        self._cells.clear()

    def _close_sockets(self) -> None:
        for sock in self._sockets:
            if sock.fileno() >= 0:
                asyncio.get_running_loop().remove_reader(sock.fileno())
                sock.close()

    async def _ask(
        self, sock: int, kind: bytes, reply: bytes, ident: int, numbers: tuple[int, ...] = (), fds: tuple[int, ...] = ()
    ) -> tuple[tuple[int, ...], list[int]]:
        if self.lost.is_set():
            raise SandboxInfraError("the warm interpreter died", "lost_child")
        future = self._expect(reply, ident)
        try:
            wire.send_packet(self._sockets[sock], kind, ident, numbers, fds)
            async with asyncio.timeout(SPAWN_TIMEOUT_S):
                _, answer, received = await future
        except OSError as error:  # TimeoutError is one
            self._replies.pop((reply, ident), None)
            self._lose()
            raise SandboxInfraError(f"no answer from the warm unit: {error}", "spawn_failed") from None
        return answer, received

    async def spawn(self, uid: int, group: Group | None = None) -> Child:
        """Fork and confine a child that waits for a job, in a control group if one is given.

        Raises `SandboxInfraError` (spawn_failed, jail_failed).
        """
        ident = next(_IDENTS)
        (out_r, out_w), (err_r, err_w) = (os.pipe2(os.O_CLOEXEC) for _ in range(2))
        job_w, job_r = _socket_pair()  # because sessions are sent descriptors
        rep_r, rep_w = _socket_pair()  # because it is the anchor's stream as well
        child = Child(ident, job_w, out_r, err_r, rep_r, uid, group=group)
        self._children[ident] = child
        try:
            extra: tuple[int, ...] = ()
            if self.tier.namespaces:
                child.cell = self._cells.pop() if self._cells else await self._new_cell(ident)
                extra = (child.cell.pidfd,)
            if group is not None:
                extra += (group.procs,)
            numbers = (uid, int(group is not None))
            _, (child.process,) = await self._ask(
                1, wire.SPAWN, wire.SPAWNED, ident, numbers, (job_r, out_w, err_w, rep_w, *extra)
            )
        except BaseException:
            self._children.pop(ident, None)
            child.close()
            raise
        finally:
            for fd in (job_r, out_w, err_w, rep_w):
                os.close(fd)
        try:
            await self._await_ready(child)
        except BaseException:
            await self.destroy(child)
            if folder := self.folder(child):
                await asyncio.to_thread(folders.remove, folder, uid)
            raise
        for fd in (child.stdout, child.stderr, child.report, child.job):
            os.set_blocking(fd, False)
        return child

    async def _new_cell(self, ident: int) -> Cell:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _, (pidfd,) = await self._ask(0, wire.INIT, wire.INIT, ident, (), (far.fileno(),))
        except BaseException:
            near.close()
            raise
        finally:
            far.close()
        return Cell(pidfd, near)

    def adopt(self, child: Child) -> None:
        """Have the zygote tell how a copy of one of its children ends, its child as well. `child.process` is open.

        Raises `SandboxInfraError`.
        """
        if self.lost.is_set():
            raise SandboxInfraError("the warm interpreter died", "lost_child")
        self._children[child.ident] = child
        wire.send_packet(self._sockets[1], wire.ADOPT, child.ident, (), (child.process,))

    async def _await_ready(self, child: Child) -> None:
        os.set_blocking(child.report, False)
        try:
            async with asyncio.timeout(SPAWN_TIMEOUT_S):
                text = await _read_some(child.report)
        except TimeoutError:
            raise SandboxInfraError("confinement took too long", "jail_failed") from None
        if text[:1] != b"R":
            reason = text[1:].decode(errors="replace") or "the child died while it was confined"
            raise SandboxInfraError(f"confinement failed: {reason}", "jail_failed")

    async def end(self, child: Child) -> None:
        """Kill the child itself, if it still runs. Raises `SandboxInfraError` or `TimeoutError` when that fails."""
        if not child.exited.done():
            _kill(child.process)
            async with asyncio.timeout(10.0):
                await asyncio.shield(child.exited)
        child.exited.result()

    async def kill(self, child: Child) -> bool:
        """Kill the child and everything it started; True when nothing is left."""
        try:
            await self.end(child)
            if child.cell is not None:
                dead = await child.cell.clear()
                if self._may_keep(child.cell):
                    self._cells.append(child.cell)
                    child.cell = None
            else:
                dead = self.tier.deny_fork or await self.purge(child.ident, child.uid)
        except (TimeoutError, SandboxInfraError):
            dead = child.cell is not None and await child.cell.destroy()
        return dead or self.lost.is_set()

    def _may_keep(self, cell: Cell) -> bool:
        return cell.reusable and not self.lost.is_set() and len(self._cells) < self.settings.workers

    def group_mib(self, limits: Limits, interpreters: int = 1) -> int:
        """MiB that the control group of a run may hold: its memory, its files, and what a warm copy makes its own."""
        files = self.settings.tmp_mb if self.tier.namespaces else 0
        return interpreters * (limits.memory_mb + _COPY_MIB) + files

    async def purge(self, ident: int, uid: int) -> bool:
        """Kill what runs as `uid`; True when nothing is left. Raises `SandboxInfraError`."""
        numbers, _ = await self._ask(0, wire.PURGE, wire.PURGE, ident, (uid,))
        return bool(numbers[0])

    async def destroy(self, child: Child) -> bool:
        """`kill`, then close the descriptors."""
        try:
            return await self.kill(child)
        finally:
            child.close()

    def folder(self, child: Child) -> str:
        """The work folder that a child leaves behind; empty in `ns`, where it goes with the namespace."""
        return "" if self.tier.namespaces else f"{self.settings.work_root}/{child.ident}"

    def crowded(self, size: int) -> bool:
        """Whether runs have no room for `size` bytes of files; in `ns` each has a disk of its own."""
        return not self.tier.namespaces and folders.full(self.settings.work_root, size)

    async def stop(self) -> None:
        """End the unit; returns when the warden has gone, which takes everything else with it."""
        self._lose()
        process = self._process
        if process is not None:
            try:
                await asyncio.to_thread(process.wait, 10)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
        self._errors.unlink(missing_ok=True)


def _socket_pair() -> tuple[int, int]:
    near, far = socket.socketpair()
    return near.detach(), far.detach()


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


async def _read_some(fd: int) -> bytes:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
        return os.read(fd, 4096)
    finally:
        loop.remove_reader(fd)
