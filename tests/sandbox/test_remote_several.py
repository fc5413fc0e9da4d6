"""Several servers, one of which is dead or hangs: neither opening nor looking for a session waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from sandbox.remote import RemoteSandbox
from sandbox.remote_retry import Breaker
from sandbox.types import Limits, SandboxError, SandboxProtocolError, SandboxUnavailable, SessionError
from tests.sandbox.liars import http_answer, liar
from tests.sandbox.serving import TOKEN, CuttingProxy, Served, served

DEAD = "http://127.0.0.1:1"
UNKNOWN = "0" * 32


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--workers", "2") as it:
        yield it


@pytest.fixture(params=["dead", "hangs", "babbles"])
async def bad(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """The URL of a server that is of no use."""
    if request.param == "dead":
        yield DEAD
        return
    page = http_answer(b"<html>", b"text/html") if request.param == "babbles" else None
    async with liar(page) as it:
        yield it.url


async def test_a_session_and_a_snapshot_are_found_beside_it(server: Served, bad: str) -> None:
    async with RemoteSandbox([bad, server.url], total_s=60) as box:
        async with asyncio.timeout(15):
            async with box.session() as session:
                await session.exec("x = 41")
                snapshot = await session.snapshot()
                assert (await (await box.attach(session.id)).exec("x")).stdout == "41\n"
                (copy,) = await box.restore(snapshot)
                assert (await copy.exec("x + 1")).stdout == "42\n"
                await copy.close()
                await box.drop_snapshot(snapshot)
        async with asyncio.timeout(15):
            with pytest.raises(SandboxUnavailable, match=r"there is no .* not all servers could be asked: " + bad):
                await box.attach(UNKNOWN)


async def test_what_all_servers_do_not_know_does_not_exist(server: Served) -> None:
    with served("--workers", "1") as other:
        async with RemoteSandbox([server.url, other.url]) as box:
            for call in (box.attach(UNKNOWN), box.restore(UNKNOWN), box.drop_snapshot(UNKNOWN)):
                with pytest.raises(SessionError) as unknown:
                    await call
                assert unknown.value.code in ("no_session", "no_snapshot")
            sessions = [await box.session() for _ in range(4)]
            assert [endpoint.sessions for endpoint in box.endpoints] == [2, 2]
            for session in sessions:
                assert (await box.attach(session.id)).id == session.id


async def test_an_answer_lost_on_its_way_is_asked_for_again(server: Served) -> None:
    with served("--workers", "1") as other:
        async with CuttingProxy(server.address) as proxy, RemoteSandbox([proxy.url, other.url]) as box:
            proxy_endpoint = box.endpoints[0]
            sessions = [await box.session() for _ in range(2)]
            (session,) = [each for each in sessions if each._endpoint is proxy_endpoint]  # type: ignore[attr-defined]
            snapshot = await session.snapshot()
            before = (await box.stats())["sessions"]
            proxy.cut_answers = 1
            (copy,) = await box.restore(snapshot)
            assert proxy.cuts == 1 and (await box.stats())["sessions"] == before + 1, "restored once"
            await copy.close()


async def test_opening_waits_for_the_first_that_works(server: Served, bad: str) -> None:
    started = time.monotonic()
    async with RemoteSandbox([bad, server.url]) as box:
        assert time.monotonic() - started < 4
        results = await asyncio.gather(*(box.exec(f"print({number})") for number in range(30)))
        assert [result.stdout for result in results] == [f"{number}\n" for number in range(30)]
        assert time.monotonic() - started < 10, "nothing is sent to a server that has not answered yet"


async def test_a_server_that_is_slow_to_greet_is_used_once_it_has(server: Served) -> None:
    ready = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ready.wait()
        far_reader, far_writer = await asyncio.open_connection(*server.address)
        async with asyncio.TaskGroup() as both:
            both.create_task(_copy(reader, far_writer))
            both.create_task(_copy(far_reader, writer))

    late = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{late.sockets[0].getsockname()[1]}"
    async with RemoteSandbox([url, server.url]) as box:
        assert not box.endpoints[0].breaker.closed
        ready.set()
        async with asyncio.timeout(10):
            while not box.endpoints[0].breaker.closed:  # noqa: ASYNC110 - the breaker has no event
                await asyncio.sleep(0.02)
        assert await box.pick(1.0, box.endpoints[0]) is box.endpoints[0]
    late.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def test_opening_says_what_is_wrong_when_none_works() -> None:
    async with liar(http_answer(b"<html>", b"text/html")) as it:
        with pytest.raises(SandboxProtocolError, match=it.url):
            await RemoteSandbox([DEAD, it.url]).__aenter__()
    with pytest.raises(SandboxUnavailable, match=DEAD):
        await RemoteSandbox([DEAD]).__aenter__()


async def test_one_that_refuses_the_token_is_noticed() -> None:
    with served(env={"RETOOL_SANDBOX_TOKEN": TOKEN}) as server, served() as open_to_all:
        with pytest.raises(SandboxError, match="token") as refused:
            async with RemoteSandbox([open_to_all.url, server.url], token="0123456789abcdef-wrong"):
                pass
        assert not refused.value.retryable


def test_a_silent_server_is_held_until_it_answers() -> None:
    breaker = Breaker()
    breaker.hold(100)
    assert not breaker.closed and breaker.wait_s() > 90
    breaker.succeed()
    assert breaker.closed


async def test_calls_that_share_a_request_keep_their_own_time(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.remote.QUEUE_S", 0.5)
    monkeypatch.setattr("sandbox.remote._MARGIN_S", 0.5)
    async with liar(None, greets=True) as hung, RemoteSandbox([hung.url, server.url]) as box:
        box.endpoints[1].in_flight += 100  # so that all are sent to the one that hangs
        patient = [asyncio.create_task(box.exec("1", limits=Limits(wall_s=60))) for _ in range(14)]
        hasty = [
            asyncio.create_task(box.exec(f"print({n})", limits=Limits(wall_s=w))) for n, w in enumerate([1, 2] * 7)
        ]
        await asyncio.sleep(0.1)
        box.endpoints[1].in_flight -= 100
        async with asyncio.timeout(15):
            assert [result.stdout for result in await asyncio.gather(*hasty)] == [f"{n}\n" for n in range(14)]
        assert hung.asked >= 2 and box._coalescer.batches >= 2
        for each in patient:
            each.cancel()
