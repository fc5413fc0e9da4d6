"""Runs a server: socket first, then the sandbox, then HTTP; and ends it gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import logging
import resource
import socket
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from sandbox.local import LocalSandbox
from sandbox.loops import new_event_loop
from sandbox.server.app import create_app
from sandbox.server.gate import Gate
from sandbox.server.options import ServeError, ServeOptions
from sandbox.server.protocol import JoiningProtocol
from sandbox.server.state import ServerState
from sandbox.server.tokens import Tokens, load_tokens

DOCS = "docs/sandbox-api.md"
_BACKLOG = 2048
_CONNECTIONS = 8192
log = logging.getLogger("retool.sandbox")


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or SIGINT. Raises `ServeError`, `ConfinementUnavailable` and other `SandboxError`s."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        tokens = load_tokens(options.token_file)
    except ValueError as error:
        raise ServeError(str(error)) from None
    options.check(tokens)
    backlog, connections = _room()
    with _listening(options, backlog) as listener, asyncio.Runner(loop_factory=new_event_loop) as runner:
        if options.uds is None:
            options = replace(options, port=listener.getsockname()[1])
        runner.run(_serve(options, Tokens(tokens), listener, backlog, connections))


def _room() -> tuple[int, int]:
    """How many connections may wait to be accepted, and how many may be open: all descriptors that we can get, but for
    our own and for those that are accepted in one go, before any can be closed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most == resource.RLIM_INFINITY:
        return _BACKLOG, _CONNECTIONS
    backlog = min(_BACKLOG, most // 4)
    return backlog, max(1, min(_CONNECTIONS, most - backlog - 64))


def _sandbox(options: ServeOptions) -> LocalSandbox:
    optional: dict[str, Any] = {}
    if options.require:
        optional["require"] = options.require
    if options.max_sessions is not None:
        optional["max_sessions"] = options.max_sessions
    try:
        return LocalSandbox(
            profile=options.profile,
            limits=options.limits,
            workers=options.workers or None,
            tier=options.tier,
            allow_unconfined=options.allow_unconfined,
            **optional,
        )
    except ValueError as error:
        raise ServeError(str(error)) from None


async def _check_required(options: ServeOptions, box: LocalSandbox) -> None:
    """Raises `ServeError` unless every required property was shown to hold."""
    shown = (await box.capabilities()).get("properties") or {}
    held = {name for name in shown if not isinstance(shown, dict) or shown[name]}
    missing = [name for name in options.require if name not in held]
    if missing:
        known = ", ".join(sorted(held)) or "nothing"
        raise ServeError(f"--require {', '.join(missing)}: tier {box.tier} was not shown to give it; it gives {known}")


async def _serve(
    options: ServeOptions, tokens: Tokens, listener: socket.socket, backlog: int, connections: int
) -> None:
    async with _sandbox(options) as box:
        await _check_required(options, box)
        state = ServerState(box, options, tokens)
        app = create_app(state)
        config = uvicorn.Config(
            app,
            http=functools.partial(JoiningProtocol, most=connections),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            interface="asgi3",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            backlog=backlog,
            timeout_graceful_shutdown=2,
        )
        server = _Server(config, app, state, options.url)
        await server.serve(sockets=[listener])


class _Server(uvicorn.Server):
    """Drains on the first signal and ends at the second."""

    def __init__(self, config: uvicorn.Config, gate: Gate, state: ServerState, url: str) -> None:
        super().__init__(config)
        self.gate, self.state, self.url = gate, state, url
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says where it serves once signals are handled and connections are accepted."""
        await super().startup(sockets)
        gc.freeze()  # what start-up made stays: no collection has to look at it again
        state = self.state
        print(
            f"sandbox: {self.url}  tier {state.box.tier}  profile {state.options.profile}  "
            f"token {'needed' if state.tokens.required else 'not needed'}  docs {DOCS} and /openapi.json",
            flush=True,
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called in the main thread, between any two instructions."""
        if self.state.draining:
            self.should_exit = self.force_exit = True
            return
        self.state.draining = True
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        """New work is refused; what runs may finish within `drain_s`."""
        end = self._loop.time() + self.state.options.drain_s
        while self._loop.time() < end and (  # noqa: ASYNC110 - three counters, no event
            self.state.load.total or self.state.once.running or self.gate.active
        ):
            await asyncio.sleep(0.02)
        if self.state.load.total:
            log.warning("ending with %d executions under way", self.state.load.total)
        self.should_exit = True


@contextlib.contextmanager
def _listening(options: ServeOptions, backlog: int) -> Iterator[socket.socket]:
    listener = (
        _unix_socket(options.uds, options.uds_mode, backlog)
        if options.uds is not None
        else _tcp_socket(options.host, options.port, backlog)
    )
    try:
        yield listener
    finally:
        listener.close()
        if options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)


def _tcp_socket(host: str, port: int, backlog: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ServeError(f"--host {host} --port {port}: {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        hint = "; another server has it: choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from None
    return listener


def _unix_socket(path: str, mode: int, backlog: int) -> socket.socket:
    """A socket whose file has `mode`. A file left over by a server that died is replaced."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(Path(path).lstat().st_mode):
            with socket.socket(socket.AF_UNIX) as other:
                if other.connect_ex(path) == errno.ECONNREFUSED:
                    Path(path).unlink()
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        Path(path).chmod(mode)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        hint = ""
        if error.errno == errno.EADDRINUSE:
            hint = (
                "; another server has it" if Path(path).is_socket() else "; there is something else that is no socket"
            )
        raise ServeError(f"cannot listen on --uds {path}: {error.strerror or error}{hint}") from None
    return listener
