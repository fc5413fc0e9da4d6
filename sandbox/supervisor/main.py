"""The supervisor process for one embedding client: frames in, frames out, and an end when the client ends."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import signal
import socket
from typing import Any

from sandbox.supervisor.service import Service, error_reply
from sandbox.supervisor.settings import Settings
from sandbox.types import SandboxError
from sandbox.wire import pack_frame, read_frame


class Connection:
    """Serves one client until it closes its end or dies."""

    def __init__(self, service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.service, self.reader, self.writer = service, reader, writer
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message; a client that has gone away is noticed by the reader."""
        if not self.writer.is_closing():
            self.writer.write(pack_frame(message))

    async def serve(self) -> None:
        """Until the client is gone."""
        while (message := await read_frame(self.reader)) is not None:
            ident = int(message["id"])
            if message["op"] == "exec":
                task = asyncio.create_task(self._exec(ident, message))
                self.tasks[ident] = task
                task.add_done_callback(functools.partial(self._done, ident))
            elif message["op"] == "cancel":
                self._cancel(int(message["target"]))
            elif message["op"] == "stats":
                self.send({"id": ident, "stats": self.service.stats()})

    def _done(self, ident: int, _: asyncio.Task[None]) -> None:
        self.tasks.pop(ident, None)

    async def _exec(self, ident: int, message: dict[str, Any]) -> None:
        try:
            reply = await self.service.execute(message, ident)
            self.send({"id": ident, **reply})
            await self.writer.drain()
        except ConnectionError:
            pass

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
    reader, writer = await asyncio.open_connection(sock=client)
    service = Service(settings)
    connection = Connection(service, reader, writer)
    ending = asyncio.create_task(gone.wait())
    try:
        work = asyncio.create_task(_serve(settings, service, connection))
        await asyncio.wait({work, ending}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    finally:
        ending.cancel()
        await connection.close()
        await service.close()
        writer.close()
        shutil.rmtree(settings.work_root, ignore_errors=True)  # the client may be dead and cannot
    return 0


async def _serve(settings: Settings, service: Service, connection: Connection) -> None:
    try:
        if settings.survey:
            connection.send({"id": 0, "survey": await service.survey()})
            await connection.writer.drain()
            return
        await service.start()
    except SandboxError as error:
        connection.send({"id": 0, **error_reply(error)})
        await connection.writer.drain()
        return
    connection.send({"id": 0, "tier": service.tier})
    await connection.serve()


def main(argument: str) -> int:
    """Serve the client named in the settings (JSON); returns the exit status."""
    os.umask(0o077)
    return asyncio.run(_supervise(Settings.from_json(argument)))
