"""Clients that do not read their answers."""

from __future__ import annotations

import asyncio
import functools
import socket
from typing import Any

import pytest
import uvicorn

from sandbox.server import protocol

_PIECE = b"x" * (1 << 16)
_PIECES = 400


class App:
    """Sends 25 MiB to whoever asks, more than the buffers of a connection hold."""

    def __init__(self) -> None:
        self.sent = 0
        self.left = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(_PIECES):
            await send({"type": "http.response.body", "body": _PIECE, "more_body": True})
            self.sent += 1
            await asyncio.sleep(0)  # an answer leaves at the end of a turn
        await send({"type": "http.response.body", "body": b""})
        await receive()
        self.left.set()


async def ask(app: App, pause_s: float) -> int:
    """Bytes of the answer that come to a client that waits before each piece."""
    http = functools.partial(protocol.JoiningProtocol, most=10)
    config = uvicorn.Config(app, http=http, lifespan="off", log_level="critical")  # type: ignore[arg-type]
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([listening]))
    try:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.connect(listening.getsockname())
        reader, writer = await asyncio.open_connection(sock=client, limit=1 << 16)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        if pause_s < 0:
            await asyncio.wait_for(app.left.wait(), 30)
        size = 0
        try:
            while piece := await reader.read(1 << 20):
                size += len(piece)
                await asyncio.sleep(pause_s)
        except ConnectionError:
            pass
        writer.close()
        return size
    finally:
        server.should_exit = True
        await asyncio.wait_for(serving, 30)


async def test_who_never_reads_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "STALL_S", 0.2)
    app = App()
    assert await ask(app, -1) < len(_PIECE) * _PIECES


async def test_who_reads_slowly_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "STALL_S", 0.5)
    app = App()
    assert await ask(app, 0.02) > len(_PIECE) * _PIECES and app.sent == _PIECES
