"""Killable verifier processes: at most `workers` questions at once, each with a time limit that really ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

import retool

_REMEMBERED = 10_000  # pairs
_START_SECONDS = 120.0  # importing sympy on a busy machine
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "HOME", "VIRTUAL_ENV", "SYSTEMROOT")


class VerifierError(RuntimeError):
    """The verifier cannot run at all on this machine; the message says what to do."""


class Worker:
    """One process and its pipes. `ask` is for one question at a time."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._asked = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Raises `VerifierError` when the process does not get ready, with what it wrote to stderr."""
        await self.stop()
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
        )
        try:
            assert self._process.stdout is not None
            line = await asyncio.wait_for(self._process.stdout.readline(), _START_SECONDS)
        except TimeoutError:
            line = b""
        if line:
            return
        await self.stop()
        stderr = self._process.stderr
        said = (await stderr.read() if stderr is not None else b"").decode("utf-8", "replace").strip()
        raise VerifierError(
            f"the verifier process did not start: {said.splitlines()[-1] if said else 'no message'}; "
            "is math-verify installed? pip install 'retool-rl[train]'"
        )

    async def ask(self, gold: str, answer: str) -> bool | None:
        """The verdict. Raises `EOFError` when the process dies."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise EOFError
        self._asked += 1
        request = json.dumps({"id": self._asked, "gold": gold, "answer": answer}) + "\n"
        try:
            process.stdin.write(request.encode())
            await process.stdin.drain()
            line = await process.stdout.readline()
        except (ConnectionError, ValueError) as error:
            raise EOFError from error
        if not line.endswith(b"\n"):
            raise EOFError
        reply = json.loads(line)
        if reply["id"] != self._asked:
            raise EOFError  # out of step: never trust its answers again
        verdict: bool | None = reply["verdict"]
        return verdict

    async def stop(self) -> None:
        """Kill the process group and reap it; idempotent."""
        if self._process is None:
            return
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
            with contextlib.suppress(ConnectionError):
                await self._process.stdin.wait_closed()


def _environment() -> dict[str, str]:
    """No secrets of the trainer's; the package is found wherever it was imported from."""
    root = str(Path(retool.__file__).resolve().parent.parent)
    kept = {k: os.environ[k] for k in _KEPT_ENVIRONMENT if k in os.environ}
    return {**kept, "PYTHONPATH": root, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


class WorkerPool:
    """`async with WorkerPool(2, 10.0, 1) as pool: verdict = await pool.grade("1/2", "0.5")`"""

    def __init__(self, workers: int, timeout_s: float, retries: int, command: tuple[str, ...] | None = None) -> None:
        self.counters: Counter[str] = Counter()
        self._timeout_s = timeout_s
        self._retries = retries
        command = command or (sys.executable, "-m", "retool.rewards.worker")
        self.workers = [Worker(command) for _ in range(workers)]
        self._decided: dict[tuple[str, str], bool] = {}
        self._idle: asyncio.LifoQueue[Worker] = asyncio.LifoQueue()

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*(w.start() for w in self.workers))
        except BaseException:
            await self._stop()
            raise
        for worker in self.workers:
            self._idle.put_nowait(worker)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        await asyncio.gather(*(w.stop() for w in self.workers))

    async def grade(self, gold: str, answer: str) -> bool | None:
        """The verdict, or None: the verifier could not decide, or was killed or died in every try.

        Decided pairs are remembered: the trajectories of a group often agree."""
        if (gold, answer) in self._decided:
            return self._decided[gold, answer]
        verdict = await self._ask(gold, answer)
        if verdict is not None:
            if len(self._decided) >= _REMEMBERED:
                del self._decided[next(iter(self._decided))]
            self._decided[gold, answer] = verdict
        return verdict

    async def _ask(self, gold: str, answer: str) -> bool | None:
        for _ in range(1 + self._retries):
            worker = await self._idle.get()
            try:
                if not worker.alive:
                    self.counters["restarts"] += 1
                    await worker.start()
                return await asyncio.wait_for(worker.ask(gold, answer), self._timeout_s)
            except TimeoutError:
                self.counters["killed_workers"] += 1
                await worker.stop()
            except EOFError:
                self.counters["dead_workers"] += 1
                await worker.stop()
            except asyncio.CancelledError:
                await asyncio.shield(worker.stop())  # its answer would come for nobody
                raise
            finally:
                self._idle.put_nowait(worker)
        return None
