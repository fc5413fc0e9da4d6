"""The supervisor process for one embedding client: frames in, frames out, and an end when the client ends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import resource
import shutil
import signal
import socket
import traceback
from typing import Any

from sandbox.frames import FrameProtocol
from sandbox.loops import new_event_loop
from sandbox.supervisor.service import Service, error_reply
from sandbox.supervisor.settings import Settings
from sandbox.types import SandboxError, SandboxInfraError, SandboxProtocolError


class Connection:
    """Serves one client until it closes its end or dies (`gone`). Messages before `serve` wait, but pings."""

    def __init__(self, service: Service, gone: asyncio.Event) -> None:
        self.service = service
        self.frames = FrameProtocol(self._message, lambda _: gone.set())
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self._early: list[dict[str, Any]] | None = []

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message; one that is too large becomes an error."""
        try:
            self.frames.send(message)
        except SandboxProtocolError as error:
            self.frames.send({"id": message["id"], **error_reply(error)})

    def serve(self) -> None:
        """From here on messages are answered."""
        early, self._early = self._early or [], None
        for message in early:
            self._message(message)

    def _message(self, message: dict[str, Any]) -> None:
        if message["op"] == "ping":
            self.send({"id": message["id"]})
            return
        if self._early is not None:
            self._early.append(message)
            return
        op, ident = message["op"], int(message["id"])
        if op == "session.exec":  # the fast way: no task
            self.service.session_requests.execute(message, lambda reply: self.send({"id": ident, **reply}))
        elif op == "exec" or self.service.session_requests.handles(op):
            task = asyncio.get_running_loop().create_task(self._answer(ident, message))
            self.tasks[ident] = task
            task.add_done_callback(functools.partial(self._done, ident))
        elif op == "cancel":
            self._cancel(int(message["target"]))
        elif op == "session.cancel":
            self.service.cancel_session(message["session"], int(message["target"]))
        elif op == "stats":
            self.send({"id": ident, "stats": self.service.stats()})
        elif op == "capabilities":
            self.send({"id": ident, "capabilities": self.service.capabilities()})

    def _done(self, ident: int, _: asyncio.Task[None]) -> None:
        self.tasks.pop(ident, None)

    async def _answer(self, ident: int, message: dict[str, Any]) -> None:
        try:
            if message["op"] == "exec":
                reply = await self.service.execute(message, ident)
            else:
                reply = await self.service.session_requests.answer(message)
        except Exception as error:  # no descriptors left, a mistake of ours: whatever it is, nobody may wait for ever
            traceback.print_exc()
            reply = error_reply(
                SandboxInfraError(f"the supervisor failed: {type(error).__name__}: {error}", "internal")
            )
        self.send({"id": ident, **reply})

    def _cancel(self, target: int) -> None:
        if not self.service.cancel(target) and target in self.tasks:
            self.tasks[target].cancel()  # still waiting in the queue

    async def close(self) -> None:
        """Drop what is running."""
        for task in list(self.tasks.values()):
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


def _watch_client(pid: int, gone: asyncio.Event) -> int:
    """A pidfd that sets `gone` when the client dies: its socket may live on in a process it forked."""
    if os.getppid() != pid:
        gone.set()
        return -1
    fd = os.pidfd_open(pid)
    asyncio.get_running_loop().add_reader(fd, gone.set)
    return fd


async def _supervise(settings: Settings) -> int:
    gone = asyncio.Event()
    _watch_client(settings.client_pid, gone)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, gone.set)
    client = socket.socket(fileno=settings.client_fd)
    os.set_inheritable(client.fileno(), False)
    service = Service(settings)
    connection = Connection(service, gone)
    transport, _ = await loop.create_connection(lambda: connection.frames, sock=client)
    ending = asyncio.create_task(gone.wait())
    try:
        work = asyncio.create_task(_serve(settings, service, connection))
        await asyncio.wait({work, ending}, return_when=asyncio.FIRST_COMPLETED)
        if work.done() and work.result():
            await ending
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    finally:
        ending.cancel()
        await connection.close()
        await service.close()
        transport.close()
        shutil.rmtree(settings.work_root, ignore_errors=True)  # the client may be dead and cannot
    return 0


async def _serve(settings: Settings, service: Service, connection: Connection) -> bool:
    """Get ready and say so; False when there is nothing to serve."""
    try:
        if settings.survey:
            connection.send({"id": 0, "survey": await service.survey()})
            return False
        await service.start()
    except SandboxError as error:
        connection.send({"id": 0, **error_reply(error)})
        return False
    except Exception as error:
        traceback.print_exc()
        failure = SandboxInfraError(f"the supervisor did not start: {error!r}", "spawn_failed", retryable=False)
        connection.send({"id": 0, **error_reply(failure)})
        return False
    gc.freeze()  # what start-up made stays: no collection has to look at it again
    connection.send({"id": 0, "tier": service.tier})
    connection.serve()
    return True


def main(argument: str) -> int:
    """Serve the client named in the settings (JSON); returns the exit status."""
    os.umask(0o077)
    with contextlib.suppress(ValueError, OSError):  # a session holds six descriptors
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_supervise(Settings.from_json(argument)))
