"""What is measured: the embedded sandbox, a server of ours, a server that speaks SandboxFusion's API, a cold Python."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sandbox.bench.http import Caller
from sandbox.bench.load import Call
from sandbox.local import LocalSandbox
from sandbox.supervisor.settings import CLEAN_ENVIRONMENT
from sandbox.types import SandboxOverloaded

START_TIMEOUT_S = 60.0


def embedded(box: LocalSandbox, profile: str | None = None) -> Call:
    """One-shot executions in a `LocalSandbox`."""

    async def call(code: str) -> str:
        try:
            return (await box.exec(code, profile=profile)).status.value
        except SandboxOverloaded as error:
            return f"refused:{error.retry_after}"

    return call


def native(caller: Caller, profile: str | None = None, path: str = "/v1/exec") -> Call:
    """`POST /v1/exec` of our own server, or the same of a session."""
    extra = {"profile": profile} if profile else {}

    async def call(code: str) -> str:
        status, headers, body = await caller.post(path, {"code": code, **extra})
        if status == 429:
            return f"refused:{headers['retry-after']}"
        return str(body["status"]) if status == 200 else f"http {status}"

    return call


def fusion(caller: Caller) -> Call:
    """`POST /run_code` as SandboxFusion has it."""

    async def call(code: str) -> str:
        status, _, body = await caller.post("/run_code", {"code": code, "language": "python"})
        return "ok" if status == 200 and body["status"] == "Success" else f"http {status} {body.get('status')}"

    return call


def cold(python: str = sys.executable) -> Call:
    """A new interpreter for every run, unisolated: what a sandbox without warm processes pays at least."""

    async def call(code: str) -> str:
        process = await asyncio.create_subprocess_exec(
            python,
            "-I",
            "-c",
            code,
            env=CLEAN_ENVIRONMENT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        await process.communicate()
        return "ok" if process.returncode == 0 else f"exit {process.returncode}"

    return call


@asynccontextmanager
async def server(*options: str, source: Path | None = None) -> AsyncIterator[tuple[str, int]]:
    """`retool sandbox serve` on a free port; (URL, process id). `source`: a checkout to take it from instead of this
    one. Raises `RuntimeError` with its last words."""
    paths = [str(source)] if source else [path or "." for path in sys.path]
    with TemporaryDirectory(prefix="retool-bench-") as folder:
        log = Path(folder, "server.log")
        port = _free_port()
        with log.open("wb") as output:  # noqa: ASYNC230 (nothing else runs yet)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "retool", "sandbox", "serve", "--port", str(port), *options),
                stdout=output,
                stderr=output,
                cwd=source,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        url = f"http://127.0.0.1:{port}"
        try:
            await _until_ready(process, port, log)
            yield url, process.pid
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                await process.wait()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def _until_ready(process: asyncio.subprocess.Process, port: int, log: Path) -> None:
    caller = Caller(f"http://127.0.0.1:{port}")
    deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
    while process.returncode is None and asyncio.get_running_loop().time() < deadline:
        try:
            status, _, body = await caller.post("/v1/exec", {"code": "print(1)"})
            if status == 200 and body["status"] == "ok":
                await caller.close()
                return
        except OSError:
            pass
        await asyncio.sleep(0.1)
    words = await asyncio.to_thread(log.read_text, errors="replace")
    raise RuntimeError(f"the server did not start: {words[-2000:]}")
