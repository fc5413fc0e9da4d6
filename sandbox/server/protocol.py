"""uvicorn's HTTP/1.1 protocol with differences: an answer leaves in one write, not its head and body apart; whoever
works for a client can be told when it goes away; a request says when all of it has come; nobody can use up the server
with heads that never end, answers that nobody reads, connections that say nothing, or very many of them; `Upgrade` is
ignored; and what is no HTTP is refused in the shape of all refusals.

Each write is a system call that wakes the client; for answers of a few hundred bytes that is most of the cost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from sandbox.server.replies import JSON, Refused

MAX_HEAD = 64 * 1024
"""Bytes of a request's line and headers; also what may come at once that is neither these nor a body."""
HEAD_S = 10.0
"""Seconds in which a head must be complete; what still comes of a request that was answered has as long."""
STALL_S = 60.0
"""Seconds in which a client takes nothing of an answer that is too long for the buffers between us: then it is left."""
MAX_PIPELINE = 100
"""Requests of one connection that wait for the answers to earlier ones."""
_LINGER_S = 2.0
"""Seconds for which a refused client is listened to: closing at once, the kernel would throw the refusal away."""


class _Joined:
    """A transport that sends what is written in one turn of the event loop together."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []
        self.ended = False

    def write(self, data: bytes) -> None:
        """Like the transport's."""
        if self.ended:
            return
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def _flush(self) -> None:
        if self._parts:
            parts, self._parts = self._parts, []
            if not self._transport.is_closing():
                self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))

    def end(self, data: bytes) -> None:
        """Send this as the last thing; whatever is written later is dropped."""
        self.write(data)
        self._flush()
        self.ended = True
        with contextlib.suppress(OSError, NotImplementedError):
            self._transport.write_eof()

    def close(self) -> None:
        """Like the transport's; what was written is sent first."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Client:
    """The other end of a connection: `gone` once it is, and then everything in `watchers` has been called."""

    def __init__(self) -> None:
        self.gone = False
        self.watchers: set[Callable[[], None]] = set()

    def leave(self) -> None:
        """It has hung up."""
        self.gone = True
        for tell in list(self.watchers):
            tell()


class _Refusal(Exception):
    """Raised where the parser calls us: the connection ends with this answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.refused = Refused(status, code, message)


def _malformed() -> _Refusal:
    return _Refusal(400, "invalid_request", "this is not an HTTP/1.1 request")


def _head_too_large() -> _Refusal:
    return _Refusal(431, "too_large", f"request line and headers may have {MAX_HEAD} bytes")


def _parser(protocol: JoiningProtocol) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(protocol)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
    return parser


class JoiningProtocol(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`. A request's scope holds its `Client` as `retool.client`, and `retool.complete`
    once all of it has come. `most`: open connections; beyond them those make room that do nothing.

    Timers run only while something is missing: an ordinary request comes whole and sets none.
    """

    def __init__(self, *args: Any, most: int, **named: Any) -> None:
        super().__init__(*args, **named)
        self._most = most
        self._in_head = self._in_request = False
        self._bare = 0
        """Bytes that came since the last piece of a body or end of a request."""
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    # --- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """asyncio's."""
        self.peer = Client()
        self._out = _Joined(transport, self.loop)
        super().connection_made(self._out)  # type: ignore[arg-type]
        self._await_request()
        if len(self.connections) > self._most and not self._make_room():
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self._stop_timer()
        self._stop_stall()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        self.peer.leave()

    @property
    def idle(self) -> bool:
        """Whether no request is being worked on."""
        return self.cycle is None or self.cycle.response_complete

    def _make_room(self) -> bool:
        """Close an eighth of the connections that do nothing, first those that never asked for anything."""
        others = [each for each in self.connections if each is not self and isinstance(each, JoiningProtocol)]
        closable = [each for each in others if each.idle]
        closable.sort(key=lambda each: each.cycle is not None)
        for each in closable[: max(1, len(closable) // 8)]:
            each.transport.abort()
            self.connections.discard(each)
        return bool(closable)

    def _await_request(self) -> None:
        """As between requests: who says nothing is hung up on."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def pause_writing(self) -> None:
        """asyncio's: the client reads more slowly than we write."""
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        """asyncio's."""
        self._stop_stall()
        super().resume_writing()

    def _watch_stall(self) -> None:
        self._stall = self.loop.call_later(STALL_S, self._stalled, self.transport.get_write_buffer_size())

    def _stop_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _stalled(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_stall()
        else:
            self.transport.abort()

    def _start_timer(self, seconds: float = HEAD_S) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._out.ended:
            self.transport.abort()
        elif not self.idle:  # the body has a timeout of its own, and an earlier request may take its time
            self._start_timer()
        elif self._in_head:
            self._refuse(_Refusal(408, "invalid_request", f"the headers did not arrive within {HEAD_S:g} s"))
        else:
            self.transport.close()

    def _refuse(self, refusal: _Refusal) -> None:
        """Answer, unless an answer is being sent, and end."""
        reply = refusal.refused.reply()
        head = b"content-type: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % (JSON.encode(), len(reply.body))
        whole = STATUS_LINE[reply.status] + head + reply.body
        self._out.end(whole if self.idle or not self.cycle.response_started else b"")
        self._stop_timer()
        self._start_timer(_LINGER_S)

    # --- what comes ---------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        if self._out.ended:
            return
        self._unset_keepalive_if_required()
        self._bare += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, _Refusal) else _malformed())
            return
        if self._bare > MAX_HEAD:
            self._refuse(_head_too_large())
        elif self._bare or self._in_head:
            self._start_timer()

    def _feed(self, data: bytes) -> None:
        rest = memoryview(data)
        while True:
            try:
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as upgrade:
                # The parser takes what follows for another protocol, though it is this request's body: start again.
                rest = rest[upgrade.args[0] :]
                head = self._without_upgrade()
                self.parser = _parser(self)
                self.parser.feed_data(head)
            else:
                return

    def _without_upgrade(self) -> bytes:
        line = (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        lines = [b"%b %b HTTP/%b" % line, *(b"%b: %b" % each for each in self.headers if each[0] != b"upgrade")]
        return b"\r\n".join([*lines, b"", b""])

    # --- the parser's calls -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """httptools'."""
        super().on_message_begin()
        self._in_head = self._in_request = True
        self.scope["retool.client"] = self.peer  # type: ignore[typeddict-unknown-key]

    def on_headers_complete(self) -> None:
        """httptools'."""
        if self._bare > MAX_HEAD:  # perhaps: a part of the body may have come with it
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > MAX_HEAD:
                raise _head_too_large()
        if len(self.pipeline) >= MAX_PIPELINE:
            raise _Refusal(400, "invalid_request", f"more than {MAX_PIPELINE} requests at once on one connection")
        self._in_head = False
        self._stop_timer()
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise _malformed()
            return  # `_feed` gives us this head again, without it
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """httptools'."""
        self._bare = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """httptools'."""
        if self.parser.should_upgrade():
            return
        self._bare = 0
        self._in_request = False
        super().on_message_complete()
        self.scope["retool.complete"] = True  # type: ignore[typeddict-unknown-key]
        self._stop_timer()
        if self.cycle.response_complete:  # it was answered before all of it had come
            self._await_request()

    def on_response_complete(self) -> None:
        """uvicorn's."""
        super().on_response_complete()
        if self._in_request:
            self._start_timer()
