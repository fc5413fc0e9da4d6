"""Asking all servers at once: the first greeting, and where a session or a snapshot is. One that is dead or hangs
holds nobody up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from sandbox.remote_endpoint import Endpoint, LostRequest, Nonsense
from sandbox.types import SandboxError, SandboxUnavailable, SessionError

GREETING_S = 30.0
"""A server that is silent for so long counts as one that does not work."""
_COMPANY_S = 0.5
"""Once one server has answered, the others have this long to say that something is wrong with what they were asked."""
Value = TypeVar("Value")


async def greet(greetings: Mapping[Endpoint, asyncio.Task[Exception | None]]) -> None:
    """Returns once one server has greeted; those that are silent are not to be used until they do.

    Raises what is wrong when one refuses, or when none works.
    """
    pending = set(greetings.values())
    failures: list[Exception] = []
    greeted = False
    while pending:
        more = _COMPANY_S if greeted else None
        done, pending = await asyncio.wait(pending, timeout=more, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            break
        found = [task.result() for task in done]
        greeted = greeted or None in found
        failures += [error for error in found if error is not None]
    refused = [error for error in failures if not isinstance(error, SandboxUnavailable | Nonsense)]
    if refused or not greeted:
        raise (refused or [error for error in failures if isinstance(error, Nonsense)] or failures)[0]
    for endpoint, task in greetings.items():
        if task in pending:
            endpoint.breaker.hold(GREETING_S)


async def look(
    endpoints: Sequence[Endpoint], missing: str, ask: Callable[[Endpoint], Awaitable[Value]], *, again: bool
) -> tuple[Endpoint, Value] | SandboxError:
    """The first server that knows what it is asked for, and its answer. When those that can be reached do not know
    (`missing` is the code of that error), what is to be said about it.

    Raises any other error of a session; and, to be asked again, why no server could be reached or (with `again`) why an
    answer was lost on its way.
    """

    async def one(endpoint: Endpoint) -> tuple[Endpoint, Value | SandboxError]:
        try:
            return endpoint, await ask(endpoint)
        except SandboxError as error:
            return endpoint, error

    unknown: SessionError | None = None
    failures: dict[Endpoint, SandboxError] = {}
    tasks = [asyncio.ensure_future(one(endpoint)) for endpoint in endpoints]
    try:
        for each in asyncio.as_completed(tasks):
            endpoint, found = await each
            if not isinstance(found, SandboxError):
                return endpoint, found
            if not isinstance(found, SessionError):
                failures[endpoint] = found
            elif found.code == missing:
                unknown = found
            else:
                raise found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if unknown is not None and not failures:
        return unknown
    text = "; ".join(_named(endpoint, error) for endpoint, error in failures.items())
    if unknown is not None:
        for error in failures.values():
            if again and not _away(error):
                raise error
        return SandboxUnavailable(f"{unknown}; not all servers could be asked: {text}")
    for error in failures.values():
        if not error.retryable or len(failures) == 1:
            raise error
    raise SandboxUnavailable(text)


def _away(error: SandboxError) -> bool:
    """Whether asking the same server again soon is of no use."""
    if isinstance(error, LostRequest):
        return error.late or not error.sent
    return isinstance(error, Nonsense | SandboxUnavailable) or not error.retryable


def _named(endpoint: Endpoint, error: SandboxError) -> str:
    return str(error) if endpoint.url in str(error) else f"{endpoint.url}: {error}"
