"""What all requests share: the sandbox, how full it is, the counters, and the one way to run something in it."""

from __future__ import annotations

import itertools
import secrets
import time
from typing import Any

from sandbox.local import LocalSandbox, check_profile
from sandbox.server.health_probe import Health
from sandbox.server.load import Load
from sandbox.server.metrics import Metrics
from sandbox.server.models import ExecRequest, LimitsModel
from sandbox.server.once import Once
from sandbox.server.options import ServeOptions
from sandbox.server.owners import Owners
from sandbox.server.replies import Refused, Reply, error_reply, overloaded, result_reply
from sandbox.server.tokens import Tokens
from sandbox.types import Limits, SandboxError, SandboxOverloaded, SessionError, Status

_OVERHEAD_S = 0.003  # of one execution, beyond its own wall time: for estimates only


class ServerState:
    """One server over one open sandbox."""

    def __init__(self, box: LocalSandbox, options: ServeOptions, tokens: Tokens) -> None:
        self.box, self.options, self.tokens = box, options, tokens
        self.workers = box.settings.workers
        self.once = Once()
        self.owners = Owners(box.settings.max_snapshots)
        self.metrics = Metrics()
        self.health = Health(self)
        self.load = Load(self.workers, options.queue)
        self.draining = False
        self.last_success = float("-inf")
        self._numbers = itertools.count(1)
        self._name = secrets.token_hex(4)

    def request_number(self) -> str:
        """A name for a request, unique to this server's life."""
        return f"{self._name}-{next(self._numbers)}"

    # --- what is allowed ----------------------------------------------------------------------------------------

    def hold(self, owner: str, size: int) -> None:
        """See `Load.hold`."""
        self.load.hold(owner, size)

    def refuse(self, code: str) -> None:
        """Count a request that was turned away."""
        self.metrics.refused.labels(code).inc()

    def limits(self, asked: LimitsModel | None) -> Limits:
        """Limits of one execution. Raises `Refused` (422) for more than this server allows."""
        if asked is None:
            return self.box.limits
        limits = asked.over(self.box.limits)
        most_s, most_mb = self.options.max_wall_s, self.options.max_memory_mb
        if limits.wall_s > most_s or limits.cpu_s > most_s * 16 or limits.memory_mb > most_mb:
            raise Refused(422, "invalid_request", f"limits: this server allows {most_s:g} s and {most_mb} MiB at most")
        return limits

    def check_profile(self, name: str | None) -> None:
        """Raises `Refused` (422) for a profile that does not exist here."""
        if name is not None:
            try:
                check_profile(name, self.box.settings.profiles)
            except (ValueError, SandboxError) as error:
                raise Refused(422, "invalid_request", f"profile: {error}") from None

    # --- running ------------------------------------------------------------------------------------------------

    async def execute(self, request: ExecRequest, arrived: float | None = None, owner: str = "") -> dict[str, Any]:
        """The fields of the result. `arrived`: monotonic time from which its deadline counts. `owner`: whose turn it
        takes.

        Raises `SandboxError` and `Refused`.
        """
        optional: dict[str, Any] = {"owner": owner}
        if request.deadline_ms is not None:
            left = request.deadline_ms / 1e3 - (time.monotonic() - arrived if arrived is not None else 0.0)
            if left <= 0:
                raise overloaded("its deadline passed while it waited", self.load.expected_wait(owner))
            optional["deadline_s"] = left
        if request.limits is not None:
            optional["limits"] = self.limits(request.limits)
        for name in ("profile", "files", "fetch", "rich"):
            if getattr(request, name):
                optional[name] = getattr(request, name)
        self.load.enter(owner)
        try:
            fields = await self.box.exec_fields(request.code, stdin=request.stdin, seed=request.seed, **optional)
        except SandboxError as error:
            self.failed(error)
            raise
        finally:
            self.load.leave(owner)
        self.ended(fields)
        return fields

    def failed(self, error: SandboxError) -> None:
        """Count a failure that is not the code's; what a session refuses is an answer, not a failure."""
        if isinstance(error, SandboxOverloaded):
            self.refuse(error.code)
        elif not isinstance(error, SessionError):
            self.metrics.infra.labels(error.code).inc()

    def ended(self, fields: dict[str, Any]) -> None:
        """Count an execution, by the fields of its result."""
        status, usage = fields["status"], fields["usage"]
        self.metrics.ended(status, usage)
        self.load.took(usage["wall_ms"] / 1e3 + _OVERHEAD_S)
        if status != Status.REJECTED:
            self.last_success = time.monotonic()

    async def answer(self, request: ExecRequest, arrived: float | None = None, owner: str = "") -> Reply:
        """Run one request and say how it went; everything that can go wrong is in the answer."""
        try:
            return result_reply(await self.execute(request, arrived, owner))
        except SandboxError as error:
            return error_reply(error)
        except Refused as refused:
            return refused.reply()
