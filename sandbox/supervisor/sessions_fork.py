"""Copying a live interpreter, as the supervisor does it: new descriptors, a command, and a proof of who the copy is.

A runner's word about a process id is worth nothing. The copy says that it is born on its own new socket and the kernel
adds who sent it (SCM_CREDENTIALS); a pidfd is opened, and only then it is checked that the process is of this tree.

Both ends work at the same time where they can: the original gets ready while descriptors are made here, and the copy
moves into its folder and walls while its identity is checked.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import socket
import struct
from typing import Any

from sandbox.supervisor.sessions_interpreter import Interpreter, Place
from sandbox.supervisor.sessions_tree import Tree, leads, threads
from sandbox.supervisor.unit import Child, next_ident
from sandbox.types import SandboxInfraError, SessionError
from sandbox.worker import channel

FORK_S = 10.0
MAX_DEPTH = 14
"""Copies of copies: each adds a Landlock layer, of which the kernel allows 16."""
_CREDENTIALS = struct.Struct("3i")
_WORD_BYTES = 2048


async def copy(source: Interpreter, tree: Tree, seed: int | None, layer: bool) -> Interpreter:
    """A copy of `source`, which must be idle. `seed`: None keeps the random state. `layer`: own Landlock domain.

    Raises `SessionError` (fork_unsafe, too_many, session_ended) and `SandboxInfraError`.
    """
    if source.child.job < 0:
        raise SessionError("the session has ended: it was closed", "session_ended")
    async with tree.copying():
        return await _copy(source, tree, seed, layer)


async def _copy(source: Interpreter, tree: Tree, seed: int | None, layer: bool) -> Interpreter:
    place = tree.next_place(source.place, layer)
    fields = {
        "folder": place.folder,
        "dead": tree.dead_folders(source.place.domain),
        "layer": layer,
        "seed": seed,
        "processes": tree.processes + 1,
    }
    tree.allow(source, tree.processes + 1)
    try:
        async with asyncio.timeout(FORK_S):
            return await _make(source, tree, place, fields)
    except BaseException as error:
        tree.leave(place)
        if isinstance(error, TimeoutError):
            raise SessionError(f"the session did not copy itself within {FORK_S:g} s", "session_ended") from None
        if isinstance(error, OSError):
            raise SandboxInfraError(f"no room for a copy: {error}", "spawn_failed") from None
        raise


async def _make(source: Interpreter, tree: Tree, place: Place, fields: dict[str, Any]) -> Interpreter:
    with _Birth() as birth:
        await _command(source, fields, birth)
        pid = await birth.born()
        birth.child.process = _identify(tree, pid)
        tree.unit.adopt(birth.child)
        member = birth.hand_over(pid, place)
        try:
            tree.add(member)
            await birth.settled()
        except BaseException:
            birth.stop_listening()
            await asyncio.shield(tree.release(member))
            raise
        return member


class _Birth:
    """A copy's descriptors and what it says first. Closes what nobody has taken over."""

    def __init__(self) -> None:
        self.child = Child(next_ident(), -1, -1, -1, -1)
        self._theirs: list[int] = []
        self._handed_over = False
        self._heard = b""
        self._more = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> _Birth:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget_theirs()
        self.stop_listening()
        if not self._handed_over:
            self.child.close()

    def open(self) -> list[int]:
        """Make all descriptors; returns the copy's: job, stdout, stderr, report. Raises `OSError`."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        near.setblocking(False)
        self.child.job, self._theirs = near.detach(), [far.detach()]
        for name in ("stdout", "stderr", "report"):
            ours, theirs = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(ours, False)
            setattr(self.child, name, ours)
            self._theirs.append(theirs)
        self._loop.add_reader(self.child.job, self._more.set)
        return self._theirs

    def stop_listening(self) -> None:
        """Before the job socket is closed: its number will mean another one."""
        if self.child.job >= 0:
            self._loop.remove_reader(self.child.job)

    def forget_theirs(self) -> None:
        """Close the copy's ends: one that dies without a word is then an end of file."""
        while self._theirs:
            os.close(self._theirs.pop())

    def hand_over(self, pid: int, place: Place) -> Interpreter:
        """From now on a tree ends the copy."""
        member = Interpreter(self.child, pid)
        member.place = place
        self._handed_over = True
        return member

    async def born(self) -> int:
        """The process id of whoever holds the other end, from the kernel. Raises what the copy says went wrong."""
        for level, kind, payload in await self._hear(channel.BORN):
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid, _, _ = _CREDENTIALS.unpack(payload)
                return int(pid)
        raise SessionError("the kernel did not say who the copy is", "fork_unsafe")

    async def settled(self) -> None:
        """Until the copy lives in its own folder and walls. Raises what the copy says went wrong."""
        await self._hear(channel.SETTLED)
        self.stop_listening()

    async def _hear(self, word: bytes) -> list[tuple[int, int, bytes]]:
        """The next word, which must be this one; returns what the kernel added. Raises `SessionError`."""
        ancillary: list[tuple[int, int, bytes]] = []
        while not self._heard:
            await self._more.wait()
            self._more.clear()
            try:
                self._heard, ancillary = _receive(self.child.job)
            except BlockingIOError:  # told twice of what was read once
                continue
            if not self._heard:
                break  # the end of the stream
        said, self._heard = self._heard[:1], self._heard[1:]
        if said == word:
            return ancillary
        reason = self._heard.decode(errors="replace")
        if said == channel.UNSAFE:
            raise SessionError(reason, "fork_unsafe")
        raise SessionError(f"the copy could not settle: {reason or 'it died at once'}", "fork_unsafe")


def _receive(job: int) -> tuple[bytes, list[tuple[int, int, bytes]]]:
    """What has come, and what the kernel added; nothing at the end of the stream. Raises `BlockingIOError`."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=job)
    try:
        data, ancillary, _, _ = end.recvmsg(_WORD_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
    except BlockingIOError:
        raise
    except OSError:
        return b"", []
    finally:
        end.detach()
    return data, ancillary


async def _command(source: Interpreter, fields: dict[str, Any], birth: _Birth) -> None:
    """Raises what the original says against it."""
    answer = source.ask(channel.FORK, fields)
    descriptors: list[int] = []
    try:
        try:
            _one_thread(source.pid)
            if source.bound:  # its threads have ended since somebody looked; a copy would be bound for ever
                source.settle()
            descriptors = birth.open()
        finally:
            _send(source, descriptors)  # in any case: it waits for them
        said, _ = await answer
    finally:
        answer.cancel()
    birth.forget_theirs()
    raise_error(said)


def _one_thread(pid: int) -> None:
    """Raises `SessionError`."""
    try:
        count = threads(pid)
    except OSError:
        raise SessionError("the session's process has ended", "session_ended") from None
    if count != 1:
        raise SessionError(f"the interpreter has {count} threads; only one can be copied", "fork_unsafe")


def _send(source: Interpreter, descriptors: list[int]) -> None:
    """Raises `SessionError`."""
    try:
        source.send_descriptors(descriptors)
    except OSError:
        raise SessionError("the session's process has ended", "session_ended") from None


def raise_error(answer: dict[str, Any]) -> None:
    """Turn an answer's error into `SessionError`: whatever a session says, it is never our failure."""
    error = answer.get("error")
    if not isinstance(error, dict):
        return
    message, code = error.get("message"), error.get("code")
    message = message[:1000] if isinstance(message, str) else "it did not say why"
    if code == "os":
        if error.get("errno") == errno.EAGAIN:
            raise SessionError(f"the session may make no more processes: {message}", "fork_unsafe")
        raise SessionError(f"the session could not do it: {message}", "fork_unsafe")
    if code in ("fork_unsafe", "no_file", "bad_path", "too_large"):
        raise SessionError(message, code)
    raise SessionError(message, "bad_path")


def _identify(tree: Tree, pid: int) -> int:
    """A pidfd of the copy, once it is certain that it is of this tree."""
    refused = SessionError("the copy could not be identified", "fork_unsafe")
    if pid <= 0:
        raise refused
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        raise refused from None
    try:
        belongs, alone = tree.holds(pid) and not tree.has(pid), leads(pid)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not belongs or poller.poll(0):  # ended: the number may have been somebody else's meanwhile
            raise refused
        if not alone:  # it would share the fate of a group that is not its own
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            raise SessionError("the copy leads no process group of its own", "fork_unsafe")
    except OSError:
        os.close(pidfd)
        raise refused from None
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd
