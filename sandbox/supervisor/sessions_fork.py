"""Copying a live interpreter, as the supervisor does it: new descriptors, a command, and a proof of who the copy is.

A runner's word about a process id is worth nothing. The copy says hello on its own new socket and the kernel adds who
sent it (SCM_CREDENTIALS); a pidfd is opened, and only then it is checked that the process is of this tree.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import struct
from typing import Any

from sandbox.supervisor.sessions_interpreter import Interpreter
from sandbox.supervisor.sessions_tree import Tree, threads
from sandbox.supervisor.unit import Child, next_ident
from sandbox.types import SandboxInfraError, SessionError
from sandbox.worker import channel

FORK_S = 10.0
MAX_DEPTH = 14
"""Copies of copies: each adds a Landlock layer, of which the kernel allows 16."""
_CREDENTIALS = struct.Struct("3i")
_HELLO_BYTES = 2048


async def copy(source: Interpreter, tree: Tree, seed: int | None, layer: bool) -> Interpreter:
    """A copy of `source`, which must be idle. `seed`: None keeps the random state. `layer`: own Landlock domain.

    Raises `SessionError` (fork_unsafe, too_many, session_ended) and `SandboxInfraError`.
    """
    try:
        count = threads(source.pid)
    except OSError:
        raise SessionError("the session's process has ended", "session_ended") from None
    if count != 1:
        raise SessionError(f"the interpreter has {count} threads; only one can be copied", "fork_unsafe")
    pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    near.setblocking(False)
    (out_r, out_w), (err_r, err_w), (rep_r, rep_w) = pipes
    for fd in (out_r, err_r, rep_r):
        os.set_blocking(fd, False)
    child = Child(next_ident(), near.detach(), out_r, err_r, rep_r)
    theirs = [far.detach(), out_w, err_w, rep_w]
    place = tree.next_place(source.place, layer)
    fields = {
        "folder": place.folder,
        "dead": tree.dead_folders(source.place.domain),
        "layer": layer,
        "seed": seed,
        "processes": tree.processes + 1,
    }
    try:
        async with asyncio.timeout(FORK_S):
            await _command(source, fields, theirs)
            _close(theirs)  # a copy that dies without a word is then an end of file
            pid = await _hello(child.job)
        child.process = _identify(tree, pid)
    except TimeoutError:
        child.close()
        raise SessionError(f"the session did not copy itself within {FORK_S:g} s", "session_ended") from None
    except BaseException:
        child.close()
        raise
    finally:
        _close(theirs)
    tree.unit.adopt(child)
    member = Interpreter(child, pid)
    member.place = place
    try:
        tree.add(member)
    except OSError as error:
        await tree.release(member)
        raise SandboxInfraError(f"no room for a copy: {error}", "spawn_failed") from None
    return member


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


async def _command(source: Interpreter, fields: dict[str, Any], fds: list[int]) -> None:
    """Raises what the original says against it."""
    asking = asyncio.ensure_future(source.ask(channel.FORK, fields))
    await asyncio.sleep(0)  # the command first, then what goes with it
    try:
        source.send_descriptors(fds)
        answer, _ = await asking
    except OSError:
        asking.cancel()
        raise SessionError("the session's process has ended", "session_ended") from None
    except BaseException:
        asking.cancel()
        raise
    raise_error(answer)


def raise_error(answer: dict[str, Any]) -> None:
    """Turn an answer's error into `SessionError` or, for want of memory, `SandboxInfraError`."""
    error = answer.get("error")
    if not isinstance(error, dict):
        return
    message, code = str(error.get("message"))[:1000], error.get("code")
    if code == "os":
        if error.get("errno") == errno.EAGAIN:
            raise SessionError(f"the session may make no more processes: {message}", "fork_unsafe")
        if error.get("errno") == errno.ENOMEM:
            raise SandboxInfraError(f"no memory for a copy: {message}", "spawn_failed")
        raise SessionError(f"the session could not do it: {message}", "fork_unsafe")
    if code in ("fork_unsafe", "no_file", "bad_path", "too_large"):
        raise SessionError(message, code)
    raise SessionError(message, "bad_path")


async def _hello(job: int) -> int:
    """The process id of whoever holds the other end, from the kernel. Raises what the copy says went wrong."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(job, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(job)
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=job)
    try:
        data, ancillary, _, _ = end.recvmsg(_HELLO_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
    except OSError:
        data, ancillary = b"", []
    finally:
        end.detach()
    if data[:1] == b"U":
        raise SessionError(data[1:].decode(errors="replace"), "fork_unsafe")
    if data[:1] != b"R":
        reason = data[1:].decode(errors="replace") or "the copy died at once"
        raise SessionError(f"the copy could not settle: {reason}", "fork_unsafe")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid, _, _ = _CREDENTIALS.unpack(payload)
            return int(pid)
    raise SandboxInfraError("the kernel did not say who the copy is", "spawn_failed")


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
        belongs = tree.holds(pid)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not belongs or poller.poll(0):  # ended: the number may have been somebody else's meanwhile
            raise refused
    except OSError:
        os.close(pidfd)
        raise refused from None
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd
