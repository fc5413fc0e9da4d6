"""A real server in a process of its own, for tests, and a TCP proxy that breaks connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef-first"
OTHER_TOKEN = "0123456789abcdef-second"


class Served:
    """`python -m retool sandbox serve`, started and awaited; `url` is what it says."""

    def __init__(self, *options: str, env: dict[str, str] | None = None, profile: str = "py-bare") -> None:
        command = [sys.executable, "-m", "retool", "sandbox", "serve", "--profile", profile, *options]
        if "--uds" not in options and "--port" not in options:
            command += ["--port", "0"]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        if not self.line:
            raise RuntimeError(f"the server did not start: {self.process.communicate()[1]}")
        self.url = self.line.split()[1]

    def client(self, token: str | None = None, **options: Any) -> httpx.Client:
        """A plain HTTP client of it."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **options)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    def terminate(self) -> None:
        """SIGTERM: drain."""
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> tuple[int, str]:
        """Exit status and what was written to standard error; ends it when it still runs."""
        if self.process.poll() is None:
            self.terminate()
        try:
            _, errors = self.process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, errors = self.process.communicate()
        return self.process.returncode, errors


@contextlib.contextmanager
def served(*options: str, env: dict[str, str] | None = None, profile: str = "py-bare") -> Iterator[Served]:
    """A server for the length of a block; its log must hold no traceback."""
    server = Served(*options, env=env, profile=profile)
    try:
        yield server
    finally:
        _, errors = server.end()
    assert "Traceback" not in errors, errors


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether `condition` comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


class CuttingProxy:
    """A TCP proxy. `cut_answers`: how many coming answers to break off after `after` bytes, once the server has sent
    something; `refuse`: close new connections at once."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.cut_answers = 0
        self.after = 0
        self.refuse = False
        self.cuts = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> CuttingProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0.05)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        await asyncio.gather(self._up(reader, far_writer), self._down(far_reader, writer, far_writer))
        self._writers -= {writer, far_writer}

    async def _up(self, reader: asyncio.StreamReader, far: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                far.write(data)
                await far.drain()
        far.close()

    async def _down(self, far: asyncio.StreamReader, near: asyncio.StreamWriter, up: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await far.read(65536):
                if self.cut_answers > 0:
                    self.cut_answers -= 1
                    self.cuts += 1
                    near.write(data[: self.after])
                    await near.drain()
                    near.transport.abort()
                    up.transport.abort()
                    return
                near.write(data)
                await near.drain()
        near.close()
