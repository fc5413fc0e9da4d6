"""A sandbox behind URLs: the same interface as the embedded one, over `retool sandbox serve`.

async with RemoteSandbox(["http://10.0.0.5:8080", "http://10.0.0.6:8080"], token=...) as box:
    print((await box.exec("2**100")).stdout)
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

from sandbox.arguments import (
    check_copies,
    check_id,
    check_lease,
    check_limits,
    check_options,
    check_profile_name,
    check_program,
    check_size,
)
from sandbox.codec import dumps, encode_bytes
from sandbox.remote_batch import MAX_ITEM_BYTES, Coalescer, exec_result
from sandbox.remote_endpoint import Answer, Endpoint, LostRequest, Nonsense, Parse
from sandbox.remote_retry import RetryBudget, backoff
from sandbox.remote_session import RemoteSession, made, opener, restore_sessions
from sandbox.remote_several import GREETING_S, greet, look
from sandbox.types import (
    ExecResult,
    Limits,
    SandboxError,
    SandboxOverloaded,
    SandboxProtocolError,
    SandboxUnavailable,
    Session,
    SessionError,
    SessionOpening,
)

QUEUE_S = 30.0
"""Longest wait in one server's queue before it is asked again, or another is."""
_MARGIN_S = 10.0
_COALESCE_FROM = 12
_NONSENSE = 3
"""Answers that are none of ours, from each server, after which one call gives up."""
_LEAVE_S = 2.0
"""How long closing waits for what cancelled callers have left."""
_ROUNDS = 3
"""How often all servers are asked for a session when one of them lost its answer on the way."""
Value = TypeVar("Value")


class RemoteSandbox:
    """Runs Python on one or several servers.

    `urls`: `http://host:port`, `https://host` or `unix:/path`. `token`: bearer token of all of them. `profile`,
    `limits`: sent with every execution; by default each server's own. `total_s`: seconds that one call may take, with
    all its retries. `max_in_flight`: executions of this client under way at each server; more wait here.
    `coalesce`: send executions that are asked for together in batches.

    A call goes to the least loaded server that works. It is retried, under one idempotency key, when the connection
    breaks, the answer is lost or none of ours, or the server fails or is overloaded: elsewhere where another is free,
    with jittered, growing pauses, within `total_s` and a budget of retries. Only failures of the infrastructure raise,
    as with `LocalSandbox`. Cancelling `exec` does not end what runs already; its limits do.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        token: str | None = None,
        profile: str | None = None,
        limits: Limits | None = None,
        total_s: float = 300.0,
        max_in_flight: int = 256,
        coalesce: bool = True,
    ) -> None:
        check_profile_name(profile or None)
        check_limits(limits)
        several = isinstance(urls, Collection) and not isinstance(urls, str)
        names: list[Any] = list(dict.fromkeys(urls)) if several else [urls]
        if not names:
            raise ValueError("RemoteSandbox needs at least one URL")
        self.profile, self.limits, self.total_s, self.coalesce = profile, limits, total_s, coalesce
        self.endpoints = [Endpoint(url, token, max_in_flight) for url in names]
        self.budget = RetryBudget()
        self.retries = 0
        self._rng = random.Random()
        self._scope = secrets.token_hex(16)
        self._slots = asyncio.Semaphore(max_in_flight * len(names))
        self._executing = 0
        self._coalescer = Coalescer(self.pick)
        self.default_wall_s = Limits().wall_s
        self._opened = False
        self._closing = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()
        self._left: set[asyncio.Task[Any]] = set()

    # --- opening ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Returns as soon as one server works. Raises `SandboxUnavailable` when none answers, `SandboxError` when one
        refuses the token."""
        self._opened = True
        self._closing.clear()
        for endpoint in self.endpoints:
            endpoint.open()
        greetings = {endpoint: asyncio.ensure_future(self._greet(endpoint)) for endpoint in self.endpoints}
        for greeting in greetings.values():
            self._background.add(greeting)
            greeting.add_done_callback(self._background.discard)
        try:
            await greet(greetings)
        except BaseException:
            await self.close()
            raise
        return self

    async def _greet(self, endpoint: Endpoint) -> Exception | None:
        try:
            wall_s = await endpoint.ask("GET", "/v1/capabilities", _default_wall_s, seconds=GREETING_S)
            self.default_wall_s = max(self.default_wall_s, wall_s)
        except (SandboxError, ValueError) as error:
            return error
        return None

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up: calls under way raise `SandboxUnavailable`; sessions on the servers live on until their leases end.
        May be called twice."""
        if self._left:
            await asyncio.wait(self._left, timeout=_LEAVE_S)
        self._opened = False
        self._closing.set()
        tasks = self._background | self._left
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._coalescer.close()
        await asyncio.gather(*(endpoint.close() for endpoint in self.endpoints))

    # --- one call -----------------------------------------------------------------------------------------------

    async def pick(
        self,
        seconds: float,
        prefer: Endpoint | None = None,
        avoid: Collection[Endpoint] = (),
        *,
        shun: Endpoint | None = None,
        sticky: bool = False,
    ) -> Endpoint:
        """The server for the next attempt: `prefer` when it works, else the least loaded that does (`sticky`: the one
        with the fewest of our sessions). One that said it is full, or is `shun`, comes last. While none works, waits
        for the first to be tried again. Raises `SandboxUnavailable` after `seconds`."""
        end = time.monotonic() + seconds

        def rank(endpoint: Endpoint) -> tuple[bool, bool, int, float]:
            load = endpoint.sessions if sticky else endpoint.in_flight
            return endpoint.wait_s() > 0.0, endpoint is shun, load, self._rng.random()

        while True:
            if prefer is not None and prefer.breaker.wait_s() == 0.0:
                return prefer
            waits = {each: each.breaker.wait_s() for each in self.endpoints if each not in avoid}
            usable = [endpoint for endpoint, wait in waits.items() if wait == 0.0]
            if usable:
                return min(usable, key=rank)
            wait = min(waits.values(), default=seconds)
            if time.monotonic() + wait >= end:
                raise self._nobody()
            await self._pause(max(wait, 0.005))

    async def _pause(self, seconds: float) -> None:
        """Raises `SandboxUnavailable` when this client is closed, before or meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        self._check_open()

    def _check_open(self) -> None:
        if not self._opened:
            raise SandboxUnavailable("the sandbox is not open: use `async with RemoteSandbox(...) as box`")

    def _nobody(self) -> SandboxError:
        """Why no server can be asked."""
        kind: type[SandboxError] = SandboxUnavailable
        if all(isinstance(endpoint.trouble, Nonsense) for endpoint in self.endpoints):
            kind = SandboxProtocolError
        return kind("no server works: " + "; ".join(str(e.trouble or e.url) for e in self.endpoints))

    async def persist(
        self,
        attempt: Callable[[float], Awaitable[Value]],
        seconds: float,
        overload_s: float | None = None,
        among: Sequence[Endpoint] | None = None,
    ) -> Value:
        """What the first attempt that succeeds brings, or the last one's error. `overload_s`: how long to go on asking
        servers that are overloaded. `among`: the servers that may be asked, if not all."""
        self._check_open()
        among = among or self.endpoints
        self.budget.deposit()
        started = time.monotonic()
        number = nonsense = 0
        while True:
            try:
                return await attempt(seconds - (time.monotonic() - started))
            except SandboxError as failure:
                error = failure
            number += 1
            nonsense += isinstance(error, Nonsense)
            if isinstance(error, SessionError) or not error.retryable or nonsense >= _NONSENSE * len(among):
                raise error
            crowded = isinstance(error, SandboxOverloaded)
            wait = backoff(number, min(each.wait_s() for each in among) if crowded else 0.0, self._rng)
            spent = time.monotonic() - started + wait
            if spent >= seconds or (crowded and overload_s is not None and spent >= overload_s):
                raise error
            if not crowded and not self.budget.withdraw():
                raise error
            self.retries += 1
            await self._pause(wait)

    def leave(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have what a cancelled caller has begun brought to an end that leaves nothing behind."""
        task = asyncio.ensure_future(work)
        self._left.add(task)
        task.add_done_callback(self._left.discard)
        return task

    def key(self, given: str | None) -> str:
        """An idempotency key of this client's own: another client that uses the same words means something else."""
        if given is None:
            return secrets.token_hex(16)
        return hashlib.sha256(f"{self._scope}:{given}".encode("utf-8", "surrogatepass")).hexdigest()

    # --- executions ---------------------------------------------------------------------------------------------

    async def exec(
        self,
        code: str,
        *,
        stdin: str = "",
        limits: Limits | None = None,
        seed: int = 0,
        idempotency_key: str | None = None,
        profile: str | None = None,
        files: Mapping[str, bytes] | None = None,
        fetch: Sequence[str] = (),
        rich: bool = False,
        deadline_s: float | None = None,
    ) -> ExecResult:
        """As `Sandbox.exec`. Raises `SandboxError`; `ValueError` for arguments that are none, or that the server does
        not allow."""
        check_program(code, stdin, limits, files)
        check_options(seed, profile, idempotency_key, fetch, deadline_s)
        limits = limits or self.limits
        profile = profile or self.profile
        fields: dict[str, Any] = {"code": code, "seed": seed, "idempotency_key": self.key(idempotency_key)}
        optional = {
            "stdin": stdin,
            "limits": asdict(limits) if limits is not None else None,
            "profile": profile,
            "files": {path: encode_bytes(data) for path, data in (files or {}).items()},
            "fetch": list(fetch),
            "rich": bool(rich),
        }
        fields |= {name: value for name, value in optional.items() if value}
        wall_s = limits.wall_s if limits is not None else self.default_wall_s
        size = len(code) + len(stdin) + sum(len(data) for data in (files or {}).values())
        started = time.monotonic()
        try:
            async with asyncio.timeout(min(self.total_s, deadline_s or self.total_s)):
                await self._slots.acquire()
        except TimeoutError:
            raise SandboxOverloaded(f"{self._executing} executions of this client are under way already") from None
        self._executing += 1
        try:
            left = self.total_s - (time.monotonic() - started)
            return await self._exec(fields, wall_s, left, size, deadline_s)
        finally:
            self._executing -= 1
            self._slots.release()

    async def _exec(
        self, fields: dict[str, Any], wall_s: float, seconds: float, size: int, deadline_s: float | None
    ) -> ExecResult:
        end = time.monotonic() + (deadline_s if deadline_s is not None else seconds)
        prefer: Endpoint | None = None
        shun: Endpoint | None = None
        alone = not self.coalesce or size > MAX_ITEM_BYTES

        async def attempt(left: float) -> ExecResult:
            nonlocal prefer, shun
            queue_s = max(0.001, min(QUEUE_S, end - time.monotonic()))
            fields["deadline_ms"] = 1e3 * queue_s
            most = min(left, queue_s + wall_s + _MARGIN_S)
            together = not alone and self._executing >= _COALESCE_FROM and prefer is None and shun is None
            try:
                if together:
                    return await self._coalescer.send(dict(fields), most)
                endpoint = await self.pick(left, prefer, shun=shun)
                prefer = shun = None
                body = dumps(fields)
                check_size(len(body))
                return await endpoint.ask("POST", "/v1/exec", exec_result, body, seconds=most, headers=_JSON)
            except LostRequest as lost:
                kept = lost.sent and not lost.late  # it may have run there, and be answered from memory
                prefer = lost.server if kept and not together else None
                shun = None if kept else lost.server
                raise
            except Nonsense as strange:
                prefer, shun = None, strange.server
                raise

        return await self.persist(attempt, seconds, deadline_s)

    # --- sessions -----------------------------------------------------------------------------------------------

    def session(
        self,
        *,
        profile: str | None = None,
        limits: Limits | None = None,
        seed: int = 0,
        ttl_s: float = 600.0,
        idempotency_key: str | None = None,
    ) -> SessionOpening:
        """As `Sandbox.session`; the session lives on one server."""
        check_options(seed, profile, idempotency_key)
        check_limits(limits)
        check_lease(ttl_s)
        limits = limits or self.limits
        fields: dict[str, Any] = {"seed": seed, "ttl_s": ttl_s, "idempotency_key": self.key(idempotency_key)}
        if profile or self.profile:
            fields["profile"] = profile or self.profile
        if limits is not None:
            fields["limits"] = asdict(limits)

        async def opening() -> Session:
            ask = opener(self, fields)
            if idempotency_key is not None:  # a cancelled caller may come back for it
                return (await ask())[0]
            return (await made(self, ask))[0]

        return SessionOpening(opening)

    async def attach(self, session_id: str) -> Session:
        """As `Sandbox.attach`: asks every server that works."""
        check_id(session_id)
        return await RemoteSession.find(self, session_id)

    async def restore(self, snapshot: str, *, count: int = 1, seeds: Sequence[int] | None = None) -> list[Session]:
        """As `Sandbox.restore`, on the server that has the snapshot."""
        check_id(snapshot)
        return await restore_sessions(self, snapshot, count, check_copies(count, seeds))

    async def drop_snapshot(self, snapshot: str) -> None:
        """As `Sandbox.drop_snapshot`."""
        check_id(snapshot)
        await self.everywhere("DELETE", f"/v1/snapshots/{quote(snapshot, safe='')}", "no_snapshot", Answer.fields)

    async def everywhere(
        self,
        method: str,
        path: str,
        missing: str,
        parse: Parse[Value],
        body: dict[str, Any] | None = None,
        *,
        seconds: float = 10.0,
    ) -> tuple[Endpoint, Value]:
        """Ask all servers which of them knows a session or snapshot, and take the first that does. Raises
        `SessionError` (`missing`) when all say that they do not, `SandboxUnavailable` when some cannot be asked."""
        data = dumps(body) if body is not None else None
        rounds = 0

        async def attempt(left: float) -> tuple[Endpoint, Value] | SandboxError:
            nonlocal rounds
            rounds += 1

            async def ask(endpoint: Endpoint) -> Value:
                return await endpoint.ask(method, path, parse, data, seconds=min(left, seconds), headers=_JSON)

            return await look(self.endpoints, missing, ask, again=rounds < _ROUNDS)

        found = await self.persist(attempt, min(self.total_s, 120.0))
        if isinstance(found, SandboxError):
            raise found
        return found

    async def at(
        self,
        endpoint: Endpoint,
        method: str,
        path: str,
        parse: Parse[Value],
        body: dict[str, Any] | bytes | None = None,
        *,
        seconds: float = 60.0,
    ) -> Value:
        """A request to one server, retried there; its JSON or bytes may be repeated without harm."""
        data = dumps(body) if isinstance(body, dict) else body
        headers = _BYTES if isinstance(body, bytes) else _JSON

        async def attempt(left: float) -> Value:
            await self.usable(endpoint, left)
            return await endpoint.ask(method, path, parse, data, seconds=min(left, seconds), headers=headers)

        return await self.persist(attempt, min(self.total_s, 2 * seconds), among=[endpoint])

    async def usable(self, endpoint: Endpoint, seconds: float) -> None:
        """Wait until one server may be asked. Raises what is wrong with it when that is not within `seconds`."""
        end = time.monotonic() + seconds
        while wait := endpoint.breaker.wait_s():
            if time.monotonic() + wait >= end:
                raise endpoint.trouble or SandboxUnavailable(f"{endpoint.url} does not work")
            await self._pause(wait)

    # --- looking ------------------------------------------------------------------------------------------------

    async def stats(self) -> dict[str, Any]:
        """Sums of the servers' counters, `servers` by URL, and this client's `retries`, `batches`, `unreachable`."""
        found = await asyncio.gather(*(self._ask(endpoint, "/v1/stats") for endpoint in self.endpoints))
        servers = {endpoint.url: fields for endpoint, fields in zip(self.endpoints, found, strict=True) if fields}
        total: dict[str, Any] = {}
        for fields in servers.values():
            for name, value in fields.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and not name.endswith("_pid"):
                    total[name] = total.get(name, 0) + value
        own = {"retries": self.retries, "batches": self._coalescer.batches, "unreachable": found.count(None)}
        return {"executions": 0, "leaked": 0, "restarts": 0, **total, **own, "servers": servers}

    async def _ask(self, endpoint: Endpoint, path: str) -> dict[str, Any] | None:
        try:
            return await endpoint.ask("GET", path, Answer.fields, seconds=5.0)
        except SandboxError:
            return None

    async def capabilities(self) -> dict[str, Any]:
        """Of the least loaded server that works."""

        async def attempt(left: float) -> dict[str, Any]:
            endpoint = await self.pick(left)
            return await endpoint.ask("GET", "/v1/capabilities", Answer.fields, seconds=min(left, 10.0))

        return await self.persist(attempt, min(self.total_s, 30.0))


def _default_wall_s(answer: Answer) -> float:
    """Of executions that name no limits, as a server's capabilities have it. Raises `SandboxProtocolError`."""
    try:
        return Limits(wall_s=float(answer.fields()["limits"]["wall_s"])).wall_s
    except (KeyError, TypeError, ValueError) as error:
        raise SandboxProtocolError(f"these are no capabilities: {error!r:.200}") from None


_JSON = {"Content-Type": "application/json"}
_BYTES = {"Content-Type": "application/octet-stream"}
