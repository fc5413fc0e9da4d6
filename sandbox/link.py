"""One supervisor process of a client's own, and the requests that are under way to it."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sandbox.frames import FrameProtocol
from sandbox.results import decode_error
from sandbox.supervisor import cgroups
from sandbox.supervisor.settings import CLEAN_ENVIRONMENT, Settings
from sandbox.types import SandboxUnavailable

_BOOT = Path(__file__).resolve().parent / "boot.py"
_CANARY = "RETOOL_SANDBOX_CANARY"
PING_S = 2.0
"""While somebody waits for an answer, the supervisor is asked so often whether it lives."""
PINGS = 8
"""Pings in a row without a word from the supervisor, then it is killed. Pings are counted, not seconds: while this
process is suspended, or its loop is blocked, it sends none."""
START_PINGS = 30
"""The same before its first word: a machine that is busy may take a while to load it."""


def _seen(late: asyncio.Future[dict[str, Any]]) -> None:
    """Nobody need look at how it ended."""
    if not late.cancelled():
        late.exception()


class Link:
    """One supervisor process and the requests under way."""

    def __init__(self, settings: Settings) -> None:
        """Raises `SandboxUnavailable` when this process has no descriptor, or the disk no room, to start one."""
        self.folder = ""
        try:
            self.folder = tempfile.mkdtemp(prefix="retool-sandbox-")
            self._start(settings)
        except OSError as error:
            if self.folder:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise SandboxUnavailable(f"the sandbox supervisor cannot be started: {error}") from error
        self.pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.dead = False
        self._ids = itertools.count(1)
        self._frames = FrameProtocol(self._message, self._end)
        self._transport: asyncio.Transport | None = None
        self._unheard = PINGS - START_PINGS  # pings in a row without a word from it
        self._watch: asyncio.TimerHandle | None = None

    def _start(self, settings: Settings) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.near = near
        try:
            self._spawn(settings, far)
        except BaseException:
            near.close()
            raise
        finally:
            far.close()

    def _spawn(self, settings: Settings, far: socket.socket) -> None:
        if os.geteuid() == 0:
            Path(self.folder).chmod(0o711)  # runs with a user id of their own must reach their work folders
        values = {**settings.__dict__, "work_root": self.folder, "client_fd": far.fileno(), "client_pid": os.getpid()}
        self.log = Path(self.folder, "supervisor.log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-P", str(_BOOT), "supervisor", Settings(**values).to_json()],
                env={**CLEAN_ENVIRONMENT, _CANARY: secrets.token_hex(16)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(far.fileno(),),
                cwd="/",
                start_new_session=True,
            )

    async def open(self) -> dict[str, Any]:
        """Wait for the supervisor's first words."""
        loop = asyncio.get_running_loop()
        self._loop = loop
        hello: asyncio.Future[dict[str, Any]] = loop.create_future()
        self.pending[0] = hello
        self._transport, _ = await loop.create_connection(lambda: self._frames, sock=self.near)
        self._watch = loop.call_later(PING_S, self._check)
        return await hello

    def _message(self, message: dict[str, Any]) -> None:
        self._unheard = 0
        future = self.pending.pop(message["id"], None)
        if future is not None and not future.done():
            future.set_result(message)

    def _end(self, reason: str) -> None:
        self.dead = True
        if not self.pending:
            return
        text = (reason or "the sandbox supervisor died") + self._last_words()
        for future in self.pending.values():
            if not future.done():
                future.set_exception(SandboxUnavailable(text))
        self.pending.clear()

    def _check(self) -> None:
        """A supervisor that hangs is as good as dead: kill it, so that the next call can start another."""
        self._watch = None
        if self.dead or not self.pending:
            return
        if self._unheard == PINGS:
            self.process.kill()
            self._end("the sandbox supervisor did not answer any more")
            assert self._transport is not None
            self._transport.abort()
            return
        self._unheard += 1
        self._frames.send({"id": next(self._ids), "op": "ping"})
        self._watch = self._loop.call_later(PING_S, self._check)

    def _last_words(self) -> str:
        try:
            text = self.log.read_text(errors="replace").strip()
        except OSError:
            return ""
        return f": {text[-2000:]}" if text else ""

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message for the supervisor that needs no answer, or whose answer is awaited already."""
        self._frames.send(message)

    async def ask(
        self,
        message: dict[str, Any],
        cancel: dict[str, Any] | None = None,
        left: Callable[[asyncio.Future[dict[str, Any]]], None] | None = None,
    ) -> dict[str, Any]:
        """Send a request and wait for its reply. `cancel`: what to send when the caller does not want it any more;
        `left` is then told of the reply that is still to come.

        Raises `SandboxUnavailable` when the supervisor dies or hangs, and the error that the reply holds.
        `RuntimeError` in another event loop than the one that it was opened in.
        """
        if self.dead:
            raise SandboxUnavailable("the sandbox supervisor died")
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError(
                "this sandbox was opened in another event loop: open one in each loop, and close it there"
            )
        ident = next(self._ids)
        message["id"] = ident
        future = self._loop.create_future()
        self.pending[ident] = future
        if self._watch is None:
            self._unheard = 0
            self._watch = self._loop.call_later(PING_S, self._check)
        try:
            self._frames.send(message)
            reply: dict[str, Any] = await future
        except asyncio.CancelledError:
            self.pending.pop(ident, None)
            if cancel is not None and not self.dead:
                self._frames.send({"id": next(self._ids), "target": ident, **cancel})
                if left is not None and future.cancelled():  # else it has come already
                    self.pending[ident] = late = self._loop.create_future()
                    late.add_done_callback(_seen)
                    left(late)
            raise
        except BaseException:
            self.pending.pop(ident, None)
            raise
        if "error" in reply:
            raise decode_error(reply["error"])
        return reply

    async def close(self) -> None:
        """Hang up and wait until the supervisor, and with it everything it started, has ended."""
        self.dead = True
        if self._watch is not None:
            self._watch.cancel()
        if self._transport is not None and self._loop.is_closed():  # nobody waits any more, and it can tell nobody
            self.pending.clear()
            self.near.close()
        elif self._transport is not None:
            self._transport.close()
        else:
            self.near.close()
        self._end("the sandbox was closed")
        try:
            await asyncio.to_thread(self.process.wait, 15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        if self.process.returncode != 0:
            await asyncio.to_thread(cgroups.remove_of, self.process.pid)
        shutil.rmtree(self.folder, ignore_errors=True)
