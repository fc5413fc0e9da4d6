"""The adapter over real sockets: streams in odd pieces, connections that break, stand still, or are left."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from retool.engines.vllm_adapter import Server, ServerFailed, ServerLost, ServerRefused

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(number: int, ended: str | None = None) -> bytes:
    choice = {"text": "é", "token_ids": [number], "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": ended}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


def piece(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def plain(status: str, body: bytes, head: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{head}\r\n".encode() + body


async def request(reader: asyncio.StreamReader) -> bytes:
    """First line of the next request. Raises `IncompleteReadError` when there is none."""
    head = await reader.readuntil(b"\r\n\r\n")
    sizes = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    await reader.readexactly(sum(sizes))
    return head.split(b"\r\n")[0]


@asynccontextmanager
async def vllm(serve: Serve, path: Path | None = None, silence_s: float = 10.0) -> AsyncIterator[Server]:
    """A client of a server that does this with every connection."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    if path is None:
        listener = await asyncio.start_server(connected, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    else:
        listener = await asyncio.start_unix_server(connected, path)
        url = f"unix:{path}"
    client = Server(url, silence_s)
    try:
        yield client
    finally:
        await client.close()
        listener.close()


async def tokens(client: Server) -> list[int]:
    async with client.stream({"prompt": [1]}) as chunks:
        return [i async for chunk in chunks for i in chunk.ids]


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
@pytest.mark.parametrize("unix", [False, True])
async def test_tokens_arrive_however_the_stream_is_cut(size: int, unix: bool, tmp_path: Path) -> None:
    text = b"".join(event(number) for number in range(20)) + event(20, "stop") + b"data: [DONE]\n\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await request(reader)
            writer.write(STREAM)
            for start in range(0, len(text), size):
                writer.write(piece(text[start : start + size]))
                await writer.drain()
                await asyncio.sleep(0)
            writer.write(b"0\r\n\r\n")

    async with vllm(serve, tmp_path / "socket" if unix else None) as client:
        assert await tokens(client) == list(range(21))
        assert await tokens(client) == list(range(21)), "over the same connection"


async def test_more_turns_than_any_pool_of_connections_would_hold() -> None:
    waiting = 0
    everybody = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal waiting
        await request(reader)
        waiting += 1
        if waiting == 150:
            everybody.set()
        await everybody.wait()
        writer.write(STREAM + piece(event(1, "stop")) + b"0\r\n\r\n")

    async with vllm(serve) as client, asyncio.timeout(30):
        assert await asyncio.gather(*(tokens(client) for _ in range(150))) == [[1]] * 150


async def test_a_stream_that_breaks_off_is_a_lost_server() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(STREAM + piece(event(1)))
        await writer.drain()

    async with vllm(serve) as client:
        with pytest.raises(ServerLost):
            await tokens(client)


async def test_a_server_that_says_nothing_is_lost_after_a_while() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(STREAM + piece(event(1)))
        await reader.read()

    async with vllm(serve, silence_s=0.2) as client:
        with pytest.raises(ServerLost):
            await tokens(client)


async def test_nobody_there_is_a_lost_server(tmp_path: Path) -> None:
    for url in ("http://127.0.0.1:1", f"unix:{tmp_path}/none"):
        client = Server(url)
        with pytest.raises(ServerLost):
            await tokens(client)
        with pytest.raises(ServerLost):
            await client.weight_version()
        await client.close()


async def test_leaving_a_stream_hangs_up() -> None:
    left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(STREAM + piece(event(1)))
        await reader.read()
        left.set()

    async with vllm(serve) as client:
        async with client.stream({"prompt": [1]}) as chunks:
            async for chunk in chunks:
                assert chunk.ids == (1,)
                break
        await asyncio.wait_for(left.wait(), 10)


async def test_a_connection_that_was_closed_while_idle_is_no_failure_of_a_question() -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await request(reader)
        writer.write(plain("200 OK", b'{"weight_version": "7"}'))
        if connections % 2 == 0:  # it closes just as the next request comes
            await request(reader)

    async with vllm(serve) as client:
        for _ in range(4):
            assert await client.weight_version() == "7"
            await client._post("/resume")


async def test_a_connection_is_not_used_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server would have closed it, unseen while the event loop stands still."""
    monkeypatch.setattr("retool.engines.vllm_adapter._KEEP_S", 0.1)
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await request(reader)
            writer.write(plain("200 OK", b'{"weight_version": "7"}'))

    async with vllm(serve) as client:
        await client.weight_version()
        await client.weight_version()
        assert connections == 1
        time.sleep(0.3)  # noqa: ASYNC251 - as a step of the learner does
        await client.weight_version()
        assert connections == 2


async def test_answers_are_told_apart() -> None:
    answers = {
        b"/weight_info": plain("404 Not Found", b"{}"),
        b"/sleep": plain("500 Internal Server Error", b'{"error": {"message": "out of beds"}}'),
        b"/v1/completions": plain("400 Bad Request", b'{"error": {"message": "too long"}}'),
        b"/resume": b"nonsense\r\n\r\n",
    }

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            path = (await request(reader)).split()[1].partition(b"?")[0]
            writer.write(answers[path])

    async with vllm(serve) as client:
        with pytest.raises(ServerRefused, match="has no /weight_info"):
            await client.weight_version()
        with pytest.raises(ServerRefused, match="out of beds"):
            await client.sleep(1)
        with pytest.raises(ServerRefused, match="too long"):
            await tokens(client)
        with pytest.raises(ServerLost) as lost:
            await client._post("/resume")
        assert not isinstance(lost.value, ServerFailed)
