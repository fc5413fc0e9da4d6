"""Decides by doing whether a tier holds: runs the attacks unconfined (they must work) and confined (none may)."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from sandbox.profiles import PROFILES
from sandbox.supervisor.attacks import LAZY_MODULES, NAMES, SCRIPT
from sandbox.supervisor.pool import Pool
from sandbox.supervisor.run import Job, Run
from sandbox.supervisor.settings import CLEAN_ENVIRONMENT, Settings
from sandbox.types import Limits, SandboxInfraError

_CONTROL_TIMEOUT_S = 20.0
_LIMITS = Limits(wall_s=20.0, cpu_s=10.0, memory_mb=256)


class Probe:
    """A canary, listeners and a signal counter to attack. Use as a context manager; `control()` once, then `check`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.signals = 0
        self.secret = os.environ.get(CANARY_VARIABLE, "")
        self.outside = Path(settings.work_root) / "outside"
        self._listeners: list[socket.socket] = []
        self._control: asyncio.Task[dict[str, bool]] | None = None

    def __enter__(self) -> Self:
        self.outside.mkdir(mode=0o777)
        self.outside.chmod(0o777)
        self.canary = self.outside / "canary"
        self.canary.write_text(self.secret)
        self.canary.chmod(0o644)
        self.abstract = f"\0retool-sandbox-probe-{secrets.token_hex(8)}"
        self.port = self._listen(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        self.udp_port = self._listen(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        self._listen(socket.AF_UNIX, socket.SOCK_STREAM, self.abstract)
        self._listen(socket.AF_UNIX, socket.SOCK_DGRAM, self.abstract + "d")
        asyncio.get_running_loop().add_signal_handler(signal.SIGURG, self._signalled)
        self._control = asyncio.get_running_loop().create_task(self._run_control())
        return self

    def _listen(self, family: int, kind: int, address: str | tuple[str, int]) -> int:
        """A listener; its port, or 0: without a loopback device the others have to do."""
        listener = socket.socket(family, kind)
        self._listeners.append(listener)
        try:
            listener.bind(address)
            if kind == socket.SOCK_STREAM:
                listener.listen(16)
        except OSError:
            return 0
        return int(listener.getsockname()[1]) if family == socket.AF_INET else 0

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.close()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGURG)
        signal.signal(signal.SIGURG, signal.SIG_IGN)
        if self._control is not None:
            self._control.cancel()

    def _signalled(self) -> None:
        self.signals += 1

    def _told(self, name: str, daemon: bool, modules: list[str]) -> str:
        told = {
            "name": name,
            "canary": str(self.canary),
            "secret": self.secret,
            "outside": str(self.outside),
            "port": self.port,
            "udp_port": self.udp_port,
            "abstract": self.abstract,
            "pid": os.getpid(),
            "daemon": daemon,
            "modules": modules,
            "installed": sorted({name for known in self.settings.profiles for name in PROFILES[known].modules}),
        }
        return json.dumps(told) + "\n"

    async def _run_control(self) -> dict[str, bool]:
        """The attacks without any confinement: name -> whether it worked."""
        before = self.signals
        breached = await asyncio.to_thread(self._control_process)
        breached["signal"] = self.signals > before
        return breached

    def _control_process(self) -> dict[str, bool]:
        with subprocess.Popen(
            [sys.executable, "-s", "-P", "-c", SCRIPT],
            env=CLEAN_ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.outside,
            start_new_session=True,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(self._told("control", True, []).encode())
                process.stdin.close()
                line = process.stdout.readline()
                process.wait(_CONTROL_TIMEOUT_S)
                breached = dict(json.loads(line)["breached"])
                # End of file would mean that nobody holds the pipe any more: no daemon.
                breached["daemon"] = not select.select([process.stdout], [], [], 0.02)[0]
                return breached
            finally:
                process.kill()

    async def check(self, pool: Pool) -> str:
        """Attack the pool's tier; the reason it does not hold, or an empty string. Raises `SandboxInfraError`."""
        assert self._control is not None
        try:
            control = await asyncio.shield(self._control)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            return f"the attacks could not be tried without confinement: {type(error).__name__}: {error}"
        useless = [NAMES[name] for name, worked in control.items() if not worked]
        if useless:
            return f"not provable here, since without confinement code cannot {', '.join(useless)}"
        modules = [LAZY_MODULES[name] for name in PROFILES[pool.settings.profile].modules if name in LAZY_MODULES]
        before = self.signals
        unit, child = await pool.take()
        told = self._told(f"{pool.tier.name}-{time.monotonic_ns()}", not pool.tier.deny_fork, modules)
        run = Run(unit, child, Job(SCRIPT, told, 0, _LIMITS))
        clean = False
        try:
            result = await run.execute(0.0)
        finally:
            clean = await run.clean()
            pool.recycle(unit, child, clean=clean)
        try:
            said: dict[str, Any] = json.loads(result.stdout)
        except ValueError:
            text = result.exception.traceback if result.exception else result.stderr
            return f"the probe ended with {result.status.value}: {text[-300:]}"
        breached = dict(said["breached"], signal=self.signals > before, daemon=not clean)
        holes = [NAMES[name] for name, worked in breached.items() if worked]
        if holes:
            return f"confined code can still {', '.join(holes)}"
        return f"ordinary code does not work: {said['broken']}" if said["broken"] else ""


CANARY_VARIABLE = "RETOOL_SANDBOX_CANARY"
"""In the supervisor's environment only; confined code must not be able to read it."""


async def attempt(probe: Probe, pool: Pool) -> str:
    """Start the pool and attack it: the reason its tier does not hold here, or an empty string."""
    if pool.tier.own_uid and os.geteuid() != 0:
        return "not started as root"
    try:
        return await probe.check(pool)
    except SandboxInfraError as error:
        return str(error)
