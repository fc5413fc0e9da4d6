"""How a server is to be run, and what is wrong with that."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.types import Limits


class ServeError(Exception):
    """The server cannot start as asked; the message says what to change."""


@dataclass(frozen=True)
class ServeOptions:
    """`uds` replaces host and port, and its file gets `uds_mode`; port 0 takes a free one. `workers`: executions at
    once (0: 1.5 a core). `queue`: how many more may wait; the rest get 429. `limits`: defaults of every execution.
    `max_wall_s`, `max_memory_mb`: most that a request may ask for. `drain_s`: how long running work may go on after
    SIGTERM. `require`: properties that the tier must have."""

    host: str = "127.0.0.1"
    port: int = 8080
    uds: str | None = None
    uds_mode: int = 0o600
    profile: str = "auto"
    workers: int = 0
    tier: str | None = None
    require: tuple[str, ...] = ()
    allow_unconfined: bool = False
    token_file: str | None = None
    max_sessions: int | None = None
    queue: int = 1000
    limits: Limits = field(default_factory=Limits)
    max_wall_s: float = 300.0
    max_memory_mb: int = 16_384
    drain_s: float = 30.0

    @property
    def loopback(self) -> bool:
        """Whether only this machine's own users can connect."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """Where clients find it."""
        if self.uds is not None:
            return f"unix:{Path(self.uds).absolute()}"
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def check(self, tokens: tuple[str, ...]) -> None:
        """Raises `ServeError` for a combination that must not run."""
        if self.uds == "":
            raise ServeError("--uds needs the path of a socket")
        if not 0 <= self.uds_mode <= 0o777:
            raise ServeError("--uds-mode must be permissions from 0 to 777, octal")
        if not 0 <= self.port <= 65535:
            raise ServeError(f"--port {self.port}: ports are 0 (a free one) to 65535")
        if self.workers < 0 or self.queue < 0:
            raise ServeError("--workers and --queue cannot be less than 0")
        if not self.loopback and not tokens:
            raise ServeError(
                f"--host {self.host} is reachable from other machines, so requests need a token: put one into a file "
                "(openssl rand -hex 32 > token) and pass --token-file token, or set RETOOL_SANDBOX_TOKEN; "
                "or bind to 127.0.0.1"
            )
        if self.limits.wall_s > self.max_wall_s or self.limits.memory_mb > self.max_memory_mb:
            raise ServeError(
                f"the default limits ({self.limits.wall_s:g} s, {self.limits.memory_mb} MiB) exceed the most that a "
                f"request may ask for ({self.max_wall_s:g} s, {self.max_memory_mb} MiB)"
            )
